//! The promises.
//!
//! A *life* is one process from fork to exit, whatever its PID. A copy of it *may run* if it is running; or if it is parked and
//! its move is not committed; or if it is a blank whose move is committed and has not been resumed. Promised after every
//! step: exactly one copy of each life may run. The one exception is a blank that was killed (not by its daemon's death, which
//! it outlives) after that had asked for the commit, which is or will be granted: then the life is lost, and everyone
//! concerned must learn that.

use dunlin_cluster::relocation::home::{Durable, Stage};
use dunlin_proto::ids::{MoveId, Pid, Slot};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One rule of the protocol, broken by the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    None,
    /// The source thaws when it asks for the abort, instead of when it is told.
    ThawOnAsking,
    /// The source makes its image when it asks for the abort.
    ImageOnAsking,
    /// The destination resumes when it asks for the commit.
    ResumeOnAsking,
    /// The destination destroys its copy when it has to ask again.
    DestroyWhileAsking,
    /// The home's decisions are not durable.
    HomeForgetsDecisions,
    /// The source's records are not durable.
    SourceKeepsNoRecord,
    /// The destination's records are not durable.
    DestinationKeepsNoRecord,
    /// A daemon that comes back takes copies that wait for the decision for running ones.
    WaitingIsTakenForRunning,
    /// A daemon that comes back ends copies that wait for the decision.
    WaitingIsDestroyed,
    /// The source forgets the pages when the process runs elsewhere, instead of when they are drained.
    ForgetImageOnResume,
    /// The allotment is not told what is reserved.
    NothingReserved,
}

/// One process from fork to exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Life(pub u64);

/// A copy of a process, somewhere.
pub struct Copy<'a> {
    pub life: Life,
    pub at: Slot,
    pub state: CopyState,
    pub images: &'a BTreeSet<MoveId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyState {
    Running,
    Parked(MoveId),
    Blank(MoveId),
}

#[derive(Default)]
pub struct Oracle {
    alive: BTreeMap<Life, Pid>,
    next_life: u64,
    /// True: committed.
    decisions: BTreeMap<MoveId, bool>,
    resumed: BTreeSet<MoveId>,
    /// Undecided moves whose blanks have died after the question was sent: a commit loses these.
    orphans: BTreeMap<MoveId, Vec<Life>>,
    pub lost: u64,
}

impl Oracle {
    pub fn born(&mut self, pid: Pid) -> Life {
        let life = Life(self.next_life);
        self.next_life += 1;
        self.alive.insert(life, pid);
        life
    }

    pub fn ended(&mut self, life: Life) {
        self.alive.remove(&life);
    }

    pub fn alive(&self) -> &BTreeMap<Life, Pid> {
        &self.alive
    }

    pub fn committed(&self) -> u64 {
        self.decisions.values().filter(|d| **d).count() as u64
    }

    pub fn aborted(&self) -> u64 {
        self.decisions.values().filter(|d| !**d).count() as u64
    }

    /// The home makes something durable; true if a move is decided by it.
    pub fn recorded(&mut self, durable: &Durable) -> Result<bool, Violation> {
        let Durable::Move(record) = durable else {
            return Ok(false);
        };
        let committed = match record.stage {
            Stage::Leased => return Ok(false),
            Stage::Aborted { .. } => false,
            Stage::Committed { .. } => true,
        };
        match self.decisions.insert(record.move_id, committed) {
            Some(before) if before != committed => Err(Violation(format!("{} is decided twice", record.move_id))),
            before => {
                if committed && let Some(lives) = self.orphans.remove(&record.move_id) {
                    self.lose(record.move_id, lives);
                }
                Ok(before.is_none())
            }
        }
    }

    /// A parked copy is thawed.
    pub fn thawed(&self, move_id: MoveId) -> Result<(), Violation> {
        match self.decisions.get(&move_id) {
            Some(false) => Ok(()),
            other => Err(Violation(format!(
                "{move_id} is thawed while its decision is {other:?}"
            ))),
        }
    }

    /// Blanks are about to be resumed.
    pub fn may_resume(&self, move_id: MoveId) -> Result<(), Violation> {
        if self.decisions.get(&move_id) != Some(&true) {
            return Err(Violation(format!("{move_id} is resumed without a commit")));
        }
        Ok(())
    }

    /// All of them have been.
    pub fn resumed(&mut self, move_id: MoveId) -> Result<(), Violation> {
        if !self.resumed.insert(move_id) {
            return Err(Violation(format!("{move_id} is resumed twice")));
        }
        Ok(())
    }

    /// Blanks of a move die; its daemon may have asked for the commit.
    pub fn die(&mut self, move_id: MoveId, lives: Vec<Life>, has_asked: bool) {
        if self.is_lost_with(move_id) {
            self.lose(move_id, lives);
        } else if has_asked && !self.decisions.contains_key(&move_id) {
            self.orphans.insert(move_id, lives);
        }
    }

    /// The one loss that is permitted. What is lost can never be resumed.
    fn lose(&mut self, move_id: MoveId, lives: Vec<Life>) {
        self.resumed.insert(move_id);
        for life in lives {
            self.alive.remove(&life);
            self.lost += 1;
        }
    }

    fn is_lost_with(&self, move_id: MoveId) -> bool {
        self.decisions.get(&move_id) == Some(&true) && !self.resumed.contains(&move_id)
    }

    /// May this copy run, now or as soon as its daemon hears what is decided?
    pub fn may_run(&self, state: CopyState) -> bool {
        match state {
            CopyState::Running => true,
            CopyState::Parked(m) => self.decisions.get(&m) != Some(&true),
            CopyState::Blank(m) => self.is_lost_with(m),
        }
    }

    /// Exactly one copy of each life may run; every image it needs is there.
    pub fn check<'a>(
        &self,
        copies: impl Iterator<Item = Copy<'a>>,
        has_image: impl Fn(MoveId, Pid) -> bool,
    ) -> Result<BTreeMap<Life, Slot>, Violation> {
        let mut places = BTreeMap::<Life, Slot>::new();
        for copy in copies.filter(|c| self.may_run(c.state)) {
            let Some(pid) = self.alive.get(&copy.life) else {
                let (life, at) = (copy.life.0, copy.at);
                return Err(Violation(format!("life {life} has ended, and may run on {at}")));
            };
            if let Some(other) = places.insert(copy.life, copy.at) {
                return Err(Violation(format!(
                    "two copies of {pid} may run: on {other} and {}",
                    copy.at
                )));
            }
            if let Some(image) = copy.images.iter().find(|image| !has_image(**image, *pid)) {
                return Err(Violation(format!(
                    "{pid} on {} needs pages that {image} left, and they are gone",
                    copy.at
                )));
            }
        }
        match self.alive.iter().find(|(life, _)| !places.contains_key(life)) {
            Some((_, pid)) => Err(Violation(format!("no copy of {pid} may run"))),
            None => Ok(places),
        }
    }
}
