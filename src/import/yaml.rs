//! Writes YAML that a person will go on with: short mappings on one line, and quotes only where they are needed.

use std::fmt::Write;

/// A text with lines at several depths.
#[derive(Debug, Default)]
pub(super) struct Lines {
    text: String,
}

// === impl Lines ===

impl Lines {
    /// Adds a line, this many steps deep.
    pub(super) fn add(&mut self, depth: usize, line: &str) {
        // Writing to memory does not fail.
        let _ = writeln!(self.text, "{:1$}{line}", "", 2 * depth);
    }

    pub(super) fn into_text(self) -> String {
        self.text
    }
}

/// A scalar, in quotes unless it can only be a text, also within `{}` and `[]`.
pub(super) fn scalar(text: &str) -> String {
    let is_plain = text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '/')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte))
        && !is_a_word(text);
    match is_plain {
        true => text.to_owned(),
        // A string of JSON is one of YAML.
        false => serde_json::Value::from(text).to_string(),
    }
}

/// Words that some reader of YAML takes for something else than a text.
fn is_a_word(text: &str) -> bool {
    let words = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    words.iter().any(|word| text.eq_ignore_ascii_case(word))
}

/// A list on one line.
pub(super) fn list<'t>(texts: impl IntoIterator<Item = &'t str>) -> String {
    let texts: Vec<String> = texts.into_iter().map(scalar).collect();
    format!("[ {} ]", texts.join(", "))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_scalar_is_read_as_the_text_that_it_is(text in any::<String>()) {
            let read: Vec<String> = serde_saphyr::from_str(&list([&*text])).unwrap();
            prop_assert_eq!(read, vec![text]);
        }
    }

    #[test]
    fn quotes_are_where_they_are_needed() {
        let words = [
            "shop-stable",
            "/cart",
            "1.10",
            "on",
            "*.example.com",
            "a: b",
            "",
        ];
        let shown = list(words);
        let expected = r#"[ shop-stable, /cart, "1.10", "on", "*.example.com", "a: b", "" ]"#;
        assert_eq!(shown, expected);
    }
}
