//! How an endpoint is written: an address, a host, or a service.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

/// What a service is written with.
const SERVICE: &str = "srv:";

/// What stands for endpoints.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Locator {
    /// One, where it listens.
    Address(SocketAddr),
    /// Those that a name leads to.
    Name(DnsName),
}

/// A name that leads to endpoints. In lower case, since case makes no other name (RFC 4343).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DnsName {
    /// `host:port`: every address of the host.
    Host {
        /// The host.
        host: Arc<str>,
        /// The port of each.
        port: u16,
    },
    /// `srv:name`: the hosts and ports that its SRV records name (RFC 2782).
    Service(Arc<str>),
}

// === impl Locator ===

impl Locator {
    /// Parses `IP:port`, `host:port` or `srv:name`.
    ///
    /// # Errors
    ///
    /// Anything else, and addresses that cannot be dialled; half sentences that follow the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(name) = text.strip_prefix(SERVICE) {
            return service(name).map(Self::Name);
        }
        if let Ok(address) = text.parse() {
            return dialable(address).map(Self::Address);
        }
        if text.contains('/') {
            return Err(
                "is not an endpoint: write `host:port`, without scheme and path".to_owned(),
            );
        }
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err(malformed());
        };
        let port: u16 = port.parse().map_err(|_| malformed())?;
        let host = host_name(host).ok_or_else(malformed)?;
        if port == 0 {
            return Err(PORT_0.to_owned());
        }
        Ok(Self::Name(DnsName::Host { host, port }))
    }

    /// The name that it is, if it is one.
    pub fn name(&self) -> Option<&DnsName> {
        match self {
            Self::Address(_) => None,
            Self::Name(name) => Some(name),
        }
    }
}

impl fmt::Display for Locator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

// === impl DnsName ===

impl DnsName {
    /// The host that the certificate of an endpoint must be for, where nothing else says so.
    ///
    /// For a service it is the domain that the service is of, and not what its records name: who
    /// can forge those could name a host of his own (RFC 9525 section 6.1).
    pub fn certified_host(&self) -> &str {
        let name = match self {
            Self::Host { host, .. } => host,
            Self::Service(name) => name,
        };
        let is_label = |label: &str| label.starts_with('_');
        let domain = match name.splitn(3, '.').collect::<Vec<_>>()[..] {
            [service, protocol, domain] if is_label(service) && is_label(protocol) => domain,
            _ => name,
        };
        domain.trim_end_matches('.')
    }
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host { host, port } => write!(f, "{host}:{port}"),
            Self::Service(name) => write!(f, "{SERVICE}{name}"),
        }
    }
}

const PORT_0: &str = "has port 0, which cannot be dialled";

/// An address that can be dialled.
///
/// # Errors
///
/// Port 0, and the address that means none.
pub fn dialable(address: SocketAddr) -> Result<SocketAddr, String> {
    if address.port() == 0 {
        Err(PORT_0.to_owned())
    } else if address.ip().to_canonical().is_unspecified() {
        Err("is the unspecified address, which cannot be dialled".to_owned())
    } else {
        Ok(address)
    }
}

fn service(text: &str) -> Result<DnsName, String> {
    host_name(text).map(DnsName::Service).ok_or_else(|| {
        "is not a service: write `srv:_http._tcp.shop.internal`; its records name the ports"
            .to_owned()
    })
}

fn malformed() -> String {
    "is not an endpoint: write an `IP:port` such as `127.0.0.1:8080` or `[::1]:8080`, a `host:port`, \
     or a service such as `srv:_http._tcp.shop.internal`"
        .to_owned()
}

/// A name as DNS and hosts files have it, with underscores, which many give to containers. What ends
/// in a number is an address that is none (RFC 3696 section 2).
fn host_name(text: &str) -> Option<Arc<str>> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    let sound = name.len() <= 253
        && name.split('.').all(label_ok)
        && !name.rsplit('.').next().is_none_or(is_number);
    sound.then(|| text.to_ascii_lowercase().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_written() {
        for (text, shown) in [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("[::1]:80", "[::1]:80"),
            ("Shop.Internal:8080", "shop.internal:8080"),
            ("shop_canary:80", "shop_canary:80"),
            ("shop.internal.:80", "shop.internal.:80"),
            (
                "srv:_http._tcp.shop.internal",
                "srv:_http._tcp.shop.internal",
            ),
            ("srv:web.service.consul", "srv:web.service.consul"),
        ] {
            assert_eq!(Locator::parse(text).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_cannot() {
        for text in [
            "",
            ":80",
            "shop",
            "shop:",
            "shop:0",
            "shop:65536",
            "shop:http",
            "-shop:80",
            "shop..internal:80",
            "::1:80",
            "127.0.0.1",
            "127.0.0.256:80",
            "10.0.0:80",
            "127.0.0.1:0",
            "0.0.0.0:80",
            "[::ffff:0.0.0.0]:80",
            "http://shop:80",
            "shop:80/",
            "sh op:80",
            "shöp:80",
            "srv:",
            "srv:_http._tcp.shop:80",
            "srv:10.0.0.1",
        ] {
            assert!(Locator::parse(text).is_err(), "{text}");
        }
        assert!(Locator::parse(&format!("{}:80", "a".repeat(64))).is_err());
        assert!(Locator::parse(&format!("{}:80", "a.".repeat(128))).is_err());
    }

    #[test]
    fn a_certificate_is_for_what_was_written_and_not_for_what_dns_said() {
        for (text, host) in [
            ("Shop.internal.:443", "shop.internal"),
            ("srv:_https._tcp.shop.internal", "shop.internal"),
            ("srv:web.service.consul", "web.service.consul"),
        ] {
            let Ok(Locator::Name(name)) = Locator::parse(text) else {
                panic!("{text}");
            };
            assert_eq!(name.certified_host(), host);
        }
    }
}
