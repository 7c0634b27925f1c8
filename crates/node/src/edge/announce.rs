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
use dunlin_sys::sockdiag::{CLOSED, InetSocket, LISTENING};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often sockets are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often closed connections are looked for.
const TIDY_EVERY: Duration = Duration::from_secs(10);
/// How often a peer is told everything again.
const REPEAT_EVERY: Duration = Duration::from_secs(2);
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
    /// The ports that are open here, and since when.
    ports: BTreeMap<Endpoint, u64>,
    queues: BTreeMap<Slot, VecDeque<SocketNews>>,
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
                return queue.drain(..count).collect();
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
    inner.news.board().ports = own.map(|e| (e.endpoint, e.epoch)).collect();
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
    for endpoint in open.iter().filter(|e| !known.contains_key(e)) {
        let epoch = epoch_now();
        edge.assign(*endpoint, own, epoch)?;
        inner.news.board().ports.insert(*endpoint, epoch);
        news.push(SocketNews::At {
            endpoint: *endpoint,
            node: own,
            epoch,
        });
    }
    for endpoint in known.into_keys().filter(|e| !open.contains(e)) {
        inner.news.board().ports.remove(&endpoint);
        forget_of(edge, endpoint, own)?;
        news.push(SocketNews::Closed { endpoint });
    }
    if !news.is_empty() {
        inner.news.tell(news);
    }
    Ok(())
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
    let inner = edge.inner()?;
    let mut diag = inner.diag.lock().unwrap_or_else(PoisonError::into_inner);
    let mut open = BTreeSet::new();
    for (proto, state) in [(Proto::Tcp, LISTENING), (Proto::Udp, CLOSED)] {
        for six in [false, true] {
            let listed = diag.list(proto.number(), six, &[state]);
            for socket in listed.map_err(kernel("looking for sockets of", &proto))? {
                // A datagram socket on a port of the own slice has most likely asked for any.
                let any = proto == Proto::Udp && inner.slices.node(socket.local.port()) == Some(inner.own);
                if !any {
                    open.extend(endpoints(proto, &socket));
                }
            }
        }
    }
    Ok(open)
}

/// What a listening socket answers for; nothing if it is bound to loopback.
fn endpoints(proto: Proto, socket: &InetSocket) -> Vec<Endpoint> {
    let port = socket.local.port();
    let of = |family| Endpoint::port(proto, family, port);
    match socket.local.ip().to_canonical() {
        // A datagram socket is listed before it is bound, too.
        _ if port == 0 => Vec::new(),
        ip if ip.is_loopback() => Vec::new(),
        IpAddr::V4(_) => vec![of(Family::V4)],
        IpAddr::V6(ip) if ip.is_unspecified() && !socket.v6_only => vec![of(Family::V6), of(Family::V4)],
        IpAddr::V6(ip) if ip.to_ipv4_mapped() == Some(Ipv4Addr::UNSPECIFIED) => vec![of(Family::V4)],
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
            news.extend(all.map(|(endpoint, epoch)| SocketNews::At {
                endpoint,
                node: slot,
                epoch,
            }));
        }
        let Some(this) = node.upgrade() else { return };
        let request = PeerRequest::Sockets {
            mac: inner.link.mac,
            news: news.clone(),
        };
        match this.peers.call(peer, &request) {
            Ok(PeerReply::Done) => within = REPEAT_EVERY,
            Ok(PeerReply::Failed(failure)) => {
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
        let socket = |local: &str, v6_only| InetSocket {
            local: local.parse().unwrap(),
            remote: "0.0.0.0:0".parse().unwrap(),
            state: LISTENING,
            v6_only,
            uid: 0,
            inode: 0,
        };
        let families = |local: &str, v6_only| -> Vec<Family> {
            let endpoints = endpoints(Proto::Tcp, &socket(local, v6_only));
            endpoints.iter().map(|e| e.family).collect()
        };
        assert_eq!(families("0.0.0.0:80", false), [Family::V4]);
        assert_eq!(families("[::]:80", false), [Family::V6, Family::V4]);
        assert_eq!(families("[::]:80", true), [Family::V6]);
        assert_eq!(families("[::ffff:10.0.0.1]:80", false), [Family::V4]);
        assert_eq!(families("127.0.0.1:80", false), []);
        assert_eq!(families("[::1]:80", false), []);
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
