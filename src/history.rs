//! What the configuration file said when it was taken over: its revisions, kept in a directory (`history`).
//!
//! The process that serves only ever adds to them. Putting one back is up to `serin rollback`, which writes the file as
//! an editor would: what is in force is what the file says, also after a rollback. Lists and other files that the
//! configuration names are not kept.

pub mod rollback;

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::task::JoinHandle;
use tracing::warn;

use crate::config::load::Loaded;
use crate::whole_file::{self, Access};

/// Where revisions are kept, and how many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The directory.
    pub directory: PathBuf,
    /// How many; the oldest are deleted.
    pub keep: usize,
}

/// A revision that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revision {
    /// When it was taken over, in milliseconds since 1970.
    pub taken_over_at: u64,
    /// The hash of its text.
    pub hash: u64,
    /// Where it is.
    pub path: PathBuf,
}

/// Keeps what is taken over.
#[derive(Debug, Default)]
pub struct Recorder {
    /// What is being written; a disk that hangs must not take more than one thread.
    writing: Option<JoinHandle<()>>,
}

/// The revisions in a directory, the latest first; none where there is no directory yet.
///
/// # Errors
///
/// A directory that cannot be read.
pub fn revisions(directory: &Path) -> io::Result<Vec<Revision>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut revisions = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            revisions.extend(Revision::at(entry.path()));
        }
    }
    revisions.sort_by_key(|revision| std::cmp::Reverse((revision.taken_over_at, revision.hash)));
    Ok(revisions)
}

/// Keeps a text that was taken over at this time, unless it is what was taken over last, and deletes those that are
/// too old.
fn keep(settings: &Settings, loaded: &Loaded, taken_over_at: u64) -> io::Result<()> {
    let directory = &settings.directory;
    let known = revisions(directory)?;
    if known.first().is_some_and(|last| last.hash == loaded.hash) {
        return Ok(());
    }
    fs::create_dir_all(directory)?;
    // The clock may have been set back.
    let latest = known.first().map(|latest| latest.taken_over_at + 1);
    let taken_over_at = latest.map_or(taken_over_at, |latest| taken_over_at.max(latest));
    let path = directory.join(Revision::file_name(taken_over_at, loaded.hash));
    // Whoever may read the file may read what it said before.
    let file = fs::metadata(&loaded.path);
    let access = file.as_ref().map_or(Access::Ours, Access::As);
    whole_file::replace(&path, loaded.warnings.source.as_bytes(), access)?;
    for old in known.iter().skip(settings.keep.saturating_sub(1)) {
        fs::remove_file(&old.path)?;
    }
    Ok(())
}

// === impl Recorder ===

impl Recorder {
    /// Keeps what was taken over just now, if the configuration says where.
    pub fn record(&mut self, loaded: &Arc<Loaded>, taken_over_at: SystemTime) {
        let Some(settings) = loaded.config.history.clone() else {
            return;
        };
        let directory = settings.directory.display().to_string();
        if self
            .writing
            .as_ref()
            .is_some_and(|writing| !writing.is_finished())
        {
            return warn!(
                directory,
                "a revision is not kept: the one before is still being written"
            );
        }
        let loaded = Arc::clone(loaded);
        let since = taken_over_at.duration_since(SystemTime::UNIX_EPOCH);
        let since = since.unwrap_or_default().as_millis() as u64;
        self.writing = Some(tokio::task::spawn_blocking(move || {
            if let Err(error) = keep(&settings, &loaded, since) {
                warn!(directory, %error, "a revision of the configuration cannot be kept");
            }
        }));
    }
}

// === impl Revision ===

impl Revision {
    /// The revision in this file, if it is one: others are nobody's to list or delete.
    fn at(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let (time, hash) = name.strip_suffix(".yaml")?.split_once('-')?;
        let revision = Self {
            taken_over_at: time.parse().ok()?,
            hash: u64::from_str_radix(hash, 16).ok()?,
            path: PathBuf::new(),
        };
        let is_sound = name == Self::file_name(revision.taken_over_at, revision.hash);
        is_sound.then_some(Self { path, ..revision })
    }

    fn file_name(taken_over_at: u64, hash: u64) -> String {
        format!("{taken_over_at:013}-{hash:016x}.yaml")
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = std::time::Duration::from_millis(self.taken_over_at);
        let at = humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + at);
        write!(f, "{at}  {:016x}", self.hash)
    }
}
