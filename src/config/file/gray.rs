//! Who gets which version.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{NamedMatch, PathMatch};

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
