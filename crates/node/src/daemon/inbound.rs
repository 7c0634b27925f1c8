//! What peers ask of this node.
//!
//! Owns the dispatch by purpose and by request. Refuses to act: each request is one call into the part that it
//! concerns. Invariants: a request of a home is answered only for PIDs of this home; a peer's word about a process that
//! is not there is ignored.

use super::Node;
use super::node::{failure, nest_failure};
use crate::control;
use crate::edge::announce;
use crate::peers::Answer;
use crate::signals::{self, Sent};
use dunlin_proto::control::{FailureKind, Request};
use dunlin_proto::frame;
use dunlin_proto::ids::Slot;
use dunlin_proto::peer::{PeerReply, PeerRequest, Purpose};
use std::io;
use std::net::TcpStream;
use std::sync::{Arc, Weak};

/// Serves a connection that a peer has opened, until it ends.
pub fn serve(node: &Arc<Node>, mut stream: TcpStream) -> io::Result<()> {
    let hello = node.peers.greet(&mut stream)?;
    match hello.purpose {
        Purpose::Rpc => loop {
            let request: PeerRequest = match frame::read(&mut stream) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                read => read?,
            };
            frame::write(&mut stream, &answer(node, hello.from, request))?;
        },
        Purpose::Command(caller) => {
            let request: Request = frame::read(&mut stream)?;
            let last = control::forwarded(node, caller, &request, &mut |reply| frame::write(&mut &stream, &reply));
            frame::write(&mut stream, &last)
        }
        Purpose::Stream(open) => node.runs.serve(hello.from, open, stream),
        Purpose::Relocation => {
            node.mover.serve(hello.from, stream);
            Ok(())
        }
        Purpose::Pages(_) => node.mover.images.serve(stream).map_err(io::Error::other),
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
            order,
        } => {
            let info = None;
            let sent = Sent {
                signal,
                info,
                by,
                order,
            };
            signals::deliver(node, from, pid, siginfo.as_deref(), sent)
        }
        PeerRequest::Wait { pid, by } => control::wait_here(node, pid, by),
        PeerRequest::ChildChanged {
            parent,
            child,
            change,
            after,
        } => {
            let told = signals::child_changed(node, parent, child, change, after);
            told.unwrap_or_else(failed)
        }
        PeerRequest::InputHere { run, pid } => match node.runs.is_at(run, pid, from) {
            true => PeerReply::Done,
            false => PeerReply::NotYet,
        },
        PeerRequest::TerminalIs { run, state } => {
            node.runs.terminal_is(run, state);
            PeerReply::Done
        }
        PeerRequest::Terminal { run } => node.runs.terminal(run).map_or(PeerReply::NotHere, PeerReply::Tty),
        PeerRequest::Drain { pid } => PeerReply::Drain(node.mover.drain_here(pid)),
        PeerRequest::Examine { plans } => match node.mover.examine_plans(&plans) {
            Ok(obstacles) => PeerReply::Obstacles(obstacles),
            Err(why) => PeerReply::Failed(failure(FailureKind::Invalid, why, None)),
        },
        PeerRequest::Ahead { by, pid } => node.mover.ahead_here(by, pid),
        PeerRequest::Recall { by, pid, ranges } => node.mover.recall_here(by, pid, ranges),
        PeerRequest::Sockets { mac, news } => match announce::take(&node.edge, from, mac, news) {
            Ok(()) => PeerReply::Done,
            Err(e) => PeerReply::Failed(failure(FailureKind::Other, e.to_string(), None)),
        },
        request @ (PeerRequest::ClaimPorts { .. } | PeerRequest::PortsBound { .. } | PeerRequest::WhichPorts) => {
            match &node.ports {
                Some(ports) => ports.answer(from, request),
                None => PeerReply::NotHere,
            }
        }
        PeerRequest::Clocks => PeerReply::Clocks(crate::mover::raw_clocks()),
    }
}
