//! What the nest keeps of runs and relays for the next daemon: names and contents.
//!
//! Owns the format. Refuses to know the descriptors that go with it, but for their order. What does not parse, perhaps
//! because another version wrote it, is an error and not a guess.

use dunlin_proto::ids::{Pid, RunId};
use dunlin_proto::stream::{StreamKind, StreamRef};
use serde::{Deserialize, Serialize};
use std::io;

/// What sort of run it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sort {
    /// With three pipes.
    Pipes,
    /// With a terminal.
    Terminal,
    /// With a log.
    Detached,
}

/// A run; its descriptors are the far ends of `streams`, in that order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Its top process.
    pub pid: Pid,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// What sort.
    pub sort: Sort,
    /// Which streams have a far end.
    pub streams: Vec<StreamKind>,
}

/// A relay; its descriptor is the far end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayRecord {
    /// Its stream.
    pub stream: StreamRef,
}

/// What a label is for.
#[derive(Debug, PartialEq, Eq)]
pub enum Label {
    /// A run of this node.
    Run(u64),
    /// A relay.
    Relay,
}

/// The label of a run.
pub fn run_label(run: RunId) -> String {
    format!("run-{:016x}", run.nonce)
}

/// The label of a relay.
pub fn relay_label(relay: u64) -> String {
    format!("relay-{relay:016x}")
}

/// `None`: somebody else's.
pub fn parse_label(label: &str) -> Option<Label> {
    if let Some(nonce) = label.strip_prefix("run-") {
        return u64::from_str_radix(nonce, 16).ok().map(Label::Run);
    }
    label.strip_prefix("relay-").map(|_| Label::Relay)
}

impl RunRecord {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// From its bytes.
    pub fn decode(bytes: &[u8]) -> io::Result<RunRecord> {
        postcard::from_bytes(bytes).map_err(invalid)
    }
}

impl RelayRecord {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// From its bytes.
    pub fn decode(bytes: &[u8]) -> io::Result<RelayRecord> {
        postcard::from_bytes(bytes).map_err(invalid)
    }
}

fn encode(record: &impl Serialize) -> Vec<u8> {
    postcard::to_allocvec(record).expect("plain data always has bytes")
}

fn invalid(error: postcard::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}
