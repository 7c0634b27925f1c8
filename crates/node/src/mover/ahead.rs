//! Memory that is sent ahead of the freeze, in rounds: the modes `precopy` and `hybrid`.
//!
//! At the source: when another round is worth it. At the destination: the spaces that are being filled, for the source's
//! questions. Refuses to know how pages travel and how writes are found. Invariants: writes are watched before the first
//! page is served; a page that was written after it was served is either called back in a round or named stale in the
//! freeze, so that no round is needed for a move to be right; rounds end, however fast the program writes.

use super::{Mover, lock};
use crate::capture::{CaptureError, Source};
use crate::pager::SpaceHandle;
use dunlin_proto::control::{MoveMode, MovePhase, MoveProgress};
use dunlin_proto::ids::{ImageId, MoveId, Pid, Slot};
use dunlin_proto::peer::{PeerReply, PeerRequest};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// When so few pages are left to be sent, another round would only add to what is written meanwhile: 4 MiB.
const FEW_PAGES: u64 = 1024;
/// A round that leaves more than this share of what the one before it left is the last.
const SHRINKING: f64 = 0.7;
const MAX_ROUNDS: u32 = 12;
/// However much is written and however slow the network: then the freeze comes.
const LONGEST: Duration = Duration::from_secs(600);
/// How often the destination is asked.
const POLL: Duration = Duration::from_millis(2);

/// The spaces that are being filled here, ahead of their programs.
#[derive(Default)]
pub(super) struct Ahead(Mutex<BTreeMap<(MoveId, Pid), (SpaceHandle, ImageId)>>);

impl Ahead {
    /// A space is being filled.
    pub(super) fn insert(&self, by: MoveId, pid: Pid, space: SpaceHandle, image: ImageId) {
        lock(&self.0).insert((by, pid), (space, image));
    }

    /// It is no more, or its program comes.
    pub(super) fn remove(&self, by: MoveId, pid: Pid) -> Option<SpaceHandle> {
        lock(&self.0).remove(&(by, pid)).map(|(space, _)| space)
    }

    fn get(&self, by: MoveId, pid: Pid) -> Option<(SpaceHandle, ImageId)> {
        lock(&self.0).get(&(by, pid)).cloned()
    }
}

impl Mover {
    /// How far a space has come that is filled here ahead of its program.
    pub fn ahead_here(&self, by: MoveId, pid: Pid) -> PeerReply {
        match self.ahead.get(by, pid) {
            Some((space, _)) if space.progress().finished.is_none() => PeerReply::Ahead {
                pages_left: space.progress().pages_left,
            },
            _ => PeerReply::NotHere,
        }
    }

    /// Some of its pages have to come again.
    pub fn recall_here(&self, by: MoveId, pid: Pid, ranges: Vec<(u64, u64)>) -> PeerReply {
        let sound = |(start, pages): &(u64, u64)| {
            start % 4096 == 0 && pages.checked_mul(4096).is_some_and(|n| start.checked_add(n).is_some())
        };
        match self.ahead.get(by, pid) {
            Some((space, image)) if space.progress().finished.is_none() && ranges.iter().all(sound) => {
                if space.recall(image, ranges) {
                    PeerReply::Done
                } else {
                    PeerReply::NotYet
                }
            }
            _ => PeerReply::NotHere,
        }
    }
}

/// The rounds of one move.
pub(super) struct Rounds<'a> {
    pub(super) mover: &'a Mover,
    pub(super) by: MoveId,
    pub(super) to: Slot,
    pub(super) mode: MoveMode,
}

impl Rounds<'_> {
    /// Returns when the processes should be frozen. An error means that nothing can be relied upon any more.
    pub(super) fn run(&self, sources: &mut [Source], mut tell: impl FnMut(MoveProgress)) -> Result<(), CaptureError> {
        let rounds = match self.mode {
            MoveMode::Demand => return Ok(()),
            // One more for what was written during the first, which was long.
            MoveMode::Hybrid => 1,
            MoveMode::Precopy => MAX_ROUNDS,
        };
        let until = Instant::now() + LONGEST;
        let mut before = u64::MAX;
        for round in 0..=rounds {
            if !self.settled(sources, until, &mut tell) || round == rounds {
                return Ok(());
            }
            let mut sent = 0;
            for source in sources.iter_mut() {
                let written = source.written()?;
                sent += written.iter().map(|(_, pages)| pages).sum::<u64>();
                self.recall(source.pid, written)?;
            }
            tracing::debug!(round, sent, "sent ahead again");
            if sent <= FEW_PAGES || sent as f64 > before as f64 * SHRINKING {
                return Ok(());
            }
            before = sent;
        }
        Ok(())
    }

    /// Waits until all that was asked for has come; false if there is no point in waiting.
    fn settled(&self, sources: &[Source], until: Instant, tell: &mut impl FnMut(MoveProgress)) -> bool {
        let mut told = Instant::now();
        loop {
            let mut left = 0;
            for source in sources {
                let question = PeerRequest::Ahead {
                    by: self.by,
                    pid: source.pid,
                };
                match self.mover.peers.call(self.to, &question) {
                    Ok(PeerReply::Ahead { pages_left }) => left += pages_left,
                    _ => return false,
                }
            }
            if left == 0 {
                return true;
            }
            if Instant::now() > until {
                return false;
            }
            if told.elapsed() > Duration::from_millis(100) {
                told = Instant::now();
                tell(MoveProgress {
                    pid: sources[0].pid,
                    phase: MovePhase::Prepare,
                    pages_left: left,
                    pages_total: left,
                    bytes_per_second: 0,
                });
            }
            std::thread::sleep(POLL);
        }
    }

    /// What was taken as sent from the tracker must be called back, or the move cannot go on.
    fn recall(&self, pid: Pid, ranges: Vec<(u64, u64)>) -> Result<(), CaptureError> {
        let request = PeerRequest::Recall {
            by: self.by,
            pid,
            ranges,
        };
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            match self.mover.peers.call(self.to, &request) {
                Ok(PeerReply::Done) => return Ok(()),
                Ok(PeerReply::NotYet) if Instant::now() < until => std::thread::sleep(POLL),
                _ => {
                    return Err(CaptureError::Kernel {
                        what: "sending memory ahead",
                        source: "the destination has lost what came before".into(),
                    });
                }
            }
        }
    }
}
