//! Where a request comes from: its client, and what may be believed about it.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use http::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery};
use http::{Method, Request, Uri, Version};
use rustls::{ProtocolVersion, ServerConnection};

use crate::config;
use crate::routing::RequestHead;
use crate::routing::path::{Canonical, canonical};
use crate::routing::request::text;
use crate::snapshot::Snapshot;
use crate::tls::{ALPN_HTTP2, certificate};

use super::error::ProxyError;
use super::headers::Survey;

/// The header in which proxies pass the client's address on.
pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The address of the listener that it came through.
    pub listener: SocketAddr,
    /// Our end.
    pub local: SocketAddr,
    /// Its own address.
    pub address: SocketAddr,
    /// What is written of it into X-Forwarded-For; made once for all its requests.
    pub forwarded: HeaderValue,
    /// What came of its TLS handshake; `None` without TLS.
    pub tls: Option<TlsSession>,
    /// What is let go of when the connection has ended, and every tunnel that it became or carries.
    pub guards: Guards,
}

/// What counts a connection for as long as it is there.
pub type Guards = Rc<dyn fmt::Debug>;

/// What came of a client's TLS handshake.
#[derive(Clone, Debug)]
pub struct TlsSession {
    /// The version, as in `TLSv1.3`.
    pub version: &'static str,
    /// The header in which the subject of the client's certificate is passed on, and the subject.
    pub subject: Option<(HeaderName, Option<HeaderValue>)>,
    /// The handshake agreed on HTTP/2.
    pub speaks_http2: bool,
}

/// Where a request comes from.
#[derive(Clone, Debug)]
pub struct Origin<'p> {
    /// The other end of the connection.
    pub peer: &'p Peer,
    /// The listener that it came through, as it is configured now.
    pub listener: Option<&'p config::Listener>,
    /// The client: the peer, or whom trusted proxies name.
    pub client: IpAddr,
    /// True when the peer is one of the listener's trusted proxies.
    pub trusted: bool,
}

// === impl Peer ===

impl Peer {
    /// The peer at `address`, whose connection came through the listener at `listener`.
    pub fn new(listener: SocketAddr, address: SocketAddr, guards: Guards) -> Self {
        Self {
            listener,
            local: listener,
            address,
            forwarded: forwarded(address),
            tls: None,
            guards,
        }
    }
}

impl Peer {
    /// What has connected speaks for this client, and says so for the whole connection.
    pub fn speaks_for(&mut self, client: SocketAddr) {
        self.address = client;
        self.forwarded = forwarded(client);
    }
}

fn forwarded(address: SocketAddr) -> HeaderValue {
    let shown = address.ip().to_canonical().to_string();
    HeaderValue::from_str(&shown).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
}

// === impl TlsSession ===

impl TlsSession {
    /// What a handshake that is over has given.
    pub fn of(connection: &ServerConnection, subject_header: Option<HeaderName>) -> Self {
        let version = match connection.protocol_version() {
            Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
            Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
            _ => "unknown",
        };
        let leaf = connection.peer_certificates().and_then(<[_]>::first);
        let subject = || {
            let subject = certificate::subject(leaf?)?;
            HeaderValue::from_bytes(subject.as_bytes()).ok()
        };
        Self {
            version,
            subject: subject_header.map(|header| (header, subject())),
            speaks_http2: connection.alpn_protocol() == Some(ALPN_HTTP2),
        }
    }
}

// === impl Origin ===

impl<'p> Origin<'p> {
    /// Finds the client: from the right of X-Forwarded-For, the first address that is not a trusted
    /// proxy's, since what stands left of it anybody could have written.
    pub fn new(snapshot: &'p Snapshot, peer: &'p Peer, headers: &HeaderMap) -> Self {
        let address = peer.address.ip().to_canonical();
        let listener = snapshot.listener(peer.listener);
        let listener = listener.map(|listener| &listener.settings);
        let is_proxy = |address| listener.is_some_and(|listener| listener.trusts(address));
        if !is_proxy(address) {
            return Self {
                peer,
                listener,
                client: address,
                trusted: false,
            };
        }
        let forwarded = forwarded_from_the_right(headers).map_while(|address| address);
        let hops = listener.and_then(|listener| listener.trusted_hops);
        let client = match hops {
            // The first of them is the peer itself, which has written the last entry.
            Some(hops) => forwarded.take(hops).last(),
            None => first_unknown(forwarded, is_proxy),
        };
        let client = client.unwrap_or(address);
        Self {
            peer,
            listener,
            client,
            trusted: true,
        }
    }
}

impl Origin<'_> {
    /// The longest gap in the body of a request.
    pub fn body_gap(&self) -> Option<Duration> {
        self.listener.map(|listener| listener.timeouts.request_body)
    }

    /// The most bytes of a request body.
    pub fn body_limit(&self) -> Option<u64> {
        self.listener?.limits.request_body
    }

    /// The client, and where it has connected to; its port only where it is the peer.
    pub fn addresses(&self) -> (SocketAddr, SocketAddr) {
        let is_peer = self.client == self.peer.address.ip().to_canonical();
        let port = if is_peer { self.peer.address.port() } else { 0 };
        (SocketAddr::new(self.client, port), self.peer.local)
    }

    /// The scheme of the request as its client sees it.
    pub fn scheme(&self) -> &'static str {
        if self.peer.tls.is_some() {
            "https"
        } else {
            "http"
        }
    }

    /// The client as text.
    pub fn client_text(&self) -> Cow<'_, str> {
        match self.peer.forwarded.to_str() {
            Ok(peer) if self.client == self.peer.address.ip().to_canonical() => peer.into(),
            _ => self.client.to_string().into(),
        }
    }
}

/// What routing reads of a request by `client`.
pub fn head<'a>(parts: &'a Parts, host: &'a str, client: IpAddr) -> RequestHead<'a> {
    RequestHead {
        host,
        // `OPTIONS *` is about the whole server.
        path: match parts.uri.path() {
            "*" => "/",
            path => path,
        },
        query: parts.uri.query(),
        method: &parts.method,
        headers: &parts.headers,
        client,
    }
}

/// Brings the target of a request into the form that routes match and that is sent on, and tells
/// whether its path has escaped slashes.
///
/// # Errors
///
/// [`ProxyError::BadRequest`] for a path that servers disagree about.
pub fn canonical_target(parts: &mut Parts) -> Result<bool, ProxyError> {
    let Canonical {
        path,
        has_escaped_slash,
    } = canonical(parts.uri.path()).map_err(|unfit| ProxyError::BadRequest(unfit.words()))?;
    if let Cow::Owned(path) = path {
        let rewritten = with_path(&parts.uri, &path);
        parts.uri = rewritten.ok_or(ProxyError::BadRequest("malformed request target"))?;
    }
    Ok(has_escaped_slash)
}

/// The same target with another path.
pub fn with_path(uri: &Uri, path: &str) -> Option<Uri> {
    let target = match uri.query() {
        Some(query) => PathAndQuery::try_from(format!("{path}?{query}")),
        None => PathAndQuery::try_from(path),
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(target.ok()?);
    Uri::from_parts(parts).ok()
}

/// The host that a request names, be it well-formed or not, for those who write down what was asked for.
/// It goes without a name and password before it, which make it malformed, but are secrets all the same.
pub(super) fn named_host<B>(request: &Request<B>) -> Option<&[u8]> {
    let authority = request.uri().authority();
    let authority = authority.map(|authority| authority.as_str().as_bytes());
    let field = || request.headers().get(HOST).map(HeaderValue::as_bytes);
    let host = authority.or_else(field)?;
    Some(memchr::memrchr(b'@', host).map_or(host, |at| &host[at + 1..]))
}

/// The host that a request is for, in lower case and without port (RFC 9112 section 3.2); empty where
/// HTTP/1.0 names none.
///
/// # Errors
///
/// [`ProxyError::BadRequest`] for a missing, repeated or malformed Host and for a target that is not
/// one of HTTP, and [`ProxyError::MethodNotAllowed`] for methods that are not for gateways.
pub fn host(parts: &Parts, survey: Survey) -> Result<Cow<'_, str>, ProxyError> {
    if matches!(parts.method, Method::CONNECT | Method::TRACE) {
        return Err(ProxyError::MethodNotAllowed);
    }
    let is_asterisk = parts.uri.path() == "*";
    if is_asterisk && parts.method != Method::OPTIONS
        || is_authority_form(&parts.uri)
        || !is_of_http(&parts.uri)
    {
        return Err(ProxyError::BadRequest("malformed request target"));
    }
    let field = parts.headers.get(HOST);
    if survey.has_repeated() && parts.headers.get_all(HOST).iter().count() > 1 {
        return Err(ProxyError::BadRequest("more than one Host header"));
    }
    if let (None, Some(field)) = (parts.uri.authority(), field)
        && let Some(host) = text(field)
        && is_plain(host)
    {
        return Ok(Cow::Borrowed(host));
    }
    let authority = match (parts.uri.authority(), field.map(field_text)) {
        (Some(authority), Some(field)) if authority.as_str().eq_ignore_ascii_case(field) => field,
        (Some(_), Some(_)) => {
            return Err(ProxyError::BadRequest(
                "the Host header is not the host of the target",
            ));
        }
        (None, Some(field)) => field,
        (Some(authority), None) if !needs_host_field(parts.version) => authority.as_str(),
        (None, None) if parts.version == Version::HTTP_10 => "",
        (_, None) => return Err(ProxyError::BadRequest("no Host header")),
    };
    if authority.is_empty() && parts.version == Version::HTTP_10 {
        return Ok(Cow::Borrowed(""));
    }
    let host = host_of(authority).ok_or(ProxyError::BadRequest("malformed host"))?;
    Ok(lower(host))
}

/// HTTP/1.1 has no request without a Host field; HTTP/1.0 does not know it, and HTTP/2 has
/// `:authority` instead (RFC 9113 section 8.3.1).
fn needs_host_field(version: Version) -> bool {
    version == Version::HTTP_11
}

/// What is no text is no host either.
fn field_text(field: &HeaderValue) -> &str {
    text(field).unwrap_or("?")
}

/// True for what nearly every host is: a name in lower case without a port, which needs no further
/// look.
fn is_plain(host: &str) -> bool {
    let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.');
    !host.is_empty() && !host.ends_with('.') && host.bytes().all(plain)
}

/// The host of an authority, without port and trailing dot; `None` for what is no host. That is also
/// one with userinfo, which RFC 9110 section 4.2.4 wants treated as an error.
fn host_of(authority: &str) -> Option<&str> {
    if authority.contains(['@', ',', '?']) || authority.parse::<Authority>().is_err() {
        return None;
    }
    let host = without_port(authority)?;
    let host = host.strip_suffix('.').unwrap_or(host);
    // A second dot would be a host that no route names, and that resolvers may take for the first.
    let is_whole = !host.is_empty() && !host.ends_with('.');
    is_whole.then_some(host)
}

/// What stands before the port, if there is one; `None` if what follows the host is none. One
/// function for both, so that what is accepted as a port is also cut off.
fn without_port(authority: &str) -> Option<&str> {
    let end = if authority.starts_with('[') {
        // The colons of an IPv6 address are within the brackets.
        authority.find(']')? + 1
    } else {
        authority.find([':', '[']).unwrap_or(authority.len())
    };
    let (host, rest) = authority.split_at(end);
    let is_whole = rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port);
    is_whole.then_some(host)
}

/// True for what may follow the colon, nothing among it (RFC 3986 section 3.2.3). `parse` alone would
/// also take a sign.
fn is_port(port: &str) -> bool {
    port.len() <= 5
        && port.bytes().all(|byte| byte.is_ascii_digit())
        && (port.is_empty() || port.parse::<u16>().is_ok())
}

/// True for the target that is only for CONNECT (RFC 9112 section 3.2.3).
fn is_authority_form(uri: &Uri) -> bool {
    uri.authority().is_some() && uri.scheme().is_none()
}

/// False for a target of another scheme, which an endpoint would be asked for as if it were HTTP's.
fn is_of_http(uri: &Uri) -> bool {
    let is_http =
        |scheme: &str| scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https");
    uri.scheme_str().is_none_or(is_http)
}

fn lower(host: &str) -> Cow<'_, str> {
    if host.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(host.to_ascii_lowercase())
    } else {
        Cow::Borrowed(host)
    }
}

/// The first address that is no proxy's; if all are, the last one.
fn first_unknown(
    addresses: impl Iterator<Item = IpAddr>,
    is_proxy: impl Fn(IpAddr) -> bool,
) -> Option<IpAddr> {
    let mut last = None;
    for address in addresses {
        last = Some(address);
        if !is_proxy(address) {
            break;
        }
    }
    last
}

/// The entries of X-Forwarded-For, last first; `None` for one that is no address.
fn forwarded_from_the_right(headers: &HeaderMap) -> impl Iterator<Item = Option<IpAddr>> {
    let lines: Vec<&HeaderValue> = headers.get_all(X_FORWARDED_FOR).iter().collect();
    lines.into_iter().rev().flat_map(|line| {
        let entries = text(line).unwrap_or("?").rsplit(',').map(str::trim);
        entries.map(|entry| address_in(entry).map(|address| address.to_canonical()))
    })
}

/// An address, with a port as some load balancers add it or without.
fn address_in(entry: &str) -> Option<IpAddr> {
    let bare = entry.trim_matches(['[', ']']).parse();
    let with_port = || entry.parse().map(|address: SocketAddr| address.ip());
    bare.or_else(|_| with_port()).ok()
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    /// The host of a request of HTTP/1.1 with this Host field.
    fn asked(field: &str) -> Result<String, ProxyError> {
        let request = Request::get("/").header(HOST, field).body(()).unwrap();
        let parts = request.into_parts().0;
        host(&parts, Survey::of(&parts.headers)).map(Cow::into_owned)
    }

    #[test]
    fn a_host_has_one_form_whatever_port_it_is_asked_at() {
        for (field, expected) in [
            ("shop.example.com", "shop.example.com"),
            ("Shop.Example.com:8080", "shop.example.com"),
            ("shop.example.com:", "shop.example.com"),
            ("shop.example.com.", "shop.example.com"),
            ("shop.example.com.:00080", "shop.example.com"),
            ("[::1]", "[::1]"),
            ("[2001:DB8::1]:443", "[2001:db8::1]"),
            ("[::1]:", "[::1]"),
        ] {
            assert_eq!(asked(field).unwrap(), expected, "{field}");
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for field in [
            "",
            ".",
            ":80",
            "shop.example.com:+80",
            "shop.example.com:-1",
            "shop.example.com:65536",
            "shop.example.com:000080",
            "shop.example.com:80:80",
            "shop.example.com..",
            "shop.example.com..:80",
            "[::1]x",
            "[::1].",
            "[::1]80",
            "[::1]:+80",
            "x[::1]",
            "::1",
            "user@shop.example.com",
        ] {
            assert!(asked(field).is_err(), "{field:?} is {:?}", asked(field));
        }
    }

    #[test]
    fn a_target_of_another_scheme_is_refused() {
        for (target, is_fine) in [
            ("http://a.example/", true),
            ("HTTPS://a.example/", true),
            ("ftp://a.example/", false),
            ("httpx://a.example/", false),
        ] {
            let request = Request::get(target).header(HOST, "a.example").body(());
            let parts = request.unwrap().into_parts().0;
            let found = host(&parts, Survey::of(&parts.headers));
            assert_eq!(found.is_ok(), is_fine, "{target}");
        }
    }

    #[test]
    fn only_http_1_0_has_requests_without_a_host() {
        for (version, is_fine) in [
            (Version::HTTP_10, true),
            (Version::HTTP_11, false),
            (Version::HTTP_2, false),
        ] {
            for field in [None, Some("")] {
                let mut request = Request::get("/").version(version).body(()).unwrap();
                let value = field.map(HeaderValue::from_static);
                request
                    .headers_mut()
                    .extend(value.map(|value| (HOST, value)));
                let parts = request.into_parts().0;
                let found = host(&parts, Survey::of(&parts.headers));
                assert_eq!(found.ok().as_deref(), is_fine.then_some(""), "{version:?}");
            }
        }
    }
}
