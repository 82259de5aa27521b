//! A TCP connection as hyper wants it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// What is copied together rather than written from several places, in bytes.
///
/// `writev` costs the kernel about half a microsecond more than `send`: it goes through the file
/// system's layer and copies the list of slices first.
const SMALL: usize = 2048;

/// A TCP connection that hyper can read and write.
#[derive(Debug)]
pub struct Stream(TokioIo<TcpStream>);

// === impl Stream ===

impl Stream {
    /// Wraps a connection.
    pub fn new(stream: TcpStream) -> Self {
        Self(TokioIo::new(stream))
    }

    fn inner(self: Pin<&mut Self>) -> Pin<&mut TokioIo<TcpStream>> {
        Pin::new(&mut self.get_mut().0)
    }
}

impl Read for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        self.inner().poll_read(cx, buf)
    }
}

impl Write for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.inner().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [only] = slices {
            return self.inner().poll_write(cx, only);
        }
        let mut together = [0; SMALL];
        match flatten(slices, &mut together) {
            Some(bytes) => self.inner().poll_write(cx, bytes),
            None => self.inner().poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_shutdown(cx)
    }
}

/// Copies all slices together, if there is room.
fn flatten<'r>(slices: &[IoSlice<'_>], room: &'r mut [u8]) -> Option<&'r [u8]> {
    let mut filled = 0;
    for slice in slices {
        let end = filled + slice.len();
        room.get_mut(filled..end)?.copy_from_slice(slice);
        filled = end;
    }
    room.get(..filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_copied_together_when_they_fit() {
        let slices = [b"GET ", &b"/"[..], b""].map(IoSlice::new);
        assert_eq!(flatten(&slices, &mut [0; 5]), Some(&b"GET /"[..]));
        assert_eq!(flatten(&slices, &mut [0; 4]), None);
    }
}
