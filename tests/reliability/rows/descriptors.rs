//! Serin with 64 descriptors, and more connections than that.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::Error;
use crate::client::{Connection, Request};
use crate::load::{Load, Plan, Rhythm, Users};
use crate::process::Launch;
use crate::record::{Record, Recovery, Which};
use crate::row::{Drill, Finding, Measure, Pace, Promise, Row, seen};
use crate::stage::{Stage, Wiring};

const DESCRIPTORS: u32 = 64;

/// Clients that connect, ask once, and stay.
const HOGS: usize = 200;

/// In a second, of each version's users: few enough for few connections.
const RATE: u32 = 50;

const LOAD: Duration = Duration::from_secs(5);

/// While nobody asks for anything.
const QUIET: Duration = Duration::from_secs(10);

/// In which it must recover.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn row() -> Row {
    Row {
        name: "few-descriptors".into(),
        fault: format!(
            "Serin may have {DESCRIPTORS} descriptors; {HOGS} clients connect, ask once, and keep their connections; \
             then they go"
        ),
        promises: vec![
            Promise::new(Measure::Crashes, 0.0),
            Promise::new(Measure::IdleCpu, 0.1),
            Promise::new(Measure::Recovery, 5.0),
            // Those that came once the others had gone.
            Promise::none_of(Which::ALL),
        ],
        drill: Drill::FewDescriptors,
    }
}

pub(crate) async fn run(pace: &Pace) -> Result<Finding, Error> {
    let launch = Launch::WithDescriptors(DESCRIPTORS);
    let mut stage = Stage::set(pace, launch, Wiring::Nothing, |_| {}).await?;
    let plan = Plan {
        stable: Rhythm::Steady(RATE),
        canary: Rhythm::Steady(RATE),
        ..Plan::new(stage.serin.address(), pace.patience())
    };
    let hogs = hogs(plan.address).await?;
    let crowded = ask(&plan, &stage.users, pace).await?;
    // What nobody gets an answer to has been given up, and all is quiet.
    let cpu = stage.serin.process.cpu()?;
    let quiet = pace.time(QUIET);
    sleep(quiet).await;
    let cpu = (stage.serin.process.cpu()? - cpu).as_secs_f64() / quiet.as_secs_f64();
    drop(hogs);
    let recovered = recovered(plan.address, &stage.users).await?;
    let record = ask(&plan, &stage.users, pace).await?;

    let mut finding = Finding {
        seen: format!(
            "while {HOGS} others held on, of {} requests: {}; then, with nobody asking, Serin took {:.1} % of a core",
            crowded.tried(Which::ALL),
            seen(&crowded),
            cpu * 100.0,
        ),
        tried: Some(record.tried(Which::ALL)),
        recovery: Some(Recovery::After(recovered)),
        ..Finding::default()
    };
    finding.count_failures(&record);
    finding.measure(Measure::Recovery, recovered.as_secs_f64());
    finding.measure(Measure::IdleCpu, cpu);
    finding.measure_crash(stage.serin.process.end()?.is_some());
    Ok(finding)
}

async fn hogs(address: SocketAddr) -> Result<Vec<TcpStream>, Error> {
    let mut hogs = Vec::new();
    for number in 0..HOGS {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!(
            "GET /bytes/1 HTTP/1.1\r\nhost: shop.example.com\r\nx-user-id: hog-{number}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        hogs.push(stream);
    }
    Ok(hogs)
}

async fn ask(plan: &Plan, users: &Users, pace: &Pace) -> Result<Record, Error> {
    let load = Load::start(plan, users);
    sleep(pace.time(LOAD)).await;
    load.stop().await
}

/// How long it takes until somebody of each version is served.
async fn recovered(address: SocketAddr, users: &Users) -> Result<Duration, Error> {
    let begun = Instant::now();
    let one_of_each = [&users.stable, &users.canary].map(|users| users.first());
    for user in one_of_each.into_iter().flatten() {
        let request = Request::get("/bytes/1", user, 1);
        timeout(PATIENCE, served(address, &request))
            .await
            .map_err(|_| format!("nobody is served {PATIENCE:?} later"))?;
    }
    Ok(begun.elapsed())
}

async fn served(address: SocketAddr, request: &Request) {
    loop {
        if let Ok(mut connection) = Connection::open(address).await {
            let answer = connection.exchange(request).await;
            if answer.is_ok_and(|answer| answer.status == 200) {
                return;
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
}
