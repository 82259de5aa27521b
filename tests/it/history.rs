//! Revisions of the configuration file: which are kept, what is told of them, and how one is put back.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use crate::cli::serin;
use crate::support::{Proxy, Upstream, eventually, shop, with_head};

const HISTORY: &str = "history: { directory: kept, keep: 3 }\n";

/// What the program says: exit code, standard output, standard error.
fn told(arguments: &[&str], config: &Path) -> (i32, String, String) {
    let output = serin(arguments)
        .arg("--config")
        .arg(config)
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn kept(proxy: &Proxy) -> usize {
    let entries = fs::read_dir(proxy.directory().join("kept"));
    entries.map_or(0, |entries| {
        let names = entries.map(|entry| entry.unwrap().file_name());
        names
            .filter(|name| name.to_str().unwrap().ends_with(".yaml"))
            .count()
    })
}

/// Weights of the canary that a proxy takes over one after the other.
async fn after(weights: &[u32]) -> (Proxy, impl Fn(u32) -> String) {
    let upstream = Upstream::start("one").await.address;
    let config =
        move |canary| HISTORY.to_owned() + &shop(upstream, upstream, (100 - canary, canary), "");
    let proxy = Proxy::start(&config(weights[0]));
    eventually("the first is kept", || kept(&proxy) == 1).await;
    for (position, canary) in weights.iter().enumerate().skip(1) {
        proxy.replace(&config(*canary)).await;
        eventually("the next is kept", || kept(&proxy) == (position + 1).min(3)).await;
    }
    (proxy, config)
}

#[tokio::test]
async fn what_was_in_force_is_listed_with_what_it_has_changed_and_the_oldest_go() {
    let (proxy, config) = after(&[1, 5, 10, 50]).await;
    let file = proxy.config_file();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    // Somebody else's.
    fs::write(proxy.directory().join("kept/notes.yaml"), "mine").unwrap();
    proxy.replace(&config(100)).await;
    let lines = || {
        let (code, list, errors) = told(&["history"], &file);
        assert_eq!((code, &*errors), (0, ""));
        list.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    eventually("the last is listed", || lines()[0].contains("-> 100")).await;
    let lines = lines();
    assert_eq!(lines.len(), 3, "{lines:#?}");
    assert!(
        lines[0].starts_with("*   1  20") && lines[1].starts_with("    2  20"),
        "{lines:#?}"
    );
    assert!(lines[0].ends_with("+2 -2  shop: shop-stable 50 -> 0, shop: shop-canary 50 -> 100"));
    assert!(
        lines[1].ends_with("shop: shop-canary 10 -> 50"),
        "{lines:#?}"
    );
    assert!(
        lines[2].len() < 60,
        "nobody knows what it has changed: {}",
        lines[2]
    );
    assert!(proxy.directory().join("kept/notes.yaml").exists());
    let (code, text, _) = told(&["history", "--show", "2"], &file);
    assert_eq!((code, text), (0, with_head(&config(50))));
    let hash = &lines[1].split_whitespace().nth(2).unwrap()[..8];
    let (code, text, _) = told(&["history", "--show", hash], &file);
    assert_eq!((code, text), (0, with_head(&config(50))));
    let newest = fs::read_dir(proxy.directory().join("kept")).unwrap();
    let newest = newest.map(|entry| entry.unwrap().path());
    let newest = newest.filter(|path| !path.ends_with("notes.yaml"));
    let mode = fs::metadata(newest.max().unwrap())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(
        mode & 0o777,
        0o640,
        "who may read the file may read what it said"
    );
}

#[tokio::test]
async fn a_rollback_is_followed_and_a_second_one_undoes_it() {
    let (proxy, config) = after(&[1, 50]).await;
    let file = proxy.config_file();
    let canary = || proxy.metric("serin_backend_weight", &[("backend", "shop-canary")]);

    let (code, diff, _) = told(&["rollback", "--dry-run"], &file);
    assert_eq!(code, 0);
    assert!(
        diff.contains("\n-      - { name: shop-canary, weight: 50 }\n")
            && diff.contains("\n+      - { name: shop-canary, weight: 1 }\n"),
        "{diff}"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), with_head(&config(50)));

    let (code, said, errors) = told(&["rollback"], &file);
    assert_eq!((code, &*errors), (0, ""), "{said}");
    assert!(
        said.contains(&diff) && said.contains(": back to 20"),
        "{said}"
    );
    eventually("it is followed", || canary() == 1.0).await;
    eventually("it is kept as the latest", || kept(&proxy) == 3).await;
    assert_eq!(told(&["rollback"], &file).0, 0);
    eventually("it is followed", || canary() == 50.0).await;
}

#[tokio::test]
async fn a_file_that_was_never_in_force_is_put_back_to_what_is() {
    let (proxy, config) = after(&[1, 50]).await;
    let file = proxy.config_file();
    proxy.write(&(HISTORY.to_owned() + "routes: 1\n"));
    let (code, list, _) = told(&["history"], &file);
    assert!(
        code == 0 && list.contains("never taken over") && !list.contains('*'),
        "{list}"
    );
    let (code, ..) = told(&["rollback"], &file);
    assert_eq!(code, 0);
    assert_eq!(fs::read_to_string(&file).unwrap(), with_head(&config(50)));
    let (code, said, _) = told(&["rollback", "--to", "1"], &file);
    assert!(code == 0 && said.contains("already"), "{said}");
}

#[tokio::test]
async fn what_cannot_be_put_back_changes_nothing_and_says_why() {
    let (proxy, config) = after(&[1, 50]).await;
    let file = proxy.config_file();
    let now = with_head(&config(50));
    let refused = |arguments: &[&str], expected: i32, words: &str| {
        let (code, said, error) = told(arguments, &file);
        assert_eq!((code, &*said), (expected, ""), "{error}");
        assert!(error.contains(words), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), now);
    };
    refused(
        &["rollback", "--to", "3"],
        1,
        "there is no revision 3; 2 are kept",
    );
    refused(
        &["rollback", "--to", "abcdef"],
        1,
        "there is no revision abcdef",
    );
    refused(&["rollback", "--to", "latest"], 2, "is neither a number");
    // It names a list that is gone.
    let kept = proxy.directory().join("kept");
    let oldest = fs::read_dir(&kept)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .min()
        .unwrap();
    let lists = "userLists: [ { name: gone, file: gone.txt } ]\n";
    fs::write(&oldest, lists.to_owned() + &with_head(&config(1))).unwrap();
    refused(&["rollback"], 1, "gone.txt");
    let left: Vec<_> = fs::read_dir(proxy.directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("rollback") || name.ends_with(".new"))
        .collect();
    assert_eq!(left, Vec::<String>::new());

    // A ConfigMap as Kubernetes mounts it.
    let volume = tempfile::tempdir().unwrap();
    fs::create_dir(volume.path().join("..1")).unwrap();
    fs::write(volume.path().join("..1/serin.yaml"), &now).unwrap();
    symlink("..1", volume.path().join("..data")).unwrap();
    let mounted = volume.path().join("serin.yaml");
    symlink("..data/serin.yaml", &mounted).unwrap();
    fs::write(&oldest, with_head(&config(1))).unwrap();
    let directory = kept.to_str().unwrap();
    let (code, _, error) = told(&["rollback", "--directory", directory], &mounted);
    assert!(
        code == 1 && error.contains("a volume that Kubernetes writes"),
        "{error}"
    );
}

#[tokio::test]
async fn without_a_history_the_program_says_where_one_belongs() {
    let upstream = Upstream::start("one").await.address;
    let proxy = Proxy::start(&shop(upstream, upstream, (1, 0), ""));
    let (code, _, error) = told(&["history"], &proxy.config_file());
    assert!(code == 1 && error.contains("history.directory"), "{error}");
    // A directory that cannot be made holds up nobody.
    let config = "history: { directory: serin.yaml/kept }\n".to_owned()
        + &shop(upstream, upstream, (1, 1), "");
    proxy.replace(&config).await;
    let (code, _, error) = told(&["history"], &proxy.config_file());
    assert!(
        code == 2 && error.contains("kept: Not a directory"),
        "{error}"
    );
}
