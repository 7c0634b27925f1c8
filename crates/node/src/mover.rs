//! The mover: drives the move protocol's machines with real processes.
//!
//! Owns the moves under way on this node in all three roles, the images it holds, the pager, and what is known of the
//! processes that came from elsewhere. Refuses to know how a user asks and is answered. Each move has one OS thread at
//! its source ([`outgoing`]) and one at its destination ([`incoming`]), because ptrace is bound to threads; the home's
//! decisions ([`decisions`]) are made where a word arrives. Invariant: whether a copy may run is said by
//! `dunlin_cluster::relocation` alone.

mod again;
mod ahead;
mod arrivals;
mod arrive;
mod attempts;
mod decisions;
mod fates;
mod giving;
mod incoming;
mod keepers;
mod leftovers;
mod links;
mod outgoing;
mod party;
mod payload;
mod progress;
mod rebuild;
mod records;
mod recover;
mod relatives;
mod reports;
mod second_hand;
mod still;
mod survivors;

pub use outgoing::{MoveOutcome, Report, Reporter};
pub use rebuild::raw_clocks;

use crate::capture::CaptureError;
use crate::capture::freeze::LeftBehind;
use crate::config::NodeConfig;
use crate::edge::Edge;
use crate::entries::Entries;
use crate::install::{Installer, Verdict};
use crate::nest::{Nest, Response};
use crate::page_server::ImageStore;
use crate::pager::Pager;
use crate::peers::Peers;
use crate::processes::exits::Exits;
use crate::processes::{Hidden, HiddenKind, Residents};
use crate::signals::orders::Orders;
use arrivals::Arrivals;
use dunlin_cluster::relocation::destination::DestinationEvent;
use dunlin_cluster::relocation::home::{Home, HomeEvent};
use dunlin_cluster::relocation::outbox::Outbox;
use dunlin_cluster::relocation::source::SourceEvent;
use dunlin_cluster::relocation::{Now, stray};
use dunlin_cluster::table::Whereabouts;
use dunlin_proto::control::ExitStatus;
use dunlin_proto::frame;
use dunlin_proto::ids::{Incarnation, Modulus, MoveId, Pid, RunId, Slot};
use dunlin_proto::relocation::{MoveMsg, Notice, SourceToDestination};
use dunlin_sys::procfs::ProcDir;
use links::Links;
use party::{children_of, has_ended};
use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// The standard streams of runs, as the mover needs them.
pub trait Streams: Send + Sync {
    /// Which stream of which run is this local end? (0, 1, 2, or 3 for the terminal.)
    fn identify(&self, fd: BorrowedFd<'_>) -> Option<(RunId, u8)>;
    /// A local end of a stream, made if need be.
    fn open(&self, run: RunId, stream: u8) -> io::Result<OwnedFd>;
    /// Returns when everything written into the local end has reached the origin. The writers are frozen.
    fn settle(&self, run: RunId, stream: u8) -> io::Result<()>;
    /// The process has left for another node; `streams` are those it used.
    fn departed(&self, pid: Pid, streams: &[(RunId, u8)], to: Slot);
    /// The process has come.
    fn arrived(&self, pid: Pid, streams: &[(RunId, u8)]);
}

/// The ids of a process, its incarnation, and how it ended.
type EarlyEnd = (Vec<Pid>, Incarnation, ExitStatus);

/// What a thread of a move is told.
enum Word {
    /// And when it came.
    Source(SourceEvent, Instant),
    Destination(DestinationEvent),
}

/// Everything a node needs to move processes.
pub struct Mover {
    /// This node.
    pub here: Slot,
    /// Its configuration.
    pub config: Arc<NodeConfig>,
    /// Its nest.
    pub nest: Nest,
    /// The other nodes.
    pub peers: Arc<Peers>,
    /// Surrogates and keepers.
    pub hidden: Arc<Hidden>,
    /// Processes from elsewhere.
    pub residents: Arc<Residents>,
    /// Who has ended.
    pub exits: Arc<Exits>,
    /// The images it holds.
    pub images: ImageStore,
    /// Serves the address spaces whose pages are elsewhere.
    pub pager: Pager,
    /// The surrogates of its nest.
    pub entries: Entries,
    /// Which orders its processes have obeyed.
    pub orders: Orders,
    /// How packets find its sockets.
    pub edge: Edge,
    streams: Arc<dyn Streams>,
    installer: Arc<Installer>,
    arrivals: Arrivals,
    ahead: ahead::Ahead,
    links: Links,
    home: Mutex<Home>,
    outbox: Mutex<Outbox>,
    /// Held by whoever carries out what these two want kept.
    turn: Mutex<()>,
    sources: Mutex<BTreeMap<MoveId, Sender<Word>>>,
    destinations: Mutex<BTreeMap<MoveId, Sender<Word>>>,
    /// Processes that a move of this node covers.
    busy: Mutex<BTreeMap<Pid, MoveId>>,
    /// Processes that came and have ended before the table here had learned that they came.
    early_ends: Mutex<BTreeMap<Pid, EarlyEnd>>,
    /// Keepers that are still to be ended.
    spent: Mutex<Vec<keepers::Spent>>,
    /// Processes that have ended elsewhere before their surrogates stood here.
    ends: Mutex<BTreeMap<Pid, ExitStatus>>,
    started: Instant,
    me: Weak<Mover>,
}

/// What a mover is made of.
pub struct Parts {
    /// The node's configuration.
    pub config: Arc<NodeConfig>,
    /// Its nest.
    pub nest: Nest,
    /// The other nodes.
    pub peers: Arc<Peers>,
    /// Surrogates and keepers.
    pub hidden: Arc<Hidden>,
    /// Processes from elsewhere.
    pub residents: Arc<Residents>,
    /// Who has ended.
    pub exits: Arc<Exits>,
    /// The standard streams of runs.
    pub streams: Arc<dyn Streams>,
    /// How packets find its sockets.
    pub edge: Edge,
}

/// How many seccomp filters every process of a nest has: init's.
const NEST_FILTERS: usize = 1;
const TICK: Duration = Duration::from_millis(100);
/// Surrogates that nobody needs any more are looked for every so many ticks.
const SWEEP_TICKS: u32 = 10;

impl Mover {
    /// A mover, which says and does nothing before it has [recovered](Mover::recover).
    pub fn start(parts: Parts) -> io::Result<Arc<Mover>> {
        let Parts {
            config,
            nest,
            peers,
            hidden,
            residents,
            exits,
            streams,
            edge,
        } = parts;
        let here = Slot(config.slot);
        let modulus = Modulus(config.modulus);
        let installer = Arc::new(Installer::new(nest.cookie(), modulus, here));
        let ledger = decisions::recover_ledger(&nest)?;
        let notices = decisions::recover_notices(&nest)?;
        let mover = Arc::new_cyclic(|me| Mover {
            here,
            entries: Entries::new(nest.clone(), hidden.clone(), installer.clone(), peers.boot()),
            images: ImageStore::new(),
            pager: Pager::new(),
            orders: Orders::default(),
            arrivals: Arrivals::default(),
            ahead: ahead::Ahead::default(),
            links: Links::new(peers.clone()),
            home: Mutex::new(Home::restore(Duration::ZERO, modulus, here, ledger)),
            outbox: Mutex::new(Outbox::restore(Duration::ZERO, notices)),
            turn: Mutex::default(),
            sources: Mutex::default(),
            destinations: Mutex::default(),
            busy: Mutex::default(),
            early_ends: Mutex::default(),
            ends: Mutex::default(),
            spent: Mutex::default(),
            started: Instant::now(),
            me: me.clone(),
            config,
            nest,
            peers,
            hidden,
            residents,
            exits,
            streams,
            installer,
            edge,
        });
        Ok(mover)
    }

    /// Begins to speak: all records of the last daemon are taken up, and what it was told is for moves that are known.
    fn begin(&self) -> io::Result<()> {
        let weak = self.me.clone();
        std::thread::Builder::new().name("mover-tick".into()).spawn(move || {
            let mut ticks = 0u32;
            while let Some(mover) = weak.upgrade() {
                mover.tick();
                ticks = ticks.wrapping_add(1);
                if ticks.is_multiple_of(SWEEP_TICKS) {
                    mover.sweep();
                }
                drop(mover);
                std::thread::sleep(TICK);
            }
        })?;
        self.run_decisions();
        self.run_outbox();
        Ok(())
    }

    /// Looks at a notification of the nest; false if it is not the mover's.
    pub fn notified(&self, id: u64, tid: Pid, number: i64, arguments: &[u64; 6]) -> bool {
        let listener = self.nest.listener().as_fd();
        let response = match self.installer.notified(listener, id, tid, number, arguments) {
            None => return false,
            Some(Verdict::Return(value)) => Response::Value(value),
            Some(Verdict::Fail(errno)) => Response::Errno(errno),
        };
        if let Err(error) = self.nest.respond(id, response) {
            tracing::warn!(%error, "a call of a traced process could not be answered");
        }
        true
    }

    /// Reads the words of a peer until its connection ends.
    pub fn serve(&self, from: Slot, mut stream: TcpStream) {
        dunlin_sys::inspect::be_prompt();
        while let Ok(msg) = frame::read::<MoveMsg>(&mut stream) {
            self.receive(from, msg);
        }
        for senders in [&self.sources, &self.destinations] {
            let senders: Vec<Sender<Word>> = lock(senders).values().cloned().collect();
            for sender in senders {
                // A thread takes only the kind that is its own.
                let _ = sender.send(Word::Source(SourceEvent::PeerLost(from), Instant::now()));
                let _ = sender.send(Word::Destination(DestinationEvent::PeerLost(from)));
            }
        }
    }

    /// Says a word to a node, this one included.
    fn send(&self, to: Slot, msg: MoveMsg) {
        if to == self.here {
            self.receive(to, msg);
        } else {
            self.links.send(to, &msg);
        }
    }

    /// Takes a word to whom it is for.
    fn receive(&self, from: Slot, msg: MoveMsg) {
        // What is long is handed on as it is.
        let msg = match msg {
            MoveMsg::SourceToDestination(id, word @ SourceToDestination::Essence { .. }) => {
                let event = DestinationEvent::FromSource(from, word);
                match self.to_destination(id, event) {
                    Ok(()) => return,
                    Err(DestinationEvent::FromSource(_, word)) => MoveMsg::SourceToDestination(id, word),
                    Err(_) => return,
                }
            }
            other => other,
        };
        let delivered = match &msg {
            MoveMsg::SourceToHome(id, word) => {
                return self.decide(HomeEvent::FromSource(from, *id, word.clone()));
            }
            MoveMsg::DestinationToHome(id, word) => {
                return self.decide(HomeEvent::FromDestination(from, *id, word.clone()));
            }
            MoveMsg::HomeToHome(id, word) => return self.decide(HomeEvent::FromHome(from, *id, word.clone())),
            MoveMsg::HomeToSource(id, word) => self.to_source(*id, SourceEvent::FromHome(from, word.clone())),
            MoveMsg::DestinationToSource(id, word) => {
                self.to_source(*id, SourceEvent::FromDestination(from, word.clone()))
            }
            MoveMsg::HomeToDestination(id, word) => {
                let event = DestinationEvent::FromHome(from, word.clone());
                self.to_destination(*id, event).is_ok()
            }
            MoveMsg::SourceToDestination(id, word) => {
                let event = DestinationEvent::FromSource(from, word.clone());
                let known = self.to_destination(*id, event).is_ok();
                if let SourceToDestination::Propose { home, payload } = word
                    && !known
                    && id.source == from
                {
                    return self.accept_proposal(*id, *home, payload.clone());
                }
                known
            }
            MoveMsg::Notice(
                notice @ Notice::Ended {
                    pid,
                    incarnation,
                    ending,
                },
            ) => {
                self.decide(HomeEvent::Ended(from, *pid, *incarnation, *ending));
                return self.send(from, MoveMsg::Noted(*notice));
            }
            MoveMsg::Notice(Notice::Drained { move_id, pid }) => {
                self.to_source(*move_id, SourceEvent::Drained(from, *pid))
            }
            MoveMsg::Noted(notice) => {
                lock(&self.outbox).noted(from, *notice);
                return self.run_outbox();
            }
        };
        if !delivered {
            let stray = stray(&msg);
            if !stray.raise.is_empty() {
                self.decide(HomeEvent::Raise(stray.raise));
            }
            if let Some(reply) = stray.reply {
                self.send(from, reply);
            }
        }
    }

    fn to_source(&self, id: MoveId, event: SourceEvent) -> bool {
        let sender = lock(&self.sources).get(&id).cloned();
        sender.is_some_and(|s| s.send(Word::Source(event, Instant::now())).is_ok())
    }

    /// Hands an event to the thread of a move; back, if there is none.
    fn to_destination(&self, id: MoveId, event: DestinationEvent) -> Result<(), DestinationEvent> {
        let Some(sender) = lock(&self.destinations).get(&id).cloned() else {
            return Err(event);
        };
        sender.send(Word::Destination(event)).map_err(|unsent| match unsent.0 {
            Word::Destination(event) => event,
            Word::Source(..) => DestinationEvent::Tick,
        })
    }

    /// Monotonic time since the mover was made, as the machines want it.
    fn now(&self) -> Now {
        self.started.elapsed()
    }

    /// Where a process is, by this home's table.
    pub fn whereabouts(&self, pid: Pid) -> Whereabouts {
        lock(&self.home).table().whereabouts(pid)
    }

    /// The cluster's modulus.
    pub fn modulus(&self) -> Modulus {
        Modulus(self.config.modulus)
    }

    /// Clears away a process that runs elsewhere now: its memory stays with a keeper (whose numbers come back), and
    /// of the process a surrogate where somebody here still needs its number (who does not leave with it).
    fn leave_behind(
        &self,
        (pid, host, stopped): (Pid, i32, bool),
        into_image: impl FnOnce() -> Result<LeftBehind, CaptureError>,
        leaving: &[i32],
        remember: impl FnOnce(Pid),
    ) -> io::Result<(Pid, i32)> {
        let comm = ProcDir::process(host).bytes("comm")?;
        let left = into_image().map_err(io::Error::other)?;
        let number = left.keeper;
        self.hidden.insert(number, HiddenKind::Keeper);
        let keeper = self.nest.host_pid(number)?.ok_or(io::ErrorKind::NotFound)?;
        // As long as the first thread is there, a later daemon finds the keeper by it; from here on by this.
        remember(number);
        let kind = if self.modulus().home(pid) == Some(self.here) {
            HiddenKind::Departed
        } else if self.has_relatives_here(pid, leaving) {
            HiddenKind::Relative
        } else {
            // Its end here is not its end: the surrogate of its parent sees it, and nobody is to be told.
            HiddenKind::Leaving
        };
        self.hidden.insert(pid, kind);
        self.hidden.is_stopped(pid, stopped);
        match kind {
            HiddenKind::Leaving => left.exit().map_err(io::Error::other)?,
            _ => {
                self.entries.stay(left, pid, host, comm.trim_ascii_end())?;
                self.look_for_ended_children(host);
            }
        }
        self.end_if_ended(pid);
        Ok((number, keeper))
    }

    /// A child that ended while its parent was taken away has said so to somebody who did not listen: the surrogate looks.
    fn look_for_ended_children(&self, surrogate: i32) {
        let ended = children_of(surrogate)
            .into_iter()
            .any(|(child, host)| self.hidden.kind(child).is_none() && has_ended(host));
        if ended && let Some(surrogate) = rustix::process::Pid::from_raw(surrogate) {
            let told = rustix::process::kill_process(surrogate, rustix::process::Signal::CHILD);
            self.log(
                "having a surrogate look for its children",
                told.map_err(io::Error::from),
            );
        }
    }

    /// A process that came by a move has ended, or has not been there to be watched.
    pub fn vanished(&self, pid: Pid) {
        let status = self.exits.ended(pid).map_or(ExitStatus::Unknown, |ended| ended.status);
        self.ended(pid, status);
    }

    /// A process has ended here: if it came by a move, its homes are told and what was kept for it goes.
    pub fn ended(&self, pid: Pid, status: ExitStatus) {
        let resident = self.residents.remove(pid);
        let arrival = self.arrivals.remove(pid);
        if arrival.is_some() {
            self.forget_arrival(pid);
        }
        let (Some(resident), Some(arrival)) = (resident, arrival) else {
            return;
        };
        self.sweep();
        self.ended_here(pid, &arrival.ids, resident.incarnation, status);
    }

    fn arc(&self) -> Arc<Mover> {
        // The mover is only ever made inside an Arc.
        self.me.upgrade().expect("a mover that is used is alive")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number that nobody has drawn before.
fn random() -> u64 {
    let mut bytes = [0u8; 8];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_le_bytes(bytes)
}
