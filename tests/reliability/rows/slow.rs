//! 10,000 clients that take their time: some with the head of a request, some with its body, some
//! with reading the response.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::Error;
use crate::load::{Load, Plan};
use crate::process::{Launch, Process, descriptor_limit};
use crate::record::{Span, Which};
use crate::row::{Drill, Finding, Measure, Pace, Promise, Row};
use crate::stage::{Stage, Wiring};
use crate::upstream::SEGMENT;

const CLIENTS: usize = 10_000;

/// Between two bytes sent, or two reads.
const PAUSE: Duration = Duration::from_secs(2);

const BEFORE: Duration = Duration::from_secs(5);
/// In which all of them come.
const ARRIVAL: Duration = Duration::from_secs(10);
const STAY: Duration = Duration::from_secs(40);
const AFTER: Duration = Duration::from_secs(5);

/// Descriptors beyond those for slow clients.
const SPARE_DESCRIPTORS: usize = 1000;

/// The receive buffer of slow readers.
const RECEIVE_BUFFER: usize = 4096;
/// What they ask for: more than the sockets in between hold.
const LARGE: usize = 1 << 20;

pub(crate) fn row() -> Row {
    Row {
        name: "slow-clients".into(),
        fault: "10,000 clients: a third sends a byte of the head every 2 s, a third a byte of the body, a third reads \
                a response of 1 MiB at 0.5 KiB/s"
            .into(),
        promises: vec![
            Promise::none_of(Which::ALL),
            Promise::new(Measure::ClientKib, 128.0),
            Promise::new(Measure::OthersTail, 50.0),
            Promise::new(Measure::Crashes, 0.0),
        ],
        drill: Drill::SlowClients,
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Head,
    Body,
    Reader,
}

/// What slow clients count.
#[derive(Default)]
struct Count {
    /// Connected now.
    here: AtomicUsize,
    most: AtomicUsize,
    /// Times that Serin ended a connection.
    ended: AtomicUsize,
}

/// Memory at its most, in KiB.
#[derive(Clone, Copy, Default)]
struct Most {
    process: u64,
    /// What the kernel's buffers hold.
    kernel: u64,
}

pub(crate) async fn run(pace: &Pace) -> Result<Finding, Error> {
    let clients = clients(pace);
    let mut stage = Stage::set(pace, Launch::Plainly, Wiring::Nothing, |config| {
        config.is_patient = true;
    })
    .await?;
    let address = stage.serin.address();
    let load = Load::start(&Plan::new(address, pace.patience()), &stage.users);
    sleep(pace.time(BEFORE)).await;
    let before = stage.serin.process.memory_kib()?;
    let from = load.now();
    let count = Arc::new(Count::default());
    let crowd = crowd(address, clients, pace.time(ARRIVAL), &count);
    let stay = pace.time(ARRIVAL + STAY);
    let most = Most::of(&stage.serin.process, stay).await?;
    drop(crowd);
    let to = load.now();
    sleep(pace.time(AFTER)).await;
    let after = stage.serin.process.memory_kib()?;
    let record = load.stop().await?;
    let span = Span { from, to };
    let mut finding = Finding::new(&record, span);
    let here = count.most.load(Ordering::SeqCst);
    let each = most.process.saturating_sub(before) as f64 / here.max(1) as f64;
    finding.add(&format!(
        "{here} slow clients at once, Serin ended {} connections; memory {} MiB before, {} MiB at most, \
         {} MiB after; the kernel's for all connections, on both sides, {} MiB at most",
        count.ended.load(Ordering::SeqCst),
        before / 1024,
        most.process / 1024,
        after / 1024,
        most.kernel / 1024,
    ));
    if clients < CLIENTS && !pace.quick {
        finding.add("the limit of descriptors allows no more");
    }
    let others = record
        .latency(Which::ALL, span)
        .ok_or("nobody was served")?;
    finding.measure(Measure::ClientKib, each);
    finding.measure(Measure::OthersTail, others.p99.as_secs_f64() * 1e3);
    finding.measure_crash(stage.serin.process.end()?.is_some());
    Ok(finding)
}

/// As many as the descriptors of Serin allow, which needs two for each whose request has gone on.
fn clients(pace: &Pace) -> usize {
    let descriptors = descriptor_limit() as usize;
    let allowed = descriptors.saturating_sub(SPARE_DESCRIPTORS) * 3 / 5;
    pace.count(CLIENTS).min(allowed)
}

/// Slow clients, one after the other; they go when this is dropped.
fn crowd(
    address: SocketAddr,
    clients: usize,
    arrival: Duration,
    count: &Arc<Count>,
) -> JoinSet<()> {
    let mut crowd = JoinSet::new();
    let begin = Instant::now();
    for number in 0..clients {
        let kind = [Kind::Head, Kind::Body, Kind::Reader][number % 3];
        let count = Arc::clone(count);
        let due = begin + arrival.mul_f64(number as f64 / clients as f64);
        crowd.spawn(async move {
            sleep_until(due).await;
            loop {
                // Whatever ends it, it comes again.
                let _ = stay(address, kind, number, &count).await;
                count.ended.fetch_add(1, Ordering::SeqCst);
                sleep(PAUSE).await;
            }
        });
    }
    crowd
}

/// Until the connection ends.
async fn stay(
    address: SocketAddr,
    kind: Kind,
    number: usize,
    count: &Count,
) -> std::io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    SockRef::from(&socket).set_tcp_mss(SEGMENT)?;
    if matches!(kind, Kind::Reader) {
        // Before connecting, or a larger window is offered first.
        SockRef::from(&socket).set_recv_buffer_size(RECEIVE_BUFFER)?;
    }
    let mut stream = socket.connect(address).await?;
    let here = 1 + count.here.fetch_add(1, Ordering::SeqCst);
    count.most.fetch_max(here, Ordering::SeqCst);
    let _gone = scopeguard::guard((), |()| {
        count.here.fetch_sub(1, Ordering::SeqCst);
    });
    let user = format!("host: shop.example.com\r\nx-user-id: slow-{number}\r\n");
    match kind {
        Kind::Head => {
            let head = format!("GET / HTTP/1.1\r\n{user}x-more: {:1000}\r\n\r\n", "");
            drip(&mut stream, head.as_bytes()).await
        }
        Kind::Body => {
            let head = format!("POST /echo HTTP/1.1\r\n{user}content-length: 4096\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
            drip(&mut stream, &[b'x'; 4096]).await
        }
        Kind::Reader => {
            let head = format!("GET /bytes/{LARGE} HTTP/1.1\r\n{user}\r\n");
            stream.write_all(head.as_bytes()).await?;
            sip(&mut stream).await
        }
    }
}

async fn drip(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    let mut answer = [0; 1024];
    for byte in bytes {
        tokio::select! {
            // It waits for no response yet: either there is one that refuses, or the end.
            read = stream.read(&mut answer) => {
                read?;
                return Ok(());
            }
            () = sleep(PAUSE) => stream.write_all(&[*byte]).await?,
        }
    }
    Ok(())
}

async fn sip(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut sip = [0; 1024];
    while stream.read(&mut sip).await? > 0 {
        sleep(PAUSE).await;
    }
    Ok(())
}

impl Most {
    /// While this much time passes.
    async fn of(process: &Process, time: Duration) -> Result<Self, Error> {
        let end = Instant::now() + time;
        let mut most = Self::default();
        while Instant::now() < end {
            most.process = most.process.max(process.memory_kib()?);
            most.kernel = most.kernel.max(tcp_memory_kib()?);
            sleep(Duration::from_millis(250)).await;
        }
        Ok(most)
    }
}

/// What the kernel's buffers for all connections hold now: Serin's and those of the other ends.
fn tcp_memory_kib() -> Result<u64, Error> {
    let text = std::fs::read_to_string("/proc/net/sockstat")?;
    let line = text.lines().find(|line| line.starts_with("TCP:"));
    let mut words = line.into_iter().flat_map(str::split_whitespace);
    let pages: Option<u64> = words
        .find(|word| *word == "mem")
        .and_then(|_| words.next()?.parse().ok());
    let pages = pages.ok_or("no TCP memory in /proc/net/sockstat")?;
    Ok(pages * rustix::param::page_size() as u64 / 1024)
}
