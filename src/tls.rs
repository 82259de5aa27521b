//! TLS: certificates, what clients are accepted with, and what endpoints are connected to with.
//!
//! rustls does the protocol. Here is what becomes of the configuration's files: from PEM to
//! settings that cannot be wrong. Nothing here reads a file or knows of connections.

pub mod certificate;
pub mod client;
pub mod server;

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{RootCertStore, SupportedProtocolVersion, version};

pub use certificate::Certificate;

/// HTTP/2 as ALPN calls it (RFC 9113 section 3.2).
pub const ALPN_HTTP2: &[u8] = b"h2";

/// HTTP/1.1 as ALPN calls it (RFC 7301 section 6).
pub const ALPN_HTTP1: &[u8] = b"http/1.1";

/// The oldest version of TLS that is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MinVersion {
    /// TLS 1.2 (RFC 5246), with the cipher suites that rustls deems safe.
    #[default]
    Tls12,
    /// TLS 1.3 (RFC 8446).
    Tls13,
}

// === impl MinVersion ===

impl MinVersion {
    const BOTH: [&'static SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];
    const NEW: [&'static SupportedProtocolVersion; 1] = [&version::TLS13];

    fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::Tls12 => &Self::BOTH,
            Self::Tls13 => &Self::NEW,
        }
    }
}

/// Reads the certificates of authorities.
///
/// # Errors
///
/// What is wrong with the text, as a half sentence that follows its name.
pub fn authorities(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("is not PEM: {error}"))?;
        roots
            .add(certificate)
            .map_err(|error| format!("holds a certificate that cannot be used: {error}"))?;
    }
    if roots.is_empty() {
        return Err("holds no certificate in PEM".to_owned());
    }
    Ok(roots)
}

/// The authorities that the system trusts; those that cannot be read are left out.
pub fn system_authorities() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}
