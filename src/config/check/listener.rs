//! Checks listeners: addresses, TLS, and what clients may do.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use crate::config::document::Path;
use crate::config::file::{self, Size};
use crate::config::{Listener, ListenerHttp2, ListenerLimits, ListenerTimeouts, value};
use crate::routing::table::Hostname;
use crate::tls::certificate::CertificateError;
use crate::tls::server::{ClientCertificates, NamedCertificate, Settings};
use crate::tls::{self, Certificate, MinVersion};

use super::Checker;

const TIMEOUTS: ListenerTimeouts = ListenerTimeouts {
    tls_handshake: Duration::from_secs(10),
    first_byte: Duration::from_secs(10),
    request_head: Duration::from_secs(15),
    idle: Duration::from_secs(60),
    request_body: Duration::from_secs(30),
    write: Duration::from_secs(30),
};

const LIMITS: ListenerLimits = ListenerLimits {
    request_head: 32 << 10,
    header_fields: 100,
    uri: 8 << 10,
    request_body: None,
};

const HTTP2: ListenerHttp2 = ListenerHttp2 {
    max_concurrent_streams: 100,
    stream_window: 256 << 10,
    connection_window: 1 << 20,
    send_buffer: 64 << 10,
};

/// What HTTP/2 allows for windows (RFC 9113 section 6.9.1); less than its default would make every
/// request wait.
pub(super) const WINDOWS: RangeInclusive<u64> = 65_535..=0x7fff_ffff;

/// hyper reads at least 8 KiB at once; a head past 64 KiB is an attack.
const HEADS: RangeInclusive<u64> = 8192..=65_536;

/// The `http` crate holds no longer targets.
const URIS: RangeInclusive<u64> = 64..=65_534;

pub(super) const BUFFERS: RangeInclusive<u64> = 4096..=(1 << 30);

/// What a listener has that does not say otherwise.
#[derive(Clone, Copy)]
struct Defaults {
    timeouts: ListenerTimeouts,
    limits: ListenerLimits,
    http2: ListenerHttp2,
}

impl Checker<'_> {
    pub(super) fn listeners(
        &mut self,
        file: &file::ConfigFile,
        admin: Option<SocketAddr>,
        at: &Path,
    ) -> Option<Vec<Listener>> {
        let listeners = &file.listeners;
        if listeners.is_empty() && !self.document.is_maimed(at) {
            self.error(
                at,
                "there is no listener: nothing would take requests",
                None,
            );
        }
        self.names(
            "listener",
            listeners.iter().map(|listener| listener.name.as_str()),
            at,
        );
        let addresses: Vec<Option<SocketAddr>> = listeners
            .iter()
            .map(|listener| value::socket_address(&listener.address).ok())
            .collect();
        for (position, address) in addresses.iter().enumerate() {
            let Some(address) = *address else { continue };
            let earlier = addresses[..position]
                .iter()
                .position(|other| other.is_some_and(|other| collide(address, other)));
            let holder = earlier.map(|earlier| format!("listener `{}`", listeners[earlier].name));
            let by_admin = admin.is_some_and(|admin| collide(address, admin));
            if let Some(holder) = holder.or_else(|| by_admin.then(|| "the admin API".to_owned())) {
                let message = format!("{holder} has this address already");
                self.error(&at.index(position).key("address"), message, None);
            }
        }
        let defaults = self.defaults(&file.listener_defaults);
        self.each(listeners, at, |checker, listener, at| {
            checker.listener(listener, defaults, at)
        })
    }

    /// What is wrong with the defaults is said once; listeners are then checked with Serin's own.
    fn defaults(&mut self, defaults: &file::ListenerDefaults) -> Defaults {
        let at = Path::default().key("listenerDefaults");
        let timeouts = self.timeouts(&defaults.timeouts, TIMEOUTS, &at.key("timeouts"));
        let limits = self.limits(&defaults.limits, LIMITS, &at.key("limits"));
        let http2 = self.http2(&defaults.http2, HTTP2, &at.key("http2"));
        Defaults {
            timeouts: timeouts.unwrap_or(TIMEOUTS),
            limits: limits.unwrap_or(LIMITS),
            http2: http2.unwrap_or(HTTP2),
        }
    }

    fn listener(
        &mut self,
        listener: &file::Listener,
        defaults: Defaults,
        at: &Path,
    ) -> Option<Listener> {
        let name = self.name(&listener.name, at);
        let address = self.parse(&listener.address, &at.key("address"), value::socket_address);
        let trusted_proxies = self.networks(&listener.trusted_proxies, &at.key("trustedProxies"));
        let hops = listener.trusted_hops.map(|hops| Size(hops.into()));
        let hops = self.size(hops, 1..=100, &at.key("trustedHops"));
        for (is_there, key) in [
            (listener.proxy_protocol, "proxyProtocol"),
            (listener.trusted_hops.is_some(), "trustedHops"),
        ] {
            if is_there && listener.trusted_proxies.is_empty() {
                let message = "nobody is believed: `trustedProxies` is empty";
                self.error(&at.key(key), message, None);
            }
        }
        let tls = match &listener.tls {
            Some(tls) => self.listener_tls(tls, &at.key("tls")).map(Some),
            None => Some(None),
        };
        let timeouts = self.timeouts(&listener.timeouts, defaults.timeouts, &at.key("timeouts"));
        let limits = self.limits(&listener.limits, defaults.limits, &at.key("limits"));
        let http2 = self.http2(&listener.http2, defaults.http2, &at.key("http2"));
        Some(Listener {
            name: name?,
            address: address?,
            trusted_proxies: trusted_proxies?,
            trusted_hops: hops?.map(|hops| hops as usize),
            proxy_protocol: listener.proxy_protocol,
            tls: tls?,
            timeouts: timeouts?,
            limits: limits?,
            http2: http2?,
        })
    }

    fn timeouts(
        &mut self,
        own: &file::ListenerTimeouts,
        defaults: ListenerTimeouts,
        at: &Path,
    ) -> Option<ListenerTimeouts> {
        let mut limit = |own: &Option<String>, default, key: &str| {
            let at = at.key(key);
            let limit = self.duration(own.as_deref(), default, &at);
            if limit == Some(Duration::ZERO) {
                self.error(
                    &at,
                    "a limit of 0 would close every connection at once",
                    None,
                );
            }
            limit.filter(|limit| !limit.is_zero())
        };
        let tls_handshake = limit(&own.tls_handshake, defaults.tls_handshake, "tlsHandshake");
        let first_byte = limit(&own.first_byte, defaults.first_byte, "firstByte");
        let request_head = limit(&own.request_head, defaults.request_head, "requestHead");
        let idle = limit(&own.idle, defaults.idle, "idle");
        let request_body = limit(&own.request_body, defaults.request_body, "requestBody");
        let write = limit(&own.write, defaults.write, "write");
        Some(ListenerTimeouts {
            tls_handshake: tls_handshake?,
            first_byte: first_byte?,
            request_head: request_head?,
            idle: idle?,
            request_body: request_body?,
            write: write?,
        })
    }

    fn limits(
        &mut self,
        own: &file::ListenerLimits,
        defaults: ListenerLimits,
        at: &Path,
    ) -> Option<ListenerLimits> {
        let request_head = self.size(own.request_head, HEADS, &at.key("requestHead"));
        let uri = self.size(own.uri, URIS, &at.key("uri"));
        let fields = own.header_fields.map(|fields| Size(fields.into()));
        let fields = self.size(fields, 1..=10_000, &at.key("headerFields"));
        Some(ListenerLimits {
            request_head: request_head?.map_or(defaults.request_head, |size| size as u32),
            header_fields: fields?.map_or(defaults.header_fields, |fields| fields as usize),
            uri: uri?.map_or(defaults.uri, |size| size as usize),
            request_body: own
                .request_body
                .map(|size| size.0)
                .or(defaults.request_body),
        })
    }

    fn http2(
        &mut self,
        own: &file::ListenerHttp2,
        defaults: ListenerHttp2,
        at: &Path,
    ) -> Option<ListenerHttp2> {
        let streams = own
            .max_concurrent_streams
            .map(|streams| Size(streams.into()));
        let streams = self.size(streams, 1..=100_000, &at.key("maxConcurrentStreams"));
        let stream_window = self.size(own.stream_window, WINDOWS, &at.key("streamWindow"));
        let connection = self.size(own.connection_window, WINDOWS, &at.key("connectionWindow"));
        let send_buffer = self.size(own.send_buffer, BUFFERS, &at.key("sendBuffer"));
        Some(ListenerHttp2 {
            max_concurrent_streams: streams?
                .map_or(defaults.max_concurrent_streams, |streams| streams as u32),
            stream_window: stream_window?.map_or(defaults.stream_window, |size| size as u32),
            connection_window: connection?.map_or(defaults.connection_window, |size| size as u32),
            send_buffer: send_buffer?.map_or(defaults.send_buffer, |size| size as usize),
        })
    }

    pub(super) fn listener_tls(&mut self, tls: &file::ListenerTls, at: &Path) -> Option<Settings> {
        let certificates_at = at.key("certificates");
        if tls.certificates.is_empty() && !self.document.is_maimed(&certificates_at) {
            self.error(
                &certificates_at,
                "there is no certificate to accept TLS with",
                None,
            );
        }
        let certificates = self.each(&tls.certificates, &certificates_at, Self::named_certificate);
        let clients = match &tls.client_ca {
            Some(clients) => self.client_ca(clients, &at.key("clientCa")).map(Some),
            None => Some(None),
        };
        Some(Settings {
            certificates: certificates.filter(|certificates| !certificates.is_empty())?,
            min_version: match tls.min_version {
                file::TlsVersion::V1_2 => MinVersion::Tls12,
                file::TlsVersion::V1_3 => MinVersion::Tls13,
            },
            clients: clients?,
        })
    }

    fn named_certificate(
        &mut self,
        one: &file::CertificateRef,
        at: &Path,
    ) -> Option<NamedCertificate> {
        let hostnames = self.each(&one.hostnames, &at.key("hostnames"), |checker, text, at| {
            checker.parse(text, at, value::hostname)
        });
        let certificate = self.certificate(&one.certificate_file, &one.key_file, at)?;
        let hostnames: Vec<String> = hostnames?.iter().map(Hostname::to_string).collect();
        let hostnames = if hostnames.is_empty() {
            certificate.names.clone()
        } else {
            hostnames
        };
        Some(NamedCertificate {
            file: one.certificate_file.clone(),
            hostnames,
            certificate,
        })
    }

    /// Reads a certificate and its key from the files that stand at `at`.
    pub(super) fn certificate(
        &mut self,
        certificate_file: &str,
        key_file: &str,
        at: &Path,
    ) -> Option<Certificate> {
        let certificate_at = at.key("certificateFile");
        let key_at = at.key("keyFile");
        let chain = self.read(certificate_file, &certificate_at);
        let key = self.read(key_file, &key_at);
        let certificate = match Certificate::from_pem(&chain?, &key?) {
            Ok(certificate) => certificate,
            Err(CertificateError::Chain(reason)) => {
                self.error(
                    &certificate_at,
                    format!("`{certificate_file}` {reason}"),
                    None,
                );
                return None;
            }
            Err(CertificateError::Key(reason)) => {
                self.error(&key_at, format!("`{key_file}` {reason}"), None);
                return None;
            }
        };
        let now = i64::try_from(self.around.now).unwrap_or(i64::MAX);
        let reason = match &certificate {
            expired if expired.not_after < now => Some("has expired"),
            early if early.not_before > now => Some("is not valid yet"),
            _ => None,
        };
        if let Some(reason) = reason {
            let message = format!("the certificate in `{certificate_file}` {reason}");
            self.warn(&certificate_at, message, None);
        }
        Some(certificate)
    }

    fn client_ca(&mut self, clients: &file::ClientCa, at: &Path) -> Option<ClientCertificates> {
        let file_at = at.key("file");
        let header = self.optional(
            clients.subject_header.as_deref(),
            &at.key("subjectHeader"),
            value::editable_header,
        );
        let pem = self.read(&clients.file, &file_at)?;
        let required = clients.mode == file::ClientCertificateMode::Required;
        let policy = xxh3_64(&pem) ^ u64::from(required);
        let header = header?;
        tls::authorities(&pem)
            .and_then(|roots| ClientCertificates::new(roots, required, policy, header))
            .map_err(|reason| self.error(&file_at, format!("`{}` {reason}", clients.file), None))
            .ok()
    }

    /// Reads a file that the configuration names at `at`.
    pub(super) fn read(&mut self, file: &str, at: &Path) -> Option<Vec<u8>> {
        let path = self.around.directory.join(file);
        (self.around.read)(&path)
            .map_err(|reason| self.error(at, format!("`{file}` {reason}"), None))
            .ok()
    }

    /// A size within bounds, where there is one.
    pub(super) fn size(
        &mut self,
        size: Option<Size>,
        bounds: RangeInclusive<u64>,
        at: &Path,
    ) -> Option<Option<u64>> {
        let Some(Size(size)) = size else {
            return Some(None);
        };
        if !bounds.contains(&size) {
            let (least, most) = bounds.into_inner();
            self.error(
                at,
                format!("{size} is not between {least} and {most}"),
                None,
            );
            return None;
        }
        Some(Some(size))
    }
}

/// True when the operating system lets only one of two sockets have its address. Port 0 asks for any
/// free port, so two of them do not collide.
fn collide(one: SocketAddr, other: SocketAddr) -> bool {
    let overlap = one.ip() == other.ip()
        || one.is_ipv4() == other.is_ipv4()
            && (one.ip().is_unspecified() || other.ip().is_unspecified());
    one.port() != 0 && one.port() == other.port() && overlap
}
