//! The names of things: nodes by slot, processes by PID, moves, images, runs.
//!
//! Owns the PID arithmetic (R2: a PID names its home node). Refuses to know which PIDs are in use.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A node's number in the cluster, below the modulus. Messages name nodes by slot; people by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Slot(pub u16);

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

/// A process or thread number as programs see it: the one inside the nests, the same on every node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Pid(pub i32);

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// PIDs up to this one are each node's own: they never move and are never given out by the modulus.
pub const LAST_OWN_PID: i32 = 100;

/// The cluster's modulus M, fixed when the cluster is made (R2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modulus(pub u16);

impl Default for Modulus {
    fn default() -> Self {
        Modulus(64)
    }
}

impl Modulus {
    /// The slot of the node that gave `pid` out; `None` for the PIDs that are each node's own.
    pub fn home(self, pid: Pid) -> Option<Slot> {
        (pid.0 > LAST_OWN_PID).then(|| Slot((pid.0 % i32::from(self.0)) as u16))
    }
}

/// Which of two pieces of news about a process is the newer. Raised by every committed or aborted move; older news is dropped.
///
/// A commit outranks any number of aborts (the low 16 bits count those since the last commit): a process is moved by the
/// decision of its own home or of another one (as part of a tree), which may not have heard of the other's aborts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Incarnation(pub u64);

impl Incarnation {
    /// The incarnation after a committed move.
    pub fn after_commit(self) -> Self {
        Incarnation(((self.0 >> 16) + 1) << 16)
    }

    /// How many commits there were.
    pub fn commits(self) -> u64 {
        self.0 >> 16
    }

    /// The incarnation after an aborted move.
    pub fn after_abort(self) -> Self {
        Incarnation(self.0 + 1)
    }
}

/// One attempt to move a process (or a tree, named by its root): unique in the cluster for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MoveId {
    /// The node that gives the process up.
    pub source: Slot,
    /// Drawn at random by the source when the attempt starts.
    pub nonce: u64,
}

impl fmt::Display for MoveId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}-{:016x}", self.source.0, self.nonce)
    }
}

/// The pages that one move left behind on one node, for one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ImageId {
    /// The node that holds the pages.
    pub holder: Slot,
    /// Drawn at random by the holder.
    pub nonce: u64,
}

/// One `dunlin run`: the far ends of its standard streams live on the node that started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RunId {
    /// The node that started it.
    pub origin: Slot,
    /// Drawn at random by the origin.
    pub nonce: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_names_its_home() {
        let m = Modulus(64);
        assert_eq!(m.home(Pid(129)), Some(Slot(1)));
        assert_eq!(m.home(Pid(128)), Some(Slot(0)));
        assert_eq!(m.home(Pid(100)), None);
        assert_eq!(m.home(Pid(101)), Some(Slot(37)));
    }
}
