//! REST clients of a service of gRPC, by one definition for both.

use std::convert::Infallible;
use std::fs;
use std::future::ready;
use std::net::SocketAddr;
use std::path::Path;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderValue};
use http::{Method, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tonic::Request;

use crate::support::grpc::{Caller, Service, note};
use crate::support::{Client, Proxy, Raw, Reply, eventually};

/// Compiles a definition, as `protoc --include_imports` would.
fn compile(file: &str) -> Vec<u8> {
    let includes = ["tests/data/proto", "config/examples/definitions"];
    let mut compiler = protox::Compiler::new(includes).unwrap();
    compiler.include_imports(true).open_file(file).unwrap();
    compiler.encode_file_descriptor_set()
}

fn define(directory: &Path) {
    fs::write(directory.join("notes.binpb"), compile("notes.proto")).unwrap();
}

#[test]
fn the_example_is_compiled_from_its_source() {
    let file = "config/examples/definitions/catalog.binpb";
    let compiled = compile("catalog.proto");
    if std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1") {
        fs::write(file, &compiled).unwrap();
    }
    assert!(
        fs::read(file).is_ok_and(|there| there == compiled),
        "UPDATE_GOLDEN=1 rewrites {file}"
    );
}

fn config(upstream: SocketAddr, route: &str) -> String {
    format!(
        "backends: [ {{ name: only, version: '1', endpoints: ['{upstream}'], protocol: h2c }} ]
routes:
  - name: all
    backendRefs: [ {{ name: only }} ]
    transcode: {{ descriptorSet: notes.binpb, services: [ tests.Notes, tests.Choices ] }}
{route}"
    )
}

async fn start() -> (Proxy, Service) {
    let service = Service::start("one").await;
    (
        Proxy::start_with(&config(service.address, ""), define),
        service,
    )
}

async fn ask(proxy: &Proxy, method: &str, path: &str, body: &str) -> Reply {
    let mut client = Client::connect(proxy.address()).await;
    let method = Method::from_bytes(method.as_bytes()).unwrap();
    let headers = [("content-type", "application/json")];
    client
        .send(method, path, &headers, body.to_owned())
        .await
        .unwrap()
}

/// A note as JSON has it, with every field.
fn full(changed: &Value) -> Value {
    let mut note = json!({
        "text": "", "number": 0, "tags": [], "largeNumber": "0", "isRead": false, "blob": "", "kind": "KIND_UNSPECIFIED",
    });
    for (name, value) in changed.as_object().unwrap() {
        note[name] = value.clone();
    }
    note
}

#[tokio::test]
async fn path_query_and_body_become_the_message() {
    let (proxy, _service) = start().await;
    for (method, path, body, expected) in [
        ("GET", "/v1/name", "", json!({ "text": "one" })),
        (
            "POST",
            "/v1/notes",
            r#"{"text": "a", "number": 7, "isRead": true, "blob": "AAE=", "kind": "KIND_DRAFT"}"#,
            json!({ "text": "a", "number": 7, "isRead": true, "blob": "AAE=", "kind": "KIND_DRAFT" }),
        ),
        (
            "POST",
            "/v1/notes",
            r#"{"large_number": "9007199254740993", "tags": ["x", "y"]}"#,
            json!({ "largeNumber": "9007199254740993", "tags": ["x", "y"] }),
        ),
        ("POST", "/v1/notes", "", json!({})),
        (
            "PUT",
            "/v1/notes/9",
            r#"{"text": "a", "number": 7}"#,
            json!({ "text": "a", "number": 9 }),
        ),
        (
            "PATCH",
            "/v1/notes/9/author?text=by&author.name=Eve&author.penName=eve",
            r#"{"name": "Ann", "age": 30}"#,
            json!({ "text": "by", "number": 9, "author": { "name": "Ann", "age": 30, "penName": "" } }),
        ),
        (
            "GET",
            "/v1/echo/a/b%20c?number=3&tags=x&tags=y&author.name=A%26B&is_read=true&largeNumber=-5&kind=KIND_DRAFT&unknown=1",
            "",
            json!({ "text": "a/b c", "number": 3, "tags": ["x", "y"], "author": { "name": "A&B", "age": 0, "penName": "" }, "isRead": true,
                    "largeNumber": "-5", "kind": "KIND_DRAFT" }),
        ),
        (
            "GET",
            "/v1/echo/?kind=1",
            "",
            json!({ "kind": "KIND_DRAFT" }),
        ),
        ("GET", "/v1/kinds/1", "", json!({ "kind": "KIND_DRAFT" })),
        (
            "GET",
            "/v1/kinds/KIND_DRAFT",
            "",
            json!({ "kind": "KIND_DRAFT" }),
        ),
        ("REPORT", "/v1/notes/4:report", "", json!({ "number": 4 })),
    ] {
        let reply = ask(&proxy, method, path, body).await;
        assert_eq!(
            reply.status,
            StatusCode::OK,
            "{method} {path}: {}",
            reply.text()
        );
        assert_eq!(reply.header("content-type"), Some("application/json"));
        assert_eq!(reply.header("grpc-status"), None);
        assert_eq!(reply.json(), full(&expected), "{method} {path} {body}");
    }
    // The path has decided who is asked, whatever the body calls the field.
    for body in [
        r#"{"largeNumber": "5"}"#,
        r#"{"large_number": "5"}"#,
        r#"{"largeNumber": "5", "large_number": "6"}"#,
    ] {
        let reply = ask(&proxy, "PUT", "/v1/large/9", body).await;
        assert_eq!(reply.json()["largeNumber"], "9", "{body}");
    }
    let body = r#"{"author": {"penName": "eve"}}"#;
    let reply = ask(&proxy, "PUT", "/v1/authors/ann", body).await;
    assert_eq!(reply.json()["author"]["penName"], "ann");
    let reply = ask(&proxy, "GET", "/v1/name/text-only", "").await;
    assert_eq!(reply.json(), json!("one"));
}

#[tokio::test]
async fn a_variable_of_several_segments_keeps_escaped_slashes() {
    let service = Service::start("one").await;
    let config = config(service.address, "    escapedSlashes: keep\n");
    let proxy = Proxy::start_with(&config, define);
    for (path, text) in [
        ("/v1/echo/a%2Fb/c%20d", "a%2Fb/c d"),
        ("/v1/echo/a%2fb", "a%2Fb"),
        ("/v1/texts/a%2Fb", "a/b"),
    ] {
        assert_eq!(ask(&proxy, "GET", path, "").await.json()["text"], text);
    }
}

#[tokio::test]
async fn head_is_get_without_a_body() {
    let (proxy, _service) = start().await;
    let whole = ask(&proxy, "GET", "/v1/name", "").await;
    let length = whole.text().len().to_string();
    let mut clients = [
        Client::connect(proxy.address()).await,
        Client::h2c(proxy.address()).await,
    ];
    for client in &mut clients {
        for (path, status) in [
            ("/v1/name", StatusCode::OK),
            ("/v1/fail/5/why", StatusCode::NOT_FOUND),
            ("/v1/count/0", StatusCode::OK),
        ] {
            let reply = client.send(Method::HEAD, path, &[], String::new()).await;
            let reply = reply.unwrap();
            assert_eq!((reply.status, reply.text()), (status, ""), "{path}");
            if path == "/v1/name" {
                assert_eq!(reply.header("content-length"), Some(&*length));
            }
        }
    }
    let reply = ask(&proxy, "HEAD", "/v1/notes", "").await;
    assert_eq!(reply.status, StatusCode::NOT_FOUND, "that is no GET");
}

#[tokio::test]
async fn what_makes_no_message_is_refused_with_the_reason() {
    let (proxy, service) = start().await;
    for (method, path, body, reason) in [
        ("POST", "/v1/notes", "{", "not JSON"),
        ("POST", "/v1/notes", "[]", "not a JSON object"),
        ("POST", "/v1/notes", "{} {}", "not JSON"),
        ("POST", "/v1/notes", r#"{"txet": "a"}"#, "txet"),
        // The body is read straight into the message, so it is known where it is wrong.
        ("POST", "/v1/notes", r#"{"txet": "a"}"#, "line 1 column 7"),
        ("POST", "/v1/notes", r#"{"number": "many"}"#, ""),
        ("POST", "/v1/notes", r#"{"number": -1}"#, ""),
        ("PUT", "/v1/notes/many", "{}", ""),
        ("GET", "/v1/echo/a?number=many", "", ""),
        ("GET", "/v1/echo/a?is_read=perhaps", "", ""),
        ("GET", "/v1/echo/a?kind=KIND_OTHER", "", "KIND_OTHER"),
        ("GET", "/v1/echo/%FF", "", "UTF-8"),
        ("GET", "/v1/choices?text=a&number=1", "", "only one"),
        ("PUT", "/v1/choices/1", r#"{"text": "a"}"#, "only one"),
        (
            "POST",
            "/v1/choices",
            r#"{"text": "a", "number": 1}"#,
            "oneof",
        ),
    ] {
        let reply = ask(&proxy, method, path, body).await;
        assert_eq!(
            reply.status,
            StatusCode::BAD_REQUEST,
            "{method} {path} {body}"
        );
        let status = reply.json();
        assert_eq!(status["code"], 3, "{status}");
        let message = status["message"].as_str().unwrap();
        assert!(!message.is_empty() && message.contains(reason), "{message}");
    }
    for (method, path) in [
        ("GET", "/v1/nothing"),
        ("DELETE", "/v1/notes"),
        ("GET", "/"),
    ] {
        assert_eq!(
            ask(&proxy, method, path, "").await.status,
            StatusCode::NOT_FOUND
        );
    }
    let errors = proxy.metric("serin_request_failures_total", &[("version", "1")]);
    assert_eq!(
        (errors, service.hanging()),
        (0.0, 0),
        "none is the service's fault"
    );
}

#[tokio::test]
async fn errors_have_the_status_of_http_and_the_body_of_google_rpc() {
    let (proxy, _service) = start().await;
    for (code, status) in [
        (1, 499),
        (2, 500),
        (3, 400),
        (4, 504),
        (5, 404),
        (6, 409),
        (7, 403),
        (8, 429),
        (9, 400),
        (10, 409),
        (11, 400),
        (12, 501),
        (13, 500),
        (14, 503),
        (15, 500),
        (16, 401),
    ] {
        for kind in ["fail", "fail-at-once"] {
            let reply = ask(
                &proxy,
                "GET",
                &format!("/v1/{kind}/{code}/why%20%C3%BC"),
                "",
            )
            .await;
            assert_eq!(reply.status.as_u16(), status, "{code}");
            assert_eq!(
                reply.json(),
                json!({ "code": code, "message": "why ü", "details": [] })
            );
        }
        let code = status.to_string();
        let labels = [("version", "1"), ("code", &*code), ("protocol", "http1")];
        assert!(
            proxy.metric("serin_requests_total", &labels) >= 2.0,
            "{code}"
        );
    }
}

#[tokio::test]
async fn streams_are_lines_of_json_as_they_come() {
    let (proxy, service) = start().await;
    let reply = ask(&proxy, "GET", "/v1/count/3", "").await;
    assert_eq!(reply.header("content-type"), Some("application/x-ndjson"));
    let lines: Vec<Value> = reply
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let numbers: Vec<u64> = lines
        .iter()
        .map(|line| line["number"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, [0, 1, 2]);
    let none = ask(&proxy, "GET", "/v1/count/0", "").await;
    assert_eq!((none.status, none.text()), (StatusCode::OK, ""));

    let reply = ask(&proxy, "GET", "/v1/fail-late/5/gone", "").await;
    let lines: Vec<Value> = reply
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(lines[0]["text"], "first");
    assert_eq!(
        lines[1],
        json!({ "error": { "code": 5, "message": "gone", "details": [] } })
    );
    eventually("it is counted", || {
        proxy.metric("serin_grpc_responses_total", &[("grpc_status", "5")]) == 1.0
    })
    .await;

    // The first line is here although the call goes on, and leaving takes it back.
    let mut client = Client::connect(proxy.address()).await;
    let request = http::Request::get("/v1/hang-late").header("host", "a");
    let request = request.body(Empty::new().boxed()).unwrap();
    let mut response = client.request(request).await.unwrap();
    let first = response.body_mut().frame().await.unwrap().unwrap();
    assert!(first.into_data().unwrap().ends_with(b"}\n"));
    assert_eq!(service.hanging(), 1);
    drop((response, client));
    eventually("it is taken back", || service.hanging() == 0).await;
}

#[tokio::test]
async fn calls_of_grpc_pass_beside_as_they_are() {
    let (proxy, _service) = start().await;
    let caller = Caller::connect(proxy.address()).await;
    let reply = caller
        .unary("Name", Request::new(note("", 0)))
        .await
        .unwrap();
    assert_eq!(reply.into_inner().text, "one");
    let failed = caller
        .unary("Fail", Request::new(note("why", 5)))
        .await
        .unwrap_err();
    assert_eq!(failed.message(), "why");
}

#[tokio::test]
async fn versions_are_split_as_for_any_other_request() {
    let (stable, canary) = (
        Service::start("stable").await,
        Service::start("canary").await,
    );
    let config = format!(
        "backends:
  - {{ name: stable, version: '1', endpoints: ['{}'], protocol: h2c }}
  - {{ name: canary, version: '2', endpoints: ['{}'], protocol: h2c }}
routes:
  - name: all
    backendRefs: [ {{ name: stable, weight: 1 }}, {{ name: canary, weight: 0 }} ]
    transcode: {{ descriptorSet: notes.binpb, services: [ tests.Notes ] }}
    exposeVersion: true
    gray: {{ rules: [ {{ name: qa, path: {{ value: /v1/name/text-only }}, methods: [ GET ], backend: canary }} ] }}
",
        stable.address, canary.address
    );
    let proxy = Proxy::start_with(&config, define);
    for (path, name, version) in [
        ("/v1/name", json!("stable"), "1"),
        ("/v1/name/text-only", json!("canary"), "2"),
    ] {
        let reply = ask(&proxy, "GET", path, "").await;
        let json = reply.json();
        assert_eq!(*json.get("text").unwrap_or(&json), name);
        assert_eq!(reply.header("x-service-version"), Some(version));
        assert_eq!(
            proxy.metric("serin_grpc_responses_total", &[("version", version)]),
            1.0
        );
    }
}

#[tokio::test]
async fn errors_of_the_proxys_own_are_json_as_well() {
    let refusing = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let refused = refusing.local_addr().unwrap();
    drop(refusing);
    let proxy = Proxy::start_with(&config(refused, ""), define);
    let reply = ask(&proxy, "GET", "/v1/name", "").await;
    assert_eq!(
        (reply.status, &reply.json()["code"]),
        (StatusCode::BAD_GATEWAY, &json!(14))
    );
    let nobody = config(refused, "").replace(&format!("'{refused}'"), "");
    let nobody = Proxy::start_with(&nobody, define);
    let reply = ask(&nobody, "GET", "/v1/name", "").await;
    assert_eq!(
        (reply.status, &reply.json()["code"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!(14))
    );

    let service = Service::start("one").await;
    let limited = config(service.address, "    limits: { requestBody: 100 }\n");
    let proxy = Proxy::start_with(&limited, define);
    let large = format!("{{\"text\": \"{}\"}}", "x".repeat(200));
    let reply = ask(&proxy, "POST", "/v1/notes", &large).await;
    assert_eq!(reply.status, StatusCode::PAYLOAD_TOO_LARGE);
    let mut client = Raw::connect(proxy.address()).await;
    client
        .send("POST /v1/notes HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        .await;
    client
        .send(&format!("{:x}\r\n{large}\r\n", large.len()))
        .await;
    let head = client.read_until("\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
    let too_large = [("version", "1"), ("code", "413")];
    eventually("both are counted", || {
        proxy.metric("serin_requests_total", &too_large) == 2.0
    })
    .await;

    let proxy = Proxy::start_with(&config(service.address, ""), define);
    for (length, status) in [
        (1 << 20, StatusCode::OK),
        ((1 << 20) + 1, StatusCode::PAYLOAD_TOO_LARGE),
    ] {
        let body = format!("{{}}{}", " ".repeat(length - 2));
        let reply = ask(&proxy, "POST", "/v1/notes", &body).await;
        assert_eq!(reply.status, status, "{length} without a limit");
    }

    let slow = config(service.address, "    timeouts: { request: 200ms }\n");
    let slow = Proxy::start_with(&slow, define);
    let reply = ask(&slow, "GET", "/v1/hang-late", "").await;
    let last: Value = serde_json::from_str(reply.text().lines().last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], 4, "{last}");
}

/// What a service answers with, whatever it is asked.
#[derive(Clone, Default)]
struct Answer {
    head: Vec<(&'static str, &'static str)>,
    body: Vec<u8>,
    trailers: Vec<(&'static str, &'static str)>,
}

impl Answer {
    /// One that says that it is good.
    fn good(body: &[u8]) -> Self {
        Self {
            head: vec![("content-type", "application/grpc")],
            body: body.to_vec(),
            trailers: vec![("grpc-status", "0")],
        }
    }

    fn into_response(self) -> http::Response<BoxBody<Bytes, Infallible>> {
        let mut trailers = HeaderMap::new();
        for (name, value) in self.trailers {
            trailers.insert(name, HeaderValue::from_static(value));
        }
        let trailers = (!trailers.is_empty()).then(|| Ok(trailers));
        let body = Full::new(Bytes::from(self.body)).with_trailers(ready(trailers));
        let mut response = http::Response::new(body.boxed());
        for (name, value) in self.head {
            let value = HeaderValue::from_static(value);
            response.headers_mut().insert(name, value);
        }
        response
    }

    /// Serves it.
    async fn serve(self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let answer = self.clone();
                let service = service_fn(move |_: http::Request<Incoming>| {
                    ready(Ok::<_, Infallible>(answer.clone().into_response()))
                });
                let server = http2::Builder::new(TokioExecutor::new());
                // The proxy may close the connection at any time.
                tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
            }
        });
        address
    }
}

fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], &length[..], message].concat()
}

/// A note that says `a`, and one that is none.
const NOTE: &[u8] = b"\x0a\x01a";
const MALFORMED: &[u8] = b"\x0a\xff";

#[tokio::test]
async fn an_answer_that_is_none_counts_as_what_the_client_is_told() {
    let silent = Answer {
        trailers: Vec::new(),
        ..Answer::good(&framed(NOTE))
    };
    let page = Answer {
        head: vec![("content-type", "text/html")],
        ..Answer::default()
    };
    for (answer, grpc, status) in [
        (Answer::good(&framed(MALFORMED)), 13, 500),
        (Answer::good(&[0, 0, 0x50, 0, 0]), 14, 503),
        (Answer::good(&[1, 0, 0, 0, 0]), 14, 503),
        (
            Answer::good(&[framed(NOTE), framed(NOTE)].concat()),
            14,
            503,
        ),
        (Answer::good(&framed(NOTE)[..6]), 13, 500),
        (Answer::good(&[]), 13, 500),
        (silent, 2, 500),
        (page, 2, 500),
    ] {
        let proxy = Proxy::start_with(&config(answer.serve().await, ""), define);
        let reply = ask(&proxy, "GET", "/v1/name", "").await;
        assert_eq!(
            (reply.status.as_u16(), &reply.json()["code"]),
            (status, &json!(grpc))
        );
        is_counted(&proxy, grpc, status).await;
    }

    let late = Answer::good(&[framed(NOTE), framed(MALFORMED)].concat());
    let proxy = Proxy::start_with(&config(late.serve().await, ""), define);
    let reply = ask(&proxy, "GET", "/v1/count/2", "").await;
    let last: Value = serde_json::from_str(reply.text().lines().last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], 13, "{last}");
    is_counted(&proxy, 13, 500).await;
}

/// Waits until one request has been counted as a failure of the service that ended so.
async fn is_counted(proxy: &Proxy, grpc: u8, status: u16) {
    let (grpc, code) = (grpc.to_string(), status.to_string());
    let counts = [
        ("serin_requests_total", ("code", &*code)),
        ("serin_grpc_responses_total", ("grpc_status", &*grpc)),
        ("serin_request_failures_total", ("version", "1")),
        (
            "serin_upstream_errors_total",
            ("error", "http_protocol_error"),
        ),
    ];
    for (name, label) in counts {
        eventually(&format!("{name} {label:?}"), || {
            proxy.metric(name, &[label]) == 1.0
        })
        .await;
    }
}

#[tokio::test]
async fn what_is_true_of_the_services_bytes_is_not_said_of_json() {
    let mut answer = Answer::good(&framed(NOTE));
    answer.head.extend([
        ("content-encoding", "gzip"),
        ("etag", "\"1\""),
        ("x-seen", "yes"),
    ]);
    let proxy = Proxy::start_with(&config(answer.serve().await, ""), define);
    let reply = ask(&proxy, "GET", "/v1/name/text-only", "").await;
    assert_eq!(reply.json(), "a");
    let fields = ["content-encoding", "etag", "x-seen"].map(|name| reply.header(name));
    assert_eq!(fields, [None, None, Some("yes")]);
}

#[tokio::test]
async fn a_definition_that_does_not_fit_is_said_to_be_so() {
    let directory = tempfile::tempdir().unwrap();
    define(directory.path());
    fs::write(directory.path().join("tags.binpb"), compile("tags.proto")).unwrap();
    let file = directory.path().join("serin.yaml");
    for (transcode, backend, reason) in [
        (
            "{ descriptorSet: tags.binpb, services: [ tests.Tags ] }",
            "h2c",
            "`tags` is repeated",
        ),
        (
            "{ descriptorSet: absent.binpb, services: [ tests.Notes ] }",
            "h2c",
            "does not exist",
        ),
        (
            "{ descriptorSet: serin.yaml, services: [ tests.Notes ] }",
            "h2c",
            "is no descriptor set",
        ),
        (
            "{ descriptorSet: notes.binpb, services: [ tests.Nodes ] }",
            "h2c",
            "tests.Notes, tests.Streams, tests.Bare",
        ),
        (
            "{ descriptorSet: notes.binpb, services: [ tests.Bare ] }",
            "h2c",
            "no method with a google.api.http annotation",
        ),
        (
            "{ descriptorSet: notes.binpb, services: [] }",
            "h2c",
            "no service to call",
        ),
        (
            "{ descriptorSet: notes.binpb, services: [ tests.Notes ] }",
            "http1",
            "speaks HTTP/1.1",
        ),
    ] {
        let config = format!(
            "listeners: [ {{ name: web, address: '127.0.0.1:0' }} ]
backends: [ {{ name: only, endpoints: ['127.0.0.1:1'], protocol: {backend} }} ]
routes: [ {{ name: all, backendRefs: [ {{ name: only }} ], transcode: {transcode} }} ]
"
        );
        fs::write(&file, config).unwrap();
        let refused = serin::config::load::load(&file, &mut serin::config::load::load_list);
        let problems = refused.unwrap_err().to_string();
        assert!(problems.contains(reason), "{transcode}: {problems}");
    }
}
