//! Checks what operators are shown: metrics, the access log, traces.

use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::config::document::Path;
use crate::config::file::{self, Size};
use crate::config::value;
use crate::routing::matcher::PathMatcher;
use crate::telemetry::access_log::{self, Filter, Kind, Output, Rotation};
use crate::telemetry::metrics::DEFAULT_BUCKETS;
use crate::telemetry::share::Share;

use super::{Checker, Names};

/// What a file of lines may have before it is full, in bytes.
const LOG_SIZES: RangeInclusive<u64> = (64 << 10)..=(1 << 40);

/// How many full files are kept.
const KEPT_LOGS: u32 = 5;

/// The names that lines may be chosen by.
pub(super) struct LogNames<'n> {
    pub(super) backends: &'n mut Names,
    pub(super) routes: &'n mut Names,
}

impl Checker<'_> {
    pub(super) fn buckets(&mut self, buckets: Option<&[f64]>, root: &Path) -> Option<Vec<f64>> {
        let at = root.key("telemetry").key("durationBuckets");
        let Some(buckets) = buckets else {
            return Some(DEFAULT_BUCKETS.to_vec());
        };
        let ascending = buckets.windows(2).all(|pair| pair[0] < pair[1]);
        if buckets.is_empty()
            || !ascending
            || buckets
                .iter()
                .any(|bound| !bound.is_finite() || *bound <= 0.0)
        {
            self.error(
                &at,
                "buckets are seconds above 0 in ascending order, at least one",
                None,
            );
            return None;
        }
        Some(buckets.to_vec())
    }

    pub(super) fn access_log(
        &mut self,
        log: Option<&file::AccessLog>,
        names: &mut LogNames<'_>,
        at: &Path,
    ) -> Option<Option<access_log::Settings>> {
        let Some(log) = log else { return Some(None) };
        let home = self.around.home;
        let output = self.parse(&log.output, &at.key("output"), |output| match output {
            "" => Err("is neither `stdout` nor the name of a file".to_owned()),
            "stdout" => Ok(access_log::Output::Stdout),
            // Nobody means a file of that name; `./-` is one.
            "-" | "stderr" => Err("is no file; write `stdout`, or the name of one".to_owned()),
            near if near.trim().eq_ignore_ascii_case("stdout") => {
                Err("is no file; did you mean `stdout`?".to_owned())
            }
            file => Ok(access_log::Output::File(home.join(file))),
        });
        let rotation = self.log_rotation(log, output.as_ref(), at);
        if log.sampling.len() > Filter::MOST {
            let message = format!("there may be {} of them at most", Filter::MOST);
            self.error(&at.key("sampling"), message, None);
        }
        let sampling = self.each(&log.sampling, &at.key("sampling"), |checker, rule, at| {
            checker.log_sampling(rule, names, at)
        });
        Some(Some(access_log::Settings {
            output: output?,
            rotation: rotation?,
            sampling: Arc::new(Filter::new(sampling?)),
            format: match log.format {
                file::LogFormat::Json => access_log::Format::Json,
                file::LogFormat::Text => access_log::Format::Text,
            },
            user: match log.user {
                file::LogUser::Hash => access_log::UserField::Hash,
                file::LogUser::Plain => access_log::UserField::Plain,
                file::LogUser::Omit => access_log::UserField::Omit,
            },
        }))
    }

    fn log_rotation(
        &mut self,
        log: &file::AccessLog,
        output: Option<&Output>,
        at: &Path,
    ) -> Option<Option<Rotation>> {
        let Some(rotation) = &log.rotation else {
            return Some(None);
        };
        let at = at.key("rotation");
        if output == Some(&Output::Stdout) {
            let message = "standard output is nobody's file: whoever reads it has to keep it small";
            self.error(&at, message, None);
        }
        let size = self.size(Some(rotation.size), LOG_SIZES, &at.key("size"));
        let keep = rotation.keep.map(|keep| Size(keep.into()));
        let keep = self.size(keep, 1..=1000, &at.key("keep"));
        Some(Some(Rotation {
            size: size??,
            keep: keep?.map_or(KEPT_LOGS, |keep| keep as u32),
        }))
    }

    fn log_sampling(
        &mut self,
        sampling: &file::LogSampling,
        names: &mut LogNames<'_>,
        at: &Path,
    ) -> Option<Kind> {
        let routes = self.each(&sampling.routes, &at.key("routes"), |checker, name, at| {
            let known = checker.resolve(name, at, names.routes);
            known.map(|_| name.as_str().into())
        });
        let backends = self.each(
            &sampling.backends,
            &at.key("backends"),
            |checker, name, at| {
                let known = checker.resolve(name, at, names.backends);
                known.map(|_| name.as_str().into())
            },
        );
        let paths = self.each(&sampling.paths, &at.key("paths"), |checker, path, at| {
            checker.parse(path, at, |path| match path.starts_with('/') {
                true => Ok(PathMatcher::prefix(path)),
                false => Err("does not begin with `/`".to_owned()),
            })
        });
        let statuses = sampling.statuses.iter();
        let slower_than = sampling.slower_than.as_deref();
        let slower_than = self.optional(slower_than, &at.key("slowerThan"), value::duration);
        let share = self.share(sampling.ratio, &at.key("ratio"));
        Some(Kind {
            routes: routes?,
            backends: backends?,
            paths: paths?,
            statuses: statuses.map(|range| range.first..=range.last).collect(),
            slower_than: slower_than?,
            share: share?,
        })
    }

    pub(super) fn share(&mut self, ratio: f64, at: &Path) -> Option<Share> {
        let share = Share::new(ratio);
        if share.is_none() {
            self.error(at, format!("{ratio} is not between 0 and 1"), None);
        }
        share
    }
}
