//! The descriptors of a blank.
//!
//! Owns the table of a blank, and which open file descriptions the processes of one move share; how each kind is made is
//! in [`crate::descriptors`]. Refuses to guess: a file that is not the same is an obstacle. Invariants: a description is
//! made once in a move, and changed once in its freeze, whoever of the processes has it; what has not changed since the
//! plan is not touched.

use super::blank::install;
use super::{Blank, Common, During, Kit, RestoreError};
use crate::descriptors::{Refusal, epoll, event, file, memory, owner, pipe, process, signals, timer, unix};
use crate::files::FileError;
use crate::install::Wanted;
use crate::obstacle::obstacle;
use dunlin_proto::image::{Description, DescriptionKind, Files};
use dunlin_sys::script::Script;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

const SYS_CLOSE: i64 = 3;
const SYS_IOCTL: i64 = 16;
const TIOCSCTTY: u64 = 0x540e;
const O_LARGEFILE: u32 = 0o100_000;

/// What is installed in a blank, by number: the description's key, its making, close-on-exec.
pub type Installed = BTreeMap<i32, (u64, u64, bool)>;

/// Fills the empty table of a blank.
pub fn install_all(blank: &mut Blank, files: &Files, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    make_missing(blank, files, kit)?;
    install_changed(blank, files, kit)?;
    take_terminal(blank, files)
}

/// Makes the table what it is inside the freeze.
pub fn correct(blank: &mut Blank, files: &Files, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    let pid = blank.pid;
    if !files.is_sound() {
        return Err(RestoreError::Unsound {
            pid,
            why: "a descriptor of a description that is not listed",
        });
    }
    let old = std::mem::take(&mut blank.image.files);
    for description in &files.descriptions {
        let before = old.descriptions.iter().find(|d| d.key == description.key);
        let Some(before) = before.filter(|before| *before != description) else {
            continue;
        };
        // Others that share it have the same to say.
        // Several descriptions may be of one memory: it is made anew with all of them.
        if let DescriptionKind::Memory { inode, .. } = &description.kind
            && kit.common.remade.insert(*inode)
        {
            kit.common.memories.remove(inode);
        }
        if kit.common.corrected.insert(description.key) && !change(blank, before, description, kit)? {
            kit.common.forget(description.key);
        }
    }
    blank.image.files = files.clone();
    make_missing(blank, files, kit)?;
    install_changed(blank, files, kit)
}

/// What can be done only when all processes of a move have their descriptors.
pub fn connect(blanks: &[Blank], kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    epoll::connect(blanks, false, kit)
}

/// The same inside the freeze, when all that travels is there. What was made and is needed no more goes: an end that the
/// program has closed meanwhile must be closed when it runs on.
pub fn connect_at_last(blanks: &[Blank], kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    let all = blanks.iter().flat_map(|blank| &blank.files().descriptions);
    let listed: BTreeSet<u64> = all.map(|description| description.key).collect();
    kit.common.descriptions.retain(|key, _| listed.contains(key));
    kit.common.made.retain(|key, _| listed.contains(key));
    unix::fill(blanks, kit)?;
    epoll::connect(blanks, true, kit)?;
    owner::set(blanks)?;
    // Mappings are corrected after this.
    let shared = std::mem::take(&mut kit.common.shared);
    kit.common = Common {
        shared,
        ..Common::default()
    };
    Ok(())
}

fn make_missing(blank: &Blank, files: &Files, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    let mut obstacles = Vec::new();
    for description in &files.descriptions {
        if kit.common.descriptions.contains_key(&description.key) || is_path(description) {
            continue;
        }
        match make(blank, description, kit)? {
            Ok(fd) => kit.common.keep(description.key, fd),
            Err(obstacle) => obstacles.push(*obstacle),
        }
    }
    if obstacles.is_empty() {
        Ok(())
    } else {
        Err(RestoreError::Obstacles(obstacles))
    }
}

/// Puts into the table what is not in it as it should be.
fn install_changed(blank: &mut Blank, files: &Files, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    let pid = blank.pid;
    let mut wanted = Vec::new();
    let mut installed = Installed::new();
    let mut paths = Vec::new();
    for descriptor in &files.table {
        let description = &files.descriptions[descriptor.description as usize];
        let key = description.key;
        let made = match is_path(description) {
            // The process opens it itself: whenever its number is not as it was.
            true => 0,
            false => kit.common.made.get(&key).copied().ok_or(RestoreError::Unsound {
                pid,
                why: "a descriptor of nothing",
            })?,
        };
        let entry = (key, made, descriptor.close_on_exec);
        installed.insert(descriptor.number, entry);
        if blank.installed.get(&descriptor.number) == Some(&entry) {
            continue;
        }
        if is_path(description) {
            paths.push(descriptor.description as usize);
            continue;
        }
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
    let mut script = Script::new(&blank.foothold.arena);
    for number in blank.installed.keys().filter(|number| !installed.contains_key(number)) {
        script.attempt("close", SYS_CLOSE, &[*number as u64]);
    }
    blank.run(blank.host, script, "closing descriptors")?;
    install(pid, pid, blank.leader(), blank.foothold.syscall_at, wanted, kit)?;
    blank.installed = installed;
    paths.dedup();
    paths
        .into_iter()
        .try_for_each(|index| open_path(blank, files, index, kit))
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

/// A path that is open as such: the kernel does not let it be installed (SECCOMP_IOCTL_NOTIF_ADDFD takes no O_PATH
/// descriptor), so the process opens it itself.
fn open_path(blank: &Blank, files: &Files, index: usize, kit: &Kit<'_>) -> Result<(), RestoreError> {
    const SYS_OPENAT: i64 = 257;
    const SYS_DUP3: i64 = 292;
    const AT_FDCWD: u64 = -100i64 as u64;
    const S_IFMT: u32 = 0o170_000;
    let description = &files.descriptions[index];
    let DescriptionKind::Path(file) = &description.kind else {
        return Ok(());
    };
    let (pid, close_on_exec) = (blank.pid, OFlags::CLOEXEC.bits());
    let above = files.table.iter().map(|d| d.number + 1).max().unwrap_or(0) as u64;
    let flags = OFlags::from_bits_retain(description.flags);
    let looked = openat2(
        kit.root.as_fd(),
        file::relative(&file.path),
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
        return Err(RestoreError::Obstacles(vec![file::missing(pid, file, &error)]));
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
    blank.run(blank.host, script, "opening a path")
}

/// Changes a description that is there into what it is now; `false`: it must be made anew.
fn change(blank: &Blank, before: &Description, now: &Description, kit: &mut Kit<'_>) -> Result<bool, RestoreError> {
    /// What fcntl(2) can change.
    const SETTABLE: u32 = 0o2000 | 0o4000 | 0o40_000 | 0o1_000_000 | 0o20_000;
    let pid = blank.pid;
    if (before.flags ^ now.flags) & !(SETTABLE | O_LARGEFILE) != 0 {
        return Ok(false);
    }
    let Some(fd) = kit.common.descriptions.get(&now.key) else {
        return Ok(false);
    };
    if before.flags != now.flags {
        rustix::fs::fcntl_setfl(fd, OFlags::from_bits_retain(now.flags & SETTABLE)).during(pid, "setting flags")?;
    }
    let changed = match (&before.kind, &now.kind) {
        // A file that is being written changes its size and time all the while.
        (DescriptionKind::File(a), DescriptionKind::File(b))
        | (DescriptionKind::Directory(a), DescriptionKind::Directory(b)) => a.path == b.path && a.inode == b.inode,
        // The inodes of /proc are made and forgotten as it pleases the kernel.
        (DescriptionKind::Kernel(a), DescriptionKind::Kernel(b)) => a.path == b.path,
        (
            DescriptionKind::Event { count, semaphore },
            DescriptionKind::Event {
                count: now,
                semaphore: same,
            },
        ) if semaphore == same => event::change(fd, *count, *now)
            .map(|()| true)
            .during(pid, "setting an eventfd")?,
        (DescriptionKind::Signals(_), DescriptionKind::Signals(mask)) => signals::change(fd, *mask)
            .map(|()| true)
            .during(pid, "setting a signalfd")?,
        (DescriptionKind::Timer(before), DescriptionKind::Timer(now)) if before.clock == now.clock => {
            timer::set(fd, now, blank.host)
                .map(|()| true)
                .during(pid, "setting a timer")?
        }
        (DescriptionKind::Epoll { .. }, DescriptionKind::Epoll { .. }) => true,
        // Whatever it is now, it was made so.
        (DescriptionKind::Socket(_), DescriptionKind::Socket(_)) => true,
        (DescriptionKind::Unix(before), DescriptionKind::Unix(now)) => {
            unix::change(fd, before, now).during(pid, "setting a unix socket")?
        }
        (
            DescriptionKind::Pipe { pipe, write, .. },
            DescriptionKind::Pipe {
                pipe: same,
                write: end,
                capacity,
                bytes,
            },
        ) if pipe == same && write == end => {
            pipe::fill(&mut kit.common, *same, *capacity, bytes).during(pid, "filling a pipe")?
        }
        (a, b) => a == b,
    };
    if changed && let Some(fd) = kit.common.descriptions.get(&now.key) {
        place(fd, now).during(pid, "setting offsets")?;
    }
    Ok(changed)
}

fn make(blank: &Blank, description: &Description, kit: &mut Kit<'_>) -> Result<Result<OwnedFd, Refusal>, RestoreError> {
    let pid = blank.pid;
    let flags = OFlags::from_bits_retain(description.flags & !O_LARGEFILE);
    let fd = match &description.kind {
        DescriptionKind::File(file) => file::open(pid, file, flags, kit),
        DescriptionKind::Path(_) => {
            return Err(RestoreError::Unsound {
                pid,
                why: "a path is opened by the process itself",
            });
        }
        DescriptionKind::Socket(_) => {
            return Err(RestoreError::Unsound {
                pid,
                why: "a socket is made once for a whole move",
            });
        }
        DescriptionKind::Directory(file) | DescriptionKind::Device(file) | DescriptionKind::Kernel(file) => {
            file::open_path(pid, file, flags, kit)
        }
        DescriptionKind::Deleted { path, mode, bytes } => {
            Ok(file::make_nameless(kit, path, *mode, bytes, flags).during(pid, "making a file without a name")?)
        }
        DescriptionKind::Stream { run, stream } => (kit.open_stream)(*run, *stream).map_err(|error| {
            Box::new(obstacle(
                pid,
                "descriptor",
                format_args!("standard stream {stream}"),
                format!("its origin cannot be reached: {error}"),
                "see `dunlin lab status` or the peers of `dunlin doctor`",
            ))
        }),
        DescriptionKind::Pipe {
            pipe,
            write,
            capacity,
            bytes,
        } => Ok(pipe::make(&mut kit.common, *pipe, *write, *capacity, bytes, flags).during(pid, "making a pipe")?),
        DescriptionKind::Event { count, semaphore } => {
            Ok(event::make(*count, *semaphore, flags).during(pid, "making an eventfd")?)
        }
        DescriptionKind::Epoll { .. } => Ok(epoll::make().during(pid, "making an epoll set")?),
        DescriptionKind::Timer(timer) => Ok(timer::make(timer, blank.host, flags).during(pid, "making a timer")?),
        DescriptionKind::Signals(mask) => Ok(signals::make(*mask, flags).during(pid, "making a signalfd")?),
        DescriptionKind::Memory {
            inode,
            name,
            mode,
            seals,
            bytes,
        } => Ok(
            memory::make(&mut kit.common, *inode, name, (*mode, *seals), bytes, flags).during(pid, "making a memfd")?,
        ),
        DescriptionKind::Process(process) => Ok(process::make(blank, *process, flags, kit)?),
        DescriptionKind::Unix(socket) => Ok(unix::make(blank, socket, flags, kit)?),
    };
    if let Ok(fd) = &fd {
        place(fd, description).during(pid, "setting offsets")?;
    }
    Ok(fd)
}

/// Puts the offset where it was, for what has one.
fn place(fd: &OwnedFd, description: &Description) -> io::Result<()> {
    match description.kind {
        DescriptionKind::File(_)
        | DescriptionKind::Kernel(_)
        | DescriptionKind::Deleted { .. }
        | DescriptionKind::Memory { .. } => file::place(fd, false, description.position),
        DescriptionKind::Directory(_) => file::place(fd, true, description.position),
        DescriptionKind::Device(_)
        | DescriptionKind::Path(_)
        | DescriptionKind::Stream { .. }
        | DescriptionKind::Pipe { .. }
        | DescriptionKind::Event { .. }
        | DescriptionKind::Epoll { .. }
        | DescriptionKind::Timer(_)
        | DescriptionKind::Signals(_)
        | DescriptionKind::Unix(_)
        | DescriptionKind::Socket(_)
        | DescriptionKind::Process(_) => Ok(()),
    }
}

impl Common {
    /// A description that is there from now on.
    pub(crate) fn keep(&mut self, key: u64, fd: OwnedFd) {
        self.makings += 1;
        self.made.insert(key, self.makings);
        self.descriptions.insert(key, fd);
    }

    /// It is to be made anew.
    pub(crate) fn forget(&mut self, key: u64) {
        self.made.remove(&key);
        self.descriptions.remove(&key);
    }
}
