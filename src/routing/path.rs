//! The one form of a path that routes are matched by and that is sent on.
//!
//! Whoever matches one form and sends on another decides about a request that the endpoint never
//! sees: `/%61dmin` and `/public/../admin` are `/admin` to some servers and not to others. So
//! escapes that mean nothing are undone, what should have been escaped is, and what servers disagree
//! about is refused. Paths in the configuration are brought into the same form.

use std::borrow::Cow;
use std::fmt::Write;

/// A path in its canonical form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canonical<'p> {
    /// The path.
    pub path: Cow<'p, str>,
    /// It has an escaped slash, which some servers take for one and others do not.
    pub has_escaped_slash: bool,
}

/// Why a path has no canonical form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It has a segment `.` or `..`, escaped or not.
    Dots,
    /// It has a backslash, which some servers take for a slash.
    Backslash,
    /// It has a NUL, at which some servers end it.
    Nul,
    /// It has a `%` that begins no escape.
    Escape,
}

/// The bytes that may stand in a path as they are, slashes among them (RFC 3986 section 3.3).
static PLAIN: [bool; 256] = plain();

/// Brings a path into its canonical form: escapes of unreserved characters undone (RFC 3986 section
/// 6.2.2.2), other escapes in capitals, and bytes escaped that no path may have as they are.
///
/// # Errors
///
/// Why it is refused.
pub fn canonical(path: &str) -> Result<Canonical<'_>, Unfit> {
    if path.bytes().all(|byte| PLAIN[usize::from(byte)]) {
        refuse_dots(path)?;
        return Ok(Canonical {
            path: Cow::Borrowed(path),
            has_escaped_slash: false,
        });
    }
    let path = escaped_where_needed(path)?;
    let has_escaped_slash = path.contains("%2F");
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

fn escaped_where_needed(path: &str) -> Result<String, Unfit> {
    let mut written = String::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let (byte, is_plain) = if byte == b'%' {
            let (escaped, tail) = unescape(tail).ok_or(Unfit::Escape)?;
            rest = tail;
            (escaped, is_unreserved(escaped))
        } else {
            (byte, PLAIN[usize::from(byte)])
        };
        match byte {
            0 => return Err(Unfit::Nul),
            b'\\' => return Err(Unfit::Backslash),
            byte if is_plain => written.push(byte.into()),
            byte => write!(written, "%{byte:02X}").expect("a string takes what is written"),
        }
    }
    Ok(written)
}

fn refuse_dots(path: &str) -> Result<(), Unfit> {
    // What follows a semicolon is a parameter to some servers, which look at the rest alone.
    let is_dots = |segment: &str| {
        let name = segment.split(';').next().unwrap_or_default();
        let name = name.split("%3B").next().unwrap_or_default();
        matches!(name, "." | "..")
    };
    if path.contains("/.") && path.split('/').any(is_dots) {
        return Err(Unfit::Dots);
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
const fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

const fn plain() -> [bool; 256] {
    let mut plain = [false; 256];
    let mut byte = 0;
    while byte < 128_u8 {
        plain[byte as usize] = is_unreserved(byte)
            || matches!(
                byte,
                b'/' | b':' | b'@' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')'
            )
            || matches!(byte, b'*' | b'+' | b',' | b';' | b'=');
        byte += 1;
    }
    plain
}

// === impl Unfit ===

impl Unfit {
    /// What is wrong with the path, as its sender is told.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Dots => "the path has a segment of dots",
            Self::Backslash => "the path has a backslash",
            Self::Nul => "the path has a NUL",
            Self::Escape => "the path has a malformed escape",
        }
    }
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
            ("/é", "/%C3%A9"),
            ("/%c3%a9", "/%C3%A9"),
            ("/\"<a>`{b|c}^[d]", "/%22%3Ca%3E%60%7Bb%7Cc%7D%5E%5Bd%5D"),
            ("/a b?c#d\u{7f}", "/a%20b%3Fc%23d%7F"),
            ("/!$&'()*+,;=:@", "/!$&'()*+,;=:@"),
            ("/%3b%40", "/%3B%40"),
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
            "/é%",
            "/é/../b",
        ] {
            assert!(canonical(path).is_err(), "{path}");
        }
    }

    proptest! {
        #[test]
        fn the_canonical_form_is_its_own(path in "/[a-z./%\\\\0-9A-F]{0,20}|/\\PC{0,12}") {
            if let Ok(once) = canonical(&path) {
                prop_assert_eq!(&canonical(&once.path).unwrap(), &once);
                let is_plain = |byte: u8| byte == b'%' || PLAIN[usize::from(byte)];
                prop_assert!(once.path.bytes().all(is_plain), "{}", once.path);
            }
        }
    }
}
