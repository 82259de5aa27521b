//! Faults of one endpoint: of the canary's only one, or of one among three of stable.

use std::time::Duration;

use tokio::time::sleep;

use crate::Error;
use crate::fault::{Fault, FaultProxy, Shape, Slices, When};
use crate::load::{BODY, Load, Plan, Rhythm};
use crate::process::{Launch, Upstream};
use crate::record::{Span, Which};
use crate::row::{Drill, Finding, Measure, Pace, Promise, Row};
use crate::stage::{Stage, Wiring};

/// `pool.idleTimeout` in the row about it.
const POOL_IDLE: Duration = Duration::from_millis(300);

/// How often an endpoint is replaced.
const SWAPS: usize = 50;

/// How long an endpoint that was replaced goes on, for what it is just answering.
const AFTERLIFE: Duration = Duration::from_millis(200);

const WARM_UP: Duration = Duration::from_secs(1);
const BEFORE: Duration = Duration::from_secs(5);
const DURING: Duration = Duration::from_secs(10);
const AFTER: Duration = Duration::from_secs(5);

/// Where it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Canary,
    OneOfThree,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Cause {
    /// Something between Serin and the endpoint.
    Network(Fault),
    /// As `Network`, while requests come just when the pool gives its connections up.
    IdleClose,
    /// Every response has this status.
    Status(u16),
    /// SIGKILL while responses are being sent; started again when the fault ends.
    Kill,
    /// Another process at another address takes over, by a changed configuration, again and again.
    Swaps,
}

struct Described {
    name: &'static str,
    what: &'static str,
    cause: Cause,
    /// What cannot be put right by anybody: responses that had begun.
    unavoidable: f64,
}

const ALL: &[Described] = &[
    Described {
        name: "refuse",
        what: "refuses connections, and has reset those that stood",
        cause: Cause::Network(Fault::Refuse),
        unavoidable: 0.0,
    },
    Described {
        name: "reset-at-connect",
        what: "resets connections as soon as it has accepted them",
        cause: Cause::Network(Fault::Reset(When::Connect)),
        unavoidable: 0.0,
    },
    Described {
        name: "reset-before-head",
        what: "takes requests and resets before the response",
        cause: Cause::Network(Fault::Reset(When::BeforeHead)),
        unavoidable: 0.0,
    },
    Described {
        name: "reset-after-head",
        what: "resets after the head of the response",
        cause: Cause::Network(Fault::Reset(When::AfterHead)),
        // Until it is found out; the others pass in spite of it.
        unavoidable: 40.0,
    },
    Described {
        name: "reset-mid-body",
        what: "resets after the head and a quarter of the body",
        cause: Cause::Network(Fault::Reset(When::InBody(BODY as u64 / 4))),
        unavoidable: 40.0,
    },
    Described {
        name: "hang",
        what: "accepts, and never answers",
        cause: Cause::Network(Fault::BlackHole),
        unavoidable: 0.0,
    },
    Described {
        name: "trickle",
        what: "sends 256 bytes, and then a pause of 50 ms, and so on",
        cause: Cause::Network(Fault::Shape(Shape {
            latency: Duration::ZERO,
            jitter: Duration::ZERO,
            bandwidth: None,
            slices: Some(Slices {
                bytes: 256,
                pause: Duration::from_millis(50),
            }),
        })),
        unavoidable: 0.0,
    },
    Described {
        name: "idle-close",
        what: "closes idle connections exactly at the pool's timeout (300 ms), which is when bursts of 20 requests come",
        cause: Cause::IdleClose,
        unavoidable: 0.0,
    },
    Described {
        name: "half-close",
        what: "answers by closing its direction (FIN), and goes on reading",
        cause: Cause::Network(Fault::HalfClose),
        unavoidable: 0.0,
    },
    Described {
        name: "garbage",
        what: "answers with something else than HTTP",
        cause: Cause::Network(Fault::Garbage),
        unavoidable: 0.0,
    },
    Described {
        name: "kill",
        what: "dies by SIGKILL in the middle of responses (20 ms between their halves), and comes back",
        cause: Cause::Kill,
        // What is between its halves at 150 GETs a second, and some more that wait.
        unavoidable: 20.0,
    },
    Described {
        name: "status-503",
        what: "answers 503",
        cause: Cause::Status(503),
        unavoidable: 0.0,
    },
    Described {
        name: "swap",
        what: "is replaced by another process at another address, 50 times, and killed 0.2 s later",
        cause: Cause::Swaps,
        unavoidable: 0.0,
    },
];

pub(crate) fn rows() -> Vec<Row> {
    let places = [Place::Canary, Place::OneOfThree];
    let rows = ALL.iter().flat_map(|described| {
        places.map(|place| {
            let (suffix, subject) = match place {
                Place::Canary => ("canary", "the canary"),
                Place::OneOfThree => ("one-of-three", "one of three of stable"),
            };
            Row {
                name: format!("{}-{suffix}", described.name),
                fault: format!("{subject} {}", described.what),
                promises: promises(described, place),
                drill: Drill::Fault(described.cause, place),
            }
        })
    });
    rows.collect()
}

fn promises(described: &Described, place: Place) -> Vec<Promise> {
    let spared = match place {
        Place::Canary => Which::STABLE,
        Place::OneOfThree => Which::CANARY,
    };
    let mut promises = vec![
        Promise::none_of(spared),
        Promise::new(Measure::Crashes, 0.0),
    ];
    promises.extend(match described.cause {
        // What was never sent, or nothing is wrong with, cannot fail.
        Cause::Swaps | Cause::Network(Fault::Refuse | Fault::Shape(_)) => {
            vec![Promise::none_of(Which::ALL)]
        }
        // Nothing is sent again once an endpoint has answered, also if its client has not heard of it.
        Cause::Network(Fault::Reset(When::AfterHead)) => {
            vec![Promise::new(
                Measure::Failed(Which::GETS),
                described.unavoidable,
            )]
        }
        _ if described.unavoidable > 0.0 => vec![
            Promise::none_of(Which::GETS_NOT_CUT_OFF),
            Promise::new(Measure::Failed(Which::GETS), described.unavoidable),
        ],
        _ => vec![Promise::none_of(Which::GETS)],
    });
    promises
}

pub(crate) async fn run(cause: Cause, place: Place, pace: &Pace) -> Result<Finding, Error> {
    let wiring = match cause {
        Cause::Network(_) | Cause::IdleClose => Wiring::Proxied,
        Cause::Status(_) | Cause::Kill | Cause::Swaps => Wiring::Nothing,
    };
    let mut stage = Stage::set(pace, Launch::Plainly, wiring, |config| {
        config.pool_idle = (cause == Cause::IdleClose).then_some(POOL_IDLE);
    })
    .await?;
    let plan = plan(cause, place, pace, &stage);
    warm_up(&plan, &stage).await?;
    let load = Load::start(&plan, &stage.users);
    sleep(pace.time(BEFORE)).await;
    let from = load.now();
    inflict(cause, place, pace, &mut stage).await?;
    let to = load.now();
    sleep(pace.time(AFTER)).await;
    let record = load.stop().await?;
    let mut finding = Finding::new(&record, Span { from, to });
    finding.measure_crash(stage.serin.process.end()?.is_some());
    Ok(finding)
}

fn plan(cause: Cause, place: Place, pace: &Pace, stage: &Stage) -> Plan {
    let mut plan = Plan::new(stage.serin.address(), pace.patience());
    match cause {
        Cause::Kill => plan.path = format!("/slow/{BODY}/20"),
        Cause::IdleClose => {
            let bursts = Rhythm::Bursts {
                size: 20,
                pause: POOL_IDLE,
                give: Duration::from_millis(4),
            };
            match place {
                Place::Canary => plan.canary = bursts,
                Place::OneOfThree => plan.stable = bursts,
            }
        }
        _ => {}
    }
    plan
}

async fn warm_up(plan: &Plan, stage: &Stage) -> Result<(), Error> {
    let load = Load::start(plan, &stage.users);
    sleep(WARM_UP).await;
    load.stop().await?;
    Ok(())
}

/// Begins a fault, waits, and ends it.
async fn inflict(cause: Cause, place: Place, pace: &Pace, stage: &mut Stage) -> Result<(), Error> {
    match cause {
        Cause::Network(fault) => inflict_between(proxy(place, stage), fault, pace).await,
        Cause::IdleClose => {
            let fault = Fault::CloseIdle(POOL_IDLE);
            inflict_between(proxy(place, stage), fault, pace).await
        }
        Cause::Status(status) => {
            let upstream = upstream(place, stage);
            upstream.answer_with(status).await?;
            sleep(pace.time(DURING)).await;
            upstream.answer_with(200).await
        }
        Cause::Kill => {
            let upstream = upstream(place, stage);
            upstream.kill().await?;
            sleep(pace.time(DURING)).await;
            upstream.restart().await
        }
        Cause::Swaps => {
            for _ in 0..pace.count(SWAPS) {
                swap(place, stage).await?;
            }
            Ok(())
        }
    }
}

async fn inflict_between(proxy: &FaultProxy, fault: Fault, pace: &Pace) -> Result<(), Error> {
    proxy.set(fault).await?;
    sleep(pace.time(DURING)).await;
    Ok(proxy.set(Fault::Nothing).await?)
}

fn proxy(place: Place, stage: &Stage) -> &FaultProxy {
    match place {
        Place::Canary => &stage.upstreams.before_canary,
        Place::OneOfThree => &stage.upstreams.before_stable,
    }
}

fn upstream(place: Place, stage: &mut Stage) -> &mut Upstream {
    match place {
        Place::Canary => &mut stage.upstreams.canary,
        Place::OneOfThree => &mut stage.upstreams.stable[0],
    }
}

/// What a deployment does: starts the new, has it configured, and stops the old.
async fn swap(place: Place, stage: &mut Stage) -> Result<(), Error> {
    let new = Upstream::start("replaced").await?;
    let mut old = std::mem::replace(upstream(place, stage), new);
    let config = stage.upstreams.config(Wiring::Nothing);
    stage.serin.reload(&config).await?;
    sleep(AFTERLIFE).await;
    old.kill().await
}
