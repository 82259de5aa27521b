//! The connections of one worker to the endpoints.
//!
//! Every worker has its own, so nothing here is shared between threads or locked. A connection is
//! driven by a task of its own. In HTTP/1.1 it is handed from exchange to exchange; idle ones are
//! kept newest on top, so that in quiet times the rest grows old and closes. In HTTP/2 many
//! exchanges have it at once. hyper-util's pooled client is not used: it takes the authority from
//! the dialled address, holds one HTTP/2 connection per host, and costs more.

mod connect;
mod early;
pub mod probe;
mod room;
mod shape;
mod shared;
mod shortage;

use std::cell::RefCell;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::SendRequest;
use pin_project_lite::pin_project;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::backend::{Backend, ConnectionPolicy, Endpoint, EndpointId, UpstreamProtocol};
use crate::snapshot::Snapshot;
use crate::telemetry::metrics::{Level, Metrics};

use connect::{Connected, Dial, connect};
use room::{Place, Room};
use shared::{Claim, Opening, Shared};
pub use shortage::{Shortage, is_exhaustion, lacks_ports};

/// The connections of one worker.
#[derive(Debug)]
pub struct Pools<B> {
    pools: RefCell<HashMap<EndpointId, Pool<B>>>,
    /// How many connections there are to the endpoints of each backend.
    rooms: RefCell<HashMap<Arc<str>, Rc<Room>>>,
    metrics: Arc<Metrics>,
    shortage: Shortage,
}

/// The connections to one endpoint.
#[derive(Debug)]
struct Pool<B> {
    policy: ConnectionPolicy,
    /// With which settings they were made.
    fingerprint: u64,
    /// Those of HTTP/1.1 that nobody uses.
    idle: Vec<Idle<B>>,
    /// Those of HTTP/2.
    shared: Vec<Rc<Shared<B>>>,
    /// Another one of HTTP/2 that is being made.
    opening: Option<Rc<Opening>>,
    /// How many connections there are to the backend; kept here so that a new one finds it without
    /// a look-up.
    level: Arc<Level>,
    /// The same for this worker alone.
    room: Rc<Room>,
}

#[derive(Debug)]
struct Idle<B> {
    connection: Dedicated<B>,
    since: Instant,
}

/// A connection of HTTP/1.1: the way to hand requests to its task, and to end that.
#[derive(Debug)]
struct Dedicated<B> {
    sender: SendRequest<B>,
    task: AbortHandle,
    /// It has brought a response.
    has_served: bool,
}

/// What carries one request.
#[derive(Debug)]
enum Connection<B> {
    Http1(Dedicated<B>),
    Http2(Claim<B>),
}

/// What a request needs of its connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Needs {
    /// The client takes trailers: an endpoint that speaks HTTP/2 is told so.
    pub trailers: bool,
    /// It asks for a tunnel.
    pub tunnel: bool,
    /// No connection of HTTP/1.1 that has been idle will do.
    pub fresh: bool,
}

/// Who the client is and where it has connected to, for endpoints that want to be told so for the
/// whole connection.
pub type Addresses = (SocketAddr, SocketAddr);

/// How long a request may go on when its response has ended: so that a client which is sent an early
/// refusal can read it, and one that sends nothing more does not hold on to a connection for ever.
const REQUEST_LINGER: Duration = Duration::from_secs(5);

/// A connection in use: to be given back when its response has been read to the end. Dropped, one
/// of HTTP/1.1 is closed.
#[derive(Debug)]
pub struct Loan<B> {
    pools: Rc<Pools<B>>,
    endpoint: EndpointId,
    /// With which settings it was made; `None` for a connection that is not used again.
    fingerprint: Option<u64>,
    connection: Connection<B>,
}

/// The head of a response, with the connection that its body comes over.
type Sent<B> = Result<(Response<Incoming>, Loan<B>), SendError>;

/// A response, or why there is none.
type Exchanged<B> = Result<(Response<Incoming>, Loan<B>), Broken<B>>;

/// A connection broke, or refused the request.
enum Broken<B> {
    /// Not a byte of it was written: here it is back.
    Untouched(hyper::Error, Box<Request<B>>),
    /// It may have been.
    Sent(SendError),
}

/// Why there is no response.
#[derive(Debug)]
pub enum SendError {
    /// No connection could be made.
    Connect(std::io::Error),
    /// The connection did not stand in time.
    ConnectTimeout,
    /// The connection broke, or what came over it was no HTTP.
    Exchange(hyper::Error),
    /// A connection of HTTP/1.1 that has served others closed instead of an answer: most likely as it had
    /// been idle for long, just when the request was sent.
    Stale(hyper::Error),
    /// The endpoint has not begun with the request: it closed the new connection that was made for it,
    /// or takes none over that.
    Unsent(hyper::Error),
    /// It has not either, on a connection over which it has answered others: that is at its end, or has
    /// too many of them.
    Refused(hyper::Error),
    /// The backend has as many connections as it may have, and none became free in time.
    Crowded,
    /// The endpoint speaks HTTP/2 alone, and takes no extended CONNECT (RFC 8441 section 3).
    NoTunnel,
}

pin_project! {
    #[project = EitherProjection]
    enum Either<A, B> {
        One { #[pin] one: A },
        Other { #[pin] other: B },
    }
}

/// Where a request goes.
#[derive(Clone, Copy, Debug)]
struct To<'t> {
    backend: &'t Backend,
    endpoint: &'t Endpoint,
    needs: Needs,
    /// `None` as long as no connection is made.
    addresses: Option<&'t Addresses>,
}

/// Makes a shared connection; dropped, whoever waits for it goes on.
struct Opener<B> {
    pools: Rc<Pools<B>>,
    endpoint: EndpointId,
    opening: Rc<Opening>,
}

// === impl SendError ===

impl SendError {
    /// True when nothing was sent for what this machine lacks: that says nothing of the endpoint.
    pub fn is_own_shortage(&self) -> bool {
        matches!(self, Self::Connect(error) if is_exhaustion(error))
    }
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => write!(f, "cannot connect: {error}"),
            Self::ConnectTimeout => f.write_str("the connection did not stand in time"),
            Self::Exchange(error)
            | Self::Stale(error)
            | Self::Unsent(error)
            | Self::Refused(error) => write!(f, "{error}"),
            Self::Crowded => f.write_str("no connection became free in time"),
            Self::NoTunnel => f.write_str("the endpoint takes no extended CONNECT"),
        }
    }
}

// === impl Pools ===

impl<B> Pools<B>
where
    B: Body + Unpin + 'static,
    B::Data: Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// No connections yet.
    pub fn new(metrics: Arc<Metrics>, shortage: Shortage) -> Rc<Self> {
        Rc::new(Self {
            pools: RefCell::default(),
            rooms: RefCell::default(),
            metrics,
            shortage,
        })
    }

    /// Sends a request to `endpoint` of `backend` and waits for the head of the response.
    ///
    /// A connection that turns out dead before a byte of the request was written is passed over:
    /// that is no failure, and safe for any method.
    ///
    /// # Errors
    ///
    /// See [`SendError`].
    pub fn send<'s>(
        self: &'s Rc<Self>,
        backend: &'s Backend,
        endpoint: &'s Endpoint,
        request: Request<B>,
        needs: Needs,
        addresses: Option<Box<Addresses>>,
    ) -> Pin<Box<impl Future<Output = Sent<B>> + 's>> {
        let to = To {
            backend,
            endpoint,
            needs,
            addresses: None,
        };
        let begun = match self.take(to).filter(|one| one.takes(needs)) {
            Some(connection) => Ok(self.exchange(to, connection, request)),
            None => Err(Box::new(request)),
        };
        Box::pin(async move {
            let request = match begun {
                Ok(exchange) => match exchange.await {
                    Ok(answer) => return Ok(answer),
                    Err(Broken::Sent(error)) => return Err(error),
                    Err(Broken::Untouched(_, request)) => request,
                },
                Err(request) => request,
            };
            // Boxed, or every request would take the room that making a connection needs.
            let to = To {
                addresses: addresses.as_deref(),
                ..to
            };
            Box::pin(self.send_anew(to, *request)).await
        })
    }

    async fn send_anew(self: &Rc<Self>, to: To<'_>, mut request: Request<B>) -> Sent<B> {
        let patience = tokio::time::Instant::now() + to.backend.gate_limits.queue_timeout;
        let place = loop {
            while let Some(connection) = self.take(to) {
                if !connection.takes(to.needs) {
                    return Err(SendError::NoTunnel);
                }
                match self.exchange(to, connection, request).await {
                    Ok(answer) => return Ok(answer),
                    Err(Broken::Untouched(_, unsent)) => request = *unsent,
                    Err(Broken::Sent(error)) => return Err(error),
                }
            }
            if let Some(opening) = self.opening(to) {
                opening.wait().await?;
                continue;
            }
            let room = self.room(to.backend);
            if let Some(place) = room.take(self.most(to.backend)) {
                break place;
            }
            // One that rests is of use to nobody else.
            self.close_idle(&room);
            if !room.wait(patience).await {
                return Err(SendError::Crowded);
            }
        };
        let connection = self.connect(to, place).await?;
        if !connection.takes(to.needs) {
            return Err(SendError::NoTunnel);
        }
        let answer = self.exchange(to, connection, request).await;
        answer.map_err(|broken| match broken {
            Broken::Untouched(error, _) => SendError::Unsent(error),
            Broken::Sent(error) => error,
        })
    }

    /// Closes connections that have been idle for too long, and those to endpoints that are gone.
    pub fn sweep(&self, snapshot: &Snapshot, now: Instant) {
        self.pools.borrow_mut().retain(|endpoint, pool| {
            let Some(policy) = snapshot.connection_policy(*endpoint) else {
                return false;
            };
            pool.policy = policy;
            pool.idle.retain(|idle| {
                !idle.connection.sender.is_closed()
                    && now.duration_since(idle.since) < policy.idle_timeout
            });
            let then = now.checked_sub(policy.idle_timeout);
            pool.shared.retain(|shared| !shared.is_unused_since(then));
            true
        });
        self.rooms
            .borrow_mut()
            .retain(|_, room| Rc::strong_count(room) > 1);
    }

    /// Hands a request to the connection at once; what is left to wait for has no room for it.
    fn exchange(
        self: &Rc<Self>,
        to: To<'_>,
        mut connection: Connection<B>,
        mut request: Request<B>,
    ) -> impl Future<Output = Exchanged<B>> {
        let sent = match &mut connection {
            Connection::Http1(dedicated) => {
                shape::http1(&mut request);
                Either::One {
                    one: dedicated.sender.try_send_request(request),
                }
            }
            Connection::Http2(claim) => {
                shape::http2(
                    &mut request,
                    &to.endpoint.authority,
                    to.backend.transport.tls.is_some(),
                    to.needs,
                );
                Either::Other {
                    other: claim.sender().try_send_request(request),
                }
            }
        };
        let endpoint = to.endpoint.id;
        let fingerprint = to.is_pooled().then_some(to.backend.transport.fingerprint);
        async move {
            match sent.await {
                Ok(response) => {
                    connection.serves();
                    let loan = Loan {
                        pools: Rc::clone(self),
                        endpoint,
                        fingerprint,
                        connection,
                    };
                    Ok((response, loan))
                }
                Err(mut error) => Err(match error.take_message() {
                    Some(request) => Broken::Untouched(error.into_error(), Box::new(request)),
                    None => Broken::Sent(connection.broken_by(error.into_error())),
                }),
            }
        }
    }

    /// A connection that stands and has room.
    fn take(&self, to: To<'_>) -> Option<Connection<B>> {
        if !to.is_pooled() {
            return None;
        }
        let mut pools = self.pools.borrow_mut();
        let pool = pools.get_mut(&to.endpoint.id)?;
        pool.keep_to(to.backend);
        if !to.needs_http1()
            && let Some(claim) = pool.shared.iter().find_map(Shared::claim)
        {
            return Some(Connection::Http2(claim));
        }
        if to.needs.fresh {
            return None;
        }
        std::iter::from_fn(|| pool.idle.pop())
            .map(|idle| idle.connection)
            .find(|connection| connection.sender.is_ready())
            .map(Connection::Http1)
    }

    /// The connection that is being made and that the request can wait for.
    fn opening(&self, to: To<'_>) -> Option<Rc<Opening>> {
        if to.needs_http1() {
            return None;
        }
        let pools = self.pools.borrow();
        pools.get(&to.endpoint.id)?.opening.clone()
    }

    /// How many connections this worker has to a backend.
    fn room(&self, backend: &Backend) -> Rc<Room> {
        let mut rooms = self.rooms.borrow_mut();
        Rc::clone(rooms.entry(Arc::clone(&backend.name)).or_default())
    }

    /// How many it may have: its part, but at least one.
    fn most(&self, backend: &Backend) -> usize {
        let most = backend.connections.most;
        most.map_or(usize::MAX, |most| (most / self.metrics.workers()).max(1))
    }

    /// Closes the connection that has rested for longest among those in a room, if one does.
    fn close_idle(&self, room: &Rc<Room>) {
        let mut pools = self.pools.borrow_mut();
        let resting = pools
            .values_mut()
            .filter(|pool| Rc::ptr_eq(&pool.room, room) && !pool.idle.is_empty());
        if let Some(pool) = resting.min_by_key(|pool| pool.idle[0].since) {
            pool.idle.remove(0).connection.task.abort();
        }
    }

    async fn connect(
        self: &Rc<Self>,
        to: To<'_>,
        place: Place,
    ) -> Result<Connection<B>, SendError> {
        let (level, opening) = self.begin_opening(to);
        let room = Rc::clone(place.room());
        let connected = connect(to.dial(), (level.up(), Some(place))).await;
        // Its place has just become free.
        let again = async || connect(to.dial(), (level.up(), room.take(usize::MAX))).await;
        let connected = self.shortage.retry(connected, again).await;
        if let (Some(opening), Err(error)) = (&opening, &connected) {
            opening.opening.fail(error);
        }
        match connected? {
            Connected::Http1(dedicated) => Ok(Connection::Http1(dedicated)),
            Connected::Http2(shared) => {
                let claim = shared.claim();
                // Meanwhile connections may have to be made with other settings.
                if to.is_pooled()
                    && let Some(pool) = self.pools.borrow_mut().get_mut(&to.endpoint.id)
                    && pool.fingerprint == to.backend.transport.fingerprint
                {
                    pool.shared.push(shared);
                }
                // It has just been made.
                let closed = || std::io::ErrorKind::ConnectionAborted.into();
                claim
                    .map(Connection::Http2)
                    .ok_or_else(|| SendError::Connect(closed()))
            }
        }
    }

    fn begin_opening(self: &Rc<Self>, to: To<'_>) -> (Arc<Level>, Option<Opener<B>>) {
        let room = self.room(to.backend);
        let mut pools = self.pools.borrow_mut();
        let pool = pools.entry(to.endpoint.id).or_insert_with(|| Pool {
            room,
            policy: to.backend.connections,
            fingerprint: to.backend.transport.fingerprint,
            idle: Vec::new(),
            shared: Vec::new(),
            opening: None,
            level: self.metrics.level(
                "serin_upstream_connections",
                &[("backend", &to.backend.name)],
            ),
        });
        let is_shared = match to.backend.transport.protocol {
            UpstreamProtocol::Http1 => false,
            UpstreamProtocol::Http2 => true,
            // Most likely it will agree on what it has agreed on before.
            UpstreamProtocol::Negotiated => !pool.shared.is_empty(),
        };
        let opener = (is_shared && to.is_pooled() && !to.needs_http1()).then(|| {
            let opening = Rc::new(Opening::default());
            pool.opening = Some(Rc::clone(&opening));
            Opener {
                pools: Rc::clone(self),
                endpoint: to.endpoint.id,
                opening,
            }
        });
        (Arc::clone(&pool.level), opener)
    }

    /// Closes all connections of HTTP/1.1 that nobody uses.
    pub fn let_go(&self) {
        let mut pools = self.pools.borrow_mut();
        pools.values_mut().for_each(|pool| pool.idle.clear());
    }

    /// Keeps a connection for later, unless there are enough, its endpoint is gone, or connections
    /// to it are made with other settings by now.
    fn keep(&self, endpoint: EndpointId, fingerprint: u64, connection: Dedicated<B>) {
        if let Some(pool) = self.pools.borrow_mut().get_mut(&endpoint)
            && pool.fingerprint == fingerprint
            && pool.idle.len() < pool.policy.max_idle
        {
            pool.idle.push(Idle {
                connection,
                since: Instant::now(),
            });
            pool.room.tell();
        }
    }
}

// === impl To ===

impl<'t> To<'t> {
    fn dial(&self) -> Dial<'t> {
        Dial {
            endpoint: self.endpoint,
            transport: &self.backend.transport,
            timeout: self.backend.connections.connect_timeout,
            needs: self.needs,
            addresses: self.addresses,
        }
    }

    fn needs_http1(&self) -> bool {
        self.dial().needs_http1()
    }

    /// False where a connection is told who its client is, and so is for that one alone.
    fn is_pooled(&self) -> bool {
        self.backend.transport.proxy_protocol.is_none()
    }
}

// === impl Pool ===

impl<B> Pool<B> {
    /// Lets go of connections that were made with other settings than the backend has now; those in
    /// use end with their requests.
    fn keep_to(&mut self, backend: &Backend) {
        let fingerprint = backend.transport.fingerprint;
        if self.fingerprint != fingerprint {
            self.fingerprint = fingerprint;
            self.idle.clear();
            self.shared.clear();
            self.opening = None;
        }
    }
}

// === impl Opener ===

impl<B> Drop for Opener<B> {
    fn drop(&mut self) {
        if let Some(pool) = self.pools.pools.borrow_mut().get_mut(&self.endpoint) {
            pool.opening
                .take_if(|opening| Rc::ptr_eq(opening, &self.opening));
        }
        self.opening.end();
    }
}

// === impl Loan ===

impl<B> Loan<B>
where
    B: Body + Unpin + 'static,
    B::Data: Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Ends the sending of a request whose response is for nobody. In HTTP/2 that cannot be done, but
    /// endpoints do it that answer early (RFC 9113 section 8.1).
    pub fn interrupt(&self) {
        if let Connection::Http1(connection) = &self.connection {
            connection.task.abort();
        }
    }

    /// Gives the connection back; its response has been read to the end.
    pub fn give_back(self) {
        let Self {
            pools,
            endpoint,
            fingerprint,
            connection,
        } = self;
        let Connection::Http1(mut connection) = connection else {
            return;
        };
        let Some(fingerprint) = fingerprint else {
            return;
        };
        if connection.sender.is_ready() {
            pools.keep(endpoint, fingerprint, connection);
        } else if !connection.sender.is_closed() {
            // The response came before the end of the request, or hyper has not yet seen its end.
            tokio::task::spawn_local(async move {
                match timeout(REQUEST_LINGER, connection.sender.ready()).await {
                    Ok(Ok(())) => pools.keep(endpoint, fingerprint, connection),
                    Ok(Err(_)) => {}
                    Err(_) => connection.task.abort(),
                }
            });
        }
    }
}

// === impl Connection ===

impl<B> Connection<B> {
    /// True when a request with these needs can go over it.
    fn takes(&self, needs: Needs) -> bool {
        match self {
            Self::Http1(_) => true,
            Self::Http2(claim) => !needs.tunnel || claim.takes_tunnels(),
        }
    }

    /// It has brought a response.
    fn serves(&mut self) {
        match self {
            Self::Http1(dedicated) => dedicated.has_served = true,
            Self::Http2(claim) => claim.serves(),
        }
    }

    /// What an error means that came over it.
    fn broken_by(&self, error: hyper::Error) -> SendError {
        let (claim, refusal) = match (self, Refusal::of(&error)) {
            (Self::Http2(claim), Some(refusal)) => (claim, refusal),
            (Self::Http1(dedicated), _) if dedicated.has_served && is_end(&error) => {
                return SendError::Stale(error);
            }
            _ => return SendError::Exchange(error),
        };
        let is_usual = match refusal {
            // It has too many at a time.
            Refusal::Request => claim.is_serving(),
            // It has come to its end.
            Refusal::Connection => claim.has_served(),
        };
        if is_usual {
            SendError::Refused(error)
        } else {
            SendError::Unsent(error)
        }
    }
}

/// True when a connection ended where a response should have begun.
fn is_end(error: &hyper::Error) -> bool {
    let cause = std::error::Error::source(error);
    let cause = cause.and_then(|cause| cause.downcast_ref::<std::io::Error>());
    let is_reset = cause.is_some_and(|cause| {
        use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
        matches!(
            cause.kind(),
            BrokenPipe | ConnectionAborted | ConnectionReset
        )
    });
    error.is_incomplete_message() || error.is_closed() || is_reset
}

/// How an endpoint of HTTP/2 says that it has not begun with a request.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    /// It has refused this one (RFC 9113 section 8.7).
    Request,
    /// It has taken its leave before this one came (section 6.8).
    Connection,
}

// === impl Refusal ===

impl Refusal {
    fn of(error: &hyper::Error) -> Option<Self> {
        let cause = std::error::Error::source(error)?.downcast_ref::<h2::Error>()?;
        match cause.reason() {
            _ if !cause.is_remote() => None,
            Some(h2::Reason::REFUSED_STREAM) if cause.is_reset() => Some(Self::Request),
            Some(h2::Reason::NO_ERROR) if cause.is_go_away() => Some(Self::Connection),
            _ => None,
        }
    }
}

// === impl Either ===

impl<A: Future, B: Future<Output = A::Output>> Future for Either<A, B> {
    type Output = A::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<A::Output> {
        match self.project() {
            EitherProjection::One { one } => one.poll(cx),
            EitherProjection::Other { other } => other.poll(cx),
        }
    }
}
