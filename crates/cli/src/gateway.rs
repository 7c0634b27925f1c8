//! `dunlin gateway`: which node has which socket, as the gateway steers.

use crate::exit::{self, Outcome};
use crate::output::{self, Reader};
use crate::processes::bytes;
use crate::{Whom, table, terminal};
use dunlin_proto::control::{GatewayRow, Reply, Request};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;
use std::thread;
use std::time::Duration;

/// How often `--watch` looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The table as `--json` shows it: these names are relied on.
#[derive(Debug, Serialize)]
struct Json<'a> {
    gateway: &'a str,
    outside: &'a [String],
    entries: Vec<JsonRow<'a>>,
}

#[derive(Debug, Serialize)]
struct JsonRow<'a> {
    proto: &'a str,
    ip: u8,
    port: u16,
    peer: Option<&'a str>,
    node: &'a str,
    action: &'static str,
    learned: bool,
    epoch: u64,
    packets: u64,
    bytes: u64,
    idle_ms: Option<u64>,
}

/// What `--watch --json` prints, a line each.
#[derive(Debug, Serialize)]
struct JsonChange<'a> {
    change: &'static str,
    entry: JsonRow<'a>,
}

/// Names an entry.
type Key = (String, u8, u16, Option<String>);

/// Shows the gateway's table, and with `watch` how it changes until interrupted.
pub fn gateway(json: bool, watch: bool, whom: &Whom) -> Outcome {
    let (node, outside, mut rows) = ask(whom)?;
    if json && !watch {
        let entries = rows.iter().map(json_row).collect();
        return exit::print_json(&Json {
            gateway: &node,
            outside: &outside,
            entries,
        });
    }
    if !watch {
        exit::say(&format!("gateway {node}, outside address {}", outside.join(", ")));
        let width = terminal::size(io::stdout()).map(|size| usize::from(size.cols));
        return exit::print(&table::aligned(HEADINGS, rows.iter().map(cells), RIGHT, width));
    }
    let mut before = BTreeMap::new();
    loop {
        let now: BTreeMap<Key, GatewayRow> = rows.into_iter().map(|row| (key(&row), row)).collect();
        let lines = changes(&before, &now, json);
        if !lines.is_empty() && output::write(1, lines.as_bytes())? == Reader::Gone {
            return Ok(0);
        }
        before = now;
        thread::sleep(LOOK_EVERY);
        (_, _, rows) = ask(whom)?;
    }
}

fn ask(whom: &Whom) -> Result<(String, Vec<String>, Vec<GatewayRow>), exit::Failed> {
    match whom.ask(&Request::Gateway)? {
        Reply::Gateway { node, outside, rows } => Ok((node, outside, rows)),
        other => Err(exit::unexpected(other)),
    }
}

fn key(row: &GatewayRow) -> Key {
    (row.proto.clone(), row.ip, row.port, row.peer.clone())
}

/// New, changed and gone entries, a line each. Counters are no change.
fn changes(before: &BTreeMap<Key, GatewayRow>, now: &BTreeMap<Key, GatewayRow>, json: bool) -> String {
    let mut text = String::new();
    let mut tell = |sign: char, change: &'static str, row: &GatewayRow| {
        if json {
            let entry = json_row(row);
            text.push_str(&exit::json_line(&JsonChange { change, entry }));
        } else {
            let [proto, port, peer, node, action, ..] = cells(row);
            text.push_str(&format!("{sign} {proto} {port} {peer} {node} {action}\n"));
        }
    };
    for (key, row) in now {
        match before.get(key) {
            None => tell('+', "added", row),
            Some(old) if (&old.node, old.held) != (&row.node, row.held) => tell('~', "changed", row),
            Some(_) => {}
        }
    }
    for (_, row) in before.iter().filter(|(key, _)| !now.contains_key(*key)) {
        tell('-', "removed", row);
    }
    text
}

fn action(row: &GatewayRow) -> &'static str {
    if row.held { "hold" } else { "forward" }
}

fn json_row(row: &GatewayRow) -> JsonRow<'_> {
    JsonRow {
        proto: &row.proto,
        ip: row.ip,
        port: row.port,
        peer: row.peer.as_deref(),
        node: &row.node,
        action: action(row),
        learned: row.learned,
        epoch: row.epoch,
        packets: row.packets,
        bytes: row.bytes,
        idle_ms: row.idle_ms,
    }
}

const HEADINGS: [&str; 8] = ["PROTO", "PORT", "PEER", "NODE", "ACTION", "PACKETS", "BYTES", "IDLE"];
const RIGHT: [bool; 8] = [false, true, false, false, false, true, true, true];

fn cells(row: &GatewayRow) -> [String; 8] {
    let six = if row.ip == 6 { "6" } else { "" };
    [
        format!("{}{six}", row.proto),
        row.port.to_string(),
        row.peer.clone().unwrap_or_else(|| "*".into()),
        row.node.clone(),
        action(row).into(),
        row.packets.to_string(),
        bytes(row.bytes),
        row.idle_ms
            .map_or_else(|| "-".into(), |ms| format!("{}.{}s", ms / 1000, ms % 1000 / 100)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(node: &str, held: bool, packets: u64) -> GatewayRow {
        GatewayRow {
            proto: "tcp".into(),
            ip: 4,
            port: 6379,
            peer: None,
            node: node.into(),
            held,
            learned: false,
            epoch: 1,
            packets,
            bytes: 0,
            idle_ms: Some(1234),
        }
    }

    #[test]
    fn only_what_is_steered_otherwise_is_a_change() {
        let table = |row: GatewayRow| BTreeMap::from([(key(&row), row)]);
        let none = BTreeMap::new();
        let (at_one, counted) = (table(row("n1", false, 0)), table(row("n1", false, 9)));
        let (held, at_two) = (table(row("n1", true, 9)), table(row("n2", false, 9)));
        assert_eq!(changes(&none, &at_one, false), "+ tcp 6379 * n1 forward\n");
        assert_eq!(changes(&at_one, &counted, false), "");
        assert_eq!(changes(&counted, &held, false), "~ tcp 6379 * n1 hold\n");
        assert_eq!(changes(&held, &at_two, false), "~ tcp 6379 * n2 forward\n");
        assert_eq!(changes(&at_two, &none, false), "- tcp 6379 * n2 forward\n");
        let json = changes(&none, &at_one, true);
        assert!(
            json.starts_with(r#"{"change":"added","entry":{"proto":"tcp","ip":4,"port":6379,"#),
            "{json}"
        );
    }
}
