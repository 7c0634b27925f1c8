//! The promises looked at from outside: after every step, and when all is settled.

use crate::node::{Node, Task};
use crate::oracle::{Copy, CopyState, Life, Violation};
use crate::world::{MODULUS, World};
use dunlin_cluster::table::{Place, Whereabouts};
use dunlin_proto::ids::{MoveId, Pid, Slot};
use std::collections::{BTreeMap, BTreeSet};

impl World {
    pub fn unfinished(&self) -> Option<String> {
        self.nodes.values().find_map(Node::unfinished)
    }

    fn copies(&self) -> impl Iterator<Item = Copy<'_>> {
        self.nodes.values().flat_map(|n| {
            n.tasks
                .values()
                .chain(n.blanks.values().flat_map(|b| b.values()))
                .map(move |t| Copy {
                    life: t.life,
                    at: n.slot,
                    state: t.state,
                    images: &t.images,
                })
        })
    }

    pub fn check(&mut self) -> Result<(), Violation> {
        if std::mem::take(&mut self.shared.check) {
            self.places()?;
        }
        Ok(())
    }

    fn places(&self) -> Result<BTreeMap<Life, Slot>, Violation> {
        let has_image = |move_id: MoveId, pid: Pid| {
            // Until the source knows of the commit, its parked copy has the pages.
            self.nodes.get(&move_id.source).is_some_and(|n| {
                let is_parked = |t: &Task| t.state == CopyState::Parked(move_id);
                n.images.contains(&(move_id, pid)) || n.tasks.get(&pid).is_some_and(is_parked)
            })
        };
        self.shared.oracle.check(self.copies(), has_image)
    }

    /// An id just given out is held by nobody else.
    pub fn check_unique(&self, id: Pid) -> Result<(), Violation> {
        let mut holders = BTreeSet::new();
        for node in self.nodes.values() {
            let blanks = node.blanks.values().flatten();
            for (pid, task) in node.tasks.iter().chain(blanks) {
                // A blank that will be destroyed may have a thread that has ended since.
                if (*pid == id || task.threads.contains(&id)) && self.shared.oracle.may_run(task.state) {
                    holders.insert(task.life);
                }
            }
        }
        match holders.len() {
            1 => Ok(()),
            _ => Err(Violation(format!("{id} was given out and is held by {holders:?}"))),
        }
    }

    /// When all is settled, every table tells the truth.
    pub fn check_the_end(&self) -> Result<(), Violation> {
        let places = self.places()?;
        let alive: BTreeMap<Pid, Slot> = places
            .iter()
            .map(|(life, at)| (self.shared.oracle.alive()[life], *at))
            .collect();
        for copy in self.copies() {
            if copy.state != CopyState::Running {
                return Err(Violation(format!("{:?} is left on {}", copy.state, copy.at)));
            }
        }
        for node in self.nodes.values() {
            let Some(daemon) = &node.daemon else { continue };
            for (pid, entry) in daemon.home.table().entries() {
                if alive.get(&pid).map(|at| Place::At(*at)) != Some(entry.place) {
                    let truth = alive.get(&pid);
                    return Err(Violation(format!(
                        "{}: {pid} is {entry:?}, but it is at {truth:?}",
                        node.slot
                    )));
                }
            }
            if !node.ledger_agrees(self.shared.now) {
                return Err(Violation(format!("{}: the ledger is not the table", node.slot)));
            }
        }
        for (pid, at) in &alive {
            let home = MODULUS.home(*pid).expect("not one of a node's own");
            let says = self.nodes[&home]
                .daemon
                .as_ref()
                .map(|d| d.home.table().whereabouts(*pid));
            if says != Some(Whereabouts::Known(Place::At(*at))) {
                return Err(Violation(format!("{pid} is on {at}, its home says {says:?}")));
            }
            if self.nodes[&home].incarnation(*pid) != self.nodes[at].incarnation(*pid) {
                return Err(Violation(format!("{pid}: home and {at} differ in its incarnation")));
            }
            for id in self.nodes[at].tasks[pid].threads.iter().chain([pid]) {
                let home = &self.nodes[&MODULUS.home(*id).expect("not one of a node's own")];
                if home.slot != *at && !home.allotment.reserved().any(|r| r == *id) {
                    return Err(Violation(format!(
                        "{id} is held on {at} and not reserved at {}",
                        home.slot
                    )));
                }
            }
        }
        Ok(())
    }
}
