//! What systemd, or something that acts like it, gives to a process and wants to hear from it
//! (sd_listen_fds(3), sd_notify(3)).

use std::env;
use std::ffi::OsStr;
use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use listenfd::ListenFd;
use rustix::net::sockopt;
use tracing::{debug, warn};

use crate::server::sockets::{Given, Giver};

/// What there is to say about a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It serves. It is the main process of its service from now on, which it may have taken over.
    Ready,
    /// It is about to end.
    Stopping,
}

/// The sockets that the process was started with. To be asked for once, before there are threads.
pub fn sockets() -> Vec<Given> {
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names: Vec<&str> = names.split(':').collect();
    let mut passed = ListenFd::from_env();
    let given = (0..passed.len()).filter_map(|position| {
        let socket = passed.take_tcp_listener(position);
        match socket.and_then(|socket| socket.map(usable).transpose()) {
            Ok(socket) => Some(Given {
                name: names.get(position).map(|name| (*name).to_owned()),
                socket: socket?,
                giver: Giver::Starter,
            }),
            Err(error) => {
                warn!(%error, "a file descriptor of LISTEN_FDS cannot be used");
                None
            }
        }
    });
    given.collect()
}

fn usable(socket: TcpListener) -> io::Result<TcpListener> {
    if !sockopt::socket_acceptconn(&socket)? {
        return Err(io::Error::other("the socket does not listen"));
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Tells whoever started the process, if he wants to know.
pub fn notify(state: State) {
    let Some(address) = env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let text = match state {
        State::Ready => format!("READY=1\nMAINPID={}\n", std::process::id()),
        State::Stopping => "STOPPING=1\n".to_owned(),
    };
    if let Err(error) = send(&address, text.as_bytes()) {
        debug!(%error, "nobody hears at NOTIFY_SOCKET");
    }
}

fn send(address: &OsStr, text: &[u8]) -> io::Result<()> {
    let address = match address.as_bytes().split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    UnixDatagram::unbound()?
        .send_to_addr(text, &address)
        .map(drop)
}
