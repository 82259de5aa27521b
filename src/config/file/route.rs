//! Which requests go where.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    DURATION_PATTERN, Failover, Filter, Gray, Priority, RateLimit, Retry, Shield, Size, Streams,
};

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
    /// How fast its requests may come; all of these must hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rate_limits: Vec<RateLimit>,
    /// How important its requests are when there are too many (default `normal`).
    #[serde(default)]
    pub priority: Priority,
    /// How long an exchange may take.
    #[serde(default)]
    pub timeouts: RouteTimeouts,
    /// Who gets which version.
    #[serde(default)]
    pub gray: Gray,
    /// What becomes of the users of a version that takes no requests.
    #[serde(default)]
    pub failover: Failover,
    /// Which failed requests are sent once more.
    #[serde(default)]
    pub retry: Retry,
    /// Which failed requests of other versions are answered by the baseline.
    #[serde(default)]
    pub shield: Shield,
    /// What becomes of long-lived streams whose user gets another version.
    #[serde(default)]
    pub streams: Streams,
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

const fn one() -> u32 {
    1
}
