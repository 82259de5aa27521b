//! serde's view of a document.
//!
//! Stricter than that of `serde_json`, which takes a list for a mapping whose keys are given by
//! position: here a list where a mapping belongs is a mistake, and is called one. And who reports a
//! mistake says where it is.
//!
//! A type that asks for a mapping, a list, a text or a flag is offered nothing else: to go by what
//! stands in the document would compile each type's refusal of everything that may stand there.

use std::fmt;
use std::slice;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer,
    MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::Value as Scalar;

use super::{Key, Node, Path, Step, Value};

/// What serde has to say against a document.
#[derive(Debug)]
pub struct Misread {
    message: String,
    /// Where it is, from there to the root.
    steps: Vec<Step>,
}

/// What an error says that has nothing to look at.
const NO_VARIANT: &str = "one of the words known here";

// === impl Misread ===

impl Misread {
    /// Where it is.
    pub fn path(&self) -> Path {
        let steps = self.steps.iter().rev().cloned();
        steps.fold(Path::default(), |path, step| path.join(step))
    }

    fn within(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }
}

impl fmt::Display for Misread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Misread {}

impl serde::de::Error for Misread {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self {
            message: message.to_string(),
            steps: Vec::new(),
        }
    }
}

// === impl Node ===

impl<'de> Deserializer<'de> for &'de Node {
    type Error = Misread;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misread> {
        match &self.value {
            Value::Null | Value::Scalar(Scalar::Null) => visitor.visit_unit(),
            Value::Scalar(Scalar::Bool(value)) => visitor.visit_bool(*value),
            Value::Scalar(Scalar::String(text)) => visitor.visit_borrowed_str(text),
            Value::Scalar(Scalar::Number(number)) => {
                match (number.as_u64(), number.as_i64(), number.as_f64()) {
                    (Some(number), ..) => visitor.visit_u64(number),
                    (None, Some(number), _) => visitor.visit_i64(number),
                    (None, None, number) => visitor.visit_f64(number.unwrap_or(f64::NAN)),
                }
            }
            Value::Scalar(Scalar::Array(_)) | Value::List(_) => self.deserialize_seq(visitor),
            Value::Scalar(Scalar::Object(_)) | Value::Map(_) => self.deserialize_map(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misread> {
        match &self.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Misread> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Misread> {
        self.deserialize_map(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misread> {
        match &self.value {
            Value::Map(entries) => visitor.visit_map(Entries {
                left: entries.iter(),
                value: None,
            }),
            _ => Err(Misread::invalid_type(self.found(), &visitor)),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misread> {
        match &self.value {
            Value::List(items) => visitor.visit_seq(Items(items.iter().enumerate())),
            _ => Err(Misread::invalid_type(self.found(), &visitor)),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misread> {
        match &self.value {
            Value::Scalar(Scalar::String(text)) => visitor.visit_borrowed_str(text),
            _ => Err(Misread::invalid_type(self.found(), &visitor)),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misread> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misread> {
        match &self.value {
            Value::Scalar(Scalar::Bool(value)) => visitor.visit_bool(*value),
            _ => Err(Misread::invalid_type(self.found(), &visitor)),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Misread> {
        match &self.value {
            Value::Scalar(Scalar::String(word)) => visitor.visit_enum(Variant {
                name: word,
                content: None,
            }),
            Value::Scalar(Scalar::Bool(_) | Scalar::Number(_)) => {
                Err(Misread::invalid_type(self.found(), &"string or map"))
            }
            Value::Map(entries) => match &entries[..] {
                [(key, content)] => visitor.visit_enum(Variant {
                    name: &key.name,
                    content: Some(content),
                }),
                _ => Err(Misread::invalid_value(
                    Unexpected::Map,
                    &"map with a single key",
                )),
            },
            _ => Err(Misread::invalid_type(self.found(), &NO_VARIANT)),
        }
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct
        identifier ignored_any
    }
}

impl Node {
    /// What is here, for whoever expected something else.
    fn found(&self) -> Unexpected<'_> {
        match &self.value {
            Value::Null | Value::Scalar(Scalar::Null) => Unexpected::Unit,
            Value::Scalar(Scalar::Bool(value)) => Unexpected::Bool(*value),
            Value::Scalar(Scalar::String(text)) => Unexpected::Str(text),
            Value::Scalar(Scalar::Number(number)) => match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => Unexpected::Unsigned(number),
                (None, Some(number)) => Unexpected::Signed(number),
                (None, None) => Unexpected::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::Scalar(Scalar::Array(_)) | Value::List(_) => Unexpected::Seq,
            Value::Scalar(Scalar::Object(_)) | Value::Map(_) => Unexpected::Map,
        }
    }
}

/// The items of a list.
struct Items<'de>(std::iter::Enumerate<slice::Iter<'de, Node>>);

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = Misread;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Misread> {
        let Some((index, item)) = self.0.next() else {
            return Ok(None);
        };
        let item = seed.deserialize(item);
        item.map(Some)
            .map_err(|misread| misread.within(Step::Index(index)))
    }
}

/// The entries of a mapping.
struct Entries<'de> {
    left: slice::Iter<'de, (Key, Node)>,
    /// That of the key that was read last.
    value: Option<&'de (Key, Node)>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Misread;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Misread> {
        self.value = self.left.next();
        let Some((key, _)) = self.value else {
            return Ok(None);
        };
        let step = || Step::Key(key.name.clone());
        let key = seed.deserialize(key.name.as_str().into_deserializer());
        key.map(Some)
            .map_err(|misread: Misread| misread.within(step()))
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Misread> {
        let (key, value) = self
            .value
            .take()
            .ok_or_else(|| Misread::custom("no key was read"))?;
        let value = seed.deserialize(value);
        value.map_err(|misread| misread.within(Step::Key(key.name.clone())))
    }
}

/// A word, or a mapping with one key.
struct Variant<'de> {
    name: &'de str,
    content: Option<&'de Node>,
}

impl<'de> EnumAccess<'de> for Variant<'de> {
    type Error = Misread;
    type Variant = Self;

    fn variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<(T::Value, Self), Misread> {
        // A name that nobody knows is a mistake of the mapping.
        Ok((seed.deserialize(self.name.into_deserializer())?, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'de> {
    type Error = Misread;

    fn unit_variant(self) -> Result<(), Misread> {
        let Some(content) = self.content else {
            return Ok(());
        };
        <()>::deserialize(content).map_err(|misread| self.within(misread))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Misread> {
        let Some(content) = self.content else {
            let expected = &"newtype variant";
            return Err(Misread::invalid_type(Unexpected::UnitVariant, expected));
        };
        let value = seed.deserialize(content);
        value.map_err(|misread| self.within(misread))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Misread> {
        Err(Misread::invalid_type(Unexpected::TupleVariant, &visitor))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Misread> {
        Err(Misread::invalid_type(Unexpected::StructVariant, &visitor))
    }
}

impl Variant<'_> {
    /// The tag is a key of the document as well: `header` in `{ header: x-user-id }`.
    fn within(&self, misread: Misread) -> Misread {
        match self.content {
            Some(_) => misread.within(Step::Key(self.name.to_owned())),
            None => misread,
        }
    }
}
