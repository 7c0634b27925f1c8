//! What a former daemon had frozen is given away, or let run on, by the one that came after it.
//!
//! Owns that for the source of a move. Refuses to decide which of the two: the protocol's machine does, as ever. What was
//! frozen is found again by the arena in its memory (`capture::held`).

use super::Mover;
use super::outgoing::Outgoing;
use super::party::children_of;
use super::records::Left;
use crate::capture::CaptureError;
use crate::capture::held::{Abandoned, PATIENCE};
use crate::page_server::NewImage;
use dunlin_cluster::relocation::source::{SourceEvent, SourceStage};
use dunlin_proto::ids::Pid;
use dunlin_sys::procfs::ProcDir;
use std::fs::File;
use std::time::Duration;

impl Outgoing<'_> {
    /// The move came to nothing: it runs on here.
    pub(super) fn thaw_left(&mut self) {
        for left in std::mem::take(&mut self.left) {
            if let Some(withdrawn) = self.withdrawn.remove(&left.pid) {
                self.mover.adopt_again(left.pid, withdrawn);
            }
            self.mover.let_run_on(left.pid, left.host);
        }
    }

    /// The move was made.
    pub(super) fn leave_left(&mut self) {
        let mut left = std::mem::take(&mut self.left);
        let leaving: Vec<i32> = left.iter().map(|left| left.host).collect();
        left.retain(|one| {
            let is_left = self.leave_again(one, &leaving);
            if let Some(image) = one.image.filter(|_| is_left) {
                self.mover.images.will_not_come(image);
            }
            !is_left
        });
        self.left = left;
        self.miss_images();
    }

    /// Of what a former daemon had cleared away to the end, nothing is here, and nobody will say that it is not needed.
    fn miss_images(&mut self) {
        let Some(SourceStage::Image { undrained, .. }) = self.kept.as_ref().map(|record| &record.stage) else {
            return;
        };
        let is_here = |pid: &Pid| self.keepers.contains_key(pid) || self.left.iter().any(|left| left.pid == *pid);
        let missing: Vec<Pid> = undrained.iter().filter(|pid| !is_here(pid)).copied().collect();
        let drained = |pid| SourceEvent::Drained(self.plan.destination, pid);
        self.events.splice(0..0, missing.into_iter().map(drained));
    }

    /// What a former daemon had parked is another node's by now. Whether it is cleared away.
    fn leave_again(&mut self, left: &Left, leaving: &[i32]) -> bool {
        let (mover, pid) = (self.mover.clone(), left.pid);
        mover.exits.left(pid);
        let is_its_own = |found: &Abandoned| {
            found
                .arena()
                .is_ok_and(|arena| left.arena.is_none_or(|its| its == arena))
        };
        let found = Abandoned::find(pid, left.host).ok().flatten().filter(is_its_own);
        if let Some(abandoned) = found.filter(|_| mover.nest.host_pid(pid).ok().flatten() == Some(left.host)) {
            let arena = abandoned.arena().ok();
            let keeper = children_of(left.host).into_iter().find(|(child, host)| {
                Abandoned::find(*child, *host).is_ok_and(|found| found.is_some_and(|found| found.arena().ok() == arena))
            });
            let into_image = || abandoned.into_image(left.pending.clone(), keeper.map(|(child, _)| child));
            let remember = |number| self.remember_image(pid, number);
            match mover.leave_behind((pid, left.host, false), into_image, leaving, remember) {
                Ok((_, keeper)) => self.serve_again(left, keeper),
                Err(error) => {
                    tracing::error!(%pid, %error, "a departed process was not cleared away: the next daemon tries again");
                    return false;
                }
            }
        }
        mover.streams.departed(pid, &left.streams, self.plan.destination);
        mover.residents.remove(pid);
        if mover.arrivals.remove(pid).is_some() {
            mover.forget_arrival(pid);
        }
        true
    }

    fn serve_again(&mut self, left: &Left, keeper: i32) {
        let pid = left.pid;
        if self.keepers.insert(pid, keeper).is_some() {
            // It was made known to init before the former daemon died, and is served already: whoever has claimed it since
            // will release that one.
            return;
        }
        if self.released.contains(&pid) {
            // All its pages were fetched while it was parked: nobody will come for this image, nor release it.
            return;
        }
        let open = |name: &str| File::open(ProcDir::process(keeper).path(name));
        let (Some(id), Ok(mem), Ok(pagemap)) = (self.images.get(&pid).copied(), open("mem"), open("pagemap")) else {
            return tracing::error!(%pid, "the pages that a process left here cannot be served");
        };
        self.mover.images.register(NewImage {
            id,
            mem,
            pagemap,
            keeper: Some(keeper),
            regions: left.regions.clone(),
            on_unused: self.on_unused(pid),
        });
    }
}

impl Mover {
    /// Lets a process run on that a former daemon held. Nothing to do if it runs already.
    pub(super) fn let_run_on(&self, pid: Pid, host: i32) {
        self.let_run_on_within(pid, host, PATIENCE);
    }

    /// The same, where it may first have to wait for pages.
    pub(super) fn let_run_on_within(&self, pid: Pid, host: i32, patience: Duration) {
        match crate::sockets::recovery::put_back(host) {
            Ok(0) => {}
            Ok(sockets) => tracing::info!(%pid, sockets, "sockets of a process that was held go on"),
            Err(error) => tracing::error!(%pid, %error, "sockets of a process that was held"),
        }
        let done = Abandoned::find(pid, host).and_then(|found| match found {
            Some(abandoned) => abandoned.run_on(patience),
            None => Ok(()),
        });
        match done {
            Ok(()) | Err(CaptureError::Gone) => {}
            Err(error) => tracing::error!(%pid, %error, "a process that was held could not be let run on"),
        }
    }
}
