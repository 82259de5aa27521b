//! Files that are replaced whole: whoever reads one finds the old content or the new one, also after the power was
//! cut.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// Whose a file is afterwards, and who may do what with it.
#[derive(Clone, Copy, Debug)]
pub enum Access<'m> {
    /// It is ours alone.
    Ours,
    /// It is ours, and others may do with it what they may with this one.
    As(&'m Metadata),
    /// It is whose this one is, and as accessible.
    Same(&'m Metadata),
}

/// Replaces a file, or makes one that is there in full or not at all. Returns when it is on the disk.
///
/// # Errors
///
/// Whatever the operating system has against it; the file says what it said before.
pub fn replace(path: &Path, content: &[u8], access: Access<'_>) -> io::Result<()> {
    let beside = beside(path, "new");
    let written = write(&beside, content, access).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // Half of a file is of no use to anybody.
        let _ = fs::remove_file(&beside);
    }
    written?;
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

fn write(path: &Path, content: &[u8], access: Access<'_>) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    if let Access::Same(other) = access {
        let ours = file.metadata()?;
        if (ours.uid(), ours.gid()) != (other.uid(), other.gid()) {
            fchown(&file, Some(other.uid()), Some(other.gid()))?;
        }
    }
    if let Access::As(other) | Access::Same(other) = access {
        // Not through the mask of the process, which knows nothing of the other file.
        file.set_permissions(Permissions::from_mode(other.permissions().mode() & 0o777))?;
    }
    file.write_all(content)?;
    file.sync_all()
}

/// A name beside a file that nobody else uses: hidden, and this process's own.
pub fn beside(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.{what}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_keeps_its_owner_and_mode_and_what_stands_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("serin.yaml");
        fs::write(&file, "old").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o664)).unwrap();
        // Only root may give files away.
        let is_given = std::os::unix::fs::chown(&file, Some(12345), None).is_ok();
        fs::write(directory.path().join("serin.yaml.new"), "mine").unwrap();
        let before = fs::metadata(&file).unwrap();
        replace(&file, b"new", Access::Same(&before)).unwrap();
        let after = fs::metadata(&file).unwrap();
        assert_eq!(after.permissions().mode() & 0o777, 0o664);
        assert!(!is_given || after.uid() == 12345);
        replace(&file, b"ours", Access::Ours).unwrap();
        let after = fs::metadata(&file).unwrap();
        assert_eq!(after.permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_file_that_cannot_be_replaced_stays_and_nothing_is_left_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a");
        fs::create_dir_all(file.join("full")).unwrap();
        replace(&file, b"new", Access::Ours).unwrap_err();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
