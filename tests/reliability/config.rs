//! The configuration files of the rows.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Duration;

/// How long a response head may take; a version that hangs is found out after this long.
pub(crate) const BACKEND_REQUEST: Duration = Duration::from_secs(1);

/// Two versions of a shop, whose users are told apart by a header and stay with their version.
///
/// It names no health checks, no retries and no failover: what Serin does without being asked is
/// what is measured.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) stable: Vec<SocketAddr>,
    pub(crate) canary: Vec<SocketAddr>,
    /// Of stable and of canary.
    pub(crate) weights: (u32, u32),
    /// `pool.idleTimeout` of both versions; its default when `None`.
    pub(crate) pool_idle: Option<Duration>,
    /// `limits.requestBody` and the like are left out; so is the limit for the response head, for
    /// rows whose upstreams take their time.
    pub(crate) is_patient: bool,
}

impl Config {
    pub(crate) fn new(stable: &[SocketAddr], canary: &[SocketAddr]) -> Self {
        Self {
            stable: stable.to_vec(),
            canary: canary.to_vec(),
            weights: (1, 1),
            pool_idle: None,
            is_patient: false,
        }
    }

    /// The text, for a process that listens at these addresses.
    pub(crate) fn text(&self, web: SocketAddr, admin: SocketAddr) -> String {
        let mut text = format!(
            "listeners: [ {{ name: web, address: '{web}' }} ]
admin: {{ address: '{admin}' }}
workers: 2
backends:
"
        );
        for (name, version, endpoints) in [
            ("shop-stable", "stable", &self.stable),
            ("shop-canary", "canary", &self.canary),
        ] {
            let endpoints: Vec<String> = endpoints.iter().map(|one| format!("'{one}'")).collect();
            let endpoints = endpoints.join(", ");
            let pool = self.pool_idle.map_or(String::new(), |idle| {
                format!(", pool: {{ idleTimeout: {}ms }}", idle.as_millis())
            });
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "  - {{ name: {name}, version: {version}, endpoints: [ {endpoints} ]{pool} }}"
            );
        }
        let (stable, canary) = self.weights;
        let timeouts = match self.is_patient {
            true => String::new(),
            false => format!(
                "    timeouts: {{ backendRequest: {}ms }}\n",
                BACKEND_REQUEST.as_millis()
            ),
        };
        text + &format!(
            "routes:
  - name: shop
    backendRefs:
      - {{ name: shop-stable, weight: {stable} }}
      - {{ name: shop-canary, weight: {canary} }}
    gray: {{ identity: [ {{ header: x-user-id }} ] }}
    exposeVersion: true
{timeouts}"
        )
    }
}
