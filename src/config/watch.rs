//! Notices that files have changed, reads them again, and hands the outcome to
//! [`control`](crate::control).
//!
//! Events of the kernel are hints only; what counts is whether the state of a file differs from the
//! one last read. So the same look is taken after an event and every few seconds, which covers
//! network file systems, bind mounts and lost events. Watched are directories, never files: an
//! editor's rename and the `..data` swap of a Kubernetes volume replace the file that a watch would
//! sit on.
//!
//! A configuration, or a file of endpoints, that names a host anew waits until that is resolved or
//! cannot be in time: else requests would find no endpoint meanwhile.
//!
//! A file is read when it rests: its state is the same at two looks, and nobody is known to have it
//! open for writing. What is torn or empty means "not yet".
//!
//! The job has a thread of its own, where looking and reading may block: a network mount that hangs
//! must not hold up probes, scrapes or the end of the process.

mod directories;
mod endpoints;
mod lists;

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tracing::{debug, info, warn};

use crate::control::endpoints::{names_in, names_of};
use crate::control::{Change, Occasion};
use crate::discovery::resolver::resolve_all;
use crate::discovery::{DnsName, Locator, Names, Settings};
use crate::snapshot::Revision;

use super::Problems;
use super::endpoints_file::LoadedEndpoints;
use super::load::{Loaded, Readers, Stamp, load_with, stamp};

use directories::{Watches, directories_of, is_mounted_by_itself};
use endpoints::{FollowedEndpoints, Reread};
use lists::{ListFiles, Urgency};

/// How often files are looked at without any event.
pub const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// How long a file must have rested before it is read: an editor writes in several steps.
const REST: Duration = Duration::from_millis(200);

/// How long events gather before a look is taken at what they hint at.
const GATHERING: Duration = Duration::from_millis(20);

/// A request to read everything again, now.
pub type ReloadRequest = oneshot::Sender<Result<Revision, Problems>>;

/// The job that keeps the running configuration in step with the files.
#[derive(Debug)]
pub struct Reloader {
    path: PathBuf,
    poll: Duration,
    changes: mpsc::Sender<Change>,
    requests: mpsc::Receiver<ReloadRequest>,
    /// The hash of the configuration in force.
    hash: u64,
    /// The configuration file and the keys it names.
    files: HashMap<PathBuf, Followed>,
    lists: ListFiles,
    endpoints: FollowedEndpoints,
    /// How names of endpoints are resolved.
    dns: Settings,
    /// Those that the configuration in force names.
    in_config: HashSet<DnsName>,
    /// Those, and what files of endpoints name: they are resolved and followed.
    names: HashSet<DnsName>,
    standing: Standing,
    watches: Watches,
    /// Some file has changed and does not rest yet: look again soon.
    restless: bool,
}

/// What is tried again although no file of it has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Retry {
    /// A configuration that waits for lists.
    Awaited,
    /// A refused one as well: an address or a log may be free now. Only with the poll, since events
    /// may come by the hundred: of an access log in the same directory, for one.
    Refused,
}

/// How what the files say stands to what is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    /// It is the same.
    InForce,
    /// It was refused. What was found wrong is kept so as to be said only once, however
    /// often it is looked at.
    Refused(String),
    /// It will be in force when the lists that it names anew rest.
    Awaiting,
}

/// Why everything is read again.
enum Cause {
    /// A file has changed.
    Noticed,
    /// Somebody asked for it, and is told what becomes of it.
    Asked(ReloadRequest),
}

/// What a file means that is not there any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    /// It is missing.
    Missing,
    /// Perhaps nothing: a configuration is on its way, which may name another one. When a Kubernetes
    /// volume is updated, all files of its last generation are gone.
    MayBeReplaced,
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

// === impl Reloader ===

impl Reloader {
    /// A job for the files of the configuration that the process started with, which looks at them
    /// every `poll` whatever events tell.
    pub fn new(
        loaded: &Loaded,
        poll: Duration,
        changes: mpsc::Sender<Change>,
        requests: mpsc::Receiver<ReloadRequest>,
    ) -> Self {
        let mut reloader = Self {
            path: loaded.path.clone(),
            poll,
            changes,
            requests,
            hash: loaded.hash,
            files: files_of(loaded),
            lists: ListFiles::new(&loaded.lists),
            endpoints: FollowedEndpoints::new(&loaded.endpoints_files),
            dns: loaded.config.dns.clone(),
            in_config: names_in(&loaded.config),
            names: names_of(loaded),
            standing: Standing::InForce,
            watches: Watches::new(),
            restless: false,
        };
        // From now on, not from the first turn of the job: what happens in between would go unseen.
        reloader.watches.set(&reloader.directories());
        reloader
    }

    /// Runs on a thread of its own until nobody can ask for a reload any more. Nobody waits for its
    /// end, since it may hang in a file system.
    ///
    /// # Errors
    ///
    /// When the operating system gives no thread or no reactor.
    pub fn start(self) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let run = move || runtime.block_on(self.run());
        thread::Builder::new()
            .name("serin-reload".into())
            .spawn(run)
            .map(drop)
    }

    async fn run(mut self) {
        if is_mounted_by_itself(&self.path) {
            warn!(
                file = %self.path.display(),
                "the file is mounted by itself (subPath?), so changes may never arrive: \
                 mount its directory"
            );
        }
        let mut poll = tokio::time::interval(self.poll);
        let hints = self.watches.hints();
        loop {
            self.watch().await;
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(reply) => self.reload(Cause::Asked(reply)).await,
                    None => return,
                },
                reading = self.lists.next_reading() => {
                    let change = self.lists.note(reading);
                    self.send(change).await;
                    self.look(Retry::Awaited).await;
                }
                () = hints.notified() => {
                    tokio::time::sleep(GATHERING).await;
                    self.look(Retry::Awaited).await;
                }
                () = tokio::time::sleep(REST), if self.restless => {
                    self.look(Retry::Awaited).await;
                }
                _ = poll.tick() => {
                    self.lists.retry_unreadable();
                    self.endpoints.retry_unreadable();
                    self.look(Retry::Refused).await;
                }
            }
        }
    }

    /// Reads whatever differs from what was last read and rests.
    async fn look(&mut self, retry: Retry) {
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
        } else if changed || retry.is_due(&self.standing) {
            self.reload(Cause::Noticed).await;
        }
        let gone = if restless || self.standing == Standing::Awaiting {
            Gone::MayBeReplaced
        } else {
            Gone::Missing
        };
        self.restless |= self.lists.look(&self.watches, gone);
        let (read, restless) = self.endpoints.look(&self.watches, gone);
        self.restless |= restless;
        if read.is_empty() {
            return;
        }
        for read in read {
            self.move_endpoints(read).await;
        }
        // A name that is gone from all files is new when it comes again.
        let in_files = self.endpoints.names();
        self.names = self.in_config.union(&in_files).cloned().collect();
    }

    /// Hands a file of endpoints that was read again to control.
    async fn move_endpoints(&mut self, (path, loaded): Reread) {
        let locators = loaded.iter().flat_map(LoadedEndpoints::locators);
        let named: HashSet<DnsName> = locators.filter_map(Locator::name).cloned().collect();
        let names = resolve_all(&self.dns, named.difference(&self.names).cloned()).await;
        self.names.extend(named);
        self.send(Some(Change::EndpointsFile {
            path,
            loaded,
            names,
        }))
        .await;
    }

    /// Reads everything again, and hands it to control.
    async fn reload(&mut self, cause: Cause) {
        // A file that cannot be used is read again only when it changes, or with the next poll.
        self.files
            .insert(self.path.clone(), Followed::at(stamp(&self.path)));
        let urgency = match cause {
            Cause::Noticed => Urgency::WhenAtRest,
            Cause::Asked(_) => Urgency::Now,
        };
        let mut lists = self.lists.reading(&self.watches, urgency);
        let mut endpoints = self.endpoints.reading(&self.watches, urgency);
        let mut readers = Readers {
            list: &mut |source| lists.read(source),
            endpoints: &mut |path| endpoints.read(path),
        };
        let loaded = load_with(&self.path, &mut readers);
        let unsettled = lists.unsettled() + endpoints.unsettled();
        match (&loaded, &cause) {
            (Ok(loaded), Cause::Noticed)
                if self.standing == Standing::InForce && self.says_the_same(loaded) =>
            {
                debug!("the configuration file was touched but not changed");
                self.remember(files_of(loaded), loaded);
            }
            // Nothing else is wrong with it.
            (Err(problems), Cause::Noticed) if unsettled > 0 && problems.errors() == unsettled => {
                if self.standing != Standing::Awaiting {
                    info!("the configuration waits for files that are being written: {problems}");
                }
                self.standing = Standing::Awaiting;
                self.restless = true;
            }
            (Err(problems), Cause::Noticed)
                if self.standing == Standing::Refused(problems.to_string()) => {}
            _ => self.apply(loaded, cause).await,
        }
    }

    /// Hands a configuration to control, which may refuse it as well (an address in use); only then
    /// is it in force, and followed.
    async fn apply(&mut self, loaded: Result<Loaded, Problems>, cause: Cause) {
        let (sender, outcome) = oneshot::channel();
        let followed = loaded.as_ref().ok().cloned();
        let names = match &loaded {
            Ok(loaded) => {
                let named = names_of(loaded);
                let new = named.difference(&self.names).cloned();
                resolve_all(&loaded.config.dns, new).await
            }
            Err(_) => Names::new(),
        };
        let occasion = match (&cause, &self.standing) {
            (Cause::Asked(_), _) => Occasion::Asked,
            (Cause::Noticed, Standing::Refused(_)) => Occasion::Retried,
            (Cause::Noticed, _) => Occasion::Noticed,
        };
        self.send(Some(Change::Config {
            loaded: loaded.map(Box::new),
            names,
            occasion,
            reply: Some(sender),
        }))
        .await;
        // Without an answer the process ends.
        let Ok(outcome) = outcome.await else {
            return;
        };
        match (&outcome, followed) {
            (Ok(_), Some(loaded)) => self.remember(files_of(&loaded), &loaded),
            (Err(problems), _) => self.standing = Standing::Refused(problems.to_string()),
            (Ok(_), None) => {}
        }
        if let Cause::Asked(reply) = cause {
            // Whoever asked may have gone.
            let _ = reply.send(outcome);
        }
    }

    /// True when nothing that was read differs: the text, the keys, and where the lists are.
    fn says_the_same(&self, loaded: &Loaded) -> bool {
        let same_keys = loaded.files.iter().all(|(path, state)| {
            *path == self.path || self.files.get(path).is_some_and(|file| file.read == *state)
        });
        loaded.hash == self.hash
            && same_keys
            && self.lists.are_of(&loaded.lists)
            && self.endpoints.are_of(&loaded.endpoints_files)
    }

    fn remember(&mut self, files: HashMap<PathBuf, Followed>, loaded: &Loaded) {
        self.hash = loaded.hash;
        self.standing = Standing::InForce;
        self.files = files;
        self.lists.follow(&loaded.lists);
        self.endpoints.follow(&loaded.endpoints_files);
        self.dns = loaded.config.dns.clone();
        self.in_config = names_in(&loaded.config);
        self.names = names_of(loaded);
    }

    async fn send(&self, change: Option<Change>) {
        if let Some(change) = change {
            // Nobody listens only while the process ends.
            let _ = self.changes.send(change).await;
        }
    }

    fn directories(&self) -> HashSet<PathBuf> {
        let paths = self.files.keys().chain(self.lists.paths());
        let paths = paths.chain(self.endpoints.paths());
        paths.flat_map(|path| directories_of(path)).collect()
    }

    async fn watch(&mut self) {
        let directories = self.directories();
        let watching = self.watches.follow(&directories);
        self.send(watching.map(Change::Watching)).await;
    }
}

// === impl Retry ===

impl Retry {
    fn is_due(self, standing: &Standing) -> bool {
        match standing {
            Standing::InForce => false,
            Standing::Awaiting => true,
            Standing::Refused(_) => self == Self::Refused,
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

    /// As `look`, for a file that the configuration in force names.
    fn look_while(&mut self, gone: Gone, path: &Path, watches: &Watches) -> Look {
        match self.look(path, watches) {
            Look::Changed(None) if gone == Gone::MayBeReplaced => Look::Restless,
            look => look,
        }
    }
}

fn files_of(loaded: &Loaded) -> HashMap<PathBuf, Followed> {
    let file = |(path, state): &(PathBuf, Option<Stamp>)| (path.clone(), Followed::at(*state));
    loaded.files.iter().map(file).collect()
}
