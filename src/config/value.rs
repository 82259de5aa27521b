//! Parsing of single values into types that cannot be wrong. Errors are half sentences that follow
//! the value.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http::header::{HeaderName, HeaderValue};
use ipnet::IpNet;
use regex::Regex;

use crate::discovery::locator::dialable;
use crate::routing::matcher::{PathMatcher, ValueMatcher};
use crate::routing::path::{Unfit, canonical};
use crate::routing::table::Hostname;

use super::file::{NamedMatch, PathMatch, PathMatchType, ValueMatchType};

/// The largest weight, as in the Gateway API.
pub const MAX_WEIGHT: u32 = 1_000_000;

/// Parses a duration such as `1m30s`.
///
/// # Errors
///
/// Whatever [`DURATION_PATTERN`](super::file::DURATION_PATTERN) does not allow.
pub fn duration(text: &str) -> Result<Duration, String> {
    let malformed = || "is not a duration: write it like `500ms`, `30s` or `1h30m`".to_owned();
    let mut rest = text;
    let mut total = Duration::ZERO;
    for _ in 0..4 {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        if digits == 0 || digits > 5 {
            return Err(malformed());
        }
        let (number, tail) = rest.split_at(digits);
        let unit_length = tail
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_length);
        let number: u64 = number.parse().map_err(|_| malformed())?;
        total += match unit {
            "h" => Duration::from_secs(number * 3600),
            "m" => Duration::from_secs(number * 60),
            "s" => Duration::from_secs(number),
            "ms" => Duration::from_millis(number),
            _ => return Err(malformed()),
        };
        rest = tail;
        if rest.is_empty() {
            return Ok(total);
        }
    }
    Err(malformed())
}

/// Parses a name that becomes a metric label and part of an admin path.
///
/// # Errors
///
/// An empty name, one over 253 characters, or one with other characters than letters, digits, `.`,
/// `_` and `-`.
pub fn name(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if text.is_empty() || text.len() > 253 || !text.chars().all(allowed) {
        return Err("is not a name: use letters, digits, `.`, `_` and `-`".to_owned());
    }
    Ok(text.to_owned())
}

/// Parses `IP:port`.
///
/// # Errors
///
/// Anything else, a host name among it.
pub fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "is not an `IP:port` such as `127.0.0.1:8080` or `[::1]:8080`".to_owned())
}

/// Parses the address of a server: an `IP:port` that can be dialled.
///
/// # Errors
///
/// Anything else, port 0 among it.
pub fn server(text: &str) -> Result<SocketAddr, String> {
    dialable(socket_address(text)?)
}

/// Parses a CIDR or a single address.
///
/// # Errors
///
/// Anything else.
pub fn cidr(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .map(|net| net.trunc())
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| "is not a CIDR such as `10.0.0.0/8`".to_owned())
}

/// Parses a header name.
///
/// # Errors
///
/// Characters that RFC 9110 section 5.1 does not allow, or an underscore: such headers never pass
/// Serin.
pub fn header_name(text: &str) -> Result<HeaderName, String> {
    if text.contains('_') {
        return Err(
            "has an underscore: Serin drops such headers, since some servers read `_` as `-`"
                .to_owned(),
        );
    }
    HeaderName::from_bytes(text.as_bytes()).map_err(|_| "is not a header name".to_owned())
}

/// Parses a header name that an operator may edit: not one that frames or addresses the message.
///
/// # Errors
///
/// As [`header_name`], and the names that the proxy itself answers for.
pub fn editable_header(text: &str) -> Result<HeaderName, String> {
    let name = header_name(text)?;
    match name.as_str() {
        "connection" | "content-length" | "host" | "keep-alive" | "proxy-connection" | "te"
        | "trailer" | "transfer-encoding" | "upgrade" => {
            Err("frames the message and cannot be edited".to_owned())
        }
        _ => Ok(name),
    }
}

/// Parses a header value.
///
/// # Errors
///
/// Control characters.
pub fn header_value(text: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_str(text)
        .map_err(|_| "is not a header value: it has control characters".to_owned())
}

/// Parses a cookie or query parameter name.
///
/// # Errors
///
/// An empty name, or characters that cannot stand in one.
pub fn parameter_name(text: &str) -> Result<String, String> {
    if text.is_empty()
        || text
            .contains(|c: char| c.is_control() || c.is_whitespace() || matches!(c, ';' | '=' | '&'))
    {
        return Err("is not a parameter name".to_owned());
    }
    Ok(text.to_owned())
}

/// Parses a request method, which is case-sensitive (RFC 9110 section 9.1).
///
/// # Errors
///
/// Anything but an upper-case token.
pub fn method(text: &str) -> Result<http::Method, String> {
    if text.is_empty()
        || !text
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte == b'-')
    {
        return Err("is not a method: write it in capitals, like `GET`".to_owned());
    }
    http::Method::from_bytes(text.as_bytes()).map_err(|_| "is not a method".to_owned())
}

/// Parses a host name, or `*.` and the suffix of one.
///
/// # Errors
///
/// Ports, paths, a `*` elsewhere, and what RFC 1123 does not allow.
pub fn hostname(text: &str) -> Result<Hostname, String> {
    if text == "*" {
        return Err("is not a host name: to serve every host, leave `hostnames` out".to_owned());
    }
    let malformed = || {
        "is not a host name: write `shop.example.com` or `*.example.com`, without port".to_owned()
    };
    let suffix = text.strip_prefix("*.");
    let labels = suffix.unwrap_or(text).to_ascii_lowercase();
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if labels.len() > 253 || !labels.split('.').all(label_ok) {
        return Err(malformed());
    }
    Ok(match suffix {
        Some(_) => Hostname::Wildcard(labels),
        None => Hostname::Exact(labels),
    })
}

/// Parses a day, `YYYY-MM-DD`, into the seconds from 1970 to its midnight in UTC.
///
/// # Errors
///
/// Anything else, and days that do not exist.
pub fn day(text: &str) -> Result<u64, String> {
    humantime::parse_rfc3339(&format!("{text}T00:00:00Z"))
        .ok()
        .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
        .map(|since| since.as_secs())
        .ok_or_else(|| "is not a day: write it like `2026-12-31`".to_owned())
}

/// Parses a regular expression that must match the whole value.
///
/// # Errors
///
/// What the `regex` crate says, which has neither back-references nor look-around and so cannot run
/// away.
pub fn regex(text: &str) -> Result<Regex, String> {
    // Alone first, or `a)|(?:b` would be two expressions that are anchored at one end each.
    let alone = Regex::new(text);
    // With `(?x)` a comment at its end must not swallow what closes it.
    let anchored = alone.and_then(|_| {
        Regex::new(&format!("^(?:{text})$")).or_else(|_| Regex::new(&format!("^(?:{text}\n)$")))
    });
    anchored.map_err(|error| match error {
        regex::Error::Syntax(report) => {
            let last = report.lines().last().unwrap_or_default();
            format!(
                "is not a regular expression: {}",
                last.trim_start_matches("error: ")
            )
        }
        error => format!("is not a usable regular expression: {error}"),
    })
}

/// Why a condition is none, and the key of it where that shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// The key; it may be missing.
    pub key: &'static str,
    /// What is wrong, a whole sentence.
    pub reason: String,
    /// What to do about it, where that is not plain.
    pub hint: Option<String>,
}

/// Why a text is no path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathMisfit {
    /// What is wrong.
    pub reason: String,
    /// What to do about it, where that is not plain.
    pub hint: Option<String>,
}

/// Parses a condition on a header, cookie or query parameter.
///
/// # Errors
///
/// A type that does not fit the keys given, or a bad regular expression.
pub fn value_matcher(condition: &NamedMatch) -> Result<ValueMatcher, Misfit> {
    let kind = match (
        condition.kind,
        &condition.value,
        condition.values.is_empty(),
    ) {
        (Some(kind), _, _) => kind,
        (None, Some(_), _) => ValueMatchType::Exact,
        (None, None, false) => ValueMatchType::Set,
        (None, None, true) => ValueMatchType::Present,
    };
    match (kind, &condition.value, condition.values.as_slice()) {
        (ValueMatchType::Exact, Some(value), []) => Ok(ValueMatcher::Exact(value.clone())),
        (ValueMatchType::Prefix, Some(value), []) => Ok(ValueMatcher::Prefix(value.clone())),
        (ValueMatchType::RegularExpression, Some(value), []) => {
            regex_value(value).map(ValueMatcher::Regex)
        }
        (ValueMatchType::Set, None, [_, ..]) => Ok(ValueMatcher::Set(
            condition.values.iter().cloned().collect(),
        )),
        (ValueMatchType::Present, None, []) => Ok(ValueMatcher::Present),
        (ValueMatchType::Set, ..) => Err(needs_values(condition.kind.is_some())),
        (ValueMatchType::Present, ..) => Err(Misfit {
            key: "type",
            reason: "a match of type `Present` has neither `value` nor `values`".to_owned(),
            hint: None,
        }),
        (kind, ..) => Err(needs_value(&kind, condition.kind.is_some())),
    }
}

/// Parses a condition on the path.
///
/// # Errors
///
/// As [`value_matcher`]; and what [`path`] says.
pub fn path_matcher(condition: &PathMatch) -> Result<PathMatcher, Misfit> {
    let kind = match (condition.kind, condition.values.is_empty()) {
        (Some(kind), _) => kind,
        (None, true) => PathMatchType::PathPrefix,
        (None, false) => PathMatchType::Set,
    };
    let path_value = |text: &str| matched_path(text, "value");
    match (kind, &condition.value, condition.values.as_slice()) {
        (PathMatchType::Exact, Some(value), []) => path_value(value).map(PathMatcher::Exact),
        (PathMatchType::PathPrefix, Some(value), []) => {
            path_value(value).map(|path| PathMatcher::prefix(&path))
        }
        (PathMatchType::RegularExpression, Some(value), []) => {
            regex_value(value).map(PathMatcher::Regex)
        }
        (PathMatchType::Set, None, values @ [_, ..]) => values
            .iter()
            .map(|value| matched_path(value, "values"))
            .collect::<Result<_, _>>()
            .map(PathMatcher::Set),
        (PathMatchType::Set, ..) => Err(needs_values(condition.kind.is_some())),
        (kind, ..) => Err(needs_value(&kind, condition.kind.is_some())),
    }
}

fn regex_value(text: &str) -> Result<Regex, Misfit> {
    regex(text).map_err(|reason| Misfit {
        key: "value",
        reason: format!("`{text}` {reason}"),
        hint: None,
    })
}

fn needs_value(kind: &impl std::fmt::Debug, named: bool) -> Misfit {
    let key = if named { "type" } else { "values" };
    Misfit {
        key,
        reason: format!("a match of type `{kind:?}` needs `value`, and no `values`"),
        hint: None,
    }
}

fn needs_values(named: bool) -> Misfit {
    let key = if named { "type" } else { "value" };
    Misfit {
        key,
        reason: "a match of type `Set` needs `values`, and no `value`".to_owned(),
        hint: None,
    }
}

fn matched_path(text: &str, key: &'static str) -> Result<String, Misfit> {
    path(text).map_err(|PathMisfit { reason, hint }| Misfit {
        key,
        reason: format!("path `{text}` {reason}"),
        hint,
    })
}

/// Parses a path into the form that requests are matched and sent on in, so that it does not matter
/// how it is escaped.
///
/// # Errors
///
/// A path that does not begin with `/`, has more than a path has, or with which no request is taken
/// or sent on.
pub fn path(text: &str) -> Result<String, PathMisfit> {
    let misfit = |reason: &str, hint| PathMisfit {
        reason: reason.to_owned(),
        hint,
    };
    if !text.starts_with('/') {
        return Err(misfit("does not begin with `/`", None));
    }
    if text.contains(['?', '#']) || text.contains(char::is_whitespace) {
        let reason = "has a query, a fragment or white space, which no request path has";
        return Err(misfit(reason, None));
    }
    match canonical(text) {
        Ok(canonical) => Ok(canonical.path.into_owned()),
        Err(unfit) => {
            let (part, hint) = unfit_part(unfit);
            let reason = format!("has {part}, with which no request is taken or sent on");
            Err(misfit(&reason, Some(hint.to_owned())))
        }
    }
}

/// The part of a path that cannot stay, and what may be written instead.
const fn unfit_part(unfit: Unfit) -> (&'static str, &'static str) {
    match unfit {
        Unfit::Dots => (
            "a segment of dots",
            "servers disagree about `.` and `..`: write the path without them",
        ),
        Unfit::Backslash => (
            "a backslash",
            "servers disagree about it: write `/`, if that is meant",
        ),
        Unfit::Nul => ("a NUL", "servers disagree about it: leave it out"),
        Unfit::Escape => (
            "a `%` that begins no escape",
            "a percent sign itself is written `%25`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::file::DURATION_PATTERN;
    use super::*;

    #[test]
    fn durations_are_those_of_gep_2257() {
        assert_eq!(duration("1h30m").unwrap(), Duration::from_secs(5400));
        assert_eq!(duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(duration("0s").unwrap(), Duration::ZERO);
        for bad in [
            "",
            "1",
            "s",
            "1d",
            "-1s",
            "1.5s",
            "100000s",
            "1 s",
            "1s1s1s1s1s",
            "1S",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn duration_and_its_published_pattern_agree(text in "[0-9hms]{0,9}|\\PC{0,6}") {
            let pattern = Regex::new(DURATION_PATTERN).unwrap();
            prop_assert_eq!(duration(&text).is_ok(), pattern.is_match(&text));
        }
    }

    #[test]
    fn hostnames_are_names_or_wildcard_suffixes() {
        assert_eq!(
            hostname("Shop.Example.com").unwrap(),
            Hostname::Exact("shop.example.com".into())
        );
        assert_eq!(
            hostname("*.example.com").unwrap(),
            Hostname::Wildcard("example.com".into())
        );
        for bad in [
            "", "*", "a.*.b", "*a.b", "shop:80", "a..b", "-a.b", "http://a", "a/b", "a_b.c",
        ] {
            assert!(hostname(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn underscore_headers_are_refused_because_they_are_dropped() {
        assert!(header_name("x_user_id").unwrap_err().contains("underscore"));
        assert!(editable_header("content-length").is_err());
    }

    #[test]
    fn paths_have_the_form_of_requests() {
        for (text, expected) in [
            ("/shop", "/shop"),
            ("/%7Eann", "/~ann"),
            ("/caf%c3%a9", "/caf%C3%A9"),
            ("/é", "/%C3%A9"),
            ("/{id}", "/%7Bid%7D"),
        ] {
            assert_eq!(path(text).unwrap(), expected, "{text}");
        }
        for bad in ["", "a", "/a?b", "/a b"] {
            assert_eq!(path(bad).unwrap_err().hint, None, "{bad}");
        }
        for bad in [
            "/a/../b", "/x/./y", "/x/%2E", "/a\\b", "/a%00", "/a\0", "/a%",
        ] {
            assert!(path(bad).unwrap_err().hint.is_some(), "{bad}");
        }
    }

    #[test]
    fn days_exist() {
        assert_eq!(day("1970-01-02").unwrap(), 86_400);
        assert!(day("2026-02-30").is_err());
        assert!(day("soon").is_err());
    }
}
