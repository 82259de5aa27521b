//! HTTP with JSON for services of gRPC: by the `google.api.http` annotations of their definition
//! (google/api/http.proto), so that one definition serves both.
//!
//! Pure: which method a request means, its message, and the JSON of what comes back. The bodies that
//! carry them are in [`proxy::translate`](crate::proxy::translate).

pub mod message;
pub mod template;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use http::Method;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, MessageDescriptor, MethodDescriptor, Value,
};

use template::{Captures, Template};

/// The methods of some services, by what HTTP calls them.
#[derive(Clone)]
pub struct Transcoder {
    /// By the method of HTTP, in the order in which they are asked.
    bindings: HashMap<Method, Vec<Arc<Binding>>>,
    pool: DescriptorPool,
}

/// One way to call a method.
pub struct Binding {
    method: Method,
    template: Template,
    body: Body,
    /// The field of the response that is its body; `None` for all of it.
    response: Option<FieldDescriptor>,
    /// What is called.
    pub rpc: MethodDescriptor,
    /// The same as a path.
    pub path: String,
}

/// Where the body of a request goes.
#[derive(Clone, Debug)]
enum Body {
    /// There is none, and every other field may be in the query.
    None,
    /// It is the message, and nothing may be in the query.
    Whole,
    /// It is this field, and others may be in the query.
    Field(FieldDescriptor),
}

/// A method that a request means.
#[derive(Clone, Debug)]
pub struct Call {
    /// Which way of calling it.
    pub binding: Arc<Binding>,
    captures: Captures,
    query: Option<String>,
    pub(crate) pool: DescriptorPool,
}

/// What is wrong with a definition, as a half sentence or a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DefinitionError {
    /// The file of descriptors.
    Set(String),
    /// A service, by its position in the list.
    Service(usize, String),
}

// === impl Transcoder ===

impl Transcoder {
    /// The methods of these services that have annotations, with the names of those that cannot be
    /// called by HTTP.
    ///
    /// # Errors
    ///
    /// See [`DefinitionError`].
    pub fn new(
        descriptor_set: &[u8],
        services: &[String],
    ) -> Result<(Self, Vec<String>), DefinitionError> {
        let pool = DescriptorPool::decode(descriptor_set)
            .map_err(|error| DefinitionError::Set(format!("is no descriptor set: {error}")))?;
        let mut bindings = Vec::new();
        let mut skipped = Vec::new();
        for (position, name) in services.iter().enumerate() {
            let service = pool.get_service_by_name(name).ok_or_else(|| {
                let known: Vec<String> = pool
                    .services()
                    .map(|one| one.full_name().to_owned())
                    .collect();
                let reason = format!(
                    "`{name}` is not in the descriptor set, which has: {}",
                    known.join(", ")
                );
                DefinitionError::Service(position, reason)
            })?;
            let before = bindings.len();
            for rpc in service.methods() {
                let rules = rules_of(&pool, &rpc);
                if rpc.is_client_streaming() && !rules.is_empty() {
                    skipped.push(format!(
                        "`{}` takes a stream of messages, which JSON has no form for",
                        rpc.full_name()
                    ));
                    continue;
                }
                for rule in rules {
                    let binding = Binding::new(&rpc, &rule).map_err(|reason| {
                        DefinitionError::Service(
                            position,
                            format!("`{}`: {reason}", rpc.full_name()),
                        )
                    })?;
                    bindings.push(Arc::new(binding));
                }
            }
            if bindings.len() == before {
                let reason = format!(
                    "`{name}` has no method with a google.api.http annotation (was the set made with --include_imports?)"
                );
                return Err(DefinitionError::Service(position, reason));
            }
        }
        // The more of a path a template says itself, the sooner it is asked.
        bindings.sort_by_key(|binding| binding.template.rank());
        let bindings = by_method(bindings);
        Ok((Self { bindings, pool }, skipped))
    }

    /// The method that a request means. HEAD is GET whose reply has no body, unless the definition says
    /// otherwise.
    pub fn find(&self, method: &Method, path: &str, query: Option<&str>) -> Option<Call> {
        let parts: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
        let as_get = (*method == Method::HEAD).then_some(&Method::GET);
        let (binding, captures) = [method]
            .into_iter()
            .chain(as_get)
            .filter_map(|method| self.bindings.get(method))
            .flatten()
            .find_map(|binding| Some((binding, binding.template.captures(&parts)?)))?;
        Some(Call {
            binding: Arc::clone(binding),
            captures,
            query: query.map(str::to_owned),
            pool: self.pool.clone(),
        })
    }
}

impl fmt::Debug for Transcoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Transcoder").field(&self.bindings).finish()
    }
}

impl fmt::Debug for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Binding")
            .field("method", &self.method)
            .field("template", &self.template)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

// === impl Binding ===

impl Binding {
    fn new(rpc: &MethodDescriptor, rule: &DynamicMessage) -> Result<Self, String> {
        let (method, template) = pattern(rule).ok_or("the annotation has no pattern")?;
        let template = Template::parse(&template)?;
        for name in template.fields() {
            let field = message::field_at(&rpc.input(), name)
                .ok_or_else(|| format!("the request has no field `{name}`"))?;
            if field.is_list() || field.is_map() {
                return Err(format!(
                    "`{name}` is repeated, which no part of a path can be"
                ));
            }
        }
        let field = |message: MessageDescriptor, name: &str| {
            message
                .get_field_by_name(name)
                .ok_or_else(|| format!("`{}` has no field `{name}`", message.full_name()))
        };
        let body = match text(rule, "body").as_deref() {
            None => Body::None,
            Some("*") => Body::Whole,
            Some(name) => Body::Field(field(rpc.input(), name)?),
        };
        let response = text(rule, "response_body")
            .map(|name| field(rpc.output(), &name))
            .transpose()?;
        Ok(Self {
            method,
            template,
            body,
            response,
            path: format!("/{}/{}", rpc.parent_service().full_name(), rpc.name()),
            rpc: rpc.clone(),
        })
    }
}

fn by_method(bindings: Vec<Arc<Binding>>) -> HashMap<Method, Vec<Arc<Binding>>> {
    let mut by_method: HashMap<_, Vec<_>> = HashMap::new();
    for binding in bindings {
        let those = by_method.entry(binding.method.clone()).or_default();
        those.push(binding);
    }
    by_method
}

/// The annotations of a method, additional ones among them.
fn rules_of(pool: &DescriptorPool, rpc: &MethodDescriptor) -> Vec<DynamicMessage> {
    let Some(annotation) = pool.get_extension_by_name("google.api.http") else {
        return Vec::new();
    };
    let options = rpc.options();
    if !options.has_extension(&annotation) {
        return Vec::new();
    }
    let rule = options.get_extension(&annotation);
    let Some(rule) = rule.as_message() else {
        return Vec::new();
    };
    let more = rule.get_field_by_name("additional_bindings");
    let more = more.as_deref().and_then(Value::as_list).unwrap_or_default();
    let more = more.iter().filter_map(Value::as_message);
    std::iter::once(rule).chain(more).cloned().collect()
}

/// The method of HTTP and the template of an annotation.
fn pattern(rule: &DynamicMessage) -> Option<(Method, String)> {
    let usual = [
        ("get", Method::GET),
        ("put", Method::PUT),
        ("post", Method::POST),
        ("delete", Method::DELETE),
        ("patch", Method::PATCH),
    ];
    let usual = usual
        .into_iter()
        .find_map(|(name, method)| Some((method, text(rule, name)?)));
    usual.or_else(|| {
        let custom = rule.get_field_by_name("custom")?;
        let custom = custom.as_message()?;
        let method = Method::from_bytes(text(custom, "kind")?.as_bytes()).ok()?;
        Some((method, text(custom, "path")?))
    })
}

/// What a field of an annotation says, if it says anything.
fn text(rule: &DynamicMessage, field: &str) -> Option<String> {
    let value = rule.get_field_by_name(field)?;
    Some(value.as_str()?.to_owned()).filter(|text| !text.is_empty())
}
