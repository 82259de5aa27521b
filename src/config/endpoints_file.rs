//! Files of endpoints: a list in YAML, and so in JSON as well.
//!
//! A list, and not a line for each: a file that is cut short in the middle of JSON is no list, and
//! an empty list can be told from a file that nobody has written yet.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path as FilePath, PathBuf};
use std::time::SystemTime;

use serde::Deserialize;
use xxhash_rust::xxh3::xxh3_64;

use crate::discovery::Locator;

use super::document::{Node, Path};
use super::load::{ListFailure, ReadEndpoints, Stamp, read_settled, syntax_problem};
use super::problem::{Problem, Severity};

/// The largest file of endpoints, in bytes.
const LARGEST_FILE: u64 = 16 << 20;

/// Files of endpoints by their path.
pub type EndpointsFiles = HashMap<PathBuf, LoadedEndpoints>;

/// A file of endpoints as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedEndpoints {
    /// What it lists, each once; `None` when the file says nothing at all, not even that there are
    /// none.
    pub locators: Option<Vec<Locator>>,
    /// The hash of its content.
    pub hash: u64,
    /// The state of the file when it was read.
    pub stamp: Stamp,
    /// When it was read.
    pub loaded_at: SystemTime,
}

/// What is wrong with a file of endpoints, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misprint {
    /// Counted from 1.
    pub line: usize,
    /// Counted from 1.
    pub column: usize,
    /// In words.
    pub reason: String,
}

/// Reads a file of endpoints.
///
/// # Errors
///
/// Why it cannot be used.
pub fn load_endpoints(path: &FilePath) -> Result<LoadedEndpoints, ListFailure> {
    let shown = path.display();
    let (content, stamp) = read_settled(path, LARGEST_FILE)
        .map_err(|error| ListFailure::Unreadable(format!("cannot be read: `{shown}`: {error}")))?;
    let text = std::str::from_utf8(&content).map_err(|_| {
        ListFailure::Unusable(format!("cannot be used: `{shown}` is not UTF-8 text"))
    })?;
    let locators = parse(text).map_err(|misprint| {
        let Misprint {
            line,
            column,
            reason,
        } = misprint;
        ListFailure::Unusable(format!("cannot be used: {shown}:{line}:{column}: {reason}"))
    })?;
    Ok(LoadedEndpoints {
        locators,
        hash: xxh3_64(&content),
        stamp,
        loaded_at: SystemTime::now(),
    })
}

/// Parses a list of endpoints; `None` for a text without content.
///
/// # Errors
///
/// The first thing that is wrong with it.
pub fn parse(text: &str) -> Result<Option<Vec<Locator>>, Misprint> {
    let document = Node::parse(text).map_err(|error| {
        let problem = syntax_problem(text, &error);
        Misprint {
            line: problem.span.line,
            column: problem.span.column,
            reason: problem.message,
        }
    })?;
    if document.is_empty() {
        return Ok(None);
    }
    let misprint = |at: &Path, reason: String| {
        let span = document.locate(at);
        Misprint {
            line: span.line,
            column: span.column,
            reason,
        }
    };
    let texts = Vec::<String>::deserialize(&document).map_err(|mistake| {
        let reason = "this is no list of texts such as `- 10.0.0.1:8080`".to_owned();
        misprint(&mistake.path(), reason)
    })?;
    let mut seen = BTreeSet::new();
    let mut locators = Vec::new();
    for (position, text) in texts.iter().enumerate() {
        let locator = Locator::parse(text).map_err(|reason| {
            let at = Path::default().index(position);
            misprint(&at, format!("`{text}` {reason}"))
        })?;
        if seen.insert(locator.clone()) {
            locators.push(locator);
        }
    }
    Ok(Some(locators))
}

/// Reads the files that a configuration names, each once.
pub(super) fn load_endpoints_files(
    declared: &[(Path, PathBuf)],
    read: ReadEndpoints<'_>,
    document: &Node,
    problems: &mut Vec<Problem>,
) -> EndpointsFiles {
    let mut files = EndpointsFiles::new();
    for (at, path) in declared {
        if files.contains_key(path) || document.is_unknown(at) {
            continue;
        }
        let loaded = match read(path) {
            Ok(loaded) => loaded,
            Err(failure) => {
                let message = format!("the file of endpoints {}", failure.into_reason());
                problems.push(Problem::error(at, document.locate(at), message));
                continue;
            }
        };
        if loaded.locators.is_none() {
            let message = format!(
                "the file of endpoints `{}` says nothing yet",
                path.display()
            );
            let hint = "there are no endpoints until it does; an empty list is `[]`".to_owned();
            problems.push(Problem {
                severity: Severity::Warning,
                hint: Some(hint),
                ..Problem::error(at, document.locate(at), message)
            });
        }
        files.insert(path.clone(), loaded);
    }
    files
}

// === impl LoadedEndpoints ===

impl LoadedEndpoints {
    /// What it lists.
    pub fn locators(&self) -> &[Locator] {
        self.locators.as_deref().unwrap_or_default()
    }

    /// What takes the place of this; a file without any content does not, if there is something to
    /// lose.
    pub(super) fn may_become(&self, next: Self, path: &FilePath) -> Result<Self, ListFailure> {
        if next.locators.is_none() && self.locators.is_some() {
            return Err(ListFailure::Unusable(format!(
                "is not emptied: `{}` has no content at all; an empty list is written as `[]`",
                path.display()
            )));
        }
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Option<Vec<String>> {
        let locators = parse(text).unwrap()?;
        Some(locators.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_list_in_yaml_or_json_with_each_endpoint_once() {
        let expected = Some(vec![
            "10.0.0.1:80".to_owned(),
            "shop.internal:80".to_owned(),
        ]);
        for text in [
            "- 10.0.0.1:80\n- shop.internal:80\n- 10.0.0.1:80\n",
            "# made by a script\n[ 10.0.0.1:80, 'Shop.internal:80' ]",
            "[\"10.0.0.1:80\",\n \"shop.internal:80\"]",
        ] {
            assert_eq!(shown(text), expected, "{text}");
        }
        assert_eq!(shown("[]"), Some(Vec::new()));
    }

    #[test]
    fn nothing_is_not_an_empty_list() {
        for text in ["", "\n", "# soon\n", "---\n"] {
            assert_eq!(shown(text), None, "{text:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        for (text, line, column) in [
            ("- 10.0.0.1:80\n- 10.0.0.\n", 2, 3),
            ("- 10.0.0.1:80\n- 80\n", 2, 3),
            ("endpoints: [ 10.0.0.1:80 ]", 1, 1),
            ("10.0.0.1:80\n10.0.0.2:80\n", 1, 1),
            ("- [ 10.0.0.1:80 ]", 1, 3),
        ] {
            let misprint = parse(text).unwrap_err();
            assert_eq!(
                (misprint.line, misprint.column),
                (line, column),
                "{text}: {misprint:?}"
            );
        }
        assert!(parse("[\"10.0.0.1:80\", \"10.0.").is_err(), "cut short");
    }
}
