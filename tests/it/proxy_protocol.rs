//! The PROXY protocol in both directions, and how many hops are believed.

use std::net::SocketAddr;

use serin::proxy_protocol::{Version, header};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use crate::support::tls::Authority;
use crate::support::{Proxy, Raw, Upstream, get, single};

fn listener(more: &str) -> String {
    format!("listeners: [ {{ name: web, address: '127.0.0.1:0', {more} }} ]\n")
}

const REQUEST: &str = "GET /head HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

#[tokio::test]
async fn the_client_is_whom_a_trusted_sender_names() {
    let upstream = Upstream::start("one").await;
    let config = listener("trustedProxies: [ 127.0.0.0/8 ], proxyProtocol: true");
    let proxy = Proxy::start(&(config + &single(upstream.address, "")));
    let to: SocketAddr = "192.0.2.1:443".parse().unwrap();
    for client in ["203.0.113.9:1234", "[2001:db8::7]:1234"] {
        let client: SocketAddr = client.parse().unwrap();
        let to = if client.is_ipv6() {
            "[2001:db8::1]:443".parse().unwrap()
        } else {
            to
        };
        for version in [Version::V1, Version::V2] {
            let mut raw = Raw::connect(proxy.address()).await;
            let header = header(version, client, to).unwrap();
            // In pieces, as a network may deliver it.
            for piece in header.chunks(7) {
                raw.stream.write_all(piece).await.unwrap();
            }
            raw.send(REQUEST).await;
            let reply = raw.read_to_end().await;
            let line = format!("x-forwarded-for: {}", client.ip());
            assert!(reply.contains(&line), "{reply}");
        }
    }
    for (bytes, is_served) in [
        (&b"PROXY UNKNOWN\r\n"[..], true),
        (b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00", true),
        (b"PROXY TCP4 1.2.3.4\r\n", false),
        (b"", false),
    ] {
        let mut raw = Raw::connect(proxy.address()).await;
        raw.stream.write_all(bytes).await.unwrap();
        raw.send(REQUEST).await;
        let reply = raw.read_to_end().await;
        assert_eq!(
            reply.contains("x-forwarded-for: 127.0.0.1"),
            is_served,
            "{bytes:?}: {reply}"
        );
    }
}

#[tokio::test]
async fn from_anybody_else_a_header_is_no_request() {
    let upstream = Upstream::start("one").await;
    let config = listener("trustedProxies: [ 10.0.0.0/8 ], proxyProtocol: true");
    let proxy = Proxy::start(&(config + &single(upstream.address, "")));
    let mut forged = Raw::connect(proxy.address()).await;
    forged.send("PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n").await;
    forged.send(REQUEST).await;
    assert!(forged.read_to_end().await.starts_with("HTTP/1.1 400"));
    let mut plain = Raw::connect(proxy.address()).await;
    plain.send(REQUEST).await;
    assert!(
        plain
            .read_to_end()
            .await
            .contains("x-forwarded-for: 127.0.0.1")
    );
}

#[tokio::test]
async fn a_header_comes_before_tls() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    let config = listener(
        "trustedProxies: [ 127.0.0.0/8 ], proxyProtocol: true, tls: { certificates: [ { certificateFile: one.crt, keyFile: one.key } ] }",
    );
    let proxy = Proxy::start_with(&(config + &single(upstream.address, "")), |directory| {
        authority.issue(&["a"]).write(directory, "one");
    });
    let mut stream = tokio::net::TcpStream::connect(proxy.address())
        .await
        .unwrap();
    stream
        .write_all(b"PROXY TCP4 203.0.113.9 192.0.2.1 1 2\r\n")
        .await
        .unwrap();
    let mut client = authority.client(&["h2"]).over(stream, "a").await;
    let reply = client.get("/head", &[]).await;
    assert!(
        reply.text().contains("x-forwarded-for: 203.0.113.9"),
        "{}",
        reply.text()
    );
}

#[tokio::test]
async fn endpoints_are_told_who_the_client_is_on_a_connection_of_its_own() {
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    for version in ["v1", "v2"] {
        let config = format!(
            "backends: [ {{ name: only, endpoints: ['{}'], proxyProtocol: {version} }} ]
routes: [ {{ name: all, backendRefs: [ {{ name: only }} ] }} ]
",
            upstream.local_addr().unwrap()
        );
        let proxy = Proxy::start(&(listener("trustedProxies: [ 127.0.0.0/8 ]") + &config));
        let mut clients = Raw::connect(proxy.address()).await;
        for client in ["203.0.113.9", "203.0.113.10"] {
            clients
                .send(&format!(
                    "GET / HTTP/1.1\r\nhost: a\r\nx-forwarded-for: {client}\r\n\r\n"
                ))
                .await;
            let (mut stream, _) = upstream.accept().await.unwrap();
            let told = serin::proxy_protocol::receive(&mut stream)
                .await
                .unwrap()
                .unwrap();
            assert_eq!(told.ip().to_string(), client);
            let mut stream = Raw::over(stream);
            stream.read_until("\r\n\r\n").await;
            stream
                .send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                .await;
            clients.read_until("\r\n\r\nok").await;
            assert_eq!(stream.read_to_end().await, "", "it is not used again");
        }
    }
}

#[tokio::test]
async fn a_number_of_hops_finds_the_client_whatever_its_address_is() {
    let upstream = Upstream::start("one").await;
    let forwarded = [("x-forwarded-for", "6.6.6.6, 203.0.113.9, 198.51.100.7")];
    let gray = "    gray: { identity: [ clientAddress ], debugClients: [ 203.0.113.9, 198.51.100.7, 127.0.0.1, 6.6.6.6 ] }\n";
    for (hops, client) in [
        ("", "198.51.100.7"),
        (", trustedHops: 1", "198.51.100.7"),
        (", trustedHops: 2", "203.0.113.9"),
        (", trustedHops: 9", "6.6.6.6"),
    ] {
        let config = listener(&format!("trustedProxies: [ 127.0.0.0/8 ]{hops}"));
        let log = "accessLog: { output: access.log }\n";
        let proxy = Proxy::start(&(config + log + &single(upstream.address, gray)));
        get(proxy.address(), "/", &forwarded).await;
        let file = proxy.directory().join("access.log");
        crate::support::eventually("a line is written", || {
            std::fs::read_to_string(&file).is_ok_and(|log| log.ends_with('\n'))
        })
        .await;
        let log = std::fs::read_to_string(&file).unwrap();
        assert!(
            log.contains(&format!("\"client_ip\":\"{client}\"")),
            "{hops}: {log}"
        );
    }
}
