//! The head of a request, kept to be sent again.
//!
//! Nearly every one is kept for nothing, so keeping has to be cheap: the fields stand one behind the
//! other in a single piece of memory. A copy of the map would count a reference for each name and
//! value, and first make values countable that nobody shares.

use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

/// The head of a request.
#[derive(Debug)]
pub(super) struct KeptHead {
    pub(super) method: Method,
    path: Option<PathAndQuery>,
    fields: Vec<u8>,
}

/// Bytes before each field: the lengths of its name and of its value.
const LENGTHS: usize = 8;

/// What most heads fit into.
const USUAL_HEAD: usize = 512;

// === impl KeptHead ===

impl KeptHead {
    pub(super) fn new(parts: &Parts) -> Self {
        let mut fields = Vec::with_capacity(USUAL_HEAD);
        for (name, value) in &parts.headers {
            let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
            // A head is limited to far less than what fits.
            fields.extend_from_slice(&(name.len() as u32).to_ne_bytes());
            fields.extend_from_slice(&(value.len() as u32).to_ne_bytes());
            fields.extend_from_slice(name);
            fields.extend_from_slice(value);
        }
        Self {
            method: parts.method.clone(),
            path: parts.uri.path_and_query().cloned(),
            fields,
        }
    }

    /// The target, in origin form.
    pub(super) fn uri(&self) -> Uri {
        self.path.clone().map(Uri::from).unwrap_or_default()
    }

    /// The fields, in their order.
    pub(super) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let mut rest = self.fields.as_slice();
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
    let (lengths, rest) = fields.split_first_chunk::<LENGTHS>()?;
    let (name, value) = lengths.split_first_chunk::<4>()?;
    let length = |bytes: &[u8]| Some(u32::from_ne_bytes(bytes.try_into().ok()?) as usize);
    let (name, rest) = rest.split_at_checked(length(name)?)?;
    let (value, rest) = rest.split_at_checked(length(value)?)?;
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
