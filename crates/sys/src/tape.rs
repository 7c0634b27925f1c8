//! A log in shared memory that outlives its writer, and a place where the kernel writes what it hands over only once.
//!
//! Owns the layout of a memfd: one word that says which half holds the log and how long it is, a *landing* for one read,
//! and the two halves. Refuses to know what is logged. Invariants: a writer that is killed leaves the log as it was
//! before or after an append, never between; what a [`read`](Tape::land) took from the kernel is in the landing before
//! anyone who waited for that read goes on: SIGKILL does not interrupt the copying, as the page is resident. Whoever
//! else holds the descriptor reads all of it after the writer's death.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mlock, mmap, munmap};
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

const MAGIC: u64 = 0x6570_6174_6e6c_6e64;
const STATE_AT: usize = 8;
const BASE_AT: usize = 16;
const LANDING_AT: usize = 64;
/// So many bytes can be read at once into the landing.
pub const LANDING_BYTES: usize = 512;
const HALVES_AT: usize = 4096;
/// Address space for one half; memory is taken only where something is written.
const HALF_BYTES: usize = 64 << 20;
const BYTES: usize = HALVES_AT + 2 * HALF_BYTES;
/// In the state word: the second half is the log.
const SECOND: u64 = 1 << 63;

/// The log would not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a log of more than {} MiB", HALF_BYTES >> 20)]
pub struct TapeFull;

/// A log and its landing.
#[derive(Debug)]
pub struct Tape {
    memory: NonNull<u8>,
    memfd: OwnedFd,
}

// SAFETY: the mapping belongs to the tape alone; moving it to another thread moves the only handle.
unsafe impl Send for Tape {}

impl Tape {
    /// An empty one.
    pub fn new() -> io::Result<Tape> {
        let memfd = memfd_create("dunlin-tape", MemfdFlags::CLOEXEC)?;
        ftruncate(&memfd, BYTES as u64)?;
        let tape = Tape::map(memfd)?;
        tape.word(0).store(MAGIC, Ordering::Relaxed);
        // Written once, so that it is resident; with swap it stays so only if it is locked, which may be forbidden.
        tape.write(LANDING_AT, &[0; LANDING_BYTES]);
        // SAFETY: the first page of this tape's own mapping.
        let _ = unsafe { mlock(tape.memory.as_ptr().cast(), HALVES_AT) };
        Ok(tape)
    }

    /// One that another process has written.
    pub fn open(memfd: OwnedFd) -> io::Result<Tape> {
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "a descriptor that is no tape");
        if fstat(&memfd)?.st_size != BYTES as i64 {
            return Err(malformed());
        }
        let tape = Tape::map(memfd)?;
        let state = tape.state();
        if tape.word(0).load(Ordering::Relaxed) != MAGIC || (state & !SECOND) as usize > HALF_BYTES {
            return Err(malformed());
        }
        Ok(tape)
    }

    fn map(memfd: OwnedFd) -> io::Result<Tape> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe { mmap(std::ptr::null_mut(), BYTES, protection, MapFlags::SHARED, &memfd, 0)? };
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Tape { memory, memfd })
    }

    /// How long the log is.
    pub fn len(&self) -> usize {
        (self.state() & !SECOND) as usize
    }

    /// Is nothing logged?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds bytes to the log.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), TapeFull> {
        let (state, len) = (self.state(), self.len());
        if len + bytes.len() > HALF_BYTES {
            return Err(TapeFull);
        }
        self.write(half(state) + len, bytes);
        self.word(STATE_AT).store(state + bytes.len() as u64, Ordering::Release);
        Ok(())
    }

    /// Puts other bytes in the place of the whole log.
    pub fn replace(&mut self, bytes: &[u8]) -> Result<(), TapeFull> {
        if bytes.len() > HALF_BYTES {
            return Err(TapeFull);
        }
        let before = self.state();
        let after = (before ^ SECOND) & SECOND;
        self.write(half(after), bytes);
        self.word(STATE_AT).store(after | bytes.len() as u64, Ordering::Release);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // It only gives memory back.
        let _ = fallocate(&self.memfd, hole, half(before) as u64, HALF_BYTES as u64);
        Ok(())
    }

    /// The log.
    pub fn log(&self) -> Vec<u8> {
        self.read(half(self.state()), self.len())
    }

    /// Reads from a descriptor into the landing, and hands out a copy. What was there before is gone; it has been dealt
    /// with, or so the caller says by reading on.
    pub fn land(&mut self, from: impl AsFd) -> Result<Vec<u8>, rustix::io::Errno> {
        self.write(LANDING_AT, &[0; LANDING_BYTES]);
        compiler_fence(Ordering::SeqCst);
        self.word(BASE_AT).store(self.state(), Ordering::Release);
        compiler_fence(Ordering::SeqCst);
        // SAFETY: the landing lies inside this tape's own mapping, which `self` borrows mutably.
        let landing = unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr().add(LANDING_AT), LANDING_BYTES) };
        let read = rustix::io::read(from, &mut *landing)?;
        Ok(landing[..read].to_vec())
    }

    /// After the writer's death: what lies in the landing, zeros behind it, and how long the log was when it was read.
    /// `None`: the log has been replaced since, after the landing was dealt with.
    pub fn landed(&self) -> Option<(Vec<u8>, usize)> {
        let base = self.word(BASE_AT).load(Ordering::Acquire);
        let of_this_log = base & SECOND == self.state() & SECOND && (base & !SECOND) as usize <= self.len();
        of_this_log.then(|| (self.read(LANDING_AT, LANDING_BYTES), (base & !SECOND) as usize))
    }

    fn state(&self) -> u64 {
        self.word(STATE_AT).load(Ordering::Acquire)
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        // SAFETY: an aligned word of the first page of the mapping, which lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().add(at).cast()) }
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= BYTES, "a write past the tape");
        // SAFETY: the range lies inside the mapping (asserted).
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.as_ptr().add(at), bytes.len()) };
    }

    fn read(&self, at: usize, length: usize) -> Vec<u8> {
        assert!(at + length <= BYTES, "a read past the tape");
        let mut bytes = vec![0; length];
        // SAFETY: the range lies inside the mapping (asserted), and `bytes` is as long.
        unsafe { std::ptr::copy_nonoverlapping(self.memory.as_ptr().add(at), bytes.as_mut_ptr(), length) };
        bytes
    }
}

impl AsFd for Tape {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

impl Drop for Tape {
    fn drop(&mut self) {
        // SAFETY: this mapping was made in `map` and nobody else has its address.
        let _ = unsafe { munmap(self.memory.as_ptr().cast(), BYTES) };
    }
}

fn half(state: u64) -> usize {
    if state & SECOND == 0 {
        HALVES_AT
    } else {
        HALVES_AT + HALF_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_opens_it_reads_what_was_written_and_landed() {
        let mut tape = Tape::new().unwrap();
        tape.append(b"one").unwrap();
        tape.append(b"two").unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&writer, b"landed").unwrap();
        assert_eq!(tape.land(&reader).unwrap(), b"landed");
        tape.append(b"three").unwrap();
        let other = Tape::open(tape.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(other.log(), b"onetwothree");
        let (landed, base) = other.landed().unwrap();
        assert_eq!((&landed[..7], base), (&b"landed\0"[..], 6));
        tape.replace(b"all").unwrap();
        assert_eq!((other.log(), other.landed()), (b"all".to_vec(), None));
        rustix::io::write(&writer, b"x").unwrap();
        tape.land(&reader).unwrap();
        tape.append(b"!").unwrap();
        let (landed, base) = other.landed().unwrap();
        assert_eq!((&landed[..3], base, other.len()), (&b"x\0\0"[..], 3, 4));
    }

    #[test]
    fn another_file_is_none() {
        let other = memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
        assert!(Tape::open(other).is_err());
    }
}
