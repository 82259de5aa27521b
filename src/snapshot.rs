//! The one immutable picture of the world that a request is served by, and the place where the
//! current one hangs.
//!
//! [`compile`] is pure but for the living state it takes over by key (endpoints, metric handles).
//! [`Live`] has a single writer, [`control`](crate::control); a request reads it once and holds on
//! to what it read until the head of its response is sent.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::header::{COOKIE, HeaderName, HeaderValue};
use ipnet::IpNet;
use rustls::pki_types::ServerName;
use tokio::sync::watch;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::access;
use crate::backend::{
    Backend, ConnectionPolicy, Endpoint, EndpointId, EndpointKey, Endpoints, HeaderEdits,
    Unavailability,
};
use crate::config::{self, Config, Failover};
use crate::discovery::Located;
use crate::filter::Filters;
use crate::limit::key::By;
use crate::limit::overload::{Overload, Priority};
use crate::limit::rate::{RateLimit, Tallies};
use crate::routing::gray::{Dice, Override, Rule, Step};
use crate::routing::rescue::Rescue;
use crate::routing::split::{Ratio, Split, Weight};
use crate::routing::{BASELINE, Decision, Gray, Reason, RequestHead, RouteTable, Target, UserList};
use crate::telemetry::access_log::{AccessLog, WorkerLog};
use crate::telemetry::metrics::{Metrics, TargetLabels, TargetMetrics};
use crate::telemetry::trace::{Tracer, WorkerTracer};
use crate::tls::server::{ServerTls, Tickets};
use crate::transcode::Transcoder;
use crate::weights::RuntimeWeights;

/// Counts the snapshots of a process, from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub u64);

/// Everything that serving a request reads.
#[derive(Debug)]
pub struct Snapshot {
    /// Which one it is.
    pub revision: Revision,
    /// The listeners.
    pub listeners: Vec<Listener>,
    /// Listeners that are no longer configured but still have connections.
    pub draining_listeners: Vec<Listener>,
    /// The routes in the order of the file.
    pub routes: Vec<Arc<Route>>,
    /// The backends in the order of the file.
    pub backends: Vec<Arc<Backend>>,
    /// Where operators come in.
    pub admin: Admin,
    /// Headers in which some listener passes on the subject of a client's certificate: from nobody
    /// else they may come, through whatever listener.
    pub subject_headers: Arc<[HeaderName]>,
    /// How many requests are served at a time.
    pub overload: Overload,
    /// Where a line for each request goes.
    pub access_log: Option<Arc<AccessLog>>,
    /// What traces requests.
    pub tracer: Option<Arc<Tracer>>,
    table: RouteTable,
    /// Where each stands in `routes`.
    routes_by_name: HashMap<Arc<str>, usize>,
    /// Where each stands in `backends`.
    backends_by_name: HashMap<Arc<str>, usize>,
    /// The backend of each endpoint.
    homes: HashMap<EndpointId, Arc<Backend>>,
}

/// A listener.
#[derive(Clone, Debug)]
pub struct Listener {
    /// As configured, but with the address that it is bound to.
    pub settings: config::Listener,
    /// What TLS connections are accepted with; `None` without TLS.
    pub tls: Option<ServerTls>,
}

/// Where operators come in.
#[derive(Clone, Debug)]
pub struct Admin {
    /// What TLS connections are accepted with; `None` without TLS.
    pub tls: Option<ServerTls>,
    /// Who may change what is served.
    pub writers: Arc<[access::Writer]>,
}

/// What outlives snapshots and is taken over by key.
#[derive(Debug, Default)]
pub struct Living {
    /// The endpoints of all backends.
    pub endpoints: Endpoints,
    /// What encrypts the session tickets of listeners.
    pub tickets: Tickets,
    /// What rate limits have counted.
    pub tallies: Tallies,
}

/// A compiled route.
#[derive(Debug)]
pub struct Route {
    /// Its name.
    pub name: Arc<str>,
    /// Its backends, the first is the baseline; empty only for a redirect.
    pub targets: Vec<RouteTarget>,
    /// What becomes of its requests and responses.
    pub filters: Arc<Filters>,
    /// Whether a path may have escaped slashes.
    pub keeps_escaped_slashes: bool,
    /// What turns HTTP into gRPC.
    pub transcoder: Option<Arc<Transcoder>>,
    /// The most bytes of a request body, where it says so itself.
    pub body_limit: Option<u64>,
    /// How fast its requests may come.
    pub rate_limits: Vec<RateLimit>,
    /// How important its requests are.
    pub priority: Priority,
    /// What requests are counted under that it answers itself.
    pub metrics: Arc<TargetMetrics>,
    /// Who gets which.
    pub gray: Gray,
    /// Who gets the requests of a target that takes none.
    pub failover: Failover,
    /// What is done about requests that failed.
    pub rescue: Arc<Rescue>,
    /// How long a stream may go on whose user gets another version; `None` for as long as it likes.
    pub stream_deadline: Option<Duration>,
    /// Some of its endpoints are told who the client is.
    pub tells_clients: bool,
    /// The limit of a whole exchange.
    pub request_timeout: Option<Duration>,
    /// The limit of waiting for the head of a response.
    pub backend_timeout: Option<Duration>,
    /// How long nothing may go through a tunnel.
    pub tunnel_idle: Option<Duration>,
    /// Whether responses name their version.
    pub expose_version: bool,
    /// The `Vary` header of its responses.
    pub vary: Option<HeaderValue>,
    /// Headers that say who the user is or what he wants.
    pub guarded_headers: Vec<HeaderName>,
    /// Those, and what is written into requests: nothing of it may come behind a body.
    pub guarded_trailers: Vec<HeaderName>,
    /// Those of the headers that a sender who is not trusted may not even pass on.
    pub unbelieved_headers: Vec<HeaderName>,
    /// Who is shown how it was decided.
    pub debug_clients: Arc<[IpNet]>,
}

/// A backend of a route.
#[derive(Debug)]
pub struct RouteTarget {
    /// The backend.
    pub backend: Arc<Backend>,
    /// The backend's version as a header value.
    pub version: HeaderValue,
    /// What its requests are counted under.
    pub metrics: Arc<TargetMetrics>,
    /// With fewer than this part of the endpoints usable, all of them get requests; 0 for never, as it
    /// is for every target but the baseline. A backend may be the baseline of one route and the canary
    /// of another, whose users have somewhere else to go.
    panic_threshold: Ratio,
}

/// Why another target gets a request than was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailedOver {
    /// The one that would have got it.
    pub from: Target,
    /// Why it takes none.
    pub cause: Unavailability,
}

/// Where the current snapshot hangs.
#[derive(Debug)]
pub struct Live {
    current: ArcSwap<Snapshot>,
    published: watch::Sender<Revision>,
}

/// One worker's view of [`Live`].
///
/// Requests of a worker share one reference count that no other thread touches, and learn of a new
/// snapshot by a single load; so holding a snapshot costs a request no contended cache line.
pub struct Reader {
    live: Arc<Live>,
    held: RefCell<Rc<Held>>,
}

/// A snapshot that a worker holds on to.
pub struct Held {
    snapshot: Arc<Snapshot>,
    /// The worker's end of its access log.
    access_log: Option<Rc<WorkerLog>>,
    /// The worker's tracer.
    tracer: Option<Rc<WorkerTracer>>,
}

/// The panic threshold of those who have somewhere else to go.
const NEVER: Ratio = Ratio(0);

/// Tells the hash that says when users come back from those that say where they belong.
const TURNS: u64 = 0x7475_726e;

/// What a snapshot is compiled from.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'s> {
    /// A checked configuration.
    pub config: &'s Config,
    /// Its user lists in the order of the file.
    pub lists: &'s [Arc<UserList>],
    /// The endpoints of each of its backends.
    pub endpoints: &'s [Vec<Located>],
    /// Weights that are set over those of the file.
    pub weights: &'s RuntimeWeights,
}

/// Compiles a snapshot.
pub fn compile(
    sources: Sources<'_>,
    revision: Revision,
    living: &mut Living,
    metrics: &Metrics,
) -> Snapshot {
    let Sources {
        config, endpoints, ..
    } = sources;
    let backends: Vec<Arc<Backend>> = config
        .backends
        .iter()
        .zip(endpoints)
        .map(|(backend, located)| compile_backend(backend, located, &mut living.endpoints))
        .map(Arc::new)
        .collect();
    let mut table = RouteTable::default();
    for (index, route) in config.routes.iter().enumerate() {
        table.insert(index, &route.hostnames, &route.matches);
    }
    table.finish();
    Snapshot {
        revision,
        listeners: config
            .listeners
            .iter()
            .map(|listener| compile_listener(listener, &mut living.tickets))
            .collect(),
        draining_listeners: Vec::new(),
        admin: compile_admin(&config.admin, &mut living.tickets),
        subject_headers: config
            .listeners
            .iter()
            .filter_map(|listener| {
                listener
                    .tls
                    .as_ref()?
                    .clients
                    .as_ref()?
                    .subject_header
                    .clone()
            })
            .collect(),
        overload: config.overload,
        access_log: None,
        tracer: None,
        routes: config
            .routes
            .iter()
            .map(|route| {
                Arc::new(compile_route(
                    route,
                    &backends,
                    sources,
                    &mut living.tallies,
                    metrics,
                ))
            })
            .collect(),
        homes: backends
            .iter()
            .flat_map(|backend| {
                let endpoints = backend.endpoints.iter();
                endpoints.map(|endpoint| (endpoint.id, Arc::clone(backend)))
            })
            .collect(),
        routes_by_name: positions(config.routes.iter().map(|route| &route.name)),
        backends_by_name: positions(backends.iter().map(|backend| &backend.name)),
        backends,
        table,
    }
}

fn positions<'n>(names: impl Iterator<Item = &'n Arc<str>>) -> HashMap<Arc<str>, usize> {
    let numbered = names.enumerate();
    numbered
        .map(|(position, name)| (Arc::clone(name), position))
        .collect()
}

fn compile_listener(listener: &config::Listener, tickets: &mut Tickets) -> Listener {
    let tls = listener.tls.as_ref();
    Listener {
        settings: listener.clone(),
        tls: tls.map(|settings| ServerTls::new(settings, listener.address, tickets)),
    }
}

fn compile_admin(admin: &config::Admin, tickets: &mut Tickets) -> Admin {
    let tls = admin.tls.as_ref();
    Admin {
        tls: tls.map(|settings| ServerTls::new(settings, admin.address, tickets).for_http1()),
        writers: Arc::clone(&admin.writers),
    }
}

fn compile_backend(
    backend: &config::Backend,
    located: &[Located],
    endpoints: &mut Endpoints,
) -> Backend {
    let gate = endpoints.gate(&backend.name);
    gate.resize(backend.gate_limits.in_flight);
    Backend {
        name: Arc::clone(&backend.name),
        version: Arc::clone(&backend.version),
        disabled: backend.disabled,
        endpoints: located
            .iter()
            .map(|one| compile_endpoint(backend, one, endpoints))
            .collect(),
        request_headers: backend.request_headers.clone(),
        response_headers: backend.response_headers.clone(),
        connections: backend.connections,
        transport: Arc::clone(&backend.transport),
        gate,
        gate_limits: backend.gate_limits,
        health_check: backend.health_check.clone(),
        outliers: backend.outliers,
        slow_start: backend.slow_start,
        panic_threshold: backend.panic_threshold,
    }
}

/// The name that an endpoint's certificate must be for, where the name that led there says so.
fn certified(backend: &config::Backend, located: &Located) -> Option<ServerName<'static>> {
    let tls = backend.transport.tls.as_ref()?;
    let name = located
        .name
        .as_ref()
        .filter(|_| tls.common_name().is_none())?;
    ServerName::try_from(name.certified_host().to_owned()).ok()
}

fn compile_endpoint(
    backend: &config::Backend,
    located: &Located,
    endpoints: &mut Endpoints,
) -> Arc<Endpoint> {
    let key = EndpointKey {
        backend: Arc::clone(&backend.name),
        address: located.address,
        certified: certified(backend, located),
    };
    let endpoint = endpoints.get_or_create(key, backend.health_check.is_some());
    let consecutive = backend.outliers.and_then(|policy| policy.consecutive);
    endpoint.alarm_at(consecutive.map(NonZeroU32::get));
    endpoint
}

fn compile_route(
    route: &config::Route,
    backends: &[Arc<Backend>],
    sources: Sources<'_>,
    tallies: &mut Tallies,
    metrics: &Metrics,
) -> Route {
    let targets: Vec<RouteTarget> = route
        .targets
        .iter()
        .enumerate()
        .map(|(position, target)| {
            let is_baseline = position == BASELINE;
            compile_target(route, &backends[target.backend], is_baseline, metrics)
        })
        .collect();
    let weights = weights(route, &targets, sources.weights);
    for (position, (target, weight)) in targets.iter().zip(&weights).enumerate() {
        let labels = [("route", &*route.name), ("backend", &target.backend.name)];
        let gauge = metrics.gauge("serin_backend_weight", &labels);
        gauge.set(f64::from(*weight));
        let is_baseline = u8::from(position == BASELINE);
        let gauge = metrics.gauge("serin_baseline_info", &labels);
        gauge.set(f64::from(is_baseline));
    }
    let gray = compile_gray(route, &targets, &weights, sources.lists);
    Route {
        name: Arc::clone(&route.name),
        vary: vary(route, &gray),
        guarded_headers: guarded_headers(route, &gray),
        guarded_trailers: guarded_trailers(route, &gray, &targets),
        unbelieved_headers: gray.unbelieved_headers(),
        gray,
        filters: Arc::clone(&route.filters),
        keeps_escaped_slashes: route.keeps_escaped_slashes,
        transcoder: route.transcoder.clone(),
        body_limit: route.body_limit,
        rate_limits: compile_rate_limits(route, tallies, metrics),
        priority: route.priority,
        metrics: metrics.route(&route.name),
        request_timeout: route.request_timeout,
        backend_timeout: route.backend_timeout,
        tunnel_idle: route.tunnel_idle,
        failover: route.failover,
        rescue: Arc::clone(&route.rescue),
        stream_deadline: route.stream_deadline,
        tells_clients: targets
            .iter()
            .any(|target| target.backend.transport.proxy_protocol.is_some()),
        expose_version: route.expose_version,
        debug_clients: Arc::clone(&route.gray.debug_clients),
        targets,
    }
}

fn compile_rate_limits(
    route: &config::Route,
    tallies: &mut Tallies,
    metrics: &Metrics,
) -> Vec<RateLimit> {
    let limits = route.rate_limits.iter();
    let compiled = limits.map(|(settings, mode)| RateLimit {
        settings: settings.clone(),
        mode: *mode,
        counts: tallies.get_or_create(&route.name, settings),
        limited: metrics.rate_limited(&route.name, &settings.name, *mode),
        displaced: metrics.rate_limit_keys_displaced(&route.name, &settings.name),
    });
    compiled.collect()
}

/// The headers that nobody may repeat or take away: an endpoint must read the same of them as was read
/// here.
fn guarded_headers(route: &config::Route, gray: &Gray) -> Vec<HeaderName> {
    let mut guarded = gray.guarded_headers();
    let limits = route.rate_limits.iter();
    let counted = limits.filter_map(|(settings, _)| match &settings.by {
        By::Header(name) => Some(name.clone()),
        By::Client | By::User | By::Everyone => None,
    });
    for name in counted {
        if name != COOKIE && !guarded.contains(&name) {
            guarded.push(name);
        }
    }
    guarded
}

fn guarded_trailers(
    route: &config::Route,
    gray: &Gray,
    targets: &[RouteTarget],
) -> Vec<HeaderName> {
    let edits = targets.iter().map(|target| &target.backend.request_headers);
    let edits = edits.chain([&route.filters.request_headers]);
    let mut guarded = guarded_headers(route, gray);
    guarded.extend(edits.flat_map(HeaderEdits::names).cloned());
    guarded
}

/// The weights of a route's targets, in their order.
fn weights(
    route: &config::Route,
    targets: &[RouteTarget],
    runtime: &RuntimeWeights,
) -> Vec<Weight> {
    let set = runtime.of(&route.name);
    let of_file = route.targets.iter().map(|target| target.weight);
    let both = targets.iter().zip(of_file);
    both.map(|(target, of_file)| {
        let set = set.and_then(|set| set.weights.get(&target.backend.name));
        set.copied().unwrap_or(of_file)
    })
    .collect()
}

fn compile_target(
    route: &config::Route,
    backend: &Arc<Backend>,
    is_baseline: bool,
    metrics: &Metrics,
) -> RouteTarget {
    let labels = TargetLabels {
        route: Arc::clone(&route.name),
        backend: Arc::clone(&backend.name),
        version: Arc::clone(&backend.version),
    };
    RouteTarget {
        backend: Arc::clone(backend),
        version: HeaderValue::from_str(&backend.version).unwrap_or(HeaderValue::from_static("")),
        metrics: metrics.target(&labels),
        panic_threshold: if is_baseline {
            backend.panic_threshold
        } else {
            NEVER
        },
    }
}

fn compile_gray(
    route: &config::Route,
    targets: &[RouteTarget],
    weights: &[Weight],
    lists: &[Arc<UserList>],
) -> Gray {
    let gray = &route.gray;
    let list = |index: usize| Arc::clone(&lists[index]);
    let deny = gray.deny_list.map(|index| Step::DenyList(list(index)));
    let wish = gray.client_override.as_ref().map(|(header, cookie)| {
        Step::Override(Override {
            header: header.clone(),
            cookie: cookie.clone(),
            names: override_names(targets),
        })
    });
    let rules = gray.rules.iter().map(|rule| {
        Step::Rule(Rule {
            name: Arc::clone(&rule.name),
            target: rule.target,
            user_list: rule.user_list.map(list),
            conditions: Arc::clone(&rule.conditions),
        })
    });
    let weights = targets
        .iter()
        .zip(weights)
        .map(|(target, weight)| (&*target.backend.name, *weight));
    Gray::new(
        Arc::clone(&gray.identity),
        gray.trusted_only,
        gray.without_identity,
        deny.into_iter().chain(wish).chain(rules).collect(),
        Split::new(&gray.salt, weights),
    )
}

/// What a client may call the targets: their names, and, where no name is in the way, their
/// versions.
fn override_names(targets: &[RouteTarget]) -> Vec<(String, usize)> {
    let name =
        |(position, target): (usize, &RouteTarget)| (target.backend.name.to_string(), position);
    let version =
        |(position, target): (usize, &RouteTarget)| (target.backend.version.to_string(), position);
    let names = targets.iter().enumerate().map(name);
    names
        .chain(targets.iter().enumerate().map(version))
        .filter(|(name, _)| !name.is_empty())
        .collect()
}

/// A response that depends on who asks must not be cached for everybody (RFC 9110 section 12.5.5).
fn vary(route: &config::Route, gray: &Gray) -> Option<HeaderValue> {
    let names = match &route.gray.vary {
        Some(names) => names.clone(),
        None if route.targets.len() > 1 => gray.headers_read(),
        None => Vec::new(),
    };
    let names: Vec<&str> = names.iter().map(HeaderName::as_str).collect();
    (!names.is_empty())
        .then(|| HeaderValue::from_str(&names.join(", ")).ok())
        .flatten()
}

// === impl Snapshot ===

impl Snapshot {
    /// The route that takes this request, and how much of the path its match has taken, in bytes.
    pub fn find(&self, head: &RequestHead<'_>) -> Option<(&Arc<Route>, usize)> {
        let found = self.table.find(head)?;
        Some((&self.routes[found.route], found.matched))
    }

    /// The route of this name.
    pub fn route(&self, name: &str) -> Option<&Arc<Route>> {
        let position = *self.routes_by_name.get(name)?;
        self.routes.get(position)
    }

    /// The backend of this name.
    pub fn backend(&self, name: &str) -> Option<&Arc<Backend>> {
        let position = *self.backends_by_name.get(name)?;
        self.backends.get(position)
    }

    /// The listener that is bound to this address; `None` once it is gone.
    pub fn listener(&self, bound: SocketAddr) -> Option<&Listener> {
        let listeners = self.listeners.iter().chain(&self.draining_listeners);
        listeners
            .into_iter()
            .find(|listener| listener.settings.address == bound)
    }

    /// How to connect to an endpoint; `None` when it is part of no backend any longer.
    pub fn connection_policy(&self, endpoint: EndpointId) -> Option<ConnectionPolicy> {
        let backend = self.backend_of(endpoint)?;
        Some(backend.connections)
    }

    /// The backend of an endpoint; `None` when it is part of none any longer.
    pub fn backend_of(&self, endpoint: EndpointId) -> Option<&Arc<Backend>> {
        self.homes.get(&endpoint)
    }
}

// === impl Route ===

impl Route {
    /// Decides which target gets a request. `trusted` says that a trusted proxy sent it.
    pub fn decide<'a>(
        &'a self,
        head: &RequestHead<'a>,
        trusted: bool,
        now: Instant,
        dice: Dice<'_>,
    ) -> (Decision<'a>, Option<FailedOver>) {
        let mut decision = self.gray.decide(head, trusted, dice);
        let failed_over = self.fail_over(&mut decision, now, dice);
        (decision, failed_over)
    }

    /// Sends those to another target whose own takes no requests, and only them.
    pub fn fail_over(
        &self,
        decision: &mut Decision<'_>,
        now: Instant,
        dice: Dice<'_>,
    ) -> Option<FailedOver> {
        let from = decision.target;
        let cause = self.unavailability(decision, now, dice)?;
        let to = match from {
            BASELINE => self.failover.from_baseline,
            _ => self.failover.to_baseline.then_some(BASELINE),
        };
        // From bad to worse helps nobody, but the baseline is where everybody belongs.
        let is_forced = |to: &Target| *to == BASELINE && cause != Unavailability::SlowStart;
        let is_better = |to: &Target| is_forced(to) || self.targets[*to].is_available();
        decision.target = to.filter(is_better)?;
        decision.reason = Reason::Failover;
        Some(FailedOver { from, cause })
    }

    /// Why a request should not go where it was decided to go; `None` if it should.
    fn unavailability(
        &self,
        decision: &Decision<'_>,
        now: Instant,
        dice: Dice<'_>,
    ) -> Option<Unavailability> {
        let backend = &self.targets[decision.target].backend;
        // Also of a baseline that could go on with endpoints that are not well.
        let cause = backend.unavailability(NEVER);
        cause.or_else(|| {
            // There is nobody else who could take the rest of a baseline's, and who asks for a version
            // wants to see that one.
            if decision.target == BASELINE || decision.reason == Reason::Override {
                return None;
            }
            let part = backend.part(now);
            let is_early = part < 1.0 && part <= turn(decision, dice);
            is_early.then_some(Unavailability::SlowStart)
        })
    }
}

/// When a request comes back to a target in slow start, as the part that the target then has: that of a
/// user is always the same, so that he moves once.
fn turn(decision: &Decision<'_>, dice: Dice<'_>) -> f64 {
    let identity = decision.identity.as_ref();
    let die = match identity {
        Some(identity) => xxh3_64_with_seed(identity.value.as_bytes(), TURNS),
        None => dice(),
    };
    die as f64 / u64::MAX as f64
}

// === impl RouteTarget ===

impl RouteTarget {
    /// True when it can take requests of this route at all.
    pub fn is_available(&self) -> bool {
        let threshold = self.panic_threshold;
        self.backend.unavailability(threshold).is_none()
    }

    /// Chooses an endpoint for one request of this route; see [`Backend::choose`].
    pub fn choose(&self, die: u64, now: Instant, failed: &[EndpointId]) -> Option<&Arc<Endpoint>> {
        let threshold = self.panic_threshold;
        self.backend.choose(threshold, die, now, failed)
    }
}

// === impl Live ===

impl Live {
    /// Hangs up the first snapshot.
    pub fn new(first: Snapshot) -> Arc<Self> {
        let published = watch::Sender::new(first.revision);
        Arc::new(Self {
            current: ArcSwap::from_pointee(first),
            published,
        })
    }

    /// Replaces the current snapshot, and returns the one before. Only
    /// [`control`](crate::control) may call this.
    pub fn publish(&self, snapshot: Snapshot) -> Arc<Snapshot> {
        let revision = snapshot.revision;
        let before = self.current.swap(Arc::new(snapshot));
        self.published.send_replace(revision);
        before
    }

    /// The current snapshot.
    pub fn load(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Tells when there is a new one.
    pub fn subscribe(&self) -> watch::Receiver<Revision> {
        self.published.subscribe()
    }
}

// === impl Reader ===

impl Reader {
    /// A view for the thread that calls.
    pub fn new(live: Arc<Live>) -> Self {
        let first = Held::follow(live.load(), None);
        Self {
            live,
            held: RefCell::new(Rc::new(first)),
        }
    }

    /// The current snapshot, held on to for as long as the caller likes.
    pub fn current(&self) -> Rc<Held> {
        let mut held = self.held.borrow_mut();
        let now = self.live.current.load();
        if !std::ptr::eq(Arc::as_ptr(&now), Arc::as_ptr(&held.snapshot)) {
            *held = Rc::new(Held::follow(Arc::clone(&now), Some(&held)));
        }
        Rc::clone(&held)
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

impl Held {
    fn follow(snapshot: Arc<Snapshot>, before: Option<&Self>) -> Self {
        let log = before.and_then(|before| before.access_log.as_ref());
        let access_log = WorkerLog::follow(log, snapshot.access_log.as_ref());
        let tracer = before.and_then(|before| before.tracer.as_ref());
        let tracer = WorkerTracer::follow(tracer, snapshot.tracer.as_ref());
        Self {
            snapshot,
            access_log,
            tracer,
        }
    }

    /// The worker's end of the access log.
    pub fn access_log(&self) -> Option<&Rc<WorkerLog>> {
        self.access_log.as_ref()
    }

    /// The worker's tracer.
    pub fn tracer(&self) -> Option<&Rc<WorkerTracer>> {
        self.tracer.as_ref()
    }
}

impl std::ops::Deref for Held {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.snapshot
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Held")
            .field(&self.snapshot.revision)
            .finish()
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
