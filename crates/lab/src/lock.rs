//! One `up` or `down` of a lab at a time.
//!
//! Owns the lock file. Invariant: who holds the lock holds the file that has the name *now*, so the file can be
//! removed by its holder and leaves nothing behind.

use crate::error::LabError;
use crate::layout::{LABS_DIR, Layout};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind::{AlreadyExists, NotFound};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;

/// The lock of one lab, held.
#[derive(Debug)]
pub struct Held {
    file: File,
    path: PathBuf,
}

/// Waits for the lock and takes it.
pub fn take(layout: &Layout) -> Result<Held, LabError> {
    let path = layout.lock();
    let mut chances = 10_000;
    loop {
        let opened = fs::DirBuilder::new().recursive(true).mode(0o755).create(LABS_DIR);
        let opened = opened.and_then(|()| OpenOptions::new().create(true).truncate(false).write(true).open(&path));
        let file = match opened {
            Ok(file) => file,
            // Another `down` removed the directory while it was made (it exists, but is none any more), or after.
            Err(e) if matches!(e.kind(), NotFound | AlreadyExists) && chances > 0 => {
                chances -= 1;
                continue;
            }
            Err(e) => return Err(LabError::io("lock", &path)(e)),
        };
        flock(&file, FlockOperation::LockExclusive).map_err(|e| LabError::io("lock", &path)(e.into()))?;
        let named = fs::metadata(&path).map(|m| (m.dev(), m.ino()));
        let held = file.metadata().map(|m| (m.dev(), m.ino()));
        if let (Ok(named), Ok(held)) = (named, held)
            && named == held
        {
            return Ok(Held { file, path });
        }
        // Its last holder removed it while we waited: it is nobody's lock any more.
    }
}

impl Held {
    /// Removes the file with the lock, and the directories above it that are empty then.
    pub fn remove(self) {
        // Failing leaves an empty file or directory behind that the next `up` uses again.
        let _ = fs::remove_file(&self.path);
        drop(self.file);
        let _ = fs::remove_dir(LABS_DIR);
        if let Some(above) = std::path::Path::new(LABS_DIR).parent() {
            let _ = fs::remove_dir(above);
        }
    }
}

/// Held while the names of namespaces, which all labs share, begin or cease to have a directory.
#[derive(Debug)]
pub struct Names(#[expect(dead_code, reason = "held, not used")] File);

/// Waits for the lock on the names of namespaces.
pub fn names() -> Result<Names, LabError> {
    // On a directory that is always there, so that no file is needed that would be left behind.
    let path = "/run";
    let dir = File::open(path).map_err(LabError::io("open", path))?;
    flock(&dir, FlockOperation::LockExclusive).map_err(|e| LabError::io("lock", path)(e.into()))?;
    Ok(Names(dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn one_holder_at_a_time_even_while_the_file_comes_and_goes() {
        let layout = Layout::new(format!("lock-test-{}", std::process::id()).parse().unwrap());
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let held = take(&layout).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        held.remove();
                    }
                });
            }
        });
        assert!(!layout.lock().exists());
    }
}
