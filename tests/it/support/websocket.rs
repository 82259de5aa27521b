//! WebSockets, by tungstenite: services that echo, and clients of either version of HTTP.

use std::net::SocketAddr;

use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::ext::Protocol;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::Client;

/// A service over HTTP/1.1 that echoes.
pub(crate) async fn http1() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                if let Ok(socket) = tokio_tungstenite::accept_async(stream).await {
                    echo(socket).await;
                }
            });
        }
    });
    address
}

/// A service over HTTP/2 that echoes.
pub(crate) async fn http2() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let service = service_fn(|request| async { accept(request) });
                let mut builder = http2::Builder::new(TokioExecutor::new());
                builder.enable_connect_protocol();
                let _ = builder
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    address
}

fn accept(request: Request<Incoming>) -> Result<Response<Empty<bytes::Bytes>>, hyper::Error> {
    let mut response = Response::new(Empty::new());
    let protocol = request.extensions().get::<Protocol>();
    if protocol.is_none_or(|protocol| protocol.as_str() != "websocket") {
        *response.status_mut() = StatusCode::BAD_REQUEST;
        return Ok(response);
    }
    tokio::spawn(async move {
        let upgraded = hyper::upgrade::on(request).await.unwrap();
        echo(over(upgraded, Role::Server).await).await;
    });
    Ok(response)
}

async fn echo<S: AsyncRead + AsyncWrite + Unpin>(mut socket: WebSocketStream<S>) {
    while let Some(Ok(message)) = socket.next().await {
        if message.is_text() || message.is_binary() {
            // The client may have gone.
            let _ = send(&mut socket, message).await;
        }
    }
}

/// Sends one message.
pub(crate) async fn send<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut WebSocketStream<S>,
    message: tokio_tungstenite::tungstenite::Message,
) -> Result<(), tokio_tungstenite::tungstenite::Error> {
    use futures_util::SinkExt;
    socket.send(message).await
}

async fn over(upgraded: Upgraded, role: Role) -> WebSocketStream<TokioIo<Upgraded>> {
    WebSocketStream::from_raw_socket(TokioIo::new(upgraded), role, None).await
}

/// A client over HTTP/1.1.
pub(crate) async fn by_upgrade(address: SocketAddr) -> WebSocketStream<TcpStream> {
    by_upgrade_to(address, "a.example").await
}

/// As `by_upgrade`, for a host of its own.
pub(crate) async fn by_upgrade_to(address: SocketAddr, host: &str) -> WebSocketStream<TcpStream> {
    let stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let url = format!("ws://{host}/socket");
    let (socket, response) = tokio_tungstenite::client_async(url, stream).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    socket
}

/// A client over HTTP/2; or what it was answered instead of a tunnel.
pub(crate) async fn by_connect(
    client: &mut Client,
) -> Result<WebSocketStream<TokioIo<Upgraded>>, StatusCode> {
    let request = Request::connect("http://a.example/socket")
        .header("sec-websocket-version", "13")
        .extension(Protocol::from_static("websocket"))
        .body(Empty::new().boxed());
    let mut response = client.request(request.unwrap()).await.unwrap();
    if !response.status().is_success() {
        return Err(response.status());
    }
    assert!(!response.headers().contains_key("sec-websocket-accept"));
    let upgraded = hyper::upgrade::on(&mut response).await.unwrap();
    Ok(over(upgraded, Role::Client).await)
}
