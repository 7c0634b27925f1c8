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

pub mod announce;
mod devices;
mod door;
mod holds;
mod open;
mod park;
mod slices;

pub use door::{Door, Entrance};
pub use open::Shelf;
pub use slices::Slices;

use announce::News;
use dunlin_proto::endpoint::{Endpoint, Family, Proto};
use dunlin_proto::ids::{MoveId, Slot};
use dunlin_sys::links::Device;
use dunlin_sys::sockdiag::SockDiag;
use dunlin_sys::socket::callers::Porter;
use dunlin_sys::steer::{self, Counters, Hop, Name, Tables};
use park::Park;
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// An entry of a connection whose ends have both said that they are done is kept so long: late packets still find their way.
const CLOSED_FOR: Duration = Duration::from_secs(60);

/// A node's edge. Cheap to clone.
#[derive(Clone)]
pub struct Edge(Option<Arc<Inner>>);

pub(crate) struct Inner {
    own: Slot,
    inside: Inside,
    slices: Slices,
    shelf: Box<dyn Shelf>,
    names: devices::Names,
    /// The device on the link between the nodes.
    link: Device,
    /// Where tunnels end, where nodes share no link.
    tunnel: Option<Device>,
    peers: BTreeMap<Slot, IpAddr>,
    tables: Tables,
    /// Taken for every change of the tables, so that changes that depend on what was there do not meet.
    park: Mutex<Park>,
    /// Until when what is still on its way into the park is looked for, after a hold has ended.
    strays: Mutex<Option<Instant>>,
    strays_wanted: Condvar,
    /// What the peers are to be told.
    news: News,
    diag: Mutex<SockDiag>,
    /// Loaded once, when it is first wanted or before; `None`: this kernel has nothing of the kind.
    porter: OnceLock<Option<Porter>>,
}

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
    /// A move can have several.
    id: u64,
    by: MoveId,
    endpoints: Vec<Endpoint>,
    /// Of each, the epoch of what was said of it before.
    epochs: Vec<u64>,
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
    pub idle: Option<Duration>,
}

impl Edge {
    /// The edge of a nest without a network: there is nothing to steer.
    pub fn none() -> Edge {
        Edge(None)
    }

    /// The addresses of the nest; `None` without a network.
    pub fn inside(&self) -> Option<Inside> {
        self.0.as_ref().map(|inner| inner.inside)
    }

    /// Which node gives out which ports by itself.
    pub fn slices(&self) -> Option<Slices> {
        self.0.as_ref().map(|inner| inner.slices)
    }

    /// Destination, before the resume: these are here now, whatever was known of them. Peers are told by whoever hands
    /// them over. After an abort, [`Edge::forget`] takes it back.
    pub fn arrive(&self, endpoints: &[Endpoint]) -> Result<(), EdgeError> {
        let inner = self.inner()?;
        let _turn = inner.turn();
        for endpoint in endpoints {
            let name = name(endpoint);
            let said = inner.said(&name)?;
            inner.say(&name, said, inner.own, false, said.map_or(0, |e| e.epoch))?;
        }
        inner.news.arriving(endpoints);
        Ok(())
    }

    /// A peer's word, or one's own: this endpoint is on that node. `false`: something newer (or as new) is known; an entry that is
    /// held is not changed either.
    pub fn assign(&self, endpoint: Endpoint, to: Slot, epoch: u64) -> Result<bool, EdgeError> {
        let inner = self.inner()?;
        let _turn = inner.turn();
        let name = name(&endpoint);
        match inner.said(&name)? {
            Some(entry) if entry.hold || entry.epoch >= epoch => Ok(false),
            said => inner.say(&name, said, to, false, epoch).map(|()| true),
        }
    }

    /// The endpoint is closed: what else is known of its port holds from now on. `false`: there was no entry, or it is held.
    pub fn forget(&self, endpoint: Endpoint) -> Result<bool, EdgeError> {
        let inner = self.inner()?;
        let _turn = inner.turn();
        let name = name(&endpoint);
        if inner.said(&name)?.is_some_and(|entry| entry.hold) {
            return Ok(false);
        }
        inner.news.arrived(&endpoint);
        inner.tables.unlearn(&name).map_err(kernel("forgetting", &endpoint))?;
        inner.tables.remove(&name).map_err(kernel("forgetting", &endpoint))
    }

    /// The whole table.
    pub fn entries(&self) -> Result<Vec<Entry>, EdgeError> {
        let Some(inner) = &self.0 else { return Ok(Vec::new()) };
        let read = |learned| {
            let entries = if learned {
                inner.tables.learned()
            } else {
                inner.tables.entries()
            };
            entries.map_err(kernel("reading", &"the table"))
        };
        let now = monotonic();
        let mut all = Vec::new();
        for learned in [false, true] {
            for (name, entry) in read(learned)? {
                all.extend(endpoint(&name).map(|endpoint| Entry {
                    endpoint,
                    node: Slot(entry.hop),
                    held: entry.hold,
                    learned,
                    epoch: entry.epoch,
                    packets: entry.packets,
                    bytes: entry.bytes,
                    idle: (!entry.used.is_zero()).then(|| now.saturating_sub(entry.used)),
                }));
            }
        }
        Ok(all)
    }

    /// What came to nothing, and why.
    pub fn counters(&self) -> Result<Counters, EdgeError> {
        let Some(inner) = &self.0 else {
            return Ok(Counters::default());
        };
        inner.tables.counters().map_err(kernel("reading", &"the counters"))
    }

    /// This node's address on the link between the nodes: what peers are told.
    pub fn station(&self) -> Option<[u8; 6]> {
        self.0.as_ref().map(|inner| inner.link.mac)
    }

    /// A peer's address on the link, as it tells it.
    pub fn neighbour(&self, slot: Slot, mac: [u8; 6]) -> Result<(), EdgeError> {
        let inner = self.inner()?;
        let hop = match (&inner.tunnel, inner.peers.get(&slot)) {
            (None, _) => Hop::Neighbour {
                mac,
                own_mac: inner.link.mac,
                device: inner.link.index,
            },
            (Some(tunnel), Some(IpAddr::V4(address))) => Hop::Tunnel {
                address: *address,
                mac: tunnel.mac,
                device: tunnel.index,
            },
            (Some(_), _) => return Err(EdgeError::UnknownNode(slot)),
        };
        inner.tables.set_hop(slot.0, &hop).map_err(kernel("reaching", &slot))
    }

    /// Forgets connections that have been closed for a while.
    pub(crate) fn tidy(&self) -> Result<(), EdgeError> {
        let Some(inner) = &self.0 else { return Ok(()) };
        let now = monotonic();
        let old =
            |entry: &steer::Entry| entry.is_closed() && now.saturating_sub(entry.used) > CLOSED_FOR && !entry.hold;
        let failed = || kernel("tidying", &"the table");
        for (name, _) in inner.tables.learned().map_err(failed())?.iter().filter(|(_, e)| old(e)) {
            inner.tables.unlearn(name).map_err(failed())?;
        }
        let _turn = inner.turn();
        for (name, entry) in inner.tables.entries().map_err(failed())? {
            if name.peer.is_some() && old(&entry) {
                inner.tables.remove(&name).map_err(failed())?;
            }
        }
        Ok(())
    }

    /// Who keeps what must outlive this daemon.
    pub(crate) fn shelf(&self) -> Option<&dyn Shelf> {
        self.0.as_ref().map(|inner| &*inner.shelf)
    }

    fn inner(&self) -> Result<&Arc<Inner>, EdgeError> {
        self.0.as_ref().ok_or(EdgeError::NoNetwork)
    }
}

impl Inner {
    /// Who lets connections that were made elsewhere into the queues of listening sockets.
    fn porter(&self) -> Option<&Porter> {
        let load = || {
            let loaded = Porter::load();
            loaded
                .inspect_err(|why| tracing::info!("connections that nobody has accepted do not move: {why}"))
                .ok()
        };
        self.porter.get_or_init(load).as_ref()
    }

    fn turn(&self) -> MutexGuard<'_, Park> {
        self.park.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn said(&self, name: &Name) -> Result<Option<steer::Entry>, EdgeError> {
        self.tables
            .get(name)
            .map_err(|e| kernel("reading the entry of", &shown(name))(e))
    }

    /// Says of an endpoint of which this was said before that it is there now.
    fn say(&self, name: &Name, said: Option<steer::Entry>, at: Slot, hold: bool, epoch: u64) -> Result<(), EdgeError> {
        let entry = entry(said, at, hold, epoch);
        self.tables
            .set(name, &entry)
            .map_err(|e| kernel("steering", &shown(name))(e))
    }
}

/// An entry that goes on counting.
fn entry(said: Option<steer::Entry>, at: Slot, hold: bool, epoch: u64) -> steer::Entry {
    steer::Entry {
        hop: at.0,
        hold,
        seen: 0,
        epoch,
        ..said.unwrap_or_default()
    }
}

fn kernel<T: std::fmt::Display + ?Sized>(what: &str, object: &T) -> impl FnOnce(io::Error) -> EdgeError + use<T> {
    let what = format!("{what} {object}");
    move |source| EdgeError::Kernel { what, source }
}

fn name(endpoint: &Endpoint) -> Name {
    Name {
        proto: endpoint.proto.number(),
        six: endpoint.family == Family::V6,
        port: endpoint.port,
        peer: endpoint.peer(),
    }
}

/// `None` for what is no endpoint (an echo request's number).
fn endpoint(name: &Name) -> Option<Endpoint> {
    let proto = Proto::from_number(name.proto)?;
    Some(match name.peer {
        Some(peer) => Endpoint::flow(proto, name.port, peer),
        None => Endpoint::port(proto, if name.six { Family::V6 } else { Family::V4 }, name.port),
    })
}

fn shown(name: &Name) -> String {
    endpoint(name).map_or_else(|| format!("{name:?}"), |e| e.to_string())
}

/// CLOCK_MONOTONIC, as the programs have it.
fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

impl std::fmt::Debug for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Edge").field(&self.inside()).finish()
    }
}
