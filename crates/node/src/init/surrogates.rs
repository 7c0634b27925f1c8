//! Whose reports are believed, and which surrogates are stopped.
//!
//! Owns the socket that surrogates report to and the list of registered ones. Refuses to know whom they stand for.
//! Invariants: a report of a process that is not registered is dropped; a surrogate that is gone leaves the list by
//! itself. SIGSTOP cannot be taken by a program, and only a parent is told of it: so while there are surrogates, their
//! states are looked at every [`Surrogates::tick`]. Between two looks one may have been continued and stopped again: a
//! surrogate that is stopped is therefore told of (again) whenever it took a SIGCONT since it was told of last, and so
//! the last word on each is always the right one.

use crate::nest::wire::Event;
use dunlin_proto::ids::Pid;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::surrogate::{self, Report};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// At most so many reports are taken in one go, so that requests are answered in between.
const BATCH: usize = 256;
const SIGCONT: i32 = 18;

/// The surrogates of the nest.
#[derive(Debug)]
pub struct Surrogates {
    reports: OwnedFd,
    /// Was it stopped, as far as was told?
    registered: BTreeMap<Pid, bool>,
}

impl Surrogates {
    /// `reports`: what [`surrogate::reports`] bound.
    pub fn new(reports: OwnedFd) -> Surrogates {
        Surrogates {
            reports,
            registered: BTreeMap::new(),
        }
    }

    /// Believes the reports of this process from now on.
    pub fn register(&mut self, pid: Pid) {
        self.registered.entry(pid).or_insert(false);
    }

    /// Believes them no longer.
    pub fn unregister(&mut self, pid: Pid) {
        self.registered.remove(&pid);
    }

    /// The reports that have come.
    pub fn receive(&mut self) -> io::Result<Vec<Event>> {
        let mut events = Vec::new();
        while events.len() < BATCH
            && let Some((pid, report)) = surrogate::receive(&self.reports)?
        {
            let pid = Pid(pid);
            if let Some(stopped) = self.registered.get_mut(&pid) {
                let event = match report {
                    Report::Signal(info) => {
                        // It has run. If it is stopped now, then anew.
                        if *stopped && info[..4] == SIGCONT.to_ne_bytes() {
                            *stopped = false;
                            events.push(Event::SurrogateContinued(pid));
                        }
                        Event::SurrogateSignal {
                            pid,
                            info: info.to_vec(),
                        }
                    }
                    Report::Child(info) => Event::SurrogateChild {
                        parent: pid,
                        info: info.to_vec(),
                    },
                };
                events.push(event);
            }
        }
        Ok(events)
    }

    /// When to look at their states next: 20 ms, more if there are many, so that it costs a few percent at most.
    pub fn tick(&self) -> Option<Duration> {
        let count = self.registered.len() as u32;
        (count > 0).then(|| Duration::from_millis(20).max(Duration::from_micros(400) * count))
    }

    /// What has changed in their states.
    pub fn look(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        self.registered.retain(|pid, stopped| match state(*pid) {
            Some(b'Z' | b'X') | None => {
                events.push(Event::SurrogateGone(*pid));
                false
            }
            Some(state) => {
                let now = state == b'T';
                if now != *stopped {
                    *stopped = now;
                    events.push(match now {
                        true => Event::SurrogateStopped(*pid),
                        false => Event::SurrogateContinued(*pid),
                    });
                }
                true
            }
        });
        events
    }
}

impl AsFd for Surrogates {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reports.as_fd()
    }
}

/// The state letter; `None`: there is no such process.
fn state(pid: Pid) -> Option<u8> {
    let stat = ProcDir::process(pid.0).bytes("stat").ok()?;
    let name_end = stat.iter().rposition(|b| *b == b')')?;
    stat.get(name_end + 2).copied()
}
