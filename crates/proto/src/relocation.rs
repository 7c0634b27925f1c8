//! What nodes say to each other about a move: source, destination and home, and the notices that follow one.
//!
//! Owns the words. Refuses to know when they are said (`dunlin_cluster::relocation` does) and what is in a payload
//! ([`crate::image`] does). Every word of a move names it by [`MoveId`], whose `source` is the source; one node may play
//! all three roles, so a message says which role speaks to which. Messages may be lost, late, doubled and reordered: no
//! word means anything but what its own fields say.

use crate::control::{ExitStatus, Obstacle};
use crate::ids::{Incarnation, MoveId, Pid, Slot};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// No move covers more processes; a longer list from a peer is refused.
pub const MAX_MEMBERS: usize = 4096;

/// No process that moves holds more ids besides its PID.
pub const MAX_IDS: usize = 65_536;

/// One message between the daemons of two nodes (or of one, to itself).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MoveMsg {
    /// The source asks the home.
    SourceToHome(MoveId, SourceToHome),
    /// The source leads the destination.
    SourceToDestination(MoveId, SourceToDestination),
    /// The destination answers the source.
    DestinationToSource(MoveId, DestinationToSource),
    /// The destination asks the home.
    DestinationToHome(MoveId, DestinationToHome),
    /// The home answers the source.
    HomeToSource(MoveId, HomeToSource),
    /// The home answers the destination.
    HomeToDestination(MoveId, HomeToDestination),
    /// The deciding home and the homes of other ids that moved along.
    HomeToHome(MoveId, HomeToHome),
    /// Something happened, told until it is noted.
    Notice(Notice),
    /// The notice, returned: it is noted.
    Noted(Notice),
}

/// A process as its source knows it when it asks for the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The process.
    pub pid: Pid,
    /// Its incarnation, by the source's table.
    pub incarnation: Incarnation,
}

/// A process as it was frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The process.
    pub pid: Pid,
    /// Its incarnation before the move; a commit makes it the next one.
    pub incarnation: Incarnation,
    /// Every other id it keeps from being given out anew: its threads, its process group, its session.
    pub ids: Vec<Pid>,
    /// The earlier moves that left pages behind (each on its source) which it still needs.
    pub images: Vec<MoveId>,
    /// The homes of all these ids, and of ids it held earlier: whoever keeps an entry for it.
    pub homes: BTreeSet<Slot>,
}

/// Where a process is since a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryChange {
    /// The process.
    pub pid: Pid,
    /// Since this incarnation.
    pub incarnation: Incarnation,
    /// On this node.
    pub node: Slot,
    /// As [`Member::ids`].
    pub ids: Vec<Pid>,
    /// As [`Member::homes`].
    pub homes: BTreeSet<Slot>,
}

/// From the source to the home of the root process, which decides for all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceToHome {
    /// May I move these? The first is the root.
    Lease {
        /// Where to.
        destination: Slot,
        /// The processes; those forked later may come along.
        claims: Vec<Claim>,
    },
    /// I give up: record the abort, unless the commit is recorded. Answered by the outcome.
    Abort,
    /// I know the outcome, and will after a restart.
    OutcomeNoted,
}

/// From the home to the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HomeToSource {
    /// You may; the entries say Moving.
    Leased,
    /// You may not; nothing changed.
    LeaseRefused(LeaseRefusal),
    /// Are you still at it? A source that knows no such move answers [`SourceToHome::Abort`].
    StillMoving,
    /// The decision.
    Outcome(Outcome),
}

/// A home's decision: made once, for ever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The destination's copy may run, and no other. Every member is in its next incarnation.
    Committed,
    /// The source's copy may run, and no other.
    Aborted {
        /// The entries of this home, in their new incarnations.
        raised: Vec<Claim>,
    },
}

/// Why a home gave no lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum LeaseRefusal {
    /// The first process is none of this home's.
    #[error("this node is not the home of the first process; hint: all nodes need the same modulus")]
    NotHome,
    /// It has no entry: it never left its home, or it has ended.
    #[error("process {pid} has no entry at its home: it never left it, or it has ended")]
    Unknown {
        /// The process.
        pid: Pid,
    },
    /// It is elsewhere.
    #[error("process {pid} is on {at}; hint: ask that node")]
    NotThere {
        /// The process.
        pid: Pid,
        /// Where it is.
        at: Slot,
    },
    /// It is being moved.
    #[error("process {pid} is already being moved by {move_id}; hint: wait for that move to end")]
    Busy {
        /// The process.
        pid: Pid,
        /// By which move.
        move_id: MoveId,
    },
    /// The source's table is behind (or ahead of a home that has not been told yet).
    #[error("process {pid} is in incarnation {} at its home; hint: try again", .actual.0)]
    Incarnation {
        /// The process.
        pid: Pid,
        /// Its incarnation.
        actual: Incarnation,
    },
    /// The home has too many moves open.
    #[error("the home has too many moves open; hint: try again when some have ended")]
    TooManyMoves,
    /// The request makes no sense.
    #[error("the request makes no sense: no process, too many of them, twice the same, or a move on the spot")]
    Invalid,
}

/// From the source to the destination. Payloads are for the engines on both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceToDestination {
    /// Would you take this?
    Propose {
        /// Who will decide.
        home: Slot,
        /// What it is.
        #[serde(with = "crate::bytes")]
        payload: Vec<u8>,
    },
    /// Make everything that can be made while it still runs here.
    Prepare {
        /// What of.
        #[serde(with = "crate::bytes")]
        payload: Vec<u8>,
    },
    /// It is parked: rebuild it, verify it, and ask the home.
    Essence {
        /// The processes; the first is the root.
        members: Vec<Member>,
        /// What they are.
        #[serde(with = "crate::bytes")]
        payload: Vec<u8>,
    },
    /// It is off. Without effect on a destination that has asked the home: there the home's word counts.
    Cancel,
    /// Does it run?
    DoesItRun,
}

/// From the destination to the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DestinationToSource {
    /// I would.
    Accept {
        /// What the source's engine should know.
        #[serde(with = "crate::bytes")]
        payload: Vec<u8>,
    },
    /// I would not.
    Refuse {
        /// Why; not empty.
        obstacles: Vec<Obstacle>,
    },
    /// All is made that can be made.
    Prepared {
        /// What the source's engine should know.
        #[serde(with = "crate::bytes")]
        payload: Vec<u8>,
    },
    /// I could not. I have destroyed what I had and never asked for the commit, nor will I.
    Failed {
        /// Why, for a person.
        why: String,
    },
    /// I know of no such move (any more).
    Unknown,
    /// It runs here.
    Resumed,
}

/// From the destination to the home.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DestinationToHome {
    /// All is loaded and verified: may it run? Asked again until answered.
    Commit {
        /// The processes; the first is the root.
        members: Vec<Member>,
    },
    /// It runs; or it has ended, and whoever must know of that will be told.
    Resumed,
    /// My daemon was restarted and the copy is not there: it had not been resumed, or it has ended since.
    Gone,
}

/// From the home to the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HomeToDestination {
    /// Run it.
    Granted,
    /// Destroy it.
    Denied,
    /// I know that it runs, or has run.
    ResumedNoted,
    /// It is gone, then.
    GoneNoted {
        /// The move was committed: what is gone was the process, and the destination is to tell everyone. Otherwise it runs on
        /// at its source.
        committed: bool,
    },
}

/// Between the home that decided and another home whose ids moved along.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HomeToHome {
    /// These are elsewhere now. Older incarnations are dropped.
    EntriesChanged {
        /// The processes.
        entries: Vec<EntryChange>,
    },
    /// Noted.
    EntriesNoted,
}

/// Something that happened to one process, told again until it is noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Notice {
    /// To the source of `move_id`: nobody needs the pages any more that this process left there.
    Drained {
        /// The move that left them.
        move_id: MoveId,
        /// The process.
        pid: Pid,
    },
    /// To the home of each of its ids: the process has ended.
    Ended {
        /// The process.
        pid: Pid,
        /// In this incarnation.
        incarnation: Incarnation,
        /// How.
        ending: Ending,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Ending {
    /// As processes do.
    Exited(ExitStatus),
    /// With the daemon that held its only copy, between the commit and the resume.
    Lost,
}
