//! A process takes over from another on the same machine: nobody is refused, and nobody is lost.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tempfile::TempDir;

use crate::cli::{Running, serin_after};
use crate::resilience::refusing;
use crate::support::dns::{DnsServer, Manner};
use crate::support::load::Load;
use crate::support::port::HeldPort;
use crate::support::{
    Client, Raw, Reply, Upstream, eventually, eventually_asked, get, metric, shop, single,
    with_head,
};

/// A configuration in a directory of its own, and a path for the socket.
struct Site {
    directory: TempDir,
    config: PathBuf,
    socket: PathBuf,
}

impl Site {
    fn new(config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config_file = directory.path().join("serin.yaml");
        fs::write(&config_file, with_head(config)).unwrap();
        Self {
            config: config_file,
            socket: directory.path().join("takeover.sock"),
            directory,
        }
    }

    fn start(&self) -> Running {
        Running::take_over(&self.config, &self.socket)
    }

    /// A process that serves, and where.
    fn serving(&self) -> (Running, SocketAddr, SocketAddr) {
        let mut running = self.start();
        let (web, admin) = running.addresses();
        running.wait_for("a successor can take over");
        (running, web, admin)
    }

    /// Says these lines to the process that serves, and returns what it says to that.
    fn converse(&self, lines: &[&str]) -> (UnixStream, String) {
        let stream = UnixStream::connect(&self.socket).unwrap();
        for line in lines {
            (&stream).write_all(line.as_bytes()).unwrap();
        }
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer).unwrap();
        (stream, answer)
    }
}

const ASK: &str = "{\"takeover\":1,\"say\":\"ask\"}\n";

/// Starts once with these arguments, which must fail, and returns what is said to that.
fn fails(site: &Site, expected: &str) {
    let mut running = site.start();
    running.wait_for(expected);
    assert_ne!(running.code(), Some(0), "{expected}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn successors_take_over_under_load_and_no_request_fails() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    let (mut serving, web, admin) = site.serving();
    let load = Load::start(web);
    load.goes_on(100).await;
    for _ in 0..3 {
        let mut idle = Raw::connect(web).await;
        idle.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        idle.read_until("\r\n\r\none").await;
        let (successor, same_web, same_admin) = site.serving();
        assert_eq!((same_web, same_admin), (web, admin));
        assert_eq!(idle.read_to_end().await, "");
        serving.wait_for("drained");
        assert_eq!(serving.code(), Some(0));
        serving = successor;
        load.goes_on(100).await;
    }
    assert!(load.end().await > 1000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_and_scrapes_reach_the_one_that_is_ready() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    let (mut old, web, admin) = site.serving();
    let mut kept = Client::connect(admin).await;
    let busy_with = |scrape: &Reply| metric(scrape.text(), "serin_requests_in_flight", &[]);
    // It keeps the old one from ending, and tells the two apart.
    let mut busy = Raw::connect(web).await;
    busy.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request waits", || upstream.held() == 1).await;
    assert_eq!(busy_with(&kept.get("/metrics", &[]).await), 1.0);

    let (_new, _, _) = site.serving();
    for _ in 0..50 {
        let scrape = get(admin, "/metrics", &[]).await;
        assert_eq!(busy_with(&scrape), 0.0);
        assert_eq!(get(admin, "/readyz", &[]).await.status.as_u16(), 200);
    }
    let again = kept.send(http::Method::GET, "/readyz", &[], "").await;
    assert!(again.is_err(), "the old one answers");
    assert!(old.child.try_wait().unwrap().is_none());
    upstream.release();
    assert!(busy.read_to_end().await.ends_with("one"));
    assert_eq!(old.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_fails_before_it_is_ready_changes_nothing() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    let (mut serving, web, admin) = site.serving();
    let load = Load::start(web);
    load.goes_on(20).await;

    // Its configuration is refused.
    let good = fs::read_to_string(&site.config).unwrap();
    let other = Site {
        config: site.directory.path().join("other.yaml"),
        directory: tempfile::tempdir().unwrap(),
        socket: site.socket.clone(),
    };
    fs::write(&other.config, good.replace("name: only }", "name: none }")).unwrap();
    fails(&other, "unknown backend `none`");
    // One of its listeners cannot be opened.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let both = format!(
        "listeners: [ {{ name: web, address: '127.0.0.1:0' }}, {{ name: taken, address: '{}' }} ]",
        taken.local_addr().unwrap()
    );
    let one = "listeners: [ { name: web, address: '127.0.0.1:0' } ]";
    fs::write(&other.config, good.replace(one, &both)).unwrap();
    fails(&other, "cannot listen on");
    serving.wait_for("did not take over; this process goes on");
    // It dies with the sockets in its hands.
    let (stream, answer) = site.converse(&[ASK]);
    assert!(
        answer.contains("\"names\":[\"@admin\",\"web\"]"),
        "{answer}"
    );
    drop(stream);
    serving.wait_for("did not take over; this process goes on");

    load.goes_on(20).await;
    assert_eq!(get(admin, "/readyz", &[]).await.status.as_u16(), 200);
    let (_successor, _, _) = site.serving();
    serving.wait_for("drained");
    assert_eq!(serving.code(), Some(0));
    load.goes_on(20).await;
    load.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_successors_the_second_is_sent_away() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    let (_serving, web, _) = site.serving();
    let (first, answer) = site.converse(&[ASK]);
    assert!(answer.contains("sockets"), "{answer}");
    fails(&site, "another successor is starting");
    drop(first);
    assert_eq!(get(web, "/", &[]).await.text(), "one");
    let (_successor, _, _) = site.serving();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_not_understood_is_told_so() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    let (_serving, web, _) = site.serving();
    for (lines, reason) in [
        (&["{\"takeover\":7,\"say\":\"ask\"}\n"][..], "version 7"),
        (&["GET / HTTP/1.1\r\n"], "cannot be understood"),
        (&["{\"takeover\":1,\"say\":\"ready\"}\n"], "is no question"),
    ] {
        let (_, answer) = site.converse(lines);
        assert!(
            answer.contains("refused") && answer.contains(reason),
            "{answer}"
        );
    }
    assert_eq!(get(web, "/", &[]).await.text(), "one");
    // And a successor does not start with what it does not understand.
    let other = Site::new(&single(upstream.address, ""));
    for (answer, expected) in [
        ("{\"takeover\":2,\"say\":\"hello\"}\n", "speaks version 2"),
        (
            "{\"takeover\":1,\"say\":\"refused\",\"reason\":\"not now\"}\n",
            "not now",
        ),
        (
            "{\"takeover\":1,\"say\":\"sockets\",\"names\":[\"web\"]}\n",
            "not every socket has arrived",
        ),
    ] {
        let listener = UnixListener::bind(&other.socket).unwrap();
        let answering = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            BufReader::new(&stream)
                .read_line(&mut String::new())
                .unwrap();
            (&stream).write_all(answer.as_bytes()).unwrap();
            stream
        });
        fails(&other, expected);
        drop(answering.join().unwrap());
        fs::remove_file(&other.socket).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_predecessor_that_does_not_answer_is_not_waited_for() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    let _stopped = UnixListener::bind(&site.socket).unwrap();
    fails(&site, "it does not answer");
    assert!(site.socket.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_predecessor_that_dies_leaves_a_successor_that_serves() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    // Before it has given anything, and after.
    for answer in ["", "{\"takeover\":1,\"say\":\"sockets\",\"names\":[]}\n"] {
        let listener = UnixListener::bind(&site.socket).unwrap();
        let dying = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            BufReader::new(&stream)
                .read_line(&mut String::new())
                .unwrap();
            (&stream).write_all(answer.as_bytes()).unwrap();
        });
        let (mut running, web, _) = site.serving();
        dying.join().unwrap();
        assert_eq!(get(web, "/", &[]).await.text(), "one");
        running.signal("-TERM");
        assert_eq!(running.code(), Some(0));
        assert!(!site.socket.exists());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_socket_is_its_owners_alone_and_a_stale_one_is_replaced() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    let (mut running, _, _) = site.serving();
    let mode = || fs::metadata(&site.socket).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(), 0o600);
    // Killed, it leaves its socket behind.
    running.signal("-KILL");
    running.code();
    assert!(site.socket.exists());
    let (mut running, web, _) = site.serving();
    assert_eq!(mode(), 0o600);
    assert_eq!(get(web, "/", &[]).await.text(), "one");
    running.signal("-TERM");
    assert_eq!(running.code(), Some(0));
    let left = |directory: &Path| fs::read_dir(directory).unwrap().count();
    assert_eq!(
        left(site.directory.path()),
        1,
        "only the configuration is left"
    );

    // Somebody's file is not ours to replace.
    fs::write(&site.socket, "precious").unwrap();
    fails(&site, "something else than a socket");
    assert_eq!(fs::read_to_string(&site.socket).unwrap(), "precious");
    let nowhere = Site {
        socket: site.directory.path().join("missing/takeover.sock"),
        ..site
    };
    fails(&nowhere, "cannot listen there");
}

/// Runs with `stdin` as the third descriptor, as a service manager would have it.
fn activated(site: &Site, stdin: impl Into<OwnedFd>, more: &str) -> Running {
    let before = format!("exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$ {more}");
    let config = site.config.to_str().unwrap();
    let mut command = serin_after(&before, &["run", "--config", config]);
    command.stdin(Stdio::from(stdin.into()));
    Running::spawn(&mut command)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_that_a_process_is_started_with_are_used() {
    let upstream = Upstream::start("one").await;
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let listeners = |name: &str| {
        format!(
            "listeners: [ {{ name: {name}, address: '{address}' }}, {{ name: other, address: '127.0.0.1:0' }} ]\n"
        )
    };
    let rest = single(upstream.address, "");
    let site = Site::new(&(listeners("web") + &rest));
    // Somebody has connected before there is a process.
    let early = TcpStream::connect(address).unwrap();
    early.set_nonblocking(true).unwrap();
    let early = tokio::net::TcpStream::from_std(early).unwrap();
    let mut running = activated(&site, socket.try_clone().unwrap(), "LISTEN_FDNAMES=web");
    running.wait_for("the socket was there already");
    let mut early = Raw::over(early);
    early.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    early.read_until("\r\n\r\none").await;

    // The listener goes, and comes again: its address cannot be bound, since we hold the socket.
    let none = "listeners: [ { name: other, address: '127.0.0.1:0' } ]\n";
    for listeners in [none, &listeners("again")] {
        fs::write(&site.config, with_head(&(listeners.to_owned() + &rest))).unwrap();
        running.signal("-HUP");
        running.wait_for("configuration taken over");
    }
    assert_eq!(get(address, "/", &[]).await.text(), "one");
    running.signal("-TERM");
    assert_eq!(running.code(), Some(0));
    // Whoever comes now waits for the next process.
    let mut late = Raw::connect(address).await;
    late.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let _running = activated(&site, socket, "");
    late.read_until("\r\n\r\none").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_descriptor_that_fits_nothing_is_a_warning() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    let unknown = TcpListener::bind("127.0.0.1:0").unwrap();
    let datagram = UnixDatagram::unbound().unwrap();
    let connected = TcpStream::connect(unknown.local_addr().unwrap()).unwrap();
    for (descriptor, words) in [
        (
            OwnedFd::from(unknown.try_clone().unwrap()),
            "no listener is configured for",
        ),
        (datagram.into(), "cannot be used"),
        (connected.into(), "does not listen"),
    ] {
        let mut running = activated(&site, descriptor, "");
        running.wait_for(words);
        let (web, _) = running.addresses();
        assert_eq!(get(web, "/", &[]).await.text(), "one");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_manager_is_told_when_it_serves_and_when_it_ends() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    let path = site.directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    let hears = || {
        let mut room = [0; 256];
        let count = manager.recv(&mut room).unwrap();
        String::from_utf8(room[..count].to_vec()).unwrap()
    };
    let notify = format!("export NOTIFY_SOCKET={}", path.display());
    let config = site.config.to_str().unwrap();
    let running = Running::spawn(&mut serin_after(&notify, &["run", "--config", config]));
    let ready = format!("READY=1\nMAINPID={}\n", running.child.id());
    assert_eq!(hears(), ready);
    running.signal("-TERM");
    assert_eq!(hears(), "STOPPING=1\n");
}

/// It has been asked, and will be again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_is_not_well_holds_up_no_start() {
    let (stable, refusing) = (Upstream::start("one").await, refusing().await);
    let check = "healthCheck: { http: { path: / }, interval: 1h, timeout: 10m },";
    let config = shop(stable.address, refusing, (0, 1), "")
        .replace("version: '1',", &format!("version: '1', {check}"))
        .replace("version: '2',", &format!("version: '2', {check}"));
    let site = Site::new(&config);
    let (_serving, web, admin) = site.serving();
    assert_eq!(get(admin, "/readyz", &[]).await.text(), "ready\n");
    assert_eq!(get(web, "/", &[]).await.text(), "one");
}

/// Else the canary's users would get the baseline for as long as the first checks take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_takes_no_connection_before_endpoints_have_been_asked() {
    let stable = Upstream::start("stable").await;
    // The name is what load expects of every answer.
    let canary = Upstream::start("one").await;
    let check = "version: '2', healthCheck: { http: { path: /hold }, interval: 1h, timeout: 10m },";
    let config = shop(stable.address, canary.address, (0, 1), "");
    let site = Site::new(&config.replace("version: '2',", check));
    let asked = || eventually("the canary is asked", || canary.held() == 1);
    let mut first = site.start();
    asked().await;
    canary.release();
    let (web, admin) = first.addresses();
    first.wait_for("a successor can take over");
    let load = Load::start(web);
    load.goes_on(20).await;

    let mut second = site.start();
    asked().await;
    load.goes_on(100).await;
    assert_eq!(get(admin, "/readyz", &[]).await.text(), "ready\n");
    canary.release();
    second.addresses();
    assert_eq!(first.code(), Some(0));
    load.goes_on(100).await;
    load.end().await;
    assert_eq!(stable.requests(), 0);
}

async fn ask(client: &mut Raw, path: &str) {
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n");
    client.send(&request).await;
}

/// Clients that have asked for `path`, each on a connection of its own.
async fn clients(web: SocketAddr, count: usize, path: &str) -> Vec<Raw> {
    let mut clients = Vec::new();
    for _ in 0..count {
        let mut client = Raw::connect(web).await;
        ask(&mut client, path).await;
        clients.push(client);
    }
    clients
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_a_place_is_served_by_the_successor() {
    let upstream = Upstream::start("one").await;
    let config = |max: usize| {
        let rest = single(upstream.address, "");
        format!("connections: {{ max: {max} }}\nshutdown: {{ timeout: 10m, lameDuck: 0s }}\n{rest}")
    };
    let site = Site::new(&config(2));
    let (mut old, web, admin) = site.serving();
    let busy = clients(web, 2, "/hold").await;
    eventually("both places are taken", || upstream.held() == 2).await;
    let waiting = clients(web, 6, "/").await;
    let reached = "serin_connections_limit_reached_total";
    eventually_asked("the limit is reached", async || {
        metric(get(admin, "/metrics", &[]).await.text(), reached, &[]) > 0.0
    })
    .await;

    fs::write(&site.config, with_head(&config(100))).unwrap();
    let _new = site.serving();
    for mut client in waiting {
        client.read_until("\r\n\r\none").await;
    }
    assert!(old.child.try_wait().unwrap().is_none());
    upstream.release();
    for mut client in busy {
        client.read_until("\r\n\r\none").await;
    }
    assert_eq!(old.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_was_succeeded_and_is_told_to_end_finishes_its_requests() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    let (mut old, web, _) = site.serving();
    let mut busy = Raw::connect(web).await;
    ask(&mut busy, "/hold").await;
    eventually("the request waits", || upstream.held() == 1).await;
    let (mut new, _, _) = site.serving();
    old.wait_for("another process serves now");
    old.signal("-TERM");
    old.wait_for("it is ending already");
    upstream.release();
    assert!(busy.read_to_end().await.ends_with("one"));
    assert_eq!(old.code(), Some(0));

    // Told so again, it ends at once.
    let mut busy = Raw::connect(web).await;
    ask(&mut busy, "/hold").await;
    eventually("the request waits", || upstream.held() == 1).await;
    let _newest = site.serving();
    new.wait_for("another process serves now");
    new.signal("-INT");
    new.wait_for("it is ending already");
    new.signal("-TERM");
    assert_eq!(new.code(), Some(143));
    assert_eq!(busy.read_to_end().await, "");
}

/// A site whose process is not ready before `upstream` lets go of its first health check.
fn waiting_for(upstream: &Upstream) -> Site {
    let check = "name: only, healthCheck: { http: { path: /hold }, interval: 1h, timeout: 10m },";
    Site::new(&single(upstream.address, "").replacen("name: only,", check, 1))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_process_left_beside_the_path_goes_with_the_next() {
    let upstream = Upstream::start("one").await;
    let site = waiting_for(&upstream);
    let left = || fs::read_dir(site.directory.path()).unwrap().count();
    let mut killed = site.start();
    eventually("the upstream is asked", || upstream.held() == 1).await;
    fails(&site, "another process is starting");
    killed.signal("-KILL");
    killed.code();
    assert_eq!(left(), 2);
    let mut running = site.start();
    eventually("the upstream is asked again", || upstream.held() == 2).await;
    assert_eq!(left(), 2);
    upstream.release();
    running.wait_for("a successor can take over");
    running.signal("-TERM");
    assert_eq!(running.code(), Some(0));
    assert_eq!(left(), 1, "only the configuration is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_service_at_the_same_path_takes_nothing_over() {
    let upstream = Upstream::start("one").await;
    let site = Site::new(&single(upstream.address, ""));
    let (mut serving, web, _) = site.serving();
    let other = "listeners: [ { name: other, address: '127.0.0.1:0' } ]\n";
    let other = Site {
        socket: site.socket.clone(),
        ..Site::new(&(other.to_owned() + &single(upstream.address, "")))
    };
    fails(&other, "none of the listeners");
    serving.wait_for("did not take over; this process goes on");
    assert_eq!(get(web, "/", &[]).await.text(), "one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_told_to_end_before_it_serves_does_so_at_once() {
    let upstream = Upstream::start("one").await;
    for signal in ["-TERM", "-INT"] {
        let site = waiting_for(&upstream);
        let before = upstream.held();
        let mut running = site.start();
        eventually("the upstream is asked", || upstream.held() > before).await;
        running.signal(signal);
        running.wait_for("told to end before it served");
        assert_eq!(running.code(), Some(0));
        let left = fs::read_dir(site.directory.path()).unwrap().count();
        assert_eq!(left, 1, "only the configuration is left");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_told_to_end_while_it_asks_for_names_does_so_at_once() {
    let dns = DnsServer::start();
    dns.behave(Manner::Silent);
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("serin.yaml");
    let text = format!(
        "dns: {{ resolvers: ['{}'], timeout: 30s }}
backends: [ {{ name: only, version: '1', endpoints: ['shop.test:80'] }} ]
routes: [ {{ name: all, backendRefs: [ {{ name: only }} ] }} ]
",
        dns.address
    );
    fs::write(&config, with_head(&text)).unwrap();
    let mut running = Running::start(&config);
    eventually("it is asked", || dns.queries() > 0).await;
    running.signal("-TERM");
    running.wait_for("told to end before it served");
    assert_eq!(running.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_the_predecessor_holds_otherwise_is_named_with_its_listener() {
    let upstream = Upstream::start("one").await;
    let held = HeldPort::new().unwrap();
    let config = |address: SocketAddr| {
        let rest = single(upstream.address, "");
        format!(
            "listeners: [ {{ name: web, address: '127.0.0.1:0' }}, {{ name: more, address: '{address}' }} ]\n{rest}"
        )
    };
    let site = Site::new(&config(held.address()));
    let mut serving = site.start();
    serving.wait_for("a successor can take over");
    let everywhere = SocketAddr::new([0, 0, 0, 0].into(), held.address().port());
    fs::write(&site.config, with_head(&config(everywhere))).unwrap();
    fails(
        &site,
        "listener `more` of the process that serves holds this port",
    );
    serving.wait_for("did not take over; this process goes on");
    assert_eq!(get(held.address(), "/", &[]).await.text(), "one");
}
