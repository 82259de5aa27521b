//! What the span of one request says, noted down while it lasts.
//!
//! Most of them nobody ever sees, and which is known only at the end. So it is kept as it came, and what
//! has to be looked up or written out is left to the end.

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use http::header::{HeaderMap, HeaderValue, USER_AGENT};
use http::{Method, Request, StatusCode, Version};
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::backend::{Backend, Endpoint};
use crate::routing::Decision;
use crate::telemetry::metrics::TargetLabels;
use crate::telemetry::trace::{AttemptSpan, RequestSpan, SpanContext, TRACESTATE, WorkerTracer};

use super::grpc;
use super::origin::{Origin, named_host};

/// Texts of clients are cut off after so many bytes.
const LONGEST_TEXT: usize = 1024;

/// What the span of a request will say.
#[derive(Debug)]
pub(super) struct Recording {
    tracer: Rc<WorkerTracer>,
    context: SpanContext,
    trace_state: Box<str>,
    method: Method,
    version: Version,
    host: Box<str>,
    path: Box<str>,
    user_agent: Option<Box<str>>,
    scheme: &'static str,
    tls: Option<&'static str>,
    client: Option<IpAddr>,
    reason: Option<&'static str>,
    rule: Option<Box<str>>,
    shielded_by: Option<Arc<str>>,
    attempts: SmallVec<[Attempt; 1]>,
}

#[derive(Debug)]
struct Attempt {
    span_id: u64,
    backend: Arc<Backend>,
    endpoint: Arc<Endpoint>,
    began: Instant,
    ended: Option<Instant>,
    status: Option<StatusCode>,
    error: Option<&'static str>,
}

/// What came of a request.
#[derive(Debug)]
pub(super) struct Outcome<'e> {
    pub(super) began: Instant,
    pub(super) ended: Instant,
    pub(super) target: Option<&'e TargetLabels>,
    pub(super) status: StatusCode,
    pub(super) grpc: Option<grpc::Status>,
    pub(super) error: Option<&'static str>,
    pub(super) has_failed: bool,
    pub(super) bytes: (u64, u64),
}

// === impl Recording ===

impl Recording {
    /// Begins with the head of a request.
    pub(super) fn begin<B>(tracer: &Rc<WorkerTracer>, request: &Request<B>) -> Self {
        let headers = request.headers();
        let agent = headers.get(USER_AGENT);
        let context = tracer.begin(headers);
        let state = headers
            .get(TRACESTATE)
            .map_or(&b""[..], HeaderValue::as_bytes);
        Self {
            tracer: Rc::clone(tracer),
            trace_state: text(if context.is_continued() { state } else { b"" }),
            context,
            method: request.method().clone(),
            version: request.version(),
            host: text(named_host(request).unwrap_or_default()),
            path: text(request.uri().path().as_bytes()),
            user_agent: agent.map(|agent| text(agent.as_bytes())),
            scheme: "http",
            tls: None,
            client: None,
            reason: None,
            rule: None,
            shielded_by: None,
            attempts: SmallVec::new(),
        }
    }

    /// Where it belongs.
    pub(super) fn context(&self) -> SpanContext {
        self.context
    }

    /// It is known who sent it, and so whether that has a say in what is sampled.
    pub(super) fn came_from(&mut self, origin: &Origin<'_>) {
        self.tracer.decide(&mut self.context, origin.trusted);
        self.scheme = origin.scheme();
        self.tls = origin.peer.tls.as_ref().map(|tls| tls.version);
        self.client = Some(origin.client);
    }

    pub(super) fn decided(&mut self, decision: &Decision<'_>) {
        self.reason = Some(decision.reason.as_str());
        self.rule = decision.rule.map(Into::into);
    }

    /// The version has failed it, and this one answers instead.
    pub(super) fn shielded_by(&mut self, baseline: &Arc<str>) {
        self.shielded_by = Some(Arc::clone(baseline));
    }

    /// It is on its way to this endpoint, which is told whose child its own span is.
    pub(super) fn sent_to(
        &mut self,
        backend: &Arc<Backend>,
        endpoint: &Arc<Endpoint>,
        now: Instant,
        headers: &mut HeaderMap,
    ) {
        let span_id = self.tracer.span_id();
        self.context.tell(span_id, headers);
        self.attempts.push(Attempt {
            span_id,
            backend: Arc::clone(backend),
            endpoint: Arc::clone(endpoint),
            began: now,
            ended: None,
            status: None,
            error: None,
        });
    }

    /// The head of a response to the last attempt is here.
    pub(super) fn answered(&mut self, status: StatusCode) {
        if let Some(attempt) = self.attempts.last_mut() {
            attempt.status = Some(status);
        }
    }

    /// The last attempt is over, and something was wrong with it, or with what it brought.
    pub(super) fn attempt_failed(&mut self, error: Option<&'static str>) {
        if let Some(attempt) = self.attempts.last_mut() {
            attempt.error = error;
            attempt.ended = Some(Instant::now());
        }
    }

    /// It has ended.
    pub(super) fn end(self, outcome: &Outcome<'_>) {
        let tracer = Rc::clone(&self.tracer);
        if tracer.exports(&self.context, outcome.has_failed) {
            tracer.hand_over(1 + self.attempts.len(), || self.into_span(outcome));
        }
    }

    fn into_span(self, outcome: &Outcome<'_>) -> RequestSpan {
        let attempts = self.attempts.into_iter();
        RequestSpan {
            context: self.context,
            trace_state: self.trace_state,
            began: outcome.began,
            ended: outcome.ended,
            method: self.method,
            scheme: self.scheme,
            host: self.host,
            path: self.path,
            user_agent: self.user_agent,
            protocol: match self.version {
                Version::HTTP_10 => "1.0",
                Version::HTTP_2 => "2",
                _ => "1.1",
            },
            tls: self.tls,
            client: self.client,
            target: outcome.target.cloned(),
            reason: self.reason,
            rule: self.rule,
            shielded_by: self.shielded_by,
            status: outcome.status,
            grpc_status: outcome.grpc.map(grpc::Status::as_str),
            error: outcome.error,
            has_failed: outcome.has_failed,
            bytes: outcome.bytes,
            attempts: attempts.map(|one| one.into_span(outcome)).collect(),
        }
    }
}

// === impl Attempt ===

impl Attempt {
    fn into_span(self, outcome: &Outcome<'_>) -> AttemptSpan {
        // That of the last one is the request's.
        let grpc = outcome.grpc.filter(|_| self.ended.is_none());
        AttemptSpan {
            grpc_status: grpc.map(grpc::Status::as_str),
            is_failed_call: grpc.is_some_and(grpc::Status::is_failure),
            span_id: self.span_id,
            began: self.began,
            ended: self.ended,
            backend: Arc::clone(&self.backend.name),
            version: Arc::clone(&self.backend.version),
            endpoint: self.endpoint.address,
            status: self.status,
            error: self.error,
        }
    }
}

fn text(bytes: &[u8]) -> Box<str> {
    let cut = &bytes[..bytes.len().min(LONGEST_TEXT)];
    String::from_utf8_lossy(cut).into()
}
