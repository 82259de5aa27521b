//! `http` and `https` URLs, as those who connect to them need them.

use std::fmt;

use http::Uri;
use http::uri::{PathAndQuery, Scheme};

/// An `http` or `https` URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// It is an `https` one.
    pub is_encrypted: bool,
    /// A name or an address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Host and port as they are written.
    pub authority: String,
    /// What is behind.
    pub path: PathAndQuery,
}

// === impl Url ===

impl Url {
    /// `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        match self.is_encrypted {
            true => "https",
            false => "http",
        }
    }
}

impl std::str::FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let uri: Uri = text
            .parse()
            .map_err(|error| format!("is no URL: {error}"))?;
        let is_encrypted = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            _ => return Err("is no `http` or `https` URL".to_owned()),
        };
        let authority = uri.authority().ok_or("names no host")?;
        let default_port = if is_encrypted { 443 } else { 80 };
        let host = authority.host();
        Ok(Self {
            is_encrypted,
            host: host
                .trim_start_matches('[')
                .trim_end_matches(']')
                .to_owned(),
            port: authority.port_u16().unwrap_or(default_port),
            authority: authority.to_string(),
            path: uri.path_and_query().cloned().ok_or("names no path")?,
        })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            authority, path, ..
        } = self;
        write!(f, "{}://{authority}{path}", self.scheme())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_whom_to_ask_and_how() {
        for (text, is_encrypted, host, port) in [
            ("http://127.0.0.1:9901/readyz", false, "127.0.0.1", 9901),
            ("https://[::1]:9901/readyz", true, "::1", 9901),
            ("http://localhost", false, "localhost", 80),
            ("https://localhost/a?b", true, "localhost", 443),
        ] {
            let url: Url = text.parse().unwrap();
            assert_eq!(url.is_encrypted, is_encrypted, "{text}");
            assert_eq!((&*url.host, url.port), (host, port), "{text}");
        }
        for text in [
            "",
            "127.0.0.1:9901",
            "/readyz",
            "ftp://localhost/",
            "http://",
        ] {
            assert!(text.parse::<Url>().is_err(), "{text}");
        }
    }
}
