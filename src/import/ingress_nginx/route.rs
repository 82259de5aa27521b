//! The routes that come out, and how they are written.

use std::collections::BTreeMap;

use crate::import::yaml::{Lines, list, scalar};

/// Requests that go to the same backends in the same way.
#[derive(PartialEq, Eq)]
pub(super) struct Group<'m> {
    /// Of which Ingress.
    pub(super) ingress: &'m str,
    pub(super) namespace: &'m str,
    pub(super) hosts: Vec<String>,
    pub(super) matches: Vec<String>,
    pub(super) stable: String,
    pub(super) canary: Option<Canary>,
    /// Lines of the route, as they are.
    pub(super) more: Vec<String>,
}

/// What a canary gets.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Canary {
    pub(super) backend: String,
    pub(super) weight: u32,
    pub(super) total: u32,
    pub(super) rules: Vec<String>,
    pub(super) is_sticky: bool,
}

// === impl Group ===

impl Group<'_> {
    /// True for a place that differs in nothing but its path.
    pub(super) fn takes_path_of(&self, place: &Self) -> bool {
        (self.ingress, self.namespace) == (place.ingress, place.namespace)
            && self.stable == place.stable
            && self.hosts == place.hosts
            && self.canary == place.canary
            && self.more == place.more
    }

    /// A name that no other route has.
    fn name(&self, all: &[Self], taken: &[String]) -> String {
        let is_only = all.iter().all(|other| other.namespace == self.namespace);
        let base = if is_only {
            self.ingress.to_owned()
        } else {
            format!("{}-{}", self.namespace, self.ingress)
        };
        numbered(base, |name| !taken.iter().any(|other| other == name))
    }

    fn write(&self, name: &str, lines: &mut Lines) {
        lines.add(1, &format!("- name: {}", scalar(name)));
        if !self.hosts.is_empty() {
            lines.add(
                2,
                &format!("hostnames: {}", list(self.hosts.iter().map(String::as_str))),
            );
        }
        lines.add(2, "matches:");
        for matched in &self.matches {
            lines.add(3, &format!("- {matched}"));
        }
        lines.add(2, "backendRefs:");
        let stable = &self.stable;
        let Some(canary) = &self.canary else {
            lines.add(3, &format!("- {{ name: {stable} }}"));
            return self.write_more(lines);
        };
        let rest = canary.total - canary.weight;
        lines.add(3, &format!("- {{ name: {stable}, weight: {rest} }}"));
        let Canary {
            backend, weight, ..
        } = canary;
        lines.add(3, &format!("- {{ name: {backend}, weight: {weight} }}"));
        self.write_more(lines);
        if canary.is_sticky || !canary.rules.is_empty() {
            lines.add(2, "gray:");
        }
        if canary.is_sticky {
            lines.add(3, "withoutIdentity: cookie");
        }
        if !canary.rules.is_empty() {
            lines.add(3, "rules:");
            for rule in &canary.rules {
                lines.add(4, rule);
            }
        }
    }

    fn write_more(&self, lines: &mut Lines) {
        for line in &self.more {
            lines.add(2, line);
        }
    }
}

/// Makes one group of those that differ in nothing but their host.
pub(super) fn merge_hosts(groups: Vec<Group<'_>>) -> Vec<Group<'_>> {
    let mut merged: Vec<Group<'_>> = Vec::new();
    for group in groups {
        let twin = merged.iter_mut().find(|one| {
            !group.hosts.is_empty()
                && !one.hosts.is_empty()
                && (one.ingress, one.namespace) == (group.ingress, group.namespace)
                && (&one.matches, &one.stable) == (&group.matches, &group.stable)
                && (&one.canary, &one.more) == (&group.canary, &group.more)
        });
        match twin {
            Some(twin) => twin.hosts.extend(group.hosts),
            None => merged.push(group),
        }
    }
    merged
}

/// The first name that is free: this one, or this one with a number.
pub(super) fn numbered(base: String, is_free: impl Fn(&str) -> bool) -> String {
    let numbered = (2..).map(|number| format!("{base}-{number}"));
    let mut names = std::iter::once(base.clone()).chain(numbered);
    names.find(|name| is_free(name)).unwrap_or(base)
}

pub(super) fn write(
    ingresses: usize,
    backends: &BTreeMap<String, String>,
    groups: &[Group<'_>],
) -> String {
    let mut lines = Lines::default();
    let plural = if ingresses == 1 { "" } else { "es" };
    lines.add(
        0,
        &format!("# From {ingresses} Ingress{plural} of ingress-nginx."),
    );
    lines.add(0, "listeners: [ { name: web, address: \"0.0.0.0:8080\" } ]");
    lines.add(0, "admin: { address: \"0.0.0.0:9901\" }");
    lines.add(0, "backends:");
    for (name, rest) in backends {
        lines.add(1, &format!("- {{ name: {}, {rest} }}", scalar(name)));
    }
    lines.add(0, "routes:");
    let mut names = Vec::new();
    for group in groups {
        let name = group.name(groups, &names);
        group.write(&name, &mut lines);
        names.push(name);
    }
    lines.into_text()
}
