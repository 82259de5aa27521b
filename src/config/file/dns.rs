//! How names of endpoints are resolved.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::DURATION_PATTERN;

/// How names of endpoints are resolved.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Dns {
    /// The shortest time after which a name is asked for again, however short its records are valid
    /// (default 1s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub min_ttl: Option<String>,
    /// The longest, however long they are valid, and between attempts that fail (default 60s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub max_ttl: Option<String>,
    /// How long an answer may take, and all of them together at the start (default 5s).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DURATION_PATTERN))]
    pub timeout: Option<String>,
    /// `IP:port` of each DNS server (default: those of `/etc/resolv.conf`, with its search domains).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolvers: Option<Vec<String>>,
}
