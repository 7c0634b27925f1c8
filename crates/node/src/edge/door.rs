//! Where packets that were received elsewhere are put, so that the nest takes them for received.
//!
//! Owns the machine's end of the device that the nest has, as a place to send from. Refuses to know what the packets are: they
//! do not pass the steering, which was done when they came in.

use super::{Edge, Inner, devices};
use dunlin_sys::namespace;
use dunlin_sys::socket::callers::{Caller, OnDuty};
use dunlin_sys::socket::wire::{self, Frames};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The way into one nest.
#[derive(Debug)]
pub struct Door {
    frames: Frames,
    /// The nest's end.
    mac: [u8; 6],
    mtu: usize,
    identity: AtomicU32,
}

/// A door at which a porter stands: by it connections that were made elsewhere come into the queues of listening sockets.
pub struct Entrance {
    edge: Arc<Inner>,
    door: Door,
    _on_duty: OnDuty,
}

impl Edge {
    /// The same with the porter, which stands there until it is dropped; `None`: the nest has no network, or the kernel no porter.
    pub fn entrance(&self, nest: BorrowedFd<'_>) -> io::Result<Option<Entrance>> {
        let Some(inner) = &self.0 else { return Ok(None) };
        let (Some(porter), Some(door)) = (inner.porter(), self.door(nest)?) else {
            return Ok(None);
        };
        let on_duty = namespace::in_network(nest, || porter.watch(&[devices::named(devices::INNER)?.index]))?;
        Ok(Some(Entrance {
            edge: inner.clone(),
            door,
            _on_duty: on_duty,
        }))
    }

    /// The way into the nest, whose network namespace this is; `None`: it has no network.
    pub fn door(&self, nest: BorrowedFd<'_>) -> io::Result<Option<Door>> {
        let Some(inner) = &self.0 else { return Ok(None) };
        let inside = namespace::in_network(nest, || devices::named(devices::INNER))?;
        let outside = devices::named(&inner.names.nest)?;
        Ok(Some(Door {
            frames: Frames::open(outside.index as i32)?,
            mac: inside.mac,
            mtu: outside.mtu as usize,
            identity: AtomicU32::new(std::process::id()),
        }))
    }
}

impl Entrance {
    /// Has these wait at a listening socket of the nest. See [`Porter::let_in`](dunlin_sys::socket::callers::Porter::let_in).
    pub fn let_in(&self, listening: BorrowedFd<'_>, callers: &[Caller]) -> io::Result<()> {
        let porter = self.edge.porter().ok_or(io::ErrorKind::Unsupported)?;
        porter.let_in(listening, callers, &|packet| self.door.deliver(packet))
    }

    /// The same, where a former daemon may have begun with it.
    pub fn go_on(&self, listening: BorrowedFd<'_>, callers: &[Caller]) -> io::Result<()> {
        let porter = self.edge.porter().ok_or(io::ErrorKind::Unsupported)?;
        porter.go_on(listening, callers, &|packet| self.door.deliver(packet))
    }
}

impl std::fmt::Debug for Entrance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Entrance").field(&self.door).finish()
    }
}

impl Door {
    /// Puts an IP packet into the nest, in pieces if it must be.
    pub fn deliver(&self, packet: &[u8]) -> io::Result<()> {
        let identity = self.identity.fetch_add(1, Ordering::Relaxed);
        let mut pieces = wire::fragments(packet, self.mtu, identity).into_iter();
        pieces.try_for_each(|piece| self.frames.send(self.mac, &piece))
    }
}
