//! Replies of the proxy's own: what went wrong is said by status, by Proxy-Status and in metrics.

use std::net::SocketAddr;

use http::{Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::upstream::{read_head, scripted};
use crate::support::{Client, Proxy, Raw, Reply, Upstream, eventually, get, single};

fn assert_reply(reply: &Reply, status: u16, token: &str) {
    assert_eq!(reply.status.as_u16(), status, "{}", reply.text());
    assert_eq!(
        reply.header("proxy-status"),
        Some(format!("serin; error={token}").as_str())
    );
    assert_eq!(
        reply.header("content-type"),
        Some("text/plain; charset=utf-8")
    );
    assert!(reply.text().starts_with(&status.to_string()));
}

/// An address that refuses connections.
async fn refusing() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
}

#[tokio::test]
async fn no_route_is_404_and_counted_under_none() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(
        upstream.address,
        "    hostnames: [other.example.com]\n",
    ));
    assert_reply(
        &get(proxy.address(), "/", &[]).await,
        404,
        "destination_not_found",
    );
    eventually("it is counted", || {
        proxy.metric(
            "serin_requests_total",
            &[("route", "_NONE"), ("backend", "_NONE"), ("code", "404")],
        ) == 1.0
    })
    .await;
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn no_endpoint_is_503() {
    let proxy = Proxy::start(
        "backends: [ { name: only, endpoints: [] } ]\nroutes: [ { name: all, backendRefs: [ { name: only } ] } ]\n",
    );
    assert_reply(
        &get(proxy.address(), "/", &[]).await,
        503,
        "destination_unavailable",
    );
}

#[tokio::test]
async fn a_refused_connection_is_502_and_tells_nothing_about_the_inside() {
    let refusing = refusing().await;
    let proxy = Proxy::start(&single(refusing, ""));
    let reply = get(proxy.address(), "/", &[]).await;
    assert_reply(&reply, 502, "connection_refused");
    assert!(!reply.text().contains(&refusing.port().to_string()));
    let labels = [
        ("route", "all"),
        ("backend", "only"),
        ("error", "connection_refused"),
    ];
    // It was tried once more.
    assert_eq!(proxy.metric("serin_upstream_errors_total", &labels), 2.0);
}

#[tokio::test]
async fn an_upstream_that_closes_or_babbles_is_502() {
    for (answer, token) in [
        (&b""[..], "connection_terminated"),
        (b"HTTP/1.1 200 OK\r\ncontent-", "connection_terminated"),
        (b"SSH-2.0-OpenSSH_9\r\n", "http_protocol_error"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
            "http_protocol_error",
        ),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
            "http_upgrade_failed",
        ),
    ] {
        let upstream = scripted(answer).await;
        let proxy = Proxy::start(&single(upstream, ""));
        assert_reply(&get(proxy.address(), "/", &[]).await, 502, token);
    }
}

#[tokio::test]
async fn a_slow_head_is_504_and_the_proxy_goes_on() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(
        upstream.address,
        "    timeouts: { backendRequest: 50ms }\n",
    ));
    let mut client = Client::connect(proxy.address()).await;
    assert_reply(
        &client.get("/hold", &[]).await,
        504,
        "http_response_timeout",
    );
    assert_eq!(client.get("/", &[]).await.text(), "one");
    assert_eq!(
        proxy.metric(
            "serin_upstream_errors_total",
            &[("error", "http_response_timeout")]
        ),
        1.0
    );
}

#[tokio::test]
async fn a_connection_that_does_not_stand_in_time_is_504() {
    // A full queue of a listener that never accepts: the next connection gets no answer at all.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket
        .bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into())
        .unwrap();
    socket.listen(0).unwrap();
    let full = socket.local_addr().unwrap().as_socket().unwrap();
    let _queued = std::net::TcpStream::connect(full).unwrap();
    let config = format!(
        "backends: [ {{ name: only, endpoints: ['{full}'], timeouts: {{ connect: 50ms }} }} ]
routes: [ {{ name: all, backendRefs: [ {{ name: only }} ] }} ]
"
    );
    let proxy = Proxy::start(&config);
    assert_reply(
        &get(proxy.address(), "/", &[]).await,
        504,
        "connection_timeout",
    );
}

#[tokio::test]
async fn the_request_timeout_ends_a_response_that_trickles() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = listener.local_addr().unwrap();
    let trickle = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        crate::support::upstream::read_head(&mut stream).await;
        let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n";
        tokio::io::AsyncWriteExt::write_all(&mut stream, head)
            .await
            .unwrap();
        // Ends when the proxy closes the connection.
        tokio::io::AsyncReadExt::read(&mut stream, &mut [0]).await
    });
    let proxy = Proxy::start(&single(upstream, "    timeouts: { request: 100ms }\n"));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let reply = raw.read_to_end().await;
    assert!(
        reply.starts_with("HTTP/1.1 200") && !reply.ends_with("0\r\n\r\n"),
        "a cut body must not look whole: {reply}"
    );
    trickle.await.unwrap().ok();
    eventually("it is counted", || {
        proxy.metric(
            "serin_upstream_errors_total",
            &[("error", "http_response_timeout")],
        ) == 1.0
    })
    .await;
}

#[tokio::test]
async fn a_body_that_breaks_off_is_not_passed_off_as_whole() {
    let upstream =
        scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nnot a hundred bytes").await;
    let proxy = Proxy::start(&single(upstream, ""));
    let mut client = Client::connect(proxy.address()).await;
    assert!(client.send(Method::GET, "/", &[], "").await.is_err());
    eventually("it is counted", || {
        proxy.metric(
            "serin_upstream_errors_total",
            &[("error", "http_response_incomplete")],
        ) == 1.0
    })
    .await;
}

#[tokio::test]
async fn a_long_upload_is_not_cut_off_by_the_timeout_for_the_response() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(
        upstream.address,
        "    timeouts: { backendRequest: 400ms }\n",
    ));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("POST /sink HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\n")
        .await;
    for _ in 0..8 {
        // Time is the very thing under test here: in all this takes twice the limit.
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        raw.send("x").await;
    }
    assert!(raw.read_until("\r\n").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn an_upload_that_stalls_is_the_clients_fault_and_not_the_versions() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(
        upstream.address,
        "    timeouts: { backendRequest: 100ms }\n",
    ));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("POST /sink HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\nhalf")
        .await;
    assert_eq!(
        raw.read_until("\r\n").await,
        "HTTP/1.1 408 Request Timeout\r\n"
    );
    assert_eq!(proxy.metric("serin_upstream_errors_total", &[]), 0.0);
}

#[tokio::test]
async fn requests_that_make_no_sense_are_400() {
    let upstream = Upstream::start("one").await;
    let gray =
        "    gray: { identity: [ { header: x-user-id } ], override: { header: x-canary } }\n";
    let proxy = Proxy::start(&single(upstream.address, gray));
    for request in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: user@a\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a, b\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a b\r\n\r\n",
        "GET http://a/ HTTP/1.1\r\nhost: b\r\n\r\n",
        "GET http://user@a/ HTTP/1.1\r\nhost: user@a\r\n\r\n",
        "GET http://a/ HTTP/1.1\r\n\r\n",
        "GET a HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET * HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a:http\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a:99999\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nx-user-id: 1\r\nx-user-id: 2\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nx-canary: 1\r\nX-Canary: 2\r\n\r\n",
    ] {
        let mut raw = Raw::connect(proxy.address()).await;
        raw.send(request).await;
        let status = raw.read_until("\r\n").await;
        assert_eq!(status, "HTTP/1.1 400 Bad Request\r\n", "{request:?}");
    }
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn transfer_codings_but_chunked_are_refused_both_ways() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n")
        .await;
    let status = raw.read_until("\r\n").await;
    assert_eq!(status, "HTTP/1.1 501 Not Implemented\r\n");
    assert_eq!(upstream.requests(), 0);
    let answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n";
    let proxy = Proxy::start(&single(scripted(answer).await, ""));
    let reply = get(proxy.address(), "/", &[]).await;
    assert_reply(&reply, 502, "http_response_transfer_coding");
}

#[tokio::test]
async fn options_for_the_whole_server_are_routed() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(raw.read_until("\r\n").await, "HTTP/1.1 200 OK\r\n");
    raw.read_until("one").await;
}

#[tokio::test]
async fn an_identity_that_cannot_be_read_is_400() {
    let upstream = Upstream::start("one").await;
    let gray = "    gray: { identity: [ { header: x-user-id } ] }\n";
    let proxy = Proxy::start(&single(upstream.address, gray));
    let mut raw = Raw::connect(proxy.address()).await;
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nx-user-id: bot\xff\r\n\r\n";
    tokio::io::AsyncWriteExt::write_all(&mut raw.stream, request)
        .await
        .unwrap();
    assert_eq!(raw.read_until("\r\n").await, "HTTP/1.1 400 Bad Request\r\n");
}

#[tokio::test]
async fn a_malformed_body_is_the_clients_fault() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("POST /hold HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n")
        .await;
    let reply = raw.read_to_end().await;
    assert!(reply.starts_with("HTTP/1.1 400"), "{reply}");
    assert_eq!(proxy.metric("serin_upstream_errors_total", &[]), 0.0);
}

#[tokio::test]
async fn methods_that_are_not_for_gateways_are_405() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    for method in [
        "TRACE / HTTP/1.1\r\nhost: a",
        "CONNECT a:443 HTTP/1.1\r\nhost: a:443",
    ] {
        let mut raw = Raw::connect(proxy.address()).await;
        raw.send(&format!("{method}\r\n\r\n")).await;
        assert_eq!(
            raw.read_until("\r\n").await,
            "HTTP/1.1 405 Method Not Allowed\r\n"
        );
    }
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn a_client_that_sends_no_request_is_let_go() {
    let upstream = Upstream::start("one").await;
    let listener =
        "listeners: [ { name: web, address: '127.0.0.1:0', timeouts: { idle: 100ms } } ]\n";
    let proxy = Proxy::start(&(listener.to_owned() + &single(upstream.address, "")));
    let mut silent = Raw::connect(proxy.address()).await;
    assert_eq!(silent.read_to_end().await, "");
    let mut slow = Raw::connect(proxy.address()).await;
    slow.send("GET / HTTP/1.1\r\nho").await;
    let reply = slow.read_to_end().await;
    assert!(
        reply.is_empty() || reply.starts_with("HTTP/1.1 408"),
        "{reply}"
    );
    assert_eq!(get(proxy.address(), "/", &[]).await.status, StatusCode::OK);
}

#[tokio::test]
async fn an_endpoint_that_refuses_an_upload_and_closes_is_heard() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            read_head(&mut stream).await;
            let refusal =
                b"HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
            // What it has not read makes of its end a reset.
            let _ = stream.write_all(refusal).await;
        }
    });
    let proxy = Proxy::start(&single(address, ""));
    for _ in 0..20 {
        let mut client = Client::h2c(proxy.address()).await;
        let reply = client
            .send(Method::POST, "/", &[], vec![0; 4_000_000])
            .await;
        assert_eq!(reply.unwrap().status, StatusCode::PAYLOAD_TOO_LARGE);
    }
    assert_eq!(proxy.metric("serin_request_failures_total", &[]), 0.0);
}

#[tokio::test]
async fn nobody_stalls_for_ever_be_it_behind_an_early_head_or_as_what_is_no_call() {
    let upstream = Upstream::start("one").await;
    let rest = "    timeouts: { tunnelIdle: 300ms }\n";
    let proxy = Proxy::start(&format!(
        "listenerDefaults: {{ timeouts: {{ requestBody: 300ms }} }}\n{}",
        single(upstream.address, rest)
    ));
    let mut early = Raw::connect(proxy.address()).await;
    early
        .send("POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhalf")
        .await;
    let reply = early.read_to_end().await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    let mut posing = Raw::connect(proxy.address()).await;
    posing
        .send("POST /sink HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc\r\ncontent-length: 10\r\n\r\nhalf")
        .await;
    let reply = posing.read_to_end().await;
    assert!(reply.starts_with("HTTP/1.1 408"), "{reply}");
    let waits = || proxy.metric("serin_requests_in_flight", &[("route", "all")]);
    eventually("nothing is left", || waits() == 0.0).await;
}

/// As over HTTP/2, where the stream would be reset instead of the connection.
#[tokio::test]
async fn a_client_that_is_refused_early_may_go_on_sending_for_a_while() {
    let upstream = Upstream::start("one").await;
    let limit = "    limits: { requestBody: 100 }\n";
    let proxy = Proxy::start(&single(upstream.address, limit));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("POST /sink HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n")
        .await;
    let head = raw.read_until("\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
    for _ in 0..50 {
        raw.stream.write_all(&[0; 10_000]).await.unwrap();
    }
    let mut rest = Vec::new();
    raw.stream.read_to_end(&mut rest).await.unwrap();
}
