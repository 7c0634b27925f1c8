//! Which PID a node gives out next (R2).
//!
//! Owns the cursor through the PIDs of this node's slot (`p ≡ slot mod M`, `100 < p < limit`, cyclic) and the set of
//! those *reserved* for processes and threads that have departed. Refuses to know how a number is given to a new task
//! and how the ids in use are found out: the caller scans.
//!
//! A number may be in use in the nest as PID, TID, process group or session, the last two even when no task of that
//! number is left. Asking the kernel about each candidate is dear, so the cursor works through *windows*: before the first
//! number of a window is handed out, the caller scans all ids in use in the nest once. From the beginning of the scan on,
//! an id of this slot inside the window can come into use only by [`Allotment::next_pid`] (the cursor is then past it) or by
//! an arrival ([`Allotment::occupy`]): the scan stays exact until the window is used up. Numbers that fall free inside the
//! window are found by the next cycle's scan.
//!
//! Invariants: a number is handed out only if the scan of its window did not show it, it did not arrive since, and it is not
//! reserved; no number is handed out twice without a scan in between; when a whole fresh cycle holds no free number the
//! answer is [`NoPid::Exhausted`], never a duplicate.

use dunlin_proto::ids::{LAST_OWN_PID, Modulus, Pid, Slot};
use std::collections::BTreeSet;

/// At most so many candidates are covered by one scan. A scan costs time with the number of processes, so it is
/// spread over many forks; numbers that fall free inside the window are missed for so long only.
pub const WINDOW_CANDIDATES: u32 = 1024;

/// Why there is no allotment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AllotmentError {
    /// The slot is not below the modulus.
    #[error("{slot} is not below the modulus {modulus}; hint: correct `slot` in the node's configuration")]
    SlotTooHigh {
        /// The slot.
        slot: Slot,
        /// The modulus.
        modulus: u16,
    },
    /// Not one PID of this slot is between 100 and the limit.
    #[error("no pid of {slot} is between {LAST_OWN_PID} and {limit}; hint: raise `pid_limit` or the kernel's pid_max")]
    NoCandidates {
        /// The slot.
        slot: Slot,
        /// The limit.
        limit: i32,
    },
}

/// Why [`Allotment::next_pid`] gave no PID. The allotment is unchanged in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoPid {
    /// The caller must scan the nest, call [`Allotment::scanned`] and ask again.
    #[error("the ids in use between {} and {} must be scanned first", .0.first, .0.last)]
    NeedsScan(Window),
    /// A whole cycle of fresh scans held no free number: the program gets EAGAIN. The next call asks for new scans.
    #[error("every pid of this node is in use or reserved; hint: end processes, or raise `pid_limit`")]
    Exhausted,
}

/// The range of ids that a scan must cover, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The first candidate.
    pub first: Pid,
    /// The last candidate.
    pub last: Pid,
}

impl Window {
    /// Is `id` inside?
    pub fn contains(self, id: Pid) -> bool {
        self.first <= id && id <= self.last
    }
}

/// What is known of the numbers ahead of the cursor.
#[derive(Debug)]
enum Ahead {
    /// Nothing.
    Unknown,
    /// A scan is under way. `taken` are the ids that arrived since it was asked for, which it may have missed.
    Asked { window: Window, taken: BTreeSet<Pid> },
    /// Scanned. `fresh`: nothing was handed out since, so a number skipped now is known to be in use now.
    Open {
        window: Window,
        taken: BTreeSet<Pid>,
        fresh: bool,
    },
}

/// The PIDs of one node.
#[derive(Debug)]
pub struct Allotment {
    modulus: Modulus,
    slot: Slot,
    lowest: i32,
    limit: i32,
    /// The next candidate; always one of ours.
    cursor: i32,
    ahead: Ahead,
    /// Candidates passed over since the last hand-out, counting only those known from a scan that is later than it.
    barren: u32,
    reserved: BTreeSet<Pid>,
}

impl Allotment {
    /// The PIDs p with `p mod modulus == slot`, `100 < p < limit`. `limit` is the nest's `pid_max` or less.
    pub fn new(modulus: Modulus, slot: Slot, limit: i32) -> Result<Allotment, AllotmentError> {
        if slot.0 >= modulus.0 {
            return Err(AllotmentError::SlotTooHigh {
                slot,
                modulus: modulus.0,
            });
        }
        let (step, first) = (i32::from(modulus.0), LAST_OWN_PID + 1);
        let lowest = first + (i32::from(slot.0) - first).rem_euclid(step);
        if lowest >= limit {
            return Err(AllotmentError::NoCandidates { slot, limit });
        }
        Ok(Allotment {
            modulus,
            slot,
            lowest,
            limit,
            cursor: lowest,
            ahead: Ahead::Unknown,
            barren: 0,
            reserved: BTreeSet::new(),
        })
    }

    /// Starts after `last` instead of at the lowest number: a restarted init goes on where it was.
    pub fn resume_after(&mut self, last: Pid) {
        let step = i32::from(self.modulus.0);
        let from = last.0.clamp(LAST_OWN_PID, self.limit - 1) + 1;
        let next = from + (i32::from(self.slot.0) - from).rem_euclid(step);
        self.cursor = if next < self.limit { next } else { self.lowest };
        self.ahead = Ahead::Unknown;
        self.barren = 0;
    }

    /// How many PIDs there are to give out in all.
    pub fn candidates(&self) -> u32 {
        ((self.limit - 1 - self.lowest) / i32::from(self.modulus.0)) as u32 + 1
    }

    /// The next number. It must be in use, [reserved](Allotment::reserve) or given up before the next scan *begins*:
    /// a number that is still on its way into use is invisible to the scan, and a small ring comes round to it.
    pub fn next_pid(&mut self) -> Result<Pid, NoPid> {
        loop {
            match &mut self.ahead {
                Ahead::Unknown => {
                    let window = self.window_at_cursor();
                    self.ahead = Ahead::Asked {
                        window,
                        taken: BTreeSet::new(),
                    };
                }
                Ahead::Asked { window, .. } => return Err(NoPid::NeedsScan(*window)),
                Ahead::Open { window, taken, fresh } => {
                    let pid = Pid(self.cursor);
                    let free = !taken.contains(&pid) && !self.reserved.contains(&pid);
                    let used_up = pid == window.last;
                    if free {
                        *fresh = false;
                        self.barren = 0;
                    } else if *fresh {
                        self.barren += 1;
                    }
                    if used_up {
                        self.ahead = Ahead::Unknown;
                    }
                    self.cursor = self.after(self.cursor);
                    if free {
                        return Ok(pid);
                    }
                    if self.barren >= self.candidates() {
                        self.barren = 0;
                        self.ahead = Ahead::Unknown;
                        return Err(NoPid::Exhausted);
                    }
                }
            }
        }
    }

    /// The answer to [`NoPid::NeedsScan`]: every id in use in the nest as PID, TID, process group or session (more than
    /// the window's is harmless), by a scan that began after it was asked for. Ignored if this window is not asked for.
    pub fn scanned(&mut self, window: Window, in_use: impl IntoIterator<Item = Pid>) {
        if let Ahead::Asked { window: asked, taken } = &mut self.ahead
            && *asked == window
        {
            let mut taken = std::mem::take(taken);
            taken.extend(in_use.into_iter().filter(|id| window.contains(*id)));
            self.ahead = Ahead::Open {
                window,
                taken,
                fresh: true,
            };
        }
    }

    /// This id has come into use without being handed out here: it arrived with a process, or the kernel was seen to
    /// have it in use. Every later scan shows it. Before it is in use, [`Allotment::reserve`] it.
    pub fn occupy(&mut self, id: Pid) {
        match &mut self.ahead {
            Ahead::Unknown => {}
            Ahead::Asked { window, taken } | Ahead::Open { window, taken, .. } => {
                if window.contains(id) {
                    taken.insert(id);
                }
            }
        }
    }

    /// These ids belong to departed processes and threads: not handed out until released. Those of other slots, which
    /// are never handed out here, are ignored, so that there are at most [`Allotment::candidates`].
    pub fn reserve(&mut self, ids: impl IntoIterator<Item = Pid>) {
        let ours = ids
            .into_iter()
            .filter(|id| is_candidate(self.modulus, self.slot, self.limit, *id));
        self.reserved.extend(ours);
    }

    /// These ids are reserved no longer: their owners have ended, or have come back and hold them in the nest. Since it
    /// may be the latter, they are handed out only after the next scan.
    pub fn release(&mut self, ids: impl IntoIterator<Item = Pid>) {
        for id in ids {
            if self.reserved.remove(&id) {
                self.occupy(id);
            }
        }
    }

    /// The reserved ids, ascending.
    pub fn reserved(&self) -> impl Iterator<Item = Pid> + '_ {
        self.reserved.iter().copied()
    }

    /// Windows do not wrap around: the last of a cycle is shorter.
    fn window_at_cursor(&self) -> Window {
        let step = i64::from(self.modulus.0);
        let span = step * i64::from(WINDOW_CANDIDATES - 1);
        let highest = i64::from(self.lowest) + step * i64::from(self.candidates() - 1);
        Window {
            first: Pid(self.cursor),
            last: Pid((i64::from(self.cursor) + span).min(highest) as i32),
        }
    }

    fn after(&self, pid: i32) -> i32 {
        match pid.checked_add(i32::from(self.modulus.0)) {
            Some(next) if next < self.limit => next,
            _ => self.lowest,
        }
    }
}

fn is_candidate(modulus: Modulus, slot: Slot, limit: i32, id: Pid) -> bool {
    id.0 < limit && modulus.home(id) == Some(slot)
}

#[cfg(test)]
#[path = "allotment_tests.rs"]
mod tests;
