//! One process takes over from another: a Unix socket over which the listening sockets go.
//!
//! ```text
//! successor                                predecessor
//!    | -- ask ------------------------------> |   serves
//!    | <----------------- sockets, with them  |   serves
//!    |  starts, and asks endpoints            |   serves
//!    |  serves                                |   serves
//!    | -- ready ----------------------------> |   lets go of its sockets
//!    | <------------------------------ leaving |   drains, and ends
//!    |  listens at the path for its own successor
//! ```
//!
//! Both have the same sockets, with one queue each, so nobody is refused and nobody is lost. The
//! successor takes no connection before its endpoints have been asked whether they are well. As long
//! as it has not said that it is ready, nothing has happened: the predecessor goes on
//! whether the successor is refused, ends, or hangs. And when the predecessor ends meanwhile, the
//! successor has the sockets.
//!
//! Only a process of the same user, or of root, can ask; the socket belongs to its owner alone.

mod post;
mod predecessor;
mod wire;

pub use post::{Open, Post, Successor};
pub use predecessor::{Predecessor, TakeoverError};
