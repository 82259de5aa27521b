//! The admin listener: probes, metrics, and the API.
//!
//! It reads what is in force and asks for changes; it changes nothing itself. It runs on the
//! control thread, so that no scrape can hold up a request, and never on a data listener.
//! Everybody who reaches it may read; who may change weights is up to [`access`](crate::access).

mod connections;
mod exposition;
pub mod view;
mod weights;

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioTimer;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, error, warn};

use crate::config::watch::ReloadRequest;
use crate::control::{Change, StatusBoard, Watching};
use crate::descriptors;
use crate::explain::{Question, explain};
use crate::server::Phase;
use crate::snapshot::Live;
use crate::stream::Stream;
use crate::telemetry::metrics::Metrics;
use crate::tls::certificate;

use connections::{Activity, Connections};

const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
const LARGEST_BODY: usize = 64 * 1024;
/// So much more is thrown away of a body that is too large, or its client would lose the answer (RFC 9112 section 9.6).
const MOST_DISCARDED: usize = 1024 * 1024;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the admin listener serves.
#[derive(Debug)]
pub struct Admin {
    /// The snapshots.
    pub live: Arc<Live>,
    /// The status.
    pub board: StatusBoard,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// The way to ask for a reload.
    pub reload: mpsc::Sender<ReloadRequest>,
    /// The way to ask for other weights.
    pub changes: mpsc::Sender<Change>,
    /// Whether the proxy is starting, or being shut down.
    pub phase: watch::Receiver<Phase>,
    /// When it begins to answer.
    pub answers_from: Phase,
}

type Reply = Response<Full<Bytes>>;

/// Who has connected.
#[derive(Debug)]
struct Caller {
    address: SocketAddr,
    /// The subject of its certificate, if it has shown one.
    subject: Option<String>,
    /// Tells which certificates were believed by then.
    policy: Option<u64>,
}

/// What there is on the admin listener.
#[derive(Clone, Copy, Debug)]
enum Resource {
    Liveness,
    Readiness,
    Metrics,
    Config,
    ConfigStatus,
    Routes,
    Weights,
    Backends,
    Reload,
    Explain,
}

const GET: &[Method] = &[Method::GET];
const POST: &[Method] = &[Method::POST];
const GET_PUT_DELETE: &[Method] = &[Method::GET, Method::PUT, Method::DELETE];

/// Every path with its methods; one place for routing, 405 and the list that 404 shows.
const PATHS: [(&str, &[Method], Resource); 11] = [
    ("/livez", GET, Resource::Liveness),
    ("/readyz", GET, Resource::Readiness),
    ("/healthz", GET, Resource::Readiness),
    ("/metrics", GET, Resource::Metrics),
    ("/api/v1/config", GET, Resource::Config),
    ("/api/v1/config/status", GET, Resource::ConfigStatus),
    ("/api/v1/routes", GET, Resource::Routes),
    (
        "/api/v1/routes/{route}/weights",
        GET_PUT_DELETE,
        Resource::Weights,
    ),
    ("/api/v1/backends", GET, Resource::Backends),
    ("/api/v1/reload", POST, Resource::Reload),
    ("/api/v1/explain", POST, Resource::Explain),
];

// === impl Admin ===

impl Admin {
    /// Serves until the thread ends, or another process does.
    pub async fn run(self, socket: Arc<TcpListener>) {
        // A copy, so that it can be given on as long as it is served.
        let listener = socket
            .try_clone()
            .and_then(tokio::net::TcpListener::from_std);
        let listener = match listener {
            Ok(listener) => listener,
            Err(error) => return error!(%error, "the admin listener cannot be served"),
        };
        let mut phase = self.phase.clone();
        // The sender's end is the end of the process.
        let _ = phase.wait_for(|phase| *phase >= self.answers_from).await;
        let admin = Rc::new(self);
        let most = descriptors::admin_connections(descriptors::limit());
        let mut connections = Connections::new(most);
        loop {
            let accepted = tokio::select! {
                biased;
                Ok(_) = phase.wait_for(|phase| *phase == Phase::Succeeded) => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, address)) => {
                    let state = Rc::<Activity>::default();
                    let serving = serve(Rc::clone(&admin), stream, address, Rc::clone(&state));
                    connections.add(tokio::task::spawn_local(serving).abort_handle(), state);
                }
                Err(error) => {
                    warn!(%error, "the admin listener cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn handle(&self, caller: &Caller, request: Request<Incoming>) -> Reply {
        let path = request.uri().path().to_owned();
        let known = PATHS.iter().find_map(|(known, methods, resource)| {
            Some((variable(known, &path)?, *methods, *resource))
        });
        let Some((variable, methods, resource)) = known else {
            let paths = PATHS.iter().map(|(path, _, _)| *path);
            return json(StatusCode::NOT_FOUND, &view::Failure::not_found(paths));
        };
        // HEAD asks for what GET would say.
        let method = match request.method() {
            &Method::HEAD => &Method::GET,
            method => method,
        };
        if !methods.contains(method) {
            return not_allowed(methods);
        }
        let ok = StatusCode::OK;
        match resource {
            Resource::Liveness => text(ok, "ok\n".to_owned()),
            Resource::Readiness => self.readiness(),
            Resource::Metrics => self.exposition().await,
            Resource::Config => json(ok, &view::ConfigView::new(&self.board.load())),
            Resource::ConfigStatus => json(ok, &view::StatusView::new(&self.board.load())),
            Resource::Routes => json(ok, &view::routes(&self.live.load())),
            Resource::Weights => self.weights(variable, caller, request).await,
            Resource::Backends => json(ok, &view::backends(&self.live.load(), &self.board.load())),
            Resource::Reload => self.reload().await,
            Resource::Explain => self.explain(request).await,
        }
    }

    /// A process that drains must get no new connections, nor one that has not asked its endpoints yet;
    /// what they answered is no part of this, or one bad release would take every replica out of service.
    fn readiness(&self) -> Reply {
        match *self.phase.borrow() {
            Phase::Starting => text(StatusCode::SERVICE_UNAVAILABLE, "starting\n".to_owned()),
            Phase::Serving => text(StatusCode::OK, "ready\n".to_owned()),
            Phase::Leaving | Phase::Draining | Phase::Succeeded => {
                text(StatusCode::SERVICE_UNAVAILABLE, "draining\n".to_owned())
            }
        }
    }

    /// On a thread of its own: with 100,000 routes it takes seconds, and probes must not wait.
    async fn exposition(&self) -> Reply {
        let (metrics, live) = (Arc::clone(&self.metrics), Arc::clone(&self.live));
        let render = move || metrics.render() + &exposition::render(&live.load());
        let rendered = tokio::task::spawn_blocking(render).await;
        let Ok(rendered) = rendered else {
            let reason = "the metrics could not be written\n".to_owned();
            return text(StatusCode::INTERNAL_SERVER_ERROR, reason);
        };
        let mut reply = text(StatusCode::OK, rendered);
        let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        reply.headers_mut().insert(CONTENT_TYPE, format);
        reply
    }

    async fn reload(&self) -> Reply {
        if self.board.load().watching == Watching::Nothing {
            let failure =
                view::Failure::new("the configuration is built in: there is no file to reload");
            return json(StatusCode::CONFLICT, &failure);
        }
        let (sender, outcome) = oneshot::channel();
        if self.reload.send(sender).await.is_err() {
            return shutting_down();
        }
        match outcome.await {
            Ok(Ok(revision)) => json(
                StatusCode::OK,
                &view::Reloaded {
                    revision: revision.0,
                },
            ),
            Ok(Err(problems)) => json(
                StatusCode::UNPROCESSABLE_ENTITY,
                &view::Failure::refused(&problems),
            ),
            Err(_) => shutting_down(),
        }
    }

    async fn explain(&self, request: Request<Incoming>) -> Reply {
        let question = read(request, view::QuestionView::into_question).await;
        match question {
            Ok(question) => self.answer_question(&question),
            Err(unusable) => unusable.reply(),
        }
    }

    fn answer_question(&self, question: &Question) -> Reply {
        json(
            StatusCode::OK,
            &explain(&self.live.load(), question, &mut || fastrand::u64(..)),
        )
    }
}

async fn serve(admin: Rc<Admin>, stream: TcpStream, address: SocketAddr, state: Rc<Activity>) {
    let accepted = timeout(HANDSHAKE_TIMEOUT, accept(&admin.live, stream, address)).await;
    let (stream, caller) = match accepted.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(accepted) => accepted,
        Err(error) => return debug!(%error, %address, "admin connection failed"),
    };
    let service = service_fn(|request| async {
        Ok::<_, Infallible>(state.during(admin.handle(&caller, request)).await)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT)
        .serve_connection(stream, service);
    let mut connection = pin!(connection);
    let mut phase = admin.phase.clone();
    let served = tokio::select! {
        served = connection.as_mut() => served,
        Ok(_) = phase.wait_for(|phase| *phase == Phase::Succeeded) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        debug!(%error, "admin connection ended");
    }
}

/// Does the TLS handshake, where there is one.
async fn accept(
    live: &Live,
    stream: TcpStream,
    address: SocketAddr,
) -> io::Result<(Stream, Caller)> {
    let mut caller = Caller {
        address,
        subject: None,
        policy: None,
    };
    let Some(tls) = live.load().admin.tls.clone() else {
        return Ok((Stream::plain(stream), caller));
    };
    let accepted = TlsAcceptor::from(tls.config).accept(stream).await?;
    let shown = accepted.get_ref().1.peer_certificates();
    caller.subject = shown.and_then(<[_]>::first).and_then(certificate::subject);
    caller.policy = tls.policy;
    Ok((Stream::tls(accepted), caller))
}

/// What stands in a path where a known one has its `{...}`, and nothing where that has none; `None` for another
/// path.
fn variable<'p>(known: &str, path: &'p str) -> Option<&'p str> {
    let Some((before, rest)) = known.split_once('{') else {
        return (known == path).then_some("");
    };
    let (_, after) = rest.split_once('}')?;
    let part = path.strip_prefix(before)?.strip_suffix(after)?;
    (!part.is_empty() && !part.contains('/')).then_some(part)
}

/// What a request holds, once it is understood.
async fn read<J: DeserializeOwned, T>(
    request: Request<Incoming>,
    understand: impl FnOnce(J) -> Result<T, String>,
) -> Result<T, Unusable> {
    let body = timeout(BODY_TIMEOUT, whole(request.into_body())).await;
    let body = body.unwrap_or(Err(Unusable::Late))?;
    let json = serde_json::from_slice(&body);
    let json = json.map_err(|error| Unusable::Malformed(error.to_string()))?;
    understand(json).map_err(Unusable::Malformed)
}

async fn whole(mut body: Incoming) -> Result<Bytes, Unusable> {
    let error = match Limited::new(&mut body, LARGEST_BODY).collect().await {
        Ok(whole) => return Ok(whole.to_bytes()),
        Err(error) => error,
    };
    if !error.is::<LengthLimitError>() {
        return Err(Unusable::Malformed(error.to_string()));
    }
    let mut left = MOST_DISCARDED;
    while left > 0
        && let Some(Ok(frame)) = body.frame().await
    {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
    }
    Err(Unusable::TooLarge)
}

/// Why nothing can be done with what a request holds.
#[derive(Debug)]
enum Unusable {
    TooLarge,
    Late,
    Malformed(String),
}

// === impl Unusable ===

impl Unusable {
    fn reply(self) -> Reply {
        let (status, reason) = match self {
            Self::TooLarge => (
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the body has more than {LARGEST_BODY} bytes"),
            ),
            Self::Late => (
                StatusCode::REQUEST_TIMEOUT,
                format!("the body takes longer than {BODY_TIMEOUT:?}"),
            ),
            Self::Malformed(reason) => (StatusCode::BAD_REQUEST, reason),
        };
        json(status, &view::Failure::new(reason))
    }
}

fn shutting_down() -> Reply {
    let failure = view::Failure::new("the proxy is shutting down");
    json(StatusCode::SERVICE_UNAVAILABLE, &failure)
}

fn text(status: StatusCode, body: String) -> Reply {
    reply(status, "text/plain; charset=utf-8", body)
}

fn json(status: StatusCode, body: &impl Serialize) -> Reply {
    match serde_json::to_string_pretty(body) {
        Ok(text) => reply(status, "application/json", text + "\n"),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Reply {
    const NOSNIFF: HeaderName = HeaderName::from_static("x-content-type-options");
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers: &mut HeaderMap = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(NOSNIFF, HeaderValue::from_static("nosniff"));
    response
}

fn not_allowed(methods: &[Method]) -> Reply {
    let methods: Vec<&str> = methods.iter().map(Method::as_str).collect();
    let methods = methods.join(", ");
    let failure = view::Failure::new(format!("use {methods}"));
    let mut reply = json(StatusCode::METHOD_NOT_ALLOWED, &failure);
    if let Ok(allow) = HeaderValue::from_str(&methods) {
        reply.headers_mut().insert(ALLOW, allow);
    }
    reply
}
