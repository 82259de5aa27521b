//! The shape of the configuration file, and nothing else: what its keys are called and what type
//! they have.
//!
//! These types have no behaviour. `check` turns them into a
//! [`Config`](super::Config), which cannot be wrong; the JSON Schema of the file is generated from
//! them. Words are those of the Gateway API where it has one.

mod backend;
mod dns;
mod filter;
mod gray;
mod limit;
mod listener;
mod resilience;
mod route;
mod telemetry;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use backend::{
    Backend, BackendHttp1, BackendHttp2, BackendProtocol, BackendTimeouts, BackendTls, HeaderEdits,
    Pool, ProxyProtocolVersion,
};
pub use dns::Dns;
pub use filter::{
    Cors, Filter, FilterType, HeaderModifier, NamedValue, PathModifier, PathModifierType,
    RequestRedirect, Scheme, UrlRewrite,
};
pub use gray::{Gray, IdentityFrom, IdentitySource, JwtClaim, Override, Rule, WithoutIdentity};
pub use limit::{Overload, Priority, RateLimit, RateLimitBy, RateLimitMode, WithoutKey};
pub use listener::{
    CertificateRef, ClientCa, ClientCertificateMode, Listener, ListenerDefaults, ListenerHttp2,
    ListenerLimits, ListenerTimeouts, ListenerTls, TlsVersion,
};
pub use resilience::{
    BackendLimits, Failover, GrpcCheck, HealthCheck, HttpCheck, OutlierDetection, Retry, Shield,
    ShieldedRequests, Streams, TcpCheck, WhenMoved,
};
pub use route::{
    BackendRef, EscapedSlashes, NamedMatch, PathMatch, PathMatchType, Route, RouteLimits,
    RouteMatch, RouteTimeouts, Transcode, ValueMatchType,
};
pub use telemetry::{
    AccessLog, LogFormat, LogRotation, LogSampling, LogUser, StatusRange, Telemetry, TraceCallers,
    TraceProtocol, TraceSampling, Tracing,
};

/// Durations as the Gateway API writes them (GEP-2257): up to four numbers of up to five digits
/// with a unit each.
pub const DURATION_PATTERN: &str = "^([0-9]{1,5}(h|m|s|ms)){1,4}$";

/// Serin's configuration file.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ConfigFile {
    /// Where requests come in.
    pub listeners: Vec<Listener>,
    /// What holds for every listener that does not say otherwise.
    #[serde(default)]
    pub listener_defaults: ListenerDefaults,
    /// Where operators, Prometheus and probes come in.
    #[serde(default)]
    pub admin: Admin,
    /// Worker threads: `auto` (one per core) or a number. A change needs a restart.
    #[serde(default)]
    pub workers: Workers,
    /// How many clients may be connected.
    #[serde(default)]
    pub connections: Connections,
    /// What happens on SIGTERM.
    #[serde(default)]
    pub shutdown: Shutdown,
    /// The file in which weights that are set through the admin API outlive the process (default: they do not).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_file: Option<String>,
    /// Where the revisions of this file are kept that were in force (default: nowhere).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<History>,
    /// How many requests are served at a time.
    #[serde(default)]
    pub overload: Overload,
    /// What is measured, and how finely.
    #[serde(default)]
    pub telemetry: Telemetry,
    /// A line for each request (default: none is written).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_log: Option<AccessLog>,
    /// Spans of requests for a collector of OpenTelemetry (default: none).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracing: Option<Tracing>,
    /// How names of endpoints are resolved.
    #[serde(default)]
    pub dns: Dns,
    /// One entry per version of a service: its upstream pool.
    #[serde(default)]
    pub backends: Vec<Backend>,
    /// Lists of user ids, each in a file of its own that is watched.
    #[serde(default)]
    pub user_lists: Vec<UserList>,
    /// Which requests go where.
    pub routes: Vec<Route>,
}

/// The admin listener: probes, metrics, the API.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Admin {
    /// `IP:port` (default `127.0.0.1:9901`). A change needs a restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Accepts TLS, and nothing else (default: without TLS).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ListenerTls>,
    /// Who may change weights (default: nobody). Everybody who reaches the listener may read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub writers: Vec<AdminWriter>,
}

/// Somebody who may change weights, and shows a token or a certificate.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AdminWriter {
    /// What the log calls it.
    pub name: String,
    /// The file that holds its bearer token, of 32 characters or more, relative to this file. It is followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<String>,
    /// The subject of its certificate, which one of `tls.clientCa` has signed, such as `CN=flagger, O=ops`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_subject: Option<String>,
}

/// A number of bytes, written as Kubernetes does: `8192`, `32Ki`, `10Mi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// The number of worker threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Workers {
    /// One per core that the process may use.
    #[default]
    Auto,
    /// This many.
    Exactly(u16),
}

/// Where the revisions of this file are kept that were in force.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct History {
    /// A directory, relative to this file; it is made if it is not there.
    pub directory: String,
    /// How many; the oldest are deleted (default 20).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub keep: Option<u32>,
}

/// How many clients may be connected.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Connections {
    /// Connections of clients at a time, on all listeners together; others wait until one ends
    /// (default: half of the file descriptors that the process does not need otherwise). A change
    /// needs a restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max: Option<u32>,
}

/// What happens on SIGTERM.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Shutdown {
    /// How long it may take until the process ends (default 25s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub timeout: Option<String>,
    /// How long, as a part of that, connections are still taken, and told to come again elsewhere
    /// (default 5s, or half of `timeout` if that is shorter).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub lame_duck: Option<String>,
}

/// A list of user ids in a file, exact and reloaded on its own.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UserList {
    /// Its name in routes, logs and metrics.
    pub name: String,
    /// The file, relative to the configuration file.
    pub file: String,
    /// How the file is written (default `lines`).
    #[serde(default)]
    pub format: ListFormat,
    /// The CSV column, or the field of JSON objects, that holds the id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// Who answers for the list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The day, as `YYYY-MM-DD`, from which the list should be gone. It goes on working; `check`
    /// and a metric say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date"))]
    pub expires: Option<String>,
}

/// How a user list is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ListFormat {
    /// One id per line; `#` begins a comment line.
    #[default]
    Lines,
    /// Comma-separated values with a header row.
    Csv,
    /// An array of strings, or of objects.
    Json,
}

/// The JSON Schema of the file, for editors.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(ConfigFile);
    // A schema is a JSON value already, so this cannot fail.
    serde_json::to_string_pretty(&schema).unwrap_or_default() + "\n"
}

// === impl Size ===

impl Size {
    const UNITS: [(&'static str, u64); 3] = [("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1 << 30)];

    fn parse(text: &str) -> Option<Self> {
        let unit = Self::UNITS
            .into_iter()
            .find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, bytes)));
        let (number, bytes) = unit.unwrap_or((text, 1));
        if !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        number.parse::<u64>().ok()?.checked_mul(bytes).map(Self)
    }
}

impl Serialize for Size {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let size = match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) => Self::parse(&text),
            serde_json::Value::Number(number) => number.as_u64().map(Self),
            _ => None,
        };
        size.ok_or_else(|| D::Error::custom("expected bytes, such as `8192`, `32Ki` or `10Mi`"))
    }
}

impl JsonSchema for Size {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "Bytes, as a number or with a unit: `8192`, `32Ki`, `10Mi`, `1Gi`.",
            "oneOf": [
                { "type": "integer", "minimum": 0 },
                { "type": "string", "pattern": "^[0-9]+(Ki|Mi|Gi)?$" },
            ],
        })
    }
}

// === impl Workers ===

impl Serialize for Workers {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Exactly(count) => serializer.serialize_u16(*count),
        }
    }
}

impl<'de> Deserialize<'de> for Workers {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) if text == "auto" => Ok(Self::Auto),
            serde_json::Value::Number(number) => number
                .as_u64()
                .and_then(|count| u16::try_from(count).ok())
                .filter(|count| (1..=1024).contains(count))
                .map(Self::Exactly)
                .ok_or_else(|| D::Error::custom("expected `auto` or a number from 1 to 1024")),
            _ => Err(D::Error::custom(
                "expected `auto` or a number from 1 to 1024",
            )),
        }
    }
}

impl JsonSchema for Workers {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Workers".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "The number of worker threads.",
            "oneOf": [{ "const": "auto" }, { "type": "integer", "minimum": 1, "maximum": 1024 }],
        })
    }
}
