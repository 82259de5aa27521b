//! Requests that are sent again: the places they hold, the bodies they bring along, and the time they
//! have.

use std::sync::atomic::Ordering;

use http::{Method, StatusCode};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::resilience::{ALL, canary, hanging, send};
use crate::support::upstream::{read_head, serving};
use crate::support::{Client, Proxy, Raw, Upstream, eventually, shop, single};

/// Those who wait for room at a version that is taken out meanwhile have the baseline to go to: none of
/// them was sent to anybody.
#[tokio::test]
async fn who_waits_for_a_canary_that_is_ejected_gets_the_baseline() {
    let stable = Upstream::start("stable").await;
    let own = "version: '2', limits: { inFlight: 2, queueTimeout: 100h }, \
               outlierDetection: { consecutiveFailures: 1, ejection: 1h, maxEjection: 1h },";
    let rest = "    timeouts: { backendRequest: 300ms }\n";
    let config = shop(stable.address, hanging().await, ALL, rest).replace("version: '2',", own);
    let proxy = Proxy::start(&config);
    let reading = (0..10).map(|_| send(&proxy, Method::GET, "/"));
    for reply in futures_util::future::join_all(reading).await {
        assert_eq!((reply.status, reply.text()), (StatusCode::OK, "stable"));
    }
    let snapshot = proxy.app().live().load();
    let gate = &snapshot.backends[1].gate;
    assert_eq!((gate.inside(), gate.waiting()), (0, 0));
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
    assert!(snapshot.backends[0].endpoints[0].take_sample().requests == 0);
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
    let call = [
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("grpc-timeout", "1m"),
    ];
    for _ in 0..5 {
        let reply = client
            .send(Method::POST, "/a.B/C", &call, "")
            .await
            .unwrap();
        assert_eq!(reply.header("grpc-status"), Some("4"), "DEADLINE_EXCEEDED");
    }
    let snapshot = proxy.app().live().load();
    let sample = snapshot.backends[1].endpoints[0].take_sample();
    assert_eq!((sample.requests, sample.failures), (0, 0));
    assert_eq!(canary(&proxy, "serin_ejections_total", &[]), 0.0);
}

/// The canary answers before it has read the body, of which more is to come.
#[tokio::test]
async fn an_upload_that_the_canary_refuses_early_goes_to_the_baseline() {
    let hasty = |mut stream: TcpStream| async move {
        read_head(&mut stream).await;
        let answer = b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n";
        let _ = stream.write_all(answer).await;
        // It goes on reading, as many servers do.
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    };
    let stable = Upstream::start("stable").await;
    let (hasty, _) = serving(hasty).await;
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

/// Whoever is behind a connection may be gone without a word: the next request takes another one.
#[tokio::test]
async fn a_shared_connection_over_which_nothing_comes_is_not_used_again() {
    let answers_once = |stream: TcpStream| async move {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let mut kept = Vec::new();
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            if kept.is_empty() {
                respond
                    .send_response(http::Response::new(()), true)
                    .unwrap();
            }
            kept.push(respond);
        }
    };
    let (address, accepted) = serving(answers_once).await;
    let own = "version: '1', protocol: h2c, outlierDetection: { disabled: true },";
    let rest = "    timeouts: { backendRequest: 1200ms }\n";
    let config = single(address, rest).replace("version: '1',", own);
    let proxy = Proxy::start(&format!("workers: 1\n{config}"));
    let statuses = [200, 504, 200];
    for status in statuses {
        assert_eq!(send(&proxy, Method::GET, "/").await.status, status);
    }
    assert_eq!(accepted.load(Ordering::SeqCst), 2);
}
