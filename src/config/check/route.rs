//! Checks routes: hosts, matches, targets.

use std::sync::Arc;
use std::time::Duration;

use crate::config::document::Path;
use crate::config::{BackendIndex, Route, RouteTarget, file, value};
use crate::filter::Filters;
use crate::limit::overload::Priority;
use crate::routing::BASELINE;
use crate::routing::matcher::{Condition, PathMatcher};
use crate::routing::table::RouteMatch;
use crate::transcode::{DefinitionError, Transcoder};

use super::{Checker, Names};

const TUNNEL_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
const BACKEND_REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

impl Checker<'_> {
    pub(super) fn route(
        &mut self,
        route: &file::Route,
        at: &Path,
        backends: &[file::Backend],
        backend_names: &mut Names,
        list_names: &mut Names,
    ) -> Option<Route> {
        let name = self.name(&route.name, at);
        let hostnames = self.each(
            &route.hostnames,
            &at.key("hostnames"),
            |checker, text, at| checker.parse(text, at, value::hostname),
        );
        let matches = self.matches(&route.matches, &at.key("matches"));
        let filters = self.filters(&route.filters, &at.key("filters"), matches.as_deref());
        let transcoder = match &route.transcode {
            Some(transcode) => {
                self.refuse_http1(route, &at.key("backendRefs"), backends, backend_names);
                self.refuse_rewritten_path(filters.as_ref(), &at.key("transcode"));
                self.transcoder(transcode, &at.key("transcode")).map(Some)
            }
            None => Some(None),
        };
        let redirects = route
            .filters
            .iter()
            .any(|one| one.request_redirect.is_some());
        let targets = self.targets(
            route,
            redirects,
            &at.key("backendRefs"),
            backends,
            backend_names,
        );
        let gray = self.gray(route, &at.key("gray"), backend_names, list_names);
        let failover = self.failover(route, &at.key("failover"), backend_names);
        let rescue = self.rescue(route, at);
        let stream_deadline = self.stream_deadline(&route.streams, &at.key("streams"));
        let rate_limits = self.rate_limits(route, &at.key("rateLimits"));
        let timeouts = self.route_timeouts(&route.timeouts, &at.key("timeouts"));
        let [request_timeout, backend_timeout, tunnel_idle] = timeouts?;
        Some(Route {
            name: name?,
            hostnames: hostnames?,
            matches: matches?,
            targets: targets?,
            filters: Arc::new(filters?),
            transcoder: transcoder?,
            keeps_escaped_slashes: route.escaped_slashes == file::EscapedSlashes::Keep,
            body_limit: route.limits.request_body.map(|size| size.0),
            rate_limits: rate_limits?,
            priority: match route.priority {
                file::Priority::Normal => Priority::Normal,
                file::Priority::Critical => Priority::Critical,
            },
            request_timeout,
            backend_timeout,
            tunnel_idle,
            gray: gray?,
            failover: failover?,
            rescue: rescue?,
            stream_deadline: stream_deadline?,
            expose_version: route.expose_version,
        })
    }

    /// For a request, for its backend, and for a tunnel; zero is for ever.
    fn route_timeouts(
        &mut self,
        timeouts: &file::RouteTimeouts,
        at: &Path,
    ) -> Option<[Option<Duration>; 3]> {
        let mut limit = |text: &Option<String>, default, key| {
            let duration = self.duration(text.as_deref(), default, &at.key(key))?;
            Some(Some(duration).filter(|duration| !duration.is_zero()))
        };
        let request = limit(&timeouts.request, Duration::ZERO, "request");
        let backend_request = limit(
            &timeouts.backend_request,
            BACKEND_REQUEST_TIMEOUT,
            "backendRequest",
        );
        let tunnel_idle = limit(&timeouts.tunnel_idle, TUNNEL_IDLE_TIMEOUT, "tunnelIdle");
        Some([request?, backend_request?, tunnel_idle?])
    }

    fn refuse_rewritten_path(&mut self, filters: Option<&Filters>, at: &Path) {
        if filters.is_some_and(|filters| filters.path.is_some()) {
            let message = "the path of a call is its method's, which cannot be rewritten";
            self.error(at, message, None);
        }
    }

    /// gRPC needs HTTP/2.
    fn refuse_http1(
        &mut self,
        route: &file::Route,
        at: &Path,
        backends: &[file::Backend],
        names: &Names,
    ) {
        for (position, one) in route.backend_refs.iter().enumerate() {
            let backend = names
                .positions
                .get(&one.name)
                .map(|index| &backends[*index]);
            let speaks_http1 = |backend: &file::Backend| match backend.protocol {
                Some(protocol) => protocol == file::BackendProtocol::Http1,
                None => backend.tls.is_none(),
            };
            if backend.is_some_and(speaks_http1) {
                let message = format!(
                    "backend `{}` speaks HTTP/1.1, but gRPC needs HTTP/2",
                    one.name
                );
                let hint = "give it `protocol: h2c`, or `tls`".to_owned();
                self.error(&at.index(position).key("name"), message, Some(hint));
            }
        }
    }

    fn transcoder(&mut self, transcode: &file::Transcode, at: &Path) -> Option<Arc<Transcoder>> {
        let set_at = at.key("descriptorSet");
        let services_at = at.key("services");
        let set = self.read(&transcode.descriptor_set, &set_at)?;
        if transcode.services.is_empty() && !self.document.is_maimed(&services_at) {
            self.error(&services_at, "there is no service to call", None);
        }
        match Transcoder::new(&set, &transcode.services) {
            Ok((transcoder, skipped)) => {
                for message in skipped {
                    self.warn(&services_at, message, None);
                }
                Some(Arc::new(transcoder))
            }
            Err(DefinitionError::Set(reason)) => {
                let message = format!("`{}` {reason}", transcode.descriptor_set);
                self.error(&set_at, message, None);
                None
            }
            Err(DefinitionError::Service(position, reason)) => {
                self.error(&services_at.index(position), reason, None);
                None
            }
        }
    }

    fn matches(&mut self, matches: &[file::RouteMatch], at: &Path) -> Option<Vec<RouteMatch>> {
        if matches.is_empty() {
            return Some(vec![RouteMatch {
                path: PathMatcher::prefix("/"),
                conditions: Arc::default(),
            }]);
        }
        self.each(matches, at, |checker, one, at| {
            let path = match &one.path {
                Some(path) => checker.whole(path, &at.key("path"), value::path_matcher),
                None => Some(PathMatcher::prefix("/")),
            };
            let method = checker.optional(one.method.as_deref(), &at.key("method"), value::method);
            let headers = checker.each(&one.headers, &at.key("headers"), Self::header_condition);
            let query_params = checker.each(
                &one.query_params,
                &at.key("queryParams"),
                Self::query_condition,
            );
            let mut conditions: Vec<Condition> = method?
                .into_iter()
                .map(|method| Condition::Method(vec![method]))
                .collect();
            conditions.extend(headers?);
            conditions.extend(query_params?);
            Some(RouteMatch {
                path: path?,
                conditions: conditions.into(),
            })
        })
    }

    fn targets(
        &mut self,
        route: &file::Route,
        redirects: bool,
        at: &Path,
        backends: &[file::Backend],
        names: &mut Names,
    ) -> Option<Vec<RouteTarget>> {
        if route.backend_refs.is_empty() && !redirects && !self.document.is_maimed(at) {
            self.error(at, format!("route `{}` has no backend", route.name), None);
        }
        for (position, one) in route.backend_refs.iter().enumerate() {
            if route.backend_refs[..position]
                .iter()
                .any(|other| other.name == one.name)
            {
                self.error(
                    &at.index(position).key("name"),
                    format!("backend `{}` is listed twice", one.name),
                    None,
                );
            }
        }
        let targets = self.each(&route.backend_refs, at, |checker, one, at| {
            if one.weight > value::MAX_WEIGHT {
                checker.error(
                    &at.key("weight"),
                    format!("weight {} is above {}", one.weight, value::MAX_WEIGHT),
                    None,
                );
            }
            let backend: BackendIndex = checker.resolve(&one.name, &at.key("name"), names)?;
            Some(RouteTarget {
                backend,
                weight: one.weight,
            })
        });
        let first = route
            .backend_refs
            .first()
            .filter(|_| !self.document.is_maimed(at));
        if let Some(baseline) = first.and_then(|first| names.positions.get(&first.name)) {
            self.baseline(*baseline, &backends[*baseline], at);
        }
        targets.filter(|targets| !targets.is_empty() || redirects)
    }

    /// Checks what only the first backend of a route must be.
    fn baseline(&mut self, index: BackendIndex, baseline: &file::Backend, at: &Path) {
        if baseline.disabled {
            let message = format!(
                "backend `{}` is disabled, but it is the baseline of this route",
                baseline.name
            );
            let hint = "the baseline takes over for others and has nobody to take over for it: list another one first";
            self.error(
                &at.index(BASELINE).key("name"),
                message,
                Some(hint.to_owned()),
            );
        }
        let endpoints = Path::default()
            .key("backends")
            .index(index)
            .key("endpoints");
        let known = !self.document.is_unknown(&endpoints) && !self.document.is_maimed(&endpoints);
        let none_listed = baseline.endpoints.as_ref().is_some_and(Vec::is_empty);
        let has_none = none_listed && baseline.endpoints_file.is_none();
        if has_none && known {
            let message = format!(
                "backend `{}` has no endpoints, but it is the baseline of this route",
                baseline.name
            );
            self.warn(
                &at.index(BASELINE).key("name"),
                message,
                Some("its users get 503".to_owned()),
            );
        }
    }
}
