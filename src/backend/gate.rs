//! How many requests a backend has at a time: the circuit breaker that keeps a stuck version from
//! holding up everything else.
//!
//! A request that finds no room waits in a queue, first come, first served, until somebody leaves or
//! it has waited for too long. All workers share a gate; a request that finds room touches one
//! counter when it comes and one when it goes.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::routing::rescue::RetryBudget;

/// What a gate lets in; part of a snapshot, while the gate itself outlives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateLimits {
    /// The most requests at a time.
    pub in_flight: usize,
    /// The most that wait.
    pub queue: usize,
    /// The longest that one waits.
    pub queue_timeout: Duration,
}

/// The gate of a backend.
#[derive(Debug, Default)]
pub struct Gate {
    inside: AtomicUsize,
    waiting: AtomicUsize,
    /// Repetitions among those inside.
    retries: AtomicUsize,
    /// Told when somebody leaves and somebody waits.
    room: Notify,
}

/// A place inside; left when it is dropped.
#[derive(Debug)]
pub struct Pass<'g>(&'g Gate);

/// Counts a request as a repetition until it is dropped.
#[derive(Debug)]
pub struct RetryPass<'g>(&'g Gate);

/// A place in the queue.
struct Waiting<'g>(&'g Gate);

/// Why a request is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crowded {
    /// The queue is full as well.
    QueueFull,
    /// It has waited for too long.
    WaitedTooLong,
}

// === impl Gate ===

impl Gate {
    /// Lets a request in if there is room and nobody waits.
    pub fn try_enter(&self, limits: &GateLimits) -> Option<Pass<'_>> {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            return None;
        }
        self.enter_if_room(limits)
    }

    /// Lets a request in, as soon as there is room: at once, if there is and nobody waits.
    ///
    /// # Errors
    ///
    /// See [`Crowded`].
    pub async fn enter(&self, limits: &GateLimits) -> Result<Pass<'_>, Crowded> {
        if let Some(pass) = self.try_enter(limits) {
            return Ok(pass);
        }
        let _waiting = self.queue_up(limits)?;
        let ends = Instant::now() + limits.queue_timeout;
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            // Before looking: who leaves from now on tells us.
            room.as_mut().enable();
            if let Some(pass) = self.enter_if_room(limits) {
                return Ok(pass);
            }
            if timeout_at(ends, room).await.is_err() {
                return Err(Crowded::WaitedTooLong);
            }
        }
    }

    /// Lets a request be repeated, if not too many are.
    pub fn try_retry(&self, budget: &RetryBudget) -> Option<RetryPass<'_>> {
        let in_flight = self.inside() as u64;
        let share = (in_flight * u64::from(budget.share.0) / 1_000_000) as usize;
        let most = share.max(budget.at_least);
        // Lazily: a pass that is made and thrown away would be given back.
        add_below(&self.retries, most).then(|| RetryPass(self))
    }

    /// The requests inside.
    pub fn inside(&self) -> usize {
        self.inside.load(Ordering::Relaxed)
    }

    /// The requests that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    fn enter_if_room(&self, limits: &GateLimits) -> Option<Pass<'_>> {
        add_below(&self.inside, limits.in_flight).then(|| Pass(self))
    }

    fn queue_up(&self, limits: &GateLimits) -> Result<Waiting<'_>, Crowded> {
        if add_below(&self.waiting, limits.queue) {
            Ok(Waiting(self))
        } else {
            Err(Crowded::QueueFull)
        }
    }

    /// Gives a place back. Either who waits has been counted before this looks, or sees the place.
    pub(super) fn leave(&self) {
        self.inside.fetch_sub(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.room.notify_one();
        }
    }
}

// === impl Crowded ===

impl Crowded {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::WaitedTooLong => "queue_timeout",
        }
    }
}

/// Counts one more, unless there are `most` already.
fn add_below(count: &AtomicUsize, most: usize) -> bool {
    let one_more = |now| (now < most).then(|| now + 1);
    count
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more)
        .is_ok()
}

// === impl Pass ===

impl Pass<'_> {
    /// Hands the place on to somebody who will [`leave`](Gate::leave) instead.
    pub(super) fn hand_on(self) {
        std::mem::forget(self);
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

// === impl RetryPass ===

impl Drop for RetryPass<'_> {
    fn drop(&mut self) {
        self.0.retries.fetch_sub(1, Ordering::SeqCst);
    }
}

// === impl Waiting ===

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use crate::routing::split::Ratio;

    use super::*;

    const LIMITS: GateLimits = GateLimits {
        in_flight: 2,
        queue: 1,
        queue_timeout: Duration::from_secs(1),
    };

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_room_waits_and_who_finds_no_queue_does_not() {
        let gate = Gate::default();
        let first = gate.try_enter(&LIMITS).unwrap();
        let _second = gate.try_enter(&LIMITS).unwrap();
        assert!(gate.try_enter(&LIMITS).is_none());
        let (entered, (refused, ())) = tokio::join!(gate.enter(&LIMITS), async {
            tokio::join!(async { gate.enter(&LIMITS).await.err() }, async {
                drop(first);
            })
        });
        assert!(entered.is_ok());
        assert_eq!(refused, Some(Crowded::QueueFull));
        assert_eq!((gate.inside(), gate.waiting()), (2, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_longer_than_allowed() {
        let gate = Gate::default();
        let _all = [gate.try_enter(&LIMITS), gate.try_enter(&LIMITS)];
        let began = Instant::now();
        assert_eq!(
            gate.enter(&LIMITS).await.err(),
            Some(Crowded::WaitedTooLong)
        );
        assert_eq!(began.elapsed(), LIMITS.queue_timeout);
        assert_eq!((gate.inside(), gate.waiting()), (2, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn newcomers_do_not_overtake_who_waits() {
        let gate = Gate::default();
        let one = GateLimits {
            in_flight: 1,
            ..LIMITS
        };
        let first = gate.try_enter(&one).unwrap();
        let has_entered = AtomicBool::new(false);
        tokio::join!(
            async {
                let _pass = gate.enter(&one).await.unwrap();
                has_entered.store(true, Ordering::SeqCst);
            },
            async {
                tokio::task::yield_now().await;
                drop(first);
                assert!(gate.try_enter(&one).is_none(), "it was overtaken");
            }
        );
        assert!(has_entered.into_inner());
        assert!(gate.try_enter(&one).is_some());
    }

    /// On several threads: no place is lost, and nobody waits beside a free one.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn places_are_never_lost_nor_given_twice() {
        let gate = Arc::new(Gate::default());
        let limits = GateLimits {
            in_flight: 3,
            queue: 1000,
            queue_timeout: Duration::from_secs(60),
        };
        let most = Arc::new(AtomicUsize::new(0));
        let visitors = (0..64).map(|_| {
            let (gate, most) = (Arc::clone(&gate), Arc::clone(&most));
            tokio::spawn(async move {
                for _ in 0..200 {
                    let pass = gate.enter(&limits).await.unwrap();
                    most.fetch_max(gate.inside(), Ordering::SeqCst);
                    tokio::task::yield_now().await;
                    drop(pass);
                }
            })
        });
        for visitor in visitors.collect::<Vec<_>>() {
            visitor.await.unwrap();
        }
        assert_eq!((gate.inside(), gate.waiting()), (0, 0));
        assert!(most.load(Ordering::SeqCst) <= 3);
    }

    #[test]
    fn repetitions_are_a_part_of_what_is_in_flight_but_never_none() {
        let gate = Gate::default();
        let wide = GateLimits {
            in_flight: 100,
            ..LIMITS
        };
        let budget = RetryBudget {
            share: Ratio(200_000),
            at_least: 1,
        };
        let first = gate.try_retry(&budget).unwrap();
        assert!(gate.try_retry(&budget).is_none());
        let _inside: Vec<_> = (0..10).map(|_| gate.try_enter(&wide).unwrap()).collect();
        let _second = gate.try_retry(&budget).unwrap();
        assert!(gate.try_retry(&budget).is_none());
        drop(first);
        assert!(gate.try_retry(&budget).is_some());
    }
}
