//! Configuration: from the file's text to values that cannot be wrong.
//!
//! ```text
//! text --Node::parse--> tree with positions --decode--> ConfigFile --check--> Config
//! ```
//!
//! Every stage reports all the problems it finds, each with its place. Nothing past `check` sees a
//! [`ConfigFile`]; names are resolved to positions, so that a dangling reference is found here and
//! never at run time.

mod check;
mod decode;
pub mod document;
pub mod endpoints_file;
pub mod file;
pub mod load;
pub mod problem;
pub mod value;
pub mod watch;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::header::HeaderName;
use ipnet::IpNet;

use crate::access;
use crate::backend::{
    ConnectionPolicy, GateLimits, HeaderEdits, HealthCheck, OutlierPolicy, Transport,
};
use crate::discovery::{self, Locator};
use crate::filter::Filters;
use crate::history;
use crate::limit::overload::{Overload, Priority};
use crate::limit::rate;
use crate::routing::gray::WithoutIdentity;
use crate::routing::identity::IdentitySource;
use crate::routing::matcher::Condition;
use crate::routing::rescue::Rescue;
use crate::routing::split::{Ratio, Weight};
use crate::routing::table::{Hostname, RouteMatch};
use crate::routing::{Target, user_list};
use crate::telemetry::{access_log, trace};
use crate::tls;
use crate::transcode::Transcoder;

pub use file::{ConfigFile, Workers};
pub use problem::{Problem, Problems};

/// A configuration that has been checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where requests come in.
    pub listeners: Vec<Listener>,
    /// Where operators come in.
    pub admin: Admin,
    /// How many worker threads there are.
    pub workers: Workers,
    /// How many connections clients may have; `None` where the file descriptors decide.
    pub max_connections: Option<usize>,
    /// How the process ends on SIGTERM.
    pub shutdown: Shutdown,
    /// Where weights that are set at run time outlive the process.
    pub state_file: Option<PathBuf>,
    /// Where the file's revisions are kept.
    pub history: Option<history::Settings>,
    /// How many requests are served at a time.
    pub overload: Overload,
    /// Upper bounds of the latency histograms in seconds.
    pub duration_buckets: Vec<f64>,
    /// Where a line for each request goes.
    pub access_log: Option<access_log::Settings>,
    /// Which requests are traced, and where their spans go.
    pub tracing: Option<trace::Settings>,
    /// How names of endpoints are resolved.
    pub dns: discovery::Settings,
    /// The versions there are.
    pub backends: Vec<Backend>,
    /// The user lists there are.
    pub user_lists: Vec<UserList>,
    /// The routes in the order of the file.
    pub routes: Vec<Route>,
}

/// Where operators come in.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Where it listens.
    pub address: SocketAddr,
    /// What TLS connections are accepted with; `None` without TLS.
    pub tls: Option<tls::server::Settings>,
    /// Who may change what is served.
    pub writers: Arc<[access::Writer]>,
}

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown {
    /// How long it may take in all.
    pub timeout: Duration,
    /// How long of that connections are still taken, and told to come again elsewhere.
    pub lame_duck: Duration,
}

/// A socket that takes requests.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Its name.
    pub name: Arc<str>,
    /// Where it listens.
    pub address: SocketAddr,
    /// Who is believed about the client.
    pub trusted_proxies: Arc<[IpNet]>,
    /// How many proxies append to X-Forwarded-For, where that is known.
    pub trusted_hops: Option<usize>,
    /// Whether connections of those who are believed begin with a PROXY header.
    pub proxy_protocol: bool,
    /// What TLS connections are accepted with; `None` without TLS.
    pub tls: Option<tls::server::Settings>,
    /// How long clients may take.
    pub timeouts: ListenerTimeouts,
    /// How much clients may send.
    pub limits: ListenerLimits,
    /// How HTTP/2 is spoken.
    pub http2: ListenerHttp2,
}

// === impl Listener ===

impl Listener {
    /// True for the address of somebody who is believed about the client.
    pub fn trusts(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let mut proxies = self.trusted_proxies.iter();
        proxies.any(|network| network.contains(&address))
    }
}

/// How long clients of a listener may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerTimeouts {
    /// For the TLS handshake.
    pub tls_handshake: Duration,
    /// Until the first byte of a connection.
    pub first_byte: Duration,
    /// From the first byte of a request head to its end.
    pub request_head: Duration,
    /// Between requests.
    pub idle: Duration,
    /// Between two parts of a request body that is waited for.
    pub request_body: Duration,
    /// While nothing of a response is taken.
    pub write: Duration,
}

/// How much clients of a listener may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerLimits {
    /// The bytes of a request head.
    pub request_head: u32,
    /// The fields of a request head.
    pub header_fields: usize,
    /// The bytes of a request target.
    pub uri: usize,
    /// The bytes of a request body.
    pub request_body: Option<u64>,
}

/// How HTTP/2 is spoken with clients of a listener; windows and buffers in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerHttp2 {
    /// Requests that one connection may have open.
    pub max_concurrent_streams: u32,
    /// What may be on its way of one request.
    pub stream_window: u32,
    /// What may be on its way of all requests of a connection.
    pub connection_window: u32,
    /// What may wait of one response.
    pub send_buffer: usize,
}

/// One version of a service.
#[derive(Clone, Debug)]
pub struct Backend {
    /// Its name.
    pub name: Arc<str>,
    /// The version it runs.
    pub version: Arc<str>,
    /// What stands for its servers.
    pub endpoints: Vec<Locator>,
    /// The file that names more of them.
    pub endpoints_file: Option<PathBuf>,
    /// The kill switch.
    pub disabled: bool,
    /// Changes to requests.
    pub request_headers: HeaderEdits,
    /// Changes to responses.
    pub response_headers: HeaderEdits,
    /// How its endpoints are connected to.
    pub connections: ConnectionPolicy,
    /// What is spoken with them, and over what.
    pub transport: Arc<Transport>,
    /// The certificate that we show to them: its file as configured, and until when it is valid.
    pub own_certificate: Option<(String, i64)>,
    /// How many requests it has at a time.
    pub gate_limits: GateLimits,
    /// How its endpoints are asked whether they are well.
    pub health_check: Option<Arc<HealthCheck>>,
    /// When one of them is ejected; `None` for never.
    pub outliers: Option<OutlierPolicy>,
    /// How long one takes that was let in again to get its full part of the requests.
    pub slow_start: Duration,
    /// With fewer than this part of its endpoints usable, all of them get requests; 0 for never.
    pub panic_threshold: Ratio,
}

/// A list of user ids.
#[derive(Clone, Debug)]
pub struct UserList {
    /// Its name.
    pub name: Arc<str>,
    /// Where its ids come from.
    pub source: ListSource,
    /// Who answers for it.
    pub owner: Option<String>,
    /// When it should be gone, in seconds since 1970.
    pub expires_at: Option<u64>,
}

/// Where the ids of a list come from: what makes two lists the same list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ListSource {
    /// The file.
    pub path: PathBuf,
    /// How it is written.
    pub format: user_list::Format,
}

/// The position of a backend in [`Config::backends`].
pub type BackendIndex = usize;

/// The position of a list in [`Config::user_lists`].
pub type ListIndex = usize;

/// A route.
#[derive(Clone, Debug)]
pub struct Route {
    /// Its name.
    pub name: Arc<str>,
    /// The hosts it serves; none means any.
    pub hostnames: Vec<Hostname>,
    /// What it takes of them; never empty.
    pub matches: Vec<RouteMatch>,
    /// What it splits among, the first is the baseline; empty only for a redirect.
    pub targets: Vec<RouteTarget>,
    /// What becomes of its requests and responses.
    pub filters: Arc<Filters>,
    /// Whether a path may have escaped slashes.
    pub keeps_escaped_slashes: bool,
    /// What turns HTTP into gRPC.
    pub transcoder: Option<Arc<Transcoder>>,
    /// The most bytes of a request body, where it says so itself.
    pub body_limit: Option<u64>,
    /// How fast its requests may come.
    pub rate_limits: Vec<(rate::Settings, rate::Mode)>,
    /// How important its requests are.
    pub priority: Priority,
    /// The limit of a whole exchange.
    pub request_timeout: Option<Duration>,
    /// The limit of waiting for the head of a response.
    pub backend_timeout: Option<Duration>,
    /// How long nothing may go through a tunnel.
    pub tunnel_idle: Option<Duration>,
    /// Who gets which target.
    pub gray: Gray,
    /// Who gets the requests of a target that takes none.
    pub failover: Failover,
    /// What is done about requests that failed.
    pub rescue: Arc<Rescue>,
    /// How long a stream may go on whose user gets another version; `None` for as long as it likes.
    pub stream_deadline: Option<Duration>,
    /// Whether responses name their version.
    pub expose_version: bool,
}

/// Who gets the requests of a target that takes none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failover {
    /// The baseline gets those of the others.
    pub to_baseline: bool,
    /// This one gets those of the baseline.
    pub from_baseline: Option<Target>,
}

/// A backend of a route, and its weight.
#[derive(Clone, Copy, Debug)]
pub struct RouteTarget {
    /// The backend.
    pub backend: BackendIndex,
    /// Its part of the whole.
    pub weight: Weight,
}

/// Who gets which target.
#[derive(Clone, Debug)]
pub struct Gray {
    /// Where the user's id is looked for.
    pub identity: Arc<[IdentitySource]>,
    /// Whether only trusted proxies may say who the user is.
    pub trusted_only: bool,
    /// What happens without an identity.
    pub without_identity: WithoutIdentity,
    /// What makes this split its own.
    pub salt: String,
    /// Users who always get the baseline.
    pub deny_list: Option<ListIndex>,
    /// The header and the cookie in which a client may name a backend.
    pub client_override: Option<(Option<HeaderName>, Option<String>)>,
    /// The rules in the order of the file.
    pub rules: Vec<Rule>,
    /// The `Vary` header, where the file gives it.
    pub vary: Option<Vec<HeaderName>>,
    /// Who is shown how it was decided.
    pub debug_clients: Arc<[IpNet]>,
}

/// A rule with a target of its own.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its name.
    pub name: Arc<str>,
    /// Where its requests go.
    pub target: Target,
    /// The list that the user must be on.
    pub user_list: Option<ListIndex>,
    /// What else must hold.
    pub conditions: Arc<[Condition]>,
}

#[cfg(test)]
pub(crate) mod tests;
