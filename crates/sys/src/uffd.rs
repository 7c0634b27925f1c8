//! userfaultfd: the page faults of an address space, as messages; pages put in by whoever holds the descriptor.
//!
//! Owns the ioctls, the layout of the messages and the meaning of their errors. Refuses to know where pages come from.
//! Invariants: a [`Uffd`] never blocks in a read; a copy says how far it came and why it stopped; a FORK event's
//! descriptor is owned before anyone can lose it. Addresses are those of the address space that the descriptor was made
//! in, which is that of *another* process (the descriptor comes by `pidfd_getfd`): like `/proc/PID/mem`, this is
//! outside what Rust means by memory safety.
//!
//! References: userfaultfd(2), ioctl_userfaultfd(2), `Documentation/admin-guide/mm/userfaultfd.rst`.

mod event;
mod features;

use crate::tape::{LANDING_BYTES, Tape};
use crate::{Errno, check};
pub use event::{Change, Event, FaultKind, changes};
use event::{MESSAGE_BYTES, parse};
pub use features::{Features, Watch};
use rustix::fd::{AsFd, BorrowedFd};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Why an installation stopped before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The address space is changing: read the events, apply them, and decide again what belongs where.
    Changing,
    /// The next page exists already. Nobody was woken for it.
    Exists,
    /// The next page is in no mapping registered here, or the mapping ends inside the range.
    NotRegistered,
    /// There is no memory for the page at the moment.
    NoMemory,
    /// The address space is gone: its last process exited or executed another program.
    Gone,
}

/// How far an installation came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Installed {
    /// So many bytes from the start are in place and whoever waited for them is awake.
    pub bytes: u64,
    /// Why not all of them.
    pub stopped: Option<Stop>,
}

/// Why a userfaultfd would not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// There is none to be had.
    #[error("userfaultfd cannot be made: {0}; hint: it wants CAP_SYS_PTRACE, or a kernel with CONFIG_USERFAULTFD")]
    Create(Errno),
    /// The kernel is too old or the caller may not ask for this.
    #[error("userfaultfd does not offer {wanted}: {errno}; hint: EVENT_FORK wants CAP_SYS_PTRACE, WP_ASYNC Linux 6.7")]
    Features {
        /// What was asked for.
        wanted: Features,
        /// The kernel's answer.
        errno: Errno,
    },
    /// An ioctl failed; nothing has changed.
    #[error("userfaultfd {call} of {start:#x}+{len:#x}: {errno}")]
    Range {
        /// Which.
        call: &'static str,
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
        /// The kernel's answer.
        errno: Errno,
    },
    /// A read failed.
    #[error("userfaultfd read: {0}")]
    Read(Errno),
}

impl UffdError {
    /// It may pass by itself: there is no memory, or no room for a descriptor (a FORK event brings one; it stays unread).
    pub fn is_shortage(&self) -> bool {
        matches!(self.errno().0, libc::ENOMEM | libc::EMFILE | libc::ENFILE)
    }

    /// The kernel's answer.
    pub fn errno(&self) -> Errno {
        match self {
            UffdError::Create(errno) | UffdError::Read(errno) => *errno,
            UffdError::Features { errno, .. } | UffdError::Range { errno, .. } => *errno,
        }
    }
}

const fn request(direction: u64, nr: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xAA << 8 | nr
}
const READ: u64 = 2;
const READ_WRITE: u64 = 3;
const UFFDIO_REGISTER: u64 = request(READ_WRITE, 0x00, 32);
const UFFDIO_UNREGISTER: u64 = request(READ, 0x01, 16);
const UFFDIO_WAKE: u64 = request(READ, 0x02, 16);
const UFFDIO_COPY: u64 = request(READ_WRITE, 0x03, 40);
const UFFDIO_ZEROPAGE: u64 = request(READ_WRITE, 0x04, 32);
const UFFDIO_WRITEPROTECT: u64 = request(READ_WRITE, 0x06, 24);
const UFFDIO_CONTINUE: u64 = request(READ_WRITE, 0x07, 32);
const UFFDIO_POISON: u64 = request(READ_WRITE, 0x08, 32);
const UFFDIO_API: u64 = request(READ_WRITE, 0x3F, 24);
const USERFAULTFD_IOC_NEW: u64 = request(0, 0x00, 0);

/// So many messages are read at once.
pub const MESSAGES_PER_READ: usize = LANDING_BYTES / MESSAGE_BYTES;

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Makes one for the calling process.
    pub fn create() -> Result<Uffd, UffdError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: a system call on plain integers that returns a new descriptor.
        let direct = check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) });
        let fd = match direct {
            Ok(fd) => fd as i32,
            Err(errno) => {
                let device = std::fs::File::open("/dev/userfaultfd").map_err(|_| UffdError::Create(errno))?;
                // SAFETY: the ioctl takes its flags by value and returns a new descriptor.
                let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
                check(i64::from(fd)).map_err(UffdError::Create)? as i32
            }
        };
        // SAFETY: the kernel has just returned this descriptor; nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Uffd { fd })
    }

    /// Takes one that another process made (by `pidfd_getfd`), and makes it non-blocking: a blocking one cannot be
    /// polled.
    pub fn from_fd(fd: OwnedFd) -> Result<Uffd, UffdError> {
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(|e| UffdError::Create(Errno(e.raw_os_error())))?;
        if !flags.contains(rustix::fs::OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)
                .map_err(|e| UffdError::Create(Errno(e.raw_os_error())))?;
        }
        Ok(Uffd { fd })
    }

    /// A second descriptor of the same userfaultfd: it ends when the last one is closed.
    pub fn try_clone(&self) -> Result<Uffd, UffdError> {
        let fd = self
            .fd
            .try_clone()
            .map_err(|e| UffdError::Create(Errno(e.raw_os_error().unwrap_or(0))))?;
        Ok(Uffd { fd })
    }

    /// What this kernel offers the caller.
    pub fn offered() -> Result<Features, UffdError> {
        Self::create()?.api(Features::default())
    }

    /// Switches features on; must be called once, before anything else. Returns what the kernel offers.
    pub fn negotiate(&self, wanted: Features) -> Result<Features, UffdError> {
        self.api(wanted)
    }

    fn api(&self, wanted: Features) -> Result<Features, UffdError> {
        let mut argument = [0xAAu64, wanted.0, 0];
        // SAFETY: UFFDIO_API reads and writes a struct of three u64.
        let answer = unsafe { self.ioctl(UFFDIO_API, &mut argument) };
        answer.map_err(|errno| UffdError::Features { wanted, errno })?;
        Ok(Features(argument[1]))
    }

    /// Raises the faults of a range from now on. It must lie in mappings of anonymous or shared memory.
    pub fn register(&self, start: u64, len: u64, watch: Watch) -> Result<(), UffdError> {
        let mut argument = [start, len, watch.bits(), 0];
        // SAFETY: UFFDIO_REGISTER reads and writes a struct of four u64.
        unsafe { self.on_range(UFFDIO_REGISTER, "register", start, len, &mut argument) }
    }

    /// Stops raising the faults of a range and wakes its waiters: what is still missing there reads as zeros from
    /// now on. The range must begin in a mapping.
    pub fn unregister(&self, start: u64, len: u64) -> Result<(), UffdError> {
        // SAFETY: UFFDIO_UNREGISTER reads a struct of two u64.
        unsafe { self.on_range(UFFDIO_UNREGISTER, "unregister", start, len, &mut [start, len]) }
    }

    /// Wakes the threads that wait for pages of a range; they fault again if the page is still missing.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), UffdError> {
        // SAFETY: UFFDIO_WAKE reads a struct of two u64.
        unsafe { self.on_range(UFFDIO_WAKE, "wake", start, len, &mut [start, len]) }
    }

    /// Installs copies of `bytes` (whole pages) at `start` and wakes whoever waits for them.
    pub fn copy(&self, start: u64, bytes: &[u8]) -> Result<Installed, UffdError> {
        self.copy_mode(start, bytes, 0)
    }

    /// The same, write-protected: a second reader must not get a writable page.
    pub fn copy_protected(&self, start: u64, bytes: &[u8]) -> Result<Installed, UffdError> {
        self.copy_mode(start, bytes, 2)
    }

    fn copy_mode(&self, start: u64, bytes: &[u8], mode: u64) -> Result<Installed, UffdError> {
        let len = bytes.len() as u64;
        let mut argument = [start, bytes.as_ptr() as u64, len, mode, 0];
        // SAFETY: UFFDIO_COPY reads and writes a struct of five u64, and reads `len` bytes at the second, which are
        // `bytes`.
        let answer = unsafe { self.ioctl(UFFDIO_COPY, &mut argument) };
        installed("copy", start, len, answer, argument[4])
    }

    /// Installs pages of zeros and wakes whoever waits for them.
    pub fn zero(&self, start: u64, len: u64) -> Result<Installed, UffdError> {
        let mut argument = [start, len, 0, 0];
        // SAFETY: UFFDIO_ZEROPAGE reads and writes a struct of four u64.
        let answer = unsafe { self.ioctl(UFFDIO_ZEROPAGE, &mut argument) };
        installed("zero", start, len, answer, argument[3])
    }

    /// Maps the pages that the file behind a shared mapping already has, and wakes whoever waits for them.
    pub fn map_existing(&self, start: u64, len: u64) -> Result<Installed, UffdError> {
        let mut argument = [start, len, 0, 0];
        // SAFETY: UFFDIO_CONTINUE reads and writes a struct of four u64.
        let answer = unsafe { self.ioctl(UFFDIO_CONTINUE, &mut argument) };
        installed("continue", start, len, answer, argument[3])
    }

    /// Makes every access to the range end in SIGBUS (EFAULT inside system calls). Does not wake.
    pub fn poison(&self, start: u64, len: u64) -> Result<Installed, UffdError> {
        let mut argument = [start, len, 1, 0];
        // SAFETY: UFFDIO_POISON reads and writes a struct of four u64.
        let answer = unsafe { self.ioctl(UFFDIO_POISON, &mut argument) };
        installed("poison", start, len, answer, argument[3])
    }

    /// Write-protects a range, or lifts that and wakes whoever waits to write.
    pub fn write_protect(&self, start: u64, len: u64, protect: bool) -> Result<(), UffdError> {
        let mut argument = [start, len, u64::from(protect)];
        // SAFETY: UFFDIO_WRITEPROTECT reads and writes a struct of three u64.
        unsafe { self.on_range(UFFDIO_WRITEPROTECT, "write-protect", start, len, &mut argument) }
    }

    /// Is the address space still there? Asks for a page where none can be registered and looks at the excuse.
    pub fn is_alive(&self) -> bool {
        // The last page below the hole: the kernel never maps it on x86-64.
        !matches!(
            self.zero(0x7fff_ffff_f000 - 4096, 4096),
            Ok(Installed {
                stopped: Some(Stop::Gone),
                ..
            })
        )
    }

    /// Appends the messages that are there, at most [`MESSAGES_PER_READ`], and returns how many. The kernel hands out
    /// faults before the events that are older than they.
    pub fn read(&self, into: &mut Vec<Event>) -> Result<usize, UffdError> {
        let mut bytes = [0u8; MESSAGE_BYTES * MESSAGES_PER_READ];
        let read = match rustix::io::read(&self.fd, &mut bytes) {
            Ok(read) => read,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(0),
            Err(errno) => return Err(UffdError::Read(Errno(errno.raw_os_error()))),
        };
        let before = into.len();
        for message in bytes[..read].chunks_exact(MESSAGE_BYTES) {
            into.extend(parse(message)?);
        }
        Ok(into.len() - before)
    }

    /// Like [`Uffd::read`], by way of a tape's landing: if this process is killed at any moment of it, the messages that
    /// the kernel counts as read are found there.
    pub fn read_by(&self, tape: &mut Tape, into: &mut Vec<Event>) -> Result<usize, UffdError> {
        let bytes = match tape.land(&self.fd) {
            Ok(bytes) => bytes,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(0),
            Err(errno) => return Err(UffdError::Read(Errno(errno.raw_os_error()))),
        };
        let before = into.len();
        for message in bytes.chunks_exact(MESSAGE_BYTES) {
            into.extend(parse(message)?);
        }
        Ok(into.len() - before)
    }

    /// Wakes everybody who waits for a page: messages that a former holder of the descriptor read come again.
    pub fn wake_all(&self) -> Result<(), UffdError> {
        const LOWEST: u64 = 1 << 16;
        self.wake(LOWEST, 0x7fff_ffff_f000 - LOWEST)
    }

    /// # Safety
    /// `argument` must be the struct that `request` reads and writes.
    unsafe fn on_range<const N: usize>(
        &self,
        request: u64,
        call: &'static str,
        start: u64,
        len: u64,
        argument: &mut [u64; N],
    ) -> Result<(), UffdError> {
        // SAFETY: as this function's own.
        let answer = unsafe { self.ioctl(request, argument) };
        answer.map_err(|errno| UffdError::Range {
            call,
            start,
            len,
            errno,
        })
    }

    /// # Safety
    /// `argument` must be the struct that `request` reads and writes.
    unsafe fn ioctl<const N: usize>(&self, request: u64, argument: &mut [u64; N]) -> Result<(), Errno> {
        // SAFETY: the caller's promise; the array lives across the call.
        let answer = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument.as_mut_ptr()) };
        check(i64::from(answer)).map(|_| ())
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> OwnedFd {
        uffd.fd
    }
}

/// `done` is what the kernel wrote last into the argument: bytes, or a negative error, or nothing (an early refusal).
fn installed(
    call: &'static str,
    start: u64,
    len: u64,
    answer: Result<(), Errno>,
    done: u64,
) -> Result<Installed, UffdError> {
    let bytes = if (done as i64) > 0 { done } else { 0 };
    let stopped = match answer {
        Ok(()) => {
            return Ok(Installed {
                bytes: len,
                stopped: None,
            });
        }
        // A partial copy also ends in EAGAIN, whatever stopped it: going on from there shows the true reason.
        Err(Errno(libc::EAGAIN)) => Stop::Changing,
        Err(Errno(libc::EEXIST)) => Stop::Exists,
        Err(Errno(libc::ENOENT)) => Stop::NotRegistered,
        Err(Errno(libc::ESRCH)) => Stop::Gone,
        Err(Errno(libc::ENOMEM)) => Stop::NoMemory,
        Err(errno) => {
            return Err(UffdError::Range {
                call,
                start,
                len,
                errno,
            });
        }
    };
    Ok(Installed {
        bytes,
        stopped: Some(stopped),
    })
}
