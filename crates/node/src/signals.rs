//! Signals to processes, wherever they are.
//!
//! Owns the way of a signal: to the process if it is here, else to the node that its home names. Refuses to know who asked
//! for it, but for whether he may. Invariants: a signal is delivered once, or the sender learns why not; permission is judged
//! where the process is, by the kernel's rule; a surrogate is never signalled in place of its process.

pub mod notified;
pub mod surrogates;

use crate::daemon::node::{Node, Place, failure, nest_failure, no_process, unexpected, unreachable};
use crate::processes::Echo;
use dunlin_proto::control::{ExitStatus, Failure, FailureKind};
use dunlin_proto::ids::Pid;
use dunlin_proto::peer::{Caller, Change, PeerReply, PeerRequest};
use dunlin_sys::pidfd;
use dunlin_sys::procfs::ProcDir;
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

/// The highest signal of Linux.
pub const LAST_SIGNAL: i32 = 64;
/// How often a process is looked for that is between two places, and how long in between.
const ATTEMPTS: u32 = 100;
const ATTEMPT_AFTER: Duration = Duration::from_millis(20);

/// Sends a signal to a process anywhere; 0 only asks whether it could be sent.
pub fn send(
    node: &Node,
    pid: Pid,
    signal: i32,
    info: Option<&[u8; pidfd::SIGINFO_BYTES]>,
    by: Caller,
) -> Result<(), Failure> {
    for _ in 0..ATTEMPTS {
        let reply = match node.locate(pid)? {
            Place::Here(process) => deliver_to(node, pid, process, signal, info, by),
            Place::At(slot) => {
                let siginfo = info.map(|i| i.to_vec());
                let request = PeerRequest::Signal {
                    pid,
                    signal,
                    siginfo,
                    by,
                };
                match node.peers.call(slot, &request).map_err(|e| unreachable(&e))? {
                    reply @ (PeerReply::Done | PeerReply::NotHere) => reply,
                    other => return Err(unexpected(node, slot, &other)),
                }
            }
            Place::Ended { .. } | Place::Nowhere => return Err(no_process(pid)),
        };
        match reply {
            PeerReply::Done => return Ok(()),
            PeerReply::Failed(failure) => return Err(failure),
            // Between the decision of its home and its first instruction elsewhere.
            _ => thread::sleep(ATTEMPT_AFTER),
        }
    }
    let message = format!("process {pid} is being moved, and could not be reached");
    Err(failure(FailureKind::Unreachable, message, Some("try again")))
}

/// A peer's signal to a process that should be here.
pub fn deliver(node: &Node, pid: Pid, signal: i32, info: Option<&[u8]>, by: Caller) -> PeerReply {
    let info = match info.map(<&[u8; pidfd::SIGINFO_BYTES]>::try_from).transpose() {
        Ok(info) => info,
        Err(_) => return PeerReply::Failed(failure(FailureKind::Invalid, "a siginfo is not 128 bytes long", None)),
    };
    match node.here(pid) {
        Ok(Some(process)) => deliver_to(node, pid, process, signal, info, by),
        Ok(None) => PeerReply::NotHere,
        Err(e) => PeerReply::Failed(nest_failure(e)),
    }
}

fn deliver_to(
    node: &Node,
    pid: Pid,
    process: OwnedFd,
    signal: i32,
    info: Option<&[u8; pidfd::SIGINFO_BYTES]>,
    by: Caller,
) -> PeerReply {
    if !(0..=LAST_SIGNAL).contains(&signal) {
        let message = format!("there is no signal {signal}");
        return PeerReply::Failed(failure(FailureKind::Invalid, message, Some("signals go up to 64")));
    }
    let users = match node.proc.users(pid) {
        Ok(Some(users)) => users,
        Ok(None) => return PeerReply::Failed(no_process(pid)),
        Err(e) => return PeerReply::Failed(nest_failure(e)),
    };
    if !may_signal(by, users) {
        let message = format!("process {pid} is another user's");
        return PeerReply::Failed(failure(FailureKind::Forbidden, message, Some("ask root")));
    }
    let sent = match info {
        // By PID 1: a signal from outside the nest has no sender. It goes by number, as kill(2) does.
        Some(info) if signal != 0 => node.nest.signal(pid, signal, info),
        Some(_) | None => match pidfd::send(&process, signal, None) {
            Err(e) if e.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(false),
            sent => sent.map(|()| true),
        },
    };
    match sent {
        Ok(true) => PeerReply::Done,
        Ok(false) => PeerReply::Failed(no_process(pid)),
        Err(e) => PeerReply::Failed(failure(
            FailureKind::Other,
            format!("signal {signal} to process {pid}: {e}"),
            None,
        )),
    }
}

/// The rule of kill(2): the sender's real or effective user is the target's real or saved one.
fn may_signal(by: Caller, (uid, saved_uid): (u32, u32)) -> bool {
    by.privileged || [by.uid, by.euid].iter().any(|u| *u == uid || *u == saved_uid)
}

/// A child that is elsewhere has changed in a way that its parent's kernel would tell: what stands for it here does the
/// same.
pub fn child_changed(node: &std::sync::Arc<Node>, child: Pid, change: Change) -> io::Result<()> {
    if node.hidden.kind(child).is_none() {
        return Ok(());
    }
    let (signal, echo) = match change {
        Change::Ended(status) => {
            return end(node, child, status);
        }
        Change::Stopped => (number::STOP, Echo::Stop),
        Change::Continued => (number::CONT, Echo::Continue),
    };
    let (Some(surrogate), Some(host)) = (node.nest.pidfd(child)?, node.nest.host_pid(child)?) else {
        return Ok(());
    };
    // It is as it should be where it was the surrogate that was stopped or continued first: then there is no echo to be
    // expected, and the next report of this kind is somebody's who means it.
    let state = ProcDir::process(host).stat().map(|stat| stat.state);
    if state.is_ok_and(|state| (state == 'T') == (echo == Echo::Stop)) {
        return Ok(());
    }
    node.hidden.expect_echo(child, echo);
    pidfd::send(surrogate, signal, None)
}

/// ptrace, which ends a surrogate, is bound to the thread that begins it: the end of a child is told in one of its own.
fn end(node: &Node, child: Pid, status: ExitStatus) -> io::Result<()> {
    let mover = node.mover.clone();
    let ended = std::thread::Builder::new()
        .name("end-surrogate".into())
        .spawn(move || mover.entries.end(child, status))?;
    ended
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the end of a surrogate panicked")))
}

/// Numbers of signals that mean something to this module.
mod number {
    use rustix::process::Signal;
    pub const STOP: i32 = Signal::STOP.as_raw();
    pub const CONT: i32 = Signal::CONT.as_raw();
    pub const KILL: i32 = Signal::KILL.as_raw();
    pub const CHLD: i32 = Signal::CHILD.as_raw();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permission_is_the_kernels() {
        let by = |uid, euid| Caller {
            uid,
            euid,
            privileged: false,
        };
        assert!(may_signal(by(5, 5), (5, 6)));
        assert!(may_signal(by(5, 5), (6, 5)));
        assert!(may_signal(by(7, 5), (5, 6)));
        assert!(!may_signal(by(7, 7), (5, 6)));
        assert!(may_signal(
            Caller {
                privileged: true,
                ..by(7, 7)
            },
            (5, 6)
        ));
    }
}
