//! The thread that serves one family of address spaces.
//!
//! Each turn: events of the spaces, then what arrived for faults, then one piece of the bulk, then new requests. It
//! spins while a fault is open and shortly after one, since a wake across CPUs costs more than the page; otherwise it
//! sleeps in poll. What arrives is installed in every space that lacks it, so nothing is asked twice for the sake of a
//! forked child; what a changing space refuses is kept in hand and decided again, after the events, for all spaces (a
//! child may just have been born).

use super::lane::Pool;
use super::link::Link;
use super::space::{Need, Outcome, Space};
use super::stats::Shared;
use super::store::{Arrival, Store, Urgency};
use super::{Connect, Finish, NewSpace, Observer, Registry, SpaceHandle, SpaceId, Withdrawn};
use dunlin_cluster::page_map::{PAGE, PageMap, Want};
use dunlin_proto::ids::ImageId;
use dunlin_proto::pages::ClientId;
use dunlin_sys::uffd::{MESSAGES_PER_READ, Uffd, UffdError};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, OwnedFd};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// After the last fault the next one is awaited awake for so long.
const SPIN_AFTER: Duration = Duration::from_micros(80);
/// An open fault is awaited awake for so long.
const SPIN_DURING: Duration = Duration::from_millis(1);
/// So often it is checked that spaces which wait for unreachable holders still exist.
const LIFE_CHECK: Duration = Duration::from_secs(1);
/// When so many pages have come on the faults connection, events are looked at again.
const PAGES_PER_TURN: u32 = 64;

/// Wakes a family's thread.
pub(super) struct Bell(OwnedFd);

impl Bell {
    fn new() -> io::Result<Bell> {
        Ok(Bell(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(super) fn ring(&self) {
        // It fails only when it has been rung 2^64 times: it rings then.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn hush(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

/// Keeps images from being released while nobody drains them: see [`Withdrawn`].
pub struct Claims {
    held: BTreeMap<ImageId, Option<Arc<()>>>,
    bell: Arc<Bell>,
}

impl Claims {
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

pub(super) enum Command {
    Withdraw {
        space: SpaceId,
        answer: Sender<Option<Withdrawn>>,
    },
}

#[derive(Clone)]
pub(super) struct FamilyHandle {
    commands: Sender<Command>,
    bell: Arc<Bell>,
}

impl FamilyHandle {
    /// If the thread has ended, the command is dropped, and with it whatever answers it.
    pub(super) fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        self.bell.ring();
    }
}

/// One image, as the family uses it.
struct Holder {
    store: Box<dyn Store>,
    /// Held by the family and by every [`Claims`] on the image.
    claim: Arc<()>,
    /// It has been up once: the claim is known to the holder.
    claimed: bool,
}

/// What arrived and could not be installed everywhere yet.
struct InHand {
    want: Want,
    present: u64,
    data: Vec<u8>,
}

struct Family {
    registry: Arc<Registry>,
    handle: FamilyHandle,
    commands: Receiver<Command>,
    connect: Arc<Connect>,
    observer: Arc<dyn Observer>,
    client: ClientId,
    spaces: Vec<Space>,
    holders: BTreeMap<ImageId, Holder>,
    in_hand: VecDeque<InHand>,
    pool: Pool,
    inherited: Option<Claims>,
    last_fault: Option<Instant>,
    last_life_check: Instant,
}

/// Starts the thread for a space.
pub(super) fn start(registry: &Arc<Registry>, new: NewSpace) -> Result<SpaceHandle, (io::Error, Box<NewSpace>)> {
    let prepared = Bell::new().and_then(|bell| Ok((Arc::new(bell), random()?)));
    let (bell, client) = match prepared {
        Ok(prepared) => prepared,
        Err(e) => return Err((e, Box::new(new))),
    };
    let (send, commands) = channel();
    let handle = FamilyHandle {
        commands: send,
        bell: bell.clone(),
    };
    let shared = Arc::new(Shared::new(registry.next_id(), new.pid, new.map.per_image()));
    let space_handle = SpaceHandle {
        shared: shared.clone(),
        family: handle.clone(),
    };
    // The space goes to the thread through a channel, so that it is still ours if there is no thread.
    let (give, take) = channel::<Box<NewSpace>>();
    let (registry_there, shared_there) = (registry.clone(), shared.clone());
    let work = move || {
        if let Ok(new) = take.recv() {
            Family::new(registry_there, handle, commands, client, *new, shared_there).run();
        }
    };
    if let Err(e) = std::thread::Builder::new().name("dunlin-pager".into()).spawn(work) {
        return Err((e, Box::new(new)));
    }
    registry.spaces().insert(shared.id, space_handle.clone());
    // The thread waits for exactly this.
    give.send(Box::new(new))
        .map_err(|e| (io::ErrorKind::BrokenPipe.into(), e.0))?;
    Ok(space_handle)
}

fn random() -> io::Result<ClientId> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(ClientId(u64::from_le_bytes(bytes)))
}

impl Family {
    fn new(
        registry: Arc<Registry>,
        handle: FamilyHandle,
        commands: Receiver<Command>,
        client: ClientId,
        new: NewSpace,
        shared: Arc<Shared>,
    ) -> Family {
        let mut family = Family {
            registry,
            handle,
            commands,
            connect: new.connect,
            observer: new.observer,
            client,
            spaces: Vec::new(),
            holders: BTreeMap::new(),
            in_hand: VecDeque::new(),
            pool: Pool::default(),
            inherited: new.claims,
            last_fault: None,
            last_life_check: Instant::now(),
        };
        let mut map = new.map;
        map.forget_asked();
        for image in map.per_image().keys() {
            let mut link = Link::new(
                *image,
                family.client,
                family.connect.clone(),
                family.handle.bell.clone(),
            );
            link.survey(map.sources(*image).collect());
            let holder = Holder {
                store: Box::new(link),
                claim: Arc::new(()),
                claimed: false,
            };
            family.holders.insert(*image, holder);
        }
        family.spaces.push(Space::new(new.uffd, map, shared));
        family
    }

    fn run(mut self) {
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
        let waits = self.spaces.iter().any(Space::has_waiting);
        let spin = match self.last_fault.map(|at| now.duration_since(at)) {
            Some(age) => age < SPIN_AFTER || (waits && age < SPIN_DURING),
            None => false,
        };
        let busy = !self.in_hand.is_empty()
            || self.spaces.iter().any(|s| s.recheck)
            || self.holders.values().any(|h| h.store.is_ready());
        let mut timeout = (!self.spaces.is_empty()).then_some(LIFE_CHECK);
        for holder in self.holders.values() {
            timeout = timeout.into_iter().chain(holder.store.next_tick()).min();
        }
        if spin || busy {
            timeout = Some(Duration::ZERO);
            // The program may need this very CPU to go on.
            std::thread::yield_now();
        }
        let bell = self.handle.bell.clone();
        let mut fds = vec![PollFd::new(&bell.0, PollFlags::IN)];
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
    fn read_events(&mut self, ready: &[SpaceId]) -> usize {
        let mut messages = 0;
        for id in ready {
            // It may be finished by what one of its own faults brings to light.
            while let Some(index) = self.index_of(*id) {
                let happened = match self.spaces[index].read_events() {
                    Ok(happened) => happened,
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
        let shared = Arc::new(Shared::new(self.registry.next_id(), None, map.per_image()));
        if self.holders.values().all(|h| h.claimed) {
            shared.update(|s| s.attached = true);
        }
        let handle = SpaceHandle {
            shared: shared.clone(),
            family: self.handle.clone(),
        };
        self.observer.forked(parent, &handle, uffd.as_fd());
        self.registry.spaces().insert(shared.id, handle);
        self.spaces.push(Space::new(uffd, map, shared));
    }

    /// A thread of a space waits for a page: answers it, or asks for it and for what is likely to be next.
    fn fault(&mut self, index: usize, page: u64) -> Outcome {
        let (image, source, asked) = match self.spaces[index].resolve(page) {
            Ok(Need::Nothing) => return Outcome::Done,
            Ok(Need::Page { image, source, asked }) => (image, source, asked),
            Ok(Need::Gone) => {
                self.finish(index, Finish::Gone);
                return Outcome::Gone;
            }
            Err(error) => {
                self.lose(index, &error);
                return Outcome::Gone;
            }
        };
        self.last_fault = Some(Instant::now());
        self.spaces[index].map.faulted(page);
        let Some(holder) = self.holders.get(&image).filter(|h| h.store.is_up()) else {
            return Outcome::Done;
        };
        if !asked || !holder.store.comes_soon(source) {
            self.ask_for(
                Want {
                    image,
                    source,
                    pages: 1,
                },
                Urgency::Now,
            );
        }
        let ahead = self.spaces[index].read_ahead(page);
        let (mut at, end) = (page + PAGE, page + (ahead + 1) * PAGE);
        while at < end {
            match self.spaces[index].map.ahead(at, (end - at) / PAGE) {
                Some(want) if want.image == image => self.ask_for(want, Urgency::Now),
                Some(_) | None => at += 64 * PAGE,
            }
        }
        Outcome::Done
    }

    fn ask_for(&mut self, want: Want, urgency: Urgency) {
        if let Some(holder) = self.holders.get_mut(&want.image) {
            holder.store.wanted(want, urgency);
        }
        for space in &mut self.spaces {
            space.map.set_asked(want, true);
        }
    }

    fn take_arrivals(&mut self) {
        let now = Instant::now();
        for image in self.holders.keys().copied().collect::<Vec<_>>() {
            if let Some(holder) = self.holders.get_mut(&image) {
                holder.store.tick(now);
            }
            let mut pages = 0;
            while pages < PAGES_PER_TURN {
                let Some(arrival) = self.take(image, Urgency::Now) else {
                    break;
                };
                if let Arrival::Pages { present, .. } = &arrival {
                    pages += present.count_ones();
                }
                self.arrived(image, arrival);
            }
            // While something cannot be installed, more of the same would only pile up.
            if self.in_hand.is_empty() {
                if let Some(arrival) = self.take(image, Urgency::Later) {
                    self.arrived(image, arrival);
                }
            }
        }
    }

    fn take(&mut self, image: ImageId, urgency: Urgency) -> Option<Arrival> {
        self.holders.get_mut(&image)?.store.take(urgency, &mut self.pool)
    }

    fn arrived(&mut self, image: ImageId, arrival: Arrival) {
        match arrival {
            Arrival::Pages { want, present, data } => self.install(InHand { want, present, data }),
            Arrival::Known { from, to, present } => {
                for space in &mut self.spaces {
                    space.map.keep_only(image, from, to, &present);
                    space.recheck |= space.has_waiting();
                }
            }
            Arrival::Up => {
                if let Some(holder) = self.holders.get_mut(&image) {
                    holder.claimed = true;
                }
                let attached = self.holders.values().all(|h| h.claimed);
                if attached {
                    self.inherited = None;
                }
                for space in &self.spaces {
                    space
                        .shared
                        .update(|s| (s.attached, s.trouble) = (s.attached || attached, None));
                }
                self.ask_for_waiting();
            }
            Arrival::Down { asked, why } => {
                for space in &mut self.spaces {
                    asked.iter().for_each(|want| space.map.set_asked(*want, false));
                    space.shared.update(|s| s.trouble = Some(format!("{image:?}: {why}")));
                }
            }
            Arrival::Released => drop(self.holders.remove(&image)),
        }
    }

    /// Threads that wait since before a connection was there.
    fn ask_for_waiting(&mut self) {
        let waiting: Vec<(SpaceId, u64)> = self
            .spaces
            .iter()
            .flat_map(|s| s.waiting().map(|page| (s.shared.id, page)))
            .collect();
        for (id, page) in waiting {
            if let Some(index) = self.index_of(id) {
                self.fault(index, page);
            }
        }
    }

    fn install(&mut self, piece: InHand) {
        let mut again = false;
        for index in (0..self.spaces.len()).rev() {
            match self.spaces[index].install(piece.want, piece.present, &piece.data) {
                Ok(Outcome::Done) => {}
                Ok(Outcome::Changing) => again = true,
                Ok(Outcome::Gone) => self.finish(index, Finish::Gone),
                Err(error) => self.lose(index, &error),
            }
        }
        if again {
            self.in_hand.push_back(piece);
        } else {
            self.pool.give(piece.data);
        }
    }

    fn retry(&mut self) {
        for _ in 0..self.in_hand.len() {
            // Changing spaces say why only in their events.
            self.read_events(&self.spaces.iter().map(|s| s.shared.id).collect::<Vec<_>>());
            if let Some(piece) = self.in_hand.pop_front() {
                self.install(piece);
            }
        }
    }

    /// Threads may wait for pages that turned out to be elsewhere no more.
    fn recheck(&mut self) {
        for index in (0..self.spaces.len()).rev() {
            if !std::mem::take(&mut self.spaces[index].recheck) {
                continue;
            }
            let id = self.spaces[index].shared.id;
            let waiting: Vec<u64> = self.spaces[index].waiting().collect();
            for page in waiting {
                // Finding one gone shifts the others.
                if self.spaces.get(index).is_none_or(|s| s.shared.id != id) {
                    break;
                }
                let need = self.spaces[index].resolve(page);
                match need {
                    Ok(Need::Nothing | Need::Page { .. }) => {}
                    Ok(Need::Gone) => self.finish(index, Finish::Gone),
                    Err(error) => self.lose(index, &error),
                }
            }
        }
    }

    fn take_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Withdraw { space, answer } => {
                    // Whoever asked and did not wait for the answer has lost the space: it cannot be served without.
                    let _ = answer.send(self.index_of(space).map(|index| self.withdraw(index)));
                }
            }
        }
    }

    fn withdraw(&mut self, index: usize) -> Withdrawn {
        let mut space = self.spaces.remove(index);
        space.map.forget_asked();
        let claim_of = |image: &ImageId| (*image, self.holders.get(image).map(|h| h.claim.clone()));
        let held = space.map.per_image().keys().map(claim_of).collect();
        self.registry.spaces().remove(&space.shared.id);
        self.observer.finished(space.shared.id, Finish::Withdrawn);
        space.shared.finish(Finish::Withdrawn);
        let pid = space.shared.status().pid;
        Withdrawn {
            pid,
            uffd: space.uffd,
            map: space.map,
            claims: Claims {
                held,
                bell: self.handle.bell.clone(),
            },
        }
    }

    fn index_of(&self, id: SpaceId) -> Option<usize> {
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
            if space.map.is_drained() && !space.has_waiting() {
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
            let needed = self.spaces.iter().any(|s| s.map.per_image().contains_key(image));
            if !needed && Arc::strong_count(&holder.claim) == 1 {
                holder.store.release();
            }
        }
    }

    fn ask(&mut self) {
        for index in 0..self.spaces.len() {
            loop {
                let holders = &self.holders;
                let ready = |image| holders.get(&image).is_some_and(|h| h.store.has_room());
                let Some(want) = self.spaces[index].map.next(ready) else {
                    break;
                };
                self.ask_for(want, Urgency::Later);
            }
        }
        for holder in self.holders.values_mut() {
            holder.store.flush();
        }
    }

    fn finish(&mut self, index: usize, how: Finish) {
        let space = self.spaces.remove(index);
        self.registry.spaces().remove(&space.shared.id);
        self.observer.finished(space.shared.id, how);
        drop(space.uffd);
        space.shared.finish(how);
    }

    /// A userfaultfd does what it should never do. Its descriptor is kept open for ever: threads that wait go on
    /// waiting, which is better than zeros.
    fn lose(&mut self, index: usize, error: &UffdError) {
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
