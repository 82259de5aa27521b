//! The floor of the comparison: what it costs to move bytes between two sockets without looking at them.
//!
//! `relay LISTEN UPSTREAM`. One thread, one epoll, one connection to the upstream for each of a client.
#![allow(clippy::print_stderr, reason = "a program, not the library")]

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::process::ExitCode;

use mio::event::Event;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

/// Both directions of one client's connection.
struct Pair {
    streams: [TcpStream; 2],
    /// What was read from each stream and not yet written to the other.
    pending: [Vec<u8>; 2],
}

fn main() -> ExitCode {
    let addresses: Vec<SocketAddr> = std::env::args()
        .skip(1)
        .filter_map(|address| address.parse().ok())
        .collect();
    let [listen, upstream] = addresses[..] else {
        eprintln!("usage: relay LISTEN UPSTREAM");
        return ExitCode::FAILURE;
    };
    match serve(listen, upstream) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(listen: SocketAddr, upstream: SocketAddr) -> io::Result<()> {
    const LISTENER: Token = Token(0);
    let mut poll = Poll::new()?;
    let mut listener = TcpListener::bind(listen)?;
    poll.registry()
        .register(&mut listener, LISTENER, Interest::READABLE)?;
    // The streams of pair N are the tokens 2 N and 2 N + 1.
    let mut pairs: HashMap<usize, Pair> = HashMap::new();
    let mut next = 1;
    let mut chunk = vec![0; 128 * 1024];
    let mut events = Events::with_capacity(1024);
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            polled => polled?,
        }
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((client, _)) = listener.accept() {
                    let mut streams = [client, TcpStream::connect(upstream)?];
                    for (side, stream) in streams.iter_mut().enumerate() {
                        stream.set_nodelay(true)?;
                        let both = Interest::READABLE | Interest::WRITABLE;
                        poll.registry()
                            .register(stream, Token(2 * next + side), both)?;
                    }
                    let pending = Default::default();
                    pairs.insert(next, Pair { streams, pending });
                    next += 1;
                }
                continue;
            }
            let (number, side) = (event.token().0 / 2, event.token().0 % 2);
            let Some(pair) = pairs.get_mut(&number) else {
                continue;
            };
            if pair.go_on(event, side, &mut chunk).is_err() {
                pairs.remove(&number);
            }
        }
    }
}

impl Pair {
    fn go_on(&mut self, event: &Event, side: usize, chunk: &mut [u8]) -> io::Result<()> {
        if event.is_writable() && !self.pending[1 - side].is_empty() {
            self.relay(1 - side, chunk)?;
        }
        if event.is_readable() {
            self.relay(side, chunk)?;
        }
        Ok(())
    }

    /// Moves what can be moved from one side to the other; an error is the end of both.
    fn relay(&mut self, from: usize, chunk: &mut [u8]) -> io::Result<()> {
        let to = 1 - from;
        loop {
            let pending = &mut self.pending[from];
            if !pending.is_empty() {
                let count = write(&mut self.streams[to], pending)?;
                pending.drain(..count);
                if !pending.is_empty() {
                    return Ok(());
                }
            }
            let count = match self.streams[from].read(chunk) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::NotConnected
                    ) =>
                {
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            let written = write(&mut self.streams[to], &chunk[..count])?;
            if written < count {
                self.pending[from].extend_from_slice(&chunk[written..count]);
                return Ok(());
            }
            // What is short of the buffer has emptied the socket; the next event tells of more.
            if count < chunk.len() {
                return Ok(());
            }
        }
    }
}

fn write(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<usize> {
    match stream.write(bytes) {
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::WouldBlock | ErrorKind::NotConnected
            ) =>
        {
            Ok(0)
        }
        written => written,
    }
}
