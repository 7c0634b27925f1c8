//! What all parts of a daemon share, and the question they all ask: where is a process?
//!
//! Owns [`Node`]. Refuses to know sockets and commands. Invariant: a PID is *here* if the nest has such a process and it
//! is not hidden; else its home knows, and nobody else is asked.

use crate::config::NodeConfig;
use crate::edge::Edge;
use crate::logs::Logs;
use crate::mover::Mover;
use crate::nest::{Nest, Response};
use crate::peers::{PeerError, Peers};
use crate::ports::Ports;
use crate::processes::exits::{Exits, Watch};
use crate::processes::{self, Hidden, NestProc, Residents};
use crate::runs::Runs;
use dunlin_cluster::table::Whereabouts;
use dunlin_proto::control::{ExitStatus, Failure, FailureKind, NodeStatus, ProcessRow};
use dunlin_proto::ids::{LAST_OWN_PID, Modulus, Pid, Slot};
use dunlin_proto::peer::{Caller, Located, PeerReply, PeerRequest};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How long `ps` and `status` wait for a silent node.
const LOOK_WITHIN: Duration = Duration::from_millis(1500);
/// How long PID 1 may take to tell the end of a run, and how often it is looked for.
const WORD_WITHIN: Duration = Duration::from_secs(4);
const WORD_AFTER: Duration = Duration::from_millis(5);

/// A daemon's parts.
pub struct Node {
    /// As it was read at the start.
    pub config: Arc<NodeConfig>,
    /// This node.
    pub slot: Slot,
    /// The cluster's.
    pub modulus: Modulus,
    /// This daemon's nonce.
    pub boot: u64,
    /// The nest.
    pub nest: Nest,
    /// Its `/proc`.
    pub proc: NestProc,
    /// How packets get into the nest and out of it.
    pub edge: Edge,
    /// The other nodes.
    pub peers: Arc<Peers>,
    /// What in the nest is no program.
    pub hidden: Arc<Hidden>,
    /// What in the nest came from elsewhere.
    pub residents: Arc<Residents>,
    /// How processes end.
    pub exits: Arc<Exits>,
    /// Programs started here, and streams of those started elsewhere.
    pub runs: Arc<Runs>,
    /// Their logs.
    pub logs: Arc<Logs>,
    /// What moves processes, and knows where those of this home are.
    pub mover: Arc<Mover>,
    /// Which ports the programs have; `None` where nests have no network.
    pub ports: Option<Arc<Ports>>,
}

/// Where a process is.
#[derive(Debug)]
pub enum Place {
    /// Here.
    Here(OwnedFd),
    /// There, says its home.
    At(Slot),
    /// Ended not long ago.
    Ended {
        /// How.
        status: ExitStatus,
        /// Whose it was.
        uid: u32,
    },
    /// There is none.
    Nowhere,
}

impl Node {
    /// A pidfd of a process that is here; `None`: it is not.
    pub fn here(&self, pid: Pid) -> io::Result<Option<OwnedFd>> {
        if pid.0 <= LAST_OWN_PID || self.hidden.kind(pid).is_some() {
            return Ok(None);
        }
        self.nest.pidfd(pid)
    }

    /// Where is it?
    pub fn locate(&self, pid: Pid) -> Result<Place, Failure> {
        if let Some(pidfd) = self.here(pid).map_err(nest_failure)? {
            return Ok(Place::Here(pidfd));
        }
        match self.mover.whereabouts(pid) {
            Whereabouts::EachNodesOwn => Ok(Place::Nowhere),
            Whereabouts::Known(place) if place.node() != self.slot => Ok(Place::At(place.node())),
            Whereabouts::Known(_) => self.arrived_or_ended(pid),
            Whereabouts::AskHome { home, .. } => self.ask_home(home, pid),
        }
    }

    /// What is known of a process that should be here and is not.
    fn arrived_or_ended(&self, pid: Pid) -> Result<Place, Failure> {
        // Of one that is arriving it is decided that it is here; in a moment it is. A run's end is known when PID 1 has told
        // it, which may be a moment after the kernel has forgotten the process; an end elsewhere when its node has told it,
        // while the entry here is still to end.
        let is_coming = || {
            let is_run = self.runs.of(pid).is_some();
            is_run || self.hidden.kind(pid).is_some() && self.exits.ended(pid).is_none()
        };
        let deadline = Instant::now() + WORD_WITHIN;
        while is_coming() && Instant::now() < deadline {
            thread::sleep(WORD_AFTER);
        }
        if let Some(pidfd) = self.here(pid).map_err(nest_failure)? {
            return Ok(Place::Here(pidfd));
        }
        Ok(self.exits.ended(pid).map_or(Place::Nowhere, |e| Place::Ended {
            status: e.status,
            uid: e.uid,
        }))
    }

    fn ask_home(&self, home: Slot, pid: Pid) -> Result<Place, Failure> {
        match self.peers.call(home, &PeerRequest::Locate { pid }) {
            Ok(PeerReply::Located(located)) => Ok(match located {
                Located::At(slot) => Place::At(slot),
                Located::Ended { status, uid } => Place::Ended { status, uid },
                Located::Nowhere => Place::Nowhere,
            }),
            Ok(other) => Err(unexpected(self, home, &other)),
            // A PID of a residue that no node has was never given out.
            Err(PeerError::Unknown(_)) => Ok(Place::Nowhere),
            Err(e) => Err(unreachable(&e)),
        }
    }

    /// The answer to a peer that asks this home.
    pub(super) fn located(&self, pid: Pid) -> Result<Located, Failure> {
        if self.modulus.home(pid) != Some(self.slot) {
            return Ok(Located::Nowhere);
        }
        Ok(match self.locate(pid)? {
            Place::Here(_) => Located::At(self.slot),
            Place::At(slot) => Located::At(slot),
            Place::Ended { status, uid } => Located::Ended { status, uid },
            Place::Nowhere => Located::Nowhere,
        })
    }

    /// Answers a call of a program.
    pub(crate) fn respond(&self, id: u64, response: Response) {
        // The caller may have been killed meanwhile.
        if let Err(e) = self.nest.respond(id, response)
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("a program's call stays unanswered: {e}");
        }
    }

    /// Watches a process that is here for its end.
    pub(crate) fn watch(&self, pid: Pid, pidfd: OwnedFd) -> io::Result<Arc<Watch>> {
        let uid = self.proc.users(pid)?.map_or(u32::MAX, |(uid, _)| uid);
        self.exits.watch(pid, pidfd, uid)
    }

    /// May the caller have a process of this user waited for, moved, or its log read?
    pub fn permit(&self, caller: Caller, uid: u32, pid: Pid) -> Result<(), Failure> {
        if caller.privileged || caller.uid == uid {
            return Ok(());
        }
        Err(failure(
            FailureKind::Forbidden,
            format!("process {pid} is another user's"),
            Some("ask root"),
        ))
    }

    /// The processes that run here.
    pub fn local_rows(&self) -> io::Result<Vec<ProcessRow>> {
        processes::rows(&self.config, &self.proc, &self.hidden, &self.residents)
    }

    /// The processes of all nodes, and the names of those that did not answer.
    pub fn all_rows(&self) -> io::Result<(Vec<ProcessRow>, Vec<String>)> {
        let mut by_pid: BTreeMap<Pid, ProcessRow> = BTreeMap::new();
        let mut silent = Vec::new();
        for (slot, reply) in self.peers.call_others(&PeerRequest::Ps, LOOK_WITHIN) {
            match reply {
                Ok(PeerReply::Processes(rows)) => by_pid.extend(rows.into_iter().map(|row| (row.pid, row))),
                Ok(_) | Err(_) => silent.push(self.peers.name(slot)),
            }
        }
        by_pid.extend(self.local_rows()?.into_iter().map(|row| (row.pid, row)));
        Ok((by_pid.into_values().collect(), silent))
    }

    /// This node's state; with `peers`, who of them answers.
    pub fn status(&self, peers: bool) -> io::Result<NodeStatus> {
        let answers = if peers {
            self.peers.call_others(&PeerRequest::Status, LOOK_WITHIN)
        } else {
            Vec::new()
        };
        let programs = self
            .proc
            .pids()?
            .into_iter()
            .filter(|p| p.0 > LAST_OWN_PID && self.hidden.kind(*p).is_none());
        Ok(NodeStatus {
            name: self.config.name.clone(),
            slot: self.slot,
            modulus: self.modulus.0,
            version: env!("CARGO_PKG_VERSION").into(),
            daemon_pid: std::process::id() as i32,
            init_pid: self.nest.init_pid(),
            processes: programs.count() as u32,
            peers: answers
                .into_iter()
                .map(|(slot, reply)| (self.peers.name(slot), reply.is_ok()))
                .collect(),
        })
    }
}

/// A failure in words.
pub fn failure(kind: FailureKind, message: impl Into<String>, hint: Option<&str>) -> Failure {
    Failure {
        kind,
        message: message.into(),
        hint: hint.map(Into::into),
    }
}

/// There is no such process.
pub fn no_process(pid: Pid) -> Failure {
    failure(
        FailureKind::NoProcess,
        format!("there is no process {pid} in the cluster"),
        Some("`dunlin ps` lists them"),
    )
}

/// A peer that is needed did not answer.
pub fn unreachable(error: &PeerError) -> Failure {
    failure(FailureKind::Unreachable, error.to_string(), None)
}

/// A peer answered something else.
pub fn unexpected(node: &Node, slot: Slot, reply: &PeerReply) -> Failure {
    match reply {
        PeerReply::Failed(failure) => failure.clone(),
        other => failure(
            FailureKind::Other,
            format!("node {} answered {other:?}", node.peers.name(slot)),
            None,
        ),
    }
}

/// The nest did not do what it was asked.
pub fn nest_failure(error: io::Error) -> Failure {
    failure(
        FailureKind::Other,
        format!("the nest: {error}"),
        Some("see init.log in the node's state directory"),
    )
}
