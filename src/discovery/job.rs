//! The job that keeps asking for the names in force.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{Id, JoinError, JoinSet};

use crate::control::Change;

use super::resolution::{Answer, Failure, Resolution};
use super::resolver::{AT_ONCE, Resolver};
use super::schedule::{Pace, Schedule};
use super::{DnsName, Names, Settings};

/// What is in force, and so is to be followed.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// How.
    pub settings: Settings,
    /// The names, with what is known of them.
    pub names: Arc<Names>,
    /// How often somebody has asked for a reload. Whoever does may have repaired what made asking
    /// fail.
    pub reloads: u64,
}

/// The job. It lives on the thread of [`control`](crate::control), which never waits for it.
#[derive(Debug)]
pub struct Discovery {
    wanted: watch::Receiver<Wanted>,
    /// What was wanted last.
    before: Wanted,
    changes: mpsc::Sender<Change>,
    schedule: Schedule,
    /// Made when it is first needed, and anew when it should ask others.
    resolver: Option<Arc<Resolver>>,
    asking: JoinSet<Result<Answer, Failure>>,
    /// What each of those asks for.
    asked: HashMap<Id, DnsName>,
    slots: Arc<Semaphore>,
}

type Asked = Result<(Id, Result<Answer, Failure>), JoinError>;

// === impl Discovery ===

impl Discovery {
    /// A job that follows what is wanted, and hands what it learns to control.
    pub fn new(wanted: watch::Receiver<Wanted>, changes: mpsc::Sender<Change>) -> Self {
        let before = wanted.borrow().clone();
        Self {
            wanted,
            before,
            changes,
            schedule: Schedule::default(),
            resolver: None,
            asking: JoinSet::new(),
            asked: HashMap::new(),
            slots: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    /// Runs until nobody can want anything any more.
    pub async fn run(mut self) {
        self.wanted.mark_changed();
        loop {
            let due = self.schedule.next_due();
            tokio::select! {
                changed = self.wanted.changed() => match changed {
                    Ok(()) => self.follow(),
                    Err(_) => return,
                },
                Some(asked) = self.asking.join_next_with_id() => self.note(asked).await,
                () = sleep_until(due), if due.is_some() => self.ask().await,
            }
        }
    }

    fn follow(&mut self) {
        let wanted = self.wanted.borrow_and_update().clone();
        let pace = Pace {
            min: wanted.settings.min_ttl,
            max: wanted.settings.max_ttl,
        };
        let (now, dice) = (Instant::now(), fastrand::f64);
        self.schedule.follow(&wanted.names, pace, now, dice);
        let before = std::mem::replace(&mut self.before, wanted);
        if before.settings != self.before.settings || before.reloads != self.before.reloads {
            self.schedule.hurry(now);
        }
    }

    /// Asks for what is due, of whom the system would ask now.
    async fn ask(&mut self) {
        let resolver = self.resolver().await;
        for name in self.schedule.take_due(Instant::now()) {
            let (resolver, slots) = (resolver.clone(), Arc::clone(&self.slots));
            let asked = name.clone();
            let task = self.asking.spawn(async move {
                let _slot = slots.acquire_owned().await;
                let resolver = resolver.map_err(Failure::Broken)?;
                let deadline = tokio::time::Instant::now() + resolver.settings().timeout;
                resolver.ask(&asked, deadline).await
            });
            self.asked.insert(task.id(), name);
        }
    }

    async fn resolver(&mut self) -> Result<Arc<Resolver>, String> {
        let settings = self.wanted.borrow().settings.clone();
        let current = self.resolver.as_ref();
        let current = current.filter(|one| *one.settings() == settings && one.is_current());
        if let Some(current) = current {
            return Ok(Arc::clone(current));
        }
        // It reads files.
        let made = tokio::task::spawn_blocking(|| Resolver::new(settings)).await;
        let made = Arc::new(made.map_err(|error| error.to_string())?);
        self.resolver = Some(Arc::clone(&made));
        Ok(made)
    }

    /// Hands on what came, and what came with it.
    async fn note(&mut self, first: Asked) {
        let mut resolved = Vec::new();
        let mut next = Some(first);
        while let Some(asked) = next {
            resolved.extend(self.learn(asked));
            next = self.asking.try_join_next_with_id();
        }
        if !resolved.is_empty() {
            // Nobody listens only while the process ends.
            let _ = self.changes.send(Change::Endpoints { resolved }).await;
        }
    }

    fn learn(&mut self, asked: Asked) -> Option<(DnsName, Arc<Resolution>)> {
        let (id, answer) = asked.unwrap_or_else(|error| {
            let died = Failure::Broken(format!("asking for it was not ended: {error}"));
            (error.id(), Err(died))
        });
        let name = self.asked.remove(&id)?;
        let (now, at) = (Instant::now(), SystemTime::now());
        let die = fastrand::f64();
        let known = self.schedule.note(name.clone(), answer, now, at, die)?;
        Some((name, known))
    }
}

async fn sleep_until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due.into()).await;
    }
}
