//! A process whose daemon died while it was held: found again, and let run on or left behind.
//!
//! Owns the reading of the arena that such a process still has. Refuses to decide which of the two it is to be.
//! Invariants: a thread gets back what the arena says it was only if it is in the loop, where nothing of the program
//! runs, and what the frame in a refuge says if it is there; one that is in neither runs on as it does.

use super::freeze::{LeftBehind, leave_image};
use super::{CaptureError, SCRIPT_MASK, Trap};
use dunlin_proto::ids::Pid;
use dunlin_sys::foothold::{Foothold, inject, syscall_instruction};
use dunlin_sys::procfs::{ProcDir, maps};
use dunlin_sys::ptrace::{Options, Running, Stopped, TraceError};
use dunlin_sys::refuge::{Others, Refuge};
use dunlin_sys::script::{Held, NOTE_WORDS};
use std::time::{Duration, Instant};

/// How long the threads of a daemon that was killed may take to let go of their tracees, and a thread to stop.
pub const PATIENCE: Duration = Duration::from_secs(2);

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

    /// Which arena it has: those who share its memory have the same, and nobody else, ever.
    pub fn arena(&self) -> std::io::Result<u64> {
        self.foothold.arena.number()
    }

    /// Does one of its threads wait in the loop (or is it about to), or its first where it is put while the loop is taken
    /// out?
    pub fn waits(&self) -> bool {
        self.is_in_loop() || in_refuge(self.host, |_, _| Ok(())).is_ok_and(|found| found.is_some())
    }

    fn is_in_loop(&self) -> bool {
        let Ok(tids) = ProcDir::process(self.host).threads() else {
            return false;
        };
        let has = |tid| place_of(self.host, tid).is_some_and(|(rip, rsp)| self.foothold.arena.has(rip, rsp));
        tids.into_iter().any(has)
    }

    /// Lets it run on where it was. One that is stopped stays so. A thread may be waiting for a page that is elsewhere, in a
    /// call that it was made to do: for no longer than `patience`.
    pub fn run_on(self, patience: Duration) -> Result<(), CaptureError> {
        let threads = stop_all_within(self.host, patience)?;
        let held = self.foothold.arena.held();
        let note = Note::of(&self.foothold);
        let arena = &self.foothold.arena;
        let mut leaders = None;
        let escaped = Refuge::escaped(&Stopped::assume(self.host), self.host)?;
        for thread in &threads {
            let now = thread.registers()?;
            let is_inside = arena.has(now.rip, now.rsp);
            let mask = thread.signal_mask()?;
            let before = held.iter().find(|held| held.tid == thread.tid());
            let before = before.filter(|_| is_inside || is_ours(mask));
            if thread.tid() == self.host {
                leaders = Some(match &escaped {
                    Some(escaped) => (true, mask, Some(escaped)),
                    None => (is_inside, mask, before),
                });
            } else {
                if !is_inside {
                    make_again(thread, self.host)?;
                }
                if let Some(before) = before {
                    put_back(thread, before, is_inside)?;
                }
            }
        }
        let (is_inside, mask, before) = leaders.ok_or(CaptureError::Gone)?;
        let leader = Stopped::assume(self.host);
        let now = leader.registers()?;
        let again = super::made_again(&now).unwrap_or(now);
        let (registers, mask) = match before {
            Some(before) if is_inside => (before.registers, before.mask),
            Some(before) => (again, before.mask),
            None => (again, mask),
        };
        let it = Held {
            tid: self.host,
            mask,
            registers,
        };
        if before.is_none() {
            // Its mask is not what it was from here on until it is in its refuge.
            arena.hold(held.len(), &it);
        }
        leader.set_signal_mask(SCRIPT_MASK)?;
        let mut trodden = None;
        if let Some(refuge) = Refuge::find(self.host, self.foothold.syscall_at)? {
            trodden = refuge.enter(&leader, self.host, &it, Others::Stopped)?;
        }
        let leader = note.trap.put_back(leader, &self.foothold, &note.actions())?;
        let leader = self.close_what_is_in_hand(leader)?;
        // The loop with them.
        let leader = clear_away(leader, self.host, self.foothold.syscall_at)?;
        leader.set_signal_mask(it.mask)?;
        // The registers come last: until they are set it is in the refuge.
        leader.set_registers(&it.registers)?;
        if let Some(trodden) = trodden {
            trodden.smooth(self.host);
        }
        for thread in threads {
            thread.detach(0)?;
        }
        Ok(())
    }

    /// Closes the userfaultfd that was to be taken out of it.
    fn close_what_is_in_hand(&self, thread: Stopped) -> Result<Stopped, CaptureError> {
        const SYS_CLOSE: i64 = 3;
        const SYS_USERFAULTFD: i64 = 323;
        let fd = match self.foothold.arena.first_call() {
            (SYS_USERFAULTFD, _, answer) => answer as u64,
            (SYS_CLOSE, [fd, ..], _) => fd,
            _ => return Ok(thread),
        };
        let link = ProcDir::process(self.host)
            .link(&format!("fd/{fd}"))
            .unwrap_or_default();
        if link.as_os_str().as_encoded_bytes() != b"anon_inode:[userfaultfd]" {
            return Ok(thread);
        }
        let at = self.foothold.syscall_at;
        Ok(inject(thread, at, "close", SYS_CLOSE, [fd, 0, 0, 0, 0, 0])?.0)
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
        leave_image(self.foothold, self.host, threads, pending, false)
    }
}

/// Is this the mask of a thread that is made to do something? The kernel lets nobody block SIGKILL and SIGSTOP.
fn is_ours(mask: u64) -> bool {
    const NEVER: u64 = 1 << 8 | 1 << 18;
    [SCRIPT_MASK, u64::MAX].contains(&(mask | NEVER))
}

/// The instruction and stack pointers of a thread that nobody traces. One that runs, perhaps on its way to where it will
/// wait, is stopped for a moment.
fn place_of(host: i32, tid: i32) -> Option<(u64, u64)> {
    let text = ProcDir::thread(host, tid).text("syscall").ok()?;
    let mut words = text.split_ascii_whitespace().rev();
    let mut word = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    if let (Some(rip), Some(rsp)) = (word(), word()) {
        return Some((rip, rsp));
    }
    let running = seize_released(tid).ok()??;
    let (thread, _) = running.stop(Instant::now() + PATIENCE).ok()?;
    let now = thread.registers().ok()?;
    make_again(&thread, host).ok()?;
    thread.detach(0).ok()?;
    Some((now.rip, now.rsp))
}

/// A stopped thread of the program makes a call again that the stop has ended, unless a signal would have.
fn make_again(thread: &Stopped, host: i32) -> Result<(), CaptureError> {
    let Some(again) = super::made_again(&thread.registers()?) else {
        return Ok(());
    };
    let leader_mask = ProcDir::process(host).status().map_or(0, |status| status.blocked);
    if !super::ended::is_signalled(host, thread.tid(), thread.signal_mask()?, leader_mask) {
        thread.set_registers(&again)?;
    }
    Ok(())
}

/// Seizes a thread that the dead daemon may be about to let go of; `None` if somebody else has it: a debugger.
fn seize_released(tid: i32) -> Result<Option<Running>, CaptureError> {
    const LETS_GO_WITHIN: Duration = Duration::from_millis(200);
    let deadline = Instant::now() + LETS_GO_WITHIN;
    loop {
        match Running::seize(tid, Options::default()) {
            Err(TraceError::Refused { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(TraceError::Refused { .. }) => return Ok(None),
            other => return Ok(Some(other?)),
        }
    }
}

/// Puts a thread back that has come to a refuge: the daemon died in a call that it made it do.
pub fn fetch_from_refuge(host: i32) -> Result<bool, CaptureError> {
    let fetched = in_refuge(host, |thread, held| {
        let at = syscall_instruction(&ProcDir::process(host))?;
        thread.set_signal_mask(SCRIPT_MASK)?;
        if let Some(refuge) = Refuge::find(host, at)? {
            refuge.enter(thread, host, held, Others::Run)?;
            clear_away(Stopped::assume(host), host, at)?;
        }
        thread.set_signal_mask(held.mask)?;
        Ok(thread.set_registers(&held.registers)?)
    })?;
    Ok(fetched.is_some())
}

/// Has a thread close and unmap what is there of an arena, whole or half planted.
fn clear_away(mut thread: Stopped, host: i32, at: u64) -> Result<Stopped, CaptureError> {
    const SYS_CLOSE: i64 = 3;
    const SYS_MUNMAP: i64 = 11;
    let dir = ProcDir::process(host);
    for entry in std::fs::read_dir(dir.path("fd"))? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok());
        // One that is closed meanwhile is none of ours.
        let link = std::fs::read_link(entry.path()).unwrap_or_default();
        if let Some(number) = number.filter(|_| Foothold::is_arena_name(link.as_os_str().as_encoded_bytes())) {
            thread = inject(thread, at, "close", SYS_CLOSE, [number, 0, 0, 0, 0, 0])?.0;
        }
    }
    for arena in maps::parse(&dir.bytes("maps")?).map_err(std::io::Error::from)? {
        if Foothold::is_arena(&arena) {
            thread = inject(
                thread,
                at,
                "munmap",
                SYS_MUNMAP,
                [arena.start, arena.length(), 0, 0, 0, 0],
            )?
            .0;
        }
    }
    Ok(thread)
}

/// Stops the first thread of a process and does something about it, if it is in a refuge.
fn in_refuge<T>(
    host: i32,
    work: impl FnOnce(&Stopped, &Held) -> Result<T, CaptureError>,
) -> Result<Option<T>, CaptureError> {
    // It spins, or has been stopped there.
    let dir = ProcDir::process(host);
    let text = dir.text("syscall").unwrap_or_default();
    let has_ended = dir.stat().map_or(true, |stat| matches!(stat.state, 'Z' | 'X'));
    if has_ended || !text.starts_with("running") && !text.starts_with("-1 ") {
        return Ok(None);
    }
    let Some(running) = seize_released(host)? else {
        return Ok(None);
    };
    let (thread, _) = running.stop(Instant::now() + PATIENCE)?;
    let done = match Refuge::escaped(&thread, host) {
        Ok(Some(held)) => work(&thread, &held).map(Some),
        Ok(None) => make_again(&thread, host).map(|()| None),
        Err(error) => Err(error.into()),
    };
    thread.detach(0)?;
    done
}

fn put_back(thread: &Stopped, before: &Held, is_inside: bool) -> Result<(), CaptureError> {
    if is_inside {
        thread.set_registers(&before.registers)?;
    }
    Ok(thread.set_signal_mask(before.mask)?)
}

/// Stops all threads of a process, whose former tracer may still be about to vanish.
pub fn stop_all(host: i32) -> Result<Vec<Stopped>, CaptureError> {
    stop_all_within(host, PATIENCE)
}

fn stop_all_within(host: i32, patience: Duration) -> Result<Vec<Stopped>, CaptureError> {
    const EPERM: i32 = 1;
    let deadline = Instant::now() + patience;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_ours_as_the_kernel_tells_it() {
        assert!(is_ours(0xffff_ffff_fffb_feef) && is_ours(0xffff_ffff_fffb_feff));
        assert!(!is_ours(0) && !is_ours(0x1_0000));
    }
}
