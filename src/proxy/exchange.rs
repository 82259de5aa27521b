//! The record of one request, and its single end.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::{HOST, HeaderMap, USER_AGENT};
use http::{Request, Response, StatusCode, Version};
use tokio::time::Instant;

use crate::backend::Endpoint;
use crate::routing::Decision;
use crate::snapshot::Route;
use crate::telemetry::access_log::{Line, LogValue, WorkerLog};
use crate::telemetry::metrics::{MethodLabel, Protocol, TargetMetrics, WorkerMetrics};
use crate::telemetry::trace_context::TraceContext;

use super::body::{self, Progress};
use super::error::client_gone;
use super::grpc;
use super::origin::Origin;
use super::translate::Translation;

/// What the access log says of a client that went away before it had its whole response.
const CLIENT_GONE: &str = "client_gone";

/// What it says of a request that had not ended when the process had to.
const CUT_OFF: &str = "cut_off";

/// Counts and logs one request, whatever becomes of it: it is finished by being dropped, with its
/// response or without.
#[derive(Debug)]
pub struct Exchange {
    metrics: Rc<WorkerMetrics>,
    started: Instant,
    /// When a backend had been chosen.
    decided: Instant,
    method: MethodLabel,
    protocol: Protocol,
    /// What it counts for; for none before it is decided.
    target: Option<Arc<TargetMetrics>>,
    /// What the client is sent; `None` until something is.
    status: Option<StatusCode>,
    /// The request's own body, which may still be on its way.
    request_body: Option<Progress>,
    /// How much of the response's body the client was sent.
    bytes_out: u64,
    /// What it was when it became a tunnel; boxed, since few do.
    tunnel: Option<Box<Tunnelled>>,
    /// The response is whole.
    ended: bool,
    /// How it ends, if it is a call of gRPC.
    grpc: Grpc,
    /// Its client knows HTTP and JSON, and is sent the status that gRPC's means there.
    translation: Option<Translation>,
    /// The upstream brought no whole response.
    has_failed: bool,
    /// Its line in the access log, if there is one; boxed, since an exchange is moved a few times.
    entry: Option<Box<Entry>>,
}

/// A request that has become a tunnel.
#[derive(Debug)]
struct Tunnelled {
    /// After how long.
    after: Duration,
    /// How much has come from the client since.
    bytes_in: u64,
}

/// Whether a request is a call of gRPC, and how that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grpc {
    /// It is none.
    No,
    /// It is one, and nobody has said yet how it ends.
    Open,
    /// It is one, and ended so.
    Ended(grpc::Status),
}

/// A line of the access log, and what is added at its end.
#[derive(Debug)]
struct Entry {
    line: Line,
    upstream: Option<Duration>,
    error: Option<&'static str>,
}

// === impl Exchange ===

impl Exchange {
    /// Begins with the head of a request; it belongs to no route yet.
    pub fn begin<B>(
        metrics: &Rc<WorkerMetrics>,
        log: Option<&Rc<WorkerLog>>,
        request: &Request<B>,
    ) -> Self {
        let started = Instant::now();
        Self {
            metrics: Rc::clone(metrics),
            started,
            decided: started,
            method: MethodLabel::from(request.method()),
            protocol: Protocol::from(request.version()),
            target: None,
            status: None,
            request_body: None,
            bytes_out: 0,
            tunnel: None,
            ended: false,
            grpc: Grpc::No,
            translation: None,
            has_failed: false,
            entry: log.map(|log| Box::new(Entry::begin(log, started, request))),
        }
    }

    /// True for a request whose response has no body.
    pub fn is_head(&self) -> bool {
        self.method.is_head()
    }

    /// It is a call of gRPC.
    pub fn becomes_call(&mut self) {
        self.grpc = Grpc::Open;
    }

    /// It is a call of gRPC from a client that does not know it.
    pub fn becomes_translated_call(&mut self, translation: &Translation) {
        self.becomes_call();
        self.translation = Some(translation.clone());
    }

    /// What makes its response one that its client understands.
    pub fn translation(&self) -> Option<Translation> {
        self.translation.clone()
    }

    /// True for a call of gRPC.
    pub fn is_grpc(&self) -> bool {
        self.grpc != Grpc::No
    }

    /// True for a call of gRPC whose client can be sent trailers at any time.
    pub fn takes_trailers_of_ours(&self) -> bool {
        self.is_grpc() && (self.protocol == Protocol::Http2 || self.translation.is_some())
    }

    /// The head of a response may be nothing but trailers. One that is no gRPC, and an error in
    /// nothing else, shows that there was no call: only its client has called it one.
    pub fn heard_head<B>(&mut self, response: &Response<B>) {
        let is_other =
            response.status() == StatusCode::OK && !grpc::has_content(response.headers());
        if is_other && self.translation.is_none() {
            self.grpc = Grpc::No;
        }
        self.heard(response.headers());
    }

    /// These trailers say how a call of gRPC has ended, if it is one.
    pub fn heard(&mut self, headers: &HeaderMap) {
        if self.is_grpc()
            && let Some(status) = grpc::Status::of(headers)
        {
            self.call_ended(status);
        }
    }

    /// A call of gRPC has ended so.
    pub fn call_ended(&mut self, status: grpc::Status) {
        self.grpc = Grpc::Ended(status);
    }

    /// When the head of the request stood.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// When it was decided which backend it goes to.
    pub fn decided_at(&self) -> Instant {
        self.decided
    }

    /// It is known who sent it.
    pub fn came_from(&mut self, origin: &Origin<'_>) {
        if let Some(entry) = &mut self.entry {
            entry.text("client_ip", &origin.client_text());
            if let Some(tls) = &origin.peer.tls {
                entry.text("tls_version", tls.version);
            }
        }
    }

    /// From now on it counts for the target of this decision.
    pub fn decided(&mut self, route: &Route, decision: &Decision<'_>) {
        let target = &route.targets[decision.target];
        target.metrics.in_flight().rise();
        self.target = Some(Arc::clone(&target.metrics));
        self.decided = Instant::now();
        target
            .metrics
            .count_decision(&self.metrics.all, decision.reason);
        if let Some(entry) = &mut self.entry {
            entry.decided(route, decision);
        }
    }

    /// It is on its way to this endpoint, and its body with it.
    pub fn sent_to(&mut self, endpoint: &Endpoint, body: Progress) {
        self.request_body = Some(body);
        if let Some(entry) = &mut self.entry {
            entry.text("endpoint", &endpoint.authority);
        }
    }

    /// The head of the upstream's response is here.
    pub fn answered(&mut self, status: StatusCode) {
        let upstream = self.decided.elapsed();
        if let Some(target) = &self.target {
            target.count_response_head(self.metrics.worker, upstream);
        }
        if let Some(entry) = &mut self.entry {
            entry.upstream = Some(upstream);
        }
        self.status = Some(status);
    }

    /// From now on it is a tunnel. Its latency ends here, or tunnels that stand for hours would say
    /// that a version is slow.
    pub fn becomes_tunnel(&mut self) {
        self.tunnel = Some(Box::new(Tunnelled {
            after: self.started.elapsed(),
            bytes_in: 0,
        }));
        if let Some(target) = &self.target {
            target.tunnels().rise();
        }
    }

    /// So much has come through the tunnel from the client and from the endpoint.
    pub fn tunnelled(&mut self, from_client: u64, from_endpoint: u64) {
        if let Some(tunnel) = &mut self.tunnel {
            tunnel.bytes_in += from_client;
        }
        self.bytes_out += from_endpoint;
    }

    /// So many bytes of the response's body are on their way to the client.
    pub fn sent(&mut self, bytes: usize) {
        self.bytes_out += bytes as u64;
    }

    /// Its answer is whole: what its client still sends is for nobody.
    pub fn linger(&self) {
        let body = self.request_body.as_ref().and_then(Progress::left);
        // In HTTP/1 that is up to the whole connection.
        if let Some(body) = body.filter(|_| self.protocol == Protocol::Http2) {
            body::linger(body);
        }
    }

    /// The response has come to its end.
    pub fn ended(&mut self) {
        self.ended = true;
    }

    /// The route answers it itself.
    pub fn answered_by_route(&mut self, route: &Route, status: StatusCode) {
        route.metrics.in_flight().rise();
        self.target = Some(Arc::clone(&route.metrics));
        self.status = Some(status);
        self.ended();
        if let Some(entry) = &mut self.entry {
            entry.text("route", &route.name);
        }
    }

    /// The client is sent a reply of our own with a body of so many bytes, because of this error.
    pub fn replied(&mut self, status: StatusCode, error: &'static str, length: usize) {
        self.status = Some(status);
        if status == client_gone() {
            return;
        }
        self.ended();
        self.failed(error);
        if !self.method.is_head() {
            self.sent(length);
        }
    }

    /// The upstream brought no whole response.
    pub fn upstream_failed(&mut self, error: &'static str) {
        if let Some(target) = &self.target {
            target.count_upstream_error(&self.metrics.all, error);
        }
        self.has_failed = true;
        self.failed(error);
    }

    /// It took longer than its route allows, and the client was the slow one.
    pub fn outlasted(&mut self) {
        self.failed("http_response_timeout");
    }

    /// Nothing has gone through its tunnel for too long.
    pub fn rested(&mut self) {
        self.failed("tunnel_idle");
    }

    /// True when the client went away within its body, or sent something that is no body.
    pub fn was_broken_by_client(&self) -> bool {
        self.request_body
            .as_ref()
            .is_some_and(Progress::was_broken_by_client)
    }

    /// How the call has ended, if it is one; one that was cut off did not say.
    fn grpc_status(&self, status: StatusCode) -> Option<grpc::Status> {
        match self.grpc {
            Grpc::No => None,
            Grpc::Ended(status) => Some(status),
            Grpc::Open if status == StatusCode::OK && !self.ended && !self.has_failed => {
                Some(grpc::Status::CANCELLED)
            }
            Grpc::Open => Some(grpc::Status::from_http(status)),
        }
    }

    fn failed(&mut self, error: &'static str) {
        if let Some(entry) = &mut self.entry {
            entry.error = Some(error);
        }
    }
}

impl Drop for Exchange {
    /// A client that went away before it was sent a status counts as 499, nginx's code for it.
    fn drop(&mut self) {
        let mut status = self.status.unwrap_or_else(client_gone);
        if let (Some(translation), Grpc::Ended(ended)) = (&self.translation, self.grpc) {
            status = translation.status(ended);
        }
        let duration = self.started.elapsed();
        let metrics = &self.metrics;
        let target = self.target.as_ref().unwrap_or(metrics.all.unrouted());
        target.count_request(
            &metrics.all,
            metrics.worker,
            self.method,
            status,
            self.protocol,
            self.tunnel.as_ref().map_or(duration, |tunnel| tunnel.after),
        );
        let grpc = self.grpc_status(status);
        if let Some(grpc) = grpc {
            target.count_grpc(&metrics.all, grpc.as_str());
        }
        if self.has_failed || status.is_server_error() || grpc.is_some_and(grpc::Status::is_failure)
        {
            target.count_failure();
        }
        if let Some(target) = &self.target {
            target.in_flight().fall();
            if self.tunnel.is_some() {
                target.tunnels().fall();
            }
        }
        if let Some(mut entry) = self.entry.take() {
            if let Some(grpc) = grpc {
                entry.text("grpc_status", grpc.as_str());
            }
            if !self.ended {
                let ours = self.metrics.all.has_ended();
                entry
                    .error
                    .get_or_insert(if ours { CUT_OFF } else { CLIENT_GONE });
            }
            let body = self.request_body.as_ref().map_or(0, Progress::bytes);
            let bytes_in = body + self.tunnel.as_ref().map_or(0, |tunnel| tunnel.bytes_in);
            entry.end(status, duration, bytes_in, self.bytes_out);
        }
    }
}

// === impl Entry ===

impl Entry {
    /// The path goes without its query, which may hold secrets, or the user's id.
    fn begin<B>(log: &Rc<WorkerLog>, started: Instant, request: &Request<B>) -> Self {
        let headers = request.headers();
        let uri = request.uri();
        let mut line = Line::begin(log, started.into_std());
        line.field(
            "method",
            LogValue::Bytes(request.method().as_str().as_bytes()),
        );
        let authority = uri
            .authority()
            .map(|authority| authority.as_str().as_bytes());
        let host = headers.get(HOST).map(|host| host.as_bytes());
        if let Some(host) = authority.or(host) {
            line.field("host", LogValue::Bytes(without_userinfo(host)));
        }
        line.field("path", LogValue::Bytes(uri.path().as_bytes()));
        line.field("protocol", LogValue::Text(protocol(request.version())));
        if let Some(agent) = headers.get(USER_AGENT) {
            line.field("user_agent", LogValue::Bytes(agent.as_bytes()));
        }
        if let Some(trace) = TraceContext::of(headers) {
            line.field(
                "trace_id",
                LogValue::Text(&format!("{:032x}", trace.trace_id)),
            );
        }
        Self {
            line,
            upstream: None,
            error: None,
        }
    }

    fn decided(&mut self, route: &Route, decision: &Decision<'_>) {
        let backend = &route.targets[decision.target].backend;
        self.text("route", &route.name);
        self.text("backend", &backend.name);
        self.text("version", &backend.version);
        self.text("reason", decision.reason.as_str());
        if let Some(rule) = decision.rule {
            self.text("rule", rule);
        }
        if let Some(identity) = &decision.identity {
            self.line.user(&identity.value);
        }
    }

    fn end(self, status: StatusCode, duration: Duration, bytes_in: u64, bytes_out: u64) {
        let Self {
            mut line,
            upstream,
            error,
        } = self;
        line.field("status", LogValue::Number(status.as_u16().into()));
        if let Some(upstream) = upstream {
            line.field("upstream_ms", LogValue::Milliseconds(upstream));
        }
        line.field("duration_ms", LogValue::Milliseconds(duration));
        line.field("bytes_in", LogValue::Number(bytes_in));
        line.field("bytes_out", LogValue::Number(bytes_out));
        if let Some(error) = error {
            line.field("error", LogValue::Text(error));
        }
        line.end();
    }

    fn text(&mut self, key: &'static str, value: &str) {
        self.line.field(key, LogValue::Text(value));
    }
}

/// A host without a name and password before it, which make it malformed, but are secrets all the
/// same.
fn without_userinfo(host: &[u8]) -> &[u8] {
    memchr::memrchr(b'@', host).map_or(host, |at| &host[at + 1..])
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_11 => "HTTP/1.1",
        Version::HTTP_2 => "HTTP/2",
        _ => "unknown",
    }
}
