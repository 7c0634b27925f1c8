//! The second holder of userfaultfds: init.
//!
//! If the last copy of a userfaultfd is closed while pages are elsewhere, the program reads zeros there, silently. So
//! init has a copy of each until the pager is done with it: a dead daemon means waiting. Owns their labels. Refuses to
//! know what becomes of the pages.

use crate::nest::Nest;
use crate::pager::{Finish, Observer, SpaceHandle, SpaceId};
use std::os::fd::BorrowedFd;

/// Keeps copies of the userfaultfds of one process and of those forked from it.
pub struct SecondHand {
    nest: Nest,
    root: String,
}

impl SecondHand {
    /// For the process that arrives with the given host number.
    pub fn new(nest: Nest, host: i32) -> SecondHand {
        SecondHand {
            nest,
            root: format!("uffd/{host}-{:x}", super::random()),
        }
    }

    /// Hands init a copy of the arriving process's own; before it runs.
    pub fn keep(&self, uffd: BorrowedFd<'_>) -> std::io::Result<()> {
        self.nest.store_with(&self.root, &[uffd], Vec::new())
    }

    fn label(&self, space: SpaceId) -> String {
        format!("{}/{}", self.root, space.0)
    }
}

impl Observer for SecondHand {
    fn forked(&self, _: SpaceId, child: &SpaceHandle, uffd: BorrowedFd<'_>) {
        if let Err(error) = self.nest.store_with(&self.label(child.id()), &[uffd], Vec::new()) {
            tracing::error!(%error, "init could not take a copy of a userfaultfd");
        }
    }

    fn finished(&self, space: SpaceId, _: Finish) {
        // One of the two is this space's: the first one's label has no number, as it is kept before it has one.
        let forked = self.nest.drop_label(&self.label(space));
        if matches!(forked, Ok(false)) {
            let _ = self.nest.drop_label(&self.root);
        }
    }
}
