//! Lines kept or dropped within the memory they came in.
//!
//! Filtering a file of hundreds of megabytes into a second buffer would double the peak of memory,
//! so what is kept moves to the front of the same buffer.

use std::ops::Range;

use memchr::memchr;

/// A buffer of lines being packed towards its front, separated by `\n`.
///
/// The front cannot overtake the reading position: what is kept takes the room it came from, and
/// its separator that of the `\n` which ended the line before.
pub(super) struct Packing<'p> {
    bytes: Vec<u8>,
    pause: super::Pause<'p>,
    lines: usize,
    /// Where the packed front ends.
    packed: usize,
    /// Where the next line starts.
    next: usize,
}

/// How many lines are read between two pauses: half a millisecond of work, or less.
const LINES_A_PAUSE: usize = 4096;

impl<'p> Packing<'p> {
    /// Reads from `start` on; what lies before it is dropped.
    pub(super) fn new(bytes: Vec<u8>, start: usize, pause: super::Pause<'p>) -> Self {
        Self {
            bytes,
            pause,
            lines: 0,
            packed: 0,
            next: start,
        }
    }

    /// Where the next line lies, without its `\n`.
    pub(super) fn next_line(&mut self) -> Option<Range<usize>> {
        if self.next >= self.bytes.len() {
            return None;
        }
        self.lines += 1;
        if self.lines.is_multiple_of(LINES_A_PAUSE) {
            (self.pause)();
        }
        let start = self.next;
        let end = start + line_at(&self.bytes, start).len();
        self.next = end + 1;
        Some(start..end)
    }

    /// The bytes of a line, or of a part of it, which was the last to be read.
    pub(super) fn bytes(&self, range: &Range<usize>) -> &[u8] {
        &self.bytes[range.clone()]
    }

    /// The lines kept so far.
    pub(super) fn packed(&self) -> &[u8] {
        &self.bytes[..self.packed]
    }

    /// Moves `range` of the last line to the front, and says where it starts now.
    pub(super) fn keep(&mut self, range: Range<usize>) -> usize {
        if self.packed > 0 {
            self.bytes[self.packed] = b'\n';
            self.packed += 1;
        }
        let start = self.packed;
        self.packed += range.len();
        self.bytes.copy_within(range, start);
        start
    }

    /// The kept lines alone, without a `\n` at the end.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.bytes.truncate(self.packed);
        self.bytes
    }
}

/// The line which starts at `start`.
pub(super) fn line_at(bytes: &[u8], start: usize) -> &[u8] {
    let rest = &bytes[start..];
    &rest[..memchr(b'\n', rest).unwrap_or(rest.len())]
}
