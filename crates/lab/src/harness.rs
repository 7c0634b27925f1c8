//! Labs for tests: what a scenario says, it says in one line; what goes wrong panics with the reason.
//!
//! Owns the lab's life in a test: made by [`Lab::up`], gone with the value. Talks to the daemons directly, so that
//! answers come typed. Refuses to wait by sleeping a fixed time.

use crate::control::Connection;
use crate::down::down;
use crate::layout::Layout;
use crate::processes::Identity;
use crate::up::Options;
use dunlin_proto::control::{ExitStatus, Failure, MoveReport, MoveRequest, Obstacle, ProcessRow, Reply, Request};
use dunlin_proto::control::{MoveMode, RunSpec, WaitFor};
use dunlin_proto::ids::Pid;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

pub use crate::harness_run::{Ended, Run};

/// A lab that is taken down when it is dropped.
#[derive(Debug)]
pub struct Lab {
    layout: Layout,
    program: PathBuf,
}

/// Why a move was not made.
#[derive(Debug, Clone, PartialEq)]
pub enum NotMoved {
    /// Before the freeze, for these reasons.
    Refused(Vec<Obstacle>),
    /// For another reason.
    Failed(Failure),
}

impl Default for Options {
    /// Three nodes of the binary under test: `DUNLIN_BIN`, or `dunlin` in the target directory of the running test.
    fn default() -> Self {
        Options::new(binary_under_test())
    }
}

/// The `dunlin` binary that tests are about.
pub fn binary_under_test() -> PathBuf {
    if let Some(path) = std::env::var_os("DUNLIN_BIN") {
        return path.into();
    }
    let test = std::env::current_exe().expect("a process has an executable");
    // target/PROFILE/deps/TEST-hash
    let found = test
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("dunlin"))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "no dunlin binary beside {}\nhint: cargo build -p dunlin, or set DUNLIN_BIN",
            test.display()
        )
    })
}

impl Lab {
    /// Makes a lab. Its name is made unique to this test process, so that tests of many people run side by side.
    #[track_caller]
    pub fn up(name: &str, options: &Options) -> Lab {
        let name = format!("t-{}-{}", name.chars().take(24).collect::<String>(), std::process::id());
        let layout = Layout::new(name.parse().unwrap_or_else(|e| panic!("{e}")));
        let lab = Lab {
            layout,
            program: options.program.clone(),
        };
        let nodes = options.nodes.to_string();
        let modulus = options.modulus.to_string();
        let mut arguments = vec!["lab", "up", "--nodes", &nodes, "--modulus", &modulus];
        arguments.extend(["--gateway", &options.gateway]);
        let limit = options.pid_limit.map(|l| l.to_string());
        if let Some(limit) = &limit {
            arguments.extend(["--pid-limit", limit]);
        }
        let output = lab.dunlin(&arguments);
        assert!(
            output.status.success(),
            "lab up: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        lab
    }

    /// Where everything of it is.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.layout.name.as_str()
    }

    /// One of its nodes.
    pub fn node<'a>(&'a self, name: &'a str) -> Node<'a> {
        Node { lab: self, name }
    }

    /// Runs the `dunlin` command against this lab and returns what it said.
    #[track_caller]
    pub fn dunlin(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(&self.program);
        command.args(["--lab", self.name()]).args(arguments);
        command
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}", self.program.display()))
    }

    /// Every process of the cluster, seen from n1.
    #[track_caller]
    pub fn ps(&self) -> Vec<ProcessRow> {
        self.node("n1").ps()
    }

    /// One process of the cluster, if it is there.
    #[track_caller]
    pub fn process(&self, pid: Pid) -> Option<ProcessRow> {
        self.ps().into_iter().find(|row| row.pid == pid)
    }

    /// Waits until `ps` shows what is asked for, at most 20 seconds.
    #[track_caller]
    pub fn until(&self, what: &str, mut holds: impl FnMut(&[ProcessRow]) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let rows = self.ps();
            if holds(&rows) {
                return;
            }
            assert!(Instant::now() < deadline, "not within 20 s: {what}; {rows:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Moves a process by demand paging and waits until it is drained.
    #[track_caller]
    pub fn move_process(&self, pid: Pid, to: &str) -> MoveReport {
        let mut reports = self
            .move_as(request(pid, to))
            .unwrap_or_else(|e| panic!("move {pid} to {to}: {e:#?}"));
        assert_eq!(reports.len(), 1, "{reports:#?}");
        reports.remove(0)
    }

    /// Moves a process and compares source and destination in full.
    #[track_caller]
    pub fn move_verified(&self, pid: Pid, to: &str) -> MoveReport {
        let asked = MoveRequest {
            verify: true,
            ..request(pid, to)
        };
        self.move_as(asked)
            .unwrap_or_else(|e| panic!("move {pid} to {to}: {e:#?}"))
            .remove(0)
    }

    /// Moves a process with all its descendants.
    #[track_caller]
    pub fn move_tree(&self, root: Pid, to: &str) -> Vec<MoveReport> {
        let asked = MoveRequest {
            tree: true,
            ..request(root, to)
        };
        self.move_as(asked)
            .unwrap_or_else(|e| panic!("move the tree of {root} to {to}: {e:#?}"))
    }

    /// Moves as asked for.
    #[track_caller]
    pub fn move_as(&self, asked: MoveRequest) -> Result<Vec<MoveReport>, NotMoved> {
        let node = self.node("n1");
        let mut connection = node.connect();
        connection
            .send(&Request::Move(asked))
            .expect("the daemon takes the request");
        loop {
            return match node.receive(&mut connection) {
                Reply::Progress(_) => continue,
                Reply::Moved(reports) => Ok(reports),
                Reply::Refused(obstacles) => Err(NotMoved::Refused(obstacles)),
                Reply::Error(failure) => Err(NotMoved::Failed(failure)),
                other => panic!("{other:?} is no answer to a move"),
            };
        }
    }

    /// What is in the way of a move.
    #[track_caller]
    pub fn can_move(&self, pid: Pid, to: Option<&str>) -> Vec<Obstacle> {
        match self.node("n1").ask(&Request::CanMove {
            pid,
            to: to.map(str::to_owned),
        }) {
            Reply::Verdict(obstacles) => obstacles,
            other => panic!("can-move {pid}: {other:?}"),
        }
    }

    /// The daemon of a node, if it lives.
    #[track_caller]
    pub fn daemon(&self, node: &str) -> Option<Identity> {
        let file = self.layout.node_dir(node).join("daemon.pid");
        let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let pid = text.split_ascii_whitespace().next().and_then(|n| n.parse().ok());
        Identity::of(pid.unwrap_or_else(|| panic!("{}: {text}", file.display()))).filter(|daemon| daemon.is_alive())
    }

    /// Sends a signal to a node's daemon; after SIGKILL, waits until it is gone.
    #[track_caller]
    pub fn signal_daemon(&self, node: &str, signal: i32) {
        let file = self.layout.node_dir(node).join("daemon.pid");
        let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let pid = text.split_ascii_whitespace().next().and_then(|n| n.parse().ok());
        let pid: i32 = pid.unwrap_or_else(|| panic!("{}: {text}", file.display()));
        let daemon = Identity::of(pid).unwrap_or_else(|| panic!("{node} has no daemon"));
        let process = rustix::process::Pid::from_raw(pid).expect("a PID");
        let signal = rustix::process::Signal::from_named_raw(signal).expect("a signal");
        rustix::process::kill_process(process, signal).unwrap_or_else(|e| panic!("daemon {pid}: {e}"));
        if signal == rustix::process::Signal::KILL {
            daemon.until_ended();
        }
    }

    /// Starts a node's daemon again, in its namespace, and waits until it answers and sees its peers.
    #[track_caller]
    pub fn start_daemon(&self, node: &str) {
        self.start_daemon_with(node, None);
    }

    /// Like [`Lab::start_daemon`]; it dies, as if by `kill -9`, after so many steps (`dunlin_sys::fuse`).
    #[track_caller]
    pub fn start_daemon_with_fuse(&self, node: &str, steps: u64) {
        self.start_daemon_with(node, Some(steps));
    }

    /// Starts several that may need each other to be ready.
    #[track_caller]
    pub fn start_daemons(&self, nodes: &[&str]) {
        std::thread::scope(|scope| {
            for node in nodes {
                scope.spawn(|| self.start_daemon_with(node, None));
            }
        });
    }

    /// How many bytes have come to a node by now.
    #[track_caller]
    pub fn received_bytes(&self, node: &str) -> u64 {
        let daemon = self.daemon(node).unwrap_or_else(|| panic!("{node} has no daemon"));
        let text = std::fs::read_to_string(format!("/proc/{}/net/dev", daemon.pid)).unwrap_or_default();
        let received = |line: &str| {
            line.split_once(':')?
                .1
                .split_ascii_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
        };
        text.lines().filter_map(received).sum()
    }

    /// Waits until so many more bytes have come to a node than it had received.
    #[track_caller]
    pub fn until_received(&self, node: &str, bytes: u64) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.received_bytes(node) < bytes {
            assert!(Instant::now() < deadline, "{node} does not receive {bytes} bytes");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[track_caller]
    fn start_daemon_with(&self, node: &str, fuse: Option<u64>) {
        let started = crate::up::start_again(&self.layout, &self.program, node, fuse);
        let mut child = started.unwrap_or_else(|e| panic!("the daemon of {node}: {e}"));
        let socket = self.layout.control_socket(node);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let ready = crate::control::status(&socket, Duration::from_secs(2));
            if ready.as_ref().is_ok_and(|s| s.peers.iter().all(|(_, seen)| *seen)) {
                break;
            }
            let ended = child.try_wait().expect("a child can be asked for");
            if fuse.is_some() && ended.is_some() {
                return;
            }
            assert!(ended.is_none(), "the daemon of {node} ended: {ended:?}");
            assert!(
                Instant::now() < deadline,
                "the daemon of {node} is not ready: {ready:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        // Reaped whenever it ends.
        std::thread::spawn(move || child.wait());
    }

    /// Sends a signal to a process, wherever it is.
    #[track_caller]
    pub fn kill(&self, pid: Pid, signal: i32) {
        let reply = self.node("n1").ask(&Request::Kill { pid, signal });
        assert_eq!(reply, Reply::Done, "kill {pid}");
    }

    /// Waits for the end of a process, wherever it is by then.
    #[track_caller]
    pub fn wait(&self, pid: Pid) -> ExitStatus {
        match self.node("n1").ask(&Request::Wait { pid }) {
            Reply::Exited(status) => status,
            other => panic!("wait {pid}: {other:?}"),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in self.layout.nodes_on_disk() {
                let logs = [
                    ("daemon", self.layout.daemon_log(&node)),
                    ("init", self.layout.node_dir(&node).join("init.log")),
                ];
                for (whose, path) in logs {
                    let log = std::fs::read(path).unwrap_or_default();
                    let tail = String::from_utf8_lossy(&log[log.len().saturating_sub(3000)..]).into_owned();
                    eprintln!("--- the end of {node}'s {whose} log\n{tail}");
                }
            }
        }
        if let Err(e) = down(&self.layout)
            && !std::thread::panicking()
        {
            panic!("lab down: {e}");
        }
    }
}

/// A node of a lab under test.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    lab: &'a Lab,
    name: &'a str,
}

impl Node<'_> {
    /// Starts a program here, with pipes on its standard streams.
    #[track_caller]
    pub fn run<S: AsRef<OsStr>>(&self, argv: &[S]) -> Run {
        self.run_as(spec(argv))
    }

    /// Starts a program as specified, not detached.
    #[track_caller]
    pub fn run_as(&self, spec: RunSpec) -> Run {
        assert!(!spec.detach, "a detached run has no streams to return");
        let mut connection = self.connect();
        let pid = self.start(&mut connection, spec);
        Run::new(connection, pid)
    }

    /// Starts a program here; its output goes to a log.
    #[track_caller]
    pub fn run_detached<S: AsRef<OsStr>>(&self, argv: &[S]) -> Pid {
        let detached = RunSpec {
            detach: true,
            ..spec(argv)
        };
        self.start(&mut self.connect(), detached)
    }

    #[track_caller]
    fn start(&self, connection: &mut Connection, spec: RunSpec) -> Pid {
        let argv = spec
            .argv
            .iter()
            .map(|a| String::from_utf8_lossy(a).into_owned())
            .collect::<Vec<_>>();
        connection
            .send(&Request::Run(spec))
            .expect("the daemon takes the request");
        match self.receive(connection) {
            Reply::Started { pid } => pid,
            other => panic!("run {argv:?} on {}: {other:?}", self.name),
        }
    }

    /// Every process of the cluster, seen from here.
    #[track_caller]
    pub fn ps(&self) -> Vec<ProcessRow> {
        match self.ask(&Request::Ps { local: false }) {
            Reply::Processes { rows, .. } => rows,
            other => panic!("ps on {}: {other:?}", self.name),
        }
    }

    /// What a detached run has said so far.
    #[track_caller]
    pub fn logs(&self, pid: Pid) -> String {
        let mut connection = self.connect();
        connection
            .send(&Request::Logs { pid, follow: false })
            .expect("the daemon takes the request");
        let mut text = Vec::new();
        loop {
            match self.receive(&mut connection) {
                Reply::Output { bytes, .. } => text.extend(bytes),
                Reply::Done => return String::from_utf8_lossy(&text).into_owned(),
                other => panic!("logs {pid}: {other:?}"),
            }
        }
    }

    /// Runs a command in this node's network namespace.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Output {
        let mut arguments = vec!["lab", "exec", self.name, "--"];
        arguments.extend(command);
        self.lab.dunlin(&arguments)
    }

    /// One request, one answer.
    #[track_caller]
    pub fn ask(&self, request: &Request) -> Reply {
        let mut connection = self.connect();
        connection.send(request).expect("the daemon takes the request");
        self.receive(&mut connection)
    }

    /// A connection to this node's daemon.
    #[track_caller]
    pub fn connect(&self) -> Connection {
        let socket = self.lab.layout.control_socket(self.name);
        Connection::open(&socket).unwrap_or_else(|e| panic!("{}: {e}", socket.display()))
    }

    #[track_caller]
    fn receive(&self, connection: &mut Connection) -> Reply {
        connection
            .receive()
            .unwrap_or_else(|e| panic!("the daemon of {} does not answer: {e}", self.name))
    }
}

/// A run of this command, with the test's own environment, in `/`.
pub fn spec<S: AsRef<OsStr>>(argv: &[S]) -> RunSpec {
    let environment =
        std::env::vars_os().map(|(key, value)| [key.into_vec(), b"=".to_vec(), value.into_vec()].concat());
    RunSpec {
        argv: argv.iter().map(|a| a.as_ref().as_bytes().to_vec()).collect(),
        env: environment.collect(),
        cwd: b"/".to_vec(),
        umask: 0o022,
        detach: false,
        tty: None,
    }
}

/// A move by demand paging, waited for until drained.
pub fn request(pid: Pid, to: &str) -> MoveRequest {
    MoveRequest {
        pid,
        to: to.into(),
        tree: false,
        mode: MoveMode::Demand,
        wait: WaitFor::Drained,
        verify: false,
    }
}
