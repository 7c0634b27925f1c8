//! Sockets of the unix family: who is at the other end, and what waits in them.
//!
//! Owns the questions of unix_diag (sock_diag(7)) and the reading of queues without taking anything out, descriptors in
//! flight included. Refuses to know what is done with it. Invariant: queue, peek offset and SO_PASSCRED are as before; but an
//! empty datagram is seen once only (the kernel marks it).

use super::{get_word, set_word};
use crate::check;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// SOCK_SEQPACKET.
pub const SEQUENCED: i32 = libc::SOCK_SEQPACKET;
/// AF_UNIX.
pub const FAMILY: i32 = libc::AF_UNIX;
const SOL: i32 = libc::SOL_SOCKET;
const SO_PEEK_OFF: i32 = 42;
/// More than the largest buffer that an ordinary user can ask for by default; a queue beyond it is an error.
const MAX_BYTES: usize = 64 << 20;
const MAX_MESSAGES: usize = 1 << 16;
/// SCM_MAX_FD of the kernel.
const MAX_FDS: usize = 253;

/// Who sent a message, as the reader numbers processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// 0: the sender said nothing, or is not seen from here.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What waits in a socket: a message, or a stretch of a stream.
#[derive(Debug)]
pub struct Waiting {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Descriptors in flight, here: second handles.
    pub descriptors: Vec<OwnedFd>,
    /// Who sent it, if the kernel noted it.
    pub credentials: Option<Credentials>,
    /// The sender's address, as bytes of `sun_path`; empty for a socket without one.
    pub from: Vec<u8>,
}

/// Reads what waits in a socket, oldest first. Nobody else may read it meanwhile. Of a stream, a stretch with descriptors ends with
/// the bytes that they were sent with, and may begin before them: how far, is not to be seen.
pub fn queue(socket: BorrowedFd<'_>, is_stream: bool) -> io::Result<Vec<Waiting>> {
    let before = get_word(socket, SOL, SO_PEEK_OFF)?;
    let passes = get_word(socket, SOL, libc::SO_PASSCRED)?;
    set_word(socket, SOL, libc::SO_PASSCRED, 1)?;
    let read = read_all(socket, is_stream);
    set_word(socket, SOL, libc::SO_PASSCRED, passes)?;
    set_word(socket, SOL, SO_PEEK_OFF, before)?;
    read
}

fn read_all(socket: BorrowedFd<'_>, is_stream: bool) -> io::Result<Vec<Waiting>> {
    let mut all = Vec::new();
    let mut offset = 0usize;
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        set_word(socket, SOL, SO_PEEK_OFF, offset as u32)?;
        let Some((length, waiting)) = look(socket, &mut buffer)? else {
            return Ok(all);
        };
        if length > buffer.len() {
            // A message larger than the buffer; its descriptors come again.
            buffer.resize(length.min(MAX_BYTES), 0);
            continue;
        }
        if is_stream && length == 0 {
            // The other end is shut down or gone.
            return Ok(all);
        }
        offset += waiting.bytes.len();
        all.push(waiting);
        if offset > MAX_BYTES || all.len() > MAX_MESSAGES {
            return Err(io::Error::other(
                "more waits in a unix socket than any buffer should hold",
            ));
        }
    }
}

/// One look, from the peek offset on: the length of what is there, and as much of it as the buffer holds.
fn look(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<(usize, Waiting)>> {
    // SAFETY: all-zero is valid for these.
    let (mut from, mut header): (libc::sockaddr_un, libc::msghdr) = unsafe { std::mem::zeroed() };
    let mut control = [0u64; (MAX_FDS * 4 + 256) / 8];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    header.msg_name = (&raw mut from).cast();
    header.msg_namelen = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | libc::MSG_TRUNC;
    // SAFETY: everything that the header points at outlives the call and is as long as it says.
    let got = match check(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) as i64 }) {
        Ok(got) => got as usize,
        Err(error) if error.0 == libc::EAGAIN => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut waiting = Waiting {
        bytes: buffer[..got.min(buffer.len())].to_vec(),
        descriptors: Vec::new(),
        credentials: None,
        from: name_of(&from, header.msg_namelen),
    };
    // SAFETY: the header is as recvmsg left it: the macros walk over messages that lie within its control buffer, and
    // each descriptor in it is new and ours.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&header);
        while !message.is_null() {
            let data = libc::CMSG_DATA(message);
            let length = (*message).cmsg_len - libc::CMSG_LEN(0) as usize;
            match ((*message).cmsg_level, (*message).cmsg_type) {
                (SOL, libc::SCM_RIGHTS) => {
                    for i in 0..length / 4 {
                        let fd = data.cast::<i32>().add(i).read_unaligned();
                        waiting.descriptors.push(OwnedFd::from_raw_fd(fd));
                    }
                }
                (SOL, libc::SCM_CREDENTIALS) => {
                    let sent = data.cast::<libc::ucred>().read_unaligned();
                    // What the kernel makes of "nothing was noted".
                    const NOBODY: u32 = 65534;
                    let noted = sent.pid != 0 || sent.uid != NOBODY;
                    waiting.credentials = noted.then_some(Credentials {
                        pid: sent.pid,
                        uid: sent.uid,
                        gid: sent.gid,
                    });
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(&header, message);
        }
    }
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::other(
            "descriptors in flight could not all be received (RLIMIT_NOFILE of the daemon)",
        ));
    }
    Ok(Some((got, waiting)))
}

fn name_of(address: &libc::sockaddr_un, length: libc::socklen_t) -> Vec<u8> {
    let path = std::mem::offset_of!(libc::sockaddr_un, sun_path);
    let length = (length as usize).saturating_sub(path).min(address.sun_path.len());
    address.sun_path[..length].iter().map(|b| *b as u8).collect()
}

/// Sends a message with descriptors, and with credentials that are not one's own: with CAP_SYS_ADMIN and CAP_SETUID any that
/// a living process has. How many bytes went.
pub fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    credentials: Option<Credentials>,
) -> io::Result<usize> {
    let mut control = [0u64; (MAX_FDS * 4 + 256) / 8];
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    let raw: Vec<u8> = descriptors.iter().flat_map(|fd| fd.as_raw_fd().to_ne_bytes()).collect();
    let said = credentials.map(|c| [c.pid as u32, c.uid, c.gid].map(u32::to_ne_bytes).concat());
    let parts = [
        (libc::SCM_RIGHTS, raw),
        (libc::SCM_CREDENTIALS, said.unwrap_or_default()),
    ];
    let mut used = 0;
    for (kind, payload) in parts.iter().filter(|(_, payload)| !payload.is_empty()) {
        // SAFETY: pure arithmetic.
        let (space, length) = unsafe {
            let length = payload.len() as u32;
            (libc::CMSG_SPACE(length) as usize, libc::CMSG_LEN(length) as usize)
        };
        if used + space > size_of_val(&control) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: `used` is a multiple of the header's alignment, and header and payload fit (checked).
        unsafe {
            let at = control.as_mut_ptr().cast::<u8>().add(used).cast::<libc::cmsghdr>();
            (*at).cmsg_len = length;
            (*at).cmsg_level = SOL;
            (*at).cmsg_type = *kind;
            std::ptr::copy_nonoverlapping(payload.as_ptr(), libc::CMSG_DATA(at), payload.len());
        }
        used += space;
    }
    if used > 0 {
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = used;
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the header points to buffers that outlive the call, with their true lengths.
    let sent = check(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) as i64 })?;
    Ok(sent as usize)
}

/// An option that is a number.
pub fn option(socket: BorrowedFd<'_>, name: i32) -> io::Result<u32> {
    Ok(get_word(socket, SOL, name)?)
}

/// Sets one.
pub fn set_option(socket: BorrowedFd<'_>, name: i32, value: u32) -> io::Result<()> {
    Ok(set_word(socket, SOL, name, value)?)
}

/// What unix_diag says of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Relations {
    /// TCP_ESTABLISHED 1, TCP_CLOSE 7, TCP_LISTEN 10.
    pub state: u8,
    /// The inode of the other end; 0: it is closed.
    pub peer: Option<u64>,
    /// RCV_SHUTDOWN 1, SEND_SHUTDOWN 2.
    pub shutdown: u8,
    /// Of a listening socket: the inodes of the sockets that have connected and were not accepted.
    pub waiting: Vec<u64>,
    /// Of a listening socket: how many may wait.
    pub backlog: u32,
    /// Bytes of the kernel's memory that what it sent, and nobody has received, takes.
    pub charged: u32,
}

/// A socket through which the unix sockets of the calling thread's network namespace can be asked for.
pub fn diagnosis() -> io::Result<OwnedFd> {
    const NETLINK_SOCK_DIAG: i32 = 4;
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes numbers only and returns a descriptor that nobody else has.
    let fd = check(i64::from(unsafe {
        libc::socket(libc::AF_NETLINK, kind, NETLINK_SOCK_DIAG)
    }))?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Asks for one socket by its inode. ENOENT: there is none in that network namespace.
pub fn relations(diagnosis: BorrowedFd<'_>, inode: u64) -> io::Result<Relations> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    /// UDIAG_SHOW_PEER | ICONS | RQLEN | MEMINFO.
    const SHOW: u32 = 0x4 | 0x8 | 0x10 | 0x20;
    let mut request = [0u8; 40];
    request[0..4].copy_from_slice(&40u32.to_ne_bytes());
    request[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    // struct unix_diag_req: family, protocol, padding, states, inode, what to show, no cookie.
    request[16] = libc::AF_UNIX as u8;
    request[20..24].copy_from_slice(&u32::MAX.to_ne_bytes());
    request[24..28].copy_from_slice(&(inode as u32).to_ne_bytes());
    request[28..32].copy_from_slice(&SHOW.to_ne_bytes());
    request[32..40].fill(0xff);
    super::send(diagnosis, &request, 0)?;
    let mut answer = vec![0u8; 32 << 10];
    let length = super::receive(diagnosis, &mut answer, 0)?;
    parse_relations(&answer[..length])
}

fn parse_relations(answer: &[u8]) -> io::Result<Relations> {
    const NLMSG_ERROR: u16 = 2;
    const HEADER: usize = 16;
    /// Family, kind, state, padding, inode, cookie.
    const FIXED: usize = 16;
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "an answer of unix_diag that makes no sense");
    let word = |at: usize| {
        let bytes = answer.get(at..at + 4).ok_or_else(bad)?;
        Ok::<u32, io::Error>(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let half = |at: usize| Ok::<u16, io::Error>((word(at & !3)? >> (8 * (at & 3))) as u16);
    if half(4)? == NLMSG_ERROR {
        return Err(io::Error::from_raw_os_error(-(word(HEADER)? as i32)));
    }
    let end = (word(0)? as usize).min(answer.len());
    let mut relations = Relations {
        state: *answer.get(HEADER + 2).ok_or_else(bad)?,
        ..Relations::default()
    };
    let mut at = HEADER + FIXED;
    while at + 4 <= end {
        let (length, kind) = (usize::from(half(at)?), half(at + 2)?);
        if length < 4 || at + length > end {
            return Err(bad());
        }
        match kind {
            // UNIX_DIAG_PEER
            2 => relations.peer = Some(u64::from(word(at + 4)?)),
            // UNIX_DIAG_ICONS
            3 => {
                for i in (4..length).step_by(4) {
                    relations.waiting.push(u64::from(word(at + i)?));
                }
            }
            // UNIX_DIAG_RQLEN: of a listening socket, how many wait and how many may.
            4 => relations.backlog = word(at + 8)?,
            // UNIX_DIAG_MEMINFO: the third is SK_MEMINFO_WMEM_ALLOC.
            5 => relations.charged = word(at + 12)?,
            // UNIX_DIAG_SHUTDOWN
            6 => relations.shutdown = answer[at + 4],
            _ => {}
        }
        at += length.next_multiple_of(4);
    }
    Ok(relations)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::os::fd::AsFd;

    fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn inode(fd: &OwnedFd) -> u64 {
        rustix::fs::fstat(fd).unwrap().st_ino
    }

    #[test]
    fn a_queue_is_seen_and_stays() {
        let (a, b) = pair(SocketType::STREAM);
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(queue(b.as_fd(), true).unwrap().is_empty());
        send(a.as_fd(), b"one", &[], None).unwrap();
        send(a.as_fd(), b"two", &[], None).unwrap();
        send(a.as_fd(), b"with", &[file.as_fd(), a.as_fd()], None).unwrap();
        send(a.as_fd(), &vec![7; 100_000], &[], None).unwrap();
        for _ in 0..2 {
            let all = queue(b.as_fd(), true).unwrap();
            let bytes: Vec<u8> = all.iter().flat_map(|w| w.bytes.clone()).collect();
            assert_eq!(bytes.len(), 10 + 100_000);
            assert!(bytes.starts_with(b"onetwowith\x07"));
            let with = all.iter().find(|w| !w.descriptors.is_empty()).unwrap();
            assert!(
                with.bytes.ends_with(b"with"),
                "{:?}",
                String::from_utf8_lossy(&with.bytes)
            );
            assert_eq!(with.descriptors.len(), 2);
            assert_eq!(inode(&with.descriptors[1]), inode(&a));
        }
        let mut buffer = [0; 7];
        assert_eq!(rustix::io::read(&b, &mut buffer).unwrap(), 7);
        assert_eq!(&buffer, b"onetwow");
    }

    #[test]
    fn messages_keep_their_bounds_and_who_sent_them() {
        for kind in [SocketType::DGRAM, SocketType::SEQPACKET] {
            let (a, b) = pair(kind);
            let me = Credentials {
                pid: std::process::id() as i32,
                uid: 1234,
                gid: 77,
            };
            send(a.as_fd(), b"plain", &[], None).unwrap();
            send(a.as_fd(), &vec![1; 90_000], &[], None).unwrap();
            send(a.as_fd(), b"signed", &[], Some(me)).unwrap();
            for _ in 0..2 {
                let all = queue(b.as_fd(), false).unwrap();
                assert_eq!(all.iter().map(|w| w.bytes.len()).collect::<Vec<_>>(), [5, 90_000, 6]);
                assert_eq!(all[0].credentials, None);
                assert_eq!(all[2].credentials, Some(me));
            }
        }
    }

    #[test]
    fn relations_are_told() {
        let ask = diagnosis().unwrap();
        let (a, b) = pair(SocketType::STREAM);
        let of = |fd: &OwnedFd| relations(ask.as_fd(), inode(fd)).unwrap();
        assert_eq!((of(&a).peer, of(&a).state, of(&a).shutdown), (Some(inode(&b)), 1, 0));
        assert_eq!(of(&a).charged, 0);
        send(a.as_fd(), b"x", &[], None).unwrap();
        assert!(of(&a).charged > 0 && of(&b).charged == 0);
        assert_eq!(rustix::io::read(&b, &mut [0; 2]).unwrap(), 1);
        rustix::net::shutdown(&a, rustix::net::Shutdown::Write).unwrap();
        assert_eq!((of(&a).shutdown, of(&b).shutdown), (2, 1));
        drop(b);
        assert_eq!((of(&a).peer, of(&a).shutdown), (Some(0), 3));
        let listener =
            std::os::unix::net::UnixListener::bind(std::env::temp_dir().join(format!("dunlin-{}", std::process::id())));
        let listener = listener.unwrap();
        let address = listener.local_addr().unwrap();
        let clients = [0, 1].map(|_| OwnedFd::from(std::os::unix::net::UnixStream::connect_addr(&address).unwrap()));
        std::fs::remove_file(address.as_pathname().unwrap()).unwrap();
        let listener = OwnedFd::from(listener);
        let told = of(&listener);
        assert_eq!(told.state, 10);
        assert_eq!(told.waiting, clients.each_ref().map(inode));
        assert!(told.backlog >= 128);
        assert_eq!(
            relations(ask.as_fd(), 1).unwrap_err().raw_os_error(),
            Some(libc::ENOENT)
        );
    }
}
