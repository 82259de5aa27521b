//! Upstreams: one that speaks HTTP and says what it was asked, and one that is scripted byte by
//! byte.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use http_body_util::channel::Channel;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

use super::client::Connection;

type Body = BoxBody<Bytes, hyper::Error>;

/// An upstream with a name of its own:
///
/// * `/echo` answers with the request's body while it comes in;
/// * `/head` answers with the request's head as text;
/// * `/sink` reads the request's body to its end, and answers with its length;
/// * `/hold` answers when the test says so;
/// * `/bytes/N` answers with N bytes;
/// * `/delay/MS` answers after so many milliseconds;
/// * `/status/N` answers with that status;
/// * `/trailers` answers with a body and the trailer `x-sum`;
/// * `/seen-trailers` reads the request's body to its end, and answers with its trailers;
/// * everything else answers with the name.
#[derive(Clone)]
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

struct State {
    name: String,
    connections: AtomicUsize,
    requests: AtomicUsize,
    held: AtomicUsize,
    release: Notify,
    leave: Notify,
}

impl Upstream {
    /// Speaks HTTP/1.1.
    pub(crate) async fn start(name: &str) -> Self {
        Self::speaking(name, Speaks::Http1).await
    }

    /// Speaks HTTP/1.1 at this address, if it is free.
    pub(crate) async fn start_at(name: &str, address: SocketAddr) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        Ok(Self::listening(name, Speaks::Http1, listener))
    }

    /// Speaks HTTP/2 by prior knowledge.
    pub(crate) async fn h2c(name: &str) -> Self {
        Self::h2c_with(name, 1000).await
    }

    /// As `h2c`, with so many requests at a time on each connection.
    pub(crate) async fn h2c_with(name: &str, max_streams: u32) -> Self {
        Self::speaking(name, Speaks::Http2 { max_streams }).await
    }

    /// Speaks what is agreed on by ALPN.
    pub(crate) async fn tls(name: &str, config: ServerConfig) -> Self {
        Self::speaking(name, Speaks::Tls(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn speaking(name: &str, speaks: Speaks) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::listening(name, speaks, listener)
    }

    fn listening(name: &str, speaks: Speaks, listener: TcpListener) -> Self {
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            name: name.to_owned(),
            connections: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            release: Notify::new(),
            leave: Notify::new(),
        });
        tokio::spawn(accept(listener, speaks, Arc::clone(&state)));
        Self { address, state }
    }

    /// Connections accepted so far.
    pub(crate) fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Requests seen so far.
    pub(crate) fn requests(&self) -> usize {
        self.state.requests.load(Ordering::SeqCst)
    }

    /// Requests to `/hold` that wait now.
    pub(crate) fn held(&self) -> usize {
        self.state.held.load(Ordering::SeqCst)
    }

    /// Ends its HTTP/2 connections gracefully (GOAWAY).
    pub(crate) fn leave(&self) {
        self.state.leave.notify_waiters();
    }

    /// Answers the requests to `/hold` that wait now.
    pub(crate) fn release(&self) {
        self.state.release.notify_waiters();
    }
}

/// What an upstream speaks.
#[derive(Clone)]
enum Speaks {
    Http1,
    Http2 { max_streams: u32 },
    Tls(TlsAcceptor),
}

async fn accept(listener: TcpListener, speaks: Speaks, state: Arc<State>) {
    while let Ok((stream, _)) = listener.accept().await {
        state.connections.fetch_add(1, Ordering::SeqCst);
        stream.set_nodelay(true).unwrap();
        let (state, speaks) = (Arc::clone(&state), speaks.clone());
        tokio::spawn(async move {
            match speaks {
                Speaks::Http1 => serve(stream, None, state).await,
                Speaks::Http2 { max_streams } => serve(stream, Some(max_streams), state).await,
                // A client that does not believe us has left.
                Speaks::Tls(acceptor) => {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                        serve(stream, http2.then_some(1000), state).await;
                    }
                }
            }
        });
    }
}

async fn serve(stream: impl Connection, http2: Option<u32>, state: Arc<State>) {
    let service = service_fn(|request| answer(Arc::clone(&state), request));
    let stream = TokioIo::new(stream);
    // The proxy may close the connection at any time.
    if let Some(max_streams) = http2 {
        let (state, leaving) = (Arc::clone(&state), Arc::clone(&state));
        let leave = leaving.leave.notified();
        let service = service_fn(move |request| answer(Arc::clone(&state), request));
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder.max_concurrent_streams(max_streams);
        let mut connection = pin!(builder.serve_connection(stream, service));
        tokio::select! {
            _ = connection.as_mut() => return,
            () = leave => connection.as_mut().graceful_shutdown(),
        }
        let _ = connection.await;
    } else {
        let builder = http1::Builder::new();
        let _ = builder.serve_connection(stream, service).await;
    }
}

async fn answer(
    state: Arc<State>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    state.requests.fetch_add(1, Ordering::SeqCst);
    let is_head = request.method() == Method::HEAD;
    let path = request.uri().path().to_owned();
    let number = |prefix: &str| {
        path.strip_prefix(prefix)
            .map(|rest| rest.parse::<u64>().unwrap())
    };
    let mut response = match path.as_str() {
        "/echo" => Response::new(request.into_body().boxed()),
        "/head" => Response::new(text(head_of(&request))),
        "/sink" => {
            let length = request
                .into_body()
                .collect()
                .await
                .map_or(0, |body| body.to_bytes().len());
            Response::new(text(length.to_string()))
        }
        "/trailers" => {
            let trailers = HeaderMap::from_iter([(
                HeaderName::from_static("x-sum"),
                HeaderValue::from_static("1"),
            )]);
            // Without a length: HTTP/1.1 could not send trailers.
            let (mut sender, body) = Channel::<Bytes>::new(2);
            tokio::spawn(async move {
                let _ = sender.send_data("body".into()).await;
                let _ = sender.send_trailers(trailers).await;
            });
            let body = body.map_err(|never| match never {});
            let mut response = Response::new(body.boxed());
            let names = HeaderValue::from_static("x-sum");
            response.headers_mut().insert("trailer", names);
            response
        }
        "/seen-trailers" => {
            let body = request.into_body().collect().await;
            let trailers = body.ok().and_then(|body| body.trailers().cloned());
            Response::new(text(format!("{:?}", trailers.unwrap_or_default())))
        }
        "/hold" => {
            // Before anybody can see it held, and release it.
            let release = state.release.notified();
            state.held.fetch_add(1, Ordering::SeqCst);
            release.await;
            state.held.fetch_sub(1, Ordering::SeqCst);
            Response::new(text(state.name.clone()))
        }
        _ => Response::new(text(state.name.clone())),
    };
    if let Some(count) = number("/bytes/") {
        *response.body_mut() = text("x".repeat(count as usize));
    }
    if let Some(milliseconds) = number("/delay/") {
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    }
    if let Some(status) = number("/status/") {
        *response.status_mut() = u16::try_from(status).unwrap().try_into().unwrap();
    }
    // hyper does that in HTTP/1 alone.
    if matches!(response.status().as_u16(), 204 | 304) {
        *response.body_mut() = text(String::new());
    }
    if is_head {
        let length = response.body().size_hint().exact().unwrap();
        *response.body_mut() = text(String::new());
        response
            .headers_mut()
            .insert("content-length", length.into());
    }
    Ok(response)
}

fn head_of(request: &Request<Incoming>) -> String {
    let mut lines = vec![format!(
        "{} {} {:?}",
        request.method(),
        request.uri(),
        request.version()
    )];
    lines.extend(
        request
            .headers()
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())),
    );
    lines.join("\n")
}

fn text(text: String) -> Body {
    Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed()
}

/// Serves every connection to a new address as `serve` does, and counts them.
pub(crate) async fn serving<F>(
    serve: impl Fn(TcpStream) -> F + Send + 'static,
) -> (SocketAddr, Arc<AtomicUsize>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(serve(stream));
        }
    });
    (address, count)
}

/// An upstream that reads one request head per connection, answers with exactly these bytes, and
/// closes.
pub(crate) async fn scripted(answer: &'static [u8]) -> SocketAddr {
    let serve = move |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        // The proxy may have gone.
        let _ = stream.write_all(answer).await;
    };
    serving(serve).await.0
}

/// Reads a request head from a connection and returns it.
pub(crate) async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).await.unwrap_or(0) == 0 {
            break;
        }
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).into_owned()
}
