//! What this kernel lets us do, found out by doing it.
//!
//! Owns one harmless attempt for each kernel interface that dunlin stands on. Refuses to know what they are for, and
//! to judge: an attempt answers with the kernel's own error. Nothing is left behind by any of them.

use crate::{Errno, check};
use std::ffi::CStr;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::null_mut;

/// A namespace that a process may be made in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespace {
    /// Process numbers.
    Pid,
    /// Mounts.
    Mount,
    /// System V and POSIX queues.
    Ipc,
    /// Host name.
    Uts,
    /// Clock offsets.
    Time,
    /// Network.
    Net,
}

impl Namespace {
    fn flag(self) -> u64 {
        let flag = match self {
            Namespace::Pid => libc::CLONE_NEWPID,
            Namespace::Mount => libc::CLONE_NEWNS,
            Namespace::Ipc => libc::CLONE_NEWIPC,
            Namespace::Uts => libc::CLONE_NEWUTS,
            Namespace::Time => 0x80,
            Namespace::Net => libc::CLONE_NEWNET,
        };
        flag as u32 as u64
    }
}

/// Makes a process in a namespace of its own.
pub fn namespace(of: Namespace) -> Result<(), Errno> {
    exit_code(in_child(of.flag(), || 0)?).map(drop)
}

/// Writes `ns_last_pid` in a PID namespace of its own and sees whether the next process gets the number asked for.
pub fn pid_steering() -> Result<bool, Errno> {
    let child = in_child(Namespace::Pid.flag(), || {
        // SAFETY: system calls with static or local arguments, all allowed between fork and exit.
        unsafe {
            let fd = libc::open(
                c"/proc/sys/kernel/ns_last_pid".as_ptr(),
                libc::O_WRONLY | libc::O_CLOEXEC,
            );
            if fd < 0 || libc::write(fd, c"4241".as_ptr().cast(), 4) != 4 {
                return *libc::__errno_location();
            }
            match libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) {
                0 => libc::_exit(0),
                4242 => 0,
                _ => 255,
            }
        }
    })?;
    match exit_code(child) {
        Err(Errno(255)) => Ok(false),
        other => other.map(|()| true),
    }
}

/// What userfaultfd offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserFaults {
    /// `UFFD_FEATURE_*` bits.
    pub features: u64,
    /// A page could be registered for missing and write-protect faults, and both be resolved.
    pub write_protect: bool,
}

/// Opens a userfaultfd (by the system call, or else the device) and registers a page with it.
pub fn user_faults() -> Result<UserFaults, Errno> {
    const API: u64 = 0xAA;
    const USERFAULTFD_IOC_NEW: u64 = 0xAA00;
    const UFFDIO_API: u64 = 0xC018_AA3F;
    const UFFDIO_REGISTER: u64 = 0xC020_AA00;
    const MISSING_AND_WP: u64 = 1 | 2;
    const COPY_AND_WRITEPROTECT: u64 = 1 << 3 | 1 << 6;
    // SAFETY: takes flags, returns a descriptor.
    let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) }).or_else(
        |first| {
            let device = open(c"/dev/userfaultfd", libc::O_RDWR).map_err(|_| first)?;
            // SAFETY: takes flags by value, returns a descriptor.
            check(i64::from(unsafe {
                libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC)
            }))
        },
    )?;
    let fd = owned(fd);
    let mut api = [API, 0, 0];
    ioctl(&fd, UFFDIO_API, &mut api)?;
    let page = Page::map()?;
    let mut register = [page.0 as u64, PAGE as u64, MISSING_AND_WP, 0];
    let registered = ioctl(&fd, UFFDIO_REGISTER, &mut register).is_ok();
    let write_protect = registered && register[3] & COPY_AND_WRITEPROTECT == COPY_AND_WRITEPROTECT;
    Ok(UserFaults {
        features: api[1],
        write_protect,
    })
}

/// Asks `PAGEMAP_SCAN` about a page that is present; `false` if it does not say so.
pub fn pagemap_scan() -> Result<bool, Errno> {
    const PAGEMAP_SCAN: u64 = 0xC060_6610;
    const PAGE_IS_PRESENT: u64 = 1 << 3;
    let page = Page::map()?;
    // SAFETY: the page is mapped, writable and ours.
    unsafe { (page.0 as *mut u8).write_volatile(1) };
    let mut region = [0u64; 3];
    let (start, end) = (page.0 as u64, page.0 as u64 + PAGE as u64);
    let present = PAGE_IS_PRESENT;
    let mut arg = [
        96,
        0,
        start,
        end,
        0,
        region.as_mut_ptr() as u64,
        1,
        0,
        0,
        present,
        0,
        present,
    ];
    let file = open(c"/proc/self/pagemap", libc::O_RDONLY)?;
    let found = ioctl(&file, PAGEMAP_SCAN, &mut arg)?;
    Ok(found == 1 && region[0] == start && region[1] == end)
}

/// Installs a filter that allows everything, with a listener, on a thread that then ends.
pub fn seccomp_listener() -> Result<(), Errno> {
    const SECCOMP_SET_MODE_FILTER: i32 = 1;
    const NEW_LISTENER_AND_WAIT_KILLABLE: u64 = 1 << 3 | 1 << 5;
    const RET_ALLOW: u32 = 0x7fff_0000;
    let attempt = || {
        let mut allow = libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: RET_ALLOW,
        };
        let program = libc::sock_fprog {
            len: 1,
            filter: &mut allow,
        };
        // SAFETY: the program outlives the call; both calls concern the calling thread alone, which ends after them.
        let fd = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            let flags = NEW_LISTENER_AND_WAIT_KILLABLE;
            libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &raw const program)
        };
        check(fd).map(|fd| drop(owned(fd)))
    };
    std::thread::scope(|scope| scope.spawn(attempt).join().unwrap_or(Err(Errno(libc::EFAULT))))
}

/// What can be done to a child that is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traced {
    /// `PTRACE_SEIZE`, `INTERRUPT` and the registers.
    pub seize: Result<(), Errno>,
    /// The extended state (`NT_X86_XSTATE`).
    pub xstate: Result<(), Errno>,
    /// `PTRACE_GET_RSEQ_CONFIGURATION`.
    pub rseq: Result<(), Errno>,
    /// `process_vm_readv`.
    pub vm_read: Result<(), Errno>,
    /// `pidfd_getfd`.
    pub get_fd: Result<(), Errno>,
    /// `kcmp` of descriptors.
    pub compare_fds: Result<(), Errno>,
}

/// Makes a child and takes hold of it.
pub fn trace() -> Result<Traced, Errno> {
    let child = in_child(0, || {
        loop {
            // SAFETY: touches nothing.
            unsafe { libc::pause() };
        }
    })?;
    let seize = seize(child);
    let stopped = seize.map(|()| Errno(0));
    let after_seize = |attempt: fn(i32) -> Result<(), Errno>| match stopped {
        Ok(_) => attempt(child),
        Err(e) => Err(e),
    };
    let traced = Traced {
        seize,
        xstate: after_seize(|child| registers(child, 0x202)),
        rseq: after_seize(rseq_configuration),
        vm_read: vm_read(child),
        get_fd: get_fd(child),
        compare_fds: compare_fds(child),
    };
    // SAFETY: the child is ours and not reaped yet, so the number is still its.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, null_mut(), libc::__WALL);
    }
    Ok(traced)
}

/// Makes a memory file that may be executed.
pub fn executable_memfd() -> Result<(), Errno> {
    const MFD_EXEC: u32 = 0x10;
    // SAFETY: a static name and flags.
    check(i64::from(unsafe {
        libc::memfd_create(c"probe".as_ptr(), libc::MFD_CLOEXEC | MFD_EXEC)
    }))
    .map(|fd| drop(owned(fd)))
}

/// Asks for the size of the structure behind `PR_SET_MM_MAP`.
pub fn set_mm_map() -> Result<(), Errno> {
    const PR_SET_MM_MAP_SIZE: i32 = 15;
    let mut size = 0u32;
    // SAFETY: the kernel writes four bytes to where `size` is.
    check(i64::from(unsafe {
        libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP_SIZE, &raw mut size, 0, 0)
    }))
    .map(drop)
}

/// Opens a pseudo-terminal.
pub fn pseudo_terminal() -> Result<(), Errno> {
    open(c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY).map(drop)
}

const PAGE: usize = 4096;

/// One anonymous page.
struct Page(usize);

impl Page {
    fn map() -> Result<Page, Errno> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
        let at = unsafe { libc::mmap(null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        check(at as i64).map(|at| Page(at as usize))
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing refers into it any more.
        unsafe { libc::munmap(self.0 as *mut libc::c_void, PAGE) };
    }
}

fn owned(fd: i64) -> OwnedFd {
    // SAFETY: called with what a system call just returned as a new descriptor.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

fn open(path: &CStr, flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: the path ends in a zero byte and outlives the call.
    check(i64::from(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) })).map(owned)
}

fn ioctl<const N: usize>(fd: &OwnedFd, request: u64, arg: &mut [u64; N]) -> Result<i64, Errno> {
    // SAFETY: each caller's request carries in its number the size of `arg`, which the kernel reads and writes.
    debug_assert_eq!(request >> 16 & 0x3fff, 8 * N as u64);
    // SAFETY: as above.
    check(i64::from(unsafe {
        libc::ioctl(fd.as_raw_fd(), request, arg.as_mut_ptr())
    }))
}

/// A child that runs `body` and exits with what it returns. `body` may only make system calls: it runs in a copy of
/// one thread of a process that may have others.
fn in_child(flags: u64, body: impl FnOnce() -> i32) -> Result<i32, Errno> {
    // flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls
    let args = [flags, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
    // SAFETY: without CLONE_VM the child has its own copy of everything; it leaves by _exit and unwinds nothing.
    match check(unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) })? {
        0 => {
            let code = body();
            // SAFETY: ends the child here.
            unsafe { libc::_exit(code) }
        }
        child => Ok(child as i32),
    }
}

/// Waits for a child; its exit code, unless zero, is an error number.
fn exit_code(child: i32) -> Result<(), Errno> {
    let mut status = 0;
    // SAFETY: the kernel writes the status to where it is told.
    check(i64::from(unsafe { libc::waitpid(child, &mut status, libc::__WALL) }))?;
    match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
        (true, 0) => Ok(()),
        (true, errno) => Err(Errno(errno)),
        (false, _) => Err(Errno(libc::EINTR)),
    }
}

fn seize(child: i32) -> Result<(), Errno> {
    let nothing = null_mut::<libc::c_void>();
    // SAFETY: these requests write nothing to our memory.
    unsafe {
        check(libc::ptrace(libc::PTRACE_SEIZE, child, nothing, nothing))?;
        check(libc::ptrace(libc::PTRACE_INTERRUPT, child, nothing, nothing))?;
        check(i64::from(libc::waitpid(child, null_mut(), libc::__WALL)))?;
    }
    registers(child, 1)
}

fn registers(child: i32, set: usize) -> Result<(), Errno> {
    let mut buffer = vec![0u8; 16 << 10];
    let mut area = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: the kernel writes at most `iov_len` bytes to the buffer.
    check(unsafe { libc::ptrace(libc::PTRACE_GETREGSET, child, set, &raw mut area) }).map(drop)
}

fn rseq_configuration(child: i32) -> Result<(), Errno> {
    const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
    let mut configuration = [0u64; 3];
    let size = size_of_val(&configuration);
    // SAFETY: the kernel writes at most `size` bytes.
    check(unsafe { libc::ptrace(PTRACE_GET_RSEQ_CONFIGURATION, child, size, configuration.as_mut_ptr()) }).map(drop)
}

fn vm_read(child: i32) -> Result<(), Errno> {
    static WORD: u64 = 0x5ca1_ab1e;
    let mut copy = 0u64;
    // SAFETY: plain structures of pointers and lengths; the child is a copy of us, so the address is valid there.
    let read = unsafe {
        let mut local: libc::iovec = zeroed();
        (local.iov_base, local.iov_len) = ((&raw mut copy).cast(), 8);
        let remote = libc::iovec {
            iov_base: (&raw const WORD).cast_mut().cast(),
            iov_len: 8,
        };
        check(libc::process_vm_readv(child, &local, 1, &remote, 1, 0) as i64)?
    };
    if read == 8 && copy == WORD {
        Ok(())
    } else {
        Err(Errno(libc::EIO))
    }
}

fn get_fd(child: i32) -> Result<(), Errno> {
    // SAFETY: numbers in, descriptors out.
    unsafe {
        let pidfd = owned(check(libc::syscall(libc::SYS_pidfd_open, child, 0))?);
        match check(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), 2, 0)) {
            Ok(fd) => drop(owned(fd)),
            // We were started without a standard error: the call works all the same.
            Err(Errno(libc::EBADF)) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn compare_fds(child: i32) -> Result<(), Errno> {
    const KCMP_FILES: i32 = 2;
    // SAFETY: numbers only. Compares the tables of descriptors, which both processes have.
    check(unsafe { libc::syscall(libc::SYS_kcmp, libc::getpid(), child, KCMP_FILES, 0, 0) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This kernel is one that dunlin runs on, so every attempt succeeds (as root).
    #[test]
    fn every_attempt_succeeds_on_a_fit_kernel() {
        use Namespace::*;
        for of in [Pid, Mount, Ipc, Uts, Time, Net] {
            assert_eq!(namespace(of), Ok(()), "{of:?}");
        }
        assert_eq!(pid_steering(), Ok(true));
        assert!(user_faults().unwrap().write_protect);
        assert_eq!(pagemap_scan(), Ok(true));
        assert_eq!(seccomp_listener(), Ok(()));
        assert_eq!(executable_memfd(), Ok(()));
        assert_eq!(set_mm_map(), Ok(()));
        assert_eq!(pseudo_terminal(), Ok(()));
        let traced = trace().unwrap();
        let fine = Ok(());
        assert_eq!((traced.seize, traced.xstate, traced.rseq), (fine, fine, fine));
        assert_eq!((traced.vm_read, traced.get_fd, traced.compare_fds), (fine, fine, fine));
    }

    /// A kernel that refuses is believed: without privileges there is no PID namespace.
    #[test]
    fn a_refusal_is_the_kernels_own_error() {
        let child = in_child(0, || {
            // SAFETY: changes the identity of this child only.
            let dropped = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            let refused = namespace(Namespace::Pid) == Err(Errno(libc::EPERM));
            i32::from(dropped != 0 || !refused)
        });
        assert_eq!(exit_code(child.unwrap()), Ok(()));
    }
}
