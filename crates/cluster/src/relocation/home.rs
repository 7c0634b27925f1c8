//! The home's part of all moves: the leases and the decisions.
//!
//! Owns the node's [`Table`] and one record for each move whose root process is of this slot. Refuses to know whether a
//! node is dead: whoever declares that speaks for it, with `Abort` for a source or `Gone` for a destination. Invariants:
//! a move is decided once; the decision and the entries it changes are made durable together, before anyone hears of
//! it; an abort is remembered until the source knows, a commit until source, destination and the homes of all ids that
//! moved along know; a move without a record is answered as aborted.

pub use super::ledger::{Durable, Ledger, MoveRecord, Stage};
use super::{Now, Retry};
use crate::table::{Place, Reservations, Table};
use dunlin_proto::ids::{Incarnation, Modulus, MoveId, Pid, Slot};
use dunlin_proto::relocation::{
    Claim, DestinationToHome, Ending, EntryChange, HomeToDestination, HomeToHome, HomeToSource, LeaseRefusal, MAX_IDS,
    MAX_MEMBERS, Member, MoveMsg, Notice, Outcome, SourceToHome,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// At most so many moves are open at one home, decided ones that someone does not yet know included.
pub const MAX_MOVES: usize = 4096;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HomeEvent {
    /// [`Home::next_timeout`] may have passed.
    Tick,
    /// A word of a source.
    FromSource(Slot, MoveId, SourceToHome),
    /// A word of a destination.
    FromDestination(Slot, MoveId, DestinationToHome),
    /// A word of another home.
    FromHome(Slot, MoveId, HomeToHome),
    /// A node tells that a process has ended.
    Ended(Slot, Pid, Incarnation, Ending),
    /// A source or destination of this node knows where processes are since a commit.
    Learn(Vec<EntryChange>),
    /// A source of this node knows of an abort.
    Raise(Vec<Claim>),
    /// A process of this slot was born here.
    Born(Pid),
}

/// For the daemon to carry out, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HomeAction {
    /// Send this.
    Send {
        /// To this node.
        to: Slot,
        /// This.
        msg: MoveMsg,
    },
    /// Make these durable, in this order: if the daemon dies meanwhile, a beginning may survive.
    Persist(Vec<Durable>),

    /// To [`crate::allotment::Allotment::reserve`].
    Reserve(Vec<Pid>),
    /// To [`crate::allotment::Allotment::release`].
    Release(Vec<Pid>),
    /// A process of this slot has ended: if there is a surrogate of it here, it ends likewise. May come twice, and before
    /// the source here has made the surrogate: then it is for after that.
    EndSurrogate(Pid, Ending),
    /// The table is full: these ids may be given out again while they are held elsewhere.
    TableFull(EntryChange),
}

#[derive(Debug)]
struct Open {
    record: MoveRecord,
    retry: Retry,
}

/// All moves that this node decides, and its process table.
#[derive(Debug)]
pub struct Home {
    here: Slot,
    modulus: Modulus,
    table: Table,
    moves: BTreeMap<MoveId, Open>,
    actions: VecDeque<HomeAction>,
}

impl Home {
    /// The home of the node `here`, going on from its ledger (an empty one, the first time).
    pub fn restore(now: Now, modulus: Modulus, here: Slot, ledger: Ledger) -> Home {
        let (table, reserved) = Table::restore(modulus, here, ledger.rows.into_values());
        let open = |record| Open {
            record,
            retry: Retry::asked(now),
        };
        let mut this = Home {
            here,
            modulus,
            table,
            moves: ledger
                .moves
                .into_iter()
                .map(|(id, record)| (id, open(record)))
                .collect(),
            actions: VecDeque::new(),
        };
        if !reserved.is_empty() {
            this.do_(HomeAction::Reserve(reserved));
        }
        let known: Vec<MoveId> = this.moves.keys().copied().collect();
        for move_id in known {
            this.redo(move_id);
            this.remind(move_id);
        }
        this
    }

    /// Of what was made durable together, only the beginning may have survived: the record comes first, the rows follow
    /// from it.
    fn redo(&mut self, move_id: MoveId) {
        let Some(open) = self.moves.get(&move_id) else { return };
        let MoveRecord {
            destination,
            claims,
            stage,
            ..
        } = open.record.clone();
        let mut reservations = Reservations::default();
        match stage {
            Stage::Leased => {
                for claim in claims {
                    if self.is_ours(claim.pid) && self.is_there(move_id, claim).is_ok() {
                        self.table.lease(claim.pid, move_id, destination);
                    }
                }
            }
            Stage::Aborted { .. } => {
                for claim in claims {
                    self.table.unlease(claim.pid, move_id);
                }
            }
            Stage::Committed { entries, .. } => reservations = self.change_entries(move_id, &entries, &claims),
        }
        self.persist(Vec::new(), reservations);
    }

    fn is_ours(&self, pid: Pid) -> bool {
        self.modulus.home(pid) == Some(self.here)
    }

    /// Brings the table up to a commit.
    fn change_entries(&mut self, move_id: MoveId, entries: &[EntryChange], claims: &[Claim]) -> Reservations {
        let mut reservations = Reservations::default();
        for entry in entries {
            // There was room when it was decided.
            if let Ok(more) = self.table.commit(entry) {
                reservations.add(more);
            }
        }
        // Those that ended before the freeze.
        for claim in claims {
            self.table.unlease(claim.pid, move_id);
        }
        reservations
    }

    /// Where processes are.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The open moves.
    pub fn moves(&self) -> impl Iterator<Item = &MoveRecord> {
        self.moves.values().map(|open| &open.record)
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<HomeAction> {
        self.actions.pop_front()
    }

    /// When to send [`HomeEvent::Tick`].
    pub fn next_timeout(&self) -> Option<Now> {
        self.moves.values().map(|open| open.retry.at).min()
    }

    /// Takes one event.
    pub fn handle(&mut self, now: Now, event: HomeEvent) {
        match event {
            HomeEvent::Tick => self.tick(now),
            HomeEvent::FromSource(from, move_id, word) => {
                if from == move_id.source {
                    self.hear_source(now, move_id, word);
                }
            }
            HomeEvent::FromDestination(from, move_id, word) => self.hear_destination(now, from, move_id, word),
            HomeEvent::FromHome(from, move_id, word) => self.hear_home(from, move_id, word),
            HomeEvent::Ended(from, pid, incarnation, ending) => self.ended(from, pid, incarnation, ending),
            HomeEvent::Learn(entries) => {
                self.learn(&entries);
            }
            HomeEvent::Raise(claims) => {
                for claim in claims {
                    self.table.raise(claim.pid, claim.incarnation);
                }
                self.persist(Vec::new(), Reservations::default());
            }
            HomeEvent::Born(pid) => {
                let reservations = self.table.born(pid);
                self.persist(Vec::new(), reservations);
            }
        }
    }

    fn tick(&mut self, now: Now) {
        let due = self
            .moves
            .values_mut()
            .filter_map(|open| open.retry.is_due(now).then_some(open.record.move_id));
        let due: Vec<MoveId> = due.collect();
        for move_id in due {
            self.remind(move_id);
        }
    }

    /// Tells everyone what they do not yet know. The destination of a commit is told again, too: it may not have to ask.
    fn remind(&mut self, move_id: MoveId) {
        let Some(open) = self.moves.get(&move_id) else { return };
        let MoveRecord { destination, stage, .. } = open.record.clone();
        match stage {
            Stage::Leased => self.tell_source(move_id, HomeToSource::StillMoving),
            Stage::Aborted { raised } => {
                self.tell_source(move_id, HomeToSource::Outcome(Outcome::Aborted { raised }));
            }
            Stage::Committed {
                entries,
                source_knows,
                destination_done,
                untold,
            } => {
                if !destination_done {
                    self.tell_destination(destination, move_id, HomeToDestination::Granted);
                }
                if !source_knows {
                    self.tell_source(move_id, HomeToSource::Outcome(Outcome::Committed));
                }
                for home in untold {
                    let entries = entries.iter().filter(|e| e.homes.contains(&home)).cloned().collect();
                    let msg = MoveMsg::HomeToHome(move_id, HomeToHome::EntriesChanged { entries });
                    self.do_(HomeAction::Send { to: home, msg });
                }
            }
        }
    }

    fn hear_source(&mut self, now: Now, move_id: MoveId, word: SourceToHome) {
        match word {
            SourceToHome::Lease { destination, claims } => {
                if self.moves.contains_key(&move_id) {
                    return self.repeat(move_id);
                }
                match self.may_lease(move_id, destination, &claims) {
                    Ok(()) => self.lease(now, move_id, destination, claims),
                    Err(why) => self.tell_source(move_id, HomeToSource::LeaseRefused(why)),
                }
            }
            SourceToHome::Abort => match self.moves.get(&move_id).map(|open| &open.record.stage) {
                None => {
                    let raised = Vec::new();
                    self.tell_source(move_id, HomeToSource::Outcome(Outcome::Aborted { raised }));
                }
                Some(Stage::Leased) => self.abort(now, move_id),
                Some(Stage::Aborted { .. } | Stage::Committed { .. }) => self.repeat(move_id),
            },
            SourceToHome::OutcomeNoted => {
                self.update(move_id, |stage| match stage {
                    Stage::Leased => false,
                    Stage::Aborted { .. } => true,
                    Stage::Committed { source_knows, .. } => !std::mem::replace(source_knows, true),
                });
            }
        }
    }

    /// The answer to a question asked again.
    fn repeat(&mut self, move_id: MoveId) {
        let Some(open) = self.moves.get(&move_id) else { return };
        let word = match &open.record.stage {
            Stage::Leased => HomeToSource::Leased,
            Stage::Aborted { raised } => HomeToSource::Outcome(Outcome::Aborted { raised: raised.clone() }),
            Stage::Committed { .. } => HomeToSource::Outcome(Outcome::Committed),
        };
        self.tell_source(move_id, word);
    }

    fn may_lease(&self, move_id: MoveId, destination: Slot, claims: &[Claim]) -> Result<(), LeaseRefusal> {
        let pids: BTreeSet<Pid> = claims.iter().map(|c| c.pid).collect();
        let Some(root) = claims.first() else {
            return Err(LeaseRefusal::Invalid);
        };
        if claims.len() > MAX_MEMBERS || pids.len() < claims.len() || destination == move_id.source {
            return Err(LeaseRefusal::Invalid);
        }
        if !self.is_ours(root.pid) {
            return Err(LeaseRefusal::NotHome);
        }
        if self.moves.len() >= MAX_MOVES {
            return Err(LeaseRefusal::TooManyMoves);
        }
        claims.iter().try_for_each(|claim| self.is_there(move_id, *claim))
    }

    /// Is a claimed process, if it is of this slot, on the source, in this incarnation, and in no other move's lease?
    fn is_there(&self, move_id: MoveId, claim: Claim) -> Result<(), LeaseRefusal> {
        let pid = claim.pid;
        if !self.is_ours(pid) {
            return Ok(());
        }
        match self.table.entry(pid).map(|e| e.place) {
            None if move_id.source != self.here => return Err(LeaseRefusal::Unknown { pid }),
            Some(Place::At(at)) if at != move_id.source => return Err(LeaseRefusal::NotThere { pid, at }),
            Some(Place::Moving { move_id: other, .. }) if other != move_id => {
                let move_id = other;
                return Err(LeaseRefusal::Busy { pid, move_id });
            }
            None | Some(Place::At(_) | Place::Moving { .. }) => {}
        }
        let actual = self.table.incarnation(pid);
        if actual != claim.incarnation {
            return Err(LeaseRefusal::Incarnation { pid, actual });
        }
        Ok(())
    }

    fn lease(&mut self, now: Now, move_id: MoveId, destination: Slot, claims: Vec<Claim>) {
        for claim in &claims {
            if self.is_ours(claim.pid) {
                self.table.lease(claim.pid, move_id, destination);
            }
        }
        let record = MoveRecord {
            move_id,
            destination,
            claims,
            stage: Stage::Leased,
        };
        self.decide(now, record, Reservations::default());
        self.tell_source(move_id, HomeToSource::Leased);
    }

    fn hear_destination(&mut self, now: Now, from: Slot, move_id: MoveId, word: DestinationToHome) {
        let known = self
            .moves
            .get(&move_id)
            .map(|open| &open.record)
            .filter(|r| r.destination == from);
        match word {
            DestinationToHome::Commit { members } => match known.map(|record| &record.stage) {
                Some(Stage::Leased) => {
                    if self.may_commit(move_id, &members) {
                        self.commit(now, move_id, &members);
                    } else {
                        self.abort(now, move_id);
                    }
                }
                Some(Stage::Committed {
                    destination_done: false,
                    ..
                }) => self.tell_destination(from, move_id, HomeToDestination::Granted),
                // It runs already, or has run: this is an echo, and there must be no second copy.
                Some(Stage::Committed { .. } | Stage::Aborted { .. }) | None => {
                    self.tell_destination(from, move_id, HomeToDestination::Denied);
                }
            },
            DestinationToHome::Resumed => {
                if known.is_some() {
                    self.update(move_id, destination_is_done);
                }
                self.tell_destination(from, move_id, HomeToDestination::ResumedNoted);
            }
            // The record stays until the destination has taken over telling everyone.
            DestinationToHome::Gone => {
                let committed = match known.map(|record| &record.stage) {
                    Some(Stage::Leased) => {
                        self.abort(now, move_id);
                        false
                    }
                    Some(Stage::Committed { .. }) => true,
                    Some(Stage::Aborted { .. }) | None => false,
                };
                self.tell_destination(from, move_id, HomeToDestination::GoneNoted { committed });
            }
        }
    }

    fn may_commit(&self, move_id: MoveId, members: &[Member]) -> bool {
        let Some(open) = self.moves.get(&move_id) else {
            return false;
        };
        let pids: BTreeSet<Pid> = members.iter().map(|m| m.pid).collect();
        let is_root_first = members.first().map(|m| m.pid) == open.record.claims.first().map(|c| c.pid);
        let is_there = |m: &Member| {
            let (pid, incarnation) = (m.pid, m.incarnation);
            m.ids.len() <= MAX_IDS && self.is_there(move_id, Claim { pid, incarnation }).is_ok()
        };
        is_root_first
            && members.len() <= MAX_MEMBERS
            && pids.len() == members.len()
            && self.table.has_room(members.len())
            && members.iter().all(is_there)
    }

    fn commit(&mut self, now: Now, move_id: MoveId, members: &[Member]) {
        let Some(open) = self.moves.remove(&move_id) else {
            return;
        };
        let mut record = open.record;
        let entries = super::entries_after_commit(members, record.destination);
        let reservations = self.change_entries(move_id, &entries, &record.claims);
        let mut untold: BTreeSet<Slot> = members.iter().flat_map(|m| m.homes.iter().copied()).collect();
        // These learn it by the outcome and by the grant.
        for knowing in [self.here, move_id.source, record.destination] {
            untold.remove(&knowing);
        }
        record.stage = Stage::Committed {
            entries,
            source_knows: false,
            destination_done: false,
            untold,
        };
        self.decide(now, record, reservations);
        self.remind(move_id);
    }

    fn abort(&mut self, now: Now, move_id: MoveId) {
        let Some(open) = self.moves.remove(&move_id) else {
            return;
        };
        let mut record = open.record;
        let raised = |claim: &Claim| {
            let incarnation = self.table.unlease(claim.pid, move_id)?;
            Some(Claim { incarnation, ..*claim })
        };
        let raised: Vec<Claim> = record.claims.iter().filter_map(raised).collect();
        let destination = record.destination;
        record.stage = Stage::Aborted { raised };
        self.decide(now, record, Reservations::default());
        self.tell_destination(destination, move_id, HomeToDestination::Denied);
        self.remind(move_id);
    }

    /// Sets a record and makes it durable, with the rows that changed.
    fn decide(&mut self, now: Now, record: MoveRecord, reservations: Reservations) {
        self.persist(vec![Durable::Move(record.clone())], reservations);
        let retry = Retry::asked(now);
        self.moves.insert(record.move_id, Open { record, retry });
    }

    /// Changes a stage (`change` says whether it did) and forgets the move if everyone knows.
    fn update(&mut self, move_id: MoveId, change: impl FnOnce(&mut Stage) -> bool) {
        let Some(open) = self.moves.get_mut(&move_id) else {
            return;
        };
        if !change(&mut open.record.stage) {
            return;
        }
        let is_over = match &open.record.stage {
            Stage::Leased => false,
            Stage::Aborted { .. } => true,
            Stage::Committed {
                source_knows,
                destination_done,
                untold,
                ..
            } => *source_knows && *destination_done && untold.is_empty(),
        };
        if is_over {
            self.moves.remove(&move_id);
            self.persist(vec![Durable::MoveForgotten(move_id)], Reservations::default());
        } else {
            let record = open.record.clone();
            self.persist(vec![Durable::Move(record)], Reservations::default());
        }
    }

    fn hear_home(&mut self, from: Slot, move_id: MoveId, word: HomeToHome) {
        match word {
            HomeToHome::EntriesChanged { entries } => {
                // Otherwise it is told again, until there is room.
                if self.learn(&entries) {
                    let msg = MoveMsg::HomeToHome(move_id, HomeToHome::EntriesNoted);
                    self.do_(HomeAction::Send { to: from, msg });
                }
            }
            HomeToHome::EntriesNoted => self.update(move_id, |stage| match stage {
                Stage::Committed { untold, .. } => untold.remove(&from),
                Stage::Leased | Stage::Aborted { .. } => false,
            }),
        }
    }

    fn ended(&mut self, from: Slot, pid: Pid, incarnation: Incarnation, ending: Ending) {
        if self.is_ours(pid) && self.table.is_alive_in(pid, incarnation) {
            self.do_(HomeAction::EndSurrogate(pid, ending));
        }
        let reservations = self.table.ended(pid, incarnation);
        self.persist(Vec::new(), reservations);
        let notice = Notice::Ended {
            pid,
            incarnation,
            ending,
        };
        let msg = MoveMsg::Noted(notice);
        self.do_(HomeAction::Send { to: from, msg });
    }

    /// Takes news of commits; true if there was room for all of it.
    fn learn(&mut self, entries: &[EntryChange]) -> bool {
        let mut reservations = Reservations::default();
        let mut is_whole = true;
        for entry in entries {
            match self.table.learn(entry) {
                Ok(more) => reservations.add(more),
                Err(_) => {
                    is_whole = false;
                    self.do_(HomeAction::TableFull(entry.clone()));
                }
            }
        }
        self.persist(Vec::new(), reservations);
        is_whole
    }

    /// Makes durable what has changed. A daemon that dies in the middle has, after its restart, too much reserved rather than
    /// too little, and hears again what makes it release that: so releases come before, reservations after.
    fn persist(&mut self, mut durables: Vec<Durable>, reservations: Reservations) {
        let Reservations { reserve, release } = reservations;
        if !release.is_empty() {
            self.do_(HomeAction::Release(release));
        }
        durables.extend(self.table.take_changed().into_iter().map(Durable::Row));
        if !durables.is_empty() {
            self.do_(HomeAction::Persist(durables));
        }
        if !reserve.is_empty() {
            self.do_(HomeAction::Reserve(reserve));
        }
    }

    fn tell_source(&mut self, move_id: MoveId, word: HomeToSource) {
        let msg = MoveMsg::HomeToSource(move_id, word);
        let to = move_id.source;
        self.do_(HomeAction::Send { to, msg });
    }

    fn tell_destination(&mut self, to: Slot, move_id: MoveId, word: HomeToDestination) {
        let msg = MoveMsg::HomeToDestination(move_id, word);
        self.do_(HomeAction::Send { to, msg });
    }

    fn do_(&mut self, action: HomeAction) {
        self.actions.push_back(action);
    }
}

fn destination_is_done(stage: &mut Stage) -> bool {
    match stage {
        Stage::Committed { destination_done, .. } => !std::mem::replace(destination_done, true),
        Stage::Leased | Stage::Aborted { .. } => false,
    }
}

#[cfg(test)]
#[path = "home_tests.rs"]
mod tests;
