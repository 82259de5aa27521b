//! Path templates (google/api/http.proto, "Path template syntax"):
//!
//! ```text
//! Template = "/" Segments [ ":" Verb ]
//! Segments = Segment { "/" Segment }
//! Segment  = "*" | "**" | LITERAL | "{" FieldPath [ "=" Segments ] "}"
//! ```

use std::cmp::Reverse;
use std::ops::Range;

use percent_encoding::percent_decode_str;

/// What a path template captured: fields by their path in the message, with their text. It is bytes,
/// since escapes may make anything of it, and that is for whoever fills the message to refuse.
pub type Captures = Vec<(String, Vec<u8>)>;

/// A path template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    segments: Vec<Segment>,
    variables: Vec<Variable>,
    verb: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Literal(String),
    /// `*`: one segment.
    One,
    /// `**`: any number of segments; the last of a template.
    Rest,
}

/// A field, and the segments that it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Variable {
    field: String,
    segments: Range<usize>,
}

// === impl Template ===

impl Template {
    /// Parses a template.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let malformed = |reason: &str| format!("the template `{text}` {reason}");
        let rest = text
            .strip_prefix('/')
            .ok_or_else(|| malformed("does not begin with `/`"))?;
        let last = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (rest, verb) = match rest[last..].rfind(':') {
            Some(colon) if !rest[last + colon..].contains('}') => (
                &rest[..last + colon],
                Some(rest[last + colon + 1..].to_owned()),
            ),
            _ => (rest, None),
        };
        let mut template = Self {
            segments: Vec::new(),
            variables: Vec::new(),
            verb,
        };
        let mut rest = Some(rest);
        while let Some(text) = rest {
            let tail = if let Some(inner) = text.strip_prefix('{') {
                let (inner, tail) = inner
                    .split_once('}')
                    .ok_or_else(|| malformed("lacks a `}`"))?;
                let (field, pattern) = inner.split_once('=').unwrap_or((inner, "*"));
                let first = template.segments.len();
                for segment in pattern.split('/') {
                    template.push(segment).map_err(malformed)?;
                }
                template.variables.push(Variable {
                    field: field.to_owned(),
                    segments: first..template.segments.len(),
                });
                tail
            } else {
                let (segment, tail) = text.split_at(text.find('/').unwrap_or(text.len()));
                template.push(segment).map_err(malformed)?;
                tail
            };
            rest = match tail {
                "" => None,
                tail => Some(
                    tail.strip_prefix('/')
                        .ok_or_else(|| malformed("is malformed"))?,
                ),
            };
        }
        let rests = template.segments.iter().rev().skip(1);
        if rests.clone().any(|segment| *segment == Segment::Rest) {
            return Err(malformed("has `**` before its end"));
        }
        Ok(template)
    }

    fn push(&mut self, segment: &str) -> Result<(), &'static str> {
        self.segments.push(match segment {
            "" => return Err("has an empty segment"),
            "*" => Segment::One,
            "**" => Segment::Rest,
            literal if literal.contains(['*', '{', '}']) => return Err("is malformed"),
            literal => Segment::Literal(literal.to_owned()),
        });
        Ok(())
    }

    /// The fields that it captures.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        self.variables.iter().map(|variable| &*variable.field)
    }

    /// Templates that say more themselves come first: literals before `*`, `*` before `**`, longer
    /// ones before shorter.
    pub fn rank(&self) -> (Vec<u8>, Reverse<bool>) {
        let kind = |segment: &Segment| match segment {
            Segment::Literal(_) => 0,
            Segment::One => 1,
            Segment::Rest => 3,
        };
        // What ends here comes after what goes on.
        let kinds = self.segments.iter().map(kind).chain([2]).collect();
        (kinds, Reverse(self.verb.is_some()))
    }

    /// What it captures of a path, if the path is one of its; `parts` is what stands between the
    /// slashes after the first.
    pub fn captures(&self, parts: &[&str]) -> Option<Captures> {
        let takes_rest = self.segments.last() == Some(&Segment::Rest);
        let fixed = self.segments.len() - usize::from(takes_rest);
        if parts.len() < fixed || !takes_rest && parts.len() > fixed {
            return None;
        }
        let (last, front) = parts.split_last()?;
        let last = match &self.verb {
            Some(verb) => last.strip_suffix(verb.as_str())?.strip_suffix(':')?,
            None => last,
        };
        let pieces = || front.iter().copied().chain([last]);
        let fits = |(segment, piece): (&Segment, &str)| match segment {
            Segment::Literal(literal) => literal == piece,
            Segment::One => !piece.is_empty(),
            Segment::Rest => true,
        };
        if !self.segments.iter().zip(pieces()).all(fits) {
            return None;
        }
        let capture = |variable: &Variable| {
            let Range { start, end } = variable.segments;
            let goes_on = takes_rest && end == self.segments.len();
            let is_one = end - start == 1 && !goes_on;
            let end = if goes_on { parts.len() } else { end };
            let taken: Vec<&str> = pieces().take(end).skip(start).collect();
            (variable.field.clone(), unescaped(&taken.join("/"), is_one))
        };
        Some(self.variables.iter().map(capture).collect())
    }
}

/// Undoes the escapes of what a variable took. One that may take several segments keeps `%2F`: it
/// would become one of the slashes between them (google/api/http.proto).
fn unescaped(text: &str, is_one: bool) -> Vec<u8> {
    if is_one {
        return percent_decode_str(text).collect();
    }
    let kept = text.replace("%2F", "%252F").replace("%2f", "%252f");
    percent_decode_str(&kept).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn captures(template: &str, path: &str) -> Option<Captures> {
        let parts: Vec<&str> = path[1..].split('/').collect();
        Template::parse(template).unwrap().captures(&parts)
    }

    fn pairs(pairs: &[(&str, &str)]) -> Option<Captures> {
        let owned = |(field, text): &(&str, &str)| ((*field).to_owned(), (*text).into());
        Some(pairs.iter().map(owned).collect())
    }

    #[test]
    fn paths_are_taken_apart_as_the_definition_says() {
        for (template, path, expected) in [
            ("/v1/items", "/v1/items", pairs(&[])),
            ("/v1/items", "/v1/items/", None),
            ("/v1/items/{id}", "/v1/items/7", pairs(&[("id", "7")])),
            ("/v1/items/{id}", "/v1/items/", None),
            ("/v1/items/{id}", "/v1/items/7/8", None),
            (
                "/v1/items/{id}",
                "/v1/items/a%20b%2Fc",
                pairs(&[("id", "a b/c")]),
            ),
            (
                "/v1/{name=shelves/*/books/*}",
                "/v1/shelves/1/books/2",
                pairs(&[("name", "shelves/1/books/2")]),
            ),
            (
                "/v1/{name=shelves/*}/books/{book.id}",
                "/v1/shelves/1/books/2",
                pairs(&[("name", "shelves/1"), ("book.id", "2")]),
            ),
            ("/v1/{name=shelves/*}", "/v1/shops/1", None),
            (
                "/v1/files/{path=**}",
                "/v1/files/a/b/c",
                pairs(&[("path", "a/b/c")]),
            ),
            ("/v1/files/{path=**}", "/v1/files", pairs(&[("path", "")])),
            (
                "/v1/files/{path=**}",
                "/v1/files/a%20b%2Fc%2fd%252F",
                pairs(&[("path", "a b%2Fc%2fd%2F")]),
            ),
            (
                "/v1/{name=shelves/*}",
                "/v1/shelves/a%20b%2Fc",
                pairs(&[("name", "shelves/a b%2Fc")]),
            ),
            (
                "/v1/{name=**}:verb",
                "/v1/a/b:verb",
                pairs(&[("name", "a/b")]),
            ),
            (
                "/v1/items/{id}:cancel",
                "/v1/items/7:cancel",
                pairs(&[("id", "7")]),
            ),
            ("/v1/items/{id}:cancel", "/v1/items/7", None),
            ("/v1/*/{id}", "/v1/any/7", pairs(&[("id", "7")])),
        ] {
            assert_eq!(captures(template, path), expected, "{template} {path}");
        }
    }

    #[test]
    fn what_is_no_template_is_refused() {
        for text in [
            "v1",
            "/v1/{id",
            "/v1/{id}x",
            "/v1//a",
            "/{a=**}/b",
            "/a*b",
            "/v1/",
        ] {
            assert!(Template::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_says_more_is_asked_first() {
        let mut templates = [
            "/v1/{a=**}",
            "/v1/{a}",
            "/v1/{a}/b",
            "/v1/items",
            "/v1/{a}:verb",
        ];
        templates.sort_by_key(|template| Template::parse(template).unwrap().rank());
        assert_eq!(
            templates,
            [
                "/v1/items",
                "/v1/{a}/b",
                "/v1/{a}:verb",
                "/v1/{a}",
                "/v1/{a=**}"
            ]
        );
    }

    proptest! {
        #[test]
        fn nothing_is_a_panic(template in "[/a{}=*:.%0-9]{0,20}", path in "[/a:%0-9]{0,20}") {
            if let Ok(template) = Template::parse(&template) {
                let _ = template.captures(&path.split('/').collect::<Vec<_>>());
            }
        }
    }
}
