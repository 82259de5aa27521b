//! The thread that writes, and that alone waits for the disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};

use metrics::Counter;
use tracing::{info, warn};

use super::{Batch, Output};

/// What the writer is told.
pub(super) enum Message {
    /// Lines to write.
    Lines(Batch),
    /// To say when everything before is written.
    Flush(SyncSender<()>),
    /// To look whether there is something to do.
    Wake,
}

/// Writes batches of lines.
pub(super) struct Writer {
    output: Output,
    file: File,
    reopen: Arc<AtomicBool>,
    dropped: Counter,
    /// The last write failed.
    failing: bool,
    /// The file ends within a line.
    torn: bool,
}

// === impl Writer ===

impl Writer {
    pub(super) fn open(
        output: &Output,
        reopen: Arc<AtomicBool>,
        dropped: Counter,
    ) -> io::Result<Self> {
        // Prometheus sees no increase from nothing.
        dropped.increment(0);
        Ok(Self {
            output: output.clone(),
            file: open(output)?,
            reopen,
            dropped,
            failing: false,
            torn: false,
        })
    }

    /// Writes until nobody can send anything any more.
    pub(super) fn run(mut self, messages: &Receiver<Message>) {
        for message in messages {
            if self.reopen.swap(false, Ordering::Acquire) {
                self.open_anew();
            }
            match message {
                Message::Lines(batch) => self.write(&batch),
                // Whoever asked may have gone.
                Message::Flush(asker) => drop(asker.try_send(())),
                Message::Wake => {}
            }
        }
    }

    fn open_anew(&mut self) {
        match open(&self.output) {
            Ok(file) => {
                self.file = file;
                self.torn = false;
                info!("access log opened anew");
            }
            Err(error) => {
                warn!(%error, "the access log cannot be opened anew; it goes on as it was")
            }
        }
    }

    fn write(&mut self, batch: &Batch) {
        let mut rest = &batch.text[..];
        match self.write_all(&mut rest) {
            Ok(()) if self.failing => {
                self.failing = false;
                info!("access log lines are written again");
            }
            Ok(()) => {}
            Err(error) => {
                self.dropped
                    .increment(memchr::memchr_iter(b'\n', rest).count() as u64);
                if !self.failing {
                    self.failing = true;
                    warn!(%error, "access log lines cannot be written and are dropped");
                }
            }
        }
    }

    /// Writes all, or leaves in `rest` what could not be written.
    fn write_all(&mut self, rest: &mut &[u8]) -> io::Result<()> {
        if self.torn {
            // What is left of a line must not be taken for the beginning of the next one.
            self.file.write_all(b"\n")?;
            self.torn = false;
        }
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.torn = rest[written - 1] != b'\n';
                    *rest = &rest[written..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn open(output: &Output) -> io::Result<File> {
    match output {
        // Not through the standard library's buffer, which looks for line ends.
        Output::Stdout => Ok(io::stdout().as_fd().try_clone_to_owned()?.into()),
        Output::File(path) => {
            refuse_pipe(path)?;
            OpenOptions::new().append(true).create(true).open(path)
        }
    }
}

/// Opening a pipe would wait for somebody to read it.
fn refuse_pipe(path: &Path) -> io::Result<()> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_fifo() => Err(io::Error::other(
            "is a pipe; `stdout` writes to one that is standard output",
        )),
        Ok(metadata) if metadata.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        _ => Ok(()),
    }
}
