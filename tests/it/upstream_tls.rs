//! TLS to upstreams: whom the proxy believes, what it shows, and what is agreed on.

use std::fs;
use std::net::SocketAddr;

use http::StatusCode;
use rustls::ServerConfig;

use crate::support::tls::{Authority, Identity};
use crate::support::{Client, Proxy, Upstream};

fn config(upstream: SocketAddr, more: &str) -> String {
    format!(
        "backends: [ {{ name: only, version: '1', endpoints: ['{upstream}'], {more} }} ]
routes: [ {{ name: all, backendRefs: [ {{ name: only }} ] }} ]
"
    )
}

/// An upstream with this certificate that agrees on one of these protocols.
async fn upstream(identity: &Identity, alpn: &[&str], clients: Option<&Authority>) -> Upstream {
    let config: ServerConfig = identity.server(alpn, clients);
    Upstream::tls("one", config).await
}

/// What the upstream has heard, or what the client was told instead.
async fn ask(proxy: &Proxy) -> Result<String, StatusCode> {
    let mut client = Client::connect(proxy.address()).await;
    let reply = client.get("/head", &[]).await;
    if reply.status == StatusCode::OK {
        let line = reply.text().lines().next().unwrap().to_owned();
        Ok(line.rsplit(' ').next().unwrap().to_owned())
    } else {
        Err(reply.status)
    }
}

#[tokio::test]
async fn the_protocol_is_agreed_on_unless_the_configuration_says_which() {
    let authority = Authority::new("tests");
    let identity = authority.issue(&["shop.internal"]);
    let bad = Err(StatusCode::BAD_GATEWAY);
    for (alpn, protocol, heard) in [
        (&["h2", "http/1.1"][..], "auto", Ok("HTTP/2.0".to_owned())),
        (&["http/1.1"], "auto", Ok("HTTP/1.1".to_owned())),
        (&[], "auto", Ok("HTTP/1.1".to_owned())),
        (&["h2", "http/1.1"], "http1", Ok("HTTP/1.1".to_owned())),
        (&["h2"], "h2", Ok("HTTP/2.0".to_owned())),
        (&["http/1.1"], "h2", bad.clone()),
        (&[], "h2", bad.clone()),
    ] {
        let upstream = upstream(&identity, alpn, None).await;
        let more =
            format!("protocol: {protocol}, tls: {{ hostname: shop.internal, caFile: ca.pem }}");
        let proxy = Proxy::start_with(&config(upstream.address, &more), |directory| {
            fs::write(directory.join("ca.pem"), &authority.pem).unwrap();
        });
        assert_eq!(ask(&proxy).await, heard, "{alpn:?} {protocol}");
    }
}

#[tokio::test]
async fn a_certificate_must_be_signed_by_whom_we_believe_and_for_the_right_name() {
    let (authority, other) = (Authority::new("tests"), Authority::new("others"));
    let identity = authority.issue(&["shop.internal", "127.0.0.1"]);
    let upstream = upstream(&identity, &[], None).await;
    for (tls, is_served) in [
        ("{ hostname: shop.internal, caFile: ca.pem }", true),
        ("{ caFile: ca.pem }", true),
        ("{ hostname: cart.internal, caFile: ca.pem }", false),
        ("{ hostname: shop.internal, caFile: other.pem }", false),
        (
            "{ hostname: cart.internal, insecureSkipVerify: true }",
            true,
        ),
    ] {
        let proxy = Proxy::start_with(
            &config(upstream.address, &format!("tls: {tls}")),
            |directory| {
                fs::write(directory.join("ca.pem"), &authority.pem).unwrap();
                fs::write(directory.join("other.pem"), &other.pem).unwrap();
            },
        );
        let heard = ask(&proxy).await;
        assert_eq!(heard.is_ok(), is_served, "{tls}: {heard:?}");
        if !is_served {
            let errors = proxy.metric(
                "serin_upstream_errors_total",
                &[("error", "tls_certificate_error")],
            );
            // It was tried once more.
            assert_eq!(errors, 2.0, "{tls}");
        }
    }
}

#[tokio::test]
async fn an_upstream_that_asks_for_a_certificate_is_shown_ours() {
    let (authority, clients) = (Authority::new("tests"), Authority::new("clients"));
    let identity = authority.issue(&["shop.internal"]);
    let ours = clients.issue(&["serin.internal"]);
    let upstream = upstream(&identity, &["h2"], Some(&clients)).await;
    let own = ", certificateFile: own.crt, keyFile: own.key";
    for (own, is_served) in [(own, true), ("", false)] {
        let tls = format!("tls: {{ hostname: shop.internal, caFile: ca.pem{own} }}");
        let proxy = Proxy::start_with(&config(upstream.address, &tls), |directory| {
            fs::write(directory.join("ca.pem"), &authority.pem).unwrap();
            ours.write(directory, "own");
        });
        assert_eq!(ask(&proxy).await.is_ok(), is_served, "{own}");
        let expires = proxy.metric(
            "serin_certificate_not_after_timestamp_seconds",
            &[("certificate", "own.crt")],
        );
        assert_eq!(expires > 1.7e9, is_served, "{own}");
    }
}
