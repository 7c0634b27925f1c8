//! A tree of processes that is stopped before it is looked at.
//!
//! A shell at work forks and reaps faster than a large tree can be looked at: in every attempt at a move there is a member
//! that has ended since, or a child that nobody has seen. Owns the stop of such a tree: who is known is stopped, who was
//! forked meanwhile is looked at and stopped, until nobody is new. The freeze lasts longer, by the preparation of the
//! destination; hence [`super::attempts`] asks for it only when the running tree could not be moved. Refuses to leave
//! anybody behind. Invariant: nobody is parked yet: the death of this daemon lets all run on.

use super::outgoing::{MoveOutcome, Outgoing, failure};
use super::party::has_ended;
use crate::capture::CaptureError;
use dunlin_proto::control::FailureKind;
use dunlin_proto::ids::Pid;

/// More generations than that in one stop are a fork bomb.
const MAX_ROUNDS: usize = 64;

impl Outgoing<'_> {
    /// Stops the party, and whoever belongs to it by then.
    pub(super) fn hold_still(&mut self) -> Result<(), MoveOutcome> {
        for _ in 0..MAX_ROUNDS {
            let stopped = self.close_orders().and_then(|()| self.stop_all());
            stopped.map_err(|error| self.not_stopped(&error))?;
            let more = self.newcomers().map_err(MoveOutcome::Failed)?;
            if more.is_empty() {
                return Ok(());
            }
            self.mover.reserve_more(&more, self.plan.move_id);
            let known = self.party.len();
            self.party.extend(more);
            self.sources = self
                .mover
                .prepare_sources(&mut self.party, known, &mut self.met, false)?;
        }
        Err(self.not_stopped(&forked()))
    }

    /// Stops all that are looked at and not stopped. Children that have ended are members no more.
    pub(super) fn stop_all(&mut self) -> Result<(), CaptureError> {
        let root = self.request.pid;
        let mut sources = std::mem::take(&mut self.sources).into_iter();
        while let Some(source) = sources.next() {
            match source.freeze() {
                Ok(frozen) => {
                    self.times.frozen.get_or_insert(frozen.since);
                    self.frozen.push(frozen);
                }
                Err((source, CaptureError::Gone)) if self.still && source.pid != root && has_ended(source.host) => {
                    self.mover.orders.open(source.pid);
                    self.obeyed.remove(&source.pid);
                    self.party.retain(|(pid, _)| *pid != source.pid);
                }
                Err((source, error)) => {
                    self.sources = std::iter::once(*source).chain(sources).collect();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// A tree moves as a whole: who was forked since it was looked at comes along by the next attempt.
    pub(super) fn refuse_newcomers(&self) -> Result<(), CaptureError> {
        match self.newcomers() {
            Ok(more) if more.is_empty() => Ok(()),
            Ok(_) => Err(forked()),
            // The root itself is there no more.
            Err(_) => Err(CaptureError::Gone),
        }
    }

    /// Processes of the tree that are not known yet.
    fn newcomers(&self) -> Result<Vec<(Pid, i32)>, dunlin_proto::control::Failure> {
        let mut now = self.mover.party(self.request.pid, true)?;
        now.retain(|member| !self.party.contains(member));
        Ok(now)
    }

    fn not_stopped(&self, error: &CaptureError) -> MoveOutcome {
        let message = format!(
            "process {} was not moved: its tree cannot be stopped: {error}; it runs on here",
            self.request.pid
        );
        MoveOutcome::Failed(failure(FailureKind::MoveFailed, message, None))
    }
}

fn forked() -> CaptureError {
    CaptureError::Kernel {
        what: "freezing",
        source: "a process of the tree has forked meanwhile".into(),
    }
}
