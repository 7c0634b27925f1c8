//! Which surrogates of relatives a node still needs, and the end of the others.
//!
//! Owns the rule. A process that lives here (or will, or has its home here) needs its ancestors, its group's and its
//! session's leader as they are at its own home; one that came by a move also needs the children it left behind, to wait
//! for them; one that has ended needs its parent, to see it; a keeper needs the leaders of the group and session that it is in. Refuses to know how a surrogate is made.
//! Invariant: while a process arrives nothing is ended, since what it needs is not yet written down.

use super::{Mover, lock};
use crate::processes::HiddenKind;
use crate::signals::orders::settle_stop;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::Child;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Options, Running};
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

/// A task that was to end is forgotten after so long; by then all news of its end has come.
const FORGET_AFTER: Duration = Duration::from_secs(5);

/// One task of the nest.
struct Task {
    parent: Pid,
    group: Pid,
    session: Pid,
    ended: bool,
}

impl Mover {
    /// Ends the surrogates of relatives that no process here needs any more.
    pub(super) fn sweep(&self) {
        for pid in self.hidden.all(HiddenKind::Leaving, FORGET_AFTER) {
            if self.nest.host_pid(pid).is_ok_and(|found| found.is_none()) {
                self.hidden.remove(pid);
            }
        }
        self.end_spent_keepers();
        // Held all the time, so that no process begins to arrive.
        let arriving = lock(&self.destinations);
        if !arriving.is_empty() {
            return;
        }
        self.orders.forget(|pid| {
            self.hidden.kind(pid).is_some() || self.nest.host_pid(pid).is_ok_and(|found| found.is_none())
        });
        let relatives = self.hidden.all(HiddenKind::Relative, Duration::ZERO);
        if relatives.is_empty() {
            return;
        }
        let needed = self.needed(|_| false);
        for relative in relatives {
            // What it was sent it says first; it is looked at again in the next round.
            if !needed.contains(&relative) && !self.arrivals.needs(relative) && self.is_quiet(relative) {
                self.entries.discard(relative);
            }
        }
    }

    /// Has a surrogate said all that it was sent? A stopped one says nothing.
    fn is_quiet(&self, pid: Pid) -> bool {
        let host = self.nest.host_pid(pid).ok().flatten();
        let status = host.and_then(|host| ProcDir::process(host).status().ok());
        status.is_none_or(|s| s.state == 'T' || (s.state == 'S' && s.pending | s.process_pending == 0))
    }

    /// What a stopped surrogate of a child has not told anybody yet goes along with the parent, as the surrogate ends here
    /// when the parent is gone. (The entry at home of a child stays, and what it was sent with it.)
    /// Hands back those of whose stop nobody was told: they are told by the parent's arrival.
    pub(super) fn take_stops(&self, children: &mut [Child]) -> Vec<Pid> {
        let mut taken = Vec::new();
        for child in children {
            let pid = child.pid;
            if let Some(stop) = &mut child.stop
                && self.hidden.kind(pid) == Some(HiddenKind::Relative)
                && let Ok(Some(host)) = self.nest.host_pid(pid)
            {
                let job = self.hidden.job(pid);
                stop.unsaid = job.is_some_and(|job| !std::mem::replace(&mut lock(&job).stopped, true));
                if stop.unsaid {
                    taken.push(pid);
                }
                let pending = pending(host).map(|signals| stop.pending = signals);
                self.log("reading what a stopped child was sent", pending);
            }
        }
        taken
    }

    /// Their parent stays: their stops are told from here after all.
    pub(super) fn give_stops_back(&self, taken: Vec<Pid>) {
        for pid in taken {
            self.hidden.is_stopped(pid, false);
            let again = self.nest.unregister_surrogate(pid);
            self.log(
                "looking at a stopped child again",
                again.and_then(|()| self.nest.register_surrogate(pid)),
            );
        }
    }

    /// Children that are here, or have an entry here, are stopped if they were not told that where their parent was: before
    /// that runs, as it may have them go on.
    pub(super) fn tell_stops(&self, children: &[Child]) {
        for child in children
            .iter()
            .filter(|c| c.stop.as_ref().is_some_and(|stop| stop.unsaid))
        {
            if self.hidden.kind(child.pid) != Some(HiddenKind::Relative)
                && let Ok(Some(pidfd)) = self.nest.pidfd(child.pid)
            {
                let sent = rustix::process::pidfd_send_signal(&pidfd, Signal::STOP);
                self.log("stopping a child", sent.map_err(io::Error::from));
                if let Ok(Some(host)) = self.nest.host_pid(child.pid) {
                    settle_stop(host);
                }
            }
        }
    }

    /// Likewise, what they were sent.
    pub(super) fn tell_signals(&self, children: &[Child]) {
        for (child, stop) in children.iter().filter_map(|c| Some((c.pid, c.stop.as_ref()?))) {
            if self.hidden.kind(child) != Some(HiddenKind::Relative) {
                self.entries.send_all(child, &stop.pending);
            }
        }
    }

    /// Does a living process here need the number of this one, which leaves with these?
    pub(super) fn has_relatives_here(&self, pid: Pid, leaving: &[i32]) -> bool {
        self.needed(|other| leaving.contains(&other)).contains(&pid)
    }

    /// The ancestors and leaders of all that live here or are at home here, but for those who leave.
    fn needed(&self, leaves: impl Fn(i32) -> bool) -> BTreeSet<Pid> {
        let mut tasks = BTreeMap::new();
        let mut anchors = Vec::new();
        let mut needed = BTreeSet::new();
        let mut living = BTreeSet::new();
        let mut absent = Vec::new();
        for (host, pid) in self.neighbours() {
            let Some(task) = task(host) else { continue };
            let anchor = match self.hidden.kind(pid) {
                // One that has ended, too, until its parent's surrogate has heard of it and told it on.
                None => !leaves(host),
                Some(HiddenKind::Departed | HiddenKind::Blank) => !task.ended && !leaves(host),
                Some(HiddenKind::Relative | HiddenKind::Keeper | HiddenKind::Leaving) => false,
            };
            if anchor {
                anchors.push(pid);
            }
            match self.hidden.kind(pid) {
                None if anchor && !task.ended => drop(living.insert(pid)),
                None | Some(HiddenKind::Relative) => absent.push(pid),
                Some(HiddenKind::Departed | HiddenKind::Blank | HiddenKind::Keeper | HiddenKind::Leaving) => {}
            }
            // While a keeper is in them, the numbers of its group and session are taken: if their leaders ended, they could
            // not be made again.
            if self.hidden.kind(pid) == Some(HiddenKind::Keeper) {
                for leader in [task.group, task.session] {
                    if needed.insert(leader) {
                        anchors.push(leader);
                    }
                }
            }
            tasks.insert(pid, task);
        }
        // Who lives here waits for its children.
        for child in absent {
            if tasks.get(&child).is_some_and(|task| living.contains(&task.parent)) && needed.insert(child) {
                anchors.push(child);
            }
        }
        while let Some(anchor) = anchors.pop() {
            // PID 1 has none.
            let Some(task) = tasks.get(&anchor) else { continue };
            for relative in [task.parent, task.group, task.session] {
                // Each of them has needs of the same kind.
                if needed.insert(relative) {
                    anchors.push(relative);
                }
            }
        }
        needed
    }
}

/// What a stopped surrogate was sent.
fn pending(host: i32) -> io::Result<Vec<Vec<u8>>> {
    let running = Running::seize(host, Options::default()).map_err(io::Error::other)?;
    let patience = Instant::now() + Duration::from_secs(1);
    let (thread, _) = running.stop(patience).map_err(io::Error::other)?;
    let mut signals = thread.pending_signals(true).map_err(io::Error::other)?;
    signals.extend(thread.pending_signals(false).map_err(io::Error::other)?);
    thread.detach(0).map_err(io::Error::other)?;
    Ok(signals.into_iter().map(|s| s.to_vec()).collect())
}

fn task(host: i32) -> Option<Task> {
    let last = |numbers: &[i32]| numbers.last().copied().map_or(Pid(0), Pid);
    let status = ProcDir::process(host).status().ok()?;
    let parent = ProcDir::process(status.ppid).status().ok()?;
    Some(Task {
        parent: last(&parent.ns_pids),
        group: last(&status.ns_pgids),
        session: last(&status.ns_sids),
        ended: status.state == 'Z',
    })
}
