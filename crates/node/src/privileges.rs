//! What a task regains before it becomes a surrogate: the process that comes back into it needs it again.
//!
//! Owns what an exec would lose. Refuses to know why the task becomes a surrogate. Invariant: never more than the
//! task's own credentials can regain; what they cannot is lost, and the way back is refused by name.

use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Options, Stopped};
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;

const SYS_SETRESUID: i64 = 117;
const SYS_CAPSET: i64 = 126;
const SYS_PRCTL: i64 = 157;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const VERSION: u32 = 0x2008_0522;
const KEEP: u64 = u32::MAX as u64;

/// Gives a stopped task, which is about to execute the surrogate program, as much privilege as its credentials can regain.
/// `at` is a system call instruction of it, `place` memory of it that may be overwritten: 64 bytes.
///
/// An exec by an ordinary user keeps the ambient capabilities alone: all permitted ones become ambient.
pub(crate) fn regain(thread: Stopped, at: u64, place: u64) -> io::Result<Stopped> {
    let dir = ProcDir::process(thread.tid());
    // A filter of the program's own has no say in this.
    thread
        .set_options(Options {
            suspend_seccomp: true,
            follow: true,
            ..Options::default()
        })
        .map_err(io::Error::other)?;
    let mut thread = thread;
    let status = dir.status().map_err(io::Error::other)?;
    let [inheritable, permitted, _, bounding, _] = status.capabilities;
    if permitted != 0 && !status.uids[..3].contains(&0) {
        // What is neither inheritable nor in the bounding set cannot become ambient, and the call would fail for all.
        let kept = permitted & (inheritable | bounding);
        let halves = |shift: u32| [permitted, permitted, kept].map(|set| ((set >> shift) as u32).to_le_bytes());
        let sets = [halves(0), halves(32)].concat().concat();
        OpenOptions::new()
            .write(true)
            .open(dir.path("mem"))?
            .write_all_at(&[&VERSION.to_le_bytes()[..], &[0; 4], &sets].concat(), place)?;
        let mut call = |number, arguments| -> io::Result<()> {
            let (after, _) = Stopped::assume(thread.tid())
                .inject(at, number, arguments)
                .map_err(io::Error::other)?;
            thread = after;
            Ok(())
        };
        call(SYS_CAPSET, [place, place + 8, 0, 0, 0, 0])?;
        for capability in (0..64).filter(|c| kept & (1 << c) != 0) {
            call(SYS_PRCTL, [PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0, 0])?;
        }
    }
    let root = [KEEP, 0, KEEP, 0, 0, 0];
    Ok(thread.inject(at, SYS_SETRESUID, root).map_err(io::Error::other)?.0)
}
