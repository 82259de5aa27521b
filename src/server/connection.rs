//! A client's connection from its first byte to its end: TLS, what is spoken, and the drain.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http::header::{CONNECTION, HeaderValue};
use hyper::body::Body;
use hyper::rt::{Read, ReadBuf};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use crate::config::{self, ListenerHttp2, ListenerLimits};
use crate::proxy::Proxy;
use crate::proxy::origin::{Peer, TlsSession};
use crate::proxy::timeouts::Timeout;
use crate::proxy_protocol;
use crate::snapshot::Listener;
use crate::stream::{HYPER_BUFFER, Stream};
use crate::tls::server::ServerTls;

use super::Phase;
use super::conduct::{Clients, Conduct, Outlasted, Watched};
use super::streams::{Served, StreamExecutor};
use super::worker::{Accepted, Serving};

/// What an HTTP/2 client sends first (RFC 9113 section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What is read at once to see what a client speaks, in bytes: more than most request heads.
const FIRST_READ: usize = 1024;

/// How long a connection that has to end waits for a request, so as to say with its response that it
/// is the last one: a request that is on its way when an idle connection is closed is lost.
const LAST_REQUEST_GRACE: Duration = Duration::from_secs(1);

/// How long a client has to take leave of a connection that rests.
const FAREWELL: Duration = Duration::from_secs(1);

/// hyper's own limit, for which it needs no memory besides the stack.
const HEADER_FIELDS_OF_HYPER: usize = 100;

/// Resets of ours that an HTTP/2 client may provoke before its connection ends (CVE-2025-8671,
/// "MadeYouReset").
const PROVOKED_RESETS: usize = 1024;

/// Streams that a client may have reset before we have looked at them (CVE-2023-44487, "rapid
/// reset").
const RESET_BEFORE_ACCEPTED: usize = 20;

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spoken {
    Http1,
    Http2,
}

/// A connection that is ready for its first request.
struct Ready {
    stream: Stream,
    spoken: Spoken,
    timeout: Timeout,
}

/// How watching a connection ends.
enum Parting {
    /// It has ended, or its client has gone too far.
    Over(hyper::Result<()>),
    /// It should end as soon as nothing is under way: its client rests, or the process drains.
    Due,
}

/// Serves a connection to its end.
pub(super) async fn serve(
    proxy: Rc<Proxy>,
    clients: Rc<Clients>,
    accepted: Accepted,
    serving: Serving,
) {
    let Accepted {
        stream,
        listener,
        address,
        phase,
        active,
        slot,
    } = accepted;
    let mut peer = Peer::new(listener, address, Rc::new((serving, active, slot)));
    let Some(listener) = proxy.live().current().listener(peer.listener).cloned() else {
        return debug!(listener = %peer.listener, "a connection came through a listener that is gone");
    };
    let timeout = proxy.timer().0.timeout();
    // Boxed, or every connection would keep the room that a handshake needs.
    let prepared = Box::pin(prepare(stream, &listener, &mut peer, timeout));
    let ready = match unless_drained(prepared, phase.clone()).await {
        Ok(ready) => ready,
        Err(error) => return debug!(%error, peer = %peer.address, "connection failed"),
    };
    let Listener { settings, tls } = listener;
    // A connection would hold on to an old certificate for as long as it stands.
    drop(tls);
    let Ready {
        stream,
        spoken,
        timeout,
    } = ready;
    let conduct = Conduct::new(settings.timeouts, spoken == Spoken::Http1, timeout);
    clients.come(&conduct);
    let watched = Watched::new(stream, Arc::clone(&conduct));
    let ended = match spoken {
        Spoken::Http1 => serve_http1(&proxy, &peer, watched, conduct, phase, &settings).await,
        Spoken::Http2 => {
            let peer = Rc::new(peer);
            Box::pin(serve_http2(proxy, peer, watched, conduct, phase, &settings)).await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "connection ended");
    }
}

/// Waits for a connection to be ready; in a drain no longer than for a request.
async fn unless_drained(
    prepared: impl Future<Output = io::Result<Ready>>,
    mut phase: watch::Receiver<Phase>,
) -> io::Result<Ready> {
    tokio::select! {
        biased;
        ready = prepared => ready,
        () = last_grace(&mut phase) => Err(io::Error::other("the process drains")),
    }
}

/// Waits until a connection without a request has to end.
async fn last_grace(phase: &mut watch::Receiver<Phase>) {
    // The sender's end is a drop, which says the same as `Draining`.
    let _ = phase.wait_for(|phase| *phase >= Phase::Draining).await;
    sleep(LAST_REQUEST_GRACE).await;
}

/// Does what comes before HTTP.
async fn prepare(
    stream: std::net::TcpStream,
    listener: &Listener,
    peer: &mut Peer,
    timeout: Timeout,
) -> io::Result<Ready> {
    let mut stream = TcpStream::from_std(stream)?;
    peer.local = stream.local_addr()?;
    let timeouts = &listener.settings.timeouts;
    if listener.settings.proxy_protocol && listener.settings.trusts(peer.address.ip()) {
        let header = proxy_protocol::receive(&mut stream);
        let client = within(&timeout, timeouts.first_byte, header).await?;
        if let Some(client) = client {
            peer.speaks_for(client);
        }
    }
    let mut stream = match &listener.tls {
        None => Stream::plain(stream),
        Some(tls) => {
            let accepting = accept_tls(stream, tls);
            let (stream, session) = within(&timeout, timeouts.tls_handshake, accepting).await?;
            peer.tls = Some(session);
            stream
        }
    };
    let agreed_on_http2 = peer.tls.as_ref().is_some_and(|tls| tls.speaks_http2);
    let spoken = if agreed_on_http2 {
        Spoken::Http2
    } else {
        let (read, spoken) = within(&timeout, timeouts.first_byte, sniff(&mut stream)).await?;
        stream.put_back(read);
        spoken
    };
    Ok(Ready {
        stream,
        spoken,
        timeout,
    })
}

async fn accept_tls(stream: TcpStream, tls: &ServerTls) -> io::Result<(Stream, TlsSession)> {
    let accepted = TlsAcceptor::from(Arc::clone(&tls.config))
        .accept(stream)
        .await?;
    let session = TlsSession::of(accepted.get_ref().1, tls.subject_header.clone());
    Ok((Stream::tls(accepted), session))
}

/// Reads until it is clear what the client speaks, and returns what was read.
async fn sniff(stream: &mut Stream) -> io::Result<(Bytes, Spoken)> {
    let mut read = BytesMut::new();
    loop {
        let mut room = [0; FIRST_READ];
        let mut buffer = ReadBuf::new(&mut room);
        poll_fn(|cx| Pin::new(&mut *stream).poll_read(cx, buffer.unfilled())).await?;
        if buffer.filled().is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        read.extend_from_slice(buffer.filled());
        let compared = read.len().min(HTTP2_PREFACE.len());
        if read[..compared] != HTTP2_PREFACE[..compared] {
            return Ok((read.freeze(), Spoken::Http1));
        }
        if compared == HTTP2_PREFACE.len() {
            return Ok((read.freeze(), Spoken::Http2));
        }
    }
}

/// Waits for something, but not for longer than `limit`.
async fn within<T>(
    timeout: &Timeout,
    limit: Duration,
    what: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    timeout.set(Some(Instant::now() + limit));
    let mut what = pin!(what);
    poll_fn(|cx| match what.as_mut().poll(cx) {
        Poll::Pending if timeout.poll_passed(cx).is_ready() => {
            Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
        }
        polled => polled,
    })
    .await
}

async fn serve_http1(
    proxy: &Rc<Proxy>,
    peer: &Peer,
    stream: Watched,
    conduct: Arc<Conduct>,
    phase: watch::Receiver<Phase>,
    settings: &config::Listener,
) -> hyper::Result<()> {
    let leaving = Cell::new(false);
    let service = service_fn(|request: http::Request<hyper::body::Incoming>| {
        let busy = conduct.begin(!request.body().is_end_stream());
        let (proxy, leaving, conduct) = (&*proxy, &leaving, &conduct);
        async move {
            let mut response = proxy.handle(peer, request).await;
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                conduct.becomes_tunnel();
            } else if leaving.get() {
                // With this hyper closes the connection after the response.
                response
                    .headers_mut()
                    .insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response.map(|body| Served::new(body, busy)))
        }
    });
    let ListenerLimits {
        request_head,
        header_fields,
        ..
    } = settings.limits;
    let mut builder = http1::Builder::new();
    builder
        .header_read_timeout(None)
        .max_buf_size(HYPER_BUFFER.max(request_head as usize))
        .max_header_size(request_head as usize);
    if header_fields != HEADER_FIELDS_OF_HYPER {
        builder.max_headers(header_fields);
    }
    let connection = builder.serve_connection(stream, service);
    let mut connection = pin!(connection.with_upgrades());
    match until_drained(connection.as_mut(), phase, &leaving, &conduct).await {
        Parting::Over(ended) => ended,
        Parting::Due => {
            // Closes an idle connection now, and another one after its response.
            connection.as_mut().graceful_shutdown();
            take_leave(connection, &conduct, || false).await
        }
    }
}

async fn serve_http2(
    proxy: Rc<Proxy>,
    peer: Rc<Peer>,
    stream: Watched,
    conduct: Arc<Conduct>,
    phase: watch::Receiver<Phase>,
    settings: &config::Listener,
) -> hyper::Result<()> {
    let is_asked = Rc::new(Cell::new(false));
    let guards = Rc::clone(&peer.guards);
    let executor = StreamExecutor::new(proxy.timer().0, settings.timeouts.write);
    let builder = http2_builder(executor.clone(), &settings.http2, settings.limits);
    let counted = Arc::clone(&conduct);
    let asked = Rc::clone(&is_asked);
    let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
        let busy = counted.begin(false);
        asked.set(true);
        let clock = executor.next_stream();
        let (proxy, peer) = (Rc::clone(&proxy), Rc::clone(&peer));
        // Boxed: a stream is moved a few times before it runs.
        Box::pin(async move {
            let response = proxy.handle(&peer, request).await;
            Ok::<_, Infallible>(response.map(|body| Served::timed(body, busy, clock)))
        })
    });
    // Held by the peer and here; by more as long as there is a tunnel, which is a use without requests.
    let has_tunnels = || Rc::strong_count(&guards) > 2;
    let mut connection = pin!(builder.serve_connection(stream, service));
    let parting = {
        let mut watched = pin!(until_outlasted(connection.as_mut(), &conduct, has_tunnels));
        tokio::select! {
            biased;
            () = until_farewell(phase, &is_asked) => Parting::Due,
            parting = watched.as_mut() => parting,
        }
    };
    match parting {
        Parting::Over(ended) => ended,
        Parting::Due => {
            // Says which streams are the last ones (GOAWAY), and serves those to their end.
            connection.as_mut().graceful_shutdown();
            take_leave(connection, &conduct, has_tunnels).await
        }
    }
}

fn http2_builder(
    executor: StreamExecutor,
    http2: &ListenerHttp2,
    limits: ListenerLimits,
) -> http2::Builder<StreamExecutor> {
    let mut builder = http2::Builder::new(executor);
    builder
        .enable_connect_protocol()
        .max_concurrent_streams(http2.max_concurrent_streams)
        .initial_stream_window_size(http2.stream_window)
        .initial_connection_window_size(http2.connection_window)
        .max_send_buf_size(http2.send_buffer)
        .max_header_list_size(limits.request_head)
        .max_local_error_reset_streams(PROVOKED_RESETS)
        .max_pending_accept_reset_streams(RESET_BEFORE_ACCEPTED);
    builder
}

/// Serves a connection until it ends, or has to: when the process is about to end, `leaving` is set at
/// once, and once it drains, the connection has to end a grace later.
async fn until_drained<C: Future<Output = hyper::Result<()>>>(
    mut connection: Pin<&mut C>,
    mut phase: watch::Receiver<Phase>,
    leaving: &Cell<bool>,
    conduct: &Conduct,
) -> Parting {
    let mut told = phase.clone();
    // What has changed before is seen when it is first looked at.
    told.mark_unchanged();
    let drain = async {
        // The sender's end is a drop, which says the same as `Draining`.
        let _ = phase.wait_for(|phase| *phase >= Phase::Leaving).await;
        leaving.set(true);
        last_grace(&mut phase).await;
    };
    let mut drain = pin!(drain);
    let mut is_watched = false;
    poll_fn(|cx| {
        // The drain first: a response that comes at the same moment must say that it is the last.
        // And only when it has begun, since to wait for it takes a lock that all connections share;
        // once it is watched, it wakes us.
        if !is_watched || leaving.get() || told.has_changed().unwrap_or(true) {
            is_watched = true;
            if drain.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Parting::Due);
            }
        }
        poll_watched(connection.as_mut(), conduct, &|| false, cx)
    })
    .await
}

/// Waits until an HTTP/2 connection should be told that it ends. One that has just been made has the
/// time for a request first: sent away before, its client would come again, and meet the same.
///
/// `is_asked` is looked at whenever the connection does something, as its response will do.
async fn until_farewell(mut phase: watch::Receiver<Phase>, is_asked: &Cell<bool>) {
    // The sender's end is a drop, which says the same as `Draining`.
    let _ = phase.wait_for(|phase| *phase >= Phase::Leaving).await;
    let mut drain = pin!(last_grace(&mut phase));
    poll_fn(|cx| match is_asked.get() {
        true => Poll::Ready(()),
        false => drain.as_mut().poll(cx),
    })
    .await;
}

/// Serves a connection that is to end, until its client has had the time to hear of it.
async fn take_leave<C: Future<Output = hyper::Result<()>>>(
    connection: Pin<&mut C>,
    conduct: &Conduct,
    is_used: impl Fn() -> bool,
) -> hyper::Result<()> {
    conduct.rest_for(FAREWELL);
    match until_outlasted(connection, conduct, is_used).await {
        Parting::Over(ended) => ended,
        Parting::Due => Ok(()),
    }
}

/// Serves a connection until it ends, or its client has taken too long for something; `is_used` says
/// whether it is in use without any request.
async fn until_outlasted<C: Future<Output = hyper::Result<()>>>(
    mut connection: Pin<&mut C>,
    conduct: &Conduct,
    is_used: impl Fn() -> bool,
) -> Parting {
    poll_fn(|cx| poll_watched(connection.as_mut(), conduct, &is_used, cx)).await
}

fn poll_watched<C: Future<Output = hyper::Result<()>>>(
    connection: Pin<&mut C>,
    conduct: &Conduct,
    is_used: &impl Fn() -> bool,
    cx: &mut std::task::Context<'_>,
) -> Poll<Parting> {
    if let Poll::Ready(ended) = connection.poll(cx) {
        return Poll::Ready(Parting::Over(ended));
    }
    loop {
        match ready!(conduct.poll_outlasted(cx)) {
            Outlasted::Idle if is_used() => conduct.rest(),
            Outlasted::Idle => return Poll::Ready(Parting::Due),
            what => {
                debug!(?what, "a client took too long");
                return Poll::Ready(Parting::Over(Ok(())));
            }
        }
    }
}
