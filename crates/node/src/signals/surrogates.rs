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
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

/// From the kernel itself.
const SI_KERNEL: i32 = 0x80;
/// From sigqueue(3), with a value.
const SI_QUEUE: i32 = -1;

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
    if info[..32] == own_continuation(node)[..32] {
        return;
    }
    if let Some(job) = node.hidden.job(pid) {
        let order = {
            let mut job = job.lock().unwrap_or_else(PoisonError::into_inner);
            job.stopped = false;
            job.last_order = orders::next_number();
            job.last_order
        };
        pass_on(node, pid, signal, Some(info), Some(order));
    }
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
pub fn own_continuation(node: &Node) -> [u8; 128] {
    let mut info = [0u8; 128];
    info[0..4].copy_from_slice(&number::CONT.to_ne_bytes());
    info[8..12].copy_from_slice(&SI_QUEUE.to_ne_bytes());
    info[24..32].copy_from_slice(&node.boot.to_ne_bytes());
    info
}

fn pass_on(node: &Arc<Node>, pid: Pid, signal: i32, info: Option<&[u8; 128]>, order: Option<u64>) {
    // Nobody's any more: it has become the process, which was sent the signal with the rest of what it had.
    if node.hidden.kind(pid).is_none() {
        return;
    }
    let sent = Sent {
        signal,
        info,
        by: Caller::SYSTEM,
        order,
    };
    match send(node, pid, sent) {
        Ok(()) => {}
        Err(failure) if failure.kind == FailureKind::NoProcess => {}
        Err(failure) => tracing::warn!("signal {signal} to process {pid} is lost: {}", failure.message),
    }
}

/// Somebody killed a surrogate by SIGKILL, which it could not take: the process is to end, too.
fn gone(node: &Arc<Node>, pid: Pid) {
    match node.hidden.kind(pid) {
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
        if matches!(change, Change::Ended(_)) && matches!(kind, HiddenKind::Leaving | HiddenKind::Keeper) {
            node.hidden.remove(child);
        }
        return;
    }
    let home = node.modulus.home(child);
    let parent_at = match node.locate(parent) {
        Ok(Place::At(slot)) => Some(slot),
        Ok(Place::Here(_) | Place::Ended { .. } | Place::Nowhere) => None,
        Err(failure) => {
            tracing::warn!(
                "process {parent} does not hear of its child {child}: {}",
                failure.message
            );
            None
        }
    };
    let mut told: BTreeSet<Slot> = parent_at.into_iter().collect();
    // A process from elsewhere is watched, and its end told to its home, for itself; its stops are not.
    if !matches!(change, Change::Ended(_)) {
        told.extend(home);
    }
    told.remove(&node.slot);
    if told.is_empty() {
        return;
    }
    // What it had obeyed, and that it is so then, is read with nobody signalling it. If it is not so any more, the report
    // of what it is now is on its way.
    let host = node.nest.host_pid(child).ok().flatten();
    let (obeyed, is_old) = node.mover.orders.looking(child, |obeyed| {
        let stopped = host.and_then(orders::is_stopped);
        let is_old = match change {
            Change::Ended(_) => false,
            Change::Stopped => stopped == Some(false),
            Change::Continued => stopped == Some(true),
        };
        (obeyed.clone(), is_old)
    });
    if is_old {
        return;
    }
    for slot in told {
        let after = obeyed.get(&slot).copied().unwrap_or(0);
        match node
            .peers
            .call(slot, &PeerRequest::ChildChanged { child, change, after })
        {
            Ok(PeerReply::Done) => {}
            Ok(other) => tracing::warn!("node {} on the child {child}: {other:?}", node.peers.name(slot)),
            Err(e) => tracing::warn!("process {parent} may not hear of its child {child}: {e}"),
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
