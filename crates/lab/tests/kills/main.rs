//! A daemon is killed in the middle of a move: there is one program, and it goes on.
//!
//! At every step of it, counted by a fuse in the daemon (every so many of them in one run; `DUNLIN_KILL_STRIDE=1` takes
//! all), and at moments of the clock. The test ends at `never two`: each order is answered once. A sweep has an end: it
//! has at most [`LONGEST`] steps each way, and moves that are refused are attempted again for at most
//! [`PATIENCE`].

#[path = "../support/mod.rs"]
mod support;
mod traveller;

use dunlin_lab::harness::request;
use dunlin_proto::control::{MoveRequest, WaitFor};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use traveller::{Outlived, Traveller};

/// No move has so many steps.
const LONGEST: u64 = 5_000;
/// How long a former move may take until it is given up.
const PATIENCE: Duration = Duration::from_secs(20);

/// Which daemon is killed.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    Source,
    Destination,
    /// Of a process that moves between two other nodes.
    Home,
    /// The destination's, and then the source's at once.
    Both,
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|n| n.parse().ok())
}

/// A daemon dies at every step of its part in a move, there and back: every so many of them, from another first one in
/// each run.
fn killed_at_every_step(name: &str, role: Role, children: usize, stride: u64) {
    let stride = number("DUNLIN_KILL_STRIDE").unwrap_or(stride);
    let first = number("DUNLIN_KILL_FIRST").unwrap_or_else(|| u64::from(std::process::id()) % stride + 1);
    let mut traveller = Traveller::start(name, 4, children);
    if role == Role::Home {
        traveller.moves_on_to("n2");
        (traveller.between, traveller.asked) = (["n2", "n3"], "n2");
    }
    // How far each way has been gone through, and whether that is all.
    let ways = traveller.between.map(|at| (at.to_owned(), (first, false)));
    let mut ways: BTreeMap<String, (u64, bool)> = ways.into();
    let (mut moved, mut stayed) = (0, 0);
    let mut deadline = Instant::now() + PATIENCE;
    while ways.values().any(|(_, done)| !done) {
        let (from, to) = (traveller.at.clone(), traveller.other());
        let (steps, done) = ways[&from];
        if done {
            traveller.moves_on_to(to);
            continue;
        }
        assert!(steps < LONGEST, "a move from {from} to {to} does not end");
        let killed = match role {
            Role::Source => from.as_str(),
            Role::Destination | Role::Both => to,
            Role::Home => "n1",
        };
        let with_it = (role == Role::Both).then_some(from.as_str());
        let when = format!("{killed} was killed at step {steps} of a move from {from} to {to}");
        println!("{when}");
        let outlived = traveller.move_with_fuse(to, killed, steps, with_it);
        traveller.check(&when);
        if let Outlived::Refused(why) = outlived {
            // Where a former move is still being given up, or carried through, it is asked for once more.
            assert!(Instant::now() < deadline, "there is no move: {why}: {when}");
            continue;
        }
        deadline = Instant::now() + PATIENCE;
        if traveller.at == from {
            stayed += 1;
        } else {
            moved += 1;
        }
        ways.insert(from, (steps + stride, outlived == Outlived::Moved));
    }
    println!("moved {moved} times, stayed {stayed} times: {ways:?}");
    assert!(moved > 0, "these are not the steps of a move");
    traveller.goes_round();
}

#[test]
fn a_source_killed_at_any_step_leaves_one_program() {
    killed_at_every_step("source-steps", Role::Source, 0, 41);
}

#[test]
fn a_destination_killed_at_any_step_leaves_one_program() {
    killed_at_every_step("destination-steps", Role::Destination, 0, 17);
}

#[test]
fn a_home_killed_at_any_step_leaves_one_program() {
    killed_at_every_step("home-steps", Role::Home, 0, 3);
}

#[test]
fn two_daemons_killed_at_any_step_leave_one_program() {
    killed_at_every_step("both-steps", Role::Both, 0, 19);
}

#[test]
fn a_source_killed_at_any_step_leaves_one_family() {
    killed_at_every_step("source-tree", Role::Source, 1, 97);
}

#[test]
fn a_destination_killed_at_any_step_leaves_one_family() {
    killed_at_every_step("destination-tree", Role::Destination, 1, 37);
}

/// A move there and back, again and again, while a daemon is killed at a moment of the clock, which is nobody's step.
fn killed_at_any_time(name: &str, role: Role) {
    let mut traveller = Traveller::start(name, 24, 0);
    // From before the move to after it, whatever this machine is doing besides.
    let asked = Instant::now();
    traveller.move_to("n2").expect("a move of which nobody dies");
    let whole = asked.elapsed();
    traveller.check("on its way");
    let (mut moved, mut stayed) = (0, 0);
    for step in 0..20 {
        let delay = whole * step / 14;
        let (from, to) = (traveller.at.clone(), traveller.other());
        let killed = if role == Role::Source { from.as_str() } else { to };
        traveller.move_and_kill_after(to, killed, delay);
        traveller.check(&format!(
            "{killed} was killed {delay:?} after a move from {from} to {to} was asked for"
        ));
        if traveller.at == from {
            stayed += 1;
        } else {
            moved += 1;
        }
    }
    // How many of each depends on how busy the machine is.
    println!("moved {moved} times, stayed {stayed} times");
    traveller.goes_round();
}

#[test]
fn a_source_killed_at_any_time_leaves_one_program() {
    killed_at_any_time("source-dies", Role::Source);
}

#[test]
fn a_destination_killed_at_any_time_leaves_one_program() {
    killed_at_any_time("destination-dies", Role::Destination);
}

/// Whoever holds pages dies while they are fetched, and the program moves on meanwhile.
#[test]
fn a_daemon_killed_while_its_pages_are_fetched_loses_none_of_them() {
    let mut traveller = Traveller::start("drain-dies", 128, 0);
    for (killed, to) in [
        ("n1", "n2"),
        ("n2", "n3"),
        ("n2", "n1"),
        ("n3", "n2"),
        ("n2", "n3"),
        ("n3", "n1"),
    ] {
        let from = traveller.at.clone();
        let asked = MoveRequest {
            wait: WaitFor::Resumed,
            ..request(traveller.pid(), to)
        };
        let deadline = Instant::now() + PATIENCE;
        while let Err(why) = traveller.lab.move_as(asked.clone()) {
            assert!(Instant::now() < deadline, "moving on to {to}: {why:#?}");
        }
        traveller.lab.signal_daemon(killed, 9);
        traveller.lab.start_daemon(killed);
        traveller.at = to.to_owned();
        // Not checked here: that would fetch all, and the next move is to find pages elsewhere.
        traveller
            .program()
            .ask(&format!("'{killed} was killed after a move from {from} to {to}'"));
    }
    traveller.check("after its journey");
    traveller.goes_round();
}
