//! What daemons say to each other.
//!
//! Every connection starts with a [`Hello`] that names its purpose, answered by a [`Welcome`]. What follows depends on
//! the purpose: [`Purpose::Rpc`] carries [`PeerRequest`]s, each answered by one [`PeerReply`] before the next is sent;
//! [`Purpose::Command`] one [`control::Request`](crate::control::Request) and its replies, as over `control.sock`;
//! [`Purpose::Stream`] the frames of [`crate::stream`]; the others belong to the move and the pager.
//!
//! Owns these types. Refuses to know how a node is reached. A peer is believed about *its own* processes and about the
//! users of its own control socket, and about nothing else.

use crate::control::{ExitStatus, Failure, NodeStatus, ProcessRow};
use crate::endpoint::Endpoint;
use crate::ids::{ImageId, MoveId, Pid, RunId, Slot};
use crate::stream::{StreamOpen, TtyState};
use serde::{Deserialize, Serialize};

/// The first frame of every connection between daemons.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::PROTOCOL`] of the caller.
    pub protocol: u32,
    /// The cluster that the caller belongs to.
    pub cluster: String,
    /// The caller.
    pub from: Slot,
    /// Drawn at random by each daemon when it starts: a new one means that what the old one held in memory is gone.
    pub boot: u64,
    /// What the connection is for.
    pub purpose: Purpose,
}

/// What a connection is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Requests and replies, one at a time.
    Rpc,
    /// One command of a user of the calling node.
    Command(Caller),
    /// The words of the move protocol, one way: [`crate::relocation::MoveMsg`] frames.
    Relocation,
    /// The pages of one image.
    Pages(ImageId),
    /// A standard stream of a run.
    Stream(StreamOpen),
}

/// The answer to a [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Welcome {
    /// Go on.
    Accepted {
        /// The called daemon's nonce.
        boot: u64,
    },
    /// The connection is of no use; the reason is for a person.
    Refused {
        /// Lower-case, names the object.
        reason: String,
    },
}

/// Who asked for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The real user.
    pub uid: u32,
    /// The effective user, which differs for set-user-ID programs that send signals.
    pub euid: u32,
    /// May touch everybody's processes (root; CAP_KILL of a sender of signals; the system itself).
    pub privileged: bool,
}

impl Caller {
    /// The system itself: what it passes on was permitted before.
    pub const SYSTEM: Caller = Caller {
        uid: 0,
        euid: 0,
        privileged: true,
    };

    /// A user, root being privileged.
    pub fn user(uid: u32) -> Caller {
        Caller {
            uid,
            euid: uid,
            privileged: uid == 0,
        }
    }
}

/// One request between daemons.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum PeerRequest {
    /// The processes that run on the called node (`Processes`).
    Ps,
    /// The called node's state (`Status`).
    Status,
    /// To a process's home: where is it (`Located`)?
    Locate {
        /// The process.
        pid: Pid,
    },
    /// To the node where a process is: send it a signal (`Done`, `NotHere`, `Failed`; `NotYet` while it is being moved).
    Signal {
        /// The process.
        pid: Pid,
        /// The signal; 0 only asks whether it could be sent.
        signal: i32,
        /// The 128 bytes of its `siginfo_t`, where it has a payload.
        siginfo: Option<Vec<u8>>,
        /// Who sends it.
        by: Caller,
        /// Of a stop or continuation that a surrogate of the calling node passes on: its number, rising. Obeyed once,
        /// and not after a later one.
        order: Option<u64>,
    },
    /// To the node where a process is: wait for a bounded while for its end (`Exited`, `NotYet`, `NotHere`, `Failed`).
    Wait {
        /// The process.
        pid: Pid,
        /// Who asks.
        by: Caller,
    },
    /// To a node that may hold surrogates of `child` (`Done`).
    ChildChanged {
        /// Whose kernel would tell it.
        parent: Pid,
        /// Of which child.
        child: Pid,
        /// What has become of it.
        change: Change,
        /// The last order of the called node that it had obeyed by then; 0: none.
        after: u64,
    },
    /// To the origin of a run: this process of it has come to the calling node. If it is the top process, the input goes
    /// there from now on (`Done`); `NotYet`: what it has not read elsewhere must come back first.
    InputHere {
        /// The run.
        run: RunId,
        /// The process.
        pid: Pid,
    },
    /// To the origin of a run: what its terminal is like on the node that gives the process up (`Done`).
    TerminalIs {
        /// The run.
        run: RunId,
        /// What it is like.
        state: TtyState,
    },
    /// To the node that a process has come to: how far its pages have come (`Drain`).
    Drain {
        /// The process.
        pid: Pid,
    },
    /// To the destination of a move to be: could these be restored there (`Obstacles`)? Postcard of a list of
    /// [`crate::image::Plan`]s without pages.
    Examine {
        /// The plans.
        plans: Vec<u8>,
    },
    /// To the destination of a move that is being prepared: how far the memory of a process has come that is sent ahead
    /// of its freeze (`Ahead`; `NotHere` if none is).
    Ahead {
        /// The move.
        by: MoveId,
        /// The process.
        pid: Pid,
    },
    /// To the same: these pages (first address, number of pages) were written since they came and have to come again
    /// (`Done`; `NotYet` while others are still to come; `NotHere`).
    Recall {
        /// The move.
        by: MoveId,
        /// The process.
        pid: Pid,
        /// Which.
        ranges: Vec<(u64, u64)>,
    },
    /// What CLOCK_MONOTONIC and CLOCK_BOOTTIME of the called node are, outside its nest (`Clocks`).
    Clocks,
    /// To the origin of a run: what its terminal is like, as [`PeerRequest::TerminalIs`] said last (`Tty`, `NotHere`).
    Terminal {
        /// The run.
        run: RunId,
    },
    /// Where sockets are, and where the caller is on the link between the nodes (`Done`, `Failed`).
    Sockets {
        /// The caller's address there.
        mac: [u8; 6],
        /// In order.
        news: Vec<SocketNews>,
    },
    /// To the arbiter of ports: a program of the calling node is about to take these (`Done`, `PortTaken`, `NotYet`).
    ClaimPorts {
        /// One, or that of both families.
        ports: Vec<Endpoint>,
    },
    /// To the arbiter of ports: what the nest of the calling node has bound (`Done`).
    PortsBound {
        /// The ports.
        bound: Vec<Endpoint>,
        /// How long ago that was seen.
        age_ms: u32,
    },
    /// To any node: what its nest has bound (`Bound`).
    WhichPorts,
}

/// Where a socket is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketNews {
    /// There.
    At {
        /// What it is reached by.
        endpoint: Endpoint,
        /// On this node.
        node: Slot,
        /// Of two pieces of news, the one with the greater epoch holds.
        epoch: u64,
    },
    /// Not on the calling node any more, and nowhere else.
    Closed {
        /// What it was reached by.
        endpoint: Endpoint,
    },
}

/// What a parent is told of a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// It has ended.
    Ended(ExitStatus),
    /// It was stopped.
    Stopped,
    /// It goes on.
    Continued,
}

/// The answer to a [`PeerRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum PeerReply {
    /// Done.
    Done,
    /// To `Ps`.
    Processes(Vec<ProcessRow>),
    /// To `Status`.
    Status(NodeStatus),
    /// To `Locate`.
    Located(Located),
    /// To `Wait`: it has ended.
    Exited(ExitStatus),
    /// To `Wait`: it runs; ask again.
    NotYet,
    /// The process or run is not, or no longer, on the called node: ask its home again.
    NotHere,
    /// To `Drain`; `None` for a process that did not come by a move.
    Drain(Option<Drain>),
    /// To `Ahead`: how many pages are still to come.
    Ahead {
        /// So many.
        pages_left: u64,
    },
    /// To `Examine`.
    Obstacles(Vec<crate::control::Obstacle>),
    /// To `Clocks`, nanoseconds.
    Clocks([i64; 2]),
    /// To `Terminal`.
    Tty(TtyState),
    /// To `ClaimPorts`: another node has one of them.
    PortTaken(Slot),
    /// To `WhichPorts`.
    Bound(Vec<Endpoint>),
    /// It could not be done.
    Failed(Failure),
}

/// What a home knows of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Located {
    /// It is on that node.
    At(Slot),
    /// It has ended not long ago.
    Ended {
        /// How.
        status: ExitStatus,
        /// Whose it was.
        uid: u32,
    },
    /// There is none.
    Nowhere,
}

/// How far the pages of a moved process have come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Drain {
    /// Pages elsewhere when it came.
    pub pages_total: u64,
    /// Pages still elsewhere.
    pub pages_left: u64,
    /// Pages that it waited for.
    pub pages_faulted: u64,
    /// Pages that came unasked.
    pub pages_pushed: u64,
    /// The recent rate.
    pub bytes_per_second: u64,
    /// How long it waited for a page.
    pub fault_us: crate::control::Quantiles,
    /// The pager's work is over.
    pub finished: bool,
    /// How many pages were compared with the original before it ran.
    pub verified_pages: Option<u64>,
    /// What the destination did inside the freeze.
    pub steps: Vec<crate::control::Step>,
    /// For how long it had been running when the source was told so, in microseconds.
    pub told_after_us: f64,
}
