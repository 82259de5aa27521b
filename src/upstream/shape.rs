//! The shape that a request has in the version of HTTP that a connection speaks, which is known only
//! when there is one.
//!
//! Requests come with an origin-form target and a `Host` field, and leave so in HTTP/1.1. What is
//! done for one version is undone for the other, since a request that a connection would not take
//! goes to another one.

use http::header::{
    CONNECTION, HOST, HeaderValue, SEC_WEBSOCKET_KEY, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{Authority, Parts, PathAndQuery, Scheme};
use http::{Method, Request, Uri, Version};
use hyper::body::Body;
use hyper::ext::Protocol;

use super::Needs;

/// HTTP/1.1 (RFC 9112 section 3.2).
pub(super) fn http1<B: Body>(request: &mut Request<B>) {
    if request.uri().authority().is_some() {
        let authority = request.uri().authority().map(Authority::as_str);
        let host = authority.and_then(|authority| HeaderValue::from_str(authority).ok());
        if let Some(host) = host {
            request.headers_mut().insert(HOST, host);
        }
        request.headers_mut().remove(TE);
        *request.uri_mut() = Uri::from(target(request.uri()));
    }
    *request.version_mut() = Version::HTTP_11;
    // hyper's client would take a GET without a length for one without a body, and drop it.
    let body = request.body();
    if !body.is_end_stream() && body.size_hint().exact().is_none() {
        let chunked = HeaderValue::from_static("chunked");
        request.headers_mut().insert(TRANSFER_ENCODING, chunked);
    }
}

/// HTTP/2 (RFC 9113 section 8.3.1). A host that there is not, or that HTTP/2 cannot express, is
/// replaced by that of the endpoint.
pub(super) fn http2<B>(request: &mut Request<B>, endpoint: &str, is_encrypted: bool, needs: Needs) {
    if needs.tunnel {
        extended_connect(request);
    }
    let headers = request.headers_mut();
    headers.remove(TRANSFER_ENCODING);
    let host = headers.remove(HOST);
    let authority = host
        .and_then(|host| Authority::try_from(host.as_bytes()).ok())
        .or_else(|| endpoint.parse().ok());
    if needs.trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    let scheme = if is_encrypted {
        Scheme::HTTPS
    } else {
        Scheme::HTTP
    };
    let mut parts = Parts::default();
    parts.scheme = Some(scheme);
    parts.authority = request.uri().authority().cloned().or(authority);
    parts.path_and_query = Some(target(request.uri()));
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
    *request.version_mut() = Version::HTTP_2;
}

/// Asks for a WebSocket as HTTP/2 does (RFC 8441 section 4).
fn extended_connect<B>(request: &mut Request<B>) {
    *request.method_mut() = Method::CONNECT;
    let websocket = Protocol::from_static("websocket");
    request.extensions_mut().insert(websocket);
    for name in [CONNECTION, UPGRADE, SEC_WEBSOCKET_KEY] {
        request.headers_mut().remove(name);
    }
}

fn target(uri: &Uri) -> PathAndQuery {
    let target = uri.path_and_query().cloned();
    target.unwrap_or_else(|| PathAndQuery::from_static("/"))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::Empty;
    use http_body_util::channel::Channel;

    use super::*;

    fn request<B>(body: B) -> Request<B> {
        let request = Request::get("/path?query").header(HOST, "shop.example.com:8080");
        request.body(body).unwrap()
    }

    #[test]
    fn what_is_done_for_one_version_is_undone_for_the_other() {
        let mut request = request(Empty::<Bytes>::new());
        for _ in 0..2 {
            let needs = Needs {
                trailers: true,
                tunnel: false,
                fresh: false,
            };
            http2(&mut request, "127.0.0.1:1", true, needs);
            assert_eq!(request.uri(), "https://shop.example.com:8080/path?query");
            assert_eq!(request.headers().len(), 1);
            assert_eq!(request.headers()[TE], "trailers");
            http1(&mut request);
            assert_eq!(request.uri(), "/path?query");
            assert_eq!(request.headers().len(), 1);
            assert_eq!(request.headers()[HOST], "shop.example.com:8080");
        }
    }

    #[test]
    fn a_body_of_unknown_length_is_chunked_in_http_1_alone() {
        let (_sender, body) = Channel::<Bytes>::new(1);
        let mut request = request(body);
        http1(&mut request);
        assert_eq!(request.headers()[TRANSFER_ENCODING], "chunked");
        http2(&mut request, "127.0.0.1:1", false, Needs::default());
        assert!(!request.headers().contains_key(TRANSFER_ENCODING));
        assert_eq!(request.uri().scheme(), Some(&Scheme::HTTP));
    }

    #[test]
    fn a_host_that_there_is_not_is_that_of_the_endpoint() {
        let mut request = Request::get("/").body(Empty::<Bytes>::new()).unwrap();
        http2(&mut request, "127.0.0.1:9001", false, Needs::default());
        assert_eq!(request.uri(), "http://127.0.0.1:9001/");
    }
}
