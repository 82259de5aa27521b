//! What operators are shown of the traffic: metrics, the access log, traces.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BackendTls, DURATION_PATTERN, Size};

/// What is measured, and how finely.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Telemetry {
    /// Upper bounds of the latency histograms in seconds, ascending. A change needs a restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_buckets: Option<Vec<f64>>,
}

/// A line for each request.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessLog {
    /// `stdout`, or the name of a file, relative to the configuration file. SIGUSR1 opens the file
    /// anew, after it has been renamed.
    pub output: String,
    /// How lines are written (default `json`).
    #[serde(default)]
    pub format: LogFormat,
    /// How the user's id is written (default `hash`).
    #[serde(default)]
    pub user: LogUser,
    /// When a file is full, and what becomes of it (default: never; SIGUSR1 opens it anew).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<LogRotation>,
    /// Which lines are written: the first entry that fits a request says how many of its kind (default: all
    /// are). Those of requests that failed are written in any case.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sampling: Vec<LogSampling>,
}

/// When a file of lines is full, and what becomes of it.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LogRotation {
    /// It is full with so many bytes.
    pub size: Size,
    /// How many full ones are kept, as `NAME.1` and so on, the latest first (default 5).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub keep: Option<u32>,
}

/// Requests of some kind, and how many of their lines are written. All that is given must hold; of several
/// values of one key any may.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LogSampling {
    /// Requests of these routes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<String>,
    /// Requests that were decided on these backends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backends: Vec<String>,
    /// Requests for these paths and all below, as the client sends them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
    /// Requests that were answered with these statuses, such as `404` or `4xx`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub statuses: Vec<StatusRange>,
    /// Requests that took longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub slower_than: Option<String>,
    /// The part of them, from 0 to 1, whose lines are written.
    #[schemars(range(min = 0, max = 1))]
    pub ratio: f64,
}

/// Statuses: one, or a hundred of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRange {
    /// The first.
    pub first: u16,
    /// The last.
    pub last: u16,
}

/// Spans of requests, by OTLP. What is not given here is taken from the variables of the environment that
/// OpenTelemetry has for it.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tracing {
    /// The collector, as an `http` or `https` URL (default: `OTEL_EXPORTER_OTLP_ENDPOINT`, or this machine).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// How it is spoken with (default: `OTEL_EXPORTER_OTLP_PROTOCOL`, or `grpc` where the port is 4317, and
    /// else `http`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<TraceProtocol>,
    /// What is sent along with every export (default: `OTEL_EXPORTER_OTLP_HEADERS`, which is the place for
    /// secrets).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// What it is connected to with, if the URL is an `https` one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<BackendTls>,
    /// How long an export may take (default: `OTEL_EXPORTER_OTLP_TIMEOUT`, or 10s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub timeout: Option<String>,
    /// Which requests are exported.
    #[serde(default)]
    pub sampling: TraceSampling,
    /// Attributes of the resource, beside `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES`
    /// (default of `service.name`: `serin`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub resource: BTreeMap<String, String>,
    /// How many requests may wait to be exported; the spans of others are dropped and counted (default:
    /// `OTEL_BSP_MAX_QUEUE_SIZE`, or 2048).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000000))]
    pub queue: Option<u32>,
}

/// How a collector is spoken with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum TraceProtocol {
    /// OTLP/gRPC.
    Grpc,
    /// OTLP/HTTP, with protobuf.
    Http,
}

/// Which requests are exported.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TraceSampling {
    /// The part, from 0 to 1, of those requests that nobody has decided about (default:
    /// `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG`, or 0.01).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    pub ratio: Option<f64>,
    /// Whether those that fail are exported all the same (default true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errors: Option<bool>,
    /// Whose decision is followed (default `trusted`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub callers: Option<TraceCallers>,
}

/// Whose decision to sample a request is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum TraceCallers {
    /// That of everybody who sends `traceparent`.
    All,
    /// That of the listener's `trustedProxies`: others could have all of their requests sampled.
    Trusted,
    /// Nobody's.
    None,
}

/// How a line of the access log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum LogFormat {
    /// A JSON object.
    #[default]
    Json,
    /// The same fields as `key=value` (logfmt).
    Text,
}

/// How the user's id is written into the access log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum LogUser {
    /// Its XXH3 hash, a pseudonym: lines of one user belong together, and whoever knows the id can
    /// find them.
    #[default]
    Hash,
    /// As it is.
    Plain,
    /// Not at all.
    Omit,
}

// === impl StatusRange ===

impl StatusRange {
    fn parse(text: &str) -> Option<Self> {
        let (first, last) = match text.strip_suffix("xx") {
            Some(class) => {
                let first = class.parse::<u16>().ok()?.checked_mul(100)?;
                (first, first.checked_add(99)?)
            }
            None => {
                let status = text.parse().ok()?;
                (status, status)
            }
        };
        (100..=599).contains(&first).then_some(Self { first, last })
    }
}

impl Serialize for StatusRange {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self { first, last } if first == last => serializer.serialize_u16(first),
            Self { first, .. } => serializer.collect_str(&format_args!("{}xx", first / 100)),
        }
    }
}

impl<'de> Deserialize<'de> for StatusRange {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let range = match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) => Self::parse(&text),
            serde_json::Value::Number(number) => Self::parse(&number.to_string()),
            _ => None,
        };
        range.ok_or_else(|| D::Error::custom("expected a status such as `404`, or `4xx`"))
    }
}

impl JsonSchema for StatusRange {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "StatusRange".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "A status, or a class of them: `404`, `4xx`.",
            "oneOf": [
                { "type": "integer", "minimum": 100, "maximum": 599 },
                { "type": "string", "pattern": "^[1-5]([0-9][0-9]|xx)$" },
            ],
        })
    }
}
