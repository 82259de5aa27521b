//! A canary that is broken altogether: nobody's GET fails, and stable is as fast as ever.
//!
//! Two Serins with the same stable are asked in turn, in windows: one has a sound canary, the other
//! a broken one. So what a machine does by itself falls on both, and nothing that Serin has learned
//! in one window is carried into the other.

use std::time::Duration;

use tokio::time::sleep;

use crate::Error;
use crate::fault::{Fault, When};
use crate::load::{Load, Plan, Rhythm, Users};
use crate::process::{Launch, Serin};
use crate::record::{Record, Span, Which, median};
use crate::row::{Drill, Finding, Measure, Pace, Promise, Row, millis};
use crate::stage::{Upstreams, Wiring, users};

/// Windows of either kind.
const WINDOWS: usize = 20;
const WINDOW: Duration = Duration::from_secs(3);

/// What of a window is not looked at, while connections are made.
const BEGINNING: Duration = Duration::from_millis(300);

/// Requests of stable's users in a second: enough that a window has a p99.
const STABLE_RATE: u32 = 600;
const CANARY_RATE: u32 = 100;

/// How the canary is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Refuses,
    Resets,
    Fails,
    Hangs,
}

/// The windows of one kind.
#[derive(Default)]
struct Windows {
    record: Record,
    /// Of stable's users, in each window.
    p50: Vec<Duration>,
    p99: Vec<Duration>,
}

pub(crate) fn rows() -> Vec<Row> {
    let all = [
        (How::Refuses, "refuses", "refuses connections"),
        (How::Resets, "resets", "resets before the response"),
        (How::Fails, "fails", "answers 500"),
        (How::Hangs, "hangs", "accepts, and never answers"),
    ];
    let rows = all.map(|(how, name, what)| Row {
        name: format!("broken-canary-{name}"),
        fault: format!(
            "the canary {what}, all the time; {STABLE_RATE} requests a second of stable's users, {CANARY_RATE} of the canary's"
        ),
        promises: vec![
            Promise::none_of(Which::STABLE),
            Promise::none_of(Which::GETS),
            Promise::new(Measure::StableTail, 1.1),
        ],
        drill: Drill::Broken(how),
    });
    rows.into()
}

pub(crate) async fn run(how: How, pace: &Pace) -> Result<Finding, Error> {
    let upstreams = Upstreams::start().await?;
    let directory = tempfile::tempdir()?;
    let sound = upstreams.config(Wiring::Nothing);
    let mut broken = sound.clone();
    // The same canary cannot be sound for one and answer 500 to the other.
    let mut failing = crate::process::Upstream::start("failing").await?;
    failing.answer_with(500).await?;
    broken.canary = match how {
        How::Fails => vec![failing.address()],
        How::Refuses | How::Resets | How::Hangs => vec![upstreams.before_canary.address()],
    };
    let start =
        async |config| Serin::start(&pace.serin, directory.path(), config, Launch::Plainly).await;
    let (sound, broken) = (start(&sound).await?, start(&broken).await?);
    let users = users(sound.address()).await?;
    let fault = match how {
        How::Refuses => Fault::Refuse,
        How::Resets => Fault::Reset(When::BeforeHead),
        How::Hangs => Fault::BlackHole,
        How::Fails => Fault::Nothing,
    };
    upstreams.before_canary.set(fault).await?;
    let [undisturbed, disturbed] = windows(&sound, &broken, &users, pace).await?;
    finding(&undisturbed, &disturbed)
}

async fn windows(
    sound: &Serin,
    broken: &Serin,
    users: &Users,
    pace: &Pace,
) -> Result<[Windows; 2], Error> {
    let (mut undisturbed, mut disturbed) = (Windows::default(), Windows::default());
    // One of each, that does not count: nobody has connections yet.
    undisturbed.measure(sound, users, pace).await?;
    disturbed.measure(broken, users, pace).await?;
    // Those of a broken canary count for what fails.
    undisturbed.forget_latencies();
    disturbed.forget_latencies();
    for turn in 0..pace.count(WINDOWS) {
        // Neither kind is always the first.
        if turn % 2 == 0 {
            undisturbed.measure(sound, users, pace).await?;
            disturbed.measure(broken, users, pace).await?;
        } else {
            disturbed.measure(broken, users, pace).await?;
            undisturbed.measure(sound, users, pace).await?;
        }
    }
    Ok([undisturbed, disturbed])
}

fn finding(undisturbed: &Windows, disturbed: &Windows) -> Result<Finding, Error> {
    let mut finding = Finding::new(&disturbed.record, Span::ALL);
    // There is no before in windows that are disturbed all the time.
    finding.recovery = None;
    let middle = |values: &[Duration]| median(values).ok_or("no windows");
    let (p50, p99) = (middle(&undisturbed.p50)?, middle(&undisturbed.p99)?);
    let (p50_broken, p99_broken) = (middle(&disturbed.p50)?, middle(&disturbed.p99)?);
    finding.latencies[0] = Some(format!(
        "{} → {}, {} → {} (medians of {} windows)",
        millis(p50),
        millis(p50_broken),
        millis(p99),
        millis(p99_broken),
        disturbed.p99.len(),
    ));
    let ratio = p99_broken.as_secs_f64() / p99.as_secs_f64();
    finding.measure(Measure::StableTail, ratio);
    let sound = undisturbed.record.failed(Which::ALL);
    if sound > 0 {
        finding.add(&format!("{sound} failed with a sound canary"));
    }
    Ok(finding)
}

// === impl Windows ===

impl Windows {
    async fn measure(&mut self, serin: &Serin, users: &Users, pace: &Pace) -> Result<(), Error> {
        let plan = Plan {
            stable: Rhythm::Steady(STABLE_RATE),
            canary: Rhythm::Steady(CANARY_RATE),
            ..Plan::new(serin.address(), pace.patience())
        };
        let load = Load::start(&plan, users);
        sleep(pace.time(WINDOW).max(BEGINNING * 3)).await;
        let record = load.stop().await?;
        let span = Span {
            from: BEGINNING,
            ..Span::ALL
        };
        let latency = record.latency(Which::STABLE, span);
        let latency = latency.ok_or("nothing was answered in a window")?;
        self.p50.push(latency.p50);
        self.p99.push(latency.p99);
        self.record.add(&record);
        Ok(())
    }

    fn forget_latencies(&mut self) {
        self.p50.clear();
        self.p99.clear();
    }
}
