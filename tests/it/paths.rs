//! One form of a path for the decision and for the endpoint, and what has none.

use std::net::SocketAddr;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use crate::support::upstream::read_head;
use crate::support::{Client, Proxy, Raw, Upstream, explain, get, single};

/// The status of a request for this target, and the path that the endpoint has seen.
async fn ask(proxy: &Proxy, target: &str) -> (u16, Option<String>) {
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send(&format!(
        "GET {target} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    ))
    .await;
    let reply = raw.read_to_end().await;
    let status = reply.split(' ').nth(1).unwrap().parse().unwrap();
    let seen = reply
        .lines()
        .find_map(|line| line.strip_prefix("GET ")?.strip_suffix(" HTTP/1.1"));
    (status, seen.map(str::to_owned))
}

/// A route for `/head` alone, where the upstream tells the head that it has seen.
async fn start() -> (Proxy, Upstream) {
    let upstream = Upstream::start("one").await;
    let config = single(upstream.address, "").replace(
        "name: all\n",
        "name: all\n    matches: [ { path: { value: /head } } ]\n",
    );
    (Proxy::start(&config), upstream)
}

/// An upstream that answers with the request line that it has read.
async fn mirror() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let head = read_head(&mut stream).await;
            let line = head.lines().next().unwrap_or_default();
            let answer = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{line}");
            // The proxy may have gone.
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    address
}

/// The reply to these bytes.
async fn reply_to(proxy: &Proxy, request: &str) -> String {
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send(request).await;
    raw.read_to_end().await
}

#[tokio::test]
async fn what_should_have_been_escaped_is_the_same_as_what_is() {
    let escaped = "/caf%C3%A9/%7B%22%7D";
    for configured in [escaped, "/caf%c3%a9/%7b%22%7d", "/café/{\\\"}"] {
        let matches =
            format!("    matches: [ {{ path: {{ type: Exact, value: \"{configured}\" }} }} ]\n");
        let proxy = Proxy::start(&single(mirror().await, &matches));
        for target in [
            escaped,
            "/caf%c3%A9/%7b\"}",
            "/café/{%22%7D",
            "/c%61fé/{\"}",
        ] {
            assert_eq!(
                ask(&proxy, target).await,
                (200, Some(escaped.to_owned())),
                "{target} at {configured}"
            );
        }
    }
}

#[tokio::test]
async fn what_is_sent_instead_has_the_same_form() {
    for (path, sent) in [
        ("{ replaceFullPath: /%7Eann/é }", "/~ann/%C3%A9"),
        ("{ replacePrefixMatch: /%7Eann }", "/~ann/x"),
    ] {
        let filters = format!("    filters: [ {{ urlRewrite: {{ path: {path} }} }} ]\n");
        let proxy = Proxy::start(&single(mirror().await, &filters));
        assert_eq!(ask(&proxy, "/x").await, (200, Some(sent.to_owned())));
    }
}

#[tokio::test]
async fn the_whole_server_has_no_prefix_to_replace() {
    let filters = "    filters: [ { urlRewrite: { path: { replacePrefixMatch: /pre } } } ]\n";
    let proxy = Proxy::start(&single(mirror().await, filters));
    let request = "OPTIONS * HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let reply = reply_to(&proxy, request).await;
    assert!(reply.contains("OPTIONS * HTTP/1.1"), "{reply}");
}

#[tokio::test]
async fn a_host_in_another_form_leads_nowhere_else() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    for (target, host) in [
        ("/", "shop.example.com:+80"),
        ("/", "shop.example.com.."),
        ("/", "[::1]x"),
        ("/", ""),
        ("ftp://shop.example.com/", "shop.example.com"),
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        let reply = reply_to(&proxy, &request).await;
        assert!(
            reply.starts_with("HTTP/1.1 400 "),
            "{target} {host}: {reply}"
        );
    }
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn what_is_matched_is_what_is_sent_on() {
    let (proxy, _upstream) = start().await;
    for target in ["/head", "/h%65ad", "/%68%65%61%64"] {
        assert_eq!(
            ask(&proxy, target).await,
            (200, Some("/head".to_owned())),
            "{target}"
        );
    }
    let (status, seen) = ask(&proxy, "/h%65ad?q=%2e%2e/%61").await;
    assert_eq!(
        (status, seen.as_deref()),
        (200, Some("/head?q=%2e%2e/%61")),
        "the query stays"
    );
}

#[tokio::test]
async fn what_servers_disagree_about_is_refused() {
    let (proxy, upstream) = start().await;
    for target in [
        "/head/../admin",
        "/head/..",
        "/./head",
        "/head/%2e%2e/admin",
        "/head/.%2E/admin",
        "/head%2f..%2fadmin",
        "/head\\..\\admin",
        "/head%5cadmin",
        "/head%00",
        "/head%",
        "/head%zz",
        "/head%2",
    ] {
        assert_eq!(ask(&proxy, target).await.0, 400, "{target}");
    }
    assert_eq!(upstream.requests(), 0);
    let mut client = Client::h2c(proxy.address()).await;
    assert_eq!(
        client.get("/head/..;/admin", &[]).await.status.as_u16(),
        400
    );
    assert_eq!(client.get("/head/../admin", &[]).await.status.as_u16(), 400);
}

#[tokio::test]
async fn escaped_slashes_are_kept_where_the_route_says_so() {
    let upstream = Upstream::start("one").await;
    for (key, status) in [
        ("", 400),
        ("    escapedSlashes: refuse\n", 400),
        ("    escapedSlashes: keep\n", 200),
    ] {
        let proxy = Proxy::start(&single(upstream.address, key));
        let reply = get(proxy.address(), "/projects/group%2fname", &[]).await;
        assert_eq!(reply.status.as_u16(), status, "{key}");
        let explained = explain(&proxy, "a", "/projects/group%2fname").await;
        assert_eq!(explained["refused"].is_null(), status == 200, "{explained}");
    }
}

#[tokio::test]
async fn targets_and_heads_have_limits() {
    let upstream = Upstream::start("one").await;
    let listener = "listeners: [ { name: web, address: '127.0.0.1:0', limits: { uri: 100, headerFields: 10, requestHead: 8Ki } } ]\n";
    let proxy = Proxy::start(&format!("{listener}{}", single(upstream.address, "")));
    let fields = |count: usize| {
        (0..count)
            .map(|n| format!("x-{n}: 1\r\n"))
            .collect::<String>()
    };
    for (target, more, status) in [
        ("/".to_owned() + &"a".repeat(99), String::new(), 200),
        ("/".to_owned() + &"a".repeat(100), String::new(), 414),
        ("/".to_owned(), fields(8), 200),
        ("/".to_owned(), fields(12), 431),
        ("/".to_owned(), format!("x: {}\r\n", "a".repeat(9000)), 431),
    ] {
        let mut raw = Raw::connect(proxy.address()).await;
        raw.send(&format!("GET {target} HTTP/1.1\r\nhost: a\r\n{more}\r\n"))
            .await;
        let head = raw.read_until("\r\n\r\n").await;
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status} ")),
            "{status}: {head}"
        );
    }
    let mut client = Client::h2c(proxy.address()).await;
    assert_eq!(
        client
            .get(&("/".to_owned() + &"a".repeat(100)), &[])
            .await
            .status
            .as_u16(),
        414
    );
    let names: Vec<String> = (0..12).map(|n| format!("x-{n}")).collect();
    let headers: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "1")).collect();
    assert_eq!(client.get("/", &headers).await.status.as_u16(), 431);
}

#[tokio::test]
async fn a_request_that_comes_round_again_is_a_loop() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let own = format!("listeners: [ {{ name: web, address: '{address}' }} ]\n");
    let proxy = Proxy::start(&format!("{own}{}", single(address, "")));
    let reply = get(proxy.address(), "/", &[]).await;
    assert_eq!(reply.status.as_u16(), 508, "{}", reply.text());
    // Another proxy in front, which calls itself the same, is none.
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let reply = get(
        proxy.address(),
        "/head",
        &[("via", "1.1 serin-00000000, 1.0 other")],
    )
    .await;
    let vias: Vec<&str> = reply
        .text()
        .lines()
        .filter(|line| line.starts_with("via: "))
        .collect();
    assert_eq!(vias.len(), 2, "{vias:?}");
    assert_eq!(vias[0], "via: 1.1 serin-00000000, 1.0 other");
    assert!(vias[1].starts_with("via: 1.1 serin-"), "{vias:?}");
}
