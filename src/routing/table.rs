//! The route table: which route takes a request.
//!
//! Precedence is the Gateway API's: exact host before wildcard before any, the longer wildcard
//! first; then exact path, regular expression, longest prefix by path element; then a method, more
//! headers, more query parameters, and last the order of the file. A match whose other conditions
//! do not hold passes the request on to the next best.
//!
//! Hosts, exact paths and prefixes are hash look-ups, so that 10,000 routes cost what 10 do; only
//! matches under the same path are tried one after the other, in the order of `Rank`.

use std::cmp::Reverse;
use std::sync::Arc;

use hashbrown::HashMap;
use regex::Regex;

use super::matcher::{Condition, PathMatcher};
use super::request::RequestHead;

/// A host that a route serves.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Hostname {
    /// This host, in lower case.
    Exact(String),
    /// Every host below this suffix, which is kept without the leading `*.`.
    Wildcard(String),
}

impl std::fmt::Display for Hostname {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Wildcard(suffix) => write!(f, "*.{suffix}"),
        }
    }
}

/// What one match of a route asks of a request.
#[derive(Clone, Debug)]
pub struct RouteMatch {
    /// The path.
    pub path: PathMatcher,
    /// What else must hold.
    pub conditions: Arc<[Condition]>,
}

/// The position of a route in the configuration.
pub type RouteIndex = usize;

/// The route of a request, and how it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The route.
    pub route: RouteIndex,
    /// How much of the path its match has taken, in bytes: less than all of it with a prefix.
    pub matched: usize,
}

/// Finds the route of a request.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    exact: HashMap<String, PathTable>,
    wildcard: HashMap<String, PathTable>,
    any: PathTable,
}

#[derive(Clone, Debug, Default)]
struct PathTable {
    exact: HashMap<String, Vec<Candidate>>,
    regex: Vec<(Regex, Candidate)>,
    prefix: HashMap<String, Vec<Candidate>>,
    /// The longest prefix in bytes: nothing beyond it needs to be looked up.
    longest_prefix: usize,
}

#[derive(Clone, Debug)]
struct Candidate {
    rank: Rank,
    conditions: Arc<[Condition]>,
    route: RouteIndex,
}

/// The order of matches under the same host and path; the smallest comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    method: Reverse<bool>,
    headers: Reverse<usize>,
    query_params: Reverse<usize>,
    file_order: (RouteIndex, usize),
}

// === impl RouteTable ===

impl RouteTable {
    /// Adds a route; `index` also gives its place in the order of the file.
    pub fn insert(&mut self, index: RouteIndex, hostnames: &[Hostname], matches: &[RouteMatch]) {
        if hostnames.is_empty() {
            self.any.insert(index, matches);
        }
        for hostname in hostnames {
            let (table, name) = match hostname {
                Hostname::Exact(name) => (&mut self.exact, name),
                Hostname::Wildcard(suffix) => (&mut self.wildcard, suffix),
            };
            table
                .entry_ref(name.as_str())
                .or_default()
                .insert(index, matches);
        }
    }

    /// Puts what was inserted into its order of precedence. To be called once, after the last
    /// insertion.
    pub fn finish(&mut self) {
        let tables = self.exact.values_mut().chain(self.wildcard.values_mut());
        for table in tables.chain([&mut self.any]) {
            table.finish();
        }
    }

    /// The route that takes this request.
    pub fn find(&self, head: &RequestHead<'_>) -> Option<Found> {
        self.exact
            .get(head.host)
            .and_then(|paths| paths.find(head))
            .or_else(|| self.find_wildcard(head))
            .or_else(|| self.any.find(head))
    }

    fn find_wildcard(&self, head: &RequestHead<'_>) -> Option<Found> {
        if self.wildcard.is_empty() {
            return None;
        }
        head.host
            .match_indices('.')
            .filter_map(|(dot, _)| self.wildcard.get(&head.host[dot + 1..]))
            .find_map(|paths| paths.find(head))
    }
}

// === impl PathTable ===

impl PathTable {
    fn insert(&mut self, route: RouteIndex, matches: &[RouteMatch]) {
        for (position, one) in matches.iter().enumerate() {
            let candidate = Candidate {
                rank: Rank::new(&one.conditions, (route, position)),
                conditions: Arc::clone(&one.conditions),
                route,
            };
            match &one.path {
                PathMatcher::Exact(path) => self
                    .exact
                    .entry_ref(path.as_str())
                    .or_default()
                    .push(candidate),
                PathMatcher::Set(paths) => {
                    for path in paths {
                        self.exact
                            .entry_ref(path.as_str())
                            .or_default()
                            .push(candidate.clone());
                    }
                }
                PathMatcher::Regex(regex) => self.regex.push((regex.clone(), candidate)),
                PathMatcher::Prefix(prefix) => {
                    self.longest_prefix = self.longest_prefix.max(prefix.len());
                    self.prefix
                        .entry_ref(prefix.as_str())
                        .or_default()
                        .push(candidate);
                }
            }
        }
    }

    fn finish(&mut self) {
        for candidates in self.exact.values_mut().chain(self.prefix.values_mut()) {
            candidates.sort_by_key(|candidate| candidate.rank);
        }
        self.regex
            .sort_by_key(|(regex, candidate)| (Reverse(regex.as_str().len()), candidate.rank));
    }

    fn find(&self, head: &RequestHead<'_>) -> Option<Found> {
        let whole = |route| Found {
            route,
            matched: head.path.len(),
        };
        first(self.exact.get(head.path), head)
            .or_else(|| {
                self.regex
                    .iter()
                    .find(|(regex, candidate)| regex.is_match(head.path) && candidate.holds(head))
                    .map(|(_, candidate)| candidate.route)
            })
            .map(whole)
            .or_else(|| self.find_prefix(head))
    }

    /// Tries the path itself and then each shorter run of whole elements, down to the empty prefix
    /// that takes all.
    fn find_prefix(&self, head: &RequestHead<'_>) -> Option<Found> {
        let path = head.path;
        let whole = std::iter::once(path.len());
        whole
            .chain(path.rmatch_indices('/').map(|(slash, _)| slash))
            .filter(|end| *end <= self.longest_prefix)
            .find_map(|matched| {
                let route = first(self.prefix.get(&path[..matched]), head)?;
                Some(Found { route, matched })
            })
    }
}

// === impl Candidate ===

impl Candidate {
    fn holds(&self, head: &RequestHead<'_>) -> bool {
        self.conditions
            .iter()
            .all(|condition| condition.holds(head))
    }
}

fn first(candidates: Option<&Vec<Candidate>>, head: &RequestHead<'_>) -> Option<RouteIndex> {
    candidates?
        .iter()
        .find(|candidate| candidate.holds(head))
        .map(|candidate| candidate.route)
}

// === impl Rank ===

impl Rank {
    fn new(conditions: &[Condition], file_order: (RouteIndex, usize)) -> Self {
        let count = |is: fn(&Condition) -> bool| {
            conditions.iter().filter(|condition| is(condition)).count()
        };
        Self {
            method: Reverse(count(|condition| matches!(condition, Condition::Method(_))) > 0),
            headers: Reverse(count(|condition| {
                matches!(condition, Condition::Header(..))
            })),
            query_params: Reverse(count(|condition| matches!(condition, Condition::Query(..)))),
            file_order,
        }
    }
}

#[cfg(test)]
mod tests;
