//! Writes to pipes that our stop has cut short.
//!
//! A write(2) to a full pipe that blocks ends, when its thread is stopped, with what it has written so far. That is as
//! SIGSTOP would have it, but the program was sent none, and some lose the rest (CPython's buffered writer does). Owns
//! the completion of such a call before the program can see it: the pipe gets room for the rest, and the rest is written
//! by the thread itself. The pipe keeps its larger capacity. Refuses to let the thread block: where there is no room to be
//! had (`/proc/sys/fs/pipe-max-size`) the write stays short. See pipe(7), F_SETPIPE_SZ in fcntl(2).

use dunlin_sys::foothold::take_descriptor;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::fdinfo::FdInfo;
use dunlin_sys::ptrace::{Registers, Stopped, TraceError};
use rustix::pipe::{fcntl_getpipe_size, fcntl_setpipe_size};
use std::fs::File;
use std::os::unix::fs::FileExt;

const SYS_WRITE: i64 = 1;
const SYS_WRITEV: i64 = 20;
const O_NONBLOCK: u32 = 0o4000;
const PAGE: u64 = 4096;
const IOV_MAX: u64 = 1024;

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
    let wanted: u64 = rest.iter().map(|(_, length)| length).sum();
    let mut room = room(host, fd, wanted).unwrap_or(0);
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
    Ok(thread)
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

/// Makes room for so many bytes in a pipe that blocks its writers; how many can be written now without blocking.
fn room(host: i32, fd: i32, wanted: u64) -> Option<u64> {
    let dir = ProcDir::process(host);
    let is_pipe = dir
        .link(&format!("fd/{fd}"))
        .is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"pipe:"));
    let info = FdInfo::parse(&dir.text(&format!("fdinfo/{fd}")).ok()?).ok()?;
    if !is_pipe || info.flags & O_NONBLOCK != 0 {
        return None;
    }
    let pipe = take_descriptor(host, fd).ok()?;
    // Every buffer that it has may be in use, each by a few bytes.
    let before = fcntl_getpipe_size(&pipe).ok()? as u64;
    let most: u64 = std::fs::read_to_string("/proc/sys/fs/pipe-max-size")
        .ok()?
        .trim()
        .parse()
        .ok()?;
    let size = (before + wanted.div_ceil(PAGE) * PAGE + PAGE).min(most);
    let after = fcntl_setpipe_size(&pipe, size as usize).ok()? as u64;
    Some(after.saturating_sub(before + PAGE))
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
}
