//! Standing in for a program that runs elsewhere: its signals come here, and its end is told from here.
//!
//! Owns the calling process's signal mask and its last act. Refuses to know who is told about the signals.

use crate::{Errno, check};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Signals that do not happen to this process any more, but are read.
#[derive(Debug)]
pub struct Caught(OwnedFd);

impl Caught {
    /// Blocks the signals in the calling thread and in those it starts from now on: call it before there are others.
    pub fn new(signals: &[i32]) -> Result<Caught, Errno> {
        // SAFETY: the set is initialised by sigemptyset before anything reads it, and outlives the calls.
        let fd = unsafe {
            let mut set: libc::sigset_t = zeroed();
            libc::sigemptyset(&mut set);
            for signal in signals {
                libc::sigaddset(&mut set, *signal);
            }
            check(i64::from(libc::sigprocmask(
                libc::SIG_BLOCK,
                &set,
                std::ptr::null_mut(),
            )))?;
            check(i64::from(libc::signalfd(-1, &set, libc::SFD_CLOEXEC)))?
        };
        // SAFETY: signalfd returned this descriptor, and nobody else has it.
        Ok(Caught(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Waits for the next of them.
    pub fn next(&self) -> Result<i32, Errno> {
        loop {
            // SAFETY: all-zero is a value of this plain structure.
            let mut info: libc::signalfd_siginfo = unsafe { zeroed() };
            let size = size_of::<libc::signalfd_siginfo>();
            // SAFETY: the kernel writes at most `size` bytes into `info`, which has as many.
            let read = unsafe { libc::read(self.0.as_raw_fd(), (&raw mut info).cast(), size) };
            match check(read as i64) {
                Ok(_) => return Ok(info.ssi_signo as i32),
                Err(Errno(libc::EINTR)) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Dies by a signal, as the program did that this process stood in for, but without a core: that would be ours.
/// If the signal kills nobody, exits with 128 + its number, as a shell would report it.
pub fn die_by(signal: i32) -> ! {
    // SAFETY: plain system calls on this process, with values on the stack; after the handler is reset to the default
    // none of our code runs in it.
    unsafe {
        let none = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        libc::setrlimit(libc::RLIMIT_CORE, &none);
        libc::signal(signal, libc::SIG_DFL);
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        // Pending until the mask opens below, so that it is this thread that takes it.
        libc::raise(signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
    std::process::exit(128 + signal)
}
