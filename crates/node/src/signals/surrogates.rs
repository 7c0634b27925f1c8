//! What surrogates report, passed on to the processes they stand for.
//!
//! Owns the meaning of each report. Refuses to know how surrogates are made and ended. What happens to a surrogate of a
//! process (somebody here signals it, stops it, kills it) happens to the process. What happens to a child whose parent
//! here is a surrogate (it ends, stops, goes on) is told to the child's home and to the node of the parent, where the
//! child's surrogates do the same, and so the parent's own kernel tells it.
//!
//! Invariants: a stop or continuation that this daemon caused in a surrogate, to show there what the process does, is not
//! passed back to the process; any other is an order ([`super::orders`]) of its own.

use super::{Sent, number, orders, send};
use crate::daemon::node::{Node, Place};
use crate::nest::NestEvent;
use crate::processes::HiddenKind;
use dunlin_proto::control::{ExitStatus, FailureKind};
use dunlin_proto::ids::{Pid, Slot};
use dunlin_proto::peer::{Caller, Change, PeerReply, PeerRequest};
use dunlin_sys::procfs::ProcDir;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// From the kernel itself.
const SI_KERNEL: i32 = 0x80;
/// From sigqueue(3), with a value.
const SI_QUEUE: i32 = -1;
/// How long a parent that is on its way is looked for, and how long in between. It may be compared in full meanwhile.
const TELLS_AT_MOST: Duration = Duration::from_secs(60);
const TELL_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// Acts on one report. May wait for peers.
pub fn act(node: &Arc<Node>, event: NestEvent) {
    match event {
        NestEvent::SurrogateSignal { pid, siginfo } => signal(node, pid, &siginfo),
        NestEvent::SurrogateStopped { pid } => stopped(node, pid),
        // The SIGCONT that did it is reported as a signal too.
        NestEvent::SurrogateContinued { .. } => {}
        NestEvent::SurrogateGone { pid } => gone(node, pid),
        NestEvent::SurrogateChild { parent, siginfo } => child(node, parent, &siginfo),
        NestEvent::Reaped { .. } | NestEvent::Notification { .. } | NestEvent::InitGone => {}
    }
}

fn signal(node: &Arc<Node>, pid: Pid, info: &[u8; 128]) {
    let (signal, code, sender) = (word(info, 0), word(info, 8), word(info, 16));
    // What the kernel tells a parent of its children is reported apart.
    if signal == number::CHLD && code > 0 {
        return;
    }
    // From outside the nest: this daemon has it look for a keeper that ended.
    if signal == number::CHLD && sender == 0 {
        return;
    }
    // The terminal here tells the leader of its session what the one there, which is its continuation, tells the process.
    let of_terminal = code == SI_KERNEL && [number::HUP, number::CONT, number::WINCH].contains(&signal);
    if of_terminal && node.runs.of(pid).is_some_and(|run| run.has_terminal()) {
        return;
    }
    if signal != number::CONT {
        return pass_on(node, pid, signal, Some(info), None);
    }
    if info[..32] == own_continuation(node.boot)[..32] {
        return;
    }
    let order = match node.hidden.job(pid) {
        Some(job) => {
            let mut job = job.lock().unwrap_or_else(PoisonError::into_inner);
            job.stopped = false;
            job.last_order = orders::next_number();
            job.last_order
        }
        // It stands for nobody any more: the process itself has come meanwhile, or who needed it here has gone.
        None => orders::next_number(),
    };
    pass_on(node, pid, signal, Some(info), Some(order));
}

/// A surrogate was seen stopped. It may have been continued since, of which there will be a report.
fn stopped(node: &Arc<Node>, pid: Pid) {
    let (Some(job), Ok(Some(host))) = (node.hidden.job(pid), node.nest.host_pid(pid)) else {
        return;
    };
    let order = {
        let mut job = job.lock().unwrap_or_else(PoisonError::into_inner);
        if job.stopped || orders::is_stopped(host) != Some(true) {
            return;
        }
        job.stopped = true;
        job.last_order = orders::next_number();
        job.last_order
    };
    pass_on(node, pid, number::STOP, None, Some(order));
}

/// The payload of a SIGCONT by which this daemon continues a surrogate: the kernel lets nobody in the nest have sender 0
/// and know the value. (What comes after it in a siginfo is nothing.)
pub fn own_continuation(boot: u64) -> [u8; 128] {
    let mut info = [0u8; 128];
    info[0..4].copy_from_slice(&number::CONT.to_ne_bytes());
    info[8..12].copy_from_slice(&SI_QUEUE.to_ne_bytes());
    info[24..32].copy_from_slice(&boot.to_ne_bytes());
    info
}

fn pass_on(node: &Arc<Node>, pid: Pid, signal: i32, info: Option<&[u8; 128]>, order: Option<u64>) {
    let sent = Sent {
        signal,
        info,
        by: Caller::SYSTEM,
        order,
    };
    tracing::debug!(%pid, signal, ?order, "passing on what a surrogate was sent");
    match send(node, pid, sent) {
        Ok(()) => {}
        Err(failure) if failure.kind == FailureKind::NoProcess => {}
        Err(failure) => tracing::warn!("signal {signal} to process {pid} is lost: {}", failure.message),
    }
}

/// Somebody killed a surrogate by SIGKILL, which it could not take: the process is to end, too.
fn gone(node: &Arc<Node>, pid: Pid) {
    match node.hidden.kind(pid) {
        // What that is may be said of a later task of this number, which lives.
        Some(HiddenKind::Departed | HiddenKind::Relative) if lives(node, pid) => {}
        Some(HiddenKind::Departed | HiddenKind::Relative) => {
            // Known as dead here while its process dies where it is: see `notified`.
            node.hidden.is_killed(pid);
            pass_on(node, pid, number::KILL, None, None);
        }
        Some(HiddenKind::Keeper | HiddenKind::Blank | HiddenKind::Leaving) | None => {}
    }
}

fn child(node: &Arc<Node>, parent: Pid, info: &[u8; 128]) {
    let (code, child, status) = (word(info, 8), Pid(word(info, 16)), word(info, 24));
    let Some(change) = change(code, status) else {
        return tracing::warn!("process {child}: its parent is told {code}, which is not known here");
    };
    if let Some(kind) = node.hidden.kind(child) {
        // A surrogate that did what its process had done elsewhere: it was told from there. Or what a move has left, or
        // not begun with. A kind that only lives may be that of a later task of this number.
        match (change, kind) {
            (Change::Ended(_), HiddenKind::Leaving | HiddenKind::Keeper) => {
                node.hidden.remove(child);
                return;
            }
            // The child itself was here, and its parent comes before this news of it: by what it knows, the child lives.
            (Change::Ended(_), HiddenKind::Relative) if lives(node, child) => {}
            (Change::Ended(_) | Change::Stopped | Change::Continued, _) => return,
        }
    }
    let deadline = Instant::now() + TELLS_AT_MOST;
    // A process from elsewhere is watched, and its end told to its home, for itself; its stops are not.
    if !matches!(change, Change::Ended(_))
        && let Some(home) = node.modulus.home(child).filter(|home| *home != node.slot)
    {
        loop {
            let Some(after) = obeyed_now(node, child, change, home) else {
                return;
            };
            let told = tell(node, home, parent, child, change, after);
            if told != Some(PeerReply::NotYet) || Instant::now() > deadline {
                break;
            }
            thread::sleep(TELL_AGAIN_AFTER);
        }
    }
    // Where the parent is on its way, it is told when it has come.
    while Instant::now() < deadline {
        let slot = match node.locate(parent) {
            Ok(Place::At(slot)) => slot,
            Ok(Place::Here(_)) => {
                if let Change::Ended(status) = change {
                    end_late(node, child, status);
                }
                return;
            }
            Ok(Place::Ended { .. } | Place::Nowhere) => return,
            Err(failure) => {
                return tracing::warn!(
                    "process {parent} does not hear of its child {child}: {}",
                    failure.message
                );
            }
        };
        let Some(after) = obeyed_now(node, child, change, slot) else {
            return;
        };
        if !matches!(
            tell(node, slot, parent, child, change, after),
            Some(PeerReply::NotYet | PeerReply::NotHere)
        ) {
            return;
        }
        thread::sleep(TELL_AGAIN_AFTER);
    }
    tracing::warn!("process {parent} does not hear of its child {child}: it could not be reached");
}

/// Is there a task of this number that has not ended?
fn lives(node: &Node, pid: Pid) -> bool {
    let host = node.nest.host_pid(pid).ok().flatten();
    host.and_then(|host| ProcDir::process(host).stat().ok())
        .is_some_and(|stat| !matches!(stat.state, 'Z' | 'X'))
}

/// A surrogate that was made for a child which had ended here ends, too, and its parent is told so.
fn end_late(node: &Arc<Node>, child: Pid, status: ExitStatus) {
    let stands = matches!(node.hidden.kind(child), Some(HiddenKind::Relative));
    if stands
        && node.nest.host_pid(child).is_ok_and(|host| host.is_some())
        && let Err(e) = super::end(node, child, status)
    {
        tracing::warn!("what stands for process {child} does not end: {e}");
    }
}

/// The last order of a node that the child has obeyed, if it is still as it is told to be: read with nobody signalling it.
/// If it is not, the report of what it is now is on its way.
fn obeyed_now(node: &Arc<Node>, child: Pid, change: Change, slot: Slot) -> Option<u64> {
    let host = node.nest.host_pid(child).ok().flatten();
    node.mover.orders.looking(child, |obeyed| {
        let stopped = host.and_then(orders::is_stopped);
        let is_old = match change {
            Change::Ended(_) => false,
            Change::Stopped => stopped == Some(false),
            Change::Continued => stopped == Some(true),
        };
        (!is_old).then(|| obeyed.get(&slot).copied().unwrap_or(0))
    })
}

/// Tells a node; its answer, if that was one.
fn tell(node: &Arc<Node>, slot: Slot, parent: Pid, child: Pid, change: Change, after: u64) -> Option<PeerReply> {
    tracing::debug!(%parent, %child, ?change, after, ?slot, "telling of a child");
    let request = PeerRequest::ChildChanged {
        parent,
        child,
        change,
        after,
    };
    match node.peers.call(slot, &request) {
        Ok(reply @ (PeerReply::Done | PeerReply::NotYet | PeerReply::NotHere)) => Some(reply),
        Ok(other) => {
            tracing::warn!("node {} on the child {child}: {other:?}", node.peers.name(slot));
            None
        }
        Err(e) => {
            tracing::warn!("process {parent} may not hear of its child {child}: {e}");
            None
        }
    }
}

/// The kinds of change that a parent is told of.
fn change(code: i32, status: i32) -> Option<Change> {
    const EXITED: i32 = 1;
    const KILLED: i32 = 2;
    const DUMPED: i32 = 3;
    const TRAPPED: i32 = 4;
    const STOPPED: i32 = 5;
    const CONTINUED: i32 = 6;
    let killed = |core| Some(Change::Ended(ExitStatus::Signal { signal: status, core }));
    match code {
        EXITED => Some(Change::Ended(ExitStatus::Code(status))),
        KILLED => killed(false),
        DUMPED => killed(true),
        STOPPED | TRAPPED => Some(Change::Stopped),
        CONTINUED => Some(Change::Continued),
        _ => None,
    }
}

fn word(info: &[u8; 128], offset: usize) -> i32 {
    i32::from_ne_bytes([info[offset], info[offset + 1], info[offset + 2], info[offset + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_children() {
        assert_eq!(change(1, 7), Some(Change::Ended(ExitStatus::Code(7))));
        assert_eq!(
            change(3, 11),
            Some(Change::Ended(ExitStatus::Signal { signal: 11, core: true }))
        );
        assert_eq!(change(5, 19), Some(Change::Stopped));
        assert_eq!(change(6, 18), Some(Change::Continued));
        assert_eq!(change(9, 0), None);
    }
}
