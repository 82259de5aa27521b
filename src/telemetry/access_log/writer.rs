//! The thread that writes, and that alone waits for the disk.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};

use metrics::Counter;
use rustix::event::{PollFd, PollFlags, poll};
use tracing::{info, warn};

use super::sink::Shared;
use super::{Batch, Output, Rotation};

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
    shared: Arc<Shared>,
    dropped: Counter,
    /// The last write failed.
    failing: bool,
    /// The file ends within a line.
    torn: bool,
    /// It is full and cannot be rotated.
    growing: bool,
}

// === impl Writer ===

impl Writer {
    pub(super) fn open(output: Output, shared: Arc<Shared>, dropped: Counter) -> io::Result<Self> {
        let (file, torn) = open(&output)?;
        Ok(Self {
            output,
            file,
            shared,
            dropped,
            failing: false,
            torn,
            growing: false,
        })
    }

    /// Writes until nobody can send anything any more.
    pub(super) fn run(mut self, messages: &Receiver<Message>) {
        for message in messages {
            if self.shared.reopen.swap(false, Ordering::Acquire) {
                self.open_anew();
            }
            match message {
                Message::Lines(batch) => {
                    self.write(&batch);
                    self.shared
                        .waiting
                        .fetch_sub(batch.lines, Ordering::Relaxed);
                }
                // Whoever asked may have gone.
                Message::Flush(asker) => drop(asker.try_send(())),
                Message::Wake => {}
            }
        }
    }

    fn open_anew(&mut self) {
        let output = &self.output;
        match open(output) {
            Ok(opened) => {
                info!(%output, "access log opened anew");
                self.goes_on_in(opened);
            }
            Err(error) => warn!(
                %output, %error,
                "the access log cannot be opened anew; lines go where they went before"
            ),
        }
    }

    fn write(&mut self, batch: &Batch) {
        if let (Output::File(path), Some(rotation)) = (&self.output, self.shared.rotation()) {
            match rotate(path, &self.file, rotation, batch.text.len() as u64) {
                Ok(Rotated::Yes) => match open(&self.output) {
                    Ok(opened) => self.goes_on_in(opened),
                    Err(error) => self.grows(&error),
                },
                Ok(Rotated::No) => {}
                Err(error) => self.grows(&error),
            }
        }
        let mut rest = &batch.text[..];
        match self.write_all(&mut rest) {
            Ok(()) if self.failing => {
                self.failing = false;
                info!(output = %self.output, "access log lines are written again");
            }
            Ok(()) => {}
            Err(error) => {
                self.dropped
                    .increment(memchr::memchr_iter(b'\n', rest).count() as u64);
                if !self.failing {
                    self.failing = true;
                    let output = &self.output;
                    warn!(%output, %error, "access log lines cannot be written and are dropped");
                }
            }
        }
    }

    fn goes_on_in(&mut self, (file, torn): (File, bool)) {
        (self.file, self.torn) = (file, torn);
        self.growing = false;
    }

    /// The file cannot be rotated; said once, and not with every batch.
    fn grows(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.growing, true) {
            let output = &self.output;
            warn!(%output, %error, "a full access log cannot be rotated, and grows");
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
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.torn = rest[written - 1] != b'\n';
                    *rest = &rest[written..];
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Whoever shares our standard output has made it non-blocking.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    poll(&mut [PollFd::new(&self.file, PollFlags::OUT)], None)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What has become of a file of lines.
enum Rotated {
    /// Another one is at its place, or none.
    Yes,
    /// It is still there.
    No,
}

/// Moves a file out of the way in which there is no room for so many more bytes, and those that were moved
/// before; the oldest is gone. Where somebody else has done so, a process that takes over for instance,
/// there is nothing to do.
fn rotate(path: &Path, file: &File, rotation: Rotation, more: u64) -> io::Result<Rotated> {
    let now = file.metadata()?;
    if now.len() == 0 || now.len() + more <= rotation.size || !now.is_file() {
        return Ok(Rotated::No);
    }
    let is_there = std::fs::metadata(path)
        .is_ok_and(|there| (there.dev(), there.ino()) == (now.dev(), now.ino()));
    if is_there {
        for number in (1..rotation.keep).rev() {
            match std::fs::rename(numbered(path, number), numbered(path, number + 1)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        std::fs::rename(path, numbered(path, 1))?;
    }
    Ok(Rotated::Yes)
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// Opens an output, and tells whether it ends within a line: a crash or a full disk may have cut one.
fn open(output: &Output) -> io::Result<(File, bool)> {
    match output {
        // Not through the standard library's buffer, which looks for line ends.
        Output::Stdout => Ok((io::stdout().as_fd().try_clone_to_owned()?.into(), false)),
        Output::File(path) => {
            refuse_pipe(path)?;
            let file = OpenOptions::new().append(true).create(true).open(path)?;
            Ok((file, ends_within_a_line(path).unwrap_or(false)))
        }
    }
}

fn ends_within_a_line(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    let Some(last) = file.metadata()?.len().checked_sub(1) else {
        return Ok(false);
    };
    let mut byte = [0];
    file.read_exact_at(&mut byte, last)?;
    Ok(byte != *b"\n")
}

/// Opening a pipe would wait for somebody to read it.
fn refuse_pipe(path: &Path) -> io::Result<()> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_fifo() => Err(io::Error::other(
            "is a pipe; `stdout` writes to one that is standard output",
        )),
        Ok(metadata) if metadata.is_dir() => Err(ErrorKind::IsADirectory.into()),
        _ => Ok(()),
    }
}
