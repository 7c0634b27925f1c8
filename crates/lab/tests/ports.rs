//! Ports belong to the cluster, not to a node: one program has each, everybody finds it, and nobody else gets it before it is
//! closed.

mod support;

use dunlin_lab::harness::Run;
use dunlin_lab::{Lab, Options};
use rustix::process::Signal;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use support::Workshop;
use support::obedient::Obedient;

const IN_USE: &str = "OSError: [Errno 98] Address already in use";
const PORT: u16 = 7000;

struct Scene {
    lab: Lab,
    workshop: Workshop,
}

impl Scene {
    fn new(name: &str) -> Scene {
        Scene {
            lab: Lab::up(name, &Options::default()),
            workshop: Workshop::new(name),
        }
    }

    fn on(&self, node: &str) -> (Obedient, Run) {
        Obedient::start_on(&self.lab, node, &self.workshop, node)
    }

    /// The nodes that the gateway steers this port to.
    fn steered(&self, port: u16) -> Vec<String> {
        let output = self.lab.dunlin(&["gateway", "--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let entries = json["entries"].as_array().expect("entries");
        let of_port = entries.iter().filter(|e| e["port"] == port && e["peer"].is_null());
        of_port.map(|e| e["node"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits until the gateway steers a port to nobody any more.
    #[track_caller]
    fn until_not_steered(&self, port: u16) {
        let mut command = Command::new(dunlin_lab::harness::binary_under_test());
        command.args(["--lab", self.lab.name(), "gateway", "--watch", "--json"]);
        let mut watch = command.stdout(Stdio::piped()).spawn().expect("a watch of the gateway");
        let changes = BufReader::new(watch.stdout.take().expect("its output"));
        let (sender, lines) = channel();
        let reader = std::thread::spawn(move || {
            for line in changes.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut said = Vec::new();
        // Looked at once more when the watch is known to run: it may be gone already, which is no change.
        while !self.steered(port).is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            match lines.recv_timeout(left) {
                Ok(line) => said.push(line),
                Err(_) => break,
            }
        }
        let found = self.steered(port);
        watch.kill().expect("an end of the watch");
        watch.wait().expect("its end");
        reader.join().expect("all of its output");
        assert!(found.is_empty(), "port {port} is still steered to {found:?}: {said:?}");
    }
}

fn listen(program: &mut Obedient, port: u16) -> String {
    program.ask("s = socket.socket()");
    program.ask("s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)");
    program.ask(&format!("s.bind(('', {port})) or s.listen()"))
}

#[test]
fn a_port_is_bound_on_one_node_until_it_is_closed() {
    let scene = Scene::new("one-port");
    let (mut one, _run) = scene.on("n1");
    let (mut two, _other) = scene.on("n2");
    assert_eq!(listen(&mut one, PORT), "None");
    assert_eq!(scene.steered(PORT), ["n1"], "known when listen(2) has returned");
    assert_eq!(listen(&mut two, PORT), IN_USE);
    assert_eq!(scene.steered(PORT), ["n1"]);
    one.ask("s.close()");
    // At once: whoever had it is asked.
    assert_eq!(listen(&mut two, PORT), "None");
    assert_eq!(scene.steered(PORT), ["n2"]);
    two.ask("s.close()");
    scene.until_not_steered(PORT);
}

#[test]
fn a_failed_bind_keeps_nobody_from_the_port() {
    let scene = Scene::new("failed-bind");
    let (mut one, _run) = scene.on("n1");
    let (mut two, _other) = scene.on("n2");
    let code = "import os, socket; os.setresuid(65534, 65534, 65534); socket.socket().bind(('', 80))";
    one.ask(&format!(
        "run = subprocess.run([sys.executable, '-c', \"{code}\"], capture_output=True)"
    ));
    let denied = "b'PermissionError: [Errno 13] Permission denied'";
    assert_eq!(one.ask("run.stderr.splitlines()[-1]"), denied);
    assert_eq!(listen(&mut two, 80), "None", "a claim without the right to it was none");
    one.ask("t = socket.socket()");
    let away = "OSError: [Errno 99] Cannot assign requested address";
    assert_eq!(one.ask("t.bind(('198.51.100.1', 8080))"), away);
    two.ask("t = socket.socket()");
    let deadline = Instant::now() + Duration::from_secs(20);
    while two.ask("t.bind(('', 8080))") != "None" {
        assert!(
            Instant::now() < deadline,
            "the claim of a bind that failed stands for ever"
        );
    }
}

#[test]
fn the_nodes_own_loopback_is_not_the_clusters() {
    let scene = Scene::new("loopback-ports");
    let (mut one, _run) = scene.on("n1");
    let (mut two, _other) = scene.on("n2");
    for program in [&mut one, &mut two] {
        program.ask("s = socket.socket()");
        assert_eq!(
            program.ask(&format!("s.bind(('127.0.0.1', {PORT})) or s.listen()")),
            "None"
        );
    }
    assert_eq!(scene.steered(PORT), [""; 0]);
}

#[test]
fn datagram_ports_and_both_families_are_claimed() {
    let scene = Scene::new("datagram-ports");
    let (mut one, _run) = scene.on("n1");
    let (mut two, _other) = scene.on("n2");
    one.ask("u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)");
    assert_eq!(one.ask("u.bind(('::', 5353))"), "None");
    assert_eq!(scene.steered(5353), ["n1", "n1"]);
    two.ask("u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)");
    assert_eq!(two.ask("u.bind(('', 5353))"), IN_USE);
    assert_eq!(listen(&mut two, 5353), "None", "TCP is another port");
}

#[test]
fn what_is_bound_is_known_after_any_daemon_was_killed() {
    let scene = Scene::new("ports-killed");
    let (mut one, _run) = scene.on("n1");
    let (mut two, _other) = scene.on("n2");
    assert_eq!(listen(&mut two, PORT), "None");
    for node in ["n1", "n2"] {
        scene.lab.signal_daemon(node, Signal::KILL.as_raw());
        scene.lab.start_daemon(node);
        assert_eq!(listen(&mut one, PORT), IN_USE, "after {node}'s daemon was killed");
    }
    two.ask("s.close()");
    assert_eq!(listen(&mut one, PORT), "None");
}
