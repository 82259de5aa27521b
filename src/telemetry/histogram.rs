//! Latency histograms that a request can afford.
//!
//! The exporter's own keep every sample, with the time when it came, until somebody sorts them into
//! buckets: that costs the request two clock readings and an allocation now and then, and another
//! thread as much again. Here a sample is two additions. Each worker adds to a part of its own, so
//! that no two fight for a cache line; the parts are summed when somebody looks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use metrics::Label;
use metrics_exporter_prometheus::LabelSet;
use metrics_exporter_prometheus::formatting::write_metric_line;

/// The upper bounds of a histogram's buckets; ascending.
#[derive(Clone, Debug)]
pub struct Buckets {
    seconds: Arc<[f64]>,
    nanoseconds: Arc<[u64]>,
}

/// Counts durations by size.
#[derive(Debug)]
pub struct LatencyHistogram {
    buckets: Buckets,
    parts: Box<[Part]>,
}

/// What one worker has counted.
#[derive(Debug)]
struct Part {
    /// One more than there are bounds; each counts what is in no smaller bucket.
    counts: Box<[AtomicU64]>,
    sum_nanoseconds: AtomicU64,
}

// === impl Buckets ===

impl Buckets {
    /// Buckets with these upper bounds in seconds, which ascend.
    pub fn new(seconds: &[f64]) -> Self {
        let nanoseconds = seconds
            .iter()
            .map(|bound| Duration::try_from_secs_f64(*bound).map_or(u64::MAX, nanoseconds));
        Self {
            nanoseconds: nanoseconds.collect(),
            seconds: seconds.into(),
        }
    }

    /// The position of the bucket for a duration: its bound is the first that is not below it.
    fn position(&self, nanoseconds: u64) -> usize {
        self.nanoseconds
            .iter()
            .position(|bound| nanoseconds <= *bound)
            .unwrap_or(self.nanoseconds.len())
    }
}

// === impl LatencyHistogram ===

impl LatencyHistogram {
    /// A histogram with nothing in it, for so many workers.
    pub fn new(buckets: &Buckets, workers: usize) -> Self {
        let part = |_| Part {
            counts: (0..=buckets.seconds.len())
                .map(|_| AtomicU64::new(0))
                .collect(),
            sum_nanoseconds: AtomicU64::new(0),
        };
        Self {
            buckets: buckets.clone(),
            parts: (0..workers.max(1)).map(part).collect(),
        }
    }

    /// Counts a duration; `worker` says whose part it goes to.
    pub fn record(&self, worker: usize, duration: Duration) {
        let part = &self.parts[worker % self.parts.len()];
        let nanoseconds = nanoseconds(duration);
        let position = self.buckets.position(nanoseconds);
        part.counts[position].fetch_add(1, Ordering::Relaxed);
        part.sum_nanoseconds
            .fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// True before anything was recorded.
    pub fn is_empty(&self) -> bool {
        let parts = self.parts.iter();
        let mut counts = parts.flat_map(|part| &part.counts);
        counts.all(|count| count.load(Ordering::Relaxed) == 0)
    }

    /// Writes it in the text format of Prometheus.
    pub fn render(&self, into: &mut String, name: &str, labels: &[(&'static str, &str)]) {
        let counts: Vec<u64> = (0..=self.buckets.seconds.len())
            .map(|bucket| self.sum(|part| &part.counts[bucket]))
            .collect();
        let count: u64 = counts.iter().sum();
        let labels: Vec<Label> = labels
            .iter()
            .map(|(name, value)| Label::new(*name, (*value).to_owned()))
            .collect();
        let labels = LabelSet::from_key_and_global(
            &metrics::Key::from_parts(name.to_owned(), labels),
            &Default::default(),
        );
        let mut line = |suffix, bound: Option<String>, value: String| {
            let bound = bound.map(|bound| ("le", bound));
            write_metric_line(into, name, Some(suffix), &labels, bound, value, None);
        };
        let mut below = 0;
        for (bound, count) in self.buckets.seconds.iter().zip(&counts) {
            below += count;
            line("bucket", Some(bound.to_string()), below.to_string());
        }
        line("bucket", Some("+Inf".to_owned()), count.to_string());
        let seconds = self.sum(|part| &part.sum_nanoseconds) as f64 / 1e9;
        line("sum", None, seconds.to_string());
        line("count", None, count.to_string());
    }

    fn sum(&self, of: impl Fn(&Part) -> &AtomicU64) -> u64 {
        let values = self.parts.iter().map(of);
        values.map(|value| value.load(Ordering::Relaxed)).sum()
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_counted_below_their_bounds_and_summed_over_workers() {
        let histogram = LatencyHistogram::new(&Buckets::new(&[0.001, 0.01, 1.0]), 2);
        assert!(histogram.is_empty());
        for (worker, milliseconds) in [(0, 1), (1, 1), (0, 10), (1, 11), (7, 2000)] {
            histogram.record(worker, Duration::from_millis(milliseconds));
        }
        assert!(!histogram.is_empty());
        let mut text = String::new();
        histogram.render(&mut text, "latency_seconds", &[("version", "1 \"b\"")]);
        let labels = r#"version="1 \"b\"""#;
        let expected = format!(
            "latency_seconds_bucket{{{labels},le=\"0.001\"}} 2
latency_seconds_bucket{{{labels},le=\"0.01\"}} 3
latency_seconds_bucket{{{labels},le=\"1\"}} 4
latency_seconds_bucket{{{labels},le=\"+Inf\"}} 5
latency_seconds_sum{{{labels}}} 2.023
latency_seconds_count{{{labels}}} 5
"
        );
        assert_eq!(text, expected);
    }
}
