//! Sockets of the Internet families, moved.
//!
//! Owns what each socket is ([`look`]), where its packets are to be kept ([`endpoints`]), its way out of a source
//! ([`leaving`]) and into a destination ([`arriving`]). Refuses to know how packets are steered (the [edge](crate::edge)
//! does) and when a move is decided. Invariants: nothing of a socket is read before its packets are held; a socket
//! that is captured, and one that is rebuilt, is in repair, so that whoever closes it then closes it in silence; a socket goes on
//! in one place only, when the move is decided.
//!
//! The order, over both nodes: what is open is *held* at the source; all threads are stopped and parked; sockets that were
//! opened in between are held, too; all go into repair and are read. At the destination, where new ones were made while the program
//! still ran, they become what the old ones were. On the commit the new ones leave repair, and what was held is handed
//! over; the old ones are closed with the old process. On an abort the old ones leave repair, the process goes on, and what was
//! held is released. A daemon that comes after one that was killed finds the sockets of parked processes in
//! repair, and what is held under the name of the move.

pub mod arriving;
mod callers;
pub mod endpoints;
pub mod leaving;
pub mod look;
pub mod recovery;
mod taken;

use dunlin_proto::image::{self, Socket};
use dunlin_sys::socket::options::{self, SocketOption};
use dunlin_sys::socket::tcp::{Buffers, Finish};
use dunlin_sys::socket::{self, What};
use std::net::IpAddr;

/// By socket(2)'s numbers.
fn what(socket: &Socket) -> What {
    What {
        family: socket.family,
        kind: socket.kind,
        protocol: socket.protocol,
    }
}

fn is_tcp(socket: &Socket) -> bool {
    socket.kind == socket::STREAM
}

/// An address of the machine itself: what is said there stays in one nest.
fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

fn portable(options: &[SocketOption]) -> Vec<image::SocketOption> {
    let one = |option: &SocketOption| image::SocketOption {
        level: option.level,
        name: option.name,
        value: image::OptionValue::new(&option.value).expect("no option that is read is longer"),
    };
    options.iter().map(one).collect()
}

fn settable<'a>(options: impl IntoIterator<Item = &'a image::SocketOption>) -> Vec<SocketOption> {
    let one = |option: &image::SocketOption| SocketOption {
        level: option.level,
        name: option.name,
        value: option.value.to_vec(),
    };
    options.into_iter().map(one).collect()
}

/// Those that a socket gets when it is what it will be.
fn late(options: &[image::SocketOption]) -> impl Iterator<Item = &image::SocketOption> {
    options
        .iter()
        .filter(|option| options::is_late(option.level, option.name))
}

fn finish(buffers: [u32; 3], options: &[image::SocketOption]) -> Finish {
    let [send, receive, locked] = buffers;
    Finish {
        buffers: Buffers { send, receive, locked },
        options: settable(late(options)),
    }
}
