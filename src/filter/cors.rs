//! Cross-origin resource sharing (Fetch Standard, "CORS protocol"), as the Gateway API's
//! HTTPCORSFilter has it: preflights are answered here, and responses say who may read them.

use std::time::Duration;

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderValue, ORIGIN,
    VARY,
};
use http::request::Parts;
use http::{Method, Response, StatusCode};

/// Which pages of other origins may read responses.
#[derive(Clone, Debug)]
pub struct Cors {
    /// Whose pages.
    pub origins: Vec<AllowedOrigin>,
    /// Whether they may come with cookies and the like.
    pub credentials: bool,
    /// The methods that preflights are told; `None` for the one asked for.
    pub methods: Option<HeaderValue>,
    /// The request headers that preflights are told; `None` for those asked for.
    pub headers: Option<HeaderValue>,
    /// The response headers that pages may read.
    pub expose: Option<HeaderValue>,
    /// How long a preflight holds.
    pub max_age: Duration,
}

/// An origin whose pages may read responses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedOrigin {
    /// Every one.
    Any,
    /// This one: scheme, host and port.
    Exact(String),
    /// Those whose host ends so, with this scheme and port.
    Wildcard {
        /// As in `https://`.
        scheme: String,
        /// As in `.example.com`, with the port if there is one.
        suffix: String,
    },
}

/// What the page that made a request may know of its response.
#[derive(Clone, Debug)]
pub struct Grant {
    origin: Option<HeaderValue>,
    credentials: bool,
    expose: Option<HeaderValue>,
    /// The response would be another one for another origin.
    varies: bool,
}

// === impl Cors ===

impl Cors {
    /// The answer to a preflight, if the request is one.
    pub fn preflight(&self, parts: &Parts) -> Option<Response<()>> {
        let asked = &parts.headers;
        let method = asked.get(ACCESS_CONTROL_REQUEST_METHOD)?;
        if parts.method != Method::OPTIONS || !asked.contains_key(ORIGIN) {
            return None;
        }
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        let grant = self.grant(asked);
        grant.write(headers);
        if grant.origin.is_some() {
            let methods = self.methods.as_ref().unwrap_or(method);
            headers.insert(ACCESS_CONTROL_ALLOW_METHODS, methods.clone());
            let asked_for = asked.get(ACCESS_CONTROL_REQUEST_HEADERS);
            if let Some(allowed) = self.headers.as_ref().or(asked_for) {
                headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, allowed.clone());
            }
            headers.insert(ACCESS_CONTROL_MAX_AGE, self.max_age.as_secs().into());
        }
        Some(response)
    }

    /// What the page behind a request may know of the response.
    pub fn grant(&self, headers: &HeaderMap) -> Grant {
        let origin = headers.get(ORIGIN);
        let text = origin.and_then(|origin| origin.to_str().ok());
        let allowed = text.and_then(|text| self.origins.iter().find(|one| one.allows(text)));
        // A wildcard would not do for requests with credentials.
        let origin = match allowed {
            Some(AllowedOrigin::Any) if !self.credentials => Some(HeaderValue::from_static("*")),
            Some(_) => origin.cloned(),
            None => None,
        };
        Grant {
            credentials: self.credentials && origin.is_some(),
            expose: self.expose.clone().filter(|_| origin.is_some()),
            origin,
            varies: self.credentials || !self.origins.contains(&AllowedOrigin::Any),
        }
    }
}

// === impl AllowedOrigin ===

impl AllowedOrigin {
    fn allows(&self, origin: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => exact.eq_ignore_ascii_case(origin),
            Self::Wildcard { scheme, suffix } => {
                let origin = origin.to_ascii_lowercase();
                let host = origin.strip_prefix(&**scheme);
                let label = host.and_then(|host| host.strip_suffix(&**suffix));
                label.is_some_and(|label| !label.is_empty() && !label.contains(['/', ':']))
            }
        }
    }
}

// === impl Grant ===

impl Grant {
    /// Writes it, instead of what the endpoint says.
    pub fn write(&self, headers: &mut HeaderMap) {
        let mut set = |name, value: Option<HeaderValue>| match value {
            Some(value) => drop(headers.insert(name, value)),
            None => drop(headers.remove(name)),
        };
        set(ACCESS_CONTROL_ALLOW_ORIGIN, self.origin.clone());
        let credentials = HeaderValue::from_static("true");
        set(
            ACCESS_CONTROL_ALLOW_CREDENTIALS,
            self.credentials.then_some(credentials),
        );
        set(ACCESS_CONTROL_EXPOSE_HEADERS, self.expose.clone());
        if self.varies {
            headers.append(VARY, HeaderValue::from_static("Origin"));
        }
    }
}
