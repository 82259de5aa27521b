//! `RELIABILITY.md`: read, so that rows that did not run stay; and written after each row, so that
//! a run that is interrupted has not run for nothing.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use crate::Error;
use crate::process;
use crate::row::{Finding, Pace, Row};
use crate::rows;

const TITLE: &str = "# What users see when things break

Made by `cargo test --release --test reliability`, and the row `soak` by `cargo test --release --test reliability -- soak`;
do not edit. A run overwrites the rows that it ran.

A real `serin` stands between real processes: three endpoints of stable, one of a canary, each half of the users, who
keep their version. Unless the row says otherwise, each version's users send 200 requests a second, open loop, one in
four of them a POST of 4 KiB and the others GETs of 4 KiB, with nothing configured but `backendRequest: 1s`: no health
checks, and everything else as it is by default. A request has failed when its client got no connection, no whole
response within 5 s, a wrong one, or a status other than 200; clients retry nothing. The time to recover runs to the
moment when the last client saw a failure: from the beginning of the fault if none did after it, else from its end. Latencies are those of requests that were answered, in milliseconds, before the fault and during it.

";

const HEADER: &str = "| row | fault | what clients saw | tried | failed | time to recover | stable's users: p50, p99 | canary's \
                      users: p50, p99 | promised, and found |
|---|---|---|---|---|---|---|---|---|
";

/// The table, by row.
#[derive(Debug)]
pub(crate) struct Report {
    /// `None` when nothing is written.
    file: Option<PathBuf>,
    lines: HashMap<String, String>,
    environment: String,
}

// === impl Report ===

impl Report {
    pub(crate) fn open(file: Option<PathBuf>, pace: &Pace) -> Result<Self, Error> {
        let before = match &file {
            Some(file) if file.exists() => fs::read_to_string(file)?,
            _ => String::new(),
        };
        let lines = before.lines().filter_map(|line| {
            let (name, _) = line.strip_prefix("| `")?.split_once('`')?;
            Some((name.to_owned(), line.to_owned()))
        });
        Ok(Self {
            file,
            lines: lines.collect(),
            environment: environment(pace)?,
        })
    }

    /// Puts a row in, and writes the file.
    pub(crate) fn put(&mut self, row: &Row, finding: &Finding) -> Result<(), Error> {
        self.lines.insert(row.name.clone(), line(row, finding));
        match &self.file {
            Some(file) => Ok(fs::write(file, self.text())?),
            None => Ok(()),
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{TITLE}{}\n\n{HEADER}", self.environment);
        for row in rows::all() {
            if let Some(line) = self.lines.get(&row.name) {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }
}

fn line(row: &Row, finding: &Finding) -> String {
    let count = |count: Option<usize>| count.map_or("-".into(), with_commas);
    let recovery = finding.recovery.map_or("-".into(), |one| one.to_string());
    let [stable, canary] = finding.latencies.clone();
    let [stable, canary] = [stable, canary].map(|one| one.unwrap_or("-".into()));
    let cells = [
        &format!("`{}`", row.name),
        &row.fault,
        &finding.seen,
        &count(finding.tried),
        &count(finding.failed),
        &recovery,
        &stable,
        &canary,
        &finding.verdict(row),
    ];
    // What is quoted from elsewhere, such as an error, must stay in its cell.
    let cells = cells.map(|cell| cell.replace('|', "\\|").replace('\n', " "));
    format!("| {} |", cells.join(" | "))
}

/// `1234567` as `1,234,567`.
pub(crate) fn with_commas(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .filter_map(|group| std::str::from_utf8(group).ok())
        .collect();
    groups.join(",")
}

/// What it was measured on.
fn environment(pace: &Pace) -> Result<String, Error> {
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split_once(": "));
    let model = model.map_or("unknown CPU", |(_, model)| model);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let kernel: Vec<&str> = kernel.trim().splitn(3, '.').take(2).collect();
    let version = std::process::Command::new(&pace.serin)
        .arg("--version")
        .output()?;
    Ok(format!(
        "Measured on {model}, {} cores for Serin, upstreams and clients together, Linux {}, at most {} descriptors, {} \
         ({} build).",
        std::thread::available_parallelism()?,
        kernel.join("."),
        with_commas(process::descriptor_limit() as usize),
        String::from_utf8_lossy(&version.stdout).trim(),
        if cfg!(debug_assertions) {
            "debug"
        } else {
            "release"
        },
    ))
}
