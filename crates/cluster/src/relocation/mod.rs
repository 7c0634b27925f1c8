//! The move protocol: three machines, and the promise *never two live copies, never none* (R6).
//!
//! Owns who says what when, and who may let a copy run. Refuses to know how a process is frozen, rebuilt or paged: the
//! daemon carries out the actions and reports back; payloads pass through unread.
//!
//! ```text
//!  source                      destination                      home of the root process
//!  Leasing ── Lease ──────────────────────────────────────────► entries: Moving
//!          ◄─ Leased ──────────────────────────────────────────
//!  Proposing ── Propose ─────► Checking
//!          ◄─ Accept/Refuse ── Accepted
//!  Preparing (here)
//!  … ── Prepare ─────────────► Preparing
//!          ◄─ Prepared ─────── Prepared
//!  Ready (pre-copies here)
//!  Freezing (record, freeze, park)
//!  Parked ── Essence ────────► Rebuilding
//!                              Asking ── Commit ──────────────► decides, once: first of Commit and Abort
//!                              Running ◄─ Granted ─────────────
//!  Image  ◄─ Committed ────────────────────────────────────────
//!         ◄─ Resumed ───────── … ─── Resumed ─────────────────►
//!  Ended  ◄─ Drained (a notice: by whoever runs it by then)
//! ```
//!
//! *One decision.* The home of the root process decides for the whole tree: it records a commit or an abort, whichever is asked
//! for first, and answers every later question with it. The destination runs a copy only by `Granted`. The source lets a
//! parked copy run only by `Aborted`. Having asked, the destination neither runs nor destroys its copy before the answer;
//! having parked, the source neither thaws nor forgets its own. So if the home is away, both wait.
//!
//! *Abort is presumed.* A home that knows nothing of a move answers `Denied` and `Aborted`. That is safe, because a commit is
//! forgotten only when both sides have noted it for good; so aborts need not be remembered once the source knows.
//!
//! *Crashes.* Records are made durable (`Persist`) before the message that depends on them; an executor that cannot carry out an
//! action must not go on to the next one, but stop as if it had crashed. A source that was parked waits parked and asks for
//! the abort when it is back. A home goes on from its [`home::Ledger`]. A destination's copies die with its daemon until they
//! are resumed; then they live on. *The one loss*: when the destination's daemon dies after it has asked for the commit and
//! before it has resumed, and the home has recorded the commit or does so before it hears of that, the process has died on the
//! node it moved to. The destination tells the home when it is back (`Gone`), and all who wait for the process.
//!
//! *Messages* may be lost, late, doubled, reordered. Questions to the home are repeated until answered; what the source asks
//! of the destination is asked once and has a time limit, since the failure of a move costs nothing. A message for a move that
//! its receiver does not know goes to [`stray`], after all records have been recovered, never before.

pub mod destination;
pub mod home;
mod ledger;
pub mod outbox;
pub mod source;
mod source_words;

use dunlin_proto::ids::Slot;
use dunlin_proto::relocation::{
    Claim, DestinationToSource, EntryChange, HomeToSource, Member, MoveMsg, Notice, Outcome, SourceToDestination,
    SourceToHome,
};
use std::time::Duration;

/// Monotonic time since any fixed moment.
pub type Now = Duration;

/// A question is repeated after this time…
pub const RETRY_FIRST: Duration = Duration::from_millis(200);
/// …and then after twice the time, up to this.
pub const RETRY_SLOWEST: Duration = Duration::from_secs(5);

/// How long one side waits for another before it gives the move up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For the home's lease.
    pub lease: Duration,
    /// For the destination's check, and for the source's preparation.
    pub propose: Duration,
    /// For the destination's preparation.
    pub prepare: Duration,
    /// For the essence, since all is prepared: the source may pre-copy meanwhile.
    pub precopy: Duration,
    /// For the outcome, since the process is parked: the longest freeze of a move that fails by silence.
    pub parked: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            lease: Duration::from_secs(10),
            propose: Duration::from_secs(60),
            prepare: Duration::from_secs(120),
            precopy: Duration::from_secs(3600),
            parked: Duration::from_secs(10),
        }
    }
}

/// When to repeat a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Retry {
    pub at: Now,
    wait: Duration,
}

impl Retry {
    /// Just asked.
    pub fn asked(now: Now) -> Retry {
        Retry {
            at: now + RETRY_FIRST,
            wait: RETRY_FIRST,
        }
    }

    /// Is it time to ask again? If so, counts as asked.
    pub fn is_due(&mut self, now: Now) -> bool {
        if now < self.at {
            return false;
        }
        self.wait = (self.wait * 2).min(RETRY_SLOWEST);
        self.at = now + self.wait;
        true
    }
}

/// What to do about a message for a move that this node does not know (any more).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stray {
    /// To be answered to its sender.
    pub reply: Option<MoveMsg>,
    /// Incarnations for [`home::HomeEvent::Raise`], before the reply.
    pub raise: Vec<Claim>,
}

/// A message to a source or a destination that this node has no machine for. (`Propose` starts one; messages to a home
/// and notices of an end go to [`home::Home`].)
pub fn stray(msg: &MoveMsg) -> Stray {
    let mut raise = Vec::new();
    let reply = match msg {
        MoveMsg::HomeToSource(id, word) => match word {
            // A source that is parked has a record, so this one is not: the home need not wait for it.
            HomeToSource::StillMoving | HomeToSource::Leased => Some(MoveMsg::SourceToHome(*id, SourceToHome::Abort)),
            HomeToSource::Outcome(outcome) => {
                if let Outcome::Aborted { raised } = outcome {
                    raise.clone_from(raised);
                }
                Some(MoveMsg::SourceToHome(*id, SourceToHome::OutcomeNoted))
            }
            HomeToSource::LeaseRefused(_) => None,
        },
        MoveMsg::DestinationToSource(id, word) => match word {
            DestinationToSource::Accept { .. } | DestinationToSource::Prepared { .. } => {
                Some(MoveMsg::SourceToDestination(*id, SourceToDestination::Cancel))
            }
            DestinationToSource::Refuse { .. }
            | DestinationToSource::Failed { .. }
            | DestinationToSource::Unknown
            | DestinationToSource::Resumed => None,
        },
        MoveMsg::SourceToDestination(id, word) => match word {
            SourceToDestination::Prepare { .. }
            | SourceToDestination::Essence { .. }
            | SourceToDestination::DoesItRun => Some(MoveMsg::DestinationToSource(*id, DestinationToSource::Unknown)),
            SourceToDestination::Propose { .. } | SourceToDestination::Cancel => None,
        },
        MoveMsg::Notice(notice @ Notice::Drained { .. }) => Some(MoveMsg::Noted(*notice)),
        MoveMsg::HomeToDestination(..)
        | MoveMsg::SourceToHome(..)
        | MoveMsg::DestinationToHome(..)
        | MoveMsg::HomeToHome(..)
        | MoveMsg::Notice(Notice::Ended { .. })
        | MoveMsg::Noted(_) => None,
    };
    Stray { reply, raise }
}

/// Where the members are since a commit.
pub(crate) fn entries_after_commit(members: &[Member], destination: Slot) -> Vec<EntryChange> {
    let entry = |m: &Member| EntryChange {
        pid: m.pid,
        incarnation: m.incarnation.after_commit(),
        node: destination,
        ids: m.ids.clone(),
        homes: m.homes.clone(),
    };
    members.iter().map(entry).collect()
}
