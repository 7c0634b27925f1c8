//! What init keeps of moves for the daemon that comes after this one.
//!
//! Owns the records of arrivals, images and undecided moves, and their labels. Refuses to know what is done with them:
//! `recover` reads them. Invariant: that an image was released is kept apart from the image's own record, for its pages can
//! all be fetched before it is known here that they may be: before there is a keeper, and a record, at all.

use super::Mover;
use crate::nest::Nest;
use crate::sockets::recovery::KeptSocket;
use dunlin_cluster::relocation::destination::DestinationRecord;
use dunlin_cluster::relocation::source::SourceRecord;
use dunlin_proto::ids::{ImageId, Incarnation, MoveId, Pid, RunId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;

pub(super) const ARRIVAL: &str = "arrival/";
pub(super) const IMAGE: &str = "image/";
pub(super) const SOURCE: &str = "source/";
pub(super) const DESTINATION: &str = "destination/";
/// All who needed the image of a process have said that they do not any more: by its move and its PID.
pub(super) const UNUSED: &str = "unused/";

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
    pub(super) arrival: ArrivalRecord,
    /// Those of its sockets that are in repair.
    pub(super) sockets: Vec<KeptSocket>,
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
    /// By which it is told from one of this number that has come back; unknown before the freeze.
    pub(super) arena: Option<u64>,
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
        tracing::debug!(by = %record.by, pid = %record.pid, keeper = %record.keeper, id = ?record.id, "an image is kept");
        let blob = postcard::to_stdvec(record).unwrap_or_default();
        let label = format!("{IMAGE}{}/{}", record.by, record.pid);
        self.log("keeping an image's record", self.nest.store(&label, &[], blob));
    }

    /// Everybody has released it; they hear that they have when this is written down, and do not come again.
    pub(super) fn image_is_unused(&self, by: MoveId, pid: Pid) {
        let kept = self.nest.store(&unused_label(by, pid), &[], Vec::new());
        self.log("noting that an image is not needed", kept);
    }

    /// Nobody needs it any more.
    pub(super) fn drop_image_record(&self, by: MoveId, pid: Pid) {
        let dropped = self.nest.drop_label(&format!("{IMAGE}{by}/{pid}"));
        self.log("dropping an image's record", dropped.map(drop));
        self.forget_unused(by, pid);
    }

    /// There is no such image any more, and there will be none.
    pub(super) fn forget_unused(&self, by: MoveId, pid: Pid) {
        let dropped = self.nest.drop_soon(&unused_label(by, pid));
        self.log("dropping what was noted of an image", dropped);
    }
}

/// Under which label it is kept that an image is not needed any more.
pub(super) fn unused_label(by: MoveId, pid: Pid) -> String {
    format!("{UNUSED}{by}/{pid}")
}

/// All that init keeps of one kind.
pub(super) fn records<T: DeserializeOwned>(nest: &Nest, labels: &[String], prefix: &str) -> io::Result<Vec<T>> {
    let mut found = Vec::new();
    for label in labels.iter().filter(|l| l.starts_with(prefix)) {
        if let Some((_, blob)) = nest.fetch(label)? {
            found.push(postcard::from_bytes(&blob).map_err(io::Error::other)?);
        }
    }
    Ok(found)
}
