//! The rate limits of a route: all of them must let a request in.
//!
//! A request that one of them refuses is not counted by the others either, so that who is over one limit
//! does not use up another one with requests that nobody serves. What one limit counts is living state:
//! it outlives reloads for as long as the limit stays the same.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use metrics::Counter;

use super::buckets::{Buckets, Charge};
use super::gcra::{Quota, Refused, Standing};
use super::key::{By, Caller, Key, WithoutKey};

/// What a rate limit is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    /// Its name.
    pub name: Arc<str>,
    /// What tells one from another.
    pub by: By,
    /// What each may do.
    pub quota: Quota,
    /// Whom requests without a key are counted for.
    pub without_key: WithoutKey,
    /// How many bits of an IPv6 address tell clients apart.
    pub ipv6_prefix: u8,
    /// How many keys are remembered.
    pub keys: usize,
}

/// What becomes of requests beyond a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// They are refused.
    #[default]
    Enforce,
    /// They are counted, and let in.
    Observe,
}

/// A compiled rate limit.
#[derive(Debug)]
pub struct RateLimit {
    /// What it is.
    pub settings: Settings,
    /// What becomes of requests beyond it.
    pub mode: Mode,
    /// What it has counted.
    pub counts: Arc<Counts>,
    /// Requests beyond it.
    pub limited: Counter,
    /// Keys that were forgotten too early.
    pub displaced: Counter,
}

/// What a limit has counted.
///
/// It takes memory with the first request, since there may be 100,000 routes.
#[derive(Debug, Default)]
pub struct Counts(OnceLock<Begun>);

#[derive(Debug)]
struct Begun {
    at: Instant,
    /// Keyed with a secret, and made against those who choose keys to collide (SipHash), which XXH3 is
    /// not: keys are what clients send.
    hasher: RandomState,
    buckets: Buckets,
}

/// What has been counted, by route and limit.
#[derive(Debug, Default)]
pub struct Tallies {
    known: HashMap<(Arc<str>, Settings), Arc<Counts>>,
}

/// Lets a request in that all of these limits let in; the standing is that with the fewest requests
/// left, of the limits that are enforced.
///
/// # Errors
///
/// The first limit that refuses it.
pub fn admit(
    limits: &[RateLimit],
    caller: &Caller<'_>,
    now: Instant,
) -> Result<Option<Standing>, Refused> {
    let mut charges: [Option<Charge<'_>>; MOST_LIMITS] = Default::default();
    let mut least: Option<Standing> = None;
    for (limit, place) in limits.iter().zip(&mut charges) {
        match limit.take(caller, now) {
            Some(Ok(charge)) => {
                let standing = charge.standing;
                let is_less = |least: Standing| standing.remaining < least.remaining;
                if limit.mode == Mode::Enforce && least.is_none_or(is_less) {
                    least = Some(standing);
                }
                *place = Some(charge);
            }
            Some(Err(refused)) if limit.mode == Mode::Enforce => {
                charges.into_iter().flatten().for_each(Charge::give_back);
                return Err(refused);
            }
            Some(Err(_)) | None => {}
        }
    }
    Ok(least)
}

/// The most limits of one route.
pub const MOST_LIMITS: usize = 8;

// === impl RateLimit ===

impl RateLimit {
    /// Whom a request is counted for; `None` when for nobody.
    pub fn key<'r>(&self, caller: &Caller<'r>) -> Option<Key<'r>> {
        let Settings {
            by,
            without_key,
            ipv6_prefix,
            ..
        } = &self.settings;
        caller.key(by, *without_key, *ipv6_prefix)
    }

    fn take(&self, caller: &Caller<'_>, now: Instant) -> Option<Result<Charge<'_>, Refused>> {
        let key = self.key(caller)?;
        let begun = self.counts.begun(self.settings.keys, now);
        let now = begun.nanoseconds(now);
        let hash = begun.hasher.hash_one(key);
        let taken = begun.buckets.take(hash, self.settings.quota, now);
        if taken.has_displaced {
            self.displaced.increment(1);
        }
        if taken.outcome.is_err() {
            self.limited.increment(1);
        }
        Some(taken.outcome)
    }
}

// === impl Mode ===

impl Mode {
    /// The word for it in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Observe => "observe",
        }
    }
}

// === impl Counts ===

impl Counts {
    fn begun(&self, keys: usize, now: Instant) -> &Begun {
        self.0.get_or_init(|| Begun {
            at: now,
            hasher: RandomState::new(),
            buckets: Buckets::new(keys),
        })
    }
}

impl Begun {
    /// A request that began a little before the first one counts as if it came with it.
    fn nanoseconds(&self, now: Instant) -> u64 {
        let since: Duration = now.saturating_duration_since(self.at);
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }
}

// === impl Tallies ===

impl Tallies {
    /// What this limit of a route has counted, if it is known.
    pub fn get_or_create(&mut self, route: &Arc<str>, settings: &Settings) -> Arc<Counts> {
        let key = (Arc::clone(route), settings.clone());
        Arc::clone(self.known.entry(key).or_default())
    }

    /// Forgets what only this map still knows.
    pub fn prune(&mut self) {
        self.known.retain(|_, counts| Arc::strong_count(counts) > 1);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use http::HeaderMap;

    use super::*;

    fn limit(name: &str, by: By, burst: u32, mode: Mode) -> RateLimit {
        let burst = NonZeroU32::new(burst).unwrap();
        let settings = Settings {
            name: name.into(),
            by,
            quota: Quota::new(NonZeroU32::MIN, Duration::from_secs(1), burst).unwrap(),
            without_key: WithoutKey::Client,
            ipv6_prefix: 64,
            keys: 64,
        };
        RateLimit {
            counts: Tallies::default().get_or_create(&"shop".into(), &settings),
            settings,
            mode,
            limited: Counter::noop(),
            displaced: Counter::noop(),
        }
    }

    fn is_let_in(limits: &[RateLimit], user: &str, now: Instant) -> bool {
        let caller = Caller {
            client: [192, 0, 2, 1].into(),
            user: Some(user),
            headers: &HeaderMap::new(),
        };
        admit(limits, &caller, now).is_ok()
    }

    #[test]
    fn what_one_limit_refuses_the_others_do_not_count() {
        let now = Instant::now();
        let limits = [
            limit("all", By::Everyone, 3, Mode::Enforce),
            limit("user", By::User, 1, Mode::Enforce),
        ];
        assert!(is_let_in(&limits, "ann", now));
        for _ in 0..10 {
            assert!(!is_let_in(&limits, "ann", now));
        }
        assert!(is_let_in(&limits, "bob", now));
        assert!(is_let_in(&limits, "eve", now));
        assert!(!is_let_in(&limits, "joe", now), "the limit of all is 3");
        // What it cost joe's own limit was given back.
        let later = now + Duration::from_secs(1);
        assert!(is_let_in(&limits, "joe", later));
    }

    #[test]
    fn an_observed_limit_refuses_nobody_and_is_not_told() {
        let now = Instant::now();
        let limits = [
            limit("tried", By::User, 1, Mode::Observe),
            limit("real", By::Everyone, 5, Mode::Enforce),
        ];
        let caller = Caller {
            client: [192, 0, 2, 1].into(),
            user: Some("ann"),
            headers: &HeaderMap::new(),
        };
        let left: Vec<u32> = (0..5)
            .map(|_| admit(&limits, &caller, now).unwrap().unwrap().remaining)
            .collect();
        assert_eq!(left, [4, 3, 2, 1, 0]);
        assert!(admit(&limits, &caller, now).is_err());
    }

    #[test]
    fn what_was_counted_is_found_again_by_the_same_limit_alone() {
        let mut tallies = Tallies::default();
        let one = limit("a", By::Client, 1, Mode::Enforce).settings;
        let other = Settings {
            keys: 128,
            ..one.clone()
        };
        let route: Arc<str> = "shop".into();
        let first = tallies.get_or_create(&route, &one);
        assert!(Arc::ptr_eq(&first, &tallies.get_or_create(&route, &one)));
        assert!(!Arc::ptr_eq(&first, &tallies.get_or_create(&route, &other)));
        let elsewhere = tallies.get_or_create(&"blog".into(), &one);
        assert!(!Arc::ptr_eq(&first, &elsewhere));
        drop(elsewhere);
        tallies.prune();
        assert_eq!(tallies.known.len(), 1);
    }
}
