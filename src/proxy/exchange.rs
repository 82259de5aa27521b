//! The record of one request, and its single end.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, USER_AGENT};
use http::{Request, Response, StatusCode, Version};
use tokio::time::Instant;

use crate::backend::{Backend, Crowded, Endpoint};
use crate::limit::gcra::Standing;
use crate::routing::Decision;
use crate::snapshot::{FailedOver, Route, RouteTarget};
use crate::telemetry::access_log::{Candidates, Ended, Line, LogValue, WorkerLog};
use crate::telemetry::metrics::{MethodLabel, Metrics, Protocol, TargetMetrics, WorkerMetrics};
use crate::telemetry::trace::{SpanContext, WorkerTracer};
use crate::telemetry::trace_context::TraceContext;

use super::body::Progress;
use super::error::client_gone;
use super::grpc;
use super::origin::{Origin, named_host};
use super::recording::{Outcome, Recording};
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
    /// When it was last sent on its way to an endpoint.
    sent_at: Instant,
    /// How often it was.
    attempts: u32,
    method: MethodLabel,
    protocol: Protocol,
    /// How many requests there were when it came, itself among them.
    in_flight: i64,
    /// How its caller stands with the rate limits of its route; boxed, since few have any.
    standing: Option<Box<Standing>>,
    /// What it counts for; for none before it is decided.
    target: Option<Arc<TargetMetrics>>,
    /// How that failed, if the baseline answers instead; boxed, since few do.
    shielded: Option<Box<Shielded>>,
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
    /// What went wrong.
    error: Option<&'static str>,
    /// It was ended, since its user gets another version: nobody is to blame.
    is_moved: bool,
    /// Its line in the access log, if there is one; boxed, since an exchange is moved a few times.
    entry: Option<Box<Entry>>,
    /// What its span says, if requests are traced; boxed as well.
    recording: Option<Box<Recording>>,
}

/// A request that has become a tunnel.
#[derive(Debug)]
struct Tunnelled {
    /// After how long.
    after: Duration,
    /// How much has come from the client since.
    bytes_in: u64,
}

/// How a version failed a request that the baseline answers instead. It counts for the version with
/// this, and not for the baseline, whose figures it must neither spoil nor embellish.
#[derive(Debug)]
struct Shielded {
    by: Arc<TargetMetrics>,
    /// What the client would have got.
    status: StatusCode,
    grpc: Option<grpc::Status>,
    /// After how long.
    after: Duration,
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
    /// What it may be of, as far as its path says.
    candidates: Candidates,
    /// The last one that it was sent to.
    endpoint: Option<Arc<Endpoint>>,
    upstream: Option<Duration>,
}

// === impl Exchange ===

impl Exchange {
    /// Begins with the head of a request; it belongs to no route yet.
    pub fn begin<B>(
        metrics: &Rc<WorkerMetrics>,
        log: Option<&Rc<WorkerLog>>,
        tracer: Option<&Rc<WorkerTracer>>,
        request: &Request<B>,
    ) -> Self {
        let started = Instant::now();
        let recording = tracer.map(|tracer| Box::new(Recording::begin(tracer, request)));
        let span = recording.as_deref().map(Recording::context);
        Self {
            metrics: Rc::clone(metrics),
            started,
            sent_at: started,
            attempts: 0,
            method: MethodLabel::from(request.method()),
            protocol: Protocol::from(request.version()),
            in_flight: metrics.all.in_flight().rise(),
            standing: None,
            target: None,
            shielded: None,
            status: None,
            request_body: None,
            bytes_out: 0,
            tunnel: None,
            ended: false,
            grpc: Grpc::No,
            translation: None,
            has_failed: false,
            error: None,
            is_moved: false,
            entry: log.map(|log| Box::new(Entry::begin(log, started, request, span))),
            recording,
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

    /// When it was last sent on its way to an endpoint.
    pub fn sent_at(&self) -> Instant {
        self.sent_at
    }

    /// How many requests there were when it came, itself among them.
    pub fn in_flight(&self) -> i64 {
        self.in_flight
    }

    /// The metrics that it is counted in.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics.all
    }

    /// Its caller stands so with the rate limits of its route, if it has any.
    pub fn stands(&mut self, standing: Option<Standing>) {
        self.standing = standing.map(Box::new);
    }

    /// How its caller stands with the rate limits of its route.
    pub fn standing(&self) -> Option<Standing> {
        self.standing.as_deref().copied()
    }

    /// It is known who sent it.
    pub fn came_from(&mut self, origin: &Origin<'_>) {
        if let Some(entry) = &mut self.entry {
            entry.text("client_ip", &origin.client_text());
            if let Some(tls) = &origin.peer.tls {
                entry.text("tls_version", tls.version);
            }
        }
        if let Some(recording) = &mut self.recording {
            recording.came_from(origin);
        }
    }

    /// From now on it counts for the target of this decision; another one would have had it that
    /// takes none.
    pub fn decided(
        &mut self,
        route: &Route,
        decision: &Decision<'_>,
        failed_over: Option<FailedOver>,
    ) {
        if let Some(FailedOver { from, cause }) = failed_over {
            let from = &route.targets[from].metrics;
            from.count_failover(&self.metrics.all, cause.as_str());
        }
        let target = &route.targets[decision.target];
        target.metrics.in_flight().rise();
        self.target = Some(Arc::clone(&target.metrics));
        self.sent_at = Instant::now();
        target
            .metrics
            .count_decision(&self.metrics.all, decision.reason);
        if let Some(entry) = &mut self.entry {
            entry.decided(route, decision);
        }
        if let Some(recording) = &mut self.recording {
            recording.decided(decision);
        }
    }

    /// This is its body, which may still be on its way.
    pub fn has_body(&mut self, body: Progress) {
        self.request_body = Some(body);
    }

    /// It is on its way to this endpoint of a backend, with these fields.
    pub fn sent_to(
        &mut self,
        backend: &Arc<Backend>,
        endpoint: &Arc<Endpoint>,
        headers: &mut HeaderMap,
    ) {
        self.attempts += 1;
        if let Some(entry) = &mut self.entry {
            entry.endpoint = Some(Arc::clone(endpoint));
        }
        if let Some(recording) = &mut self.recording {
            recording.sent_to(backend, endpoint, self.sent_at, headers);
        }
    }

    /// The last attempt was answered with this, and that is not passed on.
    pub fn attempt_rejected(&mut self, status: StatusCode) {
        if let Some(recording) = &mut self.recording {
            recording.answered(status);
            recording.attempt_failed(None);
        }
    }

    /// What went before has failed; it is sent on its way again at this time.
    pub fn begins_again(&mut self, now: Instant) {
        self.sent_at = now;
    }

    /// It is sent to the same version once more, or not, since too many are.
    pub fn retried(&self, is_within_budget: bool) {
        let result = if is_within_budget {
            "sent"
        } else {
            "over_budget"
        };
        if let Some(target) = self.serving() {
            target.count_retry(&self.metrics.all, result);
        }
    }

    /// It waited for room at a backend in vain.
    pub fn found_no_room(&self, at: &RouteTarget, why: Crowded) {
        at.metrics.count_overflow(&self.metrics.all, why.as_str());
    }

    /// The version has failed it with this, and the baseline answers instead.
    pub fn shielded_by(
        &mut self,
        baseline: &RouteTarget,
        status: StatusCode,
        grpc: Option<grpc::Status>,
    ) {
        if let Some(target) = &self.target {
            target.in_flight().fall();
        }
        baseline.metrics.in_flight().rise();
        self.shielded = Some(Box::new(Shielded {
            by: Arc::clone(&baseline.metrics),
            status,
            grpc: grpc.filter(|_| self.is_grpc()),
            after: self.started.elapsed(),
        }));
        if let Some(entry) = &mut self.entry {
            entry.text("shielded_by", &baseline.backend.name);
        }
        if let Some(recording) = &mut self.recording {
            recording.shielded_by(&baseline.backend.name);
        }
    }

    /// An attempt has brought no response.
    pub fn attempt_failed(&mut self, error: &'static str) {
        if let Some(target) = self.serving() {
            target.count_upstream_error(&self.metrics.all, error);
        }
        if let Some(recording) = &mut self.recording {
            recording.attempt_failed(Some(error));
        }
    }

    /// The head of the upstream's response is here; how long it took.
    pub fn answered(&mut self, status: StatusCode) -> Duration {
        let upstream = self.sent_at.elapsed();
        if let (Some(target), None) = (&self.target, &self.shielded) {
            target.count_response_head(self.metrics.worker, upstream);
        }
        if let Some(entry) = &mut self.entry {
            entry.upstream = Some(upstream);
        }
        if let Some(recording) = &mut self.recording {
            recording.answered(status);
        }
        self.status = Some(status);
        upstream
    }

    /// From now on it is a tunnel. Its latency ends here, or tunnels that stand for hours would say
    /// that a version is slow.
    pub fn becomes_tunnel(&mut self) {
        self.tunnel = Some(Box::new(Tunnelled {
            after: self.started.elapsed(),
            bytes_in: 0,
        }));
        // A tunnel costs memory but no work, and stands for hours.
        self.metrics.all.in_flight().fall();
        if let Some(target) = self.serving() {
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
        // In HTTP/1 that is up to the whole connection.
        if let (Protocol::Http2, Some(body)) = (self.protocol, &self.request_body) {
            body.linger();
        }
    }

    /// The response has come to its end.
    pub fn ended(&mut self) {
        self.ended = true;
    }

    /// The route answers it itself.
    pub fn answered_by_route(&mut self, route: &Route, status: StatusCode) {
        self.stays_with(route);
        self.status = Some(status);
        self.ended();
    }

    /// It counts for this route, and for none of its backends.
    pub fn stays_with(&mut self, route: &Route) {
        route.metrics.in_flight().rise();
        self.target = Some(Arc::clone(&route.metrics));
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
        self.attempt_failed(error);
        self.has_failed = true;
        self.failed(error);
    }

    /// True when it ended, or is going to end, as a call that failed by the version's fault.
    pub fn is_failed_call(&self) -> bool {
        matches!(self.grpc, Grpc::Ended(status) if status.is_failure())
    }

    /// What serves it now.
    fn serving(&self) -> Option<&Arc<TargetMetrics>> {
        let baseline = self.shielded.as_ref().map(|shielded| &shielded.by);
        baseline.or(self.target.as_ref())
    }

    /// It took longer than its route allows, and the client was the slow one.
    pub fn outlasted(&mut self) {
        self.failed("http_response_timeout");
    }

    /// Nothing has gone through its tunnel for too long.
    pub fn rested(&mut self) {
        self.failed("tunnel_idle");
    }

    /// It was ended, since its user gets another version.
    pub fn moved(&mut self) {
        self.is_moved = true;
        self.ended();
        self.failed("version_changed");
        if let Some(target) = &self.target {
            target.count_moved(&self.metrics.all);
        }
    }

    /// True for a response with this head that may go on for ever.
    pub fn is_stream(&self, headers: &HeaderMap) -> bool {
        let content_type = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
        self.is_grpc() || content_type.is_some_and(|text| text.starts_with(b"text/event-stream"))
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
        self.error = Some(error);
    }

    /// True when it has failed, and not by its client's fault, with this as the last word on it.
    fn is_failure(&self, status: StatusCode, grpc: Option<grpc::Status>) -> bool {
        // A call that no route takes is its client's mistake, although gRPC has the same word for it.
        let is_failed_call =
            grpc.is_some_and(grpc::Status::is_failure) && self.target.is_some() && !self.is_moved;
        self.has_failed || self.shielded.is_some() || status.is_server_error() || is_failed_call
    }

    /// Counts it once, for the version that it was decided on and by what that made of it.
    fn count(
        &self,
        status: StatusCode,
        grpc: Option<grpc::Status>,
        duration: Duration,
        bytes: (u64, u64),
    ) {
        let WorkerMetrics { all, worker } = &*self.metrics;
        let target = self.target.as_ref().unwrap_or(all.unrouted());
        let (code, grpc, duration) = match &self.shielded {
            Some(failed) => (failed.status, failed.grpc, failed.after),
            None => (
                status,
                grpc,
                self.tunnel.as_ref().map_or(duration, |tunnel| tunnel.after),
            ),
        };
        target.count_request(all, *worker, self.method, code, self.protocol, duration);
        target.count_bytes(bytes);
        if let Some(grpc) = grpc {
            target.count_grpc(all, grpc.as_str());
        }
        if self.shielded.is_some() {
            target.count_shielded(all, status);
        }
        if self.is_failure(code, grpc) {
            target.count_failure();
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
        let grpc = self.grpc_status(status);
        let body = self.request_body.as_ref().map_or(0, Progress::bytes);
        let bytes_in = body + self.tunnel.as_ref().map_or(0, |tunnel| tunnel.bytes_in);
        let bytes = (bytes_in, self.bytes_out);
        self.count(status, grpc, duration, bytes);
        if self.tunnel.is_none() {
            self.metrics.all.in_flight().fall();
        }
        if let Some(target) = self.serving() {
            target.in_flight().fall();
            if self.tunnel.is_some() {
                target.tunnels().fall();
            }
        }
        if !self.ended {
            let ours = self.metrics.all.has_ended();
            let error = if ours { CUT_OFF } else { CLIENT_GONE };
            self.error.get_or_insert(error);
            // Counted already: it is no failure of the version.
            self.has_failed |= ours;
        }
        let outcome = Outcome {
            began: self.started,
            ended: self.started + duration,
            target: self.target.as_deref().map(TargetMetrics::labels),
            status,
            grpc,
            error: self.error,
            has_failed: self.is_failure(status, grpc),
            bytes,
        };
        if let Some(entry) = self.entry.take() {
            entry.end(&outcome, self.attempts);
        }
        if let Some(recording) = self.recording.take() {
            recording.end(&outcome);
        }
    }
}

// === impl Entry ===

impl Entry {
    /// The path goes without its query, which may hold secrets, or the user's id.
    fn begin<B>(
        log: &Rc<WorkerLog>,
        started: Instant,
        request: &Request<B>,
        span: Option<SpanContext>,
    ) -> Self {
        let headers = request.headers();
        let uri = request.uri();
        let mut line = Line::begin(log, started.into_std());
        line.field(
            "method",
            LogValue::Bytes(request.method().as_str().as_bytes()),
        );
        if let Some(host) = named_host(request) {
            line.field("host", LogValue::Bytes(host));
        }
        line.field("path", LogValue::Bytes(uri.path().as_bytes()));
        line.field("protocol", LogValue::Text(protocol(request.version())));
        if let Some(agent) = headers.get(USER_AGENT) {
            line.field("user_agent", LogValue::Bytes(agent.as_bytes()));
        }
        let named = || TraceContext::of(headers).map(|caller| caller.trace_id);
        if let Some(trace_id) = span.map(|span| span.trace_id).or_else(named) {
            line.field("trace_id", LogValue::Text(&format!("{trace_id:032x}")));
        }
        if let Some(SpanContext { span_id, .. }) = span {
            line.field("span_id", LogValue::Text(&format!("{span_id:016x}")));
        }
        Self {
            candidates: line.filter().candidates(uri.path()),
            line,
            endpoint: None,
            upstream: None,
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

    fn end(self, outcome: &Outcome<'_>, attempts: u32) {
        let Self {
            mut line,
            candidates,
            endpoint,
            upstream,
        } = self;
        let duration = outcome.ended - outcome.began;
        let target = outcome.target.as_ref();
        let ended = Ended {
            target: target.map(|target| (&*target.route, &*target.backend)),
            status: outcome.status,
            duration,
            has_failed: outcome.has_failed,
        };
        if !line.filter().takes(candidates, &ended, fastrand::f64()) {
            return line.discard();
        }
        if let Some(grpc) = outcome.grpc {
            line.field("grpc_status", LogValue::Text(grpc.as_str()));
        }
        if let Some(endpoint) = endpoint {
            line.field("endpoint", LogValue::Text(&endpoint.authority));
            line.field("attempts", LogValue::Number(attempts.into()));
        }
        line.field("status", LogValue::Number(outcome.status.as_u16().into()));
        if let Some(upstream) = upstream {
            line.field("upstream_ms", LogValue::Milliseconds(upstream));
        }
        line.field("duration_ms", LogValue::Milliseconds(duration));
        let (bytes_in, bytes_out) = outcome.bytes;
        line.field("bytes_in", LogValue::Number(bytes_in));
        line.field("bytes_out", LogValue::Number(bytes_out));
        if let Some(error) = outcome.error {
            line.field("error", LogValue::Text(error));
        }
        line.end();
    }

    fn text(&mut self, key: &'static str, value: &str) {
        self.line.field(key, LogValue::Text(value));
    }
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_11 => "HTTP/1.1",
        Version::HTTP_2 => "HTTP/2",
        _ => "unknown",
    }
}
