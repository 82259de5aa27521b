//! How much is let in.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::DURATION_PATTERN;

/// How many requests are served at a time.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Overload {
    /// Requests in flight in the whole process, tunnels not among them (default 10000; 0: no limit).
    /// Those beyond get 503.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<u32>,
}

/// How important the requests of a route are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Priority {
    /// They get 503 beyond `overload.inFlight`.
    #[default]
    Normal,
    /// They are served up to a tenth beyond it.
    Critical,
}

/// How fast requests may come. Counted in each replica for itself.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RateLimit {
    /// Its name in metrics.
    pub name: String,
    /// Whose requests are counted together.
    pub by: RateLimitBy,
    /// How many may come in each `per`.
    pub requests: u32,
    /// In how much time (default 1s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub per: Option<String>,
    /// How many may come at once (default: `requests`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
    /// What becomes of those beyond (default `enforce`).
    #[serde(default)]
    pub mode: RateLimitMode,
    /// Whom requests without a user or without the header are counted for (default `client`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub without_key: Option<WithoutKey>,
    /// The bits of an IPv6 address that tell clients apart (default 64).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 128))]
    pub ipv6_prefix: Option<u8>,
    /// How many keys are remembered, at 16 bytes each (default 65536). With more at a time, those that
    /// have used up least are forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub keys: Option<u32>,
}

/// Whose requests are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum RateLimitBy {
    /// Those of one client's address, as X-Forwarded-For of trusted proxies gives it.
    Client,
    /// Those of one user, as `gray.identity` finds him.
    User,
    /// Those with the same value of this request header.
    Header(String),
    /// All.
    Everyone,
}

/// What becomes of requests beyond a rate limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum RateLimitMode {
    /// They get 429.
    #[default]
    Enforce,
    /// They are counted in the metric, and let in.
    Observe,
}

/// Whom requests without a key are counted for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum WithoutKey {
    /// Their client's address.
    #[default]
    Client,
    /// All of them together.
    Share,
    /// Nobody: they are let in.
    Pass,
}
