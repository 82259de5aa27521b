//! Which route takes a request, and which of its backends gets it.
//!
//! Everything here is a pure function of a request head, the compiled rules and the dice: no I/O,
//! no clock, no random source of its own. So the proxy, `serin explain` and the tests run the very
//! same code.

pub mod gray;
pub mod identity;
pub mod matcher;
pub mod path;
pub mod request;
pub mod rescue;
pub mod split;
pub mod table;
pub mod user_list;

pub use gray::{Decision, Gray, Reason};
pub use request::RequestHead;
pub use table::RouteTable;
pub use user_list::UserList;

/// The position of a backend among the `backendRefs` of its route; [`BASELINE`] is the first.
pub type Target = usize;

/// The target that everybody gets when nothing else decides: the stable version.
pub const BASELINE: Target = 0;
