//! Descriptors installed into a traced process, at numbers of our choice.
//!
//! The target makes one call that the nest's seccomp filter hands to us ([`trigger`]); while it waits, the descriptors
//! are put into its table. Owns the pending installations. Refuses to know what the descriptors are. Invariant: a
//! trigger without a pending installation is answered with ENOSYS, so that nobody waits for ever.

use dunlin_proto::ids::{LAST_OWN_PID, Modulus, Pid, Slot};
use dunlin_sys::addfd;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// `pidfd_open`, of a PID that lives elsewhere: notified, and never made with our mark by a program.
pub const TRIGGER_CALL: i64 = 434;
const ENOSYS: i32 = 38;
const PATIENCE: Duration = Duration::from_secs(10);

/// One descriptor to be installed.
#[derive(Debug)]
pub struct Wanted {
    /// What is installed.
    pub fd: OwnedFd,
    /// Where.
    pub number: i32,
    /// FD_CLOEXEC.
    pub close_on_exec: bool,
}

/// How a trigger is to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It was ours: let the call return this.
    Return(i64),
    /// It was ours, and failed with this error number.
    Fail(i32),
}

#[derive(Debug)]
enum State {
    Waiting(Vec<Wanted>),
    Done(Result<(), i32>),
}

/// The pending installations of one node.
#[derive(Debug)]
pub struct Installer {
    mark: u64,
    foreign: Pid,
    pending: Mutex<HashMap<Pid, State>>,
    changed: Condvar,
}

impl Installer {
    /// An installer for the nest whose cookie this is.
    pub fn new(cookie: u64, modulus: Modulus, slot: Slot) -> Installer {
        let foreign = (LAST_OWN_PID + 1..)
            .map(Pid)
            .find(|pid| modulus.home(*pid) != Some(slot));
        Installer {
            // Not the cookie itself: that would exempt the call from the notification.
            mark: cookie ^ 1,
            foreign: foreign.unwrap_or(Pid(LAST_OWN_PID + 1)),
            pending: Mutex::new(HashMap::new()),
            changed: Condvar::new(),
        }
    }

    /// The arguments of the call that a target makes to have its descriptors installed.
    pub fn trigger(&self) -> [u64; 6] {
        [self.foreign.0 as u64, 0, 0, 0, 0, self.mark]
    }

    /// Announces what is to be installed when thread `tid` (of the nest) makes the call.
    pub fn expect(&self, tid: Pid, wanted: Vec<Wanted>) {
        self.pending().insert(tid, State::Waiting(wanted));
    }

    /// After the call has returned: what came of it.
    pub fn outcome(&self, tid: Pid) -> io::Result<()> {
        let (mut pending, _) = self
            .changed
            .wait_timeout_while(self.pending(), PATIENCE, |p| {
                matches!(p.get(&tid), Some(State::Waiting(_)))
            })
            .unwrap_or_else(PoisonError::into_inner);
        match pending.remove(&tid) {
            Some(State::Done(Ok(()))) => Ok(()),
            Some(State::Done(Err(errno))) => Err(io::Error::from_raw_os_error(errno)),
            Some(State::Waiting(_)) | None => Err(io::Error::other("the descriptors were never asked for")),
        }
    }

    /// Looks at a notification of the nest; `None` if it is not ours.
    pub fn notified(
        &self,
        listener: BorrowedFd<'_>,
        id: u64,
        tid: Pid,
        number: i64,
        arguments: &[u64; 6],
    ) -> Option<Verdict> {
        if number != TRIGGER_CALL || arguments[5] != self.mark {
            return None;
        }
        let mut pending = self.pending();
        let Some(State::Waiting(wanted)) = pending.remove(&tid) else {
            return Some(Verdict::Fail(ENOSYS));
        };
        let outcome = wanted
            .iter()
            .try_for_each(|w| addfd::install(listener, id, w.fd.as_fd(), w.number, w.close_on_exec))
            .map_err(|errno| errno.0);
        pending.insert(tid, State::Done(outcome));
        self.changed.notify_all();
        Some(match outcome {
            Ok(()) => Verdict::Return(0),
            Err(errno) => Verdict::Fail(errno),
        })
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<Pid, State>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
