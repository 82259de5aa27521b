//! Reading configuration and user lists from disk.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use xxhash_rust::xxh3::xxh3_64;

use crate::routing::UserList;
use crate::routing::user_list::{Pause, no_text};
use crate::telemetry::access_log::Output;
use crate::tls;

use super::check::{Checked, Surroundings, check};
use super::decode::decode;
use super::document::{Node, Path, Span};
use super::endpoints_file::{
    EndpointsFiles, LoadedEndpoints, load_endpoints, load_endpoints_files,
};
use super::problem::{Problem, Problems};
use super::{Config, ConfigFile, ListSource, UserList as UserListConfig};

/// The largest file that is read but lists, in bytes; 100,000 routes take about 20 MiB.
const LARGEST_FILE: u64 = 256 << 20;

/// A configuration as it was read, with everything it refers to.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The file as the operator named it.
    pub path: PathBuf,
    /// The file's shape, for those who want to see it.
    pub file: Arc<ConfigFile>,
    /// What it says.
    pub config: Config,
    /// What is questionable about it.
    pub warnings: Problems,
    /// The hash of its text.
    pub hash: u64,
    /// Its user lists.
    pub lists: Lists,
    /// Its files of endpoints.
    pub endpoints_files: EndpointsFiles,
    /// The files that were read for it but those, each with its state before it was read.
    pub files: Vec<(PathBuf, Option<Stamp>)>,
}

/// How the lists of a configuration are come by: [`load_list`], or somebody who knows better.
pub type ReadList<'r> = &'r mut dyn FnMut(&ListSource) -> Result<LoadedList, ListFailure>;

/// How files of endpoints are come by: [`load_endpoints`], or somebody who knows better.
pub type ReadEndpoints<'r> = &'r mut dyn FnMut(&FilePath) -> Result<LoadedEndpoints, ListFailure>;

/// How what a configuration names and is followed on its own is come by.
#[allow(missing_debug_implementations, reason = "it holds functions alone")]
pub struct Readers<'r> {
    /// User lists.
    pub list: ReadList<'r>,
    /// Files of endpoints.
    pub endpoints: ReadEndpoints<'r>,
}

/// User lists by where they come from.
pub type Lists = HashMap<ListSource, LoadedList>;

/// A user list as it was read.
#[derive(Clone, Debug)]
pub struct LoadedList {
    /// The ids.
    pub list: Arc<UserList>,
    /// The hash of the file's content.
    pub hash: u64,
    /// The state of the file when it was read.
    pub stamp: Stamp,
    /// When it was read.
    pub loaded_at: SystemTime,
}

/// Why a user list, or a file of endpoints, is not there; the reasons complete "user list `NAME` ..."
/// and "its file of endpoints ...".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListFailure {
    /// The file cannot be read now; trying again may help.
    Unreadable(String),
    /// The file says something that is no list.
    Unusable(String),
    /// Somebody is writing to the file.
    Unsettled,
}

/// What tells one state of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Loads the configuration at `path` and every file it names.
///
/// # Errors
///
/// Every problem there is, warnings among them, when one of them is an error.
pub fn load(path: &FilePath, read_list: ReadList<'_>) -> Result<Loaded, Problems> {
    let endpoints = &mut load_endpoints;
    load_with(
        path,
        &mut Readers {
            list: read_list,
            endpoints,
        },
    )
}

/// As [`load`], by somebody who knows better how to come by files of endpoints as well.
///
/// # Errors
///
/// As [`load`].
pub fn load_with(path: &FilePath, readers: &mut Readers<'_>) -> Result<Loaded, Problems> {
    let directory = generation_directory(path);
    let loaded = load_generation(&directory, path, readers);
    if loaded.is_err() && generation_directory(path) != directory {
        // The volume was swapped meanwhile, and what was read may have been half gone.
        return load_generation(&generation_directory(path), path, readers);
    }
    loaded
}

fn load_generation(
    directory: &FilePath,
    path: &FilePath,
    readers: &mut Readers<'_>,
) -> Result<Loaded, Problems> {
    // In a Kubernetes volume the file is read from the same generation as what it names.
    let in_generation = path
        .file_name()
        .map(|name| directory.join(name))
        .filter(|file| file.exists());
    let (text, state) = read_settled(in_generation.as_deref().unwrap_or(path), LARGEST_FILE)
        .map_err(|error| Problems::whole_file(path, format!("the file {}", cannot_read(&error))))?;
    let text = as_text(text).map_err(|reason| Problems::whole_file(path, reason))?;
    let mut loaded = load_in(directory, path, &text, readers)?;
    loaded.files.push((path.to_owned(), Some(state)));
    Ok(loaded)
}

/// As [`load`], with the text at hand; `path` names it in problems and is what file names in it are
/// relative to.
///
/// # Errors
///
/// As [`load`].
pub fn load_text(path: &FilePath, text: &str, read_list: ReadList<'_>) -> Result<Loaded, Problems> {
    let endpoints = &mut load_endpoints;
    let readers = &mut Readers {
        list: read_list,
        endpoints,
    };
    load_in(&generation_directory(path), path, text, readers)
}

fn load_in(
    directory: &FilePath,
    path: &FilePath,
    text: &str,
    readers: &mut Readers<'_>,
) -> Result<Loaded, Problems> {
    let mut document = Node::parse(text)
        .map_err(|error| Problems::new(path, text, vec![syntax_problem(text, &error)]))?;
    if document.is_empty() {
        return Err(Problems::whole_file(path, "the file is empty"));
    }
    let (file, problems) = decode(&mut document);
    let Some(file) = file else {
        return Err(Problems::new(path, text, problems));
    };
    let files = std::cell::RefCell::new(Vec::new());
    // They take some milliseconds to read, and most configurations do not need them.
    let system_authorities = std::cell::LazyCell::new(tls::system_authorities);
    let around = Surroundings {
        directory,
        home: home(path),
        read: &|name| {
            files.borrow_mut().push((name.to_owned(), stamp(name)));
            read_settled(name, LARGEST_FILE)
                .map(|(content, _)| content)
                .map_err(|error| cannot_read(&error))
        },
        system_authorities: &|| system_authorities.clone(),
        variable: &|name| std::env::var(name).ok().filter(|value| !value.is_empty()),
        now: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
    };
    let Checked {
        config,
        user_lists,
        endpoints_files,
        mut problems,
    } = check(&file, &document, &around, problems);
    let lists = load_lists(&user_lists, readers.list, &document, &mut problems);
    let read = &mut *readers.endpoints;
    let endpoints_files = load_endpoints_files(&endpoints_files, read, &document, &mut problems);
    let files = files.into_inner();
    if let Some(config) = &config {
        let read = files_read(&files, &lists, &endpoints_files).chain([path]);
        problems.extend(spoilt_by_state(config, read, &document));
    }
    let warnings = Problems::new(path, text, problems);
    match config {
        Some(config) if warnings.errors() == 0 => Ok(Loaded {
            path: path.to_owned(),
            file: Arc::new(file),
            config,
            hash: xxh3_64(text.as_bytes()),
            warnings,
            lists,
            endpoints_files,
            files,
        }),
        _ => Err(warnings),
    }
}

/// Reads a user list.
///
/// # Errors
///
/// Why it cannot be used.
pub fn load_list(source: &ListSource) -> Result<LoadedList, ListFailure> {
    load_list_with_pauses(source, &mut || ())
}

/// As [`load_list`], with a pause now and then.
///
/// # Errors
///
/// As `load_list`.
pub fn load_list_with_pauses(
    source: &ListSource,
    pause: Pause<'_>,
) -> Result<LoadedList, ListFailure> {
    let shown = source.path.display();
    let (content, stamp) = read_settled(&source.path, UserList::LARGEST_FILE)
        .map_err(|error| ListFailure::Unreadable(format!("cannot be read: `{shown}`: {error}")))?;
    let hash = xxh3_64(&content);
    let list = UserList::parse_with_pauses(content, &source.format, pause).map_err(|error| {
        ListFailure::Unusable(format!(
            "cannot be used: {shown}:{}:{}: {}",
            error.line, error.column, error.reason
        ))
    })?;
    Ok(LoadedList {
        list: Arc::new(list),
        hash,
        stamp,
        loaded_at: SystemTime::now(),
    })
}

/// The state of the file at `path`, through symbolic links; `None` when there is none.
pub fn stamp(path: &FilePath) -> Option<Stamp> {
    fs::metadata(path)
        .ok()
        .map(|metadata| Stamp::from(&metadata))
}

/// Where relative names are looked for: beside the file, and for a file of a Kubernetes volume in the
/// generation of files that is current now, so that a swap between two reads cannot mix
/// generations.
pub fn generation_directory(path: &FilePath) -> PathBuf {
    let home = home(path);
    let generation = is_in_generation(path).then(|| fs::canonicalize(home.join("..data")));
    match generation {
        Some(Ok(generation)) => generation,
        _ => home.to_owned(),
    }
}

/// What a text says as far as it can be understood, whatever is wrong with the rest.
pub(crate) fn shape_of(text: &str) -> Option<ConfigFile> {
    decode(&mut Node::parse(text).ok()?).0
}

/// True for a file that is swapped with the others of a Kubernetes volume. One that stands beside
/// them is not read again with a swap, so that a generation it were tied to would be gone soon.
fn is_in_generation(path: &FilePath) -> bool {
    fs::read_link(path).is_ok_and(|target| target.iter().any(|part| part == "..data"))
}

/// The directory that a file is in.
pub(crate) fn home(path: &FilePath) -> &FilePath {
    match path.parent() {
        Some(parent) if parent != FilePath::new("") => parent,
        _ => FilePath::new("."),
    }
}

impl Loaded {
    /// The files that it names and consists of.
    pub fn files_read(&self) -> impl Iterator<Item = &FilePath> {
        files_read(&self.files, &self.lists, &self.endpoints_files)
    }
}

impl ListFailure {
    /// The reason, for people.
    pub fn into_reason(self) -> String {
        match self {
            Self::Unreadable(reason) | Self::Unusable(reason) => reason,
            Self::Unsettled => "is being written to right now".to_owned(),
        }
    }
}

impl Stamp {
    /// True for a file without any content.
    pub fn is_empty(self) -> bool {
        self.size == 0
    }

    /// What stays the same while the content changes.
    pub fn identity(self) -> (u64, u64) {
        (self.device, self.inode)
    }
}

impl From<&fs::Metadata> for Stamp {
    fn from(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// The files that a configuration names and consists of.
fn files_read<'f>(
    files: &'f [(PathBuf, Option<Stamp>)],
    lists: &'f Lists,
    endpoints_files: &'f EndpointsFiles,
) -> impl Iterator<Item = &'f FilePath> {
    let files = files.iter().map(|(path, _)| path);
    let files = files.chain(lists.keys().map(|list| &list.path));
    files.chain(endpoints_files.keys()).map(PathBuf::as_path)
}

/// What is wrong with a state file that is one of those that are `read`, or the access log, as well: it would be
/// replaced.
fn spoilt_by_state<'f>(
    config: &'f Config,
    read: impl Iterator<Item = &'f FilePath>,
    document: &Node,
) -> Option<Problem> {
    let state = config.state_file.as_ref()?;
    let real = |path: &FilePath| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let written = real(state);
    let log = match config.access_log.as_ref().map(|log| &log.output) {
        Some(Output::File(file)) => Some(file.as_path()),
        Some(Output::Stdout) | None => None,
    };
    let mut others = read.chain(log);
    let spoilt = others.find(|other| written == real(other))?;
    let at = Path::default().key("stateFile");
    let message = format!(
        "`{}` is another file of this configuration, which would be replaced",
        spoilt.display()
    );
    Some(Problem::error(&at, document.locate(&at), message))
}

fn load_lists(
    user_lists: &[(Path, UserListConfig)],
    read_list: ReadList<'_>,
    document: &Node,
    problems: &mut Vec<Problem>,
) -> Lists {
    let mut lists = Lists::new();
    for (at, list) in user_lists {
        if lists.contains_key(&list.source) {
            continue;
        }
        match read_list(&list.source) {
            Ok(loaded) => drop(lists.insert(list.source.clone(), loaded)),
            Err(failure) => {
                let reason = failure.into_reason();
                let at = at.key("file");
                let message = format!("user list `{}` {reason}", list.name);
                problems.push(Problem::error(&at, document.locate(&at), message));
            }
        }
    }
    lists
}

/// Reads a regular file of at most `largest` bytes that nobody changes meanwhile.
pub(super) fn read_settled(path: &FilePath, largest: u64) -> io::Result<(Vec<u8>, Stamp)> {
    // Asked before opening, since opening a pipe waits for somebody to write.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let file = File::open(path)?;
    let before = file.metadata()?;
    if before.len() > largest {
        let reason = format!("it has {} bytes, more than {largest}", before.len());
        return Err(io::Error::other(reason));
    }
    let mut content = Vec::new();
    // A list of some gigabytes may be too much for this machine, which is no reason to abort.
    content
        .try_reserve_exact(usize::try_from(before.len()).unwrap_or(usize::MAX))
        .map_err(io::Error::other)?;
    (&file).take(before.len() + 1).read_to_end(&mut content)?;
    let stamp = Stamp::from(&before);
    if stamp != Stamp::from(&file.metadata()?) {
        return Err(io::Error::other("it was written to while it was read"));
    }
    Ok((content, stamp))
}

/// The text of a configuration, without a byte order mark.
fn as_text(content: Vec<u8>) -> Result<String, String> {
    if let Some(reason) = no_text(&content) {
        return Err(format!("the file {reason}"));
    }
    let mut text = String::from_utf8(content).map_err(|error| {
        let sound = error.utf8_error().valid_up_to();
        let (before, rest) = error.as_bytes().split_at(sound);
        let line = 1 + memchr::memchr_iter(b'\n', before).count();
        let byte = rest.first().copied().unwrap_or_default();
        format!(
            "the file is not UTF-8 text: line {line} has the byte 0x{byte:02X}; save it as UTF-8"
        )
    })?;
    if text.starts_with('\u{FEFF}') {
        text.drain(..'\u{FEFF}'.len_utf8());
    }
    Ok(text)
}

pub(super) fn syntax_problem(text: &str, error: &serde_saphyr::Error) -> Problem {
    let mut span = Span::start();
    if let Some(location) = error.location() {
        span = Span::from(&location);
        if location.span().byte_offset().is_none() {
            // The scanner counts characters only.
            let start = usize::try_from(location.span().offset())
                .ok()
                .and_then(|nth| text.char_indices().nth(nth));
            let start = start.map_or(text.len(), |(start, _)| start);
            span.bytes = start..start;
        }
    }
    let report = error.without_snippet().to_string();
    let message = match report.split(" at line ").next().unwrap_or(&report) {
        said if said.starts_with("budget breached") => {
            "the file has more parts than are read: do aliases (`*name`) multiply them?".to_owned()
        }
        said if said.starts_with("multiple YAML documents") => {
            "a second document begins here: only one is read".to_owned()
        }
        said if said.starts_with("non-finite float") => {
            "this is no number: no key takes one that is infinite or none".to_owned()
        }
        // The library's advice is for programmers.
        said => said
            .split(", set DuplicateKeyPolicy")
            .next()
            .unwrap_or(said)
            .trim_end_matches([':', ','])
            .to_owned(),
    };
    Problem::error(&Path::default(), span, message)
}

fn cannot_read(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "does not exist".to_owned(),
        io::ErrorKind::PermissionDenied => "may not be read".to_owned(),
        _ => format!("cannot be read: {error}"),
    }
}
