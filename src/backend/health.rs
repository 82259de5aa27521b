//! Active health: when an endpoint that is asked regularly is taken for healthy, and when not.
//!
//! Pure: who asks, and when, is [`health`](crate::health)'s.

use std::time::Duration;

use http::uri::PathAndQuery;
use http::{HeaderValue, StatusCode};

/// How the endpoints of a backend are asked whether they are well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// What they are asked.
    pub probe: Probe,
    /// From one question to the next; each is up to a tenth early or late, so that the proxies of a
    /// fleet do not ask all at once.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// How many good answers in a row make an unhealthy endpoint healthy.
    pub healthy_after: u32,
    /// How many bad answers in a row make a healthy endpoint unhealthy.
    pub unhealthy_after: u32,
}

/// What an endpoint is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// To accept a connection, with TLS where its backend has it.
    Tcp,
    /// A GET.
    Http {
        /// Of this.
        path: PathAndQuery,
        /// With this host; `None` for the endpoint's address.
        host: Option<HeaderValue>,
        /// Answered with one of these; none means any success.
        statuses: Vec<StatusCode>,
    },
    /// `grpc.health.v1.Health/Check` (gRPC Health Checking Protocol).
    Grpc {
        /// For this service; empty for the whole server.
        service: String,
    },
}

/// What is held of an endpoint, and how sure that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opinion {
    pub(crate) health: Health,
    /// Answers in a row that speak against it.
    contrary: u32,
}

/// What is held of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It has not been asked yet.
    Unknown,
    /// It is well.
    Healthy,
    /// It is not.
    Unhealthy,
}

// === impl HealthCheck ===

impl HealthCheck {
    /// When to ask again, by a die.
    pub fn pause(&self, die: f64) -> Duration {
        self.interval.mul_f64(0.9 + 0.2 * die.clamp(0.0, 1.0))
    }
}

// === impl Opinion ===

impl Opinion {
    /// As things stand.
    pub fn new(health: Health) -> Self {
        Self {
            health,
            contrary: 0,
        }
    }

    /// An answer has come, or none; says whether the opinion has changed. The first answer of all
    /// decides alone.
    pub fn learn(&mut self, is_good: bool, check: &HealthCheck) -> bool {
        let (speaks_for, needed) = match (self.health, is_good) {
            (Health::Healthy, true) | (Health::Unhealthy, false) => {
                self.contrary = 0;
                return false;
            }
            (Health::Unknown, true) => (Health::Healthy, 1),
            (Health::Unknown, false) => (Health::Unhealthy, 1),
            (Health::Healthy, false) => (Health::Unhealthy, check.unhealthy_after),
            (Health::Unhealthy, true) => (Health::Healthy, check.healthy_after),
        };
        self.contrary += 1;
        let is_changed = self.contrary >= needed;
        if is_changed {
            *self = Self::new(speaks_for);
        }
        is_changed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check() -> HealthCheck {
        HealthCheck {
            probe: Probe::Tcp,
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            healthy_after: 2,
            unhealthy_after: 3,
        }
    }

    fn learn(opinion: &mut Opinion, answers: &str) -> Health {
        for answer in answers.chars() {
            opinion.learn(answer == '+', &check());
        }
        opinion.health
    }

    #[test]
    fn opinions_change_after_so_many_answers_in_a_row() {
        let mut opinion = Opinion::new(Health::Healthy);
        assert_eq!(learn(&mut opinion, "--+--"), Health::Healthy);
        assert_eq!(learn(&mut opinion, "-"), Health::Unhealthy);
        assert_eq!(learn(&mut opinion, "+-+"), Health::Unhealthy);
        assert_eq!(learn(&mut opinion, "+"), Health::Healthy);
    }

    #[test]
    fn the_first_answer_decides_alone() {
        assert_eq!(
            learn(&mut Opinion::new(Health::Unknown), "+"),
            Health::Healthy
        );
        assert_eq!(
            learn(&mut Opinion::new(Health::Unknown), "-"),
            Health::Unhealthy
        );
    }

    proptest! {
        #[test]
        fn pauses_are_within_a_tenth(die in 0.0_f64..1.0) {
            let pause = check().pause(die).as_secs_f64();
            prop_assert!((9.0..=11.0).contains(&pause));
        }
    }
}
