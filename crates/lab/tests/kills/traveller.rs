//! A program that moves while daemons die, and what is to be true of it each time.
//!
//! Owns the lab, the family of processes, and the three promises: there is one of each (never two, never none), all of it
//! goes on with the memory it had, and in the end nothing is left anywhere of all the moves. Refuses to know when a
//! daemon is killed. Every wait has an end: a program that has ended is not waited for.

use crate::support::Workshop;
use crate::support::fuse::while_fused;
use crate::support::obedient::Obedient;
use dunlin_lab::harness::request;
use dunlin_lab::{Lab, Options};
use dunlin_proto::control::{MoveRequest, Reply, Request};
use dunlin_proto::ids::Pid;
use std::collections::BTreeMap;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// How long the program may take to answer, and a move to be possible again.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked whether a program that does not answer is there at all.
const LOOK: Duration = Duration::from_millis(500);
const NODES: [&str; 3] = ["n1", "n2", "n3"];

/// What became of a daemon with a fuse.
#[derive(Clone, Debug, PartialEq)]
pub enum Outlived {
    /// It died in the move.
    No,
    /// The move was made before.
    Moved,
    /// There was none, for this reason.
    Refused(String),
}

/// A program of several threads with memory that can be told again, or a family of two, and the lab it goes round in.
pub struct Traveller {
    pub lab: Lab,
    workshop: Workshop,
    /// The first one is moved, the others with it.
    family: Vec<(String, Obedient)>,
    digest: String,
    /// How many descriptors each node's init had before anything was moved.
    kept: BTreeMap<&'static str, usize>,
    /// The two nodes between which it goes, and the one that is asked to move it.
    pub between: [&'static str; 2],
    pub asked: &'static str,
    pub at: String,
}

impl Traveller {
    pub fn start(name: &str, mib: u32, children: usize) -> Traveller {
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
        let kept = NODES.map(|node| (node, descriptors_of_init(&lab, node))).into();
        Traveller {
            lab,
            workshop,
            family,
            digest,
            kept,
            between: ["n1", "n2"],
            asked: "n3",
            at: "n1".to_owned(),
        }
    }

    pub fn pid(&self) -> Pid {
        self.family[0].1.pid
    }

    /// The program that is moved, to be told something.
    pub fn program(&mut self) -> &mut Obedient {
        &mut self.family[0].1
    }

    fn pids(&self) -> Vec<Pid> {
        self.family.iter().map(|(_, program)| program.pid).collect()
    }

    /// The other one of the two nodes.
    pub fn other(&self) -> &'static str {
        let [one, other] = self.between;
        if self.at == one { other } else { one }
    }

    /// Has a node ask for a move, which is over when the program runs there; or the reason why not.
    pub fn move_to(&self, to: &str) -> Result<(), String> {
        let number = self.pid().to_string();
        let mut words = vec!["--node", self.asked, "move", &number, to, "--wait", "resumed"];
        if self.family.len() > 1 {
            words.push("--tree");
        }
        let answer = self.lab.dunlin(&words);
        let reason = String::from_utf8_lossy(&answer.stderr).into_owned();
        // What is printed is seen of a test that fails.
        print!("{reason}");
        answer.status.success().then_some(()).ok_or(reason)
    }

    /// Moves it once more, for which a former move may first have to be given up.
    pub fn moves_on_to(&mut self, to: &str) {
        let deadline = Instant::now() + PATIENCE;
        while let Err(why) = self.move_to(to) {
            assert!(Instant::now() < deadline, "it does not move to {to} any more: {why}");
        }
        self.check(&format!("moved on to {to}"));
    }

    /// There is one of each, all in one place, and all of it runs.
    pub fn check(&mut self, when: &str) {
        let pids = self.pids();
        let mut found = Vec::new();
        self.lab.until(&format!("{pids:?} are in one place: {when}"), |rows| {
            let rows = rows.iter().filter(|row| pids.contains(&row.pid));
            found = rows.map(|row| row.node.clone()).collect();
            found.len() == pids.len() && found.iter().all(|node| *node == found[0])
        });
        self.at = found.remove(0);
        // Wherever it is, its home has an entry of each.
        let entries = nest_of(&self.lab, NODES[0]);
        assert!(
            pids.iter().all(|pid| entries.contains(pid)),
            "of {pids:?} {} has only {entries:?}: {when}",
            NODES[0]
        );
        for pid in &pids {
            let deadline = Instant::now() + PATIENCE;
            // A daemon may still be at it.
            loop {
                let masks = blocked_signals(&self.lab, &self.at, *pid);
                if masks.iter().all(|mask| mask == "0000000000000000") {
                    break;
                }
                assert!(Instant::now() < deadline, "{pid} blocks {masks:?}: {when}");
            }
        }
        for i in 0..self.family.len() {
            let digest = self.ask(i, "hashlib.sha256(memory).hexdigest()", when);
            let name = self.family[i].0.clone();
            assert_eq!(digest, self.digest, "{name}: {when}");
            assert_eq!(
                self.ask(i, "turns.clear() or turns.extend([0, 0])", when),
                "None",
                "{when}"
            );
            let deadline = Instant::now() + PATIENCE;
            while self.ask(i, "all(turns)", when) != "True" {
                assert!(Instant::now() < deadline, "a thread of {name} stands still: {when}");
            }
            // Two would answer twice.
            let lines = |what: &str| {
                let text = std::fs::read_to_string(self.workshop.path(&format!("{name}.{what}"))).unwrap();
                text.lines().count()
            };
            assert_eq!(lines("answers"), lines("orders"), "{name}: {when}");
        }
    }

    /// What one of them answers; it is not waited for longer than it lives.
    fn ask(&mut self, which: usize, order: &str, when: &str) -> String {
        let (name, program) = &mut self.family[which];
        program.tell(order);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(answer) = program.answer_within(LOOK) {
                return answer;
            }
            let row = self.lab.process(program.pid);
            let lives = row.as_ref().is_some_and(|row| row.state != 'Z');
            assert!(lives, "{name} is no more: {row:?}: {when}");
            assert!(Instant::now() < deadline, "{name} does not answer: {row:?}: {when}");
        }
    }

    /// Its number is free everywhere when the last page has come from there; then nothing of all the moves is left.
    pub fn goes_round(&mut self) {
        for to in [self.other(), "n3", "n1"] {
            if self.at == to {
                continue;
            }
            let asked = MoveRequest {
                tree: self.family.len() > 1,
                ..request(self.pid(), to)
            };
            let deadline = Instant::now() + PATIENCE;
            while let Err(why) = self.lab.move_as(asked.clone()) {
                assert!(Instant::now() < deadline, "moving on to {to}: {why:#?}");
            }
            self.check(&format!("moved on to {to}"));
        }
        self.leaves_nothing();
    }

    /// It is at home, and of all nests only its own has anything; each init has the descriptors that it had.
    fn leaves_nothing(&self) {
        for node in NODES {
            let mut left = Vec::new();
            let mut expected = if node == "n1" { self.pids() } else { Vec::new() };
            expected.sort_unstable();
            let mut descriptors = 0;
            let deadline = Instant::now() + PATIENCE;
            // Keepers and surrogates are ended a moment after nobody needs them any more.
            while left != expected || descriptors > self.kept[node] {
                assert!(
                    Instant::now() < deadline,
                    "{node} keeps {left:?} and {descriptors} descriptors; expected {expected:?} and at most {}",
                    self.kept[node]
                );
                self.lab.ps();
                left = nest_of(&self.lab, node);
                left.sort_unstable();
                descriptors = descriptors_of_init(&self.lab, node);
            }
        }
    }

    /// Moves it while a daemon has a fuse of so many steps; `with_it` is killed when that one dies.
    pub fn move_with_fuse(&self, to: &str, killed: &str, steps: u64, with_it: Option<&str>) -> Outlived {
        let lab = &self.lab;
        lab.signal_daemon(killed, 9);
        lab.start_daemon_with_fuse(killed, steps);
        match while_fused(lab, killed, with_it, || self.move_to(to)) {
            (_, false) => Outlived::No,
            (Ok(()), true) => Outlived::Moved,
            (Err(why), true) => Outlived::Refused(why),
        }
    }

    /// Moves it, and kills a daemon when so much time has passed, or when the move is over before.
    pub fn move_and_kill_after(&self, to: &str, killed: &str, delay: Duration) {
        std::thread::scope(|scope| {
            let (over, is_over) = channel();
            scope.spawn(move || {
                let _ = self.move_to(to);
                let _ = over.send(());
            });
            let _ = is_over.recv_timeout(delay);
            self.lab.signal_daemon(killed, 9);
            self.lab.start_daemon(killed);
        });
    }
}

fn init_of(lab: &Lab, node: &str) -> i32 {
    match lab.node(node).ask(&Request::Status) {
        Reply::Status(status) => status.init_pid,
        other => panic!("{node} has no status: {other:?}"),
    }
}

fn numbers_in(directory: &str) -> Vec<i32> {
    let entries = std::fs::read_dir(directory).unwrap_or_else(|e| panic!("{directory}: {e}"));
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| name.parse().ok()).collect()
}

/// What the nest of a node has: PIDs of its own /proc, init left out.
fn nest_of(lab: &Lab, node: &str) -> Vec<Pid> {
    let numbers = numbers_in(&format!("/proc/{}/root/proc", init_of(lab, node)));
    numbers.into_iter().filter(|number| *number > 1).map(Pid).collect()
}

/// The signals that each thread of a process blocks.
fn blocked_signals(lab: &Lab, node: &str, pid: Pid) -> Vec<String> {
    let tasks = format!("/proc/{}/root/proc/{pid}/task", init_of(lab, node));
    let masks = numbers_in(&tasks).into_iter().filter_map(|tid| {
        let status = std::fs::read_to_string(format!("{tasks}/{tid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("SigBlk:"))?;
        Some(line.trim().to_owned())
    });
    masks.collect()
}

fn descriptors_of_init(lab: &Lab, node: &str) -> usize {
    numbers_in(&format!("/proc/{}/fd", init_of(lab, node))).len()
}
