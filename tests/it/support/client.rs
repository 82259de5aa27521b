//! Clients: one that speaks HTTP well, and one that sends whatever bytes it is told.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::PATIENCE;

/// A response, read to its end.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) trailers: HeaderMap,
    pub(crate) body: Bytes,
}

/// The body of a request.
pub(crate) type Body = BoxBody<Bytes, Infallible>;

/// A client with one connection that is kept alive.
#[derive(Clone)]
pub(crate) enum Client {
    /// Speaks HTTP/1.1. Clones share the connection, one request after the other.
    Http1(Arc<Mutex<http1::SendRequest<Body>>>),
    /// Speaks HTTP/2. Clones share the connection, all requests at once.
    Http2(http2::SendRequest<Body>),
}

/// A connection without any manners.
pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
    read: Vec<u8>,
}

/// A connection of any kind.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Connection for T {}

/// Sends one GET on a connection of its own.
pub(crate) async fn get(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Reply {
    Client::connect(address).await.get(path, headers).await
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

impl Client {
    /// Speaks HTTP/1.1 without TLS.
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self::http1(dial(address).await).await
    }

    /// Speaks HTTP/2 without TLS, by prior knowledge.
    pub(crate) async fn h2c(address: SocketAddr) -> Self {
        Self::http2(dial(address).await).await
    }

    /// Speaks HTTP/1.1 over a connection that stands.
    pub(crate) async fn http1(stream: impl Connection) -> Self {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        Self::Http1(Arc::new(Mutex::new(sender)))
    }

    /// Speaks HTTP/2 over a connection that stands.
    pub(crate) async fn http2(stream: impl Connection) -> Self {
        let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (sender, connection) = handshake.await.unwrap();
        tokio::spawn(connection);
        Self::Http2(sender)
    }

    pub(crate) async fn get(&mut self, path: &str, headers: &[(&str, &str)]) -> Reply {
        self.send(Method::GET, path, headers, Bytes::new())
            .await
            .unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Sends a request and reads its response to the end. `host` among the headers is what the
    /// request is for, in HTTP/2 as well.
    pub(crate) async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Reply, hyper::Error> {
        let mut request = Request::builder().method(method);
        let host = headers.iter().find(|(name, _)| *name == "host");
        let host = host.map_or("shop.example.com", |(_, host)| host);
        match self {
            Self::Http1(_) => request = request.uri(path).header("host", host),
            Self::Http2(_) => request = request.uri(format!("http://{host}{path}")),
        }
        for (name, value) in headers.iter().filter(|(name, _)| *name != "host") {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into()).boxed()).unwrap();
        let response = self.request(request).await?;
        let (head, body) = response.into_parts();
        let body = timeout(PATIENCE, body.collect()).await;
        let body = body.expect("the whole body")?;
        Ok(Reply {
            status: head.status,
            headers: head.headers,
            trailers: body.trailers().cloned().unwrap_or_default(),
            body: body.to_bytes(),
        })
    }

    /// Bodies of these sizes come back from `/echo` as they were sent.
    pub(crate) async fn echoes(&mut self, sizes: &[usize]) {
        for &size in sizes {
            let body: Vec<u8> = (0..size).map(|position| (position % 251) as u8).collect();
            let sent = self.send(Method::POST, "/echo", &[], body.clone()).await;
            let returned = sent.unwrap().body;
            assert_eq!(returned.len(), size);
            assert!(returned == body, "a body of {size} bytes was changed");
        }
    }

    /// Sends a request as it is, and waits for the head of its response.
    pub(crate) async fn request(
        &mut self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        let response = async {
            match self {
                Self::Http1(sender) => {
                    let mut sender = sender.lock().await;
                    sender.ready().await?;
                    sender.send_request(request).await
                }
                Self::Http2(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await
                }
            }
        };
        timeout(PATIENCE, response).await.expect("a response")
    }
}

async fn dial(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

impl Raw {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self::over(dial(address).await)
    }

    /// A connection that stands already.
    pub(crate) fn over(stream: TcpStream) -> Self {
        Self {
            stream,
            read: Vec::new(),
        }
    }

    pub(crate) async fn send(&mut self, bytes: &str) {
        self.stream.write_all(bytes.as_bytes()).await.unwrap();
    }

    /// Reads until `end` has come, and returns what came up to there.
    pub(crate) async fn read_until(&mut self, end: &str) -> String {
        loop {
            if let Some(position) = find(&self.read, end.as_bytes()) {
                let rest = self.read.split_off(position + end.len());
                let found = std::mem::replace(&mut self.read, rest);
                return String::from_utf8(found).unwrap();
            }
            let mut chunk = [0; 4096];
            let read = self.stream.read(&mut chunk);
            let count = timeout(PATIENCE, read).await.expect(end).unwrap();
            assert!(
                count > 0,
                "closed before {end:?}: {:?}",
                String::from_utf8_lossy(&self.read)
            );
            self.read.extend_from_slice(&chunk[..count]);
        }
    }

    /// Reads to the end of the connection; a reset is an end as well.
    pub(crate) async fn read_to_end(&mut self) -> String {
        let mut chunk = [0; 4096];
        loop {
            let read = timeout(PATIENCE, self.stream.read(&mut chunk)).await;
            match read.expect("the end of the connection") {
                Ok(count @ 1..) => self.read.extend_from_slice(&chunk[..count]),
                Ok(0) | Err(_) => break,
            }
        }
        String::from_utf8_lossy(&std::mem::take(&mut self.read)).into_owned()
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}
