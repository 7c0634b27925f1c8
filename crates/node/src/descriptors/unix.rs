//! Sockets of the unix family whose both ends move together.
//!
//! What waits in one travels inside the freeze and is sent again, here, by its other end: message by message, with
//! descriptors in flight and with who sent it. A pair is made by the process that has its first end, so that SO_PEERCRED
//! names one of the move. What is connected with a process that does not move, is an obstacle.

use super::{Found, Look, Refusal};
use crate::restore::{Blank, During, Kit, RestoreError};
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{DescriptionKind, UnixMessage, UnixSocket, UnixState};
use dunlin_sys::foothold::take_descriptor;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::script::Script;
use dunlin_sys::socket;
use dunlin_sys::socket::options::{self, SocketOption};
use dunlin_sys::socket::tcp::{self, Buffers};
use dunlin_sys::socket::unix::{self, Credentials, Waiting};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

const SO_PASSCRED: i32 = 16;
const SO_SNDBUFFORCE: i32 = 32;
const SO_PASSSEC: i32 = 34;
const LISTENING: u8 = 10;
const RECEIVING_IS_SHUT: u8 = 1;
const SENDING_IS_SHUT: u8 = 2;
/// While a queue is filled again, it may be laid out in more pieces than it was.
const ROOM: u32 = 256 << 20;

/// What a unix socket is, or why it cannot move. What waits in it is not read yet.
pub(crate) fn look(look: &Look<'_>) -> Found {
    let fd = look.handle()?;
    let what = socket::what(fd.as_fd())?;
    let meta = std::fs::metadata(look.link()?)?;
    if let Some(other) = look.around.open_outside(meta.ino())? {
        return look.refuse(
            &format!("process {other}, which stays here, has the socket open"),
            "move the whole tree (--tree)",
        );
    }
    let relations = unix::relations(look.around.diagnosis()?, meta.ino())?;
    if relations.state == LISTENING {
        return look.refuse(
            "a listening unix socket cannot be moved yet",
            "keep the process on this node, or serve over TCP",
        );
    }
    /// What the family alone takes.
    const NAMELESS: u32 = 2;
    let own = rustix::net::getsockname(fd).is_ok_and(|name| name.addr_len() > NAMELESS);
    let peers = rustix::net::getpeername(fd).is_ok_and(|name| name.is_some_and(|name| name.addr_len() > NAMELESS));
    if own || peers {
        return look.refuse(
            "a unix socket with a name, or connected with one, cannot be moved yet",
            "use a socketpair(2) inside a tree that moves as a whole (--tree)",
        );
    }
    let state = match relations.peer {
        None => UnixState::Idle,
        Some(0) => UnixState::Alone,
        Some(peer) => {
            if let Some(other) = look.around.open_outside(peer)? {
                return look.refuse(
                    &format!("it is connected with process {other}, which stays here"),
                    "move the whole tree (--tree), or close the connection",
                );
            }
            let back = unix::relations(look.around.diagnosis()?, peer)
                .ok()
                .and_then(|peer| peer.peer);
            if !look.around.moves(peer)? || back != Some(meta.ino()) {
                return look.refuse(
                    "it is connected with a socket that does not move along",
                    "close the connection, or have both ends in one tree that moves as a whole (--tree)",
                );
            }
            UnixState::Connected(peer)
        }
    };
    let mut polled = [PollFd::new(&fd, PollFlags::PRI)];
    rustix::event::poll(&mut polled, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    if polled[0].revents().intersects(PollFlags::ERR | PollFlags::PRI) {
        return look.refuse(
            "an error or urgent data waits in it, which cannot be made again",
            "try again when the program has read it",
        );
    }
    let peer_credentials = rustix::net::sockopt::socket_peercred(fd).map(|c| (c.uid.as_raw(), c.gid.as_raw()));
    let number = |name| unix::option(fd.as_fd(), name);
    let Buffers { send, receive, locked } = tcp::buffers(fd)?;
    Ok(Ok(DescriptionKind::Unix(Box::new(UnixSocket {
        inode: meta.ino(),
        kind: what.kind,
        state,
        shutdown: relations.shutdown,
        options: options::read(fd.as_fd(), what, true)
            .into_iter()
            .map(|option| (option.level, option.name, option.value))
            .collect(),
        passes: [number(SO_PASSCRED)? != 0, number(SO_PASSSEC).unwrap_or(0) != 0],
        buffers: [send, receive, locked],
        owner: (meta.uid(), meta.gid(), meta.mode() & 0o7777),
        peer_credentials: peer_credentials.unwrap_or((0, 0)),
        queue: Vec::new(),
    }))))
}

/// Sockets in which an empty message was seen: the kernel shows it to one look only, and a move that was given up has had it.
static SEEN_EMPTY: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());

/// What waits in it.
pub(crate) fn queue(look: &Look<'_>, socket: &UnixSocket) -> io::Result<Result<Vec<Waiting>, Refusal>> {
    let fd = look.handle()?;
    let is_stream = socket.kind == socket::STREAM;
    if is_stream {
        let all = unix::queue(fd.as_fd(), true)?;
        let unclear = all.iter().any(|w| !w.descriptors.is_empty() && w.bytes.len() > 1);
        if unclear && !is_as_sent(look, socket, &all)? {
            return look.refuse(
                "descriptors are on their way through it (SCM_RIGHTS), with bytes before or after that were sent apart",
                "try again when the program has received them",
            );
        }
        return Ok(Ok(all));
    }
    let waits = socket::readiness(fd.as_fd())? & PollFlags::IN.bits() as i16 != 0;
    let mut seen = SEEN_EMPTY.lock().unwrap_or_else(PoisonError::into_inner);
    if seen.contains(&socket.inode) && waits {
        return look.refuse(
            "an empty message may wait in it that was seen by a move which was given up, and is not seen again",
            "try again when the program has read it",
        );
    }
    seen.remove(&socket.inode);
    let all = unix::queue(fd.as_fd(), false)?;
    if all.iter().any(|waiting| waiting.bytes.is_empty()) {
        seen.insert(socket.inode);
    }
    Ok(Ok(all))
}

/// Descriptors belong to the bytes that they were sent with, and a look shows them with those before, too. Whether the stretches
/// of a stream are the messages that were sent is told by the memory that these take: a pair is given the same.
fn is_as_sent(look: &Look<'_>, socket: &UnixSocket, all: &[Waiting]) -> io::Result<bool> {
    let UnixState::Connected(peer) = socket.state else {
        return Ok(false);
    };
    let (near, _far) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    unix::set_option(near.as_fd(), SO_SNDBUFFORCE, ROOM)?;
    for waiting in all {
        let fds: Vec<_> = waiting.descriptors.iter().map(AsFd::as_fd).collect();
        unix::send(near.as_fd(), &waiting.bytes, &fds, None)?;
    }
    // It is asked for where it is, which may not be where the socket is.
    let inode = rustix::fs::fstat(&near)?.st_ino;
    let same = unix::relations(unix::diagnosis()?.as_fd(), inode)?.charged;
    Ok(unix::relations(look.around.diagnosis()?, peer)?.charged == same)
}

/// Who sent a message, by PIDs of the nest.
pub(crate) fn sender(credentials: Credentials) -> (Pid, u32, u32) {
    let status = ProcDir::process(credentials.pid).status();
    let pid = status
        .ok()
        .and_then(|status| status.ns_pids.last().copied())
        .unwrap_or(0);
    (Pid(pid), credentials.uid, credentials.gid)
}

/// Sockets that are being made.
#[derive(Debug, Default)]
pub(crate) struct Making {
    /// Made as another's other end, and not asked for yet, by number.
    ready: BTreeMap<u64, OwnedFd>,
    /// The other end of each, by number: what waits in it is sent through it.
    far: BTreeMap<u64, OwnedFd>,
    filled: Vec<u64>,
}

/// A socket that is not connected, or one end of a pair, which is made with the first end that is asked for.
pub(crate) fn make(
    blank: &Blank,
    socket: &UnixSocket,
    flags: OFlags,
    kit: &mut Kit<'_>,
) -> Result<OwnedFd, RestoreError> {
    let pid = blank.pid;
    let kind = match socket.kind {
        1 => SocketType::STREAM,
        2 => SocketType::DGRAM,
        5 => SocketType::SEQPACKET,
        _ => {
            return Err(RestoreError::Unsound {
                pid,
                why: "a unix socket of no kind",
            });
        }
    };
    let making = &mut kit.common.unix;
    let fd = match (socket.state, making.ready.remove(&socket.inode)) {
        (UnixState::Connected(_), Some(fd)) => fd,
        (UnixState::Idle, _) => rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
            .during(pid, "making a unix socket")?,
        (UnixState::Connected(_) | UnixState::Alone, _) => {
            let (near, far) = pair(blank, kind, socket.peer_credentials)?;
            let copy = |fd: &OwnedFd| fd.try_clone().during(pid, "dup");
            making.far.insert(socket.inode, copy(&far)?);
            if let UnixState::Connected(peer) = socket.state {
                making.far.insert(peer, copy(&near)?);
                making.ready.insert(peer, far);
            }
            near
        }
    };
    if flags.contains(OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(&fd, OFlags::NONBLOCK).during(pid, "setting flags")?;
    }
    set(&fd, socket).during(pid, "setting a unix socket's options")?;
    Ok(fd)
}

/// Makes a pair as the process does it: SO_PEERCRED of both ends names it.
fn pair(blank: &Blank, kind: SocketType, (uid, gid): (u32, u32)) -> Result<(OwnedFd, OwnedFd), RestoreError> {
    const SYS_CLOSE: i64 = 3;
    const SYS_SOCKETPAIR: i64 = 53;
    const SYS_SETRESUID: i64 = 117;
    const SYS_SETRESGID: i64 = 119;
    const AF_UNIX: u64 = 1;
    const KEEP: u64 = u32::MAX as u64;
    let pid = blank.pid;
    let status = ProcDir::process(blank.host)
        .status()
        .during(pid, "reading its status")?;
    let (own_uid, own_gid) = (status.uids[1], status.gids[1]);
    let mut script = Script::new(&blank.foothold.arena);
    let ends = script.bytes(&[0xff; 8]);
    script.attempt("setresgid", SYS_SETRESGID, &[KEEP, u64::from(gid), KEEP]);
    script.attempt("setresuid", SYS_SETRESUID, &[KEEP, u64::from(uid), KEEP]);
    let kind_flags = u64::from(kind.as_raw()) | OFlags::CLOEXEC.bits() as u64;
    let made = script.attempt("socketpair", SYS_SOCKETPAIR, &[AF_UNIX, kind_flags, 0, ends.address]);
    script.attempt("setresuid", SYS_SETRESUID, &[KEEP, u64::from(own_uid), KEEP]);
    script.attempt("setresgid", SYS_SETRESGID, &[KEEP, u64::from(own_gid), KEEP]);
    let (_, answers) = script
        .run(blank.leader())
        .during(pid, "making a pair of unix sockets")?;
    if answers.of(made) != 0 {
        // Its table is full: then it is ours, which SO_PEERCRED tells.
        return socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
            .during(pid, "making a pair of unix sockets");
    }
    let bytes = answers.bytes(ends);
    let number = |at: usize| i32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let take = |number| take_descriptor(blank.host, number).during(pid, "taking a unix socket");
    let both = (take(number(0))?, take(number(4))?);
    let mut script = Script::new(&blank.foothold.arena);
    script.call("close", SYS_CLOSE, &[number(0) as u64]);
    script.call("close", SYS_CLOSE, &[number(4) as u64]);
    blank.run(blank.host, script, "closing descriptors")?;
    Ok(both)
}

fn set(fd: &OwnedFd, socket: &UnixSocket) -> io::Result<()> {
    let all = socket.options.iter().cloned();
    let all: Vec<SocketOption> = all
        .map(|(level, name, value)| SocketOption { level, name, value })
        .collect();
    options::set_early(fd.as_fd(), &all)?;
    options::set_late(fd.as_fd(), &all)?;
    for (name, wanted) in [(SO_PASSCRED, socket.passes[0]), (SO_PASSSEC, socket.passes[1])] {
        if unix::option(fd.as_fd(), name).unwrap_or(0) != u32::from(wanted) {
            unix::set_option(fd.as_fd(), name, u32::from(wanted))?;
        }
    }
    let [send, receive, locked] = socket.buffers;
    tcp::set_buffers(fd.as_fd(), Buffers { send, receive, locked })?;
    let (uid, gid, mode) = socket.owner;
    let meta = rustix::fs::fstat(fd)?;
    if (meta.st_uid, meta.st_gid) != (uid, gid) {
        socket::give_to(fd.as_fd(), uid, gid)?;
    }
    if meta.st_mode & 0o7777 != mode {
        rustix::fs::fchmod(fd, Mode::from_raw_mode(mode))?;
    }
    Ok(())
}

/// Changes one that is there; `false`: it must be made anew.
pub(crate) fn change(fd: &OwnedFd, before: &UnixSocket, now: &UnixSocket) -> io::Result<bool> {
    let stays = match (before.state, now.state) {
        (UnixState::Connected(_), UnixState::Alone) => true,
        (a, b) => a == b,
    };
    if !stays || (before.inode, before.kind) != (now.inode, now.kind) {
        return Ok(false);
    }
    set(fd, now)?;
    Ok(true)
}

/// Sends again what waited in the sockets, once all descriptions of the move are there, and shuts down and closes what is
/// shut down and closed.
pub(crate) fn fill(blanks: &[Blank], kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    let hosts: BTreeMap<Pid, i32> = blanks.iter().map(|blank| (blank.pid, blank.host)).collect();
    let mut making = std::mem::take(&mut kit.common.unix);
    for (blank, key, socket) in sockets(blanks) {
        let pid = blank.pid;
        if socket.queue.is_empty() || making.filled.contains(&socket.inode) {
            continue;
        }
        making.filled.push(socket.inode);
        let (Some(near), Some(far)) = (kit.common.descriptions.get(&key), making.far.get(&socket.inode)) else {
            return Err(RestoreError::Unsound {
                pid,
                why: "a unix socket whose other end is not there",
            });
        };
        let send = || send_all(&socket.queue, near, far, socket.kind == socket::STREAM, &hosts, kit);
        send().during(pid, "filling a unix socket")?;
    }
    for (blank, key, socket) in sockets(blanks) {
        let Some(fd) = kit
            .common
            .descriptions
            .get(&key)
            .filter(|_| socket.state != UnixState::Alone)
        else {
            continue;
        };
        for (bit, how) in [
            (SENDING_IS_SHUT, rustix::net::Shutdown::Write),
            (RECEIVING_IS_SHUT, rustix::net::Shutdown::Read),
        ] {
            if socket.shutdown & bit != 0 {
                rustix::net::shutdown(fd, how).during(blank.pid, "shutting down a unix socket")?;
            }
        }
    }
    Ok(())
}

fn sockets(blanks: &[Blank]) -> impl Iterator<Item = (&Blank, u64, &UnixSocket)> {
    blanks.iter().flat_map(|blank| {
        blank
            .files()
            .descriptions
            .iter()
            .filter_map(move |description| match &description.kind {
                DescriptionKind::Unix(socket) => Some((blank, description.key, &**socket)),
                _ => None,
            })
    })
}

fn send_all(
    queue: &[UnixMessage],
    near: &OwnedFd,
    far: &OwnedFd,
    is_stream: bool,
    hosts: &BTreeMap<Pid, i32>,
    kit: &Kit<'_>,
) -> io::Result<()> {
    // Where either end wants credentials, the kernel would note ours where none were noted.
    let passes = [near, far].map(|fd| unix::option(fd.as_fd(), SO_PASSCRED));
    let buffers = tcp::buffers(far.as_fd())?;
    let pass = |fd: &OwnedFd, value: u32| unix::set_option(fd.as_fd(), SO_PASSCRED, value);
    pass(near, 0)?;
    pass(far, 0)?;
    unix::set_option(far.as_fd(), SO_SNDBUFFORCE, ROOM)?;
    for message in queue {
        let fds = message
            .descriptors
            .iter()
            .map(|key| kit.common.descriptions.get(key).map(AsFd::as_fd));
        let fds: Option<Vec<_>> = fds.collect();
        let fds = fds.ok_or_else(|| io::Error::other("a descriptor in flight that is not there"))?;
        let credentials = message.credentials.map(|(pid, uid, gid)| {
            let host = hosts.get(&pid).copied();
            // Of a sender that does not move, the user is known still; it is the number of nobody's process.
            let pid = host.unwrap_or(std::process::id() as i32);
            Credentials { pid, uid, gid }
        });
        let mut sent = unix::send(far.as_fd(), &message.bytes, &fds, credentials)?;
        while is_stream && sent < message.bytes.len() {
            sent += unix::send(far.as_fd(), &message.bytes[sent..], &[], credentials)?;
        }
    }
    tcp::set_buffers(far.as_fd(), buffers)?;
    for (fd, passes) in [near, far].into_iter().zip(passes) {
        pass(fd, passes?)?;
    }
    Ok(())
}
