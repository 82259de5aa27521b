//! Traces: what became of a request, as spans in the format of OpenTelemetry (OTLP 1).
//!
//! ```text
//! Recording  --ended-->  WorkerTracer  -->  queue  -->  exporter thread  -->  collector
//! ids and facts,         sampled, or        bounded     batches, retries      gRPC or HTTP
//! while it lasts         has failed
//! ```
//!
//! A request has a span of kind server, and each attempt to have it answered one of kind client, whose
//! id is what the endpoint is told as its parent. Whether a request is sampled is decided when it comes,
//! so that everybody behind knows; one that fails is exported all the same, since nobody can know ahead.
//! So a request that nobody may ever see costs its ids, and a copy of what its client said.
//!
//! A collector that is slow or gone never holds up a request: when the queue is full, spans are dropped
//! and counted. What spans say is encoded on the exporter's thread.

mod collector;
mod exporter;
mod otlp;
mod span;

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::discovery;
use crate::telemetry::share::Share;
use crate::telemetry::trace_context::TraceContext;
use crate::tls::client::ClientTls;
use crate::url::Url;

use exporter::Exporter;
pub use exporter::Exporters;
pub use span::{AttemptSpan, RequestSpan, SpanContext, TRACESTATE};

/// Which requests are traced, and where their spans go.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Which requests are sampled.
    pub sampling: Sampling,
    /// Where spans go.
    pub destination: Destination,
}

/// Which requests are sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// How many of those that nobody has decided about.
    pub share: Share,
    /// Whether those that fail are exported all the same.
    pub errors: bool,
    /// Which callers have decided for us.
    pub callers: Callers,
}

/// Whose decision to sample a request is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Callers {
    /// That of everybody who has made one.
    All,
    /// That of a listener's trusted proxies: others could have all of their requests sampled.
    Trusted,
    /// Nobody's.
    None,
}

/// Where spans go.
#[derive(Clone, Debug, PartialEq)]
pub struct Destination {
    /// The collector; its path is where spans are taken, by HTTP.
    pub url: Url,
    /// How it is spoken with.
    pub protocol: Protocol,
    /// How its name is resolved.
    pub dns: discovery::Settings,
    /// What is sent along with every export.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// What it is connected to with; `None` without TLS.
    pub tls: Option<CollectorTls>,
    /// How long an export may take, connecting included.
    pub timeout: Duration,
    /// How many requests may wait to be exported.
    pub queue: usize,
    /// What spans say of whom they come from: attributes of the resource.
    pub resource: Vec<(String, String)>,
}

/// What a collector is connected to with.
#[derive(Clone)]
pub struct CollectorTls {
    /// For rustls.
    pub client: ClientTls,
    /// Tells one from another.
    pub fingerprint: u64,
}

/// How a collector is spoken with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// OTLP/gRPC.
    Grpc,
    /// OTLP/HTTP, with protobuf.
    Http,
}

/// What traces requests.
#[derive(Debug)]
pub struct Tracer {
    sampling: Sampling,
    exporter: Arc<Exporter>,
}

/// A tracer as one worker uses it.
pub struct WorkerTracer {
    shared: Arc<Tracer>,
    dice: RefCell<fastrand::Rng>,
}

// === impl Settings ===

impl Settings {
    /// Where a collector listens unless something else is said, for gRPC and for HTTP.
    pub const PORTS: [(Protocol, u16); 2] = [(Protocol::Grpc, 4317), (Protocol::Http, 4318)];

    /// How many requests may wait to be exported unless something else is said.
    pub const QUEUE: usize = 2048;

    /// How long an export may take unless something else is said.
    pub const TIMEOUT: Duration = Duration::from_secs(10);
}

// === impl Protocol ===

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Grpc => "gRPC",
            Self::Http => "HTTP",
        })
    }
}

// === impl CollectorTls ===

impl PartialEq for CollectorTls {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

impl fmt::Debug for CollectorTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CollectorTls").field(&self.client).finish()
    }
}

// === impl Tracer ===

impl Tracer {
    /// Starts the exporter, unless one of `exporters` has this destination.
    ///
    /// # Errors
    ///
    /// A thread that cannot be started.
    pub fn new(settings: &Settings, exporters: &Exporters) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            sampling: settings.sampling,
            exporter: exporters.open(&settings.destination)?,
        }))
    }
}

// === impl WorkerTracer ===

impl WorkerTracer {
    /// A worker's tracer that is in force now, given the one before.
    pub fn follow(before: Option<&Rc<Self>>, now: Option<&Arc<Tracer>>) -> Option<Rc<Self>> {
        let now = now?;
        if let Some(before) = before.filter(|before| Arc::ptr_eq(&before.shared, now)) {
            return Some(Rc::clone(before));
        }
        Some(Rc::new(Self {
            shared: Arc::clone(now),
            dice: RefCell::new(fastrand::Rng::new()),
        }))
    }

    /// Begins the span of a request with these fields. Whether it is sampled has to be
    /// [decided](Self::decide).
    pub fn begin(&self, headers: &HeaderMap) -> SpanContext {
        let mut dice = self.dice.borrow_mut();
        SpanContext::begin(TraceContext::of(headers), &mut dice)
    }

    /// Decides whether a request is sampled, which may come from a trusted proxy.
    pub fn decide(&self, context: &mut SpanContext, is_trusted: bool) {
        let Sampling { share, callers, .. } = self.shared.sampling;
        let is_followed = match callers {
            Callers::All => true,
            Callers::Trusted => is_trusted,
            Callers::None => false,
        };
        if context.is_continued() && is_followed {
            return;
        }
        let die = self.dice.borrow_mut().f64();
        context.sample(share.takes(die));
    }

    /// The id of another span.
    pub fn span_id(&self) -> u64 {
        span::id(&mut self.dice.borrow_mut())
    }

    /// True for a request whose span is exported.
    pub fn exports(&self, context: &SpanContext, has_failed: bool) -> bool {
        context.is_sampled() || has_failed && self.shared.sampling.errors
    }

    /// Hands over a request that has ended, with so many spans, if there is room in the queue.
    pub fn hand_over(&self, spans: usize, request: impl FnOnce() -> RequestSpan) {
        self.shared.exporter.hand_over(spans, request);
    }
}

impl fmt::Debug for WorkerTracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WorkerTracer").field(&self.shared).finish()
    }
}
