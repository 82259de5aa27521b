//! The end of a process: no new connections, and requests in flight finish, within a limit.

use serin::app::Drained;

use crate::support::{Client, Proxy, Raw, Upstream, eventually, single};

#[tokio::test]
async fn requests_in_flight_finish_and_idle_connections_close() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let address = proxy.address();
    let mut idle = Raw::connect(address).await;
    idle.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    idle.read_until("one").await;
    let mut busy = Raw::connect(address).await;
    busy.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request waits", || upstream.held() == 1).await;

    let drain = tokio::spawn(proxy.shut_down());
    assert_eq!(idle.read_to_end().await, "");
    eventually("it accepts no more", || {
        std::net::TcpStream::connect(address).is_err()
    })
    .await;
    upstream.release();
    let reply = busy.read_to_end().await;
    assert!(
        reply.starts_with("HTTP/1.1 200 OK") && reply.ends_with("one"),
        "{reply}"
    );
    assert!(reply.contains("connection: close"), "{reply}");
    assert_eq!(drain.await.unwrap(), Drained::Clean);
}

#[tokio::test]
async fn a_request_that_does_not_finish_is_cut_off_at_the_limit() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&format!(
        "shutdown: {{ timeout: 100ms }}\n{}",
        single(upstream.address, "")
    ));
    let mut busy = Raw::connect(proxy.address()).await;
    busy.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request waits", || upstream.held() == 1).await;
    assert_eq!(proxy.shut_down().await, Drained::CutOff(1));
    assert_eq!(busy.read_to_end().await, "");
}

#[tokio::test]
async fn a_connection_in_the_queue_is_still_served() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let address = proxy.address();
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(Raw::connect(address).await);
    }
    for client in &mut clients {
        client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    }
    let drain = tokio::spawn(proxy.shut_down());
    for client in &mut clients {
        let reply = client.read_to_end().await;
        assert!(reply.starts_with("HTTP/1.1 200 OK"), "{reply:?}");
    }
    assert_eq!(drain.await.unwrap(), Drained::Clean);
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn an_app_can_start_and_stop_many_times() {
    let upstream = Upstream::start("one").await;
    for _ in 0..10 {
        let proxy = Proxy::start(&single(upstream.address, ""));
        let mut client = Client::connect(proxy.address()).await;
        assert_eq!(client.get("/", &[]).await.text(), "one");
        assert_eq!(proxy.shut_down().await, Drained::Clean);
    }
}
