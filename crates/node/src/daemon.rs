//! The daemon of a node: `dunlin node`.
//!
//! Owns its life: state directory, lock, nest, sockets, threads. Refuses to know what is done on them. Plain threads and
//! blocking calls (docs/decisions/0003): ptrace is bound to threads, pages are a matter of latency, and peers are few.
//!
//! Invariants: at most one daemon serves a state directory; a daemon that ends, in whatever way, leaves the nest and
//! everything in it as they are, and the next one takes them up; it is ready when its control socket answers.

pub(crate) mod events;
mod inbound;
pub mod moving;
pub mod node;
mod place;

pub use node::Node;

use crate::config::NodeConfig;
use crate::edge::{Edge, EdgeError, announce};
use crate::logs::Logs;
use crate::mover::{Mover, Parts};
use crate::nest::{Nest, NestError, NestEvent};
use crate::peers::{Answer, Peers};
use crate::ports::{self, Ports};
use crate::processes::exits::Exits;
use crate::processes::{Hidden, NestProc, Residents};
use crate::runs::{Keeper, Runs};
use crate::streams::terminal;
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::{Modulus, Pid, Slot};
use dunlin_proto::peer::Purpose;
use dunlin_sys::termination;
use events::Workers;
use moving::RunStreams;
use place::{Acceptor, StateDir};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::io;
use std::net::TcpListener;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

/// How long a daemon that ends waits for output that is on its way.
const FINISH_WITHIN: Duration = Duration::from_secs(1);
/// How long PID 1's word on a run that ended without a daemon is waited for.
const WORD_WITHIN: Duration = Duration::from_secs(3);

/// Why a daemon does not, or no longer, serve.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another one serves this state directory.
    #[error("a daemon already serves {state_dir}; hint: `dunlin lab status`, or see daemon.pid there")]
    Busy {
        /// The directory.
        state_dir: PathBuf,
    },
    /// Something that it needs could not be had; nothing was started that was not running before.
    #[error("{what}: {source}")]
    Io {
        /// What.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// There is no nest.
    #[error(transparent)]
    Nest(#[from] NestError),
    /// The nest has no network, and should have one. The nest stays.
    #[error("{0}; hint: `dunlin doctor` tells what is missing")]
    Edge(#[from] EdgeError),
    /// The nest, and every program in it, is gone.
    #[error("the nest has ended, and all programs in it; hint: see init.log in {state_dir}")]
    NestGone {
        /// The node's state directory.
        state_dir: PathBuf,
    },
}

/// For tests: the daemon makes so many steps, and dies as if by `kill -9`. See [`dunlin_sys::fuse`].
pub const FUSE: &str = "DUNLIN_FUSE";

/// A running daemon; ends with [`Daemon::stop`].
pub struct Daemon {
    node: Arc<Node>,
    place: StateDir,
    acceptors: Vec<Acceptor>,
    /// Readable when the nest is gone.
    nest_gone: Arc<OwnedFd>,
}

/// Serves until SIGTERM or SIGINT. The nest stays.
pub fn run(config: NodeConfig) -> Result<(), DaemonError> {
    let state_dir = config.state_dir.clone();
    let exe = std::env::current_exe().map_err(io_error("this program's own file"))?;
    if let Some(steps) = std::env::var(FUSE).ok().and_then(|steps| steps.parse().ok()) {
        dunlin_sys::fuse::light(steps);
    }
    let terminated = termination::watch().map_err(io_error("catching SIGTERM"))?;
    let daemon = Daemon::start(config, &exe)?;
    let mut polled = [
        PollFd::new(&terminated, PollFlags::IN),
        PollFd::new(&*daemon.nest_gone, PollFlags::IN),
    ];
    while poll(&mut polled, None).is_err() {}
    let nest_gone = polled[1].revents().contains(PollFlags::IN);
    daemon.stop();
    if nest_gone {
        Err(DaemonError::NestGone { state_dir })
    } else {
        Ok(())
    }
}

impl Daemon {
    /// Starts serving; returns when peers and callers are answered. `exe init` makes the nest if there is none.
    pub fn start(config: NodeConfig, exe: &Path) -> Result<Daemon, DaemonError> {
        let place = StateDir::claim(&config.state_dir)?;
        let listener = TcpListener::bind(config.listen).map_err(io_error(format!("listening on {}", config.listen)))?;
        let (nest, nest_events) = Nest::open(&config, exe)?;
        let nest_gone = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| io_error("an eventfd")(e.into()))?;
        let nest_gone = Arc::new(nest_gone);
        let edge = Edge::open(&config, &nest)?;
        let node = assemble(config, nest, edge, nest_events, nest_gone.clone()).map_err(io_error("the nest"))?;
        let acceptors = vec![
            Acceptor::peers(listener, node.clone()).map_err(io_error("serving peers"))?,
            Acceptor::control(place.control_socket()?, node.clone()).map_err(io_error("serving control.sock"))?,
        ];
        tracing::info!("node {} serves on {}", node.config.name, node.config.listen);
        Ok(Daemon {
            node,
            place,
            acceptors,
            nest_gone,
        })
    }

    /// Its parts.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Ends it. The nest stays.
    pub fn stop(self) {
        for acceptor in self.acceptors {
            acceptor.stop();
        }
        self.node.runs.finish(FINISH_WITHIN);
        self.place.leave();
    }
}

/// Puts the parts together and takes up what the last daemon left.
fn assemble(
    config: NodeConfig,
    nest: Nest,
    edge: Edge,
    nest_events: Receiver<NestEvent>,
    nest_gone: Arc<OwnedFd>,
) -> io::Result<Arc<Node>> {
    let mut nonce = [0u8; 8];
    rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())?;
    let boot = u64::from_ne_bytes(nonce);
    let config = Arc::new(config);
    let (slot, modulus) = (Slot(config.slot), Modulus(config.modulus));
    let logs = Arc::new(Logs::open(&config.state_dir.join("logs"))?);
    let proc = || NestProc::open(nest.root());
    let peers = Arc::new(Peers::new(&config, boot));
    let workers: Arc<OnceLock<Workers>> = Arc::default();
    let given = workers.clone();
    let exits = Exits::start(proc()?, move |pid, ended| {
        if let Some(workers) = given.get() {
            workers.ended(pid, ended);
        }
    })?;
    let dialled = peers.clone();
    let dial =
        move |open: dunlin_proto::stream::StreamOpen| dialled.open(open.stream.run.origin, Purpose::Stream(open));
    let runs = Runs::new(slot, Arc::new(NestKeeper(nest.clone())), logs.clone(), proc()?, dial);
    let (hidden, residents) = (Arc::<Hidden>::default(), Arc::<Residents>::default());
    let mover = Mover::start(Parts {
        config: config.clone(),
        nest: nest.clone(),
        peers: peers.clone(),
        hidden: hidden.clone(),
        residents: residents.clone(),
        exits: exits.clone(),
        streams: Arc::new(RunStreams {
            runs: runs.clone(),
            peers: peers.clone(),
        }),
        edge: edge.clone(),
    })?;
    let ports = Ports::start(peers.clone(), edge.clone(), ports::arbiter_of(&config))?;
    let node = Arc::new(Node {
        ports,
        config,
        slot,
        modulus,
        boot,
        proc: proc()?,
        nest,
        edge,
        peers,
        hidden,
        residents,
        exits,
        runs,
        logs,
        mover,
    });
    // Does not keep the node alive: a call to oneself is not answered by a node that has ended.
    let answer: Arc<dyn Answer> = Arc::new(inbound::NodeAnswer(Arc::downgrade(&node)));
    node.peers.set_own(answer);
    node.mover.recover()?;
    announce::start(&node)?;
    let runs = node.runs.restore()?;
    let started = Workers::start(&node)?;
    if workers.set(started.clone()).is_err() {
        return Err(io::Error::other("the workers are started once"));
    }
    bury_later(&node, runs)?;
    let weak = Arc::downgrade(&node);
    thread::Builder::new().name("nest".into()).spawn(move || {
        if events::take(&weak, &started, &nest_events) {
            // The one who waits for it may be gone, and then nobody needs to know.
            let _ = rustix::io::write(&*nest_gone, &1u64.to_ne_bytes());
        }
    })?;
    Ok(node)
}

/// Runs of a former daemon may have ended without one: PID 1 says how, as soon as it is listened to. If it does not,
/// they have ended nevertheless.
fn bury_later(node: &Arc<Node>, runs: Vec<Pid>) -> io::Result<()> {
    let gone = |node: &Node, pid: &Pid| node.nest.host_pid(*pid).is_ok_and(|found| found.is_none());
    let silent: Vec<Pid> = runs.into_iter().filter(|pid| gone(node, pid)).collect();
    let node = Arc::downgrade(node);
    let bury = move || {
        thread::sleep(WORD_WITHIN);
        let Some(node) = node.upgrade() else { return };
        for pid in silent {
            if let Some(run) = node.runs.of(pid).filter(|_| gone(&node, &pid)) {
                events::run_ended(&node, &run, pid, ExitStatus::Unknown);
            }
        }
    };
    thread::Builder::new().name("bury".into()).spawn(bury).map(drop)
}

/// The nest, as runs need it.
struct NestKeeper(Nest);

impl Keeper for NestKeeper {
    fn keep(&self, label: &str, fds: &[BorrowedFd<'_>], bytes: Vec<u8>) -> io::Result<()> {
        self.0.store(label, fds, bytes)
    }

    fn kept(&self, label: &str) -> io::Result<Option<(Vec<OwnedFd>, Vec<u8>)>> {
        self.0.fetch(label)
    }

    fn forget(&self, label: &str) -> io::Result<()> {
        self.0.drop_label(label).map(drop)
    }

    fn labels(&self) -> io::Result<Vec<String>> {
        self.0.list()
    }

    fn terminal(&self) -> io::Result<OwnedFd> {
        terminal::open_master(self.0.root())
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> DaemonError {
    let what = what.into();
    move |source| DaemonError::Io { what, source }
}
