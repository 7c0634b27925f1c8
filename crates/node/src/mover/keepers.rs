//! The end of keepers whose image nobody needs any more.
//!
//! Owns the killing, the reaping, and the list of those that could not be reaped yet: their parent, the process that has come
//! back, is just being moved or traced by somebody else. Refuses to judge whether an image is needed. Invariant: the
//! record of an image goes when its keeper is reaped, so that no keeper is forgotten, whoever dies.

use super::{Mover, lock};
use crate::capture::{SCRIPT_MASK, made_again};
use crate::processes::HiddenKind;
use dunlin_proto::ids::{MoveId, Pid};
use dunlin_sys::foothold::syscall_instruction;
use dunlin_sys::pidfd;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Options, Running};
use dunlin_sys::refuge::{Others, Refuge};
use dunlin_sys::script::Held;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{PidfdFlags, Signal};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// A keeper without an image.
#[derive(Debug)]
pub(super) struct Spent {
    pub(super) by: MoveId,
    /// Whose memory it kept.
    pub(super) pid: Pid,
    /// The keeper, by its number on this machine.
    pub(super) host: i32,
}

impl Mover {
    /// Ends the keeper of an image that nobody needs any more; what cannot be done now is done in one of the next
    /// [sweeps](Mover::sweep). The thread that calls traces nobody.
    pub(super) fn end_keeper(&self, spent: Spent) {
        tracing::debug!(?spent, "a keeper is ended");
        match self.end(spent.host) {
            Ok(()) => self.drop_image_record(spent.by, spent.pid),
            Err(error) => {
                tracing::debug!(%error, ?spent, "a keeper cannot be reaped yet");
                lock(&self.spent).push(spent);
            }
        }
    }

    /// Those that could not be ended when it was their time.
    pub(super) fn end_spent_keepers(&self) {
        let spent = std::mem::take(&mut *lock(&self.spent));
        spent.into_iter().for_each(|spent| self.end_keeper(spent));
    }

    /// Its parent is told nothing at its end, and has to be made to reap it, whether it is a surrogate by now or the
    /// process again.
    fn end(&self, keeper: i32) -> io::Result<()> {
        let Ok(status) = ProcDir::process(keeper).status() else {
            return Ok(());
        };
        let number = status.ns_pids.last().copied().unwrap_or(0);
        let process = rustix::process::Pid::from_raw(keeper).ok_or(io::ErrorKind::InvalidInput)?;
        let pidfd = rustix::process::pidfd_open(process, PidfdFlags::empty())?;
        rustix::process::pidfd_send_signal(&pidfd, Signal::KILL)?;
        let patience = Timespec { tv_sec: 2, tv_nsec: 0 };
        rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience))?;
        let parent = ProcDir::process(status.ppid).status().map_err(io::Error::other)?;
        let pid = parent.ns_pids.last().copied().map_or(Pid(0), Pid);
        match self.hidden.kind(pid) {
            // PID 1 reaps whatever it is given.
            _ if pid.0 <= 1 => Ok(()),
            // A program is coming back in it, to whom a signal would be one of its own.
            Some(HiddenKind::Blank) => Err(io::ErrorKind::ResourceBusy.into()),
            Some(_) => {
                let parent = rustix::process::Pid::from_raw(status.ppid).ok_or(io::ErrorKind::InvalidInput)?;
                rustix::process::kill_process(parent, Signal::CHILD)?;
                // If it becomes the process again just now, it looks no more.
                until_reaped(&pidfd)
            }
            None => reap(status.ppid, number),
        }
    }
}

/// Waits a moment for a surrogate to reap a child that has ended.
fn until_reaped(pidfd: &OwnedFd) -> io::Result<()> {
    const PATIENCE: Duration = Duration::from_millis(50);
    let deadline = Instant::now() + PATIENCE;
    while pidfd::send(pidfd, 0, None).is_ok() {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Has a program wait for a child that only __WALL shows it.
fn reap(program: i32, child: i32) -> io::Result<()> {
    const SYS_WAIT4: i64 = 61;
    const WALL_NOHANG: u64 = 0x4000_0001;
    let patience = Instant::now() + Duration::from_secs(2);
    let running = Running::seize(program, Options::default()).map_err(io::Error::other)?;
    let (thread, _) = running.stop(patience).map_err(io::Error::other)?;
    let work = || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let at = syscall_instruction(&ProcDir::process(program))?;
        let (registers, mask) = (thread.registers()?, thread.signal_mask()?);
        let registers = made_again(&registers).unwrap_or(registers);
        let held = Held {
            tid: program,
            mask,
            registers,
        };
        if let Some(refuge) = Refuge::find(program, at)? {
            refuge.enter(&thread, program, &held, Others::Run)?;
        }
        thread.set_signal_mask(SCRIPT_MASK)?;
        let arguments = [child as u64, 0, WALL_NOHANG, 0, 0, 0];
        let (thread, _) = thread.inject(at, SYS_WAIT4, arguments)?;
        thread.set_signal_mask(mask)?;
        thread.set_registers(&registers)?;
        Ok(thread.detach(0)?)
    };
    work().map_err(io::Error::other)
}
