//! Takes endpoints out that are not well, and lets them in again: the one place that does.
//!
//! Two jobs on the control thread. [`Watch`] looks at what requests have counted, regularly, and at a
//! single endpoint when one of them raises the alarm for it; [`checks`] asks endpoints whose backends
//! say so. Neither publishes anything: an endpoint's state is read by every request that might go there.

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
            match &backend.outliers {
                Some(policy) => self.compare(backend, policy, now),
                None => drop(self.compared.remove(&backend.name)),
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
        let due = self.compared.get(&backend.name).copied();
        if due.is_some_and(|due| now < due) {
            return;
        }
        let next = now + policy.interval;
        self.compared.insert(Arc::clone(&backend.name), next);
        let endpoints = backend.endpoints.iter();
        let samples: Vec<_> = endpoints.map(|one| one.take_sample()).collect();
        // What was counted while nobody compared may be hours old.
        if due.is_none() {
            return;
        }
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::load::{load_list, load_text};
    use crate::control::offline_snapshot;

    use super::*;

    const CONFIG: &str = "
listeners: [ { name: web, address: '127.0.0.1:0' } ]
backends: [ { name: shop, version: '1', endpoints: ['127.0.0.1:1', '127.0.0.1:2'] } ]
routes: [ { name: shop, backendRefs: [ { name: shop } ] } ]
";

    fn watch() -> Watch {
        let loaded = load_text(Path::new("serin.yaml"), CONFIG, &mut load_list).unwrap();
        let live = Live::new(offline_snapshot(&loaded));
        let metrics = Arc::new(Metrics::new(&[], 1));
        Watch::new(live, metrics, Arc::default())
    }

    /// The first endpoint fails so often, while the other one answers.
    fn count(backend: &Backend, requests: usize) {
        let lease = |position: usize| {
            let pass = backend.gate.try_enter().unwrap();
            backend.endpoints[position].lease(pass)
        };
        for _ in 0..requests {
            lease(0).failed();
            lease(1).answered(Duration::from_millis(1));
        }
    }

    #[test]
    fn what_was_counted_while_nobody_compared_is_not_judged() {
        let mut watch = watch();
        let snapshot = watch.live.load();
        let backend = &snapshot.backends[0];
        let is_ejected = || backend.endpoints[0].is_impeded_by(Impediment::Ejected);
        let interval = backend.outliers.unwrap().interval;
        let start = Instant::now();
        count(backend, 1000);
        watch.look(&snapshot, start);
        watch.look(&snapshot, start + interval);
        assert!(!is_ejected());
        count(backend, 1000);
        watch.look(&snapshot, start + interval);
        assert!(!is_ejected());
        watch.look(&snapshot, start + interval * 2);
        assert!(is_ejected());
    }

    #[test]
    fn an_alarm_is_about_one_endpoint() {
        let watch = watch();
        let snapshot = watch.live.load();
        let backend = &snapshot.backends[0];
        count(backend, 10);
        let now = Instant::now();
        let [failing, fine] = [0, 1].map(|position| &backend.endpoints[position]);
        watch.look_at(fine.id, &snapshot, now);
        assert!(failing.is_usable() && fine.is_usable());
        watch.look_at(failing.id, &snapshot, now);
        assert!(!failing.is_usable() && fine.is_usable());
    }
}
