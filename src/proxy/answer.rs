//! The head of an upstream's response, on its way to the client: what must not go on, and what has to
//! be held on to until its body ends.

use std::rc::Rc;
use std::time::Duration;

use http::{Response, StatusCode, Version};
use hyper::body::Incoming;

use crate::backend::Lease;
use crate::backend::outlier::is_failure;
use crate::upstream::Loan;

use super::body::{Held, ReplyBody, RequestBody, UpstreamBody};
use super::error::ProxyError;
use super::exchange::Exchange;
use super::headers::{self, Survey};
use super::limits::Limits;
use super::origin::Guards;
use super::stays::Stay;
use super::tunnel::Tunnel;
use super::upgrade::{Ends, Wish};

/// The head of an upstream's response, with what has to be held on to until its body ends.
pub(super) struct Answer {
    pub(super) response: Response<Incoming>,
    pub(super) lease: Lease,
    pub(super) loan: Loan<RequestBody>,
    /// How long it took.
    pub(super) latency: Duration,
    /// Whether it may stay, if it is a stream.
    pub(super) stay: Option<Rc<Stay>>,
    /// Where it leads, if it is one, and how long nothing may go through.
    pub(super) tunnel: Option<Box<(Ends, Guards, Option<Duration>)>>,
    pub(super) limits: Limits,
}

/// What is heard of a response by its head.
pub(super) struct Heard {
    /// Where it leads, if the client has asked for a tunnel.
    pub(super) ends: Option<Ends>,
    pub(super) survey: Survey,
    /// How long it took.
    pub(super) latency: Duration,
}

/// Takes note of the head of a response, unless it must not go on.
pub(super) fn answered(
    response: &mut Response<Incoming>,
    wish: Option<Box<Wish>>,
    lease: &Lease,
    exchange: &mut Exchange,
) -> Result<Heard, ProxyError> {
    let checked = checked(response, wish);
    let is_counted = is_failure(response.status());
    let (ends, survey) = checked.inspect_err(|error| {
        if error.blames_endpoint() && !is_counted {
            lease.failed();
        }
    })?;
    *response.version_mut() = Version::HTTP_11;
    let latency = exchange.answered(response.status());
    exchange.heard_head(response);
    Ok(Heard {
        ends,
        survey,
        latency,
    })
}

/// Where a response leads, and what it has, unless it must not go on.
fn checked(
    response: &mut Response<Incoming>,
    wish: Option<Box<Wish>>,
) -> Result<(Option<Ends>, Survey), ProxyError> {
    let ends = match wish {
        Some(wish) => wish.answered(response)?,
        // Nobody asked: the upgrade fields were taken out of the request.
        None if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
            return Err(ProxyError::UnaskedUpgrade);
        }
        None => None,
    };
    let survey = Survey::of(response.headers());
    let refusal = || ProxyError::UnknownCoding;
    headers::refuse_transfer_coding(response.headers(), survey, refusal)?;
    Ok((ends, survey))
}

// === impl Answer ===

impl Answer {
    pub(super) fn into_response(self, mut exchange: Exchange) -> Response<ReplyBody> {
        let Self {
            response,
            lease,
            loan,
            latency,
            stay,
            tunnel,
            limits,
        } = self;
        let Some(tunnel) = tunnel else {
            let deadline = limits.into_deadline();
            // What a failure says of the endpoint is known already.
            let latency = Some(latency).filter(|_| !is_failure(response.status()));
            return response.map(|body| {
                let held = Held::new(exchange, lease, loan, latency);
                ReplyBody::Upstream(Box::new(UpstreamBody::new(body, held, deadline, stay)))
            });
        };
        let (ends, guards, idle) = *tunnel;
        let mut response = response.map(|_| ReplyBody::empty());
        ends.tell(response.headers_mut());
        lease.answered(latency);
        exchange.becomes_tunnel();
        let tunnel = Tunnel {
            ends,
            exchange,
            lease,
            loan,
            guards,
            idle,
            timeout: limits.timeout,
            stay,
        };
        drop(tokio::task::spawn_local(tunnel.run()));
        response
    }
}
