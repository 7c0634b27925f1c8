//! The thread that serves one family of address spaces.
//!
//! Each turn: events of the spaces, then what arrived for faults, then one piece of the bulk, then new requests. What arrives is installed in every space that lacks it, so nothing is asked twice for the sake of a
//! forked child; what a changing space refuses is kept in hand and decided again, after the events, for all spaces (a
//! child may just have been born).

use super::claims::{Bell, Claims, Command, FamilyHandle, Probe};
use super::journal::settle_present;
use super::lane::Pool;
use super::link::Link;
use super::pace::Pace;
use super::space::{Outcome, Space};
use super::stats::Shared;
use super::store::Store;
use super::supply::STAND_BACK;
use super::{Connect, Finish, Journal, NewSpace, Observer, Registry, SpaceHandle, SpaceId, Survivor, Withdrawn};
use dunlin_cluster::page_map::{PageMap, Want};
use dunlin_proto::ids::ImageId;
use dunlin_proto::pages::ClientId;
use dunlin_sys::uffd::{MESSAGES_PER_READ, Uffd, UffdError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsFd;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// How long the thread runs in one go while others want its CPU.
const SLICE: Duration = Duration::from_micros(100);
/// How long a shortage is given to pass, and what is said of it.
pub(super) const PAUSE: Duration = Duration::from_millis(1);
pub(super) const SHORTAGE: &str = "this node is short of memory or descriptors: its programs wait";
/// So often it is checked that spaces which wait for unreachable holders still exist.
const LIFE_CHECK: Duration = Duration::from_secs(1);

/// One image, as the family uses it.
pub(super) struct Holder {
    pub(super) store: Box<dyn Store>,
    /// Held by the family and by every [`Claims`] on the image.
    pub(super) claim: Arc<()>,
    /// It has been up once: the claim is known to the holder.
    pub(super) claimed: bool,
    /// What came in bulk lies unread for the sake of faults.
    pub(super) bulk_waits_since: Option<Instant>,
    /// The journals know that nobody needs it any more.
    done: bool,
}

impl Holder {
    /// For how long the bulk is still to be left lying.
    pub(super) fn stands_back(&self, now: Instant) -> Option<Duration> {
        let since = self.bulk_waits_since.filter(|_| self.store.is_urgent())?;
        STAND_BACK
            .checked_sub(now.duration_since(since))
            .filter(|left| !left.is_zero())
    }
}

/// What arrived and could not be installed everywhere yet.
pub(super) struct InHand {
    pub(super) want: Want,
    pub(super) present: u64,
    pub(super) data: Vec<u8>,
}

pub(super) struct Family {
    pub(super) registry: Arc<Registry>,
    handle: FamilyHandle,
    commands: Receiver<Command>,
    connect: Arc<Connect>,
    observer: Arc<dyn Observer>,
    client: ClientId,
    pub(super) spaces: Vec<Space>,
    pub(super) holders: BTreeMap<ImageId, Holder>,
    pub(super) in_hand: VecDeque<InHand>,
    pub(super) pool: Pool,
    /// Processes whose spaces are sought.
    pub(super) probes: Vec<Probe>,
    pub(super) inherited: Option<Claims>,
    pub(super) pace: Pace,
    last_life_check: Instant,
}

/// What a family begins with.
struct Founders {
    spaces: Vec<Space>,
    client: ClientId,
    connect: Arc<Connect>,
    observer: Arc<dyn Observer>,
    inherited: Option<Claims>,
}

/// Starts the thread for a space.
pub(super) fn start(registry: &Arc<Registry>, mut new: NewSpace) -> Result<SpaceHandle, (io::Error, Box<NewSpace>)> {
    let journal = match new.journal.take() {
        Some(journal) => Ok(journal),
        None => random().and_then(|client| Journal::begin(client, &new.map)),
    };
    let prepared = journal.and_then(|journal| Ok((Arc::new(Bell::new()?), journal)));
    let (bell, journal) = match prepared {
        Ok(prepared) => prepared,
        Err(e) => return Err((e, Box::new(new))),
    };
    let (send, commands) = channel();
    let handle = FamilyHandle {
        commands: send,
        bell: bell.clone(),
    };
    let shared = Arc::new(Shared::new(
        new.id.unwrap_or_else(|| registry.next_id()),
        new.pid,
        new.map.per_image(),
    ));
    let space_handle = SpaceHandle {
        shared: shared.clone(),
        family: handle.clone(),
    };
    // The space goes to the thread through a channel, so that it is still ours if there is no thread.
    let (give, take) = channel::<(Box<NewSpace>, Journal)>();
    let (registry_there, shared_there) = (registry.clone(), shared.clone());
    let work = move || {
        if let Ok((new, journal)) = take.recv() {
            let client = journal.client();
            let mut space = Space::new(new.uffd, new.map, shared_there, journal);
            space.ahead = new.ahead;
            let founders = Founders {
                client,
                spaces: vec![space],
                connect: new.connect,
                observer: new.observer,
                inherited: new.claims,
            };
            Family::new(registry_there, handle, commands, founders).run();
        }
    };
    if let Err(e) = std::thread::Builder::new().name("dunlin-pager".into()).spawn(work) {
        return Err((e, Box::new(new)));
    }
    registry.spaces().insert(shared.id, space_handle.clone());
    // The thread waits for exactly this.
    give.send((Box::new(new), journal))
        .map_err(|e| (io::ErrorKind::BrokenPipe.into(), e.0.0))?;
    Ok(space_handle)
}

/// Starts the thread for the spaces of a family whose daemon was killed.
pub(super) fn go_on(
    registry: &Arc<Registry>,
    survivors: Vec<Survivor>,
    connect: Arc<Connect>,
    observer: Arc<dyn Observer>,
) -> io::Result<Vec<SpaceHandle>> {
    let Some(client) = survivors.first().map(|survivor| survivor.journal.client()) else {
        return Ok(Vec::new());
    };
    let (send, commands) = channel();
    let bell = Bell::new().inspect_err(|_| {
        survivors
            .iter()
            .for_each(|s| drop(s.uffd.try_clone().map(std::mem::forget)))
    })?;
    let handle = FamilyHandle {
        commands: send,
        bell: Arc::new(bell),
    };
    let mut handles = Vec::new();
    let mut founders = Founders {
        spaces: Vec::new(),
        client,
        connect,
        observer,
        inherited: None,
    };
    for mut survivor in survivors {
        if let Some(pagemap) = survivor.pid.and_then(|pid| dunlin_sys::vmcopy::open_pagemap(pid).ok())
            && let Err(error) = settle_present(&mut survivor.map, &pagemap)
        {
            // Then more is asked for than is missing.
            tracing::debug!(%error, "what is in memory already is not known");
        }
        let shared = Arc::new(Shared::new(survivor.id, survivor.pid, survivor.map.per_image()));
        let space_handle = SpaceHandle {
            shared: shared.clone(),
            family: handle.clone(),
        };
        registry.spaces().insert(survivor.id, space_handle.clone());
        handles.push(space_handle);
        let space = Space::new(survivor.uffd, survivor.map, shared, survivor.journal);
        space.ask_anew();
        founders.spaces.push(space);
    }
    let mut orphans = Orphans(Some(founders));
    let registry = registry.clone();
    let work = move || {
        if let Some(founders) = orphans.0.take() {
            Family::new(registry, handle, commands, founders).run();
        }
    };
    std::thread::Builder::new().name("dunlin-pager".into()).spawn(work)?;
    Ok(handles)
}

/// Spaces on their way to their thread.
struct Orphans(Option<Founders>);

impl Drop for Orphans {
    fn drop(&mut self) {
        // There is no thread. As in `lose`: closing the descriptors would turn what is missing into zeros.
        if let Some(founders) = self.0.take() {
            founders.spaces.into_iter().for_each(std::mem::forget);
        }
    }
}

fn random() -> io::Result<ClientId> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(ClientId(u64::from_le_bytes(bytes)))
}

impl Family {
    fn new(registry: Arc<Registry>, handle: FamilyHandle, commands: Receiver<Command>, founders: Founders) -> Family {
        let mut family = Family {
            registry,
            handle,
            commands,
            connect: founders.connect,
            observer: founders.observer,
            client: founders.client,
            spaces: founders.spaces,
            holders: BTreeMap::new(),
            in_hand: VecDeque::new(),
            pool: Pool::default(),
            probes: Vec::new(),
            inherited: founders.inherited,
            pace: Pace::new(),
            last_life_check: Instant::now(),
        };
        let mut sources: BTreeMap<ImageId, Vec<(u64, u64)>> = BTreeMap::new();
        for space in &mut family.spaces {
            space.map.forget_asked();
            // Those that hold none of its pages any more, too: they want to be released.
            for image in space.map.images() {
                sources.entry(image).or_default().extend(space.map.sources(image));
            }
        }
        for (image, mut ranges) in sources {
            ranges.sort_unstable();
            ranges.dedup();
            let mut link = Link::new(image, family.client, family.connect.clone(), family.handle.bell.clone());
            link.survey(ranges);
            let holder = Holder {
                store: Box::new(link),
                claim: Arc::new(()),
                claimed: false,
                bulk_waits_since: None,
                done: false,
            };
            family.holders.insert(image, holder);
        }
        family
    }

    fn run(mut self) {
        // A hint: where the kernel does not know it, faults wait a little longer.
        let _ = dunlin_sys::inspect::set_own_slice(SLICE);
        loop {
            let ready = self.rest();
            if ready.bell {
                self.handle.bell.hush();
            }
            self.read_events(&ready.spaces);
            self.take_commands();
            self.take_arrivals();
            self.retry();
            self.recheck();
            self.check_life();
            self.settle_accounts();
            self.ask();
            if self.spaces.is_empty() && self.holders.is_empty() {
                return;
            }
        }
    }

    /// Waits until there is something to do; which spaces have messages?
    fn rest(&mut self) -> Ready {
        let now = Instant::now();
        let busy = !self.in_hand.is_empty()
            || self.spaces.iter().any(|s| s.recheck)
            || (self.holders.values()).any(|h| h.store.is_ready(h.stands_back(now).is_none()));
        let mut timeout = (!self.spaces.is_empty()).then_some(LIFE_CHECK);
        for holder in self.holders.values() {
            timeout = timeout.into_iter().chain(holder.store.next_tick()).min();
        }
        for holder in self.holders.values() {
            timeout = timeout.into_iter().chain(holder.stands_back(now)).min();
        }
        if busy {
            timeout = Some(Duration::ZERO);
        }
        let bell = self.handle.bell.clone();
        let mut fds = vec![PollFd::new(&bell, PollFlags::IN)];
        for space in &self.spaces {
            fds.push(PollFd::from_borrowed_fd(space.uffd.as_fd(), PollFlags::IN));
        }
        for holder in self.holders.values() {
            holder
                .store
                .poll_set(&mut |fd, flags| fds.push(PollFd::from_borrowed_fd(fd, flags)));
        }
        let timeout = timeout.map(|t| Timespec {
            tv_sec: t.as_secs() as i64,
            tv_nsec: i64::from(t.subsec_nanos()),
        });
        // Interrupted or out of memory: then everything is looked at.
        let failed = poll(&mut fds, timeout.as_ref()).is_err();
        Ready {
            bell: failed || !fds[0].revents().is_empty(),
            spaces: (self.spaces.iter().zip(&fds[1..]))
                .filter(|(_, fd)| failed || !fd.revents().is_empty())
                .map(|(space, _)| space.shared.id)
                .collect(),
        }
    }

    /// Returns how many messages there were.
    pub(super) fn read_events(&mut self, ready: &[SpaceId]) -> usize {
        let mut messages = 0;
        for id in ready {
            // It may be finished by what one of its own faults brings to light.
            while let Some(index) = self.index_of(*id) {
                let happened = match self.spaces[index].read_events() {
                    Ok(happened) => happened,
                    Err(error) if error.is_shortage() => {
                        self.spaces[index].shared.update(|s| s.trouble = Some(SHORTAGE.into()));
                        std::thread::sleep(PAUSE);
                        break;
                    }
                    Err(error) => {
                        self.lose(index, &error);
                        break;
                    }
                };
                for (uffd, map) in happened.children {
                    self.born(*id, uffd, map);
                }
                for page in happened.faults {
                    if self.fault(index, page) == Outcome::Gone {
                        break;
                    }
                }
                messages += happened.messages;
                if happened.messages < MESSAGES_PER_READ {
                    break;
                }
            }
        }
        messages
    }

    fn born(&mut self, parent: SpaceId, uffd: Uffd, map: PageMap) {
        let journal = loop {
            match Journal::begin(self.client, &map) {
                Ok(journal) => break journal,
                // The child waits meanwhile, as all of the family do.
                Err(error) => {
                    tracing::error!(%error, "no journal for a child's address space yet");
                    std::thread::sleep(PAUSE);
                }
            }
        };
        let shared = Arc::new(Shared::new(self.registry.next_id(), None, map.per_image()));
        if self.holders.values().all(|h| h.claimed) {
            shared.update(|s| s.attached = true);
        }
        let handle = SpaceHandle {
            shared: shared.clone(),
            family: self.handle.clone(),
        };
        self.observer.forked(parent, &handle, uffd.as_fd(), journal.as_fd());
        if let Some(index) = self.index_of(parent) {
            self.spaces[index].bore();
        }
        self.registry.spaces().insert(shared.id, handle);
        self.spaces.push(Space::new(uffd, map, shared, journal));
    }

    fn take_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Withdraw { space, answer } => {
                    let withdrawn = self.index_of(space).and_then(|index| self.withdraw(index));
                    if let Err(lost) = answer.send(withdrawn) {
                        // Nobody took it: the program waits, as in `lose`.
                        std::mem::forget(lost);
                    }
                }
                Command::Recall {
                    space,
                    image,
                    ranges,
                    answer,
                } => {
                    // Whoever asked has given up: so be it.
                    let _ = answer.send(self.recall(space, image, &ranges));
                }
                Command::Identify(probe) => self.probes.push(probe),
            }
        }
    }

    fn recall(&mut self, id: SpaceId, image: ImageId, ranges: &[(u64, u64)]) -> bool {
        let Some(index) = self.index_of(id) else { return false };
        let idle = self.in_hand.is_empty() && self.holders.get(&image).is_some_and(|h| h.store.is_idle());
        let space = &mut self.spaces[index];
        if space.ahead.is_none() || !space.map.is_drained() || !idle {
            return false;
        }
        for (start, pages) in ranges {
            space.map.recall(*start, *pages, image);
        }
        space.shared.status().away = space.map.per_image().clone();
        true
    }

    fn withdraw(&mut self, index: usize) -> Option<Withdrawn> {
        if !self.spaces[index].uffd.is_alive() {
            // The process has executed another program: its memory is no business of ours.
            self.finish(index, Finish::Gone);
            return None;
        }
        let mut space = self.spaces.remove(index);
        space.map.forget_asked();
        let claim_of = |image: &ImageId| (*image, self.holders.get(image).map(|h| h.claim.clone()));
        let held = if space.ahead.is_some() {
            // Pages may be called back from images that hold none at the moment.
            space.map.images().map(|image| claim_of(&image)).collect()
        } else {
            space.map.per_image().keys().map(claim_of).collect()
        };
        self.registry.spaces().remove(&space.shared.id);
        self.observer.finished(space.shared.id, Finish::Withdrawn);
        space.shared.finish(Finish::Withdrawn);
        let pid = space.shared.status().pid;
        let claims = Claims::new(held, self.handle.bell.clone());
        Some(Withdrawn {
            id: space.shared.id,
            observer: self.observer.clone(),
            pid,
            uffd: space.uffd,
            map: space.map,
            claims,
        })
    }

    pub(super) fn index_of(&self, id: SpaceId) -> Option<usize> {
        self.spaces.iter().position(|s| s.shared.id == id)
    }

    /// Programs that ended are noticed by the next page; where no page comes, by asking.
    fn check_life(&mut self) {
        if self.last_life_check.elapsed() < LIFE_CHECK {
            return;
        }
        self.last_life_check = Instant::now();
        for index in (0..self.spaces.len()).rev() {
            if !self.spaces[index].uffd.is_alive() {
                self.finish(index, Finish::Gone);
            }
        }
    }

    /// Publishes how far each space is, finishes those that are drained, and releases what nobody needs.
    fn settle_accounts(&mut self) {
        for index in (0..self.spaces.len()).rev() {
            let space = &mut self.spaces[index];
            if space.map.is_drained() && !space.has_waiting() && space.ahead.is_none() {
                space.unregister();
                // Somebody may hold a copy of the descriptor: then closing ours frees no one who waits for an event
                // to be read.
                let id = space.shared.id;
                if self.read_events(&[id]) == 0 && self.index_of(id) == Some(index) {
                    self.finish(index, Finish::Drained);
                }
            } else if space.shared.status().away != *space.map.per_image() {
                space.shared.status().away = space.map.per_image().clone();
            }
        }
        for (image, holder) in &mut self.holders {
            let needed = |s: &Space| s.ahead.is_some() || s.map.per_image().contains_key(image);
            let needed = self.spaces.iter().any(needed);
            if !needed && Arc::strong_count(&holder.claim) == 1 {
                // First: it may be gone when a later daemon asks for what of it was not needed.
                if !std::mem::replace(&mut holder.done, true) {
                    self.spaces.iter_mut().for_each(|space| space.done_with(*image));
                }
                holder.store.release();
            }
        }
    }

    pub(super) fn finish(&mut self, index: usize, how: Finish) {
        let space = self.spaces.remove(index);
        self.registry.spaces().remove(&space.shared.id);
        self.observer.finished(space.shared.id, how);
        drop(space.uffd);
        space.shared.finish(how);
    }

    /// A userfaultfd does what it should never do. Its descriptor is kept open for ever: threads that wait go on
    /// waiting, which is better than zeros.
    pub(super) fn lose(&mut self, index: usize, error: &UffdError) {
        let space = self.spaces.remove(index);
        tracing::error!(%error, space = space.shared.id.0, "the pager gives up on a program, which stops where it is");
        space.shared.update(|s| s.trouble = Some(error.to_string()));
        std::mem::forget(space);
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // As in `lose`: closing the descriptors would turn what is missing into zeros.
            self.spaces.drain(..).for_each(std::mem::forget);
        }
    }
}

/// What poll said.
struct Ready {
    bell: bool,
    spaces: Vec<SpaceId>,
}
