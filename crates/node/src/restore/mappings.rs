//! The address space of a blank: emptied, mapped anew, registered for missing pages, and inside the freeze corrected.
//!
//! Owns every mmap, munmap and mremap of a restore. Refuses to know what the pages hold.

mod correct;

pub use correct::{Remade, correct, drop_pages, drop_stale};

use super::blank::install;
use super::{Blank, During, Kit, RestoreError};
use crate::files::{Use, open_same};
use crate::install::Wanted;
use crate::obstacle::mapping as obstacle_of;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{KernelMapping, Mapping, MappingKind, Space};
use dunlin_sys::foothold::{Foothold, take_descriptor};
use dunlin_sys::procfs::{ProcDir, maps};
use dunlin_sys::ptrace::Stopped;
use dunlin_sys::script::{ARENA_BYTES, Script};
use dunlin_sys::uffd::{Features, Uffd, Watch};
use rustix::fs::OFlags;
use std::collections::btree_map::Entry;
use std::os::fd::{AsFd, OwnedFd};

const SYS_MMAP: i64 = 9;
const SYS_MUNMAP: i64 = 11;
const SYS_IOCTL: i64 = 16;
const SYS_MREMAP: i64 = 25;
const SYS_MADVISE: i64 = 28;
const SYS_PRCTL: i64 = 157;
const SYS_USERFAULTFD: i64 = 323;
const SYS_MLOCK2: i64 = 325;
const SYS_CLOSE_RANGE: i64 = 436;
const SYS_MSEAL: i64 = 462;
const MAP_SHARED: u64 = 1;
const MAP_PRIVATE: u64 = 2;
const MAP_ANONYMOUS: u64 = 0x20;
const MAP_GROWSDOWN: u64 = 0x100;
const MAP_NORESERVE: u64 = 0x4000;
const MAP_HUGETLB: u64 = 0x4_0000;
const MAP_HUGE_SHIFT: u32 = 26;
const MAP_HUGE_MASK: u32 = 0x3f;
const MAP_FIXED_NOREPLACE: u64 = 0x10_0000;
const MREMAP_TO: u64 = 3;
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
const MADV_DONTNEED: u64 = 4;
/// Descriptors that the restore itself needs are above standard input, output and error.
const FIRST_FD: i32 = 3;

/// Empties a blank but for the loop and the kernel's mappings, which go where the process had them.
pub fn clear(
    pid: Pid,
    host: i32,
    thread: Stopped,
    foothold: Foothold,
    space: &Space,
) -> Result<(Stopped, Foothold), RestoreError> {
    let text = ProcDir::process(host)
        .bytes("maps")
        .during(pid, "reading the blank's mappings")?;
    let old = maps::parse(&text).during(pid, "reading the blank's mappings")?;
    let hole = foothold.range();
    let kernel: Vec<(KernelMapping, &maps::Mapping)> = old
        .iter()
        .filter_map(|m| kernel_kind(&m.name).map(|kind| (kind, m)))
        .collect();
    let mut script = Script::new(&foothold.arena);
    for m in &old {
        let ours = m.start >= hole.0 && m.end <= hole.1;
        if !ours && kernel_kind(&m.name).is_none() && m.name != b"[vsyscall]" {
            script.call("munmap", SYS_MUNMAP, &[m.start, m.length()]);
        }
    }
    // First aside, in case old and new places overlap; the gap around the loop is three times its size.
    let mut aside = hole.0 + ARENA_BYTES + (64 << 10);
    let mut places = Vec::new();
    for (kind, m) in &kernel {
        let wanted = space.mappings.iter().find(|w| w.kind == MappingKind::Kernel(*kind));
        match wanted {
            Some(wanted) if wanted.end - wanted.start == m.length() => {
                script.call(
                    "mremap",
                    SYS_MREMAP,
                    &[m.start, m.length(), m.length(), MREMAP_TO, aside],
                );
                places.push((aside, wanted.start, m.length()));
                aside += m.length();
            }
            Some(wanted) => return Err(other_kernel(pid, wanted)),
            // A process that had unmapped it.
            None if *kind != KernelMapping::Vdso => {
                script.call("munmap", SYS_MUNMAP, &[m.start, m.length()]);
            }
            None => {}
        }
    }
    for wanted in &space.mappings {
        if let MappingKind::Kernel(kind) = wanted.kind
            && !kernel.iter().any(|(k, _)| *k == kind)
        {
            return Err(other_kernel(pid, wanted));
        }
    }
    for (aside, place, length) in &places {
        script.call("mremap", SYS_MREMAP, &[*aside, *length, *length, MREMAP_TO, *place]);
    }
    let (thread, _) = script.run(thread).during(pid, "clearing the blank")?;
    let vdso = |m: &&(KernelMapping, &maps::Mapping)| m.0 == KernelMapping::Vdso;
    let before = kernel.iter().find(vdso).map_or(0, |(_, m)| m.start);
    let after = space
        .mappings
        .iter()
        .find(|m| m.kind == MappingKind::Kernel(KernelMapping::Vdso));
    let Foothold { arena, syscall_at } = foothold;
    let syscall_at = after.map_or(syscall_at, |m| syscall_at - before + m.start);
    Ok((thread, Foothold { arena, syscall_at }))
}

fn kernel_kind(name: &[u8]) -> Option<KernelMapping> {
    match name {
        b"[vdso]" => Some(KernelMapping::Vdso),
        b"[vvar]" => Some(KernelMapping::Vvar),
        b"[vvar_vclock]" => Some(KernelMapping::VvarClock),
        _ => None,
    }
}

fn other_kernel(pid: Pid, wanted: &Mapping) -> RestoreError {
    RestoreError::Obstacles(vec![obstacle_of(
        pid,
        (wanted.start, wanted.end),
        b"[vdso]",
        "the destination's kernel has another vDSO",
        "run the same kernel build on both nodes",
    )])
}

/// Maps the given mappings of a space into a blank that has nothing there.
pub fn map(
    pid: Pid,
    host: i32,
    thread: Stopped,
    foothold: &Foothold,
    space: &Space,
    mappings: &[Mapping],
    kit: &mut Kit<'_>,
) -> Result<(), RestoreError> {
    let first = free_numbers(host).during(pid, "reading descriptors")?;
    let mut wanted = Vec::new();
    let mut numbers = std::collections::BTreeMap::new();
    let mut obstacles = Vec::new();
    for m in mappings {
        let (file, flags, how) = match m.kind {
            MappingKind::SharedMemory { memory, length, .. } => {
                if let Entry::Vacant(place) = numbers.entry(Behind::Memory(memory)) {
                    let fd = shared_memory(kit, memory, length).during(pid, "making shared memory")?;
                    let number = first + wanted.len() as i32;
                    wanted.push(Wanted {
                        fd,
                        number,
                        close_on_exec: true,
                    });
                    place.insert(number);
                }
                continue;
            }
            MappingKind::PrivateFile { file, .. } => (file, OFlags::RDONLY, Use::Content),
            MappingKind::SharedFile {
                file, writable: false, ..
            } => (file, OFlags::RDONLY, Use::Content),
            MappingKind::SharedFile {
                file, writable: true, ..
            } => (file, OFlags::RDWR, Use::Identity),
            MappingKind::Anonymous | MappingKind::HugePages { .. } | MappingKind::Kernel(_) => continue,
        };
        let key = Behind::File(file, flags.bits());
        if numbers.contains_key(&key) {
            continue;
        }
        match open_same(kit.root.as_fd(), &space.files[file as usize], flags, how, kit.shared) {
            Ok(fd) => {
                let number = first + wanted.len() as i32;
                wanted.push(Wanted {
                    fd,
                    number,
                    close_on_exec: true,
                });
                numbers.insert(key, number);
            }
            Err(error) => {
                obstacles.push(crate::descriptors::file::missing(
                    pid,
                    &space.files[file as usize],
                    &error,
                ));
                numbers.insert(key, -1);
            }
        }
    }
    if !obstacles.is_empty() {
        return Err(RestoreError::Obstacles(obstacles));
    }
    let mut thread = install(pid, pid, thread, foothold.syscall_at, wanted, kit)?;
    let mut script = Script::new(&foothold.arena);
    for m in mappings {
        if !script.has_room() {
            thread = script.run(thread).during(pid, "mapping")?.0;
            script = Script::new(&foothold.arena);
        }
        add_mapping(&mut script, m, |behind| numbers[&behind]);
    }
    script.attempt("close_range", SYS_CLOSE_RANGE, &[first as u64, u64::from(u32::MAX), 0]);
    script.run(thread).during(pid, "mapping")?;
    Ok(())
}

/// What is mapped: one descriptor each.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Behind {
    /// One of the listed files, opened with these flags.
    File(u32, u32),
    Memory(u64),
}

/// A descriptor of shared memory, which is made with the first process that has it.
fn shared_memory(kit: &mut Kit<'_>, memory: u64, length: u64) -> std::io::Result<OwnedFd> {
    let made = match kit.common.shared.entry(memory) {
        Entry::Occupied(made) => made.into_mut(),
        Entry::Vacant(place) => place.insert(dunlin_sys::shared::make(length)?),
    };
    Ok(made.try_clone()?.into())
}

/// The first number above all descriptors that are open.
fn free_numbers(host: i32) -> std::io::Result<i32> {
    Ok(ProcDir::process(host)
        .numbers("fd")?
        .last()
        .map_or(FIRST_FD, |n| (n + 1).max(FIRST_FD)))
}

fn add_mapping(script: &mut Script<'_>, m: &Mapping, number_of: impl Fn(Behind) -> i32) {
    let has = |flag: &[u8; 2]| m.flags.contains(flag);
    let mut flags = MAP_FIXED_NOREPLACE;
    if has(b"gd") {
        flags |= MAP_GROWSDOWN;
    }
    if has(b"nr") {
        flags |= MAP_NORESERVE;
    }
    let (kind, fd, offset) = match m.kind {
        MappingKind::Kernel(_) => return,
        MappingKind::Anonymous => (MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
        MappingKind::HugePages { log2 } => {
            let size = u64::from(log2 & MAP_HUGE_MASK) << MAP_HUGE_SHIFT;
            (MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | size, -1, 0)
        }
        MappingKind::PrivateFile { file, offset } => {
            let behind = Behind::File(file, OFlags::RDONLY.bits());
            (MAP_PRIVATE, number_of(behind), offset)
        }
        MappingKind::SharedMemory { memory, offset, .. } => (MAP_SHARED, number_of(Behind::Memory(memory)), offset),
        MappingKind::SharedFile { file, offset, writable } => {
            let flags = if writable { OFlags::RDWR } else { OFlags::RDONLY };
            (MAP_SHARED, number_of(Behind::File(file, flags.bits())), offset)
        }
    };
    let length = m.end - m.start;
    script.call(
        "mmap",
        SYS_MMAP,
        &[
            m.start,
            length,
            u64::from(m.protection),
            flags | kind,
            fd as u64,
            offset,
        ],
    );
    for (flag, advice) in [
        (b"sr", 2),
        (b"rr", 1),
        (b"dc", 10),
        (b"hg", 14),
        (b"nh", 15),
        (b"mg", 12),
        (b"dd", 16),
        (b"wf", 18),
    ] {
        if has(flag) {
            script.attempt("madvise", SYS_MADVISE, &[m.start, length, advice]);
        }
    }
    if has(b"lo") {
        // On fault: locking now would wait for pages that nobody serves yet.
        script.attempt("mlock2", SYS_MLOCK2, &[m.start, length, 1]);
    }
    if let Some(name) = &m.name {
        let name = script.text(name);
        script.attempt("prctl", SYS_PRCTL, &[0x5356_4d41, 0, m.start, length, name.address]);
    }
}

/// The ranges whose pages are fetched on demand.
pub fn demanded(mappings: &[Mapping]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for m in mappings.iter().filter(|m| m.kind == MappingKind::Anonymous) {
        match ranges.last_mut() {
            Some(last) if last.1 == m.start => last.1 = m.end,
            _ => ranges.push((m.start, m.end)),
        }
    }
    ranges
}

/// Has the blank make a userfaultfd, takes it and registers its anonymous memory.
pub fn demand(
    pid: Pid,
    host: i32,
    foothold: &Foothold,
    mappings: &[Mapping],
    kit: &Kit<'_>,
) -> Result<Uffd, RestoreError> {
    const O_CLOEXEC_NONBLOCK: u64 = 0o2_004_000;
    let mut script = Script::new(&foothold.arena);
    let device = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd");
    let mut thread = Stopped::assume(host);
    let made = match device {
        Ok(device) => {
            let wanted = Wanted {
                fd: device.into(),
                number: FIRST_FD,
                close_on_exec: true,
            };
            thread = install(pid, pid, thread, foothold.syscall_at, vec![wanted], kit)?;
            script.call(
                "ioctl",
                SYS_IOCTL,
                &[FIRST_FD as u64, USERFAULTFD_IOC_NEW, O_CLOEXEC_NONBLOCK],
            )
        }
        Err(_) => script.call("userfaultfd", SYS_USERFAULTFD, &[O_CLOEXEC_NONBLOCK]),
    };
    let (thread, answers) = script.run(thread).during(pid, "making a userfaultfd")?;
    let fd = take_descriptor(host, answers.of(made) as i32).during(pid, "taking its userfaultfd")?;
    let mut script = Script::new(&foothold.arena);
    script.call(
        "close_range",
        SYS_CLOSE_RANGE,
        &[FIRST_FD as u64, u64::from(u32::MAX), 0],
    );
    script.run(thread).during(pid, "closing descriptors")?;
    let uffd = Uffd::from_fd(fd).during(pid, "using its userfaultfd")?;
    uffd.negotiate(Features::CHANGES)
        .during(pid, "negotiating userfaultfd features")?;
    for (start, end) in demanded(mappings) {
        uffd.register(start, end - start, Watch::MISSING)
            .during(pid, "registering its memory")?;
    }
    Ok(uffd)
}

/// Tells the kernel where code, data, heap, stack, arguments and environment are.
///
/// `exe` is a descriptor of the blank's: its program becomes that, and it is closed. None: it has its program.
pub fn describe(blank: &Blank, space: &Space, exe: Option<i32>) -> Result<(), RestoreError> {
    const PR_SET_MM: u64 = 35;
    const PR_SET_MM_MAP: u64 = 14;
    const SYS_CLOSE: i64 = 3;
    let mut script = Script::new(&blank.foothold.arena);
    let auxv = script.bytes(&space.auxv);
    let mut map: Vec<u8> = space.layout.iter().flat_map(|word| word.to_le_bytes()).collect();
    map.extend(auxv.address.to_le_bytes());
    map.extend((space.auxv.len() as u32).to_le_bytes());
    map.extend(exe.unwrap_or(-1).to_le_bytes());
    let map_length = map.len() as u64;
    let map = script.bytes(&map);
    script.call(
        "prctl",
        SYS_PRCTL,
        &[PR_SET_MM, PR_SET_MM_MAP, map.address, map_length, 0],
    );
    if let Some(exe) = exe {
        script.call("close", SYS_CLOSE, &[exe as u64]);
    }
    blank.run(blank.host, script, "describing its address space")
}

/// Seals what was sealed; nothing can be changed there afterwards.
pub fn seal(blank: &Blank) -> Result<(), RestoreError> {
    let mut script = Script::new(&blank.foothold.arena);
    for m in blank.image.space.mappings.iter().filter(|m| m.flags.contains(b"sl")) {
        script.attempt("mseal", SYS_MSEAL, &[m.start, m.end - m.start, 0]);
    }
    blank.run(blank.host, script, "sealing mappings")
}
