//! Responses on their way out: when they end, and that no HTTP/2 client can leave one standing for
//! ever.

use std::cell::{Cell, RefCell};
use std::mem;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, SizeHint};
use hyper::rt::Executor;
use tokio::time::Instant;

use crate::proxy::body::{BodyError, ReplyBody};
use crate::proxy::timeouts::{Timeout, Timeouts};

use super::conduct::Busy;

/// What is handed on of a response at once, in bytes: what a frame holds unless the client says
/// otherwise (RFC 9113 section 4.2), and what it has to take within its limit.
const PART: usize = 16 << 10;

/// Frames with fewer bytes than this cost more than copying them into one does.
const LITTLE: usize = 4 << 10;

/// What a body gives when it is asked.
type Given = Option<Result<Frame<Bytes>, BodyError>>;

/// The body of a response; as long as it is there, the connection is busy.
#[derive(Debug)]
pub(super) struct Served {
    body: ReplyBody,
    _busy: Busy,
    /// In HTTP/2; boxed, since hyper moves a body more than a dozen times.
    parts: Option<Box<Parts>>,
}

/// How a body is handed on in HTTP/2.
#[derive(Debug)]
struct Parts {
    /// Data that have come and are not handed on yet.
    rest: Bytes,
    /// What has come behind them.
    behind: Option<Given>,
    clock: Rc<StreamClock>,
}

/// Since when an HTTP/2 client has left no room for more of a response (RFC 9113 section 5.2).
///
/// hyper asks a body for more when the client has left room. So what tells a slow client from a
/// slow upstream is whether the body was asked since it last gave something.
#[derive(Debug, Default)]
pub(super) struct StreamClock(Cell<Turn>);

/// Who has to do something before a response can go on.
#[derive(Clone, Copy, Debug, Default)]
enum Turn {
    /// The upstream.
    #[default]
    Upstream,
    /// The client, from now on.
    Client,
    /// The client, since then.
    ClientSince(Instant),
}

/// Runs the streams of one HTTP/2 connection, and ends those whose client takes nothing for too
/// long: other streams of the connection may be fine.
#[derive(Clone, Debug)]
pub(super) struct StreamExecutor {
    timeouts: Arc<Timeouts>,
    limit: Duration,
    /// The clock of the stream that is about to be executed: hyper executes what a service returned
    /// right after it has called it. What it executes besides (the writing end of a tunnel) has none.
    next: Rc<RefCell<Option<Rc<StreamClock>>>>,
}

/// Boxed, since a task moves what it runs half a dozen times.
struct Supervised<F> {
    stream: Pin<Box<F>>,
    clock: Rc<StreamClock>,
    timeouts: Arc<Timeouts>,
    limit: Duration,
    /// Only streams that have stood still have one.
    timeout: Option<Timeout>,
}

// === impl Served ===

impl Served {
    /// A body of HTTP/1.
    pub(super) fn new(body: ReplyBody, busy: Busy) -> Self {
        Self {
            body,
            _busy: busy,
            parts: None,
        }
    }

    /// A body of HTTP/2.
    pub(super) fn timed(body: ReplyBody, busy: Busy, clock: Rc<StreamClock>) -> Self {
        let parts = Parts {
            rest: Bytes::new(),
            behind: None,
            clock,
        };
        Self {
            body,
            _busy: busy,
            parts: Some(Box::new(parts)),
        }
    }
}

impl Body for Served {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Given> {
        let Self { body, parts, .. } = &mut *self;
        match parts {
            None => Pin::new(body).poll_frame(cx),
            Some(parts) => {
                let polled = parts.poll_next(body, cx);
                parts.clock.asked(polled.is_ready());
                polled
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self.parts.as_deref() {
            Some(Parts { rest, .. }) if !rest.is_empty() => false,
            Some(Parts {
                behind: Some(behind),
                ..
            }) => behind.is_none(),
            _ => self.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        // hyper asks before it takes anything, and nothing is kept back then.
        self.body.size_hint()
    }
}

// === impl Parts ===

impl Parts {
    /// The next part: small, so that a client which takes a little now and then is not taken for one
    /// that takes nothing.
    fn poll_next(&mut self, body: &mut ReplyBody, cx: &mut Context<'_>) -> Poll<Given> {
        if self.rest.is_empty() {
            if let Some(behind) = self.behind.take() {
                return Poll::Ready(behind);
            }
            match data(ready!(Pin::new(&mut *body).poll_frame(cx))) {
                Ok(data) => self.rest = data,
                Err(other) => return Poll::Ready(other),
            }
            if self.rest.len() < LITTLE && !body.is_end_stream() {
                self.gather(body, cx);
            }
        }
        let part = match self.rest.len() {
            ..=PART => mem::take(&mut self.rest),
            _ => self.rest.split_to(PART),
        };
        Poll::Ready(Some(Ok(Frame::data(part))))
    }

    /// Adds what is there already: where an upstream's frames end means nothing (RFC 9113 section
    /// 6.1), and a stream of small messages costs less in few of them.
    fn gather(&mut self, body: &mut ReplyBody, cx: &mut Context<'_>) {
        let mut gathered = BytesMut::new();
        while self.rest.len() + gathered.len() < PART
            && let Poll::Ready(given) = Pin::new(&mut *body).poll_frame(cx)
        {
            match data(given) {
                Ok(data) => {
                    if gathered.is_empty() {
                        gathered.reserve(LITTLE);
                        gathered.extend_from_slice(&mem::take(&mut self.rest));
                    }
                    gathered.extend_from_slice(&data);
                }
                Err(other) => {
                    self.behind = Some(other);
                    break;
                }
            }
        }
        if !gathered.is_empty() {
            self.rest = gathered.freeze();
        }
    }
}

/// The data that a body has given, or what else it has.
fn data(given: Given) -> Result<Bytes, Given> {
    match given {
        Some(Ok(frame)) => frame.into_data().map_err(|frame| Some(Ok(frame))),
        other => Err(other),
    }
}

// === impl StreamClock ===

impl StreamClock {
    /// The body was asked for more, and gave something or did not.
    fn asked(&self, has_given: bool) {
        self.0.set(match has_given {
            true => Turn::Client,
            false => Turn::Upstream,
        });
    }

    /// Since when the client has left no room, if it has none now that the stream stands still.
    fn stands_since(&self) -> Option<Instant> {
        match self.0.get() {
            Turn::Upstream => None,
            Turn::Client => {
                // Asked for only now, since most responses never stand still.
                let now = Instant::now();
                self.0.set(Turn::ClientSince(now));
                Some(now)
            }
            Turn::ClientSince(since) => Some(since),
        }
    }
}

// === impl StreamExecutor ===

impl StreamExecutor {
    pub(super) fn new(timeouts: Arc<Timeouts>, limit: Duration) -> Self {
        Self {
            timeouts,
            limit,
            next: Rc::default(),
        }
    }

    /// A clock for the stream that is executed next.
    pub(super) fn next_stream(&self) -> Rc<StreamClock> {
        let clock = Rc::default();
        *self.next.borrow_mut() = Some(Rc::clone(&clock));
        clock
    }
}

impl<F: Future<Output: 'static> + 'static> Executor<F> for StreamExecutor {
    fn execute(&self, stream: F) {
        let Some(clock) = self.next.take() else {
            return drop(tokio::task::spawn_local(stream));
        };
        drop(tokio::task::spawn_local(Supervised {
            stream: Box::pin(stream),
            clock,
            timeouts: Arc::clone(&self.timeouts),
            limit: self.limit,
            timeout: None,
        }));
    }
}

// === impl Supervised ===

impl<F: Future> Future for Supervised<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if this.stream.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let Some(since) = this.clock.stands_since() else {
            return Poll::Pending;
        };
        let timeout = this.timeout.get_or_insert_with(|| this.timeouts.timeout());
        let end = since + this.limit;
        if end > Instant::now() {
            timeout.set(Some(end));
        }
        // Dropped unfinished, a stream is reset.
        timeout.poll_passed(cx)
    }
}
