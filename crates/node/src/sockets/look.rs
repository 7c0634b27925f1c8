//! What a socket is, or why it cannot move.
//!
//! Owns the look at one socket, which changes nothing of it, and the comparison of those that are each other's peers.
//! Refuses to know whose they are.

use super::{is_loopback, portable};
use crate::edge::Inside;
use crate::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::Socket;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::net::{TcpRow, parse_tcp};
use dunlin_sys::socket::tcp::{self, State};
use dunlin_sys::socket::{self, DATAGRAM, FAMILY_V4, FAMILY_V6, STREAM, options};
use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

const IPPROTO_MPTCP: i32 = 262;

/// Why one cannot move, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// Why.
    pub why: String,
    /// What to do.
    pub hint: &'static str,
}

fn reason(why: impl Into<String>, hint: &'static str) -> Reason {
    Reason { why: why.into(), hint }
}

/// Looks at a socket of a process (by its number on this machine); `None` if it is of another family. `inside`: the
/// addresses of its nest.
pub fn look(host: i32, fd: BorrowedFd<'_>, inside: Option<Inside>) -> io::Result<Option<Result<Socket, Reason>>> {
    let what = socket::what(fd)?;
    if !matches!(what.family, FAMILY_V4 | FAMILY_V6) {
        return Ok(None);
    }
    if let Some(reason) = kind_refused(what.kind, what.protocol) {
        return Ok(Some(Err(reason)));
    }
    if what.kind == STREAM
        && let Some(above) = tcp::upper_protocol(fd)
    {
        let why = format!("the kernel itself speaks {above} on it, with keys that it does not give back");
        return Ok(Some(Err(reason(why, "turn kernel TLS off in the program"))));
    }
    if socket::is_filtered(fd) {
        return Ok(Some(Err(reason(
            "a packet filter is attached to it",
            "detach it (SO_DETACH_FILTER) before the move",
        ))));
    }
    let state = match what.kind {
        STREAM => Some(tcp::info(fd)?.state),
        _ => None,
    };
    let local = address(rustix::net::getsockname(fd)?);
    let local = local.filter(|local| local.port() != 0 || !local.ip().is_unspecified());
    let remote = match rustix::net::getpeername(fd) {
        Ok(remote) => remote.and_then(address),
        Err(_) => match state {
            // The kernel does not say it before the connection is there.
            Some(State::SynSent) => opening_to(host, fd)?,
            _ => None,
        },
    };
    if let Some(reason) = address_refused(local, remote, inside) {
        return Ok(Some(Err(reason)));
    }
    let connected = match state {
        Some(State::Closed) => socket::readiness(fd)? & socket::ENDED != 0,
        Some(State::Listening) | None => false,
        Some(_) => true,
    };
    Ok(Some(Ok(Socket {
        family: what.family,
        kind: what.kind,
        protocol: what.protocol,
        owner: socket::owner(fd)?,
        local,
        remote,
        listening: state == Some(State::Listening),
        options: portable(&options::read(fd, what, connected)),
    })))
}

/// Looks once more at a socket of which this was seen; `None` if it is still so.
pub fn look_again(
    host: i32,
    fd: BorrowedFd<'_>,
    seen: &Socket,
    inside: Option<Inside>,
) -> io::Result<Option<Result<Socket, Reason>>> {
    let still = match (super::is_tcp(seen), seen.remote) {
        // A connection keeps its addresses for as long as it lives.
        (true, Some(_)) => tcp::info(fd)?.state.is_connected() && tcp::upper_protocol(fd).is_none(),
        (true, None) if seen.listening => tcp::info(fd)?.state == State::Listening,
        _ => false,
    };
    let options = || seen.options.iter().map(|o| (o.level, o.name, o.value));
    if still && !socket::is_filtered(fd) && options::are(fd, options()) {
        return Ok(None);
    }
    Ok(match look(host, fd, inside)? {
        Some(Ok(now)) if now == *seen => None,
        looked => looked,
    })
}

fn opening_to(host: i32, fd: BorrowedFd<'_>) -> io::Result<Option<SocketAddr>> {
    let inode = rustix::fs::fstat(fd)?.st_ino;
    let rows = tcp_rows(host)?;
    Ok(rows.into_iter().find(|row| row.inode == inode).map(|row| row.remote))
}

/// The TCP sockets of a process's network.
pub fn tcp_rows(host: i32) -> io::Result<Vec<TcpRow>> {
    let dir = ProcDir::process(host);
    let mut rows = parse_tcp(&dir.text("net/tcp")?);
    // A kernel without IPv6 has no such table.
    rows.extend(parse_tcp(&dir.text("net/tcp6").unwrap_or_default()));
    Ok(rows)
}

fn address(any: rustix::net::SocketAddrAny) -> Option<SocketAddr> {
    SocketAddr::try_from(any).ok()
}

fn kind_refused(kind: i32, protocol: i32) -> Option<Reason> {
    match (kind, protocol) {
        (STREAM, socket::TCP) | (DATAGRAM, socket::UDP) => None,
        (_, IPPROTO_MPTCP) => Some(reason(
            "it is a multipath TCP socket, whose state the kernel does not give out",
            "have the program use plain TCP (for Go: GODEBUG=multipathtcp=0)",
        )),
        _ => Some(reason(
            format!("sockets of type {kind} and protocol {protocol} cannot be moved"),
            "close it, or keep the process on this node",
        )),
    }
}

fn address_refused(local: Option<SocketAddr>, remote: Option<SocketAddr>, inside: Option<Inside>) -> Option<Reason> {
    let local = local?.ip().to_canonical();
    if is_loopback(local) {
        return None;
    }
    let Some(inside) = inside else {
        return (!local.is_unspecified() || remote.is_some()).then(|| {
            reason(
                "the cluster has no inside address, so its packets would not find it",
                "a [network] section in each node's configuration gives it one",
            )
        });
    };
    let is_inside = local == IpAddr::V4(inside.v4) || local == IpAddr::V6(inside.v6);
    (!is_inside && !local.is_unspecified()).then(|| {
        reason(
            format!("its address {local} is not the cluster's inside address"),
            "bind it to the inside address (`dunlin lab status`), to 0.0.0.0 or to ::",
        )
    })
}

/// Connections over the loopback device whose other end does not move with them.
pub fn parted<'a>(sockets: impl Iterator<Item = (Pid, i32, &'a Socket)>) -> Vec<Obstacle> {
    let ends = |socket: &Socket| Some((canonical(socket.local?), canonical(socket.remote?)));
    let over_loopback = |socket: &Socket| socket.local.is_some_and(|local| is_loopback(local.ip()));
    let all: Vec<(Pid, i32, &Socket)> = sockets.filter(|(_, _, socket)| over_loopback(socket)).collect();
    let connections: HashSet<_> = all.iter().filter_map(|(_, _, s)| Some((s.kind, ends(s)?))).collect();
    // Of UDP the other end may be anybody's who has that port.
    let ports = all.iter().filter(|(_, _, socket)| !super::is_tcp(socket));
    let ports: HashSet<_> = ports.filter_map(|(_, _, socket)| socket.local.map(canonical)).collect();
    let mut obstacles = Vec::new();
    for (pid, number, socket) in &all {
        let Some((local, remote)) = ends(socket) else { continue };
        let there = connections.contains(&(socket.kind, (remote, local)));
        if !there && (super::is_tcp(socket) || !ports.contains(&remote)) {
            obstacles.push(obstacle::descriptor(
                *pid,
                *number,
                format_args!("{local} to {remote}"),
                "its other end is on this machine's loopback device and does not move with it",
                "move both (--tree), or have them talk over the inside address",
            ));
        }
    }
    obstacles
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(local: &str, remote: &str) -> Socket {
        Socket {
            family: FAMILY_V4,
            kind: STREAM,
            protocol: 6,
            owner: (0, 0),
            local: Some(local.parse().unwrap()),
            remote: Some(remote.parse().unwrap()),
            listening: false,
            options: Vec::new(),
        }
    }

    #[test]
    fn both_ends_of_a_loopback_connection_move_or_neither() {
        let (one, other) = (
            connection("127.0.0.1:80", "127.0.0.1:4000"),
            connection("127.0.0.1:4000", "127.0.0.1:80"),
        );
        assert_eq!(parted([(Pid(7), 3, &one), (Pid(8), 3, &other)].into_iter()), []);
        let alone = parted([(Pid(7), 3, &one)].into_iter());
        assert_eq!(alone.len(), 1);
        assert!(alone[0].object.contains("127.0.0.1:80 to 127.0.0.1:4000"));
        let outside = connection("10.0.0.1:80", "192.0.2.1:5");
        assert_eq!(parted([(Pid(7), 3, &outside)].into_iter()), []);
    }

    #[test]
    fn only_the_inside_address_moves() {
        let inside = Some(Inside {
            v4: "10.0.0.1".parse().unwrap(),
            v6: "fd00::1".parse().unwrap(),
        });
        let at = |local: &str| Some(local.parse().unwrap());
        assert_eq!(address_refused(at("10.0.0.1:80"), None, inside), None);
        assert_eq!(address_refused(at("[::ffff:10.0.0.1]:80"), None, inside), None);
        assert_eq!(address_refused(at("[::]:80"), None, inside), None);
        assert_eq!(address_refused(at("127.0.0.1:80"), None, None), None);
        assert_eq!(address_refused(None, None, None), None);
        let other = address_refused(at("10.0.0.2:80"), None, inside).unwrap();
        assert!(other.why.contains("10.0.0.2"));
        assert!(address_refused(at("10.0.0.1:80"), at("192.0.2.1:5"), None).is_some());
    }
}
