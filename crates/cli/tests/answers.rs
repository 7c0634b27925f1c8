//! Commands with one answer, against a daemon that answers as told: their JSON, their words, their exit codes.

mod fake;

use dunlin_proto::control::*;
use dunlin_proto::ids::Pid;
use fake::{Fake, failing, text};
use serde_json::{Value, json};
use std::os::unix::process::ExitStatusExt;

fn row(pid: i32) -> ProcessRow {
    ProcessRow {
        pid: Pid(pid),
        ppid: Pid(1),
        home: "n1".into(),
        node: "n2".into(),
        state: 'R',
        threads: 2,
        rss_bytes: 4096,
        pages_elsewhere: [("n1".to_owned(), 12)].into(),
        moves: 1,
        user: "root".into(),
        command: "sleep 9".into(),
    }
}

fn report(pid: i32) -> MoveReport {
    MoveReport {
        pid: Pid(pid),
        from: "n1".into(),
        to: "n2".into(),
        mode: MoveMode::Hybrid,
        freeze_ms: 0.5,
        essence_bytes: 8192,
        prepare_ms: 3.0,
        resumed_ms: 4.0,
        drained_ms: None,
        pages_faulted: 3,
        pages_pushed: 97,
        faults_avoided_ratio: 0.97,
        fault_us: Quantiles { p50: 20.0, p99: 100.0 },
        verified_pages: None,
        steps: vec![Step {
            side: Side::Source,
            name: "stop".into(),
            us: 12.5,
        }],
    }
}

fn obstacle() -> Obstacle {
    Obstacle {
        pid: Pid(129),
        kind: "descriptor".into(),
        object: "fd 5 (socket:[7])".into(),
        why: "sockets stay".into(),
        hint: "close it".into(),
    }
}

fn parsed(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|e| panic!("{e}: {}", text(bytes)))
}

#[test]
fn ps_shows_exactly_the_promised_fields() {
    let fake = Fake::saying(Reply::Processes {
        rows: vec![row(129)],
        silent: vec!["n3".into()],
    });
    let output = fake.dunlin(&["ps", "--json"]);
    let expected = json!([{
        "pid": 129, "ppid": 1, "home": "n1", "node": "n2", "state": "R", "threads": 2, "rss_bytes": 4096,
        "pages_elsewhere": {"n1": 12}, "moves": 1, "user": "root", "command": "sleep 9",
    }]);
    assert_eq!(parsed(&output.stdout), expected);
    assert!(
        text(&output.stderr).contains("n3 does not answer"),
        "{}",
        text(&output.stderr)
    );
    assert!(text(&fake.dunlin(&["ps"]).stdout).contains("n1:12"));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let fake = Fake::saying(Reply::Processes {
        rows: (101..9000).map(row).collect(),
        silent: vec![],
    });
    let mut child = fake.command(&["ps"]).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}

#[test]
fn move_shows_exactly_the_promised_fields() {
    let fake = Fake::new(|request, client| {
        let Request::Move(asked) = request else {
            panic!("{request:?}")
        };
        let (mode, wait) = (asked.mode, asked.wait);
        assert_eq!(
            (asked.pid, &*asked.to, mode, wait),
            (Pid(129), "n2", MoveMode::Hybrid, WaitFor::Resumed)
        );
        let phase = MovePhase::Drain;
        let progress = MoveProgress {
            pid: Pid(129),
            phase,
            pages_left: 5,
            pages_total: 10,
            bytes_per_second: 1,
        };
        client.say(Reply::Progress(progress));
        let reports = if asked.tree {
            vec![report(129), report(193)]
        } else {
            vec![report(129)]
        };
        client.say(Reply::Moved(reports));
    });
    let asked = ["move", "129", "n2", "--mode", "hybrid", "--wait", "resumed", "--json"];
    let output = fake.dunlin(&asked);
    assert_eq!(text(&output.stderr), "", "no progress where there is no terminal");
    let one = parsed(&output.stdout);
    let expected = json!({
        "pid": 129, "from": "n1", "to": "n2", "mode": "hybrid", "freeze_ms": 0.5, "essence_bytes": 8192,
        "prepare_ms": 3.0, "resumed_ms": 4.0, "drained_ms": null, "pages_faulted": 3, "pages_pushed": 97,
        "faults_avoided_ratio": 0.97, "fault_us": {"p50": 20.0, "p99": 100.0},
        "phases_us": [{"side": "source", "step": "stop", "us": 12.5}],
    });
    assert_eq!(one, expected);
    let tree = parsed(&fake.dunlin(&[&asked[..], &["--tree"]].concat()).stdout);
    assert_eq!(
        (tree[0]["pid"].clone(), tree[1]["pid"].clone()),
        (json!(129), json!(193))
    );
    let words = fake.dunlin(&asked[..7]);
    assert!(
        text(&words.stdout).contains("process 129 moved from n1 to n2"),
        "{}",
        text(&words.stdout)
    );
}

#[test]
fn a_refused_move_names_every_obstacle_and_what_to_do() {
    let fake = Fake::saying(Reply::Refused(vec![obstacle(), obstacle()]));
    let output = fake.dunlin(&["move", "129", "n2", "--json"]);
    assert_eq!(output.status.code(), Some(4));
    let said = text(&output.stderr);
    assert!(
        said.contains("runs on") && said.contains("fd 5 (socket:[7]): sockets stay"),
        "{said}"
    );
    assert_eq!(said.matches("hint: close it").count(), 2);
    assert_eq!(parsed(&output.stdout)["movable"], false);
}

#[test]
fn can_move_answers_yes_or_why_not() {
    let no = Fake::saying(Reply::Verdict(vec![obstacle()]));
    let output = no.dunlin(&["can-move", "129", "--to", "n2", "--json"]);
    assert_eq!(output.status.code(), Some(4));
    let expected = json!({"pid": 129, "to": "n2", "movable": false, "obstacles": [{
        "pid": 129, "kind": "descriptor", "object": "fd 5 (socket:[7])", "why": "sockets stay", "hint": "close it",
    }]});
    assert_eq!(parsed(&output.stdout), expected);
    let words = text(&no.dunlin(&["can-move", "129"]).stdout);
    assert!(words.starts_with("no: ") && words.contains("hint: close it"), "{words}");
    let yes = Fake::saying(Reply::Verdict(vec![]));
    let output = yes.dunlin(&["can-move", "129", "--json"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        parsed(&output.stdout),
        json!({"pid": 129, "to": null, "movable": true, "obstacles": []})
    );
}

#[test]
fn every_kind_of_failure_has_its_exit_code() {
    use FailureKind::*;
    for (kind, code, of_run) in [
        (NoProcess, 3, 125),
        (NoNode, 3, 125),
        (Unreachable, 5, 125),
        (Forbidden, 1, 125),
        (NotFound, 127, 127),
        (NotExecutable, 126, 126),
        (Invalid, 2, 125),
        (MoveFailed, 1, 125),
        (Other, 1, 125),
    ] {
        let fake = Fake::saying(failing(kind));
        let output = fake.dunlin(&["kill", "129"]);
        assert_eq!(output.status.code(), Some(code), "{kind:?}");
        assert_eq!(text(&output.stderr), "dunlin: it is so\nhint: do something\n");
        for arguments in [&["run", "x"][..], &["wait", "129"]] {
            assert_eq!(
                fake.dunlin(arguments).status.code(),
                Some(of_run),
                "{kind:?} {arguments:?}"
            );
        }
    }
}

#[test]
fn a_daemon_that_is_not_there_or_goes_away_is_unreachable() {
    let silent = Fake::new(|_, _| {});
    for arguments in [
        &["ps"][..],
        &["move", "129", "n2"],
        &["can-move", "129"],
        &["logs", "129"],
    ] {
        let output = silent.dunlin(arguments);
        assert_eq!(output.status.code(), Some(5), "{arguments:?}");
        assert!(text(&output.stderr).contains("hint:"), "{}", text(&output.stderr));
    }
    let gone = Fake {
        socket: "/nonexistent/control.sock".into(),
    };
    assert_eq!(gone.dunlin(&["ps"]).status.code(), Some(5));
}

#[test]
fn a_signal_goes_by_name_or_number() {
    let fake = Fake::new(|request, client| {
        let asked = Request::Kill {
            pid: Pid(129),
            signal: 10,
        };
        client.say(if request == asked {
            Reply::Done
        } else {
            failing(FailureKind::Invalid)
        });
    });
    for way in [
        ["kill", "-s", "USR1", "129"],
        ["kill", "-s", "sigusr1", "129"],
        ["kill", "-s", "10", "129"],
    ] {
        assert_eq!(fake.dunlin(&way).status.code(), Some(0));
    }
    assert_eq!(fake.dunlin(&["kill", "-s", "NO", "129"]).status.code(), Some(2));
}

#[test]
fn wait_ends_as_the_process_did() {
    let code = Fake::saying(Reply::Exited(ExitStatus::Code(7)));
    assert_eq!(code.dunlin(&["wait", "129"]).status.code(), Some(7));
    for signal in [9, 15, 11, 2] {
        let fake = Fake::saying(Reply::Exited(ExitStatus::Signal { signal, core: true }));
        let status = fake.dunlin(&["wait", "129"]).status;
        assert_eq!((status.signal(), status.core_dumped()), (Some(signal), false));
    }
    let unknown = Fake::saying(Reply::Exited(ExitStatus::Unknown));
    assert_eq!(unknown.dunlin(&["wait", "129"]).status.code(), Some(125));
}

#[test]
fn logs_go_to_the_streams_they_came_from() {
    let fake = Fake::new(|request, client| {
        assert_eq!(
            request,
            Request::Logs {
                pid: Pid(129),
                follow: true
            }
        );
        client.say(Reply::Output {
            stream: 1,
            bytes: b"out".to_vec(),
        });
        client.say(Reply::Output {
            stream: 2,
            bytes: b"err".to_vec(),
        });
        client.say(Reply::Done);
    });
    let output = fake.dunlin(&["logs", "129", "-f"]);
    assert_eq!(
        (text(&output.stdout), text(&output.stderr)),
        ("out".into(), "err".into())
    );
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn version_needs_nobody() {
    let gone = Fake {
        socket: "/nonexistent".into(),
    };
    let output = gone.dunlin(&["version"]);
    assert_eq!(text(&output.stdout), format!("dunlin {}\n", env!("CARGO_PKG_VERSION")));
}
