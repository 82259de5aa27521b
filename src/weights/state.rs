//! The file in which weights that were set outlive the process (`stateFile`).
//!
//! It is replaced whole, and what it says is on the disk before anybody is told so. That may take as long as the
//! disk likes, so it happens on a thread that nobody else waits for.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{RuntimeWeights, SetWeights, Weights};

/// The file's shape.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Content {
    /// The one that there is.
    version: u32,
    weights: BTreeMap<Arc<str>, SetWeightsContent>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SetWeightsContent {
    weights: Weights,
    over: Weights,
    set_by: String,
    set_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Writes states to the file, in the order in which they came about.
#[derive(Clone, Debug)]
pub struct StateFile {
    path: PathBuf,
    /// Which state was written last.
    written: Arc<Mutex<u64>>,
    /// How many there were.
    count: u64,
}

/// A state that is to be written.
#[derive(Debug)]
pub struct Unwritten {
    path: PathBuf,
    text: String,
    number: u64,
    written: Arc<Mutex<u64>>,
}

const VERSION: u32 = 1;

/// Reads what was set before; nothing where there is no file yet.
///
/// # Errors
///
/// What is wrong with the file, as a half sentence.
pub fn read(path: &Path) -> Result<RuntimeWeights, String> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(RuntimeWeights::default());
        }
        Err(error) => return Err(format!("cannot be read: {error}")),
    };
    let file: Content =
        serde_json::from_slice(&text).map_err(|error| format!("cannot be used: {error}"))?;
    if file.version != VERSION {
        let version = file.version;
        return Err(format!(
            "has version {version}, and this Serin knows {VERSION}"
        ));
    }
    let all = file.weights.into_iter();
    let all = all.map(|(route, set)| Ok((route, set.into_set()?)));
    all.collect()
}

// === impl SetWeightsContent ===

impl SetWeightsContent {
    fn new(set: &SetWeights) -> Self {
        Self {
            weights: set.weights.clone(),
            over: set.over.clone(),
            set_by: set.by.clone(),
            set_at: humantime::format_rfc3339_millis(set.at).to_string(),
            reason: set.reason.clone(),
        }
    }

    fn into_set(self) -> Result<SetWeights, String> {
        let at = humantime::parse_rfc3339(&self.set_at);
        Ok(SetWeights {
            weights: self.weights,
            over: self.over,
            by: self.set_by,
            at: at.map_err(|error| format!("cannot be used: `{}`: {error}", self.set_at))?,
            reason: self.reason,
        })
    }
}

// === impl StateFile ===

impl StateFile {
    /// Writes to this file.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            written: Arc::default(),
            count: 0,
        }
    }

    /// Where to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A state that came about after all those before.
    pub fn next(&mut self, weights: &RuntimeWeights) -> Unwritten {
        self.count += 1;
        let weights = weights.iter();
        let weights = weights.map(|(route, set)| (Arc::clone(route), SetWeightsContent::new(set)));
        let file = Content {
            version: VERSION,
            weights: weights.collect(),
        };
        let text = serde_json::to_string_pretty(&file).expect("its keys are text");
        Unwritten {
            path: self.path.clone(),
            text: text + "\n",
            number: self.count,
            written: Arc::clone(&self.written),
        }
    }
}

// === impl Unwritten ===

impl Unwritten {
    /// Writes it, unless a later one was written already.
    ///
    /// # Errors
    ///
    /// Whatever the file system has against it; the file says what it said before.
    pub fn write(self) -> io::Result<()> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if *written > self.number {
            return Ok(());
        }
        replace(&self.path, self.text.as_bytes())?;
        *written = self.number;
        Ok(())
    }
}

/// Replaces a file whole, so that whoever reads it finds the old content or the new one, also after the power
/// was cut.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let mut file = File::create(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

/// Puts a file aside that cannot be used, so that nothing is lost when it is replaced; gives where it is now.
///
/// # Errors
///
/// Whatever the file system has against it.
pub fn put_aside(path: &Path) -> io::Result<PathBuf> {
    let mut aside = path.as_os_str().to_owned();
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    aside.push(format!(".unusable-{}", since.unwrap_or_default().as_secs()));
    fs::rename(path, &aside)?;
    Ok(aside.into())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn weights() -> RuntimeWeights {
        let weights =
            |stable, canary| Weights::from([("stable".into(), stable), ("canary".into(), canary)]);
        let set = SetWeights {
            weights: weights(1, 0),
            over: weights(90, 10),
            by: "on-call".to_owned(),
            at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_000_000_123),
            reason: Some("errors \"on\" checkout".to_owned()),
        };
        [("shop".into(), set)].into_iter().collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        assert_eq!(read(&path), Ok(RuntimeWeights::default()));
        let mut file = StateFile::new(path.clone());
        file.next(&weights()).write().unwrap();
        assert_eq!(read(&path), Ok(weights()));
        let names = fs::read_dir(directory.path()).unwrap();
        assert_eq!(names.count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_later_state_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = StateFile::new(directory.path().join("state.json"));
        let first = file.next(&weights());
        file.next(&RuntimeWeights::default()).write().unwrap();
        first.write().unwrap();
        assert_eq!(read(file.path()), Ok(RuntimeWeights::default()));
    }

    #[test]
    fn a_file_that_cannot_be_used_is_told_and_can_be_put_aside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        for (text, words) in [
            ("", "cannot be used: EOF"),
            ("{}", "cannot be used: missing field `version`"),
            (
                r#"{"version": 2, "weights": {}}"#,
                "has version 2, and this Serin knows 1",
            ),
            (
                r#"{"version": 1, "weights": {}, "more": 1}"#,
                "cannot be used: unknown field `more`",
            ),
            (
                r#"{"version": 1, "weights": {"shop": {"weights": {}, "over": {}, "setBy": "a", "setAt": "now"}}}"#,
                "cannot be used: `now`",
            ),
        ] {
            fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err();
            assert!(error.starts_with(words), "{error}");
        }
        let aside = put_aside(&path).unwrap();
        assert!(aside.exists() && !path.exists());
        fs::create_dir(&path).unwrap();
        assert!(read(&path).unwrap_err().starts_with("cannot be read: "));
    }
}
