//! When to ask for which name again.
//!
//! Pure: `now` and the dice are arguments. Time here is monotonic, so a clock that jumps changes
//! nothing.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::resolution::{Answer, Failure, Outcome, Resolution};
use super::{DnsName, Names};

/// All names that are followed.
#[derive(Debug, Default)]
pub struct Schedule {
    pace: Pace,
    names: HashMap<DnsName, Followed>,
    /// Those that nobody asks for right now, by the time at which they are due.
    queue: BTreeSet<(Instant, DnsName)>,
}

/// The shortest and the longest time between two attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// The shortest.
    pub min: Duration,
    /// The longest.
    pub max: Duration,
}

#[derive(Debug)]
struct Followed {
    resolution: Arc<Resolution>,
    /// Attempts that brought nothing, since the last that brought something.
    failures: u32,
    /// Its place in the queue.
    due: Option<Instant>,
    /// What it is being asked for right now may be out of date: if that fails, it is due at once.
    is_hurried: bool,
}

// === impl Schedule ===

impl Schedule {
    /// From now on these names are followed, at this pace. What is known of those that are followed
    /// already is at least as new as what is handed in.
    pub fn follow(
        &mut self,
        wanted: &Names,
        pace: Pace,
        now: Instant,
        mut dice: impl FnMut() -> f64,
    ) {
        if self.pace != pace {
            self.pace = pace;
            self.bring_forward(|_| Some(now + pace.max));
        }
        self.names.retain(|name, _| wanted.contains_key(name));
        self.queue.retain(|(_, name)| wanted.contains_key(name));
        for (name, resolution) in wanted {
            if self.names.contains_key(name) {
                continue;
            }
            let mut followed = Followed::new(Arc::clone(resolution));
            let due = now + followed.pause(pace, dice());
            followed.due = Some(due);
            self.names.insert(name.clone(), followed);
            self.queue.insert((due, name.clone()));
        }
    }

    /// Asking may fare better now than it did: what failed is due, as if it had never failed.
    pub fn hurry(&mut self, now: Instant) {
        for followed in self.names.values_mut() {
            followed.failures = 0;
            followed.is_hurried = followed.due.is_none();
        }
        self.bring_forward(|followed| followed.resolution.problem().map(|_| now));
    }

    /// Those that wait are due at this time at the latest, where there is one.
    fn bring_forward(&mut self, latest: impl Fn(&Followed) -> Option<Instant>) {
        for (name, followed) in &mut self.names {
            let Some((before, latest)) = followed.due.zip(latest(followed)) else {
                continue;
            };
            if latest < before {
                followed.due = Some(latest);
                self.queue.remove(&(before, name.clone()));
                self.queue.insert((latest, name.clone()));
            }
        }
    }

    /// The names that are to be asked for now; each is noted before it comes again.
    pub fn take_due(&mut self, now: Instant) -> Vec<DnsName> {
        let mut due = Vec::new();
        while self.queue.first().is_some_and(|(at, _)| *at <= now)
            && let Some((_, name)) = self.queue.pop_first()
        {
            if let Some(followed) = self.names.get_mut(&name) {
                followed.due = None;
            }
            due.push(name);
        }
        due
    }

    /// When the next one is due; `None` when there is none, or all are being asked for.
    pub fn next_due(&self) -> Option<Instant> {
        self.queue.first().map(|(at, _)| *at)
    }

    /// Notes what asking brought, at this time of day; `None` for a name that is followed no more.
    pub fn note(
        &mut self,
        name: DnsName,
        asked: Result<Answer, Failure>,
        now: Instant,
        at: SystemTime,
        die: f64,
    ) -> Option<Arc<Resolution>> {
        let followed = self.names.get_mut(&name)?;
        followed.note(Arc::new(followed.resolution.after(asked, at)));
        let resolution = Arc::clone(&followed.resolution);
        let is_hurried = std::mem::take(&mut followed.is_hurried);
        let due = match resolution.outcome {
            Outcome::Failed(_) if is_hurried => now,
            _ => now + followed.pause(self.pace, die),
        };
        // It may have been dropped and named again while it was asked for, and be in the queue.
        if let Some(before) = followed.due.replace(due) {
            self.queue.remove(&(before, name.clone()));
        }
        self.queue.insert((due, name));
        Some(resolution)
    }
}

// === impl Followed ===

impl Followed {
    fn new(resolution: Arc<Resolution>) -> Self {
        let mut followed = Self {
            resolution: Arc::default(),
            failures: 0,
            due: None,
            is_hurried: false,
        };
        followed.note(resolution);
        followed
    }

    fn note(&mut self, resolution: Arc<Resolution>) {
        self.failures = match resolution.outcome {
            Outcome::Failed(_) => self.failures.saturating_add(1),
            _ => 0,
        };
        self.resolution = resolution;
    }

    /// How long to wait before asking again. `die` is from 0 to 1.
    fn pause(&self, pace: Pace, die: f64) -> Duration {
        match self.resolution.outcome {
            Outcome::Unasked => Duration::ZERO,
            Outcome::Found | Outcome::FoundPartly(_) => {
                self.resolution.ttl.min(pace.max).max(pace.min)
            }
            Outcome::Failed(_) => pace.back_off(self.failures, die),
        }
    }
}

// === impl Pace ===

impl Pace {
    /// Twice as long after each failure, up to half of it by lot: those who failed together should
    /// not come back together.
    fn back_off(self, failures: u32, die: f64) -> Duration {
        let doubled = self.min.saturating_mul(1 << failures.min(16));
        doubled.min(self.max).mul_f64(0.5 + 0.5 * die).max(self.min)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::resolution::{Family, Part};
    use super::*;

    const PACE: Pace = Pace {
        min: Duration::from_secs(1),
        max: Duration::from_secs(60),
    };
    const DAY: SystemTime = SystemTime::UNIX_EPOCH;

    fn name(host: &str) -> DnsName {
        DnsName::Host {
            host: host.into(),
            port: 80,
        }
    }

    fn found(ttl: u64) -> Result<Answer, Failure> {
        let part = Part::host(&name("shop"), Family::V4);
        Ok(Answer {
            parts: vec![(part, Ok(vec![[10, 0, 0, 1].into()]))],
            ttl: Duration::from_secs(ttl),
            next: None,
        })
    }

    fn wanted(names: &[&str]) -> Names {
        let known = |host: &&str| (name(host), Arc::default());
        names.iter().map(known).collect()
    }

    fn schedule(names: &[&str], now: Instant) -> Schedule {
        let mut schedule = Schedule::default();
        schedule.follow(&wanted(names), PACE, now, || 0.0);
        schedule
    }

    #[test]
    fn a_name_is_asked_for_when_its_records_expire_within_limits() {
        let now = Instant::now();
        for (ttl, pause) in [(0, 1), (7, 7), (86_400, 60)] {
            let mut schedule = schedule(&["shop"], now);
            assert_eq!(schedule.take_due(now), [name("shop")]);
            assert_eq!(schedule.next_due(), None, "it is being asked for");
            schedule
                .note(name("shop"), found(ttl), now, DAY, 0.9)
                .unwrap();
            assert_eq!(schedule.next_due(), Some(now + Duration::from_secs(pause)));
        }
    }

    #[test]
    fn failures_back_off_and_a_success_ends_that() {
        let now = Instant::now();
        let mut schedule = schedule(&["shop"], now);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            schedule.note(name("shop"), Err(Failure::Timeout), now, DAY, 1.0);
            pauses.push((schedule.next_due().unwrap() - now).as_secs());
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60, 60, 60]);
        schedule.note(name("shop"), found(3), now, DAY, 1.0);
        assert_eq!(schedule.next_due(), Some(now + Duration::from_secs(3)));
        schedule.note(name("shop"), Err(Failure::Timeout), now, DAY, 0.0);
        assert_eq!(schedule.next_due(), Some(now + Duration::from_secs(1)));
    }

    #[test]
    fn in_a_hurry_what_failed_is_due_and_what_was_found_is_not() {
        let now = Instant::now();
        let mut schedule = schedule(&["shop", "cart"], now);
        schedule.take_due(now);
        schedule.note(name("cart"), found(9), now, DAY, 1.0);
        for _ in 0..9 {
            schedule.note(name("shop"), Err(Failure::Timeout), now, DAY, 1.0);
        }
        schedule.hurry(now);
        assert_eq!(schedule.take_due(now), [name("shop")]);
        schedule.note(name("shop"), Err(Failure::Timeout), now, DAY, 1.0);
        assert_eq!(schedule.next_due(), Some(now + Duration::from_secs(2)));
    }

    /// Whoever is asked right now may be the one that has just been replaced.
    #[test]
    fn in_a_hurry_what_is_being_asked_for_is_due_at_once_if_that_fails() {
        let now = Instant::now();
        for (answer, due) in [
            (Err(Failure::Timeout), now),
            (found(9), now + Duration::from_secs(9)),
        ] {
            let mut schedule = schedule(&["shop"], now);
            schedule.take_due(now);
            schedule.hurry(now);
            schedule.note(name("shop"), answer, now, DAY, 1.0);
            assert_eq!(schedule.next_due(), Some(due));
            schedule.take_due(now + Duration::from_secs(9));
            schedule.note(name("shop"), Err(Failure::Timeout), now, DAY, 1.0);
            assert!(schedule.next_due() > Some(now));
        }
    }

    #[test]
    fn a_faster_pace_counts_for_names_that_wait_already() {
        let now = Instant::now();
        let mut schedule = schedule(&["shop"], now);
        schedule.take_due(now);
        schedule.note(name("shop"), found(50), now, DAY, 1.0);
        let max = Duration::from_secs(5);
        schedule.follow(&wanted(&["shop"]), Pace { max, ..PACE }, now, || 0.0);
        assert_eq!(schedule.next_due(), Some(now + max));
    }

    #[test]
    fn names_that_stay_keep_what_is_known_and_their_time() {
        let now = Instant::now();
        let mut schedule = schedule(&["shop", "gone"], now);
        schedule.take_due(now);
        schedule.note(name("shop"), found(9), now, DAY, 0.0);
        let later = now + Duration::from_secs(5);
        schedule.follow(&wanted(&["shop", "new"]), PACE, later, || 0.0);
        assert_eq!(schedule.take_due(later), [name("new")]);
        assert_eq!(schedule.next_due(), Some(now + Duration::from_secs(9)));
        let kept = schedule.note(name("shop"), Err(Failure::NotFound), later, DAY, 0.0);
        assert_eq!(kept.unwrap().addresses().len(), 1);
        let late = schedule.note(name("gone"), found(1), later, DAY, 0.0);
        assert!(late.is_none(), "nobody wants to know any more");
    }

    proptest! {
        #[test]
        fn every_name_is_asked_for_again_and_never_too_soon(
            steps in proptest::collection::vec((0_usize..3, any::<bool>(), 0_u64..100, 0.0..1.0), 1..40),
        ) {
            let names = ["a", "b", "c"];
            let mut now = Instant::now();
            let mut schedule = schedule(&names, now);
            let mut asked = HashMap::new();
            for (which, fails, ttl, die) in steps {
                for due in schedule.take_due(now) {
                    if let Some(before) = asked.insert(due, now) {
                        prop_assert!(now - before >= PACE.min);
                    }
                }
                let one = name(names[which]);
                let answer = if fails { Err(Failure::Timeout) } else { found(ttl) };
                if schedule.queue.iter().all(|(_, queued)| *queued != one) {
                    schedule.note(one, answer, now, DAY, die);
                }
                if let Some(next) = schedule.next_due() {
                    prop_assert!(next <= now + PACE.max);
                    now = next.max(now);
                }
            }
        }
    }
}
