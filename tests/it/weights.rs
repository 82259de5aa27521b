//! Weights that are set through the admin API: who may, what holds, and what stays of them.

use std::fs;
use std::path::{Path, PathBuf};

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpSocket;

use crate::support::tls::Authority;
use crate::support::{
    Client, Proxy, Raw, Reply, Upstream, eventually, eventually_asked, shop, with_head,
};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const WEIGHTS: &str = "/api/v1/routes/shop/weights";

/// A route whose weights somebody may set.
struct Shop {
    stable: Upstream,
    canary: Upstream,
    proxy: Proxy,
}

impl Shop {
    async fn start() -> Self {
        let (stable, canary) = (
            Upstream::start("stable").await,
            Upstream::start("canary").await,
        );
        let config = config(&stable, &canary, (100, 0));
        let proxy = Proxy::start_with(&config, with_token);
        Self {
            stable,
            canary,
            proxy,
        }
    }

    fn config(&self, weights: (u32, u32)) -> String {
        config(&self.stable, &self.canary, weights)
    }

    async fn ask(&self, method: Method, headers: &[(&str, &str)], body: &Value) -> Reply {
        let mut admin = Client::connect(self.proxy.admin()).await;
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        admin.send(method, WEIGHTS, headers, body).await.unwrap()
    }

    async fn put(&self, stable: u32, canary: u32) -> Reply {
        let weights = json!({ "weights": { "shop-stable": stable, "shop-canary": canary } });
        self.ask(Method::PUT, &[("authorization", &bearer(TOKEN))], &weights)
            .await
    }

    async fn get(&self) -> Value {
        self.ask(Method::GET, &[], &Value::Null).await.json()
    }

    /// What serves a request now.
    async fn served(&self) -> String {
        let mut client = Client::connect(self.proxy.address()).await;
        client.get("/", &[]).await.text().to_owned()
    }

    fn state_file(&self) -> PathBuf {
        self.proxy.directory().join("state.json")
    }

    /// Ends the process, as far as a test can, and starts another one with the same files.
    async fn restart(mut self) -> Self {
        let kept = tempfile::tempdir().unwrap();
        for name in ["serin.yaml", "state.json", "pipeline.token"] {
            let from = self.proxy.directory().join(name);
            if from.exists() {
                fs::copy(from, kept.path().join(name)).unwrap();
            }
        }
        self.proxy.shut_down().await;
        self.proxy = Proxy::start_at(&kept.path().join("serin.yaml"), kept);
        self
    }
}

fn config(stable: &Upstream, canary: &Upstream, weights: (u32, u32)) -> String {
    let admin = "admin: { address: '127.0.0.1:0', writers: [ { name: pipeline, tokenFile: pipeline.token } ] }
stateFile: state.json
";
    admin.to_owned() + &shop(stable.address, canary.address, weights, "")
}

fn with_token(directory: &Path) {
    fs::write(directory.join("pipeline.token"), TOKEN).unwrap();
}

fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

#[tokio::test]
async fn what_is_set_is_in_force_when_the_answer_comes() {
    let shop = Shop::start().await;
    assert_eq!(shop.served().await, "stable");
    eventually_asked("it can be saved", async || {
        shop.get().await["saved"] == true
    })
    .await;
    let before = shop.get().await;
    assert_eq!(before["source"], "file");
    assert_eq!(
        before["weights"],
        json!({ "shop-stable": 100, "shop-canary": 0 })
    );

    let reply = shop.put(0, 7).await;
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(shop.served().await, "canary");
    let set = reply.json();
    assert_eq!(set["source"], "api");
    assert_eq!(set["setBy"], "pipeline");
    assert_eq!(
        set["weights"],
        json!({ "shop-stable": 0, "shop-canary": 7 })
    );
    assert_eq!(set["file"], before["weights"]);
    assert_eq!(set["saved"], true);
    assert_eq!(
        reply.header("etag"),
        Some(&*format!("\"{}\"", set["etag"].as_str().unwrap()))
    );
    assert_eq!(shop.get().await, set);
    let labels = [("route", "shop")];
    assert_eq!(shop.proxy.metric("serin_route_weights_set", &labels), 1.0);
    let labels = [("route", "shop"), ("backend", "shop-canary")];
    assert_eq!(shop.proxy.metric("serin_backend_weight", &labels), 7.0);
    assert_eq!(shop.proxy.metric("serin_state_saved", &[]), 1.0);

    // The same again changes nothing.
    let revision = shop.proxy.revision();
    assert_eq!(shop.put(0, 7).await.json(), set);
    assert_eq!(shop.proxy.revision(), revision);

    let token = bearer(TOKEN);
    let headers = [("authorization", &*token)];
    let reply = shop
        .ask(Method::DELETE, &headers, &Value::Null)
        .await
        .json();
    assert_eq!(reply["source"], "file");
    assert_eq!(reply["etag"], before["etag"]);
    assert_eq!(shop.served().await, "stable");
    let labels = [("route", "shop")];
    assert_eq!(shop.proxy.metric("serin_route_weights_set", &labels), 0.0);
}

#[tokio::test]
async fn only_those_whom_the_configuration_names_may_set_weights() {
    let shop = Shop::start().await;
    let order = json!({ "weights": { "shop-stable": 0, "shop-canary": 1 } });
    let token = bearer(TOKEN);
    for headers in [
        &[][..],
        &[("authorization", "Bearer 0123456789abcdef0123456789abcdeF")],
        &[("authorization", "Bearer ")],
        &[("authorization", "Basic 0123456789abcdef0123456789abcdef")],
        &[("authorization", &token), ("authorization", &token)],
    ] {
        for method in [Method::PUT, Method::DELETE] {
            let reply = shop.ask(method, headers, &order).await;
            assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{headers:?}");
            assert_eq!(
                reply.header("www-authenticate"),
                Some("Bearer realm=\"serin\"")
            );
        }
    }
    assert_eq!(shop.get().await["source"], "file");

    // Another token takes effect as any file does.
    let other = "fedcba9876543210fedcba9876543210";
    let revision = shop.proxy.revision();
    fs::write(shop.proxy.directory().join("pipeline.token"), other).unwrap();
    eventually("the token was read again", || {
        shop.proxy.revision() > revision
    })
    .await;
    assert_eq!(shop.put(0, 1).await.status, StatusCode::UNAUTHORIZED);
    let reply = shop
        .ask(Method::PUT, &[("authorization", &bearer(other))], &order)
        .await;
    assert_eq!(reply.status, StatusCode::OK);

    let nobody = shop
        .config((100, 0))
        .replace("{ name: pipeline, tokenFile: pipeline.token }", "");
    shop.proxy.replace(&nobody).await;
    let reply = shop
        .ask(Method::PUT, &[("authorization", &bearer(other))], &order)
        .await;
    assert_eq!(reply.status, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn a_certificate_says_who_it_is_as_well() {
    let authority = Authority::new("tests");
    let (server, on_call, other) = (
        authority.issue(&["localhost"]),
        authority.issue(&["on-call"]),
        authority.issue(&["somebody"]),
    );
    let upstream = Upstream::start("one").await;
    let admin = "admin:
  address: '127.0.0.1:0'
  tls: { certificates: [ { certificateFile: server.crt, keyFile: server.key } ], clientCa: { file: ca.pem, mode: optional } }
  writers: [ { name: on-call, certificateSubject: 'CN=on-call, O=Serin tests' } ]
";
    let config = admin.to_owned() + &shop(upstream.address, upstream.address, (1, 0), "");
    let proxy = Proxy::start_with(&config, |directory| {
        server.write(directory, "server");
        fs::write(directory.join("ca.pem"), &authority.pem).unwrap();
    });
    let body = r#"{"weights": {"shop-stable": 1, "shop-canary": 1}}"#;
    for (own, status) in [
        (None, StatusCode::UNAUTHORIZED),
        (Some(&other), StatusCode::UNAUTHORIZED),
        (Some(&on_call), StatusCode::OK),
    ] {
        // It offers HTTP/2 as well, which nobody speaks here.
        let client = authority.client_with(&["h2", "http/1.1"], own, rustls::ALL_VERSIONS);
        let mut admin = client.connect(proxy.admin(), "localhost").await;
        assert_eq!(admin.get("/livez", &[]).await.text(), "ok\n");
        let reply = admin.send(Method::PUT, WEIGHTS, &[], body).await.unwrap();
        assert_eq!(reply.status, status);
        if status == StatusCode::OK {
            assert_eq!(reply.json()["setBy"], "on-call");
            let unsaved = "the configuration names no `stateFile`";
            assert_eq!(
                (&reply.json()["saved"], &reply.json()["unsaved"]),
                (&false.into(), &unsaved.into())
            );
        }
    }

    // Whom nobody believes any more is not believed on a connection that stands either.
    let client = authority.client_with(&[], Some(&on_call), rustls::ALL_VERSIONS);
    let mut admin = client.connect(proxy.admin(), "localhost").await;
    let revision = proxy.revision();
    fs::write(
        proxy.directory().join("ca.pem"),
        Authority::new("others").pem,
    )
    .unwrap();
    eventually("the authority is gone", || proxy.revision() > revision).await;
    let reply = admin.send(Method::PUT, WEIGHTS, &[], body).await.unwrap();
    assert_eq!(reply.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn what_does_not_fit_the_route_is_refused_and_changes_nothing() {
    let shop = Shop::start().await;
    let token = bearer(TOKEN);
    let long = "x".repeat(501);
    for (body, status, words) in [
        (
            json!({ "weights": { "shop-stable": 1 } }),
            422,
            "the weight of `shop-canary` is missing",
        ),
        (
            json!({ "weights": { "shop-stable": 1, "shop-canry": 1 } }),
            422,
            "this route has no backend `shop-canry`; did you mean `shop-canary`?",
        ),
        (
            json!({ "weights": { "shop-stable": -1, "shop-canary": 1 } }),
            400,
            "invalid value: integer `-1`",
        ),
        (json!({ "weight": {} }), 400, "unknown field `weight`"),
        (
            json!({ "weights": {}, "reason": long }),
            400,
            "the reason has 501 bytes, more than 500",
        ),
        (Value::Null, 400, "EOF while parsing"),
    ] {
        let reply = shop
            .ask(Method::PUT, &[("authorization", &token)], &body)
            .await;
        assert_eq!(reply.status, status, "{body}");
        let said = reply.json()["error"].as_str().unwrap().to_owned();
        assert!(said.starts_with(words), "{said}");
    }
    assert_eq!(shop.get().await["source"], "file");

    let mut admin = Client::connect(shop.proxy.admin()).await;
    let twice =
        r#"{ "weights": { "shop-stable": 1, "shop-canary": 1, "shop-stable": 2 } }"#.to_owned();
    let large = format!(r#"{{ "reason": "{}" }}"#, "x".repeat(64 * 1024));
    for (body, status, words) in [
        (twice, 400, "`shop-stable` stands there twice"),
        (large, 413, "the body has more than 65536 bytes"),
    ] {
        let mut admin = Client::connect(shop.proxy.admin()).await;
        let headers = [("authorization", &*token)];
        let reply = admin
            .send(Method::PUT, WEIGHTS, &headers, body)
            .await
            .unwrap();
        assert_eq!(reply.status, status);
        let said = reply.json()["error"].as_str().unwrap().to_owned();
        assert!(said.starts_with(words), "{said}");
    }
    assert_eq!(shop.get().await["source"], "file");

    let path = "/api/v1/routes/nobody/weights";
    for method in [Method::GET, Method::DELETE] {
        let reply = admin
            .send(method, path, &[("authorization", &token)], "")
            .await;
        assert_eq!(reply.unwrap().status, StatusCode::NOT_FOUND);
    }
    let reply = admin.send(Method::POST, WEIGHTS, &[], "").await.unwrap();
    assert_eq!(reply.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(reply.header("allow"), Some("GET, PUT, DELETE"));
}

#[tokio::test]
async fn who_says_what_he_has_seen_overwrites_nothing_else() {
    let shop = Shop::start().await;
    let seen = shop.get().await["etag"].as_str().unwrap().to_owned();
    let order = json!({ "weights": { "shop-stable": 50, "shop-canary": 50 } });
    let (token, seen) = (bearer(TOKEN), format!("\"{seen}\""));
    let both = format!("\"0\" , {seen}");
    let shouted = seen.to_uppercase();
    let weak = format!("W/{seen}");
    for (tags, status) in [
        ("\"0123456789abcdef\"", 412),
        (&shouted, 412),
        (&weak, 412),
        ("W/\"0\"", 412),
        (&both, 200),
        (&seen, 412),
        ("*", 200),
    ] {
        let headers = [("authorization", &*token), ("if-match", tags)];
        let reply = shop.ask(Method::PUT, &headers, &order).await;
        assert_eq!(reply.status, status, "{tags}");
        // What is in force is said in either case.
        assert_eq!(reply.json()["route"], "shop");
    }
}

#[tokio::test]
async fn the_later_word_wins() {
    let shop = Shop::start().await;
    shop.put(0, 1).await;
    // The same once more, as a GitOps controller writes it, and something about everything else.
    let more = "connections: { max: 1000 }\n";
    shop.proxy.replace(&(shop.config((100, 0)) + more)).await;
    assert_eq!(shop.served().await, "canary");
    // A problem changes nothing.
    shop.proxy.write(
        &shop
            .config((100, 0))
            .replace("name: shop-canary, weight", "name: nobody, weight"),
    );
    eventually("it was refused", || {
        shop.proxy
            .metric("serin_config_last_reload_successful", &[])
            == 0.0
    })
    .await;
    assert_eq!(shop.served().await, "canary");

    shop.proxy.replace(&shop.config((99, 0))).await;
    assert_eq!(shop.served().await, "stable");
    assert_eq!(shop.get().await["source"], "file");
    // The old weights in the file are a later word as well.
    shop.proxy.replace(&shop.config((100, 0))).await;
    assert_eq!(shop.served().await, "stable");
    let written = || fs::read_to_string(shop.state_file()).unwrap();
    eventually("nothing is kept", || !written().contains("shop")).await;
}

#[tokio::test]
async fn what_is_set_outlives_the_process_unless_the_file_was_edited_meanwhile() {
    let shop = Shop::start().await;
    shop.put(0, 1).await;
    let shop = shop.restart().await;
    let set = shop.get().await;
    assert_eq!(
        (&set["source"], &set["setBy"]),
        (&"api".into(), &"pipeline".into())
    );
    assert_eq!(shop.served().await, "canary");

    let edited = fs::read_to_string(shop.proxy.config_file()).unwrap();
    let state = fs::read(shop.state_file()).unwrap();
    let other = tempfile::tempdir().unwrap();
    fs::write(
        other.path().join("serin.yaml"),
        edited.replace("weight: 100", "weight: 101"),
    )
    .unwrap();
    fs::write(other.path().join("state.json"), state).unwrap();
    with_token(other.path());
    let proxy = Proxy::start_at(&other.path().join("serin.yaml"), other);
    let shop = Shop { proxy, ..shop };
    assert_eq!(shop.get().await["source"], "file");
    assert_eq!(shop.served().await, "stable");
    let written = || fs::read_to_string(shop.state_file()).unwrap();
    eventually("it is forgotten for good", || !written().contains("shop")).await;
}

#[tokio::test]
async fn a_state_file_that_is_none_costs_nobody_the_start_and_is_left_as_it_is() {
    let shop = Shop::start().await;
    shop.put(0, 1).await;
    fs::write(shop.state_file(), "{ half").unwrap();
    let shop = shop.restart().await;
    assert_eq!(shop.get().await["source"], "file");
    let set = shop.put(0, 1).await.json();
    assert_eq!(
        (&set["source"], &set["saved"]),
        (&"api".into(), &false.into())
    );
    let words = "what is there cannot be used: ";
    assert!(set["unsaved"].as_str().unwrap().starts_with(words), "{set}");
    assert_eq!(fs::read_to_string(shop.state_file()).unwrap(), "{ half");
    fs::remove_file(shop.state_file()).unwrap();
    eventually_asked("it is saved", async || shop.get().await["saved"] == true).await;
}

#[tokio::test]
async fn a_successor_takes_up_what_was_set_while_it_started_and_writes_nothing_before_it_serves() {
    let shop = Shop::start().await;
    shop.put(0, 1).await;
    // It begins with an edited file, and so without what was set.
    let edited = shop.config((99, 1));
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state.json");
    with_token(directory.path());
    fs::write(directory.path().join("serin.yaml"), with_head(&edited)).unwrap();
    fs::copy(shop.state_file(), &state).unwrap();
    let before = fs::read_to_string(&state).unwrap();
    let successor = Proxy::prepare_in(directory);
    assert_eq!(fs::read_to_string(&state).unwrap(), before);
    // What the process before has set meanwhile.
    let meanwhile = before
        .replace("100", "99")
        .replace("\"shop-canary\": 0", "\"shop-canary\": 1");
    fs::write(&state, meanwhile).unwrap();
    successor.app().open();
    let shop = Shop {
        proxy: successor,
        ..shop
    };
    eventually_asked("it is in force", async || {
        shop.get().await["source"] == "api"
    })
    .await;
    assert_eq!(shop.served().await, "canary");
}

#[tokio::test]
async fn weights_take_effect_while_they_cannot_be_saved_and_are_saved_later() {
    let shop = Shop::start().await;
    eventually_asked("it was saved", async || shop.get().await["saved"] == true).await;
    // Where the file should be, there is a directory that is not empty.
    fs::remove_file(shop.state_file()).unwrap();
    fs::create_dir_all(shop.state_file().join("full")).unwrap();
    let set = shop.put(0, 1).await.json();
    assert_eq!(set["saved"], false);
    assert!(
        set["unsaved"].as_str().unwrap().contains("directory"),
        "{set}"
    );
    assert_eq!(shop.served().await, "canary");
    assert_eq!(shop.proxy.metric("serin_state_saved", &[]), 0.0);
    fs::remove_dir_all(shop.state_file()).unwrap();
    eventually_asked("it is saved", async || shop.get().await["saved"] == true).await;
    assert!(
        fs::read_to_string(shop.state_file())
            .unwrap()
            .contains("shop-canary")
    );
}

#[tokio::test]
async fn who_sends_far_too_much_hears_of_it() {
    let shop = Shop::start().await;
    let socket = TcpSocket::new_v4().unwrap();
    // What is not read cannot be sent.
    socket.set_send_buffer_size(4096).unwrap();
    let mut raw = Raw::over(socket.connect(shop.proxy.admin()).await.unwrap());
    let token = bearer(TOKEN);
    raw.send(&format!(
        "PUT {WEIGHTS} HTTP/1.1\r\nhost: a\r\nauthorization: {token}\r\ncontent-length: 1000000\r\n\r\n"
    ))
    .await;
    raw.send(&" ".repeat(1_000_000)).await;
    raw.read_until("HTTP/1.1 413 Payload Too Large\r\n").await;
}

#[tokio::test]
async fn who_sends_too_slowly_hears_of_it() {
    let shop = Shop::start().await;
    let mut raw = Raw::connect(shop.proxy.admin()).await;
    let token = bearer(TOKEN);
    raw.send(&format!(
        "PUT {WEIGHTS} HTTP/1.1\r\nhost: a\r\nauthorization: {token}\r\ncontent-length: 2\r\n\r\n{{"
    ))
    .await;
    raw.read_until("HTTP/1.1 408 Request Timeout\r\n").await;
}
