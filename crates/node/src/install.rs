//! Descriptors installed into a traced process, at numbers of our choice.
//!
//! The target makes one call that the nest's seccomp filter hands to us ([`Installer::install`]); while it waits, the descriptors
//! are put into its table. Owns the pending installations. Refuses to know what the descriptors are. Invariant: a
//! trigger without a pending installation is answered with ENOSYS, so that nobody waits for ever.

use dunlin_proto::ids::{LAST_OWN_PID, Modulus, Pid, Slot};
use dunlin_sys::addfd;
use dunlin_sys::ptrace::{Options, Stopped, TraceError};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `pidfd_open`, of a PID that lives elsewhere: notified, and never made with our mark by a program.
const TRIGGER_CALL: i64 = 434;
const ENOSYS: i32 = 38;

/// Why descriptors could not be installed. Some of them may be there.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The thread could not be traced.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The kernel refused one (the process's own limit, a filter of its own), or nobody was asked.
    #[error(transparent)]
    Refused(#[from] io::Error),
}

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
        }
    }

    /// Has descriptors installed through a stopped thread (number `tid` in the nest) that is traced with `options`, by a
    /// call injected at `at`.
    pub fn install(
        &self,
        thread: Stopped,
        at: u64,
        tid: Pid,
        wanted: Vec<Wanted>,
        options: Options,
    ) -> Result<Stopped, InstallError> {
        // The filter that notifies us is suspended with the others.
        thread.set_options(Options {
            suspend_seccomp: false,
            ..options
        })?;
        self.expect(tid, wanted);
        let (thread, answer) = thread.inject(at, TRIGGER_CALL, self.trigger())?;
        self.outcome(tid, answer)?;
        thread.set_options(options)?;
        Ok(thread)
    }

    /// The arguments of the call that a target makes to have its descriptors installed.
    fn trigger(&self) -> [u64; 6] {
        [self.foreign.0 as u64, 0, 0, 0, 0, self.mark]
    }

    /// Announces what is to be installed when thread `tid` (of the nest) makes the call.
    fn expect(&self, tid: Pid, wanted: Vec<Wanted>) {
        self.pending().insert(tid, State::Waiting(wanted));
    }

    /// After the call has returned: what came of it.
    fn outcome(&self, tid: Pid, answer: i64) -> io::Result<()> {
        match self.pending().remove(&tid) {
            Some(State::Done(Ok(()))) => Ok(()),
            Some(State::Done(Err(errno))) => Err(io::Error::from_raw_os_error(errno)),
            Some(State::Waiting(_)) | None => Err(io::Error::other(format!(
                "the nest's filter did not report the call, which answered {answer}"
            ))),
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
        tracing::debug!(%tid, numbers = ?wanted.iter().map(|w| w.number).collect::<Vec<_>>(), ?outcome, "installed");
        pending.insert(tid, State::Done(outcome));
        Some(match outcome {
            Ok(()) => Verdict::Return(0),
            Err(errno) => Verdict::Fail(errno),
        })
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<Pid, State>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
