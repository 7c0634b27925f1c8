//! Stopping threads, and what keeps a process from being stopped at all.

use super::CaptureError;
use crate::obstacle::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::status::Status;
use dunlin_sys::ptrace::{Running, Stop, Stopped, TraceError};
use std::time::{Duration, Instant};

/// How long a thread may take to stop before the move is refused.
pub(super) const STOP_PATIENCE: Duration = Duration::from_secs(2);

pub(super) fn refuse_at_once(pid: Pid, dir: &ProcDir, status: &Status) -> Result<(), CaptureError> {
    let mut obstacles = Vec::new();
    if matches!(status.state, 'Z' | 'X') {
        if status.threads <= 1 {
            return Err(CaptureError::Gone);
        }
        obstacles.push(obstacle(
            pid,
            "thread",
            format_args!("thread {pid}"),
            "the first thread has ended while others run",
            "such a process cannot be moved; start it again where it should run",
        ));
    }
    if status.tracer != 0 {
        let name = ProcDir::process(status.tracer).text("comm").unwrap_or_default();
        obstacles.push(obstacle(
            pid,
            "thread",
            format_args!("process {pid}"),
            format!("it is traced by process {} ({})", status.tracer, name.trim()),
            "end the debugger or strace session first",
        ));
    }
    if dir.text("status")?.lines().any(|l| l == "Seccomp:\t1") {
        obstacles.push(obstacle(
            pid,
            "thread",
            format_args!("process {pid}"),
            "it is in seccomp's strict mode and cannot make the calls that a move needs",
            "use seccomp filters instead of strict mode",
        ));
    }
    if obstacles.is_empty() {
        Ok(())
    } else {
        Err(CaptureError::Obstacles(obstacles))
    }
}

/// Stops one thread; one that does not stop is an obstacle.
pub(super) fn stop_one(pid: Pid, running: Running) -> Result<(Stopped, Stop), CaptureError> {
    running.interrupt()?;
    await_stop(pid, running)
}

/// Waits for a thread that was asked to stop.
pub(super) fn await_stop(pid: Pid, running: Running) -> Result<(Stopped, Stop), CaptureError> {
    running
        .stopped(Instant::now() + STOP_PATIENCE)
        .map_err(|error| match error {
            TraceError::Unstoppable { tid, .. } => CaptureError::Obstacles(vec![unstoppable(pid, tid)]),
            other => other.into(),
        })
}

fn unstoppable(pid: Pid, tid: i32) -> Obstacle {
    let wchan = ProcDir::process(tid).text("wchan").unwrap_or_default();
    obstacle(
        pid,
        "thread",
        format_args!("thread with host number {tid}"),
        format!("it sleeps uninterruptibly ({wchan}): a vfork parent, or a file system that does not answer"),
        "wait until the call has ended, then try again",
    )
}
