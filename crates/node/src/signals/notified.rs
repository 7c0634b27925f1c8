//! Calls of programs in the nest that name a process of another home.
//!
//! Owns the reading of such a call and its answer. Refuses to keep a program waiting for long: what may have to ask a
//! peer runs in a thread of its own. Invariants: where the nest has a task of that number, a surrogate too, the kernel carries the
//! call out; of one whose surrogate was killed here just now, there is none; else the answer is what the kernel would say on the node where the process is.

use super::{Sent, send};
use crate::daemon::node::Node;
use crate::nest::Response;
use crate::processes::HiddenKind;
use dunlin_proto::control::FailureKind;
use dunlin_proto::ids::Pid;
use dunlin_sys::pidfd::SIGINFO_BYTES;
use rustix::io::Errno;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// x86-64 numbers of the notified calls.
mod call {
    pub const KILL: i64 = 62;
    pub const RT_SIGQUEUEINFO: i64 = 129;
    pub const TKILL: i64 = 200;
    pub const TGKILL: i64 = 234;
    pub const RT_TGSIGQUEUEINFO: i64 = 297;
}

/// So often surrogates are looked at, with something to spare.
const LOOKED_AT_WITHIN: Duration = Duration::from_millis(200);
const SI_USER: i32 = 0;
const SI_TKILL: i32 = -6;

/// A call, as far as it was understood.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// A signal to a process, or to its thread of the same number.
    Signal { pid: Pid, signal: i32, payload: Payload },
    /// Anything else that needs the process to be here.
    Presence,
}

#[derive(Debug, PartialEq, Eq)]
enum Payload {
    /// The sender, with this code.
    Sender(i32),
    /// At this address in the caller.
    At(u64),
}

/// Takes a notified call; its answer comes by itself.
pub fn take(node: &Arc<Node>, id: u64, tid: Pid, nr: i64, args: [u64; 6]) {
    let target = Pid(args[0] as i32);
    if node.nest.host_pid(target).is_ok_and(|found| found.is_some()) {
        return node.respond(id, Response::Continue);
    }
    let worker = node.clone();
    let spawned = thread::Builder::new().name("foreign signal".into()).spawn(move || {
        let answer = if was_killed_here(&worker, target) {
            Response::Errno(Errno::SRCH.raw_os_error())
        } else {
            match carry_out(&worker, tid, wanted(nr, args)) {
                Ok(()) => Response::Value(0),
                Err(errno) => Response::Errno(errno.raw_os_error()),
            }
        };
        worker.respond(id, answer);
    });
    if let Err(e) = spawned {
        tracing::error!("no thread to serve a signal to process {target}: {e}");
        node.respond(id, Response::Errno(Errno::AGAIN.raw_os_error()));
    }
}

/// Who has killed what stood for a process here, and waited for it, does not find it alive elsewhere. A surrogate that is
/// known and is not there was killed a moment ago, or is about to be made.
fn was_killed_here(node: &Node, pid: Pid) -> bool {
    let stands = || matches!(node.hidden.kind(pid), Some(HiddenKind::Departed | HiddenKind::Relative));
    let deadline = Instant::now() + LOOKED_AT_WITHIN;
    while stands() && Instant::now() < deadline && node.nest.host_pid(pid).is_ok_and(|host| host.is_none()) {
        thread::sleep(Duration::from_millis(1));
    }
    node.hidden.was_killed(pid)
}

fn wanted(nr: i64, args: [u64; 6]) -> Wanted {
    let (pid, second, third) = (Pid(args[0] as i32), args[1] as i32, args[2] as i32);
    let signal = |signal, payload| Wanted::Signal { pid, signal, payload };
    match nr {
        call::KILL => signal(second, Payload::Sender(SI_USER)),
        call::TKILL => signal(second, Payload::Sender(SI_TKILL)),
        call::RT_SIGQUEUEINFO => signal(second, Payload::At(args[2])),
        // Of a process elsewhere only the first thread, which bears its number, can be addressed.
        call::TGKILL if second == pid.0 => signal(third, Payload::Sender(SI_TKILL)),
        call::RT_TGSIGQUEUEINFO if second == pid.0 => signal(third, Payload::At(args[3])),
        _ => Wanted::Presence,
    }
}

fn carry_out(node: &Arc<Node>, tid: Pid, wanted: Wanted) -> Result<(), Errno> {
    let Wanted::Signal { pid, signal, payload } = wanted else {
        return Err(Errno::SRCH);
    };
    if !(0..=super::LAST_SIGNAL).contains(&signal) {
        return Err(Errno::INVAL);
    }
    // The caller waits in the kernel; if it does not exist any more, nobody reads the answer.
    let caller = node.proc.caller(tid).ok().flatten().ok_or(Errno::SRCH)?;
    let info = match payload {
        Payload::Sender(code) => {
            let sender = node.proc.process_of(tid).ok().flatten().ok_or(Errno::SRCH)?;
            of_sender(signal, code, sender, caller.uid)
        }
        Payload::At(address) => of_caller(node, tid, address, signal)?,
    };
    let sent = Sent {
        signal,
        info: Some(&info),
        by: caller,
        order: None,
    };
    match send(node, pid, sent) {
        Ok(()) => Ok(()),
        Err(failure) => Err(match failure.kind {
            FailureKind::NoProcess => Errno::SRCH,
            FailureKind::Forbidden => Errno::PERM,
            FailureKind::Invalid => Errno::INVAL,
            _ => {
                tracing::warn!(
                    "a program's signal {signal} to process {pid} is lost: {}",
                    failure.message
                );
                Errno::SRCH
            }
        }),
    }
}

fn of_sender(signal: i32, code: i32, sender: Pid, uid: u32) -> [u8; SIGINFO_BYTES] {
    let mut info = [0u8; SIGINFO_BYTES];
    info[0..4].copy_from_slice(&signal.to_ne_bytes());
    info[8..12].copy_from_slice(&code.to_ne_bytes());
    info[16..20].copy_from_slice(&sender.0.to_ne_bytes());
    info[20..24].copy_from_slice(&uid.to_ne_bytes());
    info
}

fn of_caller(node: &Node, tid: Pid, address: u64, signal: i32) -> Result<[u8; SIGINFO_BYTES], Errno> {
    let mut info = [0u8; SIGINFO_BYTES];
    node.proc.memory(tid, address, &mut info).map_err(|_| Errno::FAULT)?;
    info[0..4].copy_from_slice(&signal.to_ne_bytes());
    let code = i32::from_ne_bytes([info[8], info[9], info[10], info[11]]);
    // Nobody may pretend to another process that a signal is from kill or from the kernel.
    if code >= 0 || code == SI_TKILL {
        Err(Errno::PERM)
    } else {
        Ok(info)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_understood() {
        let signal = |payload| Wanted::Signal {
            pid: Pid(130),
            signal: 10,
            payload,
        };
        assert_eq!(
            wanted(call::KILL, [130, 10, 0, 0, 0, 0]),
            signal(Payload::Sender(SI_USER))
        );
        assert_eq!(
            wanted(call::TKILL, [130, 10, 0, 0, 0, 0]),
            signal(Payload::Sender(SI_TKILL))
        );
        assert_eq!(
            wanted(call::TGKILL, [130, 130, 10, 0, 0, 0]),
            signal(Payload::Sender(SI_TKILL))
        );
        assert_eq!(wanted(call::TGKILL, [130, 131, 10, 0, 0, 0]), Wanted::Presence);
        assert_eq!(
            wanted(call::RT_SIGQUEUEINFO, [130, 10, 77, 0, 0, 0]),
            signal(Payload::At(77))
        );
        assert_eq!(wanted(434, [130, 0, 0, 0, 0, 0]), Wanted::Presence);
    }
}
