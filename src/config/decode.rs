//! From a document to a [`ConfigFile`], past whatever is wrong with it.
//!
//! serde stops at the first mistake. So each mistake is noted and mended, and the rest decoded
//! again, until something decodes: what is wrong is cut out, and for what is missing something
//! empty is put in. So an operator sees all mistakes of a file at once, and what is sound is
//! checked as well. The document remembers what was cut out and put in, so that nobody complains of
//! that again.

use serde::Deserialize;

use super::document::{Node, Path, StandIn, Step};
use super::file::ConfigFile;
use super::problem::{Problem, did_you_mean};
use super::value::MAX_WEIGHT;

/// More mistakes than this are not looked for.
const MOST_PROBLEMS: usize = 200;

/// Decodes what can be decoded, and mends the rest in `document`, so that positions in both agree.
///
/// `None` when too little is left to speak of.
pub(super) fn decode(document: &mut Node) -> (Option<ConfigFile>, Vec<Problem>) {
    let mut problems: Vec<Problem> = document
        .repeated_keys()
        .into_iter()
        .map(repeated_key)
        .collect();
    while problems.len() < MOST_PROBLEMS {
        match ConfigFile::deserialize(&*document) {
            Ok(file) => return (Some(file), problems),
            Err(error) => {
                let mistake = Mistake::new(error.path(), &error.to_string());
                problems.extend(mistake.problem(document));
                if !mistake.mend(document) {
                    break;
                }
            }
        }
    }
    if problems.len() >= MOST_PROBLEMS {
        let message = format!("more than {MOST_PROBLEMS} problems: no others were looked for");
        let whole = Path::default();
        problems.push(Problem::error(&whole, document.locate(&whole), message));
    }
    (None, problems)
}

fn repeated_key((path, span): (Path, super::document::Span)) -> Problem {
    let key = match path.steps().last() {
        Some(Step::Key(key)) => key.as_str(),
        _ => "",
    };
    let message = format!("key `{key}` stands here twice");
    let hint = Some("YAML has no rule for which of them counts: keep one".to_owned());
    Problem {
        hint,
        ..Problem::error(&path, span, message)
    }
}

/// What serde had to say, taken apart.
struct Mistake {
    /// What is wrong, or missing.
    path: Path,
    kind: MistakeKind,
}

enum MistakeKind {
    UnknownKey { key: String, known: Vec<String> },
    UnknownWord { word: String, known: Vec<String> },
    MissingKey { key: String },
    WrongType { found: String, expected: String },
    Other(String),
}

// === impl Mistake ===

impl Mistake {
    /// serde's messages for these cases are fixed strings with the names in backquotes.
    fn new(path: Path, message: &str) -> Self {
        let names: Vec<String> = message
            .split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect();
        let first = names.first().cloned().unwrap_or_default();
        let known = names.get(1..).unwrap_or_default().to_vec();
        if message.starts_with("unknown field") {
            let at_key = matches!(path.steps().last(), Some(Step::Key(last)) if *last == first);
            let path = if at_key {
                path
            } else {
                path.key(first.as_str())
            };
            Self {
                path,
                kind: MistakeKind::UnknownKey { key: first, known },
            }
        } else if message.starts_with("unknown variant") {
            Self {
                path,
                kind: MistakeKind::UnknownWord { word: first, known },
            }
        } else if message.starts_with("missing field") {
            Self {
                path: path.key(first.as_str()),
                kind: MistakeKind::MissingKey { key: first },
            }
        } else if let Some((found, expected)) = wrong_type(message) {
            Self {
                path,
                kind: MistakeKind::WrongType {
                    found: found.to_owned(),
                    expected: expected.to_owned(),
                },
            }
        } else {
            Self {
                path,
                kind: MistakeKind::Other(message.to_owned()),
            }
        }
    }

    /// Cuts out what is wrong, and puts something empty in for what is missing: a text, and if that
    /// does not fit a list.
    fn mend(&self, document: &mut Node) -> bool {
        match (&self.kind, document.stand_in(&self.path)) {
            (MistakeKind::MissingKey { .. }, _) => document.put_in(&self.path, StandIn::Text),
            (_, Some(StandIn::Text)) => document.put_in(&self.path, StandIn::List),
            (_, Some(StandIn::List)) => document.prune(&self.path.parent()),
            // A word that should have been a key is not in the document as one.
            (_, None) => document.prune(&self.path) || document.prune(&self.path.parent()),
        }
    }

    /// The problem to report; `None` when it only follows from one reported before.
    fn problem(&self, document: &Node) -> Option<Problem> {
        if document.is_unknown(&self.path) {
            return None;
        }
        let (span, message, hint) = match &self.kind {
            MistakeKind::UnknownKey { key, known } => (
                document.locate_key(&self.path),
                format!("unknown key `{key}`"),
                did_you_mean(key, known.iter().map(String::as_str)).or_else(|| one_of(known)),
            ),
            MistakeKind::UnknownWord { word, known } => {
                let as_key = self.path.key(word.as_str());
                let is_key = document.get(&as_key).is_some();
                (
                    if is_key {
                        document.locate_key(&as_key)
                    } else {
                        document.locate(&self.path)
                    },
                    format!("unknown {} `{word}`", if is_key { "key" } else { "word" }),
                    did_you_mean(word, known.iter().map(String::as_str)).or_else(|| one_of(known)),
                )
            }
            MistakeKind::MissingKey { key } => {
                let parent = self.path.parent();
                // A misspelt key is not missing as well.
                if document
                    .lost_names(&parent)
                    .any(|lost| did_you_mean(lost, [key.as_str()]).is_some())
                {
                    return None;
                }
                (
                    document.locate(&parent),
                    format!("missing key `{key}`"),
                    None,
                )
            }
            // The one key that was there has been cut out.
            MistakeKind::WrongType { .. } if document.is_maimed(&self.path) => return None,
            MistakeKind::WrongType { found, expected } => (
                document.locate(&self.path),
                format!(
                    "expected {}, found {}",
                    self.expected_in_words(expected),
                    found_in_words(found)
                ),
                self.type_hint(found, expected),
            ),
            MistakeKind::Other(message) => (document.locate(&self.path), message.clone(), None),
        };
        Some(Problem {
            hint,
            ..Problem::error(&self.path, span, message)
        })
    }

    fn expected_in_words<'e>(&self, expected: &'e str) -> std::borrow::Cow<'e, str> {
        let most = if self.is_under("weight") {
            MAX_WEIGHT
        } else {
            u32::MAX
        };
        match expected {
            "a string" => "text".into(),
            "a boolean" => "`true` or `false`".into(),
            "a sequence" => "a list".into(),
            "a map" => "a mapping".into(),
            "f64" => "a number".into(),
            "u32" => format!("a whole number from 0 to {most}").into(),
            "map with a single key" => "exactly one key".into(),
            "newtype variant" => "a mapping with a value for it".into(),
            "unit" | "unit variant" => "the word alone, without a value".into(),
            _ if expected.starts_with("struct ") => "a mapping".into(),
            other => other.into(),
        }
    }

    fn type_hint(&self, found: &str, expected: &str) -> Option<String> {
        let quoted = found
            .strip_prefix("string \"")
            .and_then(|text| text.strip_suffix('"'));
        let plain = ["floating point", "integer", "boolean"]
            .iter()
            .any(|start| found.starts_with(start));
        let number = found.split('`').nth(1).unwrap_or_default();
        let is_duration = ["timeout", "timeouts", "idleTimeout", "minTtl", "maxTtl"]
            .iter()
            .any(|key| self.is_under(key));
        let hint = match (expected, quoted) {
            ("a string", None) if is_duration && found.starts_with("integer") => {
                format!(
                    "a duration has a unit: `{number}s` for seconds, `{number}ms` for milliseconds"
                )
            }
            ("a string", None) if plain => "put it in quotes".to_owned(),
            ("a sequence", Some(_)) => "even one alone is written as a list, `[ ... ]`".to_owned(),
            ("u32", Some(text)) if text.parse::<u32>().is_ok() => {
                "write it without quotes".to_owned()
            }
            ("a boolean", Some("true" | "false")) => "write it without quotes".to_owned(),
            ("map with a single key", _) => "begin each with a `-` of its own".to_owned(),
            _ => return None,
        };
        Some(hint)
    }

    fn is_under(&self, key: &str) -> bool {
        self.path
            .steps()
            .iter()
            .any(|step| matches!(step, Step::Key(step) if step == key))
    }
}

/// Takes "invalid type: FOUND, expected EXPECTED" apart; FOUND may be any text and hold the words
/// themselves.
fn wrong_type(message: &str) -> Option<(&str, &str)> {
    let rest = message
        .strip_prefix("invalid type: ")
        .or_else(|| message.strip_prefix("invalid value: "))?;
    rest.rsplit_once(", expected ")
}

fn found_in_words(found: &str) -> String {
    let content = |start: &str| {
        found
            .strip_prefix(start)
            .and_then(|rest| rest.strip_suffix(['`', '"']))
    };
    match found {
        "unit value" => "nothing".to_owned(),
        "map" => "a mapping".to_owned(),
        "sequence" => "a list".to_owned(),
        "unit variant" => "the word alone".to_owned(),
        _ => ["integer `", "floating point `", "boolean `", "string \""]
            .into_iter()
            .find_map(content)
            .map_or_else(|| found.to_owned(), |value| format!("`{value}`")),
    }
}

fn one_of(known: &[String]) -> Option<String> {
    (!known.is_empty()).then(|| format!("known here: {}", known.join(", ")))
}
