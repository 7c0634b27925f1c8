//! The other nodes' daemons: calling them, and being called.
//!
//! Owns the connections between daemons: who may open one, for what, and a small pool of idle ones for requests.
//! Refuses to know what a request means. Invariants: a connection carries one request at a time; a request that may
//! have reached a peer is never sent twice (the caller learns [`PeerError::Lost`] instead); whatever a peer sends is
//! parsed, and waited for no longer than a bound.

mod connect;
#[cfg(test)]
mod tests;

use crate::config::NodeConfig;
use dunlin_proto::PROTOCOL;
use dunlin_proto::frame;
use dunlin_proto::ids::Slot;
use dunlin_proto::peer::{Hello, PeerReply, PeerRequest, Purpose, Welcome};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// How long a peer may take to answer an ordinary request.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How long a peer may take to accept a connection and to say hello.
const GREET_WITHIN: Duration = Duration::from_secs(3);
/// Idle connections kept for each peer.
const MAX_IDLE: usize = 4;

/// Why a peer could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The configuration has no such node.
    #[error("{0} is no node of this cluster; `dunlin node` reads its peers from the configuration file")]
    Unknown(Slot),
    /// Nothing was sent to it.
    #[error("node {name} at {address} does not answer: {source}; is its `dunlin node` running?")]
    Unreachable {
        /// The node.
        name: String,
        /// Where it was expected.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// It does not want to talk to this node. Nothing was asked.
    #[error("node {name} refuses: {reason}")]
    Refused {
        /// The node.
        name: String,
        /// Its words.
        reason: String,
    },
    /// It went away, or was too slow, with the request before it: whether it was carried out is not known.
    #[error("node {name} was lost before it answered: {source}; what was asked may have been done")]
    Lost {
        /// The node.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// Who answers the requests that a node makes to itself.
pub trait Answer: Send + Sync {
    /// Carries out one request of node `from`.
    fn answer(&self, from: Slot, request: PeerRequest) -> PeerReply;
}

/// The nodes of the cluster, as this one reaches them.
pub struct Peers {
    cluster: String,
    own: Slot,
    boot: u64,
    /// The address that calls come from, so that peers can check it; `None` where the node listens on all.
    source: Option<IpAddr>,
    nodes: BTreeMap<Slot, (String, SocketAddr)>,
    idle: Mutex<BTreeMap<Slot, Vec<TcpStream>>>,
    myself: OnceLock<Arc<dyn Answer>>,
}

impl Peers {
    /// This daemon's nonce.
    pub fn boot(&self) -> u64 {
        self.boot
    }

    /// The peers of a configuration. `boot` is the daemon's nonce.
    pub fn new(config: &NodeConfig, boot: u64) -> Peers {
        let mut nodes: BTreeMap<Slot, (String, SocketAddr)> = config
            .peers
            .iter()
            .map(|p| (Slot(p.slot), (p.name.clone(), p.address)))
            .collect();
        nodes.insert(Slot(config.slot), (config.name.clone(), config.listen));
        let ip = config.listen.ip();
        Peers {
            cluster: config.cluster.clone(),
            own: Slot(config.slot),
            boot,
            source: (!ip.is_unspecified()).then_some(ip),
            nodes,
            idle: Mutex::default(),
            myself: OnceLock::new(),
        }
    }

    /// Says who answers calls to the own slot. Once.
    pub fn set_own(&self, own: Arc<dyn Answer>) {
        assert!(self.myself.set(own).is_ok(), "the own end of the peers is set once");
    }

    /// This node.
    pub fn own(&self) -> Slot {
        self.own
    }

    /// All nodes but this one, with their names.
    pub fn others(&self) -> impl Iterator<Item = (Slot, &str)> {
        self.nodes
            .iter()
            .filter(|(s, _)| **s != self.own)
            .map(|(s, (n, _))| (*s, n.as_str()))
    }

    /// The name of a node, or its slot in words.
    pub fn name(&self, slot: Slot) -> String {
        self.nodes
            .get(&slot)
            .map_or_else(|| slot.to_string(), |(n, _)| n.clone())
    }

    /// Asks a node and waits for its answer for [`ANSWER_WITHIN`]. A call to the own slot does not leave the process.
    pub fn call(&self, to: Slot, request: &PeerRequest) -> Result<PeerReply, PeerError> {
        self.call_within(to, request, ANSWER_WITHIN)
    }

    /// Asks a node and waits for its answer for so long.
    pub fn call_within(&self, to: Slot, request: &PeerRequest, within: Duration) -> Result<PeerReply, PeerError> {
        if to == self.own {
            let myself = self.myself.get().ok_or(PeerError::Unknown(to))?;
            return Ok(myself.answer(to, request.clone()));
        }
        let mut stream = match self.take_idle(to) {
            Some(stream) => stream,
            None => self.open(to, Purpose::Rpc)?,
        };
        let exchange = |stream: &mut TcpStream| -> io::Result<PeerReply> {
            stream.set_read_timeout(Some(within))?;
            frame::write(stream, request)?;
            frame::read(stream)
        };
        match exchange(&mut stream) {
            Ok(reply) => {
                self.keep_idle(to, stream);
                Ok(reply)
            }
            Err(source) => Err(PeerError::Lost {
                name: self.name(to),
                source: in_words(source),
            }),
        }
    }

    /// Asks all other nodes at once.
    pub fn call_others(&self, request: &PeerRequest, within: Duration) -> Vec<(Slot, Result<PeerReply, PeerError>)> {
        let slots: Vec<Slot> = self.others().map(|(slot, _)| slot).collect();
        std::thread::scope(|scope| {
            let calls: Vec<_> = slots
                .iter()
                .map(|slot| (*slot, scope.spawn(|| self.call_within(*slot, request, within))))
                .collect();
            let lost = |slot| PeerError::Lost {
                name: self.name(slot),
                source: io::Error::other("the call panicked"),
            };
            calls
                .into_iter()
                .map(|(slot, call)| (slot, call.join().unwrap_or_else(|_| Err(lost(slot)))))
                .collect()
        })
    }

    /// Opens a connection for one purpose. The stream has no timeouts.
    pub fn open(&self, to: Slot, purpose: Purpose) -> Result<TcpStream, PeerError> {
        let (name, address) = self.nodes.get(&to).ok_or(PeerError::Unknown(to))?;
        let unreachable = |source| PeerError::Unreachable {
            name: name.clone(),
            address: *address,
            source: in_words(source),
        };
        let mut stream = connect::connect(*address, self.source, GREET_WITHIN).map_err(unreachable)?;
        let hello = Hello {
            protocol: PROTOCOL,
            cluster: self.cluster.clone(),
            from: self.own,
            boot: self.boot,
            purpose,
        };
        let greet = |stream: &mut TcpStream| -> io::Result<Welcome> {
            stream.set_read_timeout(Some(GREET_WITHIN))?;
            frame::write(stream, &hello)?;
            let welcome = frame::read(stream)?;
            stream.set_read_timeout(None)?;
            Ok(welcome)
        };
        match greet(&mut stream).map_err(unreachable)? {
            Welcome::Accepted { .. } => Ok(stream),
            Welcome::Refused { reason } => Err(PeerError::Refused {
                name: name.clone(),
                reason,
            }),
        }
    }

    /// Takes the greeting of a connection that a peer has opened. An error was told to the peer where that was possible.
    pub fn greet(&self, stream: &mut TcpStream) -> io::Result<Hello> {
        connect::tune(stream)?;
        stream.set_read_timeout(Some(GREET_WITHIN))?;
        stream.set_write_timeout(Some(GREET_WITHIN))?;
        let from = stream.peer_addr()?.ip();
        let hello: Hello = frame::read(stream)?;
        if let Err(reason) = self.admit(&hello, from) {
            let error = io::Error::new(io::ErrorKind::PermissionDenied, reason.clone());
            frame::write(stream, &Welcome::Refused { reason })?;
            return Err(error);
        }
        frame::write(stream, &Welcome::Accepted { boot: self.boot })?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        Ok(hello)
    }

    fn admit(&self, hello: &Hello, from: IpAddr) -> Result<(), String> {
        if hello.protocol != PROTOCOL {
            return Err(format!(
                "protocol {} is not spoken here, {PROTOCOL} is; install the same version of dunlin on both nodes",
                hello.protocol
            ));
        }
        if hello.cluster != self.cluster {
            return Err(format!(
                "this node is of cluster {:?}, not of {:?}",
                self.cluster, hello.cluster
            ));
        }
        let Some((name, address)) = self.nodes.get(&hello.from) else {
            return Err(format!(
                "{} is not among the peers in this node's configuration",
                hello.from
            ));
        };
        if address.ip().to_canonical() != from.to_canonical() && !address.ip().is_unspecified() {
            return Err(format!(
                "node {name} is expected from {}, not from {from}; set `listen` there and `address` here to the same",
                address.ip()
            ));
        }
        Ok(())
    }

    fn take_idle(&self, to: Slot) -> Option<TcpStream> {
        let mut idle = self.idle.lock().unwrap_or_else(|e| e.into_inner());
        let streams = idle.get_mut(&to)?;
        // Anything to read, the end included, means that the peer has given the connection up.
        std::iter::from_fn(|| streams.pop()).find(connect::is_quiet)
    }

    fn keep_idle(&self, to: Slot, stream: TcpStream) {
        let mut idle = self.idle.lock().unwrap_or_else(|e| e.into_inner());
        let streams = idle.entry(to).or_default();
        if streams.len() < MAX_IDLE {
            streams.push(stream);
        }
    }
}

/// A timeout of a socket says "resource temporarily unavailable", which helps nobody.
fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "no answer in time"),
        io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "it closed the connection"),
        _ => error,
    }
}
