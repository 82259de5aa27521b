//! The upstreams of the comparison: as little as answers HTTP/1.1, so that the proxies are what is measured.
//!
//! `upstream ADDRESS...` answers `GET /N` with a body of N bytes, and a request with a body, once it has
//! come, with `/N` bytes as well. One thread, one epoll.
#![allow(clippy::print_stderr, reason = "a program, not the library")]

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::process::ExitCode;

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

/// The largest body, of which the smaller ones are a part.
const LARGEST: usize = 10 * 1024 * 1024;

struct Connection {
    stream: TcpStream,
    /// What was read of a request head.
    head: Vec<u8>,
    /// Bytes of a request body that are still to come.
    body_left: usize,
    /// The size that the request being read asks for.
    asked: usize,
    /// What is still to be written.
    out: Out,
}

#[derive(Default)]
struct Out {
    head: Vec<u8>,
    body_left: usize,
}

fn main() -> ExitCode {
    let addresses: Vec<String> = std::env::args().skip(1).collect();
    match serve(&addresses) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(addresses: &[String]) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut listeners = Vec::new();
    for (index, address) in addresses.iter().enumerate() {
        let mut listener = TcpListener::bind(address.parse().map_err(io::Error::other)?)?;
        poll.registry()
            .register(&mut listener, Token(index), Interest::READABLE)?;
        listeners.push(listener);
    }
    let body = vec![b'x'; LARGEST];
    let mut chunk = vec![0; 256 * 1024];
    let mut connections: HashMap<Token, Connection> = HashMap::new();
    let mut next = listeners.len();
    let mut events = Events::with_capacity(1024);
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            polled => polled?,
        }
        for event in &events {
            let token = event.token();
            if let Some(listener) = listeners.get(token.0) {
                while let Ok((mut stream, _)) = listener.accept() {
                    stream.set_nodelay(true)?;
                    let token = Token(next);
                    next += 1;
                    let both = Interest::READABLE | Interest::WRITABLE;
                    poll.registry().register(&mut stream, token, both)?;
                    connections.insert(token, Connection::new(stream));
                }
            } else if let Some(connection) = connections.get_mut(&token)
                && connection.go_on(&body, &mut chunk).is_err()
            {
                connections.remove(&token);
            }
        }
    }
}

impl Connection {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            head: Vec::new(),
            body_left: 0,
            asked: 0,
            out: Out::default(),
        }
    }

    /// Reads and writes as far as that goes without waiting; an error is the end.
    fn go_on(&mut self, body: &[u8], chunk: &mut [u8]) -> io::Result<()> {
        if !self.write(body)? {
            return Ok(());
        }
        loop {
            let count = match self.stream.read(chunk) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            self.take(&chunk[..count])?;
            // What is short of the buffer has emptied the socket; the next event tells of more.
            if !self.write(body)? || count < chunk.len() {
                return Ok(());
            }
        }
    }

    fn take(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.body_left > 0 {
                let count = self.body_left.min(bytes.len());
                self.body_left -= count;
                bytes = &bytes[count..];
                if self.body_left == 0 {
                    self.answer();
                }
                continue;
            }
            let before = self.head.len();
            self.head.extend_from_slice(bytes);
            let Some(end) = find(&self.head, b"\r\n\r\n") else {
                return Ok(());
            };
            bytes = &bytes[end - before..];
            self.head.truncate(end);
            let head = std::str::from_utf8(&self.head).map_err(io::Error::other)?;
            self.asked = number_after(head, " /").unwrap_or(0).min(LARGEST);
            self.body_left =
                number_after(&head.to_ascii_lowercase(), "\r\ncontent-length: ").unwrap_or(0);
            self.head.clear();
            if self.body_left == 0 {
                self.answer();
            }
        }
        Ok(())
    }

    fn answer(&mut self) {
        let size = self.asked;
        self.out.head.extend_from_slice(
            format!(
                "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {size}\r\n\r\n"
            )
            .as_bytes(),
        );
        self.out.body_left += size;
    }

    /// True when everything is written.
    fn write(&mut self, body: &[u8]) -> io::Result<bool> {
        while !self.out.head.is_empty() || self.out.body_left > 0 {
            let part = &body[..self.out.body_left.min(body.len())];
            let slices = [io::IoSlice::new(&self.out.head), io::IoSlice::new(part)];
            match self.stream.write_vectored(&slices) {
                Ok(count) => {
                    let of_head = count.min(self.out.head.len());
                    self.out.head.drain(..of_head);
                    self.out.body_left -= count - of_head;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// The position behind `needle`.
fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let windows = haystack.windows(needle.len());
    windows
        .enumerate()
        .find(|(_, window)| *window == needle)
        .map(|(position, _)| position + needle.len())
}

fn number_after(text: &str, before: &str) -> Option<usize> {
    let rest = &text[text.find(before)? + before.len()..];
    let digits = rest.split(|byte: char| !byte.is_ascii_digit()).next()?;
    digits.parse().ok()
}
