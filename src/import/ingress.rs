//! Manifests of Kubernetes, as far as an Ingress needs them.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Manifests {
    pub(super) ingresses: Vec<Ingress>,
    pub(super) services: Vec<Service>,
    /// What was found beside, in the order of the file: `kind` and name.
    pub(super) others: Vec<String>,
}

/// An Ingress (`networking.k8s.io/v1`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Ingress {
    pub(super) metadata: Metadata,
    #[serde(default)]
    pub(super) spec: IngressSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    pub(super) name: String,
    #[serde(default = "default_namespace")]
    pub(super) namespace: String,
    #[serde(default, deserialize_with = "or_nothing")]
    annotations: BTreeMap<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct IngressSpec {
    pub(super) ingress_class_name: Option<String>,
    pub(super) default_backend: Option<Backend>,
    #[serde(default, deserialize_with = "or_nothing")]
    pub(super) rules: Vec<Rule>,
    #[serde(default, deserialize_with = "or_nothing")]
    pub(super) tls: Vec<Tls>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Rule {
    pub(super) host: Option<String>,
    pub(super) http: Option<Http>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Http {
    #[serde(default, deserialize_with = "or_nothing")]
    pub(super) paths: Vec<Path>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Path {
    pub(super) path: Option<String>,
    #[serde(default)]
    pub(super) path_type: PathType,
    pub(super) backend: Backend,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) enum PathType {
    Exact,
    Prefix,
    #[default]
    ImplementationSpecific,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Backend {
    /// `None` for a resource that is no Service.
    pub(super) service: Option<ServiceRef>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct ServiceRef {
    pub(super) name: String,
    #[serde(default)]
    pub(super) port: ServicePort,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct ServicePort {
    pub(super) name: Option<String>,
    pub(super) number: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Tls {
    #[serde(default, deserialize_with = "or_nothing")]
    pub(super) hosts: Vec<String>,
    pub(super) secret_name: Option<String>,
}

/// A Service.
#[derive(Debug, Deserialize)]
pub(super) struct Service {
    pub(super) metadata: Metadata,
    #[serde(default)]
    pub(super) spec: ServiceSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceSpec {
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(default)]
    ports: Vec<Port>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Port {
    name: Option<String>,
    port: u16,
    target_port: Option<Value>,
}

/// What stands there without a value, as templates write it that had nothing to write.
fn or_nothing<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

fn default_namespace() -> String {
    "default".to_owned()
}

/// Reads all documents of a file, and the items of lists, as `kubectl get -o yaml` or `-o json` writes them.
///
/// # Errors
///
/// What is no YAML, or no manifest.
pub(super) fn read(text: &str) -> Result<Manifests, String> {
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| format!("is no YAML: {error}"))?;
    let mut manifests = Manifests::default();
    for document in documents {
        manifests.add(document)?;
    }
    Ok(manifests)
}

// === impl Manifests ===

impl Manifests {
    fn add(&mut self, document: Value) -> Result<(), String> {
        if document.is_null() {
            return Ok(());
        }
        let text = |key: &str| document.get(key).and_then(Value::as_str).map(str::to_owned);
        let Some(kind) = text("kind") else {
            self.others.push("something without a `kind`".to_owned());
            return Ok(());
        };
        let version = text("apiVersion").unwrap_or_default();
        match (&*kind, &*version) {
            _ if kind.ends_with("List") => {
                let items = document.get("items").and_then(Value::as_array);
                for item in items.into_iter().flatten() {
                    let mut item = item.clone();
                    // Those of a list of one kind need not repeat it.
                    if let Value::Object(item) = &mut item {
                        let of_list = kind.trim_end_matches("List");
                        item.entry("kind").or_insert_with(|| of_list.into());
                        item.entry("apiVersion")
                            .or_insert_with(|| version.as_str().into());
                    }
                    self.add(item)?;
                }
            }
            ("Ingress", "networking.k8s.io/v1") => self.ingresses.push(typed(document, &kind)?),
            ("Service", "v1") => self.services.push(typed(document, &kind)?),
            _ => {
                let name = document.pointer("/metadata/name").and_then(Value::as_str);
                let name = name.unwrap_or("without a name");
                self.others.push(format!("{kind} {name} ({version})"));
            }
        }
        Ok(())
    }

    pub(super) fn service(&self, namespace: &str, name: &str) -> Option<&Service> {
        let mut services = self.services.iter();
        services.find(|one| one.metadata.namespace == namespace && one.metadata.name == name)
    }
}

fn typed<T: DeserializeOwned>(document: Value, kind: &str) -> Result<T, String> {
    let name = document.pointer("/metadata/name").and_then(Value::as_str);
    let name = name.unwrap_or("without a name").to_owned();
    serde_json::from_value(document).map_err(|error| format!("holds the {kind} {name}: {error}"))
}

// === impl Metadata ===

impl Metadata {
    pub(super) fn annotations(&self) -> impl Iterator<Item = (&str, String)> {
        self.annotations.iter().map(|(name, value)| {
            let value = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            (name.as_str(), value)
        })
    }

    /// As messages name it.
    pub(super) fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

// === impl Ingress ===

impl Ingress {
    /// Whose it is.
    pub(super) fn class(&self) -> Option<String> {
        let of_old = || {
            let mut annotations = self.metadata.annotations();
            let class = annotations.find(|(name, _)| *name == "kubernetes.io/ingress.class");
            class.map(|(_, class)| class)
        };
        self.spec.ingress_class_name.clone().or_else(of_old)
    }
}

// === impl Service ===

impl Service {
    /// True for one whose name leads to its pods, and not to an address of its own.
    pub(super) fn is_headless(&self) -> bool {
        self.spec.cluster_ip.as_deref() == Some("None")
    }

    /// The port that has to be connected to: of a headless one that of its pods.
    pub(super) fn port(&self, wanted: &ServicePort) -> Option<u16> {
        let is_wanted = |port: &&Port| match (&wanted.name, wanted.number) {
            (Some(name), _) => port.name.as_ref() == Some(name),
            (None, Some(number)) => port.port == number,
            (None, None) => false,
        };
        let port = self.spec.ports.iter().find(is_wanted)?;
        let of_pods = port.target_port.as_ref();
        match of_pods.filter(|_| self.is_headless()) {
            Some(target) => target.as_u64().and_then(|port| u16::try_from(port).ok()),
            None => Some(port.port),
        }
    }
}
