//! The access log: a line for each request.
//!
//! ```text
//! Line  --ended-->  WorkerLog  --64 KiB, or a second-->  queue  -->  writer thread  -->  file
//! fields as they    a batch of one                       bounded
//! become known      worker's lines
//! ```
//!
//! A line is formatted by the worker whose request it is, straight into its final form, and costs it
//! no lock and no system call. A disk that is slow, full or gone never holds up a request: when the
//! queue is full, lines are dropped and counted. Lines of different workers are not in order.
//!
//! There is one writer for each output, whatever the format: two of them would tear each other's
//! lines. It lives on until the last line is written, also when no configuration names it any more.

mod filter;
mod line;
mod sink;
mod writer;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

pub use filter::{Candidates, Ended, Filter, Kind};
pub use line::{Line, LogValue};
use sink::Sink;
pub use sink::Sinks;

/// A batch is handed over when it has so many bytes.
const BATCH_SIZE: usize = 64 << 10;

/// How many buffers of ended lines a worker keeps for new ones.
const MOST_SPARE: usize = 256;

/// Buffers that have grown beyond this many bytes are not kept.
const LARGEST_SPARE: usize = 4096;

/// What is written, and where.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where lines go.
    pub output: Output,
    /// How they are written.
    pub format: Format,
    /// How the user's id is written.
    pub user: UserField,
    /// When a file is full, and what becomes of it.
    pub rotation: Option<Rotation>,
    /// Which lines are written.
    pub sampling: Arc<Filter>,
}

/// When a file is full, and what becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// It is full with so many bytes.
    pub size: u64,
    /// How many full ones are kept.
    pub keep: u32,
}

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// The end of this file.
    File(PathBuf),
}

/// How a line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A JSON object.
    Json,
    /// The same fields as `key=value` (logfmt).
    Text,
}

/// How the user's id is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserField {
    /// Its XXH3 hash in hexadecimal digits.
    Hash,
    /// As it is.
    Plain,
    /// Not at all.
    Omit,
}

/// An open access log.
pub struct AccessLog {
    settings: Settings,
    sink: Arc<Sink>,
}

/// One worker's end of an access log.
pub struct WorkerLog {
    shared: Arc<AccessLog>,
    batch: RefCell<Batch>,
    spare: RefCell<Vec<Vec<u8>>>,
    clock: RefCell<Clock>,
    /// False once another log is in force: then nobody flushes this one any more.
    in_force: Cell<bool>,
}

/// Whole lines on their way to the writer.
#[derive(Default)]
struct Batch {
    text: Vec<u8>,
    lines: u64,
}

/// Tells the time of day of an instant, so that a line needs no clock of its own.
struct Clock {
    instant: Instant,
    time: SystemTime,
    /// The second that was last asked for, since 1970, and how it is written.
    second: (u64, String),
}

// === impl Output ===

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("standard output"),
            Self::File(path) => write!(f, "`{}`", path.display()),
        }
    }
}

// === impl AccessLog ===

impl AccessLog {
    /// Opens the output, unless one of `sinks` has it open.
    ///
    /// # Errors
    ///
    /// A file that cannot be opened for appending within two seconds, or is a pipe or a directory.
    pub fn open(settings: &Settings, sinks: &Sinks) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            settings: settings.clone(),
            sink: sinks.open(&settings.output, settings.rotation)?,
        }))
    }

    /// What it was opened with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }
}

impl fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AccessLog").field(&self.settings).finish()
    }
}

// === impl WorkerLog ===

impl WorkerLog {
    /// A worker's end of the log that is in force now, given its end of the one before.
    pub fn follow(before: Option<&Rc<Self>>, now: Option<&Arc<AccessLog>>) -> Option<Rc<Self>> {
        if let (Some(before), Some(now)) = (before, now)
            && Arc::ptr_eq(&before.shared, now)
        {
            return Some(Rc::clone(before));
        }
        if let Some(before) = before {
            before.in_force.set(false);
            before.flush();
        }
        now.map(|now| {
            Rc::new(Self {
                shared: Arc::clone(now),
                batch: RefCell::default(),
                spare: RefCell::default(),
                clock: RefCell::new(Clock::now()),
                in_force: Cell::new(true),
            })
        })
    }

    /// Hands over what there is; called every second, so that no line waits longer.
    pub fn flush(&self) {
        // The clock of the machine may have been set meanwhile.
        *self.clock.borrow_mut() = Clock::now();
        let batch = self.batch.take();
        if batch.lines > 0 {
            self.shared.sink.hand_over(batch);
        }
    }

    fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    fn spare(&self) -> Vec<u8> {
        self.spare.borrow_mut().pop().unwrap_or_default()
    }

    fn take_line(&self, line: Vec<u8>) {
        let mut batch = self.batch.borrow_mut();
        batch.text.extend_from_slice(&line);
        batch.lines += 1;
        let is_full = batch.text.len() >= BATCH_SIZE;
        drop(batch);
        if is_full || !self.in_force.get() {
            self.flush();
        }
        self.take_back(line);
    }

    fn take_back(&self, mut line: Vec<u8>) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() < MOST_SPARE && line.capacity() <= LARGEST_SPARE {
            line.clear();
            spare.push(line);
        }
    }
}

impl Drop for WorkerLog {
    fn drop(&mut self) {
        self.flush();
    }
}

impl fmt::Debug for WorkerLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WorkerLog").field(self.settings()).finish()
    }
}

// === impl Clock ===

impl Clock {
    fn now() -> Self {
        Self {
            instant: Instant::now(),
            time: SystemTime::now(),
            second: (0, String::new()),
        }
    }

    /// Writes the time of day of `instant` as RFC 3339 has it, in UTC and milliseconds.
    fn write(&mut self, instant: Instant, into: &mut Vec<u8>) {
        // The instant may be a little before the clock was read.
        let time = match instant.checked_duration_since(self.instant) {
            Some(after) => self.time.checked_add(after),
            None => self.time.checked_sub(self.instant - instant),
        };
        let since = time
            .and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok())
            .unwrap_or_default();
        let (second, text) = &mut self.second;
        if *second != since.as_secs() || text.is_empty() {
            *second = since.as_secs();
            let whole = SystemTime::UNIX_EPOCH + Duration::from_secs(*second);
            *text = humantime::format_rfc3339_seconds(whole).to_string();
            text.pop();
        }
        into.extend_from_slice(text.as_bytes());
        line::write_thousandths(since.subsec_millis(), into);
        into.push(b'Z');
    }
}

#[cfg(test)]
mod tests;
