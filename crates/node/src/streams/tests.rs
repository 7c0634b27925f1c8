//! Streams over loopback, with pipes and terminals of this kernel and threads in place of programs.

use super::origin::Streams;
use super::outbox::{Drain, Outbox};
use super::port::Identity;
use super::relay::{Dial, Relay};
use super::terminal;
use crate::peers::PeerError;
use dunlin_proto::control::{ExitStatus, Reply, WindowSize};
use dunlin_proto::ids::{RunId, Slot};
use dunlin_proto::stream::{StreamKind, StreamOpen, StreamRef, WINDOW_BYTES};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

const ORIGIN: Slot = Slot(1);
const RUN: RunId = RunId {
    origin: ORIGIN,
    nonce: 9,
};

struct Told(Sender<Reply>);
impl Drain for Told {
    fn put(&mut self, reply: Reply) -> io::Result<()> {
        self.0.send(reply).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// A run's streams, and what its caller is told.
struct Origin {
    streams: Arc<Streams>,
    told: Receiver<Reply>,
}

impl Origin {
    fn new() -> Origin {
        let (to, told) = channel();
        let outbox = Outbox::start(Box::new(Told(to)), || {}).unwrap();
        outbox.release(None);
        Origin {
            streams: Streams::new(RUN, outbox, || {}),
            told,
        }
    }

    /// The next output, of at least so many bytes.
    fn output(&self, length: usize) -> Vec<u8> {
        let mut seen = Vec::new();
        while seen.len() < length {
            match self.told.recv_timeout(Duration::from_secs(10)).unwrap() {
                Reply::Output { bytes, .. } => seen.extend(bytes),
                Reply::InputTaken { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        seen
    }

    /// Waits until the caller has been told that so much was taken.
    fn taken(&self, length: usize) {
        let mut seen = 0;
        while seen < length {
            if let Reply::InputTaken { bytes } = self.told.recv_timeout(Duration::from_secs(10)).unwrap() {
                seen += bytes as usize;
            }
        }
        assert_eq!(seen, length);
    }
}

/// A node, as an origin sees it: its relays reach the origin over TCP, and the connection can be cut.
struct Node {
    slot: Slot,
    streams: Arc<Streams>,
    cut: Mutex<Vec<TcpStream>>,
}

impl Node {
    fn new(slot: u16, origin: &Origin) -> Arc<Node> {
        Arc::new(Node {
            slot: Slot(slot),
            streams: origin.streams.clone(),
            cut: Mutex::default(),
        })
    }

    fn relay(self: &Arc<Self>, stream: StreamKind) -> (Arc<Relay>, File) {
        let far = (stream == StreamKind::Tty).then(|| terminal::open_master(File::open("/").unwrap()).unwrap());
        let stream = StreamRef { run: RUN, stream };
        let (relay, near) = Relay::start(stream, rand(), far, self.clone()).unwrap();
        (relay, near.into())
    }

    fn cut(&self) {
        for stream in self.cut.lock().unwrap().drain(..) {
            // One that has ended by itself is cut.
            match stream.shutdown(std::net::Shutdown::Both) {
                Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
                other => other.unwrap(),
            }
        }
    }
}

fn rand() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

impl Dial for Node {
    fn dial(&self, open: StreamOpen) -> Result<TcpStream, PeerError> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (served, _) = listener.accept().unwrap();
        let (streams, slot) = (self.streams.clone(), self.slot);
        self.cut.lock().unwrap().push(stream.try_clone().unwrap());
        thread::spawn(move || streams.serve(slot, open, served));
        Ok(stream)
    }

    fn input_ended(&self, _: u64) {}

    fn over(&self, _: StreamRef, _: u64) {}
}

fn read(from: &mut File, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_local_run_reads_writes_and_sees_the_end() {
    let origin = Origin::new();
    let mut stdin: File = origin.streams.add_pipe(StreamKind::Stdin).unwrap().into();
    let mut stdout: File = origin.streams.add_pipe(StreamKind::Stdout).unwrap().into();
    origin.streams.input(b"question");
    origin.taken(8);
    origin.streams.end_input();
    let mut asked = String::new();
    stdin.read_to_string(&mut asked).unwrap();
    stdout.write_all(asked.to_uppercase().as_bytes()).unwrap();
    assert_eq!(origin.output(8), b"QUESTION");

    stdout.write_all(b"last words").unwrap();
    origin.streams.drain();
    origin.streams.outbox().finish(Some(Reply::Exited(ExitStatus::Code(0))));
    assert_eq!(origin.output(10), b"last words");
    assert_eq!(origin.told.recv().unwrap(), Reply::Exited(ExitStatus::Code(0)));
}

#[test]
fn a_program_that_does_not_read_is_given_no_more_than_fits_and_its_caller_knows() {
    let origin = Origin::new();
    let _stdin = origin.streams.add_pipe(StreamKind::Stdin).unwrap();
    origin.streams.input(&vec![7; WINDOW_BYTES as usize]);
    // What a pipe holds.
    origin.taken(64 << 10);
    assert!(origin.told.recv_timeout(Duration::from_millis(50)).is_err());
}

#[test]
fn descriptors_are_recognised_at_both_ends() {
    let origin = Origin::new();
    let stdin = origin.streams.add_pipe(StreamKind::Stdin).unwrap();
    let master = terminal::open_master(File::open("/").unwrap()).unwrap();
    let slave = terminal::slave(master.as_fd()).unwrap();
    origin.streams.adopt(StreamKind::Tty, master).unwrap();
    let known = |fd: &std::os::fd::OwnedFd| origin.streams.identify(Identity::of(fd).unwrap()?);
    assert_eq!(known(&stdin), Some(StreamKind::Stdin));
    assert_eq!(known(&slave), Some(StreamKind::Tty));
    assert_eq!(known(&rustix::pipe::pipe().unwrap().0), None);
    assert_eq!(known(&File::open("/dev/null").unwrap().into()), None);
    assert_eq!(Identity::of(File::open("/").unwrap()).unwrap(), None);
}

#[test]
fn output_of_two_nodes_in_turn_keeps_its_order() {
    let origin = Origin::new();
    let mut here: File = origin.streams.add_pipe(StreamKind::Stdout).unwrap().into();
    let (there, mut out) = Node::new(2, &origin).relay(StreamKind::Stdout);
    let mut expected = Vec::new();
    for round in 0..50u8 {
        let piece = vec![round; 1000 + usize::from(round)];
        here.write_all(&piece).unwrap();
        origin.streams.drain();
        expected.extend(&piece);
        let piece = vec![round + 100; 2000];
        out.write_all(&piece).unwrap();
        there.settle().unwrap();
        expected.extend(&piece);
    }
    assert!(origin.output(expected.len()) == expected);
}

#[test]
fn a_relay_whose_connection_breaks_loses_and_doubles_nothing() {
    let origin = Origin::new();
    let node = Node::new(2, &origin);
    let (relay, mut out) = node.relay(StreamKind::Stdout);
    let expected: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let written = expected.clone();
    let writer = thread::spawn(move || out.write_all(&written).unwrap());
    let mut seen = Vec::new();
    while seen.len() < expected.len() {
        seen.extend(origin.output(100_000.min(expected.len() - seen.len())));
        node.cut();
    }
    assert!(seen == expected);
    writer.join().unwrap();
    // The writer has closed its end: the relay ends by itself.
    while !relay.is_closed() {
        thread::yield_now();
    }
}

#[test]
fn input_follows_its_program_from_node_to_node_and_home_with_what_it_has_not_read() {
    let origin = Origin::new();
    let mut stdin: File = origin.streams.add_pipe(StreamKind::Stdin).unwrap().into();
    let text: Vec<u8> = (0..WINDOW_BYTES as usize).map(|n| (n % 253) as u8).collect();
    origin.streams.input(&text);
    let mut seen = read(&mut stdin, 10_000);

    let (two, three) = (Node::new(2, &origin), Node::new(3, &origin));
    let (relay, mut stdin2) = two.relay(StreamKind::Stdin);
    origin.streams.leave_here(Slot(2)).unwrap();
    seen.extend(read(&mut stdin2, 50_000));
    // A break on the way must not matter.
    two.cut();
    seen.extend(read(&mut stdin2, 50_000));

    let (relay3, mut stdin3) = three.relay(StreamKind::Stdin);
    relay.leave(Slot(3)).unwrap();
    assert!(!relay.is_closed(), "somebody here may still have it");
    drop(stdin2);
    while !relay.is_closed() {
        thread::yield_now();
    }
    seen.extend(read(&mut stdin3, 70_000));

    relay3.leave(ORIGIN).unwrap();
    seen.extend(read(&mut stdin, text.len() - seen.len()));
    assert!(seen == text);
    // Every byte was reported as taken once.
    origin.taken(text.len());
}

#[test]
fn the_end_of_input_moves_too() {
    let origin = Origin::new();
    let mut stdin: File = origin.streams.add_pipe(StreamKind::Stdin).unwrap().into();
    origin.streams.input(b"abcdef");
    origin.streams.end_input();
    let mut seen = read(&mut stdin, 2);
    let (relay, mut stdin2) = Node::new(2, &origin).relay(StreamKind::Stdin);
    origin.streams.leave_here(Slot(2)).unwrap();
    seen.extend(read(&mut stdin2, 2));
    relay.leave(ORIGIN).unwrap();
    stdin.read_to_end(&mut seen).unwrap();
    assert_eq!(seen, b"abcdef");
}

#[test]
fn a_terminal_is_carried_with_its_settings_and_what_was_typed_ahead() {
    let origin = Origin::new();
    let master = terminal::open_master(File::open("/").unwrap()).unwrap();
    let mut here: File = terminal::slave(master.as_fd()).unwrap().into();
    origin.streams.adopt(StreamKind::Tty, master).unwrap();
    let far = || origin.streams.port(StreamKind::Tty).unwrap().far().unwrap();
    let mut settings = terminal::state(far()).unwrap();
    settings.modes[3] &= !(rustix::termios::LocalModes::ECHO | rustix::termios::LocalModes::ICANON).bits();
    settings.size = WindowSize { rows: 11, cols: 22 };
    terminal::set_state(far(), &settings).unwrap();
    origin.streams.input(b"typed ahead");
    assert_eq!(read(&mut here, 6), b"typed ");

    let (relay, mut there) = Node::new(2, &origin).relay(StreamKind::Tty);
    terminal::set_state(relay.port().far().unwrap(), &terminal::state(far()).unwrap()).unwrap();
    assert_eq!(terminal::state(relay.port().far().unwrap()).unwrap(), settings);
    origin.streams.leave_here(Slot(2)).unwrap();
    assert_eq!(read(&mut there, 5), b"ahead");
    there.write_all(b"seen\n").unwrap();
    assert_eq!(origin.output(6), b"seen\r\n");

    let size = WindowSize { rows: 33, cols: 44 };
    origin.streams.resize(size).unwrap();
    while terminal::state(relay.port().far().unwrap()).unwrap().size != size {
        thread::yield_now();
    }
    origin.streams.close();
    while !relay.is_closed() {
        thread::yield_now();
    }
}

#[test]
fn when_the_caller_is_gone_a_moved_program_cannot_write_any_more() {
    let origin = Origin::new();
    let (_relay, mut out) = Node::new(2, &origin).relay(StreamKind::Stdout);
    out.write_all(b"x").unwrap();
    origin.output(1);
    origin.streams.close();
    // Rust programs ignore SIGPIPE and get the error.
    let error = loop {
        if let Err(e) = out.write_all(b"y") {
            break e;
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}
