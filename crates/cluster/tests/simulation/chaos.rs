//! A beat of chaos: programs live, and now and then something breaks.

use crate::oracle::{CopyState, Violation};
use crate::world::{CROWD, MODULUS, World};
use dunlin_cluster::relocation::source::SourceEvent;
use dunlin_cluster::table::{Place, Whereabouts};
use dunlin_proto::ids::{MoveId, Pid, Slot};

impl World {
    /// Programs live; now and then something breaks.
    pub fn beat(&mut self) -> Result<(), Violation> {
        let slots = self.slots();
        let Some(slot) = self.shared.rng.pick(&slots) else {
            return Ok(());
        };
        if self.healed {
            return slots.into_iter().try_for_each(|slot| self.page_in(slot));
        }
        if self.shared.rng.chance(self.shared.faults.kill_per_beat) && self.is_up(slot) {
            self.kill(slot);
            return self.check();
        }
        if self.shared.rng.chance(20) && self.shared.faults.loss > 0 {
            self.shared.cut = if self.shared.cut.is_some() { None } else { Some(slot) };
        }
        match self.shared.rng.below(100) {
            0..=24 => self.fork(slot),
            25..=39 => self.new_thread(slot),
            40..=44 => self.end_thread(slot),
            45..=52 => self.exit(slot),
            53..=62 => self.page_in(slot),
            63..=64 => self.cancel(slot),
            65..=66 => self.false_alarm(slot),
            _ => self.start_move(slot),
        }
    }

    fn running(&self, slot: Slot) -> Vec<Pid> {
        let tasks = self.nodes[&slot].tasks.iter();
        tasks
            .filter(|(_, t)| t.state == CopyState::Running)
            .map(|(pid, _)| *pid)
            .collect()
    }

    fn fork(&mut self, slot: Slot) -> Result<(), Violation> {
        let running = self.running(slot);
        if running.len() >= CROWD {
            return Ok(());
        }
        let parent = self.shared.rng.pick(&running);
        let node = self.nodes.get_mut(&slot).expect("a slot of ours");
        match node.fork(&mut self.shared, parent) {
            Some(pid) => {
                self.shared.census.forks += 1;
                self.check_unique(pid)
            }
            None => {
                self.shared.census.exhausted += 1;
                Ok(())
            }
        }
    }

    fn new_thread(&mut self, slot: Slot) -> Result<(), Violation> {
        let running = self.running(slot);
        let Some(pid) = self.shared.rng.pick(&running) else {
            return Ok(());
        };
        let node = self.nodes.get_mut(&slot).expect("a slot of ours");
        if node.tasks[&pid].threads.len() >= 3 {
            return Ok(());
        }
        match node.new_thread(pid) {
            Some(tid) => self.check_unique(tid),
            None => Ok(()),
        }
    }

    fn end_thread(&mut self, slot: Slot) -> Result<(), Violation> {
        let running = self.running(slot);
        let Some(pid) = self.shared.rng.pick(&running) else {
            return Ok(());
        };
        let task = self.nodes.get_mut(&slot).and_then(|n| n.tasks.get_mut(&pid));
        task.map(|t| t.threads.pop_first());
        Ok(())
    }

    fn exit(&mut self, slot: Slot) -> Result<(), Violation> {
        let running = self.running(slot);
        let Some(pid) = self.shared.rng.pick(&running) else {
            return Ok(());
        };
        self.shared.census.exits += 1;
        self.shared.check = true;
        self.on(slot, |node, w| node.exit(w, pid))
    }

    fn page_in(&mut self, slot: Slot) -> Result<(), Violation> {
        let node = &self.nodes[&slot];
        let running = node.tasks.iter().filter(|(_, t)| t.state == CopyState::Running);
        let wanted: Vec<_> = running
            .flat_map(|(pid, t)| t.images.iter().map(|m| (*pid, *m)))
            .collect();
        for (pid, move_id) in wanted {
            if self.is_up(slot) && (self.healed || self.shared.rng.chance(500)) {
                self.on(slot, |node, w| node.page_in(w, pid, move_id))?;
            }
        }
        Ok(())
    }

    fn cancel(&mut self, slot: Slot) -> Result<(), Violation> {
        let Some(daemon) = &self.nodes[&slot].daemon else {
            return Ok(());
        };
        let ids: Vec<MoveId> = daemon.sources.keys().copied().collect();
        match self.shared.rng.pick(&ids) {
            // Without faults, every move is to take place.
            Some(id) if self.shared.faults.engine > 0 => {
                self.on(slot, |node, w| node.tell_source(w, id, SourceEvent::Cancel))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn false_alarm(&mut self, slot: Slot) -> Result<(), Violation> {
        let slots = self.slots();
        match self.shared.rng.pick(&slots) {
            Some(peer) if self.is_up(slot) && self.shared.faults.loss > 0 => {
                self.on(slot, |node, w| node.peer_lost(w, peer))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn start_move(&mut self, slot: Slot) -> Result<(), Violation> {
        let others: Vec<Slot> = self.slots().into_iter().filter(|s| *s != slot).collect();
        let Some(to) = self.shared.rng.pick(&others) else {
            return Ok(());
        };
        let mut free: Vec<Pid> = self.running(slot);
        free.retain(|pid| self.nodes[&slot].is_free(*pid));
        let Some(root) = self.shared.rng.pick(&free) else {
            return Ok(());
        };
        let mut pids = vec![root];
        if self.shared.rng.chance(300) {
            let rng = &mut self.shared.rng;
            pids.extend(free.into_iter().filter(|pid| *pid != root && rng.chance(500)));
        }
        if self.shared.faults.kill_per_action + self.shared.faults.engine + self.shared.faults.loss == 0 {
            // Other homes may not have heard yet where a process is, and then refuse: not a failure of the protocol.
            pids.retain(|pid| self.home_knows(*pid, slot));
        }
        if pids.first() != Some(&root) {
            return Ok(());
        }
        self.shared.census.trees += u64::from(pids.len() > 1);
        self.on(slot, |node, w| node.start_move(w, &pids, to))
    }

    fn home_knows(&self, pid: Pid, slot: Slot) -> bool {
        let home = MODULUS.home(pid).and_then(|home| self.nodes.get(&home));
        let Some(daemon) = home.and_then(|n| n.daemon.as_ref()) else {
            return false;
        };
        daemon.home.table().whereabouts(pid) == Whereabouts::Known(Place::At(slot))
    }
}
