//! What becomes of a request that has failed: once more to the same version, to the baseline instead
//! ("shielding"), or the failure to the client.
//!
//! Two things decide whether anything is allowed: whether the endpoint can have seen the request, and
//! whether its method is idempotent (RFC 9110 section 9.2.2). Shielding is not a repetition that adds
//! load: the baseline answers what it would have answered without the other version, so it has no
//! budget, and comes after repetitions only where these have another endpoint to go to.
//!
//! Pure: what happened and what has been tried are arguments.

use std::time::Duration;

use http::StatusCode;

use super::split::Ratio;

/// What is done about failed requests of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rescue {
    /// Once more to the same version.
    pub retry: Retry,
    /// To the baseline.
    pub shield: Shield,
}

/// Which failed requests are sent to the same version again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// So often at most.
    pub attempts: u32,
    /// For these statuses, by another endpoint; 504 stands for no answer in time as well.
    pub codes: Box<[StatusCode]>,
    /// The pause before the first; none where another endpoint gets what none has seen.
    pub backoff: Duration,
    /// How many there may be at a time.
    pub budget: RetryBudget,
    /// The bytes of a body that are kept.
    pub body_buffer: usize,
}

/// How many of the requests of a backend may be repetitions, so that they cannot bury a service that
/// struggles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryBudget {
    /// Their part of the requests in flight.
    pub share: Ratio,
    /// So many are allowed however few there are in flight.
    pub at_least: usize,
}

/// Which failed requests of other versions are answered by the baseline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shield {
    /// Which requests.
    pub requests: ShieldedRequests,
    /// For these statuses.
    pub codes: Box<[StatusCode]>,
}

/// Which requests are answered by the baseline when another version fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ShieldedRequests {
    /// None.
    None,
    /// Those of which nothing was sent.
    Unsent,
    /// And those with an idempotent method.
    Idempotent,
}

/// What has happened to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Its backend has no room or no endpoint for it, which asking once more would not change.
    Unavailable,
    /// No endpoint has seen it, or one has said that it did nothing.
    Unsent,
    /// There is no telling what the endpoint did.
    Broken,
    /// Nor is there here, but most likely it had closed the connection before, as it does with idle ones.
    Stale,
    /// Nor is there here: the response did not come in time.
    Timeout,
    /// The endpoint has answered with this.
    Status(StatusCode),
}

/// What is known of a request that has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Its method is idempotent.
    pub is_idempotent: bool,
    /// All of it can be sent again.
    pub is_whole: bool,
    /// It was with the baseline.
    pub at_baseline: bool,
    /// Its client named the version.
    pub is_override: bool,
    /// Its backend has an endpoint that has not failed it.
    pub has_others: bool,
    /// How often it was sent to this version again.
    pub retries: u32,
}

/// What is done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// It is sent to the same version again.
    Retry,
    /// It is sent to the baseline.
    Shield,
}

// === impl Rescue ===

impl Rescue {
    /// What may be done, the best first; nothing means that the client gets what there is.
    pub fn remedies(&self, trouble: Trouble, case: &Case) -> impl Iterator<Item = Remedy> {
        let retries = self.retry.allows(trouble, case);
        let shields = self.shield.allows(trouble, case);
        // Another version is not waited for: it may be broken altogether.
        let retries = retries && (case.has_others || !shields || trouble == Trouble::Stale);
        let retry = retries.then_some(Remedy::Retry);
        retry.into_iter().chain(shields.then_some(Remedy::Shield))
    }

    /// True when a response with this status may not be the last word.
    pub fn concerns(&self, status: StatusCode) -> bool {
        let is_failure = status.is_client_error() || status.is_server_error();
        is_failure && (self.retry.codes.contains(&status) || self.shield.codes.contains(&status))
    }
}

// === impl Retry ===

impl Retry {
    /// The pause before a repetition, by a die from 0 to 1.
    pub fn pause(&self, trouble: Trouble, case: &Case, die: f64) -> Duration {
        if trouble == Trouble::Stale || trouble == Trouble::Unsent && case.has_others {
            return Duration::ZERO;
        }
        let whole = self.backoff.saturating_mul(1 << case.retries.min(10));
        whole.mul_f64(0.5 + die.clamp(0.0, 1.0) / 2.0)
    }

    /// True for a repetition that has to be within the budget. One that most likely nobody has seen adds
    /// no load, and connections that are closed together must not fail their requests.
    pub fn is_on_budget(trouble: Trouble) -> bool {
        trouble != Trouble::Stale
    }

    fn allows(&self, trouble: Trouble, case: &Case) -> bool {
        let is_covered = match trouble {
            Trouble::Unavailable => false,
            Trouble::Unsent => true,
            Trouble::Broken | Trouble::Stale => case.is_idempotent,
            // An endpoint that has answered, or is at its end, would do the same again.
            Trouble::Timeout => {
                let as_if = StatusCode::GATEWAY_TIMEOUT;
                case.is_idempotent && case.has_others && self.codes.contains(&as_if)
            }
            Trouble::Status(status) => {
                case.is_idempotent && case.has_others && self.codes.contains(&status)
            }
        };
        is_covered && case.is_whole && case.retries < self.attempts
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 1,
            codes: Box::new([
                StatusCode::BAD_GATEWAY,
                StatusCode::SERVICE_UNAVAILABLE,
                StatusCode::GATEWAY_TIMEOUT,
            ]),
            backoff: Duration::from_millis(25),
            budget: RetryBudget {
                share: Ratio(200_000),
                at_least: 3,
            },
            body_buffer: 64 << 10,
        }
    }
}

// === impl Shield ===

impl Shield {
    fn allows(&self, trouble: Trouble, case: &Case) -> bool {
        let is_covered = match trouble {
            Trouble::Unavailable | Trouble::Unsent => true,
            Trouble::Broken | Trouble::Stale | Trouble::Timeout => case.is_idempotent,
            // Whoever asks for a version wants to see what it says.
            Trouble::Status(status) => {
                case.is_idempotent && !case.is_override && self.codes.contains(&status)
            }
        };
        let is_asked = match self.requests {
            ShieldedRequests::None => false,
            ShieldedRequests::Unsent => matches!(trouble, Trouble::Unavailable | Trouble::Unsent),
            ShieldedRequests::Idempotent => true,
        };
        is_covered && is_asked && case.is_whole && !case.at_baseline
    }
}

impl Default for Shield {
    fn default() -> Self {
        Self {
            requests: ShieldedRequests::Idempotent,
            codes: Box::new([
                StatusCode::INTERNAL_SERVER_ERROR,
                StatusCode::BAD_GATEWAY,
                StatusCode::SERVICE_UNAVAILABLE,
                StatusCode::GATEWAY_TIMEOUT,
            ]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GET_AT_CANARY: Case = Case {
        is_idempotent: true,
        is_whole: true,
        at_baseline: false,
        is_override: false,
        has_others: false,
        retries: 0,
    };

    fn rescue() -> Rescue {
        Rescue {
            retry: Retry::default(),
            shield: Shield::default(),
        }
    }

    fn remedies(trouble: Trouble, case: Case) -> Vec<Remedy> {
        rescue().remedies(trouble, &case).collect()
    }

    #[test]
    fn by_default_a_broken_canary_fails_nobody_who_reads() {
        let status = |code| Trouble::Status(StatusCode::from_u16(code).unwrap());
        for trouble in [Trouble::Unsent, Trouble::Broken, status(500), status(503)] {
            assert_eq!(remedies(trouble, GET_AT_CANARY), [Remedy::Shield]);
        }
        assert_eq!(remedies(status(501), GET_AT_CANARY), []);
        assert_eq!(remedies(status(404), GET_AT_CANARY), []);
    }

    #[test]
    fn who_finds_no_room_is_not_sent_to_the_end_of_the_queue_again() {
        for (at_baseline, expected) in [(false, vec![Remedy::Shield]), (true, vec![])] {
            let case = Case {
                is_idempotent: false,
                has_others: true,
                at_baseline,
                ..GET_AT_CANARY
            };
            assert_eq!(remedies(Trouble::Unavailable, case), expected);
        }
    }

    #[test]
    fn a_connection_that_had_been_idle_says_nothing_of_its_endpoint() {
        let both = [Remedy::Retry, Remedy::Shield];
        assert_eq!(remedies(Trouble::Stale, GET_AT_CANARY), both);
        let post = Case {
            is_idempotent: false,
            ..GET_AT_CANARY
        };
        assert_eq!(remedies(Trouble::Stale, post), []);
        assert!(!Retry::is_on_budget(Trouble::Stale) && Retry::is_on_budget(Trouble::Broken));
    }

    #[test]
    fn another_endpoint_comes_before_the_baseline() {
        let case = Case {
            has_others: true,
            ..GET_AT_CANARY
        };
        let both = [Remedy::Retry, Remedy::Shield];
        assert_eq!(remedies(Trouble::Broken, case), both);
        let again = Case { retries: 1, ..case };
        assert_eq!(remedies(Trouble::Broken, again), [Remedy::Shield]);
    }

    #[test]
    fn the_baseline_is_tried_again_even_if_it_has_one_endpoint() {
        let case = Case {
            at_baseline: true,
            ..GET_AT_CANARY
        };
        assert_eq!(remedies(Trouble::Broken, case), [Remedy::Retry]);
        let status = Trouble::Status(StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(remedies(status, case), []);
    }

    #[test]
    fn what_changes_something_is_sent_twice_only_if_it_was_not_sent_once() {
        let post = Case {
            is_idempotent: false,
            ..GET_AT_CANARY
        };
        assert_eq!(remedies(Trouble::Unsent, post), [Remedy::Shield]);
        assert_eq!(remedies(Trouble::Broken, post), []);
    }

    #[test]
    fn who_named_the_version_sees_what_it_says() {
        let case = Case {
            is_override: true,
            ..GET_AT_CANARY
        };
        let status = Trouble::Status(StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(remedies(status, case), []);
        assert_eq!(remedies(Trouble::Unsent, case), [Remedy::Shield]);
    }

    #[test]
    fn pauses_grow_and_another_endpoint_gets_at_once_what_none_has_seen() {
        let retry = Retry::default();
        let others = Case {
            has_others: true,
            ..GET_AT_CANARY
        };
        assert_eq!(retry.pause(Trouble::Unsent, &others, 1.0), Duration::ZERO);
        let pause = |retries, die| {
            let case = Case { retries, ..others };
            retry.pause(Trouble::Broken, &case, die)
        };
        assert_eq!(pause(0, 1.0), Duration::from_millis(25));
        assert_eq!(pause(1, 0.0), Duration::from_millis(25));
        assert_eq!(pause(2, 1.0), Duration::from_millis(100));
        let alone = retry.pause(Trouble::Unsent, &GET_AT_CANARY, 1.0);
        assert_eq!(alone, Duration::from_millis(25));
    }

    #[test]
    fn who_has_answered_or_is_too_slow_is_not_asked_again_but_another_is() {
        let unavailable = Trouble::Status(StatusCode::SERVICE_UNAVAILABLE);
        for trouble in [Trouble::Timeout, unavailable] {
            assert_eq!(remedies(trouble, GET_AT_CANARY), [Remedy::Shield]);
            let mut case = Case {
                at_baseline: true,
                ..GET_AT_CANARY
            };
            assert_eq!(remedies(trouble, case), []);
            case.has_others = true;
            assert_eq!(remedies(trouble, case), [Remedy::Retry]);
            case.is_idempotent = false;
            assert_eq!(remedies(trouble, case), []);
        }
    }

    fn case() -> impl Strategy<Value = Case> {
        (any::<[bool; 5]>(), 0_u32..4).prop_map(|(bits, retries)| Case {
            is_idempotent: bits[0],
            is_whole: bits[1],
            at_baseline: bits[2],
            is_override: bits[3],
            has_others: bits[4],
            retries,
        })
    }

    fn trouble() -> impl Strategy<Value = Trouble> {
        let status =
            (500_u16..600).prop_map(|code| Trouble::Status(StatusCode::from_u16(code).unwrap()));
        let plain = vec![
            Trouble::Unavailable,
            Trouble::Unsent,
            Trouble::Broken,
            Trouble::Stale,
            Trouble::Timeout,
        ];
        prop_oneof![prop::sample::select(plain), status]
    }

    proptest! {
        #[test]
        fn nothing_that_may_have_had_an_effect_is_sent_twice(case in case(), trouble in trouble()) {
            let any = remedies(trouble, case);
            let is_unseen = matches!(trouble, Trouble::Unavailable | Trouble::Unsent);
            if !case.is_idempotent && !is_unseen || !case.is_whole {
                prop_assert_eq!(any, []);
            }
        }

        #[test]
        fn the_baseline_is_never_shielded_and_repetitions_end(case in case(), trouble in trouble()) {
            let any = remedies(trouble, case);
            prop_assert!(!(case.at_baseline && any.contains(&Remedy::Shield)));
            prop_assert!(!(case.retries >= 1 && any.contains(&Remedy::Retry)));
        }
    }
}
