//! Bodies on their way through: nothing is held back, and both ends are noticed.
//!
//! `request` is what a client sends, with `progress` for whoever waits for the response and `replay`
//! for an endpoint that fails; `reply` is what it is sent.

mod progress;
mod replay;
mod reply;
mod request;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use tokio::time::{Duration, timeout};

pub use progress::{BodyState, Progress, Sent, Stage};
pub(super) use reply::Held;
pub use reply::{BodyError, ReplyBody, UpstreamBody};
pub use request::{BodyRules, RequestBody, RequestBodyError};

/// How long a client is listened to that has been told the last of us, and how much: what it sends
/// is thrown away, or it would lose what it has not read yet.
pub const LINGER: Duration = Duration::from_secs(2);
/// See [`LINGER`]; in bytes.
pub const LINGER_BYTES: usize = 1 << 20;

/// Takes what a client of HTTP/2 still sends of its body after the answer. Dropped at once, the body
/// would have its stream reset, over which some clients lose the answer (RFC 9113 section 8.1).
pub(super) fn linger(mut body: Incoming) {
    if body.is_end_stream() {
        return;
    }
    let throw_away = async move {
        let mut left = LINGER_BYTES;
        while let Some(Ok(frame)) = body.frame().await
            && left > 0
        {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        }
    };
    drop(tokio::task::spawn_local(timeout(LINGER, throw_away)));
}
