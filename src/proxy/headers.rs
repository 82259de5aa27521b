//! What a gateway does to header sections: hop-by-hop fields go, forwarding fields come, the
//! configured edits happen.

use http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, HeaderMap,
    HeaderName, HeaderValue, SET_COOKIE, TE, TRANSFER_ENCODING, UPGRADE, VARY, VIA,
};
use http::request::Parts;
use http::{Response, StatusCode, Uri};
use hyper::body::Incoming;

use crate::backend::Endpoint;
use crate::config;
use crate::routing::identity::ANONYMOUS_COOKIE;
use crate::routing::request::text;
use crate::routing::{BASELINE, Decision};
use crate::snapshot::{Route, RouteTarget, Snapshot};

use super::Verdict;
use super::error::ProxyError;
use super::origin::{Origin, X_FORWARDED_FOR, with_path};

const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_SERVICE_VERSION: HeaderName = HeaderName::from_static("x-service-version");
const X_SERIN_DECISION: HeaderName = HeaderName::from_static("x-serin-decision");

/// Fields that are for one connection only (RFC 9110 section 7.6.1, and Proxy-Connection, which
/// never was a standard). `Trailer` stays: hyper sends only trailers that it names.
const HOP_BY_HOP: [HeaderName; 7] = [
    // For the upgrade to HTTP/2 that RFC 9113 has abolished, and that only smuggles (section 3.1).
    HeaderName::from_static("http2-settings"),
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// What a header section has that needs care, found in one pass over its names.
///
/// Most requests have next to nothing of it, and asking a header map for each such name costs more
/// than everything else that is done to a typical head: about 150 instructions a question.
#[derive(Clone, Copy, Debug)]
pub struct Survey {
    cares: u16,
    repeated: bool,
}

// === impl Survey ===

impl Survey {
    const CONNECTION: u16 = 1;
    const HOP_BY_HOP: u16 = 1 << 1;
    const TRANSFER_ENCODING: u16 = 1 << 2;
    const FORWARDING: u16 = 1 << 3;
    const EXPECT: u16 = 1 << 4;
    const OURS: u16 = 1 << 5;
    const AMBIGUOUS: u16 = 1 << 6;
    const COOKIE: u16 = 1 << 7;
    /// A `TE` field.
    pub const TE: u16 = 1 << 8;
    /// A `Via` field.
    pub const VIA: u16 = 1 << 9;
    /// An `Upgrade` field.
    pub const UPGRADE: u16 = 1 << 10;
    /// A `Content-Type` field.
    pub const CONTENT_TYPE: u16 = 1 << 11;

    /// Looks at every name once.
    pub fn of(headers: &HeaderMap) -> Self {
        Self {
            cares: headers
                .keys()
                .fold(0, |cares, name| cares | Self::care(name.as_str())),
            repeated: headers.len() > headers.keys_len(),
        }
    }

    /// True when some field stands there more than once.
    pub fn has_repeated(self) -> bool {
        self.repeated
    }

    fn care(name: &str) -> u16 {
        if !matches!(
            name.as_bytes().first(),
            Some(b'c' | b'e' | b'f' | b'h' | b'k' | b'p' | b't' | b'u' | b'v' | b'x')
        ) {
            // Neither `host` nor `accept` and the like need to be compared with all of them.
            return if name.contains('_') {
                Self::AMBIGUOUS
            } else {
                0
            };
        }
        match name {
            "connection" => Self::CONNECTION | Self::HOP_BY_HOP,
            "transfer-encoding" => Self::TRANSFER_ENCODING | Self::HOP_BY_HOP,
            "keep-alive" | "proxy-connection" | "http2-settings" => Self::HOP_BY_HOP,
            "upgrade" => Self::UPGRADE | Self::HOP_BY_HOP,
            "te" => Self::TE | Self::HOP_BY_HOP,
            "via" => Self::VIA,
            "cookie" => Self::COOKIE,
            "content-type" => Self::CONTENT_TYPE,
            "expect" => Self::EXPECT,
            "x-service-version" | "x-serin-decision" => Self::OURS,
            name if name.contains('_') => Self::AMBIGUOUS,
            name if is_forwarding(name) => Self::FORWARDING,
            _ => 0,
        }
    }

    /// True when there is a field of this kind.
    pub fn has(self, care: u16) -> bool {
        self.cares & care != 0
    }
}

/// Refuses a request that says who the user is, or what he wants, twice or in no readable way:
/// whoever reads it otherwise disagrees with us.
///
/// # Errors
///
/// [`ProxyError::BadRequest`].
pub fn refuse_ambiguous(
    headers: &HeaderMap,
    survey: Survey,
    guarded: &[HeaderName],
) -> Result<(), ProxyError> {
    for name in guarded {
        if survey.repeated && headers.get_all(name).iter().count() > 1 {
            return Err(ProxyError::BadRequest(
                "a header that decides about the version is repeated",
            ));
        }
        if headers.get(name).is_some_and(|value| text(value).is_none()) {
            return Err(ProxyError::BadRequest(
                "a header that decides about the version is not UTF-8",
            ));
        }
    }
    Ok(())
}

/// Refuses a body under a transfer coding that nobody here undoes (RFC 9112 section 6.1): the field
/// goes, and what would be left is not what was meant.
///
/// # Errors
///
/// `refusal`.
pub fn refuse_transfer_coding(
    headers: &HeaderMap,
    survey: Survey,
    refusal: impl FnOnce() -> ProxyError,
) -> Result<(), ProxyError> {
    if !survey.has(Survey::TRANSFER_ENCODING) {
        return Ok(());
    }
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(only), None) if only.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err(refusal()),
    }
}

/// Refuses a head that is larger than its listener allows.
///
/// # Errors
///
/// [`ProxyError::UriTooLong`] and [`ProxyError::HeadTooLarge`].
pub fn refuse_beyond_limits(
    parts: &Parts,
    listener: Option<&config::Listener>,
) -> Result<(), ProxyError> {
    let Some(config::Listener { limits, .. }) = listener else {
        return Ok(());
    };
    let target = parts.uri.path_and_query();
    if target.is_some_and(|target| target.as_str().len() > limits.uri) {
        return Err(ProxyError::UriTooLong);
    }
    if parts.headers.len() > limits.header_fields {
        return Err(ProxyError::HeadTooLarge);
    }
    Ok(())
}

/// True when the client takes trailers (RFC 9110 section 10.1.4).
pub fn accepts_trailers(headers: &HeaderMap) -> bool {
    let codings = headers.get_all(TE).iter().filter_map(text);
    let mut codings = codings.flat_map(|line| line.split(','));
    codings.any(|coding| coding.trim().eq_ignore_ascii_case("trailers"))
}

/// Makes one field of several `Cookie` fields: HTTP/2 may send each cookie in its own (RFC 9113
/// section 8.2.3), and nobody behind us may see other cookies than we do.
pub fn join_cookies(headers: &mut HeaderMap, survey: Survey) {
    if !survey.repeated || !survey.has(Survey::COOKIE) {
        return;
    }
    let crumbs: Vec<&[u8]> = headers
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if crumbs.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        headers.insert(COOKIE, joined);
    }
}

/// Makes a request ready for the endpoint.
pub fn prepare_request(
    parts: &mut Parts,
    survey: Survey,
    route: &Route,
    endpoint: &Endpoint,
    subject_headers: &[HeaderName],
    origin: &Origin<'_>,
) {
    let headers = &mut parts.headers;
    // Ours come after what the client nominates in Connection is gone; otherwise it could delete
    // them (CVE-2024-45410).
    remove_hop_by_hop(headers, survey, &route.guarded_headers);
    if survey.has(Survey::AMBIGUOUS) {
        remove_ambiguous(headers);
    }
    if survey.has(Survey::EXPECT) {
        headers.remove(EXPECT);
    }
    if survey.has(Survey::OURS) {
        headers.remove(X_SERVICE_VERSION);
        headers.remove(X_SERIN_DECISION);
    }
    if survey.has_repeated() {
        unite_lengths(headers);
    }
    if !origin.trusted {
        for name in &route.unbelieved_headers {
            headers.remove(name);
        }
    }
    for name in subject_headers {
        headers.remove(name);
    }
    if let Some(tls) = &origin.peer.tls
        && let Some((name, Some(subject))) = &tls.subject
    {
        headers.insert(name, subject.clone());
    }
    let host = headers.get(HOST).cloned();
    let host = host.or_else(|| authority_value(&parts.uri).inspect(|host| set_host(headers, host)));
    forward(headers, survey, origin, host.as_ref());
    if host.is_none()
        && let Ok(host) = HeaderValue::from_str(&endpoint.authority)
    {
        // HTTP/1.0 does without Host, the endpoint's HTTP/1.1 does not.
        set_host(headers, &host);
    }
    if parts.uri.authority().is_some() {
        parts.uri = origin_form(&parts.uri);
    }
}

/// Leaves one of several equal lengths, which are all that hyper lets through (RFC 9110 section 8.6):
/// in HTTP/2 they make a message malformed.
fn unite_lengths(headers: &mut HeaderMap) {
    if let Some(length) = headers.get(CONTENT_LENGTH).cloned() {
        headers.insert(CONTENT_LENGTH, length);
    }
}

/// Changes the request as the filters of its route say; the match has taken the first `matched`
/// bytes of its path.
pub fn rewrite(parts: &mut Parts, route: &Route, matched: usize) {
    let filters = &route.filters;
    filters.request_headers.apply(&mut parts.headers);
    if let Some(hostname) = &filters.hostname {
        set_host(&mut parts.headers, hostname);
    }
    if let Some(path) = &filters.path {
        let path = path.apply(parts.uri.path(), matched);
        if let Some(uri) = with_path(&parts.uri, &path) {
            parts.uri = uri;
        }
    }
}

/// Makes a response ready for the client.
pub(super) fn prepare_response(
    response: &mut Response<Incoming>,
    survey: Survey,
    route: &Route,
    target: &RouteTarget,
    verdict: &Verdict,
) {
    // hyper's client leaves a Content-Length beside Transfer-Encoding, which RFC 9112 section 6.3
    // says to ignore, and one where there is no body (RFC 9110 section 8.6).
    let has_none = response.status() == StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    if survey.has(Survey::TRANSFER_ENCODING) || has_none {
        headers.remove(CONTENT_LENGTH);
    } else if survey.has_repeated() {
        unite_lengths(headers);
    }
    remove_hop_by_hop(headers, survey, &[]);
    if survey.has(Survey::OURS) {
        headers.remove(X_SERIN_DECISION);
    }
    target.backend.response_headers.apply(headers);
    route.filters.response_headers.apply(headers);
    if let Some(grant) = &verdict.cors {
        grant.write(headers);
    }
    if route.expose_version {
        headers.insert(X_SERVICE_VERSION, target.version.clone());
    }
    if let Some(vary) = &route.vary {
        headers.append(VARY, vary.clone());
    }
    if let Some(cookie) = &verdict.set_cookie {
        headers.append(SET_COOKIE, cookie.clone());
        keep_from_shared_caches(headers);
    }
    if let Some(debug) = &verdict.debug {
        headers.insert(X_SERIN_DECISION, debug.clone());
    }
}

/// A shared cache must not give one visitor's id to all. `private` says so beside anything else (RFC
/// 9111 section 3); what forbids more stays alone.
fn keep_from_shared_caches(headers: &mut HeaderMap) {
    let lines = headers.get_all(CACHE_CONTROL).iter().filter_map(text);
    let mut directives = lines.flat_map(|line| line.split(',')).map(str::trim);
    let is_forbidden =
        |one: &str| one.eq_ignore_ascii_case("no-store") || one.eq_ignore_ascii_case("private");
    if !directives.any(is_forbidden) {
        headers.append(CACHE_CONTROL, HeaderValue::from_static("private"));
    }
}

/// The Set-Cookie value that issues an anonymous id for a year.
pub fn anonymous_cookie(identity: &str) -> Option<HeaderValue> {
    let cookie =
        format!("{ANONYMOUS_COOKIE}={identity}; Path=/; Max-Age=31536000; HttpOnly; SameSite=Lax");
    HeaderValue::from_str(&cookie).ok()
}

/// How a request was decided, in the form of X-Serin-Decision.
pub fn debug_value(
    decision: &Decision<'_>,
    route: &Route,
    snapshot: &Snapshot,
) -> Option<HeaderValue> {
    let canary = if decision.target == BASELINE {
        1
    } else {
        decision.target
    };
    let bucket = decision
        .identity
        .as_ref()
        .and_then(|identity| route.gray.split.entry_share(&identity.value, canary));
    let bucket = bucket.map_or_else(|| "-".to_owned(), |share| share.0.to_string());
    let text = format!(
        "route={}; backend={}; reason={}; rule={}; bucket={bucket}; revision={}",
        route.name,
        route.targets[decision.target].backend.name,
        decision.reason.as_str(),
        decision.rule.unwrap_or("-"),
        snapshot.revision,
    );
    HeaderValue::from_str(&text).ok()
}

/// Removes what is for this connection only, with what `Connection` nominates; but nobody may
/// nominate away what says who sent the request, what it is for, or how long it is.
fn remove_hop_by_hop(headers: &mut HeaderMap, survey: Survey, guarded: &[HeaderName]) {
    if survey.has(Survey::CONNECTION) {
        let nominated: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(text)
            .flat_map(|line| line.split(','))
            .filter_map(|token| HeaderName::from_bytes(token.trim().as_bytes()).ok())
            .filter(|name| !may_not_be_nominated(name) && !guarded.contains(name))
            .collect();
        for name in &nominated {
            headers.remove(name);
        }
    }
    if survey.has(Survey::HOP_BY_HOP) {
        for name in &HOP_BY_HOP {
            headers.remove(name);
        }
    }
}

fn may_not_be_nominated(name: &HeaderName) -> bool {
    *name == HOST
        || *name == COOKIE
        || *name == CONTENT_LENGTH
        || *name == AUTHORIZATION
        || *name == VIA
        || is_forwarding(name.as_str())
}

/// True for fields that only a trusted proxy may have written.
fn is_forwarding(name: &str) -> bool {
    matches!(name, "forwarded" | "x-real-ip") || name.starts_with("x-forwarded-")
}

/// What may not come in the head from anybody may not come behind the body either.
pub(super) fn remove_unsafe_trailers(
    trailers: &mut HeaderMap,
    guarded: &[HeaderName],
    subject_headers: &[HeaderName],
) {
    let is_unsafe = |name: &HeaderName| {
        name.as_str().contains('_')
            || may_not_be_nominated(name)
            || guarded.contains(name)
            || subject_headers.contains(name)
            || HOP_BY_HOP.contains(name)
    };
    remove_all(trailers, is_unsafe);
}

/// Removes what says something of a connection or a length, which nothing behind a body may; in
/// HTTP/2 it would make the response malformed.
pub(super) fn remove_framing_trailers(trailers: &mut HeaderMap) {
    remove_all(trailers, |name| {
        HOP_BY_HOP.contains(name) || *name == CONTENT_LENGTH
    });
}

/// Removes names with underscores: some servers read `x_user_id` as `x-user-id`, and would see
/// another user than we do.
fn remove_ambiguous(headers: &mut HeaderMap) {
    remove_all(headers, |name| name.as_str().contains('_'));
}

fn remove_all(headers: &mut HeaderMap, is_meant: impl Fn(&HeaderName) -> bool) {
    let meant: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_meant(name))
        .cloned()
        .collect();
    for name in meant {
        headers.remove(name);
    }
}

/// Writes the forwarding fields; what came from an untrusted peer is not carried on.
fn forward(
    headers: &mut HeaderMap,
    survey: Survey,
    origin: &Origin<'_>,
    host: Option<&HeaderValue>,
) {
    let proto = HeaderValue::from_static(origin.scheme());
    if origin.trusted && survey.has(Survey::FORWARDING) {
        let chain = forwarded_chain(headers, &origin.peer.forwarded);
        headers.insert(X_FORWARDED_FOR, chain);
        headers.entry(X_FORWARDED_PROTO).or_insert(proto);
        if let Some(host) = host {
            let entry = headers.entry(X_FORWARDED_HOST);
            entry.or_insert_with(|| host.clone());
        }
        return;
    }
    if survey.has(Survey::FORWARDING) {
        remove_all(headers, |name| is_forwarding(name.as_str()));
    }
    headers.insert(X_FORWARDED_FOR, origin.peer.forwarded.clone());
    headers.insert(X_FORWARDED_PROTO, proto);
    if let Some(host) = host {
        headers.insert(X_FORWARDED_HOST, host.clone());
    }
}

/// What is in X-Forwarded-For already, joined into one line with `peer` at its end.
fn forwarded_chain(headers: &HeaderMap, peer: &HeaderValue) -> HeaderValue {
    let mut lines: Vec<&[u8]> = headers
        .get_all(X_FORWARDED_FOR)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    lines.push(peer.as_bytes());
    HeaderValue::from_bytes(&lines.join(&b", "[..])).unwrap_or_else(|_| peer.clone())
}

fn set_host(headers: &mut HeaderMap, host: &HeaderValue) {
    headers.insert(HOST, host.clone());
}

fn authority_value(uri: &Uri) -> Option<HeaderValue> {
    uri.authority()
        .and_then(|authority| HeaderValue::from_str(authority.as_str()).ok())
}

/// The request target as an origin server wants it (RFC 9112 section 3.2.1).
fn origin_form(uri: &Uri) -> Uri {
    match uri.path_and_query() {
        Some(target) if uri.authority().is_some() => Uri::from(target.clone()),
        _ => uri.clone(),
    }
}

#[cfg(test)]
mod tests {
    use http::header::CONTENT_TYPE;

    use super::*;

    #[test]
    fn a_survey_knows_every_name_that_is_removed() {
        let forwarding = [
            X_FORWARDED_FOR,
            X_FORWARDED_HOST,
            X_FORWARDED_PROTO,
            HeaderName::from_static("x-forwarded-port"),
            HeaderName::from_static("x-real-ip"),
            HeaderName::from_static("forwarded"),
        ];
        let mut headers = HeaderMap::new();
        for (names, care) in [
            (&HOP_BY_HOP[..], Survey::HOP_BY_HOP),
            (&forwarding, Survey::FORWARDING),
            (&[X_SERVICE_VERSION, X_SERIN_DECISION], Survey::OURS),
            (&[EXPECT], Survey::EXPECT),
            (&[TE], Survey::TE),
            (&[UPGRADE], Survey::UPGRADE),
            (&[VIA], Survey::VIA),
            (&[COOKIE], Survey::COOKIE),
            (&[CONTENT_TYPE], Survey::CONTENT_TYPE),
            (&[CONNECTION], Survey::CONNECTION),
            (&[TRANSFER_ENCODING], Survey::TRANSFER_ENCODING),
            (&[HeaderName::from_static("x_user_id")], Survey::AMBIGUOUS),
        ] {
            for name in names {
                headers.clear();
                headers.insert(HOST, HeaderValue::from_static("a"));
                assert_eq!(Survey::of(&headers).cares, 0);
                headers.insert(name, HeaderValue::from_static("a"));
                assert!(Survey::of(&headers).has(care), "{name}");
                assert!(!Survey::of(&headers).has_repeated());
                headers.append(name, HeaderValue::from_static("b"));
                assert!(Survey::of(&headers).has_repeated());
            }
        }
    }
}
