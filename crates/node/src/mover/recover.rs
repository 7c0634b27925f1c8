//! What a new daemon takes up of the moves of the one before it.
//!
//! Owns the order in which that is done. Refuses to guess: what there was is told by `records`, by the journals of
//! address spaces (`survivors`), and by what the tasks of the nest are (`leftovers`). Invariants: every hidden task is hidden
//! again, and every move of the last daemon known again, before anybody is served or any word sent; an image is served
//! again as long as its keeper lives; a process whose pages were still elsewhere is served again from its journal.

use super::arrivals::Arrival;
use super::fates::{Fates, Kept, members};
use super::keepers::Spent;
use super::leftovers::ToldOf;
use super::records::{
    ARRIVAL, ArrivalRecord, DESTINATION, IMAGE, ImageRecord, KeptDestination, KeptSource, SOURCE, UNUSED, records,
    unused_label,
};
use super::{Mover, lock, outgoing};
use crate::capture::held::Abandoned;
use crate::page_server::NewImage;
use crate::pager::Withdrawn;
use crate::processes::{HiddenKind, Resident};
use dunlin_cluster::relocation::Limits;
use dunlin_cluster::relocation::destination::{DestinationMove, Found};
use dunlin_cluster::relocation::source::{SourceEvent, SourceRecord, SourceStage};
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::{MoveId, Pid};
use dunlin_proto::relocation::Ending;
use dunlin_sys::procfs::ProcDir;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;

impl Mover {
    /// Takes everything up. Before anybody is served.
    pub fn recover(&self) -> io::Result<()> {
        let labels = self.nest.list()?;
        // Nothing is swept before it is known who is needed.
        let quiet = lock(&self.destinations);
        self.hide_surrogates();
        let mut images: BTreeMap<MoveId, Vec<Kept>> = BTreeMap::new();
        for record in records::<ImageRecord>(&self.nest, &labels, IMAGE)? {
            match self.nest.host_pid(record.keeper)? {
                Some(host) => {
                    self.hidden.insert(record.keeper, HiddenKind::Keeper);
                    images.entry(record.by).or_default().push((record, host));
                }
                None => self.drop_image_record(record.by, record.pid),
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
        let told_of = ToldOf::by(&sources, &destinations);
        let mut withdrawn = self.take_up_spaces(&labels, &undecided)?;
        let unused = self.unused_images(&labels, &sources, &images);
        // Now that pages come, which this may need.
        self.free_the_abandoned(&told_of);
        drop(quiet);
        // What became of copies that this node was to run is told by their move, unless others of it run.
        let here = |pid: Pid| self.hidden.kind(pid).is_none() && self.nest.host_pid(pid).is_ok_and(|h| h.is_some());
        ended.retain(|pid| {
            !destinations.iter().any(|kept| {
                let members = &kept.record.members;
                members.iter().any(|m| m.pid == *pid) && !members.iter().any(|m| here(m.pid))
            })
        });
        for kept in destinations {
            self.recover_destination(kept, &mut withdrawn)?;
        }
        ended.into_iter().for_each(|pid| self.vanished(pid));
        for source in sources {
            let id = source.record.plan.move_id;
            let mut fates = Fates::of(&source, images.remove(&id).unwrap_or_default(), &unused);
            lock(&self.spent).extend(std::mem::take(&mut fates.over).into_iter().map(spent));
            let pids = parked(&source.record);
            lock(&self.busy).extend(pids.iter().map(|pid| (*pid, id)));
            let theirs = pids.iter().filter_map(|pid| withdrawn.remove_entry(pid)).collect();
            self.recover_source(source, fates, theirs)?;
        }
        // All of their moves is over but that.
        lock(&self.spent).extend(images.into_values().flatten().map(spent));
        // They run elsewhere: who holds their pages must hear that nobody here needs them.
        self.hand_over(withdrawn);
        self.begin()
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
                steps: Vec::new(),
                told_after_us: 0.0,
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
        // Their home does not know yet that they are here.
        lock(&self.busy).extend(record.members.iter().map(|member| (member.pid, id)));
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

    /// Under which labels it is kept that images are not needed; what is kept of moves that are over goes.
    fn unused_images(
        &self,
        labels: &[String],
        sources: &[KeptSource],
        images: &BTreeMap<MoveId, Vec<Kept>>,
    ) -> BTreeSet<String> {
        let of = |record: &SourceRecord| {
            let id = record.plan.move_id;
            members(record).into_iter().map(move |pid| unused_label(id, pid))
        };
        let images = images.values().flatten();
        let known: BTreeSet<String> = (sources.iter().flat_map(|source| of(&source.record)))
            .chain(images.map(|(image, _)| unused_label(image.by, image.pid)))
            .collect();
        let kept = labels.iter().filter(|label| label.starts_with(UNUSED));
        let (unused, stale): (BTreeSet<String>, BTreeSet<String>) =
            kept.cloned().partition(|label| known.contains(label));
        for label in stale {
            self.log("dropping what was noted of an image", self.nest.drop_soon(&label));
        }
        unused
    }

    /// Serves the images of a move again, and goes on with it.
    fn recover_source(&self, source: KeptSource, fates: Fates, withdrawn: BTreeMap<Pid, Withdrawn>) -> io::Result<()> {
        let record = &source.record;
        let (id, destination) = (record.plan.move_id, record.plan.destination);
        if let SourceStage::Image { members, .. } = &record.stage {
            for pid in members.iter().map(|member| member.pid) {
                // Its keeper still holds the number, as that of a group.
                if self.hidden.kind(pid).is_none() && self.nest.pidfd(pid)?.is_none() {
                    self.hidden.insert(pid, HiddenKind::Leaving);
                }
            }
        }
        tracing::debug!(%id, stage = ?record.stage, ?fates, left = source.left.len(), "a move goes on");
        let (sender, words) = channel();
        lock(&self.sources).insert(id, sender);
        // Who needs them may ask before they are made.
        fates.coming.iter().for_each(|image| self.images.will_come(*image));
        for pid in &fates.released {
            self.to_source(id, SourceEvent::Drained(destination, *pid));
        }
        for (image, keeper) in fates.served() {
            let open = |name: &str| File::open(ProcDir::process(*keeper).path(name));
            let (mover, pid) = (self.arc(), image.pid);
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
            outgoing::go_on(&mover, source, fates, withdrawn, &words);
            lock(&mover.sources).remove(&id);
            lock(&mover.busy).retain(|_, by| *by != id);
        })?;
        Ok(())
    }
}

/// The keeper of an image that nobody needs.
fn spent((image, host): Kept) -> Spent {
    Spent {
        by: image.by,
        pid: image.pid,
        host,
    }
}

/// The processes that a record says were parked, or about to be, with no decision known here.
pub(super) fn parked(record: &SourceRecord) -> Vec<Pid> {
    match &record.stage {
        SourceStage::Freezing(claims) => claims.iter().map(|claim| claim.pid).collect(),
        SourceStage::Parked(members) => members.iter().map(|member| member.pid).collect(),
        SourceStage::Image { .. } => Vec::new(),
    }
}
