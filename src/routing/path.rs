//! The one form of a path that routes are matched by and that is sent on.
//!
//! Whoever matches one form and sends on another decides about a request that the endpoint never
//! sees: `/%61dmin` and `/public/../admin` are `/admin` to some servers and not to others. So
//! escapes that mean nothing are undone, and what servers disagree about is refused.

use std::borrow::Cow;

/// A path in its canonical form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canonical<'p> {
    /// The path.
    pub path: Cow<'p, str>,
    /// It has an escaped slash, which some servers take for one and others do not.
    pub has_escaped_slash: bool,
}

/// Brings a path into its canonical form: escapes of unreserved characters undone (RFC 3986 section
/// 6.2.2.2), other escapes in capitals.
///
/// # Errors
///
/// Why it is refused: a segment `.` or `..`, escaped or not, a backslash, a NUL, or a `%` that
/// begins no escape.
pub fn canonical(path: &str) -> Result<Canonical<'_>, &'static str> {
    if memchr::memchr3(b'%', b'\\', 0, path.as_bytes()).is_none() {
        refuse_dots(path)?;
        return Ok(Canonical {
            path: Cow::Borrowed(path),
            has_escaped_slash: false,
        });
    }
    let mut has_escaped_slash = false;
    let mut undone = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        match byte {
            0 => return Err("the path has a NUL"),
            b'\\' => return Err("the path has a backslash"),
            b'%' => {
                let (escaped, tail) = unescape(tail).ok_or("the path has a malformed escape")?;
                rest = tail;
                match escaped {
                    0 => return Err("the path has a NUL"),
                    b'\\' => return Err("the path has a backslash"),
                    b if is_unreserved(b) => undone.push(b),
                    b => {
                        has_escaped_slash |= b == b'/';
                        undone.extend_from_slice(format!("%{b:02X}").as_bytes());
                    }
                }
            }
            byte => undone.push(byte),
        }
    }
    // Only ASCII was undone.
    let path = String::from_utf8(undone).map_err(|_| "the path is malformed")?;
    if has_escaped_slash {
        // Also where they are kept: whoever takes them for slashes would climb.
        refuse_dots(&path.replace("%2F", "/"))?;
    }
    refuse_dots(&path)?;
    Ok(Canonical {
        path: Cow::Owned(path),
        has_escaped_slash,
    })
}

fn refuse_dots(path: &str) -> Result<(), &'static str> {
    // What follows a semicolon is a parameter to some servers, which look at the rest alone.
    let is_dots = |segment: &str| {
        let name = segment.split(';').next().unwrap_or_default();
        let name = name.split("%3B").next().unwrap_or_default();
        matches!(name, "." | "..")
    };
    if path.contains("/.") && path.split('/').any(is_dots) {
        return Err("the path has a segment of dots");
    }
    Ok(())
}

fn unescape(after: &[u8]) -> Option<(u8, &[u8])> {
    let (digits, rest) = after.split_at_checked(2)?;
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let value = digit(digits[0])? * 16 + digit(digits[1])?;
    Some((u8::try_from(value).ok()?, rest))
}

/// RFC 3986 section 2.3.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_means_the_same_looks_the_same() {
        for (path, expected) in [
            ("/shop/cart", "/shop/cart"),
            ("/%73hop/c%61rt", "/shop/cart"),
            ("/a%2fb", "/a%2Fb"),
            ("/a%c3%bc", "/a%C3%BC"),
            ("/a%7Eb%2D", "/a~b-"),
            ("/.well-known/a..b/...", "/.well-known/a..b/..."),
            ("//a//", "//a//"),
            ("*", "*"),
        ] {
            let canonical = canonical(path).unwrap();
            assert_eq!(canonical.path, expected, "{path}");
            assert_eq!(canonical.has_escaped_slash, expected.contains("%2F"));
        }
    }

    #[test]
    fn what_servers_disagree_about_is_refused() {
        for path in [
            "/a/../b",
            "/a/..",
            "/..",
            "/.",
            "/a/./b",
            "/%2e%2e/b",
            "/a/%2E",
            "/.%2e/b",
            "/a\\b",
            "/a%5cb",
            "/a%00",
            "/a/..;/b",
            "/a/..;x=y/b",
            "/a/..%3b/b",
            "/a%2f..%2fb",
            "/a%",
            "/a%2",
            "/a%zz",
            "/%%32e",
        ] {
            assert!(canonical(path).is_err(), "{path}");
        }
    }

    proptest! {
        #[test]
        fn the_canonical_form_is_its_own(path in "/[a-z./%\\\\0-9A-F]{0,20}") {
            if let Ok(once) = canonical(&path) {
                prop_assert_eq!(&canonical(&once.path).unwrap(), &once);
            }
        }
    }
}
