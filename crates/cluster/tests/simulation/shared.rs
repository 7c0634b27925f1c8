//! What nodes need of the world while they carry out actions: the clock, the network, and how often what breaks.

use crate::node::{Node, Stop, Task};
use crate::oracle::{CopyState, Life, Mutation, Oracle};
use crate::rng::Rng;
use dunlin_cluster::relocation::destination::DestinationEvent;
use dunlin_cluster::relocation::source::{SourceEvent, WhyNot};
use dunlin_cluster::relocation::{Limits, Now};
use dunlin_proto::ids::{MoveId, Slot};
use dunlin_proto::relocation::{Member, MoveMsg};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What the engine of a node has finished.
#[derive(Debug)]
pub enum Local {
    Source(MoveId, SourceEvent),
    Destination(MoveId, DestinationEvent),
}

#[derive(Debug)]
pub enum Event {
    Message { from: Slot, to: Slot, msg: MoveMsg },
    Local { at: Slot, boot: u64, done: Local },
    Restart(Slot),
    PeerLost { at: Slot, peer: Slot },
}

/// What goes wrong, in thousandths and milliseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    pub loss: u64,
    pub doubled: u64,
    pub late_ms: u64,
    pub engine: u64,
    pub kill_per_action: u64,
    pub kill_per_beat: u64,
    /// Somebody kills the blanks of a move while their daemon is away.
    pub kill_blanks: u64,
}

/// What happened in a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census {
    pub moves: u64,
    pub failed_moves: u64,
    pub committed: u64,
    pub aborted: u64,
    pub drained: u64,
    pub kills: u64,
    pub lost: u64,
    /// Copies that a daemon found waiting for the decision, and trees of which a part was resumed already.
    pub waited: u64,
    pub waited_in_part: u64,
    pub exits: u64,
    pub forks: u64,
    pub exhausted: u64,
    pub trees: u64,
    pub messages: u64,
}

impl Census {
    pub fn add(&mut self, other: &Census) {
        self.moves += other.moves;
        self.failed_moves += other.failed_moves;
        self.committed += other.committed;
        self.aborted += other.aborted;
        self.drained += other.drained;
        self.kills += other.kills;
        self.lost += other.lost;
        self.waited += other.waited;
        self.waited_in_part += other.waited_in_part;
        self.exits += other.exits;
        self.forks += other.forks;
        self.exhausted += other.exhausted;
        self.trees += other.trees;
        self.messages += other.messages;
    }

    pub fn is_rich(&self) -> bool {
        let enough = [
            self.committed,
            self.aborted,
            self.drained,
            self.kills,
            self.exits,
            self.forks,
            self.trees,
        ];
        enough.iter().all(|n| *n > 1000)
            && self.lost > 10
            && self.waited > 300
            && self.waited_in_part > 10
            && self.exhausted > 0
    }
}

/// What nodes need of the world while they carry out actions.
pub struct Shared {
    pub rng: Rng,
    pub now: Now,
    pub limits: Limits,
    pub oracle: Oracle,
    pub mutation: Mutation,
    pub census: Census,
    /// The oracle must look.
    pub check: bool,
    /// Commits asked for, by boot: the second is a repetition.
    pub asked: BTreeSet<(u64, MoveId)>,
    pub faults: Faults,
    pub cut: Option<Slot>,
    pub queue: BTreeMap<(Now, u64), Event>,
    pub sequence: u64,
    pub telling: bool,
}

impl Shared {
    pub fn tell(&self, what: impl FnOnce() -> String) {
        if self.telling {
            println!("{:9.3} {}", self.now.as_secs_f64(), what());
        }
    }

    pub fn send(&mut self, from: Slot, to: Slot, msg: MoveMsg) {
        self.census.messages += 1;
        let is_cut = from != to && [Some(from), Some(to)].contains(&self.cut);
        if from != to && (is_cut || self.rng.chance(self.faults.loss)) {
            return self.tell(|| format!("{from} to {to}: lost: {msg:?}"));
        }
        if self.rng.chance(self.faults.doubled) {
            let delay = self.delay(true);
            let msg = msg.clone();
            self.push(delay, Event::Message { from, to, msg });
        }
        let delay = self.delay(from != to);
        self.push(delay, Event::Message { from, to, msg });
    }

    /// The engine finishes something in a while, if the daemon lives so long.
    pub fn later(&mut self, node: &Node, done: Local) {
        let delay = Duration::from_millis(1 + self.rng.below(200));
        let (at, boot) = (node.slot, node.boot);
        self.push(delay, Event::Local { at, boot, done });
    }

    /// The engine succeeds or fails.
    pub fn outcome<T>(&mut self, good: T, bad: T) -> T {
        if self.rng.chance(self.faults.engine) { bad } else { good }
    }

    /// A process that ended before it could be frozen is no failure.
    pub fn count_failure(&mut self, why: &WhyNot) {
        if !matches!(why, WhyNot::SourceFailed(_)) {
            self.census.failed_moves += 1;
        }
    }

    /// The daemon may be killed before each action.
    pub fn may_be_killed(&mut self, _at: Slot) -> Result<(), Stop> {
        match self.rng.chance(self.faults.kill_per_action) {
            true => Err(Stop::Killed),
            false => Ok(()),
        }
    }

    pub fn blank(&self, move_id: MoveId, member: &Member) -> Task {
        let life = self
            .oracle
            .alive()
            .iter()
            .find(|(_, pid)| **pid == member.pid)
            .map(|(life, _)| *life);
        Task {
            life: life.unwrap_or(Life(u64::MAX)),
            state: CopyState::Blank(move_id),
            threads: member.ids.iter().copied().collect(),
            images: member.images.iter().copied().chain([move_id]).collect(),
        }
    }

    pub fn delay(&mut self, far: bool) -> Duration {
        let late = if far && self.rng.chance(100) {
            self.faults.late_ms
        } else {
            0
        };
        Duration::from_micros(50 + self.rng.below(1000) + 1000 * self.rng.below(late + 1))
    }

    pub fn push(&mut self, delay: Duration, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now + delay, self.sequence), event);
    }
}
