//! A connection as hyper wants it, with TLS or without.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

/// What is copied together rather than written from several places, in bytes.
///
/// `writev` costs the kernel about half a microsecond more than `send`: it goes through the file
/// system's layer and copies the list of slices first.
const SMALL: usize = 2048;

/// What the kernel takes of what is written before it can send it, in bytes.
///
/// Without a limit it takes megabytes of a response, at the pace of the endpoint, for a client that reads
/// none of them. A few hundred such clients reach the limit of all connections of the machine
/// (`net.ipv4.tcp_mem`), and segments of everybody's are lost. What is on its way does not count, so that
/// a connection is as fast as without, unless its thread is late by the time that this much takes.
const UNSENT: u32 = 64 << 10;

/// What hyper may hold of what comes over a connection with HTTP/1.1 and of what goes, each, in bytes. By
/// default it is four or five times as much, which thousands of slow clients would take. A body of 64 KiB fits
/// with its head: without, it needs twice the system calls.
pub const HYPER_BUFFER: usize = 80 << 10;

/// A connection that hyper can read and write.
#[derive(Debug)]
pub struct Stream {
    transport: Transport,
    /// What was read already, to see what is spoken; comes first.
    read_before: Bytes,
}

#[derive(Debug)]
enum Transport {
    Plain(TokioIo<TcpStream>),
    /// Boxed, or every connection would have the size of one with TLS.
    Tls(Box<TokioIo<TlsStream<TcpStream>>>),
}

/// Bounds what the kernel holds of what is written to this connection, or to those that come of this
/// listener.
///
/// # Errors
///
/// Whatever the operating system has against it.
pub fn bound_unsent(socket: SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_notsent_lowat(UNSENT)
}

// === impl Stream ===

impl Stream {
    /// Wraps a connection without TLS.
    pub fn plain(stream: TcpStream) -> Self {
        Self {
            transport: Transport::Plain(TokioIo::new(stream)),
            read_before: Bytes::new(),
        }
    }

    /// Wraps a connection whose TLS handshake is over.
    pub fn tls(stream: impl Into<TlsStream<TcpStream>>) -> Self {
        Self {
            transport: Transport::Tls(Box::new(TokioIo::new(stream.into()))),
            read_before: Bytes::new(),
        }
    }

    /// Puts what was read already back in front.
    pub fn put_back(&mut self, bytes: Bytes) {
        self.read_before = bytes;
    }
}

impl Read for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.read_before.is_empty() {
            let length = this.read_before.len().min(buf.remaining());
            buf.put_slice(&this.read_before[..length]);
            this.read_before.advance(length);
            return Poll::Ready(Ok(()));
        }
        match &mut this.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Transport::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl Write for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Transport::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let stream = match &mut self.get_mut().transport {
            Transport::Plain(stream) => Pin::new(stream),
            // rustls copies them into its records anyway.
            Transport::Tls(stream) => return Pin::new(stream).poll_write_vectored(cx, slices),
        };
        if let [only] = slices {
            return stream.poll_write(cx, only);
        }
        if slices.iter().map(|slice| slice.len()).sum::<usize>() > SMALL {
            return stream.poll_write_vectored(cx, slices);
        }
        let mut together = [0; SMALL];
        let length = flatten(slices, &mut together);
        stream.poll_write(cx, &together[..length])
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().transport {
            Transport::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().transport {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Copies slices together, for which there is room, and returns their length.
fn flatten(slices: &[IoSlice<'_>], room: &mut [u8; SMALL]) -> usize {
    slices.iter().fold(0, |filled, slice| {
        let end = filled + slice.len();
        room[filled..end].copy_from_slice(slice);
        end
    })
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;

    /// What arrives when these slices are written until all of it is.
    async fn arrives(parts: &[Vec<u8>]) -> Vec<u8> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await;
        let mut stream = Stream::plain(stream.unwrap());
        let (mut other, _) = listener.accept().await.unwrap();
        let write = async move {
            let whole: usize = parts.iter().map(Vec::len).sum();
            let mut written = 0;
            while written < whole {
                let mut skipped = written;
                let rest = parts.iter().map(|part| {
                    let skip = skipped.min(part.len());
                    skipped -= skip;
                    IoSlice::new(&part[skip..])
                });
                let rest: Vec<IoSlice<'_>> = rest.collect();
                let wrote = poll_fn(|cx| Pin::new(&mut stream).poll_write_vectored(cx, &rest));
                written += wrote.await.unwrap();
            }
        };
        let mut read = Vec::new();
        let (_, outcome) = tokio::join!(write, other.read_to_end(&mut read));
        outcome.unwrap();
        read
    }

    #[tokio::test]
    async fn slices_arrive_whole_and_in_order_small_or_large() {
        for sizes in [
            vec![10, 0, 20],
            vec![SMALL, 0],
            vec![SMALL - 1, 1],
            vec![SMALL, 1],
            vec![300, 5_000_000, 7],
        ] {
            let part = |(index, size): (usize, &usize)| vec![index as u8; *size];
            let parts: Vec<Vec<u8>> = sizes.iter().enumerate().map(part).collect();
            assert!(arrives(&parts).await == parts.concat(), "{sizes:?}");
        }
    }
}
