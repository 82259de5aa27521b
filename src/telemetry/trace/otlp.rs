//! Spans as OTLP has them, with the attributes of OpenTelemetry's semantic conventions for HTTP (1.27),
//! and those of ours, which begin with `serin.`.

use std::time::SystemTime;

use bytes::Bytes;
use http::Method;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{
    ResourceSpans, ScopeSpans, Span, SpanFlags, Status as SpanStatus,
};
use prost::Message;
use tokio::time::Instant;

use crate::telemetry::metrics::{MethodLabel, NONE};

use super::span::{AttemptSpan, RequestSpan};

/// The version of the semantic conventions that attributes follow.
const SCHEMA: &str = "https://opentelemetry.io/schemas/1.27.0";

/// Spans on their way, in the order in which they ended.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) requests: Vec<RequestSpan>,
    /// How many spans they are.
    pub(super) spans: usize,
}

/// Tells the time of day of an instant.
struct Clock {
    instant: Instant,
    time: SystemTime,
}

// === impl Batch ===

impl Batch {
    pub(super) fn push(&mut self, request: RequestSpan) {
        self.spans += 1 + request.attempts.len();
        self.requests.push(request);
    }

    /// The message that exports it, in protobuf.
    pub(super) fn encode(self, resource: &[(String, String)]) -> Bytes {
        let clock = Clock {
            instant: Instant::now(),
            time: SystemTime::now(),
        };
        let mut spans = Vec::with_capacity(self.spans);
        for request in self.requests {
            request.write(&clock, &mut spans);
        }
        let scope = InstrumentationScope {
            name: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..InstrumentationScope::default()
        };
        let attributes = resource.iter().map(|(key, value)| text(key, value));
        let request = ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(Resource {
                    attributes: attributes.collect(),
                    ..Resource::default()
                }),
                scope_spans: vec![ScopeSpans {
                    scope: Some(scope),
                    spans,
                    schema_url: SCHEMA.to_owned(),
                }],
                schema_url: SCHEMA.to_owned(),
            }],
        };
        request.encode_to_vec().into()
    }
}

// === impl RequestSpan ===

impl RequestSpan {
    fn write(self, clock: &Clock, spans: &mut Vec<Span>) {
        let shared = Span {
            trace_id: self.context.trace_id.to_be_bytes().to_vec(),
            trace_state: self.trace_state.to_string(),
            flags: u32::from(self.context.flags()) | SpanFlags::ContextHasIsRemoteMask as u32,
            ..Span::default()
        };
        for (position, attempt) in self.attempts.iter().enumerate() {
            spans.push(Span {
                span_id: attempt.span_id.to_be_bytes().to_vec(),
                parent_span_id: self.context.span_id.to_be_bytes().to_vec(),
                name: verb(&self.method).to_owned(),
                kind: SpanKind::Client.into(),
                start_time_unix_nano: clock.nanoseconds(attempt.began),
                end_time_unix_nano: clock.nanoseconds(attempt.ended.unwrap_or(self.ended)),
                attributes: attempt.attributes(position, &self.method),
                status: Some(status(attempt.has_failed(), attempt.error)),
                ..shared.clone()
            });
        }
        let parent = self.context.parent_id;
        let is_remote = match parent {
            Some(_) => SpanFlags::ContextIsRemoteMask as u32,
            None => 0,
        };
        let parent_span_id = parent.map(|id| id.to_be_bytes().to_vec());
        spans.push(Span {
            span_id: self.context.span_id.to_be_bytes().to_vec(),
            parent_span_id: parent_span_id.unwrap_or_default(),
            name: match &self.target {
                Some(target) => format!("{} {}", verb(&self.method), target.route),
                None => verb(&self.method).to_owned(),
            },
            kind: SpanKind::Server.into(),
            start_time_unix_nano: clock.nanoseconds(self.began),
            end_time_unix_nano: clock.nanoseconds(self.ended),
            attributes: self.attributes(),
            status: Some(status(self.has_failed, self.error)),
            flags: shared.flags | is_remote,
            ..shared
        });
    }

    fn attributes(&self) -> Vec<KeyValue> {
        let (address, port) = host_and_port(&self.host);
        let (bytes_in, bytes_out) = self.bytes;
        let status = self.status.as_str();
        let failure = self.error.or(self.grpc_status).unwrap_or(status);
        let failure = self.has_failed.then_some(failure);
        let target = self.target.as_ref();
        let tls = self.tls.map(|version| version.trim_start_matches("TLSv"));
        let mut attributes = vec![
            text("http.request.method", method(&self.method)),
            text("url.scheme", self.scheme),
            text("url.path", &self.path),
            text("network.protocol.version", self.protocol),
            number("http.response.status_code", self.status.as_u16().into()),
            number("http.request.body.size", bytes_in),
            number("http.response.body.size", bytes_out),
            number("serin.attempts", self.attempts.len() as u64),
        ];
        let texts = [
            ("http.request.method_original", original(&self.method)),
            ("server.address", Some(address).filter(|it| !it.is_empty())),
            ("user_agent.original", self.user_agent.as_deref()),
            ("tls.protocol.version", tls),
            ("error.type", failure.or(self.error)),
            ("serin.route", target.map(|target| &*target.route)),
            ("serin.backend", there_is(target.map(|it| &*it.backend))),
            ("serin.version", there_is(target.map(|it| &*it.version))),
            ("serin.reason", self.reason),
            ("serin.rule", self.rule.as_deref()),
            ("serin.shielded_by", self.shielded_by.as_deref()),
        ];
        let texts = texts.into_iter();
        attributes.extend(texts.filter_map(|(key, value)| Some(text(key, value?))));
        let client = self.client.map(|client| client.to_string());
        attributes.extend(client.map(|client| text("client.address", &client)));
        attributes.extend(port.map(|port| number("server.port", port.into())));
        let grpc = self.grpc_status.and_then(|status| status.parse().ok());
        attributes.extend(grpc.map(|status| number("rpc.grpc.status_code", status)));
        attributes
    }
}

// === impl AttemptSpan ===

impl AttemptSpan {
    fn has_failed(&self) -> bool {
        self.error.is_some()
            || self.is_failed_call
            || self.status.is_some_and(|status| status.is_server_error())
    }

    fn attributes(&self, position: usize, asked: &Method) -> Vec<KeyValue> {
        let address = self.endpoint.ip().to_canonical().to_string();
        let mut attributes = vec![
            text("http.request.method", method(asked)),
            text("server.address", &address),
            number("server.port", self.endpoint.port().into()),
            text("serin.backend", &self.backend),
            text("serin.version", &self.version),
        ];
        if position > 0 {
            attributes.push(number("http.request.resend_count", position as u64));
        }
        if let Some(status) = self.status {
            attributes.push(number("http.response.status_code", status.as_u16().into()));
        }
        let status = self.status.as_ref().map(http::StatusCode::as_str);
        let failure = self.error.or(self.grpc_status).or(status);
        let failure = failure.filter(|_| self.has_failed());
        let grpc = self.grpc_status.and_then(|status| status.parse().ok());
        attributes.extend(grpc.map(|status| number("rpc.grpc.status_code", status)));
        attributes.extend(failure.map(|failure| text("error.type", failure)));
        attributes
    }
}

// === impl Clock ===

impl Clock {
    /// Since 1970.
    fn nanoseconds(&self, instant: Instant) -> u64 {
        let time = self
            .time
            .checked_sub(self.instant.saturating_duration_since(instant));
        let since = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The method, of a closed set.
fn method(method: &Method) -> &'static str {
    MethodLabel::from(method).as_str()
}

/// What names of spans begin with.
fn verb(asked: &Method) -> &'static str {
    match original(asked) {
        Some(_) => "HTTP",
        None => method(asked),
    }
}

/// The method, where it is not of that set.
fn original(asked: &Method) -> Option<&str> {
    Some(asked.as_str()).filter(|original| *original != method(asked))
}

fn status(has_failed: bool, error: Option<&str>) -> SpanStatus {
    match has_failed {
        true => SpanStatus {
            code: StatusCode::Error.into(),
            message: error.unwrap_or_default().to_owned(),
        },
        false => SpanStatus::default(),
    }
}

/// A label that stands for something.
fn there_is(label: Option<&str>) -> Option<&str> {
    label.filter(|label| *label != NONE && !label.is_empty())
}

/// A host without its port, and the port.
fn host_and_port(host: &str) -> (&str, Option<u16>) {
    match host.rsplit_once(':') {
        Some((address, port)) if !port.ends_with(']') => (address, port.parse().ok()),
        _ => (host, None),
    }
}

fn text(key: &str, value: &str) -> KeyValue {
    attribute(key, Value::StringValue(value.to_owned()))
}

fn number(key: &str, value: u64) -> KeyValue {
    let value = i64::try_from(value).unwrap_or(i64::MAX);
    attribute(key, Value::IntValue(value))
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}
