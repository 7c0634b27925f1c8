//! One address space: its events, its faults, and the installation of pages.
//!
//! Invariants: a page is settled in the map only after the kernel has it; an installation that the kernel refuses
//! because the space is changing is decided again after the events have been read, never repeated blindly; every thread
//! that waits is woken by an installation or by a wake.

use super::journal::{Journal, apply};
use super::stats::Shared;
use dunlin_cluster::page_map::{PAGE, PageMap, Place, Want};
use dunlin_proto::ids::ImageId;
use dunlin_sys::uffd::{Change, Event, Installed, Stop, Uffd, UffdError};
use dunlin_sys::vmcopy;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// So many pages of zeros are installed around one that is wanted.
const ZERO_CLUSTER: u64 = 16;
/// The first and the largest number of pages fetched ahead of a fault.
const AHEAD: (u64, u64) = (8, 256);
/// A fault so many bytes beyond what was fetched still belongs to the stream.
const AHEAD_GAP: u64 = 16 * PAGE;
/// So many streams of faults are followed at once.
const STREAMS: usize = 4;

/// One address space.
pub(super) struct Space {
    pub(super) uffd: Uffd,
    pub(super) map: PageMap,
    pub(super) shared: Arc<Shared>,
    journal: Journal,
    /// Pages that threads wait for, and since when.
    waiting: BTreeMap<u64, Instant>,
    /// Some that wait may be answered without any store.
    pub(super) recheck: bool,
    streams: [Stream; STREAMS],
    unregistered: bool,
    /// Its program does not run yet: what is there is overwritten.
    pub(super) ahead: Option<File>,
    /// Counts the changes of the space that have been applied.
    changes: u64,
    /// This page was in no registered mapping when the space had changed so many times.
    strike: Option<(u64, u64)>,
}

/// How an installation or a resolution ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// There is nothing left to do.
    Done,
    /// The space is changing: read events, then decide again.
    Changing,
    /// There is no memory: try again a little later.
    Short,
    /// The space is gone.
    Gone,
}

/// What a fault needs.
pub(super) enum Need {
    /// Nothing (or a recheck later).
    Nothing,
    /// This page; `asked` if it is on its way.
    Page { image: ImageId, source: u64, asked: bool },
    /// The space is gone.
    Gone,
}

/// What came out of the userfaultfd.
#[derive(Default)]
pub(super) struct Happened {
    /// Pages that threads wait for.
    pub(super) faults: Vec<u64>,
    /// Children, each with its map.
    pub(super) children: Vec<(Uffd, PageMap)>,
    /// How many messages there were.
    pub(super) messages: usize,
}

/// Faults that follow one another: from the last one to the end of what has been asked for.
#[derive(Clone, Copy, Default)]
struct Stream {
    start: u64,
    end: u64,
    pages: u64,
}

impl Space {
    pub(super) fn new(uffd: Uffd, map: PageMap, shared: Arc<Shared>, journal: Journal) -> Space {
        Space {
            uffd,
            map,
            shared,
            journal,
            waiting: BTreeMap::new(),
            recheck: false,
            streams: [Stream::default(); STREAMS],
            unregistered: false,
            ahead: None,
            changes: 0,
            strike: None,
        }
    }

    /// Reads a batch of messages and applies the changes among them, in order and before the faults: the kernel hands
    /// out faults first, even those that follow from a change.
    pub(super) fn read_events(&mut self) -> Result<Happened, UffdError> {
        // The last batch has been dealt with.
        self.journal.tidy(&self.map);
        let mut events = Vec::new();
        let mut happened = Happened {
            messages: self.uffd.read_by(&mut self.journal.tape, &mut events)?,
            ..Happened::default()
        };
        let now = Instant::now();
        let mut faults = Vec::new();
        for event in events {
            match event {
                Event::Fault { address, .. } => faults.push(address & !(PAGE - 1)),
                Event::Fork { child } => {
                    self.changes += 1;
                    happened.children.push((child, self.map.clone()));
                }
                Event::Remap { from, to, len } => {
                    self.change(Change::Remap { from, to, len });
                    self.wake_range(from, from.saturating_add(len));
                }
                Event::Remove { start, end } => {
                    self.change(Change::Remove { start, end });
                    self.recheck = true;
                }
                Event::Unmap { start, end } => {
                    self.change(Change::Unmap { start, end });
                    self.wake_range(start, end);
                }
            }
        }
        for page in faults {
            self.waiting.entry(page).or_insert(now);
            happened.faults.push(page);
        }
        Ok(happened)
    }

    fn change(&mut self, change: Change) {
        self.changes += 1;
        apply(&mut self.map, change);
        self.journal.changed(change, &self.map);
    }

    /// A child of it is safe in other hands, too.
    pub(super) fn bore(&mut self) {
        self.journal.changed(Change::Fork, &self.map);
    }

    /// Nothing is wanted of an image any more.
    pub(super) fn done_with(&mut self, image: ImageId) {
        self.journal.done_with(image, &self.map);
    }

    /// Has those ask again whose faults a former pager has read.
    pub(super) fn ask_anew(&self) {
        // It fails only if the space is gone, and then nobody waits.
        let _ = self.uffd.wake_all();
    }

    /// Whoever waits in a range that is no longer what it was tries again and finds out.
    fn wake_range(&mut self, start: u64, end: u64) {
        let pages: Vec<u64> = self.waiting.range(start..end).map(|(page, _)| *page).collect();
        for page in pages {
            self.give_up_on(page);
        }
    }

    /// Lets those who wait for a page try again. They fault once more if they still need it.
    fn give_up_on(&mut self, page: u64) {
        self.waiting.remove(&page);
        // It fails only if the space is gone, and then nobody waits.
        let _ = self.uffd.wake(page, PAGE);
    }

    /// Answers a fault, or says what it needs.
    pub(super) fn resolve(&mut self, page: u64) -> Result<Need, UffdError> {
        match self.map.lookup(page) {
            Place::Away { image, source, asked } => Ok(Need::Page { image, source, asked }),
            Place::NotAway => Ok(match self.zero(page)? {
                Outcome::Done => Need::Nothing,
                Outcome::Changing | Outcome::Short => {
                    self.recheck = true;
                    Need::Nothing
                }
                Outcome::Gone => Need::Gone,
            }),
        }
    }

    /// Those who wait for pages.
    pub(super) fn waiting(&self) -> impl Iterator<Item = u64> + '_ {
        self.waiting.keys().copied()
    }

    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// A page that is not elsewhere is wanted: the kernel knows whether it is here (then it says so) or zeros.
    fn zero(&mut self, page: u64) -> Result<Outcome, UffdError> {
        let mut pages = self.map.not_away_run(page, ZERO_CLUSTER).max(1);
        loop {
            let Installed { bytes, stopped } = self.uffd.zero(page, pages * PAGE)?;
            if bytes >= PAGE {
                self.waiting.remove(&page);
                self.shared.zeroed.fetch_add(bytes / PAGE, Ordering::Relaxed);
                return Ok(Outcome::Done);
            }
            match stopped {
                Some(Stop::Gone) => return Ok(Outcome::Gone),
                Some(Stop::Changing) => return Ok(Outcome::Changing),
                Some(Stop::NoMemory) => return Ok(Outcome::Short),
                // The cluster may cross the end of a mapping.
                Some(Stop::NotRegistered) if pages > 1 => pages = 1,
                Some(Stop::NotRegistered) if !self.strikes(page) => return Ok(Outcome::Changing),
                Some(Stop::NotRegistered | Stop::Exists) | None => {
                    self.give_up_on(page);
                    return Ok(Outcome::Done);
                }
            }
        }
    }

    /// ENOENT can come before the event that explains it. Only if it comes again, and no change was read between, is
    /// the page truly in no mapping of ours: while an event is unread the kernel answers EAGAIN first.
    fn strikes(&mut self, page: u64) -> bool {
        let this = Some((page, self.changes));
        let twice = self.strike == this;
        self.strike = if twice { None } else { this };
        twice
    }

    /// Installs what arrived, as far as this space still lacks it. `data` holds the pages of `present` one after
    /// another.
    pub(super) fn install(&mut self, want: Want, present: u64, data: &[u8]) -> Result<Outcome, UffdError> {
        for target in self.map.targets(want) {
            let mut done = 0;
            while done < target.pages {
                let bit = target.bit + done as u32;
                let address = target.address + done * PAGE;
                let here = present >> bit;
                let run = if here & 1 == 1 {
                    here.trailing_ones()
                } else {
                    here.trailing_zeros()
                };
                let run = u64::from(run).min(target.pages - done);
                if here & 1 == 1 {
                    let before = (present & ((1 << bit) - 1)).count_ones() as usize;
                    let data = &data[before * PAGE as usize..][..(run * PAGE) as usize];
                    match self.copy(address, data)? {
                        Outcome::Done => {}
                        other => return Ok(other),
                    }
                } else {
                    self.map.settle(address, run);
                    self.recheck = true;
                }
                done += run;
            }
        }
        Ok(Outcome::Done)
    }

    fn copy(&mut self, address: u64, data: &[u8]) -> Result<Outcome, UffdError> {
        // So much at once; less after the kernel said that a mapping ends inside.
        let mut chunk = data.len();
        let mut done = 0;
        while done < data.len() {
            let at = address + done as u64;
            let part = &data[done..(done + chunk).min(data.len())];
            let Installed { bytes, stopped } = self.uffd.copy(at, part)?;
            if bytes > 0 {
                self.settle_installed(at, bytes / PAGE);
                done += bytes as usize;
                // A partial copy does not say why it stopped; going on does.
                continue;
            }
            match stopped {
                Some(Stop::Gone) => return Ok(Outcome::Gone),
                Some(Stop::Changing) => return Ok(Outcome::Changing),
                Some(Stop::NoMemory) => return Ok(Outcome::Short),
                Some(Stop::NotRegistered) if part.len() > PAGE as usize => {
                    chunk = (part.len() / PAGE as usize / 2).max(1) * PAGE as usize;
                }
                Some(Stop::NotRegistered) if !self.strikes(at) => return Ok(Outcome::Changing),
                Some(Stop::Exists) if self.ahead.is_some() => {
                    let over = &part[..PAGE as usize];
                    if self
                        .ahead
                        .as_ref()
                        .is_some_and(|memory| vmcopy::write(memory, at, over).is_err())
                    {
                        return Ok(Outcome::Gone);
                    }
                    self.settle_installed(at, 1);
                    done += PAGE as usize;
                    chunk = data.len();
                }
                // It is here already (a guard page, for one), or can never be: nobody waits for this copy.
                Some(Stop::NotRegistered | Stop::Exists) | None => {
                    self.map.settle(at, 1);
                    self.give_up_on(at);
                    done += PAGE as usize;
                    chunk = data.len();
                }
            }
        }
        Ok(Outcome::Done)
    }

    fn settle_installed(&mut self, address: u64, pages: u64) {
        self.map.settle(address, pages);
        let end = address + pages * PAGE;
        let mut faulted = 0;
        while let Some((&page, since)) = self.waiting.range(address..end).next() {
            self.shared.waits.record(since.elapsed());
            self.waiting.remove(&page);
            faulted += 1;
        }
        self.shared.faulted.fetch_add(faulted, Ordering::Relaxed);
        self.shared.pushed.fetch_add(pages - faulted, Ordering::Relaxed);
    }

    /// Up to which address to fetch along with the page at `page`. Nothing more than that page, unless the program goes
    /// through its memory in order; then twice as far each time.
    pub(super) fn read_ahead(&mut self, page: u64) -> u64 {
        let after = page + PAGE;
        let Some(known) = self
            .streams
            .iter()
            .position(|s| (s.start..=s.end + AHEAD_GAP).contains(&page))
        else {
            self.streams.rotate_right(1);
            self.streams[0] = Stream {
                start: page,
                end: after,
                pages: 0,
            };
            return after;
        };
        let stream = &mut self.streams[known];
        stream.start = page;
        // Still in the first half of what is on its way: that is enough.
        if stream.end.saturating_sub(page) / PAGE <= stream.pages.div_ceil(2) {
            stream.pages = (stream.pages * 2).clamp(AHEAD.0, AHEAD.1);
            stream.end = stream.end.max(after) + stream.pages * PAGE;
        }
        stream.end
    }

    /// Stops watching, all pages being here. What grew unseen (a stack, an mremap) is found in the maps of the process,
    /// if that is known; otherwise it is unwatched when the last descriptor of this userfaultfd is closed.
    pub(super) fn unregister(&mut self) {
        assert!(
            self.map.is_drained(),
            "unwatching what is elsewhere turns it into zeros"
        );
        if std::mem::replace(&mut self.unregistered, true) {
            return;
        }
        let mut ranges: Vec<(u64, u64)> = self.map.regions().map(|(s, pages)| (s, pages * PAGE)).collect();
        let maps = self
            .shared
            .status()
            .pid
            .map(|pid| std::fs::read_to_string(format!("/proc/{pid}/maps")));
        ranges.extend(maps.into_iter().flatten().flat_map(|maps| anonymous(&maps)));
        for (start, len) in ranges {
            // Mappings that cannot be watched, or changed meanwhile, are refused: nothing is left to do there.
            if let Err(error) = self.uffd.unregister(start, len) {
                tracing::trace!(%error, "not unwatched");
            }
        }
    }
}

/// Start and length of the private anonymous mappings in the text of `/proc/PID/maps`. Should the process not be the
/// right one any more: the descriptor knows its own address space, all of which is to be unwatched.
fn anonymous(maps: &str) -> Vec<(u64, u64)> {
    let mapping = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        let private = words.next()?.ends_with('p');
        let no_file = words.nth(2)? == "0";
        (private && no_file).then_some((start, end - start))
    };
    maps.lines().filter_map(mapping).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn anonymous_mappings_are_told_from_files() {
        let maps = "555500000000-555500001000 r--p 00000000 fe:00 1234   /usr/bin/x\n\
                    7f0000000000-7f0000002000 rw-p 00000000 00:00 0 \n\
                    7f0000002000-7f0000003000 rw-s 00000000 00:00 0 \n\
                    7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0  [stack]\n";
        assert_eq!(
            super::anonymous(maps),
            [(0x7f00_0000_0000, 0x2000), (0x7ffc_0000_0000, 0x21000)]
        );
    }
}
