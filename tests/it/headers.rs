//! What a gateway does to headers, seen from the upstream and from the client.

use http::StatusCode;
use tokio::net::TcpListener;

use crate::support::upstream::scripted;
use crate::support::{Proxy, Raw, Upstream, get, single};

/// The head that the upstream saw, a line each.
async fn seen(proxy: &Proxy, headers: &[(&str, &str)]) -> Vec<String> {
    let reply = get(proxy.address(), "/head", headers).await;
    reply.text().lines().map(str::to_owned).collect()
}

fn has(lines: &[String], line: &str) -> bool {
    lines.iter().any(|seen| seen == line)
}

fn names(lines: &[String]) -> Vec<&str> {
    lines
        .iter()
        .skip(1)
        .filter_map(|line| line.split(": ").next())
        .collect()
}

#[tokio::test]
async fn forwarding_headers_of_strangers_are_replaced_by_ours() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let forged = [
        ("x-forwarded-for", "6.6.6.6"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "evil.example"),
        ("x-real-ip", "6.6.6.6"),
        ("forwarded", "for=6.6.6.6"),
        ("x-service-version", "9"),
    ];
    let lines = seen(&proxy, &forged).await;
    assert!(has(&lines, "x-forwarded-for: 127.0.0.1"), "{lines:#?}");
    assert!(has(&lines, "x-forwarded-proto: http"));
    assert!(has(&lines, "x-forwarded-host: shop.example.com"));
    assert!(has(&lines, "host: shop.example.com"));
    assert!(!lines.iter().any(|line| line.contains("6.6.6.6")
        || line.contains("evil")
        || line.contains("version: 9")));
}

#[tokio::test]
async fn forwarding_headers_of_trusted_proxies_are_carried_on() {
    let upstream = Upstream::start("one").await;
    let listener =
        "listeners: [ { name: web, address: '127.0.0.1:0', trustedProxies: ['127.0.0.0/8'] } ]\n";
    let proxy = Proxy::start(&(listener.to_owned() + &single(upstream.address, "")));
    let lines = seen(
        &proxy,
        &[
            ("x-forwarded-for", "9.9.9.9, 127.0.0.7"),
            ("x-forwarded-proto", "https"),
            ("connection", "x-forwarded-for, x-forwarded-proto"),
        ],
    )
    .await;
    assert!(
        has(&lines, "x-forwarded-for: 9.9.9.9, 127.0.0.7, 127.0.0.1"),
        "{lines:#?}"
    );
    assert!(has(&lines, "x-forwarded-proto: https"));
}

#[tokio::test]
async fn hop_by_hop_headers_end_here() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send(
        "GET /head HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, x-secret\r\nkeep-alive: timeout=5\r\nx-secret: 1\r\n\
         proxy-connection: keep-alive\r\nte: trailers\r\nupgrade: h2c\r\nexpect: 100-continue\r\nx-kept: 1\r\n\r\n",
    )
    .await;
    let reply = raw.read_until("x-forwarded-host: a").await;
    let body: Vec<String> = reply
        .split("\r\n\r\n")
        .last()
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    assert!(has(&body, "x-kept: 1"), "{reply}");
    for gone in [
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "upgrade",
        "expect",
        "x-secret",
    ] {
        assert!(!names(&body).contains(&gone), "{gone} in {body:#?}");
    }
}

#[tokio::test]
async fn nobody_can_nominate_away_who_he_is() {
    let upstream = Upstream::start("one").await;
    let gray = "    gray: { identity: [ { header: x-user-id } ] }\n";
    let proxy = Proxy::start(&single(upstream.address, gray));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send(
        "GET /head HTTP/1.1\r\nhost: a\r\nx-user-id: u1\r\ncookie: c=1\r\nauthorization: secret\r\n\
         connection: close, x-user-id, cookie, authorization, host, x-forwarded-for\r\n\r\n",
    )
    .await;
    let reply = raw.read_to_end().await;
    let body: Vec<String> = reply
        .split("\r\n\r\n")
        .last()
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    for kept in [
        "x-user-id: u1",
        "cookie: c=1",
        "authorization: secret",
        "host: a",
        "x-forwarded-for: 127.0.0.1",
    ] {
        assert!(has(&body, kept), "{kept} not in {reply}");
    }
}

#[tokio::test]
async fn trailers_are_passed_on_unless_they_claim_what_only_a_head_may() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gray = "    gray: { identity: [ { header: x-user-id } ] }\n";
    let proxy = Proxy::start(&single(listener.local_addr().unwrap(), gray));
    for (name, passed) in [
        ("x-sum", true),
        ("x-user-id", false),
        ("x_user_id", false),
        ("x-forwarded-for", false),
        ("connection", false),
    ] {
        let mut client = Raw::connect(proxy.address()).await;
        client
            .send(&format!(
                "POST / HTTP/1.1\r\nhost: a\r\ntrailer: {name}, x-end\r\ntransfer-encoding: chunked\r\n\r\n\
                 0\r\n{name}: forged\r\nx-end: 1\r\n\r\n"
            ))
            .await;
        let (stream, _) = listener.accept().await.unwrap();
        let mut upstream = Raw::over(stream);
        upstream.read_until("\r\n\r\n").await;
        let trailers = upstream.read_until("x-end: 1\r\n\r\n").await;
        let forged = format!("{name}: forged");
        assert_eq!(trailers.contains(&forged), passed, "{name}: {trailers}");
    }
}

#[tokio::test]
async fn names_with_underscores_are_dropped() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let lines = seen(&proxy, &[("x_user_id", "admin"), ("x-user-id", "u1")]).await;
    assert!(
        has(&lines, "x-user-id: u1") && !lines.iter().any(|line| line.contains("admin")),
        "{lines:#?}"
    );
}

#[tokio::test]
async fn an_absolute_target_is_sent_on_in_origin_form() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(
        upstream.address,
        "    hostnames: [shop.example.com]\n",
    ));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send(
        "GET http://SHOP.example.com:80/head?a=1 HTTP/1.1\r\nhost: SHOP.example.com:80\r\n\r\n",
    )
    .await;
    let reply = raw.read_until("x-forwarded-host").await;
    assert!(
        reply.contains("\r\n\r\nGET /head?a=1 HTTP/1.1\n"),
        "{reply}"
    );
}

#[tokio::test]
async fn backends_edit_headers_both_ways() {
    let upstream = Upstream::start("one").await;
    let config = format!(
        "backends:
  - name: only
    endpoints: ['{}']
    requestHeaders: {{ set: {{ env: gray }}, add: {{ x-lane: b }}, remove: [x-debug] }}
    responseHeaders: {{ set: {{ x-served-by: serin }}, remove: [x-inside] }}
routes:
  - {{ name: all, backendRefs: [ {{ name: only }} ] }}
",
        upstream.address
    );
    let proxy = Proxy::start(&config);
    let reply = get(
        proxy.address(),
        "/head",
        &[("env", "forged"), ("x-lane", "a"), ("x-debug", "1")],
    )
    .await;
    let lines: Vec<String> = reply.text().lines().map(str::to_owned).collect();
    assert!(
        has(&lines, "env: gray") && !has(&lines, "env: forged"),
        "{lines:#?}"
    );
    assert!(has(&lines, "x-lane: a") && has(&lines, "x-lane: b"));
    assert!(!names(&lines).contains(&"x-debug"));
    assert_eq!(reply.header("x-served-by"), Some("serin"));
}

#[tokio::test]
async fn connection_headers_of_the_upstream_end_here() {
    let upstream = scripted(
        b"HTTP/1.1 200 OK\r\nconnection: close, x-hop\r\nx-hop: 1\r\nkeep-alive: timeout=1\r\nx-kept: 1\r\n\
          x-serin-decision: forged\r\ncontent-length: 2\r\n\r\nok",
    )
    .await;
    let proxy = Proxy::start(&single(upstream, ""));
    let reply = get(proxy.address(), "/", &[]).await;
    assert_eq!(
        (reply.status, reply.text(), reply.header("x-kept")),
        (StatusCode::OK, "ok", Some("1"))
    );
    for gone in ["connection", "keep-alive", "x-hop", "x-serin-decision"] {
        assert_eq!(reply.header(gone), None, "{gone}");
    }
}

#[tokio::test]
async fn a_content_length_beside_chunks_is_not_believed() {
    let upstream = scripted(
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    )
    .await;
    let proxy = Proxy::start(&single(upstream, ""));
    let reply = get(proxy.address(), "/", &[]).await;
    assert_eq!(
        (reply.text(), reply.header("content-length")),
        ("hello", None)
    );
}

#[tokio::test]
async fn what_a_gateway_says_of_itself_comes_from_no_stranger_and_is_nominated_away_by_none() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let forged = [
        ("x-forwarded-prefix", "/admin"),
        ("x-forwarded-ssl", "on"),
        ("x-serin-decision", "route=other"),
        ("via", "1.1 earlier"),
        ("connection", "via"),
    ];
    let lines = seen(&proxy, &forged).await;
    let seen = names(&lines);
    for (name, _) in &forged[..3] {
        assert!(!seen.contains(name), "{lines:#?}");
    }
    assert!(has(&lines, "via: 1.1 earlier"), "{lines:#?}");
    assert_eq!(seen.iter().filter(|name| **name == "via").count(), 2);
}

#[tokio::test]
async fn equal_lengths_become_one() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("POST /head HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nab")
        .await;
    let reply = raw.read_to_end().await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    let (_, lines) = reply.split_once("\r\n\r\n").unwrap();
    assert_eq!(lines.matches("content-length: 2").count(), 1, "{lines}");
}

#[tokio::test]
async fn what_is_written_into_requests_may_not_come_behind_their_bodies() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&format!(
        "backends: [ {{ name: only, endpoints: ['{}'], requestHeaders: {{ set: {{ env: gray }} }} }} ]
routes: [ {{ name: all, backendRefs: [ {{ name: only }} ] }} ]
",
        upstream.address
    ));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send(
        "POST /seen-trailers HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\
         trailer: env, via, x-forwarded-prefix, x-sum\r\n\r\n\
         2\r\nok\r\n0\r\nenv: prod\r\nvia: 1.1 me\r\nx-forwarded-prefix: /a\r\nx-sum: 7\r\n\r\n",
    )
    .await;
    let reply = raw.read_to_end().await;
    assert!(reply.contains("\"x-sum\": \"7\""), "{reply}");
    for name in ["env", "via", "x-forwarded-prefix"] {
        assert!(!reply.contains(&format!("\"{name}\"")), "{reply}");
    }
}
