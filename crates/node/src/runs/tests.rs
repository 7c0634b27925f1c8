//! Runs of real programs of this machine, with a keeper in place of the nest; two nodes over loopback.

use super::*;
use crate::peers::PeerError;
use crate::streams::port::Identity;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

type Kept = (Vec<OwnedFd>, Vec<u8>);

#[derive(Default)]
struct Shelf(Mutex<BTreeMap<String, Kept>>);

impl Keeper for Shelf {
    fn keep(&self, label: &str, fds: &[BorrowedFd<'_>], bytes: Vec<u8>) -> io::Result<()> {
        let fds = fds
            .iter()
            .map(|fd| fd.try_clone_to_owned())
            .collect::<io::Result<_>>()?;
        self.0.lock().unwrap().insert(label.into(), (fds, bytes));
        Ok(())
    }
    fn kept(&self, label: &str) -> io::Result<Option<(Vec<OwnedFd>, Vec<u8>)>> {
        let shelf = self.0.lock().unwrap();
        let Some((fds, bytes)) = shelf.get(label) else {
            return Ok(None);
        };
        Ok(Some((
            fds.iter().map(|fd| fd.try_clone()).collect::<io::Result<_>>()?,
            bytes.clone(),
        )))
    }
    fn forget(&self, label: &str) -> io::Result<()> {
        self.0.lock().unwrap().remove(label);
        Ok(())
    }
    fn labels(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().unwrap().keys().cloned().collect())
    }
    fn terminal(&self) -> io::Result<OwnedFd> {
        terminal::open_master(File::open("/").unwrap())
    }
}

struct Told(Sender<Reply>);
impl Drain for Told {
    fn put(&mut self, reply: Reply) -> io::Result<()> {
        self.0.send(reply).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// A node with a shelf that outlives its daemon.
struct Node {
    directory: PathBuf,
    shelf: Arc<Shelf>,
    slot: Slot,
    origin: Mutex<Weak<Runs>>,
}

impl Node {
    fn new(name: &str, slot: u16) -> Arc<Node> {
        let directory = std::env::temp_dir().join(format!("dunlin-runs-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        Arc::new(Node {
            directory,
            shelf: Arc::default(),
            slot: Slot(slot),
            origin: Mutex::default(),
        })
    }

    fn daemon(self: &Arc<Self>) -> Arc<Runs> {
        let logs = Arc::new(Logs::open(&self.directory).unwrap());
        let proc = NestProc::open(File::open("/").unwrap()).unwrap();
        let node = self.clone();
        Runs::new(self.slot, self.shelf.clone(), logs, proc, move |open| node.dial(open))
    }

    fn dial(&self, open: StreamOpen) -> Result<TcpStream, PeerError> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (served, _) = listener.accept().unwrap();
        let (origin, slot) = (
            self.origin
                .lock()
                .unwrap()
                .upgrade()
                .ok_or(PeerError::Unknown(Slot(1)))?,
            self.slot,
        );
        thread::spawn(move || origin.serve(slot, open, served));
        Ok(stream)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

const ROOT: Owner = Owner { uid: 0, gid: 0 };

/// Starts a program; its PID is the machine's own.
fn start(runs: &Runs, wiring: Wiring, argv: &[&str]) -> (Arc<Run>, Child, Receiver<Reply>) {
    let (to, told) = channel();
    let mut child = None;
    let run = runs
        .start::<io::Error>(
            ROOT,
            wiring,
            Some(Box::new(Told(to))),
            || {},
            |[a, b, c]| {
                let spawned = Command::new(argv[0])
                    .args(&argv[1..])
                    .stdin(a)
                    .stdout(b)
                    .stderr(c)
                    .spawn()?;
                let pid = Pid(spawned.id() as i32);
                child = Some(spawned);
                Ok(pid)
            },
        )
        .unwrap();
    (run, child.unwrap(), told)
}

fn outputs(told: &Receiver<Reply>) -> (Vec<u8>, Vec<u8>, ExitStatus) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match told.recv_timeout(Duration::from_secs(20)).unwrap() {
            Reply::Output { stream: 1, bytes } => out.extend(bytes),
            Reply::Output { bytes, .. } => err.extend(bytes),
            Reply::Started { .. } | Reply::InputTaken { .. } => {}
            Reply::Exited(status) => return (out, err, status),
            other => panic!("{other:?}"),
        }
    }
}

fn end(runs: &Runs, child: &mut Child) {
    let status = crate::processes::exits::decode(child.wait().unwrap().into_raw());
    runs.ended(Pid(child.id() as i32), status);
}

#[test]
fn a_run_passes_its_streams_and_its_status_through() {
    let runs = Node::new("pass", 1).daemon();
    let (run, mut child, told) = start(&runs, Wiring::Pipes, &["sh", "-c", "tr a-z A-Z; echo oops >&2; exit 5"]);
    run.streams().input(b"hello");
    run.streams().end_input();
    end(&runs, &mut child);
    let (out, err, status) = outputs(&told);
    assert_eq!(
        (out.as_slice(), err.as_slice(), status),
        (&b"HELLO"[..], &b"oops\n"[..], ExitStatus::Code(5))
    );
    assert!(runs.keeper.labels().unwrap().is_empty());
}

#[test]
fn a_detached_run_writes_its_log_and_survives_the_daemon() {
    let node = Node::new("detached", 1);
    let runs = node.daemon();
    let script = "echo one; kill -STOP $$; echo two";
    let (run, mut child, _) = start(&runs, Wiring::Detached, &["sh", "-c", script]);
    let pid = run.pid().unwrap();
    let child_pid = rustix::process::Pid::from_raw(pid.0);
    rustix::process::waitpid(child_pid, rustix::process::WaitOptions::UNTRACED).unwrap();
    // As kill -9 does: the daemon's ends are closed, and it tells nobody.
    run.streams().drain();
    run.streams().outbox().finish(None);
    assert!(run.streams().outbox().wait_closed(Duration::from_secs(10)));
    run.streams().close();
    drop((run, runs));

    let runs = node.daemon();
    assert_eq!(runs.restore().unwrap(), [pid]);
    rustix::process::kill_process(child_pid.unwrap(), rustix::process::Signal::CONT).unwrap();
    end(&runs, &mut child);
    let mut reader = runs.logs.read(pid).unwrap().unwrap();
    while reader.wait(Duration::from_secs(10)).unwrap() {}
    assert_eq!(reader.read().unwrap(), b"one\ntwo\n");
    assert!(node.shelf.labels().unwrap().is_empty());
}

#[test]
fn a_caller_that_leaves_is_noticed_by_the_program() {
    let runs = Node::new("abandon", 1).daemon();
    let (run, mut child, _told) = start(&runs, Wiring::Pipes, &["yes"]);
    runs.abandon(&run);
    assert_eq!(child.wait().unwrap().signal(), Some(13));
}

#[test]
fn a_process_finds_the_ends_of_streams_that_are_over_where_its_run_began() {
    let node = Node::new("ended", 1);
    let runs = node.daemon();
    let (run, mut child, _told) = start(&runs, Wiring::Pipes, &["sleep", "1000"]);
    let pid = run.pid().unwrap();
    let [input, output] = [StreamKind::Stdin, StreamKind::Stdout].map(|stream| StreamRef { run: run.id, stream });
    // As kill -9 does. The second daemon after it knows of no input any more.
    let cut = |runs: Arc<Runs>, run: Arc<Run>| {
        run.streams().cut();
        drop((run, runs));
        let runs = node.daemon();
        assert_eq!(runs.restore().unwrap(), [pid]);
        (runs.of(pid).unwrap(), runs)
    };
    let (run, runs) = cut(runs, run);
    let (run, runs) = cut(runs, run);
    let at_its_end = |runs: &Runs| {
        let mut stdin = File::from(runs.open_remote(input).unwrap());
        assert_eq!(stdin.read(&mut [0; 4]).unwrap(), 0);
        runs.settle(input).unwrap();
    };
    at_its_end(&runs);
    // Its output is a log by now, until it is abandoned.
    File::from(runs.open_remote(output).unwrap())
        .write_all(b"word")
        .unwrap();
    runs.abandon(&run);
    at_its_end(&runs);
    let written = File::from(runs.open_remote(output).unwrap()).write_all(b"word");
    assert_eq!(written.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    child.kill().unwrap();
    end(&runs, &mut child);
}

#[test]
fn a_terminal_has_its_size_and_interrupts() {
    let runs = Node::new("tty", 1).daemon();
    let size = WindowSize { rows: 12, cols: 34 };
    // setsid takes the terminal as the controlling one, as the nest's init does for a run.
    let script = "stty size; trap 'echo got it; exit 3' INT; echo ready; while :; do sleep 0.05; done";
    let (run, mut child, told) = start(
        &runs,
        Wiring::Terminal(size),
        &["setsid", "-c", "-w", "sh", "-c", script],
    );
    let mut seen = Vec::new();
    while !seen.ends_with(b"ready\r\n") {
        if let Reply::Output { bytes, .. } = told.recv_timeout(Duration::from_secs(20)).unwrap() {
            seen.extend(bytes);
        }
    }
    assert!(seen.starts_with(b"12 34\r\n"), "{seen:?}");
    run.streams().input(b"\x03");
    end(&runs, &mut child);
    let (out, _, status) = outputs(&told);
    assert_eq!(status, ExitStatus::Code(3));
    assert!(String::from_utf8_lossy(&out).contains("got it"));
}

/// The descriptors of one program are used here by the test, as a move would: opened elsewhere and back.
#[test]
fn the_streams_of_a_run_follow_it_to_another_node_and_back() {
    let (one, two) = (Node::new("follow1", 1), Node::new("follow2", 2));
    let (runs, there) = (one.daemon(), two.daemon());
    *two.origin.lock().unwrap() = Arc::downgrade(&runs);
    let (to, told) = channel();
    let mut near = None;
    let run = runs
        .start::<io::Error>(
            ROOT,
            Wiring::Pipes,
            Some(Box::new(Told(to))),
            || {},
            |fds| {
                near = Some(fds);
                Ok(Pid(129))
            },
        )
        .unwrap();
    let [stdin, stdout, _] = near.unwrap();
    let refs = [&stdin, &stdout].map(|fd| runs.identify(fd.as_fd()).unwrap().unwrap());
    assert_eq!(refs.map(|r| r.stream), [StreamKind::Stdin, StreamKind::Stdout]);
    let (mut stdin, mut stdout) = (File::from(stdin), File::from(stdout));
    let mut word = [0u8; 4];
    let mut echo = |from: &mut File, to: &mut File| {
        from.read_exact(&mut word).unwrap();
        to.write_all(&word).unwrap();
    };
    run.streams().input(b"aaaabbbbcccc");
    echo(&mut stdin, &mut stdout);

    let [mut stdin2, mut stdout2] = refs.map(|r| File::from(there.open_remote(r).unwrap()));
    assert_eq!(there.identify(stdout2.as_fd()).unwrap(), Some(refs[1]));
    assert_eq!(runs.settle(refs[1]).unwrap(), None);
    runs.departed(run.id, Slot(2)).unwrap();
    echo(&mut stdin2, &mut stdout2);
    // Another process of the tree is given the same pipe.
    let again = File::from(there.open_remote(refs[1]).unwrap());
    assert_eq!(Identity::of(&again).unwrap(), Identity::of(&stdout2).unwrap());
    assert_eq!(there.lock().relays.len(), 2);
    drop(again);

    let [mut stdin3, mut stdout3] = refs.map(|r| File::from(runs.open_remote(r).unwrap()));
    there.settle(refs[1]).unwrap();
    there.departed(run.id, Slot(1)).unwrap();
    drop((stdin2, stdout2));
    echo(&mut stdin3, &mut stdout3);
    runs.ended(Pid(129), ExitStatus::Code(0));
    assert_eq!(outputs(&told).0, b"aaaabbbbcccc");
    while !there.lock().relays.is_empty() || !two.shelf.labels().unwrap().is_empty() {
        thread::yield_now();
    }
}

#[test]
fn a_relay_survives_its_daemon() {
    let (one, two) = (Node::new("relay1", 1), Node::new("relay2", 2));
    let (runs, there) = (one.daemon(), two.daemon());
    *two.origin.lock().unwrap() = Arc::downgrade(&runs);
    let (run, mut child, told) = start(&runs, Wiring::Pipes, &["sleep", "1000"]);
    let out = StreamRef {
        run: run.id,
        stream: StreamKind::Stdout,
    };
    let mut stdout = File::from(there.open_remote(out).unwrap());
    stdout.write_all(b"before ").unwrap();
    there.settle(out).unwrap();
    // As kill -9 does: the old daemon's ends are closed, and it tells nobody.
    let kept = two.shelf.kept(&two.shelf.labels().unwrap()[0]).unwrap().unwrap();
    let label = two.shelf.labels().unwrap()[0].clone();
    there.relay(|_| true).unwrap().close();
    two.shelf.keep(&label, &[kept.0[0].as_fd()], kept.1.clone()).unwrap();
    drop(kept);
    drop(there);
    stdout.write_all(b"between ").unwrap();
    let there = two.daemon();
    there.restore().unwrap();
    stdout.write_all(b"after").unwrap();
    there.settle(out).unwrap();
    child.kill().unwrap();
    end(&runs, &mut child);
    assert_eq!(outputs(&told).0, b"before between after");
}

#[test]
fn a_relay_goes_on_with_the_next_daemon_of_its_origin() {
    let (one, two) = (Node::new("origin1", 1), Node::new("origin2", 2));
    let (runs, there) = (one.daemon(), two.daemon());
    *two.origin.lock().unwrap() = Arc::downgrade(&runs);
    let (run, mut child, _told) = start(&runs, Wiring::Pipes, &["sleep", "1000"]);
    let pid = run.pid().unwrap();
    let [input, output] = [StreamKind::Stdin, StreamKind::Stdout].map(|stream| StreamRef { run: run.id, stream });
    let mut stdin = File::from(there.open_remote(input).unwrap());
    let mut stdout = File::from(there.open_remote(output).unwrap());
    runs.departed(run.id, Slot(2)).unwrap();
    run.streams().input(b"read");
    let mut word = [0u8; 4];
    stdin.read_exact(&mut word).unwrap();
    stdout.write_all(b"before ").unwrap();
    there.settle(output).unwrap();

    // As kill -9 does: all descriptors of the daemon are closed, what the shelf holds is not.
    run.streams().cut();
    drop(run);
    *two.origin.lock().unwrap() = Weak::new();
    drop(runs);

    let runs = one.daemon();
    assert_eq!(runs.restore().unwrap(), [pid]);
    *two.origin.lock().unwrap() = Arc::downgrade(&runs);
    // More than a window: it only fits if what was acknowledged before is known to be.
    let written = vec![b'x'; 600_000];
    stdout.write_all(&written).unwrap();
    there.settle(output).unwrap();
    // The caller is gone, so the input has ended, here too.
    assert_eq!(stdin.read(&mut word).unwrap(), 0);
    child.kill().unwrap();
    end(&runs, &mut child);
    let mut reader = runs.logs.read(pid).unwrap().unwrap();
    while reader.wait(Duration::from_secs(10)).unwrap() {}
    let mut seen = Vec::new();
    loop {
        let bytes = reader.read().unwrap();
        if bytes.is_empty() {
            break;
        }
        seen.extend(bytes);
    }
    // What the daemon had passed on to its caller, and not yet said so, is kept again.
    let seen = seen.strip_prefix(b"before ").unwrap_or(&seen);
    assert!(seen == written, "{} bytes", seen.len());
}
