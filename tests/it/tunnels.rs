//! Tunnels: WebSocket from clients of either version to endpoints of either version, and what must
//! not become one.

use std::net::SocketAddr;
use std::time::Duration;

use http::StatusCode;
use serin::app::Drained;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

use crate::support::upstream::read_head;
use crate::support::websocket::{by_connect, by_upgrade, http1, http2, send};
use crate::support::{Client, Proxy, Raw, Upstream, eventually, metric, single};

fn behind(upstream: SocketAddr, protocol: &str, route: &str) -> String {
    format!(
        "backends: [ {{ name: only, version: '1', endpoints: ['{upstream}'], protocol: {protocol} }} ]
routes:
  - name: all
    backendRefs: [ {{ name: only }} ]
{route}"
    )
}

fn tunnels(proxy: &Proxy) -> f64 {
    proxy.metric("serin_tunnels_active", &[("version", "1")])
}

/// A conversation, to its end.
async fn converse(mut socket: WebSocketStream<impl AsyncRead + AsyncWrite + Unpin>) {
    let large = vec![7; 1_000_000];
    for message in [
        Message::text("hello"),
        Message::binary(large),
        Message::text(""),
    ] {
        send(&mut socket, message.clone()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), message);
    }
    send(&mut socket, Message::Ping("are you there".into()))
        .await
        .unwrap();
    let pong = socket.next().await.unwrap().unwrap();
    assert_eq!(pong, Message::Pong("are you there".into()));
    let bye = CloseFrame {
        code: 4000.into(),
        reason: "bye".into(),
    };
    socket.close(Some(bye.clone())).await.unwrap();
    assert_eq!(
        socket.next().await.unwrap().unwrap(),
        Message::Close(Some(bye))
    );
}

#[tokio::test]
async fn clients_of_either_version_reach_services_of_either_version() {
    for (upstream, protocol) in [(http1().await, "http1"), (http2().await, "h2c")] {
        let proxy = Proxy::start(&behind(upstream, protocol, ""));
        converse(by_upgrade(proxy.address()).await).await;
        let mut client = Client::h2c(proxy.address()).await;
        // Two at once, on one connection.
        let one = by_connect(&mut client).await.unwrap();
        let other = by_connect(&mut client).await.unwrap();
        tokio::join!(converse(one), converse(other));
        eventually("they have ended", || tunnels(&proxy) == 0.0).await;
    }
}

#[tokio::test]
async fn tunnels_are_counted_per_version_and_their_life_is_no_latency() {
    let proxy = Proxy::start(&behind(http1().await, "http1", ""));
    let one = by_upgrade(proxy.address()).await;
    let mut client = Client::h2c(proxy.address()).await;
    let other = by_connect(&mut client).await.unwrap();
    assert_eq!(tunnels(&proxy), 2.0);
    let in_flight = proxy.metric("serin_requests_in_flight", &[("version", "1")]);
    assert_eq!(in_flight, 2.0);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    drop((one, other));
    eventually("they have ended", || tunnels(&proxy) == 0.0).await;
    for (code, protocol) in [("101", "http1"), ("200", "http2")] {
        let labels = [("code", code), ("protocol", protocol), ("version", "1")];
        assert_eq!(proxy.metric("serin_requests_total", &labels), 1.0, "{code}");
    }
    let fast = [("le", "1"), ("version", "1")];
    assert_eq!(
        proxy.metric("serin_request_duration_seconds_bucket", &fast),
        2.0
    );
}

#[tokio::test]
async fn a_tunnel_through_which_nothing_goes_is_closed_and_a_busy_one_is_not() {
    let limit = "    timeouts: { tunnelIdle: 400ms }\n";
    let proxy = Proxy::start(&behind(http1().await, "http1", limit));
    let mut busy = by_upgrade(proxy.address()).await;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        send(&mut busy, Message::text("still here")).await.unwrap();
        busy.next().await.unwrap().unwrap();
    }
    assert_eq!(tunnels(&proxy), 1.0);
    eventually("it is closed", || tunnels(&proxy) == 0.0).await;
    assert!(!matches!(busy.next().await, Some(Ok(_))));
}

/// In HTTP/2 the connection that carries a tunnel has no request, and is not idle all the same; nor is
/// the tunnel as slow as another stream of the connection.
#[tokio::test]
async fn a_connection_that_carries_a_tunnel_is_not_idle() {
    let listener = "listeners: [ { name: web, address: '127.0.0.1:0', timeouts: { idle: 200ms, write: 200ms, requestHead: 200ms } } ]\n";
    let proxy = Proxy::start(&(listener.to_owned() + &behind(http1().await, "http1", "")));
    let mut client = Client::h2c(proxy.address()).await;
    let mut upgraded = by_upgrade(proxy.address()).await;
    let mut tunnel = by_connect(&mut client).await.unwrap();
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        send(&mut tunnel, Message::text("still here"))
            .await
            .unwrap();
        assert!(tunnel.next().await.unwrap().unwrap().is_text());
        send(&mut upgraded, Message::text("still here"))
            .await
            .unwrap();
        assert!(upgraded.next().await.unwrap().unwrap().is_text());
    }
    drop((tunnel, upgraded));
    eventually("then it is idle", || {
        proxy.app().connections().iter().sum::<usize>() == 0
    })
    .await;
}

#[tokio::test]
async fn a_drain_waits_for_tunnels_and_cuts_them_off_at_its_limit() {
    let upstream = http1().await;
    let config = format!(
        "shutdown: {{ timeout: 1s, lameDuck: 0s }}\n{}",
        behind(upstream, "http1", "")
    );
    let proxy = Proxy::start(&config);
    let metrics = std::sync::Arc::clone(proxy.app().metrics());
    let mut one = by_upgrade(proxy.address()).await;
    let drain = tokio::spawn(proxy.shut_down());
    for _ in 0..5 {
        send(&mut one, Message::text("go on")).await.unwrap();
        one.next().await.unwrap().unwrap();
    }
    assert_eq!(drain.await.unwrap(), Drained::CutOff(1));
    assert!(!matches!(one.next().await, Some(Ok(_))));
    for (kind, count) in [("tunnel", 1.0), ("request", 0.0)] {
        let labels = [("kind", kind)];
        let cut_off = metric(&metrics.render(), "serin_drain_cut_off_total", &labels);
        assert_eq!(cut_off, count, "{kind}");
    }

    let proxy = Proxy::start(&behind(upstream, "http1", ""));
    let one = by_upgrade(proxy.address()).await;
    let drain = tokio::spawn(proxy.shut_down());
    drop(one);
    assert_eq!(drain.await.unwrap(), Drained::Clean);
}

#[tokio::test]
async fn an_endpoint_that_refuses_is_heard_and_the_connection_goes_on() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send(&ask("GET", "/status/403", "")).await;
    assert!(raw.read_until("\r\n\r\n").await.starts_with("HTTP/1.1 403"));
    raw.read_until("one").await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    raw.read_until("\r\n\r\none").await;
    // What an extended CONNECT would take for a tunnel is none.
    let mut client = Client::h2c(proxy.address()).await;
    let refused = by_connect(&mut client).await.unwrap_err();
    assert_eq!(refused, StatusCode::BAD_GATEWAY);
    assert_eq!(client.get("/", &[]).await.text(), "one");
}

#[tokio::test]
async fn an_endpoint_of_http_2_alone_that_takes_no_tunnels_is_a_bad_gateway() {
    let upstream = Upstream::h2c("one").await;
    let proxy = Proxy::start(&behind(upstream.address, "h2c", ""));
    let mut client = Client::h2c(proxy.address()).await;
    assert_eq!(
        by_connect(&mut client).await.unwrap_err(),
        StatusCode::BAD_GATEWAY
    );
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send(&ask("GET", "/", "")).await;
    assert!(raw.read_until("\r\n\r\n").await.starts_with("HTTP/1.1 502"));
    assert_eq!(client.get("/", &[]).await.text(), "one");
}

const KEY: &str = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n";

/// A request for a WebSocket with more headers.
fn ask(method: &str, path: &str, more: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n{KEY}{more}\r\n"
    )
}

/// What of the upgrade the upstream has seen.
fn seen(head: &str) -> Vec<&str> {
    let names = ["upgrade:", "connection:", "http2-settings:"];
    let is_of_it = |line: &&str| names.iter().any(|name| line.starts_with(name));
    head.lines().filter(is_of_it).collect()
}

#[tokio::test]
async fn nothing_but_a_whole_wish_for_a_websocket_is_passed_on() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    for request in [
        // RFC 9113 section 3.1: obsolete, and a way past a proxy.
        "GET /head HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n".to_owned(),
        "GET /head HTTP/1.1\r\nhost: a\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n".to_owned(),
        // Not for the next hop, says Connection.
        format!("GET /head HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\n{KEY}\r\n"),
        "GET /head HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: tls/1.0\r\n\r\n".to_owned(),
        "GET /head HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket, h2c\r\n\r\n".to_owned(),
        format!("GET /head HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\nupgrade: h2c\r\n{KEY}\r\n"),
        ask("POST", "/head", "content-length: 0\r\n"),
        ask("GET", "/head", "content-length: 3\r\n") + "abc",
    ] {
        let mut raw = Raw::connect(proxy.address()).await;
        raw.send(&request).await;
        let head = raw.read_until("\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200"), "{request}: {head}");
        let head = raw.read_until("x-forwarded-host: a").await;
        assert!(seen(&head).is_empty(), "{request}: {head}");
    }
}

#[tokio::test]
async fn bytes_that_come_before_the_endpoint_agrees_are_no_tunnel() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    // Raw, the second request would reach the endpoint without having been judged.
    let smuggled = "GET /head HTTP/1.1\r\nhost: a\r\nx-forwarded-for: 6.6.6.6\r\n\r\n";
    raw.send(&(ask("GET", "/", "") + smuggled)).await;
    raw.read_until("\r\n\r\none").await;
    let seen = raw.read_until("x-forwarded-host: a").await;
    assert!(seen.contains("x-forwarded-for: 127.0.0.1"), "{seen}");
    assert!(!seen.contains("6.6.6.6"), "{seen}");
}

#[tokio::test]
async fn an_endpoint_that_switches_to_something_else_is_a_bad_gateway() {
    for answer in [
        "upgrade: websocket\r\n",
        "upgrade: websocket\r\nsec-websocket-accept: d3Jvbmc=\r\n",
        "upgrade: h2c\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n",
        "sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n",
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::start(&single(listener.local_addr().unwrap(), ""));
        let mut raw = Raw::connect(proxy.address()).await;
        raw.send(&ask("GET", "/", "")).await;
        let (mut stream, _) = listener.accept().await.unwrap();
        let head = read_head(&mut stream).await;
        assert!(head.contains("upgrade: websocket"), "{head}");
        let head =
            format!("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n{answer}\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let reply = raw.read_until("\r\n\r\n").await;
        assert!(reply.starts_with("HTTP/1.1 502"), "{answer}: {reply}");
        assert_eq!(tunnels(&proxy), 0.0);
    }
}

#[tokio::test]
async fn events_of_a_server_arrive_as_they_are_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = Proxy::start(&single(listener.local_addr().unwrap(), ""));
    for mut client in [
        Client::connect(proxy.address()).await,
        Client::h2c(proxy.address()).await,
    ] {
        let request = http::Request::get("http://a/").header("host", "a");
        let request = request.body(http_body_util::BodyExt::boxed(http_body_util::Empty::new()));
        let response = tokio::spawn(async move {
            let response = client.request(request.unwrap()).await.unwrap();
            (response, client)
        });
        let (mut stream, _) = listener.accept().await.unwrap();
        read_head(&mut stream).await;
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let (mut response, _client) = response.await.unwrap();
        for number in 0..3 {
            // The next one is sent when this one has arrived.
            let event = format!("data: {number}\n\n");
            let chunk = format!("{:x}\r\n{event}\r\n", event.len());
            stream.write_all(chunk.as_bytes()).await.unwrap();
            let frame = http_body_util::BodyExt::frame(response.body_mut()).await;
            assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), event);
        }
    }
}
