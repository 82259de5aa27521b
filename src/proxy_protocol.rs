//! The PROXY protocol, in which a load balancer that passes on TCP says who its client is (HAProxy,
//! "The PROXY protocol", versions 1 and 2).

use std::io;
use std::net::SocketAddr;

use ppp::v2::{AddressFamily, Builder, Command, Protocol, Version as Two};
use ppp::{HeaderResult, v1, v2};
use tokio::io::{AsyncRead, AsyncReadExt};

/// A version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// A line of text.
    V1,
    /// Bytes.
    V2,
}

/// The longest line of version 1 with its end, in bytes (section 2.1).
const LONGEST_LINE: usize = 107;

/// The longest header of version 2 that is read, in bytes; extensions may make it long.
const LONGEST_HEADER: usize = 4096;

/// What of a header of version 2 comes before what its length counts.
const FIXED: usize = 16;

/// Reads a header, and not a byte more, and returns the client's address; `None` when the sender
/// speaks for itself.
///
/// # Errors
///
/// Of the connection, and for whatever is no header.
pub async fn receive(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<SocketAddr>> {
    // Shorter than every header.
    let mut header = vec![0; v2::PROTOCOL_PREFIX.len()];
    stream.read_exact(&mut header).await?;
    if header == v2::PROTOCOL_PREFIX {
        header.resize(FIXED, 0);
        stream
            .read_exact(&mut header[v2::PROTOCOL_PREFIX.len()..])
            .await?;
        let length = usize::from(u16::from_be_bytes([header[14], header[15]]));
        if FIXED + length > LONGEST_HEADER {
            return Err(malformed());
        }
        header.resize(FIXED + length, 0);
        stream.read_exact(&mut header[FIXED..]).await?;
    } else if header.starts_with(v1::PROTOCOL_PREFIX.as_bytes()) {
        while !header.ends_with(b"\r\n") {
            if header.len() == LONGEST_LINE {
                return Err(malformed());
            }
            header.push(stream.read_u8().await?);
        }
    }
    parse(&header)
}

/// The client's address in a header; `None` when the sender speaks for itself.
///
/// # Errors
///
/// For whatever is no header.
pub fn parse(header: &[u8]) -> io::Result<Option<SocketAddr>> {
    match HeaderResult::parse(header) {
        HeaderResult::V1(Ok(header)) => Ok(match header.addresses {
            v1::Addresses::Tcp4(pair) => Some((pair.source_address, pair.source_port).into()),
            v1::Addresses::Tcp6(pair) => Some((pair.source_address, pair.source_port).into()),
            v1::Addresses::Unknown => None,
        }),
        HeaderResult::V2(Ok(header)) => Ok(match (header.command, header.addresses) {
            (Command::Proxy, v2::Addresses::IPv4(pair)) => {
                Some((pair.source_address, pair.source_port).into())
            }
            (Command::Proxy, v2::Addresses::IPv6(pair)) => {
                Some((pair.source_address, pair.source_port).into())
            }
            _ => None,
        }),
        HeaderResult::V1(Err(_)) | HeaderResult::V2(Err(_)) => Err(malformed()),
    }
}

/// The header that says that `source` has connected to `destination`.
///
/// # Errors
///
/// Never, for addresses.
pub fn header(
    version: Version,
    source: SocketAddr,
    destination: SocketAddr,
) -> io::Result<Vec<u8>> {
    let (source, destination) = same_family(source, destination);
    match version {
        Version::V1 => {
            let addresses = v1::Addresses::from((source, destination));
            Ok(addresses.to_string().into_bytes())
        }
        Version::V2 => {
            let command = Two::Two | Command::Proxy;
            let addresses = (source, destination);
            Builder::with_addresses(command, Protocol::Stream, addresses).build()
        }
    }
}

/// The header of a connection that is made for no client (sections 2.1 and 2.2: "UNKNOWN", "LOCAL").
///
/// # Errors
///
/// None that is known; building a header is fallible.
pub fn own_header(version: Version) -> io::Result<Vec<u8>> {
    match version {
        Version::V1 => Ok(b"PROXY UNKNOWN\r\n".to_vec()),
        Version::V2 => {
            let command = Two::Two | Command::Local;
            Builder::new(command, AddressFamily::Unspecified | Protocol::Unspecified).build()
        }
    }
}

/// A header has addresses of one family: of two, the older is written as the newer.
fn same_family(source: SocketAddr, destination: SocketAddr) -> (SocketAddr, SocketAddr) {
    let canonical =
        |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let mapped = |address: SocketAddr| match address {
        SocketAddr::V4(old) => SocketAddr::new(old.ip().to_ipv6_mapped().into(), old.port()),
        new @ SocketAddr::V6(_) => new,
    };
    let (source, destination) = (canonical(source), canonical(destination));
    if source.is_ipv4() == destination.is_ipv4() {
        (source, destination)
    } else {
        (mapped(source), mapped(destination))
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed PROXY header")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(source: SocketAddr, destination: SocketAddr, v1: bool, rest: Vec<u8>) {
            let version = if v1 { Version::V1 } else { Version::V2 };
            let mut bytes = header(version, source, destination).unwrap();
            bytes.extend_from_slice(&rest);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let mut stream = &bytes[..];
            let read = runtime.block_on(receive(&mut stream)).unwrap().unwrap();
            let canonical = |address: SocketAddr| (address.ip().to_canonical(), address.port());
            prop_assert_eq!(canonical(read), canonical(source));
            prop_assert_eq!(stream, &rest[..]);
        }

        #[test]
        fn nothing_that_comes_is_a_panic(bytes: Vec<u8>, v1: bool) {
            let prefix = if v1 { v1::PROTOCOL_PREFIX.as_bytes() } else { v2::PROTOCOL_PREFIX };
            let bytes = [prefix, &bytes].concat();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _ = runtime.block_on(receive(&mut &bytes[..]));
        }
    }

    #[test]
    fn senders_may_speak_for_themselves_and_nonsense_is_refused() {
        let local = [v2::PROTOCOL_PREFIX, &[0x20, 0, 0, 0]].concat();
        assert_eq!(parse(&local).unwrap(), None);
        assert_eq!(parse(b"PROXY UNKNOWN\r\n").unwrap(), None);
        for text in [
            "PROXY TCP4 1.2.3.4\r\n",
            "GET / HTTP/1.1\r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 x 1\r\n",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
