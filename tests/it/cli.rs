//! The program as an operator runs it.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::Receiver;

use crate::support::port::HeldPort;
use crate::support::tls::Authority;
use crate::support::{
    Client, PATIENCE, Proxy, Raw, Upstream, eventually, get, shop, single, with_head,
};

pub(crate) fn serin(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_serin"));
    without_settings(command.args(arguments));
    command
}

/// `serin` with these arguments, as the last command of a shell that does something before.
pub(crate) fn serin_after(before: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("{before}; exec \"$0\" \"$@\"")])
        .arg(env!("CARGO_BIN_EXE_serin"));
    without_settings(command.args(arguments));
    command
}

/// Takes out of the environment what the program reads of it.
pub(crate) fn without_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OTEL_") {
            command.env_remove(name);
        }
    }
    command
        .env_remove("SERIN_CONFIG")
        .env_remove("SERIN_LOG")
        .env_remove("SERIN_LOG_FORMAT")
        .env_remove("SERIN_HEALTHCHECK_URL")
        .env_remove("SERIN_TAKEOVER");
}

pub(crate) fn output(arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = serin(arguments).output().unwrap();
    (
        status.code(),
        String::from_utf8(stdout).unwrap(),
        String::from_utf8(stderr).unwrap(),
    )
}

/// A `serin run` of our own, ended with the test.
pub(crate) struct Running {
    pub(crate) child: Child,
    log: Receiver<String>,
    /// Lines that nobody has waited for yet: those of two threads come in any order.
    seen: Vec<String>,
}

impl Running {
    pub(crate) fn start(config: &Path) -> Self {
        Self::spawn(&mut serin(&["run", "--config", config.to_str().unwrap()]))
    }

    /// As `start`, with `--takeover`.
    pub(crate) fn take_over(config: &Path, socket: &Path) -> Self {
        let (config, socket) = (config.to_str().unwrap(), socket.to_str().unwrap());
        Self::spawn(&mut serin(&[
            "run",
            "--config",
            config,
            "--takeover",
            socket,
        ]))
    }

    /// As `start`, by a command of its own.
    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, log) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines() {
                // The test may have ended.
                let _ = sender.send(line.unwrap());
            }
        });
        let seen = Vec::new();
        Self { child, log, seen }
    }

    /// How many lines that nobody has waited for hold `text`.
    pub(crate) fn others(&self, text: &str) -> usize {
        let others = self.seen.iter();
        others.filter(|line| line.contains(text)).count()
    }

    /// Reads the log until a line holds `text`, and takes that line out.
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        loop {
            if let Some(found) = self.seen.iter().position(|line| line.contains(text)) {
                return self.seen.remove(found);
            }
            match self.log.recv_timeout(PATIENCE) {
                Ok(line) => self.seen.push(line),
                Err(error) => panic!("{error} before {text:?}: {:#?}", self.seen),
            }
        }
    }

    /// Where it listens, and where its admin listener does.
    pub(crate) fn addresses(&mut self) -> (SocketAddr, SocketAddr) {
        let web = Self::address(&self.wait_for(" listening "), "address=");
        let admin = Self::address(&self.wait_for("serin is up"), "admin=");
        (web, admin)
    }

    /// Waits for its end, and returns its exit code.
    pub(crate) fn code(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    /// The address after `key` in a line of the log.
    pub(crate) fn address(line: &str, key: &str) -> SocketAddr {
        let start = line.find(key).unwrap() + key.len();
        line[start..]
            .split_whitespace()
            .next()
            .unwrap()
            .parse()
            .unwrap()
    }

    pub(crate) fn signal(&self, signal: &str) {
        let killed = Command::new("kill")
            .args([signal, &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(killed.success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself, as it should.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_an_import_leaves_out_is_on_standard_error_and_the_rest_is_a_configuration() {
    let (code, config, notes) =
        output(&["import", "ingress-nginx", "tests/data/import/canary.yaml"]);
    let expected = |kind| fs::read_to_string(format!("tests/data/import/canary.{kind}")).unwrap();
    assert_eq!((code, config), (Some(0), expected("serin")));
    assert_eq!(notes.replace("note: ", ""), expected("notes"));

    let (code, config, error) = output(&["import", "ingress-nginx", "README.md"]);
    assert_eq!((code, &*config), (Some(1), ""), "{error}");
    assert_eq!(
        output(&["import", "ingress-nginx", "no-such-file.yaml"]).0,
        Some(2)
    );
}

#[test]
fn check_exits_with_0_for_a_good_file_1_for_a_bad_one_and_2_for_none() {
    let (code, out, err) = output(&["check", "config/examples/canary-by-weight.yaml"]);
    assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
    assert!(out.contains("ok: "), "{out}");

    let directory = tempfile::tempdir().unwrap();
    let bad = directory.path().join("bad.yaml");
    let example = fs::read_to_string("config/examples/canary-by-weight.yaml").unwrap();
    fs::write(
        &bad,
        example.replacen(
            "{ name: shop-canary, weight",
            "{ name: shop-canry, weight",
            1,
        ),
    )
    .unwrap();
    let (code, out, err) = output(&["check", bad.to_str().unwrap()]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(
        err.contains("unknown backend `shop-canry`") && err.contains("did you mean `shop-canary`?"),
        "{err}"
    );
    assert!(err.contains("bad.yaml:"), "{err}");

    let (code, _, err) = output(&["check", "no-such-file.yaml"]);
    assert_eq!(code, Some(2), "{err}");
    assert_eq!(output(&["check"]).0, Some(2));
    assert_eq!(output(&["check", "config"]).0, Some(2));
}

#[test]
fn the_schema_is_the_one_checked_in() {
    let (code, out, _) = output(&["schema"]);
    assert_eq!(code, Some(0));
    assert!(
        out == fs::read_to_string("config/schema.json").unwrap(),
        "config/schema.json is out of date: serin schema"
    );
}

#[test]
fn explain_prints_route_identity_decision_and_entry_share() {
    let config = "config/examples/canary-by-user-list.yaml";
    let ask = |more: &[&str]| {
        let (code, out, err) = output(
            &[
                &[
                    "explain",
                    "--config",
                    config,
                    "--host",
                    "shop.example.com",
                    "--path",
                    "/cart",
                ],
                more,
            ]
            .concat(),
        );
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let by_hash = ask(&["--user", "user-1"]);
    for words in [
        "route      shop\n",
        "identity   user-1 (header x-user-id)\n",
        "sticky",
        "this user enters it at",
    ] {
        assert!(by_hash.contains(words), "{words:?} in {by_hash}");
    }
    let by_list = ask(&["-H", "cookie: uid=user-42"]);
    assert!(
        by_list.contains("identity   user-42 (cookie uid)")
            && by_list.contains("user_list: rule `beta`"),
        "{by_list}"
    );
    assert!(by_list.contains("backend    shop-canary"), "{by_list}");
    let json: serde_json::Value =
        serde_json::from_str(&ask(&["--user", "bot-crawler", "--json"])).unwrap();
    assert_eq!(
        (&json["decision"]["reason"], &json["decision"]["backend"]),
        (&"deny_list".into(), &"shop-stable".into())
    );
    let (code, _, err) = output(&[
        "explain", "--config", config, "--host", "a", "-H", "no colon",
    ]);
    assert_eq!(code, Some(2), "{err}");
}

#[test]
fn a_config_that_cannot_be_used_ends_the_start_with_every_problem() {
    let directory = tempfile::tempdir().unwrap();
    let bad = directory.path().join("bad.yaml");
    fs::write(&bad, with_head("backends: [ { name: a, endpoints: [nowhere] } ]\nroutes: [ { name: r, backendRefs: [ { name: b } ] } ]\n")).unwrap();
    let (code, _, err) = output(&["run", "--config", bad.to_str().unwrap()]);
    assert_eq!(code, Some(1));
    assert!(
        err.contains("`nowhere` is not an endpoint") && err.contains("unknown backend `b`"),
        "{err}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn run_serves_reloads_at_sighup_and_finishes_requests_at_sigterm() {
    let (stable, canary) = (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    );
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serin.yaml");
    fs::write(
        &path,
        with_head(&shop(stable.address, canary.address, (1, 0), "")),
    )
    .unwrap();
    let mut running = Running::start(&path);
    let admin = Running::address(&running.wait_for("serin is up"), "admin=");
    let web = Running::address(&running.wait_for(" listening "), "address=");
    assert_eq!(get(web, "/", &[]).await.text(), "stable");

    fs::write(
        &path,
        with_head(&shop(stable.address, canary.address, (0, 1), "")),
    )
    .unwrap();
    running.signal("-HUP");
    running.wait_for("configuration taken over");
    assert_eq!(get(web, "/", &[]).await.text(), "canary");
    assert_eq!(get(admin, "/readyz", &[]).await.status.as_u16(), 200);

    let mut busy = Raw::connect(web).await;
    busy.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request waits", || canary.held() == 1).await;
    running.signal("-TERM");
    running.wait_for("no longer listening");
    canary.release();
    assert!(busy.read_to_end().await.ends_with("canary"));
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn healthcheck_exits_with_0_for_who_is_ready_and_1_for_everybody_else() {
    let authority = Authority::new("tests");
    let server = authority.issue(&["somewhere.else"]);
    let upstream = Upstream::start("one").await;
    let config = single(upstream.address, "");
    let plain = Proxy::start(&config);
    let tls = "admin: { address: '127.0.0.1:0', tls: { certificates: [ { certificateFile: a.crt, keyFile: a.key } ] } }\n";
    let encrypted = Proxy::start_with(&(tls.to_owned() + &config), |directory| {
        server.write(directory, "a");
    });
    let starting = Proxy::prepare(&config);
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = HeldPort::new().unwrap();
    let url = |scheme: &str, address, path: &str| format!("{scheme}://{address}{path}");
    for (url, code, words) in [
        (url("http", plain.admin(), "/readyz"), 0, ""),
        (url("https", encrypted.admin(), "/readyz"), 0, ""),
        (url("http", encrypted.admin(), "/readyz"), 1, "unhealthy: "),
        (
            url("http", plain.admin(), "/nothing"),
            1,
            "unhealthy: 404 Not Found: ",
        ),
        (
            url("http", starting.admin(), "/readyz"),
            1,
            "unhealthy: 503 Service Unavailable: starting\n",
        ),
        (
            url("http", mute.local_addr().unwrap(), "/readyz"),
            1,
            "unhealthy: no answer within 2s\n",
        ),
        (
            url("http", nobody.address(), "/readyz"),
            1,
            "unhealthy: Connection refused",
        ),
        ("127.0.0.1:9901".to_owned(), 2, "error: invalid value"),
    ] {
        let (exited, _, said) = output(&["healthcheck", &url]);
        assert_eq!(exited, Some(code), "{url}: {said}");
        assert!(said.starts_with(words), "{url}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_at_once() {
    let upstream = Upstream::start("one").await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serin.yaml");
    fs::write(&path, with_head(&single(upstream.address, ""))).unwrap();
    let mut running = Running::start(&path);
    let web = Running::address(&running.wait_for(" listening "), "address=");
    let mut busy = Raw::connect(web).await;
    busy.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request waits", || upstream.held() == 1).await;
    running.signal("-TERM");
    running.wait_for("no longer listening");
    running.signal("-TERM");
    assert_eq!(running.child.wait().unwrap().code(), Some(143));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_access_log_is_opened_anew_at_sigusr1() {
    let upstream = Upstream::start("one").await;
    let directory = tempfile::tempdir().unwrap();
    let (log, old) = (
        directory.path().join("a.log"),
        directory.path().join("a.log.1"),
    );
    let path = directory.path().join("serin.yaml");
    let config = "accessLog: { output: a.log }\n".to_owned() + &single(upstream.address, "");
    fs::write(&path, with_head(&config)).unwrap();
    let mut running = Running::start(&path);
    let web = Running::address(&running.wait_for(" listening "), "address=");
    get(web, "/old", &[]).await;
    let has = |file: &Path, what| fs::read_to_string(file).unwrap_or_default().contains(what);
    eventually("the line is written", || has(&log, "/old")).await;
    fs::rename(&log, &old).unwrap();
    running.signal("-USR1");
    running.wait_for("opened anew");
    get(web, "/new", &[]).await;
    eventually("the line is written", || has(&log, "/new")).await;
    assert!(!has(&old, "/new") && !has(&log, "/old"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standard_output_that_nobody_reads_holds_up_neither_requests_nor_the_end() {
    let upstream = Upstream::start("one").await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serin.yaml");
    let config = "accessLog: { output: stdout }\n".to_owned() + &single(upstream.address, "");
    fs::write(&path, with_head(&config)).unwrap();
    let mut running = Running::start(&path);
    let web = Running::address(&running.wait_for(" listening "), "address=");
    let mut client = Client::connect(web).await;
    // A pipe holds 64 KiB.
    let long = format!("/{}", "x".repeat(3000));
    for _ in 0..100 {
        assert_eq!(client.get(&long, &[]).await.text(), "one");
    }
    drop(client);
    running.signal("-TERM");
    running.wait_for("could not be written in time");
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_demo_splits_compares_and_ends() {
    let demo = [
        "demo",
        "--listen",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
        "--duration",
        "3s",
        "--rate",
        "400",
    ];
    let (code, out, err) = output(&demo);
    assert_eq!(code, Some(0), "{err}");
    let last = |backend: &str| {
        out.lines()
            .rfind(|line| line.starts_with(backend))
            .unwrap_or_else(|| panic!("{out}"))
    };
    let requests = |backend| {
        last(backend)
            .split_whitespace()
            .nth(4)
            .unwrap()
            .parse::<u32>()
            .unwrap()
    };
    let (stable, canary) = (requests("shop-stable"), requests("shop-canary"));
    assert!(stable > canary && canary > 20, "{out}");
    assert!(last("shop-canary").ends_with("ms"), "{out}");
}

#[test]
fn a_demo_with_a_file_writes_it_and_uses_it_again() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("demo.yaml");
    let path = file.to_str().unwrap();
    let demo = ["demo", "--duration", "1s", "--config", path];
    let where_to_listen = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    for more in [&where_to_listen[..], &[]] {
        let (code, out, err) = output(&[&demo[..], more].concat());
        assert_eq!(code, Some(0), "{err}");
        assert!(out.contains("shop-stable"), "{out}");
        assert_eq!(output(&["check", path]).0, Some(0));
    }
    let (code, _, err) = output(&[&demo[..], &where_to_listen].concat());
    assert!(
        code == Some(1) && err.contains("says where to listen"),
        "{err}"
    );
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = serin(&["schema"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut err)
        .unwrap();
    assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
}
