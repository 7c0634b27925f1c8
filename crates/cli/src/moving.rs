//! `dunlin move` and `can-move`.
//!
//! Owns the words and the JSON of moves and of what is in their way.

use crate::connect::lost;
use crate::exit::{self, Failed, Outcome, REFUSED};
use crate::processes::bytes;
use crate::progress::ProgressLine;
use crate::{MoveArgs, Whom};
use dunlin_proto::control::{MoveMode, MoveReport, MoveRequest, Obstacle, Reply, Request, Side, Step};
use dunlin_proto::ids::Pid;
use serde::Serialize;
use std::fmt::Write as _;

/// A move as `move --json` shows it: these names are relied on.
#[derive(Debug, Serialize)]
struct JsonStep<'a> {
    side: &'static str,
    step: &'a str,
    us: f64,
}

#[derive(Debug, Serialize)]
struct JsonReport<'a> {
    pid: i32,
    from: &'a str,
    to: &'a str,
    mode: &'static str,
    freeze_ms: f64,
    essence_bytes: u64,
    prepare_ms: f64,
    resumed_ms: f64,
    drained_ms: Option<f64>,
    pages_faulted: u64,
    pages_pushed: u64,
    faults_avoided_ratio: f64,
    fault_us: JsonQuantiles,
    /// Of `--verify` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    verified_pages: Option<u64>,
    phases_us: Vec<JsonStep<'a>>,
}

#[derive(Debug, Serialize)]
struct JsonQuantiles {
    p50: f64,
    p99: f64,
}

/// An answer of `can-move --json`, and of a refused `move --json`.
#[derive(Debug, Serialize)]
struct JsonVerdict<'a> {
    pid: i32,
    to: Option<&'a str>,
    movable: bool,
    obstacles: Vec<JsonObstacle<'a>>,
}

#[derive(Debug, Serialize)]
struct JsonObstacle<'a> {
    pid: i32,
    kind: &'a str,
    object: &'a str,
    why: &'a str,
    hint: &'a str,
}

/// Moves a process.
pub fn main(args: MoveArgs, whom: &Whom) -> Outcome {
    let pid = args.pid;
    let request = MoveRequest {
        pid,
        to: args.to.clone(),
        tree: args.tree,
        mode: args.mode.into(),
        wait: args.wait.into(),
        verify: args.verify,
    };
    let mut connection = whom.connect()?;
    connection
        .send(&Request::Move(request))
        .map_err(|e| lost(&connection, &e))?;
    let mut line = ProgressLine::new();
    let reply = loop {
        match connection.receive() {
            Ok(Reply::Progress(progress)) => line.show(&progress, &args.to),
            other => break other,
        }
    };
    drop(line);
    match reply.map_err(|e| lost(&connection, &e))? {
        Reply::Moved(reports) => moved(&reports, &args),
        Reply::Refused(obstacles) => {
            if args.json {
                exit::print_json(&json_verdict(pid, Some(&args.to), &obstacles))?;
            }
            Err(refused(
                &format!("process {pid} does not move to {} and runs on where it was", args.to),
                &obstacles,
            ))
        }
        other => Err(exit::unexpected(other)),
    }
}

/// Asks whether a process would move.
pub fn can_move(pid: Pid, to: Option<String>, json: bool, whom: &Whom) -> Outcome {
    let obstacles = match whom.ask(&Request::CanMove { pid, to: to.clone() })? {
        Reply::Verdict(obstacles) | Reply::Refused(obstacles) => obstacles,
        other => return Err(exit::unexpected(other)),
    };
    let place = to.as_deref().map_or_else(String::new, |to| format!(" to {to}"));
    if json {
        exit::print_json(&json_verdict(pid, to.as_deref(), &obstacles))?;
        return Ok(if obstacles.is_empty() { 0 } else { REFUSED });
    }
    if obstacles.is_empty() {
        return exit::print(&format!("yes: process {pid} can move{place}\n"));
    }
    exit::print(&format!("no: process {pid} cannot move{place}\n"))?;
    exit::print(&obstacle_lines(&obstacles))?;
    Ok(REFUSED)
}

fn moved(reports: &[MoveReport], args: &MoveArgs) -> Outcome {
    match (args.json, args.tree, reports) {
        (true, false, [report]) => exit::print_json(&json_report(report)),
        (true, _, reports) => exit::print_json(&reports.iter().map(json_report).collect::<Vec<_>>()),
        (false, _, reports) => exit::print(&reports.iter().map(sentence).collect::<String>()),
    }
}

fn refused(what: &str, obstacles: &[Obstacle]) -> Failed {
    Failed::new(REFUSED, format!("{what}\n{}", obstacle_lines(obstacles).trim_end()))
}

fn obstacle_lines(obstacles: &[Obstacle]) -> String {
    let mut text = String::new();
    for o in obstacles {
        writeln!(
            text,
            "process {}: {} {}: {}\n  hint: {}",
            o.pid, o.kind, o.object, o.why, o.hint
        )
        .expect("strings grow");
    }
    text
}

fn sentence(r: &MoveReport) -> String {
    let mut text = format!(
        "process {} moved from {} to {} ({}): stopped for {} ms, runs there after {} ms",
        r.pid,
        r.from,
        r.to,
        mode_name(r.mode),
        ms(r.freeze_ms),
        ms(r.resumed_ms)
    );
    if let Some(drained) = r.drained_ms {
        write!(text, ", all there after {} ms", ms(drained)).expect("strings grow");
    }
    write!(
        text,
        "; essence {}, {} pages waited for, {} pushed",
        bytes(r.essence_bytes),
        r.pages_faulted,
        r.pages_pushed
    )
    .expect("strings grow");
    if let Some(pages) = r.verified_pages {
        write!(text, "; both copies compared: {pages} pages and all else equal").expect("strings grow");
    }
    text + "\n"
}

fn ms(value: f64) -> String {
    let digits = if value < 9.995 { 2 } else { 0 };
    format!("{value:.digits$}")
}

fn mode_name(mode: MoveMode) -> &'static str {
    match mode {
        MoveMode::Demand => "demand",
        MoveMode::Precopy => "precopy",
        MoveMode::Hybrid => "hybrid",
    }
}

fn json_report(r: &MoveReport) -> JsonReport<'_> {
    JsonReport {
        pid: r.pid.0,
        from: &r.from,
        to: &r.to,
        mode: mode_name(r.mode),
        freeze_ms: r.freeze_ms,
        essence_bytes: r.essence_bytes,
        prepare_ms: r.prepare_ms,
        resumed_ms: r.resumed_ms,
        drained_ms: r.drained_ms,
        pages_faulted: r.pages_faulted,
        pages_pushed: r.pages_pushed,
        faults_avoided_ratio: r.faults_avoided_ratio,
        fault_us: JsonQuantiles {
            p50: r.fault_us.p50,
            p99: r.fault_us.p99,
        },
        verified_pages: r.verified_pages,
        phases_us: r.steps.iter().map(json_step).collect(),
    }
}

fn json_step(step: &Step) -> JsonStep<'_> {
    JsonStep {
        side: match step.side {
            Side::Source => "source",
            Side::Destination => "destination",
        },
        step: &step.name,
        us: step.us,
    }
}

fn json_verdict<'a>(pid: Pid, to: Option<&'a str>, obstacles: &'a [Obstacle]) -> JsonVerdict<'a> {
    let json = |o: &'a Obstacle| JsonObstacle {
        pid: o.pid.0,
        kind: &o.kind,
        object: &o.object,
        why: &o.why,
        hint: &o.hint,
    };
    JsonVerdict {
        pid: pid.0,
        to,
        movable: obstacles.is_empty(),
        obstacles: obstacles.iter().map(json).collect(),
    }
}
