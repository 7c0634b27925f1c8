//! What changes without anything to be seen in a [`Glimpse`].
//!
//! Owns the reading of it inside the freeze: contents, queues, times, and the descriptions that are on their way through
//! queues. Refuses to take anything out: what is read stays where it is.

use super::{Glimpse, Met, Owner, describe};
use crate::descriptors::{Look, Refusal, pipe, timer, unix};
use dunlin_proto::control::Obstacle;
use dunlin_proto::image::{self, Description, DescriptionKind, Files};
use dunlin_sys::procfs::ProcDir;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

const O_CLOEXEC: u32 = 0o2_000_000;

/// Has the process something that can change without anything to be seen in [`Glimpse`]?
pub fn is_volatile(files: &Files) -> bool {
    files
        .descriptions
        .iter()
        .any(|description| changes_unseen(&description.kind))
}

fn changes_unseen(kind: &DescriptionKind) -> bool {
    match kind {
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
    }
}

/// Reads, inside the freeze, what changes without anything to be seen in [`Glimpse`]: the bytes of files without a name and
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
    let own_dir = ProcDir::own();
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
        if !changes_unseen(&files.descriptions[index].kind) {
            return Ok(Ok(()));
        }
        match &mut files.descriptions[index].kind {
            // Their bytes, modes and seals.
            kind @ (DescriptionKind::Deleted { .. } | DescriptionKind::Memory { .. }) => match describe(look)? {
                Ok(now) => *kind = now,
                Err(obstacle) => return Ok(Err(obstacle)),
            },
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
            // The other ends of pipes, and what does not change unseen.
            _ => {}
        }
        Ok(Ok(()))
    }

    /// The key of a description in flight, of which this is a handle of ours. It is added to the others if it is none of
    /// them.
    fn in_flight(&mut self, fd: OwnedFd, files: &mut Files) -> io::Result<Result<u64, Refusal>> {
        let own = std::process::id() as i32;
        let dir = ProcDir::own();
        let glimpse = Glimpse::of(&dir, fd.as_raw_fd())?.ok_or(io::ErrorKind::NotFound)?;
        let key = self.met.key(own, &glimpse)?;
        self.met.hold(fd);
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
