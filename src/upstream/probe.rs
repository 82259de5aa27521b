//! Single questions to endpoints, each over a connection of its own: that it can be made is a part of
//! the answer.

use std::io;
use std::sync::Arc;

use http::{Request, Response};
use hyper::body::{Body, Incoming};

use crate::backend::{Backend, Endpoint};
use crate::telemetry::metrics::Level;

use super::connect::{Connected, Counted, connect as make};
use super::{Needs, SendError, To, shape};

/// Makes a connection, up to where a request could be sent, and closes it.
///
/// # Errors
///
/// See [`SendError`].
pub async fn connect(backend: &Backend, endpoint: &Endpoint) -> Result<(), SendError> {
    let to = to(backend, endpoint);
    let connected = make::<http_body_util::Empty<bytes::Bytes>>(&to, uncounted()).await;
    connected.map(drop)
}

/// Sends a request, and waits for the head of its response.
///
/// # Errors
///
/// See [`SendError`].
pub async fn send<B>(
    backend: &Backend,
    endpoint: &Endpoint,
    mut request: Request<B>,
) -> Result<Response<Incoming>, SendError>
where
    B: Body + Unpin + 'static,
    B::Data: Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let to = to(backend, endpoint);
    let response = match make::<B>(&to, uncounted()).await? {
        Connected::Http1(mut connection) => {
            shape::http1(&mut request);
            connection.sender.send_request(request).await
        }
        Connected::Http2(shared) => {
            let is_encrypted = backend.transport.tls.is_some();
            shape::http2(&mut request, &endpoint.authority, is_encrypted, to.needs);
            let claim = shared.claim();
            let closed = || SendError::Connect(io::ErrorKind::ConnectionAborted.into());
            let claim = claim.ok_or_else(closed)?;
            claim.sender().send_request(request).await
        }
    };
    response.map_err(SendError::Exchange)
}

fn to<'t>(backend: &'t Backend, endpoint: &'t Endpoint) -> To<'t> {
    To {
        backend,
        endpoint,
        needs: Needs {
            trailers: true,
            tunnel: false,
        },
        addresses: None,
    }
}

/// Connections that ask are none of those that serve.
fn uncounted() -> Counted {
    (Arc::<Level>::default().up(), None)
}
