//! Locks of files are taken again where the process goes on.
//!
//! Owns the last thing before a copy runs: the locks that its original had. The original, which is parked, has them
//! until its descriptors are closed, and that happens only when the move is decided: so they are taken after the
//! decision, as soon as they are free, and until then the copy waits. Refuses to let it run while somebody else has them.
//! Between the two a third process may get in, as it may when a file server is restarted; the copy then waits for that one. See
//! fcntl(2), flock(2).

use super::{Blank, During, RestoreError};
use dunlin_proto::image::{FileLock, LockKind};
use dunlin_sys::Errno;
use dunlin_sys::script::Script;
use std::time::{Duration, Instant};

const SYS_FCNTL: i64 = 72;
const SYS_FLOCK: i64 = 73;
const F_SETLK: u64 = 6;
const F_OFD_SETLK: u64 = 37;
const LOCK_SH: u64 = 1;
const LOCK_EX: u64 = 2;
const LOCK_NB: u64 = 4;
const EAGAIN: i64 = -11;
const EACCES: i64 = -13;
/// At first it is asked again at once: the original is being cleared away.
const IMPATIENT: Duration = Duration::from_millis(20);
const PAUSE: Duration = Duration::from_millis(1);
const TELL_EVERY: Duration = Duration::from_secs(5);

/// Takes the locks of a blank's descriptors, however long it takes.
pub fn take(blank: &Blank) -> Result<(), RestoreError> {
    let files = blank.files();
    let mut wanted: Vec<(i32, FileLock)> = Vec::new();
    for (index, description) in files.descriptions.iter().enumerate() {
        if let Some(through) = files.table.iter().find(|d| d.description as usize == index) {
            wanted.extend(description.locks.iter().map(|lock| (through.number, *lock)));
        }
    }
    let started = Instant::now();
    let mut told = started;
    while !wanted.is_empty() {
        wanted = attempt(blank, wanted)?;
        if let Some((number, _)) = wanted.first()
            && told.elapsed() > TELL_EVERY
        {
            told = Instant::now();
            tracing::warn!(pid = %blank.pid, descriptor = number, waited_s = started.elapsed().as_secs(),
                "a process that was moved waits for a lock of a file that it had: somebody else has it");
        }
        if !wanted.is_empty() && started.elapsed() > IMPATIENT {
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// Asks for them once; hands back those that somebody has.
fn attempt(blank: &Blank, wanted: Vec<(i32, FileLock)>) -> Result<Vec<(i32, FileLock)>, RestoreError> {
    const AT_ONCE: usize = 256;
    let mut left = Vec::new();
    for some in wanted.chunks(AT_ONCE) {
        let mut script = Script::new(&blank.foothold.arena);
        let mut asked = Vec::with_capacity(some.len());
        for (number, lock) in some {
            let fd = *number as u64;
            asked.push(match lock.kind {
                LockKind::Whole => {
                    let how = if lock.write { LOCK_EX } else { LOCK_SH };
                    script.attempt("flock", SYS_FLOCK, &[fd, how | LOCK_NB])
                }
                LockKind::Process | LockKind::Description => {
                    let command = if lock.kind == LockKind::Process {
                        F_SETLK
                    } else {
                        F_OFD_SETLK
                    };
                    let words = script.bytes(&flock(lock));
                    script.attempt("fcntl", SYS_FCNTL, &[fd, command, words.address])
                }
            });
        }
        let (_, answers) = script.run(blank.leader()).during(blank.pid, "taking locks of files")?;
        for (one, answer) in some.iter().zip(asked) {
            match answers.of(answer) {
                EAGAIN | EACCES => left.push(*one),
                refused if refused < 0 => {
                    // No lock server, say: that it will not run at all is the worse of the two.
                    let error = Errno(-refused as i32);
                    tracing::error!(pid = %blank.pid, descriptor = one.0, %error,
                        "a lock of a file could not be taken again; the process runs on without it");
                }
                _ => {}
            }
        }
    }
    Ok(left)
}

/// `struct flock` of x86-64.
fn flock(lock: &FileLock) -> Vec<u8> {
    const F_RDLCK: u16 = 0;
    const F_WRLCK: u16 = 1;
    let kind = if lock.write { F_WRLCK } else { F_RDLCK };
    let mut words = Vec::with_capacity(32);
    words.extend_from_slice(&u64::from(kind).to_le_bytes());
    words.extend_from_slice(&lock.start.to_le_bytes());
    words.extend_from_slice(&lock.length.to_le_bytes());
    words.extend_from_slice(&0u64.to_le_bytes());
    words
}
