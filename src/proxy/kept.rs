//! The head of a request, kept to be sent again.
//!
//! Nearly every one is kept for nothing, so keeping has to be cheap: target and fields stand one
//! behind the other in a single piece of memory. A copy of the map would count a reference for each
//! name and value, and hold on to the buffer that they were read into: hyper would need another one
//! for each request.

use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

/// The head of a request. Each field stands behind the lengths of its name and of its value.
#[derive(Debug)]
pub(super) struct KeptHead {
    pub(super) method: Method,
    /// Where the fields begin: what is before is the target, in origin form.
    fields_at: usize,
    bytes: Vec<u8>,
}

/// What most heads fit into.
const USUAL_HEAD: usize = 512;

// === impl KeptHead ===

impl KeptHead {
    pub(super) fn new(parts: &Parts) -> Self {
        let mut bytes = Vec::with_capacity(USUAL_HEAD);
        let target = parts.uri.path_and_query().map(PathAndQuery::as_str);
        bytes.extend_from_slice(target.unwrap_or_default().as_bytes());
        let fields_at = bytes.len();
        for (name, value) in &parts.headers {
            let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
            // A head is limited to far less than what fits.
            let lengths = (name.len() as u64) << 32 | value.len() as u64;
            bytes.extend_from_slice(&lengths.to_ne_bytes());
            bytes.extend_from_slice(name);
            bytes.extend_from_slice(value);
        }
        Self {
            method: parts.method.clone(),
            fields_at,
            bytes,
        }
    }

    /// The target, in origin form.
    pub(super) fn uri(&self) -> Uri {
        // It was one before.
        let target = PathAndQuery::try_from(&self.bytes[..self.fields_at]);
        target.map(Uri::from).unwrap_or_default()
    }

    /// The fields, in their order.
    pub(super) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let mut rest = &self.bytes[self.fields_at..];
        while let Some((name, value, after)) = next(rest) {
            rest = after;
            // Both were what they are before.
            let name = HeaderName::from_bytes(name);
            let value = HeaderValue::from_bytes(value);
            if let (Ok(name), Ok(value)) = (name, value) {
                headers.append(name, value);
            }
        }
        headers
    }
}

/// The next field, and what is behind it.
fn next(fields: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (lengths, rest) = fields.split_first_chunk()?;
    let lengths = u64::from_ne_bytes(*lengths);
    let (name, rest) = rest.split_at_checked((lengths >> 32) as usize)?;
    let (value, rest) = rest.split_at_checked(lengths as u32 as usize)?;
    Some((name, value, rest))
}

#[cfg(test)]
mod tests {
    use http::Request;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_kept_is_what_there_was(
            fields in prop::collection::vec(("[a-z][a-z-]{0,12}", "[ -~\u{80}-\u{ff}]{0,40}"), 0..20),
            path in "/[a-z]{0,10}(\\?[a-z]{0,5})?",
        ) {
            let mut request = Request::put(path.as_str()).body(()).unwrap();
            for (name, value) in &fields {
                let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
                request.headers_mut().append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value);
            }
            let parts = request.into_parts().0;
            let kept = KeptHead::new(&parts);
            prop_assert_eq!(kept.headers(), parts.headers);
            prop_assert_eq!(kept.uri(), parts.uri);
            prop_assert_eq!(kept.method, parts.method);
        }
    }
}
