use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::{LazyLock, Mutex};

use http::Method;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::super::matcher::ValueMatcher;
use super::*;

/// A route as the tests write it, before it goes into a table.
#[derive(Clone, Debug, Default)]
struct Draft {
    hostnames: Vec<&'static str>,
    matches: Vec<Match>,
}

#[derive(Clone, Debug)]
struct Match {
    path: Path,
    method: Option<Method>,
    headers: Vec<&'static str>,
    query_params: Vec<&'static str>,
}

#[derive(Clone, Copy, Debug)]
enum Path {
    Exact(&'static str),
    Prefix(&'static str),
    Regex(&'static str),
    Set(&'static [&'static str]),
}

#[derive(Clone, Debug)]
struct Request {
    host: &'static str,
    path: &'static str,
    query: String,
    method: Method,
    headers: HeaderMap,
}

fn request(host: &'static str, path: &'static str) -> Request {
    Request {
        host,
        path,
        query: String::new(),
        method: Method::GET,
        headers: HeaderMap::new(),
    }
}

impl Request {
    fn headers(mut self, names: &[&'static str]) -> Self {
        self.headers.extend(names.iter().map(|name| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static("yes"),
            )
        }));
        self
    }

    fn query_params(self, names: &[&'static str]) -> Self {
        Self {
            query: names
                .iter()
                .map(|name| format!("{name}=yes"))
                .collect::<Vec<_>>()
                .join("&"),
            ..self
        }
    }

    fn head(&self) -> RequestHead<'_> {
        let Self {
            host,
            path,
            query,
            method,
            headers,
        } = self;
        RequestHead {
            host,
            path,
            query: Some(query),
            method,
            headers,
            client: Ipv4Addr::LOCALHOST.into(),
        }
    }
}

fn route(hostnames: &[&'static str], matches: impl IntoIterator<Item = Match>) -> Draft {
    Draft {
        hostnames: hostnames.to_vec(),
        matches: matches.into_iter().collect(),
    }
}

fn on(path: Path) -> Match {
    Match {
        path,
        method: None,
        headers: Vec::new(),
        query_params: Vec::new(),
    }
}

fn table(routes: &[Draft]) -> RouteTable {
    let mut table = RouteTable::default();
    for (index, route) in routes.iter().enumerate() {
        let hostnames: Vec<Hostname> = route.hostnames.iter().map(|text| hostname(text)).collect();
        let matches: Vec<RouteMatch> = route.matches.iter().map(Match::compile).collect();
        table.insert(index, &hostnames, &matches);
    }
    table.finish();
    table
}

fn hostname(text: &str) -> Hostname {
    match text.strip_prefix("*.") {
        Some(suffix) => Hostname::Wildcard(suffix.to_owned()),
        None => Hostname::Exact(text.to_owned()),
    }
}

/// Anchored as the configuration does it; kept, since compiling takes longer than all else here.
fn regex(text: &'static str) -> Regex {
    static COMPILED: LazyLock<Mutex<HashMap<&str, Regex>>> = LazyLock::new(Mutex::default);
    let mut compiled = COMPILED.lock().unwrap();
    compiled
        .entry(text)
        .or_insert_with(|| Regex::new(&format!("^(?:{text})$")).unwrap())
        .clone()
}

impl Match {
    fn compile(&self) -> RouteMatch {
        let yes = || ValueMatcher::Exact("yes".to_owned());
        let method = self
            .method
            .iter()
            .map(|method| Condition::Method(vec![method.clone()]));
        let headers = self
            .headers
            .iter()
            .map(|name| Condition::Header(HeaderName::from_static(name), yes()));
        let query_params = self
            .query_params
            .iter()
            .map(|name| Condition::Query((*name).to_owned(), yes()));
        let path = match self.path {
            Path::Exact(path) => PathMatcher::Exact(path.to_owned()),
            Path::Prefix(path) => PathMatcher::prefix(path),
            Path::Regex(text) => PathMatcher::Regex(regex(text)),
            Path::Set(paths) => {
                PathMatcher::Set(paths.iter().map(|path| (*path).to_owned()).collect())
            }
        };
        RouteMatch {
            path,
            conditions: method.chain(headers).chain(query_params).collect(),
        }
    }
}

// === The model: every match is tried, in the order that the Gateway API gives ===

/// The place of a host in the order of precedence, the first the smallest; `None` when it does not
/// take the request.
fn host_rank(hostname: Option<&str>, host: &str) -> Option<(u8, Reverse<usize>)> {
    match hostname {
        None => Some((2, Reverse(0))),
        Some(hostname) => match hostname.strip_prefix('*') {
            None => (hostname == host).then_some((0, Reverse(0))),
            Some(suffix) => (host.ends_with(suffix) && host.len() > suffix.len())
                .then_some((1, Reverse(suffix.len()))),
        },
    }
}

/// The same of a path.
fn path_rank(pattern: Path, path: &str) -> Option<(u8, Reverse<usize>)> {
    let elements = |path: &str| {
        path.split('/')
            .filter(|element| !element.is_empty())
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    match pattern {
        Path::Exact(exact) => (exact == path).then_some((0, Reverse(0))),
        Path::Set(paths) => paths.contains(&path).then_some((0, Reverse(0))),
        Path::Regex(text) => regex(text)
            .is_match(path)
            .then_some((1, Reverse(text.len()))),
        Path::Prefix(prefix) => {
            let prefix = elements(prefix);
            elements(path)
                .starts_with(&prefix)
                .then_some((2, Reverse(prefix.join("/").len())))
        }
    }
}

fn model(routes: &[Draft], request: &Request) -> Option<RouteIndex> {
    let mut taking = Vec::new();
    for (index, route) in routes.iter().enumerate() {
        let hostnames: Vec<Option<&str>> = match &*route.hostnames {
            [] => vec![None],
            hostnames => hostnames.iter().copied().map(Some).collect(),
        };
        for (position, one) in route.matches.iter().enumerate() {
            let named = |name: &&str| {
                request
                    .query
                    .split('&')
                    .any(|pair| pair == format!("{name}=yes"))
            };
            let holds = one
                .method
                .as_ref()
                .is_none_or(|method| *method == request.method)
                && one
                    .headers
                    .iter()
                    .all(|name| request.headers.contains_key(*name))
                && one.query_params.iter().all(named);
            let host = hostnames
                .iter()
                .filter_map(|hostname| host_rank(*hostname, request.host))
                .min();
            if let (true, Some(host), Some(path)) = (holds, host, path_rank(one.path, request.path))
            {
                let more = Reverse((
                    one.method.is_some(),
                    one.headers.len(),
                    one.query_params.len(),
                ));
                taking.push((host, path, more, index, position));
            }
        }
    }
    taking.into_iter().min().map(|(_, _, _, index, _)| index)
}

// Few names, so that most requests have several routes to choose from.
const HOSTS: [&str; 5] = [
    "a.example.com",
    "b.a.example.com",
    "example.com",
    "a.test",
    "com",
];
const HOSTNAMES: [&str; 6] = [
    "a.example.com",
    "*.example.com",
    "*.a.example.com",
    "*.com",
    "example.com",
    "*.test",
];
const PATHS: [&str; 8] = [
    "/",
    "/shop",
    "/shop/",
    "/shop/cart",
    "/shop/cart/1",
    "/shopping",
    "/s",
    "/api/v1",
];
const PATTERNS: [&str; 5] = ["/.*", "/shop.*", "/shop/[a-z]+", "/s(hop)?", "/api/v[0-9]"];
const NAMES: [&str; 2] = ["x-one", "x-two"];
const SETS: [&[&str]; 2] = [&["/shop", "/s"], &["/shop/cart", "/api/v1"]];

fn any_path() -> impl Strategy<Value = Path> {
    prop_oneof![
        2 => select(&PATHS[..]).prop_map(Path::Exact),
        4 => select(&PATHS[..]).prop_map(Path::Prefix),
        2 => select(&PATTERNS[..]).prop_map(Path::Regex),
        1 => select(&SETS[..]).prop_map(Path::Set),
    ]
}

fn any_method() -> impl Strategy<Value = Method> {
    select(vec![Method::GET, Method::POST])
}

fn some_of<T: Clone + std::fmt::Debug + 'static>(
    all: &'static [T],
) -> impl Strategy<Value = Vec<T>> {
    subsequence(all, 0..=all.len())
}

fn any_match() -> impl Strategy<Value = Match> {
    (
        any_path(),
        prop::option::of(any_method()),
        some_of(&NAMES),
        some_of(&NAMES),
    )
        .prop_map(|(path, method, headers, query_params)| Match {
            path,
            method,
            headers,
            query_params,
        })
}

fn any_route() -> impl Strategy<Value = Draft> {
    (
        subsequence(&HOSTNAMES[..], 0..3),
        prop::collection::vec(any_match(), 1..4),
    )
        .prop_map(|(hostnames, matches)| Draft { hostnames, matches })
}

fn any_request() -> impl Strategy<Value = Request> {
    (
        select(&HOSTS[..]),
        select(&PATHS[..]),
        any_method(),
        some_of(&NAMES),
        some_of(&NAMES),
    )
        .prop_map(|(host, path, method, headers, query_params)| {
            Request {
                method,
                ..request(host, path)
            }
            .headers(&headers)
            .query_params(&query_params)
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_table_finds_what_trying_every_match_in_order_finds(
        routes in prop::collection::vec(any_route(), 0..12),
        requests in prop::collection::vec(any_request(), 1..24),
    ) {
        let table = table(&routes);
        for request in &requests {
            prop_assert_eq!(table.find(&request.head()).map(|found| found.route), model(&routes, request), "{:?}", request);
        }
    }

    #[test]
    fn no_path_or_host_makes_the_table_panic(
        routes in prop::collection::vec(any_route(), 0..6), host in "[a.é]{0,8}", path in "[/aé?]{0,8}|\\PC{0,8}",
    ) {
        let headers = HeaderMap::new();
        let head = RequestHead {
            host: &host, path: &path, query: None, method: &Method::GET, headers: &headers,
            client: Ipv4Addr::LOCALHOST.into(),
        };
        let _ = table(&routes).find(&head);
    }
}

// === Examples ===

/// The routes that requests for these paths find, all on the same host.
fn found(routes: &[Draft], requests: &[Request]) -> Vec<Option<RouteIndex>> {
    let table = table(routes);
    requests
        .iter()
        .map(|request| table.find(&request.head()).map(|found| found.route))
        .collect()
}

fn everything() -> [Match; 1] {
    [on(Path::Prefix("/"))]
}

#[test]
fn an_empty_table_finds_nothing() {
    assert_eq!(found(&[], &[request("a.test", "/")]), [None]);
}

#[test]
fn an_exact_host_goes_before_the_longest_wildcard_before_any() {
    let routes = [
        route(&[], everything()),
        route(&["*.example.com"], everything()),
        route(&["*.shop.example.com"], everything()),
        route(&["www.shop.example.com"], everything()),
    ];
    let hosts = [
        "www.shop.example.com",
        "x.shop.example.com",
        "shop.example.com",
        "example.com",
    ];
    let requests = hosts.map(|host| request(host, "/"));
    assert_eq!(
        found(&routes, &requests),
        [Some(3), Some(2), Some(1), Some(0)]
    );
}

#[test]
fn a_wildcard_takes_several_labels_but_not_the_bare_suffix() {
    let routes = [route(&["*.example.com"], everything())];
    let hosts = [
        "a.example.com",
        "a.b.c.example.com",
        "example.com",
        "badexample.com",
        "a.example.com.evil",
    ];
    let requests = hosts.map(|host| request(host, "/"));
    assert_eq!(
        found(&routes, &requests),
        [Some(0), Some(0), None, None, None]
    );
}

#[test]
fn an_exact_path_goes_before_an_expression_before_the_longest_prefix() {
    let routes = [
        route(&[], [on(Path::Prefix("/"))]),
        route(&[], [on(Path::Prefix("/shop"))]),
        route(&[], [on(Path::Prefix("/shop/cart/items"))]),
        route(&[], [on(Path::Regex("/shop/c.*"))]),
        route(&[], [on(Path::Exact("/shop/cart"))]),
    ];
    let paths = ["/shop/cart", "/shop/cart/items", "/shop/x", "/x"];
    let requests = paths.map(|path| request("a.test", path));
    assert_eq!(
        found(&routes, &requests),
        [Some(4), Some(3), Some(1), Some(0)]
    );
}

#[test]
fn the_longer_expression_goes_first() {
    let routes = [
        route(&[], [on(Path::Regex("/.*"))]),
        route(&[], [on(Path::Regex("/shop.*"))]),
    ];
    assert_eq!(
        found(
            &routes,
            &[request("a.test", "/shop"), request("a.test", "/x")]
        ),
        [Some(1), Some(0)]
    );
}

#[test]
fn a_prefix_ends_at_an_element_with_or_without_its_slash() {
    for prefix in ["/shop", "/shop/"] {
        let paths = ["/shop", "/shop/", "/shop/cart", "/shopping", "/sho", "/"];
        let requests = paths.map(|path| request("a.test", path));
        let expected = [Some(0), Some(0), Some(0), None, None, None];
        assert_eq!(
            found(&[route(&[], [on(Path::Prefix(prefix))])], &requests),
            expected,
            "{prefix}"
        );
    }
}

#[test]
fn a_match_whose_conditions_do_not_hold_passes_on_to_the_next_best() {
    let post = Match {
        method: Some(Method::POST),
        ..on(Path::Exact("/shop"))
    };
    let with_header = Match {
        headers: vec!["x-one"],
        ..on(Path::Regex("/sh.*"))
    };
    let with_param = Match {
        query_params: vec!["x-one"],
        ..on(Path::Prefix("/shop"))
    };
    let routes = [
        route(&["a.test"], [post]),
        route(&["a.test"], [with_header]),
        route(&["a.test"], [with_param]),
        route(
            &["*.test"],
            [Match {
                headers: vec!["x-two"],
                ..on(Path::Prefix("/"))
            }],
        ),
        route(&[], everything()),
    ];
    let shop = || request("a.test", "/shop");
    let requests = [
        Request {
            method: Method::POST,
            ..shop()
        },
        shop().headers(&["x-one"]),
        shop().query_params(&["x-one"]),
        shop().headers(&["x-two"]),
        shop(),
    ];
    assert_eq!(
        found(&routes, &requests),
        [Some(0), Some(1), Some(2), Some(3), Some(4)]
    );
}

#[test]
fn on_the_same_path_a_method_goes_before_headers_before_query_parameters_before_the_order_of_the_file()
 {
    let plain = || on(Path::Prefix("/"));
    let two = NAMES.to_vec();
    let routes = [
        route(&[], [plain()]),
        route(&[], [plain()]),
        route(
            &[],
            [Match {
                query_params: two.clone(),
                ..plain()
            }],
        ),
        route(
            &[],
            [Match {
                headers: vec!["x-one"],
                ..plain()
            }],
        ),
        route(
            &[],
            [Match {
                headers: two.clone(),
                ..plain()
            }],
        ),
        route(
            &[],
            [Match {
                method: Some(Method::GET),
                ..plain()
            }],
        ),
    ];
    let full = request("a.test", "/").headers(&two).query_params(&two);
    let post = Request {
        method: Method::POST,
        ..full.clone()
    };
    let one = request("a.test", "/")
        .headers(&["x-one"])
        .query_params(&two);
    let requests = [
        full,
        post.clone(),
        Request {
            method: Method::POST,
            ..one
        },
        Request {
            headers: HeaderMap::new(),
            ..post.clone()
        },
        Request {
            headers: HeaderMap::new(),
            query: String::new(),
            ..post
        },
    ];
    assert_eq!(
        found(&routes, &requests),
        [Some(5), Some(4), Some(3), Some(2), Some(0)]
    );
}

#[test]
fn one_route_may_have_several_hosts_and_matches() {
    let routes = [route(
        &["a.test", "*.b.test"],
        [on(Path::Exact("/one")), on(Path::Prefix("/two"))],
    )];
    let hits = [
        ("a.test", "/one"),
        ("a.test", "/two/x"),
        ("x.b.test", "/one"),
    ];
    let misses = [("a.test", "/one/x"), ("b.test", "/one"), ("a.test", "/")];
    for (pairs, expected) in [(hits, Some(0)), (misses, None)] {
        assert_eq!(
            found(&routes, &pairs.map(|(host, path)| request(host, path))),
            [expected; 3]
        );
    }
}

#[test]
fn each_of_ten_thousand_routes_is_found() {
    const ROUTES: usize = 10_000;
    let mut table = RouteTable::default();
    for index in 0..ROUTES {
        let matches = [RouteMatch {
            path: PathMatcher::prefix(&format!("/r{index}")),
            conditions: Arc::default(),
        }];
        // A tenth of them each: no host, the same host, a wildcard, and else a host of its own.
        let hostnames = match index % 10 {
            0 => Vec::new(),
            1 => vec![hostname("shop.test")],
            2 => vec![hostname(&format!("*.w{index}.test"))],
            _ => vec![hostname(&format!("h{index}.test"))],
        };
        table.insert(index, &hostnames, &matches);
    }
    table.finish();
    let headers = HeaderMap::new();
    let find = |host: &str, path: &str| {
        let client = Ipv4Addr::LOCALHOST.into();
        let found = table.find(&RequestHead {
            host,
            path,
            query: None,
            method: &Method::GET,
            headers: &headers,
            client,
        });
        found.map(|found| found.route)
    };
    let found: BTreeSet<RouteIndex> = (0..ROUTES)
        .filter_map(|index| {
            let host = match index % 10 {
                0 => "unknown.test".to_owned(),
                1 => "shop.test".to_owned(),
                2 => format!("a.b.w{index}.test"),
                _ => format!("h{index}.test"),
            };
            assert_eq!(find(&host, &format!("/x{index}/items")), None);
            find(&host, &format!("/r{index}/items")).filter(|found| *found == index)
        })
        .collect();
    assert_eq!(found.len(), ROUTES);
}
