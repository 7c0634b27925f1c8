//! Servers and clients move while they talk, and whoever is at the other end does not notice.

mod support;

use dunlin_lab::harness::Run;
use dunlin_lab::{Lab, Options};
use dunlin_proto::ids::Pid;
use support::obedient::Obedient;
use support::outside::{Outside, PYTHON, addresses, hears_more, nothing_was_broken};
use support::{JOURNEY, program};

fn stream() -> String {
    program("stream.py").to_str().unwrap().to_owned()
}

fn echo(lab: &Lab, port: &str) -> Run {
    let run = lab.node("n1").run(&[PYTHON, &stream(), "echo", port]);
    run.until_says("ready");
    run
}

/// Moves a server on when its clients, which have heard from it where it is, go on.
fn round(lab: &Lab, server: Pid, clients: &mut [&mut Outside]) {
    for node in JOURNEY {
        lab.move_process(server, node);
        clients.iter_mut().for_each(|client| hears_more(client));
    }
}

#[test]
fn a_server_goes_round_while_clients_outside_send_without_pause() {
    let lab = Lab::up("conn-tcp", &Options::default());
    let server = echo(&lab, "8000");
    let [v4, v6] = addresses(&lab);
    let script = stream();
    let talk = |address: &str| Outside::start(&lab, &[PYTHON, &script, "talk", address, "8000", "3"]);
    let (mut one, mut other) = (talk(&v4), talk(&v6));
    hears_more(&mut one);
    hears_more(&mut other);
    round(&lab, server.pid, &mut [&mut one, &mut other]);
    for client in [&mut one, &mut other] {
        let words = client.last_words();
        eprintln!("{words}");
        assert!(words.contains(" same,"), "{words}");
    }
    nothing_was_broken(&lab);
}

#[test]
fn a_server_of_datagrams_goes_round() {
    let lab = Lab::up("conn-udp", &Options::default());
    let server = echo(&lab, "8001");
    let [v4, v6] = addresses(&lab);
    let script = stream();
    let ask = |address: &str| Outside::start(&lab, &[PYTHON, &script, "ask", address, "8001"]);
    let (mut one, mut other) = (ask(&v4), ask(&v6));
    hears_more(&mut one);
    hears_more(&mut other);
    round(&lab, server.pid, &mut [&mut one, &mut other]);
    for client in [&mut one, &mut other] {
        let words = client.last_words();
        assert!(words.ends_with(" answered, 0 lost"), "{words}");
    }
}

#[test]
fn a_connection_that_is_half_closed_goes_on_in_the_other_direction() {
    let lab = Lab::up("conn-half", &Options::default());
    let workshop = support::Workshop::new("conn-half");
    let (mut server, _run) = Obedient::start(&lab, &workshop, "server");
    server.ask("door = socket.socket()");
    server.ask("door.setsockopt(1, 2, 1) or door.bind(('', 8002))");
    server.ask("door.listen()");
    let [address, _] = addresses(&lab);
    // It sends all it has and ends its side; then it reads to the end.
    let code = format!(
        "import socket, sys\n\
         sys.stdin.readline()\n\
         s = socket.create_connection(('{address}', 8002), 20)\n\
         s.sendall(b'all I have')\n\
         s.shutdown(socket.SHUT_WR)\n\
         print('said', flush=True)\n\
         got = b''\n\
         while part := s.recv(65536): got += part\n\
         print(got == b'x' * 400000 + b'the end', flush=True)"
    );
    let mut client = Outside::start(&lab, &[PYTHON, "-c", &code]);
    server.tell("there = door.accept()[0]");
    client.say("");
    assert_eq!(client.line(), "said");
    server.answer();
    for node in ["n2", "n3"] {
        lab.move_process(server.pid, node);
    }
    assert_eq!(server.ask("(there.recv(100), there.recv(100))"), "(b'all I have', b'')");
    server.ask("there.sendall(b'x' * 400000)");
    for node in ["n1", "n2"] {
        lab.move_process(server.pid, node);
    }
    server.ask("there.sendall(b'the end')");
    server.ask("there.shutdown(socket.SHUT_WR)");
    lab.move_process(server.pid, "n3");
    assert_eq!(client.line(), "True");
    server.ask("there.close()");
    nothing_was_broken(&lab);
}

#[test]
fn both_ends_of_a_connection_in_the_cluster_go_their_ways() {
    let lab = Lab::up("conn-inside", &Options::default());
    let workshop = support::Workshop::new("conn-inside");
    let (mut server, _run) = Obedient::start(&lab, &workshop, "server");
    let (mut client, _other) = Obedient::start(&lab, &workshop, "client");
    let inside = lab.layout().inside().0;
    server.ask("door = socket.socket()");
    server.ask(&format!("door.bind(('{inside}', 8003))"));
    server.ask("door.listen()");
    client.ask("mine = socket.socket()");
    client.ask(&format!("mine.connect(('{inside}', 8003))"));
    server.ask("there = door.accept()[0]");
    client.ask("mine.settimeout(20)");
    server.ask("there.settimeout(20)");
    let mut talk = |how: &str| {
        client.ask("data = random.Random(1).randbytes(300000)");
        server.ask("data = random.Random(1).randbytes(300000)");
        client.tell("mine.sendall(data)");
        server.ask("got = b''");
        server.ask("while len(got) < 300000: got += there.recv(65536)");
        assert_eq!(server.ask("got == data"), "True", "{how}");
        server.ask("there.send(b'answer')");
        assert_eq!(client.ask("mine.recv(100)"), "b'answer'", "{how}");
        (server.pid, client.pid)
    };
    let (server_pid, client_pid) = talk("on one node");
    lab.move_process(server_pid, "n2");
    talk("the server has gone away");
    lab.move_process(client_pid, "n2");
    talk("the client has followed");
    lab.move_process(client_pid, "n3");
    talk("the client has gone on");
    // Both at the same time, three times.
    for (one, other) in [("n3", "n1"), ("n1", "n2"), ("n2", "n3")] {
        std::thread::scope(|scope| {
            scope.spawn(|| lab.move_process(server_pid, one));
            scope.spawn(|| lab.move_process(client_pid, other));
        });
        talk(&format!("the server on {one}, the client on {other}"));
    }
}

#[test]
fn redis_counts_exactly_while_it_goes_round() {
    const TIMES: &str = "150000";
    let lab = Lab::up("conn-redis", &Options::default());
    let workshop = support::Workshop::new("conn-redis");
    let words = ["/usr/bin/redis-server", "--port", "6379", "--bind", "0.0.0.0"];
    let more = ["--protected-mode", "no", "--save", "", "--appendonly", "no"];
    let spec = support::spec_in(&workshop.path(""), &[&words[..], &more[..]].concat());
    let run = lab.node("n1").run_as(spec);
    run.until_says("Ready to accept connections");
    let [address, _] = addresses(&lab);
    let cli = |command: &[&str]| {
        let words = [&["redis-cli", "-h", &address][..], command].concat();
        let output = lab.node("client").exec(&words);
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    lab.until("redis answers", |_| cli(&["ping"]) == "PONG");
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let words = [
                "redis-benchmark",
                "-h",
                &address,
                "-n",
                TIMES,
                "-c",
                "20",
                "-P",
                "8",
                "-q",
            ];
            lab.node("client").exec(&[&words[..], &["incr", "counter"]].concat())
        });
        let mut moves = 0;
        for node in ["n2", "n3", "n1"].iter().cycle() {
            if load.is_finished() {
                break;
            }
            lab.move_process(run.pid, node);
            moves += 1;
        }
        let output = load.join().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        eprintln!("{moves} moves: {said}");
        assert!(output.status.success(), "{said}");
        assert!(!said.contains("rror"), "{said}");
        assert!(moves >= support::LEAST_MOVES, "only {moves} moves");
    });
    assert_eq!(cli(&["get", "counter"]), TIMES);
    nothing_was_broken(&lab);
}
