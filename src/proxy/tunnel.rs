//! Two connections that have left HTTP, and what goes between them.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};
use tokio::time::Instant;
use tracing::debug;

use crate::backend::Lease;
use crate::upstream::Loan;

use super::body::RequestBody;
use super::exchange::Exchange;
use super::origin::Guards;
use super::stays::Stay;
use super::timeouts::Timeout;
use super::upgrade::Ends;

/// A tunnel, with what is held on to until it ends.
#[derive(Debug)]
pub struct Tunnel {
    /// Where it leads.
    pub ends: Ends,
    /// The request that asked for it.
    pub exchange: Exchange,
    /// Counts it as in flight at its endpoint.
    pub lease: Lease,
    /// The connection to the endpoint, or its place on one.
    pub loan: Loan<RequestBody>,
    /// Counts the client's connection, which HTTP has done with.
    pub guards: Guards,
    /// How long nothing may go through.
    pub idle: Option<Duration>,
    /// Measures that.
    pub timeout: Timeout,
    /// Whether it may stay on its version.
    pub stay: Option<Rc<Stay>>,
}

/// How a tunnel ends.
enum Ending {
    /// By its ends.
    Closed(io::Result<(u64, u64)>),
    /// Nothing has gone through for too long.
    Rested,
    /// Its user gets another version.
    Moved,
}

/// One end, and how much has come from it.
struct Counted<'c> {
    stream: TokioIo<Upgraded>,
    bytes: Cell<u64>,
    last: &'c Cell<Instant>,
}

// === impl Tunnel ===

impl Tunnel {
    /// Passes on what comes, in both directions, until both ends have ended, one has broken, or
    /// nothing has come for too long.
    pub async fn run(self) {
        let Self {
            ends,
            mut exchange,
            lease: _lease,
            loan: _loan,
            guards: _guards,
            idle,
            timeout,
            stay,
        } = self;
        let (client, upstream) = match tokio::try_join!(ends.client, ends.upstream) {
            Ok(ends) => ends,
            Err(error) => return debug!(%error, "a tunnel did not come to be"),
        };
        let last = Cell::new(Instant::now());
        let mut client = Counted::new(client, &last);
        let mut upstream = Counted::new(upstream, &last);
        let ended = {
            let mut copying = pin!(copy_bidirectional(&mut client, &mut upstream));
            poll_fn(|cx| {
                if let Poll::Ready(ended) = copying.as_mut().poll(cx) {
                    return Poll::Ready(Ending::Closed(ended));
                }
                if stay
                    .as_ref()
                    .is_some_and(|stay| stay.poll_over(cx).is_ready())
                {
                    return Poll::Ready(Ending::Moved);
                }
                poll_idle(&timeout, idle, &last, cx).map(|()| Ending::Rested)
            })
            .await
        };
        match ended {
            Ending::Closed(Ok(_)) => exchange.ended(),
            Ending::Closed(Err(error)) => debug!(%error, "a tunnel broke"),
            Ending::Rested => exchange.rested(),
            Ending::Moved => exchange.moved(),
        }
        exchange.tunnelled(client.bytes.get(), upstream.bytes.get());
    }
}

/// Waits until nothing has gone through for too long.
fn poll_idle(
    timeout: &Timeout,
    idle: Option<Duration>,
    last: &Cell<Instant>,
    cx: &Context<'_>,
) -> Poll<()> {
    let Some(idle) = idle else {
        return Poll::Pending;
    };
    let ends = last.get() + idle;
    if ends > Instant::now() {
        timeout.set(Some(ends));
    }
    timeout.poll_passed(cx)
}

// === impl Counted ===

impl<'c> Counted<'c> {
    fn new(stream: Upgraded, last: &'c Cell<Instant>) -> Self {
        Self {
            stream: TokioIo::new(stream),
            bytes: Cell::new(0),
            last,
        }
    }
}

impl AsyncRead for Counted<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if polled.is_ready() {
            let came = (buf.filled().len() - before) as u64;
            self.bytes.set(self.bytes.get() + came);
            self.last.set(Instant::now());
        }
        polled
    }
}

impl AsyncWrite for Counted<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
