//! What becomes of requests and responses beside being sent on: the filters of the Gateway API's
//! HTTPRoute.
//!
//! Pure functions of a request's head; who applies them is [`proxy`](crate::proxy).

pub mod cors;
pub mod redirect;
pub mod rewrite;

use http::header::HeaderValue;

use crate::backend::HeaderEdits;

pub use cors::Cors;
pub use redirect::Redirect;
pub use rewrite::PathRewrite;

/// The filters of a route.
#[derive(Clone, Debug, Default)]
pub struct Filters {
    /// Changes to requests, before those of the backend.
    pub request_headers: HeaderEdits,
    /// Changes to responses, after those of the backend.
    pub response_headers: HeaderEdits,
    /// The host that the endpoint is asked for.
    pub hostname: Option<HeaderValue>,
    /// The path that the endpoint is asked for.
    pub path: Option<PathRewrite>,
    /// Where the client is sent instead.
    pub redirect: Option<Redirect>,
    /// Which pages of other origins may read responses.
    pub cors: Option<Cors>,
}
