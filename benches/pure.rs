//! What a request costs before it touches a socket, and what a reload costs: `cargo bench --bench
//! pure`.
#![allow(
    missing_docs,
    reason = "criterion's macros make public functions without any"
)]

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use http::{HeaderMap, HeaderValue, Method};
use serin::config::Config;
use serin::config::load::{load_list, load_text};
use serin::discovery::{Located, Names, Origin, locate};
use serin::routing::RequestHead;
use serin::routing::split::Split;
use serin::routing::user_list::{Format, UserList};
use serin::snapshot::{Living, Revision, Sources, compile};
use serin::telemetry::metrics::Metrics;
use serin::weights::RuntimeWeights;
use tokio::time::Instant;

/// A configuration with so many routes, each with a host of its own, two versions and a rule.
fn config(routes: usize) -> Config {
    let mut text = "listeners: [ { name: web, address: '127.0.0.1:8080' } ]
backends:
  - { name: stable, version: '1', endpoints: ['127.0.0.1:9001', '127.0.0.1:9003'] }
  - { name: canary, version: '2', endpoints: ['127.0.0.1:9002'] }
routes:
"
    .to_owned();
    for route in 0..routes {
        text.push_str(&format!(
            "  - name: route-{route}
    hostnames: [host-{}.example.com]
    matches: [ {{ path: {{ type: PathPrefix, value: /area-{} }} }} ]
    backendRefs: [ {{ name: stable, weight: 95 }}, {{ name: canary, weight: 5 }} ]
    gray:
      identity: [ {{ header: x-user-id }} ]
      rules: [ {{ name: qa, header: {{ name: x-canary, value: always }}, backend: canary }} ]
",
            route / 10,
            route % 10,
        ));
    }
    load_text(Path::new("bench.yaml"), &text, &mut load_list)
        .expect("the configuration is sound")
        .config
}

fn endpoints(config: &Config) -> Vec<Vec<Located>> {
    let of = |backend: &serin::config::Backend| {
        let all = backend.endpoints.iter().map(|one| (one, Origin::Config));
        locate(all, &Names::new())
    };
    config.backends.iter().map(of).collect()
}

fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("host", "host-0.example.com"),
        ("user-agent", "Mozilla/5.0 (X11; Linux x86_64)"),
        ("accept", "text/html,application/xhtml+xml"),
        ("accept-encoding", "gzip, br"),
        ("x-user-id", "user-4711"),
        ("cookie", "session=0123456789abcdef; theme=dark"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers
}

fn ids(count: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(count * 18);
    for id in 0..count {
        text.extend_from_slice(format!("customer-{id:08}\n").as_bytes());
    }
    text
}

fn sources<'s>(config: &'s Config, endpoints: &'s [Vec<Located>]) -> Sources<'s> {
    static NONE: RuntimeWeights = RuntimeWeights::none();
    Sources {
        config,
        lists: &[],
        endpoints,
        weights: &NONE,
    }
}

fn route_and_decide(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("route_and_decide");
    let headers = headers();
    for routes in [10, 1_000, 10_000] {
        let metrics = Metrics::new(&[], 1);
        let config = config(routes);
        let endpoints = endpoints(&config);
        let sources = sources(&config, &endpoints);
        let snapshot = compile(sources, Revision(1), &mut Living::default(), &metrics);
        let host = format!("host-{}.example.com", (routes - 1) / 10);
        let head = RequestHead {
            host: &host,
            path: "/area-9/cart/items",
            query: None,
            method: &Method::GET,
            headers: &headers,
            client: Ipv4Addr::LOCALHOST.into(),
        };
        let now = Instant::now();
        group.bench_function(BenchmarkId::new("find", routes), |bencher| {
            bencher.iter(|| {
                let (route, _) = snapshot.find(black_box(&head)).expect("a route takes it");
                route.name.len()
            });
        });
        group.bench_function(BenchmarkId::new("find_and_decide", routes), |bencher| {
            bencher.iter(|| {
                let (route, _) = snapshot.find(black_box(&head)).expect("a route takes it");
                route.decide(&head, false, now, &mut || 7).0.target
            });
        });
    }
}

fn split(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("split");
    for targets in [2_usize, 3, 10] {
        let names: Vec<String> = (0..targets).map(|target| format!("v{target}")).collect();
        let split = Split::new("shop", names.iter().map(|name| (name.as_str(), 10)));
        group.bench_function(BenchmarkId::new("by_identity", targets), |bencher| {
            bencher.iter(|| split.by_identity(black_box("user-4711")));
        });
        group.bench_function(BenchmarkId::new("by_lot", targets), |bencher| {
            bencher.iter(|| split.by_lot(black_box(0x1234_5678_9abc_def0)));
        });
    }
}

fn user_list(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("user_list");
    for count in [10, 1_000_000, 10_000_000] {
        let list = UserList::parse(ids(count), &Format::Lines).expect("the ids are sound");
        // Drawn beforehand and at random, as users come: the same id again and again would sit in
        // the cache.
        let mut dice = fastrand::Rng::with_seed(1);
        let present: Vec<String> = (0..65_536)
            .map(|_| format!("customer-{:08}", dice.usize(..count)))
            .collect();
        let absent: Vec<String> = (0..65_536)
            .map(|_| format!("stranger-{:08}", dice.usize(..count)))
            .collect();
        for (name, users) in [("hit", &present), ("miss", &absent)] {
            let mut next = users.iter().cycle();
            group.bench_function(BenchmarkId::new(name, count), |bencher| {
                bencher.iter(|| {
                    next.next()
                        .is_some_and(|user| list.contains(black_box(user)))
                });
            });
        }
    }
    group.sample_size(10);
    let content = ids(1_000_000);
    group.bench_function("parse/1000000", |bencher| {
        bencher.iter(|| {
            UserList::parse(content.clone(), &Format::Lines)
                .expect("the ids are sound")
                .len()
        });
    });
}

fn snapshot_compile(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("snapshot_compile");
    group.sample_size(20);
    for routes in [10, 1_000, 10_000] {
        let config = config(routes);
        let endpoints = endpoints(&config);
        let metrics = Metrics::new(&[], 1);
        let mut living = Living::default();
        // As at a reload: endpoints and metric handles are there already.
        let sources = sources(&config, &endpoints);
        let _living = compile(sources, Revision(1), &mut living, &metrics);
        group.bench_function(BenchmarkId::from_parameter(routes), |bencher| {
            bencher.iter(|| {
                compile(sources, Revision(2), &mut living, &metrics)
                    .routes
                    .len()
            });
        });
    }
}

criterion_group!(
    benches,
    route_and_decide,
    split,
    user_list,
    snapshot_compile
);
criterion_main!(benches);
