//! Sending a client elsewhere, as the Gateway API's HTTPRequestRedirectFilter does.

use http::header::{HeaderValue, LOCATION};
use http::{Response, StatusCode};

use super::PathRewrite;

/// Where clients are sent; what is not said stays as in the request.
#[derive(Clone, Debug)]
pub struct Redirect {
    /// `http` or `https`.
    pub scheme: Option<&'static str>,
    /// The host.
    pub hostname: Option<String>,
    /// The port; without one, the usual one of a scheme that is given, else that of the listener.
    pub port: Option<u16>,
    /// The path.
    pub path: Option<PathRewrite>,
    /// The status.
    pub status: StatusCode,
}

/// What a client has asked for.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// How.
    pub scheme: &'static str,
    /// The host.
    pub host: &'a str,
    /// The port of the listener.
    pub port: u16,
    /// The path.
    pub path: &'a str,
    /// What follows the `?`.
    pub query: Option<&'a str>,
    /// How much of the path the route's match has taken, in bytes.
    pub matched: usize,
}

// === impl Redirect ===

impl Redirect {
    /// The response to a request for this.
    pub fn response(&self, asked: &Asked<'_>) -> Response<()> {
        let scheme = self.scheme.unwrap_or(asked.scheme);
        let host = self.hostname.as_deref().unwrap_or(asked.host);
        let port = self.port(scheme, asked.port);
        let port = port.map(|port| format!(":{port}")).unwrap_or_default();
        let rewrite = |rewrite: &PathRewrite| rewrite.apply(asked.path, asked.matched);
        let path = self.path.as_ref().map(rewrite);
        let path = path.as_deref().unwrap_or(asked.path);
        let query = asked.query.map(|query| format!("?{query}"));
        let query = query.unwrap_or_default();
        let location = format!("{scheme}://{host}{port}{path}{query}");
        let mut response = Response::new(());
        *response.status_mut() = self.status;
        if let Ok(location) = HeaderValue::from_str(&location) {
            response.headers_mut().insert(LOCATION, location);
        }
        response
    }

    /// The port to write, which the usual one of a scheme is not.
    fn port(&self, scheme: &str, listener: u16) -> Option<u16> {
        let usual = if scheme == "https" { 443 } else { 80 };
        let port = match (self.port, self.scheme) {
            (Some(port), _) => port,
            (None, Some(_)) => usual,
            (None, None) => listener,
        };
        Some(port).filter(|port| *port != usual)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_stays_as_in_the_request() {
        let none = || Redirect {
            scheme: None,
            hostname: None,
            port: None,
            path: None,
            status: StatusCode::FOUND,
        };
        let https = || Redirect {
            scheme: Some("https"),
            ..none()
        };
        let asked = Asked {
            scheme: "http",
            host: "a.example",
            port: 8080,
            path: "/old/page",
            query: Some("q=1"),
            matched: 4,
        };
        for (redirect, location) in [
            (none(), "http://a.example:8080/old/page?q=1"),
            (https(), "https://a.example/old/page?q=1"),
            (
                Redirect {
                    port: Some(8443),
                    ..https()
                },
                "https://a.example:8443/old/page?q=1",
            ),
            (
                Redirect {
                    hostname: Some("b.example".to_owned()),
                    port: Some(80),
                    path: Some(PathRewrite::Prefix("/new".to_owned())),
                    ..none()
                },
                "http://b.example/new/page?q=1",
            ),
        ] {
            let response = redirect.response(&asked);
            assert_eq!(response.headers()[LOCATION], location);
            assert_eq!(response.status(), StatusCode::FOUND);
        }
    }
}
