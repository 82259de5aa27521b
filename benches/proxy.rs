//! The whole way of a request, from a client's socket through the proxy to an upstream's and back:
//! `cargo bench --bench proxy`. Client, proxy and upstream share the machine, so only comparisons
//! mean anything.
#![allow(
    missing_docs,
    reason = "criterion's macros make public functions without any"
)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serin::app::{App, Follow};
use serin::config::load::{load_list, load_text};

const SIZES: [usize; 2] = [128, 65_536];

/// An upstream that answers every request head with a body of `size` bytes, one thread per
/// connection.
fn upstream(size: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n{}",
        "x".repeat(size)
    );
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            std::thread::spawn(move || serve(stream, answer.as_bytes()));
        }
    });
    address
}

fn serve(mut stream: TcpStream, answer: &[u8]) {
    let mut head = [0; 4096];
    let mut filled = 0;
    while let Ok(count @ 1..) = stream.read(&mut head[filled..]) {
        filled += count;
        if head[..filled].ends_with(b"\r\n\r\n") {
            filled = 0;
            if stream.write_all(answer).is_err() {
                return;
            }
        }
    }
}

fn proxy(upstream: SocketAddr) -> App {
    let config = format!(
        "listeners: [ {{ name: web, address: '127.0.0.1:0' }} ]
admin: {{ address: '127.0.0.1:0' }}
workers: 1
backends:
  - {{ name: stable, version: '1', endpoints: ['{upstream}'] }}
  - {{ name: canary, version: '2', endpoints: ['{upstream}'] }}
routes:
  - name: shop
    backendRefs: [ {{ name: stable, weight: 95 }}, {{ name: canary, weight: 5 }} ]
    gray: {{ identity: [ {{ header: x-user-id }} ] }}
    exposeVersion: true
"
    );
    let loaded = load_text(Path::new("bench.yaml"), &config, &mut load_list)
        .expect("the configuration is sound");
    App::start(loaded, Follow::Nothing).expect("free ports")
}

/// Sends one request and reads its response, whose body has `size` bytes.
fn exchange(stream: &mut TcpStream, buffer: &mut [u8], size: usize) {
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: shop.example.com\r\nx-user-id: user-1\r\nuser-agent: bench\r\n\r\n")
        .expect("the connection stands");
    let (mut filled, mut total) = (0, None);
    while total.is_none_or(|total| filled < total) {
        let count = stream
            .read(&mut buffer[filled..])
            .expect("the connection stands");
        assert!(count > 0, "the connection was closed");
        filled += count;
        if total.is_none() {
            let head = buffer[..filled]
                .windows(4)
                .position(|window| window == b"\r\n\r\n");
            total = head.map(|head| head + 4 + size);
        }
    }
}

fn round_trip(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("round_trip");
    for size in SIZES {
        let upstream = upstream(size);
        let app = proxy(upstream);
        let proxied = app.listener("web").expect("the listener is there");
        let mut buffer = vec![0; size + 4096];
        group.throughput(Throughput::Elements(1));
        for (name, address) in [("direct", upstream), ("through_serin", proxied)] {
            let mut stream = TcpStream::connect(address).expect("somebody listens");
            stream.set_nodelay(true).expect("the connection stands");
            group.bench_function(format!("{name}/{size}"), |bencher| {
                bencher.iter(|| exchange(&mut stream, &mut buffer, size));
            });
        }
        app.shut_down();
    }
}

criterion_group!(benches, round_trip);
criterion_main!(benches);
