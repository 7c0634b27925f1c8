//! Namespaces: leaving the old ones, forking into a PID namespace, the loopback device.
//!
//! Owns the calls that change what the calling process sees of the machine. Refuses to know what a nest is.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// Which side of [`fork`] this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// The old process; the child's PID.
    Parent(i32),
    /// The new process.
    Child,
}

/// Leaves the mount, IPC, UTS, network and time namespaces for new ones. The time namespace, like a PID namespace, is
/// entered by children only, so its clocks can still be set.
pub fn unshare_all_but_pid() -> io::Result<()> {
    unshare(libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWNET | libc::CLONE_NEWTIME)
}

/// Children of this process live in a new PID namespace; the first is its PID 1.
pub fn unshare_pid() -> io::Result<()> {
    unshare(libc::CLONE_NEWPID)
}

fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: changes namespaces of this process; no memory is involved (CLONE_FILES, the flag that would matter to
    // descriptors, is not among the flags).
    match unsafe { libc::unshare(flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Forks a process that must have one thread only.
pub fn fork() -> io::Result<Fork> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    assert_eq!(threads, 1, "fork() in a process with several threads");
    // SAFETY: with one thread the child is a faithful copy: no lock is held by anyone who is not there.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

/// A new network namespace, with nobody in it; it lives as long as the descriptor, and what is in it.
pub fn new_network() -> io::Result<OwnedFd> {
    // On a thread of its own, which ends: the caller stays where it is.
    let made = std::thread::spawn(|| {
        unshare(libc::CLONE_NEWNET)?;
        std::fs::File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
    });
    made.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Does something in a network namespace, on a thread of its own.
pub fn in_network<T: Send>(namespace: BorrowedFd<'_>, act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let there = move || {
            let kind = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(namespace, Some(kind))?;
            act()
        };
        let worker = std::thread::Builder::new()
            .name("in network".into())
            .spawn_scoped(scope, there)?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Brings the loopback device of the caller's network namespace up.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: all-zero is a valid ifreq; the name fits with its terminator, and the ioctls read and write the flags of
    // this structure alone.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
