//! Calls that our stop ends with EINTR, although no signal came: they are made again.
//!
//! Owns which calls these are, how long each of them waits and what it answers when the time is over. Refuses to hide an
//! EINTR that a signal of the program's own would have brought. See "Interruption of system calls and library functions by
//! stop signals" in signal(7).

use dunlin_sys::foothold::take_descriptor;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::Registers;
use rustix::net::sockopt::{self, Timeout};
use std::fs::File;
use std::os::unix::fs::FileExt;

const EINTR: i64 = -4;
const EAGAIN: i64 = -11;
const EINPROGRESS: i64 = -115;
const SYS_SELECT: i64 = 23;
const SYS_ACCEPT: i64 = 43;
const SYS_SENDTO: i64 = 44;
const SYS_CONNECT: i64 = 42;
const SYS_RECVFROM: i64 = 45;
const SYS_SENDMSG: i64 = 46;
const SYS_RECVMSG: i64 = 47;
const SYS_SEMOP: i64 = 65;
const SYS_RT_SIGTIMEDWAIT: i64 = 128;
const SYS_IO_GETEVENTS: i64 = 208;
const SYS_SEMTIMEDOP: i64 = 220;
const SYS_EPOLL_WAIT: i64 = 232;
const SYS_PSELECT6: i64 = 270;
const SYS_PPOLL: i64 = 271;
const SYS_EPOLL_PWAIT: i64 = 281;
const SYS_ACCEPT4: i64 = 288;
const SYS_EPOLL_PWAIT2: i64 = 441;

/// Where a call says how long it waits.
enum Limit {
    /// In milliseconds, in this argument; negative: for ever.
    Millis(usize),
    /// At this address; null: for ever.
    Timespec(usize),
    /// With the socket that is its first argument.
    Socket(Timeout),
    /// Nowhere, or where the kernel keeps it up to date by itself.
    None,
}

/// How such a call is limited, and what it answers at the limit.
fn known(number: i64) -> Option<(Limit, i64)> {
    Some(match number {
        SYS_SEMOP => (Limit::None, EAGAIN),
        SYS_RT_SIGTIMEDWAIT => (Limit::Timespec(2), EAGAIN),
        SYS_SEMTIMEDOP => (Limit::Timespec(3), EAGAIN),
        SYS_IO_GETEVENTS => (Limit::Timespec(4), 0),
        SYS_EPOLL_WAIT | SYS_EPOLL_PWAIT => (Limit::Millis(3), 0),
        SYS_EPOLL_PWAIT2 => (Limit::Timespec(3), 0),
        SYS_ACCEPT | SYS_ACCEPT4 | SYS_RECVFROM | SYS_RECVMSG => (Limit::Socket(Timeout::Recv), EAGAIN),
        SYS_SENDTO | SYS_SENDMSG => (Limit::Socket(Timeout::Send), EAGAIN),
        SYS_CONNECT => (Limit::Socket(Timeout::Send), EINPROGRESS),
        // With the time to wait in memory that cannot be written: elsewhere they are not ended.
        SYS_SELECT | SYS_PSELECT6 | SYS_PPOLL => (Limit::None, 0),
        _ => return None,
    })
}

/// Is it one of these calls?
pub fn is_one(number: i64) -> bool {
    known(number).is_some()
}

/// Registers with which a call that the stop itself ended is made again.
pub fn made_again(registers: &Registers) -> Option<Registers> {
    let number = registers.orig_rax as i64;
    (registers.rax as i64 == EINTR && is_one(number)).then(|| Registers {
        rax: registers.orig_rax,
        orig_rax: u64::MAX,
        rip: registers.rip - 2,
        ..*registers
    })
}

/// The other way round: registers of a call that has ended with EINTR, from those with which it would be made again.
pub fn interrupted(again: &Registers) -> Registers {
    Registers {
        rax: EINTR as u64,
        orig_rax: again.rax,
        rip: again.rip + 2,
        ..*again
    }
}

/// What a call answers when its time is over.
pub fn answer(number: i64) -> i64 {
    known(number).map_or(EINTR, |(_, answer)| answer)
}

/// How long a call waits, nanoseconds; `None`: for ever, or nobody can say.
pub fn length_ns(process: i32, number: i64, arguments: [u64; 6], memory: &File) -> Option<u64> {
    match known(number)?.0 {
        Limit::Millis(at) => u64::try_from(arguments[at] as i32).ok().map(|ms| ms * 1_000_000),
        Limit::Timespec(at) => timespec(memory, arguments[at]),
        Limit::Socket(which) => {
            let socket = take_descriptor(process, arguments[0] as i32).ok()?;
            let timeout = sockopt::socket_timeout(&socket, which).ok()??;
            Some(timeout.as_nanos() as u64)
        }
        Limit::None => None,
    }
}

/// Addresses of what the kernel reads from the program when the call is made again.
pub fn reads(number: i64, arguments: [u64; 6]) -> Vec<u64> {
    let [first, second, third, fourth, fifth, _] = arguments;
    match number {
        SYS_RT_SIGTIMEDWAIT => vec![first, third],
        SYS_SEMTIMEDOP => vec![second, fourth],
        SYS_IO_GETEVENTS => vec![fourth, fifth],
        SYS_EPOLL_WAIT => vec![second],
        SYS_EPOLL_PWAIT => vec![second, fifth],
        SYS_EPOLL_PWAIT2 => vec![second, fourth, fifth],
        _ => Vec::new(),
    }
}

/// A `struct timespec`, nanoseconds.
pub fn timespec(memory: &File, address: u64) -> Option<u64> {
    let mut bytes = [0u8; 16];
    memory.read_exact_at(&mut bytes, address).ok()?;
    let (seconds, nanos) = bytes.split_at(8);
    let word = |b: &[u8]| b.try_into().map(u64::from_le_bytes).ok();
    Some(
        word(seconds)?
            .saturating_mul(1_000_000_000)
            .saturating_add(word(nanos)?),
    )
}

/// Is a signal waiting that will interrupt this thread? Then EINTR is the program's own. `mask` and `leader_mask`: what
/// the thread and the first thread block when they run; the first thread takes what is sent to the process, if it can.
pub fn is_signalled(process: i32, tid: i32, mask: u64, leader_mask: u64) -> bool {
    let Ok(status) = ProcDir::thread(process, tid).status() else {
        return false;
    };
    let open = |pending: u64, mask: u64| pending & status.caught & !mask;
    let shared = open(status.process_pending, mask);
    let takes_it = tid == process || open(status.process_pending, leader_mask) == 0;
    open(status.pending, mask) != 0 || (shared != 0 && takes_it)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(orig_rax: i64, rax: i64) -> Registers {
        Registers {
            rip: 0x1000,
            orig_rax: orig_rax as u64,
            rax: rax as u64,
            ..crate::capture::from_words(&[0; 27]).unwrap()
        }
    }

    #[test]
    fn what_a_stop_has_ended_is_made_again_and_nothing_else() {
        let ended = registers(SYS_EPOLL_WAIT, EINTR);
        let again = made_again(&ended).unwrap();
        assert_eq!((again.rip, again.rax, again.orig_rax), (0xffe, 232, u64::MAX));
        let words = crate::capture::to_words;
        assert_eq!(words(&interrupted(&again)), words(&ended));
        assert!(made_again(&registers(SYS_EPOLL_WAIT, 1)).is_none());
        assert!(made_again(&registers(0, EINTR)).is_none());
        assert!(made_again(&registers(-1, EINTR)).is_none());
    }

    #[test]
    fn a_limit_is_read_where_the_call_has_it() {
        let nowhere = File::open("/dev/zero").unwrap();
        let wait = |ms: i32| length_ns(0, SYS_EPOLL_WAIT, [3, 0, 1, ms as u32 as u64, 0, 0], &nowhere);
        assert_eq!(wait(20), Some(20_000_000));
        assert_eq!(wait(-1), None);
        assert_eq!(length_ns(0, SYS_SEMOP, [0; 6], &nowhere), None);
        assert_eq!(length_ns(0, SYS_RT_SIGTIMEDWAIT, [0, 0, 8, 0, 0, 0], &nowhere), Some(0));
    }
}
