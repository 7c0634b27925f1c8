//! What programs do on a node, and what its daemon makes of it: forks, ends, pages that are fetched, moves that begin.

use crate::node::{Node, Stop, Task};
use crate::oracle::CopyState;
use crate::world::Shared;
use dunlin_cluster::allotment::NoPid;
use dunlin_cluster::relocation::home::HomeEvent;
use dunlin_cluster::relocation::source::{Plan, SourceEvent, SourceMove};
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::{MoveId, Pid, Slot};
use dunlin_proto::relocation::{Claim, Ending, Notice};
use std::collections::BTreeSet;

impl Node {
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
    pub fn tell_ends(&mut self, w: &mut Shared) -> Result<(), Stop> {
        while let Some(at) = self.unreported.iter().position(|(pid, _)| !self.is_told_later(*pid)) {
            let (pid, task) = self.unreported[at].clone();
            self.tell_end(w, pid, &task)?;
            self.unreported.remove(at);
        }
        Ok(())
    }

    /// It arrived, and the table here has not learned that yet: nobody knows who is to be told.
    fn is_told_later(&self, pid: Pid) -> bool {
        let Some(daemon) = &self.daemon else { return true };
        let table = daemon.home.table();
        let learned = |arrived| match table.entry(pid) {
            Some(entry) => entry.incarnation >= arrived,
            // Without an entry this is the incarnation of the PID's next life.
            None => table.incarnation(pid) > arrived,
        };
        let mut members = self.destination_records.values().flat_map(|record| &record.members);
        members.any(|m| m.pid == pid && !learned(m.incarnation.after_commit()))
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
}
