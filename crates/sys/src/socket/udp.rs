//! UDP sockets: the datagrams that wait in them.
//!
//! Owns the reading of the queue without taking it out. Refuses to know what is done with it. Invariant: the queue and
//! the socket's peek offset are as before; but an empty datagram is seen once only (the kernel marks it).

use super::{get_word, set_word};
use crate::check;
use std::io;
use std::mem::size_of;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

const SOL: i32 = libc::SOL_SOCKET;
const SO_PEEK_OFF: i32 = 42;
const LARGEST: usize = 65536;
/// More datagrams than any buffer holds.
const MAX_DATAGRAMS: usize = 1 << 16;

/// One datagram that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Who sent it.
    pub from: SocketAddr,
    /// To which of this machine's addresses, if that can be told.
    pub to: Option<std::net::IpAddr>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Reads the datagrams that wait in a socket, oldest first. Nobody else may read it meanwhile.
pub fn queue(socket: BorrowedFd<'_>, v6: bool) -> io::Result<Vec<Waiting>> {
    let before = get_word(socket, SOL, SO_PEEK_OFF)?;
    // With an offset, each look goes on where the one before ended.
    set_word(socket, SOL, SO_PEEK_OFF, 0)?;
    let (level, name) = match v6 {
        true => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
        false => (libc::IPPROTO_IP, libc::IP_PKTINFO),
    };
    let told = get_word(socket, level, name)?;
    set_word(socket, level, name, 1)?;
    let read = read_all(socket);
    set_word(socket, level, name, told)?;
    set_word(socket, SOL, SO_PEEK_OFF, before)?;
    read
}

fn read_all(socket: BorrowedFd<'_>) -> io::Result<Vec<Waiting>> {
    let mut all = Vec::new();
    let mut buffer = vec![0; LARGEST];
    while let Some(datagram) = look(socket, &mut buffer)? {
        all.push(datagram);
        if all.len() > MAX_DATAGRAMS {
            return Err(io::Error::other("a queue of datagrams has no end"));
        }
    }
    Ok(all)
}

fn look(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<Waiting>> {
    // SAFETY: all-zero is valid for these.
    let (mut from, mut header): (libc::sockaddr_storage, libc::msghdr) = unsafe { std::mem::zeroed() };
    let mut control = [0u64; 32];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    header.msg_name = (&raw mut from).cast();
    header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: everything that the header points at outlives the call and is as long as it says.
    let got = check(unsafe {
        libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_PEEK | libc::MSG_DONTWAIT) as i64
    });
    let got = match got {
        Ok(got) => got as usize,
        Err(error) if error.0 == libc::EAGAIN => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(Some(Waiting {
        from: address(&from).ok_or(io::ErrorKind::InvalidData)?,
        to: destination(&header),
        bytes: buffer[..got].to_vec(),
    }))
}

fn address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: sockaddr_storage is as large and as aligned as any address, and this is one of IPv4.
            let v4 = unsafe { &*std::ptr::from_ref(storage).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above, of IPv6.
            let v6 = unsafe { &*std::ptr::from_ref(storage).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), v6.sin6_flowinfo, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// What the control messages say of the destination.
fn destination(header: &libc::msghdr) -> Option<std::net::IpAddr> {
    // SAFETY: the header is as recvmsg left it: the macros walk over messages that lie within its control buffer.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while !message.is_null() {
            let data = libc::CMSG_DATA(message);
            match ((*message).cmsg_level, (*message).cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    return Some(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()).into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    return Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                }
                _ => message = libc::CMSG_NXTHDR(header, message),
            }
        }
    }
    None
}
