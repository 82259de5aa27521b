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
use tracing::{info, warn};

use crate::admin::Admin;
use crate::config::document::Path;
use crate::config::load::Loaded;
use crate::config::watch::{ReloadRequest, Reloader};
use crate::config::{Problems, Workers};
use crate::control::endpoints::names_of;
use crate::control::{Change, Control, StatusBoard, Watching, problem_at};
use crate::discovery::Names;
use crate::discovery::job::Discovery;
use crate::discovery::resolver::resolve_all;
use crate::health::Watch;
use crate::health::checks::Checks;
use crate::proxy::via::Via;
use crate::server::acceptor::Acceptor;
use crate::server::worker::WorkerHandle;
use crate::server::{self, Phase};
use crate::snapshot::{Live, Revision};
use crate::telemetry::access_log::Sinks;
use crate::telemetry::metrics::Metrics;

/// How often a drain looks whether it is over.
const DRAIN_TICK: Duration = Duration::from_millis(10);

/// How long the end of the access log may take to be written.
const LOG_FLUSH_LIMIT: Duration = Duration::from_secs(2);

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
    /// Starts a proxy. It serves when this returns.
    ///
    /// # Errors
    ///
    /// Addresses that cannot be listened on, and threads that the operating system does not give.
    pub fn start(loaded: Loaded, follow: Follow) -> Result<Self, Problems> {
        let file = loaded.path.clone();
        let failed = |what: &str, error: io::Error| {
            Problems::whole_file(&file, format!("cannot start {what}: {error}"))
        };
        let count = worker_count(loaded.config.workers);
        let metrics = Arc::new(Metrics::new(&loaded.config.duration_buckets, count));
        let admin_socket = bind_admin(&loaded)?;
        let admin = admin_socket
            .local_addr()
            .map_err(|error| failed("the admin listener", error))?;
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

        // Before anybody can connect: a client should not be told that a backend has no endpoints
        // only because nobody has asked yet.
        let found = first_names(&loaded).map_err(|error| failed("the resolver", error))?;
        let (control, sockets) = Control::new(loaded, found, watching, Arc::clone(&metrics))?;
        let discovery = Discovery::new(control.wanted(), changes.clone());
        let (live, board, sinks) = (control.live(), control.board(), control.sinks());
        let (workers, worker_threads) =
            start_workers(count, &live, &metrics).map_err(|error| failed("the workers", error))?;
        metrics.gauge("serin_workers", &[]).set(count as f64);
        let (acceptor, acceptor_thread) =
            Acceptor::start(Arc::clone(&workers)).map_err(|error| failed("the acceptor", error))?;
        for socket in sockets {
            acceptor.open(socket);
        }

        let phase = watch::Sender::new(Phase::Serving);
        let (stop, stopped) = oneshot::channel();
        let admin_job = Admin {
            live: Arc::clone(&live),
            board: Arc::clone(&board),
            metrics: Arc::clone(&metrics),
            reload: reload.clone(),
            phase: phase.subscribe(),
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
        info!(admin = %admin, workers = count, "serin is up");
        Ok(Self {
            admin,
            live,
            board,
            metrics,
            sinks,
            reload,
            phase,
            workers,
            worker_threads,
            acceptor_thread,
            control_thread,
            stop,
        })
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

    /// Stops accepting, lets requests in flight finish, and ends; the configuration says how long
    /// that may take.
    pub fn shut_down(self) -> Drained {
        let limit = self.board.load().loaded.config.shutdown_timeout;
        let deadline = Instant::now() + limit;
        info!(limit = ?limit, "draining");
        // Readiness fails, and control ends, with which its listeners close.
        self.phase.send_replace(Phase::Draining);
        drop(self.reload);
        join(self.acceptor_thread, "the acceptor");
        let busy = || {
            self.workers
                .iter()
                .map(WorkerHandle::connections)
                .sum::<usize>()
        };
        while busy() > 0 && Instant::now() < deadline {
            std::thread::sleep(DRAIN_TICK);
        }
        let cut_off = busy();
        drop(self.workers);
        for thread in self.worker_threads {
            join(thread, "a worker");
        }
        drop(self.stop);
        join(self.control_thread, "the control thread");
        self.sinks.flush(LOG_FLUSH_LIMIT);
        if cut_off == 0 {
            Drained::Clean
        } else {
            Drained::CutOff(cut_off)
        }
    }
}

fn join(thread: JoinHandle<()>, what: &str) {
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
    admin: (Admin, TcpListener),
    phase: watch::Receiver<Phase>,
    stopped: oneshot::Receiver<()>,
}

impl ControlJobs {
    fn start(self) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("serin-control".into())
            .spawn(move || {
                runtime.block_on(tokio::task::LocalSet::new().run_until(self.run()));
                // A snapshot may still be being freed there; the end needs no care.
                runtime.shutdown_background();
            })
    }

    async fn run(mut self) {
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
        tokio::select! {
            () = self.control.run(changes, self.acceptor) => {}
            _ = self.phase.wait_for(|phase| *phase == Phase::Draining) => {}
        }
        // Probes and metrics are served to the end of the drain; the sender's end is a drop.
        let _ = self.stopped.await;
    }
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
    let started: io::Result<Vec<_>> = (0..count)
        .map(|index| WorkerHandle::start(index, Arc::clone(live), Arc::clone(metrics), via.clone()))
        .collect();
    let (handles, threads): (Vec<_>, Vec<_>) = started?.into_iter().unzip();
    Ok((handles.into(), threads))
}

fn worker_count(workers: Workers) -> usize {
    match workers {
        Workers::Exactly(count) => usize::from(count),
        Workers::Auto => std::thread::available_parallelism().map_or(1, usize::from),
    }
}

fn bind_admin(loaded: &Loaded) -> Result<TcpListener, Problems> {
    let address = loaded.config.admin;
    server::listen(address).map_err(|error| {
        let at = Path::default().key("admin").key("address");
        let message = format!("cannot listen on `{address}` for the admin API: {error}");
        let source = &loaded.warnings.source;
        Problems::new(&loaded.path, source, vec![problem_at(source, &at, message)])
    })
}
