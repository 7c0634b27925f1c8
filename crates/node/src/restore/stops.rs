//! Stops of a blank, so that its parent sees of them what it had not seen yet.
//!
//! Owns how a blank, all of whose threads are traced and stopped, enters and leaves the group-stop that the process was
//! in: by the signals themselves, of which nothing of the program runs. A task in group-stop makes scripts all the same,
//! and is stopped when it is let go. Refuses to know what the parent is told (see [`Blank::unhear_children`]).
//! Invariant: no SIGCONT of ours stays pending, and none of anybody else's goes.

use super::{Blank, During, RestoreError};
use crate::capture::freeze::add_take;
use dunlin_proto::image::Essence;
use dunlin_sys::ptrace::{Event, Running, Stop, Stopped, TraceError};
use dunlin_sys::script::Script;
use rustix::process::Signal;

const SIGSTOP: i32 = Signal::STOP.as_raw();
const SIGCONT: i32 = Signal::CONT.as_raw();

impl Blank {
    /// Stops it, or has it go on, as the process was. What is not as it was `known` of the place is what somebody here has
    /// done since, and stays.
    pub fn settle_stop(&self, essence: &Essence, known: bool) -> Result<(), RestoreError> {
        let stopped = self.stopped.get().is_some();
        tracing::debug!(pid = %self.pid, stopped, known, wanted = ?essence.stopped_by, "as it was");
        match essence.stopped_by {
            _ if stopped != known => Ok(()),
            Some(signal) if !stopped => self.stop(essence, signal),
            None if stopped => self.go_on(),
            Some(_) | None => Ok(()),
        }
    }

    /// Its parent can wait for its having been continued.
    pub fn show_continued(&self, essence: &Essence) -> Result<(), RestoreError> {
        if self.stopped.get().is_some() {
            return Ok(());
        }
        self.stop(essence, SIGSTOP)?;
        self.go_on()
    }

    fn stop(&self, essence: &Essence, signal: i32) -> Result<(), RestoreError> {
        let what = "stopping it as it was";
        let mut tables = [&essence.signals.actions, &self.image.signals.actions].into_iter();
        let default = tables.all(|actions| actions.get(signal as usize - 1).is_none_or(|action| action[0] == 0));
        let signal = if default { signal } else { SIGSTOP };
        let leader = self.leader();
        let mask = leader.signal_mask().during(self.pid, what)?;
        let open = mask & !(1u64 << (signal - 1));
        leader.set_signal_mask(open).during(self.pid, what)?;
        let by = self.stop_by(signal).and_then(|by| match by {
            // The kernel has no process stop by a key whose group nobody could continue.
            None => self.stop_by(SIGSTOP),
            by => Ok(by),
        });
        self.leader().set_signal_mask(mask).during(self.pid, what)?;
        for host in self.others() {
            let running = Stopped::assume(host).resume(0);
            running.and_then(trap).during(self.pid, what)?;
        }
        self.stopped.set(by.during(self.pid, what)?);
        Ok(())
    }

    /// The first thread takes a SIGSTOP, in whose place this signal is delivered. What stops the process then?
    fn stop_by(&self, signal: i32) -> Result<Option<i32>, TraceError> {
        self.send(Signal::STOP);
        let mut running = self.leader().resume(0)?;
        loop {
            let tid = running.tid();
            running = match running.wait()? {
                Event::Ended(_) => return Err(TraceError::Gone { tid }),
                Event::Stopped(thread, Stop::Signal(SIGSTOP)) => {
                    // Whether it stops the process or not, the thread comes back.
                    Running::announced(tid).interrupt()?;
                    return trap(thread.resume(signal)?);
                }
                Event::Stopped(thread, Stop::Interrupt | Stop::Group(_)) => thread.resume(0)?,
                Event::Stopped(thread, stop) => {
                    return Err(thread.unexpected(stop));
                }
            };
        }
    }

    fn go_on(&self) -> Result<(), RestoreError> {
        let what = "having it go on";
        let number = SIGCONT.to_le_bytes();
        let pending = self.leader().pending_signals(true).during(self.pid, what)?;
        let others = pending.iter().any(|info| info.starts_with(&number));
        self.send(Signal::CONT);
        for host in std::iter::once(self.host).chain(self.others()) {
            Running::announced(host).interrupt().during(self.pid, what)?;
            let running = Stopped::assume(host).resume(0);
            running.and_then(trap).during(self.pid, what)?;
        }
        self.stopped.set(None);
        let mut script = Script::new(&self.foothold.arena);
        if !others {
            add_take(&mut script, SIGCONT);
        }
        self.run(self.host, script, what)
    }

    fn send(&self, signal: Signal) {
        if let Some(process) = rustix::process::Pid::from_raw(self.host) {
            // A blank that has died is found out by the next wait.
            let _ = rustix::process::kill_process(process, signal);
        }
    }

    fn others(&self) -> Vec<i32> {
        self.threads
            .values()
            .copied()
            .filter(|host| *host != self.host)
            .collect()
    }
}

/// Waits for the stop that is due; tells what the process is stopped by.
fn trap(mut running: Running) -> Result<Option<i32>, TraceError> {
    loop {
        let tid = running.tid();
        running = match running.wait()? {
            Event::Ended(_) => return Err(TraceError::Gone { tid }),
            Event::Stopped(_, Stop::Group(signal)) => return Ok(Some(signal)),
            Event::Stopped(_, Stop::Interrupt) => return Ok(None),
            Event::Stopped(thread, Stop::Signal(SIGSTOP)) => thread.resume(SIGSTOP)?,
            Event::Stopped(thread, stop) => {
                return Err(thread.unexpected(stop));
            }
        };
    }
}
