//! HTTP/2 connections, which many requests share.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::rc::Rc;
use std::time::Instant;

use hyper::body::Body;
use hyper::client::conn::http2::SendRequest;
use tokio::sync::Notify;

use super::SendError;
use super::room::Room;

/// How much of what a peer allows is used before another connection is opened, in percent: one that
/// is full makes requests wait.
const FULL_AT_PERCENT: usize = 80;

/// A connection that many requests share.
#[derive(Debug)]
pub(super) struct Shared<B> {
    pub(super) sender: SendRequest<B>,
    peer: Rc<dyn Peer>,
    /// The most requests at a time, whatever the peer allows.
    limit: usize,
    in_use: Cell<usize>,
    /// How many responses it has brought.
    served: Cell<u64>,
    /// Where it is counted; who waits there may wait for a place on it.
    room: Option<Rc<Room>>,
    idle_since: Cell<Instant>,
}

/// What the other end has said of itself (RFC 9113 section 6.5.2).
pub(super) trait Peer: fmt::Debug {
    /// The most requests at a time.
    fn max_requests(&self) -> usize;

    /// Whether it takes an extended CONNECT (RFC 8441 section 3).
    fn takes_tunnels(&self) -> bool;
}

/// A place on a shared connection, until it is dropped.
#[derive(Debug)]
pub(super) struct Claim<B> {
    shared: Rc<Shared<B>>,
    /// How many responses it had brought by then.
    served_before: u64,
}

/// A shared connection that is being made, for all who would use it: so that a hundred requests at
/// once do not make a hundred connections.
#[derive(Debug, Default)]
pub(super) struct Opening {
    done: Notify,
    failure: RefCell<Option<Failure>>,
}

/// Why there is no connection, for everybody who waited for it.
#[derive(Clone, Debug)]
enum Failure {
    Connect(io::ErrorKind, Option<i32>, String),
    Timeout,
}

// === impl Shared ===

impl<B> Shared<B>
where
    B: Body + 'static,
{
    pub(super) fn new(
        sender: SendRequest<B>,
        peer: Rc<dyn Peer>,
        limit: usize,
        room: Option<Rc<Room>>,
    ) -> Rc<Self> {
        Rc::new(Self {
            sender,
            peer,
            limit,
            in_use: Cell::new(0),
            served: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            room,
        })
    }

    /// A place on it, if it has room.
    pub(super) fn claim(self: &Rc<Self>) -> Option<Claim<B>> {
        if self.sender.is_closed() || self.in_use.get() >= self.room() {
            return None;
        }
        self.in_use.set(self.in_use.get() + 1);
        Some(Claim {
            shared: Rc::clone(self),
            served_before: self.served.get(),
        })
    }

    fn room(&self) -> usize {
        let allowed = self.peer.max_requests().saturating_mul(FULL_AT_PERCENT) / 100;
        allowed.clamp(1, self.limit)
    }

    /// True when nobody has used it since `then`, or nobody can any more.
    pub(super) fn is_unused_since(&self, then: Option<Instant>) -> bool {
        self.sender.is_closed()
            || self.in_use.get() == 0 && then.is_some_and(|then| self.idle_since.get() <= then)
    }
}

// === impl Claim ===

impl<B> Claim<B> {
    pub(super) fn takes_tunnels(&self) -> bool {
        self.shared.peer.takes_tunnels()
    }

    /// It has brought a response.
    pub(super) fn serves(&self) {
        self.shared.served.set(self.shared.served.get() + 1);
    }

    /// True when it has brought any, be it to others.
    pub(super) fn has_served(&self) -> bool {
        self.shared.served.get() > 0
    }

    /// True when it has brought some since this place was taken.
    pub(super) fn is_serving(&self) -> bool {
        self.shared.served.get() > self.served_before
    }

    pub(super) fn sender(&self) -> SendRequest<B> {
        self.shared.sender.clone()
    }
}

impl<B> Drop for Claim<B> {
    fn drop(&mut self) {
        let shared = &self.shared;
        let left = shared.in_use.get() - 1;
        shared.in_use.set(left);
        if left == 0 {
            shared.idle_since.set(Instant::now());
        }
        if let Some(room) = &shared.room {
            room.tell();
        }
    }
}

// === impl Opening ===

impl Opening {
    /// Waits until the connection stands, or cannot be made.
    pub(super) async fn wait(&self) -> Result<(), SendError> {
        self.done.notified().await;
        match &*self.failure.borrow() {
            None => Ok(()),
            Some(failure) => Err(failure.clone().into()),
        }
    }

    /// Tells those who wait that it cannot be made.
    pub(super) fn fail(&self, error: &SendError) {
        let failure = match error {
            SendError::Connect(error) => {
                Failure::Connect(error.kind(), error.raw_os_error(), error.to_string())
            }
            SendError::ConnectTimeout => Failure::Timeout,
            SendError::Exchange(error)
            | SendError::Stale(error)
            | SendError::Unsent(error)
            | SendError::Refused(error) => {
                Failure::Connect(io::ErrorKind::Other, None, error.to_string())
            }
            SendError::Crowded | SendError::NoTunnel => return,
        };
        *self.failure.borrow_mut() = Some(failure);
    }

    /// Wakes those who wait.
    pub(super) fn end(&self) {
        self.done.notify_waiters();
    }
}

impl From<Failure> for SendError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Timeout => Self::ConnectTimeout,
            Failure::Connect(_, Some(code), _) => Self::Connect(io::Error::from_raw_os_error(code)),
            Failure::Connect(kind, None, text) => Self::Connect(io::Error::new(kind, text)),
        }
    }
}
