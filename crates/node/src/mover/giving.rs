//! How a source gives its processes away: served while they run, frozen, captured, and left behind or thawed.
//!
//! Owns what is done to the processes and their images. Refuses to know when: the protocol's machine says so, through
//! [`Outgoing`]. Invariant: whatever fails before the commit, the processes run on and nothing of them is served.

use super::ahead::Rounds;
use super::keepers::Spent;
use super::outgoing::{MoveOutcome, Outgoing, Report, failure};
use super::party::{owner, sockets_of};
use super::payload::{self, Ahead, Frozen as FrozenPayload, FrozenProcess, Prepare, Prepared};
use super::records::ImageRecord;
use super::{Mover, lock, random};
use crate::capture::freeze::Frozen;
use crate::capture::{CaptureError, Source, Surroundings, demanded};
use crate::page_server::NewImage;
use crate::pager::{Journal, NewSpace, Withdrawn};
use crate::sockets::leaving::{EarlyLook, LeaveError, Owner};
use crate::steps;
use dunlin_cluster::relocation::source::SourceEvent;
use dunlin_proto::control::{FailureKind, MoveMode};
use dunlin_proto::ids::{ImageId, Pid, Slot};
use dunlin_proto::pages::ClientId;
use dunlin_proto::relocation::Member;
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::Duration;

impl Outgoing<'_> {
    pub(super) fn prepare_payload(&mut self) -> Result<Vec<u8>, CaptureError> {
        let ahead = self.request.mode != MoveMode::Demand;
        let mut processes = Vec::new();
        for source in self.frozen.iter().map(|frozen| &frozen.source) {
            let image = new_image(self.mover.here);
            self.images.insert(source.pid, image);
            processes.push(prepared(source, image, false));
        }
        for mut source in std::mem::take(&mut self.sources) {
            let image = new_image(self.mover.here);
            self.images.insert(source.pid, image);
            processes.push(prepared(&source, image, ahead));
            // First the watch, then the pages.
            let served = match ahead {
                true => source.watch_writes().and_then(|()| self.serve(&source, image)),
                false => Ok(()),
            };
            self.sources.push(source);
            served?;
        }
        Ok(payload::encode(&Prepare { processes }))
    }

    /// Serves the memory of a process, which may run.
    pub(super) fn serve(&self, source: &Source, id: ImageId) -> Result<(), CaptureError> {
        let memory = source.memory()?;
        self.mover.images.register(NewImage {
            id,
            mem: memory.memory,
            pagemap: memory.pagemap,
            keeper: None,
            regions: demanded(&source.plan),
            on_unused: self.on_unused(source.pid),
        });
        Ok(())
    }

    /// Writes cannot be watched as long as the process waits for pages of an earlier move.
    pub(super) fn await_own_drain(&self) -> Result<(), MoveOutcome> {
        const PATIENCE: Duration = Duration::from_secs(60);
        for (pid, _) in &self.party {
            let space = self.mover.arrivals.get(*pid).and_then(|arrival| arrival.space);
            if space.is_some_and(|space| space.wait_finished(PATIENCE).is_none()) {
                let message = format!("process {pid} was not moved: its pages are still coming from elsewhere");
                let hint = Some("wait until they have come (`pages_elsewhere` in `dunlin ps`), or use --mode demand");
                return Err(MoveOutcome::Failed(failure(FailureKind::Other, message, hint)));
            }
        }
        Ok(())
    }

    /// What is to be sent before the freeze is sent.
    pub(super) fn send_ahead(&mut self) -> Result<(), CaptureError> {
        let rounds = Rounds {
            mover: &self.mover,
            by: self.plan.move_id,
            to: self.plan.destination,
            mode: self.request.mode,
        };
        let reporter = self.reporter;
        rounds.run(&mut self.sources, |progress| {
            let _ = reporter.send(Report::Progress(progress));
        })?;
        let mut ahead = self.sources.iter_mut().filter(|source| source.is_sent_ahead());
        ahead.try_for_each(Source::look_again)
    }

    pub(super) fn freeze(&mut self) -> Result<(Vec<Member>, Vec<u8>), CaptureError> {
        // Whatever can be looked up before the stop is.
        let mover = self.mover.clone();
        let identify = |fd: std::os::fd::BorrowedFd<'_>| mover.streams.identify(fd);
        let around = mover.surroundings(&identify, &self.party);
        around.look();
        self.met.begin();
        if !self.still {
            self.close_orders()?;
        }
        let planned = self.looked_at().flat_map(|source| {
            let each = sockets_of(source);
            each.map(|(key, number, _, socket)| (key, source.pid, source.host, number, socket.clone()))
        });
        let planned: Vec<_> = planned.collect();
        if !self.still {
            self.sockets.hold_ports(&mover.edge, self.plan.move_id, &planned)?;
        }
        let held = planned.iter().map(|(key, .., socket)| (*key, socket.clone()));
        self.sockets
            .hold(&mover.edge, self.plan.move_id, held)
            .map_err(LeaveError::from)?;
        self.stop_all()?;
        self.tight = true;
        // All before any is read: a child that was forked since the plan has what its brothers and sisters have.
        match self.request.tree {
            true => self.refuse_newcomers()?,
            false => self.frozen.iter().try_for_each(|frozen| frozen.introduce(&around))?,
        }
        let mut processes = Vec::new();
        let mut members = Vec::new();
        let mut frozen_all = std::mem::take(&mut self.frozen);
        let mut along: BTreeMap<Pid, bool> = frozen_all.iter().map(|f| (f.source.pid, f.is_stopped())).collect();
        let mut capture_all = || -> Result<(), CaptureError> {
            // Children first: whether one is stopped is known when its parent is asked what it has seen of that.
            for frozen in frozen_all.iter_mut().rev() {
                let captured = self.capture(frozen, &around, &along);
                along.insert(frozen.source.pid, frozen.is_stopped());
                let (member, process) = captured?;
                members.push(member);
                processes.push(process);
            }
            Ok(())
        };
        let early = EarlyLook::at(&mover.edge, &planned);
        let all = std::thread::scope(|scope| {
            let other = (!planned.is_empty()).then(|| scope.spawn(|| early.help()));
            let all = capture_all();
            early.help();
            if let Some(Err(panic)) = other.map(std::thread::ScopedJoinHandle::join) {
                std::panic::resume_unwind(panic);
            }
            all
        });
        let early = early.end();
        self.frozen = frozen_all;
        all?;
        members.reverse();
        processes.reverse();
        steps::mark("image and member");
        for frozen in &mut self.frozen {
            frozen.park()?;
        }
        steps::mark("parking");
        // Their processes wait from here on, whatever becomes of this daemon.
        let owners: Vec<Owner<'_>> = self.frozen.iter().map(|frozen| owner(&frozen.source)).collect();
        let sockets = match owners.iter().all(|owner| owner.sockets().next().is_none()) {
            true => Vec::new(),
            false => self.sockets.capture(&mover.edge, self.plan.move_id, &owners, early)?,
        };
        steps::mark("sockets");
        let payload = payload::encode(&FrozenPayload { processes, sockets });
        self.times.essence_bytes = payload.len() as u64;
        steps::mark("encoding the essence");
        Ok((members, payload))
    }

    /// From here on what is sent to it would stay behind with the emptied process.
    pub(super) fn close_orders(&mut self) -> Result<(), CaptureError> {
        for source in &self.sources {
            self.obeyed.insert(source.pid, self.mover.orders.close(source.pid));
        }
        for (run, stream) in self.sources.iter().flat_map(Source::streams) {
            self.mover.streams.settle(run, stream)?;
        }
        Ok(())
    }

    pub(super) fn capture(
        &mut self,
        frozen: &mut Frozen,
        around: &Surroundings<'_>,
        along: &BTreeMap<Pid, bool>,
    ) -> Result<(Member, FrozenProcess), CaptureError> {
        let pid = frozen.source.pid;
        for (run, stream) in frozen.source.streams() {
            self.mover.streams.settle(run, stream)?;
        }
        steps::mark("streams");
        let mut essence = frozen.essence(around, &mut self.met, along)?;
        essence
            .lineage
            .children
            .retain(|child| self.mover.hidden.kind(child.pid) != Some(crate::processes::HiddenKind::Keeper));
        let taken = self.mover.take_stops(&mut essence.lineage.children);
        self.taken.extend(taken);
        let arrival = self.mover.arrivals.get(pid);
        let mut map = None;
        let mut images = Vec::new();
        if let Some(arrival) = &arrival
            && let Some(Ok(withdrawn)) = arrival.space.as_ref().map(|space| space.withdraw())
        {
            map = Some(withdrawn.map.to_image());
            images = arrival.images.iter().map(|(image, by)| (*image, *by)).collect();
            self.withdrawn.insert(pid, withdrawn);
        }
        let mut ahead = None;
        if let Some(image) = self.images.get(&pid).copied() {
            let regions = demanded(&frozen.source.plan);
            self.regions.insert(pid, regions.clone());
            if frozen.source.is_sent_ahead() {
                ahead = Some(Ahead {
                    stale: frozen.source.stale(&regions)?,
                    all_first: self.request.mode == MoveMode::Precopy,
                });
                self.mover.images.set_regions(image, regions);
            } else {
                self.serve(&frozen.source, image)?;
            }
        }
        let mut ids = frozen.tids();
        ids.retain(|tid| *tid != pid);
        ids.extend(
            [essence.lineage.pgid, essence.lineage.sid]
                .into_iter()
                .filter(|id| *id != pid && id.0 > 100),
        );
        // A child that has ended and is not yet waited for keeps its number.
        let ended = essence.lineage.children.iter().filter(|child| child.ended.is_some());
        ids.extend(ended.map(|child| child.pid));
        ids.sort_unstable();
        ids.dedup();
        let left_by = images.iter().map(|(_, by)| *by).collect();
        let member = lock(&self.mover.home).table().member(pid, ids, left_by);
        let digest = if self.request.verify {
            Some(frozen.digest(&essence)?)
        } else {
            None
        };
        Ok((
            member,
            FrozenProcess {
                essence,
                map,
                digest,
                images,
                obeyed: self.obeyed.remove(&pid).unwrap_or_default(),
                ahead,
            },
        ))
    }

    pub(super) fn on_unused(&self, pid: Pid) -> Box<dyn FnOnce(ImageId) + Send> {
        let mover = self.mover.clone();
        let (id, destination) = (self.plan.move_id, self.plan.destination);
        Box::new(move |_| {
            mover.image_is_unused(id, pid);
            mover.to_source(id, SourceEvent::Drained(destination, pid));
        })
    }

    pub(super) fn thaw(&mut self) {
        self.tight = false;
        self.mover.give_stops_back(std::mem::take(&mut self.taken));
        for (pid, _) in &self.party {
            lock(&self.mover.ends).remove(pid);
        }
        self.sockets.put_back(&self.mover.edge);
        self.thaw_all();
        self.sockets.release(&self.mover.edge);
        for (pid, _) in &self.party {
            self.mover.orders.open(*pid);
        }
    }

    pub(super) fn thaw_all(&mut self) {
        self.take_images_back();
        for frozen in self.frozen.drain(..) {
            let pid = frozen.source.pid;
            // The pager must serve again before the program can fault again.
            if let Some(withdrawn) = self.withdrawn.remove(&pid) {
                self.mover.adopt_again(pid, withdrawn);
            }
            if let Err(error) = frozen.thaw() {
                tracing::error!(%pid, %error, "a process could not be let run on");
            }
        }
        self.sources.drain(..).for_each(Source::abandon);
        self.thaw_left();
    }

    /// The processes run here: nobody is served any more.
    pub(super) fn take_images_back(&self) {
        for (pid, image) in &self.images {
            self.mover.images.remove(*image);
            self.mover.forget_unused(self.plan.move_id, *pid);
        }
    }

    pub(super) fn make_images(&mut self) {
        self.sockets.leave(&self.mover.edge);
        let to = self.plan.destination;
        let leaving: Vec<i32> = self.party.iter().map(|(_, host)| *host).collect();
        for frozen in &self.frozen {
            if let Err(error) = frozen.hush() {
                tracing::error!(pid = %frozen.source.pid, %error, "its descriptors may signal it once more");
            }
        }
        let mut remains = Vec::new();
        for mut frozen in std::mem::take(&mut self.frozen) {
            let pid = frozen.source.pid;
            self.watches.push(frozen.source.take_watch());
            let streams = frozen.source.streams();
            self.mover.exits.left(pid);
            tracing::debug!(%pid, stopped = frozen.is_stopped(), pending = ?frozen.pending(), "leaving");
            let task = (pid, frozen.source.host, frozen.is_stopped());
            let left = self.left_of(&frozen);
            let mover = self.mover.clone();
            let remember = |number| self.remember_image(pid, number);
            match mover.leave_behind(task, || frozen.into_image(), &leaving, remember) {
                Ok((_, keeper)) => {
                    self.keepers.insert(pid, keeper);
                    if let Some(image) = self.images.get(&pid) {
                        self.mover.images.set_keeper(*image, keeper);
                    }
                }
                Err(error) => {
                    tracing::error!(%pid, %error, "a departed process was not cleared away: the next daemon tries again");
                    remains.push(left);
                }
            }
            self.mover.streams.departed(pid, &streams, to);
            tracing::info!(%pid, %to, "a process has left");
            self.mover.residents.remove(pid);
            self.mover.orders.leave(pid);
            if self.mover.arrivals.remove(pid).is_some() {
                self.mover.forget_arrival(pid);
            }
        }
        self.leave_left();
        self.left.append(&mut remains);
        self.mover.sweep();
    }

    pub(super) fn remember_image(&mut self, pid: Pid, keeper: Pid) {
        if let Some(id) = self.images.get(&pid) {
            self.mover.remember_image(&ImageRecord {
                id: *id,
                by: self.plan.move_id,
                pid,
                keeper,
                regions: self.regions.remove(&pid).unwrap_or_default(),
            });
        }
    }

    pub(super) fn forget_image(&mut self, pid: Pid) {
        if let Some(image) = self.images.get(&pid) {
            self.mover.images.remove(*image);
        }
        if let Some(keeper) = self.keepers.remove(&pid) {
            self.mover.end_keeper(Spent {
                by: self.plan.move_id,
                pid,
                host: keeper,
            });
        }
    }
}

fn new_image(holder: Slot) -> ImageId {
    ImageId {
        holder,
        nonce: random(),
    }
}

fn prepared(source: &Source, image: ImageId, ahead: bool) -> Prepared {
    Prepared {
        plan: source.plan.clone(),
        image,
        clock_offsets_ns: source.clock_offsets(),
        ahead,
    }
}

impl Mover {
    /// Serves a space again whose move was given up.
    pub(super) fn adopt_again(&self, pid: Pid, withdrawn: Withdrawn) {
        let Withdrawn {
            id: old,
            observer,
            pid: host,
            uffd,
            map,
            claims,
        } = withdrawn;
        let id = self.pager.next_id();
        let journal = Journal::begin(ClientId(random()), &map);
        match &journal {
            Ok(journal) => observer.renamed(old, id, uffd.as_fd(), journal.as_fd()),
            Err(error) => tracing::error!(%pid, %error, "no journal for its address space"),
        }
        let space = NewSpace {
            id: Some(id),
            pid: host,
            uffd,
            map,
            connect: self.connect(),
            observer,
            claims: Some(claims),
            journal: journal.ok(),
            ahead: None,
        };
        match self.pager.adopt(space) {
            Ok(handle) => {
                if let Some(mut arrival) = self.arrivals.get(pid) {
                    arrival.space = Some(handle);
                    self.arrivals.insert(pid, arrival);
                }
            }
            Err((error, space)) => {
                tracing::error!(%pid, %error, "the pager could not take a space back: the process waits");
                // Without its userfaultfd the program would read zeros: better that it waits for ever.
                std::mem::forget(space);
            }
        }
    }

    /// Keeps the claims of withdrawn spaces, whose pages from here are all there, until their new node has certainly claimed
    /// the older images itself.
    pub(super) fn hand_over(&self, withdrawn: BTreeMap<Pid, Withdrawn>) {
        const GRACE: Duration = Duration::from_secs(3);
        if withdrawn.is_empty() {
            return;
        }
        let keep = std::thread::Builder::new().name("hand-over".into()).spawn(move || {
            std::thread::sleep(GRACE);
            // Until then a daemon that comes after this one does the same.
            for space in withdrawn.values() {
                space.observer.let_go(space.id);
            }
            drop(withdrawn);
        });
        if let Err(error) = keep {
            tracing::error!(%error, "older images may be released too early");
        }
    }
}
