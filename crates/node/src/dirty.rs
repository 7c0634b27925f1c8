//! Which pages a *running* program writes: for sending its memory before the freeze.
//!
//! Owns the asynchronous write protection of one address space. Refuses to know who sends what where. The program never
//! waits for anyone here: the kernel resolves its write faults itself and only remembers them. No events are asked for,
//! so a fork's child is simply not tracked, and a mapping that mremap moved is no longer either, which the next
//! collection notices and takes as written. Invariants: a page that was reported clean has the content it had when it
//! was last reported; only pages with content are protected, so that reserved terabytes cost no page tables.

use dunlin_sys::Errno;
use dunlin_sys::pagemap::{self, Kinds, Query};
use dunlin_sys::uffd::{Features, Uffd, UffdError, Watch};
use std::collections::BTreeSet;
use std::fs::File;

const PAGE: u64 = 4096;
/// The scan found a mapping that is not under write protection.
const EPERM: Errno = Errno(1);
/// Registered with another userfaultfd.
const EBUSY: Errno = Errno(16);

/// Pages with content, adjacent and alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// First address.
    pub start: u64,
    /// How many pages.
    pub pages: u64,
    /// They were written since the last collection (or were never seen before).
    pub written: bool,
}

/// Why writes cannot be tracked. The program runs on as it did.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// The kernel or the caller's rights do not allow it.
    #[error("writes cannot be tracked: {0}; hint: `--mode demand` needs no tracking")]
    Unsupported(#[source] UffdError),
    /// Pages of the program are still elsewhere.
    #[error("writes cannot be tracked at {0:#x}: its pages are still coming; hint: wait, or use `--mode demand`")]
    Draining(u64),
    /// The program is gone, or its mappings changed during the collection: read them again.
    #[error("writes cannot be tracked at {start:#x}: {errno}; hint: its mappings have changed")]
    Changed {
        /// The region.
        start: u64,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// Tracks the writes of one program.
pub struct DirtyTracker {
    uffd: Uffd,
    pagemap: File,
    /// Regions under protection: start and number of pages.
    armed: BTreeSet<(u64, u64)>,
}

impl DirtyTracker {
    /// `uffd` was made in the program and has negotiated nothing yet; `pagemap` is its `/proc/PID/pagemap`.
    pub fn new(uffd: Uffd, pagemap: File) -> Result<DirtyTracker, DirtyError> {
        uffd.negotiate(Features::WP_ASYNC).map_err(DirtyError::Unsupported)?;
        Ok(DirtyTracker {
            uffd,
            pagemap,
            armed: BTreeSet::new(),
        })
    }

    /// Every page with content in these regions (mappings of private anonymous memory as they are now: start and number
    /// of pages), ascending, with whether it was written since the last collection; from here on writes count for the
    /// next one. What was reported before and is missing now has been dropped: it is zeros. The first collection, and
    /// any new region, is all written. What the program writes during the collection is in this one or the next.
    pub fn collect(&mut self, regions: &[(u64, u64)]) -> Result<Vec<Content>, DirtyError> {
        let mut all = Vec::new();
        let now: BTreeSet<(u64, u64)> = regions.iter().copied().collect();
        self.armed.retain(|region| now.contains(region));
        for &(start, pages) in &now {
            let fresh = !self.armed.contains(&(start, pages));
            if fresh {
                self.arm(start, pages)?;
            }
            let before = all.len();
            match self.scan(start, pages, fresh, &mut all) {
                Ok(()) => {}
                // The same range, but not the same mapping any more.
                Err(EPERM) if !fresh => {
                    all.truncate(before);
                    self.arm(start, pages)?;
                    let again = self.scan(start, pages, true, &mut all);
                    again.map_err(|errno| DirtyError::Changed { start, errno })?;
                }
                Err(errno) => return Err(DirtyError::Changed { start, errno }),
            }
        }
        Ok(all)
    }

    fn arm(&mut self, start: u64, pages: u64) -> Result<(), DirtyError> {
        match self.uffd.register(start, pages * PAGE, Watch::WRITE_PROTECT) {
            Ok(()) => {
                self.armed.insert((start, pages));
                Ok(())
            }
            Err(error) if error.errno() == EBUSY => Err(DirtyError::Draining(start)),
            Err(error) => Err(DirtyError::Changed {
                start,
                errno: error.errno(),
            }),
        }
    }

    fn scan(&self, start: u64, pages: u64, fresh: bool, all: &mut Vec<Content>) -> Result<(), Errno> {
        let query = Query {
            report: Kinds::WRITTEN,
            protect: true,
            ..Query::CONTENT
        };
        for range in pagemap::scan(&self.pagemap, start, start + pages * PAGE, query) {
            let range = range?;
            let pages = (range.end - range.start) / PAGE;
            // A region seen for the first time may have lost its tracking and got it back: trust nothing.
            let written = fresh || range.kinds.contains(Kinds::WRITTEN);
            match all.last_mut() {
                Some(last) if last.written == written && last.start + last.pages * PAGE == range.start => {
                    last.pages += pages;
                }
                _ => all.push(Content {
                    start: range.start,
                    pages,
                    written,
                }),
            }
        }
        Ok(())
    }

    /// Ends the tracking. The program's userfaultfd may have a second holder: this lifts the protection all the same.
    pub fn disarm(self) {
        for (start, pages) in &self.armed {
            // What is no longer mapped is no longer tracked either.
            let _ = self.uffd.unregister(*start, pages * PAGE);
        }
    }
}
