//! Programs started by `dunlin run`: their streams, their callers, and what is left of both when something dies.
//!
//! Owns the runs of this node and the relays that processes here use for streams of other nodes' runs. Refuses to know
//! how a program is started, signalled or moved. Invariants: PID 1 of the nest holds a copy of every far end, so that a daemon's
//! death is never a SIGPIPE; a run whose caller was lost with a daemon goes on, with its output in a log; a run's end is
//! told after all of its output.
//!
//! For a move: [`Runs::identify`] a descriptor at the source, [`Runs::open_remote`] at the destination, [`Runs::settle`] each
//! stream at the source once its writers are frozen, and for the run's top process [`Runs::departed`] at the source after
//! the commit. What a terminal is like is remembered by the run's origin in between.

mod following;
mod record;
mod restoring;
#[cfg(test)]
mod tests;

use crate::logs::Logs;
use crate::processes::NestProc;
use crate::streams::origin::Streams;
use crate::streams::outbox::{Drain, Outbox};
use crate::streams::relay::{Dial, Relay};
use crate::streams::terminal;
use dunlin_proto::control::{ExitStatus, Reply, WindowSize};
use dunlin_proto::ids::{Pid, RunId, Slot};
use dunlin_proto::stream::{StreamKind, StreamOpen, StreamRef};
use record::{RunRecord, Sort};
use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

/// What runs need of the nest.
pub trait Keeper: Send + Sync {
    /// Keeps descriptors and bytes beyond the daemon's life, in place of what had this label.
    fn keep(&self, label: &str, fds: &[BorrowedFd<'_>], bytes: Vec<u8>) -> io::Result<()>;
    /// What is kept under a label.
    fn kept(&self, label: &str) -> io::Result<Option<(Vec<OwnedFd>, Vec<u8>)>>;
    /// Keeps it no longer.
    fn forget(&self, label: &str) -> io::Result<()>;
    /// All labels.
    fn labels(&self) -> io::Result<Vec<String>>;
    /// The master of a new terminal of the nest.
    fn terminal(&self) -> io::Result<OwnedFd>;
}

/// How a run's descriptors are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wiring {
    /// Three pipes.
    Pipes,
    /// A terminal of this size.
    Terminal(WindowSize),
    /// `/dev/null` and one pipe for both outputs, into a log.
    Detached,
}

/// Whose a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// One run, at its origin.
pub struct Run {
    id: RunId,
    pid: OnceLock<Pid>,
    owner: Owner,
    sort: Sort,
    streams: Arc<Streams>,
    abandoned: AtomicBool,
}

impl Run {
    /// Its process; known once it is started.
    pub fn pid(&self) -> Option<Pid> {
        self.pid.get().copied()
    }

    /// Whose it is.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// It has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.sort == Sort::Terminal
    }

    /// Its streams.
    pub fn streams(&self) -> &Arc<Streams> {
        &self.streams
    }
}

#[derive(Default)]
struct State {
    runs: BTreeMap<u64, Arc<Run>>,
    relays: BTreeMap<u64, Arc<Relay>>,
}

/// All runs and relays of a node.
pub struct Runs {
    own: Slot,
    keeper: Arc<dyn Keeper>,
    dial: Box<dyn Fn(StreamOpen) -> Result<TcpStream, crate::peers::PeerError> + Send + Sync>,
    logs: Arc<Logs>,
    proc: NestProc,
    state: Mutex<State>,
    myself: Weak<Runs>,
}

impl Runs {
    /// Without any runs yet. `dial` opens the connection of a stream to its run's origin.
    pub fn new(
        own: Slot,
        keeper: Arc<dyn Keeper>,
        logs: Arc<Logs>,
        proc: NestProc,
        dial: impl Fn(StreamOpen) -> Result<TcpStream, crate::peers::PeerError> + Send + Sync + 'static,
    ) -> Arc<Runs> {
        let (dial, state) = (Box::new(dial), Mutex::default());
        Arc::new_cyclic(|myself| Runs {
            own,
            keeper,
            dial,
            logs,
            proc,
            state,
            myself: myself.clone(),
        })
    }

    /// Is it neither over nor abandoned?
    pub fn is_live(&self, run: &Run) -> bool {
        !run.abandoned.load(Ordering::Acquire) && self.lock().runs.contains_key(&run.id.nonce)
    }

    /// Makes the streams of a run and starts it by `spawn`, which is given its descriptors 0, 1 and 2. Its caller is
    /// told by `drain` of the start, then of output (a detached run's to its log); `lost` is called if that fails.
    pub fn start<E: From<io::Error>>(
        &self,
        owner: Owner,
        wiring: Wiring,
        drain: Option<Box<dyn Drain>>,
        lost: impl FnOnce() + Send + 'static,
        spawn: impl FnOnce([OwnedFd; 3]) -> Result<Pid, E>,
    ) -> Result<Arc<Run>, E> {
        let id = RunId {
            origin: self.own,
            nonce: random()?,
        };
        let log = if wiring == Wiring::Detached {
            Some(self.logs.create(id.nonce, owner.uid, owner.gid)?)
        } else {
            None
        };
        let handle = log.as_ref().map(|l| l.handle());
        let drain = match (log, drain) {
            (Some(log), _) => Box::new(log) as Box<dyn Drain>,
            (None, Some(drain)) => drain,
            (None, None) => return Err(io::Error::other("a run that is not detached needs a caller").into()),
        };
        let streams = self.streams(id, Outbox::start(drain, lost)?);
        let sort = match wiring {
            Wiring::Pipes => Sort::Pipes,
            Wiring::Terminal(_) => Sort::Terminal,
            Wiring::Detached => Sort::Detached,
        };
        let run = Arc::new(Run {
            id,
            pid: OnceLock::new(),
            owner,
            sort,
            streams,
            abandoned: AtomicBool::new(false),
        });
        self.lock().runs.insert(id.nonce, run.clone());
        let started = self.wire(&run, wiring).map_err(E::from).and_then(spawn);
        match started {
            Ok(pid) => {
                assert!(run.pid.set(pid).is_ok(), "a run is started once");
                run.streams.set_top(pid);
                // The program runs: what fails now is not a reason to say that it does not.
                let named = handle.map_or(Ok(()), |handle| self.logs.name(id.nonce, pid, &handle));
                if let Err(e) = named.and_then(|()| self.keep(&run)) {
                    tracing::warn!("run {pid} will not survive this daemon: {e}");
                }
                let started = (wiring != Wiring::Detached).then_some(Reply::Started { pid });
                run.streams.outbox().release(started);
                Ok(run)
            }
            Err(e) => {
                self.logs.discard(id.nonce);
                self.end(&run, None);
                Err(e)
            }
        }
    }

    /// Makes the descriptors. They are kept by the nest before the program has them.
    fn wire(&self, run: &Arc<Run>, wiring: Wiring) -> io::Result<[OwnedFd; 3]> {
        let streams = &run.streams;
        match wiring {
            Wiring::Pipes => Ok([
                streams.add_pipe(StreamKind::Stdin)?,
                streams.add_pipe(StreamKind::Stdout)?,
                streams.add_pipe(StreamKind::Stderr)?,
            ]),
            Wiring::Detached => {
                let out = streams.add_pipe(StreamKind::Stdout)?;
                Ok([std::fs::File::open("/dev/null")?.into(), out.try_clone()?, out])
            }
            Wiring::Terminal(size) => {
                let master = self.keeper.terminal()?;
                terminal::resize(&master, size)?;
                let slave = terminal::slave(master.as_fd())?;
                std::os::unix::fs::fchown(&slave, Some(run.owner.uid), None)?;
                streams.adopt(StreamKind::Tty, master)?;
                Ok([slave.try_clone()?, slave.try_clone()?, slave])
            }
        }
    }

    /// The run of a process, if it is one's top process.
    pub fn of(&self, pid: Pid) -> Option<Arc<Run>> {
        self.lock().runs.values().find(|r| r.pid() == Some(pid)).cloned()
    }

    /// The top process of a run has ended: after what it wrote, its caller is told.
    pub fn ended(&self, pid: Pid, status: ExitStatus) {
        if let Some(run) = self.of(pid) {
            run.streams.drain();
            self.end(&run, Some(Reply::Exited(status)));
        }
    }

    /// The caller of a run is gone: nobody reads or writes its streams any more. It is a run until its process ends.
    pub fn abandon(&self, run: &Run) {
        run.abandoned.store(true, Ordering::Release);
        run.streams.outbox().close();
        run.streams.close();
        self.forget(&record::run_label(run.id));
    }

    fn end(&self, run: &Run, last: Option<Reply>) {
        run.streams.outbox().finish(last);
        run.streams.close();
        self.lock().runs.remove(&run.id.nonce);
        self.forget(&record::run_label(run.id));
    }

    fn run(&self, id: RunId) -> Option<Arc<Run>> {
        self.lock().runs.get(&id.nonce).filter(|r| r.id == id).cloned()
    }

    /// Has the nest keep what the run needs; again when the input has ended, because the kept end would keep it open.
    fn keep(&self, run: &Run) -> io::Result<()> {
        let Some(pid) = run.pid() else { return Ok(()) };
        let all = [
            StreamKind::Stdin,
            StreamKind::Stdout,
            StreamKind::Stderr,
            StreamKind::Tty,
        ];
        let ends = all.iter().filter_map(|s| Some((*s, run.streams.port(*s)?.far()?)));
        let (streams, fds): (Vec<_>, Vec<_>) = ends.unzip();
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let record = RunRecord {
            pid,
            uid: run.owner.uid,
            gid: run.owner.gid,
            sort: run.sort,
            streams,
        };
        self.keeper.keep(&record::run_label(run.id), &fds, record.encode())
    }

    fn streams(&self, id: RunId, outbox: Arc<Outbox>) -> Arc<Streams> {
        let runs = self.myself.clone();
        Streams::new(id, outbox, move || {
            let Some(runs) = runs.upgrade() else { return };
            let run = runs.lock().runs.get(&id.nonce).cloned();
            if let Some(Err(e)) = run.map(|run| runs.keep(&run)) {
                tracing::warn!("the end of a run's input may not be seen: {e}");
            }
        })
    }

    fn relay(&self, which: impl Fn(&Relay) -> bool) -> Option<Arc<Relay>> {
        self.lock()
            .relays
            .values()
            .find(|r| !r.is_closed() && which(r))
            .cloned()
    }

    fn forget(&self, label: &str) {
        if let Err(e) = self.keeper.forget(label) {
            tracing::warn!("{label} stays with the nest: {e}");
        }
    }

    /// Waits until all output that has an end is out of the daemon, at most so long.
    pub fn finish(&self, within: Duration) {
        let runs: Vec<_> = self.lock().runs.values().cloned().collect();
        let deadline = std::time::Instant::now() + within;
        for run in runs {
            run.streams
                .outbox()
                .wait_closed(deadline.saturating_duration_since(std::time::Instant::now()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// How relays reach the origins of their runs.
struct RelayDial(Weak<Runs>);

impl Dial for RelayDial {
    fn dial(&self, open: StreamOpen) -> Result<TcpStream, crate::peers::PeerError> {
        match self.0.upgrade() {
            Some(runs) => (runs.dial)(open),
            None => Err(crate::peers::PeerError::Unknown(open.stream.run.origin)),
        }
    }

    fn input_ended(&self, relay: u64) {
        if let Some(runs) = self.0.upgrade() {
            runs.forget(&record::relay_label(relay));
        }
    }

    fn over(&self, _: StreamRef, relay: u64) {
        if let Some(runs) = self.0.upgrade() {
            runs.lock().relays.remove(&relay);
            runs.forget(&record::relay_label(relay));
        }
    }
}

fn gone(stream: StreamRef) -> io::Error {
    io::Error::new(
        io::ErrorKind::NotFound,
        format!("{:?} of a run that is over", stream.stream),
    )
}

fn random() -> io::Result<u64> {
    let mut bytes = [0u8; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}
