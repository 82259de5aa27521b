//! Long-lived streams and the versions they are on: whoever has been moved to another version by a
//! change of weights may not stay for ever, where the route says so.
//!
//! A stream takes part with what it was decided by. Each worker looks at its own whenever there is a
//! new snapshot, and only on routes that do not let streams stay does any of this cost anything.

use std::cell::Cell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use crate::routing::{Decision, Reason};
use crate::snapshot::{Revision, Route, Snapshot};
use crate::weak_list::WeakList;

use super::timeouts::Timeout;

/// What a request was decided by, for as long as its stream may be moved.
#[derive(Debug)]
pub struct Decided {
    /// The snapshot that decided.
    revision: Revision,
    route: Arc<str>,
    backend: Arc<str>,
    reason: Reason,
    identity: Option<Box<str>>,
    /// How long it may go on once its user is moved.
    deadline: Duration,
}

/// A stream that is on a version.
#[derive(Debug)]
pub struct Stay {
    decided: Decided,
    is_moved: Cell<bool>,
    /// Set when its user is moved.
    over: Timeout,
}

/// The streams of one worker.
#[derive(Debug, Default)]
pub struct Stays(WeakList<Weak<Stay>>);

// === impl Decided ===

impl Decided {
    /// What has to be remembered, on a route that does not let streams stay.
    pub fn new(revision: Revision, route: &Route, decision: &Decision<'_>) -> Option<Box<Self>> {
        let deadline = route.stream_deadline?;
        let identity = decision.identity.as_ref();
        Some(Box::new(Self {
            revision,
            route: Arc::clone(&route.name),
            backend: Arc::clone(&route.targets[decision.target].backend.name),
            reason: decision.reason,
            identity: identity.map(|identity| identity.value.as_ref().into()),
            deadline,
        }))
    }

    /// True when it would be decided otherwise by this snapshot, as far as that depends on weights and
    /// backends. A route that is gone, or has another name now, has no say.
    fn is_moved_by(&self, snapshot: &Snapshot) -> bool {
        let Some(route) = snapshot.route(&self.route) else {
            let backend = snapshot.backend(&self.backend);
            return backend.is_none_or(|backend| backend.disabled);
        };
        let mut targets = route.targets.iter();
        let Some(own) = targets.position(|target| target.backend.name == self.backend) else {
            return true;
        };
        let split = &route.gray.split;
        match (self.reason, &self.identity) {
            _ if route.targets[own].backend.disabled => true,
            (Reason::Sticky, Some(identity)) => split.by_identity(identity) != Some(own),
            (Reason::Sticky | Reason::Random, _) => split.weights().nth(own) == Some(0),
            _ => false,
        }
    }
}

// === impl Stay ===

impl Stay {
    /// Waits until the stream has to end.
    pub fn poll_over(&self, cx: &Context<'_>) -> Poll<()> {
        self.over.poll_passed(cx)
    }

    /// Whoever was moved already keeps the deadline, and whoever is moved back has none.
    fn follow(&self, snapshot: &Snapshot, now: Instant) {
        let is_moved = self.decided.is_moved_by(snapshot);
        if is_moved != self.is_moved.replace(is_moved) {
            let over = is_moved.then_some(now + self.decided.deadline);
            self.over.set(over);
        }
    }
}

// === impl Stays ===

impl Stays {
    /// A stream begins, and is looked at until what is returned is dropped. Its user may have been
    /// moved since it was decided, while its endpoint took its time to answer.
    pub fn begin(
        &self,
        decided: Decided,
        over: Timeout,
        snapshot: &Snapshot,
        now: Instant,
    ) -> Rc<Stay> {
        let stay = Rc::new(Stay {
            decided,
            is_moved: Cell::new(false),
            over,
        });
        if stay.decided.revision != snapshot.revision {
            stay.follow(snapshot, now);
        }
        self.0.add(Rc::downgrade(&stay));
        stay
    }

    /// There is a new snapshot: whom it moves has to go.
    pub fn follow(&self, snapshot: &Snapshot, now: Instant) {
        for stay in self.0.living() {
            stay.follow(snapshot, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::load::{load_list, load_text};
    use crate::control::offline_snapshot;

    use super::*;

    fn snapshot(routes: usize) -> Snapshot {
        let route = |n| {
            format!(
                "  - {{ name: r{n}, hostnames: [ h{n}.a ], backendRefs: [ {{ name: only }} ] }}\n"
            )
        };
        let routes: String = (0..routes).map(route).collect();
        let text = format!(
            "listeners: [ {{ name: web, address: '127.0.0.1:0' }} ]
backends: [ {{ name: only, endpoints: ['127.0.0.1:9'] }} ]
routes:\n{routes}"
        );
        let loaded = load_text(Path::new("serin.yaml"), &text, &mut load_list);
        offline_snapshot(&loaded.unwrap_or_else(|problems| panic!("{problems}")))
    }

    /// Each worker judges all its streams at once, so it must not look through all routes for each.
    #[test]
    fn a_stream_is_judged_by_its_own_route_among_many() {
        let snapshot = snapshot(1000);
        for (route, backend, is_moved) in [
            ("r0", "only", false),
            ("r999", "only", false),
            ("r999", "gone", true),
            ("gone", "only", false),
        ] {
            let decided = Decided {
                revision: snapshot.revision,
                route: route.into(),
                backend: backend.into(),
                reason: Reason::Random,
                identity: None,
                deadline: Duration::ZERO,
            };
            assert_eq!(
                decided.is_moved_by(&snapshot),
                is_moved,
                "{route} {backend}"
            );
        }
        let found = snapshot.route("r500").map(|route| &*route.name);
        assert_eq!(found, Some("r500"));
    }
}
