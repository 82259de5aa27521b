//! The body of a request on its way to the upstream.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::header::HeaderName;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Duration, Instant};

use crate::proxy::headers;
use crate::proxy::timeouts::Timeout;
use crate::proxy::translate::Translation;
use crate::snapshot::Route;

use super::progress::{BodyState, Progress, Sent};
use super::replay::Replay;

/// The body of a request on its way to the upstream; `None` without one.
///
/// What it takes is in a box, since hyper moves a request more than a dozen times, and few have a body.
#[derive(Debug)]
pub struct RequestBody(Option<Sending>);

/// A body that is being sent on.
#[derive(Debug)]
struct Sending {
    sent: Rc<Sent>,
    content: Box<Content>,
}

/// What is sent of a body; left behind by whoever sent it, for whoever sends it again.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) incoming: Incoming,
    rules: BodyRules,
    json: Option<Box<Json>>,
    /// `None` when nothing of it is kept, or any more.
    replay: Option<Replay>,
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

// === impl RequestBody ===

impl RequestBody {
    /// Wraps a body that is sent on from `now`, and tells how far it has come.
    pub fn new(
        incoming: Incoming,
        now: Instant,
        rules: impl FnOnce() -> BodyRules,
    ) -> (Self, Progress) {
        if incoming.is_end_stream() {
            return (Self(None), Progress::NoBody(now));
        }
        Self::sending(Content::new(incoming, rules(), None), now)
    }

    /// As `new`, for a body that becomes the message of a call, also where there is none.
    pub fn translated(
        incoming: Incoming,
        now: Instant,
        rules: impl FnOnce() -> BodyRules,
        translation: Translation,
    ) -> (Self, Progress) {
        let json = Json {
            translation: Some(translation),
            read: BytesMut::new(),
        };
        Self::sending(Content::new(incoming, rules(), Some(Box::new(json))), now)
    }

    fn sending(content: Content, now: Instant) -> (Self, Progress) {
        let sent = Rc::new(Sent::new(now));
        let progress = Progress::Body(Rc::clone(&sent));
        let content = Box::new(content);
        (Self(Some(Sending { sent, content })), progress)
    }

    /// The same body from its beginning, once whoever had it has let go of it; `None` if it cannot be
    /// sent again by then. It moves from `now` on.
    pub async fn again(progress: &mut Progress, now: Instant) -> Option<Self> {
        match progress {
            Progress::NoBody(since) => {
                *since = now;
                Some(Self(None))
            }
            Progress::Body(sent) => {
                let mut content = sent.remains().await;
                // More of it may have been sent meanwhile.
                if !sent.stage().is_whole() {
                    sent.leave(content);
                    return None;
                }
                if let Some(replay) = &mut content.replay {
                    replay.rewind();
                }
                sent.begin_again(now);
                let sent = Rc::clone(sent);
                Some(Self(Some(Sending { sent, content })))
            }
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        match &mut self.0 {
            Some(Sending { sent, content }) => content.poll_next(sent, cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        let sending = self.0.as_ref();
        sending.is_none_or(|sending| sending.content.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Some(sending) => sending.content.size_hint(),
            None => SizeHint::with_exact(0),
        }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(Sending { sent, content }) = self.0.take() {
            sent.leave(content);
        }
    }
}

// === impl Content ===

impl Content {
    fn new(incoming: Incoming, rules: BodyRules, json: Option<Box<Json>>) -> Self {
        Self {
            incoming,
            json,
            replay: Replay::new(rules.kept),
            rules,
        }
    }

    /// What is sent next: at first what was sent before.
    fn poll_next(
        &mut self,
        sent: &Sent,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        if let Some(frame) = self.replay.as_mut().and_then(|replay| replay.next()) {
            return Poll::Ready(Some(Ok(frame)));
        }
        let polled = if self.json.is_some() {
            self.poll_message(sent, cx)
        } else {
            self.poll_incoming(sent, cx)
        };
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            let replay = self.replay.as_mut();
            let is_needed = !sent.stage().is_answered;
            if !replay.is_some_and(|replay| is_needed && replay.keep(frame)) {
                self.forget();
                sent.spend();
            }
        }
        polled
    }

    /// Nothing of it is sent again.
    pub(super) fn forget(&mut self) {
        self.replay = None;
    }

    /// Reads JSON on, and gives the message when all of it has come.
    fn poll_message(
        &mut self,
        sent: &Sent,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        loop {
            let came = match ready!(self.poll_incoming(sent, cx)) {
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
                    sent.moved(BodyState::Untranslatable, 0);
                    Err(RequestBodyError::Untranslatable)
                }
            }));
        }
    }

    fn poll_incoming(
        &mut self,
        sent: &Sent,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Ready(came) => Poll::Ready(self.check(sent, came)),
            Poll::Pending => {
                sent.await_client();
                self.poll_gap(sent, cx).map(|error| Some(Err(error)))
            }
        }
    }

    /// Notes what came, and what may not go on is an error.
    fn check(
        &mut self,
        sent: &Sent,
        came: Option<Result<Frame<Bytes>, hyper::Error>>,
    ) -> Option<Result<Frame<Bytes>, RequestBodyError>> {
        let mut frame = match came {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                sent.moved(BodyState::broken_by(&error), 0);
                return Some(Err(RequestBodyError::Client(error)));
            }
            None => {
                sent.moved(BodyState::Moving, 0);
                sent.ended();
                return None;
            }
        };
        let bytes = frame.data_ref().map_or(0, Bytes::len);
        sent.moved(BodyState::Moving, bytes);
        if self.incoming.is_end_stream() {
            sent.ended();
        }
        let rules = &self.rules;
        if rules.limit.is_some_and(|limit| sent.stage().bytes > limit) {
            sent.moved(BodyState::TooLarge, 0);
            return Some(Err(RequestBodyError::TooLarge));
        }
        if let Some(trailers) = frame.trailers_mut() {
            headers::remove_unsafe_trailers(
                trailers,
                &rules.route.guarded_trailers,
                &rules.subject_headers,
            );
        }
        Some(Ok(frame))
    }

    /// Waits for the client, but not for ever.
    fn poll_gap(&self, sent: &Sent, cx: &Context<'_>) -> Poll<RequestBodyError> {
        let stage = sent.stage();
        let gap = self.rules.gap.filter(|_| !stage.is_answered);
        let Some(gap) = gap.or(self.rules.rest) else {
            return Poll::Pending;
        };
        let ends = stage.last + gap;
        if Instant::now() < ends {
            self.rules.timeout.set(Some(ends));
        }
        ready!(self.rules.timeout.poll_passed(cx));
        sent.moved(BodyState::Stalled, 0);
        Poll::Ready(RequestBodyError::Stalled)
    }

    fn is_end_stream(&self) -> bool {
        if self.replay.as_ref().is_some_and(|replay| replay.has_next()) {
            return false;
        }
        match &self.json {
            Some(json) => json.translation.is_none(),
            None => self.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = SizeHint::default();
        if self.json.is_none() {
            let again = self.replay.as_ref().map_or(0, |replay| replay.left());
            let rest = self.incoming.size_hint();
            hint.set_lower(rest.lower() + again);
            if let Some(upper) = rest.upper() {
                hint.set_upper(upper + again);
            }
        }
        hint
    }
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
