//! Notices that must arrive: a process has ended, a process needs no more pages of an image.
//!
//! Owns the notices not yet noted by their receivers, and repeats them. Refuses to know what they mean. Durable: a
//! notice posted is a promise, also across a restart of the daemon. Invariant: a notice is forgotten only when its
//! receiver has noted it.

use super::{Now, Retry};
use dunlin_proto::ids::Slot;
use dunlin_proto::relocation::{MoveMsg, Notice};
use std::collections::{BTreeMap, VecDeque};

/// At most so many notices wait; the next one is not taken.
pub const MAX_NOTICES: usize = 1 << 16;

/// For the daemon to carry out, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutboxAction {
    /// Make it durable.
    Persist(Slot, Notice),
    /// It need not be durable any more.
    Forget(Slot, Notice),
    /// Send it.
    Send {
        /// To this node.
        to: Slot,
        /// This.
        msg: MoveMsg,
    },
}

/// A notice was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{MAX_NOTICES} notices to other nodes wait to be noted; hint: bring the silent nodes back (`dunlin ps` names them)"
)]
pub struct OutboxFull;

/// The notices of one node.
#[derive(Debug, Default)]
pub struct Outbox {
    waiting: BTreeMap<(Slot, Notice), Retry>,
    actions: VecDeque<OutboxAction>,
}

impl Outbox {
    /// Goes on with the notices that were made durable.
    pub fn restore(now: Now, notices: impl IntoIterator<Item = (Slot, Notice)>) -> Outbox {
        let mut outbox = Outbox::default();
        for (to, notice) in notices {
            outbox.send(now, to, notice);
        }
        outbox
    }

    /// Tells `to`, until it has noted. Twice the same is once.
    pub fn post(&mut self, now: Now, to: Slot, notice: Notice) -> Result<(), OutboxFull> {
        if self.waiting.contains_key(&(to, notice)) {
            return Ok(());
        }
        if self.waiting.len() >= MAX_NOTICES {
            return Err(OutboxFull);
        }
        self.actions.push_back(OutboxAction::Persist(to, notice));
        self.send(now, to, notice);
        Ok(())
    }

    /// `by` has noted it.
    pub fn noted(&mut self, by: Slot, notice: Notice) {
        if self.waiting.remove(&(by, notice)).is_some() {
            self.actions.push_back(OutboxAction::Forget(by, notice));
        }
    }

    /// Repeats what is due.
    pub fn tick(&mut self, now: Now) {
        for ((to, notice), retry) in &mut self.waiting {
            if retry.is_due(now) {
                let (to, msg) = (*to, MoveMsg::Notice(*notice));
                self.actions.push_back(OutboxAction::Send { to, msg });
            }
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<OutboxAction> {
        self.actions.pop_front()
    }

    /// When to call [`Outbox::tick`].
    pub fn next_timeout(&self) -> Option<Now> {
        self.waiting.values().map(|r| r.at).min()
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Does none wait?
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn send(&mut self, now: Now, to: Slot, notice: Notice) {
        self.waiting.insert((to, notice), Retry::asked(now));
        let msg = MoveMsg::Notice(notice);
        self.actions.push_back(OutboxAction::Send { to, msg });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_proto::ids::{MoveId, Pid};

    const TO: Slot = Slot(2);
    const NOTICE: Notice = Notice::Drained {
        move_id: MoveId { source: TO, nonce: 7 },
        pid: Pid(105),
    };

    fn drain(outbox: &mut Outbox) -> Vec<OutboxAction> {
        std::iter::from_fn(|| outbox.poll_action()).collect()
    }

    fn send() -> OutboxAction {
        OutboxAction::Send {
            to: TO,
            msg: MoveMsg::Notice(NOTICE),
        }
    }

    #[test]
    fn a_notice_is_repeated_until_noted() {
        let mut outbox = Outbox::default();
        outbox.post(Now::ZERO, TO, NOTICE).unwrap();
        outbox.post(Now::ZERO, TO, NOTICE).unwrap();
        assert_eq!(drain(&mut outbox), [OutboxAction::Persist(TO, NOTICE), send()]);
        let mut at = Now::ZERO;
        for _ in 0..10 {
            let next = outbox.next_timeout().unwrap();
            assert!(next > at && next - at <= super::super::RETRY_SLOWEST);
            at = next;
            outbox.tick(at);
            assert_eq!(drain(&mut outbox), [send()]);
        }
        outbox.noted(Slot(3), NOTICE);
        assert_eq!(outbox.len(), 1, "that was another node's word");
        outbox.noted(TO, NOTICE);
        outbox.noted(TO, NOTICE);
        assert_eq!(drain(&mut outbox), [OutboxAction::Forget(TO, NOTICE)]);
        assert!(outbox.is_empty() && outbox.next_timeout().is_none());
    }

    #[test]
    fn a_restored_notice_is_sent_again() {
        let mut outbox = Outbox::restore(Now::ZERO, [(TO, NOTICE)]);
        assert_eq!(drain(&mut outbox), [send()]);
    }

    #[test]
    fn a_full_outbox_says_so() {
        let mut outbox = Outbox::default();
        for nonce in 0..MAX_NOTICES as u64 {
            let move_id = MoveId { source: TO, nonce };
            let notice = Notice::Drained { move_id, pid: Pid(105) };
            outbox.post(Now::ZERO, TO, notice).unwrap();
        }
        let move_id = MoveId {
            source: TO,
            nonce: u64::MAX,
        };
        let last = Notice::Drained { move_id, pid: Pid(105) };
        assert_eq!(outbox.post(Now::ZERO, TO, last), Err(OutboxFull));
    }
}
