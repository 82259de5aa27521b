//! Hot reload: no request fails for it, a bad file never takes effect, and what did not change
//! stays warm.

use std::fs;
use std::io::{Seek, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use http::{Method, StatusCode};
use tokio::task::JoinHandle;

use crate::support::{Client, Proxy, Upstream, eventually, get, shop, single, with_head};

mod lists;

/// Clients that send requests without a pause until they are told to stop.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `count` clients; each request must be answered with 200, and with the path's own
    /// body.
    pub(crate) fn start(proxy: &Proxy, count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let served = Arc::new(AtomicUsize::new(0));
        let address = proxy.address();
        let clients = (0..count)
            .map(|client| {
                let (stop, served) = (Arc::clone(&stop), Arc::clone(&served));
                tokio::spawn(async move {
                    let mut connection = Client::connect(address).await;
                    let mut request = 0;
                    while !stop.load(Ordering::Relaxed) {
                        request += 1;
                        let user = format!("user-{client}-{request}");
                        let headers = [("x-user-id", user.as_str())];
                        let (method, path, size) = match request % 3 {
                            0 => (Method::POST, "/echo", 2000),
                            1 => (Method::GET, "/bytes/5000", 5000),
                            _ => (Method::GET, "/bytes/10", 10),
                        };
                        let body = if method == Method::POST {
                            vec![b'x'; size]
                        } else {
                            Vec::new()
                        };
                        let reply = connection.send(method, path, &headers, body).await;
                        let reply = reply.unwrap_or_else(|error| panic!("{user}: {error:?}"));
                        assert_eq!(
                            (reply.status, reply.body.len()),
                            (StatusCode::OK, size),
                            "{user} {}",
                            reply.text()
                        );
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        Self {
            stop,
            served,
            clients,
        }
    }

    /// Waits until some more requests have been served, so that something happened in between.
    pub(crate) async fn some_more(&self) {
        let before = self.served.load(Ordering::Relaxed);
        eventually("the load goes on", || {
            self.served.load(Ordering::Relaxed) > before + 20
        })
        .await;
    }

    /// Stops; a client whose request failed has panicked, and so does this.
    pub(crate) async fn finish(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.unwrap();
        }
        self.served.load(Ordering::Relaxed)
    }
}

const GRAY: &str = "    gray: { identity: [ { header: x-user-id } ] }\n";

async fn pair() -> (Upstream, Upstream) {
    (
        Upstream::start("stable").await,
        Upstream::start("canary").await,
    )
}

/// Replaces a file as most editors do: a new one beside it, renamed over it.
pub(crate) fn rename_over(path: &Path, content: &str) {
    let beside = path.with_extension("new");
    fs::write(&beside, content).unwrap();
    fs::rename(&beside, path).unwrap();
}

fn failed_reloads(proxy: &Proxy) -> f64 {
    proxy.metric("serin_config_reloads_total", &[("result", "failure")])
}

fn last_reload_failed(proxy: &Proxy) -> bool {
    proxy.app().board().load().refused.is_some()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_reloads_under_load_fail_no_request() {
    let (stable, canary) = pair().await;
    let config = |weight| shop(stable.address, canary.address, (100 - weight, weight), GRAY);
    let proxy = Proxy::start(&config(0));
    let load = Load::start(&proxy, 4);
    for swap in 1..=54_u32 {
        let weight = swap % 100;
        let before = proxy.revision();
        let text = with_head(&config(weight));
        match swap % 3 {
            0 => fs::write(proxy.config_file(), &text).unwrap(),
            1 => rename_over(&proxy.config_file(), &text),
            _ => {
                // First something torn, then something wrong, then the file as it should be.
                for bad in [
                    text[..text.len() / 2].to_owned(),
                    text.replace("shop-canary, weight", "shop-nobody, weight"),
                ] {
                    let failures = failed_reloads(&proxy);
                    fs::write(proxy.config_file(), bad).unwrap();
                    eventually("it is refused", || failed_reloads(&proxy) > failures).await;
                }
                fs::write(proxy.config_file(), &text).unwrap();
            }
        }
        eventually("the swap is in force", || {
            let snapshot = proxy.app().live().load();
            proxy.revision() > before
                && snapshot.routes[0].gray.split.weights().nth(1) == Some(weight)
        })
        .await;
        load.some_more().await;
    }
    let served = load.finish().await;
    assert!(served > 1000, "only {served} requests");
    assert_eq!(
        proxy.metric("serin_config_last_reload_successful", &[]),
        1.0
    );
    assert_eq!(
        proxy.metric("serin_requests_total", &[("code", "200")]),
        proxy.metric("serin_requests_total", &[])
    );
}

/// A directory as Kubernetes mounts a ConfigMap: the files are links into `..data`, which is a link
/// to a generation.
pub(crate) struct Volume(pub(crate) PathBuf);

impl Volume {
    pub(crate) fn publish(&self, generation: u32, files: &[(&str, &str)]) {
        let directory = self.0.join(format!("..gen_{generation}"));
        fs::create_dir(&directory).unwrap();
        for (name, content) in files {
            fs::write(directory.join(name), content).unwrap();
            let link = self.0.join(name);
            if !link.exists() {
                symlink(Path::new("..data").join(name), link).unwrap();
            }
        }
        symlink(directory.file_name().unwrap(), self.0.join("..data_tmp")).unwrap();
        fs::rename(self.0.join("..data_tmp"), self.0.join("..data")).unwrap();
        if generation > 0 {
            fs::remove_dir_all(self.0.join(format!("..gen_{}", generation - 1))).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn config_map_swaps_change_config_and_list_together_under_load() {
    let (stable, canary) = pair().await;
    let rest = "    gray:
      identity: [ { header: x-user-id } ]
      rules: [ { name: beta, userList: beta, backend: shop-canary } ]
userLists: [ { name: beta, file: beta.txt } ]
";
    let config = |weight| with_head(&shop(stable.address, canary.address, (1000, weight), rest));
    let directory = tempfile::tempdir().unwrap();
    let volume = Volume(directory.path().to_owned());
    volume.publish(0, &[("serin.yaml", &config(0)), ("beta.txt", "user-a\n")]);
    let path = directory.path().join("serin.yaml");
    let proxy = Proxy::start_at(&path, directory);
    let load = Load::start(&proxy, 2);
    for generation in 1..=8 {
        let id = format!("user-{generation}");
        // In every other generation only the list changes.
        volume.publish(
            generation,
            &[("serin.yaml", &config(generation / 2)), ("beta.txt", &id)],
        );
        eventually("config and list of this generation are in force", || {
            let status = proxy.app().board().load();
            let list = &status.loaded.lists.values().next().unwrap().list;
            let weight = proxy.app().live().load().routes[0]
                .gray
                .split
                .weights()
                .nth(1);
            list.contains(&id) && list.len() == 1 && weight == Some(generation / 2)
        })
        .await;
        load.some_more().await;
        let reply = get(proxy.address(), "/", &[("x-user-id", &id)]).await;
        assert_eq!(reply.text(), "canary", "generation {generation}");
    }
    load.finish().await;
}

#[tokio::test]
async fn a_bad_file_never_takes_effect_and_says_where_it_is_bad() {
    let (stable, canary) = pair().await;
    let good = shop(stable.address, canary.address, (1, 0), GRAY);
    let proxy = Proxy::start(&good);
    for (bad, expected) in [
        (String::new(), "empty"),
        (
            good.replace("shop-canary, weight", "shop-canry, weight"),
            "unknown backend `shop-canry`",
        ),
        (
            good.replace("weight: 1 ", "weight: many "),
            "expected a whole number",
        ),
        (good[..good.len() / 2].to_owned(), ""),
        ("listeners: [".to_owned(), ""),
        ("\u{0}\u{1}".to_owned(), ""),
    ] {
        let revision = proxy.revision();
        let text = if bad.is_empty() { bad } else { with_head(&bad) };
        fs::write(proxy.config_file(), &text).unwrap();
        eventually("the bad file is refused", || {
            let status = proxy.app().board().load();
            status
                .refused
                .as_ref()
                .is_some_and(|problems| problems.to_string().contains(expected))
        })
        .await;
        assert_eq!(proxy.revision(), revision);
        assert_eq!(
            proxy.metric("serin_config_last_reload_successful", &[]),
            0.0
        );
        assert_eq!(
            get(proxy.address(), "/", &[("x-user-id", "a")])
                .await
                .text(),
            "stable"
        );
        let status = get(proxy.admin(), "/api/v1/config/status", &[])
            .await
            .json();
        assert_eq!(status["lastAttemptSuccessful"], false);
        assert!(
            status["problems"][0]["line"].as_u64() >= Some(1),
            "{status}"
        );

        proxy.replace(&good).await;
        eventually("the good file is in force", || !last_reload_failed(&proxy)).await;
        assert_eq!(
            proxy.metric("serin_config_last_reload_successful", &[]),
            1.0
        );
    }
}

#[tokio::test]
async fn a_reload_leaves_unchanged_endpoints_their_warm_connections() {
    let (stable, canary) = pair().await;
    let config = |weights| shop(stable.address, canary.address, weights, "");
    let proxy = Proxy::start(&config((1, 0)));
    let mut client = Client::connect(proxy.address()).await;
    client.get("/", &[]).await;
    for weight in 2..6 {
        proxy.replace(&config((weight, 0))).await;
        client.get("/", &[]).await;
    }
    assert_eq!((stable.requests(), stable.connections()), (5, 1));
}

#[tokio::test]
async fn connections_to_endpoints_that_are_gone_are_closed() {
    let (stable, canary) = pair().await;
    let proxy = Proxy::start(&single(stable.address, ""));
    get(proxy.address(), "/", &[]).await;
    proxy.replace(&single(canary.address, "")).await;
    eventually("the old connection is closed", || {
        proxy.metric("serin_upstream_connections", &[]) == 0.0
    })
    .await;
    assert_eq!(get(proxy.address(), "/", &[]).await.text(), "canary");
}

#[tokio::test]
async fn a_request_finishes_with_the_snapshot_it_began_with() {
    let (stable, canary) = pair().await;
    let proxy = Proxy::start(&single(stable.address, ""));
    let address = proxy.address();
    let waiting = tokio::spawn(async move { get(address, "/hold", &[]).await });
    eventually("the request waits", || stable.held() == 1).await;
    proxy.replace(&single(canary.address, "")).await;
    assert_eq!(get(proxy.address(), "/", &[]).await.text(), "canary");
    stable.release();
    assert_eq!(waiting.await.unwrap().text(), "stable");
}

#[tokio::test]
async fn listeners_open_and_close_with_the_file() {
    let upstream = Upstream::start("one").await;
    let rest = single(upstream.address, "");
    let listeners = |names: &[&str]| {
        let entries: Vec<String> = names
            .iter()
            .map(|name| format!("{{ name: {name}, address: '127.0.0.1:0' }}"))
            .collect();
        format!("listeners: [ {} ]\n{rest}", entries.join(", "))
    };
    let proxy = Proxy::start(&listeners(&["web"]));
    let web = proxy.address();
    let mut kept = Client::connect(web).await;
    kept.get("/", &[]).await;

    proxy.replace(&listeners(&["web", "extra"])).await;
    let extra = proxy.app().listener("extra").unwrap();
    assert_eq!(proxy.address(), web);
    assert_eq!(get(extra, "/", &[]).await.text(), "one");

    let waiting = tokio::spawn(async move { get(extra, "/hold", &[]).await });
    eventually("a request waits on the listener that will go", || {
        upstream.held() == 1
    })
    .await;
    proxy.replace(&listeners(&["web"])).await;
    eventually("it accepts no more", || {
        std::net::TcpStream::connect(extra).is_err()
    })
    .await;
    upstream.release();
    assert_eq!(waiting.await.unwrap().status, StatusCode::OK);
    assert_eq!(kept.get("/", &[]).await.text(), "one");
}

#[tokio::test]
async fn connections_of_a_listener_that_is_gone_keep_what_it_trusted() {
    let upstream = Upstream::start("one").await;
    let rest = single(upstream.address, "");
    let extra = "{ name: extra, address: '127.0.0.1:0', trustedProxies: ['127.0.0.0/8'] }";
    let web = "{ name: web, address: '127.0.0.1:0' }";
    let proxy = Proxy::start(&format!("listeners: [ {web}, {extra} ]\n{rest}"));
    let mut kept = Client::connect(proxy.app().listener("extra").unwrap()).await;
    let forwarded = [("x-forwarded-for", "9.9.9.9")];
    kept.get("/", &[]).await;
    proxy
        .replace(&format!("listeners: [ {web} ]\n{rest}"))
        .await;
    let reply = kept.get("/head", &forwarded).await;
    assert!(
        reply.text().contains("x-forwarded-for: 9.9.9.9, 127.0.0.1"),
        "{}",
        reply.text()
    );
    assert_eq!(reply.header("connection"), Some("close"));
    drop(kept);
    // With its last connection it is forgotten.
    eventually("it has no connections", || {
        proxy.metric("serin_connections_active", &[("listener", "extra")]) == 0.0
    })
    .await;
    proxy.write(&format!("listeners: [ {web} ]\n{rest}# changed\n"));
    eventually("the change is in force", || proxy.revision() == 3).await;
    assert!(proxy.app().live().load().draining_listeners.is_empty());
}

#[tokio::test]
async fn a_listener_takes_a_new_name_and_a_new_timeout_and_keeps_its_connections() {
    let upstream = Upstream::start("one").await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let listener = |name: &str, idle: &str| {
        let rest = single(upstream.address, "");
        format!(
            "listeners: [ {{ name: {name}, address: '{address}', timeouts: {{ idle: {idle} }} }} ]\n{rest}"
        )
    };
    let proxy = Proxy::start(&listener("web", "60s"));
    let mut kept = Client::connect(address).await;
    kept.get("/", &[]).await;
    proxy.replace(&listener("shop", "100ms")).await;
    assert_eq!(proxy.app().listener("shop"), Some(address));
    kept.get("/", &[]).await;
    let connections =
        |listener| proxy.metric("serin_connections_active", &[("listener", listener)]);
    assert_eq!((connections("web"), connections("shop")), (1.0, 0.0));
    let mut silent = crate::support::Raw::connect(address).await;
    assert_eq!(
        silent.read_to_end().await,
        "",
        "the new timeout closes a silent connection"
    );
    let mut new = Client::connect(address).await;
    new.get("/", &[]).await;
    assert_eq!((connections("web"), connections("shop")), (1.0, 1.0));
}

/// Opens a file as somebody does who writes it in place, slowly.
fn open_for_writing(path: &Path) -> fs::File {
    fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(path)
        .unwrap()
}

#[tokio::test]
async fn a_file_that_is_still_being_written_is_not_read() {
    let (stable, canary) = pair().await;
    let proxy = Proxy::start(&single(stable.address, ""));
    let whole = with_head(&single(canary.address, ""));
    // Up to here it is a configuration already, but not the one that is meant.
    let torn = whole.replace("name: all", "name: torn");
    let before = proxy.revision();
    let mut writer = open_for_writing(&proxy.config_file());
    writer.write_all(torn.as_bytes()).unwrap();
    writer.flush().unwrap();
    // Time is the very thing under test: this is several times as long as a file has to rest.
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    assert_eq!(proxy.revision(), before);
    writer.set_len(0).unwrap();
    writer.seek(std::io::SeekFrom::Start(0)).unwrap();
    writer.write_all(whole.as_bytes()).unwrap();
    drop(writer);
    eventually("the whole file is in force", || proxy.revision() > before).await;
    let snapshot = proxy.app().live().load();
    assert_eq!(
        (&*snapshot.routes[0].name, proxy.revision()),
        ("all", before + 1)
    );
}

#[tokio::test]
async fn a_swapped_directory_is_noticed_without_polling() {
    let (stable, canary) = pair().await;
    let outer = tempfile::tempdir().unwrap();
    for (release, upstream) in [("r1", &stable), ("r2", &canary)] {
        fs::create_dir(outer.path().join(release)).unwrap();
        let text = with_head(&single(upstream.address, ""));
        fs::write(outer.path().join(release).join("serin.yaml"), text).unwrap();
    }
    symlink("r1", outer.path().join("current")).unwrap();
    let path = outer.path().join("current/serin.yaml");
    let next = outer.path().join("next");
    let current = outer.path().join("current");
    let never = std::time::Duration::from_secs(3600);
    let proxy = Proxy::start_polling(&path, outer, never);
    assert_eq!(get(proxy.address(), "/", &[]).await.text(), "stable");
    symlink("r2", &next).unwrap();
    fs::rename(&next, &current).unwrap();
    eventually("the other release is in force", || proxy.revision() > 1).await;
    assert_eq!(get(proxy.address(), "/", &[]).await.text(), "canary");
}

#[tokio::test]
async fn an_address_in_use_refuses_the_whole_change() {
    let (stable, canary) = pair().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_address = taken.local_addr().unwrap();
    let proxy = Proxy::start(&single(stable.address, ""));
    let change = format!(
        "listeners: [ {{ name: web, address: '127.0.0.1:0' }}, {{ name: more, address: '{taken_address}' }} ]\n{}",
        single(canary.address, "")
    );
    proxy.write(&change);
    eventually("the change is refused", || last_reload_failed(&proxy)).await;
    let status = proxy.app().board().load_full();
    let problem = &status.refused.as_ref().unwrap().problems[0];
    assert!(problem.message.contains("cannot listen on"), "{problem}");
    assert_eq!(
        (problem.span.line, problem.path.as_str()),
        (4, "listeners[1].address")
    );
    assert_eq!(get(proxy.address(), "/", &[]).await.text(), "stable");
    drop(taken);
    // Once the address is free the same file takes effect, without anybody touching it.
    eventually("the change is in force", || !last_reload_failed(&proxy)).await;
    assert_eq!(get(proxy.address(), "/", &[]).await.text(), "canary");
}

#[tokio::test]
async fn what_cannot_change_at_run_time_is_said_to_need_a_restart() {
    let upstream = Upstream::start("one").await;
    let rest = single(upstream.address, "");
    let proxy = Proxy::start(&rest);
    proxy
        .replace(&format!(
            "workers: 3\nadmin: {{ address: '127.0.0.1:9' }}\nconnections: {{ max: 5 }}\ntelemetry: {{ durationBuckets: [1] }}\n{rest}"
        ))
        .await;
    let status = get(proxy.admin(), "/api/v1/config/status", &[])
        .await
        .json();
    let expected = serde_json::json!([
        "workers",
        "admin.address",
        "connections.max",
        "telemetry.durationBuckets"
    ]);
    assert_eq!(status["restartRequired"], expected);
    assert_eq!(proxy.metric("serin_config_restart_required", &[]), 1.0);
    proxy.replace(&rest).await;
    eventually("no restart is needed any more", || {
        proxy.metric("serin_config_restart_required", &[]) == 0.0
    })
    .await;
}

#[tokio::test]
async fn a_deleted_and_recreated_directory_is_followed_again() {
    let (stable, canary) = pair().await;
    let outer = tempfile::tempdir().unwrap();
    let directory = outer.path().join("config");
    fs::create_dir(&directory).unwrap();
    let path = directory.join("serin.yaml");
    fs::write(&path, with_head(&single(stable.address, ""))).unwrap();
    let proxy = Proxy::start_at(&path, outer);
    fs::remove_dir_all(&directory).unwrap();
    eventually("the loss is noticed", || last_reload_failed(&proxy)).await;
    assert_eq!(get(proxy.address(), "/", &[]).await.text(), "stable");
    for upstream in [&canary, &stable] {
        if !directory.exists() {
            fs::create_dir(&directory).unwrap();
        }
        let before = proxy.revision();
        fs::write(&path, with_head(&single(upstream.address, ""))).unwrap();
        eventually("the new file is in force", || proxy.revision() > before).await;
    }
}
