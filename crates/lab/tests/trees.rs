//! Trees of processes moved as one, with what they share, and what is refused when one of them would go alone.

mod support;

use dunlin_lab::harness::{NotMoved, request};
use dunlin_lab::{Lab, Options};
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::Pid;
use support::obedient::Obedient;
use support::{LEAST_MOVES, Workshop, journey, spec_in, until_it_ends};

/// A parent, its child, and a pipe between them.
fn couple(lab: &Lab, workshop: &Workshop) -> (Obedient, Obedient) {
    let (mut parent, _) = Obedient::start(lab, workshop, "parent");
    parent.ask("there = os.pipe()");
    parent.ask("back = os.pipe()");
    let child = parent.fork("child");
    (parent, child)
}

#[test]
fn a_pipe_travels_with_the_bytes_in_it() {
    let (lab, workshop) = (Lab::up("pipe-bytes", &Options::default()), Workshop::new("pipe-bytes"));
    let (mut parent, mut child) = couple(&lab, &workshop);
    parent.ask("data = random.Random(1).randbytes(60000)");
    child.ask("data = random.Random(1).randbytes(60000)");
    for node in ["n2", "n3", "n1", "n2", "n3"] {
        assert_eq!(parent.ask("os.write(there[1], data)"), "60000");
        assert_eq!(
            child.ask("os.write(back[1], b'two') + os.write(back[1], b'three')"),
            "8"
        );
        lab.move_tree(parent.pid, node);
        assert_eq!(child.ask("os.read(there[0], 60000) == data"), "True", "on {node}");
        assert_eq!(parent.ask("os.read(back[0], 100)"), "b'twothree'", "on {node}");
    }
}

#[test]
fn whoever_is_blocked_on_a_pipe_stays_blocked_and_is_woken() {
    let (lab, workshop) = (
        Lab::up("pipe-blocked", &Options::default()),
        Workshop::new("pipe-blocked"),
    );
    let (mut parent, mut child) = couple(&lab, &workshop);
    for one in [&mut parent, &mut child] {
        one.ask("data = random.Random(2).randbytes(300000)");
    }
    for (node, next) in [("n2", "n3"), ("n1", "n2"), ("n3", "n1")] {
        // The child waits for bytes; then the parent for room, with more than a pipe takes.
        child.tell("os.read(there[0], 100)");
        lab.move_tree(parent.pid, node);
        parent.ask("os.write(there[1], b'wake')");
        assert_eq!(child.answer(), "b'wake'", "on {node}");
        parent.tell("os.write(there[1], data)");
        lab.move_tree(parent.pid, next);
        child.ask("got = b''");
        child.ask("while len(got) < 300000: got += os.read(there[0], 65536)");
        assert_eq!(parent.answer(), "300000");
        assert_eq!(child.ask("got == data"), "True", "on {next}");
    }
}

#[test]
fn the_end_of_a_pipe_is_seen_after_a_move() {
    let (lab, workshop) = (Lab::up("pipe-end", &Options::default()), Workshop::new("pipe-end"));
    let (mut parent, mut child) = couple(&lab, &workshop);
    child.ask("os.close(there[1]) or os.close(back[0])");
    parent.ask("os.close(there[0]) or os.close(back[1])");
    child.tell("os.read(there[0], 10)");
    lab.move_tree(parent.pid, "n2");
    lab.move_tree(parent.pid, "n3");
    parent.ask("os.close(there[1])");
    assert_eq!(child.answer(), "b''");
    child.tell("os._exit(12)");
    assert_eq!(parent.ask("os.read(back[0], 10)"), "b''");
    assert_eq!(parent.ask("os.wait()[1]"), (12 << 8).to_string());
}

#[test]
fn a_pipeline_of_compressor_and_digest_ends_as_unmoved() {
    let workshop = Workshop::new("pipeline");
    let producer = workshop.file(
        "producer.py",
        "import random, sys\nr = random.Random(9)\nfor i in range(60):\n  sys.stdout.buffer.write(bytes(r.choices(b'abcdefgh ', k=100000)))\n",
    );
    let command = format!("set -o pipefail; python3 {} | xz -1 | sha256sum", producer.display());
    let unmoved = std::process::Command::new("bash")
        .args(["-c", &command])
        .output()
        .unwrap();
    let lab = Lab::up("pipeline", &Options::default());
    let run = lab
        .node("n1")
        .run_as(spec_in(&workshop.path(""), &["bash", "-c", &command]));
    let moves = until_it_ends(&lab, run.pid, true, 12);
    let ended = run.wait();
    assert_eq!(ended.status, ExitStatus::Code(0), "{ended:?}");
    assert_eq!(ended.stdout, String::from_utf8(unmoved.stdout).unwrap());
    assert!(moves >= LEAST_MOVES, "it ended after {moves} moves");
}

/// What was seen of a program is nothing that the one it executes has.
#[test]
fn a_program_that_executes_itself_all_the_while_ends_as_unmoved() {
    let workshop = Workshop::new("restless");
    let script = workshop.file(
        "restless.sh",
        "for ((i = 0; i < 4000; i++)); do sum=$(((${2:-0} + i * $1) % 1000003)); set -- $1 $sum; done\n\
         [ $1 -lt 150 ] && exec bash $0 $(($1 + 1)) $sum\necho $sum\n",
    );
    let script = script.to_str().unwrap();
    let unmoved = std::process::Command::new("bash").args([script, "1"]).output().unwrap();
    let lab = Lab::up("restless", &Options::default());
    let run = lab
        .node("n1")
        .run_as(spec_in(&workshop.path(""), &["bash", script, "1"]));
    let moves = until_it_ends(&lab, run.pid, true, 24);
    let ended = run.wait();
    assert_eq!(ended.status, ExitStatus::Code(0), "{ended:?}");
    assert_eq!(ended.stdout, String::from_utf8(unmoved.stdout).unwrap());
    assert!(moves >= LEAST_MOVES, "it ended after {moves} moves");
}

#[test]
fn a_tree_of_three_generations_goes_round_and_stays_a_family() {
    let (lab, workshop) = (
        Lab::up("generations", &Options::default()),
        Workshop::new("generations"),
    );
    let (mut parent, _run) = Obedient::start(&lab, &workshop, "parent");
    let mut child = parent.fork("child");
    let mut grandchild = child.fork("grandchild");
    child.ask("os.setpgid(0, 0)");
    let family = "(os.getpid(), os.getppid(), os.getpgrp(), os.getsid(0))";
    let before = [&mut parent, &mut child, &mut grandchild].map(|p| p.ask(family));
    let root = parent.pid;
    journey(&lab, root, true, || {
        let now = [&mut parent, &mut child, &mut grandchild].map(|p| p.ask(family));
        assert_eq!(now, before);
    });
    grandchild.tell("os._exit(1)");
    assert_eq!(child.ask("os.wait()[1]"), "256");
    child.tell("os.kill(os.getpid(), 9)");
    assert_eq!(parent.ask("os.wait()[1]"), "9");
}

#[test]
fn one_process_of_a_pipeline_alone_is_refused_with_the_reason() {
    let (lab, workshop) = (Lab::up("alone", &Options::default()), Workshop::new("alone"));
    let (mut parent, mut child) = couple(&lab, &workshop);
    let Err(NotMoved::Refused(obstacles)) = lab.move_as(request(child.pid, "n2")) else {
        panic!("it was not refused")
    };
    assert_eq!(lab.can_move(child.pid, Some("n2")), obstacles);
    let said = format!("{obstacles:?}");
    assert!(said.contains("pipe") && said.contains("--tree"), "{said}");
    assert!(
        names(&said, parent.pid),
        "it does not say who has the other end: {said}"
    );
    parent.ask("os.write(there[1], b'still here')");
    assert_eq!(child.ask("os.read(there[0], 100)"), "b'still here'");
}

fn names(said: &str, pid: Pid) -> bool {
    said.contains(&pid.to_string())
}
