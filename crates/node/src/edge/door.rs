//! Where packets that were received elsewhere are put, so that the nest takes them for received.
//!
//! Owns the machine's end of the device that the nest has, as a place to send from. Refuses to know what the packets are: they
//! do not pass the steering, which was done when they came in.

use super::{Edge, devices};
use dunlin_sys::namespace;
use dunlin_sys::socket::wire::{self, Frames};
use std::io;
use std::os::fd::BorrowedFd;
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

impl Edge {
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

impl Door {
    /// Puts an IP packet into the nest, in pieces if it must be.
    pub fn deliver(&self, packet: &[u8]) -> io::Result<()> {
        let identity = self.identity.fetch_add(1, Ordering::Relaxed);
        let mut pieces = wire::fragments(packet, self.mtu, identity).into_iter();
        pieces.try_for_each(|piece| self.frames.send(self.mac, &piece))
    }
}
