//! HTTP/2 to upstreams: shared connections, and requests of one version in the other's shape.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode};
use http_body_util::channel::Channel;
use http_body_util::{BodyExt, Empty, Full};
use serin::app::Drained;
use tokio::net::TcpListener;

use crate::support::{Client, Proxy, Raw, Upstream, eventually};

/// One backend `only` that speaks HTTP/2 without TLS.
fn h2c(upstream: std::net::SocketAddr, more: &str) -> String {
    format!(
        "backends: [ {{ name: only, version: '1', endpoints: ['{upstream}'], protocol: h2c{more} }} ]
routes: [ {{ name: all, backendRefs: [ {{ name: only }} ] }} ]
"
    )
}

fn connections(proxy: &Proxy) -> f64 {
    proxy.metric("serin_upstream_connections", &[("backend", "only")])
}

#[tokio::test]
async fn clients_of_either_version_reach_an_upstream_that_speaks_http_2() {
    let upstream = Upstream::h2c("one").await;
    let proxy = Proxy::start(&h2c(upstream.address, ""));
    for mut client in [
        Client::connect(proxy.address()).await,
        Client::h2c(proxy.address()).await,
    ] {
        let headers = [
            ("host", "shop.example.com:81"),
            ("te", "trailers"),
            ("cookie", "a=1"),
        ];
        let reply = client.get("/head?q=1", &headers).await;
        let lines: Vec<&str> = reply.text().lines().collect();
        assert_eq!(lines[0], "GET http://shop.example.com:81/head?q=1 HTTP/2.0");
        for line in [
            "te: trailers",
            "cookie: a=1",
            "x-forwarded-host: shop.example.com:81",
        ] {
            assert!(lines.contains(&line), "{line} not in {lines:#?}");
        }
        assert!(
            !lines.iter().any(|line| line.starts_with("host:")),
            "{lines:#?}"
        );
        client.echoes(&[0, 1, 65_536, 3_000_000]).await;
        for (method, path, status) in [
            (Method::HEAD, "/bytes/1000", 200),
            (Method::GET, "/status/204", 204),
            (Method::GET, "/status/304", 304),
        ] {
            let reply = client.send(method, path, &[], "").await.unwrap();
            assert_eq!(
                (reply.status.as_u16(), reply.body.len()),
                (status, 0),
                "{path}"
            );
        }
    }
}

#[tokio::test]
async fn te_is_not_made_up_and_names_nothing_but_trailers() {
    let upstream = Upstream::h2c("one").await;
    let proxy = Proxy::start(&h2c(upstream.address, ""));
    let mut client = Client::connect(proxy.address()).await;
    for (te, expected) in [
        (None, None),
        (Some("gzip"), None),
        (Some("gzip, trailers;q=0.5"), None),
        (Some("gzip, Trailers"), Some("te: trailers")),
    ] {
        let headers: Vec<_> = te.iter().map(|te| ("te", *te)).collect();
        let reply = client.get("/head", &headers).await;
        let seen = reply.text().lines().find(|line| line.starts_with("te:"));
        assert_eq!(seen, expected, "{te:?}");
    }
}

#[tokio::test]
async fn trailers_pass_in_both_directions() {
    let upstream = Upstream::h2c("one").await;
    let proxy = Proxy::start(&h2c(upstream.address, ""));
    let mut client = Client::h2c(proxy.address()).await;
    let reply = client.get("/trailers", &[("te", "trailers")]).await;
    assert_eq!(
        (reply.text(), &reply.trailers["x-sum"]),
        ("body", &HeaderValue::from_static("1"))
    );

    let trailers = HeaderMap::from_iter([(
        HeaderName::from_static("x-check"),
        HeaderValue::from_static("7"),
    )]);
    let body = Full::new(Bytes::from("body")).with_trailers(async { Some(Ok(trailers)) });
    let request = Request::post("http://a/seen-trailers").body(body.boxed());
    let response = client.request(request.unwrap()).await.unwrap();
    let seen = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(seen, "{\"x-check\": \"7\"}");
}

#[tokio::test]
async fn an_http_1_client_is_sent_the_trailers_of_an_http_2_upstream() {
    let upstream = Upstream::h2c("one").await;
    let proxy = Proxy::start(&h2c(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("GET /trailers HTTP/1.1\r\nhost: a\r\nte: trailers\r\nconnection: te\r\n\r\n")
        .await;
    let reply = raw.read_until("0\r\nx-sum: 1\r\n\r\n").await;
    assert!(
        reply.contains("transfer-encoding: chunked") && reply.contains("4\r\nbody\r\n"),
        "{reply}"
    );
}

#[tokio::test]
async fn requests_share_a_connection_also_when_they_come_at_once() {
    let upstream = Upstream::h2c("one").await;
    let config = format!("workers: 1\n{}", h2c(upstream.address, ""));
    let proxy = Proxy::start(&config);
    let client = Client::h2c(proxy.address()).await;
    let requests: Vec<_> = (0..60)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.get("/hold", &[]).await.status })
        })
        .collect();
    eventually("all wait at the upstream", || upstream.held() == 60).await;
    assert_eq!((upstream.connections(), connections(&proxy)), (1, 1.0));
    upstream.release();
    for request in requests {
        assert_eq!(request.await.unwrap(), StatusCode::OK);
    }
}

#[tokio::test]
async fn another_connection_is_opened_before_the_upstream_makes_requests_wait() {
    let upstream = Upstream::h2c_with("one", 10).await;
    let config = format!("workers: 1\n{}", h2c(upstream.address, ""));
    let proxy = Proxy::start(&config);
    let client = Client::h2c(proxy.address()).await;
    let requests: Vec<_> = (0..40)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.get("/hold", &[]).await.status })
        })
        .collect();
    eventually("none waits in the proxy", || upstream.held() == 40).await;
    // Four fifths of ten on each.
    assert_eq!(upstream.connections(), 5);
    upstream.release();
    for request in requests {
        assert_eq!(request.await.unwrap(), StatusCode::OK);
    }
}

#[tokio::test]
async fn the_configured_limit_holds_where_the_upstream_allows_more() {
    let upstream = Upstream::h2c("one").await;
    let more = ", http2: { maxConcurrentStreams: 4 }";
    let proxy = Proxy::start(&format!("workers: 1\n{}", h2c(upstream.address, more)));
    let client = Client::h2c(proxy.address()).await;
    for _ in 0..12 {
        let mut client = client.clone();
        tokio::spawn(async move { client.get("/hold", &[]).await });
    }
    eventually("all wait at the upstream", || upstream.held() == 12).await;
    assert_eq!(upstream.connections(), 3);
    upstream.release();
}

#[tokio::test]
async fn clients_that_go_away_cost_nobody_else_the_connection() {
    let upstream = Upstream::h2c("one").await;
    let proxy = Proxy::start(&format!("workers: 1\n{}", h2c(upstream.address, "")));
    let mut client = Client::h2c(proxy.address()).await;
    // More than h2 takes in the life of a connection by default; the client's own, as well.
    for round in 0..1100 {
        if round % 500 == 0 {
            client = Client::h2c(proxy.address()).await;
        }
        let large = Request::get("http://a/bytes/1000000").body(Empty::new().boxed());
        drop(client.request(large.unwrap()).await.unwrap());
    }
    assert_eq!(client.get("/", &[]).await.text(), "one");
    assert_eq!(upstream.connections(), 1);
}

#[tokio::test]
async fn clients_that_read_nothing_do_not_hold_up_others_on_the_same_connection() {
    let upstream = Upstream::h2c("one").await;
    let proxy = Proxy::start(&format!("workers: 1\n{}", h2c(upstream.address, "")));
    let mut stalled = Vec::new();
    for _ in 0..50 {
        let mut client = Client::h2c(proxy.address()).await;
        let large = Request::get("http://a/bytes/10000000").body(Empty::new().boxed());
        stalled.push((client.request(large.unwrap()).await.unwrap(), client));
    }
    let mut client = Client::connect(proxy.address()).await;
    assert_eq!(
        client.get("/bytes/3000000", &[]).await.body.len(),
        3_000_000
    );
    assert_eq!(upstream.connections(), 1);
}

#[tokio::test]
async fn bodies_are_streamed_in_both_directions_at_once() {
    let upstream = Upstream::h2c("one").await;
    let proxy = Proxy::start(&h2c(upstream.address, ""));
    let mut client = Client::h2c(proxy.address()).await;
    let (mut sender, body) = Channel::<Bytes>::new(1);
    let request = Request::post("http://a/echo").body(body.map_err(|never| match never {}).boxed());
    let response = tokio::spawn(async move { client.request(request.unwrap()).await.unwrap() });
    sender.send_data("first".into()).await.unwrap();
    let mut body = response.await.unwrap().into_body();
    for part in ["first", "second", "third"] {
        let frame = body.frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), part);
        let next = if part == "first" { "second" } else { "third" };
        if part != "third" {
            sender.send_data(next.into()).await.unwrap();
        }
    }
    drop(sender);
    assert!(body.collect().await.unwrap().to_bytes().is_empty());
}

#[tokio::test]
async fn what_does_not_speak_http_2_is_a_bad_gateway_and_says_so_in_time() {
    let http1 = Upstream::start("one").await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    for (upstream, status) in [
        (http1.address, StatusCode::BAD_GATEWAY),
        (silent.local_addr().unwrap(), StatusCode::GATEWAY_TIMEOUT),
    ] {
        let proxy = Proxy::start(&h2c(upstream, ", timeouts: { connect: 300ms }"));
        let mut client = Client::connect(proxy.address()).await;
        assert_eq!(client.get("/", &[]).await.status, status);
        // Those who wait for the same connection are told as well.
        let client = Client::h2c(proxy.address()).await;
        let all: Vec<_> = (0..5)
            .map(|_| {
                let mut client = client.clone();
                tokio::spawn(async move { client.get("/", &[]).await.status })
            })
            .collect();
        for one in all {
            assert_eq!(one.await.unwrap(), status);
        }
    }
}

#[tokio::test]
async fn another_protocol_takes_effect_at_a_reload_and_requests_go_on() {
    let old = Upstream::h2c("old").await;
    let proxy = Proxy::start(&h2c(old.address, ""));
    let client = Client::h2c(proxy.address()).await;
    let mut busy = client.clone();
    let held = tokio::spawn(async move { busy.get("/hold", &[]).await });
    eventually("the request waits", || old.held() == 1).await;
    let http1 = h2c(old.address, "").replace("h2c", "http1");
    proxy.replace(&http1).await;
    let mut after = Client::connect(proxy.address()).await;
    // It does not understand HTTP/1.1; what matters is that it is asked in it.
    assert_eq!(after.get("/", &[]).await.status, StatusCode::BAD_GATEWAY);
    old.release();
    assert_eq!(held.await.unwrap().text(), "old");
}

#[tokio::test]
async fn a_connection_that_the_upstream_ends_gracefully_costs_no_request() {
    let upstream = Upstream::h2c("one").await;
    let proxy = Proxy::start(&format!("workers: 1\n{}", h2c(upstream.address, "")));
    let mut client = Client::h2c(proxy.address()).await;
    let mut busy = client.clone();
    let held = tokio::spawn(async move { busy.get("/hold", &[]).await });
    eventually("the request waits", || upstream.held() == 1).await;
    for round in 0..100 {
        if round % 10 == 0 {
            upstream.leave();
        }
        let reply = client
            .send(Method::POST, "/echo", &[], "body")
            .await
            .unwrap();
        assert_eq!(
            (reply.status, reply.text()),
            (StatusCode::OK, "body"),
            "{round}"
        );
    }
    assert!(upstream.connections() > 5, "{}", upstream.connections());
    upstream.release();
    assert_eq!(held.await.unwrap().text(), "one");
}

#[tokio::test]
async fn unused_connections_are_closed() {
    let upstream = Upstream::h2c("one").await;
    let more = ", pool: { idleTimeout: 100ms }";
    let proxy = Proxy::start(&h2c(upstream.address, more));
    let mut client = Client::h2c(proxy.address()).await;
    client.get("/", &[]).await;
    eventually("it is closed", || connections(&proxy) == 0.0).await;
    assert_eq!(client.get("/", &[]).await.text(), "one");
    assert_eq!(proxy.shut_down().await, Drained::Clean);
}

#[tokio::test]
async fn a_connection_from_before_a_reload_is_not_used_for_another_protocol() {
    let upstream = Upstream::start("one").await;
    let http2 = format!("workers: 1\n{}", h2c(upstream.address, ""));
    let proxy = Proxy::start(&http2.replace("h2c", "http1"));
    let mut client = Client::connect(proxy.address()).await;
    assert_eq!(client.get("/", &[]).await.text(), "one");
    proxy.replace(&http2).await;
    // Over the connection that rests it would be understood.
    assert_eq!(client.get("/", &[]).await.status, StatusCode::BAD_GATEWAY);
}
