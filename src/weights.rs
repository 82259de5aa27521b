//! Weights that are set at run time, through the admin API, and how they stand to those of the file.
//!
//! **The later word wins.** Weights that are set hold as long as the file says of their route what it said when
//! they were set, be it read again, or be the process started again. As soon as the file says something else of
//! that route, its backends or their weights, that is the later word, and what was set is gone. So a rollout need
//! not fear a file that somebody writes again unchanged, and who edits a weight sees it take effect.
//!
//! Pure; [`state`] is where they outlive the process.

pub mod state;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use xxhash_rust::xxh3::Xxh3;

use crate::config::Config;
use crate::config::problem::did_you_mean;
use crate::config::value::MAX_WEIGHT;
use crate::routing::split::Weight;

/// The weight of each backend of a route, by its name.
pub type Weights = BTreeMap<Arc<str>, Weight>;

/// Weights of one route that somebody has set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetWeights {
    /// Those.
    pub weights: Weights,
    /// What the file said when they were set.
    pub over: Weights,
    /// Who has set them.
    pub by: String,
    /// When.
    pub at: SystemTime,
    /// Why, if he has said so.
    pub reason: Option<String>,
}

/// The weights that are set, by route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeWeights(BTreeMap<Arc<str>, SetWeights>);

/// Tells what is in force for a route from what was or will be: the same on all replicas with the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag(pub u64);

// === impl SetWeights ===

impl SetWeights {
    /// True for what could have been set: a file may say anything.
    fn fits(&self) -> bool {
        self.weights.keys().eq(self.over.keys())
            && self.weights.values().all(|weight| *weight <= MAX_WEIGHT)
    }
}

// === impl RuntimeWeights ===

impl RuntimeWeights {
    /// Everything is as the file says.
    pub const fn none() -> Self {
        Self(BTreeMap::new())
    }

    /// What is set for a route.
    pub fn of(&self, route: &str) -> Option<&SetWeights> {
        self.0.get(route)
    }

    /// All of them, with their routes.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &SetWeights)> {
        self.0.iter()
    }

    /// Sets those of a route.
    pub fn set(&mut self, route: Arc<str>, weights: SetWeights) {
        self.0.insert(route, weights);
    }

    /// Leaves a route to the file.
    pub fn unset(&mut self, route: &str) {
        self.0.remove(route);
    }

    /// Drops those of routes of which the file says something else now, and gives their names.
    pub fn yield_to(&mut self, config: &Config) -> Vec<Arc<str>> {
        let mut yielded = Vec::new();
        self.0.retain(|route, set| {
            let stays =
                configured(config, route).is_some_and(|over| over == set.over && set.fits());
            if !stays {
                yielded.push(Arc::clone(route));
            }
            stays
        });
        yielded
    }
}

impl FromIterator<(Arc<str>, SetWeights)> for RuntimeWeights {
    fn from_iter<I: IntoIterator<Item = (Arc<str>, SetWeights)>>(all: I) -> Self {
        Self(all.into_iter().collect())
    }
}

// === impl Tag ===

impl Tag {
    /// Of what the file says, and of what was set over it.
    pub fn of(configured: &Weights, set: Option<&SetWeights>) -> Self {
        let mut hash = Xxh3::new();
        let set = set.map(|set| &set.weights);
        for weights in [Some(configured), set].into_iter().flatten() {
            for (backend, weight) in weights {
                hash.update(backend.as_bytes());
                hash.update(&[0]);
                hash.update(&weight.to_le_bytes());
            }
            hash.update(&[1]);
        }
        Self(hash.digest())
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What the file says of a route; `None` if there is none of this name.
pub fn configured(config: &Config, route: &str) -> Option<Weights> {
    let route = config.routes.iter().find(|one| *one.name == *route)?;
    let targets = route.targets.iter();
    let named = targets.map(|target| {
        let backend = &config.backends[target.backend];
        (Arc::clone(&backend.name), target.weight)
    });
    Some(named.collect())
}

/// Weights for the backends that a route has, one for each.
///
/// # Errors
///
/// What is wrong with them, for whoever has sent them.
pub fn checked(order: &BTreeMap<String, u64>, configured: &Weights) -> Result<Weights, String> {
    if configured.is_empty() {
        return Err("this route has no backends".to_owned());
    }
    for name in order.keys() {
        if !configured.contains_key(&**name) {
            let hint = did_you_mean(name, configured.keys().map(|known| &**known));
            let hint = hint.map_or(String::new(), |hint| format!("; {hint}"));
            return Err(format!("this route has no backend `{name}`{hint}"));
        }
    }
    let weights = configured.keys().map(|name| {
        let weight = order.get(&**name);
        let weight = weight.ok_or_else(|| format!("the weight of `{name}` is missing"))?;
        let too_large = || format!("the weight of `{name}` is above {MAX_WEIGHT}");
        let small = Weight::try_from(*weight)
            .ok()
            .filter(|small| *small <= MAX_WEIGHT);
        Ok((Arc::clone(name), small.ok_or_else(too_large)?))
    });
    weights.collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::load::{load_list, load_text};

    use super::*;

    fn weights<const N: usize>(all: [(&str, Weight); N]) -> Weights {
        let named = all.into_iter().map(|(name, weight)| (name.into(), weight));
        named.collect()
    }

    fn config(refs: &str) -> Config {
        let text = format!(
            "listeners: [ {{ name: web, address: '127.0.0.1:0' }} ]
backends: [ {{ name: stable, endpoints: ['127.0.0.1:9'] }}, {{ name: canary, endpoints: ['127.0.0.1:8'] }} ]
routes: [ {{ name: shop, backendRefs: [ {refs} ] }} ]
"
        );
        let loaded = load_text(Path::new("serin.yaml"), &text, &mut load_list);
        loaded
            .unwrap_or_else(|problems| panic!("{problems}"))
            .config
    }

    const FILE: &str = "{ name: stable, weight: 90 }, { name: canary, weight: 10 }";

    fn set(over: Weights) -> RuntimeWeights {
        let set = SetWeights {
            weights: weights([("stable", 0), ("canary", 1)]),
            over,
            by: "somebody".to_owned(),
            at: SystemTime::UNIX_EPOCH,
            reason: None,
        };
        [("shop".into(), set)].into_iter().collect()
    }

    #[test]
    fn what_is_set_stays_until_the_file_says_something_else_of_its_route() {
        for (file, stays) in [
            (FILE, true),
            // The order is the baseline's business, and not the weights'.
            (
                "{ name: canary, weight: 10 }, { name: stable, weight: 90 }",
                true,
            ),
            (
                "{ name: stable, weight: 91 }, { name: canary, weight: 10 }",
                false,
            ),
            ("{ name: stable, weight: 90 }", false),
        ] {
            let mut all = set(weights([("stable", 90), ("canary", 10)]));
            let yielded = all.yield_to(&config(file));
            assert_eq!(all.of("shop").is_some(), stays, "{file}");
            assert_eq!(yielded.is_empty(), stays, "{file}");
        }
    }

    #[test]
    fn each_backend_needs_one_weight_and_no_other_has_any() {
        let file = weights([("stable", 90), ("canary", 10)]);
        let order = |all: &[(&str, u64)]| {
            let order = all
                .iter()
                .map(|(name, weight)| ((*name).to_owned(), *weight));
            checked(&order.collect(), &file)
        };
        let sound = order(&[("stable", 0), ("canary", 1_000_000)]);
        assert_eq!(sound, Ok(weights([("stable", 0), ("canary", 1_000_000)])));
        for (all, words) in [
            (&[("stable", 1)][..], "the weight of `canary` is missing"),
            (
                &[("stable", 1), ("canary", 1_000_001)],
                "the weight of `canary` is above 1000000",
            ),
            (
                &[("stable", 1), ("canary", u64::MAX)],
                "the weight of `canary` is above 1000000",
            ),
            (
                &[("stable", 1), ("canry", 1)],
                "this route has no backend `canry`; did you mean `canary`?",
            ),
        ] {
            assert_eq!(order(all), Err(words.to_owned()));
        }
        assert!(checked(&BTreeMap::new(), &Weights::new()).is_err());
    }

    #[test]
    fn a_tag_tells_any_difference() {
        let file = weights([("stable", 90), ("canary", 10)]);
        let all = set(file.clone());
        let set_over = Tag::of(&file, all.of("shop"));
        let other = weights([("stable", 91), ("canary", 10)]);
        let tags = [
            Tag::of(&file, None),
            set_over,
            Tag::of(&other, None),
            Tag::of(&other, all.of("shop")),
        ];
        for (position, tag) in tags.iter().enumerate() {
            assert!(!tags[..position].contains(tag));
        }
        assert_eq!(set_over, Tag::of(&file, all.of("shop")));
    }
}
