//! Messages with descriptors over packet sockets of the unix family.
//!
//! Owns the ancillary data: descriptors, and the sender's PID as the receiver numbers it. Refuses to know what the
//! bytes mean. Invariants: a message arrives whole or is an error; descriptors arrive close-on-exec and are never
//! leaked; a message too long for a socket buffer travels in a memfd, unseen by the caller.

use rustix::fs::MemfdFlags;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// At most so many descriptors travel in one message (SCM_MAX_FD is 253; one may be the memfd of a long body).
pub const MAX_FDS: usize = 250;
/// A longer message travels in a memfd.
const MAX_INLINE: usize = 32 << 10;
/// No message is longer.
pub const MAX_MESSAGE: usize = 64 << 20;

const INLINE: u8 = 0;
const SPILLED: u8 = 1;

/// A message that has arrived.
#[derive(Debug)]
pub struct Received {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
    /// The PID that came with it (SO_PASSCRED is on), as the receiver numbers it.
    pub pid: Option<i32>,
}

/// Sends one message. `claim`: the PID (as this process numbers it) to send instead of one's own; with CAP_SYS_ADMIN any
/// task's, and the receiver sees it in its own numbering: that is how a PID is translated. ESRCH: there is no such task.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>], claim: Option<i32>, wait: bool) -> io::Result<()> {
    if fds.len() > MAX_FDS || bytes.len() > MAX_MESSAGE {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let mut raw: Vec<i32> = fds.iter().map(|f| f.as_raw_fd()).collect();
    if bytes.len() <= MAX_INLINE {
        return send_raw(socket.as_fd(), [&[INLINE], bytes], &raw, claim, wait);
    }
    let mut body = File::from(rustix::fs::memfd_create("dunlin-message", MemfdFlags::CLOEXEC)?);
    body.write_all(bytes)?;
    raw.insert(0, body.as_raw_fd());
    send_raw(socket.as_fd(), [&[SPILLED], &[]], &raw, claim, wait)
}

fn send_raw(socket: BorrowedFd<'_>, parts: [&[u8]; 2], fds: &[i32], claim: Option<i32>, wait: bool) -> io::Result<()> {
    let mut iov = parts.map(|p| libc::iovec {
        iov_base: p.as_ptr().cast_mut().cast(),
        iov_len: p.len(),
    });
    // u64s, so that the headers are aligned.
    let mut control = [0u64; 160];
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov.as_mut_ptr();
    message.msg_iovlen = iov.len();
    let mut used = 0usize;
    let mut push = |kind: i32, payload: &[u8]| {
        // SAFETY: pure arithmetic on the length.
        let (space, len) = unsafe {
            (
                libc::CMSG_SPACE(payload.len() as u32) as usize,
                libc::CMSG_LEN(payload.len() as u32) as usize,
            )
        };
        assert!(used + space <= size_of_val(&control), "ancillary data is bounded");
        // SAFETY: `used` is a multiple of the header's alignment, and header and payload fit (asserted).
        unsafe {
            let at = control.as_mut_ptr().cast::<u8>().add(used).cast::<libc::cmsghdr>();
            (*at).cmsg_len = len;
            (*at).cmsg_level = libc::SOL_SOCKET;
            (*at).cmsg_type = kind;
            std::ptr::copy_nonoverlapping(payload.as_ptr(), libc::CMSG_DATA(at), payload.len());
        }
        used += space;
    };
    if !fds.is_empty() {
        let bytes: Vec<u8> = fds.iter().flat_map(|f| f.to_ne_bytes()).collect();
        push(libc::SCM_RIGHTS, &bytes);
    }
    if let Some(pid) = claim {
        let mut bytes = [0u8; 12];
        bytes[..4].copy_from_slice(&pid.to_ne_bytes());
        bytes[4..8].copy_from_slice(&rustix::process::geteuid().as_raw().to_ne_bytes());
        bytes[8..].copy_from_slice(&rustix::process::getegid().as_raw().to_ne_bytes());
        push(libc::SCM_CREDENTIALS, &bytes);
    }
    if used > 0 {
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = used;
    }
    let flags = libc::MSG_NOSIGNAL | if wait { 0 } else { libc::MSG_DONTWAIT };
    loop {
        // SAFETY: the header points to buffers that live across the call, with their true lengths.
        let n = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) };
        if n >= 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => {}
            e => return Err(e),
        }
    }
}

/// Receives one message as [`send`] sent it. The end of the connection is `UnexpectedEof`.
pub fn receive(socket: impl AsFd, wait: bool) -> io::Result<Received> {
    let mut bytes = vec![0u8; MAX_INLINE + 1];
    let (length, mut fds, pid) = receive_raw(socket, &mut bytes, wait)?;
    bytes.truncate(length);
    match bytes.first() {
        None => Err(io::ErrorKind::UnexpectedEof.into()),
        Some(&INLINE) => {
            bytes.remove(0);
            Ok(Received { bytes, fds, pid })
        }
        Some(_) if !fds.is_empty() => {
            let mut body = File::from(fds.remove(0));
            if body.metadata()?.len() > MAX_MESSAGE as u64 {
                return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
            }
            body.rewind()?;
            bytes.clear();
            body.take(MAX_MESSAGE as u64).read_to_end(&mut bytes)?;
            Ok(Received { bytes, fds, pid })
        }
        Some(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Receives one packet as it is: its length, its descriptors, the sender's PID.
pub fn receive_raw(socket: impl AsFd, bytes: &mut [u8], wait: bool) -> io::Result<(usize, Vec<OwnedFd>, Option<i32>)> {
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut control = [0u64; 160];
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_CMSG_CLOEXEC | if wait { 0 } else { libc::MSG_DONTWAIT };
    let n = loop {
        // SAFETY: the header points to buffers that live across the call, with their true lengths.
        let n = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &mut message, flags) };
        if n >= 0 {
            break n as usize;
        }
        match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => {}
            e => return Err(e),
        }
    };
    let (mut fds, mut pid) = (Vec::new(), None);
    // SAFETY: the kernel filled the control buffer; CMSG_FIRSTHDR and CMSG_NXTHDR stay inside its length, and each
    // descriptor in it is new and ours.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&message);
        while !at.is_null() {
            let data = libc::CMSG_DATA(at);
            let length = (*at).cmsg_len - libc::CMSG_LEN(0) as usize;
            match ((*at).cmsg_level, (*at).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    for i in 0..length / 4 {
                        let fd = data.cast::<i32>().add(i).read_unaligned();
                        fds.push(OwnedFd::from_raw_fd(fd));
                    }
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if length >= 12 => {
                    pid = Some(data.cast::<i32>().read_unaligned());
                }
                _ => {}
            }
            at = libc::CMSG_NXTHDR(&message, at);
        }
    }
    if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok((n, fds, pid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn bytes_and_descriptors_arrive_together() {
        let (a, b) = pair();
        for length in [0, 1, MAX_INLINE, MAX_INLINE + 1, 3 << 20] {
            let bytes: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let (read, write) = rustix::pipe::pipe().unwrap();
            send(&a, &bytes, &[write.as_fd()], None, true).unwrap();
            drop(write);
            let received = receive(&b, true).unwrap();
            assert_eq!(received.bytes, bytes);
            assert_eq!(received.fds.len(), 1);
            rustix::io::write(&received.fds[0], b"x").unwrap();
            drop(received);
            let mut buffer = [0u8; 2];
            assert_eq!(rustix::io::read(&read, &mut buffer).unwrap(), 1);
            assert_eq!(rustix::io::read(&read, &mut buffer).unwrap(), 0, "a copy was leaked");
        }
    }

    #[test]
    fn the_end_and_too_much_are_errors() {
        let (a, b) = pair();
        assert_eq!(receive(&b, false).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let many = vec![a.as_fd(); MAX_FDS];
        send(&a, b"x", &many, None, true).unwrap();
        assert_eq!(receive(&b, true).unwrap().fds.len(), MAX_FDS);
        let many = vec![a.as_fd(); MAX_FDS + 1];
        assert!(send(&a, b"x", &many, None, true).is_err());
        drop(a);
        assert_eq!(receive(&b, true).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_claimed_pid_arrives_and_a_dead_one_is_refused() {
        let (a, b) = pair();
        sockopt::set_socket_passcred(&b, true).unwrap();
        send(&a, b"x", &[], Some(1), true).unwrap();
        assert_eq!(receive(&b, true).unwrap().pid, Some(1));
        let dead = send(&a, b"x", &[], Some(i32::MAX), true).unwrap_err();
        assert_eq!(dead.raw_os_error(), Some(libc::ESRCH));
    }
}
