//! One stream of a run whose origin is another node: a local pipe or terminal, and the connection that carries its bytes.
//!
//! Owns the connection, which it makes anew whenever it breaks, and what was sent and not yet acknowledged. Refuses to
//! know the process that uses the stream. Invariants: output bytes are kept until the origin has passed them on; the
//! relay ends when the origin says so, when nobody uses it and its output has arrived, or when its input has gone to
//! another node.

use super::port::{Hold, Port};
use super::{PIECE_BYTES, Side, terminal};
use crate::peers::PeerError;
use dunlin_proto::frame;
use dunlin_proto::ids::{Pid, Slot};
use dunlin_proto::stream::{StreamFrame, StreamKind, StreamOpen, StreamRef, WINDOW_BYTES};
use std::collections::VecDeque;
use std::io::{self, BufReader};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

/// How long the origin is waited for while writers are frozen.
pub const SETTLE_WITHIN: Duration = Duration::from_secs(2);
/// Between attempts to reach the origin.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// How relays reach the origins of runs, and say that they are over.
pub trait Dial: Send + Sync {
    /// Opens a stream's connection.
    fn dial(&self, open: StreamOpen) -> Result<TcpStream, PeerError>;
    /// A relay's input has ended: no copy of its far end may keep the program from seeing it.
    fn input_ended(&self, relay: u64);
    /// A relay is over.
    fn over(&self, stream: StreamRef, relay: u64);
}

#[derive(Default)]
struct State {
    link: Option<Sender<StreamFrame>>,
    /// Output that the origin has not passed on; `acked` bytes came before.
    unacked: VecDeque<u8>,
    acked: u64,
    received: u64,
    taken: u64,
    flushes: u64,
    flushed: u64,
    leaving: Option<Leaving>,
    top: Option<Pid>,
    closed: bool,
}

struct Leaving {
    to: Slot,
    /// What goes back to the origin, once it is known that nothing more comes; acknowledged by that flush.
    unread: Option<(Vec<u8>, u64)>,
}

/// A relay.
pub struct Relay {
    stream: StreamRef,
    id: u64,
    port: OnceLock<Arc<Port>>,
    state: Mutex<State>,
    changed: Condvar,
    dial: Arc<dyn Dial>,
}

/// The port's way to its relay, which owns it.
struct RelaySide(Weak<Relay>);

impl Relay {
    /// Makes the local pipe, or takes `far`, a terminal's master or what was kept of a relay; returns a near end too.
    /// The connection is made in the background.
    pub fn start(
        stream: StreamRef,
        id: u64,
        far: Option<OwnedFd>,
        dial: Arc<dyn Dial>,
    ) -> io::Result<(Arc<Relay>, OwnedFd)> {
        let relay = Arc::new(Relay {
            stream,
            id,
            port: OnceLock::new(),
            state: Mutex::default(),
            changed: Condvar::new(),
            dial,
        });
        let side = Arc::new(RelaySide(Arc::downgrade(&relay)));
        let (port, near) = match far {
            None => Port::pipe(stream.stream, Hold::WhileUsed, side)?,
            Some(far) => {
                let port = Port::adopt(stream.stream, far, Hold::WhileUsed, side)?;
                let near = port.near()?;
                (port, near)
            }
        };
        port.start()?;
        assert!(relay.port.set(port).is_ok(), "a relay's port is set once");
        let supervised = relay.clone();
        thread::Builder::new()
            .name("relay".into())
            .spawn(move || supervised.supervise())?;
        Ok((relay, near))
    }

    /// Its stream.
    pub fn stream(&self) -> StreamRef {
        self.stream
    }

    /// The run's top process, as the origin says.
    pub fn top(&self) -> Option<Pid> {
        self.lock().top
    }

    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its local end.
    pub fn port(&self) -> &Arc<Port> {
        self.port.get().expect("set before the relay is returned")
    }

    /// Is it over?
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Returns when everything written so far is in its place in the run's output. Its writers must be frozen.
    pub fn settle(&self) -> io::Result<()> {
        self.port().drain();
        let mut state = self.lock();
        if state.unacked.is_empty() {
            return Ok(());
        }
        state.flushes += 1;
        let number = state.flushes;
        state.send(StreamFrame::Flush(number));
        self.wait_until(state, |s| s.flushed >= number)
    }

    /// The process whose input it is goes to `to`: what it has not read goes back to the origin, and from there after it.
    /// Goes on in the background if the origin is slow (`TimedOut`).
    pub fn leave(&self, to: Slot) -> io::Result<()> {
        let mut state = self.lock();
        state.leaving = Some(Leaving { to, unread: None });
        state.send(StreamFrame::Leave);
        self.wait_until(state, |s| s.leaving.is_none())
    }

    /// Ends it.
    pub fn close(&self) {
        let mut state = self.lock();
        let first = !std::mem::replace(&mut state.closed, true);
        state.link = None;
        drop(state);
        self.changed.notify_all();
        if let Some(port) = self.port.get() {
            port.close();
        }
        if first {
            self.dial.over(self.stream, self.id);
        }
    }

    fn wait_until(&self, mut state: MutexGuard<'_, State>, done: impl Fn(&State) -> bool) -> io::Result<()> {
        let deadline = Instant::now() + SETTLE_WITHIN;
        loop {
            if state.closed || done(&state) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let origin = self.stream.run.origin;
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("the run's origin, {origin}, does not answer"),
                ));
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(|e| e.into_inner())
                .0;
        }
    }

    fn supervise(self: &Arc<Self>) {
        loop {
            let (received, acked) = {
                let state = self.lock();
                if state.closed {
                    return;
                }
                (state.received, state.acked)
            };
            let open = StreamOpen {
                stream: self.stream,
                relay: self.id,
                received,
                acked,
            };
            let ended = match self.dial.dial(open) {
                Ok(stream) => self.run_link(stream).err(),
                Err(PeerError::Refused { reason, .. }) => {
                    tracing::warn!("a stream of run {:?} is refused by its origin: {reason}", self.stream);
                    return self.close();
                }
                Err(e) => Some(io::Error::other(e)),
            };
            let mut state = self.lock();
            state.link = None;
            if !state.closed {
                tracing::info!("a stream of a run is cut off from its origin, will try again: {ended:?}");
                let wait = self.changed.wait_timeout_while(state, RETRY_AFTER, |s| !s.closed);
                drop(wait.unwrap_or_else(|e| e.into_inner()));
            }
        }
    }

    fn run_link(self: &Arc<Self>, stream: TcpStream) -> io::Result<()> {
        let mut from = BufReader::new(stream.try_clone()?);
        stream.set_read_timeout(Some(SETTLE_WITHIN))?;
        let resume: StreamFrame = frame::read(&mut from)?;
        stream.set_read_timeout(None)?;
        match resume {
            StreamFrame::Resume { received, top } => {
                self.lock().top = top;
                self.link_up(received, stream)?;
            }
            StreamFrame::Close => {
                self.close();
                return Ok(());
            }
            other => return Err(unexpected(&other)),
        }
        loop {
            if !self.frame(frame::read(&mut from)?)? {
                return Ok(());
            }
        }
    }

    fn link_up(&self, received: u64, mut stream: TcpStream) -> io::Result<()> {
        let (link, frames) = channel::<StreamFrame>();
        let mut state = self.lock();
        state.acknowledge(received)?;
        for piece in Vec::from(state.unacked.clone()).chunks(PIECE_BYTES) {
            let _ = link.send(StreamFrame::Data(piece.to_vec()));
        }
        state.link = Some(link);
        let taken = state.taken;
        state.send(StreamFrame::Taken(taken));
        if state.flushes > state.flushed {
            let number = state.flushes;
            state.send(StreamFrame::Flush(number));
        }
        if state.leaving.is_some() {
            state.send(StreamFrame::Leave);
        }
        drop(state);
        thread::Builder::new().name("relay sender".into()).spawn(move || {
            for message in frames {
                if frame::write(&mut stream, &message).is_err() {
                    break;
                }
            }
            // Wakes the reader, whether the connection is broken or not wanted any more.
            let _ = stream.shutdown(Shutdown::Both);
        })?;
        Ok(())
    }

    /// Acts on one frame; `false`: the relay is over.
    fn frame(self: &Arc<Self>, message: StreamFrame) -> io::Result<bool> {
        match message {
            StreamFrame::Data(bytes) => {
                self.lock().received += bytes.len() as u64;
                self.port().input(&bytes);
            }
            StreamFrame::End => self.port().end_input(),
            StreamFrame::Taken(total) => self.lock().acknowledge(total)?,
            StreamFrame::Flushed(number) => {
                let mut state = self.lock();
                state.flushed = state.flushed.max(number);
                let unread = state.leaving.as_ref().and_then(|l| l.unread.as_ref());
                if unread.is_some_and(|(_, flush)| *flush <= number) {
                    state.leaving = None;
                    drop(state);
                    self.input_has_left();
                }
            }
            StreamFrame::Left => self.give_back()?,
            StreamFrame::Resize(size) => {
                if let Some(far) = self.port().far() {
                    terminal::resize(&far, size)?;
                }
            }
            StreamFrame::Close => {
                self.close();
                return Ok(false);
            }
            StreamFrame::Resume { .. } | StreamFrame::Flush(_) | StreamFrame::Leave | StreamFrame::Unread { .. } => {
                return Err(unexpected(&message));
            }
        }
        self.changed.notify_all();
        Ok(!self.is_closed())
    }

    /// Nothing more comes from the origin: what was not read goes back to it.
    fn give_back(&self) -> io::Result<()> {
        let mut state = self.lock();
        let Some(leaving) = &state.leaving else {
            return Err(unexpected(&StreamFrame::Left));
        };
        let to = leaving.to;
        let bytes = match &leaving.unread {
            // Given to an earlier connection, which broke.
            Some((bytes, _)) => bytes.clone(),
            None => {
                drop(state);
                let unread = self.port().take_unread()?.bytes;
                state = self.lock();
                unread
            }
        };
        state.flushes += 1;
        let number = state.flushes;
        if let Some(leaving) = &mut state.leaving {
            leaving.unread = Some((bytes.clone(), number));
        }
        state.send(StreamFrame::Unread { to, bytes });
        state.send(StreamFrame::Flush(number));
        Ok(())
    }

    /// Others may still write to the terminal, or have the pipe open: a child that stayed here, say, with which it may move
    /// yet.
    fn input_has_left(self: &Arc<Self>) {
        self.port().release_input();
        if self.stream.stream == StreamKind::Stdin {
            let relay = self.clone();
            let watch = move || {
                if relay.port().await_no_readers() {
                    relay.close();
                }
            };
            if let Err(e) = thread::Builder::new().name("relay unused".into()).spawn(watch) {
                tracing::warn!("a stream of a run stays open: {e}");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl State {
    /// Sends where there is a connection; what must not be lost is sent again by the next one.
    fn send(&mut self, message: StreamFrame) {
        if self.link.as_ref().is_some_and(|link| link.send(message).is_err()) {
            self.link = None;
        }
    }

    /// The origin has had so many bytes in all.
    fn acknowledge(&mut self, total: u64) -> io::Result<()> {
        let newly = total.saturating_sub(self.acked);
        if newly > self.unacked.len() as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "more acknowledged than was sent",
            ));
        }
        self.unacked.drain(..newly as usize);
        self.acked += newly;
        Ok(())
    }
}

impl Side for RelaySide {
    fn wait_for_room(&self) -> bool {
        let Some(relay) = self.0.upgrade() else { return false };
        let full = |s: &mut State| !s.closed && s.unacked.len() as u64 >= WINDOW_BYTES;
        let state = relay
            .changed
            .wait_while(relay.lock(), full)
            .unwrap_or_else(|e| e.into_inner());
        !state.closed
    }

    fn output(&self, _: StreamKind, bytes: &[u8]) {
        let Some(relay) = self.0.upgrade() else { return };
        let mut state = relay.lock();
        state.unacked.extend(bytes);
        state.send(StreamFrame::Data(bytes.to_vec()));
    }

    fn taken(&self, bytes: usize) {
        let Some(relay) = self.0.upgrade() else { return };
        let mut state = relay.lock();
        state.taken += bytes as u64;
        let taken = state.taken;
        state.send(StreamFrame::Taken(taken));
    }

    fn input_ended(&self) {
        if let Some(relay) = self.0.upgrade() {
            relay.dial.input_ended(relay.id);
        }
    }

    fn unused(&self) {
        let Some(relay) = self.0.upgrade() else { return };
        let waiting = |s: &mut State| !s.closed && !s.unacked.is_empty();
        drop(relay.changed.wait_while(relay.lock(), waiting));
        relay.close();
    }
}

fn unexpected(frame: &StreamFrame) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("unexpected in a stream: {frame:?}"))
}
