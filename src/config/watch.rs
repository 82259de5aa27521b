//! Notices that files have changed, reads them again, and hands the outcome to
//! [`control`](crate::control).
//!
//! Events of the kernel are hints only; what counts is whether the state of a file differs from the
//! one last read. So the same look is taken after an event and every few seconds, which covers
//! network file systems, bind mounts and lost events. Watched are directories, never files: an
//! editor's rename and the `..data` swap of a Kubernetes volume replace the file that a watch would
//! sit on.
//!
//! A file is read when it rests: its state is the same at two looks, and nobody is known to have it
//! open for writing. What is torn or empty means "not yet".

mod directories;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::control::Change;
use crate::snapshot::Revision;

use super::load::{ListFailure, Lists, Loaded, LoadedList, Stamp, load, load_list, stamp};
use super::{ListSource, Problems};

use directories::{Watches, directories_of, is_mounted_by_itself};

/// How often files are looked at without any event.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// How long a file must have rested before it is read: an editor writes in several steps.
const REST: Duration = Duration::from_millis(200);

/// The niceness of the threads that read user lists: about a tenth of a core while the workers want
/// all of it. At 19 it would be a hundredth, and a list would wait for minutes on a busy machine.
const LOW_PRIORITY: i32 = 5;

/// A request to read everything again, now.
pub type ReloadRequest = oneshot::Sender<Result<Revision, Problems>>;

/// The job that keeps the running configuration in step with the files.
#[derive(Debug)]
pub struct Reloader {
    path: PathBuf,
    changes: mpsc::Sender<Change>,
    requests: mpsc::Receiver<ReloadRequest>,
    /// The hash of the last configuration that could be used.
    hash: u64,
    /// The configuration file and the keys it names.
    files: HashMap<PathBuf, Followed>,
    /// What was last found wrong; said once only, however often it is looked at.
    refused: Option<String>,
    /// The lists that are in force.
    lists: Lists,
    /// Lists that the file names anew, as they were when it was last read. It is taken over only
    /// when they rest: what was torn would be in force until it is read again.
    awaited: Lists,
    list_files: HashMap<ListSource, FollowedList>,
    loading: JoinSet<Reading>,
    watches: Watches,
    /// Some file has changed and does not rest yet: look again soon.
    restless: bool,
}

/// A file that is followed.
#[derive(Clone, Copy, Debug)]
struct Followed {
    /// Its state when it was last read.
    read: Option<Stamp>,
    /// Its state when it was last looked at.
    seen: Option<Stamp>,
}

/// What a look at a file found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Unchanged,
    /// It has changed and may go on changing.
    Restless,
    /// It has changed, and rests in this state.
    Changed(Option<Stamp>),
}

/// The file of a list that is followed.
#[derive(Clone, Debug)]
struct FollowedList {
    file: Followed,
    /// It is being read; another reading may not begin, or the older could end last.
    loading: bool,
    /// Why it could not be read or used the last time.
    failure: Option<ListFailure>,
}

/// What reading a list gave, and the state of the file when that began.
#[derive(Debug)]
struct Reading {
    source: ListSource,
    state: Option<Stamp>,
    loaded: Result<LoadedList, ListFailure>,
}

// === impl Reloader ===

impl Reloader {
    /// A job for the files of the configuration that the process started with.
    pub fn new(
        loaded: &Loaded,
        changes: mpsc::Sender<Change>,
        requests: mpsc::Receiver<ReloadRequest>,
    ) -> Self {
        let mut reloader = Self {
            path: loaded.path.clone(),
            changes,
            requests,
            hash: loaded.hash,
            files: HashMap::new(),
            refused: None,
            lists: Lists::new(),
            awaited: Lists::new(),
            list_files: HashMap::new(),
            loading: JoinSet::new(),
            watches: Watches::new(),
            restless: false,
        };
        reloader.remember(loaded);
        // From now on, not from the first turn of the job: what happens in between would go unseen.
        reloader.watches.set(&reloader.directories());
        reloader
    }

    /// Runs until nobody can ask for a reload any more.
    pub async fn run(mut self) {
        if is_mounted_by_itself(&self.path) {
            warn!(
                file = %self.path.display(),
                "the file is mounted by itself (subPath?), so changes may never arrive: \
                 mount its directory"
            );
        }
        let mut poll = tokio::time::interval(POLL_INTERVAL);
        let hints = self.watches.hints();
        loop {
            self.watch().await;
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(reply) => self.reload_now(reply).await,
                    None => return,
                },
                Some(Ok(reading)) = self.loading.join_next(), if !self.loading.is_empty() => {
                    self.list_read(reading).await;
                    self.look().await;
                }
                () = hints.notified() => self.look().await,
                () = tokio::time::sleep(REST), if self.restless => self.look().await,
                _ = poll.tick() => {
                    self.retry_unreadable_lists();
                    self.look().await;
                }
            }
        }
    }

    /// Reads whatever differs from what was last read and rests.
    async fn look(&mut self) {
        self.restless = false;
        let watches = &self.watches;
        let looks = self
            .files
            .iter_mut()
            .map(|(path, file)| file.look(path, watches));
        let (mut changed, mut restless) = (false, false);
        for look in looks {
            changed |= matches!(look, Look::Changed(_));
            restless |= look == Look::Restless;
        }
        if restless {
            self.restless = true;
        } else if changed || self.refused.is_some() || !self.awaited.is_empty() {
            let mut known = self.lists.clone();
            known.extend(self.awaited.clone());
            known.retain(|source, list| {
                self.lists.contains_key(source) || stamp(&source.path) == Some(list.stamp)
            });
            self.reload(known, None).await;
        }
        self.look_at_lists();
    }

    fn look_at_lists(&mut self) {
        for (source, list) in self.list_files.iter_mut().filter(|(_, list)| !list.loading) {
            match list.file.look(&source.path, &self.watches) {
                Look::Unchanged => {}
                Look::Restless => self.restless = true,
                Look::Changed(state) => {
                    list.file.read = state;
                    list.loading = true;
                    self.loading
                        .spawn(read_in_background(source.clone(), state));
                }
            }
        }
    }

    /// A list may be unreadable for a reason that is not in the file (permissions of a directory,
    /// no file descriptors), so that nothing about the file tells when to try again.
    fn retry_unreadable_lists(&mut self) {
        for list in self.list_files.values_mut().filter(|list| !list.loading) {
            if matches!(list.failure, Some(ListFailure::Unreadable(_))) && list.file.read.is_some()
            {
                list.file.read = None;
            }
        }
    }

    /// Reads everything again because somebody asked; lists that changed, or could not be used, are
    /// part of it.
    async fn reload_now(&mut self, reply: ReloadRequest) {
        let is_current = |source: &ListSource| {
            let list = self.list_files.get(source);
            list.is_some_and(|list| list.failure.is_none() && list.file.read == stamp(&source.path))
        };
        let mut lists = self.lists.clone();
        lists.retain(|source, _| is_current(source));
        self.reload(lists, Some(reply)).await;
    }

    async fn reload(&mut self, lists: Lists, reply: Option<ReloadRequest>) {
        let asked = reply.is_some();
        let path = self.path.clone();
        // A file that cannot be used is read again only when it changes, or with the next poll.
        let now = stamp(&path);
        self.files.insert(
            path.clone(),
            Followed {
                read: now,
                seen: now,
            },
        );
        let Ok(loaded) = tokio::task::spawn_blocking(move || load(&path, &lists)).await else {
            return;
        };
        match &loaded {
            Ok(loaded) if !asked && self.refused.is_none() && self.says_the_same(loaded) => {
                debug!("the configuration file was touched but not changed");
                self.remember(loaded);
                return;
            }
            Ok(loaded) if !asked && !self.new_lists_rest(loaded) => {
                self.restless = true;
                return;
            }
            Ok(loaded) => self.remember(loaded),
            Err(problems) => {
                self.awaited.clear();
                let refused = Some(problems.to_string());
                if !asked && self.refused == refused {
                    return;
                }
                self.refused = refused;
            }
        }
        self.apply(loaded.map(Box::new), reply).await;
    }

    /// Hands a configuration to control. One that control refuses (an address in use) is tried
    /// again as well.
    async fn apply(&mut self, loaded: Result<Box<Loaded>, Problems>, reply: Option<ReloadRequest>) {
        let (sender, outcome) = oneshot::channel();
        let change = Change::Config {
            loaded,
            reply: Some(sender),
        };
        if self.changes.send(change).await.is_err() {
            return;
        }
        let Ok(outcome) = outcome.await else {
            return;
        };
        self.refused = outcome.as_ref().err().map(ToString::to_string);
        if let Some(reply) = reply {
            // Whoever asked may have gone.
            let _ = reply.send(outcome);
        }
    }

    /// True when nothing that was read differs: the text, the keys, and where the lists are.
    fn says_the_same(&self, loaded: &Loaded) -> bool {
        let same_lists = loaded.lists.len() == self.lists.len()
            && loaded
                .lists
                .keys()
                .all(|source| self.lists.contains_key(source));
        let same_keys = loaded.files.iter().all(|(path, state)| {
            *path == self.path || self.files.get(path).is_some_and(|file| file.read == *state)
        });
        loaded.hash == self.hash && same_lists && same_keys
    }

    /// True when each list that is not in force yet was the same at two looks, and nobody is known
    /// to write to it.
    fn new_lists_rest(&mut self, loaded: &Loaded) -> bool {
        let is_new = |source: &ListSource| !self.lists.contains_key(source);
        let new = loaded.lists.iter().filter(|(source, _)| is_new(source));
        let new: Lists = new.map(|(at, list)| (at.clone(), list.clone())).collect();
        let before = std::mem::replace(&mut self.awaited, new);
        self.awaited.iter().all(|(source, list)| {
            before.get(source).map(|before| before.stamp) == Some(list.stamp)
                && !self.watches.is_being_written(&source.path)
        })
    }

    fn remember(&mut self, loaded: &Loaded) {
        self.hash = loaded.hash;
        self.awaited.clear();
        self.refused = None;
        let file = |(path, state): &(PathBuf, Option<Stamp>)| (path.clone(), Followed::at(*state));
        self.files = loaded.files.iter().map(file).collect();
        let mut known = std::mem::take(&mut self.list_files);
        for (source, list) in &loaded.lists {
            let before = self.lists.get(source);
            let kept = before.is_some_and(|before| Arc::ptr_eq(&before.list, &list.list));
            // A list that was not read again is as fresh, or as stale, as it was.
            let followed = known.remove(source).filter(|_| kept);
            let fresh = || FollowedList {
                file: Followed::at(Some(list.stamp)),
                loading: false,
                failure: None,
            };
            self.list_files
                .insert(source.clone(), followed.unwrap_or_else(fresh));
        }
        self.lists.clone_from(&loaded.lists);
    }

    async fn list_read(&mut self, reading: Reading) {
        let Reading {
            source,
            state,
            loaded,
        } = reading;
        let Some(followed) = self.list_files.get_mut(&source) else {
            return;
        };
        if !followed.loading || followed.file.read != state {
            debug!(file = %source.path.display(), "a reload has read the list meanwhile");
            return;
        }
        followed.loading = false;
        let known = self.lists.get(&source);
        let loaded = loaded.and_then(|list| match known {
            Some(known) if list.stamp.is_empty() && !known.list.is_empty() => {
                Err(ListFailure::Unusable(format!(
                    "is not emptied: `{}` has no content at all; leave a comment line in it",
                    source.path.display()
                )))
            }
            _ => Ok(list),
        });
        let failure = loaded.as_ref().err().cloned();
        let was_failing = followed.failure.is_some();
        let nothing_new = match &loaded {
            Ok(list) => !was_failing && known.is_some_and(|known| known.hash == list.hash),
            Err(failure) => followed.failure.as_ref() == Some(failure),
        };
        followed.failure = failure;
        if nothing_new {
            debug!(file = %source.path.display(), "the user list was read again; nothing is new");
            return;
        }
        if let Ok(list) = &loaded {
            self.lists.insert(source.clone(), list.clone());
        }
        let loaded = loaded.map_err(ListFailure::into_reason);
        // Nobody listens only while the process ends.
        let _ = self.changes.send(Change::UserList { source, loaded }).await;
    }

    fn directories(&self) -> HashSet<PathBuf> {
        let lists = self.list_files.keys().map(|source| &source.path);
        let paths = self.files.keys().chain(lists);
        paths.flat_map(|path| directories_of(path)).collect()
    }

    async fn watch(&mut self) {
        let directories = self.directories();
        if let Some(watching) = self.watches.follow(&directories) {
            // Nobody listens only while the process ends.
            let _ = self.changes.send(Change::Watching(watching)).await;
        }
    }
}

// === impl Followed ===

impl Followed {
    fn at(state: Option<Stamp>) -> Self {
        Self {
            read: state,
            seen: state,
        }
    }

    fn look(&mut self, path: &Path, watches: &Watches) -> Look {
        let now = stamp(path);
        let before = std::mem::replace(&mut self.seen, now);
        if now == self.read {
            Look::Unchanged
        } else if now != before || watches.is_being_written(path) {
            Look::Restless
        } else {
            Look::Changed(now)
        }
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
        let _ = sender.send(load_list(&reading));
    };
    let started = std::thread::Builder::new()
        .name("serin-load".into())
        .spawn(job);
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
