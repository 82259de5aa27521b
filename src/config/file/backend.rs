//! The upstream pools, and how their endpoints are spoken with.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BackendLimits, DURATION_PATTERN, HealthCheck, OutlierDetection, Size};

/// One version of a service: its upstream pool.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Backend {
    /// Its name in routes, logs and metrics.
    pub name: String,
    /// The version it runs, shown in metrics and on the response where a route says so.
    #[serde(default)]
    pub version: String,
    /// Its servers: `IP:port`, `host:port` (every address of the host), or `srv:` and the name of a
    /// service. May be empty: its users then get the baseline. Required without `endpointsFile`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<Vec<String>>,
    /// A file with a list of more of them, in YAML or JSON, relative to the configuration file. It
    /// is followed on its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoints_file: Option<String>,
    /// The kill switch: never chosen; its users get the baseline.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disabled: bool,
    /// Changes to the request on its way to this backend.
    #[serde(default, skip_serializing_if = "HeaderEdits::is_empty")]
    pub request_headers: HeaderEdits,
    /// Changes to the response on its way back.
    #[serde(default, skip_serializing_if = "HeaderEdits::is_empty")]
    pub response_headers: HeaderEdits,
    /// What is spoken with its endpoints (default: `http1`, and with `tls` what they agree on).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<BackendProtocol>,
    /// Connects to its endpoints with TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<BackendTls>,
    /// Says who the client is at the beginning of each connection, which then is for one request
    /// (default: it does not).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocolVersion>,
    /// How long its endpoints may take.
    #[serde(default)]
    pub timeouts: BackendTimeouts,
    /// The connections kept open to each endpoint.
    #[serde(default)]
    pub pool: Pool,
    /// How HTTP/1.1 is spoken with its endpoints.
    #[serde(default)]
    pub http1: BackendHttp1,
    /// How HTTP/2 is spoken with its endpoints.
    #[serde(default)]
    pub http2: BackendHttp2,
    /// Asks its endpoints regularly whether they are well (default: they are not asked). A new endpoint
    /// gets no requests before its first good answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// Ejects endpoints that do badly with requests.
    #[serde(default)]
    pub outlier_detection: OutlierDetection,
    /// With fewer than so many percent of its endpoints well, all of them get requests (default 50 for
    /// the baseline of some route, else 0: nobody is sent to endpoints that are not well).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub panic_threshold_percent: Option<u32>,
    /// How long an endpoint that is let in again takes to get its full part of the requests (default
    /// 10s; 0s: it gets it at once).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub slow_start: Option<String>,
    /// How much it takes at a time.
    #[serde(default)]
    pub limits: BackendLimits,
}

/// What is spoken with the endpoints of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum BackendProtocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 over TLS; an endpoint that does not agree on it is not used.
    H2,
    /// HTTP/2 without TLS, by prior knowledge.
    H2c,
    /// What the endpoint agrees on by ALPN; needs `tls`.
    Auto,
}

/// A version of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ProxyProtocolVersion {
    /// A line of text.
    V1,
    /// Bytes.
    V2,
}

/// What endpoints are connected to with.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackendTls {
    /// The name that is asked for and that the certificate must be for (default: the host that the
    /// endpoint is named by, or its address).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// The certificates in PEM of the authorities that may have signed it, relative to the
    /// configuration file (default: those that the system trusts).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<String>,
    /// Our own certificate in PEM, for endpoints that ask for one; needs `keyFile`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_file: Option<String>,
    /// Its private key in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_file: Option<String>,
    /// Believes every certificate: whoever can reach the network between can read and change
    /// everything.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub insecure_skip_verify: bool,
}

/// How HTTP/1.1 is spoken with the endpoints of a backend.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackendHttp1 {
    /// The bytes of one response that the kernel may hold for a slow client, 64Ki or more, up to twice as many as
    /// it counts them (default 128Ki); 0 leaves it to the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receive_buffer: Option<Size>,
}

/// How HTTP/2 is spoken with the endpoints of a backend.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackendHttp2 {
    /// The requests of one connection, after which another one is opened (default 100); never more
    /// than four fifths of what the endpoint allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub max_concurrent_streams: Option<u32>,
    /// The bytes of one response that may be on their way, or wait for the client (default 256Ki).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_window: Option<Size>,
    /// The same for all responses of a connection (default 16Mi).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection_window: Option<Size>,
    /// The bytes of a request that wait for a slow endpoint (default 64Ki).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_buffer: Option<Size>,
    /// The bytes of a response head (default 32Ki).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header_list: Option<Size>,
}

/// Changes to a header section: first `remove`, then `set`, then `add`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HeaderEdits {
    /// Gives these headers exactly this value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub set: BTreeMap<String, String>,
    /// Adds these beside what is there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub add: BTreeMap<String, String>,
    /// Takes these away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
}

/// How long the endpoints of a backend may take.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackendTimeouts {
    /// Until a connection stands (default 2s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub connect: Option<String>,
}

/// The idle connections kept open to each endpoint, by each worker.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pool {
    /// An unused connection is closed after this long; keep it below the server's own limit
    /// (default 20s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub idle_timeout: Option<String>,
    /// At most this many unused connections (default 256).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_idle: Option<u32>,
}

// === impl HeaderEdits ===

impl HeaderEdits {
    /// True when nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }
}
