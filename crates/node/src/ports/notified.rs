//! bind(2) and listen(2) of programs, as the nest's filter notifies them.
//!
//! Owns the reading of such a call. Refuses to carry it out: the kernel does, with the caller's own rights. What the caller changes
//! in its memory meanwhile harms nobody but itself: a port that was not claimed is not steered to. Invariant: every
//! call that is taken is answered.

use crate::daemon::node::Node;
use crate::edge::announce;
use crate::nest::Response;
use dunlin_proto::endpoint::{Endpoint, Proto};
use dunlin_proto::ids::Pid;
use dunlin_sys::foothold::take_descriptor;
use rustix::io::Errno;
use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketType};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

const SYS_BIND: i64 = 49;
const SYS_LISTEN: i64 = 50;
/// Ports below this are for those with CAP_NET_BIND_SERVICE.
const FIRST_UNPRIVILEGED: u16 = 1024;
/// `sockaddr_in` and `sockaddr_in6`.
const ADDRESS_BYTES: [usize; 2] = [16, 28];

/// Is it one of these?
pub fn is_taken(nr: i64) -> bool {
    matches!(nr, SYS_BIND | SYS_LISTEN)
}

/// Takes a notified call; its answer comes by itself.
pub fn take(node: &Arc<Node>, id: u64, tid: Pid, nr: i64, args: [u64; 6]) {
    let worker = node.clone();
    let spawned = thread::Builder::new().name("a port".into()).spawn(move || {
        let response = decide(&worker, tid, nr, args);
        worker.respond(id, response);
        if let Some(ports) = &worker.ports {
            ports.look_soon();
        }
    });
    if let Err(e) = spawned {
        tracing::error!("no thread to claim a port for {tid}: {e}");
        node.respond(id, Response::Continue);
    }
}

fn decide(node: &Arc<Node>, tid: Pid, nr: i64, args: [u64; 6]) -> Response {
    let Some(ports) = &node.ports else {
        return Response::Continue;
    };
    // Whatever is not understood is the kernel's to judge.
    let wanted = match wanted(node, tid, nr, args) {
        Ok(Some(wanted)) => wanted,
        Ok(None) => return Response::Continue,
        Err(error) => {
            tracing::debug!(%tid, %error, "a call that may take a port was not understood");
            return Response::Continue;
        }
    };
    match ports.claim(&wanted.ports, wanted.open) {
        Ok(()) => Response::Continue,
        Err(super::Taken(holder)) => {
            let holder = node.config.name_of(holder);
            tracing::info!(%tid, port = %wanted.ports[0], %holder, "a program wants a port that another node has");
            Response::Errno(Errno::ADDRINUSE.raw_os_error())
        }
    }
}

struct Wanted {
    ports: Vec<Endpoint>,
    open: bool,
}

fn wanted(node: &Node, tid: Pid, nr: i64, args: [u64; 6]) -> io::Result<Option<Wanted>> {
    let Some(process) = node.proc.process_of(tid)? else {
        return Ok(None);
    };
    let Some(host) = node.nest.host_pid(process)? else {
        return Ok(None);
    };
    let socket = take_descriptor(host, args[0] as i32)?;
    let family = sockopt::socket_domain(&socket)?;
    let six = match family {
        AddressFamily::INET => false,
        AddressFamily::INET6 => true,
        _ => return Ok(None),
    };
    let proto = match sockopt::socket_type(&socket)? {
        SocketType::STREAM => Proto::Tcp,
        SocketType::DGRAM => Proto::Udp,
        _ => return Ok(None),
    };
    let address = match nr {
        SYS_BIND => address_at(node, tid, args[1], args[2], six)?,
        _ => bound_to(&socket)?,
    };
    let v6_only = six && sockopt::ipv6_v6only(&socket)?;
    let ports = announce::answers_for(proto, address, v6_only);
    let may = address.port() >= FIRST_UNPRIVILEGED || node.proc.may_bind_low_ports(tid)?;
    let open = nr == SYS_LISTEN || proto == Proto::Udp;
    Ok((may && !ports.is_empty()).then_some(Wanted { ports, open }))
}

fn address_at(node: &Node, tid: Pid, at: u64, length: u64, six: bool) -> io::Result<SocketAddr> {
    let bytes = ADDRESS_BYTES[usize::from(six)];
    if length < bytes as u64 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut buffer = [0u8; ADDRESS_BYTES[1]];
    node.proc.memory(tid, at, &mut buffer[..bytes])?;
    parse(&buffer[..bytes]).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// A `sockaddr_in` or `sockaddr_in6`.
fn parse(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    let ip = match family {
        // bind(2) takes AF_UNSPEC for AF_INET with INADDR_ANY.
        0 | 2 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(4..8)?).ok()?)),
        10 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(8..24)?).ok()?)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

fn bound_to(socket: &OwnedFd) -> io::Result<SocketAddr> {
    let name = rustix::net::getsockname(socket.as_fd())?;
    SocketAddr::try_from(name).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_the_kernel_reads_them() {
        let mut four = [0u8; 16];
        four[..8].copy_from_slice(&[2, 0, 0x1f, 0x90, 10, 1, 2, 3]);
        assert_eq!(parse(&four), Some("10.1.2.3:8080".parse().unwrap()));
        let mut six = [0u8; 28];
        six[..4].copy_from_slice(&[10, 0, 0, 80]);
        six[23] = 1;
        assert_eq!(parse(&six), Some("[::1]:80".parse().unwrap()));
        assert_eq!(parse(&six[..20]), None);
        assert_eq!(parse(&[1, 0, 0, 80]), None);
    }
}
