//! What concerns the process as a whole: how many clients it takes, and how it ends.

use std::time::Duration;

use super::super::document::Path;
use super::super::{Shutdown, file};
use super::Checker;

const TIMEOUT: Duration = Duration::from_secs(25);
const LAME_DUCK: Duration = Duration::from_secs(5);

impl Checker<'_> {
    pub(super) fn max_connections(
        &mut self,
        connections: &file::Connections,
        at: &Path,
    ) -> Option<Option<usize>> {
        if connections.max == Some(0) {
            self.error(
                &at.key("max"),
                "there must be room for one connection",
                None,
            );
            return None;
        }
        Some(connections.max.map(|max| max as usize))
    }

    pub(super) fn shutdown(&mut self, shutdown: &file::Shutdown, at: &Path) -> Option<Shutdown> {
        let timeout = self.duration(shutdown.timeout.as_deref(), TIMEOUT, &at.key("timeout"));
        let lame_duck = at.key("lameDuck");
        let given = shutdown.lame_duck.as_deref();
        let given = self.duration(given, LAME_DUCK, &lame_duck);
        let (timeout, mut given) = (timeout?, given?);
        if shutdown.lame_duck.is_none() {
            given = given.min(timeout / 2);
        }
        if given > timeout {
            let message = format!("the lame duck is a part of `timeout`, which is {timeout:?}");
            let hint = "the rest of `timeout` is what requests have to finish in";
            self.error(&lame_duck, message, Some(hint.to_owned()));
            return None;
        }
        Some(Shutdown {
            timeout,
            lame_duck: given,
        })
    }
}
