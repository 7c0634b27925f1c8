//! Signals as a descriptor, and blocking them.
//!
//! Owns the calling thread's mask. Refuses to know what is done about a signal. The descriptor says only *that* signals
//! came; how many of a kind is lost, as ever.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A descriptor that is readable while one of its signals is pending.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Blocks the signals in the calling thread (and those it starts from now on) and returns their descriptor.
    pub fn new(signals: &[i32]) -> io::Result<SignalFd> {
        // SAFETY: the set is initialised by sigemptyset before anything reads it.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in signals {
                libc::sigaddset(&mut set, *signal);
            }
            let r = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            if r != 0 {
                return Err(io::Error::from_raw_os_error(r));
            }
            match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(SignalFd(OwnedFd::from_raw_fd(fd))),
            }
        }
    }

    /// Takes what is pending.
    pub fn drain(&self) {
        let mut buffer = [0u8; 128 * 8];
        // SAFETY: reads into a buffer of our own, whose length is given.
        while unsafe { libc::read(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) } > 0 {}
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
