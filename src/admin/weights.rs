//! `/api/v1/routes/{route}/weights`: shows the weights of a route, sets them, and leaves them to the file again.

use http::header::{AUTHORIZATION, ETAG, HeaderMap, HeaderValue, IF_MATCH, WWW_AUTHENTICATE};
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use tokio::sync::oneshot;
use tracing::warn;

use crate::access::{Shown, Token, who};
use crate::control::Change;
use crate::control::weights::{AUDIT, Refusal, WeightsOrder};
use crate::weights::{Tag, configured};

use super::view::{Failure, WeightsOrderView, WeightsView};
use super::{Admin, Caller, Reply, json, read, shutting_down};

/// Why somebody may not change anything.
enum Denial {
    /// Nobody may.
    Everybody,
    /// He has shown nothing that the configuration knows.
    Stranger,
}

// === impl Admin ===

impl Admin {
    pub(super) async fn weights(
        &self,
        route: &str,
        caller: &Caller,
        request: Request<Incoming>,
    ) -> Reply {
        if !matches!(*request.method(), Method::PUT | Method::DELETE) {
            return self.show_weights(StatusCode::OK, route);
        }
        let by = match self.authorized(caller, request.headers()) {
            Ok(by) => by,
            Err(denial) => return denial.reply(),
        };
        let expected = expected(request.headers());
        let (weights, reason) = match *request.method() {
            Method::DELETE => (None, None),
            _ => match read(request, WeightsOrderView::sound).await {
                Ok(order) => (Some(order.weights), order.reason),
                Err(unusable) => return unusable.reply(),
            },
        };
        self.set_weights(WeightsOrder {
            route: route.to_owned(),
            weights,
            expected,
            by,
            address: caller.address,
            reason,
        })
        .await
    }

    async fn set_weights(&self, order: WeightsOrder) -> Reply {
        let route = order.route.clone();
        let (reply, set) = oneshot::channel();
        if self
            .changes
            .send(Change::Weights { order, reply })
            .await
            .is_err()
        {
            return shutting_down();
        }
        match set.await {
            Ok(Ok(())) => self.show_weights(StatusCode::OK, &route),
            Ok(Err(Refusal::UnknownRoute)) => unknown(&route),
            Ok(Err(Refusal::Changed)) => self.show_weights(StatusCode::PRECONDITION_FAILED, &route),
            Ok(Err(Refusal::Unusable(reason))) => {
                json(StatusCode::UNPROCESSABLE_ENTITY, &Failure::new(reason))
            }
            Err(_) => shutting_down(),
        }
    }

    fn show_weights(&self, code: StatusCode, route: &str) -> Reply {
        let status = self.board.load();
        let Some(over) = configured(&status.loaded.config, route) else {
            return unknown(route);
        };
        let tag = Tag::of(&over, status.weights.of(route));
        let mut reply = json(code, &WeightsView::new(&status, route, &over, tag));
        if let Ok(tag) = HeaderValue::from_str(&format!("\"{tag}\"")) {
            reply.headers_mut().insert(ETAG, tag);
        }
        reply
    }

    /// The name of whoever may change something.
    fn authorized(&self, caller: &Caller, headers: &HeaderMap) -> Result<String, Denial> {
        let snapshot = self.live.load();
        let admin = &snapshot.admin;
        let writers = &admin.writers;
        if writers.is_empty() {
            return Err(Denial::Everybody);
        }
        // Those who signed it may be believed no longer.
        let policy = admin.tls.as_ref().and_then(|tls| tls.policy);
        let is_believed = caller.policy == policy;
        let shown = Shown {
            token: token(headers),
            subject: caller.subject.as_deref().filter(|_| is_believed),
        };
        if let Some(writer) = who(writers, shown) {
            return Ok(writer.name.to_string());
        }
        let Caller {
            address, subject, ..
        } = caller;
        warn!(target: AUDIT, %address, ?subject, "somebody who may not has asked for other weights");
        Err(Denial::Stranger)
    }
}

// === impl Denial ===

impl Denial {
    fn reply(self) -> Reply {
        match self {
            Self::Everybody => {
                let message =
                    "nobody may change weights: the configuration names nobody in `admin.writers`";
                json(StatusCode::FORBIDDEN, &Failure::new(message))
            }
            Self::Stranger => {
                let message = "show the token or the certificate of one of `admin.writers`";
                let mut reply = json(StatusCode::UNAUTHORIZED, &Failure::new(message));
                let challenge = HeaderValue::from_static("Bearer realm=\"serin\"");
                reply.headers_mut().insert(WWW_AUTHENTICATE, challenge);
                reply
            }
        }
    }
}

/// The one token that a request shows.
fn token(headers: &HeaderMap) -> Option<Token> {
    let mut fields = headers.get_all(AUTHORIZATION).iter();
    let field = fields.next()?;
    match fields.next() {
        None => Token::of_field(field.as_bytes()),
        Some(_) => None,
    }
}

/// What must be in force for a change (RFC 9110 section 13.1.1); `None` for whatever is.
fn expected(headers: &HeaderMap) -> Option<Vec<String>> {
    let mut fields = headers.get_all(IF_MATCH).iter().peekable();
    fields.peek()?;
    let parts = fields.flat_map(|field| field.as_bytes().split(|byte| *byte == b','));
    let parts: Vec<&[u8]> = parts.map(<[u8]>::trim_ascii).collect();
    if parts.contains(&&b"*"[..]) {
        return None;
    }
    let tags = parts.into_iter().filter_map(|part| {
        let tag = part.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
        Some(std::str::from_utf8(tag).ok()?.to_owned())
    });
    Some(tags.collect())
}

fn unknown(route: &str) -> Reply {
    let failure = Failure::new(format!("there is no route `{route}`"));
    json(StatusCode::NOT_FOUND, &failure)
}
