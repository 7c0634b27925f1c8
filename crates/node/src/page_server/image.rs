//! One image: which of its pages have content, and that content.

use super::ServeError;
use dunlin_proto::ids::ImageId;
use dunlin_proto::pages::PAGE_BYTES;
use dunlin_sys::lending::{Lender, Loan};
use dunlin_sys::{pagemap, vmcopy};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, OnceLock, PoisonError, RwLock, TryLockError};

const PAGE: u64 = PAGE_BYTES as u64;

/// The memory that a process left behind.
pub(super) struct Image {
    id: ImageId,
    mem: File,
    pagemap: File,
    keeper: OnceLock<Keeper>,
    /// The keeper again, if it lends and nobody is borrowing just now.
    lender: Mutex<Option<Lender>>,
    /// First address and address after the last; ascending, not overlapping.
    regions: RwLock<Vec<(u64, u64)>>,
}

/// A process that shares the memory.
struct Keeper {
    pid: i32,
    pidfd: OwnedFd,
}

impl Keeper {
    fn new(pid: i32) -> Option<Keeper> {
        let pidfd = rustix::process::pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        Some(Keeper { pid, pidfd })
    }

    /// How many bytes it could read.
    fn gather(&self, spans: &[vmcopy::Span], into: &mut [u8]) -> usize {
        let read = vmcopy::gather(self.pid, spans, into).unwrap_or(0);
        // Its number may be another's by now; as long as its pidfd says that it lives, it was not.
        let mut ended = [PollFd::new(&self.pidfd, PollFlags::IN)];
        match poll(&mut ended, Some(&Timespec::default())) {
            Ok(0) => read,
            _ => 0,
        }
    }
}

impl Image {
    pub(super) fn new(id: ImageId, mem: File, pagemap: File, keeper: Option<i32>, regions: Vec<(u64, u64)>) -> Image {
        let image = Image {
            id,
            mem,
            pagemap,
            keeper: OnceLock::new(),
            lender: Mutex::new(None),
            regions: RwLock::new(joined(regions)),
        };
        if let Some(pid) = keeper {
            image.set_keeper(pid);
        }
        image
    }

    /// What may be read from now on.
    pub(super) fn set_regions(&self, regions: Vec<(u64, u64)>) {
        // Only whole lists are put in: whatever panicked elsewhere, this one is sound.
        *self.regions.write().unwrap_or_else(PoisonError::into_inner) = joined(regions);
    }

    /// The first one stays. One that has ended is none: then everything goes through the file.
    pub(super) fn set_keeper(&self, pid: i32) {
        if let Some(keeper) = Keeper::new(pid)
            && self.keeper.set(keeper).is_ok()
        {
            match Lender::of(pid) {
                Ok(lender) => self.put_back(lender),
                Err(error) => tracing::debug!(%error, pid, "a keeper's memory is copied, not lent"),
            }
        }
    }

    /// Borrows the pages of a request from the keeper, if it lends and nobody else is borrowing. Nothing of the image may
    /// be written to: only a keeper's memory is lent.
    pub(super) fn borrow(&self, start: u64, pages: u64) -> Option<Loan> {
        let lender = match self.lender.try_lock() {
            Ok(mut lender) => lender.take(),
            Err(TryLockError::Poisoned(lender)) => lender.into_inner().take(),
            Err(TryLockError::WouldBlock) => None,
        };
        let (spans, count) = spans(start, pages);
        match lender?.borrow(&spans[..count]) {
            Ok(loan) => Some(loan),
            Err(error) => {
                tracing::debug!(%error, "a keeper does not lend: its memory is copied from now on");
                None
            }
        }
    }

    /// The lender, after a loan.
    pub(super) fn put_back(&self, lender: Option<Lender>) {
        *self.lender.lock().unwrap_or_else(PoisonError::into_inner) = lender;
    }

    /// Which pages of `want`, bit i being the page i pages from `start`, have content.
    pub(super) fn present(&self, start: u64, want: u64) -> Result<u64, ServeError> {
        let count = 64 - want.leading_zeros() as usize;
        self.check(start, start + count as u64 * PAGE)?;
        let entries = pagemap::entries(&self.pagemap, start, count).map_err(|e| self.unreadable(start, e.into()))?;
        let mut present = 0;
        for (i, entry) in entries.enumerate() {
            present |= u64::from(entry.has_content()) << i;
        }
        Ok(present & want)
    }

    /// Fills `into` with the content of `pages` (bits as in [`Image::present`]).
    pub(super) fn read(&self, start: u64, pages: u64, into: &mut [u8]) -> Result<(), ServeError> {
        let (spans, count) = spans(start, pages);
        let spans = &spans[..count];
        let mut done = match self.keeper.get() {
            Some(keeper) if count > 0 => keeper.gather(spans, into),
            _ => 0,
        };
        // The rest goes through the file: it needs no task, and passes over protections such as PROT_NONE.
        let mut at = 0;
        for span in spans {
            if at + span.len > done {
                let skip = done.max(at) - at;
                let address = span.address + skip as u64;
                vmcopy::read(&self.mem, address, &mut into[at + skip..at + span.len])
                    .map_err(|e| self.unreadable(address, e))?;
                done = at + span.len;
            }
            at += span.len;
        }
        Ok(())
    }

    /// The ranges with content in `start..start + pages`, and after each up to where the scan has come.
    pub(super) fn scan(
        &self,
        start: u64,
        pages: u64,
        mut part: impl FnMut(&[(u64, u64)], u64, bool) -> Result<(), ServeError>,
        part_ranges: usize,
    ) -> Result<(), ServeError> {
        let end = start + pages * PAGE;
        self.check(start, end)?;
        let mut ranges = Vec::new();
        for found in pagemap::scan(&self.pagemap, start, end, pagemap::Query::CONTENT) {
            let found = found.map_err(|e| self.unreadable(start, e.into()))?;
            if ranges.len() == part_ranges {
                part(&ranges, found.start, false)?;
                ranges.clear();
            }
            ranges.push((found.start, found.end));
        }
        part(&ranges, end, true)
    }

    fn check(&self, start: u64, end: u64) -> Result<(), ServeError> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let at = regions.partition_point(|(_, e)| *e <= start);
        match regions.get(at) {
            Some((s, e)) if *s <= start && end <= *e => Ok(()),
            _ => Err(ServeError::Outside {
                image: self.id,
                address: start,
            }),
        }
    }

    fn unreadable(&self, address: u64, source: io::Error) -> ServeError {
        ServeError::Unreadable {
            image: self.id,
            address,
            source,
        }
    }
}

/// The runs of pages among the bits from `start` on, and how many there are.
fn spans(start: u64, pages: u64) -> ([vmcopy::Span; 32], usize) {
    let mut spans = [vmcopy::Span { address: 0, len: 0 }; 32];
    let (mut count, mut left) = (0, pages);
    while left != 0 {
        let first = left.trailing_zeros();
        let many = (left >> first).trailing_ones();
        spans[count] = vmcopy::Span {
            address: start + u64::from(first) * PAGE,
            len: many as usize * PAGE_BYTES,
        };
        count += 1;
        left &= (u64::MAX << first).checked_shl(many).unwrap_or(0);
    }
    (spans, count)
}

/// Starts and numbers of pages as starts and ends, ascending; adjacent ones as one, so that a request may cross from one
/// to the next.
fn joined(regions: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut regions: Vec<(u64, u64)> = regions
        .into_iter()
        .map(|(start, n)| (start, start + n * PAGE))
        .collect();
    regions.sort_unstable();
    regions.dedup_by(|next, before| {
        let joined = next.0 <= before.1;
        if joined {
            before.1 = before.1.max(next.1);
        }
        joined
    });
    regions
}
