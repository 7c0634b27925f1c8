//! How processes end: those here, watched by process descriptor, and those of this home that ended elsewhere.
//!
//! Owns one thread that waits on all watched descriptors, and the last [`MAX_REMEMBERED`] endings. Refuses to know who
//! wants to know. Invariants: a [`Watch`] is of one process, never of a later one of the same number; it is told the
//! true status where any of three sources has it (the zombie's `/proc/PID/stat`, `PIDFD_GET_INFO`, PID 1 of the nest,
//! which reaped it), else `Unknown`.

use super::NestProc;
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::Pid;
use dunlin_sys::pidfd;
use rustix::event::epoll;
use rustix::io::Errno;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// So many endings are remembered.
pub const MAX_REMEMBERED: usize = 1024;
/// How long PID 1's word is waited for where the kernel does not say how a process ended.
const REAPER_WITHIN: Duration = Duration::from_millis(500);

/// A process that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// Its real user.
    pub uid: u32,
    /// Raised by every ending that is heard of: tells whether one is older than something else.
    pub number: u64,
}

/// What a [`Watch`] has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// It runs.
    Running,
    /// It has ended.
    Ended(ExitStatus),
    /// It has left this node: ask its home.
    Left,
}

/// One process that is watched.
pub struct Watch {
    pid: Pid,
    uid: u32,
    pidfd: OwnedFd,
    /// The latest ending before the watch began: a later one of this number is this process's.
    since: u64,
    seen: Mutex<Seen>,
    told: Condvar,
}

impl Watch {
    /// Waits for its end for so long.
    pub fn wait(&self, within: Duration) -> Seen {
        let seen = self.seen.lock().unwrap_or_else(|e| e.into_inner());
        let wait = self.told.wait_timeout_while(seen, within, |s| *s == Seen::Running);
        *wait.unwrap_or_else(|e| e.into_inner()).0
    }

    fn tell(&self, what: Seen) {
        *self.seen.lock().unwrap_or_else(|e| e.into_inner()) = what;
        self.told.notify_all();
    }
}

#[derive(Default)]
struct State {
    watches: BTreeMap<u64, Arc<Watch>>,
    next: u64,
    ended: BTreeMap<Pid, Ended>,
    order: VecDeque<(Pid, u64)>,
    reaped: VecDeque<(Pid, ExitStatus, u64)>,
    numbers: u64,
}

type OnEnd = Box<dyn Fn(Pid, Ended) + Send + Sync>;

/// All endings that this daemon knows or waits for.
pub struct Exits {
    epoll: OwnedFd,
    proc: NestProc,
    state: Mutex<State>,
    recorded: Condvar,
    on_end: OnEnd,
}

impl Exits {
    /// Starts the thread. `on_end` is called for every watched process, from that thread.
    pub fn start(proc: NestProc, on_end: impl Fn(Pid, Ended) + Send + Sync + 'static) -> io::Result<Arc<Exits>> {
        let exits = Arc::new(Exits {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            proc,
            state: Mutex::default(),
            recorded: Condvar::new(),
            on_end: Box::new(on_end),
        });
        let weak = Arc::downgrade(&exits);
        thread::Builder::new().name("exits".into()).spawn(move || {
            while let Some(exits) = weak.upgrade() {
                exits.turn();
            }
        })?;
        Ok(exits)
    }

    /// Watches a process; one that is watched already is not watched twice.
    pub fn watch(&self, pid: Pid, pidfd: OwnedFd, uid: u32) -> io::Result<Arc<Watch>> {
        let mut state = self.lock();
        let old = state.watches.values().find(|w| w.pid == pid);
        // The number may have passed to another process; the old watch then is about to be told so.
        if let Some(old) = old.filter(|w| pidfd::send(&w.pidfd, 0, None).is_ok()) {
            return Ok(old.clone());
        }
        let token = state.next;
        state.next += 1;
        let since = state.numbers;
        let (seen, told) = (Mutex::new(Seen::Running), Condvar::new());
        let watch = Arc::new(Watch {
            pid,
            uid,
            pidfd,
            since,
            seen,
            told,
        });
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ONESHOT;
        epoll::add(&self.epoll, &watch.pidfd, epoll::EventData::new_u64(token), flags)?;
        state.watches.insert(token, watch.clone());
        Ok(watch)
    }

    /// The process leaves this node: what happens to its task here from now on is not its end.
    pub fn left(&self, pid: Pid) {
        let mut state = self.lock();
        let tokens: Vec<u64> = state
            .watches
            .iter()
            .filter(|(_, w)| w.pid == pid)
            .map(|(t, _)| *t)
            .collect();
        for watch in tokens.iter().filter_map(|t| state.watches.remove(t)) {
            // Only fails where the descriptor is not in the set, which is what is wanted.
            let _ = epoll::delete(&self.epoll, &watch.pidfd);
            watch.tell(Seen::Left);
        }
    }

    /// Remembers an ending.
    pub fn record(&self, pid: Pid, status: ExitStatus, uid: u32) -> Ended {
        let mut state = self.lock();
        state.numbers += 1;
        let ended = Ended {
            status,
            uid,
            number: state.numbers,
        };
        state.ended.insert(pid, ended);
        state.order.push_back((pid, ended.number));
        if state.order.len() > MAX_REMEMBERED
            && let Some((oldest, number)) = state.order.pop_front()
            && state.ended.get(&oldest).is_some_and(|e| e.number == number)
        {
            state.ended.remove(&oldest);
        }
        drop(state);
        self.recorded.notify_all();
        ended
    }

    /// PID 1 has reaped it, and says how it ended. For a process that is watched, or whose end is known and nothing more,
    /// that settles it; for any other it is remembered for who may come to ask ([`Exits::reaped_after`]).
    pub fn reaped(&self, pid: Pid, status: ExitStatus) {
        let mut state = self.lock();
        state.numbers += 1;
        let number = state.numbers;
        state.reaped.push_back((pid, status, number));
        if state.reaped.len() > MAX_REMEMBERED {
            state.reaped.pop_front();
        }
        let unknown = state.ended.get_mut(&pid).filter(|e| e.status == ExitStatus::Unknown);
        if let Some(ended) = unknown {
            ended.status = status;
            return;
        }
        let uid = state.watches.values().find(|w| w.pid == pid).map(|w| w.uid);
        drop(state);
        if let Some(uid) = uid {
            self.record(pid, status, uid);
        }
    }

    /// How PID 1 said that a process ended, if that was after the ending of this number ([`Exits::latest`]).
    pub fn reaped_after(&self, pid: Pid, number: u64) -> Option<ExitStatus> {
        let state = self.lock();
        let found = state.reaped.iter().rev().find(|(p, _, n)| *p == pid && *n > number);
        found.map(|(_, status, _)| *status)
    }

    /// How a process ended, if that was not long ago.
    pub fn ended(&self, pid: Pid) -> Option<Ended> {
        self.lock().ended.get(&pid).copied()
    }

    /// The number of the latest ending.
    pub fn latest(&self) -> u64 {
        self.lock().numbers
    }

    fn turn(&self) {
        let mut events = [MaybeUninit::uninit(); 64];
        // Bounded, so that the thread notices when nobody holds the endings any more.
        let timeout = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        let ready = match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok((ready, _)) => ready,
            Err(Errno::INTR) => return,
            Err(e) => {
                tracing::error!("waiting for the ends of processes: {e}");
                return thread::sleep(Duration::from_secs(1));
            }
        };
        for event in ready {
            let token = event.data.u64();
            let watch = self.lock().watches.get(&token).cloned();
            if let Some(watch) = watch {
                self.settle(&watch);
                self.lock().watches.remove(&token);
            }
        }
    }

    fn settle(&self, watch: &Watch) {
        let status = self.status_of(watch);
        let ended = match self.ended(watch.pid).filter(|e| e.number > watch.since) {
            // Its reaper was faster.
            Some(ended) => ended,
            None => self.record(watch.pid, status, watch.uid),
        };
        watch.tell(Seen::Ended(status));
        (self.on_end)(watch.pid, ended);
    }

    fn status_of(&self, watch: &Watch) -> ExitStatus {
        let zombie = self.proc.zombie_status(watch.pid).ok().flatten();
        // Not yet reaped after the reading: what was read was its own, not that of a successor.
        if let Some(raw) = zombie.filter(|_| pidfd::send(&watch.pidfd, 0, None).is_ok()) {
            return decode(raw);
        }
        match pidfd::exit_status(&watch.pidfd) {
            Ok(Some(raw)) => decode(raw),
            Ok(None) => self.word_of_the_reaper(watch),
            Err(e) => {
                tracing::warn!("process {}: how it ended is not known: {e}", watch.pid);
                ExitStatus::Unknown
            }
        }
    }

    fn word_of_the_reaper(&self, watch: &Watch) -> ExitStatus {
        let deadline = Instant::now() + REAPER_WITHIN;
        let mut state = self.lock();
        loop {
            if let Some(ended) = state.ended.get(&watch.pid).filter(|e| e.number > watch.since) {
                return ended.status;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return ExitStatus::Unknown;
            }
            state = self
                .recorded
                .wait_timeout(state, left)
                .unwrap_or_else(|e| e.into_inner())
                .0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A wait status, as `waitpid(2)` gives it.
pub fn decode(raw: i32) -> ExitStatus {
    match raw & 0x7f {
        0 => ExitStatus::Code((raw >> 8) & 0xff),
        signal => ExitStatus::Signal {
            signal,
            core: raw & 0x80 != 0,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{PidfdFlags, pidfd_open};
    use std::process::Command;

    fn exits() -> Arc<Exits> {
        Exits::start(NestProc::open(std::fs::File::open("/").unwrap()).unwrap(), |_, _| {}).unwrap()
    }

    fn spawned(script: &str) -> (std::process::Child, Pid, OwnedFd) {
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let pid = child.id() as i32;
        let fd = pidfd_open(rustix::process::Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        (child, Pid(pid), fd)
    }

    #[test]
    fn zombies_and_the_reaped_tell_how_they_ended() {
        let exits = exits();
        for reap_first in [false, true] {
            for (script, status) in [
                ("exit 7", ExitStatus::Code(7)),
                ("ulimit -c 0; kill -9 $$", ExitStatus::Signal { signal: 9, core: false }),
            ] {
                let (mut child, pid, fd) = spawned(script);
                if reap_first {
                    child.wait().unwrap();
                }
                let watch = exits.watch(pid, fd, 5).unwrap();
                assert_eq!(watch.wait(Duration::from_secs(10)), Seen::Ended(status));
                assert_eq!(exits.ended(pid).map(|e| (e.status, e.uid)), Some((status, 5)));
                child.wait().unwrap();
            }
        }
    }

    #[test]
    fn a_running_process_is_waited_for_within_a_bound() {
        let exits = exits();
        let (mut child, pid, fd) = spawned("exec sleep 1000");
        let watch = exits.watch(pid, fd.try_clone().unwrap(), 0).unwrap();
        assert_eq!(watch.wait(Duration::from_millis(20)), Seen::Running);
        assert!(Arc::ptr_eq(&watch, &exits.watch(pid, fd, 0).unwrap()));
        child.kill().unwrap();
        assert_eq!(
            watch.wait(Duration::from_secs(10)),
            Seen::Ended(ExitStatus::Signal { signal: 9, core: false })
        );
        child.wait().unwrap();
    }

    #[test]
    fn the_end_of_a_task_that_its_process_has_left_is_nobodys_end() {
        let exits = exits();
        let (mut child, pid, fd) = spawned("exec sleep 1000");
        let watch = exits.watch(pid, fd, 0).unwrap();
        exits.left(pid);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(watch.wait(Duration::from_secs(10)), Seen::Left);
        assert_eq!(exits.ended(pid), None);
    }

    #[test]
    fn endings_are_forgotten_oldest_first() {
        let exits = exits();
        for pid in 0..=MAX_REMEMBERED as i32 {
            exits.record(Pid(pid), ExitStatus::Code(0), 0);
        }
        assert_eq!(exits.ended(Pid(0)), None);
        assert!(exits.ended(Pid(1)).is_some());
        assert_eq!(exits.latest(), MAX_REMEMBERED as u64 + 1);
    }

    #[test]
    fn wait_statuses() {
        assert_eq!(decode(0x0300), ExitStatus::Code(3));
        assert_eq!(decode(0x8b), ExitStatus::Signal { signal: 11, core: true });
    }
}
