//! A row of the table: what is done, what is promised, and what was found.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::Error;
use crate::record::{Group, Record, Recovery, Span, Which};
use crate::rows::{broken, descriptors, faults, restart, slow, soak};

/// A row that can be run.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// What is done, in words.
    pub(crate) fault: String,
    pub(crate) promises: Vec<Promise>,
    pub(crate) drill: Drill,
}

/// How a row is run.
#[derive(Debug)]
pub(crate) enum Drill {
    Fault(faults::Cause, faults::Place),
    Broken(broken::How),
    Restart(restart::How),
    SlowClients,
    FewDescriptors,
    Soak,
}

/// Something that must not be more than it may.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Promise {
    pub(crate) measure: Measure,
    pub(crate) at_most: f64,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Measure {
    /// Requests that failed.
    Failed(Which),
    /// Seconds until the last failure.
    Recovery,
    /// p99 of stable's users with a broken canary, by p99 with a sound one: medians over windows.
    StableTail,
    /// Resident memory that each slow client costs, in KiB.
    ClientKib,
    /// p99 of those who are not slow, in milliseconds.
    OthersTail,
    /// CPU time of Serin by the time that passed, with nothing that it could do.
    IdleCpu,
    /// Times that the process ended by itself, or not as it was told to.
    Crashes,
    /// Mean of the last tenth by mean of the first, of resident memory.
    MemoryGrowth,
    /// Mean of the last tenth by mean of the first, of descriptors.
    DescriptorGrowth,
}

/// How long things go on, and with what.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    /// A fraction of the time, for trying out.
    pub(crate) quick: bool,
    pub(crate) serin: PathBuf,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Finding {
    pub(crate) seen: String,
    pub(crate) tried: Option<usize>,
    pub(crate) failed: Option<usize>,
    pub(crate) recovery: Option<Recovery>,
    /// Latencies of stable's users and of the canary's, if they were measured.
    pub(crate) latencies: [Option<String>; 2],
    pub(crate) measured: Vec<(Measure, f64)>,
    pub(crate) end: End,
}

/// How the run of a row ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum End {
    /// With everything measured.
    #[default]
    Whole,
    /// This build or machine has not what it takes; `seen` says why. Nothing is broken by that.
    NotSupported,
    /// Something happened that must not; `seen` says what.
    Aborted,
}

// === impl Row ===

impl Row {
    pub(crate) fn only_on_demand(&self) -> bool {
        matches!(self.drill, Drill::Soak)
    }

    pub(crate) async fn run(&self, pace: &Pace) -> Result<Finding, Error> {
        match &self.drill {
            Drill::Fault(cause, place) => faults::run(*cause, *place, pace).await,
            Drill::Broken(how) => broken::run(*how, pace).await,
            Drill::Restart(how) => restart::run(*how, pace).await,
            Drill::SlowClients => slow::run(pace).await,
            Drill::FewDescriptors => descriptors::run(pace).await,
            Drill::Soak => soak::run(pace).await,
        }
    }
}

// === impl Promise ===

impl Promise {
    pub(crate) const fn new(measure: Measure, at_most: f64) -> Self {
        Self { measure, at_most }
    }

    /// That none of these requests fails.
    pub(crate) const fn none_of(which: Which) -> Self {
        Self::new(Measure::Failed(which), 0.0)
    }

    /// `None` when it was not measured.
    fn is_kept(&self, finding: &Finding) -> Option<bool> {
        Some(finding.measured(self.measure)? <= self.at_most)
    }
}

impl fmt::Display for Promise {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} ≤ {}", self.measure, self.at_most)
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(which) => write!(out, "failed {which}"),
            Self::Recovery => out.write_str("s to recover"),
            Self::StableTail => out.write_str("stable's p99, broken by sound canary"),
            Self::ClientKib => out.write_str("KiB per slow client"),
            Self::OthersTail => out.write_str("ms p99 of others"),
            Self::IdleCpu => out.write_str("CPU with nothing to do"),
            Self::Crashes => out.write_str("crashes"),
            Self::MemoryGrowth => out.write_str("memory, last by first tenth"),
            Self::DescriptorGrowth => out.write_str("descriptors, last by first tenth"),
        }
    }
}

// === impl Pace ===

impl Pace {
    /// This long, or a fraction of it.
    pub(crate) fn time(&self, full: Duration) -> Duration {
        if self.quick { full / 5 } else { full }
    }

    /// So many, or a fraction of it.
    pub(crate) fn count(&self, full: usize) -> usize {
        if self.quick { full.div_ceil(10) } else { full }
    }

    /// How long clients wait: longer than Serin needs to find out that a version hangs, and to ask
    /// another one.
    pub(crate) fn patience(&self) -> Duration {
        Duration::from_secs(5)
    }
}

// === impl Finding ===

impl Finding {
    /// A row that was not run to its end, and why.
    pub(crate) fn cut_short(end: End, why: String) -> Self {
        Self {
            seen: why,
            end,
            ..Self::default()
        }
    }

    /// What a record says, of a fault that lasted for this long.
    pub(crate) fn new(record: &Record, fault: Span) -> Self {
        let recovery = record.recovery(fault);
        let before = Span {
            from: Duration::ZERO,
            to: fault.from,
        };
        let mut finding = Self {
            seen: seen(record),
            tried: Some(record.tried(Which::ALL)),
            recovery: Some(recovery),
            ..Self::default()
        };
        finding.latencies = [Which::STABLE, Which::CANARY].map(|group| {
            let [before, during] = [before, fault].map(|span| match record.latency(group, span) {
                Some(latency) => [millis(latency.p50), millis(latency.p99)],
                None => ["-".into(), "-".into()],
            });
            Some(format!(
                "{} → {}, {} → {}",
                before[0], during[0], before[1], during[1]
            ))
        });
        finding.measure(Measure::Recovery, recovery.duration().as_secs_f64());
        finding.count_failures(record);
        finding
    }

    /// Counts the failures of a record, of everybody and of some.
    pub(crate) fn count_failures(&mut self, record: &Record) {
        self.failed = Some(record.failed(Which::ALL));
        for which in [
            Which::ALL,
            Which::GETS,
            Which::GETS_NOT_CUT_OFF,
            Which::STABLE,
            Which::CANARY,
        ] {
            self.measure(Measure::Failed(which), record.failed(which) as f64);
        }
    }

    /// Notes whether the process ended by itself.
    pub(crate) fn measure_crash(&mut self, has_crashed: bool) {
        self.measure(Measure::Crashes, f64::from(u8::from(has_crashed)));
    }

    pub(crate) fn measure(&mut self, measure: Measure, value: f64) {
        self.measured.push((measure, value));
    }

    /// Says something more of what was seen.
    pub(crate) fn add(&mut self, text: &str) {
        self.seen.push_str("; ");
        self.seen.push_str(text);
    }

    fn measured(&self, measure: Measure) -> Option<f64> {
        let mut measured = self.measured.iter();
        Some(measured.find(|(known, _)| *known == measure)?.1)
    }

    pub(crate) fn is_as_promised(&self, row: &Row) -> bool {
        let mut promises = row.promises.iter();
        match self.end {
            End::Whole => promises.all(|promise| promise.is_kept(self) == Some(true)),
            End::NotSupported => true,
            End::Aborted => false,
        }
    }

    /// Each promise, with what was measured.
    pub(crate) fn verdict(&self, row: &Row) -> String {
        match self.end {
            End::Whole => {}
            End::NotSupported => return "not run".into(),
            End::Aborted => return "**broken off**".into(),
        }
        let promises = row.promises.iter().map(|promise| {
            let measured = self.measured(promise.measure).map_or("-".into(), number);
            match promise.is_kept(self) {
                Some(true) => format!("{promise}: {measured}"),
                _ => format!("**{promise}: {measured}, broken**"),
            }
        });
        promises.collect::<Vec<_>>().join("; ")
    }

    /// Some lines for whoever watches.
    pub(crate) fn for_people(&self, row: &Row) -> String {
        let count = |count: Option<usize>| count.map_or("-".into(), |count| count.to_string());
        let recovery = self.recovery.map_or("-".into(), |one| one.to_string());
        let [stable, canary] = self.latencies.each_ref();
        format!(
            "    seen: {}\n    tried {}, failed {}, recovery: {recovery}\n    ms, p50 and p99, before → during: \
             stable's {}; canary's {}\n    {}",
            self.seen,
            count(self.tried),
            count(self.failed),
            stable.as_deref().unwrap_or("-"),
            canary.as_deref().unwrap_or("-"),
            self.verdict(row),
        )
    }
}

/// What clients saw, in words.
pub(crate) fn seen(record: &Record) -> String {
    let kinds = record.kinds();
    let kinds = kinds.iter().map(|(kind, count)| format!("{kind} ×{count}"));
    let mut parts: Vec<String> = kinds.collect();
    if parts.is_empty() {
        parts.push("nothing".into());
    } else {
        let gets = record.failed(Which::GETS);
        let posts = record.failed(Which::ALL) - gets;
        let stable = record.failed(Which {
            group: Some(Group::Stable),
            ..Which::ALL
        });
        parts.push(format!(
            "{gets} GETs and {posts} POSTs, {stable} of stable's users"
        ));
    }
    parts.push(format!(
        "longest wait {:.2} s",
        record.longest().as_secs_f64()
    ));
    parts.join(", ")
}

/// Milliseconds with as many digits as make sense.
pub(crate) fn millis(duration: Duration) -> String {
    number(duration.as_secs_f64() * 1e3)
}

fn number(value: f64) -> String {
    match value {
        value if value == value.trunc() => format!("{value:.0}"),
        value if value.abs() < 10.0 => format!("{value:.2}"),
        value => format!("{value:.0}"),
    }
}
