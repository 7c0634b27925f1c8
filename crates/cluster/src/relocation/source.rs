//! The source's part of one move.
//!
//! Owns whether the copy here may run. Refuses to know the engine: payloads pass through. Invariants: the process is
//! frozen only under a lease and with a record made durable before; once parked it is thawed only by the home's
//! `Aborted`, and turned into an image only by `Committed` (or `Resumed`, which proves it); before it is parked, every
//! failure is a cancel and the process never notices. The pages must be served from the moment the essence is sent.

pub use super::source_words::{Plan, SourceAction, SourceEvent, SourceRecord, SourceReport, SourceStage, WhyNot};
use super::{Limits, Now, Retry, entries_after_commit};
use dunlin_proto::ids::{Pid, Slot};
use dunlin_proto::relocation::{
    Claim, DestinationToSource, HomeToSource, Member, MoveMsg, Notice, Outcome, SourceToDestination, SourceToHome,
};
use std::collections::{BTreeSet, VecDeque};

#[derive(Debug)]
enum State {
    Leasing {
        proposal: Vec<u8>,
        retry: Retry,
        until: Now,
    },
    Proposing {
        until: Now,
    },
    Preparing,
    DestinationPreparing {
        until: Now,
    },
    Ready,
    /// `doomed`: it is off as soon as the freeze is over, with nothing sent.
    Freezing {
        doomed: Option<WhyNot>,
    },
    Parked {
        members: Vec<Member>,
        until: Now,
    },
    /// Parked, waiting for the decision.
    Aborting {
        members: Vec<Member>,
        why: WhyNot,
        retry: Retry,
    },
    /// Running; the home shall drop the lease.
    Cancelling {
        retry: Retry,
    },
    Image {
        members: Vec<Member>,
        undrained: BTreeSet<Pid>,
        /// While it is not known that it runs there: when to ask.
        asking: Option<Retry>,
    },
    Ended,
}

/// One move, at its source.
#[derive(Debug)]
pub struct SourceMove {
    plan: Plan,
    claims: Vec<Claim>,
    limits: Limits,
    state: State,
    actions: VecDeque<SourceAction>,
}

impl SourceMove {
    /// Begins by asking for the lease. The caller sees to it that no other move of this node covers any of these
    /// processes, nor one that arrived and is not [settled](super::destination::DestinationMove::is_ended). The first claim
    /// is the root.
    pub fn start(now: Now, plan: Plan, limits: Limits, claims: Vec<Claim>, proposal: Vec<u8>) -> SourceMove {
        let state = State::Leasing {
            proposal,
            retry: Retry::asked(now),
            until: now + limits.lease,
        };
        let mut this = SourceMove::new(plan, limits, claims, state);
        this.ask_lease();
        this
    }

    /// Goes on after a restart of the daemon. What was or may have been parked stays so until the home answers.
    pub fn recover(now: Now, record: SourceRecord, limits: Limits) -> SourceMove {
        let SourceRecord { plan, stage } = record;
        let mut this = SourceMove::new(plan, limits, Vec::new(), State::Ended);
        match stage {
            SourceStage::Freezing(claims) => {
                let members = claims.iter().map(|c| member_of(*c)).collect();
                this.abort(now, members, WhyNot::SourceRestarted);
            }
            SourceStage::Parked(members) => this.abort(now, members, WhyNot::SourceRestarted),
            SourceStage::Image { members, undrained } => this.become_image(now, members, undrained),
        }
        this
    }

    fn new(plan: Plan, limits: Limits, claims: Vec<Claim>, state: State) -> SourceMove {
        SourceMove {
            plan,
            claims,
            limits,
            state,
            actions: VecDeque::new(),
        }
    }

    /// Who takes part.
    pub fn plan(&self) -> Plan {
        self.plan
    }

    /// Nothing is left to do: once its actions are carried out, the machine can be dropped.
    pub fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// May the daemon still be told to freeze, or is it parked or given away already?
    pub fn is_before_freeze(&self) -> bool {
        match self.state {
            State::Leasing { .. }
            | State::Proposing { .. }
            | State::Preparing
            | State::DestinationPreparing { .. }
            | State::Ready => true,
            State::Freezing { .. }
            | State::Parked { .. }
            | State::Aborting { .. }
            | State::Cancelling { .. }
            | State::Image { .. }
            | State::Ended => false,
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When to send [`SourceEvent::Tick`].
    pub fn next_timeout(&self) -> Option<Now> {
        match &self.state {
            State::Leasing { retry, until, .. } => Some(retry.at.min(*until)),
            State::Proposing { until } | State::DestinationPreparing { until } | State::Parked { until, .. } => {
                Some(*until)
            }
            State::Aborting { retry, .. } | State::Cancelling { retry } => Some(retry.at),
            State::Image { asking, .. } => asking.map(|retry| retry.at),
            State::Preparing | State::Ready | State::Freezing { .. } | State::Ended => None,
        }
    }

    /// Takes one event. Words of nodes that have no say in this move, and words that come too late, change nothing.
    pub fn handle(&mut self, now: Now, event: SourceEvent) {
        match event {
            SourceEvent::Tick => self.tick(now),
            SourceEvent::FromHome(from, word) if from == self.plan.home => self.hear_home(now, word),
            SourceEvent::FromDestination(from, word) if from == self.plan.destination => {
                self.hear_destination(now, word);
            }
            SourceEvent::FromHome(..) | SourceEvent::FromDestination(..) => {}
            SourceEvent::Drained(from, pid) => self.drained(from, pid),
            SourceEvent::PeerLost(peer) => {
                if peer == self.plan.destination {
                    self.destination_is_lost(now);
                } else if peer == self.plan.home && matches!(self.state, State::Leasing { .. }) {
                    self.give_up(now, WhyNot::HomeSilent(peer));
                }
            }
            SourceEvent::Prepared(payload) => {
                if let State::Preparing = self.state {
                    self.tell_destination(SourceToDestination::Prepare { payload });
                    let until = now + self.limits.prepare;
                    self.state = State::DestinationPreparing { until };
                }
            }
            SourceEvent::Freeze => {
                if let State::Ready = self.state {
                    self.persist(SourceStage::Freezing(self.claims.clone()));
                    self.do_(SourceAction::Freeze);
                    self.state = State::Freezing { doomed: None };
                }
            }
            SourceEvent::Frozen(members, payload) => self.frozen(now, members, payload),
            SourceEvent::Failed(why) => self.failed(now, why),
            SourceEvent::Cancel => self.give_up(now, WhyNot::Cancelled),
        }
    }

    fn tick(&mut self, now: Now) {
        let (home, destination) = (self.plan.home, self.plan.destination);
        match &mut self.state {
            State::Leasing { until, .. } if now >= *until => self.give_up(now, WhyNot::HomeSilent(home)),
            State::Leasing { retry, .. } => {
                if retry.is_due(now) {
                    self.ask_lease();
                }
            }
            State::Proposing { until } | State::DestinationPreparing { until } | State::Parked { until, .. } => {
                if now >= *until {
                    self.give_up(now, WhyNot::DestinationLost(destination));
                }
            }
            State::Aborting { retry, .. } | State::Cancelling { retry } => {
                if retry.is_due(now) {
                    self.tell_home(SourceToHome::Abort);
                }
            }
            State::Image { asking, .. } => {
                if asking.as_mut().is_some_and(|retry| retry.is_due(now)) {
                    self.tell_destination(SourceToDestination::DoesItRun);
                }
            }
            State::Preparing | State::Ready | State::Freezing { .. } | State::Ended => {}
        }
    }

    fn hear_home(&mut self, now: Now, word: HomeToSource) {
        match word {
            HomeToSource::Leased => {
                if let State::Leasing { proposal, .. } = &mut self.state {
                    let (home, payload) = (self.plan.home, std::mem::take(proposal));
                    self.tell_destination(SourceToDestination::Propose { home, payload });
                    let until = now + self.limits.propose;
                    self.state = State::Proposing { until };
                }
            }
            HomeToSource::LeaseRefused(why) => {
                if let State::Leasing { .. } = self.state {
                    self.report(SourceReport::Failed(WhyNot::NotLeased(why)));
                    self.state = State::Ended;
                }
            }
            HomeToSource::StillMoving => {
                if let State::Ended = self.state {
                    self.tell_home(SourceToHome::Abort);
                }
            }
            HomeToSource::Outcome(Outcome::Committed) => self.hear_committed(now),
            HomeToSource::Outcome(Outcome::Aborted { raised }) => self.hear_aborted(raised),
        }
    }

    fn hear_committed(&mut self, now: Now) {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Parked { members, .. } | State::Aborting { members, .. } => {
                self.commit(now, members);
                self.tell_home(SourceToHome::OutcomeNoted);
            }
            state @ (State::Image { .. } | State::Ended) => {
                self.state = state;
                self.tell_home(SourceToHome::OutcomeNoted);
            }
            // No essence was sent, so nobody can have asked for a commit: not a word of an honest home.
            state @ (State::Leasing { .. }
            | State::Proposing { .. }
            | State::Preparing
            | State::DestinationPreparing { .. }
            | State::Ready
            | State::Freezing { .. }
            | State::Cancelling { .. }) => self.state = state,
        }
    }

    fn hear_aborted(&mut self, raised: Vec<Claim>) {
        match std::mem::replace(&mut self.state, State::Ended) {
            // Noted when the freeze is over: until then the home must not forget.
            State::Freezing { doomed } => {
                let doomed = doomed.or(Some(WhyNot::EndedByHome));
                self.state = State::Freezing { doomed };
                return;
            }
            State::Leasing { .. }
            | State::Proposing { .. }
            | State::Preparing
            | State::DestinationPreparing { .. }
            | State::Ready => {
                self.do_(SourceAction::Raise(raised));
                self.tell_destination(SourceToDestination::Cancel);
                self.report(SourceReport::Failed(WhyNot::EndedByHome));
            }
            State::Parked { .. } => self.thaw(raised, WhyNot::EndedByHome),
            State::Aborting { why, .. } => self.thaw(raised, why),
            State::Cancelling { .. } => self.do_(SourceAction::Raise(raised)),
            // The late answer of a home that has forgotten the commit since: abort is presumed.
            state @ (State::Image { .. } | State::Ended) => self.state = state,
        }
        self.tell_home(SourceToHome::OutcomeNoted);
    }

    fn hear_destination(&mut self, now: Now, word: DestinationToSource) {
        let destination = self.plan.destination;
        match word {
            DestinationToSource::Accept { payload } => {
                if let State::Proposing { .. } = self.state {
                    self.do_(SourceAction::Prepare(payload));
                    self.state = State::Preparing;
                }
            }
            DestinationToSource::Refuse { obstacles } => {
                if let State::Proposing { .. } = self.state {
                    self.give_up(now, WhyNot::Refused(obstacles));
                }
            }
            DestinationToSource::Prepared { payload } => {
                if let State::DestinationPreparing { .. } = self.state {
                    self.do_(SourceAction::ReadyToFreeze(payload));
                    self.state = State::Ready;
                }
            }
            DestinationToSource::Failed { why } => self.give_up(now, WhyNot::DestinationFailed(why)),
            DestinationToSource::Unknown => match &mut self.state {
                // It was resumed, the home knows it, and the destination has no reason to know the move any more.
                State::Image { asking, .. } => {
                    if asking.take().is_some() {
                        self.report(SourceReport::Resumed);
                    }
                }
                State::Leasing { .. }
                | State::Proposing { .. }
                | State::Preparing
                | State::DestinationPreparing { .. }
                | State::Ready
                | State::Freezing { .. }
                | State::Parked { .. }
                | State::Aborting { .. }
                | State::Cancelling { .. }
                | State::Ended => self.give_up(now, WhyNot::DestinationLost(destination)),
            },
            DestinationToSource::Resumed => self.hear_resumed(now),
        }
    }

    fn hear_resumed(&mut self, now: Now) {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Parked { members, .. } | State::Aborting { members, .. } => self.commit(now, members),
            state @ (State::Leasing { .. }
            | State::Proposing { .. }
            | State::Preparing
            | State::DestinationPreparing { .. }
            | State::Ready
            | State::Freezing { .. }
            | State::Cancelling { .. }
            | State::Image { .. }
            | State::Ended) => self.state = state,
        }
        if let State::Image { asking, .. } = &mut self.state
            && asking.take().is_some()
        {
            self.report(SourceReport::Resumed);
        }
    }

    fn destination_is_lost(&mut self, now: Now) {
        match &mut self.state {
            State::Leasing { .. } | State::Aborting { .. } | State::Cancelling { .. } | State::Ended => {}
            State::Image { asking, .. } => {
                if let Some(retry) = asking {
                    retry.at = now;
                }
            }
            State::Proposing { .. }
            | State::Preparing
            | State::DestinationPreparing { .. }
            | State::Ready
            | State::Freezing { .. }
            | State::Parked { .. } => self.give_up(now, WhyNot::DestinationLost(self.plan.destination)),
        }
    }

    fn frozen(&mut self, now: Now, members: Vec<Member>, payload: Vec<u8>) {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Freezing { doomed: None } => {
                self.persist(SourceStage::Parked(members.clone()));
                let until = now + self.limits.parked;
                let essence = SourceToDestination::Essence {
                    members: members.clone(),
                    payload,
                };
                self.tell_destination(essence);
                self.state = State::Parked { members, until };
            }
            State::Freezing { doomed: Some(why) } => self.abort(now, members, why),
            state => self.state = state,
        }
    }

    fn failed(&mut self, now: Now, why: String) {
        if let State::Freezing { doomed } = &mut self.state {
            // The engine has undone the freeze: the process runs and nothing was sent.
            let why = doomed.take().unwrap_or(WhyNot::SourceFailed(why));
            self.do_(SourceAction::Forget);
            self.call_off(now, why);
        } else {
            self.give_up(now, WhyNot::SourceFailed(why));
        }
    }

    /// Ends the move if it still can be ended.
    fn give_up(&mut self, now: Now, why: WhyNot) {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Leasing { .. }
            | State::Proposing { .. }
            | State::Preparing
            | State::DestinationPreparing { .. }
            | State::Ready => self.call_off(now, why),
            State::Freezing { doomed } => {
                let doomed = doomed.or(Some(why));
                self.state = State::Freezing { doomed };
            }
            State::Parked { members, .. } => self.abort(now, members, why),
            state @ (State::Aborting { .. } | State::Cancelling { .. } | State::Image { .. } | State::Ended) => {
                self.state = state;
            }
        }
    }

    /// It runs here; the others are to forget the move.
    fn call_off(&mut self, now: Now, why: WhyNot) {
        self.report(SourceReport::Failed(why));
        self.tell_destination(SourceToDestination::Cancel);
        self.cancel_lease(now);
    }

    fn cancel_lease(&mut self, now: Now) {
        self.tell_home(SourceToHome::Abort);
        let retry = Retry::asked(now);
        self.state = State::Cancelling { retry };
    }

    /// It is parked; the home shall record the abort, unless it has recorded the commit.
    fn abort(&mut self, now: Now, members: Vec<Member>, why: WhyNot) {
        self.tell_home(SourceToHome::Abort);
        let retry = Retry::asked(now);
        self.state = State::Aborting { members, why, retry };
    }

    /// The abort is recorded. Noting it comes last: until then the home tells us again.
    fn thaw(&mut self, raised: Vec<Claim>, why: WhyNot) {
        self.do_(SourceAction::Thaw);
        self.do_(SourceAction::Raise(raised));
        self.do_(SourceAction::Forget);
        self.tell_destination(SourceToDestination::Cancel);
        self.report(SourceReport::Failed(why));
    }

    fn commit(&mut self, now: Now, members: Vec<Member>) {
        let undrained: BTreeSet<Pid> = members.iter().map(|m| m.pid).collect();
        self.persist(SourceStage::Image {
            members: members.clone(),
            undrained: undrained.clone(),
        });
        self.become_image(now, members, undrained);
        self.report(SourceReport::Committed);
    }

    fn become_image(&mut self, now: Now, members: Vec<Member>, undrained: BTreeSet<Pid>) {
        let entries = entries_after_commit(&members, self.plan.destination);
        self.do_(SourceAction::Learn(entries));
        self.do_(SourceAction::MakeImage);
        let asking = Some(Retry::asked(now));
        self.state = State::Image {
            members,
            undrained,
            asking,
        };
    }

    fn drained(&mut self, from: Slot, pid: Pid) {
        let move_id = self.plan.move_id;
        match &mut self.state {
            State::Image {
                members,
                undrained,
                asking,
            } => {
                if undrained.remove(&pid) {
                    self.actions.push_back(SourceAction::ForgetImage(pid));
                    let stage = SourceStage::Image {
                        members: members.clone(),
                        undrained: undrained.clone(),
                    };
                    if undrained.is_empty() {
                        if asking.is_some() {
                            self.report(SourceReport::Resumed);
                        }
                        self.do_(SourceAction::Forget);
                        self.report(SourceReport::Drained);
                        self.state = State::Ended;
                    } else {
                        self.persist(stage);
                    }
                }
            }
            State::Ended => {}
            // Told again, after the outcome is known here.
            State::Leasing { .. }
            | State::Proposing { .. }
            | State::Preparing
            | State::DestinationPreparing { .. }
            | State::Ready
            | State::Freezing { .. }
            | State::Parked { .. }
            | State::Aborting { .. }
            | State::Cancelling { .. } => return,
        }
        let msg = MoveMsg::Noted(Notice::Drained { move_id, pid });
        self.do_(SourceAction::Send { to: from, msg });
    }

    fn ask_lease(&mut self) {
        self.tell_home(SourceToHome::Lease {
            destination: self.plan.destination,
            claims: self.claims.clone(),
        });
    }

    fn tell_home(&mut self, word: SourceToHome) {
        let msg = MoveMsg::SourceToHome(self.plan.move_id, word);
        let to = self.plan.home;
        self.do_(SourceAction::Send { to, msg });
    }

    fn tell_destination(&mut self, word: SourceToDestination) {
        let msg = MoveMsg::SourceToDestination(self.plan.move_id, word);
        let to = self.plan.destination;
        self.do_(SourceAction::Send { to, msg });
    }

    fn persist(&mut self, stage: SourceStage) {
        let plan = self.plan;
        self.do_(SourceAction::Persist(SourceRecord { plan, stage }));
    }

    fn report(&mut self, report: SourceReport) {
        self.do_(SourceAction::Report(report));
    }

    fn do_(&mut self, action: SourceAction) {
        self.actions.push_back(action);
    }
}

fn member_of(claim: Claim) -> Member {
    Member {
        pid: claim.pid,
        incarnation: claim.incarnation,
        ids: Vec::new(),
        images: Vec::new(),
        homes: BTreeSet::new(),
    }
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
