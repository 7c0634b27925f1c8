//! Making a task of a chosen number by somebody else's hand (the tracer's).
//!
//! Owns the guard. Refuses to know how the task is made. While a guard lives nobody in the nest makes a task, so it must
//! live shortly; its end, by whatever way, lets the others go on.

use super::wire::{Answer, Request};
use super::{Nest, unexpected};
use dunlin_proto::ids::Pid;
use std::io;
use std::sync::MutexGuard;

/// The right to make the next task of the nest, with the number asked for. The clone must carry the nest's cookie.
#[derive(Debug)]
#[must_use = "dropping it ends the steering"]
pub struct SteerGuard<'a> {
    nest: &'a Nest,
    ended: bool,
    _turn: MutexGuard<'a, ()>,
}

impl<'a> SteerGuard<'a> {
    pub(super) fn begin(nest: &'a Nest, pid: Pid) -> io::Result<SteerGuard<'a>> {
        let turn = nest.steering_turn();
        nest.taken(Request::SteerBegin(pid))?;
        Ok(SteerGuard {
            nest,
            ended: false,
            _turn: turn,
        })
    }

    /// The task after this one gets this number. Was the number before taken?
    pub fn aim(&mut self, pid: Pid) -> io::Result<bool> {
        self.nest.taken(Request::SteerBegin(pid))
    }

    /// Lets the others make tasks again. Was the number taken?
    pub fn finish(mut self) -> io::Result<bool> {
        self.ended = true;
        self.nest.taken(Request::SteerEnd)
    }
}

impl Drop for SteerGuard<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // If init is gone there is nobody to be kept waiting.
            let _ = self.nest.taken(Request::SteerEnd);
        }
    }
}

impl Nest {
    fn taken(&self, request: Request) -> io::Result<bool> {
        match self.0.connection.ask(request, &[])?.answer {
            Answer::Taken(taken) => Ok(taken),
            other => Err(unexpected(other)),
        }
    }
}
