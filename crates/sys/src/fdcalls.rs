//! Calls on descriptors of special kinds that the libraries do not have.
//!
//! Owns signalfd4(2) and the ioctl by which a timerfd is given expirations. Refuses to know whose descriptors they are.

use crate::{Errno, check};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A new signalfd for the signals whose bits are set (signal N is bit N − 1), close-on-exec. See signalfd(2).
pub fn signalfd(mask: u64, nonblocking: bool) -> Result<OwnedFd, Errno> {
    let flags = libc::SFD_CLOEXEC | if nonblocking { libc::SFD_NONBLOCK } else { 0 };
    let fd = signalfd4(-1, mask, flags)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Changes which signals a signalfd is for.
pub fn set_signalfd(fd: BorrowedFd<'_>, mask: u64) -> Result<(), Errno> {
    signalfd4(fd.as_raw_fd(), mask, 0).map(|_| ())
}

fn signalfd4(fd: i32, mask: u64, flags: i32) -> Result<i32, Errno> {
    // SAFETY: the kernel reads eight bytes of the mask, which outlives the call.
    let answer = unsafe { libc::syscall(libc::SYS_signalfd4, fd, &raw const mask, 8usize, flags) };
    check(answer).map(|fd| fd as i32)
}

/// Gives a timerfd expirations that nobody has read yet; at least one. ENOTTY without CONFIG_CHECKPOINT_RESTORE; ECANCELED
/// when its clock was set. See timerfd_create(2), TFD_IOC_SET_TICKS.
pub fn set_ticks(timerfd: BorrowedFd<'_>, ticks: u64) -> Result<(), Errno> {
    /// `_IOW('T', 0, __u64)`.
    const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
    // SAFETY: the kernel reads eight bytes, which outlive the call.
    let answer = unsafe { libc::ioctl(timerfd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    check(i64::from(answer)).map(|_| ())
}

/// Who is signalled when a descriptor with O_ASYNC is ready: F_OWNER_TID 0, F_OWNER_PID 1 or F_OWNER_PGRP 2, whose number
/// (as the caller numbers processes; 0: nobody, or nobody that is seen), and by which signal (0: SIGIO). See fcntl(2).
pub fn signal_owner(fd: BorrowedFd<'_>) -> Result<(i32, i32, i32), Errno> {
    const F_GETSIG: i32 = 11;
    const F_GETOWN_EX: i32 = 16;
    let mut owner = [0i32; 2];
    // SAFETY: the kernel writes two ints, which outlive the call.
    check(i64::from(unsafe {
        libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr())
    }))?;
    // SAFETY: numbers only.
    let signal = check(i64::from(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) }))?;
    Ok((owner[0], owner[1], signal as i32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procfs::ProcDir;
    use crate::procfs::special;
    use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
    use std::os::fd::AsFd;

    fn info(fd: &OwnedFd) -> String {
        let own = ProcDir::own();
        own.text(&format!("fdinfo/{}", fd.as_raw_fd())).unwrap()
    }

    #[test]
    fn a_signalfd_has_the_mask_it_is_given() {
        let fd = signalfd(1 << 9, true).unwrap();
        assert_eq!(special::signal_mask(&info(&fd)).unwrap(), 1 << 9);
        set_signalfd(fd.as_fd(), 1 << 11 | 1).unwrap();
        assert_eq!(special::signal_mask(&info(&fd)).unwrap(), 1 << 11 | 1);
    }

    #[test]
    fn a_timer_that_never_ran_has_the_ticks_it_is_given() {
        let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).unwrap();
        set_ticks(fd.as_fd(), 7).unwrap();
        assert_eq!(special::timer(&info(&fd)).unwrap().ticks, 7);
        let mut bytes = [0u8; 8];
        assert_eq!(rustix::io::read(&fd, &mut bytes).unwrap(), 8);
        assert_eq!(u64::from_le_bytes(bytes), 7);
    }
}
