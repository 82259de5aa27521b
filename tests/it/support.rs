//! What the tests share: a proxy in this process, upstreams, clients, and waiting for facts.

pub(crate) mod client;
pub(crate) mod collector;
pub(crate) mod dns;
pub(crate) mod fault;
pub(crate) mod frames;
pub(crate) mod grpc;
pub(crate) mod load;
pub(crate) mod port;
pub(crate) mod tls;
pub(crate) mod upstream;
pub(crate) mod websocket;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serin::app::{App, Drained, Follow};
use serin::config::load::{load, load_list};
use serin::config::watch::POLL_INTERVAL;
use tempfile::TempDir;

pub(crate) use client::{Client, Raw, Reply, get};
pub(crate) use upstream::Upstream;

/// How long a fact may take before the test is said to have failed; reached only by failures.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A running proxy with its configuration in a directory of its own.
pub(crate) struct Proxy {
    app: Option<App>,
    directory: TempDir,
}

impl Proxy {
    /// Starts a proxy with this configuration; `head()` is put in front.
    pub(crate) fn start(config: &str) -> Self {
        Self::start_with(config, |_| {})
    }

    /// As `start`, after `prepare` has put other files into the directory.
    pub(crate) fn start_with(config: &str, prepare: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        prepare(directory.path());
        let path = directory.path().join("serin.yaml");
        fs::write(&path, with_head(config)).unwrap();
        Self::start_at(&path, directory)
    }

    /// Starts a proxy with the configuration at `path`, anywhere in `directory`.
    pub(crate) fn start_at(path: &Path, directory: TempDir) -> Self {
        Self::start_polling(path, directory, POLL_INTERVAL)
    }

    /// As `start_at`, looking at the files this often even if nothing tells that they changed.
    pub(crate) fn start_polling(path: &Path, directory: TempDir, poll: Duration) -> Self {
        let proxy = Self::prepare_at(path, directory, poll);
        proxy.app().open();
        proxy
    }

    /// A proxy with this configuration that does not serve yet; `head()` is put in front.
    pub(crate) fn prepare(config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("serin.yaml");
        fs::write(&path, with_head(config)).unwrap();
        Self::prepare_at(&path, directory, POLL_INTERVAL)
    }

    /// As `prepare`, with the files that are in this directory.
    pub(crate) fn prepare_in(directory: TempDir) -> Self {
        let path = directory.path().join("serin.yaml");
        Self::prepare_at(&path, directory, POLL_INTERVAL)
    }

    fn prepare_at(path: &Path, directory: TempDir, poll: Duration) -> Self {
        let loaded = load(path, &mut load_list)
            .unwrap_or_else(|problems| panic!("{}", problems.render(false)));
        let app = App::prepare(loaded, Follow::Files { poll }, Vec::new())
            .unwrap_or_else(|problems| panic!("{problems}"));
        Self {
            app: Some(app),
            directory,
        }
    }

    pub(crate) fn app(&self) -> &App {
        self.app.as_ref().unwrap()
    }

    /// Where the listener `web` is bound.
    pub(crate) fn address(&self) -> SocketAddr {
        self.app().listener("web").unwrap()
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        self.app().admin()
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn config_file(&self) -> PathBuf {
        self.directory.path().join("serin.yaml")
    }

    pub(crate) fn revision(&self) -> u64 {
        self.app().live().load().revision.0
    }

    /// Writes the configuration anew, as an editor does that saves in place.
    pub(crate) fn write(&self, config: &str) {
        fs::write(self.config_file(), with_head(config)).unwrap();
    }

    /// Writes the configuration anew and waits until it is in force.
    pub(crate) async fn replace(&self, config: &str) {
        let before = self.revision();
        self.write(config);
        eventually("the new configuration is in force", || {
            self.revision() > before
        })
        .await;
    }

    /// The value of a metric with all these labels; series that differ in other labels are summed.
    pub(crate) fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        metric(&self.app().metrics().render(), name, labels)
    }

    /// Shuts down, on a thread of its own since that blocks.
    pub(crate) async fn shut_down(mut self) -> Drained {
        let app = self.app.take().unwrap();
        tokio::task::spawn_blocking(move || app.shut_down())
            .await
            .unwrap()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(app) = self.app.take() {
            // Tests may end with connections still open; nobody waits for them to finish.
            drop(std::thread::spawn(move || app.shut_down()));
        }
    }
}

/// A listener and an admin address with free ports in front of a configuration that does not say, and
/// no lame duck.
pub(crate) fn with_head(config: &str) -> String {
    let mut text = String::new();
    for (key, line) in [
        (
            "listeners:",
            "listeners: [ { name: web, address: '127.0.0.1:0' } ]\n",
        ),
        ("admin:", "admin: { address: '127.0.0.1:0' }\n"),
        ("workers:", "workers: 2\n"),
        ("shutdown:", "shutdown: { lameDuck: 0s }\n"),
    ] {
        if !config.lines().any(|existing| existing.starts_with(key)) {
            text.push_str(line);
        }
    }
    text + config
}

/// A route `shop` with everything under `gray` from `rest`, between the given stable and canary.
pub(crate) fn shop(
    stable: SocketAddr,
    canary: SocketAddr,
    weights: (u32, u32),
    rest: &str,
) -> String {
    format!(
        "backends:
  - {{ name: shop-stable, version: '1', endpoints: ['{stable}'] }}
  - {{ name: shop-canary, version: '2', endpoints: ['{canary}'] }}
routes:
  - name: shop
    backendRefs:
      - {{ name: shop-stable, weight: {} }}
      - {{ name: shop-canary, weight: {} }}
    exposeVersion: true
{rest}",
        weights.0, weights.1
    )
}

/// One backend `only` behind a route for everything.
pub(crate) fn single(upstream: SocketAddr, rest: &str) -> String {
    format!(
        "backends: [ {{ name: only, version: '1', endpoints: ['{upstream}'] }} ]
routes:
  - name: all
    backendRefs: [ {{ name: only }} ]
{rest}"
    )
}

/// What the proxy says would become of a request.
pub(crate) async fn explain(proxy: &Proxy, host: &str, path: &str) -> serde_json::Value {
    let mut admin = Client::connect(proxy.admin()).await;
    let question = serde_json::json!({ "host": host, "path": path }).to_string();
    let explained = admin.send(http::Method::POST, "/api/v1/explain", &[], question);
    explained.await.unwrap().json()
}

/// Waits until something is so.
pub(crate) async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// As `eventually`, for what has to be asked for.
pub(crate) async fn eventually_asked(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
    }
}

/// The value of a metric in an exposition; see `Proxy::metric`.
pub(crate) fn metric(exposition: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    exposition
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' '))
        .filter(|(series, _)| series.split('{').next() == Some(name))
        .filter(|(series, _)| {
            labels
                .iter()
                .all(|(key, value)| series.contains(&format!("{key}=\"{value}\"")))
        })
        .map(|(_, value)| value.parse::<f64>().unwrap())
        .sum()
}
