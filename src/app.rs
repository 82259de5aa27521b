//! The composition root: from a checked configuration to running threads, and back.
//!
//! ```text
//! serin-control   control (single writer), admin, health, discovery
//! serin-reload    follows the files
//! serin-accept    all listeners
//! serin-work-N    the requests of its connections
//! serin-log       writes the access log; started by control, since a reload may name another one
//! ```

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};

use crate::admin::Admin;
use crate::backend::{Endpoint, Impediment};
use crate::config::document::Path;
use crate::config::load::Loaded;
use crate::config::watch::{ReloadRequest, Reloader};
use crate::config::{Config, Problem, Problems, Shutdown, Workers};
use crate::control::endpoints::names_of;
use crate::control::{Change, Control, StatusBoard, Watching, problem_at};
use crate::descriptors;
use crate::discovery::Names;
use crate::discovery::job::Discovery;
use crate::discovery::resolver::resolve_all;
use crate::health::Watch;
use crate::health::checks::{Checks, MOST_AT_A_TIME};
use crate::proxy::via::Via;
use crate::server::Phase;
use crate::server::acceptor::Acceptor;
use crate::server::slots::Slots;
use crate::server::sockets::{ADMIN, Given, Giver, Listening, Sockets};
use crate::server::worker::WorkerHandle;
use crate::snapshot::{Live, Revision, Snapshot};
use crate::telemetry::access_log::Sinks;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::Exporters;
use crate::upstream::Shortage;
use crate::weights::{RuntimeWeights, state};

/// How often a drain looks whether it is over.
const DRAIN_TICK: Duration = Duration::from_millis(10);

/// How often a start looks whether endpoints have been asked.
const CHECKS_TICK: Duration = Duration::from_millis(5);

/// How long a thread for what takes long may rest.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// How long the end of the process may take when the drain is over: whoever stops it kills it soon after
/// `shutdown.timeout`, and with it what is left of the access log.
pub const ENDING_LIMIT: Duration = Duration::from_secs(2);

/// How much of that goes to threads that have nothing left to do, and how often they are looked at.
const THREADS_LIMIT: Duration = Duration::from_secs(1);
const THREADS_TICK: Duration = Duration::from_millis(1);

/// How long a successor waits at most for sockets to be let go of. It takes a moment, unless a listener
/// that was taken out of the configuration before still serves its queue.
const RELEASE_LIMIT: Duration = Duration::from_secs(1);

/// Whether the files of the configuration are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// Changes are taken over.
    Files {
        /// How often they are looked at, whatever the kernel tells of them.
        poll: Duration,
    },
    /// There are no files: the configuration is built in.
    Nothing,
}

/// A running proxy.
#[derive(Debug)]
pub struct App {
    admin: SocketAddr,
    live: Arc<Live>,
    board: StatusBoard,
    metrics: Arc<Metrics>,
    sinks: Arc<Sinks>,
    exporters: Arc<Exporters>,
    sockets: Arc<Sockets>,
    slots: Slots,
    reload: mpsc::Sender<ReloadRequest>,
    phase: watch::Sender<Phase>,
    workers: Arc<[WorkerHandle]>,
    worker_threads: Vec<JoinHandle<()>>,
    acceptor_thread: JoinHandle<()>,
    control_thread: JoinHandle<()>,
    /// Ends the control thread when it is dropped.
    stop: oneshot::Sender<()>,
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Every request had finished.
    Clean,
    /// This many connections were cut off.
    CutOff(usize),
}

// === impl App ===

impl App {
    /// Starts a proxy. It serves when this returns, whatever endpoints have answered by then.
    ///
    /// # Errors
    ///
    /// As for [`prepare`](Self::prepare).
    pub fn start(loaded: Loaded, follow: Follow) -> Result<Self, Problems> {
        let app = Self::prepare(loaded, follow, Vec::new())?;
        app.open();
        Ok(app)
    }

    /// Starts everything, with the sockets that listen already, and takes no connection of a client
    /// before it is told to [`open`](Self::open).
    ///
    /// # Errors
    ///
    /// Addresses that cannot be listened on, and threads that the operating system does not give.
    pub fn prepare(loaded: Loaded, follow: Follow, given: Vec<Given>) -> Result<Self, Problems> {
        let file = loaded.path.clone();
        let failed = |what: &str, error: io::Error| {
            Problems::whole_file(&file, format!("cannot start {what}: {error}"))
        };
        let count = worker_count(loaded.config.workers);
        let metrics = Arc::new(Metrics::new(&loaded.config.duration_buckets, count));
        let inherited = inherited_admin(&given);
        let sockets = Arc::new(Sockets::new(given));
        let admin_socket = bind_admin(&loaded, &sockets)?;
        let admin = admin_socket
            .local_addr()
            .map_err(|error| failed("the admin listener", error))?;
        // Until this process serves, probes reach the one before, if it has the same listener.
        let answers_from = match inherited {
            Some(inherited) if inherited == admin => Phase::Serving,
            _ => Phase::Starting,
        };
        let watching = match follow {
            Follow::Files { .. } => Watching::Events,
            Follow::Nothing => Watching::Nothing,
        };
        let (changes, change_receiver) = mpsc::channel(16);
        let (reload, reload_requests) = mpsc::channel(16);
        let reloader = match follow {
            Follow::Files { poll } => Some(Reloader::new(
                &loaded,
                poll,
                changes.clone(),
                reload_requests,
            )),
            Follow::Nothing => None,
        };

        let limit = connection_limit(&loaded.config, count);
        // Before anybody can connect: a client should not be told that a backend has no endpoints
        // only because nobody has asked yet.
        let found = first_names(&loaded).map_err(|error| failed("the resolver", error))?;
        let weights = first_weights(&loaded.config);
        let (control, bound) = Control::new(
            loaded,
            found,
            weights,
            watching,
            Arc::clone(&sockets),
            Arc::clone(&metrics),
        )?;
        let discovery = Discovery::new(control.wanted(), changes.clone());
        sockets.settle().map_err(|unrelated| {
            let hint = "use another path for --takeover, or end that process first";
            Problems::whole_file(&file, format!("{unrelated}; {hint}"))
        })?;
        let (live, board) = (control.live(), control.board());
        let (sinks, exporters) = (control.sinks(), control.exporters());
        let (workers, worker_threads) =
            start_workers(count, &live, &metrics).map_err(|error| failed("the workers", error))?;
        metrics.gauge("serin_workers", &[]).set(count as f64);
        let slots = Slots::new(limit, &metrics);
        let (acceptor, acceptor_thread) = Acceptor::start(Arc::clone(&workers), slots.clone())
            .map_err(|error| failed("the acceptor", error))?;
        for socket in bound {
            acceptor.open(socket);
        }

        let phase = watch::Sender::new(Phase::Starting);
        let (stop, stopped) = oneshot::channel();
        let admin_job = Admin {
            live: Arc::clone(&live),
            board: Arc::clone(&board),
            metrics: Arc::clone(&metrics),
            reload: reload.clone(),
            changes: changes.clone(),
            phase: phase.subscribe(),
            answers_from,
        };
        let jobs = ControlJobs {
            control,
            changes: (changes, change_receiver),
            discovery,
            acceptor,
            admin: (admin_job, admin_socket),
            phase: phase.subscribe(),
            stopped,
        };
        if let Some(reloader) = reloader {
            let started = reloader.start();
            started.map_err(|error| failed("the reloader", error))?;
        }
        let control_thread = jobs
            .start()
            .map_err(|error| failed("the control thread", error))?;
        Ok(Self {
            admin,
            live,
            board,
            metrics,
            sinks,
            exporters,
            sockets,
            slots,
            reload,
            phase,
            workers,
            worker_threads,
            acceptor_thread,
            control_thread,
            stop,
        })
    }

    /// Waits until every endpoint that has to pass a health check has been asked once, or should have
    /// been: until then users of a version that is well might get the baseline.
    pub fn await_first_checks(&self) {
        let begun = Instant::now();
        while awaits_checks(&self.live.load(), begun.elapsed()) {
            std::thread::sleep(CHECKS_TICK);
        }
    }

    /// Begins to serve.
    pub fn open(&self) {
        self.phase.send_replace(Phase::Serving);
        info!(admin = %self.admin, workers = self.workers.len(), "serin is up");
    }

    /// Where the admin listener is bound.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Where the listener of this name is bound.
    pub fn listener(&self, name: &str) -> Option<SocketAddr> {
        let snapshot = self.live.load();
        snapshot
            .listeners
            .iter()
            .find(|listener| *listener.settings.name == *name)
            .map(|listener| listener.settings.address)
    }

    /// Where the snapshots hang.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// What is in force, and what became of the last change.
    pub fn board(&self) -> &StatusBoard {
        &self.board
    }

    /// The metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The connections that each worker serves now.
    pub fn connections(&self) -> Vec<usize> {
        self.workers.iter().map(WorkerHandle::connections).collect()
    }

    /// Asks for the configuration to be read again, without waiting for it; control logs what
    /// becomes of it.
    pub fn request_reload(&self) {
        let (sender, _) = oneshot::channel();
        if self.reload.try_send(sender).is_err() {
            warn!("a reload is not possible now: too many are waiting, or there is no file");
        }
    }

    /// What access logs are written to.
    pub fn sinks(&self) -> Arc<Sinks> {
        Arc::clone(&self.sinks)
    }

    /// Reads the configuration again; `None` when there is no file to read.
    pub async fn reload(&self) -> Option<Result<Revision, Problems>> {
        let (sender, outcome) = oneshot::channel();
        self.reload.send(sender).await.ok()?;
        outcome.await.ok()
    }

    /// The sockets that listen now, the admin listener's among them.
    pub fn sockets(&self) -> Vec<Listening> {
        self.sockets.open()
    }

    /// Ends, since another process has all sockets and serves: there is no lame duck, and the admin
    /// listener is left to that process at once. `confirm` is called when nobody is accepted here any
    /// more.
    pub fn give_way(self, confirm: impl FnOnce()) -> Drained {
        let limit = self.board.load().loaded.config.shutdown.timeout;
        info!(?limit, "another process serves now; draining");
        let begun = Instant::now();
        self.phase.send_replace(Phase::Succeeded);
        while !self.sockets.open().is_empty() && begun.elapsed() < RELEASE_LIMIT {
            std::thread::sleep(THREADS_TICK);
        }
        confirm();
        self.drain(Phase::Succeeded, begun + limit)
    }

    /// Takes leave and ends; the configuration says how long that may take. Readiness fails at once,
    /// while connections are still taken for as long as others may not have heard of it. Then
    /// requests in flight finish.
    pub fn shut_down(self) -> Drained {
        let begun = Instant::now();
        let Shutdown { timeout, lame_duck } = self.board.load().loaded.config.shutdown;
        info!(limit = ?timeout, ?lame_duck, "draining");
        if !lame_duck.is_zero() {
            self.phase.send_replace(Phase::Leaving);
            std::thread::sleep(lame_duck);
        }
        self.drain(Phase::Draining, begun + timeout)
    }

    fn drain(self, phase: Phase, deadline: Instant) -> Drained {
        // Readiness fails, and control ends, with which its listeners close.
        self.phase.send_replace(phase);
        drop(self.reload);
        let busy = || {
            let connections = self.workers.iter().map(WorkerHandle::connections);
            connections.sum::<usize>()
        };
        while !(self.acceptor_thread.is_finished() && busy() == 0) && Instant::now() < deadline {
            std::thread::sleep(DRAIN_TICK);
        }
        // The acceptor may wait for one of them to end.
        self.slots.close();
        let cut_off = busy();
        if cut_off > 0 {
            cut_off_all(cut_off, &self.metrics);
        }
        drop(self.workers);
        let over = Instant::now();
        let limit = over + THREADS_LIMIT;
        finish(self.acceptor_thread, "the acceptor", limit);
        for thread in self.worker_threads {
            finish(thread, "a worker", limit);
        }
        drop(self.stop);
        finish(self.control_thread, "the control thread", limit);
        let left = ENDING_LIMIT.saturating_sub(over.elapsed());
        // At once: neither has to wait for whoever reads the other.
        std::thread::scope(|scope| {
            let spans = || self.exporters.flush(left);
            let spans = std::thread::Builder::new().spawn_scoped(scope, spans);
            self.sinks.flush(left);
            if spans.is_err() {
                self.exporters
                    .flush(ENDING_LIMIT.saturating_sub(over.elapsed()));
            }
        });
        if cut_off == 0 {
            Drained::Clean
        } else {
            Drained::CutOff(cut_off)
        }
    }
}

/// True when an endpoint has not been asked whether it is well, but may have answered `waited` after the
/// start: so many are asked at a time, and each has the time that its backend gives it.
fn awaits_checks(snapshot: &Snapshot, waited: Duration) -> bool {
    let checked = || {
        let backends = snapshot.backends.iter();
        let checked =
            backends.filter_map(|backend| Some((backend, backend.health_check.as_ref()?)));
        checked.filter(|(backend, _)| !backend.disabled)
    };
    let asked: usize = checked().map(|(backend, _)| backend.endpoints.len()).sum();
    let rounds = asked.div_ceil(MOST_AT_A_TIME) as u32;
    checked().any(|(backend, check)| {
        // One that is not well has been asked.
        let is_unasked = |endpoint: &Arc<Endpoint>| {
            endpoint.is_impeded_by(Impediment::Unchecked)
                && !endpoint.is_impeded_by(Impediment::Unhealthy)
        };
        waited < check.timeout * rounds && backend.endpoints.iter().any(is_unasked)
    })
}

/// Where the admin listener of the process before listens, if it gave that away.
fn inherited_admin(given: &[Given]) -> Option<SocketAddr> {
    let is_admin =
        |one: &&Given| one.giver == Giver::Predecessor && one.name.as_deref() == Some(ADMIN);
    given.iter().find(is_admin)?.socket.local_addr().ok()
}

/// Notes what did not end in time, before it is cut off.
fn cut_off_all(connections: usize, metrics: &Metrics) {
    let tunnels = metrics.sum("serin_tunnels_active");
    // Tunnels are in flight as well.
    let requests = metrics
        .sum("serin_requests_in_flight")
        .saturating_sub(tunnels);
    warn!(
        connections,
        requests, tunnels, "the drain took too long; what is left is cut off"
    );
    for (kind, count) in [("request", requests), ("tunnel", tunnels)] {
        let counter = metrics.counter("serin_drain_cut_off_total", &[("kind", kind)]);
        counter.increment(count);
    }
    metrics.ends();
}

/// Waits for a thread that was told to end. One that cannot hear of it must not hold up the end of
/// the process, with which it ends as well.
fn finish(thread: JoinHandle<()>, what: &str, limit: Instant) {
    while !thread.is_finished() {
        if Instant::now() >= limit {
            return warn!("{what} does not end");
        }
        std::thread::sleep(THREADS_TICK);
    }
    if thread.join().is_err() {
        warn!("{what} panicked");
    }
}

/// What the control thread does.
struct ControlJobs {
    control: Control,
    /// With a sender, since control ends when nobody can send any change.
    changes: (mpsc::Sender<Change>, mpsc::Receiver<Change>),
    discovery: Discovery,
    acceptor: Acceptor,
    admin: (Admin, Arc<TcpListener>),
    phase: watch::Receiver<Phase>,
    /// Resolves when the process has drained.
    stopped: oneshot::Receiver<()>,
}

impl ControlJobs {
    fn start(self) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_keep_alive(FOR_EVER)
            .build()?;
        std::thread::Builder::new()
            .name("serin-control".into())
            .spawn(move || {
                // One thread for what takes long is there from now on: where the system gives no other,
                // that waits for it, instead of failing.
                drop(runtime.spawn_blocking(|| {}));
                runtime.block_on(tokio::task::LocalSet::new().run_until(self.run()));
                // A snapshot may still be being freed there; the end needs no care.
                runtime.shutdown_background();
            })
    }

    async fn run(self) {
        let (live, metrics) = (self.control.live(), Arc::clone(&self.admin.0.metrics));
        let watch = Watch::new(
            Arc::clone(&live),
            Arc::clone(&metrics),
            self.control.alarm(),
        );
        tokio::task::spawn_local(watch.run());
        tokio::task::spawn_local(Checks::new(live, metrics).run());
        let (admin, socket) = self.admin;
        tokio::task::spawn_local(admin.run(socket));
        tokio::task::spawn_local(self.discovery.run());
        let (_sender, changes) = self.changes;
        self.control.run(changes, self.acceptor, self.phase).await;
        // Probes and metrics are served to the end of the drain; the sender's end is a drop.
        let _ = self.stopped.await;
    }
}

/// What was set before this process started. What cannot be used costs nobody the start, and is left as it is.
fn first_weights(config: &Config) -> RuntimeWeights {
    let Some(file) = &config.state_file else {
        return RuntimeWeights::none();
    };
    state::read(file).unwrap_or_else(|reason| {
        let file = file.display();
        error!(%file, "the state file {reason}; the weights are those of the configuration");
        RuntimeWeights::none()
    })
}

/// Asks for all names of endpoints; those that cannot be resolved in time come in later.
fn first_names(loaded: &Loaded) -> io::Result<Names> {
    let names = names_of(loaded);
    if names.is_empty() {
        return Ok(Names::new());
    }
    // On a thread of its own, since the caller may be in a runtime.
    let ask = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(runtime.block_on(resolve_all(&loaded.config.dns, names)))
    };
    let asked = std::thread::scope(|scope| scope.spawn(ask).join());
    asked.unwrap_or_else(|_| Err(io::Error::other("it panicked")))
}

type Workforce = (Arc<[WorkerHandle]>, Vec<JoinHandle<()>>);

fn start_workers(count: usize, live: &Arc<Live>, metrics: &Arc<Metrics>) -> io::Result<Workforce> {
    let via = Via::new(fastrand::u32(..));
    let shortage = Shortage::default();
    let start = |index| {
        let (live, metrics) = (Arc::clone(live), Arc::clone(metrics));
        WorkerHandle::start(index, live, metrics, via.clone(), shortage.clone())
    };
    let started: io::Result<Vec<_>> = (0..count).map(start).collect();
    let (handles, threads): (Vec<_>, Vec<_>) = started?.into_iter().unzip();
    Ok((handles.into(), threads))
}

fn worker_count(workers: Workers) -> usize {
    match workers {
        Workers::Exactly(count) => usize::from(count),
        Workers::Auto => std::thread::available_parallelism().map_or(1, usize::from),
    }
}

/// How many connections clients may have: what the configuration says, as far as there are file
/// descriptors.
fn connection_limit(config: &Config, workers: usize) -> usize {
    let (descriptors, listeners) = (descriptors::limit(), config.listeners.len());
    let most = descriptors::most_connections(descriptors, workers, listeners);
    match config.max_connections {
        None => descriptors::default_connections(descriptors, workers, listeners),
        Some(max) if max > most => {
            warn!(
                max,
                descriptors, most, "there are too few file descriptors for `connections.max`"
            );
            most
        }
        Some(max) => max,
    }
}

fn bind_admin(loaded: &Loaded, sockets: &Sockets) -> Result<Arc<TcpListener>, Problems> {
    let address = loaded.config.admin.address;
    let listening = sockets.listen(&ADMIN.into(), address);
    listening.map_err(|error| {
        let at = Path::default().key("admin").key("address");
        let message = format!("cannot listen on `{address}` for the admin API: {error}");
        let source = &loaded.warnings.source;
        let problem = Problem {
            hint: sockets.hint(address.port()),
            ..problem_at(source, &at, message)
        };
        Problems::new(&loaded.path, source, vec![problem])
    })
}
