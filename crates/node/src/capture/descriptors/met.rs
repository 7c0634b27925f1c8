//! The open file descriptions of a move.
//!
//! Owns their keys. Refuses to know what they are. Invariant: one description has one key in all processes of a move, from the
//! plan to the freeze.

use super::glimpse::Glimpse;
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
        let mut same = None;
        let named = self.named.get(&glimpse.link).into_iter().flatten();
        let all = named.map(|at| (*at, &self.all[*at]));
        for (at, known) in all.filter(|(_, known)| known.glimpse.is_like(glimpse)) {
            let (one, other) = (glimpse.number, known.glimpse.number);
            if (known.host, other) == (host, one) && !is_own(host) {
                // Its descriptor is this one: of a description that was met in this round, or has become another.
                same = same.or(Some(at));
            } else if (known.host, other) != (host, one)
                && inspect::same_description((host, known.host), (one, other)).unwrap_or(false)
            {
                same = Some(at);
                break;
            }
        }
        let now = Known {
            host,
            glimpse: glimpse.clone(),
            round: self.round,
        };
        match same {
            Some(at) if self.all[at].round == self.round => Ok(at as u64 + 1),
            Some(at) => {
                self.all[at] = now;
                Ok(at as u64 + 1)
            }
            None => {
                self.all.push(now);
                self.named
                    .entry(glimpse.link.clone())
                    .or_default()
                    .push(self.all.len() - 1);
                Ok(self.all.len() as u64)
            }
        }
    }
}

/// Numbers of our own are of descriptions in flight, and given out again.
fn is_own(host: i32) -> bool {
    host == std::process::id() as i32
}
