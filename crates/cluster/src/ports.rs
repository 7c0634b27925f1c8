//! The ports of the inside address: which node may bind which.
//!
//! All nests bear the same inside address, so a port of it can be bound on one node only: bound on two, one of them would
//! be deaf. One node, the arbiter, answers *claims*. What the kernels of the nests have bound is the truth: nodes
//! report it, and the arbiter's table follows ([`Arbiter::truth`]), so that it needs no storage and no message of it must arrive.
//!
//! Owns the decisions. Refuses to know sockets, packets and processes. Invariants: a port has one holder at a time; what a
//! node reports takes nothing from another that still holds it.

use dunlin_proto::endpoint::Endpoint;
use dunlin_proto::ids::Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// More ports than there are (two protocols, two families) are not taken from a peer.
pub const MAX_PORTS: usize = 4 << 16;

/// How long a claim stands without the port being seen bound: the call that it was made for takes less.
pub const CLAIM_STANDS: Duration = Duration::from_secs(3);

/// What became of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The ports are the claimer's.
    Granted,
    /// Another node has one of them.
    Taken(Slot),
}

#[derive(Debug, Clone, Copy)]
struct Held {
    node: Slot,
    /// The last claim; a report from before says nothing about it.
    since: Instant,
    /// Its node has reported it since.
    seen: bool,
}

/// Who holds which port (an endpoint without a peer).
#[derive(Debug, Default)]
pub struct Arbiter {
    held: BTreeMap<Endpoint, Held>,
    /// Ports that were reported by nodes that do not hold them.
    contested: BTreeMap<Endpoint, BTreeSet<Slot>>,
}

impl Arbiter {
    /// Who holds a port.
    pub fn holder(&self, port: &Endpoint) -> Option<Slot> {
        self.held.get(port).map(|held| held.node)
    }

    /// A program of a node is about to bind ports (of both families, for a socket of both), or to listen on them: all of
    /// them are its node's, or none is claimed.
    pub fn claim(&mut self, by: Slot, ports: &[Endpoint], now: Instant) -> Verdict {
        if let Some(other) = ports.iter().filter_map(|p| self.holder(p)).find(|node| *node != by) {
            return Verdict::Taken(other);
        }
        for port in ports {
            self.put(*port, by, now, false);
        }
        Verdict::Granted
    }

    /// What is bound in a node's nest, as it was seen at `seen_at`.
    pub fn truth(&mut self, node: Slot, bound: &BTreeSet<Endpoint>, seen_at: Instant) {
        for reports in self.contested.values_mut() {
            reports.remove(&node);
        }
        let gone = |port: &Endpoint, held: &Held| {
            let stands = if held.seen { Duration::ZERO } else { CLAIM_STANDS };
            held.node == node && !bound.contains(port) && seen_at >= held.since + stands
        };
        let gone: Vec<Endpoint> = self.held.iter().filter(|(p, h)| gone(p, h)).map(|(p, _)| *p).collect();
        for port in bound.iter().take(MAX_PORTS) {
            match self.held.get_mut(port) {
                Some(held) if held.node == node => held.seen = true,
                Some(_) => {
                    self.contested.entry(*port).or_default().insert(node);
                }
                None => self.put(*port, node, seen_at, true),
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
        let gone = self.held.iter().filter(|(_, held)| held.node == node);
        let gone: Vec<Endpoint> = gone.map(|(port, _)| *port).collect();
        gone.into_iter().for_each(|port| self.drop_port(port));
    }

    /// Ports that more than one node has bound, with their holder: the others are deaf.
    pub fn contested(&self) -> impl Iterator<Item = (Endpoint, Slot, &BTreeSet<Slot>)> {
        self.contested
            .iter()
            .filter_map(|(port, reports)| Some((*port, self.holder(port)?, reports)))
    }

    fn put(&mut self, port: Endpoint, node: Slot, since: Instant, seen: bool) {
        self.held.insert(port, Held { node, since, seen });
    }

    fn drop_port(&mut self, port: Endpoint) {
        let Some(old) = self.held.remove(&port) else { return };
        let heirs = self.contested.remove(&port).unwrap_or_default();
        if let Some(heir) = heirs.into_iter().find(|node| *node != old.node) {
            self.put(port, heir, old.since, true);
        }
    }
}

#[cfg(test)]
#[path = "ports_tests.rs"]
mod tests;
