//! Checks the filters of a route.

use std::time::Duration;

use http::StatusCode;
use http::header::{HeaderName, HeaderValue};

use crate::backend::HeaderEdits;
use crate::config::document::Path;
use crate::config::file::{self, FilterType, PathModifierType};
use crate::config::value;
use crate::filter::cors::{AllowedOrigin, Cors};
use crate::filter::{Filters, PathRewrite, Redirect};
use crate::routing::matcher::PathMatcher;
use crate::routing::table::{Hostname, RouteMatch};

use super::Checker;

/// As in the Gateway API.
const CORS_MAX_AGE: u32 = 5;

const REDIRECTS: [u16; 5] = [301, 302, 303, 307, 308];

impl Checker<'_> {
    pub(super) fn filters(
        &mut self,
        filters: &[file::Filter],
        at: &Path,
        matches: Option<&[RouteMatch]>,
    ) -> Option<Filters> {
        let mut checked = Filters::default();
        let mut are_sound = true;
        for (position, filter) in filters.iter().enumerate() {
            let at = at.index(position);
            let Some(kind) = self.filter_type(filter, &at) else {
                are_sound = false;
                continue;
            };
            let earlier = filters[..position].iter();
            if earlier.filter_map(only_type).any(|other| other == kind) {
                let message = format!("there is a {} before this one", name_of(kind));
                self.error(&at, message, None);
            }
            are_sound &= self.filter(filter, &at, matches, &mut checked).is_some();
        }
        if checked.redirect.is_some() && (checked.path.is_some() || checked.hostname.is_some()) {
            self.error(
                at,
                "a request is either redirected or rewritten, not both",
                None,
            );
        }
        are_sound.then_some(checked)
    }

    /// Which filter it is; exactly one may be there, and `type` may say so.
    fn filter_type(&mut self, filter: &file::Filter, at: &Path) -> Option<FilterType> {
        if self.document.is_maimed(at) {
            return None;
        }
        let Some(there) = only_type(filter) else {
            let message = "a filter is exactly one of requestHeaderModifier, responseHeaderModifier, \
                           urlRewrite, requestRedirect and cors";
            self.error(at, message, None);
            return None;
        };
        if let Some(said) = filter.kind.filter(|said| *said != there) {
            let message = format!(
                "`type` says {}, but this is a {}",
                name_of(said),
                name_of(there)
            );
            self.error(&at.key("type"), message, None);
            return None;
        }
        Some(there)
    }

    fn filter(
        &mut self,
        filter: &file::Filter,
        at: &Path,
        matches: Option<&[RouteMatch]>,
        checked: &mut Filters,
    ) -> Option<()> {
        if let Some(modifier) = &filter.request_header_modifier {
            checked.request_headers =
                self.header_modifier(modifier, &at.key("requestHeaderModifier"))?;
        }
        if let Some(modifier) = &filter.response_header_modifier {
            checked.response_headers =
                self.header_modifier(modifier, &at.key("responseHeaderModifier"))?;
        }
        if let Some(rewrite) = &filter.url_rewrite {
            let at = at.key("urlRewrite");
            let hostname = self.plain_hostname(rewrite.hostname.as_deref(), &at);
            let path = self.path_modifier(rewrite.path.as_ref(), &at.key("path"), matches);
            let value = |name: String| HeaderValue::from_str(&name).ok();
            checked.hostname = hostname?.and_then(value);
            checked.path = path?;
        }
        if let Some(redirect) = &filter.request_redirect {
            checked.redirect =
                Some(self.redirect(redirect, &at.key("requestRedirect"), matches)?);
        }
        if let Some(cors) = &filter.cors {
            checked.cors = Some(self.cors(cors, &at.key("cors"))?);
        }
        Some(())
    }

    fn header_modifier(
        &mut self,
        modifier: &file::HeaderModifier,
        at: &Path,
    ) -> Option<HeaderEdits> {
        let mut pairs = |pairs: &[file::NamedValue], key: &str| {
            self.each(pairs, &at.key(key), |checker, pair, at| {
                let name = checker.parse(&pair.name, &at.key("name"), value::editable_header);
                let value = checker.parse(&pair.value, &at.key("value"), value::header_value);
                Some((name?, value?))
            })
        };
        let (set, add) = (pairs(&modifier.set, "set"), pairs(&modifier.add, "add"));
        let remove = self.each(&modifier.remove, &at.key("remove"), |checker, text, at| {
            checker.parse(text, at, value::editable_header)
        });
        Some(HeaderEdits {
            remove: remove?,
            set: set?,
            add: add?,
        })
    }

    fn redirect(
        &mut self,
        redirect: &file::RequestRedirect,
        at: &Path,
        matches: Option<&[RouteMatch]>,
    ) -> Option<Redirect> {
        let hostname = self.plain_hostname(redirect.hostname.as_deref(), at);
        let path = self.path_modifier(redirect.path.as_ref(), &at.key("path"), matches);
        let code = redirect.status_code.unwrap_or(302);
        let status = StatusCode::from_u16(code)
            .ok()
            .filter(|_| REDIRECTS.contains(&code));
        if status.is_none() {
            let message = format!("{code} is no redirect: it is one of 301, 302, 303, 307 and 308");
            self.error(&at.key("statusCode"), message, None);
        }
        Some(Redirect {
            scheme: redirect.scheme.map(|scheme| match scheme {
                file::Scheme::Http => "http",
                file::Scheme::Https => "https",
            }),
            hostname: hostname?,
            port: redirect.port,
            path: path?,
            status: status?,
        })
    }

    /// A host that is no wildcard.
    fn plain_hostname(&mut self, hostname: Option<&str>, at: &Path) -> Option<Option<String>> {
        self.optional(
            hostname,
            &at.key("hostname"),
            |text| match value::hostname(text)? {
                Hostname::Exact(name) => Ok(name),
                Hostname::Wildcard(_) => Err("is no single host".to_owned()),
            },
        )
    }

    fn path_modifier(
        &mut self,
        modifier: Option<&file::PathModifier>,
        at: &Path,
        matches: Option<&[RouteMatch]>,
    ) -> Option<Option<PathRewrite>> {
        let Some(modifier) = modifier else {
            return Some(None);
        };
        let (there, text) = match (&modifier.replace_full_path, &modifier.replace_prefix_match) {
            (Some(full), None) => (PathModifierType::ReplaceFullPath, full),
            (None, Some(prefix)) => (PathModifierType::ReplacePrefixMatch, prefix),
            _ if self.document.is_maimed(at) => return None,
            _ => {
                let message =
                    "a path is replaced by exactly one of replaceFullPath and replacePrefixMatch";
                self.error(at, message, None);
                return None;
            }
        };
        if modifier.kind.is_some_and(|said| said != there) {
            self.error(&at.key("type"), "this is not what stands beside it", None);
            return None;
        }
        let is_prefix = there == PathModifierType::ReplacePrefixMatch;
        let key = if is_prefix {
            "replacePrefixMatch"
        } else {
            "replaceFullPath"
        };
        let path = if is_prefix && text.is_empty() {
            String::new()
        } else {
            self.replacement(text, &at.key(key))?
        };
        let by_prefix = |one: &RouteMatch| matches!(one.path, PathMatcher::Prefix(_));
        if is_prefix && matches.is_some_and(|matches| !matches.iter().all(by_prefix)) {
            let message =
                "only a PathPrefix has a prefix to replace, but this route has other matches";
            self.error(&at.key(key), message, None);
            return None;
        }
        Some(Some(if is_prefix {
            PathRewrite::Prefix(path)
        } else {
            PathRewrite::Full(path)
        }))
    }

    fn replacement(&mut self, text: &str, at: &Path) -> Option<String> {
        value::path(text)
            .map_err(|misfit| self.error(at, format!("`{text}` {}", misfit.reason), misfit.hint))
            .ok()
    }

    fn cors(&mut self, cors: &file::Cors, at: &Path) -> Option<Cors> {
        let origins_at = at.key("allowOrigins");
        if cors.allow_origins.is_empty() && !self.document.is_maimed(&origins_at) {
            self.error(
                &origins_at,
                "without an origin no page may read anything",
                None,
            );
        }
        let origins = self.each(&cors.allow_origins, &origins_at, |checker, text, at| {
            checker.parse(text, at, allowed_origin)
        });
        let methods = self.each(
            &cors.allow_methods,
            &at.key("allowMethods"),
            |checker, text, at| checker.parse(text, at, value::method),
        );
        let headers = self.names_of_headers(&cors.allow_headers, &at.key("allowHeaders"));
        let expose = self.names_of_headers(&cors.expose_headers, &at.key("exposeHeaders"));
        let methods = methods?;
        let methods: Vec<&str> = methods.iter().map(http::Method::as_str).collect();
        Some(Cors {
            origins: origins?,
            credentials: cors.allow_credentials,
            methods: list(&methods),
            headers: headers?,
            expose: expose?,
            max_age: Duration::from_secs(cors.max_age.unwrap_or(CORS_MAX_AGE).into()),
        })
    }

    fn names_of_headers(&mut self, names: &[String], at: &Path) -> Option<Option<HeaderValue>> {
        let names = self.each(names, at, |checker, text, at| {
            checker.parse(text, at, value::header_name)
        })?;
        let names: Vec<&str> = names.iter().map(HeaderName::as_str).collect();
        Some(list(&names))
    }
}

/// The filter that is there, if it is exactly one.
fn only_type(filter: &file::Filter) -> Option<FilterType> {
    let there = [
        (
            filter.request_header_modifier.is_some(),
            FilterType::RequestHeaderModifier,
        ),
        (
            filter.response_header_modifier.is_some(),
            FilterType::ResponseHeaderModifier,
        ),
        (filter.url_rewrite.is_some(), FilterType::UrlRewrite),
        (
            filter.request_redirect.is_some(),
            FilterType::RequestRedirect,
        ),
        (filter.cors.is_some(), FilterType::Cors),
    ];
    let mut there = there.into_iter().filter(|(is_there, _)| *is_there);
    match (there.next(), there.next()) {
        (Some((_, kind)), None) => Some(kind),
        _ => None,
    }
}

fn name_of(kind: FilterType) -> &'static str {
    match kind {
        FilterType::RequestHeaderModifier => "RequestHeaderModifier",
        FilterType::ResponseHeaderModifier => "ResponseHeaderModifier",
        FilterType::UrlRewrite => "URLRewrite",
        FilterType::RequestRedirect => "RequestRedirect",
        FilterType::Cors => "CORS",
    }
}

fn list(names: &[&str]) -> Option<HeaderValue> {
    (!names.is_empty())
        .then(|| HeaderValue::from_str(&names.join(", ")).ok())
        .flatten()
}

fn allowed_origin(text: &str) -> Result<AllowedOrigin, String> {
    if text == "*" {
        return Ok(AllowedOrigin::Any);
    }
    let malformed = || "is not an origin such as `https://shop.example.com`".to_owned();
    let text = text.to_ascii_lowercase();
    let (scheme, host) = text.split_once("://").ok_or_else(malformed)?;
    let is_scheme = scheme
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'));
    let bare = host.strip_prefix("*.").unwrap_or(host);
    let is_host = bare.parse::<http::uri::Authority>().is_ok() && !bare.contains(['@', '*', '/']);
    if scheme.is_empty() || !is_scheme || !is_host {
        return Err(malformed());
    }
    Ok(match host.strip_prefix('*') {
        Some(suffix) => AllowedOrigin::Wildcard {
            scheme: format!("{scheme}://"),
            suffix: suffix.to_owned(),
        },
        None => AllowedOrigin::Exact(text.clone()),
    })
}
