//! Request smuggling: whatever a client sends, its upstream sees one request for each request that was meant, and
//! nobody could take its bytes for anything else.
//!
//! The upstream of these tests is stricter than any server: what it records has been framed in the one way in
//! which everybody agrees, and anything else fails the test with its bytes.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::frames::{
    DATA, END_HEADERS, END_STREAM, End, Frames, HEADERS, field, frame, get, literal,
};
use crate::support::{Client, Proxy, Raw, eventually, single};

/// What an attacker would like to be a request of its own, and what becomes of it in a body.
const SMUGGLED: &str = "GET /admin HTTP/1.1\r\nhost: a\r\n\r\n";

/// Comes behind every row: if it is answered, the proxy has gone on with the connection, and if it is not seen
/// as it is here, it has been poisoned.
const LAST: &str = "GET /last HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
const LAST_SEEN: &str = "GET /last []";

/// What the proxy reads at first: a row that fits is read at once, so that no answer is lost by a reset.
const FIRST_READ: usize = 1024;

const WHOLE: u8 = END_HEADERS | END_STREAM;

/// A name, what is sent, the statuses that the client gets, and the requests that the upstream sees.
type Row<'a> = (&'a str, String, &'a [u16], &'a [&'a str]);

/// An upstream that records the requests of all its connections, and answers each with `ok`.
struct Recorder {
    address: SocketAddr,
    record: Arc<Record>,
}

#[derive(Default)]
struct Record {
    seen: Mutex<Vec<String>>,
    heads: Mutex<Vec<String>>,
    open: AtomicUsize,
}

/// A request as it came, and how many bytes it took.
struct Seen {
    head: String,
    summary: String,
    length: usize,
}

/// What the bytes of a connection begin with.
enum Beginning {
    Whole(Seen),
    /// A part of a request; its head, once that is whole.
    Part(Option<String>),
    /// What no server may be sent, and why.
    Ambiguous(String),
}

// === impl Recorder ===

impl Recorder {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let record = Arc::new(Record::default());
        let kept = Arc::clone(&record);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                kept.open.fetch_add(1, Ordering::SeqCst);
                let record = Arc::clone(&kept);
                tokio::spawn(async move {
                    record.read(stream).await;
                    record.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { address, record }
    }

    /// The requests that have come since this was asked last.
    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut *self.record.seen.lock().unwrap())
    }

    /// The heads of all requests, and of parts of some.
    fn heads(&self) -> Vec<String> {
        self.record.heads.lock().unwrap().clone()
    }

    /// Ends the proxy: nothing comes any more, and nothing has come that nobody asked for.
    async fn is_done_with(&self, proxy: Proxy) {
        proxy.shut_down().await;
        let open = || self.record.open.load(Ordering::SeqCst);
        eventually("every connection has ended", || open() == 0).await;
        assert_eq!(self.seen(), Vec::<String>::new());
    }
}

impl Record {
    async fn read(&self, mut stream: TcpStream) {
        let mut bytes = Vec::new();
        let mut is_answered = false;
        loop {
            match beginning(&bytes) {
                Beginning::Whole(seen) => {
                    bytes.drain(..seen.length);
                    let is_early = seen.summary.contains("/early ");
                    self.heads.lock().unwrap().push(seen.head);
                    self.seen.lock().unwrap().push(seen.summary);
                    if !is_early {
                        answer(&mut stream).await;
                    }
                    is_answered = false;
                    continue;
                }
                Beginning::Part(head) => {
                    if let Some(head) = head
                        && head.contains("/early ")
                        && !is_answered
                    {
                        is_answered = true;
                        answer(&mut stream).await;
                    }
                }
                Beginning::Ambiguous(why) => return self.found(&why, &bytes),
            }
            let mut chunk = [0; 4096];
            match stream.read(&mut chunk).await {
                Ok(count @ 1..) => bytes.extend_from_slice(&chunk[..count]),
                Ok(0) | Err(_) => break,
            }
        }
        // A body may break off, but what it belongs to goes no further; a head comes whole.
        match beginning(&bytes) {
            Beginning::Part(Some(head)) => self.heads.lock().unwrap().push(head),
            _ if bytes.is_empty() => {}
            _ => self.found("half a head", &bytes),
        }
    }

    fn found(&self, why: &str, bytes: &[u8]) {
        let bytes = String::from_utf8_lossy(bytes);
        self.seen.lock().unwrap().push(format!("{why}: {bytes:?}"));
    }
}

async fn answer(stream: &mut TcpStream) {
    // The proxy may have gone.
    let _ = stream
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        .await;
}

// === what the upstream reads ===

/// Reads a request in the one way in which nobody could read it otherwise.
fn beginning(bytes: &[u8]) -> Beginning {
    match read(bytes) {
        Ok(beginning) => beginning,
        Err(why) => Beginning::Ambiguous(why),
    }
}

fn read(bytes: &[u8]) -> Result<Beginning, String> {
    let Some(head_length) = find(bytes, b"\r\n\r\n") else {
        return Ok(Beginning::Part(None));
    };
    let head = text(&bytes[..head_length])?;
    let body = &bytes[head_length + 4..];
    let mut lines = head.split("\r\n");
    let line = lines.next().unwrap_or_default();
    let [method, target, "HTTP/1.1"] = line.split(' ').collect::<Vec<_>>()[..] else {
        return Err("a request line of other than three parts".to_owned());
    };
    let fields = lines.map(field_of).collect::<Result<Vec<_>, _>>()?;
    let values = |name: &str| -> Vec<&str> {
        let named = fields.iter().filter(|(other, _)| other == name);
        named.map(|(_, value)| value.as_str()).collect()
    };
    for name in [
        "connection",
        "expect",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "te",
        "upgrade",
    ] {
        if !values(name).is_empty() {
            return Err(format!("{name} of another connection"));
        }
    }
    if values("host").len() != 1 {
        return Err("not one host".to_owned());
    }
    let framed = match (
        &values("content-length")[..],
        &values("transfer-encoding")[..],
    ) {
        ([], []) => Some((String::new(), String::new(), 0)),
        ([length], []) => {
            let digits = length.bytes().all(|byte| byte.is_ascii_digit());
            let length: usize = length.parse().map_err(|_| "no length")?;
            if !digits {
                return Err("a length of other than digits".to_owned());
            }
            body.get(..length).map(|body| {
                (
                    String::from_utf8_lossy(body).into_owned(),
                    String::new(),
                    length,
                )
            })
        }
        ([], ["chunked"]) => chunks(body)?,
        _ => return Err("a body of two lengths".to_owned()),
    };
    let Some((content, trailers, length)) = framed else {
        return Ok(Beginning::Part(Some(head.to_owned())));
    };
    let summary = format!("{method} {target} [{content}]{trailers}");
    Ok(Beginning::Whole(Seen {
        head: head.to_owned(),
        summary: summary.replace("\r\n", "|"),
        length: head_length + 4 + length,
    }))
}

/// The content of chunks and their trailers, with the length of both; `None` while they are not whole.
fn chunks(bytes: &[u8]) -> Result<Option<(String, String, usize)>, String> {
    let (mut content, mut at) = (String::new(), 0);
    loop {
        let Some(line) = find(&bytes[at..], b"\r\n") else {
            return Ok(None);
        };
        let size = text(&bytes[at..at + line])?;
        if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(format!("a chunk of {size:?}"));
        }
        let size = usize::from_str_radix(size, 16).map_err(|error| error.to_string())?;
        at += line + 2;
        if size == 0 {
            break;
        }
        let Some(chunk) = bytes.get(at..at + size + 2) else {
            return Ok(None);
        };
        let Some(chunk) = chunk.strip_suffix(b"\r\n") else {
            return Err("a chunk without an end".to_owned());
        };
        content += &String::from_utf8_lossy(chunk);
        at += size + 2;
    }
    if bytes[at..].starts_with(b"\r\n") {
        return Ok(Some((content, String::new(), at + 2)));
    }
    let Some(length) = find(&bytes[at..], b"\r\n\r\n") else {
        return Ok(None);
    };
    let mut trailers = String::new();
    for line in text(&bytes[at..at + length])?.split("\r\n") {
        let (name, value) = field_of(line)?;
        trailers += &format!(" {name}: {value}");
    }
    Ok(Some((content, trailers, at + length + 4)))
}

/// What lines consist of: without any line break but the two bytes that all agree on.
fn text(bytes: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let has_others = text
        .replace("\r\n", "")
        .contains(|character: char| character.is_control() && character != '\t');
    if has_others {
        return Err("a control character".to_owned());
    }
    Ok(text)
}

fn field_of(line: &str) -> Result<(String, String), String> {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^`|~".contains(&byte);
    match line.split_once(':') {
        Some((name, value)) if !name.is_empty() && name.bytes().all(is_token) => {
            Ok((name.to_ascii_lowercase(), value.trim().to_owned()))
        }
        _ => Err(format!("no field: {line:?}")),
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|found| found == what)
}

// === what the client sends ===

/// A POST to `/a` with these lines in its head, and what comes behind it.
fn post(fields: &str, rest: &str) -> String {
    format!("POST /a HTTP/1.1\r\nhost: a\r\n{fields}\r\n{rest}")
}

/// A POST in chunks.
fn chunked(rest: &str) -> String {
    post("transfer-encoding: chunked\r\n", rest)
}

/// The statuses of the responses in a row.
fn statuses(replies: &str) -> Vec<u16> {
    let heads = replies.match_indices("HTTP/1.");
    heads
        .map(|(at, version)| replies[at + version.len() + 2..][..3].parse().unwrap())
        .collect()
}

/// Sends each row and the last request on a connection of their own, and reads that to its end.
async fn check(rows: &[Row<'_>]) {
    let upstream = Recorder::start().await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    for (name, bytes, expected, seen) in rows {
        let bytes = bytes.to_owned() + LAST;
        assert!(bytes.len() < FIRST_READ, "{name}");
        let mut raw = Raw::connect(proxy.address()).await;
        raw.send(&bytes).await;
        let replies = raw.read_to_end().await;
        assert_eq!(statuses(&replies), *expected, "{name}: {replies}");
        assert_eq!(upstream.seen(), *seen, "{name}");
    }
    upstream.is_done_with(proxy).await;
}

const REFUSED: &[u16] = &[400];
const SERVED: &[u16] = &[200, 200];
/// It is answered, and nothing that comes behind it is.
const SERVED_ALONE: &[u16] = &[200];
const NOTHING: &[&str] = &[];
const HELLO: &[&str] = &["POST /a [hello]", LAST_SEEN];

/// Both lengths: that of the chunks holds, and since somebody in front of us may have believed the other one, the
/// connection ends with the answer (RFC 9112 section 6.1).
#[tokio::test]
async fn of_two_lengths_the_chunks_hold_and_the_connection_ends() {
    let rest = format!("0\r\n\r\n{SMUGGLED}");
    let both =
        |length: usize| format!("content-length: {length}\r\ntransfer-encoding: chunked\r\n");
    check(&[
        (
            "CL.TE",
            post(&both(rest.len()), &rest),
            SERVED_ALONE,
            &["POST /a []"],
        ),
        (
            "CL.TE the other way round",
            post(
                &format!(
                    "transfer-encoding: chunked\r\ncontent-length: {}\r\n",
                    rest.len()
                ),
                &rest,
            ),
            SERVED_ALONE,
            &["POST /a []"],
        ),
        (
            "TE.CL",
            post(
                &both(4),
                &format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len()),
            ),
            SERVED_ALONE,
            &["POST /a [GET /admin HTTP/1.1|host: a||]"],
        ),
        (
            "a length that is none",
            post(
                "transfer-encoding: chunked\r\ncontent-length: x\r\n",
                "0\r\n\r\n",
            ),
            SERVED_ALONE,
            &["POST /a []"],
        ),
        (
            "a length that is none before the chunks",
            post(
                "content-length: x\r\ntransfer-encoding: chunked\r\n",
                "0\r\n\r\n",
            ),
            REFUSED,
            NOTHING,
        ),
    ])
    .await;
}

/// A coding that one server takes for `chunked` and another does not.
#[tokio::test]
async fn transfer_encodings_that_are_read_in_two_ways_are_refused() {
    let coded = |field: &str| post(&format!("{field}\r\n"), "5\r\nhello\r\n0\r\n\r\n");
    check(&[
        ("plain", coded("Transfer-Encoding: chunked"), SERVED, HELLO),
        (
            "in capitals",
            coded("TRANSFER-ENCODING: CHUNKED"),
            SERVED,
            HELLO,
        ),
        // White space around a value means nothing (RFC 9110 section 5.5).
        (
            "spaces before",
            coded("Transfer-Encoding:   chunked"),
            SERVED,
            HELLO,
        ),
        (
            "tab before",
            coded("Transfer-Encoding:\tchunked"),
            SERVED,
            HELLO,
        ),
        (
            "white space behind",
            coded("Transfer-Encoding: chunked \t"),
            SERVED,
            HELLO,
        ),
        (
            "xchunked",
            coded("Transfer-Encoding: xchunked"),
            REFUSED,
            NOTHING,
        ),
        (
            "chunkedx",
            coded("Transfer-Encoding: chunkedx"),
            REFUSED,
            NOTHING,
        ),
        (
            "in quotes",
            coded("Transfer-Encoding: \"chunked\""),
            REFUSED,
            NOTHING,
        ),
        (
            "with a parameter",
            coded("Transfer-Encoding: chunked;q=1"),
            REFUSED,
            NOTHING,
        ),
        ("empty", coded("Transfer-Encoding:"), REFUSED, NOTHING),
        (
            "identity",
            coded("Transfer-Encoding: identity"),
            REFUSED,
            NOTHING,
        ),
        (
            "not the last",
            coded("Transfer-Encoding: chunked, identity"),
            REFUSED,
            NOTHING,
        ),
        (
            "an empty last",
            coded("Transfer-Encoding: chunked,"),
            REFUSED,
            NOTHING,
        ),
        (
            "two fields, not the last",
            coded("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity"),
            REFUSED,
            NOTHING,
        ),
        (
            "vertical tab before",
            coded("Transfer-Encoding: \x0bchunked"),
            REFUSED,
            NOTHING,
        ),
        (
            "form feed behind",
            coded("Transfer-Encoding: chunked\x0c"),
            REFUSED,
            NOTHING,
        ),
        (
            "NUL before",
            coded("Transfer-Encoding: \0chunked"),
            REFUSED,
            NOTHING,
        ),
        (
            "space before the colon",
            coded("Transfer-Encoding : chunked"),
            REFUSED,
            NOTHING,
        ),
        (
            "tab before the colon",
            coded("Transfer-Encoding\t: chunked"),
            REFUSED,
            NOTHING,
        ),
        (
            "space before the name",
            coded(" Transfer-Encoding: chunked"),
            REFUSED,
            NOTHING,
        ),
        (
            "folded",
            coded("Transfer-Encoding:\r\n chunked"),
            REFUSED,
            NOTHING,
        ),
        (
            "behind a bare CR",
            coded("x: y\rTransfer-Encoding: chunked"),
            REFUSED,
            NOTHING,
        ),
    ])
    .await;
}

/// `chunked` is the last coding, so that the end is known; but nobody here undoes what is under it,
/// and the sender may have meant another end: what follows is not read.
#[tokio::test]
async fn codings_under_chunked_are_not_implemented() {
    let coded = |field: &str| post(&format!("{field}\r\n"), "5\r\nhello\r\n0\r\n\r\n");
    let refused = &[501][..];
    check(&[
        (
            "gzip",
            coded("Transfer-Encoding: gzip, chunked"),
            refused,
            NOTHING,
        ),
        (
            "identity",
            coded("Transfer-Encoding: identity, chunked"),
            refused,
            NOTHING,
        ),
        (
            "chunked twice",
            coded("Transfer-Encoding: chunked, chunked"),
            refused,
            NOTHING,
        ),
        (
            "nothing",
            coded("Transfer-Encoding: , chunked"),
            refused,
            NOTHING,
        ),
        (
            "two fields",
            coded("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"),
            refused,
            NOTHING,
        ),
        (
            "two fields of the same",
            coded("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
            refused,
            NOTHING,
        ),
    ])
    .await;
}

#[tokio::test]
async fn a_content_length_is_one_number_in_digits() {
    let long = |fields: &str| post(&format!("{fields}\r\n"), "hello");
    check(&[
        ("plain", long("content-length: 5"), SERVED, HELLO),
        // RFC 9110 section 8.6 allows to believe what all agree on.
        (
            "twice the same",
            long("content-length: 5\r\ncontent-length: 5"),
            SERVED,
            HELLO,
        ),
        ("zeros before", long("content-length: 005"), SERVED, HELLO),
        (
            "twice",
            long("content-length: 5\r\ncontent-length: 6"),
            REFUSED,
            NOTHING,
        ),
        (
            "none and five",
            long("content-length: 0\r\ncontent-length: 5"),
            REFUSED,
            NOTHING,
        ),
        (
            "a list of the same",
            long("content-length: 5, 5"),
            REFUSED,
            NOTHING,
        ),
        ("a list", long("content-length: 5, 6"), REFUSED, NOTHING),
        ("plus", long("content-length: +5"), REFUSED, NOTHING),
        ("negative", long("content-length: -5"), REFUSED, NOTHING),
        ("hexadecimal", long("content-length: 0x5"), REFUSED, NOTHING),
        ("a fraction", long("content-length: 5.0"), REFUSED, NOTHING),
        ("an exponent", long("content-length: 5e0"), REFUSED, NOTHING),
        (
            "a space within",
            long("content-length: 0 5"),
            REFUSED,
            NOTHING,
        ),
        (
            "an underscore",
            long("content-length: 0_5"),
            REFUSED,
            NOTHING,
        ),
        ("empty", long("content-length:"), REFUSED, NOTHING),
        (
            "a letter behind",
            long("content-length: 5x"),
            REFUSED,
            NOTHING,
        ),
        (
            "vertical tab",
            long("content-length: \x0b5"),
            REFUSED,
            NOTHING,
        ),
        ("NUL", long("content-length: 5\0"), REFUSED, NOTHING),
        (
            "space before the colon",
            long("content-length : 5"),
            REFUSED,
            NOTHING,
        ),
        (
            "other digits",
            long("content-length: \u{665}"),
            REFUSED,
            NOTHING,
        ),
        (
            "2^64",
            long("content-length: 18446744073709551616"),
            REFUSED,
            NOTHING,
        ),
        (
            "2^64 + 5",
            long("content-length: 18446744073709551621"),
            REFUSED,
            NOTHING,
        ),
        // More than hyper counts to.
        (
            "the largest",
            long("content-length: 18446744073709551615"),
            &[431],
            NOTHING,
        ),
        (
            "200 digits",
            long(&format!("content-length: {}", "9".repeat(200))),
            REFUSED,
            NOTHING,
        ),
    ])
    .await;
}

/// A name that some servers read as another one is not passed on, and frames nothing.
#[tokio::test]
async fn names_that_resemble_those_of_lengths_frame_nothing() {
    let alike = |field: &str| post(&format!("{field}\r\n"), "");
    check(&[
        (
            "content_length",
            alike("content_length: 500"),
            SERVED,
            &["POST /a []", LAST_SEEN],
        ),
        (
            "transfer_encoding",
            alike("transfer_encoding: chunked"),
            SERVED,
            &["POST /a []", LAST_SEEN],
        ),
    ])
    .await;
}

/// 0.CL and CL.0: a body is one also where many expect none.
#[tokio::test]
async fn a_body_where_none_is_expected_is_not_the_next_request() {
    let with_body = |method: &str| {
        let length = SMUGGLED.len();
        format!("{method} /a HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n{SMUGGLED}")
    };
    let in_chunks = format!(
        "GET /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n",
        SMUGGLED.len()
    );
    check(&[
        (
            "GET",
            with_body("GET"),
            SERVED,
            &["GET /a [GET /admin HTTP/1.1|host: a||]", LAST_SEEN],
        ),
        (
            "DELETE",
            with_body("DELETE"),
            SERVED,
            &["DELETE /a [GET /admin HTTP/1.1|host: a||]", LAST_SEEN],
        ),
        (
            "OPTIONS",
            with_body("OPTIONS"),
            SERVED,
            &["OPTIONS /a [GET /admin HTTP/1.1|host: a||]", LAST_SEEN],
        ),
        (
            "POST",
            with_body("POST"),
            SERVED,
            &["POST /a [GET /admin HTTP/1.1|host: a||]", LAST_SEEN],
        ),
        (
            "GET in chunks",
            in_chunks,
            SERVED,
            &["GET /a [GET /admin HTTP/1.1|host: a||]", LAST_SEEN],
        ),
        // Without a length there is no body: what follows is a request, and is judged as one.
        (
            "none",
            post("x-forwarded-for: 6.6.6.6\r\n", SMUGGLED),
            &[200, 200, 200],
            &["POST /a []", "GET /admin []", LAST_SEEN],
        ),
    ])
    .await;
}

/// CL.0 at the proxy: a request that it answers itself has a body all the same.
#[tokio::test]
async fn a_request_that_is_refused_takes_its_body_with_it() {
    let length = SMUGGLED.len();
    let long = format!("content-length: {length}\r\n\r\n{SMUGGLED}");
    let chunks = format!("transfer-encoding: chunked\r\n\r\n{length:x}\r\n{SMUGGLED}\r\n0\r\n\r\n");
    let half = format!("content-length: 5000\r\n\r\n{SMUGGLED}");
    check(&[
        (
            "no host",
            format!("POST /a HTTP/1.1\r\n{long}"),
            &[400, 200],
            &[LAST_SEEN],
        ),
        (
            "no host, in chunks",
            format!("POST /a HTTP/1.1\r\n{chunks}"),
            &[400, 200],
            &[LAST_SEEN],
        ),
        (
            "a method that is not for gateways",
            format!("TRACE /a HTTP/1.1\r\nhost: a\r\n{long}"),
            &[405, 200],
            &[LAST_SEEN],
        ),
        (
            "a tunnel that there is not",
            format!("CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n{long}"),
            &[405, 200],
            &[LAST_SEEN],
        ),
        // Nobody waits for the rest of it.
        (
            "a body that has not come",
            format!("POST /a HTTP/1.1\r\n{half}"),
            REFUSED,
            NOTHING,
        ),
    ])
    .await;
}

/// CL.0 at the upstream: it answers without having read the body, whose rest must not come to be the beginning of
/// somebody else's request.
#[tokio::test]
async fn a_connection_with_half_a_request_on_it_is_nobody_elses() {
    let upstream = Recorder::start().await;
    let proxy = Proxy::start(&("workers: 1\n".to_owned() + &single(upstream.address, "")));
    for fields in ["content-length: 1000", "transfer-encoding: chunked"] {
        let mut half = Raw::connect(proxy.address()).await;
        half.send(&format!(
            "POST /early HTTP/1.1\r\nhost: a\r\n{fields}\r\n\r\n5\r\nhello\r\n"
        ))
        .await;
        half.read_until("\r\n\r\nok").await;
        let mut other = Client::connect(proxy.address()).await;
        assert_eq!(other.get("/last", &[]).await.text(), "ok");
        assert_eq!(upstream.seen(), [LAST_SEEN], "{fields}");
        half.send(SMUGGLED).await;
        half.stream.shutdown().await.unwrap();
        half.read_to_end().await;
        assert_eq!(upstream.seen(), NOTHING, "{fields}");
    }
    upstream.is_done_with(proxy).await;
}

/// What belongs to chunks stays with us; the upstream gets chunks of our own.
#[tokio::test]
async fn chunk_extensions_are_dropped_and_frame_nothing() {
    check(&[
        (
            "a name",
            chunked("5;x\r\nhello\r\n0\r\n\r\n"),
            SERVED,
            HELLO,
        ),
        (
            "a value",
            chunked("5;x=y\r\nhello\r\n0;z\r\n\r\n"),
            SERVED,
            HELLO,
        ),
        (
            "in quotes",
            chunked("5;x=\";0\"\r\nhello\r\n0\r\n\r\n"),
            SERVED,
            HELLO,
        ),
        (
            "spaces",
            chunked("5 ; x\r\nhello\r\n0\r\n\r\n"),
            SERVED,
            HELLO,
        ),
        (
            "nothing",
            chunked("5;\r\nhello\r\n0\r\n\r\n"),
            SERVED,
            HELLO,
        ),
        // TERM.EXT: somebody who ends the line here sees a chunk of `xx`.
        (
            "bare LF",
            chunked("5;\nxx\r\nhello\r\n0\r\n\r\n"),
            REFUSED,
            NOTHING,
        ),
        (
            "bare CR",
            chunked("5;x\rhello\r\n0\r\n\r\n"),
            REFUSED,
            NOTHING,
        ),
        (
            "in the last chunk",
            chunked("5\r\nhello\r\n0;\n\r\n"),
            REFUSED,
            NOTHING,
        ),
    ])
    .await;
}

#[tokio::test]
async fn chunk_sizes_are_hexadecimal_digits() {
    let sized = |size: &str| chunked(&format!("{size}\r\nhello\r\n0\r\n\r\n"));
    check(&[
        ("zeros before", sized("0005"), SERVED, HELLO),
        // Bad white space, which RFC 9112 section 7.1.1 has recipients bear; it is not sent on.
        ("space behind", sized("5 "), SERVED, HELLO),
        ("tab behind", sized("5\t"), SERVED, HELLO),
        ("0x", sized("0x5"), REFUSED, NOTHING),
        ("plus", sized("+5"), REFUSED, NOTHING),
        ("negative", sized("-5"), REFUSED, NOTHING),
        ("space before", sized(" 5"), REFUSED, NOTHING),
        ("space within", sized("0 5"), REFUSED, NOTHING),
        ("underscore", sized("0_5"), REFUSED, NOTHING),
        ("no digit", sized("g"), REFUSED, NOTHING),
        ("empty", sized(""), REFUSED, NOTHING),
        ("NUL", sized("5\0"), REFUSED, NOTHING),
        ("vertical tab", sized("5\x0b"), REFUSED, NOTHING),
        ("2^64", sized("10000000000000000"), REFUSED, NOTHING),
        ("2^64 + 5", sized("10000000000000005"), REFUSED, NOTHING),
        (
            "bare LF",
            chunked("5\nhello\r\n0\r\n\r\n"),
            REFUSED,
            NOTHING,
        ),
        (
            "bare CR",
            chunked("5\rhello\r\n0\r\n\r\n"),
            REFUSED,
            NOTHING,
        ),
        (
            "CR twice",
            chunked("5\r\r\nhello\r\n0\r\n\r\n"),
            REFUSED,
            NOTHING,
        ),
    ])
    .await;
}

#[tokio::test]
async fn chunks_end_where_their_size_says() {
    check(&[
        (
            "nothing behind",
            chunked("5\r\nhello0\r\n\r\n"),
            REFUSED,
            NOTHING,
        ),
        (
            "bare LF behind",
            chunked("5\r\nhello\n0\r\n\r\n"),
            REFUSED,
            NOTHING,
        ),
        (
            "bare CR behind",
            chunked("5\r\nhello\r0\r\n\r\n"),
            REFUSED,
            NOTHING,
        ),
        (
            "too short",
            chunked("6\r\nhello\r\n0\r\n\r\n"),
            REFUSED,
            NOTHING,
        ),
        (
            "too long",
            chunked("4\r\nhello\r\n0\r\n\r\n"),
            REFUSED,
            NOTHING,
        ),
        (
            "bare CR after the last",
            chunked("5\r\nhello\r\n0\r\n\rx"),
            REFUSED,
            NOTHING,
        ),
        (
            "bare LF in the last line",
            chunked("5\r\nhello\r\n0\n\r\n"),
            REFUSED,
            NOTHING,
        ),
    ])
    .await;
}

#[tokio::test]
async fn trailers_are_fields_and_frame_nothing() {
    let trailed = |trailers: &str| {
        post(
            "transfer-encoding: chunked\r\nte: trailers\r\nconnection: te\r\ntrailer: x-sum, host, content-length, transfer-encoding\r\n",
            &format!("5\r\nhello\r\n0\r\n{trailers}\r\n"),
        )
    };
    check(&[
        (
            "one",
            trailed("x-sum: 1\r\n"),
            SERVED,
            &["POST /a [hello] x-sum: 1", LAST_SEEN],
        ),
        (
            "content-length",
            trailed("content-length: 500\r\n"),
            SERVED,
            HELLO,
        ),
        (
            "transfer-encoding",
            trailed("transfer-encoding: chunked\r\n"),
            SERVED,
            HELLO,
        ),
        ("host", trailed("host: b\r\n"), SERVED, HELLO),
        (
            "a request",
            trailed("GET /admin HTTP/1.1\r\nhost: a\r\n"),
            REFUSED,
            NOTHING,
        ),
        ("no field", trailed("nonsense\r\n"), REFUSED, NOTHING),
        ("folded", trailed("x-sum: 1\r\n 2\r\n"), REFUSED, NOTHING),
        (
            "space before the colon",
            trailed("x-sum : 1\r\n"),
            REFUSED,
            NOTHING,
        ),
        ("NUL", trailed("x-sum: \0\r\n"), REFUSED, NOTHING),
        ("bare CR", trailed("x-sum: 1\rx: y\r\n"), REFUSED, NOTHING),
        (
            // hyper reads on to CR LF CR LF, and what of it is no field is lost.
            "a request behind bare LFs",
            trailed("x-sum: 1\n\nGET /admin HTTP/1.1\nhost: a\r\n"),
            SERVED,
            &["POST /a [hello] x-sum: 1", LAST_SEEN],
        ),
    ])
    .await;
}

/// What ends a line for one and not for another. A bare LF may end one (RFC 9112 section 2.2), as long as only we
/// see it.
#[tokio::test]
async fn lines_of_a_head_end_in_one_way() {
    let get = |fields: &str| format!("GET /a HTTP/1.1\r\nhost: a\r\n{fields}\r\n\r\n");
    let got = &["GET /a []", LAST_SEEN];
    check(&[
        ("bare LF in the head", get("x: y\nz: a"), SERVED, got),
        (
            "bare LF everywhere",
            "GET /a HTTP/1.1\nhost: a\n\n".to_owned(),
            SERVED,
            got,
        ),
        (
            "empty lines before",
            "\r\n\r\n".to_owned() + &get("x: y"),
            SERVED,
            got,
        ),
        (
            "bare LF ends the head, as somebody in front may not believe",
            post("content-length: 5\n", "hello"),
            SERVED,
            HELLO,
        ),
        ("bare CR in a value", get("x: y\rz: a"), REFUSED, NOTHING),
        (
            "bare CR at the end of a value",
            get("x: y\r\r"),
            REFUSED,
            NOTHING,
        ),
        ("bare CR in a name", get("x\ry: z"), REFUSED, NOTHING),
        (
            "bare CR in the request line",
            "GET /a\rHTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
            REFUSED,
            NOTHING,
        ),
        ("NUL in a value", get("x: y\0z"), REFUSED, NOTHING),
        ("NUL in a name", get("x\0: y"), REFUSED, NOTHING),
        (
            "NUL in the target",
            "GET /a\0b HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
            REFUSED,
            NOTHING,
        ),
        ("folded by a space", get("x: y\r\n z"), REFUSED, NOTHING),
        ("folded by a tab", get("x: y\r\n\tz: a"), REFUSED, NOTHING),
        (
            "folded before the first field",
            "GET /a HTTP/1.1\r\n host: a\r\nhost: a\r\n\r\n".to_owned(),
            REFUSED,
            NOTHING,
        ),
        ("space before the colon", get("x : y"), REFUSED, NOTHING),
        ("no colon", get("x"), REFUSED, NOTHING),
        ("no name", get(": y"), REFUSED, NOTHING),
        ("space in a name", get("x y: z"), REFUSED, NOTHING),
        (
            "two spaces",
            "GET  /a HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
            REFUSED,
            NOTHING,
        ),
        (
            "a fourth part",
            "GET /a HTTP/1.1 HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
            REFUSED,
            NOTHING,
        ),
        (
            "space in the target",
            "GET /a b HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
            REFUSED,
            NOTHING,
        ),
        (
            "another version",
            "GET /a HTTP/1.2\r\nhost: a\r\n\r\n".to_owned(),
            REFUSED,
            NOTHING,
        ),
        (
            "no version",
            "GET /a\r\nhost: a\r\n\r\n".to_owned(),
            REFUSED,
            NOTHING,
        ),
    ])
    .await;
}

/// An expectation is ours to meet, and changes nothing about lengths.
#[tokio::test]
async fn what_is_expected_is_not_passed_on() {
    let length = SMUGGLED.len();
    let expecting = |value: &str| {
        post(
            &format!("expect: {value}\r\ncontent-length: {length}\r\n"),
            SMUGGLED,
        )
    };
    let seen = &["POST /a [GET /admin HTTP/1.1|host: a||]", LAST_SEEN];
    check(&[
        (
            "100-continue",
            expecting("100-continue"),
            &[100, 200, 200],
            seen,
        ),
        ("obfuscated", expecting("y 100-continue"), SERVED, seen),
        ("unknown", expecting("x"), SERVED, seen),
        (
            "without a body",
            "GET /a HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\n\r\n".to_owned(),
            SERVED,
            &["GET /a []", LAST_SEEN],
        ),
        (
            "in chunks",
            post(
                "expect: 100-continue\r\ntransfer-encoding: chunked\r\n",
                "5\r\nhello\r\n0\r\n\r\n",
            ),
            &[100, 200, 200],
            HELLO,
        ),
    ])
    .await;
}

#[tokio::test]
async fn http_1_0_has_no_chunks() {
    let old =
        |fields: &str, rest: &str| format!("POST /a HTTP/1.0\r\nhost: a\r\n{fields}\r\n{rest}");
    let chunks = "5\r\nhello\r\n0\r\n\r\n";
    check(&[
        (
            "chunks",
            old("transfer-encoding: chunked\r\n", chunks),
            REFUSED,
            NOTHING,
        ),
        (
            "chunks, and a length",
            old(
                "content-length: 5\r\ntransfer-encoding: chunked\r\n",
                chunks,
            ),
            REFUSED,
            NOTHING,
        ),
        (
            "chunks, kept alive",
            old(
                "connection: keep-alive\r\ntransfer-encoding: chunked\r\n",
                chunks,
            ),
            REFUSED,
            NOTHING,
        ),
        (
            "a length",
            old("content-length: 5\r\n", "hello"),
            SERVED_ALONE,
            &["POST /a [hello]"],
        ),
        (
            "a length, kept alive",
            old("connection: keep-alive\r\ncontent-length: 5\r\n", "hello"),
            SERVED,
            HELLO,
        ),
        (
            "nothing, and more",
            old("", SMUGGLED),
            SERVED_ALONE,
            &["POST /a []"],
        ),
    ])
    .await;
}

/// Nobody may nominate away what says how long a request is, or what it is for.
#[tokio::test]
async fn connection_nominates_no_length_away() {
    let length = SMUGGLED.len();
    let nominating = |names: &str| {
        post(
            &format!("connection: {names}\r\ncontent-length: {length}\r\n"),
            SMUGGLED,
        )
    };
    let seen = &["POST /a [GET /admin HTTP/1.1|host: a||]", LAST_SEEN];
    check(&[
        ("content-length", nominating("content-length"), SERVED, seen),
        ("in capitals among others", nominating("x, Content-Length ,y"), SERVED, seen),
        ("host", nominating("host"), SERVED, seen),
        (
            "transfer-encoding",
            post(
                "connection: transfer-encoding\r\ntransfer-encoding: chunked\r\n",
                "5\r\nhello\r\n0\r\n\r\n",
            ),
            SERVED,
            HELLO,
        ),
        (
            "both",
            post(
                "connection: content-length\r\nconnection: transfer-encoding\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n",
                "5\r\nhello\r\n0\r\n\r\n",
            ),
            SERVED_ALONE,
            &["POST /a [hello]"],
        ),
    ])
    .await;
}

/// An upgrade to HTTP/2 that only the upstream would take part in opens a way past every rule.
#[tokio::test]
async fn an_upgrade_to_http_2_is_not_passed_on() {
    let settings = "http2-settings: AAMAAABkAAQAAP__\r\n";
    let upgrade = format!("connection: upgrade, http2-settings\r\nupgrade: h2c\r\n{settings}");
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let got = &["GET /a []", LAST_SEEN];
    let get = |fields: &str| format!("GET /a HTTP/1.1\r\nhost: a\r\n{fields}\r\n");
    check(&[
        ("asked for", get(&upgrade), SERVED, got),
        (
            "asked for without Connection",
            get(&format!("upgrade: h2c\r\n{settings}")),
            SERVED,
            got,
        ),
        (
            "asked for among others",
            get(&format!(
                "connection: upgrade\r\nupgrade: websocket, h2c\r\n{settings}"
            )),
            SERVED,
            got,
        ),
        (
            "asked for with a body",
            post(&format!("{upgrade}content-length: 5\r\n"), "hello"),
            SERVED,
            HELLO,
        ),
        (
            "taken for granted",
            get(&upgrade) + preface,
            SERVED_ALONE,
            &["GET /a []"],
        ),
        (
            "begun after a request",
            get("") + preface,
            SERVED_ALONE,
            &["GET /a []"],
        ),
    ])
    .await;
}

/// The bytes that a refused body has brought so far reach the upstream as a part of a request, whose connection
/// ends with it.
#[tokio::test]
async fn what_breaks_off_is_cut_off() {
    let upstream = Recorder::start().await;
    let proxy = Proxy::start(&("workers: 1\n".to_owned() + &single(upstream.address, "")));
    let mut raw = Raw::connect(proxy.address()).await;
    raw.send(&chunked("5\r\nhello\r\n")).await;
    let open = || upstream.record.open.load(Ordering::SeqCst);
    eventually("the upstream has the beginning", || open() == 1).await;
    raw.send("0x0\r\n\r\n").await;
    assert_eq!(statuses(&raw.read_to_end().await), REFUSED);
    drop(raw);
    eventually("its connection has ended", || open() == 0).await;
    let heads = upstream.heads();
    assert_eq!(heads.len(), 1, "{heads:?}");
    assert!(heads[0].starts_with("POST /a HTTP/1.1\r\n"), "{heads:?}");
    upstream.is_done_with(proxy).await;
}

/// A request line and fields in HTTP/2: what follows the pseudo-headers is for the row.
fn head(method: &str, path: &str, authority: &str, fields: &[Vec<u8>]) -> Vec<u8> {
    let pseudo = [
        literal(2, method),
        vec![0x86],
        literal(4, path),
        literal(1, authority),
    ];
    [pseudo.concat(), fields.concat()].concat()
}

/// What HTTP/2 frames by itself becomes one request of HTTP/1.1, or none.
#[tokio::test]
async fn nothing_of_http_2_becomes_framing_in_http_1() {
    let upstream = Recorder::start().await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let whole = |block: Vec<u8>| frame(HEADERS, WHOLE, 1, &block);
    let with_body = |fields: &[Vec<u8>], body: &str| {
        let block = head("POST", "/a", "a", fields);
        [
            frame(HEADERS, END_HEADERS, 1, &block),
            frame(DATA, END_STREAM, 1, body.as_bytes()),
        ]
        .concat()
    };
    let with = |name: &str, value: &str| whole(head("GET", "/a", "a", &[field(name, value)]));
    let trailed = |name: &str, value: &str| {
        let block = head(
            "POST",
            "/a",
            "a",
            &[field("te", "trailers"), field("trailer", name)],
        );
        [
            frame(HEADERS, END_HEADERS, 1, &block),
            frame(DATA, 0, 1, b"hello"),
            frame(HEADERS, WHOLE, 1, &field(name, value)),
        ]
        .concat()
    };
    let admin = format!("x\r\n\r\n{SMUGGLED}");
    let rows: &[(&str, Vec<u8>, &[&str])] = &[
        (
            "a body",
            with_body(&[], SMUGGLED),
            &["POST /a [GET /admin HTTP/1.1|host: a||]"],
        ),
        (
            "a body and its length",
            with_body(&[field("content-length", "5")], "hello"),
            &["POST /a [hello]"],
        ),
        (
            "no body",
            whole(head("POST", "/a", "a", &[])),
            &["POST /a []"],
        ),
        (
            "H2.CL: a smaller length",
            with_body(&[field("content-length", "0")], "hello"),
            &[],
        ),
        (
            "H2.CL: a larger length",
            with_body(&[field("content-length", "50")], "hello"),
            &[],
        ),
        ("a length without a body", with("content-length", "5"), &[]),
        (
            "two lengths",
            with_body(
                &[field("content-length", "5"), field("content-length", "0")],
                "hello",
            ),
            &[],
        ),
        (
            "a list of lengths",
            with_body(&[field("content-length", "5, 5")], "hello"),
            &[],
        ),
        (
            "a signed length",
            with_body(&[field("content-length", "+5")], "hello"),
            &[],
        ),
        (
            "a padded length",
            with_body(&[field("content-length", " 5")], "hello"),
            &[],
        ),
        (
            "H2.TE",
            with_body(
                &[field("transfer-encoding", "chunked")],
                &format!("0\r\n\r\n{SMUGGLED}"),
            ),
            &[],
        ),
        ("connection", with("connection", "transfer-encoding"), &[]),
        ("keep-alive", with("keep-alive", "x"), &[]),
        ("proxy-connection", with("proxy-connection", "x"), &[]),
        ("upgrade", with("upgrade", "h2c"), &[]),
        ("te", with("te", "chunked"), &[]),
        (
            "http2-settings",
            with("http2-settings", "AAMAAABkAAQAAP__"),
            &["GET /a []"],
        ),
        (
            "a name in capitals",
            with("Transfer-Encoding", "chunked"),
            &[],
        ),
        (
            "CR LF in a value",
            with("x", "y\r\ntransfer-encoding: chunked"),
            &[],
        ),
        ("a request in a value", with("x", &admin), &[]),
        ("bare LF in a value", with("x", "y\nz: a"), &[]),
        ("bare CR in a value", with("x", "y\rz: a"), &[]),
        ("NUL in a value", with("x", "y\0z"), &[]),
        (
            "CR LF in a name",
            with("x: y\r\ntransfer-encoding", "chunked"),
            &[],
        ),
        (
            "a colon in a name",
            with("transfer-encoding: chunked\r\nx", "y"),
            &[],
        ),
        (
            "a space in a name",
            with("transfer-encoding ", "chunked"),
            &[],
        ),
        ("no name", with("", "y"), &[]),
        (
            "a space in the path",
            whole(head("GET", "/a b", "a", &[])),
            &[],
        ),
        (
            "a request line in the path",
            whole(head("GET", "/admin HTTP/1.1", "a", &[])),
            &[],
        ),
        (
            "CR LF in the path",
            whole(head("GET", "/a HTTP/1.1\r\nx: y", "a", &[])),
            &[],
        ),
        (
            "bare LF in the path",
            whole(head("GET", "/a\n", "a", &[])),
            &[],
        ),
        ("NUL in the path", whole(head("GET", "/a\0", "a", &[])), &[]),
        (
            "no slash in the path",
            whole(head("GET", "a", "a", &[])),
            &[],
        ),
        (
            "another target as the path",
            whole(head("GET", "http://b/a", "a", &[])),
            &[],
        ),
        (
            "a space in the method",
            whole(head("GET /admin HTTP/1.1", "/a", "a", &[])),
            &[],
        ),
        (
            "CR LF in the method",
            whole(head("GET / HTTP/1.1\r\nx:", "/a", "a", &[])),
            &[],
        ),
        (
            "CR LF in the authority",
            whole(head("GET", "/a", "a\r\nx: y", &[])),
            &[],
        ),
        (
            "a space in the authority",
            whole(head("GET", "/a", "a b", &[])),
            &[],
        ),
        (
            "a path in the authority",
            whole(head("GET", "/a", "a/b", &[])),
            &[],
        ),
        (
            "a user in the authority",
            whole(head("GET", "/a", "b@a", &[])),
            &[],
        ),
        ("another host", with("host", "b"), &[]),
        (
            "two hosts",
            whole(head(
                "GET",
                "/a",
                "a",
                &[field("host", "a"), field("host", "a")],
            )),
            &[],
        ),
        (
            "a trailer",
            trailed("x-sum", "1"),
            &["POST /a [hello] x-sum: 1"],
        ),
        (
            "a length in trailers",
            trailed("content-length", "500"),
            &["POST /a [hello]"],
        ),
        (
            "a host in trailers",
            trailed("host", "b"),
            &["POST /a [hello]"],
        ),
        (
            "a coding in trailers",
            trailed("transfer-encoding", "chunked"),
            &[],
        ),
        ("CR LF in trailers", trailed("x-sum", &admin), &[]),
    ];
    for (name, bytes, seen) in rows {
        let mut connection = Frames::connect(proxy.address()).await;
        connection.raw(bytes).await;
        let end = connection.end_of(1).await;
        assert_eq!(upstream.seen(), *seen, "{name}: {end:?}");
        // Where the connection goes on, it does so unharmed.
        if !matches!(end, End::Connection(_)) {
            connection.send(HEADERS, WHOLE, 3, &get("/last")).await;
            assert_eq!(connection.end_of(3).await, End::Answered, "{name}");
            assert_eq!(upstream.seen(), [LAST_SEEN], "{name}");
        }
    }
    upstream.is_done_with(proxy).await;
}
