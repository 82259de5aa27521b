//! HTTP/2 as RFC 9113 has it, frame by frame: what a server must refuse, and how, and what it must bear.

use crate::support::frames::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, End, Frames, GOAWAY, HEADERS, PADDED, PING,
    PRIORITISED, PRIORITY, PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE, field, frame, get,
    literal,
};
use crate::support::{Client, Proxy, Upstream, single};

const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE_ERROR: u32 = 6;
const COMPRESSION_ERROR: u32 = 9;

const WHOLE: u8 = END_HEADERS | END_STREAM;

/// Frames in a row.
fn frames(all: &[(u8, u8, u32, Vec<u8>)]) -> Vec<u8> {
    all.iter()
        .flat_map(|(kind, flags, stream, payload)| frame(*kind, *flags, *stream, payload))
        .collect()
}

fn head(fields: &[Vec<u8>]) -> Vec<u8> {
    [get("/")].iter().chain(fields).flatten().copied().collect()
}

/// What comes of these bytes for stream 1 of a new connection.
async fn end(proxy: &Proxy, bytes: &[u8]) -> End {
    let mut connection = Frames::connect(proxy.address()).await;
    connection.raw(bytes).await;
    connection.end_of(1).await
}

/// True for an end with one of these errors, of the connection or of the stream; a connection error may also be a
/// close without a word (RFC 9113 section 5.4.1).
fn is_refused(end: &End, errors: &[u32], of_connection: bool) -> bool {
    match end {
        End::Connection(None) => true,
        // The h2 crate says PROTOCOL_ERROR where the standard has COMPRESSION_ERROR or STREAM_CLOSED.
        End::Connection(Some(error)) => errors.contains(error) || *error == PROTOCOL_ERROR,
        // An error of a stream may be treated as one of the connection, but not the other way round (5.4.2).
        End::Stream(error) => !of_connection && errors.contains(error),
        End::Answered => false,
    }
}

#[tokio::test]
async fn errors_of_a_connection_end_it_with_the_right_code() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let open = (HEADERS, END_HEADERS, 1, get("/hold"));
    let setting = |id: u16, value: u32| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
    for (section, sent, errors) in [
        (
            "4.2 larger than the limit",
            vec![(HEADERS, WHOLE, 1, vec![0; 20_000])],
            &[FRAME_SIZE_ERROR][..],
        ),
        (
            "4.3 block that is no HPACK",
            vec![(HEADERS, WHOLE, 1, vec![0xff, 0xff, 0xff, 0xff, 0xff])],
            &[COMPRESSION_ERROR],
        ),
        (
            "4.3 index out of the table",
            vec![(HEADERS, WHOLE, 1, vec![0xbf])],
            &[COMPRESSION_ERROR],
        ),
        (
            "4.3 table larger than allowed",
            vec![(
                HEADERS,
                WHOLE,
                1,
                [vec![0x3f, 0xe1, 0xff, 0x3f], get("/")].concat(),
            )],
            &[COMPRESSION_ERROR],
        ),
        (
            "5.1 DATA on an idle stream",
            vec![(DATA, END_STREAM, 1, b"x".to_vec())],
            &[PROTOCOL_ERROR, STREAM_CLOSED],
        ),
        (
            "5.1 RST_STREAM on an idle stream",
            vec![(RST_STREAM, 0, 1, vec![0, 0, 0, 8])],
            &[PROTOCOL_ERROR],
        ),
        (
            "5.1 WINDOW_UPDATE on an idle stream",
            vec![(WINDOW_UPDATE, 0, 1, vec![0, 0, 0, 8])],
            &[PROTOCOL_ERROR],
        ),
        (
            "5.1 CONTINUATION without HEADERS",
            vec![(CONTINUATION, END_HEADERS, 1, get("/"))],
            &[PROTOCOL_ERROR],
        ),
        (
            "5.1.1 even stream",
            vec![(HEADERS, WHOLE, 2, get("/"))],
            &[PROTOCOL_ERROR],
        ),
        (
            "5.1.1 smaller stream after a larger",
            vec![
                (HEADERS, WHOLE, 5, get("/hold")),
                (HEADERS, WHOLE, 3, get("/")),
            ],
            &[PROTOCOL_ERROR, STREAM_CLOSED],
        ),
        (
            "5.3.1 depends on itself (PRIORITY of wrong size)",
            vec![open.clone(), (PRIORITY, 0, 1, vec![0; 4])],
            &[FRAME_SIZE_ERROR],
        ),
        (
            "6.1 DATA on stream 0",
            vec![(DATA, 0, 0, b"x".to_vec())],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.1 padding longer than the frame",
            vec![open.clone(), (DATA, PADDED, 1, vec![9, b'x'])],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.2 HEADERS on stream 0",
            vec![(HEADERS, WHOLE, 0, get("/"))],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.2 another frame within a head",
            vec![(HEADERS, END_STREAM, 1, get("/")), (PING, 0, 0, vec![0; 8])],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.2 padding longer than the frame",
            vec![(HEADERS, WHOLE | PADDED, 1, [vec![200], get("/")].concat())],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.3 PRIORITY on stream 0",
            vec![(PRIORITY, 0, 0, vec![0, 0, 0, 1, 1])],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.4 RST_STREAM on stream 0",
            vec![(RST_STREAM, 0, 0, vec![0, 0, 0, 8])],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.4 RST_STREAM of wrong size",
            vec![open.clone(), (RST_STREAM, 0, 1, vec![0; 3])],
            &[FRAME_SIZE_ERROR],
        ),
        (
            "6.5 SETTINGS on a stream",
            vec![(SETTINGS, 0, 1, vec![])],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.5 acknowledgement with a payload",
            vec![(SETTINGS, ACK, 0, vec![0; 6])],
            &[FRAME_SIZE_ERROR],
        ),
        (
            "6.5 SETTINGS of wrong size",
            vec![(SETTINGS, 0, 0, vec![0; 5])],
            &[FRAME_SIZE_ERROR],
        ),
        (
            "6.5.2 ENABLE_PUSH is 2",
            vec![(SETTINGS, 0, 0, setting(2, 2))],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.5.2 INITIAL_WINDOW_SIZE too large",
            vec![(SETTINGS, 0, 0, setting(4, 0x8000_0000))],
            &[FLOW_CONTROL_ERROR],
        ),
        (
            "6.5.2 MAX_FRAME_SIZE too small",
            vec![(SETTINGS, 0, 0, setting(5, 1))],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.5.2 MAX_FRAME_SIZE too large",
            vec![(SETTINGS, 0, 0, setting(5, 0x0100_0000))],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.6 PUSH_PROMISE from a client",
            vec![(
                PUSH_PROMISE,
                END_HEADERS,
                1,
                [vec![0, 0, 0, 2], get("/")].concat(),
            )],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.7 PING on a stream",
            vec![(PING, 0, 1, vec![0; 8])],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.7 PING of wrong size",
            vec![(PING, 0, 0, vec![0; 7])],
            &[FRAME_SIZE_ERROR],
        ),
        (
            "6.8 GOAWAY on a stream",
            vec![(GOAWAY, 0, 1, vec![0; 8])],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.9 WINDOW_UPDATE of 0",
            vec![(WINDOW_UPDATE, 0, 0, vec![0; 4])],
            &[PROTOCOL_ERROR],
        ),
        (
            "6.9 WINDOW_UPDATE of wrong size",
            vec![(WINDOW_UPDATE, 0, 0, vec![0; 3])],
            &[FRAME_SIZE_ERROR],
        ),
        (
            "6.9.1 window beyond its limit",
            vec![(WINDOW_UPDATE, 0, 0, vec![0x7f, 0xff, 0xff, 0xff])],
            &[FLOW_CONTROL_ERROR],
        ),
    ] {
        let end = end(&proxy, &frames(&sent)).await;
        assert!(is_refused(&end, errors, true), "{section}: {end:?}");
    }
    assert_eq!(
        Client::h2c(proxy.address())
            .await
            .get("/", &[])
            .await
            .text(),
        "one"
    );
}

#[tokio::test]
async fn errors_of_a_stream_end_it_with_the_right_code() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let open = (HEADERS, END_HEADERS, 1, get("/sink"));
    let length = |value: &str| head(&[field("content-length", value)]);
    let protocol = &[PROTOCOL_ERROR][..];
    for (section, sent, errors) in [
        (
            "5.1 DATA after the end",
            vec![
                (HEADERS, WHOLE, 1, get("/hold")),
                (DATA, END_STREAM, 1, b"x".to_vec()),
            ],
            &[STREAM_CLOSED][..],
        ),
        (
            "5.1 HEADERS after the end",
            vec![
                (HEADERS, WHOLE, 1, get("/hold")),
                (HEADERS, WHOLE, 1, get("/")),
            ],
            &[STREAM_CLOSED],
        ),
        (
            "6.9 WINDOW_UPDATE of 0",
            vec![open.clone(), (WINDOW_UPDATE, 0, 1, vec![0; 4])],
            protocol,
        ),
        (
            "6.9.1 window beyond its limit",
            vec![
                open.clone(),
                (WINDOW_UPDATE, 0, 1, vec![0x7f, 0xff, 0xff, 0xff]),
            ],
            &[FLOW_CONTROL_ERROR],
        ),
        (
            "8.1 second head without the end",
            vec![open.clone(), (HEADERS, END_HEADERS, 1, field("x", "y"))],
            protocol,
        ),
        (
            "8.1.1 more than content-length",
            vec![
                (HEADERS, END_HEADERS, 1, length("1")),
                (DATA, END_STREAM, 1, b"xy".to_vec()),
            ],
            protocol,
        ),
        (
            "8.1.1 less than content-length",
            vec![
                (HEADERS, END_HEADERS, 1, length("3")),
                (DATA, END_STREAM, 1, b"xy".to_vec()),
            ],
            protocol,
        ),
        (
            "8.2 name in capitals",
            vec![(HEADERS, WHOLE, 1, head(&[field("X-Upper", "1")]))],
            protocol,
        ),
        (
            "8.2.1 value with a line break",
            vec![(HEADERS, WHOLE, 1, head(&[field("x", "a\r\nb: c")]))],
            protocol,
        ),
        (
            "8.2.1 name with a colon",
            vec![(HEADERS, WHOLE, 1, head(&[field("x:y", "1")]))],
            protocol,
        ),
        (
            "8.2.2 connection",
            vec![(
                HEADERS,
                WHOLE,
                1,
                head(&[field("connection", "keep-alive")]),
            )],
            protocol,
        ),
        (
            "8.2.2 transfer-encoding",
            vec![(
                HEADERS,
                WHOLE,
                1,
                head(&[field("transfer-encoding", "chunked")]),
            )],
            protocol,
        ),
        (
            "8.2.2 te other than trailers",
            vec![(HEADERS, WHOLE, 1, head(&[field("te", "gzip")]))],
            protocol,
        ),
        (
            "8.3 pseudo-header after a field",
            vec![(
                HEADERS,
                WHOLE,
                1,
                [
                    vec![0x82, 0x86],
                    field("x", "1"),
                    literal(4, "/"),
                    literal(1, "a"),
                ]
                .concat(),
            )],
            protocol,
        ),
        (
            "8.3 unknown pseudo-header",
            vec![(HEADERS, WHOLE, 1, head(&[field(":unknown", "1")]))],
            protocol,
        ),
        (
            "8.3 pseudo-header of responses",
            vec![(HEADERS, WHOLE, 1, head(&[field(":status", "200")]))],
            protocol,
        ),
        (
            "8.3.1 no method",
            vec![(
                HEADERS,
                WHOLE,
                1,
                [vec![0x86], literal(4, "/"), literal(1, "a")].concat(),
            )],
            protocol,
        ),
        (
            "8.3.1 no scheme",
            vec![(
                HEADERS,
                WHOLE,
                1,
                [vec![0x82], literal(4, "/"), literal(1, "a")].concat(),
            )],
            protocol,
        ),
        (
            "8.3.1 no path",
            vec![(
                HEADERS,
                WHOLE,
                1,
                [vec![0x82, 0x86], literal(1, "a")].concat(),
            )],
            protocol,
        ),
        (
            "8.3.1 empty path",
            vec![(HEADERS, WHOLE, 1, get(""))],
            protocol,
        ),
        (
            "8.3.1 two methods",
            vec![(HEADERS, WHOLE, 1, [vec![0x82], get("/")].concat())],
            protocol,
        ),
        (
            "8.3.1 two paths",
            vec![(HEADERS, WHOLE, 1, [vec![0x84], get("/")].concat())],
            protocol,
        ),
    ] {
        let end = end(&proxy, &frames(&sent)).await;
        assert!(is_refused(&end, errors, false), "{section}: {end:?}");
    }
    assert_eq!(upstream.held(), 0, "nothing malformed is passed on");
    assert_eq!(
        Client::h2c(proxy.address())
            .await
            .get("/", &[])
            .await
            .text(),
        "one"
    );
}

#[tokio::test]
async fn what_is_allowed_is_borne() {
    let upstream = Upstream::start("one").await;
    let proxy = Proxy::start(&single(upstream.address, ""));
    let whole = (HEADERS, WHOLE, 1, get("/"));
    let block = get("/");
    for (section, sent) in [
        (
            "4.1 unknown kind of frame",
            vec![(0xfa, 0, 0, vec![1, 2, 3]), whole.clone()],
        ),
        (
            "4.1 unknown flags",
            vec![(PING, 0x16, 0, vec![0; 8]), whole.clone()],
        ),
        (
            "4.3 head in parts",
            vec![
                (HEADERS, END_STREAM, 1, block[..3].to_vec()),
                (CONTINUATION, END_HEADERS, 1, block[3..].to_vec()),
            ],
        ),
        (
            "5.1 PRIORITY on an idle stream",
            vec![(PRIORITY, 0, 1, vec![0, 0, 0, 0, 1]), whole.clone()],
        ),
        (
            "6.1 padding",
            vec![
                (HEADERS, END_HEADERS, 1, get("/sink")),
                (DATA, PADDED | END_STREAM, 1, vec![2, b'x', 0, 0]),
            ],
        ),
        (
            "6.2 padding and priority",
            vec![(
                HEADERS,
                WHOLE | PADDED | PRIORITISED,
                1,
                [vec![1, 0, 0, 0, 3, 9], get("/"), vec![0]].concat(),
            )],
        ),
        (
            "6.5 unknown setting",
            vec![(SETTINGS, 0, 0, vec![0, 0xff, 0, 0, 0, 1]), whole.clone()],
        ),
        (
            "6.8 GOAWAY from the client",
            vec![whole.clone(), (GOAWAY, 0, 0, vec![0; 8])],
        ),
        (
            "6.9 WINDOW_UPDATE after the end",
            vec![whole, (WINDOW_UPDATE, 0, 1, vec![0, 0, 0, 1])],
        ),
    ] {
        assert_eq!(
            end(&proxy, &frames(&sent)).await,
            End::Answered,
            "{section}"
        );
    }
    // Pings are answered with what they said (6.7).
    let mut connection = Frames::connect(proxy.address()).await;
    connection.send(PING, 0, 0, b"whoisit?").await;
    loop {
        let frame = connection.next().await.unwrap();
        if frame.kind == PING {
            assert_eq!((frame.flags, &*frame.payload), (ACK, &b"whoisit?"[..]));
            break;
        }
    }
}

/// The h2 crate drops it, where RFC 9113 section 8.1 wants the request refused; what matters is that it
/// reaches nobody.
#[tokio::test]
async fn a_pseudo_header_among_trailers_is_passed_on_to_nobody() {
    let upstream = Upstream::h2c("one").await;
    let config = single(upstream.address, "").replace("endpoints", "protocol: h2c, endpoints");
    let proxy = Proxy::start(&config);
    let trailers = [literal(4, "/admin"), field("x-sum", "1")].concat();
    let sent = [
        (HEADERS, END_HEADERS, 1, get("/seen-trailers")),
        (DATA, 0, 1, b"x".to_vec()),
        (HEADERS, WHOLE, 1, trailers),
    ];
    let mut connection = Frames::connect(proxy.address()).await;
    connection.raw(&frames(&sent)).await;
    loop {
        let frame = connection.next().await.unwrap();
        if frame.kind == DATA && !frame.payload.is_empty() {
            assert_eq!(
                String::from_utf8(frame.payload).unwrap(),
                "{\"x-sum\": \"1\"}"
            );
            break;
        }
    }
}
