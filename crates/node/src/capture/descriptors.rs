//! The descriptor table of a captured process.
//!
//! Owns the table, and which descriptors share one open file description; what is particular to a kind of description is
//! in [`crate::descriptors`]. Refuses to keep any of them open longer than it takes to look. Invariant: a descriptor
//! that is not understood is an obstacle.

mod glimpse;
mod met;
mod refresh;

pub(crate) use glimpse::in_two;
pub use glimpse::{Glimpse, glimpse};
pub use met::Met;
pub use refresh::{is_volatile, refresh};

use crate::capture::Surroundings;
use crate::descriptors::{
    Found, Look, Refusal, epoll, event, file, memory, owner, pipe, process, signals, timer, unix,
};
use crate::sockets;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{self, Description, DescriptionKind, Descriptor, FileLock, Files};
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::fdinfo::{FdInfo, Lock, LockKind};
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::io;

const O_CLOEXEC: u32 = 0o2_000_000;
const O_ASYNC: u32 = 0o20_000;

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
    let mut known = BTreeMap::new();
    for glimpse in glimpses {
        let key = met.key(owner.host, glimpse)?;
        let look = owner.look(&dir, glimpse);
        let index = match known.get(&key) {
            Some(index) => *index,
            None => {
                let kind = match before.and_then(|(glimpses, files)| unchanged(glimpse, glimpses, files)) {
                    Some(kind) => Ok(kind.clone()),
                    // The program runs, and has closed it meanwhile. The freeze will see what is there then.
                    None if before.is_none() && !look.is_there()? => continue,
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
                            _ => owner::look(look.handle()?)?,
                        },
                        locks: locks(&glimpse.info),
                    }),
                    Err(obstacle) => {
                        obstacles.push(*obstacle);
                        continue;
                    }
                }
                let index = files.descriptions.len() - 1;
                known.insert(key, index);
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
            handle: OnceCell::new(),
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
    if owner.around.is_alone() {
        return Ok(());
    }
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
        other if other.starts_with(b"socket:") => match dunlin_sys::socket::what(look.handle()?)?.family {
            dunlin_sys::socket::unix::FAMILY => unix::look(look),
            _ => internet(look),
        },
        _ => file::look(look),
    }
}

/// A socket of the Internet families, or of one that does not move.
fn internet(look: &Look<'_>) -> Found {
    match sockets::look::look(look.host, look.handle()?, look.around.inside)? {
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
    if !look.around.shared_outside(look.host, &look.link()?)? {
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
