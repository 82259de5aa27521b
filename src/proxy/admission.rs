//! Whether a request is let in at all, and how its client is told where it stands.

use std::time::Duration;

use http::header::{HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};

use crate::limit::gcra::Standing;
use crate::limit::key::Caller;
use crate::limit::rate;
use crate::routing::identity::IdentitySource;
use crate::routing::{Decision, RequestHead};
use crate::snapshot::{Route, Snapshot};

use super::error::ProxyError;
use super::exchange::Exchange;

/// The three fields of draft-ietf-httpapi-ratelimit-headers-03, which are what clients know; later drafts
/// have others.
const LIMIT: HeaderName = HeaderName::from_static("ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("ratelimit-reset");

/// Refuses a request that is one too many in the whole process.
///
/// # Errors
///
/// [`ProxyError::Overloaded`].
pub(super) fn shed(
    snapshot: &Snapshot,
    route: &Route,
    exchange: &mut Exchange,
) -> Result<(), ProxyError> {
    if snapshot
        .overload
        .admits(exchange.in_flight(), route.priority)
    {
        return Ok(());
    }
    exchange.metrics().count_shed(route.priority);
    exchange.stays_with(route);
    Err(ProxyError::Overloaded)
}

/// Refuses a request whose caller has sent too many.
///
/// # Errors
///
/// [`ProxyError::RateLimited`].
pub(super) fn limit_rate(
    route: &Route,
    head: &RequestHead<'_>,
    decision: &Decision<'_>,
    exchange: &mut Exchange,
) -> Result<(), ProxyError> {
    if route.rate_limits.is_empty() {
        return Ok(());
    }
    let caller = caller(route, head, decision);
    let now = exchange.started().into_std();
    match rate::admit(&route.rate_limits, &caller, now) {
        Ok(standing) => {
            exchange.stands(standing);
            Ok(())
        }
        Err(refused) => {
            exchange.stands(Some(refused.standing));
            exchange.stays_with(route);
            Err(ProxyError::RateLimited(refused.retry_after))
        }
    }
}

/// What of a request can be a key of a rate limit.
pub fn caller<'r>(route: &Route, head: &RequestHead<'r>, decision: &'r Decision<'_>) -> Caller<'r> {
    let identity = decision.identity.as_ref();
    let user = identity.filter(|identity| {
        let source = identity
            .source
            .and_then(|source| route.gray.identity.get(source));
        // An address is none but that of a client, who may have a whole network of them.
        source.is_some_and(|source| !matches!(source, IdentitySource::ClientAddress))
    });
    Caller {
        client: head.client,
        user: user.map(|identity| &*identity.value),
        headers: head.headers,
    }
}

/// Writes into a response where its caller stands with the rate limits, and when to come again.
///
/// What an endpoint says of limits of its own gives way: its callers come through ours.
pub(super) fn tell(standing: Option<Standing>, pause: Option<Duration>, headers: &mut HeaderMap) {
    if let Some(standing) = standing {
        headers.insert(LIMIT, standing.limit.into());
        headers.insert(REMAINING, standing.remaining.into());
        headers.insert(RESET, whole_seconds(standing.reset).into());
    }
    if let Some(pause) = pause {
        // Zero would say "at once".
        let seconds = HeaderValue::from(whole_seconds(pause).max(1));
        headers.insert(RETRY_AFTER, seconds);
    }
}

/// Rounded up: who comes then does not come too early.
fn whole_seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}
