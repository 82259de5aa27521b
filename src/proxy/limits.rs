//! How long an exchange may take, and the waiting for its response.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::upstream::SendError;

use super::body::{BodyState, Progress};
use super::error::ProxyError;
use super::timeouts::Timeout;

/// How long an endpoint must have had before a deadline that the caller has set counts as its failure:
/// callers may set what they like, and must not be able to have endpoints taken out. A little less than
/// the second that many set.
const FAIR_TIME: Duration = Duration::from_millis(900);

/// How long an exchange may take.
pub(super) struct Limits {
    /// When it began.
    pub(super) began: Instant,
    /// From the last sign of life of the request's body, so that a long upload is not cut off, to
    /// the head of the response.
    pub(super) silence: Option<Duration>,
    /// The end of the exchange, whatever happens.
    pub(super) deadline: Option<Instant>,
    /// The caller has set that, and not the route.
    pub(super) is_callers: bool,
    /// The request's body may stand still for as long as it likes.
    pub(super) may_rest: bool,
    pub(super) timeout: Timeout,
}

/// The end of an exchange whose response has begun.
pub(super) struct Deadline {
    pub(super) timeout: Timeout,
    /// The caller has set it, and not the route.
    pub(super) is_callers: bool,
}

// === impl Limits ===

impl Limits {
    /// Waits for the head of a response to what is sent since `since`, but not for ever.
    pub(super) async fn wait<T>(
        &self,
        since: Instant,
        mut sending: Pin<&mut impl Future<Output = Result<T, SendError>>>,
        progress: &Progress,
    ) -> Result<T, ProxyError> {
        self.timeout.set(self.next(progress));
        poll_fn(|cx| {
            loop {
                if let Poll::Ready(sent) = sending.as_mut().poll(cx) {
                    return Poll::Ready(
                        sent.map_err(|error| ProxyError::from_send(error, progress)),
                    );
                }
                ready!(self.timeout.poll_passed(cx));
                match self.next(progress) {
                    // The body has moved meanwhile.
                    Some(next) if next > Instant::now() => self.timeout.set(Some(next)),
                    _ if progress.state() == BodyState::AwaitingClient
                        && self.may_rest
                        && !self.is_over() =>
                    {
                        let later = self.silence.map(|limit| Instant::now() + limit);
                        self.timeout
                            .set(later.into_iter().chain(self.deadline).min());
                    }
                    _ if progress.state() == BodyState::AwaitingClient => {
                        return Poll::Ready(Err(ProxyError::RequestStalled));
                    }
                    // It was the endpoint's turn only since the body has moved.
                    _ => return Poll::Ready(Err(self.late(since.max(progress.last())))),
                }
            }
        })
        .await
    }

    /// What it means that there is no response in time from an endpoint whose turn it was at `since`:
    /// before that a request may have waited for room or for its client, or been with somebody else.
    fn late(&self, since: Instant) -> ProxyError {
        let Some(end) = self.deadline.filter(|_| self.is_over()) else {
            return ProxyError::Timeout;
        };
        let enough = if self.is_callers {
            FAIR_TIME
        } else {
            end.saturating_duration_since(self.began) / 2
        };
        if end.saturating_duration_since(since) >= enough {
            ProxyError::Timeout
        } else {
            ProxyError::OutOfTime
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.deadline.is_some_and(|end| end <= Instant::now())
    }

    fn next(&self, progress: &Progress) -> Option<Instant> {
        let silence_ends = self.silence.map(|limit| progress.last() + limit);
        silence_ends.into_iter().chain(self.deadline).min()
    }

    /// What is left of them once the head of the response is here.
    pub(super) fn into_deadline(self) -> Option<Deadline> {
        self.timeout.set(self.deadline);
        self.deadline.map(|_| Deadline {
            timeout: self.timeout,
            is_callers: self.is_callers,
        })
    }

    /// Waits so long; false when the exchange would be over by then.
    pub(super) async fn pause(&self, pause: Duration) -> bool {
        if pause.is_zero() {
            return true;
        }
        match self.deadline {
            None => {
                sleep(pause).await;
                true
            }
            Some(deadline) => timeout_at(deadline, sleep(pause)).await.is_ok(),
        }
    }
}
