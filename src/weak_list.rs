//! Things that are looked at as long as somebody else holds on to them.

use std::cell::{Cell, RefCell};

/// Weak references, of which those that lead nowhere any more are forgotten now and then: so rarely
/// that adding one costs next to nothing.
#[derive(Debug)]
pub(crate) struct WeakList<W> {
    all: RefCell<Vec<W>>,
    /// How many there may be before they are looked through.
    room: Cell<usize>,
}

/// Either kind of weak reference.
pub(crate) trait Weak {
    /// What it leads to.
    type Strong;

    /// That, if it is still there.
    fn upgrade(&self) -> Option<Self::Strong>;
}

/// Fewer than these are not worth looking through.
const LEAST_ROOM: usize = 64;

// === impl WeakList ===

impl<W: Weak> WeakList<W> {
    /// Adds one.
    pub(crate) fn add(&self, weak: W) {
        let mut all = self.all.borrow_mut();
        if all.len() >= self.room.get() {
            all.retain(|one| one.upgrade().is_some());
            self.room.set((all.len() * 2).max(LEAST_ROOM));
        }
        all.push(weak);
    }

    /// Those that are still there.
    pub(crate) fn living(&self) -> Vec<W::Strong> {
        self.all.borrow().iter().filter_map(W::upgrade).collect()
    }
}

impl<W> Default for WeakList<W> {
    fn default() -> Self {
        Self {
            all: RefCell::default(),
            room: Cell::default(),
        }
    }
}

// === impl Weak ===

impl<T> Weak for std::rc::Weak<T> {
    type Strong = std::rc::Rc<T>;

    fn upgrade(&self) -> Option<Self::Strong> {
        Self::upgrade(self)
    }
}

impl<T> Weak for std::sync::Weak<T> {
    type Strong = std::sync::Arc<T>;

    fn upgrade(&self) -> Option<Self::Strong> {
        Self::upgrade(self)
    }
}

#[cfg(test)]
mod tests {
    use std::rc::{Rc, Weak};

    use super::*;

    #[test]
    fn what_is_gone_is_forgotten_and_takes_no_room_for_ever() {
        let list: WeakList<Weak<usize>> = WeakList::default();
        let kept: Vec<Rc<usize>> = (0..10).map(Rc::new).collect();
        for one in &kept {
            list.add(Rc::downgrade(one));
        }
        for _ in 0..10_000 {
            list.add(Rc::downgrade(&Rc::new(0)));
        }
        assert_eq!(list.living(), kept);
        assert!(list.all.borrow().len() <= LEAST_ROOM);
    }
}
