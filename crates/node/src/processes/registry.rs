//! What is in the nest and is not what it looks like.
//!
//! Owns two maps that the mover fills: tasks that stand for something else, and processes that came from elsewhere.
//! Refuses to know how they come to be. An entry of [`Hidden`] is made before its task can be seen, and removed after
//! it is gone or has become the process.

use dunlin_proto::ids::{Incarnation, Pid, Slot};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// What a hidden task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HiddenKind {
    /// At the home of a process that is elsewhere: its table entry.
    Departed,
    /// At another node: a relative (parent, child, leader) of a process that is here.
    Relative,
    /// Keeps the memory of a process that has left, until its pages are drained.
    Keeper,
    /// Will be a process, when a move arrives.
    Blank,
    /// Is about to end because this daemon wants it to: nobody is to be told.
    Leaving,
}

/// What is known of a surrogate's stops and continuations (see [`crate::signals::orders`]).
#[derive(Debug, Default)]
pub struct JobControl {
    /// It is stopped, by what was passed on to its process or taken from it. Where the kernel says otherwise, somebody
    /// here has done that and it is not passed on yet.
    pub stopped: bool,
    /// The number of the last order that it gave its process; 0: none yet.
    pub last_order: u64,
    /// It was killed here, and its process is dying where it is.
    pub killed: bool,
}

#[derive(Debug)]
struct HiddenTask {
    kind: HiddenKind,
    /// When it became that.
    since: Instant,
    job: Arc<Mutex<JobControl>>,
}

/// The tasks of the nest that are no programs.
#[derive(Debug, Default)]
pub struct Hidden(Mutex<BTreeMap<Pid, HiddenTask>>);

impl Hidden {
    /// From now on `pid` is hidden; a second call changes its kind.
    pub fn insert(&self, pid: Pid, kind: HiddenKind) {
        let since = Instant::now();
        let mut tasks = self.lock();
        // A change of what it is, unless that was somebody else.
        let same = tasks.get(&pid).filter(|task| !lock(&task.job).killed);
        let job = same.map(|task| task.job.clone()).unwrap_or_default();
        tasks.insert(pid, HiddenTask { kind, since, job });
    }

    /// From now on `pid` is a process, or nothing. Says what it was.
    pub fn remove(&self, pid: Pid) -> Option<HiddenKind> {
        self.lock().remove(&pid).map(|t| t.kind)
    }

    /// What `pid` is, if it is hidden.
    pub fn kind(&self, pid: Pid) -> Option<HiddenKind> {
        self.lock().get(&pid).map(|t| t.kind)
    }

    /// Those of this kind, at least so old.
    pub fn all(&self, kind: HiddenKind, age: Duration) -> Vec<Pid> {
        let tasks = self.lock();
        let found = tasks.iter().filter(|(_, t)| t.kind == kind && t.since.elapsed() >= age);
        found.map(|(pid, _)| *pid).collect()
    }

    /// Its stops and continuations. Who holds the lock may stop or continue it.
    pub fn job(&self, pid: Pid) -> Option<Arc<Mutex<JobControl>>> {
        self.lock().get(&pid).map(|task| task.job.clone())
    }

    /// It was made stopped, as its process is.
    pub fn is_stopped(&self, pid: Pid, stopped: bool) {
        if let Some(job) = self.job(pid) {
            lock(&job).stopped = stopped;
        }
    }

    /// Somebody here has killed it.
    pub fn is_killed(&self, pid: Pid) {
        self.insert(pid, HiddenKind::Leaving);
        if let Some(job) = self.job(pid) {
            lock(&job).killed = true;
        }
    }

    /// Was it killed here not long ago?
    pub fn was_killed(&self, pid: Pid) -> bool {
        self.job(pid).is_some_and(|job| lock(&job).killed)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Pid, HiddenTask>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn lock(job: &Mutex<JobControl>) -> MutexGuard<'_, JobControl> {
    job.lock().unwrap_or_else(|e| e.into_inner())
}

/// A process that came here by a move (or was forked by one and shares its absent pages).
#[derive(Clone)]
pub struct Resident {
    /// How many moves it has made.
    pub moves: u32,
    /// Its command line, as it was when it left its first node: reading it anew may need a page.
    pub command: String,
    /// Its entry's.
    pub incarnation: Incarnation,
    /// A move has stopped it.
    pub frozen: bool,
    /// Pages that still are on other nodes; none when it is drained.
    pub elsewhere: Arc<dyn Fn() -> BTreeMap<Slot, u64> + Send + Sync>,
}

impl fmt::Debug for Resident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resident")
            .field("moves", &self.moves)
            .field("command", &self.command)
            .field("incarnation", &self.incarnation)
            .field("frozen", &self.frozen)
            .finish_non_exhaustive()
    }
}

/// The processes here that have a past elsewhere.
#[derive(Debug, Default)]
pub struct Residents(Mutex<BTreeMap<Pid, Resident>>);

impl Residents {
    /// Enters a process, or replaces what was known of it.
    pub fn insert(&self, pid: Pid, resident: Resident) {
        self.lock().insert(pid, resident);
    }

    /// Changes an entry, if there is one.
    pub fn change(&self, pid: Pid, change: impl FnOnce(&mut Resident)) {
        if let Some(resident) = self.lock().get_mut(&pid) {
            change(resident);
        }
    }

    /// It has left or ended.
    pub fn remove(&self, pid: Pid) -> Option<Resident> {
        self.lock().remove(&pid)
    }

    /// What is known of a process.
    pub fn get(&self, pid: Pid) -> Option<Resident> {
        self.lock().get(&pid).cloned()
    }

    /// Does reading its memory possibly need another node?
    pub fn has_pages_elsewhere(&self, pid: Pid) -> bool {
        self.get(pid).is_some_and(|r| !(r.elsewhere)().is_empty())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Pid, Resident>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_task_is_changes_and_its_job_does_not() {
        let hidden = Hidden::default();
        hidden.insert(Pid(129), HiddenKind::Relative);
        hidden.is_stopped(Pid(129), true);
        hidden.insert(Pid(129), HiddenKind::Leaving);
        assert!(hidden.job(Pid(129)).unwrap().lock().unwrap().stopped);
        assert_eq!(hidden.remove(Pid(129)), Some(HiddenKind::Leaving));
        assert!(hidden.job(Pid(129)).is_none());
        hidden.insert(Pid(129), HiddenKind::Relative);
        assert!(!hidden.job(Pid(129)).unwrap().lock().unwrap().stopped);
    }
}
