//! Asks: the hosts file first, and then DNS servers.
//!
//! hickory-resolver speaks DNS, and what is to be asked is decided here. Its own search through the
//! domains of `resolv.conf` goes on to the next domain when a server fails, and then another
//! service may be found under the name of this one; and it takes one family of addresses for all
//! when the other fails. It caches nothing, since names are asked for when they have expired.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{Hosts, TokioResolver, system_conf};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::resolution::{Answer, Failure, Family, Part, Resolution};
use super::{DnsName, Names, Settings};

/// Names that are asked for at the same time. Each takes some sockets.
pub(super) const AT_ONCE: usize = 64;

/// Hosts of one service that are asked for at the same time.
const SERVERS_AT_ONCE: usize = 16;

/// Tries within the time for an answer. A server that was not heard of comes last in the next.
const TRIES: u32 = 3;

const SYSTEM: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";

/// Asks for names.
pub struct Resolver {
    settings: Settings,
    /// Who is asked; or why nobody can be.
    servers: Result<TokioResolver, String>,
    search: Search,
    hosts: Hosts,
    /// The files of the system as they were read.
    read: [Option<SystemTime>; 2],
}

/// How a name that does not end with a dot is completed (resolv.conf(5)).
#[derive(Debug, Default)]
struct Search {
    domains: Vec<Name>,
    ndots: usize,
}

/// What one query brought: records, and how long they are valid.
type Found = Result<(Vec<RData>, Duration), Failure>;

/// Asks for all of these names at once. Together they take no longer than one answer may.
pub async fn resolve_all(settings: &Settings, names: impl IntoIterator<Item = DnsName>) -> Names {
    let mut names = names.into_iter().peekable();
    if names.peek().is_none() {
        return Names::new();
    }
    let deadline = Instant::now() + settings.timeout;
    let resolver = Arc::new(Resolver::new(settings.clone()));
    let slots = Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    let mut asking = JoinSet::new();
    for name in names {
        let (resolver, slots) = (Arc::clone(&resolver), Arc::clone(&slots));
        asking.spawn(async move {
            let asked = match timeout_at(deadline, slots.acquire_owned()).await {
                Ok(_slot) => resolver.ask(&name, deadline).await,
                Err(_) => Err(Failure::Timeout),
            };
            (name, asked)
        });
    }
    let mut known = Names::new();
    while let Some(asked) = asking.join_next().await {
        // One that died is asked for again by the job, as it is unknown.
        if let Ok((name, asked)) = asked {
            let resolution = Resolution::default().after(asked, SystemTime::now());
            known.insert(name, Arc::new(resolution));
        }
    }
    known
}

// === impl Resolver ===

impl Resolver {
    /// Reads the system's files, where they say whom to ask.
    pub fn new(settings: Settings) -> Self {
        let read = read_times();
        let configured = if settings.resolvers.is_empty() {
            system_conf::read_system_conf().map_err(|error| format!("{SYSTEM}: {error}"))
        } else {
            Ok(asking(&settings.resolvers))
        };
        let (servers, search) = match configured {
            Ok((config, options)) => {
                let search = Search::new(&config, &options);
                let servers = build(config, options, settings.timeout);
                (servers.map_err(|error| error.to_string()), search)
            }
            Err(reason) => (Err(reason), Search::default()),
        };
        Self {
            settings,
            servers,
            search,
            hosts: Hosts::from_system().unwrap_or_default(),
            read,
        }
    }

    /// How it asks.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// False when the system's files have changed since they were read.
    pub fn is_current(&self) -> bool {
        self.read == read_times()
    }

    /// Asks for a name until `deadline`.
    ///
    /// # Errors
    ///
    /// When nothing can be said of any part of it.
    pub async fn ask(&self, name: &DnsName, deadline: Instant) -> Result<Answer, Failure> {
        let mut answer = match name {
            DnsName::Host { host, port } => self.ask_host(host, *port, deadline).await?,
            DnsName::Service(service) => self.ask_service(service, deadline).await?,
        };
        let mut one = Some(&mut answer);
        while let Some(answer) = one {
            drop_unreachable(answer, has_route);
            one = answer.next.as_deref_mut();
        }
        Ok(answer)
    }

    /// The first of the names that this one may be short for that anybody knows; as it is written, if
    /// this machine itself knows it (nsswitch.conf(5), "hosts: files dns").
    async fn ask_host(&self, host: &str, port: u16, deadline: Instant) -> Result<Answer, Failure> {
        if let Some(local) = self.known_here(&parse(host)?) {
            return Ok(self.local_answer(host, port, local));
        }
        let mut answer = Err(Failure::NotFound);
        for name in self.search.candidates(host)? {
            let asked = self.ask_addresses(&name, host, port, deadline).await;
            let is_over = asked.parts.iter().any(|(_, found)| is_settled(found));
            answer = Ok(asked);
            if is_over {
                break;
            }
        }
        answer
    }

    /// The addresses of exactly this host, of both families.
    async fn ask_addresses(&self, name: &Name, host: &str, port: u16, deadline: Instant) -> Answer {
        if let Some(local) = self.known_here(name) {
            return self.local_answer(host, port, local);
        }
        let (v4, v6) = tokio::join!(
            self.query(name, RecordType::A, deadline),
            self.query(name, RecordType::AAAA, deadline),
        );
        let ttls = [&v4, &v6].into_iter().flatten().map(|(_, ttl)| *ttl);
        let ttl = ttls.min().unwrap_or_default();
        let addresses = |found: Found| {
            let (records, _) = found?;
            Ok(records.iter().filter_map(RData::ip_addr).collect())
        };
        Answer {
            parts: parts(host, port, [addresses(v4), addresses(v6)]),
            ttl,
            next: None,
        }
    }

    /// It is valid until the hosts file changes, which is looked at as often as that.
    fn local_answer(&self, host: &str, port: u16, addresses: [Vec<IpAddr>; 2]) -> Answer {
        Answer {
            parts: parts(host, port, addresses.map(Ok)),
            ttl: self.settings.max_ttl,
            next: None,
        }
    }

    async fn ask_service(&self, service: &str, deadline: Instant) -> Result<Answer, Failure> {
        let (records, ttl) = self.ask_srv(service, deadline).await?;
        // All at once: the first may take all the time that there is.
        let asking = by_priority(records).map(|servers| self.ask_servers(servers, ttl, deadline));
        let mut asked = join_all(asking).await;
        let is_enough =
            |answer: &Answer| answer.parts.iter().any(|(_, found)| leads_somewhere(found));
        let enough = asked.iter().position(is_enough);
        asked.truncate(enough.map_or(asked.len(), |last| last + 1));
        let last_first = asked.into_iter().rev();
        let answer = last_first.reduce(|next, first| Answer {
            next: Some(Box::new(next)),
            ..first
        });
        answer.ok_or(Failure::Empty)
    }

    /// The addresses of these servers, whose records are valid for `ttl`.
    async fn ask_servers(&self, servers: Vec<SRV>, ttl: Duration, deadline: Instant) -> Answer {
        let mut answer = Answer {
            ttl,
            ..Answer::default()
        };
        let asking = servers.into_iter().map(|server| async move {
            let host = server.target.to_ascii().to_ascii_lowercase();
            self.ask_addresses(&server.target, &host, server.port, deadline)
                .await
        });
        let mut asking = stream::iter(asking).buffer_unordered(SERVERS_AT_ONCE);
        while let Some(asked) = asking.next().await {
            // A host that nobody knows says nothing of how long the others are valid.
            if asked.parts.iter().any(|(_, found)| found.is_ok()) {
                answer.ttl = answer.ttl.min(asked.ttl);
            }
            answer.parts.extend(asked.parts);
        }
        answer
    }

    async fn ask_srv(&self, service: &str, deadline: Instant) -> Found {
        let mut found = Err(Failure::NotFound);
        for name in self.search.candidates(service)? {
            found = self.query(&name, RecordType::SRV, deadline).await;
            if !matches!(found, Err(Failure::Empty | Failure::NotFound)) {
                break;
            }
        }
        found
    }

    /// The addresses of a name for which nobody else is asked: the hosts file has it, or it is this
    /// machine (RFC 6761 section 6.3).
    fn known_here(&self, name: &Name) -> Option<[Vec<IpAddr>; 2]> {
        let this_machine = || {
            let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
            name.is_localhost().then(|| loopback.map(|ip| vec![ip]))
        };
        self.in_hosts_file(name).or_else(this_machine)
    }

    /// What the hosts file says of a name.
    fn in_hosts_file(&self, name: &Name) -> Option<[Vec<IpAddr>; 2]> {
        let of = |kind| {
            let query = Query::query(name.clone(), kind);
            self.hosts.lookup_static_host(&query)
        };
        let found = [of(RecordType::A), of(RecordType::AAAA)];
        let addresses = |lookup: Option<Lookup>| {
            let records = lookup.iter().flat_map(Lookup::answers);
            records.filter_map(|record| record.data.ip_addr()).collect()
        };
        let is_known = found.iter().any(Option::is_some);
        is_known.then(|| found.map(addresses))
    }

    async fn query(&self, name: &Name, kind: RecordType, deadline: Instant) -> Found {
        let servers = self.servers.as_ref();
        let servers = servers.map_err(|reason| Failure::Broken(reason.clone()))?;
        let lookup = timeout_at(deadline, servers.lookup(name.clone(), kind)).await;
        let lookup = lookup.map_err(|_| Failure::Timeout)?.map_err(failure)?;
        Ok((records(&lookup), validity(&lookup)))
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver")
            .field("settings", &self.settings)
            .field("search", &self.search)
            .finish_non_exhaustive()
    }
}

// === impl Search ===

impl Search {
    fn new(config: &ResolverConfig, options: &ResolverOpts) -> Self {
        let mut domains = config.search().to_vec();
        if domains.is_empty() {
            domains.extend(config.domain().cloned());
        }
        Self {
            domains,
            ndots: options.ndots,
        }
    }

    /// What this name may be short for, the likeliest first.
    fn candidates(&self, text: &str) -> Result<Vec<Name>, Failure> {
        let name = parse(text)?;
        if name.is_fqdn() {
            return Ok(vec![name]);
        }
        let dots = usize::from(name.num_labels()).saturating_sub(1);
        let mut whole = name.clone();
        whole.set_fqdn(true);
        // A domain with which it would be too long for a name is passed over.
        let completed = |domain: &Name| name.clone().append_domain(domain).ok();
        let mut candidates: Vec<Name> = self.domains.iter().filter_map(completed).collect();
        let position = if dots >= self.ndots {
            0
        } else {
            candidates.len()
        };
        candidates.insert(position, whole);
        Ok(candidates)
    }
}

fn parse(text: &str) -> Result<Name, Failure> {
    let broken = |error| Failure::Broken(format!("it is no name: {error}"));
    Name::from_ascii(text).map_err(broken)
}

/// Both families of addresses of a host, as they were found.
fn parts<T>(host: &str, port: u16, [v4, v6]: [T; 2]) -> Vec<(Part, T)> {
    let host: Arc<str> = host.into();
    let part = |family| Part {
        host: Arc::clone(&host),
        port,
        family,
    };
    vec![(part(Family::V4), v4), (part(Family::V6), v6)]
}

/// Servers that the configuration names: they are asked for names as they are written.
fn asking(resolvers: &[SocketAddr]) -> (ResolverConfig, ResolverOpts) {
    let server = |address: &SocketAddr| {
        let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
        for connection in &mut connections {
            connection.port = address.port();
        }
        NameServerConfig::new(address.ip(), true, connections)
    };
    let servers = resolvers.iter().map(server).collect();
    let config = ResolverConfig::from_name_servers(servers);
    (config, ResolverOpts::default())
}

fn build(
    config: ResolverConfig,
    mut options: ResolverOpts,
    timeout: Duration,
) -> Result<TokioResolver, NetError> {
    options.timeout = timeout / TRIES;
    options.attempts = TRIES as usize - 1;
    options.cache_size = 0;
    // Of one TCP connection; there are limits of our own.
    options.max_active_requests = 1024;
    options.use_hosts_file = ResolveHosts::Never;
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    *builder.options_mut() = options;
    builder.build()
}

fn read_times() -> [Option<SystemTime>; 2] {
    [SYSTEM, HOSTS].map(|file| Path::new(file).metadata().ok()?.modified().ok())
}

/// True when it was found, or nobody can tell: then no other name may be tried in its place.
fn is_settled(found: &Result<Vec<IpAddr>, Failure>) -> bool {
    match found {
        Ok(_) => leads_somewhere(found),
        Err(failure) => !matches!(failure, Failure::Empty | Failure::NotFound),
    }
}

fn leads_somewhere(found: &Result<Vec<IpAddr>, Failure>) -> bool {
    found.as_ref().is_ok_and(|addresses| !addresses.is_empty())
}

/// The servers of a service, those that are to be tried first before all others (RFC 2782). Their
/// weights are for those who know nothing of the load.
fn by_priority(records: Vec<RData>) -> impl Iterator<Item = Vec<SRV>> {
    let mut servers: BTreeMap<u16, Vec<SRV>> = BTreeMap::new();
    for record in records {
        // The root in place of a host says that there is no such service.
        if let RData::SRV(server) = record
            && !server.target.is_root()
        {
            servers.entry(server.priority).or_default().push(server);
        }
    }
    servers.into_values()
}

fn records(lookup: &Lookup) -> Vec<RData> {
    let answers = lookup.answers().iter();
    answers.map(|record| record.data.clone()).collect()
}

/// How long all of the records are valid, the aliases on the way among them.
fn validity(lookup: &Lookup) -> Duration {
    let now = std::time::Instant::now();
    let whole = lookup.valid_until().saturating_duration_since(now);
    let each = lookup.answers().iter().map(|record| record.ttl);
    let each = each.map(|seconds| Duration::from_secs(seconds.into()));
    each.fold(whole, Duration::min)
}

fn failure(error: NetError) -> Failure {
    match error {
        error if error.is_nx_domain() => Failure::NotFound,
        error if error.is_no_records_found() => Failure::Empty,
        NetError::Timeout => Failure::Timeout,
        NetError::Dns(DnsError::ResponseCode(code)) => Failure::Refused(code.to_string()),
        error => Failure::Broken(error.to_string()),
    }
}

/// Drops the addresses that this machine has no route to, unless there are no others: where there
/// is no IPv6, half of the requests to a host with both would fail (RFC 6724 section 6, rule 1).
fn drop_unreachable(answer: &mut Answer, has_route: impl Fn(SocketAddr) -> bool) {
    let found = answer.parts.iter().flat_map(|(part, found)| {
        let addresses = found.iter().flatten();
        addresses.map(|ip| SocketAddr::new(*ip, part.port))
    });
    let (reachable, unreachable): (Vec<_>, Vec<_>) = found.partition(|one| has_route(*one));
    if reachable.is_empty() || unreachable.is_empty() {
        return;
    }
    for (part, found) in &mut answer.parts {
        if let Ok(addresses) = found {
            addresses.retain(|ip| !unreachable.contains(&SocketAddr::new(*ip, part.port)));
        }
    }
}

/// Connecting a datagram socket sends nothing, and fails where there is no route.
fn has_route(address: SocketAddr) -> bool {
    use std::io::ErrorKind::{AddrNotAvailable, HostUnreachable, NetworkUnreachable};
    let local: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let connected = UdpSocket::bind((local, 0)).and_then(|socket| socket.connect(address));
    match connected {
        Ok(()) => true,
        Err(error) => {
            let no_family =
                error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error());
            let kinds = [AddrNotAvailable, HostUnreachable, NetworkUnreachable];
            // Anything else, such as a lack of descriptors, says nothing of the address.
            !(no_family || kinds.contains(&error.kind()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(domains: &[&str], ndots: usize) -> Search {
        let domain = |text: &&str| Name::from_ascii(text).unwrap();
        Search {
            domains: domains.iter().map(domain).collect(),
            ndots,
        }
    }

    fn candidates(search: &Search, text: &str) -> Vec<String> {
        let candidates = search.candidates(text).unwrap();
        candidates.iter().map(Name::to_ascii).collect()
    }

    #[test]
    fn a_name_is_completed_by_search_domains_as_the_system_does_it() {
        let kubernetes = search(&["shop.svc.cluster.local.", "cluster.local."], 5);
        assert_eq!(
            candidates(&kubernetes, "cart"),
            [
                "cart.shop.svc.cluster.local.",
                "cart.cluster.local.",
                "cart."
            ]
        );
        assert_eq!(
            candidates(&kubernetes, "www.example.com"),
            [
                "www.example.com.shop.svc.cluster.local.",
                "www.example.com.cluster.local.",
                "www.example.com."
            ]
        );
        assert_eq!(
            candidates(&kubernetes, "www.example.com."),
            ["www.example.com."]
        );
        let common = search(&["example.com."], 1);
        assert_eq!(candidates(&common, "cart"), ["cart.example.com.", "cart."]);
        assert_eq!(
            candidates(&common, "shop_1.cart"),
            ["shop_1.cart.", "shop_1.cart.example.com."]
        );
        assert_eq!(candidates(&search(&[], 1), "cart"), ["cart."]);
    }

    /// With nobody to ask, and search domains for every name.
    fn offline(hosts: &str) -> Resolver {
        let mut known = Hosts::default();
        known.read_hosts_conf(hosts.as_bytes()).unwrap();
        Resolver {
            settings: Settings::default(),
            servers: Err("nobody is to be asked".to_owned()),
            search: search(&["shop.svc.cluster.local.", "cluster.local."], 5),
            hosts: known,
            read: [None; 2],
        }
    }

    async fn found(resolver: &Resolver, host: &str) -> Result<Vec<IpAddr>, Failure> {
        let deadline = Instant::now();
        let asked = resolver.ask_host(host, 80, deadline).await?;
        assert_eq!(asked.ttl, resolver.settings.max_ttl, "{host}");
        let found = asked.parts.into_iter().map(|(_, found)| found);
        found.collect::<Result<Vec<_>, _>>().map(|all| all.concat())
    }

    #[tokio::test]
    async fn a_name_in_the_hosts_file_is_taken_as_it_is_written_before_anybody_is_asked() {
        let resolver = offline("10.0.0.1 cart\nfd00::1 cart\n10.0.0.2 pay.cluster.local\n");
        let ips = |all: &[&str]| Ok(all.iter().map(|ip| ip.parse().unwrap()).collect());
        for name in ["cart", "CART", "cart."] {
            assert_eq!(found(&resolver, name).await, ips(&["10.0.0.1", "fd00::1"]));
        }
        assert_eq!(
            found(&resolver, "pay.cluster.local").await,
            ips(&["10.0.0.2"])
        );
        let unknown = resolver.ask_host("shop", 80, Instant::now()).await.unwrap();
        assert!(matches!(unknown.parts[0].1, Err(Failure::Broken(_))));
    }

    #[tokio::test]
    async fn localhost_is_this_machine_whatever_dns_would_say() {
        let ips = |all: &[&str]| Ok(all.iter().map(|ip| ip.parse().unwrap()).collect());
        let resolver = offline("");
        for name in ["localhost", "Localhost.", "shop.localhost"] {
            assert_eq!(found(&resolver, name).await, ips(&["127.0.0.1", "::1"]));
        }
        let resolver = offline("127.0.0.1 localhost\n");
        assert_eq!(found(&resolver, "localhost").await, ips(&["127.0.0.1"]));
    }

    #[test]
    fn servers_that_are_named_are_asked_without_search_domains() {
        let (config, options) = asking(&["127.0.0.1:5353".parse().unwrap()]);
        assert_eq!(
            candidates(&Search::new(&config, &options), "cart"),
            ["cart."]
        );
        let ports = config.name_servers()[0]
            .connections
            .iter()
            .map(|one| one.port);
        assert_eq!(ports.collect::<Vec<_>>(), [5353, 5353], "UDP and TCP");
    }

    #[test]
    fn an_address_without_a_route_is_dropped_unless_there_is_no_other() {
        let [here, nowhere]: [IpAddr; 2] = ["10.0.0.1", "fd00::1"].map(|ip| ip.parse().unwrap());
        let answer = |v4: &[IpAddr], v6: &[IpAddr]| {
            let part = |family, ips: &[IpAddr]| {
                let host = "shop".into();
                let part = Part {
                    host,
                    port: 80,
                    family,
                };
                (part, Ok(ips.to_vec()))
            };
            Answer {
                parts: vec![part(Family::V4, v4), part(Family::V6, v6)],
                ..Answer::default()
            }
        };
        let mut both = answer(&[here], &[nowhere]);
        drop_unreachable(&mut both, |address| address.ip() == here);
        assert_eq!(both, answer(&[here], &[]));
        let mut unreachable = answer(&[here], &[nowhere]);
        drop_unreachable(&mut unreachable, |_| false);
        assert_eq!(unreachable, answer(&[here], &[nowhere]));
        assert!(has_route(([127, 0, 0, 1], 80).into()));
    }
}
