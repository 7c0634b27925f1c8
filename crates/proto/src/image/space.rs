//! An address space, as it travels: what is mapped where, without what is in it.

use super::FileRef;
use serde::{Deserialize, Serialize};

/// An address space without its pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Code, data, heap, stack, arguments, environment: start_code, end_code, start_data, end_data, start_brk, brk,
    /// start_stack, arg_start, arg_end, env_start, env_end.
    pub layout: [u64; 11],
    /// The auxiliary vector.
    pub auxv: Vec<u8>,
    /// The program.
    pub exe: FileRef,
    /// The files that mappings name by index.
    pub files: Vec<FileRef>,
    /// The mappings, ascending.
    pub mappings: Vec<Mapping>,
    /// A hash of the vDSO's bytes: code of another kernel build cannot stand in for it.
    pub vdso_hash: [u8; 32],
}

impl Space {
    /// What is wrong with it, if it comes from a peer that is: mappings must be whole pages in the order of their addresses,
    /// and of files that are listed.
    pub fn unsound(&self) -> Option<&'static str> {
        const PAGE: u64 = 4096;
        let whole = |m: &Mapping| m.start < m.end && m.start.is_multiple_of(PAGE) && m.end.is_multiple_of(PAGE);
        let ordered = self.mappings.windows(2).all(|pair| pair[0].end <= pair[1].start);
        if !ordered || !self.mappings.iter().all(whole) {
            return Some("its mappings overlap or are not whole pages");
        }
        let listed = |m: &Mapping| m.kind.file().is_none_or(|file| (file as usize) < self.files.len());
        match self.mappings.iter().all(listed) {
            true => None,
            false => Some("a mapping of a file that is not listed"),
        }
    }
}

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// PROT_READ, PROT_WRITE, PROT_EXEC.
    pub protection: u32,
    /// What is behind it.
    pub kind: MappingKind,
    /// The flags of `VmFlags` that were set by madvise(2), mlock(2) or mmap(2), two letters each.
    pub flags: Vec<[u8; 2]>,
    /// Its PR_SET_VMA_ANON_NAME.
    pub name: Option<Vec<u8>>,
}

/// What is behind a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MappingKind {
    /// Private anonymous memory: its pages are demand-paged.
    Anonymous,
    /// A private mapping of a file: pages that the program wrote travel before the resume.
    PrivateFile {
        /// Which of [`Space::files`].
        file: u32,
        /// Where it begins in the file.
        offset: u64,
    },
    /// A shared mapping of a file that both nodes see.
    SharedFile {
        /// Which of [`Space::files`].
        file: u32,
        /// Where it begins in the file.
        offset: u64,
        /// The file must be opened for writing.
        writable: bool,
    },
    /// Memory without a name that several processes may share (MAP_SHARED with MAP_ANONYMOUS).
    SharedMemory {
        /// Which: the same number in all processes of a move.
        memory: u64,
        /// Where it begins in that memory.
        offset: u64,
        /// The length of the whole memory, in bytes.
        length: u64,
    },
    /// Private memory of explicit huge pages (MAP_HUGETLB): what the program wrote travels before the resume.
    HugePages {
        /// The size of one, as a power of two (21: 2 MiB).
        log2: u32,
    },
    /// The kernel's own: `[vdso]`, `[vvar]`, `[vvar_vclock]`, in this order of the letter.
    Kernel(KernelMapping),
}

impl MappingKind {
    /// Do the pages that the program wrote travel before the resume?
    pub fn is_copied(self) -> bool {
        matches!(self, MappingKind::PrivateFile { .. } | MappingKind::HugePages { .. })
    }

    /// Which of [`Space::files`] is mapped.
    pub fn file(self) -> Option<u32> {
        match self {
            MappingKind::PrivateFile { file, .. } | MappingKind::SharedFile { file, .. } => Some(file),
            MappingKind::Anonymous
            | MappingKind::SharedMemory { .. }
            | MappingKind::HugePages { .. }
            | MappingKind::Kernel(_) => None,
        }
    }
}

/// A mapping that the kernel makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum KernelMapping {
    /// The code.
    Vdso,
    /// Its data.
    Vvar,
    /// Its data for paravirtual clocks (Linux 6.13 and later).
    VvarClock,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(ranges: &[(u64, u64, MappingKind)]) -> Space {
        let mapping = |(start, end, kind): &(u64, u64, MappingKind)| Mapping {
            start: *start,
            end: *end,
            protection: 3,
            kind: *kind,
            flags: Vec::new(),
            name: None,
        };
        let file = FileRef {
            path: b"/bin/true".to_vec(),
            size: 1,
            modified_ns: 0,
            mode: 0o100_755,
            inode: 1,
        };
        Space {
            layout: [0; 11],
            auxv: Vec::new(),
            exe: file.clone(),
            files: vec![file],
            mappings: ranges.iter().map(mapping).collect(),
            vdso_hash: [0; 32],
        }
    }

    #[test]
    fn what_a_peer_got_wrong_is_named() {
        let (anonymous, file) = (MappingKind::Anonymous, |file| MappingKind::PrivateFile {
            file,
            offset: 0,
        });
        let good = [(0x1000, 0x2000, anonymous), (0x2000, 0x4000, file(0))];
        assert_eq!(space(&good).unsound(), None);
        let bad = [
            vec![(0x2000, 0x3000, anonymous), (0x1000, 0x2000, anonymous)],
            vec![(0x1000, 0x3000, anonymous), (0x2000, 0x4000, anonymous)],
            vec![(0x1000, 0x1000, anonymous)],
            vec![(0x1000, 0x2001, anonymous)],
            vec![(0x1000, 0x2000, file(1))],
        ];
        for ranges in bad {
            assert!(space(&ranges).unsound().is_some(), "{ranges:?}");
        }
    }
}
