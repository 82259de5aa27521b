//! From the file's shape to a [`Config`]: every name resolved, every value parsed, every problem
//! reported.
//!
//! Pure: files that the configuration names (keys) are read through a function that is handed in.

mod admin;
mod backend;
mod discovery;
mod filters;
mod gray;
mod limit;
mod listener;
mod process;
mod resilience;
mod route;
mod telemetry;
mod tracing;
mod transport;
mod user_list;

use std::collections::HashMap;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use rustls::RootCertStore;

use crate::limit::overload::Overload;

use super::document::{Node, Path};
use super::file::ConfigFile;
use super::problem::{Problem, Severity, did_you_mean};
use super::value::Misfit;
use super::{Config, UserList, value};

use telemetry::LogNames;

/// What checking needs of the world around the file.
pub(super) struct Surroundings<'s> {
    /// The directory that relative names of files to read are relative to.
    pub(super) directory: &'s FilePath,
    /// The directory that relative names of files to write are relative to: beside the file, also
    /// where those to read are in a generation of a Kubernetes volume.
    pub(super) home: &'s FilePath,
    /// Reads a file that the configuration names; the error completes "`NAME` ...".
    pub(super) read: &'s dyn Fn(&FilePath) -> Result<Vec<u8>, String>,
    /// The authorities that the system trusts.
    pub(super) system_authorities: &'s dyn Fn() -> RootCertStore,
    /// Reads a variable of the environment.
    pub(super) variable: &'s dyn Fn(&str) -> Option<String>,
    /// Seconds since 1970.
    pub(super) now: u64,
}

/// What checking a file gives.
pub(super) struct Checked {
    /// The configuration; `None` when there is an error among the problems.
    pub(super) config: Option<Config>,
    /// The user lists that are sound, with their places in the file, whatever is wrong elsewhere.
    pub(super) user_lists: Vec<(Path, UserList)>,
    /// The files of endpoints, with their places in the file.
    pub(super) endpoints_files: Vec<(Path, PathBuf)>,
    /// Every problem, those found before among them.
    pub(super) problems: Vec<Problem>,
}

/// Checks a file in which problems may have been found before.
pub(super) fn check(
    file: &ConfigFile,
    document: &Node,
    around: &Surroundings<'_>,
    found: Vec<Problem>,
) -> Checked {
    let mut checker = Checker {
        document,
        around,
        problems: found,
        user_lists: Vec::new(),
        endpoints_files: Vec::new(),
    };
    let config = checker.config(file);
    let sound = !checker
        .problems
        .iter()
        .any(|problem| problem.severity == Severity::Error);
    Checked {
        config: config.filter(|_| sound),
        user_lists: checker.user_lists,
        endpoints_files: checker.endpoints_files,
        problems: checker.problems,
    }
}

/// Collects problems along the way. Methods return `None` for what has one; it is always reported
/// by then.
struct Checker<'c> {
    document: &'c Node,
    around: &'c Surroundings<'c>,
    problems: Vec<Problem>,
    user_lists: Vec<(Path, UserList)>,
    endpoints_files: Vec<(Path, PathBuf)>,
}

/// The names that may be referred to, with their positions.
struct Names {
    kind: &'static str,
    positions: HashMap<String, usize>,
    used: Vec<bool>,
    /// Names of entries that had to be cut out: referring to them is no second problem.
    lost: Vec<String>,
    /// There are entries whose names nobody can know: what leads nowhere may have been meant to
    /// lead there.
    nameless: bool,
    /// Some reference led nowhere: what seems unused may only be misspelt there.
    unresolved: bool,
}

// === impl Checker ===

impl Checker<'_> {
    fn config(&mut self, file: &ConfigFile) -> Option<Config> {
        let root = Path::default();
        // Else what seems unused may have been used by something that was cut out.
        let decoded_whole = self.problems.is_empty();
        let admin_address = self.admin_address(&file.admin, &root.key("admin"));
        let admin = self.admin(&file.admin, admin_address, &root.key("admin"));
        let listeners = self.listeners(file, admin_address, &root.key("listeners"));
        let max_connections = self.max_connections(&file.connections, &root.key("connections"));
        let shutdown = self.shutdown(&file.shutdown, &root.key("shutdown"));
        let state_file = self.state_file(file.state_file.as_deref(), &root.key("stateFile"));
        let history = self.history(file.history.as_ref(), &root.key("history"));
        let duration_buckets = self.buckets(file.telemetry.duration_buckets.as_deref(), &root);
        let dns = self.dns(&file.dns, &root.key("dns"));

        let mut backend_names = self.names(
            "backend",
            file.backends.iter().map(|entry| entry.name.as_str()),
            &root.key("backends"),
        );
        let mut list_names = self.names(
            "user list",
            file.user_lists.iter().map(|entry| entry.name.as_str()),
            &root.key("userLists"),
        );
        let mut route_names = self.names(
            "route",
            file.routes.iter().map(|entry| entry.name.as_str()),
            &root.key("routes"),
        );

        let roles = resilience::roles(&file.routes);
        let backends = self.each(
            &file.backends,
            &root.key("backends"),
            |checker, backend, at| checker.backend(backend, &roles, at),
        );
        let user_lists = self.each(
            &file.user_lists,
            &root.key("userLists"),
            |checker, list, at| {
                let list = checker.user_list(list, at)?;
                checker.user_lists.push((at.clone(), list.clone()));
                Some(list)
            },
        );
        let routes = self.each(&file.routes, &root.key("routes"), |checker, route, at| {
            checker.route(
                route,
                at,
                &file.backends,
                &mut backend_names,
                &mut list_names,
            )
        });
        let tracing = self.tracing(file.tracing.as_ref(), dns.as_ref(), &root.key("tracing"));
        if decoded_whole {
            self.warn_of_unused(&backend_names, &root.key("backends"));
            self.warn_of_unused(&list_names, &root.key("userLists"));
        }
        // Behind: who is only spoken of in the log is used by nobody.
        let mut names = LogNames {
            backends: &mut backend_names,
            routes: &mut route_names,
        };
        let log_at = root.key("accessLog");
        let access_log = self.access_log(file.access_log.as_ref(), &mut names, &log_at);
        let routes_at = root.key("routes");
        if file.routes.is_empty() && !self.document.is_maimed(&routes_at) {
            self.warn(
                &routes_at,
                "there are no routes: every request gets 404",
                None,
            );
        }
        Some(Config {
            listeners: listeners?,
            admin: admin?,
            workers: file.workers,
            max_connections: max_connections?,
            shutdown: shutdown?,
            state_file: state_file?,
            history: history?,
            overload: Overload {
                in_flight: limit::in_flight(&file.overload),
            },
            duration_buckets: duration_buckets?,
            access_log: access_log?,
            tracing: tracing?,
            dns: dns?,
            backends: backends?,
            user_lists: user_lists?,
            routes: routes?,
        })
    }

    fn networks(&mut self, texts: &[String], at: &Path) -> Option<Arc<[IpNet]>> {
        self.each(texts, at, |checker, text, at| {
            checker.parse(text, at, value::cidr)
        })
        .map(Into::into)
    }

    fn name(&mut self, text: &str, at: &Path) -> Option<Arc<str>> {
        self.parse(text, &at.key("name"), value::name)
            .map(Into::into)
    }

    fn duration(&mut self, text: Option<&str>, default: Duration, at: &Path) -> Option<Duration> {
        text.map_or(Some(default), |text| self.parse(text, at, value::duration))
    }

    /// Checks every element, so that the problems of all are reported.
    fn each<T, U>(
        &mut self,
        items: &[T],
        at: &Path,
        mut check: impl FnMut(&mut Self, &T, &Path) -> Option<U>,
    ) -> Option<Vec<U>> {
        let checked: Vec<Option<U>> = items
            .iter()
            .enumerate()
            .map(|(position, item)| check(self, item, &at.index(position)))
            .collect();
        checked.into_iter().collect()
    }

    /// Parses a scalar; the reason of a failure completes "`TEXT` ...".
    fn parse<T>(
        &mut self,
        text: &str,
        at: &Path,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        parse(text)
            .map_err(|reason| self.error(at, format!("`{text}` {reason}"), None))
            .ok()
    }

    /// As [`parse`](Self::parse), for a text that stands as a key.
    fn parse_key<T>(
        &mut self,
        text: &str,
        at: &Path,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let span = self.document.locate_key(at);
        parse(text)
            .map_err(|reason| {
                let message = format!("`{text}` {reason}");
                self.problems.push(Problem::error(at, span, message));
            })
            .ok()
    }

    /// As [`parse`](Self::parse), for what may be left out.
    fn optional<T>(
        &mut self,
        text: Option<&str>,
        at: &Path,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Option<T>> {
        text.map_or(Some(None), |text| self.parse(text, at, parse).map(Some))
    }

    /// Parses a condition, unless a part of it has been cut out.
    fn whole<T, U>(
        &mut self,
        condition: &T,
        at: &Path,
        parse: impl Fn(&T) -> Result<U, Misfit>,
    ) -> Option<U> {
        if self.document.is_maimed(at) {
            return None;
        }
        parse(condition)
            .map_err(|misfit| self.error(&at.key(misfit.key), misfit.reason, misfit.hint))
            .ok()
    }

    /// Collects the names of a section and reports those that come twice.
    fn names<'n>(
        &mut self,
        kind: &'static str,
        names: impl Iterator<Item = &'n str>,
        at: &Path,
    ) -> Names {
        let mut positions = HashMap::new();
        for (position, name) in names.enumerate() {
            if positions.insert(name.to_owned(), position).is_some() {
                self.error(
                    &at.index(position).key("name"),
                    format!("there are two {kind}s named `{name}`"),
                    None,
                );
            }
        }
        let used = vec![false; positions.len()];
        let lost = self.document.lost_names(at).map(str::to_owned).collect();
        Names {
            kind,
            positions,
            used,
            lost,
            nameless: self.document.has_nameless(at),
            unresolved: false,
        }
    }

    fn resolve_optional(
        &mut self,
        name: Option<&str>,
        at: &Path,
        names: &mut Names,
    ) -> Option<Option<usize>> {
        name.map_or(Some(None), |name| self.resolve(name, at, names).map(Some))
    }

    fn resolve(&mut self, name: &str, at: &Path, names: &mut Names) -> Option<usize> {
        if let Some(position) = names.positions.get(name) {
            if let Some(used) = names.used.get_mut(*position) {
                *used = true;
            }
            return Some(*position);
        }
        names.unresolved = true;
        let hint = names.nearest(name);
        if !names.lost.iter().any(|lost| lost == name) && (hint.is_some() || !names.nameless) {
            self.error(at, format!("unknown {} `{name}`", names.kind), hint);
        }
        None
    }

    fn warn_of_unused(&mut self, names: &Names, at: &Path) {
        if names.unresolved {
            return;
        }
        let mut unused: Vec<(&String, &usize)> = names
            .positions
            .iter()
            .filter(|(_, position)| names.used.get(**position) == Some(&false))
            .collect();
        unused.sort_by_key(|(_, position)| **position);
        for (name, position) in unused {
            let message = format!("{} `{name}` is not used by any route", names.kind);
            self.warn(&at.index(*position).key("name"), message, None);
        }
    }

    fn error(&mut self, at: &Path, message: impl Into<String>, hint: Option<String>) {
        self.report(Severity::Error, at, message.into(), hint);
    }

    fn warn(&mut self, at: &Path, message: impl Into<String>, hint: Option<String>) {
        self.report(Severity::Warning, at, message.into(), hint);
    }

    fn report(&mut self, severity: Severity, at: &Path, message: String, hint: Option<String>) {
        if self.document.is_unknown(at) {
            return;
        }
        let span = self.document.locate(at);
        self.problems.push(Problem {
            severity,
            span,
            path: at.to_string(),
            message,
            hint,
        });
    }
}

// === impl Names ===

impl Names {
    /// The name that was most likely meant, the first in the file of several.
    fn nearest(&self, name: &str) -> Option<String> {
        let mut known: Vec<(&String, &usize)> = self.positions.iter().collect();
        known.sort_by_key(|(_, position)| **position);
        did_you_mean(name, known.into_iter().map(|(known, _)| known.as_str()))
    }
}

/// The `backendRefs` of the route that `at` is within.
fn backend_refs_of(at: &Path) -> Path {
    at.steps()
        .iter()
        .take(2)
        .cloned()
        .fold(Path::default(), |path, step| path.join(step))
        .key("backendRefs")
}
