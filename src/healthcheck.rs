//! `serin healthcheck`: asks a process on this machine whether it is ready, as an image without a shell has to.
//!
//! It reads no configuration on purpose: a file that is being edited, or has a problem, says nothing of the
//! process that serves with the one before.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use rustls::pki_types::ServerName;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::discovery;
use crate::stream::Stream;
use crate::tls::client::{ClientTls, Trust};
use crate::url::Url;

/// The most bytes of an answer that are shown.
const LARGEST_ANSWER: usize = 4096;

/// Asks, and waits no longer than `limit`.
///
/// # Errors
///
/// Why the process is not healthy, in words.
pub fn ask(url: &Url, limit: Duration) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let asked = runtime.block_on(async { timeout(limit, answer(url)).await });
    let (status, said) = asked
        .map_err(|_| format!("no answer within {limit:?}"))?
        .map_err(|error| error.to_string())?;
    match status.is_success() {
        true => Ok(()),
        false => Err(format!("{status}: {}", said.trim())),
    }
}

async fn answer(url: &Url) -> io::Result<(StatusCode, String)> {
    let stream = connect(url).await?;
    let (mut sender, connection) = http1::handshake(stream).await.map_err(io::Error::other)?;
    let connection = tokio::spawn(connection);
    let request = Request::get(Uri::from(url.path.clone()))
        .header(HOST, &url.authority)
        .body(Empty::<Bytes>::new())
        .map_err(io::Error::other)?;
    let response = sender
        .send_request(request)
        .await
        .map_err(io::Error::other)?;
    let (head, body) = response.into_parts();
    let body = Limited::new(body, LARGEST_ANSWER).collect().await;
    connection.abort();
    let said = body.map_err(io::Error::other)?.to_bytes();
    Ok((head.status, String::from_utf8_lossy(&said).into_owned()))
}

/// Whoever answers is believed: who could sit between a process and itself has no need to.
async fn connect(url: &Url) -> io::Result<Stream> {
    let stream = url.connect(&discovery::Settings::default()).await?;
    if !url.is_encrypted {
        return Ok(Stream::plain(stream));
    }
    let tls = ClientTls::new(Trust::Anybody, None, None, &[]).map_err(io::Error::other)?;
    let name = ServerName::try_from(url.host.clone()).map_err(io::Error::other)?;
    let connector = TlsConnector::from(Arc::clone(tls.config(true)));
    Ok(Stream::tls(connector.connect(name, stream).await?))
}
