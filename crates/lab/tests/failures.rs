//! Failures: whatever is refused, given up or killed, the process is in one place, and runs.

mod support;

use dunlin_lab::harness::{NotMoved, request};
use dunlin_lab::{Lab, Options, down};
use dunlin_proto::control::{MoveRequest, WaitFor};
use support::Workshop;
use support::obedient::Obedient;

/// A lab, and a program on its n1.
fn one(name: &str) -> (Lab, Workshop, Obedient) {
    let (lab, workshop) = (Lab::up(name, &Options::default()), Workshop::new(name));
    let (program, _) = Obedient::start(&lab, &workshop, "program");
    (lab, workshop, program)
}

/// The program is on this node, on no other, and does what it is told.
#[track_caller]
fn runs_on(lab: &Lab, program: &mut Obedient, node: &str) {
    let pid = program.pid;
    lab.until(&format!("{pid} is on {node}"), |rows| {
        rows.iter().filter(|r| r.pid == pid).map(|r| r.node.as_str()).eq([node])
    });
    assert_eq!(program.ask("os.getpid()"), pid.to_string());
}

/// A move is refused, in can-move's words, and the program runs on.
#[track_caller]
fn refused(name: &str, order: &str, words: &[&str]) {
    let (lab, _workshop, mut program) = one(name);
    program.ask(order);
    let Err(NotMoved::Refused(obstacles)) = lab.move_as(request(program.pid, "n2")) else {
        panic!("it was not refused")
    };
    assert_eq!(lab.can_move(program.pid, Some("n2")), obstacles);
    let said = format!("{obstacles:?}");
    assert!(words.iter().all(|w| said.contains(w)), "{said}");
    runs_on(&lab, &mut program, "n1");
}

#[test]
fn a_socket_is_refused_by_its_number() {
    refused(
        "socket",
        "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); os.dup2(s.fileno(), 77)",
        &["77", "socket"],
    );
}

#[test]
fn a_file_that_is_not_there_is_refused_by_its_name() {
    refused(
        "missing",
        "f = open('/dev/shm/only-here', 'w+'); f.write('x'); f.flush()",
        &["/dev/shm/only-here"],
    );
}

#[test]
fn shared_memory_with_a_descriptor_is_refused() {
    refused(
        "shared",
        "f = os.memfd_create('memory'); os.truncate(f, 1 << 20); m = mmap.mmap(f, 1 << 20)",
        &["shared"],
    );
}

#[test]
fn an_obstacle_that_is_removed_is_none_any_more() {
    let (lab, _workshop, mut program) = one("removed");
    program.ask("s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)");
    assert!(matches!(
        lab.move_as(request(program.pid, "n2")),
        Err(NotMoved::Refused(_))
    ));
    program.ask("s.close()");
    lab.move_process(program.pid, "n2");
    runs_on(&lab, &mut program, "n2");
}

/// The destination's daemon is stopped when the move begins, and killed: it has heard of the move, or not.
#[test]
fn a_destination_killed_before_the_commit_leaves_it_at_the_source() {
    let (lab, _workshop, mut program) = one("destination-dies");
    lab.signal_daemon("n2", 19);
    let before = lab.received_bytes("n2");
    let answer = std::thread::scope(|scope| {
        let moving = scope.spawn(|| lab.move_as(request(program.pid, "n2")));
        // More than a sign of life: what is proposed lies in its socket.
        lab.until_received("n2", before + 2048);
        lab.signal_daemon("n2", 9);
        moving.join().unwrap()
    });
    assert!(matches!(answer, Err(NotMoved::Failed(_))), "{answer:#?}");
    runs_on(&lab, &mut program, "n1");
    lab.start_daemon("n2");
    lab.move_process(program.pid, "n2");
    runs_on(&lab, &mut program, "n2");
}

/// Killed at any moment of the move: before the commit the program is at the source, after it at the destination.
#[test]
fn a_destination_killed_at_any_time_leaves_one_program() {
    let (lab, _workshop, mut program) = one("dies-any-time");
    program.ask("memory = random.Random(3).randbytes(32 << 20)");
    let digest = program.ask("hashlib.sha256(memory).hexdigest()");
    for (attempt, kib) in [1u64, 4, 8, 32, 64, 128, 1024, 8192].into_iter().enumerate() {
        let asked = MoveRequest {
            wait: WaitFor::Resumed,
            ..request(program.pid, "n2")
        };
        let before = lab.received_bytes("n2");
        let answer = std::thread::scope(|scope| {
            let moving = scope.spawn(|| lab.move_as(asked));
            lab.until_received("n2", before + (kib << 10));
            lab.signal_daemon("n2", 9);
            moving.join().unwrap()
        });
        lab.start_daemon("n2");
        let pid = program.pid;
        let mut found = Vec::new();
        lab.until(&format!("{pid} is in one place ({answer:?})"), |rows| {
            found = rows.iter().filter(|r| r.pid == pid).map(|r| r.node.clone()).collect();
            found.len() == 1
        });
        assert_eq!(
            program.ask("hashlib.sha256(memory).hexdigest()"),
            digest,
            "attempt {attempt}: {answer:?}"
        );
        if found != ["n1"] {
            lab.move_process(pid, "n1");
        }
    }
}

#[test]
fn a_daemon_that_was_killed_comes_back_and_everything_goes_on() {
    let (lab, _workshop, mut parent) = one("daemon-back");
    let mut child = parent.fork("child");
    let mut stays = parent.fork("stays");
    lab.move_process(child.pid, "n2");
    for node in ["n1", "n2"] {
        lab.signal_daemon(node, 9);
        // Programs run, fork and wait without it.
        let of_child = if node == "n1" { &mut stays } else { &mut child };
        assert_eq!(of_child.ask("os.waitpid(fork_leaving(3), 0)[1]"), "768");
        lab.start_daemon(node);
    }
    runs_on(&lab, &mut child, "n2");
    runs_on(&lab, &mut parent, "n1");
    let pid = child.pid;
    parent.ask(&format!("os.kill({pid}, signal.SIGSTOP)"));
    assert_eq!(
        parent.ask(&format!("os.waitpid({pid}, os.WUNTRACED)[1]")),
        (19 << 8 | 0x7f).to_string()
    );
    parent.ask(&format!("os.kill({pid}, signal.SIGCONT)"));
    lab.move_process(pid, "n3");
    lab.move_process(pid, "n1");
    lab.move_process(pid, "n2");
    child.tell("os._exit(8)");
    assert_eq!(parent.ask("os.wait()"), format!("({pid}, 2048)"));
}

#[test]
fn a_daemon_killed_while_pages_are_elsewhere_means_waiting_not_zeros() {
    let (lab, _workshop, mut program) = one("pages-wait");
    program.ask("memory = random.Random(4).randbytes(1 << 20) * 256");
    let digest = program.ask("hashlib.sha256(memory).hexdigest()");
    for (to, killed) in [("n2", "n2"), ("n3", "n2"), ("n1", "n3"), ("n2", "n1")] {
        let asked = MoveRequest {
            wait: WaitFor::Resumed,
            ..request(program.pid, to)
        };
        lab.move_as(asked).unwrap_or_else(|e| panic!("to {to}: {e:#?}"));
        lab.signal_daemon(killed, 9);
        program.tell("hashlib.sha256(memory).hexdigest()");
        lab.start_daemon(killed);
        assert_eq!(program.answer(), digest, "{killed} was killed after the move to {to}");
    }
}

#[test]
fn what_is_left_of_killed_daemons_goes_with_the_lab() {
    let (lab, _workshop, mut parent) = one("killed-all");
    let child = parent.fork("child");
    lab.move_process(child.pid, "n2");
    for node in ["n1", "n2", "n3"] {
        lab.signal_daemon(node, 9);
    }
    let layout = lab.layout().clone();
    let nest = |name: &str| std::fs::read_to_string(layout.node_dir(name).join("daemon.pid")).is_ok();
    assert!(nest("n1"), "the state directory is there until the lab is taken down");
    drop(lab);
    assert_eq!(down::traces(&layout), Vec::<String>::new());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&layout.dir().display().to_string()), "{mounts}");
}
