//! Time limits of requests and connections, kept to the nearest tick.
//!
//! Nearly every limit is set and never reached. A timer of the runtime costs such a request about a
//! thousand instructions: it is put into a wheel, under a lock, and taken out again. Here a limit is
//! an instant in a slot, and a job of the worker looks at all slots when the first of them may have
//! passed.
//!
//! Only one thread uses them; the lock is there because hyper wants its timers to be `Send`.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// How late a limit may be noticed.
const TICK: Duration = Duration::from_millis(10);

/// The limits of one worker.
#[derive(Debug, Default)]
pub struct Timeouts {
    slots: Mutex<Slots>,
    /// Told when there is a first slot.
    in_use: Notify,
}

/// The limits as a timer of hyper's.
#[derive(Clone, Debug)]
pub struct Timer(pub Arc<Timeouts>);

/// A limit that can be waited for. It frees its slot when it is dropped.
#[derive(Debug)]
pub struct Timeout {
    timeouts: Arc<Timeouts>,
    slot: usize,
}

#[derive(Debug, Default)]
struct Slots {
    all: Vec<Slot>,
    free: Vec<usize>,
    /// No limit passes before that.
    earliest: Option<Instant>,
}

#[derive(Debug, Default)]
struct Slot {
    until: Until,
    waker: Option<Waker>,
}

#[derive(Clone, Copy, Debug, Default)]
enum Until {
    #[default]
    Never,
    Instant(Instant),
    Past,
}

// === impl Timeouts ===

impl Timeouts {
    /// No limits yet. [`run`](Self::run) must be running for any to be noticed.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A limit, which is not set yet.
    pub fn timeout(self: &Arc<Self>) -> Timeout {
        let mut slots = self.lock();
        let slot = slots.free.pop().unwrap_or_else(|| {
            slots.all.push(Slot::default());
            slots.all.len() - 1
        });
        if slots.free.len() + 1 == slots.all.len() {
            self.in_use.notify_one();
        }
        Timeout {
            timeouts: Arc::clone(self),
            slot,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notices limits as they pass; never ends.
    pub async fn run(self: Arc<Self>) {
        loop {
            if self.lock().is_unused() {
                self.in_use.notified().await;
            }
            tokio::time::sleep(TICK).await;
            self.lock().pass(Instant::now());
        }
    }
}

// === impl Slots ===

impl Slots {
    fn is_unused(&self) -> bool {
        self.free.len() == self.all.len()
    }

    fn pass(&mut self, now: Instant) {
        if self.earliest.is_none_or(|earliest| now < earliest) {
            return;
        }
        self.earliest = None;
        for slot in &mut self.all {
            match slot.until {
                Until::Instant(until) if until <= now => {
                    slot.until = Until::Past;
                    if let Some(waker) = slot.waker.take() {
                        waker.wake();
                    }
                }
                Until::Instant(until) => {
                    self.earliest = Some(self.earliest.map_or(until, |first| first.min(until)));
                }
                Until::Never | Until::Past => {}
            }
        }
    }
}

// === impl Timeout ===

impl Timeout {
    /// Sets the limit, whether or not another one has passed; `None` for none.
    pub fn set(&self, until: Option<Instant>) {
        let mut slots = self.timeouts.lock();
        slots.all[self.slot].until = until.map_or(Until::Never, Until::Instant);
        if let Some(until) = until
            && slots.earliest.is_none_or(|earliest| until < earliest)
        {
            slots.earliest = Some(until);
        }
    }

    /// Waits until the limit has passed.
    pub fn poll_passed(&self, cx: &Context<'_>) -> Poll<()> {
        let mut slots = self.timeouts.lock();
        let slot = &mut slots.all[self.slot];
        if matches!(slot.until, Until::Past) {
            return Poll::Ready(());
        }
        if !slot
            .waker
            .as_ref()
            .is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            slot.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// True once the limit has passed.
    pub fn has_passed(&self) -> bool {
        let slots = self.timeouts.lock();
        matches!(slots.all[self.slot].until, Until::Past)
    }
}

impl Future for Timeout {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_passed(cx)
    }
}

impl hyper::rt::Sleep for Timeout {}

impl Drop for Timeout {
    fn drop(&mut self) {
        let mut slots = self.timeouts.lock();
        slots.all[self.slot] = Slot::default();
        slots.free.push(self.slot);
    }
}

// === impl Timer ===

impl hyper::rt::Timer for Timer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.sleep_until(std::time::Instant::now() + duration)
    }

    fn sleep_until(&self, deadline: std::time::Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        let timeout = self.0.timeout();
        timeout.set(Some(Instant::from_std(deadline)));
        Box::pin(timeout)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    async fn with_job<T>(timeouts: &Arc<Timeouts>, test: impl Future<Output = T>) -> T {
        tokio::select! {
            () = Arc::clone(timeouts).run() => unreachable!("it never ends"),
            outcome = test => outcome,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_passes_within_a_tick_and_can_be_set_anew() {
        let timeouts = Timeouts::new();
        with_job(&timeouts, async {
            let timeout = timeouts.timeout();
            for limit in [Duration::from_millis(5), Duration::from_secs(30)] {
                let started = Instant::now();
                timeout.set(Some(started + limit));
                assert!(!timeout.has_passed());
                poll_fn(|cx| timeout.poll_passed(cx)).await;
                let late = started.elapsed() - limit;
                assert!(late <= TICK + Duration::from_millis(1), "{late:?}");
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_was_dropped_or_taken_back_wakes_nobody() {
        let timeouts = Timeouts::new();
        with_job(&timeouts, async {
            let (first, other) = (timeouts.timeout(), timeouts.timeout());
            first.set(Some(Instant::now()));
            other.set(Some(Instant::now()));
            other.set(None);
            drop(first);
            let reused = timeouts.timeout();
            tokio::time::sleep(TICK * 3).await;
            assert!(!reused.has_passed() && !other.has_passed());
            drop((reused, other));
            assert!(timeouts.lock().is_unused());
        })
        .await;
    }
}
