//! Whom a request is counted for.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use http::header::{HeaderMap, HeaderName};

/// What tells one from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum By {
    /// The client's address.
    Client,
    /// The user, as the route finds him.
    User,
    /// The value of a header.
    Header(HeaderName),
    /// Nothing: all are counted together.
    Everyone,
}

/// What a request is counted for that has no user or no such header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WithoutKey {
    /// Its client's address: leaving the key out does not help.
    #[default]
    Client,
    /// All such requests together.
    Share,
    /// Nobody: it is let in.
    Pass,
}

/// What of a request can be a key.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'r> {
    /// The client's address.
    pub client: IpAddr,
    /// The user; `None` too for an id that was only now made up for him, or every request could have a
    /// new one.
    pub user: Option<&'r str>,
    /// All header fields.
    pub headers: &'r HeaderMap,
}

/// Whom a request is counted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Key<'r> {
    /// A client, or the network of one.
    Client(IpAddr),
    /// A user.
    User(&'r str),
    /// Those who send the same value.
    Value(&'r [u8]),
    /// All.
    Everyone,
    /// All those without a key.
    Keyless,
}

// === impl Caller ===

impl<'r> Caller<'r> {
    /// Whom it is counted for; `None` when for nobody. Clients with IPv6 are told apart by so many bits
    /// of their address, since one of them has a whole network of them.
    pub fn key(&self, by: &By, without: WithoutKey, ipv6_prefix: u8) -> Option<Key<'r>> {
        let client = || Key::Client(network(self.client, ipv6_prefix));
        let key = match by {
            By::Client => Some(client()),
            By::User => self.user.map(Key::User),
            By::Header(name) => {
                let value = self
                    .headers
                    .get(name)
                    .map(|value| value.as_bytes().trim_ascii());
                value.filter(|value| !value.is_empty()).map(Key::Value)
            }
            By::Everyone => Some(Key::Everyone),
        };
        key.or_else(|| match without {
            WithoutKey::Client => Some(client()),
            WithoutKey::Share => Some(Key::Keyless),
            WithoutKey::Pass => None,
        })
    }
}

fn network(address: IpAddr, ipv6_prefix: u8) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let host_bits = 128_u32.saturating_sub(ipv6_prefix.into());
            let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
            Ipv6Addr::from_bits(address.to_bits() & mask).into()
        }
        address => address,
    }
}

// === impl Key ===

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(address) => write!(f, "client {address}"),
            Self::User(user) => write!(f, "user {user}"),
            Self::Value(value) => write!(f, "value {}", value.escape_ascii()),
            Self::Everyone => f.write_str("everyone"),
            Self::Keyless => f.write_str("everyone without a key"),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::header::HeaderValue;

    use super::*;

    fn client(address: &str) -> IpAddr {
        address.parse().unwrap()
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_client() {
        for (address, prefix, expected) in [
            ("2001:db8:1:2:3:4:5:6", 64, "2001:db8:1:2::"),
            ("2001:db8:1:2:ffff::", 64, "2001:db8:1:2::"),
            ("2001:db8:1:2:3:4:5:6", 48, "2001:db8:1::"),
            ("2001:db8::1", 128, "2001:db8::1"),
            ("2001:db8::1", 0, "::"),
            ("192.0.2.7", 64, "192.0.2.7"),
            ("::ffff:192.0.2.7", 64, "192.0.2.7"),
        ] {
            let network = network(client(address), prefix);
            assert_eq!(network, client(expected), "{address}/{prefix}");
        }
    }

    #[test]
    fn who_has_no_key_is_counted_as_configured() {
        let name = HeaderName::from_static("x-api-key");
        let caller = |headers| Caller {
            client: client("192.0.2.7"),
            user: None,
            headers,
        };
        let by = By::Header(name.clone());
        let none = HeaderMap::new();
        let empty = HeaderMap::from_iter([(name.clone(), HeaderValue::from_static(" "))]);
        for headers in [&none, &empty] {
            for (without, expected) in [
                (WithoutKey::Client, Some(Key::Client(client("192.0.2.7")))),
                (WithoutKey::Share, Some(Key::Keyless)),
                (WithoutKey::Pass, None),
            ] {
                assert_eq!(caller(headers).key(&by, without, 64), expected);
                assert_eq!(caller(headers).key(&By::User, without, 64), expected);
            }
        }
        let one = HeaderMap::from_iter([(name, HeaderValue::from_static("k1"))]);
        let key = caller(&one).key(&by, WithoutKey::Client, 64);
        assert_eq!(key, Some(Key::Value(b"k1")));
    }
}
