//! What a home must not forget.
//!
//! Owns the durable form of its decisions and of its table. Refuses to know where that is kept. Invariant: the ledger
//! is the sum of all that was made durable, in order; of what was made durable together, a beginning is enough to go on
//! from ([`super::home::Home::restore`] does the rest).

use crate::table::Row;
use dunlin_proto::ids::{MoveId, Pid, Slot};
use dunlin_proto::relocation::{Claim, EntryChange};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// One move, as its home remembers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveRecord {
    /// The move.
    pub move_id: MoveId,
    /// Where to.
    pub destination: Slot,
    /// What was leased.
    pub claims: Vec<Claim>,
    /// How far it has come.
    pub stage: Stage,
}

/// How far a move has come, for its home.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// Undecided.
    Leased,
    /// Decided; the source does not yet know.
    Aborted {
        /// The entries in their new incarnations.
        raised: Vec<Claim>,
    },
    /// Decided.
    Committed {
        /// Where everything is since.
        entries: Vec<EntryChange>,
        /// The source knows.
        source_knows: bool,
        /// It runs at the destination, or has run there.
        destination_done: bool,
        /// Homes that do not yet know.
        untold: BTreeSet<Slot>,
    },
}

/// One thing to be made durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Durable {
    /// A row of the table.
    Row(Row),
    /// A move, in place of its earlier record.
    Move(MoveRecord),
    /// A move is not to be remembered any more.
    MoveForgotten(MoveId),
}

/// What the home must know after a restart: the sum of all it had made durable.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    pub(super) rows: BTreeMap<Pid, Row>,
    pub(super) moves: BTreeMap<MoveId, MoveRecord>,
}

impl Ledger {
    /// Adds one thing.
    pub fn apply(&mut self, durable: Durable) {
        match durable {
            Durable::Row(row @ (Row::Entry(pid, _) | Row::Grave(pid, _))) => drop(self.rows.insert(pid, row)),
            Durable::Row(Row::Absent(pid)) => drop(self.rows.remove(&pid)),
            Durable::Move(record) => drop(self.moves.insert(record.move_id, record)),
            Durable::MoveForgotten(move_id) => drop(self.moves.remove(&move_id)),
        }
    }

    /// The same as a list, to begin a new log with.
    pub fn entries(&self) -> impl Iterator<Item = Durable> + '_ {
        let rows = self.rows.values().cloned().map(Durable::Row);
        rows.chain(self.moves.values().cloned().map(Durable::Move))
    }
}
