//! Sending a request again: what a failed attempt leads to, and how the next one is made.
//!
//! What is allowed is [`rescue`](crate::routing::rescue)'s to say; here it is done. A healthy request
//! only has its head copied ahead of time, since whoever sends it consumes it.

use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use http::{Request, Response};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Incoming};
use tokio::time::{Instant, timeout};

use crate::backend::gate::{Pass, RetryPass};
use crate::backend::outlier::is_failure;
use crate::backend::{Crowded, Endpoint, EndpointId, Lease, UpstreamProtocol};
use crate::routing::rescue::{Case, Remedy, Retry, Trouble};
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
    pub(super) outcome: Result<Responded, Failed>,
}

/// The head of a response, with what it came by.
pub(super) struct Responded {
    pub(super) response: Response<Incoming>,
    pub(super) loan: Loan<RequestBody>,
    pub(super) lease: Lease,
}

/// Why there is none.
pub(super) struct Failed {
    error: ProxyError,
    /// The place that the request has all the same; `None` if it did not get that far.
    lease: Option<Lease>,
}

/// A next attempt that can be made.
struct Next<'s> {
    remedy: Remedy,
    target: &'s RouteTarget,
    endpoint: &'s Arc<Endpoint>,
    /// A place at its backend; `None` where it goes on with the one that it has.
    pass: Option<Pass<'s>>,
    /// Over a connection that has not been idle: one that closes as well tells against its endpoint.
    fresh: bool,
    /// Counts it as a repetition.
    _budget: Option<RetryPass<'s>>,
}

// === impl Way ===

impl Way<'_> {
    /// The same, for an attempt that needs a fresh connection or does not.
    fn over(self, fresh: bool) -> Self {
        let needs = Needs {
            fresh,
            ..self.needs
        };
        Self { needs, ..self }
    }
}

// === impl Failed ===

impl Failed {
    pub(super) fn into_error(self) -> ProxyError {
        self.error
    }
}

// === impl Tried ===

impl<'s> Tried<'s> {
    /// An attempt that got as far as an endpoint; says to the endpoint what is known already.
    pub(super) fn new(
        target: &'s RouteTarget,
        lease: Lease,
        sent: Result<(Response<Incoming>, Loan<RequestBody>), ProxyError>,
    ) -> Self {
        match &sent {
            Ok((response, _)) if is_failure(response.status()) => lease.failed(),
            Err(error) if error.blames_endpoint() => lease.failed(),
            Err(ProxyError::OutOfTime | ProxyError::Stale(_)) => lease.fell_short(),
            _ => {}
        }
        let outcome = match sent {
            Ok((response, loan)) => Ok(Responded {
                response,
                loan,
                lease,
            }),
            Err(error) => Err(Failed {
                error,
                lease: Some(lease),
            }),
        };
        Self { target, outcome }
    }

    /// An attempt that did not get that far.
    fn failed(target: &'s RouteTarget, error: ProxyError) -> Self {
        let lease = None;
        Self {
            target,
            outcome: Err(Failed { error, lease }),
        }
    }

    fn trouble(&self) -> Option<Trouble> {
        match &self.outcome {
            Ok(responded) => Some(Trouble::Status(responded.response.status())),
            Err(failed) => failed.error.trouble(),
        }
    }

    /// The place that it has.
    fn lease(&self) -> Option<&Lease> {
        match &self.outcome {
            Ok(responded) => Some(&responded.lease),
            Err(failed) => failed.lease.as_ref(),
        }
    }

    /// The request's body from its beginning, as soon as whoever has sent it lets go of it; `None` if
    /// that takes too long, or it cannot be sent again by then.
    async fn body(&self, progress: &mut Progress) -> Option<RequestBody> {
        if !progress.is_whole() {
            return None;
        }
        // Nothing more of it is sent from here on: what is whole stays whole.
        if let Ok(responded) = &self.outcome
            && !progress.is_sent()
        {
            responded.loan.interrupt();
        }
        let body = RequestBody::again(progress, Instant::now());
        timeout(LETTING_GO, body).await.ok().flatten()
    }

    /// Leaves the place of an attempt that has failed: at the baseline there is another one, and to hold
    /// this one while waiting for that would keep others out for nothing.
    fn leave_place(&mut self) {
        if let Err(failed) = &mut self.outcome {
            failed.lease = None;
        }
    }

    /// Lets go of it, but for its place, since there is another attempt; `was_sent` with all of the
    /// request's body.
    fn give_up(self, was_sent: bool) -> Option<Lease> {
        match self.outcome {
            Ok(responded) => Some(responded.read_off(was_sent)),
            Err(failed) => failed.lease,
        }
    }

    /// Takes note if there was no connection for it.
    fn count_shortage(&self, exchange: &Exchange) {
        if let Err(Failed { error, .. }) = &self.outcome
            && let ProxyError::Crowded(why @ Crowded::NoConnection) = error
        {
            exchange.found_no_room(self.target, *why);
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
            Err(failed) => failed.error.trouble().is_some(),
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
            let lease = tried.lease();
            self.failed.extend(lease.map(|lease| lease.endpoint().id));
            tried.count_shortage(exchange);
            let next = self.next(way, trouble, &mut tried, &progress, exchange);
            let Some(next) = next.await else {
                break;
            };
            let was_sent = progress.is_sent();
            let Some(body) = tried.body(&mut progress).await else {
                break;
            };
            self.turn_to(&next, &tried, exchange);
            let target = next.target;
            let way = way.over(next.fresh);
            let lease = match (next.pass, tried.give_up(was_sent)) {
                (Some(pass), _) => next.endpoint.lease(pass),
                (None, Some(lease)) => lease.moved_to(next.endpoint),
                // `retry` has looked.
                (None, None) => return Tried::failed(target, ProxyError::NoEndpoint),
            };
            tried = self
                .attempt(way, target, lease, body, &progress, exchange)
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
            Ok((endpoint, pass)) => {
                // Nobody has sent it yet.
                let Some(body) = RequestBody::again(&mut progress, Instant::now()).await else {
                    return Tried::failed(target, ProxyError::RequestBody);
                };
                let lease = endpoint.lease(pass);
                self.attempt(way, target, lease, body, &progress, exchange)
                    .await
            }
            Err(error) => Tried::failed(target, error),
        }
    }

    /// The best next attempt that is allowed and finds room.
    async fn next(
        &mut self,
        way: Way<'_>,
        trouble: Trouble,
        tried: &mut Tried<'s>,
        progress: &Progress,
        exchange: &Exchange,
    ) -> Option<Next<'s>> {
        let case = self.case(tried, progress);
        for remedy in self.route.rescue.remedies(trouble, &case) {
            if way.limits.is_over() {
                return None;
            }
            let next = match remedy {
                Remedy::Retry => self.retry(way, trouble, &case, tried, exchange).await,
                Remedy::Shield => {
                    tried.leave_place();
                    self.shield(way, exchange).await
                }
            };
            if next.is_some() {
                return next;
            }
        }
        None
    }

    /// Once more at the same version, with the place that the request has there: to wait for another
    /// one beside it would be to wait for others who do the same.
    async fn retry(
        &self,
        way: Way<'_>,
        trouble: Trouble,
        case: &Case,
        tried: &Tried<'s>,
        exchange: &Exchange,
    ) -> Option<Next<'s>> {
        let retry = &self.route.rescue.retry;
        let target = tried.target;
        let gate = &target.backend.gate;
        let is_on_budget = Retry::is_on_budget(trouble);
        let budget = is_on_budget
            .then(|| gate.try_retry(&retry.budget))
            .flatten();
        if is_on_budget && budget.is_none() {
            exchange.retried(false);
            return None;
        }
        let die = way.proxy.dice.borrow_mut().f64();
        if !way.limits.pause(retry.pause(trouble, case, die)).await {
            return None;
        }
        tried.lease()?;
        Some(Next {
            remedy: Remedy::Retry,
            target,
            endpoint: self.choose(way, target)?,
            pass: None,
            fresh: trouble == Trouble::Stale,
            _budget: budget,
        })
    }

    /// The baseline instead.
    async fn shield(&self, way: Way<'_>, exchange: &Exchange) -> Option<Next<'s>> {
        let target = &self.route.targets[BASELINE];
        let (endpoint, pass) = self.enter(way, target, exchange).await.ok()?;
        Some(Next {
            remedy: Remedy::Shield,
            target,
            endpoint,
            pass: Some(pass),
            fresh: false,
            _budget: None,
        })
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

    /// An endpoint of this target with a place at its backend, as soon as there is room.
    async fn enter(
        &self,
        way: Way<'_>,
        target: &'s RouteTarget,
        exchange: &Exchange,
    ) -> Result<(&'s Arc<Endpoint>, Pass<'s>), ProxyError> {
        let backend = &target.backend;
        let end = way.limits.deadline;
        let pass = backend.gate.enter(&backend.gate_limits, end).await;
        let pass = pass.map_err(|why| {
            if way.limits.is_over() {
                return ProxyError::OutOfTime;
            }
            exchange.found_no_room(target, why);
            ProxyError::Crowded(why)
        })?;
        // While it waited, the last one may have been taken out.
        let endpoint = self.choose(way, target).ok_or(ProxyError::NoEndpoint)?;
        Ok((endpoint, pass))
    }

    fn choose(&self, way: Way<'_>, target: &'s RouteTarget) -> Option<&'s Arc<Endpoint>> {
        target.choose(way.proxy.roll(), Instant::now(), &self.failed)
    }

    /// Takes note that an attempt is given up for the next one.
    fn turn_to(&mut self, next: &Next<'s>, tried: &Tried<'s>, exchange: &mut Exchange) {
        let (status, grpc) = match &tried.outcome {
            Ok(responded) => {
                let status = responded.response.status();
                exchange.attempt_rejected(status);
                (status, None)
            }
            Err(Failed { error, .. }) => {
                exchange.attempt_failed(error.token());
                (error.status(), Some(error.grpc_status()))
            }
        };
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
        body: RequestBody,
        progress: &Progress,
        exchange: &mut Exchange,
    ) -> Tried<'s> {
        let now = Instant::now();
        exchange.begins_again(now);
        exchange.has_body(progress.clone());
        let mut request = self.request(target, body);
        exchange.sent_to(&target.backend, lease.endpoint(), request.headers_mut());
        let sent = {
            let addresses = self.addresses.clone();
            let (backend, endpoint) = (&target.backend, lease.endpoint());
            let pools = &way.proxy.pools;
            let mut sending = pools.send(backend, endpoint, request, way.needs, addresses);
            way.limits.wait(now, sending.as_mut(), progress).await
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
    /// That is so only if all of the request `was_sent`. Returns the place that it had.
    fn read_off(self, was_sent: bool) -> Lease {
        let Self {
            response,
            loan,
            lease,
        } = self;
        let body = response.into_body();
        if was_sent && body.is_end_stream() {
            loan.give_back();
        } else if was_sent {
            drop(tokio::task::spawn_local(async move {
                let whole = Limited::new(body, LEFTOVER_BYTES).collect();
                if let Ok(Ok(_)) = timeout(LEFTOVER_TIME, whole).await {
                    loan.give_back();
                }
            }));
        }
        lease
    }
}
