//! A backend is one version of a service: its pool of endpoints, and what is known of them.
//!
//! An [`Endpoint`] is living state: it outlives snapshots, so that a reload which does not touch it
//! keeps its count of requests in flight and its warm connections. A [`Backend`] is what one
//! snapshot says about them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use rustls::pki_types::ServerName;

use crate::proxy_protocol::Version;
use crate::tls::client::ClientTls;

/// One version of a service.
#[derive(Debug)]
pub struct Backend {
    /// Its name in the configuration, in logs and in metrics.
    pub name: Arc<str>,
    /// The version it runs.
    pub version: Arc<str>,
    /// The kill switch.
    pub disabled: bool,
    /// Its servers.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Changes to requests on their way there.
    pub request_headers: HeaderEdits,
    /// Changes to responses on their way back.
    pub response_headers: HeaderEdits,
    /// How its endpoints are connected to.
    pub connections: ConnectionPolicy,
    /// What is spoken with them, and over what.
    pub transport: Arc<Transport>,
}

/// What is spoken with the endpoints of a backend, and over what.
#[derive(Debug)]
pub struct Transport {
    /// Which version of HTTP.
    pub protocol: UpstreamProtocol,
    /// What TLS connections are made with; `None` without TLS.
    pub tls: Option<ClientTls>,
    /// How HTTP/2 is spoken.
    pub http2: Http2Policy,
    /// In which version of the PROXY protocol they are told who the client is; connections then are
    /// for one request.
    pub proxy_protocol: Option<Version>,
    /// Tells these settings from others: connections that were made with those are used no more.
    pub fingerprint: u64,
}

/// Which version of HTTP is spoken with the endpoints of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2: without TLS by prior knowledge.
    Http2,
    /// What the endpoint agrees on by ALPN, HTTP/2 rather than HTTP/1.1.
    Negotiated,
}

/// How HTTP/2 is spoken with endpoints; windows, buffers and lists in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Http2Policy {
    /// The most requests that one connection has at a time, whatever the endpoint allows.
    pub max_requests: usize,
    /// What may be on its way of one response.
    pub stream_window: u32,
    /// What may be on its way of all responses of a connection. By the window of a response, it is
    /// the number of slow clients that hold up all others (h2#573).
    pub connection_window: u32,
    /// What may wait of one request.
    pub send_buffer: usize,
    /// The head of a response.
    pub header_list: u32,
}

/// How the endpoints of a backend are connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionPolicy {
    /// How long a connection may take to stand.
    pub connect_timeout: Duration,
    /// How long an unused connection is kept.
    pub idle_timeout: Duration,
    /// How many unused connections each worker keeps to each endpoint.
    pub max_idle: usize,
}

/// Changes to a header section.
#[derive(Clone, Debug, Default)]
pub struct HeaderEdits {
    /// Taken away, first.
    pub remove: Vec<HeaderName>,
    /// Given exactly this value.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Added to what is there, last.
    pub add: Vec<(HeaderName, HeaderValue)>,
}

/// Names an endpoint for as long as the process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndpointId(u64);

/// One server of a backend.
#[derive(Debug)]
pub struct Endpoint {
    /// Its name within the process.
    pub id: EndpointId,
    /// Where it listens.
    pub address: SocketAddr,
    /// The same as text.
    pub authority: Box<str>,
    /// The name that its certificate must be for, where it follows from what it is named by.
    pub certified: Option<ServerName<'static>>,
    in_flight: AtomicUsize,
}

/// The right to send one request to an endpoint; counts as in flight until it is dropped.
#[derive(Debug)]
pub struct Lease {
    endpoint: Arc<Endpoint>,
}

/// All endpoints of the process by backend and address: what carries them from one snapshot to the
/// next.
#[derive(Debug, Default)]
pub struct Endpoints {
    known: HashMap<EndpointKey, Arc<Endpoint>>,
    created: u64,
}

/// Backend, address, and the name on the certificate: with another name, connections that stand say
/// nothing.
type EndpointKey = (Arc<str>, SocketAddr, Option<ServerName<'static>>);

// === impl Backend ===

impl Backend {
    /// True when it can take requests at all.
    pub fn is_available(&self) -> bool {
        !self.disabled && !self.endpoints.is_empty()
    }

    /// Chooses an endpoint for one request: of two drawn by lot the one with fewer requests in
    /// flight (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001). `None`
    /// when it takes no requests.
    pub fn choose(&self, die: u64) -> Option<&Arc<Endpoint>> {
        if self.disabled {
            return None;
        }
        match self.endpoints.as_slice() {
            [] => None,
            [only] => Some(only),
            many => {
                let (one, other) = two_of(many.len(), die);
                let less = |endpoint: &&Arc<Endpoint>| endpoint.in_flight();
                Some(std::cmp::min_by_key(&many[one], &many[other], less))
            }
        }
    }
}

// === impl Transport ===

impl Default for Transport {
    /// HTTP/1.1 without TLS.
    fn default() -> Self {
        Self {
            protocol: UpstreamProtocol::Http1,
            tls: None,
            http2: Http2Policy::default(),
            proxy_protocol: None,
            fingerprint: 0,
        }
    }
}

impl Default for Http2Policy {
    fn default() -> Self {
        Self {
            max_requests: 100,
            stream_window: 256 << 10,
            connection_window: 16 << 20,
            send_buffer: 64 << 10,
            header_list: 32 << 10,
        }
    }
}

// === impl HeaderEdits ===

impl HeaderEdits {
    /// What it decides about.
    pub fn names(&self) -> impl Iterator<Item = &HeaderName> {
        let written = self.set.iter().chain(&self.add).map(|(name, _)| name);
        self.remove.iter().chain(written)
    }

    /// Applies the changes.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name.clone(), value.clone());
        }
    }
}

// === impl Endpoint ===

impl Endpoint {
    /// The right to send it one request.
    pub fn lease(self: &Arc<Self>) -> Lease {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Lease {
            endpoint: Arc::clone(self),
        }
    }

    /// Requests sent to it whose response has not ended.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }
}

// === impl Lease ===

impl Drop for Lease {
    fn drop(&mut self) {
        self.endpoint.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Endpoints ===

impl Endpoints {
    /// The endpoint of `backend` at `address`, the living one where there is one.
    pub fn get_or_create(&mut self, backend: &Arc<str>, address: SocketAddr) -> Arc<Endpoint> {
        self.get_or_create_certified(backend, address, None)
    }

    /// As `get_or_create`, with the name that its certificate must be for.
    pub fn get_or_create_certified(
        &mut self,
        backend: &Arc<str>,
        address: SocketAddr,
        certified: Option<ServerName<'static>>,
    ) -> Arc<Endpoint> {
        let created = &mut self.created;
        let endpoint = self
            .known
            .entry((Arc::clone(backend), address, certified.clone()))
            .or_insert_with(|| {
                *created += 1;
                Arc::new(Endpoint {
                    id: EndpointId(*created),
                    address,
                    authority: address.to_string().into(),
                    certified,
                    in_flight: AtomicUsize::new(0),
                })
            });
        Arc::clone(endpoint)
    }

    /// Forgets what only this map still knows.
    pub fn prune(&mut self) {
        self.known
            .retain(|_, endpoint| Arc::strong_count(endpoint) > 1);
    }
}

/// Two different positions below `count`, which is at least 2, both drawn from one die.
fn two_of(count: usize, die: u64) -> (usize, usize) {
    let scale = |half: u64, below: usize| ((half * below as u64) >> 32) as usize;
    let one = scale(die >> 32, count);
    let other = scale(die & 0xffff_ffff, count - 1);
    (one, if other >= one { other + 1 } else { other })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn backend(endpoints: u16) -> (Backend, Endpoints) {
        let mut known = Endpoints::default();
        let name: Arc<str> = "shop".into();
        let endpoints = (1..=endpoints)
            .map(|port| known.get_or_create(&name, ([127, 0, 0, 1], port).into()))
            .collect();
        let connections = ConnectionPolicy {
            connect_timeout: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(1),
            max_idle: 1,
        };
        let backend = Backend {
            name,
            version: "1".into(),
            disabled: false,
            endpoints,
            request_headers: HeaderEdits::default(),
            response_headers: HeaderEdits::default(),
            connections,
            transport: Arc::default(),
        };
        (backend, known)
    }

    proptest! {
        #[test]
        fn two_choices_are_two_different_endpoints(count in 2_usize..1000, die in any::<u64>()) {
            let (one, other) = two_of(count, die);
            prop_assert!(one != other && one < count && other < count);
        }
    }

    #[test]
    fn every_pair_of_endpoints_is_drawn() {
        let mut dice = fastrand::Rng::with_seed(1);
        let pairs: std::collections::HashSet<_> =
            (0..1000).map(|_| two_of(4, dice.u64(..))).collect();
        assert_eq!(pairs.len(), 12);
    }

    #[test]
    fn the_less_loaded_of_two_is_chosen_and_a_lease_ends_with_its_owner() {
        let (backend, _) = backend(2);
        let first = backend.choose(0).unwrap().lease();
        let busy = first.endpoint.id;
        let second = backend.choose(0).unwrap().lease();
        assert_ne!(busy, second.endpoint.id);
        drop((first, second));
        assert_eq!(
            backend
                .endpoints
                .iter()
                .map(|endpoint| endpoint.in_flight())
                .sum::<usize>(),
            0
        );
    }

    #[test]
    fn load_spreads_evenly_over_many_endpoints() {
        let (backend, _) = backend(10);
        let mut dice = fastrand::Rng::with_seed(1);
        let _leases: Vec<_> = (0..1000)
            .map(|_| backend.choose(dice.u64(..)).unwrap().lease())
            .collect();
        for endpoint in &backend.endpoints {
            assert!(
                endpoint.in_flight().abs_diff(100) <= 3,
                "{}",
                endpoint.in_flight()
            );
        }
    }

    #[test]
    fn disabled_and_empty_backends_give_no_lease() {
        let (mut backend, _) = backend(1);
        assert!(backend.is_available());
        backend.disabled = true;
        assert!(backend.choose(0).is_none() && !backend.is_available());
        backend.disabled = false;
        backend.endpoints.clear();
        assert!(backend.choose(0).is_none() && !backend.is_available());
    }

    #[test]
    fn endpoints_live_on_as_long_as_a_snapshot_names_them() {
        let (mut backend, mut known) = backend(2);
        let kept = backend.endpoints[0].id;
        backend.endpoints.remove(1);
        known.prune();
        let name: Arc<str> = "shop".into();
        assert_eq!(
            known.get_or_create(&name, ([127, 0, 0, 1], 1).into()).id,
            kept
        );
        assert_eq!(known.known.len(), 1);
    }
}
