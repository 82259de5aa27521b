//! A backend is one version of a service: its pool of endpoints, and what is known of them.
//!
//! An [`Endpoint`] is living state: it outlives snapshots, so that a reload which does not touch it
//! keeps its count of requests in flight, its warm connections, and what is held of its health. So is
//! the [`Gate`] of a backend. A [`Backend`] is what one snapshot says about them.

pub mod endpoint;
pub mod gate;
pub mod health;
pub mod outlier;

use std::sync::Arc;
use std::time::Duration;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::proxy_protocol::Version;
use crate::routing::split::Ratio;
use crate::tls::client::ClientTls;

pub use endpoint::{Alarms, Endpoint, EndpointId, EndpointKey, Endpoints, Impediment, Lease};
pub use gate::{Crowded, Gate, GateLimits};
pub use health::HealthCheck;
pub use outlier::OutlierPolicy;

/// One version of a service.
#[derive(Debug)]
pub struct Backend {
    /// Its name in the configuration, in logs and in metrics.
    pub name: Arc<str>,
    /// The version it runs.
    pub version: Arc<str>,
    /// The kill switch.
    pub disabled: bool,
    /// Its servers.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Changes to requests on their way there.
    pub request_headers: HeaderEdits,
    /// Changes to responses on their way back.
    pub response_headers: HeaderEdits,
    /// How its endpoints are connected to.
    pub connections: ConnectionPolicy,
    /// What is spoken with them, and over what.
    pub transport: Arc<Transport>,
    /// How many requests it has at a time; all workers share it.
    pub gate: Arc<Gate>,
    /// What the gate lets in.
    pub gate_limits: GateLimits,
    /// How its endpoints are asked whether they are well; `None` if they are not.
    pub health_check: Option<Arc<HealthCheck>>,
    /// When one of them is ejected for what requests say of it; `None` for never.
    pub outliers: Option<OutlierPolicy>,
    /// How long one takes that was let in again to get its full part of the requests.
    pub slow_start: Duration,
    /// With fewer than this part of its endpoints usable, all of them get the requests of the routes
    /// whose baseline it is; 0 for never.
    pub panic_threshold: Ratio,
}

/// Why a backend takes no requests. A closed set, used in metrics and by `explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailability {
    /// The kill switch.
    Disabled,
    /// It has no endpoints.
    Empty,
    /// None of its endpoints is usable.
    Unhealthy,
    /// All that are were let in again a moment ago: it takes only a part as yet.
    SlowStart,
}

/// What is spoken with the endpoints of a backend, and over what.
#[derive(Debug)]
pub struct Transport {
    /// Which version of HTTP.
    pub protocol: UpstreamProtocol,
    /// What TLS connections are made with; `None` without TLS.
    pub tls: Option<ClientTls>,
    /// How HTTP/1.1 is spoken.
    pub http1: Http1Policy,
    /// How HTTP/2 is spoken.
    pub http2: Http2Policy,
    /// In which version of the PROXY protocol they are told who the client is; connections then are
    /// for one request.
    pub proxy_protocol: Option<Version>,
    /// Tells these settings from others: connections that were made with those are used no more.
    pub fingerprint: u64,
}

/// Which version of HTTP is spoken with the endpoints of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2: without TLS by prior knowledge.
    Http2,
    /// What the endpoint agrees on by ALPN, HTTP/2 rather than HTTP/1.1.
    Negotiated,
}

/// How HTTP/1.1 is spoken with endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Http1Policy {
    /// `SO_RCVBUF`: how much the kernel may hold of a response, in bytes, which it takes for half of the
    /// memory that it may use. `None` lets it grow as the system is set.
    pub receive_buffer: Option<usize>,
}

/// How HTTP/2 is spoken with endpoints; windows, buffers and lists in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Http2Policy {
    /// The most requests that one connection has at a time, whatever the endpoint allows.
    pub max_requests: usize,
    /// What may be on its way of one response.
    pub stream_window: u32,
    /// What may be on its way of all responses of a connection. By the window of a response, it is
    /// the number of slow clients that hold up all others (h2#573).
    pub connection_window: u32,
    /// What may wait of one request.
    pub send_buffer: usize,
    /// The head of a response.
    pub header_list: u32,
}

/// How the endpoints of a backend are connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionPolicy {
    /// How long a connection may take to stand.
    pub connect_timeout: Duration,
    /// How long an unused connection is kept.
    pub idle_timeout: Duration,
    /// How many unused connections each worker keeps to each endpoint.
    pub max_idle: usize,
    /// How many connections each worker has to all of them; `None` for any number.
    pub most: Option<usize>,
}

/// Changes to a header section.
#[derive(Clone, Debug, Default)]
pub struct HeaderEdits {
    /// Taken away, first.
    pub remove: Vec<HeaderName>,
    /// Given exactly this value.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Added to what is there, last.
    pub add: Vec<(HeaderName, HeaderValue)>,
}

// === impl Backend ===

impl Backend {
    /// True when it has an endpoint that is well: nobody has to panic.
    pub fn is_available(&self) -> bool {
        self.unavailability(Ratio(0)).is_none()
    }

    /// Why it takes no requests for which this is the panic threshold; `None` when it does.
    pub fn unavailability(&self, panic_threshold: Ratio) -> Option<Unavailability> {
        if self.disabled {
            Some(Unavailability::Disabled)
        } else if self.endpoints.is_empty() {
            Some(Unavailability::Empty)
        } else if panic_threshold == Ratio(0)
            && !self.endpoints.iter().any(|endpoint| endpoint.is_usable())
        {
            Some(Unavailability::Unhealthy)
        } else {
            None
        }
    }

    /// The part of its requests that it should get at `now`, from 0 to 1: less than all of them as long as
    /// every usable endpoint was let in again a moment ago. Among several, one that was not takes the
    /// rest.
    pub fn part(&self, now: Instant) -> f64 {
        if self.endpoints.iter().any(|one| one.is_settled()) {
            return 1.0;
        }
        let usable = self.endpoints.iter().filter(|one| one.is_usable());
        let parts = usable.map(|one| one.part(now, self.slow_start));
        parts.fold(0.0, f64::max)
    }

    /// Chooses an endpoint for one request: of two drawn by lot the one with fewer requests in
    /// flight (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001). `None`
    /// when it takes no requests.
    ///
    /// Those that are not usable are left out, as long as enough are: below the panic threshold all
    /// but new ones take part, since the few that are left would fail under the load of all. So are
    /// those that have `failed` this request before, unless there is no other.
    pub fn choose(
        &self,
        panic_threshold: Ratio,
        die: u64,
        now: Instant,
        failed: &[EndpointId],
    ) -> Option<&Arc<Endpoint>> {
        if self.disabled {
            return None;
        }
        let is_ready =
            |endpoint: &Endpoint| endpoint.is_settled() && !failed.contains(&endpoint.id);
        match self.endpoints.as_slice() {
            [] => None,
            [only] if only.is_usable() || panic_threshold > Ratio(0) => Some(only),
            [_] => None,
            many => {
                let (one, other) = two_of(many.len(), die);
                if is_ready(&many[one]) && is_ready(&many[other]) {
                    Some(less_loaded(&many[one], &many[other]))
                } else {
                    self.choose_carefully(panic_threshold, die, now, failed)
                }
            }
        }
    }

    /// As [`choose`](Self::choose), looking at all endpoints.
    fn choose_carefully(
        &self,
        panic_threshold: Ratio,
        die: u64,
        now: Instant,
        failed: &[EndpointId],
    ) -> Option<&Arc<Endpoint>> {
        let candidates = self.candidates(panic_threshold);
        let others = |endpoint: &&Arc<Endpoint>| !failed.contains(&endpoint.id);
        let untried: Vec<_> = candidates.iter().copied().filter(others).collect();
        let candidates = if untried.is_empty() {
            candidates
        } else {
            untried
        };
        match candidates.as_slice() {
            [] => None,
            [only] => Some(only),
            many => {
                // Other numbers from the same die: that it came to this says something about it.
                let another = |seed| xxh3_64_with_seed(&die.to_le_bytes(), seed);
                let (one, other) = two_of(many.len(), another(0));
                let (one, other) = (many[one], many[other]);
                let luck = another(1) as f64 / u64::MAX as f64;
                let takes_part = |endpoint: &Endpoint| endpoint.part(now, self.slow_start) > luck;
                Some(match (takes_part(one), takes_part(other)) {
                    (true, false) => one,
                    (false, true) => other,
                    _ => less_loaded(one, other),
                })
            }
        }
    }

    /// The endpoints that may be chosen.
    ///
    /// New ones that have not passed a check yet are left out of everything, as long as there are
    /// others: they do not make it a panic, and would not bear one.
    fn candidates(&self, panic_threshold: Ratio) -> Vec<&Arc<Endpoint>> {
        let is_new = |one: &&Arc<Endpoint>| one.is_impeded_by(Impediment::Unchecked);
        let mut all: Vec<_> = self.endpoints.iter().collect();
        if !all.iter().all(is_new) {
            all.retain(|one| !is_new(one));
        }
        let usable = all.iter().copied().filter(|one| one.is_usable());
        let usable: Vec<_> = usable.collect();
        if is_panic(usable.len(), all.len(), panic_threshold) {
            all
        } else {
            usable
        }
    }
}

// === impl Unavailability ===

impl Unavailability {
    /// All there are.
    pub const ALL: [Self; 4] = [
        Self::Disabled,
        Self::Empty,
        Self::Unhealthy,
        Self::SlowStart,
    ];

    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::Empty => "empty",
            Self::Unhealthy => "unhealthy",
            Self::SlowStart => "slow_start",
        }
    }
}

// === impl GateLimits ===

impl Default for GateLimits {
    fn default() -> Self {
        Self {
            in_flight: 1024,
            queue: 1024,
            queue_timeout: Duration::from_secs(1),
        }
    }
}

// === impl Transport ===

impl Default for Transport {
    /// HTTP/1.1 without TLS.
    fn default() -> Self {
        Self {
            protocol: UpstreamProtocol::Http1,
            tls: None,
            http1: Http1Policy::default(),
            http2: Http2Policy::default(),
            proxy_protocol: None,
            fingerprint: 0,
        }
    }
}

impl Default for Http1Policy {
    fn default() -> Self {
        Self {
            receive_buffer: Some(128 << 10),
        }
    }
}

impl Default for Http2Policy {
    fn default() -> Self {
        Self {
            max_requests: 100,
            stream_window: 256 << 10,
            connection_window: 16 << 20,
            send_buffer: 64 << 10,
            header_list: 32 << 10,
        }
    }
}

// === impl HeaderEdits ===

impl HeaderEdits {
    /// What it decides about.
    pub fn names(&self) -> impl Iterator<Item = &HeaderName> {
        let written = self.set.iter().chain(&self.add).map(|(name, _)| name);
        self.remove.iter().chain(written)
    }

    /// Applies the changes.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name.clone(), value.clone());
        }
    }
}

/// True when so few endpoints are usable that all of them get requests.
fn is_panic(usable: usize, all: usize, threshold: Ratio) -> bool {
    (usable as u64) * 1_000_000 < (all as u64) * u64::from(threshold.0)
}

fn less_loaded<'e>(one: &'e Arc<Endpoint>, other: &'e Arc<Endpoint>) -> &'e Arc<Endpoint> {
    std::cmp::min_by_key(one, other, |endpoint| endpoint.in_flight())
}

/// Two different positions below `count`, which is at least 2, both drawn from one die.
fn two_of(count: usize, die: u64) -> (usize, usize) {
    let scale = |half: u64, below: usize| ((half * below as u64) >> 32) as usize;
    let one = scale(die >> 32, count);
    let other = scale(die & 0xffff_ffff, count - 1);
    (one, if other >= one { other + 1 } else { other })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(backend: &Arc<str>, port: u16) -> EndpointKey {
        EndpointKey {
            backend: Arc::clone(backend),
            address: ([127, 0, 0, 1], port).into(),
            certified: None,
        }
    }

    fn backend(endpoints: u16) -> (Backend, Endpoints) {
        let mut known = Endpoints::default();
        let name: Arc<str> = "shop".into();
        let endpoints = (1..=endpoints)
            .map(|port| known.get_or_create(key(&name, port), false))
            .collect();
        let connections = ConnectionPolicy {
            connect_timeout: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(1),
            max_idle: 1,
            most: None,
        };
        let backend = Backend {
            gate: known.gate(&name),
            name,
            version: "1".into(),
            disabled: false,
            endpoints,
            request_headers: HeaderEdits::default(),
            response_headers: HeaderEdits::default(),
            connections,
            transport: Arc::default(),
            gate_limits: GateLimits {
                in_flight: 10_000,
                ..GateLimits::default()
            },
            health_check: None,
            outliers: None,
            slow_start: Duration::from_secs(10),
            panic_threshold: Ratio(500_000),
        };
        (backend, known)
    }

    fn choose(backend: &Backend, die: u64) -> Option<&Arc<Endpoint>> {
        backend.choose(backend.panic_threshold, die, Instant::now(), &[])
    }

    fn lease(backend: &Backend, die: u64) -> Lease {
        let pass = backend.gate.try_enter().unwrap();
        choose(backend, die).unwrap().lease(pass)
    }

    /// How often each endpoint is chosen in 10,000 draws.
    fn draws(backend: &Backend, now: Instant, failed: &[EndpointId]) -> Vec<usize> {
        let mut dice = fastrand::Rng::with_seed(1);
        let mut counts = vec![0; backend.endpoints.len()];
        for _ in 0..10_000 {
            let chosen = backend.choose(backend.panic_threshold, dice.u64(..), now, failed);
            let position = chosen.and_then(|chosen| {
                let mut all = backend.endpoints.iter();
                all.position(|endpoint| endpoint.id == chosen.id)
            });
            if let Some(position) = position {
                counts[position] += 1;
            }
        }
        counts
    }

    proptest! {
        #[test]
        fn two_choices_are_two_different_endpoints(count in 2_usize..1000, die in any::<u64>()) {
            let (one, other) = two_of(count, die);
            prop_assert!(one != other && one < count && other < count);
        }
    }

    #[test]
    fn every_pair_of_endpoints_is_drawn() {
        let mut dice = fastrand::Rng::with_seed(1);
        let pairs: std::collections::HashSet<_> =
            (0..1000).map(|_| two_of(4, dice.u64(..))).collect();
        assert_eq!(pairs.len(), 12);
    }

    #[test]
    fn the_less_loaded_of_two_is_chosen_and_a_lease_ends_with_its_owner() {
        let (backend, _) = backend(2);
        let first = lease(&backend, 0);
        let second = lease(&backend, 0);
        assert_ne!(first.endpoint().id, second.endpoint().id);
        drop((first, second));
        let in_flight = backend.endpoints.iter().map(|one| one.in_flight());
        assert_eq!(in_flight.sum::<usize>(), 0);
    }

    #[test]
    fn load_spreads_evenly_over_many_endpoints() {
        let (backend, _) = backend(10);
        let mut dice = fastrand::Rng::with_seed(1);
        let _leases: Vec<_> = (0..1000).map(|_| lease(&backend, dice.u64(..))).collect();
        for endpoint in &backend.endpoints {
            assert!(
                endpoint.in_flight().abs_diff(100) <= 3,
                "{}",
                endpoint.in_flight()
            );
        }
    }

    #[test]
    fn disabled_and_empty_backends_give_no_lease() {
        let (mut backend, _) = backend(1);
        assert!(backend.is_available());
        backend.disabled = true;
        assert!(choose(&backend, 0).is_none());
        assert_eq!(
            backend.unavailability(backend.panic_threshold),
            Some(Unavailability::Disabled)
        );
        backend.disabled = false;
        backend.endpoints.clear();
        assert!(choose(&backend, 0).is_none());
        assert_eq!(
            backend.unavailability(backend.panic_threshold),
            Some(Unavailability::Empty)
        );
    }

    #[test]
    fn endpoints_that_are_out_get_nothing_until_too_few_are_left() {
        let (backend, _) = backend(4);
        let now = Instant::now();
        backend.endpoints[0].impede(Impediment::Ejected);
        backend.endpoints[1].impede(Impediment::Unhealthy);
        let counts = draws(&backend, now, &[]);
        assert_eq!((counts[0], counts[1]), (0, 0));
        assert!(counts[2].abs_diff(5000) < 300, "{counts:?}");
        backend.endpoints[2].impede(Impediment::Ejected);
        let panic = draws(&backend, now, &[]);
        assert!(
            panic.iter().all(|count| count.abs_diff(2500) < 300),
            "{panic:?}"
        );
        assert!(backend.is_available());
    }

    #[test]
    fn new_endpoints_are_no_reason_to_panic_and_get_nothing_by_it() {
        let (backend, _) = backend(3);
        let now = Instant::now();
        for new in &backend.endpoints {
            new.impede(Impediment::Unchecked);
        }
        assert!(draws(&backend, now, &[]).iter().all(|count| *count > 0));
        backend.endpoints[0].relieve(Impediment::Unchecked, now);
        assert_eq!(draws(&backend, now, &[]), [10_000, 0, 0]);
        backend.endpoints[0].impede(Impediment::Ejected);
        assert_eq!(draws(&backend, now, &[]), [10_000, 0, 0]);
        backend.endpoints[1].relieve(Impediment::Unchecked, now);
        let counts = draws(&backend, now, &[]);
        assert_eq!(counts, [0, 10_000, 0]);
    }

    #[test]
    fn without_a_panic_threshold_a_backend_may_have_nobody_left() {
        for endpoints in [1, 3] {
            let (mut backend, _) = backend(endpoints);
            backend.panic_threshold = Ratio(0);
            for endpoint in &backend.endpoints {
                endpoint.impede(Impediment::Unchecked);
            }
            assert!(choose(&backend, 0).is_none());
            assert_eq!(
                backend.unavailability(backend.panic_threshold),
                Some(Unavailability::Unhealthy)
            );
            backend.endpoints[0].relieve(Impediment::Unchecked, Instant::now());
            let counts = draws(&backend, Instant::now(), &[]);
            assert_eq!(counts[0], 10_000);
        }
    }

    #[test]
    fn an_endpoint_that_has_failed_the_request_is_asked_again_only_if_there_is_no_other() {
        let (backend, _) = backend(3);
        let ids: Vec<EndpointId> = backend.endpoints.iter().map(|one| one.id).collect();
        let counts = draws(&backend, Instant::now(), &ids[..1]);
        assert_eq!(counts[0], 0);
        assert_eq!(draws(&backend, Instant::now(), &ids[..2])[2], 10_000);
        assert_eq!(
            draws(&backend, Instant::now(), &ids).iter().sum::<usize>(),
            10_000
        );
    }

    #[test]
    fn one_that_is_let_in_again_gets_its_part_by_and_by() {
        let (backend, _) = backend(2);
        let now = Instant::now();
        backend.endpoints[0].impede(Impediment::Ejected);
        backend.endpoints[0].relieve(Impediment::Ejected, now);
        let part = |seconds| draws(&backend, now + Duration::from_secs(seconds), &[])[0];
        // Both have nothing in flight: whoever stands first in a pair is taken.
        assert!(part(0) < 100, "{}", part(0));
        assert!((2000..3000).contains(&part(5)), "{}", part(5));
        assert!((4500..5500).contains(&part(10)), "{}", part(10));
    }

    #[test]
    fn a_backend_gets_its_part_by_and_by_where_no_endpoint_can_take_the_rest() {
        let (backend, _) = backend(2);
        let now = Instant::now();
        let let_in_again = |endpoint: &Endpoint| {
            endpoint.impede(Impediment::Ejected);
            endpoint.relieve(Impediment::Ejected, now);
        };
        let part = |seconds| backend.part(now + Duration::from_secs(seconds));
        let_in_again(&backend.endpoints[0]);
        assert!(part(0) >= 1.0);
        let_in_again(&backend.endpoints[1]);
        assert!(part(0) < 0.01 && part(11) >= 1.0);
        assert!((part(5) - 0.5).abs() < 0.01);
        backend.endpoints[0].impede(Impediment::Unhealthy);
        assert!((part(5) - 0.5).abs() < 0.01);
    }

    #[test]
    fn endpoints_live_on_as_long_as_they_are_current() {
        let (backend, mut known) = backend(2);
        let [kept, gone] = [0, 1].map(|position| backend.endpoints[position].id);
        known.retain(|endpoint| endpoint == kept);
        let name: Arc<str> = "shop".into();
        assert_eq!(known.get_or_create(key(&name, 1), false).id, kept);
        let another = known.get_or_create(key(&name, 2), false);
        assert_ne!(another.id, gone);
    }
}
