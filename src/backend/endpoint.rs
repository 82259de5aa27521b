//! The servers of backends, as living state: what outlives snapshots.
//!
//! An endpoint counts what requests say of it and knows why it gets none. Who decides that is
//! [`health`](crate::health): requests only count, and raise an alarm when there is something to
//! decide, so that there is a single place where endpoints are taken out and let in again.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::gate::{Gate, GateLimits, Pass};
use super::outlier::{OutlierPolicy, Record, Sample, log_latency};

/// Names an endpoint for as long as the process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndpointId(u64);

/// One server of a backend.
#[derive(Debug)]
pub struct Endpoint {
    /// Its name within the process.
    pub id: EndpointId,
    /// Where it listens.
    pub address: SocketAddr,
    /// The same as text.
    pub authority: Box<str>,
    /// The name that its certificate must be for, where it follows from what it is named by.
    pub certified: Option<ServerName<'static>>,
    in_flight: AtomicUsize,
    /// That of its backend.
    gate: Arc<Gate>,
    /// Why it gets no requests: a bit for each [`Impediment`], and nearly always none.
    impediments: AtomicU8,
    /// When it was let in again, in milliseconds of its life and at least 1; 0 for long ago.
    readmitted: AtomicU64,
    born: Instant,
    tally: Tally,
    /// Here and not with whoever ejects, so that nothing is ejected of which nobody knows until when.
    /// No request touches it.
    record: Mutex<Record>,
    alarms: Arc<Alarms>,
}

/// Why an endpoint gets no requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Impediment {
    /// Its backend has health checks, and it has not passed one yet.
    Unchecked = 1,
    /// It does not pass them.
    Unhealthy = 2,
    /// It did badly with requests.
    Ejected = 4,
}

/// What requests say of an endpoint.
#[derive(Debug, Default)]
struct Tally {
    consecutive_failures: AtomicU32,
    /// At so many of them the alarm is raised; 0 for never.
    alarm_at: AtomicU32,
    /// It is raised, and nobody has looked yet.
    is_alarming: AtomicBool,
    requests: AtomicU32,
    failures: AtomicU32,
    log_latency: AtomicU64,
}

/// The right to send one request to an endpoint; counts as in flight, at it and at its backend,
/// until it is dropped.
#[derive(Debug)]
pub struct Lease {
    endpoint: Arc<Endpoint>,
}

/// All endpoints of the process by backend and address: what carries them from one snapshot to the
/// next.
#[derive(Debug, Default)]
pub struct Endpoints {
    known: HashMap<EndpointKey, Arc<Endpoint>>,
    gates: HashMap<Arc<str>, Arc<Gate>>,
    created: u64,
    alarms: Arc<Alarms>,
}

/// The endpoints that have failed too often in a row, and that nobody has looked at yet.
#[derive(Debug, Default)]
pub struct Alarms {
    raised: Mutex<Vec<EndpointId>>,
    /// Told when there is one.
    news: Notify,
}

/// What an endpoint is known by. With another name on its certificate, connections that stand say
/// nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointKey {
    /// Its backend.
    pub backend: Arc<str>,
    /// Where it listens.
    pub address: SocketAddr,
    /// The name that its certificate must be for, where it follows from what it is named by.
    pub certified: Option<ServerName<'static>>,
}

// === impl Endpoint ===

impl Endpoint {
    /// The right to send it one request, by a place in its backend.
    pub fn lease(self: &Arc<Self>, pass: Pass<'_>) -> Lease {
        // From here on the lease owes the place back.
        pass.hand_on();
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Lease {
            endpoint: Arc::clone(self),
        }
    }

    /// Requests sent to it whose response has not ended.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// True when nothing speaks against sending it requests.
    pub fn is_usable(&self) -> bool {
        self.impediments.load(Ordering::Relaxed) == 0
    }

    /// True when it gets its full part of the requests; most of the time it does, and this is quick.
    pub(super) fn is_settled(&self) -> bool {
        self.is_usable() && self.readmitted.load(Ordering::Relaxed) == 0
    }

    /// The part of its requests that it gets at `now`, from 0 to 1, growing with time since it was let
    /// in again.
    pub(super) fn part(&self, now: Instant, slow_start: Duration) -> f64 {
        match self.readmitted.load(Ordering::Relaxed) {
            0 => 1.0,
            _ if slow_start.is_zero() => 1.0,
            since => {
                let age = self.age(now).saturating_sub(since) as f64 / 1e3;
                (age / slow_start.as_secs_f64().max(1e-3)).min(1.0)
            }
        }
    }

    /// Why it gets no requests.
    pub fn impediments(&self) -> impl Iterator<Item = Impediment> {
        let bits = self.impediments.load(Ordering::Relaxed);
        Impediment::ALL
            .into_iter()
            .filter(move |one| bits & *one as u8 != 0)
    }

    /// True for one reason why it gets none.
    pub fn is_impeded_by(&self, impediment: Impediment) -> bool {
        self.impediments.load(Ordering::Relaxed) & impediment as u8 != 0
    }

    /// From now on it gets no requests for this reason; those that it has go on.
    pub fn impede(&self, impediment: Impediment) {
        self.impediments
            .fetch_or(impediment as u8, Ordering::Relaxed);
    }

    /// This is no reason any more; when it was the last one, requests come back by and by.
    pub fn relieve(&self, impediment: Impediment, now: Instant) {
        let bit = impediment as u8;
        let before = self.impediments.fetch_and(!bit, Ordering::Relaxed);
        if before == bit && impediment != Impediment::Unchecked {
            self.readmitted
                .store(self.age(now).max(1), Ordering::Relaxed);
        }
    }

    /// Takes it out for what requests say of it, and says for how long.
    pub fn eject(&self, now: Instant, policy: &OutlierPolicy) -> Duration {
        let length = self.record().eject(now, policy);
        self.impede(Impediment::Ejected);
        length
    }

    /// Lets it in again once its ejection is over; true if that is now.
    pub fn readmit(&self, now: Instant) -> bool {
        let is_over = self.is_impeded_by(Impediment::Ejected) && self.record().ends(now);
        if is_over {
            self.let_in(now);
        }
        is_over
    }

    /// Lets it in again though its ejection is not over; true if it had one.
    pub fn pardon(&self, now: Instant) -> bool {
        let is_ejected = self.is_impeded_by(Impediment::Ejected);
        if is_ejected {
            self.record().pardon();
            self.let_in(now);
        }
        is_ejected
    }

    /// What was still in flight when it was ejected has failed since, and must not eject it again.
    fn let_in(&self, now: Instant) {
        let failures = &self.tally.consecutive_failures;
        failures.store(0, Ordering::Relaxed);
        self.relieve(Impediment::Ejected, now);
    }

    /// It has got through an interval: one of its ejections is forgotten.
    pub fn forgive(&self) {
        self.record().forgive();
    }

    /// It was let in again long ago.
    pub fn settle(&self, now: Instant, slow_start: Duration) {
        if self.part(now, slow_start) >= 1.0 {
            self.readmitted.store(0, Ordering::Relaxed);
        }
    }

    /// The alarm is raised at so many failures in a row; `None` for never.
    pub fn alarm_at(&self, failures: Option<u32>) {
        let at = failures.unwrap_or(0);
        if self.tally.alarm_at.load(Ordering::Relaxed) != at {
            self.tally.alarm_at.store(at, Ordering::Relaxed);
        }
    }

    /// Somebody looks because of the alarm: true when it has failed so often in a row; counting then
    /// begins anew.
    pub fn take_alarm(&self) -> bool {
        self.tally.is_alarming.store(false, Ordering::Relaxed);
        let at = self.tally.alarm_at.load(Ordering::Relaxed);
        let failures = &self.tally.consecutive_failures;
        let is_raised = at > 0 && failures.load(Ordering::Relaxed) >= at;
        if is_raised {
            failures.store(0, Ordering::Relaxed);
        }
        is_raised
    }

    /// What has been counted since the last time.
    pub fn take_sample(&self) -> Sample {
        // A request that is being counted may be in one of them and not in the other yet.
        let failures = self.tally.failures.swap(0, Ordering::Relaxed);
        let requests = self.tally.requests.swap(0, Ordering::Relaxed);
        Sample {
            requests,
            failures: failures.min(requests),
            log_latency: self.tally.log_latency.swap(0, Ordering::Relaxed),
        }
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn age(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.born).as_millis() as u64
    }
}

// === impl Impediment ===

impl Impediment {
    const ALL: [Self; 3] = [Self::Unchecked, Self::Unhealthy, Self::Ejected];

    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unchecked => "unchecked",
            Self::Unhealthy => "unhealthy",
            Self::Ejected => "ejected",
        }
    }
}

// === impl Lease ===

impl Lease {
    /// Where the request goes.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// The same place at the backend, for a request that goes to another one of its endpoints now.
    pub fn moved_to(mut self, endpoint: &Arc<Endpoint>) -> Self {
        debug_assert!(Arc::ptr_eq(&self.endpoint.gate, &endpoint.gate));
        endpoint.in_flight.fetch_add(1, Ordering::Relaxed);
        self.endpoint.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.endpoint = Arc::clone(endpoint);
        self
    }

    /// The endpoint has answered after so long.
    pub fn answered(&self, latency: Duration) {
        let tally = &self.endpoint.tally;
        // Written only when it changes, since all workers share it.
        if tally.consecutive_failures.load(Ordering::Relaxed) != 0 {
            tally.consecutive_failures.store(0, Ordering::Relaxed);
        }
        tally.requests.fetch_add(1, Ordering::Relaxed);
        tally
            .log_latency
            .fetch_add(log_latency(latency), Ordering::Relaxed);
    }

    /// It has not answered, which may not be its fault. That counts where endpoints are compared with each
    /// other, but is none of the failures in a row that alone eject one.
    pub fn fell_short(&self) {
        let tally = &self.endpoint.tally;
        tally.requests.fetch_add(1, Ordering::Relaxed);
        tally.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// The endpoint has failed: it could not be reached, did not answer as it should or in time, or
    /// said that it cannot.
    pub fn failed(&self) {
        self.fell_short();
        let tally = &self.endpoint.tally;
        let failures = tally.consecutive_failures.fetch_add(1, Ordering::Relaxed) + 1;
        let alarm_at = tally.alarm_at.load(Ordering::Relaxed);
        if alarm_at > 0 && failures >= alarm_at && !tally.is_alarming.swap(true, Ordering::Relaxed)
        {
            self.endpoint.alarms.raise(self.endpoint.id);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.endpoint.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.endpoint.gate.leave();
    }
}

// === impl Endpoints ===

impl Endpoints {
    /// The endpoint with this key, the living one where there is one. A new one of a backend that
    /// `has_checks` has to pass one first.
    pub fn get_or_create(&mut self, key: EndpointKey, has_checks: bool) -> Arc<Endpoint> {
        let gate = self.gate(&key.backend);
        let (created, alarms) = (&mut self.created, &self.alarms);
        let (address, certified) = (key.address, key.certified.clone());
        let endpoint = self.known.entry(key).or_insert_with(|| {
            *created += 1;
            let impediments = if has_checks {
                Impediment::Unchecked as u8
            } else {
                0
            };
            Arc::new(Endpoint {
                id: EndpointId(*created),
                address,
                authority: address.to_string().into(),
                certified,
                in_flight: AtomicUsize::new(0),
                gate,
                impediments: AtomicU8::new(impediments),
                readmitted: AtomicU64::new(0),
                born: Instant::now(),
                tally: Tally::default(),
                record: Mutex::default(),
                alarms: Arc::clone(alarms),
            })
        });
        Arc::clone(endpoint)
    }

    /// The gate of a backend, the living one where there is one.
    pub fn gate(&mut self, backend: &Arc<str>) -> Arc<Gate> {
        let anew = || Arc::new(Gate::new(GateLimits::default().in_flight));
        Arc::clone(self.gates.entry(Arc::clone(backend)).or_insert_with(anew))
    }

    /// Those that have failed too often in a row.
    pub fn alarms(&self) -> Arc<Alarms> {
        Arc::clone(&self.alarms)
    }

    /// Forgets the endpoints that are not current, and the gates that only this map still knows.
    ///
    /// An endpoint that leaves lives on with its last request or with whoever still has a snapshot
    /// that names it. One that comes back is a new one all the same: nobody has followed the old one
    /// meanwhile, so what is held of it says nothing. The requests that the old one still has keep its
    /// gate, and count for its backend.
    pub fn retain(&mut self, is_current: impl Fn(EndpointId) -> bool) {
        self.known.retain(|_, endpoint| is_current(endpoint.id));
        self.gates.retain(|_, gate| Arc::strong_count(gate) > 1);
    }
}

// === impl Alarms ===

impl Alarms {
    /// Waits until there are any, and takes them.
    pub async fn take(&self) -> Vec<EndpointId> {
        loop {
            let raised = std::mem::take(&mut *self.raised());
            if !raised.is_empty() {
                return raised;
            }
            self.news.notified().await;
        }
    }

    fn raise(&self, endpoint: EndpointId) {
        self.raised().push(endpoint);
        self.news.notify_one();
    }

    fn raised(&self) -> MutexGuard<'_, Vec<EndpointId>> {
        self.raised.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(has_checks: bool) -> Arc<Endpoint> {
        let key = EndpointKey {
            backend: "shop".into(),
            address: ([127, 0, 0, 1], 1).into(),
            certified: None,
        };
        Endpoints::default().get_or_create(key, has_checks)
    }

    fn lease(endpoint: &Arc<Endpoint>) -> Lease {
        endpoint.lease(endpoint.gate.try_enter().unwrap())
    }

    #[test]
    fn every_reason_must_be_gone_before_requests_come_back_by_and_by() {
        let one = endpoint(false);
        let now = one.born;
        let slow_start = Duration::from_secs(10);
        one.impede(Impediment::Ejected);
        one.impede(Impediment::Unhealthy);
        one.relieve(Impediment::Ejected, now);
        assert!(!one.is_usable());
        one.relieve(Impediment::Unhealthy, now);
        assert!(one.is_usable() && !one.is_settled());
        let after = |seconds| one.part(now + Duration::from_secs(seconds), slow_start);
        assert!(after(0) < 0.01 && after(11) >= 1.0);
        assert!((after(5) - 0.5).abs() < 0.01);
        one.settle(now + Duration::from_secs(5), slow_start);
        assert!(!one.is_settled());
        one.settle(now + Duration::from_secs(11), slow_start);
        assert!(one.is_settled());
    }

    #[test]
    fn a_new_endpoint_with_checks_waits_for_its_first_and_then_gets_its_full_part() {
        let new = endpoint(true);
        assert!(!new.is_usable());
        new.relieve(Impediment::Unchecked, new.born);
        assert!(new.is_settled());
    }

    #[tokio::test]
    async fn failures_in_a_row_raise_the_alarm_and_one_answer_begins_anew() {
        let one = endpoint(false);
        one.alarm_at(Some(3));
        for _ in 0..2 {
            lease(&one).failed();
        }
        lease(&one).answered(Duration::from_millis(1));
        for _ in 0..2 {
            lease(&one).failed();
        }
        assert!(!one.take_alarm());
        for _ in 0..3 {
            lease(&one).failed();
        }
        // However often it has failed, there is one to be looked at.
        assert_eq!(one.alarms.take().await, [one.id]);
        assert!(one.take_alarm() && !one.take_alarm());
        for _ in 0..3 {
            lease(&one).failed();
        }
        assert_eq!(one.alarms.take().await, [one.id]);
        let sample = one.take_sample();
        assert_eq!((sample.requests, sample.failures), (11, 10));
        assert_eq!(one.take_sample(), Sample::default());
    }

    #[test]
    fn what_was_pardoned_is_forgiven_like_everything_else() {
        let one = endpoint(false);
        let policy = OutlierPolicy {
            consecutive: None,
            interval: Duration::from_secs(10),
            ejection: Duration::from_secs(30),
            longest_ejection: Duration::from_secs(300),
            most_ejected: crate::routing::split::Ratio(1_000_000),
            least_requests: 100,
            failure_excess: None,
            latency_factor: None,
        };
        one.eject(one.born, &policy);
        assert!(!one.readmit(one.born) && one.pardon(one.born));
        assert!(one.is_usable() && !one.pardon(one.born));
        one.forgive();
        assert_eq!(*one.record(), Record::default());
    }

    #[test]
    fn a_sample_has_no_more_failures_than_requests() {
        let one = endpoint(false);
        // Its request was in the sample before.
        one.tally.failures.store(1, Ordering::Relaxed);
        let sample = one.take_sample();
        assert_eq!((sample.requests, sample.failures), (0, 0));
    }

    #[test]
    fn one_that_comes_back_is_new_but_counts_for_its_backend_as_before() {
        let mut known = Endpoints::default();
        let key = EndpointKey {
            backend: "shop".into(),
            address: ([127, 0, 0, 1], 1).into(),
            certified: None,
        };
        let old = known.get_or_create(key.clone(), true);
        let lease = lease(&old);
        old.relieve(Impediment::Unchecked, old.born);
        old.impede(Impediment::Ejected);
        known.retain(|_| false);
        let new = known.get_or_create(key, true);
        assert_ne!(new.id, old.id);
        let impediments: Vec<_> = new.impediments().collect();
        assert_eq!(impediments, [Impediment::Unchecked]);
        assert_eq!((new.in_flight(), new.gate.inside()), (0, 1));
        drop(lease);
        assert_eq!(new.gate.inside(), 0);
    }

    #[test]
    fn a_lease_counts_at_the_endpoint_and_at_its_backend() {
        let one = endpoint(false);
        let lease = lease(&one);
        assert_eq!((one.in_flight(), one.gate.inside()), (1, 1));
        drop(lease);
        assert_eq!((one.in_flight(), one.gate.inside()), (0, 0));
    }
}
