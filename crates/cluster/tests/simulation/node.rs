//! One node: its kernel and init, what its daemon made durable, and the daemon.
//!
//! The daemon drives the machines as the real one does: it takes an event, then carries out the actions in order. It may be
//! killed between any two of them; then everything under `Daemon` is gone, and the blanks with it that no record tells of.
//! The others wait for the next daemon.

use crate::oracle::{CopyState, Life, Mutation, Violation};
use crate::world::{Local, Shared};
use dunlin_cluster::allotment::Allotment;
use dunlin_cluster::relocation::destination::{DestinationEvent, DestinationMove, DestinationRecord, Found};
use dunlin_cluster::relocation::home::{Home, HomeEvent, Ledger};
use dunlin_cluster::relocation::outbox::Outbox;
use dunlin_cluster::relocation::source::{SourceEvent, SourceMove, SourceRecord, SourceStage};
use dunlin_cluster::relocation::{Now, stray};
use dunlin_cluster::table::Row;
use dunlin_proto::ids::{Incarnation, Modulus, MoveId, Pid, Slot};
use dunlin_proto::relocation::{Ending, Member, MoveMsg, Notice, SourceToDestination};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Why a node stopped in the middle.
pub enum Stop {
    Killed,
    Violation(Violation),
}

impl From<Violation> for Stop {
    fn from(violation: Violation) -> Stop {
        Stop::Violation(violation)
    }
}

/// A process as a kernel has it.
#[derive(Debug, Clone)]
pub struct Task {
    pub life: Life,
    pub state: CopyState,
    pub threads: BTreeSet<Pid>,
    pub images: BTreeSet<MoveId>,
}

pub struct Node {
    pub slot: Slot,
    pub modulus: Modulus,
    /// How often the daemon was started: what a killed one had under way is void.
    pub boot: u64,
    // The kernel and init: these survive the daemon.
    pub tasks: BTreeMap<Pid, Task>,
    pub blanks: BTreeMap<MoveId, BTreeMap<Pid, Task>>,
    pub images: BTreeSet<(MoveId, Pid)>,
    pub allotment: Allotment,
    /// Ends that init has seen and the daemon has not told yet.
    pub unreported: VecDeque<(Pid, Task)>,
    // What the daemon made durable.
    pub source_records: BTreeMap<MoveId, SourceRecord>,
    pub destination_records: BTreeMap<MoveId, DestinationRecord>,
    pub ledger: Ledger,
    pub notices: BTreeSet<(Slot, Notice)>,
    pub daemon: Option<Daemon>,
}

/// What dies with the daemon.
pub struct Daemon {
    pub sources: BTreeMap<MoveId, SourceMove>,
    pub destinations: BTreeMap<MoveId, DestinationMove>,
    pub home: Home,
    pub outbox: Outbox,
    /// Which move has which process in hand.
    pub claimed: BTreeMap<Pid, MoveId>,
}

impl Node {
    pub fn new(slot: Slot, modulus: Modulus, pid_limit: i32) -> Node {
        Node {
            slot,
            modulus,
            boot: 0,
            tasks: BTreeMap::new(),
            blanks: BTreeMap::new(),
            images: BTreeSet::new(),
            allotment: Allotment::new(modulus, slot, pid_limit).expect("the limit leaves room"),
            unreported: VecDeque::new(),
            source_records: BTreeMap::new(),
            destination_records: BTreeMap::new(),
            ledger: Ledger::default(),
            notices: BTreeSet::new(),
            daemon: None,
        }
    }

    // ---- the daemon's life ----

    /// The daemon starts: first everything it has on record, then the ends it missed.
    pub fn start(&mut self, w: &mut Shared) -> Result<(), Stop> {
        self.boot += 1;
        let now = w.now;
        self.daemon = Some(Daemon {
            sources: BTreeMap::new(),
            destinations: BTreeMap::new(),
            home: Home::restore(now, self.modulus, self.slot, self.ledger.clone()),
            outbox: Outbox::restore(now, self.notices.iter().copied()),
            claimed: BTreeMap::new(),
        });
        self.drain_home(w)?;
        self.drain_outbox(w)?;
        for (move_id, record) in self.destination_records.clone() {
            let is_there = record.members.iter().any(|m| self.tasks.contains_key(&m.pid));
            let waits = self.blanks.contains_key(&move_id);
            let found = match w.mutation {
                Mutation::WaitingIsTakenForRunning if waits => Found::Running,
                Mutation::WaitingIsDestroyed if waits => {
                    self.blanks.remove(&move_id);
                    w.check = true;
                    Found::Ended(Ending::Lost)
                }
                _ if waits => Found::Waiting,
                _ if is_there => Found::Running,
                _ => Found::Ended(Ending::Lost),
            };
            w.census.waited += u64::from(matches!(found, Found::Waiting));
            w.census.waited_in_part += u64::from(waits && is_there);
            let machine = DestinationMove::recover(now, self.slot, w.limits, record, found);
            self.daemon().destinations.insert(move_id, machine);
            self.drain_destination(w, move_id)?;
        }
        for (move_id, record) in self.source_records.clone() {
            for pid in stage_pids(&record.stage) {
                self.daemon().claimed.insert(pid, move_id);
            }
            let machine = SourceMove::recover(now, record, w.limits);
            self.daemon().sources.insert(move_id, machine);
            self.drain_source(w, move_id)?;
        }
        self.tell_ends(w)
    }

    /// The daemon is killed; whoever it had lost by that.
    pub fn kill(&mut self, w: &mut Shared) {
        w.tell(|| format!("{}: the daemon is killed", self.slot));
        self.daemon = None;
        self.boot += 1;
        for (move_id, blanks) in std::mem::take(&mut self.blanks) {
            let has_asked = self.destination_records.contains_key(&move_id);
            if has_asked && !w.rng.chance(w.faults.kill_blanks) {
                // It waits in its loop, whole.
                self.blanks.insert(move_id, blanks);
                continue;
            }
            let lives = blanks.values().map(|task| task.life).collect();
            w.oracle.die(move_id, lives, has_asked);
            // What was resumed already is written down as having come, and so are these: their end is told as any other.
            let record = self.destination_records.get(&move_id);
            if record.is_some_and(|r| r.members.iter().any(|m| self.tasks.contains_key(&m.pid))) {
                self.unreported.extend(blanks);
            }
        }
    }

    pub fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("only a running daemon carries out actions")
    }

    /// The earliest timeout of all its machines.
    pub fn next_timeout(&self) -> Option<Now> {
        let d = self.daemon.as_ref()?;
        let sources = d.sources.values().filter_map(SourceMove::next_timeout);
        let destinations = d.destinations.values().filter_map(DestinationMove::next_timeout);
        let others = d.home.next_timeout().into_iter().chain(d.outbox.next_timeout());
        sources.chain(destinations).chain(others).min()
    }

    pub fn tick(&mut self, w: &mut Shared) -> Result<(), Stop> {
        let now = w.now;
        let sources: Vec<MoveId> = self.daemon().sources.keys().copied().collect();
        for id in sources {
            self.tell_source(w, id, SourceEvent::Tick)?;
        }
        let destinations: Vec<MoveId> = self.daemon().destinations.keys().copied().collect();
        for id in destinations {
            self.tell_destination(w, id, DestinationEvent::Tick)?;
        }
        self.tell_home(w, HomeEvent::Tick)?;
        self.daemon().outbox.tick(now);
        self.drain_outbox(w)
    }

    pub fn peer_lost(&mut self, w: &mut Shared, peer: Slot) -> Result<(), Stop> {
        let sources: Vec<MoveId> = self.daemon().sources.keys().copied().collect();
        for id in sources {
            self.tell_source(w, id, SourceEvent::PeerLost(peer))?;
        }
        let destinations: Vec<MoveId> = self.daemon().destinations.keys().copied().collect();
        for id in destinations {
            self.tell_destination(w, id, DestinationEvent::PeerLost(peer))?;
        }
        Ok(())
    }

    // ---- messages ----

    pub fn receive(&mut self, w: &mut Shared, from: Slot, msg: MoveMsg) -> Result<(), Stop> {
        match msg {
            MoveMsg::SourceToHome(id, word) => self.tell_home(w, HomeEvent::FromSource(from, id, word)),
            MoveMsg::DestinationToHome(id, word) => self.tell_home(w, HomeEvent::FromDestination(from, id, word)),
            MoveMsg::HomeToHome(id, word) => self.tell_home(w, HomeEvent::FromHome(from, id, word)),
            MoveMsg::Notice(Notice::Ended {
                pid,
                incarnation,
                ending,
            }) => self.tell_home(w, HomeEvent::Ended(from, pid, incarnation, ending)),
            MoveMsg::Noted(notice) => {
                self.daemon().outbox.noted(from, notice);
                self.drain_outbox(w)
            }
            MoveMsg::HomeToSource(id, word) if self.daemon().sources.contains_key(&id) => {
                self.tell_source(w, id, SourceEvent::FromHome(from, word))
            }
            MoveMsg::DestinationToSource(id, word) if self.daemon().sources.contains_key(&id) => {
                self.tell_source(w, id, SourceEvent::FromDestination(from, word))
            }
            MoveMsg::Notice(Notice::Drained { move_id, pid }) if self.daemon().sources.contains_key(&move_id) => {
                self.tell_source(w, move_id, SourceEvent::Drained(from, pid))
            }
            MoveMsg::HomeToDestination(id, word) if self.daemon().destinations.contains_key(&id) => {
                self.tell_destination(w, id, DestinationEvent::FromHome(from, word))
            }
            MoveMsg::SourceToDestination(id, word) if self.daemon().destinations.contains_key(&id) => {
                self.tell_destination(w, id, DestinationEvent::FromSource(from, word))
            }
            MoveMsg::SourceToDestination(id, SourceToDestination::Propose { home, payload }) if from == id.source => {
                let machine = DestinationMove::start(self.slot, w.limits, id, home, payload);
                self.daemon().destinations.insert(id, machine);
                self.drain_destination(w, id)
            }
            msg @ (MoveMsg::HomeToSource(..)
            | MoveMsg::DestinationToSource(..)
            | MoveMsg::Notice(Notice::Drained { .. })
            | MoveMsg::HomeToDestination(..)
            | MoveMsg::SourceToDestination(..)) => {
                let stray = stray(&msg);
                if !stray.raise.is_empty() {
                    self.tell_home(w, HomeEvent::Raise(stray.raise))?;
                }
                if let Some(reply) = stray.reply {
                    w.send(self.slot, from, reply);
                }
                Ok(())
            }
        }
    }

    /// The engine has finished something.
    pub fn local(&mut self, w: &mut Shared, done: Local) -> Result<(), Stop> {
        match done {
            Local::Source(id, SourceEvent::Frozen(..)) => {
                let members = self.freeze(id);
                if members.is_empty() {
                    return self.tell_source(w, id, SourceEvent::Failed("the process has ended".into()));
                }
                self.tell_source(w, id, SourceEvent::Frozen(members, Vec::new()))
            }
            Local::Source(id, event) => self.tell_source(w, id, event),
            Local::Destination(id, event) => self.tell_destination(w, id, event),
        }
    }

    /// Parks all that this move has in hand, the root first; nothing if the root has ended.
    fn freeze(&mut self, move_id: MoveId) -> Vec<Member> {
        let root = match self.source_records.get(&move_id).map(|r| &r.stage) {
            Some(SourceStage::Freezing(claims)) => claims[0].pid,
            Some(SourceStage::Parked(_) | SourceStage::Image { .. }) | None => match self.mutant_root(move_id) {
                Some(root) => root,
                None => return Vec::new(),
            },
        };
        let daemon = self.daemon.as_ref().expect("it freezes");
        let in_hand = daemon
            .claimed
            .iter()
            .filter(|(_, m)| **m == move_id)
            .map(|(pid, _)| *pid);
        let mut pids: Vec<Pid> = in_hand.filter(|pid| self.tasks.contains_key(pid)).collect();
        pids.sort_by_key(|pid| *pid != root);
        if pids.first() != Some(&root) {
            return Vec::new();
        }
        let mut members = Vec::new();
        for pid in pids {
            let task = self.tasks.get_mut(&pid).expect("filtered");
            task.state = CopyState::Parked(move_id);
            let (ids, images) = (
                task.threads.iter().copied().collect(),
                task.images.iter().copied().collect(),
            );
            members.push(daemon.home.table().member(pid, ids, images));
        }
        members
    }

    /// With a mutation that keeps no records, any process in hand is the root.
    fn mutant_root(&self, move_id: MoveId) -> Option<Pid> {
        let claimed = &self.daemon.as_ref()?.claimed;
        claimed.iter().find(|(_, m)| **m == move_id).map(|(pid, _)| *pid)
    }

    /// The daemon is killed during a freeze: some are parked.
    pub fn freeze_partly(&mut self, w: &mut Shared) {
        let Some(daemon) = &self.daemon else { return };
        for (pid, move_id) in &daemon.claimed {
            let freezing = self.source_records.get(move_id).map(|r| &r.stage);
            if let (Some(SourceStage::Freezing(_)), Some(task)) = (freezing, self.tasks.get_mut(pid))
                && task.state == CopyState::Running
                && w.rng.chance(500)
            {
                task.state = CopyState::Parked(*move_id);
            }
        }
    }

    /// Nothing must be left to do; what there is, by name.
    pub fn unfinished(&self) -> Option<String> {
        let d = self.daemon.as_ref()?;
        let left = [
            ("sources", d.sources.len()),
            ("destinations", d.destinations.len()),
            ("moves at home", d.home.moves().count()),
            ("notices", d.outbox.len()),
            ("source records", self.source_records.len()),
            ("destination records", self.destination_records.len()),
            ("blanks", self.blanks.len()),
            ("images", self.images.len()),
            ("durable notices", self.notices.len()),
            ("claims", d.claimed.len()),
        ];
        let left: Vec<_> = left.into_iter().filter(|(_, n)| *n > 0).collect();
        (!left.is_empty()).then(|| format!("{}: {left:?}, {:?}", self.slot, d.sources))
    }

    /// Does a restart from what is durable give the same table?
    pub fn ledger_agrees(&self, now: Now) -> bool {
        let Some(d) = &self.daemon else { return true };
        let mut copy = Ledger::default();
        self.ledger.entries().for_each(|durable| copy.apply(durable));
        let restored = Home::restore(now, self.modulus, self.slot, copy);
        let rows = |home: &Home| -> Vec<Row> {
            home.table()
                .entries()
                .map(|(pid, e)| Row::Entry(pid, e.clone()))
                .collect()
        };
        rows(&restored) == rows(&d.home)
    }

    pub fn incarnation(&self, pid: Pid) -> Option<Incarnation> {
        self.daemon.as_ref().map(|d| d.home.table().incarnation(pid))
    }
}

fn stage_pids(stage: &SourceStage) -> Vec<Pid> {
    match stage {
        SourceStage::Freezing(claims) => claims.iter().map(|c| c.pid).collect(),
        SourceStage::Parked(members) => members.iter().map(|m| m.pid).collect(),
        SourceStage::Image { .. } => Vec::new(),
    }
}
