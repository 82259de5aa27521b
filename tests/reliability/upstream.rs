//! The other end: a service that costs little, in a process of its own that can be killed.
//!
//! * `/bytes/N` answers with N bytes;
//! * `/slow/N/MS` answers with N bytes, the second half after so many milliseconds;
//! * everything else answers with the request's body.
//!
//! A line with a number on standard input makes that the status of all responses; the end of
//! standard input ends the process, so that no upstream outlives the program that started it.

use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use crate::Error;
use crate::client::{FILLING, USER};

/// What is printed once connections are accepted.
pub(crate) const READY: &str = "ready";

/// The size of a segment, as over Ethernet. Over the loopback interface it would be 64 KiB, and the
/// kernel's buffers, which are a multiple of it, would hold megabytes for each connection.
pub(crate) const SEGMENT: u32 = 1448;

/// What of a response the kernel takes before Serin reads it. It would grow to megabytes, and thousands of
/// them reach the limit of all connections of the machine (`net.ipv4.tcp_mem`), which then loses segments
/// of everybody's. Elsewhere endpoints have machines of their own.
const SEND_BUFFER: usize = 16 * 1024;

const CHUNK: usize = 64 * 1024;
static FULL: [u8; CHUNK] = [FILLING; CHUNK];
const MOST_HEADERS: usize = 64;

/// Serves until standard input ends.
pub(crate) fn run(_name: &str, address: SocketAddr) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let status = Arc::new(AtomicU16::new(200));
    let told = Arc::clone(&status);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if let Ok(status) = line.trim().parse() {
                told.store(status, Ordering::Relaxed);
            }
        }
        std::process::exit(0);
    });
    runtime.block_on(serve(address, status))
}

async fn serve(address: SocketAddr, status: Arc<AtomicU16>) -> Result<(), Error> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    SockRef::from(&socket).set_tcp_mss(SEGMENT)?;
    SockRef::from(&socket).set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(address)?;
    let listener = socket.listen(4096)?;
    println!("{READY}");
    std::io::stdout().flush()?;
    accept(&listener, &status).await
}

async fn accept(listener: &TcpListener, status: &Arc<AtomicU16>) -> Result<(), Error> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let connection = Connection {
            stream,
            status: Arc::clone(status),
            buffer: Vec::with_capacity(CHUNK),
        };
        // The proxy may close it, or drop it, whenever it likes.
        tokio::spawn(async move { drop(connection.serve().await) });
    }
}

struct Connection {
    stream: TcpStream,
    status: Arc<AtomicU16>,
    /// What was read and not yet understood.
    buffer: Vec<u8>,
}

/// What of a request counts.
struct Asked {
    user: String,
    answer: Answer,
    /// The length of the head.
    head: usize,
    /// The length of the body.
    body: usize,
}

#[derive(Clone, Copy)]
struct Answer {
    length: usize,
    /// Before its second half.
    pause: Option<Duration>,
}

impl Connection {
    async fn serve(mut self) -> Result<(), Error> {
        loop {
            match parse(&self.buffer)? {
                Some(asked) => {
                    self.skip(asked.head, asked.body).await?;
                    self.answer(&asked).await?;
                }
                None if self.stream.read_buf(&mut self.buffer).await? == 0 => return Ok(()),
                None => {}
            }
        }
    }

    /// Reads the request to its end, and keeps what comes after it.
    async fn skip(&mut self, head: usize, body: usize) -> Result<(), Error> {
        let all = head + body;
        let mut seen = self.buffer.len();
        if seen >= all {
            self.buffer.drain(..all);
            return Ok(());
        }
        while seen < all {
            self.buffer.clear();
            let read = self.stream.read_buf(&mut self.buffer).await?;
            if read == 0 {
                return Err("the end in a request".into());
            }
            seen += read;
        }
        self.buffer.drain(..self.buffer.len() - (seen - all));
        Ok(())
    }

    async fn answer(&mut self, asked: &Asked) -> Result<(), Error> {
        let status = self.status.load(Ordering::Relaxed);
        let Answer { length, pause } = match status {
            200 => asked.answer,
            _ => Answer {
                length: 0,
                pause: None,
            },
        };
        let user = &asked.user;
        let head =
            format!("HTTP/1.1 {status} -\r\n{USER}: {user}\r\ncontent-length: {length}\r\n\r\n");
        let mut bytes = head.into_bytes();
        let Some(pause) = pause else {
            return self.write(bytes, length).await;
        };
        bytes.resize(bytes.len() + length / 2, FILLING);
        self.stream.write_all(&bytes).await?;
        sleep(pause).await;
        self.write(Vec::new(), length - length / 2).await
    }

    /// Writes these bytes and so many of filling.
    async fn write(&mut self, mut bytes: Vec<u8>, mut filling: usize) -> Result<(), Error> {
        while !bytes.is_empty() || filling > 0 {
            let now = filling.min(CHUNK);
            bytes.extend_from_slice(&FULL[..now]);
            filling -= now;
            self.stream.write_all(&bytes).await?;
            bytes.clear();
        }
        Ok(())
    }
}

/// `None` when there is more to come.
fn parse(bytes: &[u8]) -> Result<Option<Asked>, Error> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(head) = request.parse(bytes)? else {
        return Ok(None);
    };
    let value = |name: &str| {
        let mut headers = request.headers.iter();
        let header = headers.find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(header.value).ok()
    };
    if value("transfer-encoding").is_some() {
        return Err("nobody here sends a body without its length".into());
    }
    let body = value("content-length").map_or(Ok(0), str::parse)?;
    let user = value(USER).unwrap_or_default().to_owned();
    let answer = answer_to(request.path.unwrap_or("/"), body);
    Ok(Some(Asked {
        user,
        answer,
        head,
        body,
    }))
}

fn answer_to(path: &str, body: usize) -> Answer {
    let mut parts = path.split('/').skip(1);
    let kind = parts.next();
    let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok());
    let (length, pause) = match kind {
        Some("bytes") => (number(), None),
        Some("slow") => (number(), number().map(Duration::from_millis)),
        _ => (None, None),
    };
    Answer {
        length: length.map_or(body, |length| length as usize),
        pause,
    }
}
