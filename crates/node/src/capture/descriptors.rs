//! The descriptor table of a captured process.
//!
//! Owns the table, and which descriptors share one open file description; what is particular to a kind of description is
//! in [`crate::descriptors`]. Refuses to keep any of them open longer than it takes to look. Invariant: a descriptor
//! that is not understood is an obstacle.

use crate::capture::Surroundings;
use crate::descriptors::{
    Found, Look, Refusal, epoll, event, file, memory, owner, pipe, process, signals, timer, unix,
};
use crate::files::contents;
use crate::sockets;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{self, Description, DescriptionKind, Descriptor, FileLock, Files};
use dunlin_sys::inspect;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::fdinfo::{FdInfo, Lock, LockKind};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

const O_CLOEXEC: u32 = 0o2_000_000;
const O_ASYNC: u32 = 0o20_000;
const O_ACCMODE: u32 = 0o3;

/// One descriptor as /proc shows it: cheap to read, and enough to see whether anything changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glimpse {
    pub(crate) number: i32,
    pub(crate) link: PathBuf,
    pub(crate) info: FdInfo,
    /// The lines of fdinfo that change only when somebody changes the descriptor.
    pub(crate) steady: String,
}

impl Glimpse {
    /// One descriptor of a process; `None` if it was closed meanwhile, which inside a freeze cannot happen.
    pub(crate) fn of(dir: &ProcDir, number: i32) -> io::Result<Option<Glimpse>> {
        let (Ok(link), Ok(text)) = (dir.link(&format!("fd/{number}")), dir.text(&format!("fdinfo/{number}"))) else {
            return Ok(None);
        };
        let info = FdInfo::parse(&text)?;
        let passes = |line: &&str| {
            !["pos:", "flags:", "ticks:", "it_value:"]
                .iter()
                .any(|key| line.starts_with(key))
        };
        Ok(Some(Glimpse {
            number,
            link,
            info,
            steady: text.lines().filter(passes).flat_map(|line| [line, "\n"]).collect(),
        }))
    }

    /// Could it be the same description?
    fn is_like(&self, other: &Glimpse) -> bool {
        const NUMBERED: &str = "eventfd-id:";
        let id = |glimpse: &Glimpse| {
            let line = glimpse.steady.lines().find(|line| line.starts_with(NUMBERED));
            line.map(str::to_owned)
        };
        let access = |glimpse: &Glimpse| glimpse.info.flags & O_ACCMODE;
        self.link == other.link && access(self) == access(other) && id(self) == id(other)
    }
}

impl Glimpse {
    /// Its number.
    pub fn number(&self) -> i32 {
        self.number
    }

    /// Its name, as /proc has it.
    pub fn link(&self) -> &std::path::Path {
        &self.link
    }

    /// The offset.
    pub fn position(&self) -> u64 {
        self.info.position
    }
}

/// Reads the table as /proc shows it.
pub fn glimpse(dir: &ProcDir) -> io::Result<Vec<Glimpse>> {
    let mut numbers = dir.numbers("fd")?;
    let parts = in_two(&mut numbers, |part| -> io::Result<Vec<Glimpse>> {
        let each = part.iter().map(|number| Glimpse::of(dir, *number).transpose());
        each.flatten().collect()
    })?;
    Ok(parts.concat())
}

/// Works on the halves of many at once, on few in one go. What comes of it is in their order.
pub(crate) fn in_two<T: Send, R: Send, E: Send>(
    all: &mut [T],
    work: impl Fn(&mut [T]) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    const FEW: usize = 128;
    if all.len() < FEW {
        return Ok(vec![work(all)?]);
    }
    let (one, other) = all.split_at_mut(all.len() / 2);
    std::thread::scope(|scope| {
        let there = scope.spawn(|| work(other));
        let here = work(one);
        let there = there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(vec![here?, there?])
    })
}

/// The open file descriptions that were met in the processes of a move. Each has a key that is its own in all of them, and
/// keeps it from the plan to the freeze.
#[derive(Debug, Default)]
pub struct Met {
    all: Vec<Known>,
    /// Those of each name.
    named: HashMap<PathBuf, Vec<usize>>,
    /// Shared memory that was met in this round.
    memories: BTreeSet<u64>,
    round: u32,
    /// Handles on descriptions in flight.
    held: Vec<OwnedFd>,
}

#[derive(Debug)]
struct Known {
    host: i32,
    glimpse: Glimpse,
    round: u32,
}

impl Met {
    /// What was met before may have changed: the processes are all looked at again.
    pub fn begin(&mut self) {
        self.round += 1;
        self.held.clear();
        self.memories.clear();
    }

    /// Is this the first time in this round that this memory is met?
    pub(crate) fn is_first(&mut self, memory: u64) -> bool {
        self.memories.insert(memory)
    }

    /// The key of a description.
    pub(crate) fn key(&mut self, host: i32, glimpse: &Glimpse) -> io::Result<u64> {
        let mut same = None;
        let named = self.named.get(&glimpse.link).into_iter().flatten();
        let all = named.map(|at| (*at, &self.all[*at]));
        for (at, known) in all.filter(|(_, known)| known.glimpse.is_like(glimpse)) {
            let (one, other) = (glimpse.number, known.glimpse.number);
            if (known.host, other) == (host, one) && !is_own(host) {
                // Its descriptor is this one: of a description that was met in this round, or has become another.
                same = same.or(Some(at));
            } else if (known.host, other) != (host, one)
                && inspect::same_description((host, known.host), (one, other)).unwrap_or(false)
            {
                same = Some(at);
                break;
            }
        }
        let now = Known {
            host,
            glimpse: glimpse.clone(),
            round: self.round,
        };
        match same {
            Some(at) if self.all[at].round == self.round => Ok(at as u64 + 1),
            Some(at) => {
                self.all[at] = now;
                Ok(at as u64 + 1)
            }
            None => {
                self.all.push(now);
                self.named
                    .entry(glimpse.link.clone())
                    .or_default()
                    .push(self.all.len() - 1);
                Ok(self.all.len() as u64)
            }
        }
    }
}

/// Numbers of our own are of descriptions in flight, and given out again.
fn is_own(host: i32) -> bool {
    host == std::process::id() as i32
}

/// Whose table is read.
pub struct Owner<'a> {
    /// The process.
    pub pid: Pid,
    /// Its number on this machine.
    pub host: i32,
    /// The processes around.
    pub around: &'a Surroundings<'a>,
}

/// Reads what the descriptors are. What has not changed since `before` is taken from there.
pub fn read(
    owner: &Owner<'_>,
    glimpses: &[Glimpse],
    before: Option<(&[Glimpse], &Files)>,
    met: &mut Met,
    obstacles: &mut Vec<Obstacle>,
) -> io::Result<Files> {
    let mut files = Files::default();
    let dir = ProcDir::process(owner.host);
    let mut sets = Vec::new();
    for glimpse in glimpses {
        let key = met.key(owner.host, glimpse)?;
        let look = owner.look(&dir, glimpse);
        let index = match files.descriptions.iter().position(|d| d.key == key) {
            Some(index) => index,
            None => {
                let kind = match before.and_then(|(glimpses, files)| unchanged(glimpse, glimpses, files)) {
                    Some(kind) => Ok(kind.clone()),
                    None => describe(&look)?,
                };
                match kind {
                    Ok(kind) => files.descriptions.push(Description {
                        key,
                        kind,
                        flags: glimpse.info.flags & !O_CLOEXEC,
                        position: glimpse.info.position,
                        owner: match glimpse.info.flags & O_ASYNC {
                            0 => None,
                            _ => owner::look(owner.host, glimpse.number)?,
                        },
                        locks: locks(&glimpse.info),
                    }),
                    Err(obstacle) => {
                        obstacles.push(*obstacle);
                        continue;
                    }
                }
                let index = files.descriptions.len() - 1;
                if matches!(files.descriptions[index].kind, DescriptionKind::Epoll { .. }) {
                    sets.push((index, glimpse));
                }
                index
            }
        };
        files.table.push(Descriptor {
            number: glimpse.number,
            description: index as u32,
            close_on_exec: glimpse.info.flags & O_CLOEXEC != 0,
        });
    }
    // What they watch may stand anywhere in the table.
    for (index, glimpse) in sets {
        let look = owner.look(&dir, glimpse);
        let watches = watched(&look, glimpses, &files, met, obstacles)?;
        files.descriptions[index].kind = DescriptionKind::Epoll { watches };
    }
    Ok(files)
}

impl Owner<'_> {
    fn look<'a>(&'a self, dir: &'a ProcDir, glimpse: &'a Glimpse) -> Look<'a> {
        Look {
            pid: self.pid,
            host: self.host,
            dir,
            glimpse,
            around: self.around,
        }
    }
}

/// What was described before the freeze, and is as it was, may have come since to a process that was forked meanwhile and
/// stays: asked of all that a process may share.
pub fn shared_since(
    owner: &Owner<'_>,
    glimpses: &[Glimpse],
    files: &Files,
    obstacles: &mut Vec<Obstacle>,
) -> io::Result<()> {
    let dir = ProcDir::process(owner.host);
    for descriptor in &files.table {
        let Ok(at) = glimpses.binary_search_by_key(&descriptor.number, |g| g.number) else {
            continue;
        };
        let look = owner.look(&dir, &glimpses[at]);
        let refusal = match &files.descriptions[descriptor.description as usize].kind {
            DescriptionKind::Pipe { .. } => pipe::shared(&look)?,
            DescriptionKind::Socket(_) => shared_socket(&look)?,
            _ => None,
        };
        obstacles.extend(refusal.map(|obstacle| *obstacle));
    }
    Ok(())
}

/// What a descriptor is that is as it was.
fn unchanged<'a>(glimpse: &Glimpse, glimpses: &[Glimpse], files: &'a Files) -> Option<&'a DescriptionKind> {
    let at = glimpses.binary_search_by_key(&glimpse.number, |g| g.number).ok()?;
    let before = &glimpses[at];
    let same = before.link == glimpse.link
        && before.steady == glimpse.steady
        && (before.info.flags ^ glimpse.info.flags) & !O_CLOEXEC == 0;
    let at = files.table.binary_search_by_key(&glimpse.number, |d| d.number).ok()?;
    same.then(|| &files.descriptions[files.table[at].description as usize].kind)
}

fn locks(info: &FdInfo) -> Vec<FileLock> {
    let portable = |lock: &Lock| {
        let kind = match lock.kind {
            LockKind::Posix => image::LockKind::Process,
            LockKind::OpenFile => image::LockKind::Description,
            LockKind::Flock => image::LockKind::Whole,
            // Refused before.
            LockKind::Lease => return None,
        };
        Some(FileLock {
            kind,
            write: lock.write,
            start: lock.start,
            length: lock.last.map_or(0, |last| last.saturating_sub(lock.start) + 1),
        })
    };
    info.locks.iter().filter_map(portable).collect()
}

fn describe(look: &Look<'_>) -> Found {
    if look.glimpse.info.locks.iter().any(|lock| lock.kind == LockKind::Lease) {
        return look.refuse(
            "it holds a lease (F_SETLEASE), of which the other node's kernel would not know",
            "turn leases off in the program (kernel oplocks, in Samba)",
        );
    }
    match look.target() {
        b"anon_inode:[eventfd]" => event::look(look),
        // What it watches is looked up when all descriptors are known.
        b"anon_inode:[eventpoll]" => Ok(Ok(DescriptionKind::Epoll { watches: Vec::new() })),
        b"anon_inode:[timerfd]" => timer::look(look, None),
        b"anon_inode:[signalfd]" => signals::look(look),
        b"anon_inode:[pidfd]" => process::look(look),
        other if memory::is(other) => memory::look(look),
        other if other.starts_with(b"anon_inode:") => look.refuse(
            "a descriptor of this kind cannot be moved yet",
            "see `dunlin can-move` after closing it, or run the program without the feature that needs it",
        ),
        other if other.starts_with(b"socket:") => match dunlin_sys::socket::what(look.take()?.as_fd())?.family {
            dunlin_sys::socket::unix::FAMILY => unix::look(look),
            _ => internet(look),
        },
        _ => file::look(look),
    }
}

/// A socket of the Internet families, or of one that does not move.
fn internet(look: &Look<'_>) -> Found {
    match sockets::look::look(look.host, look.take()?.as_fd(), look.around.inside)? {
        Some(Ok(socket)) => match shared_socket(look)? {
            Some(refusal) => Ok(Err(refusal)),
            None => Ok(Ok(DescriptionKind::Socket(Box::new(socket)))),
        },
        Some(Err(reason)) => look.refuse(&reason.why, reason.hint),
        None => look.refuse(
            "sockets of this family cannot be moved yet",
            "close the connection, or keep the process on this node",
        ),
    }
}

fn shared_socket(look: &Look<'_>) -> io::Result<Option<Refusal>> {
    if !look.around.shared_outside(look.host, &look.link())? {
        return Ok(None);
    }
    let refused = look.refuse::<()>(
        "a process that stays here has the same socket",
        "move the tree (--tree), which shares it",
    )?;
    Ok(refused.err())
}

/// Finds out what an epoll set watches: mostly it is what has the number under which it was added; otherwise it is looked
/// for among all descriptors of the processes that move.
fn watched(
    look: &Look<'_>,
    glimpses: &[Glimpse],
    files: &Files,
    met: &mut Met,
    obstacles: &mut Vec<Obstacle>,
) -> io::Result<Vec<image::Watch>> {
    let mut watches = Vec::new();
    for found in epoll::look(look)? {
        let number = found.watch.number;
        let by_number = glimpses.binary_search_by_key(&number, |g| g.number);
        let first = by_number.ok().map(|at| &glimpses[at]);
        let others = glimpses.iter().filter(|glimpse| glimpse.number != number);
        let mut target = None;
        for glimpse in first.into_iter().chain(others) {
            if epoll::is_target(look, &found, look.host, glimpse)? {
                target = Some(glimpse.number);
                break;
            }
        }
        let key = match target {
            Some(number) => match files.table.binary_search_by_key(&number, |d| d.number) {
                Ok(at) => files.descriptions[files.table[at].description as usize].key,
                // It cannot move itself, and that was said.
                Err(_) => continue,
            },
            None => match watched_elsewhere(look, &found, met)? {
                Some(key) => key,
                None => {
                    obstacles.push(*epoll::unknown(look, &found));
                    continue;
                }
            },
        };
        watches.push(image::Watch {
            target: key,
            ..found.watch
        });
    }
    watches.sort_unstable();
    Ok(watches)
}

fn watched_elsewhere(look: &Look<'_>, found: &epoll::Found, met: &mut Met) -> io::Result<Option<u64>> {
    for host in look.around.moving.iter().filter(|host| **host != look.host) {
        for glimpse in glimpse(&ProcDir::process(*host))? {
            if epoll::is_target(look, found, *host, &glimpse)? {
                return met.key(*host, &glimpse).map(Some);
            }
        }
    }
    Ok(None)
}

/// Has the process something that can change without anything to be seen in [`glimpse`]?
pub fn is_volatile(files: &Files) -> bool {
    files.descriptions.iter().any(|description| match description.kind {
        DescriptionKind::Deleted { .. }
        | DescriptionKind::Memory { .. }
        | DescriptionKind::Pipe { .. }
        | DescriptionKind::Timer(_)
        | DescriptionKind::Unix(_) => true,
        DescriptionKind::File(_)
        | DescriptionKind::Directory(_)
        | DescriptionKind::Kernel(_)
        | DescriptionKind::Path(_)
        | DescriptionKind::Device(_)
        | DescriptionKind::Stream { .. }
        | DescriptionKind::Event { .. }
        | DescriptionKind::Epoll { .. }
        | DescriptionKind::Signals(_)
        | DescriptionKind::Socket(_)
        | DescriptionKind::Process(_) => false,
    })
}

/// Reads, inside the freeze, what changes without anything to be seen in [`glimpse`]: the bytes of files without a name and
/// of pipes (with the first reading end of each), the time that timers have left, what unix sockets are and what waits in
/// them. Descriptions in flight there, which may be in nobody's table, come to the others.
pub fn refresh(
    owner: &Owner<'_>,
    glimpses: &[Glimpse],
    files: &mut Files,
    met: &mut Met,
    obstacles: &mut Vec<Obstacle>,
) -> io::Result<()> {
    // Those in flight are read anew.
    let in_tables = files
        .table
        .iter()
        .map(|d| d.description as usize + 1)
        .max()
        .unwrap_or(0);
    files.descriptions.truncate(in_tables);
    let mut first = vec![None; in_tables];
    for descriptor in files.table.iter().rev() {
        first[descriptor.description as usize] = Some(descriptor.number);
    }
    let mut refresher = Refresher {
        owner,
        met,
        pipes: BTreeSet::new(),
        flying: BTreeMap::new(),
    };
    let (dir, own) = (ProcDir::process(owner.host), std::process::id() as i32);
    let own_dir = ProcDir::process(own);
    let mut index = 0;
    // It grows.
    while index < files.descriptions.len() {
        let flying = refresher.flying.get(&index).cloned();
        let number = first.get(index).copied().flatten();
        let at = number.and_then(|number| glimpses.binary_search_by_key(&number, |g| g.number).ok());
        let look = match (&flying, at) {
            (Some(glimpse), _) => Look {
                host: own,
                ..owner.look(&own_dir, glimpse)
            },
            (None, Some(at)) => owner.look(&dir, &glimpses[at]),
            (None, None) => {
                index += 1;
                continue;
            }
        };
        if let Err(obstacle) = refresher.refresh(&look, index, files)? {
            obstacles.push(*obstacle);
        }
        index += 1;
    }
    Ok(())
}

struct Refresher<'a> {
    owner: &'a Owner<'a>,
    met: &'a mut Met,
    pipes: BTreeSet<u64>,
    /// Descriptions in flight, by index: our own handles on them.
    flying: BTreeMap<usize, Glimpse>,
}

impl Refresher<'_> {
    fn refresh(&mut self, look: &Look<'_>, index: usize, files: &mut Files) -> io::Result<Result<(), Refusal>> {
        match &mut files.descriptions[index].kind {
            DescriptionKind::Deleted { bytes, .. } | DescriptionKind::Memory { bytes, .. } => {
                *bytes = contents(&look.link(), file::MAX_DELETED_BYTES)?;
            }
            DescriptionKind::Pipe {
                pipe,
                write: false,
                capacity,
                bytes,
            } if self.pipes.insert(*pipe) => (*capacity, *bytes) = pipe::peek(look.host, look.glimpse.number)?,
            kind @ DescriptionKind::Timer(_) => {
                let DescriptionKind::Timer(before) = &kind else {
                    return Ok(Ok(()));
                };
                match timer::look(look, Some(before))? {
                    Ok(now) => *kind = now,
                    Err(obstacle) => return Ok(Err(obstacle)),
                }
            }
            DescriptionKind::Unix(_) => {
                let mut socket = match unix::look(look)? {
                    Ok(DescriptionKind::Unix(socket)) => socket,
                    Ok(_) => return Ok(Ok(())),
                    Err(obstacle) => return Ok(Err(obstacle)),
                };
                let queue = match unix::queue(look, &socket)? {
                    Ok(queue) => queue,
                    Err(obstacle) => return Ok(Err(obstacle)),
                };
                for waiting in queue {
                    let mut descriptors = Vec::new();
                    for fd in waiting.descriptors {
                        match self.in_flight(fd, files)? {
                            Ok(key) => descriptors.push(key),
                            Err(obstacle) => return Ok(Err(obstacle)),
                        }
                    }
                    socket.queue.push(image::UnixMessage {
                        bytes: waiting.bytes,
                        descriptors,
                        credentials: waiting.credentials.map(unix::sender),
                    });
                }
                files.descriptions[index].kind = DescriptionKind::Unix(socket);
            }
            DescriptionKind::Pipe { .. }
            | DescriptionKind::File(_)
            | DescriptionKind::Directory(_)
            | DescriptionKind::Kernel(_)
            | DescriptionKind::Path(_)
            | DescriptionKind::Device(_)
            | DescriptionKind::Stream { .. }
            | DescriptionKind::Event { .. }
            | DescriptionKind::Epoll { .. }
            | DescriptionKind::Signals(_)
            | DescriptionKind::Socket(_)
            | DescriptionKind::Process(_) => {}
        }
        Ok(Ok(()))
    }

    /// The key of a description in flight, of which this is a handle of ours. It is added to the others if it is none of
    /// them.
    fn in_flight(&mut self, fd: OwnedFd, files: &mut Files) -> io::Result<Result<u64, Refusal>> {
        let own = std::process::id() as i32;
        let dir = ProcDir::process(own);
        let glimpse = Glimpse::of(&dir, fd.as_raw_fd())?.ok_or(io::ErrorKind::NotFound)?;
        let key = self.met.key(own, &glimpse)?;
        // As long as it is open here, it is known when it is met again.
        self.met.held.push(fd);
        if files.descriptions.iter().any(|d| d.key == key) {
            return Ok(Ok(key));
        }
        let look = Look {
            host: own,
            ..self.owner.look(&dir, &glimpse)
        };
        let kind = match describe(&look)? {
            Ok(DescriptionKind::Epoll { .. }) => {
                return look.refuse(
                    "an epoll set that is on its way through a unix socket (SCM_RIGHTS) cannot be moved",
                    "try again when it has been received",
                );
            }
            Ok(kind) => kind,
            Err(obstacle) => return Ok(Err(obstacle)),
        };
        files.descriptions.push(Description {
            key,
            kind,
            flags: glimpse.info.flags & !O_CLOEXEC,
            position: glimpse.info.position,
            owner: None,
            locks: Vec::new(),
        });
        self.flying.insert(files.descriptions.len() - 1, glimpse);
        Ok(Ok(key))
    }
}
