//! Responses on their way out: when they end, and that no HTTP/2 client can leave one standing for
//! ever.

use std::cell::{Cell, RefCell};
use std::mem;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::rt::Executor;
use pin_project_lite::pin_project;
use tokio::time::Instant;

use crate::proxy::body::{BodyError, ReplyBody};
use crate::proxy::timeouts::{Timeout, Timeouts};

use super::conduct::Busy;

/// What is handed on of a response at once, in bytes: what a frame holds unless the client says
/// otherwise (RFC 9113 section 4.2), and what it has to take within its limit.
const PART: usize = 16 << 10;

/// The body of a response; as long as it is there, the connection is busy.
#[derive(Debug)]
pub(super) struct Served {
    body: ReplyBody,
    /// What has come of it and is not handed on yet, in HTTP/2.
    rest: Bytes,
    _busy: Busy,
    /// In HTTP/2.
    clock: Option<Rc<StreamClock>>,
}

/// Since when an HTTP/2 client has left no room for more of a response (RFC 9113 section 5.2).
///
/// hyper asks a body for more when the client has left room. So what tells a slow client from a
/// slow upstream is whether the body was asked since it last gave something.
#[derive(Debug, Default)]
pub(super) struct StreamClock(Cell<Option<Instant>>);

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

pin_project! {
    struct Supervised<F> {
        #[pin]
        stream: F,
        clock: Rc<StreamClock>,
        timeouts: Arc<Timeouts>,
        limit: Duration,
        // Only streams that have stood still have one.
        timeout: Option<Timeout>,
    }
}

// === impl Served ===

impl Served {
    /// A body of HTTP/1.
    pub(super) fn new(body: ReplyBody, busy: Busy) -> Self {
        Self {
            body,
            rest: Bytes::new(),
            _busy: busy,
            clock: None,
        }
    }

    /// A body of HTTP/2.
    pub(super) fn timed(body: ReplyBody, busy: Busy, clock: Rc<StreamClock>) -> Self {
        Self {
            body,
            rest: Bytes::new(),
            _busy: busy,
            clock: Some(clock),
        }
    }
}

impl Served {
    /// The next part: small, so that a client which takes a little now and then is not taken for one
    /// that takes nothing.
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.rest.is_empty() {
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                other => return Poll::Ready(other),
            };
            match frame.into_data() {
                Ok(data) => self.rest = data,
                Err(frame) => return Poll::Ready(Some(Ok(frame))),
            }
        }
        let part = match self.rest.len() {
            ..=PART => mem::take(&mut self.rest),
            _ => self.rest.split_to(PART),
        };
        Poll::Ready(Some(Ok(Frame::data(part))))
    }
}

impl Body for Served {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(clock) = self.clock.clone() else {
            return Pin::new(&mut self.body).poll_frame(cx);
        };
        let polled = self.poll_part(cx);
        clock.0.set(polled.is_ready().then(Instant::now));
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // hyper asks before it takes anything, and nothing is kept back then.
        self.body.size_hint()
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
            stream,
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

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        if this.stream.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let Some(since) = this.clock.0.get() else {
            return Poll::Pending;
        };
        let timeout = this.timeout.get_or_insert_with(|| this.timeouts.timeout());
        let end = since + *this.limit;
        if end > Instant::now() {
            timeout.set(Some(end));
        }
        // Dropped unfinished, a stream is reset.
        timeout.poll_passed(cx)
    }
}
