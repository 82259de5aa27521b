//! How many requests a backend has at a time: the circuit breaker that keeps a stuck version from
//! holding up everything else.
//!
//! A request that finds no room waits in a queue, first come, first served, until somebody leaves or
//! it has waited for too long. All workers share a gate: a place that becomes free is given to who has
//! waited for longest, whichever worker that is.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use crate::routing::rescue::RetryBudget;

/// What a gate lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateLimits {
    /// The most requests at a time.
    pub in_flight: usize,
    /// The most that wait.
    pub queue: usize,
    /// The longest that one waits.
    pub queue_timeout: Duration,
}

/// The gate of a backend; it outlives snapshots.
#[derive(Debug)]
pub struct Gate {
    /// Those that are free.
    places: Semaphore,
    /// How many there are to be.
    size: AtomicUsize,
    /// How many are inside beyond that, since there were more places before; theirs end with them.
    surplus: AtomicUsize,
    waiting: AtomicUsize,
    /// Repetitions among those inside.
    retries: AtomicUsize,
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
    /// The backend has as many connections as it may have, and none became free in time.
    NoConnection,
}

// === impl Gate ===

impl Gate {
    /// A gate with so many places.
    pub fn new(places: usize) -> Self {
        let places = places.min(Semaphore::MAX_PERMITS);
        Self {
            places: Semaphore::new(places),
            size: AtomicUsize::new(places),
            surplus: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            retries: AtomicUsize::new(0),
        }
    }

    /// Gives it so many places; of more, who waits has one at once. Called by one thread at a time.
    pub fn resize(&self, places: usize) {
        let places = places.min(Semaphore::MAX_PERMITS);
        let before = self.size.swap(places, Ordering::SeqCst);
        if let Some(more) = places.checked_sub(before) {
            let stay = (0..more).take_while(|_| self.end_surplus()).count();
            self.places.add_permits(more - stay);
        } else {
            let fewer = before - places;
            let taken = self.places.forget_permits(fewer);
            self.surplus.fetch_add(fewer - taken, Ordering::SeqCst);
        }
    }

    /// Lets a request in if there is room; there is none while anybody waits.
    pub fn try_enter(&self) -> Option<Pass<'_>> {
        let place = self.places.try_acquire().ok()?;
        // From here on the pass owes it back.
        place.forget();
        Some(Pass(self))
    }

    /// Lets a request in, as soon as there is room: at once, if there is and nobody waits. It does not
    /// wait beyond `end`.
    ///
    /// # Errors
    ///
    /// See [`Crowded`].
    pub async fn enter(
        &self,
        limits: &GateLimits,
        end: Option<Instant>,
    ) -> Result<Pass<'_>, Crowded> {
        if let Some(pass) = self.try_enter() {
            return Ok(pass);
        }
        let _waiting = self.queue_up(limits)?;
        let patience = Instant::now() + limits.queue_timeout;
        let end = end.map_or(patience, |end| end.min(patience));
        match timeout_at(end, self.places.acquire()).await {
            Ok(Ok(place)) => {
                place.forget();
                Ok(Pass(self))
            }
            _ => Err(Crowded::WaitedTooLong),
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
        let places = self.size.load(Ordering::Relaxed) + self.surplus.load(Ordering::Relaxed);
        places.saturating_sub(self.places.available_permits())
    }

    /// The requests that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    fn queue_up(&self, limits: &GateLimits) -> Result<Waiting<'_>, Crowded> {
        if add_below(&self.waiting, limits.queue) {
            Ok(Waiting(self))
        } else {
            Err(Crowded::QueueFull)
        }
    }

    /// Gives a place back.
    pub(super) fn leave(&self) {
        if self.surplus.load(Ordering::Relaxed) == 0 || !self.end_surplus() {
            self.places.add_permits(1);
        }
    }

    /// One place less beyond the size; false when there is none.
    fn end_surplus(&self) -> bool {
        let one_less = |now: usize| now.checked_sub(1);
        let changed = self
            .surplus
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less);
        changed.is_ok()
    }
}

// === impl Crowded ===

impl Crowded {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::WaitedTooLong => "queue_timeout",
            Self::NoConnection => "no_connection",
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
    use std::sync::{Arc, Mutex};

    use crate::routing::split::Ratio;

    use super::*;

    const LIMITS: GateLimits = GateLimits {
        in_flight: 2,
        queue: 1,
        queue_timeout: Duration::from_secs(1),
    };

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_room_waits_and_who_finds_no_queue_does_not() {
        let gate = Gate::new(2);
        let first = gate.try_enter().unwrap();
        let _second = gate.try_enter().unwrap();
        assert!(gate.try_enter().is_none());
        let (entered, (refused, ())) = tokio::join!(gate.enter(&LIMITS, None), async {
            tokio::join!(async { gate.enter(&LIMITS, None).await.err() }, async {
                drop(first);
            })
        });
        assert!(entered.is_ok());
        assert_eq!(refused, Some(Crowded::QueueFull));
        assert_eq!((gate.inside(), gate.waiting()), (2, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_longer_than_allowed_or_than_the_request_may_take() {
        let gate = Gate::new(2);
        let _all = [gate.try_enter(), gate.try_enter()];
        let soon = Duration::from_millis(100);
        for (end, waited) in [
            (None, LIMITS.queue_timeout),
            (Some(soon), soon),
            (Some(LIMITS.queue_timeout * 2), LIMITS.queue_timeout),
        ] {
            let began = Instant::now();
            let entered = gate.enter(&LIMITS, end.map(|end| began + end)).await;
            assert_eq!(entered.err(), Some(Crowded::WaitedTooLong));
            assert_eq!(began.elapsed(), waited);
        }
        assert_eq!((gate.inside(), gate.waiting()), (2, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_came_first_is_served_first_and_newcomers_do_not_overtake() {
        let gate = Gate::new(1);
        let many = GateLimits {
            queue: 10,
            ..LIMITS
        };
        let first = gate.try_enter().unwrap();
        let order = Mutex::new(Vec::new());
        let visit = async |number| {
            let _pass = gate.enter(&many, None).await.unwrap();
            order.lock().unwrap().push(number);
            // Who comes now comes last, and leaves nobody behind.
            assert!(gate.try_enter().is_none());
            tokio::task::yield_now().await;
        };
        tokio::join!(visit(1), visit(2), visit(3), async {
            drop(first);
            assert!(gate.try_enter().is_none(), "who waits was overtaken");
        });
        assert_eq!(*order.lock().unwrap(), [1, 2, 3]);
        assert_eq!((gate.inside(), gate.waiting()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn more_places_are_for_those_who_wait_and_fewer_end_with_those_inside() {
        let gate = Gate::new(1);
        let first = gate.try_enter().unwrap();
        let (second, ()) = tokio::join!(gate.enter(&LIMITS, None), async {
            gate.resize(2);
        });
        let second = second.unwrap();
        gate.resize(0);
        assert_eq!(gate.inside(), 2);
        drop(first);
        assert!(gate.try_enter().is_none());
        // One is inside, and counts.
        gate.resize(1);
        assert!(gate.try_enter().is_none());
        drop(second);
        assert_eq!(gate.inside(), 0);
        let _only = gate.try_enter().unwrap();
        assert!(gate.try_enter().is_none());
    }

    /// On several threads, and while the size changes: no place is lost, and nobody waits beside a
    /// free one.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn places_are_never_lost_nor_given_twice() {
        let gate = Arc::new(Gate::new(3));
        let limits = GateLimits {
            in_flight: 3,
            queue: 1000,
            queue_timeout: Duration::from_secs(60),
        };
        let inside = Arc::new(AtomicUsize::new(0));
        let visitors = (0..64).map(|_| {
            let (gate, inside) = (Arc::clone(&gate), Arc::clone(&inside));
            tokio::spawn(async move {
                for _ in 0..200 {
                    let pass = gate.enter(&limits, None).await.unwrap();
                    assert!(inside.fetch_add(1, Ordering::SeqCst) < 5);
                    tokio::task::yield_now().await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                    drop(pass);
                }
            })
        });
        let visitors: Vec<_> = visitors.collect();
        for places in [5, 1, 4, 2, 5, 3] {
            gate.resize(places);
            tokio::task::yield_now().await;
        }
        for visitor in visitors {
            visitor.await.unwrap();
        }
        assert_eq!((gate.inside(), gate.waiting()), (0, 0));
        let all: Vec<_> = std::iter::from_fn(|| gate.try_enter()).collect();
        assert_eq!(all.len(), 3);
    }

    #[test]
    fn repetitions_are_a_part_of_what_is_in_flight_but_never_none() {
        let gate = Gate::new(100);
        let budget = RetryBudget {
            share: Ratio(200_000),
            at_least: 1,
        };
        let first = gate.try_retry(&budget).unwrap();
        assert!(gate.try_retry(&budget).is_none());
        let _inside: Vec<_> = (0..10).map(|_| gate.try_enter().unwrap()).collect();
        let _second = gate.try_retry(&budget).unwrap();
        assert!(gate.try_retry(&budget).is_none());
        drop(first);
        assert!(gate.try_retry(&budget).is_some());
    }
}
