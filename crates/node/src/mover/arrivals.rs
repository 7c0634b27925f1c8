//! What this node knows of the processes that came by a move and live here.
//!
//! Owns the ids they hold, the images they still need, and how far their pages have come. Refuses to act.

use super::lock;
use crate::pager::SpaceHandle;
use dunlin_proto::control::Step;
use dunlin_proto::ids::{ImageId, MoveId, Pid};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// A process that came by a move.
#[derive(Clone)]
pub struct Arrival {
    /// Threads, group and session: ids that stay taken while it lives.
    pub ids: Vec<Pid>,
    /// Which move left each image that it may still need.
    pub images: BTreeMap<ImageId, MoveId>,
    /// Its address space, as the pager serves (or served) it; unknown of one that came in a former daemon's time.
    pub space: Option<SpaceHandle>,
    /// Relatives that have surrogates here for its sake.
    pub relatives: Vec<Pid>,
    /// How many of its pages were compared with the original before it ran.
    pub verified_pages: Option<u64>,
    /// What was done here while it was frozen.
    pub steps: Vec<Step>,
    /// For how long it had been running when its source was told so, in microseconds.
    pub told_after_us: f64,
}

/// All of them.
#[derive(Default)]
pub struct Arrivals(Mutex<BTreeMap<Pid, Arrival>>);

impl Arrivals {
    /// A process has come.
    pub fn insert(&self, pid: Pid, arrival: Arrival) {
        lock(&self.0).insert(pid, arrival);
    }

    /// It runs, and this is how that came about, if it has not gone again.
    pub fn ran(&self, pid: Pid, steps: Vec<Step>, told_after_us: f64) {
        if let Some(arrival) = lock(&self.0).get_mut(&pid) {
            (arrival.steps, arrival.told_after_us) = (steps, told_after_us);
        }
    }

    /// It has left or ended.
    pub fn remove(&self, pid: Pid) -> Option<Arrival> {
        lock(&self.0).remove(&pid)
    }

    /// What is known of it.
    pub fn get(&self, pid: Pid) -> Option<Arrival> {
        lock(&self.0).get(&pid).cloned()
    }

    /// Is this PID a relative of a process that lives here?
    pub fn needs(&self, relative: Pid) -> bool {
        lock(&self.0)
            .values()
            .any(|arrival| arrival.relatives.contains(&relative))
    }
}
