//! Connections that a program has not accepted yet move with the socket that they wait at.

mod support;

use dunlin_lab::harness::{NotMoved, request};
use dunlin_lab::{Lab, Options};
use support::Workshop;
use support::fuse::while_fused;
use support::obedient::{Obedient, obedient_spec};
use support::outside::{Outside, PYTHON, addresses, nothing_was_broken};

/// Does what it is told, a line each, and says what came of it.
const CALLERS: &str = "
import socket, struct, sys
all = []
def call(address, port, said=b'', *more):
    s = socket.create_connection((address, port), 20)
    s.settimeout(20)
    name = s.getsockname()[:2]
    s.sendall(said)
    for what in more:
        what(s)
    all.append(s)
    return name
def end(s):
    s.shutdown(socket.SHUT_WR)
def reset(s):
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    s.close()
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
";

fn callers(lab: &Lab) -> Outside {
    Outside::start(lab, &[PYTHON, "-c", CALLERS])
}

fn ask(client: &mut Outside, order: &str) -> String {
    client.say(order);
    client.line()
}

/// Has it listen on the inside addresses, and say nothing.
fn listen(server: &mut Obedient, port: u16) {
    server.ask("door = socket.socket(socket.AF_INET6)");
    server.ask("door.setsockopt(1, 2, 1)");
    server.ask(&format!("door.bind(('::', {port}))"));
    server.ask("door.listen(50)");
    server.ask("door.settimeout(20)");
    // Of an accepted connection: who it is, and all it says within a moment.
    server.ask(
        "exec('def greet(n):\\n  s, peer = door.accept()\\n  s.settimeout(20)\\n  got = b\"\"\\n  while len(got) < n: got += s.recv(n - len(got))\\n  return s, (peer[0].replace(\"::ffff:\", \"\"), peer[1]), got')",
    );
}

#[test]
fn who_waits_goes_where_the_listener_goes() {
    let lab = Lab::up("callers-round", &Options::default());
    let workshop = Workshop::new("callers-round");
    let (mut server, _run) = Obedient::start(&lab, &workshop, "server");
    listen(&mut server, 8000);
    let mut client = callers(&lab);
    let [v4, v6] = addresses(&lab);
    let mut names = Vec::new();
    let mut expected = Vec::new();
    for (node, last) in [("n2", false), ("n3", true)] {
        for address in [&v4, &v6] {
            let calls = [
                ("b''", ""),
                ("b'hello'", ""),
                ("bytes(range(200)) * 300", ""),
                ("b'last words'", ", end"),
                ("b'broken off'", ", reset"),
            ];
            for (said, more) in calls {
                names.push(ask(&mut client, &format!("call('{address}', 8000, {said}{more})")));
                expected.push(said);
            }
        }
        if last {
            // What comes while the freeze lasts is no different.
            client.say(
                "[call(a, 8000, b'late') for a in [ADDRESSES]]"
                    .replace("ADDRESSES", &format!("'{v4}', '{v6}'"))
                    .as_str(),
            );
            expected.extend(["b'late'"; 2]);
        }
        lab.move_process(server.pid, node);
    }
    let late = client.line();
    let late = late.trim_matches(['[', ']']).replace("), (", ")|(");
    names.extend(late.split('|').map(str::to_owned));
    for (index, (name, said)) in names.iter().zip(&expected).enumerate() {
        let length = server.ask(&format!("len({said})"));
        assert_eq!(server.ask(&format!("(s, peer, got) = greet({length})")), "done");
        assert_eq!(server.ask("peer"), *name, "caller {index}");
        assert_eq!(server.ask(&format!("got == {said}")), "True", "caller {index}");
        if said.contains("broken off") {
            assert!(
                server.ask("s.recv(10)").starts_with("ConnectionResetError"),
                "caller {index}"
            );
            continue;
        }
        assert_eq!(
            server.ask(&format!("s.send(b'answer {index}')")),
            format!("{}", 7 + index.to_string().len())
        );
        assert_eq!(
            ask(&mut client, &format!("all[{index}].recv(100)")),
            format!("b'answer {index}'")
        );
        if said.contains("last") {
            assert_eq!(server.ask("s.recv(10)"), "b''");
        } else {
            ask(&mut client, &format!("all[{index}].send(b'and more')"));
            assert_eq!(server.ask("s.recv(100)"), "b'and more'");
        }
    }
    assert_eq!(
        server.ask("door.settimeout(0) or door.accept()").split(':').next(),
        Some("BlockingIOError")
    );
}

#[test]
fn who_waits_still_waits_after_a_move_that_failed() {
    let lab = Lab::up("callers-back", &Options::default());
    let workshop = Workshop::new("callers-back");
    let (mut server, _run) = Obedient::start(&lab, &workshop, "server");
    listen(&mut server, 8000);
    // On the other node somebody has this port already.
    server.ask("other = socket.socket()");
    server.ask("other.bind(('127.0.0.1', 0)) or other.listen()");
    let port: u16 = server.ask("other.getsockname()[1]").parse().unwrap();
    let run = lab.node("n2").run_as(obedient_spec(&workshop, "taker"));
    let mut taker = Obedient::known(&workshop, "taker", run.pid);
    taker.ask("taken = socket.socket()");
    taker.ask(&format!("taken.bind(('127.0.0.1', {port})) or taken.listen()"));
    let mut client = callers(&lab);
    let [v4, v6] = addresses(&lab);
    let said = ["b'one'", "b'x' * 50000", "b''", "b'four'"];
    let names: Vec<String> = [&v4, &v6, &v4, &v6]
        .into_iter()
        .zip(said)
        .map(|(address, said)| ask(&mut client, &format!("call('{address}', 8000, {said}, end)")))
        .collect();
    for _ in 0..2 {
        match lab.move_as(request(server.pid, "n2")) {
            Err(NotMoved::Failed(failure)) => assert!(failure.message.contains("runs on n1"), "{failure:?}"),
            other => panic!("two listen on one port: {other:?}"),
        }
    }
    server.ask("other.close()");
    lab.move_process(server.pid, "n3");
    for (name, said) in names.iter().zip(said) {
        assert_eq!(server.ask("(s, peer, got) = greet(0)"), "done");
        assert_eq!(server.ask("peer"), *name);
        server.ask("while part := s.recv(100000): got += part");
        assert_eq!(server.ask(&format!("got == {said}")), "True");
        server.ask("s.send(b'yes') and s.close()");
    }
    assert_eq!(
        ask(&mut client, "[s.recv(100) for s in all]"),
        "[b'yes', b'yes', b'yes', b'yes']"
    );
    nothing_was_broken(&lab);
}

#[test]
fn who_waits_may_be_inside_the_cluster() {
    let lab = Lab::up("callers-inside", &Options::default());
    let workshop = Workshop::new("callers-inside");
    let (mut server, _run) = Obedient::start(&lab, &workshop, "server");
    listen(&mut server, 8000);
    let inside = lab.layout().inside();
    let (mut here, _here) = Obedient::start_on(&lab, "n1", &workshop, "here");
    let (mut there, _there) = Obedient::start_on(&lab, "n2", &workshop, "there");
    for (client, address) in [(&mut here, inside.0.to_string()), (&mut there, inside.1.to_string())] {
        assert_eq!(
            client.ask(&format!("s = socket.create_connection(('{address}', 8000), 20)")),
            "done"
        );
        client.ask("s.send(b'hello')");
    }
    for node in ["n2", "n3"] {
        lab.move_process(server.pid, node);
        lab.move_process(here.pid, if node == "n2" { "n3" } else { "n2" });
    }
    for client in [&mut here, &mut there] {
        server.ask("(s, peer, got) = greet(5)");
        assert_eq!(server.ask("got"), "b'hello'");
        let name = client.ask("s.getsockname()[:2]");
        assert_eq!(server.ask("peer"), name);
        server.ask("s.send(b'welcome')");
        assert_eq!(client.ask("s.recv(100)"), "b'welcome'");
    }
}

/// A daemon dies at a step of a move (every so many of them; `DUNLIN_KILL_STRIDE=1` takes all) while three wait. Wherever the
/// program is then, they still do.
fn killed(name: &str, of_source: bool, stride: u64) {
    let number = |variable: &str| std::env::var(variable).ok().and_then(|n| n.parse::<u64>().ok());
    let stride = number("DUNLIN_KILL_STRIDE").unwrap_or(stride);
    let mut steps = number("DUNLIN_KILL_FIRST").unwrap_or_else(|| u64::from(std::process::id()) % stride + 1);
    let lab = Lab::up(name, &Options::default());
    let workshop = Workshop::new(name);
    let (mut server, _run) = Obedient::start(&lab, &workshop, "server");
    listen(&mut server, 8000);
    let mut client = callers(&lab);
    let [v4, v6] = addresses(&lab);
    let said = ["b'one'", "b'x' * 50000", "b'three'"];
    loop {
        let mut at = String::new();
        lab.until("the server is in one place with all it has", |rows| {
            let here: Vec<_> = rows.iter().filter(|row| row.pid == server.pid).collect();
            at = here.first().map(|row| row.node.clone()).unwrap_or_default();
            here.len() == 1 && here[0].pages_elsewhere.is_empty()
        });
        let to = if at == "n1" { "n2" } else { "n1" };
        let dies = if of_source { at.as_str() } else { to };
        lab.signal_daemon(dies, 9);
        lab.start_daemon_with_fuse(dies, steps);
        let when = format!("{dies} was killed at step {steps} of a move from {at} to {to}");
        for (address, said) in [&v4, &v6, &v4].into_iter().zip(said) {
            ask(&mut client, &format!("call('{address}', 8000, {said}, end)"));
        }
        let pid = server.pid.to_string();
        let words = ["--node", "n3", "move", &pid, to, "--wait", "resumed"];
        let (moved, survived) = while_fused(&lab, dies, None, || lab.dunlin(&words).status.success());
        for (index, said) in said.iter().enumerate() {
            assert_eq!(
                server.ask("(s, peer, got) = greet(0)"),
                "done",
                "caller {index}: {when}"
            );
            server.ask("while part := s.recv(100000): got += part");
            assert_eq!(server.ask(&format!("got == {said}")), "True", "caller {index}: {when}");
            server.ask("s.send(b'yes') and s.close()");
        }
        assert_eq!(
            ask(&mut client, "[s.recv(100) for s in all]"),
            "[b'yes', b'yes', b'yes']",
            "{when}"
        );
        ask(&mut client, "all.clear()");
        println!("{when}: moved {moved}");
        if survived && moved {
            break;
        }
        steps += stride;
    }
    nothing_was_broken(&lab);
}

#[test]
fn who_waits_is_not_lost_with_the_sources_daemon() {
    killed("callers-source", true, 31);
}

#[test]
fn who_waits_is_not_lost_with_the_destinations_daemon() {
    killed("callers-dest", false, 13);
}
