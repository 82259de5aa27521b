//! TLS from clients: certificates by name, versions, sessions, clients' own certificates, and
//! certificates that change.

use std::fs;
use std::path::Path;

use http::StatusCode;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{CipherSuite, HandshakeKind, ProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::tls::{Authority, Identity, shown, version};
use crate::support::{Client, Proxy, Raw, Upstream, eventually, single};

/// A configuration whose listener `web` accepts TLS with what is said.
fn with_tls(tls: &str, rest: &str) -> String {
    format!("listeners: [ {{ name: web, address: '127.0.0.1:0', tls: {tls} }} ]\n{rest}")
}

const ONE: &str = "{ certificates: [ { certificateFile: one.crt, keyFile: one.key } ] }";

fn der(identity: &Identity) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap()
}

/// What a new client is shown; one that has been there would resume its session.
async fn certificate_of(proxy: &Proxy, authority: &Authority) -> CertificateDer<'static> {
    let client = authority.client(&[]);
    let stream = client.handshake(proxy.address(), "a").await.unwrap();
    shown(&stream)
}

#[tokio::test]
async fn alpn_chooses_the_protocol_and_the_upstream_hears_https() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    let config = with_tls(ONE, &single(upstream.address, ""));
    let proxy = Proxy::start_with(&config, |directory| {
        authority
            .issue(&["shop.example.com"])
            .write(directory, "one");
    });
    for (alpn, protocol) in [
        (&["h2", "http/1.1"][..], "HTTP/2"),
        (&["http/1.1"], "HTTP/1.1"),
        (&[], "HTTP/1.1"),
    ] {
        let client = authority.client(alpn);
        let mut client = client.connect(proxy.address(), "shop.example.com").await;
        assert_eq!(matches!(client, Client::Http2(_)), protocol == "HTTP/2");
        let reply = client.get("/head", &[]).await;
        assert!(
            reply.text().contains("x-forwarded-proto: https"),
            "{}",
            reply.text()
        );
        let size = 3_000_000;
        let reply = client.get(&format!("/bytes/{size}"), &[]).await;
        assert_eq!(reply.body.len(), size);
    }
}

#[tokio::test]
async fn certificates_are_chosen_by_name() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    let exact = authority.issue(&["shop.example.com"]);
    let wildcard = authority.issue(&["*.example.com"]);
    let given = authority.issue(&["unused.example.org"]);
    let config = with_tls(
        "{ certificates: [
            { certificateFile: exact.crt, keyFile: exact.key },
            { certificateFile: wildcard.crt, keyFile: wildcard.key },
            { certificateFile: given.crt, keyFile: given.key, hostnames: [ other.example.org ] } ] }",
        &single(upstream.address, ""),
    );
    let proxy = Proxy::start_with(&config, |directory| {
        exact.write(directory, "exact");
        wildcard.write(directory, "wildcard");
        given.write(directory, "given");
    });
    let client = authority.client(&[]);
    for (name, expected) in [
        ("shop.example.com", Some(&exact)),
        ("SHOP.example.com", Some(&exact)),
        ("api.example.com", Some(&wildcard)),
        ("unused.example.org", None),
        ("a.b.example.com", None),
    ] {
        let handshake = client.handshake(proxy.address(), name).await;
        assert_eq!(handshake.is_ok(), expected.is_some(), "{name}");
        if let (Ok(stream), Some(expected)) = (handshake, expected) {
            assert_eq!(shown(&stream), der(expected), "{name}");
        }
    }
    // The certificate is not for that name, but it was chosen.
    let error = client.handshake(proxy.address(), "other.example.org").await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("unused.example.org"), "{error}");
}

#[tokio::test]
async fn of_two_for_a_name_a_client_gets_the_one_that_it_can_verify() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    let elliptic = authority.issue(&["a"]);
    let rsa = authority.issue_with(&["a"], &rcgen::PKCS_RSA_SHA256);
    let config = with_tls(
        "{ certificates: [
            { certificateFile: elliptic.crt, keyFile: elliptic.key },
            { certificateFile: rsa.crt, keyFile: rsa.key } ] }",
        &single(upstream.address, ""),
    );
    let proxy = Proxy::start_with(&config, |directory| {
        elliptic.write(directory, "elliptic");
        rsa.write(directory, "rsa");
    });
    for (suite, expected) in [
        (
            CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
            &elliptic,
        ),
        (CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, &rsa),
    ] {
        let client = authority.client(&[]).with_suite(suite);
        let stream = client.handshake(proxy.address(), "a").await.unwrap();
        assert_eq!(shown(&stream), der(expected), "{suite:?}");
    }
}

#[tokio::test]
async fn versions_are_those_that_are_allowed() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    for (min, old_is_served) in [("1.2", true), ("1.3", false)] {
        let tls = format!(
            "{{ certificates: [ {{ certificateFile: one.crt, keyFile: one.key }} ], minVersion: '{min}' }}"
        );
        let proxy = Proxy::start_with(
            &with_tls(&tls, &single(upstream.address, "")),
            |directory| {
                authority.issue(&["a"]).write(directory, "one");
            },
        );
        let old = authority.client_with(&[], None, &[&rustls::version::TLS12]);
        let old = old.handshake(proxy.address(), "a").await;
        assert_eq!(old.is_ok(), old_is_served, "{min}");
        let new = authority
            .client(&[])
            .handshake(proxy.address(), "a")
            .await
            .unwrap();
        assert_eq!(version(&new), ProtocolVersion::TLSv1_3);
    }
}

#[tokio::test]
async fn sessions_are_resumed_also_after_a_reload() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    for versions in [&[&rustls::version::TLS13][..], &[&rustls::version::TLS12]] {
        let config = with_tls(ONE, &single(upstream.address, ""));
        let proxy = Proxy::start_with(&config, |directory| {
            authority.issue(&["a"]).write(directory, "one");
        });
        let client = authority.client_with(&[], None, versions);
        let mut kinds = Vec::new();
        for round in 0..4 {
            let mut stream = client.handshake(proxy.address(), "a").await.unwrap();
            // A ticket comes with the first response.
            let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
            stream.write_all(request).await.unwrap();
            let mut reply = Vec::new();
            stream.read_to_end(&mut reply).await.unwrap();
            kinds.push(stream.get_ref().1.handshake_kind().unwrap());
            // Twice: what one reload throws away is missing at the next.
            if round > 0 {
                let changed = format!("{config}# change {round}\n");
                proxy.replace(&changed).await;
            }
        }
        assert_eq!(
            kinds,
            [
                HandshakeKind::Full,
                HandshakeKind::Resumed,
                HandshakeKind::Resumed,
                HandshakeKind::Resumed
            ]
        );
    }
}

/// What an endpoint is sent by a client with this certificate or none; `None` when it is not let in.
async fn head_seen_from(
    proxy: &Proxy,
    authority: &Authority,
    own: Option<&Identity>,
) -> Option<String> {
    let client = authority.client_with(&["h2"], own, rustls::ALL_VERSIONS);
    let stream = client.handshake(proxy.address(), "a").await.ok()?;
    let (mut sender, connection) = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(stream),
    )
    .await
    .ok()?;
    tokio::spawn(connection);
    let request = http::Request::get("https://a/head")
        .header("x-client-subject", "CN=forged")
        .body(http_body_util::Empty::<bytes::Bytes>::new());
    let response = sender.send_request(request.unwrap()).await.ok()?;
    let body = http_body_util::BodyExt::collect(response.into_body()).await;
    Some(String::from_utf8(body.ok()?.to_bytes().to_vec()).unwrap())
}

#[tokio::test]
async fn clients_are_asked_for_certificates_and_their_subject_is_passed_on() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let known = ours.issue(&["ann.example"]);
    let unknown = theirs.issue(&["eve.example"]);
    for (mode, without_is_served) in [("required", false), ("optional", true)] {
        let tls = format!(
            "{{ certificates: [ {{ certificateFile: one.crt, keyFile: one.key }} ],
                clientCa: {{ file: ours.pem, mode: {mode}, subjectHeader: x-client-subject }} }}"
        );
        let proxy = Proxy::start_with(
            &with_tls(&tls, &single(upstream.address, "")),
            |directory| {
                authority.issue(&["a"]).write(directory, "one");
                fs::write(directory.join("ours.pem"), &ours.pem).unwrap();
            },
        );
        let ask = async |own| head_seen_from(&proxy, &authority, own).await;
        let seen = ask(Some(&known)).await.unwrap();
        let subject = seen
            .lines()
            .find(|line| line.starts_with("x-client-subject"));
        let subject = subject.unwrap();
        assert!(
            subject.contains("CN=ann.example") && subject.contains("O=Serin tests"),
            "{subject}"
        );
        assert_eq!(
            ask(Some(&unknown)).await,
            None,
            "{mode}: signed by somebody else"
        );
        let without = ask(None).await;
        assert_eq!(without.is_some(), without_is_served, "{mode}");
        assert!(!without.unwrap_or_default().contains("x-client-subject"));
    }
}

#[tokio::test]
async fn a_name_in_a_certificate_cannot_pass_for_several() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    let eve = authority.issue(&["eve, O=Admins + \"x\" "]);
    let tls = "{ certificates: [ { certificateFile: one.crt, keyFile: one.key } ],
                clientCa: { file: ours.pem, subjectHeader: x-client-subject } }";
    let config = with_tls(tls, &single(upstream.address, ""));
    let proxy = Proxy::start_with(&config, |directory| {
        authority.issue(&["a"]).write(directory, "one");
        fs::write(directory.join("ours.pem"), &authority.pem).unwrap();
    });
    let seen = head_seen_from(&proxy, &authority, Some(&eve)).await;
    let seen = seen.unwrap();
    let subject = r#"x-client-subject: CN=eve\, O=Admins \+ \"x\"\20, O=Serin tests"#;
    assert!(seen.lines().any(|line| line == subject), "{seen}");
}

#[tokio::test]
async fn nobody_else_may_say_whose_certificate_a_client_has() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    let config = format!(
        "listeners:
  - {{ name: web, address: '127.0.0.1:0' }}
  - name: secure
    address: '127.0.0.1:0'
    tls:
      certificates: [ {{ certificateFile: one.crt, keyFile: one.key }} ]
      clientCa: {{ file: ours.pem, subjectHeader: x-client-subject }}
{}",
        single(upstream.address, "")
    );
    let proxy = Proxy::start_with(&config, |directory| {
        authority.issue(&["a"]).write(directory, "one");
        fs::write(directory.join("ours.pem"), &authority.pem).unwrap();
    });
    let mut client = Client::connect(proxy.address()).await;
    let forged = [("x-client-subject", "CN=admin")];
    let seen = client.get("/head", &forged).await;
    assert!(!seen.text().contains("x-client-subject"), "{}", seen.text());
}

#[tokio::test]
async fn a_changed_certificate_is_taken_over_and_connections_stay() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    let (old, new) = (authority.issue(&["a"]), authority.issue(&["a"]));
    let config = with_tls(ONE, &single(upstream.address, ""));
    let proxy = Proxy::start_with(&config, |directory| old.write(directory, "one"));
    let client = authority.client(&["h2"]);
    let mut before = client.connect(proxy.address(), "a").await;
    assert_eq!(before.get("/", &[]).await.status, StatusCode::OK);

    let revision = proxy.revision();
    new.write(proxy.directory(), "one");
    eventually("the certificate is taken over", || {
        proxy.revision() > revision
    })
    .await;
    assert_eq!(certificate_of(&proxy, &authority).await, der(&new));
    assert_eq!(before.get("/", &[]).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_key_that_does_not_match_is_refused_and_the_old_certificate_stays() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    let (old, new) = (authority.issue(&["a"]), authority.issue(&["a"]));
    let config = with_tls(ONE, &single(upstream.address, ""));
    let proxy = Proxy::start_with(&config, |directory| old.write(directory, "one"));
    let revision = proxy.revision();
    let write = |name: &str, text: &str| fs::write(proxy.directory().join(name), text).unwrap();
    let refused = || proxy.metric("serin_config_reloads_total", &[("result", "failure")]);

    write("one.crt", &new.certificate);
    eventually("the pair is refused", || refused() > 0.0).await;
    assert_eq!(proxy.revision(), revision);
    let problems = proxy.app().board().load().refused.clone().unwrap();
    let problems = problems.to_string();
    assert!(
        problems.contains("`one.key` is not the key of the certificate"),
        "{problems}"
    );
    assert_eq!(certificate_of(&proxy, &authority).await, der(&old));

    write("one.key", &new.key);
    eventually("the pair is taken over", || proxy.revision() > revision).await;
    assert_eq!(certificate_of(&proxy, &authority).await, der(&new));
}

#[tokio::test]
async fn plain_http_on_a_tls_listener_and_silence_end_the_connection() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    let config = format!(
        "listenerDefaults: {{ timeouts: {{ tlsHandshake: 200ms }} }}\n{}",
        with_tls(ONE, &single(upstream.address, ""))
    );
    let proxy = Proxy::start_with(&config, |directory: &Path| {
        authority.issue(&["a"]).write(directory, "one");
    });
    let mut plain = Raw::connect(proxy.address()).await;
    plain.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(!plain.read_to_end().await.contains("HTTP/1.1 200"));
    let mut silent = Raw::connect(proxy.address()).await;
    assert_eq!(silent.read_to_end().await, "");
    assert_eq!(upstream.requests(), 0);
    eventually("nothing is left", || {
        proxy.app().connections().iter().sum::<usize>() == 0
    })
    .await;
}

#[tokio::test]
async fn a_connection_that_rests_too_long_ends_with_a_word() {
    let upstream = Upstream::start("one").await;
    let authority = Authority::new("tests");
    let config = format!(
        "listenerDefaults: {{ timeouts: {{ idle: 200ms }} }}\n{}",
        with_tls(ONE, &single(upstream.address, ""))
    );
    let proxy = Proxy::start_with(&config, |directory: &Path| {
        authority.issue(&["a"]).write(directory, "one");
    });
    let client = authority.client(&["http/1.1"]);
    let mut stream = client.handshake(proxy.address(), "a").await.unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    stream.write_all(request).await.unwrap();
    // Without close_notify this is an error.
    let mut read = Vec::new();
    stream.read_to_end(&mut read).await.unwrap();
    assert!(read.starts_with(b"HTTP/1.1 200"));
}
