//! Serin itself is replaced under load: by a rolling update, as behind a Service of Kubernetes, and
//! in place, by `--takeover`.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::Error;
use crate::fault::FaultProxy;
use crate::load::{BODY, Load, Plan};
use crate::process::{Launch, Serin, is_ready};
use crate::record::{Span, Which};
use crate::row::{Drill, End, Finding, Measure, Pace, Promise, Row};
use crate::stage::{Stage, Wiring};

const TIMES: usize = 20;

const BEFORE: Duration = Duration::from_secs(3);
const AFTER: Duration = Duration::from_secs(3);

/// Between two takeovers: the next can come when the one before listens for it.
const PAUSE: Duration = Duration::from_millis(500);

/// How often readiness is asked for. Until it is noticed, connections go to whoever was ready.
const PROBE: Duration = Duration::from_millis(200);

/// How long a process may take to end.
const END: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Rolling,
    Takeover,
}

pub(crate) fn rows() -> Vec<Row> {
    let all = [
        (
            How::Rolling,
            "rolling-restart",
            "SIGTERM to one of two Serins behind a TCP balancer that asks /readyz every 0.2 s, once the other is ready, 20 times",
        ),
        (
            How::Takeover,
            "takeover",
            "another Serin takes over with `--takeover`, 20 times",
        ),
    ];
    let rows = all.map(|(how, name, what)| Row {
        name: name.into(),
        fault: format!("{what}; responses take 20 ms"),
        promises: vec![
            Promise::none_of(Which::ALL),
            Promise::new(Measure::Crashes, 0.0),
        ],
        drill: Drill::Restart(how),
    });
    rows.into()
}

pub(crate) async fn run(how: How, pace: &Pace) -> Result<Finding, Error> {
    let directory = tempfile::tempdir()?;
    let launch = match how {
        How::Rolling => Launch::Plainly,
        How::Takeover => Launch::TakingOver(directory.path().join("takeover.sock")),
    };
    if !launch.is_known_to(&pace.serin).await? {
        return Ok(Finding::cut_short(
            End::NotSupported,
            "not supported by this build: `serin run --help` names no --takeover".into(),
        ));
    }
    let mut stage = Stage::set(pace, launch, Wiring::Nothing, |_| {}).await?;
    let service = Service::of(&stage.serin)?;
    let plan = Plan {
        path: format!("/slow/{BODY}/20"),
        ..Plan::new(
            match how {
                How::Rolling => service.front.address(),
                How::Takeover => stage.serin.address(),
            },
            pace.patience(),
        )
    };
    let load = Load::start(&plan, &stage.users);
    sleep(pace.time(BEFORE)).await;
    let from = load.now();
    let mut crashes = 0;
    for _ in 0..pace.count(TIMES) {
        crashes += usize::from(!match how {
            How::Rolling => roll(&mut stage, &service, pace).await?,
            How::Takeover => take_over(&mut stage.serin).await?,
        });
    }
    let to = load.now();
    sleep(pace.time(AFTER)).await;
    let record = load.stop().await?;
    let mut finding = Finding::new(&record, Span { from, to });
    finding.measure(Measure::Crashes, crashes as f64);
    let each = (to - from) / pace.count(TIMES) as u32;
    finding.add(&format!("{:.1} s for each", each.as_secs_f64()));
    let closed = record.closed_idle();
    finding.add(&format!("{closed} connections closed while idle"));
    Ok(finding)
}

/// Returns whether the old process ended as it should.
async fn roll(stage: &mut Stage, service: &Service, pace: &Pace) -> Result<bool, Error> {
    let config = stage.upstreams.config(Wiring::Nothing);
    let new = Serin::start(
        &pace.serin,
        stage.directory.path(),
        &config,
        Launch::Plainly,
    )
    .await?;
    service.join(&new).await?;
    let mut old = std::mem::replace(&mut stage.serin, new);
    old.process.signal(Signal::TERM)?;
    let ended = old.process.ended(END).await?;
    service.leave(&old);
    Ok(ended.success())
}

/// Returns whether the old process ended as it should.
async fn take_over(serin: &mut Serin) -> Result<bool, Error> {
    let mut old = serin.succeed()?;
    let ended = old.ended(END).await?;
    serin.wait_until_ready().await?;
    sleep(PAUSE).await;
    Ok(ended.success())
}

/// What a Service of Kubernetes does: sends new connections to whoever is ready, and leaves those
/// alone that stand.
struct Service {
    front: Arc<FaultProxy>,
    members: Arc<Mutex<Vec<Member>>>,
    ready: watch::Receiver<Vec<SocketAddr>>,
    prober: JoinHandle<()>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Member {
    web: SocketAddr,
    admin: SocketAddr,
}

impl Service {
    fn of(serin: &Serin) -> Result<Self, Error> {
        let front = Arc::new(FaultProxy::start(serin.address())?);
        let members = Arc::new(Mutex::new(vec![Member::of(serin)]));
        let (sender, ready) = watch::channel(Vec::new());
        let prober = tokio::spawn(probe(Arc::clone(&front), Arc::clone(&members), sender));
        Ok(Self {
            front,
            members,
            ready,
            prober,
        })
    }

    /// Takes one more in, and waits until connections go there.
    async fn join(&self, serin: &Serin) -> Result<(), Error> {
        let member = Member::of(serin);
        self.members().push(member);
        let mut ready = self.ready.clone();
        ready.wait_for(|ready| ready.contains(&member.web)).await?;
        Ok(())
    }

    fn leave(&self, serin: &Serin) {
        let gone = Member::of(serin);
        self.members().retain(|member| *member != gone);
    }

    fn members(&self) -> std::sync::MutexGuard<'_, Vec<Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.prober.abort();
    }
}

impl Member {
    fn of(serin: &Serin) -> Self {
        Self {
            web: serin.address(),
            admin: serin.admin(),
        }
    }
}

async fn probe(
    front: Arc<FaultProxy>,
    members: Arc<Mutex<Vec<Member>>>,
    sender: watch::Sender<Vec<SocketAddr>>,
) {
    loop {
        let now = members
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let mut ready = Vec::new();
        for member in now {
            if is_ready(member.admin).await {
                ready.push(member.web);
            }
        }
        front.point_at(&ready);
        sender.send_replace(ready);
        sleep(PROBE).await;
    }
}
