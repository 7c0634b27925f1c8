//! Connections that a listening socket has and no program: taken out where it was, put in where it is.
//!
//! Owns what was taken out of the queues of one move's listening sockets, until it is put back or left. Refuses to hold packets:
//! whoever asks has seen to it that nobody new comes, and holds what [`Callers::take`] tells. Invariants: init takes them out, and keeps
//! them, so that a daemon that is killed loses none; once captured it is in repair, where closing it tells nobody; what is
//! put back is put in as it would be elsewhere.

use super::endpoints;
use super::leaving::{from_image, to_image};
use crate::edge::{Edge, Entrance};
use dunlin_proto::endpoint::Endpoint;
use dunlin_proto::ids::MoveId;
use dunlin_proto::image;
use dunlin_sys::foothold::take_descriptor;
use dunlin_sys::sockdiag::{self, SockDiag};
use dunlin_sys::socket::tcp::{self, State};
use dunlin_sys::socket::{self, callers};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// What init keeps: one label for each batch of connections that were taken out of a socket.
const LABEL: &str = "callers/";

/// What is kept beside the descriptors: whose socket they are from, and those that have none any more.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    host: i32,
    number: i32,
    callers: Vec<image::Caller>,
}

/// Where the listening sockets of a network are looked at, and let be called. The kernel takes
/// tens of milliseconds to close it: that must not be where packets are held ([`Callers::close`]).
#[derive(Debug)]
struct Gate {
    diag: SockDiag,
    entrance: Option<Entrance>,
}

/// The callers of one move.
#[derive(Debug, Default)]
pub struct Callers {
    gate: Option<Gate>,
    queues: Vec<Queue>,
}

/// Those of one socket.
#[derive(Debug)]
struct Queue {
    /// Its description's.
    key: u64,
    /// Whose descriptor it is (a number on this machine), and which.
    at: (i32, i32),
    listening: OwnedFd,
    labels: Vec<String>,
    accepted: Vec<Accepted>,
    /// Of a former daemon's: those that nobody has a descriptor of.
    known: Vec<image::Caller>,
}

#[derive(Debug)]
struct Accepted {
    fd: OwnedFd,
    from: SocketAddr,
    to: SocketAddr,
    segments: u32,
    captured: Option<image::Caller>,
}

impl Callers {
    /// What a former daemon had taken out for this move.
    pub fn take_up(edge: &Edge, by: MoveId) -> Callers {
        let mut found = Callers::default();
        let Some(shelf) = edge.shelf() else { return found };
        let prefix = format!("{LABEL}{by}/");
        let labels = shelf.labels().unwrap_or_default();
        for label in labels.into_iter().filter(|label| label.starts_with(&prefix)) {
            let kept = shelf.kept(&label).and_then(|kept| match kept {
                Some((fds, blob)) => found.restore(label.clone(), fds, &blob),
                None => Ok(()),
            });
            if let Err(error) = kept {
                tracing::error!(label, %error, "connections that nobody has accepted are lost");
            }
        }
        found
    }

    fn restore(&mut self, label: String, fds: Vec<OwnedFd>, blob: &[u8]) -> io::Result<()> {
        let (kept, _): (Kept, &[u8]) = postcard::take_from_bytes(blob).map_err(io::Error::other)?;
        let at = (kept.host, kept.number);
        let queue = match self.queues.iter_mut().position(|queue| queue.at == at) {
            Some(index) => &mut self.queues[index],
            None => {
                self.queues.push(Queue {
                    key: 0,
                    at,
                    listening: take_descriptor(kept.host, kept.number)?,
                    labels: Vec::new(),
                    accepted: Vec::new(),
                    known: Vec::new(),
                });
                self.queues.last_mut().expect("just pushed")
            }
        };
        queue.labels.push(label);
        queue.add(fds, blob)
    }

    /// Before the freeze: looks up what [`Callers::take`] will need.
    pub fn open(&mut self, edge: &Edge, host: i32) -> io::Result<()> {
        if self.gate.is_none() {
            let network = File::open(format!("/proc/{host}/ns/net"))?;
            self.gate = Some(Gate {
                diag: socket::in_network(network.as_fd(), SockDiag::open)??,
                entrance: edge.entrance(network.as_fd())?,
            });
        }
        Ok(())
    }

    /// Can those who wait be taken out, and put in again?
    pub fn can_be_taken(&self) -> bool {
        self.gate.as_ref().is_some_and(|gate| gate.entrance.is_some())
    }

    /// Somebody whose call at one of these ports has begun and not come through.
    pub fn half_way(&mut self, ports: &BTreeSet<u16>) -> io::Result<Option<(u16, SocketAddr)>> {
        let found = self.list(&[sockdiag::SYN_RECEIVED, sockdiag::NEW_SYN_RECEIVED])?;
        let found = found.iter().find(|socket| ports.contains(&socket.local.port()));
        Ok(found.map(|socket| (socket.local.port(), socket.remote)))
    }

    /// Does somebody of this machine itself wait at the port?
    pub fn over_loopback(&mut self, port: u16) -> io::Result<bool> {
        let waits = |socket: &sockdiag::InetSocket| {
            socket.inode == 0 && socket.local.port() == port && super::is_loopback(socket.local.ip())
        };
        Ok(self
            .list(&[sockdiag::ESTABLISHED, sockdiag::CLOSE_WAIT])?
            .iter()
            .any(waits))
    }

    fn list(&mut self, states: &[u8]) -> io::Result<Vec<sockdiag::InetSocket>> {
        let gate = self.gate.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let mut all = gate.diag.list(socket::TCP as u8, false, states)?;
        all.extend(gate.diag.list(socket::TCP as u8, true, states)?);
        Ok(all)
    }

    /// Takes out whoever waits at a listening socket (`key`) that is descriptor `at` of a process which is parked. By which
    /// names their packets are found: they must be held before [`Callers::capture`].
    pub fn take(
        &mut self,
        edge: &Edge,
        by: MoveId,
        (key, at): (u64, (i32, i32)),
        listening: BorrowedFd<'_>,
    ) -> io::Result<Vec<Endpoint>> {
        let index = match self.queues.iter().position(|queue| queue.key == key) {
            Some(index) => index,
            None => {
                self.queues.push(Queue {
                    key,
                    at,
                    listening: listening.try_clone_to_owned()?,
                    labels: Vec::new(),
                    accepted: Vec::new(),
                    known: Vec::new(),
                });
                self.queues.len() - 1
            }
        };
        self.queues[index].take(edge, by)
    }

    /// Reads those that were taken out, and again those to whom something has come since. Whether there were any.
    pub fn capture(&mut self) -> io::Result<bool> {
        let mut any = false;
        for accepted in self.queues.iter_mut().flat_map(|queue| &mut queue.accepted) {
            any |= accepted.capture()?;
        }
        Ok(any)
    }

    /// Who waits at a socket, as they were captured.
    pub fn of(&self, key: u64) -> Vec<image::Caller> {
        let queues = self.queues.iter().filter(|queue| queue.key == key);
        let all = queues.flat_map(|queue| queue.accepted.iter().filter_map(|accepted| accepted.captured.clone()));
        all.collect()
    }

    /// Puts all back where they were. Their processes may run on after this.
    pub fn put_back(&mut self, edge: &Edge) {
        for mut queue in std::mem::take(&mut self.queues) {
            let opened = self.open(edge, queue.at.0);
            let entrance = self.gate.as_ref().and_then(|gate| gate.entrance.as_ref());
            let put_back = opened.and_then(|()| queue.put_back(edge, entrance.ok_or(io::ErrorKind::Unsupported)?));
            if let Err(error) = put_back {
                let (host, number) = queue.at;
                tracing::error!(host, number, %error, "connections that nobody had accepted could not be put back");
            }
        }
    }

    /// Nobody is held up any more.
    pub fn close(&mut self) {
        self.gate = None;
    }

    /// They are another node's now: what is left of them here goes in silence.
    pub fn leave(&mut self, edge: &Edge) {
        for queue in std::mem::take(&mut self.queues) {
            for accepted in &queue.accepted {
                if let Err(error) = tcp::enter_repair(accepted.fd.as_fd()) {
                    tracing::error!(from = %accepted.from, %error, "a connection that has left may be ended here");
                }
            }
            queue.forget(edge);
        }
    }
}

impl Queue {
    fn take(&mut self, edge: &Edge, by: MoveId) -> io::Result<Vec<Endpoint>> {
        let shelf = edge.shelf().ok_or(io::ErrorKind::Unsupported)?;
        let mut flows = Vec::new();
        // Until nobody is left; each time it is as many as a message to init can bring.
        loop {
            let label = format!("{LABEL}{by}/{}/{:04}", self.key, self.labels.len());
            let Some((fds, blob)) = shelf.accept(&label, self.listening.as_fd(), self.kept(Vec::new())?)? else {
                return Ok(flows);
            };
            self.labels.push(label);
            let before = self.accepted.len();
            self.add(fds, &blob)?;
            let news = self.accepted[before..].iter().map(|one| (one.from, one.to));
            flows.extend(endpoints::of_callers(news));
        }
    }

    /// Those that init keeps.
    fn add(&mut self, fds: Vec<OwnedFd>, blob: &[u8]) -> io::Result<()> {
        let (kept, names): (Kept, &[u8]) = postcard::take_from_bytes(blob).map_err(io::Error::other)?;
        self.known.extend(kept.callers);
        if fds.is_empty() {
            return Ok(());
        }
        let names: Vec<SocketAddr> = postcard::from_bytes(names).map_err(io::Error::other)?;
        for (fd, from) in fds.into_iter().zip(names) {
            let to = SocketAddr::try_from(rustix::net::getsockname(&fd)?)?;
            self.accepted.push(Accepted {
                fd,
                from,
                to,
                segments: 0,
                captured: None,
            });
        }
        Ok(())
    }

    fn kept(&self, callers: Vec<image::Caller>) -> io::Result<Vec<u8>> {
        let (host, number) = self.at;
        postcard::to_stdvec(&Kept { host, number, callers }).map_err(io::Error::other)
    }

    fn put_back(&mut self, edge: &Edge, entrance: &Entrance) -> io::Result<()> {
        let mut all = std::mem::take(&mut self.known);
        for mut accepted in std::mem::take(&mut self.accepted) {
            // One that could not be captured is lost, which is said.
            if let Err(error) = accepted.capture() {
                tracing::error!(from = %accepted.from, %error, "a connection that nobody had accepted is lost");
            }
            all.extend(accepted.captured.take());
        }
        let mut met = BTreeSet::new();
        all.retain(|caller| met.insert((caller.from, caller.to)));
        // Their names must be free here, so init, too, closes its copies: it has them as bytes from now on.
        if let (Some((first, others)), Some(shelf)) = (self.labels.split_first(), edge.shelf()) {
            shelf.keep(first, &[], self.kept(all.clone())?)?;
            others.iter().try_for_each(|label| shelf.forget_soon(label))?;
            // When this is answered they are gone.
            shelf.kept(first)?;
        }
        let callers = all.iter().map(portable).collect::<io::Result<Vec<_>>>()?;
        entrance.go_on(self.listening.as_fd(), &callers)?;
        self.forget(edge);
        Ok(())
    }

    fn forget(&self, edge: &Edge) {
        for label in &self.labels {
            if let Some(Err(error)) = edge.shelf().map(|shelf| shelf.forget_soon(label)) {
                tracing::error!(label, %error, "init keeps connections that are elsewhere");
            }
        }
    }
}

impl Accepted {
    /// Whether anything was new.
    fn capture(&mut self) -> io::Result<bool> {
        let fd = self.fd.as_fd();
        if self.captured.is_none() {
            tcp::enter_repair(fd)?;
        }
        let info = tcp::info(fd)?;
        let (is_over, segments) = (info.state == State::Closed, info.segments_in);
        let before = self.captured.as_ref();
        if before.is_some_and(|before| before.reset == is_over && segments == self.segments) {
            return Ok(false);
        }
        let connection = match before.filter(|before| !before.reset) {
            _ if is_over => over(tcp::unread(fd)?),
            Some(before) => to_image(tcp::capture_again(fd, &from_image(&before.connection)?)?),
            None => to_image(tcp::capture(fd)?),
        };
        self.segments = segments;
        self.captured = Some(image::Caller {
            from: self.from,
            to: self.to,
            connection,
            reset: is_over,
        });
        Ok(true)
    }
}

/// A connection with somebody who has broken it off: its numbers matter to nobody.
fn over(received: Vec<u8>) -> image::Connection {
    const MSS: u32 = 1460;
    image::Connection {
        state: State::Established as u8,
        receive_from: 1,
        received,
        send_from: 1,
        sending: Vec::new(),
        unsent: 0,
        fin_unsent: false,
        window: [0, 1 << 15, 1 << 15, 1 << 15, 1],
        mss: MSS,
        sack: false,
        scales: None,
        timestamp: None,
        deaf: false,
    }
}

/// As the kernel's side has them.
pub fn portable(caller: &image::Caller) -> io::Result<callers::Caller> {
    Ok(callers::Caller {
        from: caller.from,
        to: caller.to,
        connection: from_image(&caller.connection)?,
        reset: caller.reset,
    })
}
