//! What was sent of the body of a request, for as long as it is little.

use bytes::Bytes;
use http::header::HeaderMap;
use hyper::body::Frame;
use smallvec::SmallVec;

/// What keeping a part costs beside its bytes: a client that sends them one by one must not take more
/// memory than another.
const PART_COST: usize = 64;

/// Up to this size a part is copied. A reference to it would hold on to the whole buffer that it was
/// read into, and whoever reads the connection would need another one for each request.
const COPIED: usize = 4 << 10;

/// What was sent of a body, for as long as it is little, so that it can be sent again.
#[derive(Debug)]
pub(super) struct Replay {
    /// What was sent, in order; a short body is one part.
    kept: SmallVec<[Bytes; 1]>,
    trailers: Option<HeaderMap>,
    /// How much more may be kept.
    room: usize,
    /// How much of it has been sent again.
    position: usize,
}

// === impl Replay ===

impl Replay {
    /// Keeps so many bytes, in one part; `None` if none are to be kept.
    pub(super) fn new(kept: usize) -> Option<Self> {
        (kept > 0).then(|| Self {
            kept: SmallVec::new(),
            trailers: None,
            room: kept + PART_COST,
            position: 0,
        })
    }

    /// Keeps a part that is sent for the first time; false when it is too large.
    pub(super) fn keep(&mut self, frame: &Frame<Bytes>) -> bool {
        match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) => match self.room.checked_sub(data.len() + PART_COST) {
                Some(left) => {
                    self.room = left;
                    self.kept.push(match data.len() {
                        ..=COPIED => Bytes::copy_from_slice(data),
                        _ => data.clone(),
                    });
                }
                None => return false,
            },
            (None, trailers) => self.trailers = trailers.cloned(),
        }
        self.position += 1;
        true
    }

    /// From now on it is sent again.
    pub(super) fn rewind(&mut self) {
        self.position = 0;
    }

    /// The next part that was sent before.
    pub(super) fn next(&mut self) -> Option<Frame<Bytes>> {
        let position = self.position;
        let frame = match self.kept.get(position) {
            Some(data) => Frame::data(data.clone()),
            None if position == self.kept.len() => Frame::trailers(self.trailers.clone()?),
            None => return None,
        };
        self.position += 1;
        Some(frame)
    }

    pub(super) fn has_next(&self) -> bool {
        self.position < self.kept.len() + usize::from(self.trailers.is_some())
    }

    /// The bytes that will be sent again.
    pub(super) fn left(&self) -> u64 {
        let kept = self.kept.iter().skip(self.position);
        kept.map(|data| data.len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Parts that are copied, and such as are not.
        #[test]
        fn what_was_kept_is_sent_again(
            lengths in prop::collection::vec(0..2 * COPIED, 0..8),
            has_trailers: bool,
            sent_again_before in 0_usize..10,
        ) {
            let mut frames: Vec<_> = (b'a'..).zip(lengths).map(|(letter, length)| {
                Frame::data(Bytes::from(vec![letter; length]))
            }).collect();
            if has_trailers {
                let trailer = (HeaderName::from_static("a"), HeaderValue::from_static("b"));
                frames.push(Frame::trailers(HeaderMap::from_iter([trailer])));
            }
            let mut replay = Replay::new(1 << 20).unwrap();
            for frame in &frames {
                prop_assert!(replay.keep(frame));
            }
            prop_assert!(!replay.has_next());
            // An attempt that is broken off, and a whole one.
            replay.rewind();
            for _ in 0..sent_again_before {
                replay.next();
            }
            replay.rewind();
            let bytes = frames.iter().filter_map(Frame::data_ref).map(Bytes::len).sum::<usize>();
            prop_assert_eq!(replay.left(), bytes as u64);
            for frame in &frames {
                prop_assert!(replay.has_next());
                let again = replay.next().unwrap();
                prop_assert_eq!(again.data_ref(), frame.data_ref());
                prop_assert_eq!(again.trailers_ref(), frame.trailers_ref());
            }
            prop_assert!(replay.next().is_none());
        }

        #[test]
        fn no_more_is_kept_than_may_be(
            lengths in prop::collection::vec(0..2 * COPIED, 0..8),
            most in 1_usize..20_000,
        ) {
            let mut replay = Replay::new(most).unwrap();
            let mut kept = 0;
            for length in lengths {
                let fits = kept + length <= most;
                prop_assert_eq!(replay.keep(&Frame::data(Bytes::from(vec![0; length]))), fits);
                if !fits {
                    break;
                }
                kept += length + PART_COST;
            }
        }
    }
}
