//! Memory that is sent while the program runs: what it has written since.
//!
//! Owns the userfaultfd that was made in the program for this, and the tracking by it. Refuses to know who sends what
//! where. Invariants: the program keeps no descriptor of it; when the source is dropped, the last one is closed and the
//! tracking ends.

use super::{CaptureError, PAGE, Source, space};
use crate::dirty::{Content, DirtyError, DirtyTracker};
use dunlin_proto::image::{MappingKind, Plan};
use dunlin_sys::foothold::{Foothold, take_descriptor};
use dunlin_sys::ptrace::Stopped;
use dunlin_sys::script::Script;
use dunlin_sys::uffd::Uffd;
use std::io;

/// What is known of a program's writes.
pub(super) enum Writes {
    /// Nothing.
    Unwatched,
    /// They can be tracked.
    Watchable(Uffd),
    /// They are.
    Watched(DirtyTracker),
}

/// A watch that nobody asks any more.
pub struct Watch {
    _held: Writes,
}

/// First address and number of pages.
pub type Run = (u64, u64);

/// Makes a userfaultfd in a stopped process with a foothold, and takes it from there.
pub(super) fn userfaultfd_of(thread: Stopped, host: i32, foothold: &Foothold) -> Result<(Stopped, Uffd), CaptureError> {
    const SYS_USERFAULTFD: i64 = 323;
    const SYS_CLOSE: i64 = 3;
    /// Every program may make one that hands nobody the faults of the kernel. Tracking hands out none at all.
    const USER_MODE_ONLY: u64 = 1;
    const O_CLOEXEC_NONBLOCK: u64 = 0o2_004_000;
    // By scripts: should this daemon die meanwhile, the arena says which descriptor is to be closed.
    let mut script = Script::new(&foothold.arena);
    let made = script.call("userfaultfd", SYS_USERFAULTFD, &[O_CLOEXEC_NONBLOCK | USER_MODE_ONLY]);
    let (thread, answers) = script.run(thread)?;
    let fd = answers.of(made);
    let taken = take_descriptor(host, fd as i32);
    let mut script = Script::new(&foothold.arena);
    script.call("close", SYS_CLOSE, &[fd as u64]);
    let (thread, _) = script.run(thread)?;
    let uffd = Uffd::from_fd(taken?).map_err(|source| CaptureError::Kernel {
        what: "watching its writes",
        source: source.into(),
    })?;
    Ok((thread, uffd))
}

impl Source {
    /// From now on the program's writes are remembered: what is read of its memory after this, and not among the next
    /// [written](Source::written) pages, is what it is.
    pub fn watch_writes(&mut self) -> Result<(), CaptureError> {
        let uffd = match std::mem::replace(&mut self.writes, Writes::Unwatched) {
            Writes::Watchable(uffd) => uffd,
            Writes::Watched(_) | Writes::Unwatched => {
                return Err(CaptureError::Kernel {
                    what: "watching its writes",
                    source: "it filters its own system calls; hint: use --mode demand".into(),
                });
            }
        };
        let pagemap = self.pagemap.try_clone()?;
        let mut tracker = DirtyTracker::new(uffd, pagemap).map_err(untracked)?;
        tracker.collect(&demanded(&self.plan)).map_err(untracked)?;
        self.writes = Writes::Watched(tracker);
        Ok(())
    }

    /// The pages with content that were written since the last call (or since the watch began). The caller must fetch
    /// them anew: from here on writes count for the next call.
    pub fn written(&mut self) -> Result<Vec<Run>, CaptureError> {
        let regions = demanded(&self.plan);
        let found = self.tracker()?.collect(&regions).map_err(untracked)?;
        Ok(runs(found.iter().filter(|c| c.written)))
    }

    /// Everything but the pages with content that were not written since the last call: what was read of the rest
    /// before is worthless. `regions` are those of now. Only while the program is stopped.
    pub fn stale(&mut self, regions: &[Run]) -> Result<Vec<Run>, CaptureError> {
        let found = self.tracker()?.collect(regions).map_err(untracked)?;
        Ok(without(regions, &runs(found.iter().filter(|c| !c.written))))
    }

    /// Lists the mappings again, shortly before the freeze: which flags one has is not told in it, and since the plan was
    /// made the program has had much time to make new ones.
    pub fn look_again(&mut self) -> Result<(), CaptureError> {
        self.listing = space::listing(&self.dir)?;
        self.looked_again = true;
        Ok(())
    }

    /// Are its writes watched?
    pub fn is_sent_ahead(&self) -> bool {
        matches!(self.writes, Writes::Watched(_))
    }

    /// The watch over its writes, to be dropped when nobody waits for it: lifting it takes time for every page.
    pub fn take_watch(&mut self) -> Watch {
        Watch {
            _held: std::mem::replace(&mut self.writes, Writes::Unwatched),
        }
    }

    fn tracker(&mut self) -> Result<&mut DirtyTracker, CaptureError> {
        match &mut self.writes {
            Writes::Watched(tracker) => Ok(tracker),
            Writes::Watchable(_) | Writes::Unwatched => Err(CaptureError::Kernel {
                what: "asking for its writes",
                source: io::Error::other("nobody watched").into(),
            }),
        }
    }
}

fn untracked(error: DirtyError) -> CaptureError {
    CaptureError::Kernel {
        what: "watching its writes",
        source: error.into(),
    }
}

/// What of a process's memory is served on demand: first addresses and numbers of pages.
pub fn demanded(plan: &Plan) -> Vec<Run> {
    let anonymous = plan.image.space.mappings.iter();
    let anonymous = anonymous.filter(|m| m.kind == MappingKind::Anonymous);
    anonymous.map(|m| (m.start, (m.end - m.start) / PAGE)).collect()
}

fn runs<'a>(content: impl Iterator<Item = &'a Content>) -> Vec<Run> {
    content.map(|c| (c.start, c.pages)).collect()
}

/// `all` without `some`; both ascending and without overlap.
fn without(all: &[Run], some: &[Run]) -> Vec<Run> {
    let mut rest = Vec::new();
    for &(start, pages) in all {
        let (mut at, end) = (start, start + pages * PAGE);
        let first = some.partition_point(|(s, n)| s + n * PAGE <= start);
        for &(s, n) in some[first..].iter().take_while(|(s, _)| *s < end) {
            if s > at {
                rest.push((at, (s - at) / PAGE));
            }
            at = at.max(s + n * PAGE);
        }
        if at < end {
            rest.push((at, (end - at) / PAGE));
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_clean_is_stale() {
        let all = [(0, 10), (20 * PAGE, 10), (40 * PAGE, 1)];
        assert_eq!(without(&all, &[]), all);
        let clean = [(0, 2), (5 * PAGE, 1), (19 * PAGE, 2), (28 * PAGE, 20)];
        let stale = [(2 * PAGE, 3), (6 * PAGE, 4), (21 * PAGE, 7)];
        assert_eq!(without(&all, &clean), stale);
        assert_eq!(without(&all, &all), []);
    }
}
