//! The `Via` field (RFC 9110 section 7.6.3): it names every gateway that a request has passed, and so
//! shows one that goes in a circle.

use http::Version;
use http::header::{HeaderMap, HeaderValue, VIA};

use crate::routing::request::text;

use super::error::ProxyError;

/// What a process calls itself in `Via`: a name of its own, so that one Serin behind another is no
/// loop.
#[derive(Clone, Debug)]
pub struct Via {
    pseudonym: String,
    http10: HeaderValue,
    http11: HeaderValue,
    http2: HeaderValue,
}

// === impl Via ===

impl Via {
    /// The name that comes of a draw.
    pub fn new(dice: u32) -> Self {
        let pseudonym = format!("serin-{dice:08x}");
        let entry = |version: &str| {
            HeaderValue::from_str(&format!("{version} {pseudonym}"))
                .unwrap_or(HeaderValue::from_static("1.1 serin"))
        };
        Self {
            http10: entry("1.0"),
            http11: entry("1.1"),
            http2: entry("2"),
            pseudonym,
        }
    }

    /// Refuses a request that has been here before.
    ///
    /// # Errors
    ///
    /// [`ProxyError::Loop`].
    pub fn refuse_loop(&self, headers: &HeaderMap) -> Result<(), ProxyError> {
        let entries = headers.get_all(VIA).iter().filter_map(text);
        let mut entries = entries.flat_map(|line| line.split(','));
        if entries.any(|entry| entry.split_ascii_whitespace().nth(1) == Some(&self.pseudonym)) {
            return Err(ProxyError::Loop);
        }
        Ok(())
    }

    /// Adds itself to those that a request has passed; it came in this version of HTTP.
    pub fn append(&self, headers: &mut HeaderMap, version: Version) {
        let entry = match version {
            Version::HTTP_2 => &self.http2,
            Version::HTTP_10 => &self.http10,
            _ => &self.http11,
        };
        headers.append(VIA, entry.clone());
    }
}
