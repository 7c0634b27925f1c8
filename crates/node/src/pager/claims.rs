//! How other threads reach a family's thread, and what keeps its images from being released.

use super::{SpaceHandle, SpaceId, Withdrawn};
use dunlin_proto::ids::ImageId;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// Wakes a family's thread.
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub(super) fn new() -> io::Result<Bell> {
        Ok(Bell(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(super) fn ring(&self) {
        // It fails only when it has been rung 2^64 times: it rings then.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(super) fn hush(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Keeps images from being released while nobody drains them: see [`Withdrawn`].
pub struct Claims {
    held: BTreeMap<ImageId, Option<Arc<()>>>,
    bell: Arc<Bell>,
}

impl Claims {
    pub(super) fn new(held: BTreeMap<ImageId, Option<Arc<()>>>, bell: Arc<Bell>) -> Claims {
        Claims { held, bell }
    }

    /// Which images.
    pub fn images(&self) -> impl Iterator<Item = ImageId> + '_ {
        self.held.keys().copied()
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        self.held.clear();
        self.bell.ring();
    }
}

/// What other threads ask of a family.
pub(super) enum Command {
    /// Give this space back; `None` if it is not there any more.
    Withdraw {
        space: SpaceId,
        answer: Sender<Option<Withdrawn>>,
    },
    /// These pages have to come again; answers whether that could be arranged.
    Recall {
        space: SpaceId,
        image: ImageId,
        ranges: Vec<(u64, u64)>,
        answer: Sender<bool>,
    },
    /// Which space is this process's? Answered when a page that arrives has shown it, or never.
    Identify(Probe),
}

/// A process whose space is sought.
pub(super) struct Probe {
    pub(super) pid: i32,
    /// Its `/proc/PID/pagemap`.
    pub(super) pagemap: File,
    pub(super) answer: Sender<SpaceHandle>,
    /// A page appeared in it when one was installed in this space.
    pub(super) suspect: Option<SpaceId>,
}

/// Reaches one family.
#[derive(Clone)]
pub(super) struct FamilyHandle {
    pub(super) commands: Sender<Command>,
    pub(super) bell: Arc<Bell>,
}

impl FamilyHandle {
    /// Different for every family.
    pub(super) fn id(&self) -> usize {
        Arc::as_ptr(&self.bell).addr()
    }

    /// If the thread has ended, the command is dropped, and with it whatever answers it.
    pub(super) fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        self.bell.ring();
    }
}
