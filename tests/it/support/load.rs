//! Clients in steady use: on connections that are kept alive, on new ones, and over HTTP/2. Each of
//! their requests has to be answered, and none of their connections may be refused.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::{Raw, eventually};

/// How long a client rests after each request.
const PACE: Duration = Duration::from_millis(3);

/// The clients; each panics at the first request that fails.
pub(crate) struct Load {
    clients: Vec<JoinHandle<()>>,
    aim: Arc<Aim>,
}

struct Aim {
    /// Where new connections go, as a load balancer would have it.
    address: std::sync::Mutex<SocketAddr>,
    is_over: AtomicBool,
    /// Requests that were answered, of each kind of client.
    served: [AtomicUsize; 3],
}

impl Load {
    /// Eight clients of each kind.
    pub(crate) fn start(address: SocketAddr) -> Self {
        let aim = Arc::new(Aim {
            address: std::sync::Mutex::new(address),
            is_over: AtomicBool::new(false),
            served: Default::default(),
        });
        let clients = (0..8).flat_map(|_| {
            [
                tokio::spawn(keep_alive(Arc::clone(&aim))),
                tokio::spawn(anew(Arc::clone(&aim))),
                tokio::spawn(over_http2(Arc::clone(&aim))),
            ]
        });
        Self {
            clients: clients.collect(),
            aim,
        }
    }

    /// From now on new connections go there.
    pub(crate) fn aim_at(&self, address: SocketAddr) {
        *self.aim.address.lock().unwrap() = address;
    }

    /// Waits until so many more requests of each kind have been answered.
    pub(crate) async fn goes_on(&self, requests: usize) {
        let before = self.served();
        eventually("requests are answered", || {
            self.is_well();
            let now = self.served();
            (0..3).all(|kind| now[kind] >= before[kind] + requests)
        })
        .await;
    }

    /// Ends it, and returns how many requests were answered.
    pub(crate) async fn end(self) -> usize {
        self.aim.is_over.store(true, Ordering::SeqCst);
        let served = self.served().iter().sum();
        for client in self.clients {
            client.await.unwrap();
        }
        served
    }

    fn is_well(&self) {
        assert!(
            self.clients.iter().all(|client| !client.is_finished()),
            "a client has failed"
        );
    }

    fn served(&self) -> [usize; 3] {
        let served = |kind: usize| self.aim.served[kind].load(Ordering::SeqCst);
        std::array::from_fn(served)
    }
}

impl Aim {
    fn address(&self) -> SocketAddr {
        *self.address.lock().unwrap()
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    async fn served(&self, kind: usize) {
        self.served[kind].fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(PACE).await;
    }
}

async fn keep_alive(aim: Arc<Aim>) {
    while !aim.is_over() {
        let mut raw = Raw::connect(aim.address()).await;
        loop {
            raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
            let reply = raw.read_until("\r\n\r\none").await;
            assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
            aim.served(0).await;
            if reply.contains("connection: close") || aim.is_over() {
                break;
            }
        }
    }
}

async fn anew(aim: Arc<Aim>) {
    while !aim.is_over() {
        let mut raw = Raw::connect(aim.address()).await;
        raw.send("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            .await;
        let reply = raw.read_to_end().await;
        assert!(
            reply.starts_with("HTTP/1.1 200") && reply.ends_with("\r\n\r\none"),
            "{reply:?}"
        );
        aim.served(1).await;
    }
}

async fn over_http2(aim: Arc<Aim>) {
    while !aim.is_over() {
        let stream = TcpStream::connect(aim.address()).await.unwrap();
        let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.unwrap();
        let driver = tokio::spawn(connection);
        let mut answered = 0;
        while !aim.is_over() && sender.ready().await.is_ok() {
            let request = Request::get("http://a/").body(Empty::<Bytes>::new());
            match sender.try_send_request(request.unwrap()).await {
                Ok(response) => {
                    assert_eq!(response.status(), 200);
                    assert_eq!(response.collect().await.unwrap().to_bytes(), "one");
                    answered += 1;
                    aim.served(2).await;
                }
                Err(mut error) => {
                    // Not sent, or not taken (RFC 9113 section 6.8): the connection has taken its leave.
                    let unsent = error.take_message().is_some() || is_not_taken(error.error());
                    assert!(unsent, "a request is lost: {}", error.into_error());
                    break;
                }
            }
        }
        assert!(answered > 0 || aim.is_over(), "sent away without a request");
        drop(sender);
        driver.await.unwrap().unwrap();
    }
}

/// GOAWAY without an error: the server says itself that it has not touched the request.
fn is_not_taken(error: &hyper::Error) -> bool {
    let cause = std::error::Error::source(error);
    let cause = cause.and_then(|cause| cause.downcast_ref::<h2::Error>());
    cause.is_some_and(|cause| {
        cause.is_go_away() && cause.is_remote() && cause.reason() == Some(h2::Reason::NO_ERROR)
    })
}
