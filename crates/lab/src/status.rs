//! What a lab is like just now, for people and as JSON.

use crate::control;
use crate::error::LabError;
use crate::layout::Layout;
use crate::record::{NodeRecord, Record};
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// A lab.
#[derive(Debug, Clone, Serialize)]
pub struct LabStatus {
    /// Its name.
    pub name: String,
    /// The cluster's PID modulus.
    pub modulus: u16,
    /// Every node answers and sees all its peers.
    pub ready: bool,
    /// The node that the outside host is linked to.
    pub gateway: String,
    /// Where the outside host reaches programs of the cluster.
    pub outside_address: Ipv4Addr,
    /// The same of IPv6.
    pub outside_address6: Ipv6Addr,
    /// The address that programs have, on whichever node.
    pub inside_address: Ipv4Addr,
    /// The same of IPv6.
    pub inside_address6: Ipv6Addr,
    /// By slot.
    pub nodes: Vec<NodeRow>,
}

/// One node of it.
#[derive(Debug, Clone, Serialize)]
pub struct NodeRow {
    /// `n1`, `n2`, …
    pub name: String,
    /// Its slot.
    pub slot: u16,
    /// On the lab's link.
    pub address: Ipv4Addr,
    /// The address that programs of the cluster are reached by, where it is the gateway; else `null`.
    pub outside_address: Option<String>,
    /// It answers and sees all its peers.
    pub ready: bool,
    /// Why it is not.
    pub problem: Option<String>,
    /// On the machine; `null` when it does not answer and the one that was started is gone.
    pub daemon_pid: Option<i32>,
    /// PID 1 of its nest, on the machine.
    pub init_pid: Option<i32>,
    /// How many processes run in its nest.
    pub processes: Option<u32>,
    /// Its peers, and whether it sees them.
    pub peers: BTreeMap<String, bool>,
}

/// Asks every node of a lab.
pub fn status(layout: &Layout) -> Result<LabStatus, LabError> {
    let record = Record::read(layout)?;
    let (outside, inside) = (layout.outside(), layout.inside());
    let mut nodes: Vec<NodeRow> = record.nodes.iter().map(|node| row(layout, node)).collect();
    if let Some(gateway) = nodes.iter_mut().find(|n| n.name == record.gateway) {
        gateway.outside_address = Some(outside.0.to_string());
    }
    Ok(LabStatus {
        name: layout.name.to_string(),
        modulus: record.modulus,
        ready: nodes.iter().all(|n| n.ready),
        gateway: record.gateway,
        outside_address: outside.0,
        outside_address6: outside.1,
        inside_address: inside.0,
        inside_address6: inside.1,
        nodes,
    })
}

fn row(layout: &Layout, node: &NodeRecord) -> NodeRow {
    let mut row = NodeRow {
        name: node.name.clone(),
        slot: node.slot,
        address: node.address,
        outside_address: None,
        ready: false,
        problem: None,
        daemon_pid: node.daemon.filter(|d| d.is_alive()).map(|d| d.pid),
        init_pid: None,
        processes: None,
        peers: BTreeMap::new(),
    };
    match control::status(&layout.control_socket(&node.name), Duration::from_secs(2)) {
        Ok(status) => {
            row.daemon_pid = Some(status.daemon_pid);
            row.init_pid = Some(status.init_pid);
            row.processes = Some(status.processes);
            row.peers = status.peers;
            let unseen: Vec<&str> = row.peers.iter().filter(|p| !p.1).map(|p| p.0.as_str()).collect();
            row.ready = unseen.is_empty();
            row.problem = (!row.ready).then(|| format!("does not see {}", unseen.join(", ")));
        }
        Err(why) => row.problem = Some(why),
    }
    row
}
