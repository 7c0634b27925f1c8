//! Signals to processes, wherever they are.
//!
//! Owns the way of a signal: to the process if it is here, else to the node that its home names. Refuses to know who asked
//! for it, but for whether he may. Invariants: a signal is delivered once, or the sender learns why not; permission is judged
//! where the process is, by the kernel's rule; a surrogate is never signalled in place of its process; what stops and
//! continues a process and its surrogates is in one order ([`orders`]).

pub mod notified;
pub mod orders;
pub mod surrogates;

use crate::daemon::node::{Node, Place, failure, nest_failure, no_process, unexpected, unreachable};
use crate::peers::PeerError;
use dunlin_proto::control::{ExitStatus, Failure, FailureKind};
use dunlin_proto::ids::{Pid, Slot};
use dunlin_proto::peer::{Caller, Change, PeerReply, PeerRequest};
use dunlin_sys::pidfd;
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The highest signal of Linux.
pub const LAST_SIGNAL: i32 = 64;
/// How often a process is looked for that is between two places, and how long in between.
const ATTEMPTS: u32 = 100;
const ATTEMPT_AFTER: Duration = Duration::from_millis(20);
/// How long a signal waits at the node of a process that is being captured: less than a peer waits for an answer.
const WAITS_AT_MOST: Duration = Duration::from_secs(3);
/// How long it is asked again whether a process that is being captured runs by now. A comparison of everything takes time.
const CAPTURED_AT_MOST: Duration = Duration::from_secs(300);

/// A signal on its way.
#[derive(Debug, Clone, Copy)]
pub struct Sent<'a> {
    /// Its number; 0 only asks whether it could be sent.
    pub signal: i32,
    /// What comes with it.
    pub info: Option<&'a [u8; pidfd::SIGINFO_BYTES]>,
    /// Who sends it.
    pub by: Caller,
    /// Of a stop or a continuation that a surrogate passes on: see [`orders`].
    pub order: Option<u64>,
}

impl Sent<'_> {
    /// Without payload.
    pub fn bare(signal: i32, by: Caller) -> Sent<'static> {
        Sent {
            signal,
            info: None,
            by,
            order: None,
        }
    }
}

/// Sends a signal to a process anywhere.
pub fn send(node: &Node, pid: Pid, sent: Sent<'_>) -> Result<(), Failure> {
    let mut attempts = 0;
    let deadline = Instant::now() + CAPTURED_AT_MOST;
    while attempts < ATTEMPTS && Instant::now() < deadline {
        let reply = match node.locate(pid)? {
            Place::Here(process) => deliver_to(node, node.slot, pid, process, sent),
            Place::At(slot) => match ask(node, slot, pid, sent)? {
                Some(reply) => reply,
                None => {
                    attempts += 1;
                    continue;
                }
            },
            Place::Ended { .. } | Place::Nowhere => return Err(no_process(pid)),
        };
        match reply {
            PeerReply::Done => return Ok(()),
            PeerReply::Failed(failure) => return Err(failure),
            PeerReply::NotYet => {}
            // Between the decision of its home and its first instruction elsewhere.
            _ => {
                attempts += 1;
                thread::sleep(ATTEMPT_AFTER);
            }
        }
    }
    let message = format!("process {pid} is being moved, and could not be reached");
    Err(failure(FailureKind::Unreachable, message, Some("try again")))
}

/// Asks a peer to signal a process. `None`: no answer came, and it may be asked again, as an order is obeyed only once.
fn ask(node: &Node, slot: Slot, pid: Pid, sent: Sent<'_>) -> Result<Option<PeerReply>, Failure> {
    let request = PeerRequest::Signal {
        pid,
        signal: sent.signal,
        siginfo: sent.info.map(|i| i.to_vec()),
        by: sent.by,
        order: sent.order,
    };
    match node.peers.call(slot, &request) {
        Ok(reply @ (PeerReply::Done | PeerReply::NotHere | PeerReply::NotYet)) => Ok(Some(reply)),
        Ok(other) => Err(unexpected(node, slot, &other)),
        Err(PeerError::Lost { .. }) if sent.order.is_some() => Ok(None),
        Err(e) => Err(unreachable(&e)),
    }
}

/// A peer's signal to a process that should be here.
pub fn deliver(node: &Node, from: Slot, pid: Pid, info: Option<&[u8]>, sent: Sent<'_>) -> PeerReply {
    let info = match info.map(<&[u8; pidfd::SIGINFO_BYTES]>::try_from).transpose() {
        Ok(info) => info,
        Err(_) => return PeerReply::Failed(failure(FailureKind::Invalid, "a siginfo is not 128 bytes long", None)),
    };
    match node.here(pid) {
        Ok(Some(process)) => deliver_to(node, from, pid, process, Sent { info, ..sent }),
        Ok(None) => PeerReply::NotHere,
        Err(e) => PeerReply::Failed(nest_failure(e)),
    }
}

fn deliver_to(node: &Node, from: Slot, pid: Pid, process: OwnedFd, sent: Sent<'_>) -> PeerReply {
    let signal = sent.signal;
    if !(0..=LAST_SIGNAL).contains(&signal) {
        let message = format!("there is no signal {signal}");
        return PeerReply::Failed(failure(FailureKind::Invalid, message, Some("signals go up to 64")));
    }
    let users = match node.proc.users(pid) {
        Ok(Some(users)) => users,
        Ok(None) => return PeerReply::Failed(no_process(pid)),
        Err(e) => return PeerReply::Failed(nest_failure(e)),
    };
    if !may_signal(sent.by, users) {
        let message = format!("process {pid} is another user's");
        return PeerReply::Failed(failure(FailureKind::Forbidden, message, Some("ask root")));
    }
    let obeyed = node.mover.orders.signalling(pid, WAITS_AT_MOST, |obeyed| {
        let Some(number) = sent.order else {
            return put(node, pid, &process, sent);
        };
        if obeyed.get(&from).is_some_and(|last| *last >= number) {
            return Ok(true);
        }
        let done = put(node, pid, &process, sent)?;
        if signal == number::STOP
            && let Some(host) = node.nest.host_pid(pid)?
        {
            orders::settle_stop(host);
        }
        obeyed.insert(from, number);
        Ok(done)
    });
    match obeyed {
        Some(Ok(true)) => PeerReply::Done,
        Some(Ok(false)) => PeerReply::Failed(no_process(pid)),
        Some(Err(e)) => PeerReply::Failed(failure(
            FailureKind::Other,
            format!("signal {signal} to process {pid}: {e}"),
            None,
        )),
        None => PeerReply::NotYet,
    }
}

/// Sends it now; `false`: there is no such process.
fn put(node: &Node, pid: Pid, process: &OwnedFd, sent: Sent<'_>) -> io::Result<bool> {
    match sent.info {
        // By PID 1: a signal from outside the nest has no sender. It goes by number, as kill(2) does.
        Some(info) if sent.signal != 0 => node.nest.signal(pid, sent.signal, info),
        Some(_) | None => match pidfd::send(process, sent.signal, None) {
            Err(e) if e.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(false),
            sent => sent.map(|()| true),
        },
    }
}

/// The rule of kill(2): the sender's real or effective user is the target's real or saved one.
fn may_signal(by: Caller, (uid, saved_uid): (u32, u32)) -> bool {
    by.privileged || [by.uid, by.euid].iter().any(|u| *u == uid || *u == saved_uid)
}

/// A child that is elsewhere has changed in a way that its parent's kernel would tell: what stands for it here does the
/// same. `after`: the last order from here that it had obeyed by then.
///
/// `NotYet`: its parent is just leaving or coming; `NotHere`: what stands for the child here has shown it, but its parent is
/// to be told where it is.
pub fn child_changed(node: &Arc<Node>, parent: Pid, child: Pid, change: Change, after: u64) -> io::Result<PeerReply> {
    let show = || match node.nest.host_pid(child)? {
        Some(host) => show_child(node, child, host, change, after),
        None => Ok(()),
    };
    let is_here = node.here(parent)?.is_some();
    let shown = match change {
        // While the end is shown, nobody waits for the parent.
        Change::Ended(_) if node.mover.orders.is_closed(parent) => None,
        Change::Ended(_) => Some(show()),
        Change::Stopped | Change::Continued => node.mover.orders.signalling(parent, Duration::ZERO, |_| show()),
    };
    Ok(match shown.transpose()? {
        None => PeerReply::NotYet,
        Some(()) if is_here => PeerReply::Done,
        Some(()) => PeerReply::NotHere,
    })
}

fn show_child(node: &Arc<Node>, child: Pid, host: i32, change: Change, after: u64) -> io::Result<()> {
    let stops = match change {
        Change::Ended(status) => return end(node, child, status),
        Change::Stopped => true,
        Change::Continued => false,
    };
    let (Some(job), Some(surrogate)) = (node.hidden.job(child), node.nest.pidfd(child)?) else {
        return Ok(());
    };
    let mut job = job.lock().unwrap_or_else(PoisonError::into_inner);
    tracing::debug!(%child, ?change, after, ?job, "told of a child");
    // What was before the last order from here is not so any more; and what somebody here has done to the surrogate just
    // now will be the next order.
    let is_old = job.last_order != 0 && after != job.last_order;
    if is_old || job.stopped == stops || orders::is_stopped(host) != Some(job.stopped) {
        return Ok(());
    }
    job.stopped = stops;
    if stops {
        pidfd::send(surrogate, number::STOP, None)?;
        orders::settle_stop(host);
        Ok(())
    } else {
        pidfd::send(surrogate, number::CONT, Some(&surrogates::own_continuation(node.boot)))
    }
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
    pub const HUP: i32 = Signal::HUP.as_raw();
    pub const WINCH: i32 = Signal::WINCH.as_raw();
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
