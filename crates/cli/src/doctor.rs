//! `dunlin doctor`: is this machine fit for dunlin, and what follows where it is not?
//!
//! Owns the list of what dunlin needs, with the reason for each. The attempts themselves are `dunlin_sys::probe`'s.

mod checks;
mod outside;

use crate::exit::{self, FAILED, Outcome};
use clap::Args;
use serde::Serialize;
use std::fmt::Write as _;
use std::path::PathBuf;

/// `dunlin doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// As JSON: an array of {name, status (ok, note or missing), found, purpose, consequence, hint}
    #[arg(long)]
    json: bool,
    /// Check this node configuration too
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// How one check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// Worse than it could be; dunlin works.
    Note,
    /// dunlin does not work without it.
    Missing,
}

/// One check.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    status: Status,
    /// What was found.
    found: String,
    /// What dunlin uses it for.
    purpose: &'static str,
    /// What follows if it is not there; empty if it is.
    consequence: &'static str,
    /// What to do about that; empty if it is there.
    hint: String,
}

/// Checks the machine.
pub fn main(args: DoctorArgs) -> Outcome {
    let mut rows = checks::all(args.config.as_deref());
    rows.extend(args.config.as_deref().and_then(outside::row));
    if args.json {
        exit::print_json(&rows)
    } else {
        exit::print(&report(&rows))
    }?;
    Ok(if rows.iter().any(|r| r.status == Status::Missing) {
        FAILED
    } else {
        0
    })
}

fn report(rows: &[Row]) -> String {
    let mut text = String::new();
    let width = rows.iter().map(|r| r.name.chars().count()).max().unwrap_or(0);
    for row in rows {
        let status = match row.status {
            Status::Ok => "ok",
            Status::Note => "note",
            Status::Missing => "MISSING",
        };
        writeln!(text, "{status:<8}{:<width$}  {}", row.name, row.found).expect("strings grow");
        if row.status != Status::Ok {
            let indent = " ".repeat(8);
            writeln!(
                text,
                "{indent}for: {}\n{indent}without it: {}",
                row.purpose, row.consequence
            )
            .expect("strings grow");
            writeln!(text, "{indent}hint: {}", row.hint).expect("strings grow");
        }
    }
    let count = |status| rows.iter().filter(|r| r.status == status).count();
    match count(Status::Missing) {
        0 => writeln!(text, "\nthis machine can be a node ({} notes)", count(Status::Note)),
        n => writeln!(
            text,
            "\nthis machine cannot be a node: {n} of {} checks failed",
            rows.len()
        ),
    }
    .expect("strings grow");
    text
}
