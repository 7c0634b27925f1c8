//! The output of detached runs, in files.
//!
//! Owns the directory: one file for each run, named by its PID, both outputs interleaved as they came. Refuses to know
//! where output comes from and who may read it (but says whose a log is). Invariants: a log is never longer than
//! [`MAX_LOG_BYTES`] and a note that says so; there are never more than [`MAX_LOGS`]; a run that gets a PID anew starts a
//! new log.

use crate::streams::outbox::Drain;
use dunlin_proto::control::Reply;
use dunlin_proto::ids::Pid;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// A log stops here.
pub const MAX_LOG_BYTES: u64 = 256 << 20;
/// So many logs are kept; the one written to longest ago goes first.
pub const MAX_LOGS: usize = 1000;
const NOTE: &[u8] = b"\ndunlin: the log has reached 256 MiB; what follows is not kept\n";

/// All logs of a node.
#[derive(Debug)]
pub struct Logs {
    directory: PathBuf,
    /// Those being written.
    growing: Mutex<BTreeMap<Pid, Arc<Growth>>>,
}

/// Tells the readers of a log that it grew, or never will again.
#[derive(Debug, Default)]
struct Growth {
    state: Mutex<(u64, bool)>,
    changed: Condvar,
}

/// A log being written.
#[derive(Debug)]
pub struct Log {
    file: File,
    written: u64,
    limit: u64,
    growth: Arc<Growth>,
}

/// A log being read.
#[derive(Debug)]
pub struct Reader {
    file: File,
    growth: Option<Arc<Growth>>,
}

impl Logs {
    /// The logs in a directory, which is made if it is not there.
    pub fn open(directory: &Path) -> io::Result<Logs> {
        fs::create_dir_all(directory)?;
        Ok(Logs {
            directory: directory.to_owned(),
            growing: Mutex::default(),
        })
    }

    /// Starts the log of a run that has no PID yet; [`Logs::name`] gives it one.
    pub fn create(&self, nonce: u64, uid: u32, gid: u32) -> io::Result<Log> {
        self.make_room()?;
        let path = self.unnamed(nonce);
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        fchown(&file, Some(uid), Some(gid))?;
        Ok(Log {
            file,
            written: 0,
            limit: MAX_LOG_BYTES,
            growth: Arc::default(),
        })
    }

    /// The run has this PID.
    pub fn name(&self, nonce: u64, pid: Pid, growth: &LogHandle) -> io::Result<()> {
        fs::rename(self.unnamed(nonce), self.path(pid))?;
        lock(&self.growing).insert(pid, growth.0.clone());
        Ok(())
    }

    /// The run did not come to be.
    pub fn discard(&self, nonce: u64) {
        // It may never have been made.
        let _ = fs::remove_file(self.unnamed(nonce));
    }

    /// Goes on with the log of a run that was started before.
    pub fn resume(&self, pid: Pid, uid: u32) -> io::Result<Log> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.path(pid))?;
        fchown(&file, Some(uid), None)?;
        let written = file.metadata()?.len();
        let growth = Arc::new(Growth {
            state: Mutex::new((written, false)),
            changed: Condvar::new(),
        });
        let log = Log {
            file,
            written,
            limit: MAX_LOG_BYTES,
            growth,
        };
        lock(&self.growing).insert(pid, log.growth.clone());
        Ok(log)
    }

    /// Opens a log for reading, from its start; `None`: there is none.
    pub fn read(&self, pid: Pid) -> io::Result<Option<Reader>> {
        let growth = lock(&self.growing).get(&pid).cloned();
        match File::open(self.path(pid)) {
            Ok(file) => Ok(Some(Reader { file, growth })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn path(&self, pid: Pid) -> PathBuf {
        self.directory.join(pid.to_string())
    }

    fn unnamed(&self, nonce: u64) -> PathBuf {
        self.directory.join(format!("run-{nonce:016x}"))
    }

    fn make_room(&self) -> io::Result<()> {
        let mut logs = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let pid = entry.file_name().to_str().and_then(|n| n.parse().ok()).map(Pid);
            let (Some(pid), Ok(data)) = (pid, entry.metadata()) else {
                continue;
            };
            logs.push((data.mtime(), data.mtime_nsec(), pid));
        }
        logs.sort();
        let mut growing = lock(&self.growing);
        growing.retain(|_, growth| !lock(&growth.state).1);
        let ended = logs
            .iter()
            .map(|(_, _, pid)| pid)
            .filter(|pid| !growing.contains_key(pid));
        for pid in ended.take((logs.len() + 1).saturating_sub(MAX_LOGS)) {
            fs::remove_file(self.path(*pid))?;
        }
        Ok(())
    }
}

/// What tells readers of a log that it grows, apart from the log, which its writer owns.
#[derive(Debug, Clone)]
pub struct LogHandle(Arc<Growth>);

impl Log {
    /// For [`Logs::name`].
    pub fn handle(&self) -> LogHandle {
        LogHandle(self.growth.clone())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.written >= self.limit {
            return Ok(());
        }
        let room = usize::try_from(self.limit - self.written).unwrap_or(usize::MAX);
        let fits = &bytes[..bytes.len().min(room)];
        self.file.write_all(fits)?;
        self.written += fits.len() as u64;
        if self.written >= self.limit {
            self.file.write_all(NOTE)?;
        }
        self.growth.tell(|state| state.0 = self.written);
        Ok(())
    }
}

impl Drain for Log {
    fn put(&mut self, reply: Reply) -> io::Result<()> {
        if let Reply::Output { bytes, .. } = &reply
            && let Err(e) = self.append(bytes)
        {
            // The program must not suffer for a full disk: what cannot be kept is lost, with a word here.
            tracing::warn!("the log of a run: {e}");
            self.limit = 0;
        }
        Ok(())
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.growth.tell(|state| state.1 = true);
    }
}

impl Growth {
    fn tell(&self, change: impl FnOnce(&mut (u64, bool))) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }
}

impl Reader {
    /// Whose log it is.
    pub fn owner(&self) -> io::Result<u32> {
        Ok(self.file.metadata()?.uid())
    }

    /// The next bytes; empty: there are no more at present.
    pub fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; crate::streams::PIECE_BYTES];
        let read = self.file.read(&mut bytes)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Waits until the log may have grown, for so long; `false`: it is complete, and what was written before this call
    /// is all there is.
    pub fn wait(&self, within: Duration) -> io::Result<bool> {
        let Some(growth) = &self.growth else { return Ok(false) };
        let position = (&self.file).stream_position()?;
        let state = lock(&growth.state);
        if state.1 {
            return Ok(false);
        }
        let idle = |s: &mut (u64, bool)| s.0 <= position && !s.1;
        drop(growth.changed.wait_timeout_while(state, within, idle));
        Ok(true)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("dunlin-logs-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    fn output(bytes: &[u8]) -> Reply {
        Reply::Output {
            stream: 1,
            bytes: bytes.to_vec(),
        }
    }

    #[test]
    fn a_log_is_followed_to_its_end() {
        let path = directory("follow");
        let logs = Logs::open(&path).unwrap();
        let mut log = logs.create(1, 0, 0).unwrap();
        logs.name(1, Pid(129), &log.handle()).unwrap();
        log.put(output(b"one ")).unwrap();
        let mut reader = logs.read(Pid(129)).unwrap().unwrap();
        let writer = std::thread::spawn(move || {
            for _ in 0..100 {
                log.put(output(b"more ")).unwrap();
            }
        });
        let mut seen = Vec::new();
        loop {
            let more = reader.wait(Duration::from_secs(10)).unwrap();
            let mut bytes = reader.read().unwrap();
            while !bytes.is_empty() {
                seen.extend(bytes);
                bytes = reader.read().unwrap();
            }
            if !more {
                break;
            }
        }
        writer.join().unwrap();
        assert_eq!(seen, [b"one ".to_vec(), b"more ".repeat(100)].concat());
        assert!(logs.read(Pid(130)).unwrap().is_none());
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn a_log_has_an_end_and_says_so() {
        let path = directory("limit");
        let logs = Logs::open(&path).unwrap();
        let mut log = logs.create(1, 0, 0).unwrap();
        log.limit = 10;
        logs.name(1, Pid(129), &log.handle()).unwrap();
        for _ in 0..3 {
            log.put(output(b"abcdefg")).unwrap();
        }
        let kept = fs::read(path.join("129")).unwrap();
        assert_eq!(kept, [b"abcdefgabc", NOTE].concat());
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn the_oldest_logs_go_but_never_one_that_is_written() {
        let path = directory("many");
        let logs = Logs::open(&path).unwrap();
        let mut kept = Vec::new();
        for pid in 0..MAX_LOGS as u64 + 2 {
            let log = logs.create(pid, 0, 0).unwrap();
            logs.name(pid, Pid(pid as i32), &log.handle()).unwrap();
            // The first is written to until the end.
            if pid == 0 {
                kept.push(log);
            }
        }
        assert!(logs.read(Pid(0)).unwrap().is_some());
        assert!(logs.read(Pid(1)).unwrap().is_none());
        assert!(logs.read(Pid(3)).unwrap().is_some());
        fs::remove_dir_all(path).unwrap();
    }
}
