//! Checks what is spoken with the endpoints of a backend, and over what.

use std::ops::RangeInclusive;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use xxhash_rust::xxh3::Xxh3;

use crate::backend::{Http1Policy, Http2Policy, Transport, UpstreamProtocol};
use crate::config::document::Path;
use crate::config::file::{self, BackendProtocol, Size};
use crate::proxy_protocol::Version;
use crate::tls::client::{ClientTls, Trust};
use crate::tls::{self, ALPN_HTTP1, ALPN_HTTP2, Certificate};

use super::Checker;
use super::listener::{BUFFERS, WINDOWS};

/// With less, an endpoint whose segments are as large as those of the loopback device sends next to nothing.
const RECEIVE_BUFFERS: RangeInclusive<u64> = 65_536..=(1 << 30);

/// The file of our own certificate, and until when it is valid.
type OwnCertificate = Option<(String, i64)>;

impl Checker<'_> {
    pub(super) fn transport(
        &mut self,
        backend: &file::Backend,
        at: &Path,
    ) -> Option<(Arc<Transport>, OwnCertificate)> {
        // Everything that makes one connection unlike another goes in.
        let mut print = Xxh3::new();
        let http1 = self.backend_http1(&backend.http1, &at.key("http1"));
        let http2 = self.backend_http2(&backend.http2, &at.key("http2"));
        let protocol = self.upstream_protocol(backend, &at.key("protocol"));
        print.update(
            format!(
                "{protocol:?} {http1:?} {http2:?} {:?} {:?}",
                backend.tls, backend.proxy_protocol
            )
            .as_bytes(),
        );
        let (tls, own) = match &backend.tls {
            None => (None, None),
            Some(tls) => {
                let (tls, own) = self.backend_tls(tls, protocol?, &at.key("tls"), &mut print)?;
                (Some(tls), own)
            }
        };
        let transport = Transport {
            protocol: protocol?,
            tls,
            http1: http1?,
            http2: http2?,
            proxy_protocol: backend.proxy_protocol.map(|version| match version {
                file::ProxyProtocolVersion::V1 => Version::V1,
                file::ProxyProtocolVersion::V2 => Version::V2,
            }),
            fingerprint: print.digest(),
        };
        Some((Arc::new(transport), own))
    }

    fn upstream_protocol(
        &mut self,
        backend: &file::Backend,
        at: &Path,
    ) -> Option<UpstreamProtocol> {
        let problem = match (backend.protocol, backend.tls.is_some()) {
            (Some(BackendProtocol::Http1), _) | (None, false) => {
                return Some(UpstreamProtocol::Http1);
            }
            (Some(BackendProtocol::Auto) | None, true) => {
                return Some(UpstreamProtocol::Negotiated);
            }
            (Some(BackendProtocol::H2), true) | (Some(BackendProtocol::H2c), false) => {
                return Some(UpstreamProtocol::Http2);
            }
            (Some(BackendProtocol::H2c), true) => {
                ("`h2c` is HTTP/2 without TLS", "with `tls` it is `h2`")
            }
            (Some(BackendProtocol::H2), false) => {
                ("`h2` is HTTP/2 over TLS", "without `tls` it is `h2c`")
            }
            (Some(BackendProtocol::Auto), false) => (
                "without `tls` nothing can be agreed on",
                "say `http1` or `h2c`",
            ),
        };
        // `tls` may be there, and be what has been cut out.
        if !self.document.is_maimed(at) {
            self.error(at, problem.0, Some(problem.1.to_owned()));
        }
        None
    }

    pub(super) fn backend_tls(
        &mut self,
        tls: &file::BackendTls,
        protocol: UpstreamProtocol,
        at: &Path,
        print: &mut Xxh3,
    ) -> Option<(ClientTls, OwnCertificate)> {
        let name = self.optional(tls.hostname.as_deref(), &at.key("hostname"), |text| {
            ServerName::try_from(text.to_owned()).map_err(|_| "is not a host name".to_owned())
        });
        let trust = self.trust(tls, at, print);
        let own = self.own_certificate(tls, at, print);
        let (name, trust, own) = (name?, trust?, own?);
        let protocols: &[&[u8]] = match protocol {
            UpstreamProtocol::Http1 => &[ALPN_HTTP1],
            UpstreamProtocol::Http2 => &[ALPN_HTTP2],
            UpstreamProtocol::Negotiated => &[ALPN_HTTP2, ALPN_HTTP1],
        };
        let client = ClientTls::new(trust, name, own.as_ref(), protocols)
            .map_err(|error| self.error(at, format!("TLS cannot be set up: {error}"), None))
            .ok()?;
        let file = tls.certificate_file.clone();
        Some((client, file.zip(own.map(|own| own.not_after))))
    }

    fn trust(&mut self, tls: &file::BackendTls, at: &Path, print: &mut Xxh3) -> Option<Trust> {
        let ca_at = at.key("caFile");
        match (&tls.ca_file, tls.insecure_skip_verify) {
            (Some(_), true) => {
                let message = "certificates are either checked by `caFile` or not at all";
                self.error(&at.key("insecureSkipVerify"), message, None);
                None
            }
            (None, true) => {
                let message = "every certificate is believed: whoever is in between can read and change everything";
                self.warn(&at.key("insecureSkipVerify"), message, None);
                Some(Trust::Anybody)
            }
            (Some(file), false) => {
                let pem = self.read(file, &ca_at)?;
                print.update(&pem);
                tls::authorities(&pem)
                    .map_err(|reason| self.error(&ca_at, format!("`{file}` {reason}"), None))
                    .ok()
                    .map(Trust::Authorities)
            }
            (None, false) => {
                let authorities = (self.around.system_authorities)();
                if authorities.is_empty() {
                    let message =
                        "this system trusts no authority, so no endpoint could prove itself";
                    self.error(at, message, Some("name one with `caFile`".to_owned()));
                    return None;
                }
                Some(Trust::Authorities(authorities))
            }
        }
    }

    fn own_certificate(
        &mut self,
        tls: &file::BackendTls,
        at: &Path,
        print: &mut Xxh3,
    ) -> Option<Option<Certificate>> {
        match (&tls.certificate_file, &tls.key_file) {
            (None, None) => Some(None),
            (Some(certificate), Some(key)) => {
                let own = self.certificate(certificate, key, at)?;
                print.update(&own.not_after.to_le_bytes());
                print.update(own.leaf());
                Some(Some(own))
            }
            _ if self.document.is_maimed(at) => None,
            _ => {
                let message = "a certificate needs both `certificateFile` and `keyFile`";
                self.error(at, message, None);
                None
            }
        }
    }

    fn backend_http1(&mut self, own: &file::BackendHttp1, at: &Path) -> Option<Http1Policy> {
        let receive_buffer = match own.receive_buffer {
            None => Http1Policy::default().receive_buffer,
            Some(Size(0)) => None,
            given => self
                .size(given, RECEIVE_BUFFERS, &at.key("receiveBuffer"))?
                .map(|size| size as usize),
        };
        Some(Http1Policy { receive_buffer })
    }

    fn backend_http2(&mut self, own: &file::BackendHttp2, at: &Path) -> Option<Http2Policy> {
        let streams = own
            .max_concurrent_streams
            .map(|streams| Size(streams.into()));
        let streams = self.size(streams, 1..=100_000, &at.key("maxConcurrentStreams"));
        let stream_window = self.size(own.stream_window, WINDOWS, &at.key("streamWindow"));
        let connection = self.size(own.connection_window, WINDOWS, &at.key("connectionWindow"));
        let send_buffer = self.size(own.send_buffer, BUFFERS, &at.key("sendBuffer"));
        let header_list = self.size(own.header_list, 4096..=(1 << 20), &at.key("headerList"));
        let default = Http2Policy::default();
        Some(Http2Policy {
            max_requests: streams?.map_or(default.max_requests, |streams| streams as usize),
            stream_window: stream_window?.map_or(default.stream_window, |size| size as u32),
            connection_window: connection?.map_or(default.connection_window, |size| size as u32),
            send_buffer: send_buffer?.map_or(default.send_buffer, |size| size as usize),
            header_list: header_list?.map_or(default.header_list, |size| size as u32),
        })
    }
}
