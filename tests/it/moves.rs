//! Long-lived streams when a change of weights gives their users another version.

use std::net::SocketAddr;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tonic::{Code, Request};

use crate::support::grpc::{Caller, Service, note};
use crate::support::upstream::{read_head, serving};
use crate::support::websocket::{by_upgrade, by_upgrade_to, http1, send};
use crate::support::{Proxy, Raw, eventually, shop};

/// Sends one event, and then nothing more.
async fn events() -> SocketAddr {
    let serve = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        let _ = stream.write_all(head.as_bytes()).await;
        let _ = stream.write_all(b"9\r\ndata: 1\n\n\r\n").await;
        std::future::pending::<()>().await;
    };
    serving(serve).await.0
}

fn config(stable: SocketAddr, canary: SocketAddr, weights: (u32, u32), streams: &str) -> String {
    let rest = format!(
        "    gray: {{ identity: [ {{ header: x-user-id }} ] }}\n    streams: {{ {streams} }}\n"
    );
    shop(stable, canary, weights, &rest)
}

/// As `config`, on one worker, with a route for the host `witness` beside it: once its streams end, the
/// worker has looked at all others as well.
fn witnessed(
    (stable, canary): (SocketAddr, SocketAddr),
    (weights, streams): ((u32, u32), &str),
    (of_witness, streams_of_witness): ((u32, u32), &str),
) -> String {
    let (one, other) = of_witness;
    let config = config(stable, canary, weights, streams);
    format!(
        "workers: 1
{config}  - name: witness
    hostnames: [ witness ]
    backendRefs: [ {{ name: shop-stable, weight: {one} }}, {{ name: shop-canary, weight: {other} }} ]
    streams: {{ {streams_of_witness} }}
"
    )
}

async fn ends(socket: &mut WebSocketStream<TcpStream>) {
    assert!(!matches!(socket.next().await, Some(Ok(_))));
}

async fn echoes(socket: &mut WebSocketStream<TcpStream>) {
    send(socket, Message::text("hello")).await.unwrap();
    assert!(socket.next().await.unwrap().is_ok());
}

fn moved(proxy: &Proxy) -> f64 {
    let labels = [("route", "shop"), ("backend", "shop-canary")];
    proxy.metric("serin_streams_moved_total", &labels)
}

async fn listen(proxy: &Proxy, user: &str) -> Raw {
    let mut raw = Raw::connect(proxy.address()).await;
    let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{user}\r\n");
    raw.send(&request).await;
    raw.read_until("data: 1\n\n").await;
    raw
}

#[tokio::test]
async fn events_end_for_those_who_have_moved_and_for_nobody_else() {
    for streams in ["whenMoved: cut", "whenMoved: drain, deadline: 20ms"] {
        let (stable, canary) = (events().await, events().await);
        let of = |weights| config(stable, canary, weights, streams);
        let proxy = Proxy::start(&of((0, 1)));
        let mut known = listen(&proxy, "x-user-id: user-1\r\n").await;
        let mut stranger = listen(&proxy, "").await;
        proxy.replace(&of((1, 1_000_000))).await;
        assert_eq!(moved(&proxy), 0.0);
        proxy.replace(&of((1, 0))).await;
        // As an end, which browsers answer with another request.
        known.read_until("0\r\n\r\n").await;
        stranger.read_until("0\r\n\r\n").await;
        assert_eq!(moved(&proxy), 2.0);
        let failures = [("backend", "shop-canary")];
        assert_eq!(proxy.metric("serin_request_failures_total", &failures), 0.0);
        assert_eq!(proxy.metric("serin_requests_in_flight", &failures), 0.0);
    }
}

#[tokio::test]
async fn who_is_moved_back_in_time_may_stay() {
    let services = (http1().await, http1().await);
    let drain = "whenMoved: drain, deadline: 3s";
    let of = |weights, of_witness| witnessed(services, (weights, drain), (of_witness, drain));
    let proxy = Proxy::start(&of((0, 1), (0, 1)));
    let mut known = by_upgrade(proxy.address()).await;
    let mut witness = by_upgrade_to(proxy.address(), "witness").await;
    proxy.replace(&of((1, 0), (1, 0))).await;
    proxy.replace(&of((0, 1), (1, 0))).await;
    // It had the same deadline, by the first change.
    ends(&mut witness).await;
    echoes(&mut known).await;
    assert_eq!(moved(&proxy), 0.0);
    proxy.replace(&of((1, 0), (1, 0))).await;
    ends(&mut known).await;
    assert_eq!(moved(&proxy), 1.0);
}

#[tokio::test]
async fn a_stream_that_begins_when_its_user_has_been_moved_ends_as_well() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let canary = listener.local_addr().unwrap();
    let of = |weights| config(canary, canary, weights, "whenMoved: cut");
    let proxy = Proxy::start(&of((0, 1)));
    let mut raw = Raw::connect(proxy.address()).await;
    let key = "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let upgrade = "connection: upgrade\r\nupgrade: websocket\r\n";
    raw.send(&format!("GET / HTTP/1.1\r\nhost: a\r\n{upgrade}{key}\r\n"))
        .await;
    let (mut stream, _) = listener.accept().await.unwrap();
    read_head(&mut stream).await;
    proxy.replace(&of((1, 0))).await;
    let accept = "sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";
    let head = format!("HTTP/1.1 101 Switching Protocols\r\n{upgrade}{accept}\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let head = raw.read_until("\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert_eq!(raw.read_to_end().await, "");
    assert_eq!(moved(&proxy), 1.0);
}

#[tokio::test]
async fn a_stream_outlives_its_route_but_not_its_backend() {
    let services = (http1().await, http1().await);
    let cut = "whenMoved: cut";
    let of = |of_witness| witnessed(services, ((0, 1), cut), (of_witness, cut));
    let renamed = |config: String| config.replace("- name: shop\n", "- name: store\n");
    let proxy = Proxy::start(&of((0, 1)));
    let mut socket = by_upgrade(proxy.address()).await;
    let mut witness = by_upgrade_to(proxy.address(), "witness").await;
    proxy.replace(&renamed(of((1, 0)))).await;
    ends(&mut witness).await;
    echoes(&mut socket).await;
    assert_eq!(moved(&proxy), 0.0);
    let disabled = renamed(of((1, 0))).replace("version: '2',", "version: '2', disabled: true,");
    proxy.replace(&disabled).await;
    ends(&mut socket).await;
    assert_eq!(moved(&proxy), 1.0);
}

#[tokio::test]
async fn tunnels_and_calls_end_too_and_callers_are_told_to_try_again() {
    let service = Service::start("canary").await;
    let h2c = |config: String| config.replace("version: '2',", "version: '2', protocol: h2c,");
    let of = |weights| {
        let cut = "whenMoved: cut";
        h2c(config(service.address, service.address, weights, cut))
    };
    let proxy = Proxy::start(&of((0, 1)));
    let caller = Caller::connect(proxy.address()).await;
    let one = tokio_stream::once(note("", 0));
    let response = caller.stream("HangLate", Request::new(one)).await.unwrap();
    let mut notes = response.into_inner();
    assert_eq!(notes.message().await.unwrap().unwrap().text, "first");
    proxy.replace(&of((1, 0))).await;
    let ended = notes.message().await.unwrap_err();
    assert_eq!(ended.code(), Code::Unavailable);
    eventually("it is taken back", || service.hanging() == 0).await;
    let failures = [("backend", "shop-canary")];
    assert_eq!(proxy.metric("serin_request_failures_total", &failures), 0.0);

    let (stable, canary) = (http1().await, http1().await);
    let of = |weights| config(stable, canary, weights, "whenMoved: cut");
    let proxy = Proxy::start(&of((0, 1)));
    let mut socket = by_upgrade(proxy.address()).await;
    send(&mut socket, Message::text("hello")).await.unwrap();
    assert!(socket.next().await.unwrap().is_ok());
    let disabled = of((0, 1)).replace("version: '2',", "version: '2', disabled: true,");
    proxy.replace(&disabled).await;
    assert!(!matches!(socket.next().await, Some(Ok(_))));
    assert_eq!(moved(&proxy), 1.0);
}

#[tokio::test]
async fn pinned_streams_stay() {
    let services = (http1().await, http1().await);
    let of = |weights| {
        witnessed(
            services,
            (weights, "whenMoved: pin"),
            (weights, "whenMoved: cut"),
        )
    };
    let proxy = Proxy::start(&of((0, 1)));
    let mut socket = by_upgrade(proxy.address()).await;
    let mut witness = by_upgrade_to(proxy.address(), "witness").await;
    proxy.replace(&of((1, 0))).await;
    ends(&mut witness).await;
    echoes(&mut socket).await;
    assert_eq!(moved(&proxy), 0.0);
}
