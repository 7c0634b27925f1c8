//! The destination's part of one move.
//!
//! Owns whether the copy made here may run. Refuses to know the engine: payloads pass through. Invariants: it is resumed
//! only by the home's `Granted`; a commit is asked for only when everything is rebuilt and verified, and with a record made
//! durable before; having asked, the copy is neither run nor destroyed before the home answers; until then the kernel kills
//! it with this daemon, and from the resume on it does not. A destination that has not asked and loses its source
//! destroys what it has, and never asks.

use super::{Limits, Now, Retry, entries_after_commit};
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::{MoveId, Slot};
use dunlin_proto::relocation::{
    DestinationToHome, DestinationToSource, Ending, EntryChange, HomeToDestination, MAX_IDS, MAX_MEMBERS, Member,
    MoveMsg, Notice, SourceToDestination,
};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// What the destination must know after a restart, from before it asks for the commit until the home knows the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationRecord {
    /// The move.
    pub move_id: MoveId,
    /// Who decides.
    pub home: Slot,
    /// The processes; the first is the root.
    pub members: Vec<Member>,
    /// They were committed and have ended so, but not all who must be told are on the way to be.
    pub ended: Option<Ending>,
}

/// What a restarted daemon finds of a move it has a record of. (Of a tree, some members may have ended since they were
/// resumed: `Running` as long as one is there; the ends of the others are told as any end.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The copy runs (or is parked by a later move): it was resumed, or it would have died with the daemon.
    Running,
    /// The copy is there, whole, and has never run: it waits for the home's word.
    Waiting,
    /// It is not there: killed with the daemon ([`Ending::Lost`]), or resumed and ended since, as init knows.
    Ended(Ending),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationEvent {
    /// [`DestinationMove::next_timeout`] may have passed.
    Tick,
    /// A word of the source.
    FromSource(Slot, SourceToDestination),
    /// A word of the home.
    FromHome(Slot, HomeToDestination),
    /// The connection to a node broke.
    PeerLost(Slot),
    /// [`DestinationAction::Check`]: it would move; the payload is for the source's engine.
    Accepted(Vec<u8>),
    /// [`DestinationAction::Check`]: it would not.
    Refused(Vec<Obstacle>),
    /// [`DestinationAction::Prepare`] is done; the payload is for the source's engine.
    Prepared(Vec<u8>),
    /// [`DestinationAction::Rebuild`] is done and verified: everything is here that must be before it may run.
    Rebuilt,
    /// The engine failed.
    Failed(String),
}

/// For the daemon to carry out, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationAction {
    /// Send this.
    Send {
        /// To this node.
        to: Slot,
        /// This.
        msg: MoveMsg,
    },
    /// Would it move (the proposal)? Then `Accepted` or `Refused`. To be refused, too, as long as a PID is in use here, by a
    /// copy whose move away has an outcome that this node does not know yet, or by another move's blank; and as long as there is
    /// a record of another move with this PID, since [`Found`] could not tell after a restart which of them it was.
    Check(Vec<u8>),
    /// Make what can be made before the essence; then `Prepared` or `Failed`.
    Prepare(Vec<u8>),
    /// Rebuild from the essence, and verify; then `Rebuilt` or `Failed`.
    Rebuild(Vec<Member>, Vec<u8>),
    /// Make the record durable.
    Persist(DestinationRecord),
    /// The record is of no further use.
    Forget,
    /// Let it run, and from now on survive this daemon: one step. It is the process.
    Resume,
    /// Destroy whatever was made for this move. Blanks only: an entry's surrogate is again what it was.
    Destroy,
    /// To [`super::home::HomeEvent::Learn`].
    Learn(Vec<EntryChange>),
    /// To [`super::outbox::Outbox::post`].
    Post {
        /// To this node.
        to: Slot,
        /// This.
        notice: Notice,
    },
}

#[derive(Debug)]
enum State {
    Checking,
    Accepted {
        until: Now,
    },
    Preparing,
    Prepared {
        until: Now,
    },
    Rebuilding {
        members: Vec<Member>,
    },
    /// Asked; only the home's word counts.
    Asking {
        members: Vec<Member>,
        retry: Retry,
    },
    /// It runs, or its end is told to all concerned; the home is told until it knows.
    Running {
        retry: Retry,
    },
    /// It is not there after a restart; the home is told until it knows.
    Gone {
        members: Vec<Member>,
        ending: Ending,
        retry: Retry,
    },
    Ended,
}

/// One move, at its destination.
#[derive(Debug)]
pub struct DestinationMove {
    move_id: MoveId,
    home: Slot,
    here: Slot,

    limits: Limits,
    state: State,
    actions: VecDeque<DestinationAction>,
}

impl DestinationMove {
    /// Begins with the proposal of `move_id.source`, which the caller has seen to be its sender.
    pub fn start(here: Slot, limits: Limits, move_id: MoveId, home: Slot, proposal: Vec<u8>) -> DestinationMove {
        let mut this = DestinationMove::new(here, limits, move_id, home, State::Checking);
        this.do_(DestinationAction::Check(proposal));
        this
    }

    /// Goes on after a restart of the daemon.
    pub fn recover(now: Now, here: Slot, limits: Limits, record: DestinationRecord, found: Found) -> DestinationMove {
        let DestinationRecord {
            move_id,
            home,
            members,
            ended,
        } = record;
        let mut this = DestinationMove::new(here, limits, move_id, home, State::Ended);
        match (ended, found) {
            (Some(ending), _) => this.tell_end(now, &members, ending),
            (None, Found::Running) => this.tell_running(now, &members),
            (None, Found::Waiting) => {
                let retry = Retry::asked(now);
                this.tell_home(DestinationToHome::Commit {
                    members: members.clone(),
                });
                this.state = State::Asking { members, retry };
            }
            (None, Found::Ended(ending)) => {
                this.tell_home(DestinationToHome::Gone);
                let retry = Retry::asked(now);
                this.state = State::Gone { members, ending, retry };
            }
        }
        this
    }

    fn new(here: Slot, limits: Limits, move_id: MoveId, home: Slot, state: State) -> DestinationMove {
        DestinationMove {
            move_id,
            home,
            here,

            limits,
            state,
            actions: VecDeque::new(),
        }
    }

    /// The move.
    pub fn move_id(&self) -> MoveId {
        self.move_id
    }

    /// Nothing is left to do: once its actions are carried out, the machine can be dropped. A process that arrived must
    /// not be moved on before: the home would not know it here.
    pub fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// Does the copy run here, by this move?
    pub fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<DestinationAction> {
        self.actions.pop_front()
    }

    /// When to send [`DestinationEvent::Tick`].
    pub fn next_timeout(&self) -> Option<Now> {
        match &self.state {
            State::Accepted { until } | State::Prepared { until } => Some(*until),
            State::Asking { retry, .. } | State::Running { retry } | State::Gone { retry, .. } => Some(retry.at),
            State::Checking | State::Preparing | State::Rebuilding { .. } | State::Ended => None,
        }
    }

    /// Takes one event. Words of nodes that have no say in this move, and words that come too late, change nothing.
    pub fn handle(&mut self, now: Now, event: DestinationEvent) {
        match event {
            DestinationEvent::Tick => self.tick(now),
            DestinationEvent::FromSource(from, word) if from == self.move_id.source => self.hear_source(word),
            DestinationEvent::FromHome(from, word) if from == self.home => self.hear_home(now, word),
            DestinationEvent::FromSource(..) | DestinationEvent::FromHome(..) => {}
            DestinationEvent::PeerLost(peer) => {
                if peer == self.move_id.source {
                    self.give_up(None);
                }
            }
            DestinationEvent::Accepted(payload) => {
                if let State::Checking = self.state {
                    self.tell_source(DestinationToSource::Accept { payload });
                    let until = now + self.limits.propose;
                    self.state = State::Accepted { until };
                }
            }
            DestinationEvent::Refused(obstacles) => {
                if let State::Checking = self.state {
                    self.tell_source(DestinationToSource::Refuse { obstacles });
                    self.state = State::Ended;
                }
            }
            DestinationEvent::Prepared(payload) => {
                if let State::Preparing = self.state {
                    self.tell_source(DestinationToSource::Prepared { payload });
                    let until = now + self.limits.precopy;
                    self.state = State::Prepared { until };
                }
            }
            DestinationEvent::Rebuilt => self.rebuilt(now),
            DestinationEvent::Failed(why) => self.give_up(Some(why)),
        }
    }

    fn tick(&mut self, now: Now) {
        match &mut self.state {
            State::Accepted { until } | State::Prepared { until } => {
                if now >= *until {
                    self.give_up(Some("the source fell silent".to_owned()));
                }
            }
            State::Asking { members, retry } => {
                if retry.is_due(now) {
                    let members = members.clone();
                    self.tell_home(DestinationToHome::Commit { members });
                }
            }
            State::Running { retry } => {
                if retry.is_due(now) {
                    self.tell_home(DestinationToHome::Resumed);
                }
            }
            State::Gone { retry, .. } => {
                if retry.is_due(now) {
                    self.tell_home(DestinationToHome::Gone);
                }
            }
            State::Checking | State::Preparing | State::Rebuilding { .. } | State::Ended => {}
        }
    }

    fn hear_source(&mut self, word: SourceToDestination) {
        match word {
            // The first one made this machine.
            SourceToDestination::Propose { .. } => {}
            SourceToDestination::Prepare { payload } => {
                if let State::Accepted { .. } = self.state {
                    self.do_(DestinationAction::Prepare(payload));
                    self.state = State::Preparing;
                }
            }
            SourceToDestination::Essence { members, payload } => {
                if let State::Prepared { .. } = self.state {
                    if let Err(why) = check_members(&members) {
                        return self.give_up(Some(why));
                    }
                    self.do_(DestinationAction::Rebuild(members.clone(), payload));
                    self.state = State::Rebuilding { members };
                }
            }
            SourceToDestination::Cancel => self.give_up(None),
            SourceToDestination::DoesItRun => match self.state {
                State::Running { .. } => self.tell_source(DestinationToSource::Resumed),
                State::Ended => self.tell_source(DestinationToSource::Unknown),
                State::Checking
                | State::Accepted { .. }
                | State::Preparing
                | State::Prepared { .. }
                | State::Rebuilding { .. }
                | State::Asking { .. }
                | State::Gone { .. } => {}
            },
        }
    }

    fn hear_home(&mut self, now: Now, word: HomeToDestination) {
        match word {
            HomeToDestination::Granted => {
                if let State::Asking { .. } = self.state
                    && let State::Asking { members, .. } = std::mem::replace(&mut self.state, State::Ended)
                {
                    self.do_(DestinationAction::Resume);
                    self.tell_source(DestinationToSource::Resumed);
                    self.tell_running(now, &members);
                }
            }
            HomeToDestination::Denied => match self.state {
                State::Asking { .. } => {
                    self.do_(DestinationAction::Destroy);
                    self.do_(DestinationAction::Forget);
                    self.state = State::Ended;
                }
                State::Checking
                | State::Accepted { .. }
                | State::Preparing
                | State::Prepared { .. }
                | State::Rebuilding { .. } => self.give_up(None),
                State::Running { .. } | State::Gone { .. } | State::Ended => {}
            },
            HomeToDestination::ResumedNoted => {
                if let State::Running { .. } = self.state {
                    self.do_(DestinationAction::Forget);
                    self.state = State::Ended;
                }
            }
            HomeToDestination::GoneNoted { committed } => {
                if let State::Gone { .. } = self.state
                    && let State::Gone { members, ending, .. } = std::mem::replace(&mut self.state, State::Ended)
                {
                    if committed {
                        self.persist(members.clone(), Some(ending));
                        self.tell_end(now, &members, ending);
                    } else {
                        self.do_(DestinationAction::Forget);
                    }
                }
            }
        }
    }

    fn rebuilt(&mut self, now: Now) {
        if let State::Rebuilding { .. } = self.state
            && let State::Rebuilding { members } = std::mem::replace(&mut self.state, State::Ended)
        {
            self.persist(members.clone(), None);
            let retry = Retry::asked(now);
            self.tell_home(DestinationToHome::Commit {
                members: members.clone(),
            });
            self.state = State::Asking { members, retry };
        }
    }

    /// Destroys what there is, if that may still be done; tells the source why, if it does not know.
    fn give_up(&mut self, why: Option<String>) {
        match self.state {
            State::Checking
            | State::Accepted { .. }
            | State::Preparing
            | State::Prepared { .. }
            | State::Rebuilding { .. } => {
                self.do_(DestinationAction::Destroy);
                if let Some(why) = why {
                    self.tell_source(DestinationToSource::Failed { why });
                }
                self.state = State::Ended;
            }
            State::Asking { .. } | State::Running { .. } | State::Gone { .. } | State::Ended => {}
        }
    }

    fn tell_running(&mut self, now: Now, members: &[Member]) {
        self.do_(DestinationAction::Learn(entries_after_commit(members, self.here)));
        self.tell_resumed(now);
    }

    fn tell_resumed(&mut self, now: Now) {
        self.tell_home(DestinationToHome::Resumed);
        let retry = Retry::asked(now);
        self.state = State::Running { retry };
    }

    /// The processes have ended here: all homes are to know, and whoever keeps pages for them.
    fn tell_end(&mut self, now: Now, members: &[Member], ending: Ending) {
        for member in members {
            let (pid, incarnation) = (member.pid, member.incarnation.after_commit());
            let notice = Notice::Ended {
                pid,
                incarnation,
                ending,
            };
            let mut nodes = member.homes.clone();
            nodes.insert(self.here);
            for to in nodes {
                self.do_(DestinationAction::Post { to, notice });
            }
            for move_id in member.images.iter().copied().chain([self.move_id]) {
                let (to, notice) = (move_id.source, Notice::Drained { move_id, pid });
                self.do_(DestinationAction::Post { to, notice });
            }
        }
        self.tell_resumed(now);
    }

    fn persist(&mut self, members: Vec<Member>, ended: Option<Ending>) {
        let (move_id, home) = (self.move_id, self.home);
        self.do_(DestinationAction::Persist(DestinationRecord {
            move_id,
            home,
            members,
            ended,
        }));
    }

    fn tell_source(&mut self, word: DestinationToSource) {
        let msg = MoveMsg::DestinationToSource(self.move_id, word);
        let to = self.move_id.source;
        self.do_(DestinationAction::Send { to, msg });
    }

    fn tell_home(&mut self, word: DestinationToHome) {
        let msg = MoveMsg::DestinationToHome(self.move_id, word);
        self.do_(DestinationAction::Send { to: self.home, msg });
    }

    fn do_(&mut self, action: DestinationAction) {
        self.actions.push_back(action);
    }
}

fn check_members(members: &[Member]) -> Result<(), String> {
    if members.is_empty() || members.len() > MAX_MEMBERS {
        return Err(format!(
            "the essence has {} processes, not 1 to {MAX_MEMBERS}",
            members.len()
        ));
    }
    match members
        .iter()
        .find(|m| m.ids.len() > MAX_IDS || m.images.len() > MAX_IDS)
    {
        Some(m) => Err(format!("process {} has more than {MAX_IDS} ids or images", m.pid)),
        None => Ok(()),
    }
}

#[cfg(test)]
#[path = "destination_tests.rs"]
mod tests;
