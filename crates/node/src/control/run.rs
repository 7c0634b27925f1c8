//! `dunlin run`: a program, and the connection of the one who started it.
//!
//! Owns that connection: the start, then input, signals and sizes one way, output and the end the other. Refuses to know
//! pipes and nodes. Invariants: a caller that goes away before its program is a hang-up for the program; one that sends
//! more input than it was granted is such a caller.

use super::Identity;
use crate::daemon::events::run_ended;
use crate::daemon::node::{Node, failure};
use crate::nest::{SpawnError, SpawnSpec};
use crate::runs::{Owner, Run, Wiring};
use crate::signals::{self, Sent};
use crate::streams::outbox::Drain;
use dunlin_proto::control::{Failure, FailureKind, INPUT_WINDOW_BYTES, Reply, RunInput, RunSpec};
use dunlin_proto::frame;
use dunlin_proto::peer::Caller;
use rustix::process::Signal;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// The caller's connection, as output goes to it.
struct CallerDrain(UnixStream);

impl Drain for CallerDrain {
    fn put(&mut self, reply: Reply) -> io::Result<()> {
        frame::write(&mut self.0, &reply)
    }
}

/// Starts the program and serves its caller. An error is told by the connection's owner; a started run tells all itself.
pub fn serve(node: &Arc<Node>, identity: Identity, spec: RunSpec, stream: &UnixStream) -> Result<(), Failure> {
    if spec.argv.first().is_none_or(|program| program.is_empty()) {
        return Err(failure(
            FailureKind::Invalid,
            "there is no program to run",
            Some("dunlin run -- PROGRAM [ARGUMENT]…"),
        ));
    }
    let wiring = match (spec.detach, spec.tty) {
        (true, _) => Wiring::Detached,
        (false, Some(size)) => Wiring::Terminal(size),
        (false, None) => Wiring::Pipes,
    };
    let run = start(node, identity, spec, wiring, stream)?;
    if let (Wiring::Detached, Some(pid)) = (wiring, run.pid()) {
        return tell(stream, &Reply::Started { pid });
    }
    let mut told = 0;
    while let Ok(input) = frame::read(&mut &*stream) {
        if !take(node, &run, input, &mut told) {
            break;
        }
    }
    if node.runs.is_live(&run) {
        hang_up(node, &run);
    }
    Ok(())
}

fn start(
    node: &Arc<Node>,
    identity: Identity,
    spec: RunSpec,
    wiring: Wiring,
    stream: &UnixStream,
) -> Result<Arc<Run>, Failure> {
    let copy = || stream.try_clone().map_err(|e| other(&e));
    let (drain, hung) = (Box::new(CallerDrain(copy()?)), copy()?);
    // The reader of the connection notices, and hangs up.
    let lost = move || drop(hung.shutdown(Shutdown::Both));
    let owner = Owner {
        uid: identity.uid,
        gid: identity.gid,
    };
    let before = node.exits.latest();
    let nest = node.nest.clone();
    let run = node
        .runs
        .start::<SpawnError>(owner, wiring, Some(drain), lost, |stdio| {
            nest.spawn(SpawnSpec {
                argv: spec.argv,
                env: spec.env,
                cwd: spec.cwd,
                umask: spec.umask,
                uid: identity.uid,
                gid: identity.gid,
                groups: identity.groups,
                stdio,
                controlling_tty: matches!(wiring, Wiring::Terminal(_)),
            })
        });
    let run = run.map_err(|e| not_started(&e))?;
    // Its end may have been told before it was known to be a run's.
    if let Some(pid) = run.pid()
        && let Some(status) = node.exits.reaped_after(pid, before)
    {
        run_ended(node, &run, pid, status);
    }
    Ok(run)
}

/// Acts on one thing that the caller sent; `false`: it has broken the rules.
fn take(node: &Arc<Node>, run: &Run, input: RunInput, told: &mut u64) -> bool {
    let Some(pid) = run.pid() else { return false };
    match input {
        RunInput::Stdin(bytes) => {
            *told += bytes.len() as u64;
            if told.saturating_sub(run.streams().outbox().total_input_taken()) > 2 * INPUT_WINDOW_BYTES {
                tracing::warn!("the caller of run {pid} sends more input than it was granted");
                return false;
            }
            run.streams().input(&bytes);
        }
        RunInput::StdinEnd => run.streams().end_input(),
        // By the caller's own hand, on his own program.
        RunInput::Signal(signal) => {
            if let Err(e) = signals::send(node, pid, Sent::bare(signal, Caller::user(run.owner().uid))) {
                tracing::warn!("signal {signal} to run {pid}: {}", e.message);
            }
        }
        RunInput::Resize(size) => {
            if let Err(e) = run.streams().resize(size) {
                tracing::warn!("the size of the terminal of run {pid}: {e}");
            }
        }
    }
    true
}

fn hang_up(node: &Arc<Node>, run: &Run) {
    let Some(pid) = run.pid() else { return };
    tracing::info!("the caller of run {pid} is gone");
    // The kernel itself hangs up who has the terminal, when that is closed.
    if !run.has_terminal()
        && let Err(e) = signals::send(node, pid, Sent::bare(Signal::HUP.as_raw(), Caller::SYSTEM))
        && e.kind != FailureKind::NoProcess
    {
        tracing::warn!("run {pid} does not hear that its caller is gone: {}", e.message);
    }
    node.runs.abandon(run);
}

fn not_started(error: &SpawnError) -> Failure {
    match error {
        SpawnError::Exec { program, source } if source.kind() == io::ErrorKind::NotFound => failure(
            FailureKind::NotFound,
            format!("{program}: not found"),
            Some("is it installed on that node?"),
        ),
        SpawnError::Exec { program, source } => {
            failure(FailureKind::NotExecutable, format!("{program}: {source}"), None)
        }
        SpawnError::Other(e) => other(e),
    }
}

fn other(error: &io::Error) -> Failure {
    failure(
        FailureKind::Other,
        format!("the program was not started: {error}"),
        None,
    )
}

fn tell(stream: &UnixStream, reply: &Reply) -> Result<(), Failure> {
    // A caller that does not listen has its program nevertheless.
    if let Err(e) = frame::write(&mut &*stream, reply) {
        tracing::debug!("nobody hears that a run was started: {e}");
    }
    Ok(())
}
