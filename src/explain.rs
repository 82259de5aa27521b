//! Says what would become of a request, by running the code that would decide it.

use std::fmt;
use std::net::IpAddr;

use http::header::{COOKIE, HOST, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Request, Uri};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use tokio::time::Instant;

use crate::limit::key::Caller;
use crate::limit::rate::RateLimit;
use crate::proxy::admission::caller;
use crate::proxy::error::ProxyError;
use crate::proxy::headers::{Survey, refuse_ambiguous};
use crate::proxy::origin::{canonical_target, head, host};
use crate::routing::identity::IdentitySource;
use crate::routing::split::Ratio;
use crate::routing::{BASELINE, Reason, Target};
use crate::snapshot::{Route, RouteTarget, Snapshot};

/// A request to explain: what the proxy would have read of it.
#[derive(Clone, Debug)]
pub struct Question {
    parts: Parts,
    client: IpAddr,
    trusted: bool,
}

/// What would become of a request.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The route that takes it; `None` is a 404.
    pub route: Option<String>,
    /// The reply with which the proxy refuses it, instead of sending it on.
    pub refused: Option<String>,
    /// The status with which the client is sent elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redirected: Option<String>,
    /// Who the user is.
    pub identity: Option<ExplainedIdentity>,
    /// Who gets it, and why.
    pub decision: Option<ExplainedDecision>,
    /// The rate limits that it has to pass before that.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rate_limits: Vec<ExplainedLimit>,
    /// Every backend of the route.
    pub backends: Vec<ExplainedBackend>,
    /// The snapshot that was asked.
    pub revision: u64,
}

/// Who the user is.
#[derive(Clone, Debug, Serialize)]
pub struct ExplainedIdentity {
    /// The id.
    pub value: String,
    /// Where it was found.
    pub source: String,
}

/// Who gets a request, and why.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExplainedDecision {
    /// The backend.
    pub backend: String,
    /// Its version.
    pub version: String,
    /// The reason, as in metrics.
    pub reason: &'static str,
    /// The rule, where one decided.
    pub rule: Option<String>,
    /// The backend that was decided on but takes no requests.
    pub failed_over_from: Option<String>,
    /// True when another such request may get another backend.
    pub by_lot: bool,
}

/// A rate limit of the route.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExplainedLimit {
    /// Its name.
    pub name: String,
    /// How fast requests may come.
    pub quota: String,
    /// Whom this one is counted for; `None` for nobody.
    pub counted_for: Option<String>,
    /// What becomes of requests beyond it.
    pub mode: &'static str,
}

/// A backend of the route.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExplainedBackend {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its weight.
    pub weight: u32,
    /// Its share of the users that are split.
    pub share_percent: f64,
    /// Whether it takes requests.
    pub available: bool,
    /// The share from which this user would be on it, the others keeping their ratios.
    pub user_enters_at_percent: Option<f64>,
}

// === impl Question ===

impl Question {
    /// A question about a request for `path`, with the query if there is one, on `host`, with or
    /// without port.
    ///
    /// # Errors
    ///
    /// A path, method or header that no request can have.
    pub fn new<'h>(
        host: &str,
        path: &str,
        method: &str,
        headers: impl IntoIterator<Item = (&'h str, &'h str)>,
        client: IpAddr,
        trusted: bool,
    ) -> Result<Self, String> {
        let uri: Uri = path
            .parse()
            .map_err(|_| format!("`{path}` is not a request path"))?;
        if !uri.path().starts_with('/') || uri.authority().is_some() {
            return Err(format!("`{path}` does not begin with `/`"));
        }
        let mut parts = Request::new(()).into_parts().0;
        parts.uri = uri;
        parts.method = Method::from_bytes(method.as_bytes())
            .map_err(|_| format!("`{method}` is not a method"))?;
        let mut question = Self {
            parts,
            client: client.to_canonical(),
            trusted,
        };
        question.add_header(HOST.as_str(), host)?;
        for (name, value) in headers {
            question.add_header(name, value)?;
        }
        Ok(question)
    }

    /// Puts a user's id where the route that takes the request looks for it first.
    ///
    /// # Errors
    ///
    /// When no route takes it, or its route looks for no id where one could be put.
    pub fn set_user(&mut self, snapshot: &Snapshot, user: &str) -> Result<(), String> {
        let host = host(&self.parts, Survey::of(&self.parts.headers))
            .map_err(|error| error.words().to_owned())?;
        let (route, _) = snapshot
            .find(&head(&self.parts, &host, self.client))
            .ok_or("no route takes this request")?;
        let source = route.gray.identity.iter().find(|source| {
            matches!(
                source,
                IdentitySource::Header(_) | IdentitySource::Cookie(_) | IdentitySource::Query(_)
            )
        });
        match source {
            Some(IdentitySource::Header(name)) => self.add_header(name.as_str(), user),
            Some(IdentitySource::Cookie(name)) => {
                self.add_header(COOKIE.as_str(), &format!("{name}={user}"))
            }
            Some(IdentitySource::Query(name)) => {
                let value = utf8_percent_encode(user, NON_ALPHANUMERIC);
                let uri = &self.parts.uri;
                let rest = uri
                    .query()
                    .map(|query| format!("&{query}"))
                    .unwrap_or_default();
                let target = format!("{}?{name}={value}{rest}", uri.path());
                self.parts.uri = target
                    .parse()
                    .map_err(|_| format!("`{target}` is no path"))?;
                Ok(())
            }
            _ => Err(format!(
                "route `{}` looks for no id in a header, a cookie or the query",
                route.name
            )),
        }
    }

    fn add_header(&mut self, name: &str, value: &str) -> Result<(), String> {
        let parsed = HeaderName::from_bytes(name.as_bytes())
            .map_err(|_| format!("`{name}` is not a header name"))?;
        let value = HeaderValue::from_str(value)
            .map_err(|_| format!("the value of `{name}` is not a header value"))?;
        self.parts.headers.append(parsed, value);
        Ok(())
    }
}

/// Explains what would become of a request.
pub fn explain(
    snapshot: &Snapshot,
    question: &Question,
    dice: &mut dyn FnMut() -> u64,
) -> Explanation {
    let revision = snapshot.revision.0;
    let mut parts = question.parts.clone();
    let survey = Survey::of(&parts.headers);
    let has_escaped_slash = match canonical_target(&mut parts) {
        Ok(has_escaped_slash) => has_escaped_slash,
        Err(error) => return Explanation::refused(None, &error, revision),
    };
    let headers = &parts.headers;
    let host = match host(&parts, survey) {
        Ok(host) => host,
        Err(error) => return Explanation::refused(None, &error, revision),
    };
    let head = head(&parts, &host, question.client);
    let Some((route, _)) = snapshot.find(&head) else {
        return Explanation::without_decision(None, revision);
    };
    if let Err(error) = refuse_ambiguous(headers, survey, &route.guarded_headers) {
        return Explanation::refused(Some(route), &error, revision);
    }
    if has_escaped_slash && !route.keeps_escaped_slashes {
        let error = ProxyError::BadRequest("the path has an escaped slash");
        return Explanation::refused(Some(route), &error, revision);
    }
    if let Some(redirect) = &route.filters.redirect {
        return Explanation {
            redirected: Some(redirect.status.to_string()),
            ..Explanation::without_decision(Some(route), revision)
        };
    }
    let mut decision = route.gray.decide(&head, question.trusted, dice);
    let failed_over = route.fail_over(&mut decision, Instant::now(), dice);
    let identity = decision
        .identity
        .as_ref()
        .map(|identity| ExplainedIdentity {
            value: identity.value.to_string(),
            source: identity.source.map_or_else(
                || "issued by Serin for this request".to_owned(),
                |source| route.gray.identity[source].to_string(),
            ),
        });
    let caller = caller(route, &head, &decision);
    let rate_limits = route.rate_limits.iter();
    let rate_limits = rate_limits.map(|limit| ExplainedLimit::new(limit, &caller));
    let rate_limits = rate_limits.collect();
    let target = &route.targets[decision.target];
    let decision = ExplainedDecision {
        backend: target.backend.name.to_string(),
        version: target.backend.version.to_string(),
        reason: decision.reason.as_str(),
        rule: decision.rule.map(str::to_owned),
        failed_over_from: failed_over
            .map(|failed| route.targets[failed.from].backend.name.to_string()),
        by_lot: decision.reason == Reason::Random || decision.issued_identity().is_some(),
    };
    let user = identity.as_ref().map(|identity| identity.value.as_str());
    Explanation {
        route: Some(route.name.to_string()),
        refused: None,
        redirected: None,
        backends: explain_backends(route, user),
        identity,
        decision: Some(decision),
        rate_limits,
        revision,
    }
}

impl Explanation {
    fn refused(route: Option<&Route>, error: &ProxyError, revision: u64) -> Self {
        Self {
            refused: Some(format!("{}: {}", error.status(), error.words())),
            ..Self::without_decision(route, revision)
        }
    }

    fn without_decision(route: Option<&Route>, revision: u64) -> Self {
        Self {
            route: route.map(|route| route.name.to_string()),
            refused: None,
            redirected: None,
            identity: None,
            decision: None,
            rate_limits: Vec::new(),
            backends: Vec::new(),
            revision,
        }
    }
}

fn explain_backends(route: &Route, user: Option<&str>) -> Vec<ExplainedBackend> {
    let split = &route.gray.split;
    let enters = |target: Target| user.and_then(|user| split.entry_share(user, target));
    let one = |(position, ((target, weight), share)): (usize, ((&RouteTarget, u32), Ratio))| {
        ExplainedBackend {
            name: target.backend.name.to_string(),
            version: target.backend.version.to_string(),
            weight,
            share_percent: share.as_percent(),
            available: target.is_available(),
            user_enters_at_percent: enters(position).map(Ratio::as_percent),
        }
    };
    route
        .targets
        .iter()
        .zip(split.weights())
        .zip(split.shares())
        .enumerate()
        .map(one)
        .collect()
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(reply) = &self.refused {
            return writeln!(f, "refused    {reply}");
        }
        let Some(route) = &self.route else {
            return writeln!(f, "route      none: the reply is 404");
        };
        writeln!(f, "route      {route}")?;
        if let Some(status) = &self.redirected {
            return writeln!(f, "redirected {status}");
        }
        match &self.identity {
            Some(identity) => writeln!(f, "identity   {} ({})", identity.value, identity.source)?,
            None => writeln!(f, "identity   none")?,
        }
        if let Some(decision) = &self.decision {
            writeln!(f, "decision   {}", decision.words())?;
            writeln!(
                f,
                "backend    {} (version {})",
                decision.backend,
                shown(&decision.version)
            )?;
        }
        for limit in &self.rate_limits {
            writeln!(f, "rate limit {}", limit.words())?;
        }
        writeln!(f)?;
        for (position, backend) in self.backends.iter().enumerate() {
            writeln!(f, "{}", backend.words(position == BASELINE))?;
        }
        Ok(())
    }
}

impl ExplainedDecision {
    fn words(&self) -> String {
        let why = match (self.reason, &self.rule) {
            ("failover", _) => {
                let from = self
                    .failed_over_from
                    .as_deref()
                    .unwrap_or("another backend");
                format!(
                    "failover: {from} was decided on, but takes no requests, or not all of them yet"
                )
            }
            (reason, Some(rule)) => format!("{reason}: rule `{rule}`"),
            ("deny_list", _) => "deny_list: the user always gets the baseline".to_owned(),
            ("override", _) => "override: the client names the backend".to_owned(),
            ("sticky", _) => "sticky: hash of the identity".to_owned(),
            ("random", _) => "random: no identity, so a lot by weight".to_owned(),
            (reason, _) => format!("{reason}: there is nothing to decide"),
        };
        if self.by_lot {
            format!("{why} (this time)")
        } else {
            why
        }
    }
}

impl ExplainedLimit {
    fn new(limit: &RateLimit, caller: &Caller<'_>) -> Self {
        Self {
            name: limit.settings.name.to_string(),
            quota: limit.settings.quota.to_string(),
            counted_for: limit.key(caller).map(|key| key.to_string()),
            mode: limit.mode.as_str(),
        }
    }

    fn words(&self) -> String {
        let Self {
            name, quota, mode, ..
        } = self;
        match &self.counted_for {
            Some(key) => format!("{name}: {quota}, counted for {key} ({mode})"),
            None => format!("{name}: {quota}, counted for nobody ({mode})"),
        }
    }
}

impl ExplainedBackend {
    fn words(&self, baseline: bool) -> String {
        let enters = match self.user_enters_at_percent {
            Some(share) if !baseline => format!(", this user enters it at {share:.4} %"),
            _ => String::new(),
        };
        let state = if self.available {
            ""
        } else {
            ", takes no requests"
        };
        let role = if baseline { ", the baseline" } else { "" };
        let Self {
            name,
            weight,
            share_percent,
            ..
        } = self;
        format!(
            "  {name} (version {}): weight {weight}, {share_percent:.4} % of users{role}{enters}{state}",
            shown(&self.version)
        )
    }
}

fn shown(version: &str) -> &str {
    if version.is_empty() { "-" } else { version }
}
