//! The second holder of userfaultfds: init.
//!
//! If the last copy of a userfaultfd is closed while pages are elsewhere, the program reads zeros there, silently. So
//! init has a copy of each, and of the journal of its space, until the pager is done with it: a dead daemon means
//! waiting, and the next one goes on. Owns their labels. Refuses to know what becomes of the pages. Invariant: of one
//! space there is one label, whatever daemon serves it.

use super::lock;
use crate::nest::Nest;
use crate::pager::{Finish, Observer, SpaceHandle, SpaceId};
use dunlin_proto::ids::Pid;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

const UFFD: &str = "uffd/";

/// Keeps copies of the userfaultfds of one process and of those forked from it.
pub struct SecondHand {
    nest: Nest,
    root: String,
    labels: Mutex<BTreeMap<SpaceId, String>>,
}

/// What is written beside the descriptors.
#[derive(Debug, Serialize, Deserialize)]
struct Beside {
    /// Whose space it is: in the nest, and on this machine. Of a child that was forked while pages were away it is not
    /// known.
    process: Option<(Pid, i32)>,
}

/// What init has of one space.
pub struct Kept {
    /// Under which name.
    pub label: String,
    /// Whose it is, if that is known: in the nest, and on this machine.
    pub process: Option<(Pid, i32)>,
    /// The userfaultfd.
    pub uffd: OwnedFd,
    /// Its journal.
    pub journal: OwnedFd,
}

impl SecondHand {
    /// For a process that arrives.
    pub fn new(nest: Nest) -> SecondHand {
        SecondHand {
            nest,
            root: format!("{UFFD}{:016x}", super::random()),
            labels: Mutex::default(),
        }
    }

    /// For a family that a former daemon served: its spaces, by their new names.
    pub fn again(nest: Nest, spaces: impl IntoIterator<Item = (SpaceId, String)>) -> SecondHand {
        let labels: BTreeMap<SpaceId, String> = spaces.into_iter().collect();
        let root = labels.values().next().map_or(UFFD, |label| family_of(label)).to_owned();
        SecondHand {
            nest,
            root,
            labels: Mutex::new(labels),
        }
    }

    /// Hands init copies of the arriving process's own; before it runs.
    pub fn keep(
        &self,
        space: SpaceId,
        process: (Pid, i32),
        uffd: BorrowedFd<'_>,
        journal: impl AsFd,
    ) -> io::Result<()> {
        lock(&self.labels).insert(space, self.root.clone());
        self.store(&self.root, Some(process), uffd, journal.as_fd())
    }

    fn store(
        &self,
        label: &str,
        process: Option<(Pid, i32)>,
        uffd: BorrowedFd<'_>,
        journal: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let blob = postcard::to_stdvec(&Beside { process }).map_err(io::Error::other)?;
        self.nest.store_with(label, &[uffd, journal], blob)
    }

    fn forget(&self, space: SpaceId) {
        if let Some(label) = lock(&self.labels).remove(&space)
            && let Err(error) = self.nest.drop_label(&label)
        {
            tracing::error!(%error, "init did not give up its copy of a userfaultfd");
        }
    }
}

impl Observer for SecondHand {
    fn forked(&self, _: SpaceId, child: &SpaceHandle, uffd: BorrowedFd<'_>, journal: BorrowedFd<'_>) {
        let label = format!("{}/{:016x}", self.root, super::random());
        if let Err(error) = self.store(&label, None, uffd, journal) {
            tracing::error!(%error, "init could not take a copy of a userfaultfd");
        }
        lock(&self.labels).insert(child.id(), label);
    }

    fn finished(&self, space: SpaceId, how: Finish) {
        match how {
            Finish::Drained | Finish::Gone => self.forget(space),
            // Its process is frozen, and may have to go on here.
            Finish::Withdrawn => {}
        }
    }

    fn let_go(&self, space: SpaceId) {
        self.forget(space);
    }

    fn renamed(&self, old: SpaceId, new: SpaceId, uffd: BorrowedFd<'_>, journal: BorrowedFd<'_>) {
        let Some(label) = lock(&self.labels).remove(&old) else {
            return;
        };
        let process = match self.nest.fetch(&label) {
            Ok(Some((_, blob))) => postcard::from_bytes(&blob).ok().and_then(|b: Beside| b.process),
            Ok(None) | Err(_) => None,
        };
        if let Err(error) = self.store(&label, process, uffd, journal) {
            tracing::error!(%error, "init could not take a copy of a userfaultfd again");
        }
        lock(&self.labels).insert(new, label);
    }
}

/// All that init has of spaces, by family.
pub fn kept(nest: &Nest, labels: &[String]) -> io::Result<Vec<Vec<Kept>>> {
    let mut families: BTreeMap<String, Vec<Kept>> = BTreeMap::new();
    for label in labels.iter().filter(|label| label.starts_with(UFFD)) {
        let Some((fds, blob)) = nest.fetch(label)? else {
            continue;
        };
        let unsound = || io::Error::other(format!("what init keeps as {label} is no address space"));
        let Ok([uffd, journal]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(unsound());
        };
        let Beside { process } = postcard::from_bytes(&blob).map_err(|_| unsound())?;
        families.entry(family_of(label).to_owned()).or_default().push(Kept {
            label: label.clone(),
            process,
            uffd,
            journal,
        });
    }
    Ok(families.into_values().collect())
}

/// Children are named after the first one.
fn family_of(label: &str) -> &str {
    let end = label[UFFD.len()..].find('/').map_or(label.len(), |at| UFFD.len() + at);
    &label[..end]
}
