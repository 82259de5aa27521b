//! The load: users who ask at a steady rate, whatever becomes of what they asked before.
//!
//! Each request is sent when it is due, on a connection that is free or on a new one, so that nothing
//! that waits keeps others from being asked ("open loop"), and no wait is overlooked.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use crate::Error;
use crate::client::{Broken, Connection, Request};
use crate::record::{Group, Method, Outcome, Record, Sample};

/// One request in so many is a POST.
const POST_EVERY: usize = 4;

/// The length of bodies.
pub(crate) const BODY: usize = 4096;

/// Users by the version that they get.
#[derive(Clone, Debug, Default)]
pub(crate) struct Users {
    pub(crate) stable: Vec<String>,
    pub(crate) canary: Vec<String>,
}

/// What is asked.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) address: SocketAddr,
    /// What each group asks for with GET.
    pub(crate) path: String,
    pub(crate) stable: Rhythm,
    pub(crate) canary: Rhythm,
    /// After which a client gives up.
    pub(crate) patience: Duration,
}

/// When a group asks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rhythm {
    /// So many times in a second.
    Steady(u32),
    /// So many at once, after each pause; a pause is up to so much shorter or longer.
    Bursts {
        size: usize,
        pause: Duration,
        give: Duration,
    },
}

/// A load that goes on until it is stopped.
#[derive(Debug)]
pub(crate) struct Load {
    begun: Instant,
    shared: Arc<Shared>,
    groups: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stopped: AtomicBool,
    closed_idle: AtomicUsize,
    samples: Mutex<Vec<Sample>>,
}

// === impl Plan ===

impl Plan {
    pub(crate) fn new(address: SocketAddr, patience: Duration) -> Self {
        Self {
            address,
            path: format!("/bytes/{BODY}"),
            stable: Rhythm::Steady(200),
            canary: Rhythm::Steady(200),
            patience,
        }
    }
}

// === impl Load ===

impl Load {
    pub(crate) fn start(plan: &Plan, users: &Users) -> Self {
        let shared = Arc::new(Shared {
            stopped: AtomicBool::new(false),
            closed_idle: AtomicUsize::new(0),
            samples: Mutex::default(),
        });
        let begun = Instant::now();
        let groups = [
            (Group::Stable, plan.stable, &users.stable),
            (Group::Canary, plan.canary, &users.canary),
        ];
        let groups = groups.map(|(group, rhythm, users)| {
            let crowd = Crowd {
                group,
                address: plan.address,
                patience: plan.patience,
                requests: requests(&plan.path, users),
                idle: Mutex::default(),
                shared: Arc::clone(&shared),
                begun,
            };
            tokio::spawn(Arc::new(crowd).run(rhythm))
        });
        Self {
            begun,
            shared,
            groups: groups.into(),
        }
    }

    /// How long it has gone on.
    pub(crate) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Sends nothing new, waits for what was sent, and returns what became of everything.
    pub(crate) async fn stop(self) -> Result<Record, Error> {
        self.shared.stopped.store(true, Ordering::SeqCst);
        for group in self.groups {
            group.await?;
        }
        let samples = std::mem::take(&mut *lock(&self.shared.samples));
        let closed_idle = self.shared.closed_idle.load(Ordering::SeqCst);
        Ok(Record::new(samples, closed_idle))
    }
}

/// The users of one version, with their connections.
struct Crowd {
    group: Group,
    address: SocketAddr,
    patience: Duration,
    requests: Vec<(Method, Request)>,
    /// The one that has been idle the longest in front, so that all are in use.
    idle: Mutex<VecDeque<Connection>>,
    shared: Arc<Shared>,
    begun: Instant,
}

impl Crowd {
    async fn run(self: Arc<Self>, rhythm: Rhythm) {
        let mut asked = Vec::new();
        let mut turn = 0;
        let mut metronome = Metronome::new(rhythm);
        while !self.shared.stopped.load(Ordering::SeqCst) {
            let count = metronome.next().await;
            // Not when a task gets to it: what waits for that waits as well.
            let due = self.begun.elapsed();
            for _ in 0..count {
                asked.push(tokio::spawn(Arc::clone(&self).ask(turn, due)));
                turn += 1;
            }
            if asked.len() > 1024 {
                asked.retain(|one| !one.is_finished());
            }
        }
        for one in asked {
            // It ends within the clients' patience; a panic would show on standard error.
            let _ = one.await;
        }
    }

    async fn ask(self: Arc<Self>, turn: usize, sent: Duration) {
        let (method, request) = &self.requests[turn % self.requests.len()];
        let exchange = timeout(self.patience, self.exchange(request)).await;
        let outcome = match exchange {
            Ok(Ok(status)) => Outcome::Answered(status),
            Ok(Err(broken)) => Outcome::Broken(broken),
            Err(_) => Outcome::Broken(Broken::Timeout),
        };
        let sample = Sample {
            group: self.group,
            method: *method,
            sent,
            took: self.begun.elapsed() - sent,
            outcome,
        };
        lock(&self.shared.samples).push(sample);
    }

    async fn exchange(&self, request: &Request) -> Result<u16, Broken> {
        let mut connection = match self.idle_connection() {
            Some(connection) => connection,
            None => {
                let opened = Connection::open(self.address).await;
                opened.map_err(|_| Broken::Connect)?
            }
        };
        let answer = connection.exchange(request).await?;
        if !connection.is_last() {
            lock(&self.idle).push_back(connection);
        }
        Ok(answer.status)
    }

    fn idle_connection(&self) -> Option<Connection> {
        let mut idle = lock(&self.idle);
        while let Some(connection) = idle.pop_front() {
            if connection.is_usable() {
                return Some(connection);
            }
            // What the server has closed while nobody used it is no failure of a request.
            let closed = &self.shared.closed_idle;
            closed.fetch_add(1, Ordering::SeqCst);
        }
        None
    }
}

struct Metronome {
    rhythm: Rhythm,
    ticks: tokio::time::Interval,
    next: Instant,
}

impl Metronome {
    fn new(rhythm: Rhythm) -> Self {
        let period = match rhythm {
            Rhythm::Steady(rate) => Duration::from_secs(1) / rate.max(1),
            Rhythm::Bursts { pause, .. } => pause,
        };
        let mut ticks = interval(period);
        // After being held up, what was due is sent at once: users do not wait for each other.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        Self {
            rhythm,
            ticks,
            next: Instant::now(),
        }
    }

    /// Waits, and returns how many requests are due.
    async fn next(&mut self) -> usize {
        match self.rhythm {
            Rhythm::Steady(_) => {
                self.ticks.tick().await;
                1
            }
            Rhythm::Bursts { size, pause, give } => {
                sleep_until(self.next).await;
                self.next += pause + give.mul_f64(2.0 * fastrand::f64()) - give;
                size
            }
        }
    }
}

fn requests(path: &str, users: &[String]) -> Vec<(Method, Request)> {
    let length = path
        .split('/')
        .nth(2)
        .and_then(|length| length.parse().ok());
    let requests = users.iter().enumerate().map(|(index, user)| {
        if index % POST_EVERY == POST_EVERY - 1 {
            (Method::Post, Request::echo(user, BODY))
        } else {
            (
                Method::Get,
                Request::get(path, user, length.unwrap_or(BODY)),
            )
        }
    });
    requests.collect()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
