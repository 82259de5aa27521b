//! Checks what happens when endpoints fail: health, outliers, limits, failover, retries.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use http::header::HeaderValue;
use http::uri::PathAndQuery;

use crate::backend::health::Probe;
use crate::backend::{GateLimits, HealthCheck, OutlierPolicy};
use crate::config::document::Path;
use crate::config::file::BackendProtocol;
use crate::config::{Failover, file, value};
use crate::routing::BASELINE;
use crate::routing::rescue::{Rescue, Retry, RetryBudget, Shield, ShieldedRequests};
use crate::routing::split::Ratio;
use crate::routing::table::Hostname;

use super::{Checker, Names};

const CHECK_INTERVAL: Duration = Duration::from_secs(5);
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
const HEALTHY_AFTER: u32 = 2;
const UNHEALTHY_AFTER: u32 = 3;

const CONSECUTIVE_FAILURES: u32 = 5;
const COMPARE_INTERVAL: Duration = Duration::from_secs(10);
const EJECTION: Duration = Duration::from_secs(30);
const LONGEST_EJECTION: Duration = Duration::from_secs(300);
const LEAST_REQUESTS: u32 = 100;
const FAILURE_EXCESS_PERCENT: u32 = 10;
const LATENCY_FACTOR: u32 = 5;

const STREAM_DEADLINE: Duration = Duration::from_secs(30);
const SLOW_START: Duration = Duration::from_secs(10);

const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
const SHORTEST_CHECK_INTERVAL: Duration = Duration::from_millis(10);

/// Retries that are allowed at any time.
const LEAST_RETRIES: usize = 3;

/// Answers in a row that change an opinion.
const ANSWERS: RangeInclusive<u32> = 1..=100;
const PERCENT: RangeInclusive<u32> = 0..=100;
const STATUSES: RangeInclusive<u16> = 200..=599;
const FAILURES: RangeInclusive<u16> = 400..=599;

/// What protects a baseline and would harm another version: with too few endpoints it goes on with
/// all of them, while users of another version have the baseline to go to. A backend may be both, for
/// different routes.
struct Role {
    /// Slow clients hold on to places as stuck endpoints do: of a baseline they must not take all.
    in_flight: usize,
    /// Who has somewhere else to go does not wait for long.
    queue_timeout: Duration,
    most_ejected_percent: u32,
    panic_percent: u32,
}

impl Role {
    const BASELINE: Self = Self {
        in_flight: 8192,
        queue_timeout: Duration::from_secs(1),
        most_ejected_percent: 50,
        panic_percent: 50,
    };
    const OTHER: Self = Self {
        in_flight: 1024,
        queue_timeout: Duration::from_millis(25),
        most_ejected_percent: 100,
        panic_percent: 0,
    };

    /// All its endpoints may be ejected: users of the one route have somewhere else to go, and for those
    /// of the other it goes on with all of them when more than half are out.
    const BOTH: Self = Self {
        most_ejected_percent: 100,
        ..Self::BASELINE
    };

    fn of(backend: &file::Backend, roles: &Roles<'_>) -> Self {
        let name = &*backend.name;
        match (roles.baselines.contains(name), roles.others.contains(name)) {
            (true, false) => Self::BASELINE,
            (true, true) => Self::BOTH,
            (false, _) => Self::OTHER,
        }
    }
}

/// What backends are to routes: found once, since there may be many of both.
pub(super) struct Roles<'f> {
    /// Those that are the baseline of some route.
    baselines: HashSet<&'f str>,
    /// Those that are another version of some route.
    others: HashSet<&'f str>,
}

pub(super) fn roles(routes: &[file::Route]) -> Roles<'_> {
    let mut roles = Roles {
        baselines: HashSet::new(),
        others: HashSet::new(),
    };
    for route in routes {
        for (position, one) in route.backend_refs.iter().enumerate() {
            if position == BASELINE {
                roles.baselines.insert(&*one.name);
            } else {
                roles.others.insert(&*one.name);
            }
        }
    }
    roles
}

/// What of a backend is about endpoints that fail.
pub(super) struct Resilience {
    pub(super) gate_limits: GateLimits,
    pub(super) health_check: Option<Arc<HealthCheck>>,
    pub(super) outliers: Option<OutlierPolicy>,
    pub(super) slow_start: Duration,
    pub(super) panic_threshold: Ratio,
}

impl Checker<'_> {
    pub(super) fn resilience(
        &mut self,
        backend: &file::Backend,
        roles: &Roles<'_>,
        at: &Path,
    ) -> Option<Resilience> {
        let role = Role::of(backend, roles);
        let gate_limits = self.gate_limits(&backend.limits, &role, &at.key("limits"));
        let health_check = match &backend.health_check {
            Some(check) => {
                self.refuse_grpc_check_of_http1(check, backend, at);
                let check = self.health_check(check, &at.key("healthCheck"));
                check.map(Arc::new).map(Some)
            }
            None => Some(None),
        };
        let outliers = self.outliers(
            &backend.outlier_detection,
            role.most_ejected_percent,
            &at.key("outlierDetection"),
        );
        let slow_start = self.duration(
            backend.slow_start.as_deref(),
            SLOW_START,
            &at.key("slowStart"),
        );
        let panic_threshold = self.percent(
            backend.panic_threshold_percent,
            role.panic_percent,
            &at.key("panicThresholdPercent"),
        );
        Some(Resilience {
            gate_limits: gate_limits?,
            health_check: health_check?,
            outliers: outliers?,
            slow_start: slow_start?,
            panic_threshold: panic_threshold?,
        })
    }

    fn gate_limits(
        &mut self,
        limits: &file::BackendLimits,
        role: &Role,
        at: &Path,
    ) -> Option<GateLimits> {
        let default = GateLimits::default();
        let queue_timeout = self.duration(
            limits.queue_timeout.as_deref(),
            role.queue_timeout,
            &at.key("queueTimeout"),
        );
        let in_flight = self.count(limits.in_flight, &at.key("inFlight"));
        Some(GateLimits {
            in_flight: in_flight?.unwrap_or(role.in_flight),
            queue: limits.queue.map_or(default.queue, |queue| queue as usize),
            queue_timeout: queue_timeout?,
        })
    }

    /// A limit that would let nothing through if it were 0.
    pub(super) fn count(&mut self, count: Option<u32>, at: &Path) -> Option<Option<usize>> {
        if count == Some(0) {
            self.error(at, "with 0 nothing would get through", None);
            return None;
        }
        Some(count.map(|count| count as usize))
    }

    fn health_check(&mut self, check: &file::HealthCheck, at: &Path) -> Option<HealthCheck> {
        let probe = self.probe(check, at);
        let interval = self.positive(
            check.interval.as_deref(),
            CHECK_INTERVAL,
            &at.key("interval"),
        );
        if interval.is_some_and(|interval| interval < SHORTEST_CHECK_INTERVAL) {
            let message = "more than a hundred checks a second only add load";
            self.error(&at.key("interval"), message, None);
        }
        let timeout = self.positive(check.timeout.as_deref(), CHECK_TIMEOUT, &at.key("timeout"));
        let healthy_after = self.within(
            check.healthy_after,
            HEALTHY_AFTER,
            ANSWERS,
            &at.key("healthyAfter"),
        );
        let unhealthy_after = self.within(
            check.unhealthy_after,
            UNHEALTHY_AFTER,
            ANSWERS,
            &at.key("unhealthyAfter"),
        );
        Some(HealthCheck {
            probe: probe?,
            interval: interval?,
            timeout: timeout?,
            healthy_after: healthy_after?,
            unhealthy_after: unhealthy_after?,
        })
    }

    /// It would fail for ever, and the backend get no requests.
    fn refuse_grpc_check_of_http1(
        &mut self,
        check: &file::HealthCheck,
        backend: &file::Backend,
        at: &Path,
    ) {
        let protocol = (backend.protocol, backend.tls.is_some());
        let is_http1 = matches!(protocol, (Some(BackendProtocol::Http1), _) | (None, false));
        if check.grpc.is_some() && is_http1 && !self.document.is_maimed(at) {
            let message = "gRPC needs HTTP/2, and this backend has HTTP/1.1";
            let hint = "say `protocol: h2c`, or `h2` with `tls`";
            let at = at.key("healthCheck").key("grpc");
            self.error(&at, message, Some(hint.to_owned()));
        }
    }

    fn probe(&mut self, check: &file::HealthCheck, at: &Path) -> Option<Probe> {
        match (&check.http, &check.tcp, &check.grpc) {
            (Some(http), None, None) => self.http_probe(http, &at.key("http")),
            (None, Some(_), None) => Some(Probe::Tcp),
            (None, None, Some(grpc)) => Some(Probe::Grpc {
                service: grpc.service.clone(),
            }),
            (None, None, None) if self.document.is_maimed(at) => None,
            _ => {
                let message = "a health check is exactly one of `http`, `tcp` and `grpc`";
                self.error(at, message, None);
                None
            }
        }
    }

    fn http_probe(&mut self, http: &file::HttpCheck, at: &Path) -> Option<Probe> {
        let path = self.parse(&http.path, &at.key("path"), |text| {
            let path = Some(text).filter(|text| text.starts_with('/'));
            path.and_then(|path| path.parse::<PathAndQuery>().ok())
                .ok_or_else(|| "is not a path such as `/healthz`".to_owned())
        });
        let host = self.optional(http.hostname.as_deref(), &at.key("hostname"), |text| {
            if let Hostname::Wildcard(_) = value::hostname(text)? {
                return Err("is not the name of one host".to_owned());
            }
            HeaderValue::from_str(text).map_err(|_| "is not a host name".to_owned())
        });
        let statuses = self.statuses(&http.statuses, STATUSES, &at.key("statuses"));
        Some(Probe::Http {
            path: path?,
            host: host?,
            statuses: statuses?,
        })
    }

    fn outliers(
        &mut self,
        outliers: &file::OutlierDetection,
        most_ejected_percent: u32,
        at: &Path,
    ) -> Option<Option<OutlierPolicy>> {
        let interval = self.positive(
            outliers.interval.as_deref(),
            COMPARE_INTERVAL,
            &at.key("interval"),
        );
        let ejection = self.positive(outliers.ejection.as_deref(), EJECTION, &at.key("ejection"));
        let longest = self.positive(
            outliers.max_ejection.as_deref(),
            LONGEST_EJECTION,
            &at.key("maxEjection"),
        );
        let most_ejected = self.percent(
            outliers.max_ejected_percent,
            most_ejected_percent,
            &at.key("maxEjectedPercent"),
        );
        let excess = self.percent(
            outliers.failure_excess_percent,
            FAILURE_EXCESS_PERCENT,
            &at.key("failureExcessPercent"),
        );
        let consecutive = outliers
            .consecutive_failures
            .unwrap_or(CONSECUTIVE_FAILURES);
        if let (Some(ejection), Some(longest), true) =
            (ejection, longest, outliers.max_ejection.is_some())
            && longest < ejection
        {
            let message = "is shorter than `ejection`, which is the first";
            self.error(&at.key("maxEjection"), message, None);
        }
        let longest = longest.max(ejection);
        let least_requests = self.within(
            outliers.min_requests,
            LEAST_REQUESTS,
            10..=u32::MAX,
            &at.key("minRequests"),
        );
        let factor = match outliers.latency_factor {
            Some(0) => Some(0),
            factor => self.within(factor, LATENCY_FACTOR, 2..=1000, &at.key("latencyFactor")),
        };
        let policy = OutlierPolicy {
            consecutive: NonZeroU32::new(consecutive),
            interval: interval?,
            ejection: ejection?,
            longest_ejection: longest?,
            most_ejected: most_ejected?,
            least_requests: least_requests?,
            failure_excess: excess.map(|excess| Some(excess).filter(|one| one.0 > 0))?,
            latency_factor: NonZeroU32::new(factor?),
        };
        Some((!outliers.disabled).then_some(policy))
    }

    /// A number within bounds; no more than what fits is no bound.
    fn within(
        &mut self,
        count: Option<u32>,
        default: u32,
        bounds: RangeInclusive<u32>,
        at: &Path,
    ) -> Option<u32> {
        let count = count.unwrap_or(default);
        if !bounds.contains(&count) {
            let message = match (bounds.start(), bounds.end()) {
                (least, &u32::MAX) => format!("{count} is less than {least}"),
                (least, most) => format!("{count} is not between {least} and {most}"),
            };
            self.error(at, message, None);
            return None;
        }
        Some(count)
    }

    pub(super) fn failover(
        &mut self,
        route: &file::Route,
        at: &Path,
        backends: &Names,
    ) -> Option<Failover> {
        let failover = &route.failover;
        let to = at.key("fromBaseline");
        let from_baseline = match &failover.from_baseline {
            None => Some(None),
            Some(name) => self.own_backend(name, &to, route, backends).map(Some),
        };
        if from_baseline == Some(Some(BASELINE)) {
            self.error(&to, "the baseline cannot take over for itself", None);
            return None;
        }
        Some(Failover {
            to_baseline: failover.to_baseline.unwrap_or(true),
            from_baseline: from_baseline?,
        })
    }

    pub(super) fn rescue(&mut self, route: &file::Route, at: &Path) -> Option<Arc<Rescue>> {
        let retry = self.retry(&route.retry, &at.key("retry"));
        let shield = self.shield(&route.shield, &at.key("shield"));
        Some(Arc::new(Rescue {
            retry: retry?,
            shield: shield?,
        }))
    }

    fn retry(&mut self, retry: &file::Retry, at: &Path) -> Option<Retry> {
        let default = Retry::default();
        let codes = self.failures(retry.codes.as_deref(), default.codes, &at.key("codes"));
        let backoff = self.duration(
            retry.backoff.as_deref(),
            default.backoff,
            &at.key("backoff"),
        );
        let share = self.percent(retry.budget_percent, 20, &at.key("budgetPercent"));
        let buffer = self.size(retry.body_buffer, 0..=(16 << 20), &at.key("bodyBuffer"));
        if backoff.is_some_and(|backoff| backoff > LONGEST_BACKOFF) {
            self.error(&at.key("backoff"), "nobody waits for longer than 1m", None);
        }
        let attempts = retry.attempts.unwrap_or(default.attempts);
        if attempts > 10 {
            self.error(&at.key("attempts"), "more than 10 only add load", None);
        }
        Some(Retry {
            attempts,
            codes: codes?,
            backoff: backoff?,
            budget: RetryBudget {
                share: share?,
                at_least: LEAST_RETRIES,
            },
            body_buffer: buffer?.map_or(default.body_buffer, |size| size as usize),
        })
    }

    fn shield(&mut self, shield: &file::Shield, at: &Path) -> Option<Shield> {
        let default = Shield::default().codes;
        let codes = self.failures(shield.codes.as_deref(), default, &at.key("codes"));
        Some(Shield {
            requests: match shield.requests {
                file::ShieldedRequests::Idempotent => ShieldedRequests::Idempotent,
                file::ShieldedRequests::Unsent => ShieldedRequests::Unsent,
                file::ShieldedRequests::None => ShieldedRequests::None,
            },
            codes: codes?,
        })
    }

    /// How long a stream may go on whose user gets another version.
    pub(super) fn stream_deadline(
        &mut self,
        streams: &file::Streams,
        at: &Path,
    ) -> Option<Option<Duration>> {
        let at = at.key("deadline");
        let deadline = self.duration(streams.deadline.as_deref(), STREAM_DEADLINE, &at);
        if streams.deadline.is_some() && streams.when_moved != file::WhenMoved::Drain {
            let message = "only streams that drain have a deadline";
            self.error(&at, message, Some("say `whenMoved: drain`".to_owned()));
            return None;
        }
        Some(match streams.when_moved {
            file::WhenMoved::Pin => None,
            file::WhenMoved::Drain => Some(deadline?),
            file::WhenMoved::Cut => Some(Duration::ZERO),
        })
    }

    /// Statuses that say that a request has failed.
    fn failures(
        &mut self,
        codes: Option<&[u16]>,
        default: Box<[StatusCode]>,
        at: &Path,
    ) -> Option<Box<[StatusCode]>> {
        codes.map_or(Some(default), |codes| {
            self.statuses(codes, FAILURES, at).map(Into::into)
        })
    }

    fn statuses(
        &mut self,
        codes: &[u16],
        bounds: RangeInclusive<u16>,
        at: &Path,
    ) -> Option<Vec<StatusCode>> {
        self.each(codes, at, |checker, code, at| {
            let status = StatusCode::from_u16(*code).ok();
            let status = status.filter(|_| bounds.contains(code));
            if status.is_none() {
                let (least, most) = (bounds.start(), bounds.end());
                let message = format!("{code} is not a status between {least} and {most}");
                checker.error(at, message, None);
            }
            status
        })
    }

    fn percent(&mut self, percent: Option<u32>, default: u32, at: &Path) -> Option<Ratio> {
        let percent = self.within(percent, default, PERCENT, at)?;
        Some(Ratio(percent * 10_000))
    }

    /// A duration that may not be zero.
    fn positive(&mut self, text: Option<&str>, default: Duration, at: &Path) -> Option<Duration> {
        let duration = self.duration(text, default, at)?;
        if duration.is_zero() {
            self.error(at, "must be longer than 0", None);
            return None;
        }
        Some(duration)
    }
}
