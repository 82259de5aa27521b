//! Work spreads over endpoints and over workers.

use crate::support::{Client, Proxy, Raw, Upstream, eventually, single};

#[tokio::test]
async fn connections_spread_evenly_over_the_workers() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let mut clients = Vec::new();
    for count in 1..=64 {
        let mut client = Client::connect(proxy.address()).await;
        client.get("/", &[]).await;
        clients.push(client);
        let connections = proxy.app().connections();
        assert_eq!(connections.iter().sum::<usize>(), count);
        assert!(
            connections[0].abs_diff(connections[1]) <= 1,
            "{connections:?}"
        );
    }
    assert_eq!(
        proxy.metric("serin_connections_active", &[("listener", "web")]),
        64.0
    );
    drop(clients);
    eventually("they are gone", || proxy.app().connections() == [0, 0]).await;
    assert_eq!(
        proxy.metric("serin_connections_active", &[("listener", "web")]),
        0.0
    );
}

#[tokio::test]
async fn a_busy_endpoint_is_spared() {
    let (busy, free) = (Upstream::start("busy").await, Upstream::start("free").await);
    let config = format!(
        "backends: [ {{ name: both, endpoints: ['{}', '{}'] }} ]
routes: [ {{ name: all, backendRefs: [ {{ name: both }} ] }} ]
",
        busy.address, free.address
    );
    let proxy = Proxy::start(&config);
    let mut held = Vec::new();
    while busy.held() < 3 {
        let mut raw = Raw::connect(proxy.address()).await;
        let before = busy.held() + free.held();
        raw.send("GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await;
        eventually("the request waits", || busy.held() + free.held() > before).await;
        held.push(raw);
    }
    free.release();
    eventually("one endpoint is free", || {
        free.held() == 0
            && proxy.metric("serin_requests_in_flight", &[("backend", "both")])
                == busy.held() as f64
    })
    .await;
    let before = busy.requests();
    let mut client = Client::connect(proxy.address()).await;
    for _ in 0..100 {
        assert_eq!(client.get("/", &[]).await.text(), "free");
    }
    assert_eq!(busy.requests(), before);
    busy.release();
}
