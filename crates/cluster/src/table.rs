//! The process table of one node: where processes are.
//!
//! Owns one entry for each process that concerns this node and is not simply at home. For a PID of this slot the
//! entry is the truth about its location. A process without one is at home: it has never moved, or has ended. (So a fork
//! costs the table nothing.) For a PID of another slot the entry is what was last heard, kept while the process is here, or
//! holds an id of this slot elsewhere: a thread made here, a process group or session founded here.
//! Refuses to know whether a process exists, and what a home decides ([`crate::relocation::home`] does).
//!
//! Invariants: the incarnation of an entry never falls, and news in an old incarnation changes nothing; an id of this slot
//! that is held elsewhere is reserved ([`Reservations`] says what changes for [`crate::allotment::Allotment`]); a PID that is
//! given out again starts above every incarnation of its earlier life.

use dunlin_proto::ids::{Incarnation, Modulus, MoveId, Pid, Slot};
use dunlin_proto::relocation::{EntryChange, Member};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// At most so many entries for processes of other slots. Each is here, or holds an id of ours.
pub const MAX_FOREIGN_ENTRIES: usize = 1 << 16;

/// So many ended processes of other slots are remembered, so that late news does not bring them back. Those of
/// this slot are all remembered: they are as many as there are PIDs.
pub const MAX_FOREIGN_GRAVES: usize = 1024;

/// Where a process is, and what it holds of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// How often it changed place, or nearly.
    pub incarnation: Incarnation,

    /// Where it is.
    pub place: Place,
    /// The ids of this slot it holds, its PID included.
    pub held: BTreeSet<Pid>,
    /// They are reserved, since nothing here holds them: it is elsewhere, or was given to this node and has not been resumed.
    pub reserved: bool,
    /// Whoever keeps an entry for it: the homes of all ids it holds or ever took along.
    pub homes: BTreeSet<Slot>,
    /// How many committed moves this entry has seen.
    pub moves: u32,
}

/// Where a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// Running (or about to) on this node; *Away* if it is another than its home.
    At(Slot),
    /// Leased to a move: on `from` until the decision.
    Moving {
        /// The move.
        move_id: MoveId,
        /// Where it is.
        from: Slot,
        /// Where it would be.
        to: Slot,
    },
}

impl Place {
    /// The node whose copy may run, as far as is decided.
    pub fn node(self) -> Slot {
        match self {
            Place::At(node) => node,
            Place::Moving { from, .. } => from,
        }
    }
}

/// The answer to "where is it?".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whereabouts {
    /// The truth, for a PID of this slot.
    Known(Place),
    /// A PID of another slot: ask its home. `heard` is what this node last heard.
    AskHome {
        /// The home.
        home: Slot,
        /// Not necessarily so any more.
        heard: Option<Place>,
    },
    /// Each node has its own process of this number.
    EachNodesOwn,
}

/// What changes for the allotment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "ids that are not reserved are given out a second time"]
pub struct Reservations {
    /// To be reserved, before the ids fall free in the nest.
    pub reserve: Vec<Pid>,
    /// To be released.
    pub release: Vec<Pid>,
}

impl Reservations {
    /// First these, then `more`.
    pub(crate) fn add(&mut self, more: Reservations) {
        for id in more.reserve {
            match self.release.iter().position(|r| *r == id) {
                Some(at) => drop(self.release.swap_remove(at)),
                None => self.reserve.push(id),
            }
        }
        for id in more.release {
            match self.reserve.iter().position(|r| *r == id) {
                Some(at) => drop(self.reserve.swap_remove(at)),
                None => self.release.push(id),
            }
        }
    }
}

/// Why news was not taken; the table is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// [`MAX_FOREIGN_ENTRIES`].
    #[error("the process table is full; hint: end processes on this node, or processes that moved away from it")]
    Full,
}

/// A row of the table as it is made durable: the entry, or the incarnation it ended in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Row {
    /// It is concerned.
    Entry(Pid, Entry),
    /// It is not, any more.
    Grave(Pid, Incarnation),
    /// Nor is its end remembered.
    Absent(Pid),
}

/// The process table.
#[derive(Debug, Clone)]
pub struct Table {
    here: Slot,
    modulus: Modulus,
    entries: BTreeMap<Pid, Entry>,
    foreign: usize,
    /// By how many entries each id of ours is reserved; a process group may be by many.
    holders: BTreeMap<Pid, u32>,
    graves: BTreeMap<Pid, Incarnation>,
    /// The graves of other slots' processes, oldest first.
    foreign_graves: VecDeque<Pid>,
    /// Rows changed since [`Table::take_changed`].
    changed: BTreeSet<Pid>,
}

impl Table {
    /// The empty table of the node `here`.
    pub fn new(modulus: Modulus, here: Slot) -> Table {
        Table {
            here,
            modulus,
            entries: BTreeMap::new(),
            foreign: 0,
            holders: BTreeMap::new(),
            graves: BTreeMap::new(),
            foreign_graves: VecDeque::new(),
            changed: BTreeSet::new(),
        }
    }

    /// The table as it was made durable, and all that is reserved.
    pub fn restore(modulus: Modulus, here: Slot, rows: impl IntoIterator<Item = Row>) -> (Table, Vec<Pid>) {
        let mut table = Table::new(modulus, here);
        for row in rows {
            match row {
                Row::Entry(pid, entry) => drop(table.put(pid, entry)),
                Row::Grave(pid, incarnation) => drop(table.bury(pid, incarnation)),
                Row::Absent(_) => {}
            }
        }
        table.changed.clear();
        let all = table.holders.keys().copied().collect();
        (table, all)
    }

    /// The rows changed since the last call, to be made durable together.
    pub fn take_changed(&mut self) -> Vec<Row> {
        let changed = std::mem::take(&mut self.changed);
        let row = |pid| match (self.entries.get(&pid), self.graves.get(&pid)) {
            (Some(entry), _) => Row::Entry(pid, entry.clone()),
            (None, Some(incarnation)) => Row::Grave(pid, *incarnation),
            (None, None) => Row::Absent(pid),
        };
        changed.into_iter().map(row).collect()
    }

    /// Where is it?
    pub fn whereabouts(&self, pid: Pid) -> Whereabouts {
        let entry = self.entries.get(&pid).map(|e| e.place);
        match self.modulus.home(pid) {
            None => Whereabouts::EachNodesOwn,
            Some(home) if home == self.here => Whereabouts::Known(entry.unwrap_or(Place::At(home))),
            Some(home) => Whereabouts::AskHome { home, heard: entry },
        }
    }

    /// The entry, if there is one.
    pub fn entry(&self, pid: Pid) -> Option<&Entry> {
        self.entries.get(&pid)
    }

    /// All entries, by PID.
    pub fn entries(&self) -> impl Iterator<Item = (Pid, &Entry)> {
        self.entries.iter().map(|(pid, entry)| (*pid, entry))
    }

    /// The incarnation of a process that runs here: its entry's, or, without one, that in which it was born.
    pub fn incarnation(&self, pid: Pid) -> Incarnation {
        match self.entries.get(&pid) {
            Some(entry) => entry.incarnation,
            None => self
                .graves
                .get(&pid)
                .map_or(Incarnation::default(), |i| i.after_commit()),
        }
    }

    /// A process that runs here, as it is told to the others in a move: `ids` are those it holds now besides its PID.
    pub fn member(&self, pid: Pid, ids: Vec<Pid>, images: Vec<MoveId>) -> Member {
        let homes = self.homes(pid, &ids);
        Member {
            pid,
            incarnation: self.incarnation(pid),
            ids,
            images,
            homes,
        }
    }

    /// Who must be told when a process that runs here ends, in its [incarnation](Table::incarnation): all homes, and this
    /// table itself, which must be told last: then it knows nothing of the process, and a daemon that was restarted in the
    /// middle tells either all again or nobody. Without an entry it never left its home, or all have been told.
    pub fn to_be_told_of_end(&self, pid: Pid, ids: &[Pid]) -> BTreeSet<Slot> {
        if !self.entries.contains_key(&pid) {
            return BTreeSet::new();
        }
        let mut nodes = self.homes(pid, ids);
        nodes.insert(self.here);
        nodes
    }

    fn homes(&self, pid: Pid, ids: &[Pid]) -> BTreeSet<Slot> {
        let mut homes = self.entries.get(&pid).map(|e| e.homes.clone()).unwrap_or_default();
        homes.extend(ids.iter().chain([&pid]).filter_map(|id| self.modulus.home(*id)));
        homes
    }

    /// A process was born here. Of use where its PID has an entry left by an earlier life whose end nobody saw:
    /// what that one held elsewhere is released.
    pub fn born(&mut self, pid: Pid) -> Reservations {
        match self.entries.get(&pid) {
            Some(entry) => {
                let incarnation = entry.incarnation;
                self.ended(pid, incarnation)
            }
            None => Reservations::default(),
        }
    }

    /// It is leased to a move. The home's decision; the entry is made if there is none.
    pub fn lease(&mut self, pid: Pid, move_id: MoveId, to: Slot) {
        let from = move_id.source;
        let mut entry = self.entries.get(&pid).cloned().unwrap_or_else(|| Entry {
            incarnation: self.incarnation(pid),

            place: Place::At(from),
            held: [pid].into(),
            reserved: false,
            homes: [self.here].into(),
            moves: 0,
        });
        entry.place = Place::Moving { move_id, from, to };
        let changes = self.put(pid, entry);
        debug_assert_eq!(changes, Reservations::default(), "a lease moves nothing");
    }

    /// The lease has ended, with nothing moved; the new incarnation, unless another move or its end was faster.
    pub fn unlease(&mut self, pid: Pid, move_id: MoveId) -> Option<Incarnation> {
        let entry = self.entries.get_mut(&pid)?;
        match entry.place {
            Place::Moving { move_id: m, from, .. } if m == move_id => {
                entry.place = Place::At(from);
                entry.incarnation = entry.incarnation.after_abort();
                self.changed.insert(pid);
                Some(entry.incarnation)
            }
            Place::Moving { .. } | Place::At(_) => None,
        }
    }

    /// A process that runs here is in this incarnation, says its home, which has recorded an abort.
    pub fn raise(&mut self, pid: Pid, incarnation: Incarnation) {
        if let Some(entry) = self.entries.get_mut(&pid)
            && entry.incarnation < incarnation
        {
            entry.incarnation = incarnation;
            self.changed.insert(pid);
        }
    }

    /// Is there room for so many more processes of other slots?
    pub fn has_room(&self, strangers: usize) -> bool {
        self.foreign.saturating_add(strangers) <= MAX_FOREIGN_ENTRIES
    }

    /// Where a process is since a commit; if here, it has been resumed. Old news, and news of processes that do not concern
    /// this node, changes nothing.
    pub fn learn(&mut self, news: &EntryChange) -> Result<Reservations, TableError> {
        match self.entries.get(&news.pid) {
            // The home was this node and knew when it decided; now its ids are held here again.
            Some(entry) if entry.reserved && entry.incarnation == news.incarnation && news.node == self.here => {
                let mut entry = entry.clone();
                entry.reserved = false;
                Ok(self.put(news.pid, entry))
            }
            Some(_) | None => self.change(news, news.node != self.here),
        }
    }

    /// As [`Table::learn`], for the decision itself: even if it goes here, nothing here holds its ids before the resume.
    pub fn commit(&mut self, news: &EntryChange) -> Result<Reservations, TableError> {
        self.change(news, true)
    }

    fn change(&mut self, news: &EntryChange, reserved: bool) -> Result<Reservations, TableError> {
        let old = self.entries.get(&news.pid);
        let stale = match old {
            Some(entry) => entry.incarnation >= news.incarnation,
            None => self
                .graves
                .get(&news.pid)
                .is_some_and(|grave| *grave >= news.incarnation),
        };
        if stale {
            return Ok(Reservations::default());
        }
        let is_ours = |id: &Pid| self.modulus.home(*id) == Some(self.here);
        let ids = news.ids.iter().chain([&news.pid]);
        let held: BTreeSet<Pid> = ids.copied().filter(is_ours).collect();
        let concerned = news.node == self.here || !held.is_empty();
        if !concerned {
            return Ok(self.bury(news.pid, news.incarnation));
        }
        if old.is_none() && !is_ours(&news.pid) && self.foreign >= MAX_FOREIGN_ENTRIES {
            return Err(TableError::Full);
        }

        let entry = Entry {
            incarnation: news.incarnation,
            place: Place::At(news.node),
            held,
            reserved,
            homes: news.homes.clone(),
            moves: old.map_or(0, |e| e.moves) + 1,
        };
        Ok(self.put(news.pid, entry))
    }

    /// Would [`Table::ended`] remove an entry? Whoever sees a process end knows of its last commit, though perhaps not of an
    /// abort since; and an earlier life of its PID had fewer commits.
    pub fn is_alive_in(&self, pid: Pid, incarnation: Incarnation) -> bool {
        let entry = self.entries.get(&pid);
        entry.is_some_and(|entry| entry.incarnation.commits() <= incarnation.commits())
    }

    /// It has ended in this incarnation. What it held of ours is released.
    pub fn ended(&mut self, pid: Pid, incarnation: Incarnation) -> Reservations {
        match self.entries.get(&pid) {
            Some(entry) if self.is_alive_in(pid, incarnation) => self.bury(pid, incarnation.max(entry.incarnation)),
            Some(_) => Reservations::default(),
            // The news of its last move may still be under way. One that never moved leaves no grave: forks are many.
            None if incarnation == Incarnation::default() => Reservations::default(),
            None if self.graves.get(&pid).is_some_and(|grave| *grave >= incarnation) => Reservations::default(),
            None => self.bury(pid, incarnation),
        }
    }

    /// Sets an entry.
    fn put(&mut self, pid: Pid, entry: Entry) -> Reservations {
        let before = self.reserved_by(pid);
        let is_new = self.entries.insert(pid, entry).is_none();
        if is_new && self.is_foreign(pid) {
            self.foreign += 1;
        }
        self.changed.insert(pid);
        self.account(before, pid)
    }

    /// Removes the entry, if there is one, and remembers the incarnation.
    fn bury(&mut self, pid: Pid, incarnation: Incarnation) -> Reservations {
        let before = self.reserved_by(pid);
        let foreign = self.is_foreign(pid);
        if self.entries.remove(&pid).is_some() && foreign {
            self.foreign -= 1;
        }
        if self.graves.insert(pid, incarnation).is_none() && foreign {
            self.foreign_graves.push_back(pid);
            if self.foreign_graves.len() > MAX_FOREIGN_GRAVES
                && let Some(oldest) = self.foreign_graves.pop_front()
            {
                self.graves.remove(&oldest);
                self.changed.insert(oldest);
            }
        }
        self.changed.insert(pid);
        self.account(before, pid)
    }

    fn is_foreign(&self, pid: Pid) -> bool {
        self.modulus.home(pid) != Some(self.here)
    }

    fn reserved_by(&self, pid: Pid) -> BTreeSet<Pid> {
        match self.entries.get(&pid) {
            Some(entry) if entry.reserved => entry.held.clone(),
            Some(_) | None => BTreeSet::new(),
        }
    }

    /// Brings the holders up to date after `pid` has changed from reserving `before`.
    fn account(&mut self, before: BTreeSet<Pid>, pid: Pid) -> Reservations {
        let after = self.reserved_by(pid);
        let mut changes = Reservations::default();
        for id in after.difference(&before) {
            let holders = self.holders.entry(*id).or_insert(0);
            *holders += 1;
            if *holders == 1 {
                changes.reserve.push(*id);
            }
        }
        for id in before.difference(&after) {
            let holders = self.holders.entry(*id).or_insert(1);
            *holders -= 1;
            if *holders == 0 {
                self.holders.remove(id);
                changes.release.push(*id);
            }
        }
        changes
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
