//! What concerns the process as a whole: how many clients it takes, and how it ends.

use std::time::Duration;

use crate::history;

use super::super::document::Path;
use super::super::{Shutdown, file};
use super::Checker;

const TIMEOUT: Duration = Duration::from_secs(25);
/// How many revisions of the file are kept.
const KEPT_REVISIONS: usize = 20;
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

    pub(super) fn history(
        &mut self,
        history: Option<&file::History>,
        at: &Path,
    ) -> Option<Option<history::Settings>> {
        let Some(history) = history else {
            return Some(None);
        };
        let home = self.around.home;
        let directory_at = at.key("directory");
        let directory = self.parse(&history.directory, &directory_at, |text| match text {
            "" => Err("is not the name of a directory".to_owned()),
            text => Ok(home.join(text)),
        });
        let keep = history.keep.map(|keep| file::Size(keep.into()));
        let keep = self.size(keep, 1..=1000, &at.key("keep"));
        Some(Some(history::Settings {
            directory: directory?,
            keep: keep?.map_or(KEPT_REVISIONS, |keep| keep as usize),
        }))
    }
}
