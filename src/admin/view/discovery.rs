//! Where the endpoints of a backend come from, for the admin API.

use std::collections::HashMap;
use std::net::SocketAddr;

use serde::Serialize;

use crate::config;
use crate::control::Status;
use crate::control::endpoints::locators_of;
use crate::discovery::{DnsName, Origin, Resolution, locate};

use super::time;

/// A name that stands for endpoints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NameView {
    name: String,
    addresses: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    resolved_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    asked_at: Option<String>,
    /// Why it could not be resolved the last time; what was found before stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// A file of endpoints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EndpointsFileView {
    file: String,
    entries: usize,
    loaded_at: String,
    /// Why it could not be read again; what was read before stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// Where an endpoint comes from.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct OriginView {
    /// The key that led to it.
    from: &'static str,
    /// The name that led to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

/// What is known of the endpoints of one backend.
#[derive(Debug, Default)]
pub(super) struct Discovered {
    pub(super) origins: HashMap<SocketAddr, OriginView>,
    pub(super) names: Vec<NameView>,
    pub(super) file: Option<EndpointsFileView>,
}

// === impl Discovered ===

impl Discovered {
    /// What the status says of the backend of this name.
    pub(super) fn new(status: &Status, backend: &str) -> Self {
        let mut backends = status.loaded.config.backends.iter();
        let Some(backend) = backends.find(|one| *one.name == *backend) else {
            return Self::default();
        };
        let located = locate(locators_of(&status.loaded, backend), &status.names);
        let origin = |one: crate::discovery::Located| {
            let from = match one.origin {
                Origin::Config => "endpoints",
                Origin::File => "endpointsFile",
            };
            let name = one.name.map(|name| name.to_string());
            (one.address, OriginView { from, name })
        };
        let names = locators_of(&status.loaded, backend).filter_map(|(one, _)| one.name());
        let known = |name: &DnsName| {
            let known = status.names.get(name).cloned().unwrap_or_default();
            NameView::new(name, &known)
        };
        Self {
            origins: located.into_iter().map(origin).collect(),
            names: names.map(known).collect(),
            file: EndpointsFileView::new(status, backend),
        }
    }
}

impl NameView {
    fn new(name: &DnsName, known: &Resolution) -> Self {
        Self {
            name: name.to_string(),
            addresses: known.addresses().len(),
            resolved_at: known.resolved_at.map(time),
            asked_at: known.asked_at.map(time),
            problem: known.problem().map(ToString::to_string),
        }
    }
}

impl EndpointsFileView {
    fn new(status: &Status, backend: &config::Backend) -> Option<Self> {
        let path = backend.endpoints_file.as_ref()?;
        let file = status.loaded.endpoints_files.get(path)?;
        Some(Self {
            file: path.display().to_string(),
            entries: file.locators().len(),
            loaded_at: time(file.loaded_at),
            problem: status.stale_endpoints(path).map(str::to_owned),
        })
    }
}
