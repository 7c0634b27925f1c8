//! The process table, kept by the nest as long as there is something to keep.
//!
//! Owns the order: a change is kept before it is acted upon. Refuses to know what changes mean. The nest is the right
//! keeper: it outlives the daemon, and when it ends, so do all processes that the table is about. Rows are kept in
//! shards, so that a change does not rewrite the whole.

use crate::nest::Nest;
use dunlin_cluster::table::{Reservations, Row, Table};
use dunlin_proto::ids::{Modulus, Pid, Slot};
use std::collections::{BTreeMap, BTreeSet};
use std::io;

const SHARDS: i32 = 64;

/// The table and its rows as they are kept.
pub struct KeptTable {
    table: Table,
    modulus: Modulus,
    shards: BTreeMap<i32, BTreeMap<Pid, Row>>,
}

impl KeptTable {
    /// The table that the last daemon left; tells the nest what is reserved, once more.
    pub fn open(nest: &Nest, modulus: Modulus, here: Slot) -> io::Result<KeptTable> {
        let mut shards = BTreeMap::new();
        for shard in 0..SHARDS {
            let Some((_, bytes)) = nest.fetch(&label(shard))? else {
                continue;
            };
            let rows: Vec<Row> = postcard::from_bytes(&bytes).map_err(|e| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("the kept process table, {}: {e}", label(shard)),
                )
            })?;
            shards.insert(
                shard,
                rows.into_iter().map(|row| (pid(&row), row)).collect::<BTreeMap<_, _>>(),
            );
        }
        let rows = shards.values().flat_map(|rows| rows.values().cloned());
        let (table, reservations) = Table::restore(modulus, here, rows);
        reserve(nest, &reservations)?;
        Ok(KeptTable { table, modulus, shards })
    }

    /// The table, to be read.
    pub fn read(&self) -> &Table {
        &self.table
    }

    /// Changes it, and returns when the change is kept.
    pub fn change<T>(&mut self, nest: &Nest, change: impl FnOnce(&mut Table) -> T) -> io::Result<T> {
        let result = change(&mut self.table);
        let mut touched = BTreeSet::new();
        for row in self.table.take_changed() {
            let pid = pid(&row);
            let number = pid.0 / i32::from(self.modulus.0) % SHARDS;
            touched.insert(number);
            let shard = self.shards.entry(number).or_default();
            match row {
                Row::Absent(_) => drop(shard.remove(&pid)),
                Row::Entry(..) | Row::Grave(..) => drop(shard.insert(pid, row)),
            }
        }
        for number in touched {
            let rows: Vec<&Row> = self
                .shards
                .get(&number)
                .map(|s| s.values().collect())
                .unwrap_or_default();
            let bytes = postcard::to_allocvec(&rows).map_err(|e| io::Error::other(e.to_string()))?;
            nest.store(&label(number), &[], bytes)?;
        }
        Ok(result)
    }
}

/// Tells the nest what has changed.
pub fn reserve(nest: &Nest, changes: &Reservations) -> io::Result<()> {
    if !changes.reserve.is_empty() {
        nest.reserve(&changes.reserve)?;
    }
    if !changes.release.is_empty() {
        nest.release(&changes.release)?;
    }
    Ok(())
}

fn label(shard: i32) -> String {
    format!("table-{shard:02}")
}

fn pid(row: &Row) -> Pid {
    match row {
        Row::Entry(pid, _) | Row::Grave(pid, _) | Row::Absent(pid) => *pid,
    }
}
