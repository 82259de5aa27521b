use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::*;

const LIMIT: Duration = Duration::from_secs(60);

fn open(path: &Path, format: Format) -> (Metrics, Arc<AccessLog>) {
    let metrics = Metrics::new(&[], 1);
    let settings = Settings {
        output: Output::File(path.to_owned()),
        format,
        user: UserField::Hash,
    };
    let log = AccessLog::open(&settings, &metrics).unwrap();
    (metrics, log)
}

fn write_line(log: &Rc<WorkerLog>, path: &str) {
    let mut line = Line::begin(log, Instant::now());
    line.field("path", LogValue::Text(path));
    line.end();
}

fn written(path: &Path, log: &Arc<AccessLog>) -> String {
    assert!(log.flush(LIMIT));
    fs::read_to_string(path).unwrap()
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
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    fs::write(&path, "before\n").unwrap();
    let (_metrics, log) = open(&path, Format::Text);
    let worker = WorkerLog::follow(None, Some(&log)).unwrap();
    write_line(&worker, "/a");
    worker.flush();
    let text = written(&path, &log);
    assert!(
        text.starts_with("before\nts=") && text.ends_with(" path=/a\n"),
        "{text}"
    );
}

#[test]
fn a_file_that_was_renamed_is_left_when_it_is_opened_anew() {
    let directory = tempfile::tempdir().unwrap();
    let (path, old) = (directory.path().join("a.log"), directory.path().join("a.1"));
    let (_metrics, log) = open(&path, Format::Text);
    let worker = WorkerLog::follow(None, Some(&log)).unwrap();
    write_line(&worker, "/old");
    worker.flush();
    assert!(log.flush(LIMIT));
    fs::rename(&path, &old).unwrap();
    log.reopen();
    write_line(&worker, "/new");
    worker.flush();
    assert!(written(&path, &log).ends_with(" path=/new\n"));
    assert!(fs::read_to_string(&old).unwrap().ends_with(" path=/old\n"));
}

#[test]
fn lines_of_a_log_that_is_no_longer_in_force_are_written_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let (path, other) = (directory.path().join("a"), directory.path().join("b"));
    let (_metrics, log) = open(&path, Format::Text);
    let (_metrics, next) = open(&other, Format::Text);
    let worker = WorkerLog::follow(None, Some(&log)).unwrap();
    let long = Line::begin(&worker, Instant::now());
    write_line(&worker, "/first");
    let follower = WorkerLog::follow(Some(&worker), Some(&next)).unwrap();
    assert!(written(&path, &log).ends_with(" path=/first\n"));
    long.end();
    assert_eq!(written(&path, &log).lines().count(), 2);
    let same = WorkerLog::follow(Some(&follower), Some(&next)).unwrap();
    assert!(Rc::ptr_eq(&same, &follower));
}

#[test]
fn lines_that_cannot_be_written_are_counted() {
    // A device that is always full.
    let (metrics, log) = open(Path::new("/dev/full"), Format::Json);
    let worker = WorkerLog::follow(None, Some(&log)).unwrap();
    for _ in 0..3 {
        write_line(&worker, "/");
    }
    worker.flush();
    assert!(log.flush(LIMIT));
    assert!(
        metrics
            .render()
            .contains("serin_access_log_dropped_total 3\n")
    );
}

#[test]
fn a_writer_that_stands_still_costs_lines_and_holds_nobody_up() {
    let (queue, messages) = sync_channel(1);
    let metrics = Metrics::new(&[], 1);
    let log = Arc::new(AccessLog {
        settings: Settings {
            output: Output::Stdout,
            format: Format::Text,
            user: UserField::Omit,
        },
        queue,
        reopen: Arc::default(),
        dropped: metrics.counter("serin_access_log_dropped_total", &[]),
    });
    let worker = WorkerLog::follow(None, Some(&log)).unwrap();
    for _ in 0..3 {
        write_line(&worker, "/");
        worker.flush();
    }
    assert!(!log.flush(Duration::ZERO));
    assert!(
        metrics
            .render()
            .contains("serin_access_log_dropped_total 2\n")
    );
    drop(messages);
}

#[test]
fn pipes_and_directories_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let metrics = Metrics::new(&[], 1);
    for path in [pipe, directory.path().to_owned()] {
        let settings = Settings {
            output: Output::File(path),
            format: Format::Json,
            user: UserField::Hash,
        };
        let error = AccessLog::open(&settings, &metrics)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("pipe") || error.contains("directory"),
            "{error}"
        );
    }
}

proptest! {
    #[test]
    fn whatever_is_in_a_field_a_line_is_one_line_and_can_be_read_back(
        bytes in proptest::collection::vec(any::<u8>(), 0..6000),
        number in any::<u64>(),
        microseconds in any::<u32>(),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("access.log");
        let (_metrics, log) = open(&path, Format::Json);
        let worker = WorkerLog::follow(None, Some(&log)).unwrap();
        let mut line = Line::begin(&worker, Instant::now());
        line.field("path", LogValue::Bytes(&bytes));
        line.field("bytes_in", LogValue::Number(number));
        let duration = Duration::from_micros(microseconds.into());
        line.field("duration_ms", LogValue::Milliseconds(duration));
        line.user("user-1");
        line.end();
        worker.flush();
        let text = written(&path, &log);
        prop_assert_eq!(text.lines().count(), 1);
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
    fn a_text_line_has_its_fields_apart(value in "\\PC*") {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("access.log");
        let (_metrics, log) = open(&path, Format::Text);
        let worker = WorkerLog::follow(None, Some(&log)).unwrap();
        write_line(&worker, &value);
        worker.flush();
        let text = written(&path, &log);
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
