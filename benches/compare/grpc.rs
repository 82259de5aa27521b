//! The service of gRPC behind the proxies of the comparison: as little as answers calls over HTTP/2.
//!
//! `grpc ADDRESS...` answers `/bench/Unary` with a message of 128 bytes, and `/bench/Stream` with a hundred of
//! them, each in a frame of its own. One thread.
#![allow(clippy::print_stderr, reason = "a program, not the library")]

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::ExitCode;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Request, Response};
use hyper::body::{Body, Frame, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

const STREAM: usize = 100;

/// So many messages, and the trailers.
struct Messages {
    message: Bytes,
    left: usize,
    has_ended: bool,
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let addresses: Vec<String> = std::env::args().skip(1).collect();
    match runtime.and_then(|runtime| runtime.block_on(serve(&addresses))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(addresses: &[String]) -> io::Result<()> {
    let mut tasks = tokio::task::JoinSet::new();
    for address in addresses {
        let address: SocketAddr = address.parse().map_err(io::Error::other)?;
        tasks.spawn(accept(TcpListener::bind(address).await?));
    }
    while tasks.join_next().await.is_some() {}
    Ok(())
}

async fn accept(listener: TcpListener) {
    let mut message = vec![0, 0, 0, 0, 128];
    message.resize(5 + 128, b'x');
    let message = Bytes::from(message);
    while let Ok((stream, _)) = listener.accept().await {
        // What cannot be set costs a little latency.
        let _ = stream.set_nodelay(true);
        let message = message.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let response = answer(&request, message.clone());
                async { Ok::<_, Infallible>(response) }
            });
            let builder = http2::Builder::new(TokioExecutor::new());
            // The proxy may close the connection at any time.
            let _ = builder
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn answer(request: &Request<Incoming>, message: Bytes) -> Response<Messages> {
    let left = match request.uri().path() {
        "/bench/Stream" => STREAM,
        _ => 1,
    };
    let mut response = Response::new(Messages {
        message,
        left,
        has_ended: false,
    });
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

impl Body for Messages {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left > 0 {
            self.left -= 1;
            return Poll::Ready(Some(Ok(Frame::data(self.message.clone()))));
        }
        if std::mem::replace(&mut self.has_ended, true) {
            return Poll::Ready(None);
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}
