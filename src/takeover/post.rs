//! The predecessor's side: listens at the path, and gives its sockets to whoever asks.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{self, UnixListener};
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::time::Duration;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::server::sockets::Listening;

use super::TakeoverError;
use super::wire::{self, Inbox, Message};

/// How long somebody who connects may take to say what he wants.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// How long accepting rests when it fails.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who connects here waits to be accepted; one is attended to at a time.
const BACKLOG: i32 = 16;

/// Where a successor will find this process; dropped, nobody has seen it.
#[derive(Debug)]
pub struct Post {
    /// `None` once it is in its place.
    listener: Option<UnixListener>,
    path: PathBuf,
    /// Under which name it waits to be put in its place.
    hidden: PathBuf,
}

/// Where a successor finds this process. Dropped, it is gone, unless it has been replaced.
#[derive(Debug)]
pub struct Open {
    listener: tokio::net::UnixListener,
    path: PathBuf,
    /// Device and number of the file.
    file: (u64, u64),
}

/// A process that has the sockets and serves.
#[derive(Debug)]
pub struct Successor(UnixStream);

// === impl Post ===

impl Post {
    /// Makes the socket under another name beside `path`: whatever is wrong with the path shows
    /// before anybody is asked for anything.
    ///
    /// # Errors
    ///
    /// Whatever the operating system has against the path.
    pub fn prepare(path: &Path) -> Result<Self, TakeoverError> {
        let mut hidden = path.as_os_str().to_owned();
        hidden.push(".next");
        let hidden = PathBuf::from(hidden);
        let listener = clear_away(&hidden)
            .and_then(|()| listen_at(&hidden))
            .map_err(|error| TakeoverError::new(path, format!("cannot listen there: {error}")))?;
        Ok(Self {
            listener: Some(listener),
            path: path.to_owned(),
            hidden,
        })
    }

    /// Puts it in its place, where another one may have been. To be called on a runtime.
    ///
    /// # Errors
    ///
    /// Whatever the operating system has against that.
    pub fn open(mut self) -> io::Result<Open> {
        let file = fs::symlink_metadata(&self.hidden)?;
        fs::rename(&self.hidden, &self.path)?;
        let Some(listener) = self.listener.take() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        info!(path = %self.path.display(), "a successor can take over");
        Ok(Open {
            listener: tokio::net::UnixListener::from_std(listener)?,
            path: self.path.clone(),
            file: (file.dev(), file.ino()),
        })
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        // Else what is there is another process's.
        if self.listener.is_some() {
            let _ = fs::remove_file(&self.hidden);
        }
    }
}

/// Takes away what a process has left that was killed before it served.
fn clear_away(hidden: &Path) -> io::Result<()> {
    match fs::symlink_metadata(hidden) {
        Ok(found) if found.file_type().is_socket() => {}
        Ok(_) => {
            let reason = format!("`{}` is something else than a socket", hidden.display());
            return Err(io::Error::other(reason));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    match net::UnixStream::connect(hidden) {
        Ok(_) => Err(io::Error::other("another process is starting")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(hidden),
        Err(error) => Err(error),
    }
}

/// Nobody can connect before it listens, and by then only its owner may.
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    let listening = fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .and_then(|()| Ok(listen(&socket, BACKLOG)?));
    if let Err(error) = listening {
        // Nobody else would.
        let _ = fs::remove_file(path);
        return Err(error);
    }
    Ok(UnixListener::from(socket))
}

// === impl Open ===

impl Open {
    /// Gives `sockets` to whoever asks, one at a time, until somebody serves with them.
    pub async fn succeeded(&self, sockets: impl Fn() -> Vec<Listening>) -> Successor {
        loop {
            let stream = self.accept().await;
            let mut attended = pin!(attend(stream, &sockets));
            match self.refusing(attended.as_mut()).await {
                Ok(successor) => return successor,
                Err(error) => warn!(%error, "a successor did not take over; this process goes on"),
            }
        }
    }

    /// Waits for a successor, and sends away whoever comes meanwhile.
    async fn refusing<T>(&self, mut attended: Pin<&mut impl Future<Output = T>>) -> T {
        loop {
            tokio::select! {
                biased;
                outcome = attended.as_mut() => return outcome,
                stream = self.accept() => refuse(&stream, "another successor is starting"),
            }
        }
    }

    async fn accept(&self) -> UnixStream {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => return stream,
                Err(error) => {
                    warn!(%error, "successors cannot be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let is_ours = |file: fs::Metadata| (file.dev(), file.ino()) == self.file;
        if fs::symlink_metadata(&self.path).is_ok_and(is_ours) {
            // Somebody else may have done so.
            let _ = fs::remove_file(&self.path);
        }
    }
}

// === impl Successor ===

impl Successor {
    /// Tells it that this process does not serve any more.
    pub fn confirm(&self) {
        if let Err(error) = wire::send(&self.0, &Message::Leaving, &[]) {
            warn!(%error, "the successor is gone");
        }
    }
}

/// Gives the sockets to somebody who asks for them, and waits until he serves; for as long as he
/// likes, since nothing is lost meanwhile.
async fn attend(
    stream: UnixStream,
    sockets: &impl Fn() -> Vec<Listening>,
) -> io::Result<Successor> {
    let process = wire::peer(&stream)?.as_raw_pid();
    let mut inbox = Inbox::default();
    let asked = timeout(ASK_LIMIT, hear(&stream, &mut inbox)).await;
    let asked = asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    match asked {
        Ok(Message::Ask) => {}
        Ok(other) => return Err(refused(&stream, format!("{other:?} is no question"))),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(refused(&stream, error.to_string()));
        }
        Err(error) => return Err(error),
    }
    {
        let sockets = sockets();
        let names = sockets.iter().map(|one| one.name.to_string()).collect();
        let descriptors: Vec<_> = sockets.iter().map(|one| one.socket.as_fd()).collect();
        wire::send(&stream, &Message::Sockets { names }, &descriptors)?;
    }
    info!(pid = process, "a successor is starting");
    match hear(&stream, &mut inbox).await? {
        Message::Ready => Ok(Successor(stream)),
        other => Err(refused(
            &stream,
            format!("{other:?} is not what was expected"),
        )),
    }
}

async fn hear(stream: &UnixStream, inbox: &mut Inbox) -> io::Result<Message> {
    loop {
        if let Some(message) = inbox.next()? {
            return Ok(message);
        }
        stream.readable().await?;
        let received = stream.try_io(Interest::READABLE, || inbox.receive(stream.as_fd()));
        match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            received => received?,
        }
    }
}

fn refused(stream: &UnixStream, reason: String) -> io::Error {
    refuse(stream, &reason);
    io::Error::other(reason)
}

fn refuse(stream: &UnixStream, reason: &str) {
    let reason = reason.to_owned();
    if let Err(error) = wire::send(stream, &Message::Refused { reason }, &[]) {
        debug!(%error, "somebody left before he was refused");
    }
}
