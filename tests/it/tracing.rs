//! Traces: what spans say, which requests have some, what endpoints are told, and what becomes of spans
//! when the collector is away. A real receiver of OTLP takes them.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use http::Method;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use tokio::net::TcpListener;
use tonic::Request;

use crate::cli::{Running, serin};
use crate::support::collector::{Collector, Mood, attributes};
use crate::support::grpc::{Caller, Service, note};
use crate::support::tls::Authority;
use crate::support::{Client, Proxy, Upstream, eventually, get, shop, single, with_head};

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// What sends spans to a collector, with more settings.
fn traced(collector: &Collector, protocol: &str, rest: &str) -> String {
    format!(
        "tracing: {{ endpoint: 'http://{}', protocol: {protocol}{rest} }}\n",
        collector.address
    )
}

/// Everything is sampled.
const ALL: &str = ", sampling: { ratio: 1 }";

/// The spans of one request: that of the server, and those of the attempts.
fn server_and_clients(spans: Vec<Span>) -> (Span, Vec<Span>) {
    let is_server = |span: &Span| span.kind() == SpanKind::Server;
    let (mut servers, clients): (Vec<_>, Vec<_>) = spans.into_iter().partition(is_server);
    assert_eq!(servers.len(), 1, "{servers:#?}");
    (servers.remove(0), clients)
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn spans_say_who_asked_for_what_where_it_went_and_why() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let gray = "    gray:
      identity: [ { header: x-user-id } ]
      rules: [ { name: qa, header: { name: x-qa, value: '1' }, backend: shop-canary } ]
";
    for protocol in ["grpc", "http"] {
        let collector = Collector::start().await;
        let more = ", sampling: { ratio: 1 }, headers: { x-tenant: shop }, resource: { deployment.environment.name: test }";
        let config = traced(&collector, protocol, more)
            + &shop(stable.address, canary.address, (1, 0), gray);
        let proxy = Proxy::start(&config);
        let headers = [
            ("host", "Shop.example.com:8080"),
            ("x-qa", "1"),
            ("user-agent", "curl/8"),
            ("traceparent", TRACEPARENT),
            ("tracestate", "vendor=1"),
        ];
        let mut client = Client::connect(proxy.address()).await;
        let sent = client.send(Method::POST, "/echo?user_id=secret", &headers, "hello");
        assert_eq!(sent.await.unwrap().text(), "hello");

        let (server, clients) = server_and_clients(collector.await_spans(2).await);
        let export = collector.exports().remove(0);
        assert_eq!(export.headers["x-tenant"], "shop");
        if protocol == "http" {
            assert_eq!(export.path, "/v1/traces");
        }
        let resource = &export.request.resource_spans[0];
        let said = attributes(&resource.resource.as_ref().unwrap().attributes);
        assert_eq!(said["service.name"], "serin");
        assert_eq!(said["deployment.environment.name"], "test");

        assert_eq!(server.name, "POST shop");
        assert_eq!(hex(&server.trace_id), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(hex(&server.parent_span_id), "00f067aa0ba902b7");
        assert_eq!(
            server.flags & 0x301,
            0x301,
            "sampled, and the parent is remote"
        );
        let expected = HashMap::from([
            ("http.request.method", "POST"),
            ("url.scheme", "http"),
            ("url.path", "/echo"),
            ("server.address", "Shop.example.com"),
            ("server.port", "8080"),
            ("client.address", "127.0.0.1"),
            ("network.protocol.version", "1.1"),
            ("user_agent.original", "curl/8"),
            ("http.response.status_code", "200"),
            ("http.request.body.size", "5"),
            ("http.response.body.size", "5"),
            ("serin.route", "shop"),
            ("serin.backend", "shop-canary"),
            ("serin.version", "2"),
            ("serin.reason", "rule"),
            ("serin.rule", "qa"),
            ("serin.attempts", "1"),
        ]);
        let said = attributes(&server.attributes);
        let said: HashMap<&str, &str> = said.iter().map(|(key, value)| (*key, &**value)).collect();
        assert_eq!(said, expected);
        assert_eq!(server.status.unwrap().code(), StatusCode::Unset);

        let [attempt] = &clients[..] else {
            panic!("{clients:#?}")
        };
        assert_eq!(attempt.kind(), SpanKind::Client);
        assert_eq!(
            (&*attempt.name, &attempt.trace_id),
            ("POST", &server.trace_id)
        );
        assert_eq!(attempt.parent_span_id, server.span_id);
        assert!(server.start_time_unix_nano <= attempt.start_time_unix_nano);
        assert!(attempt.end_time_unix_nano <= server.end_time_unix_nano);
        let age = std::time::UNIX_EPOCH.elapsed().unwrap()
            - Duration::from_nanos(server.end_time_unix_nano);
        assert!(age < Duration::from_secs(600), "{age:?}");
        let said = attributes(&attempt.attributes);
        assert_eq!(said["server.port"], canary.address.port().to_string());
        assert_eq!(said["serin.backend"], "shop-canary");
        assert_eq!(said["http.response.status_code"], "200");
    }
}

#[tokio::test]
async fn an_endpoint_is_told_the_span_of_the_attempt_and_begins_no_trace_of_its_own() {
    let (upstream, collector) = (Upstream::start("one").await, Collector::start().await);
    let log = "accessLog: { output: access.log }\n";
    let config = traced(&collector, "grpc", ALL) + log + &single(upstream.address, "");
    let proxy = Proxy::start(&config);
    let seen = get(proxy.address(), "/head", &[("tracestate", "vendor=1")]).await;
    let seen = seen.text().to_owned();
    assert!(
        !seen.contains("tracestate"),
        "of a trace that is none: {seen}"
    );
    let told = seen
        .lines()
        .find_map(|line| line.strip_prefix("traceparent: "))
        .unwrap();

    let (server, clients) = server_and_clients(collector.await_spans(2).await);
    assert!(server.parent_span_id.is_empty());
    let (trace_id, span_id) = (hex(&server.trace_id), hex(&clients[0].span_id));
    // Sampled, and by lot.
    assert_eq!(told, format!("00-{trace_id}-{span_id}-03"));
    let path = proxy.directory().join("access.log");
    let line = || fs::read_to_string(&path).unwrap_or_default();
    eventually("the line is written", || line().ends_with('\n')).await;
    let line: serde_json::Value = serde_json::from_str(&line()).unwrap();
    assert_eq!(line["trace_id"], trace_id);
    assert_eq!(line["span_id"], hex(&server.span_id));

    let kept = [("traceparent", TRACEPARENT), ("tracestate", "vendor=1")];
    let seen = get(proxy.address(), "/head", &kept).await.text().to_owned();
    assert!(seen.contains("tracestate: vendor=1"), "{seen}");
    assert!(
        seen.contains("traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-"),
        "{seen}"
    );
    assert!(!seen.contains(TRACEPARENT), "{seen}");
}

#[tokio::test]
async fn each_attempt_has_a_span_with_what_went_wrong() {
    let refusing = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = refusing.local_addr().unwrap();
    drop(refusing);
    let (upstream, collector) = (Upstream::start("stable").await, Collector::start().await);
    // The canary cannot be reached, so the baseline answers instead.
    let rest = "    gray: { rules: [ { name: qa, header: { name: x-qa, value: '1' }, backend: shop-canary } ] }\n";
    let config = traced(&collector, "http", ALL) + &shop(upstream.address, address, (1, 0), rest);
    let proxy = Proxy::start(&config);
    let reply = get(proxy.address(), "/head", &[("x-qa", "1")]).await;
    assert_eq!(reply.status, 200);
    let told = reply.text().to_owned();

    let spans = collector.await_spans(3).await;
    let (server, clients) = server_and_clients(spans);
    let said = attributes(&server.attributes);
    assert_eq!(said["serin.backend"], "shop-canary");
    assert_eq!(said["serin.shielded_by"], "shop-stable");
    assert_eq!(said["serin.attempts"], "2");
    assert_eq!(
        server.status.unwrap().code(),
        StatusCode::Error,
        "the version failed it"
    );
    let [failed, answered] = &clients[..] else {
        panic!("{clients:#?}")
    };
    let said = attributes(&failed.attributes);
    assert_eq!(said["error.type"], "connection_refused");
    assert_eq!(said["serin.backend"], "shop-canary");
    assert_eq!(failed.status.as_ref().unwrap().code(), StatusCode::Error);
    assert!(failed.end_time_unix_nano <= answered.start_time_unix_nano);
    let said = attributes(&answered.attributes);
    assert_eq!(
        (&*said["serin.backend"], &*said["http.request.resend_count"]),
        ("shop-stable", "1")
    );
    assert!(told.contains(&hex(&answered.span_id)), "{told}");
}

#[tokio::test]
async fn nobody_but_trusted_proxies_decides_what_is_sampled_and_failures_always_are() {
    let upstream = Upstream::start("one").await;
    let not_sampled = TRACEPARENT.replace("-01", "-00");
    for (is_trusted, callers, ratio, expected) in [
        (false, "trusted", 0, vec!["failed"]),
        (false, "trusted", 1, vec!["sampled", "not", "failed"]),
        (true, "trusted", 0, vec!["sampled", "failed"]),
        (true, "none", 1, vec!["sampled", "not", "failed"]),
        (false, "all", 0, vec!["sampled", "failed"]),
    ] {
        let collector = Collector::start().await;
        let trusted = if is_trusted {
            ", trustedProxies: [127.0.0.1]"
        } else {
            ""
        };
        let sampling = format!(", sampling: {{ ratio: {ratio}, callers: {callers} }}");
        let config = format!("listeners: [ {{ name: web, address: '127.0.0.1:0'{trusted} }} ]\n")
            + &traced(&collector, "grpc", &sampling)
            + &single(upstream.address, "");
        let proxy = Proxy::start(&config);
        for (path, parent) in [
            ("/sampled", TRACEPARENT),
            ("/not", &not_sampled),
            ("/status/503", &not_sampled),
        ] {
            get(proxy.address(), path, &[("traceparent", parent)]).await;
        }
        // Shutting down waits for what is to be exported.
        proxy.shut_down().await;
        let is_server = |span: &Span| span.kind() == SpanKind::Server;
        let spans = collector.spans();
        let seen: Vec<String> = spans
            .iter()
            .filter(|span| is_server(span))
            .map(|span| attributes(&span.attributes)["url.path"].clone())
            .map(|path| path.replace("status/503", "failed")[1..].to_owned())
            .collect();
        assert_eq!(seen, expected, "{is_trusted} {callers} {ratio}");
    }
}

#[tokio::test]
async fn a_collector_that_is_away_costs_spans_which_are_counted_and_no_request() {
    let upstream = Upstream::start("one").await;
    for protocol in ["grpc", "http"] {
        let collector = Collector::start().await;
        collector.becomes(Mood::Silent);
        let more = ", sampling: { ratio: 1 }, queue: 4, timeout: 10s";
        let config = traced(&collector, protocol, more) + &single(upstream.address, "");
        let proxy = Proxy::start(&config);
        let mut client = Client::connect(proxy.address()).await;
        let spans = |result| proxy.metric("serin_spans_total", &[("result", result)]);
        // The first batch hangs at the collector; more than the queue holds comes behind.
        let mut sent = 0.0;
        while spans("dropped") < 20.0 {
            let reply = client.send(Method::GET, "/", &[], "").await.unwrap();
            assert_eq!(reply.status, 200);
            sent += 2.0;
            let kept = sent - spans("dropped");
            assert!(kept <= 2.0 * (512.0 + 4.0), "{kept} of {sent} are kept");
        }
        assert_eq!(spans("exported"), 0.0);
        let begun = std::time::Instant::now();
        proxy.shut_down().await;
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "the end waits for nobody for long"
        );
    }
}

#[tokio::test]
async fn what_a_collector_cannot_take_now_is_sent_again_and_what_it_refuses_is_not() {
    let upstream = Upstream::start("one").await;
    for protocol in ["grpc", "http"] {
        let collector = Collector::start().await;
        collector.becomes(Mood::Unwilling);
        let config = traced(&collector, protocol, ALL) + &single(upstream.address, "");
        let proxy = Proxy::start(&config);
        let spans = |result| proxy.metric("serin_spans_total", &[("result", result)]);
        get(proxy.address(), "/refused", &[]).await;
        eventually("it is given up", || spans("failed") == 2.0).await;
        collector.becomes(Mood::Busy);
        get(proxy.address(), "/busy", &[]).await;
        eventually("it is asked again", || collector.asked() > 2).await;
        assert_eq!((spans("failed"), spans("exported")), (2.0, 0.0));
        collector.becomes(Mood::Choosy(1));
        eventually("it is taken, but for one", || {
            (spans("exported"), spans("rejected")) == (1.0, 1.0)
        })
        .await;
        collector.becomes(Mood::Willing);
        assert_eq!(collector.await_spans(2).await.len(), 2);
        assert_eq!(spans("dropped"), 0.0);
    }
}

#[tokio::test]
async fn a_collector_is_believed_by_its_certificate_and_shown_ours() {
    let upstream = Upstream::start("one").await;
    let (authority, stranger) = (Authority::new("ours"), Authority::new("other"));
    for (protocol, alpn) in [("grpc", "h2"), ("http", "http/1.1")] {
        let identity = authority.issue(&["localhost"]);
        let collector = Collector::tls(identity.server(&[alpn], Some(&authority))).await;
        let port = collector.address.port();
        for (ca, is_believed) in [("ca.pem", true), ("other.pem", false)] {
            let config = format!(
                "tracing: {{ endpoint: 'https://localhost:{port}', protocol: {protocol}, sampling: {{ ratio: 1 }}, \
                 tls: {{ caFile: {ca}, certificateFile: own.crt, keyFile: own.key }} }}\n"
            );
            let proxy = Proxy::start_with(&(config + &single(upstream.address, "")), |home| {
                fs::write(home.join("ca.pem"), &authority.pem).unwrap();
                fs::write(home.join("other.pem"), &stranger.pem).unwrap();
                authority.issue(&["serin"]).write(home, "own");
            });
            get(proxy.address(), "/", &[]).await;
            if is_believed {
                collector.await_spans(2).await;
            } else {
                // The last attempt is that of the end.
                let metrics = std::sync::Arc::clone(proxy.app().metrics());
                proxy.shut_down().await;
                let shown = metrics.render();
                assert!(
                    shown.contains("serin_spans_total{result=\"failed\"} 2\n"),
                    "{shown}"
                );
            }
        }
        assert_eq!(collector.spans().len(), 2);
    }
}

#[tokio::test]
async fn sampling_is_changed_and_tracing_taken_away_by_a_reload() {
    let (upstream, collector) = (Upstream::start("one").await, Collector::start().await);
    let none = traced(&collector, "grpc", ", sampling: { ratio: 0 }");
    let proxy = Proxy::start(&(none + &single(upstream.address, "")));
    get(proxy.address(), "/none", &[]).await;
    let all = traced(&collector, "grpc", ALL) + &single(upstream.address, "");
    proxy.replace(&all).await;
    get(proxy.address(), "/all", &[]).await;
    collector.await_spans(2).await;
    proxy.replace(&single(upstream.address, "")).await;
    let seen = get(proxy.address(), "/head", &[("traceparent", TRACEPARENT)]).await;
    assert!(seen.text().contains(TRACEPARENT), "passed on as it came");
    proxy.shut_down().await;
    assert_eq!(collector.spans().len(), 2);
}

/// What OpenTelemetry's own variables say, and what they come after.
#[tokio::test]
async fn what_the_file_does_not_say_comes_from_the_environment() {
    let (upstream, collector) = (Upstream::start("one").await, Collector::start().await);
    let url = format!("http://{}", collector.address);
    let whole = url.clone() + "/v1/spans/";
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("serin.yaml");
    for (section, endpoint, path, service) in [
        (
            "{}",
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &url),
            "/v1/traces",
            "gateway",
        ),
        (
            "{}",
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &whole),
            "/v1/spans/",
            "gateway",
        ),
        (
            "{ resource: { service.name: own } }",
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &url),
            "/v1/traces",
            "own",
        ),
    ] {
        let config = format!("tracing: {section}\n") + &single(upstream.address, "");
        fs::write(&file, with_head(&config)).unwrap();
        let mut command = serin(&["run", "--config", file.to_str().unwrap()]);
        command
            .env(endpoint.0, endpoint.1)
            .env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
            .env(
                "OTEL_EXPORTER_OTLP_HEADERS",
                "authorization=Bearer%20secret",
            )
            .env("OTEL_SERVICE_NAME", "gateway")
            .env(
                "OTEL_RESOURCE_ATTRIBUTES",
                "k8s.pod.name=serin-0,service.name=not",
            )
            .env("OTEL_TRACES_SAMPLER", "parentbased_always_on");
        let before = collector.exports().len();
        let mut running = Running::spawn(&mut command);
        get(running.addresses().0, "/", &[]).await;
        eventually("it is exported", || collector.exports().len() > before).await;
        let export = collector.exports().remove(before);
        assert_eq!(
            (&*export.path, &export.headers["authorization"]),
            (path, &"Bearer secret".parse().unwrap())
        );
        let resource = export.request.resource_spans[0].resource.as_ref().unwrap();
        let said = attributes(&resource.attributes);
        assert_eq!(
            (&*said["service.name"], &*said["k8s.pod.name"]),
            (service, "serin-0")
        );
    }
}

#[test]
fn variables_that_cannot_be_used_are_named_without_what_they_hold() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("serin.yaml");
    let config = "tracing: {}\n".to_owned() + &single("127.0.0.1:1".parse().unwrap(), "");
    fs::write(&file, with_head(&config)).unwrap();
    for (name, value) in [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector/secret"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/secret"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "secret"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=secret%0a"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "secret"),
        ("OTEL_TRACES_SAMPLER", "secret"),
        ("OTEL_TRACES_SAMPLER_ARG", "secret"),
        ("OTEL_RESOURCE_ATTRIBUTES", "secret"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "secret"),
    ] {
        let checked = serin(&["check", file.to_str().unwrap()])
            .env(name, value)
            .output()
            .unwrap();
        let said = String::from_utf8(checked.stderr).unwrap();
        assert_eq!(checked.status.code(), Some(1), "{name}: {said}");
        assert!(!said.contains("secret"), "{said}");
        assert!(said.contains(name) || value.contains("%0a"), "{said}");
    }
    let disabled = serin(&["check", file.to_str().unwrap()])
        .env("OTEL_SDK_DISABLED", "true")
        .output();
    let disabled = disabled.unwrap();
    assert!(disabled.status.success());
    assert!(String::from_utf8_lossy(&disabled.stderr).contains("OTEL_SDK_DISABLED"));
}

#[tokio::test]
async fn what_a_drain_cuts_off_is_an_error_and_what_nobody_routes_is_none() {
    let (upstream, collector) = (Upstream::start("one").await, Collector::start().await);
    let none = ", sampling: { ratio: 0 }";
    let config = "shutdown: { timeout: 300ms, lameDuck: 0s }\n".to_owned()
        + "accessLog: { output: access.log, sampling: [ { ratio: 0 } ] }\n"
        + &traced(&collector, "http", none)
        + &single(upstream.address, "    hostnames: [ a.example ]\n");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("serin.yaml");
    fs::write(&file, with_head(&config)).unwrap();
    let mut running = Running::start(&file);
    let (web, _) = running.addresses();
    let mut client = Client::h2c(web).await;
    let call = [
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("host", "b.example"),
    ];
    client
        .send(Method::POST, "/nowhere", &call, "")
        .await
        .unwrap();
    let hanging = tokio::spawn(async move {
        let mut client = Client::connect(web).await;
        let headers = [("host", "a.example")];
        client
            .send(Method::GET, "/hold", &headers, "")
            .await
            .is_err()
    });
    eventually("it is on its way", || upstream.held() == 1).await;
    running.signal("-TERM");
    assert_eq!(running.code(), Some(0));
    assert!(hanging.await.unwrap());
    let (server, clients) = server_and_clients(collector.spans());
    let said = attributes(&server.attributes);
    assert_eq!(
        (&*said["url.path"], &*said["error.type"]),
        ("/hold", "cut_off")
    );
    assert_eq!(clients.len(), 1);
    let log = fs::read_to_string(directory.path().join("access.log")).unwrap();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("\"error\":\"cut_off\""), "{log}");
}

#[tokio::test]
async fn a_call_that_failed_says_so_by_its_own_status() {
    let (service, collector) = (Service::start("one").await, Collector::start().await);
    let config = traced(&collector, "grpc", ", sampling: { ratio: 0 }")
        + &format!(
            "backends: [ {{ name: only, protocol: h2c, endpoints: ['{}'] }} ]
routes: [ {{ name: all, backendRefs: [ {{ name: only }} ] }} ]
",
            service.address
        );
    let proxy = Proxy::start(&config);
    let caller = Caller::connect(proxy.address()).await;
    caller
        .unary("Fail", Request::new(note("", 14)))
        .await
        .unwrap_err();
    let (server, clients) = server_and_clients(collector.await_spans(2).await);
    for span in [&server, &clients[0]] {
        let said = attributes(&span.attributes);
        assert_eq!(
            (&*said["rpc.grpc.status_code"], &*said["error.type"]),
            ("14", "14")
        );
        assert_eq!(span.status.as_ref().unwrap().code(), StatusCode::Error);
    }
}

#[tokio::test]
async fn spans_for_a_collector_that_is_no_longer_configured_are_exported_to_the_last() {
    let upstream = Upstream::start("one").await;
    let (first, second) = (Collector::start().await, Collector::start().await);
    let config = |collector| traced(collector, "http", ALL) + &single(upstream.address, "");
    let proxy = Proxy::start(&config(&first));
    get(
        proxy.address(),
        "/first",
        &[("tracestate", "a=1"), ("traceparent", TRACEPARENT)],
    )
    .await;
    proxy.replace(&config(&second)).await;
    get(proxy.address(), "/second", &[]).await;
    proxy.replace(&single(upstream.address, "")).await;
    proxy.shut_down().await;
    assert_eq!((first.spans().len(), second.spans().len()), (2, 2));
    assert!(first.spans().iter().all(|span| span.trace_state == "a=1"));
    assert!(
        second
            .spans()
            .iter()
            .all(|span| span.trace_state.is_empty())
    );
}
