//! Every metric of Serin, defined once, and the handles through which they are touched.
//!
//! Handles are living state, kept by what they are labelled with: a reload finds them again. What a
//! request touches is bound to its route and backend before the request comes; only its method and
//! status are looked up, in a short list. Label values come from the configuration and from closed
//! sets, never from a client.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use http::{Method, StatusCode, Version};
use metrics::{Counter, Gauge, Key, Label, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::formatting::{write_help_line, write_type_line};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use crate::limit::overload::Priority;
use crate::limit::rate::Mode;
use crate::routing::Reason;

use super::histogram::{Buckets, LatencyHistogram};

/// Upper bounds of the latency histograms in seconds: two below those of OpenTelemetry's
/// `http.server.request.duration`.
pub const DEFAULT_BUCKETS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];

/// With more targets than this, those without requests so far show no latencies: nobody reads megabytes of
/// zeros.
const MOST_EMPTY: usize = 2000;

/// The label value for what there is not: the route of a request that no route takes.
pub(crate) const NONE: &str = "_NONE";

/// The registry, and the handles that outlive snapshots.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    process: metrics_process::Collector,
    targets: Mutex<HashMap<TargetLabels, Arc<TargetMetrics>>>,
    /// The latencies of every target there ever was: what was counted stays.
    latencies: Mutex<BTreeMap<TargetLabels, Arc<Latencies>>>,
    /// What requests are counted under that no route takes.
    unrouted: OnceLock<Arc<TargetMetrics>>,
    buckets: Buckets,
    workers: usize,
    gauges: Mutex<HashMap<Key, Arc<Level>>>,
    /// Requests being served in the whole process.
    in_flight: Arc<Level>,
    /// Requests that were not, by priority.
    shed: [Counter; Priority::ALL.len()],
    /// Revision and hash of the configuration in force.
    config_info: Mutex<(u64, u64)>,
    /// What is not finished by now is cut off.
    has_ended: AtomicBool,
}

/// The metrics as one worker uses them.
#[derive(Debug)]
pub struct WorkerMetrics {
    /// All there are.
    pub all: Arc<Metrics>,
    /// Its position among the workers: whose part of the histograms it writes to.
    pub worker: usize,
}

/// What a request is counted under.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetLabels {
    /// The route.
    pub route: Arc<str>,
    /// The backend.
    pub backend: Arc<str>,
    /// The backend's version.
    pub version: Arc<str>,
}

/// The handles of one backend on one route.
#[derive(Debug)]
pub struct TargetMetrics {
    requests: Family<(MethodLabel, StatusCode, Protocol)>,
    upstream_errors: Family<&'static str>,
    grpc_responses: Family<&'static str>,
    failures: Counter,
    request_bytes: Counter,
    response_bytes: Counter,
    retries: Family<&'static str>,
    shielded: Family<StatusCode>,
    failovers: Family<&'static str>,
    overflows: Family<&'static str>,
    moved: OnceLock<Counter>,
    decisions: [OnceLock<Counter>; Reason::ALL.len()],
    latencies: Arc<Latencies>,
    in_flight: Arc<Level>,
    tunnels: Arc<Level>,
    labels: TargetLabels,
}

/// How long the requests of one target take.
#[derive(Debug)]
struct Latencies {
    request: LatencyHistogram,
    upstream: LatencyHistogram,
}

/// A level that goes up and down by one, read when somebody asks.
#[derive(Debug, Default)]
pub struct Level(AtomicI64);

/// Keeps a [`Level`] up by one until it is dropped.
#[derive(Debug)]
pub struct Up(Arc<Level>);

/// The method of a request as a label: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodLabel(&'static str);

/// The protocol of a request as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.0 and HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
}

struct Definition {
    name: &'static str,
    kind: Kind,
    unit: Option<Unit>,
    help: &'static str,
}

struct HistogramDefinition {
    name: &'static str,
    help: &'static str,
    /// Which of the latencies of a target it shows.
    part: fn(&Latencies) -> &LatencyHistogram,
}

enum Kind {
    Counter,
    Gauge,
}

/// The histograms.
const HISTOGRAMS: [HistogramDefinition; 2] = [
    HistogramDefinition {
        name: "serin_request_duration_seconds",
        help: "Time from the request head to the last byte of the response.",
        part: |latencies| &latencies.request,
    },
    HistogramDefinition {
        name: "serin_upstream_duration_seconds",
        help: "Time from choosing a backend to the head of its response.",
        part: |latencies| &latencies.upstream,
    },
];

/// All other metrics, one line each, in the order of the documentation.
const DEFINITIONS: &[Definition] = &[
    counter(
        "serin_requests_total",
        "Requests answered, by status code; 499 is a client that went away.",
    ),
    counter(
        "serin_request_failures_total",
        "Requests that failed by the version's fault: 5xx, a gRPC status of that kind, or no whole response.",
    ),
    counter(
        "serin_request_bytes_total",
        "Bytes of request bodies that clients have sent, and through tunnels.",
    ),
    counter(
        "serin_response_bytes_total",
        "Bytes of response bodies that clients were sent, and through tunnels.",
    ),
    counter(
        "serin_grpc_responses_total",
        "Calls of gRPC answered, by the number of their status.",
    ),
    gauge("serin_requests_in_flight", None, "Requests being served."),
    gauge(
        "serin_tunnels_active",
        None,
        "Tunnels (WebSocket) that stand; they are in flight as well.",
    ),
    counter(
        "serin_routing_decisions_total",
        "Requests by the reason for which they got their backend.",
    ),
    counter(
        "serin_upstream_errors_total",
        "Attempts that brought no whole response, by RFC 9209 error type.",
    ),
    counter(
        "serin_retries_total",
        "Requests sent to the same version once more (result \"sent\"), or not, since too many were (\"over_budget\").",
    ),
    counter(
        "serin_shielded_requests_total",
        "Requests that this version failed and the baseline answered instead, by the status that the client got.",
    ),
    counter(
        "serin_failovers_total",
        "Requests meant for this version that another one got, since it takes none.",
    ),
    counter(
        "serin_backend_overflows_total",
        "Requests that found no room at a backend, by cause.",
    ),
    gauge(
        REQUESTS_QUEUED,
        None,
        "Requests that wait for room at a backend.",
    ),
    counter(
        "serin_ejections_total",
        "Endpoints ejected for what requests say of them, by cause.",
    ),
    counter(
        "serin_health_checks_total",
        "Answers to health checks, by result.",
    ),
    gauge(
        ENDPOINT_HEALTHY,
        None,
        "1 for an endpoint that nothing speaks against, 0 for one that is unchecked, unhealthy or ejected.",
    ),
    counter(
        "serin_streams_moved_total",
        "Long-lived streams that were ended, since their user gets another version.",
    ),
    gauge(
        "serin_overload_requests_in_flight",
        None,
        "Requests being served in the whole process, tunnels not among them.",
    ),
    gauge(
        "serin_overload_limit",
        None,
        "Requests beyond which those of normal priority are shed; not a number without a limit.",
    ),
    counter(
        "serin_shed_requests_total",
        "Requests refused because too many were in flight, by priority.",
    ),
    counter(
        "serin_rate_limited_total",
        "Requests beyond a rate limit, by its mode: refused, or only observed.",
    ),
    counter(
        "serin_rate_limit_keys_displaced_total",
        "Keys of a rate limit that were forgotten while they still counted: it has too few.",
    ),
    gauge(
        "serin_backend_weight",
        None,
        "Weight of a backend on a route that is in force.",
    ),
    gauge(
        "serin_baseline_info",
        None,
        "1 for the backend of a route that is its baseline, 0 for the others.",
    ),
    gauge(
        "serin_route_weights_set",
        None,
        "1 while weights are in force that were set through the admin API, and not those of the file.",
    ),
    gauge(
        "serin_state_saved",
        None,
        "1 when weights that are set outlive the process, 0 when they should and cannot be saved.",
    ),
    gauge("serin_connections_active", None, "Connections of clients."),
    gauge(
        "serin_connections_limit",
        None,
        "Connections that clients may have at a time.",
    ),
    counter(
        "serin_connections_limit_reached_total",
        "Times that there were as many connections as there may be.",
    ),
    gauge(
        "serin_upstream_connections",
        None,
        "Connections to endpoints, idle ones among them.",
    ),
    counter(
        "serin_config_reloads_total",
        "Reloads of the configuration, by result.",
    ),
    gauge(
        "serin_config_last_reload_successful",
        None,
        "1 when the last reload was taken over, 0 when it was refused.",
    ),
    gauge(
        "serin_config_last_reload_success_timestamp_seconds",
        Some(Unit::Seconds),
        "When the configuration in force was taken over.",
    ),
    gauge("serin_config_info", None, CONFIG_INFO),
    gauge(
        "serin_config_restart_required",
        None,
        "1 when the file says something that only a restart can change.",
    ),
    gauge(
        "serin_config_watch_polling",
        None,
        "1 when file changes are found by polling alone, since watching failed.",
    ),
    gauge("serin_user_list_entries", None, "Ids on a user list."),
    gauge(
        "serin_user_list_bytes",
        Some(Unit::Bytes),
        "Memory that a user list takes.",
    ),
    gauge(
        "serin_user_list_last_load_successful",
        None,
        "1 when the list file was last read whole, 0 when it was refused.",
    ),
    gauge(
        "serin_user_list_last_load_success_timestamp_seconds",
        Some(Unit::Seconds),
        "When the list in force was read.",
    ),
    gauge(
        "serin_user_list_expiry_timestamp_seconds",
        Some(Unit::Seconds),
        "When the list should be gone, where the configuration says so.",
    ),
    gauge(
        "serin_certificate_not_after_timestamp_seconds",
        Some(Unit::Seconds),
        "When a certificate expires.",
    ),
    counter(
        "serin_dns_resolutions_total",
        "Attempts to resolve a name of endpoints, by what they brought.",
    ),
    gauge(
        "serin_dns_last_success_timestamp_seconds",
        Some(Unit::Seconds),
        "When the name of a backend was resolved for which that is longest ago; 0 for never.",
    ),
    gauge(
        "serin_endpoints_file_last_load_successful",
        None,
        "1 when the file of endpoints was last read whole, 0 when it was refused.",
    ),
    gauge(
        "serin_endpoints_file_last_load_success_timestamp_seconds",
        Some(Unit::Seconds),
        "When the file of endpoints in force was read.",
    ),
    counter(
        "serin_access_log_dropped_total",
        "Lines of the access log that could not be written.",
    ),
    counter(
        "serin_spans_total",
        "Spans by what became of them: exported, dropped (too many waited), failed (the collector is away), rejected (by it).",
    ),
    counter(
        "serin_drain_cut_off_total",
        "Requests and tunnels that had not ended when the process had to.",
    ),
    gauge("serin_workers", None, "Worker threads."),
    gauge(
        "serin_build_info",
        None,
        "The build: its version; always 1.",
    ),
];

/// Read from the snapshot in force.
pub const ENDPOINT_HEALTHY: &str = "serin_endpoint_healthy";
/// Read from the snapshot in force.
pub const REQUESTS_QUEUED: &str = "serin_backend_requests_queued";

const CONFIG_INFO: &str =
    "The configuration in force: its revision and the hash of its file; always 1.";

const fn counter(name: &'static str, help: &'static str) -> Definition {
    Definition {
        name,
        kind: Kind::Counter,
        unit: None,
        help,
    }
}

const fn gauge(name: &'static str, unit: Option<Unit>, help: &'static str) -> Definition {
    Definition {
        name,
        kind: Kind::Gauge,
        unit,
        help,
    }
}

// === impl Metrics ===

impl Metrics {
    /// An empty registry for so many workers, whose latency histograms have these upper bounds in
    /// seconds.
    pub fn new(buckets: &[f64], workers: usize) -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        let buckets = if buckets.is_empty() {
            &DEFAULT_BUCKETS
        } else {
            buckets
        };
        for definition in DEFINITIONS {
            definition.describe(&recorder);
        }
        let process = metrics_process::Collector::default();
        metrics::with_local_recorder(&recorder, || process.describe());
        let in_flight = Arc::<Level>::default();
        let in_flight_key = key("serin_overload_requests_in_flight", &[]);
        let metrics = Self {
            handle: recorder.handle(),
            shed: Priority::ALL.map(|priority| {
                let labels = [("priority", priority.as_str())];
                from_the_start(&recorder, "serin_shed_requests_total", &labels)
            }),
            recorder,
            process,
            targets: Mutex::default(),
            latencies: Mutex::default(),
            unrouted: OnceLock::new(),
            buckets: Buckets::new(buckets),
            workers,
            gauges: Mutex::new(HashMap::from([(in_flight_key, Arc::clone(&in_flight))])),
            in_flight,
            config_info: Mutex::default(),
            has_ended: AtomicBool::new(false),
        };
        metrics
            .gauge(
                "serin_build_info",
                &[("version", env!("CARGO_PKG_VERSION"))],
            )
            .set(1.0);
        metrics
    }

    /// All metrics in the text format of Prometheus.
    pub fn render(&self) -> String {
        for (key, level) in lock(&self.gauges).iter() {
            self.recorder
                .register_gauge(key, &METADATA)
                .set(level.get() as f64);
        }
        metrics::with_local_recorder(&self.recorder, || self.process.collect());
        self.handle.render() + &self.render_latencies() + &self.render_config_info()
    }

    fn render_latencies(&self) -> String {
        let latencies = lock(&self.latencies);
        // From the start: Prometheus sees no increase from nothing, and a version would have failures
        // before it has requests.
        let has_room = latencies.len() <= MOST_EMPTY;
        let mut text = String::new();
        for HistogramDefinition { name, help, part } in HISTOGRAMS {
            write_help_line(&mut text, name, None, None, help);
            write_type_line(&mut text, name, None, None, "histogram");
            for (labels, latencies) in latencies.iter() {
                let histogram = part(latencies);
                if has_room && !labels.is_none() || !histogram.is_empty() {
                    histogram.render(&mut text, name, &labels.pairs());
                }
            }
            text.push('\n');
        }
        text
    }

    /// Notes which configuration is in force.
    pub fn set_config_info(&self, revision: u64, hash: u64) {
        *lock(&self.config_info) = (revision, hash);
    }

    /// The registry never forgets a series, and every revision would leave one behind; so this one
    /// is written by hand.
    fn render_config_info(&self) -> String {
        let (revision, hash) = *lock(&self.config_info);
        format!(
            "# HELP serin_config_info {CONFIG_INFO}\n\
             # TYPE serin_config_info gauge\n\
             serin_config_info{{revision=\"{revision}\",hash=\"{hash:016x}\"}} 1\n"
        )
    }

    /// The number of workers.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// A gauge by name and labels.
    pub fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Gauge {
        self.recorder.register_gauge(&key(name, labels), &METADATA)
    }

    /// A counter by name and labels.
    pub fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        self.recorder
            .register_counter(&key(name, labels), &METADATA)
    }

    /// A level by name and labels, the same one for the same labels.
    pub fn level(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Arc<Level> {
        Arc::clone(lock(&self.gauges).entry(key(name, labels)).or_default())
    }

    /// The number of requests being served in the whole process.
    pub fn in_flight(&self) -> &Level {
        &self.in_flight
    }

    /// Counts a request of this priority that was refused because too many were in flight.
    pub fn count_shed(&self, priority: Priority) {
        self.shed[priority as usize].increment(1);
    }

    /// Where the requests beyond a rate limit of a route are counted.
    pub fn rate_limited(&self, route: &str, limit: &str, mode: Mode) -> Counter {
        let labels = [("route", route), ("limit", limit), ("mode", mode.as_str())];
        from_the_start(&self.recorder, "serin_rate_limited_total", &labels)
    }

    /// Where the keys are counted that a rate limit of a route has forgotten too early.
    pub fn rate_limit_keys_displaced(&self, route: &str, limit: &str) -> Counter {
        let name = "serin_rate_limit_keys_displaced_total";
        from_the_start(&self.recorder, name, &[("route", route), ("limit", limit)])
    }

    /// The sum of all levels of this name.
    pub fn sum(&self, name: &str) -> u64 {
        let gauges = lock(&self.gauges);
        let levels = gauges.iter().filter(|(key, _)| key.name() == name);
        let sum: i64 = levels.map(|(_, level)| level.get()).sum();
        u64::try_from(sum).unwrap_or(0)
    }

    /// Requests that have not ended by now are cut off by us, and not by their clients.
    pub fn ends(&self) {
        self.has_ended.store(true, Ordering::Relaxed);
    }

    /// True once requests are cut off.
    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    /// The handles for requests that no route takes.
    pub fn unrouted(&self) -> &Arc<TargetMetrics> {
        self.unrouted.get_or_init(|| self.route(&NONE.into()))
    }

    /// The handles for requests that a route answers itself.
    pub fn route(&self, route: &Arc<str>) -> Arc<TargetMetrics> {
        let none: Arc<str> = NONE.into();
        self.target(&TargetLabels {
            route: Arc::clone(route),
            backend: Arc::clone(&none),
            version: none,
        })
    }

    /// The handles of a backend on a route, the same ones for the same labels.
    pub fn target(&self, labels: &TargetLabels) -> Arc<TargetMetrics> {
        let mut targets = lock(&self.targets);
        if let Some(known) = targets.get(labels) {
            return Arc::clone(known);
        }
        let created = Arc::new(TargetMetrics {
            requests: Family::default(),
            upstream_errors: Family::default(),
            grpc_responses: Family::default(),
            // There from the start: an increase from nothing is invisible to Prometheus.
            failures: self.counter("serin_request_failures_total", &labels.pairs()),
            request_bytes: self.counter("serin_request_bytes_total", &labels.pairs()),
            response_bytes: self.counter("serin_response_bytes_total", &labels.pairs()),
            retries: Family::default(),
            shielded: Family::default(),
            failovers: Family::default(),
            overflows: Family::default(),
            moved: OnceLock::new(),
            decisions: Default::default(),
            latencies: self.latencies(labels),
            in_flight: self.level("serin_requests_in_flight", &labels.pairs()),
            tunnels: self.level("serin_tunnels_active", &labels.pairs()),
            labels: labels.clone(),
        });
        targets.insert(labels.clone(), Arc::clone(&created));
        created
    }

    /// Forgets the handles that nobody holds any longer. What they counted stays, as
    /// Prometheus expects.
    pub fn prune(&self) {
        lock(&self.targets).retain(|_, target| Arc::strong_count(target) > 1);
        // The registry cannot forget a gauge; it must not show an old level for ever.
        lock(&self.gauges).retain(|key, level| {
            let held = Arc::strong_count(level) > 1;
            if !held {
                self.recorder.register_gauge(key, &METADATA).set(0.0);
            }
            held
        });
    }

    fn latencies(&self, labels: &TargetLabels) -> Arc<Latencies> {
        let mut latencies = lock(&self.latencies);
        let known = latencies.entry(labels.clone()).or_insert_with(|| {
            let empty = || LatencyHistogram::new(&self.buckets, self.workers);
            Arc::new(Latencies {
                request: empty(),
                upstream: empty(),
            })
        });
        Arc::clone(known)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

// === impl TargetMetrics ===

impl TargetMetrics {
    /// What it is counted under.
    pub fn labels(&self) -> &TargetLabels {
        &self.labels
    }

    /// Counts a decision for this target.
    pub fn count_decision(&self, metrics: &Metrics, reason: Reason) {
        let labels = self.labels.with(("reason", reason.as_str()));
        self.decisions[reason as usize]
            .get_or_init(|| metrics.counter("serin_routing_decisions_total", &labels))
            .increment(1);
    }

    /// Counts a finished request and the time it took.
    pub fn count_request(
        &self,
        metrics: &Metrics,
        worker: usize,
        method: MethodLabel,
        status: StatusCode,
        protocol: Protocol,
        duration: Duration,
    ) {
        self.requests
            .get((method, status, protocol), || {
                let [route, backend, version] = self.labels.pairs();
                let tail = [
                    ("method", method.0),
                    ("code", status.as_str()),
                    ("protocol", protocol.as_str()),
                ];
                let [method, code, protocol] = tail;
                metrics.counter(
                    "serin_requests_total",
                    &[route, backend, version, method, code, protocol],
                )
            })
            .increment(1);
        self.latencies.request.record(worker, duration);
    }

    /// Counts the bytes of a finished request's bodies.
    pub fn count_bytes(&self, (from_client, to_client): (u64, u64)) {
        for (counter, bytes) in [
            (&self.request_bytes, from_client),
            (&self.response_bytes, to_client),
        ] {
            if bytes > 0 {
                counter.increment(bytes);
            }
        }
    }

    /// Counts the time until the head of a response stood.
    pub fn count_response_head(&self, worker: usize, duration: Duration) {
        self.latencies.upstream.record(worker, duration);
    }

    /// Counts an attempt that brought no whole response.
    pub fn count_upstream_error(&self, metrics: &Metrics, error: &'static str) {
        let labels = self.labels.with(("error", error));
        self.upstream_errors
            .count(error, metrics, "serin_upstream_errors_total", &labels);
    }

    /// Counts how a call of gRPC has ended.
    pub fn count_grpc(&self, metrics: &Metrics, status: &'static str) {
        let labels = self.labels.and(("grpc_status", status));
        self.grpc_responses
            .count(status, metrics, "serin_grpc_responses_total", &labels);
    }

    /// Counts a request that failed by the version's fault.
    pub fn count_failure(&self) {
        self.failures.increment(1);
    }

    /// Counts a request that was sent to it once more, or would have been if there were not too many.
    pub fn count_retry(&self, metrics: &Metrics, result: &'static str) {
        let labels = self.labels.with(("result", result));
        self.retries
            .count(result, metrics, "serin_retries_total", &labels);
    }

    /// Counts a request that it failed and the baseline answered with this status.
    pub fn count_shielded(&self, metrics: &Metrics, status: StatusCode) {
        self.shielded
            .get(status, || {
                let [route, backend, version] = self.labels.pairs();
                let labels = [route, backend, version, ("code", status.as_str())];
                metrics.counter("serin_shielded_requests_total", &labels)
            })
            .increment(1);
    }

    /// Counts a request that another target gets, since this one takes none for this reason.
    pub fn count_failover(&self, metrics: &Metrics, cause: &'static str) {
        let labels = self.labels.with(("cause", cause));
        self.failovers
            .count(cause, metrics, "serin_failovers_total", &labels);
    }

    /// Counts a request that waited for room at the backend in vain, whatever its route.
    pub fn count_overflow(&self, metrics: &Metrics, cause: &'static str) {
        let labels = [("backend", &*self.labels.backend), ("cause", cause)];
        self.overflows
            .count(cause, metrics, "serin_backend_overflows_total", &labels);
    }

    /// Counts a stream that was ended, since its user gets another version.
    pub fn count_moved(&self, metrics: &Metrics) {
        let [route, backend, _] = self.labels.pairs();
        self.moved
            .get_or_init(|| metrics.counter("serin_streams_moved_total", &[route, backend]))
            .increment(1);
    }

    /// The number of its tunnels.
    pub fn tunnels(&self) -> &Arc<Level> {
        &self.tunnels
    }

    /// The number of its requests in flight.
    pub fn in_flight(&self) -> &Arc<Level> {
        &self.in_flight
    }
}

// === impl TargetLabels ===

impl TargetLabels {
    /// True for requests that no backend gets.
    fn is_none(&self) -> bool {
        *self.backend == *NONE
    }

    /// Those of what differs in something else, whatever the version.
    fn with(&self, other: (&'static str, &'static str)) -> [(&'static str, &str); 3] {
        [("route", &self.route), ("backend", &self.backend), other]
    }

    /// Those of what differs in something else besides.
    fn and(&self, other: (&'static str, &'static str)) -> [(&'static str, &str); 4] {
        let [route, backend, version] = self.pairs();
        [route, backend, version, other]
    }

    fn pairs(&self) -> [(&'static str, &str); 3] {
        [
            ("route", &self.route),
            ("backend", &self.backend),
            ("version", &self.version),
        ]
    }
}

// === impl Level ===

impl Level {
    /// Puts the level up by one for as long as the guard lives.
    pub fn up(self: &Arc<Self>) -> Up {
        self.rise();
        Up(Arc::clone(self))
    }

    /// Puts the level up by one, and tells what it is then; whoever does so owes a
    /// [`fall`](Self::fall).
    pub fn rise(&self) -> i64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Puts the level down by one.
    pub fn fall(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// The level now.
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.0.fall();
    }
}

// === impl MethodLabel ===

impl MethodLabel {
    /// As it is shown.
    pub const fn as_str(self) -> &'static str {
        self.0
    }

    /// True for the method whose responses have no body.
    pub fn is_head(self) -> bool {
        self.0 == "HEAD"
    }
}

impl From<&Method> for MethodLabel {
    /// Methods that are not registered count as `_OTHER`, as OpenTelemetry has it: a client must
    /// not make labels.
    fn from(method: &Method) -> Self {
        Self(match *method {
            Method::GET => "GET",
            Method::HEAD => "HEAD",
            Method::POST => "POST",
            Method::PUT => "PUT",
            Method::DELETE => "DELETE",
            Method::CONNECT => "CONNECT",
            Method::OPTIONS => "OPTIONS",
            Method::TRACE => "TRACE",
            Method::PATCH => "PATCH",
            _ => "_OTHER",
        })
    }
}

// === impl Protocol ===

impl Protocol {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Http2 => "http2",
        }
    }
}

impl From<Version> for Protocol {
    fn from(version: Version) -> Self {
        if version == Version::HTTP_2 {
            Self::Http2
        } else {
            Self::Http1
        }
    }
}

// === impl Definition ===

impl Definition {
    fn describe(&self, recorder: &PrometheusRecorder) {
        let (name, help) = (self.name.into(), self.help.into());
        match self.kind {
            Kind::Counter => recorder.describe_counter(name, self.unit, help),
            Kind::Gauge => recorder.describe_gauge(name, self.unit, help),
        }
    }
}

/// The names of all metrics with what they mean, for the documentation's test.
pub fn documented() -> impl Iterator<Item = (&'static str, &'static str)> {
    let histograms = HISTOGRAMS.iter().map(|one| (one.name, one.help));
    let others = DEFINITIONS
        .iter()
        .map(|definition| (definition.name, definition.help));
    histograms.chain(others)
}

/// What a metric means; nothing for one that there is not.
pub fn help(name: &str) -> &'static str {
    let mut all = documented();
    all.find(|(known, _)| *known == name)
        .map_or("", |(_, help)| help)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A counter that is there before anything is counted: an increase from nothing is invisible to
/// Prometheus.
fn from_the_start(
    recorder: &PrometheusRecorder,
    name: &'static str,
    labels: &[(&'static str, &str)],
) -> Counter {
    let counter = recorder.register_counter(&key(name, labels), &METADATA);
    counter.increment(0);
    counter
}

static METADATA: Metadata<'static> =
    Metadata::new(module_path!(), metrics::Level::INFO, Some(module_path!()));

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    let labels: Vec<Label> = labels
        .iter()
        .map(|(name, value)| Label::new(*name, (*value).to_owned()))
        .collect();
    Key::from_parts(name, labels)
}

/// The counters of one metric that differ in a label known only when a request ends.
///
/// A list that only grows, read without a lock: a backend answers with few codes to few methods, so
/// the counter wanted is among the first, and a miss is rare enough to register a new one on the
/// spot.
#[derive(Debug)]
struct Family<K> {
    first: OnceLock<Box<Member<K>>>,
}

#[derive(Debug)]
struct Member<K> {
    key: K,
    counter: Counter,
    next: OnceLock<Box<Self>>,
}

impl<K> Default for Family<K> {
    fn default() -> Self {
        Self {
            first: OnceLock::new(),
        }
    }
}

impl<K: Copy + PartialEq> Family<K> {
    /// Counts one; registers the counter by name and labels when it is the first.
    fn count(
        &self,
        key: K,
        metrics: &Metrics,
        name: &'static str,
        labels: &[(&'static str, &str)],
    ) {
        self.get(key, || metrics.counter(name, labels)).increment(1);
    }

    fn get(&self, key: K, register: impl Fn() -> Counter) -> &Counter {
        let mut slot = &self.first;
        loop {
            // Another thread may win the slot for another key; then the search goes on behind it.
            let member = slot.get_or_init(|| {
                Box::new(Member {
                    key,
                    counter: register(),
                    next: OnceLock::new(),
                })
            });
            if member.key == key {
                return &member.counter;
            }
            slot = &member.next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(metrics: &Metrics) -> Arc<TargetMetrics> {
        metrics.target(&TargetLabels {
            route: "shop".into(),
            backend: "canary".into(),
            version: "2".into(),
        })
    }

    #[test]
    fn a_request_is_counted_once_under_its_labels() {
        let metrics = Metrics::new(&[], 1);
        let target = target(&metrics);
        for code in [200, 200, 503] {
            let status = StatusCode::from_u16(code).unwrap();
            let method = MethodLabel::from(&Method::GET);
            target.count_request(
                &metrics,
                0,
                method,
                status,
                Protocol::Http1,
                Duration::from_millis(3),
            );
        }
        let text = metrics.render();
        let labels = r#"route="shop",backend="canary",version="2""#;
        assert!(
            text.contains(&format!(
                "serin_requests_total{{{labels},method=\"GET\",code=\"200\",protocol=\"http1\"}} 2"
            )),
            "{text}"
        );
        assert!(text.contains(&format!(
            "serin_requests_total{{{labels},method=\"GET\",code=\"503\",protocol=\"http1\"}} 1"
        )));
        assert!(text.contains(&format!(
            "serin_request_duration_seconds_bucket{{{labels},le=\"0.005\"}} 3"
        )));
    }

    #[test]
    fn latencies_are_there_before_requests_unless_there_are_very_many() {
        let metrics = Metrics::new(&[], 1);
        let route = metrics.route(&"shop".into());
        let count = |text: &str| text.matches("serin_request_duration_seconds_count").count();
        let mut held = vec![target(&metrics)];
        let text = metrics.render();
        assert!(text.contains(
            "_duration_seconds_count{route=\"shop\",backend=\"canary\",version=\"2\"} 0\n"
        ));
        assert_eq!(count(&text), 1, "none for what no backend gets");
        for number in 0..MOST_EMPTY {
            held.push(metrics.target(&TargetLabels {
                route: number.to_string().into(),
                ..held[0].labels().clone()
            }));
        }
        assert_eq!(count(&metrics.render()), 0);
        let ok = (MethodLabel("GET"), StatusCode::OK, Protocol::Http1);
        route.count_request(&metrics, 0, ok.0, ok.1, ok.2, Duration::ZERO);
        assert_eq!(count(&metrics.render()), 1);
    }

    #[test]
    fn levels_follow_their_guards_and_handles_survive() {
        let metrics = Metrics::new(&[], 1);
        let up = target(&metrics).in_flight().up();
        assert!(
            metrics.render().contains(
                r#"serin_requests_in_flight{route="shop",backend="canary",version="2"} 1"#
            )
        );
        drop(up);
        metrics.prune();
        assert!(
            metrics.render().contains(
                r#"serin_requests_in_flight{route="shop",backend="canary",version="2"} 0"#
            )
        );
    }

    #[test]
    fn clients_cannot_make_labels() {
        let method = Method::from_bytes(b"X-RANDOM-123").unwrap();
        assert_eq!(MethodLabel::from(&method), MethodLabel("_OTHER"));
    }

    #[test]
    fn every_metric_has_its_help_and_type() {
        let metrics = Metrics::new(&[], 1);
        target(&metrics).count_decision(&metrics, Reason::Rule);
        let text = metrics.render();
        assert!(text.contains("# HELP serin_routing_decisions_total "));
        assert!(text.contains("# TYPE serin_build_info gauge"));
        for (name, help) in documented() {
            assert!(name.starts_with("serin_") && help.ends_with('.'), "{name}");
        }
    }
}
