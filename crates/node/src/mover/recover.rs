//! What a new daemon takes up of the moves of the one before it.
//!
//! Owns the records that init keeps of arrivals and of images, and their reading. Refuses to guess: a surrogate is known
//! by the program that it runs, a keeper by its record. Invariants: every hidden task is hidden again, and every move of
//! the last daemon known again, before anybody is served or any word sent; an image is served again as long as its keeper
//! lives; a process whose pages were still elsewhere is served again from its journal.

use super::arrivals::Arrival;
use super::incoming::elsewhere;
use super::second_hand::{self, SecondHand};
use super::{Mover, lock, outgoing};
use crate::capture::CaptureError;
use crate::capture::held::{Abandoned, fetch_from_refuge, stop_all};
use crate::nest::Nest;
use crate::page_server::NewImage;
use crate::pager::{Journal, SpaceHandle, Survivor, Withdrawn};
use crate::processes::{HiddenKind, Resident};
use crate::signals::orders::is_stopped;
use dunlin_cluster::relocation::Limits;
use dunlin_cluster::relocation::destination::{DestinationMove, DestinationRecord, Found};
use dunlin_cluster::relocation::source::{SourceEvent, SourceRecord, SourceStage};
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::{ImageId, Incarnation, MoveId, Pid, RunId};
use dunlin_proto::relocation::Ending;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::uffd::Uffd;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;

const ARRIVAL: &str = "arrival/";
const IMAGE: &str = "image/";
const SOURCE: &str = "source/";
const DESTINATION: &str = "destination/";

/// A process that came by a move, as its node must remember it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ArrivalRecord {
    pub(super) pid: Pid,
    pub(super) moves: u32,
    pub(super) command: String,
    pub(super) incarnation: Incarnation,
    pub(super) ids: Vec<Pid>,
    pub(super) images: Vec<(ImageId, MoveId)>,
    pub(super) relatives: Vec<Pid>,
    pub(super) uid: u32,
}

/// An image that is served here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    pub(super) id: ImageId,
    pub(super) by: MoveId,
    pub(super) pid: Pid,
    pub(super) keeper: Pid,
    pub(super) regions: Vec<(u64, u64)>,
    /// All who needed it have said that they do not any more.
    pub(super) unused: bool,
}

/// What a destination must know after a restart: the protocol's part, and what it had rebuilt.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct KeptDestination {
    pub(super) record: DestinationRecord,
    pub(super) places: Vec<KeptPlace>,
}

/// A process that was rebuilt.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct KeptPlace {
    pub(super) pid: Pid,
    pub(super) host: i32,
    pub(super) comm: Vec<u8>,
    /// The signal that it is to be stopped by when it runs.
    pub(super) stopped_by: Option<i32>,
    pub(super) arrival: ArrivalRecord,
}

/// What a source must know after a restart: the protocol's part, and what it had frozen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct KeptSource {
    pub(super) record: SourceRecord,
    pub(super) left: Vec<Left>,
}

/// A frozen process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Left {
    pub(super) pid: Pid,
    pub(super) host: i32,
    /// Under which name its pages are served from the commit on, and which.
    pub(super) image: Option<ImageId>,
    pub(super) regions: Vec<(u64, u64)>,
    /// The signals that travel with it.
    pub(super) pending: Vec<i32>,
    pub(super) streams: Vec<(RunId, u8)>,
}

impl Mover {
    /// Writes down a process that came.
    pub(super) fn remember_arrival(&self, record: &ArrivalRecord) {
        let blob = postcard::to_stdvec(record).unwrap_or_default();
        let label = format!("{ARRIVAL}{}", record.pid);
        self.log("keeping an arrival", self.nest.store_soon(&label, blob));
    }

    /// It has left or ended.
    pub(super) fn forget_arrival(&self, pid: Pid) {
        let dropped = self.nest.drop_label(&format!("{ARRIVAL}{pid}"));
        self.log("dropping an arrival", dropped.map(drop));
    }

    /// Writes down an image that is served here.
    pub(super) fn remember_image(&self, record: &ImageRecord) {
        let blob = postcard::to_stdvec(record).unwrap_or_default();
        let label = format!("{IMAGE}{}/{}", record.by, record.pid);
        self.log("keeping an image's record", self.nest.store(&label, &[], blob));
    }

    /// Everybody has released it; they hear that they have when this is written down, and do not come again.
    pub(super) fn image_is_unused(&self, by: MoveId, pid: Pid) {
        let label = format!("{IMAGE}{by}/{pid}");
        let noted = self.nest.fetch(&label).and_then(|kept| {
            let Some((_, blob)) = kept else { return Ok(()) };
            let mut record: ImageRecord = postcard::from_bytes(&blob).map_err(io::Error::other)?;
            record.unused = true;
            let blob = postcard::to_stdvec(&record).map_err(io::Error::other)?;
            self.nest.store(&label, &[], blob)
        });
        self.log("noting that an image is not needed", noted);
    }

    /// Nobody needs it any more.
    pub(super) fn drop_image_record(&self, by: MoveId, pid: Pid) {
        let dropped = self.nest.drop_label(&format!("{IMAGE}{by}/{pid}"));
        self.log("dropping an image's record", dropped.map(drop));
    }

    /// Takes everything up. Before anybody is served.
    pub fn recover(&self) -> io::Result<()> {
        let labels = self.nest.list()?;
        // Nothing is swept before it is known who is needed.
        let quiet = lock(&self.destinations);
        self.hide_surrogates();
        let mut images: BTreeMap<MoveId, Vec<(ImageRecord, i32)>> = BTreeMap::new();
        for record in records::<ImageRecord>(&self.nest, &labels, IMAGE)? {
            if let Some(host) = self.nest.host_pid(record.keeper)? {
                self.hidden.insert(record.keeper, HiddenKind::Keeper);
                images.entry(record.by).or_default().push((record, host));
            }
        }
        let destinations = records::<KeptDestination>(&self.nest, &labels, DESTINATION)?;
        let mut sources = records::<KeptSource>(&self.nest, &labels, SOURCE)?;
        let mut ended = Vec::new();
        for record in records::<ArrivalRecord>(&self.nest, &labels, ARRIVAL)? {
            ended.extend(self.recover_arrival(record)?);
        }
        for source in &mut sources {
            self.find_frozen(source)?;
        }
        let undecided: BTreeSet<Pid> = sources.iter().flat_map(|source| parked(&source.record)).collect();
        let held: BTreeSet<Pid> = sources
            .iter()
            .flat_map(|source| source.left.iter().map(|left| left.pid))
            .chain(destinations.iter().flat_map(|d| d.record.members.iter().map(|m| m.pid)))
            .collect();
        let mut withdrawn = self.take_up_spaces(&labels, &undecided)?;
        // Now that pages come, which this may need.
        self.free_the_abandoned(&held);
        drop(quiet);
        // What became of a copy that this node was to run is told by its move.
        ended.retain(|pid| {
            !destinations
                .iter()
                .any(|kept| kept.record.members.iter().any(|m| m.pid == *pid))
        });
        ended.into_iter().for_each(|pid| self.vanished(pid));
        for kept in destinations {
            self.recover_destination(kept, &mut withdrawn)?;
        }
        for source in sources {
            let id = source.record.plan.move_id;
            let images = images.remove(&id).unwrap_or_default();
            let pids = parked(&source.record);
            lock(&self.busy).extend(pids.iter().map(|pid| (*pid, id)));
            let theirs = pids.iter().filter_map(|pid| withdrawn.remove_entry(pid)).collect();
            self.recover_source(source, images, theirs)?;
        }
        // They run elsewhere: who holds their pages must hear that nobody here needs them.
        self.hand_over(withdrawn);
        self.begin()
    }

    /// Serves the spaces again that the last daemon served. Those whose processes do not run here (any more) come back
    /// withdrawn.
    fn take_up_spaces(&self, labels: &[String], undecided: &BTreeSet<Pid>) -> io::Result<BTreeMap<Pid, Withdrawn>> {
        let mut withdrawn = BTreeMap::new();
        for family in second_hand::kept(&self.nest, labels)? {
            let (mut survivors, mut names, mut processes) = (Vec::new(), Vec::new(), Vec::new());
            for kept in family {
                let label = kept.label;
                let (journal, told) = match Journal::take_up(kept.journal) {
                    Ok(told) => told,
                    Err(error) => {
                        // Init keeps the descriptor: it waits, and never reads zeros.
                        tracing::error!(%label, %error, "a process whose pages are elsewhere cannot be served again");
                        continue;
                    }
                };
                if told.lost_children > 0 {
                    self.end_lost_children(kept.process, told.lost_children);
                }
                let id = self.pager.next_id();
                survivors.push(Survivor {
                    id,
                    pid: kept.process.map(|(_, host)| host),
                    uffd: Uffd::from_fd(kept.uffd).map_err(io::Error::other)?,
                    map: told.map,
                    journal,
                });
                names.push((id, label));
                processes.push(kept.process);
            }
            let observer = Arc::new(SecondHand::again(self.nest.clone(), names));
            let handles = self.pager.take_up(survivors, self.connect(), observer)?;
            for (handle, (pid, host)) in handles.into_iter().zip(processes).filter_map(|(h, p)| Some((h, p?))) {
                if !self.give_space(pid, host, &handle)? || undecided.contains(&pid) {
                    withdrawn.extend(handle.withdraw().ok().map(|space| (pid, space)));
                }
            }
        }
        Ok(withdrawn)
    }

    /// Connects a process with its space, if it is here.
    fn give_space(&self, pid: Pid, host: i32, space: &SpaceHandle) -> io::Result<bool> {
        let is_here = self.hidden.kind(pid).is_none() && self.nest.host_pid(pid)? == Some(host);
        let Some(arrival) = self.arrivals.get(pid).filter(|_| is_here) else {
            return Ok(false);
        };
        if let Some(resident) = self.residents.get(pid) {
            let elsewhere = elsewhere(space.clone());
            self.residents.insert(pid, Resident { elsewhere, ..resident });
        }
        let space = Some(space.clone());
        self.arrivals.insert(pid, Arrival { space, ..arrival });
        Ok(true)
    }

    /// A child that was forked in the very moment of the daemon's death has lost its userfaultfd: it would read zeros
    /// where its parent has pages elsewhere, and must not run. It is known by its memory: a copy of its parent's, made
    /// last, in which nothing is watched.
    fn end_lost_children(&self, parent: Option<(Pid, i32)>, how_many: usize) {
        let layout = |host: i32| ProcDir::process(host).stat().ok().map(|stat| stat.layout);
        let is_watched = |host: i32| {
            crate::capture::space::listing(&ProcDir::process(host))
                .is_ok_and(|all| all.iter().any(|(_, flags)| flags.contains(b"um")))
        };
        let Some((pid, host)) = parent else {
            tracing::error!("a child that was forked when the daemon was killed reads zeros where pages are elsewhere");
            return;
        };
        let parents = layout(host);
        let mut children: Vec<(i32, Pid)> = self
            .neighbours()
            .into_iter()
            .filter(|(other, child)| {
                *other != host && self.hidden.kind(*child).is_none() && layout(*other) == parents && !is_watched(*other)
            })
            .collect();
        children.sort_by_key(|(other, _)| std::cmp::Reverse(started(*other)));
        for (other, child) in children.into_iter().take(how_many) {
            tracing::error!(%pid, %child, "forked when the daemon was killed, its pages are lost: it is killed");
            if let Some(process) = rustix::process::Pid::from_raw(other) {
                let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
            }
        }
    }

    /// A record of before the freeze does not say which tasks the processes are.
    fn find_frozen(&self, source: &mut KeptSource) -> io::Result<()> {
        for pid in parked(&source.record) {
            if source.left.iter().any(|left| left.pid == pid) {
                continue;
            }
            if let Some(host) = self.nest.host_pid(pid)? {
                source.left.push(Left {
                    pid,
                    host,
                    image: None,
                    regions: Vec::new(),
                    pending: Vec::new(),
                    streams: Vec::new(),
                });
            }
        }
        Ok(())
    }

    /// Lets all processes run on that the last daemon held for a moment, as for a move that was only prepared; but for
    /// those that a record tells of. A keeper that was just made is found by its parent, who is told of.
    fn free_the_abandoned(&self, told_of: &BTreeSet<Pid>) {
        let found = |pid: Pid, host: i32| match Abandoned::find(pid, host) {
            Ok(found) => found,
            Err(CaptureError::Gone) => None,
            Err(error) => {
                tracing::warn!(%pid, %error, "whether the last daemon held a process is not known");
                None
            }
        };
        for (host, pid) in self.neighbours() {
            if self.hidden.kind(pid).is_some() {
                continue;
            }
            match fetch_from_refuge(host) {
                Ok(_) | Err(CaptureError::Gone) => {}
                Err(error) => tracing::warn!(%pid, %error, "whether it spins for the last daemon is not known"),
            }
            if told_of.contains(&pid) {
                continue;
            }
            let Some(abandoned) = found(pid, host) else { continue };
            let parent = ProcDir::process(host).status().map_or(0, |status| status.ppid);
            if found(Pid(0), parent).is_some_and(|parents| parents.arena() == abandoned.arena()) {
                self.hidden.insert(pid, HiddenKind::Keeper);
            } else if abandoned.is_blank() {
                // It needs the nest's events, which nobody takes yet.
                self.hidden.insert(pid, HiddenKind::Blank);
                let mover = self.arc();
                let work = move || mover.stand_for(pid, host, b"dunlin-relative");
                if let Err(error) = std::thread::Builder::new().name("stand again".into()).spawn(work) {
                    tracing::error!(%pid, %error, "what was to become a process waits where it is");
                }
            } else {
                self.let_run_on(pid, host, None);
            }
        }
    }

    /// Turns what was to become a process, and will not, into a surrogate: where nobody needs one, it is ended later.
    pub(super) fn stand_for(&self, pid: Pid, host: i32, comm: &[u8]) {
        let home = self.modulus().home(pid) == Some(self.here);
        let kind = if home {
            HiddenKind::Departed
        } else {
            HiddenKind::Relative
        };
        self.hidden.insert(pid, HiddenKind::Blank);
        let stop = || -> Result<(), CaptureError> {
            for thread in stop_all(host)? {
                // They end with the exec, which waits for those that are traced.
                if thread.tid() != host {
                    thread.detach(0)?;
                }
            }
            Ok(())
        };
        let done = stop()
            .map_err(io::Error::other)
            .and_then(|()| self.entries.stand_again(pid, host, comm));
        self.hidden.insert(pid, kind);
        self.log("making a surrogate stand again", done);
    }

    /// The surrogates of the nest, by the program that they run.
    fn hide_surrogates(&self) {
        for (host, pid) in self.neighbours() {
            let runs = ProcDir::process(host).link("exe").unwrap_or_default();
            if runs.to_string_lossy().starts_with("/memfd:surrogate") {
                let home = self.modulus().home(pid) == Some(self.here);
                let kind = if home {
                    HiddenKind::Departed
                } else {
                    HiddenKind::Relative
                };
                self.hidden.insert(pid, kind);
                self.hidden.is_stopped(pid, is_stopped(host) == Some(true));
            }
        }
    }

    /// Takes up one that came; its PID, if it has ended since.
    pub(super) fn recover_arrival(&self, record: ArrivalRecord) -> io::Result<Option<Pid>> {
        let pid = record.pid;
        self.residents.insert(
            pid,
            Resident {
                moves: record.moves,
                command: record.command,
                incarnation: record.incarnation,
                frozen: false,
                elsewhere: Arc::new(BTreeMap::new),
            },
        );
        self.arrivals.insert(
            pid,
            Arrival {
                ids: record.ids,
                images: record.images.into_iter().collect(),
                space: None,
                relatives: record.relatives,
                verified_pages: None,
            },
        );
        match self.nest.pidfd(pid)? {
            Some(pidfd) if self.hidden.kind(pid).is_none() => {
                self.exits.watch(pid, pidfd, record.uid)?;
                Ok(None)
            }
            _ => Ok(Some(pid)),
        }
    }

    /// Tells the home what has become of a copy that the last daemon made.
    fn recover_destination(
        &self,
        KeptDestination { record, places }: KeptDestination,
        withdrawn: &mut BTreeMap<Pid, Withdrawn>,
    ) -> io::Result<()> {
        let id = record.move_id;
        let here = |pid: Pid| self.hidden.kind(pid).is_none() && self.nest.host_pid(pid).is_ok_and(|h| h.is_some());
        let mut waiting = Vec::new();
        for place in places {
            let found = Abandoned::find(place.pid, place.host).ok().flatten();
            if found.is_some_and(|found| found.is_blank() && found.waits()) {
                self.hidden.insert(place.pid, HiddenKind::Blank);
                let space = withdrawn.remove(&place.pid);
                waiting.push((place, space));
            }
        }
        let found = if !waiting.is_empty() {
            lock(&self.busy).extend(waiting.iter().map(|(place, _)| (place.pid, id)));
            Found::Waiting
        } else if record.members.iter().any(|m| here(m.pid)) {
            Found::Running
        } else {
            let root = record.members.first().and_then(|m| self.exits.ended(m.pid));
            Found::Ended(root.map_or(Ending::Lost, |ended| match ended.status {
                ExitStatus::Unknown => Ending::Lost,
                status => Ending::Exited(status),
            }))
        };
        let (sender, words) = channel();
        lock(&self.destinations).insert(id, sender);
        let mover = self.arc();
        std::thread::Builder::new().name("arrival".into()).spawn(move || {
            let machine = DestinationMove::recover(mover.now(), mover.here, Limits::default(), record, found);
            mover.go_on_arriving(id, machine, waiting, &words);
            lock(&mover.destinations).remove(&id);
            lock(&mover.busy).retain(|_, by| *by != id);
        })?;
        Ok(())
    }

    /// Serves the images of a move again, and goes on with it.
    fn recover_source(
        &self,
        source: KeptSource,
        images: Vec<(ImageRecord, i32)>,
        withdrawn: BTreeMap<Pid, Withdrawn>,
    ) -> io::Result<()> {
        let record = &source.record;
        let id = record.plan.move_id;
        if let SourceStage::Image { members, .. } = &record.stage {
            for pid in members.iter().map(|member| member.pid) {
                // Its keeper still holds the number, as that of a group.
                if self.hidden.kind(pid).is_none() && self.nest.pidfd(pid)?.is_none() {
                    self.hidden.insert(pid, HiddenKind::Leaving);
                }
            }
        }
        let (sender, words) = channel();
        lock(&self.sources).insert(id, sender);
        for (image, keeper) in &images {
            let open = |name: &str| File::open(ProcDir::process(*keeper).path(name));
            let (mover, pid, destination) = (self.arc(), image.pid, record.plan.destination);
            if image.unused {
                self.to_source(id, SourceEvent::Drained(destination, pid));
                continue;
            }
            self.images.register(NewImage {
                id: image.id,
                mem: open("mem")?,
                pagemap: open("pagemap")?,
                keeper: Some(*keeper),
                regions: image.regions.clone(),
                on_unused: Box::new(move |_| {
                    mover.image_is_unused(id, pid);
                    mover.to_source(id, SourceEvent::Drained(destination, pid));
                }),
            });
        }
        let mover = self.arc();
        std::thread::Builder::new().name("move again".into()).spawn(move || {
            outgoing::go_on(&mover, source, images, withdrawn, &words);
            lock(&mover.sources).remove(&id);
            lock(&mover.busy).retain(|_, by| *by != id);
        })?;
        Ok(())
    }
}

/// The processes that a record says were parked, or about to be, with no decision known here.
fn parked(record: &SourceRecord) -> Vec<Pid> {
    match &record.stage {
        SourceStage::Freezing(claims) => claims.iter().map(|claim| claim.pid).collect(),
        SourceStage::Parked(members) => members.iter().map(|member| member.pid).collect(),
        SourceStage::Image { .. } => Vec::new(),
    }
}

/// When a process was made, clock ticks since the machine's start.
fn started(host: i32) -> u64 {
    let text = ProcDir::process(host).text("stat").unwrap_or_default();
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    // Field 22; the third is the first after the name.
    after_name
        .split_ascii_whitespace()
        .nth(19)
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

fn records<T: DeserializeOwned>(nest: &Nest, labels: &[String], prefix: &str) -> io::Result<Vec<T>> {
    let mut found = Vec::new();
    for label in labels.iter().filter(|l| l.starts_with(prefix)) {
        if let Some((_, blob)) = nest.fetch(label)? {
            found.push(postcard::from_bytes(&blob).map_err(io::Error::other)?);
        }
    }
    Ok(found)
}
