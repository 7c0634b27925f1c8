//! Restore: a blank becomes the process that a [`Plan`] and an [`Essence`](dunlin_proto::image::Essence) describe.
//!
//! Owns the destination's side of a move as far as the process itself is concerned. Refuses to know nodes, connections
//! and decisions. A *blank* is a process of the nest that already has the right PID, parent, group and session and runs
//! the surrogate program. Invariants: everything that can be done before the freeze is done in [`Blank::prepare`];
//! what the essence changes is corrected, and what cannot be corrected is an error, never passed over; nothing of the
//! program runs before [`Blank::resume`]; dropping a blank before ends nothing: the caller decides what becomes of
//! its task, which may be an entry that had been a surrogate.

mod anew;
mod blank;
pub(crate) mod descriptors;
mod locks;
mod mappings;
mod signals;
mod sleeper;
mod stops;
mod threads;
mod traits;

pub(crate) use blank::install;
pub use blank::{Blank, Resumed};
pub use mappings::Remade;

use crate::capture::space;
use crate::descriptors::{epoll, file, unix};
use crate::files::{Use, open_same};
use crate::hugepages;
use crate::install::{InstallError, Installer};
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::{Pid, RunId};
use dunlin_proto::image::{DescriptionKind, FileRef, MappingKind, Plan};
use dunlin_sys::foothold::FootholdError;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Options, TraceError};
use dunlin_sys::script::ScriptError;
use rustix::fs::OFlags;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// Why a process could not be restored. Nothing of it has run here.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Something that the process needs is not here.
    #[error("{}", crate::obstacle::summary(.0))]
    Obstacles(Vec<Obstacle>),
    /// The blank has died.
    #[error("the blank for process {0} has died")]
    Died(Pid),
    /// What the peer sent makes no sense.
    #[error("the image of process {pid} is not sound: {why}")]
    Unsound {
        /// The process.
        pid: Pid,
        /// What is wrong.
        why: &'static str,
    },
    /// The kernel did not do what it should.
    #[error("{what} of process {pid}: {source}")]
    Kernel {
        /// The process.
        pid: Pid,
        /// What was attempted.
        what: &'static str,
        /// What came of it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Gives errors the process and the attempt they belong to.
pub(crate) trait During<T> {
    /// Names the process and the attempt.
    fn during(self, pid: Pid, what: &'static str) -> Result<T, RestoreError>;
}

impl<T, E: Into<AnyError>> During<T> for Result<T, E> {
    fn during(self, pid: Pid, what: &'static str) -> Result<T, RestoreError> {
        self.map_err(|error| match error.into() {
            AnyError::Gone => RestoreError::Died(pid),
            AnyError::Other(source) => RestoreError::Kernel { pid, what, source },
        })
    }
}

/// Any error of the layers below.
pub(crate) enum AnyError {
    Gone,
    Other(Box<dyn std::error::Error + Send + Sync>),
}

impl From<TraceError> for AnyError {
    fn from(error: TraceError) -> Self {
        match error {
            TraceError::Gone { .. } => AnyError::Gone,
            other => AnyError::Other(other.into()),
        }
    }
}

impl From<ScriptError> for AnyError {
    fn from(error: ScriptError) -> Self {
        match error {
            ScriptError::Trace(error) => error.into(),
            other => AnyError::Other(other.into()),
        }
    }
}

impl From<FootholdError> for AnyError {
    fn from(error: FootholdError) -> Self {
        match error {
            FootholdError::Trace(error) => error.into(),
            other => AnyError::Other(other.into()),
        }
    }
}

impl From<InstallError> for AnyError {
    fn from(error: InstallError) -> Self {
        match error {
            InstallError::Trace(error) => error.into(),
            InstallError::Refused(error) => error.into(),
        }
    }
}

impl From<io::Error> for AnyError {
    fn from(error: io::Error) -> Self {
        AnyError::Other(error.into())
    }
}

impl From<rustix::io::Errno> for AnyError {
    fn from(error: rustix::io::Errno) -> Self {
        AnyError::Other(io::Error::from(error).into())
    }
}

impl From<dunlin_sys::Errno> for AnyError {
    fn from(error: dunlin_sys::Errno) -> Self {
        AnyError::Other(error.into())
    }
}

impl From<dunlin_sys::uffd::UffdError> for AnyError {
    fn from(error: dunlin_sys::uffd::UffdError) -> Self {
        AnyError::Other(error.into())
    }
}

impl From<dunlin_sys::procfs::ParseError> for AnyError {
    fn from(error: dunlin_sys::procfs::ParseError) -> Self {
        AnyError::Other(error.into())
    }
}

/// What would keep a plan from being restored here, as far as files and the kernel tell.
pub fn examine(plan: &Plan, root: &OwnedFd, shared: &[PathBuf]) -> Vec<Obstacle> {
    let pid = plan.image.lineage.pid;
    let space = &plan.image.space;
    let mut obstacles = Vec::new();
    if let Some((size, wanted, free)) = hugepages::missing(&space.mappings) {
        obstacles.push(crate::obstacle::obstacle(
            pid,
            "memory",
            format_args!("huge pages of {} KiB", size >> 10),
            format!("the program has {wanted} of them, and the destination has {free} free"),
            "raise vm.nr_hugepages on the destination (sysctl)",
        ));
    }
    let mut look = |file: &FileRef, flags: OFlags, how: Use| {
        if let Err(error) = open_same(root.as_fd(), file, flags, how, shared) {
            let obstacle = file::missing(pid, file, &error);
            if !obstacles.contains(&obstacle) {
                obstacles.push(obstacle);
            }
        }
    };
    look(&space.exe, OFlags::RDONLY, Use::Content);
    for mapping in &space.mappings {
        match mapping.kind {
            MappingKind::PrivateFile { file, .. }
            | MappingKind::SharedFile {
                file, writable: false, ..
            } => {
                if let Some(file) = space.files.get(file as usize) {
                    look(file, OFlags::RDONLY, Use::Content);
                }
            }
            MappingKind::SharedFile {
                file, writable: true, ..
            } => {
                if let Some(file) = space.files.get(file as usize) {
                    look(file, OFlags::RDWR, Use::Identity);
                }
            }
            MappingKind::Anonymous
            | MappingKind::SharedMemory { .. }
            | MappingKind::HugePages { .. }
            | MappingKind::Kernel(_) => {}
        }
    }
    for description in &plan.image.files.descriptions {
        if let DescriptionKind::File(file) = &description.kind {
            let writes = description.flags & 3 != 0;
            let flags = OFlags::from_bits_retain(description.flags & 3);
            look(file, flags, if writes { Use::Identity } else { Use::Content });
        }
    }
    let own = ProcDir::own();
    let here = space::listing(&own).and_then(|all| space::vdso_hash(&own, &all));
    if here.is_ok_and(|hash| hash != space.vdso_hash) {
        obstacles.push(crate::obstacle::obstacle(
            pid,
            "kernel",
            "the vDSO",
            "the destination's kernel has another one, and the program's code points into it",
            "run the same kernel build on both nodes",
        ));
    }
    obstacles
}

/// What a restore needs of the node around it.
pub struct Kit<'a> {
    /// Puts descriptors into the blank.
    pub installer: &'a Installer,
    /// The nest's root directory.
    pub root: OwnedFd,
    /// The program that surrogates run: a blank is one of them until it has a loop to wait in.
    pub surrogate: BorrowedFd<'a>,
    /// The directories that the nodes share.
    pub shared: &'a [PathBuf],
    /// Exempts calls from the nest's filter.
    pub cookie: u64,
    /// How many seccomp filters every process of the nest has.
    pub nest_filters: usize,
    /// Locks PID steering on the given number until the returned guard says that it was taken.
    pub steer: &'a dyn Fn(Pid) -> io::Result<Box<dyn FnOnce() -> io::Result<()> + 'a>>,
    /// The local end of a run's standard stream.
    pub open_stream: &'a dyn Fn(RunId, u8) -> io::Result<OwnedFd>,
    /// The number on this machine of what has a PID in the nest.
    pub host_of: &'a dyn Fn(Pid) -> Option<i32>,
    /// How the blank is traced.
    pub options: Options,
    /// What the processes of one move share.
    pub common: Common,
}

/// What the processes of one move share: made once, installed in each.
#[derive(Default)]
pub struct Common {
    /// Open file descriptions by key.
    pub descriptions: BTreeMap<u64, OwnedFd>,
    /// Pipes by number: reading end, writing end.
    pub pipes: BTreeMap<u64, (OwnedFd, OwnedFd)>,
    /// Pipes that have their bytes: each process that has a reading end brings them along.
    pub filled: BTreeSet<u64>,
    /// Which making of it a description is, by key: another one must be installed again.
    pub(crate) made: BTreeMap<u64, u64>,
    pub(crate) makings: u64,
    /// Descriptions that are as they are inside the freeze.
    pub(crate) corrected: BTreeSet<u64>,
    /// What epoll sets watch already, by key.
    pub(crate) given: BTreeMap<u64, epoll::Given>,
    /// Memories with a descriptor, by number, and those that have been made anew inside the freeze.
    pub(crate) memories: BTreeMap<u64, OwnedFd>,
    pub(crate) remade: BTreeSet<u64>,
    /// Shared memory, by number.
    pub(crate) shared: BTreeMap<u64, File>,
    /// Sockets of the plan have been made anew inside the freeze.
    pub(crate) sockets_remade: bool,
    /// Unix sockets that are being made.
    pub(crate) unix: unix::Making,
}
