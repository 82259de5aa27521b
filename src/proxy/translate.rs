//! Bodies between a client that speaks JSON and a service that speaks gRPC.
//!
//! To everything else such a request is a call of gRPC: what the endpoint, the metrics and errors of
//! our own make of it is turned into HTTP and JSON here, at the very end.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE,
    ETAG, HeaderMap, HeaderName, HeaderValue, TE, TRAILER,
};
use http::request::Parts;
use http::{Method, Response, StatusCode, Uri};
use hyper::body::{Body, Frame};
use percent_encoding::percent_decode;
use serde_json::Value;

use crate::transcode::Call;
use crate::transcode::message::{self, PREFIX};

use super::body::{BodyError, ReplyBody};
use super::grpc;

/// The largest message of a service that is turned into JSON, in bytes, as in gRPC's own libraries.
const LARGEST_MESSAGE: usize = 4 << 20;

/// The largest JSON body where neither route nor listener says otherwise.
///
/// A message takes many times the memory of its text, so this is no more than Envoy buffers for the
/// same end.
pub const LARGEST_BODY: u64 = 1 << 20;

/// What a service is to blame for whose answer makes no sense (RFC 9209 section 2.3).
const NO_ANSWER: &str = "http_protocol_error";

const DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");

/// What says something of a call, and nothing to a client that does not know it.
const OF_GRPC: [HeaderName; 5] = [
    HeaderName::from_static("grpc-status"),
    HeaderName::from_static("grpc-message"),
    HeaderName::from_static("grpc-encoding"),
    HeaderName::from_static("grpc-accept-encoding"),
    DETAILS,
];

/// What says something of the bytes that the service sent, and is not true of their JSON.
const OF_BYTES: [HeaderName; 10] = [
    CONTENT_LENGTH,
    CONTENT_ENCODING,
    CONTENT_RANGE,
    ACCEPT_RANGES,
    ETAG,
    TRAILER,
    HeaderName::from_static("content-md5"),
    HeaderName::from_static("digest"),
    HeaderName::from_static("content-digest"),
    HeaderName::from_static("repr-digest"),
];

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const JSON_LINES: HeaderValue = HeaderValue::from_static("application/x-ndjson");

/// What a request becomes, as its client does not know it.
#[derive(Clone, Debug)]
pub struct Translation(Rc<Translated>);

#[derive(Debug)]
struct Translated {
    call: Call,
    /// The client knows the length of the body from the head, and is sent none.
    is_head: bool,
    /// What is wrong with the request, for its sender.
    fault: RefCell<Option<String>>,
    /// What a reply of our own would have as its status without gRPC, which knows fewer of them.
    replied: Cell<Option<StatusCode>>,
}

/// The messages of a response, as they come.
#[derive(Debug)]
struct Messages {
    body: ReplyBody,
    read: BytesMut,
    /// The trailers, or the head of a response that is nothing but trailers.
    end: Option<HeaderMap>,
}

/// What comes next of a response.
enum Next {
    Message(Bytes),
    /// The end, and what it says.
    End(HeaderMap),
    /// It broke off, or is no gRPC.
    Broken,
}

/// What the beginning of a response says.
enum Beginning {
    /// It is all of it.
    Whole(Vec<u8>),
    /// It is a stream, and this its first line.
    Line(Bytes),
    /// It is a stream, and there is nothing in it.
    Nothing,
    /// The call did not end well.
    Failure(Failure),
}

/// How a call has ended that did not end well.
struct Failure {
    status: grpc::Status,
    message: String,
    /// google.rpc.Status, where the service has said more.
    details: Option<HeaderValue>,
    /// What the service is to blame for where it does not know itself that the call has failed.
    error: Option<&'static str>,
}

/// The rest of a stream, a line for each message.
#[derive(Debug)]
pub struct JsonLines {
    messages: Messages,
    translation: Translation,
    /// What has been turned into JSON and is not sent yet.
    first: Option<Bytes>,
    is_over: bool,
}

// === impl Translation ===

impl Translation {
    /// A request that means this call; its head becomes that of a call of gRPC.
    pub fn new(call: Call, parts: &mut Parts) -> Self {
        let is_head = parts.method == Method::HEAD;
        parts.method = Method::POST;
        if let Ok(uri) = Uri::try_from(call.binding.path.as_str()) {
            parts.uri = uri;
        }
        let headers = &mut parts.headers;
        for name in [CONTENT_LENGTH, ACCEPT_ENCODING, TE, TRAILER] {
            headers.remove(name);
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        Self(Rc::new(Translated {
            call,
            is_head,
            fault: RefCell::default(),
            replied: Cell::default(),
        }))
    }

    /// The message of the call, when all of the request's body is here. What is wrong with it is kept
    /// for the response.
    pub fn message(&self, body: &[u8]) -> Option<Bytes> {
        let message = self.0.call.request(body);
        let keep = |fault| *self.0.fault.borrow_mut() = Some(fault);
        message.map_err(keep).ok()
    }

    /// It is answered by a reply of our own, which has this status where gRPC is not spoken.
    pub fn replied(&self, status: StatusCode) {
        self.0.replied.set(Some(status));
    }

    /// The status in HTTP of a call that has ended so.
    pub fn status(&self, ended: grpc::Status) -> StatusCode {
        self.0.replied.get().unwrap_or_else(|| ended.to_http())
    }

    /// Turns the response of a call into what the client understands. Waits for the first message,
    /// since until then it may turn out to be an error.
    pub async fn translate(self, response: Response<ReplyBody>) -> Response<ReplyBody> {
        let is_head = self.0.is_head;
        let (mut parts, body) = response.into_parts();
        let end = grpc::Status::of(&parts.headers).map(|_| parts.headers.clone());
        // What the service says in HTTP is no answer to a call.
        let is_call = parts.status == StatusCode::OK && grpc::has_content(&parts.headers);
        let mut messages = Messages {
            body,
            read: BytesMut::new(),
            end,
        };
        let headers = &mut parts.headers;
        for name in OF_GRPC.iter().chain(&OF_BYTES) {
            headers.remove(name);
        }
        let beginning = if is_call {
            self.first(&mut messages).await
        } else {
            let status = grpc::Status::from_http(parts.status);
            Beginning::Failure(Failure::new(status, "the service did not answer in gRPC"))
        };
        let (status, kind, body) = match beginning {
            Beginning::Whole(json) => (StatusCode::OK, JSON, ReplyBody::local(json)),
            Beginning::Nothing => (StatusCode::OK, JSON_LINES, ReplyBody::empty()),
            Beginning::Line(first) => {
                let lines = self.lines(messages, first);
                (StatusCode::OK, JSON_LINES, lines)
            }
            Beginning::Failure(failure) => {
                messages.failed(&failure);
                let json = self.describe(&failure).to_string();
                (self.status(failure.status), JSON, ReplyBody::local(json))
            }
        };
        headers.insert(CONTENT_TYPE, kind);
        parts.status = status;
        let body = if is_head {
            without(body, headers)
        } else {
            body
        };
        Response::from_parts(parts, body)
    }

    fn lines(self, messages: Messages, first: Bytes) -> ReplyBody {
        ReplyBody::Lines(Box::new(JsonLines {
            messages,
            translation: self,
            first: Some(first),
            is_over: false,
        }))
    }

    /// Waits for what the beginning of a response says.
    async fn first(&self, messages: &mut Messages) -> Beginning {
        let is_stream = self.0.call.binding.rpc.is_server_streaming();
        let message = match messages.next().await {
            Next::Message(message) => message,
            Next::End(end) if is_stream && is_ok(&end) => return Beginning::Nothing,
            Next::End(end) => return Beginning::Failure(Failure::of(&end)),
            Next::Broken => return Beginning::Failure(Failure::broken()),
        };
        let json = match self.0.call.response(message) {
            Ok(json) => json,
            Err(error) => {
                return Beginning::Failure(Failure::new(grpc::Status::INTERNAL, &error));
            }
        };
        if is_stream {
            return Beginning::Line(line(json));
        }
        // The status comes behind the message.
        match messages.next().await {
            Next::End(end) if is_ok(&end) => Beginning::Whole(json),
            Next::End(end) => Beginning::Failure(Failure::of(&end)),
            Next::Message(_) | Next::Broken => Beginning::Failure(Failure::broken()),
        }
    }

    /// google.rpc.Status; what is wrong with the request is known better here than anywhere else.
    fn describe(&self, failure: &Failure) -> Value {
        let fault = self.0.fault.take();
        let message = fault.as_deref().unwrap_or(&failure.message);
        let details = failure.details.as_ref().map(HeaderValue::as_bytes);
        message::status(&self.0.call.pool, failure.status.code(), message, details)
    }
}

// === impl Failure ===

impl Failure {
    /// What is found here, and the service does not know.
    fn new(status: grpc::Status, message: &str) -> Self {
        Self {
            status,
            message: message.to_owned(),
            details: None,
            error: Some(NO_ANSWER),
        }
    }

    fn broken() -> Self {
        Self::new(
            grpc::Status::UNAVAILABLE,
            "the service broke off its response",
        )
    }

    /// What the end of a call that did not end well says.
    fn of(end: &HeaderMap) -> Self {
        let (status, error) = match grpc::Status::of(end) {
            // A call that ends well without any message has none to give.
            Some(status) if status.is_ok() => (grpc::Status::INTERNAL, Some(NO_ANSWER)),
            Some(status) => (status, None),
            None => (grpc::Status::UNKNOWN, Some(NO_ANSWER)),
        };
        let message = end.get("grpc-message").map(HeaderValue::as_bytes);
        let message = percent_decode(message.unwrap_or_default());
        Self {
            status,
            message: message.decode_utf8_lossy().into_owned(),
            details: end.get(DETAILS).cloned(),
            error,
        }
    }
}

fn is_ok(end: &HeaderMap) -> bool {
    grpc::Status::of(end).is_some_and(grpc::Status::is_ok)
}

/// The reply to HEAD: the length of a body, and none. hyper leaves the body out in HTTP/1 alone.
fn without(body: ReplyBody, headers: &mut HeaderMap) -> ReplyBody {
    if let Some(length) = body.size_hint().exact() {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    ReplyBody::empty()
}

fn line(mut json: Vec<u8>) -> Bytes {
    json.push(b'\n');
    json.into()
}

// === impl Messages ===

impl Messages {
    async fn next(&mut self) -> Next {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        loop {
            match self.take() {
                Ok(Some(message)) => return Poll::Ready(Next::Message(message)),
                Ok(None) => {}
                Err(()) => return Poll::Ready(Next::Broken),
            }
            if let Some(end) = self.end.take() {
                return Poll::Ready(Next::End(end));
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.read.extend_from_slice(&data),
                    Err(frame) => self.end = frame.into_trailers().ok(),
                },
                Some(Err(_)) => return Poll::Ready(Next::Broken),
                None => return Poll::Ready(Next::End(HeaderMap::new())),
            }
        }
    }

    /// What the client is told is what counts, also where the service takes its answer for a good one.
    fn failed(&mut self, failure: &Failure) {
        if let Some(error) = failure.error {
            self.body.broke(failure.status, error);
        }
    }

    /// The next message, if all of it is here.
    fn take(&mut self) -> Result<Option<Bytes>, ()> {
        let Some(prefix) = self.read.first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let [is_compressed, length @ ..] = *prefix;
        let length = u32::from_be_bytes(length) as usize;
        // Nobody has asked for compression.
        if is_compressed != 0 || length > LARGEST_MESSAGE {
            return Err(());
        }
        if self.read.len() < PREFIX + length {
            return Ok(None);
        }
        self.read.advance(PREFIX);
        Ok(Some(self.read.split_to(length).freeze()))
    }
}

// === impl JsonLines ===

impl JsonLines {
    /// The next line. An error behind messages is the last one, in a field of its own.
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        if self.is_over {
            return Poll::Ready(None);
        }
        let failure = match ready!(self.messages.poll_next(cx)) {
            Next::Message(message) => match self.translation.0.call.response(message) {
                Ok(json) => return Poll::Ready(Some(Ok(Frame::data(line(json))))),
                Err(error) => Failure::new(grpc::Status::INTERNAL, &error),
            },
            Next::End(end) if is_ok(&end) => {
                self.is_over = true;
                return Poll::Ready(None);
            }
            Next::End(end) => Failure::of(&end),
            Next::Broken => Failure::broken(),
        };
        self.is_over = true;
        self.messages.failed(&failure);
        let json = serde_json::json!({ "error": self.translation.describe(&failure) });
        let json = json.to_string().into_bytes();
        Poll::Ready(Some(Ok(Frame::data(line(json)))))
    }
}
