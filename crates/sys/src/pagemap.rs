//! Which pages of an address space exist, and which were written: `/proc/PID/pagemap`.
//!
//! Owns the PAGEMAP_SCAN ioctl (Linux 6.7) and the layout of an entry. Refuses to know why anyone asks. Invariants: a
//! scan holds a bounded buffer however many ranges there are; an address space that is gone is an error (ESRCH), never
//! an empty one; the file outlives the task whose memory it shows, as long
//! as any process shares that memory.
//!
//! References: `Documentation/admin-guide/mm/pagemap.rst`, ioctl_pagemap_scan(2).

use crate::{Errno, check};
use rustix::fd::{AsFd, AsRawFd};
use std::fs::File;
use std::ops::BitOr;
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;
const RANGES_PER_CALL: usize = 256;

/// What a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kinds(u64);

impl Kinds {
    /// Its mapping is registered for asynchronous write protection.
    pub const WATCHED: Kinds = Kinds(1);
    /// It was written since it was protected last.
    pub const WRITTEN: Kinds = Kinds(1 << 1);
    /// It belongs to a file or to shared memory.
    pub const FILE: Kinds = Kinds(1 << 2);
    /// It is in memory.
    pub const PRESENT: Kinds = Kinds(1 << 3);
    /// It is in swap, or the page table holds a marker.
    pub const SWAPPED: Kinds = Kinds(1 << 4);
    /// It is the page of zeros.
    pub const ZERO: Kinds = Kinds(1 << 5);
    /// It is part of a huge page.
    pub const HUGE: Kinds = Kinds(1 << 6);
    /// It is a guard page (MADV_GUARD_INSTALL; Linux 6.14 shows it).
    pub const GUARD: Kinds = Kinds(1 << 8);

    /// Are all of `other` among these?
    pub fn contains(self, other: Kinds) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Kinds {
    type Output = Kinds;
    fn bitor(self, other: Kinds) -> Kinds {
        Kinds(self.0 | other.0)
    }
}

/// Which pages a scan reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Query {
    /// Pages with all of these …
    pub all_of: Kinds,
    /// … none of these …
    pub none_of: Kinds,
    /// … and at least one of these (if any is given).
    pub any_of: Kinds,
    /// Which kinds the answer tells apart; ranges end where these change.
    pub report: Kinds,
    /// Write-protect what is reported, in the same breath: the next scan for [`Kinds::WRITTEN`] reports what was
    /// written after this one. The mappings must be registered with WP_ASYNC; others make the scan fail.
    pub protect: bool,
}

impl Query {
    /// Private pages with content: in memory or in swap, not of a file, not the page of zeros.
    pub const CONTENT: Query = Query {
        all_of: Kinds(0),
        none_of: Kinds(Kinds::FILE.0 | Kinds::ZERO.0),
        any_of: Kinds(Kinds::PRESENT.0 | Kinds::SWAPPED.0),
        report: Kinds(0),
        protect: false,
    };
    /// Pages that are in memory for certain, whatever is in them. (What is in swap looks like a marker of a missing one.)
    pub const HERE: Query = Query {
        all_of: Kinds::PRESENT,
        none_of: Kinds(0),
        any_of: Kinds(0),
        report: Kinds(0),
        protect: false,
    };
    /// Pages written since the last such scan.
    pub const TAKE_WRITTEN: Query = Query {
        all_of: Kinds(Kinds::WRITTEN.0),
        none_of: Kinds(0),
        any_of: Kinds(0),
        report: Kinds(0),
        protect: true,
    };
}

/// Adjacent pages of the same kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// What they are, of the kinds asked for.
    pub kinds: Kinds,
}

/// Scans `start..end`, a buffer at a time. `fd` is an open `/proc/PID/pagemap`.
pub fn scan<Fd: AsFd>(fd: Fd, start: u64, end: u64, query: Query) -> Scan<Fd> {
    let found = Vec::with_capacity(RANGES_PER_CALL).into_iter();
    Scan {
        fd,
        next: start,
        end,
        query,
        found,
    }
}

/// The ranges of a scan, ascending. An error ends it.
#[derive(Debug)]
pub struct Scan<Fd> {
    fd: Fd,
    next: u64,
    end: u64,
    query: Query,
    found: std::vec::IntoIter<Range>,
}

impl<Fd> Scan<Fd> {
    /// Everything below this address has been looked at (though not all of it handed out).
    pub fn walked(&self) -> u64 {
        self.next
    }
}

impl<Fd: AsFd> Iterator for Scan<Fd> {
    type Item = Result<Range, Errno>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(range) = self.found.next() {
                return Some(Ok(range));
            }
            if self.next >= self.end {
                return None;
            }
            match scan_once(&self.fd, self.next, self.end, self.query) {
                Ok((found, walked)) => {
                    self.found = found.into_iter();
                    self.next = walked;
                }
                Err(errno) => {
                    self.next = self.end;
                    return Some(Err(errno));
                }
            }
        }
    }
}

/// One call: the ranges found, and up to where the walk came.
fn scan_once(fd: &impl AsFd, start: u64, end: u64, query: Query) -> Result<(Vec<Range>, u64), Errno> {
    let mut found = vec![[0u64; 3]; RANGES_PER_CALL];
    // struct pm_scan_arg
    let mut argument: [u64; 12] = [
        12 * 8,
        if query.protect { 3 } else { 0 }, // PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
        start,
        end,
        0,
        found.as_mut_ptr() as u64,
        found.len() as u64,
        0,
        query.none_of.0,
        query.all_of.0 | query.none_of.0,
        query.any_of.0,
        query.report.0,
    ];
    const PAGEMAP_SCAN: u64 = 3 << 30 | 96 << 16 | (b'f' as u64) << 8 | 16;
    // SAFETY: the ioctl reads and writes a struct of twelve u64 and writes at most `vec_len` structs of three u64 at
    // `vec`, which is `found`.
    let answer = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), PAGEMAP_SCAN, argument.as_mut_ptr()) };
    let filled = check(i64::from(answer))? as usize;
    found.truncate(filled);
    let walked = argument[4];
    if walked <= start {
        return Err(Errno(libc::EIO));
    }
    // The kernel scans an address space that is gone as if it were empty; a read tells the difference, and comes after
    // the scan, so that what was found before it is true.
    if rustix::io::pread(fd, &mut [0u8; 8], start / PAGE * 8) != Ok(8) {
        return Err(Errno(libc::ESRCH));
    }
    let found = found
        .iter()
        .map(|r| Range {
            start: r[0],
            end: r[1],
            kinds: Kinds(r[2]),
        })
        .collect();
    Ok((found, walked))
}

/// One page's entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// The page has content of its own: in memory or in swap. Markers in the page table (guard, poison, write
    /// protection of nothing) look like swap, of a swap type that no swap file has; telling them apart wants
    /// CAP_SYS_ADMIN, as the kernel hides the type from others.
    pub fn has_content(self) -> bool {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const TYPE_MASK: u64 = 31;
        const MARKER_TYPE: u64 = 31;
        self.0 & PRESENT != 0 || (self.0 & SWAPPED != 0 && self.0 & TYPE_MASK != MARKER_TYPE)
    }
}

/// The entries of `count` (at most 64) pages from `start` on.
pub fn entries(pagemap: &File, start: u64, count: usize) -> Result<impl Iterator<Item = Entry>, Errno> {
    let mut bytes = [0u8; 8 * 64];
    let wanted = 8 * count.min(64);
    let read = pagemap
        .read_at(&mut bytes[..wanted], start / PAGE * 8)
        .map_err(|e| Errno(e.raw_os_error().unwrap_or(libc::EIO)))?;
    if read < wanted {
        // The file ends at once when the address space is gone: that says nothing about the pages.
        return Err(Errno(libc::ESRCH));
    }
    Ok((0..count.min(64)).map(move |i| {
        Entry(u64::from_ne_bytes(
            bytes[8 * i..8 * i + 8].try_into().expect("eight bytes"),
        ))
    }))
}
