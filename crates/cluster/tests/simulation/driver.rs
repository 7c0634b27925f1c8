//! The machines of a node's daemon, driven as the real one drives them: their actions in order, a kill between any two,
//! and within those that are done process by process.

use crate::node::{Node, Stop};
use crate::oracle::{CopyState, Mutation, Violation};
use crate::world::{Local, Shared};
use dunlin_cluster::relocation::destination::{DestinationAction, DestinationEvent, DestinationMove};
use dunlin_cluster::relocation::home::{Durable, HomeAction, HomeEvent, Stage};
use dunlin_cluster::relocation::outbox::OutboxAction;
use dunlin_cluster::relocation::source::{SourceAction, SourceEvent, SourceMove, SourceReport};
use dunlin_proto::ids::{MoveId, Pid};
use dunlin_proto::relocation::{DestinationToHome, MoveMsg, SourceToHome};
use std::collections::BTreeMap;

impl Node {
    pub fn tell_source(&mut self, w: &mut Shared, id: MoveId, event: SourceEvent) -> Result<(), Stop> {
        let now = w.now;
        if let Some(machine) = self.daemon().sources.get_mut(&id) {
            machine.handle(now, event);
        }
        self.drain_source(w, id)
    }

    pub fn drain_source(&mut self, w: &mut Shared, id: MoveId) -> Result<(), Stop> {
        while let Some(action) = self.daemon().sources.get_mut(&id).and_then(SourceMove::poll_action) {
            w.may_be_killed(self.slot)?;
            w.tell(|| format!("{} source {id}: {action:?}", self.slot));
            match action {
                SourceAction::Send { to, msg } => {
                    if let MoveMsg::SourceToHome(_, SourceToHome::Abort) = msg {
                        match w.mutation {
                            Mutation::ThawOnAsking => self.thaw(w, id)?,
                            Mutation::ImageOnAsking => self.make_image(w, id)?,
                            _ => {}
                        }
                    }
                    w.send(self.slot, to, msg);
                    w.check = true;
                }
                SourceAction::Prepare(_) => {
                    let done = w.outcome(SourceEvent::Prepared(Vec::new()), SourceEvent::Failed("mmap".into()));
                    w.later(self, Local::Source(id, done));
                }
                SourceAction::ReadyToFreeze(_) => w.later(self, Local::Source(id, SourceEvent::Freeze)),
                SourceAction::Freeze => {
                    let frozen = SourceEvent::Frozen(Vec::new(), Vec::new());
                    let done = w.outcome(frozen, SourceEvent::Failed("a new mapping".into()));
                    w.later(self, Local::Source(id, done));
                }
                SourceAction::Persist(record) => {
                    if w.mutation != Mutation::SourceKeepsNoRecord {
                        self.source_records.insert(id, record);
                    }
                }
                SourceAction::Forget => drop(self.source_records.remove(&id)),
                SourceAction::Thaw => {
                    self.thaw(w, id)?;
                    w.check = true;
                }
                SourceAction::MakeImage => {
                    self.make_image(w, id)?;
                }
                SourceAction::ForgetImage(pid) => {
                    self.images.remove(&(id, pid));
                    w.check = true;
                }
                SourceAction::Learn(entries) => self.tell_home(w, HomeEvent::Learn(entries))?,
                SourceAction::Raise(claims) => self.tell_home(w, HomeEvent::Raise(claims))?,
                SourceAction::Report(report) => {
                    match report {
                        SourceReport::Failed(why) => w.count_failure(&why),
                        SourceReport::Resumed if w.mutation == Mutation::ForgetImageOnResume => {
                            self.images.retain(|(m, _)| *m != id);
                            w.check = true;
                        }
                        SourceReport::Committed | SourceReport::Resumed => {}
                        SourceReport::Drained => w.census.drained += 1,
                    }
                    self.daemon().claimed.retain(|_, m| *m != id);
                }
            }
        }
        if self.daemon().sources.get(&id).is_some_and(SourceMove::is_ended) {
            self.daemon().sources.remove(&id);
            self.daemon().claimed.retain(|_, m| *m != id);
        }
        Ok(())
    }

    fn thaw(&mut self, w: &mut Shared, id: MoveId) -> Result<(), Stop> {
        for task in self.tasks.values_mut().filter(|t| t.state == CopyState::Parked(id)) {
            w.may_be_killed(self.slot)?;
            task.state = CopyState::Running;
            w.oracle.thawed(id)?;
        }
        Ok(())
    }

    fn make_image(&mut self, w: &mut Shared, id: MoveId) -> Result<(), Stop> {
        let parked = self.tasks.iter().filter(|(_, t)| t.state == CopyState::Parked(id));
        let parked: Vec<Pid> = parked.map(|(pid, _)| *pid).collect();
        for pid in parked {
            w.may_be_killed(self.slot)?;
            self.tasks.remove(&pid);
            self.images.insert((id, pid));
            w.check = true;
        }
        Ok(())
    }

    pub fn tell_destination(&mut self, w: &mut Shared, id: MoveId, event: DestinationEvent) -> Result<(), Stop> {
        let now = w.now;
        if let Some(machine) = self.daemon().destinations.get_mut(&id) {
            machine.handle(now, event);
        }
        self.drain_destination(w, id)
    }

    pub fn drain_destination(&mut self, w: &mut Shared, id: MoveId) -> Result<(), Stop> {
        while let Some(action) = self
            .daemon()
            .destinations
            .get_mut(&id)
            .and_then(DestinationMove::poll_action)
        {
            w.may_be_killed(self.slot)?;
            w.tell(|| format!("{} destination {id}: {action:?}", self.slot));
            match action {
                DestinationAction::Send { to, msg } => {
                    if let MoveMsg::DestinationToHome(_, DestinationToHome::Commit { .. }) = msg {
                        let asks_again = !w.asked.insert((self.boot, id));
                        match w.mutation {
                            Mutation::ResumeOnAsking => self.resume(w, id)?,
                            Mutation::DestroyWhileAsking if asks_again => drop(self.blanks.remove(&id)),
                            _ => {}
                        }
                        w.check = true;
                    }
                    w.send(self.slot, to, msg);
                }
                DestinationAction::Check(_) => {
                    let no = DestinationEvent::Refused(Vec::new());
                    let done = w.outcome(DestinationEvent::Accepted(Vec::new()), no);
                    w.later(self, Local::Destination(id, done));
                }
                DestinationAction::Prepare(_) => {
                    let done = w.outcome(
                        DestinationEvent::Prepared(Vec::new()),
                        DestinationEvent::Failed("pid".into()),
                    );
                    w.later(self, Local::Destination(id, done));
                }
                DestinationAction::Rebuild(members, _) => {
                    let blanks = members.iter().map(|m| (m.pid, w.blank(id, m))).collect();
                    let in_use = members.iter().any(|m| self.is_in_use(m.pid, id));
                    self.blanks.insert(id, blanks);
                    let done = match in_use {
                        true => DestinationEvent::Failed("pid".into()),
                        false => w.outcome(DestinationEvent::Rebuilt, DestinationEvent::Failed("verify".into())),
                    };
                    w.later(self, Local::Destination(id, done));
                }
                DestinationAction::Persist(record) => {
                    if w.mutation != Mutation::DestinationKeepsNoRecord {
                        self.destination_records.insert(id, record);
                    }
                }
                DestinationAction::Forget => drop(self.destination_records.remove(&id)),
                DestinationAction::Resume => self.resume(w, id)?,
                DestinationAction::Destroy => {
                    self.blanks.remove(&id);
                    w.check = true;
                }
                DestinationAction::Learn(entries) => {
                    self.tell_home(w, HomeEvent::Learn(entries))?;
                    self.tell_ends(w)?;
                }
                DestinationAction::Post { to, notice } => {
                    let now = w.now;
                    self.daemon().outbox.post(now, to, notice).expect("there is room");
                    self.drain_outbox(w)?;
                }
            }
        }
        if self
            .daemon()
            .destinations
            .get(&id)
            .is_some_and(DestinationMove::is_ended)
        {
            self.daemon().destinations.remove(&id);
        }
        Ok(())
    }

    /// It has come back before the source here knows that it ever left, or this node has not settled an earlier arrival.
    pub fn is_in_use(&self, pid: Pid, by_other_than: MoveId) -> bool {
        let mut blanks = self.blanks.iter().filter(|(id, _)| **id != by_other_than);
        let mut records = self.destination_records.iter().filter(|(id, _)| **id != by_other_than);
        self.tasks.contains_key(&pid)
            || blanks.any(|(_, blanks)| blanks.contains_key(&pid))
            || records.any(|(_, record)| record.members.iter().any(|m| m.pid == pid))
    }

    /// One after the other: the daemon may be killed between them.
    fn resume(&mut self, w: &mut Shared, id: MoveId) -> Result<(), Stop> {
        w.oracle.may_resume(id)?;
        w.check = true;
        while let Some((pid, mut task)) = self.blanks.get_mut(&id).and_then(BTreeMap::pop_first) {
            task.state = CopyState::Running;
            if self.tasks.insert(pid, task).is_some() {
                return Err(Violation(format!("{pid} is resumed on {}, where it is", self.slot)).into());
            }
            if self.blanks[&id].is_empty() {
                self.blanks.remove(&id);
                w.oracle.resumed(id)?;
            }
            w.may_be_killed(self.slot)?;
        }
        Ok(())
    }

    pub fn tell_home(&mut self, w: &mut Shared, event: HomeEvent) -> Result<(), Stop> {
        let now = w.now;
        self.daemon().home.handle(now, event);
        self.drain_home(w)
    }

    pub fn drain_home(&mut self, w: &mut Shared) -> Result<(), Stop> {
        while let Some(action) = self.daemon().home.poll_action() {
            w.may_be_killed(self.slot)?;
            w.tell(|| format!("{} home: {action:?}", self.slot));
            match action {
                HomeAction::Send { to, msg } => w.send(self.slot, to, msg),
                HomeAction::Persist(durables) => {
                    for durable in durables {
                        w.may_be_killed(self.slot)?;
                        w.check |= w.oracle.recorded(&durable)?;
                        let forgets = w.mutation == Mutation::HomeForgetsDecisions;
                        match &durable {
                            Durable::Move(record) if forgets && record.stage != Stage::Leased => {}
                            _ => self.ledger.apply(durable),
                        }
                    }
                }
                HomeAction::Reserve(ids) => {
                    if w.mutation != Mutation::NothingReserved {
                        self.allotment.reserve(ids);
                    }
                }

                HomeAction::Release(ids) => self.allotment.release(ids),
                HomeAction::EndSurrogate(..) => {}
                HomeAction::TableFull(entry) => return Err(Violation(format!("no room for {entry:?}")).into()),
            }
        }
        Ok(())
    }

    pub fn drain_outbox(&mut self, w: &mut Shared) -> Result<(), Stop> {
        while let Some(action) = self.daemon().outbox.poll_action() {
            // Posting is one step for its caller.
            match action {
                OutboxAction::Persist(to, notice) => drop(self.notices.insert((to, notice))),
                OutboxAction::Forget(to, notice) => drop(self.notices.remove(&(to, notice))),
                OutboxAction::Send { to, msg } => w.send(self.slot, to, msg),
            }
        }
        Ok(())
    }
}
