//! The connections of the admin listener.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use tokio::task::AbortHandle;
use tracing::debug;

/// Those that are open, the oldest first: no more than `most`, so that they leave descriptors to the listeners.
///
/// Another one takes the place of one that rests, and not the other way round: whoever holds connections must not keep
/// probes out.
#[derive(Debug)]
pub(super) struct Connections {
    most: usize,
    open: VecDeque<Connection>,
}

#[derive(Debug)]
struct Connection {
    task: AbortHandle,
    state: Rc<Activity>,
}

/// Whether a connection is being answered.
#[derive(Debug, Default)]
pub(super) struct Activity(Cell<bool>);

// === impl Connections ===

impl Connections {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            open: VecDeque::new(),
        }
    }

    /// Takes another one, in place of the oldest that rests if there are too many.
    pub(super) fn add(&mut self, task: AbortHandle, state: Rc<Activity>) {
        self.open
            .retain(|connection| !connection.task.is_finished());
        if self.open.len() >= self.most {
            self.close_one();
        }
        self.open.push_back(Connection { task, state });
    }

    /// Closes the oldest that rests; the oldest if none does.
    fn close_one(&mut self) {
        let resting = self.open.iter().position(|one| !one.state.0.get());
        if let Some(connection) = self.open.remove(resting.unwrap_or(0)) {
            debug!("too many admin connections: one is closed");
            connection.task.abort();
        }
    }
}

// === impl Activity ===

impl Activity {
    /// Answers, and rests afterwards.
    pub(super) async fn during<T>(&self, answer: impl Future<Output = T>) -> T {
        self.0.set(true);
        let answer = answer.await;
        self.0.set(false);
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn one_that_rests_makes_room_before_one_that_is_being_answered() {
        let mut connections = Connections::new(2);
        let mut add = |is_busy| {
            let task = tokio::spawn(std::future::pending::<()>());
            let state = Rc::new(Activity(Cell::new(is_busy)));
            connections.add(task.abort_handle(), state);
            task
        };
        let (busy, resting) = (add(true), add(false));
        let third = add(true);
        assert!(resting.await.unwrap_err().is_cancelled());
        let fourth = add(true);
        assert!(busy.await.unwrap_err().is_cancelled(), "all are busy");
        assert!(!third.is_finished() && !fourth.is_finished());
    }
}
