//! What can go wrong with a request, whose fault it is, and what the client is told.

use std::io;

use http::header::{ALLOW, CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use tracing::debug;

use crate::upstream::SendError;

use super::body::{Progress, ReplyBody};
use super::exchange::Exchange;

const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// Why a request gets a reply of our own.
#[derive(Debug)]
pub enum ProxyError {
    /// The request makes no sense; the text says why.
    BadRequest(&'static str),
    /// The body of the request broke off or was malformed.
    RequestBody,
    /// The client began a body and does not go on with it.
    RequestStalled,
    /// A method that is not for gateways.
    MethodNotAllowed,
    /// No route takes it.
    NoRoute,
    /// The backend has no endpoint to send to.
    NoEndpoint,
    /// The endpoint cannot be reached.
    Connect(io::Error),
    /// The connection did not stand in time.
    ConnectTimeout,
    /// The connection broke before the response.
    Terminated(hyper::Error),
    /// What the endpoint sent is no HTTP.
    Malformed(hyper::Error),
    /// The endpoint changed protocols without being asked.
    UnaskedUpgrade,
    /// The response did not come in time.
    Timeout,
}

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client's.
    Client,
    /// The configuration's.
    Proxy,
    /// The endpoint's.
    Upstream,
}

// === impl ProxyError ===

impl ProxyError {
    /// What a failed attempt means; a body that the client broke off is not the endpoint's fault.
    pub fn from_send(error: SendError, progress: &Progress) -> Self {
        match error {
            _ if progress.is_broken() => Self::RequestBody,
            SendError::Connect(error) => Self::Connect(error),
            SendError::ConnectTimeout => Self::ConnectTimeout,
            SendError::Exchange(error) if error.is_parse() => Self::Malformed(error),
            SendError::Exchange(error) => Self::Terminated(error),
        }
    }

    /// The status that the client is sent.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) | Self::RequestBody => StatusCode::BAD_REQUEST,
            Self::RequestStalled => StatusCode::REQUEST_TIMEOUT,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::NoEndpoint => StatusCode::SERVICE_UNAVAILABLE,
            Self::Connect(_) | Self::Terminated(_) | Self::Malformed(_) | Self::UnaskedUpgrade => {
                StatusCode::BAD_GATEWAY
            }
            Self::ConnectTimeout | Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// The error type of RFC 9209 section 2.3: in Proxy-Status and in metrics.
    pub fn token(&self) -> &'static str {
        match self {
            Self::BadRequest(_) | Self::RequestBody | Self::RequestStalled => "http_request_error",
            Self::MethodNotAllowed => "http_request_denied",
            Self::NoRoute => "destination_not_found",
            Self::NoEndpoint => "destination_unavailable",
            Self::Connect(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused => "connection_refused",
                io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                    "destination_ip_unroutable"
                }
                _ => "destination_unavailable",
            },
            Self::ConnectTimeout => "connection_timeout",
            Self::Terminated(_) => "connection_terminated",
            Self::Malformed(_) => "http_protocol_error",
            Self::UnaskedUpgrade => "http_upgrade_failed",
            Self::Timeout => "http_response_timeout",
        }
    }

    /// Whose fault it is.
    pub fn side(&self) -> Side {
        match self {
            Self::BadRequest(_)
            | Self::RequestBody
            | Self::RequestStalled
            | Self::MethodNotAllowed => Side::Client,
            Self::NoRoute => Side::Proxy,
            _ => Side::Upstream,
        }
    }

    /// The reply, which ends the exchange.
    pub fn reply(self, mut exchange: Exchange) -> Response<ReplyBody> {
        debug!(error = ?self, "request failed");
        if self.side() == Side::Upstream {
            exchange.upstream_failed(self.token());
        }
        let status = self.status();
        exchange.replied(status);
        let mut response = Response::new(ReplyBody::local(format!("{status}: {}\n", self.words())));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        if let Ok(value) = HeaderValue::from_str(&format!("serin; error={}", self.token())) {
            headers.insert(PROXY_STATUS, value);
        }
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(
                ALLOW,
                HeaderValue::from_static("GET, HEAD, POST, PUT, DELETE, OPTIONS, PATCH"),
            );
        }
        response
    }

    /// What the client is told: nothing about addresses and the inside of the network.
    pub fn words(&self) -> &'static str {
        match self {
            Self::BadRequest(reason) => reason,
            Self::RequestBody => "the request body broke off",
            Self::RequestStalled => "the request body did not come in time",
            Self::MethodNotAllowed => "this method is not served",
            Self::NoRoute => "no route takes this host and path",
            Self::NoEndpoint => "no endpoint is available",
            Self::Connect(_) => "the upstream cannot be reached",
            Self::ConnectTimeout => "the upstream did not accept the connection in time",
            Self::Terminated(_) => "the upstream closed the connection",
            Self::Malformed(_) => "the upstream's response is malformed",
            Self::UnaskedUpgrade => "the upstream switched protocols without being asked",
            Self::Timeout => "the upstream did not answer in time",
        }
    }
}
