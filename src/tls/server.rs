//! What clients are accepted with.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use http::header::HeaderName;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{
    ClientHello, NoServerSessionStorage, ProducesTickets, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use tracing::warn;

use super::{ALPN_HTTP1, ALPN_HTTP2, Certificate, MinVersion, provider};

/// What a listener accepts connections with, as configured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its certificates; never empty, the first is for names that no other has.
    pub certificates: Vec<NamedCertificate>,
    /// The oldest version of TLS.
    pub min_version: MinVersion,
    /// Which certificates of clients are asked for.
    pub clients: Option<ClientCertificates>,
}

/// A certificate and the names that it is presented for.
#[derive(Clone, Debug)]
pub struct NamedCertificate {
    /// What it is called in metrics: its file as configured.
    pub file: String,
    /// Names in lower case; `*.` and a suffix for any one label before that.
    pub hostnames: Vec<String>,
    /// The certificate.
    pub certificate: Certificate,
}

/// Which certificates of clients are asked for.
#[derive(Clone)]
pub struct ClientCertificates {
    verifier: Arc<dyn ClientCertVerifier>,
    /// Tells one policy from another.
    policy: u64,
    /// The request header in which the subject is passed on.
    pub subject_header: Option<HeaderName>,
}

/// What a listener accepts connections with.
#[derive(Clone)]
pub struct ServerTls {
    /// For rustls.
    pub config: Arc<ServerConfig>,
    /// The request header in which a client's subject is passed on.
    pub subject_header: Option<HeaderName>,
    /// Tells which certificates of clients are believed.
    pub policy: Option<u64>,
}

/// What encrypts session tickets, by listener: so that a reload does not cost clients their
/// sessions.
///
/// A ticket holds what was found out about a client's certificate, so it is never taken by a
/// listener that asks for other ones.
#[derive(Debug, Default)]
pub struct Tickets(HashMap<(SocketAddr, Option<u64>), Arc<dyn ProducesTickets>>);

/// Chooses a certificate by the name that the client asks for (RFC 6066 section 3), and among
/// several by the signatures that it knows.
#[derive(Debug)]
struct ByName {
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// By what follows the `*.`.
    wildcard: HashMap<String, Vec<Arc<CertifiedKey>>>,
    default: Vec<Arc<CertifiedKey>>,
}

// === impl ClientCertificates ===

impl ClientCertificates {
    /// Asks for certificates that one of `roots` signed; `policy` tells this wish from others.
    ///
    /// # Errors
    ///
    /// What is wrong with the authorities, as a half sentence.
    pub fn new(
        roots: RootCertStore,
        required: bool,
        policy: u64,
        subject_header: Option<HeaderName>,
    ) -> Result<Self, String> {
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        let builder = if required {
            builder
        } else {
            builder.allow_unauthenticated()
        };
        let verifier = builder
            .build()
            .map_err(|error| format!("cannot be used: {error}"))?;
        Ok(Self {
            verifier,
            policy,
            subject_header,
        })
    }
}

impl fmt::Debug for ClientCertificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCertificates")
            .field("policy", &self.policy)
            .field("subject_header", &self.subject_header)
            .finish_non_exhaustive()
    }
}

// === impl ServerTls ===

impl ServerTls {
    /// What the listener at `address` accepts connections with from now on.
    pub fn new(settings: &Settings, address: SocketAddr, tickets: &mut Tickets) -> Self {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(settings.min_version.versions())
            .expect("the provider has cipher suites for every version");
        let builder = match &settings.clients {
            Some(clients) => builder.with_client_cert_verifier(Arc::clone(&clients.verifier)),
            None => builder.with_no_client_auth(),
        };
        let resolver = ByName::new(&settings.certificates);
        let mut config = builder.with_cert_resolver(Arc::new(resolver));
        config.alpn_protocols = vec![ALPN_HTTP2.to_vec(), ALPN_HTTP1.to_vec()];
        // Tickets keep sessions with the clients, so nothing is kept here.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        let policy = settings.clients.as_ref().map(|clients| clients.policy);
        if let Some(ticketer) = tickets.ticketer(address, policy) {
            config.ticketer = ticketer;
            // A client that opens several connections comes by more of them on the first.
            config.send_tls13_tickets = 1;
        }
        let subject_header = |clients: &ClientCertificates| clients.subject_header.clone();
        Self {
            config: Arc::new(config),
            subject_header: settings.clients.as_ref().and_then(subject_header),
            policy,
        }
    }

    /// The same, where HTTP/2 is not spoken.
    #[must_use]
    pub fn for_http1(mut self) -> Self {
        Arc::make_mut(&mut self.config).alpn_protocols = vec![ALPN_HTTP1.to_vec()];
        self
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").finish_non_exhaustive()
    }
}

// === impl Tickets ===

impl Tickets {
    fn ticketer(
        &mut self,
        address: SocketAddr,
        policy: Option<u64>,
    ) -> Option<Arc<dyn ProducesTickets>> {
        if let Some(known) = self.0.get(&(address, policy)) {
            return Some(Arc::clone(known));
        }
        match rustls::crypto::aws_lc_rs::Ticketer::new() {
            Ok(ticketer) => {
                self.0.insert((address, policy), Arc::clone(&ticketer));
                Some(ticketer)
            }
            Err(error) => {
                warn!(%error, "no session tickets: every TLS handshake will be a full one");
                None
            }
        }
    }

    /// Forgets listeners that there are no longer.
    pub fn retain(&mut self, mut is_open: impl FnMut(SocketAddr) -> bool) {
        self.0.retain(|(address, _), _| is_open(*address));
    }
}

// === impl ByName ===

impl ByName {
    fn new(certificates: &[NamedCertificate]) -> Self {
        let mut by_name = Self {
            exact: HashMap::new(),
            wildcard: HashMap::new(),
            default: Vec::new(),
        };
        let first = certificates.first().map(|first| &first.hostnames);
        for named in certificates {
            let key = &named.certificate.key;
            for name in &named.hostnames {
                let keys = match name.strip_prefix("*.") {
                    Some(suffix) => by_name.wildcard.entry(suffix.to_owned()),
                    None => by_name.exact.entry(name.clone()),
                };
                keys.or_default().push(Arc::clone(key));
            }
            // One of another kind of key beside the first is as good a default.
            if Some(&named.hostnames) == first {
                by_name.default.push(Arc::clone(key));
            }
        }
        by_name
    }

    fn find(&self, name: Option<&str>) -> &[Arc<CertifiedKey>] {
        let Some(name) = name else {
            return &self.default;
        };
        let suffix = || name.split_once('.').map(|(_, suffix)| suffix);
        self.exact
            .get(name)
            .or_else(|| self.wildcard.get(suffix()?))
            .unwrap_or(&self.default)
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(str::to_ascii_lowercase);
        let keys = self.find(name.as_deref());
        let known = |key: &&Arc<CertifiedKey>| {
            let schemes = hello.signature_schemes();
            key.key.choose_scheme(schemes).is_some()
        };
        keys.iter().find(known).or(keys.first()).map(Arc::clone)
    }
}
