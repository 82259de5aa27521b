//! The weighted split: which of several targets an identity belongs to.
//!
//! Weighted rendezvous hashing (Thaler & Ravishankar 1998; the logarithmic weights are those of
//! Schindelhauer & Schomaker 2005). Every target draws a score from the identity and its own seed,
//! stretched by its weight, and the highest score wins:
//!
//! ```text
//! h = xxh3_64(identity, seed = xxh3_64(salt ++ "\0" ++ backend name))      u = (h + 0.5) / 2^64
//! score = weight / -ln(u)
//! ```
//!
//! A score depends on its own target alone. So raising a weight only moves identities *into* that
//! target, lowering it only moves them *out of* it, and adding or removing a target moves nobody
//! between the others. The hash is public and frozen: other services can compute the same answer.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::Target;

/// A weight, 0 to 1,000,000; only its ratio to the others means anything.
pub type Weight = u32;

/// A share of the whole in parts per million.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ratio(pub u32);

/// How one route divides its identities.
#[derive(Clone, Debug)]
pub struct Split {
    slices: Vec<Slice>,
    total: u64,
}

#[derive(Clone, Debug)]
struct Slice {
    seed: u64,
    weight: Weight,
}

// === impl Split ===

impl Split {
    /// A split among backends, given by name and weight in the order of the route's targets.
    pub fn new<'a>(salt: &str, backends: impl IntoIterator<Item = (&'a str, Weight)>) -> Self {
        let slices: Vec<Slice> = backends
            .into_iter()
            .map(|(name, weight)| Slice {
                seed: xxh3_64(format!("{salt}\0{name}").as_bytes()),
                weight,
            })
            .collect();
        let total = slices.iter().map(|slice| u64::from(slice.weight)).sum();
        Self { slices, total }
    }

    /// The target of an identity; `None` when every weight is 0.
    pub fn by_identity(&self, identity: &str) -> Option<Target> {
        let mut best: Option<(Target, f64)> = None;
        for (target, slice) in self.slices.iter().enumerate() {
            if slice.weight > 0 {
                let score = slice.score(identity);
                if best.is_none_or(|(_, highest)| score > highest) {
                    best = Some((target, score));
                }
            }
        }
        best.map(|(target, _)| target)
    }

    /// The target drawn by lot, with the same shares; `None` when every weight is 0.
    pub fn by_lot(&self, die: u64) -> Option<Target> {
        // The high half of a 128-bit product maps a uniform 64-bit number onto 0..total without a
        // division.
        let mut position = ((u128::from(die) * u128::from(self.total)) >> 64) as u64;
        self.slices.iter().position(|slice| {
            let weight = u64::from(slice.weight);
            let inside = position < weight;
            position = position.saturating_sub(weight);
            inside
        })
    }

    /// The share that `target` would need for this identity to enter it, the other weights standing
    /// in their ratios.
    ///
    /// With two targets this is a fixed number of the identity: it enters the canary at that share
    /// and stays in above it. `None` when no other target has a weight.
    pub fn entry_share(&self, identity: &str, target: Target) -> Option<Ratio> {
        let others = self
            .slices
            .iter()
            .enumerate()
            .filter(|(position, slice)| *position != target && slice.weight > 0);
        let (rival, weight) = others.fold((0.0_f64, 0_u64), |(rival, weight), (_, slice)| {
            (
                rival.max(slice.score(identity)),
                weight + u64::from(slice.weight),
            )
        });
        let slice = self.slices.get(target).filter(|_| weight > 0)?;
        let needed = rival * slice.toll(identity);
        Some(Ratio::from_fraction(needed / (needed + weight as f64)))
    }

    /// True when there is nothing to split: one target, or every weight 0.
    pub fn is_trivial(&self) -> bool {
        self.slices.len() < 2 || self.total == 0
    }

    /// The part of all identities that each target gets.
    pub fn shares(&self) -> impl Iterator<Item = Ratio> {
        let total = self.total.max(1) as f64;
        self.slices
            .iter()
            .map(move |slice| Ratio::from_fraction(f64::from(slice.weight) / total))
    }

    /// The weights in the order of the targets.
    pub fn weights(&self) -> impl Iterator<Item = Weight> {
        self.slices.iter().map(|slice| slice.weight)
    }
}

// === impl Slice ===

impl Slice {
    /// `-ln(u)`: exponentially distributed, and never negative zero, which would turn the best
    /// score into the worst.
    fn toll(&self, identity: &str) -> f64 {
        let hash = xxh3_64_with_seed(identity.as_bytes(), self.seed);
        ((hash as f64 + 0.5) / 18_446_744_073_709_551_616.0)
            .ln()
            .abs()
    }

    fn score(&self, identity: &str) -> f64 {
        f64::from(self.weight) / self.toll(identity)
    }
}

// === impl Ratio ===

impl Ratio {
    /// A fraction from 0 to 1, rounded to parts per million.
    pub fn from_fraction(fraction: f64) -> Self {
        Self((fraction.clamp(0.0, 1.0) * 1e6).round() as u32)
    }

    /// This ratio in percent, exactly as far as it goes: four decimals.
    pub fn as_percent(self) -> f64 {
        f64::from(self.0) / 1e4
    }

    /// This ratio as a fraction from 0 to 1.
    pub fn as_fraction(self) -> f64 {
        f64::from(self.0) / 1e6
    }
}

impl std::fmt::Display for Ratio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let percent = format!("{:.4}", self.as_percent());
        write!(
            f,
            "{} %",
            percent.trim_end_matches('0').trim_end_matches('.')
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(salt: &str, weights: &[Weight]) -> Split {
        let names: Vec<String> = (0..weights.len())
            .map(|position| format!("v{position}"))
            .collect();
        Split::new(
            salt,
            names
                .iter()
                .map(String::as_str)
                .zip(weights.iter().copied()),
        )
    }

    fn users(count: usize) -> impl Iterator<Item = String> {
        (0..count).map(|user| format!("user-{user}"))
    }

    #[test]
    fn the_hash_is_frozen() {
        assert_eq!(xxh3_64(b"user-1"), 0x7c76_15c1_1438_e5c9);
        assert_eq!(xxh3_64_with_seed(b"user-1", 42), 0x944a_60dd_2e20_4847);
        assert_eq!(xxh3_64(b""), 0x2d06_8005_38d3_94c2);
    }

    /// `config/test-vectors/split.csv` is what other services check their own implementation
    /// against.
    #[test]
    fn the_split_is_frozen() {
        let vectors = include_str!("../../config/test-vectors/split.csv");
        let mut lines = 0;
        for line in vectors
            .lines()
            .filter(|line| !line.starts_with('#'))
            .skip(1)
        {
            let fields: Vec<&str> = line.split(',').collect();
            let [salt, identity, stable, canary, backend, entry_share] = fields[..] else {
                panic!("bad line {line}");
            };
            let weights = [
                ("shop-stable", stable.parse().unwrap()),
                ("shop-canary", canary.parse().unwrap()),
            ];
            let split = Split::new(salt, weights);
            let target = split.by_identity(identity).unwrap();
            assert_eq!(weights[target].0, backend, "{line}");
            assert_eq!(
                split.entry_share(identity, 1).unwrap().0.to_string(),
                entry_share,
                "{line}"
            );
            lines += 1;
        }
        assert!(lines >= 20, "the file of vectors is nearly empty");
    }

    #[test]
    fn shares_are_the_weights_within_sampling_error_at_a_million_identities() {
        const USERS: usize = 1_000_000;
        for weights in [&[95, 5][..], &[1, 9999], &[50, 30, 20], &[1, 1, 1, 1, 0, 3]] {
            let split = split("shares", weights);
            let mut counts = vec![0_usize; weights.len()];
            for user in users(USERS) {
                counts[split.by_identity(&user).unwrap()] += 1;
            }
            for (count, share) in counts.iter().zip(split.shares()) {
                let share = share.as_fraction();
                let deviation = (USERS as f64 * share * (1.0 - share)).sqrt();
                let error = (*count as f64 - USERS as f64 * share).abs();
                assert!(error <= 4.0 * deviation, "{weights:?}: {counts:?}");
            }
        }
    }

    #[test]
    fn lots_fall_by_weight_and_never_on_weight_zero() {
        let split = split("lots", &[0, 70, 0, 30]);
        let mut dice = fastrand::Rng::with_seed(7);
        let mut counts = [0_u32; 4];
        for _ in 0..100_000 {
            counts[split.by_lot(dice.u64(..)).unwrap()] += 1;
        }
        assert_eq!((counts[0], counts[2]), (0, 0));
        assert!(counts[1].abs_diff(70_000) < 600, "{counts:?}");
        assert_eq!(split.by_lot(0), Some(1));
        assert_eq!(split.by_lot(u64::MAX), Some(3));
    }

    #[test]
    fn all_weights_zero_chooses_nobody() {
        let split = split("zero", &[0, 0]);
        assert_eq!(split.by_identity("user"), None);
        assert_eq!(split.by_lot(u64::MAX), None);
        assert_eq!(split.entry_share("user", 1), None);
    }

    #[test]
    fn salts_make_routes_independent_of_each_other() {
        let (one, two) = (split("one", &[50, 50]), split("two", &[50, 50]));
        let both = users(100_000)
            .filter(|user| one.by_identity(user) == Some(1) && two.by_identity(user) == Some(1));
        let both = both.count();
        assert!(both.abs_diff(25_000) < 600, "{both}");
    }

    #[test]
    fn the_entry_share_is_uniform_and_is_where_the_user_enters() {
        let mut below_ten_percent = 0;
        for user in users(20_000) {
            let share = split("entry", &[1, 1]).entry_share(&user, 1).unwrap();
            below_ten_percent += u32::from(share.0 < 100_000);
            let just_below = split(
                "entry",
                &[1_000_000 - share.0 + 2, share.0.saturating_sub(2)],
            );
            let just_above = split(
                "entry",
                &[(1_000_000 - share.0).saturating_sub(2), share.0 + 2],
            );
            assert_eq!(just_above.by_identity(&user), Some(1), "{user}");
            assert_eq!(just_below.by_identity(&user), Some(0), "{user}");
        }
        assert!(
            below_ten_percent.abs_diff(2000) < 200,
            "{below_ten_percent}"
        );
    }

    proptest! {
        #[test]
        fn changing_one_weight_moves_users_only_into_or_out_of_that_target(
            weights in prop::collection::vec(0_u32..=1_000_000, 1..8),
            which in any::<prop::sample::Index>(),
            changed in 0_u32..=1_000_000,
            salt in "[a-z]{0,8}",
            ids in prop::collection::vec("\\PC{1,24}", 1..64),
        ) {
            let which = which.index(weights.len());
            let mut after = weights.clone();
            after[which] = changed;
            let (before, after) = (split(&salt, &weights), split(&salt, &after));
            for id in &ids {
                let (old, new) = (before.by_identity(id), after.by_identity(id));
                if old != new {
                    let entered = new == Some(which) && changed > weights[which];
                    let left = old == Some(which) && changed < weights[which];
                    prop_assert!(entered || left, "{id}: {old:?} -> {new:?}");
                }
            }
        }

        #[test]
        fn adding_a_target_moves_nobody_between_the_others(
            weights in prop::collection::vec(1_u32..=1000, 1..8),
            added in 1_u32..=1000,
            ids in prop::collection::vec("\\PC{1,24}", 1..64),
        ) {
            let before = split("add", &weights);
            let after = split("add", &[weights.as_slice(), &[added]].concat());
            for id in &ids {
                let new = after.by_identity(id);
                prop_assert!(new == before.by_identity(id) || new == Some(weights.len()));
            }
        }

        #[test]
        fn multiplying_all_weights_moves_nobody(
            weights in prop::collection::vec(0_u32..=1000, 1..6), factor in 1_u32..=1000, id in "\\PC{1,24}",
        ) {
            let scaled: Vec<Weight> = weights.iter().map(|weight| weight * factor).collect();
            prop_assert_eq!(split("scale", &weights).by_identity(&id), split("scale", &scaled).by_identity(&id));
        }
    }
}
