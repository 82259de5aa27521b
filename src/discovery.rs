//! Endpoints that move: names that stand for endpoints, and what is known of them.
//!
//! A name is asked for again when its records have expired. What was found last stays in force when
//! asking fails, whatever the reason: an address that was right a minute ago is worth more than
//! none. [`resolution`] and [`schedule`] decide that and are pure; [`resolver`] asks, and [`job`]
//! keeps asking and hands what it learns to [`control`](crate::control), which alone compiles it
//! into a snapshot. Files of endpoints are read and followed by [`config`](crate::config).

pub mod job;
pub mod locator;
pub mod resolution;
pub mod resolver;
pub mod schedule;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub use locator::{DnsName, Locator};
pub use resolution::{Answer, Failure, Part, Resolution};

/// How names are resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The shortest time after which a name is asked for again.
    pub min_ttl: Duration,
    /// The longest.
    pub max_ttl: Duration,
    /// How long an answer may take, all that it needs together.
    pub timeout: Duration,
    /// Who is asked; empty means whom the system asks.
    pub resolvers: Vec<SocketAddr>,
}

/// What is known of names.
pub type Names = HashMap<DnsName, Arc<Resolution>>;

/// An endpoint, and what stands for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Where it listens.
    pub address: SocketAddr,
    /// The name that led there; `None` for an address that stands as it is.
    pub name: Option<DnsName>,
    /// Who has it from where.
    pub origin: Origin,
}

/// Where a locator stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// In the configuration itself.
    Config,
    /// In the file that it names.
    File,
}

/// Which addresses locators lead to, each once, with the first that leads there. The order is that
/// of the locators, and of the addresses of each, so that a server which shuffles its answers
/// changes nothing.
pub fn locate<'l>(
    locators: impl IntoIterator<Item = (&'l Locator, Origin)>,
    names: &Names,
) -> Vec<Located> {
    let mut located: Vec<Located> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for (locator, origin) in locators {
        let (addresses, name) = match locator {
            Locator::Address(address) => (std::slice::from_ref(address), None),
            Locator::Name(name) => {
                let known = names.get(name).map_or(&[][..], |known| known.addresses());
                (known, Some(name))
            }
        };
        for address in addresses {
            if seen.insert(canonical(*address)) {
                located.push(Located {
                    address: *address,
                    name: name.cloned(),
                    origin,
                });
            }
        }
    }
    located
}

/// The address by which an endpoint is told from others: an IPv4 address written as IPv6 is the
/// same (RFC 4291 section 2.5.5.2).
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

// === impl Settings ===

impl Default for Settings {
    fn default() -> Self {
        Self {
            min_ttl: Duration::from_secs(1),
            max_ttl: Duration::from_secs(60),
            timeout: Duration::from_secs(5),
            resolvers: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locators(texts: &[&str]) -> Vec<Locator> {
        let locator = |text: &&str| Locator::parse(text).unwrap();
        texts.iter().map(locator).collect()
    }

    #[test]
    fn an_address_counts_once_whoever_leads_there() {
        let locators = locators(&["10.0.0.2:80", "shop:80", "[::ffff:10.0.0.2]:80", "none:80"]);
        let Locator::Name(shop) = &locators[1] else {
            panic!("a name");
        };
        let part = Part::host(shop, resolution::Family::V4);
        let found = ["10.0.0.3", "10.0.0.2"].map(|ip| ip.parse().unwrap());
        let answer = Answer {
            parts: vec![(part, Ok(found.to_vec()))],
            ..Answer::default()
        };
        let known = Resolution::default().after(Ok(answer), std::time::SystemTime::UNIX_EPOCH);
        let names = Names::from([(shop.clone(), Arc::new(known))]);
        let all = locators.iter().map(|locator| (locator, Origin::Config));
        let located = locate(all, &names);
        let shown: Vec<_> = located
            .iter()
            .map(|one| (one.address.to_string(), one.name.is_some()))
            .collect();
        assert_eq!(
            shown,
            [
                ("10.0.0.2:80".to_owned(), false),
                ("10.0.0.3:80".to_owned(), true)
            ]
        );
    }
}
