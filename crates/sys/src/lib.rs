//! Every unsafe block and raw system call of dunlin, behind safe functions.
//!
//! Owns the kernel's interfaces: ptrace, syscall scripts, /proc, userfaultfd, seccomp, namespaces. Refuses to know what
//! a node, a move or a cluster is. Invariants: every file descriptor is an `OwnedFd`; every unsafe block says why it is
//! sound; a kernel answer is parsed, never asserted.

pub mod addfd;
mod arena;
pub mod batch;
pub mod bpf;
pub mod fdcalls;
pub mod fdpass;
pub mod foothold;
pub mod foreground;
pub mod fuse;
pub mod inspect;
pub mod lending;
pub mod links;
pub mod namespace;
pub mod nudge;
pub mod pagemap;
pub mod peergroups;
pub mod pidfd;
pub mod probe;
pub mod procfs;
pub mod ptrace;
#[cfg(feature = "puppet")]
pub mod puppet;
pub mod refuge;
pub mod script;
pub mod seccomp;
pub mod shared;
pub mod sigwait;
pub mod sockdiag;
pub mod socket;
pub mod spawn;
pub mod steer;
pub mod surrogate;
pub mod tap;
pub mod tape;
pub mod termination;
pub mod uffd;
pub mod vmcopy;

/// A kernel error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> Self {
        std::io::Error::from_raw_os_error(errno.0)
    }
}

/// Turns what a libc function returned into a result with the calling thread's errno.
pub(crate) fn check(answer: i64) -> Result<i64, Errno> {
    if answer == -1 {
        Err(Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)))
    } else {
        Ok(answer)
    }
}
