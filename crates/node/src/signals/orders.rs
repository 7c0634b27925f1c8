//! Stops and continuations, in one order for a process and all that stands for it.
//!
//! A process and each surrogate of it can be stopped and continued apart, and each tells the other. An *order* is what a
//! surrogate passes on to its process; a *report* is what the process's node tells the surrogates. Were a report carried
//! out that had been made before the latest order, it would undo that order in the surrogate, whose parent has been told.
//! So orders are numbered, and a report names the last order that the process had obeyed when it was in that state: a
//! surrogate takes it only if it has given no later one.
//!
//! Owns, for the processes that are here, the last order of each node that was obeyed, which travels with a process; and
//! whether a process may be signalled now, or is about to be elsewhere. Refuses to know how a signal is sent. Invariants:
//! an order is obeyed once and never after a later one of the same node; what is sent to a process that is being
//! captured waits until it is known where it runs.

use dunlin_proto::ids::{Pid, Slot};
use dunlin_sys::procfs::ProcDir;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a stop may take to take effect: the task has to run for it.
const STOPS_WITHIN: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_micros(50);

/// The orders that each node gave last, as they travel with the process.
pub type Obeyed = BTreeMap<Slot, u64>;

/// The next number: later than any that this node has given, in a former daemon's time too.
pub fn next_number() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos() as u64;
    let last = LAST.fetch_max(now, Ordering::Relaxed);
    if last < now {
        now
    } else {
        LAST.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Is a task stopped? `None`: it is gone, or in a state that does not tell.
pub fn is_stopped(host: i32) -> Option<bool> {
    match ProcDir::process(host).stat().ok()?.state {
        'T' => Some(true),
        // Traced: by this daemon, which is about to move it or to end it. Ended: the others of its threads may live.
        't' | 'Z' | 'X' => None,
        _ => Some(false),
    }
}

/// Waits until a task that was sent SIGSTOP has stopped.
pub fn settle_stop(host: i32) {
    let deadline = Instant::now() + STOPS_WITHIN;
    while is_stopped(host) == Some(false) && Instant::now() < deadline {
        thread::sleep(LOOK);
    }
}

#[derive(Debug, Default)]
struct State {
    /// It is being captured.
    closed: bool,
    /// It has left.
    left: bool,
    obeyed: Obeyed,
}

#[derive(Debug, Default)]
struct Door {
    state: Mutex<State>,
    opened: Condvar,
}

/// Of the processes that are here.
#[derive(Debug, Default)]
pub struct Orders(Mutex<BTreeMap<Pid, Arc<Door>>>);

impl Orders {
    /// Lets `act` signal a process while it is not being captured; what it obeyed may be read and written. `None`: it
    /// has left, or may be leaving for so long.
    pub fn signalling<T>(&self, pid: Pid, within: Duration, act: impl FnOnce(&mut Obeyed) -> T) -> Option<T> {
        let door = self.door(pid);
        let state = door.lock();
        let (mut state, _) = door
            .opened
            .wait_timeout_while(state, within, |s| s.closed && !s.left)
            .unwrap_or_else(PoisonError::into_inner);
        (!state.closed && !state.left).then(|| act(&mut state.obeyed))
    }

    /// Is it being captured?
    pub fn is_closed(&self, pid: Pid) -> bool {
        self.lock().get(&pid).is_some_and(|door| door.lock().closed)
    }

    /// Lets `look` see what a process has obeyed, while nobody signals it.
    pub fn looking<T>(&self, pid: Pid, look: impl FnOnce(&Obeyed) -> T) -> T {
        look(&self.door(pid).lock().obeyed)
    }

    /// The process is about to be captured: returns when nobody signals it any more. What it has obeyed goes with it.
    pub fn close(&self, pid: Pid) -> Obeyed {
        let door = self.door(pid);
        let mut state = door.lock();
        state.closed = true;
        state.obeyed.clone()
    }

    /// It runs on here.
    pub fn open(&self, pid: Pid) {
        let door = self.lock().get(&pid).cloned();
        if let Some(door) = door {
            door.lock().closed = false;
            door.opened.notify_all();
        }
    }

    /// It is not here any more.
    pub fn leave(&self, pid: Pid) {
        let door = self.lock().remove(&pid);
        if let Some(door) = door {
            door.lock().left = true;
            door.opened.notify_all();
        }
    }

    /// It has come.
    pub fn arrive(&self, pid: Pid, obeyed: Obeyed) {
        self.leave(pid);
        if !obeyed.is_empty() {
            self.door(pid).lock().obeyed = obeyed;
        }
    }

    /// Forgets all that these numbers belong to no more.
    pub fn forget(&self, is_gone: impl Fn(Pid) -> bool) {
        let known: Vec<Pid> = self.lock().keys().copied().collect();
        for pid in known.into_iter().filter(|pid| is_gone(*pid)) {
            self.leave(pid);
        }
    }

    fn door(&self, pid: Pid) -> Arc<Door> {
        self.lock().entry(pid).or_default().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Pid, Arc<Door>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Door {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PID: Pid = Pid(130);

    #[test]
    fn numbers_rise() {
        let numbers: Vec<u64> = (0..1000).map(|_| next_number()).collect();
        assert!(numbers.windows(2).all(|w| w[0] < w[1]));
    }

    #[test]
    fn what_is_sent_to_a_process_that_is_captured_waits_for_the_decision() {
        let orders = Arc::new(Orders::default());
        let send = |within| orders.signalling(PID, Duration::from_millis(within), |o| o.insert(Slot(1), 7));
        assert_eq!(send(0), Some(None));
        assert_eq!(orders.close(PID), [(Slot(1), 7)].into());
        assert_eq!(send(1), None);
        let waiting = || {
            let orders = orders.clone();
            thread::spawn(move || orders.signalling(PID, Duration::from_secs(60), |o| o.clone()))
        };
        let waits = waiting();
        orders.open(PID);
        assert_eq!(waits.join().unwrap(), Some([(Slot(1), 7)].into()));
        orders.close(PID);
        let waits = waiting();
        orders.leave(PID);
        // Who comes after it has left finds nothing of it.
        assert_ne!(waits.join().unwrap(), Some([(Slot(1), 7)].into()));
    }

    #[test]
    fn what_a_process_obeyed_travels_and_is_forgotten() {
        let orders = Orders::default();
        orders.arrive(PID, [(Slot(3), 9)].into());
        assert_eq!(orders.looking(PID, |o| o.get(&Slot(3)).copied()), Some(9));
        orders.forget(|pid| pid == PID);
        assert!(orders.looking(PID, Obeyed::is_empty));
    }

    #[test]
    fn a_task_is_seen_stopped() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let host = child.id() as i32;
        let process = rustix::process::Pid::from_child(&child);
        assert_eq!(is_stopped(host), Some(false));
        rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
        settle_stop(host);
        assert_eq!(is_stopped(host), Some(true));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(is_stopped(host), None);
    }
}
