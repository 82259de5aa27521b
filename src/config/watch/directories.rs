//! Watches directories through the kernel, and knows which files are being written to right now.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, CreateKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tracing::{debug, warn};

use crate::config::load::{Stamp, stamp};
use crate::control::Watching;

/// A file that somebody has open for writing counts as unfinished for so long after his last write.
const WRITER_PATIENCE: Duration = Duration::from_secs(10);

/// The directories that the kernel watches for us.
#[derive(Debug)]
pub(super) struct Watches {
    watcher: Option<RecommendedWatcher>,
    /// With the identity that each had when the watch was set.
    directories: HashMap<PathBuf, (u64, u64)>,
    hints: Arc<Notify>,
    writes: Arc<Writes>,
    /// What was last said about it.
    said: Watching,
}

/// Files that were written to and not closed since, by name, with the time of the last write.
///
/// By name alone, because one directory may be known by several paths; a namesake elsewhere that is
/// being written to only delays us.
#[derive(Debug, Default)]
struct Writes(Mutex<HashMap<OsString, Instant>>);

// === impl Watches ===

impl Watches {
    /// Watches nothing yet.
    pub(super) fn new() -> Self {
        let hints = Arc::new(Notify::new());
        let writes = Arc::new(Writes::default());
        let (notify, note) = (Arc::clone(&hints), Arc::clone(&writes));
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else { return };
            note.note(&event);
            if is_change(event.kind) {
                notify.notify_one();
            }
        });
        let watcher = watcher
            .inspect_err(|error| warn!(%error, "files cannot be watched, only polled"))
            .ok();
        Self {
            watcher,
            directories: HashMap::new(),
            hints,
            writes,
            said: Watching::Events,
        }
    }

    /// Told when something has happened in one of the directories.
    pub(super) fn hints(&self) -> Arc<Notify> {
        Arc::clone(&self.hints)
    }

    /// True while somebody has the file open and writes to it, as far as the kernel has told.
    pub(super) fn is_being_written(&self, path: &Path) -> bool {
        path.file_name()
            .is_some_and(|name| self.writes.contains(name))
    }

    /// Watches exactly these directories; says so when watching begins to fail, or to work.
    pub(super) fn follow(&mut self, wanted: &HashSet<PathBuf>) -> Option<Watching> {
        let now = if self.set(wanted) {
            Watching::Events
        } else {
            Watching::Polling
        };
        let before = std::mem::replace(&mut self.said, now);
        (now != before).then_some(now)
    }

    /// Watches exactly these directories; false when not all of them can be.
    pub(super) fn set(&mut self, wanted: &HashSet<PathBuf>) -> bool {
        let Some(watcher) = &mut self.watcher else {
            return false;
        };
        self.directories.retain(|directory, identity| {
            // A directory that was deleted and made again is another one, which nobody watches yet.
            let is_same = stamp(directory).map(Stamp::identity) == Some(*identity);
            let keep = wanted.contains(directory) && is_same;
            if !keep {
                // It may be gone already, and its watch with it.
                let _ = watcher.unwatch(directory);
            }
            keep
        });
        let mut all = true;
        for directory in wanted {
            let Some(identity) = stamp(directory).map(Stamp::identity) else {
                continue;
            };
            if self.directories.contains_key(directory) {
                continue;
            }
            match watcher.watch(directory, RecursiveMode::NonRecursive) {
                Ok(()) => drop(self.directories.insert(directory.clone(), identity)),
                Err(error) => {
                    all = false;
                    debug!(%error, directory = %directory.display(), "cannot be watched");
                }
            }
        }
        all
    }
}

// === impl Writes ===

impl Writes {
    fn note(&self, event: &notify::Event) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for name in event.paths.iter().filter_map(|path| path.file_name()) {
            match event.kind {
                EventKind::Modify(notify::event::ModifyKind::Data(_))
                | EventKind::Create(CreateKind::File) => {
                    open.insert(name.to_owned(), Instant::now());
                }
                // Closed, renamed, removed: whoever wrote has finished with this name.
                EventKind::Access(AccessKind::Close(AccessMode::Write))
                | EventKind::Modify(notify::event::ModifyKind::Name(_))
                | EventKind::Remove(_) => {
                    open.remove(name);
                }
                _ => {}
            }
        }
        open.retain(|_, last| last.elapsed() < WRITER_PATIENCE);
    }

    fn contains(&self, name: &OsStr) -> bool {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.get(name)
            .is_some_and(|last| last.elapsed() < WRITER_PATIENCE)
    }
}

/// The directories in which something changes when the file at `path` does: its own, and that of
/// every link on the way to it.
pub(super) fn directories_of(path: &Path) -> Vec<PathBuf> {
    const LONGEST_CHAIN: usize = 16;
    let mut directories = Vec::new();
    let mut current = path.to_owned();
    for _ in 0..LONGEST_CHAIN {
        let parent = parent_of(&current);
        directories.extend(std::fs::canonicalize(&parent).ok());
        directories.extend(linked_ancestors(&parent));
        match std::fs::read_link(&current) {
            Ok(target) => current = parent.join(target),
            Err(_) => break,
        }
        directories.push(parent);
    }
    directories
}

/// True for a file that is a mount point: what is mounted is the file as it was then, and replacing
/// it elsewhere does not show (in Kubernetes, a `subPath` mount).
pub(super) fn is_mounted_by_itself(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let Ok(path) = std::fs::canonicalize(path) else {
        return false;
    };
    // The fifth field is the mount point (proc_pid_mountinfo(5)).
    mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .any(|point| Path::new(point) == path)
}

/// The directories that hold a link among the ancestors: `releases` for `releases/current/etc`.
fn linked_ancestors(directory: &Path) -> Vec<PathBuf> {
    directory
        .ancestors()
        .filter(|ancestor| ancestor.is_symlink())
        .map(parent_of)
        .collect()
}

/// Reading a file is an event as well: counting it as a change would be a loop.
fn is_change(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}

fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
