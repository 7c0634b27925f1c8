//! Writes to pipes and to sockets of streams that our stop has cut short.
//!
//! A write(2) or send(2) that blocks for want of room ends, when its thread is stopped, with what it has written so far. That is
//! as SIGSTOP would have it, but the program was sent none, and some lose the rest (CPython's buffered writer does). Owns
//! the completion of such a call before the program can see it. Into a pipe what fits is written for the thread, through a
//! description of our own that does not block; if the pipe is full it is given room for the rest, and keeps its larger capacity. A
//! socket is given room for that moment, and the thread itself sends the rest: the other end may ask who sent it. Refuses to let
//! anybody block: where there is no room to be had ([`MOST`]) the write stays short. See pipe(7), F_SETPIPE_SZ in fcntl(2),
//! SO_SNDBUFFORCE in socket(7).

use crate::descriptors::pipe::{MOST, resize};
use dunlin_sys::foothold::take_descriptor;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::fdinfo::FdInfo;
use dunlin_sys::ptrace::{Registers, Stopped, TraceError};
use dunlin_sys::socket::{self, tcp};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::fcntl_getpipe_size;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

const SYS_WRITE: i64 = 1;
const SYS_WRITEV: i64 = 20;
const SYS_SENDTO: i64 = 44;
const SYS_SENDMSG: i64 = 46;
const MSG_OOB: u64 = 1;
const MSG_DONTWAIT: u64 = 0x40;
const MSG_NOSIGNAL: u64 = 0x4000;
const MSG_MORE: u64 = 0x8000;
const MSG_ZEROCOPY: u64 = 0x400_0000;
const POLLERR_OR_HUP: i16 = 8 | 16;
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
    let thread = match blocking(host, fd) {
        Some(Sink::Pipe(pipe)) => into_pipe(thread, at, registers, memory, &pipe, rest)?,
        Some(Sink::Stream(socket)) => into_socket(thread, at, registers, &socket, &rest)?,
        None => return Ok(thread),
    };
    if is_short(registers, memory) {
        tracing::warn!(
            host,
            fd,
            "a write that a stop has cut short stays short: there is no room to be had"
        );
    }
    Ok(thread)
}

fn into_pipe(
    thread: Stopped,
    at: u64,
    registers: &mut Registers,
    memory: &File,
    pipe: &OwnedFd,
    rest: Vec<(u64, u64)>,
) -> Result<Stopped, TraceError> {
    let fd = registers.rdi;
    let done = push(pipe, memory, &rest);
    registers.rax += done;
    let rest = after(rest, done);
    let wanted: u64 = rest.iter().map(|(_, length)| length).sum();
    if wanted == 0 {
        return Ok(thread);
    }
    // What is left is in memory that is elsewhere: the thread itself can wait for it.
    let mut room = enlarge(pipe, wanted).unwrap_or(0);
    let mut thread = thread;
    for (address, length) in rest {
        let length = length.min(room);
        if length == 0 {
            break;
        }
        let (stopped, answer) = thread.inject(at, SYS_WRITE, [fd, address, length, 0, 0, 0])?;
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
    Ok(thread)
}

/// Has the thread send what is left. The buffer is as it was afterwards, and so is whether it grows by itself.
fn into_socket(
    thread: Stopped,
    at: u64,
    registers: &mut Registers,
    socket: &OwnedFd,
    rest: &[(u64, u64)],
) -> Result<Stopped, TraceError> {
    let wanted: u64 = rest.iter().map(|(_, length)| length).sum();
    // An error is told once: to the program.
    let is_broken = socket::readiness(socket.as_fd()).is_ok_and(|ready| ready & POLLERR_OR_HUP != 0);
    if wanted > MOST || is_broken {
        return Ok(thread);
    }
    let widened = tcp::buffers(socket.as_fd()).and_then(|before| {
        tcp::make_send_room(socket.as_fd(), wanted as u32)?;
        Ok(before)
    });
    let before = match widened {
        Ok(before) => before,
        Err(error) => {
            tracing::warn!(%error, "the buffer of a socket cannot be made larger");
            return Ok(thread);
        }
    };
    let sent = send_rest(thread, at, registers, rest);
    if let Err(error) = tcp::set_buffers(socket.as_fd(), before) {
        tracing::warn!(%error, "the buffer of a socket stays large");
    }
    sent
}

fn send_rest(thread: Stopped, at: u64, registers: &mut Registers, rest: &[(u64, u64)]) -> Result<Stopped, TraceError> {
    let flags = send_flags(registers) & (MSG_OOB | MSG_MORE) | MSG_DONTWAIT | MSG_NOSIGNAL;
    let mut thread = thread;
    for (address, length) in rest {
        let (stopped, answer) = thread.inject(at, SYS_SENDTO, [registers.rdi, *address, *length, flags, 0, 0])?;
        thread = stopped;
        let Some(answer) = u64::try_from(answer).ok().filter(|answer| *answer > 0) else {
            break;
        };
        registers.rax += answer;
        if answer < *length {
            break;
        }
    }
    Ok(thread)
}

/// The flags of a call that sends.
fn send_flags(registers: &Registers) -> u64 {
    match registers.orig_rax as i64 {
        SYS_SENDTO => registers.r10,
        SYS_SENDMSG => registers.rdx,
        _ => 0,
    }
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
    if send_flags(registers) & (MSG_DONTWAIT | MSG_ZEROCOPY) != 0 {
        return None;
    }
    let buffers = match registers.orig_rax as i64 {
        SYS_WRITE | SYS_SENDTO => vec![(registers.rsi, registers.rdx)],
        SYS_WRITEV => vector(memory, registers.rsi, registers.rdx)?,
        SYS_SENDMSG => {
            // struct msghdr: the vector and its length come after the name and its length.
            let words = words(memory, registers.rsi + 16, 2)?;
            vector(memory, words[0], words[1])?
        }
        _ => return None,
    };
    let left = after(buffers, done);
    (!left.is_empty()).then_some(left)
}

/// An array of `struct iovec`.
fn vector(memory: &File, address: u64, count: u64) -> Option<Vec<(u64, u64)>> {
    if count > IOV_MAX {
        return None;
    }
    let words = words(memory, address, 2 * count as usize)?;
    Some(
        words
            .as_chunks::<2>()
            .0
            .iter()
            .map(|[base, length]| (*base, *length))
            .collect(),
    )
}

fn words(memory: &File, address: u64, count: usize) -> Option<Vec<u64>> {
    let mut bytes = vec![0u8; 8 * count];
    memory.read_exact_at(&mut bytes, address).ok()?;
    Some(
        bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word))
            .collect(),
    )
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

/// Where a write that blocks went.
enum Sink {
    /// By a description of our own, that does not block.
    Pipe(OwnedFd),
    Stream(OwnedFd),
}

/// Where a descriptor leads that blocks its writers until all is written.
fn blocking(host: i32, fd: i32) -> Option<Sink> {
    let dir = ProcDir::process(host);
    let link = dir.link(&format!("fd/{fd}")).ok()?;
    let name = link.as_os_str().as_encoded_bytes();
    let info = FdInfo::parse(&dir.text(&format!("fdinfo/{fd}")).ok()?).ok()?;
    if info.flags & O_NONBLOCK != 0 {
        return None;
    }
    if name.starts_with(b"pipe:") {
        let theirs = take_descriptor(host, fd).ok()?;
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let ours = rustix::fs::open(crate::files::proc_fd(&theirs), flags, Mode::empty()).ok()?;
        return Some(Sink::Pipe(ours));
    }
    if !name.starts_with(b"socket:") {
        return None;
    }
    let ours = take_descriptor(host, fd).ok()?;
    let what = socket::what(ours.as_fd()).ok()?;
    let families = [socket::FAMILY_V4, socket::FAMILY_V6, socket::unix::FAMILY];
    (what.kind == socket::STREAM && families.contains(&what.family)).then_some(Sink::Stream(ours))
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
        let send = |flags| Registers {
            r10: flags,
            ..registers(SYS_SENDTO, 40)
        };
        assert_eq!(rest(&send(MSG_OOB), &nowhere), Some(vec![(4136, 60)]));
        assert_eq!(rest(&send(MSG_DONTWAIT), &nowhere), None);
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
        let Some(Sink::Pipe(ours)) = blocking(host, own) else {
            panic!("a pipe that blocks");
        };
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
