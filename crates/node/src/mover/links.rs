//! Words of the move protocol on their way: one connection to each peer, words to oneself by a short cut.
//!
//! Owns the outgoing connections. Refuses to know what the words mean. A word that cannot be sent is lost, and the
//! connection opened anew for the next one: the protocol repeats what matters.

use crate::peers::Peers;
use dunlin_proto::frame;
use dunlin_proto::ids::Slot;
use dunlin_proto::peer::Purpose;
use dunlin_proto::relocation::MoveMsg;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};

type Link = Arc<Mutex<Option<TcpStream>>>;

/// The outgoing connections of one node.
pub struct Links {
    peers: Arc<Peers>,
    links: Mutex<BTreeMap<Slot, Link>>,
}

impl Links {
    /// No connection yet.
    pub fn new(peers: Arc<Peers>) -> Links {
        Links {
            peers,
            links: Mutex::default(),
        }
    }

    /// Sends a word to another node, or loses it. Tells whether it was handed to the kernel.
    pub fn send(&self, to: Slot, msg: &MoveMsg) -> bool {
        let bytes = match frame::encode(msg) {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::error!(%to, %error, "a word of a move cannot be sent");
                return false;
            }
        };
        dunlin_sys::fuse::step();
        let link = self.link(to);
        let mut stream = link.lock().unwrap_or_else(PoisonError::into_inner);
        drop_if_closed(&mut stream);
        // One that is just being closed shows when it is written to: then once more, anew.
        for _ in 0..2 {
            if stream.is_none() {
                match self.peers.open(to, Purpose::Relocation) {
                    Ok(opened) => *stream = Some(opened),
                    Err(error) => {
                        tracing::debug!(%to, %error, "a word of a move was lost");
                        return false;
                    }
                }
            }
            if stream.as_mut().is_some_and(|s| s.write_all(&bytes).is_ok()) {
                return true;
            }
            *stream = None;
        }
        false
    }

    /// Has the peer closed the connection (or died) since the last word?
    pub fn is_cut(&self, to: Slot) -> bool {
        let link = self.link(to);
        let stream = link.lock().unwrap_or_else(PoisonError::into_inner);
        stream.as_ref().is_some_and(|stream| !is_open(stream))
    }

    /// Opens the connection now, so that no connecting falls into a freeze.
    pub fn warm(&self, to: Slot) {
        let link = self.link(to);
        let mut stream = link.lock().unwrap_or_else(PoisonError::into_inner);
        drop_if_closed(&mut stream);
        if stream.is_none() {
            *stream = self.peers.open(to, Purpose::Relocation).ok();
        }
    }

    fn link(&self, to: Slot) -> Link {
        self.links
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(to)
            .or_default()
            .clone()
    }
}

/// Nobody says anything on these connections, so that one where something is to be read has ended.
fn is_open(stream: &TcpStream) -> bool {
    let mut byte = [0u8; 1];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    matches!(
        rustix::net::recv(stream, &mut byte, flags),
        Err(Errno::AGAIN | Errno::INTR)
    )
}

/// What is written to a connection that the peer has closed (its daemon was restarted) is lost without an error, the
/// first time.
fn drop_if_closed(stream: &mut Option<TcpStream>) {
    if stream.as_ref().is_some_and(|stream| !is_open(stream)) {
        *stream = None;
    }
}
