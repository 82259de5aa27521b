//! A collector, and the connection to it: OTLP/gRPC or OTLP/HTTP (OTLP 1.5), over HTTP/2 or HTTP/1.1.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue, RETRY_AFTER, TE, USER_AGENT};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioExecutor;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use percent_encoding::percent_decode;
use prost::Message;
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use crate::stream::Stream;

use super::{CollectorTls, Destination, Protocol};

/// What the method is called that takes spans, by gRPC.
const METHOD: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

const AGENT: HeaderValue = HeaderValue::from_static(concat!("serin/", env!("CARGO_PKG_VERSION")));

/// The most bytes of an answer that are read.
const LARGEST_ANSWER: usize = 64 << 10;

/// What stands before a message of gRPC: whether it is compressed, and how long it is.
const FRAME: usize = 5;

/// A collector that spans are sent to.
pub(super) struct Collector<'d> {
    destination: &'d Destination,
    connection: Option<Connection>,
}

enum Connection {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// What a collector has taken.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// How many spans it has not.
    pub(super) rejected: u64,
    /// Why.
    pub(super) message: String,
}

/// Why it has taken nothing.
#[derive(Debug)]
pub(super) struct Refusal {
    /// For the log.
    pub(super) reason: String,
    /// Whether it might take the same later, and what it says of when.
    pub(super) again: Option<Again>,
}

/// The same may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// After a while.
    Sometime,
    /// After this time.
    After(Duration),
}

// === impl Collector ===

impl<'d> Collector<'d> {
    pub(super) fn new(destination: &'d Destination) -> Self {
        Self {
            destination,
            connection: None,
        }
    }

    /// Sends a message that exports spans, and waits for the answer.
    pub(super) async fn send(&mut self, message: Bytes) -> Result<Taken, Refusal> {
        let limit = self.destination.timeout;
        let sent = tokio::time::timeout(limit, self.try_send(message)).await;
        let sent = sent.unwrap_or_else(|_| Err(Refusal::gone(format!("no answer in {limit:?}"))));
        if sent.is_err() {
            self.connection = None;
        }
        sent
    }

    async fn try_send(&mut self, message: Bytes) -> Result<Taken, Refusal> {
        let destination = self.destination;
        let connection = match self.connection.take().filter(Connection::is_open) {
            Some(open) => open,
            None => connect(destination).await.map_err(Refusal::gone)?,
        };
        let connection = self.connection.insert(connection);
        let request = match destination.protocol {
            Protocol::Grpc => destination.call(&message),
            Protocol::Http => destination.post(message),
        };
        let request = request.map_err(|error| Refusal::for_good(error.to_string()))?;
        let response = match connection {
            Connection::Http1(sender) => match sender.ready().await {
                Ok(()) => sender.send_request(request).await,
                Err(error) => Err(error),
            },
            Connection::Http2(sender) => sender.send_request(request).await,
        };
        let (head, body) = response.map_err(Refusal::gone)?.into_parts();
        let body = Limited::new(body, LARGEST_ANSWER).collect().await;
        let (trailers, body) = match body {
            Ok(body) => (body.trailers().cloned(), body.to_bytes()),
            // The status counts: what was taken must not be sent again.
            Err(error) if error.is::<LengthLimitError>() => (None, Bytes::new()),
            Err(error) => return Err(Refusal::gone(error)),
        };
        let trailers = trailers.unwrap_or_default();
        let answer = Response::from_parts(head, body);
        match destination.protocol {
            Protocol::Grpc => called(&answer, &trailers),
            Protocol::Http => posted(&answer),
        }
    }
}

async fn connect(destination: &Destination) -> io::Result<Connection> {
    let url = &destination.url;
    let stream = url.connect(&destination.dns).await?;
    stream.set_nodelay(true)?;
    let stream = match &destination.tls {
        None => Stream::plain(stream),
        Some(CollectorTls { client, .. }) => {
            let name = match client.common_name() {
                Some(name) => name.clone(),
                None => ServerName::try_from(url.host.clone()).map_err(io::Error::other)?,
            };
            let connector = TlsConnector::from(Arc::clone(client.config(false)));
            Stream::tls(connector.connect(name, stream).await?)
        }
    };
    // What drives a connection ends with it, or when its sender is dropped.
    match destination.protocol {
        Protocol::Http => {
            let made = http1::handshake(stream).await.map_err(io::Error::other);
            let (sender, connection) = made?;
            drop(tokio::spawn(connection));
            Ok(Connection::Http1(sender))
        }
        Protocol::Grpc => {
            let made = http2::handshake(TokioExecutor::new(), stream).await;
            let (sender, connection) = made.map_err(io::Error::other)?;
            drop(tokio::spawn(connection));
            Ok(Connection::Http2(sender))
        }
    }
}

// === impl Destination ===

impl Destination {
    /// A call of gRPC (its protocol over HTTP/2, section "Requests").
    fn call(&self, message: &[u8]) -> http::Result<Request<Full<Bytes>>> {
        let mut framed = BytesMut::with_capacity(FRAME + message.len());
        framed.put_u8(0);
        // A batch is limited to far less than what fits.
        framed.put_u32(message.len() as u32);
        framed.extend_from_slice(message);
        let uri = Uri::builder()
            .scheme(self.url.scheme())
            .authority(&*self.url.authority)
            .path_and_query(METHOD)
            .build()?;
        let mut request = Request::post(uri).body(Full::new(framed.freeze()))?;
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(TE, HeaderValue::from_static("trailers"));
        self.add_headers(headers);
        Ok(request)
    }

    /// OTLP/HTTP, with protobuf.
    fn post(&self, message: Bytes) -> http::Result<Request<Full<Bytes>>> {
        let mut request = Request::post(Uri::from(self.url.path.clone()))
            .header(HOST, &self.url.authority)
            .body(Full::new(message))?;
        let headers = request.headers_mut();
        let protobuf = HeaderValue::from_static("application/x-protobuf");
        headers.insert(CONTENT_TYPE, protobuf);
        self.add_headers(headers);
        Ok(request)
    }

    fn add_headers(&self, headers: &mut HeaderMap) {
        headers.insert(USER_AGENT, AGENT);
        headers.extend(self.headers.iter().cloned());
    }
}

/// What came of a call of gRPC.
fn called(answer: &Response<Bytes>, trailers: &HeaderMap) -> Result<Taken, Refusal> {
    if answer.status() != StatusCode::OK {
        return Err(Refusal::by_status(answer));
    }
    let field = |name| trailers.get(name).or_else(|| answer.headers().get(name));
    let status = field("grpc-status").and_then(|status| status.to_str().ok()?.parse().ok());
    match status {
        Some(0) => Ok(Taken::of(answer.body().get(FRAME..).unwrap_or_default())),
        Some(status) => {
            let message = field("grpc-message").map_or(&b""[..], HeaderValue::as_bytes);
            let message = percent_decode(message).decode_utf8_lossy();
            let reason = format!("the collector answers with gRPC status {status}: {message}");
            // CANCELLED, DEADLINE_EXCEEDED, ABORTED, OUT_OF_RANGE, UNAVAILABLE, DATA_LOSS: OTLP, "Failures".
            let is_passing = matches!(status, 1 | 4 | 10 | 11 | 14 | 15);
            Err(Refusal {
                reason,
                again: is_passing.then_some(Again::Sometime),
            })
        }
        None => Err(Refusal::for_good(
            "who answers speaks HTTP/2, and no gRPC".to_owned(),
        )),
    }
}

/// What came of a request of OTLP/HTTP.
fn posted(answer: &Response<Bytes>) -> Result<Taken, Refusal> {
    match answer.status().is_success() {
        true => Ok(Taken::of(answer.body())),
        false => Err(Refusal::by_status(answer)),
    }
}

// === impl Connection ===

impl Connection {
    fn is_open(&self) -> bool {
        match self {
            Self::Http1(sender) => !sender.is_closed(),
            Self::Http2(sender) => !sender.is_closed(),
        }
    }
}

// === impl Taken ===

impl Taken {
    /// What an answer says; one that says nothing has taken all.
    fn of(answer: &[u8]) -> Self {
        let partial = ExportTraceServiceResponse::decode(answer)
            .ok()
            .and_then(|response| response.partial_success);
        partial.map_or_else(Self::default, |partial| Self {
            rejected: u64::try_from(partial.rejected_spans).unwrap_or(0),
            message: partial.error_message,
        })
    }
}

// === impl Refusal ===

impl Refusal {
    /// The collector cannot be reached, or has gone.
    fn gone(error: impl fmt::Display) -> Self {
        Self {
            reason: error.to_string(),
            again: Some(Again::Sometime),
        }
    }

    fn for_good(reason: String) -> Self {
        Self {
            reason,
            again: None,
        }
    }

    /// 429, 502, 503 and 504 pass (OTLP, "Retryable Response Codes").
    fn by_status(answer: &Response<Bytes>) -> Self {
        let status = answer.status();
        let is_passing = matches!(status.as_u16(), 429 | 502 | 503 | 504);
        let after = answer.headers().get(RETRY_AFTER);
        let after = after.and_then(|after| after.to_str().ok()?.trim().parse().ok());
        let after = after.map_or(Again::Sometime, |seconds| {
            Again::After(Duration::from_secs(seconds))
        });
        Self {
            reason: format!("the collector answers {status}"),
            again: is_passing.then_some(after),
        }
    }
}
