//! The open file descriptions of a move.
//!
//! Owns their keys. Refuses to know what they are. Invariant: one description has one key in all processes of a move, from the
//! plan to the freeze.

use super::glimpse::Glimpse;
use dunlin_proto::image::Files;
use dunlin_sys::inspect;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// The open file descriptions that were met in the processes of a move. Each has a key that is its own in all of them, and
/// keeps it from the plan to the freeze.
#[derive(Debug, Default)]
pub struct Met {
    all: Vec<Known>,
    /// Those of each name.
    named: HashMap<PathBuf, Vec<usize>>,
    /// Shared memory that was met in this round.
    memories: BTreeSet<u64>,
    round: u32,
    /// Handles on descriptions in flight.
    held: Vec<OwnedFd>,
}

#[derive(Debug)]
struct Known {
    host: i32,
    glimpse: Glimpse,
    round: u32,
}

impl Met {
    /// What was met before may have changed: the processes are all looked at again.
    pub fn begin(&mut self) {
        self.round += 1;
        self.held.clear();
        self.memories.clear();
    }

    /// Is this the first time in this round that this memory is met?
    pub(crate) fn is_first(&mut self, memory: u64) -> bool {
        self.memories.insert(memory)
    }

    /// Keeps a handle on a description in flight open: as long as it is, it is known when it is met again.
    pub(super) fn hold(&mut self, handle: OwnedFd) {
        self.held.push(handle);
    }

    /// The key of a description.
    pub(crate) fn key(&mut self, host: i32, glimpse: &Glimpse) -> io::Result<u64> {
        let named = self.named.get(&glimpse.link).into_iter().flatten();
        let alike = || named.clone().filter(|at| self.all[**at].glimpse.is_like(glimpse));
        let is_of_now = |at: &&usize| self.all[**at].round == self.round;
        let has_its_number = |at: &&usize| {
            let known = &self.all[**at];
            (known.host, known.glimpse.number) == (host, glimpse.number) && !is_own(host)
        };
        let is_it = |at: &&usize| {
            let known = &self.all[**at];
            let (hosts, numbers) = ((host, known.host), (glimpse.number, known.glimpse.number));
            inspect::same_description(hosts, numbers).unwrap_or(false)
        };
        // What was met in this round says which descriptors share one now. What was met earlier lends its key: to what
        // has its number, be it another by now, rather than to what it was then.
        let met = alike().filter(is_of_now).find(|at| has_its_number(at) || is_it(at));
        if let Some(at) = met {
            return Ok(*at as u64 + 1);
        }
        let earlier = || alike().filter(|at| !is_of_now(at));
        let lends = earlier()
            .find(has_its_number)
            .or_else(|| earlier().find(is_it))
            .copied();
        let now = Known {
            host,
            glimpse: glimpse.clone(),
            round: self.round,
        };
        let at = match lends {
            Some(at) => {
                self.all[at] = now;
                at
            }
            None => {
                self.all.push(now);
                let named = self.named.entry(glimpse.link.clone()).or_default();
                named.push(self.all.len() - 1);
                self.all.len() - 1
            }
        };
        Ok(at as u64 + 1)
    }

    /// Do descriptors share descriptions now as they did when they were described? Two numbers of one file can come to
    /// share one, or cease to, without anything to be seen in a glimpse of either.
    pub(crate) fn share_as(&mut self, host: i32, glimpses: &[Glimpse], files: &Files) -> io::Result<bool> {
        for (glimpse, descriptor) in glimpses.iter().zip(&files.table) {
            let key = files.descriptions[descriptor.description as usize].key;
            if !glimpse.names_one() && self.key(host, glimpse)? != key {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Numbers of our own are of descriptions in flight, and given out again.
fn is_own(host: i32) -> bool {
    host == std::process::id() as i32
}
