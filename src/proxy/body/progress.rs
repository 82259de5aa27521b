//! How far the body of a request has come, for whoever waits for the response.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::io;
use std::rc::Rc;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::request::Content;
use super::{LINGER, linger};

/// How far the body of a request has come; shared with whoever waits for the response.
#[derive(Clone, Debug)]
pub enum Progress {
    /// There is no body; since then it is the upstream's turn.
    NoBody(Instant),
    /// There is one.
    Body(Rc<Sent>),
}

/// A body, as whoever waits for the response sees it.
#[derive(Debug)]
pub struct Sent {
    stage: Cell<Stage>,
    /// What is left of it when nobody sends it on any more.
    left: RefCell<Option<Box<Content>>>,
    /// Told when something is left.
    is_left: Notify,
}

/// Where a body is.
#[derive(Clone, Copy, Debug)]
pub struct Stage {
    pub(super) last: Instant,
    state: BodyState,
    pub(super) bytes: u64,
    /// The head of the response is here: the body may rest.
    pub(super) is_answered: bool,
    /// More of it was sent than is kept.
    is_spent: bool,
    /// All of it has come.
    is_over: bool,
}

/// Whose turn it is with the body of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyState {
    /// It is going on, or has ended: if nothing comes back, the upstream is slow.
    Moving,
    /// The upstream would take more, but the client sends none.
    AwaitingClient,
    /// The client sent something that is no body.
    Malformed,
    /// The client sent more than it may.
    TooLarge,
    /// The client sent nothing for too long.
    Stalled,
    /// The client sent what cannot be translated.
    Untranslatable,
    /// The client went away.
    Gone,
}

// === impl Sent ===

impl Sent {
    /// A body that begins to be sent.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            stage: Cell::new(Stage::new(now)),
            left: RefCell::default(),
            is_left: Notify::new(),
        }
    }

    pub(super) fn stage(&self) -> Stage {
        self.stage.get()
    }

    fn update(&self, change: impl FnOnce(Stage) -> Stage) {
        self.stage.set(change(self.stage.get()));
    }

    pub(super) fn moved(&self, state: BodyState, bytes: usize) {
        self.update(|stage| Stage {
            last: Instant::now(),
            state,
            bytes: stage.bytes + bytes as u64,
            ..stage
        });
    }

    pub(super) fn await_client(&self) {
        self.update(|stage| Stage {
            state: BodyState::AwaitingClient,
            ..stage
        });
    }

    /// All of it has come.
    pub(super) fn ended(&self) {
        self.update(|stage| Stage {
            is_over: true,
            ..stage
        });
    }

    pub(super) fn spend(&self) {
        self.update(|stage| Stage {
            is_spent: true,
            ..stage
        });
    }

    pub(super) fn begin_again(&self, now: Instant) {
        self.update(|stage| Stage {
            last: now,
            state: BodyState::Moving,
            ..stage
        });
    }

    /// Nobody sends any more of it: this is what is left.
    pub(super) fn leave(&self, content: Box<Content>) {
        *self.left.borrow_mut() = Some(content);
        self.is_left.notify_one();
    }

    /// What is left of the body, as soon as whoever sent it has let go of it. Its connection is about
    /// to end then.
    pub(super) async fn remains(&self) -> Box<Content> {
        loop {
            if let Some(content) = self.left.borrow_mut().take() {
                return content;
            }
            self.is_left.notified().await;
        }
    }
}

// === impl Stage ===

impl Stage {
    fn new(now: Instant) -> Self {
        Self {
            last: now,
            state: BodyState::Moving,
            bytes: 0,
            is_answered: false,
            is_spent: false,
            is_over: false,
        }
    }

    /// It will not come to its end, and the client is to blame.
    fn is_broken(self) -> bool {
        !matches!(self.state, BodyState::Moving | BodyState::AwaitingClient)
    }

    /// All of it can be sent again: what was broken off would look as if it were whole.
    pub(super) fn is_whole(self) -> bool {
        !self.is_spent && !self.is_broken()
    }
}

// === impl BodyState ===

impl BodyState {
    /// hyper says with the cause whether what came was wrong, or nothing came any more.
    pub(super) fn broken_by(error: &hyper::Error) -> Self {
        let cause = error
            .source()
            .and_then(|cause| cause.downcast_ref::<io::Error>())
            .map(io::Error::kind);
        match cause {
            Some(io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => Self::Malformed,
            _ => Self::Gone,
        }
    }
}

// === impl Progress ===

impl Progress {
    /// True as long as all of it can be sent again.
    pub fn is_whole(&self) -> bool {
        self.stage().is_whole()
    }

    /// True when nobody sends any more of it.
    pub fn is_sent(&self) -> bool {
        match self {
            Self::NoBody(_) => true,
            Self::Body(sent) => sent.left.borrow().is_some(),
        }
    }

    /// Takes what its client still sends of it, as soon as nobody else does: its answer is whole.
    pub fn linger(&self) {
        let Self::Body(sent) = self else {
            return;
        };
        if sent.stage().is_over {
            return;
        }
        let sent = Rc::clone(sent);
        drop(tokio::task::spawn_local(async move {
            if let Ok(content) = timeout(LINGER, sent.remains()).await {
                linger(content.incoming);
            }
        }));
    }

    /// When the body last moved; at first, when the exchange with the upstream began.
    pub fn last(&self) -> Instant {
        self.stage().last
    }

    /// Whose turn it is, or how it broke.
    pub fn state(&self) -> BodyState {
        self.stage().state
    }

    /// True when it will not come to its end, and the client is to blame.
    pub fn was_broken_by_client(&self) -> bool {
        self.stage().is_broken()
    }

    /// The head of the response is here, and there will be no other: nothing is sent again.
    pub fn answered(&self) {
        if let Self::Body(sent) = self {
            sent.update(|stage| Stage {
                is_answered: true,
                ..stage
            });
            if let Some(content) = sent.left.borrow_mut().as_mut() {
                content.forget();
            }
        }
    }

    /// How much of the body has come.
    pub fn bytes(&self) -> u64 {
        self.stage().bytes
    }

    fn stage(&self) -> Stage {
        match self {
            Self::NoBody(since) => Stage::new(*since),
            Self::Body(sent) => sent.stage(),
        }
    }
}
