//! The thread that exports spans, and alone waits for the collector.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use metrics::Counter;
use tokio::sync::mpsc::{self, Receiver, Sender, UnboundedReceiver, UnboundedSender};
use tokio::time::{Instant as At, sleep, sleep_until};
use tracing::{debug, info, warn};

use crate::telemetry::metrics::Metrics;
use crate::url::Url;

use super::Destination;
use super::collector::{Again, Collector, Refusal, Taken};
use super::otlp::Batch;
use super::span::RequestSpan;

/// The most spans that are exported in one message, but for those of the last request.
const BATCH: usize = 512;

/// How long a span waits for others.
const DELAY: Duration = Duration::from_secs(1);

/// How often a message is sent again that a collector could not take.
const RETRIES: u32 = 4;

/// How long it is waited before the first time; it doubles from there.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause, whatever the collector asks for: meanwhile the queue fills.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// All exporters of the process that are in use, or have spans left to export.
pub struct Exporters {
    all: Mutex<Vec<Opened>>,
    counts: Counts,
}

/// An exporter, for as long as a tracer has it, and its thread, which lives on until its queue is empty.
struct Opened {
    exporter: Weak<Exporter>,
    collector: Url,
    /// Nothing comes; it is closed when the thread ends.
    ended: std::sync::mpsc::Receiver<Infallible>,
}

/// A queue, and the thread that empties it; that ends when this is dropped.
pub(super) struct Exporter {
    destination: Destination,
    queue: Sender<RequestSpan>,
    /// Who wants to know when all is exported that is in the queue.
    askers: UnboundedSender<std::sync::mpsc::Sender<()>>,
    counts: Counts,
}

/// What becomes of spans.
#[derive(Clone)]
struct Counts {
    exported: Counter,
    dropped: Counter,
    failed: Counter,
    rejected: Counter,
}

/// What the thread does.
struct Job {
    destination: Destination,
    queue: Receiver<RequestSpan>,
    asks: UnboundedReceiver<std::sync::mpsc::Sender<()>>,
    /// Those who wait for the end: nothing is waited for any more.
    asking: Vec<std::sync::mpsc::Sender<()>>,
    counts: Counts,
    /// The last export has failed.
    is_failing: bool,
}

// === impl Exporters ===

impl Exporters {
    /// None yet.
    pub fn new(metrics: &Metrics) -> Arc<Self> {
        let count = |result| {
            let counter = metrics.counter("serin_spans_total", &[("result", result)]);
            counter.increment(0);
            counter
        };
        Arc::new(Self {
            all: Mutex::default(),
            counts: Counts {
                exported: count("exported"),
                dropped: count("dropped"),
                failed: count("failed"),
                rejected: count("rejected"),
            },
        })
    }

    /// The exporter for this destination.
    pub(super) fn open(&self, destination: &Destination) -> io::Result<Arc<Exporter>> {
        let mut all = self.lock();
        all.retain(|opened| !opened.has_ended(Duration::ZERO));
        let mut open = all.iter().filter_map(|opened| opened.exporter.upgrade());
        if let Some(open) = open.find(|open| open.destination == *destination) {
            return Ok(open);
        }
        let (exporter, ended) = Exporter::start(destination, &self.counts)?;
        let exporter = Arc::new(exporter);
        all.push(Opened {
            exporter: Arc::downgrade(&exporter),
            collector: destination.url.clone(),
            ended,
        });
        Ok(exporter)
    }

    /// Waits until all spans are exported that were handed over, but not longer than `limit`; false,
    /// and a warning, when they are not.
    pub fn flush(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut is_whole = true;
        for opened in &*self.lock() {
            let is_done = match opened.exporter.upgrade() {
                Some(exporter) => exporter.flush(deadline),
                None => opened.has_ended(deadline.saturating_duration_since(Instant::now())),
            };
            if !is_done {
                let collector = &opened.collector;
                warn!(%collector, "the last spans could not be exported in time");
                is_whole = false;
            }
        }
        is_whole
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Opened>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Exporters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporters").finish_non_exhaustive()
    }
}

// === impl Opened ===

impl Opened {
    /// True once the thread has ended, or ends within this time.
    fn has_ended(&self, limit: Duration) -> bool {
        let ended = self.ended.recv_timeout(limit);
        matches!(ended, Err(RecvTimeoutError::Disconnected))
    }
}

// === impl Exporter ===

impl Exporter {
    fn start(
        destination: &Destination,
        counts: &Counts,
    ) -> io::Result<(Self, std::sync::mpsc::Receiver<Infallible>)> {
        let (exporter, job) = Self::with_job(destination, counts);
        let (ending, ended) = std::sync::mpsc::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("serin-trace".into())
            .spawn(move || {
                // Dropped last.
                let _ending = ending;
                runtime.block_on(job.run());
            })?;
        Ok((exporter, ended))
    }

    fn with_job(destination: &Destination, counts: &Counts) -> (Self, Job) {
        let (queue, waiting) = mpsc::channel(destination.queue);
        let (askers, asks) = mpsc::unbounded_channel();
        let job = Job {
            destination: destination.clone(),
            queue: waiting,
            asks,
            asking: Vec::new(),
            counts: counts.clone(),
            is_failing: false,
        };
        let exporter = Self {
            destination: destination.clone(),
            queue,
            askers,
            counts: counts.clone(),
        };
        (exporter, job)
    }

    pub(super) fn hand_over(&self, spans: usize, request: impl FnOnce() -> RequestSpan) {
        match self.queue.try_reserve() {
            Ok(place) => place.send(request()),
            Err(_) => self.counts.dropped.increment(spans as u64),
        }
    }

    fn flush(&self, deadline: Instant) -> bool {
        let (asker, told) = std::sync::mpsc::channel();
        let left = deadline.saturating_duration_since(Instant::now());
        self.askers.send(asker).is_ok() && told.recv_timeout(left).is_ok()
    }
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Exporter").field(&self.destination).finish()
    }
}

// === impl Job ===

impl Job {
    /// Exports until nobody can hand anything over any more.
    async fn run(mut self) {
        let destination = self.destination.clone();
        let mut collector = Collector::new(&destination);
        while let Some(batch) = self.next_batch().await {
            if batch.spans > 0 {
                self.export(&mut collector, batch).await;
            }
            if self.queue.is_empty() {
                // Whoever asked may have gone.
                for asker in self.asking.drain(..) {
                    let _ = asker.send(());
                }
            }
        }
    }

    /// What is exported next, as soon as it is enough, or has waited long enough; nothing when somebody
    /// waits for that. `None` at the end.
    async fn next_batch(&mut self) -> Option<Batch> {
        let mut batch = Batch::default();
        let mut due: Option<At> = None;
        while batch.spans < BATCH {
            if !self.asking.is_empty() {
                match self.queue.try_recv() {
                    Ok(request) => batch.push(request),
                    Err(_) => break,
                }
                continue;
            }
            let overdue = async {
                match due {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                request = self.queue.recv() => match request {
                    Some(request) => {
                        batch.push(request);
                        due.get_or_insert_with(|| At::now() + DELAY);
                    }
                    None if batch.spans == 0 => return None,
                    None => break,
                },
                Some(asker) = self.asks.recv() => self.asking.push(asker),
                () = overdue => break,
            }
        }
        Some(batch)
    }

    async fn export(&mut self, collector: &mut Collector<'_>, batch: Batch) {
        let spans = batch.spans as u64;
        let message = batch.encode(&self.destination.resource);
        let mut retries = 0;
        loop {
            match collector.send(message.clone()).await {
                Ok(taken) => return self.exported(spans, &taken),
                Err(refusal) => match refusal.again.filter(|_| retries < RETRIES) {
                    Some(again) if self.may_wait() => {
                        self.is_away(&refusal);
                        self.pause(again, retries).await;
                        retries += 1;
                    }
                    _ => {
                        self.is_away(&refusal);
                        return self.counts.failed.increment(spans);
                    }
                },
            }
        }
    }

    fn exported(&mut self, spans: u64, taken: &Taken) {
        let Taken { rejected, message } = taken;
        let rejected = spans.min(*rejected);
        self.counts.rejected.increment(rejected);
        self.counts.exported.increment(spans - rejected);
        if rejected > 0 || !message.is_empty() {
            debug!(rejected, message, "what the collector says of spans");
        }
        if std::mem::take(&mut self.is_failing) {
            let collector = &self.destination.url;
            info!(%collector, "spans are exported again");
        }
    }

    /// Says so once, and not with every batch.
    fn is_away(&mut self, refusal: &Refusal) {
        let (collector, reason) = (&self.destination.url, &refusal.reason);
        if std::mem::replace(&mut self.is_failing, true) {
            debug!(%collector, reason, "spans still cannot be exported");
        } else {
            warn!(%collector, reason, "spans cannot be exported; `serin_spans_total` counts those that are lost");
        }
    }

    /// False once somebody waits for the end, or nobody wants this exporter any more.
    fn may_wait(&self) -> bool {
        self.asking.is_empty() && !self.asks.is_closed()
    }

    /// Waits before the same is sent again, unless somebody waits for the end.
    async fn pause(&mut self, again: Again, retries: u32) {
        let pause = match again {
            Again::After(pause) => pause.max(FIRST_PAUSE),
            // Full jitter, so that many proxies do not come back together.
            Again::Sometime => {
                (FIRST_PAUSE * 2_u32.pow(retries)).mul_f64(0.5 + fastrand::f64() / 2.0)
            }
        };
        tokio::select! {
            () = sleep(pause.min(LONGEST_PAUSE)) => {}
            Some(asker) = self.asks.recv() => self.asking.push(asker),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use http::{Method, StatusCode};

    use super::*;
    use crate::discovery;
    use crate::telemetry::trace::{Protocol, SpanContext};

    /// More than it takes, on any machine.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn span() -> RequestSpan {
        let now = At::now();
        RequestSpan {
            context: SpanContext::begin(None, &mut fastrand::Rng::with_seed(1)),
            trace_state: "".into(),
            began: now,
            ended: now,
            method: Method::GET,
            scheme: "http",
            host: "".into(),
            path: "/".into(),
            user_agent: None,
            protocol: "1.1",
            tls: None,
            client: None,
            target: None,
            reason: None,
            rule: None,
            shielded_by: None,
            status: StatusCode::OK,
            grpc_status: None,
            error: None,
            has_failed: false,
            bytes: (0, 0),
            attempts: Vec::new(),
        }
    }

    #[test]
    fn what_is_left_for_a_collector_that_is_no_longer_configured_is_waited_for() {
        let collector = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1/traces", collector.local_addr().unwrap());
        let destination = Destination {
            url: url.parse().unwrap(),
            protocol: Protocol::Http,
            dns: discovery::Settings {
                min_ttl: PATIENCE,
                max_ttl: PATIENCE,
                timeout: PATIENCE,
                resolvers: Vec::new(),
            },
            headers: Vec::new(),
            tls: None,
            timeout: PATIENCE,
            queue: 1,
            resource: Vec::new(),
        };
        let exporters = Exporters::new(&Metrics::new(&[], 1));
        let exporter = exporters.open(&destination).unwrap();
        exporter.hand_over(1, span);
        drop(exporter);
        assert!(!exporters.flush(Duration::ZERO), "nobody has taken it");
        let (mut stream, _) = collector.accept().unwrap();
        assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
        let taken = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        stream.write_all(taken).unwrap();
        assert!(exporters.flush(PATIENCE));
    }
}
