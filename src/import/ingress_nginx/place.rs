//! What an Ingress says of its paths, and in the annotations of ingress-nginx.

use std::fmt;

use crate::import::ingress::{Ingress, PathType, Rule, ServiceRef};

pub(super) const PREFIX: &str = "nginx.ingress.kubernetes.io/";

/// Annotations that say which requests get the canary.
pub(super) const OF_CANARIES: [&str; 7] = [
    "canary",
    "canary-by-cookie",
    "canary-by-header",
    "canary-by-header-pattern",
    "canary-by-header-value",
    "canary-weight",
    "canary-weight-total",
];

/// What an Ingress says of one path of one host.
pub(super) struct Place<'m> {
    pub(super) ingress: &'m Ingress,
    pub(super) host: Option<String>,
    pub(super) path: String,
    pub(super) path_type: PathType,
    pub(super) service: &'m ServiceRef,
}

// === impl Place ===

impl Place<'_> {
    /// The value of an annotation of ingress-nginx.
    pub(super) fn annotation(&self, key: &str) -> Option<String> {
        annotation(self.ingress, key)
    }

    /// True for the same requests.
    pub(super) fn shares(&self, main: &Self) -> bool {
        self.ingress.metadata.namespace == main.ingress.metadata.namespace
            && self.is_same_place(main)
    }

    pub(super) fn is_same_place(&self, other: &Self) -> bool {
        (&self.host, &self.path, self.path_type) == (&other.host, &other.path, other.path_type)
    }

    /// The name of its Ingress.
    pub(super) fn name(&self) -> String {
        self.ingress.metadata.full_name()
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.host.as_deref().unwrap_or("any host, ");
        write!(f, "{host}{}", self.path)
    }
}

/// The host of a rule; `None` for any. Hosts are alike in capitals and small letters.
pub(super) fn host_of(rule: &Rule) -> Option<String> {
    let host = rule.host.as_deref()?.trim().to_ascii_lowercase();
    (!host.is_empty() && host != "*").then_some(host)
}

/// True for a path that means something else as a regular expression than as it stands. Dots are in the names of
/// files, and mean them.
pub(super) fn has_regex(path: &str) -> bool {
    path.contains(['(', '[', '{', '*', '+', '?', '^', '$', '|', '\\'])
}

pub(super) fn is_canary(ingress: &Ingress) -> bool {
    annotation(ingress, "canary").as_deref() == Some("true")
}

pub(super) fn annotation(ingress: &Ingress, key: &str) -> Option<String> {
    let mut annotations = ingress.metadata.annotations();
    let found = annotations.find(|(name, _)| name.strip_prefix(PREFIX) == Some(key));
    found.map(|(_, value)| value)
}

pub(super) fn services_of(ingress: &Ingress) -> impl Iterator<Item = &ServiceRef> {
    let paths = ingress
        .spec
        .rules
        .iter()
        .filter_map(|rule| rule.http.as_ref());
    let backends = paths.flat_map(|http| &http.paths).map(|path| &path.backend);
    let backends = backends.chain(&ingress.spec.default_backend);
    backends.filter_map(|backend| backend.service.as_ref())
}

/// The prefix of a path that is written so that what is behind it can be captured: `/shop(/|$)(.*)`.
pub(super) fn prefix_of_capture(path: &str) -> Option<&str> {
    let prefix = path.strip_suffix("(/|$)(.*)")?;
    let is_plain = !prefix.contains(['(', '[', '*', '^', '$', '\\', '.', '+', '?']);
    (is_plain && prefix.starts_with('/')).then_some(prefix)
}

/// A size as nginx writes it, as Kubernetes does; `None` for no limit, or no size.
pub(super) fn body_size(text: &str) -> Option<String> {
    let text = text.trim();
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let number: u64 = digits.parse().ok().filter(|number| *number > 0)?;
    let unit = match &*text[digits.len()..].to_ascii_lowercase() {
        "" => "",
        "k" => "Ki",
        "m" => "Mi",
        "g" => "Gi",
        _ => return None,
    };
    Some(format!("{number}{unit}"))
}
