//! The admin listener: probes, metrics, and the API.
//!
//! It reads what is in force and asks for changes; it changes nothing itself. It runs on the
//! control thread, so that no scrape can hold up a request, and never on a data listener.

mod exposition;
pub mod view;

use std::convert::Infallible;
use std::net::TcpListener;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, error, warn};

use crate::config::watch::ReloadRequest;
use crate::control::{StatusBoard, Watching};
use crate::explain::{Question, explain};
use crate::server::Phase;
use crate::snapshot::Live;
use crate::telemetry::metrics::Metrics;

const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const LARGEST_BODY: usize = 64 * 1024;
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
    /// Whether the proxy is starting, or being shut down.
    pub phase: watch::Receiver<Phase>,
    /// When it begins to answer.
    pub answers_from: Phase,
}

type Reply = Response<Full<Bytes>>;

/// What there is on the admin listener.
#[derive(Clone, Copy, Debug)]
enum Resource {
    Liveness,
    Readiness,
    Metrics,
    Config,
    ConfigStatus,
    Routes,
    Backends,
    Reload,
    Explain,
}

/// Every path with its method; one place for routing, 405 and the list that 404 shows.
const PATHS: [(&str, Method, Resource); 10] = [
    ("/livez", Method::GET, Resource::Liveness),
    ("/readyz", Method::GET, Resource::Readiness),
    ("/healthz", Method::GET, Resource::Readiness),
    ("/metrics", Method::GET, Resource::Metrics),
    ("/api/v1/config", Method::GET, Resource::Config),
    ("/api/v1/config/status", Method::GET, Resource::ConfigStatus),
    ("/api/v1/routes", Method::GET, Resource::Routes),
    ("/api/v1/backends", Method::GET, Resource::Backends),
    ("/api/v1/reload", Method::POST, Resource::Reload),
    ("/api/v1/explain", Method::POST, Resource::Explain),
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
        loop {
            let accepted = tokio::select! {
                biased;
                Ok(_) = phase.wait_for(|phase| *phase == Phase::Succeeded) => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => drop(tokio::task::spawn_local(serve(Rc::clone(&admin), stream))),
                Err(error) => {
                    warn!(%error, "the admin listener cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn handle(&self, request: Request<Incoming>) -> Reply {
        let path = request.uri().path();
        let known = PATHS.iter().find(|(known, _, _)| *known == path);
        let Some((_, method, resource)) = known else {
            let paths = PATHS.iter().map(|(path, _, _)| *path);
            return json(StatusCode::NOT_FOUND, &view::Failure::not_found(paths));
        };
        // HEAD asks for what GET would say.
        let head = request.method() == Method::HEAD && *method == Method::GET;
        if request.method() != method && !head {
            return not_allowed(method);
        }
        self.answer(*resource, request).await
    }

    async fn answer(&self, resource: Resource, request: Request<Incoming>) -> Reply {
        let ok = StatusCode::OK;
        match resource {
            Resource::Liveness => text(ok, "ok\n".to_owned()),
            Resource::Readiness => self.readiness(),
            Resource::Metrics => self.exposition().await,
            Resource::Config => json(ok, &view::ConfigView::new(&self.board.load())),
            Resource::ConfigStatus => json(ok, &view::StatusView::new(&self.board.load())),
            Resource::Routes => json(ok, &view::routes(&self.live.load())),
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
            return json(
                StatusCode::SERVICE_UNAVAILABLE,
                &view::Failure::new("the proxy is shutting down"),
            );
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
            Err(_) => json(
                StatusCode::SERVICE_UNAVAILABLE,
                &view::Failure::new("the proxy is shutting down"),
            ),
        }
    }

    async fn explain(&self, request: Request<Incoming>) -> Reply {
        let body = match Limited::new(request.into_body(), LARGEST_BODY)
            .collect()
            .await
        {
            Ok(body) => body.to_bytes(),
            Err(error) => {
                return json(
                    StatusCode::BAD_REQUEST,
                    &view::Failure::new(error.to_string()),
                );
            }
        };
        let question = serde_json::from_slice::<view::QuestionView>(&body)
            .map_err(|error| error.to_string())
            .and_then(view::QuestionView::into_question);
        match question {
            Ok(question) => self.answer_question(&question),
            Err(reason) => json(StatusCode::BAD_REQUEST, &view::Failure::new(reason)),
        }
    }

    fn answer_question(&self, question: &Question) -> Reply {
        json(
            StatusCode::OK,
            &explain(&self.live.load(), question, &mut || fastrand::u64(..)),
        )
    }
}

async fn serve(admin: Rc<Admin>, stream: tokio::net::TcpStream) {
    let service = service_fn(|request| async { Ok::<_, Infallible>(admin.handle(request).await) });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
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

fn not_allowed(method: &Method) -> Reply {
    let mut reply = json(
        StatusCode::METHOD_NOT_ALLOWED,
        &view::Failure::new(format!("use {method}")),
    );
    if let Ok(allow) = HeaderValue::from_str(method.as_str()) {
        reply.headers_mut().insert(ALLOW, allow);
    }
    reply
}
