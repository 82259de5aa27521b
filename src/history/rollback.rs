//! `serin history` and `serin rollback`: what the configuration file said before, and how it says that again.

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use diffy::{DiffOptions, Line, PatchFormatter};
use xxhash_rust::xxh3::xxh3_64;

use crate::config::Problems;
use crate::config::file::ConfigFile;
use crate::config::load::{generation_directory, home, load, load_list, shape_of};
use crate::whole_file::{self, Access};

use super::{Revision, revisions};

/// A configuration file, and the revisions of it that are kept.
#[derive(Debug)]
pub struct History {
    /// The file.
    file: PathBuf,
    /// What it says now.
    content: Vec<u8>,
    /// The latest first.
    revisions: Vec<Revision>,
}

/// Which revision is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// By its place in the list, from 1.
    Number(usize),
    /// By its hash, or the beginning of that.
    Hash(String),
}

/// A revision that can be put back.
#[derive(Debug)]
pub struct Rollback<'h> {
    history: &'h History,
    revision: &'h Revision,
    content: Vec<u8>,
}

/// Why there is nothing to show, or to put back.
#[derive(Debug)]
pub enum Failure {
    /// A file or directory cannot be read or written.
    Unreadable(String),
    /// What is asked for is not there, or not possible.
    Refused(String),
    /// The revision cannot be used any more.
    Problems(Problems),
}

/// The fewest digits of a hash that name a revision: numbers have fewer.
const LEAST_DIGITS: usize = 6;

/// How many unchanged lines are shown around those that change.
const CONTEXT: usize = 3;

// === impl History ===

impl History {
    /// Reads the file, and which revisions there are: in `directory`, or where the file says, whatever else is wrong
    /// with it as long as it is YAML. With a directory the file may be gone.
    ///
    /// # Errors
    ///
    /// A file or directory that cannot be read, or a file that says nothing of revisions.
    pub fn of(file: &Path, directory: Option<&Path>) -> Result<Self, Failure> {
        let content = match fs::read(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && directory.is_some() => {
                Vec::new()
            }
            content => content.map_err(|error| unreadable(file, &error))?,
        };
        let directory = match directory {
            Some(directory) => directory.to_owned(),
            None => directory_of(file, &content).ok_or_else(|| {
                let file = file.display();
                Failure::Refused(format!(
                    "{file} does not say where revisions are kept (`history.directory`); name the directory with --directory"
                ))
            })?,
        };
        let revisions = revisions(&directory).map_err(|error| unreadable(&directory, &error))?;
        Ok(Self {
            file: file.to_owned(),
            content,
            revisions,
        })
    }

    /// What one revision says.
    ///
    /// # Errors
    ///
    /// A revision that is not there, or cannot be read.
    pub fn show(&self, which: &Which) -> Result<String, Failure> {
        read(self.find(which)?).map(|content| text(&content).into_owned())
    }

    /// The revision to put back: the one that is meant, or else the latest that says something else than the file.
    ///
    /// # Errors
    ///
    /// There is none, or it cannot be read.
    pub fn back(&self, to: Option<&Which>) -> Result<Rollback<'_>, Failure> {
        let now = xxh3_64(&self.content);
        let revision = match to {
            Some(which) => self.find(which)?,
            None => {
                let mut others = self.revisions.iter();
                let other = others.find(|revision| revision.hash != now);
                other.ok_or_else(|| {
                    Failure::Refused("there is no revision that says something else".to_owned())
                })?
            }
        };
        Ok(Rollback {
            history: self,
            revision,
            content: read(revision)?,
        })
    }

    fn find(&self, which: &Which) -> Result<&Revision, Failure> {
        let all = &self.revisions;
        let found = match which {
            Which::Number(number) => number.checked_sub(1).and_then(|at| all.get(at)),
            Which::Hash(hash) => {
                let is_meant = |one: &&Revision| format!("{:016x}", one.hash).starts_with(&**hash);
                let mut meant = all.iter().filter(is_meant);
                let first = meant.next();
                // The same text may have been taken over several times.
                if let Some(first) = first
                    && meant.any(|other| other.hash != first.hash)
                {
                    return Err(Failure::Refused(format!(
                        "{which} is the beginning of several hashes"
                    )));
                }
                first
            }
        };
        found.ok_or_else(|| {
            let count = self.revisions.len();
            Failure::Refused(format!("there is no revision {which}; {count} are kept"))
        })
    }
}

/// A line for each revision: its number, when it was taken over, its hash, and what it has changed.
impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = xxh3_64(&self.content);
        if self.revisions.is_empty() {
            return writeln!(f, "no revision is kept yet");
        }
        // A revision that cannot be read shows no changes.
        let texts: Vec<_> = self.revisions.iter().map(|one| read(one).ok()).collect();
        for (position, revision) in self.revisions.iter().enumerate() {
            let before = texts.get(position + 1).and_then(Option::as_deref);
            let changes = match (before, &texts[position]) {
                (Some(before), Some(after)) => changes(&text(before), &text(after)),
                _ => String::new(),
            };
            let mark = if revision.hash == now { '*' } else { ' ' };
            let line = format!("{mark} {:>3}  {revision}  {changes}", position + 1);
            writeln!(f, "{}", line.trim_end())?;
        }
        if self.revisions.iter().all(|revision| revision.hash != now) {
            writeln!(
                f,
                "The file says something that was never taken over, or is too old."
            )?;
        }
        Ok(())
    }
}

// === impl Rollback ===

impl Rollback<'_> {
    /// What the file would say differently, as a unified diff.
    pub fn diff(&self) -> String {
        let file = self.history.file.display().to_string();
        let (before, after) = (text(&self.history.content), text(&self.content));
        diff((&file, &before), (&self.revision.to_string(), &after))
    }

    /// Makes the file say what the revision says, if that can still be used. Whoever serves with the file follows it
    /// as it follows an editor.
    ///
    /// # Errors
    ///
    /// The revision cannot be used any more, or the file cannot be written; then nothing has changed.
    pub fn put_back(&self) -> Result<(), Failure> {
        let file = &self.history.file;
        if generation_directory(file) != home(file) {
            return Err(Failure::Refused(format!(
                "{} is in a volume that Kubernetes writes: put the revision back where the ConfigMap comes from; \
                 `serin history --show` prints it",
                file.display()
            )));
        }
        let cannot = |error: io::Error| {
            Failure::Unreadable(format!("{} cannot be written: {error}", file.display()))
        };
        // What a link leads to, and not the link.
        let real = fs::canonicalize(file).unwrap_or_else(|_| file.clone());
        let there = fs::metadata(&real);
        let access = there.as_ref().map_or(Access::Ours, Access::Same);
        // Where names of other files lead is known only beside the file.
        let trial = whole_file::beside(file, "rollback");
        whole_file::replace(&trial, &self.content, Access::Ours).map_err(cannot)?;
        let checked = load(&trial, &mut load_list);
        // If it stays, it is in nobody's way.
        let _ = fs::remove_file(&trial);
        checked.map_err(|problems| {
            let file = self.revision.path.clone();
            Failure::Problems(Problems { file, ..problems })
        })?;
        if fs::read(&real).unwrap_or_default() != self.history.content {
            let file = file.display();
            return Err(Failure::Refused(format!(
                "somebody has changed {file} just now"
            )));
        }
        whole_file::replace(&real, &self.content, access).map_err(cannot)
    }

    /// Which revision it is.
    pub fn revision(&self) -> &Revision {
        self.revision
    }

    /// True when the file says that already.
    pub fn is_there(&self) -> bool {
        self.history.content == self.content
    }
}

// === impl Which ===

impl std::str::FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.to_ascii_lowercase();
        let is_hash = text.len() >= LEAST_DIGITS && text.bytes().all(|it| it.is_ascii_hexdigit());
        match text.parse() {
            _ if is_hash => Ok(Self::Hash(text)),
            Ok(number @ 1..) => Ok(Self::Number(number)),
            _ => Err(format!(
                "is neither a number from 1 nor the first {LEAST_DIGITS} digits of a hash"
            )),
        }
    }
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Hash(hash) => hash.fmt(f),
        }
    }
}

// === impl Failure ===

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(reason) | Self::Refused(reason) => f.write_str(reason),
            Self::Problems(problems) => problems.fmt(f),
        }
    }
}

/// A unified diff of two texts with their names; nothing where they are the same.
fn diff((name, before): (&str, &str), (new_name, after): (&str, &str)) -> String {
    let patch = DiffOptions::new()
        .set_context_len(CONTEXT)
        .set_original_filename(name.to_owned())
        .set_modified_filename(new_name.to_owned())
        .create_patch(before, after);
    if patch.hunks().is_empty() {
        return String::new();
    }
    // As diff and git write it: a line of context that is empty is a space.
    let format = PatchFormatter::new().suppress_blank_empty(false);
    format.fmt_patch(&patch).to_string()
}

/// What one text has changed of the one before: weights by name, everything else by the number of lines.
fn changes(before: &str, after: &str) -> String {
    let (old, new) = (weights(before), weights(after));
    let moved = new.iter().filter_map(|(route, backend, weight)| {
        let was = old
            .iter()
            .find(|one| (&one.0, &one.1) == (route, backend))?
            .2;
        (was != *weight).then(|| format!("{route}: {backend} {was} -> {weight}"))
    });
    let moved: Vec<String> = moved.collect();
    let patch = DiffOptions::new()
        .set_context_len(0)
        .create_patch(before, after);
    let lines = || patch.hunks().iter().flat_map(|hunk| hunk.lines());
    let more = lines().filter(|line| matches!(line, Line::Insert(_)));
    let fewer = lines().filter(|line| matches!(line, Line::Delete(_)));
    let lines = format!("+{} -{}", more.count(), fewer.count());
    match &moved[..] {
        [] => lines,
        moved => format!("{lines}  {}", moved.join(", ")),
    }
}

/// The weights that a text gives, whatever else is wrong with it.
fn weights(text: &str) -> Vec<(String, String, u32)> {
    let routes = shape_of(text).map(|file: ConfigFile| file.routes);
    let routes = routes.unwrap_or_default().into_iter();
    let weights = routes.flat_map(|route| {
        let name = route.name;
        let backends = route.backend_refs.into_iter();
        backends.map(move |backend| (name.clone(), backend.name, backend.weight))
    });
    weights.collect()
}

/// Where a file says that its revisions are kept.
fn directory_of(file: &Path, content: &[u8]) -> Option<PathBuf> {
    let history = shape_of(&text(content))?.history?;
    Some(home(file).join(history.directory))
}

/// What a content says, to be looked at.
fn text(content: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(content)
}

fn read(revision: &Revision) -> Result<Vec<u8>, Failure> {
    let path = &revision.path;
    fs::read(path).map_err(|error| unreadable(path, &error))
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    Failure::Unreadable(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "listeners: [ { name: web, address: '127.0.0.1:0' } ]
backends: [ { name: shop, endpoints: [ '127.0.0.1:1' ] } ]
routes: [ { name: all, backendRefs: [ { name: shop } ] } ]
";

    #[test]
    fn lines_that_came_are_told_from_those_that_went() {
        assert_eq!(changes("a\nb\n", "a\n"), "+0 -1");
        assert_eq!(changes("a\n", "c\na\nb\n"), "+2 -0");
        assert_eq!(changes("a\n", "a"), "+1 -1", "the end of a line counts");
    }

    #[test]
    fn a_diff_is_one_that_patch_understands() {
        let (before, after) = ("a\n\nb\r\n", "a\n\nc\r\nd");
        let expected = "--- my file\n+++ 1\n@@ -1,3 +1,4 @@\n a\n \n-b\r\n+c\r\n+d\n\\ No newline at end of file\n";
        assert_eq!(diff(("my file", before), ("1", after)), expected);
        let expected = "--- f\n+++ 1\n@@ -0,0 +1 @@\n+a\n";
        assert_eq!(diff(("f", ""), ("1", "a\n")), expected);
        assert_eq!(diff(("f", "a"), ("1", "a")), "");
    }

    #[test]
    fn what_somebody_writes_meanwhile_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let (file, kept) = (
            directory.path().join("serin.yaml"),
            directory.path().join("kept"),
        );
        let was = format!("# before\n{CONFIG}");
        let revision = Revision::file_name(1, xxh3_64(was.as_bytes()));
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join(revision), &was).unwrap();
        fs::write(&file, CONFIG).unwrap();
        let history = History::of(&file, Some(&kept)).unwrap();
        let rollback = history.back(None).unwrap();
        fs::write(&file, "somebody else's").unwrap();
        let refused = rollback.put_back().unwrap_err().to_string();
        assert!(refused.starts_with("somebody has changed "), "{refused}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "somebody else's");
        fs::write(&file, CONFIG).unwrap();
        rollback.put_back().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), was);
    }
}
