//! Clients: one that speaks HTTP well, and one that sends whatever bytes it is told.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::PATIENCE;

/// A response, read to its end.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// A client with one connection that is kept alive.
pub(crate) struct Client {
    sender: SendRequest<Full<Bytes>>,
}

/// A connection without any manners.
pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
    read: Vec<u8>,
}

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
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self { sender }
    }

    pub(crate) async fn get(&mut self, path: &str, headers: &[(&str, &str)]) -> Reply {
        self.send(Method::GET, path, headers, Bytes::new())
            .await
            .unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    pub(crate) async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Reply, hyper::Error> {
        let mut request = Request::builder().method(method).uri(path);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", "shop.example.com");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.sender.ready().await?;
        let request = request.body(Full::new(body.into())).unwrap();
        let response = timeout(PATIENCE, self.sender.send_request(request));
        let (head, body) = response.await.expect("a response")?.into_parts();
        let body = timeout(PATIENCE, body.collect()).await;
        let body = body.expect("the whole body")?.to_bytes();
        Ok(Reply {
            status: head.status,
            headers: head.headers,
            body,
        })
    }
}

impl Raw {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
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
