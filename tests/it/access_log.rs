//! The access log: what a line says, and what becomes of lines when files move, fill up or are not
//! read.

use std::fs;
use std::path::Path;

use http::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::{Client, PATIENCE, Proxy, Raw, Upstream, eventually, get, shop, single};

const LOGGED: &str = "accessLog: { output: access.log }\n";

/// The lines of a log once there are so many of them.
async fn lines(path: &Path, count: usize) -> Vec<String> {
    let read = || fs::read_to_string(path).unwrap_or_default();
    eventually("the lines are written", || read().lines().count() >= count).await;
    let lines: Vec<String> = read().lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), count, "{lines:#?}");
    lines
}

async fn objects(proxy: &Proxy, count: usize) -> Vec<Value> {
    let lines = lines(&proxy.directory().join("access.log"), count).await;
    lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

/// Takes out what differs from run to run, having looked at it.
fn without_times(mut line: Value) -> Value {
    let fields = line.as_object_mut().unwrap();
    let time = fields.remove("ts").unwrap();
    let time = humantime::parse_rfc3339(time.as_str().unwrap()).unwrap();
    assert!(time.elapsed().unwrap().as_secs() < 600);
    let duration = fields.remove("duration_ms").unwrap().as_f64().unwrap();
    if let Some(upstream) = fields.remove("upstream_ms") {
        assert!(upstream.as_f64().unwrap() <= duration);
    }
    line
}

#[tokio::test]
async fn a_line_says_who_asked_for_what_where_it_went_and_why() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let gray = "    gray:
      identity: [ { header: x-user-id } ]
      rules: [ { name: qa, header: { name: x-qa, value: '1' }, backend: shop-canary } ]
";
    let config = LOGGED.to_owned() + &shop(stable.address, canary.address, (1, 0), gray);
    let proxy = Proxy::start(&config);
    let headers = [
        ("host", "Shop.example.com:80"),
        ("x-user-id", "user-1"),
        ("x-qa", "1"),
        ("user-agent", "curl \"8\""),
        (
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ),
    ];
    let mut client = Client::connect(proxy.address()).await;
    let sent = client.send(Method::POST, "/echo?user_id=secret", &headers, "hello");
    assert_eq!(sent.await.unwrap().text(), "hello");
    let line = objects(&proxy, 1).await.remove(0);
    assert!(line["upstream_ms"].is_f64(), "{line}");
    let expected = json!({
        "method": "POST", "host": "Shop.example.com:80", "path": "/echo", "protocol": "HTTP/1.1",
        "user_agent": "curl \"8\"", "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "client_ip": "127.0.0.1",
        "route": "shop", "backend": "shop-canary", "version": "2", "reason": "rule", "rule": "qa",
        "user": "7c7615c11438e5c9", "endpoint": canary.address.to_string(),
        "attempts": 1, "status": 200, "bytes_in": 5, "bytes_out": 5,
    });
    assert_eq!(without_times(line), expected);
}

#[tokio::test]
async fn the_text_format_has_the_same_fields_and_the_user_as_configured() {
    let upstream = Upstream::start("one").await;
    let gray = "    gray: { identity: [ { header: x-user-id } ] }\n";
    for (user, expected) in [("plain", " user=\"a b\" "), ("omit", " reason=baseline ")] {
        let log = format!("accessLog: {{ output: access.log, format: text, user: {user} }}\n");
        let proxy = Proxy::start(&(log + &single(upstream.address, gray)));
        let headers = [("host", "a.example"), ("x-user-id", "a b")];
        get(proxy.address(), "/bytes/3", &headers).await;
        let line = lines(&proxy.directory().join("access.log"), 1)
            .await
            .remove(0);
        assert!(
            line.contains(" method=GET host=a.example path=/bytes/3 protocol=HTTP/1.1 client_ip=127.0.0.1 route=all backend=only version=1 reason=baseline "),
            "{line}"
        );
        assert!(line.contains(expected), "{line}");
        assert_eq!(line.contains("user="), user == "plain", "{line}");
        assert!(line.ends_with(" bytes_in=0 bytes_out=3"), "{line}");
    }
}

#[tokio::test]
async fn the_client_is_whom_trusted_proxies_name() {
    let upstream = Upstream::start("one").await;
    let config =
        "listeners: [ { name: web, address: '127.0.0.1:0', trustedProxies: [127.0.0.1] } ]\n"
            .to_owned()
            + LOGGED
            + &single(upstream.address, "");
    let proxy = Proxy::start(&config);
    get(proxy.address(), "/", &[("x-forwarded-for", "192.0.2.7")]).await;
    assert_eq!(objects(&proxy, 1).await[0]["client_ip"], "192.0.2.7");
}

#[tokio::test]
async fn what_goes_wrong_has_a_line_with_its_error() {
    let refusing = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = refusing.local_addr().unwrap();
    drop(refusing);
    let proxy = Proxy::start(&(LOGGED.to_owned() + &single(address, "    hostnames: [a]\n")));
    get(proxy.address(), "/", &[("host", "a")]).await;
    get(proxy.address(), "/", &[("host", "b")]).await;
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\nuser-agent: \u{fc}\r\n\r\n")
        .await;
    raw.read_until("\r\n\r\n").await;
    let mut found: Vec<(u64, String, bool)> = objects(&proxy, 3)
        .await
        .into_iter()
        .map(|line| {
            let error = line["error"].as_str().unwrap().to_owned();
            let status = line["status"].as_u64().unwrap();
            (status, error, line["endpoint"].is_string())
        })
        .collect();
    found.sort();
    let expected = [
        (400, "http_request_error", false),
        (404, "destination_not_found", false),
        (502, "connection_refused", true),
    ];
    assert_eq!(
        found,
        expected.map(|(status, error, sent)| (status, error.to_owned(), sent))
    );
}

#[tokio::test]
async fn a_client_that_goes_away_has_a_line_with_499() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&(LOGGED.to_owned() + &single(upstream.address, "")));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request waits", || upstream.held() == 1).await;
    drop(raw);
    let line = objects(&proxy, 1).await.remove(0);
    assert_eq!(
        (&line["status"], &line["error"]),
        (&json!(499), &json!("client_gone"))
    );
}

#[tokio::test]
async fn a_response_that_the_client_broke_off_says_so() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&(LOGGED.to_owned() + &single(upstream.address, "")));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("GET /bytes/50000000 HTTP/1.1\r\nhost: a\r\n\r\n")
        .await;
    raw.read_until("\r\n\r\n").await;
    drop(raw);
    let line = objects(&proxy, 1).await.remove(0);
    assert_eq!(
        (&line["status"], &line["error"]),
        (&json!(200), &json!("client_gone"))
    );
}

#[tokio::test]
async fn secrets_in_the_host_and_bodies_that_are_not_sent_do_not_show() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&(LOGGED.to_owned() + &single(upstream.address, "")));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("HEAD / HTTP/1.1\r\nhost: user:secret@a\r\n\r\n")
        .await;
    raw.read_until("\r\n\r\n").await;
    let line = objects(&proxy, 1).await.remove(0);
    assert_eq!(
        (&line["status"], &line["host"], &line["bytes_out"]),
        (&json!(400), &json!("a"), &json!(0))
    );
}

#[tokio::test]
async fn a_reload_moves_the_log_and_loses_no_line() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&(LOGGED.to_owned() + &single(upstream.address, "")));
    let mut held = Raw::connect(proxy.address()).await;
    held.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request waits", || upstream.held() == 1).await;
    get(proxy.address(), "/old", &[]).await;
    let moved = "accessLog: { output: moved.log, format: text }\n";
    proxy
        .replace(&(moved.to_owned() + &single(upstream.address, "")))
        .await;
    get(proxy.address(), "/new", &[]).await;
    let new = lines(&proxy.directory().join("moved.log"), 1).await;
    assert!(new[0].contains("path=/new"), "{new:?}");
    upstream.release();
    held.read_until("one").await;
    // What began under the old log ends in it.
    let paths: Vec<Value> = objects(&proxy, 2)
        .await
        .into_iter()
        .map(|mut line| line["path"].take())
        .collect();
    assert_eq!(paths, ["/old", "/hold"]);
    proxy.replace(&single(upstream.address, "")).await;
    get(proxy.address(), "/silent", &[]).await;
    // With this all that there is has been written.
    assert!(proxy.app().sinks().flush(PATIENCE));
    lines(&proxy.directory().join("moved.log"), 1).await;
}

#[tokio::test]
async fn a_log_that_cannot_be_opened_refuses_the_configuration_and_names_the_place() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&(LOGGED.to_owned() + &single(upstream.address, "")));
    let nowhere = "accessLog: { output: nowhere/access.log }\n";
    proxy.write(&(nowhere.to_owned() + &single(upstream.address, "")));
    eventually("the configuration is refused", || {
        proxy.app().board().load().refused.is_some()
    })
    .await;
    let refused = proxy.app().board().load().refused.clone().unwrap();
    let problem = &refused.problems[0];
    assert_eq!(problem.path, "accessLog.output");
    assert!(
        problem.message.contains("nowhere/access.log") && problem.span.line > 1,
        "{problem:?}"
    );
    get(proxy.address(), "/still", &[]).await;
    assert_eq!(objects(&proxy, 1).await[0]["path"], "/still");
}

#[tokio::test]
async fn the_configuration_itself_is_no_log_and_a_refusal_is_told_once() {
    let upstream = Upstream::start("one").await;
    let good = LOGGED.to_owned() + &single(upstream.address, "");
    let proxy = Proxy::start(&good);
    let failures = || proxy.metric("serin_config_reloads_total", &[("result", "failure")]);
    proxy.write(&good.replace("access.log", "serin.yaml"));
    eventually("the configuration is refused", || failures() == 1.0).await;
    // Each line is an event in the directory that is watched.
    for count in 1..=3 {
        get(proxy.address(), "/", &[]).await;
        objects(&proxy, count).await;
    }
    assert_eq!(failures(), 1.0);
    proxy.replace(&(good + "# as before\n")).await;
}

#[tokio::test]
async fn the_last_lines_are_written_when_the_proxy_ends() {
    let upstream = Upstream::start("one").await;
    let outside = tempfile::tempdir().unwrap();
    let path = outside.path().join("access.log");
    let log = format!("accessLog: {{ output: '{}' }}\n", path.display());
    let proxy = Proxy::start(&(log + &single(upstream.address, "")));
    let mut client = Client::connect(proxy.address()).await;
    for _ in 0..50 {
        client.get("/", &[]).await;
    }
    drop(client);
    proxy.shut_down().await;
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 50);
}

#[tokio::test]
async fn a_full_disk_costs_lines_but_no_request() {
    let upstream = Upstream::start("one").await;
    let log = "accessLog: { output: /dev/full }\n";
    let proxy = Proxy::start(&(log.to_owned() + &single(upstream.address, "")));
    assert_eq!(proxy.metric("serin_access_log_dropped_total", &[]), 0.0);
    for _ in 0..5 {
        assert_eq!(get(proxy.address(), "/", &[]).await.text(), "one");
    }
    eventually("the lost lines are counted", || {
        proxy.metric("serin_access_log_dropped_total", &[]) == 5.0
    })
    .await;
}

#[tokio::test]
async fn lines_are_chosen_by_what_became_of_a_request_and_failures_have_one_in_any_case() {
    let upstream = Upstream::start("one").await;
    let log = "accessLog:
  output: access.log
  rotation: { size: 64Ki, keep: 1 }
  sampling:
    - { paths: [ /healthz ], ratio: 0 }
    - { statuses: [ 404, 3xx ], ratio: 0 }
    - { routes: [ all ], backends: [ only ], slowerThan: 1h, ratio: 0 }
";
    let proxy = Proxy::start(&(log.to_owned() + &single(upstream.address, "")));
    for path in [
        "/healthz",
        "/status/404",
        "/status/302",
        "/status/503",
        "/status/403",
        "/a",
    ] {
        get(proxy.address(), path, &[]).await;
    }
    let lines = objects(&proxy, 3).await;
    let mut paths: Vec<&str> = lines
        .iter()
        .map(|line| line["path"].as_str().unwrap())
        .collect();
    paths.sort_unstable();
    assert_eq!(paths, ["/a", "/status/403", "/status/503"]);
}
