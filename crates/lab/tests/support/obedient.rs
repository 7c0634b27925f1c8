//! A program that does what a scenario tells it, wherever it is: Python, told by files that all nodes see.
//!
//! Owns the way of an order and of its answer. Refuses to know what they mean. An answer is waited for by inotify(7), as the
//! directory is this machine's own.

use super::{Workshop, program, spec_in};
use dunlin_lab::Lab;
use dunlin_lab::harness::Run;
use dunlin_proto::control::RunSpec;
use dunlin_proto::ids::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process that takes orders.
#[derive(Debug)]
pub struct Obedient {
    /// Its PID.
    pub pid: Pid,
    dir: PathBuf,
    name: String,
    told: usize,
}

/// The command line of the first of them, which has this name.
pub fn obedient_spec(workshop: &Workshop, name: &str) -> RunSpec {
    let script = program("obedient.py");
    let dir = workshop.path("");
    let argv = [
        "/usr/bin/python3",
        script.to_str().unwrap(),
        dir.to_str().unwrap(),
        name,
    ];
    spec_in(&workshop.path(""), &argv)
}

impl Obedient {
    /// Starts one on n1.
    #[track_caller]
    pub fn start(lab: &Lab, workshop: &Workshop, name: &str) -> (Obedient, Run) {
        Obedient::start_on(lab, "n1", workshop, name)
    }

    /// Starts one on a node.
    #[track_caller]
    pub fn start_on(lab: &Lab, node: &str, workshop: &Workshop, name: &str) -> (Obedient, Run) {
        let run = lab.node(node).run_as(obedient_spec(workshop, name));
        (Obedient::known(workshop, name, run.pid), run)
    }

    /// One that runs already.
    pub fn known(workshop: &Workshop, name: &str, pid: Pid) -> Obedient {
        Obedient {
            pid,
            dir: workshop.path(""),
            name: name.into(),
            told: 0,
        }
    }

    /// Has it fork one that takes orders under this name.
    #[track_caller]
    pub fn fork(&mut self, name: &str) -> Obedient {
        let answer = self.ask(&format!("fork_obedient('{name}')"));
        let pid = answer.parse().unwrap_or_else(|_| panic!("{answer} is no PID"));
        let mut child = Obedient {
            pid: Pid(pid),
            dir: self.dir.clone(),
            name: name.into(),
            told: 0,
        };
        assert_eq!(child.ask("os.getpid()"), answer);
        child
    }

    /// Tells it something, and does not wait for the answer.
    pub fn tell(&mut self, order: &str) {
        let path = self.dir.join(format!("{}.orders", self.name));
        let mut orders = std::fs::File::options().create(true).append(true).open(path).unwrap();
        orders.write_all(format!("{order}\n").as_bytes()).unwrap();
        self.told += 1;
    }

    /// Waits for the answer to the last order.
    #[track_caller]
    pub fn answer(&self) -> String {
        let (name, pid, told) = (&self.name, self.pid, self.told);
        self.answer_within(PATIENCE)
            .unwrap_or_else(|| panic!("{name} ({pid}) does not answer order {told}"))
    }

    /// Waits for so long for the answer to the last order.
    pub fn answer_within(&self, patience: Duration) -> Option<String> {
        let deadline = Instant::now() + patience;
        let written = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).expect("inotify");
        let events = WatchFlags::CREATE | WatchFlags::MODIFY;
        inotify::add_watch(&written, &self.dir, events).expect("a watch of the workshop");
        loop {
            let answer = self.answered();
            let left = deadline.saturating_duration_since(Instant::now());
            if answer.is_some() || left.is_zero() {
                return answer;
            }
            let left = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            let _ = poll(&mut [PollFd::new(&written, PollFlags::IN)], Some(&left));
            // What was written is read by the next look.
            while rustix::io::read(&written, &mut [0; 4096]).is_ok() {}
        }
    }

    /// The answer to the last order, if it has come.
    pub fn answered(&self) -> Option<String> {
        let path = self.dir.join(format!("{}.answers", self.name));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let mut answers = text.split_inclusive('\n').filter_map(|l| l.strip_suffix('\n'));
        answers.nth(self.told - 1).map(str::to_owned)
    }

    /// Tells it something and waits for what comes of it.
    #[track_caller]
    pub fn ask(&mut self, order: &str) -> String {
        self.tell(order);
        self.answer()
    }
}
