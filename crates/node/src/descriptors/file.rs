//! Files: regular ones with and without a name, directories, devices that are the same everywhere, files of the kernel's
//! own, and paths that are open as such.

use super::{Found, Look, Refusal, pipe};
use crate::files::{FileError, Use, contents, file_ref, open_same, proc_fd};
use crate::obstacle::obstacle;
use crate::restore::Kit;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{DescriptionKind, FileRef};
use rustix::fs::{Mode, OFlags, ResolveFlags, SeekFrom, openat2, seek};
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const O_APPEND: u32 = 0o2000;
const O_PATH: u32 = 0o10_000_000;
const O_ACCMODE: u32 = 0o3;
const S_IFMT: u32 = 0o170_000;
/// A deleted file travels whole, before and inside the freeze; a larger one is refused.
pub(crate) const MAX_DELETED_BYTES: u64 = 256 << 20;

/// What has a file system's inode.
pub(crate) fn look(look: &Look<'_>) -> Found {
    let (link, target, flags) = (look.link()?, look.target(), look.glimpse.info.flags);
    let file = file_ref(&link)?;
    if flags & O_PATH != 0 {
        if target.starts_with(b"/") && !target.ends_with(b" (deleted)") {
            return Ok(Ok(DescriptionKind::Path(file)));
        }
        return look.refuse(
            "it is open as a path only (O_PATH), and the path is gone",
            "close it before the move",
        );
    }
    let identify = || -> io::Result<Option<DescriptionKind>> {
        Ok((look.around.identify)(look.handle()?).map(|(run, stream)| DescriptionKind::Stream { run, stream }))
    };
    match file.mode & S_IFMT {
        0o040_000 => Ok(Ok(DescriptionKind::Directory(file))),
        0o100_000 if target.ends_with(b" (deleted)") => nameless(look, &file),
        0o100_000 if is_of_kernel(&link)? => Ok(Ok(DescriptionKind::Kernel(file))),
        0o100_000 => {
            let writes = flags & O_ACCMODE != 0;
            let offset_matters = flags & O_APPEND == 0;
            if writes && offset_matters && look.around.shared_outside(look.host, &link)? {
                return look.refuse(
                    "a process that stays here writes through the same open file description",
                    "move the tree (--tree), or open the file with O_APPEND",
                );
            }
            Ok(Ok(DescriptionKind::File(file)))
        }
        0o020_000 => match target {
            b"/dev/null" | b"/dev/zero" | b"/dev/full" | b"/dev/random" | b"/dev/urandom" => {
                Ok(Ok(DescriptionKind::Device(file)))
            }
            _ => match identify()? {
                Some(kind) => Ok(Ok(kind)),
                None => look.refuse(
                    "a device or a foreign terminal cannot be moved",
                    "start the program with `dunlin run`",
                ),
            },
        },
        0o010_000 => match identify()? {
            Some(kind) => Ok(Ok(kind)),
            None => pipe::look(look),
        },
        _ => look.refuse("a descriptor of this kind cannot be moved", "close it before the move"),
    }
}

fn nameless(look: &Look<'_>, file: &FileRef) -> Found {
    let target = look.target();
    if file.size > MAX_DELETED_BYTES {
        return look.refuse(
            "it has no name and is too large to travel (256 MiB)",
            "close it before the move",
        );
    }
    if look.around.shared_outside(look.host, &look.link()?)? {
        return look.refuse(
            "it has no name and another process has it open",
            "move the tree, or close it",
        );
    }
    // Its bytes are read when everything else is known to be fine, and again in the freeze.
    Ok(Ok(DescriptionKind::Deleted {
        path: target[..target.len() - b" (deleted)".len()].to_vec(),
        mode: file.mode & 0o7777,
        bytes: contents(&look.link()?, MAX_DELETED_BYTES)?,
    }))
}

/// Whether a file is one of /proc or /sys: its bytes are made when it is read, and its times say nothing.
pub(crate) fn is_of_kernel(link: &Path) -> io::Result<bool> {
    const PROC_SUPER_MAGIC: i64 = 0x9fa0;
    const SYSFS_MAGIC: i64 = 0x6265_6572;
    Ok(matches!(
        rustix::fs::statfs(link)?.f_type,
        PROC_SUPER_MAGIC | SYSFS_MAGIC
    ))
}

/// The obstacle that a file which is not here is.
pub(crate) fn missing(pid: Pid, file: &FileRef, error: &FileError) -> Obstacle {
    obstacle(
        pid,
        "file",
        String::from_utf8_lossy(&file.path),
        format!("it {error}"),
        error.hint(),
    )
}

/// Opens a regular file with a name.
pub(crate) fn open(pid: Pid, file: &FileRef, flags: OFlags, kit: &Kit<'_>) -> Result<OwnedFd, Refusal> {
    let how = if flags.bits() & O_ACCMODE == 0 {
        Use::Content
    } else {
        Use::Identity
    };
    open_same(kit.root.as_fd(), file, flags, how, kit.shared).map_err(|e| Box::new(missing(pid, file, &e)))
}

/// Opens what is found by its path alone.
pub(crate) fn open_path(pid: Pid, file: &FileRef, flags: OFlags, kit: &Kit<'_>) -> Result<OwnedFd, Refusal> {
    openat2(
        kit.root.as_fd(),
        relative(&file.path),
        flags | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT,
    )
    .map_err(|error| Box::new(missing(pid, file, &FileError::Open(error.into()))))
}

/// A path from the nest's root.
pub(crate) fn relative(path: &[u8]) -> &Path {
    let path = Path::new(OsStr::from_bytes(path));
    let path = path.strip_prefix("/").unwrap_or(path);
    if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    }
}

/// Makes a file without a name.
pub(crate) fn make_nameless(kit: &Kit<'_>, path: &[u8], mode: u32, bytes: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let directory = Path::new(OsStr::from_bytes(path)).parent().unwrap_or(Path::new("/"));
    let mode = Mode::from_raw_mode(mode);
    let make = |directory: &Path| {
        let how = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        openat2(
            kit.root.as_fd(),
            relative(directory.as_os_str().as_bytes()),
            how,
            mode,
            ResolveFlags::IN_ROOT,
        )
    };
    // Its directory may be gone, or on a file system without nameless files.
    let file = make(directory)
        .or_else(|_| make(Path::new("/tmp")))
        .or_else(|_| make(Path::new("/dev/shm")))?;
    let mut file = std::fs::File::from(file);
    file.write_all(bytes)?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode.as_raw_mode()))?;
    let file = OwnedFd::from(file);
    let again = flags - (OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC | OFlags::TMPFILE | OFlags::NOFOLLOW);
    Ok(rustix::fs::open(
        proc_fd(&file),
        again | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Puts the offset of a file where it was.
pub(crate) fn place(fd: &OwnedFd, is_directory: bool, position: u64) -> io::Result<()> {
    // A description of an ext4 directory that was set to the end before its first reading finds nothing ever after, not
    // even when it is set back to the start.
    if is_directory && position != 0 {
        let mut entries = [std::mem::MaybeUninit::uninit(); 512];
        let _ = rustix::fs::RawDir::new(fd, &mut entries).next();
    }
    seek(fd, SeekFrom::Start(position))?;
    Ok(())
}
