//! The end of a process: no new connections, and requests in flight finish, within a limit.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Empty;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serin::app::{Drained, ENDING_LIMIT};
use serin::config::load::{load, load_list};
use serin::telemetry::process_log::FLUSH_LIMIT;

use crate::cli::Running;
use crate::support::load::Load;
use crate::support::tls::Authority;
use crate::support::{
    Client, PATIENCE, Proxy, Raw, Upstream, eventually, get, metric, single, with_head,
};

#[tokio::test]
async fn requests_in_flight_finish_and_idle_connections_close() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let address = proxy.address();
    let mut idle = Raw::connect(address).await;
    idle.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    idle.read_until("one").await;
    let mut busy = Raw::connect(address).await;
    busy.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request waits", || upstream.held() == 1).await;

    let drain = tokio::spawn(proxy.shut_down());
    assert_eq!(idle.read_to_end().await, "");
    eventually("it accepts no more", || {
        std::net::TcpStream::connect(address).is_err()
    })
    .await;
    upstream.release();
    let reply = busy.read_to_end().await;
    assert!(
        reply.starts_with("HTTP/1.1 200 OK") && reply.ends_with("one"),
        "{reply}"
    );
    assert!(reply.contains("connection: close"), "{reply}");
    assert_eq!(drain.await.unwrap(), Drained::Clean);
}

#[tokio::test]
async fn a_request_that_does_not_finish_is_cut_off_at_the_limit() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&format!(
        "shutdown: {{ timeout: 100ms, lameDuck: 0s }}\n{}",
        single(upstream.address, "")
    ));
    let mut busy = Raw::connect(proxy.address()).await;
    busy.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request waits", || upstream.held() == 1).await;
    assert_eq!(proxy.shut_down().await, Drained::CutOff(1));
    assert_eq!(busy.read_to_end().await, "");
}

/// Clients in steady use, each on one connection: whatever is sent on a connection that stands must
/// be answered.
#[tokio::test]
async fn no_request_on_a_busy_connection_is_lost_when_its_listener_goes_or_the_process_ends() {
    let upstream = Upstream::start("one").await;
    let rest = single(upstream.address, "");
    let listener = |name: &str| format!("{{ name: {name}, address: '127.0.0.1:0' }}");
    let both = format!(
        "listeners: [ {}, {} ]\n{rest}",
        listener("web"),
        listener("gone")
    );
    let proxy = Proxy::start(&both);
    let visit = |address| async move {
        let mut raw = Raw::connect(address).await;
        for served in 0.. {
            raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
            let reply = raw.read_until("\r\n\r\none").await;
            if reply.contains("connection: close") {
                return served;
            }
            tokio::time::sleep(std::time::Duration::from_millis(3)).await;
        }
        0
    };
    for name in ["gone", "web"] {
        let address = proxy.app().listener(name).unwrap();
        let before = upstream.requests();
        let visitors: Vec<_> = (0..20).map(|_| tokio::spawn(visit(address))).collect();
        eventually("all visitors are busy", || {
            upstream.requests() > before + 200
        })
        .await;
        if name == "gone" {
            let left = format!("listeners: [ {} ]\n{rest}", listener("web"));
            proxy.replace(&left).await;
            for visitor in visitors {
                assert!(visitor.await.unwrap() > 0);
            }
        } else {
            let drain = tokio::spawn(proxy.shut_down());
            for visitor in visitors {
                assert!(visitor.await.unwrap() > 0);
            }
            assert_eq!(drain.await.unwrap(), Drained::Clean);
            return;
        }
    }
}

/// They have not spoken yet, each before another step: TLS, a header of the PROXY protocol, and HTTP.
#[tokio::test]
async fn connections_without_a_byte_do_not_hold_up_a_drain() {
    let upstream = Upstream::start("one").await;
    let patient = "timeouts: { firstByte: 10m, tlsHandshake: 10m }";
    let tls = "tls: { certificates: [ { certificateFile: one.crt, keyFile: one.key } ] }";
    let listeners = format!(
        "listeners:
  - {{ name: web, address: '127.0.0.1:0', {patient} }}
  - {{ name: tls, address: '127.0.0.1:0', {patient}, {tls} }}
  - {{ name: header, address: '127.0.0.1:0', {patient}, proxyProtocol: true, trustedProxies: ['127.0.0.0/8'] }}
"
    );
    let config = format!(
        "{listeners}shutdown: {{ timeout: 60s, lameDuck: 0s }}\n{}",
        single(upstream.address, "")
    );
    let proxy = Proxy::start_with(&config, |directory| {
        let identity = Authority::new("tests").issue(&["a"]);
        identity.write(directory, "one");
    });
    let mut silent = Vec::new();
    for name in ["web", "tls", "header"] {
        silent.push(Raw::connect(proxy.app().listener(name).unwrap()).await);
    }
    let served = || proxy.app().connections().iter().sum::<usize>();
    eventually("they are served", || served() == silent.len()).await;
    assert_eq!(proxy.shut_down().await, Drained::Clean);
    for mut client in silent {
        assert_eq!(client.read_to_end().await, "");
    }
}

#[tokio::test]
async fn a_connection_in_the_queue_is_still_served() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let address = proxy.address();
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(Raw::connect(address).await);
    }
    for client in &mut clients {
        client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    }
    let drain = tokio::spawn(proxy.shut_down());
    for client in &mut clients {
        let reply = client.read_to_end().await;
        assert!(reply.starts_with("HTTP/1.1 200 OK"), "{reply:?}");
    }
    assert_eq!(drain.await.unwrap(), Drained::Clean);
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn an_app_can_start_and_stop_many_times() {
    let upstream = Upstream::start("one").await;
    for _ in 0..10 {
        let proxy = Proxy::start(&single(upstream.address, ""));
        let mut client = Client::connect(proxy.address()).await;
        assert_eq!(client.get("/", &[]).await.text(), "one");
        assert_eq!(proxy.shut_down().await, Drained::Clean);
    }
}

/// Readiness at this admin listener, as a probe asks for it: each time on a new connection.
async fn is_ready(admin: SocketAddr) -> bool {
    get(admin, "/readyz", &[]).await.status == StatusCode::OK
}

#[tokio::test]
async fn in_the_lame_duck_connections_are_taken_and_told_to_come_elsewhere() {
    let upstream = Upstream::start("one").await;
    let config = "shutdown: { timeout: 120s, lameDuck: 120s }\n".to_owned();
    let proxy = Proxy::start(&(config + &single(upstream.address, "")));
    let (address, admin) = (proxy.address(), proxy.admin());
    let mut kept = Raw::connect(address).await;
    kept.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(!kept.read_until("\r\n\r\none").await.contains("close"));
    let mut http2 = Http2::connect(address).await;
    assert!(http2.get().await.is_some());
    assert!(is_ready(admin).await);

    // It begins to take its leave, and nobody waits for that.
    drop(proxy);
    while is_ready(admin).await {}
    // Those that stand, and those that come.
    for mut raw in [kept, Raw::connect(address).await] {
        // Connections hear of it a moment after the probes do.
        loop {
            raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
            let reply = raw.read_until("\r\n\r\none").await;
            assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
            if reply.contains("connection: close") {
                break;
            }
        }
        assert_eq!(raw.read_to_end().await, "");
    }
    http2.until_sent_away().await;
    let mut http2 = Http2::connect(address).await;
    assert!(http2.get().await.is_some());
    http2.until_sent_away().await;
}

#[tokio::test]
async fn when_the_lame_duck_is_over_and_nobody_is_there_the_process_ends() {
    let upstream = Upstream::start("one").await;
    let config = "shutdown: { timeout: 120s, lameDuck: 1s }\n".to_owned();
    let proxy = Proxy::start(&(config + &single(upstream.address, "")));
    let address = proxy.address();
    let begun = Instant::now();
    assert_eq!(proxy.shut_down().await, Drained::Clean);
    let took = begun.elapsed();
    assert!(took >= Duration::from_secs(1), "{took:?}");
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_listener_that_opens_in_the_lame_duck_is_leaving_as_well() {
    let upstream = Upstream::start("one").await;
    let rest = single(upstream.address, "");
    let config = format!("shutdown: {{ timeout: 120s, lameDuck: 120s }}\n{rest}");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("serin.yaml");
    std::fs::write(&file, with_head(&config)).unwrap();
    let proxy = Proxy::start_at(&file, tempfile::tempdir().unwrap());
    let admin = proxy.admin();
    let live = std::sync::Arc::clone(proxy.app().live());
    drop(proxy);
    while is_ready(admin).await {}
    let more = "listeners: [ { name: web, address: '127.0.0.1:0' }, { name: more, address: '127.0.0.1:0' } ]\n";
    std::fs::write(file, with_head(&(more.to_owned() + &config))).unwrap();
    let opened = || {
        let snapshot = live.load();
        let mut listeners = snapshot.listeners.iter();
        let more = listeners.find(|one| *one.settings.name == *"more");
        more.map(|one| one.settings.address)
    };
    eventually("the listener is open", || opened().is_some()).await;
    let mut raw = Raw::connect(opened().unwrap()).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(raw.read_to_end().await.contains("connection: close"));
}

#[tokio::test]
async fn what_is_cut_off_at_the_limit_is_counted_and_logged() {
    let upstream = Upstream::start("one").await;
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("access.log");
    let config = format!(
        "accessLog: {{ output: '{}' }}\nshutdown: {{ timeout: 500ms, lameDuck: 100ms }}\n{}",
        log.display(),
        single(upstream.address, "")
    );
    let proxy = Proxy::start(&config);
    let metrics = std::sync::Arc::clone(proxy.app().metrics());
    let mut busy = Raw::connect(proxy.address()).await;
    busy.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request waits", || upstream.held() == 1).await;
    assert_eq!(proxy.shut_down().await, Drained::CutOff(1));
    let cut = |kind| {
        let labels = [("kind", kind)];
        metric(&metrics.render(), "serin_drain_cut_off_total", &labels)
    };
    assert_eq!((cut("request"), cut("tunnel")), (1.0, 0.0));
    let line = std::fs::read_to_string(&log).unwrap();
    assert!(line.contains("\"error\":\"cut_off\""), "{line}");
}

/// A rolling update: whoever stands in front hears a little later that a process is not ready any
/// more, as the nodes of a cluster do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_update_under_load_fails_no_request() {
    let upstream = Upstream::start("one").await;
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("serin.yaml");
    let text = "shutdown: { timeout: 60s, lameDuck: 5s }\n".to_owned();
    let text = with_head(&(text + &single(upstream.address, "")));
    std::fs::write(&config, text).unwrap();
    let mut old = Running::start(&config);
    let (web, mut admin) = old.addresses();
    let load = Load::start(web);
    load.goes_on(50).await;
    for _ in 0..3 {
        let mut new = Running::start(&config);
        let (web, next_admin) = new.addresses();
        old.signal("-TERM");
        while is_ready(admin).await {}
        load.goes_on(20).await;
        load.aim_at(web);
        old.wait_for("drained");
        assert_eq!(old.code(), Some(0));
        load.goes_on(50).await;
        (old, admin) = (new, next_admin);
    }
    assert!(load.end().await > 500);
}

/// Killed before, it would lose the end of its access log.
#[test]
fn whoever_stops_it_leaves_it_the_time_that_it_may_take() {
    let text = |file: &str| std::fs::read_to_string(file).unwrap();
    let seconds = |file: &str, key: &str| {
        let text = text(file);
        let (_, after) = text.split_once(key).unwrap();
        let seconds = after.split_whitespace().next().unwrap();
        Duration::from_secs(seconds.parse().unwrap())
    };
    let timeout = |file: &str| {
        let loaded = load(Path::new(file), &mut load_list).unwrap();
        loaded.config.shutdown.timeout
    };
    let ending = ENDING_LIMIT + FLUSH_LIMIT;
    let pod = timeout("deploy/kubernetes/base/config/serin.yaml") + ending;
    let manifest = "deploy/kubernetes/base/deployment.yaml";
    assert!(pod < seconds(manifest, "terminationGracePeriodSeconds: "));
    let service = timeout("config/examples/canary-by-weight.yaml") + ending;
    for unit in ["serin.service", "serin@.service"] {
        let unit = format!("deploy/systemd/{unit}");
        assert!(service < seconds(&unit, "TimeoutStopSec="));
    }
}

/// A client of HTTP/2 that sees whether it is sent away.
struct Http2 {
    sender: http2::SendRequest<Empty<Bytes>>,
    driver: tokio::task::JoinHandle<hyper::Result<()>>,
}

impl Http2 {
    async fn connect(address: SocketAddr) -> Self {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (sender, connection) = handshake.await.unwrap();
        let driver = tokio::spawn(connection);
        Self { sender, driver }
    }

    async fn get(&mut self) -> Option<StatusCode> {
        self.sender.ready().await.ok()?;
        let request = Request::get("http://a/").body(Empty::new()).unwrap();
        Some(self.sender.send_request(request).await.ok()?.status())
    }

    /// GOAWAY without an error, and the end.
    async fn until_sent_away(self) {
        let ended = tokio::time::timeout(PATIENCE, self.driver).await;
        ended.expect("it is sent away").unwrap().unwrap();
    }
}
