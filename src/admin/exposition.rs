//! The metrics of what lives in a snapshot: read when somebody asks, so that what is gone leaves no
//! series behind, and requests count nothing for it.

use std::fmt::Write;

use metrics_exporter_prometheus::formatting::{write_help_line, write_type_line};

use crate::snapshot::Snapshot;
use crate::telemetry::metrics::{ENDPOINT_HEALTHY, REQUESTS_QUEUED, help};

/// The endpoints and the queues of a snapshot, in the text format of Prometheus. Labels are names
/// from the configuration and addresses, which need no escapes.
pub(super) fn render(snapshot: &Snapshot) -> String {
    let mut text = String::new();
    head(&mut text, ENDPOINT_HEALTHY);
    for backend in &snapshot.backends {
        for endpoint in &backend.endpoints {
            let (name, address) = (&backend.name, &endpoint.authority);
            let labels = format!("backend=\"{name}\",endpoint=\"{address}\"");
            let healthy = u8::from(endpoint.is_usable());
            line(&mut text, ENDPOINT_HEALTHY, &labels, healthy.into());
        }
    }
    head(&mut text, REQUESTS_QUEUED);
    for backend in &snapshot.backends {
        let labels = format!("backend=\"{}\"", backend.name);
        line(&mut text, REQUESTS_QUEUED, &labels, backend.gate.waiting());
    }
    text
}

fn head(text: &mut String, name: &str) {
    write_help_line(text, name, None, None, help(name));
    write_type_line(text, name, None, None, "gauge");
}

fn line(text: &mut String, name: &str, labels: &str, value: usize) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{name}{{{labels}}} {value}");
}
