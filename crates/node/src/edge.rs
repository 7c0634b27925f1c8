//! The edge of a node: how packets get into its nest and out of it, and to whichever node has the socket they are for.
//!
//! Owns, from the outside, four verbs: *hold* what is for a socket that is about to move, and either *release* it here,
//! or *hand it over* to the node where the socket is now, which has let it *arrive*. Beside them, what peers tell of their
//! sockets (*assign*, *forget*). Refuses to know sockets, moves and who may have which port: it steers endpoints.
//!
//! Every packet to the inside address is looked up by its destination, in every node's kernel, in this order:
//!
//! 1. *flows*: this connection has an entry (it was moved, or its first packet was seen here);
//! 2. *ports*: somebody listens on this port, or has bound it;
//! 3. *slices*: the port is one that only one node gives out by itself ([`Slices`]);
//! 4. else it is for this node, whose kernel answers as it would for a port that nobody has.
//!
//! Invariants: what is held is neither delivered nor lost, whatever becomes of this daemon, and comes later in the order
//! in which it came; a packet that has been handed over to a node where it is not wanted ends there, it does not go
//! round for ever; nothing of the data path depends on a daemon that runs.

use dunlin_proto::endpoint::Endpoint;
use dunlin_proto::ids::{MoveId, Slot};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

/// A node's edge. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Edge(());

/// The addresses that all nests of the cluster have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inside {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6.
    pub v6: Ipv6Addr,
}

/// Endpoints whose packets are kept. Ends with [`Edge::release`] or [`Edge::hand_over`]; dropping it ends nothing.
#[derive(Debug)]
#[must_use = "what is held stays held until it is released or handed over"]
pub struct Hold {
    by: MoveId,
    endpoints: Vec<Endpoint>,
}

impl Hold {
    /// The move it is for.
    pub fn by(&self) -> MoveId {
        self.by
    }

    /// What is held.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }
}

/// Why the edge did not do something; nothing was changed unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    /// The nest has no network.
    #[error("the nest has no network; hint: a [network] section in the node's configuration gives it one")]
    NoNetwork,
    /// No such node is known here.
    #[error("packets cannot be sent to {0}: it is not known on the link; hint: is its `dunlin node` running?")]
    UnknownNode(Slot),
    /// The kernel refused; what was changed before stays, and asking again is right.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
}

/// One entry of the table, for people and for the control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is about.
    pub endpoint: Endpoint,
    /// Who has it.
    pub node: Slot,
    /// Its packets are being held.
    pub held: bool,
    /// The kernel made it when it saw the first packet; else a daemon did.
    pub learned: bool,
    /// Of two pieces of news about it, the one with the greater epoch holds.
    pub epoch: u64,
    /// How many packets it has steered here.
    pub packets: u64,
    /// How many bytes.
    pub bytes: u64,
    /// How long ago the last one was; `None`: there was none.
    pub idle: Option<std::time::Duration>,
}

impl Edge {
    /// The edge of a nest without a network: there is nothing to steer.
    pub fn none() -> Edge {
        Edge(())
    }

    /// The addresses of the nest; `None` without a network.
    pub fn inside(&self) -> Option<Inside> {
        None
    }

    /// Source, before anything of these sockets is read: from now on their packets are kept, those of peers in the same nest
    /// too. A packet that was on its way into the nest when this was called may still be delivered a moment later: read
    /// until nothing changes. A held *port* does not hold connections that have entries of their own.
    pub fn hold(&self, _by: MoveId, _endpoints: &[Endpoint]) -> Result<Hold, EdgeError> {
        Err(EdgeError::NoNetwork)
    }

    /// Source, when a move was aborted and the sockets are as they were: what was kept is delivered here, in order, then
    /// what comes. May be repeated after an error.
    pub fn release(&self, _hold: &Hold) -> Result<(), EdgeError> {
        Err(EdgeError::NoNetwork)
    }

    /// Source, when the sockets live on `to`: what was kept goes there, in order, then what comes, for as long as anybody
    /// may not know it yet (a tombstone, of a minute at least). Peers are to be told after this has returned, or
    /// what they send overtakes what was kept. May be repeated after an error.
    pub fn hand_over(&self, _hold: &Hold, _to: Slot) -> Result<(), EdgeError> {
        Err(EdgeError::NoNetwork)
    }

    /// What a former daemon of this node held and neither released nor handed over.
    pub fn held(&self) -> Result<Vec<Hold>, EdgeError> {
        Ok(Vec::new())
    }

    /// Destination, before the resume: these are here now, whatever was known of them.
    pub fn arrive(&self, _endpoints: &[Endpoint]) -> Result<(), EdgeError> {
        Err(EdgeError::NoNetwork)
    }

    /// A peer's word, or one's own: this endpoint is on that node. `false`: something newer (or as new) is known; an entry that is
    /// held is not changed either.
    pub fn assign(&self, _endpoint: Endpoint, _to: Slot, _epoch: u64) -> Result<bool, EdgeError> {
        Err(EdgeError::NoNetwork)
    }

    /// The endpoint is closed: what else is known of its port holds from now on. `false`: there was no entry, or it is held.
    pub fn forget(&self, _endpoint: Endpoint) -> Result<bool, EdgeError> {
        Err(EdgeError::NoNetwork)
    }

    /// The whole table.
    pub fn entries(&self) -> Result<Vec<Entry>, EdgeError> {
        Ok(Vec::new())
    }
}

/// Which node gives out a port by itself (as the source of a connection, or to a socket bound to port 0): the slice with the
/// number of its slot, of as many equal slices as the modulus says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slices {
    first: u16,
    width: u16,
    modulus: u16,
}

impl Slices {
    /// Cuts the ports from `first` to 65535 for a cluster of this modulus; `None`: there are too few for it.
    pub fn new(first: u16, modulus: u16) -> Option<Slices> {
        let ports = u32::from(u16::MAX) - u32::from(first) + 1;
        let width = u16::try_from(ports / u32::from(modulus.max(1))).ok()?;
        (width > 0 && first >= 1024).then_some(Slices { first, width, modulus })
    }

    /// The first and last port of a node.
    pub fn of(&self, slot: Slot) -> (u16, u16) {
        let first = self.first + slot.0 * self.width;
        (first, first + (self.width - 1))
    }

    /// The node whose slice a port is in.
    pub fn node(&self, port: u16) -> Option<Slot> {
        let slot = port.checked_sub(self.first)? / self.width;
        (slot < self.modulus).then_some(Slot(slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_names_the_node_that_gives_it_out() {
        let slices = Slices::new(20000, 64).unwrap();
        for slot in [0, 1, 63] {
            let (first, last) = slices.of(Slot(slot));
            assert_eq!(last - first + 1, 711);
            assert_eq!(slices.node(first), Some(Slot(slot)));
            assert_eq!(slices.node(last), Some(Slot(slot)));
        }
        assert_eq!(slices.node(19999), None);
        // What the division leaves over is nobody's.
        assert_eq!(slices.node(65535), None);
        assert_eq!(Slices::new(65000, 1024), None);
        assert_eq!(Slices::new(1024, 1).unwrap().of(Slot(0)), (1024, 65535));
    }
}
