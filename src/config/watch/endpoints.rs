//! Files of endpoints: followed on their own once they are in force, and read when they rest for a
//! configuration that names them anew.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use tracing::debug;

use crate::config::endpoints_file::{EndpointsFiles, LoadedEndpoints, load_endpoints};
use crate::config::load::{ListFailure, stamp};
use crate::discovery::{DnsName, Locator};

use super::directories::Watches;
use super::lists::Urgency;
use super::{Followed, Gone, Look};

/// All files of endpoints that the reloader knows.
#[derive(Debug)]
pub(super) struct FollowedEndpoints {
    in_force: HashMap<PathBuf, FollowedFile>,
    /// Those that a configuration names which is not in force.
    ahead: HashMap<PathBuf, Followed>,
}

/// A file in force.
#[derive(Clone, Debug)]
struct FollowedFile {
    endpoints: LoadedEndpoints,
    file: Followed,
    /// Why it could not be read or used the last time.
    failure: Option<ListFailure>,
}

/// What came of reading a file again.
pub(super) type Reread = (PathBuf, Result<LoadedEndpoints, String>);

/// One reading of a configuration, as far as its files of endpoints go.
pub(super) struct EndpointsReading<'r> {
    files: &'r mut FollowedEndpoints,
    watches: &'r Watches,
    urgency: Urgency,
    unsettled: usize,
}

// === impl FollowedEndpoints ===

impl FollowedEndpoints {
    /// Follows the files that are in force.
    pub(super) fn new(files: &EndpointsFiles) -> Self {
        let mut followed = Self {
            in_force: HashMap::new(),
            ahead: HashMap::new(),
        };
        followed.follow(files);
        followed
    }

    /// From now on these files are in force. One that was not read again is as fresh, or as stale,
    /// as it was.
    pub(super) fn follow(&mut self, files: &EndpointsFiles) {
        let mut known = std::mem::take(&mut self.in_force);
        for (path, endpoints) in files {
            let same = |known: &FollowedFile| known.endpoints == *endpoints;
            let followed = known.remove(path).filter(same);
            let fresh = || FollowedFile {
                endpoints: endpoints.clone(),
                file: Followed::at(Some(endpoints.stamp)),
                failure: None,
            };
            self.in_force
                .insert(path.clone(), followed.unwrap_or_else(fresh));
        }
        self.ahead.clear();
    }

    /// True when exactly these files are in force, whatever they list.
    pub(super) fn are_of(&self, files: &EndpointsFiles) -> bool {
        files.len() == self.in_force.len()
            && files.keys().all(|path| self.in_force.contains_key(path))
    }

    /// Every name that a file in force names.
    pub(super) fn names(&self) -> HashSet<DnsName> {
        let files = self.in_force.values();
        let locators = files.flat_map(|followed| followed.endpoints.locators());
        locators.filter_map(Locator::name).cloned().collect()
    }

    /// Every file.
    pub(super) fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.in_force.keys().chain(self.ahead.keys())
    }

    /// Reads the files in force that have changed and rest; true when some do not rest yet.
    pub(super) fn look(&mut self, watches: &Watches, gone: Gone) -> (Vec<Reread>, bool) {
        let mut restless = false;
        let mut read = Vec::new();
        for (path, followed) in &mut self.in_force {
            match followed.file.look_while(gone, path, watches) {
                Look::Unchanged => {}
                Look::Restless => restless = true,
                Look::Changed(state) => {
                    followed.file.read = state;
                    let news = followed.read_again(path);
                    read.extend(news.map(|news| (path.clone(), news)));
                }
            }
        }
        (read, restless)
    }

    /// As for user lists: what makes a file unreadable may not be in the file.
    pub(super) fn retry_unreadable(&mut self) {
        for followed in self.in_force.values_mut() {
            if matches!(followed.failure, Some(ListFailure::Unreadable(_))) {
                followed.file.read = None;
            }
        }
    }

    /// The files for one reading of the configuration.
    pub(super) fn reading<'r>(
        &'r mut self,
        watches: &'r Watches,
        urgency: Urgency,
    ) -> EndpointsReading<'r> {
        EndpointsReading {
            files: self,
            watches,
            urgency,
            unsettled: 0,
        }
    }
}

// === impl FollowedFile ===

impl FollowedFile {
    /// What reading it gives; `None` when that is nothing new.
    fn read_again(&mut self, path: &Path) -> Option<Result<LoadedEndpoints, String>> {
        let loaded = load_endpoints(path).and_then(|next| self.endpoints.may_become(next, path));
        let before = std::mem::replace(&mut self.failure, loaded.as_ref().err().cloned());
        let nothing_new = match &loaded {
            Ok(next) => before.is_none() && self.endpoints.hash == next.hash,
            Err(_) => self.failure == before,
        };
        if nothing_new {
            debug!(file = %path.display(), "the file of endpoints was read again; nothing is new");
            return None;
        }
        if let Ok(next) = &loaded {
            self.endpoints = next.clone();
        }
        Some(loaded.map_err(ListFailure::into_reason))
    }

    /// True when what is in force is what the file says now.
    fn is_current(&self, path: &Path) -> bool {
        self.failure.is_none() && self.file.read == stamp(path)
    }
}

// === impl EndpointsReading ===

impl EndpointsReading<'_> {
    /// How many files could not be read because they do not rest.
    pub(super) fn unsettled(&self) -> usize {
        self.unsettled
    }

    /// A file of the configuration.
    pub(super) fn read(&mut self, path: &Path) -> Result<LoadedEndpoints, ListFailure> {
        let read = match self.files.in_force.get(path) {
            Some(known) if self.urgency == Urgency::WhenAtRest || known.is_current(path) => {
                Ok(known.endpoints.clone())
            }
            Some(known) => self
                .read_now(path)
                .and_then(|next| known.endpoints.may_become(next, path)),
            None if self.urgency == Urgency::Now => self.read_now(path),
            None => self.read_ahead(path),
        };
        self.unsettled += usize::from(read.as_ref().err() == Some(&ListFailure::Unsettled));
        read
    }

    fn read_now(&self, path: &Path) -> Result<LoadedEndpoints, ListFailure> {
        if self.watches.is_being_written(path) {
            return Err(ListFailure::Unsettled);
        }
        load_endpoints(path)
    }

    fn read_ahead(&mut self, path: &Path) -> Result<LoadedEndpoints, ListFailure> {
        let ahead = self.files.ahead.entry(path.to_owned());
        let ahead = ahead.or_insert(Followed::at(None));
        match ahead.look(path, self.watches) {
            Look::Restless => Err(ListFailure::Unsettled),
            Look::Unchanged | Look::Changed(_) => load_endpoints(path),
        }
    }
}
