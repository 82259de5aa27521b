//! Checks backends: header edits, connection settings.

use std::time::Duration;

use http::header::{HeaderName, HeaderValue};

use crate::backend::{ConnectionPolicy, HeaderEdits};
use crate::config::document::Path;
use crate::config::{Backend, file, value};

use super::Checker;
use super::resilience::{Resilience, Roles};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(20);
const POOL_MAX_IDLE: u32 = 256;

impl Checker<'_> {
    pub(super) fn backend(
        &mut self,
        backend: &file::Backend,
        roles: &Roles<'_>,
        at: &Path,
    ) -> Option<Backend> {
        let name = self.name(&backend.name, at);
        if value::header_value(&backend.version).is_err() {
            self.error(
                &at.key("version"),
                "the version has control characters",
                None,
            );
        }
        let endpoints = self.endpoints(backend, at);
        let endpoints_file = self.endpoints_file(backend, at);
        let request_headers =
            self.header_edits(&backend.request_headers, &at.key("requestHeaders"));
        let response_headers =
            self.header_edits(&backend.response_headers, &at.key("responseHeaders"));
        let connections = self.connection_policy(backend, at);
        let transport = self.transport(backend, at);
        let (transport, own_certificate) = transport.unzip();
        let resilience = self.resilience(backend, roles, at);
        let Resilience {
            gate_limits,
            health_check,
            outliers,
            slow_start,
            panic_threshold,
        } = resilience?;
        Some(Backend {
            name: name?,
            version: backend.version.as_str().into(),
            endpoints: endpoints?,
            endpoints_file,
            disabled: backend.disabled,
            request_headers: request_headers?,
            response_headers: response_headers?,
            connections: connections?,
            transport: transport?,
            own_certificate: own_certificate?,
            gate_limits,
            health_check,
            outliers,
            slow_start,
            panic_threshold,
        })
    }

    fn connection_policy(
        &mut self,
        backend: &file::Backend,
        at: &Path,
    ) -> Option<ConnectionPolicy> {
        let connect = at.key("timeouts").key("connect");
        let idle = at.key("pool").key("idleTimeout");
        let connect_timeout = self.duration(
            backend.timeouts.connect.as_deref(),
            CONNECT_TIMEOUT,
            &connect,
        );
        let idle_timeout = self.duration(
            backend.pool.idle_timeout.as_deref(),
            POOL_IDLE_TIMEOUT,
            &idle,
        );
        let most = self.count(
            backend.limits.connections,
            &at.key("limits").key("connections"),
        );
        if connect_timeout == Some(Duration::ZERO) {
            self.error(
                &connect,
                "a connect timeout of 0 would fail every connection",
                None,
            );
        }
        Some(ConnectionPolicy {
            connect_timeout: connect_timeout?,
            idle_timeout: idle_timeout?,
            max_idle: backend.pool.max_idle.unwrap_or(POOL_MAX_IDLE) as usize,
            most: most?,
        })
    }

    fn header_edits(&mut self, edits: &file::HeaderEdits, at: &Path) -> Option<HeaderEdits> {
        let mut pairs = |key: &str, pairs: &std::collections::BTreeMap<String, String>| {
            let checked: Vec<Option<(HeaderName, HeaderValue)>> = pairs
                .iter()
                .map(|(name, text)| {
                    let at = at.key(key).key(name.as_str());
                    let name = self.parse_key(name, &at, value::editable_header);
                    let value = self.parse(text, &at, value::header_value);
                    Some((name?, value?))
                })
                .collect();
            checked.into_iter().collect::<Option<Vec<_>>>()
        };
        let set = pairs("set", &edits.set);
        let add = pairs("add", &edits.add);
        let remove = self.each(&edits.remove, &at.key("remove"), |checker, text, at| {
            checker.parse(text, at, value::editable_header)
        });
        Some(HeaderEdits {
            remove: remove?,
            set: set?,
            add: add?,
        })
    }
}
