//! How many clients may be connected at a time, so that they cannot take the file descriptors that
//! everything else needs.
//!
//! Whoever comes beyond that waits in the kernel's queue until somebody leaves; those who have
//! rested for longest are sent away for that.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};
use tokio::time::timeout;

use crate::telemetry::metrics::Metrics;

/// How long room is waited for before it is asked for again.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// The places for connections of clients.
#[derive(Clone)]
pub struct Slots {
    free: Arc<Semaphore>,
    reached: Counter,
}

/// The place of one connection, until it is dropped.
#[derive(Debug)]
pub struct Slot(
    #[expect(dead_code, reason = "it is there to be dropped")] Option<OwnedSemaphorePermit>,
);

// === impl Slots ===

impl Slots {
    /// So many places.
    pub fn new(limit: usize, metrics: &Metrics) -> Self {
        let limit = limit.min(Semaphore::MAX_PERMITS);
        metrics
            .gauge("serin_connections_limit", &[])
            .set(limit as f64);
        Self {
            free: Arc::new(Semaphore::new(limit)),
            reached: metrics.counter("serin_connections_limit_reached_total", &[]),
        }
    }

    /// Waits for a place; who has waited longest gets it. Meanwhile it asks again and again for room to
    /// be made. `None` once there are no places any more.
    pub async fn take(&self, ask_for_room: impl Fn()) -> Option<Slot> {
        let free = Arc::clone(&self.free);
        match Arc::clone(&free).try_acquire_owned() {
            Ok(permit) => Some(Slot(Some(permit))),
            Err(TryAcquireError::Closed) => None,
            Err(TryAcquireError::NoPermits) => {
                self.reached.increment(1);
                let mut place = pin!(free.acquire_owned());
                loop {
                    ask_for_room();
                    if let Ok(place) = timeout(ASK_AGAIN, place.as_mut()).await {
                        return place.ok().map(|permit| Slot(Some(permit)));
                    }
                }
            }
        }
    }

    /// From now on nobody gets a place.
    pub fn close(&self) {
        self.free.close();
    }
}

impl std::fmt::Debug for Slots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let free = self.free.available_permits();
        f.debug_struct("Slots").field("free", &free).finish()
    }
}

// === impl Slot ===

impl Slot {
    /// One more than there are.
    pub fn beyond_the_limit() -> Self {
        Self(None)
    }
}
