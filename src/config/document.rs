//! A YAML document in which every node knows where it stands.
//!
//! Configuration is decoded from this tree instead of straight from text, for two reasons: a
//! problem found long after parsing (an unknown backend, say) still points at its line and column,
//! and a bad node can be cut out so that the rest is decoded and judged in the same run. Nothing
//! here knows what the keys mean.

mod deserializer;

use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// Documents of so many mappings, sequences and scalars are read however short they are.
const ALWAYS_READ: usize = 100_000;

/// A place in a source text: 1-based line and column for people, byte range for the caret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Line, counted from 1.
    pub line: usize,
    /// Column in characters, counted from 1.
    pub column: usize,
    /// Bytes of the text.
    pub bytes: Range<usize>,
}

impl Span {
    /// The beginning of a text.
    pub fn start() -> Self {
        Self {
            line: 1,
            column: 1,
            bytes: 0..0,
        }
    }
}

/// One step from a node to a child of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The value under a key of a mapping.
    Key(String),
    /// An element of a sequence, counted from 0.
    Index(usize),
}

/// The way from the root of a document to a node, as in `routes[0].backendRefs[1].name`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path(Vec<Step>);

/// One node of a document.
#[derive(Clone, Debug)]
pub struct Node {
    span: Span,
    value: Value,
    /// Keys cut out of this mapping, or the names of elements cut out of this sequence, where they
    /// have one: what is wrong for want of them is no news.
    lost: Vec<Option<String>>,
    /// Keys that this mapping has already when they come.
    repeated: Vec<Key>,
    /// True for what was put in for something missing.
    stand_in: bool,
}

/// What may be put in for something missing, so that what is around it can be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandIn {
    /// An empty text.
    Text,
    /// An empty sequence.
    List,
}

#[derive(Clone, Debug)]
enum Value {
    Null,
    Scalar(serde_json::Value),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

#[derive(Clone, Debug)]
struct Key {
    name: String,
    span: Span,
}

// === impl Path ===

impl Path {
    /// This path and the value under `key`.
    pub fn key(&self, key: impl Into<String>) -> Self {
        self.join(Step::Key(key.into()))
    }

    /// This path and the element at `index`.
    pub fn index(&self, index: usize) -> Self {
        self.join(Step::Index(index))
    }

    /// This path and one step more.
    pub fn join(&self, step: Step) -> Self {
        let mut steps = self.0.clone();
        steps.push(step);
        Self(steps)
    }

    /// The path without its last step.
    pub fn parent(&self) -> Self {
        Self(
            self.0
                .split_last()
                .map(|(_, parents)| parents.to_vec())
                .unwrap_or_default(),
        )
    }

    /// The steps from the root.
    pub fn steps(&self) -> &[Step] {
        &self.0
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, step) in self.0.iter().enumerate() {
            match step {
                Step::Key(key) if position == 0 => write!(f, "{key}")?,
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

// === impl Node ===

impl Node {
    /// Parses `source` as one YAML document.
    ///
    /// # Errors
    ///
    /// The parser's first complaint: syntax, or an alias bomb.
    pub fn parse(source: &str) -> Result<Self, serde_saphyr::Error> {
        let most = source.len().max(ALWAYS_READ);
        let options = serde_saphyr::options! {
            with_snippet: false,
            // A backend may be called `off`.
            strict_booleans: true,
            duplicate_keys: serde_saphyr::DuplicateKeyPolicy::PassThrough,
            // A text has fewer nodes than bytes; only aliases make more of it, and they are bounded.
            budget: serde_saphyr::budget! { max_nodes: most, max_events: 2 * most },
        };
        serde_saphyr::from_str_with_options(source, options)
    }

    /// True for a document without any content (only white space and comments, or `null`).
    pub fn is_empty(&self) -> bool {
        match &self.value {
            Value::Null => true,
            Value::Map(entries) => entries.is_empty(),
            Value::Scalar(_) | Value::List(_) => false,
        }
    }

    /// Where the node at `path` stands, or else its nearest ancestor.
    ///
    /// A path whose last step is a key points at the value; for a mapping or sequence, which begins
    /// on the next line, at the key, since that is what an operator looks for.
    pub fn locate(&self, path: &Path) -> Span {
        let mut node = self;
        let mut span = &self.span;
        for step in path.steps() {
            match node.child(step) {
                Some((key, child)) => {
                    span = match (&child.value, key) {
                        (Value::Map(_) | Value::List(_) | Value::Null, Some(key)) => &key.span,
                        _ => &child.span,
                    };
                    node = child;
                }
                None => break,
            }
        }
        span.clone()
    }

    /// Where the key at the end of `path` stands.
    pub fn locate_key(&self, path: &Path) -> Span {
        let Some(Step::Key(name)) = path.steps().last() else {
            return self.locate(path);
        };
        let parent = path.parent();
        match self.get(&parent).map(|node| &node.value) {
            Some(Value::Map(entries)) => entries
                .iter()
                .find(|(key, _)| key.name == *name)
                .map_or_else(|| self.locate(&parent), |(key, _)| key.span.clone()),
            _ => self.locate(&parent),
        }
    }

    /// The node at `path`.
    pub fn get(&self, path: &Path) -> Option<&Self> {
        path.steps()
            .iter()
            .try_fold(self, |node, step| node.child(step).map(|(_, child)| child))
    }

    /// True when something was cut out of the node at `path`: what it lacks may have been meant to
    /// be there.
    pub fn is_maimed(&self, path: &Path) -> bool {
        self.get(path).is_some_and(|node| !node.lost.is_empty())
    }

    /// True when `path`, or something on the way to it, was cut out or is put in for something
    /// missing.
    pub fn is_unknown(&self, path: &Path) -> bool {
        let mut node = self;
        for step in path.steps() {
            if let Step::Key(key) = step
                && node.lost.iter().flatten().any(|lost| lost == key)
            {
                return true;
            }
            match node.child(step) {
                Some((_, child)) => node = child,
                None => return false,
            }
            if node.stand_in {
                return true;
            }
        }
        false
    }

    /// The keys that were cut out of the mapping at `path`, or the names of elements cut out of the
    /// sequence there.
    pub fn lost_names(&self, path: &Path) -> impl Iterator<Item = &str> {
        self.get(path)
            .into_iter()
            .flat_map(|node| node.lost.iter().flatten().map(String::as_str))
    }

    /// True when the sequence at `path` has, or may have, elements whose names nobody can know.
    pub fn has_nameless(&self, path: &Path) -> bool {
        let name = Step::Key("name".to_owned());
        self.is_unknown(path)
            || self.get(path).is_some_and(|node| {
                let nameless =
                    |item: &Self| item.child(&name).is_some_and(|(_, name)| name.stand_in);
                node.lost.contains(&None) || node.items().iter().any(nameless)
            })
    }

    /// Every key that comes again in its mapping, and the places of those later ones.
    pub fn repeated_keys(&self) -> Vec<(Path, Span)> {
        let mut found = Vec::new();
        self.collect_repeated_keys(&Path::default(), &mut found);
        found
    }

    fn collect_repeated_keys(&self, at: &Path, found: &mut Vec<(Path, Span)>) {
        found.extend(
            self.repeated
                .iter()
                .map(|key| (at.key(key.name.as_str()), key.span.clone())),
        );
        match &self.value {
            Value::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    item.collect_repeated_keys(&at.index(index), found);
                }
            }
            Value::Map(entries) => {
                for (key, node) in entries {
                    node.collect_repeated_keys(&at.key(key.name.as_str()), found);
                }
            }
            Value::Null | Value::Scalar(_) => {}
        }
    }

    /// Puts something in under a key that is missing, or in place of what was put in before; false
    /// when `path` is not a key of a mapping.
    pub fn put_in(&mut self, path: &Path, stand_in: StandIn) -> bool {
        let Some((Step::Key(name), parents)) = path.steps().split_last() else {
            return false;
        };
        let parent = parents
            .iter()
            .try_fold(self, |node, step| node.child_mut(step));
        let Some(Self {
            value: Value::Map(entries),
            span,
            ..
        }) = parent
        else {
            return false;
        };
        let value = match stand_in {
            StandIn::Text => Value::Scalar("".into()),
            StandIn::List => Value::List(Vec::new()),
        };
        let key = Key {
            name: name.clone(),
            span: span.clone(),
        };
        entries.retain(|(key, _)| key.name != *name);
        entries.push((
            key,
            Self {
                stand_in: true,
                ..Self::new(span.clone(), value)
            },
        ));
        true
    }

    /// What was put in at `path`, if that was done.
    pub fn stand_in(&self, path: &Path) -> Option<StandIn> {
        self.get(path)
            .filter(|node| node.stand_in)
            .map(|node| match node.value {
                Value::List(_) => StandIn::List,
                _ => StandIn::Text,
            })
    }

    /// Cuts the node at `path` out of its parent; false when there is nothing there to cut.
    pub fn prune(&mut self, path: &Path) -> bool {
        let Some((last, parents)) = path.steps().split_last() else {
            return false;
        };
        let parent = parents
            .iter()
            .try_fold(self, |node, step| node.child_mut(step));
        match (parent, last) {
            (
                Some(Self {
                    value: Value::List(items),
                    lost,
                    ..
                }),
                Step::Index(index),
            ) if *index < items.len() => {
                lost.push(items.remove(*index).own_name());
                true
            }
            (
                Some(Self {
                    value: Value::Map(entries),
                    lost,
                    ..
                }),
                Step::Key(name),
            ) => {
                let before = entries.len();
                entries.retain(|(key, _)| key.name != *name);
                lost.push(Some(name.clone()));
                entries.len() < before
            }
            _ => false,
        }
    }

    /// What an element of a sequence is called: by its `name`, or by the text that stands in its
    /// place.
    fn own_name(&self) -> Option<String> {
        let name = self
            .child(&Step::Key("name".to_owned()))
            .map_or(self, |(_, name)| name);
        name.as_str().map(str::to_owned)
    }

    fn new(span: Span, value: Value) -> Self {
        Self {
            span,
            value,
            lost: Vec::new(),
            repeated: Vec::new(),
            stand_in: false,
        }
    }

    fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar(scalar) => scalar.as_str(),
            _ => None,
        }
    }

    fn items(&self) -> &[Self] {
        match &self.value {
            Value::List(items) => items,
            _ => &[],
        }
    }

    fn child(&self, step: &Step) -> Option<(Option<&Key>, &Self)> {
        match (&self.value, step) {
            (Value::List(items), Step::Index(index)) => items.get(*index).map(|item| (None, item)),
            (Value::Map(entries), Step::Key(name)) => entries
                .iter()
                .find(|(key, _)| key.name == *name)
                .map(|(key, node)| (Some(key), node)),
            _ => None,
        }
    }

    fn child_mut(&mut self, step: &Step) -> Option<&mut Self> {
        match (&mut self.value, step) {
            (Value::List(items), Step::Index(index)) => items.get_mut(*index),
            (Value::Map(entries), Step::Key(name)) => entries
                .iter_mut()
                .find(|(key, _)| key.name == *name)
                .map(|(_, node)| node),
            _ => None,
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned {
            value: Parsed { value, repeated },
            referenced,
            ..
        } = Spanned::deserialize(deserializer)?;
        Ok(Self {
            repeated,
            ..Self::new(Span::from(&referenced), value)
        })
    }
}

/// A value as the parser gives it.
struct Parsed {
    value: Value,
    repeated: Vec<Key>,
}

impl From<Value> for Parsed {
    fn from(value: Value) -> Self {
        Self {
            value,
            repeated: Vec::new(),
        }
    }
}

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

impl From<&serde_saphyr::Location> for Span {
    fn from(location: &serde_saphyr::Location) -> Self {
        let span = location.span();
        let start = span.byte_offset().unwrap_or_default() as usize;
        let length = span.byte_len().unwrap_or_default() as usize;
        Self {
            line: location.line() as usize,
            column: location.column() as usize,
            bytes: start..start + length,
        }
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Parsed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Parsed, E> {
        Ok(Value::Null.into())
    }

    fn visit_none<E>(self) -> Result<Parsed, E> {
        Ok(Value::Null.into())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Parsed, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Parsed, E> {
        Ok(Value::Scalar(value.into()).into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Parsed, E> {
        Ok(Value::Scalar(value.into()).into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Parsed, E> {
        Ok(Value::Scalar(value.into()).into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Parsed, E> {
        Ok(Value::Scalar(value.into()).into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Parsed, E> {
        Ok(Value::Scalar(value.into()).into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Parsed, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = sequence.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items).into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parsed, A::Error> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        let mut repeated = Vec::new();
        while let Some((key, node)) = map.next_entry::<Spanned<String>, Node>()? {
            let key = Key {
                span: Span::from(&key.referenced),
                name: key.value,
            };
            if entries.iter().any(|(earlier, _)| earlier.name == key.name) {
                repeated.push(key);
            } else {
                entries.push((key, node));
            }
        }
        Ok(Parsed {
            value: Value::Map(entries),
            repeated,
        })
    }
}
