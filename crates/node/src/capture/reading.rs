//! Files of the kernel (/proc, /sys) that are being read while their reader is captured.
//!
//! Their text is made while it is read, and the other node's is another one: what follows a position here is not what
//! follows it there, and a reader in the middle of a list would miss lines of it. Owns the decision whether a reader is
//! in the middle: a position that has not moved for [`HELD`] is one that is kept, not one that is read at. Refuses to
//! read the file: that would move the place from which the kernel goes on. See seq_file in the kernel's documentation.

use super::descriptors::Glimpse;
use crate::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_sys::procfs::ProcDir;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longer than a reader goes without its next read on a busy machine, shorter than the attempts at a move.
const HELD: Duration = Duration::from_millis(150);
/// Above this many, what was seen long ago is forgotten.
const MAX_SEEN: usize = 1024;

/// Positions by process (its number on this machine) and descriptor, and when they were seen first.
static SEEN: Mutex<BTreeMap<(i32, i32), (u64, Instant)>> = Mutex::new(BTreeMap::new());

/// Notes what is open in the middle, and tells what is being read.
pub fn look(pid: Pid, host: i32, glimpses: &[Glimpse]) -> Vec<Obstacle> {
    let dir = ProcDir::process(host);
    let mut reading = Vec::new();
    for glimpse in glimpses.iter().filter(|g| g.position() != 0 && is_named_so(g)) {
        let link = dir.path(&format!("fd/{}", glimpse.number()));
        // One that was closed meanwhile is read no more.
        let is_text = std::fs::metadata(&link).is_ok_and(|m| m.is_file())
            && crate::descriptors::file::is_of_kernel(&link).unwrap_or(false);
        if is_text && !is_held((host, glimpse.number()), glimpse.position(), Instant::now()) {
            reading.push(obstacle::descriptor(
                pid,
                glimpse.number(),
                glimpse.link().display(),
                obstacle::READING,
                "try again: reading it takes a moment only",
            ));
        }
    }
    reading
}

fn is_named_so(glimpse: &Glimpse) -> bool {
    ["/proc", "/sys"].iter().any(|top| glimpse.link().starts_with(top))
}

fn is_held(whose: (i32, i32), position: u64, now: Instant) -> bool {
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    if seen.len() > MAX_SEEN {
        seen.retain(|_, (_, since)| now.duration_since(*since) < 40 * HELD);
    }
    match seen.get(&whose) {
        Some((before, since)) if *before == position => now.duration_since(*since) >= HELD,
        Some(_) | None => {
            seen.insert(whose, (position, now));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_held_when_it_has_not_moved_for_a_while() {
        let (reader, now) = ((-1, 3), Instant::now());
        assert!(!is_held(reader, 4096, now));
        assert!(!is_held(reader, 4096, now + HELD / 2));
        assert!(!is_held(reader, 8192, now + HELD), "it has read on");
        assert!(!is_held(reader, 8192, now + HELD * 3 / 2));
        assert!(is_held(reader, 8192, now + HELD * 2));
    }
}
