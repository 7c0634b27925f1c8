//! A descriptor put into the table of a thread whose system call waits for an answer of ours.
//!
//! Owns SECCOMP_IOCTL_NOTIF_ADDFD. Refuses to know the listener's protocol. See seccomp_unotify(2).

use crate::{Errno, check};
use std::os::fd::{AsRawFd, BorrowedFd};

#[repr(C)]
struct AddFd {
    id: u64,
    flags: u32,
    source: u32,
    number: u32,
    descriptor_flags: u32,
}

/// `_IOW('!', 3, struct seccomp_notif_addfd)`.
const SECCOMP_IOCTL_NOTIF_ADDFD: libc::c_ulong = 0x4018_2103;
const SETFD: u32 = 1;

/// Installs `fd` as `number` in the table of the thread whose notification is `id`, closing what was there.
///
/// Errors: ENOENT when the call was given up (the thread died or was interrupted); EBADF past the target's own limit
/// of descriptors; EINPROGRESS when the notification has not been received.
pub fn install(
    listener: BorrowedFd<'_>,
    id: u64,
    fd: BorrowedFd<'_>,
    number: i32,
    close_on_exec: bool,
) -> Result<(), Errno> {
    let request = AddFd {
        id,
        flags: SETFD,
        source: fd.as_raw_fd() as u32,
        number: number as u32,
        descriptor_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
    };
    // SAFETY: the request outlives the call; both descriptors are open.
    let answer = unsafe { libc::ioctl(listener.as_raw_fd(), SECCOMP_IOCTL_NOTIF_ADDFD, &raw const request) };
    check(i64::from(answer)).map(|_| ())
}
