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
        if slices.iter().map(|slice| slice.len()).sum::<usize>() > SMALL {
            return self.inner().poll_write_vectored(cx, slices);
        }
        let mut together = [0; SMALL];
        let length = flatten(slices, &mut together);
        self.inner().poll_write(cx, &together[..length])
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
        let mut stream = Stream::new(stream.unwrap());
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
