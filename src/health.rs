//! Takes endpoints out that are not well, and lets them in again: the one place that does.
//!
//! Two jobs on the control thread. [`Watch`] looks at what requests have counted, regularly, and at a
//! single endpoint when one of them raises the alarm for it; [`checks`] asks endpoints whose backends say so. Neither publishes
//! anything: an endpoint's state is read by every request that might go there.

pub mod checks;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::backend::outlier::{Cause, most_ejected, outliers};
use crate::backend::{Alarms, Backend, Endpoint, EndpointId, Impediment, OutlierPolicy};
use crate::snapshot::{Live, Snapshot};
use crate::telemetry::metrics::Metrics;

/// How often all endpoints are looked at: so much later than it may does an ejection end.
const TICK: Duration = Duration::from_millis(250);

/// Ejects endpoints for what requests say of them.
#[derive(Debug)]
pub struct Watch {
    live: Arc<Live>,
    metrics: Arc<Metrics>,
    alarms: Arc<Alarms>,
    /// When the endpoints of a backend are compared next.
    compared: HashMap<Arc<str>, Instant>,
}

// === impl Watch ===

impl Watch {
    /// Watches the endpoints of whatever snapshot is in force.
    pub fn new(live: Arc<Live>, metrics: Arc<Metrics>, alarms: Arc<Alarms>) -> Self {
        Self {
            live,
            metrics,
            alarms,
            compared: HashMap::new(),
        }
    }

    /// Watches for as long as it is polled.
    pub async fn run(mut self) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.look(&self.live.load(), Instant::now()),
                // There may be thousands of endpoints, and failures are many: only those are looked at.
                alarming = self.alarms.take() => {
                    let snapshot = self.live.load();
                    for endpoint in alarming {
                        self.look_at(endpoint, &snapshot, Instant::now());
                    }
                }
            }
        }
    }

    fn look(&mut self, snapshot: &Snapshot, now: Instant) {
        for backend in &snapshot.backends {
            readmit(backend, now);
            if let Some(policy) = &backend.outliers {
                self.compare(backend, policy, now);
            }
        }
        let names: HashSet<_> = snapshot.backends.iter().map(|one| &one.name).collect();
        self.compared.retain(|backend, _| names.contains(backend));
    }

    /// Looks at one that has failed too often in a row.
    fn look_at(&self, endpoint: EndpointId, snapshot: &Snapshot, now: Instant) {
        let Some(backend) = snapshot.backend_of(endpoint) else {
            return;
        };
        let mut endpoints = backend.endpoints.iter();
        let endpoint = endpoints.find(|one| one.id == endpoint);
        if let Some(endpoint) = endpoint.filter(|one| one.take_alarm())
            && let Some(policy) = &backend.outliers
        {
            self.eject(backend, endpoint, policy, Cause::Consecutive, now);
        }
    }

    fn compare(&mut self, backend: &Backend, policy: &OutlierPolicy, now: Instant) {
        let name = &backend.name;
        let due = self
            .compared
            .entry(Arc::clone(name))
            .or_insert(now + policy.interval);
        if now < *due {
            return;
        }
        *due = now + policy.interval;
        let samples: Vec<_> = backend
            .endpoints
            .iter()
            .map(|one| one.take_sample())
            .collect();
        for endpoint in &backend.endpoints {
            endpoint.forgive();
        }
        for (position, cause) in outliers(&samples, policy) {
            self.eject(backend, &backend.endpoints[position], policy, cause, now);
        }
    }

    fn eject(
        &self,
        backend: &Backend,
        endpoint: &Endpoint,
        policy: &OutlierPolicy,
        cause: Cause,
        now: Instant,
    ) {
        let is_ejected = |one: &&Arc<Endpoint>| one.is_impeded_by(Impediment::Ejected);
        let ejected = backend.endpoints.iter().filter(is_ejected).count();
        let may_be_ejected = most_ejected(backend.endpoints.len(), policy);
        if endpoint.is_impeded_by(Impediment::Ejected) || ejected >= may_be_ejected {
            return;
        }
        let length = endpoint.eject(now, policy);
        let labels = [("backend", &*backend.name), ("cause", cause.as_str())];
        let ejections = self.metrics.counter("serin_ejections_total", &labels);
        ejections.increment(1);
        warn!(
            backend = &*backend.name,
            endpoint = &*endpoint.authority,
            cause = cause.as_str(),
            for_ = ?length,
            "endpoint ejected"
        );
    }
}

/// Lets those in whose ejection is over, or that are not to be ejected any more.
fn readmit(backend: &Backend, now: Instant) {
    for endpoint in &backend.endpoints {
        endpoint.settle(now, backend.slow_start);
        let is_in = match backend.outliers {
            Some(_) => endpoint.readmit(now),
            None => endpoint.pardon(now),
        };
        if is_in {
            let (backend, endpoint) = (&*backend.name, &*endpoint.authority);
            info!(backend, endpoint, "endpoint gets requests again");
        }
    }
}
