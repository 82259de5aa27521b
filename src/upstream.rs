//! The connections of one worker to the endpoints.
//!
//! Every worker has its own, so nothing here is shared or locked. A connection is driven by a task
//! of its own and handed from exchange to exchange; idle ones are kept newest on top, so that in
//! quiet times the rest grows old and closes. hyper-util's pooled client is not used: it takes the
//! authority from the dialled address, and costs more.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::stream::Stream;
use hashbrown::HashMap;
use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tracing::debug;

use crate::backend::{Backend, ConnectionPolicy, Endpoint, EndpointId};
use crate::snapshot::Snapshot;
use crate::telemetry::metrics::{Level, Metrics};

/// The connections of one worker.
#[derive(Debug)]
pub struct Pools<B> {
    idle: RefCell<HashMap<EndpointId, Pool<B>>>,
    metrics: Arc<Metrics>,
}

/// The idle connections to one endpoint.
#[derive(Debug)]
struct Pool<B> {
    policy: ConnectionPolicy,
    connections: Vec<Idle<B>>,
    /// How many connections there are to the backend; kept here so that a new one finds it without
    /// a look-up.
    level: Arc<Level>,
}

#[derive(Debug)]
struct Idle<B> {
    connection: Connection<B>,
    since: Instant,
}

/// A connection: the way to hand requests to its task, and to end that.
#[derive(Debug)]
struct Connection<B> {
    sender: SendRequest<B>,
    task: AbortHandle,
}

/// How long a request may go on when its response has ended: so that a client which is sent an early
/// refusal can read it, and one that sends nothing more does not hold on to a connection for ever.
const REQUEST_LINGER: Duration = Duration::from_secs(5);

/// A connection in use: to be given back when its response has been read to the end, and closed if
/// it is dropped.
#[derive(Debug)]
pub struct Loan<B> {
    pools: Rc<Pools<B>>,
    endpoint: EndpointId,
    connection: Connection<B>,
}

/// The head of a response, with the connection that its body comes over.
type Sent<B> = Result<(Response<Incoming>, Loan<B>), SendError>;

/// A response, or why there is none, with the request if not a byte of it was written.
type Exchanged<B> = Result<(Response<Incoming>, Loan<B>), (hyper::Error, Option<Box<Request<B>>>)>;

/// Why there is no response.
#[derive(Debug)]
pub enum SendError {
    /// No connection could be made.
    Connect(std::io::Error),
    /// The connection did not stand in time.
    ConnectTimeout,
    /// The connection broke, or what came over it was no HTTP.
    Exchange(hyper::Error),
}

// === impl Pools ===

impl<B> Pools<B>
where
    B: Body + 'static,
    B::Data: Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// No connections yet.
    pub fn new(metrics: Arc<Metrics>) -> Rc<Self> {
        Rc::new(Self {
            idle: RefCell::default(),
            metrics,
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
    ) -> Pin<Box<impl Future<Output = Sent<B>> + 's>> {
        let begun = match self.take_idle(endpoint.id) {
            Some(connection) => Ok(self.exchange(endpoint.id, connection, request)),
            None => Err(Box::new(request)),
        };
        Box::pin(async move {
            let unsent = match begun {
                Ok(exchange) => match exchange.await {
                    Ok(answer) => return Ok(answer),
                    Err((error, None)) => return Err(SendError::Exchange(error)),
                    Err((_, Some(unsent))) => unsent,
                },
                Err(unsent) => unsent,
            };
            // Boxed, or every request would take the room that making a connection needs.
            Box::pin(self.send_anew(backend, endpoint, *unsent)).await
        })
    }

    async fn send_anew(
        self: &Rc<Self>,
        backend: &Backend,
        endpoint: &Endpoint,
        mut request: Request<B>,
    ) -> Sent<B> {
        while let Some(connection) = self.take_idle(endpoint.id) {
            match self.exchange(endpoint.id, connection, request).await {
                Ok(answer) => return Ok(answer),
                Err((_, Some(unsent))) => request = *unsent,
                Err((error, None)) => return Err(SendError::Exchange(error)),
            }
        }
        let connection = self.connect(backend, endpoint).await?;
        let answer = self.exchange(endpoint.id, connection, request).await;
        answer.map_err(|(error, _)| SendError::Exchange(error))
    }

    /// Closes connections that have been idle for too long, and those to endpoints that are gone.
    pub fn sweep(&self, snapshot: &Snapshot, now: Instant) {
        self.idle.borrow_mut().retain(|endpoint, pool| {
            let Some(policy) = snapshot.connection_policy(*endpoint) else {
                return false;
            };
            pool.policy = policy;
            pool.connections.retain(|idle| {
                !idle.connection.sender.is_closed()
                    && now.duration_since(idle.since) < policy.idle_timeout
            });
            true
        });
    }

    /// Hands a request to the connection at once; what is left to wait for has no room for it.
    fn exchange(
        self: &Rc<Self>,
        endpoint: EndpointId,
        mut connection: Connection<B>,
        request: Request<B>,
    ) -> impl Future<Output = Exchanged<B>> {
        let sent = connection.sender.try_send_request(request);
        async move {
            match sent.await {
                Ok(response) => Ok((
                    response,
                    Loan {
                        pools: Rc::clone(self),
                        endpoint,
                        connection,
                    },
                )),
                Err(mut error) => {
                    let unsent = error.take_message().map(Box::new);
                    Err((error.into_error(), unsent))
                }
            }
        }
    }

    fn take_idle(&self, endpoint: EndpointId) -> Option<Connection<B>> {
        let mut idle = self.idle.borrow_mut();
        let connections = &mut idle.get_mut(&endpoint)?.connections;
        std::iter::from_fn(|| connections.pop())
            .map(|idle| idle.connection)
            .find(|connection| connection.sender.is_ready())
    }

    async fn connect(
        &self,
        backend: &Backend,
        endpoint: &Endpoint,
    ) -> Result<Connection<B>, SendError> {
        let level = self.register(backend, endpoint.id);
        let stream = dial(endpoint, backend.connections.connect_timeout).await?;
        let (sender, driver) = http1::handshake::<_, B>(Stream::plain(stream))
            .await
            .map_err(SendError::Exchange)?;
        let up = level.up();
        let task = tokio::task::spawn_local(async move {
            let _up = up;
            if let Err(error) = driver.await {
                debug!(%error, "upstream connection ended");
            }
        });
        Ok(Connection {
            sender,
            task: task.abort_handle(),
        })
    }

    fn register(&self, backend: &Backend, endpoint: EndpointId) -> Arc<Level> {
        let mut idle = self.idle.borrow_mut();
        let pool = idle.entry(endpoint).or_insert_with(|| Pool {
            policy: backend.connections,
            connections: Vec::new(),
            level: self
                .metrics
                .level("serin_upstream_connections", &[("backend", &backend.name)]),
        });
        Arc::clone(&pool.level)
    }

    /// Keeps a connection for later, unless there are enough or its endpoint is gone.
    fn keep(&self, endpoint: EndpointId, connection: Connection<B>) {
        if let Some(pool) = self.idle.borrow_mut().get_mut(&endpoint)
            && pool.connections.len() < pool.policy.max_idle
        {
            pool.connections.push(Idle {
                connection,
                since: Instant::now(),
            });
        }
    }
}

// === impl Loan ===

impl<B> Loan<B>
where
    B: Body + 'static,
    B::Data: Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Gives the connection back; its response has been read to the end.
    pub fn give_back(self) {
        let Self {
            pools,
            endpoint,
            mut connection,
        } = self;
        if connection.sender.is_ready() {
            pools.keep(endpoint, connection);
        } else if !connection.sender.is_closed() {
            // The response came before the end of the request, or hyper has not yet seen its end.
            tokio::task::spawn_local(async move {
                match timeout(REQUEST_LINGER, connection.sender.ready()).await {
                    Ok(Ok(())) => pools.keep(endpoint, connection),
                    Ok(Err(_)) => {}
                    Err(_) => connection.task.abort(),
                }
            });
        }
    }
}

async fn dial(endpoint: &Endpoint, limit: Duration) -> Result<TcpStream, SendError> {
    let stream = timeout(limit, TcpStream::connect(endpoint.address))
        .await
        .map_err(|_| SendError::ConnectTimeout)?
        .map_err(SendError::Connect)?;
    stream.set_nodelay(true).map_err(SendError::Connect)?;
    Ok(stream)
}
