//! Bodies on their way through: nothing is held back, and both ends are noticed.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::header::{HeaderMap, HeaderName};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::Notify;
use tokio::time::{Duration, Instant, timeout};

use crate::backend::Lease;
use crate::snapshot::Route;
use crate::upstream::Loan;

use super::exchange::Exchange;
use super::grpc;
use super::headers;
use super::stays::Stay;
use super::timeouts::Timeout;
use super::translate::{JsonLines, Translation};

/// How long a client is listened to that has been told the last of us, and how much: what it sends
/// is thrown away, or it would lose what it has not read yet.
pub const LINGER: Duration = Duration::from_secs(2);
/// See [`LINGER`]; in bytes.
pub const LINGER_BYTES: usize = 1 << 20;

/// The body of a request on its way to the upstream.
#[derive(Debug)]
pub struct RequestBody {
    /// `None` once it is dropped.
    incoming: Option<Incoming>,
    progress: Progress,
    /// `None` without a body.
    rules: Option<Box<BodyRules>>,
    json: Option<Box<Json>>,
    /// `None` when nothing of it is kept, or any more.
    replay: Option<Box<Replay>>,
}

/// What was sent of a body, for as long as it is little, so that it can be sent again.
#[derive(Debug)]
struct Replay {
    /// What was sent, in order.
    kept: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    /// How much more may be kept.
    room: usize,
    /// How much of it has been sent again.
    position: usize,
}

/// A body of which nobody sends anything any more.
#[derive(Debug)]
struct Remains {
    incoming: Option<Incoming>,
    rules: Option<Box<BodyRules>>,
    json: Option<Box<Json>>,
    replay: Option<Box<Replay>>,
}

/// What a body of JSON is until all of it has come, and it becomes a message.
#[derive(Debug)]
struct Json {
    /// `None` once the message has been sent.
    translation: Option<Translation>,
    read: BytesMut,
}

/// What a client has to keep to with its body.
#[derive(Debug)]
pub struct BodyRules {
    /// The most bytes.
    pub limit: Option<u64>,
    /// The longest gap while the upstream would take more, as long as there is no response; `None` for
    /// a stream, which may rest from the beginning.
    pub gap: Option<Duration>,
    /// How long it may rest from then on.
    pub rest: Option<Duration>,
    /// Measures the gap.
    pub timeout: Timeout,
    /// Whose guarded headers may not come as trailers.
    pub route: Arc<Route>,
    /// What else may not.
    pub subject_headers: Arc<[HeaderName]>,
    /// How many of its bytes are kept to be sent again.
    pub kept: usize,
}

/// Why the body of a request breaks off.
#[derive(Debug)]
pub enum RequestBodyError {
    /// The client's connection broke, or what came over it was no body.
    Client(hyper::Error),
    /// It is longer than is allowed.
    TooLarge,
    /// The client does not go on with it.
    Stalled,
    /// It does not say what the method that is called wants.
    Untranslatable,
}

/// How far the body of a request has come; shared with whoever waits for the response.
#[derive(Clone, Debug)]
pub enum Progress {
    /// There is no body; since then it is the upstream's turn.
    NoBody(Instant),
    /// There is one.
    Body(Rc<Sent>),
}

/// A body, as whoever waits for the response sees it.
#[derive(Debug)]
pub struct Sent {
    stage: Cell<Stage>,
    /// What is left of it when nobody sends it on any more.
    left: RefCell<Option<Remains>>,
    /// Told when something is left.
    is_left: Notify,
}

/// Where a body is.
#[derive(Clone, Copy, Debug)]
pub struct Stage {
    last: Instant,
    state: BodyState,
    bytes: u64,
    /// The head of the response is here: the body may rest.
    is_answered: bool,
    /// More of it was sent than is kept.
    is_spent: bool,
}

/// Whose turn it is with the body of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyState {
    /// It is going on, or has ended: if nothing comes back, the upstream is slow.
    Moving,
    /// The upstream would take more, but the client sends none.
    AwaitingClient,
    /// The client sent something that is no body.
    Malformed,
    /// The client sent more than it may.
    TooLarge,
    /// The client sent nothing for too long.
    Stalled,
    /// The client sent what cannot be translated.
    Untranslatable,
    /// The client went away.
    Gone,
}

/// The body of a response on its way to the client.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "nearly every one is the large one, and a box would cost each an allocation"
)]
pub enum ReplyBody {
    /// A reply of our own.
    Local(Full<Bytes>),
    /// The upstream's.
    Upstream(UpstreamBody),
    /// A stream of messages as lines of JSON.
    Lines(Box<JsonLines>),
}

/// The body of an upstream's response; whatever is still held for the exchange is let go of when it
/// ends.
pub struct UpstreamBody {
    incoming: Incoming,
    /// `None` once the body has ended.
    held: Option<Held>,
    deadline: Option<Timeout>,
    /// Whether it may stay on its version, if it is a stream.
    stay: Option<Rc<Stay>>,
    /// We have ended it.
    is_cut: bool,
}

/// What is held on to until the body of a response ends.
pub(super) struct Held {
    exchange: Exchange,
    /// Counts the request as in flight at its endpoint.
    lease: Lease,
    loan: Loan<RequestBody>,
    /// How long the head took, of a response that is good if its body is; `None` once the endpoint's
    /// share in it has been told.
    latency: Option<Duration>,
}

/// Why the body of a response breaks off.
#[derive(Debug)]
pub enum BodyError {
    /// The upstream's connection broke.
    Upstream(hyper::Error),
    /// The exchange took longer than its route allows.
    Deadline,
}

// === impl RequestBody ===

impl RequestBody {
    /// Wraps a body that is sent on from `now`, and tells how far it has come.
    pub fn new(
        incoming: Incoming,
        now: Instant,
        rules: impl FnOnce() -> BodyRules,
    ) -> (Self, Progress) {
        let has_body = !incoming.is_end_stream();
        let progress = if has_body {
            Progress::of_body(now)
        } else {
            Progress::NoBody(now)
        };
        let rules = has_body.then(|| Box::new(rules()));
        (
            Self {
                incoming: Some(incoming),
                progress: progress.clone(),
                replay: rules.as_deref().and_then(Replay::new),
                rules,
                json: None,
            },
            progress,
        )
    }

    /// As `new`, for a body that becomes the message of a call, also where there is none.
    pub fn translated(
        incoming: Incoming,
        now: Instant,
        rules: impl FnOnce() -> BodyRules,
        translation: Translation,
    ) -> (Self, Progress) {
        let progress = Progress::of_body(now);
        let rules = Box::new(rules());
        let body = Self {
            incoming: Some(incoming),
            progress: progress.clone(),
            replay: Replay::new(&rules),
            rules: Some(rules),
            json: Some(Box::new(Json {
                translation: Some(translation),
                read: BytesMut::new(),
            })),
        };
        (body, progress)
    }

    /// The same body from its beginning, once whoever had it has let go of it; nothing but an empty
    /// one without a body. It moves from `now` on.
    pub async fn again(progress: &mut Progress, now: Instant) -> Self {
        let remains = match progress {
            Progress::NoBody(_) => {
                *progress = Progress::NoBody(now);
                Remains::default()
            }
            Progress::Body(sent) => {
                let mut remains = sent.remains().await;
                if let Some(replay) = &mut remains.replay {
                    replay.position = 0;
                }
                progress.begin_again(now);
                remains
            }
        };
        let Remains {
            incoming,
            rules,
            json,
            replay,
        } = remains;
        Self {
            incoming,
            progress: progress.clone(),
            rules,
            json,
            replay,
        }
    }

    /// What is sent next: at first what was sent before.
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        if let Some(frame) = self.replay.as_mut().and_then(|replay| replay.next()) {
            return Poll::Ready(Some(Ok(frame)));
        }
        let polled = if self.json.is_some() {
            self.poll_message(cx)
        } else {
            self.poll_incoming(cx)
        };
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            let replay = self.replay.as_mut();
            if !replay.is_some_and(|replay| replay.keep(frame)) {
                self.replay = None;
                self.progress.spend();
            }
        }
        polled
    }

    /// Reads JSON on, and gives the message when all of it has come.
    fn poll_message(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        loop {
            let came = match ready!(self.poll_incoming(cx)) {
                Some(Ok(frame)) => frame.into_data().ok(),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => None,
            };
            let Some(json) = &mut self.json else {
                return Poll::Ready(None);
            };
            if let Some(data) = came {
                json.read.extend_from_slice(&data);
                continue;
            }
            let Some(translation) = json.translation.take() else {
                return Poll::Ready(None);
            };
            return Poll::Ready(Some(match translation.message(&json.read) {
                Some(message) => Ok(Frame::data(message)),
                None => {
                    self.progress.moved(BodyState::Untranslatable, 0);
                    Err(RequestBodyError::Untranslatable)
                }
            }));
        }
    }

    fn poll_incoming(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        let Some(incoming) = &mut self.incoming else {
            return Poll::Ready(None);
        };
        match Pin::new(incoming).poll_frame(cx) {
            Poll::Ready(came) => Poll::Ready(self.check(came)),
            Poll::Pending => {
                self.progress.await_client();
                self.poll_gap(cx).map(|error| Some(Err(error)))
            }
        }
    }

    /// Notes what came, and what may not go on is an error.
    fn check(
        &mut self,
        came: Option<Result<Frame<Bytes>, hyper::Error>>,
    ) -> Option<Result<Frame<Bytes>, RequestBodyError>> {
        let mut frame = match came {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                self.progress.moved(BodyState::broken_by(&error), 0);
                return Some(Err(RequestBodyError::Client(error)));
            }
            None => {
                self.progress.moved(BodyState::Moving, 0);
                return None;
            }
        };
        let bytes = frame.data_ref().map_or(0, Bytes::len);
        self.progress.moved(BodyState::Moving, bytes);
        if let Some(rules) = &self.rules {
            if rules
                .limit
                .is_some_and(|limit| self.progress.bytes() > limit)
            {
                self.progress.moved(BodyState::TooLarge, 0);
                return Some(Err(RequestBodyError::TooLarge));
            }
            if let Some(trailers) = frame.trailers_mut() {
                headers::remove_unsafe_trailers(
                    trailers,
                    &rules.route.guarded_trailers,
                    &rules.subject_headers,
                );
            }
        }
        Some(Ok(frame))
    }

    fn replayed_hint(&self, rest: SizeHint) -> SizeHint {
        let again = self.replay.as_ref().map_or(0, |replay| replay.left());
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + again);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + again);
        }
        hint
    }

    /// Waits for the client, but not for ever.
    fn poll_gap(&self, cx: &Context<'_>) -> Poll<RequestBodyError> {
        let Some(rules) = &self.rules else {
            return Poll::Pending;
        };
        let gap = rules.gap.filter(|_| !self.progress.stage().is_answered);
        let Some(gap) = gap.or(rules.rest) else {
            return Poll::Pending;
        };
        let ends = self.progress.last() + gap;
        if Instant::now() < ends {
            rules.timeout.set(Some(ends));
        }
        ready!(rules.timeout.poll_passed(cx));
        self.progress.moved(BodyState::Stalled, 0);
        Poll::Ready(RequestBodyError::Stalled)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        self.poll_next(cx)
    }

    fn is_end_stream(&self) -> bool {
        if self.replay.as_ref().is_some_and(|replay| replay.has_next()) {
            return false;
        }
        match &self.json {
            Some(json) => json.translation.is_none(),
            None => self.incoming.as_ref().is_none_or(Incoming::is_end_stream),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.json, &self.incoming) {
            (None, Some(incoming)) => self.replayed_hint(incoming.size_hint()),
            (None, None) => SizeHint::with_exact(0),
            _ => SizeHint::default(),
        }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Progress::Body(sent) = &self.progress {
            let remains = Remains {
                incoming: self.incoming.take(),
                rules: self.rules.take(),
                json: self.json.take(),
                replay: self.replay.take(),
            };
            *sent.left.borrow_mut() = Some(remains);
            sent.is_left.notify_one();
        }
    }
}

// === impl Replay ===

impl Replay {
    fn new(rules: &BodyRules) -> Option<Box<Self>> {
        let empty = || Self {
            kept: Vec::new(),
            trailers: None,
            room: rules.kept,
            position: 0,
        };
        (rules.kept > 0).then(|| Box::new(empty()))
    }

    /// Keeps a part that is sent for the first time; false when it is too large.
    fn keep(&mut self, frame: &Frame<Bytes>) -> bool {
        match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) if data.len() > self.room => return false,
            (Some(data), _) => {
                self.room -= data.len();
                self.kept.push(data.clone());
            }
            (None, trailers) => self.trailers = trailers.cloned(),
        }
        self.position += 1;
        true
    }

    /// The next part that was sent before.
    fn next(&mut self) -> Option<Frame<Bytes>> {
        let position = self.position;
        let frame = match self.kept.get(position) {
            Some(data) => Frame::data(data.clone()),
            None if position == self.kept.len() => Frame::trailers(self.trailers.clone()?),
            None => return None,
        };
        self.position += 1;
        Some(frame)
    }

    fn has_next(&self) -> bool {
        self.position < self.kept.len() + usize::from(self.trailers.is_some())
    }

    /// The bytes that will be sent again.
    fn left(&self) -> u64 {
        let kept = self.kept.iter().skip(self.position);
        kept.map(|data| data.len() as u64).sum()
    }
}

// === impl Remains ===

impl Default for Remains {
    /// Those of no body.
    fn default() -> Self {
        Self {
            incoming: None,
            rules: None,
            json: None,
            replay: None,
        }
    }
}

// === impl Sent ===

impl Sent {
    /// What is left of the body, as soon as whoever sent it has let go of it. Its connection is about
    /// to end then.
    async fn remains(&self) -> Remains {
        loop {
            if let Some(remains) = self.left.borrow_mut().take() {
                return remains;
            }
            self.is_left.notified().await;
        }
    }
}

/// Takes what a client of HTTP/2 still sends of its body after the answer. Dropped at once, the body
/// would have its stream reset, over which some clients lose the answer (RFC 9113 section 8.1).
pub(super) fn linger(mut body: Incoming) {
    if body.is_end_stream() {
        return;
    }
    let throw_away = async move {
        let mut left = LINGER_BYTES;
        while let Some(Ok(frame)) = body.frame().await
            && left > 0
        {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        }
    };
    drop(tokio::task::spawn_local(timeout(LINGER, throw_away)));
}

// === impl RequestBodyError ===

impl fmt::Display for RequestBodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(error) => write!(f, "client body: {error}"),
            Self::TooLarge => f.write_str("the request body is too large"),
            Self::Stalled => f.write_str("the request body did not come in time"),
            Self::Untranslatable => f.write_str("the request body is not what the method wants"),
        }
    }
}

impl Error for RequestBodyError {}

// === impl BodyState ===

impl BodyState {
    /// hyper says with the cause whether what came was wrong, or nothing came any more.
    fn broken_by(error: &hyper::Error) -> Self {
        let cause = error
            .source()
            .and_then(|cause| cause.downcast_ref::<io::Error>())
            .map(io::Error::kind);
        match cause {
            Some(io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => Self::Malformed,
            _ => Self::Gone,
        }
    }
}

// === impl Progress ===

impl Stage {
    fn new(now: Instant) -> Self {
        Self {
            last: now,
            state: BodyState::Moving,
            bytes: 0,
            is_answered: false,
            is_spent: false,
        }
    }
}

impl Progress {
    fn of_body(now: Instant) -> Self {
        Self::Body(Rc::new(Sent {
            stage: Cell::new(Stage::new(now)),
            left: RefCell::default(),
            is_left: Notify::new(),
        }))
    }

    /// True as long as all of it can be sent again.
    pub fn is_whole(&self) -> bool {
        !self.stage().is_spent
    }

    /// True when nobody sends any more of it.
    pub fn is_sent(&self) -> bool {
        match self {
            Self::NoBody(_) => true,
            Self::Body(sent) => sent.left.borrow().is_some(),
        }
    }

    fn spend(&self) {
        self.update(|stage| Stage {
            is_spent: true,
            ..stage
        });
    }

    fn begin_again(&self, now: Instant) {
        self.update(|stage| Stage {
            last: now,
            state: BodyState::Moving,
            ..stage
        });
    }

    /// What is left of it, if nobody sends it on any more.
    pub fn left(&self) -> Option<Incoming> {
        match self {
            Self::NoBody(_) => None,
            Self::Body(sent) => sent.left.borrow_mut().take()?.incoming,
        }
    }

    /// When the body last moved; at first, when the exchange with the upstream began.
    pub fn last(&self) -> Instant {
        self.stage().last
    }

    /// Whose turn it is, or how it broke.
    pub fn state(&self) -> BodyState {
        self.stage().state
    }

    /// True when it will not come to its end, and the client is to blame.
    pub fn was_broken_by_client(&self) -> bool {
        !matches!(
            self.stage().state,
            BodyState::Moving | BodyState::AwaitingClient
        )
    }

    /// The head of the response is here.
    pub fn answered(&self) {
        self.update(|stage| Stage {
            is_answered: true,
            ..stage
        });
    }

    fn stage(&self) -> Stage {
        match self {
            Self::NoBody(since) => Stage::new(*since),
            Self::Body(sent) => sent.stage.get(),
        }
    }

    fn update(&self, change: impl FnOnce(Stage) -> Stage) {
        if let Self::Body(sent) = self {
            sent.stage.set(change(sent.stage.get()));
        }
    }

    /// How much of the body has come.
    pub fn bytes(&self) -> u64 {
        self.stage().bytes
    }

    fn moved(&self, state: BodyState, bytes: usize) {
        self.update(|stage| Stage {
            last: Instant::now(),
            state,
            bytes: stage.bytes + bytes as u64,
            ..stage
        });
    }

    fn await_client(&self) {
        self.update(|stage| Stage {
            state: BodyState::AwaitingClient,
            ..stage
        });
    }
}

// === impl ReplyBody ===

impl ReplyBody {
    /// A reply of our own without a body.
    pub fn empty() -> Self {
        Self::local(String::new())
    }

    /// A reply of our own.
    pub fn local(text: impl Into<Bytes>) -> Self {
        Self::Local(Full::new(text.into()))
    }

    /// What the upstream sent is no answer to the call, which ends so; it is to blame for `error`.
    pub(super) fn broke(&mut self, status: grpc::Status, error: &'static str) {
        if let Self::Upstream(body) = self {
            if let Some(held) = &mut body.held {
                held.exchange.call_ended(status);
            }
            body.fail(Some(error));
        }
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Local(body) => Pin::new(body)
                .poll_frame(cx)
                .map_err(|never| match never {}),
            Self::Upstream(body) => body.poll_frame(cx),
            Self::Lines(lines) => lines.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Local(body) => body.is_end_stream(),
            Self::Upstream(body) => body.is_cut || body.incoming.is_end_stream(),
            Self::Lines(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Local(body) => body.size_hint(),
            Self::Upstream(body) => body.incoming.size_hint(),
            Self::Lines(_) => SizeHint::default(),
        }
    }
}

// === impl Held ===

impl Held {
    pub(super) fn new(
        exchange: Exchange,
        lease: Lease,
        loan: Loan<RequestBody>,
        latency: Option<Duration>,
    ) -> Self {
        Self {
            exchange,
            lease,
            loan,
            latency,
        }
    }

    /// The response is whole.
    fn ended(&mut self) {
        self.exchange.ended();
        self.exchange.linger();
        match self.latency.take() {
            Some(_) if self.exchange.is_failed_call() => self.lease.failed(),
            Some(latency) => self.lease.answered(latency),
            None => {}
        }
    }

    /// The endpoint has broken it off.
    fn failed(&mut self, error: &'static str) {
        self.exchange.upstream_failed(error);
        if self.latency.take().is_some() {
            self.lease.failed();
        }
    }
}

// === impl UpstreamBody ===

impl UpstreamBody {
    /// Wraps a body with what has to be held on to until it ends.
    pub(super) fn new(
        incoming: Incoming,
        held: Held,
        deadline: Option<Timeout>,
        stay: Option<Rc<Stay>>,
    ) -> Self {
        Self {
            incoming,
            held: Some(held),
            deadline,
            stay,
            is_cut: false,
        }
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.is_cut {
            return Poll::Ready(None);
        }
        if self.has_to_leave(cx) {
            return Poll::Ready(self.leave().map(Ok));
        }
        let polled = Pin::new(&mut self.incoming).poll_frame(cx);
        if self.is_late(&polled, cx) {
            // If there was something to send on, the client was the slow one.
            let error = polled.is_pending().then_some("http_response_timeout");
            let words = "the exchange took longer than it may";
            return Poll::Ready(Some(
                match self.cut(grpc::Status::DEADLINE_EXCEEDED, words, error) {
                    Some(trailers) => Ok(trailers),
                    None => Err(BodyError::Deadline),
                },
            ));
        }
        let mut frame = match ready!(polled) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                let broken = Some("http_response_incomplete");
                let words = "the upstream broke off its response";
                let status = grpc::Status::from_broken(&error);
                return Poll::Ready(Some(match self.cut(status, words, broken) {
                    Some(trailers) => Ok(trailers),
                    None => Err(BodyError::Upstream(error)),
                }));
            }
            None => {
                self.end();
                return Poll::Ready(None);
            }
        };
        if let Some(held) = &mut self.held {
            match frame.trailers_ref() {
                Some(trailers) => held.exchange.heard(trailers),
                None => held.exchange.sent(frame.data_ref().map_or(0, Bytes::len)),
            }
        }
        if let Some(trailers) = frame.trailers_mut() {
            headers::remove_framing_trailers(trailers);
        }
        if self.incoming.is_end_stream() || frame.is_trailers() {
            self.end();
        }
        Poll::Ready(Some(Ok(frame)))
    }

    /// Ends the exchange before the body has ended. A caller of gRPC is told with trailers, if its
    /// protocol can carry them.
    fn cut(
        &mut self,
        status: grpc::Status,
        words: &str,
        error: Option<&'static str>,
    ) -> Option<Frame<Bytes>> {
        let held = self.held.as_mut()?;
        let is_told = held.exchange.takes_trailers_of_ours();
        if is_told {
            held.exchange.call_ended(status);
        }
        self.fail(error);
        self.is_cut = is_told;
        is_told.then(|| Frame::trailers(status.trailers(words)))
    }

    fn has_to_leave(&self, cx: &Context<'_>) -> bool {
        let stay = self.stay.as_ref();
        stay.is_some_and(|stay| stay.poll_over(cx).is_ready())
    }

    /// Ends a stream whose user gets another version: as if its endpoint had, and a caller of gRPC is
    /// told to try again.
    fn leave(&mut self) -> Option<Frame<Bytes>> {
        self.is_cut = true;
        let mut held = self.held.take()?;
        let status = grpc::Status::UNAVAILABLE;
        let is_told = held.exchange.takes_trailers_of_ours();
        if is_told {
            held.exchange.call_ended(status);
        }
        held.exchange.moved();
        let words = "the service has changed its version";
        is_told.then(|| Frame::trailers(status.trailers(words)))
    }

    fn is_late<T>(&self, polled: &Poll<T>, cx: &Context<'_>) -> bool {
        self.deadline.as_ref().is_some_and(|deadline| {
            deadline.has_passed() || polled.is_pending() && deadline.poll_passed(cx).is_ready()
        })
    }

    /// The body is whole: the exchange is over, and the connection can serve another one. That of a
    /// translated call is over when the body is let go of: what has come may turn out to be no answer.
    fn end(&mut self) {
        if let Some(held) = &mut self.held {
            held.ended();
        }
        let is_over = |held: &mut Held| held.exchange.translation().is_none();
        if let Some(held) = self.held.take_if(is_over) {
            held.loan.give_back();
        }
    }

    /// The body broke off: the exchange is over, and the connection is closed. The upstream is to
    /// blame for `error`, unless the connection broke because the client broke off its own body.
    fn fail(&mut self, error: Option<&'static str>) {
        let Some(mut held) = self.held.take() else {
            return;
        };
        match error {
            Some(error) if !held.exchange.was_broken_by_client() => held.failed(error),
            Some(_) => {}
            None => held.exchange.outlasted(),
        }
    }
}

impl Drop for UpstreamBody {
    /// hyper does not poll a body that has no bytes. One dropped before its end belongs to a client
    /// that went away.
    fn drop(&mut self) {
        if self.incoming.is_end_stream() {
            self.end();
        }
    }
}

impl fmt::Debug for UpstreamBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpstreamBody")
            .field("ended", &self.held.is_none())
            .finish_non_exhaustive()
    }
}

// === impl BodyError ===

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Upstream(error) => write!(f, "upstream body: {error}"),
            Self::Deadline => f.write_str("the exchange took longer than its route allows"),
        }
    }
}

impl Error for BodyError {}
