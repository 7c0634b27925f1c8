//! What joins the mover to the rest of the daemon.
//!
//! Owns the translation: commands into moves, a move's reports into replies, the streams of runs into what the mover
//! knows of them. Refuses to know how a process is moved.

use super::node::{Node, failure};
use crate::mover::{MoveOutcome, Report, Streams};
use crate::peers::Peers;
use crate::runs::Runs;
use dunlin_proto::control::{Failure, FailureKind, MoveRequest, Reply};
use dunlin_proto::ids::{Pid, RunId, Slot};
use dunlin_proto::peer::{PeerReply, PeerRequest};
use dunlin_proto::stream::{StreamKind, StreamRef};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Between attempts to tell an origin that a run's top process is here now, and how many are made.
const TELL_AGAIN_AFTER: Duration = Duration::from_millis(100);
const TELLINGS: u32 = 100;

/// Tells the caller of a command something that is not the last word; an error means that nobody listens any more.
pub type Tell<'a> = &'a mut dyn FnMut(Reply) -> io::Result<()>;

/// Moves a process that is here; the last reply. A caller that does not listen any more does not stop it.
pub fn move_out(node: &Node, request: &MoveRequest, tell: Tell<'_>) -> Result<Reply, Failure> {
    let reports = node
        .mover
        .move_out(request.clone())
        .map_err(|e| not_begun(request.pid, &e))?;
    for report in reports {
        match report {
            Report::Progress(progress) => drop(tell(Reply::Progress(progress))),
            Report::Outcome(MoveOutcome::Moved(reports)) => return Ok(Reply::Moved(reports)),
            Report::Outcome(MoveOutcome::Refused(obstacles)) => return Ok(Reply::Refused(obstacles)),
            Report::Outcome(MoveOutcome::Failed(failure)) => return Err(failure),
        }
    }
    let message = format!("the move of process {} ended without a word", request.pid);
    Err(failure(
        FailureKind::MoveFailed,
        message,
        Some("`dunlin ps` says where it runs"),
    ))
}

/// Would a process that is here move?
pub fn can_move(node: &Node, pid: Pid, to: Option<Slot>) -> Result<Reply, Failure> {
    node.mover
        .examine_here(pid, to)
        .map_err(|e| not_begun(pid, &e))?
        .map(Reply::Verdict)
}

fn not_begun(pid: Pid, error: &io::Error) -> Failure {
    failure(
        FailureKind::Other,
        format!("process {pid} was not looked at: {error}"),
        None,
    )
}

/// The streams of runs, for the mover.
pub struct RunStreams {
    /// This node's runs and relays.
    pub runs: Arc<Runs>,
    /// The origins of others.
    pub peers: Arc<Peers>,
}

impl RunStreams {
    /// Makes the terminal here like the origin says it is.
    fn set_terminal(&self, run: RunId) -> io::Result<()> {
        match self
            .peers
            .call(run.origin, &PeerRequest::Terminal { run })
            .map_err(io::Error::other)?
        {
            PeerReply::Tty(state) => self.runs.set_terminal(run, &state),
            _ => Ok(()),
        }
    }
}

impl Streams for RunStreams {
    fn identify(&self, fd: BorrowedFd<'_>) -> Option<(RunId, u8)> {
        let stream = self.runs.identify(fd).unwrap_or_else(|e| {
            tracing::warn!("a descriptor could not be looked at: {e}");
            None
        })?;
        Some((stream.run, stream.stream.number()))
    }

    fn open(&self, run: RunId, stream: u8) -> io::Result<OwnedFd> {
        let stream = stream_ref(run, stream)?;
        let near = self.runs.open_remote(stream)?;
        if stream.stream == StreamKind::Tty {
            // Before anybody has it as the controlling terminal, and would be sent SIGWINCH for its having a size.
            self.set_terminal(run)?;
        }
        Ok(near)
    }

    fn settle(&self, run: RunId, stream: u8) -> io::Result<()> {
        let Some(state) = self.runs.settle(stream_ref(run, stream)?)? else {
            return Ok(());
        };
        match self.peers.call(run.origin, &PeerRequest::TerminalIs { run, state }) {
            Ok(_) => Ok(()),
            Err(e) => Err(io::Error::other(e)),
        }
    }

    fn departed(&self, pid: Pid, streams: &[(RunId, u8)], to: Slot) {
        for run in runs_of(streams)
            .into_iter()
            .filter(|run| self.runs.top(*run) == Some(pid))
        {
            if let Err(e) = self.runs.departed(run, to) {
                tracing::warn!("the input of process {pid} follows it late: {e}");
            }
        }
    }

    fn arrived(&self, pid: Pid, streams: &[(RunId, u8)]) {
        for run in runs_of(streams) {
            if streams.contains(&(run, StreamKind::Tty.number()))
                && let Err(e) = self.set_terminal(run)
            {
                tracing::warn!("the terminal of process {pid} is not as it was: {e}");
            }
            self.tell_origin(run, pid);
        }
    }
}

impl RunStreams {
    /// In the background: the input goes here when the last node has given back what was not read there.
    fn tell_origin(&self, run: RunId, pid: Pid) {
        let peers = self.peers.clone();
        let tell = move || {
            for _ in 0..TELLINGS {
                match peers.call(run.origin, &PeerRequest::InputHere { run, pid }) {
                    Ok(PeerReply::Done) => return,
                    Ok(_) | Err(_) => thread::sleep(TELL_AGAIN_AFTER),
                }
            }
            tracing::warn!(
                "the origin of the run of process {pid}, {}, does not send its input here",
                run.origin
            );
        };
        if let Err(e) = thread::Builder::new().name("run arrived".into()).spawn(tell) {
            tracing::error!("no thread to tell the origin of a run that process {pid} is here: {e}");
        }
    }
}

fn runs_of(streams: &[(RunId, u8)]) -> BTreeSet<RunId> {
    streams.iter().map(|(run, _)| *run).collect()
}

fn stream_ref(run: RunId, number: u8) -> io::Result<StreamRef> {
    let stream = StreamKind::from_number(number);
    let stream =
        stream.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("a run has no stream {number}")))?;
    Ok(StreamRef { run, stream })
}
