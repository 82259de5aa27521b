//! Conditions on a request.

use std::collections::HashSet;

use http::Method;
use http::header::HeaderName;
use ipnet::IpNet;
use regex::Regex;

use super::request::{RequestHead, text};

/// How a value is compared.
#[derive(Clone, Debug)]
pub enum ValueMatcher {
    /// The whole value.
    Exact(String),
    /// The beginning of the value.
    Prefix(String),
    /// A regular expression, anchored at both ends.
    Regex(Regex),
    /// One of these.
    Set(HashSet<String>),
    /// Any value.
    Present,
}

/// How a path is compared.
#[derive(Clone, Debug)]
pub enum PathMatcher {
    /// The whole path.
    Exact(String),
    /// The path up to an element boundary, kept without its trailing slash: see
    /// [`PathMatcher::prefix`].
    Prefix(String),
    /// A regular expression, anchored at both ends.
    Regex(Regex),
    /// One of these, each exactly.
    Set(HashSet<String>),
}

/// One condition on a request.
#[derive(Clone, Debug)]
pub enum Condition {
    /// A header has a value that matches; of several, any.
    Header(HeaderName, ValueMatcher),
    /// A cookie's value matches.
    Cookie(String, ValueMatcher),
    /// A query parameter's value matches.
    Query(String, ValueMatcher),
    /// The path matches.
    Path(PathMatcher),
    /// The method is one of these.
    Method(Vec<Method>),
    /// The client's address is in one of these networks.
    Client(Vec<IpNet>),
}

// === impl ValueMatcher ===

impl ValueMatcher {
    /// True when `value` is what is asked for.
    pub fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(expected) => value == expected,
            Self::Prefix(prefix) => value.starts_with(prefix),
            Self::Regex(regex) => regex.is_match(value),
            Self::Set(values) => values.contains(value),
            Self::Present => true,
        }
    }
}

// === impl PathMatcher ===

impl PathMatcher {
    /// A prefix by path element: `/shop` and `/shop/` alike take `/shop`, `/shop/` and
    /// `/shop/cart`, not `/shopping`.
    pub fn prefix(path: &str) -> Self {
        Self::Prefix(path.trim_end_matches('/').to_owned())
    }

    /// True when `path` is what is asked for.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(expected) => path == expected,
            Self::Prefix(prefix) => path
                .strip_prefix(prefix.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
            Self::Regex(regex) => regex.is_match(path),
            Self::Set(paths) => paths.contains(path),
        }
    }
}

// === impl Condition ===

impl Condition {
    /// True when it holds for the request.
    pub fn holds(&self, head: &RequestHead<'_>) -> bool {
        match self {
            Self::Header(name, matcher) => head
                .headers
                .get_all(name)
                .into_iter()
                .filter_map(text)
                .any(|value| matcher.matches(value)),
            Self::Cookie(name, matcher) => head
                .cookie(name)
                .is_some_and(|value| matcher.matches(value)),
            Self::Query(name, matcher) => head
                .query_param(name)
                .is_some_and(|value| matcher.matches(&value)),
            Self::Path(matcher) => matcher.matches(head.path),
            Self::Method(methods) => methods.contains(head.method),
            Self::Client(networks) => networks
                .iter()
                .any(|network| network.contains(&head.client)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_end_at_an_element() {
        for prefix in ["/shop", "/shop/"] {
            let matcher = PathMatcher::prefix(prefix);
            for inside in ["/shop", "/shop/", "/shop/cart"] {
                assert!(matcher.matches(inside), "{prefix} {inside}");
            }
            for outside in ["/shopping", "/sho", "/", "/x/shop"] {
                assert!(!matcher.matches(outside), "{prefix} {outside}");
            }
        }
        assert!(PathMatcher::prefix("/").matches("/anything"));
    }

    #[test]
    fn values_match_exactly_by_prefix_by_regex_or_in_a_set() {
        let regex = Regex::new("^(?:a+)$").unwrap();
        assert!(
            ValueMatcher::Exact("a".into()).matches("a")
                && !ValueMatcher::Exact("a".into()).matches("ab")
        );
        assert!(
            ValueMatcher::Prefix("a".into()).matches("ab")
                && !ValueMatcher::Prefix("a".into()).matches("ba")
        );
        assert!(
            ValueMatcher::Regex(regex.clone()).matches("aaa")
                && !ValueMatcher::Regex(regex).matches("aab")
        );
        let set = ValueMatcher::Set(["a".to_owned(), "b".to_owned()].into());
        assert!(set.matches("b") && !set.matches("c"));
        assert!(ValueMatcher::Present.matches(""));
    }
}
