//! What surrogates report, passed on to the processes they stand for.
//!
//! Owns the meaning of each report. Refuses to know how surrogates are made and ended. What happens to a surrogate of a
//! process (somebody here signals it, stops it, kills it) happens to the process. What happens to a child whose parent
//! here is a surrogate (it ends, stops, goes on) is told to the child's home and to the node of the parent, where the
//! child's surrogates do the same, and so the parent's own kernel tells it.
//!
//! Invariant: a stop or continue that this daemon caused in a surrogate, to show there what the process does, is not
//! passed back to the process ([`crate::processes::Hidden::expect_echo`]).

use super::{number, send};
use crate::daemon::node::{Node, Place};
use crate::nest::NestEvent;
use crate::processes::{Echo, HiddenKind};
use dunlin_proto::control::{ExitStatus, FailureKind};
use dunlin_proto::ids::{Pid, Slot};
use dunlin_proto::peer::{Caller, Change, PeerReply, PeerRequest};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Acts on one report. May wait for peers.
pub fn act(node: &Arc<Node>, event: NestEvent) {
    match event {
        NestEvent::SurrogateSignal { pid, siginfo } => signal(node, pid, &siginfo),
        NestEvent::SurrogateStopped { pid } => {
            if !node.hidden.take_echo(pid, Echo::Stop) {
                pass_on(node, pid, number::STOP, None);
            }
        }
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
    // From outside the nest (0): from this daemon, perhaps.
    if signal == number::CONT && sender == 0 && node.hidden.take_echo(pid, Echo::Continue) {
        return;
    }
    pass_on(node, pid, signal, Some(info));
}

fn pass_on(node: &Arc<Node>, pid: Pid, signal: i32, info: Option<&[u8; 128]>) {
    // Nobody's any more: it has become the process, which was sent the signal with the rest of what it had.
    if node.hidden.kind(pid).is_none() {
        return;
    }
    match send(node, pid, signal, info, Caller::SYSTEM) {
        Ok(()) => {}
        Err(failure) if failure.kind == FailureKind::NoProcess => {}
        Err(failure) => tracing::warn!("signal {signal} to process {pid} is lost: {}", failure.message),
    }
}

/// Somebody killed a surrogate by SIGKILL, which it could not take: the process is to end, too.
fn gone(node: &Arc<Node>, pid: Pid) {
    match node.hidden.kind(pid) {
        Some(HiddenKind::Departed | HiddenKind::Relative) => {
            pass_on(node, pid, number::KILL, None);
            node.hidden.remove(pid);
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
    for slot in told {
        match node.peers.call(slot, &PeerRequest::ChildChanged { child, change }) {
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
