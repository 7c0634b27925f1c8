//! The sockets of a network namespace, as sock_diag(7) tells them.
//!
//! Owns the question and the parsing of its answers. Refuses to know whose they are.

use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

/// A state of TCP, as the kernel numbers them; sockets of UDP are established or closed (not connected).
pub const ESTABLISHED: u8 = 1;
/// See [`ESTABLISHED`].
pub const CLOSED: u8 = 7;
/// See [`ESTABLISHED`].
pub const CLOSE_WAIT: u8 = 8;
/// See [`ESTABLISHED`]: a handshake that is under way; it is told as this…
pub const SYN_RECEIVED: u8 = 3;
/// …and asked for, by some kernels, as this, too.
pub const NEW_SYN_RECEIVED: u8 = 12;
/// See [`ESTABLISHED`].
pub const LISTENING: u8 = 10;

/// See [`ESTABLISHED`].
pub const TIME_WAIT: u8 = 6;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const REQUEST_ACK: u16 = 5;
const REQUEST_DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_BYTES: usize = 16;
const MESSAGE_BYTES: usize = 72;
const SKV6ONLY: u16 = 11;

/// A socket of TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InetSocket {
    /// Where it is bound.
    pub local: SocketAddr,
    /// Whom it is connected to; zeros if to nobody.
    pub remote: SocketAddr,
    /// Its state.
    pub state: u8,
    /// Bound to IPv6 and to nothing else.
    pub v6_only: bool,
    /// Its user.
    pub uid: u32,
    /// Its inode.
    pub inode: u32,
}

/// What answers, for the namespace it was opened in.
#[derive(Debug)]
pub struct SockDiag(OwnedFd);

impl SockDiag {
    /// For the calling thread's network namespace.
    pub fn open() -> io::Result<SockDiag> {
        let kind = SocketType::RAW;
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            kind,
            SocketFlags::CLOEXEC,
            Some(netlink::SOCK_DIAG),
        )?;
        Ok(SockDiag(socket))
    }

    /// Takes a socket of TCP out of the kernel. Errors: EOPNOTSUPP without CONFIG_INET_DIAG_DESTROY.
    pub fn destroy(&mut self, socket: &InetSocket) -> io::Result<()> {
        let mut request = Vec::with_capacity(HEADER_BYTES + 56);
        request.extend(((HEADER_BYTES + 56) as u32).to_ne_bytes());
        request.extend(SOCK_DESTROY.to_ne_bytes());
        request.extend(REQUEST_ACK.to_ne_bytes());
        request.extend([0u8; 8]);
        let family = if socket.local.is_ipv6() {
            libc::AF_INET6
        } else {
            libc::AF_INET
        };
        request.extend([family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
        request.extend((1u32 << socket.state).to_ne_bytes());
        request.extend(socket.local.port().to_be_bytes());
        request.extend(socket.remote.port().to_be_bytes());
        for address in [socket.local.ip(), socket.remote.ip()] {
            let mut bytes = [0; 16];
            match address {
                IpAddr::V4(address) => bytes[..4].copy_from_slice(&address.octets()),
                IpAddr::V6(address) => bytes = address.octets(),
            }
            request.extend(bytes);
        }
        // Of any device, whatever its cookie.
        request.extend([0; 4]);
        request.extend([0xff; 8]);
        rustix::net::send(&self.0, &request, rustix::net::SendFlags::empty())?;
        let mut buffer = [0u8; 256];
        let (got, _) = rustix::net::recv(&self.0, &mut buffer[..], rustix::net::RecvFlags::empty())?;
        match buffer[..got].get(HEADER_BYTES..HEADER_BYTES + 4) {
            Some(_) if u32_at(&buffer, HEADER_BYTES) == 0 => Ok(()),
            Some(_) => Err(io::Error::from_raw_os_error(-(u32_at(&buffer, HEADER_BYTES) as i32))),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// All sockets of this protocol (by number) and family that are in one of these states.
    pub fn list(&mut self, protocol: u8, six: bool, states: &[u8]) -> io::Result<Vec<InetSocket>> {
        let mut request = Vec::with_capacity(HEADER_BYTES + 56);
        request.extend(((HEADER_BYTES + 56) as u32).to_ne_bytes());
        request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        request.extend(REQUEST_DUMP.to_ne_bytes());
        request.extend([0u8; 8]);
        let family = if six { libc::AF_INET6 } else { libc::AF_INET };
        request.extend([family as u8, protocol, 0, 0]);
        let mask = states.iter().fold(0u32, |mask, state| mask | 1 << state);
        request.extend(mask.to_ne_bytes());
        request.resize(HEADER_BYTES + 56, 0);
        rustix::net::send(&self.0, &request, rustix::net::SendFlags::empty())?;
        let mut sockets = Vec::new();
        let mut buffer = vec![0u8; 64 << 10];
        loop {
            let (got, _) = rustix::net::recv(&self.0, &mut buffer[..], rustix::net::RecvFlags::empty())?;
            if take(&buffer[..got], &mut sockets)? {
                return Ok(sockets);
            }
        }
    }
}

/// Takes the messages of one packet. `true`: there are no more.
fn take(mut packet: &[u8], sockets: &mut Vec<InetSocket>) -> io::Result<bool> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    while packet.len() >= HEADER_BYTES {
        let length = u32_at(packet, 0) as usize;
        let body = packet.get(HEADER_BYTES..length).ok_or_else(invalid)?;
        match u16_at(packet, 4) {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let errno = body.get(..4).map_or(0, |_| u32_at(body, 0) as i32);
                return Err(io::Error::from_raw_os_error(-errno));
            }
            SOCK_DIAG_BY_FAMILY => sockets.push(parse(body).ok_or_else(invalid)?),
            _ => {}
        }
        packet = packet.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// One `inet_diag_msg` with its attributes.
fn parse(body: &[u8]) -> Option<InetSocket> {
    let message = body.get(..MESSAGE_BYTES)?;
    let six = i32::from(message[0]) == libc::AF_INET6;
    let address = |at: usize| match six {
        true => IpAddr::V6(Ipv6Addr::from(
            <[u8; 16]>::try_from(&message[at..at + 16]).expect("16 bytes"),
        )),
        false => IpAddr::V4(Ipv4Addr::from(
            <[u8; 4]>::try_from(&message[at..at + 4]).expect("4 bytes"),
        )),
    };
    let port = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
    let mut socket = InetSocket {
        local: SocketAddr::new(address(8), port(4)),
        remote: SocketAddr::new(address(24), port(6)),
        state: message[1],
        v6_only: false,
        uid: u32_at(message, 64),
        inode: u32_at(message, 68),
    };
    let mut rest = &body[MESSAGE_BYTES..];
    while rest.len() >= 4 {
        let (length, kind) = (usize::from(u16_at(rest, 0)), u16_at(rest, 2));
        let value = rest.get(4..length)?;
        if kind == SKV6ONLY {
            socket.v6_only = value.first().is_some_and(|v| *v != 0);
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(socket)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::fd::AsFd;

    #[test]
    fn a_listener_of_both_families_is_told() {
        let four = TcpListener::bind("127.0.0.1:0").unwrap();
        let six = TcpListener::bind("[::]:0").unwrap();
        let mut diag = SockDiag::open().unwrap();
        let listed = diag.list(6, false, &[LISTENING]).unwrap();
        assert!(listed.iter().any(|s| s.local == four.local_addr().unwrap()));
        let listed = diag.list(6, true, &[LISTENING]).unwrap();
        let found = listed.iter().find(|s| s.local == six.local_addr().unwrap()).unwrap();
        assert!(!found.v6_only);
        assert_eq!(found.state, LISTENING);
    }

    #[test]
    fn a_connection_that_only_waits_for_its_time_is_taken_out() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let ends = (server.local_addr().unwrap(), server.peer_addr().unwrap());
        drop(server);
        drop(client);
        let mut diag = SockDiag::open().unwrap();
        let mut waiting = || {
            let all = diag.list(6, false, &[TIME_WAIT]).unwrap();
            all.into_iter().find(|s| (s.local, s.remote) == ends)
        };
        let found = loop {
            if let Some(found) = waiting() {
                break found;
            }
        };
        SockDiag::open().unwrap().destroy(&found).unwrap();
        assert_eq!(waiting(), None);
    }

    #[test]
    fn a_handshake_that_is_under_way_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // The kernel drops the handshake's last segment, and waits for data.
        let seconds = 30u32.to_ne_bytes();
        crate::socket::options::set_early(
            listener.as_fd(),
            &[crate::socket::options::SocketOption {
                level: libc::IPPROTO_TCP,
                name: libc::TCP_DEFER_ACCEPT,
                value: seconds.to_vec(),
            }],
        )
        .unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let listed = SockDiag::open()
            .unwrap()
            .list(6, false, &[SYN_RECEIVED, NEW_SYN_RECEIVED]);
        let listed = listed.unwrap();
        let found = listed
            .iter()
            .find(|s| s.local == listener.local_addr().unwrap())
            .unwrap();
        assert_eq!(
            (found.state, found.remote),
            (SYN_RECEIVED, client.local_addr().unwrap())
        );
    }

    #[test]
    fn what_is_cut_short_is_an_error() {
        let mut sockets = Vec::new();
        let mut packet = vec![0u8; 32];
        packet[..4].copy_from_slice(&100u32.to_ne_bytes());
        assert!(take(&packet, &mut sockets).is_err());
        packet[..4].copy_from_slice(&32u32.to_ne_bytes());
        packet[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        assert!(take(&packet, &mut sockets).is_err());
        packet[..4].copy_from_slice(&3u32.to_ne_bytes());
        assert!(take(&packet, &mut sockets).is_err());
    }
}
