//! HTTP/2 from clients: by prior knowledge, many requests at once, translated for upstreams.

use std::time::Duration;

use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use serin::app::Drained;
use tokio::net::TcpListener;

use crate::support::frames::{
    DATA, END_HEADERS, END_STREAM, End, Frames, HEADERS, PING, RST_STREAM, get,
};
use crate::support::upstream::scripted;
use crate::support::{Client, Proxy, Upstream, eventually, single};

#[tokio::test]
async fn requests_by_prior_knowledge_are_served_beside_http_1_on_the_same_listener() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    for mut client in [
        Client::h2c(proxy.address()).await,
        Client::connect(proxy.address()).await,
    ] {
        for (path, status) in [("/", 200), ("/status/404", 404), ("/status/204", 204)] {
            let reply = client.get(path, &[]).await;
            assert_eq!(reply.status.as_u16(), status, "{path}");
        }
    }
    let labels = |protocol| [("protocol", protocol), ("route", "all")];
    for protocol in ["http1", "http2"] {
        let counted = proxy.metric("serin_requests_total", &labels(protocol));
        assert_eq!(counted, 3.0, "{protocol}");
    }
}

#[tokio::test]
async fn many_requests_of_one_connection_are_served_at_once() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let client = Client::h2c(proxy.address()).await;
    let requests: Vec<_> = (0..50)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.get("/hold", &[]).await.status })
        })
        .collect();
    eventually("all wait at the upstream", || upstream.held() == 50).await;
    assert_eq!(proxy.app().connections().iter().sum::<usize>(), 1);
    upstream.release();
    for request in requests {
        assert_eq!(request.await.unwrap(), StatusCode::OK);
    }
}

#[tokio::test]
async fn the_upstream_sees_an_http_1_request() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut client = Client::h2c(proxy.address()).await;
    let crumbs = [
        ("host", "shop.example.com:8080"),
        ("cookie", "a=1"),
        ("cookie", "b=2; c=3"),
        ("te", "trailers"),
    ];
    let reply = client.get("/head?q=1", &crumbs).await;
    let lines: Vec<&str> = reply.text().lines().collect();
    assert_eq!(lines[0], "GET /head?q=1 HTTP/1.1");
    for line in [
        "host: shop.example.com:8080",
        "cookie: a=1; b=2; c=3",
        "x-forwarded-host: shop.example.com:8080",
        "x-forwarded-proto: http",
    ] {
        assert!(lines.contains(&line), "{line} not in {lines:#?}");
    }
    assert!(
        lines.iter().any(|line| line.starts_with("via: 2 serin-")),
        "{lines:#?}"
    );
    assert!(
        !lines.iter().any(|line| line.starts_with("te:")),
        "{lines:#?}"
    );
}

#[tokio::test]
async fn cookie_crumbs_are_one_cookie_to_the_decision_as_well() {
    let stable = Upstream::start("stable").await;
    let canary = Upstream::start("canary").await;
    let gray = "    gray: { rules: [ { name: qa, cookie: { name: qa, value: '1' }, backend: shop-canary } ] }\n";
    let config = crate::support::shop(stable.address, canary.address, (1, 0), gray);
    let proxy = Proxy::start(&config);
    let mut client = Client::h2c(proxy.address()).await;
    for (crumbs, name) in [
        ([("cookie", "a=1"), ("cookie", "qa=1")], "canary"),
        ([("cookie", "a=1"), ("cookie", "qa=2")], "stable"),
    ] {
        assert_eq!(client.get("/", &crumbs).await.text(), name);
    }
}

#[tokio::test]
async fn bodies_of_every_size_come_through_whole_and_at_once() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut client = Client::h2c(proxy.address()).await;
    client.echoes(&[0, 1, 1000, 65_536, 3_000_000]).await;
}

#[tokio::test]
async fn a_host_that_is_not_the_authority_is_refused() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut client = Client::h2c(proxy.address()).await;
    for (host, status) in [("a.example", 200), ("A.Example", 200), ("b.example", 400)] {
        let request = Request::get("http://a.example/").header("host", host);
        let request = request.body(Empty::new().boxed()).unwrap();
        let response = client.request(request).await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{host}");
    }
}

#[tokio::test]
async fn a_reply_of_our_own_to_head_has_no_body() {
    let proxy = Proxy::start("backends: []\nroutes: []\n");
    for mut client in [
        Client::h2c(proxy.address()).await,
        Client::connect(proxy.address()).await,
    ] {
        let get = client.get("/", &[]).await;
        let head = client.send(Method::HEAD, "/", &[], "").await.unwrap();
        assert_eq!((head.status, head.body.len()), (StatusCode::NOT_FOUND, 0));
        let length = get.body.len().to_string();
        assert_eq!(head.header("content-length"), Some(&*length));
    }
}

#[tokio::test]
async fn connect_is_not_served() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut client = Client::h2c(proxy.address()).await;
    let request = Request::connect("a.example:443").body(Empty::new().boxed());
    let response = client.request(request.unwrap()).await.unwrap();
    assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn a_drain_lets_requests_finish_and_takes_no_new_ones() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut client = Client::h2c(proxy.address()).await;
    let mut busy = client.clone();
    let held = tokio::spawn(async move { busy.get("/hold", &[]).await });
    eventually("the request waits", || upstream.held() == 1).await;
    let drain = tokio::spawn(proxy.shut_down());
    // What comes after GOAWAY is refused by the client itself.
    while client.send(Method::GET, "/", &[], "").await.is_ok() {}
    upstream.release();
    assert_eq!(held.await.unwrap().text(), "one");
    assert_eq!(drain.await.unwrap(), Drained::Clean);
}

#[tokio::test]
async fn a_client_that_takes_nothing_of_one_response_loses_that_one_alone() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&format!(
        "listeners: [ {{ name: web, address: '127.0.0.1:0', timeouts: {{ write: 300ms }} }} ]\n{}",
        single(upstream.address, "")
    ));
    let mut client = Client::h2c(proxy.address()).await;
    let large = Request::get("http://a/bytes/10000000").body(Empty::new().boxed());
    let stalled = client.request(large.unwrap()).await.unwrap();
    let waits = || proxy.metric("serin_requests_in_flight", &[("route", "all")]);
    eventually("the stalled response is given up", || waits() == 0.0).await;
    assert_eq!(client.get("/", &[]).await.text(), "one");
    stalled.into_body().collect().await.unwrap_err();
}

#[tokio::test]
async fn a_slow_upstream_is_not_mistaken_for_a_slow_client() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&format!(
        "listeners: [ {{ name: web, address: '127.0.0.1:0', timeouts: {{ write: 50ms }} }} ]\n{}",
        single(upstream.address, "")
    ));
    let mut client = Client::h2c(proxy.address()).await;
    let (mut sender, body) = http_body_util::channel::Channel::<bytes::Bytes>::new(4);
    let request = Request::post("http://a/echo").body(body.map_err(|never| match never {}).boxed());
    let response = tokio::spawn(async move { client.request(request.unwrap()).await.unwrap() });
    sender.send_data("first".into()).await.unwrap();
    let mut body = response.await.unwrap().into_body();
    let first = body.frame().await.unwrap().unwrap();
    assert_eq!(first.into_data().unwrap(), "first");
    // The limit passes several times over while nothing comes from behind.
    tokio::time::sleep(Duration::from_millis(400)).await;
    sender.send_data("second".into()).await.unwrap();
    drop(sender);
    assert_eq!(body.collect().await.unwrap().to_bytes(), "second");
}

#[tokio::test]
async fn a_body_beyond_the_limit_gets_413_in_either_protocol() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&format!(
        "listeners: [ {{ name: web, address: '127.0.0.1:0', limits: {{ requestBody: 10Ki }} }} ]\n{}",
        single(upstream.address, "")
    ));
    for mut client in [
        Client::h2c(proxy.address()).await,
        Client::connect(proxy.address()).await,
    ] {
        for (size, status) in [(10_240, 200), (10_241, 413)] {
            let sent = client.send(Method::POST, "/sink", &[], vec![0; size]).await;
            assert_eq!(sent.unwrap().status.as_u16(), status, "{size}");
        }
    }
    // Without a length it is found out on the way.
    let mut client = Client::h2c(proxy.address()).await;
    let (mut sender, body) = http_body_util::channel::Channel::<bytes::Bytes>::new(4);
    let request = Request::post("http://a/sink").body(body.map_err(|never| match never {}).boxed());
    let response = tokio::spawn(async move { client.request(request.unwrap()).await.unwrap() });
    for _ in 0..3 {
        // The proxy may have heard enough.
        let _ = sender.send_data(vec![0; 4096].into()).await;
    }
    let response = response.await.unwrap();
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn what_http_1_endpoints_may_say_and_http_2_may_not_is_put_right() {
    for answer in [
        "HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: connection, x-sum\r\n\r\n\
         2\r\nok\r\n0\r\nconnection: close\r\nx-sum: 7\r\n\r\n",
    ] {
        let proxy = Proxy::start(&single(scripted(answer.as_bytes()).await, ""));
        let mut client = Client::h2c(proxy.address()).await;
        let reply = client.send(Method::GET, "/", &[], "").await;
        let reply = reply.unwrap_or_else(|error| panic!("{answer}: {error}"));
        let has_body = reply.status == StatusCode::OK;
        assert_eq!(reply.text(), if has_body { "ok" } else { "" }, "{answer}");
        let lengths = reply.headers.get_all("content-length").iter().count();
        assert!(lengths <= usize::from(has_body), "{answer}");
    }
}

#[tokio::test]
async fn a_browser_may_send_more_cookies_than_a_head_may_have_fields() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut client = Client::h2c(proxy.address()).await;
    let crumbs = [("cookie", "a=b"); 150];
    assert_eq!(client.get("/", &crumbs).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_client_that_is_answered_early_may_finish_what_it_sends() {
    let upstream = Upstream::start("one").await;
    let refusing = scripted(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n").await;
    let absent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = absent.local_addr().unwrap();
    drop(absent);
    let limit = "    limits: { requestBody: 100 }\n";
    for (config, cause) in [
        (single(upstream.address, limit), "a limit"),
        (single(refusing, ""), "the endpoint"),
        (single(nobody, ""), "no endpoint"),
    ] {
        let proxy = Proxy::start(&config);
        let mut frames = Frames::connect(proxy.address()).await;
        frames.send(HEADERS, END_HEADERS, 1, &get("/sink")).await;
        frames.send(DATA, 0, 1, &[0; 200]).await;
        assert_eq!(frames.end_of(1).await, End::Answered, "{cause}");
        frames.send(DATA, END_STREAM, 1, &[0; 200]).await;
        frames.send(PING, 0, 0, &[7; 8]).await;
        loop {
            let frame = frames.next().await.expect("the connection goes on");
            assert_ne!(frame.kind, RST_STREAM, "{cause}");
            if frame.kind == PING && frame.payload == [7; 8] {
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_connection_that_rests_too_long_is_taken_leave_of() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&format!(
        "listeners: [ {{ name: web, address: '127.0.0.1:0', timeouts: {{ idle: 200ms }} }} ]\n{}",
        single(upstream.address, "")
    ));
    let mut frames = Frames::connect(proxy.address()).await;
    frames
        .send(HEADERS, END_HEADERS | END_STREAM, 1, &get("/"))
        .await;
    assert_eq!(frames.end_of(1).await, End::Answered);
    assert_eq!(frames.end_of(3).await, End::Connection(Some(0)));
}
