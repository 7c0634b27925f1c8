//! What must be known of an address space when the daemon that serves it is killed.
//!
//! Owns the form of that knowledge: the page map as it was once, and what changed it since, on a
//! [`Tape`](dunlin_sys::tape) that somebody else holds too. Refuses to know who. Which pages have been installed since is
//! not in it: the kernel knows, and refuses to install them again. Invariants: a change is on the tape when the program
//! that made it goes on, since the kernel writes its messages there; a page that was dropped is never wanted again, and
//! one that is elsewhere never forgotten.

use dunlin_cluster::page_map::{MapError, PAGE, PageMap};
use dunlin_proto::ids::ImageId;
use dunlin_proto::pages::{ClientId, MapImage};
use dunlin_sys::pagemap::{self, Query};
use dunlin_sys::tape::Tape;
use dunlin_sys::uffd::{Change, changes};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;

/// A log shorter than this, or than a few times what it began with, is not written anew.
const SHORT_BYTES: usize = 1 << 20;
const TIMES_LONGER: usize = 4;

/// One entry of the log.
#[derive(Debug, Serialize, Deserialize)]
enum Record {
    /// Whose claim keeps the images, the whole map, and every image that expects to be released.
    Begin(u64, MapImage, Vec<ImageId>),
    Remap(u64, u64, u64),
    Remove(u64, u64),
    Unmap(u64, u64),
    /// It was forked, and the child has a journal of its own.
    Forked,
    /// Nothing is wanted of this image any more: it may be gone.
    Done(ImageId),
}

/// Why a journal cannot be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// It cannot be read.
    #[error("the journal of an address space: {0}")]
    Unreadable(#[from] io::Error),
    /// It makes no sense.
    #[error("the journal of an address space is not sound: {0}")]
    Unsound(String),
}

impl From<MapError> for JournalError {
    fn from(error: MapError) -> Self {
        JournalError::Unsound(error.to_string())
    }
}

/// The journal of one address space.
#[derive(Debug)]
pub struct Journal {
    pub(super) tape: Tape,
    client: ClientId,
    /// How long the log was when it was written anew.
    begun_bytes: usize,
}

/// What a journal tells after the death of who wrote it.
#[derive(Debug)]
pub struct Told {
    /// The map, without what was installed.
    pub map: PageMap,
    /// Children whose descriptors died with the daemon: so many were born in its last moment.
    pub lost_children: usize,
}

impl Journal {
    /// Begins one. `client` is in whose name the images are claimed.
    pub fn begin(client: ClientId, map: &PageMap) -> io::Result<Journal> {
        let mut journal = Journal {
            tape: Tape::new()?,
            client,
            begun_bytes: 0,
        };
        journal.renew(map).map_err(io::Error::other)?;
        Ok(journal)
    }

    /// Goes on with one whose writer is dead.
    pub fn take_up(memfd: OwnedFd) -> Result<(Journal, Told), JournalError> {
        let tape = Tape::open(memfd)?;
        let log = tape.log();
        let (landed, base) = match tape.landed() {
            Some((landed, base)) => (changes(&landed), base),
            None => (Vec::new(), log.len()),
        };
        // What follows from the last read is told by the read itself, and may be half written down.
        let before = if landed.is_empty() { log.len() } else { base };
        let mut born = 0;
        for record in entries(&log[before..]).flatten() {
            born += usize::from(matches!(record, Record::Forked));
        }
        let mut client = None;
        let mut map = PageMap::new();
        for record in entries(&log[..before]) {
            match record? {
                Record::Begin(whose, image, images) => {
                    client = Some(ClientId(whose));
                    map = PageMap::from_image(&image)?;
                    images.into_iter().for_each(|image| map.expect(image));
                }
                Record::Done(image) => map.keep_only(image, 0, u64::MAX, &[]),
                Record::Forked => {}
                Record::Remap(from, to, len) => apply(&mut map, Change::Remap { from, to, len }),
                Record::Remove(start, end) => apply(&mut map, Change::Remove { start, end }),
                Record::Unmap(start, end) => apply(&mut map, Change::Unmap { start, end }),
            }
        }
        let forks = landed.iter().filter(|change| **change == Change::Fork).count();
        landed.into_iter().for_each(|change| apply(&mut map, change));
        let client = client.ok_or_else(|| JournalError::Unsound("it has no beginning".into()))?;
        let mut journal = Journal {
            tape,
            client,
            begun_bytes: 0,
        };
        journal.renew(&map)?;
        let lost_children = forks.saturating_sub(born);
        Ok((journal, Told { map, lost_children }))
    }

    /// In whose name the images are claimed.
    pub fn client(&self) -> ClientId {
        self.client
    }

    /// Writes down a change that has been read and applied.
    pub(super) fn changed(&mut self, change: Change, map: &PageMap) {
        let record = match change {
            Change::Fork => Record::Forked,
            Change::Remap { from, to, len } => Record::Remap(from, to, len),
            Change::Remove { start, end } => Record::Remove(start, end),
            Change::Unmap { start, end } => Record::Unmap(start, end),
        };
        self.note(&record, map);
    }

    /// Writes down that an image is of no further use, before it is told so.
    pub(super) fn done_with(&mut self, image: ImageId, map: &PageMap) {
        self.note(&Record::Done(image), map);
    }

    /// Begins anew when what was noted outgrows the map; not before the batch it belongs to has been dealt with.
    pub(super) fn tidy(&mut self, map: &PageMap) {
        if self.tape.len() > SHORT_BYTES.max(TIMES_LONGER * self.begun_bytes)
            && let Err(error) = self.renew(map)
        {
            tracing::error!(%error, "the journal of an address space grows");
        }
    }

    fn note(&mut self, record: &Record, map: &PageMap) {
        let bytes = postcard::to_stdvec(record).unwrap_or_default();
        let framed = [&(bytes.len() as u32).to_le_bytes()[..], &bytes].concat();
        if self.tape.append(&framed).is_err()
            && let Err(error) = self.renew(map)
        {
            tracing::error!(%error, "a change of an address space would be forgotten if this daemon were killed");
        }
    }

    fn renew(&mut self, map: &PageMap) -> io::Result<()> {
        let begin = Record::Begin(self.client.0, map.to_image(), map.images().collect());
        let bytes = postcard::to_stdvec(&begin).map_err(io::Error::other)?;
        let framed = [&(bytes.len() as u32).to_le_bytes()[..], &bytes].concat();
        self.begun_bytes = framed.len();
        self.tape.replace(&framed).map_err(io::Error::other)
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tape.as_fd()
    }
}

/// What a change makes of a map.
pub(super) fn apply(map: &mut PageMap, change: Change) {
    match change {
        Change::Fork => {}
        Change::Remap { from, to, len } => map.remap(from, to, len),
        Change::Remove { start, end } => map.settle(start, (end - start) / PAGE),
        Change::Unmap { start, end } => map.unmap(start, end),
    }
}

/// Settles what is in memory already, as the page tables of the process tell: it need not travel again.
pub(super) fn settle_present(map: &mut PageMap, pagemap: &File) -> io::Result<()> {
    for (start, pages) in map.regions().collect::<Vec<_>>() {
        for range in pagemap::scan(pagemap, start, start + pages * PAGE, Query::HERE) {
            let range = range.map_err(io::Error::from)?;
            map.settle(range.start, (range.end - range.start) / PAGE);
        }
    }
    Ok(())
}

fn entries(log: &[u8]) -> impl Iterator<Item = Result<Record, JournalError>> + '_ {
    let mut rest = log;
    std::iter::from_fn(move || {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let Some((bytes, after)) = after.split_at_checked(u32::from_le_bytes(*length) as usize) else {
            rest = &[];
            return Some(Err(JournalError::Unsound("it ends in the middle".into())));
        };
        rest = after;
        Some(postcard::from_bytes(bytes).map_err(|e| JournalError::Unsound(e.to_string())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_proto::ids::Slot;

    const IMAGE: ImageId = ImageId {
        holder: Slot(3),
        nonce: 9,
    };

    fn map() -> PageMap {
        let mut map = PageMap::new();
        map.add_region(0x10_0000, 64).unwrap();
        map.back_with(0x10_0000, 64, IMAGE, 0x10_0000).unwrap();
        map
    }

    fn again(journal: &Journal) -> (Journal, Told) {
        Journal::take_up(journal.as_fd().try_clone_to_owned().unwrap()).unwrap()
    }

    /// A message of a userfaultfd.
    fn message(kind: u8, words: [u64; 3]) -> Vec<u8> {
        let mut bytes = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        words.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
        bytes
    }

    #[test]
    fn changes_are_told_again() {
        let mut map = map();
        let mut journal = Journal::begin(ClientId(7), &map).unwrap();
        for change in [
            Change::Remove {
                start: 0x10_0000,
                end: 0x10_4000,
            },
            Change::Remap {
                from: 0x11_0000,
                to: 0x90_0000,
                len: 0x2000,
            },
            Change::Unmap {
                start: 0x12_0000,
                end: 0x12_3000,
            },
        ] {
            apply(&mut map, change);
            journal.changed(change, &map);
        }
        let (mut journal, told) = again(&journal);
        assert_eq!((journal.client(), told.lost_children), (ClientId(7), 0));
        assert_eq!(told.map.to_image(), map.to_image());
        assert_eq!(told.map.pages_away(), 64 - 4 - 3);
        journal.done_with(IMAGE, &map);
        let (_, told) = again(&journal);
        assert!(told.map.is_drained());
        assert_eq!(
            told.map.images().collect::<Vec<_>>(),
            [IMAGE],
            "it is to be released all the same"
        );
    }

    #[test]
    fn what_landed_counts_once_however_far_it_was_written_down() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        for written in 0..=2 {
            let mut map = map();
            let mut journal = Journal::begin(ClientId(7), &map).unwrap();
            let remap = Change::Remap {
                from: 0x10_0000,
                to: 0x90_0000,
                len: 0x1000,
            };
            let messages = [message(0x14, [0x10_0000, 0x90_0000, 0x1000]), message(0x13, [99, 0, 0])];
            rustix::io::write(&writer, &messages.concat()).unwrap();
            journal.tape.land(&reader).unwrap();
            apply(&mut map, remap);
            for change in [remap, Change::Fork].into_iter().take(written) {
                journal.changed(change, &map);
            }
            let (journal, told) = again(&journal);
            assert_eq!(told.map.to_image(), map.to_image(), "{written} written");
            assert_eq!(told.lost_children, usize::from(written < 2));
            let (_, told) = again(&journal);
            assert_eq!((told.map.to_image(), told.lost_children), (map.to_image(), 0));
        }
    }

    #[test]
    fn a_long_journal_is_begun_anew() {
        let mut map = map();
        let mut journal = Journal::begin(ClientId(7), &map).unwrap();
        for i in 0..100_000u64 {
            let start = 0x10_0000 + i % 60 * PAGE;
            let change = Change::Remove {
                start,
                end: start + PAGE,
            };
            apply(&mut map, change);
            journal.changed(change, &map);
            journal.tidy(&map);
        }
        assert!(journal.tape.len() < 2 * SHORT_BYTES);
        assert_eq!(again(&journal).1.map.to_image(), map.to_image());
    }
}
