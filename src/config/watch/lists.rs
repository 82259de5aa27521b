//! The files of the user lists: followed on their own once they are in force, and read ahead for a
//! configuration that names them anew.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::debug;

use crate::config::ListSource;
use crate::config::load::{
    ListFailure, Lists, LoadedList, Stamp, load_list, load_list_with_pauses, stamp,
};
use crate::control::Change;

use super::directories::Watches;
use super::{Followed, Gone, Look};

/// The niceness of the threads that read user lists: about a tenth of a core while the workers want
/// all of it. At 19 it would be a hundredth, and a list would wait for minutes on a busy machine.
const LOW_PRIORITY: i32 = 5;

/// How long reading pauses after each part. A thread that never sleeps is given a whole time slice of
/// some milliseconds even at a low priority, for which a request would have to wait.
const PAUSE: Duration = Duration::from_micros(100);

/// All user lists that the reloader knows.
#[derive(Debug)]
pub(super) struct ListFiles {
    in_force: HashMap<ListSource, FollowedList>,
    /// What a configuration that is not in force names besides. Each is read once for every state of
    /// its file, however often the configuration is.
    ahead: HashMap<ListSource, ListAhead>,
    readings: JoinSet<Reading>,
}

/// A list in force.
#[derive(Clone, Debug)]
struct FollowedList {
    list: LoadedList,
    file: Followed,
    /// It is being read; another reading may not begin, or the older could end last.
    loading: bool,
    /// Why it could not be read or used the last time.
    failure: Option<ListFailure>,
}

/// A list that is not in force yet.
#[derive(Clone, Debug)]
struct ListAhead {
    file: Followed,
    /// What the file gave in its last state.
    read: Option<(Option<Stamp>, Result<LoadedList, ListFailure>)>,
}

/// What reading a list gave, and the state of the file when that began.
#[derive(Debug)]
pub(super) struct Reading {
    source: ListSource,
    state: Option<Stamp>,
    loaded: Result<LoadedList, ListFailure>,
}

/// Whether a list that changes is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    /// Lists in force are left to their own reloads, and new ones are read when they rest.
    WhenAtRest,
    /// Lists that changed, or could not be used, are read now.
    Now,
}

/// One reading of a configuration, as far as its lists go.
pub(super) struct ConfigReading<'r> {
    lists: &'r mut ListFiles,
    watches: &'r Watches,
    urgency: Urgency,
    unsettled: usize,
}

// === impl ListFiles ===

impl ListFiles {
    /// Follows the lists that are in force.
    pub(super) fn new(lists: &Lists) -> Self {
        let mut files = Self {
            in_force: HashMap::new(),
            ahead: HashMap::new(),
            readings: JoinSet::new(),
        };
        files.follow(lists);
        files
    }

    /// From now on these lists are in force. One that was not read again is as fresh, or as stale,
    /// as it was.
    pub(super) fn follow(&mut self, lists: &Lists) {
        let mut known = std::mem::take(&mut self.in_force);
        for (source, list) in lists {
            let same = |known: &FollowedList| Arc::ptr_eq(&known.list.list, &list.list);
            let followed = known.remove(source).filter(same);
            let fresh = || FollowedList {
                list: list.clone(),
                file: Followed::at(Some(list.stamp)),
                loading: false,
                failure: None,
            };
            self.in_force
                .insert(source.clone(), followed.unwrap_or_else(fresh));
        }
        self.ahead.clear();
    }

    /// True when exactly these lists are in force, whatever ids are on them.
    pub(super) fn are_of(&self, lists: &Lists) -> bool {
        lists.len() == self.in_force.len()
            && lists
                .keys()
                .all(|source| self.in_force.contains_key(source))
    }

    /// Every file of a list.
    pub(super) fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let sources = self.in_force.keys().chain(self.ahead.keys());
        sources.map(|source| &source.path)
    }

    /// Begins to read the lists in force that have changed and rest; true when some do not rest yet.
    pub(super) fn look(&mut self, watches: &Watches, gone: Gone) -> bool {
        let mut restless = false;
        let idle = self.in_force.iter_mut().filter(|(_, list)| !list.loading);
        for (source, list) in idle {
            match list.file.look_while(gone, &source.path, watches) {
                Look::Unchanged => {}
                Look::Restless => restless = true,
                Look::Changed(state) => {
                    list.file.read = state;
                    list.loading = true;
                    self.readings
                        .spawn(read_in_background(source.clone(), state));
                }
            }
        }
        restless
    }

    /// A list may be unreadable for a reason that is not in the file (permissions of a directory,
    /// no file descriptors), so that nothing about the file tells when to try again.
    pub(super) fn retry_unreadable(&mut self) {
        for list in self.in_force.values_mut().filter(|list| !list.loading) {
            if matches!(list.failure, Some(ListFailure::Unreadable(_))) && list.file.read.is_some()
            {
                list.file.read = None;
            }
        }
    }

    /// Waits for a reading to end; for ever when there is none.
    pub(super) async fn next_reading(&mut self) -> Reading {
        loop {
            match self.readings.join_next().await {
                Some(Ok(reading)) => return reading,
                // Its thread's death is a reading as well; this is the runtime's end.
                Some(Err(error)) => debug!(%error, "a reading was lost"),
                None => std::future::pending().await,
            }
        }
    }

    /// Notes what a reading gave; `None` when that is nothing new.
    pub(super) fn note(&mut self, reading: Reading) -> Option<Change> {
        let Reading {
            source,
            state,
            loaded,
        } = reading;
        let followed = self.in_force.get_mut(&source)?;
        if !followed.loading || followed.file.read != state {
            debug!(file = %source.path.display(), "a reload has read the list meanwhile");
            return None;
        }
        followed.loading = false;
        let loaded = loaded.and_then(|list| followed.list.may_become(list, &source));
        let before = std::mem::replace(&mut followed.failure, loaded.as_ref().err().cloned());
        let nothing_new = match &loaded {
            Ok(list) => before.is_none() && followed.list.hash == list.hash,
            Err(_) => followed.failure == before,
        };
        if nothing_new {
            debug!(file = %source.path.display(), "the user list was read again; nothing is new");
            return None;
        }
        if let Ok(list) = &loaded {
            followed.list = list.clone();
        }
        let loaded = loaded.map_err(ListFailure::into_reason);
        Some(Change::UserList { source, loaded })
    }

    /// The lists for one reading of the configuration.
    pub(super) fn reading<'r>(
        &'r mut self,
        watches: &'r Watches,
        urgency: Urgency,
    ) -> ConfigReading<'r> {
        ConfigReading {
            lists: self,
            watches,
            urgency,
            unsettled: 0,
        }
    }
}

// === impl ConfigReading ===

impl ConfigReading<'_> {
    /// How many lists could not be read because they do not rest.
    pub(super) fn unsettled(&self) -> usize {
        self.unsettled
    }

    /// A list of the configuration.
    pub(super) fn read(&mut self, source: &ListSource) -> Result<LoadedList, ListFailure> {
        let read = match self.lists.in_force.get(source) {
            Some(known) if self.urgency == Urgency::WhenAtRest || known.is_current(source) => {
                Ok(known.list.clone())
            }
            Some(known) => self
                .read_now(source)
                .and_then(|list| known.list.may_become(list, source)),
            None if self.urgency == Urgency::Now => self.read_now(source),
            None => self.read_ahead(source),
        };
        self.unsettled += usize::from(read.as_ref().err() == Some(&ListFailure::Unsettled));
        read
    }

    fn read_now(&self, source: &ListSource) -> Result<LoadedList, ListFailure> {
        if self.watches.is_being_written(&source.path) {
            return Err(ListFailure::Unsettled);
        }
        load_list(source)
    }

    fn read_ahead(&mut self, source: &ListSource) -> Result<LoadedList, ListFailure> {
        let unknown = || ListAhead {
            file: Followed::at(None),
            read: None,
        };
        let ahead = self
            .lists
            .ahead
            .entry(source.clone())
            .or_insert_with(unknown);
        let state = match ahead.file.look(&source.path, self.watches) {
            Look::Restless => return Err(ListFailure::Unsettled),
            Look::Unchanged => None,
            Look::Changed(state) => state,
        };
        match &ahead.read {
            Some((known, read)) if *known == state && state.is_some() => read.clone(),
            _ => {
                let read = load_list(source);
                let lasting = !matches!(read, Err(ListFailure::Unreadable(_)));
                ahead.read = lasting.then(|| (state, read.clone()));
                read
            }
        }
    }
}

// === impl FollowedList ===

impl FollowedList {
    /// True when the ids in force are those of the file as it is.
    fn is_current(&self, source: &ListSource) -> bool {
        !self.loading && self.failure.is_none() && self.file.read == stamp(&source.path)
    }
}

// === impl LoadedList ===

impl LoadedList {
    /// The list that takes the place of this one; a file without any content does not, if there are
    /// ids to lose.
    fn may_become(&self, next: Self, source: &ListSource) -> Result<Self, ListFailure> {
        if next.stamp.is_empty() && !self.list.is_empty() {
            return Err(ListFailure::Unusable(format!(
                "is not emptied: `{}` has no content at all; leave a comment line in it",
                source.path.display()
            )));
        }
        Ok(next)
    }
}

/// Reads a list on a thread of its own that gives way to the workers: a list of millions of ids
/// keeps a core busy for seconds, and requests must not wait for that.
async fn read_in_background(source: ListSource, state: Option<Stamp>) -> Reading {
    let (sender, loaded) = oneshot::channel();
    let reading = source.clone();
    let job = move || {
        // On Linux this is the priority of the calling thread alone. Without it, reading is rude
        // but right.
        let _ = rustix::process::setpriority_process(None, LOW_PRIORITY);
        // Nobody listens only while the process ends.
        let _ = sender.send(load_list_with_pauses(&reading, &mut || {
            thread::sleep(PAUSE)
        }));
    };
    let started = thread::Builder::new().name("serin-load".into()).spawn(job);
    let failed = |reason: String| Err(ListFailure::Unreadable(reason));
    let loaded = match started {
        Ok(_) => loaded
            .await
            .unwrap_or_else(|_| failed("cannot be read: its thread died".into())),
        Err(error) => failed(format!(
            "cannot be read: there is no thread for it: {error}"
        )),
    };
    Reading {
        source,
        state,
        loaded,
    }
}
