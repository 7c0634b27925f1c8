//! Processes move with their sockets.

mod support;

use dunlin_lab::harness::{NotMoved, request};
use dunlin_lab::{Lab, Options};
use support::Workshop;
use support::obedient::Obedient;

/// Every node, home included, and on.
const ROUND: [&str; 4] = ["n2", "n3", "n1", "n2"];
/// Every node and home.
const THERE_AND_BACK: [&str; 3] = ["n2", "n3", "n1"];

fn one(name: &str) -> (Lab, Workshop, Obedient) {
    let (lab, workshop) = (Lab::up(name, &Options::default()), Workshop::new(name));
    let (program, _) = Obedient::start(&lab, &workshop, "one");
    (lab, workshop, program)
}

/// Gives it a connection with itself over the loopback device: `here` and `there`, and the socket that it came by, `door`.
fn connect_to_itself(program: &mut Obedient, family: &str, address: &str) {
    program.ask(&format!("door = socket.socket(socket.{family})"));
    program.ask(&format!("door.bind(('{address}', 0))"));
    program.ask("door.listen(16)");
    program.ask(&format!("there = socket.socket(socket.{family})"));
    program.ask("there.connect(door.getsockname())");
    program.ask("here = door.accept()[0]");
    program.ask("ends = (here.getsockname(), here.getpeername())");
}

#[test]
fn a_connection_of_a_process_with_itself() {
    let (lab, _workshop, mut program) = one("sock-self");
    for (family, address) in [("AF_INET", "127.0.0.1"), ("AF_INET6", "::1")] {
        connect_to_itself(&mut program, family, address);
        program.ask("here.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)");
        program.ask("here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)");
        program.ask("there.settimeout(20)");
        for node in THERE_AND_BACK {
            assert_eq!(program.ask("here.send(b'queued')"), "6");
            assert_eq!(program.ask("there.send(b'the other way')"), "13");
            lab.move_verified(program.pid, node);
            assert_eq!(program.ask("there.recv(100)"), "b'queued'", "on {node}");
            assert_eq!(program.ask("here.recv(100)"), "b'the other way'", "on {node}");
            assert_eq!(program.ask("(here.getsockname(), here.getpeername()) == ends"), "True");
            let options = "[here.getsockopt(*o) for o in [(1, 9), (6, 1), (1, 2)]]";
            assert_eq!(program.ask(options), "[1, 1, 0]");
            // Whoever listens still does.
            program.ask(&format!("third = socket.socket(socket.{family})"));
            program.ask("third.connect(door.getsockname())");
            program.ask("fourth = door.accept()[0]");
            assert_eq!(program.ask("third.send(b'new')"), "3");
            assert_eq!(program.ask("fourth.recv(10)"), "b'new'");
            program.ask("fourth.close() or third.close()");
        }
        program.ask("here.close()");
        assert_eq!(program.ask("there.recv(10)"), "b''");
        program.ask("there.close() or door.close()");
    }
}

#[test]
fn more_than_a_window_of_bytes() {
    let (lab, _workshop, mut program) = one("sock-full");
    connect_to_itself(&mut program, "AF_INET", "127.0.0.1");
    program.ask("data = random.Random(5).randbytes(16 << 20)");
    program.ask("sent, got = 0, b''");
    program.ask("here.setblocking(False)");
    program.ask("there.settimeout(20)");
    for node in ROUND {
        program.ask(
            "exec('try:\\n  while sent < len(data): sent += here.send(data[sent:sent + 65536])\\nexcept BlockingIOError: pass')",
        );
        lab.move_process(program.pid, node);
        program.ask("while len(got) < sent: got += there.recv(1 << 20)");
        assert_eq!(program.ask("got == data[:sent]"), "True", "on {node}");
    }
}

#[test]
fn both_ends_in_a_tree() {
    let (lab, workshop) = (Lab::up("sock-tree", &Options::default()), Workshop::new("sock-tree"));
    let (mut parent, _) = Obedient::start(&lab, &workshop, "parent");
    connect_to_itself(&mut parent, "AF_INET", "127.0.0.1");
    let mut child = parent.fork("child");
    parent.ask("here.close()");
    child.ask("there.close()");
    // The listening socket is both's.
    match lab.move_as(request(parent.pid, "n2")) {
        Err(NotMoved::Refused(obstacles)) => {
            let words = format!("{obstacles:?}");
            assert!(words.contains("has the same socket"), "{words}");
            assert!(words.contains("--tree"), "{words}");
        }
        other => panic!("a process went away with a socket that another has: {other:?}"),
    }
    for node in ROUND {
        child.tell("here.recv(100)");
        lab.move_tree(parent.pid, node);
        parent.ask("there.send(b'wake')");
        assert_eq!(child.answer(), "b'wake'", "on {node}");
        child.ask("here.send(b'thanks')");
        assert_eq!(parent.ask("there.recv(100)"), "b'thanks'", "on {node}");
    }
    child.ask("door.close()");
    match lab.move_as(request(child.pid, "n3")) {
        Err(NotMoved::Refused(obstacles)) => {
            let words = format!("{obstacles:?}");
            assert!(words.contains("loopback device"), "{words}");
        }
        other => panic!("one end of a loopback connection went away: {other:?}"),
    }
}

#[test]
fn states_that_are_no_connection_any_more_or_not_yet() {
    let (lab, _workshop, mut program) = one("sock-states");
    connect_to_itself(&mut program, "AF_INET", "127.0.0.1");
    // One that is new, one that is bound, one that is half closed, one that is over with something unread.
    program.ask("new = socket.socket()");
    program.ask("bound = socket.socket()");
    program.ask("bound.bind(('127.0.0.1', 0))");
    program.ask("name = bound.getsockname()");
    program.ask("there.send(b'last words')");
    program.ask("there.shutdown(socket.SHUT_WR)");
    program.ask("a = socket.socket()");
    program.ask("a.connect(door.getsockname())");
    program.ask("b = door.accept()[0]");
    program.ask("b.send(b'unread')");
    program.ask("b.shutdown(socket.SHUT_WR)");
    program.ask("a.shutdown(socket.SHUT_WR)");
    for node in ROUND {
        lab.move_verified(program.pid, node);
        assert_eq!(program.ask("bound.getsockname() == name"), "True");
        assert_eq!(
            program.ask("here.recv(100, socket.MSG_PEEK)"),
            "b'last words'",
            "on {node}"
        );
        assert_eq!(program.ask("a.recv(100, socket.MSG_PEEK)"), "b'unread'", "on {node}");
        assert!(program.ask("there.send(b'x')").starts_with("BrokenPipeError"));
    }
    assert_eq!(program.ask("(here.recv(100), here.recv(100))"), "(b'last words', b'')");
    assert_eq!(program.ask("here.send(b'the way back')"), "12");
    assert_eq!(program.ask("there.recv(100)"), "b'the way back'");
    assert_eq!(program.ask("(a.recv(100), a.recv(100))"), "(b'unread', b'')");
    assert!(program.ask("a.send(b'x')").starts_with("BrokenPipeError"));
    program.ask("bound.listen()");
    assert_eq!(program.ask("new.connect(name)"), "None");
}

#[test]
fn datagrams_that_wait() {
    let (lab, _workshop, mut program) = one("sock-udp");
    for (family, address) in [("AF_INET", "127.0.0.1"), ("AF_INET6", "::1")] {
        program.ask(&format!("a = socket.socket(socket.{family}, socket.SOCK_DGRAM)"));
        program.ask(&format!("b = socket.socket(socket.{family}, socket.SOCK_DGRAM)"));
        program.ask(&format!("a.bind(('{address}', 0))"));
        program.ask(&format!("b.bind(('{address}', 0))"));
        program.ask("b.connect(a.getsockname())");
        for node in THERE_AND_BACK {
            program.ask("b.send(b'one') + b.send(b'x' * 20000)");
            lab.move_verified(program.pid, node);
            assert_eq!(
                program.ask("a.recvfrom(100) == (b'one', b.getsockname())"),
                "True",
                "on {node}"
            );
            assert_eq!(program.ask("a.recv(65536) == b'x' * 20000"), "True", "on {node}");
            program.ask("a.sendto(b'answer', b.getsockname())");
            assert_eq!(program.ask("b.recv(100)"), "b'answer'");
        }
    }
}

#[test]
fn a_move_that_fails_leaves_a_connection_as_it_was() {
    let (lab, workshop, mut program) = one("sock-abort");
    connect_to_itself(&mut program, "AF_INET", "127.0.0.1");
    // On the other node somebody has the port already.
    let port: u16 = program.ask("door.getsockname()[1]").parse().unwrap();
    let run = lab
        .node("n2")
        .run_as(support::obedient::obedient_spec(&workshop, "other"));
    let mut other = Obedient::known(&workshop, "other", run.pid);
    other.ask("taken = socket.socket()");
    other.ask(&format!("taken.bind(('127.0.0.1', {port}))"));
    other.ask("taken.listen()");
    program.ask("here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)");
    program.ask("there.send(b'before')");
    match lab.move_as(request(program.pid, "n2")) {
        Err(NotMoved::Failed(failure)) => {
            assert!(failure.message.contains(&format!("127.0.0.1:{port}")), "{failure:?}");
            assert!(failure.message.contains("runs on n1"), "{failure:?}");
        }
        other => panic!("two listen on one port: {other:?}"),
    }
    assert_eq!(program.ask("here.getsockopt(1, 2)"), "1");
    assert_eq!(program.ask("here.recv(100)"), "b'before'");
    assert_eq!(program.ask("here.send(b'after')"), "5");
    assert_eq!(program.ask("there.recv(100)"), "b'after'");
    lab.move_process(program.pid, "n3");
    assert_eq!(program.ask("here.send(b'elsewhere')"), "9");
    assert_eq!(program.ask("there.recv(100)"), "b'elsewhere'");
}
