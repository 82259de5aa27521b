//! A certificate with its chain and its key.

use std::borrow::Cow;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::asn1_rs::{Any, BmpString, Tag, ToDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::prelude::FromDer;
use x509_parser::x509::AttributeTypeAndValue;

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

/// The subject of a certificate as text (`CN=..., O=...`), as RFC 4514 writes names, but in the order
/// of the certificate; `None` for one that cannot be read. All of it is printable ASCII.
pub fn subject(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let names = certificate.subject().iter().map(|name| {
        let attributes: Vec<String> = name.iter().map(attribute).collect();
        attributes.join(" + ")
    });
    Some(names.collect::<Vec<_>>().join(", "))
}

/// `CN=value`. A type without a name is written by its numbers, and its value as bytes, since nobody
/// knows what they mean (RFC 4514 section 2.4).
fn attribute(attribute: &AttributeTypeAndValue<'_>) -> String {
    let (kind, value) = (attribute.attr_type(), attribute.attr_value());
    let Ok(name) = oid2abbrev(kind, oid_registry()) else {
        return format!("{kind}={}", hex(value));
    };
    match text(value) {
        Some(text) => format!("{name}={}", escaped(&text)),
        None => format!("{name}={}", hex(value)),
    }
}

/// A value that is a string, in an encoding that there can be no two opinions about.
fn text<'a>(value: &'a Any<'_>) -> Option<Cow<'a, str>> {
    match value.tag() {
        Tag::BmpString => {
            let text = BmpString::try_from(value).ok()?;
            Some(text.string().into())
        }
        Tag::Utf8String => std::str::from_utf8(value.data).ok().map(Cow::Borrowed),
        Tag::NumericString
        | Tag::VisibleString
        | Tag::PrintableString
        | Tag::GeneralString
        | Tag::GraphicString
        | Tag::T61String
        | Tag::VideotexString
        | Tag::Ia5String => {
            let text = std::str::from_utf8(value.data).ok()?;
            text.is_ascii().then_some(text.into())
        }
        _ => None,
    }
}

/// Escapes what could be taken for another part of the name, and what no header may hold. Spaces at
/// the ends become hex pairs, since the end of a header would lose what follows a backslash.
fn escaped(value: &str) -> String {
    let last = value.len().saturating_sub(1);
    let mut escaped = String::with_capacity(value.len());
    for (at, byte) in value.bytes().enumerate() {
        match byte {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => escaped.extend(['\\', byte.into()]),
            b'#' if at == 0 => escaped.push_str("\\#"),
            b' ' if at == 0 || at == last => escaped.push_str("\\20"),
            b' '..=b'~' => escaped.push(byte.into()),
            _ => escaped.push_str(&format!("\\{byte:02X}")),
        }
    }
    escaped
}

fn hex(value: &Any<'_>) -> String {
    let bytes = value.to_der_vec().unwrap_or_default();
    let digits = bytes.iter().map(|byte| format!("{byte:02X}"));
    std::iter::once("#".to_owned()).chain(digits).collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, DnValue, KeyPair};

    use super::*;

    /// The subject of a certificate that was made for these attributes.
    fn subject_of(attributes: &[(DnType, DnValue)]) -> String {
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in attributes {
            params.distinguished_name.push(kind.clone(), value.clone());
        }
        let key = KeyPair::generate().unwrap();
        subject(params.self_signed(&key).unwrap().der()).unwrap()
    }

    fn common_name(name: &str) -> String {
        subject_of(&[(DnType::CommonName, DnValue::Utf8String(name.to_owned()))])
    }

    #[test]
    fn a_name_cannot_pass_for_several() {
        for (name, expected) in [
            ("ann", "CN=ann"),
            ("eve, CN=admin", r"CN=eve\, CN=admin"),
            ("eve + CN=admin", r"CN=eve \+ CN=admin"),
            (r#"a"\<b>;"#, r#"CN=a\"\\\<b\>\;"#),
            ("#04", r"CN=\#04"),
            ("a#", "CN=a#"),
            (" a b ", r"CN=\20a b\20"),
            (" ", r"CN=\20"),
            ("", "CN="),
            ("a\0\r\nb\u{7f}", r"CN=a\00\0D\0Ab\7F"),
            ("Zoë", r"CN=Zo\C3\AB"),
        ] {
            let subject = common_name(name);
            assert_eq!(subject, expected, "{name:?}");
            assert!(subject.bytes().all(|byte| matches!(byte, b' '..=b'~')));
        }
    }

    #[test]
    fn names_stand_in_the_order_of_the_certificate_in_any_encoding() {
        let wide = rcgen::string::BmpString::try_from("Zoë, Inc").unwrap();
        let latin = rcgen::string::TeletexString::try_from("here").unwrap();
        let unknown = DnType::CustomDnType(vec![1, 3, 6, 1, 4, 1, 99999, 1]);
        let subject = subject_of(&[
            (
                DnType::CountryName,
                DnValue::PrintableString("DE".try_into().unwrap()),
            ),
            (DnType::OrganizationName, DnValue::BmpString(wide)),
            (DnType::LocalityName, DnValue::TeletexString(latin)),
            (unknown, DnValue::Utf8String("a, CN=b".to_owned())),
            (DnType::CommonName, DnValue::Utf8String("ann".to_owned())),
        ]);
        assert_eq!(
            subject,
            r"C=DE, O=Zo\C3\AB\, Inc, L=here, 1.3.6.1.4.1.99999.1=#0C07612C20434E3D62, CN=ann"
        );
    }
}
