//! What a span says, before it is written as OTLP has it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::header::{HeaderMap, HeaderName};
use http::{Method, StatusCode};
use tokio::time::Instant;

use crate::telemetry::metrics::TargetLabels;
use crate::telemetry::trace_context::{TRACEPARENT, TraceContext};

/// What vendors say of a trace.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The span of a request among those of its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanContext {
    /// The trace.
    pub trace_id: u128,
    /// The span.
    pub span_id: u64,
    /// The caller's span; `None` where the trace begins here.
    pub parent_id: Option<u64>,
    flags: u8,
}

/// A request that has ended.
#[derive(Debug)]
pub struct RequestSpan {
    /// Where it belongs.
    pub context: SpanContext,
    /// What vendors say of its trace.
    pub trace_state: Box<str>,
    /// When its head stood.
    pub began: Instant,
    /// When it ended.
    pub ended: Instant,
    /// Its method.
    pub method: Method,
    /// `http` or `https`.
    pub scheme: &'static str,
    /// The host that its client asked for; empty if it named none.
    pub host: Box<str>,
    /// Its path, without the query.
    pub path: Box<str>,
    /// What the client says it is.
    pub user_agent: Option<Box<str>>,
    /// The version of HTTP, such as `1.1`.
    pub protocol: &'static str,
    /// The version of TLS.
    pub tls: Option<&'static str>,
    /// Its client; `None` if it did not get that far.
    pub client: Option<IpAddr>,
    /// What it counts for.
    pub target: Option<TargetLabels>,
    /// Why it went there.
    pub reason: Option<&'static str>,
    /// The rule that said so.
    pub rule: Option<Box<str>>,
    /// The baseline, where it answered what the target had failed.
    pub shielded_by: Option<Arc<str>>,
    /// What the client was sent.
    pub status: StatusCode,
    /// How the call has ended, if it was one.
    pub grpc_status: Option<&'static str>,
    /// What went wrong.
    pub error: Option<&'static str>,
    /// It failed, and not by its client's fault.
    pub has_failed: bool,
    /// Bytes of the bodies.
    pub bytes: (u64, u64),
    /// How often it was sent on its way.
    pub attempts: Vec<AttemptSpan>,
}

/// An attempt to have a request answered.
#[derive(Debug)]
pub struct AttemptSpan {
    /// Its id.
    pub span_id: u64,
    /// When it was sent on its way.
    pub began: Instant,
    /// When it had failed; `None` for one that lasted as long as its request.
    pub ended: Option<Instant>,
    /// The backend.
    pub backend: Arc<str>,
    /// Its version.
    pub version: Arc<str>,
    /// The endpoint.
    pub endpoint: SocketAddr,
    /// What it answered.
    pub status: Option<StatusCode>,
    /// How the call has ended, if it was one.
    pub grpc_status: Option<&'static str>,
    /// By the service's fault.
    pub is_failed_call: bool,
    /// What went wrong.
    pub error: Option<&'static str>,
}

/// An id that is not zero.
pub(super) fn id(dice: &mut fastrand::Rng) -> u64 {
    dice.u64(1..)
}

// === impl SpanContext ===

impl SpanContext {
    /// The caller may have recorded it, and so do others.
    const SAMPLED: u8 = 1;
    /// The trace's id was drawn by lot (W3C Trace Context level 2, section 3.2.2.5.2).
    const RANDOM: u8 = 2;

    /// Begins a span within the caller's, or a trace.
    pub(super) fn begin(caller: Option<TraceContext>, dice: &mut fastrand::Rng) -> Self {
        let span_id = id(dice);
        match caller {
            Some(caller) => Self {
                trace_id: caller.trace_id,
                span_id,
                parent_id: Some(caller.parent_id),
                flags: caller.flags & (Self::SAMPLED | Self::RANDOM),
            },
            None => Self {
                trace_id: dice.u128(1..),
                span_id,
                parent_id: None,
                flags: Self::RANDOM,
            },
        }
    }

    /// True where the caller's trace goes on.
    pub fn is_continued(&self) -> bool {
        self.parent_id.is_some()
    }

    /// True when it is to be exported, and those behind are asked to do the same.
    pub fn is_sampled(&self) -> bool {
        self.flags & Self::SAMPLED != 0
    }

    pub(super) fn sample(&mut self, is_sampled: bool) {
        self.flags = self.flags & !Self::SAMPLED | u8::from(is_sampled);
    }

    /// The flags, as they are passed on.
    pub(super) fn flags(&self) -> u8 {
        self.flags
    }

    /// Tells an endpoint that this span is its caller's. What vendors say of the caller's trace goes
    /// with that trace alone.
    pub fn tell(&self, span_id: u64, headers: &mut HeaderMap) {
        let context = TraceContext {
            trace_id: self.trace_id,
            parent_id: span_id,
            flags: self.flags,
        };
        headers.insert(TRACEPARENT, context.value());
        if !self.is_continued() {
            headers.remove(TRACESTATE);
        }
    }
}
