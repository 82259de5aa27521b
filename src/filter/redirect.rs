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
    /// The response to a request for this; 400 where neither says which host.
    pub fn response(&self, asked: &Asked<'_>) -> Response<()> {
        let mut response = Response::new(());
        let Some(location) = self.location(asked) else {
            *response.status_mut() = StatusCode::BAD_REQUEST;
            return response;
        };
        *response.status_mut() = self.status;
        if let Ok(location) = HeaderValue::from_str(&location) {
            response.headers_mut().insert(LOCATION, location);
        }
        response
    }

    /// Where to; `None` without a host, which HTTP/1.0 need not name. A location without one could
    /// not change the scheme, and a path that begins with `//` would name another host.
    fn location(&self, asked: &Asked<'_>) -> Option<String> {
        let scheme = self.scheme.unwrap_or(asked.scheme);
        let host = self.hostname.as_deref().unwrap_or(asked.host);
        if host.is_empty() {
            return None;
        }
        let port = self.port(scheme, asked.port);
        let port = port.map(|port| format!(":{port}")).unwrap_or_default();
        let rewrite = |rewrite: &PathRewrite| rewrite.apply(asked.path, asked.matched);
        let path = self.path.as_ref().map(rewrite);
        let path = match path.as_deref().unwrap_or(asked.path) {
            // So `OPTIONS *` is written in a URL (RFC 9112 section 3.2.4).
            "*" => "",
            path => path,
        };
        let query = asked.query.map(|query| format!("?{query}"));
        let query = query.unwrap_or_default();
        Some(format!("{scheme}://{host}{port}{path}{query}"))
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

    const NONE: Redirect = Redirect {
        scheme: None,
        hostname: None,
        port: None,
        path: None,
        status: StatusCode::FOUND,
    };

    const ASKED: Asked<'_> = Asked {
        scheme: "http",
        host: "a.example",
        port: 8080,
        path: "/old/page",
        query: Some("q=1"),
        matched: 4,
    };

    #[test]
    fn what_is_not_said_stays_as_in_the_request() {
        let https = || Redirect {
            scheme: Some("https"),
            ..NONE
        };
        for (redirect, location) in [
            (NONE, "http://a.example:8080/old/page?q=1"),
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
                    ..NONE
                },
                "http://b.example/new/page?q=1",
            ),
        ] {
            let response = redirect.response(&ASKED);
            assert_eq!(response.headers()[LOCATION], location);
            assert_eq!(response.status(), StatusCode::FOUND);
        }
    }

    #[test]
    fn without_a_host_there_is_nowhere_to_go() {
        let asked = Asked { host: "", ..ASKED };
        let response = NONE.response(&asked);
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        assert!(!response.headers().contains_key(LOCATION));
        let named = Redirect {
            hostname: Some("b.example".to_owned()),
            ..NONE
        };
        let response = named.response(&asked);
        assert_eq!(
            response.headers()[LOCATION],
            "http://b.example:8080/old/page?q=1"
        );
    }

    #[test]
    fn the_whole_server_has_no_path() {
        let asked = Asked {
            path: "*",
            query: None,
            matched: 0,
            ..ASKED
        };
        for path in [None, Some(PathRewrite::Prefix("/new".to_owned()))] {
            let response = Redirect { path, ..NONE }.response(&asked);
            assert_eq!(response.headers()[LOCATION], "http://a.example:8080");
        }
    }
}
