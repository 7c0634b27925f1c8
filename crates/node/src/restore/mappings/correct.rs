//! The address space of a blank, made what it is inside the freeze.
//!
//! Owns the comparison of the plan's mappings with those of the freeze, and what must go and come between the two. Invariant:
//! what is the same in both is not touched, as it may hold pages already.

use super::{MADV_DONTNEED, SYS_MADVISE, SYS_MUNMAP, demanded, describe, map};
use crate::restore::{Blank, During, Kit, RestoreError};
use dunlin_proto::image::{Mapping, MappingKind, Space};
use dunlin_sys::script::Script;
use dunlin_sys::uffd::Watch;
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

/// What became of the anonymous memory of a blank: ranges (first address, address after the last).
#[derive(Debug, Default)]
pub struct Remade {
    /// Unmapped, and whatever was there with it.
    pub gone: Vec<(u64, u64)>,
    /// Mapped anew, and empty.
    pub come: Vec<(u64, u64)>,
}

/// Makes the address space what it is inside the freeze.
pub fn correct(blank: &mut Blank, space: &Space, kit: &mut Kit<'_>) -> Result<Remade, RestoreError> {
    let pid = blank.pid;
    if let Some(why) = space.unsound() {
        return Err(RestoreError::Unsound { pid, why });
    }
    let old_space = blank.image.space.clone();
    let (gone, come) = differences(&old_space, space);
    let ranges = |all: &mut dyn Iterator<Item = &Mapping>| {
        let anonymous = all.filter(|m| m.kind == MappingKind::Anonymous);
        anonymous.map(|m| (m.start, m.end)).collect()
    };
    let remade = Remade {
        gone: ranges(&mut gone.iter()),
        come: ranges(&mut come.iter()),
    };
    if space
        .mappings
        .iter()
        .any(|m| m.start < blank.foothold.range().1 && blank.foothold.range().0 < m.end)
    {
        return Err(RestoreError::Unsound {
            pid,
            why: "a mapping came where the loop is; try again",
        });
    }
    // An unmapping is reported to the userfaultfd, and waits until the report is read.
    for range in demanded(&old_space.mappings) {
        blank
            .uffd
            .unregister(range.0, range.1 - range.0)
            .during(pid, "unregistering")?;
    }
    let mut script = Script::new(&blank.foothold.arena);
    for m in &gone {
        script.call("munmap", SYS_MUNMAP, &[m.start, m.end - m.start]);
    }
    blank.run(blank.host, script, "unmapping")?;
    map(pid, blank.host, blank.leader(), &blank.foothold, space, &come, kit)?;
    blank.image.space = space.clone();
    for (start, end) in demanded(&space.mappings) {
        blank
            .uffd
            .register(start, end - start, Watch::MISSING)
            .during(pid, "registering its memory")?;
    }
    // What was written into a mapping that had to be made anew is written again.
    let inside = |address: u64| come.iter().any(|m| address >= m.start && address < m.end);
    let pages: Vec<(u64, Vec<u8>)> = blank
        .file_pages
        .iter()
        .filter(|(a, _)| inside(**a))
        .map(|(a, b)| (*a, b.clone()))
        .collect();
    let mapped: Vec<(u64, u64)> = space
        .mappings
        .iter()
        .filter(|m| m.kind.is_copied())
        .map(|m| (m.start, m.end))
        .collect();
    for (address, bytes) in pages {
        if mapped.iter().any(|(start, end)| address >= *start && address < *end) {
            blank
                .memory
                .write_all_at(&bytes, address)
                .during(pid, "writing pages of file mappings")?;
        }
    }
    describe(blank, space, None)?;
    Ok(remade)
}

/// The mappings that are in the first address space only, and those in the second only, but for the kernel's. Where anonymous
/// memory has only grown or shrunk, what stays of it stays.
fn differences(old: &Space, new: &Space) -> (Vec<Mapping>, Vec<Mapping>) {
    let old_parts = cut_at(&old.mappings, &new.mappings);
    let new_parts = cut_at(&new.mappings, &old.mappings);
    let missing = |parts: &[Mapping], space: &Space, others: &[Mapping], other: &Space| -> Vec<Mapping> {
        // They lie in the order of their addresses, none over another.
        let has_twin = |m: &Mapping| {
            let twin = others.binary_search_by_key(&m.start, |o| o.start);
            twin.is_ok_and(|at| is_same((m, space), (&others[at], other)))
        };
        let plain = parts.iter().filter(|m| !matches!(m.kind, MappingKind::Kernel(_)));
        plain.filter(|m| !has_twin(m)).cloned().collect()
    };
    let gone = missing(&old_parts, old, &new_parts, new);
    let come = missing(&new_parts, new, &old_parts, old);
    (gone, come)
}

fn is_same((a, a_space): (&Mapping, &Space), (b, b_space): (&Mapping, &Space)) -> bool {
    (a.start, a.end, a.protection, &a.flags, &a.name) == (b.start, b.end, b.protection, &b.flags, &b.name)
        && std::mem::discriminant(&a.kind) == std::mem::discriminant(&b.kind)
        && behind(a, a_space) == behind(b, b_space)
}

/// What is behind a mapping: files by what they are, not by their index.
fn behind<'a>(m: &Mapping, space: &'a Space) -> Option<(&'a [u8], u64, u64)> {
    match m.kind {
        MappingKind::PrivateFile { file, offset } | MappingKind::SharedFile { file, offset, .. } => {
            let file = space.files.get(file as usize)?;
            Some((&file.path, file.inode, offset))
        }
        MappingKind::SharedMemory { memory, offset, .. } => Some((&[], memory, offset)),
        MappingKind::HugePages { log2 } => Some((&[], u64::from(log2), 0)),
        MappingKind::Anonymous | MappingKind::Kernel(_) => None,
    }
}

/// Anonymous mappings, cut where mappings of `other` begin and end.
fn cut_at(mappings: &[Mapping], other: &[Mapping]) -> Vec<Mapping> {
    let borders: BTreeSet<u64> = other.iter().flat_map(|m| [m.start, m.end]).collect();
    let mut cut = Vec::with_capacity(mappings.len());
    for m in mappings {
        let mut rest = m.clone();
        if m.kind == MappingKind::Anonymous {
            for border in borders.range(m.start + 1..m.end) {
                cut.push(Mapping {
                    end: *border,
                    ..rest.clone()
                });
                rest.start = *border;
            }
        }
        cut.push(rest);
    }
    cut
}

/// Drops pages of anonymous memory (first address, number of pages): they were copied before they were written last.
/// Nobody serves the blank's memory meanwhile.
pub fn drop_stale(blank: &Blank, stale: &[(u64, u64)]) -> Result<(), RestoreError> {
    let regions = demanded(&blank.image.space.mappings);
    // A drop is reported to the userfaultfd, and waits until the report is read.
    for (start, end) in &regions {
        blank
            .uffd
            .unregister(*start, end - start)
            .during(blank.pid, "unregistering")?;
    }
    let mut script = Script::new(&blank.foothold.arena);
    for (start, pages) in stale {
        if !script.has_room() {
            blank.run(blank.host, script, "dropping stale pages")?;
            script = Script::new(&blank.foothold.arena);
        }
        let inside = regions.iter().any(|(s, e)| s <= start && start + pages * 4096 <= *e);
        if inside {
            script.call("madvise", SYS_MADVISE, &[*start, pages * 4096, MADV_DONTNEED]);
        }
    }
    blank.run(blank.host, script, "dropping stale pages")?;
    for (start, end) in &regions {
        blank
            .uffd
            .register(*start, end - start, Watch::MISSING)
            .during(blank.pid, "registering its memory")?;
    }
    Ok(())
}

/// Makes pages of private file mappings the file's own again. A huge page is dropped as a whole, with the first of it.
pub fn drop_pages(blank: &mut Blank, pages: &[u64]) -> Result<(), RestoreError> {
    let size_at = |address: u64| {
        let mut all = blank.image.space.mappings.iter();
        match all.find(|m| m.start <= address && address < m.end)?.kind {
            MappingKind::PrivateFile { .. } => Some(4096),
            MappingKind::HugePages { log2 } => Some(1u64.checked_shl(log2)?),
            _ => None,
        }
    };
    let mut script = Script::new(&blank.foothold.arena);
    for page in pages {
        if let Some(size) = size_at(*page).filter(|size| page.is_multiple_of(*size)) {
            script.call("madvise", SYS_MADVISE, &[*page, size, MADV_DONTNEED]);
        }
    }
    blank.run(blank.host, script, "dropping pages of file mappings")
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_proto::image::FileRef;

    fn space(mappings: &[(u64, u64, MappingKind)]) -> Space {
        let file = |path: &str, inode| FileRef {
            path: path.into(),
            size: 1,
            modified_ns: 0,
            mode: 0o100_644,
            inode,
        };
        let mapping = |(start, end, kind): &(u64, u64, MappingKind)| Mapping {
            start: *start,
            end: *end,
            protection: 3,
            kind: *kind,
            flags: Vec::new(),
            name: None,
        };
        Space {
            layout: [0; 11],
            auxv: Vec::new(),
            exe: file("/a", 1),
            files: vec![file("/a", 1), file("/b", 2)],
            mappings: mappings.iter().map(mapping).collect(),
            vdso_hash: [0; 32],
        }
    }

    fn ranges(mappings: &[Mapping]) -> Vec<(u64, u64)> {
        mappings.iter().map(|m| (m.start, m.end)).collect()
    }

    #[test]
    fn what_stays_of_anonymous_memory_is_not_touched() {
        let anonymous = MappingKind::Anonymous;
        let (gone, come) = differences(
            &space(&[(0x1000, 0x4000, anonymous), (0x8000, 0xa000, anonymous)]),
            &space(&[(0x2000, 0x5000, anonymous), (0x8000, 0xa000, anonymous)]),
        );
        assert_eq!(ranges(&gone), [(0x1000, 0x2000)]);
        assert_eq!(ranges(&come), [(0x4000, 0x5000)]);
    }

    #[test]
    fn a_file_is_compared_by_what_it_is() {
        let file = |file| MappingKind::PrivateFile { file, offset: 0 };
        let old = space(&[(0x1000, 0x2000, file(0)), (0x4000, 0x5000, file(1))]);
        let mut new = old.clone();
        new.files.swap(0, 1);
        let (gone, come) = differences(&old, &new);
        assert_eq!(
            (ranges(&gone), ranges(&come)),
            (vec![(0x1000, 0x2000), (0x4000, 0x5000)], ranges(&new.mappings))
        );
        new.mappings[0].kind = file(1);
        new.mappings[1].kind = file(0);
        let (gone, come) = differences(&old, &new);
        assert!(gone.is_empty() && come.is_empty(), "{gone:?} {come:?}");
    }
}
