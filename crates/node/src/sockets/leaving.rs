//! The sockets of processes that leave: held, captured, and put back or left behind.
//!
//! Owns what is held and what is in repair, from before the freeze until the move is decided. Refuses to stop processes:
//! from [`Leaving::capture`] on, all that have these sockets are parked. Invariants: whatever fails, [`Leaving::put_back`]
//! makes the sockets as they were; what was held ends in [`Leaving::release`] or [`Leaving::hand_over`].

use super::look::{self, tcp_rows};
use super::{endpoints, is_tcp};
use crate::capture::descriptors::in_two;
use crate::edge::{Edge, EdgeError, Hold, Inside};
use crate::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::endpoint::Endpoint;
use dunlin_proto::ids::{MoveId, Pid, Slot};
use dunlin_proto::image::{self, DescriptionKind, Files, FrozenSocket, Socket, SocketState};
use dunlin_sys::foothold::Table;
use dunlin_sys::socket::tcp::{self, State};
use dunlin_sys::socket::{self, FAMILY_V6, udp};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
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
        files
            .descriptions
            .iter()
            .enumerate()
            .filter_map(move |(index, description)| {
                let DescriptionKind::Socket(socket) = &description.kind else {
                    return None;
                };
                let mut table = files.table.iter();
                let number = table.find(|d| d.description as usize == index)?.number;
                Some((description.key, number, description.flags, &**socket))
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
}

/// What was seen of planned sockets as soon as their processes had stopped: by key, under which number of which process.
#[derive(Default)]
pub struct EarlyLooks(BTreeMap<u64, (i32, i32, OwnedFd, Looked)>);

/// Looks at planned sockets of processes that have stopped (key, host number, descriptor, what was planned), while others
/// look at the rest of these. What cannot be looked at is left for [`Leaving::capture`].
pub fn look_early(edge: &Edge, planned: &[(u64, Pid, i32, i32, Socket)]) -> EarlyLooks {
    let mut found = BTreeMap::new();
    let mut table: Option<(i32, Table)> = None;
    for (key, pid, host, number, socket) in planned {
        if found.contains_key(key) {
            continue;
        }
        if table.as_ref().is_none_or(|(of, _)| of != host) {
            table = Table::of(*host).ok().map(|table| (*host, table));
        }
        let Some(fd) = table.as_ref().and_then(|(_, table)| table.take(*number).ok()) else {
            continue;
        };
        if let Ok(looked) = look_at((*pid, *host), *number, &fd, Some(socket), edge.inside()) {
            found.insert(*key, (*host, *number, fd, looked));
        }
    }
    EarlyLooks(found)
}

#[derive(Debug)]
struct Taken {
    owner: (Pid, i32),
    key: u64,
    flags: u32,
    fd: OwnedFd,
    is: Is,
    /// If it is not what the plan says.
    changed: Option<Socket>,
    state: Option<State>,
    reuse: bool,
    in_repair: bool,
    segments: u32,
    window: Option<[u32; 5]>,
}

/// What must be known of a socket to read it.
#[derive(Debug, Clone, Copy)]
struct Is {
    tcp: bool,
    v6: bool,
    listening: bool,
    port: u16,
}

impl Is {
    fn of(socket: &Socket) -> Is {
        Is {
            tcp: is_tcp(socket),
            v6: socket.family == FAMILY_V6,
            listening: socket.listening,
            port: socket.local.map_or(0, |local| local.port()),
        }
    }
}

/// What a look at a socket in the freeze came to.
struct Look {
    is: Is,
    changed: Option<Socket>,
    state: Option<State>,
    reuse: bool,
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
        }
    }

    /// Nobody new comes to the listening sockets that the plan names; whoever is there already is waited for, while the program still
    /// runs: connections that it has not accepted cannot be read. If it does not accept them in time, [`Leaving::capture`]
    /// says so.
    pub fn hold_ports(
        &mut self,
        edge: &Edge,
        by: MoveId,
        planned: &[(u64, Pid, i32, i32, Socket)],
    ) -> Result<(), EdgeError> {
        let listening: Vec<_> = planned.iter().filter(|(.., socket)| socket.listening).collect();
        let endpoints = listening
            .iter()
            .flat_map(|(.., socket)| endpoints::of(socket))
            .collect();
        self.hold_more(edge, by, endpoints)?;
        let watched: Vec<(OwnedFd, i32, u16)> = listening
            .iter()
            .filter_map(|(_, _, host, number, socket)| {
                let fd = Table::of(*host).ok()?.take(*number).ok()?;
                Some((fd, *host, socket.local?.port()))
            })
            .collect();
        let until = Instant::now() + ACCEPT_WITHIN;
        while watched.iter().any(|(fd, host, port)| has_callers(fd, *host, *port)) && Instant::now() < until {
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
        self.refuse_unfinished(owners)?;
        let taken = &mut self.taken;
        in_two(taken, |part| part.iter_mut().try_for_each(Taken::enter_repair))?;
        let mut frozen = in_two(taken, |part| {
            let each = part.iter_mut().map(|taken| taken.capture(None));
            each.collect::<Result<Vec<_>, _>>()
        })?
        .concat();
        for _ in 0..ROUNDS {
            let mut changed = false;
            for (taken, frozen) in taken.iter_mut().zip(&mut frozen) {
                if taken.has_heard()? {
                    changed = true;
                    *frozen = taken.capture(Some(frozen))?;
                }
            }
            if !changed {
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
                    key,
                    flags,
                    fd,
                    is: look.is,
                    state: look.state,
                    reuse: look.reuse,
                    changed: look.changed,
                    in_repair: false,
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

    /// Connections that no program has yet cannot be read; the next attempt will find them accepted.
    fn refuse_unfinished(&self, owners: &[Owner<'_>]) -> Result<(), LeaveError> {
        let mut ports = BTreeSet::new();
        let mut obstacles = Vec::new();
        for taken in self.taken.iter().filter(|t| t.is.listening) {
            ports.insert(taken.is.port);
            let waiting = tcp::info(taken.fd.as_fd()).map_err(taken.kernel())?.waiting;
            if waiting > 0 {
                obstacles.push(obstacle::descriptor(
                    taken.owner.0,
                    taken.owner.1,
                    "a listening socket",
                    "connections wait in it that the program has not accepted yet",
                    "try again when it has",
                ));
            }
        }
        if let Some(owner) = owners.first().filter(|_| !ports.is_empty()) {
            let rows = tcp_rows(owner.host).map_err(|source| LeaveError::Kernel {
                pid: owner.pid,
                number: -1,
                source,
            })?;
            let mut opening = rows
                .iter()
                .filter(|row| row.state == State::SynReceived as u8 && ports.contains(&row.local.port()));
            if let Some(row) = opening.next() {
                obstacles.push(obstacle::obstacle(
                    owner.pid,
                    "network",
                    format_args!("port {}", row.local.port()),
                    format!("a connection from {} is being opened", row.remote),
                    "try again in a moment",
                ));
            }
        }
        match obstacles.is_empty() {
            true => Ok(()),
            false => Err(LeaveError::Obstacles(obstacles)),
        }
    }

    /// Makes the sockets as they were. Their processes may run on after this.
    pub fn put_back(&mut self) {
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
    }

    /// The sockets are another node's now: what is left of them here goes, in silence, with the old process.
    pub fn leave(&mut self) {
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
    }
}

impl Taken {
    fn kernel(&self) -> impl Fn(io::Error) -> LeaveError + use<> {
        let (pid, number) = self.owner;
        move |source| LeaveError::Kernel { pid, number, source }
    }

    fn enter_repair(&mut self) -> Result<(), LeaveError> {
        let kernel = self.kernel();
        if self.is.tcp && !self.is.listening {
            tcp::enter_repair(self.fd.as_fd()).map_err(&kernel)?;
            self.in_repair = true;
            let info = tcp::info(self.fd.as_fd()).map_err(&kernel)?;
            (self.state, self.segments) = (Some(info.state), info.segments_in);
        }
        Ok(())
    }

    /// Has anything come in since it was captured?
    fn has_heard(&mut self) -> Result<bool, LeaveError> {
        if !self.in_repair {
            return Ok(false);
        }
        let kernel = self.kernel();
        let info = tcp::info(self.fd.as_fd()).map_err(&kernel)?;
        let heard = info.segments_in != self.segments || Some(info.state) != self.state;
        (self.state, self.segments) = (Some(info.state), info.segments_in);
        Ok(heard)
    }

    fn capture(&mut self, before: Option<&FrozenSocket>) -> Result<FrozenSocket, LeaveError> {
        let kernel = self.kernel();
        let state = self.state(before).map_err(&kernel)?;
        let Some(state) = state else {
            return Err(LeaveError::Obstacles(vec![obstacle::descriptor(
                self.owner.0,
                self.owner.1,
                "a connection",
                "it has failed, or got an urgent byte, and the program does not know yet",
                "try again when it does",
            )]));
        };
        let tcp::Buffers { send, receive, locked } = tcp::buffers(self.fd.as_fd()).map_err(&kernel)?;
        Ok(FrozenSocket {
            key: self.key,
            flags: self.flags,
            buffers: [send, receive, locked],
            changed: self.changed.clone(),
            state,
        })
    }

    /// `None`: not now.
    fn state(&mut self, before: Option<&FrozenSocket>) -> io::Result<Option<SocketState>> {
        let fd = self.fd.as_fd();
        let Some(state) = self.state else {
            let waiting = udp::queue(fd, self.is.v6)?;
            let datagram = |udp::Waiting { from, to, bytes }| image::Datagram { from, to, bytes };
            return Ok(Some(SocketState::Datagrams(
                waiting.into_iter().map(datagram).collect(),
            )));
        };
        Ok(Some(match state {
            State::Listening => SocketState::Listening {
                backlog: tcp::info(fd)?.backlog,
            },
            State::SynSent => SocketState::Opening {
                first: tcp::first_sequence(fd)?,
            },
            State::Closed => {
                let ready = socket::readiness(fd)?;
                if ready & socket::FAILED != 0 {
                    return Ok(None);
                }
                match ready & socket::ENDED != 0 {
                    true => SocketState::Over {
                        received: tcp::unread(fd)?,
                    },
                    false => SocketState::Idle,
                }
            }
            _ => {
                let captured = match before.map(|before| &before.state) {
                    Some(SocketState::Connected(before)) => tcp::capture_again(fd, &from_image(before)?),
                    _ => tcp::capture(fd),
                };
                match captured {
                    Ok(connection) => {
                        self.window = Some(connection.window);
                        SocketState::Connected(Box::new(to_image(connection)))
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    Err(error) => return Err(error),
                }
            }
        }))
    }
}

/// Is there a connection at this listening socket that is being opened, or that nobody has accepted?
fn has_callers(listening: &OwnedFd, host: i32, port: u16) -> bool {
    let opening =
        |row: &dunlin_sys::procfs::net::TcpRow| row.state == State::SynReceived as u8 && row.local.port() == port;
    tcp::info(listening.as_fd()).is_ok_and(|info| info.waiting > 0)
        || tcp_rows(host).is_ok_and(|rows| rows.iter().any(opening))
}

fn kernel(pid: Pid, number: i32) -> impl Fn(io::Error) -> LeaveError {
    move |source| LeaveError::Kernel { pid, number, source }
}

type Looked = Result<Look, Box<Obstacle>>;

fn look_at(
    (pid, host): (Pid, i32),
    number: i32,
    fd: &OwnedFd,
    planned: Option<&Socket>,
    inside: Option<Inside>,
) -> Result<Looked, LeaveError> {
    let failed = kernel(pid, number);
    let looked = match planned {
        Some(planned) => look::look_again(host, fd.as_fd(), planned, inside),
        None => look::look(host, fd.as_fd(), inside),
    };
    let changed = match looked.map_err(&failed)? {
        Some(Ok(socket)) => Some(socket),
        Some(Err(reason)) => {
            let refused = obstacle::descriptor(pid, number, "socket", &reason.why, reason.hint);
            return Ok(Err(Box::new(refused)));
        }
        None => None,
    };
    let Some(now) = changed.as_ref().or(planned) else {
        return Err(failed(io::ErrorKind::InvalidData.into()));
    };
    let is = Is::of(now);
    let state = match is.tcp {
        true => Some(tcp::info(fd.as_fd()).map_err(&failed)?.state),
        false => None,
    };
    Ok(Ok(Look {
        is,
        reuse: tcp::reuses_address(fd.as_fd()).map_err(&failed)?,
        state,
        changed,
    }))
}

fn to_image(c: tcp::Connection) -> image::Connection {
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
