//! Where clients come in: sockets, the acceptor that spreads connections, the workers that serve
//! them, and the drain.
//!
//! One thread accepts for all listeners and hands each connection to the worker that has the
//! fewest. The kernel's own spreading (`SO_REUSEPORT`) hashes addresses, so that two long-lived
//! connections may well share one worker while another sits idle; it also loses queued connections
//! when a listener closes, and hides a second process on the port.

pub mod acceptor;
mod conduct;
mod connection;
pub mod slots;
pub mod sockets;
mod streams;
pub mod worker;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::snapshot::{Listener, Snapshot};
use crate::telemetry::metrics::{Level, Metrics};

use sockets::Sockets;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;

/// Where a listener is in its life, in this order; the end of the sender says `Draining` as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It is bound, and takes nothing yet: endpoints are asked first whether they are well.
    Starting,
    /// It takes connections.
    Serving,
    /// It still takes connections, of those who have not heard yet that it is about to go (lame duck);
    /// each ends with the first request that it serves from now on.
    Leaving,
    /// It takes none any more; those it has end with the request they are serving.
    Draining,
    /// The same, and another process has its socket.
    Succeeded,
}

/// An open listener as its owner sees it; dropped, it drains.
#[derive(Debug)]
pub struct OpenListener {
    /// The address in the configuration; its port may be 0.
    pub configured: SocketAddr,
    /// The address that it is bound to.
    pub bound: SocketAddr,
    /// The name in the configuration.
    pub name: Arc<str>,
    /// What counts its connections; another one once it has another name.
    active: Arc<ArcSwap<Level>>,
    phase: watch::Sender<Phase>,
}

/// A listener that takes no connections any more, as long as it still has some.
#[derive(Debug)]
pub struct DrainingListener {
    /// What was configured; its connections go by it to their end.
    pub listener: Listener,
    phase: watch::Sender<Phase>,
}

/// A bound socket on its way to the acceptor.
#[derive(Debug)]
pub struct BoundSocket {
    socket: Arc<TcpListener>,
    bound: SocketAddr,
    name: Arc<str>,
    active: Arc<ArcSwap<Level>>,
    phase: watch::Receiver<Phase>,
}

/// Opens a listener. It accepts nothing until it is handed to the acceptor.
///
/// # Errors
///
/// Whatever the operating system has against the address.
pub fn bind(
    configured: SocketAddr,
    name: &Arc<str>,
    phase: Phase,
    sockets: &Sockets,
    metrics: &Metrics,
) -> io::Result<(OpenListener, BoundSocket)> {
    let socket = sockets.listen(name, configured)?;
    let bound = socket.local_addr()?;
    let active = Arc::new(ArcSwap::new(level(name, metrics)));
    let (sender, phase) = watch::channel(phase);
    let open = OpenListener {
        configured,
        bound,
        name: Arc::clone(name),
        active: Arc::clone(&active),
        phase: sender,
    };
    let name = Arc::clone(name);
    Ok((
        open,
        BoundSocket {
            socket,
            bound,
            name,
            active,
            phase,
        },
    ))
}

fn level(name: &str, metrics: &Metrics) -> Arc<Level> {
    metrics.level("serin_connections_active", &[("listener", name)])
}

impl OpenListener {
    /// Gives it another name; connections that come from now on are counted under that.
    pub fn rename(&mut self, name: &Arc<str>, metrics: &Metrics) {
        if self.name != *name {
            self.name = Arc::clone(name);
            self.active.store(level(name, metrics));
        }
    }

    /// Tells it and its connections where they are.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Begins its drain. `None` when `snapshot` does not know it.
    pub fn drain(self, snapshot: &Snapshot) -> Option<DrainingListener> {
        self.enter(Phase::Draining);
        Some(DrainingListener {
            listener: snapshot.listener(self.bound)?.clone(),
            phase: self.phase,
        })
    }
}

impl DrainingListener {
    /// False once the last connection has ended, and with it the last who listens to the phase.
    pub fn has_connections(&self) -> bool {
        !self.phase.is_closed()
    }
}
