//! Filters in the terms of the Gateway API: edits, rewrites, redirects, CORS.

use http::{Method, StatusCode};

use crate::support::{Client, Proxy, Raw, Reply, Upstream, explain, get};

/// A route `shop` for `/shop` with these filters, and one for everything else.
async fn start(filters: &str) -> (Proxy, Upstream) {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&format!(
        "backends:
  - name: only
    version: '1'
    endpoints: ['{}']
    requestHeaders: {{ set: {{ x-from: backend }} }}
    responseHeaders: {{ set: {{ x-from: backend }} }}
routes:
  - name: shop
    matches: [ {{ path: {{ value: /shop }} }} ]
    backendRefs: [ {{ name: only }} ]
    filters:
{filters}
  - name: rest
    backendRefs: [ {{ name: only }} ]
",
        upstream.address
    ));
    (proxy, upstream)
}

fn location(reply: &Reply) -> (u16, Option<&str>) {
    (reply.status.as_u16(), reply.header("location"))
}

#[tokio::test]
async fn headers_are_modified_the_backend_after_the_route_on_the_way_there() {
    let (proxy, _upstream) = start(
        "      - type: RequestHeaderModifier
        requestHeaderModifier: { set: [ { name: x-from, value: route }, { name: x-set, value: new } ], add: [ { name: x-add, value: more } ], remove: [ x-gone ] }
      - responseHeaderModifier: { set: [ { name: x-from, value: route } ], remove: [ date ] }
      - urlRewrite: { path: { replaceFullPath: /head } }",
    )
    .await;
    let headers = [("x-gone", "1"), ("x-set", "old"), ("x-add", "some")];
    let reply = get(proxy.address(), "/shop", &headers).await;
    let lines: Vec<&str> = reply.text().lines().collect();
    for line in [
        "x-from: backend",
        "x-set: new",
        "x-add: some",
        "x-add: more",
    ] {
        assert!(lines.contains(&line), "{line} not in {lines:#?}");
    }
    assert!(
        !lines.iter().any(|line| line.starts_with("x-gone")),
        "{lines:#?}"
    );
    assert_eq!(reply.header("x-from"), Some("route"));
}

#[tokio::test]
async fn urls_are_rewritten_and_the_original_host_is_still_known() {
    let (proxy, _upstream) = start(
        "      - type: URLRewrite
        urlRewrite: { hostname: inside.example, path: { type: ReplacePrefixMatch, replacePrefixMatch: /head } }",
    )
    .await;
    let reply = get(proxy.address(), "/shop?q=1", &[("host", "shop.example:81")]).await;
    let lines: Vec<&str> = reply.text().lines().collect();
    assert_eq!(lines[0], "GET /head?q=1 HTTP/1.1");
    for line in ["host: inside.example", "x-forwarded-host: shop.example:81"] {
        assert!(lines.contains(&line), "{line} not in {lines:#?}");
    }
    // A prefix within is no match, and so stays as it is.
    assert_eq!(get(proxy.address(), "/shopping", &[]).await.text(), "one");
}

#[tokio::test]
async fn redirects_are_answered_without_an_endpoint() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&format!(
        "backends: [ {{ name: only, endpoints: ['{}'] }} ]
routes:
  - name: secure
    hostnames: [ a.example ]
    filters: [ {{ type: RequestRedirect, requestRedirect: {{ scheme: https, statusCode: 301 }} }} ]
  - name: moved
    hostnames: [ b.example ]
    matches: [ {{ path: {{ value: /old }} }} ]
    filters: [ {{ requestRedirect: {{ hostname: c.example, port: 8443, path: {{ replacePrefixMatch: /new }} }} }} ]
  - name: rest
    backendRefs: [ {{ name: only }} ]
",
        upstream.address
    ));
    let port = proxy.address().port();
    for (host, path, expected) in [
        (
            "a.example",
            "/x?q=1",
            (301, Some("https://a.example/x?q=1".to_owned())),
        ),
        (
            "b.example",
            "/old/page",
            (302, Some("http://c.example:8443/new/page".to_owned())),
        ),
        ("b.example", "/other", (200, None)),
    ] {
        let reply = get(
            proxy.address(),
            path,
            &[("host", &format!("{host}:{port}"))],
        )
        .await;
        let expected = (expected.0, expected.1.as_deref());
        assert_eq!(location(&reply), expected, "{host}{path}");
    }
    assert_eq!(upstream.requests(), 1);
    let labels = [("route", "secure"), ("backend", "_NONE"), ("code", "301")];
    assert_eq!(proxy.metric("serin_requests_total", &labels), 1.0);
    let explained = explain(&proxy, "a.example", "/").await;
    assert_eq!(explained["redirected"], "301 Moved Permanently");
    assert_eq!(
        get(proxy.admin(), "/api/v1/routes", &[]).await.status,
        StatusCode::OK
    );
}

#[tokio::test]
async fn nobody_is_redirected_who_names_no_host() {
    let (proxy, _upstream) = start("      - requestRedirect: { scheme: https }").await;
    for field in ["", "host:\r\n"] {
        let mut raw = Raw::connect(proxy.address()).await;
        raw.send(&format!("GET /shop HTTP/1.0\r\n{field}\r\n"))
            .await;
        let reply = raw.read_to_end().await;
        assert!(reply.starts_with("HTTP/1.0 400 "), "{reply}");
        assert!(!reply.contains("location:"), "{reply}");
    }
}

const CORS: &str = "      - type: CORS
        cors:
          allowOrigins: [ 'https://shop.example', 'https://*.shop.example' ]
          allowCredentials: true
          allowMethods: [ GET, PUT ]
          exposeHeaders: [ x-sum ]
          maxAge: 600";

#[tokio::test]
async fn preflights_are_answered_and_responses_say_who_may_read_them() {
    let (proxy, upstream) = start(CORS).await;
    let mut client = Client::connect(proxy.address()).await;
    for (origin, allowed) in [
        ("https://shop.example", true),
        ("https://eu.shop.example", true),
        ("https://shop.example.evil", false),
        ("https://evilshop.example", false),
        ("http://shop.example", false),
        ("https://a.b/.shop.example", false),
        ("null", false),
    ] {
        let asked = [
            ("origin", origin),
            ("access-control-request-method", "PUT"),
            ("access-control-request-headers", "x-user-id"),
        ];
        let reply = client
            .send(Method::OPTIONS, "/shop", &asked, "")
            .await
            .unwrap();
        assert_eq!(reply.status, StatusCode::NO_CONTENT);
        let is = |name: &str, value: &str| {
            assert_eq!(
                reply.header(name),
                allowed.then_some(value),
                "{origin} {name}"
            );
        };
        is("access-control-allow-origin", origin);
        is("access-control-allow-credentials", "true");
        is("access-control-allow-methods", "GET, PUT");
        is("access-control-allow-headers", "x-user-id");
        is("access-control-max-age", "600");

        let reply = client.get("/shop", &[("origin", origin)]).await;
        assert_eq!(reply.text(), "one");
        let is = |name: &str, value: &str| {
            assert_eq!(
                reply.header(name),
                allowed.then_some(value),
                "{origin} {name}"
            );
        };
        is("access-control-allow-origin", origin);
        is("access-control-expose-headers", "x-sum");
        assert_eq!(reply.header("vary"), Some("Origin"));
    }
    assert_eq!(upstream.requests(), 7, "preflights do not reach it");
    // What is no preflight goes on, and so do requests of other routes.
    client
        .send(Method::OPTIONS, "/shop", &[], "")
        .await
        .unwrap();
    let reply = client.get("/", &[("origin", "https://shop.example")]).await;
    assert_eq!(reply.header("access-control-allow-origin"), None);
    assert_eq!(upstream.requests(), 9);
}

#[tokio::test]
async fn every_origin_is_a_star_that_no_cache_has_to_tell_apart() {
    for origins in ["[ '*' ]", "[ 'https://any.example', '*' ]"] {
        let (proxy, _upstream) =
            start(&format!("      - cors: {{ allowOrigins: {origins} }}")).await;
        for headers in [
            &[("origin", "https://any.example")][..],
            &[("origin", "https://other.example")],
            &[],
        ] {
            let reply = get(proxy.address(), "/shop", headers).await;
            let allowed = reply.header("access-control-allow-origin");
            assert_eq!(allowed, Some("*"), "{origins} {headers:?}");
            assert_eq!(reply.header("vary"), None, "{origins} {headers:?}");
        }
    }
}
