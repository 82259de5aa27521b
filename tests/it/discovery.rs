//! Endpoints that move: by DNS names, and by files. Whatever DNS does, what was found last serves.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use hickory_resolver::proto::rr::RecordType;
use http::StatusCode;
use serin::discovery::resolver::Resolver;
use serin::discovery::{Locator, Settings};

use crate::cli::{Running, output};
use crate::reload::{Load, Volume, rename_over};
use crate::support::dns::{DnsServer, Manner};
use crate::support::tls::Authority;
use crate::support::{Client, PATIENCE, Proxy, Upstream, eventually, get, with_head};

const SHOP: &str = "shop.internal";

/// Names are asked for often, so that tests need not wait.
fn dns(server: &DnsServer) -> String {
    let address = server.address;
    format!("dns: {{ minTtl: 20ms, maxTtl: 100ms, timeout: 400ms, resolvers: ['{address}'] }}\n")
}

/// One backend, whose endpoints are these, behind a route for everything.
fn config(server: &DnsServer, endpoints: &str) -> String {
    format!(
        "{}backends: [ {{ name: only, version: '1', {endpoints} }} ]
routes: [ {{ name: all, backendRefs: [ {{ name: only }} ] }} ]
",
        dns(server)
    )
}

fn by_name(port: u16) -> String {
    format!("endpoints: ['{SHOP}:{port}']")
}

/// Upstreams on addresses of their own, all at one port, as a name has them.
async fn upstreams<const N: usize>(names: [&str; N]) -> ([Upstream; N], u16) {
    'port: loop {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        let mut upstreams = Vec::new();
        for (name, last) in names.iter().zip(11..) {
            let address = SocketAddr::from(([127, 0, 0, last], port));
            match Upstream::start_at(name, address).await {
                Ok(upstream) => upstreams.push(upstream),
                Err(_) => continue 'port,
            }
        }
        let Ok(upstreams) = upstreams.try_into() else {
            unreachable!("as many as names");
        };
        return (upstreams, port);
    }
}

fn ips(upstreams: &[&Upstream]) -> Vec<IpAddr> {
    upstreams.iter().map(|one| one.address.ip()).collect()
}

/// The endpoints in force, in order.
fn endpoints(proxy: &Proxy) -> Vec<SocketAddr> {
    let snapshot = proxy.app().live().load();
    let endpoints = snapshot.backends[0].endpoints.iter();
    let mut endpoints: Vec<SocketAddr> = endpoints.map(|one| one.address).collect();
    endpoints.sort_unstable();
    endpoints
}

async fn moved_to(proxy: &Proxy, upstreams: &[&Upstream]) {
    let mut wanted: Vec<SocketAddr> = upstreams.iter().map(|one| one.address).collect();
    wanted.sort_unstable();
    eventually("the endpoints have moved", || endpoints(proxy) == wanted).await;
    said(proxy).await;
}

/// Waits until what is in force is on the status board and in the metrics as well.
async fn said(proxy: &Proxy) {
    eventually("the status says so", || {
        let status = proxy.app().board().load();
        status.revision == proxy.app().live().load().revision
    })
    .await;
}

/// What the admin API says of the only backend.
async fn shown(proxy: &Proxy) -> serde_json::Value {
    let backends = get(proxy.admin(), "/api/v1/backends", &[]).await.json();
    backends[0].clone()
}

fn problem(proxy: &Proxy) -> Option<String> {
    let status = proxy.app().board().load();
    let known = status.names.values().next().unwrap();
    known.problem().map(ToString::to_string)
}

fn resolutions(proxy: &Proxy, result: &str) -> f64 {
    proxy.metric("serin_dns_resolutions_total", &[("result", result)])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_moves_under_load_and_the_endpoint_that_stays_keeps_its_connections() {
    let server = DnsServer::start();
    let ([stays, goes, comes], port) = upstreams(["stays", "goes", "comes"]).await;
    server.host(SHOP, &ips(&[&goes, &stays]));
    let proxy = Proxy::start(&config(&server, &by_name(port)));
    moved_to(&proxy, &[&stays, &goes]).await;
    const CLIENTS: usize = 4;
    let load = Load::start(&proxy, CLIENTS);
    for set in [[&stays, &comes], [&goes, &stays], [&comes, &stays]]
        .iter()
        .cycle()
        .take(12)
    {
        load.some_more().await;
        server.host(SHOP, &ips(set));
        moved_to(&proxy, set).await;
        let before = set.map(Upstream::requests);
        eventually("both of the new set are used", || {
            set[0].requests() > before[0] && set[1].requests() > before[1]
        })
        .await;
    }
    load.finish().await;
    // As many as there ever were requests at the same time, and not as many for each set.
    assert!(stays.connections() <= CLIENTS, "{}", stays.connections());
    assert!(goes.connections() > 1 && comes.connections() > 1);
    eventually("connections to what is gone are closed", || {
        proxy.metric("serin_upstream_connections", &[]) <= (stays.connections() + CLIENTS) as f64
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_swaps_of_all_endpoints_under_load_fail_no_request() {
    let server = DnsServer::start();
    let ([one, other], port) = upstreams(["one", "other"]).await;
    server.host(SHOP, &ips(&[&one]));
    let proxy = Proxy::start(&config(&server, &by_name(port)));
    let load = Load::start(&proxy, 4);
    for swap in 0..50 {
        let next = if swap % 2 == 0 { &other } else { &one };
        server.host(SHOP, &ips(&[next]));
        moved_to(&proxy, &[next]).await;
        load.some_more().await;
    }
    let served = load.finish().await;
    assert!(served > 1000, "only {served} requests");
    assert_eq!(
        proxy.metric("serin_requests_total", &[("code", "200")]),
        proxy.metric("serin_requests_total", &[])
    );
    eventually("only the last has connections", || {
        let open = proxy.metric("serin_upstream_connections", &[("backend", "only")]);
        (1.0..=4.0).contains(&open)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_dns_does_wrong_the_last_good_set_serves_until_it_is_right_again() {
    let server = DnsServer::start();
    let ([one, other], port) = upstreams(["one", "other"]).await;
    server.host(SHOP, &ips(&[&one]));
    let proxy = Proxy::start(&config(&server, &by_name(port)));
    let load = Load::start(&proxy, 1);
    let wrongs = [
        (Manner::Nxdomain, "not_found", "does not exist"),
        (Manner::Servfail, "refused", "Server Failure"),
        (Manner::Silent, "timeout", "no DNS server answered"),
        (Manner::Garbage, "", ""),
        (Manner::Truncated, "", ""),
        (Manner::Empty, "empty", "leads to no address"),
    ];
    for (turn, (manner, result, words)) in wrongs.into_iter().enumerate() {
        let (now, next) = if turn % 2 == 0 {
            (&one, &other)
        } else {
            (&other, &one)
        };
        moved_to(&proxy, &[now]).await;
        let revision = proxy.revision();
        let (counted, asked) = (resolutions(&proxy, result), server.queries());
        // What it would say is new already, so that nothing of it can have come through.
        server.behave(manner);
        server.host(SHOP, &ips(&[next]));
        eventually("the failure is known", || {
            problem(&proxy).is_some_and(|problem| problem.contains(words))
        })
        .await;
        eventually("it is tried again", || server.queries() > asked + 8).await;
        if !result.is_empty() {
            assert!(resolutions(&proxy, result) > counted, "{manner:?}");
        }
        let shown = shown(&proxy).await;
        assert!(
            shown["names"][0]["problem"].is_string(),
            "{manner:?} {shown}"
        );
        assert!(
            shown["names"][0]["resolvedAt"].is_string(),
            "{manner:?} {shown}"
        );
        assert_eq!(endpoints(&proxy), [now.address], "{manner:?}");
        assert_eq!(proxy.revision(), revision, "{manner:?}");
        load.some_more().await;

        server.behave(Manner::Well);
        moved_to(&proxy, &[next]).await;
        eventually("it is well", || problem(&proxy).is_none()).await;
    }
    load.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_too_long_for_udp_comes_over_tcp() {
    let server = DnsServer::start();
    let ([one], port) = upstreams(["one"]).await;
    let mut addresses: Vec<IpAddr> = (1..=250)
        .map(|n| Ipv4Addr::new(127, 1, 0, n).into())
        .collect();
    addresses.push(one.address.ip());
    server.host(SHOP, &addresses);
    server.behave(Manner::OverTcp);
    let proxy = Proxy::start(&config(&server, &by_name(port)));
    assert_eq!(endpoints(&proxy).len(), 251);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_set_makes_no_snapshot_in_whatever_order_it_comes() {
    let server = DnsServer::start();
    let ([one, other], port) = upstreams(["one", "other"]).await;
    server.host(SHOP, &ips(&[&one, &other]));
    // An address of its own that the name has as well counts once.
    let both = format!("endpoints: ['{SHOP}:{port}', '{}']", one.address);
    let proxy = Proxy::start(&config(&server, &both));
    assert_eq!(endpoints(&proxy), [one.address, other.address]);
    let revision = proxy.revision();
    let mapped = |one: IpAddr| match one {
        IpAddr::V4(one) => IpAddr::V6(one.to_ipv6_mapped()),
        IpAddr::V6(_) => one,
    };
    let (a, b) = (one.address.ip(), other.address.ip());
    for set in [
        vec![b, a],
        vec![b, a, b],
        vec![a, mapped(b), b],
        vec![mapped(a), b],
    ] {
        server.host(SHOP, &set);
        let asked = server.queries();
        eventually("it is asked for again", || server.queries() > asked + 8).await;
        assert_eq!(problem(&proxy), None);
        assert_eq!(endpoints(&proxy), [one.address, other.address], "{set:?}");
        assert_eq!(proxy.revision(), revision, "{set:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_family_that_cannot_be_asked_for_costs_nothing() {
    let server = DnsServer::start();
    let ([one, other], port) = upstreams(["one", "other"]).await;
    server.host(SHOP, &ips(&[&one]));
    server.ignore(&[RecordType::AAAA]);
    let proxy = Proxy::start(&config(&server, &by_name(port)));
    assert_eq!(endpoints(&proxy), [one.address], "from the start");
    server.host(SHOP, &ips(&[&other]));
    moved_to(&proxy, &[&other]).await;
    assert!(resolutions(&proxy, "partial") > 0.0);
    // And now the one that it has addresses of: they stay.
    server.ignore(&[RecordType::A]);
    eventually("the failure is counted", || {
        resolutions(&proxy, "timeout") > 0.0
    })
    .await;
    assert_eq!(endpoints(&proxy), [other.address]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dns_server_that_never_answers_holds_up_the_start_for_its_timeout_alone() {
    let server = DnsServer::start();
    let ([stable, canary], port) = upstreams(["stable", "canary"]).await;
    server.host(SHOP, &ips(&[&canary]));
    server.behave(Manner::Silent);
    let many: Vec<String> = (0..3000)
        .map(|n| format!("'host-{n}.internal:80'"))
        .collect();
    let config = format!(
        "{}backends:
  - {{ name: stable, version: '1', endpoints: ['{}'] }}
  - {{ name: canary, version: '2', endpoints: ['{SHOP}:{port}'] }}
  - {{ name: many, version: '3', endpoints: [{}] }}
routes:
  - name: shop
    backendRefs: [ {{ name: stable, weight: 0 }}, {{ name: canary, weight: 1 }} ]
  - name: others
    hostnames: [ many.example.com ]
    backendRefs: [ {{ name: many }} ]
",
        dns(&server),
        stable.address,
        many.join(", ")
    );
    let begun = Instant::now();
    let proxy = Proxy::start(&config);
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_millis(400),
        "names were waited for: {took:?}"
    );
    assert!(took < Duration::from_secs(10), "all at once: {took:?}");
    // The canary's users get the baseline, a baseline without endpoints is a 503.
    let mut client = Client::connect(proxy.address()).await;
    assert_eq!(client.get("/", &[]).await.text(), "stable");
    let failovers = [("reason", "failover")];
    assert_eq!(
        proxy.metric("serin_routing_decisions_total", &failovers),
        1.0
    );
    let reply = client.get("/", &[("host", "many.example.com")]).await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
    let never = [("backend", "canary")];
    assert_eq!(
        proxy.metric("serin_dns_last_success_timestamp_seconds", &never),
        0.0
    );

    server.behave(Manner::Well);
    eventually("the canary has come in by itself", || {
        proxy.app().live().load().backends[1].is_available()
    })
    .await;
    said(&proxy).await;
    assert_eq!(client.get("/", &[]).await.text(), "canary");
    assert!(proxy.metric("serin_dns_last_success_timestamp_seconds", &never) > 1e9);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_found_is_valid_as_long_as_its_shortest_record() {
    let server = DnsServer::start();
    let ip: IpAddr = Ipv4Addr::new(127, 0, 0, 9).into();
    server.host_for(7, SHOP, &[ip]);
    server.alias_for(3, "alias.internal", SHOP);
    server.alias_for(30, "long.internal", SHOP);
    let resolver = Resolver::new(Settings {
        resolvers: vec![server.address],
        ..Settings::default()
    });
    for (host, seconds) in [(SHOP, 7), ("alias.internal", 3), ("long.internal", 7)] {
        let Ok(Locator::Name(name)) = Locator::parse(&format!("{host}:80")) else {
            panic!("{host} is a name");
        };
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let answer = resolver.ask(&name, deadline).await.unwrap();
        assert_eq!(answer.parts[0].1, Ok(vec![ip]), "{host}");
        assert_eq!(
            answer.ttl.as_secs_f64().ceil(),
            f64::from(seconds),
            "{host}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_is_the_servers_of_its_first_priority() {
    let server = DnsServer::start();
    let (one, other) = (Upstream::start("one").await, Upstream::start("other").await);
    let local: IpAddr = Ipv4Addr::LOCALHOST.into();
    server.host("a.internal", &[local]);
    server.host("b.internal", &[local]);
    let (a, b) = (one.address.port(), other.address.port());
    let service = "_http._tcp.shop.internal";
    server.service(service, &[(20, "b.internal.", b), (10, "a.internal.", a)]);
    let proxy = Proxy::start(&config(&server, &format!("endpoints: ['srv:{service}']")));
    assert_eq!(endpoints(&proxy), [one.address]);
    assert_eq!(get(proxy.address(), "/", &[]).await.text(), "one");

    server.service(service, &[(20, "b.internal.", b), (20, "a.internal.", a)]);
    moved_to(&proxy, &[&one, &other]).await;
    // A server whose host has no address is none, and does not take the others along.
    server.service(service, &[(1, "b.internal.", b), (1, "gone.internal.", a)]);
    moved_to(&proxy, &[&other]).await;
    // "There is no such service" (RFC 2782) is an empty set, and changes nothing.
    server.service(service, &[(0, ".", 0)]);
    eventually("it is empty", || resolutions(&proxy, "empty") > 0.0).await;
    assert_eq!(endpoints(&proxy), [other.address]);
    let shown = shown(&proxy).await;
    assert_eq!(shown["names"][0]["name"], format!("srv:{service}"));
    assert_eq!(shown["endpoints"][0]["name"], format!("srv:{service}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_of_the_next_priority_count_when_the_first_lead_nowhere() {
    let server = DnsServer::start();
    let ([one, other], port) = upstreams(["one", "other"]).await;
    server.host("b.internal", &ips(&[&other]));
    let service = "_http._tcp.shop.internal";
    let both = [(10, "a.internal.", port), (20, "b.internal.", port)];
    server.service(service, &both);
    let proxy = Proxy::start(&config(&server, &format!("endpoints: ['srv:{service}']")));
    assert_eq!(endpoints(&proxy), [other.address]);
    server.host("a.internal", &ips(&[&one]));
    moved_to(&proxy, &[&one]).await;
    server.host("a.internal", &[]);
    moved_to(&proxy, &[&other]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_repaired_dns_need_not_wait_for_the_next_attempt() {
    let (first, second) = (DnsServer::start(), DnsServer::start());
    let ([one], port) = upstreams(["one"]).await;
    second.host(SHOP, &ips(&[&one]));
    let of = |server| {
        let often = "minTtl: 20ms, maxTtl: 100ms";
        config(server, &by_name(port)).replace(often, "minTtl: 1h, maxTtl: 1h")
    };
    let proxy = Proxy::start(&of(&first));
    assert_eq!(endpoints(&proxy), []);
    // Others are asked.
    proxy.replace(&of(&second)).await;
    moved_to(&proxy, &[&one]).await;

    let proxy = Proxy::start(&of(&first));
    assert_eq!(endpoints(&proxy), []);
    // Those that are asked know more now, which nothing tells but whoever has seen to it.
    first.host(SHOP, &ips(&[&one]));
    proxy.app().reload().await.unwrap().unwrap();
    moved_to(&proxy, &[&one]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_on_an_endpoint_that_is_gone_finish_there() {
    let server = DnsServer::start();
    let ([one, other], port) = upstreams(["one", "other"]).await;
    server.host(SHOP, &ips(&[&one]));
    let proxy = Proxy::start(&config(&server, &by_name(port)));
    let address = proxy.address();
    get(address, "/", &[]).await;
    let waiting = tokio::spawn(async move { get(address, "/hold", &[]).await });
    eventually("the request waits", || one.held() == 1).await;
    server.host(SHOP, &ips(&[&other]));
    moved_to(&proxy, &[&other]).await;
    let requests = one.requests();
    for _ in 0..10 {
        assert_eq!(get(address, "/", &[]).await.text(), "other");
    }
    assert_eq!(one.requests(), requests, "nothing new goes there");
    one.release();
    assert_eq!(waiting.await.unwrap().text(), "one");
    eventually("its connections are closed", || {
        proxy.metric("serin_upstream_connections", &[]) <= 2.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_waits_for_new_names_and_keeps_what_is_known_of_others() {
    let server = DnsServer::start();
    let ([one, other], port) = upstreams(["one", "other"]).await;
    server.host(SHOP, &ips(&[&one]));
    server.host("cart.internal", &ips(&[&other]));
    let address = format!("endpoints: ['{}']", one.address);
    let proxy = Proxy::start(&config(&server, &address));
    let load = Load::start(&proxy, 2);
    load.some_more().await;
    // From an address to names: there is no moment without endpoints.
    proxy.replace(&config(&server, &by_name(port))).await;
    assert_eq!(endpoints(&proxy), [one.address]);
    load.some_more().await;
    let cart = format!("endpoints: ['cart.internal:{port}', '{SHOP}:{port}']");
    server.behave(Manner::Silent);
    proxy.replace(&config(&server, &cart)).await;
    assert_eq!(endpoints(&proxy), [one.address], "what is known stays");
    load.some_more().await;
    server.behave(Manner::Well);
    moved_to(&proxy, &[&one, &other]).await;
    load.finish().await;
    assert_eq!(one.connections(), 2, "they stayed warm all the time");

    proxy.replace(&config(&server, &address)).await;
    said(&proxy).await;
    let known = proxy.app().board().load().names.len();
    assert_eq!(known, 0, "and nobody asks for them any more");
    assert!(
        proxy
            .metric("serin_dns_last_success_timestamp_seconds", &[])
            .is_nan()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_must_be_for_the_host_that_the_endpoint_is_named_by() {
    let server = DnsServer::start();
    let authority = Authority::new("tests");
    let identity = authority.issue(&[SHOP]);
    let upstream = Upstream::tls("one", identity.server(&[], None)).await;
    let (ip, port) = (upstream.address.ip(), upstream.address.port());
    server.host(SHOP, &[ip]);
    server.host("cart.internal", &[ip]);
    server.service("_https._tcp.shop.internal", &[(0, "cart.internal.", port)]);
    server.service("_https._tcp.cart.internal", &[(0, "shop.internal.", port)]);
    let ok = StatusCode::OK;
    let bad = StatusCode::BAD_GATEWAY;
    let asked = |endpoint: &str, tls: &str| {
        config(
            &server,
            &format!("endpoints: ['{endpoint}'], tls: {{ caFile: ca.pem{tls} }}"),
        )
    };
    let proxy = Proxy::start_with(&asked(&format!("{SHOP}:{port}"), ""), |directory| {
        fs::write(directory.join("ca.pem"), &authority.pem).unwrap();
    });
    assert_eq!(get(proxy.address(), "/", &[]).await.status, ok);
    for (endpoint, tls, status) in [
        // The same address, by another name: a connection that stands proves nothing for it.
        (format!("cart.internal:{port}"), "", bad),
        (
            format!("cart.internal:{port}"),
            ", hostname: shop.internal",
            ok,
        ),
        (format!("{}", upstream.address), "", bad),
        // A service is what it is called, whatever its records name.
        ("srv:_https._tcp.shop.internal".to_owned(), "", ok),
        ("srv:_https._tcp.cart.internal".to_owned(), "", bad),
    ] {
        proxy.replace(&asked(&endpoint, tls)).await;
        let reply = get(proxy.address(), "/", &[]).await;
        assert_eq!(reply.status, status, "{endpoint}{tls}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_says_when_a_name_begins_to_fail_and_not_with_every_attempt() {
    let server = DnsServer::start();
    let ([one], port) = upstreams(["one"]).await;
    server.host(SHOP, &ips(&[&one]));
    server.behave(Manner::Nxdomain);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("serin.yaml");
    fs::write(&file, with_head(&config(&server, &by_name(port)))).unwrap();
    let mut running = Running::start(&file);
    let said = running.wait_for("does not exist");
    assert!(
        said.contains("it has no endpoints until it can be resolved"),
        "{said}"
    );
    let asked = server.queries();
    eventually("it is tried again", || server.queries() > asked + 10).await;
    server.behave(Manner::Well);
    let moved = running.wait_for("endpoints have moved");
    assert!(moved.contains(&one.address.to_string()), "{moved}");
    server.behave(Manner::Servfail);
    let said = running.wait_for("the DNS server said");
    assert!(said.contains("its endpoints stay as they are"), "{said}");
    let asked = server.queries();
    eventually("it is tried again", || server.queries() > asked + 10).await;
    server.behave(Manner::Well);
    running.wait_for("is resolved again");
    running.wait_for("is resolved again");
    assert_eq!(running.others("does not exist"), 0, "said more than once");
    assert_eq!(
        running.others("the DNS server said"),
        0,
        "said more than once"
    );
}

#[test]
fn check_and_explain_ask_nobody_for_names() {
    let server = DnsServer::start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serin.yaml");
    let config = format!(
        "{}backends:
  - {{ name: stable, version: '1', endpoints: ['{SHOP}:80'] }}
  - {{ name: canary, version: '2', endpoints: ['srv:_http._tcp.{SHOP}'] }}
routes:
  - name: shop
    backendRefs: [ {{ name: stable, weight: 0 }}, {{ name: canary, weight: 1 }} ]
",
        dns(&server)
    );
    fs::write(&path, with_head(&config)).unwrap();
    let file = path.to_str().unwrap();
    let (code, said, problems) = output(&["check", file]);
    assert_eq!((code, problems.as_str()), (Some(0), ""), "{said}");
    let (code, said, _) = output(&["explain", "--config", file, "--host", "x", "--path", "/"]);
    assert_eq!(code, Some(0));
    // As if they could be resolved: nobody would be sent to the baseline for want of an answer.
    assert!(said.contains("backend    canary"), "{said}");
    assert!(!said.contains("takes no requests"), "{said}");
    assert_eq!(server.queries(), 0);
}

// === Files ===

const FILE: &str = "endpoints.yaml";

fn list(upstreams: &[&Upstream]) -> String {
    let lines = upstreams.iter().map(|one| format!("- {}\n", one.address));
    lines.collect()
}

fn with_file(server: &DnsServer) -> String {
    config(server, &format!("endpointsFile: {FILE}"))
}

fn stale(proxy: &Proxy) -> Option<String> {
    let status = proxy.app().board().load();
    status.stale_endpoints.values().next().cloned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_endpoints_is_followed_however_it_is_written() {
    let server = DnsServer::start();
    let ([one, other], port) = upstreams(["one", "other"]).await;
    server.host(SHOP, &ips(&[&one]));
    server.host("cart.internal", &ips(&[&other]));
    let proxy = Proxy::start_with(&with_file(&server), |directory| {
        fs::write(directory.join(FILE), list(&[&one])).unwrap();
    });
    assert_eq!(endpoints(&proxy), [one.address]);
    let load = Load::start(&proxy, 2);
    let file = proxy.directory().join(FILE);
    for turn in 0..3 {
        rename_over(&file, &list(&[&other]));
        moved_to(&proxy, &[&other]).await;
        fs::write(&file, list(&[&one, &other])).unwrap();
        moved_to(&proxy, &[&one, &other]).await;
        // A name that is new is resolved before it counts.
        let json = format!("[\"{SHOP}:{port}\"]");
        fs::write(&file, json).unwrap();
        moved_to(&proxy, &[&one]).await;
        rename_over(&file, &format!("- cart.internal:{port}\n"));
        moved_to(&proxy, &[&other]).await;
        server.host("cart.internal", &ips(&[&one, &other]));
        moved_to(&proxy, &[&one, &other]).await;
        server.host("cart.internal", &ips(&[&other]));
        moved_to(&proxy, &[&other]).await;
        load.some_more().await;
        assert_eq!(stale(&proxy), None, "{turn}");
    }
    load.finish().await;
    let shown = shown(&proxy).await;
    assert_eq!(shown["endpoints"][0]["from"], "endpointsFile");
    assert_eq!(shown["endpointsFile"]["entries"], 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_file_of_endpoints_keeps_the_last_good_one_and_says_why() {
    let server = DnsServer::start();
    let ([one, other], _) = upstreams(["one", "other"]).await;
    let proxy = Proxy::start_with(&with_file(&server), |directory| {
        fs::write(directory.join(FILE), list(&[&one])).unwrap();
    });
    let load = Load::start(&proxy, 1);
    let file = proxy.directory().join(FILE);
    let successful = || proxy.metric("serin_endpoints_file_last_load_successful", &[]);
    for (bad, words) in [
        ("", "is not emptied"),
        ("# soon\n", "is not emptied"),
        (
            "- 10.0.0.1:80\n- 10.0.\n",
            ":2:3: `10.0.` is not an endpoint",
        ),
        ("[\"10.0.0.1:80\", \"10.", "cannot be used"),
        ("{ endpoints: [] }", "is no list"),
    ] {
        let revision = proxy.revision();
        fs::write(&file, bad).unwrap();
        eventually("it is said to be bad", || {
            stale(&proxy).is_some_and(|reason| reason.contains(words))
        })
        .await;
        assert_eq!((proxy.revision(), successful()), (revision, 0.0), "{bad}");
        assert_eq!(endpoints(&proxy), [one.address], "{bad}");
        let shown = shown(&proxy).await;
        assert!(shown["endpointsFile"]["problem"].is_string(), "{shown}");
        load.some_more().await;
    }
    // Gone altogether, and there again.
    fs::remove_file(&file).unwrap();
    eventually("it is said to be gone", || {
        stale(&proxy).is_some_and(|reason| reason.contains("cannot be read"))
    })
    .await;
    assert_eq!(endpoints(&proxy), [one.address]);
    rename_over(&file, &list(&[&other]));
    moved_to(&proxy, &[&other]).await;
    assert_eq!((stale(&proxy), successful()), (None, 1.0));
    load.finish().await;
    // An empty list is meant.
    fs::write(&file, "[]").unwrap();
    moved_to(&proxy, &[]).await;
    let reply = get(proxy.address(), "/", &[]).await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn config_map_swaps_move_endpoints_under_load() {
    let server = DnsServer::start();
    let ([one, other], _) = upstreams(["one", "other"]).await;
    let directory = tempfile::tempdir().unwrap();
    // One volume for the configuration and its file, and one for a file alone.
    let (config_volume, list_volume) = (
        directory.path().join("config"),
        directory.path().join("list"),
    );
    for volume in [&config_volume, &list_volume] {
        fs::create_dir(volume).unwrap();
    }
    let far = list_volume.join(FILE);
    let config = |file: &Path| {
        with_head(&config(
            &server,
            &format!("endpointsFile: {}", file.display()),
        ))
    };
    let near = config(Path::new(FILE));
    let (beside, alone) = (Volume(config_volume.clone()), Volume(list_volume));
    beside.publish(0, &[("serin.yaml", &near), (FILE, &list(&[&one]))]);
    alone.publish(0, &[(FILE, &list(&[&one]))]);
    let proxy = Proxy::start_at(&config_volume.join("serin.yaml"), directory);
    let load = Load::start(&proxy, 2);
    for generation in 1..=6 {
        let next = if generation % 2 == 0 { &one } else { &other };
        beside.publish(generation, &[("serin.yaml", &near), (FILE, &list(&[next]))]);
        moved_to(&proxy, &[next]).await;
        load.some_more().await;
    }
    beside.publish(7, &[("serin.yaml", &config(&far)), (FILE, "[]")]);
    eventually("the other file is in force", || {
        let status = proxy.app().board().load();
        status.loaded.endpoints_files.contains_key(&far)
    })
    .await;
    for generation in 1..=6 {
        let next = if generation % 2 == 0 { &one } else { &other };
        alone.publish(generation, &[(FILE, &list(&[next]))]);
        moved_to(&proxy, &[next]).await;
        load.some_more().await;
    }
    load.finish().await;
}

#[tokio::test]
async fn a_config_map_update_is_not_said_to_lack_the_files_of_the_one_before() {
    let server = DnsServer::start();
    let ([one], _) = upstreams(["one"]).await;
    let directory = tempfile::tempdir().unwrap();
    let volume = Volume(directory.path().to_owned());
    let publish = |generation| {
        let config = format!(
            "# {generation}\n{}userLists: [ {{ name: beta, file: beta.txt }} ]\n",
            with_file(&server)
        );
        let files = [
            ("serin.yaml", &*with_head(&config)),
            (FILE, &*list(&[&one])),
            ("beta.txt", "ann\n"),
        ];
        volume.publish(generation, &files);
    };
    publish(0);
    let mut running = Running::start(&directory.path().join("serin.yaml"));
    running.addresses();
    for generation in 1..=3 {
        publish(generation);
        running.wait_for("configuration taken over");
    }
    assert_eq!(running.others("cannot be read"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_endpoints_in_a_volume_is_followed_by_a_configuration_beside_it() {
    let server = DnsServer::start();
    let ([one, other], _) = upstreams(["one", "other"]).await;
    let directory = tempfile::tempdir().unwrap();
    let volume = Volume(directory.path().to_owned());
    volume.publish(0, &[(FILE, &list(&[&one]))]);
    let path = directory.path().join("serin.yaml");
    fs::write(&path, with_head(&with_file(&server))).unwrap();
    let proxy = Proxy::start_at(&path, directory);
    for generation in 1..=3 {
        let next = if generation % 2 == 0 { &one } else { &other };
        volume.publish(generation, &[(FILE, &list(&[next]))]);
        moved_to(&proxy, &[next]).await;
    }
    assert_eq!(stale(&proxy), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_and_their_file_count_together() {
    let server = DnsServer::start();
    let ([one, other], _) = upstreams(["one", "other"]).await;
    let both = format!("endpoints: ['{}'], endpointsFile: {FILE}", one.address);
    let proxy = Proxy::start_with(&config(&server, &both), |directory| {
        fs::write(directory.join(FILE), "# not yet\n").unwrap();
    });
    assert_eq!(endpoints(&proxy), [one.address]);
    fs::write(proxy.directory().join(FILE), list(&[&other, &one])).unwrap();
    moved_to(&proxy, &[&one, &other]).await;
    let shown = shown(&proxy).await;
    let from = |at: usize| shown["endpoints"][at]["from"].as_str().unwrap();
    assert_eq!((from(0), from(1)), ("endpoints", "endpointsFile"));
}
