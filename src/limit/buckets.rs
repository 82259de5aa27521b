//! Who has had how much, in memory that does not grow.
//!
//! A table of sets with eight places each, as in a processor's cache. A place is the hash of a key and
//! its theoretical arrival time ([`gcra`](super::gcra)). A key that is not there takes the place with
//! the earliest time. Nearly always that time has passed, and with it all that there was to know, so
//! nothing is lost; where it has not, the key that had the place begins anew, and the caller is told.
//!
//! A map with a pruning job, as of the crate `governor`, would keep every key until the job comes: who
//! sends a new key with each request decides how much memory that takes, and a cap on it needs an answer
//! to what becomes of the next key. Here that answer is the rule, memory is what the configuration says
//! (16 bytes a key), and there is no job, no lock and no allocation.
//!
//! Hashes must be such that nobody outside can choose keys of one set; who makes them sees to that. Two
//! keys of one hash share a place: with 65,536 keys by a chance of one in 10^10.
//!
//! Without locks, a key and its time are not changed in one step. So when a place changes hands at the
//! very moment at which another thread counts a request in it, that one request may count for the wrong
//! key.

use std::sync::atomic::{AtomicU64, Ordering};

use super::gcra::{Quota, Refused, Standing};

/// A table of keys and their times.
#[derive(Debug)]
pub struct Buckets {
    /// A power of two of them.
    sets: Box<[Set]>,
}

/// What becomes of a request.
#[derive(Debug)]
pub struct Taken<'b> {
    /// Whether it is let in.
    pub outcome: Result<Charge<'b>, Refused>,
    /// A key that still counted has lost its place to this one.
    pub has_displaced: bool,
}

/// A request that is let in, and counted.
#[derive(Debug)]
pub struct Charge<'b> {
    /// What is left.
    pub standing: Standing,
    tat: &'b AtomicU64,
    quota: Quota,
}

const WAYS: usize = 8;

/// Two cache lines: to find a key takes one of them.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Set {
    /// Hashes of keys, 0 for none.
    tags: [AtomicU64; WAYS],
    /// Their times, in the same order.
    tats: [AtomicU64; WAYS],
}

// All orderings are relaxed: no other memory is published by these numbers, and whether one is still
// what it was is said by the exchange that replaces it.
const RELAXED: Ordering = Ordering::Relaxed;

// === impl Buckets ===

impl Buckets {
    /// A table for at least so many keys.
    pub fn new(keys: usize) -> Self {
        let sets = keys.div_ceil(WAYS).next_power_of_two();
        Self {
            sets: (0..sets).map(|_| Set::default()).collect(),
        }
    }

    /// Counts a request of the key with this hash, if it is let in.
    pub fn take(&self, hash: u64, quota: Quota, now: u64) -> Taken<'_> {
        // The upper half chooses the set, and all of it is compared.
        let set = &self.sets[(hash >> 32) as usize & (self.sets.len() - 1)];
        let tag = hash.max(1);
        let mut has_displaced = false;
        loop {
            let Some(tat) = set.find(tag) else {
                has_displaced |= set.make_room(tag, now);
                continue;
            };
            let before = tat.load(RELAXED);
            let outcome = match quota.take(before, now) {
                Err(refused) => Err(refused),
                Ok(one) => {
                    let exchanged = tat.compare_exchange(before, one.tat, RELAXED, RELAXED);
                    if exchanged.is_err() {
                        continue;
                    }
                    Ok(Charge {
                        standing: one.standing,
                        tat,
                        quota,
                    })
                }
            };
            return Taken {
                outcome,
                has_displaced,
            };
        }
    }
}

// === impl Charge ===

impl Charge<'_> {
    /// Takes back that the request was counted, since somebody else does not let it in.
    pub fn give_back(self) {
        let quota = self.quota;
        // Not a plain subtraction: the place may have changed hands, and begun anew.
        let _ = self
            .tat
            .fetch_update(RELAXED, RELAXED, |tat| Some(quota.give_back(tat)));
    }
}

// === impl Set ===

impl Set {
    fn find(&self, tag: u64) -> Option<&AtomicU64> {
        let found = self
            .tags
            .iter()
            .position(|known| known.load(RELAXED) == tag)?;
        self.tats.get(found)
    }

    /// Gives the place with the earliest time to `tag`, unless somebody else is faster; true when that
    /// time had not passed.
    fn make_room(&self, tag: u64, now: u64) -> bool {
        let places = self.tags.iter().zip(&self.tats);
        let places =
            places.map(|(place, tat)| (place.load(RELAXED), tat.load(RELAXED), place, tat));
        let Some((known, before, place, tat)) = places.min_by_key(|(_, before, ..)| *before) else {
            return false;
        };
        let counts = before > now;
        // Before the place changes hands, or the new key would answer for the one that was there.
        if counts && tat.compare_exchange(before, 0, RELAXED, RELAXED).is_err() {
            return false;
        }
        let exchanged = place.compare_exchange(known, tag, RELAXED, RELAXED);
        counts && exchanged.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use super::*;

    const MINUTE: u64 = 60_000_000_000;

    /// One request a second, and this many at once.
    fn quota(burst: u32) -> Quota {
        let one = NonZeroU32::MIN;
        Quota::new(one, Duration::from_secs(1), NonZeroU32::new(burst).unwrap()).unwrap()
    }

    /// A hash as random as a good one.
    fn hash(key: u64) -> u64 {
        xxhash_rust::xxh3::xxh3_64(&key.to_le_bytes())
    }

    fn is_let_in(buckets: &Buckets, key: u64, burst: u32, now: u64) -> bool {
        buckets.take(hash(key), quota(burst), now).outcome.is_ok()
    }

    #[test]
    fn each_key_has_a_burst_of_its_own() {
        let buckets = Buckets::new(1000);
        for key in 0..100 {
            let let_in = (0..10).filter(|_| is_let_in(&buckets, key, 3, MINUTE));
            assert_eq!(let_in.count(), 3, "key {key}");
        }
    }

    #[test]
    fn a_key_whose_time_has_passed_makes_room_without_loss() {
        let buckets = Buckets::new(64);
        // Ten times more keys than there is room for, each when the one before is forgiven.
        for turn in 0..640 {
            let now = MINUTE + turn * MINUTE;
            let taken = buckets.take(hash(turn), quota(1), now);
            assert!(taken.outcome.is_ok() && !taken.has_displaced, "turn {turn}");
        }
    }

    #[test]
    fn a_flood_of_keys_displaces_those_with_the_least_on_them_and_says_so() {
        let buckets = Buckets::new(64);
        while is_let_in(&buckets, 1, 1000, MINUTE) {}
        let displaced = (1000..100_000_u64)
            .filter(|key| buckets.take(hash(*key), quota(1000), MINUTE).has_displaced);
        assert!(displaced.count() > 90_000);
        assert!(
            !is_let_in(&buckets, 1, 1000, MINUTE),
            "who has used up the burst stays known longest"
        );
    }

    #[test]
    fn what_is_given_back_can_be_had_again() {
        let buckets = Buckets::new(8);
        let taken = buckets.take(hash(1), quota(1), MINUTE).outcome;
        assert!(!is_let_in(&buckets, 1, 1, MINUTE));
        taken.unwrap().give_back();
        assert!(is_let_in(&buckets, 1, 1, MINUTE));
    }

    #[test]
    fn giving_back_what_was_displaced_harms_nobody() {
        let buckets = Buckets::new(8);
        let taken = buckets.take(hash(1), quota(1), MINUTE).outcome;
        for key in 2..100 {
            buckets.take(hash(key), quota(1), MINUTE);
        }
        taken.unwrap().give_back();
        for key in 100..200 {
            assert!(is_let_in(&buckets, key, 1, 3 * MINUTE), "key {key}");
        }
    }

    #[test]
    fn threads_together_get_no_more_than_one_alone() {
        let buckets = Buckets::new(256);
        let let_in: Vec<AtomicUsize> = (0..16).map(|_| AtomicUsize::new(0)).collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for turn in 0..20_000_u64 {
                        let key = turn % 16;
                        if is_let_in(&buckets, key, 100, MINUTE) {
                            let_in[key as usize].fetch_add(1, RELAXED);
                        }
                    }
                });
            }
        });
        for (key, count) in let_in.iter().enumerate() {
            assert_eq!(count.load(RELAXED), 100, "key {key}");
        }
    }

    #[test]
    fn a_key_takes_sixteen_bytes() {
        assert_eq!(size_of::<Set>(), WAYS * 16);
        assert_eq!(Buckets::new(65_536).sets.len() * WAYS, 65_536);
        assert_eq!(Buckets::new(1).sets.len(), 1);
    }
}
