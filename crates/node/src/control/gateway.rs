//! The gateway's table, for people.
//!
//! Owns how an entry reads. Refuses to know who asks: where a socket is, is no secret, and everybody can try a port.

use crate::daemon::node::{Node, failure};
use crate::edge::Entry;
use dunlin_proto::control::{Failure, FailureKind, GatewayRow, Reply};
use dunlin_proto::endpoint::Family;
use dunlin_proto::ids::Slot;

/// So many entries are shown, the first ones by port: more do not fit an answer.
const MAX_ROWS: usize = 20_000;

/// The node that has the role.
pub fn holder(node: &Node) -> Result<Slot, Failure> {
    let network = node.config.network.as_ref();
    let name = network.and_then(|network| network.gateway.as_deref());
    name.and_then(|name| node.config.slot_of(name)).ok_or_else(|| {
        failure(
            FailureKind::Invalid,
            "this cluster has no gateway",
            Some("`gateway` in the [network] section of the nodes' configuration names one"),
        )
    })
}

/// The table of this node.
pub fn table(node: &Node) -> Result<Reply, Failure> {
    let mut entries = node
        .edge
        .entries()
        .map_err(|e| failure(FailureKind::Other, e.to_string(), None))?;
    entries.sort_by_key(|entry| entry.endpoint);
    entries.truncate(MAX_ROWS);
    let network = node.config.network.as_ref();
    let four = network.and_then(|network| network.outside).map(|a| a.to_string());
    let six = network.and_then(|network| network.outside6).map(|a| a.to_string());
    Ok(Reply::Gateway {
        node: node.config.name.clone(),
        outside: four.into_iter().chain(six).collect(),
        rows: entries.into_iter().map(|entry| row(node, &entry)).collect(),
    })
}

fn row(node: &Node, entry: &Entry) -> GatewayRow {
    GatewayRow {
        proto: entry.endpoint.proto.to_string(),
        ip: match entry.endpoint.family {
            Family::V4 => 4,
            Family::V6 => 6,
        },
        port: entry.endpoint.port,
        peer: entry.endpoint.peer().map(|peer| peer.to_string()),
        node: node.config.name_of(entry.node),
        held: entry.held,
        learned: entry.learned,
        epoch: entry.epoch,
        packets: entry.packets,
        bytes: entry.bytes,
        idle_ms: entry.idle.map(|idle| idle.as_millis() as u64),
    }
}
