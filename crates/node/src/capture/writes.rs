//! Writes to pipes that our stop has cut short.
//!
//! A write(2) to a full pipe that blocks ends, when its thread is stopped, with what it has written so far. That is as
//! SIGSTOP would have it, but the program was sent none, and some lose the rest (CPython's buffered writer does). Owns
//! the completion of such a call before the program can see it: what fits is written for the thread, through a description
//! of our own that does not block; if the pipe is full it is given room for the rest, and keeps its larger capacity.
//! Refuses to let anybody block: where there is no room to be had ([`MOST`]) the write stays short. See pipe(7),
//! F_SETPIPE_SZ in fcntl(2).

use crate::descriptors::pipe::{MOST, resize};
use dunlin_sys::foothold::take_descriptor;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::fdinfo::FdInfo;
use dunlin_sys::ptrace::{Registers, Stopped, TraceError};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::fcntl_getpipe_size;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

const SYS_WRITE: i64 = 1;
const SYS_WRITEV: i64 = 20;
const O_NONBLOCK: u32 = 0o4000;
const PAGE: u64 = 4096;
const IOV_MAX: u64 = 1024;

/// Copied at once.
const PIECE: u64 = 64 << 10;

/// Completes the write that a stopped thread was in, if it was in one, and corrects the answer in `registers`. `at` is a
/// `syscall` instruction; the thread's signals are blocked, and its registers are whatever comes of the calls.
pub fn complete(
    thread: Stopped,
    host: i32,
    at: u64,
    registers: &mut Registers,
    memory: &File,
) -> Result<Stopped, TraceError> {
    let Some(rest) = rest(registers, memory) else {
        return Ok(thread);
    };
    let fd = registers.rdi as i32;
    let Some(pipe) = blocking_pipe(host, fd) else {
        return Ok(thread);
    };
    let done = push(&pipe, memory, &rest);
    registers.rax += done;
    let rest = after(rest, done);
    let wanted: u64 = rest.iter().map(|(_, length)| length).sum();
    if wanted == 0 {
        return Ok(thread);
    }
    // What is left is in memory that is elsewhere: the thread itself can wait for it.
    let mut room = enlarge(&pipe, wanted).unwrap_or(0);
    let mut thread = thread;
    for (address, length) in rest {
        let length = length.min(room);
        if length == 0 {
            break;
        }
        let (stopped, answer) = thread.inject(at, SYS_WRITE, [fd as u64, address, length, 0, 0, 0])?;
        thread = stopped;
        if answer <= 0 {
            break;
        }
        registers.rax += answer as u64;
        room -= answer as u64;
        if (answer as u64) < length {
            break;
        }
    }
    if is_short(registers, memory) {
        tracing::warn!(
            host,
            fd,
            "a write to a pipe that a stop has cut short stays short: the pipe cannot be made larger"
        );
    }
    Ok(thread)
}

/// Writes buffers of a process into a pipe, enlarging it as long as that can be; how many bytes were written. Stops at memory
/// that cannot be read.
fn push(pipe: &OwnedFd, memory: &File, buffers: &[(u64, u64)]) -> u64 {
    let mut done = 0;
    let total: u64 = buffers.iter().map(|(_, length)| length).sum();
    let mut bytes = vec![0u8; PIECE.min(total) as usize];
    let pieces = buffers.iter().flat_map(|(address, length)| {
        let (address, length) = (*address, *length);
        let at = (0..length).step_by(PIECE as usize);
        at.map(move |from| (address + from, PIECE.min(length - from)))
    });
    for (address, length) in pieces {
        let piece = &mut bytes[..length as usize];
        if memory.read_exact_at(piece, address).is_err() {
            return done;
        }
        let mut left = &piece[..];
        while !left.is_empty() {
            match rustix::io::write(pipe, left) {
                Ok(written) => {
                    done += written as u64;
                    left = &left[written..];
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if enlarge(pipe, total - done).is_some_and(|room| room > 0) => {}
                // Nobody reads it any more: the thread finds that out by its next write.
                Err(_) => return done,
            }
        }
    }
    done
}

/// Whether a stopped thread was in a write that ended early.
pub fn is_short(registers: &Registers, memory: &File) -> bool {
    rest(registers, memory).is_some()
}

/// What a write that ended early has left of its buffers: addresses and lengths.
fn rest(registers: &Registers, memory: &File) -> Option<Vec<(u64, u64)>> {
    let done = u64::try_from(registers.rax as i64).ok().filter(|done| *done > 0)?;
    let buffers = match registers.orig_rax as i64 {
        SYS_WRITE => vec![(registers.rsi, registers.rdx)],
        SYS_WRITEV if registers.rdx <= IOV_MAX => {
            let mut words = vec![0u8; registers.rdx as usize * 16];
            memory.read_exact_at(&mut words, registers.rsi).ok()?;
            let word = |b: &[u8]| b.try_into().map(u64::from_le_bytes).unwrap_or(0);
            words
                .chunks(16)
                .map(|pair| (word(&pair[..8]), word(&pair[8..])))
                .collect()
        }
        _ => return None,
    };
    let left = after(buffers, done);
    (!left.is_empty()).then_some(left)
}

/// The buffers without their first bytes.
fn after(buffers: Vec<(u64, u64)>, mut done: u64) -> Vec<(u64, u64)> {
    let mut left = Vec::new();
    for (address, length) in buffers {
        let skipped = done.min(length);
        done -= skipped;
        if length > skipped {
            left.push((address + skipped, length - skipped));
        }
    }
    left
}

/// A pipe that blocks its writers, by a description of our own that does not.
fn blocking_pipe(host: i32, fd: i32) -> Option<OwnedFd> {
    let dir = ProcDir::process(host);
    let is_pipe = dir
        .link(&format!("fd/{fd}"))
        .is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"pipe:"));
    let info = FdInfo::parse(&dir.text(&format!("fdinfo/{fd}")).ok()?).ok()?;
    if !is_pipe || info.flags & O_NONBLOCK != 0 {
        return None;
    }
    let theirs = take_descriptor(host, fd).ok()?;
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(crate::files::proc_fd(&theirs), flags, Mode::empty()).ok()
}

/// Makes room for so many bytes in a full pipe; how many can be written now for certain.
fn enlarge(pipe: &OwnedFd, wanted: u64) -> Option<u64> {
    let made = make_room(pipe, wanted);
    if let Err(error) = &made {
        tracing::warn!(%error, wanted, "a pipe cannot be made larger");
    }
    made.ok().flatten()
}

/// `None` if it would become larger than any may.
fn make_room(pipe: &OwnedFd, wanted: u64) -> io::Result<Option<u64>> {
    // Every buffer that it has may be in use, each by a few bytes.
    let before = fcntl_getpipe_size(pipe)? as u64;
    let size = before + wanted.div_ceil(PAGE) * PAGE + PAGE;
    if size > MOST {
        return Ok(None);
    }
    let after = resize(pipe, size as usize)?;
    Ok(Some((after as u64).saturating_sub(before + PAGE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_buffers() {
        assert_eq!(after(vec![(100, 10), (200, 20)], 4), [(104, 6), (200, 20)]);
        assert_eq!(after(vec![(100, 10), (200, 20)], 10), [(200, 20)]);
        assert_eq!(after(vec![(100, 10), (200, 20)], 15), [(205, 15)]);
        assert_eq!(after(vec![(100, 10)], 10), []);
    }

    #[test]
    fn only_a_write_that_ended_early_has_a_rest() {
        let nowhere = File::open("/dev/null").unwrap();
        let registers = |orig_rax: i64, rax: i64| Registers {
            orig_rax: orig_rax as u64,
            rax: rax as u64,
            rsi: 4096,
            rdx: 100,
            ..crate::capture::from_words(&[0; 27]).unwrap()
        };
        assert_eq!(rest(&registers(SYS_WRITE, 40), &nowhere), Some(vec![(4136, 60)]));
        for other in [
            registers(SYS_WRITE, 100),
            registers(SYS_WRITE, -512),
            registers(SYS_WRITE, 0),
            registers(-1, 40),
            registers(0, 40),
        ] {
            assert_eq!(rest(&other, &nowhere), None);
        }
    }

    #[test]
    fn a_full_pipe_takes_the_rest_and_grows_only_if_it_must() {
        let (reading, writing) = rustix::pipe::pipe().unwrap();
        let host = std::process::id() as i32;
        let own = std::os::fd::AsRawFd::as_raw_fd(&writing);
        let ours = blocking_pipe(host, own).unwrap();
        let source = vec![7u8; 3 << 20];
        let memory = File::open("/proc/self/mem").unwrap();
        let before = fcntl_getpipe_size(&writing).unwrap();
        let at = source.as_ptr() as u64;
        assert_eq!(push(&ours, &memory, &[(at, 10_000), (at, 20_000)]), 30_000);
        assert_eq!(fcntl_getpipe_size(&writing).unwrap(), before, "there was room");
        assert_eq!(push(&ours, &memory, &[(at, 3 << 20)]), 3 << 20);
        let mut total = 0;
        let mut bytes = vec![0u8; 1 << 20];
        while total < (3 << 20) + 30_000 {
            total += rustix::io::read(&reading, &mut bytes[..]).unwrap();
        }
        // Memory that is not there.
        assert_eq!(push(&ours, &memory, &[(at, 100), (8, 4096)]), 100);
    }
}
