//! What endpoints are connected to with.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

use super::{ALPN_HTTP1, Certificate, MinVersion, provider};

/// What the endpoints of a backend are connected to with.
#[derive(Clone)]
pub struct ClientTls {
    /// As the backend's protocol wants it.
    config: Arc<ClientConfig>,
    /// For HTTP/1.1 alone, where nothing else will do.
    http1: Arc<ClientConfig>,
    /// The name that all certificates must be for.
    name: Option<ServerName<'static>>,
}

/// Whose certificates endpoints may show.
#[derive(Debug)]
pub enum Trust {
    /// Those that one of these authorities signed, for the right name.
    Authorities(RootCertStore),
    /// Anybody's.
    Anybody,
}

/// Believes every certificate. The signatures of the handshake are checked all the same.
#[derive(Debug)]
struct NoVerifier(Arc<CryptoProvider>);

// === impl ClientTls ===

impl ClientTls {
    /// Connects with these protocols by ALPN, the best first.
    ///
    /// # Errors
    ///
    /// When our own certificate cannot be used.
    pub fn new(
        trust: Trust,
        name: Option<ServerName<'static>>,
        own: Option<&Certificate>,
        protocols: &[&[u8]],
    ) -> Result<Self, Error> {
        let provider = provider();
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(MinVersion::Tls12.versions())?;
        let builder = match trust {
            Trust::Authorities(roots) => builder.with_root_certificates(roots),
            Trust::Anybody => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(NoVerifier(provider))),
        };
        let mut config = match own {
            Some(own) => {
                let key = Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(&own.key)));
                builder.with_client_cert_resolver(key)
            }
            None => builder.with_no_client_auth(),
        };
        let mut http1 = config.clone();
        http1.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        Ok(Self {
            config: Arc::new(config),
            http1: Arc::new(http1),
            name,
        })
    }

    /// For rustls; with HTTP/1.1 alone where `http1_only`.
    pub fn config(&self, http1_only: bool) -> &Arc<ClientConfig> {
        if http1_only {
            &self.http1
        } else {
            &self.config
        }
    }

    /// The name that the certificate of an endpoint must be for, whatever it is named by; `None`
    /// leaves that to the endpoint.
    pub fn common_name(&self) -> Option<&ServerName<'static>> {
        self.name.as_ref()
    }

    /// The name that the certificate of the endpoint at this address must be for, which is named by
    /// `certified`, if by anything else.
    pub fn name(
        &self,
        address: IpAddr,
        certified: Option<&ServerName<'static>>,
    ) -> ServerName<'static> {
        let name = self.name.as_ref().or(certified);
        name.cloned()
            .unwrap_or_else(|| ServerName::IpAddress(address.to_canonical().into()))
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

// === impl NoVerifier ===

impl ServerCertVerifier for NoVerifier {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
