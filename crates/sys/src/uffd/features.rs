//! What a userfaultfd can do, and which faults of a range it raises.

use std::fmt;
use std::ops::BitOr;

/// What a userfaultfd can be asked to do beyond plain missing-page faults.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Features(pub u64);

impl Features {
    /// A fork gives the child's address space a userfaultfd of its own, in [`Event::Fork`](super::Event::Fork). Without it the child reads
    /// missing pages as zeros. Negotiating it wants CAP_SYS_PTRACE.
    pub const EVENT_FORK: Features = Features(1 << 1);
    /// mremap raises [`Event::Remap`](super::Event::Remap).
    pub const EVENT_REMAP: Features = Features(1 << 2);
    /// MADV_DONTNEED, MADV_FREE and MADV_REMOVE raise [`Event::Remove`](super::Event::Remove).
    pub const EVENT_REMOVE: Features = Features(1 << 3);
    /// Missing pages of hugetlbfs.
    pub const MISSING_HUGETLBFS: Features = Features(1 << 4);
    /// Missing pages of shared memory.
    pub const MISSING_SHMEM: Features = Features(1 << 5);
    /// Every unmapping raises [`Event::Unmap`](super::Event::Unmap).
    pub const EVENT_UNMAP: Features = Features(1 << 6);
    /// Faults carry the thread that raised them.
    pub const THREAD_ID: Features = Features(1 << 8);
    /// Pages of shared memory that exist, but not in this page table.
    pub const MINOR_SHMEM: Features = Features(1 << 10);
    /// Write protection of shared memory.
    pub const WP_HUGETLBFS_SHMEM: Features = Features(1 << 12);
    /// Write protection covers pages that do not exist yet.
    pub const WP_UNPOPULATED: Features = Features(1 << 13);
    /// [`Uffd::poison`](super::Uffd::poison).
    pub const POISON: Features = Features(1 << 14);
    /// Write faults are resolved by the kernel and only recorded, for [`crate::pagemap`] to find.
    pub const WP_ASYNC: Features = Features(1 << 15);

    /// The four events about changes of the address space: without all of them its pages cannot be followed.
    pub const CHANGES: Features =
        Features(Self::EVENT_FORK.0 | Self::EVENT_REMAP.0 | Self::EVENT_REMOVE.0 | Self::EVENT_UNMAP.0);

    const NAMES: [(Features, &'static str); 12] = [
        (Self::EVENT_FORK, "EVENT_FORK"),
        (Self::EVENT_REMAP, "EVENT_REMAP"),
        (Self::EVENT_REMOVE, "EVENT_REMOVE"),
        (Self::MISSING_HUGETLBFS, "MISSING_HUGETLBFS"),
        (Self::MISSING_SHMEM, "MISSING_SHMEM"),
        (Self::EVENT_UNMAP, "EVENT_UNMAP"),
        (Self::THREAD_ID, "THREAD_ID"),
        (Self::MINOR_SHMEM, "MINOR_SHMEM"),
        (Self::WP_HUGETLBFS_SHMEM, "WP_HUGETLBFS_SHMEM"),
        (Self::WP_UNPOPULATED, "WP_UNPOPULATED"),
        (Self::POISON, "POISON"),
        (Self::WP_ASYNC, "WP_ASYNC"),
    ];

    /// Are all of `other` among these?
    pub fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    /// These without `other`.
    pub fn without(self, other: Features) -> Features {
        Features(self.0 & !other.0)
    }
}

impl BitOr for Features {
    type Output = Features;
    fn bitor(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = (Self::NAMES.iter())
            .filter(|(feature, _)| self.contains(*feature))
            .map(|(_, name)| *name)
            .collect();
        f.write_str(&names.join(", "))
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({self})")
    }
}

/// Which faults of a range are raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watch(u64);

impl Watch {
    /// Accesses to pages that do not exist.
    pub const MISSING: Watch = Watch(1);
    /// Writes to pages that are write-protected by [`Uffd::write_protect`](super::Uffd::write_protect).
    pub const WRITE_PROTECT: Watch = Watch(2);
    /// Accesses to pages that exist in the file, but not in this page table.
    pub const MINOR: Watch = Watch(4);

    pub(super) fn bits(self) -> u64 {
        self.0
    }
}

impl BitOr for Watch {
    type Output = Watch;
    fn bitor(self, other: Watch) -> Watch {
        Watch(self.0 | other.0)
    }
}
