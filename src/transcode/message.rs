//! Between JSON and messages: what path, query and body say, and what a service answers.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor,
    SerializeOptions,
};
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

// === impl Call ===

impl Call {
    /// The message that a request means, framed for gRPC; `body` is its whole body.
    ///
    /// # Errors
    ///
    /// What is wrong with the request, for its sender.
    pub fn request(&self, body: &[u8]) -> Result<Bytes, String> {
        let input = self.binding.rpc.input();
        let parse = || {
            serde_json::from_slice(body).map_err(|error| format!("the body is not JSON: {error}"))
        };
        let mut message = match &self.binding.body {
            _ if body.is_empty() => Map::new(),
            Body::None => Map::new(),
            Body::Whole => match parse()? {
                Value::Object(fields) => fields,
                _ => return Err("the body is not a JSON object".to_owned()),
            },
            Body::Field(field) => Map::from_iter([(field.name().to_owned(), parse()?)]),
        };
        if !matches!(self.binding.body, Body::Whole) {
            for (name, value) in query_pairs(self.query.as_deref().unwrap_or_default()) {
                // What is no field may be meant for whoever decides about the version.
                if field_at(&input, &name).is_some() {
                    put(&mut message, &input, &name, &value)?;
                }
            }
        }
        // Last, since the path has decided who is asked.
        for (field, text) in &self.captures {
            rename(&mut message, &input, field)?;
            take(&mut message, field);
            put(&mut message, &input, field, text)?;
        }
        let options = DeserializeOptions::new();
        let message =
            DynamicMessage::deserialize_with_options(input, Value::Object(message), &options)
                .map_err(|error| error.to_string())?;
        Ok(framed(&message))
    }

    /// The JSON of a message that the service has answered with.
    ///
    /// # Errors
    ///
    /// When it is no such message.
    pub fn response(&self, message: Bytes) -> Result<Vec<u8>, String> {
        let output = self.binding.rpc.output();
        let message = DynamicMessage::decode(output, message).map_err(|error| error.to_string())?;
        let mut json = to_json(&message)?;
        if let Some(field) = &self.binding.response {
            let part = json.get_mut(field.json_name()).map(Value::take);
            json = part.unwrap_or_else(|| empty(field));
        }
        serde_json::to_vec(&json).map_err(|error| error.to_string())
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
        to_json(&message).ok()
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

fn to_json(message: &DynamicMessage) -> Result<Value, String> {
    let options = SerializeOptions::new().skip_default_fields(false);
    message
        .serialize_with_options(serde_json::value::Serializer, &options)
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
    bytes.extend_from_slice(&message.encode_to_vec());
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

/// Gives a field of a message what a text says; a field that may be repeated gets one more.
fn put(
    object: &mut Map<String, Value>,
    message: &MessageDescriptor,
    path: &str,
    text: &str,
) -> Result<(), String> {
    let (first, rest) = first_step(path);
    let field = field_at(message, first).ok_or_else(|| format!("there is no field `{path}`"))?;
    let name = field.name().to_owned();
    if let (Some(rest), Kind::Message(inner)) = (rest, field.kind()) {
        let object = object
            .entry(name)
            .or_insert_with(|| Value::Object(Map::new()));
        let object = object
            .as_object_mut()
            .ok_or_else(|| format!("`{first}` is no object"))?;
        return put(object, &inner, rest, text);
    }
    let value = scalar(&field.kind(), text);
    if field.is_list() {
        let list = object
            .entry(name)
            .or_insert_with(|| Value::Array(Vec::new()));
        if let Some(list) = list.as_array_mut() {
            list.push(value);
        }
    } else {
        object.insert(name, value);
    }
    Ok(())
}

/// Gives the fields on a path the names of the definition: JSON may call them otherwise, and who says
/// one field twice could mean another than the path did.
fn rename(
    object: &mut Map<String, Value>,
    message: &MessageDescriptor,
    path: &str,
) -> Result<(), String> {
    let (first, rest) = first_step(path);
    let Some(field) = field_at(message, first) else {
        return Ok(());
    };
    if field.name() != field.json_name()
        && let Some(value) = object.remove(field.json_name())
        && object.insert(field.name().to_owned(), value).is_some()
    {
        return Err(format!("`{}` is there twice", field.name()));
    }
    match (rest, field.kind(), object.get_mut(field.name())) {
        (Some(rest), Kind::Message(inner), Some(Value::Object(object))) => {
            rename(object, &inner, rest)
        }
        _ => Ok(()),
    }
}

/// Takes a field away, whatever it is called.
fn take(object: &mut Map<String, Value>, path: &str) {
    match first_step(path) {
        (first, Some(rest)) => {
            if let Some(inner) = object.get_mut(first).and_then(Value::as_object_mut) {
                take(inner, rest);
            }
        }
        (name, None) => drop(object.remove(name)),
    }
}

/// What JSON has for a text; numbers may be texts in it, but `true` may not.
fn scalar(kind: &Kind, text: &str) -> Value {
    let wrapped = match kind {
        Kind::Message(message) => message.full_name() == "google.protobuf.BoolValue",
        kind => *kind == Kind::Bool,
    };
    match (wrapped, text) {
        (true, "true") => Value::Bool(true),
        (true, "false") => Value::Bool(false),
        _ => Value::String(text.to_owned()),
    }
}
