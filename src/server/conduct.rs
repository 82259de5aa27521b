//! How long the client of a connection may take: for a request head, between requests, and to take
//! what it is sent.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::{io, mem};

use hyper::rt::{Read, ReadBuf, ReadBufCursor, Write};
use tokio::time::{Duration, Instant};

use crate::config::ListenerTimeouts;
use crate::proxy::body::{LINGER, LINGER_BYTES};
use crate::proxy::timeouts::Timeout;
use crate::stream::Stream;
use crate::weak_list::WeakList;

/// What a client does with its connection, and how long it may go on so.
///
/// One thread uses it; the lock is there because hyper wants connections that may be upgraded to be
/// `Send`.
#[derive(Debug)]
pub(super) struct Conduct {
    limits: ListenerTimeouts,
    /// In HTTP/1 the first byte between requests begins a head; in HTTP/2 it may be anything.
    watches_heads: bool,
    timeout: Timeout,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Requests that are not answered to the end.
    requests: usize,
    /// The request head must stand by then; without one, the next must have begun.
    turn_ends: Instant,
    in_head: bool,
    /// Since when nothing is under way, after a request.
    resting: Option<Instant>,
    /// Some request had a body, of which something may still come.
    had_body: bool,
    /// It has left HTTP.
    is_tunnel: bool,
    /// Since when nothing is taken of what there is to write.
    blocked: Option<Instant>,
    /// Until when a client is listened to that has been told the last.
    linger_ends: Option<Instant>,
    /// What the timeout is set to.
    armed: Instant,
}

/// What a client has done for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outlasted {
    /// It sent no request, or not the whole head of one.
    Idle,
    /// It took nothing of what it was sent.
    Blocked,
    /// It went on sending after the end.
    Lingering,
}

/// A request that is being served, until it is dropped.
#[derive(Debug)]
pub(super) struct Busy(Arc<Conduct>);

/// The clients of one worker, as far as one may have to be sent away to make room.
#[derive(Debug, Default)]
pub(super) struct Clients(WeakList<Weak<Conduct>>);

/// Who has rested for less than this may be about to ask again.
const LEAST_REST: Duration = Duration::from_secs(1);

/// A client's connection whose use is watched.
#[derive(Debug)]
pub(super) struct Watched {
    stream: Stream,
    conduct: Arc<Conduct>,
    lingered: usize,
}

// === impl Conduct ===

impl Conduct {
    /// Begins with a connection that has sent its first byte.
    pub(super) fn new(
        limits: ListenerTimeouts,
        watches_heads: bool,
        timeout: Timeout,
    ) -> Arc<Self> {
        let turn_ends = Instant::now() + limits.request_head;
        timeout.set(Some(turn_ends));
        Arc::new(Self {
            limits,
            watches_heads,
            timeout,
            state: Mutex::new(State {
                requests: 0,
                turn_ends,
                in_head: true,
                resting: None,
                had_body: false,
                is_tunnel: false,
                blocked: None,
                linger_ends: None,
                armed: turn_ends,
            }),
        })
    }

    /// A request head stands; `has_body` says that more of the request may come.
    pub(super) fn begin(self: &Arc<Self>, has_body: bool) -> Busy {
        let mut state = self.lock();
        state.requests += 1;
        state.in_head = false;
        state.resting = None;
        state.had_body |= has_body;
        Busy(Arc::clone(self))
    }

    /// Waits until the client has done something for too long.
    pub(super) fn poll_outlasted(&self, cx: &Context<'_>) -> Poll<Outlasted> {
        loop {
            ready!(self.timeout.poll_passed(cx));
            let now = Instant::now();
            let mut state = self.lock();
            match state.next(&self.limits) {
                Some((what, end)) if end <= now => return Poll::Ready(what),
                // Far enough away not to be asked again and again while requests are served.
                next => self.arm(
                    &mut state,
                    next.map_or(now + self.limits.idle, |(_, end)| end),
                ),
            }
        }
    }

    /// Gives the client its turn anew: it has sent nothing, but for a good reason.
    pub(super) fn rest(&self) {
        self.rest_for(self.limits.idle);
    }

    /// Gives the client so long from now.
    pub(super) fn rest_for(&self, limit: Duration) {
        let mut state = self.lock();
        state.turn_ends = Instant::now() + limit;
        let ends = state.turn_ends;
        self.arm(&mut state, ends);
    }

    /// Since when it has asked for nothing, if it has nothing under way.
    fn resting_since(&self) -> Option<Instant> {
        self.lock().resting
    }

    /// It has rested for long enough.
    fn send_away(&self) {
        self.lock().resting = None;
        self.rest_for(Duration::ZERO);
    }

    /// The connection leaves HTTP: nothing that comes is thrown away any more.
    pub(super) fn becomes_tunnel(&self) {
        let mut state = self.lock();
        state.had_body = false;
        state.is_tunnel = true;
    }

    fn came(&self) {
        let mut state = self.lock();
        if self.watches_heads && state.requests == 0 && !mem::replace(&mut state.in_head, true) {
            state.resting = None;
            self.turn(&mut state, self.limits.request_head);
        }
    }

    fn ended(&self) {
        let mut state = self.lock();
        state.requests -= 1;
        if state.requests == 0 {
            self.turn(&mut state, self.limits.idle);
            state.resting = (!state.is_tunnel).then(|| state.turn_ends - self.limits.idle);
        }
    }

    fn wrote(&self, is_blocked: bool) {
        let mut state = self.lock();
        if !is_blocked {
            state.blocked = None;
        } else if state.blocked.is_none() {
            let now = Instant::now();
            state.blocked = Some(now);
            self.arm_at_latest(&mut state, now + self.limits.write);
        }
    }

    /// True while a client that was told the last may be listened to: as long as it sends, closing
    /// would reset the connection (RFC 9112 section 9.6).
    fn lingers(&self) -> bool {
        let mut state = self.lock();
        if state.had_body && state.linger_ends.is_none() {
            let end = Instant::now() + LINGER;
            state.linger_ends = Some(end);
            self.arm_at_latest(&mut state, end);
        }
        state.had_body
    }

    fn turn(&self, state: &mut State, limit: Duration) {
        state.turn_ends = Instant::now() + limit;
        self.arm_at_latest(state, state.turn_ends);
    }

    fn arm_at_latest(&self, state: &mut State, end: Instant) {
        if end < state.armed {
            self.arm(state, end);
        }
    }

    fn arm(&self, state: &mut State, end: Instant) {
        state.armed = end;
        self.timeout.set(Some(end));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Clients ===

impl Clients {
    /// A client has come.
    pub(super) fn come(&self, conduct: &Arc<Conduct>) {
        self.0.add(Arc::downgrade(conduct));
    }

    /// Sends the client away that has rested for longest, if it has rested for long enough.
    pub(super) fn make_room(&self, now: Instant) {
        let resting = self.0.living().into_iter().filter_map(|one| {
            let since = one.resting_since()?;
            Some((since, one))
        });
        let longest = resting.min_by_key(|(since, _)| *since);
        if let Some((since, one)) = longest
            && now.saturating_duration_since(since) >= LEAST_REST
        {
            one.send_away();
        }
    }
}

impl State {
    fn next(&self, limits: &ListenerTimeouts) -> Option<(Outlasted, Instant)> {
        let turn = (self.requests == 0).then_some((Outlasted::Idle, self.turn_ends));
        let blocked = self
            .blocked
            .map(|since| (Outlasted::Blocked, since + limits.write));
        let lingering = self.linger_ends.map(|end| (Outlasted::Lingering, end));
        let ends = [turn, blocked, lingering].into_iter().flatten();
        ends.min_by_key(|(_, end)| *end)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.ended();
    }
}

// === impl Watched ===

impl Watched {
    pub(super) fn new(stream: Stream, conduct: Arc<Conduct>) -> Self {
        Self {
            stream,
            conduct,
            lingered: 0,
        }
    }

    fn note<T>(&self, written: Poll<T>) -> Poll<T> {
        self.conduct.wrote(written.is_pending());
        written
    }

    /// Reads what still comes and throws it away.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut scratch = [0; 4096];
        while self.lingered < LINGER_BYTES {
            let mut buffer = ReadBuf::new(&mut scratch);
            match ready!(Pin::new(&mut self.stream).poll_read(cx, buffer.unfilled())) {
                Ok(()) if !buffer.filled().is_empty() => self.lingered += buffer.filled().len(),
                _ => break,
            }
        }
        Poll::Ready(())
    }
}

impl Read for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if matches!(polled, Poll::Ready(Ok(()))) {
            self.conduct.came();
        }
        polled
    }
}

impl Write for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.note(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(cx);
        self.note(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        if self.conduct.lingers() {
            ready!(self.poll_linger(cx));
        }
        Poll::Ready(Ok(()))
    }
}
