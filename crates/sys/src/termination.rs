//! SIGTERM and SIGINT as a descriptor, in a process whose threads may already run.
//!
//! Owns the two signals' actions. Refuses to know what is done about them. A mask and a signalfd would have to be in
//! place before the first thread is started; an action need not.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

/// Where the handler writes; -1 until [`watch`] was called.
static WAKE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn handler(_signal: libc::c_int) {
    // SAFETY: write(2) is async-signal-safe; the descriptor is never closed and the buffer is eight bytes. errno is
    // put back, because the interrupted code may be about to read it.
    unsafe {
        let errno = *libc::__errno_location();
        let one = 1u64;
        libc::write(WAKE.load(Ordering::Relaxed), (&raw const one).cast(), 8);
        *libc::__errno_location() = errno;
    }
}

/// From now on SIGTERM and SIGINT make the returned descriptor readable, for good, instead of ending the process.
pub fn watch() -> io::Result<OwnedFd> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let seen = event.as_fd().try_clone_to_owned()?;
    // Kept open for ever: a handler may be running while another call replaces it.
    WAKE.store(event.into_raw_fd(), Ordering::Relaxed);
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the action is fully initialised and its handler is async-signal-safe.
        let r = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if r != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_termination_signal_is_seen_and_survived() {
        let fd = super::watch().unwrap();
        let pid = rustix::process::getpid();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        while rustix::event::poll(&mut polled, None).is_err() {}
        assert!(polled[0].revents().contains(rustix::event::PollFlags::IN));
    }
}
