//! Private memory of explicit huge pages (MAP_HUGETLB; hugetlbpage in the kernel's documentation).
//!
//! Owns what such a mapping is, and whether a node has room for it. Its bytes are copied, as those of private mappings of
//! files are: a huge page that is demanded would have to come as a whole. Refuses shared ones. Invariant: no more of it than
//! [`MAX_BYTES`] is part of a move.

use dunlin_proto::image::{Mapping, MappingKind};
use dunlin_sys::procfs::maps;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// No more of a process travels: all of it may be part of the freeze.
pub const MAX_BYTES: u64 = 16 << 20;
/// Why more of it does not.
pub const TOO_LARGE: &str = "more than 16 MiB of explicit huge pages cannot be moved yet";
const NAME: &[u8] = b"/anon_hugepage (deleted)";
/// Where the kernel has the counts for each size.
const COUNTS: &str = "/sys/kernel/mm/hugepages";

/// Whether a mapping is of such memory.
pub fn is(mapping: &maps::Mapping) -> bool {
    mapping.name == NAME && !mapping.shared
}

/// What such a mapping is, by its entry in `map_files`.
pub fn classify(link: &Path) -> io::Result<MappingKind> {
    let size = rustix::fs::statfs(link)?.f_bsize as u64;
    Ok(MappingKind::HugePages { log2: size.ilog2() })
}

/// How much of it mappings are.
pub fn total(mappings: &[Mapping]) -> u64 {
    let huge = mappings
        .iter()
        .filter(|m| matches!(m.kind, MappingKind::HugePages { .. }));
    huge.map(|m| m.end - m.start).sum()
}

/// What a node is short of for mappings: the size of pages in bytes, how many are wanted, how many are free.
pub fn missing(mappings: &[Mapping]) -> Option<(u64, u64, u64)> {
    let mut wanted: BTreeMap<u32, u64> = BTreeMap::new();
    for mapping in mappings {
        if let MappingKind::HugePages { log2 } = mapping.kind {
            *wanted.entry(log2).or_default() += (mapping.end - mapping.start) >> log2;
        }
    }
    let short = wanted.into_iter().map(|(log2, wanted)| (1 << log2, wanted, free(log2)));
    short.into_iter().find(|(_, wanted, free)| wanted > free)
}

/// How many pages of a size nobody has or was promised.
fn free(log2: u32) -> u64 {
    let dir = Path::new(COUNTS).join(format!("hugepages-{}kB", (1u64 << log2) >> 10));
    let count = |name: &str| -> u64 {
        let text = std::fs::read_to_string(dir.join(name)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    count("free_hugepages").saturating_sub(count("resv_hugepages"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_such_pages_is_short_of_them() {
        let mapping = |kind| Mapping {
            start: 0x4000_0000,
            end: 0x4040_0000,
            protection: 3,
            kind,
            flags: Vec::new(),
            name: None,
        };
        // No machine has pages of this size.
        let huge = mapping(MappingKind::HugePages { log2: 22 });
        assert_eq!(missing(std::slice::from_ref(&huge)), Some((4 << 20, 1, 0)));
        assert_eq!(total(&[huge, mapping(MappingKind::Anonymous)]), 4 << 20);
        assert_eq!(missing(&[mapping(MappingKind::Anonymous)]), None);
    }
}
