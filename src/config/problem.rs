//! What is wrong with a configuration, said so that an operator can mend it.

use std::fmt;
use std::path::{Path as FilePath, PathBuf};

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use serde::Serialize;

use super::document::{Path, Span};

/// How much a problem matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The file cannot be used.
    Error,
    /// The file can be used, but probably does not say what was meant.
    Warning,
}

/// One thing wrong, with its place and, where there is one, a way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Whether the file can be used all the same.
    pub severity: Severity,
    /// Where it stands in the file.
    pub span: Span,
    /// The way to it through the file, as in `routes[0].backendRefs[1].name`; empty for the file as
    /// a whole.
    pub path: String,
    /// What is wrong, in one sentence without a full stop.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// Everything found wrong with one file, with the text it stands in.
#[derive(Clone, Debug)]
pub struct Problems {
    /// The file as the operator named it.
    pub file: PathBuf,
    /// Its content when it was read.
    pub source: String,
    /// The problems in the order of the file.
    pub problems: Vec<Problem>,
}

// === impl Problem ===

impl Problem {
    /// An error at a place of the file.
    pub fn error(at: &Path, span: Span, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            span,
            path: at.to_string(),
            message: message.into(),
            hint: None,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}:{}: {}",
            self.span.line, self.span.column, self.message
        )?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

// === impl Problems ===

impl Problems {
    /// The problems of `file` whose text is `source`, sorted by their place.
    pub fn new(file: &FilePath, source: &str, mut problems: Vec<Problem>) -> Self {
        for problem in &mut problems {
            // What is quoted from the file may be anything, and must not break the lines of a
            // report.
            problem.message = one_line(&problem.message);
            problem.hint = problem.hint.as_deref().map(one_line);
        }
        problems.sort_by_key(|problem| (problem.span.bytes.start, problem.severity));
        Self {
            file: file.to_owned(),
            source: source.to_owned(),
            problems,
        }
    }

    /// A single problem with the file as a whole: it cannot be read, it is empty.
    pub fn whole_file(file: &FilePath, message: impl Into<String>) -> Self {
        let problem = Problem::error(&Path::default(), Span::start(), message);
        Self::new(file, "", vec![problem])
    }

    /// How many of them forbid the use of the file.
    pub fn errors(&self) -> usize {
        let errors = self.problems.iter();
        errors
            .filter(|problem| problem.severity == Severity::Error)
            .count()
    }

    /// All of them with the lines they stand in, for a terminal.
    pub fn render(&self, styled: bool) -> String {
        let renderer = if styled {
            Renderer::styled()
        } else {
            Renderer::plain()
        };
        let file = self.file.display().to_string();
        let reports: Vec<String> = self
            .problems
            .iter()
            .map(|problem| renderer.render(&[self.report(problem, &file)]))
            .collect();
        reports.join("\n\n")
    }

    fn report<'a>(&'a self, problem: &'a Problem, file: &'a str) -> Group<'a> {
        let level = match problem.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let end = self.source.len();
        let span = problem.span.bytes.start.min(end)..problem.span.bytes.end.min(end);
        let snippet = Snippet::source(self.source.as_str())
            .path(file)
            .annotation(AnnotationKind::Primary.span(span));
        let group = level
            .primary_title(problem.message.as_str())
            .element(snippet);
        match &problem.hint {
            Some(hint) => group.element(Level::HELP.message(hint.as_str())),
            None => group,
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, problem) in self.problems.iter().enumerate() {
            let separator = if position == 0 { "" } else { "; " };
            write!(f, "{separator}{}:{problem}", self.file.display())?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// The text with control characters written as escapes.
fn one_line(text: &str) -> String {
    let escaped = |c: char| {
        if c.is_control() {
            c.escape_default().to_string()
        } else {
            c.to_string()
        }
    };
    text.chars().map(escaped).collect()
}

/// The candidate that `name` was most likely meant to be, when one is near enough to be worth
/// saying.
pub fn did_you_mean<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    let near = (name.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| {
            (
                strsim::damerau_levenshtein(&name.to_lowercase(), &candidate.to_lowercase()),
                candidate,
            )
        })
        .filter(|(distance, _)| *distance <= near)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| format!("did you mean `{candidate}`?"))
}
