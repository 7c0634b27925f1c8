//! Every command but `run`.
//!
//! Owns where each is carried out: here, or on the node of the process or of its log, to which the whole command is then
//! passed on. Refuses to pass on what was passed on to it: a process that has moved meanwhile is an error that says so.

use crate::control::gateway;
use crate::daemon::moving::{self, Tell};
use crate::daemon::node::{Node, Place, failure, nest_failure, no_process, unexpected, unreachable};
use crate::processes::exits::Seen;
use crate::signals::{self, Sent};
use dunlin_proto::control::{ExitStatus, Failure, FailureKind, Reply, Request};
use dunlin_proto::frame;
use dunlin_proto::ids::{Pid, Slot};
use dunlin_proto::peer::{Caller, PeerReply, PeerRequest, Purpose};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// A node waits so long for a process on behalf of another before it says that it still runs.
const WAIT_WITHIN: Duration = Duration::from_secs(2);
/// How long the answer to that may take.
const WAIT_ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// How often the reader of a log is looked for.
const FOLLOW_WITHIN: Duration = Duration::from_secs(1);
/// Between two looks for a process that is between two nodes.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(50);
/// So many looks.
const LOOKS: u32 = 100;

/// Carries out a command of this node's control socket; the last reply.
pub fn local(node: &Arc<Node>, caller: Caller, request: &Request, stream: &UnixStream) -> Reply {
    let tell: Tell<'_> = &mut |reply| frame::write(&mut &*stream, &reply);
    let done = match request {
        Request::Ps { local: true } => node
            .local_rows()
            .map(|rows| Reply::Processes { rows, silent: vec![] })
            .map_err(nest_failure),
        Request::Ps { local: false } => node
            .all_rows()
            .map(|(rows, silent)| Reply::Processes { rows, silent })
            .map_err(nest_failure),
        Request::Status => node.status(true).map(Reply::Status).map_err(nest_failure),
        Request::Kill { pid, signal } => signals::send(node, *pid, Sent::bare(*signal, caller)).map(|()| Reply::Done),
        Request::Wait { pid } => wait(node, *pid, caller, stream).map(Reply::Exited),
        Request::Logs { pid, follow } => match node.modulus.home(*pid) {
            Some(home) if home != node.slot => pass_on(node, home, caller, request, tell),
            Some(_) | None => logs(node, *pid, *follow, caller, tell),
        },
        Request::Move(_) | Request::CanMove { .. } => move_anywhere(node, caller, request, tell),
        Request::Gateway => gateway(node, caller, request, tell),
        Request::Run(_) => Err(failure(FailureKind::Invalid, "a run is not served here", None)),
    };
    done.unwrap_or_else(Reply::Error)
}

/// Carries out a command that another node has passed on; the last reply.
pub fn forwarded(node: &Arc<Node>, caller: Caller, request: &Request, tell: Tell<'_>) -> Reply {
    let done = match request {
        Request::Logs { pid, follow } => logs(node, *pid, *follow, caller, tell),
        Request::Move(_) | Request::CanMove { .. } => move_here(node, caller, request, tell),
        Request::Gateway => gateway::table(node),
        Request::Ps { .. } | Request::Status | Request::Kill { .. } | Request::Wait { .. } | Request::Run(_) => {
            Err(failure(
                FailureKind::Invalid,
                "this command is not passed on between nodes",
                None,
            ))
        }
    };
    done.unwrap_or_else(Reply::Error)
}

fn gateway(node: &Node, caller: Caller, request: &Request, tell: Tell<'_>) -> Result<Reply, Failure> {
    match gateway::holder(node)? {
        here if here == node.slot => gateway::table(node),
        there => pass_on(node, there, caller, request, tell),
    }
}

/// Has another node carry a command out.
fn pass_on(node: &Node, to: Slot, caller: Caller, request: &Request, tell: Tell<'_>) -> Result<Reply, Failure> {
    let mut stream = node
        .peers
        .open(to, Purpose::Command(caller))
        .map_err(|e| unreachable(&e))?;
    let mut exchange = || -> io::Result<Reply> {
        frame::write(&mut stream, request)?;
        loop {
            let reply: Reply = frame::read(&mut stream)?;
            if reply.is_last() {
                return Ok(reply);
            }
            tell(reply)?;
        }
    };
    exchange().map_err(|e| {
        let message = format!("node {} was lost before it had the last word: {e}", node.peers.name(to));
        failure(
            FailureKind::Unreachable,
            message,
            Some("what was asked may go on there"),
        )
    })
}

fn move_anywhere(node: &Arc<Node>, caller: Caller, request: &Request, tell: Tell<'_>) -> Result<Reply, Failure> {
    let pid = moved(request)?;
    destination(node, request)?;
    match node.locate(pid)? {
        Place::Here(_) => move_here(node, caller, request, tell),
        Place::At(slot) => pass_on(node, slot, caller, request, tell),
        Place::Ended { .. } | Place::Nowhere => Err(no_process(pid)),
    }
}

fn move_here(node: &Arc<Node>, caller: Caller, request: &Request, tell: Tell<'_>) -> Result<Reply, Failure> {
    let pid = moved(request)?;
    let to = destination(node, request)?;
    if node.here(pid).map_err(nest_failure)?.is_none() {
        let message = format!("process {pid} is not on node {}", node.config.name);
        return Err(failure(
            FailureKind::Unreachable,
            message,
            Some("it may be moving just now; try again"),
        ));
    }
    let (uid, _) = node
        .proc
        .users(pid)
        .map_err(nest_failure)?
        .ok_or_else(|| no_process(pid))?;
    node.permit(caller, uid, pid)?;
    match request {
        Request::Move(request) => moving::move_out(node, request, tell),
        _ => moving::can_move(node, pid, to),
    }
}

fn moved(request: &Request) -> Result<Pid, Failure> {
    match request {
        Request::Move(request) => Ok(request.pid),
        Request::CanMove { pid, .. } => Ok(*pid),
        _ => Err(failure(FailureKind::Invalid, "not a move", None)),
    }
}

fn destination(node: &Node, request: &Request) -> Result<Option<Slot>, Failure> {
    let name = match request {
        Request::Move(request) => Some(&request.to),
        Request::CanMove { to, .. } => to.as_ref(),
        _ => None,
    };
    let Some(name) = name else { return Ok(None) };
    let nodes = node.config.nodes().map(|(_, n)| n).collect::<Vec<_>>().join(", ");
    let unknown = || {
        failure(
            FailureKind::NoNode,
            format!("there is no node {name}"),
            Some(&format!("there are {nodes}")),
        )
    };
    node.config.slot_of(name).map(Some).ok_or_else(unknown)
}

fn logs(node: &Node, pid: Pid, follow: bool, caller: Caller, tell: Tell<'_>) -> Result<Reply, Failure> {
    let broken = |e: io::Error| failure(FailureKind::Other, format!("the log of {pid}: {e}"), None);
    let missing = || {
        failure(
            FailureKind::NoProcess,
            format!("there is no log of {pid}"),
            Some("only `dunlin run -d` makes one"),
        )
    };
    let mut log = node.logs.read(pid).map_err(broken)?.ok_or_else(missing)?;
    node.permit(caller, log.owner().map_err(broken)?, pid)?;
    loop {
        let more = follow && log.wait(FOLLOW_WITHIN).map_err(broken)?;
        loop {
            let bytes = log.read().map_err(broken)?;
            if bytes.is_empty() {
                break;
            }
            tell(Reply::Output { stream: 1, bytes }).map_err(broken)?;
        }
        if !more {
            return Ok(Reply::Done);
        }
        // An empty piece finds out whether anybody still listens.
        tell(Reply::Output {
            stream: 1,
            bytes: vec![],
        })
        .map_err(broken)?;
    }
}

fn wait(node: &Arc<Node>, pid: Pid, caller: Caller, stream: &UnixStream) -> Result<ExitStatus, Failure> {
    let mut looks = 0;
    while !is_gone(stream) {
        let reply = match node.locate(pid)? {
            Place::Here(_) => wait_here(node, pid, caller),
            Place::At(slot) => {
                let request = PeerRequest::Wait { pid, by: caller };
                match node
                    .peers
                    .call_within(slot, &request, WAIT_ANSWER_WITHIN)
                    .map_err(|e| unreachable(&e))?
                {
                    reply @ (PeerReply::Exited(_) | PeerReply::NotYet | PeerReply::NotHere) => reply,
                    other => return Err(unexpected(node, slot, &other)),
                }
            }
            Place::Ended { status, uid } => return node.permit(caller, uid, pid).map(|()| status),
            Place::Nowhere => return Err(no_process(pid)),
        };
        match reply {
            PeerReply::Exited(status) => return Ok(status),
            PeerReply::Failed(failure) => return Err(failure),
            PeerReply::NotYet => looks = 0,
            _ if looks < LOOKS => {
                looks += 1;
                thread::sleep(LOOK_AGAIN_AFTER);
            }
            _ => break,
        }
    }
    let message = format!("process {pid} is being moved, and could not be reached");
    Err(failure(FailureKind::Unreachable, message, Some("try again")))
}

/// Waits for a bounded while for a process that should be here.
pub fn wait_here(node: &Arc<Node>, pid: Pid, by: Caller) -> PeerReply {
    let watched = || -> Result<PeerReply, Failure> {
        let Some(pidfd) = node.here(pid).map_err(nest_failure)? else {
            let Some(ended) = node.exits.ended(pid) else {
                return Ok(PeerReply::NotHere);
            };
            node.permit(by, ended.uid, pid)?;
            return Ok(PeerReply::Exited(ended.status));
        };
        if let Some((uid, _)) = node.proc.users(pid).map_err(nest_failure)? {
            node.permit(by, uid, pid)?;
        }
        let watch = node.watch(pid, pidfd).map_err(nest_failure)?;
        Ok(match watch.wait(WAIT_WITHIN) {
            Seen::Running => PeerReply::NotYet,
            Seen::Ended(status) => PeerReply::Exited(status),
            Seen::Left => PeerReply::NotHere,
        })
    };
    watched().unwrap_or_else(PeerReply::Failed)
}

/// Has the caller closed its connection?
fn is_gone(stream: &UnixStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&now)).is_ok_and(|_| polled[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP))
}
