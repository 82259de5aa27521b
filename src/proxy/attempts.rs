//! Sending a request again: what a failed attempt leads to, and how the next one is made.
//!
//! What is allowed is [`rescue`](crate::routing::rescue)'s to say; here it is done. A healthy request
//! only has its head copied ahead of time, since whoever sends it consumes it.

use std::time::Duration;

use http::request::Parts;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Incoming};
use tokio::time::{Instant, timeout};

use crate::backend::gate::RetryPass;
use crate::backend::{EndpointId, Lease, UpstreamProtocol};
use crate::routing::rescue::{Case, Remedy, Trouble};
use crate::routing::{BASELINE, Reason};
use crate::snapshot::{Route, RouteTarget};
use crate::upstream::{Addresses, Loan, Needs};

use super::Proxy;
use super::body::{Progress, RequestBody};
use super::error::ProxyError;
use super::exchange::Exchange;
use super::kept::KeptHead;
use super::limits::Limits;

/// How long whoever sent a body may take to let go of it.
const LETTING_GO: Duration = Duration::from_secs(1);

/// How much of a response that is not passed on is read, and for how long, so that its connection can
/// be used again.
const LEFTOVER_BYTES: usize = 64 << 10;
const LEFTOVER_TIME: Duration = Duration::from_secs(1);

/// What a request is sent again from.
pub(super) struct Again<'s> {
    route: &'s Route,
    /// Before the edits of any backend.
    head: KeptHead,
    addresses: Option<Box<Addresses>>,
    body_buffer: usize,
    is_override: bool,
    /// How often it was sent to the same version again.
    retries: u32,
    /// Who has failed it.
    failed: Vec<EndpointId>,
}

/// What all attempts of a request share.
#[derive(Clone, Copy)]
pub(super) struct Way<'w> {
    pub(super) proxy: &'w Proxy,
    pub(super) limits: &'w Limits,
    pub(super) needs: Needs,
}

/// What came of an attempt.
pub(super) struct Tried<'s> {
    pub(super) target: &'s RouteTarget,
    /// Where it went; `None` if it did not get that far.
    endpoint: Option<EndpointId>,
    pub(super) outcome: Result<Responded, ProxyError>,
}

/// The head of a response, with what it came by.
pub(super) struct Responded {
    pub(super) response: Response<Incoming>,
    pub(super) loan: Loan<RequestBody>,
    pub(super) lease: Lease,
}

/// A next attempt that can be made.
struct Next<'s> {
    remedy: Remedy,
    target: &'s RouteTarget,
    lease: Lease,
    pause: Duration,
    /// Counts it as a repetition.
    _budget: Option<RetryPass<'s>>,
}

// === impl Tried ===

impl<'s> Tried<'s> {
    /// An attempt that got as far as an endpoint; says to the endpoint what is known already.
    pub(super) fn new(
        target: &'s RouteTarget,
        lease: Lease,
        sent: Result<(Response<Incoming>, Loan<RequestBody>), ProxyError>,
    ) -> Self {
        let endpoint = Some(lease.endpoint().id);
        let outcome = match sent {
            Ok((response, loan)) => {
                if response.status().is_server_error() {
                    lease.failed();
                }
                Ok(Responded {
                    response,
                    loan,
                    lease,
                })
            }
            Err(error) => {
                if error.blames_endpoint() {
                    lease.failed();
                }
                Err(error)
            }
        };
        Self {
            target,
            endpoint,
            outcome,
        }
    }

    fn trouble(&self) -> Option<Trouble> {
        match &self.outcome {
            Ok(responded) => Some(Trouble::Status(responded.response.status())),
            Err(error) => error.trouble(),
        }
    }

    /// What a client would have got.
    fn status(&self) -> StatusCode {
        match &self.outcome {
            Ok(responded) => responded.response.status(),
            Err(error) => error.status(),
        }
    }
}

// === impl Again ===

impl<'s> Again<'s> {
    /// Keeps what it takes.
    pub(super) fn new(
        route: &'s Route,
        target: &RouteTarget,
        parts: &Parts,
        reason: Reason,
        addresses: Option<&Addresses>,
    ) -> Self {
        let is_idempotent = parts.method.is_idempotent();
        // In HTTP/1.1 nobody can say that he has not begun with a request.
        let may_be_refused = target.backend.transport.protocol != UpstreamProtocol::Http1;
        let body_buffer = if is_idempotent || may_be_refused {
            route.rescue.retry.body_buffer
        } else {
            0
        };
        Self {
            route,
            head: KeptHead::new(parts),
            addresses: addresses.map(|addresses| Box::new(*addresses)),
            body_buffer,
            is_override: reason == Reason::Override,
            retries: 0,
            failed: Vec::new(),
        }
    }

    /// The bytes of its body that are kept.
    pub(super) fn body_buffer(&self) -> usize {
        self.body_buffer
    }

    /// True when what came of the first attempt may not be the last word.
    pub(super) fn concerns(&self, tried: &Tried<'_>) -> bool {
        match &tried.outcome {
            Ok(Responded { response, .. }) => self.route.rescue.concerns(response.status()),
            Err(error) => error.trouble().is_some(),
        }
    }

    /// Makes further attempts, as long as they are needed and allowed, and returns the last.
    pub(super) async fn go_on(
        mut self,
        way: Way<'_>,
        first: Tried<'s>,
        mut progress: Progress,
        exchange: &mut Exchange,
    ) -> Tried<'s> {
        let mut tried = first;
        while let Some(trouble) = tried.trouble() {
            self.failed.extend(tried.endpoint);
            let Some(next) = self.next(way, trouble, &tried, &progress, exchange).await else {
                break;
            };
            if !way.limits.pause(next.pause).await {
                break;
            }
            self.give_up(tried, &next, &progress, exchange);
            tried = self
                .attempt(way, next.target, next.lease, &mut progress, exchange)
                .await;
        }
        tried
    }

    /// The first attempt, of a request that has to wait for room.
    pub(super) async fn wait_for_room(
        &mut self,
        way: Way<'_>,
        target: &'s RouteTarget,
        mut progress: Progress,
        exchange: &mut Exchange,
    ) -> Tried<'s> {
        match self.enter(way, target, exchange).await {
            Ok(lease) => {
                self.attempt(way, target, lease, &mut progress, exchange)
                    .await
            }
            Err(error) => Tried {
                target,
                endpoint: None,
                outcome: Err(error),
            },
        }
    }

    /// The best next attempt that is allowed and finds room.
    async fn next(
        &mut self,
        way: Way<'_>,
        trouble: Trouble,
        tried: &Tried<'s>,
        progress: &Progress,
        exchange: &Exchange,
    ) -> Option<Next<'s>> {
        if way.limits.is_over() {
            return None;
        }
        let case = self.case(tried, progress);
        for remedy in self.route.rescue.remedies(trouble, &case) {
            let target = match remedy {
                Remedy::Retry => tried.target,
                Remedy::Shield => &self.route.targets[BASELINE],
            };
            let (pause, budget) = match remedy {
                Remedy::Shield => (Duration::ZERO, None),
                Remedy::Retry => {
                    let retry = &self.route.rescue.retry;
                    let pass = target.backend.gate.try_retry(&retry.budget);
                    if pass.is_none() {
                        exchange.retried(false);
                        continue;
                    }
                    let die = way.proxy.dice.borrow_mut().f64();
                    (retry.pause(trouble, &case, die), pass)
                }
            };
            if let Ok(lease) = self.enter(way, target, exchange).await {
                return Some(Next {
                    remedy,
                    target,
                    lease,
                    pause,
                    _budget: budget,
                });
            }
        }
        None
    }

    fn case(&self, tried: &Tried<'_>, progress: &Progress) -> Case {
        let endpoints = tried.target.backend.endpoints.iter();
        Case {
            is_idempotent: self.head.method.is_idempotent(),
            is_whole: progress.is_whole(),
            at_baseline: std::ptr::eq(tried.target, &self.route.targets[BASELINE]),
            is_override: self.is_override,
            has_others: endpoints
                .filter(|one| one.is_usable())
                .any(|one| !self.failed.contains(&one.id)),
            retries: self.retries,
        }
    }

    /// The right to send it to an endpoint of this target, as soon as there is room.
    async fn enter(
        &self,
        way: Way<'_>,
        target: &'s RouteTarget,
        exchange: &Exchange,
    ) -> Result<Lease, ProxyError> {
        let backend = &target.backend;
        let pass = backend.gate.enter(&backend.gate_limits).await;
        let pass = pass.map_err(|why| {
            exchange.found_no_room(target, why);
            ProxyError::Crowded(why)
        })?;
        let die = way.proxy.roll();
        backend
            .choose(die, Instant::now(), &self.failed)
            .map(|endpoint| endpoint.lease(pass))
            .ok_or(ProxyError::NoEndpoint)
    }

    /// Lets go of what came of an attempt, since there is another one.
    fn give_up(
        &mut self,
        tried: Tried<'s>,
        next: &Next<'s>,
        progress: &Progress,
        exchange: &mut Exchange,
    ) {
        let status = tried.status();
        let grpc = match &tried.outcome {
            Ok(_) => None,
            Err(error) => Some(error.grpc_status()),
        };
        match tried.outcome {
            Ok(responded) if progress.is_sent() => responded.read_off(),
            Ok(_) => {}
            Err(error) => exchange.attempt_failed(error.token()),
        }
        match next.remedy {
            Remedy::Retry => {
                self.retries += 1;
                exchange.retried(true);
            }
            Remedy::Shield => {
                self.retries = 0;
                exchange.shielded_by(next.target, status, grpc);
            }
        }
    }

    async fn attempt(
        &mut self,
        way: Way<'_>,
        target: &'s RouteTarget,
        lease: Lease,
        progress: &mut Progress,
        exchange: &mut Exchange,
    ) -> Tried<'s> {
        let now = Instant::now();
        exchange.begins_again(now);
        let body = timeout(LETTING_GO, RequestBody::again(progress, now)).await;
        let Ok(body) = body else {
            return Tried {
                target,
                endpoint: None,
                outcome: Err(ProxyError::Timeout),
            };
        };
        let request = self.request(target, body);
        exchange.has_body(progress.clone());
        exchange.sent_to(lease.endpoint());
        let sent = {
            let addresses = self.addresses.clone();
            let (backend, endpoint) = (&target.backend, lease.endpoint());
            let pools = &way.proxy.pools;
            let mut sending = pools.send(backend, endpoint, request, way.needs, addresses);
            way.limits.wait(sending.as_mut(), progress).await
        };
        Tried::new(target, lease, sent)
    }

    fn request(&self, target: &RouteTarget, body: RequestBody) -> Request<RequestBody> {
        let mut request = Request::new(body);
        *request.method_mut() = self.head.method.clone();
        *request.uri_mut() = self.head.uri();
        *request.headers_mut() = self.head.headers();
        target.backend.request_headers.apply(request.headers_mut());
        request
    }
}

// === impl Responded ===

impl Responded {
    /// Reads what is left of a short response that nobody gets, so that its connection can be used
    /// again; closing one for each would cost a broken version, and us, a new one for each request.
    fn read_off(self) {
        let Self {
            response,
            loan,
            lease,
        } = self;
        let body = response.into_body();
        if body.is_end_stream() {
            return loan.give_back();
        }
        drop(tokio::task::spawn_local(async move {
            let whole = Limited::new(body, LEFTOVER_BYTES).collect();
            if let Ok(Ok(_)) = timeout(LEFTOVER_TIME, whole).await {
                loan.give_back();
            }
            drop(lease);
        }));
    }
}
