//! One request's way: accept, route, split, balance, forward, observe.
//!
//! `Proxy::forward` is that way and fits on a screen; what it calls is in the modules beside it.
//! Each worker has a `Proxy` of its own, and all that a request reads comes from the one
//! [`Snapshot`] that it took at its beginning.

pub mod body;
pub mod error;
pub mod exchange;
pub mod headers;
pub mod origin;

use std::cell::RefCell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout_at};

use crate::backend::Lease;
use crate::routing::Decision;
use crate::snapshot::{Reader, Route, Snapshot};
use crate::telemetry::metrics::Metrics;
use crate::upstream::{Loan, Pools, SendError};

use body::{Held, Progress, ReplyBody, RequestBody, UpstreamBody};
use error::ProxyError;
use exchange::Exchange;
use origin::{Origin, Peer};

/// Serves the requests of one worker.
#[derive(Debug)]
pub struct Proxy {
    live: Reader,
    pools: Rc<Pools<RequestBody>>,
    metrics: Arc<Metrics>,
    dice: RefCell<fastrand::Rng>,
}

/// The head of an upstream's response, with what has to be held on to until its body ends.
struct Answer {
    response: Response<Incoming>,
    lease: Lease,
    loan: Loan<RequestBody>,
    request_body: Progress,
    deadline: Option<Instant>,
}

/// What the client is told of a decision, free of what it was decided from.
struct Verdict {
    /// The anonymous id to issue.
    set_cookie: Option<HeaderValue>,
    /// How it was decided, for those who may know.
    debug: Option<HeaderValue>,
}

// === impl Proxy ===

impl Proxy {
    /// A proxy for the thread that calls.
    pub fn new(live: Reader, pools: Rc<Pools<RequestBody>>, metrics: Arc<Metrics>) -> Self {
        Self {
            live,
            pools,
            metrics,
            dice: RefCell::new(fastrand::Rng::new()),
        }
    }

    /// The snapshot in force.
    pub fn live(&self) -> &Reader {
        &self.live
    }

    /// Serves a request; what goes wrong becomes a reply. From the call on the request is counted,
    /// even if the future is never polled.
    pub fn handle<'p>(
        &'p self,
        peer: &'p Peer,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<ReplyBody>> + 'p {
        let snapshot = self.live.current();
        let mut exchange = Exchange::begin(&self.metrics, &snapshot, &request);
        async move {
            match self.forward(&snapshot, peer, &mut exchange, request).await {
                Ok(answer) => answer.into_response(exchange),
                Err(error) => error.reply(exchange),
            }
        }
    }

    async fn forward(
        &self,
        snapshot: &Snapshot,
        peer: &Peer,
        exchange: &mut Exchange,
        request: Request<Incoming>,
    ) -> Result<Answer, ProxyError> {
        let (mut parts, body) = request.into_parts();
        let origin = Origin::new(snapshot, peer, &parts.headers);
        let host = origin::host(&parts)?;
        let head = origin.head(&parts, &host);

        let route = snapshot.find(&head).ok_or(ProxyError::NoRoute)?;
        headers::refuse_transfer_coding(&parts.headers, || ProxyError::TransferCoding)?;
        headers::refuse_ambiguous(&parts.headers, &route.guarded_headers)?;
        let decision = route.decide(&head, origin.trusted, &mut || self.roll());
        let target = &route.targets[decision.target];
        exchange.decided(target, decision.reason);
        let verdict = Verdict::new(&decision, route, &origin, snapshot);
        let lease = target
            .backend
            .lease(self.roll())
            .ok_or(ProxyError::NoEndpoint)?;

        let endpoint = lease.endpoint();
        let backend = &target.backend;
        headers::prepare_request(&mut parts, &body, route, backend, endpoint.address, &origin);
        let (body, progress) = RequestBody::new(body);
        let request = Request::from_parts(parts, body);
        let sending = self.pools.send(backend, endpoint, request);
        let deadline = route
            .request_timeout
            .map(|limit| exchange.started() + limit);
        let (mut response, loan) =
            wait(sending, route.backend_timeout, deadline, &progress).await?;

        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // Nobody asked: the upgrade fields were taken out of the request.
            return Err(ProxyError::UnaskedUpgrade);
        }
        headers::refuse_transfer_coding(response.headers(), || ProxyError::UnknownCoding)?;
        *response.version_mut() = Version::HTTP_11;
        exchange.answered(response.status());
        headers::prepare_response(response.headers_mut(), route, target, &verdict);
        Ok(Answer {
            response,
            lease,
            loan,
            request_body: progress,
            deadline,
        })
    }

    fn roll(&self) -> u64 {
        self.dice.borrow_mut().u64(..)
    }
}

// === impl Answer ===

impl Answer {
    fn into_response(self, exchange: Exchange) -> Response<ReplyBody> {
        let Self {
            response,
            lease,
            loan,
            request_body,
            deadline,
        } = self;
        response.map(|body| {
            let held = Held::new(exchange, lease, loan, request_body);
            ReplyBody::Upstream(UpstreamBody::new(body, held, deadline))
        })
    }
}

// === impl Verdict ===

impl Verdict {
    fn new(decision: &Decision<'_>, route: &Route, origin: &Origin, snapshot: &Snapshot) -> Self {
        let shown = route
            .debug_clients
            .iter()
            .any(|network| network.contains(&origin.client));
        Self {
            set_cookie: decision
                .issued_identity()
                .and_then(headers::anonymous_cookie),
            debug: shown
                .then(|| headers::debug_value(decision, route, snapshot))
                .flatten(),
        }
    }
}

/// Waits for the head of a response, but not forever: `limit` counts from the last sign of life of
/// the request's body, so that a long upload is not cut off, and `deadline` is the end of the
/// exchange whatever happens.
async fn wait<T>(
    sending: impl Future<Output = Result<T, SendError>>,
    limit: Option<Duration>,
    deadline: Option<Instant>,
    progress: &Progress,
) -> Result<T, ProxyError> {
    let mut sending = pin!(sending);
    loop {
        let silence_ends = limit.map(|limit| progress.last() + limit);
        let Some(until) = silence_ends.into_iter().chain(deadline).min() else {
            return sending
                .await
                .map_err(|error| ProxyError::from_send(error, progress));
        };
        match timeout_at(until, sending.as_mut()).await {
            Ok(sent) => return sent.map_err(|error| ProxyError::from_send(error, progress)),
            Err(_)
                if deadline == Some(until)
                    || limit.map(|limit| progress.last() + limit) == silence_ends =>
            {
                return Err(if progress.awaits_client() {
                    ProxyError::RequestStalled
                } else {
                    ProxyError::Timeout
                });
            }
            Err(_) => {}
        }
    }
}
