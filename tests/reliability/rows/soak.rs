//! A day's worth of requests as fast as the machine goes, with a reload every few seconds: whether
//! anything grows.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::Error;
use crate::client::{Broken, Connection, Request, USER};
use crate::config::Config;
use crate::process::{Launch, Serin, Upstream};
use crate::record::{Outcome, Which};
use crate::report::with_commas;
use crate::row::{Drill, Finding, Measure, Pace, Promise, Row};
use crate::stage::{Stage, Wiring};

const REQUESTS: usize = 20_000_000;

/// Before anything is measured: connections are made, and the allocator has what it needs.
const WARM_UP: usize = REQUESTS / 50;

/// Connections that ask one request after the other.
const GETTERS: usize = 48;
const POSTERS: usize = 8;
/// Connections of HTTP/2, and requests that each has open at a time.
const HTTP2: usize = 2;
const STREAMS: usize = 8;
/// Clients that go away in the middle of a response, and how long each rests then.
const QUITTERS: usize = 4;
const REST: Duration = Duration::from_millis(10);

const BODY: usize = 128;
const POSTED: usize = 1024;

const RELOAD: Duration = Duration::from_secs(3);
const SAMPLE: Duration = Duration::from_secs(1);

/// A request that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(10);

const HTTP_1: &str = "HTTP/1.1";
const HTTP_2: &str = "HTTP/2";

/// When it is given up.
const LIMIT: Duration = Duration::from_secs(3600);

pub(crate) fn row() -> Row {
    Row {
        name: "soak".into(),
        fault: format!(
            "{} requests as fast as it goes, over {GETTERS} connections with GETs, {POSTERS} with POSTs and {HTTP2} of \
             HTTP/2 with {STREAMS} requests at a time, while {QUITTERS} clients keep going away in the middle; every {} s \
             a reload that changes weights and endpoints",
            with_commas(REQUESTS),
            RELOAD.as_secs(),
        ),
        promises: vec![
            Promise::none_of(Which::ALL),
            Promise::new(Measure::MemoryGrowth, 1.1),
            Promise::new(Measure::DescriptorGrowth, 1.1),
        ],
        drill: Drill::Soak,
    }
}

/// What the clients share.
struct Shared {
    address: SocketAddr,
    done: AtomicUsize,
    failures: Mutex<BTreeMap<Failure, usize>>,
    quit: AtomicUsize,
    over: AtomicBool,
}

/// What failed, and in which version of HTTP.
type Failure = (&'static str, Outcome);

/// What the kernel says of Serin at a moment.
#[derive(Clone, Copy)]
struct Sample {
    memory_kib: f64,
    descriptors: f64,
}

pub(crate) async fn run(pace: &Pace) -> Result<Finding, Error> {
    let stage = Stage::set(pace, Launch::Plainly, Wiring::Nothing, be_patient).await?;
    let spare = Upstream::start("spare").await?;
    let shared = Arc::new(Shared {
        address: stage.serin.address(),
        done: AtomicUsize::new(0),
        failures: Mutex::default(),
        quit: AtomicUsize::new(0),
        over: AtomicBool::new(false),
    });
    let mut clients = clients(&shared);
    let requests = if pace.quick { REQUESTS / 200 } else { REQUESTS };
    let warm_up = if pace.quick { WARM_UP / 200 } else { WARM_UP };
    let begun = Instant::now();
    let reloads = AtomicUsize::new(0);
    let samples = tokio::select! {
        samples = sample(&stage.serin, &shared, warm_up, requests) => samples?,
        error = reload(&stage, &spare, &reloads) => return Err(error),
        () = sleep(LIMIT) => return Err(format!("not over after {LIMIT:?}").into()),
    };
    let took = begun.elapsed();
    shared.over.store(true, Ordering::SeqCst);
    while clients.join_next().await.is_some() {}
    Ok(finding(&shared, &samples, took, reloads.into_inner()))
}

fn finding(shared: &Shared, samples: &[Sample], took: Duration, reloads: usize) -> Finding {
    let done = shared.done.load(Ordering::SeqCst);
    let failed = shared.failed();
    let tenth = samples.len().div_ceil(10);
    let parts = [&samples[..tenth], &samples[samples.len() - tenth..]];
    let memory = parts.map(|part| Summary::of(part, |sample| sample.memory_kib / 1024.0));
    let descriptors = parts.map(|part| Summary::of(part, |sample| sample.descriptors));
    let failures = shared.failures();
    let failures: String = failures
        .iter()
        .map(|((protocol, outcome), count)| format!("{protocol}: {outcome} ×{count}; "))
        .collect();
    let mut finding = Finding {
        seen: format!(
            "{failures}{} a second for {:.0} s, {reloads} reloads, {} responses that nobody waited for; memory in MiB, first tenth: \
             {}, last tenth: {}; descriptors, first tenth: {}, last tenth: {}",
            with_commas((done as f64 / took.as_secs_f64()) as usize),
            took.as_secs_f64(),
            with_commas(shared.quit.load(Ordering::SeqCst)),
            memory[0].text(),
            memory[1].text(),
            descriptors[0].text(),
            descriptors[1].text(),
        ),
        tried: Some(done),
        failed: Some(failed),
        ..Finding::default()
    };
    finding.measure(Measure::Failed(Which::ALL), failed as f64);
    finding.measure(Measure::MemoryGrowth, memory[1].mean / memory[0].mean);
    finding.measure(
        Measure::DescriptorGrowth,
        descriptors[1].mean / descriptors[0].mean,
    );
    finding
}

struct Summary {
    mean: f64,
    max: f64,
}

impl Summary {
    fn of(samples: &[Sample], value: impl Fn(&Sample) -> f64) -> Self {
        let values: Vec<f64> = samples.iter().map(value).collect();
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            max: values.into_iter().fold(0.0, f64::max),
        }
    }

    fn text(&self) -> String {
        format!("mean {:.1}, max {:.1}", self.mean, self.max)
    }
}

/// Looks at Serin until all requests are done, from the end of the warm-up on.
async fn sample(
    serin: &Serin,
    shared: &Shared,
    warm_up: usize,
    requests: usize,
) -> Result<Vec<Sample>, Error> {
    let mut samples = Vec::new();
    let mut progress = 0;
    loop {
        sleep(SAMPLE).await;
        let done = shared.done.load(Ordering::SeqCst);
        if done >= warm_up {
            samples.push(Sample {
                memory_kib: serin.process.memory_kib()? as f64,
                descriptors: serin.process.descriptors()? as f64,
            });
        }
        if done / 1_000_000 > progress {
            progress = done / 1_000_000;
            println!(
                "    {progress} million requests, failed: {:?}",
                shared.failures()
            );
        }
        if done >= requests && !samples.is_empty() {
            return Ok(samples);
        }
    }
}

/// Changes weights and endpoints for ever.
async fn reload(stage: &Stage, spare: &Upstream, reloads: &AtomicUsize) -> Error {
    for turn in 1.. {
        sleep(RELOAD).await;
        let config = changed(stage, spare, turn);
        if let Err(error) = stage.serin.reload(&config).await {
            return error;
        }
        reloads.store(turn, Ordering::SeqCst);
    }
    "there are no more numbers".into()
}

fn changed(stage: &Stage, spare: &Upstream, turn: usize) -> Config {
    let mut config = stage.upstreams.config(Wiring::Nothing);
    be_patient(&mut config);
    let weights = [(95, 5), (80, 20), (50, 50), (0, 100), (100, 0)];
    config.weights = weights[turn % weights.len()];
    match turn % 3 {
        1 => config.canary = vec![spare.address()],
        2 => {
            config.stable.pop();
        }
        _ => {}
    }
    config
}

/// With every core busy, an upstream may well take a second to get its turn; a response that never
/// comes is found out by the clients' own patience.
fn be_patient(config: &mut Config) {
    config.is_patient = true;
}

fn clients(shared: &Arc<Shared>) -> JoinSet<()> {
    let mut clients = JoinSet::new();
    let mut number = 0..;
    let mut user = || format!("user-{}", number.next().unwrap_or(0));
    for _ in 0..GETTERS {
        let request = Request::get(&format!("/bytes/{BODY}"), &user(), BODY);
        clients.spawn(Arc::clone(shared).ask(request));
    }
    for _ in 0..POSTERS {
        let request = Request::echo(&user(), POSTED);
        clients.spawn(Arc::clone(shared).ask(request));
    }
    for _ in 0..HTTP2 {
        clients.spawn(Arc::clone(shared).ask_by_http2(user()));
    }
    for _ in 0..QUITTERS {
        clients.spawn(Arc::clone(shared).go_away(user()));
    }
    clients
}

impl Shared {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Returns whether it succeeded.
    fn count(&self, protocol: &'static str, outcome: Outcome) -> bool {
        self.done.fetch_add(1, Ordering::Relaxed);
        if outcome.is_failure() {
            *self.failures().entry((protocol, outcome)).or_default() += 1;
        }
        !outcome.is_failure()
    }

    fn failures(&self) -> MutexGuard<'_, BTreeMap<Failure, usize>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self) -> usize {
        self.failures().values().sum()
    }

    /// One request after the other, on one connection as long as it lasts.
    async fn ask(self: Arc<Self>, request: Request) {
        while !self.is_over() {
            let Ok(mut connection) = Connection::open(self.address).await else {
                self.count(HTTP_1, Outcome::Broken(Broken::Connect));
                sleep(REST).await;
                continue;
            };
            while !self.is_over() && connection.is_usable() {
                let outcome = match timeout(PATIENCE, connection.exchange(&request)).await {
                    Ok(Ok(answer)) => Outcome::Answered(answer.status),
                    Ok(Err(broken)) => Outcome::Broken(broken),
                    Err(_) => Outcome::Broken(Broken::Timeout),
                };
                if !self.count(HTTP_1, outcome) {
                    break;
                }
            }
        }
    }

    async fn ask_by_http2(self: Arc<Self>, user: String) {
        while !self.is_over() {
            // What has gone wrong was counted; another connection, after a rest.
            if self.ask_on_one(&user).await.is_err() {
                self.count(HTTP_2, Outcome::Broken(Broken::Connect));
                sleep(REST).await;
            }
        }
    }

    /// Until the connection ends.
    async fn ask_on_one(self: &Arc<Self>, user: &str) -> Result<(), Error> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let mut streams = JoinSet::new();
        for _ in 0..STREAMS {
            let (shared, sender, user) = (Arc::clone(self), sender.clone(), user.to_owned());
            streams.spawn(async move {
                while !shared.is_over() && !sender.is_closed() {
                    let answer = get(sender.clone(), shared.address, &user);
                    let outcome = match timeout(PATIENCE, answer).await {
                        Ok(Ok(status)) => Outcome::Answered(status),
                        Ok(Err(_)) => Outcome::Broken(Broken::Reset),
                        Err(_) => Outcome::Broken(Broken::Timeout),
                    };
                    if !shared.count(HTTP_2, outcome) {
                        break;
                    }
                }
            });
        }
        while streams.join_next().await.is_some() {}
        drop(sender);
        driver.abort();
        Ok(())
    }

    /// Asks for much, takes a little, and goes.
    async fn go_away(self: Arc<Self>, user: String) {
        let request = format!(
            "GET /bytes/1000000 HTTP/1.1\r\nhost: shop.example.com\r\n{USER}: {user}\r\n\r\n"
        );
        while !self.is_over() {
            if let Ok(mut stream) = TcpStream::connect(self.address).await
                && stream.write_all(request.as_bytes()).await.is_ok()
                && stream.read(&mut [0; 1024]).await.is_ok()
            {
                self.quit.fetch_add(1, Ordering::Relaxed);
            }
            sleep(REST).await;
        }
    }
}

/// Returns the status.
async fn get(
    mut sender: http2::SendRequest<Empty<Bytes>>,
    address: SocketAddr,
    user: &str,
) -> Result<u16, Error> {
    let request = http::Request::get(format!("http://{address}/bytes/{BODY}"))
        .header(USER, user)
        .body(Empty::new())?;
    sender.ready().await?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let length = response.into_body().collect().await?.to_bytes().len();
    if status == 200 && length != BODY {
        return Err("a wrong body".into());
    }
    Ok(status)
}
