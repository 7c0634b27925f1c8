//! `dunlin ps` and `kill`.

use crate::exit::{self, Outcome};
use crate::{Whom, table, terminal};
use dunlin_proto::control::{ProcessRow, Reply, Request};
use dunlin_proto::ids::Pid;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;

/// A process as `ps --json` shows it: these names are relied on.
#[derive(Debug, Serialize)]
struct JsonRow<'a> {
    pid: i32,
    ppid: i32,
    home: &'a str,
    node: &'a str,
    state: char,
    threads: u32,
    rss_bytes: u64,
    pages_elsewhere: &'a BTreeMap<String, u64>,
    moves: u32,
    user: &'a str,
    command: &'a str,
}

/// Shows every process of the cluster.
pub fn ps(json: bool, whom: &Whom) -> Outcome {
    let (rows, silent) = match whom.ask(&Request::Ps { local: false })? {
        Reply::Processes { rows, silent } => (rows, silent),
        other => return Err(exit::unexpected(other)),
    };
    if !silent.is_empty() {
        let plural = if silent.len() == 1 { "does" } else { "do" };
        exit::say(&format!(
            "{} {plural} not answer: what runs there is missing from this list",
            silent.join(", ")
        ));
    }
    if json {
        return exit::print_json(&rows.iter().map(json_row).collect::<Vec<_>>());
    }
    let width = terminal::size(io::stdout()).map(|size| usize::from(size.cols));
    exit::print(&table(&rows, width))
}

/// Sends a signal.
pub fn kill(pid: Pid, signal: i32, whom: &Whom) -> Outcome {
    match whom.ask(&Request::Kill { pid, signal })? {
        Reply::Done => Ok(0),
        other => Err(exit::unexpected(other)),
    }
}

fn json_row(row: &ProcessRow) -> JsonRow<'_> {
    JsonRow {
        pid: row.pid.0,
        ppid: row.ppid.0,
        home: &row.home,
        node: &row.node,
        state: row.state,
        threads: row.threads,
        rss_bytes: row.rss_bytes,
        pages_elsewhere: &row.pages_elsewhere,
        moves: row.moves,
        user: &row.user,
        command: &row.command,
    }
}

const HEADINGS: [&str; 11] = [
    "PID",
    "PPID",
    "HOME",
    "NODE",
    "S",
    "THR",
    "RSS",
    "ELSEWHERE",
    "MOVES",
    "USER",
    "COMMAND",
];
/// Numbers are aligned at their last digit.
const RIGHT: [bool; 11] = [true, true, false, false, false, true, true, false, true, false, false];

/// The table, each line cut to the width if there is one.
fn table(rows: &[ProcessRow], width: Option<usize>) -> String {
    table::aligned(HEADINGS, rows.iter().map(cells), RIGHT, width)
}

fn cells(row: &ProcessRow) -> [String; 11] {
    let elsewhere: Vec<String> = row
        .pages_elsewhere
        .iter()
        .map(|(node, pages)| format!("{node}:{pages}"))
        .collect();
    [
        row.pid.to_string(),
        row.ppid.to_string(),
        row.home.clone(),
        row.node.clone(),
        row.state.to_string(),
        row.threads.to_string(),
        bytes(row.rss_bytes),
        if elsewhere.is_empty() {
            "-".into()
        } else {
            elsewhere.join(",")
        },
        row.moves.to_string(),
        row.user.clone(),
        plain(&row.command),
    ]
}

/// A size for people: three digits and a unit.
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "K", "M", "G", "T"] {
        if value < 999.5 || unit == "T" {
            let digits = usize::from(value < 9.95 && unit != "B");
            return format!("{value:.digits$}{unit}");
        }
        value /= 1024.0;
    }
    unreachable!("the last unit takes everything")
}

/// What a program calls itself, without what would command the terminal.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pid: i32, command: &str) -> ProcessRow {
        ProcessRow {
            pid: Pid(pid),
            ppid: Pid(1),
            home: "n1".into(),
            node: "n2".into(),
            state: 'S',
            threads: 4,
            rss_bytes: 12_900_000,
            pages_elsewhere: [("n1".to_owned(), 2048), ("n3".to_owned(), 7)].into(),
            moves: 3,
            user: "root".into(),
            command: command.into(),
        }
    }

    #[test]
    fn the_table_is_aligned_and_cut() {
        let rows = [
            row(129, "python3 -c \u{1b}[2Jx"),
            ProcessRow {
                pages_elsewhere: [].into(),
                ..row(12_865, "sleep 9")
            },
        ];
        assert_eq!(
            table(&rows, None),
            "  PID PPID HOME NODE S THR RSS ELSEWHERE    MOVES USER COMMAND\n\
             \x20 129    1 n1   n2   S   4 12M n1:2048,n3:7     3 root python3 -c ?[2Jx\n\
             12865    1 n1   n2   S   4 12M -                3 root sleep 9\n"
        );
        assert!(table(&rows, Some(20)).lines().all(|l| l.chars().count() <= 20));
    }

    #[test]
    fn sizes_have_three_digits() {
        let cases = [
            (0, "0B"),
            (999, "999B"),
            (4096, "4.0K"),
            (12_900_000, "12M"),
            (1 << 20, "1.0M"),
            (5 << 40, "5.0T"),
        ];
        for (value, text) in cases {
            assert_eq!(bytes(value), text);
        }
    }
}
