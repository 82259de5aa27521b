//! The single writer: whatever changes at run time comes here as a [`Change`], is compiled and
//! published, or refused whole.
//!
//! Nothing else may publish a snapshot, so there is no question of which of two changes came first,
//! and what the status page says is what is in force.

pub(crate) mod endpoints;
pub mod weights;

use std::collections::{HashMap, HashSet};
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use crate::backend::Alarms;
use crate::config::document::{Node, Path, Span};
use crate::config::endpoints_file::LoadedEndpoints;
use crate::config::load::{Loaded, LoadedList};
use crate::config::{Config, ListSource, Problem, Problems, Workers};
use crate::discovery::job::Wanted;
use crate::discovery::{DnsName, Names, Resolution};
use crate::history::Recorder;
use crate::routing::UserList;
use crate::server::acceptor::Acceptor;
use crate::server::sockets::Sockets;
use crate::server::{self, BoundSocket, DrainingListener, OpenListener, Phase};
use crate::snapshot::{Live, Living, Revision, Snapshot, Sources, compile};
use crate::telemetry::access_log::{AccessLog, Output, Sinks};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::{Exporters, Tracer};
use crate::weights::{RuntimeWeights, state};

use weights::{Refusal, Saved, WeightsOrder};

/// Something that changes what is served.
#[derive(Debug)]
pub enum Change {
    /// The configuration was read again: take it over, or note why it cannot be used.
    Config {
        /// What reading it gave.
        loaded: Result<Box<Loaded>, Problems>,
        /// What was found of the names of endpoints that are new in it.
        names: Names,
        /// Why it was read again.
        occasion: Occasion,
        /// Told what became of it.
        reply: Option<oneshot::Sender<Result<Revision, Problems>>>,
    },
    /// A user list was read again.
    UserList {
        /// Which one.
        source: ListSource,
        /// What reading it gave.
        loaded: Result<LoadedList, String>,
    },
    /// Names of endpoints were asked for again.
    Endpoints {
        /// What is known of them now.
        resolved: Vec<(DnsName, Arc<Resolution>)>,
    },
    /// A file of endpoints was read again.
    EndpointsFile {
        /// Which one.
        path: PathBuf,
        /// What reading it gave.
        loaded: Result<LoadedEndpoints, String>,
        /// What was found of the names that are new in it.
        names: Names,
    },
    /// Somebody wants other weights for a route.
    Weights {
        /// Which ones.
        order: WeightsOrder,
        /// Told what became of it.
        reply: oneshot::Sender<Result<(), Refusal>>,
    },
    /// Watching files for changes failed, or works again.
    Watching(Watching),
}

/// Why a configuration was read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// Somebody asked for it.
    Asked,
    /// A file has changed.
    Noticed,
    /// It was refused before: the same refusal is no news.
    Retried,
}

/// How file changes are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watching {
    /// The kernel tells, and polling makes sure.
    Events,
    /// By polling alone.
    Polling,
    /// Not at all: the configuration is built in.
    Nothing,
}

/// What is in force and what became of the last attempt to change it.
#[derive(Clone, Debug)]
pub struct Status {
    /// The snapshot in force.
    pub revision: Revision,
    /// The configuration in force.
    pub loaded: Arc<Loaded>,
    /// When it was taken over.
    pub taken_over_at: SystemTime,
    /// When somebody last tried to change it.
    pub last_attempt_at: SystemTime,
    /// Why that failed, if it did.
    pub refused: Option<Arc<Problems>>,
    /// What the file says that only a restart can change.
    pub restart_required: Vec<&'static str>,
    /// Lists whose file could not be read again, and why; the ids read before stay in force.
    pub stale_lists: HashMap<ListSource, String>,
    /// What is known of the names of endpoints.
    pub names: Arc<Names>,
    /// Files of endpoints that could not be read again, and why; those read before stay in force.
    pub stale_endpoints: HashMap<PathBuf, String>,
    /// Weights that are set over those of the file.
    pub weights: Arc<RuntimeWeights>,
    /// Whether they outlive the process.
    pub saved: Saved,
    /// How file changes are noticed.
    pub watching: Watching,
}

/// The current status, for everybody to read.
pub type StatusBoard = Arc<ArcSwap<Status>>;

/// The single writer.
#[derive(Debug)]
pub struct Control {
    live: Arc<Live>,
    metrics: Arc<Metrics>,
    living: Living,
    listeners: Vec<OpenListener>,
    /// Those that are no longer configured, until their last connection has ended.
    draining: Vec<DrainingListener>,
    /// What new listeners begin with.
    phase: Phase,
    phases: watch::Receiver<Phase>,
    sockets: Arc<Sockets>,
    access_log: Option<Arc<AccessLog>>,
    tracer: Option<Arc<Tracer>>,
    exporters: Arc<Exporters>,
    history: Recorder,
    sinks: Arc<Sinks>,
    /// What the process started with and cannot change.
    fixed: Fixed,
    board: StatusBoard,
    /// Weights that are set over those of the file.
    weights: Arc<RuntimeWeights>,
    /// The last attempt to have them outlive the process, while it hangs.
    writing: Option<JoinHandle<Result<(), String>>>,
    /// When that is tried again.
    save_at: Option<Instant>,
    /// What the job of discovery is to follow.
    wanted: watch::Sender<Wanted>,
}

/// How often a replaced snapshot is asked whether it is still in use.
const RETIREMENT_TICK: Duration = Duration::from_millis(200);

const NOT_AFTER: &str = "serin_certificate_not_after_timestamp_seconds";
const EXPIRY: &str = "serin_user_list_expiry_timestamp_seconds";
const LIST_GAUGES: [&str; 5] = [
    "serin_user_list_entries",
    "serin_user_list_bytes",
    "serin_user_list_last_load_successful",
    "serin_user_list_last_load_success_timestamp_seconds",
    EXPIRY,
];

#[derive(Debug)]
struct Fixed {
    workers: Workers,
    admin: std::net::SocketAddr,
    max_connections: Option<usize>,
    duration_buckets: Vec<f64>,
}

// === impl Control ===

impl Control {
    /// Binds the listeners and compiles the first snapshot, with what was `found` of the names of
    /// endpoints, and the weights that were set before.
    ///
    /// # Errors
    ///
    /// The listeners that cannot be bound.
    pub fn new(
        loaded: Loaded,
        found: Names,
        mut weights: RuntimeWeights,
        watching: Watching,
        sockets: Arc<Sockets>,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, Vec<BoundSocket>), Problems> {
        let phase = Phase::Starting;
        let (listeners, bound) = bind_new(&loaded, &[], phase, &sockets, &metrics)?;
        let sinks = Sinks::new(&metrics);
        let access_log = open_log(&loaded, &sinks)?;
        let exporters = Exporters::new(&metrics);
        let tracer = start_tracer(&loaded, &exporters)?;
        let fixed = Fixed {
            workers: loaded.config.workers,
            admin: loaded.config.admin.address,
            max_connections: loaded.config.max_connections,
            duration_buckets: loaded.config.duration_buckets.clone(),
        };
        let mut living = Living::default();
        let revision = Revision(1);
        let open = Open {
            listeners: &listeners,
            draining: &[],
            access_log: access_log.as_ref(),
            tracer: tracer.as_ref(),
        };
        let names = endpoints::merge_names(&metrics, &loaded, &Names::new(), found);
        weights::yielded(&mut weights, &loaded.config);
        let first = compile_loaded(&loaded, &names, &weights, revision, &mut living, &metrics);
        let first = open.with(first);
        let wanted = watch::Sender::new(Wanted {
            settings: loaded.config.dns.clone(),
            names: Arc::clone(&names),
            reloads: 0,
        });
        let now = SystemTime::now();
        let weights = Arc::new(weights);
        let saved = Saved::not_yet(&loaded.config);
        let status = Status {
            revision,
            loaded: Arc::new(loaded),
            taken_over_at: now,
            last_attempt_at: now,
            refused: None,
            restart_required: Vec::new(),
            stale_lists: HashMap::new(),
            names,
            stale_endpoints: HashMap::new(),
            weights: Arc::clone(&weights),
            saved,
            watching,
        };
        show(&metrics, &status);
        // Both are there from the start: an increase from nothing is invisible to Prometheus.
        for result in ["success", "failure"] {
            metrics
                .counter("serin_config_reloads_total", &[("result", result)])
                .increment(0);
        }
        let board = Arc::new(ArcSwap::from_pointee(status));
        Ok((
            Self {
                live: Live::new(first),
                metrics,
                living,
                listeners,
                draining: Vec::new(),
                phase,
                phases: watch::channel(phase).1,
                sockets,
                access_log,
                sinks,
                tracer,
                exporters,
                history: Recorder::default(),
                fixed,
                board,
                weights,
                writing: None,
                save_at: None,
                wanted,
            },
            bound,
        ))
    }

    /// Where the snapshots hang.
    pub fn live(&self) -> Arc<Live> {
        Arc::clone(&self.live)
    }

    /// What spans are exported by.
    pub fn exporters(&self) -> Arc<Exporters> {
        Arc::clone(&self.exporters)
    }

    /// What access logs are written to.
    pub fn sinks(&self) -> Arc<Sinks> {
        Arc::clone(&self.sinks)
    }

    /// The endpoints that have failed too often in a row.
    pub fn alarm(&self) -> Arc<Alarms> {
        self.living.endpoints.alarms()
    }

    /// Where the status hangs.
    pub fn board(&self) -> StatusBoard {
        Arc::clone(&self.board)
    }

    /// What the job of discovery is to follow.
    pub fn wanted(&self) -> watch::Receiver<Wanted> {
        self.wanted.subscribe()
    }

    /// Takes changes until nobody can send any, or the process drains; then the listeners close.
    pub async fn run(
        mut self,
        mut changes: mpsc::Receiver<Change>,
        acceptor: Acceptor,
        phase: watch::Receiver<Phase>,
    ) {
        self.phases = phase;
        self.record();
        while let Some(change) = self.next(&mut changes).await {
            match change {
                Change::Config {
                    loaded,
                    names,
                    occasion,
                    reply,
                } => {
                    let result = match loaded {
                        Ok(loaded) => self.take_over(*loaded, names, &acceptor).await,
                        Err(problems) => Err(problems),
                    };
                    // Behind the change: of whom it names, and not of those before.
                    if occasion == Occasion::Asked {
                        self.hurry_names();
                    }
                    let result = result.inspect_err(|problems| {
                        if !(occasion == Occasion::Retried && self.has_refused(problems)) {
                            self.refuse(problems);
                        }
                    });
                    if let Some(reply) = reply {
                        // Whoever asked may have gone.
                        let _ = reply.send(result);
                    }
                }
                Change::UserList {
                    source,
                    loaded: Ok(list),
                } => self.take_over_list(&source, list).await,
                Change::UserList {
                    source,
                    loaded: Err(reason),
                } => self.keep_list(&source, &reason),
                Change::Endpoints { resolved } => self.take_over_names(resolved).await,
                Change::EndpointsFile {
                    path,
                    loaded: Ok(endpoints),
                    names,
                } => self.take_over_endpoints(&path, endpoints, names).await,
                Change::EndpointsFile {
                    path,
                    loaded: Err(reason),
                    ..
                } => self.keep_endpoints(&path, &reason),
                Change::Weights { order, reply } => {
                    let set = self.set_weights(order).await;
                    // Whoever asked may have gone.
                    let _ = reply.send(set);
                }
                Change::Watching(watching) => self.update(|status| status.watching = watching),
            }
        }
        // The last chance; where another process serves, the file is its own.
        if self.save_at.is_some() && self.phase != Phase::Succeeded {
            self.save().await;
        }
    }

    /// The next change; `None` when the process drains.
    async fn next(&mut self, changes: &mut mpsc::Receiver<Change>) -> Option<Change> {
        while self.phase < Phase::Draining {
            tokio::select! {
                biased;
                // The sender's end is a drop, which says the same as `Draining`.
                moved = self.phases.changed() => {
                    moved.ok()?;
                    let before = self.phase;
                    self.follow_phase();
                    if before < Phase::Serving {
                        self.begin_weights().await;
                    }
                }
                () = until(self.save_at) => self.save().await,
                change = changes.recv() => return change,
            }
        }
        None
    }

    async fn take_over(
        &mut self,
        loaded: Loaded,
        found: Names,
        acceptor: &Acceptor,
    ) -> Result<Revision, Problems> {
        let loaded = Arc::new(loaded);
        let (phase, sockets) = (self.phase, &self.sockets);
        let (opened, bound) = bind_new(&loaded, &self.listeners, phase, sockets, &self.metrics)?;
        let access_log = open_log(&loaded, &self.sinks)?;
        self.tracer = start_tracer(&loaded, &self.exporters)?;
        self.access_log = access_log;
        let (mut kept, closed): (Vec<_>, Vec<_>) = std::mem::take(&mut self.listeners)
            .into_iter()
            .partition(|open| {
                loaded
                    .config
                    .listeners
                    .iter()
                    .any(|listener| open.serves(listener))
            });
        for open in &mut kept {
            if let Some(listener) = loaded.config.listeners.iter().find(|one| open.serves(one)) {
                open.rename(&listener.name, &self.metrics);
            }
        }
        self.listeners = kept.into_iter().chain(opened).collect();
        let before = self.live.load();
        let draining = closed.into_iter().filter_map(|open| open.drain(&before));
        self.draining.extend(draining);
        let names = self.known_names(&loaded, found);
        let are_weights_less = self.yield_weights(&loaded.config);
        let revision = self.publish(&loaded, &names).await;
        self.want(&loaded, &names);
        for socket in bound {
            acceptor.open(socket);
        }

        let restart_required = self.fixed.differences(&loaded.config);
        for what in &restart_required {
            warn!("the configuration changes {what}, which needs a restart");
        }
        for warning in &loaded.warnings.problems {
            warn!("{}:{warning}", loaded.path.display());
        }
        info!(%revision, file = %loaded.path.display(), "configuration taken over");
        let status = self.board.load_full();
        let before = &status.loaded;
        forget(&self.metrics, &before.config, &loaded.config);
        endpoints::forget(&self.metrics, &status, &loaded);
        self.metrics
            .counter("serin_config_reloads_total", &[("result", "success")])
            .increment(1);
        self.update(|status| {
            status.revision = revision;
            status.loaded = loaded;
            status.taken_over_at = SystemTime::now();
            status.last_attempt_at = status.taken_over_at;
            status.refused = None;
            status.restart_required = restart_required;
            // A list that was not read again is as stale as it was.
            status
                .stale_lists
                .retain(|source, _| same_list(before, &status.loaded, source));
            status.names = names;
            status
                .stale_endpoints
                .retain(|path, _| same_endpoints(before, &status.loaded, path));
        });
        self.record();
        self.follow_state_file(&status.loaded.config, are_weights_less)
            .await;
        Ok(revision)
    }

    /// Keeps what the file in force says.
    fn record(&mut self) {
        let status = self.board.load();
        self.history.record(&status.loaded, status.taken_over_at);
    }

    fn has_refused(&self, problems: &Problems) -> bool {
        let status = self.board.load();
        let refused = status.refused.as_ref();
        refused.is_some_and(|refused| refused.to_string() == problems.to_string())
    }

    fn refuse(&mut self, problems: &Problems) {
        for problem in &problems.problems {
            error!("{}:{problem}", problems.file.display());
        }
        error!(file = %problems.file.display(), "configuration refused; the one in force stays");
        self.metrics
            .counter("serin_config_reloads_total", &[("result", "failure")])
            .increment(1);
        let refused = Arc::new(problems.clone());
        self.update(|status| {
            status.last_attempt_at = SystemTime::now();
            status.refused = Some(refused);
        });
    }

    async fn take_over_list(&mut self, source: &ListSource, list: LoadedList) {
        let mut loaded = Loaded::clone(&self.board.load().loaded);
        let names = names_of(&loaded.config, source);
        if names.is_empty() {
            return;
        }
        info!(list = %names.join(","), entries = list.list.len(), "user list taken over");
        loaded.lists.insert(source.clone(), list);
        let loaded = Arc::new(loaded);
        let names = Arc::clone(&self.board.load().names);
        let revision = self.publish(&loaded, &names).await;
        self.update(|status| {
            status.revision = revision;
            status.loaded = loaded;
            status.stale_lists.remove(source);
        });
    }

    fn keep_list(&mut self, source: &ListSource, reason: &str) {
        let loaded = Arc::clone(&self.board.load().loaded);
        for name in names_of(&loaded.config, source) {
            error!(
                list = name,
                "user list {name} {reason}; the ids read before stay"
            );
        }
        self.update(|status| {
            let reason = reason.to_owned();
            status.stale_lists.insert(source.clone(), reason);
        });
    }

    async fn publish(&mut self, loaded: &Arc<Loaded>, names: &Arc<Names>) -> Revision {
        let revision = Revision(self.board.load().revision.0 + 1);
        let next = self.compile(loaded, names, revision).await;
        self.draining.retain(DrainingListener::has_connections);
        let open = Open {
            listeners: &self.listeners,
            draining: &self.draining,
            access_log: self.access_log.as_ref(),
            tracer: self.tracer.as_ref(),
        };
        let next = open.with(next);
        let is_current = |endpoint| next.backend_of(endpoint).is_some();
        self.living.endpoints.retain(is_current);
        tokio::task::spawn_local(retire(self.live.publish(next)));
        self.living.tallies.prune();
        let listeners = &loaded.config.listeners;
        let is_open = |address| {
            address == loaded.config.admin.address
                || listeners.iter().any(|open| open.address == address)
        };
        self.living.tickets.retain(is_open);
        self.metrics.prune();
        revision
    }

    /// Has the listeners go along with the process.
    fn follow_phase(&mut self) {
        self.phase = *self.phases.borrow_and_update();
        let listeners = self.listeners.iter();
        listeners.for_each(|open| open.enter(self.phase));
    }

    /// Compiles on another thread: very many routes take a second, and this one answers probes.
    async fn compile(
        &mut self,
        loaded: &Arc<Loaded>,
        names: &Arc<Names>,
        revision: Revision,
    ) -> Snapshot {
        let (loaded, names) = (Arc::clone(loaded), Arc::clone(names));
        let (weights, metrics) = (Arc::clone(&self.weights), Arc::clone(&self.metrics));
        let mut living = std::mem::take(&mut self.living);
        let compiling = tokio::task::spawn_blocking(move || {
            let next = compile_loaded(&loaded, &names, &weights, revision, &mut living, &metrics);
            (next, living)
        });
        tokio::pin!(compiling);
        let compiled = loop {
            tokio::select! {
                Ok(()) = self.phases.changed() => self.follow_phase(),
                compiled = compiling.as_mut() => break compiled,
            }
        };
        let (next, living) = match compiled {
            Ok(compiled) => compiled,
            // Nobody cancels it.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        self.living = living;
        next
    }

    fn update(&self, change: impl FnOnce(&mut Status)) {
        let mut status = Status::clone(&self.board.load());
        status.weights = Arc::clone(&self.weights);
        change(&mut status);
        show(&self.metrics, &status);
        self.board.store(Arc::new(status));
    }
}

// === impl Status ===

impl Status {
    /// What became of reading this list again, if that failed.
    pub fn stale(&self, list: &ListSource) -> Option<&str> {
        self.stale_lists.get(list).map(String::as_str)
    }
}

// === impl Fixed ===

impl Fixed {
    fn differences(&self, config: &Config) -> Vec<&'static str> {
        let differences = [
            (self.workers != config.workers, "workers"),
            (self.admin != config.admin.address, "admin.address"),
            (
                self.max_connections != config.max_connections,
                "connections.max",
            ),
            (
                self.duration_buckets != config.duration_buckets,
                "telemetry.durationBuckets",
            ),
        ];
        differences
            .into_iter()
            .filter(|(differs, _)| *differs)
            .map(|(_, what)| what)
            .collect()
    }
}

impl OpenListener {
    /// Another name or timeout needs no new socket; with port 0 the name tells listeners apart.
    fn serves(&self, listener: &crate::config::Listener) -> bool {
        self.configured == listener.address
            && (listener.address.port() != 0 || self.name == listener.name)
    }
}

/// Lets go of a snapshot when nobody uses it any longer. Without this a worker would be the last to
/// let go, in the middle of its requests, and freeing a list of ten million ids takes a while.
async fn retire(snapshot: Arc<Snapshot>) {
    while Arc::strong_count(&snapshot) > 1 {
        tokio::time::sleep(RETIREMENT_TICK).await;
    }
    // Nobody waits for it.
    drop(tokio::task::spawn_blocking(move || drop(snapshot)));
}

/// Waits for ever where there is no such time.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

fn same_list(before: &Loaded, after: &Loaded, source: &ListSource) -> bool {
    match (before.lists.get(source), after.lists.get(source)) {
        (Some(before), Some(after)) => Arc::ptr_eq(&before.list, &after.list),
        _ => false,
    }
}

/// True when the file was not read again.
fn same_endpoints(before: &Loaded, after: &Loaded, path: &FilePath) -> bool {
    let of = |loaded: &Loaded| loaded.endpoints_files.get(path).map(|file| file.loaded_at);
    of(before).is_some() && of(before) == of(after)
}

/// Binds the listeners that are not open yet: before anything is taken over, so that a reload
/// happens whole or not at all.
fn bind_new(
    loaded: &Loaded,
    open: &[OpenListener],
    phase: Phase,
    sockets: &Sockets,
    metrics: &Metrics,
) -> Result<(Vec<OpenListener>, Vec<BoundSocket>), Problems> {
    let mut bound = Vec::new();
    let mut problems = Vec::new();
    for (position, listener) in loaded.config.listeners.iter().enumerate() {
        if open.iter().any(|open| open.serves(listener)) {
            continue;
        }
        match server::bind(listener.address, &listener.name, phase, sockets, metrics) {
            Ok(pair) => bound.push(pair),
            Err(error) => {
                let at = Path::default()
                    .key("listeners")
                    .index(position)
                    .key("address");
                let message = format!("cannot listen on `{}`: {error}", listener.address);
                let port = listener.address.port();
                let hint = open
                    .iter()
                    .find(|open| open.bound.port() == port)
                    .map(|open| {
                        let name = &open.name;
                        format!("listener `{name}` holds this port: take another one, or restart")
                    })
                    .or_else(|| sockets.hint(port));
                problems.push(Problem {
                    hint,
                    ..problem_at(&loaded.warnings.source, &at, message)
                });
            }
        }
    }
    if problems.is_empty() {
        return Ok(bound.into_iter().unzip());
    }
    Err(Problems::new(
        &loaded.path,
        &loaded.warnings.source,
        problems,
    ))
}

/// An error at a place of a configuration that could be parsed before.
pub(crate) fn problem_at(source: &str, at: &Path, message: String) -> Problem {
    let span = Node::parse(source).map_or_else(|_| Span::start(), |document| document.locate(at));
    Problem::error(at, span, message)
}

/// Opens the access log, before anything is taken over; its output may be open already.
fn open_log(loaded: &Loaded, sinks: &Sinks) -> Result<Option<Arc<AccessLog>>, Problems> {
    let Some(settings) = &loaded.config.access_log else {
        return Ok(None);
    };
    let output = &settings.output;
    let opened = if is_read_by(loaded, output) {
        Err("it is read for the configuration".to_owned())
    } else {
        AccessLog::open(settings, sinks).map_err(|error| error.to_string())
    };
    opened.map(Some).map_err(|reason| {
        let at = Path::default().key("accessLog").key("output");
        let message = format!("the access log cannot be written to {output}: {reason}");
        let source = &loaded.warnings.source;
        Problems::new(&loaded.path, source, vec![problem_at(source, &at, message)])
    })
}

/// What traces requests as the configuration says; its exporter may be there already.
fn start_tracer(loaded: &Loaded, exporters: &Exporters) -> Result<Option<Arc<Tracer>>, Problems> {
    let settings = loaded.config.tracing.as_ref();
    let tracer = settings.map(|settings| Tracer::new(settings, exporters));
    tracer.transpose().map_err(|error| {
        let at = Path::default().key("tracing");
        let message = format!("the exporter of spans cannot be started: {error}");
        let source = &loaded.warnings.source;
        Problems::new(&loaded.path, source, vec![problem_at(source, &at, message)])
    })
}

/// True for the files that a configuration consists of: lines at their ends would spoil them.
fn is_read_by(loaded: &Loaded, output: &Output) -> bool {
    let Output::File(output) = output else {
        return false;
    };
    let Ok(output) = output.canonicalize() else {
        return false;
    };
    let mut files = loaded.files_read();
    files.any(|path| path.canonicalize().is_ok_and(|path| path == output))
}

/// What is open in the process and part of the next snapshot.
struct Open<'o> {
    listeners: &'o [OpenListener],
    draining: &'o [DrainingListener],
    access_log: Option<&'o Arc<AccessLog>>,
    tracer: Option<&'o Arc<Tracer>>,
}

// === impl Open ===

impl Open<'_> {
    /// A snapshot that knows of it.
    fn with(&self, mut next: Snapshot) -> Snapshot {
        for listener in &mut next.listeners {
            let settings = &mut listener.settings;
            if let Some(open) = self.listeners.iter().find(|open| open.serves(settings)) {
                settings.address = open.bound;
            }
        }
        next.access_log = self.access_log.map(Arc::clone);
        next.tracer = self.tracer.map(Arc::clone);
        let draining = self.draining.iter().map(|drained| drained.listener.clone());
        next.draining_listeners = draining.collect();
        next
    }
}

fn compile_loaded(
    loaded: &Loaded,
    names: &Names,
    weights: &RuntimeWeights,
    revision: Revision,
    living: &mut Living,
    metrics: &Metrics,
) -> Snapshot {
    let sources = Sources {
        config: &loaded.config,
        lists: &lists_in_order(loaded),
        endpoints: &endpoints::located(loaded, names),
        weights,
    };
    compile(sources, revision, living, metrics)
}

/// The snapshot that a configuration would give, for those who only want to ask it, with the weights that
/// are set on this machine. Nobody is asked for names: they count as if they were resolved.
pub fn offline_snapshot(loaded: &Loaded) -> Snapshot {
    let metrics = Metrics::new(&loaded.config.duration_buckets, 1);
    let state = loaded.config.state_file.as_deref();
    let mut weights = state
        .and_then(|file| state::read(file).ok())
        .unwrap_or_default();
    weights.yield_to(&loaded.config);
    let sources = Sources {
        config: &loaded.config,
        lists: &lists_in_order(loaded),
        endpoints: &endpoints::located_offline(loaded),
        weights: &weights,
    };
    compile(sources, Revision(0), &mut Living::default(), &metrics)
}

/// The user lists of a configuration in the order of its file.
fn lists_in_order(loaded: &Loaded) -> Vec<Arc<UserList>> {
    let list = |list: &crate::config::UserList| Arc::clone(&loaded.lists[&list.source].list);
    loaded.config.user_lists.iter().map(list).collect()
}

fn names_of<'c>(config: &'c Config, source: &ListSource) -> Vec<&'c str> {
    config
        .user_lists
        .iter()
        .filter(|list| list.source == *source)
        .map(|list| &*list.name)
        .collect()
}

/// Shows the status in metrics.
fn show(metrics: &Metrics, status: &Status) {
    let flag = |name, on: bool| metrics.gauge(name, &[]).set(f64::from(u8::from(on)));
    flag(
        "serin_config_last_reload_successful",
        status.refused.is_none(),
    );
    flag(
        "serin_config_restart_required",
        !status.restart_required.is_empty(),
    );
    flag(
        "serin_config_watch_polling",
        status.watching == Watching::Polling,
    );
    metrics
        .gauge("serin_config_last_reload_success_timestamp_seconds", &[])
        .set(seconds(status.taken_over_at));
    // As in forget: without a limit no comparison with it holds.
    let limit = status.loaded.config.overload.in_flight;
    metrics
        .gauge("serin_overload_limit", &[])
        .set(limit.map_or(f64::NAN, f64::from));
    metrics.set_config_info(status.revision.0, status.loaded.hash);
    weights::show(metrics, status);
    endpoints::show(metrics, status);
    for (file, not_after) in certificates(&status.loaded.config) {
        let gauge = metrics.gauge(NOT_AFTER, &[("certificate", file)]);
        gauge.set(not_after as f64);
    }
    for list in &status.loaded.config.user_lists {
        let labels = [("list", &*list.name)];
        let loaded = &status.loaded.lists[&list.source];
        let gauge = |name| metrics.gauge(name, &labels);
        gauge("serin_user_list_entries").set(loaded.list.len() as f64);
        gauge("serin_user_list_bytes").set(loaded.list.heap_bytes() as f64);
        gauge("serin_user_list_last_load_successful")
            .set(f64::from(u8::from(status.stale(&list.source).is_none())));
        gauge("serin_user_list_last_load_success_timestamp_seconds").set(seconds(loaded.loaded_at));
        if let Some(expires_at) = list.expires_at {
            gauge(EXPIRY).set(expires_at as f64);
        }
    }
}

/// Sets what is no longer configured to "not a number", and weights to 0: the registry cannot forget
/// a gauge, an old value would be a lie, and 0 says "failed" or "expired". No comparison holds for
/// what is not a number, so no alert fires.
fn forget(metrics: &Metrics, before: &Config, after: &Config) {
    let lists: HashSet<&str> = after.user_lists.iter().map(|list| &*list.name).collect();
    for list in before
        .user_lists
        .iter()
        .filter(|list| !lists.contains(&*list.name))
    {
        for name in LIST_GAUGES {
            metrics.gauge(name, &[("list", &list.name)]).set(f64::NAN);
        }
    }
    for list in after
        .user_lists
        .iter()
        .filter(|list| list.expires_at.is_none())
    {
        if before
            .user_lists
            .iter()
            .any(|known| known.name == list.name && known.expires_at.is_some())
        {
            metrics.gauge(EXPIRY, &[("list", &list.name)]).set(f64::NAN);
        }
    }
    let still: HashSet<&str> = certificates(after).map(|(file, _)| file).collect();
    for (file, _) in certificates(before).filter(|(file, _)| !still.contains(file)) {
        let gauge = metrics.gauge(NOT_AFTER, &[("certificate", file)]);
        gauge.set(f64::NAN);
    }
    let still: HashSet<(&str, &str)> = weights(after).collect();
    for (route, backend) in weights(before).filter(|pair| !still.contains(pair)) {
        let labels = [("route", route), ("backend", backend)];
        for name in ["serin_backend_weight", "serin_baseline_info"] {
            metrics.gauge(name, &labels).set(0.0);
        }
    }
}

/// The certificates of a configuration: their files, and when they expire.
fn certificates(config: &Config) -> impl Iterator<Item = (&str, i64)> {
    let of_listeners = config.listeners.iter().filter_map(|one| one.tls.as_ref());
    let of_listeners = of_listeners.chain(&config.admin.tls);
    let of_listeners = of_listeners.flat_map(|tls| &tls.certificates);
    let of_listeners = of_listeners.map(|named| (&*named.file, named.certificate.not_after));
    let of_backends = config.backends.iter();
    let of_backends = of_backends.filter_map(|backend| backend.own_certificate.as_ref());
    let of_backends = of_backends.map(|(file, not_after)| (&**file, *not_after));
    of_listeners.chain(of_backends)
}

fn weights(config: &Config) -> impl Iterator<Item = (&str, &str)> {
    config.routes.iter().flat_map(|route| {
        route
            .targets
            .iter()
            .map(|target| (&*route.name, &*config.backends[target.backend].name))
    })
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

#[cfg(test)]
mod tests {
    use crate::config::load::{load_list, load_text};

    use super::*;

    const CONFIG: &str = "listeners: [ { name: web, address: '127.0.0.1:0' } ]
backends: [ { name: only, endpoints: ['127.0.0.1:9'] } ]
routes: [ { name: all, backendRefs: [ { name: only } ] } ]
";

    fn control() -> Control {
        let loaded = load_text(FilePath::new("serin.yaml"), CONFIG, &mut load_list).unwrap();
        let metrics = Arc::new(Metrics::new(&loaded.config.duration_buckets, 1));
        let (found, sockets) = (Names::new(), Arc::default());
        let weights = RuntimeWeights::none();
        let made = Control::new(loaded, found, weights, Watching::Nothing, sockets, metrics);
        made.unwrap_or_else(|problems| panic!("{problems}")).0
    }

    #[test]
    fn the_thread_is_free_for_probes_while_a_snapshot_is_compiled() {
        // One thread for what blocks: as long as that waits, nothing can be compiled on it.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let test = async {
            let mut control = control();
            let (live, status) = (control.live(), control.board.load_full());
            let holding = tokio::task::spawn_blocking(move || held.recv());
            let publishing = tokio::task::spawn_local(async move {
                control.publish(&status.loaded, &status.names).await
            });
            for _ in 0..100 {
                // Only somebody who does not block gives the turn back.
                tokio::task::yield_now().await;
            }
            assert_eq!(live.load().revision, Revision(1));
            release.send(()).unwrap();
            holding.await.unwrap().unwrap();
            assert_eq!(publishing.await.unwrap(), Revision(2));
            assert_eq!(live.load().revision, Revision(2));
        };
        tokio::task::LocalSet::new().block_on(&runtime, test);
    }
}
