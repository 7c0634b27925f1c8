//! The sockets of processes that leave: held, captured, and put back or left behind.
//!
//! Owns what is held and what is in repair, from before the freeze until the move is decided. Refuses to stop processes:
//! from [`Leaving::capture`] on, all that have these sockets are parked. Invariants: whatever fails, [`Leaving::put_back`]
//! makes the sockets as they were; what was held ends in [`Leaving::release`] or [`Leaving::hand_over`].

use super::callers::Callers;
use super::taken::{Looked, Taken, look_at};
use super::{endpoints, look};
use crate::capture::descriptors::in_two;
use crate::edge::{Edge, EdgeError, Hold};
use crate::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::endpoint::Endpoint;
use dunlin_proto::ids::{MoveId, Pid, Slot};
use dunlin_proto::image::{self, DescriptionKind, Files, FrozenSocket, Socket, SocketState};
use dunlin_sys::foothold::Table;
use dunlin_sys::socket::tcp::{self, State};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So long a program has time to accept who has called when it is about to be stopped; it is looked how far it is so often.
const ACCEPT_WITHIN: Duration = Duration::from_millis(100);
const ACCEPT_EVERY: Duration = Duration::from_micros(300);
/// How often packets that were on their way when they were to be held may come in between.
const ROUNDS: u32 = 20;

/// Why sockets could not be captured; they are in [`Leaving`] until they are put back.
#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    /// Something about one cannot be moved, or cannot now.
    #[error("{}", obstacle::summary(.0))]
    Obstacles(Vec<Obstacle>),
    /// The edge did not hold its packets.
    #[error("holding the packets of its sockets: {0}")]
    Edge(#[from] EdgeError),
    /// The kernel did not do what it should.
    #[error("capturing socket fd {number} of process {pid}: {source}")]
    Kernel {
        /// Whose.
        pid: Pid,
        /// Which.
        number: i32,
        /// What it said.
        source: io::Error,
    },
}

/// A process that leaves, as far as its sockets go.
#[derive(Clone, Copy)]
pub struct Owner<'a> {
    /// Its PID.
    pub pid: Pid,
    /// Its number on this machine.
    pub host: i32,
    /// Its descriptors, as they are now.
    pub files: &'a Files,
}

impl<'a> Owner<'a> {
    /// Its sockets: key, a number, flags, and what was seen of it.
    pub fn sockets(self) -> impl Iterator<Item = (u64, i32, u32, &'a Socket)> {
        let files = self.files;
        let numbered = files.descriptions.iter().zip(files.numbers());
        numbered.filter_map(|(description, number)| {
            let DescriptionKind::Socket(socket) = &description.kind else {
                return None;
            };
            Some((description.key, number?, description.flags, &**socket))
        })
    }
}

/// The sockets of one move.
#[derive(Debug, Default)]
pub struct Leaving {
    /// What the destination was told of them.
    planned: BTreeMap<u64, Socket>,
    holds: Vec<Hold>,
    held: BTreeSet<Endpoint>,
    taken: Vec<Taken>,
    callers: Callers,
}

/// What was seen of planned sockets as soon as their processes had stopped: by key, under which number of which process.
#[derive(Default)]
pub struct EarlyLooks(BTreeMap<u64, (i32, i32, OwnedFd, Looked)>);

/// The looks at planned sockets (key, host number, descriptor, what was planned) of processes that have stopped: by whoever has time
/// for some of them. What cannot be looked at is left for [`Leaving::capture`].
pub struct EarlyLook<'a> {
    edge: &'a Edge,
    planned: Vec<&'a (u64, Pid, i32, i32, Socket)>,
    /// The first that nobody has begun with.
    next: AtomicUsize,
    found: Mutex<EarlyLooks>,
}

impl<'a> EarlyLook<'a> {
    /// Nobody has begun.
    pub fn at(edge: &'a Edge, planned: &'a [(u64, Pid, i32, i32, Socket)]) -> EarlyLook<'a> {
        let mut met = BTreeSet::new();
        EarlyLook {
            edge,
            planned: planned.iter().filter(|(key, ..)| met.insert(*key)).collect(),
            next: AtomicUsize::new(0),
            found: Mutex::default(),
        }
    }

    /// Looks, beside whoever else does, until nothing is left to begin with.
    pub fn help(&self) {
        const AT_ONCE: usize = 16;
        let mut found = Vec::new();
        let mut table: Option<(i32, Table)> = None;
        loop {
            let from = self.next.fetch_add(AT_ONCE, Ordering::Relaxed);
            let Some(some) = self.planned.get(from..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            for (key, pid, host, number, socket) in some.iter().take(AT_ONCE) {
                if table.as_ref().is_none_or(|(of, _)| of != host) {
                    table = Table::of(*host).ok().map(|table| (*host, table));
                }
                let Some(fd) = table.as_ref().and_then(|(_, table)| table.take(*number).ok()) else {
                    continue;
                };
                if let Ok(looked) = look_at((*pid, *host), *number, &fd, Some(socket), self.edge.inside()) {
                    found.push((*key, (*host, *number, fd, looked)));
                }
            }
        }
        let mut all = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        all.0.extend(found);
    }

    /// What was seen.
    pub fn end(self) -> EarlyLooks {
        self.found.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Leaving {
    /// What a former daemon held for this move.
    pub fn take_up(edge: &Edge, by: MoveId) -> Leaving {
        let holds = edge.held().unwrap_or_else(|error| {
            tracing::error!(%error, "what is held cannot be read");
            Vec::new()
        });
        let holds: Vec<Hold> = holds.into_iter().filter(|hold| hold.by() == by).collect();
        Leaving {
            held: holds.iter().flat_map(|hold| hold.endpoints().iter().copied()).collect(),
            holds,
            planned: BTreeMap::new(),
            taken: Vec::new(),
            callers: Callers::take_up(edge, by),
        }
    }

    /// Nobody new comes to the listening sockets that the plan names; whoever is about to be there is waited for, while the program
    /// still runs: a handshake that is under way cannot be read. Nor can connections that it has not accepted where the kernel lets
    /// nobody put them into a queue again. If that takes too long, [`Leaving::capture`] says so.
    pub fn hold_ports(
        &mut self,
        edge: &Edge,
        by: MoveId,
        planned: &[(u64, Pid, i32, i32, Socket)],
    ) -> Result<(), LeaveError> {
        let listening: Vec<_> = planned.iter().filter(|(.., socket)| socket.listening).collect();
        let Some((_, pid, host, number, _)) = listening.first() else {
            return Ok(());
        };
        let endpoints = listening
            .iter()
            .flat_map(|(.., socket)| endpoints::of(socket))
            .collect();
        self.hold_more(edge, by, endpoints)?;
        self.callers.open(edge, *host).map_err(kernel(*pid, *number))?;
        let ports: BTreeSet<u16> = listening
            .iter()
            .filter_map(|(.., socket)| Some(socket.local?.port()))
            .collect();
        let watched: Vec<OwnedFd> = match self.callers.can_be_taken() {
            true => Vec::new(),
            false => listening
                .iter()
                .filter_map(|(_, _, host, number, _)| Table::of(*host).ok()?.take(*number).ok())
                .collect(),
        };
        let called = |fd: &OwnedFd| tcp::info(fd.as_fd()).is_ok_and(|info| info.waiting > 0);
        let until = Instant::now() + ACCEPT_WITHIN;
        while (watched.iter().any(called) || self.callers.half_way(&ports).is_ok_and(|found| found.is_some()))
            && Instant::now() < until
        {
            std::thread::sleep(ACCEPT_EVERY);
        }
        Ok(())
    }

    /// From now on the packets of the sockets that the plan names are kept.
    pub fn hold(
        &mut self,
        edge: &Edge,
        by: MoveId,
        planned: impl Iterator<Item = (u64, Socket)>,
    ) -> Result<(), EdgeError> {
        self.planned = planned.collect();
        let endpoints = self.planned.values().flat_map(endpoints::of).collect();
        self.hold_more(edge, by, endpoints)
    }

    fn hold_more(&mut self, edge: &Edge, by: MoveId, news: BTreeSet<Endpoint>) -> Result<(), EdgeError> {
        let news: Vec<Endpoint> = news.difference(&self.held).copied().collect();
        if !news.is_empty() {
            self.holds.push(edge.hold(by, &news)?);
            self.held.extend(news);
        }
        Ok(())
    }

    /// Captures all sockets of processes that are parked.
    pub fn capture(
        &mut self,
        edge: &Edge,
        by: MoveId,
        owners: &[Owner<'_>],
        early: EarlyLooks,
    ) -> Result<Vec<FrozenSocket>, LeaveError> {
        self.take(edge, owners, early)?;
        let news = self.taken.iter().filter_map(|taken| taken.changed.as_ref());
        let news: BTreeSet<Endpoint> = news.flat_map(endpoints::of).collect();
        self.hold_more(edge, by, news)?;
        self.take_callers(edge, by)?;
        let taken = &mut self.taken;
        in_two(taken, |part| part.iter_mut().try_for_each(Taken::enter_repair))?;
        let mut frozen = in_two(taken, |part| {
            let each = part.iter_mut().map(|taken| taken.capture(None));
            each.collect::<Result<Vec<_>, _>>()
        })?
        .concat();
        for _ in 0..ROUNDS {
            let mut changed = self.take_callers(edge, by)?;
            for (taken, frozen) in self.taken.iter_mut().zip(&mut frozen) {
                if taken.has_heard()? {
                    changed = true;
                    *frozen = taken.capture(Some(frozen))?;
                }
            }
            if !changed {
                for frozen in &mut frozen {
                    if let SocketState::Listening { callers, .. } = &mut frozen.state {
                        *callers = self.callers.of(frozen.key);
                    }
                }
                return Ok(frozen);
            }
        }
        let why = "packets come in for its sockets though they are held";
        Err(LeaveError::Obstacles(vec![obstacle::obstacle(
            owners[0].pid,
            "network",
            "the inside address",
            why,
            "this should not be; please report it",
        )]))
    }

    /// Takes a descriptor of each socket, and looks at it again: it may have been bound or connected since the plan.
    fn take(&mut self, edge: &Edge, owners: &[Owner<'_>], mut early: EarlyLooks) -> Result<(), LeaveError> {
        let mut met = BTreeSet::new();
        let mut wanted = Vec::new();
        for owner in owners {
            let table = Table::of(owner.host).map_err(kernel(owner.pid, -1))?;
            for (key, number, flags, _) in owner.sockets().filter(|(key, ..)| met.insert(*key)) {
                let looked = early
                    .0
                    .remove(&key)
                    .filter(|(host, at, ..)| (*host, *at) == (owner.host, number));
                let (fd, looked) = match looked {
                    Some((_, _, fd, looked)) => (fd, Some(looked)),
                    None => (table.take(number).map_err(kernel(owner.pid, number))?, None),
                };
                wanted.push((*owner, key, number, flags, self.planned.get(&key), fd, looked));
            }
        }
        let looked = in_two(&mut wanted, |part| -> Result<Vec<_>, LeaveError> {
            let each = part.iter_mut().map(|(owner, key, number, flags, seen, fd, looked)| {
                let looked = match looked.take() {
                    Some(looked) => looked,
                    None => look_at((owner.pid, owner.host), *number, fd, *seen, edge.inside())?,
                };
                Ok(looked.map(|looked| (*key, *flags, looked)))
            });
            each.collect::<Result<Vec<_>, _>>()
        })?;
        let mut obstacles = Vec::new();
        for ((owner, _, number, _, _, fd, _), looked) in wanted.into_iter().zip(looked.into_iter().flatten()) {
            match looked {
                Ok((key, flags, look)) => self.taken.push(Taken {
                    owner: (owner.pid, number),
                    host: owner.host,
                    key,
                    flags,
                    fd,
                    is: look.is,
                    state: look.state,
                    reuse: look.reuse,
                    changed: look.changed,
                    in_repair: false,
                    info: None,
                    segments: 0,
                    window: None,
                }),
                Err(obstacle) => obstacles.push(*obstacle),
            }
        }
        // What the plan says was looked at with the plan.
        if self.taken.iter().any(|taken| taken.changed.is_some()) {
            let all = self.taken.iter().filter_map(|taken| {
                let socket = taken.changed.as_ref().or(self.planned.get(&taken.key))?;
                Some((taken.owner.0, taken.owner.1, socket))
            });
            obstacles.extend(look::parted(all));
        }
        match obstacles.is_empty() {
            true => Ok(()),
            false => Err(LeaveError::Obstacles(obstacles)),
        }
    }

    /// Takes out those who wait at listening sockets, and reads them. Whether there was anything new.
    fn take_callers(&mut self, edge: &Edge, by: MoveId) -> Result<bool, LeaveError> {
        let listening: Vec<&Taken> = self.taken.iter().filter(|taken| taken.is.listening).collect();
        let Some(first) = listening.first() else {
            return Ok(false);
        };
        self.callers.open(edge, first.host).map_err(first.kernel())?;
        let ports: BTreeSet<u16> = listening.iter().map(|taken| taken.is.port).collect();
        // Before those who are through: nobody is between the two then.
        if let Some((port, from)) = self.callers.half_way(&ports).map_err(first.kernel())? {
            return Err(LeaveError::Obstacles(vec![obstacle::obstacle(
                first.owner.0,
                "network",
                format_args!("port {port}"),
                format!("a connection from {from} is being opened"),
                "try again in a moment",
            )]));
        }
        let mut flows = BTreeSet::new();
        for taken in &listening {
            if tcp::info(taken.fd.as_fd()).map_err(taken.kernel())?.waiting == 0 {
                continue;
            }
            let can_be_taken = self.callers.can_be_taken();
            if !can_be_taken || self.callers.over_loopback(taken.is.port).map_err(taken.kernel())? {
                return Err(LeaveError::Obstacles(vec![obstacle::descriptor(
                    taken.owner.0,
                    taken.owner.1,
                    "a listening socket",
                    match can_be_taken {
                        true => {
                            "connections of this machine with itself wait in it that the program has not accepted yet"
                        }
                        false => {
                            "connections wait in it that the program has not accepted yet, and this kernel cannot have them wait elsewhere"
                        }
                    },
                    "try again when it has; `dunlin doctor` says what the kernel lacks",
                )]));
            }
            let at = (taken.key, (taken.host, taken.owner.1));
            let news = self.callers.take(edge, by, at, taken.fd.as_fd());
            flows.extend(news.map_err(taken.kernel())?);
        }
        let failed = first.kernel();
        self.hold_more(edge, by, flows)?;
        self.callers.capture().map_err(failed)
    }

    /// Makes the sockets as they were. Their processes may run on after this.
    pub fn put_back(&mut self, edge: &Edge) {
        self.callers.put_back(edge);
        for taken in std::mem::take(&mut self.taken) {
            if taken.in_repair
                && let Err(error) = tcp::leave_repair(taken.fd.as_fd(), taken.reuse, taken.window)
            {
                let (pid, number) = taken.owner;
                tracing::error!(%pid, number, %error, "a socket could not be put back as it was");
            }
        }
    }

    /// What was held is delivered here. After [`Leaving::put_back`].
    pub fn release(&mut self, edge: &Edge) {
        for hold in std::mem::take(&mut self.holds) {
            if let Err(error) = edge.release(&hold) {
                tracing::error!(%error, "held packets could not be released");
            }
        }
        self.held.clear();
        self.callers.close();
    }

    /// The sockets are another node's now: what is left of them here goes, in silence, with the old process.
    pub fn leave(&mut self, edge: &Edge) {
        self.callers.leave(edge);
        self.taken.clear();
    }

    /// What was held goes to the node where the sockets are, which has said that they run there.
    pub fn hand_over(&mut self, edge: &Edge, to: Slot) {
        for hold in std::mem::take(&mut self.holds) {
            if let Err(error) = edge.hand_over(&hold, to) {
                tracing::error!(%error, %to, "held packets could not be handed over");
            }
        }
        self.held.clear();
        self.callers.close();
    }
}

pub(super) fn kernel(pid: Pid, number: i32) -> impl Fn(io::Error) -> LeaveError {
    move |source| LeaveError::Kernel { pid, number, source }
}

/// What was captured, as it travels.
pub(super) fn to_image(c: tcp::Connection) -> image::Connection {
    image::Connection {
        state: c.state as u8,
        receive_from: c.receive_from,
        received: c.received,
        send_from: c.send_from,
        sending: c.sending,
        unsent: c.unsent,
        fin_unsent: c.fin_unsent,
        window: c.window,
        mss: c.mss,
        sack: c.sack,
        scales: c.scales,
        timestamp: c.timestamp,
        deaf: c.deaf,
    }
}

/// What came from elsewhere, as the kernel has it.
pub(super) fn from_image(c: &image::Connection) -> io::Result<tcp::Connection> {
    let state = State::of(c.state).filter(|state| state.is_connected());
    Ok(tcp::Connection {
        state: state.ok_or(io::ErrorKind::InvalidData)?,
        receive_from: c.receive_from,
        received: c.received.clone(),
        send_from: c.send_from,
        sending: c.sending.clone(),
        unsent: c.unsent,
        fin_unsent: c.fin_unsent,
        window: c.window,
        mss: c.mss,
        sack: c.sack,
        scales: c.scales,
        timestamp: c.timestamp,
        deaf: c.deaf,
    })
}
