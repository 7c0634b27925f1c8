//! The pager at the destination: programs run here while their pages are elsewhere.
//!
//! Owns the userfaultfds of such programs, their page maps, and the connections to the images that hold the pages.
//! Refuses to know moves, tables and processes (a PID is a label here). One thread serves a *family*: an address space
//! and those forked from it while pages were away; it reads the events and installs the pages, so that no stale page
//! can come after the event that dropped it. Invariants: a page that is elsewhere is never read as zeros, however long
//! its holder is out of reach; a space is let go only when every page is here, or it has ended, or it was withdrawn; an
//! image is released only when nobody here needs it.

mod claims;
mod family;
mod journal;
mod lane;
mod link;
mod pace;
mod reader;
mod space;
mod stats;
mod store;
mod supply;

pub use claims::Claims;
use claims::{Command, FamilyHandle, Probe};
use dunlin_cluster::page_map::PageMap;
use dunlin_proto::control::Quantiles;
use dunlin_proto::ids::ImageId;
use dunlin_sys::uffd::Uffd;
pub use journal::{Journal, JournalError, Told};
use rustix::fd::BorrowedFd;
use stats::Shared;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The two connections to an image's holder, before their hello.
pub struct Connections {
    /// For what programs wait for.
    pub faults: TcpStream,
    /// For everything else.
    pub bulk: TcpStream,
}

/// Connects to the holder of an image; called on a thread of its own, again and again while it fails.
pub type Connect = dyn Fn(ImageId) -> io::Result<Connections> + Send + Sync;

/// Names an address space as long as the pager lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u64);

/// How the pager's work on a space ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// Every page is here and nothing is watched any more.
    Drained,
    /// The program ended or executed another one.
    Gone,
    /// It was [withdrawn](SpaceHandle::withdraw).
    Withdrawn,
}

/// Is told what happens to spaces, on the pager's own thread: it must not block, nor touch the program's memory.
pub trait Observer: Send + Sync {
    /// A program forked while pages were away. The child waits for its pages as its parent does; whoever keeps second
    /// copies of fatal descriptors duplicates `uffd` now, and `journal` with it.
    fn forked(&self, parent: SpaceId, child: &SpaceHandle, uffd: BorrowedFd<'_>, journal: BorrowedFd<'_>) {
        let _ = (parent, child, uffd, journal);
    }

    /// The work on a space is over, and its userfaultfd is about to be closed. Whoever holds a copy of it must have
    /// closed that when this returns: as long as one is open, mappings that grew unseen still raise faults, which
    /// nobody serves any more.
    fn finished(&self, space: SpaceId, how: Finish) {
        let _ = (space, how);
    }

    /// A space that had been [withdrawn](SpaceHandle::withdraw) is served by another pager, or its program runs elsewhere:
    /// copies of its descriptor are of no further use.
    fn let_go(&self, space: SpaceId) {
        let _ = space;
    }

    /// A space that had been withdrawn comes back to the pager under another name and with another journal.
    fn renamed(&self, old: SpaceId, new: SpaceId, uffd: BorrowedFd<'_>, journal: BorrowedFd<'_>) {
        let _ = (old, new, uffd, journal);
    }
}

impl Observer for () {}

/// An address space whose pages are elsewhere.
pub struct NewSpace {
    /// A name from [`Pager::next_id`], if it has one already.
    pub id: Option<SpaceId>,
    /// The program's PID on this machine, if known.
    pub pid: Option<i32>,
    /// Its userfaultfd, with [`Features::CHANGES`](dunlin_sys::uffd::Features::CHANGES) negotiated and the map's
    /// regions registered for missing pages. Whatever has been installed already is settled in the map.
    pub uffd: Uffd,
    /// Where its pages are.
    pub map: PageMap,
    /// How to reach their holders.
    pub connect: Arc<Connect>,
    /// Who is told.
    pub observer: Arc<dyn Observer>,
    /// From a [`Withdrawn`] space: kept until the images have been claimed anew.
    pub claims: Option<Claims>,
    /// Begun with this map, if somebody keeps it beyond this daemon's life; without, it dies with the daemon.
    pub journal: Option<Journal>,
    /// The program does not run yet, and its source still does: the memory (`/proc/PID/mem`, to be written). Such a
    /// space is not finished when it is drained but stays until it is withdrawn, its pages can be [called
    /// back](SpaceHandle::recall), and one that comes again overwrites what is there.
    pub ahead: Option<File>,
}

/// A space that a former daemon served, with what its journal told.
pub struct Survivor {
    /// A name from [`Pager::next_id`].
    pub id: SpaceId,
    /// The program's PID on this machine, if known.
    pub pid: Option<i32>,
    /// A copy of its userfaultfd.
    pub uffd: Uffd,
    /// Where its pages are, as its journal told.
    pub map: PageMap,
    /// Its journal.
    pub journal: Journal,
}

/// A space that the pager has given back.
pub struct Withdrawn {
    /// Its name: for [`Observer::let_go`], when it is somebody else's.
    pub id: SpaceId,
    /// Who was told of it.
    pub observer: Arc<dyn Observer>,
    /// Its PID as it was given.
    pub pid: Option<i32>,
    /// Its userfaultfd. Pages that are still elsewhere turn into zeros if the last copy is closed while the program can
    /// run: drop it only after the program is gone.
    pub uffd: Uffd,
    /// What is here and what is still elsewhere, exactly.
    pub map: PageMap,
    /// Keeps the images from being released until whoever needs them next has claimed them. Drop it then.
    pub claims: Claims,
}

/// What the pager has done for one space.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Pages elsewhere at the beginning (before it was known which of them have content).
    pub pages_total: u64,
    /// Pages still elsewhere.
    pub pages_left: u64,
    /// Pages that arrived while a thread waited for them.
    pub pages_faulted: u64,
    /// Pages that arrived unasked.
    pub pages_pushed: u64,
    /// Pages of zeros that were made on demand; they travelled nowhere.
    pub pages_zeroed: u64,
    /// Bytes of pages that arrived, over the time since the beginning.
    pub bytes_per_second: f64,
    /// How long threads waited for a page, from the pager's reading of the fault to the wake.
    pub fault_us: Quantiles,
    /// Since the beginning (until the end).
    pub elapsed: Duration,
    /// Every image it needs has been claimed by this pager.
    pub attached: bool,
    /// How it ended.
    pub finished: Option<Finish>,
    /// Why an image cannot be reached at the moment.
    pub trouble: Option<String>,
}

/// All spaces of this node that have pages elsewhere. Clones share them.
#[derive(Clone, Default)]
pub struct Pager {
    shared: Arc<Registry>,
}

/// Every living space, for who asks by PID or for all.
#[derive(Default)]
struct Registry {
    next_id: AtomicU64,
    spaces: Mutex<BTreeMap<SpaceId, SpaceHandle>>,
}

impl Registry {
    fn next_id(&self) -> SpaceId {
        SpaceId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    fn spaces(&self) -> std::sync::MutexGuard<'_, BTreeMap<SpaceId, SpaceHandle>> {
        // A map of handles is whole whatever panicked.
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pager {
    /// A pager without spaces.
    pub fn new() -> Pager {
        Pager::default()
    }

    /// Serves a space from now on, on a new thread. If there is no thread to be had, the space comes back.
    pub fn adopt(&self, new: NewSpace) -> Result<SpaceHandle, (io::Error, Box<NewSpace>)> {
        family::start(&self.shared, new)
    }

    /// A name for a space that is about to be adopted or taken up.
    pub fn next_id(&self) -> SpaceId {
        self.shared.next_id()
    }

    /// Serves the spaces of a family again, whose daemon was killed. Who waits for a page asks for it anew. If there is no
    /// thread to be had, the descriptors are kept open for ever: their programs wait.
    pub fn take_up(
        &self,
        survivors: Vec<Survivor>,
        connect: Arc<Connect>,
        observer: Arc<dyn Observer>,
    ) -> io::Result<Vec<SpaceHandle>> {
        family::go_on(&self.shared, survivors, connect, observer)
    }

    /// The space of a process, by its PID on this machine. A child that was forked while pages were away is told from
    /// its siblings by watching whose page appears when one is installed: this needs pages to arrive, so it is given up
    /// after `patience`.
    pub fn space_of(&self, pid: i32, patience: Duration) -> Option<SpaceHandle> {
        let spaces = self.spaces();
        if let Some(known) = spaces.iter().find(|space| space.pid() == Some(pid)) {
            return Some(known.clone());
        }
        let (send, receive) = channel();
        let mut asked = BTreeSet::new();
        for space in spaces.iter().filter(|space| space.pid().is_none()) {
            if asked.insert(space.family.id()) {
                let pagemap = dunlin_sys::vmcopy::open_pagemap(pid).ok()?;
                let answer = send.clone();
                space.family.send(Command::Identify(Probe {
                    pid,
                    pagemap,
                    answer,
                    suspect: None,
                }));
            }
        }
        // If no family has unknown spaces, or all end, nobody holds the other end: there is nothing to wait for.
        drop(send);
        receive.recv_timeout(patience).ok()
    }

    /// Every space that has pages elsewhere.
    pub fn spaces(&self) -> Vec<SpaceHandle> {
        self.shared.spaces().values().cloned().collect()
    }
}

/// One space that the pager serves, or served.
#[derive(Clone)]
pub struct SpaceHandle {
    shared: Arc<Shared>,
    family: FamilyHandle,
}

impl SpaceHandle {
    /// Its name.
    pub fn id(&self) -> SpaceId {
        self.shared.id
    }

    /// The program's PID on this machine, if known.
    pub fn pid(&self) -> Option<i32> {
        self.shared.status().pid
    }

    /// Tells the pager whose space this is (a forked child's comes without).
    pub fn set_pid(&self, pid: i32) {
        self.shared.update(|status| status.pid = Some(pid));
    }

    /// What has been done.
    pub fn progress(&self) -> Progress {
        self.shared.progress()
    }

    /// How many pages are elsewhere, by image.
    pub fn pages_elsewhere(&self) -> BTreeMap<ImageId, u64> {
        self.shared.status().away.clone()
    }

    /// Waits until the work is over; `None` if it takes longer than `timeout`.
    pub fn wait_finished(&self, timeout: Duration) -> Option<Finish> {
        self.shared
            .wait(timeout, |status| status.finished.as_ref().map(|(how, _)| *how))
    }

    /// Waits until this pager has claimed every image the space needs (or needs none any more): whoever claimed them
    /// before may release them. False if it takes longer than `timeout`.
    pub fn wait_attached(&self, timeout: Duration) -> bool {
        self.shared
            .wait(timeout, |status| {
                (status.attached || status.finished.is_some()).then_some(())
            })
            .is_some()
    }

    /// Of a space [ahead](NewSpace::ahead) of its program: these pages of an image (first address, number of pages) were
    /// written at their source since they were fetched, and have to come again. False, and nothing has changed, while
    /// others are still to come: an answer that is on its way must not be taken for the new content.
    pub fn recall(&self, image: ImageId, ranges: Vec<(u64, u64)>) -> bool {
        let (send, receive) = channel();
        self.family.send(Command::Recall {
            space: self.id(),
            image,
            ranges,
            answer: send,
        });
        receive.recv().unwrap_or(false)
    }

    /// Gives the space back, exactly as it is: nothing is installed after this returns. All its threads must be
    /// stopped, and none of them inside a system call that waits for the pager. `Err` says how the work had ended.
    pub fn withdraw(&self) -> Result<Withdrawn, Finish> {
        let (send, receive) = channel();
        self.family.send(Command::Withdraw {
            space: self.id(),
            answer: send,
        });
        let ended = || self.wait_finished(Duration::ZERO).unwrap_or(Finish::Gone);
        receive.recv().map_err(|_| ended())?.ok_or_else(ended)
    }
}
