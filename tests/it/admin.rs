//! The admin listener.

use std::fs;

use http::{Method, StatusCode};
use serin::descriptors::{admin_connections, limit};

use crate::support::{Client, Proxy, Raw, Upstream, eventually, get, shop, single};

#[tokio::test]
async fn probes_answer_and_readiness_ends_with_the_drain() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    for (path, words) in [
        ("/livez", "ok\n"),
        ("/readyz", "ready\n"),
        ("/healthz", "ready\n"),
    ] {
        let reply = get(proxy.admin(), path, &[]).await;
        assert_eq!((reply.status, reply.text()), (StatusCode::OK, words));
    }
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("a request keeps the drain waiting", || upstream.held() == 1).await;
    let admin = proxy.admin();
    let mut probe = Client::connect(admin).await;
    let drain = tokio::spawn(proxy.shut_down());
    while probe.get("/readyz", &[]).await.status != StatusCode::SERVICE_UNAVAILABLE {
        tokio::task::yield_now().await;
    }
    assert_eq!(probe.get("/livez", &[]).await.status, StatusCode::OK);
    upstream.release();
    drain.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readiness_and_connections_wait_until_endpoints_have_been_asked() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let check = "version: '2', healthCheck: { http: { path: /hold }, interval: 1h, timeout: 10m },";
    let config = shop(stable.address, canary.address, (0, 1), "");
    let proxy = Proxy::prepare(&config.replace("version: '2',", check));
    eventually("the canary is asked", || canary.held() == 1).await;
    let mut early = Raw::connect(proxy.address()).await;
    early.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let ready = get(proxy.admin(), "/readyz", &[]).await;
    assert_eq!(ready.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(ready.text(), "starting\n");
    assert_eq!(get(proxy.admin(), "/livez", &[]).await.text(), "ok\n");
    canary.release();
    proxy.app().await_first_checks();
    proxy.app().open();
    assert_eq!(get(proxy.admin(), "/readyz", &[]).await.text(), "ready\n");
    early.read_until("\r\n\r\ncanary").await;
}

#[tokio::test]
async fn metrics_are_in_the_text_format() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    get(proxy.address(), "/", &[]).await;
    let reply = get(proxy.admin(), "/metrics", &[]).await;
    assert_eq!(
        reply.header("content-type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    let text = reply.text();
    for name in [
        "serin_build_info{version=",
        "serin_config_info{revision=\"1\",hash=",
        "process_resident_memory_bytes",
    ] {
        assert!(text.contains(name), "{name} in {text}");
    }
    for line in text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
    {
        let name = line.split(['{', ' ']).next().unwrap();
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .unwrap_or(name);
        let known = |name: &str| {
            text.contains(&format!("# TYPE {name} ")) && text.contains(&format!("# HELP {name} "))
        };
        assert!(known(name) || known(family), "{name} has no type or help");
    }
}

#[tokio::test]
async fn the_api_shows_what_is_in_force() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let proxy = Proxy::start(&shop(stable.address, canary.address, (95, 5), ""));
    let config = get(proxy.admin(), "/api/v1/config", &[]).await.json();
    assert_eq!(config["revision"], 1);
    assert_eq!(config["config"]["routes"][0]["backendRefs"][1]["weight"], 5);
    let routes = get(proxy.admin(), "/api/v1/routes", &[]).await.json();
    assert_eq!(
        (&routes[0]["name"], &routes[0]["baseline"]),
        (&"shop".into(), &"shop-stable".into())
    );
    assert_eq!(routes[0]["backends"][1]["sharePercent"], 5.0);
    let backends = get(proxy.admin(), "/api/v1/backends", &[]).await.json();
    assert_eq!(
        backends[0]["endpoints"][0]["address"],
        stable.address.to_string()
    );
    let status = get(proxy.admin(), "/api/v1/config/status", &[])
        .await
        .json();
    assert_eq!(
        (&status["revision"], &status["lastAttemptSuccessful"]),
        (&1.into(), &true.into())
    );
}

#[tokio::test]
async fn a_reload_by_call_answers_with_the_revision_or_with_the_problems() {
    let upstream = Upstream::start("one").await;
    let good = single(upstream.address, "");
    let proxy = Proxy::start(&good);
    let mut admin = Client::connect(proxy.admin()).await;
    let reply = admin
        .send(Method::POST, "/api/v1/reload", &[], "")
        .await
        .unwrap();
    assert_eq!(
        (reply.status, &reply.json()["revision"]),
        (StatusCode::OK, &2.into())
    );

    proxy.write(&good.replace("name: only }", "name: nobody }"));
    let reply = admin
        .send(Method::POST, "/api/v1/reload", &[], "")
        .await
        .unwrap();
    assert_eq!(reply.status, StatusCode::UNPROCESSABLE_ENTITY);
    let problem = &reply.json()["problems"][0];
    assert_eq!(problem["message"], "unknown backend `nobody`");
    assert!(
        problem["line"].as_u64() > Some(1) && problem["column"].as_u64() > Some(1),
        "{problem}"
    );
}

#[tokio::test]
async fn explain_says_what_the_proxy_then_does() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let rest = "    gray: { identity: [ { header: x-user-id } ], rules: [ { name: qa, path: { value: /qa }, backend: shop-canary } ] }\n";
    let proxy = Proxy::start(&shop(stable.address, canary.address, (50, 50), rest));
    let mut admin = Client::connect(proxy.admin()).await;
    let mut client = Client::connect(proxy.address()).await;
    for user in 0..100 {
        let user = format!("user-{user}");
        let question = serde_json::json!({ "host": "shop.example.com", "path": "/a?b=c", "headers": { "x-user-id": user } });
        let reply = admin
            .send(Method::POST, "/api/v1/explain", &[], question.to_string())
            .await
            .unwrap()
            .json();
        let served = client.get("/", &[("x-user-id", &user)]).await;
        assert_eq!(
            reply["decision"]["version"],
            *served.header("x-service-version").unwrap(),
            "{reply}"
        );
        assert_eq!(
            (&reply["route"], &reply["decision"]["reason"]),
            (&"shop".into(), &"sticky".into())
        );
        let enters = reply["backends"][1]["userEntersAtPercent"]
            .as_f64()
            .unwrap();
        assert_eq!(enters < 50.0, served.text() == "canary", "{enters}");
    }
    let question = serde_json::json!({ "host": "any", "path": "/qa/1" });
    let reply = admin
        .send(Method::POST, "/api/v1/explain", &[], question.to_string())
        .await
        .unwrap()
        .json();
    assert_eq!(
        (&reply["decision"]["reason"], &reply["decision"]["rule"]),
        (&"rule".into(), &"qa".into())
    );
    let headers =
        serde_json::json!({ "host": "any", "headers": { "x-user-id": "a", "X-User-Id": "b" } });
    let reply = admin
        .send(Method::POST, "/api/v1/explain", &[], headers.to_string())
        .await
        .unwrap()
        .json();
    assert!(
        reply["refused"].as_str().unwrap().contains("repeated") && reply["decision"].is_null(),
        "{reply}"
    );
    let reply = admin
        .send(Method::POST, "/api/v1/explain", &[], "{}")
        .await
        .unwrap();
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn other_paths_and_methods_are_refused_with_what_there_is() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut admin = Client::connect(proxy.admin()).await;
    let reply = admin.get("/nothing", &[]).await;
    assert_eq!(reply.status, StatusCode::NOT_FOUND);
    assert!(reply.text().contains("/api/v1/config/status"));
    let reply = admin.get("/api/v1/reload", &[]).await;
    assert_eq!(
        (reply.status, reply.header("allow")),
        (StatusCode::METHOD_NOT_ALLOWED, Some("POST"))
    );
    let reply = admin
        .send(Method::DELETE, "/metrics", &[], "")
        .await
        .unwrap();
    assert_eq!(
        (reply.status, reply.header("allow")),
        (StatusCode::METHOD_NOT_ALLOWED, Some("GET"))
    );
}

#[tokio::test]
async fn the_admin_api_cannot_be_reached_through_the_data_listener() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(
        upstream.address,
        "    matches: [ { path: { value: /shop } } ]\n",
    ));
    for path in ["/metrics", "/api/v1/config", "/livez"] {
        assert_eq!(
            get(proxy.address(), path, &[]).await.status,
            StatusCode::NOT_FOUND
        );
    }
}

#[test]
fn the_readme_lists_every_metric_and_no_other() {
    let readme = fs::read_to_string("README.md").unwrap();
    let listed: std::collections::BTreeSet<&str> = readme
        .split('`')
        .skip(1)
        .step_by(2)
        .map(|code| code.split('{').next().unwrap())
        .filter(|code| code.starts_with("serin_") && !code.contains('*'))
        .collect();
    let defined = serin::telemetry::metrics::documented()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(listed, defined);
}

#[tokio::test]
async fn whoever_holds_connections_to_the_admin_listener_keeps_nobody_out() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut others = Vec::new();
    for _ in 0..admin_connections(limit()) {
        let mut other = Client::connect(proxy.admin()).await;
        assert_eq!(other.get("/livez", &[]).await.status, StatusCode::OK);
        others.push(other);
    }
    let mut late = Client::connect(proxy.admin()).await;
    assert_eq!(late.get("/livez", &[]).await.status, StatusCode::OK);
    let mut answered = Vec::new();
    for mut other in others {
        answered.push(other.send(Method::GET, "/livez", &[], "").await.is_ok());
    }
    assert!(!answered[0], "the oldest made room");
    assert!(answered[1..].iter().all(|is_answered| *is_answered));
}
