//! Checks where spans go, and which.
//!
//! What the file does not say is taken from the variables that OpenTelemetry has for it (its specification,
//! "Environment Variable Specification" and "OpenTelemetry Protocol Exporter"): whoever injects them into
//! all pods of a cluster need say nothing here but `tracing: {}`.

use std::collections::BTreeMap;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use percent_encoding::percent_decode_str;
use xxhash_rust::xxh3::Xxh3;

use crate::backend::UpstreamProtocol;
use crate::config::document::Path;
use crate::config::file::{self, Size, TraceCallers, TraceProtocol};
use crate::config::value;
use crate::discovery;
use crate::telemetry::share::Share;
use crate::telemetry::trace::{Callers, CollectorTls, Destination, Protocol, Sampling, Settings};
use crate::url::Url;

use super::Checker;

/// What every exporter reads, and what only one of spans does: the latter is heard first.
const EXPORTER: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"];

/// The URL that spans go to, and not one that a path is added to.
const WHOLE_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";

/// The part of all requests that is exported where nobody says anything.
const RATIO: f64 = 0.01;

/// The longest time that an export may take.
const LONGEST: Duration = Duration::from_secs(300);

impl Checker<'_> {
    pub(super) fn tracing(
        &mut self,
        tracing: Option<&file::Tracing>,
        dns: Option<&discovery::Settings>,
        at: &Path,
    ) -> Option<Option<Settings>> {
        let Some(tracing) = tracing else {
            return Some(None);
        };
        if self
            .variable("OTEL_SDK_DISABLED")
            .is_some_and(|it| it.eq_ignore_ascii_case("true"))
        {
            let message = "nothing is traced, since `OTEL_SDK_DISABLED` is `true` here";
            self.warn(at, message, None);
            return Some(None);
        }
        let sampling = self.trace_sampling(&tracing.sampling, &at.key("sampling"));
        let destination = self.destination(tracing, dns, at);
        Some(Some(Settings {
            sampling: sampling?,
            destination: destination?,
        }))
    }

    fn destination(
        &mut self,
        tracing: &file::Tracing,
        dns: Option<&discovery::Settings>,
        at: &Path,
    ) -> Option<Destination> {
        let protocol = self.trace_protocol(tracing.protocol, at);
        let endpoint = self.trace_endpoint(tracing, at);
        let headers = self.trace_headers(&tracing.headers, at);
        let timeout = self.trace_timeout(tracing.timeout.as_deref(), at);
        let queue = self.trace_queue(tracing.queue, at);
        let resource = self.resource(&tracing.resource, at);
        let mut url = endpoint?;
        let protocol = protocol?.unwrap_or(match url.port {
            4317 => Protocol::Grpc,
            _ => Protocol::Http,
        });
        let others = Settings::PORTS.into_iter().find(|(it, _)| *it != protocol);
        if let Some((other, port)) = others
            && url.port == port
        {
            let message =
                format!("{port} is usually the port for {other}, and this speaks {protocol}");
            self.warn(&at.key("protocol"), message, None);
        }
        if protocol == Protocol::Grpc && url.path != "/" {
            let message = "gRPC has paths of its own, so that of the URL means nothing";
            self.warn(&at.key("endpoint"), message, None);
        }
        let tls = self.collector_tls(tracing, url.is_encrypted, protocol, at);
        let is_whole = tracing.endpoint.is_none() && self.variable(WHOLE_ENDPOINT).is_some();
        if protocol == Protocol::Http && !is_whole {
            let path = format!("{}/v1/traces", url.path.path().trim_end_matches('/'));
            url.path = path.parse().unwrap_or(url.path);
        }
        Some(Destination {
            url,
            protocol,
            dns: dns?.clone(),
            headers: headers?,
            tls: tls?,
            timeout: timeout?,
            queue: queue?,
            resource: resource?,
        })
    }

    fn trace_protocol(
        &mut self,
        protocol: Option<TraceProtocol>,
        at: &Path,
    ) -> Option<Option<Protocol>> {
        if let Some(protocol) = protocol {
            return Some(Some(match protocol {
                TraceProtocol::Grpc => Protocol::Grpc,
                TraceProtocol::Http => Protocol::Http,
            }));
        }
        self.exporter_variable("PROTOCOL", at, |text| match text {
            "grpc" => Ok(Protocol::Grpc),
            "http/protobuf" => Ok(Protocol::Http),
            _ => Err("is neither `grpc` nor `http/protobuf`".to_owned()),
        })
    }

    fn trace_endpoint(&mut self, tracing: &file::Tracing, at: &Path) -> Option<Url> {
        if let Some(text) = &tracing.endpoint {
            return self.parse(text, &at.key("endpoint"), endpoint);
        }
        let given = self.exporter_variable("ENDPOINT", at, endpoint)?;
        let local = match tracing.protocol {
            Some(TraceProtocol::Http) => "http://localhost:4318",
            Some(TraceProtocol::Grpc) | None => "http://localhost:4317",
        };
        given.or_else(|| endpoint(local).ok())
    }

    fn collector_tls(
        &mut self,
        tracing: &file::Tracing,
        is_encrypted: bool,
        protocol: Protocol,
        at: &Path,
    ) -> Option<Option<CollectorTls>> {
        let tls_at = at.key("tls");
        if !is_encrypted {
            if tracing.tls.is_some() {
                let message = "`endpoint` is no `https` URL, so there is no TLS";
                self.error(&tls_at, message, None);
            }
            return Some(None);
        }
        let given = || {
            let file = |name| self.variable(&self.exporter_name(name)?);
            file::BackendTls {
                ca_file: file("CERTIFICATE"),
                certificate_file: file("CLIENT_CERTIFICATE"),
                key_file: file("CLIENT_KEY"),
                ..file::BackendTls::default()
            }
        };
        let tls = tracing.tls.clone().unwrap_or_else(given);
        let protocol = match protocol {
            Protocol::Grpc => UpstreamProtocol::Http2,
            Protocol::Http => UpstreamProtocol::Http1,
        };
        let mut print = Xxh3::new();
        print.update(format!("{tls:?}").as_bytes());
        let (client, _) = self.backend_tls(&tls, protocol, &tls_at, &mut print)?;
        Some(Some(CollectorTls {
            client,
            fingerprint: print.digest(),
        }))
    }

    fn trace_headers(
        &mut self,
        headers: &BTreeMap<String, String>,
        at: &Path,
    ) -> Option<Vec<(HeaderName, HeaderValue)>> {
        let given = self.exporter_variable("HEADERS", at, pairs)?;
        let own_at = at.key("headers");
        let own = headers.iter();
        let own = own.map(|(name, value)| (name.clone(), value.clone(), own_at.key(name)));
        let given = given.filter(|_| headers.is_empty()).unwrap_or_default();
        let given = given.into_iter();
        let given = given.map(|(name, value)| (name, value, at.clone()));
        let parsed: Vec<_> = own
            .chain(given)
            .map(|(name, value, at)| self.trace_header(&name, &value, &at))
            .collect();
        parsed.into_iter().collect()
    }

    /// The value may be a secret, so it is in no message.
    fn trace_header(
        &mut self,
        name: &str,
        value: &str,
        at: &Path,
    ) -> Option<(HeaderName, HeaderValue)> {
        let value =
            value::header_value(value).map_err(|_| "has a value that no header has".to_owned());
        let pair = value::editable_header(name).and_then(|name| Ok((name, value?)));
        pair.map_err(|reason| self.error(at, format!("the header `{name}` {reason}"), None))
            .ok()
    }

    fn trace_timeout(&mut self, timeout: Option<&str>, at: &Path) -> Option<Duration> {
        let given = match timeout {
            Some(text) => self
                .parse(text, &at.key("timeout"), value::duration)
                .map(Some),
            None => self.exporter_variable("TIMEOUT", at, |text| {
                let milliseconds = text.parse().map(Duration::from_millis);
                milliseconds.map_err(|_| "is no number of milliseconds".to_owned())
            }),
        };
        let timeout = given?.unwrap_or(Settings::TIMEOUT);
        if timeout.is_zero() || timeout > LONGEST {
            let message = format!("an export takes more than 0s and at most {LONGEST:?}");
            self.error(&at.key("timeout"), message, None);
            return None;
        }
        Some(timeout)
    }

    fn trace_queue(&mut self, queue: Option<u32>, at: &Path) -> Option<usize> {
        let queue = queue.map(|queue| Size(queue.into()));
        let queue = match queue {
            Some(_) => queue,
            None => self.parsed_variable("OTEL_BSP_MAX_QUEUE_SIZE", at, |text| {
                text.parse()
                    .map(Size)
                    .map_err(|_| "is no number".to_owned())
            })?,
        };
        let queue = self.size(queue, 1..=1_000_000, &at.key("queue"))?;
        Some(queue.map_or(Settings::QUEUE, |queue| queue as usize))
    }

    /// The attributes of the resource: those of the file come before those of the environment.
    fn resource(
        &mut self,
        own: &BTreeMap<String, String>,
        at: &Path,
    ) -> Option<Vec<(String, String)>> {
        let mut all = BTreeMap::from([("service.name".to_owned(), "serin".to_owned())]);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        all.insert("service.version".to_owned(), version);
        all.extend(
            self.parsed_variable("OTEL_RESOURCE_ATTRIBUTES", at, pairs)?
                .unwrap_or_default(),
        );
        let name = self.variable("OTEL_SERVICE_NAME");
        all.extend(name.map(|name| ("service.name".to_owned(), name)));
        all.extend(own.iter().map(|(key, value)| (key.clone(), value.clone())));
        Some(all.into_iter().collect())
    }

    fn trace_sampling(&mut self, sampling: &file::TraceSampling, at: &Path) -> Option<Sampling> {
        let share = match sampling.ratio {
            Some(ratio) => self.share(ratio, &at.key("ratio"))?,
            None => self.sampler(at)?.or(Share::new(RATIO))?,
        };
        Some(Sampling {
            share,
            errors: sampling.errors.unwrap_or(true),
            callers: match sampling.callers {
                Some(TraceCallers::All) => Callers::All,
                Some(TraceCallers::Trusted) | None => Callers::Trusted,
                Some(TraceCallers::None) => Callers::None,
            },
        })
    }

    /// What the environment says of how many requests are sampled. Those that begin with `parentbased_`
    /// differ from the others in what `callers` says here.
    fn sampler(&mut self, at: &Path) -> Option<Option<Share>> {
        let share = self.parsed_variable("OTEL_TRACES_SAMPLER_ARG", at, |text| {
            let share = text.parse().ok().and_then(Share::new);
            share.ok_or_else(|| "is not between 0 and 1".to_owned())
        })?;
        self.parsed_variable("OTEL_TRACES_SAMPLER", at, |text| {
            match text.strip_prefix("parentbased_").unwrap_or(text) {
                "always_on" => Ok(Share::ALL),
                "always_off" => Ok(Share::NONE),
                "traceidratio" => Ok(share.unwrap_or(Share::ALL)),
                _ => Err("is no sampler that Serin knows".to_owned()),
            }
        })
    }

    /// What the environment says to exporters; `None` for something that cannot be used.
    fn exporter_variable<T>(
        &mut self,
        name: &str,
        at: &Path,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Option<T>> {
        let given = self.exporter_name(name);
        given.map_or(Some(None), |name| self.parsed_variable(&name, at, parse))
    }

    /// The variable that says so to exporters, if one does.
    fn exporter_name(&self, name: &str) -> Option<String> {
        let mut names = EXPORTER.iter().map(|prefix| format!("{prefix}{name}"));
        names.find(|name| self.variable(name).is_some())
    }

    fn parsed_variable<T>(
        &mut self,
        name: &str,
        at: &Path,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Option<T>> {
        let Some(value) = self.variable(name) else {
            return Some(None);
        };
        let parsed = parse(value.trim());
        // Without the value, which may be a secret.
        let parsed = parsed
            .map_err(|reason| self.error(at, format!("the variable `{name}` {reason}"), None));
        parsed.ok().map(Some)
    }

    fn variable(&self, name: &str) -> Option<String> {
        (self.around.variable)(name)
    }
}

fn endpoint(text: &str) -> Result<Url, String> {
    let url: Url = text.parse()?;
    if url.authority.contains('@') || url.path.query().is_some() {
        return Err("has a password or a query; `headers` are the place for secrets".to_owned());
    }
    Ok(url)
}

/// Pairs as in W3C Baggage, which OpenTelemetry writes them as: `a=b,c=d%20e`.
fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    let pairs = text.split(',').filter(|pair| !pair.trim().is_empty());
    let pairs = pairs.map(|pair| {
        let (key, value) = pair.split_once('=')?;
        let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
        Some((key.trim().to_owned(), value.into_owned()))
    });
    let pairs: Option<Vec<_>> = pairs.collect();
    pairs.ok_or_else(|| "is no list such as `key=value,other=value`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_written_as_baggage_is() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let expected = vec![pair("a", "b"), pair("c", "d e=f")];
        assert_eq!(pairs("a=b, c=d%20e=f,").unwrap(), expected);
        assert!(pairs("a").is_err());
    }
}
