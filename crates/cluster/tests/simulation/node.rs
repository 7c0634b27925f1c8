//! One node: its kernel and init, what its daemon made durable, and the daemon.
//!
//! The daemon drives the machines as the real one does: it takes an event, then carries out the actions in order. It may be
//! killed between any two of them; then everything under `Daemon` is gone, and the blanks with it.

use crate::oracle::{CopyState, Life, Mutation, Violation};
use crate::world::{Local, Shared};
use dunlin_cluster::allotment::{Allotment, NoPid};
use dunlin_cluster::relocation::destination::{
    DestinationAction, DestinationEvent, DestinationMove, DestinationRecord, Found,
};
use dunlin_cluster::relocation::home::{Durable, Home, HomeAction, HomeEvent, Ledger, Stage};
use dunlin_cluster::relocation::outbox::{Outbox, OutboxAction};
use dunlin_cluster::relocation::source::{
    Plan, SourceAction, SourceEvent, SourceMove, SourceRecord, SourceReport, SourceStage,
};
use dunlin_cluster::relocation::{Now, stray};
use dunlin_cluster::table::Row;
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::{Incarnation, Modulus, MoveId, Pid, Slot};
use dunlin_proto::relocation::{
    Claim, DestinationToHome, Ending, Member, MoveMsg, Notice, SourceToDestination, SourceToHome,
};
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
    unreported: VecDeque<(Pid, Task)>,
    // What the daemon made durable.
    source_records: BTreeMap<MoveId, SourceRecord>,
    pub destination_records: BTreeMap<MoveId, DestinationRecord>,
    ledger: Ledger,
    notices: BTreeSet<(Slot, Notice)>,
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
            let found = if is_there {
                Found::Running
            } else {
                Found::Ended(Ending::Lost)
            };
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
            let lives = blanks.values().map(|task| task.life).collect();
            w.oracle
                .die(move_id, lives, self.destination_records.contains_key(&move_id));
        }
    }

    fn daemon(&mut self) -> &mut Daemon {
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

    // ---- what programs do ----

    /// A new id, by scanning the kernel when asked to.
    fn new_id(&mut self) -> Option<Pid> {
        loop {
            match self.allotment.next_pid() {
                Ok(id) => return Some(id),
                Err(NoPid::Exhausted) => return None,
                Err(NoPid::NeedsScan(window)) => {
                    let tasks = self.tasks.iter().chain(self.blanks.values().flatten());
                    let ids = tasks.flat_map(|(pid, t)| t.threads.iter().chain([pid])).copied();
                    self.allotment.scanned(window, ids.collect::<Vec<_>>());
                }
            }
        }
    }

    pub fn fork(&mut self, w: &mut Shared, parent: Option<Pid>) -> Option<Pid> {
        let pid = self.new_id()?;
        let life = w.oracle.born(pid);
        let task = Task {
            life,
            state: CopyState::Running,
            threads: BTreeSet::new(),
            images: BTreeSet::new(),
        };
        w.tell(|| format!("{}: {pid} is born ({life:?})", self.slot));
        self.tasks.insert(pid, task);
        // A child of a process that is about to move goes along.
        if let (Some(daemon), Some(parent)) = (&mut self.daemon, parent)
            && let Some(move_id) = daemon.claimed.get(&parent).copied()
        {
            daemon.claimed.insert(pid, move_id);
        }
        Some(pid)
    }

    pub fn new_thread(&mut self, pid: Pid) -> Option<Pid> {
        let tid = self.new_id()?;
        self.tasks.get_mut(&pid)?.threads.insert(tid);
        Some(tid)
    }

    pub fn exit(&mut self, w: &mut Shared, pid: Pid) -> Result<(), Stop> {
        let Some(task) = self.tasks.remove(&pid) else {
            return Ok(());
        };
        w.tell(|| format!("{}: {pid} exits", self.slot));
        w.oracle.ended(task.life);
        self.unreported.push_back((pid, task));
        if self.daemon.is_some() {
            self.tell_ends(w)?;
        }
        Ok(())
    }

    /// Init keeps each report, in order, until the daemon has it on its way: a PID may have had several lives meanwhile.
    fn tell_ends(&mut self, w: &mut Shared) -> Result<(), Stop> {
        while let Some((pid, task)) = self.unreported.front().cloned() {
            self.tell_end(w, pid, &task)?;
            self.unreported.pop_front();
        }
        Ok(())
    }

    fn tell_end(&mut self, w: &mut Shared, pid: Pid, task: &Task) -> Result<(), Stop> {
        let now = w.now;
        let ids: Vec<Pid> = task.threads.iter().copied().collect();
        let table = self.daemon().home.table();
        let incarnation = table.incarnation(pid);
        let to = table.to_be_told_of_end(pid, &ids);
        let is_known = to.contains(&self.slot);
        let ending = Ending::Exited(ExitStatus::Code(0));
        // The table here comes last and at once: before, the end can be told again; after, the PID has no earlier life.
        let here = self.slot;
        for to in to.into_iter().filter(|to| *to != here) {
            let notice = Notice::Ended {
                pid,
                incarnation,
                ending,
            };
            self.daemon().outbox.post(now, to, notice).expect("there is room");
        }
        for move_id in &task.images {
            let notice = Notice::Drained { move_id: *move_id, pid };
            self.daemon()
                .outbox
                .post(now, move_id.source, notice)
                .expect("there is room");
        }
        self.drain_outbox(w)?;
        w.may_be_killed(self.slot)?;
        if is_known {
            self.tell_home(w, HomeEvent::Ended(self.slot, pid, incarnation, ending))?;
        }
        if let Some(move_id) = self.daemon().claimed.remove(&pid) {
            let is_root = |s: &SourceMove| s.is_before_freeze();
            if self.daemon().sources.get(&move_id).is_some_and(is_root) && w.rng.chance(500) {
                self.tell_source(w, move_id, SourceEvent::Failed("a process ended".into()))?;
            }
        }
        Ok(())
    }

    /// The pager has fetched the last page that `move_id` left behind.
    pub fn page_in(&mut self, w: &mut Shared, pid: Pid, move_id: MoveId) -> Result<(), Stop> {
        let now = w.now;
        let Some(task) = self.tasks.get_mut(&pid) else {
            return Ok(());
        };
        let notice = Notice::Drained { move_id, pid };
        // The promise first: a daemon that dies here finds an image without missing pages and posts it again.
        self.daemon
            .as_mut()
            .expect("the pager is part of it")
            .outbox
            .post(now, move_id.source, notice)
            .expect("room");
        task.images.remove(&move_id);
        self.drain_outbox(w)
    }

    /// May this process be moved by a new move?
    pub fn is_free(&self, pid: Pid) -> bool {
        let Some(daemon) = &self.daemon else { return false };
        let unsettled = self
            .destination_records
            .values()
            .any(|r| r.members.iter().any(|m| m.pid == pid));
        let running = self.tasks.get(&pid).is_some_and(|t| t.state == CopyState::Running);
        running && !unsettled && !daemon.claimed.contains_key(&pid)
    }

    pub fn start_move(&mut self, w: &mut Shared, pids: &[Pid], destination: Slot) -> Result<(), Stop> {
        let move_id = MoveId {
            source: self.slot,
            nonce: w.rng.next(),
        };
        let root = pids[0];
        let plan = Plan {
            move_id,
            home: self.modulus.home(root).expect("not one of the node's own"),
            destination,
        };
        w.tell(|| format!("{}: {move_id} shall move {pids:?} to {destination}", self.slot));
        w.census.moves += 1;
        let table = self.daemon().home.table();
        let claim = |pid: &Pid| Claim {
            pid: *pid,
            incarnation: table.incarnation(*pid),
        };
        let claims: Vec<Claim> = pids.iter().map(claim).collect();
        for pid in pids {
            self.daemon().claimed.insert(*pid, move_id);
        }
        let machine = SourceMove::start(w.now, plan, w.limits, claims, Vec::new());
        self.daemon().sources.insert(move_id, machine);
        self.drain_source(w, move_id)
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

    // ---- the machines ----

    pub fn tell_source(&mut self, w: &mut Shared, id: MoveId, event: SourceEvent) -> Result<(), Stop> {
        let now = w.now;
        if let Some(machine) = self.daemon().sources.get_mut(&id) {
            machine.handle(now, event);
        }
        self.drain_source(w, id)
    }

    fn drain_source(&mut self, w: &mut Shared, id: MoveId) -> Result<(), Stop> {
        while let Some(action) = self.daemon().sources.get_mut(&id).and_then(SourceMove::poll_action) {
            w.may_be_killed(self.slot)?;
            w.tell(|| format!("{} source {id}: {action:?}", self.slot));
            match action {
                SourceAction::Send { to, msg } => {
                    if let MoveMsg::SourceToHome(_, SourceToHome::Abort) = msg {
                        match w.mutation {
                            Mutation::ThawOnAsking => self.thaw(w, id)?,
                            Mutation::ImageOnAsking => self.make_image(id),
                            _ => {}
                        }
                    }
                    w.send(self.slot, to, msg);
                    w.check = true;
                }
                SourceAction::Prepare(_) => {
                    let done = w.outcome(SourceEvent::Prepared(Vec::new()), SourceEvent::Failed("mmap".into()));
                    w.later(self, Local::Source(id, done));
                }
                SourceAction::ReadyToFreeze(_) => w.later(self, Local::Source(id, SourceEvent::Freeze)),
                SourceAction::Freeze => {
                    let frozen = SourceEvent::Frozen(Vec::new(), Vec::new());
                    let done = w.outcome(frozen, SourceEvent::Failed("a new mapping".into()));
                    w.later(self, Local::Source(id, done));
                }
                SourceAction::Persist(record) => {
                    if w.mutation != Mutation::SourceKeepsNoRecord {
                        self.source_records.insert(id, record);
                    }
                }
                SourceAction::Forget => drop(self.source_records.remove(&id)),
                SourceAction::Thaw => {
                    self.thaw(w, id)?;
                    w.check = true;
                }
                SourceAction::MakeImage => {
                    self.make_image(id);
                    w.check = true;
                }
                SourceAction::ForgetImage(pid) => {
                    self.images.remove(&(id, pid));
                    w.check = true;
                }
                SourceAction::Learn(entries) => self.tell_home(w, HomeEvent::Learn(entries))?,
                SourceAction::Raise(claims) => self.tell_home(w, HomeEvent::Raise(claims))?,
                SourceAction::Report(report) => {
                    match report {
                        SourceReport::Failed(why) => w.count_failure(&why),
                        SourceReport::Resumed if w.mutation == Mutation::ForgetImageOnResume => {
                            self.images.retain(|(m, _)| *m != id);
                            w.check = true;
                        }
                        SourceReport::Committed | SourceReport::Resumed => {}
                        SourceReport::Drained => w.census.drained += 1,
                    }
                    self.daemon().claimed.retain(|_, m| *m != id);
                }
            }
        }
        if self.daemon().sources.get(&id).is_some_and(SourceMove::is_ended) {
            self.daemon().sources.remove(&id);
            self.daemon().claimed.retain(|_, m| *m != id);
        }
        Ok(())
    }

    fn thaw(&mut self, w: &mut Shared, id: MoveId) -> Result<(), Violation> {
        for task in self.tasks.values_mut().filter(|t| t.state == CopyState::Parked(id)) {
            task.state = CopyState::Running;
            w.oracle.thawed(id)?;
        }
        Ok(())
    }

    fn make_image(&mut self, id: MoveId) {
        let parked = self.tasks.iter().filter(|(_, t)| t.state == CopyState::Parked(id));
        let parked: Vec<Pid> = parked.map(|(pid, _)| *pid).collect();
        for pid in parked {
            self.tasks.remove(&pid);
            self.images.insert((id, pid));
        }
    }

    pub fn tell_destination(&mut self, w: &mut Shared, id: MoveId, event: DestinationEvent) -> Result<(), Stop> {
        let now = w.now;
        if let Some(machine) = self.daemon().destinations.get_mut(&id) {
            machine.handle(now, event);
        }
        self.drain_destination(w, id)
    }

    fn drain_destination(&mut self, w: &mut Shared, id: MoveId) -> Result<(), Stop> {
        while let Some(action) = self
            .daemon()
            .destinations
            .get_mut(&id)
            .and_then(DestinationMove::poll_action)
        {
            w.may_be_killed(self.slot)?;
            w.tell(|| format!("{} destination {id}: {action:?}", self.slot));
            match action {
                DestinationAction::Send { to, msg } => {
                    if let MoveMsg::DestinationToHome(_, DestinationToHome::Commit { .. }) = msg {
                        let asks_again = !w.asked.insert((self.boot, id));
                        match w.mutation {
                            Mutation::ResumeOnAsking => self.resume(w, id)?,
                            Mutation::DestroyWhileAsking if asks_again => drop(self.blanks.remove(&id)),
                            _ => {}
                        }
                        w.check = true;
                    }
                    w.send(self.slot, to, msg);
                }
                DestinationAction::Check(_) => {
                    let no = DestinationEvent::Refused(Vec::new());
                    let done = w.outcome(DestinationEvent::Accepted(Vec::new()), no);
                    w.later(self, Local::Destination(id, done));
                }
                DestinationAction::Prepare(_) => {
                    let done = w.outcome(
                        DestinationEvent::Prepared(Vec::new()),
                        DestinationEvent::Failed("pid".into()),
                    );
                    w.later(self, Local::Destination(id, done));
                }
                DestinationAction::Rebuild(members, _) => {
                    let blanks = members.iter().map(|m| (m.pid, w.blank(id, m))).collect();
                    let in_use = members.iter().any(|m| self.is_in_use(m.pid, id));
                    self.blanks.insert(id, blanks);
                    let done = match in_use {
                        true => DestinationEvent::Failed("pid".into()),
                        false => w.outcome(DestinationEvent::Rebuilt, DestinationEvent::Failed("verify".into())),
                    };
                    w.later(self, Local::Destination(id, done));
                }
                DestinationAction::Persist(record) => {
                    if w.mutation != Mutation::DestinationKeepsNoRecord {
                        self.destination_records.insert(id, record);
                    }
                }
                DestinationAction::Forget => drop(self.destination_records.remove(&id)),
                DestinationAction::Resume => self.resume(w, id)?,
                DestinationAction::Destroy => {
                    self.blanks.remove(&id);
                    w.check = true;
                }
                DestinationAction::Learn(entries) => self.tell_home(w, HomeEvent::Learn(entries))?,
                DestinationAction::Post { to, notice } => {
                    let now = w.now;
                    self.daemon().outbox.post(now, to, notice).expect("there is room");
                    self.drain_outbox(w)?;
                }
            }
        }
        if self
            .daemon()
            .destinations
            .get(&id)
            .is_some_and(DestinationMove::is_ended)
        {
            self.daemon().destinations.remove(&id);
        }
        Ok(())
    }

    /// It has come back before the source here knows that it ever left, or this node has not settled an earlier arrival.
    fn is_in_use(&self, pid: Pid, by_other_than: MoveId) -> bool {
        let mut blanks = self.blanks.iter().filter(|(id, _)| **id != by_other_than);
        let mut records = self.destination_records.iter().filter(|(id, _)| **id != by_other_than);
        self.tasks.contains_key(&pid)
            || blanks.any(|(_, blanks)| blanks.contains_key(&pid))
            || records.any(|(_, record)| record.members.iter().any(|m| m.pid == pid))
    }

    fn resume(&mut self, w: &mut Shared, id: MoveId) -> Result<(), Violation> {
        w.oracle.resumed(id)?;
        for (pid, mut task) in self.blanks.remove(&id).unwrap_or_default() {
            task.state = CopyState::Running;
            if self.tasks.insert(pid, task).is_some() {
                return Err(Violation(format!("{pid} is resumed on {}, where it is", self.slot)));
            }
        }
        w.check = true;
        Ok(())
    }

    pub fn tell_home(&mut self, w: &mut Shared, event: HomeEvent) -> Result<(), Stop> {
        let now = w.now;
        self.daemon().home.handle(now, event);
        self.drain_home(w)
    }

    fn drain_home(&mut self, w: &mut Shared) -> Result<(), Stop> {
        while let Some(action) = self.daemon().home.poll_action() {
            w.may_be_killed(self.slot)?;
            w.tell(|| format!("{} home: {action:?}", self.slot));
            match action {
                HomeAction::Send { to, msg } => w.send(self.slot, to, msg),
                HomeAction::Persist(durables) => {
                    for durable in durables {
                        w.may_be_killed(self.slot)?;
                        w.check |= w.oracle.recorded(&durable)?;
                        let forgets = w.mutation == Mutation::HomeForgetsDecisions;
                        match &durable {
                            Durable::Move(record) if forgets && record.stage != Stage::Leased => {}
                            _ => self.ledger.apply(durable),
                        }
                    }
                }
                HomeAction::Reserve(ids) => {
                    if w.mutation != Mutation::NothingReserved {
                        self.allotment.reserve(ids);
                    }
                }

                HomeAction::Release(ids) => self.allotment.release(ids),
                HomeAction::EndSurrogate(..) => {}
                HomeAction::TableFull(entry) => return Err(Violation(format!("no room for {entry:?}")).into()),
            }
        }
        Ok(())
    }

    fn drain_outbox(&mut self, w: &mut Shared) -> Result<(), Stop> {
        while let Some(action) = self.daemon().outbox.poll_action() {
            // Posting is one step for its caller.
            match action {
                OutboxAction::Persist(to, notice) => drop(self.notices.insert((to, notice))),
                OutboxAction::Forget(to, notice) => drop(self.notices.remove(&(to, notice))),
                OutboxAction::Send { to, msg } => w.send(self.slot, to, msg),
            }
        }
        Ok(())
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
