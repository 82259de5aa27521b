//! What became of requests, and what follows from it; pure.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::client::Broken;

/// Users, by the version that they get while nothing is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Stable,
    Canary,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Post,
}

/// One request. Times count from the beginning of the load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) group: Group,
    pub(crate) method: Method,
    pub(crate) sent: Duration,
    pub(crate) took: Duration,
    pub(crate) outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// A whole response with this status.
    Answered(u16),
    Broken(Broken),
}

/// Some of the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Which {
    /// Everybody's, when `None`.
    pub(crate) group: Option<Group>,
    /// Either, when `None`.
    pub(crate) method: Option<Method>,
    pub(crate) cut_off: CutOff,
}

/// Whether responses that broke off count. When a version breaks off its response, nobody can put
/// that right any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CutOff {
    Counts,
    LeftOut,
}

/// All requests of a load.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record {
    samples: Vec<Sample>,
    closed_idle: usize,
}

/// A part of a load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) from: Duration,
    pub(crate) to: Duration,
}

/// When the last request that failed was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recovery {
    /// None failed.
    Unharmed,
    /// So long after the fault began, which goes on.
    During(Duration),
    /// So long after the fault ended.
    After(Duration),
}

/// Latencies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latency {
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
}

// === impl Outcome ===

impl Outcome {
    pub(crate) fn is_failure(self) -> bool {
        self != Self::Answered(200)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(status) => write!(out, "{status}"),
            Self::Broken(broken) => out.write_str(match broken {
                Broken::Connect => "no connection",
                Broken::Reset => "reset before the response",
                Broken::CutOff => "cut off in the response",
                Broken::Wrong => "wrong response",
                Broken::Timeout => "timeout",
            }),
        }
    }
}

// === impl Which ===

impl Which {
    pub(crate) const ALL: Self = Self {
        group: None,
        method: None,
        cut_off: CutOff::Counts,
    };
    pub(crate) const GETS: Self = Self {
        method: Some(Method::Get),
        ..Self::ALL
    };
    pub(crate) const STABLE: Self = Self {
        group: Some(Group::Stable),
        ..Self::ALL
    };
    pub(crate) const CANARY: Self = Self {
        group: Some(Group::Canary),
        ..Self::ALL
    };
    pub(crate) const GETS_NOT_CUT_OFF: Self = Self {
        cut_off: CutOff::LeftOut,
        ..Self::GETS
    };

    fn takes(self, sample: &Sample) -> bool {
        self.group.is_none_or(|group| group == sample.group)
            && self.method.is_none_or(|method| method == sample.method)
            && (self.cut_off == CutOff::Counts || sample.outcome != Outcome::Broken(Broken::CutOff))
    }
}

impl fmt::Display for Which {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self.group {
            None => "",
            Some(Group::Stable) => "stable's ",
            Some(Group::Canary) => "the canary's ",
        })?;
        out.write_str(match self.method {
            None => "requests",
            Some(Method::Get) => "GETs",
            Some(Method::Post) => "POSTs",
        })?;
        match self.cut_off {
            CutOff::Counts => Ok(()),
            CutOff::LeftOut => out.write_str(" that had no response yet"),
        }
    }
}

// === impl Record ===

impl Record {
    pub(crate) fn new(samples: Vec<Sample>, closed_idle: usize) -> Self {
        Self {
            samples,
            closed_idle,
        }
    }

    /// Adds what became of another load.
    pub(crate) fn add(&mut self, other: &Self) {
        self.samples.extend_from_slice(&other.samples);
        self.closed_idle += other.closed_idle;
    }

    /// Connections that the server closed while nobody used them, without having said so.
    pub(crate) fn closed_idle(&self) -> usize {
        self.closed_idle
    }

    pub(crate) fn tried(&self, which: Which) -> usize {
        let samples = self.samples.iter();
        samples.filter(|sample| which.takes(sample)).count()
    }

    pub(crate) fn failed(&self, which: Which) -> usize {
        self.failures().filter(|sample| which.takes(sample)).count()
    }

    /// How often each kind of failure was seen.
    pub(crate) fn kinds(&self) -> BTreeMap<Outcome, usize> {
        let mut kinds = BTreeMap::new();
        for sample in self.failures() {
            *kinds.entry(sample.outcome).or_default() += 1;
        }
        kinds
    }

    /// How a fault was overcome that lasted for this long.
    pub(crate) fn recovery(&self, fault: Span) -> Recovery {
        let ended = self.failures().map(|sample| sample.sent + sample.took);
        let last = ended.max();
        match last {
            None => Recovery::Unharmed,
            Some(last) if last > fault.to => Recovery::After(last - fault.to),
            Some(last) => Recovery::During(last.saturating_sub(fault.from)),
        }
    }

    /// Of what was answered well in this part of the load; `None` if nothing was.
    pub(crate) fn latency(&self, which: Which, span: Span) -> Option<Latency> {
        let samples = self.samples.iter().filter(|sample| {
            which.takes(sample) && !sample.outcome.is_failure() && span.holds(sample.sent)
        });
        let mut took: Vec<Duration> = samples.map(|sample| sample.took).collect();
        took.sort_unstable();
        let point = |part: f64| {
            let index = (took.len() as f64 * part) as usize;
            took.get(index).or(took.last()).copied()
        };
        Some(Latency {
            p50: point(0.5)?,
            p99: point(0.99)?,
        })
    }

    /// The longest that anybody waited, for whatever came of it.
    pub(crate) fn longest(&self) -> Duration {
        let took = self.samples.iter().map(|sample| sample.took);
        took.max().unwrap_or_default()
    }

    fn failures(&self) -> impl Iterator<Item = &Sample> {
        let samples = self.samples.iter();
        samples.filter(|sample| sample.outcome.is_failure())
    }
}

// === impl Span ===

impl Span {
    pub(crate) const ALL: Self = Self {
        from: Duration::ZERO,
        to: Duration::MAX,
    };

    fn holds(self, moment: Duration) -> bool {
        self.from <= moment && moment < self.to
    }
}

// === impl Recovery ===

impl Recovery {
    /// How long requests failed that were sent after the fault, or after it began if they ceased to
    /// fail in spite of it.
    pub(crate) fn duration(self) -> Duration {
        match self {
            Self::Unharmed => Duration::ZERO,
            Self::During(duration) | Self::After(duration) => duration,
        }
    }
}

impl fmt::Display for Recovery {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unharmed => out.write_str("none needed"),
            Self::During(duration) => {
                write!(out, "{:.2} s after it began", duration.as_secs_f64())
            }
            Self::After(duration) => write!(out, "{:.2} s after its end", duration.as_secs_f64()),
        }
    }
}

/// The one in the middle; the lower of two. `None` of nothing.
pub(crate) fn median<T: PartialOrd + Copy>(values: &[T]) -> Option<T> {
    let mut values = values.to_vec();
    values.sort_by(|one, other| one.partial_cmp(other).unwrap_or(std::cmp::Ordering::Equal));
    values.get(values.len().saturating_sub(1) / 2).copied()
}
