//! Checks who gets which version: identity, overrides, rules.

use std::sync::Arc;

use http::header::{AUTHORIZATION, HeaderName};

use crate::config::document::Path;
use crate::config::problem::did_you_mean;
use crate::config::{Gray, Rule, file, value};
use crate::routing::Target;
use crate::routing::gray::WithoutIdentity;
use crate::routing::identity::{ANONYMOUS_COOKIE, IdentitySource, JwtClaim, JwtTrust};
use crate::routing::matcher::Condition;

use super::{Checker, Names, backend_refs_of};

impl Checker<'_> {
    pub(super) fn gray(
        &mut self,
        route: &file::Route,
        at: &Path,
        backends: &Names,
        lists: &mut Names,
    ) -> Option<Gray> {
        let gray = &route.gray;
        let identity = self.identity(gray, at);
        let deny_list =
            self.resolve_optional(gray.deny_list.as_deref(), &at.key("denyList"), lists);
        let client_override = match &gray.client_override {
            Some(wish) => self.client_override(wish, &at.key("override")).map(Some),
            None => Some(None),
        };
        self.names(
            "rule",
            gray.rules.iter().map(|rule| rule.name.as_str()),
            &at.key("rules"),
        );
        let rules = self.each(&gray.rules, &at.key("rules"), |checker, rule, at| {
            checker.rule(rule, at, route, backends, lists)
        });
        let vary = match &gray.vary {
            Some(names) => self
                .each(names, &at.key("vary"), |checker, text, at| {
                    checker.parse(text, at, value::header_name)
                })
                .map(Some),
            None => Some(None),
        };
        let debug_clients = self.networks(&gray.debug_clients, &at.key("debugClients"));
        let uses_lists =
            gray.deny_list.is_some() || gray.rules.iter().any(|rule| rule.user_list.is_some());
        let identity_known =
            !self.document.is_maimed(at) && !self.document.is_maimed(&at.key("identity"));
        if gray.identity.is_empty() && uses_lists && identity_known {
            self.error(
                at,
                "a user list needs `identity`: without it nobody is on a list",
                None,
            );
        }
        Some(Gray {
            identity: identity?,
            trusted_only: gray.identity_from == file::IdentityFrom::Trusted,
            without_identity: match gray.without_identity {
                file::WithoutIdentity::Random => WithoutIdentity::Random,
                file::WithoutIdentity::Baseline => WithoutIdentity::Baseline,
                file::WithoutIdentity::Cookie => WithoutIdentity::Cookie,
            },
            salt: gray.salt.clone().unwrap_or_else(|| route.name.clone()),
            deny_list: deny_list?,
            client_override: client_override?,
            rules: rules?,
            vary: vary?,
            debug_clients: debug_clients?,
        })
    }

    fn identity(&mut self, gray: &file::Gray, at: &Path) -> Option<Arc<[IdentitySource]>> {
        let mut chain = self.each(&gray.identity, &at.key("identity"), Self::identity_source)?;
        if gray.without_identity == file::WithoutIdentity::Cookie {
            if gray.identity_from == file::IdentityFrom::Trusted {
                let message = "`withoutIdentity: cookie` cannot go with `identityFrom: trusted`";
                let hint = "the cookie comes from the client itself, who is not believed";
                self.error(&at.key("withoutIdentity"), message, Some(hint.to_owned()));
            }
            chain.push(IdentitySource::Cookie(ANONYMOUS_COOKIE.to_owned()));
        }
        Some(chain.into())
    }

    fn identity_source(
        &mut self,
        source: &file::IdentitySource,
        at: &Path,
    ) -> Option<IdentitySource> {
        match source {
            file::IdentitySource::Header(name) => self
                .parse(name, &at.key("header"), value::header_name)
                .map(IdentitySource::Header),
            file::IdentitySource::Cookie(name) => self
                .parse(name, &at.key("cookie"), value::parameter_name)
                .map(IdentitySource::Cookie),
            file::IdentitySource::Query(name) => self
                .parse(name, &at.key("query"), value::parameter_name)
                .map(IdentitySource::Query),
            file::IdentitySource::JwtClaim(claim) => self
                .jwt_claim(claim, &at.key("jwtClaim"))
                .map(|claim| IdentitySource::JwtClaim(Arc::new(claim))),
            file::IdentitySource::ClientAddress => Some(IdentitySource::ClientAddress),
        }
    }

    fn jwt_claim(&mut self, claim: &file::JwtClaim, at: &Path) -> Option<JwtClaim> {
        let header = match &claim.header {
            Some(name) => self.parse(name, &at.key("header"), value::header_name),
            None => Some(AUTHORIZATION),
        };
        let trust = match (&claim.key_file, claim.unverified) {
            (Some(file), false) => {
                let path = self.around.directory.join(file);
                let trust = (self.around.read)(&path).and_then(|pem| JwtTrust::signed_by(&pem));
                match trust {
                    Ok(trust) => Some(trust),
                    Err(reason) => {
                        self.error(&at.key("keyFile"), format!("`{file}` {reason}"), None);
                        None
                    }
                }
            }
            (None, true) => Some(JwtTrust::Unverified),
            (_, _) if self.document.is_maimed(at) => None,
            (Some(_), true) => {
                self.error(
                    &at.key("unverified"),
                    "a token is either checked by `keyFile` or `unverified`, not both",
                    None,
                );
                None
            }
            (None, false) => {
                let hint =
                    "`unverified: true` is right only behind something that has checked the token";
                self.error(
                    at,
                    "a JWT claim needs either `keyFile` or `unverified: true`",
                    Some(hint.to_owned()),
                );
                None
            }
        };
        Some(JwtClaim {
            name: claim.name.clone(),
            header: header?,
            trust: trust?,
        })
    }

    fn client_override(
        &mut self,
        wish: &file::Override,
        at: &Path,
    ) -> Option<(Option<HeaderName>, Option<String>)> {
        if wish.header.is_none() && wish.cookie.is_none() && !self.document.is_maimed(at) {
            self.error(
                at,
                "an override needs a `header` or a `cookie` to stand in",
                None,
            );
        }
        let header = self.optional(
            wish.header.as_deref(),
            &at.key("header"),
            value::header_name,
        );
        let cookie = self.optional(
            wish.cookie.as_deref(),
            &at.key("cookie"),
            value::parameter_name,
        );
        Some((header?, cookie?))
    }

    fn rule(
        &mut self,
        rule: &file::Rule,
        at: &Path,
        route: &file::Route,
        backends: &Names,
        lists: &mut Names,
    ) -> Option<Rule> {
        let name = self.name(&rule.name, at);
        let target = self.own_backend(&rule.backend, &at.key("backend"), route, backends);
        let user_list =
            self.resolve_optional(rule.user_list.as_deref(), &at.key("userList"), lists);
        let conditions = self.conditions(rule, at);
        let unconditional =
            rule.user_list.is_none() && conditions.as_ref().is_some_and(Vec::is_empty);
        if unconditional && !self.document.is_maimed(at) {
            let message = format!(
                "rule `{}` has no condition and would take every request",
                rule.name
            );
            self.error(
                at,
                message,
                Some("to send everybody there, use weights".to_owned()),
            );
        }
        Some(Rule {
            name: name?,
            target: target?,
            user_list: user_list?,
            conditions: conditions?.into(),
        })
    }

    /// The position of a backend that is named somewhere in a route and must be one of its own.
    pub(super) fn own_backend(
        &mut self,
        name: &str,
        at: &Path,
        route: &file::Route,
        backends: &Names,
    ) -> Option<Target> {
        let target = route.backend_refs.iter().position(|one| one.name == name);
        // A reference that leads nowhere may have been meant to be this one.
        let all_known = !backends.nameless
            && !self.document.has_nameless(&backend_refs_of(at))
            && route
                .backend_refs
                .iter()
                .all(|one| backends.positions.contains_key(&one.name));
        let lost = self
            .document
            .lost_names(&backend_refs_of(at))
            .any(|lost| lost == name);
        if target.is_none() && all_known && !lost {
            let message = format!("backend `{name}` is none of this route's backendRefs");
            let hint = did_you_mean(name, route.backend_refs.iter().map(|one| one.name.as_str()))
                .unwrap_or_else(|| {
                    "list it there with weight 0 to reach it by rule alone".to_owned()
                });
            self.error(at, message, Some(hint));
        }
        target
    }

    fn conditions(&mut self, rule: &file::Rule, at: &Path) -> Option<Vec<Condition>> {
        let mut conditions = Vec::new();
        if let Some(header) = &rule.header {
            conditions.push(self.header_condition(header, &at.key("header")));
        }
        if let Some(cookie) = &rule.cookie {
            conditions.push(self.cookie_condition(cookie, &at.key("cookie")));
        }
        if let Some(query) = &rule.query {
            conditions.push(self.query_condition(query, &at.key("query")));
        }
        if let Some(path) = &rule.path {
            conditions.push(
                self.whole(path, &at.key("path"), value::path_matcher)
                    .map(Condition::Path),
            );
        }
        if !rule.methods.is_empty() {
            let methods = self.each(&rule.methods, &at.key("methods"), |checker, text, at| {
                checker.parse(text, at, value::method)
            });
            conditions.push(methods.map(Condition::Method));
        }
        if !rule.client_cidrs.is_empty() {
            let networks = self.networks(&rule.client_cidrs, &at.key("clientCidrs"));
            conditions.push(networks.map(|networks| Condition::Client(networks.to_vec())));
        }
        conditions.into_iter().collect()
    }

    pub(super) fn header_condition(
        &mut self,
        condition: &file::NamedMatch,
        at: &Path,
    ) -> Option<Condition> {
        let name = self.parse(&condition.name, &at.key("name"), value::header_name);
        let matcher = self.whole(condition, at, value::value_matcher);
        Some(Condition::Header(name?, matcher?))
    }

    fn cookie_condition(&mut self, condition: &file::NamedMatch, at: &Path) -> Option<Condition> {
        let name = self.parse(&condition.name, &at.key("name"), value::parameter_name);
        let matcher = self.whole(condition, at, value::value_matcher);
        Some(Condition::Cookie(name?, matcher?))
    }

    pub(super) fn query_condition(
        &mut self,
        condition: &file::NamedMatch,
        at: &Path,
    ) -> Option<Condition> {
        let name = self.parse(&condition.name, &at.key("name"), value::parameter_name);
        let matcher = self.whole(condition, at, value::value_matcher);
        Some(Condition::Query(name?, matcher?))
    }
}
