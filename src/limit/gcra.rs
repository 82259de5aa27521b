//! The Generic Cell Rate Algorithm (ITU-T I.371, annex A, in its form of virtual scheduling): a leaky
//! bucket that is one number.
//!
//! That number is the theoretical arrival time (TAT), when the next request would come if all came as
//! slowly as the rate asks. A request puts it off by one interval, and is refused if that put it off
//! further than the burst allows. A TAT that has passed says as much as none at all, which is what lets
//! [`buckets`](super::buckets) forget.
//!
//! Times are nanoseconds since a beginning that the caller chooses, on a clock that does not jump.

use std::fmt;
use std::num::NonZeroU32;
use std::time::Duration;

/// So many requests in so much time, and so many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quota {
    requests: NonZeroU32,
    per: Duration,
    burst: NonZeroU32,
    /// Nanoseconds from one request to the next.
    interval: u64,
}

/// Where somebody stands with a quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// How many requests may come at once.
    pub limit: u32,
    /// How many of them still may.
    pub remaining: u32,
    /// After how long all of them may again.
    pub reset: Duration,
}

/// A request that is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// The TAT from now on.
    pub tat: u64,
    /// What is left.
    pub standing: Standing,
}

/// A request that is not let in, and costs nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// After how long the next one is let in.
    pub retry_after: Duration,
    /// What is left.
    pub standing: Standing,
}

// === impl Quota ===

impl Quota {
    /// The shortest interval, in nanoseconds: a million requests a second. What the division loses is
    /// a thousandth then.
    pub const SHORTEST_INTERVAL: u64 = 1000;
    /// The longest time to use up a whole burst, in nanoseconds: a year.
    pub const LONGEST_WINDOW: u64 = 365 * 24 * 3600 * 1_000_000_000;

    /// `requests` in each `per`, and at most `burst` at once.
    ///
    /// # Errors
    ///
    /// What is out of bounds, as half a sentence.
    pub fn new(
        requests: NonZeroU32,
        per: Duration,
        burst: NonZeroU32,
    ) -> Result<Self, &'static str> {
        let interval = u64::try_from(per.as_nanos() / u128::from(requests.get()));
        let interval = interval.unwrap_or(u64::MAX);
        if interval < Self::SHORTEST_INTERVAL {
            return Err("is more than a million requests a second");
        }
        match interval.checked_mul(burst.get().into()) {
            Some(window) if window <= Self::LONGEST_WINDOW => Ok(Self {
                requests,
                per,
                burst,
                interval,
            }),
            _ => Err("takes more than a year to recover from a burst"),
        }
    }

    /// What becomes of a request at `now`, given the TAT.
    ///
    /// # Errors
    ///
    /// It comes too early.
    pub fn take(self, tat: u64, now: u64) -> Result<Admitted, Refused> {
        let window = self.interval * u64::from(self.burst.get());
        let ahead = tat.saturating_sub(now);
        let next = ahead.saturating_add(self.interval);
        match window.checked_sub(next) {
            Some(room) => Ok(Admitted {
                tat: now.saturating_add(next),
                standing: self.standing(room / self.interval, next),
            }),
            None => Err(Refused {
                retry_after: Duration::from_nanos(next - window),
                standing: self.standing(0, ahead),
            }),
        }
    }

    /// The TAT as if one request less had come.
    pub fn give_back(self, tat: u64) -> u64 {
        tat.saturating_sub(self.interval)
    }

    fn standing(self, remaining: u64, reset: u64) -> Standing {
        Standing {
            limit: self.burst.get(),
            remaining: u32::try_from(remaining).unwrap_or(u32::MAX),
            reset: Duration::from_nanos(reset),
        }
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            requests,
            per,
            burst,
            ..
        } = self;
        let per = humantime::format_duration(*per);
        write!(f, "{requests} per {per}, {burst} at once")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn quota(requests: u32, per: Duration, burst: u32) -> Quota {
        let [requests, burst] = [requests, burst].map(|number| NonZeroU32::new(number).unwrap());
        Quota::new(requests, per, burst).unwrap()
    }

    /// How many of the requests at these times are let in.
    fn admitted(quota: Quota, times: impl IntoIterator<Item = u64>) -> usize {
        let mut tat = 0;
        let let_in = times.into_iter().filter(|now| match quota.take(tat, *now) {
            Ok(one) => {
                tat = one.tat;
                true
            }
            Err(_) => false,
        });
        let_in.count()
    }

    #[test]
    fn a_burst_is_let_in_at_once_and_then_the_rate() {
        let quota = quota(10, Duration::from_secs(1), 5);
        let start = 7 * SECOND;
        assert_eq!(admitted(quota, std::iter::repeat_n(start, 100)), 5);
        // A request each millisecond for ten seconds.
        let steadily = (0..10_000).map(|step| start + step * SECOND / 1000);
        assert_eq!(admitted(quota, steadily), 5 + 99);
    }

    #[test]
    fn who_is_refused_is_let_in_when_it_was_said_and_not_before() {
        let quota = quota(3, Duration::from_secs(60), 2);
        let mut tat = 0;
        for remaining in [1, 0] {
            let one = quota.take(tat, 0).unwrap();
            assert_eq!((one.standing.limit, one.standing.remaining), (2, remaining));
            tat = one.tat;
        }
        let refused = quota.take(tat, SECOND).unwrap_err();
        assert_eq!(refused.retry_after, Duration::from_secs(19));
        assert_eq!(refused.standing.reset, Duration::from_secs(39));
        assert!(quota.take(tat, 20 * SECOND - 1).is_err());
        assert!(quota.take(tat, 20 * SECOND).is_ok());
    }

    #[test]
    fn a_request_that_is_given_back_was_never_there() {
        let quota = quota(1, Duration::from_secs(1), 3);
        let before = quota.take(0, 5 * SECOND).unwrap().tat;
        let after = quota.take(before, 5 * SECOND).unwrap().tat;
        assert_eq!(quota.give_back(after), before);
        assert_eq!(quota.give_back(0), 0);
    }

    #[test]
    fn rates_that_cannot_be_kept_are_refused() {
        let of = |requests, per, burst| {
            Quota::new(
                NonZeroU32::new(requests).unwrap(),
                Duration::from_millis(per),
                NonZeroU32::new(burst).unwrap(),
            )
        };
        assert!(of(1_000_000, 1000, 1_000_000).is_ok());
        assert!(of(2_000_000, 1000, 1).is_err());
        assert!(of(1, 0, 1).is_err());
        assert!(of(1, 99_999 * 3600 * 1000, 1).is_err());
        assert!(of(1, 24 * 3600 * 1000, 366).is_err());
    }

    proptest! {
        /// In any stretch of time no more is let in than the burst and the rate together.
        #[test]
        fn no_stretch_of_time_has_more_than_burst_and_rate(
            requests in 1_u32..1000,
            burst in 1_u32..50,
            gaps in prop::collection::vec(0_u64..20_000_000, 1..400),
        ) {
            let quota = quota(requests, Duration::from_secs(1), burst);
            let (mut tat, mut now, mut times) = (0, 0, Vec::new());
            for gap in gaps {
                now += gap;
                if let Ok(one) = quota.take(tat, now) {
                    tat = one.tat;
                    times.push(now);
                }
            }
            for (first, from) in times.iter().enumerate() {
                for (count, to) in times[first..].iter().enumerate() {
                    let by_rate = (to - from) / quota.interval;
                    prop_assert!(count as u64 <= by_rate + u64::from(burst));
                }
            }
        }
    }
}
