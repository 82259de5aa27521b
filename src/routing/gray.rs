//! Who gets which version: the precedence of deny list, override, user lists, rules and weights.
//!
//! Precedence is an ordering, [`Rank`], that the steps of a route are sorted by once, when it is
//! compiled; a request takes the first step that applies, and else the split.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use http::header::{COOKIE, HeaderName};

use super::identity::{Believe, Identity, IdentitySource, identify};
use super::matcher::Condition;
use super::request::RequestHead;
use super::split::Split;
use super::{BASELINE, Target, UserList};

/// Why a request got its backend. A closed set, written the same in metrics, in logs and by
/// `explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The user is on the deny list.
    DenyList,
    /// The client named the backend.
    Override,
    /// The user is on a user list.
    UserList,
    /// A rule on the request's attributes.
    Rule,
    /// The hash of the user's identity.
    Sticky,
    /// A lot, since there is no identity.
    Random,
    /// Nothing was to be decided: one backend only, all weights 0, or no identity where those get
    /// the baseline.
    Baseline,
    /// The backend that was decided on takes no requests.
    Failover,
}

/// Which backend a request gets, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision<'a> {
    /// The backend.
    pub target: Target,
    /// Why.
    pub reason: Reason,
    /// The rule, where a rule decided.
    pub rule: Option<&'a str>,
    /// Who the user is, as far as that is known.
    pub identity: Option<Identity<'a>>,
}

/// The compiled rules of one route.
#[derive(Clone, Debug)]
pub struct Gray {
    /// Where the user's id is looked for, in this order.
    pub identity: Arc<[IdentitySource]>,
    /// Whether only trusted proxies may say who the user is, and what he wants.
    pub trusted_only: bool,
    /// What happens without an identity.
    pub without_identity: WithoutIdentity,
    /// What is tried before the split; sorted by [`Step::rank`].
    steps: Vec<Step>,
    /// The split.
    pub split: Split,
}

/// What happens to a request without an identity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WithoutIdentity {
    /// A draw by lot.
    #[default]
    Random,
    /// The baseline.
    Baseline,
    /// An anonymous id is issued in a cookie.
    Cookie,
}

/// Something that decides before the split does.
#[derive(Clone, Debug)]
pub enum Step {
    /// Users on this list get the baseline.
    DenyList(Arc<UserList>),
    /// Clients may name the backend they want.
    Override(Override),
    /// Requests for which everything in it holds get its target.
    Rule(Rule),
}

/// Where clients name the backend that they want.
#[derive(Clone, Debug)]
pub struct Override {
    /// In this header.
    pub header: Option<HeaderName>,
    /// In this cookie.
    pub cookie: Option<String>,
    /// What they may name: backend names first, then versions.
    pub names: Vec<(String, Target)>,
}

/// A rule with a target of its own.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its name in `explain`.
    pub name: Arc<str>,
    /// Where its requests go.
    pub target: Target,
    /// The user must be on this list.
    pub user_list: Option<Arc<UserList>>,
    /// All of these must hold.
    pub conditions: Arc<[Condition]>,
}

/// The place of a step in the order of precedence; the smallest comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// Never to be overridden by anybody.
    DenyList,
    /// A tester's own wish.
    Override,
    /// Named users.
    UserList,
    /// Attributes of the request.
    Rule,
}

/// A source of uniform 64-bit numbers.
pub type Dice<'d> = &'d mut dyn FnMut() -> u64;

// === impl Gray ===

impl Gray {
    /// Compiles the steps of a route in their order of precedence; equals keep the order of the
    /// file.
    pub fn new(
        identity: Arc<[IdentitySource]>,
        trusted_only: bool,
        without_identity: WithoutIdentity,
        mut steps: Vec<Step>,
        split: Split,
    ) -> Self {
        steps.sort_by_key(Step::rank);
        Self {
            identity,
            trusted_only,
            without_identity,
            steps,
            split,
        }
    }

    /// Decides on a request. `trusted` says that a trusted proxy sent it.
    pub fn decide<'a>(
        &'a self,
        head: &RequestHead<'a>,
        trusted: bool,
        dice: Dice<'_>,
    ) -> Decision<'a> {
        let believe = if self.trusted_only && !trusted {
            Believe::ProofOnly
        } else {
            Believe::Client
        };
        let identity = identify(&self.identity, head, believe);
        let first = self
            .steps
            .iter()
            .find_map(|step| step.decide(head, identity.as_ref(), believe));
        match first {
            Some((target, reason, rule)) => Decision {
                target,
                reason,
                rule,
                identity,
            },
            None => self.decide_by_weight(identity, dice),
        }
    }

    fn decide_by_weight<'a>(&self, identity: Option<Identity<'a>>, dice: Dice<'_>) -> Decision<'a> {
        if self.split.is_trivial() {
            return Decision {
                target: BASELINE,
                reason: Reason::Baseline,
                rule: None,
                identity,
            };
        }
        let identity = match self.without_identity {
            WithoutIdentity::Cookie => identity.or_else(|| Some(issue_identity(dice))),
            WithoutIdentity::Random | WithoutIdentity::Baseline => identity,
        };
        let drawn = match (&identity, self.without_identity) {
            (Some(identity), _) => self
                .split
                .by_identity(&identity.value)
                .map(|target| (target, Reason::Sticky)),
            (None, WithoutIdentity::Baseline) => None,
            (None, _) => self
                .split
                .by_lot(dice())
                .map(|target| (target, Reason::Random)),
        };
        let (target, reason) = drawn.unwrap_or((BASELINE, Reason::Baseline));
        Decision {
            target,
            reason,
            rule: None,
            identity,
        }
    }

    /// The headers that say who the user is or what he wants: from the wrong sender they are
    /// removed, and no `Connection` header may take them away.
    pub fn guarded_headers(&self) -> Vec<HeaderName> {
        let identity = self.identity.iter().filter_map(IdentitySource::header);
        let wishes = self.steps.iter().filter_map(|step| match step {
            Step::Override(wish) => wish.header.clone(),
            Step::DenyList(_) | Step::Rule(_) => None,
        });
        once_each(identity.chain(wishes).filter(|name| *name != COOKIE))
    }

    /// Of the guarded headers those that mean nothing from a sender who is not trusted: they are
    /// not passed on, so that nobody behind Serin believes them either. A signed token is believed
    /// from anybody.
    pub fn unbelieved_headers(&self) -> Vec<HeaderName> {
        if !self.trusted_only {
            return Vec::new();
        }
        let proven = self
            .identity
            .iter()
            .filter(|source| source.proves_itself())
            .filter_map(IdentitySource::header);
        let proven: Vec<HeaderName> = proven.collect();
        self.guarded_headers()
            .into_iter()
            .filter(|name| !proven.contains(name))
            .collect()
    }

    /// All headers that a decision reads, for `Vary`.
    pub fn headers_read(&self) -> Vec<HeaderName> {
        let mut names: Vec<HeaderName> = self
            .identity
            .iter()
            .filter_map(IdentitySource::header)
            .collect();
        for step in &self.steps {
            match step {
                Step::DenyList(_) => {}
                Step::Override(wish) => {
                    names.extend(wish.header.clone());
                    names.extend(wish.cookie.as_ref().map(|_| COOKIE));
                }
                Step::Rule(rule) => {
                    names.extend(
                        rule.conditions
                            .iter()
                            .filter_map(|condition| match condition {
                                Condition::Header(name, _) => Some(name.clone()),
                                Condition::Cookie(..) => Some(COOKIE),
                                _ => None,
                            }),
                    )
                }
            }
        }
        once_each(names)
    }
}

// === impl Step ===

impl Step {
    /// Its place in the order of precedence.
    pub fn rank(&self) -> Rank {
        match self {
            Self::DenyList(_) => Rank::DenyList,
            Self::Override(_) => Rank::Override,
            Self::Rule(Rule {
                user_list: Some(_), ..
            }) => Rank::UserList,
            Self::Rule(_) => Rank::Rule,
        }
    }

    fn decide(
        &self,
        head: &RequestHead<'_>,
        identity: Option<&Identity<'_>>,
        believe: Believe,
    ) -> Option<(Target, Reason, Option<&str>)> {
        let is_on =
            |list: &UserList| identity.is_some_and(|identity| list.contains(&identity.value));
        match self {
            Self::DenyList(list) => is_on(list).then_some((BASELINE, Reason::DenyList, None)),
            Self::Override(_) if believe == Believe::ProofOnly => None,
            Self::Override(wish) => wish
                .read(head)
                .map(|target| (target, Reason::Override, None)),
            Self::Rule(rule) => {
                let reason = if rule.user_list.is_some() {
                    Reason::UserList
                } else {
                    Reason::Rule
                };
                let holds = rule.user_list.as_deref().is_none_or(is_on)
                    && rule
                        .conditions
                        .iter()
                        .all(|condition| condition.holds(head));
                holds.then_some((rule.target, reason, Some(&*rule.name)))
            }
        }
    }
}

// === impl Override ===

impl Override {
    /// The target that the client asks for; a name that is none of this route's is no wish at all.
    fn read(&self, head: &RequestHead<'_>) -> Option<Target> {
        let target = |wish| {
            self.names
                .iter()
                .find(|(name, _)| name == wish)
                .map(|(_, target)| *target)
        };
        let in_header = self.header.as_ref().and_then(|name| head.header(name));
        let in_cookie = self.cookie.as_deref().and_then(|name| head.cookie(name));
        in_header
            .and_then(target)
            .or_else(|| in_cookie.and_then(target))
    }
}

// === impl Reason ===

impl Reason {
    /// All reasons there are.
    pub const ALL: [Self; 8] = [
        Self::DenyList,
        Self::Override,
        Self::UserList,
        Self::Rule,
        Self::Sticky,
        Self::Random,
        Self::Baseline,
        Self::Failover,
    ];

    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DenyList => "deny_list",
            Self::Override => "override",
            Self::UserList => "user_list",
            Self::Rule => "rule",
            Self::Sticky => "sticky",
            Self::Random => "random",
            Self::Baseline => "baseline",
            Self::Failover => "failover",
        }
    }
}

// === impl Decision ===

impl Decision<'_> {
    /// The anonymous id that this request is given, when it is given one.
    pub fn issued_identity(&self) -> Option<&str> {
        self.identity
            .as_ref()
            .filter(|identity| identity.source.is_none())
            .map(|identity| &*identity.value)
    }
}

fn once_each(names: impl IntoIterator<Item = HeaderName>) -> Vec<HeaderName> {
    let mut seen = HashSet::new();
    names
        .into_iter()
        .filter(|name| seen.insert(name.clone()))
        .collect()
}

fn issue_identity(dice: Dice<'_>) -> Identity<'static> {
    Identity {
        value: Cow::Owned(format!("{:016x}{:016x}", dice(), dice())),
        source: None,
    }
}

#[cfg(test)]
mod tests;
