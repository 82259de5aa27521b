//! One line, written field by field as they become known.

use std::io::{self, Write};
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::ser::Formatter;
use xxhash_rust::xxh3::xxh3_64;

use super::{Filter, Format, UserField, WorkerLog};

/// Texts of clients are cut off after so many bytes.
const LONGEST_TEXT: usize = 4096;

/// A line that is being written; it is lost unless it is ended.
#[derive(Debug)]
pub struct Line {
    log: Rc<WorkerLog>,
    text: Vec<u8>,
}

/// The value of a field.
#[derive(Clone, Copy, Debug)]
pub enum LogValue<'v> {
    /// A text.
    Text(&'v str),
    /// What a peer sent, text or not.
    Bytes(&'v [u8]),
    /// A whole number.
    Number(u64),
    /// A time in milliseconds, to the microsecond.
    Milliseconds(Duration),
}

// === impl Line ===

impl Line {
    /// Begins the line of a request that came at this instant.
    pub fn begin(log: &Rc<WorkerLog>, at: Instant) -> Self {
        let mut text = log.spare();
        let mut clock = log.clock.borrow_mut();
        match log.settings().format {
            Format::Json => {
                text.extend_from_slice(br#"{"ts":""#);
                clock.write(at, &mut text);
                text.push(b'"');
            }
            Format::Text => {
                text.extend_from_slice(b"ts=");
                clock.write(at, &mut text);
            }
        }
        Self {
            log: Rc::clone(log),
            text,
        }
    }

    /// Adds a field. `key` needs no escapes.
    pub fn field(&mut self, key: &'static str, value: LogValue<'_>) {
        self.key(key);
        match value {
            LogValue::Text(value) => self.text(value),
            LogValue::Bytes(value) => {
                let cut = &value[..value.len().min(LONGEST_TEXT)];
                self.text(&String::from_utf8_lossy(cut));
            }
            LogValue::Number(value) => self.number(value),
            LogValue::Milliseconds(value) => {
                let microseconds = u64::try_from(value.as_micros()).unwrap_or(u64::MAX);
                self.number(microseconds / 1000);
                write_thousandths((microseconds % 1000) as u32, &mut self.text);
            }
        }
    }

    /// Adds the user, in the way that the log is set to.
    pub fn user(&mut self, id: &str) {
        match self.log.settings().user {
            UserField::Hash => self.field(
                "user",
                LogValue::Text(&format!("{:016x}", xxh3_64(id.as_bytes()))),
            ),
            UserField::Plain => self.field("user", LogValue::Bytes(id.as_bytes())),
            UserField::Omit => {}
        }
    }

    /// Ends the line; it will be written.
    pub fn end(self) {
        let Self { log, mut text } = self;
        match log.settings().format {
            Format::Json => text.extend_from_slice(b"}\n"),
            Format::Text => text.push(b'\n'),
        }
        log.take_line(text);
    }

    /// Which lines its log writes.
    pub fn filter(&self) -> &Filter {
        &self.log.settings().sampling
    }

    /// Leaves the line unwritten.
    pub fn discard(self) {
        self.log.take_back(self.text);
    }

    fn key(&mut self, key: &str) {
        let (before, after): (&[u8], &[u8]) = match self.log.settings().format {
            Format::Json => (b",\"", b"\":"),
            Format::Text => (b" ", b"="),
        };
        self.text.extend_from_slice(before);
        self.text.extend_from_slice(key.as_bytes());
        self.text.extend_from_slice(after);
    }

    fn text(&mut self, value: &str) {
        let bare = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'=' | b'\\');
        match self.log.settings().format {
            Format::Text if !value.is_empty() && value.bytes().all(bare) => {
                self.text.extend_from_slice(value.as_bytes());
            }
            Format::Json | Format::Text => {
                let mut writer = serde_json::Serializer::with_formatter(&mut self.text, Escapes);
                // Writing to memory does not fail.
                let _ = value.serialize(&mut writer);
            }
        }
    }

    fn number(&mut self, value: u64) {
        let mut buffer = itoa::Buffer::new();
        self.text.extend_from_slice(buffer.format(value).as_bytes());
    }
}

/// Escapes more than JSON asks for: what a terminal obeys, and what some readers take for the end of
/// a line.
struct Escapes;

impl Formatter for Escapes {
    fn write_string_fragment<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let needs_escape = |c: char| matches!(c, '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}');
        if fragment.bytes().all(|byte| byte < 0x7f) {
            return writer.write_all(fragment.as_bytes());
        }
        let mut rest = fragment;
        while let Some(at) = rest.find(needs_escape) {
            let (plain, from) = rest.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let mut following = from.chars();
            if let Some(escaped) = following.next() {
                write!(writer, "\\u{:04x}", u32::from(escaped))?;
            }
            rest = following.as_str();
        }
        writer.write_all(rest.as_bytes())
    }
}

/// Writes a fraction of three digits.
pub(super) fn write_thousandths(thousandths: u32, into: &mut Vec<u8>) {
    let digit = |value: u32| b'0' + (value % 10) as u8;
    into.extend_from_slice(&[
        b'.',
        digit(thousandths / 100),
        digit(thousandths / 10),
        digit(thousandths),
    ]);
}
