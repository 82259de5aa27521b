//! The configuration as an operator meets it: files in `tests/data/problems` and what is said of
//! each, the files that are shipped, and files broken at random.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::sample::Index;

use super::file::json_schema;
use super::load::{load, load_list, load_text};
use super::problem::{Problems, Severity};

/// Rewrites what is compared with, instead of comparing: look at the difference before you commit
/// it.
fn update_golden() -> bool {
    std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1")
}

/// Compares with the content of a file, or writes it.
pub(crate) fn assert_golden(golden: &Path, actual: &str) {
    if update_golden() {
        fs::write(golden, actual).unwrap();
        return;
    }
    let expected =
        fs::read_to_string(golden).unwrap_or_else(|error| panic!("{}: {error}", golden.display()));
    if expected != actual {
        let same = expected
            .lines()
            .zip(actual.lines())
            .take_while(|(expected, actual)| expected == actual)
            .count();
        let rest = |text: &str| {
            text.lines()
                .skip(same)
                .take(12)
                .collect::<Vec<_>>()
                .join("\n")
        };
        let (name, line, expected, actual) =
            (golden.display(), same + 1, rest(&expected), rest(actual));
        panic!(
            "{name}:{line} differs (UPDATE_GOLDEN=1 rewrites it)\n--- expected\n{expected}\n--- actual\n{actual}"
        );
    }
}

/// The YAML files of a directory, which is relative to the package, as tests run there.
pub(crate) fn yaml_files(directory: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap_or_else(|error| panic!("{directory}: {error}"));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| {
        file.extension()
            .is_some_and(|extension| extension == "yaml")
    });
    files.sort();
    assert!(!files.is_empty(), "{directory} has no file");
    files
}

#[test]
fn the_lame_duck_leaves_half_of_the_time_for_requests_unless_the_file_says_otherwise() {
    for (shutdown, timeout, lame_duck) in [
        ("{}", 25_000, 5_000),
        ("{ timeout: 1s }", 1_000, 500),
        ("{ timeout: 1s, lameDuck: 1s }", 1_000, 1_000),
        ("{ lameDuck: 0s }", 25_000, 0),
    ] {
        let text = format!(
            "listeners: [ {{ name: web, address: '127.0.0.1:0' }} ]\nroutes: []\nshutdown: {shutdown}\n"
        );
        let loaded = load_text(Path::new("serin.yaml"), &text, &mut load_list);
        let shutdown = loaded.unwrap().config.shutdown;
        let found = [shutdown.timeout, shutdown.lame_duck].map(|time| time.as_millis());
        assert_eq!(found, [timeout, lame_duck]);
    }
}

#[test]
fn problems_are_said_as_the_golden_files_say() {
    for file in yaml_files("tests/data/problems") {
        let problems = match load(&file, &mut load_list) {
            Ok(loaded) => loaded.warnings,
            Err(problems) => problems,
        };
        assert!(
            !problems.problems.is_empty(),
            "{} has no problem",
            file.display()
        );
        assert_golden(
            &file.with_extension("txt"),
            &(problems.render(false) + "\n"),
        );
    }
}

#[test]
fn every_problem_points_at_the_line_and_column_that_are_printed() {
    for file in yaml_files("tests/data/problems") {
        let Err(problems) = load(&file, &mut load_list) else {
            continue;
        };
        let rendered = problems.render(false);
        for problem in &problems.problems {
            let place = format!(
                "{}:{}:{}",
                file.display(),
                problem.span.line,
                problem.span.column
            );
            assert!(rendered.contains(&place), "{place} is not in\n{rendered}");
        }
    }
}

#[test]
fn a_file_that_does_not_exist_or_is_not_text_is_a_problem_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let gone = directory.path().join("gone.yaml");
    assert!(message(&gone).contains("does not exist"));
    let binary = directory.path().join("binary.yaml");
    fs::write(&binary, b"listeners: \xff\n").unwrap();
    assert!(message(&binary).contains("not UTF-8 text: line 1 has the byte 0xFF"));
    fs::write(&binary, b"listeners: []\n# caf\xE9\n").unwrap();
    assert!(message(&binary).contains("line 2 has the byte 0xE9"));
    let utf16: Vec<u8> = "listeners: []\n"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    fs::write(&binary, &utf16).unwrap();
    assert!(message(&binary).contains("looks like UTF-16"));
    fs::write(&binary, b"\x1F\x8B\x08").unwrap();
    assert!(message(&binary).contains("compressed with gzip"));
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("serin.yaml");
    fs::write(
        &file,
        "\u{FEFF}listeners: [ { name: web, address: '127.0.0.1:0' } ]\nroutes: []\n",
    )
    .unwrap();
    assert!(load(&file, &mut load_list).is_ok());
}

fn message(file: &Path) -> String {
    let problems = load(file, &mut load_list).unwrap_err();
    assert_eq!(problems.problems.len(), 1);
    problems.problems[0].message.clone()
}

#[test]
fn an_empty_user_list_is_a_list_and_the_same_file_under_two_names_is_read_once() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("empty.txt"), "").unwrap();
    let text = "listeners: [ { name: web, address: '127.0.0.1:0' } ]\nroutes: []\n\
                userLists: [ { name: one, file: empty.txt }, { name: two, file: empty.txt } ]\n";
    let loaded = load_text(&directory.path().join("serin.yaml"), text, &mut load_list).unwrap();
    assert_eq!((loaded.config.user_lists.len(), loaded.lists.len()), (2, 1));
}

#[test]
fn a_mapping_written_as_a_list_is_not_taken_by_position() {
    let text = "listeners: [ [ web, '127.0.0.1:0', [], {} ] ]\nroutes: []\n";
    let problems = load_text(Path::new("serin.yaml"), text, &mut load_list).unwrap_err();
    assert!(
        problems
            .to_string()
            .contains("expected a mapping, found a list"),
        "{problems}"
    );
}

#[test]
fn words_that_old_yaml_took_for_booleans_are_names() {
    let text = "listeners: [ { name: on, address: '127.0.0.1:0' } ]\n\
                backends: [ { name: off, endpoints: [ '127.0.0.1:9001' ] } ]\n\
                routes: [ { name: no, backendRefs: [ { name: off } ] } ]\n";
    let loaded = load_text(Path::new("serin.yaml"), text, &mut load_list).unwrap();
    assert_eq!(&*loaded.config.backends[0].name, "off");
}

// === What is shipped ===

#[test]
fn the_published_schema_is_the_schema() {
    assert_golden(Path::new("config/schema.json"), &json_schema());
}

#[test]
fn the_reference_and_every_example_load_without_a_word() {
    let mut files = yaml_files("config/examples");
    files.extend(yaml_files("config"));
    assert!(
        files
            .iter()
            .any(|file| file.ends_with("config/reference.yaml"))
    );
    for file in files {
        match load(&file, &mut load_list) {
            Ok(loaded) => assert!(
                loaded.warnings.problems.is_empty(),
                "\n{}",
                loaded.warnings.render(false)
            ),
            Err(problems) => panic!("\n{}", problems.render(false)),
        }
    }
}

// === Files broken at random ===

/// Loads a text as if it stood in `config/reference.yaml`, so that the files it names are there.
fn load_reference(text: &str) -> Result<(), Problems> {
    load_text(Path::new("config/reference.yaml"), text, &mut load_list).map(|_| ())
}

/// Either it loads, or an error says why not; and whatever is said can be printed.
fn assert_judged(text: &str) -> Result<(), TestCaseError> {
    let Err(problems) = load_reference(text) else {
        return Ok(());
    };
    prop_assert!(problems.errors() > 0, "refused without an error:\n{}", text);
    for problem in &problems.problems {
        let place = &problem.span;
        prop_assert!(place.line >= 1 && place.column >= 1, "{:?}", problem);
        prop_assert!(
            place.line <= text.lines().count().max(1) + 1,
            "{:?} is past the end of\n{}",
            problem,
            text
        );
        prop_assert!(place.bytes.start <= text.len(), "{:?}", problem);
        prop_assert!(problem.severity == Severity::Warning || !problem.message.is_empty());
    }
    let styled = problems.render(true);
    prop_assert!(styled.len() >= problems.problems.len());
    Ok(())
}

fn reference() -> String {
    fs::read_to_string("config/reference.yaml").unwrap()
}

/// The byte at which the character begins that `index` falls into.
fn boundary(text: &str, index: Index) -> usize {
    let at = index.index(text.len());
    (0..=at)
        .rev()
        .find(|at| text.is_char_boundary(*at))
        .unwrap_or(0)
}

/// Values and fragments that a hand may well write where another kind belongs.
const FRAGMENTS: [&str; 20] = [
    "", "~", "1", "-1", "1.5", "true", "text", "[]", "{}", "[a, b]", "{ a: b }", "[{}]", "\"\"",
    "&a", "*a", "<<: {}", "- -", "? x", "!!set", "'",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_file_cut_short_loads_or_is_refused_with_a_reason(cut: Index) {
        let text = reference();
        assert_judged(&text[..boundary(&text, cut)])?;
    }

    #[test]
    fn a_file_with_another_character_loads_or_is_refused_with_a_reason(at: Index, other in any::<char>()) {
        let mut text = reference();
        let at = boundary(&text, at);
        let end = at + text[at..].chars().next().map_or(0, char::len_utf8);
        text.replace_range(at..end, &other.to_string());
        assert_judged(&text)?;
    }

    #[test]
    fn a_file_with_a_punctuation_mark_more_loads_or_is_refused_with_a_reason(
        at: Index, mark in prop::sample::select(b":-,[]{}#&*!|>'\"%@`? \n\t".to_vec()),
    ) {
        let mut text = reference();
        let at = boundary(&text, at);
        text.insert(at, char::from(mark));
        assert_judged(&text)?;
    }

    #[test]
    fn a_file_with_lines_gone_doubled_or_swapped_loads_or_is_refused_with_a_reason(
        moves in prop::collection::vec((any::<Index>(), any::<Index>(), 0..3_u8), 1..6),
    ) {
        let text = reference();
        let mut lines: Vec<&str> = text.lines().collect();
        for (from, to, how) in moves {
            let (from, to) = (from.index(lines.len()), to.index(lines.len()));
            match how {
                0 => drop(lines.remove(from)),
                1 => lines.insert(to, lines[from]),
                _ => lines.swap(from, to),
            }
        }
        assert_judged(&lines.join("\n"))?;
    }

    #[test]
    fn a_file_with_wrong_values_loads_or_is_refused_with_a_reason(
        changes in prop::collection::vec((any::<Index>(), prop::sample::select(&FRAGMENTS[..])), 1..12),
    ) {
        let text = reference();
        let mut lines: Vec<String> = text.lines().filter(|line| line.contains(':')).map(str::to_owned).collect();
        for (line, fragment) in changes {
            let position = line.index(lines.len());
            let line = &mut lines[position];
            let key_end = line.find(':').map_or(0, |colon| colon + 1);
            line.replace_range(key_end.., &format!(" {fragment}"));
        }
        assert_judged(&lines.join("\n"))?;
    }
}

/// More nodes than the YAML library reads by default.
#[test]
fn a_file_of_twelve_thousand_routes_is_read() {
    let mut text = "listeners: [{ name: web, address: '127.0.0.1:80' }]\n\
                    backends: [{ name: only, endpoints: ['127.0.0.1:81'] }]\n\
                    routes:\n"
        .to_owned();
    for route in 0..12_000 {
        text.push_str(&format!(
            "- {{ name: r{route}, hostnames: [h{route}.example], backendRefs: [{{ name: only }}], \
             matches: [{{ path: {{ value: /a }}, method: GET }}], gray: {{ identity: [{{ header: x-user-id }}] }} }}\n"
        ));
    }
    let loaded = load_text(Path::new("many.yaml"), &text, &mut load_list);
    assert_eq!(
        loaded
            .map(|loaded| loaded.config.routes.len())
            .map_err(|problems| problems.to_string()),
        Ok(12_000)
    );
}
