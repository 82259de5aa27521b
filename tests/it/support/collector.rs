//! A collector of OpenTelemetry that takes OTLP by gRPC (tonic's service) and by HTTP, over TLS or not.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tonic::codegen::Service;
use tonic::{Code, Status};

use super::client::Connection;
use super::eventually;
use super::upstream::serving;

type Body = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// A collector, and what it has been sent.
#[derive(Clone)]
pub(crate) struct Collector {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    exports: Mutex<Vec<Export>>,
    asked: AtomicUsize,
    mood: Mutex<Mood>,
}

/// What a collector does with what it is sent.
#[derive(Clone, Copy, Default)]
pub(crate) enum Mood {
    /// Takes it.
    #[default]
    Willing,
    /// Takes all but so many spans.
    Choosy(i64),
    /// Says that it cannot, now.
    Busy,
    /// Says that it never will.
    Unwilling,
    /// Says nothing.
    Silent,
}

/// One message, and the fields that it came with.
#[derive(Clone)]
pub(crate) struct Export {
    pub(crate) request: ExportTraceServiceRequest,
    pub(crate) headers: HeaderMap,
    pub(crate) path: String,
}

struct Receiver(Arc<State>);

impl Collector {
    pub(crate) async fn start() -> Self {
        Self::serving(None).await
    }

    pub(crate) async fn tls(config: ServerConfig) -> Self {
        Self::serving(Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn serving(tls: Option<TlsAcceptor>) -> Self {
        let state = Arc::<State>::default();
        let shared = Arc::clone(&state);
        let serve = move |stream: TcpStream| {
            let (state, tls) = (Arc::clone(&shared), tls.clone());
            async move {
                match tls {
                    None => speak(stream, state).await,
                    // A client that does not believe us has left.
                    Some(tls) => {
                        if let Ok(stream) = tls.accept(stream).await {
                            speak(stream, state).await;
                        }
                    }
                }
            }
        };
        let (address, _) = serving(serve).await;
        Self { address, state }
    }

    pub(crate) fn becomes(&self, mood: Mood) {
        *self.state.mood.lock().unwrap() = mood;
    }

    /// How often it was asked to take something, whether it did or not.
    pub(crate) fn asked(&self) -> usize {
        self.state.asked.load(Ordering::SeqCst)
    }

    pub(crate) fn exports(&self) -> Vec<Export> {
        self.state.exports.lock().unwrap().clone()
    }

    /// The spans that it has taken.
    pub(crate) fn spans(&self) -> Vec<Span> {
        let exports = self.exports().into_iter();
        let resources = exports.flat_map(|export| export.request.resource_spans);
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        scopes.flat_map(|scope| scope.spans).collect()
    }

    /// The spans that it has taken, once there are so many.
    pub(crate) async fn await_spans(&self, count: usize) -> Vec<Span> {
        eventually("the spans are there", || self.spans().len() >= count).await;
        let spans = self.spans();
        assert_eq!(spans.len(), count, "{spans:#?}");
        spans
    }
}

/// The attributes of a span or a resource as text.
pub(crate) fn attributes(attributes: &[KeyValue]) -> HashMap<&str, String> {
    let text = |value: &AnyValue| match value.value.as_ref().unwrap() {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        other => panic!("{other:?}"),
    };
    let pairs = attributes.iter();
    let pairs = pairs.map(|pair| (&*pair.key, text(pair.value.as_ref().unwrap())));
    pairs.collect()
}

async fn speak(stream: impl Connection + 'static, state: Arc<State>) {
    let service = service_fn(move |request| answer(Arc::clone(&state), request));
    let builder = auto::Builder::new(TokioExecutor::new());
    // The proxy may have gone.
    let _ = builder
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(
    state: Arc<State>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let is_call = request.headers().get("content-type").unwrap() == "application/grpc";
    if is_call {
        let (parts, body) = request.into_parts();
        let headers = parts.headers.clone();
        let mut request = Request::from_parts(parts, body);
        request.extensions_mut().insert(headers);
        let mut service = TraceServiceServer::new(Receiver(state));
        let response = service.call(request).await?;
        return Ok(response.map(|body| body.map_err(Into::into).boxed_unsync()));
    }
    assert_eq!(request.headers()["content-type"], "application/x-protobuf");
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let export = Export {
        request: ExportTraceServiceRequest::decode(body).unwrap(),
        headers: parts.headers,
        path: parts.uri.path().to_owned(),
    };
    let (status, answer) = match state.take(export).await {
        Ok(response) => (StatusCode::OK, response.encode_to_vec()),
        Err(status) if status.code() == Code::Unavailable => {
            (StatusCode::SERVICE_UNAVAILABLE, Vec::new())
        }
        Err(_) => (StatusCode::BAD_REQUEST, Vec::new()),
    };
    let body = Full::new(Bytes::from(answer)).map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = status;
    Ok(response)
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, Status> {
        let headers = request.extensions().get::<HeaderMap>().cloned();
        let export = Export {
            request: request.into_inner(),
            headers: headers.unwrap(),
            path: String::new(),
        };
        self.0.take(export).await.map(tonic::Response::new)
    }
}

impl State {
    async fn take(&self, export: Export) -> Result<ExportTraceServiceResponse, Status> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mood = *self.mood.lock().unwrap();
        let rejected_spans = match mood {
            Mood::Willing => 0,
            Mood::Choosy(rejected) => rejected,
            Mood::Busy => return Err(Status::unavailable("busy")),
            Mood::Unwilling => return Err(Status::invalid_argument("never")),
            Mood::Silent => return std::future::pending().await,
        };
        self.exports.lock().unwrap().push(export);
        let partial = ExportTracePartialSuccess {
            rejected_spans,
            error_message: String::new(),
        };
        Ok(ExportTraceServiceResponse {
            partial_success: (rejected_spans > 0).then_some(partial),
        })
    }
}
