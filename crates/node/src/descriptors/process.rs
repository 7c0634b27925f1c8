//! Descriptors of processes. See pidfd_open(2).
//!
//! Made again of whatever has the process's number where it goes: a process of the same move, or the surrogate of one that
//! is elsewhere, which ends as the process does.

use super::{Found, Look};
use crate::restore::{Blank, Kit, RestoreError};
use dunlin_proto::ids::Pid;
use dunlin_proto::image::DescriptionKind;
use dunlin_sys::procfs::special::value;
use rustix::fs::OFlags;
use rustix::process::{PidfdFlags, pidfd_open};
use std::os::fd::OwnedFd;

pub(crate) fn look(look: &Look<'_>) -> Found {
    /// It is of a thread (PIDFD_THREAD).
    const O_EXCL: u32 = 0o200;
    let number = value(&look.glimpse.steady, "NSpid:").and_then(|numbers| numbers.rsplit('\t').next());
    let pid = number
        .and_then(|number| number.trim().parse::<i32>().ok())
        .filter(|pid| *pid > 0);
    let Some(pid) = pid else {
        return look.refuse(
            "the process that it is of has ended",
            "close it when the process has been waited for",
        );
    };
    if look.glimpse.info.flags & O_EXCL != 0 {
        return look.refuse(
            "a descriptor of a thread cannot be moved yet",
            "close it before the move",
        );
    }
    Ok(Ok(DescriptionKind::Process(Pid(pid))))
}

pub(crate) fn make(blank: &Blank, pid: Pid, flags: OFlags, kit: &Kit<'_>) -> Result<OwnedFd, RestoreError> {
    let host = if pid == blank.pid {
        Some(blank.host)
    } else {
        (kit.host_of)(pid)
    };
    let host = host.and_then(rustix::process::Pid::from_raw);
    let mut how = PidfdFlags::empty();
    how.set(PidfdFlags::NONBLOCK, flags.contains(OFlags::NONBLOCK));
    host.and_then(|host| pidfd_open(host, how).ok()).ok_or_else(|| {
        RestoreError::Obstacles(vec![crate::obstacle::obstacle(
            blank.pid,
            "descriptor",
            format_args!("a descriptor of process {pid}"),
            "the destination has no entry of that process",
            "move the tree (--tree), or close the descriptor",
        )])
    })
}
