//! How many connections one worker has to the endpoints of one backend.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// Counts connections, and tells who waits for one.
#[derive(Debug, Default)]
pub(super) struct Room {
    taken: Cell<usize>,
    waiting: Cell<usize>,
    /// Told when a connection ends, or can be used again, and somebody waits for that.
    freed: Notify,
}

/// Counts a connection until it is dropped.
#[derive(Debug)]
pub(super) struct Place(Rc<Room>);

/// Counts somebody who waits.
struct Waiting<'r>(&'r Room);

// === impl Room ===

impl Room {
    /// Counts one more, unless there are `most`.
    pub(super) fn take(self: &Rc<Self>, most: usize) -> Option<Place> {
        let taken = self.taken.get();
        if taken >= most {
            return None;
        }
        self.taken.set(taken + 1);
        Some(Place(Rc::clone(self)))
    }

    /// Waits until a connection has ended or can be used again; false when that took too long.
    pub(super) async fn wait(&self, until: Instant) -> bool {
        self.waiting.set(self.waiting.get() + 1);
        let _waiting = Waiting(self);
        timeout_at(until, self.freed.notified()).await.is_ok()
    }

    /// A connection can be used again.
    pub(super) fn tell(&self) {
        if self.waiting.get() > 0 {
            self.freed.notify_one();
        }
    }
}

// === impl Place ===

impl Place {
    /// Where it is counted.
    pub(super) fn room(&self) -> &Rc<Room> {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.set(self.0.taken.get() - 1);
        self.0.tell();
    }
}

// === impl Waiting ===

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}
