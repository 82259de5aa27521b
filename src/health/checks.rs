//! Asks endpoints whether they are well, as their backends say: one task for each, which lives as
//! long as its endpoint and its check do.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, HeaderValue, TE};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use prost::Message;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use crate::backend::health::{Health, Opinion, Probe};
use crate::backend::{Backend, Endpoint, EndpointId, HealthCheck, Impediment};
use crate::snapshot::{Live, Snapshot};
use crate::telemetry::metrics::Metrics;
use crate::upstream::SendError;
use crate::upstream::probe::{self, Asked};

/// The most of an answer that is read, in bytes.
const LARGEST_ANSWER: usize = 64 << 10;

const GRPC_PATH: PathAndQuery = PathAndQuery::from_static("/grpc.health.v1.Health/Check");

/// Of grpc/health/v1/health.proto.
#[derive(Clone, PartialEq, Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// Of grpc/health/v1/health.proto.
#[derive(Clone, Copy, PartialEq, Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SERVING` of `HealthCheckResponse.ServingStatus`.
const SERVING: i32 = 1;

/// So many are asked at a time; the others wait for their turn. Each takes a descriptor, and it is the
/// thread of control that asks.
pub const MOST_AT_A_TIME: usize = 256;

/// The longest until an endpoint is asked again that could not be asked.
const SHORTAGE_PAUSE: Duration = Duration::from_secs(1);

/// Starts and ends the tasks.
#[derive(Debug)]
pub struct Checks {
    turns: Rc<Semaphore>,
    live: Arc<Live>,
    metrics: Arc<Metrics>,
    running: HashMap<EndpointId, Running>,
}

/// A task, and what it asks by.
#[derive(Debug)]
struct Running {
    check: Arc<HealthCheck>,
    /// That of the backend's transport.
    fingerprint: u64,
    connect_timeout: Duration,
    task: AbortHandle,
}

/// One endpoint's task.
struct Checking {
    backend: Arc<str>,
    check: Arc<HealthCheck>,
    asked: Asked,
    metrics: Arc<Metrics>,
    opinion: Opinion,
    turns: Rc<Semaphore>,
}

/// Why there is no good answer.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Complaint {
    /// The endpoint has not given one.
    Endpoint(String),
    /// It could not be asked, for what this machine lacks.
    Shortage(String),
}

// === impl Checks ===

impl Checks {
    /// Checks the endpoints of whatever snapshot is in force.
    pub fn new(live: Arc<Live>, metrics: Arc<Metrics>) -> Self {
        Self {
            turns: Rc::new(Semaphore::new(MOST_AT_A_TIME)),
            live,
            metrics,
            running: HashMap::new(),
        }
    }

    /// Checks for as long as it is polled, on the thread that polls.
    pub async fn run(mut self) {
        let mut published = self.live.subscribe();
        loop {
            published.borrow_and_update();
            let snapshot = self.live.load();
            self.follow(&snapshot);
            drop(snapshot);
            if published.changed().await.is_err() {
                return;
            }
        }
    }

    fn follow(&mut self, snapshot: &Snapshot) {
        let mut before = std::mem::take(&mut self.running);
        for backend in &snapshot.backends {
            for endpoint in &backend.endpoints {
                let known = before.remove(&endpoint.id);
                match &backend.health_check {
                    None => forget_checks(endpoint),
                    Some(check) => {
                        let known = known.filter(|known| known.is_of(backend, check));
                        let running = known.unwrap_or_else(|| self.start(backend, check, endpoint));
                        self.running.insert(endpoint.id, running);
                    }
                }
            }
        }
    }

    fn start(
        &self,
        backend: &Backend,
        check: &Arc<HealthCheck>,
        endpoint: &Arc<Endpoint>,
    ) -> Running {
        let connect_timeout = backend.connections.connect_timeout;
        let checking = Checking {
            backend: Arc::clone(&backend.name),
            check: Arc::clone(check),
            asked: Asked {
                endpoint: Arc::clone(endpoint),
                transport: Arc::clone(&backend.transport),
                connect_timeout,
            },
            metrics: Arc::clone(&self.metrics),
            opinion: Opinion::new(health_of(endpoint)),
            turns: Rc::clone(&self.turns),
        };
        Running {
            check: Arc::clone(check),
            fingerprint: backend.transport.fingerprint,
            connect_timeout,
            task: tokio::task::spawn_local(checking.run()).abort_handle(),
        }
    }
}

fn health_of(endpoint: &Endpoint) -> Health {
    if endpoint.is_impeded_by(Impediment::Unchecked) {
        Health::Unknown
    } else if endpoint.is_impeded_by(Impediment::Unhealthy) {
        Health::Unhealthy
    } else {
        Health::Healthy
    }
}

/// Nobody asks any more, so nothing is held against it.
fn forget_checks(endpoint: &Endpoint) {
    let now = Instant::now();
    for impediment in [Impediment::Unchecked, Impediment::Unhealthy] {
        if endpoint.is_impeded_by(impediment) {
            endpoint.relieve(impediment, now);
        }
    }
}

// === impl Running ===

impl Running {
    fn is_of(&self, backend: &Backend, check: &HealthCheck) -> bool {
        *self.check == *check
            && self.fingerprint == backend.transport.fingerprint
            && self.connect_timeout == backend.connections.connect_timeout
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

// === impl Complaint ===

impl Complaint {
    fn of(error: SendError) -> Self {
        let reason = error.to_string();
        if error.is_own_shortage() {
            Self::Shortage(reason)
        } else {
            Self::Endpoint(reason)
        }
    }
}

// === impl Checking ===

impl Checking {
    /// The first question comes at once.
    async fn run(mut self) {
        loop {
            let answer = self.ask_in_turn().await;
            let pause = self.check.pause(fastrand::f64());
            match answer {
                Ok(()) => self.learn(Ok(())),
                Err(Complaint::Endpoint(reason)) => self.learn(Err(reason)),
                Err(Complaint::Shortage(reason)) => {
                    self.could_not_ask(&reason);
                    sleep(pause.min(SHORTAGE_PAUSE)).await;
                    continue;
                }
            }
            sleep(pause).await;
        }
    }

    async fn ask_in_turn(&self) -> Result<(), Complaint> {
        let _turn = self.turns.acquire().await;
        let answer = timeout(self.check.timeout, self.ask()).await;
        let too_late = || Complaint::Endpoint("there was no answer in time".to_owned());
        answer.unwrap_or_else(|_| Err(too_late()))
    }

    fn could_not_ask(&self, reason: &str) {
        let (backend, endpoint) = (&*self.backend, &*self.asked.endpoint.authority);
        self.count("not_asked");
        debug!(backend, endpoint, reason, "the endpoint could not be asked");
    }

    fn count(&self, result: &str) {
        let labels = [("backend", &*self.backend), ("result", result)];
        let answers = self.metrics.counter("serin_health_checks_total", &labels);
        answers.increment(1);
    }

    fn learn(&mut self, answer: Result<(), String>) {
        self.count(if answer.is_ok() { "success" } else { "failure" });
        let (backend, endpoint) = (&*self.backend, &*self.asked.endpoint.authority);
        let is_changed = self.opinion.learn(answer.is_ok(), &self.check);
        match answer {
            Ok(()) if is_changed => {
                let now = Instant::now();
                // The newer reason last: only then do requests come back.
                self.asked.endpoint.relieve(Impediment::Unchecked, now);
                self.asked.endpoint.relieve(Impediment::Unhealthy, now);
                info!(backend, endpoint, "endpoint is healthy");
            }
            Err(reason) if is_changed => {
                // A new one stays a new one until it has been well for once.
                self.asked.endpoint.impede(Impediment::Unhealthy);
                warn!(backend, endpoint, reason, "endpoint is unhealthy");
            }
            Ok(()) => {}
            Err(reason) => debug!(backend, endpoint, reason, "health check failed"),
        }
    }

    async fn ask(&self) -> Result<(), Complaint> {
        match &self.check.probe {
            Probe::Tcp => {
                let connected = probe::connect(&self.asked).await;
                connected.map_err(Complaint::of)
            }
            Probe::Http {
                path,
                host,
                statuses,
            } => {
                let host = host.clone();
                let request = request(Method::GET, path.clone(), host, Bytes::new());
                judge_http(&self.send(request).await?, statuses)
            }
            Probe::Grpc { service } => {
                let mut request = request(Method::POST, GRPC_PATH, None, call(service));
                let headers = request.headers_mut();
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
                headers.insert(TE, HeaderValue::from_static("trailers"));
                judge_grpc(self.send(request).await?).await
            }
        }
    }

    async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, Complaint> {
        if !request.headers().contains_key(HOST)
            && let Ok(host) = HeaderValue::from_str(&self.asked.endpoint.authority)
        {
            request.headers_mut().insert(HOST, host);
        }
        let sent = probe::send(&self.asked, request).await;
        sent.map_err(Complaint::of)
    }
}

fn request(
    method: Method,
    path: PathAndQuery,
    host: Option<HeaderValue>,
    body: Bytes,
) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method;
    *request.uri_mut() = Uri::from(path);
    if let Some(host) = host {
        request.headers_mut().insert(HOST, host);
    }
    request
}

fn judge_http(response: &Response<Incoming>, statuses: &[StatusCode]) -> Result<(), Complaint> {
    let status = response.status();
    let is_good = if statuses.is_empty() {
        status.is_success()
    } else {
        statuses.contains(&status)
    };
    if is_good {
        Ok(())
    } else {
        Err(Complaint::Endpoint(format!("the answer was {status}")))
    }
}

/// A message with its length before it, uncompressed (gRPC over HTTP/2, "Length-Prefixed-Message").
fn call(service: &str) -> Bytes {
    let message = HealthCheckRequest {
        service: service.to_owned(),
    };
    let message = message.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    [&[0], &length.to_be_bytes()[..], &message].concat().into()
}

async fn judge_grpc(response: Response<Incoming>) -> Result<(), Complaint> {
    serving(response).await.map_err(Complaint::Endpoint)
}

async fn serving(response: Response<Incoming>) -> Result<(), String> {
    let (head, body) = response.into_parts();
    if head.status != StatusCode::OK {
        return Err(format!("the answer was {}", head.status));
    }
    let whole = Limited::new(body, LARGEST_ANSWER).collect().await;
    let whole = whole.map_err(|error| error.to_string())?;
    let status = whole
        .trailers()
        .and_then(|trailers| trailers.get("grpc-status"));
    match status.or(head.headers.get("grpc-status")) {
        Some(status) if status == "0" => {}
        Some(status) => return Err(format!("the call ended with status {status:?}")),
        None => return Err("the answer was no gRPC".to_owned()),
    }
    let bytes = whole.to_bytes();
    let answer = bytes.get(5..).map(HealthCheckResponse::decode);
    match answer {
        Some(Ok(answer)) if answer.status == SERVING => Ok(()),
        Some(Ok(answer)) => Err(format!("its serving status is {}", answer.status)),
        _ => Err("the answer was no HealthCheckResponse".to_owned()),
    }
}
