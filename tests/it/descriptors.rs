//! A process with few file descriptors: clients cannot take those that everything else needs.

use std::fs;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::cli::{Running, serin_after};
use crate::support::{Client, Proxy, Raw, Upstream, eventually, get, metric, single, with_head};

/// CPU time of a process so far, in seconds.
fn cpu_seconds(process: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // User and system time, which are fields 14 and 15 of the whole line (proc(5)), in hundredths.
    let ticks = |at: usize| fields[at - 3].parse::<f64>().unwrap();
    (ticks(14) + ticks(15)) / 100.0
}

/// A process with 64 descriptors, for as long as its directory is there.
fn with_64_descriptors(config: &str) -> (TempDir, Running) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serin.yaml");
    fs::write(&path, with_head(config)).unwrap();
    let arguments = ["run", "--config", path.to_str().unwrap()];
    let running = Running::spawn(&mut serin_after("ulimit -n 64", &arguments));
    (directory, running)
}

async fn ask(client: &mut Raw) {
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    client.read_until("\r\n\r\none").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_64_descriptors_500_clients_do_no_harm() {
    let upstream = Upstream::start("one").await;
    let (_directory, mut running) = with_64_descriptors(&single(upstream.address, ""));
    let (web, admin) = running.addresses();
    let mut operator = Client::connect(admin).await;
    let limit = metric(
        operator.get("/metrics", &[]).await.text(),
        "serin_connections_limit",
        &[],
    );
    assert!((1.0..32.0).contains(&limit), "{limit}");

    let mut clients = Vec::new();
    for _ in 0..500 {
        clients.push(Raw::connect(web).await);
    }
    // Who connected first is served, in each of two worker's turns, as often as he likes.
    let (admitted, waiting) = clients.split_at_mut(limit as usize);
    for _ in 0..5 {
        for client in admitted.iter_mut() {
            ask(client).await;
        }
    }
    for client in waiting.iter_mut() {
        client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    }
    let (before, since) = (cpu_seconds(running.child.id()), Instant::now());
    while since.elapsed() < Duration::from_secs(3) {
        ask(&mut admitted[0]).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let spent = cpu_seconds(running.child.id()) - before;
    assert!(spent < 1.0, "{spent} seconds of CPU in 3");

    // What is not a client's has its descriptors.
    running.signal("-HUP");
    running.wait_for("configuration taken over");
    let metrics = operator.get("/metrics", &[]).await;
    let value = |name| metric(metrics.text(), name, &[]);
    assert_eq!(value("serin_connections_active"), limit);
    assert!(value("serin_connections_limit_reached_total") >= 1.0);
    assert!(value("process_open_fds") < 64.0);

    // One leaves, and one comes in.
    let served = upstream.requests();
    drop(clients.remove(0));
    eventually("another one is served", || upstream.requests() > served).await;
    drop(clients);
    for _ in 0..100 {
        assert_eq!(get(web, "/", &[]).await.text(), "one");
    }
    running.signal("-TERM");
    assert_eq!(running.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_soft_limit_is_raised_and_the_hard_one_is_not_passed() {
    let upstream = Upstream::start("one").await;
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("serin.yaml");
    let text = "connections: { max: 1000 }\n".to_owned() + &single(upstream.address, "");
    fs::write(&config, with_head(&text)).unwrap();
    let arguments = ["run", "--config", config.to_str().unwrap()];
    for (limits, descriptors, connections) in [
        ("ulimit -Sn 64; ulimit -Hn 2000", 2000.0, 1000.0..1001.0),
        ("ulimit -n 64", 64.0, 1.0..64.0),
    ] {
        let mut running = Running::spawn(&mut serin_after(limits, &arguments));
        let (_, admin) = running.addresses();
        let metrics = get(admin, "/metrics", &[]).await;
        let value = |name| metric(metrics.text(), name, &[]);
        assert_eq!(value("process_max_fds"), descriptors, "{limits}");
        let limit = value("serin_connections_limit");
        assert!(connections.contains(&limit), "{limits}: {limit}");
    }
}

/// Connections that are kept for later give way to those that are needed now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_64_descriptors_many_backends_are_reached_one_after_the_other() {
    let mut text = "backends:\n".to_owned();
    let mut routes = "routes:\n".to_owned();
    for number in 0..12 {
        let upstream = Upstream::start("one").await.address;
        text += &format!("  - {{ name: b{number}, version: '1', endpoints: ['{upstream}'] }}\n");
        routes += &format!(
            "  - {{ name: r{number}, matches: [ {{ path: {{ value: /{number} }} }} ], backendRefs: [ {{ name: b{number} }} ] }}\n"
        );
    }
    let (_directory, mut running) = with_64_descriptors(&(text + &routes));
    let (web, _) = running.addresses();
    let clients = (0..8).map(|_| {
        tokio::spawn(async move {
            let mut client = Client::connect(web).await;
            for number in (0..12).cycle().take(48) {
                let reply = client.get(&format!("/{number}"), &[]).await;
                assert_eq!(reply.status.as_u16(), 200, "{number}");
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
}

/// A process with one place, whose client waits for `upstream`, and others that wait for the place.
struct Crowded {
    _directory: TempDir,
    running: Running,
    served: Raw,
    waiting: Vec<Raw>,
}

impl Crowded {
    async fn start(upstream: &Upstream, settings: &str, waiting: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("serin.yaml");
        let one = "connections: { max: 1 }\n";
        let text = format!("{one}{settings}{}", single(upstream.address, ""));
        fs::write(&config, with_head(&text)).unwrap();
        let mut running = Running::start(&config);
        let (web, _) = running.addresses();
        let mut served = Raw::connect(web).await;
        served.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
        eventually("the request waits", || upstream.held() == 1).await;
        let mut others = Vec::new();
        for _ in 0..waiting {
            let mut other = Raw::connect(web).await;
            other.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
            others.push(other);
        }
        Self {
            _directory: directory,
            running,
            served,
            waiting: others,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_at_its_limit_although_connections_wait_for_a_place() {
    let upstream = Upstream::start("one").await;
    let settings = "shutdown: { timeout: 3s, lameDuck: 0s }\n";
    let mut crowded = Crowded::start(&upstream, settings, 3).await;
    let running = &mut crowded.running;
    running.signal("-TERM");
    running.wait_for("what is left is cut off");
    running.wait_for("a connection is lost");
    assert_eq!(running.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_serves_those_that_wait_for_a_place() {
    let upstream = Upstream::start("one").await;
    let Crowded {
        _directory,
        mut running,
        served,
        waiting,
    } = Crowded::start(&upstream, "", 5).await;
    running.signal("-TERM");
    running.wait_for("draining");
    upstream.release();
    for mut client in std::iter::once(served).chain(waiting) {
        let reply = client.read_to_end().await;
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply:?}");
    }
    assert_eq!(running.code(), Some(0));
}

#[tokio::test]
async fn clients_that_rest_make_room_for_those_who_wait() {
    let upstream = Upstream::start("one").await;
    let config = single(upstream.address, "");
    let proxy = Proxy::start(&format!(
        "connections: {{ max: 2 }}\nworkers: 1\nlistenerDefaults: {{ timeouts: {{ idle: 24h }} }}\n{config}"
    ));
    let mut resting = Raw::connect(proxy.address()).await;
    ask(&mut resting).await;
    let mut busy = Raw::connect(proxy.address()).await;
    busy.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("it is under way", || upstream.held() == 1).await;
    for _ in 0..2 {
        let mut next = Raw::connect(proxy.address()).await;
        ask(&mut next).await;
    }
    assert_eq!(resting.read_to_end().await, "");
    upstream.release();
    busy.read_until("one").await;
}

/// What the process lacks itself is nobody else's fault.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_cannot_be_asked_for_want_of_descriptors_stays_healthy() {
    let well = Upstream::start("well").await;
    // Nobody accepts, but the kernel does: each question to them holds a descriptor until it times out.
    let hanging = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = hanging.local_addr().unwrap().port();
    let many: Vec<_> = (1..=100)
        .map(|host| format!("'127.0.1.{host}:{port}'"))
        .collect();
    let config = format!(
        "backends:
  - {{ name: well, version: '1', endpoints: ['{}'], healthCheck: {{ http: {{ path: / }}, interval: 10ms, timeout: 100s, unhealthyAfter: 1 }} }}
  - {{ name: hanging, version: '1', endpoints: [{}], healthCheck: {{ http: {{ path: / }}, interval: 1h, timeout: 1s }} }}
routes:
  - {{ name: well, backendRefs: [ {{ name: well }} ] }}
  - {{ name: hanging, hostnames: [hanging.example], backendRefs: [ {{ name: hanging }} ] }}
",
        well.address,
        many.join(", ")
    );
    let (_directory, mut running) = with_64_descriptors(&config);
    let (_, admin) = running.addresses();
    let mut operator = Client::connect(admin).await;
    loop {
        let metrics = operator.get("/metrics", &[]).await;
        let answers = |backend, result| {
            let labels = [("backend", backend), ("result", result)];
            metric(metrics.text(), "serin_health_checks_total", &labels)
        };
        assert_eq!(answers("well", "failure"), 0.0);
        if answers("hanging", "failure") == 100.0 {
            assert!(answers("hanging", "not_asked") >= 1.0);
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_64_descriptors_whoever_holds_admin_connections_keeps_out_neither_probes_nor_clients()
{
    let upstream = Upstream::start("one").await;
    let (_directory, mut running) = with_64_descriptors(&single(upstream.address, ""));
    let (web, admin) = running.addresses();
    let mut held = Vec::new();
    for _ in 0..100 {
        held.push(Raw::connect(admin).await);
    }
    assert_eq!(get(admin, "/livez", &[]).await.text(), "ok\n");
    assert_eq!(get(web, "/", &[]).await.text(), "one");
    drop(held);
}
