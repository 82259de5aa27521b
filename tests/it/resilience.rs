//! Endpoints that fail: who notices, who is spared, and what it counts for.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::upstream::{read_head, serving};
use crate::support::{
    Client, Proxy, Raw, Reply, Upstream, eventually, eventually_asked, explain, get, shop, single,
};

const OVERRIDE: &str = "    gray: { override: { header: x-version } }\n";

/// Everybody is on the canary.
pub(crate) const ALL: (u32, u32) = (0, 1);

/// Reads a request head, and closes without an answer.
pub(crate) async fn closing() -> SocketAddr {
    let close = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
    };
    serving(close).await.0
}

/// Accepts and never answers.
pub(crate) async fn hanging() -> SocketAddr {
    let hang = |mut stream: TcpStream| async move {
        let mut sink = Vec::new();
        let _ = stream.read_to_end(&mut sink).await;
    };
    serving(hang).await.0
}

pub(crate) async fn refusing() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

pub(crate) async fn send(proxy: &Proxy, method: Method, path: &str) -> Reply {
    let mut client = Client::connect(proxy.address()).await;
    client.send(method, path, &[], "").await.unwrap()
}

pub(crate) fn canary(proxy: &Proxy, name: &str, labels: &[(&str, &str)]) -> f64 {
    let labels = [&[("backend", "shop-canary")], labels].concat();
    proxy.metric(name, &labels)
}

#[tokio::test]
async fn a_dead_canary_fails_nobody_and_its_failures_are_its_own() {
    let stable = Upstream::start("stable").await;
    let proxy = Proxy::start(&shop(stable.address, refusing().await, ALL, ""));
    for method in [Method::GET, Method::POST] {
        let reply = send(&proxy, method, "/").await;
        assert_eq!((reply.status, reply.text()), (StatusCode::OK, "stable"));
        assert_eq!(reply.header("x-service-version"), Some("1"));
    }
    eventually("both are counted", || {
        canary(&proxy, "serin_requests_total", &[("code", "502")]) == 2.0
    })
    .await;
    assert_eq!(canary(&proxy, "serin_request_failures_total", &[]), 2.0);
    let shielded = [("code", "200")];
    assert_eq!(
        canary(&proxy, "serin_shielded_requests_total", &shielded),
        2.0
    );
    // They neither spoil nor embellish the baseline.
    let baseline = [("backend", "shop-stable")];
    for name in [
        "serin_requests_total",
        "serin_upstream_duration_seconds_count",
    ] {
        assert_eq!(proxy.metric(name, &baseline), 0.0, "{name}");
    }
    assert_eq!(proxy.metric("serin_requests_in_flight", &[]), 0.0);
}

#[tokio::test]
async fn after_five_failures_the_canary_is_ejected_and_its_users_are_failed_over() {
    let stable = Upstream::start("stable").await;
    let proxy = Proxy::start(&shop(stable.address, refusing().await, ALL, ""));
    for _ in 0..5 {
        assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
    }
    let ejections = [("cause", "consecutive_failures")];
    eventually("it is ejected", || {
        canary(&proxy, "serin_ejections_total", &ejections) == 1.0
    })
    .await;
    let before = canary(&proxy, "serin_upstream_errors_total", &[]);
    for _ in 0..3 {
        assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
    }
    let failovers = [("cause", "unhealthy")];
    assert_eq!(canary(&proxy, "serin_failovers_total", &failovers), 3.0);
    assert_eq!(canary(&proxy, "serin_upstream_errors_total", &[]), before);
    let decisions = [("backend", "shop-stable"), ("reason", "failover")];
    assert_eq!(
        proxy.metric("serin_routing_decisions_total", &decisions),
        3.0
    );
    let backends = get(proxy.admin(), "/api/v1/backends", &[]).await.json();
    assert_eq!(backends[1]["endpoints"][0]["impediments"][0], "ejected");
    let metrics = get(proxy.admin(), "/metrics", &[]).await;
    let healthy = "serin_endpoint_healthy{backend=\"shop-canary\"";
    let line = metrics
        .text()
        .lines()
        .find(|line| line.starts_with(healthy));
    assert!(line.unwrap().ends_with(" 0"), "{line:?}");
}

/// Its testers have a host where it is the baseline.
#[tokio::test]
async fn a_canary_with_a_route_of_its_own_is_ejected_from_the_others_all_the_same() {
    let stable = Upstream::start("stable").await;
    let own = "  - name: testers
    hostnames: [testers.example]
    backendRefs: [ { name: shop-canary } ]
    retry: { attempts: 0 }
";
    let proxy = Proxy::start(&shop(stable.address, refusing().await, ALL, own));
    for _ in 0..5 {
        assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
    }
    eventually("it is ejected", || {
        canary(&proxy, "serin_ejections_total", &[]) == 1.0
    })
    .await;
    let failures = || canary(&proxy, "serin_upstream_errors_total", &[]);
    let before = failures();
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
    assert_eq!(failures(), before);
    let explained = explain(&proxy, "a", "/").await;
    assert_eq!(explained["backends"][1]["available"], false);
    // Its testers have nowhere else to go.
    let reply = get(proxy.address(), "/", &[("host", "testers.example")]).await;
    assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
    assert_eq!(failures(), before + 1.0);
}

#[tokio::test]
async fn an_ejection_ends_and_requests_come_back() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let config = shop(stable.address, canary.address, ALL, "").replace(
        "version: '2',",
        "version: '2', slowStart: 0s, outlierDetection: { consecutiveFailures: 2, ejection: 100ms },",
    );
    let proxy = Proxy::start(&config);
    for _ in 0..2 {
        let reply = send(&proxy, Method::GET, "/status/500").await;
        assert_eq!(reply.text(), "stable");
    }
    let is_out = |proxy: &Proxy| {
        let snapshot = proxy.app().live().load();
        !snapshot.backends[1].is_available()
    };
    eventually("it is ejected", || is_out(&proxy)).await;
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
    eventually("it is let in again", || !is_out(&proxy)).await;
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "canary");
}

#[tokio::test]
async fn users_come_back_by_and_by_to_a_canary_of_one_endpoint() {
    let (stable, only) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let config = |slow_start: &str| {
        let own = format!(
            "version: '2', slowStart: {slow_start}, outlierDetection: {{ consecutiveFailures: 1, ejection: 100ms }},"
        );
        shop(stable.address, only.address, ALL, "").replace("version: '2',", &own)
    };
    let proxy = Proxy::start(&config("1000h"));
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "canary");
    send(&proxy, Method::GET, "/status/500").await;
    let is_in = || proxy.app().live().load().backends[1].is_available();
    eventually("it is ejected", || !is_in()).await;
    eventually("it is let in again", is_in).await;
    let failovers = [("cause", "slow_start")];
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
    assert_eq!(canary(&proxy, "serin_failovers_total", &failovers), 1.0);
    proxy.replace(&config("1ms")).await;
    eventually_asked("the canary has it back", async || {
        send(&proxy, Method::GET, "/").await.text() == "canary"
    })
    .await;
}

#[tokio::test]
async fn an_endpoint_that_was_ejected_leaves_and_comes_back_gets_requests() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let plain = shop(stable.address, canary.address, ALL, "");
    let config = plain.replace(
        "version: '2',",
        "version: '2', outlierDetection: { consecutiveFailures: 1, ejection: 1h },",
    );
    let proxy = Proxy::start(&config);
    // A request that goes on keeps all that it began with.
    let mut held = Raw::connect(proxy.address()).await;
    held.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("it is there", || canary.held() == 1).await;
    send(&proxy, Method::GET, "/status/500").await;
    let is_in = || proxy.app().live().load().backends[1].is_available();
    eventually("it is ejected", || !is_in()).await;
    let address = format!("'{}'", canary.address);
    proxy.replace(&config.replace(&address, "")).await;
    proxy.replace(&config).await;
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "canary");
    canary.release();
    held.read_until("canary").await;
}

#[tokio::test]
async fn what_reads_is_shielded_from_a_canary_that_breaks_off_and_what_writes_is_not() {
    let stable = Upstream::start("stable").await;
    let proxy = Proxy::start(&shop(stable.address, closing().await, ALL, ""));
    let reply = send(&proxy, Method::GET, "/").await;
    assert_eq!((reply.status, reply.text()), (StatusCode::OK, "stable"));
    let reply = send(&proxy, Method::POST, "/").await;
    assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
    assert_eq!(stable.requests(), 1);
}

#[tokio::test]
async fn what_reads_is_shielded_from_a_canary_that_hangs() {
    let stable = Upstream::start("stable").await;
    let rest = "    timeouts: { backendRequest: 100ms }\n";
    let proxy = Proxy::start(&shop(stable.address, hanging().await, ALL, rest));
    let reply = send(&proxy, Method::GET, "/").await;
    assert_eq!((reply.status, reply.text()), (StatusCode::OK, "stable"));
    let code = [("code", "504")];
    eventually("it is counted", || {
        canary(&proxy, "serin_requests_total", &code) == 1.0
    })
    .await;
    let reply = send(&proxy, Method::POST, "/").await;
    assert_eq!(reply.status, StatusCode::GATEWAY_TIMEOUT);
}

#[tokio::test]
async fn errors_of_the_canary_are_for_those_who_asked_for_it() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let proxy = Proxy::start(&shop(stable.address, canary.address, ALL, OVERRIDE));
    let mut client = Client::connect(proxy.address()).await;
    // The stable version answers as the path says as well.
    let reply = client.get("/status/503", &[]).await;
    assert_eq!(reply.text(), "stable");
    for (path, method, answered_by) in [
        ("/status/501", Method::GET, "canary"),
        ("/status/404", Method::GET, "canary"),
        ("/status/500", Method::POST, "canary"),
        ("/status/500", Method::GET, "stable"),
    ] {
        let reply = client.send(method, path, &[], "").await.unwrap();
        assert_eq!(reply.text(), answered_by, "{path}");
    }
    let asked = client.get("/status/500", &[("x-version", "2")]).await;
    assert_eq!(asked.text(), "canary");
    // Its connection was used again.
    assert!(canary.connections() <= 2, "{}", canary.connections());
}

#[tokio::test]
async fn a_body_is_sent_again_from_its_beginning_as_long_as_it_is_small() {
    let stable = Upstream::start("stable").await;
    let read_all = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        let mut body = [0; 30_000];
        // Nobody waits for what does not come.
        let _ = stream.read_exact(&mut body).await;
    };
    let (canary, attempts) = serving(read_all).await;
    let proxy = Proxy::start(&shop(stable.address, canary, ALL, ""));
    let mut client = Client::connect(proxy.address()).await;
    let body: Vec<u8> = (0..60_000_u32).map(|byte| byte as u8).collect();
    let reply = client.send(Method::PUT, "/echo", &[], body.clone()).await;
    let reply = reply.unwrap();
    assert_eq!(reply.status, StatusCode::OK);
    assert!(reply.body == body, "{} bytes", reply.body.len());
    assert_eq!(attempts.load(Ordering::SeqCst), 1);
    let large = vec![0; 70_000];
    let reply = client.send(Method::PUT, "/sink", &[], large).await.unwrap();
    assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
}

#[tokio::test]
async fn another_endpoint_is_tried_first() {
    let alive = Upstream::start("alive").await;
    let dead = refusing().await;
    let both = format!("'{dead}', '{}'", alive.address);
    let config = single(alive.address, "").replace(&format!("'{}'", alive.address), &both);
    let proxy = Proxy::start(&config);
    for round in 0..40 {
        let method = [Method::GET, Method::POST][round % 2].clone();
        assert_eq!(send(&proxy, method, "/").await.status, StatusCode::OK);
    }
    let ejected = || proxy.metric("serin_ejections_total", &[("backend", "only")]);
    eventually("it is ejected", || ejected() == 1.0).await;
    let sent = proxy.metric("serin_retries_total", &[("result", "sent")]);
    assert_eq!(sent, proxy.metric("serin_upstream_errors_total", &[]));
    // Some may have been on their way to it when it was.
    assert!((5.0..15.0).contains(&sent), "{sent}");
}

/// The race that no idle timeout rules out: a connection closes while a request is on its way.
#[tokio::test]
async fn what_reads_survives_a_connection_that_closes_as_it_is_used_again() {
    let once = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        stream.write_all(answer).await.unwrap();
        read_head(&mut stream).await;
    };
    let (upstream, connections) = serving(once).await;
    let proxy = Proxy::start(&format!("workers: 1\n{}", single(upstream, "")));
    let mut client = Client::connect(proxy.address()).await;
    for _ in 0..6 {
        assert_eq!(client.get("/", &[]).await.text(), "ok");
    }
    assert_eq!(connections.load(Ordering::SeqCst), 6);
    assert_eq!(proxy.metric("serin_retries_total", &[]), 5.0);
}

#[tokio::test]
async fn repetitions_are_limited_and_can_be_switched_off() {
    let dead = refusing().await;
    for (retry, attempts) in [("attempts: 0", 1.0), ("attempts: 3, backoff: 1ms", 4.0)] {
        let rest = format!("    retry: {{ {retry} }}\n");
        let proxy = Proxy::start(&single(dead, &rest));
        assert_eq!(
            send(&proxy, Method::GET, "/").await.status,
            StatusCode::BAD_GATEWAY
        );
        assert_eq!(
            proxy.metric("serin_upstream_errors_total", &[]),
            attempts,
            "{retry}"
        );
    }
}

#[tokio::test]
async fn chosen_statuses_are_repeated_with_another_endpoint() {
    let sad = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        let answer = b"HTTP/1.1 503 no\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let _ = stream.write_all(answer).await;
    };
    let (sad, _) = serving(sad).await;
    let happy = Upstream::start("happy").await;
    let both = format!("'{sad}', '{}'", happy.address);
    let rest = "    retry: { codes: [503] }\n";
    let config = single(happy.address, rest).replace(&format!("'{}'", happy.address), &both);
    let proxy = Proxy::start(&config);
    for _ in 0..20 {
        assert_eq!(send(&proxy, Method::GET, "/").await.text(), "happy");
    }
}

#[tokio::test]
async fn shielding_and_failover_can_be_switched_off() {
    let stable = Upstream::start("stable").await;
    let rest = "    shield: { requests: none }
    failover: { toBaseline: false }
    retry: { attempts: 0 }
";
    let proxy = Proxy::start(&shop(stable.address, refusing().await, ALL, rest));
    for _ in 0..5 {
        let reply = send(&proxy, Method::GET, "/").await;
        assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
    }
    eventually("it is ejected", || {
        canary(&proxy, "serin_ejections_total", &[]) == 1.0
    })
    .await;
    let reply = send(&proxy, Method::GET, "/").await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(stable.requests(), 0);
}

#[tokio::test]
async fn the_baseline_is_replaced_only_if_the_configuration_says_by_what() {
    let canary = Upstream::start("canary").await;
    let config = |rest| {
        let config = shop(canary.address, canary.address, (1, 0), rest);
        config.replacen(&format!("'{}'", canary.address), "", 1)
    };
    let proxy = Proxy::start(&config(""));
    let reply = send(&proxy, Method::GET, "/").await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
    let failover = "    failover: { fromBaseline: shop-canary }\n";
    proxy.replace(&config(failover)).await;
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "canary");
}

#[tokio::test]
async fn a_baseline_without_an_endpoint_that_is_well_is_replaced_as_well() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let check = "version: '1', healthCheck: { http: { path: /status/500 }, interval: 1h },";
    let config = |rest| {
        let config = shop(stable.address, canary.address, (1, 0), rest);
        config.replace("version: '1',", check)
    };
    let proxy = Proxy::start(&config(""));
    let failures = [("backend", "shop-stable"), ("result", "failure")];
    eventually("it is asked", || {
        proxy.metric("serin_health_checks_total", &failures) == 1.0
    })
    .await;
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
    let failover = "    failover: { fromBaseline: shop-canary }\n";
    proxy.replace(&config(failover)).await;
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "canary");
    // Two that are not well: the baseline goes on with what it has.
    let disabled = config(failover).replace("version: '2',", "version: '2', disabled: true,");
    proxy.replace(&disabled).await;
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
}

#[tokio::test]
async fn a_baseline_whose_endpoints_all_fail_goes_on_with_all_of_them() {
    let (one, other) = (Upstream::start("one").await, Upstream::start("other").await);
    let both = format!("'{}', '{}'", one.address, other.address);
    let config = single(one.address, "").replace(&format!("'{}'", one.address), &both);
    let proxy = Proxy::start(&config);
    let mut client = Client::connect(proxy.address()).await;
    for _ in 0..40 {
        client.get("/status/500", &[]).await;
    }
    eventually("one is ejected", || {
        proxy.metric("serin_ejections_total", &[]) == 1.0
    })
    .await;
    assert_eq!(client.get("/", &[]).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_backend_takes_so_many_requests_and_queues_so_many() {
    let upstream = Upstream::start("one").await;
    let limits = "version: '1', limits: { inFlight: 1, queue: 1, queueTimeout: 100h },";
    let config = single(upstream.address, "").replace("version: '1',", limits);
    let proxy = Proxy::start(&config);
    let mut first = Raw::connect(proxy.address()).await;
    first.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("it is there", || upstream.held() == 1).await;
    let mut second = Raw::connect(proxy.address()).await;
    second
        .send("POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody")
        .await;
    let waiting = || proxy.app().live().load().backends[0].gate.waiting();
    eventually("it waits", || waiting() == 1).await;
    let reply = send(&proxy, Method::GET, "/").await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(reply.header("retry-after"), Some("1"));
    let overflows = [("backend", "only"), ("cause", "queue_full")];
    assert!(proxy.metric("serin_backend_overflows_total", &overflows) >= 1.0);
    upstream.release();
    assert!(first.read_until("one").await.starts_with("HTTP/1.1 200"));
    assert!(second.read_until("body").await.starts_with("HTTP/1.1 200"));
    assert_eq!(send(&proxy, Method::GET, "/").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_stuck_canary_does_not_hold_up_the_baseline() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let config = shop(stable.address, canary.address, ALL, "").replace(
        "version: '2',",
        "version: '2', limits: { inFlight: 2, queue: 0 },",
    );
    let proxy = Proxy::start(&config);
    let mut stuck = Vec::new();
    for _ in 0..2 {
        let mut raw = Raw::connect(proxy.address()).await;
        raw.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
        stuck.push(raw);
    }
    eventually("it is stuck", || canary.held() == 2).await;
    // No endpoint has seen them, so they may be of any method.
    for method in [Method::GET, Method::POST] {
        assert_eq!(send(&proxy, method, "/").await.text(), "stable");
    }
    canary.release();
}

#[tokio::test]
async fn a_new_canary_gets_no_requests_before_it_is_found_healthy() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let checked = |path: &str| {
        let check = format!(
            "version: '2', slowStart: 0s, healthCheck: {{ http: {{ path: {path} }}, interval: 20ms }},"
        );
        shop(stable.address, canary.address, ALL, "").replace("version: '2',", &check)
    };
    let proxy = Proxy::start(&checked("/hold"));
    eventually("it is asked", || canary.held() == 1).await;
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
    assert_eq!(canary.requests(), 1);
    canary.release();
    let is_in = |proxy: &Proxy| proxy.app().live().load().backends[1].is_available();
    eventually("it is healthy", || is_in(&proxy)).await;
    // Later questions hang, and are no answer in time.
    proxy.replace(&checked("/status/500")).await;
    eventually("it is not", || !is_in(&proxy)).await;
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
    proxy.replace(&checked("/")).await;
    eventually("it is healthy again", || is_in(&proxy)).await;
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "canary");
    let answers = [("backend", "shop-canary"), ("result", "failure")];
    assert!(proxy.metric("serin_health_checks_total", &answers) >= 3.0);
}

/// A check of another endpoint goes on all the time.
#[tokio::test]
async fn an_endpoint_that_comes_back_is_asked_again_before_it_gets_requests() {
    let (stable, staying, leaving) = (
        Upstream::start("stable").await,
        Upstream::start("staying").await,
        Upstream::start("leaving").await,
    );
    let own = "version: '2', healthCheck: { http: { path: / }, interval: 1h },";
    let config = shop(stable.address, staying.address, ALL, "").replace("version: '2',", own);
    let one = format!("'{}'", staying.address);
    let both = format!("{one}, '{}'", leaving.address);
    let both = config.replace(&one, &both);
    let proxy = Proxy::start(&both);
    let usable = || {
        let snapshot = proxy.app().live().load();
        let endpoints = snapshot.backends[1].endpoints.iter();
        endpoints.filter(|one| one.is_usable()).count()
    };
    eventually("both are healthy", || usable() == 2).await;
    proxy.replace(&config).await;
    proxy.replace(&both.replace("path: /", "path: /hold")).await;
    eventually("it is asked", || leaving.held() == 1).await;
    assert_eq!(usable(), 1);
    for _ in 0..10 {
        assert_eq!(send(&proxy, Method::GET, "/").await.text(), "staying");
    }
    staying.release();
    leaving.release();
}

#[tokio::test]
async fn a_health_check_says_which_statuses_are_good() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let config = |statuses: &str| {
        let own = format!(
            "version: '2', healthCheck: {{ http: {{ path: /status/404, statuses: [{statuses}] }}, interval: 20ms, unhealthyAfter: 1, healthyAfter: 1 }},"
        );
        shop(stable.address, canary.address, ALL, "").replace("version: '2',", &own)
    };
    let proxy = Proxy::start(&config("204, 404"));
    let is_in = || proxy.app().live().load().backends[1].is_available();
    eventually("404 is good", is_in).await;
    proxy.replace(&config("200")).await;
    eventually("404 is bad", || !is_in()).await;
    proxy.replace(&config("404")).await;
    eventually("404 is good again", is_in).await;
    // Where nothing is said, a success is.
    proxy.replace(&config("")).await;
    eventually("404 is no success", || !is_in()).await;
}

#[tokio::test]
async fn below_the_panic_threshold_all_endpoints_of_a_baseline_get_requests() {
    let (one, other) = (Upstream::start("one").await, Upstream::start("other").await);
    let both = format!("'{}', '{}'", one.address, other.address);
    let config = |percent: u32| {
        let own = format!(
            "version: '1', panicThresholdPercent: {percent}, outlierDetection: {{ consecutiveFailures: 1, maxEjectedPercent: 100, ejection: 1h }},"
        );
        single(one.address, "    retry: { attempts: 0 }\n")
            .replace(&format!("'{}'", one.address), &both)
            .replace("version: '1',", &own)
    };
    let proxy = Proxy::start(&config(50));
    let ejected = || proxy.metric("serin_ejections_total", &[("backend", "only")]);
    send(&proxy, Method::GET, "/status/500").await;
    eventually("one is ejected", || ejected() == 1.0).await;
    // A half is not less than a half.
    let well = send(&proxy, Method::GET, "/").await;
    for _ in 0..20 {
        assert_eq!(send(&proxy, Method::GET, "/").await.text(), well.text());
    }
    proxy.replace(&config(51)).await;
    eventually_asked("the other one gets some as well", async || {
        send(&proxy, Method::GET, "/").await.text() != well.text()
    })
    .await;
    proxy.replace(&config(0)).await;
    send(&proxy, Method::GET, "/status/500").await;
    eventually("both are ejected", || ejected() == 2.0).await;
    let reply = send(&proxy, Method::GET, "/").await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
    proxy.replace(&config(1)).await;
    assert_eq!(send(&proxy, Method::GET, "/").await.status, StatusCode::OK);
}

#[tokio::test]
async fn without_checks_nothing_of_them_stays() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let plain = shop(stable.address, canary.address, ALL, "");
    let check = "version: '2', healthCheck: { http: { path: /hold }, interval: 20ms },";
    let proxy = Proxy::start(&plain.replace("version: '2',", check));
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
    proxy.replace(&plain).await;
    let is_in = || proxy.app().live().load().backends[1].is_available();
    eventually("nothing is held against it", is_in).await;
}

#[tokio::test]
async fn a_backend_has_so_many_connections_and_those_that_rest_make_room() {
    for (upstream, protocol) in [
        (Upstream::start("one").await, "http1"),
        (Upstream::h2c_with("one", 1).await, "h2c"),
    ] {
        let own = format!(
            "version: '1', protocol: {protocol}, limits: {{ connections: 2, queueTimeout: 100h }},"
        );
        let config = single(upstream.address, "").replace("version: '1',", &own);
        let proxy = Proxy::start(&format!("workers: 1\n{config}"));
        let mut held = Vec::new();
        for _ in 0..2 {
            let mut raw = Raw::connect(proxy.address()).await;
            raw.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
            held.push(raw);
        }
        eventually("both are there", || upstream.held() == 2).await;
        let mut third = Raw::connect(proxy.address()).await;
        third.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let in_flight = || proxy.metric("serin_requests_in_flight", &[("backend", "only")]);
        eventually("it waits", || in_flight() == 3.0).await;
        assert_eq!((upstream.connections(), upstream.requests()), (2, 2));
        upstream.release();
        third.read_until("one").await;
        assert_eq!(upstream.connections(), 2, "{protocol}");
    }
    let (one, other) = (Upstream::start("one").await, Upstream::start("other").await);
    let both = format!("'{}', '{}'", one.address, other.address);
    let limit = "version: '1', limits: { connections: 1 },";
    let config = single(one.address, "")
        .replace(&format!("'{}'", one.address), &both)
        .replace("version: '1',", limit);
    let proxy = Proxy::start(&format!("workers: 1\n{config}"));
    let mut client = Client::connect(proxy.address()).await;
    for _ in 0..20 {
        assert_eq!(client.get("/", &[]).await.status, StatusCode::OK);
    }
    assert!(one.requests() > 0 && other.requests() > 0);
}

#[tokio::test]
async fn a_connection_that_does_not_become_free_is_not_waited_for_for_ever() {
    let upstream = Upstream::start("one").await;
    let limits = "version: '1', limits: { connections: 1, queueTimeout: 50ms },";
    let config = single(upstream.address, "").replace("version: '1',", limits);
    let proxy = Proxy::start(&format!("workers: 1\n{config}"));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("it is there", || upstream.held() == 1).await;
    let reply = send(&proxy, Method::GET, "/").await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(reply.header("retry-after"), Some("1"));
}

/// A server of grpc.health.v1 that serves or does not.
async fn health_service(serves: Arc<AtomicUsize>) -> SocketAddr {
    let serve = move |stream: TcpStream| {
        let serves = Arc::clone(&serves);
        async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                let mut body = request.into_body();
                let message = body.data().await.unwrap().unwrap();
                assert_eq!(&message[..], b"\0\0\0\0\x06\x0a\x04shop");
                let head = http::Response::builder().header("content-type", "application/grpc");
                let mut stream = respond
                    .send_response(head.body(()).unwrap(), false)
                    .unwrap();
                let status = serves.load(Ordering::SeqCst) as u8;
                let answer = [0, 0, 0, 0, 2, 8, status];
                stream.send_data(answer.to_vec().into(), false).unwrap();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", "0".parse().unwrap());
                stream.send_trailers(trailers).unwrap();
            }
        }
    };
    serving(serve).await.0
}

#[tokio::test]
async fn endpoints_are_asked_by_grpc_and_by_connections_too() {
    let serves = Arc::new(AtomicUsize::new(1));
    let service = health_service(Arc::clone(&serves)).await;
    let check = "version: '2', protocol: h2c, healthCheck: { grpc: { service: shop }, interval: 20ms, unhealthyAfter: 1, healthyAfter: 1 },";
    let stable = Upstream::start("stable").await;
    let config = shop(stable.address, service, ALL, "");
    let proxy = Proxy::start(&config.replace("version: '2',", check));
    let is_in = || proxy.app().live().load().backends[1].is_available();
    eventually("it serves", is_in).await;
    serves.store(2, Ordering::SeqCst);
    eventually("it does not", || !is_in()).await;
    serves.store(1, Ordering::SeqCst);
    eventually("it serves again", is_in).await;

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let check = "version: '2', healthCheck: { tcp: {}, interval: 20ms, unhealthyAfter: 1 },";
    let config = shop(stable.address, address, ALL, "");
    let proxy = Proxy::start(&config.replace("version: '2',", check));
    let is_in = || proxy.app().live().load().backends[1].is_available();
    eventually("it accepts", is_in).await;
    drop(listener);
    eventually("it does not", || !is_in()).await;
}

/// An endpoint of HTTP/2 that refuses the first call and takes the next.
#[tokio::test]
async fn what_an_endpoint_refuses_is_sent_again_whatever_its_method() {
    let refuse_every_other = |stream: TcpStream| async move {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let mut calls = 0;
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            calls += 1;
            if calls % 2 == 1 {
                respond.send_reset(h2::Reason::REFUSED_STREAM);
                continue;
            }
            tokio::spawn(async move {
                let mut body = request.into_body();
                let mut length = 0;
                while let Some(Ok(data)) = body.data().await {
                    length += data.len();
                }
                let response = http::Response::new(());
                let mut stream = respond.send_response(response, false).unwrap();
                let length = length.to_string();
                stream.send_data(length.into(), true).unwrap();
            });
        }
    };
    let (address, _) = serving(refuse_every_other).await;
    let config = single(address, "").replace("version: '1',", "version: '1', protocol: h2c,");
    let proxy = Proxy::start(&format!("workers: 1\n{config}"));
    let mut client = Client::connect(proxy.address()).await;
    for _ in 0..3 {
        let body = vec![0; 1000];
        let reply = client.send(Method::POST, "/", &[], body).await.unwrap();
        assert_eq!(reply.text(), "1000");
    }
    assert_eq!(proxy.metric("serin_retries_total", &[]), 3.0);
}

/// Calls that fail are failures, though their heads say 200.
#[tokio::test]
async fn an_endpoint_whose_calls_fail_is_ejected() {
    use crate::support::grpc::{Caller, Service, note};
    let service = Service::start("one").await;
    let own = "version: '2', protocol: h2c,";
    let config = shop(service.address, service.address, ALL, "").replace("version: '2',", own);
    let proxy = Proxy::start(&config);
    let caller = Caller::connect(proxy.address()).await;
    for _ in 0..5 {
        let failing = tonic::Request::new(note("no", 14));
        caller.unary("FailLate", failing).await.unwrap_err();
    }
    eventually("it is ejected", || {
        canary(&proxy, "serin_ejections_total", &[]) == 1.0
    })
    .await;
}

/// An upstream that answers everything with these bytes, after so many milliseconds.
async fn answering(answer: &'static str, after: u64) -> SocketAddr {
    let serve = move |mut stream: TcpStream| async move {
        while !read_head(&mut stream).await.is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(after)).await;
            if stream.write_all(answer.as_bytes()).await.is_err() {
                break;
            }
        }
    };
    serving(serve).await.0
}

#[tokio::test]
async fn an_endpoint_that_does_worse_than_the_others_is_ejected() {
    let fine = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    let sorry = "HTTP/1.1 500 no\r\ncontent-length: 0\r\n\r\n";
    for (cause, bad) in [
        ("failure_rate", answering(sorry, 0).await),
        ("latency", answering(fine, 30).await),
    ] {
        let good = [answering(fine, 0).await, answering(fine, 0).await];
        let own = "version: '1', outlierDetection: { consecutiveFailures: 0, minRequests: 10, interval: 300ms },";
        let all = format!("'{bad}', '{}', '{}'", good[0], good[1]);
        let config = single(bad, "")
            .replace(&format!("'{bad}'"), &all)
            .replace("version: '1',", own);
        let proxy = Proxy::start(&config);
        let mut client = Client::connect(proxy.address()).await;
        let ejected = || proxy.metric("serin_ejections_total", &[("cause", cause)]);
        while ejected() == 0.0 {
            client.get("/", &[]).await;
        }
        let snapshot = proxy.app().live().load();
        let usable = snapshot.backends[0].endpoints.iter();
        let usable: Vec<bool> = usable.map(|one| one.is_usable()).collect();
        assert_eq!(usable, [false, true, true], "{cause}");
    }
}

#[tokio::test]
async fn repetitions_have_a_budget() {
    let bad = closing().await;
    // Ten at a time, of which none may be repeated but three that always may.
    let rest = "    retry: { budgetPercent: 0, backoff: 2s }\n";
    let proxy = Proxy::start(&single(bad, rest));
    let asked = (0..10).map(|_| send(&proxy, Method::GET, "/"));
    for reply in futures_util::future::join_all(asked).await {
        assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
    }
    let count = |result| proxy.metric("serin_retries_total", &[("result", result)]);
    assert_eq!((count("sent"), count("over_budget")), (3.0, 7.0));
}
