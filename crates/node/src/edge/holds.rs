//! Holding, and what ends it: the order in which table and waiting packets change.
//!
//! Owns that order, and the record of what is held (init keeps it, so that a daemon which is killed leaves nothing held for
//! ever). Refuses to know why something moves.
//!
//! A hold ends in three steps: the table names the node that has the endpoint now, still holding; what waits is let go (the
//! program on the park's device looks at the node and not at the hold); the table holds no longer, and what came in between
//! is let go. So nothing overtakes what waits, but for what arrives in the moment of the last step.

use super::{Edge, EdgeError, Hold, Inner, entry, kernel, name};
use dunlin_proto::endpoint::Endpoint;
use dunlin_proto::ids::{MoveId, Slot};
use dunlin_sys::steer::Name;
use rustix::event::{PollFd, PollFlags, poll};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

/// What is held, as init keeps it: one label for each hold.
const LABEL: &str = "edge/hold/";
/// What init keeps of a hold: its number, the move, what is held with its epochs.
type Kept = (u64, MoveId, Vec<(Endpoint, u64)>);
/// So long after the end of a hold a packet may still be on its way into the park.
const STRAYS_FOR: Duration = Duration::from_millis(50);

impl Edge {
    /// Source, before anything of these sockets is read: from now on their packets are kept, those of peers in the same nest
    /// too. A packet that was on its way into the nest when this was called may still be delivered a moment later: read
    /// until nothing changes. A held *port* does not hold connections that have entries of their own.
    pub fn hold(&self, by: MoveId, endpoints: &[Endpoint]) -> Result<Hold, EdgeError> {
        let inner = self.inner()?;
        let mut park = inner.turn();
        let names: Vec<Name> = endpoints.iter().map(name).collect();
        let said = names
            .iter()
            .map(|name| inner.said(name))
            .collect::<Result<Vec<_>, _>>()?;
        let id = park.next_hold(super::announce::epoch_now());
        let hold = Hold {
            id,
            by,
            endpoints: endpoints.to_vec(),
            epochs: said.iter().map(|said| said.map_or(0, |e| e.epoch)).collect(),
        };
        inner.record(&hold)?;
        park.hold(id, names.iter().copied());
        for ((name, said), epoch) in names.iter().zip(said).zip(&hold.epochs) {
            inner.say(name, said, inner.own, true, *epoch)?;
        }
        Ok(hold)
    }

    /// Source, when a move was aborted and the sockets are as they were: what was kept is delivered here, in order, then
    /// what comes. May be repeated after an error.
    pub fn release(&self, hold: &Hold) -> Result<(), EdgeError> {
        let inner = self.inner()?;
        inner.end(hold, inner.own, &hold.epochs)
    }

    /// Source, when the sockets live on `to`: what was kept goes there, in order, then what comes, for as long as anybody
    /// may not know it yet (a tombstone: until the connection is closed, or it is forgotten). Peers are told when this has
    /// returned; before, what they send would overtake what was kept. May be repeated after an error.
    pub fn hand_over(&self, hold: &Hold, to: Slot) -> Result<(), EdgeError> {
        let inner = self.inner()?;
        let epoch = super::announce::epoch_now();
        let epochs: Vec<u64> = hold.epochs.iter().map(|before| epoch.max(before + 1)).collect();
        inner.end(hold, to, &epochs)?;
        let moved = hold.endpoints.iter().zip(epochs).map(|(e, epoch)| (*e, to, epoch));
        inner.news.moved(moved.collect());
        Ok(())
    }

    /// What a former daemon of this node held and neither released nor handed over.
    pub fn held(&self) -> Result<Vec<Hold>, EdgeError> {
        let Some(inner) = &self.0 else { return Ok(Vec::new()) };
        let failed = || kernel("asking init for", &"what is held");
        let labels = inner.shelf.labels().map_err(failed())?;
        let mut holds = Vec::new();
        for label in labels.iter().filter(|l| l.starts_with(LABEL)) {
            let Some((_, blob)) = inner.shelf.kept(label).map_err(failed())? else {
                continue;
            };
            let parsed: Result<Kept, _> = postcard::from_bytes(&blob);
            let (id, by, held) = parsed.map_err(|e| failed()(std::io::Error::other(e)))?;
            let (endpoints, epochs): (Vec<_>, Vec<_>) = held.into_iter().unzip();
            inner.turn().hold(id, endpoints.iter().map(name));
            holds.push(Hold {
                id,
                by,
                endpoints,
                epochs,
            });
        }
        Ok(holds)
    }
}

impl Inner {
    fn record(&self, hold: &Hold) -> Result<(), EdgeError> {
        let held: Vec<(Endpoint, u64)> = hold
            .endpoints
            .iter()
            .copied()
            .zip(hold.epochs.iter().copied())
            .collect();
        let kept: Kept = (hold.id, hold.by, held);
        let blob = postcard::to_allocvec(&kept).expect("endpoints can be written");
        let failed = kernel("recording what is held for move", &hold.by);
        self.shelf.keep_soon(&label(hold), blob).map_err(failed)
    }

    fn end(&self, hold: &Hold, at: Slot, epochs: &[u64]) -> Result<(), EdgeError> {
        let mut park = self.turn();
        let failed = || kernel("letting go what was held for move", &hold.by);
        let mut entries = Vec::with_capacity(epochs.len());
        for (endpoint, epoch) in hold.endpoints.iter().zip(epochs) {
            let name = name(endpoint);
            let said = self.said(&name)?;
            self.say(&name, said, at, true, *epoch)?;
            entries.push((name, entry(said, at, false, *epoch)));
        }
        park.flush(hold.id).map_err(failed())?;
        for (name, entry) in &entries {
            self.tables.change(name, entry).map_err(failed())?;
        }
        park.flush(hold.id).map_err(failed())?;
        park.end(hold.id);
        self.shelf.forget_soon(&label(hold)).map_err(failed())?;
        *self.strays.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + STRAYS_FOR);
        self.strays_wanted.notify_all();
        Ok(())
    }
}

fn label(hold: &Hold) -> String {
    format!("{LABEL}{}/{}", hold.by, hold.id)
}

/// Looks, for a while after each end of a hold, for packets that were on their way into the park when it ended.
pub(super) fn watch_strays(inner: Weak<Inner>) {
    while let Some(inner) = inner.upgrade() {
        let Some(until) = wanted(&inner) else { continue };
        if let Err(e) = let_go(&inner, until) {
            tracing::warn!("packets may wait in vain: reading the park: {e}");
        }
    }
}

/// Waits for the end of a hold, but not for ever: the edge may end.
fn wanted(inner: &Arc<Inner>) -> Option<Instant> {
    let mut strays = inner.strays.lock().unwrap_or_else(PoisonError::into_inner);
    if strays.is_none() {
        let waited = inner.strays_wanted.wait_timeout(strays, Duration::from_secs(1));
        strays = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
    let until = (*strays)?;
    if until <= Instant::now() {
        *strays = None;
    }
    Some(until)
}

fn let_go(inner: &Arc<Inner>, until: Instant) -> std::io::Result<()> {
    inner.turn().flush_strays()?;
    let tap = rustix::io::dup(inner.turn().tap())?;
    let left = until.saturating_duration_since(Instant::now());
    let timeout = rustix::time::Timespec::try_from(left).unwrap_or_default();
    let mut polled = [PollFd::new(&tap, PollFlags::IN)];
    match poll(&mut polled, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
