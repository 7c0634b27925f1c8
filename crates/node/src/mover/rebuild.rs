//! What a destination does before the decision: blanks are prepared while the processes still run at their source, and
//! loaded while they are frozen.
//!
//! Owns the blanks and the spaces that the pager adopts for them. Refuses to let any of them run. Invariant: a blank that is
//! loaded waits in its loop, whatever becomes of this daemon.

use super::NEST_FILTERS;
use super::incoming::{Incoming, Placed};
use super::payload::{self, Frozen, FrozenProcess, Prepare, Prepared};
use super::second_hand::SecondHand;
use super::{Mover, lock};
use crate::pager::{Finish, Journal, NewSpace, Withdrawn};
use crate::processes::HiddenKind;
use crate::restore::{Blank, Kit, Remade, RestoreError};
use crate::{sockets, steps, verify};
use dunlin_cluster::page_map::PageMap;
use dunlin_proto::ids::{ImageId, Pid, RunId, Slot};
use dunlin_proto::image::{DescriptionKind, FrozenSocket};
use dunlin_proto::pages::ClientId;
use dunlin_proto::peer::{PeerReply, PeerRequest};
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::Options;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

impl Incoming {
    /// Runs `work` with what a restore needs of this node.
    fn with_kit<T>(
        &mut self,
        work: impl FnOnce(&mut Incoming, &mut Kit<'_>) -> Result<T, RestoreError>,
    ) -> Result<T, String> {
        let mover = self.mover.clone();
        let root = mover.nest.root().try_clone_to_owned().map_err(|e| e.to_string())?;
        let steer = |pid: Pid| -> io::Result<Box<dyn FnOnce() -> io::Result<()> + '_>> {
            let guard = mover.nest.steer(pid)?;
            Ok(Box::new(move || {
                if guard.finish()? {
                    Ok(())
                } else {
                    Err(io::Error::other(format!("the number {pid} was not taken")))
                }
            }))
        };
        let open_stream = |run: RunId, stream: u8| -> io::Result<OwnedFd> { mover.streams.open(run, stream) };
        let mut kit = Kit {
            installer: &mover.installer,
            root,
            surrogate: mover.nest.surrogate_program(),
            shared: &mover.config.shared,
            cookie: mover.nest.cookie(),
            nest_filters: NEST_FILTERS,
            steer: &steer,
            open_stream: &open_stream,
            host_of: &|pid| mover.nest.host_pid(pid).ok().flatten(),
            options: Options {
                follow: true,
                suspend_seccomp: true,
                ..Options::default()
            },
            common: std::mem::take(&mut self.common),
        };
        let done = work(self, &mut kit);
        self.common = kit.common;
        done.map_err(|error| error.to_string())
    }

    pub(super) fn prepare(&mut self, payload: &[u8]) -> Result<(), String> {
        let Prepare { processes } = payload::decode(payload)?;
        let ahead = self.mover.clocks_ahead(self.id.source).map_err(|e| e.to_string())?;
        // First all places, parents before children, while each is still a bare surrogate; then what is in them.
        let moving: Vec<Pid> = processes.iter().map(|p| p.plan.image.lineage.pid).collect();
        for process in &processes {
            let mut lineage = process.plan.image.lineage.clone();
            lineage.children.retain(|child| !moving.contains(&child.pid));
            let place = self
                .mover
                .entries
                .place(&lineage)
                .map_err(|e| format!("making its entry: {e}"))?;
            self.places.push(Placed {
                pid: lineage.pid,
                place,
                comm: ProcDir::process(place.host)
                    .bytes("comm")
                    .unwrap_or_default()
                    .trim_ascii_end()
                    .to_vec(),
            });
            let mut relatives: Vec<Pid> = [lineage.ppid, lineage.pgid, lineage.sid].into();
            relatives.retain(|pid| self.mover.hidden.kind(*pid) == Some(HiddenKind::Relative));
            relatives.dedup();
            self.relatives.push(relatives);
        }
        self.prepare_sockets(&processes)?;
        for (index, process) in processes.into_iter().enumerate() {
            let place = self.places[index].place;
            let offsets = [0, 1].map(|i| {
                let (least, most) = ahead[i];
                let own = process.clock_offsets_ns[i];
                (own + least, own + most)
            });
            let blank =
                self.with_kit(|_, kit| Blank::prepare(place.host, !place.stood_before, &process.plan, offsets, kit))?;
            self.blanks.push(blank);
            self.prepared.push(process);
            if self.prepared.last().is_some_and(|p| p.ahead) {
                self.fill_ahead(self.blanks.len() - 1)?;
            }
        }
        self.with_kit(|this, kit| Blank::connect(&this.blanks, kit))
    }

    pub(super) fn rebuild(&mut self, payload: &[u8]) -> Result<(), String> {
        steps::begin(Instant::now());
        let Frozen { processes, sockets } = payload::decode(payload)?;
        steps::mark("reading the essence");
        if processes.len() != self.blanks.len() {
            return Err("the essence is not of the processes that were prepared".into());
        }
        self.rebuild_sockets(sockets)?;
        steps::mark("sockets");
        self.with_kit(|this, kit| {
            let essences = processes.iter().map(|process| &process.essence);
            Blank::load_descriptors(&mut this.blanks, essences, kit)
        })?;
        steps::mark("descriptors");
        // What there is to be told of its children waits until it has come.
        for blank in &self.blanks {
            self.mover.orders.close(blank.pid);
        }
        for (index, process) in processes.into_iter().enumerate() {
            let came = self.stop_filling(index, &process)?;
            let mut stale = process.ahead.as_ref().map_or(Vec::new(), |ahead| ahead.stale.clone());
            // What was called back and has not come again is there in an older form.
            stale.extend(came.iter().flat_map(|came| came.map.runs_away()));
            let known = self.mover.hidden.job(self.blanks[index].pid);
            let known = known.is_some_and(|job| lock(&job).stopped);
            self.blanks[index]
                .settle_stop(&process.essence, known)
                .map_err(|e| e.to_string())?;
            let remade = self.with_kit(|this, kit| this.blanks[index].load(&process.essence, &stale, kit))?;
            self.make_children(index, &process)?;
            steps::mark("children");
            self.adopt(index, &process, came.map(|came| (came, remade)))?;
            self.await_all(index, &process)?;
            steps::mark("giving the memory to the pager");
            self.blanks[index]
                .complete(&process.essence)
                .map_err(|e| e.to_string())?;
            steps::mark("rseq areas and clocks");
            self.verify(index, &process)?;
            self.frozen.push(process);
        }
        self.kept_sockets = self
            .blanks
            .iter()
            .map(|blank| sockets::recovery::kept(&self.arriving, &self.sockets, blank.files()))
            .collect();
        self.show_children()?;
        for (blank, process) in self.blanks.iter().zip(&self.frozen) {
            blank.outlive(&process.essence).map_err(|e| e.to_string())?;
        }
        steps::mark("outliving the daemon");
        Ok(())
    }

    /// Sockets are made for all processes at once, in the nest's network.
    fn prepare_sockets(&mut self, processes: &[Prepared]) -> Result<(), String> {
        let images = processes.iter().map(|process| &process.plan.image.files);
        let sockets = images.flat_map(|files| &files.descriptions);
        let sockets = sockets.filter_map(|description| match &description.kind {
            DescriptionKind::Socket(socket) => Some((description.key, &**socket)),
            _ => None,
        });
        let sockets: Vec<_> = sockets.collect();
        let network = self.mover.network().map_err(|e| e.to_string())?;
        self.arriving
            .prepare(&self.mover.edge, network.as_fd(), sockets.into_iter(), &mut self.common)
            .map_err(|e| e.to_string())
    }

    /// They become what they are at the source now.
    fn rebuild_sockets(&mut self, frozen: Vec<FrozenSocket>) -> Result<(), String> {
        let started = Instant::now();
        let network = self.mover.network().map_err(|e| e.to_string())?;
        self.arriving
            .rebuild(&self.mover.edge, network.as_fd(), &frozen, &mut self.common)
            .map_err(|e| e.to_string())?;
        if !frozen.is_empty() {
            tracing::debug!(
                sockets = frozen.len(),
                sockets_us = started.elapsed().as_micros(),
                "sockets"
            );
        }
        self.sockets = frozen;
        Ok(())
    }

    /// What each parent has not waited for yet, of the stops of its children that move along, it can wait for.
    fn show_children(&self) -> Result<(), String> {
        let show = |parent: &Blank, process: &FrozenProcess, place: &Placed| -> Result<(), RestoreError> {
            let children = &process.essence.lineage.children;
            for child in children.iter().filter(|child| child.along && child.continued) {
                let mut both = self.blanks.iter().zip(&self.frozen);
                if let Some((blank, process)) = both.find(|(blank, _)| blank.pid == child.pid) {
                    blank.show_continued(&process.essence)?;
                }
            }
            match children.iter().any(|child| child.along) {
                true => parent.unhear_children(&process.essence, place.place.stood_before),
                false => Ok(()),
            }
        };
        let mut all = self.blanks.iter().zip(&self.frozen).zip(&self.places);
        all.try_for_each(|((blank, process), place)| show(blank, process, place).map_err(|e| e.to_string()))
    }

    /// Surrogates of the children that stay behind, so that the process can wait for them.
    fn make_children(&mut self, index: usize, process: &FrozenProcess) -> Result<(), String> {
        let mut children = process.essence.lineage.children.clone();
        children.retain(|child| !child.along);
        if children.is_empty() {
            return Ok(());
        }
        let blank = &self.blanks[index];
        self.mover
            .entries
            .children(blank.host, blank.scratch(), &children)
            .map_err(|e| format!("making surrogates of its children: {e}"))?;
        self.mover.tell_stops(&children);
        // (Those that move along are waited for when they are there.)
        blank
            .unhear_children(&process.essence, self.places[index].place.stood_before)
            .map_err(|e| format!("waiting for its children: {e}"))?;
        let made = children.iter().map(|c| c.pid);
        self.relatives[index].extend(made.filter(|pid| self.mover.hidden.kind(*pid) == Some(HiddenKind::Relative)));
        Ok(())
    }

    /// The pages of a process begin to come while it still runs at its source.
    fn fill_ahead(&mut self, index: usize) -> Result<(), String> {
        let image = self.prepared[index].image;
        let blank = &self.blanks[index];
        let (uffd, regions) = blank.pages().map_err(|e| e.to_string())?;
        let mut map = PageMap::new();
        back_all(&mut map, &regions, image).map_err(|e| e.to_string())?;
        let space = NewSpace {
            id: None,
            pid: Some(blank.host),
            uffd,
            map,
            connect: self.mover.connect(),
            observer: Arc::new(()),
            claims: None,
            journal: None,
            ahead: Some(blank.memory().map_err(|e| e.to_string())?),
        };
        let space = self.mover.pager.adopt(space).map_err(|(error, _)| error.to_string())?;
        self.mover.ahead.insert(self.id, blank.pid, space, image);
        Ok(())
    }

    /// What has come of a process's pages so far; nothing more comes until they are adopted again.
    fn stop_filling(&self, index: usize, process: &FrozenProcess) -> Result<Option<Withdrawn>, String> {
        let pid = self.blanks[index].pid;
        match (self.mover.ahead.remove(self.id, pid), &process.ahead) {
            (Some(space), Some(_)) => match space.withdraw() {
                Ok(withdrawn) => Ok(Some(withdrawn)),
                Err(how) => Err(format!("the memory that came ahead is lost ({how:?})")),
            },
            (None, None) => Ok(None),
            (Some(_), None) | (None, Some(_)) => Err("source and destination disagree on what was sent ahead".into()),
        }
    }

    /// Waits for every page, if it is not to run before.
    fn await_all(&self, index: usize, process: &FrozenProcess) -> Result<(), String> {
        const PATIENCE: Duration = Duration::from_secs(240);
        if process.ahead.as_ref().is_none_or(|ahead| !ahead.all_first) {
            return Ok(());
        }
        match self.spaces[index].wait_finished(PATIENCE) {
            Some(Finish::Drained) => Ok(()),
            Some(Finish::Gone | Finish::Withdrawn) => Err("its blank was lost while the last pages came".into()),
            None => Err("its last pages did not come in time".into()),
        }
    }

    fn adopt(
        &mut self,
        index: usize,
        process: &FrozenProcess,
        came: Option<(Withdrawn, Remade)>,
    ) -> Result<(), String> {
        let image = self.prepared[index].image;
        let blank = &self.blanks[index];
        let (uffd, regions) = blank.pages().map_err(|e| e.to_string())?;
        let (map, claims) = match came {
            None => (page_map(process, &regions, image).map_err(|e| e.to_string())?, None),
            Some((came, remade)) => {
                let map = page_map_after(process, came.map, &remade, image).map_err(|e| e.to_string())?;
                (map, Some(came.claims))
            }
        };
        let second = SecondHand::new(self.mover.nest.clone());
        let id = self.mover.pager.next_id();
        steps::mark("making the page map");
        let journal = Journal::begin(ClientId(super::random()), &map).map_err(|e| format!("no journal for it: {e}"))?;
        second
            .keep(id, (blank.pid, blank.host), uffd.as_fd(), &journal)
            .map_err(|e| format!("init could not take its userfaultfd: {e}"))?;
        steps::mark("journal and userfaultfd to init");
        let space = NewSpace {
            id: Some(id),
            pid: Some(blank.host),
            uffd,
            map,
            connect: self.mover.connect(),
            observer: Arc::new(second),
            claims,
            journal: Some(journal),
            ahead: None,
        };
        match self.mover.pager.adopt(space) {
            Ok(handle) => {
                self.spaces.push(handle);
                Ok(())
            }
            Err((error, _)) => Err(format!("the pager could not take its memory: {error}")),
        }
    }

    /// Compares the copy with its original, which is parked, if that was asked for.
    fn verify(&mut self, index: usize, process: &FrozenProcess) -> Result<(), String> {
        const PATIENCE: Duration = Duration::from_secs(240);
        let Some(source) = &process.digest else { return Ok(()) };
        let blank = &self.blanks[index];
        verify::compare_space(blank.host, blank.space(), blank.hole())?;
        verify::compare_threads(blank, &process.essence)?;
        verify::compare_files(blank.host, blank.files())?;
        self.arriving.verify(&self.sockets)?;
        if self.spaces[index].wait_finished(PATIENCE).is_none() {
            return Err("the pages did not come in time to be compared".into());
        }
        let copy = blank.digest(&process.essence).map_err(|e| e.to_string())?;
        let pages = verify::compare_pages(source, &copy)?;
        tracing::debug!(pages, "verified");
        self.verified.insert(blank.pid, pages);
        Ok(())
    }
}

impl Mover {
    /// The network of the nest.
    pub(super) fn network(&self) -> io::Result<std::fs::File> {
        std::fs::File::open(format!("/proc/{}/ns/net", self.nest.init_pid()))
    }

    /// How pagers reach the holders of images.
    pub(super) fn connect(&self) -> Arc<crate::pager::Connect> {
        let peers = self.peers.clone();
        Arc::new(move |image: ImageId| {
            let open = || {
                let purpose = dunlin_proto::peer::Purpose::Pages(image);
                peers.open(image.holder, purpose).map_err(io::Error::other)
            };
            Ok(crate::pager::Connections {
                faults: open()?,
                bulk: open()?,
            })
        })
    }

    /// How far the monotonic clocks of a node are ahead of ours, nanoseconds: at least, at most. An answer was given between
    /// its question and its arrival; of several, what fits them all.
    fn clocks_ahead(&self, of: Slot) -> io::Result<[(i64, i64); 2]> {
        const QUESTIONS: usize = 8;
        let mut bounds = [(i64::MIN, i64::MAX); 2];
        for _ in 0..QUESTIONS {
            let before = raw_clocks();
            let theirs = match self.peers.call(of, &PeerRequest::Clocks) {
                Ok(PeerReply::Clocks(theirs)) => theirs,
                Ok(_) => return Err(io::Error::other("the source gave an answer to another question")),
                Err(error) => return Err(io::Error::other(error)),
            };
            let after = raw_clocks();
            bounds = [0, 1].map(|i| {
                let (least, most): (i64, i64) = bounds[i];
                (least.max(theirs[i] - after[i]), most.min(theirs[i] - before[i]))
            });
        }
        Ok(bounds)
    }
}

/// CLOCK_MONOTONIC and CLOCK_BOOTTIME of this daemon, nanoseconds.
pub fn raw_clocks() -> [i64; 2] {
    use rustix::time::{ClockId, clock_gettime};
    [ClockId::Monotonic, ClockId::Boottime].map(|clock| {
        let now = clock_gettime(clock);
        now.tv_sec * 1_000_000_000 + now.tv_nsec
    })
}

/// What nothing else is known of in these regions is in this image.
fn back_all(
    map: &mut PageMap,
    regions: &[(u64, u64)],
    image: ImageId,
) -> Result<(), dunlin_cluster::page_map::MapError> {
    for (start, end) in regions {
        map.cover(*start, *end)?;
        map.back_with(*start, (end - start) / 4096, image, *start)?;
    }
    Ok(())
}

/// Where the pages of an arriving process are: what is still elsewhere by its own map, everything else at its source.
fn page_map(
    process: &FrozenProcess,
    regions: &[(u64, u64)],
    image: ImageId,
) -> Result<PageMap, dunlin_cluster::page_map::MapError> {
    let mut map = match &process.map {
        Some(earlier) => PageMap::from_image(earlier)?,
        None => PageMap::new(),
    };
    back_all(&mut map, regions, image)?;
    for run in &process.essence.hot_pages {
        map.settle(run.address, run.bytes.len() as u64 / 4096);
    }
    Ok(map)
}

/// Where they are after much of it was sent ahead: as it was known at the freeze, but for what has changed since.
fn page_map_after(
    process: &FrozenProcess,
    mut map: PageMap,
    remade: &Remade,
    image: ImageId,
) -> Result<PageMap, dunlin_cluster::page_map::MapError> {
    for (start, end) in &remade.gone {
        map.unmap(*start, *end);
    }
    for (start, end) in &remade.come {
        map.cover(*start, *end)?;
        map.recall(*start, (end - start) / 4096, image);
    }
    for (start, pages) in process.ahead.iter().flat_map(|ahead| &ahead.stale) {
        map.recall(*start, *pages, image);
    }
    for run in &process.essence.hot_pages {
        map.settle(run.address, run.bytes.len() as u64 / 4096);
    }
    Ok(map)
}
