//! File descriptors: how many the process may have, and how many of them clients may take.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::{info, warn};

/// What the process needs without any listener, worker or client: standard streams, the runtimes of
/// its threads, watched directories, files that are read, the access log, and the exporter of spans.
const BASE: u64 = 24;

/// What a worker needs: its runtime.
const WORKER: u64 = 4;

/// What a listener needs: its socket, a copy, and a connection that waits for its place.
const LISTENER: u64 = 3;

/// Raises the limit of the process as far as that is allowed.
pub fn raise() {
    let before = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: before.maximum,
        ..before
    };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        warn!(%error, "the limit of file descriptors cannot be raised");
    }
    info!(limit = limit(), "file descriptors");
}

/// How many the process may have.
pub fn limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The most connections to the admin listener: a few are enough for probes, scrapes and people.
pub fn admin_connections(limit: u64) -> usize {
    (limit / 64).clamp(8, 64) as usize
}

/// The most connections that clients may have: what the process does not need itself, but at least
/// one.
pub fn most_connections(limit: u64, workers: usize, listeners: usize) -> usize {
    let admin = admin_connections(limit) as u64;
    let own = BASE + admin + WORKER * workers as u64 + LISTENER * listeners as u64;
    usize::try_from(limit.saturating_sub(own).max(1)).unwrap_or(usize::MAX)
}

/// How many connections clients may have where nobody says: each may need another one to an
/// endpoint.
pub fn default_connections(limit: u64, workers: usize, listeners: usize) -> usize {
    (most_connections(limit, workers, listeners) / 2).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_get_half_of_what_is_not_needed_otherwise_and_at_least_one() {
        assert_eq!(default_connections(1024, 2, 2), (1024 - 54) / 2);
        assert_eq!(default_connections(64, 2, 1), 10);
        assert_eq!(default_connections(20, 2, 1), 1);
        assert_eq!(default_connections(u64::MAX, 64, 8), usize::MAX / 2 - 184);
        assert_eq!(most_connections(64, 2, 1), 21);
    }
}
