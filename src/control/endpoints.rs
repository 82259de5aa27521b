//! What control does about endpoints that move: keeps what is known of names and files, and
//! publishes when it leads elsewhere.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{error, info, warn};

use crate::config::endpoints_file::LoadedEndpoints;
use crate::config::load::Loaded;
use crate::config::{self, Config};
use crate::discovery::{DnsName, Located, Locator, Names, Origin, Resolution, locate};
use crate::telemetry::metrics::Metrics;

use super::{Control, Status, seconds};

const RESOLUTIONS: &str = "serin_dns_resolutions_total";
const RESOLVED: &str = "serin_dns_last_success_timestamp_seconds";
const FILE_GAUGES: [&str; 2] = [FILE_SUCCESSFUL, FILE_LOADED];
const FILE_SUCCESSFUL: &str = "serin_endpoints_file_last_load_successful";
const FILE_LOADED: &str = "serin_endpoints_file_last_load_success_timestamp_seconds";

// === impl Control ===

impl Control {
    /// Takes over what was learnt of names; only a set that differs makes a snapshot.
    pub(super) async fn take_over_names(&mut self, resolved: Vec<(DnsName, Arc<Resolution>)>) {
        let status = self.board.load_full();
        let mut names = Names::clone(&status.names);
        let mut learnt = Names::new();
        let mut moved = false;
        for (name, resolution) in resolved {
            // It may have been configured away meanwhile.
            let Some(before) = names.get(&name) else {
                continue;
            };
            say_state(&name, before, &resolution);
            moved |= say_move(&name, before, &resolution);
            learnt.insert(name.clone(), Arc::clone(&resolution));
            names.insert(name, resolution);
        }
        count(&self.metrics, &status.loaded, &learnt);
        let names = Arc::new(names);
        let revision = match moved {
            true => Some(self.publish(&status.loaded, &names).await),
            false => None,
        };
        self.update(|status| {
            status.revision = revision.unwrap_or(status.revision);
            status.names = names;
        });
    }

    /// Takes over a file of endpoints, with what is known of the names that are new in it.
    pub(super) async fn take_over_endpoints(
        &mut self,
        path: &Path,
        endpoints: LoadedEndpoints,
        found: Names,
    ) {
        let status = self.board.load_full();
        let mut loaded = Loaded::clone(&status.loaded);
        if !loaded.endpoints_files.contains_key(path) {
            return;
        }
        let count = endpoints.locators().len();
        info!(file = %path.display(), endpoints = count, "file of endpoints taken over");
        loaded.endpoints_files.insert(path.to_owned(), endpoints);
        forget(&self.metrics, &status, &loaded);
        let loaded = Arc::new(loaded);
        let names = self.known_names(&loaded, found);
        let revision = self.publish(&loaded, &names).await;
        self.want(&loaded, &names);
        self.update(|status| {
            status.revision = revision;
            status.loaded = loaded;
            status.names = names;
            status.stale_endpoints.remove(path);
        });
    }

    /// Notes that a file of endpoints could not be read again.
    pub(super) fn keep_endpoints(&mut self, path: &Path, reason: &str) {
        let loaded = Arc::clone(&self.board.load().loaded);
        for backend in backends_of(&loaded.config, path) {
            error!(
                backend,
                "the file of endpoints {reason}; those read before stay"
            );
        }
        self.update(|status| {
            let reason = reason.to_owned();
            status.stale_endpoints.insert(path.to_owned(), reason);
        });
    }

    /// What is known of the names of a configuration: what was known before, and what was `found`
    /// of those that are new.
    pub(super) fn known_names(&self, loaded: &Loaded, found: Names) -> Arc<Names> {
        let before = Arc::clone(&self.board.load().names);
        merge_names(&self.metrics, loaded, &before, found)
    }

    /// Tells the job what is to be followed from now on.
    pub(super) fn want(&self, loaded: &Loaded, names: &Arc<Names>) {
        self.wanted.send_modify(|wanted| {
            wanted.settings = loaded.config.dns.clone();
            wanted.names = Arc::clone(names);
        });
    }

    /// Tells the job that somebody has asked for a reload.
    pub(super) fn hurry_names(&self) {
        self.wanted.send_modify(|wanted| wanted.reloads += 1);
    }
}

/// See [`Control::known_names`].
pub(super) fn merge_names(
    metrics: &Metrics,
    loaded: &Loaded,
    before: &Names,
    mut found: Names,
) -> Arc<Names> {
    found.retain(|name, _| !before.contains_key(name));
    for (name, known) in &found {
        say_state(name, &Resolution::default(), known);
    }
    count(metrics, loaded, &found);
    let known = |name: DnsName| {
        let known = before.get(&name).or_else(|| found.get(&name));
        let known = known.cloned().unwrap_or_default();
        (name, known)
    };
    Arc::new(names_of(loaded).into_iter().map(known).collect())
}

/// Every name that a configuration and its files of endpoints name.
pub(crate) fn names_of(loaded: &Loaded) -> HashSet<DnsName> {
    let files = loaded.endpoints_files.values();
    let in_files = files.flat_map(|file| file.locators());
    let in_files = in_files.filter_map(Locator::name).cloned();
    names_in(&loaded.config)
        .into_iter()
        .chain(in_files)
        .collect()
}

/// Every name that a configuration itself names.
pub(crate) fn names_in(config: &Config) -> HashSet<DnsName> {
    let locators = config.backends.iter().flat_map(|one| &one.endpoints);
    locators.filter_map(Locator::name).cloned().collect()
}

/// The endpoints of every backend in the order of the file.
pub(super) fn located(loaded: &Loaded, names: &Names) -> Vec<Vec<Located>> {
    let of = |backend| locate(locators_of(loaded, backend), names);
    loaded.config.backends.iter().map(of).collect()
}

/// As [`located`], for those who only want to ask: every name that is not resolved counts as one
/// endpoint, since it will be one when requests come.
pub(super) fn located_offline(loaded: &Loaded) -> Vec<Vec<Located>> {
    let somewhere = SocketAddr::from(([0, 0, 0, 0], 0));
    let assumed = |(locator, origin): (&Locator, Origin)| Located {
        address: match locator {
            Locator::Address(address) => *address,
            Locator::Name(_) => somewhere,
        },
        name: locator.name().cloned(),
        origin,
    };
    let of = |backend| locators_of(loaded, backend).map(assumed).collect();
    loaded.config.backends.iter().map(of).collect()
}

/// What stands for the endpoints of a backend.
pub(crate) fn locators_of<'l>(
    loaded: &'l Loaded,
    backend: &'l config::Backend,
) -> impl Iterator<Item = (&'l Locator, Origin)> {
    let file = backend.endpoints_file.as_ref();
    let in_file = file.and_then(|file| loaded.endpoints_files.get(file));
    let in_file = in_file.into_iter().flat_map(LoadedEndpoints::locators);
    let in_config = backend.endpoints.iter();
    in_config
        .map(|locator| (locator, Origin::Config))
        .chain(in_file.map(|locator| (locator, Origin::File)))
}

/// Shows names and files in metrics.
pub(super) fn show(metrics: &Metrics, status: &Status) {
    for backend in &status.loaded.config.backends {
        let labels = [("backend", &*backend.name)];
        if let Some(oldest) = last_success(status, backend) {
            metrics.gauge(RESOLVED, &labels).set(oldest);
        }
        let Some(path) = &backend.endpoints_file else {
            continue;
        };
        let is_fresh = !status.stale_endpoints.contains_key(path);
        let fresh = metrics.gauge(FILE_SUCCESSFUL, &labels);
        fresh.set(f64::from(u8::from(is_fresh)));
        if let Some(file) = status.loaded.endpoints_files.get(path) {
            metrics
                .gauge(FILE_LOADED, &labels)
                .set(seconds(file.loaded_at));
        }
    }
}

/// As `forget` in [`control`](super).
pub(super) fn forget(metrics: &Metrics, before: &Status, loaded: &Loaded) {
    let still = backends_by_name(&loaded.config);
    for backend in &before.loaded.config.backends {
        let after = still.get(&*backend.name);
        let mut gone = Vec::new();
        let keeps_file = after.is_some_and(|after| after.endpoints_file.is_some());
        if backend.endpoints_file.is_some() && !keeps_file {
            gone.extend(FILE_GAUGES);
        }
        let keeps_names = after.is_some_and(|after| has_names(loaded, after));
        if has_names(&before.loaded, backend) && !keeps_names {
            gone.push(RESOLVED);
        }
        for name in gone {
            metrics
                .gauge(name, &[("backend", &backend.name)])
                .set(f64::NAN);
        }
    }
}

fn has_names(loaded: &Loaded, backend: &config::Backend) -> bool {
    let mut locators = locators_of(loaded, backend);
    locators.any(|(locator, _)| locator.name().is_some())
}

/// When the name of this backend was resolved that waits for it longest; 0 for never, `None`
/// without names.
fn last_success(status: &Status, backend: &config::Backend) -> Option<f64> {
    locators_of(&status.loaded, backend)
        .filter_map(|(locator, _)| status.names.get(locator.name()?))
        .map(|known| known.resolved_at.map_or(0.0, seconds))
        .min_by(f64::total_cmp)
}

/// Counts attempts for the backends that they were made for.
fn count(metrics: &Metrics, loaded: &Loaded, attempts: &Names) {
    for backend in &loaded.config.backends {
        let names = locators_of(loaded, backend).filter_map(|(locator, _)| locator.name());
        let of_backend: HashSet<&DnsName> = names.collect();
        for attempt in of_backend.iter().filter_map(|name| attempts.get(*name)) {
            let result = attempt.outcome.as_str();
            let labels = [("backend", &*backend.name), ("result", result)];
            metrics.counter(RESOLUTIONS, &labels).increment(1);
        }
    }
}

/// Says so when a name begins to fail, or can be resolved again: not with every attempt.
fn say_state(name: &DnsName, before: &Resolution, after: &Resolution) {
    let stays = if after.addresses().is_empty() {
        "it has no endpoints until it can be resolved"
    } else {
        "its endpoints stay as they are"
    };
    match (before.problem(), after.problem()) {
        (None, Some(problem)) => warn!("`{name}` {problem}; {stays}"),
        (Some(_), None) => info!("`{name}` is resolved again"),
        _ => {}
    }
}

/// Says so when a name leads elsewhere than before, and whether it does.
fn say_move(name: &DnsName, before: &Resolution, after: &Resolution) -> bool {
    if before.addresses() == after.addresses() {
        return false;
    }
    let set = |known: &Resolution| known.addresses().iter().copied().collect::<BTreeSet<_>>();
    let (before, after) = (set(before), set(after));
    let list = |one: &BTreeSet<SocketAddr>, other: &BTreeSet<SocketAddr>| {
        let new: Vec<String> = one.difference(other).map(ToString::to_string).collect();
        new.join(",")
    };
    info!(
        %name,
        added = list(&after, &before),
        removed = list(&before, &after),
        "endpoints have moved"
    );
    true
}

fn backends_of<'c>(config: &'c Config, file: &Path) -> Vec<&'c str> {
    let all = config.backends.iter();
    let of_file = all.filter(|one| one.endpoints_file.as_deref() == Some(file));
    of_file.map(|one| &*one.name).collect()
}

fn backends_by_name(config: &Config) -> HashMap<&str, &config::Backend> {
    let all = config.backends.iter();
    all.map(|backend| (&*backend.name, backend)).collect()
}

// === impl Status ===

impl Status {
    /// Why this file of endpoints could not be read again, if that failed.
    pub fn stale_endpoints(&self, file: &PathBuf) -> Option<&str> {
        self.stale_endpoints.get(file).map(String::as_str)
    }
}
