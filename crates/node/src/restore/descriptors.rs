//! The descriptors of a blank.
//!
//! Owns how each kind of open file description is made again. Refuses to guess: a file that is not the same is an
//! obstacle.

use super::blank::install;
use super::{Blank, During, Kit, RestoreError};
use crate::files::{FileError, Use, open_same, proc_fd};
use crate::install::Wanted;
use crate::obstacle::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{Description, DescriptionKind, FileRef, Files};
use dunlin_sys::script::Script;
use rustix::fs::{Mode, OFlags, ResolveFlags, SeekFrom, openat2, seek};
use std::collections::btree_map::Entry;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const SYS_IOCTL: i64 = 16;
const SYS_CLOSE_RANGE: i64 = 436;
const TIOCSCTTY: u64 = 0x540e;
const O_ACCMODE: u32 = 3;

/// The obstacle that a file which is not here is.
pub fn missing(pid: Pid, file: &FileRef, error: &FileError) -> Obstacle {
    obstacle(
        pid,
        "file",
        String::from_utf8_lossy(&file.path),
        format!("it {error}"),
        error.hint(),
    )
}

/// Fills the empty table of a blank.
pub fn install_all(blank: &Blank, files: &Files, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    let pid = blank.pid;
    let mut obstacles = Vec::new();
    for description in &files.descriptions {
        if kit.common.descriptions.contains_key(&description.key) || is_path(description) {
            continue;
        }
        match make(pid, description, kit)? {
            Ok(fd) => {
                kit.common.descriptions.insert(description.key, fd);
            }
            Err(obstacle) => obstacles.push(*obstacle),
        }
    }
    if !obstacles.is_empty() {
        return Err(RestoreError::Obstacles(obstacles));
    }
    let mut wanted = Vec::with_capacity(files.table.len());
    for descriptor in &files.table {
        let description = &files.descriptions[descriptor.description as usize];
        if is_path(description) {
            continue;
        }
        let key = description.key;
        let fd = kit.common.descriptions.get(&key).map(OwnedFd::try_clone);
        let fd = fd
            .ok_or(RestoreError::Unsound {
                pid,
                why: "a descriptor of nothing",
            })?
            .during(pid, "dup")?;
        wanted.push(Wanted {
            fd,
            number: descriptor.number,
            close_on_exec: descriptor.close_on_exec,
        });
    }
    install(pid, pid, blank.leader(), blank.foothold.syscall_at, wanted, kit)?;
    take_terminal(blank, files)?;
    open_paths(blank, files, kit)
}

/// The leader of a session that has the terminal of its run takes it as the controlling one: its keys make signals here.
/// It may have it already, at home; and a terminal that another session has stays that session's.
fn take_terminal(blank: &Blank, files: &Files) -> Result<(), RestoreError> {
    const TERMINAL: u8 = 3;
    let of_run = |kind: &DescriptionKind| matches!(kind, DescriptionKind::Stream { stream: TERMINAL, .. });
    let mut table = files.table.iter();
    let terminal = table.find(|d| of_run(&files.descriptions[d.description as usize].kind));
    let Some(terminal) = terminal.filter(|_| blank.image.lineage.sid == blank.pid) else {
        return Ok(());
    };
    let mut script = Script::new(&blank.foothold.arena);
    script.attempt("ioctl(TIOCSCTTY)", SYS_IOCTL, &[terminal.number as u64, TIOCSCTTY, 0]);
    blank.run(blank.host, script, "taking the terminal")
}

fn is_path(description: &Description) -> bool {
    matches!(description.kind, DescriptionKind::Path(_))
}

/// Paths that are open as such: the kernel does not let them be installed (SECCOMP_IOCTL_NOTIF_ADDFD takes no O_PATH
/// descriptor), so the process opens them itself.
fn open_paths(blank: &Blank, files: &Files, kit: &Kit<'_>) -> Result<(), RestoreError> {
    const SYS_CLOSE: i64 = 3;
    const SYS_OPENAT: i64 = 257;
    const SYS_DUP3: i64 = 292;
    const AT_FDCWD: u64 = -100i64 as u64;
    const S_IFMT: u32 = 0o170_000;
    let (pid, close_on_exec) = (blank.pid, OFlags::CLOEXEC.bits());
    let above = files.table.iter().map(|d| d.number + 1).max().unwrap_or(0) as u64;
    for (index, description) in files.descriptions.iter().enumerate() {
        let DescriptionKind::Path(file) = &description.kind else {
            continue;
        };
        let flags = OFlags::from_bits_retain(description.flags);
        let looked = openat2(
            kit.root.as_fd(),
            relative(&file.path),
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT,
        );
        let refusal = match looked.and_then(rustix::fs::fstat) {
            Ok(stat) if stat.st_mode & S_IFMT == file.mode & S_IFMT => None,
            Ok(_) => Some(FileError::Differs("its type")),
            Err(error) => Some(FileError::Open(error.into())),
        };
        if let Some(error) = refusal {
            return Err(RestoreError::Obstacles(vec![missing(pid, file, &error)]));
        }
        let mut script = Script::new(&blank.foothold.arena);
        let path = script.text(&file.path);
        let flags = u64::from(description.flags | close_on_exec);
        let opened = script.call("openat", SYS_OPENAT, &[AT_FDCWD, path.address, flags]);
        let (_, answers) = script.run(blank.leader()).during(pid, "opening a path")?;
        let opened = answers.of(opened) as u64;
        let mut script = Script::new(&blank.foothold.arena);
        // Out of the way first: its number may be one that is wanted.
        if opened != above {
            script.call("dup3", SYS_DUP3, &[opened, above, u64::from(close_on_exec)]);
            script.call("close", SYS_CLOSE, &[opened]);
        }
        for descriptor in files.table.iter().filter(|d| d.description as usize == index) {
            let flags = if descriptor.close_on_exec { close_on_exec } else { 0 };
            script.call("dup3", SYS_DUP3, &[above, descriptor.number as u64, u64::from(flags)]);
        }
        script.call("close", SYS_CLOSE, &[above]);
        blank.run(blank.host, script, "opening a path")?;
    }
    Ok(())
}

/// Makes the table what it is inside the freeze.
pub fn correct(blank: &mut Blank, files: &Files, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    let pid = blank.pid;
    if files
        .table
        .iter()
        .any(|d| d.number < 0 || d.description as usize >= files.descriptions.len())
    {
        return Err(RestoreError::Unsound {
            pid,
            why: "a descriptor of a description that is not listed",
        });
    }
    let old = std::mem::take(&mut blank.image.files);
    let mut remake = old.table != files.table || old.descriptions.len() != files.descriptions.len();
    for description in &files.descriptions {
        let before = old.descriptions.iter().find(|d| d.key == description.key);
        match before {
            Some(before) if same_but_offset(before, description) => {
                if before.position != description.position
                    && let Some(fd) = kit.common.descriptions.get(&description.key)
                {
                    place(fd, description).during(pid, "setting offsets")?;
                }
            }
            Some(_) => {
                kit.common.descriptions.remove(&description.key);
                remake = true;
            }
            None => remake = true,
        }
    }
    blank.image.files = files.clone();
    if !remake {
        return Ok(());
    }
    let mut script = Script::new(&blank.foothold.arena);
    script.call("close_range", SYS_CLOSE_RANGE, &[0, u64::from(u32::MAX), 0]);
    blank.run(blank.host, script, "closing descriptors")?;
    install_all(blank, files, kit)
}

fn same_but_offset(a: &Description, b: &Description) -> bool {
    let kinds = match (&a.kind, &b.kind) {
        // A file that is being written changes its size and time all the while.
        (DescriptionKind::File(a), DescriptionKind::File(b)) => a.path == b.path && a.inode == b.inode,
        (DescriptionKind::Directory(a), DescriptionKind::Directory(b)) => a.path == b.path && a.inode == b.inode,
        // The inodes of /proc are made and forgotten as it pleases the kernel.
        (DescriptionKind::Kernel(a), DescriptionKind::Kernel(b)) => a.path == b.path,
        (DescriptionKind::Path(a), DescriptionKind::Path(b)) => a.path == b.path && a.inode == b.inode,
        (a, b) => a == b,
    };
    kinds && a.flags == b.flags
}

type Refusal = Box<Obstacle>;

fn make(pid: Pid, description: &Description, kit: &mut Kit<'_>) -> Result<Result<OwnedFd, Refusal>, RestoreError> {
    let flags = OFlags::from_bits_retain(description.flags & !0o100_000);
    let open = |file: &FileRef, how: Use, kit: &Kit<'_>| {
        open_same(kit.root.as_fd(), file, flags, how, kit.shared).map_err(|e| Box::new(missing(pid, file, &e)))
    };
    let fd = match &description.kind {
        DescriptionKind::File(file) => {
            let how = if description.flags & O_ACCMODE == 0 {
                Use::Content
            } else {
                Use::Identity
            };
            open(file, how, kit)
        }
        DescriptionKind::Path(_) => {
            return Err(RestoreError::Unsound {
                pid,
                why: "a path is opened by the process itself",
            });
        }
        DescriptionKind::Directory(file) | DescriptionKind::Device(file) | DescriptionKind::Kernel(file) => {
            match openat2(
                kit.root.as_fd(),
                relative(&file.path),
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT,
            ) {
                Ok(fd) => Ok(fd),
                Err(error) => Err(Box::new(missing(pid, file, &FileError::Open(error.into())))),
            }
        }
        DescriptionKind::Deleted { path, mode, bytes } => {
            let fd = nameless(kit, path, *mode, bytes, flags).during(pid, "making a file without a name")?;
            Ok(fd)
        }
        DescriptionKind::Stream { run, stream } => match (kit.open_stream)(*run, *stream) {
            Ok(fd) => Ok(fd),
            Err(error) => Err(Box::new(obstacle(
                pid,
                "descriptor",
                format_args!("standard stream {stream}"),
                format!("its origin cannot be reached: {error}"),
                "see `dunlin lab status` or the peers of `dunlin doctor`",
            ))),
        },
        DescriptionKind::Pipe {
            pipe,
            write,
            capacity,
            bytes,
        } => Ok(pipe_end(kit, *pipe, *write, *capacity, bytes, flags).during(pid, "making a pipe")?),
        DescriptionKind::Event { count, semaphore } => {
            use rustix::event::{EventfdFlags, eventfd};
            let mut how = EventfdFlags::CLOEXEC;
            how.set(EventfdFlags::SEMAPHORE, *semaphore);
            how.set(EventfdFlags::NONBLOCK, flags.contains(OFlags::NONBLOCK));
            let fd = eventfd(0, how).during(pid, "making an eventfd")?;
            if *count > 0 {
                rustix::io::write(&fd, &count.to_le_bytes()).during(pid, "filling an eventfd")?;
            }
            Ok(fd)
        }
    };
    if let Ok(fd) = &fd {
        place(fd, description).during(pid, "setting offsets")?;
    }
    Ok(fd)
}

fn relative(path: &[u8]) -> &Path {
    let path = Path::new(OsStr::from_bytes(path));
    let path = path.strip_prefix("/").unwrap_or(path);
    if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    }
}

/// Puts the offset where it was, for what has one.
fn place(fd: &OwnedFd, description: &Description) -> io::Result<()> {
    match description.kind {
        DescriptionKind::File(_)
        | DescriptionKind::Directory(_)
        | DescriptionKind::Kernel(_)
        | DescriptionKind::Deleted { .. } => {
            // A description of an ext4 directory that was set to the end before its first reading finds nothing ever
            // after, not even when it is set back to the start.
            if matches!(description.kind, DescriptionKind::Directory(_)) && description.position != 0 {
                let mut entries = [std::mem::MaybeUninit::uninit(); 512];
                let _ = rustix::fs::RawDir::new(fd, &mut entries).next();
            }
            seek(fd, SeekFrom::Start(description.position))?;
            Ok(())
        }
        DescriptionKind::Device(_)
        | DescriptionKind::Path(_)
        | DescriptionKind::Stream { .. }
        | DescriptionKind::Pipe { .. }
        | DescriptionKind::Event { .. } => Ok(()),
    }
}

fn nameless(kit: &Kit<'_>, path: &[u8], mode: u32, bytes: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
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

fn pipe_end(
    kit: &mut Kit<'_>,
    number: u64,
    write: bool,
    capacity: u32,
    bytes: &[u8],
    flags: OFlags,
) -> io::Result<OwnedFd> {
    use rustix::pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with};
    let (reading, writing) = match kit.common.pipes.entry(number) {
        Entry::Occupied(made) => made.into_mut(),
        Entry::Vacant(place) => {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            fcntl_setpipe_size(&write, capacity as usize)?;
            place.insert((read, write))
        }
    };
    // It may have grown since the plan; and what does not fit would be waited for by nobody.
    let wanted = (capacity as usize).max(bytes.len());
    if fcntl_getpipe_size(&*writing)? < wanted {
        fcntl_setpipe_size(&*writing, wanted)?;
    }
    if !bytes.is_empty() && kit.common.filled.insert(number) {
        let mut writing = std::fs::File::from(writing.try_clone()?);
        writing.write_all(bytes)?;
    }
    // A second description of the same end: the flags of one must not show in the other.
    let end = if write { writing } else { reading };
    let access = if write { OFlags::WRONLY } else { OFlags::RDONLY };
    Ok(rustix::fs::open(
        proc_fd(end),
        access | OFlags::CLOEXEC | (flags & OFlags::NONBLOCK),
        Mode::empty(),
    )?)
}
