//! A client for HTTP/1.1 that costs little: requests are made beforehand, and of a response only
//! what is checked is read. It is strict where Serin could be at fault, and retries nothing.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Of what all bodies consist, of requests and of responses.
pub(crate) const FILLING: u8 = b'x';

/// The header with the user's id, which upstreams send back.
pub(crate) const USER: &str = "x-user-id";

const CHUNK: usize = 32 * 1024;
const MOST_HEADERS: usize = 32;

/// A request that can be sent many times.
#[derive(Debug)]
pub(crate) struct Request {
    bytes: Vec<u8>,
    /// Who asks; the response must be for the same.
    user: String,
    /// The length of the response's body.
    answer: usize,
}

/// A response whose body was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The version of the service, by `X-Service-Version`.
    pub(crate) version: Option<String>,
    pub(crate) body: Vec<u8>,
}

/// What went wrong instead of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Broken {
    /// No connection could be made.
    Connect,
    /// The connection ended before the response.
    Reset,
    /// The connection ended in the response.
    CutOff,
    /// The response is none, or not the one to this request.
    Wrong,
    /// The client lost patience.
    Timeout,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// The server has said that it would close.
    last: bool,
}

/// What is known of a response by its head.
struct Head {
    status: u16,
    length: usize,
    version: Option<String>,
    is_for: Option<String>,
    last: bool,
    /// Where the body begins.
    end: usize,
}

// === impl Request ===

impl Request {
    /// A GET of a path that is answered with so many bytes.
    pub(crate) fn get(path: &str, user: &str, answer: usize) -> Self {
        let bytes =
            format!("GET {path} HTTP/1.1\r\nhost: shop.example.com\r\n{USER}: {user}\r\n\r\n");
        Self {
            bytes: bytes.into_bytes(),
            user: user.to_owned(),
            answer,
        }
    }

    /// A POST whose body is sent back.
    pub(crate) fn echo(user: &str, length: usize) -> Self {
        let head = format!(
            "POST /echo HTTP/1.1\r\nhost: shop.example.com\r\n{USER}: {user}\r\ncontent-length: {length}\r\n\r\n"
        );
        let mut bytes = head.into_bytes();
        bytes.resize(bytes.len() + length, FILLING);
        Self {
            bytes,
            user: user.to_owned(),
            answer: length,
        }
    }
}

// === impl Connection ===

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: Vec::with_capacity(CHUNK),
            last: false,
        })
    }

    /// The server has said that it would close it.
    pub(crate) fn is_last(&self) -> bool {
        self.last
    }

    /// Whether another request may be sent: the server has neither closed it nor said so.
    pub(crate) fn is_usable(&self) -> bool {
        let nothing_came = || {
            let read = self.stream.try_read(&mut [0]);
            read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        };
        !self.last && nothing_came()
    }

    /// Sends a request and reads its response. A response of 200 has the body and is for the user
    /// that belong to the request, or it is `Broken::Wrong`.
    pub(crate) async fn exchange(&mut self, request: &Request) -> Result<Answer, Broken> {
        let written = self.stream.write_all(&request.bytes).await;
        written.map_err(|_| Broken::Reset)?;
        let head = self.read_head().await?;
        self.last = head.last;
        let body = self.read_body(&head).await?;
        let is_right = head.is_for.as_deref() == Some(&*request.user)
            && body.len() == request.answer
            && body.iter().all(|byte| *byte == FILLING);
        if head.status == 200 && !is_right {
            return Err(Broken::Wrong);
        }
        Ok(Answer {
            status: head.status,
            version: head.version,
            body,
        })
    }

    /// Asks an admin listener, or anybody else that does not send the user back.
    pub(crate) async fn ask(&mut self, method: &str, path: &str) -> Result<Answer, Broken> {
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n");
        let written = self.stream.write_all(request.as_bytes()).await;
        written.map_err(|_| Broken::Reset)?;
        let head = self.read_head().await?;
        self.last = head.last;
        let body = self.read_body(&head).await?;
        Ok(Answer {
            status: head.status,
            version: head.version,
            body,
        })
    }

    async fn read_head(&mut self) -> Result<Head, Broken> {
        self.buffer.clear();
        loop {
            if let Some(head) = parse(&self.buffer)? {
                return Ok(head);
            }
            let before = self.buffer.len();
            let read = self.stream.read_buf(&mut self.buffer).await;
            match read {
                Ok(count) if count > 0 => {}
                _ if before == 0 => return Err(Broken::Reset),
                _ => return Err(Broken::CutOff),
            }
        }
    }

    async fn read_body(&mut self, head: &Head) -> Result<Vec<u8>, Broken> {
        let mut body = self.buffer.split_off(head.end);
        while body.len() < head.length {
            let read = self.stream.read_buf(&mut body).await;
            if read.unwrap_or(0) == 0 {
                return Err(Broken::CutOff);
            }
        }
        if body.len() > head.length {
            return Err(Broken::Wrong);
        }
        Ok(body)
    }
}

/// `None` when there is more to come.
fn parse(bytes: &[u8]) -> Result<Option<Head>, Broken> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(bytes).map_err(|_| Broken::Wrong)?;
    let httparse::Status::Complete(end) = parsed else {
        return Ok(None);
    };
    let value = |name: &str| {
        let mut headers = response.headers.iter();
        let header = headers.find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(header.value).ok()
    };
    // Neither Serin's own responses nor those of the upstreams are chunked.
    let length = value("content-length").and_then(|length| length.parse().ok());
    Ok(Some(Head {
        status: response.code.unwrap_or(0),
        length: length.ok_or(Broken::Wrong)?,
        version: value("x-service-version").map(str::to_owned),
        is_for: value(USER).map(str::to_owned),
        last: value("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")),
        end,
    }))
}
