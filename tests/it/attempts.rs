//! Requests that are sent again: the places they hold, the bodies they bring along, and the time they
//! have.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Method, StatusCode};
use serin::backend::Impediment;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::resilience::{ALL, canary, hanging, send};
use crate::support::upstream::{read_head, serving};
use crate::support::{Client, Proxy, Raw, Upstream, eventually, shop, single};

/// Those who wait for room at a version that is taken out meanwhile have the baseline to go to, whatever
/// their method: none of them was sent to anybody.
#[tokio::test]
async fn who_waits_for_a_canary_that_is_ejected_gets_the_baseline() {
    let stable = Upstream::start("stable").await;
    let own = "version: '2', limits: { inFlight: 1, queueTimeout: 100h },";
    let config = shop(stable.address, hanging().await, ALL, "").replace("version: '2',", own);
    let proxy = Proxy::start(&config);
    let snapshot = proxy.app().live().load();
    let canary = &snapshot.backends[1];
    let taken = canary.gate.try_enter().unwrap();
    let writing = (0..8).map(|_| send(&proxy, Method::POST, "/"));
    let (replies, ()) = tokio::join!(futures_util::future::join_all(writing), async {
        eventually("all wait", || canary.gate.waiting() == 8).await;
        canary.endpoints[0].impede(Impediment::Ejected);
        drop(taken);
    });
    for reply in replies {
        assert_eq!((reply.status, reply.text()), (StatusCode::OK, "stable"));
    }
    assert_eq!((canary.gate.inside(), canary.gate.waiting()), (0, 0));
}

/// With one place for two endpoints that fail: a second place would never become free.
#[tokio::test]
async fn a_repetition_goes_on_with_the_place_that_it_has() {
    let sorry = |mut stream: TcpStream| async move {
        while !read_head(&mut stream).await.is_empty() {
            let answer = b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n";
            let _ = stream.write_all(answer).await;
        }
    };
    let ((one, _), (other, _)) = (serving(sorry).await, serving(sorry).await);
    let both = format!("'{one}', '{other}'");
    let own = "version: '1', outlierDetection: { disabled: true }, \
               limits: { inFlight: 1, queueTimeout: 100h },";
    let rest = "    retry: { budgetPercent: 100, backoff: 1ms }\n";
    let config = single(one, rest)
        .replace(&format!("'{one}'"), &both)
        .replace("version: '1',", own);
    let proxy = Proxy::start(&config);
    let asked = (0..10).map(|_| send(&proxy, Method::GET, "/"));
    for reply in futures_util::future::join_all(asked).await {
        assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(reply.header("proxy-status"), None, "it is the endpoint's");
    }
    let sent = [("result", "sent")];
    assert_eq!(proxy.metric("serin_retries_total", &sent), 10.0);
    assert_eq!(proxy.metric("serin_backend_overflows_total", &[]), 0.0);
    let snapshot = proxy.app().live().load();
    assert_eq!(snapshot.backends[0].gate.inside(), 0);
    let endpoints = snapshot.backends[0].endpoints.iter();
    assert_eq!(endpoints.map(|one| one.in_flight()).sum::<usize>(), 0);
}

#[tokio::test]
async fn nobody_waits_for_room_beyond_the_end_of_the_request() {
    let upstream = Upstream::start("one").await;
    let own = "version: '1', limits: { inFlight: 1, queueTimeout: 100h },";
    let rest = "    timeouts: { request: 100ms }\n";
    let config = single(upstream.address, rest).replace("version: '1',", own);
    let proxy = Proxy::start(&config);
    let snapshot = proxy.app().live().load();
    let _taken = snapshot.backends[0].gate.try_enter().unwrap();
    let reply = send(&proxy, Method::GET, "/").await;
    assert_eq!(reply.status, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(proxy.metric("serin_backend_overflows_total", &[]), 0.0);
}

#[tokio::test]
async fn more_room_is_for_those_who_wait_already() {
    let upstream = Upstream::start("one").await;
    let limits = |most: u32| {
        let own = format!("version: '1', limits: {{ inFlight: {most}, queueTimeout: 100h }},");
        single(upstream.address, "").replace("version: '1',", &own)
    };
    let proxy = Proxy::start(&limits(1));
    let mut first = Raw::connect(proxy.address()).await;
    first.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("it is there", || upstream.held() == 1).await;
    let mut second = Raw::connect(proxy.address()).await;
    second.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let waiting = || proxy.app().live().load().backends[0].gate.waiting();
    eventually("it waits", || waiting() == 1).await;
    proxy.replace(&limits(2)).await;
    assert!(second.read_until("one").await.starts_with("HTTP/1.1 200"));
    upstream.release();
}

/// Callers set their deadlines themselves: with tiny ones they must not be able to have endpoints taken
/// out.
#[tokio::test]
async fn a_deadline_of_the_callers_own_says_nothing_of_an_endpoint_that_had_no_time() {
    let stable = Upstream::start("stable").await;
    let own = "version: '2', outlierDetection: { consecutiveFailures: 1 },";
    let config = shop(stable.address, hanging().await, ALL, "").replace("version: '2',", own);
    let proxy = Proxy::start(&config);
    let mut client = Client::h2c(proxy.address()).await;
    let mut call = async |deadline| {
        let fields = [
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            ("grpc-timeout", deadline),
        ];
        let reply = client.send(Method::POST, "/a.B/C", &fields, "").await;
        let status = reply.unwrap().header("grpc-status").map(str::to_owned);
        assert_eq!(status.as_deref(), Some("4"), "DEADLINE_EXCEEDED");
    };
    for _ in 0..5 {
        call("1m").await;
    }
    // Still with the canary, which has had its time now.
    call("1S").await;
    eventually("it is ejected", || {
        canary(&proxy, "serin_ejections_total", &[]) == 1.0
    })
    .await;
    assert_eq!(stable.requests(), 0);
}

/// What `hasty` has read when nothing more comes.
const ALL_READ: usize = usize::MAX;

/// Answers 503 as soon as it has the head of a request, and goes on reading, as many servers do; says
/// how much it has read.
async fn hasty() -> (SocketAddr, Arc<AtomicUsize>) {
    let read = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&read);
    let serve = move |mut stream: TcpStream| {
        let read = Arc::clone(&counted);
        async move {
            read_head(&mut stream).await;
            let answer = b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n";
            let _ = stream.write_all(answer).await;
            let mut part = vec![0; 4096];
            while let Ok(bytes @ 1..) = stream.read(&mut part).await {
                read.fetch_add(bytes, Ordering::SeqCst);
            }
            read.store(ALL_READ, Ordering::SeqCst);
        }
    };
    (serving(serve).await.0, read)
}

#[tokio::test]
async fn an_upload_that_the_canary_refuses_early_goes_to_the_baseline() {
    let stable = Upstream::start("stable").await;
    let (hasty, _) = hasty().await;
    let proxy = Proxy::start(&shop(stable.address, hasty, ALL, ""));
    let mut client = Raw::connect(proxy.address()).await;
    client
        .send("PUT /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nfirst")
        .await;
    eventually("the baseline has it", || stable.requests() == 1).await;
    client.send("-last").await;
    let reply = client.read_until("first-last").await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    assert_eq!(proxy.metric("serin_upstream_errors_total", &[]), 0.0);
}

/// A hasty canary, everybody's, and a baseline that takes one request at a time.
async fn before_one_place() -> (Upstream, Arc<AtomicUsize>, Proxy) {
    let stable = Upstream::start("stable").await;
    let (hasty, read) = hasty().await;
    let own = "version: '1', limits: { inFlight: 1, queueTimeout: 100h },";
    let config = shop(stable.address, hasty, ALL, "").replace("version: '1',", own);
    (stable, read, Proxy::start(&config))
}

/// While it waits for room at the baseline, more of the body is sent to the canary than is kept: what is
/// left must not pass for the whole.
#[tokio::test]
async fn an_upload_of_which_too_much_was_sent_is_not_sent_again() {
    let (stable, read, proxy) = before_one_place().await;
    let snapshot = proxy.app().live().load();
    let gate = &snapshot.backends[0].gate;
    let taken = gate.try_enter().unwrap();
    let mut client = Raw::connect(proxy.address()).await;
    client
        .send("PUT /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n")
        .await;
    eventually("it waits for the baseline", || gate.waiting() == 1).await;
    client.send(&"x".repeat(100_000)).await;
    eventually("much was sent", || read.load(Ordering::SeqCst) == 100_000).await;
    drop(taken);
    let reply = client.read_until("\r\n\r\n").await;
    assert!(reply.starts_with("HTTP/1.1 503"), "{reply}");
    assert_eq!((stable.requests(), gate.inside()), (0, 0));
}

/// A body that is no body breaks off, and must not pass for one that ends.
#[tokio::test]
async fn an_upload_that_its_client_breaks_is_not_sent_again() {
    let (stable, read, proxy) = before_one_place().await;
    let snapshot = proxy.app().live().load();
    let gate = &snapshot.backends[0].gate;
    let taken = gate.try_enter().unwrap();
    let mut client = Raw::connect(proxy.address()).await;
    let head = "PUT /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    client.send(&format!("{head}5\r\nfirst\r\n")).await;
    eventually("it waits for the baseline", || gate.waiting() == 1).await;
    client.send("no chunk\r\n").await;
    eventually("the canary is told", || {
        read.load(Ordering::SeqCst) == ALL_READ
    })
    .await;
    drop(taken);
    let reply = client.read_to_end().await;
    assert!(reply.starts_with("HTTP/1.1 503"), "{reply}");
    assert_eq!((stable.requests(), gate.inside()), (0, 0));
}

/// Whatever is left of it: each refusal costs every request an attempt.
#[tokio::test]
async fn an_endpoint_that_refuses_everything_is_ejected() {
    let refuse = |stream: TcpStream| async move {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            respond.send_reset(h2::Reason::REFUSED_STREAM);
        }
    };
    let stable = Upstream::start("stable").await;
    let (refuse, _) = serving(refuse).await;
    let own = "version: '2', protocol: h2c,";
    let config = shop(stable.address, refuse, ALL, "").replace("version: '2',", own);
    let proxy = Proxy::start(&config);
    for _ in 0..5 {
        assert_eq!(send(&proxy, Method::POST, "/").await.text(), "stable");
    }
    eventually("it is ejected", || {
        canary(&proxy, "serin_ejections_total", &[]) == 1.0
    })
    .await;
}

#[tokio::test]
async fn who_finds_no_connection_is_counted() {
    let stable = Upstream::start("stable").await;
    let canary_upstream = Upstream::start("canary").await;
    let own = "version: '2', limits: { connections: 1, queueTimeout: 100ms },";
    let config =
        shop(stable.address, canary_upstream.address, ALL, "").replace("version: '2',", own);
    let proxy = Proxy::start(&format!("workers: 1\n{config}"));
    let mut first = Raw::connect(proxy.address()).await;
    first.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("it is there", || canary_upstream.held() == 1).await;
    assert_eq!(send(&proxy, Method::GET, "/").await.text(), "stable");
    let overflows = [("cause", "no_connection")];
    assert_eq!(
        canary(&proxy, "serin_backend_overflows_total", &overflows),
        1.0
    );
    canary_upstream.release();
}

/// Answers requests but those for `/panic`, which end the connection, as a panic does in some servers.
async fn panicking() -> SocketAddr {
    let serve = |mut stream: TcpStream| async move {
        loop {
            let head = read_head(&mut stream).await;
            if head.is_empty() || head.starts_with("GET /panic") {
                break;
            }
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
            let _ = stream.write_all(answer).await;
        }
    };
    serving(serve).await.0
}

/// On a connection that was idle that says nothing; on the fresh one that is tried next it does.
#[tokio::test]
async fn a_canary_that_closes_connections_instead_of_answering_is_ejected() {
    let stable = Upstream::start("stable").await;
    let own = "version: '2', outlierDetection: { consecutiveFailures: 1 },";
    let config = shop(stable.address, panicking().await, ALL, "").replace("version: '2',", own);
    let proxy = Proxy::start(&format!("workers: 1\n{config}"));
    let asked = (0..8).map(|_| send(&proxy, Method::GET, "/"));
    for reply in futures_util::future::join_all(asked).await {
        assert_eq!(reply.text(), "");
    }
    // There are idle ones left, but the second attempt takes none of them.
    assert_eq!(send(&proxy, Method::GET, "/panic").await.text(), "stable");
    eventually("it is ejected", || {
        canary(&proxy, "serin_ejections_total", &[]) == 1.0
    })
    .await;
}

/// They were closed together, as idle ones are; their requests need no budget to go elsewhere.
#[tokio::test]
async fn requests_on_connections_that_close_together_all_survive() {
    let once = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfine";
        let _ = stream.write_all(answer).await;
        // And closes when the next request is here.
        read_head(&mut stream).await;
    };
    let (once, accepted) = serving(once).await;
    let rest = "    retry: { budgetPercent: 0 }\n";
    let proxy = Proxy::start(&format!("workers: 1\n{}", single(once, rest)));
    for connections in [10, 20] {
        let asked = (0..10).map(|_| send(&proxy, Method::GET, "/"));
        for reply in futures_util::future::join_all(asked).await {
            assert_eq!(reply.text(), "fine");
        }
        assert!(accepted.load(Ordering::SeqCst) <= connections);
    }
    let sample = proxy.app().live().load().backends[0].endpoints[0].take_sample();
    assert!(sample.failures > 3, "{sample:?}");
    assert_eq!(proxy.metric("serin_ejections_total", &[]), 0.0);
}
