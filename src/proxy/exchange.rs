//! The record of one request, and its single end.

use std::sync::Arc;

use http::{Request, StatusCode};
use tokio::time::Instant;

use crate::routing::Reason;
use crate::snapshot::RouteTarget;
use crate::telemetry::metrics::{MethodLabel, Metrics, Protocol, TargetMetrics};

use super::error::client_gone;

/// Counts one request, whatever becomes of it: it is finished by being dropped, with its response
/// or without.
#[derive(Debug)]
pub struct Exchange {
    metrics: Arc<Metrics>,
    /// Whose part of the histograms it goes to.
    worker: usize,
    started: Instant,
    /// When a backend had been chosen.
    decided: Instant,
    method: MethodLabel,
    protocol: Protocol,
    /// What it counts for; for none before it is decided.
    target: Option<Arc<TargetMetrics>>,
    /// What the client is sent; `None` until something is.
    status: Option<StatusCode>,
}

// === impl Exchange ===

impl Exchange {
    /// Begins with the head of a request; it belongs to no route yet.
    pub fn begin<B>(metrics: &Arc<Metrics>, worker: usize, request: &Request<B>) -> Self {
        let started = Instant::now();
        Self {
            metrics: Arc::clone(metrics),
            worker,
            started,
            decided: started,
            method: MethodLabel::from(request.method()),
            protocol: Protocol::from(request.version()),
            target: None,
            status: None,
        }
    }

    /// When the head of the request stood.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// When it was decided which backend it goes to.
    pub fn decided_at(&self) -> Instant {
        self.decided
    }

    /// From now on it counts for this target.
    pub fn decided(&mut self, target: &RouteTarget, reason: Reason) {
        target.metrics.in_flight().rise();
        self.target = Some(Arc::clone(&target.metrics));
        self.decided = Instant::now();
        target.metrics.count_decision(&self.metrics, reason);
    }

    /// The head of the upstream's response is here.
    pub fn answered(&mut self, status: StatusCode) {
        if let Some(target) = &self.target {
            target.count_response_head(self.worker, self.decided.elapsed());
        }
        self.status = Some(status);
    }

    /// The client is sent a reply of our own.
    pub fn replied(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    /// The upstream brought no whole response.
    pub fn upstream_failed(&self, error: &'static str) {
        if let Some(target) = &self.target {
            target.count_upstream_error(&self.metrics, error);
        }
    }
}

impl Drop for Exchange {
    /// A client that went away before it was sent a status counts as 499, nginx's code for it.
    fn drop(&mut self) {
        let status = self.status.unwrap_or_else(client_gone);
        let target = self.target.as_ref().unwrap_or(self.metrics.unrouted());
        target.count_request(
            &self.metrics,
            self.worker,
            self.method,
            status,
            self.protocol,
            self.started.elapsed(),
        );
        if let Some(target) = &self.target {
            target.in_flight().fall();
        }
    }
}
