//! Passive health: which endpoints do worse than they should, by what requests say of them.
//!
//! Two ways. An endpoint that fails so many requests in a row is suspected at once. And at every
//! interval each endpoint is compared with all the others of its backend: by the share of its
//! requests that failed, with a test for two proportions, and by the geometric mean of its
//! latencies. Comparing with the others means that a service which fails everywhere ejects nobody
//! by that, and the geometric mean that one slow request does not look like a slow server.
//!
//! Pure: samples and the time are arguments.

use std::num::NonZeroU32;
use std::time::Duration;

use http::StatusCode;
use tokio::time::Instant;

use crate::routing::split::Ratio;

/// What makes an endpoint an outlier, and what becomes of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutlierPolicy {
    /// So many failures in a row are enough; `None` for any number.
    pub consecutive: Option<NonZeroU32>,
    /// How often endpoints are compared.
    pub interval: Duration,
    /// How long the first ejection takes; the second takes twice as long, and so on.
    pub ejection: Duration,
    /// The longest.
    pub longest_ejection: Duration,
    /// The most of a backend's endpoints that may be ejected at a time.
    pub most_ejected: Ratio,
    /// An endpoint with fewer requests in an interval is not compared.
    pub least_requests: u32,
    /// How much larger its share of failures may be than that of the others; `None` for any.
    pub failure_excess: Option<Ratio>,
    /// How many times their latency it may have; `None` for any.
    pub latency_factor: Option<NonZeroU32>,
}

/// Why an endpoint is ejected. A closed set, used in metrics and logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Too many failures in a row.
    Consecutive,
    /// More failures than the others.
    FailureRate,
    /// Slower than the others.
    Latency,
}

/// What one endpoint did in one interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Requests that were answered or failed.
    pub requests: u32,
    /// Those that failed.
    pub failures: u32,
    /// The sum of the [`log_latency`] of those that were answered.
    pub log_latency: u64,
}

/// What an endpoint has been through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// How often it was ejected; one less for every interval without.
    times: u32,
    until: Option<Instant>,
}

/// Parts of a doubling that logarithms are counted in.
const DOUBLING: f64 = 256.0;

/// By so many standard errors two shares of failures must differ. One comparison in two thousand of
/// equals gets that far, so that a backend of ten endpoints sees one wrong ejection in half an hour
/// at most, and only if the shares differ by `failure_excess` as well.
const STANDARD_ERRORS: f64 = 3.3;

// === impl Sample ===

impl Sample {
    fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            failures: self.failures + other.failures,
            log_latency: self.log_latency + other.log_latency,
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            requests: self.requests - other.requests,
            failures: self.failures - other.failures,
            log_latency: self.log_latency - other.log_latency,
        }
    }

    fn answered(self) -> u32 {
        self.requests.saturating_sub(self.failures)
    }

    fn failure_share(self) -> f64 {
        f64::from(self.failures) / f64::from(self.requests.max(1))
    }

    fn mean_log_latency(self) -> f64 {
        self.log_latency as f64 / f64::from(self.answered().max(1))
    }
}

// === impl Record ===

impl Record {
    /// Ejects it, for longer each time.
    pub fn eject(&mut self, now: Instant, policy: &OutlierPolicy) -> Duration {
        self.times += 1;
        let length = policy.ejection.saturating_mul(self.times);
        let length = length.min(policy.longest_ejection);
        self.until = Some(now + length);
        length
    }

    /// True once its ejection is over; says so once.
    pub fn ends(&mut self, now: Instant) -> bool {
        let is_over = self.until.is_some_and(|until| until <= now);
        if is_over {
            self.until = None;
        }
        is_over
    }

    /// Its ejection is over, whenever it would have been.
    pub fn pardon(&mut self) {
        self.until = None;
    }

    /// It has got through an interval: one of its ejections is forgotten.
    pub fn forgive(&mut self) {
        if self.until.is_none() {
            self.times = self.times.saturating_sub(1);
        }
    }
}

// === impl Cause ===

impl Cause {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Consecutive, Self::FailureRate, Self::Latency];

    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Consecutive => "consecutive_failures",
            Self::FailureRate => "failure_rate",
            Self::Latency => "latency",
        }
    }
}

/// True for a status that says that the endpoint has failed. The others of 5xx a client brings about by
/// what he asks for: an odd method, a version, or a way in circles.
pub fn is_failure(status: StatusCode) -> bool {
    let is_asked_for = matches!(
        status,
        StatusCode::NOT_IMPLEMENTED
            | StatusCode::HTTP_VERSION_NOT_SUPPORTED
            | StatusCode::LOOP_DETECTED
    );
    status.is_server_error() && !is_asked_for
}

/// The logarithm of a latency, of which the average is taken: that of base 2 in parts of
/// 1/256, linear between its whole numbers (Mitchell, "Computer Multiplication and Division Using
/// Binary Logarithms", 1962), since those are the upper bits of a float.
pub fn log_latency(latency: Duration) -> u64 {
    // Not by `as_micros`, whose 128 bits take a hundred instructions to become a float.
    let micros = (latency.as_secs_f32() * 1e6).max(1.0);
    u64::from(micros.to_bits() >> 15) - (127 << 8)
}

/// Those that do worse than the others, by position, and why.
pub fn outliers(samples: &[Sample], policy: &OutlierPolicy) -> Vec<(usize, Cause)> {
    let all = samples
        .iter()
        .copied()
        .fold(Sample::default(), Sample::plus);
    let judge = |(position, one): (usize, &Sample)| {
        let others = all.minus(*one);
        if one.requests.min(others.requests) < policy.least_requests {
            return None;
        }
        let cause = if policy
            .failure_excess
            .is_some_and(|excess| fails_more(*one, others, excess))
        {
            Cause::FailureRate
        } else if policy
            .latency_factor
            .is_some_and(|factor| is_slower(*one, others, factor, policy.least_requests))
        {
            Cause::Latency
        } else {
            return None;
        };
        Some((position, cause))
    };
    samples.iter().enumerate().filter_map(judge).collect()
}

/// How many of so many endpoints may be ejected.
pub fn most_ejected(endpoints: usize, policy: &OutlierPolicy) -> usize {
    (endpoints as u64 * u64::from(policy.most_ejected.0) / 1_000_000) as usize
}

fn fails_more(one: Sample, others: Sample, excess: Ratio) -> bool {
    let difference = one.failure_share() - others.failure_share();
    let pooled = one.plus(others).failure_share();
    let parts = 1.0 / f64::from(one.requests) + 1.0 / f64::from(others.requests);
    let error = (pooled * (1.0 - pooled) * parts).sqrt();
    difference >= excess.as_fraction() && difference > STANDARD_ERRORS * error
}

fn is_slower(one: Sample, others: Sample, factor: NonZeroU32, least: u32) -> bool {
    let doublings = f64::from(factor.get()).log2() * DOUBLING;
    one.answered().min(others.answered()) >= least
        && one.mean_log_latency() - others.mean_log_latency() > doublings
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: OutlierPolicy = OutlierPolicy {
        consecutive: NonZeroU32::new(5),
        interval: Duration::from_secs(10),
        ejection: Duration::from_secs(30),
        longest_ejection: Duration::from_secs(300),
        most_ejected: Ratio(500_000),
        least_requests: 100,
        failure_excess: Some(Ratio(100_000)),
        latency_factor: NonZeroU32::new(3),
    };

    fn sample(requests: u32, failures: u32, latency: Duration) -> Sample {
        Sample {
            requests,
            failures,
            log_latency: u64::from(requests - failures) * log_latency(latency),
        }
    }

    const FAST: Duration = Duration::from_millis(10);

    #[test]
    fn one_that_fails_more_than_the_others_is_an_outlier_from_two_endpoints_on() {
        for others in 1..5 {
            let mut samples = vec![sample(200, 2, FAST); others];
            samples.push(sample(200, 40, FAST));
            assert_eq!(outliers(&samples, &POLICY), [(others, Cause::FailureRate)]);
        }
    }

    #[test]
    fn one_that_is_slower_than_the_others_is_an_outlier_but_one_slow_request_is_not() {
        let slow = sample(200, 0, FAST * 4);
        let samples = [sample(200, 0, FAST), slow, sample(200, 0, FAST)];
        assert_eq!(outliers(&samples, &POLICY), [(1, Cause::Latency)]);
        let mut unlucky = sample(199, 0, FAST);
        unlucky.requests += 1;
        unlucky.log_latency += log_latency(Duration::from_secs(30));
        assert_eq!(outliers(&[sample(200, 0, FAST), unlucky], &POLICY), []);
    }

    #[test]
    fn a_service_that_fails_everywhere_and_one_with_few_requests_have_no_outliers() {
        assert_eq!(outliers(&[sample(200, 190, FAST); 3], &POLICY), []);
        let few = sample(99, 99, FAST * 9);
        assert_eq!(outliers(&[sample(200, 0, FAST), few], &POLICY), []);
        assert_eq!(outliers(&[], &POLICY), []);
    }

    #[test]
    fn ejections_grow_and_are_forgiven() {
        let now = Instant::now();
        let mut record = Record::default();
        let second = Duration::from_secs(1);
        assert_eq!(record.eject(now, &POLICY), second * 30);
        record.forgive();
        assert!(!record.ends(now + second * 29));
        assert!(record.ends(now + second * 30));
        assert!(!record.ends(now + second * 31));
        assert_eq!(record.eject(now, &POLICY), second * 60);
        for _ in 0..20 {
            record.eject(now, &POLICY);
        }
        assert_eq!(record.eject(now, &POLICY), second * 300);
        assert!(record.ends(now + second * 300));
        for _ in 0..100 {
            record.forgive();
        }
        assert_eq!(record, Record::default());
    }

    #[test]
    fn a_share_of_endpoints_is_never_more_than_that() {
        let counts: Vec<usize> = (0..6).map(|all| most_ejected(all, &POLICY)).collect();
        assert_eq!(counts, [0, 0, 1, 1, 2, 2]);
    }

    #[test]
    fn what_a_client_provokes_is_no_failure() {
        let failures = (400..600).filter(|code| is_failure(StatusCode::from_u16(*code).unwrap()));
        let among: Vec<u16> = failures.filter(|code| *code < 512).collect();
        assert_eq!(among, [500, 502, 503, 504, 506, 507, 509, 510, 511]);
    }

    proptest! {
        #[test]
        fn logarithms_of_latencies_are_good_to_a_tenth(micros in 1_u64..100_000_000) {
            let logarithm = log_latency(Duration::from_micros(micros)) as f64 / DOUBLING;
            prop_assert!((logarithm - (micros as f64).log2()).abs() < 0.1);
        }

        #[test]
        fn equals_are_never_outliers(
            requests in 0_u32..100_000, share in 0_u32..=100, count in 1_usize..20,
        ) {
            let one = sample(requests, requests / 100 * share, FAST);
            prop_assert_eq!(outliers(&vec![one; count], &POLICY), []);
        }

        /// By chance, at most one comparison in some thousands.
        #[test]
        fn noise_is_rarely_an_outlier(seed in any::<u64>(), share in 1_u32..50) {
            let mut dice = fastrand::Rng::with_seed(seed);
            let mut rounds = 0;
            for _ in 0..50 {
                let samples: Vec<Sample> = (0..4)
                    .map(|_| {
                        let failures = (0..300).filter(|_| dice.u32(..100) < share).count();
                        sample(300, failures as u32, FAST)
                    })
                    .collect();
                rounds += outliers(&samples, &POLICY).len();
            }
            prop_assert!(rounds <= 3, "{} of 200", rounds);
        }
    }
}
