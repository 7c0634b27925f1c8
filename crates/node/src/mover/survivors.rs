//! The address spaces that the last daemon served, served again.
//!
//! Owns their taking up from what init keeps (`second_hand`), and the end of children that were lost with the daemon.
//! Invariant: of what cannot be served again init keeps the descriptors: it waits, and never reads zeros.

use super::Mover;
use super::arrivals::Arrival;
use super::arrive::elsewhere;
use super::second_hand::{self, SecondHand};
use crate::pager::{Journal, SpaceHandle, Survivor, Withdrawn};
use crate::processes::Resident;
use dunlin_proto::ids::Pid;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::uffd::Uffd;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

impl Mover {
    /// Serves the spaces again that the last daemon served. Those whose processes do not run here (any more) come back
    /// withdrawn.
    pub(super) fn take_up_spaces(
        &self,
        labels: &[String],
        undecided: &BTreeSet<Pid>,
    ) -> io::Result<BTreeMap<Pid, Withdrawn>> {
        let mut withdrawn = BTreeMap::new();
        for family in second_hand::kept(&self.nest, labels)? {
            let (mut survivors, mut names, mut processes) = (Vec::new(), Vec::new(), Vec::new());
            for kept in family {
                let label = kept.label;
                let (journal, told) = match Journal::take_up(kept.journal) {
                    Ok(told) => told,
                    Err(error) => {
                        // Init keeps the descriptor: it waits, and never reads zeros.
                        tracing::error!(%label, %error, "a process whose pages are elsewhere cannot be served again");
                        continue;
                    }
                };
                if told.lost_children > 0 {
                    self.end_lost_children(kept.process, told.lost_children);
                }
                let id = self.pager.next_id();
                survivors.push(Survivor {
                    id,
                    pid: kept.process.map(|(_, host)| host),
                    uffd: Uffd::from_fd(kept.uffd).map_err(io::Error::other)?,
                    map: told.map,
                    journal,
                });
                names.push((id, label));
                processes.push(kept.process);
            }
            let observer = Arc::new(SecondHand::again(self.nest.clone(), names));
            let handles = self.pager.take_up(survivors, self.connect(), observer)?;
            for (handle, (pid, host)) in handles.into_iter().zip(processes).filter_map(|(h, p)| Some((h, p?))) {
                if !self.give_space(pid, host, &handle)? || undecided.contains(&pid) {
                    withdrawn.extend(handle.withdraw().ok().map(|space| (pid, space)));
                }
            }
        }
        Ok(withdrawn)
    }

    /// Connects a process with its space, if it is here.
    fn give_space(&self, pid: Pid, host: i32, space: &SpaceHandle) -> io::Result<bool> {
        let is_here = self.hidden.kind(pid).is_none() && self.nest.host_pid(pid)? == Some(host);
        let Some(arrival) = self.arrivals.get(pid).filter(|_| is_here) else {
            return Ok(false);
        };
        if let Some(resident) = self.residents.get(pid) {
            let elsewhere = elsewhere(space.clone());
            self.residents.insert(pid, Resident { elsewhere, ..resident });
        }
        let space = Some(space.clone());
        self.arrivals.insert(pid, Arrival { space, ..arrival });
        Ok(true)
    }

    /// A child that was forked in the very moment of the daemon's death has lost its userfaultfd: it would read zeros
    /// where its parent has pages elsewhere, and must not run. It is known by its memory: a copy of its parent's, made
    /// last, in which nothing is watched.
    fn end_lost_children(&self, parent: Option<(Pid, i32)>, how_many: usize) {
        let layout = |host: i32| ProcDir::process(host).stat().ok().map(|stat| stat.layout);
        let is_watched = |host: i32| {
            crate::capture::space::listing(&ProcDir::process(host))
                .is_ok_and(|all| all.iter().any(|(_, flags)| flags.contains(b"um")))
        };
        let Some((pid, host)) = parent else {
            tracing::error!("a child that was forked when the daemon was killed reads zeros where pages are elsewhere");
            return;
        };
        let parents = layout(host);
        let mut children: Vec<(i32, Pid)> = self
            .neighbours()
            .into_iter()
            .filter(|(other, child)| {
                *other != host && self.hidden.kind(*child).is_none() && layout(*other) == parents && !is_watched(*other)
            })
            .collect();
        children.sort_by_key(|(other, _)| std::cmp::Reverse(started(*other)));
        for (other, child) in children.into_iter().take(how_many) {
            tracing::error!(%pid, %child, "forked when the daemon was killed, its pages are lost: it is killed");
            if let Some(process) = rustix::process::Pid::from_raw(other) {
                let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
            }
        }
    }
}

/// When a process was made, clock ticks since the machine's start.
fn started(host: i32) -> u64 {
    let text = ProcDir::process(host).text("stat").unwrap_or_default();
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    // Field 22; the third is the first after the name.
    after_name
        .split_ascii_whitespace()
        .nth(19)
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}
