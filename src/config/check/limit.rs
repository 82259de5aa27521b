//! Checks how much is let in.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use crate::config::document::Path;
use crate::config::{file, value};
use crate::limit::gcra::Quota;
use crate::limit::key::{By, WithoutKey};
use crate::limit::rate::{MOST_LIMITS, Mode, Settings};

use super::Checker;

const IN_FLIGHT: u32 = 10_000;
const PER: Duration = Duration::from_secs(1);
const IPV6_PREFIX: u8 = 64;
const KEYS: u32 = 65_536;
/// A quarter of a gibibyte.
const MOST_KEYS: u32 = 1 << 24;

/// How many requests are served at a time; zero is for any number.
pub(super) fn in_flight(overload: &file::Overload) -> Option<u32> {
    let limit = overload.in_flight.unwrap_or(IN_FLIGHT);
    Some(limit).filter(|limit| *limit > 0)
}

impl Checker<'_> {
    pub(super) fn rate_limits(
        &mut self,
        route: &file::Route,
        at: &Path,
    ) -> Option<Vec<(Settings, Mode)>> {
        let limits = &route.rate_limits;
        self.names("rate limit", limits.iter().map(|one| one.name.as_str()), at);
        if limits.len() > MOST_LIMITS {
            self.error(
                at,
                format!("a route has at most {MOST_LIMITS} of them"),
                None,
            );
        }
        let redirect = |filter: &file::Filter| filter.request_redirect.is_some();
        if !limits.is_empty() && route.filters.iter().any(redirect) {
            let message = "a redirect answers every request: there is nothing to limit";
            self.warn(at, message, None);
        }
        let gray = &route.gray;
        let is_known = !self.document.is_maimed(&at.parent().key("gray"));
        let nobody = gray.identity.is_empty()
            && gray.without_identity != file::WithoutIdentity::Cookie
            && is_known;
        self.each(limits, at, |checker, limit, at| {
            if limit.by == file::RateLimitBy::User && nobody {
                let message = "a limit by user needs `gray.identity`: without it nobody is known";
                checker.error(&at.key("by"), message, None);
            }
            checker.rate_limit(limit, at)
        })
    }

    fn rate_limit(&mut self, limit: &file::RateLimit, at: &Path) -> Option<(Settings, Mode)> {
        let name: Option<Arc<str>> = self.name(&limit.name, at);
        let by = self.rate_limit_by(&limit.by, &at.key("by"));
        self.refuse_what_means_nothing(limit, at);
        let ipv6_prefix = limit.ipv6_prefix.unwrap_or(IPV6_PREFIX);
        if ipv6_prefix > 128 {
            let message = "an IPv6 address has 128 bits";
            self.error(&at.key("ipv6Prefix"), message, None);
        }
        let keys = limit.keys.unwrap_or(KEYS);
        if !(1..=MOST_KEYS).contains(&keys) {
            let message = format!("expected a number from 1 to {MOST_KEYS}");
            self.error(&at.key("keys"), message, None);
        }
        let quota = self.quota(limit, at);
        let one_key = limit.by == file::RateLimitBy::Everyone;
        let settings = Settings {
            name: name?,
            by: by?,
            quota: quota?,
            without_key: match limit.without_key.unwrap_or_default() {
                file::WithoutKey::Client => WithoutKey::Client,
                file::WithoutKey::Share => WithoutKey::Share,
                file::WithoutKey::Pass => WithoutKey::Pass,
            },
            ipv6_prefix,
            keys: if one_key {
                1
            } else {
                usize::try_from(keys).ok()?
            },
        };
        let mode = match limit.mode {
            file::RateLimitMode::Enforce => Mode::Enforce,
            file::RateLimitMode::Observe => Mode::Observe,
        };
        Some((settings, mode))
    }

    fn rate_limit_by(&mut self, by: &file::RateLimitBy, at: &Path) -> Option<By> {
        match by {
            file::RateLimitBy::Client => Some(By::Client),
            file::RateLimitBy::User => Some(By::User),
            file::RateLimitBy::Header(name) => self
                .parse(name, &at.key("header"), value::header_name)
                .map(By::Header),
            file::RateLimitBy::Everyone => Some(By::Everyone),
        }
    }

    fn quota(&mut self, limit: &file::RateLimit, at: &Path) -> Option<Quota> {
        let mut positive = |number: u32, key| {
            let checked = NonZeroU32::new(number);
            // What stands in for a number that was cut out is no second problem.
            if checked.is_none() && !self.document.is_maimed(at) {
                let message = "0 would let nobody in";
                let hint = "to close a route, take it out".to_owned();
                self.error(&at.key(key), message, Some(hint));
            }
            checked
        };
        let requests = positive(limit.requests, "requests");
        let burst = match limit.burst {
            Some(burst) => positive(burst, "burst"),
            None => requests,
        };
        let per = self.duration(limit.per.as_deref(), PER, &at.key("per"));
        Quota::new(requests?, per?, burst?)
            .map_err(|reason| self.error(at, format!("the limit {reason}"), None))
            .ok()
    }

    /// A key that changes nothing is a misunderstanding.
    fn refuse_what_means_nothing(&mut self, limit: &file::RateLimit, at: &Path) {
        let everyone = limit.by == file::RateLimitBy::Everyone;
        let always = everyone || limit.by == file::RateLimitBy::Client;
        for (key, is_given, means_nothing) in [
            ("withoutKey", limit.without_key.is_some(), always),
            ("ipv6Prefix", limit.ipv6_prefix.is_some(), everyone),
            ("keys", limit.keys.is_some(), everyone),
        ] {
            if is_given && means_nothing {
                let message = format!("`{key}` means nothing with this `by`");
                self.error(&at.key(key), message, Some("leave it out".to_owned()));
            }
        }
    }
}
