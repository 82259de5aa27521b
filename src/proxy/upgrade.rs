//! Leaving HTTP for a tunnel: WebSocket, asked for by Upgrade in HTTP/1.1 (RFC 6455 section 4) or by
//! an extended CONNECT in HTTP/2 (RFC 8441), and every pair of the two.
//!
//! Nothing goes raw before the endpoint has agreed, and nothing else is upgraded to: a tunnel that
//! only one side believes in is how requests are smuggled past a gateway.

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{
    CONNECTION, HeaderMap, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE,
};
use http::request::Parts;
use http::{Method, Response, StatusCode, Version};
use hyper::ext::Protocol;
use hyper::upgrade::OnUpgrade;

use crate::routing::request::text;

use super::error::ProxyError;
use super::headers::Survey;

/// What a server appends to the key of its client (RFC 6455 section 1.3).
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");

/// A client's wish for a tunnel.
#[derive(Debug)]
pub struct Wish {
    /// The client's end, once it has been told that there is a tunnel.
    client: OnUpgrade,
    asked_by: AskedBy,
    /// The key that the endpoint has to answer.
    key: HeaderValue,
}

/// How a client asks for a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AskedBy {
    /// `Upgrade: websocket`.
    Upgrade,
    /// CONNECT with `:protocol`.
    ExtendedConnect,
}

/// Both ends of a tunnel that will stand when the client has its response.
#[derive(Debug)]
pub struct Ends {
    /// The client's.
    pub client: OnUpgrade,
    /// The endpoint's.
    pub upstream: OnUpgrade,
    /// What a client that asked by Upgrade is answered.
    accept: Option<HeaderValue>,
}

// === impl Wish ===

impl Wish {
    /// Whether a request asks for a WebSocket. One that asks by CONNECT becomes the GET that it would
    /// be in HTTP/1.1, since routes know no CONNECT; any other wish is none, and is passed on to
    /// nobody.
    pub fn of(parts: &mut Parts, survey: Survey, has_body: bool, key: [u8; 16]) -> Option<Self> {
        let asked_by = if is_extended_connect(parts) {
            AskedBy::ExtendedConnect
        } else if survey.has(Survey::UPGRADE) && !has_body && is_upgrade(parts) {
            AskedBy::Upgrade
        } else {
            return None;
        };
        let client = parts.extensions.remove::<OnUpgrade>()?;
        let key = match asked_by {
            AskedBy::Upgrade => parts.headers.get(SEC_WEBSOCKET_KEY)?.clone(),
            AskedBy::ExtendedConnect => {
                parts.method = Method::GET;
                parts.extensions.remove::<Protocol>();
                HeaderValue::from_str(&STANDARD.encode(key)).ok()?
            }
        };
        Some(Self {
            client,
            asked_by,
            key,
        })
    }

    /// Asks the endpoint as HTTP/1.1 does; in HTTP/2 the connection gives it another shape.
    pub fn ask(&self, headers: &mut HeaderMap) {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, WEBSOCKET);
        headers.insert(SEC_WEBSOCKET_KEY, self.key.clone());
    }

    /// What comes of the wish: both ends of a tunnel, with the response that tells the client; or
    /// `None` for a response like any other, which refuses it.
    ///
    /// # Errors
    ///
    /// [`ProxyError::UpgradeFailed`] for an answer that neither agrees nor refuses.
    pub fn answered<B>(self, response: &mut Response<B>) -> Result<Option<Ends>, ProxyError> {
        let status = response.status();
        let is_agreed = match response.version() {
            Version::HTTP_2 => status.is_success(),
            _ if status == StatusCode::SWITCHING_PROTOCOLS => {
                if !self.is_agreed_on(response.headers()) {
                    return Err(ProxyError::UpgradeFailed);
                }
                true
            }
            _ => false,
        };
        if !is_agreed {
            // An extended CONNECT takes every success for a tunnel, which this is not.
            let looks_agreed = status.is_success() && self.asked_by == AskedBy::ExtendedConnect;
            return if looks_agreed {
                Err(ProxyError::UpgradeFailed)
            } else {
                Ok(None)
            };
        }
        let upstream = hyper::upgrade::on(&mut *response);
        *response.status_mut() = match self.asked_by {
            AskedBy::Upgrade => StatusCode::SWITCHING_PROTOCOLS,
            AskedBy::ExtendedConnect => StatusCode::OK,
        };
        Ok(Some(Ends {
            client: self.client,
            upstream,
            accept: (self.asked_by == AskedBy::Upgrade).then(|| accept(&self.key)),
        }))
    }

    /// True when the endpoint upgrades to what was asked for, and has read the request that asked.
    fn is_agreed_on(&self, headers: &HeaderMap) -> bool {
        is_websocket(headers) && headers.get(SEC_WEBSOCKET_ACCEPT) == Some(&accept(&self.key))
    }
}

// === impl Ends ===

impl Ends {
    /// Writes what tells the client that there is a tunnel; the rest of the head stands.
    pub fn tell(&self, headers: &mut HeaderMap) {
        match &self.accept {
            Some(accept) => {
                headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
                headers.insert(UPGRADE, WEBSOCKET);
                headers.insert(SEC_WEBSOCKET_ACCEPT, accept.clone());
            }
            None => drop(headers.remove(SEC_WEBSOCKET_ACCEPT)),
        }
    }
}

fn is_extended_connect(parts: &Parts) -> bool {
    let protocol = parts.extensions.get::<Protocol>().map(Protocol::as_str);
    parts.method == Method::CONNECT && protocol == Some("websocket")
}

/// True for the one upgrade that is passed on; without the token in `Connection` it is meant for
/// somebody else (RFC 9110 section 7.8).
fn is_upgrade(parts: &Parts) -> bool {
    let connection = parts.headers.get_all(CONNECTION).iter().filter_map(text);
    let mut tokens = connection.flat_map(|line| line.split(','));
    parts.method == Method::GET
        && parts.version == Version::HTTP_11
        && tokens.any(|token| token.trim().eq_ignore_ascii_case("upgrade"))
        && is_websocket(&parts.headers)
}

fn is_websocket(headers: &HeaderMap) -> bool {
    let mut protocols = headers.get_all(UPGRADE).iter();
    let only = protocols.next().filter(|_| protocols.next().is_none());
    only.is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// What proves that a server has read the key (RFC 6455 section 4.2.2).
fn accept(key: &HeaderValue) -> HeaderValue {
    let text = [key.as_bytes().trim_ascii(), GUID.as_bytes()].concat();
    let hash = digest(&SHA1_FOR_LEGACY_USE_ONLY, &text);
    HeaderValue::from_str(&STANDARD.encode(hash)).unwrap_or(HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_answered_as_in_the_standard() {
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(accept(&key), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
