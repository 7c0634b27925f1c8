//! Which number the next task of the nest gets, and that it does get it.
//!
//! Owns `ns_last_pid`, the [`Allotment`], and the rule that at most one call that makes a task is let go at a time: its
//! wanted number minus one is written, and nothing is let go before `ns_last_pid` shows the number as taken, or its
//! caller is *proven* to have left the call without taking it. Refuses to know how callers are stopped and let go
//! ([`super::notify`]) and who asks for a number ([`super::serve`]).
//!
//! Proofs of having left (each is followed by one more look at `ns_last_pid`, for it may have taken the number on its
//! way out): the caller is gone or a zombie; it is stopped; it blocks in another system call; it makes another call that
//! makes a task; it was nudged ([`super::nudger`]) and stopped. A caller is nudged after [`PATIENCE`], which doubles each
//! time, because a nudge makes a fork of a large memory start again.
//!
//! The common path makes one read, one write and one look-up of a PID, and allocates nothing.

use super::nudger::{Nudger, Outcome, Request};
use super::scan;
use dunlin_cluster::allotment::{Allotment, NoPid};
use dunlin_proto::ids::Pid;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::seccomp::{self, Answer, Listener, Notification};
use dunlin_sys::spawn;
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So long a caller may run without taking its number before it is nudged.
const PATIENCE: Duration = Duration::from_millis(20);
/// `PATIENCE` doubles at most so often.
const MAX_DOUBLINGS: u32 = 9;
/// A number taken meanwhile is seen by the first, cheap looks; /proc is asked after so long.
const LOOK_AFTER: Duration = Duration::from_micros(200);
/// So long init itself waits for its turn to make a task.
const TURN: Duration = Duration::from_secs(20);

/// The steering of one nest.
#[derive(Debug)]
pub struct Steering {
    state: Mutex<State>,
    last_pid: File,
    cookie: u64,
    nudger: Nudger,
    released: OwnedFd,
}

#[derive(Debug)]
struct State {
    allotment: Allotment,
    /// The call that was let go last and has not been seen to take its number.
    pending: Option<Pending>,
    /// A number that was allotted and not taken.
    spare: Option<Pid>,
    /// The daemon makes a task of this number; nobody else makes any.
    held: Option<Pid>,
    /// Callers that were nudged lately, and how often.
    nudged: Vec<(i32, u32)>,
}

#[derive(Debug)]
struct Pending {
    wanted: Pid,
    tid: i32,
    /// The call's number, as its entry counts.
    nr: i32,
    since: Option<Instant>,
    nudge: Option<Request>,
}

/// What became of a notified call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// It was answered.
    Yes,
    /// The one before it has not taken its number yet.
    NotYet,
}

impl Steering {
    /// `last_pid`: `/proc/sys/kernel/ns_last_pid`, open for reading and writing.
    pub fn new(allotment: Allotment, last_pid: File, cookie: u64, nudger: Nudger) -> io::Result<Steering> {
        let state = State {
            allotment,
            pending: None,
            spare: None,
            held: None,
            nudged: Vec::with_capacity(16),
        };
        Ok(Steering {
            state: Mutex::new(state),
            last_pid,
            cookie,
            nudger,
            released: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Lets a call that makes a task go, with its number.
    pub fn serve(&self, call: &Notification, listener: &Listener) -> Served {
        let mut state = self.state();
        if state.held.is_some() || !self.settled(&mut state) {
            return Served::NotYet;
        }
        let aimed = self.next_pid(&mut state).and_then(|pid| {
            self.write_last(pid.0 - 1)?;
            Ok(pid)
        });
        let pid = match aimed {
            Ok(pid) => pid,
            Err(e) => {
                if e.raw_os_error() != Some(Errno::AGAIN.raw_os_error()) {
                    super::complain(format_args!("steering: {e}"));
                }
                let _ = listener.answer(call.id, Answer::Errno(Errno::AGAIN.raw_os_error()));
                return Served::Yes;
            }
        };
        match listener.answer(call.id, Answer::Continue) {
            Ok(true) => {
                state.pending = Some(Pending {
                    wanted: pid,
                    tid: call.tid as i32,
                    nr: call.nr,
                    since: None,
                    nudge: None,
                });
            }
            // The caller was killed before it was let go.
            Ok(false) => state.spare = Some(pid),
            Err(e) => {
                super::complain(format_args!("answering a clone: {e}"));
                state.spare = Some(pid);
            }
        }
        Served::Yes
    }

    /// This thread makes another call that makes a task: it has left the one before.
    pub fn is_back(&self, tid: i32) {
        let mut state = self.state();
        if state.pending.as_ref().is_some_and(|p| p.tid == tid) {
            self.has_left(&mut state);
        }
    }

    /// Init makes a task: `make` must call clone and return the PID it got. `pid`: this number instead of the next; if it
    /// is in use after all, as that of a session, the task comes out with another.
    pub fn make<T>(&self, pid: Option<Pid>, make: impl FnOnce() -> io::Result<(Pid, T)>) -> io::Result<(Pid, T)> {
        let mut state = self.turn()?;
        let wanted = match pid {
            Some(pid) => self.free(&mut state, pid)?,
            None => self.next_pid(&mut state)?,
        };
        self.write_last(wanted.0 - 1)?;
        match make() {
            Ok((got, made)) => {
                if got != wanted {
                    if pid.is_none() {
                        super::complain(format_args!("BUG: a task of init was to be {wanted} and is {got}"));
                    }
                    state.allotment.occupy(got);
                }
                Ok((got, made))
            }
            Err(e) => {
                if pid.is_none() {
                    state.spare = Some(wanted);
                }
                Err(e)
            }
        }
    }

    /// The daemon makes a task of this number: nobody else makes one until [`Steering::end`]. Called again meanwhile, it
    /// aims at another number and tells whether the one before was taken.
    pub fn begin(&self, pid: Pid) -> io::Result<bool> {
        let held = self.state().held;
        let (mut state, taken) = match held {
            Some(held) => {
                let taken = self.read_last()? == held.0;
                (self.state(), taken)
            }
            None => (self.turn()?, true),
        };
        self.free(&mut state, pid)?;
        self.write_last(pid.0 - 1)?;
        state.held = Some(pid);
        Ok(taken)
    }

    /// Everybody may make tasks again. Was the number taken?
    pub fn end(&self) -> io::Result<bool> {
        let mut state = self.state();
        let Some(held) = state.held.take() else {
            return Ok(false);
        };
        let taken = self.read_last().map(|last| last == held.0);
        drop(state);
        let _ = rustix::io::write(&self.released, &1u64.to_ne_bytes());
        taken
    }

    /// Readable once after [`Steering::end`].
    pub fn released(&self) -> BorrowedFd<'_> {
        self.released.as_fd()
    }

    /// The wake-up has been seen.
    pub fn seen(&self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.released, &mut count);
    }

    /// See [`Allotment::reserve`].
    pub fn reserve(&self, pids: Vec<Pid>) {
        let mut state = self.state();
        if state.spare.is_some_and(|s| pids.contains(&s)) {
            state.spare = None;
        }
        state.allotment.reserve(pids);
    }

    /// See [`Allotment::release`].
    pub fn release(&self, pids: Vec<Pid>) {
        self.state().allotment.release(pids);
    }

    /// See [`Allotment::occupy`].
    pub fn occupy(&self, pids: Vec<Pid>) {
        let mut state = self.state();
        for pid in pids {
            if state.spare == Some(pid) {
                state.spare = None;
            }
            state.allotment.occupy(pid);
        }
    }

    /// Waits until the call that was let go last has taken its number.
    fn turn(&self) -> io::Result<MutexGuard<'_, State>> {
        let start = Instant::now();
        loop {
            let mut state = self.state();
            if state.held.is_some() {
                return Err(Errno::BUSY.into());
            }
            if self.settled(&mut state) {
                return Ok(state);
            }
            drop(state);
            if start.elapsed() > TURN {
                return Err(Errno::TIMEDOUT.into());
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// A number that is chosen by somebody else must be free.
    fn free(&self, state: &mut State, pid: Pid) -> io::Result<Pid> {
        if pid.0 < 2 {
            return Err(Errno::INVAL.into());
        }
        if spawn::pid_is_known(pid.0, self.cookie) {
            return Err(Errno::EXIST.into());
        }
        if state.spare == Some(pid) {
            state.spare = None;
        }
        state.allotment.occupy(pid);
        Ok(pid)
    }

    fn next_pid(&self, state: &mut State) -> io::Result<Pid> {
        if let Some(spare) = state.spare.take()
            && !spawn::pid_is_known(spare.0, self.cookie)
        {
            return Ok(spare);
        }
        // A number that the scan did not show can still be in use: a task that was made just now has its number before
        // it has a place in /proc. So each is asked for.
        for _ in 0..2 * u64::from(state.allotment.candidates()) + 4 {
            match state.allotment.next_pid() {
                Ok(pid) if spawn::pid_is_known(pid.0, self.cookie) => state.allotment.occupy(pid),
                Ok(pid) => return Ok(pid),
                Err(NoPid::NeedsScan(window)) => state.allotment.scanned(window, scan::ids_in_use()),
                Err(NoPid::Exhausted) => break,
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// Has the call that was let go last taken its number, or left? Looks as hard as it is time to.
    fn settled(&self, state: &mut State) -> bool {
        let Some(pending) = &mut state.pending else {
            return true;
        };
        match self.read_last() {
            Ok(last) if last == pending.wanted.0 => {
                state.pending = None;
                return true;
            }
            Ok(last) if last == pending.wanted.0 - 1 => {}
            Ok(last) => {
                super::complain(format_args!(
                    "BUG: a task of {} was to be {} and is {last}",
                    pending.tid, pending.wanted
                ));
                state.allotment.occupy(Pid(last));
                state.pending = None;
                return true;
            }
            Err(e) => {
                super::complain(format_args!("reading ns_last_pid: {e}"));
                return false;
            }
        }
        let waited = pending.since.get_or_insert_with(Instant::now).elapsed();
        if waited < LOOK_AFTER {
            return false;
        }
        if is_outside(pending) {
            self.has_left(state);
            return true;
        }
        if pending.nudge.as_ref().is_some_and(|n| n.outcome() == Outcome::Refused) {
            // Somebody else traces it; it may be let go by then.
            pending.nudge = None;
        }
        let times = state.nudged.iter().find(|(t, _)| *t == pending.tid).map_or(0, |n| n.1);
        if pending.nudge.is_none() && waited > PATIENCE * (1 << times.min(MAX_DOUBLINGS)) {
            pending.nudge = Some(self.nudger.nudge(pending.tid));
            let tid = pending.tid;
            state.nudged.retain(|(t, _)| *t != tid);
            if state.nudged.len() == state.nudged.capacity() {
                state.nudged.remove(0);
            }
            state.nudged.push((tid, times + 1));
        }
        false
    }

    /// The caller is out of its call; whether it took its number is final now.
    fn has_left(&self, state: &mut State) {
        if let Some(pending) = state.pending.take()
            && self.read_last().is_ok_and(|last| last == pending.wanted.0 - 1)
        {
            state.spare = Some(pending.wanted);
        }
    }

    fn read_last(&self) -> io::Result<i32> {
        let mut text = [0u8; 16];
        let n = self.last_pid.read_at(&mut text, 0)?;
        let number = std::str::from_utf8(&text[..n])
            .ok()
            .and_then(|t| t.trim_ascii().parse().ok());
        number.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn write_last(&self, last: i32) -> io::Result<()> {
        use io::Write;
        let mut text = [0u8; 16];
        let mut rest = &mut text[..];
        write!(rest, "{last}")?;
        let length = 16 - rest.len();
        self.last_pid.write_all_at(&text[..length], 0)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Is it proven that the caller has left its call?
fn is_outside(pending: &Pending) -> bool {
    if pending
        .nudge
        .as_ref()
        .is_some_and(|n| n.outcome() == Outcome::WasOutside)
    {
        return true;
    }
    let task = ProcDir::process(pending.tid);
    match task.bytes("stat") {
        Ok(stat) => {
            let state = stat.iter().rposition(|b| *b == b')').and_then(|at| stat.get(at + 2));
            // Zombie, dead, stopped, traced: in none of them is it inside the call. (Of a process whose leader is a
            // zombie, tid is the leader, which cannot call anything.)
            if matches!(state, Some(b'Z' | b'X' | b'T' | b't')) {
                return true;
            }
        }
        Err(e) => return matches!(e.raw_os_error(), Some(2 | 3)), // ENOENT, ESRCH
    }
    // "running", or the number of the call it blocks in. One that blocks in the same call may be inside still.
    let Ok(call) = task.text("syscall") else {
        return false;
    };
    match call.split_ascii_whitespace().next().map(str::parse::<i32>) {
        Some(Ok(nr)) => nr != pending.nr,
        Some(Err(_)) | None => false,
    }
}

/// Is this a call that must be steered?
pub fn is_steered(call: &Notification) -> bool {
    seccomp::is_clone(call.arch, call.nr)
}
