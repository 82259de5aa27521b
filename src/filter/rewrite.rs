//! Replacing the path of a request, or a part of it, as the Gateway API's HTTPPathModifier does.

/// What becomes of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathRewrite {
    /// It is replaced by this one.
    Full(String),
    /// The prefix by which its route was found is replaced by this one.
    Prefix(String),
}

// === impl PathRewrite ===

impl PathRewrite {
    /// The path that comes of `path`, of which the route's match has taken the first `matched`
    /// bytes.
    pub fn apply(&self, path: &str, matched: usize) -> String {
        match self {
            Self::Full(full) => full.clone(),
            // `OPTIONS *` has no path, and so no prefix.
            Self::Prefix(_) if path == "*" => path.to_owned(),
            Self::Prefix(prefix) => {
                let rest = path.get(matched..).unwrap_or_default();
                let rest = rest.strip_prefix('/').unwrap_or(rest);
                let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
                if rest.is_empty() && matched == path.len() && !prefix.is_empty() {
                    return prefix.to_owned();
                }
                format!("{prefix}/{rest}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table in the Gateway API's documentation of `replacePrefixMatch`.
    #[test]
    fn prefixes_are_replaced_as_the_gateway_api_says() {
        for (path, matched, replacement, expected) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "/", "/bar"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/foo/bar", "", "/xyz", "/xyz/foo/bar"),
            ("/", "", "/xyz", "/xyz/"),
            ("*", "", "/xyz", "*"),
        ] {
            let rewrite = PathRewrite::Prefix(replacement.to_owned());
            assert_eq!(
                rewrite.apply(path, matched.len()),
                expected,
                "{path} {replacement}"
            );
        }
        let full = PathRewrite::Full("/other".to_owned());
        assert_eq!(full.apply("/foo/bar", 4), "/other");
    }
}
