//! The outputs that lines go to, each with the queue before it.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::Counter;
use tracing::warn;

use crate::telemetry::metrics::Metrics;

use super::writer::{Message, Writer};
use super::{Batch, Output, Rotation};

/// How many batches may wait to be written: 16 MiB, two seconds and more of a busy machine.
const QUEUE_LENGTH: usize = 256;

/// How long opening a file may take: a network mount that hangs must not hold up a reload for ever.
const OPEN_LIMIT: Duration = Duration::from_secs(2);

/// How often a full queue is tried again.
const QUEUE_TICK: Duration = Duration::from_millis(10);

/// All outputs of the process that are open, or have lines left to write.
pub struct Sinks {
    all: Mutex<Vec<Arc<Sink>>>,
    dropped: Counter,
}

/// An open output. Its thread ends when it is dropped.
pub(super) struct Sink {
    output: Output,
    queue: SyncSender<Message>,
    shared: Arc<Shared>,
    dropped: Counter,
}

/// What the queue's two ends share beside it.
#[derive(Default)]
pub(super) struct Shared {
    /// Asks the writer to open the file anew; apart from the queue, which may be full.
    pub(super) reopen: AtomicBool,
    /// Lines that were handed over and not yet written.
    pub(super) waiting: AtomicU64,
    rotation: Mutex<Option<Rotation>>,
}

// === impl Shared ===

impl Shared {
    fn rotate(&self, rotation: Option<Rotation>) {
        *self.rotation.lock().unwrap_or_else(PoisonError::into_inner) = rotation;
    }

    /// When the file is full, as the configuration in force has it.
    pub(super) fn rotation(&self) -> Option<Rotation> {
        *self.rotation.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Sinks ===

impl Sinks {
    /// No outputs yet.
    pub fn new(metrics: &Metrics) -> Arc<Self> {
        let dropped = metrics.counter("serin_access_log_dropped_total", &[]);
        // Prometheus sees no increase from nothing.
        dropped.increment(0);
        Arc::new(Self {
            all: Mutex::default(),
            dropped,
        })
    }

    pub(super) fn open(
        &self,
        output: &Output,
        rotation: Option<Rotation>,
    ) -> io::Result<Arc<Sink>> {
        let mut all = self.lock();
        // Lines are handed over by those who hold it, so nobody can have more for it.
        all.retain(|sink| Arc::strong_count(sink) > 1 || sink.waiting() > 0);
        if let Some(open) = all.iter().find(|sink| sink.output == *output) {
            open.shared.rotate(rotation);
            return Ok(Arc::clone(open));
        }
        let opened = Arc::new(Sink::open(output, self.dropped.clone())?);
        opened.shared.rotate(rotation);
        all.push(Arc::clone(&opened));
        Ok(opened)
    }

    /// Opens all files anew: they were renamed, and lines go on under the old names.
    pub fn reopen(&self) {
        for sink in &*self.lock() {
            sink.shared.reopen.store(true, Ordering::Release);
            // If the queue is full, the writer is at work and sees it anyway.
            let _ = sink.queue.try_send(Message::Wake);
        }
    }

    /// Waits until all that was handed over is written, but not longer than `limit`; false, and a
    /// warning, when it is not.
    pub fn flush(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut written = true;
        for sink in &*self.lock() {
            if !sink.flush(deadline) {
                let (output, lines) = (&sink.output, sink.waiting());
                warn!(%output, lines, "the end of the access log could not be written in time");
                written = false;
            }
        }
        written
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Sink>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Sinks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sinks").finish_non_exhaustive()
    }
}

// === impl Sink ===

impl Sink {
    fn open(output: &Output, dropped: Counter) -> io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE_LENGTH);
        let sink = Self::before(output, queue, dropped.clone());
        let (output, shared) = (output.clone(), Arc::clone(&sink.shared));
        let (opened, outcome) = sync_channel(1);
        std::thread::Builder::new()
            .name("serin-log".into())
            .spawn(move || match Writer::open(output, shared, dropped) {
                Ok(writer) => {
                    let _ = opened.send(Ok(()));
                    writer.run(&messages);
                }
                // Whoever asked may have given up waiting.
                Err(error) => drop(opened.send(Err(error))),
            })?;
        let in_time = outcome.recv_timeout(OPEN_LIMIT);
        in_time.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        Ok(sink)
    }

    fn before(output: &Output, queue: SyncSender<Message>, dropped: Counter) -> Self {
        Self {
            output: output.clone(),
            queue,
            shared: Arc::default(),
            dropped,
        }
    }

    pub(super) fn hand_over(&self, batch: Batch) {
        let lines = batch.lines;
        self.shared.waiting.fetch_add(lines, Ordering::Relaxed);
        if self.queue.try_send(Message::Lines(batch)).is_err() {
            self.shared.waiting.fetch_sub(lines, Ordering::Relaxed);
            self.dropped.increment(lines);
        }
    }

    fn waiting(&self) -> u64 {
        self.shared.waiting.load(Ordering::Relaxed)
    }

    fn flush(&self, deadline: Instant) -> bool {
        let (sender, written) = sync_channel(1);
        let mut message = Message::Flush(sender);
        while let Err(TrySendError::Full(refused)) = self.queue.try_send(message) {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(QUEUE_TICK);
            message = refused;
        }
        is_told(&written, deadline)
    }
}

fn is_told(written: &Receiver<()>, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    written.recv_timeout(left).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_that_stands_still_costs_lines_and_holds_nobody_up() {
        let metrics = Metrics::new(&[], 1);
        let sinks = Sinks::new(&metrics);
        let (queue, _messages) = sync_channel(1);
        let sink = Arc::new(Sink::before(&Output::Stdout, queue, sinks.dropped.clone()));
        sinks.lock().push(Arc::clone(&sink));
        for _ in 0..3 {
            sink.hand_over(Batch {
                text: b"line\n".to_vec(),
                lines: 1,
            });
        }
        assert!(!sinks.flush(Duration::ZERO));
        let shown = metrics.render();
        assert!(shown.contains("serin_access_log_dropped_total 2\n"));
        assert_eq!(sink.waiting(), 1);
    }
}
