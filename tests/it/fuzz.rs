//! The fuzz targets on their corpus and on mutations of it, without libFuzzer.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

#[path = "../../fuzz/targets.rs"]
mod targets;

/// How many mutations of each file are tried.
const MUTATIONS: usize = 2000;

fn run(name: &str, target: fn(&[u8]), mutations: usize) {
    let seed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64;
    let mut dice = fastrand::Rng::with_seed(seed);
    let mut files: Vec<_> = fs::read_dir(format!("fuzz/corpus/{name}"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        let bytes = fs::read(&file).unwrap();
        target(&bytes);
        for _ in 0..mutations {
            let mutant = mutated(bytes.clone(), &mut dice);
            let outcome = std::panic::catch_unwind(|| target(&mutant));
            assert!(
                outcome.is_ok(),
                "{}, seed {seed}: {:?}",
                file.display(),
                String::from_utf8_lossy(&mutant)
            );
        }
    }
}

fn mutated(mut bytes: Vec<u8>, dice: &mut fastrand::Rng) -> Vec<u8> {
    const TELLING: &[u8] = b"%2F./\\\0:@,[]{}-#\"' \r\n";
    for _ in 0..dice.usize(1..6) {
        let at = dice.usize(..=bytes.len());
        let byte = if dice.bool() {
            TELLING[dice.usize(..TELLING.len())]
        } else {
            dice.u8(..)
        };
        match dice.u8(..4) {
            0 => bytes.insert(at, byte),
            1 if at < bytes.len() => drop(bytes.remove(at)),
            2 if at < bytes.len() => bytes[at] = byte,
            _ => {
                let part = bytes[at..].to_vec();
                let to = dice.usize(..=bytes.len());
                bytes.splice(to..to, part.into_iter().take(8));
            }
        }
    }
    bytes
}

#[test]
fn configurations() {
    run("config", targets::config, MUTATIONS / 20);
}

#[test]
fn request_targets() {
    run("target", targets::target, MUTATIONS / 4);
}

#[test]
fn hosts() {
    run("host", targets::host_field, MUTATIONS);
}

#[test]
fn forwarded_headers() {
    run("forwarded", targets::forwarded, MUTATIONS / 4);
}

#[test]
fn headers_of_the_proxy_protocol() {
    run("proxy_protocol", targets::proxy_header, MUTATIONS);
}

#[test]
fn traces() {
    run("traceparent", targets::traceparent, MUTATIONS);
}
