//! What is said: lines of JSON, with a version, and sockets beside them (`SCM_RIGHTS`, unix(7)).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt,
};
use rustix::process::{Pid, getuid};
use serde::{Deserialize, Serialize};

/// The version of what is said. One that is raised is refused by all before.
pub(super) const VERSION: u32 = 1;

/// Sockets that go with one message of the kernel's (`SCM_MAX_FD` is 253).
const SOCKETS_AT_ONCE: usize = 128;

/// Bytes of a line: more than the names of all listeners need.
const LONGEST_LINE: usize = 1 << 20;

/// A line.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "camelCase")]
pub(super) enum Message {
    /// The successor wants the sockets.
    Ask,
    /// Here they are, in the order of their names.
    Sockets {
        /// The names of their listeners.
        names: Vec<String>,
    },
    /// The successor does not get them.
    Refused {
        /// Why.
        reason: String,
    },
    /// The successor serves.
    Ready,
    /// The predecessor does not serve any more.
    Leaving,
}

#[derive(Serialize)]
struct Line<'m> {
    takeover: u32,
    #[serde(flatten)]
    message: &'m Message,
}

#[derive(Deserialize)]
struct Version {
    takeover: u32,
}

/// What has come and is not read yet.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    bytes: Vec<u8>,
    /// The sockets that came with them.
    pub(super) sockets: Vec<OwnedFd>,
}

// === impl Inbox ===

impl Inbox {
    /// The next line, if it is there.
    ///
    /// # Errors
    ///
    /// A line that cannot be understood.
    pub(super) fn next(&mut self) -> io::Result<Option<Message>> {
        let Some(end) = memchr::memchr(b'\n', &self.bytes) else {
            return Ok(None);
        };
        let line: Vec<u8> = self.bytes.drain(..=end).collect();
        let version = serde_json::from_slice::<Version>(&line).map_err(misunderstood)?;
        if version.takeover != VERSION {
            return Err(invalid(format!(
                "it speaks version {} of the takeover, and this one version {VERSION}",
                version.takeover
            )));
        }
        let message = serde_json::from_slice(&line).map_err(misunderstood)?;
        Ok(Some(message))
    }

    /// Receives what is there.
    ///
    /// # Errors
    ///
    /// What the socket has against it, `UnexpectedEof` when the other side has gone, and more than
    /// is possible.
    pub(super) fn receive(&mut self, from: BorrowedFd<'_>) -> io::Result<()> {
        let mut room = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_AT_ONCE))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut room)];
        let received = recvmsg(from, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(sockets) = message {
                self.sockets.extend(sockets);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(invalid("not every socket has arrived"));
        }
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes.extend_from_slice(&room[..received.bytes]);
        if self.bytes.len() > LONGEST_LINE {
            return Err(invalid("it says too much"));
        }
        Ok(())
    }
}

/// Says something, and sends sockets with it. Never waits: what is said is far less than what the
/// kernel keeps for somebody who does not listen.
///
/// # Errors
///
/// What the socket has against it.
pub(super) fn send(to: impl AsFd, message: &Message, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
    let line = Line {
        takeover: VERSION,
        message,
    };
    let text = serde_json::to_string(&line)?;
    let (first, rest) = sockets.split_at(sockets.len().min(SOCKETS_AT_ONCE));
    send_part(&to, text.as_bytes(), first)?;
    for more in rest.chunks(SOCKETS_AT_ONCE) {
        // Sockets cannot go without a byte.
        send_part(&to, b" ", more)?;
    }
    send_part(&to, b"\n", &[])
}

fn send_part(to: impl AsFd, bytes: &[u8], sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_AT_ONCE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !sockets.is_empty() && !control.push(SendAncillaryMessage::ScmRights(sockets)) {
        return Err(invalid("too many sockets at once"));
    }
    let sent = sendmsg(
        to,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    )?;
    if sent < bytes.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(())
}

/// The process at the other end.
///
/// # Errors
///
/// When it runs under another user, who could take or give any socket.
pub(super) fn peer(stream: impl AsFd) -> io::Result<Pid> {
    let peer = sockopt::socket_peercred(stream)?;
    if peer.uid != getuid() && !peer.uid.is_root() {
        let user = peer.uid.as_raw();
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("it runs under another user ({user})"),
        ));
    }
    Ok(peer.pid)
}

fn misunderstood(error: serde_json::Error) -> io::Error {
    invalid(format!("it cannot be understood: {error}"))
}

fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pass(message: &Message, sockets: &[BorrowedFd<'_>]) -> (Message, Vec<OwnedFd>) {
        let (one, other) = UnixStream::pair().unwrap();
        send(&one, message, sockets).unwrap();
        let mut inbox = Inbox::default();
        loop {
            if let Some(message) = inbox.next().unwrap() {
                return (message, inbox.sockets);
            }
            inbox.receive(other.as_fd()).unwrap();
        }
    }

    #[test]
    fn sockets_arrive_in_order_however_many_there_are() {
        let listeners: Vec<TcpListener> = (0..300)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let names = (0..300).map(|number| format!("listener-{number}"));
        let message = Message::Sockets {
            names: names.collect(),
        };
        let sockets: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
        let (received, sockets) = pass(&message, &sockets);
        assert_eq!(received, message);
        assert_eq!(sockets.len(), listeners.len());
        for (sent, received) in listeners.iter().zip(sockets) {
            let received = TcpListener::from(received).local_addr().unwrap();
            assert_eq!(received, sent.local_addr().unwrap());
        }
    }

    #[test]
    fn what_cannot_be_understood_is_said() {
        for (line, reason) in [
            ("{\"takeover\":2,\"say\":\"dance\"}\n", "version 2"),
            ("{\"takeover\":1,\"say\":\"dance\"}\n", "unknown variant"),
            ("GET / HTTP/1.1\r\n", "cannot be understood"),
        ] {
            let mut inbox = Inbox {
                bytes: line.into(),
                ..Inbox::default()
            };
            let error = inbox.next().unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_line_that_never_ends_is_no_line() {
        let (one, other) = UnixStream::pair().unwrap();
        let mut inbox = Inbox::default();
        let writer = std::thread::spawn(move || {
            use std::io::Write;
            while (&one).write_all(&[b' '; 4096]).is_ok() {}
        });
        let error = loop {
            if let Err(error) = inbox.receive(other.as_fd()) {
                break error;
            }
        };
        assert!(error.to_string().contains("too much"), "{error}");
        drop(other);
        writer.join().unwrap();
    }
}
