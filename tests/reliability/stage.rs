//! What stands around a row: three endpoints of stable, one of canary, and a Serin in front of them.

use std::net::SocketAddr;

use tempfile::TempDir;

use crate::Error;
use crate::client::{Connection, Request};
use crate::config::Config;
use crate::fault::FaultProxy;
use crate::load::Users;
use crate::process::{Launch, Serin, Upstream};
use crate::row::Pace;

/// How many endpoints stable has.
const STABLE_ENDPOINTS: usize = 3;

/// Users of each version that take part.
const USERS: usize = 64;

/// Upstream processes, with a fault proxy before those that get into trouble.
#[derive(Debug)]
pub(crate) struct Upstreams {
    pub(crate) stable: Vec<Upstream>,
    pub(crate) canary: Upstream,
    /// Before the first endpoint of stable.
    pub(crate) before_stable: FaultProxy,
    pub(crate) before_canary: FaultProxy,
}

/// Upstreams, a Serin, and its users.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) upstreams: Upstreams,
    pub(crate) serin: Serin,
    pub(crate) users: Users,
    pub(crate) directory: TempDir,
}

/// What stands between Serin and the endpoints that get into trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wiring {
    /// The fault proxies.
    Proxied,
    Nothing,
}

// === impl Upstreams ===

impl Upstreams {
    pub(crate) async fn start() -> Result<Self, Error> {
        let mut stable = Vec::new();
        for number in 1..=STABLE_ENDPOINTS {
            stable.push(Upstream::start(&format!("stable-{number}")).await?);
        }
        let canary = Upstream::start("canary").await?;
        Ok(Self {
            before_stable: FaultProxy::start(stable[0].address())?,
            before_canary: FaultProxy::start(canary.address())?,
            stable,
            canary,
        })
    }

    /// A configuration with all endpoints.
    pub(crate) fn config(&self, wiring: Wiring) -> Config {
        let mut stable: Vec<SocketAddr> = self.stable.iter().map(Upstream::address).collect();
        let mut canary = self.canary.address();
        if wiring == Wiring::Proxied {
            stable[0] = self.before_stable.address();
            canary = self.before_canary.address();
        }
        Config::new(&stable, &[canary])
    }
}

// === impl Stage ===

impl Stage {
    pub(crate) async fn set(
        pace: &Pace,
        launch: Launch,
        wiring: Wiring,
        adapt: impl FnOnce(&mut Config),
    ) -> Result<Self, Error> {
        let upstreams = Upstreams::start().await?;
        let mut config = upstreams.config(wiring);
        adapt(&mut config);
        let directory = tempfile::tempdir()?;
        let serin = Serin::start(&pace.serin, directory.path(), &config, launch).await?;
        let users = users(serin.address()).await?;
        Ok(Self {
            upstreams,
            serin,
            users,
            directory,
        })
    }
}

/// Finds users of either version, by asking as them.
pub(crate) async fn users(address: SocketAddr) -> Result<Users, Error> {
    let mut users = Users::default();
    let mut connection = Connection::open(address).await?;
    for number in 0.. {
        let user = format!("user-{number}");
        let answer = connection
            .exchange(&Request::get("/bytes/1", &user, 1))
            .await;
        let answer = answer.map_err(|broken| format!("{user}: {broken:?}"))?;
        let group = match answer.version.as_deref() {
            Some("stable") => &mut users.stable,
            Some("canary") => &mut users.canary,
            other => return Err(format!("{user} got the version {other:?}").into()),
        };
        if group.len() < USERS {
            group.push(user);
        }
        if users.stable.len() == USERS && users.canary.len() == USERS {
            break;
        }
    }
    Ok(users)
}
