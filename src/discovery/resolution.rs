//! What is known of one name, and what an answer makes of it: the last good set, kept part by part.
//!
//! Pure: no clock, and nothing is asked here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::canonical;
use super::locator::{DnsName, dialable};

/// What is known of a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolution {
    parts: BTreeMap<Part, BTreeSet<SocketAddr>>,
    /// Of all parts, in order, each once.
    addresses: Vec<SocketAddr>,
    /// When something was last found.
    pub resolved_at: Option<SystemTime>,
    /// When it was last asked for.
    pub asked_at: Option<SystemTime>,
    /// What that brought.
    pub outcome: Outcome,
    /// How long the records are valid by their own account.
    pub ttl: Duration,
}

/// What asking last brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Outcome {
    /// It has not been asked for.
    #[default]
    Unasked,
    /// All that there is.
    Found,
    /// Something, while another part failed; what was known of that part stays.
    FoundPartly(Failure),
    /// Nothing; what was known before stays.
    Failed(Failure),
}

/// What is asked for by itself, and fails by itself: one family of addresses of one host. A server
/// that has trouble with IPv6 addresses alone must not cost us those that are known.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Part {
    /// The host.
    pub host: Arc<str>,
    /// The port of its endpoint.
    pub port: u16,
    /// Which addresses.
    pub family: Family,
}

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4, by A records.
    V4,
    /// IPv6, by AAAA records.
    V6,
}

/// What asking for a name brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Every part that was asked for.
    pub parts: Vec<(Part, Result<Vec<IpAddr>, Failure>)>,
    /// The shortest validity of all records.
    pub ttl: Duration,
    /// What counts if those lead nowhere: the servers of the next priority.
    pub next: Option<Box<Self>>,
}

/// What some parts come to.
#[derive(Default)]
struct Merged {
    /// Those that were found, and those that are known but failed now.
    parts: BTreeMap<Part, BTreeSet<SocketAddr>>,
    /// Something was found.
    has_news: bool,
    worst: Option<Failure>,
}

/// Why nothing was found, the one that says most last; it completes "`NAME` ...".
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// There is no record of this kind, or none that leads anywhere.
    Empty,
    /// There is no such name.
    NotFound,
    /// Nobody answered in time.
    Timeout,
    /// There was no sound answer.
    Broken(String),
    /// The server said that it cannot tell.
    Refused(String),
}

// === impl Resolution ===

impl Resolution {
    /// Where its endpoints are, in order.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// What is known after asking once more, `at` this time.
    ///
    /// Only an answer with an address replaces what is known, and only those parts of it that were
    /// answered: an empty set would take a backend out of service, which an operator does by its
    /// kill switch and a broken DNS server does by accident.
    #[must_use]
    pub fn after(&self, asked: Result<Answer, Failure>, at: SystemTime) -> Self {
        match asked.and_then(|answer| self.merge(answer)) {
            Ok(next) => Self {
                resolved_at: Some(at),
                asked_at: Some(at),
                ..next
            },
            Err(failure) => Self {
                asked_at: Some(at),
                outcome: Outcome::Failed(failure),
                ..self.clone()
            },
        }
    }

    /// What went wrong with the last attempt.
    pub fn problem(&self) -> Option<&Failure> {
        match &self.outcome {
            Outcome::Unasked | Outcome::Found => None,
            Outcome::FoundPartly(failure) | Outcome::Failed(failure) => Some(failure),
        }
    }

    fn merge(&self, answer: Answer) -> Result<Self, Failure> {
        let mut worst = None;
        let mut next = Some(Box::new(answer));
        while let Some(answer) = next {
            let merged = self.merge_parts(answer.parts);
            worst = worst.max(merged.worst);
            if merged.has_news {
                let addresses: BTreeSet<SocketAddr> =
                    merged.parts.values().flatten().copied().collect();
                return Ok(Self {
                    parts: merged.parts,
                    addresses: addresses.into_iter().collect(),
                    // Most hosts have no IPv6 address, which is nothing wrong.
                    outcome: worst
                        .filter(|failure| !failure.is_an_answer())
                        .map_or(Outcome::Found, Outcome::FoundPartly),
                    ttl: answer.ttl,
                    ..Self::default()
                });
            }
            // What is known of the first servers is better than the last ones.
            next = answer.next.filter(|_| merged.parts.is_empty());
        }
        Err(worst.unwrap_or(Failure::Empty))
    }

    fn merge_parts(&self, asked: Vec<(Part, Result<Vec<IpAddr>, Failure>)>) -> Merged {
        let mut merged = Merged::default();
        for (part, found) in asked {
            match found.and_then(|addresses| part.endpoints(addresses)) {
                Ok(addresses) => {
                    merged.has_news = true;
                    merged.parts.insert(part, addresses);
                }
                Err(failure) => {
                    if !failure.is_an_answer()
                        && let Some(known) = self.parts.get(&part)
                    {
                        merged.parts.insert(part, known.clone());
                    }
                    merged.worst = merged.worst.max(Some(failure));
                }
            }
        }
        merged
    }
}

// === impl Part ===

impl Part {
    /// One family of what a name leads to without further records.
    pub fn host(name: &DnsName, family: Family) -> Self {
        let (host, port) = match name {
            DnsName::Host { host, port } => (host, *port),
            DnsName::Service(name) => (name, 0),
        };
        Self {
            host: Arc::clone(host),
            port,
            family,
        }
    }

    /// Those that can be dialled, each once.
    fn endpoints(&self, addresses: Vec<IpAddr>) -> Result<BTreeSet<SocketAddr>, Failure> {
        let endpoints: BTreeSet<SocketAddr> = addresses
            .into_iter()
            .map(|ip| canonical(SocketAddr::new(ip, self.port)))
            .filter(|address| dialable(*address).is_ok())
            .collect();
        if endpoints.is_empty() {
            return Err(Failure::Empty);
        }
        Ok(endpoints)
    }
}

// === impl Outcome ===

impl Outcome {
    /// The word for it in metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Unasked => "unasked",
            Self::Found => "success",
            Self::FoundPartly(_) => "partial",
            Self::Failed(Failure::Empty) => "empty",
            Self::Failed(Failure::NotFound) => "not_found",
            Self::Failed(Failure::Timeout) => "timeout",
            Self::Failed(Failure::Broken(_)) => "broken",
            Self::Failed(Failure::Refused(_)) => "refused",
        }
    }
}

// === impl Failure ===

impl Failure {
    /// True when somebody who knows has said that there is nothing.
    fn is_an_answer(&self) -> bool {
        matches!(self, Self::Empty | Self::NotFound)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("leads to no address"),
            Self::NotFound => f.write_str("does not exist (NXDOMAIN)"),
            Self::Timeout => f.write_str("cannot be resolved: no DNS server answered in time"),
            Self::Broken(reason) => write!(f, "cannot be resolved: {reason}"),
            Self::Refused(code) => write!(f, "cannot be resolved: the DNS server said {code}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn part(family: Family) -> Part {
        Part {
            host: "shop".into(),
            port: 80,
            family,
        }
    }

    type Found<'f> = Result<&'f [&'f str], Failure>;

    fn answer(v4: Found<'_>, v6: Found<'_>) -> Result<Answer, Failure> {
        let ips = |found: &[&str]| found.iter().map(|ip| ip.parse().unwrap()).collect();
        Ok(Answer {
            parts: vec![
                (part(Family::V4), v4.map(ips)),
                (part(Family::V6), v6.map(ips)),
            ],
            ttl: Duration::from_secs(5),
            next: None,
        })
    }

    fn shown(resolution: &Resolution) -> Vec<String> {
        let addresses = resolution.addresses().iter();
        addresses.map(ToString::to_string).collect()
    }

    #[test]
    fn a_set_is_sorted_and_has_each_address_once() {
        let known = Resolution::default().after(
            answer(
                Ok(&["10.0.0.2", "10.0.0.1", "10.0.0.2", "0.0.0.0"]),
                Ok(&["::ffff:10.0.0.1", "fd00::1"]),
            ),
            NOW,
        );
        assert_eq!(
            shown(&known),
            ["10.0.0.1:80", "10.0.0.2:80", "[fd00::1]:80"]
        );
        assert_eq!(known.outcome, Outcome::Found);
    }

    #[test]
    fn failures_and_empty_sets_keep_what_is_known() {
        let before = Resolution::default().after(answer(Ok(&["10.0.0.1"]), Ok(&["fd00::1"])), NOW);
        let later = NOW + Duration::from_secs(9);
        for asked in [
            Err(Failure::Timeout),
            Err(Failure::NotFound),
            answer(Err(Failure::NotFound), Err(Failure::NotFound)),
            answer(Ok(&[]), Err(Failure::Empty)),
            answer(Ok(&["0.0.0.0"]), Err(Failure::Empty)),
            // One family is gone, of the other nobody knows: that is not the end of the name.
            answer(Err(Failure::Empty), Err(Failure::Timeout)),
            answer(
                Err(Failure::Refused("SERVFAIL".into())),
                Err(Failure::Empty),
            ),
        ] {
            let after = before.after(asked, later);
            assert_eq!(after.addresses(), before.addresses());
            assert_eq!(
                (after.resolved_at, after.asked_at),
                (Some(NOW), Some(later))
            );
            assert!(matches!(after.outcome, Outcome::Failed(_)), "{after:?}");
            assert_eq!(
                after
                    .after(answer(Ok(&["10.0.0.9"]), Ok(&[])), later)
                    .problem(),
                None
            );
        }
    }

    #[test]
    fn a_family_that_fails_is_kept_and_one_that_is_gone_is_not() {
        let before = Resolution::default().after(answer(Ok(&["10.0.0.1"]), Ok(&["fd00::1"])), NOW);
        let half = before.after(answer(Ok(&["10.0.0.2"]), Err(Failure::Timeout)), NOW);
        assert_eq!(shown(&half), ["10.0.0.2:80", "[fd00::1]:80"]);
        assert_eq!(half.outcome, Outcome::FoundPartly(Failure::Timeout));
        for gone in [Failure::Empty, Failure::NotFound] {
            let after = half.after(answer(Ok(&["10.0.0.2"]), Err(gone)), NOW);
            assert_eq!(shown(&after), ["10.0.0.2:80"]);
            assert_eq!(after.outcome, Outcome::Found);
        }
    }

    #[test]
    fn the_next_servers_count_when_the_first_lead_nowhere_and_none_of_them_is_known() {
        let chain = |first: Found<'_>, port| {
            let mut next = answer(Ok(&["10.0.0.9"]), Ok(&[])).unwrap();
            next.parts.iter_mut().for_each(|(part, _)| part.port = port);
            Ok(Answer {
                next: Some(Box::new(next)),
                ..answer(first, Err(Failure::Empty)).unwrap()
            })
        };
        let nothing = Resolution::default();
        let first = nothing.after(chain(Ok(&["10.0.0.1"]), 81), NOW);
        assert_eq!(shown(&first), ["10.0.0.1:80"]);
        for gone in [Failure::Empty, Failure::NotFound] {
            let after = first.after(chain(Err(gone), 81), NOW);
            assert_eq!(shown(&after), ["10.0.0.9:81"]);
            assert_eq!(after.outcome, Outcome::Found);
        }
        // Nobody has said that the first are gone.
        let after = first.after(chain(Err(Failure::Timeout), 81), NOW);
        assert_eq!(shown(&after), ["10.0.0.1:80"]);
        assert_eq!(after.outcome, Outcome::Failed(Failure::Timeout));
        let after = nothing.after(chain(Err(Failure::Timeout), 81), NOW);
        assert_eq!(shown(&after), ["10.0.0.9:81"]);
        assert_eq!(after.outcome, Outcome::FoundPartly(Failure::Timeout));
    }

    fn any_found() -> impl Strategy<Value = Result<Vec<IpAddr>, Failure>> {
        prop_oneof![
            proptest::collection::vec(any::<[u8; 4]>().prop_map(IpAddr::from), 0..4).prop_map(Ok),
            Just(Err(Failure::Empty)),
            Just(Err(Failure::NotFound)),
            Just(Err(Failure::Timeout)),
        ]
    }

    fn any_asked() -> impl Strategy<Value = Result<Answer, Failure>> {
        let parts = (any_found(), any_found()).prop_map(|(v4, v6)| {
            Ok(Answer {
                parts: vec![(part(Family::V4), v4), (part(Family::V6), v6)],
                ..Answer::default()
            })
        });
        prop_oneof![parts, Just(Err(Failure::Timeout))]
    }

    proptest! {
        #[test]
        fn a_set_never_becomes_empty_again(
            asked in proptest::collection::vec(any_asked(), 1..12),
        ) {
            let mut known = Resolution::default();
            for asked in asked {
                let next = known.after(asked, NOW);
                prop_assert!(known.addresses().is_empty() || !next.addresses().is_empty());
                prop_assert!(next.addresses().is_sorted());
                if let Outcome::Failed(_) = next.outcome {
                    prop_assert_eq!(next.addresses(), known.addresses());
                }
                known = next;
            }
        }

        #[test]
        fn the_order_of_answers_changes_nothing(
            mut ips in proptest::collection::vec(any::<[u8; 4]>(), 1..8),
            other in any::<prop::sample::Index>(),
        ) {
            let asked = |ips: &[[u8; 4]]| Ok(Answer {
                parts: vec![(
                    part(Family::V4),
                    Ok(ips.iter().copied().map(IpAddr::from).collect()),
                )],
                ..Answer::default()
            });
            let before = Resolution::default().after(asked(&ips), NOW);
            let middle = other.index(ips.len());
            ips.rotate_left(middle);
            let after = before.after(asked(&ips), NOW);
            prop_assert_eq!(after.addresses(), before.addresses());
        }
    }
}
