//! What happens when endpoints fail, and how much of it a backend takes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DURATION_PATTERN, Size};

/// Asks the endpoints of a backend regularly whether they are well: one of `http`, `tcp` and `grpc`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HealthCheck {
    /// By a GET.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpCheck>,
    /// By a connection, with TLS where the backend has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpCheck>,
    /// By the health checking protocol of gRPC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcCheck>,
    /// From one question to the next, a tenth more or less by lot (default 5s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub interval: Option<String>,
    /// How long an answer may take (default 2s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub timeout: Option<String>,
    /// Good answers in a row that make an unhealthy endpoint healthy (default 2). The first answer of
    /// a new endpoint decides alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub healthy_after: Option<u32>,
    /// Bad answers in a row that make a healthy endpoint unhealthy (default 3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub unhealthy_after: Option<u32>,
}

/// A GET that an endpoint has to answer.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpCheck {
    /// The path, with a query if need be.
    pub path: String,
    /// The `Host` (default: the endpoint's address).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// The status codes that are good answers (default: 200 to 299).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub statuses: Vec<u16>,
}

/// A connection that an endpoint has to accept.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TcpCheck {}

/// A call of `grpc.health.v1.Health/Check`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GrpcCheck {
    /// The service that is asked for (default: the whole server).
    #[serde(default)]
    pub service: String,
}

/// Ejects endpoints that do badly with requests. It is on by default.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutlierDetection {
    /// Ejects nobody.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disabled: bool,
    /// Ejects an endpoint after so many failures in a row: 5xx, connections that fail or break, and
    /// timeouts (default 5; 0: never by this).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consecutive_failures: Option<u32>,
    /// How often endpoints are compared with each other (default 10s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub interval: Option<String>,
    /// How long the first ejection takes; the second twice as long, and so on (default 30s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub ejection: Option<String>,
    /// The longest (default 300s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub max_ejection: Option<String>,
    /// The most of the backend's endpoints that are ejected at a time, in percent (default 50 for the
    /// baseline of some route, else 100).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub max_ejected_percent: Option<u32>,
    /// An endpoint with fewer requests in an interval is not compared (default 100).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10))]
    pub min_requests: Option<u32>,
    /// Ejects an endpoint whose share of failures is larger than that of the others by so many percent
    /// of its requests (default 10; 0: never by this).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub failure_excess_percent: Option<u32>,
    /// Ejects an endpoint whose latency is so many times that of the others (default 5; 0: never by
    /// this).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000))]
    pub latency_factor: Option<u32>,
}

/// How much a backend takes at a time, so that a stuck version cannot hold up the others.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackendLimits {
    /// Requests at a time (default 8192 for the baseline of some route, else 1024); others wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub in_flight: Option<u32>,
    /// Requests that wait (default 1024); others get 503, or the baseline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u32>,
    /// How long one waits (default 1s for the baseline of some route, else 25ms).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub queue_timeout: Option<String>,
    /// Connections to all endpoints, idle ones among them, divided evenly among the workers, at least
    /// one for each (default: no limit). A request that finds none waits as in the queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub connections: Option<u32>,
}

/// Which failed requests are sent once more to the same version, to another endpoint if there is one.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Retry {
    /// So often at most (default 1; 0: never). Requests of which nothing was sent are repeated
    /// whatever their method; those that broke off or timed out only with an idempotent one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 10))]
    pub attempts: Option<u32>,
    /// Statuses of responses for which a request with an idempotent method is repeated, if there is
    /// another endpoint; 504 stands for no answer in time as well (default 502, 503 and 504).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub codes: Option<Vec<u16>>,
    /// A pause before the first repetition, twice as long before the second, by lot between a half and
    /// the whole of it (default 25ms). There is none when another endpoint gets what none has seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub backoff: Option<String>,
    /// Repetitions among the requests in flight of a backend, in percent (default 20); three are
    /// allowed at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub budget_percent: Option<u32>,
    /// The bytes of a request's body that are kept to be sent again (default 64Ki); with more, a
    /// request is not repeated once its body is on its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body_buffer: Option<Size>,
}

/// What becomes of the users of a version that takes no requests: disabled, without endpoints, or
/// without one that is well.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Failover {
    /// Users of other versions get the baseline (default true); else 503.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_baseline: Option<bool>,
    /// Users of the baseline get this version (default: 503).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_baseline: Option<String>,
}

/// What becomes of long-lived streams (tunnels, server-sent events, and calls of gRPC whose response
/// has begun) when a change of weights or backends gives their user another version.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Streams {
    /// What (default `pin`).
    #[serde(default)]
    pub when_moved: WhenMoved,
    /// How long they may go on with `drain` (default 30s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub deadline: Option<String>,
}

/// What becomes of a long-lived stream whose user gets another version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum WhenMoved {
    /// It stays until it ends.
    #[default]
    Pin,
    /// It may go on for the `deadline`.
    Drain,
    /// It ends at once.
    Cut,
}

/// Requests that failed with another version than the baseline are answered by the baseline, and
/// still count as failures of that version.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Shield {
    /// Which requests (default `idempotent`).
    #[serde(default)]
    pub requests: ShieldedRequests,
    /// Statuses of responses that count as failed here (default 500, 502, 503 and 504). Clients who
    /// named the version themselves get its responses as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub codes: Option<Vec<u16>>,
}

/// Which requests are answered by the baseline when another version fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ShieldedRequests {
    /// Those of which nothing was sent, and those with an idempotent method.
    #[default]
    Idempotent,
    /// Those of which nothing was sent.
    Unsent,
    /// None.
    None,
}
