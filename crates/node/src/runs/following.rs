//! Streams of runs whose processes move.
//!
//! Owns what a move needs of the runs and relays of one node: recognising descriptors, making them anew, and sending
//! input after its program. Refuses to know what a move is. At a run's origin its own pipes and terminal are used; at any
//! other node, a relay's.

use super::record::{self, RelayRecord};
use super::{RelayDial, Runs, gone, random};
use crate::streams::port::Identity;
use crate::streams::relay::Relay;
use crate::streams::terminal;
use dunlin_proto::ids::{Pid, RunId, Slot};
use dunlin_proto::stream::{StreamKind, StreamOpen, StreamRef, TtyState};
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

impl Runs {
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
    /// origin, else of the local relay's. Its open file description is new; flags and position are the mover's. Of a stream
    /// that is over at its origin, one whose other end is gone.
    pub fn open_remote(&self, stream: StreamRef) -> io::Result<OwnedFd> {
        if stream.run.origin == self.own {
            let run = self.run(stream.run);
            return match run.and_then(|r| r.streams.port(stream.stream)) {
                Some(port) => port.near(),
                None => self.open_ended(stream.stream),
            };
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

    /// What a process finds of a stream when the caller of its run has gone, or a second daemon has come since: the end of
    /// the input, nobody who reads the output, a terminal that has hung up.
    fn open_ended(&self, stream: StreamKind) -> io::Result<OwnedFd> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        match stream {
            StreamKind::Stdin => Ok(read),
            StreamKind::Stdout | StreamKind::Stderr => Ok(write),
            StreamKind::Tty => terminal::slave(self.keeper.terminal()?.as_fd()),
        }
    }

    pub(super) fn start_relay(&self, stream: StreamRef, far: Option<OwnedFd>) -> io::Result<(Arc<Relay>, OwnedFd)> {
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
            let Some(port) = run.and_then(|r| r.streams.port(stream.stream)) else {
                return Ok(None);
            };
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
        let streams = self.run(run)?.streams.clone();
        let here = || terminal::state(streams.port(StreamKind::Tty)?.far()?).ok();
        streams.tty().or_else(here)
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

    /// Serves the connection of another node's relay until it ends.
    pub fn serve(&self, from: Slot, open: StreamOpen, mut stream: TcpStream) -> io::Result<()> {
        match self.run(open.stream.run) {
            Some(run) => run.streams.serve(from, open, stream),
            None => dunlin_proto::frame::write(&mut stream, &dunlin_proto::stream::StreamFrame::Close),
        }
    }
}
