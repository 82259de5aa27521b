//! The body of a response on its way to the client.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::Duration;

use crate::backend::Lease;
use crate::proxy::exchange::Exchange;
use crate::proxy::limits::Deadline;
use crate::proxy::stays::Stay;
use crate::proxy::translate::JsonLines;
use crate::proxy::{grpc, headers};
use crate::upstream::Loan;

use super::request::RequestBody;

/// The body of a response on its way to the client.
#[derive(Debug)]
pub enum ReplyBody {
    /// A reply of our own.
    Local(Full<Bytes>),
    /// The upstream's; boxed, since hyper moves a body more than a dozen times.
    Upstream(Box<UpstreamBody>),
    /// A stream of messages as lines of JSON.
    Lines(Box<JsonLines>),
}

/// The body of an upstream's response; whatever is still held for the exchange is let go of when it
/// ends.
pub struct UpstreamBody {
    incoming: Incoming,
    /// `None` once the body has ended.
    held: Option<Held>,
    deadline: Option<Deadline>,
    /// Whether it may stay on its version, if it is a stream.
    stay: Option<Rc<Stay>>,
    /// We have ended it.
    is_cut: bool,
}

/// What is held on to until the body of a response ends.
pub(in crate::proxy) struct Held {
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
    pub(in crate::proxy) fn broke(&mut self, status: grpc::Status, error: &'static str) {
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
    pub(in crate::proxy) fn new(
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
    pub(in crate::proxy) fn new(
        incoming: Incoming,
        held: Held,
        deadline: Option<Deadline>,
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
            let error = self
                .is_late_by_fault(&polled)
                .then_some("http_response_timeout");
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
            let timeout = &deadline.timeout;
            timeout.has_passed() || polled.is_pending() && timeout.poll_passed(cx).is_ready()
        })
    }

    /// True when the endpoint is to blame for a response that takes too long. Not if there was something
    /// to send on: the client was the slow one. Nor if the caller has set the deadline: many a stream
    /// only ends so.
    fn is_late_by_fault<T>(&self, polled: &Poll<T>) -> bool {
        let is_callers = |deadline: &Deadline| deadline.is_callers;
        polled.is_pending() && !self.deadline.as_ref().is_some_and(is_callers)
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
