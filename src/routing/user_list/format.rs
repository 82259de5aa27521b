//! The file formats of a user list: lines of text, a CSV column, a JSON array.
//!
//! Each format is reduced to the same thing, a buffer of checked ids separated by `\n`, so that
//! everything behind this module knows one shape only. Duplicates stay in: the set behind finds
//! them anyway.

use std::borrow::Cow;
use std::fmt;

use csv::{ByteRecord, ErrorKind};
use memchr::memchr_iter;
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor};

use super::packing::Packing;

/// How the ids are written in a list file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// One id per line; empty lines and lines which start with `#` are skipped.
    Lines,
    /// One column of a CSV file, named by its header row.
    Csv {
        /// The header of the column which holds the ids.
        column: String,
    },
    /// A JSON array of strings and integers, or of objects which hold one.
    Json {
        /// The key of the id in each object; `None` when the array holds the ids themselves.
        field: Option<String>,
    },
}

/// Why a list file cannot be used, and where in it.
///
/// The place is the first character of the offending text in lines, the row in CSV (column 1, for
/// the reason names the cell), and the end of the offending value in JSON. A problem of the file as
/// a whole is at line 1, column 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListError {
    /// The line, from 1.
    pub line: u64,
    /// The column within the line, from 1.
    pub column: u64,
    /// What is wrong, for the owner of the file.
    pub reason: String,
}

/// Reads `content` into ids separated by `\n`.
///
/// Each id is trimmed, not empty, and UTF-8 without control characters, hence without `\n`. There
/// is no `\n` at the end.
pub(super) fn read_ids(
    content: Vec<u8>,
    format: &Format,
    pause: super::Pause<'_>,
) -> Result<Vec<u8>, ListError> {
    let start = text_start(&content)?;
    match format {
        Format::Lines => read_lines(content, start, pause),
        Format::Csv { column } => read_csv(&content[start..], column),
        Format::Json { field } => read_json(&content[start..], field.as_deref()),
    }
}

// === impl ListError ===

impl ListError {
    /// A problem of the file as a whole.
    pub(super) fn whole_file(reason: String) -> Self {
        Self {
            line: 1,
            column: 1,
            reason,
        }
    }
}

impl fmt::Display for ListError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "line {}, column {}: {}",
            self.line, self.column, self.reason
        )
    }
}

impl std::error::Error for ListError {}

// === Lines ===

fn read_lines(
    content: Vec<u8>,
    start: usize,
    pause: super::Pause<'_>,
) -> Result<Vec<u8>, ListError> {
    let mut packing = Packing::new(content, start, pause);
    let mut line_number = 0;
    while let Some(range) = packing.next_line() {
        line_number += 1;
        let line = packing.bytes(&range);
        let indent = line.len() - line.trim_ascii_start().len();
        let id = line.trim_ascii();
        if id.is_empty() || id.starts_with(b"#") {
            continue;
        }
        check_id(id).map_err(|flaw| ListError {
            line: line_number,
            column: column_after(&line[..indent + flaw.at]),
            reason: flaw.reason,
        })?;
        let id_start = range.start + indent;
        let id_end = id_start + id.len();
        packing.keep(id_start..id_end);
    }
    Ok(packing.finish())
}

/// The column which follows `prefix`, counted in characters as an editor does.
fn column_after(prefix: &[u8]) -> u64 {
    String::from_utf8_lossy(prefix).chars().count() as u64 + 1
}

// === CSV ===

fn read_csv(content: &[u8], column: &str) -> Result<Vec<u8>, ListError> {
    let mut reader = csv::Reader::from_reader(content);
    let headers = reader
        .byte_headers()
        .map_err(|error| csv_error(content, &error))?;
    let index = headers
        .iter()
        .position(|header| header.trim_ascii() == column.as_bytes())
        .ok_or_else(|| missing_column(headers, column))?;

    let mut ids = CollectedIds::for_file_of(content.len());
    let mut row = ByteRecord::new();
    while reader
        .read_byte_record(&mut row)
        .map_err(|error| csv_error(content, &error))?
    {
        let cell = row.get(index).unwrap_or_default();
        ids.push(cell).map_err(|flaw| {
            let offset = row.position().map_or(0, csv::Position::byte);
            row_error(
                content,
                offset,
                format!("column `{column}`: {}", flaw.reason),
            )
        })?;
    }
    Ok(ids.bytes)
}

fn missing_column(headers: &ByteRecord, column: &str) -> ListError {
    let existing: Vec<_> = headers
        .iter()
        .map(|header| format!("`{}`", header.trim_ascii().escape_ascii()))
        .collect();
    let existing = if existing.is_empty() {
        "nothing".to_owned()
    } else {
        existing.join(", ")
    };
    ListError::whole_file(format!(
        "no column `{column}`: the header row has {existing}"
    ))
}

fn csv_error(content: &[u8], error: &csv::Error) -> ListError {
    let reason = match error.kind() {
        ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => {
            format!("the row has {len} cells where the header row has {expected_len}")
        }
        _ => error.to_string(),
    };
    row_error(
        content,
        error.position().map_or(0, csv::Position::byte),
        reason,
    )
}

/// An error about the row at `offset`, whose line is counted here.
///
/// The reader's own line number is one short in a CRLF file, where it takes a row to begin with the
/// `\n` of the last.
fn row_error(content: &[u8], offset: u64, reason: String) -> ListError {
    let offset = usize::try_from(offset)
        .unwrap_or(usize::MAX)
        .min(content.len());
    let line_ends = content[offset..]
        .iter()
        .take_while(|byte| matches!(byte, b'\r' | b'\n'))
        .count();
    let line = 1 + memchr_iter(b'\n', &content[..offset + line_ends]).count() as u64;
    ListError {
        line,
        column: 1,
        reason,
    }
}

// === JSON ===

fn read_json(content: &[u8], field: Option<&str>) -> Result<Vec<u8>, ListError> {
    let mut ids = CollectedIds::for_file_of(content.len());
    let mut parser = serde_json::Deserializer::from_slice(content);
    JsonArray {
        ids: &mut ids,
        field,
    }
    .deserialize(&mut parser)
    .and_then(|()| parser.end())
    .map_err(|error| json_error(&error))?;
    Ok(ids.bytes)
}

fn json_error(error: &serde_json::Error) -> ListError {
    let place = format!(" at line {} column {}", error.line(), error.column());
    let message = error.to_string();
    ListError {
        line: error.line().max(1) as u64,
        column: error.column().max(1) as u64,
        reason: message.strip_suffix(&place).unwrap_or(&message).to_owned(),
    }
}

/// The array, read element by element so that it never stands in memory as a tree.
struct JsonArray<'a> {
    ids: &'a mut CollectedIds,
    field: Option<&'a str>,
}

/// One element of the array, or with `field: None` the id itself.
struct JsonElement<'a> {
    ids: &'a mut CollectedIds,
    field: Option<&'a str>,
}

/// A key which is copied only if it is written with escapes.
#[derive(Deserialize)]
struct JsonKey<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> DeserializeSeed<'de> for JsonArray<'_> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for JsonArray<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of user ids")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<(), A::Error> {
        let Self { ids, field } = self;
        while array
            .next_element_seed(JsonElement {
                ids: &mut *ids,
                field,
            })?
            .is_some()
        {}
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for JsonElement<'_> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for JsonElement<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field {
            Some(field) => write!(f, "an object with the field `{field}`"),
            None => f.write_str("a string or an integer of 64 bits"),
        }
    }

    fn visit_str<E: de::Error>(self, id: &str) -> Result<(), E> {
        if self.field.is_some() {
            return Err(E::invalid_type(Unexpected::Other("string"), &self));
        }
        self.ids
            .push(id.as_bytes())
            .map_err(|flaw| E::custom(flaw.reason))
    }

    fn visit_u64<E: de::Error>(self, id: u64) -> Result<(), E> {
        self.visit_str(&id.to_string())
    }

    fn visit_i64<E: de::Error>(self, id: i64) -> Result<(), E> {
        self.visit_str(&id.to_string())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        let Some(field) = self.field else {
            return Err(de::Error::invalid_type(Unexpected::Map, &self));
        };
        let mut found = false;
        while let Some(JsonKey(key)) = object.next_key()? {
            if key == field {
                object.next_value_seed(JsonElement {
                    ids: &mut *self.ids,
                    field: None,
                })?;
                found = true;
            } else {
                object.next_value::<IgnoredAny>()?;
            }
        }
        if found {
            Ok(())
        } else {
            Err(de::Error::custom(format_args!(
                "no field `{field}` in the object"
            )))
        }
    }
}

// === Ids ===

/// Ids gathered from a format whose bytes are not the ids' own, separated by `\n`.
struct CollectedIds {
    bytes: Vec<u8>,
}

impl CollectedIds {
    /// Room for all ids of a file: none is longer there than in CSV or JSON, so the buffer never
    /// moves while it grows, and the part which stays untouched costs no memory.
    fn for_file_of(length: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(length),
        }
    }

    fn push(&mut self, cell: &[u8]) -> Result<(), Flaw> {
        let id = cell.trim_ascii();
        check_id(id)?;
        if !id.is_empty() && !self.bytes.is_empty() {
            self.bytes.push(b'\n');
        }
        self.bytes.extend_from_slice(id);
        Ok(())
    }
}

/// What makes an id unusable, and at which byte of it.
struct Flaw {
    at: usize,
    reason: String,
}

fn check_id(id: &[u8]) -> Result<(), Flaw> {
    if id.iter().all(|byte| matches!(byte, b' '..=b'~')) {
        return Ok(());
    }
    let mut at = 0;
    for chunk in id.utf8_chunks() {
        if let Some((index, control)) = chunk.valid().char_indices().find(|(_, c)| c.is_control()) {
            return Err(Flaw {
                at: at + index,
                reason: control_reason(control),
            });
        }
        at += chunk.valid().len();
        if let Some(byte) = chunk.invalid().first() {
            return Err(Flaw {
                at,
                reason: format!("byte 0x{byte:02X} is not UTF-8; save the file as UTF-8"),
            });
        }
    }
    Ok(())
}

fn control_reason(control: char) -> String {
    match control {
        '\0' => {
            "NUL byte in an id; the file looks like UTF-16 or binary, save it as UTF-8".to_owned()
        }
        _ => format!("control character U+{:04X} in an id", control as u32),
    }
}

/// Where the text starts, after a UTF-8 byte order mark if there is one.
fn text_start(content: &[u8]) -> Result<usize, ListError> {
    match no_text(content) {
        Some(reason) => Err(ListError::whole_file(format!("the file {reason}"))),
        None if content.starts_with(&[0xEF, 0xBB, 0xBF]) => Ok(3),
        None => Ok(0),
    }
}

/// What is wrong with a file that is no text, where its beginning tells; completes "the file ...".
pub fn no_text(content: &[u8]) -> Option<&'static str> {
    let begins_with = |magic: &[u8]| content.starts_with(magic);
    match content {
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => Some("is UTF-16; save it as UTF-8"),
        [1..=0x7F, 0, 1..=0x7F, 0, ..] | [0, 1..=0x7F, 0, 1..=0x7F, ..] => {
            Some("looks like UTF-16; save it as UTF-8")
        }
        _ if begins_with(b"\x1F\x8B") => Some("is compressed with gzip; unpack it"),
        _ if begins_with(b"\x28\xB5\x2F\xFD") => Some("is compressed with zstd; unpack it"),
        _ if begins_with(b"\xFD7zXZ\0") => Some("is compressed with xz; unpack it"),
        _ if begins_with(b"PK\x03\x04") => {
            Some("is a ZIP archive or a spreadsheet; save its text as UTF-8")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(content: impl AsRef<[u8]>, format: &Format) -> Result<String, String> {
        read_ids(content.as_ref().to_vec(), format, &mut || ())
            .map(|ids| String::from_utf8(ids).unwrap())
            .map_err(|error| error.to_string())
    }

    fn lines(content: impl AsRef<[u8]>) -> Result<String, String> {
        ids(content, &Format::Lines)
    }

    fn csv(content: impl AsRef<[u8]>) -> Result<String, String> {
        ids(
            content,
            &Format::Csv {
                column: "user".to_owned(),
            },
        )
    }

    fn json(content: &str) -> Result<String, String> {
        ids(content, &Format::Json { field: None })
    }

    fn json_objects(content: &str) -> Result<String, String> {
        ids(
            content,
            &Format::Json {
                field: Some("id".to_owned()),
            },
        )
    }

    #[track_caller]
    fn assert_error(result: Result<String, String>, start: &str) {
        let error = result.unwrap_err();
        assert!(error.starts_with(start), "{error}");
    }

    #[test]
    fn lines_are_trimmed_and_comments_skipped() {
        let content =
            "\u{FEFF}ann\r\n\r\n# a comment\n  # another \0 one\n\t bob smith \t\nc#d\n名\n\nlast";
        assert_eq!(lines(content).unwrap(), "ann\nbob smith\nc#d\n名\nlast");
        assert_eq!(
            lines(b"ann\n# latin-1 comment \xE9\nbob\n").unwrap(),
            "ann\nbob"
        );
        assert_eq!(lines("").unwrap(), "");
    }

    #[test]
    fn a_bad_line_is_reported_with_its_place() {
        assert_error(
            lines("ann\r\n\n# x\n  b\u{0}b\n"),
            "line 4, column 4: NUL byte",
        );
        assert_error(
            lines("ann\nb\tc"),
            "line 2, column 2: control character U+0009",
        );
        assert_error(
            lines("é\u{85}x"),
            "line 1, column 2: control character U+0085",
        );
        assert_error(
            lines("ann\rbob\r"),
            "line 1, column 4: control character U+000D",
        );
        assert_error(
            lines(b"ann\n\xC3\xA9t\xE9\n"),
            "line 2, column 3: byte 0xE9 is not UTF-8",
        );
    }

    #[test]
    fn utf_16_is_named() {
        assert_error(
            lines(b"\xFF\xFEa\0n\0n\0\n\0"),
            "line 1, column 1: the file is UTF-16",
        );
        assert_error(csv(b"\xFE\xFF\0u"), "line 1, column 1: the file is UTF-16");
        assert_error(
            lines(b"a\0n\0n\0\n\0"),
            "line 1, column 1: the file looks like UTF-16",
        );
        assert_error(
            csv(b"\0u\0s\0e\0r\0\n"),
            "line 1, column 1: the file looks like UTF-16",
        );
        assert_error(
            lines(b"ann\nb\0o\0b\0"),
            "line 2, column 2: NUL byte in an id; the file looks like UTF-16",
        );
    }

    #[test]
    fn what_is_packed_is_named() {
        for (content, packing) in [
            (&b"\x1F\x8B\x08\0\0\0\0\0\0\x03"[..], "gzip"),
            (b"\x28\xB5\x2F\xFD\x04", "zstd"),
            (b"\xFD7zXZ\0\0", "xz"),
            (b"PK\x03\x04\x14\0", "a ZIP archive or a spreadsheet"),
        ] {
            for error in [lines(content), csv(content)] {
                let error = error.unwrap_err();
                assert!(
                    error.starts_with("line 1, column 1: the file is "),
                    "{error}"
                );
                assert!(error.contains(packing), "{error}");
            }
        }
    }

    #[test]
    fn csv_takes_the_named_column() {
        let content = "\u{FEFF}name, user \r\n\"Smith, Ann\",ann\r\n\"two\r\nlines\",\" b\"\"b \"\r\nx,\r\ny,7\r\n";
        assert_eq!(csv(content).unwrap(), "ann\nb\"b\n7");
        assert_eq!(csv("user").unwrap(), "");
        assert_eq!(csv("user\n#1\n").unwrap(), "#1");
    }

    #[test]
    fn a_bad_csv_is_reported_with_its_line() {
        assert_error(
            csv("name,id\nx,y\n"),
            "line 1, column 1: no column `user`: the header row has `name`, `id`",
        );
        assert_error(
            csv(""),
            "line 1, column 1: no column `user`: the header row has nothing",
        );
        for end in ["\n", "\r\n"] {
            let content = ["n,user", "a,ann", "", "b,b\u{1}", "c,c", ""].join(end);
            assert_error(
                csv(content),
                "line 4, column 1: column `user`: control character U+0001",
            );
            let content = ["n,user", "a,ann", "b", "c,c", ""].join(end);
            assert_error(
                csv(content),
                "line 3, column 1: the row has 1 cells where the header row has 2",
            );
        }
        assert_error(
            csv("user\nann\n\"b\nc\"\n"),
            "line 3, column 1: column `user`: control character U+000A",
        );
    }

    #[test]
    fn json_takes_strings_and_integers() {
        assert_eq!(
            json(r##"["ann", 7, -7, " 007 ", "", "\u00e9", "#1"]"##).unwrap(),
            "ann\n7\n-7\n007\né\n#1"
        );
        assert_eq!(
            json("\u{FEFF}[18446744073709551615]").unwrap(),
            "18446744073709551615"
        );
        assert_eq!(json("[]").unwrap(), "");
        assert_eq!(
            json_objects(r#"[{"id": "ann", "tags": [{"id": 1}]}, {"x": null, "\u0069d": 7}]"#)
                .unwrap(),
            "ann\n7"
        );
    }

    #[test]
    fn a_bad_json_is_reported_with_its_place() {
        assert_error(
            json("[\"ann\",\n 1.5]"),
            "line 2, column 4: invalid type: floating point `1.5`, expected a string",
        );
        assert_error(
            json("[18446744073709551616]"),
            "line 1, column 21: invalid type: floating point",
        );
        assert_error(
            json("[{\"id\": 1}]"),
            "line 1, column 2: invalid type: map, expected a string or an integer",
        );
        assert_error(
            json("{\"id\": 1}"),
            "line 1, column 1: invalid type: map, expected an array of user ids",
        );
        assert_error(json("[1"), "line 1, column 2: EOF while parsing a list");
        assert_error(json("[1]\nx"), "line 2, column 1: trailing characters");
        assert_error(json(""), "line 1, column 1: EOF");
        assert_error(
            json("[\"a\\nb\"]"),
            "line 1, column 7: control character U+000A in an id",
        );
        assert_error(
            json_objects("[\n{\"x\": 1}]"),
            "line 2, column 8: no field `id` in the object",
        );
        assert_error(
            json_objects("[\"ann\"]"),
            "line 1, column 6: invalid type: string, expected an object with the field `id`",
        );
        assert_error(
            json_objects("[{\"id\": null}]"),
            "line 1, column 12: invalid type: null",
        );
    }
}
