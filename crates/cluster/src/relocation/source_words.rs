//! What the source's machine is told, what it has done, and what it must remember.
//!
//! Owns the types between [`super::source::SourceMove`] and the daemon. Refuses to know the machine's states.

use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::{MoveId, Pid, Slot};
use dunlin_proto::relocation::{Claim, DestinationToSource, EntryChange, HomeToSource, LeaseRefusal, Member, MoveMsg};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Who takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The move; its source is this node.
    pub move_id: MoveId,
    /// The home of the root process.
    pub home: Slot,
    /// Where to; not this node.
    pub destination: Slot,
}

/// What the source must know after a restart. [`SourceAction::Persist`] replaces the move's earlier one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// The move.
    pub plan: Plan,
    /// How far it had come.
    pub stage: SourceStage,
}

/// How far a source had come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceStage {
    /// About to be parked; nothing is sent yet.
    Freezing(Vec<Claim>),
    /// Parked; the essence may have been sent.
    Parked(Vec<Member>),
    /// Committed.
    Image {
        /// All that moved.
        members: Vec<Member>,
        /// Those whose pages may still be needed.
        undrained: BTreeSet<Pid>,
    },
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceEvent {
    /// The time of `SourceMove::next_timeout` may have passed.
    Tick,
    /// A word of the home.
    FromHome(Slot, HomeToSource),
    /// A word of the destination.
    FromDestination(Slot, DestinationToSource),
    /// A node tells that nobody needs this process's pages here any more.
    Drained(Slot, Pid),
    /// The connection to a node broke: what was sent and not answered is lost.
    PeerLost(Slot),
    /// [`SourceAction::Prepare`] is done; the payload is for the destination's engine.
    Prepared(Vec<u8>),
    /// After [`SourceAction::ReadyToFreeze`]: freeze now.
    Freeze,
    /// [`SourceAction::Freeze`] is done, all are parked. The first member is the root.
    Frozen(Vec<Member>, Vec<u8>),
    /// The engine failed, or the process ended. If it was to freeze, nothing is parked: the process runs.
    Failed(String),
    /// The user wants it off.
    Cancel,
}

/// For the daemon to carry out, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceAction {
    /// Send this.
    Send {
        /// To this node.
        to: Slot,
        /// This.
        msg: MoveMsg,
    },
    /// Prepare here, while it runs; then [`SourceEvent::Prepared`] or `Failed`.
    Prepare(Vec<u8>),
    /// The destination is prepared (its payload): pre-copy if wanted, then [`SourceEvent::Freeze`] or `Failed`.
    ReadyToFreeze(Vec<u8>),
    /// Make the record durable.
    Persist(SourceRecord),
    /// The record is of no further use.
    Forget,
    /// Stop, capture, park; then [`SourceEvent::Frozen`], or undo it and `Failed`.
    Freeze,
    /// The parked copy may run: it is the process. After a restart it may be running already; then there is nothing to do.
    Thaw,
    /// The parked copy must never run: turn it into an image, and into surrogates where this is their home. Done again after a
    /// restart, so doing it twice must be doing it once.
    MakeImage,
    /// The pages this process left here are needed no more.
    ForgetImage(Pid),
    /// To [`super::home::HomeEvent::Learn`], before the ids fall free here.
    Learn(Vec<EntryChange>),
    /// To [`super::home::HomeEvent::Raise`].
    Raise(Vec<Claim>),
    /// For whoever asked for the move.
    Report(SourceReport),
}

/// For whoever asked for the move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceReport {
    /// It is off; the process runs here.
    Failed(WhyNot),
    /// The process is the destination's.
    Committed,
    /// It runs there.
    Resumed,
    /// Nothing of it is needed here any more.
    Drained,
}

/// Why a move did not take place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WhyNot {
    /// The home gave no lease. ([`LeaseRefusal::Incarnation`]: raise the entry here and try again.)
    #[error("the home refuses: {0}")]
    NotLeased(LeaseRefusal),
    /// The home does not answer.
    #[error("the home ({0}) does not answer; hint: is its daemon running?")]
    HomeSilent(Slot),
    /// The home ended it.
    #[error("the home ended the move")]
    EndedByHome,
    /// The destination would not take it.
    #[error("the destination refuses ({} obstacles)", .0.len())]
    Refused(Vec<Obstacle>),
    /// The destination could not take it.
    #[error("the destination failed: {0}")]
    DestinationFailed(String),
    /// The destination does not answer, or was restarted.
    #[error("the destination ({0}) does not answer; hint: is its daemon running?")]
    DestinationLost(Slot),
    /// This node could not give it.
    #[error("the source failed: {0}")]
    SourceFailed(String),
    /// This node's daemon was restarted while the process was parked.
    #[error("the source's daemon was restarted during the move; hint: move it again")]
    SourceRestarted,
    /// The user wanted it off.
    #[error("cancelled")]
    Cancelled,
}
