//! What is not let in: requests beyond a rate, and requests beyond what is served at a time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{Method, StatusCode};
use serde_json::json;
use tonic::{Code, Request};

use crate::support::grpc::{Caller, Service, note};
use crate::support::websocket::{by_upgrade, http1};
use crate::support::{Client, Proxy, Raw, Reply, Upstream, eventually, explain, get, single};

/// A route with these limits, whose rates are too slow for time to matter.
fn limited(upstream: SocketAddr, limits: &str) -> String {
    single(
        upstream,
        &format!(
            "    gray: {{ identity: [ {{ header: x-user-id }} ] }}\n    rateLimits: {limits}\n"
        ),
    )
}

const BY_CLIENT: &str = "[ { name: slow, by: client, requests: 3, per: 1h } ]";

fn beyond(proxy: &Proxy, limit: &str, mode: &str) -> f64 {
    proxy.metric(
        "serin_rate_limited_total",
        &[("route", "all"), ("limit", limit), ("mode", mode)],
    )
}

/// How many of so many requests are let in.
async fn let_in(client: &mut Client, count: usize, headers: &[(&str, &str)]) -> usize {
    let mut served = 0;
    for _ in 0..count {
        match client.get("/", headers).await.status {
            StatusCode::OK => served += 1,
            StatusCode::TOO_MANY_REQUESTS => {}
            other => panic!("{other}"),
        }
    }
    served
}

fn standing(reply: &Reply) -> [&str; 3] {
    ["ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"]
        .map(|name| reply.header(name).unwrap_or("none"))
}

#[tokio::test]
async fn a_client_beyond_its_rate_is_told_so_and_when_to_come_again() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&limited(upstream.address, BY_CLIENT));
    assert_eq!(beyond(&proxy, "slow", "enforce"), 0.0);
    let mut client = Client::connect(proxy.address()).await;
    for (remaining, reset) in [("2", "1200"), ("1", "2400"), ("0", "3600")] {
        let reply = client.get("/", &[]).await;
        assert_eq!(
            (reply.text(), standing(&reply)),
            ("one", ["3", remaining, reset])
        );
        assert_eq!(reply.header("retry-after"), None);
    }
    for _ in 0..5 {
        let reply = client.get("/", &[]).await;
        assert_eq!(reply.status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(standing(&reply), ["3", "0", "3600"]);
        assert_eq!(reply.header("retry-after"), Some("1200"));
        assert_eq!(
            reply.header("proxy-status"),
            Some("serin; error=http_request_denied")
        );
    }
    assert_eq!(
        (upstream.requests(), beyond(&proxy, "slow", "enforce")),
        (3, 5.0)
    );
    // It counts for the route, and for no version: none of them has seen it.
    let refused = [("route", "all"), ("backend", "_NONE"), ("code", "429")];
    assert_eq!(proxy.metric("serin_requests_total", &refused), 5.0);
}

#[tokio::test]
async fn who_waits_as_long_as_told_is_let_in() {
    let upstream = Upstream::start("one").await;
    let limit = "[ { name: quick, by: client, requests: 10, burst: 1 } ]";
    let proxy = Proxy::start(&limited(upstream.address, limit));
    let mut client = Client::connect(proxy.address()).await;
    assert_eq!(
        client.get("/", &[]).await.header("ratelimit-reset"),
        Some("1")
    );
    while client.get("/", &[]).await.status != StatusCode::TOO_MANY_REQUESTS {}
    let mut tries = 0;
    while client.get("/", &[]).await.status != StatusCode::OK {
        tries += 1;
        assert!(tries < 1_000_000, "never let in again");
    }
}

#[tokio::test]
async fn users_are_counted_apart_and_who_is_none_as_a_client() {
    let upstream = Upstream::start("one").await;
    let limit = "[ { name: users, by: user, requests: 2, per: 1h } ]";
    let proxy = Proxy::start(&limited(upstream.address, limit));
    let mut client = Client::connect(proxy.address()).await;
    for user in ["ann", "bob"] {
        assert_eq!(let_in(&mut client, 5, &[("x-user-id", user)]).await, 2);
    }
    assert_eq!(let_in(&mut client, 5, &[]).await, 2);
}

#[tokio::test]
async fn an_id_that_is_only_now_issued_is_no_user() {
    let upstream = Upstream::start("one").await;
    let config = format!(
        "backends:
  - {{ name: a, endpoints: ['{0}'] }}
  - {{ name: b, endpoints: ['{0}'] }}
routes:
  - name: all
    backendRefs: [ {{ name: a }}, {{ name: b }} ]
    gray: {{ withoutIdentity: cookie }}
    rateLimits: [ {{ name: users, by: user, requests: 2, per: 1h }} ]
",
        upstream.address
    );
    let proxy = Proxy::start(&config);
    let mut client = Client::connect(proxy.address()).await;
    assert_eq!(let_in(&mut client, 10, &[]).await, 2);
    assert_eq!(
        let_in(&mut client, 10, &[("cookie", "serin-id=x")]).await,
        2
    );
}

#[tokio::test]
async fn requests_without_the_header_are_counted_as_configured() {
    let upstream = Upstream::start("one").await;
    for (without, expected) in [("client", 1), ("share", 1), ("pass", 5)] {
        let limit = format!(
            "[ {{ name: keys, by: {{ header: x-key }}, requests: 1, per: 1h, withoutKey: {without} }} ]"
        );
        let proxy = Proxy::start(&limited(upstream.address, &limit));
        let mut client = Client::connect(proxy.address()).await;
        assert_eq!(let_in(&mut client, 5, &[("x-key", "k1")]).await, 1);
        assert_eq!(let_in(&mut client, 5, &[]).await, expected, "{without}");
        assert_eq!(let_in(&mut client, 5, &[("x-key", "k2")]).await, 1);
        // Which of two would count?
        let twice = client.get("/", &[("x-key", "k3"), ("x-key", "k4")]).await;
        assert_eq!(twice.status, StatusCode::BAD_REQUEST);
    }
}

#[tokio::test]
async fn clients_of_one_ipv6_network_are_one_and_trusted_proxies_name_them() {
    let upstream = Upstream::start("one").await;
    let listeners =
        "listeners: [ { name: web, address: '127.0.0.1:0', trustedProxies: [127.0.0.1] } ]\n";
    let config = listeners.to_owned() + &limited(upstream.address, BY_CLIENT);
    let proxy = Proxy::start(&config);
    let mut served = Vec::new();
    let mut client = Client::connect(proxy.address()).await;
    for address in [
        "2001:db8::1",
        "2001:db8::2",
        "2001:db8:0:1::1",
        "192.0.2.1",
        "192.0.2.2",
    ] {
        let headers = [("x-forwarded-for", address)];
        served.push(let_in(&mut client, 4, &headers).await);
    }
    assert_eq!(served, [3, 0, 3, 3, 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_workers_count_together_and_all_connections() {
    let upstream = Upstream::start("one").await;
    let limit = "[ { name: all, by: everyone, requests: 200, per: 1h } ]";
    let proxy = Proxy::start(&limited(upstream.address, limit));
    let address = proxy.address();
    let clients: Vec<_> = (0..8)
        .map(|_| {
            tokio::spawn(async move {
                let mut client = Client::connect(address).await;
                let_in(&mut client, 50, &[]).await
            })
        })
        .collect();
    let mut served = 0;
    for client in clients {
        served += client.await.unwrap();
    }
    assert_eq!((served, upstream.requests()), (200, 200));
    assert_eq!(beyond(&proxy, "all", "enforce"), 200.0);
}

#[tokio::test]
async fn an_observed_limit_counts_and_refuses_nobody() {
    let upstream = Upstream::start("one").await;
    let limit = "[ { name: tried, by: client, requests: 2, per: 1h, mode: observe } ]";
    let proxy = Proxy::start(&limited(upstream.address, limit));
    let mut client = Client::connect(proxy.address()).await;
    for _ in 0..7 {
        let reply = client.get("/", &[]).await;
        assert_eq!((reply.text(), standing(&reply)), ("one", ["none"; 3]));
    }
    assert_eq!(beyond(&proxy, "tried", "observe"), 5.0);
}

#[tokio::test]
async fn what_was_counted_outlives_reloads_unless_the_limit_changes() {
    let upstream = Upstream::start("one").await;
    let config = limited(upstream.address, BY_CLIENT);
    let proxy = Proxy::start(&config);
    let mut client = Client::connect(proxy.address()).await;
    assert_eq!(let_in(&mut client, 2, &[]).await, 2);
    // Another mode or priority is the same limit still.
    for change in ["# changed\n", "    priority: critical\n"] {
        proxy.replace(&(config.clone() + change)).await;
    }
    assert_eq!(let_in(&mut client, 5, &[]).await, 1);
    proxy
        .replace(&config.replace("requests: 3", "requests: 4"))
        .await;
    assert_eq!(let_in(&mut client, 5, &[]).await, 4);
}

#[tokio::test]
async fn a_call_beyond_its_rate_ends_with_a_status_of_grpc() {
    let service = Service::start("one").await;
    let config = format!(
        "backends: [ {{ name: only, endpoints: ['{}'], protocol: h2c }} ]
routes:
  - name: all
    backendRefs: [ {{ name: only }} ]
    rateLimits: [ {{ name: slow, by: client, requests: 1, per: 1m }} ]
",
        service.address
    );
    let proxy = Proxy::start(&config);
    let caller = Caller::connect(proxy.address()).await;
    let reply = caller
        .unary("Echo", Request::new(note("a", 1)))
        .await
        .unwrap();
    assert_eq!(reply.metadata().get("ratelimit-remaining").unwrap(), "0");
    let status = caller
        .unary("Echo", Request::new(note("a", 1)))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let metadata = |name| {
        status
            .metadata()
            .get(name)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(metadata("retry-after"), "60");
    assert_eq!(metadata("ratelimit-limit"), "1");
    let pushback: u32 = metadata("grpc-retry-pushback-ms").parse().unwrap();
    assert!((1..=60_000).contains(&pushback), "{pushback}");
}

#[tokio::test]
async fn a_client_that_is_sending_a_body_hears_the_whole_refusal() {
    let upstream = Upstream::start("one").await;
    let limit = "[ { name: slow, by: everyone, requests: 1, per: 1h } ]";
    let proxy = Proxy::start(&limited(upstream.address, limit));
    assert_eq!(get(proxy.address(), "/", &[]).await.text(), "one");
    for mut client in [
        Client::connect(proxy.address()).await,
        Client::h2c(proxy.address()).await,
    ] {
        let sent = client
            .send(Method::POST, "/echo", &[], vec![b'x'; 60_000])
            .await;
        let reply = sent.unwrap();
        assert_eq!(reply.status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(
            reply.text(),
            "429 Too Many Requests: there have been too many requests\n"
        );
    }
    assert_eq!(upstream.requests(), 1);
}

#[tokio::test]
async fn explain_says_what_a_request_is_counted_for() {
    let upstream = Upstream::start("one").await;
    let limits = "
      - { name: client, by: client, requests: 100, burst: 200 }
      - { name: key, by: { header: x-key }, requests: 5, per: 1m, withoutKey: pass, mode: observe }";
    let proxy = Proxy::start(&limited(upstream.address, limits));
    let explained = explain(&proxy, "a", "/").await;
    let expected = json!([
        { "name": "client", "quota": "100 per 1s, 200 at once", "countedFor": "client 127.0.0.1", "mode": "enforce" },
        { "name": "key", "quota": "5 per 1m, 5 at once", "countedFor": null, "mode": "observe" },
    ]);
    assert_eq!(explained["rateLimits"], expected);
}

// === Load shedding ===

/// Four requests at a time, and a route for health checks.
fn crowded(upstream: SocketAddr) -> String {
    format!(
        "overload: {{ inFlight: 4 }}
backends: [ {{ name: only, version: '1', endpoints: ['{upstream}'] }} ]
routes:
  - {{ name: all, backendRefs: [ {{ name: only }} ] }}
  - name: health
    hostnames: [ health ]
    priority: critical
    backendRefs: [ {{ name: only }} ]
"
    )
}

/// Requests that are in flight until they are dropped or released.
async fn hold(proxy: &Proxy, upstream: &Upstream, count: usize) -> Vec<Raw> {
    hold_on(proxy, upstream, count, "a").await
}

async fn hold_on(proxy: &Proxy, upstream: &Upstream, count: usize, host: &str) -> Vec<Raw> {
    let before = upstream.held();
    let mut held = Vec::new();
    for _ in 0..count {
        let mut raw = Raw::connect(proxy.address()).await;
        raw.send(&format!("GET /hold HTTP/1.1\r\nhost: {host}\r\n\r\n"))
            .await;
        held.push(raw);
    }
    eventually("the requests wait", || upstream.held() == before + count).await;
    held
}

fn in_flight(proxy: &Proxy) -> f64 {
    proxy.metric("serin_overload_requests_in_flight", &[])
}

fn shed(proxy: &Proxy, priority: &str) -> f64 {
    proxy.metric("serin_shed_requests_total", &[("priority", priority)])
}

#[tokio::test]
async fn beyond_what_is_served_at_a_time_requests_are_told_to_come_again() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&crowded(upstream.address));
    assert_eq!((in_flight(&proxy), shed(&proxy, "normal")), (0.0, 0.0));
    assert_eq!(proxy.metric("serin_overload_limit", &[]), 4.0);
    let mut held = hold(&proxy, &upstream, 4).await;
    assert_eq!(in_flight(&proxy), 4.0);
    let mut client = Client::connect(proxy.address()).await;
    for _ in 0..3 {
        let reply = client.get("/", &[]).await;
        assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(reply.header("retry-after"), Some("1"));
        assert_eq!(
            reply.header("proxy-status"),
            Some("serin; error=proxy_internal_response")
        );
        // No version is to blame.
        let failures = [("backend", "only")];
        assert_eq!(proxy.metric("serin_request_failures_total", &failures), 0.0);
    }
    assert_eq!((shed(&proxy, "normal"), in_flight(&proxy)), (3.0, 4.0));
    upstream.release();
    for raw in &mut held {
        raw.read_until("one").await;
    }
    eventually("they have ended", || in_flight(&proxy) == 0.0).await;
    // On the connection that was refused before.
    assert_eq!(client.get("/", &[]).await.text(), "one");
}

#[tokio::test]
async fn critical_requests_have_a_reserve_and_it_has_an_end() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&crowded(upstream.address));
    let held = hold(&proxy, &upstream, 4).await;
    let mut client = Client::connect(proxy.address()).await;
    let mut status = async |host| client.get("/", &[("host", host)]).await.status;
    assert_eq!(status("a").await, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(status("health").await, StatusCode::OK);
    assert_eq!(shed(&proxy, "critical"), 0.0);
    let reserve = hold_on(&proxy, &upstream, 1, "health").await;
    assert_eq!(status("health").await, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(
        (shed(&proxy, "normal"), shed(&proxy, "critical")),
        (1.0, 1.0)
    );
    drop((held, reserve));
    let is_over = || in_flight(&proxy) == 0.0;
    eventually("those who went away are not in flight", is_over).await;
    assert_eq!(status("a").await, StatusCode::OK);
}

#[tokio::test]
async fn a_reload_changes_how_many_are_served_at_a_time() {
    let upstream = Upstream::start("one").await;
    let config = crowded(upstream.address);
    let proxy = Proxy::start(&config);
    let _held = hold(&proxy, &upstream, 4).await;
    let status = async || get(proxy.address(), "/", &[]).await.status;
    assert_eq!(status().await, StatusCode::SERVICE_UNAVAILABLE);
    proxy
        .replace(&config.replace("inFlight: 4", "inFlight: 5"))
        .await;
    assert_eq!(status().await, StatusCode::OK);
    proxy
        .replace(&config.replace("inFlight: 4", "inFlight: 2"))
        .await;
    assert_eq!(status().await, StatusCode::SERVICE_UNAVAILABLE);
    proxy
        .replace(&config.replace("inFlight: 4", "inFlight: 0"))
        .await;
    assert_eq!(status().await, StatusCode::OK);
    assert!(proxy.metric("serin_overload_limit", &[]).is_nan());
}

#[tokio::test]
async fn a_shed_call_is_told_in_grpc_and_a_tunnel_takes_no_place() {
    let echo = http1().await;
    let proxy = Proxy::start(&("overload: { inFlight: 1 }\n".to_owned() + &single(echo, "")));
    let one = by_upgrade(proxy.address()).await;
    let other = by_upgrade(proxy.address()).await;
    assert_eq!(proxy.metric("serin_tunnels_active", &[]), 2.0);
    assert_eq!(in_flight(&proxy), 0.0);
    drop((one, other));
    eventually("they have ended", || {
        proxy.metric("serin_tunnels_active", &[]) == 0.0
    })
    .await;
    assert_eq!(in_flight(&proxy), 0.0);

    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&crowded(upstream.address));
    let _held = hold(&proxy, &upstream, 4).await;
    let caller = Caller::connect(proxy.address()).await;
    let status = caller
        .unary("Echo", Request::new(note("a", 1)))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.metadata().get("retry-after").unwrap(), "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_are_served_while_clients_are_not() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&crowded(upstream.address));
    let _held = hold(&proxy, &upstream, 4).await;
    let stop = Arc::new(AtomicBool::new(false));
    let address = proxy.address();
    let flood: Vec<_> = (0..8)
        .map(|_| {
            let stop = Arc::clone(&stop);
            tokio::spawn(async move {
                let mut client = Client::connect(address).await;
                while !stop.load(Ordering::Relaxed) {
                    let status = client.get("/", &[]).await.status;
                    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
                }
            })
        })
        .collect();
    eventually("there is a flood", || shed(&proxy, "normal") > 500.0).await;
    for path in [
        "/livez",
        "/readyz",
        "/metrics",
        "/api/v1/config/status",
        "/api/v1/backends",
    ] {
        for _ in 0..5 {
            let reply = get(proxy.admin(), path, &[]).await;
            assert_eq!(reply.status, StatusCode::OK, "{path}");
        }
    }
    proxy
        .replace(&crowded(upstream.address).replace("name: only", "name: other"))
        .await;
    stop.store(true, Ordering::Relaxed);
    for client in flood {
        client.await.unwrap();
    }
}
