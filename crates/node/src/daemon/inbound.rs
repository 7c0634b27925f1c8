//! What peers ask of this node.
//!
//! Owns the dispatch by purpose and by request. Refuses to act: each request is one call into the part that it
//! concerns. Invariants: a request of a home is answered only for PIDs of this home; a peer's word about a process that
//! is not there is ignored.

use super::Node;
use super::node::{nest_failure, no_process};
use super::table::reserve;
use crate::control;
use crate::peers::Answer;
use crate::signals;
use dunlin_proto::control::{ExitStatus, Request};
use dunlin_proto::frame;
use dunlin_proto::ids::{Incarnation, Pid, Slot};
use dunlin_proto::peer::{PeerReply, PeerRequest, Purpose};
use std::io;
use std::net::TcpStream;
use std::sync::{Arc, Weak};

/// Serves a connection that a peer has opened, until it ends.
pub fn serve(node: &Arc<Node>, mut stream: TcpStream) -> io::Result<()> {
    let hello = node.peers.greet(&mut stream)?;
    match (hello.purpose, &node.mover) {
        (Purpose::Rpc, _) => loop {
            let request: PeerRequest = match frame::read(&mut stream) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                read => read?,
            };
            frame::write(&mut stream, &answer(node, hello.from, request))?;
        },
        (Purpose::Command(caller), _) => {
            let request: Request = frame::read(&mut stream)?;
            let last = control::forwarded(node, caller, &request, &mut |reply| frame::write(&mut &stream, &reply));
            frame::write(&mut stream, &last)
        }
        (Purpose::Stream(open), _) => node.runs.serve(hello.from, open, stream),
        (Purpose::Move(id), Some(mover)) => {
            mover.serve_move(node, hello.from, id, stream);
            Ok(())
        }
        (Purpose::Pages(id), Some(mover)) => {
            mover.serve_pages(node, hello.from, id, stream);
            Ok(())
        }
        (Purpose::Move(_) | Purpose::Pages(_), None) => Err(io::Error::other("this daemon does not move processes")),
    }
}

/// A node that answers the requests it makes to itself, as long as it is there.
pub struct NodeAnswer(pub Weak<Node>);

impl Answer for NodeAnswer {
    fn answer(&self, from: Slot, request: PeerRequest) -> PeerReply {
        match self.0.upgrade() {
            Some(node) => answer(&node, from, request),
            None => PeerReply::NotHere,
        }
    }
}

fn answer(node: &Arc<Node>, from: Slot, request: PeerRequest) -> PeerReply {
    let failed = |e: io::Error| PeerReply::Failed(nest_failure(e));
    match request {
        PeerRequest::Ps => node.local_rows().map_or_else(failed, PeerReply::Processes),
        PeerRequest::Status => node.status(false).map_or_else(failed, PeerReply::Status),
        PeerRequest::Locate { pid } => node.located(pid).map_or_else(PeerReply::Failed, PeerReply::Located),
        PeerRequest::Signal {
            pid,
            signal,
            siginfo,
            by,
        } => signals::deliver(node, pid, signal, siginfo.as_deref(), by),
        PeerRequest::Wait { pid, by } => control::wait_here(node, pid, by),
        PeerRequest::Exited {
            pid,
            uid,
            status,
            incarnation,
        } => exited(node, from, pid, uid, status, incarnation),
        PeerRequest::ChildChanged { child, change } => {
            signals::child_changed(node, child, change).map_or_else(failed, |()| PeerReply::Done)
        }
        PeerRequest::InputHere { run } => match node.runs.input_is_at(run, from) {
            true => PeerReply::Done,
            false => PeerReply::NotYet,
        },
    }
}

/// A process of this home has ended on node `from`.
fn exited(node: &Arc<Node>, from: Slot, pid: Pid, uid: u32, status: ExitStatus, incarnation: Incarnation) -> PeerReply {
    if node.modulus.home(pid) != Some(node.slot) {
        return PeerReply::Failed(no_process(pid));
    }
    let known = node.table().read().entry(pid).map(|e| (e.place.node(), e.incarnation));
    // Without an entry it has been told before; with a newer one it has moved on since, and lives.
    if known.is_none_or(|(place, newest)| place != from || newest > incarnation) {
        return PeerReply::Done;
    }
    node.exits.record(pid, status, uid);
    let ended = node.change_table(|table| table.ended(pid, incarnation));
    let surrogate = node
        .mover
        .as_ref()
        .map_or(Ok(()), |mover| mover.end_surrogate(node, pid, status));
    // Its number is free when the surrogate is gone, which the nest sees for itself.
    match ended.and_then(|changes| surrogate.and_then(|()| reserve(&node.nest, &changes))) {
        Ok(()) => PeerReply::Done,
        Err(e) => PeerReply::Failed(nest_failure(e)),
    }
}
