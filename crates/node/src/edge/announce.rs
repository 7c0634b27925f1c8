//! Which node has which listening sockets: looked for in the nest, and told to the peers.
//!
//! Owns the look (sock_diag, many times a second) and what each peer is still to be told. Refuses to judge who may have a port: of
//! two nodes that say they have it, the later one is believed. Invariants: news about one endpoint reaches a peer in order;
//! a peer that was away is told everything that is open here when it is back.

use super::{Edge, kernel, name};
use crate::daemon::Node;
use dunlin_proto::endpoint::{Endpoint, Family, Proto};
use dunlin_proto::ids::Slot;
use dunlin_proto::peer::{PeerReply, PeerRequest, SocketNews};
use dunlin_sys::sockdiag::{CLOSED, LISTENING};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often sockets are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often closed connections are looked for.
const TIDY_EVERY: Duration = Duration::from_secs(10);
/// How often a peer is told everything again.
const REPEAT_EVERY: Duration = Duration::from_secs(2);
/// How long peers may take to hear of a port before the program that opens it goes on.
const TOLD_WITHIN: Duration = Duration::from_millis(300);
/// How long after the arrival of a socket its former node may take to tell.
const ARRIVED_WITHIN: Duration = Duration::from_secs(20);
/// How long the call that opens a port may take.
const OPENED_WITHIN: Duration = Duration::from_secs(1);
/// After a failure.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// So much news for one peer waits at most; a peer that is away for longer learns what is open when it is back.
const MAX_NEWS: usize = 64 << 10;
/// In one message.
const MAX_TOLD: usize = 2048;

/// What peers are still to be told.
#[derive(Debug, Default)]
pub struct News {
    board: Mutex<Board>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Board {
    /// The ports that are open here.
    ports: BTreeMap<Endpoint, Open>,
    queues: BTreeMap<Slot, VecDeque<SocketNews>>,
    /// Ports of sockets that are on their way here, until their former node has said so, or has not for so long.
    arriving: BTreeMap<Endpoint, Instant>,
    /// Peers that news is on its way to.
    told: BTreeSet<Slot>,
    /// Peers that do not answer.
    away: BTreeSet<Slot>,
}

/// An open port.
#[derive(Debug, Clone, Copy)]
struct Open {
    epoch: u64,
    /// It is about to be opened, which takes no longer.
    expected: Option<Instant>,
}

impl News {
    /// Endpoints that were here are elsewhere now.
    pub fn moved(&self, moved: Vec<(Endpoint, Slot, u64)>) {
        let news = moved
            .into_iter()
            .map(|(endpoint, node, epoch)| SocketNews::At { endpoint, node, epoch });
        self.tell(news.collect());
    }

    fn tell(&self, news: Vec<SocketNews>) {
        for queue in self.board().queues.values_mut() {
            queue.extend(news.iter().cloned());
            let excess = queue.len().saturating_sub(MAX_NEWS);
            queue.drain(..excess);
        }
        self.changed.notify_all();
    }

    /// Sockets with these are being restored here: it is not for this node to tell.
    pub(super) fn arriving(&self, endpoints: &[Endpoint]) {
        let until = Instant::now() + ARRIVED_WITHIN;
        let ports = endpoints.iter().filter(|e| e.peer().is_none());
        self.board().arriving.extend(ports.map(|port| (*port, until)));
    }

    /// They are here, or will not be.
    pub(super) fn arrived(&self, endpoint: &Endpoint) {
        self.board().arriving.remove(endpoint);
    }

    fn is_arriving(&self, endpoint: &Endpoint) -> bool {
        self.board()
            .arriving
            .get(endpoint)
            .is_some_and(|until| Instant::now() < *until)
    }

    /// Waits until all peers that answer have been told everything; `false`: it took too long.
    fn wait_told(&self, within: Duration) -> bool {
        let untold = |board: &mut Board| {
            let waits = |(peer, queue): (&Slot, &VecDeque<SocketNews>)| {
                !board.away.contains(peer) && (!queue.is_empty() || board.told.contains(peer))
            };
            board.queues.iter().any(waits)
        };
        let waited = self.changed.wait_timeout_while(self.board(), within, untold);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// What was on its way to a peer has come there, or has not.
    fn came(&self, peer: Slot, there: bool) {
        let mut board = self.board();
        board.told.remove(&peer);
        match there {
            true => board.away.remove(&peer),
            false => board.away.insert(peer),
        };
        drop(board);
        self.changed.notify_all();
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next news for a peer; after a while, none.
    fn next(&self, peer: Slot, within: Duration) -> Vec<SocketNews> {
        let deadline = Instant::now() + within;
        let mut board = self.board();
        loop {
            let queue = board.queues.entry(peer).or_default();
            let left = deadline.saturating_duration_since(Instant::now());
            if !queue.is_empty() || left.is_zero() {
                let count = queue.len().min(MAX_TOLD);
                let news = queue.drain(..count).collect();
                board.told.insert(peer);
                return news;
            }
            board = self
                .changed
                .wait_timeout(board, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn untold(&self, peer: Slot, news: Vec<SocketNews>) {
        let mut board = self.board();
        let queue = board.queues.entry(peer).or_default();
        for news in news.into_iter().rev() {
            queue.push_front(news);
        }
    }
}

/// An epoch of what happens now: later than those before, and, as far as clocks agree, than those of other nodes.
pub fn epoch_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_micros() as u64
}

/// Starts looking and telling, for as long as the node is there.
pub fn start(node: &Arc<Node>) -> io::Result<()> {
    let Some(inner) = &node.edge.0 else { return Ok(()) };
    // What a former daemon knew: if it is not there any more, that is news.
    let known = node.edge.entries().map_err(io::Error::other)?;
    let own = known
        .iter()
        .filter(|e| e.node == node.slot && e.endpoint.peer().is_none() && !e.held);
    let open = |epoch| Open { epoch, expected: None };
    inner.news.board().ports = own.map(|e| (e.endpoint, open(e.epoch))).collect();
    let peers: Vec<Slot> = node.peers.others().map(|(slot, _)| slot).collect();
    inner.news.board().queues = peers.iter().map(|slot| (*slot, VecDeque::new())).collect();
    let looking = Arc::downgrade(node);
    thread::Builder::new()
        .name("edge look".into())
        .spawn(move || keep_looking(&looking))?;
    for peer in peers {
        let telling = Arc::downgrade(node);
        thread::Builder::new()
            .name("edge tell".into())
            .spawn(move || keep_telling(&telling, peer))?;
    }
    Ok(())
}

fn keep_looking(node: &Weak<Node>) {
    let mut tidied = Instant::now();
    while let Some(node) = node.upgrade() {
        if let Err(e) = look(&node.edge, node.slot) {
            tracing::warn!("looking for sockets in the nest: {e}");
        }
        if tidied.elapsed() > TIDY_EVERY {
            tidied = Instant::now();
            if let Err(e) = node.edge.tidy() {
                tracing::warn!("{e}");
            }
        }
        drop(node);
        thread::sleep(LOOK_EVERY);
    }
}

fn look(edge: &Edge, own: Slot) -> Result<(), super::EdgeError> {
    let inner = edge.inner()?;
    let open = open_ports(edge)?;
    let known = inner.news.board().ports.clone();
    let mut news = Vec::new();
    for endpoint in &open {
        match known.get(endpoint) {
            // A socket that is being restored is not yet anybody's, and its port is steered to where it comes from.
            None if edge.holder(endpoint)?.is_some_and(|node| node != own) || inner.news.is_arriving(endpoint) => {}
            None => news.push(edge.open_here(*endpoint, None)?),
            Some(Open { expected: None, .. }) => {}
            Some(known) => {
                let seen = Open {
                    expected: None,
                    ..*known
                };
                inner.news.board().ports.insert(*endpoint, seen);
            }
        }
    }
    let now = Instant::now();
    let is_gone =
        |endpoint: &Endpoint, known: &Open| !open.contains(endpoint) && known.expected.is_none_or(|until| until <= now);
    for (endpoint, _) in known.into_iter().filter(|(e, known)| is_gone(e, known)) {
        // Held: its socket moves, and was closed here because it is there. Who hands it over tells of it.
        if inner.said(&name(&endpoint))?.is_some_and(|entry| entry.hold) {
            continue;
        }
        inner.news.board().ports.remove(&endpoint);
        // It has moved, of which its hand-over tells: it may come back before a peer hears that it was closed here.
        if edge.holder(&endpoint)?.is_some_and(|node| node != own) {
            continue;
        }
        forget_of(edge, endpoint, own)?;
        news.push(SocketNews::Closed { endpoint });
    }
    if !news.is_empty() {
        inner.news.tell(news);
    }
    Ok(())
}

impl Edge {
    /// Who has a port, as far as is known.
    pub fn holder(&self, port: &Endpoint) -> Result<Option<Slot>, super::EdgeError> {
        Ok(self.inner()?.said(&name(port))?.map(|entry| Slot(entry.hop)))
    }

    /// These ports are about to be opened here. Returns when all peers that answer know.
    pub fn open_now(&self, ports: &[Endpoint]) -> Result<(), super::EdgeError> {
        let inner = self.inner()?;
        let until = Instant::now() + OPENED_WITHIN;
        let mut news = Vec::new();
        for port in ports {
            if !inner.news.board().ports.contains_key(port) {
                news.push(self.open_here(*port, Some(until))?);
            }
        }
        if news.is_empty() {
            return Ok(());
        }
        inner.news.tell(news);
        if !inner.news.wait_told(TOLD_WITHIN) {
            tracing::info!(port = %ports[0], "some peers learn of an open port later");
        }
        Ok(())
    }

    fn open_here(&self, endpoint: Endpoint, expected: Option<Instant>) -> Result<SocketNews, super::EdgeError> {
        let inner = self.inner()?;
        let epoch = epoch_now();
        self.assign(endpoint, inner.own, epoch)?;
        inner.news.board().ports.insert(endpoint, Open { epoch, expected });
        Ok(SocketNews::At {
            endpoint,
            node: inner.own,
            epoch,
        })
    }
}

/// Forgets an endpoint if it is this node's.
fn forget_of(edge: &Edge, endpoint: Endpoint, node: Slot) -> Result<(), super::EdgeError> {
    let said = edge.inner()?.said(&name(&endpoint))?;
    if said.is_some_and(|entry| entry.hop == node.0) {
        edge.forget(endpoint)?;
    }
    Ok(())
}

/// The ports that take packets from everybody.
fn open_ports(edge: &Edge) -> Result<BTreeSet<Endpoint>, super::EdgeError> {
    ports(edge, &[(Proto::Tcp, &[LISTENING]), (Proto::Udp, &[CLOSED])])
}

/// The ports of the inside address that sockets in these states have.
pub fn ports(edge: &Edge, of: &[(Proto, &[u8])]) -> Result<BTreeSet<Endpoint>, super::EdgeError> {
    let inner = edge.inner()?;
    let mut diag = inner.diag.lock().unwrap_or_else(PoisonError::into_inner);
    let mut found = BTreeSet::new();
    for (proto, states) in of {
        for six in [false, true] {
            let listed = diag.list(proto.number(), six, states);
            for socket in listed.map_err(kernel("looking for sockets of", proto))? {
                // A datagram socket on a port of the own slice has most likely asked for any.
                let any = *proto == Proto::Udp && inner.slices.node(socket.local.port()) == Some(inner.own);
                if !any {
                    found.extend(answers_for(*proto, socket.local, socket.v6_only));
                }
            }
        }
    }
    Ok(found)
}

/// The ports of the inside address that a socket has which is bound to this: none if to the node's own loopback, two if to
/// all addresses of both families.
pub fn answers_for(proto: Proto, local: SocketAddr, v6_only: bool) -> Vec<Endpoint> {
    let of = |family| Endpoint::port(proto, family, local.port());
    match local.ip().to_canonical() {
        // A datagram socket is listed before it is bound, too.
        _ if local.port() == 0 => Vec::new(),
        ip if ip.is_loopback() || ip.is_multicast() => Vec::new(),
        IpAddr::V4(_) => vec![of(Family::V4)],
        IpAddr::V6(ip) if ip.is_unspecified() && !v6_only => vec![of(Family::V6), of(Family::V4)],
        IpAddr::V6(_) => vec![of(Family::V6)],
    }
}

fn keep_telling(node: &Weak<Node>, peer: Slot) {
    let mut within = Duration::ZERO;
    loop {
        let Some(this) = node.upgrade() else { return };
        let Some(inner) = this.edge.0.clone() else { return };
        let slot = this.slot;
        drop(this);
        let mut news = inner.news.next(peer, within);
        let told = news.len();
        if told == 0 {
            let ports = inner.news.board().ports.clone();
            let all = ports.into_iter().take(MAX_TOLD);
            news.extend(all.map(|(endpoint, open)| SocketNews::At {
                endpoint,
                node: slot,
                epoch: open.epoch,
            }));
        }
        let Some(this) = node.upgrade() else { return };
        let request = PeerRequest::Sockets {
            mac: inner.link.mac,
            news: news.clone(),
        };
        match this.peers.call(peer, &request) {
            Ok(PeerReply::Done) => {
                inner.news.came(peer, true);
                within = REPEAT_EVERY;
            }
            Ok(PeerReply::Failed(failure)) => {
                inner.news.came(peer, true);
                tracing::debug!(
                    "{} does not take news of sockets: {}",
                    this.peers.name(peer),
                    failure.message
                );
                within = REPEAT_EVERY;
            }
            Ok(_) | Err(_) => {
                news.truncate(told);
                inner.news.untold(peer, news);
                inner.news.came(peer, false);
                drop(this);
                within = Duration::ZERO;
                thread::sleep(RETRY_AFTER);
            }
        }
    }
}

/// What a peer tells of its sockets.
pub fn take(edge: &Edge, from: Slot, mac: [u8; 6], news: Vec<SocketNews>) -> Result<(), super::EdgeError> {
    edge.neighbour(from, mac)?;
    for news in news {
        match news {
            SocketNews::At { endpoint, node, epoch } => {
                if let Some(endpoint) = endpoint.checked() {
                    edge.assign(endpoint, node, epoch)?;
                    edge.inner()?.news.arrived(&endpoint);
                }
            }
            SocketNews::Closed { endpoint } => forget_of(edge, endpoint, from)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_answers_for_the_families_it_takes() {
        let families = |local: &str, v6_only| -> Vec<Family> {
            let endpoints = answers_for(Proto::Tcp, local.parse().unwrap(), v6_only);
            endpoints.iter().map(|e| e.family).collect()
        };
        assert_eq!(families("0.0.0.0:80", false), [Family::V4]);
        assert_eq!(families("[::]:80", false), [Family::V6, Family::V4]);
        assert_eq!(families("[::]:80", true), [Family::V6]);
        assert_eq!(families("[::ffff:10.0.0.1]:80", false), [Family::V4]);
        assert_eq!(families("127.0.0.1:80", false), []);
        assert_eq!(families("[::1]:80", false), []);
        assert_eq!(families("224.0.0.251:80", false), []);
        assert_eq!(families("0.0.0.0:0", false), []);
    }

    #[test]
    fn news_reach_a_peer_in_order_and_once() {
        let news = News::default();
        let (peer, other) = (Slot(2), Slot(3));
        news.board().queues = [(peer, VecDeque::new()), (other, VecDeque::new())].into();
        let closed = |port| SocketNews::Closed {
            endpoint: Endpoint::port(Proto::Tcp, Family::V4, port),
        };
        news.tell(vec![closed(1)]);
        let first = news.next(peer, Duration::ZERO);
        news.tell(vec![closed(2)]);
        news.untold(peer, first);
        assert_eq!(news.next(peer, Duration::ZERO), [closed(1), closed(2)]);
        assert_eq!(news.next(peer, Duration::ZERO), []);
        assert_eq!(news.next(other, Duration::ZERO), [closed(1), closed(2)]);
    }
}
