//! What of gRPC a gateway has to know: which requests are gRPC, how long they may take, and how one
//! ends ("gRPC over HTTP2", PROTOCOL-HTTP2.md).

use std::error::Error;
use std::time::Duration;

use h2::Reason;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Response, StatusCode, Version};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

/// How a call has ended (google.rpc.Code).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(u8);

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// What may not stand in `grpc-message` as it is.
const MESSAGE: &AsciiSet = &CONTROLS.add(b'%');

// === impl Status ===

impl Status {
    /// The caller took its call back.
    pub const CANCELLED: Self = Self(1);
    /// Nobody knows.
    pub const UNKNOWN: Self = Self(2);
    /// The request is wrong.
    pub const INVALID_ARGUMENT: Self = Self(3);
    /// It did not end in time.
    pub const DEADLINE_EXCEEDED: Self = Self(4);
    /// There is too much of something.
    pub const RESOURCE_EXHAUSTED: Self = Self(8);
    /// There is no such method.
    pub const UNIMPLEMENTED: Self = Self(12);
    /// Something that must hold does not.
    pub const INTERNAL: Self = Self(13);
    /// The service cannot be reached now.
    pub const UNAVAILABLE: Self = Self(14);

    const UNAUTHENTICATED: Self = Self(16);
    const PERMISSION_DENIED: Self = Self(7);

    /// What trailers say, or the head of a response that is nothing but trailers.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(GRPC_STATUS)?.to_str().ok()?;
        text.parse().ok().map(Self)
    }

    /// What a response without a status of gRPC means ("HTTP to gRPC Status Code Mapping").
    pub fn from_http(status: StatusCode) -> Self {
        match status.as_u16() {
            499 => Self::CANCELLED,
            400 => Self::INTERNAL,
            401 => Self::UNAUTHENTICATED,
            403 => Self::PERMISSION_DENIED,
            404 => Self::UNIMPLEMENTED,
            429 | 502..=504 => Self::UNAVAILABLE,
            _ => Self::UNKNOWN,
        }
    }

    /// What it means that the upstream brought no whole response: it may have said so by resetting the
    /// call's stream ("HTTP2 Transport Mapping", Errors).
    pub fn from_broken(error: &hyper::Error) -> Self {
        let reset = error
            .source()
            .and_then(|source| source.downcast_ref::<h2::Error>())
            .filter(|error| error.is_reset() && error.is_remote());
        match reset.and_then(h2::Error::reason) {
            None | Some(Reason::REFUSED_STREAM) => Self::UNAVAILABLE,
            Some(Reason::CANCEL) => Self::CANCELLED,
            Some(Reason::ENHANCE_YOUR_CALM) => Self::RESOURCE_EXHAUSTED,
            Some(Reason::INADEQUATE_SECURITY) => Self::PERMISSION_DENIED,
            Some(_) => Self::INTERNAL,
        }
    }

    /// What HTTP says instead (google/rpc/code.proto, "HTTP Mapping").
    pub fn to_http(self) -> StatusCode {
        let code = match self.0 {
            0 => 200,
            1 => 499,
            3 | 9 | 11 => 400,
            4 => 504,
            5 => 404,
            6 | 10 => 409,
            7 => 403,
            8 => 429,
            12 => 501,
            14 => 503,
            16 => 401,
            _ => 500,
        };
        StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The number.
    pub fn code(self) -> u8 {
        self.0
    }

    /// True for a call that went well.
    pub fn is_ok(self) -> bool {
        self.0 == 0
    }

    /// The number as a label: a closed set, whatever a service makes up.
    pub fn as_str(self) -> &'static str {
        const LABELS: [&str; 17] = [
            "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15",
            "16",
        ];
        LABELS.get(usize::from(self.0)).unwrap_or(&"_OTHER")
    }

    /// True for those that are the service's fault (OpenTelemetry, "Semantic conventions for gRPC").
    pub fn is_failure(self) -> bool {
        !matches!(self.0, 0 | 1 | 3 | 5..=7 | 9..=11 | 16)
    }

    /// The trailers that end a call so.
    pub fn trailers(self, message: &str) -> HeaderMap {
        let mut trailers = HeaderMap::with_capacity(2);
        trailers.insert(GRPC_STATUS, HeaderValue::from_static(self.as_str()));
        let message = utf8_percent_encode(message, MESSAGE).to_string();
        if let Ok(message) = HeaderValue::from_str(&message) {
            trailers.insert(GRPC_MESSAGE, message);
        }
        trailers
    }

    /// A response that is nothing but trailers.
    pub fn reply<B>(self, message: &str, body: B) -> Response<B> {
        let mut response = Response::new(body);
        *response.headers_mut() = self.trailers(message);
        let content_type = HeaderValue::from_static("application/grpc");
        response.headers_mut().insert(CONTENT_TYPE, content_type);
        response
    }
}

/// True for a call of gRPC, which HTTP/1.1 knows none of: what calls itself one there is a request
/// like any other, with the limits of those.
pub fn is_call(parts: &Parts) -> bool {
    parts.version == Version::HTTP_2 && has_content(&parts.headers)
}

/// True for a head whose content is gRPC; gRPC-Web is another protocol.
pub fn has_content(headers: &HeaderMap) -> bool {
    let rest = headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.as_bytes().strip_prefix(b"application/grpc"));
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// How long the caller waits; `None` for ever, and for what is no timeout.
pub fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if number.len() > 8 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// Tells a caller's own retries when to come again (gRFC A6, "Pushback").
pub fn push_back(pause: Duration, trailers: &mut HeaderMap) {
    let milliseconds = pause.as_nanos().div_ceil(1_000_000);
    let milliseconds = i32::try_from(milliseconds).unwrap_or(i32::MAX);
    trailers.insert(PUSHBACK, milliseconds.into());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn its_content_is_told_from_others() {
        for (kind, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc; charset=utf-8", true),
            ("application/grpc-web", false),
            ("application/grpcx", false),
            ("application/json", false),
        ] {
            let headers = headers(CONTENT_TYPE, kind);
            assert_eq!(has_content(&headers), expected, "{kind}");
        }
    }

    #[test]
    fn timeouts_are_as_the_protocol_writes_them() {
        for (text, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("99999999S", Some(Duration::from_secs(99_999_999))),
            ("250m", Some(Duration::from_millis(250))),
            ("0u", Some(Duration::ZERO)),
            ("7n", Some(Duration::from_nanos(7))),
            ("100000000S", None),
            ("S", None),
            ("1.5S", None),
            ("-1S", None),
            ("10", None),
            ("", None),
        ] {
            assert_eq!(timeout(&headers(GRPC_TIMEOUT, text)), expected, "{text}");
        }
    }

    #[test]
    fn statuses_are_a_closed_set_and_messages_are_encoded() {
        for (text, label, is_failure) in [
            ("0", "0", false),
            ("1", "1", false),
            ("5", "5", false),
            ("8", "8", true),
            ("14", "14", true),
            ("99", "_OTHER", true),
        ] {
            let status = Status::of(&headers(GRPC_STATUS, text)).unwrap();
            assert_eq!((status.as_str(), status.is_failure()), (label, is_failure));
        }
        assert_eq!(Status::of(&headers(GRPC_STATUS, "300")), None);
        let trailers = Status::UNAVAILABLE.trailers("100 % gone\nü");
        assert_eq!(trailers[GRPC_MESSAGE], "100 %25 gone%0A%C3%BC");
    }
}
