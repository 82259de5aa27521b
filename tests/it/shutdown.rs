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

/// Clients in steady use, each on one connection: whatever is sent on a connection that stands must
/// be answered.
#[tokio::test]
async fn no_request_on_a_busy_connection_is_lost_when_its_listener_goes_or_the_process_ends() {
    let upstream = Upstream::start("one").await;
    let rest = single(upstream.address, "");
    let listener = |name: &str| format!("{{ name: {name}, address: '127.0.0.1:0' }}");
    let both = format!(
        "listeners: [ {}, {} ]\n{rest}",
        listener("web"),
        listener("gone")
    );
    let proxy = Proxy::start(&both);
    let visit = |address| async move {
        let mut raw = Raw::connect(address).await;
        for served in 0.. {
            raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
            let reply = raw.read_until("\r\n\r\none").await;
            if reply.contains("connection: close") {
                return served;
            }
            tokio::time::sleep(std::time::Duration::from_millis(3)).await;
        }
        0
    };
    for name in ["gone", "web"] {
        let address = proxy.app().listener(name).unwrap();
        let before = upstream.requests();
        let visitors: Vec<_> = (0..20).map(|_| tokio::spawn(visit(address))).collect();
        eventually("all visitors are busy", || {
            upstream.requests() > before + 200
        })
        .await;
        if name == "gone" {
            let left = format!("listeners: [ {} ]\n{rest}", listener("web"));
            proxy.replace(&left).await;
            for visitor in visitors {
                assert!(visitor.await.unwrap() > 0);
            }
        } else {
            let drain = tokio::spawn(proxy.shut_down());
            for visitor in visitors {
                assert!(visitor.await.unwrap() > 0);
            }
            assert_eq!(drain.await.unwrap(), Drained::Clean);
            return;
        }
    }
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
