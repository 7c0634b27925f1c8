//! What the protocol's machine says of a move at its source, passed on to whoever asked for it.
//!
//! Owns the words of an outcome, and what is let go of with it. Refuses to decide what the outcome is. Invariant: an outcome is
//! told once.

use super::lock;
use super::outgoing::{MoveOutcome, Outgoing, Report, failure};
use super::progress::phase;
use crate::capture::Source;
use crate::steps;
use dunlin_cluster::relocation::home::HomeEvent;
use dunlin_cluster::relocation::source::{SourceReport, WhyNot};
use dunlin_proto::control::{FailureKind, MovePhase, MoveProgress, Side, WaitFor};
use dunlin_proto::relocation::{Claim, LeaseRefusal};
use std::time::Instant;

impl Outgoing<'_> {
    pub(super) fn reported(&mut self, report: SourceReport) -> Result<(), MoveOutcome> {
        match report {
            SourceReport::Failed(why) => {
                // An abort that this node has not heard of: known now, so that the next attempt is leased.
                if let WhyNot::NotLeased(LeaseRefusal::Incarnation { pid, actual }) = &why {
                    let claim = Claim {
                        pid: *pid,
                        incarnation: *actual,
                    };
                    self.mover.decide(HomeEvent::Raise(vec![claim]));
                }
                self.take_images_back();
                self.let_on();
                let message = format!(
                    "process {} was not moved: {why}; it runs on {}",
                    self.request.pid, self.mover.config.name
                );
                let kind = match why {
                    WhyNot::Refused(obstacles) => {
                        self.failed = Some(MoveOutcome::Refused(obstacles));
                        return Ok(());
                    }
                    WhyNot::HomeSilent(_) | WhyNot::DestinationLost(_) => FailureKind::Unreachable,
                    WhyNot::SourceRestarted | WhyNot::Cancelled => FailureKind::Other,
                    WhyNot::NotLeased(_)
                    | WhyNot::EndedByHome
                    | WhyNot::DestinationFailed(_)
                    | WhyNot::SourceFailed(_) => FailureKind::MoveFailed,
                };
                self.failed = Some(MoveOutcome::Failed(failure(kind, message, None)));
            }
            SourceReport::Committed => {
                // What is still fetched from here is its image: the process itself may come back meanwhile.
                let by = self.plan.move_id;
                lock(&self.mover.busy).retain(|_, other| *other != by);
                self.progress(MovePhase::Commit);
            }
            SourceReport::Resumed => {
                self.tight = false;
                self.sockets.hand_over(&self.mover.edge, self.plan.destination);
                self.times.steps = steps::take(Side::Source);
                let now = Instant::now();
                self.times.resumed = Some(self.times.resumed_heard.unwrap_or(now));
                self.events.append(&mut self.early);
                self.progress(MovePhase::Resume);
                if self.request.wait == WaitFor::Resumed {
                    self.finish_moved();
                }
            }
            SourceReport::Drained => {
                self.times.drained = Some(Instant::now());
                self.finish_moved();
            }
        }
        Ok(())
    }

    /// Nobody has been told anything yet that holds: all run on, if they have been stopped at all.
    pub(super) fn let_on(&mut self) {
        match self.frozen.is_empty() {
            true => self.sources.drain(..).for_each(Source::abandon),
            false => self.thaw(),
        }
    }

    fn finish_moved(&mut self) {
        let reports = self.party.iter().map(|(pid, _)| {
            let drain = self.mover.drain_of(*pid, self.plan.destination);
            self.mover.report(
                *pid,
                self.plan.destination,
                self.request.mode,
                &self.times,
                drain.as_ref(),
                drain.as_ref().and_then(|d| d.verified_pages),
            )
        });
        let reports = reports.collect();
        self.finish(MoveOutcome::Moved(reports));
    }

    pub(super) fn finish(&mut self, outcome: MoveOutcome) {
        if !std::mem::replace(&mut self.told, true) {
            let _ = self.reporter.send(Report::Outcome(outcome));
        }
    }

    pub(super) fn report_drain(&self) {
        if let Some(drain) = self.mover.drain_of(self.request.pid, self.plan.destination) {
            let _ = self.reporter.send(Report::Progress(MoveProgress {
                pid: self.request.pid,
                phase: MovePhase::Drain,
                pages_left: drain.pages_left,
                pages_total: drain.pages_total,
                bytes_per_second: drain.bytes_per_second,
            }));
        }
    }

    pub(super) fn progress(&self, at: MovePhase) {
        let _ = self.reporter.send(Report::Progress(phase(self.request.pid, at)));
    }
}
