//! Scripts of several threads of one process, run at once.
//!
//! To run a thread for a moment costs two wakes, which is much more than what it does then; run together, threads share the
//! CPUs and the tracer's waits. Owns the dividing of an arena among them: each thread has a *lane*, records of its own
//! and a word that says that they are done. Refuses to know what the calls are for. Invariants: as for one script (see
//! [`crate::script`]); no record is another lane's; whatever comes of it, every thread that can be is stopped again, and
//! has the registers that it had.

use crate::ptrace::{Event, Registers, Running, Stop, Stopped, TraceError};
use crate::script::{Answers, Arena, Buffer, SPINS_AT_END, Script, ScriptError};
use std::cell::Cell;

/// Up to so many threads turn on the spot when they are done, which stops them sooner; more would only take CPUs away.
const FEW: usize = 2;

/// Scripts, each for another thread.
#[derive(Debug)]
pub struct Batch<'a> {
    arena: &'a Arena,
    script: Script<'a>,
    lanes: Vec<Lane>,
}

#[derive(Debug)]
struct Lane {
    tid: i32,
    first: usize,
    done: Buffer,
}

/// A lane whose thread has been set on its way.
struct Under<'l> {
    lane: &'l Lane,
    before: Registers,
    count: u64,
    /// It was let go, and has not stopped again.
    runs: Cell<bool>,
}

impl<'a> Batch<'a> {
    /// None yet, over an arena whose earlier scripts have been read.
    pub fn new(arena: &'a Arena) -> Batch<'a> {
        Batch {
            arena,
            script: Script::new(arena),
            lanes: Vec::new(),
        }
    }

    /// What is added from here on is for this thread, which is stopped, with all signals blocked but SIGTRAP.
    pub fn lane(&mut self, tid: i32) -> &mut Script<'a> {
        let done = self.script.bytes(&[0; 8]);
        let first = self.script.len();
        self.lanes.push(Lane { tid, first, done });
        &mut self.script
    }

    /// Whether there is room for some more; if not, run it and start another.
    pub fn has_room(&self) -> bool {
        self.script.has_room()
    }

    /// Runs all of them, and `work` meanwhile.
    pub fn run_beside<T>(self, work: impl FnOnce() -> T) -> (Result<Answers<'a>, ScriptError>, T) {
        let mut under = Vec::with_capacity(self.lanes.len());
        let begun = self.point(&mut under).and_then(|()| resume_all(&under));
        let made = work();
        // Those that are on their way are stopped, whatever became of the others.
        let ended = self.end(&under);
        let ended = begun
            .and(ended)
            .and_then(|stopped_by| self.check(&under).map(|()| stopped_by));
        for one in &under {
            // Of a thread that has died nothing is to be put back.
            let _ = Stopped::assume(one.lane.tid).set_registers(&one.before);
        }
        (ended.map(|stopped_by| self.script.answers(stopped_by)), made)
    }

    /// Runs all of them.
    pub fn run(self) -> Result<Answers<'a>, ScriptError> {
        self.run_beside(|| ()).0
    }

    /// Points the threads at their lanes.
    fn point<'l>(&'l self, under: &mut Vec<Under<'l>>) -> Result<(), ScriptError> {
        self.script.write_records()?;
        let spins = if self.lanes.len() <= FEW { SPINS_AT_END } else { 0 };
        let ends = self.lanes.iter().skip(1).map(|lane| lane.first);
        for (lane, end) in self.lanes.iter().zip(ends.chain([self.script.len()])) {
            let count = (end - lane.first) as u64;
            if count == 0 {
                continue;
            }
            let thread = Stopped::assume(lane.tid);
            let before = thread.registers()?;
            thread.set_registers(&self.script.entry(&before, lane.first, count, lane.done.address, spins))?;
            under.push(Under {
                lane,
                before,
                count,
                runs: Cell::new(false),
            });
        }
        Ok(())
    }

    /// Waits until all are done, and stops them. Also tells what their process is stopped by, apart from this: a thread that
    /// was stopped before that took effect does not know of it.
    fn end(&self, under: &[Under<'_>]) -> Result<Option<i32>, ScriptError> {
        let mut worst = Ok(());
        let mut stopped_by = None;
        let mut asked = Vec::with_capacity(under.len());
        for one in under.iter().filter(|one| one.runs.get()) {
            let running = self.await_done(one.lane).and_then(|running| {
                running.interrupt()?;
                Ok(running)
            });
            match running {
                Ok(running) => asked.push(running),
                Err(error) => worst = worst.and(Err(error)),
            }
        }
        for running in asked {
            match await_stop(running) {
                Ok(by) => stopped_by = by.or(stopped_by),
                Err(error) => worst = worst.and(Err(error)),
            }
        }
        worst.map(|()| stopped_by)
    }

    fn await_done(&self, lane: &Lane) -> Result<Running, ScriptError> {
        let mut running = Running::announced(lane.tid);
        let mut turns = 0u32;
        while !self.arena.is_set(lane.done.offset) {
            turns = turns.saturating_add(1);
            crate::script::rest(turns);
            if !crate::script::looks(turns) {
                continue;
            }
            running = match running.poll()? {
                Err(still) => still,
                Ok(event) => pass(lane.tid, event)?,
            };
        }
        Ok(running)
    }

    /// Did all make all their calls?
    fn check(&self, under: &[Under<'_>]) -> Result<(), ScriptError> {
        for one in under {
            let left = Stopped::assume(one.lane.tid).registers()?.r12;
            if left != 0 {
                return Err(self
                    .script
                    .failed_at(one.lane.first + (one.count - left.min(one.count)) as usize));
            }
        }
        Ok(())
    }
}

fn resume_all(under: &[Under<'_>]) -> Result<(), ScriptError> {
    for one in under {
        Stopped::assume(one.lane.tid).resume(0)?;
        one.runs.set(true);
    }
    Ok(())
}

/// A stop that is not the one that is waited for.
fn pass(tid: i32, event: Event) -> Result<Running, ScriptError> {
    match event {
        Event::Ended(_) => Err(TraceError::Gone { tid }.into()),
        Event::Stopped(thread, Stop::Signal(libc::SIGSTOP)) => Ok(thread.resume(libc::SIGSTOP)?),
        Event::Stopped(thread, Stop::Cloned(_) | Stop::Interrupt | Stop::Syscall | Stop::Group(_)) => {
            Ok(thread.resume(0)?)
        }
        Event::Stopped(thread, stop @ (Stop::Exec | Stop::Signal(_))) => Err(thread.unexpected(stop).into()),
    }
}

/// Waits until it has stopped; what its process is stopped by, apart from this.
fn await_stop(mut running: Running) -> Result<Option<i32>, ScriptError> {
    loop {
        let tid = running.tid();
        running = match running.wait()? {
            Event::Stopped(_, Stop::Interrupt) => return Ok(None),
            // Of a process that is stopped already, an interruption is reported as its group-stop.
            Event::Stopped(_, Stop::Group(signal)) => return Ok(Some(signal)),
            event => pass(tid, event)?,
        };
    }
}
