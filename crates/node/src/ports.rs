//! The ports of the inside address, as the programs of the nests bind them: who may have which.
//!
//! Every bind(2) and listen(2) with a port of the inside address is a *claim* ([`notified`]), which the arbiter grants: the node that
//! has the gateway, or else the first one. Before a program sees its listen(2) return, all nodes that answer know where the port is, so
//! a client that has heard of it finds it, from wherever. What the nests have really bound is looked at ([`bound`]) after each claim, from
//! time to time, and when two want the same; the arbiter's table follows (`dunlin_cluster::ports`).
//!
//! Owns, at the arbiter, that table; elsewhere nothing. Refuses to know connections, and how packets are steered
//! ([`crate::edge`]). Invariants: a claim is answered within [`CLAIM_WITHIN`], whoever is away; nobody waits for a node while the
//! table is locked.

pub mod bound;
pub mod notified;

use crate::config::NodeConfig;
use crate::daemon::node::nest_failure;
use crate::edge::Edge;
use crate::peers::Peers;
use dunlin_cluster::ports::{Arbiter, MAX_PORTS, Verdict};
use dunlin_proto::endpoint::Endpoint;
use dunlin_proto::ids::Slot;
use dunlin_proto::peer::{PeerReply, PeerRequest};
use std::collections::BTreeSet;
use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// How long the arbiter may take to answer a claim; then what is known here decides.
pub const CLAIM_WITHIN: Duration = Duration::from_millis(1500);
/// How long nodes may take to tell the arbiter what they have bound.
const ASK_WITHIN: Duration = Duration::from_millis(700);
/// How often a node looks at what its nest has bound, and reports.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// One node's part in it.
pub struct Ports {
    peers: Arc<Peers>,
    edge: Edge,
    arbiter_slot: Slot,
    look_now: SyncSender<()>,
    /// At the arbiter, when it has heard what the others have.
    arbiter: Mutex<Option<Arbiter>>,
    ready: Condvar,
}

/// A port that another node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken(pub Slot);

/// The node that answers claims.
pub fn arbiter_of(config: &NodeConfig) -> Slot {
    let gateway = config.network.as_ref().and_then(|network| network.gateway.as_deref());
    let first = config.nodes().map(|(slot, _)| slot).min();
    gateway
        .and_then(|name| config.slot_of(name))
        .or(first)
        .unwrap_or(Slot(config.slot))
}

impl Ports {
    /// Begins to look and to report; `None` where nests have no network.
    pub fn start(peers: Arc<Peers>, edge: Edge, arbiter: Slot) -> io::Result<Option<Arc<Ports>>> {
        if edge.inside().is_none() {
            return Ok(None);
        }
        let (look_now, looks) = sync_channel(1);
        let ports = Arc::new(Ports {
            peers,
            edge,
            arbiter_slot: arbiter,
            look_now,
            arbiter: Mutex::new(None),
            ready: Condvar::new(),
        });
        if ports.is_arbiter() {
            let gathering = Arc::downgrade(&ports);
            let gather = move || {
                if let Some(ports) = gathering.upgrade() {
                    ports.gather();
                }
            };
            thread::Builder::new()
                .name("ports of the others".into())
                .spawn(gather)?;
        }
        let watching = Arc::downgrade(&ports);
        thread::Builder::new().name("ports".into()).spawn(move || {
            loop {
                // Ends early when something was bound.
                let _ = looks.recv_timeout(LOOK_EVERY);
                let Some(ports) = watching.upgrade() else { return };
                ports.report();
            }
        })?;
        Ok(Some(ports))
    }

    fn is_arbiter(&self) -> bool {
        self.arbiter_slot == self.peers.own()
    }

    /// A program here is about to bind these, or (`open`) to listen on them. When this returns, all nodes that answer know
    /// where an open port is.
    pub fn claim(&self, ports: &[Endpoint], open: bool) -> Result<(), Taken> {
        let request = PeerRequest::ClaimPorts { ports: ports.to_vec() };
        match self.peers.call_within(self.arbiter_slot, &request, CLAIM_WITHIN) {
            Ok(PeerReply::PortTaken(node)) => return Err(Taken(node)),
            Ok(PeerReply::Done) => {}
            Ok(other) => {
                tracing::warn!("the arbiter of ports answered {other:?}: the claim is decided here");
                self.decide_alone(ports)?;
            }
            Err(error) => {
                tracing::warn!(%error, "the arbiter of ports does not answer: the claim is decided here");
                self.decide_alone(ports)?;
            }
        }
        if open && let Err(error) = self.edge.open_now(ports) {
            tracing::warn!(%error, "a port is found a moment after it is open");
        }
        Ok(())
    }

    /// Without the arbiter, what is steered elsewhere is taken.
    fn decide_alone(&self, ports: &[Endpoint]) -> Result<(), Taken> {
        let holders = ports.iter().filter_map(|port| self.edge.holder(port).ok().flatten());
        match holders.into_iter().find(|node| *node != self.peers.own()) {
            Some(other) => Err(Taken(other)),
            None => Ok(()),
        }
    }

    /// Something was bound, or was not: have a look soon.
    pub fn look_soon(&self) {
        // One look that is still to come is enough.
        let _ = self.look_now.try_send(());
    }

    /// The answer to a request of a node, its own included.
    pub fn answer(&self, from: Slot, request: PeerRequest) -> PeerReply {
        match request {
            PeerRequest::ClaimPorts { ports } => self.claimed(from, &ports),
            PeerRequest::PortsBound { bound, age_ms } => {
                let now = Instant::now();
                let seen_at = now.checked_sub(Duration::from_millis(age_ms.into())).unwrap_or(now);
                match self.decide(|arbiter| arbiter.truth(from, &parse(bound), seen_at)) {
                    Some(()) => PeerReply::Done,
                    None => PeerReply::NotYet,
                }
            }
            PeerRequest::WhichPorts => match bound::look(&self.edge) {
                Ok(bound) => PeerReply::Bound(bound.into_iter().collect()),
                Err(error) => PeerReply::Failed(nest_failure(io::Error::other(error))),
            },
            _ => PeerReply::NotHere,
        }
    }

    fn claimed(&self, from: Slot, ports: &[Endpoint]) -> PeerReply {
        let good = |port: &Endpoint| port.peer().is_none() && port.port != 0;
        if ports.len() > 2 || !ports.iter().all(good) {
            return PeerReply::NotHere;
        }
        let claim = || self.decide(|arbiter| arbiter.claim(from, ports, Instant::now()));
        let mut verdict = claim();
        if let Some(Verdict::Taken(_)) = verdict {
            // The holder may have closed it since it reported, or it has gone to a node that has not reported yet.
            self.ask_all();
            verdict = claim();
        }
        match verdict {
            Some(Verdict::Taken(node)) => PeerReply::PortTaken(node),
            Some(Verdict::Granted) => PeerReply::Done,
            None => PeerReply::NotYet,
        }
    }

    /// Has the arbiter decide. `None`: it is elsewhere, or cannot decide yet.
    fn decide<T>(&self, decision: impl FnOnce(&mut Arbiter) -> T) -> Option<T> {
        if !self.is_arbiter() {
            return None;
        }
        let unready = |arbiter: &mut Option<Arbiter>| arbiter.is_none();
        let waited = self.ready.wait_timeout_while(lock(&self.arbiter), ASK_WITHIN, unready);
        let (mut guard, _) = waited.unwrap_or_else(|e| e.into_inner());
        guard.as_mut().map(decision)
    }

    /// At the arbiter's start: what do the others have?
    fn gather(&self) {
        let mut arbiter = Arbiter::default();
        for (node, bound) in self.all_bound() {
            arbiter.truth(node, &bound, Instant::now());
        }
        *lock(&self.arbiter) = Some(arbiter);
        self.ready.notify_all();
    }

    fn ask_all(&self) {
        let seen_at = Instant::now();
        // Who has something new comes before who has let it go.
        for (node, bound) in self.all_bound() {
            self.decide(|arbiter| arbiter.truth(node, &bound, seen_at));
        }
        self.decide(|arbiter| {
            for (port, holder, others) in arbiter.contested() {
                tracing::warn!(%port, %holder, ?others, "a port is bound on more than one node");
            }
        });
    }

    /// What every node that answers has bound.
    fn all_bound(&self) -> Vec<(Slot, BTreeSet<Endpoint>)> {
        let mut all = Vec::new();
        for (node, reply) in self.peers.call_others(&PeerRequest::WhichPorts, ASK_WITHIN) {
            match reply {
                Ok(PeerReply::Bound(bound)) => all.push((node, parse(bound))),
                Ok(_) | Err(_) => {
                    let name = self.peers.name(node);
                    tracing::info!("node {name} does not tell which ports it has: it will when it is back");
                }
            }
        }
        match bound::look(&self.edge) {
            Ok(bound) => all.push((self.peers.own(), bound)),
            Err(error) => tracing::warn!(%error, "the nest's sockets cannot be seen"),
        }
        all
    }

    /// Tells the arbiter what is bound here.
    fn report(&self) {
        let seen_at = Instant::now();
        let bound = match bound::look(&self.edge) {
            Ok(bound) => bound,
            Err(error) => return tracing::warn!(%error, "the nest's sockets cannot be seen"),
        };
        let request = PeerRequest::PortsBound {
            bound: bound.into_iter().collect(),
            age_ms: seen_at.elapsed().as_millis() as u32,
        };
        if let Err(error) = self.peers.call(self.arbiter_slot, &request) {
            tracing::debug!(%error, "the arbiter of ports hears what is bound when it is back");
        }
    }
}

fn parse(bound: Vec<Endpoint>) -> BTreeSet<Endpoint> {
    let good = |port: &Endpoint| port.peer().is_none() && port.port != 0;
    bound.into_iter().filter(good).take(MAX_PORTS).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
