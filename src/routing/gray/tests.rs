use std::net::{IpAddr, Ipv4Addr};

use http::Method;
use http::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use proptest::prelude::*;
use regex::Regex;
use serde_json::json;

use super::super::identity::{JwtClaim, JwtTrust};
use super::super::matcher::{PathMatcher, ValueMatcher};
use super::super::user_list::Format;
use super::*;
use crate::routing::identity::ANONYMOUS_COOKIE;

/// Backends of the route that the tests decide on; each of them tells one way of deciding from the
/// others.
const BACKENDS: [&str; 4] = ["stable", "canary", "listed", "ruled"];
const CANARY: Target = 1;
const LISTED: Target = 2;
const RULED: Target = 3;

// === Requests ===

/// A request head that owns what it is made of.
#[derive(Clone, Debug)]
struct Request {
    path: &'static str,
    query: Option<&'static str>,
    method: Method,
    headers: HeaderMap,
    client: IpAddr,
}

fn request() -> Request {
    Request {
        path: "/",
        query: None,
        method: Method::GET,
        headers: HeaderMap::new(),
        client: Ipv4Addr::LOCALHOST.into(),
    }
}

fn of_user(user: &str) -> Request {
    request().header("x-user-id", user)
}

impl Request {
    fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers
            .append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        self
    }

    fn query(self, query: &'static str) -> Self {
        Self {
            query: Some(query),
            ..self
        }
    }

    fn path(self, path: &'static str) -> Self {
        Self { path, ..self }
    }

    fn method(self, method: Method) -> Self {
        Self { method, ..self }
    }

    fn client(self, address: &str) -> Self {
        Self {
            client: address.parse().unwrap(),
            ..self
        }
    }

    fn head(&self) -> RequestHead<'_> {
        let Self {
            path,
            query,
            method,
            headers,
            client,
        } = self;
        RequestHead {
            host: "shop.example.com",
            path,
            query: *query,
            method,
            headers,
            client: *client,
        }
    }
}

// === Routes ===

/// A route before it is compiled.
#[derive(Clone)]
struct Draft {
    identity: Vec<IdentitySource>,
    trusted_only: bool,
    without_identity: WithoutIdentity,
    steps: Vec<Step>,
    weights: [u32; 4],
}

/// Knows users by a header and sends all of them to the baseline.
fn draft() -> Draft {
    Draft {
        identity: vec![IdentitySource::Header(name("x-user-id"))],
        trusted_only: false,
        without_identity: WithoutIdentity::Random,
        steps: Vec::new(),
        weights: [1, 0, 0, 0],
    }
}

impl Draft {
    fn identity(self, identity: impl IntoIterator<Item = IdentitySource>) -> Self {
        Self {
            identity: identity.into_iter().collect(),
            ..self
        }
    }

    fn trusted_only(self) -> Self {
        Self {
            trusted_only: true,
            ..self
        }
    }

    fn without_identity(self, without_identity: WithoutIdentity) -> Self {
        Self {
            without_identity,
            ..self
        }
    }

    fn steps(self, steps: impl IntoIterator<Item = Step>) -> Self {
        Self {
            steps: steps.into_iter().collect(),
            ..self
        }
    }

    fn weights(self, weights: [u32; 4]) -> Self {
        Self { weights, ..self }
    }

    fn compile(self) -> Gray {
        let split = Split::new("shop", BACKENDS.into_iter().zip(self.weights));
        Gray::new(
            self.identity.into(),
            self.trusted_only,
            self.without_identity,
            self.steps,
            split,
        )
    }
}

fn name(name: &'static str) -> HeaderName {
    HeaderName::from_static(name)
}

fn list(ids: &str) -> Arc<UserList> {
    Arc::new(UserList::parse(ids.as_bytes().to_vec(), &Format::Lines).unwrap())
}

fn deny(ids: &str) -> Step {
    Step::DenyList(list(ids))
}

/// An override in the header `x-version` and the cookie `version`; `canary` is also what the third
/// backend's version says.
fn wish() -> Step {
    let names = [
        ("stable", 0),
        ("canary", 1),
        ("listed", 2),
        ("ruled", 3),
        ("1.8.2", 0),
        ("1.9.0", 1),
        ("canary", 2),
    ];
    Step::Override(Override {
        header: Some(name("x-version")),
        cookie: Some("version".to_owned()),
        names: names.map(|(name, target)| (name.to_owned(), target)).into(),
    })
}

fn rule(name: &str, target: Target, conditions: impl IntoIterator<Item = Condition>) -> Step {
    Step::Rule(Rule {
        name: name.into(),
        target,
        user_list: None,
        conditions: conditions.into_iter().collect(),
    })
}

fn listed(
    name: &str,
    target: Target,
    ids: &str,
    conditions: impl IntoIterator<Item = Condition>,
) -> Step {
    let conditions = conditions.into_iter().collect();
    Step::Rule(Rule {
        name: name.into(),
        target,
        user_list: Some(list(ids)),
        conditions,
    })
}

fn header_is(header: &'static str, value: &str) -> Condition {
    Condition::Header(name(header), ValueMatcher::Exact(value.to_owned()))
}

// === Decisions ===

/// A die for decisions that must not throw any.
fn no_dice() -> u64 {
    panic!("this decision is not by lot")
}

fn decide<'a>(gray: &'a Gray, request: &'a Request) -> Decision<'a> {
    gray.decide(&request.head(), false, &mut no_dice)
}

/// Target, reason and rule of a decision from which the dice are kept away.
fn outcome<'a>(gray: &'a Gray, request: &'a Request) -> (Target, Reason, Option<&'a str>) {
    let decision = decide(gray, request);
    (decision.target, decision.reason, decision.rule)
}

/// Who the sender of a request is taken for.
fn user(gray: &Gray, request: &Request, trusted: bool) -> Option<String> {
    gray.decide(&request.head(), trusted, &mut || 0)
        .identity
        .map(|identity| identity.value.into_owned())
}

// === Precedence ===

proptest! {
    #[test]
    fn deny_list_over_override_over_user_list_over_rule_over_weight_in_whatever_order_they_stand(
        steps in Just(vec![
            deny("denied\nboth"),
            wish(),
            listed("beta", LISTED, "beta\nboth", []),
            rule("qa", RULED, [header_is("x-qa", "yes")]),
        ]).prop_shuffle(),
        user in prop::sample::select(vec!["denied", "both", "beta", "nobody"]),
        wishes: bool,
        is_qa: bool,
    ) {
        let gray = draft().weights([0, 0, 0, 1]).steps(steps).compile();
        let mut request = of_user(user);
        if wishes {
            request = request.header("x-version", "canary");
        }
        if is_qa {
            request = request.header("x-qa", "yes");
        }
        let expected = match (user, wishes, is_qa) {
            ("denied" | "both", _, _) => (BASELINE, Reason::DenyList, None),
            (_, true, _) => (CANARY, Reason::Override, None),
            ("beta", _, _) => (LISTED, Reason::UserList, Some("beta")),
            (_, _, true) => (RULED, Reason::Rule, Some("qa")),
            _ => (RULED, Reason::Sticky, None),
        };
        prop_assert_eq!(outcome(&gray, &request), expected);
    }
}

#[test]
fn of_two_rules_that_hold_the_first_in_the_file_decides() {
    let conditions = || [header_is("x-qa", "yes")];
    let (one, two) = (
        rule("one", CANARY, conditions()),
        rule("two", RULED, conditions()),
    );
    let request = request().header("x-qa", "yes");
    let gray = draft().steps([one.clone(), two.clone()]).compile();
    assert_eq!(
        outcome(&gray, &request),
        (CANARY, Reason::Rule, Some("one"))
    );
    let gray = draft().steps([two, one]).compile();
    assert_eq!(outcome(&gray, &request), (RULED, Reason::Rule, Some("two")));
}

#[test]
fn of_two_lists_that_the_user_is_on_the_first_in_the_file_decides() {
    let gray = draft()
        .steps([
            listed("one", CANARY, "ann", []),
            listed("two", LISTED, "ann\nbob", []),
        ])
        .compile();
    assert_eq!(
        outcome(&gray, &of_user("ann")),
        (CANARY, Reason::UserList, Some("one"))
    );
    assert_eq!(
        outcome(&gray, &of_user("bob")),
        (LISTED, Reason::UserList, Some("two"))
    );
}

#[test]
fn a_rule_with_a_list_and_conditions_needs_both() {
    let gray = draft()
        .steps([listed("beta", LISTED, "ann", [header_is("x-app", "ios")])])
        .compile();
    assert_eq!(
        outcome(&gray, &of_user("ann").header("x-app", "ios")).1,
        Reason::UserList
    );
    for request in [
        of_user("ann"),
        of_user("ann").header("x-app", "web"),
        of_user("bob").header("x-app", "ios"),
    ] {
        assert_eq!(outcome(&gray, &request).1, Reason::Sticky, "{request:?}");
    }
}

#[test]
fn nobody_without_identity_is_on_a_list() {
    let gray = draft().without_identity(WithoutIdentity::Baseline);
    let gray = gray
        .steps([deny("ann"), listed("beta", LISTED, "ann", [])])
        .compile();
    assert_eq!(
        outcome(&gray, &request()),
        (BASELINE, Reason::Baseline, None)
    );
}

#[test]
fn rules_and_weights_work_together() {
    let gray = draft()
        .weights([50, 50, 0, 0])
        .steps([rule("qa", RULED, [header_is("x-qa", "yes")])])
        .compile();
    let mut counts = [0; 4];
    for user in 0..1000 {
        let user = format!("user-{user}");
        let ruled = of_user(&user).header("x-qa", "yes");
        assert_eq!(outcome(&gray, &ruled), (RULED, Reason::Rule, Some("qa")));
        let plain = of_user(&user);
        let (target, reason, rule) = outcome(&gray, &plain);
        assert_eq!((reason, rule), (Reason::Sticky, None));
        assert_eq!(Some(target), gray.split.by_identity(&user));
        counts[target] += 1;
    }
    // Five standard deviations of 1000 fair coins are 79.
    assert!((421..=579).contains(&counts[CANARY]), "{counts:?}");
    assert_eq!(counts[LISTED] + counts[RULED], 0);
}

// === Override ===

#[test]
fn clients_may_name_a_backend_or_its_version_in_a_header_or_a_cookie() {
    let gray = draft().steps([wish()]).compile();
    for (wish, target) in [
        ("canary", 1),
        ("1.9.0", 1),
        ("stable", 0),
        ("1.8.2", 0),
        ("ruled", 3),
    ] {
        let in_header = request().header("x-version", wish);
        assert_eq!(
            outcome(&gray, &in_header),
            (target, Reason::Override, None),
            "{wish}"
        );
        let in_cookie = request().header("cookie", &format!("a=b; version={wish}"));
        assert_eq!(
            outcome(&gray, &in_cookie),
            (target, Reason::Override, None),
            "{wish}"
        );
    }
}

#[test]
fn a_backend_name_goes_before_a_version_that_reads_the_same() {
    let gray = draft().steps([wish()]).compile();
    assert_eq!(
        outcome(&gray, &request().header("x-version", "canary")).0,
        CANARY
    );
}

#[test]
fn the_override_header_goes_before_the_cookie() {
    let gray = draft().steps([wish()]).compile();
    let request = request()
        .header("cookie", "version=stable")
        .header("x-version", "canary");
    assert_eq!(outcome(&gray, &request).0, CANARY);
}

#[test]
fn a_name_that_is_none_of_the_routes_is_no_wish() {
    let gray = draft()
        .steps([wish(), rule("qa", RULED, [header_is("x-qa", "yes")])])
        .compile();
    for unknown in ["2.0.0", "", "Canary", "canary2"] {
        let ruled = request().header("x-version", unknown).header("x-qa", "yes");
        assert_eq!(outcome(&gray, &ruled).1, Reason::Rule, "{unknown}");
        let by_cookie = request()
            .header("x-version", unknown)
            .header("cookie", "version=canary");
        assert_eq!(
            outcome(&gray, &by_cookie),
            (CANARY, Reason::Override, None),
            "{unknown}"
        );
    }
}

#[test]
fn an_override_needs_no_identity_and_moves_nobody_for_good() {
    let gray = draft().weights([1, 0, 0, 0]).steps([wish()]).compile();
    let wished = of_user("ann").header("x-version", "canary");
    assert_eq!(outcome(&gray, &wished), (CANARY, Reason::Override, None));
    assert_eq!(
        outcome(&gray, &of_user("ann")),
        (BASELINE, Reason::Sticky, None)
    );
}

// === Reasons ===

#[test]
fn the_words_for_reasons_are_frozen() {
    let words: Vec<&str> = Reason::ALL.into_iter().map(Reason::as_str).collect();
    let frozen = [
        "deny_list",
        "override",
        "user_list",
        "rule",
        "sticky",
        "random",
        "baseline",
        "failover",
    ];
    assert_eq!(words, frozen);
}

#[test]
fn all_weights_zero_means_the_baseline_for_everybody() {
    let gray = draft().weights([0; 4]).compile();
    assert_eq!(
        outcome(&gray, &of_user("ann")),
        (BASELINE, Reason::Baseline, None)
    );
    let nobody = request();
    let decision = gray.decide(&nobody.head(), false, &mut || u64::MAX);
    assert_eq!(
        (decision.target, decision.reason),
        (BASELINE, Reason::Baseline)
    );
}

#[test]
fn with_one_backend_only_there_is_nothing_to_decide() {
    let split = Split::new("shop", [("stable", 100)]);
    let identity = [IdentitySource::Header(name("x-user-id"))];
    let gray = Gray::new(
        identity.into(),
        false,
        WithoutIdentity::Random,
        Vec::new(),
        split,
    );
    assert_eq!(
        outcome(&gray, &of_user("ann")),
        (BASELINE, Reason::Baseline, None)
    );
    assert_eq!(
        outcome(&gray, &request()),
        (BASELINE, Reason::Baseline, None)
    );
    let split = Split::new("shop", [("stable", 100)]);
    let gray = Gray::new([].into(), false, WithoutIdentity::Cookie, Vec::new(), split);
    let nobody = request();
    assert_eq!(
        decide(&gray, &nobody).identity,
        None,
        "an anonymous id would serve nothing"
    );
}

// === Without identity ===

#[test]
fn without_identity_a_lot_is_drawn_by_weight() {
    let gray = draft().weights([50, 50, 0, 0]).compile();
    for (die, target) in [(0, BASELINE), (u64::MAX, CANARY)] {
        let head = request();
        let decision = gray.decide(&head.head(), false, &mut || die);
        assert_eq!(
            (decision.target, decision.reason, decision.identity),
            (target, Reason::Random, None)
        );
    }
}

#[test]
fn without_identity_the_baseline_is_given_where_that_is_the_policy() {
    let gray = draft()
        .weights([0, 1, 0, 0])
        .without_identity(WithoutIdentity::Baseline)
        .compile();
    assert_eq!(
        outcome(&gray, &request()),
        (BASELINE, Reason::Baseline, None)
    );
    assert_eq!(
        outcome(&gray, &of_user("ann")),
        (CANARY, Reason::Sticky, None)
    );
}

#[test]
fn an_issued_id_decides_now_as_it_will_when_the_cookie_comes_back() {
    let chain = [
        IdentitySource::Header(name("x-user-id")),
        IdentitySource::Cookie(ANONYMOUS_COOKIE.to_owned()),
    ];
    let gray = draft()
        .identity(chain)
        .weights([50, 50, 0, 0])
        .without_identity(WithoutIdentity::Cookie)
        .compile();
    let mut dice = fastrand::Rng::with_seed(1);
    let mut counts = [0; 4];
    for _ in 0..200 {
        let first = request();
        let first = gray.decide(&first.head(), false, &mut || dice.u64(..));
        let id = first.issued_identity().expect("an id is issued");
        assert!(
            id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()),
            "{id}"
        );

        let next = request().header("cookie", &format!("{}={id}", ANONYMOUS_COOKIE));
        let next = decide(&gray, &next);
        assert_eq!((next.target, next.reason), (first.target, Reason::Sticky));
        assert_eq!(first.reason, Reason::Sticky);
        assert_eq!(next.issued_identity(), None);
        counts[first.target] += 1;
    }
    assert!(counts[BASELINE] > 50 && counts[CANARY] > 50, "{counts:?}");
}

#[test]
fn an_issued_id_has_32_digits_even_when_the_dice_fall_low() {
    let gray = draft()
        .weights([50, 50, 0, 0])
        .without_identity(WithoutIdentity::Cookie)
        .compile();
    let first = request();
    let decision = gray.decide(&first.head(), false, &mut || 0xab);
    assert_eq!(
        decision.issued_identity(),
        Some("00000000000000ab00000000000000ab")
    );
}

#[test]
fn no_id_is_issued_to_those_who_have_one_or_for_whom_a_rule_decides() {
    let gray = draft()
        .weights([50, 50, 0, 0])
        .without_identity(WithoutIdentity::Cookie);
    let gray = gray
        .steps([rule("qa", RULED, [header_is("x-qa", "yes")])])
        .compile();
    assert_eq!(decide(&gray, &of_user("ann")).issued_identity(), None);
    assert_eq!(
        decide(&gray, &request().header("x-qa", "yes")).issued_identity(),
        None
    );
}

// === Identity ===

#[test]
fn the_first_source_that_is_not_empty_says_who_the_user_is() {
    let chain = [
        IdentitySource::Header(name("x-user-id")),
        IdentitySource::Cookie("uid".to_owned()),
        IdentitySource::Query("user_id".to_owned()),
        IdentitySource::ClientAddress,
    ];
    let gray = draft().identity(chain).compile();
    let all = request()
        .query("user_id=query")
        .header("cookie", "uid=cookie")
        .header("x-user-id", "header");
    for (request, source, value) in [
        (all, 0, "header"),
        (
            request()
                .query("user_id=query")
                .header("cookie", "uid=cookie")
                .header("x-user-id", "  "),
            1,
            "cookie",
        ),
        (
            request().query("user_id=query").header("cookie", "uid="),
            2,
            "query",
        ),
        (
            request().query("user_id=").header("cookie", "uid=\"\""),
            3,
            "127.0.0.1",
        ),
    ] {
        let identity = decide(&gray, &request).identity.unwrap();
        assert_eq!(
            (identity.source, &*identity.value),
            (Some(source), value),
            "{request:?}"
        );
    }
}

#[test]
fn a_client_is_the_same_user_over_ipv4_and_over_ipv4_in_ipv6() {
    let gray = draft().identity([IdentitySource::ClientAddress]).compile();
    for address in ["192.0.2.1", "::ffff:192.0.2.1"] {
        assert_eq!(
            user(&gray, &request().client(address), false).as_deref(),
            Some("192.0.2.1")
        );
    }
}

// === Identity from JSON Web Tokens ===

const EC: &[u8] = include_bytes!("testdata/ec-public.pem");

/// Who a bearer token in `authorization` says that the user is, by its claim `sub`.
fn bearer(trust: JwtTrust, token: &str) -> Option<String> {
    user(
        &by_token(trust),
        &request().header("authorization", &format!("Bearer {token}")),
        false,
    )
}

fn by_token(trust: JwtTrust) -> Gray {
    let claim = JwtClaim {
        name: "sub".to_owned(),
        header: AUTHORIZATION,
        trust,
    };
    draft()
        .identity([IdentitySource::JwtClaim(Arc::new(claim))])
        .compile()
}

fn ec() -> JwtTrust {
    JwtTrust::signed_by(EC).unwrap()
}

/// A token signed with the private half of [`EC`].
fn token(claims: &serde_json::Value) -> String {
    signed(
        Algorithm::ES256,
        &EncodingKey::from_ec_pem(include_bytes!("testdata/ec-private.pem")).unwrap(),
        claims,
    )
}

fn signed(algorithm: Algorithm, key: &EncodingKey, claims: &serde_json::Value) -> String {
    encode(&Header::new(algorithm), claims, key).unwrap()
}

#[test]
fn a_token_signed_by_the_key_says_who_the_user_is_whatever_kind_of_key_it_is() {
    let claims = json!({ "sub": "ann" });
    let rsa = EncodingKey::from_rsa_pem(include_bytes!("testdata/rsa-private.pem")).unwrap();
    let ed = EncodingKey::from_ed_pem(include_bytes!("testdata/ed25519-private.pem")).unwrap();
    let cases: [(&[u8], String); 4] = [
        (EC, token(&claims)),
        (
            include_bytes!("testdata/rsa-public.pem"),
            signed(Algorithm::RS256, &rsa, &claims),
        ),
        (
            include_bytes!("testdata/rsa-public.pem"),
            signed(Algorithm::PS512, &rsa, &claims),
        ),
        (
            include_bytes!("testdata/ed25519-public.pem"),
            signed(Algorithm::EdDSA, &ed, &claims),
        ),
    ];
    for (key, token) in cases {
        assert_eq!(
            bearer(JwtTrust::signed_by(key).unwrap(), &token).as_deref(),
            Some("ann"),
            "{token}"
        );
    }
}

#[test]
fn a_token_that_the_key_did_not_sign_says_nothing() {
    let claims = json!({ "sub": "ann" });
    let genuine = token(&claims);
    let [head, payload, signature] = genuine.split('.').collect::<Vec<_>>()[..] else {
        panic!("a token has three parts");
    };
    let other = EncodingKey::from_ec_pem(include_bytes!("testdata/ec-other-private.pem")).unwrap();
    let rsa = EncodingKey::from_rsa_pem(include_bytes!("testdata/rsa-private.pem")).unwrap();
    let bob = token(&json!({ "sub": "bob" }));
    let bob_payload = bob.split('.').nth(1).unwrap();
    // {"alg":"none","typ":"JWT"}
    let none = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0";
    let forgeries = [
        ("another key", signed(Algorithm::ES256, &other, &claims)),
        (
            "another kind of key",
            signed(Algorithm::RS256, &rsa, &claims),
        ),
        ("alg none, no signature", format!("{none}.{payload}.")),
        (
            "alg none, a signature",
            format!("{none}.{payload}.{signature}"),
        ),
        (
            "alg HS256 with the public key as secret",
            signed(Algorithm::HS256, &EncodingKey::from_secret(EC), &claims),
        ),
        (
            "another payload",
            format!("{head}.{bob_payload}.{signature}"),
        ),
        ("no signature", format!("{head}.{payload}.")),
        ("two parts", format!("{head}.{payload}")),
        ("not a token", "ann".to_owned()),
        ("nothing", String::new()),
    ];
    for (what, token) in forgeries {
        assert_eq!(bearer(ec(), &token), None, "{what}: {token}");
    }
    assert_eq!(bearer(ec(), &genuine).as_deref(), Some("ann"));
}

#[test]
fn an_unverified_token_is_believed_whoever_signed_it() {
    let secret = EncodingKey::from_secret(b"anything");
    let token = signed(Algorithm::HS256, &secret, &json!({ "sub": "ann" }));
    assert_eq!(bearer(JwtTrust::Unverified, &token).as_deref(), Some("ann"));
    assert_eq!(bearer(JwtTrust::Unverified, "ann"), None);
}

#[test]
fn expiry_and_audience_of_a_token_are_the_services_business() {
    let expired = json!({ "sub": "ann", "exp": 1, "aud": "another service" });
    assert_eq!(bearer(ec(), &token(&expired)).as_deref(), Some("ann"));
}

#[test]
fn a_claim_is_a_text_or_a_number_and_not_empty() {
    for (claim, user) in [
        (json!("ann"), Some("ann")),
        (json!(42), Some("42")),
        (
            json!(18_446_744_073_709_551_615_u64),
            Some("18446744073709551615"),
        ),
        (json!(""), None),
        (json!(null), None),
        (json!(true), None),
        (json!(["ann"]), None),
        (json!({ "id": "ann" }), None),
    ] {
        assert_eq!(
            bearer(ec(), &token(&json!({ "sub": claim }))).as_deref(),
            user,
            "{claim}"
        );
    }
    assert_eq!(bearer(ec(), &token(&json!({ "name": "ann" }))), None);
}

#[test]
fn a_token_stands_alone_or_after_bearer_in_any_case() {
    let token = token(&json!({ "sub": "ann" }));
    let gray = by_token(ec());
    for value in [
        token.clone(),
        format!("Bearer {token}"),
        format!("bearer {token}"),
        format!("BEARER  {token}"),
    ] {
        assert_eq!(
            user(&gray, &request().header("authorization", &value), false).as_deref(),
            Some("ann"),
            "{value}"
        );
    }
    for value in [
        format!("Basic {token}"),
        format!("Bearer{token}"),
        format!("Bearer {token} {token}"),
    ] {
        assert_eq!(
            user(&gray, &request().header("authorization", &value), false),
            None,
            "{value}"
        );
    }
}

#[test]
fn what_is_no_public_key_is_refused() {
    for pem in [&b""[..], b"not a key", &EC[..EC.len() / 2]] {
        assert!(JwtTrust::signed_by(pem).is_err());
    }
    assert!(
        JwtTrust::signed_by(include_bytes!("testdata/ec-private.pem")).is_err(),
        "a private key has no place here"
    );
}

// === Trust ===

/// A chain with every kind of source, and an override.
fn guarded() -> Gray {
    let claim = JwtClaim {
        name: "sub".to_owned(),
        header: AUTHORIZATION,
        trust: ec(),
    };
    let chain = [
        IdentitySource::Header(name("x-user-id")),
        IdentitySource::Cookie("uid".to_owned()),
        IdentitySource::Query("user_id".to_owned()),
        IdentitySource::JwtClaim(Arc::new(claim)),
        IdentitySource::ClientAddress,
    ];
    draft()
        .identity(chain)
        .trusted_only()
        .steps([deny("bob"), wish()])
        .compile()
}

#[test]
fn what_an_untrusted_sender_says_of_itself_is_not_believed() {
    let gray = guarded();
    let said = [
        of_user("ann"),
        request().header("cookie", "uid=ann"),
        request().query("user_id=ann"),
    ];
    for request in &said {
        assert_eq!(
            user(&gray, request, false).as_deref(),
            Some("127.0.0.1"),
            "{request:?}"
        );
        assert_eq!(
            user(&gray, request, true).as_deref(),
            Some("ann"),
            "{request:?}"
        );
    }
}

#[test]
fn a_signed_token_and_the_clients_address_are_believed_of_anybody() {
    let gray = guarded();
    let token = request()
        .header("authorization", &token(&json!({ "sub": "ann" })))
        .header("x-user-id", "bob");
    assert_eq!(user(&gray, &token, false).as_deref(), Some("ann"));
    assert_eq!(
        user(&gray, &request().client("192.0.2.7"), false).as_deref(),
        Some("192.0.2.7")
    );
}

#[test]
fn an_unverified_token_is_believed_of_trusted_senders_only() {
    let claim = JwtClaim {
        name: "sub".to_owned(),
        header: AUTHORIZATION,
        trust: JwtTrust::Unverified,
    };
    let gray = draft()
        .identity([IdentitySource::JwtClaim(Arc::new(claim))])
        .trusted_only()
        .compile();
    let request = request().header("authorization", &token(&json!({ "sub": "ann" })));
    assert_eq!(user(&gray, &request, false), None);
    assert_eq!(user(&gray, &request, true).as_deref(), Some("ann"));
}

#[test]
fn an_untrusted_sender_can_neither_choose_a_version_nor_pose_as_another() {
    let gray = guarded();
    for wish in [
        request().header("x-version", "canary"),
        request().header("cookie", "version=canary"),
    ] {
        assert_eq!(outcome(&gray, &wish), (BASELINE, Reason::Sticky, None));
        assert_eq!(gray.decide(&wish.head(), true, &mut no_dice).target, CANARY);
    }
    let denied = of_user("bob");
    assert_eq!(outcome(&gray, &denied).1, Reason::Sticky);
    assert_eq!(
        gray.decide(&denied.head(), true, &mut no_dice).reason,
        Reason::DenyList
    );
}

// === Conditions ===

/// Tells which of `requests` a rule with just this condition takes.
fn taken(condition: Condition, requests: &[Request]) -> Vec<bool> {
    let gray = draft()
        .without_identity(WithoutIdentity::Baseline)
        .steps([rule("one", RULED, [condition])])
        .compile();
    requests
        .iter()
        .map(|request| outcome(&gray, request) == (RULED, Reason::Rule, Some("one")))
        .collect()
}

/// Each way of comparing, with a value that it takes and one that it does not.
fn comparisons() -> [(ValueMatcher, &'static str, &'static str); 5] {
    [
        (ValueMatcher::Exact("beta".to_owned()), "beta", "Beta"),
        (ValueMatcher::Prefix("be".to_owned()), "beta", "alphabet"),
        (
            ValueMatcher::Regex(Regex::new("^(?:[a-z]+[0-9])$").unwrap()),
            "beta7",
            "beta77",
        ),
        (
            ValueMatcher::Set(["alpha".to_owned(), "beta".to_owned()].into()),
            "beta",
            "gamma",
        ),
        (ValueMatcher::Present, "beta", "beta"),
    ]
}

#[test]
fn headers_match_by_any_of_their_values() {
    for (matcher, good, bad) in comparisons() {
        let present = matches!(matcher, ValueMatcher::Present);
        let requests = [
            request().header("x-group", good),
            request().header("x-group", "other").header("x-group", good),
            request().header("x-group", bad),
            request().header("x-other", good),
        ];
        let shown = format!("{matcher:?}");
        let condition = Condition::Header(name("x-group"), matcher);
        assert_eq!(
            taken(condition, &requests),
            [true, true, present, false],
            "{shown}"
        );
    }
}

#[test]
fn cookies_match_by_the_first_of_their_name() {
    for (matcher, good, bad) in comparisons() {
        let present = matches!(matcher, ValueMatcher::Present);
        let cookie = |line: String| request().header("cookie", &line);
        let requests = [
            cookie(format!("a=b; group={good}")),
            cookie(format!("a=b; group={bad}; group={good}")),
            cookie(format!("groups={good}")),
            request(),
        ];
        let shown = format!("{matcher:?}");
        let condition = Condition::Cookie("group".to_owned(), matcher);
        assert_eq!(
            taken(condition, &requests),
            [true, present, false, false],
            "{shown}"
        );
    }
}

#[test]
fn query_parameters_match_when_decoded() {
    let exact = || ValueMatcher::Exact("a b".to_owned());
    let requests = [
        request().query("group=a%20b"),
        request().query("x=1&group=a+b"),
        request().query("group=a"),
        request(),
    ];
    assert_eq!(
        taken(Condition::Query("group".to_owned(), exact()), &requests),
        [true, true, false, false]
    );
    let present = Condition::Query("group".to_owned(), ValueMatcher::Present);
    assert_eq!(
        taken(
            present,
            &[request().query("group"), request().query("groups=1")]
        ),
        [true, false]
    );
}

#[test]
fn paths_match_exactly_by_element_by_expression_or_in_a_set() {
    let paths = ["/beta", "/beta/", "/beta/cart", "/betas"].map(|path| request().path(path));
    let regex = Regex::new("^(?:/beta.)$").unwrap();
    let set = ["/beta".to_owned(), "/betas".to_owned()].into();
    for (matcher, expected) in [
        (
            PathMatcher::Exact("/beta".to_owned()),
            [true, false, false, false],
        ),
        (PathMatcher::prefix("/beta"), [true, true, true, false]),
        (PathMatcher::Regex(regex), [false, true, false, true]),
        (PathMatcher::Set(set), [true, false, false, true]),
    ] {
        let shown = format!("{matcher:?}");
        assert_eq!(taken(Condition::Path(matcher), &paths), expected, "{shown}");
    }
}

#[test]
fn methods_match_when_they_are_one_of_those_named() {
    let requests = [Method::GET, Method::HEAD, Method::POST].map(|method| request().method(method));
    assert_eq!(
        taken(
            Condition::Method(vec![Method::GET, Method::HEAD]),
            &requests
        ),
        [true, true, false]
    );
}

#[test]
fn clients_match_by_network() {
    let networks = ["10.0.0.0/8", "2001:db8::/32"]
        .map(|network| network.parse().unwrap())
        .to_vec();
    let clients = ["10.1.2.3", "11.0.0.1", "2001:db8::1", "2001:db9::1"]
        .map(|address| request().client(address));
    assert_eq!(
        taken(Condition::Client(networks), &clients),
        [true, false, true, false]
    );
}

#[test]
fn all_conditions_of_a_rule_must_hold() {
    let conditions = || {
        [
            header_is("x-qa", "yes"),
            Condition::Method(vec![Method::POST]),
        ]
    };
    let gray = draft().without_identity(WithoutIdentity::Baseline);
    let gray = gray.steps([rule("both", RULED, conditions())]).compile();
    assert_eq!(
        outcome(&gray, &request().header("x-qa", "yes").method(Method::POST)).1,
        Reason::Rule
    );
    for request in [
        request().header("x-qa", "yes"),
        request().method(Method::POST),
        request(),
    ] {
        assert_eq!(outcome(&gray, &request).1, Reason::Baseline, "{request:?}");
    }
}

// === Headers ===

/// A route that reads headers in every way there is, some of them twice.
fn curious() -> Gray {
    let claim = JwtClaim {
        name: "sub".to_owned(),
        header: AUTHORIZATION,
        trust: ec(),
    };
    let chain = [
        IdentitySource::Header(name("x-version")),
        IdentitySource::JwtClaim(Arc::new(claim)),
        IdentitySource::Cookie("uid".to_owned()),
        IdentitySource::Query("user_id".to_owned()),
        IdentitySource::ClientAddress,
    ];
    let cookie = Condition::Cookie("group".to_owned(), ValueMatcher::Present);
    let conditions = [
        header_is("x-qa", "yes"),
        cookie,
        Condition::Method(vec![Method::GET]),
    ];
    draft()
        .identity(chain)
        .steps([deny("bob"), wish(), rule("qa", RULED, conditions)])
        .compile()
}

#[test]
fn headers_that_say_who_the_user_is_or_what_he_wants_are_guarded_once_each() {
    assert_eq!(
        curious().guarded_headers(),
        [name("x-version"), AUTHORIZATION]
    );
    assert_eq!(draft().compile().guarded_headers(), [name("x-user-id")]);
}

#[test]
fn of_an_untrusted_sender_only_headers_that_prove_themselves_are_passed_on() {
    assert_eq!(
        guarded().unbelieved_headers(),
        [name("x-user-id"), name("x-version")]
    );
    assert!(
        curious().unbelieved_headers().is_empty(),
        "here anybody is believed"
    );
}

#[test]
fn every_header_that_a_decision_reads_is_named_once() {
    assert_eq!(
        curious().headers_read(),
        [name("x-version"), AUTHORIZATION, COOKIE, name("x-qa")]
    );
    let gray = draft().identity([IdentitySource::ClientAddress]).compile();
    assert!(gray.headers_read().is_empty());
}
