//! Where requests come in.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DURATION_PATTERN, Size};

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
    /// While a client takes nothing of a response, or less of it than some 80 KiB, in HTTP/2 than some 16 KiB
    /// (default 30s).
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
