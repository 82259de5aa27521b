//! The successor's side: finds who serves, gets the sockets, and says when it is ready.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt;
use tracing::{info, warn};

use crate::server::sockets::{Given, Giver};

use super::wire::{self, Inbox, Message};

/// How long a process that serves may take for an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The process that serves now.
#[derive(Debug)]
pub struct Predecessor {
    stream: UnixStream,
    inbox: Inbox,
}

/// Why nothing can be taken over.
#[derive(Debug)]
pub struct TakeoverError {
    path: PathBuf,
    reason: String,
}

// === impl Predecessor ===

impl Predecessor {
    /// Asks the process that listens at `path` for its sockets. `None` when there is none, or it
    /// ends at this moment.
    ///
    /// # Errors
    ///
    /// Something else at the path, a process that does not give its sockets, and one that cannot be
    /// understood.
    pub fn find(path: &Path) -> Result<Option<(Self, Vec<Given>)>, TakeoverError> {
        let failed = |reason: String| TakeoverError::new(path, reason);
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(failed("there is something else than a socket".to_owned()));
            }
            _ => {}
        }
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(error) if is_nobody(&error) => return Ok(None),
            Err(error) => return Err(failed(error.to_string())),
        };
        match Self::ask(stream) {
            Ok((predecessor, given)) => Ok(Some((predecessor, given))),
            Err(error) if has_gone(&error) => {
                warn!(path = %path.display(), "the process that served has just ended");
                Ok(None)
            }
            Err(error) => Err(failed(format!("the process that serves: {error}"))),
        }
    }

    fn ask(stream: UnixStream) -> io::Result<(Self, Vec<Given>)> {
        let process = wire::peer(&stream)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let inbox = Inbox::default();
        let mut predecessor = Self { stream, inbox };
        // One that refuses may have closed already; what it said can be read all the same.
        let asked = wire::send(&predecessor.stream, &Message::Ask, &[]);
        let names = match predecessor.hear() {
            Ok(Message::Sockets { names }) => names,
            Ok(Message::Refused { reason }) => return Err(io::Error::other(reason)),
            Ok(other) => return Err(io::Error::other(format!("it says {other:?}"))),
            Err(error) => return Err(asked.err().unwrap_or(error)),
        };
        let sockets = std::mem::take(&mut predecessor.inbox.sockets);
        if sockets.len() != names.len() {
            return Err(io::Error::other("not every socket has arrived"));
        }
        info!(pid = process.as_raw_pid(), listeners = ?names, "taking over");
        let given: io::Result<_> = names.into_iter().zip(sockets).map(given).collect();
        Ok((predecessor, given?))
    }

    /// Says that this process serves, and waits until the other one does not.
    pub fn relieve(mut self) {
        let leaving = wire::send(&self.stream, &Message::Ready, &[]).and_then(|()| self.hear());
        match leaving {
            Ok(Message::Leaving) => info!("taken over"),
            Ok(other) => warn!(
                ?other,
                "taken over, and not understood what was said to that"
            ),
            // It has ended, or it will hear of it.
            Err(error) => warn!(%error, "taken over, without an answer"),
        }
    }

    fn hear(&mut self) -> io::Result<Message> {
        loop {
            if let Some(message) = self.inbox.next()? {
                return Ok(message);
            }
            let received = self.inbox.receive(self.stream.as_fd());
            received.map_err(|error| match error.kind() {
                // That is how the timeout of a socket shows.
                io::ErrorKind::WouldBlock => {
                    io::Error::new(io::ErrorKind::TimedOut, "it does not answer")
                }
                _ => error,
            })?;
        }
    }
}

fn given((name, socket): (String, OwnedFd)) -> io::Result<Given> {
    if !sockopt::socket_acceptconn(&socket)? {
        let reason = format!("what it gives for the listener `{name}` does not listen");
        return Err(io::Error::other(reason));
    }
    Ok(Given {
        name: Some(name),
        socket: TcpListener::from(socket),
        giver: Giver::Predecessor,
    })
}

/// Nothing at the path, or what a process has left behind that ended without care.
fn is_nobody(error: &io::Error) -> bool {
    let kind = error.kind();
    matches!(
        kind,
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn has_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

// === impl TakeoverError ===

impl TakeoverError {
    pub(super) fn new(path: &Path, reason: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}

impl fmt::Display for TakeoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--takeover {}: {}", self.path.display(), self.reason)
    }
}

impl std::error::Error for TakeoverError {}
