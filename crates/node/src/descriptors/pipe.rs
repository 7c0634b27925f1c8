//! Pipes whose ends all move together.
//!
//! Their bytes travel inside the freeze, with the description of a reading end, and are copied without being taken out.

use super::{Found, Look, Refusal};
use crate::restore::Common;
use dunlin_proto::image::DescriptionKind;
use dunlin_sys::foothold::take_descriptor;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, tee};
use std::collections::btree_map::Entry;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

const O_ACCMODE: u32 = 0o3;
/// No pipe is made larger than this by us, in bytes.
pub(crate) const MOST: u64 = 16 << 20;

/// What a pipe's end is, or why it cannot move. Its bytes are not read yet.
pub(crate) fn look(look: &Look<'_>) -> Found {
    let inode = std::fs::metadata(look.link())?.ino();
    if !look.target().starts_with(b"pipe:") {
        return look.refuse(
            "a named pipe (FIFO) cannot be moved yet",
            "use an unnamed pipe inside a tree that moves as a whole (--tree)",
        );
    }
    if let Some(refusal) = shared(look)? {
        return Ok(Err(refusal));
    }
    Ok(Ok(DescriptionKind::Pipe {
        pipe: inode,
        write: look.glimpse.info.flags & O_ACCMODE == 1,
        capacity: fcntl_getpipe_size(&look.take()?)? as u32,
        bytes: Vec::new(),
    }))
}

/// Why it cannot move: a process that stays has the pipe, too.
pub(crate) fn shared(look: &Look<'_>) -> io::Result<Option<Refusal>> {
    let inode = std::fs::metadata(look.link())?.ino();
    let Some(other) = look.around.open_outside(inode)? else {
        return Ok(None);
    };
    let refused = look.refuse::<()>(
        &format!("process {other}, which stays here, has the pipe open"),
        "move the whole pipeline (--tree on its shell)",
    )?;
    Ok(refused.err())
}

/// The bytes in a pipe, which stay there, and how many it holds now: by a reading end. Since the plan it may have grown, for
/// a write that our stop has cut short.
pub(crate) fn peek(host: i32, number: i32) -> io::Result<(u32, Vec<u8>)> {
    let original = take_descriptor(host, number)?;
    let capacity = fcntl_getpipe_size(&original)?;
    let (copy_out, copy_in) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    resize(&copy_in, capacity)?;
    match tee(&original, &copy_in, capacity, SpliceFlags::NONBLOCK) {
        Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
        Err(error) => return Err(error.into()),
    }
    drop(copy_in);
    let mut bytes = Vec::new();
    std::fs::File::from(copy_out).read_to_end(&mut bytes)?;
    Ok((capacity as u32, bytes))
}

/// Changes how many bytes a pipe holds; how many it holds then. A daemon without CAP_SYS_RESOURCE has to raise the limit of
/// all (`/proc/sys/fs/pipe-max-size`) for a moment.
pub(crate) fn resize(pipe: &OwnedFd, size: usize) -> io::Result<usize> {
    const LIMIT: &str = "/proc/sys/fs/pipe-max-size";
    static ONE: Mutex<()> = Mutex::new(());
    match fcntl_setpipe_size(pipe, size) {
        Err(rustix::io::Errno::PERM) if size as u64 <= MOST => {}
        answer => return Ok(answer?),
    }
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = std::fs::read_to_string(LIMIT)?;
    std::fs::write(LIMIT, MOST.to_string())?;
    let answer = fcntl_setpipe_size(pipe, size);
    if let Err(error) = std::fs::write(LIMIT, before.trim()) {
        tracing::warn!(%error, "{LIMIT} stays at {MOST}");
    }
    Ok(answer?)
}

/// One end of a pipe, which is made with the first end that is asked for.
pub(crate) fn make(
    common: &mut Common,
    number: u64,
    write: bool,
    capacity: u32,
    bytes: &[u8],
    flags: OFlags,
) -> io::Result<OwnedFd> {
    if let Entry::Vacant(place) = common.pipes.entry(number) {
        place.insert(pipe_with(PipeFlags::CLOEXEC)?);
    }
    fill(common, number, capacity, bytes)?;
    // A second description of the same end: the flags of one must not show in the other.
    let (reading, writing) = &common.pipes[&number];
    let end = if write { writing } else { reading };
    let access = if write { OFlags::WRONLY } else { OFlags::RDONLY };
    Ok(rustix::fs::open(
        crate::files::proc_fd(end),
        access | OFlags::CLOEXEC | (flags & OFlags::NONBLOCK),
        Mode::empty(),
    )?)
}

/// Gives a pipe its bytes, if nobody has: each process that has a reading end brings them along. `false`: there is no such
/// pipe.
pub(crate) fn fill(common: &mut Common, number: u64, capacity: u32, bytes: &[u8]) -> io::Result<bool> {
    let Some((_, writing)) = common.pipes.get(&number) else {
        return Ok(false);
    };
    // It may have grown since the plan; and what does not fit would be waited for by nobody.
    let wanted = (capacity as usize).max(bytes.len());
    if fcntl_getpipe_size(writing)? != wanted {
        resize(writing, wanted)?;
    }
    if !bytes.is_empty() && common.filled.insert(number) {
        std::fs::File::from(writing.try_clone()?).write_all(bytes)?;
    }
    Ok(true)
}
