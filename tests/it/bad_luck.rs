//! What may happen to the machine that Serin runs on: a full disk, a log that nobody takes, a clock
//! that is set, directories that come and go, files that are no text, and very many routes.
//!
//! Each time requests go on, something says what is wrong, and all is well again when it is over.

use std::fs::{self, File, FileTimes};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use http::StatusCode;

use crate::cli::{Running, without_settings};
use crate::support::{Client, Proxy, Upstream, eventually, get, metric, shop, single, with_head};

// === Disks ===

/// Whether this machine lets us mount file systems that nobody else sees.
fn can_mount() -> bool {
    let probe = "mount -t tmpfs -o size=64k none /mnt";
    let tried = Command::new("unshare")
        .args(["--mount", "sh", "-c", probe])
        .stderr(Stdio::null())
        .status();
    tried.is_ok_and(|status| status.success())
}

async fn counter(admin: SocketAddr, name: &str) -> f64 {
    metric(get(admin, "/metrics", &[]).await.text(), name, &[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_system_that_fills_up_costs_lines_until_there_is_room_again() {
    if !can_mount() {
        // `/dev/full` stands in for it, in access_log.rs.
        return;
    }
    const DROPPED: &str = "serin_access_log_dropped_total";
    let upstream = Upstream::start("one").await;
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let path = directory.path().join("serin.yaml");
    let config = "accessLog: { output: disk/access.log }\n".to_owned();
    let config = config + &single(upstream.address, "");
    fs::write(&path, with_head(&config)).unwrap();
    let mount_and_run = "mount -t tmpfs -o size=8m none \"$1\" && exec \"$0\" run --config \"$2\"";
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "sh",
        "-c",
        mount_and_run,
        env!("CARGO_BIN_EXE_serin"),
    ]);
    without_settings(command.args([&disk, &path]));
    let mut running = Running::spawn(&mut command);
    let admin = Running::address(&running.wait_for("serin is up"), "admin=");
    let web = Running::address(&running.wait_for(" listening "), "address=");
    // The disk as the program sees it.
    let root = format!("/proc/{}/root{}", running.child.id(), disk.display());
    let (log, filler) = (format!("{root}/access.log"), format!("{root}/filler"));
    let mut sent = 0;
    let mut client = Client::connect(web).await;
    let mut request = async || {
        sent += 1;
        assert_eq!(client.get("/", &[]).await.text(), "one");
        sent
    };
    request().await;
    let is_written = |count| fs::read_to_string(&log).is_ok_and(|log| log.lines().count() >= count);
    eventually("the first line is written", || is_written(1)).await;
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[b'x'; 1024]).is_ok() {}
    // Else it would hold the room even when it is removed.
    drop(file);

    // What is left of the page of the first line has room for some.
    while counter(admin, DROPPED).await < 20.0 {
        request().await;
    }
    running.wait_for("access log lines cannot be written and are dropped");
    fs::remove_file(&filler).unwrap();
    let written = fs::read_to_string(&log).unwrap().lines().count();
    while !is_written(written + 20) {
        request().await;
    }
    running.wait_for("access log lines are written again");
    let sent = request().await;
    let settled = async || {
        let text = fs::read_to_string(&log).unwrap();
        let whole = text
            .lines()
            .filter(|line| serde_json::from_str::<serde_json::Value>(line).is_ok());
        let whole = whole.count() as u32;
        (whole, f64::from(whole) + counter(admin, DROPPED).await)
    };
    let deadline = Instant::now() + crate::support::PATIENCE;
    // A line that was cut counts as dropped, and every other one is whole.
    while settled().await.1 != f64::from(sent) {
        assert!(Instant::now() < deadline, "{:?} of {sent}", settled().await);
    }
}

// === The log of the process ===

/// A `serin run` whose standard error the test chooses; ended with it.
struct Silent {
    child: Child,
    web: SocketAddr,
    admin: SocketAddr,
    _directory: tempfile::TempDir,
}

impl Silent {
    async fn start(upstream: SocketAddr, log: &str, error: impl Into<Stdio>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("serin.yaml");
        // Nobody can be told which ports were free.
        let [web, admin] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [web_address, admin_address] = [&web, &admin].map(|one| one.local_addr().unwrap());
        let config = format!(
            "listeners: [ {{ name: web, address: '{web_address}' }} ]\nadmin: {{ address: '{admin_address}' }}\n{}",
            single(upstream, "    hostnames: [ shop.example.com ]\n")
        );
        fs::write(&path, with_head(&config)).unwrap();
        drop((web, admin));
        let mut command = Command::new(env!("CARGO_BIN_EXE_serin"));
        command.args(["--log", log, "run", "--config"]).arg(&path);
        without_settings(&mut command);
        let child = command.stdout(Stdio::null()).stderr(error).spawn().unwrap();
        let silent = Self {
            child,
            web: web_address,
            admin: admin_address,
            _directory: directory,
        };
        eventually("it listens", || {
            std::net::TcpStream::connect(web_address).is_ok()
        })
        .await;
        silent
    }

    /// Serves requests, refuses a configuration, takes another over, and ends: all that is logged.
    async fn does_its_work(mut self) {
        let config = self._directory.path().join("serin.yaml");
        let good = fs::read_to_string(&config).unwrap();
        for _ in 0..20 {
            assert_eq!(get(self.web, "/", &[]).await.text(), "one");
            let nowhere = get(self.web, "/", &[("host", "nowhere")]).await;
            assert_eq!(nowhere.status, StatusCode::NOT_FOUND);
        }
        fs::write(&config, "listeners: [").unwrap();
        self.reload(StatusCode::UNPROCESSABLE_ENTITY).await;
        fs::write(&config, good + "# changed\n").unwrap();
        self.reload(StatusCode::OK).await;
        assert_eq!(get(self.web, "/", &[]).await.text(), "one");
        let id = self.child.id().to_string();
        assert!(Command::new("kill").arg(&id).status().unwrap().success());
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }

    async fn reload(&self, expected: StatusCode) {
        let mut admin = Client::connect(self.admin).await;
        let asked = admin.send(http::Method::POST, "/api/v1/reload", &[], "");
        assert_eq!(asked.await.unwrap().status, expected);
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        // It may have ended by itself, as it should.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_on_a_full_disk_or_with_nobody_at_its_other_end_ends_nothing() {
    let upstream = Upstream::start("one").await;
    let full = File::options().write(true).open("/dev/full").unwrap();
    Silent::start(upstream.address, "debug", full)
        .await
        .does_its_work()
        .await;
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    Silent::start(upstream.address, "debug", writer)
        .await
        .does_its_work()
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_nobody_reads_holds_nobody_up_and_says_what_was_lost() {
    let upstream = Upstream::start("one").await;
    let (mut reader, writer) = std::io::pipe().unwrap();
    let silent = Silent::start(upstream.address, "debug", writer).await;
    // A pipe holds 64 KiB, and the queue before it 4096 lines.
    let mut client = Client::connect(silent.web).await;
    for _ in 0..6000 {
        let nowhere = client.get("/", &[("host", "nowhere")]).await;
        assert_eq!(nowhere.status, StatusCode::NOT_FOUND);
    }
    assert_eq!(client.get("/", &[]).await.text(), "one");
    let read = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).map(|_| text).unwrap()
    });
    drop(client);
    silent.does_its_work().await;
    let text = read.await.unwrap();
    assert!(
        text.contains("lines of this log could not be written"),
        "{}",
        text.len()
    );
    assert!(text.contains("configuration taken over"));
}

// === Clocks ===

#[tokio::test]
async fn files_from_the_past_and_the_future_are_taken_over_like_any_other() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let epoch = SystemTime::UNIX_EPOCH;
    let known = fs::metadata(proxy.config_file())
        .unwrap()
        .modified()
        .unwrap();
    // As after a restored backup, a clock that was wrong, and tools that keep times as they were.
    for (turn, time) in [
        epoch + Duration::from_secs(86_400),
        epoch + Duration::from_secs(4_000_000_000),
        known,
        known,
    ]
    .into_iter()
    .enumerate()
    {
        let before = proxy.revision();
        // Of the same length each time.
        let text = with_head(&single(
            upstream.address,
            &format!("    hostnames: [ h{turn} ]\n"),
        ));
        let beside = proxy.directory().join("beside");
        fs::write(&beside, text).unwrap();
        let times = FileTimes::new().set_modified(time).set_accessed(time);
        File::options()
            .write(true)
            .open(&beside)
            .unwrap()
            .set_times(times)
            .unwrap();
        if turn % 2 == 0 {
            fs::rename(&beside, proxy.config_file()).unwrap();
        } else {
            fs::copy(&beside, proxy.config_file()).unwrap();
            let file = File::options()
                .write(true)
                .open(proxy.config_file())
                .unwrap();
            file.set_times(times).unwrap();
        }
        eventually("the file is taken over", || proxy.revision() > before).await;
        let host = format!("h{turn}");
        let reply = get(proxy.address(), "/", &[("host", &host)]).await;
        assert_eq!(reply.text(), "one", "turn {turn}");
    }
}

/// Everything that reads the time of day, and what for. What decides how long something may take must
/// not be here: it goes by clocks that nobody sets.
#[test]
fn nothing_that_measures_reads_the_time_of_day() {
    let allowed = [
        ("src/admin/view.rs", "shows times"),
        (
            "src/config/check/user_list.rs",
            "warns of lists that have expired",
        ),
        ("src/config/endpoints_file.rs", "notes when files were read"),
        (
            "src/config/load.rs",
            "notes when files were read, and what has expired",
        ),
        ("src/config/value.rs", "reads days"),
        (
            "src/control.rs",
            "notes when a configuration was taken over",
        ),
        ("src/discovery.rs", "has a test"),
        ("src/discovery/job.rs", "notes when names were asked for"),
        (
            "src/discovery/resolution.rs",
            "notes when names were asked for",
        ),
        (
            "src/discovery/resolver.rs",
            "notes that, and which files have changed",
        ),
        (
            "src/discovery/schedule.rs",
            "hands on when names were asked for",
        ),
        ("src/control/weights.rs", "notes when weights were set"),
        ("src/history.rs", "notes when a file was taken over"),
        ("src/weights.rs", "says when weights were set"),
        ("src/weights/state.rs", "writes when weights were set"),
        ("src/telemetry/access_log.rs", "writes times"),
        ("src/telemetry/access_log/tests.rs", "is a test"),
        ("src/telemetry/trace/otlp.rs", "writes times"),
    ];
    let mut found = Vec::new();
    let mut directories = vec![Path::new("src").to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if fs::read_to_string(&path).is_ok_and(|text| text.contains("SystemTime")) {
                found.push(path.to_str().unwrap().to_owned());
            }
        }
    }
    found.retain(|file| allowed.iter().all(|(known, _)| known != file));
    assert_eq!(found, Vec::<String>::new());
}

// === Directories ===

/// A configuration in a directory that may go away as a whole.
struct Movable {
    proxy: Proxy,
    directory: std::path::PathBuf,
    away: std::path::PathBuf,
    stable: Upstream,
    canary: Upstream,
}

impl Movable {
    async fn start() -> Self {
        let stable = Upstream::start("stable").await;
        let canary = Upstream::start("canary").await;
        let outer = tempfile::tempdir().unwrap();
        let (directory, away) = (outer.path().join("config"), outer.path().join("away"));
        fs::create_dir(&directory).unwrap();
        let path = directory.join("serin.yaml");
        fs::write(&path, with_head(&single(stable.address, ""))).unwrap();
        Self {
            proxy: Proxy::start_at(&path, outer),
            directory,
            away,
            stable,
            canary,
        }
    }

    /// Waits until the loss is told, with what was in force going on.
    async fn is_missed(&self) {
        let refused = || self.proxy.app().board().load().refused.clone();
        eventually("the loss is noticed", || refused().is_some()).await;
        let told = refused().unwrap().to_string();
        assert!(told.contains("the file does not exist"), "{told}");
        let successful = "serin_config_last_reload_successful";
        assert_eq!(self.proxy.metric(successful, &[]), 0.0);
        self.serves("stable").await;
    }

    async fn serves(&self, version: &str) {
        assert_eq!(get(self.proxy.address(), "/", &[]).await.text(), version);
    }

    fn write(&self, directory: &Path, upstream: &Upstream) {
        let text = with_head(&single(upstream.address, ""));
        fs::write(directory.join("serin.yaml"), text).unwrap();
    }

    /// Changes are taken over after all.
    async fn follows(&self) {
        let mut turns = [(&self.canary, "canary"), (&self.stable, "stable")];
        if get(self.proxy.address(), "/", &[]).await.text() == "canary" {
            turns.reverse();
        }
        for (upstream, version) in turns {
            let before = self.proxy.revision();
            self.write(&self.directory, upstream);
            eventually("the change is in force", || self.proxy.revision() > before).await;
            self.serves(version).await;
        }
    }
}

#[tokio::test]
async fn a_directory_that_is_renamed_away_and_back_is_followed_again() {
    let movable = Movable::start().await;
    for _ in 0..2 {
        fs::rename(&movable.directory, &movable.away).unwrap();
        movable.is_missed().await;
        fs::rename(&movable.away, &movable.directory).unwrap();
        let is_back = || movable.proxy.app().board().load().refused.is_none();
        eventually("it is found again", is_back).await;
        movable.follows().await;
    }
}

#[tokio::test]
async fn a_directory_that_becomes_a_link_is_followed_through_it() {
    let movable = Movable::start().await;
    fs::rename(&movable.directory, &movable.away).unwrap();
    movable.is_missed().await;
    movable.write(&movable.away, &movable.canary);
    symlink(&movable.away, &movable.directory).unwrap();
    let is_back = || movable.proxy.app().board().load().refused.is_none();
    eventually("it is found again", is_back).await;
    movable.serves("canary").await;
    movable.follows().await;
}

#[tokio::test]
async fn a_directory_that_is_replaced_while_nobody_looks_is_followed() {
    let movable = Movable::start().await;
    let Movable {
        proxy,
        directory,
        canary,
        ..
    } = &movable;
    fs::remove_dir_all(directory).unwrap();
    fs::create_dir(directory).unwrap();
    movable.write(directory, canary);
    eventually("the new one is in force", || proxy.revision() > 1).await;
    movable.serves("canary").await;
    movable.follows().await;
}

// === Encodings ===

#[tokio::test]
async fn a_list_that_is_no_text_is_refused_with_its_place_and_the_old_one_stays() {
    let stable = Upstream::start("stable").await;
    let canary = Upstream::start("canary").await;
    let rest = "    gray:
      identity: [ { header: x-user-id } ]
      rules: [ { name: beta, userList: beta, backend: shop-canary } ]
userLists: [ { name: beta, file: beta.txt } ]
";
    let config = shop(stable.address, canary.address, (1, 0), rest);
    let proxy = Proxy::start_with(&config, |directory| {
        fs::write(directory.join("beta.txt"), "ann\n").unwrap();
    });
    let list = proxy.directory().join("beta.txt");
    let version = async |user: &str| {
        let reply = get(proxy.address(), "/", &[("x-user-id", user)]).await;
        reply.text().to_owned()
    };
    let utf16 = |text: &str, order: fn(u16) -> [u8; 2]| -> Vec<u8> {
        text.encode_utf16().flat_map(order).collect()
    };
    let mut known = "ann".to_owned();
    for (turn, (content, expected)) in [
        (
            utf16("\u{FEFF}bob\n", u16::to_le_bytes),
            "beta.txt:1:1: the file is UTF-16",
        ),
        (
            utf16("\u{FEFF}bob\n", u16::to_be_bytes),
            "beta.txt:1:1: the file is UTF-16",
        ),
        (
            utf16("bob\n", u16::to_le_bytes),
            "beta.txt:1:1: the file looks like UTF-16",
        ),
        (
            b"bob\nren\xE9\n".to_vec(),
            "beta.txt:2:4: byte 0xE9 is not UTF-8",
        ),
        (
            b"bob\n\neve\0\n".to_vec(),
            "beta.txt:3:4: NUL byte in an id",
        ),
        (
            b"\x1F\x8B\x08\0\0\0\0\0".to_vec(),
            "beta.txt:1:1: the file is compressed with gzip",
        ),
        (
            b"PK\x03\x04\x14\0\0\0".to_vec(),
            "beta.txt:1:1: the file is a ZIP archive",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        fs::write(&list, content).unwrap();
        let problem = || {
            let status = proxy.app().board().load();
            status
                .stale_lists
                .values()
                .next()
                .cloned()
                .unwrap_or_default()
        };
        eventually(expected, || problem().contains(expected)).await;
        let successful = "serin_user_list_last_load_successful";
        assert_eq!(proxy.metric(successful, &[("list", "beta")]), 0.0);
        assert_eq!(version(&known).await, "canary", "{expected}");
        // With a byte order mark, as editors of Windows write it.
        known = format!("user-{turn}");
        fs::write(&list, format!("\u{FEFF}{known}\r\n")).unwrap();
        eventually("the sound list is in force", || problem().is_empty()).await;
        assert_eq!(version(&known).await, "canary");
    }
}

#[tokio::test]
async fn a_configuration_that_is_no_text_is_refused_with_its_place() {
    let upstream = Upstream::start("one").await;
    let good = single(upstream.address, "");
    let proxy = Proxy::start(&good);
    let text = with_head(&good);
    let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let line = text.lines().count() + 1;
    let latin1 = [text.as_bytes(), b"# caf\xE9\n"].concat();
    for (content, expected) in [
        (
            utf16,
            "the file looks like UTF-16; save it as UTF-8".to_owned(),
        ),
        (latin1, format!("line {line} has the byte 0xE9")),
        (
            b"\x1F\x8B\x08\0".to_vec(),
            "the file is compressed with gzip".to_owned(),
        ),
    ] {
        fs::write(proxy.config_file(), content).unwrap();
        let told = || {
            let refused = proxy.app().board().load().refused.clone();
            refused
                .map(|problems| problems.to_string())
                .unwrap_or_default()
        };
        eventually(&expected, || told().contains(&expected)).await;
        assert_eq!(get(proxy.address(), "/", &[]).await.text(), "one");
    }
    let before = proxy.revision();
    fs::write(proxy.config_file(), format!("\u{FEFF}{text}")).unwrap();
    eventually("a byte order mark does no harm", || {
        proxy.revision() > before
    })
    .await;
}

// === Sizes ===

fn many_routes(upstream: SocketAddr, count: usize, weight: u32) -> String {
    let mut text = format!(
        "backends:
  - {{ name: stable, endpoints: ['{upstream}'] }}
  - {{ name: canary, endpoints: ['{upstream}'] }}
routes:
"
    );
    for route in 0..count {
        text += &format!(
            "  - {{ name: r{route}, hostnames: [ h{route}.example.com ], matches: [ {{ path: {{ value: /bytes }} }} ], \
             backendRefs: [ {{ name: stable }}, {{ name: canary, weight: {weight} }} ] }}\n"
        );
    }
    text
}

/// A tenth of what an operator may have, since without optimisation all is ten times slower.
/// `benches/scale` measures 100,000 routes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_and_probes_go_on_while_ten_thousand_routes_are_reloaded() {
    const ROUTES: usize = 10_000;
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&many_routes(upstream.address, ROUTES, 1));
    let stop = Arc::new(AtomicBool::new(false));
    let address = proxy.address();
    let clients: Vec<_> = [0, ROUTES / 2, ROUTES - 1]
        .into_iter()
        .map(|route| {
            let stop = Arc::clone(&stop);
            tokio::spawn(async move {
                let host = format!("h{route}.example.com");
                let mut client = Client::connect(address).await;
                let mut took = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    let reply = client.get("/bytes/100", &[("host", &host)]).await;
                    assert_eq!(reply.body.len(), 100);
                    took.push(begun.elapsed());
                }
                took
            })
        })
        .collect();
    for weight in 2..5 {
        proxy
            .replace(&many_routes(upstream.address, ROUTES, weight))
            .await;
    }
    let exposition = get(proxy.admin(), "/metrics", &[]);
    let probes = async {
        for _ in 0..20 {
            let probe = get(proxy.admin(), "/livez", &[]).await;
            assert_eq!(probe.status, StatusCode::OK);
        }
    };
    let (exposition, ()) = tokio::join!(exposition, probes);
    assert!(exposition.text().contains("route=\"r9999\""));
    stop.store(true, Ordering::Relaxed);
    let mut took = Vec::new();
    for client in clients {
        took.extend(client.await.unwrap());
    }
    took.sort_unstable();
    let p99 = took[took.len() * 99 / 100];
    assert!(
        p99 < Duration::from_secs(1),
        "{p99:?} of {} requests",
        took.len()
    );
}

#[test]
fn ten_times_the_routes_take_about_ten_times_as_long() {
    let directory = tempfile::tempdir().unwrap();
    let took = |count| {
        let path = directory.path().join(format!("{count}.yaml"));
        let text = many_routes(([127, 0, 0, 1], 9).into(), count, 1);
        fs::write(&path, with_head(&text)).unwrap();
        let once = || {
            let begun = Instant::now();
            let loaded = serin::config::load::load(&path, &mut serin::config::load::load_list);
            let snapshot = serin::control::offline_snapshot(&loaded.unwrap());
            assert_eq!(snapshot.routes.len(), count);
            begun.elapsed()
        };
        (0..3).map(|_| once()).min().unwrap()
    };
    let (few, many) = (took(800), took(8000));
    // Were it quadratic, it would be a hundred times; the machine may be busy meanwhile.
    assert!(
        many < few * 40,
        "{few:?}, and {many:?} for ten times as many"
    );
}
