//! What can go wrong with a request, whose fault it is, and what the client is told.

use std::io;
use std::time::Duration;

use http::header::{
    ALLOW, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
};
use http::{Response, StatusCode};
use tracing::debug;

use crate::backend::Crowded;
use crate::routing::rescue::Trouble;
use crate::upstream::{SendError, is_exhaustion, lacks_ports};

use super::admission;
use super::body::{BodyState, Progress, ReplyBody};
use super::exchange::Exchange;
use super::grpc;

const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// When to come again while too many requests are in flight: most are over by then.
const OVERLOAD_PAUSE: Duration = Duration::from_secs(1);

/// Why a request gets a reply of our own.
#[derive(Debug)]
pub enum ProxyError {
    /// The request makes no sense; the text says why.
    BadRequest(&'static str),
    /// What the client sent as the body of the request is none.
    RequestBody,
    /// The client went away while it sent the body of the request.
    ClientGone,
    /// The client began a body and does not go on with it.
    RequestStalled,
    /// The target is longer than the listener allows.
    UriTooLong,
    /// The head has more fields than the listener allows.
    HeadTooLarge,
    /// The body is longer than the listener or the route allows.
    BodyTooLarge,
    /// The request does not say what a method of the service wants.
    Untranslatable,
    /// No method of the service is called so.
    NoMethod,
    /// The request has been here before.
    Loop,
    /// A method that is not for gateways.
    MethodNotAllowed,
    /// The body is coded in a way that is not undone here.
    TransferCoding,
    /// No route takes it.
    NoRoute,
    /// Too many requests are in flight.
    Overloaded,
    /// Its caller has sent too many; after so long the next one is let in.
    RateLimited(Duration),
    /// The backend has no endpoint to send to.
    NoEndpoint,
    /// The backend has as many requests as it may have.
    Crowded(Crowded),
    /// This machine has no file descriptor or port left for a connection.
    Exhausted(io::Error),
    /// The endpoint cannot be reached.
    Connect(io::Error),
    /// The connection did not stand in time.
    ConnectTimeout,
    /// The endpoint has not begun with the request, though the connection was new.
    Unsent(hyper::Error),
    /// The endpoint has not begun with it, on a connection over which it has answered others.
    Refused(hyper::Error),
    /// The connection broke before the response.
    Terminated(hyper::Error),
    /// So did one that had been idle: its endpoint may have closed it before the request came.
    Stale(hyper::Error),
    /// The endpoint coded its response in a way that is not undone here.
    UnknownCoding,
    /// What the endpoint sent is no HTTP.
    Malformed(hyper::Error),
    /// The endpoint changed protocols without being asked.
    UnaskedUpgrade,
    /// The endpoint was asked for a tunnel, and neither agreed nor refused, or cannot be asked.
    UpgradeFailed,
    /// The response did not come in time.
    Timeout,
    /// Nor did it here, but too little was left of the time for that to say anything of the endpoint.
    OutOfTime,
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
        match progress.state() {
            BodyState::Gone => return Self::ClientGone,
            BodyState::Malformed => return Self::RequestBody,
            BodyState::Untranslatable => return Self::Untranslatable,
            BodyState::TooLarge => return Self::BodyTooLarge,
            BodyState::Stalled => return Self::RequestStalled,
            BodyState::Moving | BodyState::AwaitingClient => {}
        }
        match error {
            SendError::Connect(error) if is_exhaustion(&error) || lacks_ports(&error) => {
                Self::Exhausted(error)
            }
            SendError::Connect(error) => Self::Connect(error),
            SendError::ConnectTimeout => Self::ConnectTimeout,
            SendError::Crowded => Self::Crowded(Crowded::NoConnection),
            SendError::NoTunnel => Self::UpgradeFailed,
            SendError::Unsent(error) => Self::Unsent(error),
            SendError::Refused(error) => Self::Refused(error),
            SendError::Stale(error) => Self::Stale(error),
            SendError::Exchange(error) if error.is_parse() => Self::Malformed(error),
            SendError::Exchange(error) => Self::Terminated(error),
        }
    }

    /// What it means for sending the request again; `None` where that is out of the question.
    pub fn trouble(&self) -> Option<Trouble> {
        match self {
            Self::Exhausted(error) if lacks_ports(error) => Some(Trouble::Unsent),
            Self::NoEndpoint | Self::Crowded(_) | Self::Exhausted(_) => Some(Trouble::Unavailable),
            Self::Connect(_) | Self::ConnectTimeout | Self::Unsent(_) | Self::Refused(_) => {
                Some(Trouble::Unsent)
            }
            Self::Stale(_) => Some(Trouble::Stale),
            Self::Terminated(_) | Self::Malformed(_) => Some(Trouble::Broken),
            Self::Timeout => Some(Trouble::Timeout),
            _ => None,
        }
    }

    /// True when it says something about the endpoint.
    pub fn blames_endpoint(&self) -> bool {
        matches!(
            self,
            Self::Connect(_)
                | Self::ConnectTimeout
                | Self::Unsent(_)
                | Self::Terminated(_)
                | Self::Malformed(_)
                | Self::UnknownCoding
                | Self::UnaskedUpgrade
                | Self::Timeout
        )
    }

    /// The status that the client is sent.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) | Self::RequestBody | Self::Untranslatable => {
                StatusCode::BAD_REQUEST
            }
            Self::RequestStalled => StatusCode::REQUEST_TIMEOUT,
            Self::UriTooLong => StatusCode::URI_TOO_LONG,
            Self::HeadTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Loop => StatusCode::LOOP_DETECTED,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::TransferCoding => StatusCode::NOT_IMPLEMENTED,
            Self::NoRoute | Self::NoMethod => StatusCode::NOT_FOUND,
            Self::NoEndpoint | Self::Crowded(_) | Self::Exhausted(_) | Self::Overloaded => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::RateLimited(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::ClientGone => client_gone(),
            Self::Connect(_)
            | Self::Unsent(_)
            | Self::Refused(_)
            | Self::Terminated(_)
            | Self::Stale(_)
            | Self::Malformed(_)
            | Self::UnknownCoding
            | Self::UnaskedUpgrade
            | Self::UpgradeFailed => StatusCode::BAD_GATEWAY,
            Self::ConnectTimeout | Self::Timeout | Self::OutOfTime => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// The error type of RFC 9209 section 2.3: in Proxy-Status and in metrics.
    pub fn token(&self) -> &'static str {
        match self {
            Self::BadRequest(_)
            | Self::RequestBody
            | Self::ClientGone
            | Self::RequestStalled
            | Self::Untranslatable
            | Self::NoMethod => "http_request_error",
            Self::Exhausted(_) | Self::Crowded(_) => "connection_limit_reached",
            Self::Overloaded => "proxy_internal_response",
            Self::RateLimited(_)
            | Self::MethodNotAllowed
            | Self::TransferCoding
            | Self::UriTooLong
            | Self::HeadTooLarge
            | Self::BodyTooLarge => "http_request_denied",
            Self::Loop => "proxy_loop_detected",
            Self::NoRoute => "destination_not_found",
            Self::NoEndpoint => "destination_unavailable",
            Self::Connect(error) => connect_token(error),
            Self::ConnectTimeout => "connection_timeout",
            Self::Unsent(_) | Self::Refused(_) | Self::Terminated(_) | Self::Stale(_) => {
                "connection_terminated"
            }
            Self::Malformed(_) => "http_protocol_error",
            Self::UnknownCoding => "http_response_transfer_coding",
            Self::UnaskedUpgrade | Self::UpgradeFailed => "http_upgrade_failed",
            Self::Timeout | Self::OutOfTime => "http_response_timeout",
        }
    }

    /// Whose fault it is.
    pub fn side(&self) -> Side {
        match self {
            Self::BadRequest(_)
            | Self::RequestBody
            | Self::ClientGone
            | Self::RequestStalled
            | Self::Untranslatable
            | Self::NoMethod
            | Self::UriTooLong
            | Self::HeadTooLarge
            | Self::BodyTooLarge
            | Self::RateLimited(_)
            | Self::MethodNotAllowed
            | Self::TransferCoding => Side::Client,
            Self::NoRoute | Self::Loop | Self::Exhausted(_) | Self::Overloaded => Side::Proxy,
            _ => Side::Upstream,
        }
    }

    /// What a caller of gRPC is told.
    pub fn grpc_status(&self) -> grpc::Status {
        match self {
            // A stream may rest until its deadline, so one that has stalled has met that.
            Self::ConnectTimeout | Self::Timeout | Self::OutOfTime | Self::RequestStalled => {
                grpc::Status::DEADLINE_EXCEEDED
            }
            Self::UriTooLong | Self::HeadTooLarge | Self::BodyTooLarge | Self::RateLimited(_) => {
                grpc::Status::RESOURCE_EXHAUSTED
            }
            Self::Untranslatable => grpc::Status::INVALID_ARGUMENT,
            Self::ClientGone => grpc::Status::CANCELLED,
            Self::Unsent(error)
            | Self::Refused(error)
            | Self::Terminated(error)
            | Self::Stale(error) => grpc::Status::from_broken(error),
            _ => grpc::Status::from_http(self.status()),
        }
    }

    /// After how long it makes sense to come again.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Overloaded | Self::Crowded(_) => Some(OVERLOAD_PAUSE),
            Self::RateLimited(pause) => Some(*pause),
            _ => None,
        }
    }

    /// The reply, which ends the exchange.
    pub fn reply(self, mut exchange: Exchange) -> Response<ReplyBody> {
        debug!(error = ?self, "request failed");
        if self.side() == Side::Upstream {
            exchange.upstream_failed(self.token());
        }
        if exchange.is_grpc() {
            return self.reply_to_call(exchange);
        }
        let status = self.status();
        let text = format!("{status}: {}\n", self.words());
        exchange.replied(status, self.token(), text.len());
        let standing = exchange.standing();
        let length = HeaderValue::from(text.len());
        // hyper leaves the body of a reply to HEAD out in HTTP/1 alone.
        let text = if exchange.is_head() {
            String::new()
        } else {
            text
        };
        let mut response = Response::new(ReplyBody::local(text));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_LENGTH, length);
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        self.set_proxy_status(headers);
        admission::tell(standing, self.retry_after(), headers);
        if matches!(self, Self::TransferCoding) {
            // Whoever sends such a request may see its end somewhere else than we do.
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(
                ALLOW,
                HeaderValue::from_static("GET, HEAD, POST, PUT, DELETE, OPTIONS, PATCH"),
            );
        }
        response
    }

    fn reply_to_call(self, mut exchange: Exchange) -> Response<ReplyBody> {
        let status = self.grpc_status();
        exchange.call_ended(status);
        if let Some(translation) = exchange.translation() {
            translation.replied(self.status());
        }
        match self {
            Self::ClientGone => exchange.replied(client_gone(), self.token(), 0),
            _ => exchange.replied(StatusCode::OK, self.token(), 0),
        }
        let mut response = status.reply(self.words(), ReplyBody::empty());
        let headers = response.headers_mut();
        self.set_proxy_status(headers);
        admission::tell(exchange.standing(), self.retry_after(), headers);
        if let Some(pause) = self.retry_after() {
            grpc::push_back(pause, headers);
        }
        response
    }

    fn set_proxy_status(&self, headers: &mut HeaderMap) {
        if let Ok(value) = HeaderValue::from_str(&format!("serin; error={}", self.token())) {
            headers.insert(PROXY_STATUS, value);
        }
    }

    /// What the client is told: nothing about addresses and the inside of the network.
    pub fn words(&self) -> &'static str {
        match self {
            Self::BadRequest(reason) => reason,
            Self::RequestBody => "the request body is malformed",
            Self::ClientGone => "the client went away",
            Self::TransferCoding => "no transfer coding but chunked is served",
            Self::Exhausted(_) => "the proxy can open no more connections",
            Self::RequestStalled => "the request body did not come in time",
            Self::UriTooLong => "the request target is too long",
            Self::HeadTooLarge => "the request has too many header fields",
            Self::BodyTooLarge => "the request body is too large",
            Self::Untranslatable => "the request is not what the method wants",
            Self::NoMethod => "no method of the service is called so",
            Self::Loop => "the request has passed through this proxy before",
            Self::MethodNotAllowed => "this method is not served",
            Self::NoRoute => "no route takes this host and path",
            Self::Overloaded => "the proxy has too many requests in flight",
            Self::RateLimited(_) => "there have been too many requests",
            Self::NoEndpoint => "no endpoint is available",
            Self::Connect(_) => "the upstream cannot be reached",
            Self::ConnectTimeout => "the upstream did not accept the connection in time",
            Self::Crowded(_) => "the upstream has as many requests as it may have",
            Self::Unsent(_) | Self::Terminated(_) | Self::Stale(_) => {
                "the upstream closed the connection"
            }
            Self::Refused(_) => "the upstream takes no more requests on this connection",
            Self::Malformed(_) => "the upstream's response is malformed",
            Self::UnknownCoding => "the upstream's response has an unknown transfer coding",
            Self::UnaskedUpgrade => "the upstream switched protocols without being asked",
            Self::UpgradeFailed => "the upstream did not agree to the tunnel",
            Self::Timeout | Self::OutOfTime => "the upstream did not answer in time",
        }
    }
}

/// The status for a client that went away before it was sent one: nginx's code, for metrics alone.
pub(super) fn client_gone() -> StatusCode {
    StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST)
}

/// The error type of a connection that could not be made.
fn connect_token(error: &io::Error) -> &'static str {
    match (tls_error(error), error.kind()) {
        (Some(rustls::Error::InvalidCertificate(_)), _) => "tls_certificate_error",
        (Some(rustls::Error::AlertReceived(_)), _) => "tls_alert_received",
        (Some(_), _) => "tls_protocol_error",
        (None, io::ErrorKind::ConnectionRefused) => "connection_refused",
        (None, io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable) => {
            "destination_ip_unroutable"
        }
        (None, _) => "destination_unavailable",
    }
}

/// What went wrong in a TLS handshake.
fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}
