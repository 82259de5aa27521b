//! User lists that change while requests run.

use super::*;

const RULE: &str = "    gray:
      identity: [ { header: x-user-id } ]
      rules: [ { name: beta, userList: beta, backend: shop-canary } ]
userLists: [ { name: beta, file: beta.txt } ]
";

/// A proxy that sends the users of a list to the canary, and everybody else to stable.
struct Beta {
    proxy: Proxy,
    list: PathBuf,
    stable: Upstream,
    canary: Upstream,
}

impl Beta {
    async fn start(ids: &str) -> Self {
        let (stable, canary) = pair().await;
        let proxy = Proxy::start_with(&config(&stable, &canary), |directory| {
            fs::write(directory.join("beta.txt"), ids).unwrap();
        });
        let list = proxy.directory().join("beta.txt");
        Self {
            proxy,
            list,
            stable,
            canary,
        }
    }
}

fn config(stable: &Upstream, canary: &Upstream) -> String {
    shop(stable.address, canary.address, (1, 0), RULE)
}

fn ids(range: std::ops::Range<u32>) -> String {
    range.map(|id| format!("customer-{id:08}\n")).collect()
}

async fn version(proxy: &Proxy, user: &str) -> String {
    get(proxy.address(), "/", &[("x-user-id", user)])
        .await
        .text()
        .to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_ids_are_reloaded_under_load_without_a_failure() {
    const IDS: u32 = 1_000_000;
    let Beta { proxy, list, .. } = Beta::start(&ids(0..IDS)).await;
    let entries = || proxy.metric("serin_user_list_entries", &[("list", "beta")]);
    assert_eq!(entries(), f64::from(IDS));
    let load = Load::start(&proxy, 2);
    let config_revision = proxy.app().board().load().taken_over_at;
    for round in 1..=3 {
        if round == 2 {
            rename_over(&list, &ids(round..IDS + 2 * round));
        } else {
            fs::write(&list, ids(round..IDS + 2 * round)).unwrap();
        }
        eventually("the new list is in force", || {
            entries() == f64::from(IDS + round)
        })
        .await;
        assert_eq!(
            version(&proxy, &format!("customer-{:08}", round - 1)).await,
            "stable"
        );
        assert_eq!(
            version(&proxy, &format!("customer-{:08}", IDS + 2 * round - 1)).await,
            "canary"
        );
        load.some_more().await;
    }
    load.finish().await;
    assert_eq!(
        proxy.app().board().load().taken_over_at,
        config_revision,
        "the config was reloaded as well"
    );
}

#[tokio::test]
async fn a_list_that_cannot_be_read_stays_as_it_was_and_a_metric_says_so() {
    let Beta { proxy, list, .. } = Beta::start("ann\n").await;
    let loaded =
        || proxy.metric("serin_user_list_last_load_successful", &[("list", "beta")]) == 1.0;

    fs::write(&list, b"ann\n\xff\xfeb\0o\0b\0\n").unwrap();
    eventually("the wrong encoding is refused", || !loaded()).await;
    assert_eq!(version(&proxy, "ann").await, "canary");
    let status = get(proxy.admin(), "/api/v1/config/status", &[])
        .await
        .json();
    assert!(
        status["userLists"][0]["problem"]
            .as_str()
            .unwrap()
            .contains("beta.txt:2:"),
        "{status}"
    );

    fs::write(&list, "bob\n").unwrap();
    eventually("the good list is in force", &loaded).await;
    assert_eq!(
        (version(&proxy, "ann").await, version(&proxy, "bob").await),
        ("stable".into(), "canary".into())
    );

    fs::remove_file(&list).unwrap();
    eventually("the loss is noticed", || !loaded()).await;
    assert_eq!(version(&proxy, "bob").await, "canary");
}

#[tokio::test]
async fn a_list_that_is_still_being_written_or_empty_is_not_taken_over() {
    let Beta { proxy, list, .. } = Beta::start("ann\nbob\n").await;
    let mut writer = open_for_writing(&list);
    writer.write_all(b"ann\n").unwrap();
    writer.flush().unwrap();
    // Time is the very thing under test: this is several times as long as a file has to rest.
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    assert_eq!(version(&proxy, "bob").await, "canary");
    writer.write_all(b"bob\neve\n").unwrap();
    drop(writer);
    let entries = || proxy.metric("serin_user_list_entries", &[("list", "beta")]);
    eventually("the whole list is in force", || entries() == 3.0).await;

    drop(open_for_writing(&list));
    let loaded = || proxy.metric("serin_user_list_last_load_successful", &[]) == 1.0;
    eventually("the empty file is refused", || !loaded()).await;
    assert_eq!(version(&proxy, "eve").await, "canary");
    fs::write(&list, "# nobody any more\n").unwrap();
    eventually("the list without ids is in force", || {
        entries() == 0.0 && loaded()
    })
    .await;
    assert_eq!(version(&proxy, "eve").await, "stable");
}

#[tokio::test]
async fn of_two_readings_the_newer_file_wins() {
    let Beta { proxy, list, .. } = Beta::start("ann\n").await;
    let big = ids(0..1_500_000);
    for round in 0..2 {
        rename_over(&list, &big);
        // While the big list is being read a small one takes its place.
        eventually("the big list is being read", || reading_threads() > 0).await;
        rename_over(&list, &format!("ann\nsmall-{round}\n"));
        let entries = || proxy.metric("serin_user_list_entries", &[("list", "beta")]);
        let last = format!("small-{round}");
        eventually("the small list is in force", || {
            let status = proxy.app().board().load();
            status
                .loaded
                .lists
                .values()
                .next()
                .unwrap()
                .list
                .contains(&last)
        })
        .await;
        eventually("nothing is being read", || reading_threads() == 0).await;
        proxy.app().reload().await.unwrap().unwrap();
        assert_eq!(entries(), 2.0, "the older reading came last");
    }
}

/// The threads of this process that read a list.
fn reading_threads() -> usize {
    let threads = fs::read_dir("/proc/self/task").unwrap().flatten();
    threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok())
        .filter(|name| name.trim() == "serin-load")
        .count()
}

#[tokio::test]
async fn a_reload_by_call_does_not_call_a_bad_list_good() {
    let Beta {
        proxy,
        list,
        stable,
        canary,
    } = Beta::start("ann\n").await;
    let loaded = || proxy.metric("serin_user_list_last_load_successful", &[]) == 1.0;
    fs::write(&list, b"\xff\xfe").unwrap();
    eventually("the bad list is refused", || !loaded()).await;
    let problems = proxy.app().reload().await.unwrap().unwrap_err();
    assert!(problems.to_string().contains("beta.txt:1:1"), "{problems}");
    assert!(!loaded());
    // A change of the configuration alone leaves it as stale as it was.
    proxy
        .replace(&config(&stable, &canary).replace("weight: 1 ", "weight: 2 "))
        .await;
    assert!(!loaded());
    fs::write(&list, "bob\n").unwrap();
    eventually("the good list is in force", &loaded).await;
}

#[tokio::test]
async fn what_was_only_touched_changes_nothing() {
    let (stable, canary) = pair().await;
    let rule = RULE.replace(
        "userLists: [",
        "userLists: [ { name: other, file: other.txt },",
    );
    let config = shop(stable.address, canary.address, (1, 0), &rule);
    let proxy = Proxy::start_with(&config, |directory| {
        fs::write(directory.join("beta.txt"), "ann\n").unwrap();
        fs::write(directory.join("other.txt"), "eve\n").unwrap();
    });
    let touch = || {
        fs::write(proxy.directory().join("beta.txt"), "ann\n").unwrap();
        proxy.write(&config);
    };
    for (round, id) in ["joe", "kim", "lea"].into_iter().enumerate() {
        touch();
        // By the time this is in force the touches have been looked at as well.
        fs::write(proxy.directory().join("other.txt"), id).unwrap();
        let revision = round as u64 + 2;
        eventually("the real change is in force", || {
            proxy.revision() == revision
        })
        .await;
    }
    let status = proxy.app().board().load();
    assert_eq!(status.taken_over_at, status.last_attempt_at);
    let reloads = proxy.metric("serin_config_reloads_total", &[]);
    assert_eq!((proxy.revision(), reloads), (4, 0.0));
}

#[tokio::test]
async fn a_reload_by_call_neither_empties_a_list_nor_takes_half_of_it() {
    let Beta { proxy, list, .. } = Beta::start("ann\nbob\n").await;
    let mut writer = open_for_writing(&list);
    let refusal = async || proxy.app().reload().await.unwrap().unwrap_err().to_string();
    // Empty it is refused in any case; that it is being written the kernel tells a little later.
    while !refusal().await.contains("beta` is being written") {
        tokio::task::yield_now().await;
    }
    writer.write_all(b"ann\n").unwrap();
    assert!(refusal().await.contains("beta` is being written"));
    assert_eq!(version(&proxy, "bob").await, "canary");
    writer.write_all(b"bob\neve\n").unwrap();
    drop(writer);
    eventually("the whole list is in force", || {
        proxy.metric("serin_user_list_entries", &[("list", "beta")]) == 3.0
    })
    .await;
    drop(open_for_writing(&list));
    while !refusal().await.contains("is not emptied") {
        tokio::task::yield_now().await;
    }
    assert_eq!(version(&proxy, "eve").await, "canary");
}

#[tokio::test]
async fn a_refused_configuration_does_not_stop_the_lists_in_force_from_being_followed() {
    let Beta {
        proxy,
        list,
        stable,
        canary,
    } = Beta::start("ann\n").await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listeners = format!(
        "listeners: [ {{ name: web, address: '127.0.0.1:0' }}, {{ name: more, address: '{}' }} ]\n",
        taken.local_addr().unwrap()
    );
    let without = shop(stable.address, canary.address, (1, 0), "");
    proxy.write(&(listeners + &without));
    eventually("the address in use is a problem", || {
        last_reload_failed(&proxy)
    })
    .await;
    fs::write(list, "bob\n").unwrap();
    eventually("the list in force has changed", || proxy.revision() == 2).await;
    assert_eq!(version(&proxy, "bob").await, "canary");
    drop(taken);
    eventually("the configuration is in force", || {
        !last_reload_failed(&proxy)
    })
    .await;
    assert_eq!(version(&proxy, "bob").await, "stable");
}

#[tokio::test]
async fn a_pipe_in_place_of_a_list_holds_nothing_up() {
    let Beta { proxy, list, .. } = Beta::start("ann\n").await;
    fs::remove_file(&list).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(&list)
        .status()
        .unwrap();
    assert!(made.success());
    let loaded = || proxy.metric("serin_user_list_last_load_successful", &[]) == 1.0;
    eventually("the pipe is refused", || !loaded()).await;
    assert_eq!(version(&proxy, "ann").await, "canary");
    assert_eq!(proxy.shut_down().await, serin::app::Drained::Clean);
}

#[tokio::test]
async fn a_new_list_is_read_before_the_config_that_names_it_takes_effect() {
    let (stable, canary) = pair().await;
    let without = shop(stable.address, canary.address, (1, 0), "");
    let with = shop(stable.address, canary.address, (1, 0), RULE);
    let proxy = Proxy::start(&without);
    proxy.write(&with);
    eventually("the missing list is a problem", || {
        last_reload_failed(&proxy)
    })
    .await;
    assert_eq!(version(&proxy, "ann").await, "stable");
    // The configuration is not touched again: that the list is there now is enough.
    fs::write(proxy.directory().join("beta.txt"), "ann\n").unwrap();
    eventually("config and list are in force", || {
        !last_reload_failed(&proxy)
    })
    .await;
    assert_eq!(version(&proxy, "ann").await, "canary");
}

#[tokio::test]
async fn a_new_list_that_is_still_being_written_is_awaited() {
    let (stable, canary) = pair().await;
    let without = shop(stable.address, canary.address, (1, 0), "");
    let with = shop(stable.address, canary.address, (1, 0), RULE);
    let with = with.replace("file: beta.txt", "file: beta.json, format: json");
    let proxy = Proxy::start(&without);
    let mut writer = fs::File::create(proxy.directory().join("beta.json")).unwrap();
    writer.write_all(b"[\"ann\",").unwrap();
    proxy.write(&with);
    // Time is the very thing under test: this is several times as long as a file has to rest.
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    assert!(!last_reload_failed(&proxy), "half of it is not read");
    assert_eq!(proxy.revision(), 1);
    writer.write_all(b"\"bob\"]").unwrap();
    drop(writer);
    eventually("the config is in force", || proxy.revision() > 1).await;
    assert_eq!(version(&proxy, "bob").await, "canary");
    assert_eq!(proxy.revision(), 2, "the list was there from the beginning");
}
