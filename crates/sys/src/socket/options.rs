//! The options of a socket that travel with it.
//!
//! Owns the table of options: which are read, and which may be set by a description that came from elsewhere. Refuses
//! to know what they mean. Invariants: an option that is not in the table is never set; one that the kernel does not know is
//! left out on both sides.

use super::{FAMILY_V6, STREAM, What, get, set};
use crate::Errno;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

/// One option of a socket with its value, as getsockopt(2) gives it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// SOL_SOCKET, IPPROTO_TCP, …
    pub level: i32,
    /// The option.
    pub name: i32,
    /// Its bytes.
    pub value: Vec<u8>,
}

/// When an option can be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// On a new socket, before it has an address.
    Early,
    /// When it is what it will be, and out of repair.
    Late,
}

/// For which sockets an option is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    All,
    Tcp,
    Udp,
    Udp6,
    V4,
    V6,
}

struct Known {
    level: i32,
    name: i32,
    bytes: usize,
    of: Of,
    when: When,
}

const fn early(level: i32, name: i32, bytes: usize, of: Of) -> Known {
    Known {
        level,
        name,
        bytes,
        of,
        when: When::Early,
    }
}

const fn late(level: i32, name: i32, bytes: usize, of: Of) -> Known {
    Known {
        level,
        name,
        bytes,
        of,
        when: When::Late,
    }
}

/// The longest name of a congestion control, and of a device.
const NAME: usize = 16;
/// The longest value.
pub const MAX_VALUE: usize = 32;

const SOL: i32 = libc::SOL_SOCKET;
const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;
const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;

// Not in libc, or not for every target: include/uapi/asm-generic/socket.h, linux/tcp.h, linux/in.h, linux/in6.h.
const SO_NO_CHECK: i32 = 11;
const SO_RCVTIMEO_NEW: i32 = 66;
const SO_SNDTIMEO_NEW: i32 = 67;
const SO_SELECT_ERR_QUEUE: i32 = 45;
const SO_MAX_PACING_RATE: i32 = 47;
const SO_PREFER_BUSY_POLL: i32 = 69;
const SO_TXREHASH: i32 = 74;
const SO_RCVMARK: i32 = 75;
const SO_TIMESTAMPING_OLD: i32 = 37;
const TCP_THIN_LINEAR_TIMEOUTS: i32 = 16;
const TCP_FASTOPEN_CONNECT: i32 = 30;
const TCP_FASTOPEN_NO_COOKIE: i32 = 34;
const TCP_INQ: i32 = 36;
const TCP_TX_DELAY: i32 = 37;
const TCP_SAVE_SYN: i32 = 27;
const IP_BIND_ADDRESS_NO_PORT: i32 = 24;
const IP_MULTICAST_ALL: i32 = 49;
const IP_LOCAL_PORT_RANGE: i32 = 51;
const IP_RECVFRAGSIZE: i32 = 25;
const IPV6_RECVERR: i32 = 25;
const IPV6_FLOWINFO_SEND: i32 = 33;
const IPV6_MULTICAST_ALL: i32 = 29;
const IPV6_AUTOFLOWLABEL: i32 = 70;
const IPV6_MINHOPCOUNT: i32 = 73;
const IPV6_TRANSPARENT: i32 = 75;
const IPV6_FREEBIND: i32 = 78;
const IPV6_RECVORIGDSTADDR: i32 = 74;
const UDP_CORK: i32 = 1;
const UDP_NO_CHECK6_TX: i32 = 101;
const UDP_NO_CHECK6_RX: i32 = 102;
const UDP_SEGMENT: i32 = 103;
const UDP_GRO: i32 = 104;

/// In the order in which they are set. SO_REUSEADDR is late: leaving repair clears it. Buffer sizes are not here: see
/// [`Buffers`](super::tcp::Buffers).
static KNOWN: &[Known] = &[
    early(SOL, libc::SO_DEBUG, 4, Of::All),
    early(SOL, libc::SO_DONTROUTE, 4, Of::All),
    early(SOL, libc::SO_BROADCAST, 4, Of::All),
    early(SOL, libc::SO_KEEPALIVE, 4, Of::All),
    early(SOL, libc::SO_OOBINLINE, 4, Of::All),
    early(SOL, SO_NO_CHECK, 4, Of::Udp),
    early(SOL, libc::SO_PRIORITY, 4, Of::All),
    early(SOL, libc::SO_LINGER, 8, Of::All),
    early(SOL, libc::SO_REUSEPORT, 4, Of::All),
    early(SOL, libc::SO_RCVLOWAT, 4, Of::All),
    early(SOL, SO_RCVTIMEO_NEW, 16, Of::All),
    early(SOL, SO_SNDTIMEO_NEW, 16, Of::All),
    early(SOL, libc::SO_BINDTODEVICE, NAME, Of::All),
    early(SOL, libc::SO_TIMESTAMP, 4, Of::All),
    early(SOL, libc::SO_TIMESTAMPNS, 4, Of::All),
    early(SOL, SO_TIMESTAMPING_OLD, 4, Of::All),
    early(SOL, libc::SO_MARK, 4, Of::All),
    early(SOL, libc::SO_RXQ_OVFL, 4, Of::All),
    early(SOL, SO_SELECT_ERR_QUEUE, 4, Of::All),
    early(SOL, libc::SO_BUSY_POLL, 4, Of::All),
    early(SOL, SO_MAX_PACING_RATE, 4, Of::All),
    early(SOL, libc::SO_ZEROCOPY, 4, Of::All),
    early(SOL, SO_PREFER_BUSY_POLL, 4, Of::All),
    early(SOL, SO_TXREHASH, 4, Of::All),
    early(SOL, SO_RCVMARK, 4, Of::All),
    early(TCP, libc::TCP_CONGESTION, NAME, Of::Tcp),
    early(TCP, libc::TCP_KEEPIDLE, 4, Of::Tcp),
    early(TCP, libc::TCP_KEEPINTVL, 4, Of::Tcp),
    early(TCP, libc::TCP_KEEPCNT, 4, Of::Tcp),
    early(TCP, libc::TCP_SYNCNT, 4, Of::Tcp),
    early(TCP, libc::TCP_LINGER2, 4, Of::Tcp),
    early(TCP, libc::TCP_DEFER_ACCEPT, 4, Of::Tcp),
    early(TCP, TCP_THIN_LINEAR_TIMEOUTS, 4, Of::Tcp),
    early(TCP, libc::TCP_USER_TIMEOUT, 4, Of::Tcp),
    early(TCP, libc::TCP_NOTSENT_LOWAT, 4, Of::Tcp),
    early(TCP, TCP_SAVE_SYN, 4, Of::Tcp),
    early(TCP, TCP_FASTOPEN_CONNECT, 4, Of::Tcp),
    early(TCP, TCP_FASTOPEN_NO_COOKIE, 4, Of::Tcp),
    early(TCP, TCP_INQ, 4, Of::Tcp),
    early(TCP, TCP_TX_DELAY, 4, Of::Tcp),
    early(TCP, libc::TCP_FASTOPEN, 4, Of::Tcp),
    early(TCP, libc::TCP_MAXSEG, 4, Of::Tcp),
    early(IP, libc::IP_TOS, 4, Of::All),
    early(IP, libc::IP_TTL, 4, Of::All),
    early(IP, libc::IP_RECVOPTS, 4, Of::V4),
    early(IP, libc::IP_RETOPTS, 4, Of::V4),
    early(IP, libc::IP_PKTINFO, 4, Of::All),
    early(IP, libc::IP_MTU_DISCOVER, 4, Of::All),
    early(IP, libc::IP_RECVERR, 4, Of::All),
    early(IP, libc::IP_RECVTTL, 4, Of::All),
    early(IP, libc::IP_RECVTOS, 4, Of::All),
    early(IP, libc::IP_FREEBIND, 4, Of::All),
    early(IP, libc::IP_TRANSPARENT, 4, Of::All),
    early(IP, libc::IP_RECVORIGDSTADDR, 4, Of::All),
    early(IP, libc::IP_MINTTL, 4, Of::All),
    early(IP, IP_BIND_ADDRESS_NO_PORT, 4, Of::All),
    early(IP, IP_RECVFRAGSIZE, 4, Of::Udp),
    early(IP, libc::IP_MULTICAST_TTL, 4, Of::Udp),
    early(IP, libc::IP_MULTICAST_LOOP, 4, Of::Udp),
    early(IP, IP_MULTICAST_ALL, 4, Of::Udp),
    early(IP, IP_LOCAL_PORT_RANGE, 4, Of::All),
    early(IP6, libc::IPV6_V6ONLY, 4, Of::V6),
    early(IP6, libc::IPV6_UNICAST_HOPS, 4, Of::V6),
    early(IP6, libc::IPV6_MULTICAST_HOPS, 4, Of::Udp6),
    early(IP6, libc::IPV6_MULTICAST_LOOP, 4, Of::Udp6),
    early(IP6, IPV6_MULTICAST_ALL, 4, Of::Udp6),
    early(IP6, libc::IPV6_MTU_DISCOVER, 4, Of::V6),
    early(IP6, IPV6_RECVERR, 4, Of::V6),
    early(IP6, IPV6_FLOWINFO_SEND, 4, Of::V6),
    early(IP6, libc::IPV6_RECVPKTINFO, 4, Of::V6),
    early(IP6, libc::IPV6_RECVHOPLIMIT, 4, Of::V6),
    early(IP6, libc::IPV6_RECVTCLASS, 4, Of::V6),
    early(IP6, libc::IPV6_TCLASS, 4, Of::V6),
    early(IP6, libc::IPV6_DONTFRAG, 4, Of::V6),
    early(IP6, IPV6_AUTOFLOWLABEL, 4, Of::V6),
    early(IP6, IPV6_MINHOPCOUNT, 4, Of::V6),
    early(IP6, IPV6_TRANSPARENT, 4, Of::V6),
    early(IP6, IPV6_FREEBIND, 4, Of::V6),
    early(IP6, IPV6_RECVORIGDSTADDR, 4, Of::V6),
    early(UDP, UDP_NO_CHECK6_TX, 4, Of::Udp),
    early(UDP, UDP_NO_CHECK6_RX, 4, Of::Udp),
    early(UDP, UDP_SEGMENT, 4, Of::Udp),
    early(UDP, UDP_GRO, 4, Of::Udp),
    late(UDP, UDP_CORK, 4, Of::Udp),
    late(SOL, libc::SO_REUSEADDR, 4, Of::All),
    late(SOL, libc::SO_PEEK_OFF, 4, Of::All),
    // What it sets is both its clamp and what it may announce: after the buffers.
    late(TCP, libc::TCP_WINDOW_CLAMP, 4, Of::Tcp),
    // It must not hold anything back while queues are filled.
    late(TCP, libc::TCP_CORK, 4, Of::Tcp),
    late(TCP, libc::TCP_NODELAY, 4, Of::Tcp),
];

fn applies(known: &Known, what: What) -> bool {
    if what.family == super::unix::FAMILY {
        return known.level == SOL && known.of == Of::All;
    }
    match known.of {
        Of::All => true,
        Of::Tcp => what.kind == STREAM,
        Of::Udp => what.kind != STREAM,
        Of::Udp6 => what.kind != STREAM && what.family == FAMILY_V6,
        Of::V4 => what.family != FAMILY_V6,
        Of::V6 => what.family == FAMILY_V6,
    }
}

/// Reads all options that a socket like this has. Of a `connected` one, the segment size is the path's, not the program's.
pub fn read(socket: BorrowedFd<'_>, what: What, connected: bool) -> Vec<SocketOption> {
    let mut all = Vec::with_capacity(KNOWN.len());
    let of_path = |known: &Known| connected && known.level == TCP && known.name == libc::TCP_MAXSEG;
    for known in KNOWN.iter().filter(|known| applies(known, what) && !of_path(known)) {
        let mut value = [0; MAX_VALUE];
        // An option that this kernel, or this kind of socket, does not have.
        if let Ok(length) = get(socket, known.level, known.name, &mut value[..known.bytes]) {
            all.push(SocketOption {
                level: known.level,
                name: known.name,
                value: value[..length].to_vec(),
            });
        }
    }
    all
}

/// Whether all of these, as they were [read], are still so.
pub fn are(socket: BorrowedFd<'_>, options: impl Iterator<Item = (i32, i32, impl AsRef<[u8]>)>) -> bool {
    let mut now = [0; MAX_VALUE];
    let mut in_order = KNOWN.iter();
    options.into_iter().all(|(level, name, value)| {
        let value = value.as_ref();
        // They come in the order of the table; as much room as it had when it was read.
        let is = |known: &&Known| known.level == level && known.name == name;
        let known = in_order.find(is).or_else(|| KNOWN.iter().find(is));
        let room = known.map_or(value.len(), |known| known.bytes);
        get(socket, level, name, &mut now[..room]).is_ok_and(|length| now[..length] == *value)
    })
}

/// Sets the options that a new socket can have, where they are not what they should be.
///
/// Errors: InvalidData for an option that does not travel; the kernel's own, with the option named.
pub fn set_early(socket: BorrowedFd<'_>, options: &[SocketOption]) -> io::Result<()> {
    set_all(socket, options, When::Early)
}

/// Sets the options that must wait until the socket is what it will be.
pub fn set_late(socket: BorrowedFd<'_>, options: &[SocketOption]) -> io::Result<()> {
    set_all(socket, options, When::Late)
}

fn set_all(socket: BorrowedFd<'_>, options: &[SocketOption], when: When) -> io::Result<()> {
    let mut in_order = KNOWN.iter();
    for option in options {
        // They come in the order of the table, as read.
        let is = |known: &&Known| known.level == option.level && known.name == option.name;
        let known = in_order.find(is).or_else(|| KNOWN.iter().find(is));
        let known = known.filter(|known| option.value.len() <= known.bytes.max(4));
        let known = known.ok_or_else(|| {
            let what = format!("socket option {}/{} does not travel", option.level, option.name);
            io::Error::new(io::ErrorKind::InvalidData, what)
        })?;
        if known.when != when || is_default_segment(option) {
            continue;
        }
        let mut value = [0; MAX_VALUE];
        let now = get(socket, option.level, option.name, &mut value[..known.bytes]);
        if now.is_ok_and(|length| value[..length] == option.value) {
            continue;
        }
        if let Err(error) = set(socket, option.level, option.name, &option.value) {
            if is_about_nothing(option, error) {
                continue;
            }
            let what = format!("setting socket option {}/{}: {error}", option.level, option.name);
            return Err(io::Error::other(what));
        }
    }
    Ok(())
}

/// Is it one of those that must wait until the socket is what it will be?
pub fn is_late(level: i32, name: i32) -> bool {
    // They are the last of the table.
    let late = KNOWN.iter().rev().take_while(|known| known.when == When::Late);
    late.into_iter().any(|known| known.level == level && known.name == name)
}

/// Is it one of those that a new socket can have?
fn is_early(option: &SocketOption) -> bool {
    let known = KNOWN.iter().find(|k| k.level == option.level && k.name == option.name);
    known.is_some_and(|known| known.when == When::Early)
}

/// Must a rebuilt socket that still waits in repair, and has this address, show it as the captured one did?
///
/// In repair the segment size is what the peer takes. A socket that is bound to one address of IPv6 is for IPv6 only; one
/// that came by its address by connecting is not, but for that there is no difference.
pub fn is_seen_in_repair(option: &SocketOption, local: Option<IpAddr>) -> bool {
    let of_repair = option.level == TCP && option.name == libc::TCP_MAXSEG;
    let of_address = is_only_six(option) && local.is_some_and(|ip| !ip.is_unspecified());
    is_early(option) && !of_repair && !of_address
}

fn is_only_six(option: &SocketOption) -> bool {
    option.level == IP6 && option.name == libc::IPV6_V6ONLY
}

/// The segment size of a socket that the program has said nothing about. It must not be set: that would limit it to this.
fn is_default_segment(option: &SocketOption) -> bool {
    const TCP_MSS_DEFAULT: i32 = 536;
    option.level == TCP && option.name == libc::TCP_MAXSEG && option.value == TCP_MSS_DEFAULT.to_ne_bytes()
}

/// A window clamp of nothing is the kernel's own choice and cannot be set; nor can it be that a socket which has its address
/// is for IPv6 only.
fn is_about_nothing(option: &SocketOption, error: Errno) -> bool {
    let clamp = option.level == TCP && option.name == libc::TCP_WINDOW_CLAMP;
    // The own path's option is gone with its kernel module; what it tuned is not what the program sees.
    let foreign = option.level == TCP && option.name == libc::TCP_CONGESTION && error.0 == libc::ENOENT;
    ((clamp || is_only_six(option)) && error.0 == libc::EINVAL) || foreign
}
