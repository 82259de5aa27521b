//! What to do when there is no file descriptor for a connection to an endpoint: connections that are
//! only kept for later give way, those of all workers.

use std::io;
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::watch;
use tokio::time::sleep;

use super::SendError;

/// How often a connection is tried again, and how long that waits for others to give way.
const TRIES: usize = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// The way to tell all workers that descriptors are short.
#[derive(Clone, Debug, Default)]
pub struct Shortage(watch::Sender<()>);

// === impl Shortage ===

impl Shortage {
    /// For a worker that wants to hear of it.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.0.subscribe()
    }

    /// Tries something again that has failed, if it is descriptors that it lacked.
    pub(super) async fn retry<T>(
        &self,
        mut outcome: Result<T, SendError>,
        mut again: impl AsyncFnMut() -> Result<T, SendError>,
    ) -> Result<T, SendError> {
        for _ in 0..TRIES {
            if !outcome.as_ref().is_err_and(lacks_descriptors) {
                break;
            }
            self.0.send_replace(());
            sleep(PAUSE).await;
            outcome = again().await;
        }
        outcome
    }
}

/// True for what this machine lacks, whatever an endpoint does.
pub fn is_exhaustion(error: &io::Error) -> bool {
    let lacks = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| lacks.contains(&errno))
}

/// True when this machine has no address or port left to reach an endpoint from; others it may reach.
pub fn lacks_ports(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::ADDRNOTAVAIL)
}

fn lacks_descriptors(error: &SendError) -> bool {
    matches!(errno(error), Some(Errno::MFILE | Errno::NFILE))
}

fn errno(error: &SendError) -> Option<Errno> {
    match error {
        SendError::Connect(error) => Errno::from_io_error(error),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_machine_lacks_is_told_from_what_the_endpoint_does() {
        let is_own = |errno: Errno| SendError::Connect(io::Error::from(errno)).is_own_shortage();
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM] {
            assert!(is_own(errno), "{errno}");
        }
        for errno in [
            Errno::CONNREFUSED,
            Errno::HOSTUNREACH,
            Errno::CONNRESET,
            Errno::ADDRNOTAVAIL,
        ] {
            assert!(!is_own(errno), "{errno}");
        }
        assert!(!SendError::ConnectTimeout.is_own_shortage());
    }
}
