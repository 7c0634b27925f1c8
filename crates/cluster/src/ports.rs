//! The ports of the inside address: which node has which.
//!
//! All nests bear the same inside address, so a port of it can be bound on one node only: bound on two, one of them would
//! be deaf. One node, the arbiter, keeps the table of ports that programs have bound by number ([`Arbiter`]); every
//! node has a copy of it, by which it steers packets. What the kernels of the nests have bound is the truth: nodes report it, and the
//! table follows ([`Arbiter::truth`]), so that it needs no storage and no message of it must arrive.
//!
//! Owns the decisions. Refuses to know sockets, packets and processes. Invariants: a port has one holder at a time; what a
//! node reports takes nothing from another that still holds it; the version rises with every change, and a copy never goes back.

use dunlin_proto::endpoint::Endpoint;
use dunlin_proto::ids::Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// More ports than there are (two protocols, two families) are not taken from a peer.
pub const MAX_PORTS: usize = 4 << 16;

/// How long a claim stands without the port being seen bound: the call that it was made for takes less.
pub const CLAIM_STANDS: Duration = Duration::from_secs(3);

/// Who has a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// The node.
    pub node: Slot,
    /// It may be reached from outside: a listening or bound datagram socket, not one that is only bound.
    pub open: bool,
}

/// The copy of the table that every node has: as of a version, by port (an endpoint without a peer).
pub type Table = BTreeMap<Endpoint, Holding>;

/// What became of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The port is the claimer's.
    Granted,
    /// Another node has it.
    Taken(Slot),
}

#[derive(Debug, Clone, Copy)]
struct Held {
    holding: Holding,
    /// The last claim or move; a report from before says nothing about it.
    since: Instant,
    /// Its node has reported it since.
    seen: bool,
}

/// The table itself, at the arbiter.
#[derive(Debug, Default)]
pub struct Arbiter {
    version: u64,
    held: BTreeMap<Endpoint, Held>,
    /// Ports that were reported by nodes that do not hold them.
    contested: BTreeMap<Endpoint, BTreeMap<Slot, bool>>,
}

impl Arbiter {
    /// An arbiter that continues the copy it has kept, of this version.
    pub fn resume(version: u64, table: Table, now: Instant) -> Arbiter {
        let held = |holding| Held {
            holding,
            since: now,
            seen: false,
        };
        Arbiter {
            version,
            held: table.into_iter().map(|(port, holding)| (port, held(holding))).collect(),
            contested: BTreeMap::new(),
        }
    }

    /// Rises with every change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The table as it is to be copied.
    pub fn table(&self) -> Table {
        self.held.iter().map(|(port, held)| (*port, held.holding)).collect()
    }

    /// A program of a node is about to bind ports (of both families, for a socket of both), or to listen on them (`open`):
    /// all of them are its node's, or none is claimed.
    pub fn claim(&mut self, by: Slot, ports: &[Endpoint], open: bool, now: Instant) -> Verdict {
        let holder = |port| self.held.get(port).map(|held| held.holding.node);
        if let Some(other) = ports.iter().filter_map(holder).find(|node| *node != by) {
            return Verdict::Taken(other);
        }
        for port in ports {
            match self.held.get_mut(port) {
                Some(held) => {
                    held.since = now;
                    if open && !held.holding.open {
                        held.holding.open = true;
                        self.version += 1;
                    }
                }
                None => self.put(*port, Holding { node: by, open }, now),
            }
        }
        Verdict::Granted
    }

    /// The last socket of a node that was bound to a port is closed.
    pub fn release(&mut self, by: Slot, port: Endpoint) {
        if self.held.get(&port).is_some_and(|held| held.holding.node == by) {
            self.drop_port(port);
        }
    }

    /// The sockets of a node that are bound to a port have gone to another. Ignored if it is not the node's: its next
    /// reports tell.
    pub fn moved(&mut self, by: Slot, port: Endpoint, to: Slot, now: Instant) {
        if let Some(held) = self.held.get_mut(&port)
            && held.holding.node == by
        {
            held.holding.node = to;
            held.since = now;
            held.seen = false;
            self.version += 1;
        }
    }

    /// What is bound in a node's nest, as it was seen at `seen_at`.
    pub fn truth(&mut self, node: Slot, bound: &BTreeMap<Endpoint, bool>, seen_at: Instant) {
        let gone = |port: &Endpoint, held: &Held| {
            let fresh = seen_at < held.since + if held.seen { Duration::ZERO } else { CLAIM_STANDS };
            held.holding.node == node && !bound.contains_key(port) && !fresh
        };
        let gone: Vec<Endpoint> = self.held.iter().filter(|(p, h)| gone(p, h)).map(|(p, _)| *p).collect();
        for reports in self.contested.values_mut() {
            reports.remove(&node);
        }
        for (port, open) in bound.iter().take(MAX_PORTS) {
            match self.held.get_mut(port) {
                Some(held) if held.holding.node == node => {
                    held.seen = true;
                    // What was claimed after the look is not closed by it.
                    if held.holding.open != *open && (*open || seen_at >= held.since) {
                        held.holding.open = *open;
                        self.version += 1;
                    }
                }
                Some(_) => {
                    self.contested.entry(*port).or_default().insert(node, *open);
                }
                None => {
                    self.put(*port, Holding { node, open: *open }, seen_at);
                    self.held.entry(*port).and_modify(|held| held.seen = true);
                }
            }
        }
        gone.into_iter().for_each(|port| self.drop_port(port));
        self.contested.retain(|_, reports| !reports.is_empty());
    }

    /// A node is gone with everything on it.
    pub fn lost(&mut self, node: Slot) {
        self.contested.values_mut().for_each(|reports| {
            reports.remove(&node);
        });
        let gone = self.held.iter().filter(|(_, held)| held.holding.node == node);
        let gone: Vec<Endpoint> = gone.map(|(port, _)| *port).collect();
        gone.into_iter().for_each(|port| self.drop_port(port));
    }

    /// Ports that more than one node has bound, with their holder: one of them is deaf.
    pub fn contested(&self) -> impl Iterator<Item = (Endpoint, Slot, BTreeSet<Slot>)> {
        self.contested.iter().filter_map(|(port, reports)| {
            let holder = self.held.get(port)?.holding.node;
            Some((*port, holder, reports.keys().copied().collect()))
        })
    }

    fn put(&mut self, port: Endpoint, holding: Holding, since: Instant) {
        let held = Held {
            holding,
            since,
            seen: false,
        };
        self.held.insert(port, held);
        self.version += 1;
    }

    fn drop_port(&mut self, port: Endpoint) {
        let Some(old) = self.held.remove(&port) else { return };
        self.version += 1;
        let heirs = self.contested.remove(&port).unwrap_or_default();
        if let Some((node, open)) = heirs.into_iter().find(|(node, _)| *node != old.holding.node) {
            self.put(port, Holding { node, open }, old.since);
            self.held.entry(port).and_modify(|held| held.seen = true);
        }
    }
}

/// A node's copy.
#[derive(Debug, Default)]
pub struct Copy {
    version: u64,
    table: Table,
}

/// What a newer table changes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    /// New, or with another node.
    pub set: Vec<(Endpoint, Holding)>,
    /// No longer anybody's.
    pub cleared: Vec<Endpoint>,
}

impl Copy {
    /// A copy as it was kept.
    pub fn of(version: u64, table: Table) -> Copy {
        Copy { version, table }
    }

    /// As of this version.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The table.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Takes a table from the arbiter. An older one changes nothing, unless the arbiter has begun anew (`anew`).
    pub fn update(&mut self, version: u64, table: Table, anew: bool) -> Changes {
        let mut changes = Changes::default();
        if version <= self.version && !anew {
            return changes;
        }
        let differs = |(port, holding): &(&Endpoint, &Holding)| self.table.get(*port) != Some(*holding);
        changes.set = table.iter().filter(differs).map(|(p, h)| (*p, *h)).collect();
        let cleared = self.table.keys().filter(|port| !table.contains_key(*port));
        changes.cleared = cleared.copied().collect();
        self.version = version;
        self.table = table;
        changes
    }
}

#[cfg(test)]
#[path = "ports_tests.rs"]
mod tests;
