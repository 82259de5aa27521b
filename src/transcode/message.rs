//! Between JSON and messages: what path, query and body say, and what a service answers.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, OneofDescriptor,
    ReflectMessage, SerializeOptions, Value as Reflected,
};
use serde::de::IntoDeserializer;
use serde::de::value::MapDeserializer;
use serde::{Serialize, Serializer};
use serde_json::de::SliceRead;
use serde_json::error::Category;
use serde_json::{Map, Value, json};

use crate::routing::request::query_pairs;

use super::{Body, Call};

/// What stands before each message of gRPC: a flag and a length.
pub const PREFIX: usize = 5;

/// google.rpc.Status, as `grpc-status-details-bin` carries it.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<AnyMessage>,
}

/// google.protobuf.Any.
#[derive(Clone, PartialEq, Message)]
struct AnyMessage {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// JSON that is one field's.
struct Part<'a, 'de>(&'a mut serde_json::Deserializer<SliceRead<'de>>);

// === impl Call ===

impl Call {
    /// The message that a request means, framed for gRPC; `body` is its whole body.
    ///
    /// # Errors
    ///
    /// What is wrong with the request, for its sender.
    pub fn request(&self, body: &[u8]) -> Result<Bytes, String> {
        let mut message = self.of_body(body)?;
        for (name, text) in query_pairs(self.query.as_deref().unwrap_or_default()) {
            if self.is_asked_in_query(&name) {
                let (owner, field) = reach(&mut message, &name)?;
                put(owner, &field, &text)?;
            }
        }
        // Last, since the path has decided who is asked.
        for (path, text) in &self.captures {
            let text = std::str::from_utf8(text)
                .map_err(|_| format!("the path has no UTF-8 for `{path}`"))?;
            let (owner, field) = reach(&mut message, path)?;
            put(owner, &field, text)?;
        }
        Ok(framed(&message))
    }

    /// What the body says. It is read straight into the message: with a tree of JSON in between it would
    /// take up to three times the memory.
    fn of_body(&self, body: &[u8]) -> Result<DynamicMessage, String> {
        let input = self.binding.rpc.input();
        let mut json = serde_json::Deserializer::from_slice(body);
        let message = match &self.binding.body {
            _ if body.is_empty() => return Ok(DynamicMessage::new(input)),
            Body::None => return Ok(DynamicMessage::new(input)),
            Body::Whole => DynamicMessage::deserialize(input, &mut json),
            Body::Field(field) => {
                let fields = std::iter::once((field.json_name(), Part(&mut json)));
                DynamicMessage::deserialize(input, MapDeserializer::new(fields))
            }
        };
        message
            .and_then(|message| json.end().map(|()| message))
            .map_err(|error| self.fault(body, &error))
    }

    fn fault(&self, body: &[u8], error: &serde_json::Error) -> String {
        let is_object = body.trim_ascii_start().starts_with(b"{");
        match (error.classify(), &self.binding.body) {
            (Category::Data, Body::Whole) if !is_object => "the body is not a JSON object".into(),
            (Category::Data, _) => error.to_string(),
            _ => format!("the body is not JSON: {error}"),
        }
    }

    /// What is no field may be meant for whoever decides about the version, and the body's field is
    /// what the body says alone.
    fn is_asked_in_query(&self, path: &str) -> bool {
        let input = self.binding.rpc.input();
        let (first, _) = first_step(path);
        field_at(&input, path).is_some()
            && match &self.binding.body {
                Body::None => true,
                Body::Whole => false,
                Body::Field(field) => field_at(&input, first).as_ref() != Some(field),
            }
    }

    /// The JSON of a message that the service has answered with.
    ///
    /// # Errors
    ///
    /// When it is no such message.
    pub fn response(&self, message: Bytes) -> Result<Vec<u8>, String> {
        let output = self.binding.rpc.output();
        let message = DynamicMessage::decode(output, message).map_err(|error| error.to_string())?;
        let mut text = Vec::new();
        let mut json = serde_json::Serializer::new(&mut text);
        match &self.binding.response {
            None => serialize(&message, &mut json)?,
            Some(field) => {
                let mut whole = serialize(&message, serde_json::value::Serializer)?;
                let part = whole.get_mut(field.json_name()).map(Value::take);
                let part = part.unwrap_or_else(|| empty(field));
                part.serialize(&mut json)
                    .map_err(|error| error.to_string())?;
            }
        }
        Ok(text)
    }
}

// === impl Part ===

impl<'a, 'de> IntoDeserializer<'de, serde_json::Error> for Part<'a, 'de> {
    type Deserializer = &'a mut serde_json::Deserializer<SliceRead<'de>>;

    fn into_deserializer(self) -> Self::Deserializer {
        self.0
    }
}

/// The JSON of google.rpc.Status; `details` is what `grpc-status-details-bin` says.
pub fn status(pool: &DescriptorPool, code: u8, message: &str, details: Option<&[u8]>) -> Value {
    let details = details.and_then(|text| {
        let text = text.trim_ascii_end();
        let bytes = STANDARD_NO_PAD
            .decode(text)
            .or_else(|_| STANDARD.decode(text));
        RpcStatus::decode(&*bytes.ok()?).ok()
    });
    let details = details.map(|status| status.details).unwrap_or_default();
    let details: Vec<Value> = details.iter().map(|any| detail(pool, any)).collect();
    json!({ "code": code, "message": message, "details": details })
}

/// A detail with the name of its type; as bytes, when its type is not known.
fn detail(pool: &DescriptorPool, any: &AnyMessage) -> Value {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    let known = pool.get_message_by_name(name).and_then(|kind| {
        let message = DynamicMessage::decode(kind, &*any.value).ok()?;
        serialize(&message, serde_json::value::Serializer).ok()
    });
    match known {
        Some(Value::Object(fields)) => {
            let kind = ("@type".to_owned(), Value::from(any.type_url.clone()));
            Value::Object(std::iter::once(kind).chain(fields).collect())
        }
        Some(value) => json!({ "@type": any.type_url, "value": value }),
        None => json!({ "@type": any.type_url, "value": STANDARD.encode(&any.value) }),
    }
}

fn serialize<S: Serializer>(message: &DynamicMessage, serializer: S) -> Result<S::Ok, String> {
    let options = SerializeOptions::new().skip_default_fields(false);
    message
        .serialize_with_options(serializer, &options)
        .map_err(|error| error.to_string())
}

/// What a field is that a message does not have.
fn empty(field: &FieldDescriptor) -> Value {
    if field.is_list() {
        Value::Array(Vec::new())
    } else if field.is_map() {
        Value::Object(Map::new())
    } else {
        Value::Null
    }
}

/// A message as gRPC frames it, not compressed.
fn framed(message: &DynamicMessage) -> Bytes {
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(PREFIX + length);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message
        .encode(&mut bytes)
        .expect("there is always room in what grows");
    bytes.freeze()
}

/// The field at a path such as `book.id`.
pub(super) fn field_at(message: &MessageDescriptor, path: &str) -> Option<FieldDescriptor> {
    let (first, rest) = first_step(path);
    let field = message
        .get_field_by_name(first)
        .or_else(|| message.get_field_by_json_name(first))?;
    match (rest, field.kind()) {
        (None, _) => Some(field),
        (Some(rest), Kind::Message(inner)) if !field.is_list() && !field.is_map() => {
            field_at(&inner, rest)
        }
        _ => None,
    }
}

/// The first name of a path such as `book.id`, and what comes after it.
fn first_step(path: &str) -> (&str, Option<&str>) {
    path.split_once('.')
        .map_or((path, None), |(first, rest)| (first, Some(rest)))
}

/// The field at a path, with the message that it is in; those on the way there come to be.
fn reach<'m>(
    message: &'m mut DynamicMessage,
    path: &str,
) -> Result<(&'m mut DynamicMessage, FieldDescriptor), String> {
    let (first, rest) = first_step(path);
    let no_field = || format!("there is no field `{path}`");
    let field = field_at(&message.descriptor(), first).ok_or_else(no_field)?;
    refuse_second_choice(message, &field)?;
    let Some(rest) = rest else {
        return Ok((message, field));
    };
    let inner = message.get_field_mut(&field).as_message_mut();
    reach(inner.ok_or_else(no_field)?, rest)
}

/// Setting a field of a oneof takes the others away, which somebody has asked for.
fn refuse_second_choice(message: &DynamicMessage, field: &FieldDescriptor) -> Result<(), String> {
    let choice = field.containing_oneof();
    let mut others = choice.iter().flat_map(OneofDescriptor::fields);
    match others.find(|other| other != field && message.has_field(other)) {
        Some(other) => Err(format!(
            "only one of `{}` and `{}` can be",
            other.name(),
            field.name()
        )),
        None => Ok(()),
    }
}

/// Gives a field of a message what a text says; a field that may be repeated gets one more.
fn put(message: &mut DynamicMessage, field: &FieldDescriptor, text: &str) -> Result<(), String> {
    let value = scalar(&field.kind(), text);
    let value = if field.is_list() {
        json!([value])
    } else {
        value
    };
    let alone = json!({ field.json_name(): value });
    let mut alone = DynamicMessage::deserialize(message.descriptor(), alone)
        .map_err(|error| format!("`{}`: {error}", field.name()))?;
    match alone.take_field(field) {
        Some(Reflected::List(more)) => {
            if let Some(list) = message.get_field_mut(field).as_list_mut() {
                list.extend(more);
            }
        }
        Some(value) => message.set_field(field, value),
        // It says what is so without it.
        None => message.clear_field(field),
    }
    Ok(())
}

/// What JSON has for a text; numbers may be texts in it, but `true` and the number of an enum may not.
fn scalar(kind: &Kind, text: &str) -> Value {
    let is_bool = match kind {
        Kind::Message(message) => message.full_name() == "google.protobuf.BoolValue",
        kind => *kind == Kind::Bool,
    };
    match (kind, text) {
        (_, "true" | "false") if is_bool => Value::Bool(text == "true"),
        (Kind::Enum(_), text) => text
            .parse::<i32>()
            .map_or_else(|_| text.into(), Value::from),
        _ => text.into(),
    }
}
