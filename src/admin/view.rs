//! The shapes of the admin API. Core types are not shown as they are, so that they can change
//! without breaking anybody.

mod discovery;

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr};
use std::time::SystemTime;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::backend::{Backend, Endpoint, Impediment};
use crate::config::{ConfigFile, Problem, Problems};
use crate::control::weights::Saved;
use crate::control::{Status, Watching};
use crate::explain::Question;
use crate::routing::BASELINE;
use crate::snapshot::{Route, Snapshot};
use crate::weights::{Tag, Weights};

use discovery::{Discovered, EndpointsFileView, NameView, OriginView};

/// The most bytes of why weights are set.
const LONGEST_REASON: usize = 500;

/// `GET /api/v1/config`: the configuration in force.
#[derive(Debug, Serialize)]
pub struct ConfigView<'s> {
    revision: u64,
    file: String,
    config: &'s ConfigFile,
}

/// `GET /api/v1/config/status`: what is in force, and what became of the last change.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusView {
    file: String,
    revision: u64,
    hash: String,
    taken_over_at: String,
    last_attempt_at: String,
    last_attempt_successful: bool,
    /// Why the last attempt was refused.
    problems: Vec<ProblemView>,
    /// What is questionable about the configuration in force.
    warnings: Vec<ProblemView>,
    /// Keys whose new value needs a restart.
    restart_required: Vec<&'static str>,
    watching: &'static str,
    user_lists: Vec<UserListView>,
}

/// One problem.
#[derive(Debug, Serialize)]
pub struct ProblemView {
    severity: crate::config::problem::Severity,
    line: usize,
    column: usize,
    path: String,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

/// One user list.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UserListView {
    name: String,
    file: String,
    entries: usize,
    bytes: usize,
    hash: String,
    loaded_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    /// Why the file could not be read again; the ids read before are in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// One route of `GET /api/v1/routes`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteView {
    name: String,
    baseline: Option<String>,
    backends: Vec<RouteBackendView>,
    identity: Vec<String>,
}

/// A backend of a route.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteBackendView {
    name: String,
    version: String,
    weight: u32,
    share_percent: f64,
    in_flight: i64,
}

/// `GET /api/v1/routes/{route}/weights`, and what setting them answers.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WeightsView<'s> {
    route: &'s str,
    revision: u64,
    /// What `If-Match` takes: the same on all replicas with the same file.
    etag: String,
    /// Who has said them last: `file`, or `api`.
    source: &'static str,
    weights: &'s Weights,
    /// What the file says.
    file: &'s Weights,
    #[serde(skip_serializing_if = "Option::is_none")]
    set_by: Option<&'s str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    set_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'s str>,
    /// Whether what is set outlives the process.
    saved: bool,
    /// Why it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    unsaved: Option<&'s str>,
}

/// The body of `PUT /api/v1/routes/{route}/weights`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightsOrderView {
    /// The weight of each backend of the route.
    #[serde(deserialize_with = "named_once")]
    pub weights: BTreeMap<String, u64>,
    /// Why, for the log and for those who look at the weights.
    #[serde(default)]
    pub reason: Option<String>,
}

/// One backend of `GET /api/v1/backends`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendView {
    name: String,
    version: String,
    disabled: bool,
    available: bool,
    /// Requests that it has, and that wait for room.
    in_flight: usize,
    queued: usize,
    endpoints: Vec<EndpointView>,
    /// The names that stand for some of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    names: Vec<NameView>,
    /// The file that names some of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoints_file: Option<EndpointsFileView>,
}

/// One endpoint.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointView {
    address: String,
    in_flight: usize,
    /// Why it gets no requests: `unchecked`, `unhealthy`, `ejected`; none means that it gets them.
    impediments: Vec<&'static str>,
    #[serde(flatten)]
    origin: Option<OriginView>,
}

/// The reply to a reload.
#[derive(Debug, Serialize)]
pub struct Reloaded {
    /// The revision in force.
    pub revision: u64,
}

/// A request that failed.
#[derive(Debug, Serialize)]
pub struct Failure {
    error: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    problems: Vec<ProblemView>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    paths: Vec<&'static str>,
}

/// The body of `POST /api/v1/explain`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct QuestionView {
    /// The host, with or without port.
    host: String,
    /// The path, with the query if there is one.
    #[serde(default = "root")]
    path: String,
    /// The method.
    #[serde(default = "get")]
    method: String,
    /// The headers.
    #[serde(default, deserialize_with = "named_once")]
    headers: BTreeMap<String, String>,
    /// The client's address.
    #[serde(default = "localhost")]
    client: IpAddr,
    /// Whether a trusted proxy sends it.
    #[serde(default)]
    trusted: bool,
}

// === impl ConfigView ===

impl<'s> ConfigView<'s> {
    /// The configuration in force.
    pub fn new(status: &'s Status) -> Self {
        let loaded = &status.loaded;
        Self {
            revision: status.revision.0,
            file: loaded.path.display().to_string(),
            config: &loaded.file,
        }
    }
}

// === impl StatusView ===

impl StatusView {
    /// The status now.
    pub fn new(status: &Status) -> Self {
        let loaded = &status.loaded;
        Self {
            file: loaded.path.display().to_string(),
            revision: status.revision.0,
            hash: hash(loaded.hash),
            taken_over_at: time(status.taken_over_at),
            last_attempt_at: time(status.last_attempt_at),
            last_attempt_successful: status.refused.is_none(),
            problems: status
                .refused
                .as_ref()
                .map(|refused| problems(refused))
                .unwrap_or_default(),
            warnings: problems(&loaded.warnings),
            restart_required: status.restart_required.clone(),
            watching: match status.watching {
                Watching::Events => "events",
                Watching::Polling => "polling",
                Watching::Nothing => "nothing",
            },
            user_lists: loaded
                .config
                .user_lists
                .iter()
                .map(|list| UserListView::new(status, list))
                .collect(),
        }
    }
}

impl UserListView {
    fn new(status: &Status, list: &crate::config::UserList) -> Self {
        let loaded = &status.loaded.lists[&list.source];
        Self {
            name: list.name.to_string(),
            file: list.source.path.display().to_string(),
            entries: loaded.list.len(),
            bytes: loaded.list.heap_bytes(),
            hash: hash(loaded.hash),
            loaded_at: time(loaded.loaded_at),
            owner: list.owner.clone(),
            expires_at: list
                .expires_at
                .map(|at| time(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(at))),
            problem: status.stale(&list.source).map(str::to_owned),
        }
    }
}

impl From<&Problem> for ProblemView {
    fn from(problem: &Problem) -> Self {
        Self {
            severity: problem.severity,
            line: problem.span.line,
            column: problem.span.column,
            path: problem.path.clone(),
            message: problem.message.clone(),
            hint: problem.hint.clone(),
        }
    }
}

/// `GET /api/v1/routes`.
pub fn routes(snapshot: &Snapshot) -> Vec<RouteView> {
    snapshot
        .routes
        .iter()
        .map(|route| RouteView::new(route))
        .collect()
}

impl RouteView {
    fn new(route: &Route) -> Self {
        let split = &route.gray.split;
        let targets = route
            .targets
            .iter()
            .zip(split.weights())
            .zip(split.shares());
        Self {
            name: route.name.to_string(),
            baseline: route
                .targets
                .get(BASELINE)
                .map(|baseline| baseline.backend.name.to_string()),
            identity: route
                .gray
                .identity
                .iter()
                .map(ToString::to_string)
                .collect(),
            backends: targets
                .map(|((target, weight), share)| RouteBackendView {
                    name: target.backend.name.to_string(),
                    version: target.backend.version.to_string(),
                    weight,
                    share_percent: share.as_percent(),
                    in_flight: target.metrics.in_flight().get(),
                })
                .collect(),
        }
    }
}

/// `GET /api/v1/backends`.
pub fn backends(snapshot: &Snapshot, status: &Status) -> Vec<BackendView> {
    snapshot
        .backends
        .iter()
        .map(|backend| BackendView::new(backend, Discovered::new(status, &backend.name)))
        .collect()
}

impl BackendView {
    fn new(backend: &Backend, discovered: Discovered) -> Self {
        let endpoint = |endpoint: &std::sync::Arc<Endpoint>| EndpointView {
            address: endpoint.address.to_string(),
            in_flight: endpoint.in_flight(),
            impediments: endpoint.impediments().map(Impediment::as_str).collect(),
            origin: discovered.origins.get(&endpoint.address).cloned(),
        };
        Self {
            name: backend.name.to_string(),
            version: backend.version.to_string(),
            disabled: backend.disabled,
            available: backend.is_available(),
            in_flight: backend.gate.inside(),
            queued: backend.gate.waiting(),
            endpoints: backend.endpoints.iter().map(endpoint).collect(),
            names: discovered.names,
            endpoints_file: discovered.file,
        }
    }
}

// === impl WeightsView ===

impl<'s> WeightsView<'s> {
    /// Those of a route of which the file says `file`.
    pub fn new(status: &'s Status, route: &'s str, file: &'s Weights, tag: Tag) -> Self {
        let set = status.weights.of(route);
        Self {
            route,
            revision: status.revision.0,
            etag: tag.to_string(),
            source: if set.is_some() { "api" } else { "file" },
            weights: set.map_or(file, |set| &set.weights),
            file,
            set_by: set.map(|set| &*set.by),
            set_at: set.map(|set| time(set.at)),
            reason: set.and_then(|set| set.reason.as_deref()),
            saved: status.saved == Saved::Yes,
            unsaved: match &status.saved {
                Saved::Yes => None,
                Saved::Nowhere => Some("the configuration names no `stateFile`"),
                Saved::No(reason) => Some(reason),
            },
        }
    }
}

// === impl WeightsOrderView ===

impl WeightsOrderView {
    /// This, unless its reason is a novel.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn sound(self) -> Result<Self, String> {
        let length = self.reason.as_ref().map_or(0, String::len);
        if length > LONGEST_REASON {
            return Err(format!(
                "the reason has {length} bytes, more than {LONGEST_REASON}"
            ));
        }
        Ok(self)
    }
}

/// A mapping in which no name stands twice: JSON has no rule for which of them counts (RFC 8259 section 4).
fn named_once<'de, D: Deserializer<'de>, V: Deserialize<'de>>(
    from: D,
) -> Result<BTreeMap<String, V>, D::Error> {
    struct NamedOnce<V>(PhantomData<V>);

    impl<'de, V: Deserialize<'de>> Visitor<'de> for NamedOnce<V> {
        type Value = BTreeMap<String, V>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((name, value)) = entries.next_entry::<String, V>()? {
                if map.contains_key(&name) {
                    return Err(A::Error::custom(format!("`{name}` stands there twice")));
                }
                map.insert(name, value);
            }
            Ok(map)
        }
    }

    from.deserialize_map(NamedOnce(PhantomData))
}

// === impl Failure ===

impl Failure {
    /// A failure with a reason.
    pub fn new(error: impl Into<String>) -> Self {
        Self {
            error: error.into(),
            problems: Vec::new(),
            paths: Vec::new(),
        }
    }

    /// A path that is not served, with those that are.
    pub fn not_found(paths: impl Iterator<Item = &'static str>) -> Self {
        Self {
            paths: paths.collect(),
            ..Self::new("there is nothing at this path")
        }
    }

    /// A configuration that was refused.
    pub fn refused(refused: &Problems) -> Self {
        Self {
            problems: problems(refused),
            ..Self::new("the configuration was refused; the one in force stays")
        }
    }
}

// === impl QuestionView ===

impl QuestionView {
    /// The question that is asked.
    ///
    /// # Errors
    ///
    /// A path, method or header that no request can have.
    pub fn into_question(self) -> Result<Question, String> {
        let headers = self
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        Question::new(
            &self.host,
            &self.path,
            &self.method,
            headers,
            self.client,
            self.trusted,
        )
    }
}

fn problems(problems: &Problems) -> Vec<ProblemView> {
    problems.problems.iter().map(ProblemView::from).collect()
}

fn hash(hash: u64) -> String {
    format!("{hash:016x}")
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

fn root() -> String {
    "/".to_owned()
}

fn get() -> String {
    "GET".to_owned()
}

const fn localhost() -> IpAddr {
    IpAddr::V4(Ipv4Addr::LOCALHOST)
}
