//! Memory with a descriptor that nobody has mapped. See memfd_create(2).
//!
//! Its bytes travel inside the freeze, like those of a file without a name; several descriptions may be of one memory.

use super::{Found, Look, file};
use crate::files::{contents, file_ref, proc_fd};
use crate::restore::Common;
use dunlin_proto::image::DescriptionKind;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use std::collections::btree_map::Entry;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

const NAME: &[u8] = b"/memfd:";
const GONE: &[u8] = b" (deleted)";

/// Whether a link of /proc is one to such memory.
pub(crate) fn is(target: &[u8]) -> bool {
    target.starts_with(NAME) && target.ends_with(GONE)
}

pub(crate) fn look(look: &Look<'_>) -> Found {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let file = file_ref(&look.link()?)?;
    if look.around.shared_outside(look.host, &look.link()?)? {
        return look.refuse(
            "a process that stays here has this memory (memfd) open, too",
            "move the whole tree (--tree), or close it",
        );
    }
    if file.size > file::MAX_DELETED_BYTES {
        return look.refuse("it is too large to travel (256 MiB)", "close it before the move");
    }
    let fd = look.handle()?;
    let Ok(seals) = fcntl_get_seals(fd) else {
        return look.refuse(
            "it is not of this process to seal, so that it is not known whose memory it is",
            "close it before the move",
        );
    };
    if rustix::fs::fstatfs(fd)?.f_type != TMPFS_MAGIC {
        return look.refuse(
            "memory of huge pages (memfd) cannot be moved yet",
            "close it before the move",
        );
    }
    let target = look.target();
    Ok(Ok(DescriptionKind::Memory {
        inode: file.inode,
        name: target[NAME.len()..target.len() - GONE.len()].to_vec(),
        mode: file.mode & 0o7777,
        seals: seals.bits(),
        bytes: contents(&look.link()?, file::MAX_DELETED_BYTES)?,
    }))
}

/// A description of such memory, which is made with the first that is asked for.
pub(crate) fn make(
    common: &mut Common,
    inode: u64,
    name: &[u8],
    (mode, seals): (u32, u32),
    bytes: &[u8],
    flags: OFlags,
) -> io::Result<OwnedFd> {
    let memory = match common.memories.entry(inode) {
        Entry::Occupied(made) => made.into_mut(),
        Entry::Vacant(place) => {
            let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            let mut file = std::fs::File::from(fd);
            file.write_all(bytes)?;
            let fd = OwnedFd::from(file);
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode))?;
            place.insert(fd)
        }
    };
    let again = flags - (OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC | OFlags::TMPFILE | OFlags::NOFOLLOW);
    let fd = rustix::fs::open(proc_fd(memory), again | OFlags::CLOEXEC, Mode::empty())?;
    // What F_SEAL_SEAL forbids must come before it, and with it: in one call.
    let missing = SealFlags::from_bits_retain(seals) - fcntl_get_seals(&*memory)?;
    if !missing.is_empty() {
        fcntl_add_seals(&*memory, missing)?;
    }
    Ok(fd)
}
