//! Runs and relays of a former daemon.
//!
//! Owns taking up what the nest kept. Refuses to know whether their processes still live. A run whose caller was lost with
//! the daemon goes on with its input ended and its output in a log.

use super::record::{self, RelayRecord, RunRecord};
use super::{Owner, Run, Runs, gone};
use crate::streams::outbox::Outbox;
use dunlin_proto::ids::{Pid, RunId};
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

impl Runs {
    /// Takes up what the nest kept for a daemon before this one; the top processes of its runs. Some may have ended
    /// meanwhile: [`Runs::ended`] is still to be called for them.
    pub fn restore(&self) -> io::Result<Vec<Pid>> {
        for label in self.keeper.labels()? {
            let restored = match record::parse_label(&label) {
                Some(record::Label::Run(nonce)) => self.restore_run(nonce, &label),
                Some(record::Label::Relay) => self.restore_relay(&label),
                None => continue,
            };
            if let Err(e) = restored {
                tracing::warn!("what was kept as {label} is of no use: {e}");
                self.forget(&label);
            }
        }
        Ok(self.lock().runs.values().filter_map(|r| r.pid()).collect())
    }

    fn restore_run(&self, nonce: u64, label: &str) -> io::Result<()> {
        let Some((fds, bytes)) = self.keeper.kept(label)? else {
            return Ok(());
        };
        let record = RunRecord::decode(&bytes)?;
        let id = RunId {
            origin: self.own,
            nonce,
        };
        let log = self.logs.resume(record.pid, record.uid)?;
        let outbox = Outbox::start(Box::new(log), || {})?;
        outbox.release(None);
        let streams = self.streams(id, outbox);
        for (stream, fd) in record.streams.iter().zip(fds) {
            streams.adopt(*stream, fd)?;
        }
        let owner = Owner {
            uid: record.uid,
            gid: record.gid,
        };
        let run = Arc::new(Run {
            id,
            pid: OnceLock::from(record.pid),
            owner,
            sort: record.sort,
            streams,
            abandoned: AtomicBool::new(false),
        });
        run.streams.set_top(record.pid);
        self.lock().runs.insert(nonce, run.clone());
        // Its caller, who had more to say, is gone with the last daemon. Now that it is known: the nest must drop its
        // copy of the far end, too.
        run.streams.end_input();
        Ok(())
    }

    fn restore_relay(&self, label: &str) -> io::Result<()> {
        let Some((fds, bytes)) = self.keeper.kept(label)? else {
            return Ok(());
        };
        let RelayRecord { stream } = RelayRecord::decode(&bytes)?;
        self.forget(label);
        let Some(far) = fds.into_iter().next() else {
            return Ok(());
        };
        // A new number: this relay knows nothing of what the old one had sent.
        let (relay, near) = self.start_relay(stream, Some(far))?;
        drop(near);
        let far = relay.port().far().ok_or_else(|| gone(stream))?;
        self.keeper.keep(
            &record::relay_label(relay.id()),
            &[far.as_fd()],
            RelayRecord { stream }.encode(),
        )
    }
}
