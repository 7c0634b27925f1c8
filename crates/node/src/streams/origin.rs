//! The streams of one run, at its origin: the local pipes or terminal, and the relays of other nodes.
//!
//! Owns the switch that says where input goes: to the node of the run's top process. Refuses to know the run's process
//! and what its output is for ([`Outbox`] does). Invariants: input is in one place at a time, and in order: what a
//! program that left has not read comes back to the front of the queue before anything goes to the new place; input that
//! a relay has not reported as taken is kept, and sent again over its next connection.

use super::outbox::Outbox;
use super::port::{Hold, Identity, Port};
use super::{PIECE_BYTES, Side, terminal};
use dunlin_proto::control::WindowSize;
use dunlin_proto::frame;
use dunlin_proto::ids::{Pid, RunId, Slot};
use dunlin_proto::stream::{StreamFrame, StreamKind, StreamOpen, TtyState, WINDOW_BYTES};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufReader};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;

/// So many relays of one run are remembered; of those without connection the oldest goes first.
const MAX_RELAYS: usize = 256;

/// Where input goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    At(Slot),
    /// What was not read there has still to come back.
    Leaving(Slot),
}

struct RelayEnd {
    node: Slot,
    stream: StreamKind,
    link: Option<Sender<StreamFrame>>,
    /// Distinguishes the connections of one relay.
    links: u64,
    /// Output: come in, passed on.
    received: u64,
    passed: u64,
    /// Input: sent, and of that not yet taken.
    sent: u64,
    untaken: VecDeque<u8>,
    end_sent: bool,
}

struct Switch {
    place: Place,
    /// Input that is nowhere yet.
    pending: VecDeque<u8>,
    ended: bool,
    /// Bytes that came back after they were reported to the caller as taken.
    reported: usize,
    top: Option<Pid>,
    tty: Option<TtyState>,
    relays: BTreeMap<u64, RelayEnd>,
    closed: bool,
}

/// A run's streams.
pub struct Streams {
    run: RunId,
    ports: Mutex<BTreeMap<StreamKind, Arc<Port>>>,
    outbox: Arc<Outbox>,
    switch: Mutex<Switch>,
    input_ended: Box<dyn Fn() + Send + Sync>,
}

struct LocalSide(Weak<Streams>, Arc<Outbox>);

impl Streams {
    /// Those of a run, without any yet. `input_ended`: the end of the input has to be seen by the program's readers.
    pub fn new(run: RunId, outbox: Arc<Outbox>, input_ended: impl Fn() + Send + Sync + 'static) -> Arc<Streams> {
        let switch = Switch {
            place: Place::At(run.origin),
            pending: VecDeque::new(),
            ended: false,
            reported: 0,
            top: None,
            tty: None,
            relays: BTreeMap::new(),
            closed: false,
        };
        let (ports, switch) = (Mutex::default(), Mutex::new(switch));
        Arc::new(Streams {
            run,
            ports,
            outbox,
            switch,
            input_ended: Box::new(input_ended),
        })
    }

    /// Adds a pipe; returns its near end.
    pub fn add_pipe(self: &Arc<Self>, stream: StreamKind) -> io::Result<OwnedFd> {
        let side = Arc::new(LocalSide(Arc::downgrade(self), self.outbox.clone()));
        let (port, near) = Port::pipe(stream, Hold::WithoutUsers, side)?;
        self.add(port)?;
        Ok(near)
    }

    /// Adds a stream by its far end: a terminal's master, or what was kept.
    pub fn adopt(self: &Arc<Self>, stream: StreamKind, far: OwnedFd) -> io::Result<()> {
        let side = Arc::new(LocalSide(Arc::downgrade(self), self.outbox.clone()));
        self.add(Port::adopt(stream, far, Hold::WithoutUsers, side)?)
    }

    fn add(&self, port: Arc<Port>) -> io::Result<()> {
        port.start()?;
        lock(&self.ports).insert(port.stream(), port);
        Ok(())
    }

    /// The run.
    pub fn run(&self) -> RunId {
        self.run
    }

    /// Where its output goes.
    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    /// The local end of a stream.
    pub fn port(&self, stream: StreamKind) -> Option<Arc<Port>> {
        lock(&self.ports).get(&stream).cloned()
    }

    /// Which stream is it?
    pub fn identify(&self, identity: Identity) -> Option<StreamKind> {
        lock(&self.ports)
            .values()
            .find(|p| p.identity() == identity)
            .map(|p| p.stream())
    }

    /// Passes on everything that was written here.
    pub fn drain(&self) {
        let ports: Vec<_> = lock(&self.ports).values().cloned().collect();
        ports.iter().for_each(|p| p.drain());
    }

    /// Input from the run's caller.
    pub fn input(&self, bytes: &[u8]) {
        let mut switch = self.lock();
        switch.pending.extend(bytes);
        self.route(&mut switch);
    }

    /// The end of the caller's input.
    pub fn end_input(&self) {
        let mut switch = self.lock();
        switch.ended = true;
        self.route(&mut switch);
    }

    /// The caller's terminal has another size.
    pub fn resize(&self, size: WindowSize) -> io::Result<()> {
        let mut switch = self.lock();
        for relay in switch.relays.values_mut().filter(|r| r.stream == StreamKind::Tty) {
            relay.send(StreamFrame::Resize(size));
        }
        drop(switch);
        match self.port(StreamKind::Tty).and_then(|p| p.far()) {
            Some(master) => terminal::resize(&master, size),
            None => Ok(()),
        }
    }

    /// The run's top process.
    pub fn set_top(&self, pid: Pid) {
        self.lock().top = Some(pid);
    }

    /// What the terminal was like where it was used last.
    pub fn tty(&self) -> Option<TtyState> {
        self.lock().tty
    }

    /// Remembers that.
    pub fn set_tty(&self, state: TtyState) {
        self.lock().tty = Some(state);
    }

    /// The top process goes from here to `to`: what it has not read goes with it.
    pub fn leave_here(&self, to: Slot) -> io::Result<()> {
        let unread = match self.input_port() {
            Some(port) => port.take_unread()?,
            None => Default::default(),
        };
        let mut switch = self.lock();
        switch.reported += unread.taken;
        self.arrive(&mut switch, to, unread.bytes);
        Ok(())
    }

    /// The top process is on `node`, says that node. `false`: not before what it has not read elsewhere has come back.
    pub fn is_at(&self, node: Slot) -> bool {
        let mut switch = self.lock();
        let at = match switch.place {
            Place::At(at) | Place::Leaving(at) => at,
        };
        if at == node && switch.place == Place::At(node) {
            return true;
        }
        // Only where the node that has the rest is gone is the rest given up.
        let lost = at != self.run.origin && !switch.relays.values().any(|r| r.node == at && r.link.is_some());
        if lost {
            self.arrive(&mut switch, node, Vec::new());
        }
        lost
    }

    /// Serves a relay's connection until it ends.
    pub fn serve(self: &Arc<Self>, from: Slot, open: StreamOpen, stream: TcpStream) -> io::Result<()> {
        let mut frames = BufReader::new(stream.try_clone()?);
        let Some(number) = self.link_up(from, open, stream)? else {
            return Ok(());
        };
        let ended = loop {
            match frame::read(&mut frames).and_then(|message| self.frame(open.relay, message)) {
                Ok(()) => {}
                Err(e) => break e,
            }
        };
        let mut switch = self.lock();
        if let Some(relay) = switch.relays.get_mut(&open.relay).filter(|r| r.links == number) {
            relay.link = None;
        }
        match ended.kind() {
            io::ErrorKind::UnexpectedEof => Ok(()),
            _ => Err(ended),
        }
    }

    /// As the death of the daemon would: every end is closed, nobody is told.
    #[cfg(test)]
    pub fn cut(&self) {
        let mut switch = self.lock();
        switch.relays.values_mut().for_each(|relay| relay.link = None);
        switch.relays.clear();
        drop(switch);
        let ports = std::mem::take(&mut *lock(&self.ports));
        ports.values().for_each(|p| p.close());
    }

    /// Nobody reads or writes any more.
    pub fn close(&self) {
        let mut switch = self.lock();
        switch.closed = true;
        for relay in switch.relays.values_mut() {
            relay.send(StreamFrame::Close);
            relay.link = None;
        }
        drop(switch);
        let ports = std::mem::take(&mut *lock(&self.ports));
        ports.values().for_each(|p| p.close());
    }

    /// The number of this connection among the relay's; `None`: the run is over.
    fn link_up(self: &Arc<Self>, from: Slot, open: StreamOpen, mut stream: TcpStream) -> io::Result<Option<u64>> {
        let mut switch = self.lock();
        if switch.closed {
            frame::write(&mut stream, &StreamFrame::Close)?;
            return Ok(None);
        }
        let (link, messages) = channel::<StreamFrame>();
        let top = switch.top;
        self.make_room(&mut switch, from, &open);
        let relay = switch.relays.entry(open.relay).or_insert_with(|| RelayEnd {
            node: from,
            stream: open.stream.stream,
            link: None,
            links: 0,
            received: open.acked,
            passed: open.acked,
            sent: open.received,
            untaken: VecDeque::new(),
            end_sent: false,
        });
        let missing = relay
            .sent
            .checked_sub(open.received)
            .filter(|m| *m <= relay.untaken.len() as u64);
        let missing = missing.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a relay counts wrongly"))?;
        relay.links += 1;
        let number = relay.links;
        relay.link = Some(link);
        relay.send(StreamFrame::Resume {
            received: relay.received,
            top,
        });
        let again: Vec<u8> = relay
            .untaken
            .iter()
            .copied()
            .skip(relay.untaken.len() - missing as usize)
            .collect();
        for piece in again.chunks(PIECE_BYTES) {
            relay.send(StreamFrame::Data(piece.to_vec()));
        }
        relay.send(StreamFrame::Taken(relay.passed));
        relay.end_sent = false;
        self.route(&mut switch);
        drop(switch);
        thread::Builder::new().name("stream sender".into()).spawn(move || {
            for message in messages {
                if frame::write(&mut stream, &message).is_err() {
                    break;
                }
            }
            let _ = stream.shutdown(Shutdown::Both);
        })?;
        Ok(Some(number))
    }

    /// Forgets relays that will not come back: those of the same stream and node, and the oldest beyond the bound.
    fn make_room(&self, switch: &mut Switch, from: Slot, open: &StreamOpen) {
        let dead = |r: &RelayEnd| r.link.is_none();
        let same = |r: &RelayEnd| r.node == from && r.stream == open.stream.stream;
        let superseded = switch
            .relays
            .iter()
            .find(|(id, r)| **id != open.relay && dead(r) && same(r))
            .map(|(id, _)| *id);
        if let Some(old) = superseded.and_then(|id| switch.relays.remove(&id)) {
            // Its daemon was restarted: what it had not passed on goes to its successor.
            old.untaken
                .into_iter()
                .rev()
                .for_each(|byte| switch.pending.push_front(byte));
        }
        if switch.relays.len() >= MAX_RELAYS
            && let Some(id) = switch.relays.iter().find(|(_, r)| dead(r)).map(|(id, _)| *id)
        {
            switch.relays.remove(&id);
        }
    }

    fn frame(self: &Arc<Self>, id: u64, message: StreamFrame) -> io::Result<()> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let mut switch = self.lock();
        let relay = switch
            .relays
            .get_mut(&id)
            .ok_or_else(|| invalid("the relay has left"))?;
        match message {
            StreamFrame::Data(bytes) => {
                relay.received += bytes.len() as u64;
                // The frozen writers of a settled stream may exceed the window by what a pipe holds.
                if relay.received - relay.passed > 16 * WINDOW_BYTES {
                    return Err(invalid("a relay exceeds its window"));
                }
                let stream = relay.stream;
                let streams = Arc::downgrade(self);
                let credit = move |passed| {
                    if let Some(streams) = streams.upgrade() {
                        streams.passed(id, passed);
                    }
                };
                drop(switch);
                self.outbox.put(stream, &bytes, Some(Arc::new(credit)));
            }
            StreamFrame::Taken(total) => {
                let before = relay.sent - relay.untaken.len() as u64;
                let newly = total.saturating_sub(before);
                if newly > relay.untaken.len() as u64 {
                    return Err(invalid("a relay has taken more than it was sent"));
                }
                relay.untaken.drain(..newly as usize);
                drop(switch);
                self.taken(newly as usize);
            }
            StreamFrame::Flush(number) => relay.send(StreamFrame::Flushed(number)),
            StreamFrame::Leave => {
                relay.send(StreamFrame::Left);
                let node = relay.node;
                if relay.stream.takes_input() && switch.place == Place::At(node) {
                    switch.place = Place::Leaving(node);
                }
                drop(switch);
            }
            StreamFrame::Unread { to, bytes } => {
                let node = relay.node;
                // What was sent and not taken is among the bytes; the rest had been reported as taken.
                let untaken = std::mem::take(&mut relay.untaken).len();
                // It took the end back with the rest, and sees it when it is told again.
                relay.end_sent = false;
                if switch.place == Place::Leaving(node) {
                    switch.reported += bytes.len().saturating_sub(untaken);
                    self.arrive(&mut switch, to, bytes);
                }
            }
            StreamFrame::Resume { .. }
            | StreamFrame::Flushed(_)
            | StreamFrame::End
            | StreamFrame::Left
            | StreamFrame::Resize(_)
            | StreamFrame::Close => return Err(invalid("a word of the origin's, from a relay")),
        }
        Ok(())
    }

    fn passed(&self, id: u64, bytes: usize) {
        let mut switch = self.lock();
        if let Some(relay) = switch.relays.get_mut(&id) {
            relay.passed += bytes as u64;
            relay.send(StreamFrame::Taken(relay.passed));
        }
    }

    /// Input was passed on to a program; the caller may send so much more, but for what it was told before.
    fn taken(&self, bytes: usize) {
        let mut switch = self.lock();
        let known = bytes.min(switch.reported);
        switch.reported -= known;
        drop(switch);
        self.outbox.input_taken(bytes - known);
    }

    fn arrive(&self, switch: &mut Switch, node: Slot, unread: Vec<u8>) {
        unread
            .into_iter()
            .rev()
            .for_each(|byte| switch.pending.push_front(byte));
        switch.place = Place::At(node);
        if node == self.run.origin
            && let Some(port) = self.input_port()
        {
            port.release_input();
        }
        self.route(switch);
    }

    /// Sends what is pending to where it belongs, if that can be reached.
    fn route(&self, switch: &mut Switch) {
        let Place::At(place) = switch.place else { return };
        if place == self.run.origin {
            let Some(port) = self.input_port() else { return };
            let bytes: Vec<u8> = switch.pending.drain(..).collect();
            if !bytes.is_empty() {
                port.input(&bytes);
            }
            if switch.ended {
                port.end_input();
            }
        } else {
            let at = |r: &&mut RelayEnd| r.node == place && r.stream.takes_input() && r.link.is_some();
            let Some(relay) = switch.relays.values_mut().find(at) else {
                return;
            };
            for piece in Vec::from(std::mem::take(&mut switch.pending)).chunks(PIECE_BYTES) {
                relay.untaken.extend(piece);
                relay.sent += piece.len() as u64;
                relay.send(StreamFrame::Data(piece.to_vec()));
            }
        }
        if switch.ended {
            let inputs = switch.relays.values_mut().filter(|r| r.stream == StreamKind::Stdin);
            for relay in inputs.filter(|r| r.link.is_some() && !r.end_sent) {
                relay.send(StreamFrame::End);
                relay.end_sent = true;
            }
        }
    }

    fn input_port(&self) -> Option<Arc<Port>> {
        lock(&self.ports).values().find(|p| p.stream().takes_input()).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Switch> {
        lock(&self.switch)
    }
}

impl RelayEnd {
    fn send(&mut self, message: StreamFrame) {
        if self.link.as_ref().is_some_and(|link| link.send(message).is_err()) {
            self.link = None;
        }
    }
}

impl Side for LocalSide {
    fn wait_for_room(&self) -> bool {
        self.1.wait_for_room()
    }

    fn output(&self, stream: StreamKind, bytes: &[u8]) {
        self.1.put(stream, bytes, None);
    }

    fn taken(&self, bytes: usize) {
        if let Some(streams) = self.0.upgrade() {
            streams.taken(bytes);
        }
    }

    fn input_ended(&self) {
        if let Some(streams) = self.0.upgrade() {
            (streams.input_ended)();
        }
    }

    fn unused(&self) {}
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
