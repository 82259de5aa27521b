//! Canaries of ingress-nginx: an Ingress with `canary: "true"` beside the one whose host and path it shares.
//!
//! ingress-nginx asks for the header first, then for the cookie, and else draws lots with each request. Here the
//! first two are rules, in this order, and the last are weights without an identity, which draw the same lots.

mod place;
mod route;

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;
use std::path::Path as FilePath;

use regex::Regex;

use crate::config::load::{load_list, load_text};
use crate::config::problem::Severity;
use crate::config::value::{self, MAX_WEIGHT};

use super::Imported;
use super::ingress::{Ingress, Manifests, Path, PathType, ServiceRef, read};
use super::yaml::scalar;
use place::{OF_CANARIES, PREFIX, Place, annotation, body_size, has_regex, host_of, is_canary};
use place::{prefix_of_capture, services_of};
use route::{Canary, Group, merge_hosts, numbered, write};

/// The weights of ingress-nginx add up to so many unless it is told of more.
const WEIGHT_TOTAL: u32 = 100;

/// Translates as it goes, and takes note of what cannot be.
struct Translation<'m> {
    manifests: &'m Manifests,
    /// What is said of backends, by name.
    backends: BTreeMap<String, String>,
    /// The Ingresses whose users stay with a version.
    sticky: HashSet<String>,
    notes: Vec<String>,
}

/// Translates the manifests in a text.
///
/// # Errors
///
/// A text without an Ingress, or one that holds no manifests.
pub fn import(text: &str) -> Result<Imported, String> {
    let manifests = read(text)?;
    if manifests.ingresses.is_empty() {
        return Err("holds no Ingress (networking.k8s.io/v1)".to_owned());
    }
    let mut translation = Translation {
        manifests: &manifests,
        backends: BTreeMap::new(),
        sticky: HashSet::new(),
        notes: Vec::new(),
    };
    let groups = translation.groups();
    if groups.is_empty() {
        return Err("holds no Ingress that leads to a Service, but for canaries".to_owned());
    }
    translation.note_the_rest();
    let Translation {
        backends,
        mut notes,
        ..
    } = translation;
    let mut told = HashSet::new();
    notes.retain(|note| told.insert(note.clone()));
    let config = write(manifests.ingresses.len(), &backends, &groups);
    let mending = complaints(&config);
    Ok(Imported {
        config,
        notes,
        mending,
    })
}

/// What `serin check` will say against a configuration: names and paths that Kubernetes takes and Serin does not.
fn complaints(config: &str) -> Vec<String> {
    let checked = load_text(FilePath::new("serin.yaml"), config, &mut load_list);
    let problems = checked.err().map(|problems| problems.problems);
    let errors = problems.into_iter().flatten();
    let errors = errors.filter(|problem| problem.severity == Severity::Error);
    errors.map(|problem| format!("line {problem}")).collect()
}

// === impl Translation ===

impl<'m> Translation<'m> {
    fn groups(&mut self) -> Vec<Group<'m>> {
        let (canaries, mains): (Vec<&Ingress>, Vec<&Ingress>) = self
            .manifests
            .ingresses
            .iter()
            .partition(|one| is_canary(one));
        let mains: Vec<Place<'m>> = mains.into_iter().flat_map(|one| self.places(one)).collect();
        let mut canaries: Vec<(Place<'m>, bool)> = canaries
            .into_iter()
            .flat_map(|one| self.places(one))
            .map(|place| (place, false))
            .collect();
        let mut groups: Vec<Group<'m>> = Vec::new();
        for (position, main) in mains.iter().enumerate() {
            if let Some(other) = mains[..position]
                .iter()
                .find(|other| main.is_same_place(other))
            {
                let (name, other) = (main.name(), other.name());
                self.notes.push(format!(
                    "{name}: {main} is {other}'s already, and is left out"
                ));
                continue;
            }
            let Some(matched) = self.path_match(main) else {
                continue;
            };
            let mut fitting = canaries
                .iter_mut()
                .filter(|(canary, _)| canary.shares(main));
            let canary = fitting.next().map(|(canary, is_used)| {
                *is_used = true;
                canary
            });
            for (other, is_used) in fitting {
                *is_used = true;
                let name = other.name();
                self.notes.push(format!("{name}: ingress-nginx takes one canary for {main}, and so another one is left out"));
            }
            let stable = self.backend(main, main);
            let canary = canary.and_then(|canary| self.canary(canary, main, &stable));
            let more = self.more(main);
            let place = Group {
                ingress: &main.ingress.metadata.name,
                namespace: &main.ingress.metadata.namespace,
                hosts: main.host.clone().into_iter().collect(),
                matches: vec![matched],
                stable,
                canary,
                more,
            };
            match groups.iter_mut().find(|group| group.takes_path_of(&place)) {
                Some(group) => group.matches.extend(place.matches),
                None => groups.push(place),
            }
        }
        for (canary, _) in canaries.iter().filter(|(_, is_used)| !is_used) {
            let name = canary.name();
            self.notes.push(format!(
                "{name}: no other Ingress of its namespace has {canary}, so the canary is left out"
            ));
        }
        merge_hosts(groups)
    }

    fn places(&mut self, ingress: &'m Ingress) -> Vec<Place<'m>> {
        let name = ingress.metadata.full_name();
        let mut places = Vec::new();
        let paths = ingress.spec.rules.iter().flat_map(|rule| {
            let paths = rule.http.iter().flat_map(|http| &http.paths);
            paths.map(|path| (host_of(rule), path))
        });
        for (
            host,
            Path {
                path,
                path_type,
                backend,
            },
        ) in paths
        {
            let path = path.clone().unwrap_or_else(|| "/".to_owned());
            let Some(service) = &backend.service else {
                self.notes.push(format!(
                    "{name}: the backend of {path} is no Service, and is left out"
                ));
                continue;
            };
            places.push(Place {
                ingress,
                host,
                path,
                path_type: *path_type,
                service,
            });
        }
        let default = ingress.spec.default_backend.as_ref();
        let Some(service) = default.and_then(|default| default.service.as_ref()) else {
            return places;
        };
        // Of the hosts that it has rules for, or of all.
        let mut hosts: Vec<Option<String>> = ingress.spec.rules.iter().map(host_of).collect();
        if hosts.is_empty() {
            hosts.push(None);
        }
        hosts.dedup();
        for host in hosts {
            let whole = |place: &&Place<'_>| (&place.host, &*place.path) == (&host, "/");
            if !places.iter().any(|place| whole(&place)) {
                places.push(Place {
                    ingress,
                    host,
                    path: "/".to_owned(),
                    path_type: PathType::Prefix,
                    service,
                });
            }
        }
        places
    }

    /// The condition on the path; `None` for one that cannot be translated.
    fn path_match(&mut self, place: &Place<'_>) -> Option<String> {
        let name = place.name();
        let path = &place.path;
        if prefix_of_capture(path).is_some() && place.annotation("rewrite-target").is_some() {
            let prefix = prefix_of_capture(path)?;
            return Some(format!(
                "path: {{ type: PathPrefix, value: {} }}",
                scalar(prefix)
            ));
        }
        let uses_regex = place.annotation("use-regex").as_deref() == Some("true");
        let is_rewritten = place.annotation("rewrite-target").is_some();
        let is_regex = (uses_regex || is_rewritten) && has_regex(path);
        if !is_regex {
            if place.path_type == PathType::ImplementationSpecific && !path.ends_with('/') {
                self.notes.push(format!(
                    "{name}: ingress-nginx takes {path} for the beginning of any path, `{path}x` among them; here it is a whole element"
                ));
            }
            let kind = match place.path_type {
                PathType::Exact => "Exact",
                PathType::Prefix | PathType::ImplementationSpecific => "PathPrefix",
            };
            return Some(format!("path: {{ type: {kind}, value: {} }}", scalar(path)));
        }
        // nginx looks for it from the beginning, does not care for the end, nor for capitals.
        let anchored = format!("(?i)(?:{}).*", path.trim_start_matches('^'));
        if let Err(error) = Regex::new(&anchored) {
            let reason = last_line(&error);
            self.notes
                .push(format!("{name}: the path `{path}` is left out: {reason}"));
            return None;
        }
        let value = scalar(&anchored);
        Some(format!(
            "path: {{ type: RegularExpression, value: {value} }}"
        ))
    }

    /// The name of a place's backend, which is written once. What is spoken with it, a canary has from its main
    /// Ingress.
    fn backend(&mut self, place: &Place<'_>, main: &Place<'_>) -> String {
        let ServiceRef { name, port } = place.service;
        let namespace = &place.ingress.metadata.namespace;
        let service = self.manifests.service(namespace, name);
        let known = service.and_then(|service| service.port(port)).or(port
            .number
            .filter(|_| service.is_none_or(|one| !one.is_headless())));
        let number = known.unwrap_or_else(|| {
            let wanted = port.name.clone().or(port.number.map(|it| it.to_string()));
            let wanted = wanted.unwrap_or_default();
            self.notes.push(format!(
                "{namespace}/{name}: nothing says which port of its pods `{wanted}` is; 80 is written, and the Service would tell"
            ));
            80
        });
        match service {
            Some(service) if service.is_headless() => {}
            Some(_) => self.notes.push(format!(
                "{namespace}/{name}: its name leads to one address for all pods (clusterIP); with a headless Service Serin balances between them itself"
            )),
            None => self.notes.push(format!(
                "{namespace}/{name}: the Service is not in the file; if it has a clusterIP, its name leads to one address for all pods, and with a headless one Serin balances between them itself"
            )),
        }
        let backend = self.backend_name(namespace, name, port.name.as_deref(), number);
        let transport = self.transport(main);
        let host = format!("{name}.{namespace}.svc.cluster.local.:{number}");
        let rest = format!("endpoints: [ {} ]{transport}", scalar(&host));
        // Names of namespaces and Services may come together in one way only by chance.
        let is_free = |name: &str| self.backends.get(name).is_none_or(|other| *other == rest);
        let backend = numbered(backend, is_free);
        self.backends.insert(backend.clone(), rest);
        backend
    }

    fn backend_name(&self, namespace: &str, name: &str, port: Option<&str>, number: u16) -> String {
        let ingresses = self.manifests.ingresses.iter();
        let mut namespaces = ingresses.map(|one| &*one.metadata.namespace);
        let is_only = namespaces.all(|other| other == namespace);
        let mut backend = if is_only {
            name.to_owned()
        } else {
            format!("{namespace}-{name}")
        };
        let others = self.manifests.ingresses.iter();
        let others = others.filter(|one| one.metadata.namespace == namespace);
        let services = others.flat_map(services_of).filter(|one| one.name == name);
        let ports: HashSet<_> = services
            .map(|one| (&one.port.name, one.port.number))
            .collect();
        if ports.len() > 1 {
            let _ = write!(
                backend,
                "-{}",
                port.map_or_else(|| number.to_string(), str::to_owned)
            );
        }
        backend
    }

    /// What is spoken with a backend, as more keys of its line.
    fn transport(&mut self, place: &Place<'_>) -> &'static str {
        let protocol = place.annotation("backend-protocol").unwrap_or_default();
        let name = place.name();
        let mut believe = || {
            self.notes.push(format!(
                "{name}: ingress-nginx believes every certificate of a backend, and so does this; better name the authority with `tls.caFile`"
            ));
        };
        match &*protocol.to_ascii_uppercase() {
            "" | "HTTP" | "AUTO_HTTP" => "",
            "GRPC" => ", protocol: h2c",
            "HTTPS" => {
                believe();
                ", tls: { insecureSkipVerify: true }"
            }
            "GRPCS" => {
                believe();
                ", protocol: h2, tls: { insecureSkipVerify: true }"
            }
            other => {
                let note =
                    format!("{name}: Serin does not speak {other} with backends, so this is HTTP");
                self.notes.push(note);
                ""
            }
        }
    }

    fn canary(&mut self, canary: &Place<'_>, main: &Place<'_>, stable: &str) -> Option<Canary> {
        let name = canary.name();
        let mut number = |key: &str, default: u32| match canary.annotation(key) {
            None => default,
            Some(text) => text.trim().parse().unwrap_or_else(|_| {
                self.notes.push(format!(
                    "{name}: {key} is `{text}`, which is no number; {default} is written"
                ));
                default
            }),
        };
        // ingress-nginx takes a total only if it is larger.
        let total = number("canary-weight-total", WEIGHT_TOTAL).max(WEIGHT_TOTAL);
        let weight = number("canary-weight", 0).min(total);
        // Serin's weights end there.
        let (weight, total) = match total {
            0..=MAX_WEIGHT => (weight, total),
            _ => {
                let part = u64::from(weight) * u64::from(MAX_WEIGHT) / u64::from(total);
                (part as u32, MAX_WEIGHT)
            }
        };
        let backend = self.backend(canary, main);
        if backend == stable {
            self.notes.push(format!(
                "{name}: the canary of {main} is left out, since it is the same Service"
            ));
            return None;
        }
        let is_sticky = main.annotation("affinity").as_deref() == Some("cookie")
            && main.annotation("affinity-canary-behavior").as_deref() != Some("legacy");
        if is_sticky {
            self.sticky.insert(main.name());
            self.notes.push(format!(
                "{name}: users stay with a version by the cookie `serin-id`, and not with one pod by the session cookie"
            ));
        }
        if weight > 0 && !is_sticky {
            self.notes.push(
                "weights draw lots with each request, as ingress-nginx does; with `gray.identity` a user keeps the version"
                    .to_owned(),
            );
        }
        Some(Canary {
            rules: self.rules(canary, &backend, stable),
            backend,
            weight,
            total,
            is_sticky,
        })
    }

    /// The name of a header or cookie that a rule looks at; `None` for one that Serin has no rules for.
    fn rule_name<T>(
        &mut self,
        canary: &Place<'_>,
        key: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<String> {
        let name = canary.annotation(key)?;
        if let Err(reason) = parse(&name) {
            let ingress = canary.name();
            self.notes
                .push(format!("{ingress}: {key} is left out: `{name}` {reason}"));
            return None;
        }
        Some(name)
    }

    fn rules(&mut self, canary: &Place<'_>, backend: &str, stable: &str) -> Vec<String> {
        let mut rules = Vec::new();
        let rule = |name: &str, kind: &str, key: &str, how: &str, to: &str| {
            let key = scalar(key);
            format!("- {{ name: {name}, {kind}: {{ name: {key}, {how} }}, backend: {to} }}")
        };
        if let Some(header) = self.rule_name(canary, "canary-by-header", value::header_name) {
            let value = canary
                .annotation("canary-by-header-value")
                .filter(|it| !it.is_empty());
            let pattern = canary
                .annotation("canary-by-header-pattern")
                .filter(|it| !it.is_empty());
            match (value, pattern) {
                (Some(value), _) => {
                    let how = format!("value: {}", scalar(&value));
                    rules.push(rule("header", "header", &header, &how, backend));
                }
                (None, Some(pattern)) => {
                    rules.extend(self.pattern(canary, &pattern).map(|pattern| {
                        let how = format!("type: RegularExpression, value: {}", scalar(&pattern));
                        rule("header", "header", &header, &how, backend)
                    }))
                }
                (None, None) => {
                    rules.push(rule(
                        "header-always",
                        "header",
                        &header,
                        "value: always",
                        backend,
                    ));
                    rules.push(rule(
                        "header-never",
                        "header",
                        &header,
                        "value: never",
                        stable,
                    ));
                }
            }
        }
        if let Some(cookie) = self.rule_name(canary, "canary-by-cookie", value::parameter_name) {
            rules.push(rule(
                "cookie-always",
                "cookie",
                &cookie,
                "value: always",
                backend,
            ));
            rules.push(rule(
                "cookie-never",
                "cookie",
                &cookie,
                "value: never",
                stable,
            ));
        }
        rules
    }

    /// A pattern that is looked for anywhere, for a condition that looks at the whole value.
    fn pattern(&mut self, canary: &Place<'_>, pattern: &str) -> Option<String> {
        let whole = format!("(?s).*(?:{pattern}).*");
        let Err(error) = Regex::new(&whole) else {
            return Some(whole);
        };
        let name = canary.name();
        let reason = last_line(&error);
        self.notes.push(format!(
            "{name}: the rule for canary-by-header-pattern `{pattern}` is left out: {reason}"
        ));
        None
    }

    /// What else can be said of a route.
    fn more(&mut self, main: &Place<'_>) -> Vec<String> {
        let name = main.name();
        let mut more = Vec::new();
        if let Some(target) = main.annotation("rewrite-target") {
            let replaced = match (prefix_of_capture(&main.path), &*target) {
                (Some(_), "/$2") => {
                    Some("type: ReplacePrefixMatch, replacePrefixMatch: /".to_owned())
                }
                (_, target) if target.starts_with('/') && !target.contains('$') => Some(format!(
                    "type: ReplaceFullPath, replaceFullPath: {}",
                    scalar(target)
                )),
                _ => None,
            };
            match replaced {
                Some(path) => {
                    let filter = format!("{{ type: URLRewrite, urlRewrite: {{ path: {{ {path} }} }} }}");
                    more.push(format!("filters: [ {filter} ]"));
                }
                None => self.notes.push(format!("{name}: rewrite-target `{target}` of {} is left out: there are no captures of paths", main.path)),
            }
        }
        if let Some(size) = main.annotation("proxy-body-size") {
            match body_size(&size) {
                Some(size) => more.push(format!("limits: {{ requestBody: {size} }}")),
                None => self.notes.push(format!("{name}: proxy-body-size `{size}` is left out; without a limit of the route that of the listener holds"))
            }
        }
        if let Some(timeout) = main.annotation("proxy-read-timeout") {
            match timeout.trim_end_matches('s').parse::<u16>() {
                Ok(seconds) => more.push(format!("timeouts: {{ backendRequest: {seconds}s }}")),
                Err(_) => self.notes.push(format!("{name}: proxy-read-timeout `{timeout}` is no number of seconds, and is left out")),
            }
        }
        more
    }

    /// What no route says.
    fn note_the_rest(&mut self) {
        let translated = [
            "affinity",
            "affinity-canary-behavior",
            "affinity-mode",
            "backend-protocol",
            "proxy-body-size",
            "proxy-read-timeout",
            "rewrite-target",
            "use-regex",
        ];
        for ingress in &self.manifests.ingresses {
            let name = ingress.metadata.full_name();
            if let Some(class) = ingress.class().filter(|class| !class.contains("nginx")) {
                self.notes.push(format!(
                    "{name}: it is of the class `{class}`, and translated all the same"
                ));
            }
            if annotation(ingress, "use-regex").as_deref() == Some("true") {
                self.notes.push(format!("{name}: ingress-nginx takes all paths of its hosts as regular expressions, those of other Ingresses among them; here only its own are"));
            }
            for (key, value) in ingress.metadata.annotations() {
                let Some(key) = key.strip_prefix(PREFIX) else {
                    continue;
                };
                if OF_CANARIES.contains(&key) && is_canary(ingress) {
                    continue;
                }
                if OF_CANARIES.contains(&key) {
                    let note = format!("{name}: {key} means nothing without `canary: \"true\"`");
                    self.notes.push(note);
                } else if is_canary(ingress) {
                    // ingress-nginx has all others from the main Ingress.
                } else if key == "affinity" && !self.sticky.contains(&name) {
                    self.notes.push(format!(
                        "{name}: affinity `{value}` is left out: Serin keeps users with a version, and not with a pod"
                    ));
                } else if !translated.contains(&key) {
                    let value = value.lines().next().unwrap_or_default();
                    self.notes
                        .push(format!("{name}: {key} `{value}` is left out"));
                }
            }
            for tls in &ingress.spec.tls {
                let hosts = tls.hosts.join(", ");
                let secret = tls.secret_name.as_deref().unwrap_or("of the controller");
                self.notes.push(format!(
                    "{name}: TLS for {hosts} is left out: mount the Secret {secret}, and name its files in a listener's `tls.certificates`; plain requests are redirected by a route with RequestRedirect"
                ));
            }
        }
        for other in &self.manifests.others {
            self.notes.push(format!("{other} is left out"));
        }
    }
}

/// What the regex crate says is wrong, without the picture of where.
fn last_line(error: &regex::Error) -> String {
    let text = error.to_string();
    text.lines().last().unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests;
