//! Floods and slow clients: each is ended or bounded, others are served meanwhile, and memory comes back.
//!
//! Framing (request smuggling) is in `smuggling`, paths in `paths`, tunnels in `tunnels`, forged headers in
//! `headers`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;

use crate::cli::Running;
use crate::support::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, End, Frames, HEADERS, PING, RST_STREAM, SETTINGS,
    WINDOW_UPDATE, field, frame, get,
};
use crate::support::tls::Authority;
use crate::support::upstream::{read_head, serving};
use crate::support::{
    self, Client, PATIENCE, Proxy, Raw, Upstream, eventually, metric, shop, single, with_head,
};

const WHOLE: u8 = END_HEADERS | END_STREAM;

/// Of a client that stops reading.
const RECEIVE_BUFFER: usize = 4096;

/// What it reads before that, in bytes.
const READ_AT_FIRST: usize = 64 << 20;

/// Longer than the kernel pauses while there is something that it can send.
const REST: Duration = Duration::from_millis(500);

/// Why a connection ends whose client asks too much (RFC 9113 section 7).
const ENHANCE_YOUR_CALM: u32 = 11;

async fn start(listener: &str) -> (Proxy, Upstream) {
    let upstream = Upstream::start("one").await;
    let listener = format!("listeners: [ {{ name: web, address: '127.0.0.1:0'{listener} }} ]\n");
    let proxy = Proxy::start(&format!(
        "{listener}workers: 1\n{}",
        single(upstream.address, "")
    ));
    (proxy, upstream)
}

/// Others are served, and nothing of the flood is left.
async fn all_is_well(proxy: &Proxy) {
    assert_eq!(
        Client::h2c(proxy.address())
            .await
            .get("/", &[])
            .await
            .text(),
        "one"
    );
    assert_eq!(
        Client::connect(proxy.address())
            .await
            .get("/", &[])
            .await
            .text(),
        "one"
    );
    eventually("its connections are gone", || {
        let connections = proxy.app().connections().iter().sum::<usize>();
        connections == 0 && proxy.metric("serin_connections_active", &[]) == 0.0
    })
    .await;
    eventually("its requests are gone", || {
        proxy.metric("serin_requests_in_flight", &[("route", "all")]) == 0.0
    })
    .await;
}

/// Sends these frames over and over, and tells how the connection ends.
async fn floods(proxy: &Proxy, times: u32, mut bytes: impl FnMut(u32) -> Vec<u8>) -> End {
    let mut connection = Frames::connect(proxy.address()).await;
    for number in 0..times {
        if !connection.raw(&bytes(number)).await {
            break;
        }
    }
    connection.end_of(u32::MAX).await
}

fn is_ended(end: &End) -> bool {
    matches!(end, End::Connection(_))
}

/// Opens streams, each with this frame right behind its head; the connection ends before `most` of
/// 20,000 requests have gone through.
async fn resets(kind: u8, payload: [u8; 4], most: usize) {
    let (proxy, upstream) = start(", timeouts: { idle: 500ms }").await;
    let end = floods(&proxy, 20_000, |number| {
        let stream = number * 2 + 1;
        let head = frame(HEADERS, WHOLE, stream, &get("/hold"));
        [head, frame(kind, 0, stream, &payload)].concat()
    })
    .await;
    assert!(is_ended(&end), "{end:?}");
    let passed = upstream.requests();
    assert!(passed < most, "{passed} requests went through");
    all_is_well(&proxy).await;
}

/// CVE-2023-44487: streams opened and reset at once.
#[tokio::test]
async fn rapid_reset() {
    resets(RST_STREAM, [0, 0, 0, 8], 2_000).await;
}

/// CVE-2025-8671: the server is made to reset streams that it works on, since a window update of nothing
/// is an error of the stream.
#[tokio::test]
async fn made_you_reset() {
    resets(WINDOW_UPDATE, [0; 4], 5_000).await;
}

/// CVE-2024-27316: a head that never ends.
#[tokio::test]
async fn continuation_flood() {
    let (proxy, upstream) = start("").await;
    let end = floods(&proxy, 20_000, |number| match number {
        0 => frame(HEADERS, END_STREAM, 1, &get("/")),
        _ => frame(CONTINUATION, 0, 1, &field("x-more", &"x".repeat(100))),
    })
    .await;
    assert!(is_ended(&end), "{end:?}");
    assert_eq!(upstream.requests(), 0);
    all_is_well(&proxy).await;
}

/// A field in the table of 4 KiB, named by a byte over and over: a frame of 16 KiB is a head of 45 MiB.
///
/// The defence is h2's `max_header_list_size`, which is the listener's `limits.requestHead`: fields beyond it are
/// not kept, and beyond four times as much (h2's `MAX_HEADER_LIST_ABUSE_MULTIPLIER`) they are not even decoded.
#[tokio::test]
async fn hpack_bomb() {
    let (proxy, upstream) = start(", limits: { requestHead: 32Ki }").await;
    for (times, expected) in [
        (12, End::Answered),
        (12_000, End::Connection(Some(ENHANCE_YOUR_CALM))),
    ] {
        let mut connection = Frames::connect(proxy.address()).await;
        connection.send(HEADERS, WHOLE, 1, &bomb(times)).await;
        assert_eq!(connection.end_of(1).await, expected, "{times}");
    }
    assert_eq!(upstream.requests(), 0);
    all_is_well(&proxy).await;
    // What is within the limit is no bomb.
    let mut connection = Frames::connect(proxy.address()).await;
    let before = upstream.requests();
    connection.send(HEADERS, WHOLE, 1, &bomb(3)).await;
    assert_eq!(connection.end_of(1).await, End::Answered);
    assert_eq!(upstream.requests(), before + 1);
}

/// A head whose field of nearly 4 KiB comes once, and then so many times more by its index.
fn bomb(times: usize) -> Vec<u8> {
    // With indexing, so that it gets the first index of the dynamic table, 62.
    let value = "x".repeat(3900);
    let mut indexed = vec![0x40, 1, b'x', 0x7f];
    let rest = value.len() - 127;
    indexed.extend([(rest & 0x7f) as u8 | 0x80, (rest >> 7) as u8]);
    indexed.extend(value.as_bytes());
    [get("/"), indexed, vec![0x80 | 62; times]].concat()
}

/// Frames that cost the server an answer each, and are not read: what waits is bounded.
#[tokio::test]
async fn settings_and_ping_floods() {
    for kind in [SETTINGS, PING] {
        let (proxy, _upstream) = start(", timeouts: { write: 500ms, idle: 2s }").await;
        let payload: &[u8] = if kind == PING { &[0; 8] } else { &[] };
        let mut connection = Frames::connect(proxy.address()).await;
        let bytes = frame(kind, 0, 0, payload).repeat(1000);
        let before = resident_kib("self");
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut sent = 0;
        while Instant::now() < deadline && sent < 20_000 {
            let written = tokio::time::timeout(Duration::from_millis(200), connection.raw(&bytes));
            match written.await {
                Ok(true) => sent += 1000,
                // It reads no more, or has ended the connection.
                Ok(false) | Err(_) => break,
            }
        }
        let grown = resident_kib("self").saturating_sub(before);
        assert!(grown < 64 << 10, "{kind}: {grown} KiB for {sent} frames");
        assert_eq!(
            Client::h2c(proxy.address())
                .await
                .get("/", &[])
                .await
                .text(),
            "one"
        );
        drop(connection);
        all_is_well(&proxy).await;
    }
}

/// Frames without anything in them, which never end a request and each count as a sign of life.
///
/// The defence is a constant of h2, `MAX_RECV_EMPTY_DATA_FRAMES`: 100 on a connection, and at the next one it ends.
/// Without it the request would go on for as long as they come.
#[tokio::test]
async fn empty_data_flood() {
    let (proxy, upstream) = start("").await;
    for (frames, is_ended) in [(100, false), (101, true)] {
        let mut connection = Frames::connect(proxy.address()).await;
        connection
            .send(HEADERS, END_HEADERS, 1, &get("/sink"))
            .await;
        connection.raw(&frame(DATA, 0, 1, &[]).repeat(frames)).await;
        let expected = if is_ended {
            End::Connection(Some(ENHANCE_YOUR_CALM))
        } else {
            connection.send(DATA, END_STREAM, 1, b"the end").await;
            End::Answered
        };
        assert_eq!(connection.end_of(1).await, expected, "{frames}");
    }
    assert!(upstream.requests() >= 1);
    all_is_well(&proxy).await;
}

/// A head that comes byte by byte, and one that never comes.
#[tokio::test]
async fn slow_heads() {
    let (proxy, upstream) =
        start(", timeouts: { firstByte: 300ms, requestHead: 400ms, idle: 60s }").await;
    let mut silent = Raw::connect(proxy.address()).await;
    let mut slow = Raw::connect(proxy.address()).await;
    let begun = Instant::now();
    slow.send("GET / HTTP/1.1\r\nhost: a\r\n").await;
    while slow.stream.write_all(b"x: y\r\n").await.is_ok() {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "it may go on for ever"
        );
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(silent.read_to_end().await, "");
    // Also between two requests, and the second head.
    let mut second = Raw::connect(proxy.address()).await;
    second.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    second.read_until("one").await;
    second.send("GET /").await;
    let begun = Instant::now();
    assert_eq!(second.read_to_end().await, "");
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert_eq!(upstream.requests(), 1);
    all_is_well(&proxy).await;
}

/// A body that stops.
#[tokio::test]
async fn slow_bodies() {
    let upstream = Upstream::start("one").await;
    // Without the limit for the response, which would end it as well.
    let proxy = Proxy::start(&format!(
        "listenerDefaults: {{ timeouts: {{ requestBody: 300ms, idle: 600ms }} }}\n{}",
        single(
            upstream.address,
            "    timeouts: { backendRequest: 0s, tunnelIdle: 0s }\n"
        )
    ));
    let mut slow = Raw::connect(proxy.address()).await;
    slow.send("POST /sink HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhalf")
        .await;
    let reply = slow.read_to_end().await;
    assert!(reply.starts_with("HTTP/1.1 408"), "{reply}");
    let mut frames = Frames::connect(proxy.address()).await;
    frames.send(HEADERS, END_HEADERS, 1, &get("/sink")).await;
    assert_eq!(frames.end_of(1).await, End::Answered);
    drop(frames);
    all_is_well(&proxy).await;
}

/// Clients that ask for much and read nothing: what is held for each is bounded, and it is given up.
#[tokio::test]
async fn slow_readers() {
    let (proxy, _upstream) = start(", timeouts: { write: 500ms, idle: 1s }").await;
    let before = resident_kib("self");
    let mut clients = Vec::new();
    for _ in 0..50 {
        let mut raw = Raw::connect(proxy.address()).await;
        raw.send("GET /bytes/10000000 HTTP/1.1\r\nhost: a\r\n\r\n")
            .await;
        clients.push(raw);
        let mut frames = Frames::connect(proxy.address()).await;
        frames
            .send(HEADERS, WHOLE, 1, &get("/bytes/10000000"))
            .await;
        let _ = frames.next().await;
    }
    // The upstream of the test holds each body whole: 10 MB times the clients that it has not sent it to.
    let grown = resident_kib("self").saturating_sub(before);
    assert!(grown < 1_500_000, "{grown} KiB for 100 clients");
    all_is_well(&proxy).await;
    drop(clients);
}

/// What an endpoint sends for a client that does not read it is held by the kernel for the most part, and counts for the
/// whole machine (`net.ipv4.tcp_mem`).
#[tokio::test]
async fn the_kernel_holds_little_for_a_client_that_stops_reading() {
    let authority = Authority::new("tests");
    let config = authority.issue(&["127.0.0.1"]).server(&["http/1.1"], None);
    let acceptor = TlsAcceptor::from(Arc::new(config));
    // What is set, for what is received twice as much, and a segment or two.
    let (most_unsent, most_unread) = (192 << 10, 320 << 10);
    for (backend, acceptor) in [
        ("", None),
        (
            ", protocol: http1, tls: { caFile: ca.pem }",
            Some(&acceptor),
        ),
        (", protocol: auto, tls: { caFile: ca.pem }", Some(&acceptor)),
    ] {
        let (endless, _) = endless(acceptor.cloned()).await;
        let quick = Upstream::start("one").await;
        let config = two(endless, backend, quick.address);
        let proxy = Proxy::start_with(&config, |directory| {
            std::fs::write(directory.join("ca.pem"), &authority.pem).unwrap();
        });
        let held = held_for_who_stops_reading(&proxy, endless).await;
        let is_little = held.unsent <= most_unsent && held.unread <= most_unread;
        assert!(is_little, "{held:?} with `{backend}`");
    }
}

/// Less than the default is taken as it stands.
#[tokio::test]
async fn a_backend_says_what_the_kernel_holds_of_its_responses() {
    let (endless, _) = endless(None).await;
    let quick = Upstream::start("one").await;
    let small = ", http1: { receiveBuffer: 64Ki }";
    let proxy = Proxy::start(&two(endless, small, quick.address));
    let held = held_for_who_stops_reading(&proxy, endless).await;
    assert!(held.unread <= 192 << 10, "{held:?}");
}

/// An endpoint whose responses do not end.
async fn endless(acceptor: Option<TlsAcceptor>) -> (SocketAddr, Arc<AtomicUsize>) {
    serving(move |mut stream: TcpStream| {
        let acceptor = acceptor.clone();
        async move {
            match acceptor {
                None => send_endlessly(&mut stream).await,
                Some(acceptor) => {
                    send_endlessly(&mut acceptor.accept(stream).await.unwrap()).await;
                }
            }
        }
    })
    .await
}

/// Until nobody wants it any more.
async fn send_endlessly(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    read_head(stream).await;
    let head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n";
    stream.write_all(head).await.unwrap();
    while stream.write_all(&[b'x'; 16 << 10]).await.is_ok() {}
}

/// A backend that answers `/endless`, and one that answers all else.
fn two(endless: SocketAddr, more: &str, quick: SocketAddr) -> String {
    with_head(&format!(
        "backends:
  - {{ name: endless, endpoints: ['{endless}']{more} }}
  - {{ name: quick, endpoints: ['{quick}'] }}
routes:
  - {{ name: endless, matches: [ {{ path: {{ value: /endless }} }} ], backendRefs: [ {{ name: endless }} ] }}
  - {{ name: quick, backendRefs: [ {{ name: quick }} ] }}
"
    ))
}

/// What the kernel holds of one response, in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Held {
    /// On the connection to the client.
    unsent: usize,
    /// On the connection to the endpoint.
    unread: usize,
}

/// As soon as nothing more comes while everybody else is served.
async fn held_for_who_stops_reading(proxy: &Proxy, endless: SocketAddr) -> Held {
    let socket = TcpSocket::new_v4().unwrap();
    // Little of it gets as far as to the client.
    SockRef::from(&socket)
        .set_recv_buffer_size(RECEIVE_BUFFER)
        .unwrap();
    let mut stream = socket.connect(proxy.address()).await.unwrap();
    let client = stream.local_addr().unwrap();
    let request = b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n";
    stream.write_all(request).await.unwrap();
    // Meanwhile buffers that have no bound grow.
    stream
        .read_exact(&mut vec![0; READ_AT_FIRST])
        .await
        .unwrap();
    let held = || {
        Some(Held {
            unsent: queues_to(client)?.0,
            unread: queues_to(endless)?.1,
        })
    };
    let is_full = || held().is_some_and(|held| held.unsent > 0 && held.unread > 0);
    eventually("both are full", is_full).await;
    let mut others = Client::connect(proxy.address()).await;
    let mut before = None;
    while held() != before {
        before = held();
        for _ in 0..100 {
            assert_eq!(others.get("/", &[]).await.text(), "one");
        }
        sleep(REST).await;
    }
    before.unwrap()
}

/// The bytes that wait to be sent and those that wait to be read, at our end of the connection with this address.
fn queues_to(address: SocketAddr) -> Option<(usize, usize)> {
    let SocketAddr::V4(address) = address else {
        panic!("{address} is not in this table");
    };
    let bits = u32::from_ne_bytes(address.ip().octets());
    let peer = format!("{bits:08X}:{:04X}", address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let fields = table.lines().map(|line| line.split_whitespace().collect());
    let connection = fields
        .into_iter()
        .find(|fields: &Vec<_>| fields[2] == peer)?;
    let (unsent, unread) = connection[4].split_once(':')?;
    let bytes = |hex| usize::from_str_radix(hex, 16).unwrap();
    Some((bytes(unsent), bytes(unread)))
}

/// What a process holds in memory now, without the pages of its program.
fn resident_kib(process: impl std::fmt::Display) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("RssAnon:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A client that takes little, but goes on taking, is slow and no attack.
#[tokio::test]
async fn a_slow_but_steady_reader_is_served_to_the_end() {
    let (proxy, _upstream) = start(", timeouts: { write: 700ms }").await;
    let mut connection = Frames::connect(proxy.address()).await;
    let window = 4000_u32;
    let setting = [&[0, 4][..], &window.to_be_bytes()].concat();
    connection.send(SETTINGS, 0, 0, &setting).await;
    connection
        .send(HEADERS, WHOLE, 1, &get("/bytes/200000"))
        .await;
    let (mut received, mut taken) = (0, 0);
    let begun = Instant::now();
    while received < 200_000 {
        let frame = connection.next().await.expect("it goes on");
        assert_ne!(frame.kind, RST_STREAM, "after {received} bytes");
        if frame.kind != DATA {
            continue;
        }
        received += frame.payload.len();
        taken += u32::try_from(frame.payload.len()).unwrap();
        // Once the window is used up, or it would come to be used in ever smaller pieces.
        if taken >= window {
            sleep(Duration::from_millis(50)).await;
            for stream in [0, 1] {
                let update = taken.to_be_bytes();
                connection.send(WINDOW_UPDATE, 0, stream, &update).await;
            }
            taken = 0;
        }
    }
    assert!(
        begun.elapsed() > Duration::from_millis(1500),
        "longer than the limit"
    );
}

/// What all floods together have taken is given back when their connections have ended, and a second time as well,
/// when what leaks would add up. In a process of its own, so that nothing but the floods can be the cause, and with
/// the allocator of the program.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_returns_to_where_it_was() {
    /// What the allocator may keep for itself; a flood takes at least twice as much.
    const MARGIN_KIB: usize = 16 << 10;
    let upstream = Upstream::start("one").await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serin.yaml");
    let timeouts = "{ requestHead: 2s, requestBody: 2s, write: 2s, idle: 2s }";
    let listener =
        format!("listeners: [ {{ name: web, address: '127.0.0.1:0', timeouts: {timeouts} }} ]\n");
    let config = format!("{listener}workers: 1\n{}", single(upstream.address, ""));
    std::fs::write(&path, with_head(&config)).unwrap();
    let mut running = Running::start(&path);
    let admin = Running::address(&running.wait_for("serin is up"), "admin=");
    let web = Running::address(&running.wait_for(" listening "), "address=");
    let process = running.child.id();

    // What it needs to serve at all is there before: threads, pools, the handles of metrics.
    flood(web, 1).await;
    is_left_alone(admin).await;
    let before = resident_kib(process);
    for round in 1..=2 {
        let busiest = flood_and_watch(web, 30, process).await;
        assert!(
            busiest > before + 2 * MARGIN_KIB,
            "no flood worth the name: {before} KiB, then {busiest} KiB"
        );
        is_left_alone(admin).await;
        // jemalloc gives pages back in the background, some ten seconds after they were last used.
        let what = format!("from {busiest} KiB in round {round} to {before} KiB, as before");
        eventually(&what, || resident_kib(process) <= before + MARGIN_KIB).await;
    }
}

/// Waits until no client is connected and no request under way.
async fn is_left_alone(admin: SocketAddr) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let exposition = support::get(admin, "/metrics", &[]).await;
        let left = ["serin_connections_active", "serin_requests_in_flight"]
            .map(|name| metric(exposition.text(), name, &[]));
        if left == [0.0, 0.0] {
            return;
        }
        assert!(Instant::now() < deadline, "{left:?} are left");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Every kind of flood at once, and the most memory that the process has held meanwhile.
async fn flood_and_watch(web: SocketAddr, times: usize, process: u32) -> usize {
    let flood = tokio::spawn(async move { flood(web, times).await });
    let mut busiest = 0;
    while !flood.is_finished() {
        busiest = busiest.max(resident_kib(process));
        sleep(Duration::from_millis(10)).await;
    }
    flood.await.unwrap();
    busiest
}

/// So many connections of every kind, all open at once until each has been ended by the other side, or has had all
/// that it can.
async fn flood(web: SocketAddr, times: usize) {
    let mut floods = tokio::task::JoinSet::new();
    for _ in 0..times {
        floods.spawn(async move {
            let mut resets = Frames::connect(web).await;
            for number in 0..1000 {
                let stream = number * 2 + 1;
                let head = frame(HEADERS, WHOLE, stream, &get("/hold"));
                let reset = frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]);
                if !resets.raw(&[head, reset].concat()).await {
                    break;
                }
            }
            resets.end_of(u32::MAX).await;
        });
        floods.spawn(async move {
            let mut continued = Frames::connect(web).await;
            continued.send(HEADERS, END_STREAM, 1, &get("/")).await;
            let more = field("x-more", &"x".repeat(100)).repeat(100);
            for _ in 0..1000 {
                if !continued.raw(&frame(CONTINUATION, 0, 1, &more)).await {
                    break;
                }
            }
            continued.end_of(u32::MAX).await;
        });
        floods.spawn(async move {
            let mut bombs = Frames::connect(web).await;
            for number in 0..100 {
                bombs.send(HEADERS, WHOLE, number * 2 + 1, &bomb(12)).await;
            }
            bombs.send(HEADERS, WHOLE, 201, &bomb(12_000)).await;
            bombs.end_of(u32::MAX).await;
        });
        floods.spawn(async move {
            let mut slow = Raw::connect(web).await;
            slow.send("GET /bytes/3000000 HTTP/1.1\r\nhost: a\r\n\r\n")
                .await;
            // Whoever reads nothing is cut off, which only a read finds out; so this is the longest that it takes.
            sleep(Duration::from_secs(3)).await;
            slow.read_to_end().await;
        });
        floods.spawn(async move {
            let mut slow = Frames::connect(web).await;
            for number in 0..20 {
                let bytes = get("/bytes/3000000");
                slow.send(HEADERS, WHOLE, number * 2 + 1, &bytes).await;
            }
            sleep(Duration::from_secs(3)).await;
            slow.end_of(u32::MAX).await;
        });
        floods.spawn(async move {
            let mut half = Raw::connect(web).await;
            let long = "x".repeat(30_000);
            half.send(&format!("GET / HTTP/1.1\r\nhost: a\r\nx: {long}"))
                .await;
            half.read_to_end().await;
        });
    }
    while let Some(flood) = floods.join_next().await {
        flood.unwrap();
    }
}

/// More cookies than a head may hold: who would cut them off and go on would decide by half of them.
#[tokio::test]
async fn cookies_beyond_the_limits_are_refused_and_none_is_acted_upon_over_http_1() {
    let (proxy, upstream) = start_gray().await;
    let many: String = (0..100).map(|n| format!("cookie: a{n}=1\r\n")).collect();
    let large = format!("cookie: a={}\r\n", "x".repeat(33 << 10));
    let pairs: String = (0..5000).map(|n| format!("; a{n}=1")).collect();
    let long = format!("cookie: canary=2{pairs}\r\n");
    for cookies in [many, large, long] {
        let mut raw = Raw::connect(proxy.address()).await;
        raw.send(&format!(
            "GET /head HTTP/1.1\r\nhost: a\r\ncookie: uid=ann; canary=2\r\n{cookies}\r\n"
        ))
        .await;
        let head = raw.read_until("\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 431 "), "{head}");
        assert!(!head.contains("set-cookie"), "{head}");
    }
    nothing_was_decided(&proxy, &upstream);
    // Up to the limit all are seen, also the last.
    let most: String = (0..98).map(|n| format!("cookie: a{n}=1\r\n")).collect();
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send(&format!(
        "GET /head HTTP/1.1\r\nhost: a\r\n{most}cookie: canary=2\r\n\r\n"
    ))
    .await;
    raw.read_until("; a97=1; canary=2").await;
    assert_eq!(decisions(&proxy, "override"), 1.0);
}

/// As over HTTP/1; but as each cookie may have a field of its own (RFC 9113 section 8.2.3), only how
/// large they are is limited, and not how many.
#[tokio::test]
async fn cookies_beyond_the_limits_are_refused_and_none_is_acted_upon_over_http_2() {
    let (proxy, upstream) = start_gray().await;
    let large = "a=".to_owned() + &"x".repeat(3000);
    let own = [("cookie", "uid=ann"), ("cookie", "canary=2")];
    let cookies = vec![("cookie", large.as_str()); 12];
    let mut client = Client::h2c(proxy.address()).await;
    let reply = client.get("/head", &[&own[..], &cookies].concat()).await;
    assert_eq!(reply.status.as_u16(), 431);
    assert_eq!(reply.header("set-cookie"), None);
    nothing_was_decided(&proxy, &upstream);
    let mut client = Client::h2c(proxy.address()).await;
    let most = vec![("cookie", "a=1"); 90];
    let reply = client.get("/head", &[&most[..], &own].concat()).await;
    assert!(
        reply.text().contains("a=1; uid=ann; canary=2"),
        "{}",
        reply.text()
    );
    assert_eq!(decisions(&proxy, "override"), 1.0);
}

/// A proxy that decides by cookies, and gives one to strangers.
async fn start_gray() -> (Proxy, Upstream) {
    let upstream = Upstream::start("one").await;
    let gray = "    gray: { identity: [ { cookie: uid } ], override: { cookie: canary }, withoutIdentity: cookie }\n";
    let proxy = Proxy::start(&shop(upstream.address, upstream.address, (1, 0), gray));
    (proxy, upstream)
}

fn decisions(proxy: &Proxy, reason: &str) -> f64 {
    proxy.metric("serin_routing_decisions_total", &[("reason", reason)])
}

fn nothing_was_decided(proxy: &Proxy, upstream: &Upstream) {
    assert_eq!(proxy.metric("serin_routing_decisions_total", &[]), 0.0);
    assert_eq!(upstream.requests(), 0);
}
