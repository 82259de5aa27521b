use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::telemetry::metrics::Metrics;

const LIMIT: Duration = Duration::from_secs(60);

/// A log in a directory of its own.
struct Opened {
    directory: tempfile::TempDir,
    metrics: Metrics,
    sinks: Arc<Sinks>,
    log: Arc<AccessLog>,
}

impl Opened {
    fn new(format: Format) -> Self {
        Self::with(format, "")
    }

    /// As `new`, with a file that says this already.
    fn with(format: Format, before: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a.log"), before).unwrap();
        let metrics = Metrics::new(&[], 1);
        let sinks = Sinks::new(&metrics);
        let log = open(&directory.path().join("a.log"), format, &sinks);
        Self {
            directory,
            metrics,
            sinks,
            log,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("a.log")
    }

    fn worker(&self) -> Rc<WorkerLog> {
        WorkerLog::follow(None, Some(&self.log)).unwrap()
    }

    fn written(&self) -> String {
        assert!(self.sinks.flush(LIMIT));
        fs::read_to_string(self.path()).unwrap()
    }

    fn dropped(&self, lines: u32) -> bool {
        let line = format!("serin_access_log_dropped_total {lines}\n");
        self.metrics.render().contains(&line)
    }
}

fn open(path: &Path, format: Format, sinks: &Sinks) -> Arc<AccessLog> {
    let settings = Settings {
        output: Output::File(path.to_owned()),
        format,
        user: UserField::Hash,
        rotation: None,
        sampling: Arc::default(),
    };
    AccessLog::open(&settings, sinks).unwrap()
}

fn write_line(log: &Rc<WorkerLog>, path: &str) {
    let mut line = Line::begin(log, Instant::now());
    line.field("path", LogValue::Text(path));
    line.end();
}

#[test]
fn the_time_of_day_is_that_of_the_instant_to_the_millisecond() {
    let mut clock = Clock::now();
    let at = clock.instant;
    clock.time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_764_035_495_007);
    for (instant, expected) in [
        (at, "2025-11-25T01:51:35.007Z"),
        (at + Duration::from_millis(992), "2025-11-25T01:51:35.999Z"),
        (at + Duration::from_millis(993), "2025-11-25T01:51:36.000Z"),
        (at - Duration::from_millis(8), "2025-11-25T01:51:34.999Z"),
    ] {
        let mut text = Vec::new();
        clock.write(instant, &mut text);
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }
}

#[test]
fn lines_are_appended_and_reach_the_file_when_they_are_flushed() {
    let opened = Opened::with(Format::Text, "before\n");
    let worker = opened.worker();
    write_line(&worker, "/a");
    worker.flush();
    let text = opened.written();
    assert!(
        text.starts_with("before\nts=") && text.ends_with(" path=/a\n"),
        "{text}"
    );
}

#[test]
fn a_line_that_was_cut_by_a_crash_is_not_glued_to_the_next_one() {
    let opened = Opened::with(Format::Text, "ts=2026 pa");
    let worker = opened.worker();
    write_line(&worker, "/a");
    worker.flush();
    let text = opened.written();
    assert!(text.starts_with("ts=2026 pa\nts="), "{text}");
}

#[test]
fn a_file_that_was_renamed_is_left_when_it_is_opened_anew() {
    let opened = Opened::new(Format::Text);
    let worker = opened.worker();
    write_line(&worker, "/old");
    worker.flush();
    assert!(opened.sinks.flush(LIMIT));
    let old = opened.directory.path().join("a.log.1");
    fs::rename(opened.path(), &old).unwrap();
    opened.sinks.reopen();
    write_line(&worker, "/new");
    worker.flush();
    let text = opened.written();
    assert!(text.starts_with("ts=") && text.ends_with(" path=/new\n"));
    assert!(fs::read_to_string(&old).unwrap().ends_with(" path=/old\n"));
}

/// Which paths the lines of a file are for.
fn paths(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let paths = text.lines().filter_map(|line| line.split_once(" path="));
    paths.map(|(_, path)| path.to_owned()).collect()
}

#[test]
fn a_full_file_makes_room_and_the_oldest_of_those_that_are_kept_is_gone() {
    let opened = Opened::new(Format::Text);
    let settings = Settings {
        // Two lines do not fit.
        rotation: Some(Rotation { size: 60, keep: 2 }),
        ..opened.log.settings().clone()
    };
    let rotating = AccessLog::open(&settings, &opened.sinks).unwrap();
    assert!(Arc::ptr_eq(&opened.log.sink, &rotating.sink));
    let worker = WorkerLog::follow(None, Some(&rotating)).unwrap();
    for path in ["/1", "/2", "/3", "/4"] {
        write_line(&worker, path);
        worker.flush();
        assert!(opened.sinks.flush(LIMIT));
    }
    let file = |name| paths(&opened.directory.path().join(name));
    assert_eq!(file("a.log"), ["/4"]);
    assert_eq!(file("a.log.1"), ["/3"]);
    assert_eq!(file("a.log.2"), ["/2"]);
    assert!(!opened.directory.path().join("a.log.3").exists());
    // Somebody else has made room meanwhile: that must not be undone.
    fs::rename(opened.path(), opened.directory.path().join("moved")).unwrap();
    write_line(&worker, "/5");
    worker.flush();
    assert!(opened.sinks.flush(LIMIT));
    assert_eq!(
        (file("moved"), file("a.log")),
        (vec!["/4".into()], vec!["/5".into()])
    );
    assert_eq!(file("a.log.1"), ["/3"]);
    assert!(opened.dropped(0));
}

#[test]
fn a_full_file_that_cannot_be_moved_goes_on_growing() {
    let opened = Opened::new(Format::Text);
    // A directory that is not empty cannot be replaced by a file.
    fs::create_dir_all(opened.directory.path().join("a.log.1/b")).unwrap();
    let settings = Settings {
        rotation: Some(Rotation { size: 60, keep: 1 }),
        ..opened.log.settings().clone()
    };
    let rotating = AccessLog::open(&settings, &opened.sinks).unwrap();
    let worker = WorkerLog::follow(None, Some(&rotating)).unwrap();
    for path in ["/1", "/2", "/3"] {
        write_line(&worker, path);
        worker.flush();
    }
    opened.written();
    assert_eq!(paths(&opened.path()), ["/1", "/2", "/3"]);
    assert!(opened.dropped(0));
}

#[test]
fn lines_of_a_log_that_is_no_longer_in_force_are_written_at_once_and_awaited_at_the_end() {
    let opened = Opened::new(Format::Text);
    let other = open(
        &opened.directory.path().join("b"),
        Format::Text,
        &opened.sinks,
    );
    let worker = opened.worker();
    let long = Line::begin(&worker, Instant::now());
    write_line(&worker, "/first");
    let follower = WorkerLog::follow(Some(&worker), Some(&other)).unwrap();
    drop(worker);
    assert!(opened.written().ends_with(" path=/first\n"));
    long.end();
    assert_eq!(opened.written().lines().count(), 2);
    let same = WorkerLog::follow(Some(&follower), Some(&other)).unwrap();
    assert!(Rc::ptr_eq(&same, &follower));
}

#[test]
fn an_output_has_one_writer_whatever_the_format() {
    let opened = Opened::new(Format::Text);
    let json = open(&opened.path(), Format::Json, &opened.sinks);
    assert!(Arc::ptr_eq(&opened.log.sink, &json.sink));
}

#[test]
fn lines_that_cannot_be_written_are_counted() {
    let opened = Opened::new(Format::Json);
    // A device that is always full.
    let full = open(Path::new("/dev/full"), Format::Json, &opened.sinks);
    let worker = WorkerLog::follow(None, Some(&full)).unwrap();
    for _ in 0..3 {
        write_line(&worker, "/");
    }
    worker.flush();
    assert!(opened.sinks.flush(LIMIT));
    assert!(opened.dropped(3));
}

#[test]
fn pipes_and_directories_are_refused() {
    let opened = Opened::new(Format::Json);
    let pipe = opened.directory.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    for path in [pipe, opened.directory.path().to_owned()] {
        let settings = Settings {
            output: Output::File(path),
            ..opened.log.settings().clone()
        };
        let error = AccessLog::open(&settings, &opened.sinks)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("pipe") || error.contains("directory"),
            "{error}"
        );
    }
}

/// What a terminal or a reader of lines may take for something else than text.
fn is_harmless(text: &str) -> bool {
    let harmful = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    !text.trim_end_matches('\n').chars().any(harmful)
}

proptest! {
    #[test]
    fn whatever_is_in_a_field_a_line_is_one_line_and_can_be_read_back(
        bytes in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..6000),
            any::<String>().prop_map(String::into_bytes),
            "[\u{7f}-\u{a0}\u{2028}\u{2029}\"\\\\a\n]*".prop_map(String::into_bytes),
        ],
        number in any::<u64>(),
        microseconds in any::<u32>(),
    ) {
        let opened = Opened::new(Format::Json);
        let worker = opened.worker();
        let mut line = Line::begin(&worker, Instant::now());
        line.field("path", LogValue::Bytes(&bytes));
        line.field("bytes_in", LogValue::Number(number));
        let duration = Duration::from_micros(microseconds.into());
        line.field("duration_ms", LogValue::Milliseconds(duration));
        line.user("user-1");
        line.end();
        worker.flush();
        let text = opened.written();
        prop_assert!(text.ends_with('\n') && is_harmless(&text), "{text:?}");
        let object: serde_json::Value = serde_json::from_str(&text).unwrap();
        let cut = &bytes[..bytes.len().min(4096)];
        let (text, expected) = (object["path"].as_str().unwrap(), String::from_utf8_lossy(cut));
        prop_assert_eq!(text, &*expected);
        prop_assert_eq!(object["bytes_in"].as_u64(), Some(number));
        let milliseconds = object["duration_ms"].as_f64().unwrap();
        prop_assert!((milliseconds * 1000.0 - f64::from(microseconds)).abs() < 0.5);
        prop_assert_eq!(object["user"].as_str(), Some("7c7615c11438e5c9"));
    }

    #[test]
    fn a_text_line_has_its_fields_apart(value in any::<String>()) {
        let opened = Opened::new(Format::Text);
        let worker = opened.worker();
        write_line(&worker, &value);
        worker.flush();
        let text = opened.written();
        prop_assert!(is_harmless(&text), "{text:?}");
        let (_, shown) = text.trim_end_matches('\n').split_once(" path=").unwrap();
        let read = if shown.starts_with('"') {
            serde_json::from_str(shown).unwrap()
        } else {
            prop_assert!(!shown.contains([' ', '=', '"']) && !shown.is_empty());
            shown.to_owned()
        };
        prop_assert_eq!(read, value);
    }
}
