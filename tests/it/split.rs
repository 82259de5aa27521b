//! Who gets which version, seen from the client.

use std::collections::HashMap;
use std::fs;

use crate::support::{Client, Proxy, Raw, Upstream, eventually, get, shop};

const IDENTITY: &str =
    "      identity: [ { header: x-user-id }, { cookie: uid }, { query: user_id } ]\n";

async fn pair() -> (Upstream, Upstream) {
    (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    )
}

/// The version that a request gets.
async fn version(client: &mut Client, path: &str, headers: &[(&str, &str)]) -> String {
    client
        .get(path, headers)
        .await
        .header("x-service-version")
        .unwrap()
        .to_owned()
}

#[tokio::test]
async fn the_split_follows_the_weights_and_every_user_stays_where_he_is() {
    const USERS: usize = 4000;
    let (stable, canary) = pair().await;
    let proxy = Proxy::start(&shop(
        stable.address,
        canary.address,
        (80, 20),
        &format!("    gray:\n{IDENTITY}"),
    ));
    let mut client = Client::connect(proxy.address()).await;
    let mut versions = HashMap::new();
    for round in 0..2 {
        for user in 0..USERS {
            let user = format!("user-{user}");
            let version = version(&mut client, "/", &[("x-user-id", &user)]).await;
            let before = versions.insert(user.clone(), version.clone());
            assert!(
                round == 0 || before == Some(version),
                "{user} changed sides"
            );
        }
    }
    let on_canary = versions.values().filter(|version| *version == "2").count();
    // Four standard deviations of a binomial with 4000 draws at 20 %.
    assert!(
        on_canary.abs_diff(USERS / 5) < 102,
        "{on_canary} of {USERS} on the canary"
    );
    assert_eq!(
        (stable.requests(), canary.requests()),
        (2 * (USERS - on_canary), 2 * on_canary)
    );
    assert_eq!(
        proxy.metric("serin_routing_decisions_total", &[("reason", "sticky")]),
        2.0 * USERS as f64
    );
}

#[tokio::test]
async fn header_cookie_and_query_name_the_same_user() {
    let (stable, canary) = pair().await;
    let proxy = Proxy::start(&shop(
        stable.address,
        canary.address,
        (50, 50),
        &format!("    gray:\n{IDENTITY}"),
    ));
    let mut client = Client::connect(proxy.address()).await;
    for user in 0..50 {
        let id = format!("user-{user}");
        let by_header = version(&mut client, "/", &[("x-user-id", &id)]).await;
        let by_cookie = version(&mut client, "/", &[("cookie", &format!("a=b; uid={id}"))]).await;
        let by_query = version(&mut client, &format!("/?user_id=user%2D{user}"), &[]).await;
        assert_eq!(
            (by_header.as_str(), by_header.as_str()),
            (by_cookie.as_str(), by_query.as_str()),
            "{id}"
        );
    }
}

#[tokio::test]
async fn deny_list_beats_override_beats_user_list_beats_rule_beats_weight() {
    let (stable, canary) = pair().await;
    let rest = format!(
        "    gray:\n{IDENTITY}      denyList: bots
      override: {{ header: x-canary, cookie: canary }}
      rules:
        - {{ name: qa, header: {{ name: x-qa, value: 'yes' }}, backend: shop-stable }}
        - {{ name: beta, userList: beta, backend: shop-canary }}
userLists:
  - {{ name: beta, file: beta.txt }}
  - {{ name: bots, file: bots.txt }}
"
    );
    let proxy = Proxy::start_with(
        &shop(stable.address, canary.address, (0, 1), &rest),
        |directory| {
            fs::write(directory.join("beta.txt"), "ann\nbot\n").unwrap();
            fs::write(directory.join("bots.txt"), "bot\n").unwrap();
        },
    );
    let mut client = Client::connect(proxy.address()).await;
    for (headers, expected, reason) in [
        (&[("x-user-id", "eve")][..], "2", "sticky"),
        (&[("x-user-id", "eve"), ("x-qa", "yes")], "1", "rule"),
        (&[("x-user-id", "ann"), ("x-qa", "yes")], "2", "user_list"),
        (
            &[("x-user-id", "ann"), ("x-canary", "shop-stable")],
            "1",
            "override",
        ),
        (
            &[("x-user-id", "ann"), ("cookie", "canary=1")],
            "1",
            "override",
        ),
        (
            &[("x-user-id", "ann"), ("x-canary", "no-such-version")],
            "2",
            "user_list",
        ),
        (
            &[("x-user-id", "bot"), ("x-canary", "shop-canary")],
            "1",
            "deny_list",
        ),
        (&[], "2", "random"),
    ] {
        let before = proxy.metric("serin_routing_decisions_total", &[("reason", reason)]);
        assert_eq!(
            version(&mut client, "/", headers).await,
            expected,
            "{headers:?}"
        );
        let after = proxy.metric("serin_routing_decisions_total", &[("reason", reason)]);
        assert_eq!(after, before + 1.0, "{headers:?}");
    }
}

#[tokio::test]
async fn users_of_a_disabled_or_empty_canary_get_the_baseline_and_nobody_else_moves() {
    let (stable, canary) = pair().await;
    let config = shop(
        stable.address,
        canary.address,
        (50, 50),
        &format!("    gray:\n{IDENTITY}"),
    );
    let proxy = Proxy::start(&config);
    let mut client = Client::connect(proxy.address()).await;
    let mut before = HashMap::new();
    for user in 0..100 {
        let id = format!("user-{user}");
        before.insert(
            id.clone(),
            version(&mut client, "/", &[("x-user-id", &id)]).await,
        );
    }
    let address = canary.address.to_string();
    let disabled = config.replace(
        &format!("['{address}']"),
        &format!("['{address}'], disabled: true"),
    );
    let empty = config.replace(&format!("'{address}'"), "");
    for out_of_service in [disabled, empty] {
        proxy.replace(&out_of_service).await;
        let seen = canary.requests();
        for id in before.keys() {
            assert_eq!(version(&mut client, "/", &[("x-user-id", id)]).await, "1");
        }
        assert_eq!(canary.requests(), seen);
        proxy.replace(&config).await;
        for (id, version_before) in &before {
            assert_eq!(
                version(&mut client, "/", &[("x-user-id", id)]).await,
                *version_before,
                "{id}"
            );
        }
    }
    let on_canary = before.values().filter(|version| *version == "2").count() as f64;
    assert_eq!(
        proxy.metric("serin_routing_decisions_total", &[("reason", "failover")]),
        2.0 * on_canary
    );
}

#[tokio::test]
async fn strangers_get_a_cookie_and_keep_their_version() {
    let (stable, canary) = pair().await;
    let rest = format!("    gray:\n{IDENTITY}      withoutIdentity: cookie\n");
    let proxy = Proxy::start(&shop(stable.address, canary.address, (50, 50), &rest));
    let mut client = Client::connect(proxy.address()).await;
    let mut seen = std::collections::HashSet::new();
    for _ in 0..30 {
        let first = client.get("/", &[]).await;
        let cookie = first.header("set-cookie").unwrap();
        assert!(
            cookie.starts_with("serin-id=") && cookie.ends_with("; HttpOnly; SameSite=Lax"),
            "{cookie}"
        );
        let pair = cookie.split(';').next().unwrap().to_owned();
        assert_eq!(first.header("cache-control"), Some("private"));
        assert!(seen.insert(pair.clone()), "an id was issued twice");
        let again = client.get("/", &[("cookie", &pair)]).await;
        assert_eq!(
            again.header("x-service-version"),
            first.header("x-service-version")
        );
        assert_eq!(again.header("set-cookie"), None);
    }
    let known = client.get("/", &[("x-user-id", "ann")]).await;
    assert_eq!(known.header("set-cookie"), None);
}

#[tokio::test]
async fn an_id_is_issued_beside_what_the_service_says_about_caches() {
    for (said, sent) in [
        ("no-store, max-age=0", vec!["no-store, max-age=0"]),
        ("private, max-age=9", vec!["private, max-age=9"]),
        ("max-age=9", vec!["max-age=9", "private"]),
    ] {
        let answer =
            format!("HTTP/1.1 200 OK\r\ncache-control: {said}\r\ncontent-length: 0\r\n\r\n");
        let upstream = crate::support::upstream::scripted(answer.leak().as_bytes()).await;
        let rest = format!("    gray:\n{IDENTITY}      withoutIdentity: cookie\n");
        let proxy = Proxy::start(&shop(upstream, upstream, (50, 50), &rest));
        let reply = get(proxy.address(), "/", &[]).await;
        assert!(reply.header("set-cookie").is_some());
        let lines: Vec<&str> = reply
            .headers
            .get_all("cache-control")
            .iter()
            .map(|line| line.to_str().unwrap())
            .collect();
        assert_eq!(lines, sent);
    }
}

#[tokio::test]
async fn only_trusted_proxies_say_who_the_user_is_where_the_route_says_so() {
    let (stable, canary) = pair().await;
    let rest = "    gray:
      identity: [ { header: x-user-id } ]
      identityFrom: trusted
      withoutIdentity: baseline
      override: { header: x-canary }
      rules: [ { name: beta, userList: beta, backend: shop-canary } ]
userLists: [ { name: beta, file: beta.txt } ]
";
    let config = shop(stable.address, canary.address, (1, 0), rest);
    let write_list =
        |directory: &std::path::Path| fs::write(directory.join("beta.txt"), "ann\n").unwrap();
    let headers = [("x-user-id", "ann"), ("x-canary", "shop-canary")];

    let strangers = Proxy::start_with(&config, write_list);
    assert_eq!(
        get(strangers.address(), "/", &headers).await.text(),
        "stable"
    );
    let seen = get(strangers.address(), "/head", &headers).await;
    assert!(
        !seen.text().contains("ann") && !seen.text().contains("x-canary"),
        "{}",
        seen.text()
    );

    let trusting =
        "listeners: [ { name: web, address: '127.0.0.1:0', trustedProxies: ['127.0.0.1'] } ]\n";
    let proxied = Proxy::start_with(&(trusting.to_owned() + &config), write_list);
    assert_eq!(get(proxied.address(), "/", &headers).await.text(), "canary");
    assert!(
        get(proxied.address(), "/head", &headers)
            .await
            .text()
            .contains("x-user-id: ann")
    );
}

#[tokio::test]
async fn a_signed_token_is_believed_from_anybody_and_reaches_the_upstream() {
    let (stable, canary) = pair().await;
    let rest = "    gray:
      identity: [ { jwtClaim: { name: sub, keyFile: key.pem } } ]
      identityFrom: trusted
      rules: [ { name: beta, userList: beta, backend: shop-canary } ]
userLists: [ { name: beta, file: beta.txt } ]
";
    let proxy = Proxy::start_with(
        &shop(stable.address, canary.address, (1, 0), rest),
        |directory| {
            fs::copy(
                "src/routing/gray/testdata/ec-public.pem",
                directory.join("key.pem"),
            )
            .unwrap();
            fs::write(directory.join("beta.txt"), "ann\n").unwrap();
        },
    );
    let private = fs::read("src/routing/gray/testdata/ec-private.pem").unwrap();
    let key = jsonwebtoken::EncodingKey::from_ec_pem(&private).unwrap();
    let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
    let token = jsonwebtoken::encode(&header, &serde_json::json!({ "sub": "ann" }), &key).unwrap();
    let bearer = format!("Bearer {token}");
    assert_eq!(
        get(proxy.address(), "/", &[("authorization", &bearer)])
            .await
            .text(),
        "canary"
    );
    let seen = get(proxy.address(), "/head", &[("authorization", &bearer)]).await;
    assert!(seen.text().contains(&bearer), "{}", seen.text());
    let forged = format!("{bearer}x");
    assert_eq!(
        get(proxy.address(), "/", &[("authorization", &forged)])
            .await
            .text(),
        "stable"
    );
}

#[tokio::test]
async fn client_addresses_are_matched_behind_trusted_proxies() {
    let (stable, canary) = pair().await;
    let rest = "    gray:
      rules: [ { name: office, clientCidrs: ['10.1.0.0/16'], backend: shop-canary } ]
listeners: [ { name: web, address: '127.0.0.1:0', trustedProxies: ['127.0.0.1', '192.168.0.0/16'] } ]
";
    let proxy = Proxy::start(&shop(stable.address, canary.address, (1, 0), rest));
    for (forwarded, expected) in [
        ("10.1.2.3", "canary"),
        ("10.1.2.3, 192.168.7.7", "canary"),
        ("10.1.2.3, 8.8.8.8", "stable"),
        ("10.1.2.3, nonsense", "stable"),
        ("10.2.0.1", "stable"),
    ] {
        let reply = get(proxy.address(), "/", &[("x-forwarded-for", forwarded)]).await;
        assert_eq!(reply.text(), expected, "{forwarded}");
    }
}

#[tokio::test]
async fn responses_say_what_they_depend_on_and_who_may_know_sees_why() {
    let (stable, canary) = pair().await;
    let rest = format!("    gray:\n{IDENTITY}      debugClients: ['127.0.0.0/8']\n");
    let config = shop(stable.address, canary.address, (1, 0), &rest);
    let proxy = Proxy::start(&config);
    let reply = get(proxy.address(), "/", &[("x-user-id", "user-1")]).await;
    assert_eq!(reply.header("vary"), Some("x-user-id, cookie"));
    let decision = reply.header("x-serin-decision").unwrap();
    assert!(
        decision.starts_with("route=shop; backend=shop-stable; reason=sticky; rule=-; bucket="),
        "{decision}"
    );
    assert!(decision.ends_with("revision=1"), "{decision}");

    proxy
        .replace(&config.replace("127.0.0.0/8", "10.0.0.0/8"))
        .await;
    assert_eq!(
        get(proxy.address(), "/", &[])
            .await
            .header("x-serin-decision"),
        None
    );
    proxy
        .replace(&(config.replace("debugClients: ['127.0.0.0/8']", "vary: [x-user-id]")))
        .await;
    assert_eq!(
        get(proxy.address(), "/", &[]).await.header("vary"),
        Some("x-user-id")
    );
}

#[tokio::test]
async fn routes_are_chosen_by_host_and_path() {
    let (one, two) = pair().await;
    let config = format!(
        "backends:
  - {{ name: one, endpoints: ['{}'] }}
  - {{ name: two, endpoints: ['{}'] }}
routes:
  - name: general
    hostnames: ['*.example.com']
    backendRefs: [ {{ name: one }} ]
  - name: cart
    hostnames: ['shop.example.com']
    matches: [ {{ path: {{ type: PathPrefix, value: /cart }}, method: GET }} ]
    backendRefs: [ {{ name: two }} ]
",
        one.address, two.address
    );
    let proxy = Proxy::start(&config);
    for (host, path, expected) in [
        ("shop.example.com", "/cart", "canary"),
        ("SHOP.example.com:8080", "/cart/1?a=b", "canary"),
        ("shop.example.com", "/cartoon", "stable"),
        ("a.b.example.com", "/cart", "stable"),
    ] {
        assert_eq!(
            get(proxy.address(), path, &[("host", host)]).await.text(),
            expected,
            "{host}{path}"
        );
    }
    assert_eq!(
        get(proxy.address(), "/", &[("host", "example.com")])
            .await
            .status
            .as_u16(),
        404
    );
}

#[tokio::test]
async fn one_long_connection_is_split_request_by_request() {
    let (stable, canary) = pair().await;
    let proxy = Proxy::start(&shop(stable.address, canary.address, (50, 50), ""));
    let mut raw = Raw::connect(proxy.address()).await;
    for _ in 0..200 {
        raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        raw.read_until("\r\n\r\n").await;
    }
    eventually("all have been counted", || {
        stable.requests() + canary.requests() == 200
    })
    .await;
    assert!(stable.requests() > 50 && canary.requests() > 50);
}

#[tokio::test]
async fn the_baseline_is_told_from_other_versions_and_bytes_are_counted_by_version() {
    let (stable, canary) = pair().await;
    let config = {
        shop(
            stable.address,
            canary.address,
            (1, 0),
            "    gray:
      rules: [ { name: qa, header: { name: x-qa, value: '1' }, backend: shop-canary } ]
",
        )
    };
    let proxy = Proxy::start(&config);
    let mut client = Client::connect(proxy.address()).await;
    let headers = [("x-qa", "1")];
    let sent = client.send(http::Method::POST, "/echo", &headers, "hello");
    assert_eq!(sent.await.unwrap().text(), "hello");
    client.get("/bytes/1000", &[]).await;
    for (backend, is_baseline, from_client, to_client) in [
        ("shop-stable", 1.0, 0.0, 1000.0),
        ("shop-canary", 0.0, 5.0, 5.0),
    ] {
        let labels = [("route", "shop"), ("backend", backend)];
        let value = |name| proxy.metric(name, &labels);
        eventually("they are counted", || {
            value("serin_response_bytes_total") == to_client
        })
        .await;
        assert_eq!(value("serin_request_bytes_total"), from_client, "{backend}");
        assert_eq!(value("serin_baseline_info"), is_baseline, "{backend}");
    }
    // The canary has become the stable version.
    let other = config.replace(
        "name: shop-stable, weight: 1",
        "name: shop-canary, weight: 1",
    );
    proxy
        .replace(&other.replace("      - { name: shop-canary, weight: 0 }\n", ""))
        .await;
    let is_baseline = |backend| proxy.metric("serin_baseline_info", &[("backend", backend)]);
    assert_eq!(
        (is_baseline("shop-stable"), is_baseline("shop-canary")),
        (0.0, 1.0)
    );
}
