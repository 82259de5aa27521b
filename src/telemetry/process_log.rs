//! The log of the process itself, on standard error, which nobody waits for.
//!
//! Whoever reads standard error may stop reading, and where it is a file, the disk may be full. So a
//! line is only handed over, and a thread writes it. Lines that cannot be handed over or written are
//! lost; as soon as one can be written again, a line says how many were.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// How long the end of the log may take to be written when the process ends.
pub const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// How many lines may wait to be written.
const QUEUE_LENGTH: usize = 4096;

/// How often a full queue is tried again.
const QUEUE_TICK: Duration = Duration::from_millis(10);

/// Where lines are handed over.
#[derive(Clone)]
pub struct ProcessLog {
    queue: SyncSender<Message>,
    lost: Arc<AtomicU64>,
}

enum Message {
    Line(Vec<u8>),
    /// To say when everything before is written.
    Flush(SyncSender<()>),
}

// === impl ProcessLog ===

impl ProcessLog {
    /// Starts the thread that writes to `output`.
    ///
    /// # Errors
    ///
    /// When the operating system gives no thread.
    pub fn start(output: impl Write + Send + 'static) -> io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE_LENGTH);
        let lost = Arc::<AtomicU64>::default();
        let log = Self {
            queue,
            lost: Arc::clone(&lost),
        };
        thread::Builder::new()
            .name("serin-stderr".into())
            .spawn(move || write(output, &messages, &lost))?;
        Ok(log)
    }

    /// Waits until all that was handed over is written or lost, but not longer than `limit`.
    pub fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let (sender, written) = sync_channel(1);
        let mut message = Message::Flush(sender);
        while let Err(TrySendError::Full(refused)) = self.queue.try_send(message) {
            if Instant::now() > deadline {
                return;
            }
            thread::sleep(QUEUE_TICK);
            message = refused;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        // Whoever reads standard error may have stopped.
        let _ = written.recv_timeout(left);
    }
}

impl fmt::Debug for ProcessLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessLog").finish_non_exhaustive()
    }
}

impl<'l> MakeWriter<'l> for ProcessLog {
    type Writer = Self;

    fn make_writer(&'l self) -> Self {
        self.clone()
    }
}

/// Each call is a whole line, and never fails: `tracing` would complain on standard error, and that
/// panics.
impl Write for ProcessLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Message::Line(line.to_vec())).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write(mut output: impl Write, messages: &Receiver<Message>, lost: &AtomicU64) {
    for message in messages {
        match message {
            Message::Line(line) => {
                if output.write_all(&line).is_err() {
                    lost.fetch_add(1, Ordering::Relaxed);
                } else {
                    tell_of_lost(&mut output, lost);
                }
            }
            // Whoever asked may have gone.
            Message::Flush(asker) => drop(asker.try_send(())),
        }
    }
}

fn tell_of_lost(output: &mut impl Write, lost: &AtomicU64) {
    let count = lost.swap(0, Ordering::Relaxed);
    if count > 0 && writeln!(output, "{count} lines of this log could not be written").is_err() {
        lost.fetch_add(count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A disk that is full or not.
    #[derive(Clone, Default)]
    struct Disk(Arc<Mutex<(bool, String)>>);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut disk = self.0.lock().unwrap();
            if disk.0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            disk.1 += std::str::from_utf8(bytes).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted_and_told() {
        let disk = Disk::default();
        let mut log = ProcessLog::start(disk.clone()).unwrap();
        for (is_full, line) in [(false, "a\n"), (true, "b\n"), (true, "c\n"), (false, "d\n")] {
            disk.0.lock().unwrap().0 = is_full;
            log.write_all(line.as_bytes()).unwrap();
            ProcessLog::flush(&log, Duration::from_secs(60));
        }
        let written = &disk.0.lock().unwrap().1;
        assert_eq!(written, "a\nd\n2 lines of this log could not be written\n");
    }

    #[test]
    fn a_reader_that_stands_still_holds_nobody_up() {
        let disk = Disk::default();
        let mut log = ProcessLog::start(disk.clone()).unwrap();
        let standing = disk.0.lock().unwrap();
        let lines = QUEUE_LENGTH as u64 + 100;
        for _ in 0..lines {
            log.write_all(b"line\n").unwrap();
        }
        ProcessLog::flush(&log, Duration::ZERO);
        drop(standing);
        ProcessLog::flush(&log, Duration::from_secs(60));
        let written = disk.0.lock().unwrap().1.clone();
        let count = written.lines().filter(|line| *line == "line").count() as u64;
        let told = format!("{} lines of this log could not be written", lines - count);
        assert!(count < lines && written.contains(&told), "{count}");
    }
}
