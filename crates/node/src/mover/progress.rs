//! How far a move has got, for whoever asked for it.
//!
//! Owns the times and counts of one move at its source. Refuses to print.

use super::Mover;
use dunlin_proto::control::{MoveMode, MovePhase, MoveProgress, MoveReport, Quantiles, Step};
use dunlin_proto::ids::{Pid, Slot};
use dunlin_proto::peer::{Drain, PeerReply, PeerRequest};
use std::time::Instant;

/// The clock of one move.
#[derive(Debug, Clone)]
pub struct Times {
    /// The request came.
    pub asked: Instant,
    /// The freeze began.
    pub frozen: Option<Instant>,
    /// It runs on the new node.
    pub resumed: Option<Instant>,
    /// When that was heard, if something was done before it was taken note of.
    pub resumed_heard: Option<Instant>,
    /// The last page has come.
    pub drained: Option<Instant>,
    /// What travelled inside the freeze.
    pub essence_bytes: u64,
    /// What the freeze consisted of here.
    pub steps: Vec<Step>,
}

impl Times {
    /// A move is asked for.
    pub fn start() -> Times {
        Times {
            asked: Instant::now(),
            frozen: None,
            resumed: None,
            resumed_heard: None,
            drained: None,
            essence_bytes: 0,
            steps: Vec::new(),
        }
    }
}

impl Mover {
    /// What the destination says of the drain of a process that went there.
    pub(super) fn drain_of(&self, pid: Pid, at: Slot) -> Option<Drain> {
        match self.peers.call(at, &PeerRequest::Drain { pid }) {
            Ok(PeerReply::Drain(drain)) => drain,
            _ => None,
        }
    }

    /// What this node knows of the drain of a process that came here.
    pub fn drain_here(&self, pid: Pid) -> Option<Drain> {
        let arrival = self.arrivals.get(pid)?;
        let progress = arrival.space.as_ref()?.progress();
        Some(Drain {
            pages_total: progress.pages_total,
            pages_left: progress.pages_left,
            pages_faulted: progress.pages_faulted,
            pages_pushed: progress.pages_pushed,
            bytes_per_second: progress.bytes_per_second as u64,
            fault_us: progress.fault_us,
            finished: progress.finished.is_some(),
            verified_pages: arrival.verified_pages,
            steps: arrival.steps,
            told_after_us: arrival.told_after_us,
        })
    }

    /// A move's report.
    pub(super) fn report(
        &self,
        pid: Pid,
        to: Slot,
        mode: MoveMode,
        times: &Times,
        drain: Option<&Drain>,
        verified_pages: Option<u64>,
    ) -> MoveReport {
        let millis = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_nanos() as f64 / 1e6,
            _ => 0.0,
        };
        let (faulted, pushed) = drain.map_or((0, 0), |d| (d.pages_faulted, d.pages_pushed));
        let all = faulted + pushed;
        let told_after_ms = drain.map_or(0.0, |d| d.told_after_us / 1e3);
        let mut steps = times.steps.clone();
        steps.extend(drain.into_iter().flat_map(|d| d.steps.iter().cloned()));
        MoveReport {
            pid,
            from: self.config.name.clone(),
            to: self.config.name_of(to),
            mode,
            freeze_ms: (millis(times.frozen, times.resumed) - told_after_ms).max(0.0),
            essence_bytes: times.essence_bytes,
            prepare_ms: millis(Some(times.asked), times.frozen),
            resumed_ms: (millis(Some(times.asked), times.resumed) - told_after_ms).max(0.0),
            drained_ms: times.drained.map(|at| millis(Some(times.asked), Some(at))),
            pages_faulted: faulted,
            pages_pushed: pushed,
            faults_avoided_ratio: if all == 0 {
                1.0
            } else {
                1.0 - faulted as f64 / all as f64
            },
            fault_us: drain.map_or(Quantiles::default(), |d| d.fault_us),
            verified_pages,
            steps,
        }
    }
}

/// Progress of a phase that has no pages.
pub fn phase(pid: Pid, phase: MovePhase) -> MoveProgress {
    MoveProgress {
        pid,
        phase,
        pages_left: 0,
        pages_total: 0,
        bytes_per_second: 0,
    }
}
