//! Who is signalled when a descriptor with O_ASYNC is ready. See F_SETOWN_EX in fcntl(2).
//!
//! The kernel keeps the credentials of whoever sets it: so the process sets it itself.

use crate::restore::{Blank, RestoreError};
use dunlin_proto::ids::Pid;
use dunlin_sys::fdcalls;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::script::Script;
use rustix::fs::OFlags;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::BorrowedFd;

/// The owner of a descriptor with O_ASYNC, by PIDs of the nest.
pub(crate) fn look(handle: BorrowedFd<'_>) -> io::Result<Option<(i32, Pid, i32)>> {
    let (kind, owner, signal) = fdcalls::signal_owner(handle)?;
    let status = (owner > 0).then(|| ProcDir::process(owner).status());
    let pid = status
        .and_then(|status| status.ok()?.ns_pids.last().copied())
        .unwrap_or(0);
    Ok(Some((kind, Pid(pid), signal)))
}

/// Sets the owners of all descriptions of the move that have one.
pub(crate) fn set(blanks: &[Blank]) -> Result<(), RestoreError> {
    const SYS_FCNTL: i64 = 72;
    const F_SETFL: u64 = 4;
    const F_SETSIG: u64 = 10;
    const F_SETOWN_EX: u64 = 15;
    let mut done = BTreeSet::new();
    for blank in blanks {
        let files = blank.files();
        let mut script = Script::new(&blank.foothold.arena);
        for descriptor in &files.table {
            let description = &files.descriptions[descriptor.description as usize];
            let Some((kind, pid, signal)) = description.owner.filter(|_| done.insert(description.key)) else {
                continue;
            };
            let number = descriptor.number as u64;
            let owner = script.bytes(&[kind, pid.0].map(i32::to_le_bytes).concat());
            if pid.0 > 0 {
                script.attempt("fcntl", SYS_FCNTL, &[number, F_SETOWN_EX, owner.address]);
            }
            script.attempt("fcntl", SYS_FCNTL, &[number, F_SETSIG, signal as u64]);
            let flags = u64::from(description.flags & !OFlags::LARGEFILE.bits());
            script.call("fcntl", SYS_FCNTL, &[number, F_SETFL, flags]);
        }
        blank.run(blank.host, script, "setting who is signalled")?;
    }
    Ok(())
}
