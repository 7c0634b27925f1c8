//! What a destination does after the decision: the processes run here, or what was made for them goes.
//!
//! Owns the last steps of an arrival, also of one that a former daemon has rebuilt. Invariants: what a later daemon must
//! know of a process is written down before it runs; a blank that was made for the move is ended, one that had been a
//! surrogate becomes one again.

use super::arrivals::Arrival;
use super::incoming::{Incoming, Placed};
use super::lock;
use super::party::children_of;
use super::payload::FrozenProcess;
use super::records::{ArrivalRecord, KeptPlace};
use crate::pager::SpaceHandle;
use crate::processes::{HiddenKind, Resident};
use crate::restore::{Common, RestoreError};
use crate::steps;
use dunlin_proto::control::Side;
use dunlin_proto::ids::{ImageId, MoveId, RunId, Slot};
use dunlin_proto::image::Plan;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

impl Incoming {
    pub(super) fn resume(&mut self) {
        self.resume_waiting();
        steps::mark("asking the home");
        for index in 0..self.frozen.len() {
            self.mover.remember_arrival(&self.arrival_of(index));
        }
        steps::mark("keeping the record of the arrival");
        self.arriving.speak(&self.mover.edge);
        for process in &self.frozen {
            self.mover.tell_signals(&process.essence.lineage.children);
        }
        // Before any of them runs: what one does to another from then on is not done to a surrogate.
        for index in 0..self.frozen.len() {
            self.enter(index);
        }
        steps::mark("sockets and signals");
        let blanks = std::mem::take(&mut self.blanks);
        for (blank, process) in blanks.into_iter().zip(&self.frozen) {
            let pid = blank.pid;
            match blank.resume(&process.essence) {
                Ok(_) => {}
                // Somebody has killed it: its end is told as any other.
                Err(RestoreError::Died(_)) => tracing::debug!(%pid, "a granted process has ended before it ran"),
                Err(error) => tracing::error!(%pid, %error, "a granted process could not be resumed"),
            }
        }
        let resumed = Instant::now();
        self.steps = steps::take(Side::Destination);
        self.common = Common::default();
        self.arriving.let_go();
        for index in 0..self.frozen.len() {
            self.arrive(index);
        }
        // The source hears of it next.
        let told_after_us = resumed.elapsed().as_secs_f64() * 1e6;
        for process in &self.frozen {
            let pid = process.essence.lineage.pid;
            self.mover.arrivals.ran(pid, self.steps.clone(), told_after_us);
        }
    }

    /// What is kept of a process that waits for the decision.
    pub(super) fn place_of(&self, index: usize) -> KeptPlace {
        let Placed { pid, place, comm } = &self.places[index];
        KeptPlace {
            pid: *pid,
            host: place.host,
            comm: comm.clone(),
            arrival: self.arrival_of(index),
            sockets: self.kept_sockets[index].clone(),
        }
    }

    /// Lets those run that a former daemon has rebuilt.
    fn resume_waiting(&mut self) {
        /// Whoever has the pages may have to be started again, too.
        const PATIENCE: Duration = Duration::from_secs(60);
        for (place, space) in std::mem::take(&mut self.waiting) {
            let (mover, pid) = (&self.mover, place.pid);
            // One that the former daemon was about to resume is known already, and is served.
            let is_known = mover.arrivals.get(pid).is_some();
            mover.remember_arrival(&place.arrival);
            mover.hidden.remove(pid);
            let arrived = match is_known {
                true => Ok(None),
                false => mover.recover_arrival(place.arrival),
            };
            if let Some(space) = space {
                mover.adopt_again(pid, space);
            }
            mover.log("unregistering a surrogate", mover.nest.unregister_surrogate(pid));
            let spoken = crate::sockets::recovery::speak(&mover.edge, place.host, &place.sockets);
            mover.log("letting sockets of a former daemon go on", spoken);
            mover.let_run_on_within(pid, place.host, PATIENCE);
            match arrived {
                Ok(None) => {}
                Ok(Some(ended)) => mover.vanished(ended),
                Err(error) => tracing::error!(%pid, %error, "an arrived process cannot be watched"),
            }
        }
    }

    /// What a later daemon must know of a process that came; written down before it runs.
    fn arrival_of(&self, index: usize) -> ArrivalRecord {
        let process = &self.frozen[index];
        let lineage = &process.essence.lineage;
        let member = self.members.iter().find(|m| m.pid == lineage.pid);
        let mut images: BTreeMap<ImageId, MoveId> = process.images.iter().copied().collect();
        images.insert(self.prepared[index].image, self.id);
        ArrivalRecord {
            pid: lineage.pid,
            moves: lineage.moves + 1,
            command: lineage.command.clone(),
            incarnation: member.map(|m| m.incarnation.after_commit()).unwrap_or_default(),
            ids: member.map(|m| m.ids.clone()).unwrap_or_default(),
            images: images.into_iter().collect(),
            relatives: self.relatives[index].clone(),
            uid: process.essence.traits.uids[0],
        }
    }

    /// Its number is that of a process here, no more that of what stood for it.
    fn enter(&self, index: usize) {
        let record = self.arrival_of(index);
        let (pid, incarnation) = (record.pid, record.incarnation);
        let mover = &self.mover;
        let space = self.spaces[index].clone();
        let elsewhere = elsewhere(space.clone());
        mover.residents.insert(
            pid,
            Resident {
                moves: record.moves,
                command: record.command,
                incarnation,
                frozen: false,
                elsewhere,
            },
        );
        mover.arrivals.insert(
            pid,
            Arrival {
                ids: record.ids,
                images: record.images.into_iter().collect(),
                space: Some(space),
                relatives: record.relatives,
                verified_pages: self.verified.get(&pid).copied(),
                steps: Vec::new(),
                told_after_us: 0.0,
            },
        );
        lock(&mover.busy).insert(pid, self.id);
        mover.orders.arrive(pid, self.frozen[index].obeyed.clone());
        mover.hidden.remove(pid);
    }

    /// It runs.
    fn arrive(&self, index: usize) {
        let process = &self.frozen[index];
        let lineage = &process.essence.lineage;
        let (pid, uid) = (lineage.pid, process.essence.traits.uids[0]);
        let mover = &self.mover;
        if self.places[index].place.stood_before {
            mover.log("unregistering a surrogate", mover.nest.unregister_surrogate(pid));
        }
        let streams = streams_of(process, &self.prepared[index].plan);
        match mover.nest.pidfd(pid) {
            Ok(Some(pidfd)) => {
                let watched = mover.exits.watch(pid, pidfd, uid);
                mover.log("watching an arrived process", watched.map(|_| ()));
            }
            // It has ended already: its parent here has been told by the kernel, its home is told by the tick.
            Ok(None) => mover.vanished(pid),
            Err(error) => tracing::error!(%pid, %error, "an arrived process cannot be watched"),
        }
        mover.streams.arrived(pid, &streams);
        tracing::info!(%pid, from = %self.id.source, moves = lineage.moves + 1, "a process has arrived");
    }

    pub(super) fn destroy(&mut self) {
        for (place, space) in std::mem::take(&mut self.waiting) {
            self.mover.stand_for(place.pid, place.host, &place.comm);
            if let Some(space) = space {
                self.mover.hand_over(BTreeMap::from([(place.pid, space)]));
            }
        }
        // A failure leaves one place half-made; those after it are as they were found or made.
        let touched = std::mem::take(&mut self.blanks).len() + 1;
        for (index, Placed { pid, place, comm }) in std::mem::take(&mut self.places).into_iter().enumerate() {
            self.mover.orders.leave(pid);
            if let Some(space) = self.mover.ahead.remove(self.id, pid) {
                // Whatever it answers: nothing is installed from here on.
                drop(space.withdraw());
            }
            if !place.stood_before {
                // Its end is nobody's: the surrogate of its parent will tell of it.
                self.mover.hidden.insert(pid, HiddenKind::Leaving);
                // What was made under it stands for children of a process that is not here; it would keep the number in use.
                for (child, _) in children_of(place.host) {
                    self.mover.entries.discard(child);
                }
                if let Some(host) = rustix::process::Pid::from_raw(place.host) {
                    let _ = rustix::process::kill_process(host, rustix::process::Signal::KILL);
                }
            } else if index < touched {
                let restored = self.mover.entries.stand_again(pid, place.host, &comm);
                self.mover.log("making a surrogate stand again", restored);
            }
        }
        self.relatives.clear();
        self.spaces.clear();
        self.common = Common::default();
    }
}

/// How many pages of a space are elsewhere, by node.
pub(super) fn elsewhere(space: SpaceHandle) -> Arc<dyn Fn() -> BTreeMap<Slot, u64> + Send + Sync> {
    Arc::new(move || {
        let mut by_node = BTreeMap::new();
        if space.progress().finished.is_none() {
            for (image, pages) in space.pages_elsewhere() {
                *by_node.entry(image.holder).or_insert(0) += pages;
            }
        }
        by_node
    })
}

fn streams_of(process: &FrozenProcess, plan: &Plan) -> Vec<(RunId, u8)> {
    let files = process.essence.files.as_ref().unwrap_or(&plan.image.files);
    files.streams()
}
