//! The network of the nests: one address for all of them, the outside host, and whatever becomes of daemons.

use dunlin_lab::harness::{Run, binary_under_test};
use dunlin_lab::{Lab, Options};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/programs/sockets.py");
const PYTHON: &str = "/usr/bin/python3";
const NODES: [&str; 3] = ["n1", "n2", "n3"];

/// A program on the outside host, that ends with the value.
struct Outside(Child);

impl Outside {
    fn start(lab: &Lab, arguments: &[&str]) -> Outside {
        let mut command = Command::new(binary_under_test());
        command.args(["--lab", lab.name(), "lab", "exec", "client", "--"]);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        Outside(command.spawn().expect("a program on the outside host"))
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        // One byte at a time, so that nothing of what follows is taken.
        let out = self.0.stdout.as_mut().expect("piped");
        BufReader::with_capacity(1, out).read_line(&mut line).expect("a line");
        line.trim_end().into()
    }

    fn say(&mut self, bytes: &[u8]) {
        self.0
            .stdin
            .as_mut()
            .expect("piped")
            .write_all(bytes)
            .expect("it reads");
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server in a nest; it says where it is and whom it sees.
fn serve(lab: &Lab, node: &'static str, port: u16, address: &str) -> Run {
    let run = lab
        .node(node)
        .run(&[PYTHON, PROGRAM, "serve", &port.to_string(), address, node]);
    run.until_says("ready");
    run
}

/// Dials from the outside host, or from a nest; what the dialler prints.
fn dial(lab: &Lab, from: &str, arguments: &[&str]) -> Result<String, String> {
    let words = [&[PYTHON, PROGRAM, "dial"][..], arguments].concat();
    let output = match from {
        "client" => lab.node("client").exec(&words),
        node => {
            let mut command = Command::new(binary_under_test());
            command
                .args(["--lab", lab.name(), "--node", node, "run", "--"])
                .args(&words);
            command.output().expect("dunlin runs")
        }
    };
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().into()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// The same, again until the socket is known where it is dialled from.
#[track_caller]
fn reach(lab: &Lab, from: &str, arguments: &[&str]) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match dial(lab, from, arguments) {
            Ok(said) => return said,
            Err(e) => assert!(Instant::now() < deadline, "{from} {arguments:?}: {e}"),
        }
    }
}

#[test]
fn a_server_on_any_node_is_reached_from_outside_and_from_every_nest() {
    let lab = Lab::up("reach", &Options::default());
    let (outside, inside) = (lab.layout().outside(), lab.layout().inside());
    let (out4, out6) = (outside.0.to_string(), outside.1.to_string());
    let (in4, in6) = (inside.0.to_string(), inside.1.to_string());
    let client = lab.layout().client();
    let servers: Vec<_> = NODES
        .iter()
        .zip(8001..)
        .map(|(n, port)| serve(&lab, n, port, "::"))
        .collect();
    for (server, port) in NODES.iter().zip(8001u16..) {
        let port = port.to_string();
        for (address, own) in [(&out4, client.0.to_string()), (&out6, client.1.to_string())] {
            let said = reach(&lab, "client", &[address, &port, "word", "tcp", "0", "20000"]);
            assert_eq!(said, format!("{server} {own} | {own} | 80000 same"));
            // More than one packet of the link: fragments.
            let said = reach(&lab, "client", &[address, &port, "word", "udp", "0", "1000"]);
            assert_eq!(said, format!("{server} {own} | {own} | 4000 same"));
        }
        for from in NODES {
            for address in [&in4, &in6] {
                let said = reach(&lab, from, &[address, &port, "word", "tcp", "0", "20000"]);
                assert_eq!(said, format!("{server} {address} | {address} | 80000 same"));
                let said = reach(&lab, from, &[address, &port, "word", "udp", "0", "3000"]);
                assert_eq!(said, format!("{server} {address} | {address} | 12000 same"));
            }
            // The outside address, dialled from inside: the server sees it as the dialler's.
            for (address, own) in [(&out4, &in4), (&out6, &in6)] {
                let said = reach(&lab, from, &[address, &port, "word", "tcp", "0", "20000"]);
                assert_eq!(said, format!("{server} {address} | {own} | 80000 same"));
            }
        }
    }
    drop(servers);
}

#[test]
fn programs_reach_the_outside_host_as_the_outside_address() {
    let options = Options {
        gateway: "n2".into(),
        ..Options::default()
    };
    let lab = Lab::up("outwards", &options);
    let (outside, inside) = (lab.layout().outside(), lab.layout().inside());
    let client = lab.layout().client();
    let mut server = Outside::start(&lab, &[PYTHON, PROGRAM, "serve", "9000", "::", "world"]);
    assert_eq!(server.line(), "ready");
    let ends = [
        (client.0.to_string(), outside.0.to_string(), inside.0.to_string()),
        (client.1.to_string(), outside.1.to_string(), inside.1.to_string()),
    ];
    for from in NODES {
        for (address, seen, own) in &ends {
            for proto in ["tcp", "udp"] {
                // From a port of the node's own slice, and from one that nobody gives out.
                for source in ["0", "7001"] {
                    let said = reach(&lab, from, &[address, "9000", "word", proto, source, "1000"]);
                    assert_eq!(said, format!("world {seen} | {own} | 4000 same"));
                }
            }
            let ping = lab.node(from).run(&[PYTHON, PROGRAM, "ping", address]).wait();
            assert_eq!(ping.stdout, "answered\n", "{from} pings {address}: {ping:?}");
        }
    }
}

#[test]
fn nothing_that_does_not_listen_is_reachable_from_outside() {
    let lab = Lab::up("closed", &Options::default());
    let outside = lab.layout().outside();
    let mut server = serve(&lab, "n2", 8001, "0.0.0.0");
    let (o4, o6) = (outside.0.to_string(), outside.1.to_string());
    reach(&lab, "client", &[&o4, "8001", "word"]);
    let underlay = lab.layout().address(1).to_string();
    let route = ["ip", "route", "add", &format!("{underlay}/32"), "via", &o4];
    assert!(lab.node("client").exec(&route).status.success());
    // Of that port only IPv4 is open; the daemons' port is nobody's outside, by whichever address.
    for (address, port) in [(&o4, "8002"), (&o6, "8001"), (&o4, "7117"), (&underlay, "7117")] {
        let error = dial(&lab, "client", &[address, port, "word"]).expect_err("it is closed");
        assert!(error.contains("timed out"), "{address} {port}: {error}");
    }
    // The address itself answers.
    for address in [&o4, &o6] {
        let ping = lab.node("client").exec(&[PYTHON, PROGRAM, "ping", address]);
        assert!(ping.status.success(), "{address}: {ping:?}");
    }
    server.signal(15);
    server.wait();
    let deadline = Instant::now() + Duration::from_secs(20);
    while dial(&lab, "client", &[&o4, "8001", "word"]).is_ok() {
        assert!(Instant::now() < deadline, "a closed port is still reachable");
    }
}

#[test]
fn connections_live_through_the_death_of_the_daemons() {
    let lab = Lab::up("deaths", &Options::default());
    let outside = lab.layout().outside().0.to_string();
    let server = serve(&lab, "n2", 8001, "0.0.0.0");
    reach(&lab, "client", &[&outside, "8001", "word"]);
    let relay = format!(
        "import socket,sys\ns = socket.create_connection(('{outside}', 8001))\nprint(s.recv(99).decode(), flush=True)\n\
         for line in sys.stdin:\n s.sendall(line.encode()); print(s.recv(99).decode().strip(), flush=True)"
    );
    let mut client = Outside::start(&lab, &[PYTHON, "-c", &relay]);
    assert!(client.line().starts_with("n2 "));
    let mut echo = |word: &str| {
        client.say(format!("{word}\n").as_bytes());
        assert_eq!(client.line(), word);
    };
    echo("before");
    // The gateway's, and that of the node where the server is.
    for node in ["n1", "n2"] {
        lab.signal_daemon(node, 9);
        echo("without the daemon");
        lab.start_daemon(node);
        echo("with a new one");
    }
    reach(&lab, "client", &[&outside, "8001", "word"]);
    drop(server);
}
