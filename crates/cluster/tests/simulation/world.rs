//! A cluster: its nodes, and what happens to them in which order.

use crate::node::{Node, Stop};
use crate::oracle::{Mutation, Oracle, Violation};
use crate::rng::Rng;
pub use crate::shared::{Census, Local, Shared};
use crate::shared::{Event, Faults};
use dunlin_cluster::relocation::{Limits, Now};
use dunlin_proto::ids::{LAST_OWN_PID, Modulus, Slot};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub const MODULUS: Modulus = Modulus(8);
/// How long the faults last.
const CHAOS: Duration = Duration::from_secs(40);
/// How long after the last fault all must be settled.
const SETTLED_AFTER: Duration = Duration::from_secs(90);
/// More processes than this are not forked on one node.
pub const CROWD: usize = 6;
pub struct World {
    pub shared: Shared,
    pub nodes: BTreeMap<Slot, Node>,
    next_beat: Now,
    pub healed: bool,
}

impl World {
    pub fn new(seed: u64, mutation: Mutation) -> World {
        let mut rng = Rng::new(seed);
        let faults = Faults {
            loss: [0, 20, 200][rng.below(3) as usize],
            doubled: [0, 50, 300][rng.below(3) as usize],
            late_ms: [0, 50, 3000][rng.below(3) as usize],
            engine: [0, 50, 200][rng.below(3) as usize],
            kill_per_action: [0, 3, 15][rng.below(3) as usize],
            kill_per_beat: [0, 5, 20][rng.below(3) as usize],
            kill_blanks: [0, 50, 300][rng.below(3) as usize],
        };
        World::with(rng, mutation, faults)
    }

    pub fn without_faults(seed: u64) -> World {
        World::with(Rng::new(seed), Mutation::None, Faults::default())
    }

    fn with(mut rng: Rng, mutation: Mutation, faults: Faults) -> World {
        let seconds = Duration::from_secs;
        let limits = Limits {
            lease: seconds(3),
            propose: seconds(4),
            prepare: seconds(4),
            precopy: seconds(8),
            parked: seconds(2),
        };
        let count = 2 + rng.below(4);
        let first = rng.below(8);
        let ring = 4 + rng.below(40) as i32;
        let limit = LAST_OWN_PID + 1 + ring * i32::from(MODULUS.0);
        let slots = (0..count).map(|i| Slot(((first + i) % 8) as u16));
        World {
            shared: Shared {
                rng,
                now: Now::ZERO,
                limits,
                oracle: Oracle::default(),
                mutation,
                census: Census::default(),
                check: false,
                asked: BTreeSet::new(),
                faults,
                cut: None,
                queue: BTreeMap::new(),
                sequence: 0,
                telling: false,
            },
            nodes: slots.map(|slot| (slot, Node::new(slot, MODULUS, limit))).collect(),
            next_beat: Now::ZERO,
            healed: false,
        }
    }

    /// Prints every step.
    pub fn telling(mut self) -> World {
        self.shared.telling = true;
        self
    }

    pub fn run(mut self) -> Result<Census, Violation> {
        for slot in self.slots() {
            self.on(slot, |node, w| node.start(w))?;
        }
        while self.shared.now < CHAOS {
            self.step()?;
        }
        self.heal()?;
        let deadline = self.shared.now + SETTLED_AFTER;
        while let Some(left) = self.unfinished() {
            if self.shared.now > deadline {
                return Err(Violation(format!("not settled: {left}")));
            }
            self.step()?;
        }
        self.check_the_end()?;
        self.shared.census.committed = self.shared.oracle.committed();
        self.shared.census.aborted = self.shared.oracle.aborted();
        self.shared.census.lost = self.shared.oracle.lost;
        Ok(self.shared.census)
    }

    pub fn slots(&self) -> Vec<Slot> {
        self.nodes.keys().copied().collect()
    }

    /// The next thing that happens: a timeout, a message, or a beat of chaos.
    fn step(&mut self) -> Result<(), Violation> {
        let timeouts = self.nodes.values().filter_map(|n| Some((n.next_timeout()?, n.slot)));
        let timeout = timeouts.min();
        let queued = self.shared.queue.keys().next().map(|(at, _)| *at);
        let next = [Some(self.next_beat), queued, timeout.map(|(at, _)| at)];
        let next = next.into_iter().flatten().min().unwrap_or_default();
        self.shared.now = self.shared.now.max(next);
        if let Some((at, slot)) = timeout
            && at <= next
        {
            return self.on(slot, |node, w| node.tick(w));
        }
        if queued.is_some_and(|at| at <= next)
            && let Some((_, event)) = self.shared.queue.pop_first()
        {
            return self.happen(event);
        }
        self.next_beat = self.shared.now + Duration::from_millis(20 + self.shared.rng.below(200));
        self.beat()
    }

    /// Something happens on a node, if its daemon is up; it may be killed by it.
    pub fn on(
        &mut self,
        slot: Slot,
        what: impl FnOnce(&mut Node, &mut Shared) -> Result<(), Stop>,
    ) -> Result<(), Violation> {
        let Some(node) = self.nodes.get_mut(&slot) else {
            return Ok(());
        };
        match what(node, &mut self.shared) {
            Ok(()) => {}
            Err(Stop::Killed) => self.kill(slot),
            Err(Stop::Violation(violation)) => return Err(violation),
        }
        self.check()
    }

    pub fn kill(&mut self, slot: Slot) {
        let Some(node) = self.nodes.get_mut(&slot) else { return };
        node.freeze_partly(&mut self.shared);
        node.kill(&mut self.shared);
        self.shared.census.kills += 1;
        self.shared.check = true;
        let delay = Duration::from_millis(10 + self.shared.rng.below(4000));
        self.shared.push(delay, Event::Restart(slot));
        for at in self.slots() {
            if at != slot && self.shared.rng.chance(700) {
                let delay = self.shared.delay(true);
                self.shared.push(delay, Event::PeerLost { at, peer: slot });
            }
        }
    }

    pub fn is_up(&self, slot: Slot) -> bool {
        self.nodes.get(&slot).is_some_and(|n| n.daemon.is_some())
    }

    fn happen(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Message { from, to, msg } if self.is_up(to) => {
                self.shared.tell(|| format!("{to} hears {from}: {msg:?}"));
                self.on(to, |node, w| node.receive(w, from, msg))
            }
            Event::Local { at, boot, done } if self.nodes[&at].boot == boot => {
                self.shared.tell(|| format!("{at}: {done:?}"));
                self.on(at, |node, w| node.local(w, done))
            }
            Event::PeerLost { at, peer } if self.is_up(at) => self.on(at, |node, w| node.peer_lost(w, peer)),
            Event::Restart(slot) if !self.is_up(slot) => {
                self.shared.tell(|| format!("{slot}: the daemon starts"));
                self.on(slot, |node, w| node.start(w))
            }
            Event::Message { .. } | Event::Local { .. } | Event::PeerLost { .. } | Event::Restart(_) => Ok(()),
        }
    }

    /// No more faults; everyone comes back.
    fn heal(&mut self) -> Result<(), Violation> {
        self.shared.tell(|| "no more faults".to_owned());
        self.healed = true;
        self.shared.faults = Faults::default();
        self.shared.cut = None;
        for slot in self.slots() {
            if !self.is_up(slot) {
                self.on(slot, |node, w| node.start(w))?;
            }
        }
        Ok(())
    }
}
