//! The table: how each version does, read from the same metrics that Prometheus scrapes.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::time::Instant;

use super::Screen;

/// Rates and quantiles are those of this many ticks.
const WINDOW: usize = 10;

/// Draws how the versions compare.
#[derive(Debug)]
pub(super) struct Table {
    /// The last samples, oldest first.
    samples: VecDeque<(Instant, Sample)>,
    lines_drawn: usize,
}

/// What the metrics said at one moment, by backend.
type Sample = BTreeMap<String, Counts>;

#[derive(Clone, Debug, Default)]
struct Counts {
    version: String,
    requests: f64,
    errors: f64,
    /// Cumulative counts by upper bound in seconds.
    buckets: Vec<(f64, f64)>,
}

// === impl Table ===

impl Table {
    /// A table of what happens from now on.
    pub(super) fn new(exposition: &str) -> Self {
        Self {
            samples: [(Instant::now(), sample(exposition))].into(),
            lines_drawn: 0,
        }
    }

    /// Takes a sample from `exposition`, and draws.
    pub(super) fn draw(&mut self, exposition: &str, screen: &mut Screen<'_>) {
        self.samples.push_back((Instant::now(), sample(exposition)));
        while self.samples.len() > WINDOW + 1 {
            self.samples.pop_front();
        }
        let text = self.text();
        if screen.is_terminal && self.lines_drawn > 0 {
            (screen.print)(&format!("\x1b[{}A\x1b[J", self.lines_drawn));
        }
        self.lines_drawn = text.lines().count();
        (screen.print)(&text);
    }

    fn text(&self) -> String {
        let mut text = format!(
            "{:<14} {:<9} {:>7} {:>10} {:>8} {:>8} {:>9} {:>9} {:>9}\n",
            "backend", "version", "share", "requests", "rate/s", "errors", "p50", "p95", "p99"
        );
        let (Some((from, first)), Some((to, last))) = (self.samples.front(), self.samples.back())
        else {
            return text;
        };
        let seconds = to.duration_since(*from).as_secs_f64();
        let all: f64 = last
            .iter()
            .map(|(name, counts)| counts.since(first.get(name)).requests)
            .sum();
        for (name, total) in last {
            let recent = total.since(first.get(name));
            let percent = |part: f64, whole: f64| {
                if whole > 0.0 {
                    100.0 * part / whole
                } else {
                    0.0
                }
            };
            let rate = if seconds > 0.0 {
                recent.requests / seconds
            } else {
                0.0
            };
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "{name:<14} {:<9} {:>5.1} % {:>10} {rate:>8.1} {:>6.2} % {:>9} {:>9} {:>9}",
                total.version,
                percent(recent.requests, all),
                total.requests,
                percent(recent.errors, recent.requests),
                milliseconds(recent.quantile(0.5)),
                milliseconds(recent.quantile(0.95)),
                milliseconds(recent.quantile(0.99)),
            );
        }
        text
    }
}

// === impl Counts ===

impl Counts {
    fn since(&self, earlier: Option<&Self>) -> Self {
        let Some(earlier) = earlier else {
            return self.clone();
        };
        let before = |bound: f64| {
            earlier
                .buckets
                .iter()
                .find(|(known, _)| *known == bound)
                .map_or(0.0, |(_, count)| *count)
        };
        Self {
            version: self.version.clone(),
            requests: self.requests - earlier.requests,
            errors: self.errors - earlier.errors,
            buckets: self
                .buckets
                .iter()
                .map(|(bound, count)| (*bound, count - before(*bound)))
                .collect(),
        }
    }

    /// As PromQL's `histogram_quantile`: linear within the bucket. Seconds; `None` without samples.
    fn quantile(&self, quantile: f64) -> Option<f64> {
        let total = self
            .buckets
            .last()
            .map(|(_, count)| *count)
            .filter(|total| *total > 0.0)?;
        let rank = quantile * total;
        let mut below = (0.0, 0.0);
        for (bound, count) in &self.buckets {
            if *count >= rank {
                let (lower, counted) = below;
                return Some(match bound.is_finite() {
                    true => lower + (bound - lower) * (rank - counted) / (count - counted),
                    false => lower,
                });
            }
            below = (*bound, *count);
        }
        None
    }
}

fn sample(exposition: &str) -> Sample {
    let mut sample = Sample::new();
    for line in exposition.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else {
            continue;
        };
        let (Some((name, labels)), Ok(value)) = (series.split_once('{'), value.parse::<f64>())
        else {
            continue;
        };
        let Some(backend) = label(labels, "backend").filter(|backend| !backend.starts_with('_'))
        else {
            continue;
        };
        match name {
            "serin_requests_total" => {
                let counts = sample.entry(backend.to_owned()).or_default();
                counts.version = label(labels, "version").unwrap_or_default().to_owned();
                counts.requests += value;
                if label(labels, "code").is_some_and(|code| code.starts_with('5')) {
                    counts.errors += value;
                }
            }
            "serin_request_duration_seconds_bucket" => {
                let bound = label(labels, "le")
                    .and_then(|le| le.parse().ok())
                    .unwrap_or(f64::INFINITY);
                sample
                    .entry(backend.to_owned())
                    .or_default()
                    .buckets
                    .push((bound, value));
            }
            _ => {}
        }
    }
    sample
}

fn label<'l>(labels: &'l str, name: &str) -> Option<&'l str> {
    let start = labels.find(&format!("{name}=\""))? + name.len() + 2;
    labels[start..].split('"').next()
}

fn milliseconds(seconds: Option<f64>) -> String {
    seconds.map_or_else(
        || "-".to_owned(),
        |seconds| format!("{:.1} ms", seconds * 1e3),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPOSITION: &str = r#"# TYPE serin_requests_total counter
serin_requests_total{route="shop",backend="shop-canary",version="1.9.0",method="GET",code="200",protocol="http1"} 98
serin_requests_total{route="shop",backend="shop-canary",version="1.9.0",method="GET",code="500",protocol="http1"} 2
serin_requests_total{route="_NONE",backend="_NONE",version="_NONE",method="GET",code="404",protocol="http1"} 7
serin_request_duration_seconds_bucket{route="shop",backend="shop-canary",version="1.9.0",le="0.01"} 50
serin_request_duration_seconds_bucket{route="shop",backend="shop-canary",version="1.9.0",le="0.02"} 90
serin_request_duration_seconds_bucket{route="shop",backend="shop-canary",version="1.9.0",le="+Inf"} 100
"#;

    #[test]
    fn versions_are_read_from_the_metrics() {
        let sample = sample(EXPOSITION);
        assert_eq!(sample.keys().collect::<Vec<_>>(), ["shop-canary"]);
        let canary = &sample["shop-canary"];
        assert_eq!(
            (canary.requests, canary.errors, canary.version.as_str()),
            (100.0, 2.0, "1.9.0")
        );
        assert_eq!(canary.quantile(0.25), Some(0.005));
        assert_eq!(canary.quantile(0.7), Some(0.015));
        assert_eq!(canary.quantile(0.99), Some(0.02));
        assert_eq!(Counts::default().quantile(0.5), None);
    }

    #[test]
    fn the_table_is_drawn_over_on_a_terminal_only() {
        for is_terminal in [true, false] {
            let mut output = String::new();
            let mut table = Table::new("");
            let mut print = |text: &str| output.push_str(text);
            let mut screen = Screen {
                print: &mut print,
                is_terminal,
            };
            table.draw(EXPOSITION, &mut screen);
            table.draw(EXPOSITION, &mut screen);
            assert_eq!(output.contains('\x1b'), is_terminal);
            assert!(output.contains("shop-canary    1.9.0"), "{output}");
        }
    }
}
