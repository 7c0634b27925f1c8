//! The sockets of processes that arrive: made while the program still runs elsewhere, rebuilt in the freeze, let speak when
//! the move is decided.
//!
//! Owns the new sockets until then. Refuses to put them into processes. Invariants: until [`Arriving::speak`] each is in repair, or
//! known to nobody, so that dropping them is not noticed; what a peer sent of a description is checked by the kernel,
//! and by the table of options.

use super::callers::portable;
use super::{endpoints, finish, is_loopback, is_tcp, leaving, settable, what};
use crate::capture::descriptors::in_two;
use crate::edge::{Door, Edge, Entrance};
use crate::restore::Common;
use dunlin_proto::image::{FrozenSocket, Socket, SocketState};
use dunlin_sys::sockdiag::{self, SockDiag};
use dunlin_sys::socket::tcp::{self, Finish, State};
use dunlin_sys::socket::wire::{self, Loop, Segment};
use dunlin_sys::socket::{self, callers, options};
use rustix::fs::OFlags;
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// So many are steered faster than a thread is made.
const FEW: usize = 64;

/// One socket could not be made as it was.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}; hint: `ss -anp` in the nest (`dunlin run -- ss -anp`) shows who has its port")]
pub struct ArriveError {
    what: String,
    source: io::Error,
}

fn about(socket: &Socket) -> impl FnOnce(io::Error) -> ArriveError {
    move |source| {
        let proto = if is_tcp(socket) { "tcp" } else { "udp" };
        let what = match (socket.local, socket.remote) {
            (Some(local), Some(remote)) => format!("making the {proto} socket {local} with {remote}"),
            (Some(local), None) => format!("making the {proto} socket {local}"),
            (None, _) => format!("making an unbound {proto} socket"),
        };
        ArriveError { what, source }
    }
}

/// The sockets of one move.
#[derive(Default)]
pub struct Arriving {
    made: BTreeMap<u64, Made>,
    /// Dropped with all else, when the source has been told that its processes run: closing a packet socket takes the kernel
    /// tens of milliseconds.
    ways: Option<Ways>,
    spoken: Vec<(u64, Made)>,
}

struct Made {
    fd: OwnedFd,
    socket: Socket,
    then: Then,
}

/// What is done when it may speak.
enum Then {
    Nothing,
    Finish(Finish),
    LetIn(Vec<callers::Caller>),
    Connect {
        remote: SocketAddr,
        first: u32,
        finish: Finish,
        flags: OFlags,
    },
}

/// How packets that were received elsewhere get to a socket here.
struct Ways {
    around: Loop,
    door: Option<Door>,
    diag: Mutex<SockDiag>,
    /// For those who wait at listening sockets.
    entrance: Option<Entrance>,
}

impl Ways {
    fn deliver(&self, packet: &[u8]) -> io::Result<()> {
        if wire::destination(packet).is_some_and(is_loopback) {
            return self.around.send(packet);
        }
        let door = self.door.as_ref().ok_or(io::ErrorKind::NetworkUnreachable)?;
        door.deliver(packet)
    }

    /// Connections that have ended here and only wait for their time do not keep a port from whoever listens on it.
    fn clear_port(&self, port: u16) -> io::Result<()> {
        let mut diag = self.diag.lock().unwrap_or_else(PoisonError::into_inner);
        for six in [false, true] {
            let all = diag.list(socket::TCP as u8, six, &[sockdiag::TIME_WAIT])?;
            for old in all.iter().filter(|old| old.local.port() == port) {
                diag.destroy(old)?;
            }
        }
        Ok(())
    }
}

impl Arriving {
    /// Makes sockets that the plan names, in the network of a nest. Hands out a descriptor of each by its key.
    pub fn prepare<'a>(
        &mut self,
        edge: &Edge,
        network: BorrowedFd<'_>,
        sockets: impl Iterator<Item = (u64, &'a Socket)> + Send,
        common: &mut Common,
    ) -> Result<(), ArriveError> {
        let sockets: Vec<(u64, &Socket)> = sockets.filter(|(key, _)| !self.made.contains_key(key)).collect();
        if sockets.is_empty() {
            return Ok(());
        }
        self.open_ways(edge, network).map_err(about(sockets[0].1))?;
        let made = socket::in_network(network, || {
            let each = sockets
                .iter()
                .map(|(key, socket)| make(socket).map(|made| (*key, made)));
            each.collect::<Result<Vec<_>, _>>()
        });
        for (key, made) in made.map_err(about(sockets[0].1))?? {
            common.keep(key, made.fd.try_clone().map_err(about(&made.socket))?);
            self.made.insert(key, made);
        }
        Ok(())
    }

    fn open_ways(&mut self, edge: &Edge, network: BorrowedFd<'_>) -> io::Result<()> {
        if self.ways.is_none() {
            self.ways = Some(Ways {
                around: socket::in_network(network, Loop::open)??,
                door: edge.door(network)?,
                diag: Mutex::new(socket::in_network(network, SockDiag::open)??),
                entrance: None,
            });
        }
        Ok(())
    }

    /// In the freeze: makes each socket what the old one is. What was opened since the plan is made now.
    pub fn rebuild(
        &mut self,
        edge: &Edge,
        network: BorrowedFd<'_>,
        frozen: &[FrozenSocket],
        common: &mut Common,
    ) -> Result<(), ArriveError> {
        // One that has another address by now cannot take it.
        for new in frozen {
            let Some(now) = &new.changed else { continue };
            let fits = |made: &Made| {
                what(&made.socket) == what(now) && made.socket.local == now.local && made.socket.owner == now.owner
            };
            if self.made.get(&new.key).is_some_and(|made| !fits(made)) {
                self.made.remove(&new.key);
                common.forget(new.key);
                common.sockets_remade = true;
            }
        }
        let there: std::collections::BTreeSet<u64> = frozen.iter().map(|new| new.key).collect();
        // What was closed since.
        self.made.retain(|key, _| there.contains(key));
        let news = frozen.iter().filter_map(|new| Some((new.key, new.changed.as_ref()?)));
        self.prepare(edge, network, news, common)?;
        let Some(ways) = &mut self.ways else { return Ok(()) };
        let called =
            |new: &&FrozenSocket| matches!(&new.state, SocketState::Listening { callers, .. } if !callers.is_empty());
        if let Some(made) = frozen.iter().find(called).and_then(|new| self.made.get(&new.key)) {
            ways.entrance = edge.entrance(network).map_err(about(&made.socket))?;
        }
        let ways = &*ways;
        let mut pairs = Vec::with_capacity(frozen.len());
        let mut news: BTreeMap<u64, &FrozenSocket> = frozen.iter().map(|new| (new.key, new)).collect();
        for (key, made) in &mut self.made {
            if let Some(new) = news.remove(key) {
                made.take_on(new).map_err(about(&made.socket))?;
                pairs.push((made, new));
            }
        }
        if let Some(key) = news.keys().next() {
            let source = io::Error::new(io::ErrorKind::InvalidData, format!("nothing is said of socket {key}"));
            let what = "making a socket".to_owned();
            return Err(ArriveError { what, source });
        }
        // Who listens comes first: who has a port already keeps it from nobody.
        let (mut listening, mut others): (Vec<_>, Vec<_>) =
            pairs.into_iter().partition(|(made, _)| made.socket.listening);
        let become_all = |part: &mut [(&mut Made, &FrozenSocket)]| {
            part.iter_mut().try_for_each(|(made, new)| {
                let done = made.become_what(new, ways);
                done.map_err(about(&made.socket))
            })
        };
        become_all(&mut listening)?;
        in_two(&mut others, become_all)?;
        Ok(())
    }

    /// The socket of a key, as it is now.
    pub(super) fn socket(&self, key: u64) -> Option<&Socket> {
        self.made.get(&key).map(|made| &made.socket)
    }

    /// Compares what was rebuilt with what was captured, in full.
    pub fn verify(&self, frozen: &[FrozenSocket]) -> Result<(), String> {
        for new in frozen {
            let made = self.made.get(&new.key).ok_or("a socket was not made")?;
            let differs = made.differs(new).map_err(|e| about(&made.socket)(e).to_string())?;
            if let Some(what) = differs {
                return Err(about(&made.socket)(io::Error::other(what)).to_string());
            }
        }
        Ok(())
    }

    /// By what their packets are found.
    fn endpoints(&self) -> Vec<dunlin_proto::endpoint::Endpoint> {
        let all = self.made.values().flat_map(|made| {
            let mut all = endpoints::of(&made.socket);
            if let Then::LetIn(callers) = &made.then {
                all.extend(endpoints::of_callers(
                    callers.iter().map(|caller| (caller.from, caller.to)),
                ));
            }
            all
        });
        let all: std::collections::BTreeSet<_> = all.collect();
        all.into_iter().collect()
    }

    /// The move is decided: their packets come here, and they go on. [`Arriving::let_go`] must follow soon.
    pub fn speak(&mut self, edge: &Edge) {
        let endpoints = self.endpoints();
        let mut all: Vec<(u64, Made)> = std::mem::take(&mut self.made).into_iter().collect();
        let entrance = self.ways.as_ref().and_then(|ways| ways.entrance.as_ref());
        let speak = |part: &mut [(u64, Made)]| -> Result<(), std::convert::Infallible> {
            for (key, made) in part {
                if let Err(error) = made.speak(entrance) {
                    tracing::error!(key, %error, "a socket that came does not go on as it should");
                }
            }
            Ok(())
        };
        // At the same time: what is said to one that speaks already waits where it was, until it is handed over.
        std::thread::scope(|scope| {
            let steer = || {
                if let Err(error) = edge.arrive(&endpoints) {
                    tracing::error!(%error, "packets for sockets that came may not find them");
                }
            };
            let steered = match endpoints.len() {
                0 => None,
                few if few < FEW => {
                    steer();
                    None
                }
                _ => Some(scope.spawn(steer)),
            };
            let Ok(_) = in_two(&mut all, speak);
            steered.map(|steered| steered.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        self.spoken = all;
    }

    /// The processes run: nothing of their sockets is kept open here, where it would outlive a close(2).
    pub fn let_go(&mut self) {
        self.spoken.clear();
    }
}

fn named(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "none".to_owned(), |address| address.to_string())
}

/// A socket without what is in it.
fn make(socket: &Socket) -> Result<Made, ArriveError> {
    let made = || -> io::Result<OwnedFd> {
        let fd = socket::make(what(socket))?;
        let options = settable(&socket.options);
        socket::give_to(fd.as_fd(), socket.owner.0, socket.owner.1)?;
        options::set_early(fd.as_fd(), &options)?;
        // One of UDP would take datagrams from now on.
        if let Some(local) = socket.local.filter(|_| is_tcp(socket)) {
            tcp::prepare(fd.as_fd(), local)?;
        }
        Ok(fd)
    };
    Ok(Made {
        fd: made().map_err(about(socket))?,
        socket: socket.clone(),
        then: Then::Nothing,
    })
}

impl Made {
    /// What has changed since the plan.
    fn take_on(&mut self, new: &FrozenSocket) -> io::Result<()> {
        if let Some(now) = &new.changed {
            if self.socket.options != now.options {
                options::set_early(self.fd.as_fd(), &settable(&now.options))?;
            }
            self.socket = now.clone();
        }
        Ok(())
    }

    fn become_what(&mut self, new: &FrozenSocket, ways: &Ways) -> io::Result<()> {
        let fd = self.fd.as_fd();
        let done = finish(new.buffers, &self.socket.options);
        let flags = OFlags::from_bits_retain(new.flags);
        let unsound = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        match (&new.state, is_tcp(&self.socket)) {
            (SocketState::Idle, true) => self.then = Then::Finish(done),
            (SocketState::Over { received }, true) => {
                self.end(received, ways)?;
                self.then = Then::Finish(done);
            }
            (SocketState::Listening { backlog, callers }, true) => {
                match tcp::listen(fd, *backlog, &done) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                        ways.clear_port(self.socket.local.map_or(0, |local| local.port()))?;
                        tcp::listen(fd, *backlog, &done)?;
                    }
                    listening => listening?,
                }
                if !callers.is_empty() {
                    if ways.entrance.is_none() {
                        let why = "connections wait in it that the program has not accepted, which needs Linux 6.9 on this node";
                        return Err(io::Error::new(io::ErrorKind::Unsupported, why));
                    }
                    // When the move is decided: a queue that is closed tells its callers.
                    self.then = Then::LetIn(callers.iter().map(portable).collect::<io::Result<_>>()?);
                }
            }
            (SocketState::Opening { first }, true) => {
                let remote = self.socket.remote.ok_or_else(|| unsound("nobody to connect to"))?;
                self.then = Then::Connect {
                    remote,
                    first: *first,
                    finish: done,
                    flags,
                };
            }
            (SocketState::Connected(connection), true) => {
                let ends = self.socket.local.zip(self.socket.remote);
                let (local, remote) = ends.ok_or_else(|| unsound("a connection of nobody"))?;
                let connection = leaving::from_image(connection)?;
                tcp::rebuild(fd, local, remote, &connection, &|packet| ways.deliver(packet))?;
                self.then = Then::Finish(done);
            }
            (SocketState::Datagrams(waiting), false) => {
                tcp::set_buffers(fd, done.buffers)?;
                options::set_late(fd, &done.options)?;
                if let Some(local) = self.socket.local {
                    rustix::net::bind(fd, &local)?;
                }
                if let Some(remote) = self.socket.remote {
                    rustix::net::connect(fd, &remote)?;
                }
                for datagram in waiting {
                    self.redeliver(datagram, ways)?;
                }
            }
            _ => return Err(unsound("a state of another protocol")),
        }
        rustix::fs::fcntl_setfl(fd, flags & (OFlags::NONBLOCK | OFlags::from_bits_retain(0o20000)))?;
        Ok(())
    }

    /// What is not as it was, if anything.
    fn differs(&self, new: &FrozenSocket) -> io::Result<Option<String>> {
        let fd = self.fd.as_fd();
        let address = |any| SocketAddr::try_from(any).ok();
        let local = address(rustix::net::getsockname(fd)?).filter(|_| self.socket.local.is_some());
        if local != self.socket.local {
            let (is, was) = (named(local), named(self.socket.local));
            return Ok(Some(format!("its address is {is}, where it was {was}")));
        }
        let wanted = settable(&self.socket.options);
        let now = options::read(fd, what(&self.socket), false);
        let ip = local.map(|local| local.ip());
        let seen = |option: &&options::SocketOption| options::is_seen_in_repair(option, ip);
        if let Some(was) = wanted.iter().filter(seen).find(|option| !now.contains(option)) {
            let is = now.iter().find(|is| (is.level, is.name) == (was.level, was.name));
            let is = is.map_or_else(|| "not there".to_owned(), |is| format!("{:?}", is.value));
            let (level, name) = (was.level, was.name);
            return Ok(Some(format!(
                "option {level}/{name} is {is}, where it was {:?}",
                was.value
            )));
        }
        match &new.state {
            SocketState::Connected(was) => {
                let is = tcp::capture(fd)?;
                tcp::set_window(fd, is.window)?;
                let was = leaving::from_image(was)?;
                let window = was.window;
                // The clock goes on, and the window is the peer's to say.
                let is = tcp::Connection {
                    timestamp: was.timestamp,
                    window,
                    ..is
                };
                Ok((is != was).then(|| "the connection differs".to_owned()))
            }
            SocketState::Datagrams(was) => {
                let is = dunlin_sys::socket::udp::queue(fd, self.socket.family == socket::FAMILY_V6)?;
                let same = is.len() == was.len()
                    && is
                        .iter()
                        .zip(was)
                        .all(|(is, was)| (is.from, &is.bytes) == (was.from, &was.bytes));
                Ok((!same).then(|| "its queue differs".to_owned()))
            }
            SocketState::Over { received } => {
                Ok((tcp::unread(fd)? != *received).then(|| "its queue differs".to_owned()))
            }
            SocketState::Idle | SocketState::Listening { .. } | SocketState::Opening { .. } => Ok(None),
        }
    }

    fn redeliver(&self, datagram: &dunlin_proto::image::Datagram, ways: &Ways) -> io::Result<()> {
        let Some(local) = self.socket.local else { return Ok(()) };
        let to = datagram.to.filter(|to| !to.is_unspecified()).unwrap_or(local.ip());
        let to = SocketAddr::new(to, local.port());
        ways.deliver(&wire::datagram(datagram.from, to, &datagram.bytes)?)
    }

    /// Makes the socket one whose connection is over: of a connection with nobody, which is broken off.
    fn end(&self, received: &[u8], ways: &Ways) -> io::Result<()> {
        let fd = self.fd.as_fd();
        let local = match self.socket.local {
            Some(local) => local,
            None => {
                let any: IpAddr = match self.socket.family {
                    socket::FAMILY_V6 => Ipv6Addr::LOCALHOST.into(),
                    _ => Ipv4Addr::LOCALHOST.into(),
                };
                tcp::prepare(fd, SocketAddr::new(any, 0))?;
                let named = rustix::net::getsockname(fd)?;
                SocketAddr::try_from(named).map_err(io::Error::from)?
            }
        };
        // An address that nobody has (RFC 5737, RFC 3849), in the clothes of the socket.
        let nobody: IpAddr = match (local.ip(), is_loopback(local.ip())) {
            (_, true) => local.ip(),
            (IpAddr::V4(_), false) => Ipv4Addr::new(192, 0, 2, 1).into(),
            (IpAddr::V6(ip), false) if ip.to_ipv4_mapped().is_some() => {
                Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped().into()
            }
            (IpAddr::V6(_), false) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
        };
        let nobody = SocketAddr::new(nobody, 9);
        let connection = tcp::Connection {
            state: State::Established,
            receive_from: 1,
            received: received.to_vec(),
            send_from: 1,
            sending: Vec::new(),
            unsent: 0,
            fin_unsent: false,
            window: [0, 1 << 16, 1 << 16, 1 << 16, 1],
            mss: 536,
            sack: false,
            scales: None,
            timestamp: None,
            deaf: false,
        };
        let deliver = |packet: &[u8]| ways.deliver(packet);
        tcp::rebuild(fd, local, nobody, &connection, &deliver)?;
        let broken_off = Segment {
            from: nobody,
            to: local,
            sequence: 1u32.wrapping_add(received.len() as u32),
            acknowledges: 1,
            flags: wire::RST | wire::ACK,
            window: 0,
            bytes: &[],
        };
        deliver(&broken_off.packet()?)?;
        // What the program has been told already.
        socket::take_error(fd)?;
        match tcp::info(fd)?.state {
            State::Closed => Ok(()),
            state => Err(io::Error::other(format!(
                "a connection that is over came to be {state:?}"
            ))),
        }
    }

    fn speak(&self, entrance: Option<&Entrance>) -> io::Result<()> {
        let fd = self.fd.as_fd();
        match &self.then {
            Then::Nothing => Ok(()),
            Then::LetIn(callers) => entrance.ok_or(io::ErrorKind::NotConnected)?.let_in(fd, callers),
            Then::Finish(done) => tcp::finish(fd, done),
            Then::Connect {
                remote,
                first,
                finish,
                flags,
            } => {
                rustix::fs::fcntl_setfl(fd, *flags | OFlags::NONBLOCK)?;
                tcp::connect_again(fd, *remote, *first, finish)?;
                rustix::fs::fcntl_setfl(fd, *flags)?;
                Ok(())
            }
        }
    }
}
