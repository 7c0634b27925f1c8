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
use crate::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::DescriptionKind;
use dunlin_sys::foothold::take_descriptor;
use dunlin_sys::procfs::ProcDir;
use std::io;
use std::os::fd::OwnedFd;
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
}

impl Look<'_> {
    /// What it links to, as bytes.
    pub fn target(&self) -> &[u8] {
        self.glimpse.link.as_os_str().as_encoded_bytes()
    }

    /// The magic link through which the file can be opened again.
    pub fn link(&self) -> PathBuf {
        self.dir.path(&format!("fd/{}", self.glimpse.number))
    }

    /// Its fdinfo as it is now. What is to be compared with a later glimpse is taken from this one instead: the program runs
    /// while the plan is made.
    pub fn info(&self) -> io::Result<String> {
        self.dir.text(&format!("fdinfo/{}", self.glimpse.number))
    }

    /// The description itself.
    pub fn take(&self) -> io::Result<OwnedFd> {
        take_descriptor(self.host, self.glimpse.number)
    }

    /// It cannot move.
    pub fn refuse<T>(&self, why: &str, hint: &str) -> io::Result<Result<T, Refusal>> {
        let what = self.glimpse.link.display();
        let obstacle = obstacle::descriptor(self.pid, self.glimpse.number, what, why, hint);
        Ok(Err(Box::new(obstacle)))
    }
}
