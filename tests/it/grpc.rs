//! gRPC through the proxy: as it is without, and what the proxy itself adds.

use std::net::SocketAddr;
use std::time::Duration;

use h2::Reason;
use http::{Method, StatusCode};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status};

use crate::support::grpc::{Caller, Service, note};
use crate::support::upstream::serving;
use crate::support::{Client, Proxy, Reply, Upstream, eventually};

fn h2c(upstream: SocketAddr, route: &str) -> String {
    format!(
        "backends: [ {{ name: only, version: '1', endpoints: ['{upstream}'], protocol: h2c }} ]
routes:
  - name: all
    backendRefs: [ {{ name: only }} ]
{route}"
    )
}

fn calls(proxy: &Proxy, status: &str) -> f64 {
    proxy.metric(
        "serin_grpc_responses_total",
        &[("version", "1"), ("grpc_status", status)],
    )
}

fn failures(proxy: &Proxy) -> f64 {
    proxy.metric("serin_request_failures_total", &[("version", "1")])
}

/// A status as a test compares it: without what only the transport adds.
fn shown(status: &Status) -> String {
    let why = status
        .metadata()
        .get("x-why")
        .map(|why| why.to_str().unwrap().to_owned());
    format!("{:?} {:?} {why:?}", status.code(), status.message())
}

/// Makes every kind of call, and tells what came of each.
async fn all_kinds_of_calls(address: SocketAddr) -> Vec<String> {
    let caller = Caller::connect(address).await;
    let mut seen = Vec::new();
    let mut asking = Request::new(note("", 0));
    asking
        .metadata_mut()
        .insert("x-ask", "who".parse().unwrap());
    asking.metadata_mut().insert_bin(
        "x-blob-bin",
        tonic::metadata::MetadataValue::from_bytes(b"\x00\xff"),
    );
    let reply = caller.unary("Name", asking).await.unwrap();
    seen.push(format!(
        "unary {:?} {:?}",
        reply.metadata().get("x-seen"),
        reply.get_ref()
    ));

    let large = note(&"x".repeat(1_000_000), 1);
    let reply = caller
        .unary("Echo", Request::new(large.clone()))
        .await
        .unwrap();
    seen.push(format!("large {}", reply.into_inner() == large));

    let one = tokio_stream::once(note("", 1000));
    let notes = caller
        .stream("Count", Request::new(one))
        .await
        .unwrap()
        .into_inner();
    let counted: Vec<u32> = notes.map(|note| note.unwrap().number).collect().await;
    seen.push(format!(
        "server streaming {} {:?}",
        counted.len(),
        counted.last()
    ));

    let many = tokio_stream::iter((0..1000).map(|number| note("", number)));
    let mut sum = caller
        .stream("Sum", Request::new(many))
        .await
        .unwrap()
        .into_inner();
    seen.push(format!(
        "client streaming {:?}",
        sum.message().await.unwrap()
    ));

    // Each note is answered before the next one is sent.
    let (sender, notes) = tokio::sync::mpsc::channel(1);
    let call = caller.stream("Echo", Request::new(ReceiverStream::new(notes)));
    sender.send(note("ping", 0)).await.unwrap();
    let mut echoes = call.await.unwrap().into_inner();
    for number in 1..100 {
        let echo = echoes.message().await.unwrap().unwrap();
        assert_eq!(echo.number, number - 1);
        sender.send(note("ping", number)).await.unwrap();
    }
    drop(sender);
    let last = echoes.message().await.unwrap();
    seen.push(format!(
        "bidirectional {last:?} {:?}",
        echoes.message().await.unwrap()
    ));

    for code in 1..=16 {
        let status = caller
            .unary("Fail", Request::new(note("why: ü %\n", code)))
            .await;
        seen.push(format!("status {}", shown(&status.unwrap_err())));
    }
    let one = tokio_stream::once(note("late", 9));
    let mut notes = caller
        .stream("FailLate", Request::new(one))
        .await
        .unwrap()
        .into_inner();
    let first = notes.message().await.unwrap();
    seen.push(format!(
        "late {first:?} {}",
        shown(&notes.message().await.unwrap_err())
    ));
    let status = caller
        .unary("Nothing", Request::new(note("", 0)))
        .await
        .unwrap_err();
    seen.push(format!("unknown method {}", shown(&status)));
    seen
}

#[tokio::test]
async fn every_kind_of_call_is_as_it_is_without_the_proxy() {
    let service = Service::start("one").await;
    let proxy = Proxy::start(&h2c(service.address, ""));
    let direct = all_kinds_of_calls(service.address).await;
    assert_eq!(direct.len(), 23, "{direct:#?}");
    assert_eq!(all_kinds_of_calls(proxy.address()).await, direct);
}

#[tokio::test]
async fn calls_are_counted_by_status_and_those_that_are_the_services_fault_as_failures() {
    let service = Service::start("one").await;
    let proxy = Proxy::start(&h2c(service.address, ""));
    let caller = Caller::connect(proxy.address()).await;
    caller
        .unary("Name", Request::new(note("", 0)))
        .await
        .unwrap();
    for code in [5, 13, 13, 14] {
        let failed = caller.unary("Fail", Request::new(note("", code))).await;
        failed.unwrap_err();
    }
    let one = tokio_stream::once(note("late", 15));
    let mut late = caller
        .stream("FailLate", Request::new(one))
        .await
        .unwrap()
        .into_inner();
    while late.message().await.is_ok() {}
    for (status, count) in [
        ("0", 1.0),
        ("5", 1.0),
        ("13", 2.0),
        ("14", 1.0),
        ("15", 1.0),
    ] {
        eventually(status, || calls(&proxy, status) == count).await;
    }
    assert_eq!(failures(&proxy), 4.0);
    let ok = proxy.metric("serin_requests_total", &[("code", "200")]);
    assert_eq!(ok, 6.0, "errors inside a 200");
}

#[tokio::test]
async fn each_call_of_one_connection_is_split_anew() {
    let (stable, canary) = (
        Service::start("stable").await,
        Service::start("canary").await,
    );
    let config = format!(
        "workers: 1
backends:
  - {{ name: stable, version: '1', endpoints: ['{}'], protocol: h2c }}
  - {{ name: canary, version: '2', endpoints: ['{}'], protocol: h2c }}
routes:
  - name: all
    backendRefs: [ {{ name: stable, weight: 1 }}, {{ name: canary, weight: 1 }} ]
    gray: {{ identity: [ {{ header: x-user-id }} ] }}
",
        stable.address, canary.address
    );
    let proxy = Proxy::start(&config);
    let caller = Caller::connect(proxy.address()).await;
    let mut names = std::collections::BTreeMap::<String, usize>::new();
    for user in 0..200 {
        let mut request = Request::new(note("", 0));
        request
            .metadata_mut()
            .insert("x-user-id", format!("u{user}").parse().unwrap());
        let reply = caller.unary("Name", request).await.unwrap();
        *names.entry(reply.into_inner().text).or_default() += 1;
    }
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names.values().all(|count| *count > 60), "{names:?}");
    assert_eq!((stable.connections(), canary.connections()), (1, 1));
}

#[tokio::test]
async fn a_call_that_is_taken_back_is_taken_back_from_the_service() {
    let service = Service::start("one").await;
    let proxy = Proxy::start(&h2c(service.address, ""));
    let caller = Caller::connect(proxy.address()).await;
    let other = caller.clone();
    let call = tokio::spawn(async move { other.unary("Hang", Request::new(note("", 0))).await });
    eventually("it hangs", || service.hanging() == 1).await;
    call.abort();
    eventually("it is taken back", || service.hanging() == 0).await;

    let one = tokio_stream::once(note("", 0));
    let mut notes = caller
        .stream("HangLate", Request::new(one))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(notes.message().await.unwrap().unwrap().text, "first");
    assert_eq!(service.hanging(), 1);
    drop(notes);
    eventually("it is taken back", || service.hanging() == 0).await;
    eventually("both count as cancelled", || calls(&proxy, "1") == 2.0).await;
    assert_eq!(failures(&proxy), 0.0);
}

/// Calls a method with an empty note and a deadline. tonic's client would end the call itself.
async fn call_within(address: SocketAddr, method: &str, limit: &str) -> Reply {
    let mut client = Client::h2c(address).await;
    let headers = [
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("grpc-timeout", limit),
    ];
    let path = format!("/tests.Notes/{method}");
    let sent = client.send(Method::POST, &path, &headers, vec![0; 5]).await;
    sent.unwrap()
}

#[tokio::test]
async fn deadlines_are_kept_before_and_within_a_response() {
    let service = Service::start("one").await;
    let proxy = Proxy::start(&h2c(service.address, ""));
    let reply = call_within(proxy.address(), "Hang", "200m").await;
    assert_eq!(
        (reply.status, reply.header("grpc-status")),
        (StatusCode::OK, Some("4"))
    );
    let reply = call_within(proxy.address(), "HangLate", "200000u").await;
    assert_eq!(reply.header("grpc-status"), None);
    assert!(!reply.body.is_empty());
    assert_eq!(reply.trailers["grpc-status"], "4");
    eventually("both are counted", || calls(&proxy, "4") == 2.0).await;
    eventually("both are taken back", || service.hanging() == 0).await;
}

#[tokio::test]
async fn the_routes_limit_holds_where_it_is_shorter() {
    let service = Service::start("one").await;
    let proxy = Proxy::start(&h2c(service.address, "    timeouts: { request: 200ms }\n"));
    let reply = call_within(proxy.address(), "Hang", "1H").await;
    assert_eq!(reply.header("grpc-status"), Some("4"));
}

#[tokio::test]
async fn errors_of_the_proxys_own_are_replies_of_grpc() {
    let refusing = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let refused = refusing.local_addr().unwrap();
    drop(refusing);
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = silent.local_addr().unwrap();
    let none = h2c(refused, "").replace(&format!("'{refused}'"), "");
    let no_route = h2c(refused, "    matches: [ { path: { value: /other } } ]\n");
    let slow = h2c(silent, "").replace("h2c }", "h2c, timeouts: { connect: 100ms } }");
    for (config, code) in [
        (h2c(refused, ""), Code::Unavailable),
        (none, Code::Unavailable),
        (no_route, Code::Unimplemented),
        (slow, Code::DeadlineExceeded),
    ] {
        let proxy = Proxy::start(&config);
        let caller = Caller::connect(proxy.address()).await;
        let status = caller
            .unary("Name", Request::new(note("", 0)))
            .await
            .unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(!status.message().is_empty());
        let error = status
            .metadata()
            .get("proxy-status")
            .unwrap()
            .to_str()
            .unwrap();
        assert!(error.starts_with("serin; error="), "{error}");
    }
    // What is no call gets what it understands.
    let proxy = Proxy::start(&h2c(refused, ""));
    let mut client = Client::h2c(proxy.address()).await;
    let web = [("content-type", "application/grpc-web")];
    let reply = client.send(Method::POST, "/", &web, "").await.unwrap();
    assert_eq!(reply.status, StatusCode::BAD_GATEWAY);
}

#[tokio::test]
async fn a_stream_may_rest_longer_than_a_body_may_stall() {
    let service = Service::start("one").await;
    let config = h2c(service.address, "    timeouts: { backendRequest: 150ms }\n");
    let listener =
        "listeners: [ { name: web, address: '127.0.0.1:0', timeouts: { requestBody: 100ms } } ]\n";
    let proxy = Proxy::start(&format!("{listener}{config}"));
    let caller = Caller::connect(proxy.address()).await;
    let (sender, notes) = tokio::sync::mpsc::channel(1);
    let call = tokio::spawn(async move {
        let mut sum = caller
            .stream("Sum", Request::new(ReceiverStream::new(notes)))
            .await?;
        sum.get_mut().message().await
    });
    for _ in 0..3 {
        sender.send(note("", 7)).await.unwrap();
        // Both limits pass.
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    drop(sender);
    assert_eq!(call.await.unwrap().unwrap().unwrap().number, 21);
}

/// A service that resets every stream with this code, some behind the head of a response.
async fn resetting(reason: Reason) -> SocketAddr {
    let serve = move |stream: TcpStream| async move {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            if request.uri().path().ends_with("/Name") {
                respond.send_reset(reason);
                continue;
            }
            let response = http::Response::builder().header("content-type", "application/grpc");
            let mut body = respond
                .send_response(response.body(()).unwrap(), false)
                .unwrap();
            body.send_data(vec![0; 5].into(), false).unwrap();
            body.send_reset(reason);
        }
    };
    serving(serve).await.0
}

#[tokio::test]
async fn the_reset_of_a_stream_means_what_it_means_without_the_proxy() {
    for (reason, status) in [
        (Reason::REFUSED_STREAM, Code::Unavailable),
        (Reason::CANCEL, Code::Cancelled),
        (Reason::ENHANCE_YOUR_CALM, Code::ResourceExhausted),
        (Reason::INADEQUATE_SECURITY, Code::PermissionDenied),
        (Reason::INTERNAL_ERROR, Code::Internal),
    ] {
        let proxy = Proxy::start(&h2c(resetting(reason).await, ""));
        let caller = Caller::connect(proxy.address()).await;
        for method in ["Name", "Fail"] {
            let error = caller.unary(method, Request::new(note("", 0))).await;
            assert_eq!(error.unwrap_err().code(), status, "{reason:?} {method}");
        }
        eventually("both are the service's failures", || {
            failures(&proxy) == 2.0
        })
        .await;
    }
}

#[tokio::test]
async fn what_is_no_call_but_by_its_clients_word_is_no_failure() {
    let upstream = Upstream::h2c("one").await;
    let proxy = Proxy::start(&h2c(upstream.address, ""));
    let mut client = Client::h2c(proxy.address()).await;
    let posing = [("content-type", "application/grpc")];
    let reply = client.send(Method::POST, "/", &posing, "").await.unwrap();
    assert_eq!((reply.status, reply.text()), (StatusCode::OK, "one"));
    let served = [("version", "1"), ("code", "200")];
    eventually("it is counted", || {
        proxy.metric("serin_requests_total", &served) == 1.0
    })
    .await;
    assert_eq!(failures(&proxy), 0.0);
}
