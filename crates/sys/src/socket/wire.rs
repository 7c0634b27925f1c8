//! Packets of IP, made here and put where the kernel takes them for received ones.
//!
//! Owns the form of TCP segments and UDP datagrams over IPv4 and IPv6, their checksums and fragments, and the sockets through
//! which they are put under the kernel's nose. Refuses to know why. Invariants: a packet's addresses are both of one
//! family; IPv4 addresses in IPv6 clothes are IPv4 addresses.

use crate::check;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The flag of a segment that ends its side.
pub const FIN: u8 = 1;
/// The flag of a segment that breaks a connection off.
pub const RST: u8 = 4;
/// The flag of a segment that is to be given to the program at once.
pub const PSH: u8 = 8;
/// The flag of a segment that acknowledges.
pub const ACK: u8 = 16;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

/// A TCP segment.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// Who sent it.
    pub from: SocketAddr,
    /// To whom.
    pub to: SocketAddr,
    /// The number of its first byte.
    pub sequence: u32,
    /// The number of the next byte that its sender expects.
    pub acknowledges: u32,
    /// [`FIN`], [`ACK`], …
    pub flags: u8,
    /// The window, already scaled.
    pub window: u16,
    /// Its bytes.
    pub bytes: &'a [u8],
}

impl Segment<'_> {
    /// As an IP packet.
    pub fn packet(&self) -> io::Result<Vec<u8>> {
        self.packet_with(&[])
    }

    /// As an IP packet with options: at most 40 bytes, a multiple of four.
    pub fn packet_with(&self, options: &[u8]) -> io::Result<Vec<u8>> {
        assert!(
            options.len() <= 40 && options.len().is_multiple_of(4),
            "options that no header has room for"
        );
        let mut body = Vec::with_capacity(20 + options.len() + self.bytes.len());
        body.extend(self.from.port().to_be_bytes());
        body.extend(self.to.port().to_be_bytes());
        body.extend(self.sequence.to_be_bytes());
        body.extend(self.acknowledges.to_be_bytes());
        body.extend([(5 + options.len() as u8 / 4) << 4, self.flags]);
        body.extend(self.window.to_be_bytes());
        body.extend([0; 4]);
        body.extend(options);
        body.extend(self.bytes);
        let sum = checksum(self.from.ip(), self.to.ip(), PROTOCOL_TCP, &body);
        body[16..18].copy_from_slice(&sum.to_be_bytes());
        packet(self.from.ip(), self.to.ip(), PROTOCOL_TCP, &body)
    }
}

/// A UDP datagram, as an IP packet.
pub fn datagram(from: SocketAddr, to: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(8 + bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut body = Vec::with_capacity(usize::from(length));
    body.extend(from.port().to_be_bytes());
    body.extend(to.port().to_be_bytes());
    body.extend(length.to_be_bytes());
    body.extend([0; 2]);
    body.extend(bytes);
    let sum = checksum(from.ip(), to.ip(), PROTOCOL_UDP, &body);
    // None at all is written as zero.
    let sum = if sum == 0 { 0xffff } else { sum };
    body[6..8].copy_from_slice(&sum.to_be_bytes());
    packet(from.ip(), to.ip(), PROTOCOL_UDP, &body)
}

fn checksum(from: IpAddr, to: IpAddr, protocol: u8, body: &[u8]) -> u16 {
    let (from, to) = (from.to_canonical(), to.to_canonical());
    let mut sum = u32::from(protocol) + body.len() as u32;
    let mut add = |bytes: &[u8]| {
        for pair in bytes.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([pair[0], low]));
        }
    };
    for address in [from, to] {
        match address {
            IpAddr::V4(address) => add(&address.octets()),
            IpAddr::V6(address) => add(&address.octets()),
        }
    }
    add(body);
    fold(sum)
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn packet(from: IpAddr, to: IpAddr, protocol: u8, body: &[u8]) -> io::Result<Vec<u8>> {
    const HOPS: u8 = 64;
    match (from.to_canonical(), to.to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = u16::try_from(20 + body.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut packet = vec![0x45, 0];
            packet.extend(total.to_be_bytes());
            packet.extend([0, 0, 0, 0, HOPS, protocol, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            seal_v4(&mut packet);
            packet.extend(body);
            Ok(packet)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = u16::try_from(body.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend(length.to_be_bytes());
            packet.extend([protocol, HOPS]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            packet.extend(body);
            Ok(packet)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// To whom a packet goes.
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?)),
        6 => Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?)),
        _ => None,
    }
}

/// Writes the checksum of an IPv4 header.
fn seal_v4(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let words = packet[..20].chunks(2);
    let sum = words
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    packet[10..12].copy_from_slice(&fold(sum).to_be_bytes());
}

/// Cuts a packet into pieces that fit a link. `identity` must differ from that of others under way.
pub fn fragments(packet: &[u8], mtu: usize, identity: u32) -> Vec<Vec<u8>> {
    if packet.len() <= mtu {
        return vec![packet.to_vec()];
    }
    let v6 = packet[0] >> 4 == 6;
    let head = if v6 { 40 } else { 20 };
    let room = (mtu - head - if v6 { 8 } else { 0 }) & !7;
    let body = &packet[head..];
    let mut all = Vec::new();
    for (index, piece) in body.chunks(room).enumerate() {
        let at = index * room;
        let more = at + piece.len() < body.len();
        let mut part = packet[..head].to_vec();
        if v6 {
            const FRAGMENT: u8 = 44;
            let next = std::mem::replace(&mut part[6], FRAGMENT);
            part[4..6].copy_from_slice(&((8 + piece.len()) as u16).to_be_bytes());
            part.extend([next, 0]);
            part.extend((at as u16 | u16::from(more)).to_be_bytes());
            part.extend(identity.to_be_bytes());
        } else {
            part[2..4].copy_from_slice(&((head + piece.len()) as u16).to_be_bytes());
            part[4..6].copy_from_slice(&(identity as u16).to_be_bytes());
            part[6..8].copy_from_slice(&((at / 8) as u16 | u16::from(more) << 13).to_be_bytes());
            seal_v4(&mut part);
        }
        part.extend(piece);
        all.push(part);
    }
    all
}

/// A way to send whole frames out of a device: what goes out of one end of a veth comes in at the other.
#[derive(Debug)]
pub struct Frames {
    socket: OwnedFd,
    device: i32,
}

impl Frames {
    /// Opens the device (by its number) in the network namespace of the calling thread.
    pub fn open(device: i32) -> io::Result<Frames> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
        let socket = socket_with(AddressFamily::PACKET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Frames { socket, device })
    }

    /// Sends an IP packet to a neighbour of the device.
    pub fn send(&self, to: [u8; 6], packet: &[u8]) -> io::Result<()> {
        let ether_type: u16 = match packet.first().map(|byte| byte >> 4) {
            Some(6) => 0x86dd,
            _ => 0x0800,
        };
        let mut address = [0; 8];
        address[..6].copy_from_slice(&to);
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: ether_type.to_be(),
            sll_ifindex: self.device,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: address,
        };
        send_to(
            self.socket.as_fd(),
            packet,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>(),
        )
    }
}

/// A way to put packets whose addresses are all of this machine onto its loopback device.
#[derive(Debug)]
pub struct Loop {
    v4: OwnedFd,
    v6: Option<OwnedFd>,
}

impl Loop {
    /// In the network namespace of the calling thread.
    pub fn open() -> io::Result<Loop> {
        use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, ipproto, socket_with};
        let raw =
            |family, protocol: Protocol| socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol));
        Ok(Loop {
            v4: raw(AddressFamily::INET, ipproto::RAW)?,
            v6: raw(AddressFamily::INET6, ipproto::RAW).ok(),
        })
    }

    /// Sends a packet made by [`Segment::packet`] or [`datagram`] to the address that it names.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        // SAFETY: all-zero addresses are valid.
        let (mut v4, mut v6): (libc::sockaddr_in, libc::sockaddr_in6) = unsafe { std::mem::zeroed() };
        if packet[0] >> 4 == 4 {
            v4.sin_family = libc::AF_INET as u16;
            v4.sin_addr.s_addr = u32::from_ne_bytes([packet[16], packet[17], packet[18], packet[19]]);
            let length = size_of::<libc::sockaddr_in>();
            send_to(self.v4.as_fd(), packet, (&raw const v4).cast(), length)
        } else {
            v6.sin6_family = libc::AF_INET6 as u16;
            v6.sin6_addr.s6_addr.copy_from_slice(&packet[24..40]);
            let socket = self.v6.as_ref().ok_or(io::ErrorKind::Unsupported)?;
            let length = size_of::<libc::sockaddr_in6>();
            send_to(socket.as_fd(), packet, (&raw const v6).cast(), length)
        }
    }
}

fn send_to(socket: BorrowedFd<'_>, bytes: &[u8], address: *const libc::sockaddr, length: usize) -> io::Result<()> {
    // SAFETY: the callers' addresses are structures of the length that they say; the kernel only reads.
    check(unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            0,
            address,
            length as libc::socklen_t,
        ) as i64
    })?;
    Ok(())
}
