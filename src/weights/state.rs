//! The file in which weights that were set outlive the process (`stateFile`).
//!
//! It is replaced whole, and what it says is on the disk before anybody is told so. That may take as long as the
//! disk likes, so it happens on a thread that nobody else waits for.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::whole_file::{self, Access};

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

/// A state that is to be written.
#[derive(Debug)]
pub struct Unwritten {
    path: PathBuf,
    text: String,
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

// === impl Unwritten ===

impl Unwritten {
    /// What is set now, for this file.
    pub fn new(path: &Path, weights: &RuntimeWeights) -> Self {
        let weights = weights.iter();
        let weights = weights.map(|(route, set)| (Arc::clone(route), SetWeightsContent::new(set)));
        let content = Content {
            version: VERSION,
            weights: weights.collect(),
        };
        let text = serde_json::to_string_pretty(&content).expect("its keys are text");
        Self {
            path: path.to_owned(),
            text: text + "\n",
        }
    }

    /// Writes it. A file that holds something else than a state is left as it is: somebody may want to see it, and
    /// it may be somebody else's.
    ///
    /// # Errors
    ///
    /// Why the file says what it said before, as a half sentence.
    pub fn write(self) -> Result<(), String> {
        // Else the link would be replaced, and not what it leads to.
        let path = fs::canonicalize(&self.path).unwrap_or(self.path);
        read(&path).map_err(|reason| format!("what is there {reason}"))?;
        whole_file::replace(&path, self.text.as_bytes(), Access::Ours)
            .map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::whole_file::beside;

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
        // Somebody else's, or left over from a write that was cut off.
        let victim = directory.path().join("victim");
        fs::write(&victim, "mine").unwrap();
        symlink(&victim, beside(&path, "new")).unwrap();
        Unwritten::new(&path, &weights()).write().unwrap();
        assert_eq!(read(&path), Ok(weights()));
        assert_eq!(fs::read_to_string(&victim).unwrap(), "mine");
        assert!(!beside(&path, "new").exists());
    }

    #[test]
    fn what_a_link_leads_to_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let (link, path) = (
            directory.path().join("link"),
            directory.path().join("state.json"),
        );
        Unwritten::new(&path, &RuntimeWeights::none())
            .write()
            .unwrap();
        symlink(&path, &link).unwrap();
        Unwritten::new(&link, &weights()).write().unwrap();
        assert_eq!(read(&path), Ok(weights()));
    }

    #[test]
    fn a_file_that_is_no_state_is_told_and_left_as_it_is() {
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
            let refused = Unwritten::new(&path, &weights()).write().unwrap_err();
            assert!(
                refused.starts_with(&format!("what is there {words}")),
                "{refused}"
            );
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(read(&path).unwrap_err().starts_with("cannot be read: "));
    }
}
