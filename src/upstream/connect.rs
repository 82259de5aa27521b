//! Making a connection to an endpoint: TCP, TLS, and what is spoken over it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::body::Body;
use hyper::client::conn::{http1, http2};
use hyper::rt::Executor;
use socket2::SockRef;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tracing::debug;

use crate::backend::{Endpoint, Http2Policy, Transport, UpstreamProtocol};
use crate::proxy_protocol;
use crate::stream::{HYPER_BUFFER, Stream, bound_unsent};
use crate::telemetry::metrics::Up;
use crate::tls::ALPN_HTTP2;
use crate::tls::client::ClientTls;

use super::early::AnsweredEarly;
use super::room::Place;
use super::shared::{Peer, Shared};
use super::{Addresses, Dedicated, Needs, SendError};

/// What making a connection needs to know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dial<'t> {
    pub(super) endpoint: &'t Endpoint,
    pub(super) transport: &'t Transport,
    /// How long it may take.
    pub(super) timeout: Duration,
    pub(super) needs: Needs,
    pub(super) addresses: Option<&'t Addresses>,
}

/// A connection that stands.
pub(super) enum Connected<B> {
    /// For one request at a time.
    Http1(Dedicated<B>),
    /// For many.
    Http2(Rc<Shared<B>>),
}

/// Runs what hyper wants to be run for a connection, on the thread that calls.
#[derive(Clone, Debug, Default)]
struct ConnectionExecutor(Rc<FirstSettings>);

/// Whether the peer has sent its settings, which a connection begins with (RFC 9113 section 3.4).
#[derive(Debug, Default)]
struct FirstSettings {
    are_known: Cell<bool>,
    /// Told whenever something may have come.
    progress: Notify,
}

/// What hyper runs for a connection: mostly one request, with room for the whole connection. Boxed, since a
/// task moves what it runs half a dozen times.
struct Observed<F> {
    future: Pin<Box<F>>,
    settings: Rc<FirstSettings>,
}

/// A connection to be driven, of which things can be asked meanwhile; `None` once it has ended, since
/// those who send over it learn of its end by its being dropped.
#[derive(Debug)]
struct Driver<C>(RefCell<Option<Pin<Box<C>>>>);

/// Counts a connection for as long as it lives.
pub(super) type Counted = (Up, Option<Place>);

/// What is taken for the peer's limit before it has sent one: nobody sends that.
const UNKNOWN_LIMIT: usize = usize::MAX - 1;

/// Connects to an endpoint; the connection counts as one of the backend's until it has ended.
pub(super) async fn connect<B>(to: Dial<'_>, counted: Counted) -> Result<Connected<B>, SendError>
where
    B: Body + Unpin + 'static,
    B::Data: Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let connecting = async {
        let dialled = dial(to).await;
        let (stream, speaks_http2) = dialled.map_err(SendError::Connect)?;
        if speaks_http2 {
            Box::pin(handshake_http2(to.transport.http2, stream, counted)).await
        } else {
            handshake_http1(stream, counted).await
        }
    };
    timeout(to.timeout, connecting)
        .await
        .unwrap_or(Err(SendError::ConnectTimeout))
}

/// Gives the connection, and whether HTTP/2 is spoken over it.
async fn dial(to: Dial<'_>) -> io::Result<(Stream, bool)> {
    let mut stream = to.socket()?.connect(to.endpoint.address).await?;
    let transport = to.transport;
    if let Some(version) = transport.proxy_protocol {
        let header = match to.addresses {
            Some((client, listener)) => proxy_protocol::header(version, *client, *listener),
            None => proxy_protocol::own_header(version),
        };
        stream.write_all(&header?).await?;
    }
    match &transport.tls {
        None => {
            let speaks_http2 = transport.protocol == UpstreamProtocol::Http2;
            Ok((Stream::plain(stream), speaks_http2))
        }
        // Boxed, since only few connections are made.
        Some(tls) => Box::pin(dial_tls(stream, tls, to)).await,
    }
}

async fn dial_tls(stream: TcpStream, tls: &ClientTls, to: Dial<'_>) -> io::Result<(Stream, bool)> {
    let config = tls.config(to.needs_http1());
    let name = tls.name(to.endpoint.address.ip(), to.endpoint.certified.as_ref());
    let stream = TlsConnector::from(Arc::clone(config))
        .connect(name, stream)
        .await?;
    let speaks_http2 = stream.get_ref().1.alpn_protocol() == Some(ALPN_HTTP2);
    if to.transport.protocol == UpstreamProtocol::Http2 && !speaks_http2 {
        let reason = "the endpoint does not agree on HTTP/2 by ALPN";
        return Err(io::Error::other(reason));
    }
    if to.transport.protocol == UpstreamProtocol::Negotiated && !speaks_http2 {
        to.bound_received(SockRef::from(stream.get_ref().0));
    }
    Ok((Stream::tls(stream), speaks_http2))
}

async fn handshake_http1<B>(stream: Stream, counted: Counted) -> Result<Connected<B>, SendError>
where
    B: Body + Unpin + 'static,
    B::Data: Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (sender, driver) = http1::Builder::new()
        .max_buf_size(HYPER_BUFFER)
        .handshake::<_, B>(AnsweredEarly::new(stream))
        .await
        .map_err(|error| SendError::Connect(io::Error::other(error)))?;
    let task = tokio::task::spawn_local(async move {
        let _counted = counted;
        if let Err(error) = driver.with_upgrades().await {
            debug!(%error, "upstream connection ended");
        }
    });
    Ok(Connected::Http1(Dedicated {
        sender,
        task: task.abort_handle(),
        has_served: false,
    }))
}

async fn handshake_http2<B>(
    policy: Http2Policy,
    stream: Stream,
    counted: Counted,
) -> Result<Connected<B>, SendError>
where
    B: Body + Unpin + 'static,
    B::Data: Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let executor = ConnectionExecutor::default();
    let settings = Rc::clone(&executor.0);
    let (sender, driver) = http2::Builder::new(executor)
        .initial_max_send_streams(UNKNOWN_LIMIT)
        .initial_stream_window_size(policy.stream_window)
        .initial_connection_window_size(policy.connection_window)
        .max_send_buf_size(policy.send_buffer)
        .max_header_list_size(policy.header_list)
        // They count for the whole life of a connection, and every client that goes away makes one
        // (h2#856): with a limit, clients could end the connection of all.
        .max_local_error_reset_streams(None)
        .handshake::<_, B>(stream)
        .await
        .map_err(|error| SendError::Connect(io::Error::other(error)))?;
    let room = counted.1.as_ref().map(|place| Rc::clone(place.room()));
    let driver = Rc::new(Driver(RefCell::new(Some(Box::pin(driver)))));
    let (driven, watched) = (Rc::clone(&driver), Rc::clone(&settings));
    tokio::task::spawn_local(async move {
        let _counted = counted;
        if let Err(error) = poll_fn(|cx| driven.poll(cx)).await {
            debug!(%error, "upstream connection ended");
        }
        watched.progress.notify_one();
    });
    while driver.max_requests() == UNKNOWN_LIMIT {
        settings.progress.notified().await;
    }
    if sender.is_closed() {
        let reason = "the endpoint does not speak HTTP/2";
        return Err(SendError::Connect(io::Error::other(reason)));
    }
    settings.are_known.set(true);
    Ok(Connected::Http2(Shared::new(
        sender,
        driver,
        policy.max_requests,
        room,
    )))
}

// === impl Dial ===

impl Dial<'_> {
    /// True for a tunnel where there is a choice: every endpoint that has WebSockets has them in
    /// HTTP/1.1, and few have them in HTTP/2.
    pub(super) fn needs_http1(&self) -> bool {
        self.needs.tunnel && self.transport.protocol != UpstreamProtocol::Http2
    }

    /// What is to be connected. What the kernel holds is bounded as far as it lets it be: it works without.
    fn socket(&self) -> io::Result<TcpSocket> {
        let socket = match self.endpoint.address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        socket.set_nodelay(true)?;
        if let Err(error) = bound_unsent(SockRef::from(&socket)) {
            debug!(%error, "the kernel may hold more of slow uploads");
        }
        // Before it is connected: an endpoint that has seen a large window waits for another one, and before
        // Linux 6.11 the window stays as it was at first.
        if self.transport.protocol == UpstreamProtocol::Http1 {
            self.bound_received(SockRef::from(&socket));
        }
        Ok(socket)
    }

    /// Bounds what the kernel holds of responses over HTTP/1.1; over HTTP/2 the windows do so.
    fn bound_received(&self, socket: SockRef<'_>) {
        let Some(bytes) = self.transport.http1.receive_buffer else {
            return;
        };
        if let Err(error) = socket.set_recv_buffer_size(bytes) {
            debug!(%error, "the kernel may hold more of responses for slow clients");
        }
    }
}

// === impl ConnectionExecutor ===

impl<F: Future<Output: 'static> + 'static> Executor<F> for ConnectionExecutor {
    fn execute(&self, future: F) {
        drop(tokio::task::spawn_local(Observed {
            future: Box::pin(future),
            settings: Rc::clone(&self.0),
        }));
    }
}

impl<F: Future> Future for Observed<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let polled = self.future.as_mut().poll(cx);
        if !self.settings.are_known.get() {
            self.settings.progress.notify_one();
        }
        polled
    }
}

// === impl Driver ===

impl<C: Future<Output = hyper::Result<()>>> Driver<C> {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        let mut connection = self.0.borrow_mut();
        let Some(driven) = connection.as_mut() else {
            return Poll::Ready(Ok(()));
        };
        let ended = ready!(driven.as_mut().poll(cx));
        *connection = None;
        Poll::Ready(ended)
    }
}

impl<B> Peer for Driver<http2::Connection<Stream, B, ConnectionExecutor>>
where
    B: Body + Unpin + 'static,
    B::Data: Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fn max_requests(&self) -> usize {
        // Nobody asks while it is driven.
        let connection = self.0.try_borrow().ok();
        let connection = connection
            .as_ref()
            .and_then(|connection| connection.as_ref());
        connection.map_or(1, |connection| connection.current_max_send_streams())
    }

    fn takes_tunnels(&self) -> bool {
        let connection = self.0.try_borrow().ok();
        let connection = connection
            .as_ref()
            .and_then(|connection| connection.as_ref());
        connection.is_some_and(|connection| connection.is_extended_connect_protocol_enabled())
    }
}
