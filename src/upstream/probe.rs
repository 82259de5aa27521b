//! Single questions to endpoints, each over a connection of its own: that it can be made is a part of
//! the answer.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::{Body, Incoming};

use crate::backend::{Endpoint, Transport};
use crate::telemetry::metrics::Level;

use super::connect::{Connected, Counted, Dial, connect as make};
use super::{Needs, SendError, shape};

const NEEDS: Needs = Needs {
    trailers: true,
    tunnel: false,
    fresh: false,
};

/// An endpoint that is asked, and by what kind of connection. Of its backend it has only that: who asks
/// does so for long, and the rest of a snapshot must not live on with him.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// What is spoken with it, and over what.
    pub transport: Arc<Transport>,
    /// How long a connection may take to stand.
    pub connect_timeout: Duration,
}

/// Makes a connection, up to where a request could be sent, and closes it.
///
/// # Errors
///
/// See [`SendError`].
pub async fn connect(asked: &Asked) -> Result<(), SendError> {
    let connected = make::<http_body_util::Empty<bytes::Bytes>>(asked.dial(), uncounted()).await;
    connected.map(drop)
}

/// Sends a request, and waits for the head of its response.
///
/// # Errors
///
/// See [`SendError`].
pub async fn send<B>(
    asked: &Asked,
    mut request: Request<B>,
) -> Result<Response<Incoming>, SendError>
where
    B: Body + Unpin + 'static,
    B::Data: Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let response = match make::<B>(asked.dial(), uncounted()).await? {
        Connected::Http1(mut connection) => {
            shape::http1(&mut request);
            connection.sender.send_request(request).await
        }
        Connected::Http2(shared) => {
            let is_encrypted = asked.transport.tls.is_some();
            shape::http2(&mut request, &asked.endpoint.authority, is_encrypted, NEEDS);
            let claim = shared.claim();
            let closed = || SendError::Connect(io::ErrorKind::ConnectionAborted.into());
            let claim = claim.ok_or_else(closed)?;
            claim.sender().send_request(request).await
        }
    };
    response.map_err(SendError::Exchange)
}

/// Connections that ask are none of those that serve.
fn uncounted() -> Counted {
    (Arc::<Level>::default().up(), None)
}

// === impl Asked ===

impl Asked {
    fn dial(&self) -> Dial<'_> {
        Dial {
            endpoint: &self.endpoint,
            transport: &self.transport,
            timeout: self.connect_timeout,
            needs: NEEDS,
            addresses: None,
        }
    }
}
