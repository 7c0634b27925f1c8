//! A foothold: the loop and its arena, mapped into a stopped target.
//!
//! Owns how the first instructions of ours get into a program without touching any byte of its own: the `syscall`
//! instruction that the vDSO holds is used for a few injected calls. Refuses to know what scripts will do. Invariants: no
//! text is poked (it would make a private page of a file mapping); the descriptor the target needs for a moment is
//! closed again; planting that fails leaves nothing behind but, at worst, an unused mapping.

use crate::procfs::{ProcDir, maps};
use crate::ptrace::{Stopped, TraceError};
use crate::script::{ARENA_BYTES, Arena, PAGE};
use crate::{Errno, inspect};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How long a script may take to move the vDSO.
const MOVES_WITHIN: Duration = Duration::from_millis(200);

/// Why no foothold could be had. The target is as before.
#[derive(Debug, thiserror::Error)]
pub enum FootholdError {
    /// The thread could not be traced.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// /proc or a descriptor could not be read.
    #[error("{what}: {source}")]
    Io {
        /// What was read.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The program has no vDSO, and so no instruction to borrow.
    #[error("the program has no vDSO to borrow a syscall instruction from")]
    NoVdso,
    /// There is no room for the arena.
    #[error("the address space has no free {} MiB", ARENA_BYTES >> 20)]
    NoRoom,
    /// The target may not do what every program may: its own limits or filters forbid it.
    #[error("{call} in the target: {errno}")]
    Forbidden {
        /// The system call.
        call: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// The loop, planted in one target.
#[derive(Debug)]
pub struct Foothold {
    /// Memory shared with it.
    pub arena: Arena,
    /// A `syscall` instruction in it that is not ours.
    pub syscall_at: u64,
}

impl Foothold {
    /// Plants a foothold through a stopped thread whose signals are all blocked, where neither the target nor `avoid`
    /// has anything.
    pub fn plant(thread: Stopped, process: i32, avoid: &[(u64, u64)]) -> Result<(Stopped, Foothold), FootholdError> {
        let dir = ProcDir::process(process);
        let text = dir
            .bytes("maps")
            .map_err(|source| FootholdError::Io { what: "maps", source })?;
        let mappings = maps::parse(&text).map_err(|e| FootholdError::Io {
            what: "maps",
            source: e.into(),
        })?;
        let vdso = mappings
            .iter()
            .find(|m| m.name == b"[vdso]")
            .ok_or(FootholdError::NoVdso)?;
        let syscall_at = find_syscall(&dir, vdso)?;
        let mut taken: Vec<(u64, u64)> = mappings.iter().map(|m| (m.start, m.end)).collect();
        taken.extend_from_slice(avoid);
        let base = free_range(taken, ARENA_BYTES).ok_or(FootholdError::NoRoom)?;

        // The vDSO begins with "\x7fELF…\0": a string that every program has, for the memfd's name.
        let flags = u64::from(libc::MFD_CLOEXEC | libc::MFD_EXEC);
        let (thread, fd) = inject(
            thread,
            syscall_at,
            "memfd_create",
            libc::SYS_memfd_create,
            [vdso.start, flags, 0, 0, 0, 0],
        )?;
        let arena = take_descriptor(process, fd as i32)
            .and_then(|memfd| Arena::over(memfd, base))
            .map_err(|source| FootholdError::Io {
                what: "the target's memfd",
                source,
            });
        let (code, data) = (libc::PROT_READ | libc::PROT_EXEC, libc::PROT_READ | libc::PROT_WRITE);
        let how = (libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE) as u64;
        let (thread, mapped) = match inject(
            thread,
            syscall_at,
            "mmap",
            libc::SYS_mmap,
            [base, PAGE, code as u64, how, fd, 0],
        ) {
            Ok((thread, _)) => inject(
                thread,
                syscall_at,
                "mmap",
                libc::SYS_mmap,
                [base + PAGE, ARENA_BYTES - PAGE, data as u64, how, fd, PAGE],
            )
            .map(|(thread, _)| (thread, ()))?,
            Err(other) => return Err(other),
        };
        let (thread, _) = inject(thread, syscall_at, "close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
        let () = mapped;
        // A child that is forked meanwhile must not keep it.
        let (thread, _) = inject(
            thread,
            syscall_at,
            "madvise",
            libc::SYS_madvise,
            [base, ARENA_BYTES, libc::MADV_DONTFORK as u64, 0, 0, 0],
        )?;
        Ok((
            thread,
            Foothold {
                arena: arena?,
                syscall_at,
            },
        ))
    }

    /// The foothold that a former tracer has left in a process, if there is one.
    pub fn find(process: i32) -> Result<Option<Foothold>, FootholdError> {
        let io = |what| move |source| FootholdError::Io { what, source };
        let dir = ProcDir::process(process);
        let deadline = Instant::now() + MOVES_WITHIN;
        loop {
            let text = dir.bytes("maps").map_err(io("maps"))?;
            let mappings = maps::parse(&text).map_err(|e| FootholdError::Io {
                what: "maps",
                source: e.into(),
            })?;
            let arena = mappings.windows(2).find_map(|pair| match pair {
                [code, data] if is_pair(code, data) => Some((code, data)),
                _ => None,
            });
            let Some((code, data)) = arena else { return Ok(None) };
            let path = dir.path(&format!("map_files/{:x}-{:x}", data.start, data.end));
            let memfd = File::options().read(true).write(true).open(path);
            let memfd = memfd.map_err(io("the target's memfd"))?;
            let found = Arena::found(memfd.into(), code.start).map_err(io("the target's memfd"))?;
            let Some(arena) = found else { return Ok(None) };
            // A script that a former tracer has begun may be moving it to its place just now.
            let vdso = mappings.iter().find(|m| m.name == b"[vdso]");
            match vdso
                .ok_or(FootholdError::NoVdso)
                .and_then(|vdso| find_syscall(&dir, vdso))
            {
                Ok(syscall_at) => return Ok(Some(Foothold { arena, syscall_at })),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Is it still there? A program that executes another has lost it.
    pub fn is_planted(&self, process: i32) -> bool {
        let (code, data) = (self.arena.base(), self.arena.base() + PAGE);
        let file = ProcDir::process(process).link(&format!("map_files/{code:x}-{data:x}"));
        file.is_ok_and(|name| Foothold::is_arena_name(name.as_os_str().as_encoded_bytes()))
    }

    /// Whether a mapping is of some foothold, by the name that only such a file has.
    pub fn is_arena(mapping: &maps::Mapping) -> bool {
        mapping.shared && Foothold::is_arena_name(&mapping.name)
    }

    /// Whether a file of this name is an arena's.
    pub fn is_arena_name(name: &[u8]) -> bool {
        name.starts_with(b"/memfd:\x7fELF")
    }

    /// Takes the loop out of the target again. No thread of it may be inside.
    pub fn uproot(&self, thread: Stopped) -> Result<Stopped, FootholdError> {
        let place = [self.arena.base(), ARENA_BYTES, 0, 0, 0, 0];
        Ok(inject(thread, self.syscall_at, "munmap", libc::SYS_munmap, place)?.0)
    }

    /// Where the loop and the arena are in the target.
    pub fn range(&self) -> (u64, u64) {
        (self.arena.base(), self.arena.base() + ARENA_BYTES)
    }
}

/// Are these the two mappings of an arena?
fn is_pair(code: &maps::Mapping, data: &maps::Mapping) -> bool {
    Foothold::is_arena(code)
        && code.length() == PAGE
        && data.start == code.end
        && data.length() == ARENA_BYTES - PAGE
        && data.name == code.name
}

/// One injected call that must succeed.
pub fn inject(
    thread: Stopped,
    at: u64,
    call: &'static str,
    number: i64,
    arguments: [u64; 6],
) -> Result<(Stopped, u64), FootholdError> {
    let (thread, answer) = thread.inject(at, number, arguments)?;
    match answer {
        -4095..=-1 => Err(FootholdError::Forbidden {
            call,
            errno: Errno(-answer as i32),
        }),
        _ => Ok((thread, answer as u64)),
    }
}

/// A copy of another process's descriptor.
pub fn take_descriptor(process: i32, fd: i32) -> io::Result<std::os::fd::OwnedFd> {
    Table::of(process)?.take(fd)
}

/// The descriptor table of a process, of which many are taken.
#[derive(Debug)]
pub struct Table(std::os::fd::OwnedFd);

impl Table {
    /// The table of a process, by its number on this machine.
    pub fn of(process: i32) -> io::Result<Table> {
        let pid = Pid::from_raw(process).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Table(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// A copy of one of its descriptors.
    pub fn take(&self, fd: i32) -> io::Result<std::os::fd::OwnedFd> {
        Ok(pidfd_getfd(&self.0, fd, PidfdGetfdFlags::empty())?)
    }
}

/// A `syscall` instruction of a process that is not ours: the one in its vDSO.
pub fn syscall_instruction(dir: &ProcDir) -> Result<u64, FootholdError> {
    let text = dir
        .bytes("maps")
        .map_err(|source| FootholdError::Io { what: "maps", source })?;
    let mappings = maps::parse(&text).map_err(|e| FootholdError::Io {
        what: "maps",
        source: e.into(),
    })?;
    find_syscall(
        dir,
        mappings
            .iter()
            .find(|m| m.name == b"[vdso]")
            .ok_or(FootholdError::NoVdso)?,
    )
}

fn find_syscall(dir: &ProcDir, vdso: &maps::Mapping) -> Result<u64, FootholdError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut code = vec![0u8; vdso.length() as usize];
        File::open(dir.path("mem"))?.read_exact_at(&mut code, vdso.start)?;
        Ok(code)
    };
    let code = read().map_err(|source| FootholdError::Io {
        what: "the vDSO",
        source,
    })?;
    let calls = || {
        code.windows(2)
            .enumerate()
            .filter(|(_, w)| *w == [0x0f, 0x05])
            .map(|(at, _)| at)
    };
    // One with a plain return after it, for the sake of a refuge.
    let at = calls()
        .find(|at| crate::refuge::returns_plainly(&code[at + 2..]))
        .or_else(|| calls().next())
        .ok_or(FootholdError::NoVdso)?;
    Ok(vdso.start + at as u64)
}

/// A free range in the middle of the largest gap: far from a heap that grows up and stacks that grow down.
pub fn free_range(mut taken: Vec<(u64, u64)>, length: u64) -> Option<u64> {
    const LOWEST: u64 = 1 << 24;
    const HIGHEST: u64 = 0x7fff_ffff_f000;
    taken.sort_unstable();
    let mut best: Option<(u64, u64)> = None;
    let mut from = LOWEST;
    for (start, end) in taken.into_iter().chain([(HIGHEST, HIGHEST)]) {
        let start = start.min(HIGHEST);
        if start > from && best.is_none_or(|(_, size)| start - from > size) {
            best = Some((from, start - from));
        }
        from = from.max(end);
    }
    let (from, size) = best?;
    (size >= 3 * length).then(|| inspect::page_down(from + size / 2 - length / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_the_largest_gap() {
        let at = free_range(
            vec![(0x40_0000, 0x50_0000), (0x7000_0000_0000, 0x7fff_0000_0000)],
            ARENA_BYTES,
        )
        .unwrap();
        assert!(at > 0x3000_0000_0000 && at < 0x4000_0000_0000);
        assert_eq!(free_range(vec![(0, u64::MAX)], ARENA_BYTES), None);
    }
}
