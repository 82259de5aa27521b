//! Who may change what is served through the admin listener: whoever shows a token, or a certificate, that
//! the configuration names. Pure.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};

/// Somebody who may change what is served.
#[derive(Clone, Debug)]
pub struct Writer {
    /// What the log calls it.
    pub name: Arc<str>,
    /// What it shows.
    pub proof: Proof,
}

/// What somebody shows that may change something.
#[derive(Clone, Debug)]
pub enum Proof {
    /// A bearer token (RFC 6750).
    Token(Token),
    /// A certificate with this subject, as RFC 4514 writes it, but in its own order, that an authority of the
    /// listener has signed.
    Subject(String),
}

/// A secret, of which only the digest is kept: what is in force is shown and logged.
#[derive(Clone, Copy)]
pub struct Token([u8; SHA256_OUTPUT_LEN]);

/// What is shown with a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shown<'s> {
    /// A bearer token.
    pub token: Option<Token>,
    /// The subject of a certificate that was verified.
    pub subject: Option<&'s str>,
}

// === impl Token ===

impl Token {
    /// The fewest bytes of one: 128 bits at four bits a character, as `openssl rand -hex 16` gives them.
    pub const LEAST: usize = 32;

    /// The token that is written so.
    pub fn of(text: &[u8]) -> Self {
        let mut token = [0; SHA256_OUTPUT_LEN];
        token.copy_from_slice(digest(&SHA256, text).as_ref());
        Self(token)
    }

    /// The token in the value of an `Authorization` field.
    pub fn of_field(value: &[u8]) -> Option<Self> {
        let (scheme, token) = value.split_at_checked("Bearer ".len())?;
        let is_bearer = scheme.eq_ignore_ascii_case(b"Bearer ");
        is_bearer.then(|| Self::of(token.trim_ascii()))
    }

    /// True for the same one. How long it takes says nothing of it.
    fn is(&self, other: &Self) -> bool {
        verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// Whom of these a request is from.
pub fn who<'c>(writers: &'c [Writer], shown: Shown<'_>) -> Option<&'c Writer> {
    let is_shown = |writer: &&Writer| match &writer.proof {
        Proof::Token(token) => shown.token.is_some_and(|shown| shown.is(token)),
        Proof::Subject(subject) => shown.subject == Some(subject),
    };
    writers.iter().find(is_shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(name: &str, proof: Proof) -> Writer {
        let name = name.into();
        Writer { name, proof }
    }

    fn writers() -> [Writer; 2] {
        [
            writer("pipeline", Proof::Token(Token::of(b"secret"))),
            writer("ops", Proof::Subject("CN=ops".to_owned())),
        ]
    }

    fn name(shown: Shown<'_>) -> Option<String> {
        who(&writers(), shown).map(|writer| writer.name.to_string())
    }

    #[test]
    fn a_token_or_a_subject_says_who_asks() {
        let token = |field: &str| Shown {
            token: Token::of_field(field.as_bytes()),
            subject: None,
        };
        let subject = |subject| Shown {
            token: None,
            subject: Some(subject),
        };
        assert_eq!(name(token("Bearer secret")).as_deref(), Some("pipeline"));
        assert_eq!(name(token("bearer  secret ")).as_deref(), Some("pipeline"));
        assert_eq!(name(subject("CN=ops")).as_deref(), Some("ops"));
        for field in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer secre",
            "Bearer secrets",
            "Basic secret",
            "secret",
        ] {
            assert_eq!(name(token(field)), None, "{field}");
        }
        for other in ["", "CN=op", "CN=ops, O=else", "cn=ops"] {
            assert_eq!(name(subject(other)), None, "{other}");
        }
        assert_eq!(name(Shown::default()), None);
    }

    #[test]
    fn a_token_is_not_shown() {
        assert_eq!(format!("{:?}", Token::of(b"secret")), "Token");
    }
}
