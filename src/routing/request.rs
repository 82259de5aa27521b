//! What routing reads of a request.

use std::borrow::Cow;
use std::net::IpAddr;

use http::Method;
use http::header::{COOKIE, HeaderMap, HeaderName, HeaderValue};
use percent_encoding::percent_decode_str;

/// The parts of a request that decide where it goes.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'a> {
    /// The host in lower case, without port.
    pub host: &'a str,
    /// The path, as it is sent on.
    pub path: &'a str,
    /// What follows the `?`.
    pub query: Option<&'a str>,
    /// The method.
    pub method: &'a Method,
    /// All header fields.
    pub headers: &'a HeaderMap,
    /// The client, as the connection or a trusted proxy's X-Forwarded-For gives it.
    pub client: IpAddr,
}

impl<'a> RequestHead<'a> {
    /// The first value of a header, where it is text.
    pub fn header(&self, name: &HeaderName) -> Option<&'a str> {
        self.headers.get(name).and_then(text)
    }

    /// The value of the first cookie of that name (RFC 6265 section 5.4 puts the most specific
    /// first).
    pub fn cookie(&self, name: &str) -> Option<&'a str> {
        self.headers
            .get_all(COOKIE)
            .into_iter()
            // Bytes, not text: another cookie that is no UTF-8 must not hide this one.
            .flat_map(|line| line.as_bytes().split(|byte| *byte == b';'))
            .filter_map(|pair| pair.trim_ascii().strip_prefix(name.as_bytes()))
            .find_map(|rest| rest.strip_prefix(b"="))
            .and_then(|value| std::str::from_utf8(value).ok())
            .map(unquote)
    }

    /// The decoded value of the first query parameter of that name.
    pub fn query_param(&self, name: &str) -> Option<Cow<'a, str>> {
        split_query(self.query?)
            .find(|(key, _)| *key == name || decode(key) == name)
            .map(|(_, value)| decode(value))
    }
}

/// A header value as text; UTF-8 beyond ASCII is let through, since user ids are not all ASCII.
pub fn text(value: &HeaderValue) -> Option<&str> {
    std::str::from_utf8(value.as_bytes()).ok()
}

fn unquote(value: &str) -> &str {
    value
        .strip_prefix('"')
        .and_then(|inner| inner.strip_suffix('"'))
        .unwrap_or(value)
}

/// The pairs of a query, decoded, in its order.
pub fn query_pairs(query: &str) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    split_query(query).map(|(name, value)| (decode(name), decode(value)))
}

fn split_query(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

/// Decodes one part of an `application/x-www-form-urlencoded` string.
fn decode(part: &str) -> Cow<'_, str> {
    if !part.contains(['%', '+']) {
        return Cow::Borrowed(part);
    }
    let spaced = part.replace('+', " ");
    Cow::Owned(percent_decode_str(&spaced).decode_utf8_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn with_head<T>(
        headers: &[(&'static str, &str)],
        query: Option<&str>,
        test: impl FnOnce(RequestHead<'_>) -> T,
    ) -> T {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        test(RequestHead {
            host: "example.com",
            path: "/",
            query,
            method: &Method::GET,
            headers: &map,
            client: Ipv4Addr::LOCALHOST.into(),
        })
    }

    #[test]
    fn cookies_are_found_in_crumbs_and_quotes() {
        let headers = [
            ("cookie", "a=1; uid=\"u 1\";b=2"),
            ("cookie", "c=3; uid=second"),
        ];
        let mut map = HeaderMap::new();
        map.insert(
            "cookie",
            HeaderValue::from_bytes(b"n=J\xfcrg; uid=bot-1; v=\xff").unwrap(),
        );
        let head = RequestHead {
            host: "a",
            path: "/",
            query: None,
            method: &Method::GET,
            headers: &map,
            client: Ipv4Addr::LOCALHOST.into(),
        };
        assert_eq!(
            head.cookie("uid"),
            Some("bot-1"),
            "another cookie hides nothing"
        );
        assert_eq!(head.cookie("v"), None);
        with_head(&headers, None, |head| {
            assert_eq!(head.cookie("uid"), Some("u 1"));
            assert_eq!(head.cookie("c"), Some("3"));
            assert_eq!(head.cookie("id"), None);
        });
    }

    #[test]
    fn query_parameters_are_decoded_and_the_first_wins() {
        with_head(
            &[],
            Some("a=1&user%5Fid=J%C3%BCrg+M&user_id=2&flag"),
            |head| {
                assert_eq!(head.query_param("user_id").as_deref(), Some("Jürg M"));
                assert_eq!(head.query_param("flag").as_deref(), Some(""));
                assert_eq!(head.query_param("none"), None);
            },
        );
    }

    #[test]
    fn header_values_may_be_utf_8_but_not_any_bytes() {
        with_head(&[("x-user-id", "Jürg")], None, |head| {
            assert_eq!(
                head.header(&HeaderName::from_static("x-user-id")),
                Some("Jürg")
            );
        });
        assert_eq!(text(&HeaderValue::from_bytes(b"\xff").unwrap()), None);
    }
}
