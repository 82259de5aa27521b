//! `http` and `https` URLs, as those who connect to them need them.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

use http::Uri;
use http::uri::{PathAndQuery, Scheme};
use tokio::net::TcpStream;

use crate::discovery::resolver::resolve_all;
use crate::discovery::{self, Locator};

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

    /// Connects to the first of its addresses that answers.
    ///
    /// Names are resolved as those of endpoints are. The C library would load its part of it when it is asked,
    /// which it cannot in an image that holds nothing but the program.
    ///
    /// # Errors
    ///
    /// A name that leads nowhere, or what the last address has answered.
    pub async fn connect(&self, dns: &discovery::Settings) -> io::Result<TcpStream> {
        let mut outcome = Err(io::Error::other(format!("{} has no address", self.host)));
        for address in self.addresses(dns).await? {
            outcome = TcpStream::connect(address).await;
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    async fn addresses(&self, dns: &discovery::Settings) -> io::Result<Vec<SocketAddr>> {
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, self.port)]);
        }
        let named = format!("{}:{}", self.host, self.port);
        let locator = Locator::parse(&named);
        let locator = locator.map_err(|reason| io::Error::other(format!("`{named}` {reason}")))?;
        let names = resolve_all(dns, locator.name().cloned()).await;
        let found = names.values().flat_map(|found| found.addresses());
        Ok(found.copied().collect())
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
