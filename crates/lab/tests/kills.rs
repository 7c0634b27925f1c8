//! A daemon is killed in the middle of a move: there is one program, and it goes on.
//!
//! At every step of it, counted by a fuse in the daemon (every so many of them in one run; `DUNLIN_KILL_STRIDE=1` takes
//! all), and at moments of the clock. The test ends at `never two`: each order is answered once.

mod support;

use dunlin_lab::harness::request;
use dunlin_lab::{Lab, Options};
use dunlin_proto::control::{MoveRequest, WaitFor};
use dunlin_proto::ids::Pid;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use support::Workshop;
use support::obedient::Obedient;

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

/// What became of a daemon with a fuse.
#[derive(Clone, Copy, PartialEq)]
enum Outlived {
    /// It died in the move.
    No,
    /// The move was made before.
    Moved,
    /// There was none.
    Refused,
}

/// A program of several threads with memory that can be told again, or a family of two, and the lab it goes round in.
struct Traveller {
    lab: Lab,
    workshop: Workshop,
    /// The first one is moved, the others with it.
    family: Vec<(String, Obedient)>,
    digest: String,
    /// The two nodes between which it goes, and the one that is asked to move it.
    between: [&'static str; 2],
    asked: &'static str,
    at: String,
}

impl Traveller {
    fn start(name: &str, mib: u32, children: usize) -> Traveller {
        let lab = Lab::up(name, &Options::default());
        let workshop = Workshop::new(name);
        let (mut program, _) = Obedient::start(&lab, &workshop, "program");
        program.ask(&format!("memory = random.Random(3).randbytes(1 << 20) * {mib}"));
        let digest = program.ask("hashlib.sha256(memory).hexdigest()");
        let mut family = vec![("program".to_owned(), program)];
        for child in 0..children {
            let name = format!("child{child}");
            let forked = family[0].1.fork(&name);
            family.push((name, forked));
        }
        for (_, program) in &mut family {
            program.ask("import threading");
            program.ask("turns = [0, 0]");
            for thread in 0..2 {
                program.ask(&format!(
                    "exec('def turn():\\n while 1:\\n  turns[{thread}] += 1; time.sleep(0.001)', globals())"
                ));
                program.ask("threading.Thread(target=turn, daemon=True).start()");
            }
        }
        Traveller {
            lab,
            workshop,
            family,
            digest,
            between: ["n1", "n2"],
            asked: "n3",
            at: "n1".to_owned(),
        }
    }

    fn pid(&self) -> Pid {
        self.family[0].1.pid
    }

    /// The other one of the two nodes.
    fn other(&self) -> &'static str {
        let [one, other] = self.between;
        if self.at == one { other } else { one }
    }

    /// Has a node ask for a move; whatever comes of it.
    fn move_to(&self, to: &str) -> bool {
        let number = self.pid().to_string();
        let mut words = vec!["--node", self.asked, "move", &number, to, "--wait", "resumed"];
        if self.family.len() > 1 {
            words.push("--tree");
        }
        let answer = self.lab.dunlin(&words);
        // What is printed is seen of a test that fails.
        print!("{}", String::from_utf8_lossy(&answer.stderr));
        answer.status.success()
    }

    /// There is one of each, all in one place, and all of it runs.
    fn check(&mut self, when: &str) {
        let pids: Vec<Pid> = self.family.iter().map(|(_, program)| program.pid).collect();
        let mut found = Vec::new();
        self.lab.until(&format!("{pids:?} are in one place: {when}"), |rows| {
            let rows = rows.iter().filter(|row| pids.contains(&row.pid));
            found = rows.map(|row| row.node.clone()).collect();
            found.len() == pids.len() && found.iter().all(|node| *node == found[0])
        });
        self.at = found.remove(0);
        for (name, program) in &mut self.family {
            let digest = program.ask("hashlib.sha256(memory).hexdigest()");
            assert_eq!(digest, self.digest, "{name}: {when}");
            assert_eq!(program.ask("turns.clear() or turns.extend([0, 0])"), "None", "{when}");
            while program.ask("all(turns)") != "True" {}
            // Two would answer twice.
            let lines = |what: &str| {
                let text = std::fs::read_to_string(self.workshop.path(&format!("{name}.{what}"))).unwrap();
                text.lines().count()
            };
            assert_eq!(lines("answers"), lines("orders"), "{name}: {when}");
        }
    }

    /// Its number is free everywhere when the last page has come from there.
    fn goes_round(&mut self) {
        for to in [self.other(), "n3", "n1"] {
            if self.at == to {
                continue;
            }
            let asked = MoveRequest {
                tree: self.family.len() > 1,
                ..request(self.pid(), to)
            };
            let deadline = Instant::now() + Duration::from_secs(20);
            while let Err(why) = self.lab.move_as(asked.clone()) {
                assert!(Instant::now() < deadline, "moving on to {to}: {why:#?}");
            }
            self.check(&format!("moved on to {to}"));
        }
    }

    /// Moves it while a daemon has a fuse of so many steps; `with_it` is killed when that one dies.
    fn move_with_fuse(&self, to: &str, killed: &str, steps: u64, with_it: Option<&str>) -> Outlived {
        let lab = &self.lab;
        lab.signal_daemon(killed, 9);
        lab.start_daemon_with_fuse(killed, steps);
        // The move may have to wait for the daemon that comes next.
        std::thread::scope(|scope| {
            let moving = scope.spawn(|| self.move_to(to));
            while !moving.is_finished() && lab.daemon(killed).is_some() {
                std::thread::sleep(Duration::from_millis(1));
            }
            let lives = lab.daemon(killed).is_some();
            for node in with_it.into_iter().chain(lives.then_some(killed)) {
                lab.signal_daemon(node, 9);
            }
            lab.start_daemons(&with_it.into_iter().chain([killed]).collect::<Vec<_>>());
            match (moving.join().unwrap(), lives) {
                (_, false) => Outlived::No,
                (true, true) => Outlived::Moved,
                (false, true) => Outlived::Refused,
            }
        })
    }
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
        assert!(traveller.move_to("n2"));
        (traveller.between, traveller.asked) = (["n2", "n3"], "n2");
        traveller.check("on its way");
    }
    // How far each way has been gone through, and whether that is all.
    let ways = traveller.between.map(|at| (at.to_owned(), (first, false)));
    let mut ways: BTreeMap<String, (u64, bool)> = ways.into();
    let (mut moved, mut stayed) = (0, 0);
    while ways.values().any(|(_, done)| !done) {
        let (from, to) = (traveller.at.clone(), traveller.other());
        let (steps, done) = ways[&from];
        if done {
            let deadline = Instant::now() + Duration::from_secs(20);
            while !traveller.move_to(to) {
                assert!(Instant::now() < deadline, "it does not move to {to} any more");
            }
            traveller.check("a move between");
            continue;
        }
        let killed = match role {
            Role::Source => from.as_str(),
            Role::Destination | Role::Both => to,
            Role::Home => "n1",
        };
        let with_it = (role == Role::Both).then_some(from.as_str());
        let outlived = traveller.move_with_fuse(to, killed, steps, with_it);
        let when = format!("{killed} was killed at step {steps} of a move from {from} to {to}");
        println!("{when}");
        traveller.check(&when);
        if traveller.at == from {
            stayed += 1;
        } else {
            moved += 1;
        }
        // Where a former move is still being given up, it is asked for once more.
        let next = if outlived == Outlived::Refused {
            steps
        } else {
            steps + stride
        };
        ways.insert(from, (next, outlived == Outlived::Moved));
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
    assert!(traveller.move_to("n2"));
    let whole = asked.elapsed();
    traveller.check("on its way");
    let (mut moved, mut stayed) = (0, 0);
    for step in 0..20 {
        let delay = whole * step / 14;
        let (from, to) = (traveller.at.clone(), traveller.other());
        let killed = if role == Role::Source { from.as_str() } else { to };
        std::thread::scope(|scope| {
            let moving = scope.spawn(|| traveller.move_to(to));
            std::thread::sleep(delay);
            traveller.lab.signal_daemon(killed, 9);
            traveller.lab.start_daemon(killed);
            moving.join().unwrap();
        });
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
        let deadline = Instant::now() + Duration::from_secs(20);
        while let Err(why) = traveller.lab.move_as(asked.clone()) {
            assert!(Instant::now() < deadline, "moving on to {to}: {why:#?}");
        }
        traveller.lab.signal_daemon(killed, 9);
        traveller.lab.start_daemon(killed);
        traveller.at = to.to_owned();
        // Not checked here: that would fetch all, and the next move is to find pages elsewhere.
        traveller.family[0]
            .1
            .ask(&format!("'{killed} was killed after a move from {from} to {to}'"));
    }
    traveller.check("after its journey");
    traveller.goes_round();
}
