//! A certificate with its chain and its key.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::provider;

/// A certificate with its chain and its key, which belong together.
#[derive(Clone, Debug)]
pub struct Certificate {
    pub(super) key: Arc<CertifiedKey>,
    /// The names it is for, in lower case, wildcards among them.
    pub names: Vec<String>,
    /// From when it is valid, in seconds since 1970.
    pub not_before: i64,
    /// Until when it is valid, in seconds since 1970.
    pub not_after: i64,
}

/// What is wrong with a certificate and its key; the reasons are half sentences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificateError {
    /// The certificate file: the reason follows its name.
    Chain(String),
    /// The key file: the reason follows its name.
    Key(String),
}

// === impl Certificate ===

impl Certificate {
    /// Reads a chain, leaf first, and its private key.
    ///
    /// # Errors
    ///
    /// See [`CertificateError`]; a key that is not the certificate's is one as well.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, CertificateError> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
        let chain =
            chain.map_err(|error| CertificateError::Chain(format!("is not PEM: {error}")))?;
        let Some(leaf) = chain.first() else {
            let reason = "holds no certificate in PEM".to_owned();
            return Err(CertificateError::Chain(reason));
        };
        let (names, [not_before, not_after]) = read(leaf).map_err(CertificateError::Chain)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| {
            CertificateError::Key("holds no private key in PEM (PKCS #1, #8 or SEC1)".to_owned())
        })?;
        let key = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                CertificateError::Key("is not the key of the certificate".to_owned())
            }
            error => CertificateError::Key(format!("cannot be used: {error}")),
        })?;
        Ok(Self {
            key: Arc::new(key),
            names,
            not_before,
            not_after,
        })
    }

    /// The certificate itself, as bytes.
    pub fn leaf(&self) -> &[u8] {
        self.key.cert.first().map_or(&[], |leaf| leaf.as_ref())
    }
}

/// The names of a certificate, and from when until when it is valid.
fn read(leaf: &CertificateDer<'_>) -> Result<(Vec<String>, [i64; 2]), String> {
    let malformed = |error: &dyn std::fmt::Display| format!("is malformed: {error}");
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|error| malformed(&error))?;
    let names = leaf
        .subject_alternative_name()
        .map_err(|error| malformed(&error))?;
    let names = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        })
        .collect();
    let validity = leaf.validity();
    Ok((
        names,
        [
            validity.not_before.timestamp(),
            validity.not_after.timestamp(),
        ],
    ))
}

/// The subject of a certificate as text (`CN=..., O=...`); `None` for one that cannot be read.
pub fn subject(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(certificate.subject().to_string())
}
