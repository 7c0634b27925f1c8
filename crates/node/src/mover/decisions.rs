//! The home's part, the notices, and what both must remember.
//!
//! Owns the execution of the home's and the outbox's actions. Records go to init, which outlives the daemon; when both
//! die the node is dead. Invariant: a record is handed over before the word that depends on it is sent.

use super::{Mover, lock};
use crate::nest::Nest;
use dunlin_cluster::relocation::home::{Durable, HomeAction, HomeEvent, Ledger};
use dunlin_cluster::relocation::outbox::OutboxAction;
use dunlin_cluster::table::Row;
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::{Incarnation, Pid, Slot};
use dunlin_proto::relocation::{Ending, EntryChange, Notice};
use std::io;

const LEDGER: &str = "ledger/";
const NOTICE: &str = "notice/";

/// What the home wrote down before this daemon was started.
pub fn recover_ledger(nest: &Nest) -> io::Result<Ledger> {
    let mut ledger = Ledger::default();
    for label in nest.list()?.iter().filter(|l| l.starts_with(LEDGER)) {
        if let Some((_, blob)) = nest.fetch(label)? {
            let durables: Vec<Durable> = postcard::from_bytes(&blob).map_err(io::Error::other)?;
            durables.into_iter().for_each(|durable| ledger.apply(durable));
        }
    }
    Ok(ledger)
}

/// The notices that were not noted before this daemon was started.
pub fn recover_notices(nest: &Nest) -> io::Result<Vec<(Slot, Notice)>> {
    let mut notices = Vec::new();
    for label in nest.list()?.iter().filter(|l| l.starts_with(NOTICE)) {
        if let Some((_, blob)) = nest.fetch(label)? {
            notices.push(postcard::from_bytes(&blob).map_err(io::Error::other)?);
        }
    }
    Ok(notices)
}

impl Mover {
    /// Lets the home take one event and carries out what follows.
    pub(super) fn decide(&self, event: HomeEvent) {
        lock(&self.home).handle(self.now(), event);
        self.run_decisions();
    }

    /// Repeats what was not answered.
    pub(super) fn tick(&self) {
        let now = self.now();
        let due = lock(&self.home).next_timeout().is_some_and(|at| at <= now);
        if due {
            self.decide(HomeEvent::Tick);
        }
        lock(&self.outbox).tick(now);
        self.run_outbox();
    }

    /// Carries out what the home wants done. What is to be kept is kept in the home's order, by one thread at a time: two
    /// would let an older record replace a newer one. Words go out after that, as they may come back to the home.
    pub(super) fn run_decisions(&self) {
        loop {
            let mut words = Vec::new();
            let turn = lock(&self.turn);
            loop {
                let Some(action) = lock(&self.home).poll_action() else {
                    break;
                };
                match action {
                    HomeAction::Send { to, msg } => words.push((to, msg)),
                    HomeAction::Persist(durables) => self.persist_ledger(&durables),
                    HomeAction::Reserve(pids) => self.log("reserving PIDs", self.nest.reserve_soon(&pids)),
                    HomeAction::Release(pids) => self.log("releasing PIDs", self.nest.release_soon(&pids)),
                    HomeAction::EndSurrogate(pid, ending) => self.end_departed(pid, status_of(ending)),
                    HomeAction::TableFull(change) => {
                        tracing::error!(pid = %change.pid, "the process table is full: ids that are in use elsewhere may be given out again");
                    }
                }
            }
            drop(turn);
            if words.is_empty() {
                return;
            }
            words.into_iter().for_each(|(to, msg)| self.send(to, msg));
        }
    }

    /// The same for the outbox.
    pub(super) fn run_outbox(&self) {
        loop {
            let mut words = Vec::new();
            let turn = lock(&self.turn);
            loop {
                let Some(action) = lock(&self.outbox).poll_action() else {
                    break;
                };
                match action {
                    OutboxAction::Send { to, msg } => words.push((to, msg)),
                    OutboxAction::Persist(to, notice) => {
                        let blob = postcard::to_stdvec(&(to, notice)).unwrap_or_default();
                        let kept = self.nest.store_soon(&notice_label(to, &notice), blob);
                        self.log("keeping a notice", kept);
                    }
                    OutboxAction::Forget(to, notice) => {
                        self.log("dropping a notice", self.nest.drop_soon(&notice_label(to, &notice)));
                    }
                }
            }
            drop(turn);
            if words.is_empty() {
                return;
            }
            words.into_iter().for_each(|(to, msg)| self.send(to, msg));
        }
    }

    /// Tells a node something until it is noted.
    pub(super) fn post(&self, to: Slot, notice: Notice) {
        if let Err(error) = lock(&self.outbox).post(self.now(), to, notice) {
            tracing::error!(%error, "a notice is lost");
        }
        self.run_outbox();
    }

    /// A process that has an entry somewhere has ended here: its homes are told.
    pub fn ended_here(&self, pid: Pid, ids: &[Pid], incarnation: Incarnation, status: ExitStatus) {
        let mut early = lock(&self.early_ends);
        let (nodes, known) = {
            let home = lock(&self.home);
            (home.table().to_be_told_of_end(pid, ids), home.table().incarnation(pid))
        };
        if known < incarnation && self.is_arriving(pid) {
            early.insert(pid, (ids.to_vec(), incarnation, status));
            return;
        }
        drop(early);
        tracing::info!(%pid, ?status, ?incarnation, told = ?nodes, "a process from elsewhere has ended here");
        let ending = Ending::Exited(status);
        for to in nodes.iter().copied().filter(|to| *to != self.here) {
            self.post(
                to,
                Notice::Ended {
                    pid,
                    incarnation,
                    ending,
                },
            );
        }
        // Last: by this the table forgets who else is to be told.
        if nodes.contains(&self.here) {
            self.decide(HomeEvent::Ended(self.here, pid, incarnation, ending));
        }
    }

    /// Is it here by a move of which the table here has not learned yet?
    fn is_arriving(&self, pid: Pid) -> bool {
        let by = lock(&self.busy).get(&pid).copied();
        by.is_some_and(|id| lock(&self.destinations).contains_key(&id))
    }

    /// The table has learned who came by a move: those that have ended since are told of.
    pub(super) fn learned(&self, changes: Vec<EntryChange>) {
        let pids: Vec<Pid> = changes.iter().map(|change| change.pid).collect();
        self.decide(HomeEvent::Learn(changes));
        for pid in pids {
            let early = lock(&self.early_ends).remove(&pid);
            if let Some((ids, incarnation, status)) = early {
                self.ended_here(pid, &ids, incarnation, status);
            }
        }
    }

    /// The entry at home of a process that has ended elsewhere ends, and whoever waits for it here is told.
    fn end_departed(&self, pid: Pid, status: ExitStatus) {
        let uid = self.processes_user(pid);
        self.exits.record(pid, status, uid);
        if self.hidden.kind(pid).is_none() {
            // A copy that is parked here, and does not know yet that it was committed, becomes a surrogate first.
            if lock(&self.busy).contains_key(&pid) {
                lock(&self.ends).insert(pid, status);
            }
            return;
        }
        let mover = self.arc();
        // ptrace is bound to the thread that begins it.
        let ended = std::thread::Builder::new().name("end-surrogate".into()).spawn(move || {
            mover.log("ending a surrogate", mover.entries.end(pid, status));
        });
        if let Err(error) = ended {
            tracing::error!(%pid, %error, "a surrogate was not ended");
        }
    }

    /// The surrogate of a process stands: if the process has ended already, so does it.
    pub(super) fn end_if_ended(&self, pid: Pid) {
        let status = lock(&self.ends).remove(&pid);
        if let Some(status) = status {
            self.end_departed(pid, status);
        }
    }

    fn processes_user(&self, pid: Pid) -> u32 {
        use dunlin_sys::procfs::ProcDir;
        let host = self.nest.host_pid(pid).ok().flatten();
        host.and_then(|host| ProcDir::process(host).status().ok())
            .map_or(0, |status| status.uids[0])
    }

    fn persist_ledger(&self, durables: &[Durable]) {
        // One label for each row or move, so that a new record replaces the old one; all of a batch go one by one: what
        // is half-written is completed by the repetition of the question.
        for durable in durables {
            let label = format!("{LEDGER}{}", label_of(durable));
            if let Durable::MoveForgotten(_) | Durable::Row(Row::Absent(_)) = durable {
                self.log("dropping a decision", self.nest.drop_soon(&label));
                continue;
            }
            let blob = postcard::to_stdvec(&vec![durable]).unwrap_or_default();
            self.log("keeping a decision", self.nest.store_soon(&label, blob));
        }
    }

    pub(super) fn log(&self, what: &str, done: io::Result<()>) {
        if let Err(error) = done {
            tracing::error!(%error, "{what} failed");
        }
    }
}

fn status_of(ending: Ending) -> ExitStatus {
    match ending {
        Ending::Exited(status) => status,
        // It died with the daemon that held its only copy.
        Ending::Lost => ExitStatus::Signal { signal: 9, core: false },
    }
}

fn notice_label(to: Slot, notice: &Notice) -> String {
    match notice {
        Notice::Drained { move_id, pid } => format!("{NOTICE}{}/drained/{move_id}/{pid}", to.0),
        Notice::Ended { pid, incarnation, .. } => format!("{NOTICE}{}/ended/{pid}/{}", to.0, incarnation.0),
    }
}

fn label_of(durable: &Durable) -> String {
    match durable {
        Durable::Row(Row::Entry(pid, _) | Row::Grave(pid, _) | Row::Absent(pid)) => format!("row/{pid}"),
        Durable::Move(record) => format!("move/{}", record.move_id),
        Durable::MoveForgotten(id) => format!("move/{id}"),
    }
}
