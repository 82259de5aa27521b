//! Checks what stands for endpoints, and how names are resolved. Nothing is asked here: a name that
//! cannot be resolved now may be by the time it is needed.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::document::Path;
use crate::config::{file, value};
use crate::discovery::{Locator, Settings};

use super::Checker;

impl Checker<'_> {
    pub(super) fn endpoints(&mut self, backend: &file::Backend, at: &Path) -> Option<Vec<Locator>> {
        let at = &at.key("endpoints");
        let texts = match (&backend.endpoints, &backend.endpoints_file) {
            (Some(texts), _) => texts,
            (None, Some(_)) => return Some(Vec::new()),
            (None, None) => return self.missing_endpoints(at),
        };
        for (position, text) in texts.iter().enumerate() {
            if texts[..position].contains(text) {
                let message = format!("endpoint `{text}` is listed twice");
                self.error(&at.index(position), message, None);
            }
        }
        self.each(texts, at, |checker, text, at| {
            checker.parse(text, at, Locator::parse)
        })
    }

    fn missing_endpoints(&mut self, at: &Path) -> Option<Vec<Locator>> {
        // They may be what was cut out, or misspelt.
        if !self.document.is_maimed(&at.parent()) {
            self.error(at, "missing key `endpoints`", None);
        }
        None
    }

    pub(super) fn endpoints_file(&mut self, backend: &file::Backend, at: &Path) -> Option<PathBuf> {
        let path = self.around.directory.join(backend.endpoints_file.as_ref()?);
        let declared = (at.key("endpointsFile"), path.clone());
        self.endpoints_files.push(declared);
        Some(path)
    }

    pub(super) fn dns(&mut self, dns: &file::Dns, at: &Path) -> Option<Settings> {
        let default = Settings::default();
        let min_ttl = self.above_zero(dns.min_ttl.as_deref(), default.min_ttl, &at.key("minTtl"));
        let max_ttl = self.above_zero(dns.max_ttl.as_deref(), default.max_ttl, &at.key("maxTtl"));
        let timeout = self.above_zero(dns.timeout.as_deref(), default.timeout, &at.key("timeout"));
        let resolvers = self.resolvers(dns.resolvers.as_deref(), &at.key("resolvers"));
        let (min_ttl, max_ttl) = (min_ttl?, max_ttl?);
        if min_ttl > max_ttl {
            let key = if dns.min_ttl.is_some() {
                "minTtl"
            } else {
                "maxTtl"
            };
            let message = format!("`minTtl` ({min_ttl:?}) is above `maxTtl` ({max_ttl:?})");
            self.error(&at.key(key), message, None);
        }
        Some(Settings {
            min_ttl,
            max_ttl,
            timeout: timeout?,
            resolvers: resolvers?,
        })
    }

    fn above_zero(&mut self, text: Option<&str>, default: Duration, at: &Path) -> Option<Duration> {
        let duration = self.duration(text, default, at)?;
        if duration.is_zero() {
            self.error(at, "a time of 0 leaves none to ask in", None);
            return None;
        }
        Some(duration)
    }

    fn resolvers(
        &mut self,
        texts: Option<&[String]>,
        at: &Path,
    ) -> Option<Vec<std::net::SocketAddr>> {
        let texts = texts.unwrap_or_default();
        self.each(texts, at, |checker, text, at| {
            checker.parse(text, at, value::server)
        })
    }
}
