//! The full comparison of a parked process and its copy, for tests: all pages, registers, extended state, descriptors.
//!
//! Owns the digest of a process's private memory and the comparisons. Refuses to be fast: it reads every page on both
//! sides while the process is frozen.

use crate::restore::Blank;
use dunlin_proto::image::{DescriptionKind, Essence, Files, Mapping, MappingKind, Space, ThreadImage};
use dunlin_sys::pagemap::{self, Query};
use dunlin_sys::procfs::fdinfo::FdInfo;
use dunlin_sys::procfs::{ParseError, ProcDir, maps, special};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;
const O_CLOEXEC: u32 = 0o2_000_000;
const O_LARGEFILE: u32 = 0o100_000;

/// Hashes of all private pages that are not zeros: address, and the first eight bytes of BLAKE3.
pub type Digest = Vec<(u64, u64)>;

/// The areas that the kernel itself writes to when a thread runs (rseq(2)): they are the kernel's, not the program's.
pub fn kernel_areas(threads: &[ThreadImage]) -> Vec<(u64, u64)> {
    threads
        .iter()
        .filter_map(|t| t.rseq.map(|[area, length, _]| (area, length)))
        .collect()
}

/// Reads every private page of a process that does not run, leaving out some areas.
pub fn digest(memory: &File, pagemap: &File, mappings: &[Mapping], without: &[(u64, u64)]) -> io::Result<Digest> {
    let mut digest = Digest::new();
    let mut page = [0u8; PAGE];
    for mapping in mappings {
        if mapping.kind != MappingKind::Anonymous && !mapping.kind.is_copied() {
            continue;
        }
        for range in pagemap::scan(pagemap, mapping.start, mapping.end, Query::CONTENT) {
            let range = range.map_err(io::Error::from)?;
            for address in (range.start..range.end).step_by(PAGE) {
                memory.read_exact_at(&mut page, address)?;
                for (area, length) in without {
                    let from = area.clamp(&address, &(address + PAGE as u64)) - address;
                    let to = (area + length).clamp(address, address + PAGE as u64) - address;
                    page[from as usize..to as usize].fill(0);
                }
                // In anonymous memory zeros and nothing are the same; a written page of a file is not nothing.
                if mapping.kind != MappingKind::Anonymous || page.iter().any(|b| *b != 0) {
                    let hash = blake3::hash(&page);
                    let word = hash.as_bytes().first_chunk::<8>().copied().unwrap_or_default();
                    digest.push((address, u64::from_le_bytes(word)));
                }
            }
        }
    }
    Ok(digest)
}

/// Compares the copy's mappings with those that it should have: places, protections and kinds.
pub fn compare_space(host: i32, space: &Space, without: (u64, u64)) -> Result<(), String> {
    type Run = (u64, u64, u32, bool, bool);
    let join = |all: &mut dyn Iterator<Item = Run>| {
        let mut runs: Vec<Run> = Vec::new();
        for run in all {
            match runs.last_mut() {
                Some(last) if last.1 == run.0 && (last.2, last.3, last.4) == (run.2, run.3, run.4) => last.1 = run.1,
                _ => runs.push(run),
            }
        }
        runs
    };
    let kernels = |start: u64| {
        let of_kernel = space.mappings.iter().find(|m| m.start <= start && start < m.end);
        of_kernel.is_some_and(|m| matches!(m.kind, MappingKind::Kernel(_)))
    };
    let text = ProcDir::process(host).bytes("maps").map_err(|e| e.to_string())?;
    let all = maps::parse(&text).map_err(|e| e.to_string())?;
    let here = all
        .iter()
        .filter(|m| m.name != b"[vsyscall]" && !kernels(m.start) && !(m.start >= without.0 && m.end <= without.1));
    let here = join(&mut here.map(|m| {
        let protection = u32::from(m.read) | u32::from(m.write) << 1 | u32::from(m.execute) << 2;
        (m.start, m.end, protection, m.shared, m.has_file())
    }));
    let wanted = space
        .mappings
        .iter()
        .filter(|m| !matches!(m.kind, MappingKind::Kernel(_)));
    let wanted = join(&mut wanted.map(|m| {
        let shared = matches!(
            m.kind,
            MappingKind::SharedFile { .. } | MappingKind::SharedMemory { .. }
        );
        (m.start, m.end, m.protection, shared, m.kind != MappingKind::Anonymous)
    }));
    let differs = wanted
        .iter()
        .find(|run| !here.contains(run))
        .map(|run| ("is missing", run));
    let differs = differs.or_else(|| {
        here.iter()
            .find(|run| !wanted.contains(run))
            .map(|run| ("is too much", run))
    });
    match differs {
        Some((how, (start, end, protection, shared, file))) => Err(format!(
            "the mapping {start:x}-{end:x} (protection {protection}, shared {shared}, of a file {file}) {how} in the copy"
        )),
        None => Ok(()),
    }
}

/// Compares the pages; how many are equal, or the first difference in words.
pub fn compare_pages(source: &Digest, copy: &Digest) -> Result<u64, String> {
    let copy: BTreeMap<u64, u64> = copy.iter().copied().collect();
    for (address, hash) in source {
        match copy.get(address) {
            Some(other) if other == hash => {}
            Some(_) => return Err(format!("page {address:x} differs")),
            None => return Err(format!("page {address:x} is missing in the copy")),
        }
    }
    let source: BTreeMap<u64, u64> = source.iter().copied().collect();
    match copy.keys().find(|address| !source.contains_key(address)) {
        Some(address) => Err(format!("page {address:x} is in the copy only")),
        None => Ok(source.len() as u64),
    }
}

/// Compares the threads of a loaded blank with what was captured.
pub fn compare_threads(blank: &Blank, essence: &Essence) -> Result<(), String> {
    for wanted in &essence.threads {
        let found = blank.read_thread(wanted.tid).map_err(|e| e.to_string())?;
        let (registers, xstate) = found.ok_or(format!("thread {} is missing in the copy", wanted.tid))?;
        // A sleep that was over before it could be slept on has its answer already.
        let slept = wanted.sleep.is_some();
        let same = |(index, (a, b)): (usize, (&u64, &u64))| a == b || (slept && matches!(index, 10 | 15));
        let pairs = wanted.registers.iter().zip(&registers).enumerate();
        if let Some((index, (a, b))) = pairs.clone().find(|pair| !same(*pair)) {
            return Err(format!("register {index} of thread {} is {b:x}, not {a:x}", wanted.tid));
        }
        if xstate != wanted.xstate {
            return Err(format!("the extended state of thread {} differs", wanted.tid));
        }
    }
    Ok(())
}

/// Compares the descriptor tables.
pub fn compare_files(host: i32, files: &Files) -> Result<(), String> {
    let dir = ProcDir::process(host);
    let numbers = dir.numbers("fd").map_err(|e| e.to_string())?;
    let wanted: Vec<i32> = files.table.iter().map(|d| d.number).collect();
    if numbers != wanted {
        return Err(format!("the copy has descriptors {numbers:?}, not {wanted:?}"));
    }
    for descriptor in &files.table {
        let number = descriptor.number;
        let text = dir.text(&format!("fdinfo/{number}")).map_err(|e| e.to_string())?;
        let found = FdInfo::parse(&text).map_err(|e| e.to_string())?;
        let description = &files.descriptions[descriptor.description as usize];
        let flags = (found.flags ^ description.flags) & !(O_CLOEXEC | O_LARGEFILE);
        if flags != 0 || (found.flags & O_CLOEXEC != 0) != descriptor.close_on_exec {
            return Err(format!(
                "descriptor {number} has flags {:o}, not {:o}",
                found.flags, description.flags
            ));
        }
        if found.position != description.position {
            let (is, was) = (found.position, description.position);
            return Err(format!("descriptor {number} is at offset {is}, not {was}"));
        }
        let same = is_like(&description.kind, &text).map_err(|e| e.to_string())?;
        if !same {
            return Err(format!("descriptor {number} is not {:?}, but {text}", description.kind));
        }
    }
    Ok(())
}

/// Whether a description of a special kind says of itself what it should.
fn is_like(kind: &DescriptionKind, info: &str) -> Result<bool, ParseError> {
    match kind {
        DescriptionKind::Event { count, semaphore } => Ok(special::event(info)? == (*count, *semaphore)),
        DescriptionKind::Signals(mask) => Ok(special::signal_mask(info)? == *mask),
        DescriptionKind::Timer(wanted) => {
            // It may have expired since.
            let found = special::timer(info)?;
            let is = (found.clock, found.flags, found.interval_ns);
            Ok(is == (wanted.clock, wanted.flags, wanted.interval_ns) && found.ticks >= wanted.ticks)
        }
        DescriptionKind::Epoll { watches } => {
            let found = special::watches(info)?;
            let mut found: Vec<_> = found.iter().map(|w| (w.number, w.events, w.data)).collect();
            let mut wanted: Vec<_> = watches.iter().map(|w| (w.number, w.events, w.data)).collect();
            found.sort_unstable();
            wanted.sort_unstable();
            Ok(found == wanted)
        }
        DescriptionKind::File(_)
        | DescriptionKind::Deleted { .. }
        | DescriptionKind::Directory(_)
        | DescriptionKind::Kernel(_)
        | DescriptionKind::Path(_)
        | DescriptionKind::Device(_)
        | DescriptionKind::Stream { .. }
        | DescriptionKind::Pipe { .. }
        | DescriptionKind::Memory { .. }
        | DescriptionKind::Socket(_)
        | DescriptionKind::Unix(_) => Ok(true),
        DescriptionKind::Process(pid) => {
            let number = special::value(info, "NSpid:").and_then(|numbers| numbers.rsplit('\t').next());
            Ok(number.and_then(|number| number.trim().parse().ok()) == Some(pid.0))
        }
    }
}
