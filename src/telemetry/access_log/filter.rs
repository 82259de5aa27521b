//! Which lines are written.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;

use crate::routing::matcher::PathMatcher;
use crate::telemetry::share::Share;

/// Which lines are written: the first kind that a request is of says how many.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    kinds: Vec<Kind>,
}

/// Requests of some kind: all that is given must hold; of several values any may.
#[derive(Clone, Debug)]
pub struct Kind {
    /// Those of these routes.
    pub routes: Vec<Arc<str>>,
    /// Those that were decided on these backends.
    pub backends: Vec<Arc<str>>,
    /// Those for these paths.
    pub paths: Vec<PathMatcher>,
    /// Those that were answered with these statuses.
    pub statuses: Vec<RangeInclusive<u16>>,
    /// Those that took longer.
    pub slower_than: Option<Duration>,
    /// How many of them are written.
    pub share: Share,
}

/// A request that has ended, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub struct Ended<'e> {
    /// Its route, and the backend that it was decided on.
    pub target: Option<(&'e str, &'e str)>,
    /// What its client was sent.
    pub status: StatusCode,
    /// How long it took.
    pub duration: Duration,
    /// It failed, and not by its client's fault.
    pub has_failed: bool,
}

/// Which kinds a request may be of by its path: a bit for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidates(u64);

// === impl Filter ===

impl Filter {
    /// As many kinds as [`Candidates`] has bits.
    pub const MOST: usize = 64;

    /// Tries these kinds in this order.
    pub fn new(kinds: Vec<Kind>) -> Self {
        Self { kinds }
    }

    /// What a request may be of by its path, which is gone by the time that it ends.
    pub fn candidates(&self, path: &str) -> Candidates {
        let kinds = self.kinds.iter().enumerate();
        let fitting = kinds.filter(|(_, kind)| {
            kind.paths.is_empty() || kind.paths.iter().any(|one| one.matches(path))
        });
        Candidates(fitting.fold(0, |bits, (position, _)| bits | 1 << position))
    }

    /// True when the line of a request is written. One that failed is wanted in any case; one of no kind
    /// as well.
    pub fn takes(&self, candidates: Candidates, ended: &Ended<'_>, die: f64) -> bool {
        let kinds = self.kinds.iter().enumerate();
        let mut kinds = kinds.filter(|(position, _)| candidates.0 & (1 << position) != 0);
        ended.has_failed
            || kinds
                .find(|(_, kind)| kind.takes(ended))
                .is_none_or(|(_, kind)| kind.share.takes(die))
    }
}

// === impl Kind ===

impl Kind {
    /// True when a request is of this kind, as far as its path does not matter.
    fn takes(&self, ended: &Ended<'_>) -> bool {
        let is_among = |names: &[Arc<str>], name: Option<&str>| {
            names.is_empty() || name.is_some_and(|name| names.iter().any(|one| **one == *name))
        };
        let status = ended.status.as_u16();
        is_among(&self.routes, ended.target.map(|(route, _)| route))
            && is_among(&self.backends, ended.target.map(|(_, backend)| backend))
            && (self.statuses.is_empty() || self.statuses.iter().any(|one| one.contains(&status)))
            && self.slower_than.is_none_or(|limit| ended.duration > limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(share: Share) -> Kind {
        Kind {
            routes: Vec::new(),
            backends: Vec::new(),
            paths: Vec::new(),
            statuses: Vec::new(),
            slower_than: None,
            share,
        }
    }

    const ENDED: Ended<'_> = Ended {
        target: Some(("shop", "shop-canary")),
        status: StatusCode::OK,
        duration: Duration::from_millis(10),
        has_failed: false,
    };

    #[test]
    fn the_first_kind_that_fits_decides_and_failures_are_always_written() {
        let filter = Filter::new(vec![
            Kind {
                paths: vec![PathMatcher::prefix("/healthz")],
                ..kind(Share::NONE)
            },
            Kind {
                backends: vec!["shop-canary".into()],
                ..kind(Share::ALL)
            },
            Kind {
                statuses: vec![404..=404, 300..=399],
                ..kind(Share::NONE)
            },
            Kind {
                slower_than: Some(Duration::from_secs(1)),
                ..kind(Share::ALL)
            },
            Kind {
                routes: vec!["shop".into()],
                ..kind(Share::new(0.5).unwrap())
            },
        ]);
        let stable = Ended {
            target: Some(("shop", "shop-stable")),
            ..ENDED
        };
        let (no_route, moved) = (
            Ended {
                target: None,
                ..ENDED
            },
            Ended {
                status: StatusCode::FOUND,
                ..stable
            },
        );
        let slow = Ended {
            duration: Duration::from_secs(2),
            ..stable
        };
        let failed = Ended {
            has_failed: true,
            ..stable
        };
        for (path, ended, die, expected) in [
            ("/healthz", ENDED, 0.0, false),
            ("/healthz/deep", ENDED, 0.0, false),
            ("/healthzz", ENDED, 0.9, true),
            ("/healthz", failed, 0.9, true),
            ("/a", ENDED, 0.9, true),
            ("/a", moved, 0.0, false),
            ("/a", slow, 0.9, true),
            ("/a", stable, 0.4, true),
            ("/a", stable, 0.6, false),
            ("/a", no_route, 0.9, true),
        ] {
            let takes = filter.takes(filter.candidates(path), &ended, die);
            assert_eq!(takes, expected, "{path} {ended:?}");
        }
    }

    #[test]
    fn without_kinds_every_line_is_written() {
        let filter = Filter::default();
        assert!(filter.takes(filter.candidates("/"), &ENDED, 0.999));
    }
}
