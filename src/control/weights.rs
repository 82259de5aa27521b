//! What control does about weights that are set at run time: sets them, and has them outlive the process.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout_at};
use tracing::{error, info, warn};

use crate::config::Config;
use crate::server::Phase;
use crate::telemetry::metrics::Metrics;
use crate::weights::state::{self, Unwritten};
use crate::weights::{RuntimeWeights, SetWeights, Tag, Weights, checked, configured};

use super::{Control, Status};

/// What the log calls who has changed what.
pub const AUDIT: &str = "serin::audit";

/// How long somebody waits to hear that what he has set outlives the process. It is in force already.
const SAVE_LIMIT: Duration = Duration::from_secs(2);

/// How soon saving is tried again.
const SAVE_AGAIN: Duration = Duration::from_secs(10);

const SET: &str = "serin_route_weights_set";

/// What somebody wants the weights of a route to be.
#[derive(Clone, Debug)]
pub struct WeightsOrder {
    /// The route.
    pub route: String,
    /// The weight of each backend; `None` for what the file says.
    pub weights: Option<BTreeMap<String, u64>>,
    /// Only if what is in force is one of these; `None` for whatever is.
    pub expected: Option<Vec<String>>,
    /// Who wants it.
    pub by: String,
    /// From where.
    pub address: SocketAddr,
    /// Why, if he says so.
    pub reason: Option<String>,
}

/// Why weights are not set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such route.
    UnknownRoute,
    /// Something else is in force than expected.
    Changed,
    /// They do not fit the route; why not.
    Unusable(String),
}

/// Whether the weights that are set outlive the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saved {
    /// The configuration names no file for them.
    Nowhere,
    /// They do.
    Yes,
    /// They do not, and why.
    No(String),
}

// === impl Saved ===

impl Saved {
    /// Before it was tried.
    pub(super) fn not_yet(config: &Config) -> Self {
        match config.state_file {
            None => Self::Nowhere,
            Some(_) => Self::No("not yet".to_owned()),
        }
    }
}

// === impl Control ===

impl Control {
    /// Sets the weights of a route, or leaves it to the file. They are in force when this ends.
    pub(super) async fn set_weights(&mut self, order: WeightsOrder) -> Result<(), Refusal> {
        let (route, by, address) = (order.route.clone(), order.by.clone(), order.address);
        let set = self.obey(order).await;
        if let Err(refusal) = &set {
            warn!(target: AUDIT, route, by, %address, ?refusal, "weights not set");
        }
        set
    }

    async fn obey(&mut self, order: WeightsOrder) -> Result<(), Refusal> {
        let WeightsOrder {
            route,
            weights: wanted,
            expected,
            by,
            address,
            reason,
        } = order;
        let loaded = Arc::clone(&self.board.load().loaded);
        let over = configured(&loaded.config, &route).ok_or(Refusal::UnknownRoute)?;
        let before = self.weights.of(&route);
        let tag = Tag::of(&over, before).to_string();
        if expected.is_some_and(|tags| !tags.contains(&tag)) {
            return Err(Refusal::Changed);
        }
        let wanted = wanted.map(|weights| checked(&weights, &over));
        let wanted = wanted.transpose().map_err(Refusal::Unusable)?;
        let was = before.map(|set| set.weights.clone());
        let why = reason.as_deref().unwrap_or_default();
        if wanted == was {
            info!(target: AUDIT, route, by, %address, why, "weights are so already");
            return Ok(());
        }
        let from = shown(was.as_ref().unwrap_or(&over));
        let to = shown(wanted.as_ref().unwrap_or(&over));
        let source = if wanted.is_some() { "api" } else { "file" };
        info!(target: AUDIT, route, by, %address, from, to, source, why, "weights set");

        let mut weights = RuntimeWeights::clone(&self.weights);
        match wanted {
            None => weights.unset(&route),
            Some(wanted) => {
                let set = SetWeights {
                    weights: wanted,
                    over,
                    by,
                    at: SystemTime::now(),
                    reason,
                };
                weights.set(route.into(), set);
            }
        }
        self.replace_weights(weights);
        let names = Arc::clone(&self.board.load().names);
        let revision = self.publish(&loaded, &names).await;
        self.update(|status| {
            status.revision = revision;
            status.saved = Saved::not_yet(&loaded.config);
        });
        self.save().await;
        Ok(())
    }

    /// Drops what was set of routes of which the file says something else now; true if there was any.
    pub(super) fn yield_weights(&mut self, config: &Config) -> bool {
        let mut weights = RuntimeWeights::clone(&self.weights);
        let are_less = !yielded(&mut weights, config).is_empty();
        if are_less {
            self.replace_weights(weights);
        }
        are_less
    }

    /// Saves what is set where the configuration says now, if anything has changed.
    pub(super) async fn follow_state_file(&mut self, before: &Config, have_weights_changed: bool) {
        let has_moved = before.state_file != self.board.load().loaded.config.state_file;
        if has_moved || have_weights_changed {
            self.save().await;
        }
    }

    /// Begins to serve: what was set meanwhile, in the process before, is in force from now on, and is saved from
    /// here.
    pub(super) async fn begin_weights(&mut self) {
        let status = self.board.load_full();
        let Some(file) = &status.loaded.config.state_file else {
            return;
        };
        if let Ok(mut weights) = state::read(file) {
            yielded(&mut weights, &status.loaded.config);
            if weights != *self.weights {
                self.replace_weights(weights);
                let revision = self.publish(&status.loaded, &status.names).await;
                self.update(|status| status.revision = revision);
            }
        }
        self.save().await;
    }

    /// Has what is set outlive the process, as soon as the disk takes it. Before it serves, the file is that of the
    /// process before, if there is one.
    pub(super) async fn save(&mut self) {
        self.save_at = None;
        let loaded = Arc::clone(&self.board.load().loaded);
        let Some(file) = &loaded.config.state_file else {
            return self.update(|status| status.saved = Saved::Nowhere);
        };
        if self.phase < Phase::Serving {
            return;
        }
        let saved = match self.written(file).await {
            Ok(()) => Saved::Yes,
            Err(reason) => Saved::No(reason),
        };
        let was_unsaved = self.board.load().saved != Saved::Yes;
        if let Saved::No(reason) = &saved {
            self.save_at = Some(Instant::now() + SAVE_AGAIN);
            error!(file = %file.display(), reason, "weights that are set would not outlive the process");
        } else if was_unsaved {
            info!(file = %file.display(), "weights that are set outlive the process");
        }
        self.update(|status| status.saved = saved);
    }

    /// Writes what is set. A disk that hangs has one thread, and not one for each attempt.
    async fn written(&mut self, file: &Path) -> Result<(), String> {
        let deadline = Instant::now() + SAVE_LIMIT;
        let too_long = || format!("it takes longer than {SAVE_LIMIT:?}");
        if let Some(mut before) = self.writing.take()
            && timeout_at(deadline, &mut before).await.is_err()
        {
            self.writing = Some(before);
            return Err(too_long());
        }
        let unwritten = Unwritten::new(file, &self.weights);
        let mut writing = tokio::task::spawn_blocking(|| unwritten.write());
        match timeout_at(deadline, &mut writing).await {
            Ok(written) => written.unwrap_or_else(|panicked| Err(panicked.to_string())),
            Err(_) => {
                self.writing = Some(writing);
                Err(too_long())
            }
        }
    }

    fn replace_weights(&mut self, weights: RuntimeWeights) {
        let before = std::mem::replace(&mut self.weights, Arc::new(weights));
        for (route, _) in before.iter() {
            if self.weights.of(route).is_none() {
                self.metrics.gauge(SET, &[("route", route)]).set(0.0);
            }
        }
    }
}

/// Takes out what was set of routes of which the file says something else now, and gives their names.
pub(super) fn yielded(weights: &mut RuntimeWeights, config: &Config) -> Vec<Arc<str>> {
    let yielded = weights.yield_to(config);
    for route in &yielded {
        warn!(target: AUDIT, %route, "the file says something else of this route now: weights that were set are gone");
    }
    yielded
}

/// Shows them in metrics.
pub(super) fn show(metrics: &Metrics, status: &Status) {
    for (route, _) in status.weights.iter() {
        metrics.gauge(SET, &[("route", route)]).set(1.0);
    }
    let saved = match status.saved {
        Saved::Nowhere => f64::NAN,
        Saved::Yes => 1.0,
        Saved::No(_) => 0.0,
    };
    metrics.gauge("serin_state_saved", &[]).set(saved);
}

/// `shop-canary=5 shop-stable=95`
fn shown(weights: &Weights) -> String {
    let weights = weights.iter();
    let shown: Vec<_> = weights
        .map(|(name, weight)| format!("{name}={weight}"))
        .collect();
    shown.join(" ")
}
