//! Accepts the connections of all listeners and gives each to the worker that has the fewest.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use crate::telemetry::metrics::Level;

use super::slots::{Slot, Slots};
use super::worker::{Accepted, WorkerHandle};
use super::{BACKLOG, BoundSocket, Phase};

/// How long accepting rests when the process has run out of file descriptors.
const EXHAUSTION_PAUSE: Duration = Duration::from_millis(100);

/// The way to hand listeners to the acceptor's thread, which ends when nobody can and its listeners
/// have drained.
#[derive(Clone, Debug)]
pub struct Acceptor {
    sockets: mpsc::UnboundedSender<BoundSocket>,
}

/// One listener's task.
struct Accepting {
    name: Arc<str>,
    socket: TcpListener,
    /// The same one, which can be given on for as long as it is held.
    shared: Arc<std::net::TcpListener>,
    phase: watch::Receiver<Phase>,
    listener: Listener,
}

/// What connections of a listener are handed over with.
struct Listener {
    bound: SocketAddr,
    phase: watch::Receiver<Phase>,
    active: Arc<ArcSwap<Level>>,
    workers: Arc<[WorkerHandle]>,
    slots: Slots,
}

// === impl Acceptor ===

impl Acceptor {
    /// Starts the acceptor's thread.
    ///
    /// # Errors
    ///
    /// When the operating system gives no thread or no reactor.
    pub fn start(workers: Arc<[WorkerHandle]>, slots: Slots) -> io::Result<(Self, JoinHandle<()>)> {
        let (sender, mut sockets) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let run = move || {
            let local = tokio::task::LocalSet::new();
            local.spawn_local(async move {
                while let Some(bound) = sockets.recv().await {
                    match Accepting::new(bound, Arc::clone(&workers), slots.clone()) {
                        Ok(accepting) => drop(tokio::task::spawn_local(accepting.run())),
                        Err(error) => warn!(%error, "a listener cannot be watched for connections"),
                    }
                }
            });
            runtime.block_on(local);
        };
        let thread = std::thread::Builder::new()
            .name("serin-accept".into())
            .spawn(run)?;
        Ok((Self { sockets: sender }, thread))
    }

    /// Opens a listener to connections.
    pub fn open(&self, bound: BoundSocket) {
        if self.sockets.send(bound).is_err() {
            warn!("the acceptor is gone");
        }
    }
}

// === impl Accepting ===

impl Accepting {
    fn new(bound: BoundSocket, workers: Arc<[WorkerHandle]>, slots: Slots) -> io::Result<Self> {
        let BoundSocket {
            socket,
            bound,
            name,
            active,
            phase,
        } = bound;
        Ok(Self {
            name,
            socket: TcpListener::from_std(socket.try_clone()?)?,
            shared: socket,
            phase: phase.clone(),
            listener: Listener {
                bound,
                phase,
                active,
                workers,
                slots,
            },
        })
    }

    async fn run(mut self) {
        // Until then clients wait in the queue, or the process before takes them out of it, as it goes on
        // doing if this one ends before it serves.
        let serving = self.phase.wait_for(|phase| *phase >= Phase::Serving);
        if serving.await.is_err() {
            return;
        }
        info!(listener = %self.name, address = %self.listener.bound, "listening");
        loop {
            let accepted = tokio::select! {
                // The drain first: nobody who keeps connecting can put it off.
                biased;
                _ = self.phase.wait_for(|phase| *phase >= Phase::Draining) => break,
                accepted = self.socket.accept() => accepted,
            };
            match accepted {
                // The worker registers the connection with its own reactor; it must leave this one's.
                Ok((stream, peer)) => match stream.into_std() {
                    Ok(stream) => self.listener.admit(stream, peer).await,
                    Err(error) => debug!(%error, "connection was gone before it was served"),
                },
                Err(error) => self.rest_after(&error).await,
            }
        }
        // The reactor has no use for it any more.
        drop(self.socket);
        // Also where a successor has the same queue: that it has this one is not known here.
        self.listener.empty_backlog(&self.shared).await;
        info!(address = %self.listener.bound, "no longer listening");
    }

    /// A client that left is nothing; without file descriptors, trying again at once would spin.
    async fn rest_after(&self, error: &io::Error) {
        if has_left(error) {
            return;
        }
        warn!(%error, address = %self.listener.bound, "cannot accept");
        tokio::time::sleep(EXHAUSTION_PAUSE).await;
    }
}

// === impl Listener ===

impl Listener {
    /// Takes what was queued when the drain began: the kernel would reset those connections. The
    /// socket itself is asked, since the reactor may not have heard of the last ones yet.
    async fn empty_backlog(&self, socket: &std::net::TcpListener) {
        for _ in 0..BACKLOG {
            match socket.accept() {
                Ok((stream, peer)) => self.admit(stream, peer).await,
                Err(error) if has_left(&error) => {}
                Err(_) => break,
            }
        }
    }

    /// Waits for a place: nobody else is accepted meanwhile. Also in a drain, when those that are
    /// served end soon, and make room. When a successor has the socket it needs none: nobody comes after
    /// it, and its place in the queue is gone.
    async fn admit(&self, stream: TcpStream, address: SocketAddr) {
        let ask_for_room = || self.workers.iter().for_each(WorkerHandle::ask_for_room);
        let mut phase = self.phase.clone();
        let slot = tokio::select! {
            biased;
            slot = self.slots.take(ask_for_room) => slot,
            Ok(_) = phase.wait_for(|phase| *phase == Phase::Succeeded) => Some(Slot::beyond_the_limit()),
        };
        match slot {
            Some(slot) => self.hand_over(stream, address, slot),
            None => warn!(peer = %address, "a connection is lost: the process ends"),
        }
    }

    fn hand_over(&self, stream: TcpStream, address: SocketAddr, slot: Slot) {
        let Some(worker) = self
            .workers
            .iter()
            .filter(|worker| worker.is_alive())
            .min_by_key(|worker| worker.connections())
        else {
            return;
        };
        let ready = stream.set_nonblocking(true);
        if let Err(error) = ready.and_then(|()| stream.set_nodelay(true)) {
            return debug!(%error, "connection was gone before it was served");
        }
        worker.serve(Accepted {
            stream,
            listener: self.bound,
            address,
            phase: self.phase.clone(),
            active: self.active.load().up(),
            slot,
        });
    }
}

/// True when the client left the queue before it was accepted.
fn has_left(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
    )
}
