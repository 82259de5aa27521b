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
        let is_open = self.is_open();
        let origin = if is_open {
            Some(HeaderValue::from_static("*"))
        } else {
            headers.get(ORIGIN).filter(|one| self.allows(one)).cloned()
        };
        Grant {
            credentials: self.credentials && origin.is_some(),
            expose: self.expose.clone().filter(|_| origin.is_some()),
            origin,
            varies: !is_open,
        }
    }

    /// The answer is the same for every request, also for one without an origin: a cache may give it
    /// to any. A wildcard would not do for requests with credentials.
    fn is_open(&self) -> bool {
        !self.credentials && self.origins.contains(&AllowedOrigin::Any)
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        let allows = |text| self.origins.iter().any(|one| one.allows(text));
        origin.to_str().is_ok_and(allows)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn cors(origins: &[&AllowedOrigin], credentials: bool) -> Cors {
        Cors {
            origins: origins.iter().copied().cloned().collect(),
            credentials,
            methods: None,
            headers: None,
            expose: None,
            max_age: Duration::ZERO,
        }
    }

    #[test]
    fn what_depends_on_the_origin_says_so_to_caches() {
        let (any, one) = (
            &AllowedOrigin::Any,
            &AllowedOrigin::Exact("https://a.test".to_owned()),
        );
        let (a, b) = (Some("https://a.test"), Some("https://b.test"));
        for (cors, origin, allowed, vary) in [
            (cors(&[one], false), a, a, Some("Origin")),
            (cors(&[one], false), b, None, Some("Origin")),
            (cors(&[one], false), None, None, Some("Origin")),
            (cors(&[any], false), a, Some("*"), None),
            (cors(&[any], false), None, Some("*"), None),
            (cors(&[one, any], false), a, Some("*"), None),
            (cors(&[one, any], false), b, Some("*"), None),
            (cors(&[any], true), a, a, Some("Origin")),
            (cors(&[any], true), None, None, Some("Origin")),
        ] {
            let mut asked = HeaderMap::new();
            let value = origin.map(HeaderValue::from_static);
            asked.extend(value.map(|value| (ORIGIN, value)));
            let mut answered = HeaderMap::new();
            cors.grant(&asked).write(&mut answered);
            let is = |name, expected: Option<&str>| {
                let value = answered.get(name).map(|value| value.to_str().unwrap());
                assert_eq!(value, expected, "{cors:?} {origin:?}");
            };
            is(ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
            is(VARY, vary);
        }
    }
}
