//! Sockets of the Internet families, as they are captured and made again.
//!
//! Owns socket options ([`options`]), the repair of TCP sockets ([`tcp`]), the queue of UDP sockets ([`udp`]) and packets
//! put under the kernel's nose ([`wire`]). Refuses to know whose a socket is and where it goes. Invariant: what is only
//! read leaves the socket as it was.

pub mod callers;
pub mod options;
pub mod tcp;
pub mod udp;
pub mod unix;
pub mod wire;

use crate::{Errno, check};
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What a socket is, by socket(2)'s three numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct What {
    /// AF_INET, AF_INET6, …
    pub family: i32,
    /// SOCK_STREAM, SOCK_DGRAM, …
    pub kind: i32,
    /// IPPROTO_TCP, IPPROTO_UDP, …
    pub protocol: i32,
}

/// AF_INET.
pub const FAMILY_V4: i32 = libc::AF_INET;
/// AF_INET6.
pub const FAMILY_V6: i32 = libc::AF_INET6;
/// SOCK_STREAM.
pub const STREAM: i32 = libc::SOCK_STREAM;
/// SOCK_DGRAM.
pub const DATAGRAM: i32 = libc::SOCK_DGRAM;
/// IPPROTO_TCP.
pub const TCP: i32 = libc::IPPROTO_TCP;
/// IPPROTO_UDP.
pub const UDP: i32 = libc::IPPROTO_UDP;

/// Reads what a socket is. See socket(7): SO_DOMAIN, SO_TYPE, SO_PROTOCOL.
pub fn what(socket: BorrowedFd<'_>) -> io::Result<What> {
    let get = |name| get_word(socket, libc::SOL_SOCKET, name).map(|word| word as i32);
    Ok(What {
        family: get(libc::SO_DOMAIN)?,
        kind: get(libc::SO_TYPE)?,
        protocol: get(libc::SO_PROTOCOL)?,
    })
}

/// Makes a socket in the network namespace of the calling thread. See socket(2).
pub fn make(what: What) -> io::Result<OwnedFd> {
    // SAFETY: socket takes numbers only and returns a descriptor that nobody else has.
    let fd = check(i64::from(unsafe {
        libc::socket(what.family, what.kind | libc::SOCK_CLOEXEC, what.protocol)
    }))?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Gives a socket to a user: what it may share ports with is a matter of its owner.
pub fn give_to(socket: BorrowedFd<'_>, uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: fchown takes numbers only.
    check(i64::from(unsafe { libc::fchown(socket.as_raw_fd(), uid, gid) }))?;
    Ok(())
}

/// The user and group that a socket belongs to.
pub fn owner(socket: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let stat = rustix::fs::fstat(socket)?;
    Ok((stat.st_uid, stat.st_gid))
}

/// Runs `work` on a thread that is in the network namespace of the given file (`/proc/PID/ns/net`).
pub fn in_network<T: Send>(network: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    crate::namespace::in_network(network, || Ok(work()))
}

/// Puts the calling thread into a network namespace of its own, with the loopback device up.
pub fn leave_network() -> io::Result<()> {
    // SAFETY: changes a namespace of this thread; no memory and no descriptor table is involved.
    check(i64::from(unsafe { libc::unshare(libc::CLONE_NEWNET) }))?;
    crate::namespace::loopback_up()
}

/// Reads an option's bytes; how many there are.
fn get(socket: BorrowedFd<'_>, level: i32, name: i32, into: &mut [u8]) -> Result<usize, Errno> {
    let mut length = into.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `into`, which it may, and the length.
    check(i64::from(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            into.as_mut_ptr().cast(),
            &raw mut length,
        )
    }))?;
    Ok((length as usize).min(into.len()))
}

fn get_word(socket: BorrowedFd<'_>, level: i32, name: i32) -> Result<u32, Errno> {
    let mut word = [0; 4];
    get(socket, level, name, &mut word)?;
    Ok(u32::from_ne_bytes(word))
}

fn set(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
    // SAFETY: the kernel reads `value` only, as long as it is.
    check(i64::from(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    }))?;
    Ok(())
}

fn set_word(socket: BorrowedFd<'_>, level: i32, name: i32, value: u32) -> Result<(), Errno> {
    set(socket, level, name, &value.to_ne_bytes())
}

/// A number that an ioctl(2) reads of a socket.
fn ask(socket: BorrowedFd<'_>, request: libc::Ioctl) -> Result<u32, Errno> {
    let mut answer = 0i32;
    // SAFETY: the requests that this module makes write one int.
    check(i64::from(unsafe {
        libc::ioctl(socket.as_raw_fd(), request, &raw mut answer)
    }))?;
    Ok(answer as u32)
}

/// Receives up to `into.len()` bytes. See recv(2).
fn receive(socket: BorrowedFd<'_>, into: &mut [u8], flags: i32) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most as many bytes as `into` has.
    let got = check(unsafe { libc::recv(socket.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), flags) as i64 })?;
    Ok(got as usize)
}

/// Sends bytes. See send(2).
fn send(socket: BorrowedFd<'_>, bytes: &[u8], flags: i32) -> Result<usize, Errno> {
    // SAFETY: the kernel reads `bytes` only.
    let sent = check(unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) as i64 })?;
    Ok(sent as usize)
}

/// Bit of [`readiness`]: an error waits (POLLERR).
pub const FAILED: i16 = libc::POLLERR;
/// Bit of [`readiness`]: nothing more will come (POLLRDHUP).
pub const ENDED: i16 = libc::POLLRDHUP;

/// What poll(2) says of a socket now: some of POLLIN, POLLOUT, POLLERR, POLLHUP, POLLRDHUP.
pub fn readiness(socket: BorrowedFd<'_>) -> io::Result<i16> {
    let mut entry = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one entry, which outlives the call.
    check(i64::from(unsafe { libc::poll(&raw mut entry, 1, 0) }))?;
    Ok(entry.revents)
}

/// Reads, and thereby clears, the error that waits at a socket (SO_ERROR).
pub fn take_error(socket: BorrowedFd<'_>) -> io::Result<i32> {
    Ok(get_word(socket, libc::SOL_SOCKET, libc::SO_ERROR)? as i32)
}

/// Whether a filter is attached that sees each packet (SO_ATTACH_FILTER, SO_ATTACH_BPF).
pub fn is_filtered(socket: BorrowedFd<'_>) -> bool {
    const SO_GET_FILTER: i32 = 26;
    let mut count: libc::socklen_t = 0;
    // SAFETY: with a length of nothing the kernel tells how long the filter is, and writes none of it.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_GET_FILTER,
            std::ptr::null_mut(),
            &raw mut count,
        )
    };
    // A filter of the newer kind is not shown.
    match check(i64::from(answer)) {
        Ok(_) => count > 0,
        Err(error) => error.0 == libc::EACCES,
    }
}

/// A plain C structure without padding, whose every bit pattern is valid: numbers only.
///
/// # Safety
/// As said.
unsafe trait Numbers: Copy {}

fn get_numbers<T: Numbers>(socket: BorrowedFd<'_>, level: i32, name: i32) -> Result<T, Errno> {
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: the bytes of a zeroed value are initialized, and stay so whatever is written.
    let bytes = unsafe { std::slice::from_raw_parts_mut(value.as_mut_ptr().cast::<u8>(), size_of::<T>()) };
    get(socket, level, name, bytes)?;
    // SAFETY: initialized by zeros, and every bit pattern is valid.
    Ok(unsafe { value.assume_init() })
}

fn set_numbers<T: Numbers>(socket: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> Result<(), Errno> {
    // SAFETY: no padding: all bytes are initialized.
    let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) };
    set(socket, level, name, bytes)
}

/// A second handle on a socket.
pub fn again(socket: &impl AsFd) -> io::Result<OwnedFd> {
    socket.as_fd().try_clone_to_owned()
}
