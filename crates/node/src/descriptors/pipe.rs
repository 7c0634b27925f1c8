//! Pipes whose ends all move together.
//!
//! Their bytes travel inside the freeze, with the description of a reading end, and are copied without being taken out.

use super::{Found, Look, Refusal};
use crate::restore::Common;
use dunlin_proto::image::DescriptionKind;
use dunlin_sys::foothold::take_descriptor;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, tee};
use std::collections::btree_map::Entry;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

const O_ACCMODE: u32 = 0o3;
const LIMIT: &str = "/proc/sys/fs/pipe-max-size";
/// No pipe is made larger than this by us, in bytes.
pub(crate) const MOST: u64 = 16 << 20;

/// What a pipe's end is, or why it cannot move. Its bytes are not read yet.
pub(crate) fn look(look: &Look<'_>) -> Found {
    let inode = std::fs::metadata(look.link()?)?.ino();
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
        capacity: fcntl_getpipe_size(look.handle()?)? as u32,
        bytes: Vec::new(),
    }))
}

/// Why it cannot move: a process that stays has the pipe, too.
pub(crate) fn shared(look: &Look<'_>) -> io::Result<Option<Refusal>> {
    let inode = std::fs::metadata(look.link()?)?.ino();
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
/// all (`/proc/sys/fs/pipe-max-size`) for a moment, one after the other on one machine.
pub(crate) fn resize(pipe: &OwnedFd, size: usize) -> io::Result<usize> {
    match fcntl_setpipe_size(pipe, size) {
        Err(rustix::io::Errno::PERM) if size as u64 <= MOST => {}
        answer => return Ok(answer?),
    }
    let _turn = Turn::wait()?;
    let before = std::fs::read_to_string(LIMIT)?;
    std::fs::write(LIMIT, MOST.to_string())?;
    let answer = fcntl_setpipe_size(pipe, size);
    if let Err(error) = std::fs::write(LIMIT, before.trim()) {
        tracing::warn!(%error, "{LIMIT} stays at {MOST}");
    }
    Ok(answer?)
}

/// The right to change the limit: a machine can have several daemons (those of a lab), and one that puts back what another
/// one has raised would leave that one without, or the limit raised for good.
struct Turn {
    _lock: std::fs::File,
    _thread: MutexGuard<'static, ()>,
}

impl Turn {
    fn wait() -> io::Result<Turn> {
        const LOCK: &str = "/run/dunlin-pipe-max-size.lock";
        static ONE: Mutex<()> = Mutex::new(());
        let thread = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut how = std::fs::File::options();
        let lock = how.create(true).truncate(false).write(true).open(LOCK)?;
        flock(&lock, FlockOperation::LockExclusive)?;
        Ok(Turn {
            _lock: lock,
            _thread: thread,
        })
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const ROLE: &str = "DUNLIN_TEST_RESIZES_PIPES";

    /// Each daemon of a lab is a process of its own.
    #[test]
    fn a_pipe_is_made_larger_beside_others_that_are() {
        if std::env::var_os(ROLE).is_some() {
            for _ in 0..300 {
                let (_reading, writing) = pipe_with(PipeFlags::CLOEXEC).unwrap();
                assert_eq!(resize(&writing, 2 << 20).unwrap(), 2 << 20);
            }
            return;
        }
        // As it is by default; on a machine where it was raised nobody has to wait for anybody.
        let _raised = Lowered::to("1048576\n");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([
            "--exact",
            "descriptors::pipe::tests::a_pipe_is_made_larger_beside_others_that_are",
        ]);
        command.env(ROLE, "1");
        let others = [(); 4].map(|()| command.spawn().unwrap());
        for mut other in others {
            assert!(other.wait().unwrap().success());
        }
        assert_eq!(std::fs::read_to_string(LIMIT).unwrap(), "1048576\n");
    }

    /// The limit, for the time of a test.
    struct Lowered(String);

    impl Lowered {
        fn to(limit: &str) -> Lowered {
            let _turn = Turn::wait().unwrap();
            let before = std::fs::read_to_string(LIMIT).unwrap();
            std::fs::write(LIMIT, limit).unwrap();
            Lowered(before)
        }
    }

    impl Drop for Lowered {
        fn drop(&mut self) {
            let _ = std::fs::write(LIMIT, &self.0);
        }
    }
}
