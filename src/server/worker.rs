//! A worker: one thread, one runtime, its own connections to clients and to endpoints.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::debug;

use crate::proxy::Proxy;
use crate::proxy::timeouts::Timeouts;
use crate::proxy::via::Via;
use crate::snapshot::{Live, Reader};
use crate::telemetry::metrics::{Metrics, Up, WorkerMetrics};
use crate::upstream::{Pools, Shortage};

use super::conduct::Clients;
use super::slots::Slot;
use super::{Phase, connection};

/// How often idle connections to endpoints are looked at, and lines of the access log handed over.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// A connection on its way to a worker.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub stream: TcpStream,
    /// The address of the listener that it came through.
    pub listener: SocketAddr,
    /// Its other end.
    pub address: SocketAddr,
    /// When it has to end.
    pub phase: watch::Receiver<Phase>,
    /// Counts it among the connections of its listener.
    pub active: Up,
    /// Its place among all connections of clients.
    pub slot: Slot,
}

/// What a worker is told.
#[derive(Debug)]
enum Order {
    /// To serve a connection.
    Serve(Accepted, Serving),
    /// To send a client away that rests, since somebody waits for its place.
    MakeRoom,
}

/// The way to a worker.
#[derive(Debug)]
pub struct WorkerHandle {
    inbox: mpsc::UnboundedSender<Order>,
    load: Arc<AtomicUsize>,
}

/// Counts a connection as one of its worker's, from before it is handed over until it has ended.
#[derive(Debug)]
pub(super) struct Serving(Arc<AtomicUsize>);

struct Worker {
    index: usize,
    inbox: mpsc::UnboundedReceiver<Order>,
    live: Arc<Live>,
    metrics: Arc<Metrics>,
    via: Via,
    shortage: Shortage,
}

// === impl WorkerHandle ===

impl WorkerHandle {
    /// Starts a worker; its thread ends when the handle is dropped.
    ///
    /// # Errors
    ///
    /// When the operating system gives no thread or no reactor.
    pub fn start(
        index: usize,
        live: Arc<Live>,
        metrics: Arc<Metrics>,
        via: Via,
        shortage: Shortage,
    ) -> io::Result<(Self, JoinHandle<()>)> {
        let (sender, inbox) = mpsc::unbounded_channel();
        let worker = Worker {
            index,
            inbox,
            live,
            metrics,
            via,
            shortage,
        };
        let (started, has_started) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("serin-work-{index}"))
            .spawn(move || match local_runtime() {
                Ok(runtime) => {
                    let _ = started.send(Ok(()));
                    runtime.block_on(worker.run());
                }
                Err(error) => drop(started.send(Err(error))),
            })?;
        has_started.recv().map_err(io::Error::other)??;
        Ok((
            Self {
                inbox: sender,
                load: Arc::default(),
            },
            thread,
        ))
    }

    /// The connections that it serves or is about to serve.
    pub fn connections(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// False when its thread has died: then it has no connections, and must not get all of them.
    pub fn is_alive(&self) -> bool {
        !self.inbox.is_closed()
    }

    /// Hands a connection over.
    pub fn serve(&self, accepted: Accepted) {
        self.load.fetch_add(1, Ordering::Relaxed);
        let serving = Serving(Arc::clone(&self.load));
        self.tell(Order::Serve(accepted, serving));
    }

    /// Asks for the place of a client that rests, if there is one.
    pub fn ask_for_room(&self) {
        self.tell(Order::MakeRoom);
    }

    fn tell(&self, order: Order) {
        if self.inbox.send(order).is_err() {
            debug!("the worker is gone");
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Worker ===

impl Worker {
    async fn run(mut self) {
        let mut shortage = self.shortage.subscribe();
        let pools = Pools::new(Arc::clone(&self.metrics), self.shortage);
        let timeouts = Timeouts::new();
        tokio::task::spawn_local(Arc::clone(&timeouts).run());
        let mut published = self.live.subscribe();
        let reader = Reader::new(self.live);
        let metrics = WorkerMetrics {
            all: self.metrics,
            worker: self.index,
        };
        let proxy = Proxy::new(reader, Rc::clone(&pools), metrics, timeouts, self.via);
        let proxy = Rc::new(proxy);
        let clients = Rc::new(Clients::default());
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        loop {
            tokio::select! {
                order = self.inbox.recv() => match order {
                    Some(Order::Serve(accepted, serving)) => {
                        let (proxy, clients) = (Rc::clone(&proxy), Rc::clone(&clients));
                        let served = connection::serve(proxy, clients, accepted, serving);
                        drop(tokio::task::spawn_local(served));
                    }
                    Some(Order::MakeRoom) => clients.make_room(Instant::now()),
                    None => return,
                },
                // A worker without requests would hold on to the old snapshot, with its user lists,
                // for as long.
                _ = published.changed() => proxy.follow(),
                _ = sweep.tick() => proxy.sweep(),
                // The pools have a sender, so this never ends.
                _ = shortage.changed() => pools.let_go(),
            }
        }
    }
}

/// A runtime for tasks that stay on its thread. Beside a `LocalSet` on an ordinary one it saves a
/// second queue of tasks.
fn local_runtime() -> io::Result<tokio::runtime::LocalRuntime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())
}
