//! How much is let in: of whom how fast, and of all together how much at a time.
//!
//! [`gcra`] is the arithmetic of a rate, [`buckets`] the fixed memory of who has had how much, [`key`]
//! who is who, [`rate`] the limits of a route, and [`overload`] the limit of the whole process. Nothing
//! here knows of replies: what becomes of a request that is not let in is decided in
//! [`proxy`](crate::proxy).
//!
//! All state is that of this process, shared by its workers. Replicas know nothing of each other, so
//! behind `N` of them a client may have up to `N` times a limit.

pub mod buckets;
pub mod gcra;
pub mod key;
pub mod overload;
pub mod rate;
