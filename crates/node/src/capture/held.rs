//! A process whose daemon died while it was held: found again, and let run on or left behind.
//!
//! Owns the reading of the arena that such a process still has. Refuses to decide which of the two it is to be.
//! Invariants: a thread gets back what the arena says it was only if it is in the loop, where nothing of the program
//! runs; one that is not runs on as it does.

use super::freeze::{LeftBehind, leave_image};
use super::{CaptureError, SCRIPT_MASK, Trap};
use dunlin_proto::ids::Pid;
use dunlin_sys::foothold::Foothold;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Options, Running, Stopped, TraceError};
use dunlin_sys::refuge::Refuge;
use dunlin_sys::script::{Held, NOTE_WORDS};
use std::time::{Duration, Instant};

/// How long the threads of a daemon that was killed may take to let go of their tracees, and a thread to stop.
const PATIENCE: Duration = Duration::from_secs(2);

/// A process with a foothold that nobody holds any more.
pub struct Abandoned {
    /// Its PID.
    pub pid: Pid,
    /// Its number on this machine.
    pub host: i32,
    foothold: Foothold,
}

impl Abandoned {
    /// Looks at a process; `None` if it has no foothold.
    pub fn find(pid: Pid, host: i32) -> Result<Option<Abandoned>, CaptureError> {
        let found = Foothold::find(host)?;
        Ok(found.map(|foothold| Abandoned { pid, host, foothold }))
    }

    /// Was it being restored here?
    pub fn is_blank(&self) -> bool {
        Note::of(&self.foothold).blank
    }

    /// Where its arena is: those who share its memory have it there, too, and nobody else.
    pub fn arena(&self) -> u64 {
        self.foothold.range().0
    }

    /// Does one of its threads wait in the loop?
    pub fn waits(&self) -> bool {
        let Ok(tids) = ProcDir::process(self.host).threads() else {
            return false;
        };
        tids.into_iter().any(|tid| {
            let text = ProcDir::thread(self.host, tid).text("syscall").unwrap_or_default();
            let rip = text
                .split_ascii_whitespace()
                .last()
                .and_then(|word| word.strip_prefix("0x"));
            let rip = rip.and_then(|word| u64::from_str_radix(word, 16).ok());
            rip.is_some_and(|rip| self.foothold.arena.is_inside(rip))
        })
    }

    /// Lets it run on where it was. `stopped_by`: the signal that it is to be stopped by.
    pub fn run_on(self, stopped_by: Option<i32>) -> Result<(), CaptureError> {
        let threads = stop_all(self.host)?;
        let held = self.foothold.arena.held();
        let note = Note::of(&self.foothold);
        let arena = &self.foothold.arena;
        let mut leaders = None;
        for thread in &threads {
            let is_inside = arena.is_inside(thread.registers()?.rip);
            let mask = thread.signal_mask()?;
            let before = held.iter().find(|held| held.tid == thread.tid());
            let before = before.filter(|_| is_inside || mask == SCRIPT_MASK || mask == u64::MAX);
            if thread.tid() == self.host {
                leaders = Some((is_inside, mask, before));
            } else if let Some(before) = before {
                put_back(thread, before, is_inside)?;
            }
        }
        let (is_inside, mask, before) = leaders.ok_or(CaptureError::Gone)?;
        let leader = Stopped::assume(self.host);
        let now = leader.registers()?;
        leader.set_signal_mask(SCRIPT_MASK)?;
        if let Some(refuge) = Refuge::find(self.host, self.foothold.syscall_at)? {
            let (registers, mask) = match before {
                Some(before) if is_inside => (before.registers, before.mask),
                Some(before) => (now, before.mask),
                None => (now, mask),
            };
            let held = Held {
                tid: self.host,
                mask,
                registers,
            };
            refuge.enter(&leader, self.host, &held)?;
        }
        let leader = note.trap.put_back(leader, &self.foothold, &note.actions())?;
        let leader = self.foothold.uproot(leader)?;
        match before {
            Some(before) if is_inside => put_back(&leader, before, true)?,
            Some(before) => {
                leader.set_registers(&super::made_again(&now).unwrap_or(now))?;
                leader.set_signal_mask(before.mask)?;
            }
            None => {
                leader.set_registers(&super::made_again(&now).unwrap_or(now))?;
                leader.set_signal_mask(mask)?;
            }
        }
        if let Some(signal) = stopped_by.and_then(rustix::process::Signal::from_named_raw)
            && let Some(process) = rustix::process::Pid::from_raw(self.host)
        {
            let _ = rustix::process::kill_process(process, signal);
        }
        for thread in threads {
            thread.detach(0)?;
        }
        Ok(())
    }

    /// After the commit: leaves its memory to a keeper, as [`Frozen::into_image`](super::freeze::Frozen::into_image); to
    /// the one that was made already, if there is one.
    pub fn into_image(self, pending: Vec<i32>, keeper: Option<Pid>) -> Result<LeftBehind, CaptureError> {
        let mut threads = stop_all(self.host)?;
        threads.sort_by_key(|thread| thread.tid() != self.host);
        if let Some(keeper) = keeper {
            for thread in threads.into_iter().skip(1) {
                thread.detach(0)?;
            }
            let leader = Stopped::assume(self.host);
            leader.set_signal_mask(u64::MAX)?;
            return Ok(LeftBehind {
                keeper,
                leader,
                foothold: self.foothold,
            });
        }
        leave_image(self.foothold, self.host, threads, pending)
    }
}

/// Puts a thread back that has come to a refuge, as it spins: the daemon died in a call that it made it do.
pub fn fetch_from_refuge(host: i32) -> Result<bool, CaptureError> {
    if !ProcDir::process(host)
        .text("syscall")
        .is_ok_and(|text| text.starts_with("running"))
    {
        return Ok(false);
    }
    // The dead daemon's thread lets go of it last of all.
    const LETS_GO_WITHIN: Duration = Duration::from_millis(200);
    let deadline = Instant::now() + LETS_GO_WITHIN;
    let running = loop {
        match Running::seize(host, Options::default()) {
            Err(TraceError::Refused { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            // Somebody else's: a debugger's.
            Err(TraceError::Refused { .. }) => return Ok(false),
            other => break other?,
        }
    };
    let (thread, _) = running.stop(Instant::now() + PATIENCE)?;
    let escaped = Refuge::escaped(&thread, host)?;
    if let Some(held) = &escaped {
        thread.set_signal_mask(held.mask)?;
        thread.set_registers(&held.registers)?;
    }
    thread.detach(0)?;
    Ok(escaped.is_some())
}

fn put_back(thread: &Stopped, before: &Held, is_inside: bool) -> Result<(), CaptureError> {
    if is_inside {
        thread.set_registers(&before.registers)?;
    }
    Ok(thread.set_signal_mask(before.mask)?)
}

/// Stops all threads of a process, whose former tracer may still be about to vanish.
pub fn stop_all(host: i32) -> Result<Vec<Stopped>, CaptureError> {
    const EPERM: i32 = 1;
    let deadline = Instant::now() + PATIENCE;
    let mut stopped: Vec<Stopped> = Vec::new();
    loop {
        let mut new = false;
        for tid in ProcDir::process(host).threads()? {
            if stopped.iter().any(|thread| thread.tid() == tid) {
                continue;
            }
            match Running::seize(tid, Options::default()) {
                Ok(running) => {
                    new = true;
                    match running.stop(deadline) {
                        Ok((thread, _)) => stopped.push(thread),
                        Err(TraceError::Gone { .. }) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(TraceError::Gone { .. }) => {}
                Err(TraceError::Refused { errno, .. }) if errno.0 == EPERM && Instant::now() < deadline => {
                    new = true;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error.into()),
            }
        }
        if !new {
            return Ok(stopped);
        }
    }
}

/// What the arena of a held process tells besides its threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Note {
    /// What its action for SIGTRAP has to be set to at the end.
    pub trap: Trap,
    /// That action.
    pub action: [u64; 4],
    /// It is being restored here, and has never run.
    pub blank: bool,
}

impl Note {
    /// Of a process that runs here, with this table of actions.
    pub fn source(trap: Trap, actions: &[[u64; 4]]) -> Note {
        Note {
            trap,
            action: actions.get(4).copied().unwrap_or_default(),
            blank: false,
        }
    }

    /// Of one that is being restored, with this table of actions.
    pub fn blank(actions: &[[u64; 4]]) -> Note {
        Note {
            blank: true,
            ..Note::source(Trap::of(actions), actions)
        }
    }

    /// Writes it down.
    pub fn leave(&self, foothold: &Foothold) {
        let [handler, flags, restorer, mask] = self.action;
        let (ignored, blank) = (u64::from(self.trap.is_ignored()), u64::from(self.blank));
        foothold
            .arena
            .note([ignored, handler, flags, restorer, mask, blank, 0, 0]);
    }

    fn of(foothold: &Foothold) -> Note {
        let [ignored, handler, flags, restorer, mask, blank, ..]: [u64; NOTE_WORDS] = foothold.arena.noted();
        Note {
            trap: Trap::known(ignored != 0),
            action: [handler, flags, restorer, mask],
            blank: blank != 0,
        }
    }

    /// A table of actions in which that of SIGTRAP is right.
    fn actions(&self) -> Vec<[u64; 4]> {
        vec![self.action; 5]
    }
}
