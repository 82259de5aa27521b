//! Requests and responses go through, unchanged and unheld.

use http::{Method, StatusCode};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use crate::support::upstream::read_head;
use crate::support::upstream::scripted;
use crate::support::{Client, Proxy, Raw, Upstream, eventually, get, single};

#[tokio::test]
async fn a_request_goes_to_the_upstream_and_its_response_comes_back() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let reply = get(proxy.address(), "/", &[]).await;
    assert_eq!((reply.status, reply.text()), (StatusCode::OK, "one"));
    let reply = get(proxy.address(), "/status/418", &[]).await;
    assert_eq!(reply.status.as_u16(), 418);
}

#[tokio::test]
async fn connections_are_kept_alive_on_both_sides() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut client = Client::connect(proxy.address()).await;
    for _ in 0..50 {
        assert_eq!(client.get("/", &[]).await.status, StatusCode::OK);
    }
    assert_eq!((upstream.requests(), upstream.connections()), (50, 1));
    assert_eq!(
        proxy.metric("serin_upstream_connections", &[("backend", "only")]),
        1.0
    );
}

#[tokio::test]
async fn bodies_of_every_size_come_through_whole() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut client = Client::connect(proxy.address()).await;
    for size in [0, 1, 1000, 65_536, 3_000_000] {
        client.echoes(&[size]).await;
        let reply = client.get(&format!("/bytes/{size}"), &[]).await;
        assert_eq!(
            reply.header("content-length"),
            Some(size.to_string().as_str())
        );
        assert_eq!(reply.body.len(), size);
    }
    assert_eq!(upstream.connections(), 1);
}

#[tokio::test]
async fn bodies_are_streamed_in_both_directions_at_once() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("POST /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        .await;
    // The upstream's echo of the first chunk is here before the second is sent: nothing is held
    // back.
    let head = raw.read_until("first").await;
    assert!(head.contains("transfer-encoding: chunked"), "{head}");
    raw.send("6\r\nsecond\r\n").await;
    raw.read_until("second").await;
    raw.send("0\r\n\r\n").await;
    raw.read_until("0\r\n\r\n").await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    raw.read_until("one").await;
}

#[tokio::test]
async fn a_get_with_a_chunked_body_keeps_its_body() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send(
        "GET /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    )
    .await;
    raw.read_until("body").await;
}

#[tokio::test]
async fn heads_and_empty_responses_leave_the_connection_usable() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut client = Client::connect(proxy.address()).await;
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
    assert_eq!(client.get("/", &[]).await.text(), "one");
    assert_eq!(upstream.connections(), 1);
}

#[tokio::test]
async fn a_pipelined_second_request_is_answered_in_order() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("GET /bytes/3 HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .await;
    raw.read_until("\r\n\r\nxxx").await;
    raw.read_until("\r\n\r\none").await;
}

#[tokio::test]
async fn http_1_0_clients_are_served_and_the_connection_closes() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("GET /head HTTP/1.0\r\n\r\n").await;
    let reply = raw.read_to_end().await;
    assert!(reply.starts_with("HTTP/1.0 200 OK\r\n"), "{reply}");
    // HTTP/1.1 wants a host, and there is no better one.
    let host = format!("host: {}", upstream.address);
    assert!(reply.lines().any(|line| line == host), "{reply}");
}

#[tokio::test]
async fn an_http_1_0_upstream_does_not_take_keep_alive_from_the_client() {
    let upstream = scripted(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    let proxy = Proxy::start(&single(upstream, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    for _ in 0..3 {
        raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let reply = raw.read_until("\r\n\r\nok").await;
        assert!(reply.starts_with("HTTP/1.1 200 OK"), "{reply}");
    }
}

#[tokio::test]
async fn a_pooled_connection_that_died_is_replaced_without_a_failure() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::start(&single(listener.local_addr().unwrap(), ""));
    let mut client = Client::connect(proxy.address()).await;
    for round in 0..5 {
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_head(&mut stream).await;
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                .await
                .unwrap();
            stream
        };
        let (reply, stream) = tokio::join!(client.send(Method::POST, "/", &[], "once only"), serve);
        assert_eq!(reply.unwrap().status, StatusCode::OK, "round {round}");
        drop(stream);
        // The proxy has noticed that the connection is gone when it no longer counts it.
        eventually("the dead connection is noticed", || {
            proxy.metric("serin_upstream_connections", &[("backend", "only")]) == 0.0
        })
        .await;
    }
}

#[tokio::test]
async fn an_answer_before_the_end_of_the_request_reaches_the_client() {
    let upstream = crate::support::upstream::scripted(
        b"HTTP/1.1 413 Payload Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nbig",
    )
    .await;
    let proxy = Proxy::start(&single(upstream, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\nsome of it")
        .await;
    let reply = raw.read_until("big").await;
    assert!(reply.starts_with("HTTP/1.1 413 "), "{reply}");
}

#[tokio::test]
async fn every_request_is_counted_once_under_its_route_backend_and_status() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut client = Client::connect(proxy.address()).await;
    for _ in 0..3 {
        client.get("/", &[]).await;
    }
    client.get("/status/503", &[]).await;
    client
        .send(Method::from_bytes(b"BREW").unwrap(), "/", &[], "")
        .await
        .unwrap();
    let labels = |method, code| {
        [
            ("route", "all"),
            ("backend", "only"),
            ("version", "1"),
            ("method", method),
            ("code", code),
        ]
    };
    let requests = |method, code| proxy.metric("serin_requests_total", &labels(method, code));
    eventually("all five requests have been counted", || {
        proxy.metric("serin_requests_total", &[]) == 5.0
    })
    .await;
    assert_eq!(
        (
            requests("GET", "200"),
            requests("GET", "503"),
            requests("_OTHER", "200")
        ),
        (3.0, 1.0, 1.0)
    );
    assert_eq!(
        proxy.metric(
            "serin_request_duration_seconds_count",
            &[("backend", "only")]
        ),
        5.0
    );
    assert_eq!(
        proxy.metric(
            "serin_upstream_duration_seconds_count",
            &[("backend", "only")]
        ),
        5.0
    );
    assert_eq!(
        proxy.metric("serin_routing_decisions_total", &[("reason", "baseline")]),
        5.0
    );
    eventually("nothing is in flight", || {
        proxy.metric("serin_requests_in_flight", &[]) == 0.0
    })
    .await;
}

#[tokio::test]
async fn a_client_that_goes_away_in_its_own_body_counts_as_499_and_blames_no_version() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    for (head, path) in [
        ("content-length: 100", "/sink"),
        ("transfer-encoding: chunked", "/sink"),
        // The response has begun by then.
        ("transfer-encoding: chunked", "/echo"),
    ] {
        let mut raw = Raw::connect(proxy.address()).await;
        let part = "5\r\nhello\r\n";
        raw.send(&format!(
            "POST {path} HTTP/1.1\r\nhost: a\r\n{head}\r\n\r\n{part}"
        ))
        .await;
        if path == "/echo" {
            raw.read_until("hello").await;
        } else {
            let in_flight = || proxy.metric("serin_requests_in_flight", &[("backend", "only")]);
            eventually("the request is on its way", || in_flight() == 1.0).await;
        }
        drop(raw);
        eventually("nothing is in flight", || {
            proxy.metric("serin_requests_in_flight", &[]) == 0.0
        })
        .await;
    }
    let count = |code| proxy.metric("serin_requests_total", &[("code", code)]);
    assert_eq!((count("499"), count("400"), count("200")), (2.0, 0.0, 1.0));
    assert_eq!(proxy.metric("serin_upstream_errors_total", &[]), 0.0);
}

#[tokio::test]
async fn a_client_that_stalls_after_an_early_answer_holds_on_to_nothing() {
    let upstream = scripted(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno").await;
    let proxy = Proxy::start(&single(upstream, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\nhello")
        .await;
    raw.read_until("\r\n\r\nno").await;
    raw.read_to_end().await;
    eventually("both connections are closed", || {
        proxy.metric("serin_upstream_connections", &[]) == 0.0
            && proxy.metric("serin_connections_active", &[]) == 0.0
    })
    .await;
}

#[tokio::test]
async fn a_client_that_goes_away_counts_as_499_and_frees_everything() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request waits at the upstream", || upstream.held() == 1).await;
    assert_eq!(
        proxy.metric("serin_requests_in_flight", &[("backend", "only")]),
        1.0
    );
    drop(raw);
    eventually("it is counted as 499", || {
        proxy.metric("serin_requests_total", &[("code", "499")]) == 1.0
    })
    .await;
    eventually("nothing is in flight", || {
        proxy.metric("serin_requests_in_flight", &[]) == 0.0
    })
    .await;
    let backends = proxy.app().live().load();
    assert_eq!(backends.backends[0].endpoints[0].in_flight(), 0);
}
