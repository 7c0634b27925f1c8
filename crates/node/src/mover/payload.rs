//! What source and destination put into the payloads of a move's messages.
//!
//! Owns these types; the protocol passes them through unread.

use crate::signals::orders::Obeyed;
use dunlin_proto::ids::{ImageId, MoveId, Pid};
use dunlin_proto::image::{Essence, FrozenSocket, Plan};
use dunlin_proto::pages::MapImage;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// For the destination to prepare from: one per process, parents first.
#[derive(Debug, Serialize, Deserialize)]
pub struct Prepare {
    /// The processes.
    pub processes: Vec<Prepared>,
}

/// One process of a [`Prepare`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Prepared {
    /// What it is.
    pub plan: Plan,
    /// Under which name its pages will be served.
    pub image: ImageId,
    /// How far its time namespace's monotonic clocks are from those of its node, nanoseconds.
    pub clock_offsets_ns: [i64; 2],
    /// Its pages are served from now on, while it runs.
    pub ahead: bool,
}

/// What travels inside the freeze: one per process, in the same order.
#[derive(Debug, Serialize, Deserialize)]
pub struct Frozen {
    /// The processes.
    pub processes: Vec<FrozenProcess>,
    /// Their sockets.
    pub sockets: Vec<FrozenSocket>,
}

/// One process of a [`Frozen`].
#[derive(Debug, Serialize, Deserialize)]
pub struct FrozenProcess {
    /// What it is now.
    pub essence: Essence,
    /// Where its pages are, if some were still elsewhere.
    pub map: Option<MapImage>,
    /// What its memory is, if the copy is to be compared with it before it may run.
    pub digest: Option<crate::verify::Digest>,
    /// Which move left each image that the map names.
    pub images: Vec<(ImageId, MoveId)>,
    /// The last order of each node that it has obeyed.
    pub obeyed: Obeyed,
    /// If its pages were served ahead: what of them has to be forgotten.
    pub ahead: Option<Ahead>,
}

/// The end of what was sent ahead of the freeze.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ahead {
    /// What was fetched of these pages (first address, number of pages) may be older than their last write.
    pub stale: Vec<(u64, u64)>,
    /// It is not to run before all its pages have come.
    pub all_first: bool,
}

/// Which processes are proposed, for the destination's first look.
#[derive(Debug, Serialize, Deserialize)]
pub struct Proposal {
    /// The processes, the root first.
    pub pids: Vec<Pid>,
    /// Their resident memory.
    pub resident_bytes: u64,
    /// CPU features that the source has.
    pub cpu_features: Vec<String>,
}

/// Postcard bytes of a payload. A payload always encodes.
pub fn encode<T: Serialize>(payload: &T) -> Vec<u8> {
    postcard::to_stdvec(payload).unwrap_or_default()
}

/// A payload from a peer.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    postcard::from_bytes(bytes).map_err(|e| format!("a payload does not parse: {e}"))
}
