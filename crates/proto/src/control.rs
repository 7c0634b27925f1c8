//! What the command line says to its node's daemon, over `control.sock` in the node's state directory.
//!
//! One connection carries one [`Request`], as a frame, and then [`Reply`] frames until one that ends it
//! ([`Reply::is_last`]). Only `Run` is two-way: [`RunInput`] frames may follow its request at any time. The daemon
//! knows its caller by `SO_PEERCRED`, never by what a message says.

use crate::ids::{Pid, Slot};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Start a program in this node's nest. Answers `Started`, then (unless detached) `Output`… and `Exited`.
    Run(RunSpec),
    /// Every process of the cluster (`Processes`); with `local`, of this node alone.
    Ps {
        /// Leave the peers out.
        local: bool,
    },
    /// Move a process, wherever it is. Answers `Progress`… and `Moved`, or `Refused`.
    Move(MoveRequest),
    /// Would it move? Answers `Verdict`.
    CanMove {
        /// The process.
        pid: Pid,
        /// The node it would go to, by name; without it, only what the source knows is checked.
        to: Option<String>,
    },
    /// Send a signal to a process, wherever it is. Answers `Done`.
    Kill {
        /// The process.
        pid: Pid,
        /// The signal's number.
        signal: i32,
    },
    /// Answers `Exited` when the process has ended, wherever it is by then.
    Wait {
        /// The process.
        pid: Pid,
    },
    /// The output of a detached run (`Output`…, then `Done`).
    Logs {
        /// The process that was run.
        pid: Pid,
        /// Go on until it ends.
        follow: bool,
    },
    /// Is this node ready, and whom does it see (`Status`)?
    Status,
    /// The gateway's table (`Gateway`).
    Gateway,
}

/// A program to be started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSpec {
    /// The program and its arguments; not empty. Looked up in `PATH` of `env`.
    pub argv: Vec<Vec<u8>>,
    /// Its whole environment, `KEY=VALUE`.
    pub env: Vec<Vec<u8>>,
    /// Its working directory.
    pub cwd: Vec<u8>,
    /// The umask it starts with.
    pub umask: u32,
    /// Output goes to a log, input is `/dev/null`.
    pub detach: bool,
    /// Give it a pseudo-terminal of this size as its controlling terminal; otherwise it gets pipes.
    pub tty: Option<WindowSize>,
}

/// Rows and columns of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// Input bytes of a run that may be sent before any was taken ([`Reply::InputTaken`]).
pub const INPUT_WINDOW_BYTES: u64 = 256 << 10;

/// What the caller of a run sends on while it goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum RunInput {
    /// Bytes for its standard input; at most 64 KiB.
    Stdin(Vec<u8>),
    /// The end of its standard input.
    StdinEnd,
    /// A signal that the caller received.
    Signal(i32),
    /// The caller's terminal changed size.
    Resize(WindowSize),
}

/// How the pages travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MoveMode {
    /// Everything after the resume, faults first.
    #[default]
    Demand,
    /// Everything before the freeze, in rounds; what is dirty at the freeze travels inside it.
    Precopy,
    /// Everything before the freeze, once; what is dirty at the freeze is fetched on demand.
    Hybrid,
}

/// Until when `move` waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum WaitFor {
    /// The program runs on the new node.
    Resumed,
    /// Nothing of it is elsewhere any more.
    #[default]
    Drained,
}

/// A move, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveRequest {
    /// The process.
    pub pid: Pid,
    /// The node it goes to, by name.
    pub to: String,
    /// With all its descendants.
    pub tree: bool,
    /// How the pages travel.
    pub mode: MoveMode,
    /// Until when to wait.
    pub wait: WaitFor,
    /// Hold both copies after the essence, fetch every page, compare everything and report the first difference
    /// instead of forgetting the source. For tests: it makes the freeze as long as the memory is large.
    pub verify: bool,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ExitStatus {
    /// `exit(code)`.
    Code(i32),
    /// Killed by a signal.
    Signal {
        /// Its number.
        signal: i32,
        /// With a core dump.
        core: bool,
    },
    /// It has ended, but this kernel tells only its parent how (before Linux 6.15, for a process that was not started
    /// by `run`).
    Unknown,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// A run has started.
    Started {
        /// Its PID.
        pid: Pid,
    },
    /// Bytes of a run's output, or of a log; at most 64 KiB.
    Output {
        /// 1 or 2.
        stream: u8,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// So many more bytes of a run's input may be sent: the caller of a run sends at most [`INPUT_WINDOW_BYTES`] of
    /// [`RunInput::Stdin`] beyond what was taken, so that a program that does not read never delays a signal.
    InputTaken {
        /// Bytes passed on since the last of these.
        bytes: u32,
    },
    /// The run, or the process waited for, has ended.
    Exited(ExitStatus),
    /// The processes, by PID.
    Processes {
        /// One row a process.
        rows: Vec<ProcessRow>,
        /// Nodes that did not answer, by name, so that a short list is not taken for a whole one.
        silent: Vec<String>,
    },
    /// A move goes on.
    Progress(MoveProgress),
    /// A move is done.
    Moved(Vec<MoveReport>),
    /// A move, or the question whether it would be made, met obstacles (none: it would move).
    Verdict(Vec<Obstacle>),
    /// A move was refused before the freeze; the process runs on where it was.
    Refused(Vec<Obstacle>),
    /// The node's state.
    Status(NodeStatus),
    /// The gateway's table.
    Gateway {
        /// The node that has the role, by name.
        node: String,
        /// Its outside addresses.
        outside: Vec<String>,
        /// One row an entry.
        rows: Vec<GatewayRow>,
    },
    /// Nothing more to say.
    Done,
    /// It could not be done.
    Error(Failure),
}

impl Reply {
    /// Does this end the connection?
    pub fn is_last(&self) -> bool {
        match self {
            Reply::Started { .. } | Reply::Output { .. } | Reply::InputTaken { .. } | Reply::Progress(_) => false,
            Reply::Exited(_)
            | Reply::Processes { .. }
            | Reply::Moved(_)
            | Reply::Verdict(_)
            | Reply::Refused(_)
            | Reply::Status(_)
            | Reply::Gateway { .. }
            | Reply::Done
            | Reply::Error(_) => true,
        }
    }
}

/// Why something could not be done, in words for a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind, where the caller acts differently.
    pub kind: FailureKind,
    /// Names the object; lower-case.
    pub message: String,
    /// What a person can do about it.
    pub hint: Option<String>,
}

/// Where the caller acts differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// No such process in the cluster.
    NoProcess,
    /// No such node.
    NoNode,
    /// A node that is needed does not answer.
    Unreachable,
    /// The caller may not.
    Forbidden,
    /// The program to run was not found.
    NotFound,
    /// The program to run could not be executed.
    NotExecutable,
    /// The request makes no sense.
    Invalid,
    /// A move failed after it was accepted; the message says where the process runs.
    MoveFailed,
    /// Anything else.
    Other,
}

/// Something that keeps a process from moving.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Obstacle {
    /// The process it is about (a tree has many).
    pub pid: Pid,
    /// A stable word for scripts: `descriptor`, `mapping`, `file`, `cpu`, `kernel`, `thread`, `memory`, `permission`…
    pub kind: String,
    /// The object: `fd 5 (socket:[123])`, `mapping 7f00…-7f01… /path`.
    pub object: String,
    /// Why it is in the way.
    pub why: String,
    /// What to do about it.
    pub hint: String,
}

/// One entry of the gateway's table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayRow {
    /// `tcp` or `udp`.
    pub proto: String,
    /// 4 or 6: the version of IP.
    pub ip: u8,
    /// The port, of the outside address as of the inside one.
    pub port: u16,
    /// Whom the connection is with; `None`: everybody may send to the port.
    pub peer: Option<String>,
    /// The name of the node that has the socket.
    pub node: String,
    /// Its packets are held until a move is over.
    pub held: bool,
    /// The gateway made it itself when it saw the first packet.
    pub learned: bool,
    /// Of two pieces of news about it, the one with the greater epoch held.
    pub epoch: u64,
    /// Packets it has steered.
    pub packets: u64,
    /// Bytes it has steered.
    pub bytes: u64,
    /// Since the last of them, milliseconds.
    pub idle_ms: Option<u64>,
}

/// One process of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRow {
    /// Its PID, the same everywhere.
    pub pid: Pid,
    /// Its parent's.
    pub ppid: Pid,
    /// Its home node's name.
    pub home: String,
    /// The name of the node it runs on.
    pub node: String,
    /// The kernel's state letter (`R`, `S`, `D`, `T`, `Z`…) or `F` while frozen by a move.
    pub state: char,
    /// How many threads.
    pub threads: u32,
    /// Resident memory on its node, bytes.
    pub rss_bytes: u64,
    /// Pages (of 4 KiB) that still are on other nodes, by node name.
    pub pages_elsewhere: BTreeMap<String, u64>,
    /// How many times it has moved.
    pub moves: u32,
    /// Its real user's name, or number where the node knows no name.
    pub user: String,
    /// Its command line, arguments separated by spaces.
    pub command: String,
}

/// Where a move has got to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MovePhase {
    /// The destination looks at what it is asked to take.
    Propose,
    /// The destination prepares while the program runs.
    Prepare,
    /// The program is stopped.
    Freeze,
    /// The essence travels and is checked.
    Essence,
    /// The home decides.
    Commit,
    /// It runs on the new node.
    Resume,
    /// Its pages come after it.
    Drain,
}

/// A move under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoveProgress {
    /// The process.
    pub pid: Pid,
    /// Where it has got to.
    pub phase: MovePhase,
    /// Pages not yet fetched.
    pub pages_left: u64,
    /// Pages in all.
    pub pages_total: u64,
    /// The recent rate of the drain.
    pub bytes_per_second: u64,
}

/// What a move was like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoveReport {
    /// The process.
    pub pid: Pid,
    /// The node it left, by name.
    pub from: String,
    /// The node it went to, by name.
    pub to: String,
    /// How the pages travelled.
    pub mode: MoveMode,
    /// From the stop of the first thread to the run of the last, by the source's clock.
    pub freeze_ms: f64,
    /// What travelled inside the freeze.
    pub essence_bytes: u64,
    /// From the request to the freeze.
    pub prepare_ms: f64,
    /// From the request to the resume.
    pub resumed_ms: f64,
    /// From the request to the last page; `None` if it was not waited for.
    pub drained_ms: Option<f64>,
    /// Pages that the program had to wait for.
    pub pages_faulted: u64,
    /// Pages that came unasked.
    pub pages_pushed: u64,
    /// `1 - faulted / (faulted + pushed)`.
    pub faults_avoided_ratio: f64,
    /// How long the program waited for a page.
    pub fault_us: Quantiles,
    /// What `verify` compared; `None` without it.
    pub verified_pages: Option<u64>,
    /// What the freeze consisted of: the source's steps up to its waiting, and the destination's, which fall into it.
    pub steps: Vec<Step>,
}

/// A part of a freeze.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Who did it.
    pub side: Side,
    /// What was done.
    pub name: String,
    /// How long that took, in microseconds; all together if it was done several times.
    pub us: f64,
}

/// Who does something in a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// The node that gives the process away.
    Source,
    /// The node that takes it.
    Destination,
}

/// Two quantiles, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Quantiles {
    /// The median.
    pub p50: f64,
    /// The 99th percentile.
    pub p99: f64,
}

/// A node, as it sees itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its slot.
    pub slot: Slot,
    /// The cluster's modulus.
    pub modulus: u16,
    /// dunlin's version.
    pub version: String,
    /// The daemon's PID on its machine.
    pub daemon_pid: i32,
    /// PID on its machine of the nest's PID 1.
    pub init_pid: i32,
    /// How many processes run in its nest.
    pub processes: u32,
    /// The peers it is configured with: name, and whether it answered.
    pub peers: BTreeMap<String, bool>,
}
