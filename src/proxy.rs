//! One request's way: accept, route, split, balance, forward, observe.
//!
//! `Proxy::route` and `Proxy::forward` are that way and fit on a screen; what they call is in the
//! modules beside them.
//! Each worker has a `Proxy` of its own, and all that a request reads comes from the one
//! [`Snapshot`] that it took at its beginning.

pub mod admission;
mod answer;
mod attempts;
pub mod body;
pub mod error;
pub mod exchange;
pub mod grpc;
pub mod headers;
mod kept;
mod limits;
pub mod origin;
mod recording;
pub mod stays;
pub mod timeouts;
pub mod translate;
pub mod tunnel;
pub mod upgrade;
pub mod via;

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use http::header::{HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Response, Version};
use hyper::body::{Body, Incoming};
use scopeguard::{ScopeGuard, guard};
use tokio::time::Instant;

use crate::backend::{Endpoint, Lease};
use crate::filter::cors::Grant;
use crate::filter::redirect::Asked;
use crate::routing::{Decision, Reason};
use crate::snapshot::{Reader, Route, RouteTarget, Snapshot};
use crate::telemetry::metrics::WorkerMetrics;
use crate::transcode::Call;
use crate::upstream::{self, Needs, Pools};

use answer::{Answer, Heard, answered};
use attempts::{Again, Failed, Responded, Tried, Way};
use body::{BodyRules, Progress, ReplyBody, RequestBody};
use error::ProxyError;
use exchange::Exchange;
use headers::Survey;
use limits::Limits;
use origin::{Guards, Origin, Peer};
use stays::{Stay, Stays};
use timeouts::{Timeouts, Timer};
use translate::Translation;
use upgrade::Wish;
use via::Via;

/// Serves the requests of one worker.
#[derive(Debug)]
pub struct Proxy {
    live: Reader,
    pools: Rc<Pools<RequestBody>>,
    metrics: Rc<WorkerMetrics>,
    timeouts: Arc<Timeouts>,
    via: Via,
    dice: RefCell<fastrand::Rng>,
    stays: Stays,
}

/// What is known of a request before its route is.
struct Admitted<'p> {
    origin: Origin<'p>,
    survey: Survey,
    /// It is a call of gRPC.
    is_call: bool,
    has_escaped_slash: bool,
    /// The tunnel that the client asks for.
    wish: Option<Wish>,
}

/// Where a request goes.
struct Decided<'s> {
    route: &'s Arc<Route>,
    /// How many bytes of its path the match has taken.
    matched: usize,
    target: &'s RouteTarget,
    reason: Reason,
    verdict: Verdict,
}

/// A request that is ready to go to its endpoint.
struct Routed<'s> {
    request: Request<RequestBody>,
    needs: Needs,
    /// What the endpoint is told of the connection.
    addresses: Option<Box<upstream::Addresses>>,
    /// The tunnel that the client asks for.
    wish: Option<Box<Wish>>,
    guards: Guards,
    limits: Limits,
    /// How far its body has come.
    progress: Progress,
    route: &'s Route,
    target: &'s RouteTarget,
    verdict: Verdict,
    endpoint: &'s Arc<Endpoint>,
    /// `None` as long as the backend has no room.
    lease: Option<Lease>,
    /// What it is sent again from, or for the first time once there is room.
    again: Again<'s>,
}

/// What the client is told of a decision, free of what it was decided from.
struct Verdict {
    /// The anonymous id to issue.
    set_cookie: Option<HeaderValue>,
    /// How it was decided, for those who may know.
    debug: Option<HeaderValue>,
    /// What the page that asked may know.
    cors: Option<Box<Grant>>,
    /// What it was decided by, where a stream may have to end because of that.
    stay: Option<Box<stays::Decided>>,
}

/// Why a request is not sent on.
enum Instead {
    /// Something is wrong.
    Error(ProxyError),
    /// Its route answers it.
    Response(Box<Response<()>>),
}

// === impl Proxy ===

impl Proxy {
    /// A proxy for the thread that calls.
    pub fn new(
        live: Reader,
        pools: Rc<Pools<RequestBody>>,
        metrics: WorkerMetrics,
        timeouts: Arc<Timeouts>,
        via: Via,
    ) -> Self {
        Self {
            live,
            pools,
            metrics: Rc::new(metrics),
            timeouts,
            via,
            dice: RefCell::new(fastrand::Rng::new()),
            stays: Stays::default(),
        }
    }

    /// The limits of its worker, for hyper.
    pub fn timer(&self) -> Timer {
        Timer(Arc::clone(&self.timeouts))
    }

    /// Does what has to be done when there is a new snapshot.
    pub fn follow(&self) {
        self.stays.follow(&self.live.current(), Instant::now());
        self.sweep();
    }

    /// The snapshot in force.
    pub fn live(&self) -> &Reader {
        &self.live
    }

    /// Does what has to be done now and then: closes connections that nobody needs, and hands over
    /// what the access log holds.
    pub fn sweep(&self) {
        let snapshot = self.live.current();
        self.pools.sweep(&snapshot, std::time::Instant::now());
        if let Some(log) = snapshot.access_log() {
            log.flush();
        }
    }

    /// Serves a request; what goes wrong becomes a reply. From the call on the request is counted,
    /// even if the future is never polled.
    pub fn handle<'p>(
        &'p self,
        peer: &'p Peer,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<ReplyBody>> + 'p {
        let snapshot = self.live.current();
        let (log, tracer) = (snapshot.access_log(), snapshot.tracer());
        let mut exchange = Exchange::begin(&self.metrics, log, tracer, &request);
        async move {
            match self.route(&snapshot, peer, &mut exchange, request) {
                Ok(routed) => self.forward(routed, exchange).await,
                Err(Instead::Response(response)) => response.map(|()| ReplyBody::empty()),
                Err(Instead::Error(error)) => refuse(error, exchange).await,
            }
        }
    }

    /// Decides where a request goes, and makes it ready to go there.
    ///
    /// Apart from [`forward`](Self::forward), since all that an `async fn` ever borrows stays in its
    /// future: as one, they had futures of three times the size, which are moved with each request
    /// and kept with each connection.
    fn route<'s>(
        &self,
        snapshot: &'s Snapshot,
        peer: &Peer,
        exchange: &mut Exchange,
        request: Request<Incoming>,
    ) -> Result<Routed<'s>, Instead> {
        let (mut parts, body) = request.into_parts();
        let lingers = parts.version == Version::HTTP_2;
        // Where it is answered here.
        let body = guard(body, |body| {
            if lingers {
                body::linger(body);
            }
        });
        let admitted = self.admit(snapshot, peer, exchange, &mut parts, &body)?;
        let Decided {
            route,
            matched,
            target,
            reason,
            verdict,
        } = self.decide(snapshot, &admitted, exchange, &parts)?;
        let Admitted {
            origin,
            survey,
            is_call,
            wish,
            ..
        } = admitted;

        let backend = &target.backend;
        let call = route.call(&parts, is_call)?;
        let translation = call.map(|call| Translation::new(call, &mut parts));
        if let Some(translation) = &translation {
            exchange.becomes_translated_call(translation);
        }
        let endpoint = target
            .choose(self.roll(), exchange.started(), &[])
            .ok_or(ProxyError::NoEndpoint)?;
        let limit = route.body_limit(&origin, translation.is_some(), &body)?;
        let limits = self.limits(route, is_call, &parts.headers, exchange);
        let needs = Needs {
            trailers: translation.is_some()
                || survey.has(Survey::TE) && headers::accepts_trailers(&parts.headers),
            tunnel: wish.is_some(),
            fresh: false,
        };
        let subjects = &snapshot.subject_headers;
        headers::prepare_request(&mut parts, survey, route, endpoint, subjects, &origin);
        self.via.append(&mut parts.headers, parts.version);
        headers::rewrite(&mut parts, route, matched);
        if let Some(wish) = &wish {
            wish.ask(&mut parts.headers);
        }
        let addresses = route.tells_clients.then(|| Box::new(origin.addresses()));
        let lease = backend.gate.try_enter().map(|pass| endpoint.lease(pass));
        let again = Again::new(route, target, &parts, reason, addresses.as_deref());
        backend.request_headers.apply(&mut parts.headers);
        let rules = || BodyRules {
            kept: again.body_buffer(),
            limit,
            gap: origin.body_gap().filter(|_| !is_call),
            rest: route.tunnel_idle,
            timeout: self.timeouts.timeout(),
            route: Arc::clone(route),
            subject_headers: Arc::clone(&snapshot.subject_headers),
        };
        let body = ScopeGuard::into_inner(body);
        let (body, progress) = match translation {
            None => RequestBody::new(body, exchange.sent_at(), rules),
            Some(translation) => {
                RequestBody::translated(body, exchange.sent_at(), rules, translation)
            }
        };
        exchange.has_body(progress.clone());
        if lease.is_some() {
            exchange.sent_to(backend, endpoint, &mut parts.headers);
        }
        Ok(Routed {
            request: Request::from_parts(parts, body),
            needs,
            addresses,
            wish: wish.map(Box::new),
            guards: Rc::clone(&peer.guards),
            limits,
            progress,
            route,
            target,
            verdict,
            endpoint,
            lease,
            again,
        })
    }

    /// Looks at what of a request does not depend on its route, and brings it into the form in which
    /// it is judged and sent on.
    fn admit<'p>(
        &self,
        snapshot: &'p Snapshot,
        peer: &'p Peer,
        exchange: &mut Exchange,
        parts: &mut Parts,
        body: &Incoming,
    ) -> Result<Admitted<'p>, ProxyError> {
        let origin = Origin::new(snapshot, peer, &parts.headers);
        exchange.came_from(&origin);
        let survey = Survey::of(&parts.headers);
        let is_call = survey.has(Survey::CONTENT_TYPE) && grpc::is_call(parts);
        if is_call {
            exchange.becomes_call();
        }
        headers::join_cookies(&mut parts.headers, survey);
        headers::refuse_beyond_limits(parts, origin.listener)?;
        if survey.has(Survey::VIA) {
            self.via.refuse_loop(&parts.headers)?;
        }
        Ok(Admitted {
            has_escaped_slash: origin::canonical_target(parts)?,
            wish: self.wish(parts, survey, body),
            origin,
            survey,
            is_call,
        })
    }

    /// Sends a request on its way, and makes the response ready for the client.
    ///
    /// Boxed: what waits for an endpoint would otherwise be moved with everything that holds it.
    fn forward<'f>(
        &'f self,
        routed: Routed<'f>,
        mut exchange: Exchange,
    ) -> Pin<Box<impl Future<Output = Response<ReplyBody>> + 'f>> {
        let Routed {
            request,
            needs,
            addresses,
            wish,
            guards,
            limits,
            progress,
            route,
            target,
            verdict,
            endpoint,
            lease,
            mut again,
        } = routed;
        let begun = lease.map(|lease| {
            let backend = &target.backend;
            let pools = &self.pools;
            let sending = pools.send(backend, endpoint, request, needs, addresses);
            (lease, sending)
        });
        Box::pin(async move {
            let way = Way {
                proxy: self,
                limits: &limits,
                needs,
            };
            // Boxed, but for the first: few requests need another attempt, or have to wait.
            let mut tried = match begun {
                Some((lease, mut sending)) => {
                    let since = exchange.sent_at();
                    let sent = limits.wait(since, sending.as_mut(), &progress).await;
                    Tried::new(target, lease, sent)
                }
                None => {
                    let body = progress.clone();
                    Box::pin(again.wait_for_room(way, target, body, &mut exchange)).await
                }
            };
            if again.concerns(&tried) {
                tried = Box::pin(again.go_on(way, tried, progress.clone(), &mut exchange)).await;
            }
            let translation = exchange.translation();
            let answer = tried.outcome.map_err(Failed::into_error);
            let answer = answer.and_then(|responded| {
                progress.answered();
                let Responded {
                    mut response,
                    loan,
                    lease,
                } = responded;
                let Heard {
                    ends,
                    survey,
                    latency,
                } = answered(&mut response, wish, &lease, &mut exchange)?;
                headers::prepare_response(&mut response, survey, route, tried.target, &verdict);
                admission::tell(exchange.standing(), None, response.headers_mut());
                let may_be_moved = |_: &Box<_>| {
                    // The baseline is where everybody may stay.
                    std::ptr::eq(tried.target, target)
                        && (ends.is_some() || exchange.is_stream(response.headers()))
                };
                let stay = verdict.stay.filter(may_be_moved);
                Ok(Answer {
                    stay: stay.map(|stay| self.begin_stay(*stay)),
                    response,
                    lease,
                    loan,
                    latency,
                    tunnel: ends.map(|ends| Box::new((ends, guards, route.tunnel_idle))),
                    limits,
                })
            });
            let response = match answer {
                Ok(answer) => answer.into_response(exchange),
                Err(error) => {
                    exchange.linger();
                    error.reply(exchange)
                }
            };
            match translation {
                None => response,
                // Boxed, since few responses are translated.
                Some(translation) => Box::pin(translation.translate(response)).await,
            }
        })
    }

    fn begin_stay(&self, decided: stays::Decided) -> Rc<Stay> {
        let over = self.timeouts.timeout();
        let snapshot = self.live.current();
        self.stays.begin(decided, over, &snapshot, Instant::now())
    }

    /// Decides where an admitted request goes, unless its route answers it itself.
    fn decide<'s>(
        &self,
        snapshot: &'s Snapshot,
        admitted: &Admitted<'_>,
        exchange: &mut Exchange,
        parts: &Parts,
    ) -> Result<Decided<'s>, Instead> {
        let Admitted { origin, survey, .. } = admitted;
        let host = origin::host(parts, *survey)?;
        let head = origin::head(parts, &host, origin.client);
        let (route, matched) = snapshot.find(&head).ok_or(ProxyError::NoRoute)?;
        admission::shed(snapshot, route, exchange)?;
        if admitted.has_escaped_slash && !route.keeps_escaped_slashes {
            return Err(ProxyError::BadRequest("the path has an escaped slash").into());
        }
        if let Some(response) = route.answer(parts, &host, matched, origin) {
            exchange.answered_by_route(route, response.status());
            return Err(Instead::Response(Box::new(response)));
        }
        let refusal = || ProxyError::TransferCoding;
        headers::refuse_transfer_coding(&parts.headers, *survey, refusal)?;
        headers::refuse_ambiguous(&parts.headers, *survey, &route.guarded_headers)?;
        let (decision, failed_over) =
            route.decide(&head, origin.trusted, exchange.started(), &mut || {
                self.roll()
            });
        admission::limit_rate(route, &head, &decision, exchange)?;
        exchange.decided(route, &decision, failed_over);
        Ok(Decided {
            route,
            matched,
            target: &route.targets[decision.target],
            reason: decision.reason,
            verdict: Verdict::new(&decision, route, origin, &parts.headers, snapshot),
        })
    }

    /// The tunnel that a request asks for, if it does.
    fn wish(&self, parts: &mut Parts, survey: Survey, body: &Incoming) -> Option<Wish> {
        let may_be = survey.has(Survey::UPGRADE) || parts.method == Method::CONNECT;
        if !may_be {
            return None;
        }
        let key = self.dice.borrow_mut().u128(..).to_le_bytes();
        Wish::of(parts, survey, !body.is_end_stream(), key)
    }

    /// How long an exchange may take; a caller of gRPC has a say in that.
    fn limits(
        &self,
        route: &Route,
        is_call: bool,
        headers: &HeaderMap,
        exchange: &Exchange,
    ) -> Limits {
        let asked = is_call.then(|| grpc::timeout(headers)).flatten();
        let limit = [route.request_timeout, asked].into_iter().flatten().min();
        let began = exchange.started();
        Limits {
            began,
            silence: route.backend_timeout,
            deadline: limit.map(|limit| began + limit),
            is_callers: limit.is_some() && limit != route.request_timeout,
            may_rest: is_call,
            timeout: self.timeouts.timeout(),
        }
    }

    fn roll(&self) -> u64 {
        self.dice.borrow_mut().u64(..)
    }
}

/// The reply to a request that is not sent on, as its client understands it.
fn refuse(
    error: ProxyError,
    exchange: Exchange,
) -> Pin<Box<impl Future<Output = Response<ReplyBody>>>> {
    let translation = exchange.translation();
    let reply = error.reply(exchange);
    Box::pin(async move {
        match translation {
            None => reply,
            Some(translation) => translation.translate(reply).await,
        }
    })
}

// === impl Route ===

impl Route {
    /// The response to a request that it does not send on.
    fn answer(
        &self,
        parts: &Parts,
        host: &str,
        matched: usize,
        origin: &Origin<'_>,
    ) -> Option<Response<()>> {
        if let Some(cors) = &self.filters.cors
            && let Some(response) = cors.preflight(parts)
        {
            return Some(response);
        }
        let redirect = self.filters.redirect.as_ref()?;
        Some(redirect.response(&Asked {
            scheme: origin.scheme(),
            host,
            port: origin.peer.listener.port(),
            path: parts.uri.path(),
            query: parts.uri.query(),
            matched,
        }))
    }

    /// The call that a request means which is to be translated.
    fn call(&self, parts: &Parts, is_call: bool) -> Result<Option<Call>, ProxyError> {
        match &self.transcoder {
            Some(transcoder) if !is_call => {
                let uri = &parts.uri;
                let call = transcoder.find(&parts.method, uri.path(), uri.query());
                call.map(Some).ok_or(ProxyError::NoMethod)
            }
            _ => Ok(None),
        }
    }

    /// The most bytes of a request's body, if it does not have more already.
    fn body_limit(
        &self,
        origin: &Origin<'_>,
        is_translated: bool,
        body: &Incoming,
    ) -> Result<Option<u64>, ProxyError> {
        let limit = self.body_limit.or(origin.body_limit());
        let limit = limit.or(is_translated.then_some(translate::LARGEST_BODY));
        match limit {
            Some(limit) if body.size_hint().lower() > limit => Err(ProxyError::BodyTooLarge),
            limit => Ok(limit),
        }
    }
}

// === impl Instead ===

impl From<ProxyError> for Instead {
    fn from(error: ProxyError) -> Self {
        Self::Error(error)
    }
}

// === impl Verdict ===

impl Verdict {
    fn new(
        decision: &Decision<'_>,
        route: &Route,
        origin: &Origin<'_>,
        headers: &HeaderMap,
        snapshot: &Snapshot,
    ) -> Self {
        let shown = route
            .debug_clients
            .iter()
            .any(|network| network.contains(&origin.client));
        let cors = route.filters.cors.as_ref();
        Self {
            cors: cors.map(|cors| Box::new(cors.grant(headers))),
            set_cookie: decision
                .issued_identity()
                .and_then(headers::anonymous_cookie),
            debug: shown
                .then(|| headers::debug_value(decision, route, snapshot))
                .flatten(),
            stay: stays::Decided::new(snapshot.revision, route, decision),
        }
    }
}
