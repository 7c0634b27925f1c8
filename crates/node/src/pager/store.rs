//! What stands behind pages that are not here.
//!
//! The pager owns events, their order, and the installation of pages; a [`Store`] is asked for pages and says what
//! arrived. *Image* (pages left behind by a move) is the first; *shared* (coherent segments) and *lent* (parked pages)
//! implement the same trait when they come, and will be told of dirty pages and ranges that are gone as well; an image
//! cares for neither.

use super::lane::Pool;
use dunlin_cluster::page_map::Want;
use rustix::event::PollFlags;
use rustix::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// How soon pages are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// A thread waits, or is about to.
    Now,
    /// Some day.
    Later,
}

/// What a store has to say.
pub(super) enum Arrival {
    /// It can be asked.
    Up,
    /// It cannot be asked any more; this was asked in vain.
    Down { asked: Vec<Want>, why: String },
    /// Those of `want` in `present` have the content `data`, one after another; the others are zeros.
    Pages { want: Want, present: u64, data: Vec<u8> },
    /// Of the pages in `from..to` only those in `present` have content.
    Known {
        from: u64,
        to: u64,
        present: Vec<(u64, u64)>,
    },
    /// Nobody waits for us there any more: the store is done.
    Released,
}

/// A backing store, driven by the family's one thread; it never blocks.
pub(super) trait Store {
    /// Can it be asked now?
    fn is_up(&self) -> bool;
    /// Is there room for another request that is not urgent?
    fn has_room(&self) -> bool;
    /// A program faults: no more is to be under way than keeps the holder busy. What is, a fault may have to wait for.
    fn narrow(&mut self, narrow: bool);
    /// A page is wanted for reading or writing.
    fn wanted(&mut self, want: Want, urgency: Urgency);
    /// It is up and nothing that it was asked is still to come.
    fn is_idle(&self) -> bool;
    /// Is something that was wanted now still to come?
    fn is_urgent(&self) -> bool;
    /// The page has been asked for and will be here about as soon as if it were asked for again.
    fn comes_soon(&self, source: u64) -> bool;
    /// Which pages in these ranges (first address, number of pages) have content?
    fn survey(&mut self, ranges: Vec<(u64, u64)>);
    /// Nobody here needs it any more. It answers [`Arrival::Released`], if need be after a new connection.
    fn release(&mut self);
    /// Sends what has been asked for.
    fn flush(&mut self);
    /// What to wait for, besides the bell, which is rung for what comes in bulk: calls `add` for each descriptor.
    fn poll_set<'a>(&'a self, add: &mut dyn FnMut(BorrowedFd<'a>, PollFlags));
    /// Something is there to be taken without waiting (`bulk`: that counts).
    fn is_ready(&self, bulk: bool) -> bool;
    /// When it wants [`Store::tick`], whatever arrives.
    fn next_tick(&self) -> Option<Duration>;
    /// Time has passed.
    fn tick(&mut self, now: Instant);
    /// The next thing that arrived, of what was asked for `urgency`.
    fn take(&mut self, urgency: Urgency, pool: &mut Pool) -> Option<Arrival>;
}
