//! The messages of a userfaultfd.

use super::{Uffd, UffdError};
use std::os::fd::{FromRawFd, OwnedFd};

/// Bytes of one message.
pub(super) const MESSAGE_BYTES: usize = 32;

/// Why a fault was raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The page does not exist.
    Missing,
    /// It exists in the file.
    Minor,
    /// It is write-protected.
    WriteProtect,
}

/// One message.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page. It is woken by whatever installs one there, or by [`Uffd::wake`].
    Fault {
        /// The page's address.
        address: u64,
        /// It was a write.
        write: bool,
        /// Why.
        kind: FaultKind,
    },
    /// The process forked; the caller of fork waits until this is read.
    Fork {
        /// The child's address space, registered as its parent's was.
        child: Uffd,
    },
    /// A range moved; the caller of mremap waits until this is read. An `Unmap` of the old range follows, unless it
    /// was kept (`MREMAP_DONTUNMAP`).
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// How long it was, in bytes.
        len: u64,
    },
    /// The range's pages are about to be dropped; the caller of madvise waits until this is read.
    Remove {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// The range is no longer mapped; the caller waits until this is read.
    Unmap {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
}

/// A change of an address space, as a message tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It was forked.
    Fork,
    /// As [`Event::Remap`].
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// How long it was, in bytes.
        len: u64,
    },
    /// As [`Event::Remove`].
    Remove {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// As [`Event::Unmap`].
    Unmap {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
}

/// The changes among messages that a process read which is dead by now (a fork's descriptor died with it).
pub fn changes(messages: &[u8]) -> Vec<Change> {
    messages.chunks_exact(MESSAGE_BYTES).filter_map(change).collect()
}

fn word(message: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(message[at..at + 8].try_into().expect("a message has 32 bytes"))
}

/// `None` for what is no change.
fn change(message: &[u8]) -> Option<Change> {
    Some(match message[0] {
        0x13 => Change::Fork,
        0x14 => Change::Remap {
            from: word(message, 8),
            to: word(message, 16),
            len: word(message, 24),
        },
        0x15 => Change::Remove {
            start: word(message, 8),
            end: word(message, 16),
        },
        0x16 => Change::Unmap {
            start: word(message, 8),
            end: word(message, 16),
        },
        _ => return None,
    })
}

/// `None` for a kind that was not negotiated.
pub(super) fn parse(message: &[u8]) -> Result<Option<Event>, UffdError> {
    if message[0] == 0x12 {
        let flags = word(message, 8);
        return Ok(Some(Event::Fault {
            address: word(message, 16),
            write: flags & 1 != 0,
            kind: match flags & 6 {
                0 => FaultKind::Missing,
                4 => FaultKind::Minor,
                _ => FaultKind::WriteProtect,
            },
        }));
    }
    // Only what was negotiated is sent.
    let Some(change) = change(message) else { return Ok(None) };
    Ok(Some(match change {
        Change::Fork => {
            let number = word(message, 8) as u32 as i32;
            // SAFETY: the kernel has put this new descriptor into our table for this message; nobody else knows it.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            Event::Fork {
                child: Uffd::from_fd(fd)?,
            }
        }
        Change::Remap { from, to, len } => Event::Remap { from, to, len },
        Change::Remove { start, end } => Event::Remove { start, end },
        Change::Unmap { start, end } => Event::Unmap { start, end },
    }))
}
