//! A worker: one thread, one runtime, its own connections to clients and to endpoints.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::TcpStream;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::stream::Stream;
use http::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tracing::debug;

use crate::proxy::Proxy;
use crate::proxy::origin::Peer;
use crate::proxy::timeouts::Timeouts;
use crate::snapshot::{Live, Reader};
use crate::telemetry::metrics::{Metrics, Up, WorkerMetrics};
use crate::upstream::Pools;

use super::Phase;

/// How often idle connections to endpoints are looked at, and lines of the access log handed over.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// How long a connection that has to end waits for a request, so as to say with its response that it
/// is the last one: a request that is on its way when an idle connection is closed is lost.
const LAST_REQUEST_GRACE: Duration = Duration::from_secs(1);

/// A connection on its way to a worker.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub stream: TcpStream,
    /// Its other end.
    pub peer: Peer,
    /// When it has to end.
    pub phase: watch::Receiver<Phase>,
    /// Counts it among the connections of its listener.
    pub active: Up,
}

/// The way to a worker.
#[derive(Debug)]
pub struct WorkerHandle {
    inbox: mpsc::UnboundedSender<(Accepted, Serving)>,
    load: Arc<AtomicUsize>,
}

/// Counts a connection as one of its worker's, from before it is handed over until it has ended.
#[derive(Debug)]
struct Serving(Arc<AtomicUsize>);

struct Worker {
    index: usize,
    inbox: mpsc::UnboundedReceiver<(Accepted, Serving)>,
    live: Arc<Live>,
    metrics: Arc<Metrics>,
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
    ) -> io::Result<(Self, JoinHandle<()>)> {
        let (sender, inbox) = mpsc::unbounded_channel();
        let worker = Worker {
            index,
            inbox,
            live,
            metrics,
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
        if self.inbox.send((accepted, serving)).is_err() {
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
        let pools = Pools::new(Arc::clone(&self.metrics));
        let timeouts = Timeouts::new();
        tokio::task::spawn_local(Arc::clone(&timeouts).run());
        let mut published = self.live.subscribe();
        let reader = Reader::new(self.live);
        let metrics = WorkerMetrics {
            all: self.metrics,
            worker: self.index,
        };
        let proxy = Proxy::new(reader, Rc::clone(&pools), metrics, timeouts);
        let proxy = Rc::new(proxy);
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        loop {
            tokio::select! {
                handed = self.inbox.recv() => match handed {
                    Some((accepted, serving)) => drop(tokio::task::spawn_local(serve(Rc::clone(&proxy), accepted, serving))),
                    None => return,
                },
                // A worker without requests would hold on to the old snapshot, with its user lists,
                // for as long.
                _ = published.changed() => proxy.sweep(),
                _ = sweep.tick() => proxy.sweep(),
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

/// Serves a connection to its end. The place where HTTP/2 will branch off.
async fn serve(proxy: Rc<Proxy>, accepted: Accepted, _serving: Serving) {
    let Accepted {
        stream,
        peer,
        phase,
        active: _active,
    } = accepted;
    let stream = match tokio::net::TcpStream::from_std(stream) {
        Ok(stream) => stream,
        Err(error) => return debug!(%error, "connection cannot be served"),
    };
    let draining = Cell::new(false);
    let service = service_fn(|request| {
        let served = proxy.handle(&peer, request);
        async {
            let mut response = served.await;
            if draining.get() {
                // With this hyper closes the connection after the response.
                response
                    .headers_mut()
                    .insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(proxy.timer())
        .header_read_timeout(proxy.live().current().idle_timeout(peer.listener))
        .serve_connection(Stream::new(stream), service);
    let mut connection = pin!(connection);
    let ended = match until_drained(connection.as_mut(), phase, &draining).await {
        Some(ended) => ended,
        None => {
            // Closes an idle connection now, and another one after its response.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, peer = %peer.address, "connection ended");
    }
}

/// Serves a connection until it ends, or has to: then `draining` is set at once, and when it still
/// stands a grace later, this gives `None`.
async fn until_drained<C: Future>(
    mut connection: Pin<&mut C>,
    mut phase: watch::Receiver<Phase>,
    draining: &Cell<bool>,
) -> Option<C::Output> {
    let told = phase.clone();
    let drain = async {
        // The sender's end is a drop, which says the same as `Draining`.
        let _ = phase.wait_for(|phase| *phase == Phase::Draining).await;
        draining.set(true);
        sleep(LAST_REQUEST_GRACE).await;
    };
    let mut drain = pin!(drain);
    let mut is_watched = false;
    poll_fn(|cx| {
        // The drain first: a response that comes at the same moment must say that it is the last.
        // And only when it has begun, since to wait for it takes a lock that all connections share;
        // once it is watched, it wakes us.
        if !is_watched || draining.get() || told.has_changed().unwrap_or(true) {
            is_watched = true;
            if drain.as_mut().poll(cx).is_ready() {
                return Poll::Ready(None);
            }
        }
        connection.as_mut().poll(cx).map(Some)
    })
    .await
}
