//! The shape of the configuration file, and nothing else: what its keys are called and what type
//! they have.
//!
//! These types have no behaviour. `check` turns them into a
//! [`Config`](super::Config), which cannot be wrong; the JSON Schema of the file is generated from
//! them. Words are those of the Gateway API where it has one.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    /// What happens on SIGTERM.
    #[serde(default)]
    pub shutdown: Shutdown,
    /// What is measured, and how finely.
    #[serde(default)]
    pub telemetry: Telemetry,
    /// A line for each request (default: none is written).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_log: Option<AccessLog>,
    /// One entry per version of a service: its upstream pool.
    #[serde(default)]
    pub backends: Vec<Backend>,
    /// Lists of user ids, each in a file of its own that is watched.
    #[serde(default)]
    pub user_lists: Vec<UserList>,
    /// Which requests go where.
    pub routes: Vec<Route>,
}

/// A socket that takes requests.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Listener {
    /// Its name in logs and metrics.
    pub name: String,
    /// `IP:port`, as in `0.0.0.0:8080` or `[::]:8080`.
    pub address: String,
    /// CIDRs of the proxies in front of Serin. Only they are believed about X-Forwarded-* and, on
    /// routes with `identityFrom: trusted`, about who the user is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trusted_proxies: Vec<String>,
    /// How many proxies in front of Serin append to X-Forwarded-For: the client is that many entries
    /// from its right end (default: the first from the right that is not in `trustedProxies`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub trusted_hops: Option<u32>,
    /// Connections from `trustedProxies` begin with a header of the PROXY protocol, version 1 or 2,
    /// that says who the client is; others may not have one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub proxy_protocol: bool,
    /// Accepts TLS connections only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ListenerTls>,
    /// How long its clients may take.
    #[serde(default)]
    pub timeouts: ListenerTimeouts,
    /// How much its clients may send.
    #[serde(default)]
    pub limits: ListenerLimits,
    /// How HTTP/2 is spoken with its clients.
    #[serde(default)]
    pub http2: ListenerHttp2,
}

/// What holds for every listener that does not say otherwise.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListenerDefaults {
    /// How long clients may take.
    #[serde(default)]
    pub timeouts: ListenerTimeouts,
    /// How much clients may send.
    #[serde(default)]
    pub limits: ListenerLimits,
    /// How HTTP/2 is spoken with clients.
    #[serde(default)]
    pub http2: ListenerHttp2,
}

/// What a listener accepts TLS connections with.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListenerTls {
    /// Its certificates. The first is also for clients that ask for a name that none has.
    pub certificates: Vec<CertificateRef>,
    /// The oldest version that is spoken (default `1.2`).
    #[serde(default)]
    pub min_version: TlsVersion,
    /// Which certificates clients are asked for (default: none).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<ClientCa>,
}

/// A certificate with its key.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CertificateRef {
    /// The chain in PEM, leaf first, relative to the configuration file.
    pub certificate_file: String,
    /// The private key in PEM, relative to the configuration file.
    pub key_file: String,
    /// The names that it is presented for (default: those in the certificate).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hostnames: Vec<String>,
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum TlsVersion {
    /// TLS 1.2.
    #[default]
    #[serde(rename = "1.2")]
    V1_2,
    /// TLS 1.3.
    #[serde(rename = "1.3")]
    V1_3,
}

/// Which certificates clients are asked for.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClientCa {
    /// The certificates in PEM of the authorities that may have signed them, relative to the
    /// configuration file.
    pub file: String,
    /// Whether a client may come without one (default `required`).
    #[serde(default)]
    pub mode: ClientCertificateMode,
    /// The request header in which the subject of the certificate is passed on. What clients send
    /// in it is removed (default: it is not passed on).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject_header: Option<String>,
}

/// Whether a client may come without a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum ClientCertificateMode {
    /// It may not.
    #[default]
    Required,
    /// It may; one that it shows must be sound.
    Optional,
}

/// How long a client of a listener may take.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListenerTimeouts {
    /// For the TLS handshake (default 10s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub tls_handshake: Option<String>,
    /// Until the first byte of a new connection (default 10s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub first_byte: Option<String>,
    /// From the first byte of a request head to its end (default 15s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub request_head: Option<String>,
    /// Between requests: a connection without any for this long is closed (default 60s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub idle: Option<String>,
    /// Between two parts of a request body, while the upstream would take more (default 30s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub request_body: Option<String>,
    /// While a client takes nothing of a response (default 30s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub write: Option<String>,
}

/// How much a client of a listener may send.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListenerLimits {
    /// The bytes of a request head (default 32Ki); more get 431.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_head: Option<Size>,
    /// The header fields of a request (default 100); more get 431.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub header_fields: Option<u32>,
    /// The bytes of a request target (default 8Ki); more get 414.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<Size>,
    /// The bytes of a request body (default: no limit); more get 413.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_body: Option<Size>,
}

/// How HTTP/2 is spoken with clients.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListenerHttp2 {
    /// The requests that one connection may have open at a time (default 100).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub max_concurrent_streams: Option<u32>,
    /// The bytes of one request that may be on their way, or wait for the upstream (default 256Ki).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_window: Option<Size>,
    /// The same for all requests of a connection (default 1Mi).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection_window: Option<Size>,
    /// The bytes of a response that wait for a slow client (default 64Ki).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_buffer: Option<Size>,
}

/// The admin listener: probes, metrics, the API.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Admin {
    /// `IP:port` (default `127.0.0.1:9901`). A change needs a restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
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

/// What happens on SIGTERM.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Shutdown {
    /// How long requests in flight may take to finish (default 25s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub timeout: Option<String>,
}

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

/// One version of a service: its upstream pool.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Backend {
    /// Its name in routes, logs and metrics.
    pub name: String,
    /// The version it runs, shown in metrics and on the response where a route says so.
    #[serde(default)]
    pub version: String,
    /// `IP:port` of each server. May be empty: its users then get the baseline.
    pub endpoints: Vec<String>,
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
    /// How HTTP/2 is spoken with its endpoints.
    #[serde(default)]
    pub http2: BackendHttp2,
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
    /// The name that is asked for and that the certificate must be for (default: the endpoint's
    /// address).
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

/// Which requests go where.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Route {
    /// Its name in logs and metrics.
    pub name: String,
    /// Hosts it serves: exact, or `*.` and a suffix. None means any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hostnames: Vec<String>,
    /// Requests it takes; one of them must hold. None means all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<RouteMatch>,
    /// The versions it splits among; the first is the baseline. Only a redirect needs none.
    #[serde(default)]
    pub backend_refs: Vec<BackendRef>,
    /// What becomes of its requests and responses, as in the Gateway API.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<Filter>,
    /// Lets clients that know HTTP and JSON alone call a service of gRPC (default: it does not).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transcode: Option<Transcode>,
    /// Paths with an escaped slash (`%2F`), which some servers take for a slash and others do not
    /// (default `refuse`: 400).
    #[serde(default)]
    pub escaped_slashes: EscapedSlashes,
    /// How much its clients may send.
    #[serde(default)]
    pub limits: RouteLimits,
    /// How long an exchange may take.
    #[serde(default)]
    pub timeouts: RouteTimeouts,
    /// Who gets which version.
    #[serde(default)]
    pub gray: Gray,
    /// Sends `X-Service-Version` with the response.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub expose_version: bool,
}

/// Lets clients that know HTTP and JSON alone call a service of gRPC, by its `google.api.http`
/// annotations. Calls of gRPC pass as they are.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Transcode {
    /// The definition, as `protoc --include_imports --descriptor_set_out` writes it, relative to the
    /// configuration file.
    pub descriptor_set: String,
    /// The services, with their packages, as in `shop.v1.Catalog`.
    pub services: Vec<String>,
}

/// What becomes of paths with an escaped slash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum EscapedSlashes {
    /// They get 400.
    #[default]
    Refuse,
    /// They are sent on as they are; the endpoint must not take them for slashes.
    Keep,
}

/// How much clients of a route may send.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouteLimits {
    /// The bytes of a request body (default: what the listener says); more get 413.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_body: Option<Size>,
}

/// What becomes of the requests and responses of a route: exactly one of these.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Filter {
    /// Which one, as the Gateway API writes beside it (default: the one that is there).
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<FilterType>,
    /// Changes to the head of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_header_modifier: Option<HeaderModifier>,
    /// Changes to the head of the response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_header_modifier: Option<HeaderModifier>,
    /// Another host or path for the endpoint.
    #[serde(
        rename = "urlRewrite",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub url_rewrite: Option<UrlRewrite>,
    /// Sends the client elsewhere; the route then needs no backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_redirect: Option<RequestRedirect>,
    /// Which pages of other origins may read responses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cors: Option<Cors>,
}

/// The filters that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum FilterType {
    /// `requestHeaderModifier`.
    RequestHeaderModifier,
    /// `responseHeaderModifier`.
    ResponseHeaderModifier,
    /// `urlRewrite`.
    #[serde(rename = "URLRewrite")]
    UrlRewrite,
    /// `requestRedirect`.
    RequestRedirect,
    /// `cors`.
    #[serde(rename = "CORS")]
    Cors,
}

/// Changes to a header section: first `remove`, then `set`, then `add`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HeaderModifier {
    /// Gives these headers exactly this value.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<NamedValue>,
    /// Adds these beside what is there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<NamedValue>,
    /// Takes these away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
}

/// A header and its value.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NamedValue {
    /// Which one.
    pub name: String,
    /// What it says.
    pub value: String,
}

/// Another host or path for the endpoint.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UrlRewrite {
    /// The host that the endpoint is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// The path that the endpoint is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathModifier>,
}

/// Sends the client elsewhere; what is not said stays as in the request.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RequestRedirect {
    /// The scheme.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheme: Option<Scheme>,
    /// The host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// The path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathModifier>,
    /// The port (default: that of `scheme`, or else that of the listener).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The status: 301, 302 (default), 303, 307 or 308.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_code: Option<u16>,
}

/// The scheme of a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Scheme {
    /// Without TLS.
    Http,
    /// With TLS.
    Https,
}

/// Another path: exactly one of these.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PathModifier {
    /// Which one (default: the one that is there).
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<PathModifierType>,
    /// Replaces the whole path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replace_full_path: Option<String>,
    /// Replaces the prefix by which the route was found; all its matches must be `PathPrefix`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replace_prefix_match: Option<String>,
}

/// How a path is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum PathModifierType {
    /// `replaceFullPath`.
    ReplaceFullPath,
    /// `replacePrefixMatch`.
    ReplacePrefixMatch,
}

/// Which pages of other origins may read responses. Preflights are answered by Serin.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Cors {
    /// Origins such as `https://shop.example.com`, `https://*.example.com`, or `*` for every one.
    pub allow_origins: Vec<String>,
    /// Whether pages may send cookies and the like (default false).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_credentials: bool,
    /// Methods that preflights are told (default: the one that is asked for).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_methods: Vec<String>,
    /// Request headers that preflights are told (default: those that are asked for).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_headers: Vec<String>,
    /// Response headers that pages may read (default: those that every page may).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expose_headers: Vec<String>,
    /// How many seconds a preflight holds (default 5).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<u32>,
}

/// Conditions that must all hold.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouteMatch {
    /// The request path (default: every path).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    /// The request method.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Request headers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<NamedMatch>,
    /// Query parameters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub query_params: Vec<NamedMatch>,
}

/// A condition on the path.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PathMatch {
    /// How to compare (default `PathPrefix`, or `Set` when `values` is given).
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<PathMatchType>,
    /// What to compare with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// The exact paths of a `Set`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// How a path is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum PathMatchType {
    /// The whole path.
    Exact,
    /// The path or what is below it, element by element: `/shop` takes `/shop` and `/shop/cart`,
    /// not `/shopping`.
    PathPrefix,
    /// A regular expression for the whole path.
    RegularExpression,
    /// One of `values`, each exactly.
    Set,
}

/// A condition on a header, cookie or query parameter.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NamedMatch {
    /// Which one.
    pub name: String,
    /// How to compare (default: `Exact` with `value`, `Set` with `values`, `Present` with neither).
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<ValueMatchType>,
    /// What to compare with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// The values of a `Set`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// How a value is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ValueMatchType {
    /// The whole value.
    Exact,
    /// The beginning of the value.
    Prefix,
    /// A regular expression for the whole value.
    RegularExpression,
    /// One of `values`, each exactly.
    Set,
    /// Any value at all.
    Present,
}

/// A version that a route can send to, and its weight.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackendRef {
    /// The backend's name.
    pub name: String,
    /// Its part of the whole: this weight by the sum of the route's weights; 0 is never by split
    /// (default 1).
    #[serde(default = "one")]
    #[schemars(range(max = 1_000_000))]
    pub weight: u32,
}

/// How long an exchange may take.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouteTimeouts {
    /// From the request head to the last byte of the response (default 0s: no limit). A client that
    /// does not read its response is not cut off by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub request: Option<String>,
    /// From choosing a backend, or from the last of the request's body, to the head of the response
    /// (default 30s; 0s: no limit).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub backend_request: Option<String>,
    /// A tunnel (WebSocket) through which nothing goes for this long is closed (default 1h; 0s: no
    /// limit).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub tunnel_idle: Option<String>,
}

/// Who gets which version. Highest first: `denyList`, `override`, rules with a user list, other
/// rules, weights.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Gray {
    /// Where the user's id is found; the first that is not empty wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub identity: Vec<IdentitySource>,
    /// Who may say who the user is.
    #[serde(default)]
    pub identity_from: IdentityFrom,
    /// What happens to requests without any identity.
    #[serde(default)]
    pub without_identity: WithoutIdentity,
    /// Makes the split of this route its own; routes with the same salt share a cohort (default:
    /// the route's name).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salt: Option<String>,
    /// A user list whose users always get the baseline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deny_list: Option<String>,
    /// Lets a client name the backend that it wants.
    #[serde(rename = "override", default, skip_serializing_if = "Option::is_none")]
    pub client_override: Option<Override>,
    /// Requests with a backend of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    /// The `Vary` header of responses (default: every header the decision reads). An empty list
    /// sends none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vary: Option<Vec<String>>,
    /// CIDRs of clients that see how it was decided, in `X-Serin-Decision` on the response.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub debug_clients: Vec<String>,
}

/// Where a user's id may be found.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum IdentitySource {
    /// The value of a request header.
    Header(String),
    /// The value of a cookie.
    Cookie(String),
    /// The value of a query parameter.
    Query(String),
    /// A claim of a JSON Web Token.
    JwtClaim(JwtClaim),
    /// The client's address, as X-Forwarded-For of trusted proxies gives it.
    ClientAddress,
}

/// A claim of a JSON Web Token.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JwtClaim {
    /// The claim, as in `sub`; a string or an integer.
    pub name: String,
    /// The header that carries the token, alone or after `Bearer` (default `authorization`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<String>,
    /// The public key in PEM, relative to the configuration file. A token not signed by it has no
    /// identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_file: Option<String>,
    /// Believes the token without checking its signature: only behind something that has checked
    /// it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unverified: bool,
}

/// Who may say who the user is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum IdentityFrom {
    /// Every client.
    #[default]
    Anyone,
    /// Only the listener's `trustedProxies`; from others identity and override headers are removed.
    Trusted,
}

/// What happens to requests without any identity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum WithoutIdentity {
    /// A draw by lot with the same shares.
    #[default]
    Random,
    /// Always the baseline.
    Baseline,
    /// An anonymous id is issued in the cookie `serin-id`, so that the next request gets the same
    /// version.
    Cookie,
}

/// Where a client names the backend that it wants.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Override {
    /// A header whose value is the name or version of a backend of this route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<String>,
    /// A cookie with the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cookie: Option<String>,
}

/// Sends requests for which all its conditions hold to one backend.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// Its name in `explain`.
    pub name: String,
    /// The backend, one of the route's `backendRefs`.
    pub backend: String,
    /// The user is on this list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_list: Option<String>,
    /// A request header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<NamedMatch>,
    /// A cookie.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cookie: Option<NamedMatch>,
    /// A query parameter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query: Option<NamedMatch>,
    /// The path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    /// One of these methods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<String>,
    /// The client's address is in one of these CIDRs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub client_cidrs: Vec<String>,
}

/// The JSON Schema of the file, for editors.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(ConfigFile);
    // A schema is a JSON value already, so this cannot fail.
    serde_json::to_string_pretty(&schema).unwrap_or_default() + "\n"
}

const fn one() -> u32 {
    1
}

// === impl HeaderEdits ===

impl HeaderEdits {
    /// True when nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }
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
