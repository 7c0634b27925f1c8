//! Making a running thread leave the system call it may be in, without the program noticing.
//!
//! Owns the ptrace calls of that one purpose: seize, interrupt, and let go at the first stop. Refuses to know why.
//! Invariants: all calls for one [`Nudge`] come from one OS thread (ptrace demands it); a signal that stopped the thread
//! before the interrupt did is delivered, not swallowed.

use std::io;

/// How far a nudge has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It has not stopped yet.
    Waiting,
    /// It stopped, hence was out of its call, and goes on.
    LetGo,
    /// It is no more. If it was a child of the calling process, this is its wait status, taken.
    Gone(Option<i32>),
}

/// A thread that has been asked to stop.
#[derive(Debug)]
pub struct Nudge {
    tid: i32,
}

impl Nudge {
    /// Seizes the thread and interrupts it. EPERM: somebody else traces it.
    pub fn start(tid: i32) -> io::Result<Nudge> {
        ptrace(libc::PTRACE_SEIZE, tid, 0)?;
        // Fails only if the thread is gone, which `poll` finds out.
        let _ = ptrace(libc::PTRACE_INTERRUPT, tid, 0);
        Ok(Nudge { tid })
    }

    /// The thread.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Lets it go if it has stopped. Never blocks.
    pub fn poll(&mut self) -> Progress {
        // The stop is looked for with GETSIGINFO, not wait(2): another thread that waits for any child may have taken
        // the report, if the thread is a child of this process.
        // SAFETY: all-zero is a valid siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let stopped = ptrace(libc::PTRACE_GETSIGINFO, self.tid, &raw mut info as usize);
        match stopped {
            Ok(()) => {
                let event = info.si_code >> 8 == libc::PTRACE_EVENT_STOP;
                let signal = if event { 0 } else { info.si_signo };
                match ptrace(libc::PTRACE_DETACH, self.tid, signal as usize) {
                    Ok(()) => Progress::LetGo,
                    Err(_) => Progress::Waiting,
                }
            }
            // A group stop has no siginfo.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => match ptrace(libc::PTRACE_DETACH, self.tid, 0) {
                Ok(()) => Progress::LetGo,
                Err(_) => Progress::Waiting,
            },
            Err(_) => self.reap(),
        }
    }

    /// It runs, or has ended: then its tracer must wait for it before its parent can.
    fn reap(&mut self) -> Progress {
        let ours = parent(self.tid) == Some(std::process::id() as i32);
        let mut status = 0;
        // SAFETY: waits for one thread, writing to one local.
        let r = unsafe { libc::waitpid(self.tid, &mut status, libc::WNOHANG | libc::__WALL | libc::__WNOTHREAD) };
        match r {
            0 => Progress::Waiting,
            r if r == self.tid && libc::WIFSTOPPED(status) => Progress::Waiting,
            r if r == self.tid => Progress::Gone(ours.then_some(status)),
            _ => Progress::Gone(None),
        }
    }
}

fn parent(pid: i32) -> Option<i32> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let end = stat.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(&stat[end + 1..]).ok()?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

fn ptrace(request: u32, tid: i32, data: usize) -> io::Result<()> {
    // SAFETY: the requests used here write at most one siginfo_t, to where `data` points when it is GETSIGINFO.
    match unsafe { libc::ptrace(request, tid, 0usize, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    fn settle(nudge: &mut Nudge) -> Progress {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            match nudge.poll() {
                Progress::Waiting if Instant::now() < end => std::thread::yield_now(),
                done => return done,
            }
        }
    }

    #[test]
    fn a_running_program_is_let_go_unharmed() {
        let mut spinning = Command::new("/bin/sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .unwrap();
        let tid = spinning.id() as i32;
        for _ in 0..20 {
            let mut nudge = Nudge::start(tid).unwrap();
            assert_eq!(settle(&mut nudge), Progress::LetGo);
        }
        assert!(spinning.try_wait().unwrap().is_none(), "it still runs");
        spinning.kill().unwrap();
        spinning.wait().unwrap();
    }

    #[test]
    fn one_that_dies_meanwhile_is_gone() {
        let mut sleeper = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let mut nudge = Nudge::start(sleeper.id() as i32).unwrap();
        sleeper.kill().unwrap();
        let end = settle(&mut nudge);
        // It either stopped first, or died; in both cases nothing of ours holds it.
        match end {
            Progress::Gone(status) => assert_eq!(status, Some(libc::SIGKILL)),
            Progress::LetGo => {
                sleeper.wait().unwrap();
            }
            Progress::Waiting => panic!("neither stopped nor gone"),
        }
        assert!(Nudge::start(i32::MAX).is_err());
    }
}
