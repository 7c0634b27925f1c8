//! The clock, the network, and what happens to it all.

use crate::node::{Node, Stop, Task};
use crate::oracle::{Copy, CopyState, Life, Mutation, Oracle, Violation};
use crate::rng::Rng;
use dunlin_cluster::relocation::destination::DestinationEvent;
use dunlin_cluster::relocation::source::{SourceEvent, WhyNot};
use dunlin_cluster::relocation::{Limits, Now};
use dunlin_cluster::table::{Place, Whereabouts};
use dunlin_proto::ids::{LAST_OWN_PID, Modulus, MoveId, Pid, Slot};
use dunlin_proto::relocation::{Member, MoveMsg};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const MODULUS: Modulus = Modulus(8);
/// How long the faults last.
const CHAOS: Duration = Duration::from_secs(40);
/// How long after the last fault all must be settled.
const SETTLED_AFTER: Duration = Duration::from_secs(90);
/// More processes than this are not forked on one node.
const CROWD: usize = 6;

/// What the engine of a node has finished.
#[derive(Debug)]
pub enum Local {
    Source(MoveId, SourceEvent),
    Destination(MoveId, DestinationEvent),
}

#[derive(Debug)]
enum Event {
    Message { from: Slot, to: Slot, msg: MoveMsg },
    Local { at: Slot, boot: u64, done: Local },
    Restart(Slot),
    PeerLost { at: Slot, peer: Slot },
}

/// What goes wrong, in thousandths and milliseconds.
#[derive(Debug, Clone, Copy, Default)]
struct Faults {
    loss: u64,
    doubled: u64,
    late_ms: u64,
    engine: u64,
    kill_per_action: u64,
    kill_per_beat: u64,
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
        enough.iter().all(|n| *n > 1000) && self.lost > 10 && self.exhausted > 0
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
    faults: Faults,
    cut: Option<Slot>,
    queue: BTreeMap<(Now, u64), Event>,
    sequence: u64,
    telling: bool,
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

    fn delay(&mut self, far: bool) -> Duration {
        let late = if far && self.rng.chance(100) {
            self.faults.late_ms
        } else {
            0
        };
        Duration::from_micros(50 + self.rng.below(1000) + 1000 * self.rng.below(late + 1))
    }

    fn push(&mut self, delay: Duration, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now + delay, self.sequence), event);
    }
}

pub struct World {
    shared: Shared,
    nodes: BTreeMap<Slot, Node>,
    next_beat: Now,
    healed: bool,
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

    fn slots(&self) -> Vec<Slot> {
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
    fn on(
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

    fn kill(&mut self, slot: Slot) {
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

    fn is_up(&self, slot: Slot) -> bool {
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

    /// Programs live; now and then something breaks.
    fn beat(&mut self) -> Result<(), Violation> {
        let slots = self.slots();
        let Some(slot) = self.shared.rng.pick(&slots) else {
            return Ok(());
        };
        if self.healed {
            return slots.into_iter().try_for_each(|slot| self.page_in(slot));
        }
        if self.shared.rng.chance(self.shared.faults.kill_per_beat) && self.is_up(slot) {
            self.kill(slot);
            return self.check();
        }
        if self.shared.rng.chance(20) && self.shared.faults.loss > 0 {
            self.shared.cut = if self.shared.cut.is_some() { None } else { Some(slot) };
        }
        match self.shared.rng.below(100) {
            0..=24 => self.fork(slot),
            25..=39 => self.new_thread(slot),
            40..=44 => self.end_thread(slot),
            45..=52 => self.exit(slot),
            53..=62 => self.page_in(slot),
            63..=64 => self.cancel(slot),
            65..=66 => self.false_alarm(slot),
            _ => self.start_move(slot),
        }
    }

    fn running(&self, slot: Slot) -> Vec<Pid> {
        let tasks = self.nodes[&slot].tasks.iter();
        tasks
            .filter(|(_, t)| t.state == CopyState::Running)
            .map(|(pid, _)| *pid)
            .collect()
    }

    fn fork(&mut self, slot: Slot) -> Result<(), Violation> {
        let running = self.running(slot);
        if running.len() >= CROWD {
            return Ok(());
        }
        let parent = self.shared.rng.pick(&running);
        let node = self.nodes.get_mut(&slot).expect("a slot of ours");
        match node.fork(&mut self.shared, parent) {
            Some(pid) => {
                self.shared.census.forks += 1;
                self.check_unique(pid)
            }
            None => {
                self.shared.census.exhausted += 1;
                Ok(())
            }
        }
    }

    fn new_thread(&mut self, slot: Slot) -> Result<(), Violation> {
        let running = self.running(slot);
        let Some(pid) = self.shared.rng.pick(&running) else {
            return Ok(());
        };
        let node = self.nodes.get_mut(&slot).expect("a slot of ours");
        if node.tasks[&pid].threads.len() >= 3 {
            return Ok(());
        }
        match node.new_thread(pid) {
            Some(tid) => self.check_unique(tid),
            None => Ok(()),
        }
    }

    fn end_thread(&mut self, slot: Slot) -> Result<(), Violation> {
        let running = self.running(slot);
        let Some(pid) = self.shared.rng.pick(&running) else {
            return Ok(());
        };
        let task = self.nodes.get_mut(&slot).and_then(|n| n.tasks.get_mut(&pid));
        task.map(|t| t.threads.pop_first());
        Ok(())
    }

    fn exit(&mut self, slot: Slot) -> Result<(), Violation> {
        let running = self.running(slot);
        let Some(pid) = self.shared.rng.pick(&running) else {
            return Ok(());
        };
        self.shared.census.exits += 1;
        self.shared.check = true;
        self.on(slot, |node, w| node.exit(w, pid))
    }

    fn page_in(&mut self, slot: Slot) -> Result<(), Violation> {
        let node = &self.nodes[&slot];
        let running = node.tasks.iter().filter(|(_, t)| t.state == CopyState::Running);
        let wanted: Vec<_> = running
            .flat_map(|(pid, t)| t.images.iter().map(|m| (*pid, *m)))
            .collect();
        for (pid, move_id) in wanted {
            if self.is_up(slot) && (self.healed || self.shared.rng.chance(500)) {
                self.on(slot, |node, w| node.page_in(w, pid, move_id))?;
            }
        }
        Ok(())
    }

    fn cancel(&mut self, slot: Slot) -> Result<(), Violation> {
        let Some(daemon) = &self.nodes[&slot].daemon else {
            return Ok(());
        };
        let ids: Vec<MoveId> = daemon.sources.keys().copied().collect();
        match self.shared.rng.pick(&ids) {
            // Without faults, every move is to take place.
            Some(id) if self.shared.faults.engine > 0 => {
                self.on(slot, |node, w| node.tell_source(w, id, SourceEvent::Cancel))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn false_alarm(&mut self, slot: Slot) -> Result<(), Violation> {
        let slots = self.slots();
        match self.shared.rng.pick(&slots) {
            Some(peer) if self.is_up(slot) && self.shared.faults.loss > 0 => {
                self.on(slot, |node, w| node.peer_lost(w, peer))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn start_move(&mut self, slot: Slot) -> Result<(), Violation> {
        let others: Vec<Slot> = self.slots().into_iter().filter(|s| *s != slot).collect();
        let Some(to) = self.shared.rng.pick(&others) else {
            return Ok(());
        };
        let mut free: Vec<Pid> = self.running(slot);
        free.retain(|pid| self.nodes[&slot].is_free(*pid));
        let Some(root) = self.shared.rng.pick(&free) else {
            return Ok(());
        };
        let mut pids = vec![root];
        if self.shared.rng.chance(300) {
            let rng = &mut self.shared.rng;
            pids.extend(free.into_iter().filter(|pid| *pid != root && rng.chance(500)));
        }
        if self.shared.faults.kill_per_action + self.shared.faults.engine + self.shared.faults.loss == 0 {
            // Other homes may not have heard yet where a process is, and then refuse: not a failure of the protocol.
            pids.retain(|pid| self.home_knows(*pid, slot));
        }
        if pids.first() != Some(&root) {
            return Ok(());
        }
        self.shared.census.trees += u64::from(pids.len() > 1);
        self.on(slot, |node, w| node.start_move(w, &pids, to))
    }

    fn home_knows(&self, pid: Pid, slot: Slot) -> bool {
        let home = MODULUS.home(pid).and_then(|home| self.nodes.get(&home));
        let Some(daemon) = home.and_then(|n| n.daemon.as_ref()) else {
            return false;
        };
        daemon.home.table().whereabouts(pid) == Whereabouts::Known(Place::At(slot))
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

    fn unfinished(&self) -> Option<String> {
        self.nodes.values().find_map(Node::unfinished)
    }

    fn copies(&self) -> impl Iterator<Item = Copy<'_>> {
        self.nodes.values().flat_map(|n| {
            n.tasks
                .values()
                .chain(n.blanks.values().flat_map(|b| b.values()))
                .map(move |t| Copy {
                    life: t.life,
                    at: n.slot,
                    state: t.state,
                    images: &t.images,
                })
        })
    }

    fn check(&mut self) -> Result<(), Violation> {
        if std::mem::take(&mut self.shared.check) {
            self.places()?;
        }
        Ok(())
    }

    fn places(&self) -> Result<BTreeMap<Life, Slot>, Violation> {
        let has_image = |move_id: MoveId, pid: Pid| {
            // Until the source knows of the commit, its parked copy has the pages.
            self.nodes.get(&move_id.source).is_some_and(|n| {
                let is_parked = |t: &Task| t.state == CopyState::Parked(move_id);
                n.images.contains(&(move_id, pid)) || n.tasks.get(&pid).is_some_and(is_parked)
            })
        };
        self.shared.oracle.check(self.copies(), has_image)
    }

    /// An id just given out is held by nobody else.
    fn check_unique(&self, id: Pid) -> Result<(), Violation> {
        let mut holders = BTreeSet::new();
        for node in self.nodes.values() {
            let blanks = node.blanks.values().flatten();
            for (pid, task) in node.tasks.iter().chain(blanks) {
                // A blank that will be destroyed may have a thread that has ended since.
                if (*pid == id || task.threads.contains(&id)) && self.shared.oracle.may_run(task.state) {
                    holders.insert(task.life);
                }
            }
        }
        match holders.len() {
            1 => Ok(()),
            _ => Err(Violation(format!("{id} was given out and is held by {holders:?}"))),
        }
    }

    /// When all is settled, every table tells the truth.
    fn check_the_end(&self) -> Result<(), Violation> {
        let places = self.places()?;
        let alive: BTreeMap<Pid, Slot> = places
            .iter()
            .map(|(life, at)| (self.shared.oracle.alive()[life], *at))
            .collect();
        for copy in self.copies() {
            if copy.state != CopyState::Running {
                return Err(Violation(format!("{:?} is left on {}", copy.state, copy.at)));
            }
        }
        for node in self.nodes.values() {
            let Some(daemon) = &node.daemon else { continue };
            for (pid, entry) in daemon.home.table().entries() {
                if alive.get(&pid).map(|at| Place::At(*at)) != Some(entry.place) {
                    let truth = alive.get(&pid);
                    return Err(Violation(format!(
                        "{}: {pid} is {entry:?}, but it is at {truth:?}",
                        node.slot
                    )));
                }
            }
            if !node.ledger_agrees(self.shared.now) {
                return Err(Violation(format!("{}: the ledger is not the table", node.slot)));
            }
        }
        for (pid, at) in &alive {
            let home = MODULUS.home(*pid).expect("not one of a node's own");
            let says = self.nodes[&home]
                .daemon
                .as_ref()
                .map(|d| d.home.table().whereabouts(*pid));
            if says != Some(Whereabouts::Known(Place::At(*at))) {
                return Err(Violation(format!("{pid} is on {at}, its home says {says:?}")));
            }
            if self.nodes[&home].incarnation(*pid) != self.nodes[at].incarnation(*pid) {
                return Err(Violation(format!("{pid}: home and {at} differ in its incarnation")));
            }
            for id in self.nodes[at].tasks[pid].threads.iter().chain([pid]) {
                let home = &self.nodes[&MODULUS.home(*id).expect("not one of a node's own")];
                if home.slot != *at && !home.allotment.reserved().any(|r| r == *id) {
                    return Err(Violation(format!(
                        "{id} is held on {at} and not reserved at {}",
                        home.slot
                    )));
                }
            }
        }
        Ok(())
    }
}
