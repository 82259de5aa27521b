//! Whether the proxy that injects faults really does what it says.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::fault::{Fault, FaultProxy, GARBAGE, Shape, Slices, When};
use crate::support::{Upstream, eventually};

/// How long nothing must come to be believed to be swallowed.
const SILENCE: Duration = Duration::from_millis(100);

const REQUEST: &str = "GET /bytes/20000 HTTP/1.1\r\nhost: a\r\n\r\n";

async fn stage(fault: Fault) -> (Upstream, FaultProxy) {
    let upstream = Upstream::start("one").await;
    let proxy = FaultProxy::start(upstream.address).unwrap();
    proxy.set(fault).await.unwrap();
    (upstream, proxy)
}

async fn ask(proxy: &FaultProxy) -> TcpStream {
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    client.write_all(REQUEST.as_bytes()).await.unwrap();
    client
}

/// Everything until the end, and how it ended.
async fn read_all(client: &mut TcpStream) -> (Vec<u8>, Result<(), ErrorKind>) {
    let (mut all, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        match client.read(&mut chunk).await {
            Ok(0) => return (all, Ok(())),
            Ok(count) => all.extend_from_slice(&chunk[..count]),
            Err(error) => return (all, Err(error.kind())),
        }
    }
}

/// Head and body of a whole response with 20,000 bytes, after which the connection stays open.
async fn read_response(client: &mut TcpStream) -> (usize, usize) {
    let mut all = Vec::new();
    loop {
        let mut chunk = [0; 4096];
        let count = client.read(&mut chunk).await.unwrap();
        assert!(count > 0, "the end after {} bytes", all.len());
        all.extend_from_slice(&chunk[..count]);
        let head = memchr::memmem::find(&all, b"\r\n\r\n").map(|at| at + 4);
        if let Some(head) = head.filter(|head| all.len() == head + 20_000) {
            return (head, all.len() - head);
        }
    }
}

#[tokio::test]
async fn without_a_fault_everything_passes_and_is_counted() {
    let (_upstream, proxy) = stage(Fault::Nothing).await;
    let mut client = ask(&proxy).await;
    let (head, body) = read_response(&mut client).await;
    client.write_all(REQUEST.as_bytes()).await.unwrap();
    read_response(&mut client).await;
    drop(ask(&proxy).await);
    eventually("both connections are counted", || {
        proxy.passed().connections == 2
    })
    .await;
    let passed = proxy.passed();
    assert!(passed.up >= 2 * REQUEST.len() as u64, "{passed:?}");
    assert!(passed.down >= 2 * (head + body) as u64, "{passed:?}");
}

#[tokio::test]
async fn the_end_of_a_stream_passes_in_either_direction() {
    let upstream = Upstream::start("one").await;
    let proxy = FaultProxy::start(upstream.address).unwrap();
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    let request = "GET /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    client.shutdown().await.unwrap();
    let (answer, end) = read_all(&mut client).await;
    assert!(answer.ends_with(b"one"), "{answer:?}");
    assert_eq!(end, Ok(()));
}

#[tokio::test]
async fn refusing_closes_the_listener_and_resets_what_stands_until_it_is_over() {
    let (_upstream, proxy) = stage(Fault::Nothing).await;
    let mut standing = ask(&proxy).await;
    read_response(&mut standing).await;
    proxy.set(Fault::Refuse).await.unwrap();
    let (_, end) = read_all(&mut standing).await;
    assert_eq!(end, Err(ErrorKind::ConnectionReset));
    let refused = TcpStream::connect(proxy.address()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    proxy.set(Fault::Nothing).await.unwrap();
    read_response(&mut ask(&proxy).await).await;
}

#[tokio::test]
async fn a_reset_at_connect_leaves_no_time_to_ask() {
    let (upstream, proxy) = stage(Fault::Reset(When::Connect)).await;
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    let (answer, end) = read_all(&mut client).await;
    assert_eq!((answer.len(), end), (0, Err(ErrorKind::ConnectionReset)));
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn a_reset_before_the_head_comes_after_the_upstream_has_had_the_request() {
    let (upstream, proxy) = stage(Fault::Reset(When::BeforeHead)).await;
    let (answer, end) = read_all(&mut ask(&proxy).await).await;
    assert_eq!((answer.len(), end), (0, Err(ErrorKind::ConnectionReset)));
    assert_eq!(upstream.requests(), 1);
}

#[tokio::test]
async fn a_reset_after_the_head_lets_exactly_the_head_pass() {
    let (_upstream, proxy) = stage(Fault::Reset(When::AfterHead)).await;
    let (answer, end) = read_all(&mut ask(&proxy).await).await;
    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"), "{answer:?}");
    assert_eq!(
        memchr::memmem::find(&answer, b"\r\n\r\n"),
        Some(answer.len() - 4)
    );
    assert_eq!(end, Err(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_reset_in_the_body_lets_so_many_bytes_of_it_pass_also_of_a_later_response() {
    let (_upstream, proxy) = stage(Fault::Nothing).await;
    let mut client = ask(&proxy).await;
    read_response(&mut client).await;
    proxy.set(Fault::Reset(When::InBody(12_345))).await.unwrap();
    client.write_all(REQUEST.as_bytes()).await.unwrap();
    let (answer, end) = read_all(&mut client).await;
    let head = memchr::memmem::find(&answer, b"\r\n\r\n").unwrap() + 4;
    assert_eq!(answer.len() - head, 12_345);
    assert_eq!(end, Err(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_black_hole_swallows_everything_and_never_speaks_again() {
    let (upstream, proxy) = stage(Fault::Nothing).await;
    let mut standing = ask(&proxy).await;
    read_response(&mut standing).await;
    proxy.set(Fault::BlackHole).await.unwrap();
    let mut new = ask(&proxy).await;
    for client in [&mut standing, &mut new] {
        // More than socket buffers hold: somebody takes it.
        client.write_all(&vec![b'x'; 16 << 20]).await.unwrap();
    }
    proxy.set(Fault::Nothing).await.unwrap();
    for client in [&mut standing, &mut new] {
        client.write_all(REQUEST.as_bytes()).await.unwrap();
        let read = timeout(SILENCE, client.read(&mut [0])).await;
        assert!(read.is_err(), "{read:?}");
    }
    assert_eq!(upstream.requests(), 1);
    read_response(&mut ask(&proxy).await).await;
}

#[tokio::test]
async fn half_closing_ends_the_answers_alone() {
    let (upstream, proxy) = stage(Fault::HalfClose).await;
    let mut client = ask(&proxy).await;
    assert_eq!(read_all(&mut client).await, (Vec::new(), Ok(())));
    client.write_all(&vec![b'x'; 16 << 20]).await.unwrap();
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn garbage_is_answered_instead_of_a_response() {
    let (upstream, proxy) = stage(Fault::Garbage).await;
    let mut client = ask(&proxy).await;
    let mut answer = vec![0; GARBAGE.len()];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, GARBAGE);
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test]
async fn latency_is_added_in_either_direction() {
    let shape = Shape {
        latency: Duration::from_millis(30),
        jitter: Duration::from_millis(5),
        ..Shape::default()
    };
    let (_upstream, proxy) = stage(Fault::Shape(shape)).await;
    let begun = Instant::now();
    read_response(&mut ask(&proxy).await).await;
    assert!(
        begun.elapsed() >= 2 * shape.latency,
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn bandwidth_is_limited() {
    let shape = Shape {
        bandwidth: Some(200_000),
        ..Shape::default()
    };
    let (_upstream, proxy) = stage(Fault::Shape(shape)).await;
    let begun = Instant::now();
    let mut client = ask(&proxy).await;
    read_response(&mut client).await;
    // What is owed for the last chunk is waited for after it, so it counts only against a second
    // response.
    client.write_all(REQUEST.as_bytes()).await.unwrap();
    read_response(&mut client).await;
    let least = Duration::from_millis(100);
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn slices_come_one_by_one() {
    let slices = Slices {
        bytes: 1000,
        pause: Duration::from_millis(10),
    };
    let shape = Shape {
        slices: Some(slices),
        ..Shape::default()
    };
    let (_upstream, proxy) = stage(Fault::Shape(shape)).await;
    let begun = Instant::now();
    let mut client = ask(&proxy).await;
    let mut chunk = [0; 4096];
    assert_eq!(client.peek(&mut chunk).await.unwrap(), slices.bytes);
    read_response(&mut client).await;
    let least = 20 * slices.pause;
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn idle_connections_are_closed_in_time_and_busy_ones_are_not() {
    let after = Duration::from_millis(80);
    let (upstream, proxy) = stage(Fault::CloseIdle(after)).await;
    let mut busy = TcpStream::connect(proxy.address()).await.unwrap();
    let hold = b"GET /hold HTTP/1.1\r\nhost: a\r\n\r\n";
    busy.write_all(hold).await.unwrap();
    eventually("the request waits", || upstream.held() == 1).await;
    let mut idle = ask(&proxy).await;
    read_response(&mut idle).await;
    let begun = Instant::now();
    assert_eq!(read_all(&mut idle).await, (Vec::new(), Ok(())));
    let took = begun.elapsed();
    // The response had left the proxy before it was read.
    assert!(took >= after - Duration::from_millis(20), "{took:?}");
    upstream.release();
    let (answer, end) = read_all(&mut busy).await;
    assert!(answer.ends_with(b"one"), "{answer:?}");
    assert_eq!(end, Ok(()));
}

#[tokio::test]
async fn it_points_elsewhere_for_new_connections() {
    let (first, proxy) = stage(Fault::Nothing).await;
    let second = Upstream::start("two").await;
    let mut standing = ask(&proxy).await;
    read_response(&mut standing).await;
    proxy.point_at(&[second.address]);
    read_response(&mut ask(&proxy).await).await;
    standing.write_all(REQUEST.as_bytes()).await.unwrap();
    read_response(&mut standing).await;
    assert_eq!((first.requests(), second.requests()), (2, 1));
    proxy.point_at(&[]);
    let (_, end) = read_all(&mut ask(&proxy).await).await;
    assert_eq!(end, Err(ErrorKind::ConnectionReset));
}
