//! The body of a request on its way to the upstream.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
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

use super::progress::{BodyState, Progress};
use super::replay::Replay;

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

/// A body of which nobody sends anything any more; by default there was none.
#[derive(Debug, Default)]
pub(super) struct Remains {
    pub(super) incoming: Option<Incoming>,
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
                replay: rules.as_deref().and_then(|rules| Replay::new(rules.kept)),
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
            replay: Replay::new(rules.kept),
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
                    replay.rewind();
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
                self.progress.ended();
                return None;
            }
        };
        let bytes = frame.data_ref().map_or(0, Bytes::len);
        self.progress.moved(BodyState::Moving, bytes);
        if self.incoming.as_ref().is_none_or(Incoming::is_end_stream) {
            self.progress.ended();
        }
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
            sent.leave(remains);
        }
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
