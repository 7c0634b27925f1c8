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

mod record;
#[cfg(test)]
mod tests;

use crate::logs::Logs;
use crate::processes::NestProc;
use crate::streams::origin::Streams;
use crate::streams::outbox::{Drain, Outbox};
use crate::streams::port::Identity;
use crate::streams::relay::{Dial, Relay};
use crate::streams::terminal;
use dunlin_proto::control::{ExitStatus, Reply, WindowSize};
use dunlin_proto::ids::{Pid, RunId, Slot};
use dunlin_proto::stream::{StreamKind, StreamOpen, StreamRef, TtyState};
use record::{RelayRecord, RunRecord, Sort};
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

    /// Which stream of which run is this descriptor?
    pub fn identify(&self, fd: BorrowedFd<'_>) -> io::Result<Option<StreamRef>> {
        let Some(identity) = Identity::of(fd)? else {
            return Ok(None);
        };
        let state = self.lock();
        let local = state.runs.values().find_map(|r| {
            let stream = r.streams.identify(identity)?;
            Some(StreamRef { run: r.id, stream })
        });
        let remote = || {
            state
                .relays
                .values()
                .find(|r| r.port().identity() == identity)
                .map(|r| r.stream())
        };
        Ok(local.or_else(remote))
    }

    /// A descriptor for a process that comes here with this stream: a new end of the run's own pipe or terminal at its
    /// origin, else of the local relay's. Its open file description is new; flags and position are the mover's.
    pub fn open_remote(&self, stream: StreamRef) -> io::Result<OwnedFd> {
        if stream.run.origin == self.own {
            let run = self.run(stream.run);
            let port = run
                .and_then(|r| r.streams.port(stream.stream))
                .ok_or_else(|| gone(stream))?;
            return port.near();
        }
        if let Some(relay) = self.relay(|r| r.stream() == stream) {
            return relay.port().near();
        }
        let far = if stream.stream == StreamKind::Tty {
            Some(self.keeper.terminal()?)
        } else {
            None
        };
        let (relay, near) = self.start_relay(stream, far)?;
        let far = relay.port().far().ok_or_else(|| gone(stream))?;
        self.keeper.keep(
            &record::relay_label(relay.id()),
            &[far.as_fd()],
            RelayRecord { stream }.encode(),
        )?;
        Ok(near)
    }

    fn start_relay(&self, stream: StreamRef, far: Option<OwnedFd>) -> io::Result<(Arc<Relay>, OwnedFd)> {
        let dial = Arc::new(RelayDial(self.myself.clone()));
        let (relay, near) = Relay::start(stream, random()?, far, dial)?;
        self.lock().relays.insert(relay.id(), relay.clone());
        Ok((relay, near))
    }

    /// Returns when everything that was written here to the stream is in its place in the run's output. Whoever writes is
    /// frozen. For a terminal, says what it is like.
    pub fn settle(&self, stream: StreamRef) -> io::Result<Option<TtyState>> {
        let port = if stream.run.origin == self.own {
            let run = self.run(stream.run);
            let port = run
                .and_then(|r| r.streams.port(stream.stream))
                .ok_or_else(|| gone(stream))?;
            port.drain();
            port
        } else {
            let relay = self.relay(|r| r.stream() == stream).ok_or_else(|| gone(stream))?;
            relay.settle()?;
            relay.port().clone()
        };
        match (stream.stream, port.identity()) {
            (StreamKind::Tty, Identity::Terminal(_, number)) => {
                let master = port.far().ok_or_else(|| gone(stream))?;
                let foreground = self.proc.foreground_group(number)?;
                Ok(Some(TtyState {
                    foreground,
                    ..terminal::state(&master)?
                }))
            }
            (StreamKind::Tty | StreamKind::Stdin | StreamKind::Stdout | StreamKind::Stderr, _) => Ok(None),
        }
    }

    /// Everything that processes wrote here to other nodes' runs is in its place. For the end of a process, before that
    /// is told.
    pub fn settle_relays(&self) {
        let relays: Vec<_> = self.lock().relays.values().cloned().collect();
        for relay in relays {
            if let Err(e) = relay.settle() {
                tracing::warn!("the output of a process that has ended may be late: {e}");
            }
        }
    }

    /// The top process of a run has gone from here to `to`: its input follows it.
    pub fn departed(&self, run: RunId, to: Slot) -> io::Result<()> {
        if run.origin == self.own {
            return self.run(run).map_or(Ok(()), |r| r.streams.leave_here(to));
        }
        match self.relay(|r| r.stream().run == run && r.stream().stream.takes_input()) {
            Some(relay) => relay.leave(to),
            None => Ok(()),
        }
    }

    /// Makes the terminal of a run, as processes here see it, like this.
    pub fn set_terminal(&self, run: RunId, state: &TtyState) -> io::Result<()> {
        let stream = StreamRef {
            run,
            stream: StreamKind::Tty,
        };
        let port = if run.origin == self.own {
            self.run(run).and_then(|r| r.streams.port(StreamKind::Tty))
        } else {
            self.relay(|r| r.stream() == stream).map(|r| r.port().clone())
        };
        let master = port.and_then(|p| p.far()).ok_or_else(|| gone(stream))?;
        terminal::set_state(&master, state)
    }

    /// At a run's origin: what its terminal was like where it was used last.
    pub fn terminal(&self, run: RunId) -> Option<TtyState> {
        self.run(run)?.streams.tty()
    }

    /// At a run's origin: remembers that.
    pub fn terminal_is(&self, run: RunId, state: TtyState) {
        if let Some(run) = self.run(run) {
            run.streams.set_tty(state);
        }
    }

    /// The process that a run's input follows, if that is known here.
    pub fn top(&self, run: RunId) -> Option<Pid> {
        if run.origin == self.own {
            return self.run(run)?.pid();
        }
        self.relay(|r| r.stream().run == run && r.top().is_some())?.top()
    }

    /// At a run's origin: a node says that it has this process of the run; `false`: it is the top process, and what it has
    /// not read elsewhere is still on its way back.
    pub fn is_at(&self, run: RunId, pid: Pid, node: Slot) -> bool {
        self.run(run)
            .is_none_or(|r| r.pid() != Some(pid) || r.streams.is_at(node))
    }

    fn run(&self, id: RunId) -> Option<Arc<Run>> {
        self.lock().runs.get(&id.nonce).filter(|r| r.id == id).cloned()
    }

    /// Serves the connection of another node's relay until it ends.
    pub fn serve(&self, from: Slot, open: StreamOpen, mut stream: TcpStream) -> io::Result<()> {
        match self.run(open.stream.run) {
            Some(run) => run.streams.serve(from, open, stream),
            None => dunlin_proto::frame::write(&mut stream, &dunlin_proto::stream::StreamFrame::Close),
        }
    }

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
        // Its caller, who had more to say, is gone with the last daemon.
        streams.end_input();
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
        self.lock().runs.insert(nonce, run);
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
