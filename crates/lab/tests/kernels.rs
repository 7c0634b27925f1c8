//! Two nodes with a kernel of their own each, which is not this machine's: nothing that a move needs is shared but the
//! network between them. The kernel is Debian's stable one, emulated (`scripts/kernel-image`, `support/machine.rs`).
//!
//! One test, as booting is most of its time: what each part shows stands at its assertion.

mod support;

use dunlin_lab::harness::binary_under_test;
use std::process::Command;
use support::Workshop;
use support::machine::{Machine, image};

const NODES: [&str; 2] = ["n1", "n2"];

/// The daemon's configuration; the first node is the gateway.
fn configuration(number: u32) -> String {
    let other = 3 - number;
    let device = if number == 1 { "outside_device = \"eth1\"" } else { "" };
    format!(
        r#"cluster = "kernels"
name = "n{number}"
slot = {number}
listen = "10.99.0.{number}:7117"
state_dir = "/run/dunlin"

[[peer]]
name = "n{other}"
slot = {other}
address = "10.99.0.{other}:7117"

[network]
inside = "10.98.0.1"
inside6 = "fd00:98::1"
gateway = "n1"
outside = "192.0.2.10"
{device}"#
    )
}

/// A program under test, by its home's words.
struct Traveller<'a> {
    pid: String,
    name: &'a str,
}

impl<'a> Traveller<'a> {
    #[track_caller]
    fn start(home: &mut Machine, name: &'a str, command: &str, ready: &str) -> Traveller<'a> {
        let pid = home
            .must(&format!("dunlin run -d --cwd /tmp -- {command}"))
            .trim()
            .to_owned();
        home.until(&format!("dunlin logs {pid} | grep {ready}"));
        Traveller { pid, name }
    }

    /// Moves it, as its home says, and sees it go on there.
    #[track_caller]
    fn moves(&self, home: &mut Machine, to: &str, how: &str, word: &str) {
        let (pid, name) = (&self.pid, self.name);
        let report = home.must(&format!(
            "dunlin move {pid} {to} {how} --json 2>/tmp/progress || {{ cat /tmp/progress; false; }}"
        ));
        assert!(
            report.contains(&format!("\"to\": \"{to}\"")),
            "{name}, to {to}: {report}"
        );
        home.must(&format!(
            "dunlin ps >/tmp/ps; grep '^ *{pid} .* {to} ' /tmp/ps || {{ cat /tmp/ps; dunlin logs {pid} | grep -v ^round; false; }}"
        ));
        let words = format!("dunlin logs {pid} | grep -c '^{word} '");
        let before: u64 = home.does(&words).said.trim().parse().unwrap_or(0);
        home.until(&format!("test $({words}) -gt {}", before + 1));
    }

    /// Waits for its end as its home sees it.
    #[track_caller]
    fn ends(self, home: &mut Machine, last: &str) {
        let done = home.does(&format!("dunlin wait {}", self.pid));
        let log = home.must(&format!("dunlin logs {} | grep -v '^round '", self.pid));
        assert_eq!(done.code, 0, "{}: {} {log}", self.name, done.said);
        assert!(
            log.trim_end().lines().last().is_some_and(|l| l.starts_with(last)),
            "{}: {log}",
            self.name
        );
    }
}

#[test]
fn programs_and_connections_move_between_kernels_of_their_own() {
    let workshop = Workshop::new("kernels");
    let mut files: Vec<_> = ["xstate.c", "threads.c", "signals.c", "numbers.c", "talk.c"]
        .map(|source| workshop.compile(source))
        .into();
    files.push(binary_under_test());
    let image = image(&workshop, &files);
    let mut machines = [1, 2].map(|number| Machine::start(&workshop, &image, number));

    let own = Command::new("uname").arg("-r").output().expect("uname").stdout;
    for (number, machine) in (1..).zip(&mut machines) {
        machine.is_up();
        let theirs = machine.must("uname -r");
        assert_ne!(
            theirs.trim(),
            String::from_utf8_lossy(&own).trim(),
            "it has this machine's kernel"
        );
        machine.must("dunlin doctor");
        machine.must("mkdir -p /etc/dunlin");
        // The outside's network, where the gateway has the address that programs answer to.
        machine.must(&format!("ip address add 192.0.2.{number}0/24 dev eth1"));
        machine.write("/etc/dunlin/node.toml", &configuration(number));
        machine.must("dunlin node --config /etc/dunlin/node.toml >/tmp/daemon.log 2>&1 &");
    }
    let [first, second] = &mut machines;
    for machine in [&mut *first, &mut *second] {
        machine.until(
            "dunlin ps >/tmp/ps 2>&1 && ! grep 'does not answer' /tmp/ps || { cat /tmp/ps /tmp/daemon.log; false; }",
        );
    }

    // What programs see of themselves; there and back, and there again while pages are still away.
    for name in ["xstate", "threads", "signals"] {
        let traveller = Traveller::start(first, name, &format!("{name} /tmp/stop-{name}"), "ready");
        for (to, how) in [("n2", ""), ("n1", "--wait resumed"), ("n2", "--wait resumed")] {
            traveller.moves(first, to, how, "round");
        }
        // Files are the node's own here.
        second.must(&format!("touch /tmp/stop-{name}"));
        traveller.ends(first, "ok");
    }

    // The numbers of its timers are counted up to where they cannot be chosen (before Linux 6.15); at home they are used up.
    let traveller = Traveller::start(first, "numbers", "numbers /tmp/stop-numbers", "ready");
    traveller.moves(first, "n2", "", "round");
    let refused = first.does(&format!("dunlin move {} n1", traveller.pid));
    assert_eq!(refused.code, 1, "{}", refused.said);
    assert!(
        refused.said.contains("a timer's number cannot be had"),
        "{}",
        refused.said
    );
    second.must("touch /tmp/stop-numbers");
    traveller.ends(first, "ok");

    // A tree with its pipes ends as it does unmoved.
    let pipeline = "seq 1 300000 | gzip -1 | sha256sum";
    let unmoved = first.must(pipeline);
    let tree = Traveller::start(first, "a pipeline", &format!("sh -c 'echo ready; {pipeline}'"), "ready");
    first.must(&format!("dunlin move {} n2 --tree 2>&1", tree.pid));
    tree.ends(first, unmoved.trim());

    // A parent's signal reaches it, and its end the parent.
    let sleeper = first.must("dunlin run -d -- sleep 1000").trim().to_owned();
    first.must(&format!(
        "dunlin move {sleeper} n2 2>&1 && dunlin kill -s TERM {sleeper}"
    ));
    assert_eq!(first.does(&format!("dunlin wait {sleeper}")).code, 128 + 15);

    // A server moves under a client on the other machine, which is outside, and one of the cluster's own, which moves as well.
    for (name, address) in [("outside", "192.0.2.10"), ("inside", "10.98.0.1")] {
        let server = Traveller::start(first, "a server", "talk serve 0.0.0.0 7000", "ready");
        let ask = format!("talk ask {address} 7000 /tmp/stop-{name}");
        let client = match name {
            "outside" => {
                second.must(&format!("{ask} >/tmp/asked 2>&1 &"));
                second.until("grep answers /tmp/asked");
                None
            }
            _ => Some(Traveller::start(second, "a client", &ask, "answers")),
        };
        for to in ["n2", "n1"] {
            first.must(&format!("dunlin move {} {to} 2>&1", server.pid));
            if let Some(client) = &client {
                let other = NODES.into_iter().find(|node| *node != to).expect("there are two");
                client.moves(second, other, "", "answers");
            }
        }
        for machine in [&mut *first, &mut *second] {
            machine.must(&format!("touch /tmp/stop-{name}"));
        }
        match client {
            Some(client) => client.ends(second, "ok"),
            None => drop(second.until("grep '^ok ' /tmp/asked || { cat /tmp/asked; false; }")),
        }
        server.ends(first, "served");
    }
}
