//! What `up` wrote down about a lab: its nodes and their daemons.
//!
//! A convenience for `status` and `exec`; `down` does not need it.

use crate::error::LabError;
use crate::layout::Layout;
use crate::processes::Identity;
use serde::{Deserialize, Serialize};
use std::fs;
use std::net::Ipv4Addr;

/// A lab as it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The PID modulus of the cluster.
    pub modulus: u16,
    /// Its nodes, by slot.
    pub nodes: Vec<NodeRecord>,
    /// The node that is the gateway.
    pub gateway: String,
}

/// A node as it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// `n1`, `n2`, …
    pub name: String,
    /// The number in its name.
    pub slot: u16,
    /// On the lab's link.
    pub address: Ipv4Addr,
    /// Its daemon as first started.
    pub daemon: Option<Identity>,
}

impl Record {
    /// Writes it, whole or not at all.
    pub fn write(&self, layout: &Layout) -> Result<(), LabError> {
        let path = layout.dir().join("lab.json");
        let fresh = layout.dir().join("lab.json.new");
        let text = serde_json::to_string_pretty(self).expect("a record has only strings and numbers");
        fs::write(&fresh, text).map_err(LabError::io("write", &fresh))?;
        fs::rename(&fresh, &path).map_err(LabError::io("write", &path))
    }

    /// Reads it back.
    pub fn read(layout: &Layout) -> Result<Record, LabError> {
        let path = layout.dir().join("lab.json");
        let text = fs::read_to_string(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => LabError::NoLab {
                name: layout.name.to_string(),
            },
            _ => LabError::io("read", &path)(e),
        })?;
        serde_json::from_str(&text).map_err(|e| LabError::io("read", &path)(e.into()))
    }

    /// The node of this name.
    pub fn node(&self, layout: &Layout, name: &str) -> Result<&NodeRecord, LabError> {
        self.nodes
            .iter()
            .find(|n| n.name == name)
            .ok_or_else(|| LabError::NoNode {
                lab: layout.name.to_string(),
                node: name.into(),
                nodes: self
                    .nodes
                    .iter()
                    .map(|n| n.name.as_str())
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }
}
