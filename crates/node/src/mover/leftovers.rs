//! The tasks of a nest that the last daemon held or had made, found by what they are.
//!
//! Owns the look at every process of the nest when a daemon starts. Refuses to decide about those that a record tells
//! of. Invariants: a surrogate is known by the program that it runs; what was held for a moment runs on.

use super::Mover;
use super::records::{KeptDestination, KeptSource, Left};
use super::recover::parked;
use crate::capture::CaptureError;
use crate::capture::held::{Abandoned, fetch_from_refuge, stop_all};
use crate::processes::HiddenKind;
use crate::signals::orders::is_stopped;
use dunlin_proto::ids::Pid;
use dunlin_sys::inspect::{self, Sharing};
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::surrogate;
use std::collections::BTreeSet;
use std::io;

/// What records tell of: those who see to these tasks.
pub(super) struct ToldOf {
    /// What was frozen, and by which arena it is known; unknown before the freeze.
    left: Vec<(Pid, Option<u64>)>,
    /// What has arrived, or is about to.
    arriving: BTreeSet<Pid>,
}

impl ToldOf {
    /// All that is told of.
    pub(super) fn by(sources: &[KeptSource], destinations: &[KeptDestination]) -> ToldOf {
        let left = sources.iter().flat_map(|source| &source.left);
        let members = destinations.iter().flat_map(|kept| &kept.record.members);
        ToldOf {
            left: left.map(|left| (left.pid, left.arena)).collect(),
            arriving: members.map(|member| member.pid).collect(),
        }
    }

    /// Is it what was found? A record of what was left can be older than that a process of this number has come back.
    fn is_of(&self, pid: Pid, arena: Option<u64>) -> bool {
        let is_left = |(its, by): &(Pid, Option<u64>)| *its == pid && (by.is_none() || *by == arena);
        self.arriving.contains(&pid) || self.left.iter().any(is_left)
    }
}

impl Mover {
    /// A record of before the freeze does not say which tasks the processes are.
    pub(super) fn find_frozen(&self, source: &mut KeptSource) -> io::Result<()> {
        for pid in parked(&source.record) {
            if source.left.iter().any(|left| left.pid == pid) {
                continue;
            }
            if let Some(host) = self.nest.host_pid(pid)? {
                source.left.push(Left {
                    pid,
                    host,
                    arena: None,
                    image: None,
                    regions: Vec::new(),
                    pending: Vec::new(),
                    streams: Vec::new(),
                });
            }
        }
        Ok(())
    }

    /// Lets all processes run on that the last daemon held for a moment, as for a move that was only prepared; but for
    /// those that a record tells of. A keeper that was just made is found by its parent, who is told of. Those that had been
    /// on the last step out of the loop come back.
    pub(super) fn free_the_abandoned(&self, told_of: &ToldOf) {
        let found = |pid: Pid, host: i32| match Abandoned::find(pid, host) {
            Ok(found) => found,
            Err(CaptureError::Gone) => None,
            Err(error) => {
                tracing::warn!(%pid, %error, "whether the last daemon held a process is not known");
                None
            }
        };
        for (host, pid) in self.neighbours() {
            if self.hidden.kind(pid).is_some() {
                continue;
            }
            let Some(abandoned) = found(pid, host) else {
                match fetch_from_refuge(host) {
                    Ok(_) | Err(CaptureError::Gone) => {}
                    Err(error) => tracing::warn!(%pid, %error, "whether it spins for the last daemon is not known"),
                }
                continue;
            };
            if told_of.is_of(pid, abandoned.arena().ok()) {
                continue;
            }
            let parent = ProcDir::process(host).status().map_or(0, |status| status.ppid);
            let arena = |of: &Abandoned| of.arena().ok();
            if found(Pid(0), parent).is_some_and(|parents| arena(&parents) == arena(&abandoned)) {
                self.hidden.insert(pid, HiddenKind::Keeper);
            } else if abandoned.is_blank() {
                // It needs the nest's events, which nobody takes yet.
                self.hidden.insert(pid, HiddenKind::Blank);
                let mover = self.arc();
                let comm = ProcDir::process(host).bytes("comm").unwrap_or_default();
                let comm = comm.trim_ascii_end().to_vec();
                // That of the surrogate's file, before it has another.
                let comm = if comm.starts_with(b"memfd:") {
                    b"dunlin-relative".to_vec()
                } else {
                    comm
                };
                let work = move || mover.stand_for(pid, host, &comm);
                if let Err(error) = std::thread::Builder::new().name("stand again".into()).spawn(work) {
                    tracing::error!(%pid, %error, "what was to become a process waits where it is");
                }
            } else {
                self.let_run_on(pid, host);
            }
        }
    }

    /// Turns what was to become a process, and will not, into a surrogate: where nobody needs one, it is ended later.
    pub(super) fn stand_for(&self, pid: Pid, host: i32, comm: &[u8]) {
        let home = self.modulus().home(pid) == Some(self.here);
        let kind = if home {
            HiddenKind::Departed
        } else {
            HiddenKind::Relative
        };
        self.hidden.insert(pid, HiddenKind::Blank);
        let stop = || -> Result<(), CaptureError> {
            for thread in stop_all(host)? {
                // They end with the exec, which waits for those that are traced.
                if thread.tid() != host {
                    thread.detach(0)?;
                }
            }
            Ok(())
        };
        let done = stop()
            .map_err(io::Error::other)
            .and_then(|()| self.entries.stand_again(pid, host, comm));
        self.hidden.insert(pid, kind);
        self.log("making a surrogate stand again", done);
    }

    /// The surrogates of the nest, by the program that they run.
    pub(super) fn hide_surrogates(&self) {
        for (host, pid) in self.neighbours() {
            // It is one until it has the program's name; in the loop it is none any more.
            let in_loop = || Abandoned::find(pid, host).is_ok_and(|found| found.is_some_and(|found| found.waits()));
            if surrogate::is_one(host) && !in_loop() {
                let home = self.modulus().home(pid) == Some(self.here);
                let kind = if is_unborn(host) {
                    HiddenKind::Leaving
                } else if home {
                    HiddenKind::Departed
                } else {
                    HiddenKind::Relative
                };
                self.hidden.insert(pid, kind);
                self.hidden.is_stopped(pid, is_stopped(host) == Some(true));
                if kind == HiddenKind::Leaving
                    && let Some(host) = rustix::process::Pid::from_raw(host)
                {
                    let ended = rustix::process::kill_process(host, rustix::process::Signal::KILL);
                    self.log("ending what was to become a surrogate", ended.map_err(io::Error::from));
                }
            }
        }
    }
}

/// A child of a surrogate that the last daemon had not made one of its own yet: it shares its parent's memory, and waits.
/// Its end is nobody's.
fn is_unborn(host: i32) -> bool {
    let status = ProcDir::process(host).status();
    status.is_ok_and(|status| inspect::shares((host, status.ppid), Sharing::Memory).unwrap_or(false))
}
