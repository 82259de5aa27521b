//! Who the user is: an ordered chain of places where an id may stand.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use http::header::{COOKIE, HeaderName};
use jsonwebtoken::{DecodingKey, Validation};

use super::request::RequestHead;

/// The cookie in which Serin issues anonymous ids.
pub const ANONYMOUS_COOKIE: &str = "serin-id";

/// A place where a user's id may stand.
#[derive(Clone, Debug)]
pub enum IdentitySource {
    /// A request header.
    Header(HeaderName),
    /// A cookie.
    Cookie(String),
    /// A query parameter.
    Query(String),
    /// A claim of a JSON Web Token.
    JwtClaim(Arc<JwtClaim>),
    /// The client's address.
    ClientAddress,
}

/// A claim of a JSON Web Token in a header.
#[derive(Debug)]
pub struct JwtClaim {
    /// The claim's name.
    pub name: String,
    /// The header with the token, alone or after `Bearer`.
    pub header: HeaderName,
    /// What makes the token believable.
    pub trust: JwtTrust,
}

/// What makes a token believable.
pub enum JwtTrust {
    /// Nothing: something in front has checked it.
    Unverified,
    /// A signature by this key.
    SignedBy {
        /// The public key.
        key: DecodingKey,
        /// What is asked of a token: one of the algorithms that the key is for, so that it cannot
        /// choose a weaker one.
        validation: Box<Validation>,
    },
}

/// A user's id, and which source of the chain gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity<'a> {
    /// The id, never empty.
    pub value: Cow<'a, str>,
    /// Its position in the chain; `None` for an anonymous id that this very request is given.
    pub source: Option<usize>,
}

/// Finds the user's id: the first source that gives a non-empty value wins.
pub fn identify<'a>(
    chain: &[IdentitySource],
    head: &RequestHead<'a>,
    believe: Believe,
) -> Option<Identity<'a>> {
    chain
        .iter()
        .enumerate()
        .filter(|(_, source)| believe == Believe::Client || source.proves_itself())
        .find_map(|(position, source)| {
            let value = source.read(head).filter(|value| !value.is_empty())?;
            Some(Identity {
                value,
                source: Some(position),
            })
        })
}

/// Whether what the client says of itself counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Believe {
    /// The client may say who it is.
    Client,
    /// Only what a client cannot make up counts.
    ProofOnly,
}

// === impl IdentitySource ===

impl IdentitySource {
    /// The request header that it reads; `None` for what is not in a header.
    pub fn header(&self) -> Option<HeaderName> {
        match self {
            Self::Header(name) => Some(name.clone()),
            Self::Cookie(_) => Some(COOKIE),
            Self::JwtClaim(claim) => Some(claim.header.clone()),
            Self::Query(_) | Self::ClientAddress => None,
        }
    }

    fn read<'a>(&self, head: &RequestHead<'a>) -> Option<Cow<'a, str>> {
        match self {
            Self::Header(name) => head.header(name).map(|value| Cow::Borrowed(value.trim())),
            Self::Cookie(name) => head.cookie(name).map(Cow::Borrowed),
            Self::Query(name) => head.query_param(name),
            Self::JwtClaim(claim) => claim.read(head).map(Cow::Owned),
            Self::ClientAddress => Some(Cow::Owned(head.client.to_canonical().to_string())),
        }
    }

    /// True for what a client cannot make up: its address, and a signed token.
    pub(super) fn proves_itself(&self) -> bool {
        match self {
            Self::Header(_) | Self::Cookie(_) | Self::Query(_) => false,
            Self::JwtClaim(claim) => matches!(claim.trust, JwtTrust::SignedBy { .. }),
            Self::ClientAddress => true,
        }
    }
}

impl fmt::Display for IdentitySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name) => write!(f, "header {name}"),
            Self::Cookie(name) => write!(f, "cookie {name}"),
            Self::Query(name) => write!(f, "query parameter {name}"),
            Self::JwtClaim(claim) => {
                write!(f, "JWT claim {} in header {}", claim.name, claim.header)
            }
            Self::ClientAddress => write!(f, "client address"),
        }
    }
}

// === impl JwtClaim ===

impl JwtClaim {
    /// The claim's value in the request's token, if the token is believable.
    fn read(&self, head: &RequestHead<'_>) -> Option<String> {
        let value = head.header(&self.header)?.trim();
        let token = match value.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim_start(),
            Some(_) => return None,
            None => value,
        };
        let claims: BTreeMap<String, serde_json::Value> = match &self.trust {
            JwtTrust::Unverified => jsonwebtoken::dangerous::insecure_decode_claims(token).ok()?,
            JwtTrust::SignedBy { key, validation } => {
                jsonwebtoken::decode(token, key, validation).ok()?.claims
            }
        };
        match claims.get(&self.name)? {
            serde_json::Value::String(text) => Some(text.clone()),
            serde_json::Value::Number(number) => Some(number.to_string()),
            _ => None,
        }
    }
}

// === impl JwtTrust ===

impl JwtTrust {
    /// Trust in tokens signed with the private half of this key, RSA, EC or Ed25519 in PEM.
    ///
    /// Expiry is not judged: the token says who the user is, not whether he may come in, and a user
    /// should not change version in the minute before the service asks him to log in again.
    ///
    /// # Errors
    ///
    /// A file that holds no public key of these kinds.
    pub fn signed_by(pem: &[u8]) -> Result<Self, String> {
        let key = DecodingKey::from_rsa_pem(pem)
            .or_else(|_| DecodingKey::from_ec_pem(pem))
            .or_else(|_| DecodingKey::from_ed_pem(pem))
            .map_err(|_| "holds no RSA, EC or Ed25519 public key in PEM".to_owned())?;
        let mut validation = Validation::new_for_family(key.family());
        validation.required_spec_claims.clear();
        validation.validate_exp = false;
        validation.validate_aud = false;
        Ok(Self::SignedBy {
            key,
            validation: Box::new(validation),
        })
    }
}

impl fmt::Debug for JwtTrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unverified => "Unverified",
            Self::SignedBy { .. } => "SignedBy",
        })
    }
}
