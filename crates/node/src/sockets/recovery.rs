//! Sockets that a daemon which was killed has left in repair.
//!
//! Owns how they are found, by what the kernel says of each, and what must be written down of those that were rebuilt. Refuses
//! to know which processes go on. Invariant: when a process runs again, none of its sockets is in repair.

use super::arriving::Arriving;
use crate::edge::Edge;
use dunlin_proto::endpoint::Endpoint;
use dunlin_proto::image::{Caller, Files, FrozenSocket, SocketOption, SocketState};
use dunlin_sys::foothold::take_descriptor;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::socket::{self, FAMILY_V4, FAMILY_V6, STREAM, tcp};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// A socket of a process that was rebuilt and waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSocket {
    number: i32,
    buffers: [u32; 3],
    options: Vec<SocketOption>,
    endpoints: Vec<Endpoint>,
    /// Who waits at it.
    callers: Vec<Caller>,
}

/// What is written down of a process's sockets, which have these descriptors.
pub fn kept(arriving: &Arriving, frozen: &[FrozenSocket], files: &Files) -> Vec<KeptSocket> {
    let news: BTreeMap<u64, &FrozenSocket> = frozen.iter().map(|new| (new.key, new)).collect();
    let mut all = Vec::new();
    for (description, number) in files.descriptions.iter().zip(files.numbers()) {
        let made = arriving.socket(description.key);
        if let (Some(number), Some(new), Some(socket)) = (number, news.get(&description.key), made) {
            let callers = match &new.state {
                SocketState::Listening { callers, .. } => callers.clone(),
                _ => Vec::new(),
            };
            let mut endpoints = super::endpoints::of(socket);
            endpoints.extend(super::endpoints::of_callers(callers.iter().map(|c| (c.from, c.to))));
            all.push(KeptSocket {
                number,
                buffers: new.buffers,
                options: super::late(&socket.options).cloned().collect(),
                endpoints,
                callers,
            });
        }
    }
    all
}

/// Has the sockets of a rebuilt process, which may run now, go on as [`Arriving::speak`](super::arriving::Arriving::speak)
/// would have.
pub fn speak(edge: &Edge, host: i32, kept: &[KeptSocket]) -> io::Result<()> {
    let endpoints: Vec<Endpoint> = kept
        .iter()
        .flat_map(|socket| socket.endpoints.iter().copied())
        .collect();
    if !endpoints.is_empty() {
        edge.arrive(&endpoints).map_err(io::Error::other)?;
    }
    for socket in kept {
        let fd = take_descriptor(host, socket.number)?;
        if is_in_repair(&fd) {
            tcp::finish(fd.as_fd(), &super::finish(socket.buffers, &socket.options))?;
        }
        if !socket.callers.is_empty() {
            let network = File::open(format!("/proc/{host}/ns/net"))?;
            let entrance = edge.entrance(network.as_fd())?.ok_or(io::ErrorKind::Unsupported)?;
            let callers = socket.callers.iter().map(super::callers::portable);
            entrance.go_on(fd.as_fd(), &callers.collect::<io::Result<Vec<_>>>()?)?;
        }
    }
    Ok(())
}

/// Takes the sockets of a process out of repair, which is to go on where it was. How many there were.
pub fn put_back(host: i32) -> io::Result<u32> {
    let dir = ProcDir::process(host);
    let mut count = 0;
    for number in dir.numbers("fd")? {
        let link = dir.link(&format!("fd/{number}"));
        let is_socket = link.is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"socket:"));
        if !is_socket {
            continue;
        }
        let fd = take_descriptor(host, number)?;
        if is_in_repair(&fd) {
            // What its SO_REUSEADDR was is lost with the daemon; it matters to whoever binds its port next.
            tcp::leave_repair(fd.as_fd(), true, None)?;
            count += 1;
        }
    }
    Ok(count)
}

fn is_in_repair(fd: &OwnedFd) -> bool {
    let tcp =
        socket::what(fd.as_fd()).is_ok_and(|what| matches!(what.family, FAMILY_V4 | FAMILY_V6) && what.kind == STREAM);
    tcp && tcp::in_repair(fd.as_fd()).unwrap_or(false)
}
