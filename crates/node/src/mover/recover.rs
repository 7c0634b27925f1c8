//! What a new daemon takes up of the moves of the one before it.
//!
//! Owns the records that init keeps of arrivals and of images, and their reading. Refuses to guess: a surrogate is known
//! by the program that it runs, a keeper by its record. Invariants: every hidden task is hidden again before anybody is
//! served; an image is served again as long as its keeper lives; a process whose pages were still elsewhere waits (init
//! holds its userfaultfd), and is not moved.

use super::arrivals::Arrival;
use super::{Mover, lock, outgoing};
use crate::nest::Nest;
use crate::page_server::NewImage;
use crate::processes::{HiddenKind, Resident};
use crate::signals::orders::is_stopped;
use dunlin_cluster::relocation::Limits;
use dunlin_cluster::relocation::destination::{DestinationMove, DestinationRecord, Found};
use dunlin_cluster::relocation::source::{SourceEvent, SourceRecord};
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::{ImageId, Incarnation, MoveId, Pid};
use dunlin_proto::relocation::Ending;
use dunlin_sys::procfs::ProcDir;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;

const ARRIVAL: &str = "arrival/";
const IMAGE: &str = "image/";
const SOURCE: &str = "source/";
const DESTINATION: &str = "destination/";

/// A process that came by a move, as its node must remember it.
#[derive(Debug, Serialize, Deserialize)]
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
}

impl Mover {
    /// Writes down a process that came.
    pub(super) fn remember_arrival(&self, record: &ArrivalRecord) {
        let blob = postcard::to_stdvec(record).unwrap_or_default();
        let label = format!("{ARRIVAL}{}", record.pid);
        self.log("keeping an arrival", self.nest.store(&label, &[], blob));
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
        let mut ended = Vec::new();
        let waiting: Vec<&str> = labels.iter().filter_map(|l| l.strip_prefix("uffd/")).collect();
        for record in records::<ArrivalRecord>(&self.nest, &labels, ARRIVAL)? {
            ended.extend(self.recover_arrival(record, &waiting)?);
        }
        drop(quiet);
        ended.into_iter().for_each(|pid| self.vanished(pid));
        for record in records::<DestinationRecord>(&self.nest, &labels, DESTINATION)? {
            self.recover_destination(record)?;
        }
        for record in records::<SourceRecord>(&self.nest, &labels, SOURCE)? {
            let images = images.remove(&record.plan.move_id).unwrap_or_default();
            self.recover_source(record, images)?;
        }
        Ok(())
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
    fn recover_arrival(&self, record: ArrivalRecord, waiting: &[&str]) -> io::Result<Option<Pid>> {
        let pid = record.pid;
        let host = self.nest.host_pid(pid)?;
        // It may wait for pages that no pager brings: better known as such than moved.
        let waits = host.is_some_and(|host| waiting.iter().any(|label| label.starts_with(&format!("{host}-"))));
        let images: BTreeMap<ImageId, MoveId> = record.images.into_iter().collect();
        let holders: BTreeMap<_, _> = images.keys().filter(|_| waits).map(|image| (image.holder, 1)).collect();
        self.residents.insert(
            pid,
            Resident {
                moves: record.moves,
                command: record.command,
                incarnation: record.incarnation,
                frozen: false,
                elsewhere: Arc::new(move || holders.clone()),
            },
        );
        self.arrivals.insert(
            pid,
            Arrival {
                ids: record.ids,
                images,
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
    fn recover_destination(&self, record: DestinationRecord) -> io::Result<()> {
        let id = record.move_id;
        let here = |pid: Pid| self.hidden.kind(pid).is_none() && self.nest.host_pid(pid).is_ok_and(|h| h.is_some());
        let found = if record.members.iter().any(|m| here(m.pid)) {
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
            mover.go_on_arriving(id, machine, &words);
            lock(&mover.destinations).remove(&id);
        })?;
        Ok(())
    }

    /// Serves the images of a move again, and goes on with it.
    fn recover_source(&self, record: SourceRecord, images: Vec<(ImageRecord, i32)>) -> io::Result<()> {
        let id = record.plan.move_id;
        let (sender, words) = channel();
        lock(&self.sources).insert(id, sender);
        for (image, keeper) in &images {
            let open = |name: &str| File::open(ProcDir::process(*keeper).path(name));
            let (mover, pid, destination) = (self.arc(), image.pid, record.plan.destination);
            self.images.register(NewImage {
                id: image.id,
                mem: open("mem")?,
                pagemap: open("pagemap")?,
                keeper: Some(*keeper),
                regions: image.regions.clone(),
                on_unused: Box::new(move |_| {
                    mover.to_source(id, SourceEvent::Drained(destination, pid));
                }),
            });
        }
        let mover = self.arc();
        std::thread::Builder::new().name("move again".into()).spawn(move || {
            outgoing::go_on(&mover, record, images, &words);
            lock(&mover.sources).remove(&id);
        })?;
        Ok(())
    }
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
