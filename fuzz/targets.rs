//! What is fuzzed: each function takes any bytes, and panics where something that must hold does not.
//!
//! `cargo +nightly fuzz run NAME` runs them under libFuzzer; the integration tests run them on the corpus, and on
//! mutations of it, with any toolchain.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::rc::Rc;

use http::Request;
use serin::config::load::{ListFailure, load_text};
use serin::control::offline_snapshot;
use serin::proxy::headers::Survey;
use serin::proxy::origin::{Origin, Peer, canonical_target, head, host};
use serin::proxy_protocol;
use serin::routing::path::canonical;
use serin::telemetry::trace_context::TraceContext;

/// A configuration: whatever it is, reading it ends, and what is sound can be compiled.
pub(crate) fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let mut no_lists = |_: &_| Err(ListFailure::Unreadable("is not there".to_owned()));
    match load_text(Path::new("/nonexistent/serin.yaml"), text, &mut no_lists) {
        Ok(loaded) => drop(offline_snapshot(&loaded)),
        Err(problems) => assert!(problems.errors() > 0, "refused without a reason"),
    }
}

/// A request target: what is matched has one form, without dots to climb by.
pub(crate) fn target(bytes: &[u8]) {
    let Ok(path) = std::str::from_utf8(bytes) else {
        return;
    };
    let Ok(once) = canonical(path) else {
        return;
    };
    let again = canonical(&once.path).expect("what is canonical is accepted");
    assert_eq!(again.path, once.path);
    let decoded = once.path.replace("%2F", "/");
    assert!(
        !decoded
            .split('/')
            .any(|segment| matches!(segment, "." | "..") && decoded.contains("/."))
    );
    assert!(!once.path.contains('\\') && !once.path.contains('\0'));
    let Ok(request) = Request::get(path).body(()) else {
        return;
    };
    let mut parts = request.into_parts().0;
    if canonical_target(&mut parts).is_ok() {
        let snapshot = snapshot();
        let found = snapshot.find(&head(&parts, "a.example", [127, 0, 0, 1].into()));
        assert_eq!(
            found.is_some(),
            parts.uri.path() == "/shop" || parts.uri.path().starts_with("/shop/")
        );
    }
}

/// A Host field: what is accepted is a host in one form.
pub(crate) fn host_field(bytes: &[u8]) {
    let Ok(request) = Request::get("/").header("host", bytes).body(()) else {
        return;
    };
    let parts = request.into_parts().0;
    if let Ok(host) = host(&parts, Survey::of(&parts.headers)) {
        assert!(!host.contains(['@', ',', '/', '?', '#', ' ']), "{host:?}");
        assert!(!host.bytes().any(|byte| byte.is_ascii_uppercase()));
        // The colons of an IPv6 address stand within its brackets.
        let (address, rest) = host.rsplit_once(']').unwrap_or(("", &host));
        assert!(!rest.contains(':'), "{host:?} has a port");
        assert!(address.is_empty() || rest.is_empty(), "{host:?}");
        assert!(!host.is_empty() && !host.ends_with('.'), "{host:?}");
    }
}

/// X-Forwarded-For from a trusted peer: the client is whom a simpler reading of it finds.
pub(crate) fn forwarded(bytes: &[u8]) {
    let peer_address: SocketAddr = ([127, 0, 0, 1], 1).into();
    let listener: SocketAddr = ([127, 0, 0, 1], 8080).into();
    let peer = Peer::new(listener, peer_address, Rc::new(()));
    let Ok(request) = Request::get("/").header("x-forwarded-for", bytes).body(()) else {
        return;
    };
    let snapshot = snapshot();
    let origin = Origin::new(&snapshot, &peer, request.headers());
    assert!(origin.trusted);
    // From the left, where the proxy reads from the right: whom an entry names is believed as long as everybody
    // behind it is a proxy that we trust; of proxies alone, the farthest is the client.
    let entries = std::str::from_utf8(bytes).unwrap_or("?").split(',');
    let client = entries.map(str::trim).fold(None, |before, entry| {
        let bare = entry.trim_matches(['[', ']']).parse::<IpAddr>();
        let with_port = entry.parse::<SocketAddr>().map(|address| address.ip());
        let named = bare.or(with_port).ok()?.to_canonical();
        let is_proxy = matches!(named, IpAddr::V4(v4) if matches!(v4.octets()[0], 10 | 127));
        before.filter(|_| is_proxy).or(Some(named))
    });
    assert_eq!(origin.client, client.unwrap_or(peer_address.ip()));
}

/// A header of the PROXY protocol.
pub(crate) fn proxy_header(bytes: &[u8]) {
    if let Ok(Some(client)) = proxy_protocol::parse(bytes) {
        for version in [proxy_protocol::Version::V1, proxy_protocol::Version::V2] {
            let written = proxy_protocol::header(version, client, client).expect("addresses fit");
            let read = proxy_protocol::parse(&written).expect("what is written is read");
            let read = read.expect("an address");
            assert_eq!(
                (read.ip().to_canonical(), read.port()),
                (client.ip().to_canonical(), client.port())
            );
        }
    }
}

/// The `traceparent` field: what is read is written in the same way, but for later versions.
pub(crate) fn traceparent(bytes: &[u8]) {
    if let Some(context) = TraceContext::parse(bytes) {
        assert!(context.trace_id != 0 && context.parent_id != 0);
        let written = context.value();
        assert_eq!(written.as_bytes()[2..], bytes[2..written.len()]);
        assert_eq!(TraceContext::parse(written.as_bytes()), Some(context));
    }
}

fn snapshot() -> serin::snapshot::Snapshot {
    let text = "
listeners: [ { name: web, address: '127.0.0.1:8080', trustedProxies: [ 127.0.0.0/8, 10.0.0.0/8 ] } ]
backends: [ { name: only, endpoints: [ '127.0.0.1:1' ] } ]
routes: [ { name: shop, matches: [ { path: { value: /shop } } ], backendRefs: [ { name: only } ], escapedSlashes: keep } ]
";
    let mut no_lists = |_: &_| Err(ListFailure::Unreadable("is not there".to_owned()));
    let loaded = load_text(Path::new("/nonexistent/serin.yaml"), text, &mut no_lists);
    offline_snapshot(&loaded.expect("it is sound"))
}
