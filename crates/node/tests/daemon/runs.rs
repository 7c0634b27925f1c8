//! Programs started on one node.

use crate::Test;
use crate::fixture::{code, failure, killed, nodes, one, spec, until};
use dunlin_proto::control::{FailureKind, INPUT_WINDOW_BYTES, Reply, Request, RunInput, RunSpec, WindowSize};

pub const TESTS: &[Test] = &[
    ("streams_and_status_pass_through", streams_and_status_pass_through),
    (
        "a_program_has_what_its_caller_gave_it",
        a_program_has_what_its_caller_gave_it,
    ),
    ("what_cannot_be_started_is_said", what_cannot_be_started_is_said),
    ("signals_of_the_caller_arrive", signals_of_the_caller_arrive),
    (
        "input_that_is_not_read_holds_nothing_up",
        input_that_is_not_read_holds_nothing_up,
    ),
    (
        "a_caller_that_goes_hangs_its_program_up",
        a_caller_that_goes_hangs_its_program_up,
    ),
    ("a_terminal_works", a_terminal_works),
    (
        "a_detached_run_is_logged_shown_and_waited_for",
        a_detached_run_is_logged_shown_and_waited_for,
    ),
    ("users_touch_their_own", users_touch_their_own),
];

fn streams_and_status_pass_through() {
    let node = one();
    let run = node.run(&["sh", "-c", "tr a-z A-Z; echo oops >&2; exit 5"]);
    let pid = run.started();
    assert_eq!((pid.0 % 64, pid.0 > 100), (1, true));
    run.send(&RunInput::Stdin(b"hello".to_vec()));
    run.send(&RunInput::StdinEnd);
    assert_eq!(run.outputs(), ("HELLO".into(), "oops\n".into(), code(5)));
    // It is known for a while how it ended.
    assert_eq!(node.wait(pid), code(5));
    // Many short ones: no output is lost at the end, and no end before it is waited for.
    for n in 0..50 {
        let word = format!("word {n}");
        assert_eq!(
            node.run(&["echo", &word]).outputs(),
            (format!("{word}\n"), String::new(), code(0))
        );
    }
    // Much output, more than any buffer.
    let (out, _, status) = node.run(&["seq", "1000000"]).outputs();
    assert_eq!((out.len(), status), (6_888_896, code(0)));
}

fn a_program_has_what_its_caller_gave_it() {
    let node = one();
    let (out, err, _) = node
        .run(&["sh", "-c", "pwd; umask; echo $KEY; id -u; ls /proc/self/fd"])
        .outputs();
    assert_eq!((out.as_str(), err.as_str()), ("/usr\n0027\nvalue\n0\n0\n1\n2\n3\n", ""));
    assert_eq!(
        node.ask_as(1234, "id", dunlin_proto::ids::Pid(0)).as_deref(),
        Some("1234")
    );
}

fn what_cannot_be_started_is_said() {
    let node = one();
    assert_eq!(failure(node.run(&["no-such-program"]).last()), FailureKind::NotFound);
    assert_eq!(failure(node.run(&["/etc/passwd"]).last()), FailureKind::NotExecutable);
    assert_eq!(
        failure(
            node.ask(&Request::Run(RunSpec {
                argv: vec![],
                ..spec(&[])
            }))
            .last()
        ),
        FailureKind::Invalid
    );
    // Nothing is left of them.
    assert_eq!(
        std::fs::read_dir(node.config.state_dir.join("logs")).unwrap().count(),
        0
    );
    assert_eq!(node.status().processes, 0);
}

fn signals_of_the_caller_arrive() {
    let node = one();
    let run = node.run(&[
        "sh",
        "-c",
        "trap 'echo got it; exit 3' USR1; echo ready; while :; do sleep 0.02; done",
    ]);
    run.output_until("ready\n");
    run.send(&RunInput::Signal(10));
    assert_eq!(run.outputs(), ("got it\n".into(), String::new(), code(3)));
    let run = node.run(&["sleep", "1000"]);
    let pid = run.started();
    assert_eq!(node.kill(pid, 0), Reply::Done);
    assert_eq!(node.kill(pid, 15), Reply::Done);
    assert_eq!(run.last(), killed(15));
    assert_eq!(failure(node.kill(pid, 0)), FailureKind::NoProcess);
    assert_eq!(failure(node.kill(dunlin_proto::ids::Pid(1), 9)), FailureKind::NoProcess);
}

fn input_that_is_not_read_holds_nothing_up() {
    let node = one();
    let run = node.run(&["sleep", "1000"]);
    for _ in 0..INPUT_WINDOW_BYTES >> 16 {
        run.send(&RunInput::Stdin(vec![0; 1 << 16]));
    }
    run.send(&RunInput::Signal(2));
    assert_eq!(run.last(), killed(2));
}

fn a_caller_that_goes_hangs_its_program_up() {
    let node = one();
    let run = node.run(&["sleep", "1000"]);
    let pid = run.started();
    drop(run);
    assert_eq!(node.wait(pid), killed(1));
}

fn a_terminal_works() {
    let node = one();
    let size = |rows, cols| WindowSize { rows, cols };
    let script =
        "tty; stty size; trap 'stty size' WINCH; trap 'echo caught; exit 4' INT; echo up; while :; do sleep 0.02; done";
    let run = node.run_tty(&["sh", "-c", script], size(21, 43));
    let seen = run.output_until("up\r\n");
    assert!(
        seen.starts_with("/dev/pts/") && seen.contains("\r\n21 43\r\n"),
        "{seen:?}"
    );
    run.send(&RunInput::Resize(size(33, 55)));
    run.output_until("33 55\r\n");
    run.send(&RunInput::Stdin(b"\x03".to_vec()));
    let (out, _, status) = run.outputs();
    assert!(out.contains("caught"), "{out:?}");
    assert_eq!(status, code(4));
}

fn a_detached_run_is_logged_shown_and_waited_for() {
    let [one, two] = nodes();
    let pid = one.run_detached(&["sh", "-c", "echo one; echo two >&2; read x; exec sleep 1000"]);
    until("the exec", || one.row(pid).is_some_and(|r| r.command == "sleep 1000"));
    // From any node.
    for node in [&one, &two] {
        let row = node.row(pid).unwrap();
        assert_eq!(
            (row.node.as_str(), row.home.as_str(), row.ppid.0, row.user.as_str()),
            ("n1", "n1", 1, "root")
        );
        assert_eq!((row.threads, row.moves, row.pages_elsewhere.len()), (1, 0, 0));
        let (out, _, last) = node.ask(&Request::Logs { pid, follow: false }).outputs();
        assert_eq!((out.as_str(), last), ("one\ntwo\n", Reply::Done));
    }
    let follower = two.ask(&Request::Logs { pid, follow: true });
    let waiter = two.ask(&Request::Wait { pid });
    follower.output_until("two\n");
    assert_eq!(two.kill(pid, 9), Reply::Done);
    assert_eq!(waiter.last(), killed(9));
    assert_eq!(follower.outputs().2, Reply::Done);
    assert_eq!(
        failure(
            two.ask(&Request::Logs {
                pid: dunlin_proto::ids::Pid(65_537),
                follow: true
            })
            .last()
        ),
        FailureKind::NoProcess
    );
}

fn users_touch_their_own() {
    let node = one();
    let pid = node.run_detached(&["sleep", "1000"]);
    for what in ["kill", "wait", "logs", "can-move"] {
        assert_eq!(node.ask_as(1234, what, pid).as_deref(), Some("Forbidden"), "{what}");
    }
    assert_eq!(node.ask_as(1234, "ps", pid), None);
    assert!(node.row(pid).is_some());
}
