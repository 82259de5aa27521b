//! Two versions of a service that does nothing, in some time, and not always.

use std::convert::Infallible;
use std::net::TcpListener;
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tracing::{debug, warn};

/// How a version behaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Behaviour {
    body: &'static str,
    /// The least it takes.
    latency: Duration,
    /// What it takes on top, now more, now less.
    jitter: Duration,
    /// Of so many requests about one fails.
    one_fails_in: Option<u32>,
}

pub(super) const STABLE: Behaviour = Behaviour {
    body: "shop 1.8.2\n",
    latency: Duration::from_millis(3),
    jitter: Duration::from_millis(4),
    one_fails_in: None,
};

pub(super) const CANARY: Behaviour = Behaviour {
    body: "shop 1.9.0, now with a wish list\n",
    latency: Duration::from_millis(5),
    jitter: Duration::from_millis(8),
    one_fails_in: Some(50),
};

/// Serves on all sockets, for ever.
pub(super) async fn serve(sockets: Vec<(TcpListener, Behaviour)>) {
    for (socket, behaviour) in sockets {
        match tokio::net::TcpListener::from_std(socket) {
            Ok(listener) => drop(tokio::task::spawn_local(accept(listener, behaviour))),
            Err(error) => warn!(%error, "a demo upstream cannot be served"),
        }
    }
    std::future::pending().await
}

async fn accept(listener: tokio::net::TcpListener, behaviour: Behaviour) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::task::spawn_local(serve_connection(stream, behaviour));
    }
}

async fn serve_connection(stream: TcpStream, behaviour: Behaviour) {
    let service = service_fn(|_| behaviour.answer());
    if let Err(error) = http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await
    {
        debug!(%error, "demo upstream connection ended");
    }
}

impl Behaviour {
    async fn answer(self) -> Result<Response<Full<Bytes>>, Infallible> {
        tokio::time::sleep(self.latency + self.jitter.mul_f64(fastrand::f64())).await;
        let fails = self
            .one_fails_in
            .is_some_and(|many| fastrand::u32(..many) == 0);
        let (status, body) = match fails {
            true => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "the wish list is not there\n",
            ),
            false => (StatusCode::OK, self.body),
        };
        let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
        *response.status_mut() = status;
        Ok(response)
    }
}
