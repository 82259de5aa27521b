//! A crowd of gentle clients, so that there is something to see.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::MissedTickBehavior;
use tracing::debug;

/// Connections that share the rate.
const CONNECTIONS: u32 = 8;
/// Different users among them.
const USERS: u32 = 5000;
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

/// Sends `rate` requests a second in all, for ever.
pub(super) async fn run(proxy: SocketAddr, rate: u32) {
    if rate > 0 {
        let interval = Duration::from_secs(1) * CONNECTIONS / rate;
        for _ in 0..CONNECTIONS {
            tokio::task::spawn_local(visit(proxy, interval));
        }
    }
    std::future::pending().await
}

async fn visit(proxy: SocketAddr, interval: Duration) {
    loop {
        let ended = visit_on_one_connection(proxy, interval).await;
        debug!(?ended, "demo client reconnects");
        tokio::time::sleep(RECONNECT_PAUSE).await;
    }
}

async fn visit_on_one_connection(
    proxy: SocketAddr,
    interval: Duration,
) -> Result<(), hyper::Error> {
    let Ok(stream) = TcpStream::connect(proxy).await else {
        return Ok(());
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::task::spawn_local(connection);
    let mut tick = tokio::time::interval(interval);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        visit_once(&mut sender).await?;
    }
}

async fn visit_once(sender: &mut SendRequest<Empty<Bytes>>) -> Result<(), hyper::Error> {
    sender.ready().await?;
    let request = Request::get("/")
        .header("host", "shop.example.com")
        .header("x-user-id", format!("user-{}", fastrand::u32(..USERS)))
        .body(Empty::new());
    if let Ok(request) = request {
        sender
            .send_request(request)
            .await?
            .into_body()
            .collect()
            .await?;
    }
    Ok(())
}
