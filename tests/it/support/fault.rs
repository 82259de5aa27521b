//! A proxy for TCP that does to connections what networks and dying servers do.
//!
//! It stands between Serin and an upstream, or between a client and Serin, and what it does can be
//! changed at any time. It knows just enough of HTTP/1.1 to tell a request from its response, and
//! the head of a response from its body; requests that are pipelined it would mistake for one.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::port::HeldPort;

/// What is answered instead of a response; no version of HTTP begins like this.
pub(crate) const GARBAGE: &[u8] = b"\x16\x03\x00 520 what do you want?\n\n\x00\xff\xfe";

/// How long nothing is accepted after an error, such as a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

const CHUNK: usize = 16 * 1024;

/// What is done to connections.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    /// Everything passes as it is.
    Nothing,
    /// Nobody listens, and connections that stand are reset, as when a process has died.
    Refuse,
    /// Connections are reset (RST, not FIN).
    Reset(When),
    /// Connections are accepted, and whatever comes is swallowed. A connection that has swallowed
    /// something never speaks again, whatever the fault is afterwards.
    BlackHole,
    /// A request is answered by the end of the stream (FIN), while the other direction stays open.
    HalfClose,
    /// A request is answered with `GARBAGE`.
    Garbage,
    /// Everything passes, but not at once.
    Shape(Shape),
    /// A connection is closed (FIN) this long after the last byte of a response, to the
    /// millisecond.
    CloseIdle(Duration),
}

/// When a connection is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// As soon as it is accepted, and at once if it stands.
    Connect,
    /// When the response begins, of which nothing is passed on. The upstream has had the request.
    BeforeHead,
    /// After the head of the response.
    AfterHead,
    /// After this many bytes of the response's body.
    InBody(u64),
}

/// How bytes pass, in either direction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Shape {
    /// Before each chunk.
    pub(crate) latency: Duration,
    /// Added to the latency, between nothing and this.
    pub(crate) jitter: Duration,
    /// Bytes per second.
    pub(crate) bandwidth: Option<u64>,
    pub(crate) slices: Option<Slices>,
}

/// Writes of so many bytes at most, and a pause after each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slices {
    pub(crate) bytes: usize,
    pub(crate) pause: Duration,
}

/// What has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    /// Connections accepted.
    pub(crate) connections: usize,
    /// Bytes passed on to the upstream.
    pub(crate) up: u64,
    /// Bytes passed on to the client.
    pub(crate) down: u64,
}

/// A running proxy; it ends, with its connections, when it is dropped.
#[derive(Debug)]
pub(crate) struct FaultProxy {
    address: SocketAddr,
    commands: mpsc::UnboundedSender<Command>,
    state: Arc<State>,
}

// === impl FaultProxy ===

impl FaultProxy {
    /// Passes everything on to `target`.
    pub(crate) fn start(target: SocketAddr) -> io::Result<Self> {
        let port = HeldPort::new()?;
        let address = port.address();
        let state = Arc::new(State {
            targets: Mutex::new(vec![target]),
            ..State::default()
        });
        let (commands, receiver) = mpsc::unbounded_channel();
        let acceptor = Acceptor {
            listener: Some(TcpListener::from_std(port.listen()?)?),
            port,
            faults: watch::Sender::new(Fault::Nothing),
            state: Arc::clone(&state),
        };
        tokio::spawn(acceptor.run(receiver));
        Ok(Self {
            address,
            commands,
            state,
        })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Does this from now on: when it returns, the next byte and the next connection meet it.
    pub(crate) async fn set(&self, fault: Fault) -> io::Result<()> {
        let (done, outcome) = oneshot::channel();
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.commands.send(Command { fault, done }).map_err(gone)?;
        outcome.await.map_err(|_| io::ErrorKind::BrokenPipe)?
    }

    /// Connects to these from now on, in turn; with none of them, connections are reset. Connections
    /// that stand stay.
    pub(crate) fn point_at(&self, targets: &[SocketAddr]) {
        *lock(&self.state.targets) = targets.to_vec();
    }

    pub(crate) fn passed(&self) -> Passed {
        Passed {
            connections: self.state.connections.load(Ordering::SeqCst),
            up: self.state.up.load(Ordering::SeqCst),
            down: self.state.down.load(Ordering::SeqCst),
        }
    }
}

// === impl Shape ===

impl Shape {
    async fn pass(
        self,
        mut bytes: &[u8],
        to: &mut WriteHalf<'_>,
        dice: &mut fastrand::Rng,
    ) -> io::Result<()> {
        sleep(self.latency + self.jitter.mul_f64(dice.f64())).await;
        while !bytes.is_empty() {
            let slice = self.slices.map_or(bytes.len(), |slices| slices.bytes);
            let (now, later) = bytes.split_at(slice.clamp(1, bytes.len()));
            to.write_all(now).await?;
            bytes = later;
            sleep(self.pause_after(now.len())).await;
        }
        Ok(())
    }

    fn pause_after(self, bytes: usize) -> Duration {
        let rate = self.bandwidth.map_or(Duration::ZERO, |bandwidth| {
            Duration::from_secs_f64(bytes as f64 / bandwidth.max(1) as f64)
        });
        rate + self.slices.map_or(Duration::ZERO, |slices| slices.pause)
    }
}

struct Command {
    fault: Fault,
    done: oneshot::Sender<io::Result<()>>,
}

/// What the connections share.
#[derive(Debug, Default)]
struct State {
    targets: Mutex<Vec<SocketAddr>>,
    connections: AtomicUsize,
    up: AtomicU64,
    down: AtomicU64,
}

impl State {
    /// Where the connection with this number goes.
    fn target(&self, number: usize) -> Option<SocketAddr> {
        let targets = lock(&self.targets);
        let index = number.checked_rem(targets.len())?;
        Some(targets[index])
    }
}

/// Owns the listener.
struct Acceptor {
    port: HeldPort,
    /// `None` while connections are refused.
    listener: Option<TcpListener>,
    faults: watch::Sender<Fault>,
    state: Arc<State>,
}

impl Acceptor {
    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        loop {
            tokio::select! {
                // Commands first, so that nothing is accepted under a fault that is over.
                biased;
                command = commands.recv() => match command {
                    // Whoever does not wait for it has no use for the outcome.
                    Some(command) => drop(command.done.send(self.apply(command.fault))),
                    None => return,
                },
                accepted = accept(self.listener.as_ref()) => match accepted {
                    Ok(client) => self.relay(client),
                    Err(_) => sleep(ACCEPT_PAUSE).await,
                },
            }
        }
    }

    fn apply(&mut self, fault: Fault) -> io::Result<()> {
        if fault == Fault::Refuse {
            self.listener = None;
        } else if self.listener.is_none() {
            self.listener = Some(TcpListener::from_std(self.port.listen()?)?);
        }
        self.faults.send_replace(fault);
        Ok(())
    }

    fn relay(&self, client: TcpStream) {
        let number = self.state.connections.fetch_add(1, Ordering::SeqCst);
        let relay = Relay {
            faults: self.faults.subscribe(),
            state: Arc::clone(&self.state),
            progress: Mutex::new(Progress::new(Instant::now())),
            number,
        };
        // Taken here, so that it meets the fault under which it was accepted.
        let fault = *self.faults.borrow();
        tokio::spawn(relay.run(client, fault));
    }
}

async fn accept(listener: Option<&TcpListener>) -> io::Result<TcpStream> {
    match listener {
        Some(listener) => Ok(listener.accept().await?.0),
        None => std::future::pending().await,
    }
}

/// One connection.
struct Relay {
    faults: watch::Receiver<Fault>,
    state: Arc<State>,
    progress: Mutex<Progress>,
    number: usize,
}

/// How a connection goes on when it passes nothing on any more.
#[derive(Clone, Copy, Debug)]
enum Ending {
    Close,
    Reset,
    Swallow,
    HalfClose,
    Garbage,
}

impl Relay {
    async fn run(self, mut client: TcpStream, fault: Fault) {
        let ending = match fault {
            Fault::Reset(When::Connect) => Some(Ending::Reset),
            Fault::BlackHole => Some(Ending::Swallow),
            _ => None,
        };
        let mut server = None;
        let ending = match ending {
            Some(ending) => ending,
            None => match self.connect().await {
                Ok(stream) => self.pass(&mut client, server.insert(stream)).await,
                Err(_) => Ending::Reset,
            },
        };
        ending.carry_out(client).await;
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        let target = self.state.target(self.number);
        let target = target.ok_or(io::ErrorKind::ConnectionRefused)?;
        let server = TcpStream::connect(target).await?;
        server.set_nodelay(true)?;
        Ok(server)
    }

    async fn pass(&self, client: &mut TcpStream, server: &mut TcpStream) -> Ending {
        if client.set_nodelay(true).is_err() {
            return Ending::Reset;
        }
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let both = async {
            tokio::try_join!(
                self.upwards(from_client, to_server),
                self.downwards(from_server, to_client)
            )
        };
        tokio::select! {
            passed = both => passed.err().unwrap_or(Ending::Close),
            ending = self.cut_by_change() => ending,
            ending = self.closed_idle() => ending,
        }
    }

    async fn upwards(&self, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> Result<(), Ending> {
        let mut dice = fastrand::Rng::with_seed(self.number as u64);
        let mut chunk = vec![0; CHUNK];
        loop {
            let bytes = read(&mut from, &mut chunk).await?;
            if bytes.is_empty() {
                return to.shutdown().await.map_err(|_| Ending::Reset);
            }
            lock(&self.progress).asked(Instant::now());
            let fault = *self.faults.borrow();
            let passed = match fault {
                Fault::BlackHole => return Err(Ending::Swallow),
                Fault::HalfClose => return Err(Ending::HalfClose),
                Fault::Garbage => return Err(Ending::Garbage),
                Fault::Shape(shape) => shape.pass(bytes, &mut to, &mut dice).await,
                _ => to.write_all(bytes).await,
            };
            passed.map_err(|_| Ending::Reset)?;
            let count = bytes.len() as u64;
            self.state.up.fetch_add(count, Ordering::SeqCst);
        }
    }

    async fn downwards(&self, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> Result<(), Ending> {
        let mut dice = fastrand::Rng::with_seed(!self.number as u64);
        let mut chunk = vec![0; CHUNK];
        loop {
            let bytes = read(&mut from, &mut chunk).await?;
            if bytes.is_empty() {
                return to.shutdown().await.map_err(|_| Ending::Reset);
            }
            let fault = *self.faults.borrow();
            let end = match fault {
                Fault::BlackHole => return Err(Ending::Swallow),
                Fault::Reset(When::BeforeHead) => End::BeforeHead,
                Fault::Reset(When::AfterHead) => End::InBody(0),
                Fault::Reset(When::InBody(limit)) => End::InBody(limit),
                _ => End::Nowhere,
            };
            let cut = lock(&self.progress).answered(bytes, end, Instant::now());
            let bytes = &bytes[..cut.unwrap_or(bytes.len())];
            let passed = match fault {
                Fault::Shape(shape) => shape.pass(bytes, &mut to, &mut dice).await,
                _ => to.write_all(bytes).await,
            };
            passed.map_err(|_| Ending::Reset)?;
            let count = bytes.len() as u64;
            self.state.down.fetch_add(count, Ordering::SeqCst);
            lock(&self.progress).last = Instant::now();
            if cut.is_some() {
                return Err(Ending::Reset);
            }
        }
    }

    /// Until a fault comes that a connection meets even if nothing passes.
    async fn cut_by_change(&self) -> Ending {
        let mut faults = self.faults.clone();
        loop {
            match *faults.borrow_and_update() {
                Fault::Refuse | Fault::Reset(When::Connect) => return Ending::Reset,
                Fault::BlackHole => return Ending::Swallow,
                _ => {}
            }
            if faults.changed().await.is_err() {
                return Ending::Reset;
            }
        }
    }

    async fn closed_idle(&self) -> Ending {
        let mut faults = self.faults.clone();
        loop {
            let fault = *faults.borrow_and_update();
            let Fault::CloseIdle(after) = fault else {
                if faults.changed().await.is_err() {
                    return Ending::Close;
                }
                continue;
            };
            // While a response is waited for, there is nothing to close: the next look is later.
            let idle_since = lock(&self.progress).idle_since();
            let due = idle_since.unwrap_or_else(Instant::now) + after;
            if due <= Instant::now() {
                return Ending::Close;
            }
            tokio::select! {
                () = sleep_until(due) => {}
                _ = faults.changed() => {}
            }
        }
    }
}

impl Ending {
    async fn carry_out(self, mut client: TcpStream) {
        match self {
            Self::Close => return,
            Self::Reset => {
                // Closing then sends RST instead of FIN. A socket that cannot be told so is broken
                // already.
                let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
                return;
            }
            Self::Swallow => {}
            // In both, the client may be gone: then there is nothing to swallow either.
            Self::HalfClose => drop(client.shutdown().await),
            Self::Garbage => drop(client.write_all(GARBAGE).await),
        }
        let mut chunk = vec![0; CHUNK];
        while client.read(&mut chunk).await.is_ok_and(|count| count > 0) {}
    }
}

async fn read<'c>(from: &mut ReadHalf<'_>, chunk: &'c mut [u8]) -> Result<&'c [u8], Ending> {
    let count = from.read(chunk).await.map_err(|_| Ending::Reset)?;
    Ok(&chunk[..count])
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a response is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Nowhere,
    BeforeHead,
    /// After this many bytes of the body.
    InBody(u64),
}

/// How far a request and its response have come; pure.
#[derive(Debug)]
struct Progress {
    /// When bytes passed last.
    last: Instant,
    /// A request has begun, and nothing of its response has come.
    asking: bool,
    /// How many bytes of the blank line that ends a head have just been seen.
    blank: usize,
    /// Bytes of the response's body so far; `None` in its head.
    body: Option<u64>,
}

impl Progress {
    fn new(now: Instant) -> Self {
        Self {
            last: now,
            asking: false,
            blank: 0,
            body: None,
        }
    }

    /// Part of a request has come.
    fn asked(&mut self, now: Instant) {
        self.last = now;
        self.asking = true;
    }

    /// Part of a response has come. Returns how many of its bytes may pass before the connection
    /// ends; `None` when it does not end here.
    fn answered(&mut self, bytes: &[u8], end: End, now: Instant) -> Option<usize> {
        self.last = now;
        if std::mem::take(&mut self.asking) {
            self.blank = 0;
            self.body = None;
        }
        if end == End::BeforeHead && self.body.is_none() && self.blank == 0 {
            return Some(0);
        }
        let body = self.skip_head(bytes);
        let seen = self.body.as_mut()?;
        let before = *seen;
        *seen += (bytes.len() - body) as u64;
        match end {
            End::InBody(limit) if *seen >= limit => {
                Some(body + limit.saturating_sub(before) as usize)
            }
            _ => None,
        }
    }

    /// Returns where in `bytes` the body begins, or their end.
    fn skip_head(&mut self, bytes: &[u8]) -> usize {
        if self.body.is_some() {
            return 0;
        }
        const BLANK: &[u8; 4] = b"\r\n\r\n";
        for (index, byte) in bytes.iter().enumerate() {
            self.blank = match *byte {
                byte if byte == BLANK[self.blank] => self.blank + 1,
                b'\r' => 1,
                _ => 0,
            };
            if self.blank == BLANK.len() {
                self.body = Some(0);
                return index + 1;
            }
        }
        bytes.len()
    }

    /// Since when there has been nothing to wait for.
    fn idle_since(&self) -> Option<Instant> {
        (!self.asking).then_some(self.last)
    }
}
