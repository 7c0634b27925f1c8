//! Open file descriptions, a file for each kind of them: how one is captured and how it is made again.
//!
//! Owns what is particular to a kind. Refuses to know tables, sharing and order: that is [`capture`](crate::capture)'s and
//! [`restore`](crate::restore)'s. Invariants: looking changes nothing that the program can see; a kind that cannot be
//! made again exactly is an obstacle that says what to do; what is made is the daemon's, to be installed.

pub(crate) mod epoll;
pub(crate) mod event;
pub(crate) mod file;
pub(crate) mod memory;
pub(crate) mod owner;
pub(crate) mod pipe;
pub(crate) mod process;
pub(crate) mod signals;
pub(crate) mod timer;
pub(crate) mod unix;

use crate::capture::Surroundings;
use crate::capture::descriptors::Glimpse;
use crate::files::proc_fd;
use crate::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::DescriptionKind;
use dunlin_sys::foothold::take_descriptor;
use dunlin_sys::procfs::ProcDir;
use std::cell::OnceCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// Why a descriptor cannot move.
pub(crate) type Refusal = Box<Obstacle>;
/// What a look at a descriptor finds.
pub(crate) type Found = io::Result<Result<DescriptionKind, Refusal>>;

/// A descriptor that is looked at.
pub(crate) struct Look<'a> {
    /// Whose it is.
    pub pid: Pid,
    /// The process's number on this machine.
    pub host: i32,
    /// Its directory in /proc.
    pub dir: &'a ProcDir,
    /// What /proc said of the descriptor.
    pub glimpse: &'a Glimpse,
    /// The processes around.
    pub around: &'a Surroundings<'a>,
    /// Our own handle on the description, when it was first asked for.
    pub handle: OnceCell<OwnedFd>,
}

impl Look<'_> {
    /// What it links to, as bytes.
    pub fn target(&self) -> &[u8] {
        self.glimpse.link.as_os_str().as_encoded_bytes()
    }

    /// Our own handle on the description. Whatever the program does with its table meanwhile, this stays what it is: all that
    /// is found out is found out of it, never of the number.
    pub fn handle(&self) -> io::Result<BorrowedFd<'_>> {
        if self.handle.get().is_none() {
            let taken = take_descriptor(self.host, self.glimpse.number)?;
            let _ = self.handle.set(taken);
        }
        self.handle.get().map(AsFd::as_fd).ok_or(io::ErrorKind::NotFound.into())
    }

    /// Is the handle one of what the glimpse is of? A program that runs may have closed it since, and opened something
    /// else under its number; it may even have the first one back by the time of the freeze.
    pub fn is_there(&self) -> io::Result<bool> {
        match self.handle() {
            Ok(handle) => {
                let now = Glimpse::of(&ProcDir::own(), handle.as_raw_fd())?;
                Ok(now.is_some_and(|now| now.is_like(self.glimpse)))
            }
            // EBADF, ESRCH: it is closed, or the process has ended, which others will find out.
            Err(error) if matches!(error.raw_os_error(), Some(9 | 3)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The magic link through which the file can be opened again.
    pub fn link(&self) -> io::Result<PathBuf> {
        Ok(proc_fd(&self.handle()?))
    }

    /// Its fdinfo as it is now, without what is the process's own (locks of the kind `POSIX`). What is to be compared with a
    /// later glimpse is taken from this one instead: the program runs while the plan is made.
    pub fn info(&self) -> io::Result<String> {
        ProcDir::own().text(&format!("fdinfo/{}", self.handle()?.as_raw_fd()))
    }

    /// It cannot move.
    pub fn refuse<T>(&self, why: &str, hint: &str) -> io::Result<Result<T, Refusal>> {
        let what = self.glimpse.link.display();
        let obstacle = obstacle::descriptor(self.pid, self.glimpse.number, what, why, hint);
        Ok(Err(Box::new(obstacle)))
    }
}
