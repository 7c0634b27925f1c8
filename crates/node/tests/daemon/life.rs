//! What daemons leave and find.

use crate::Test;
use crate::fixture::{code, killed, one, until};
use dunlin_proto::control::{ExitStatus, Reply};

pub const TESTS: &[Test] = &[
    (
        "a_stopped_daemon_leaves_its_programs",
        a_stopped_daemon_leaves_its_programs,
    ),
    ("a_killed_daemon_is_replaced", a_killed_daemon_is_replaced),
    (
        "an_attached_run_survives_its_daemon",
        an_attached_run_survives_its_daemon,
    ),
    ("there_is_one_daemon", there_is_one_daemon),
    ("a_daemon_ends_with_its_nest", a_daemon_ends_with_its_nest),
];

fn a_stopped_daemon_leaves_its_programs() {
    let mut node = one();
    let init = node.status().init_pid;
    let pid = node.run_detached(&["sleep", "1000"]);
    assert!(node.stop());
    assert!(!node.socket().exists() && !node.config.state_dir.join("daemon.pid").exists());
    node.start();
    assert_eq!(node.status().init_pid, init);
    assert_eq!(node.row(pid).unwrap().command, "sleep 1000");
    assert_eq!(node.kill(pid, 15), Reply::Done);
    assert_eq!(node.wait(pid), killed(15));
}

fn a_killed_daemon_is_replaced() {
    let mut node = one();
    let script = "echo begun; n=0; while [ $n -lt 20000 ]; do n=$((n+1)); echo $n; done; exit 6";
    let pid = node.run_detached(&["sh", "-c", script]);
    let short = node.run_detached(&["sh", "-c", "sleep 0.2; exit 7"]);
    until("the start", || node.row(pid).is_some());
    let init = node.status().init_pid;
    node.crash();
    // One of them ends while nobody is there.
    until("the end", || {
        !std::path::Path::new(&format!("/proc/{init}/root/proc/{short}")).exists()
    });
    node.start();
    assert_eq!(node.wait(short), code(7));
    let log = node.log_of(pid);
    assert!(
        log.starts_with("begun\n1\n") && log.ends_with("\n20000\n"),
        "{} bytes",
        log.len()
    );
    assert_eq!(node.wait(pid), code(6));
}

fn an_attached_run_survives_its_daemon() {
    let mut node = one();
    let script = "echo before; read x; echo after; sleep 0.3; echo last; exit 8";
    let run = node.run(&["sh", "-c", script]);
    let pid = run.started();
    run.output_until("before\n");
    node.crash();
    assert!(run.try_next().is_err());
    node.start();
    // Its caller is gone: its input has ended, and its output goes to a log.
    assert_eq!(node.log_of(pid), "after\nlast\n");
    assert_eq!(node.wait(pid), code(8));
}

fn there_is_one_daemon() {
    let node = one();
    let said = node.second();
    assert!(said.contains("already serves"), "{said}");
    let pidfile = std::fs::read_to_string(node.config.state_dir.join("daemon.pid")).unwrap();
    let (pid, start) = pidfile.trim().split_once(' ').unwrap();
    assert_eq!(pid, node.daemon_pid().to_string());
    assert!(
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .unwrap()
            .contains(&format!(" {start} "))
    );
}

fn a_daemon_ends_with_its_nest() {
    let mut node = one();
    let pid = node.run_detached(&["sleep", "1000"]);
    let init = rustix::process::Pid::from_raw(node.status().init_pid).unwrap();
    rustix::process::kill_process(init, rustix::process::Signal::KILL).unwrap();
    until("the daemon's end", || {
        !std::path::Path::new(&format!("/proc/{}/exe", node.daemon_pid())).exists()
    });
    assert!(!node.stop());
    // The next one makes a new nest.
    node.start();
    assert!(node.row(pid).is_none());
    assert_eq!(node.run(&["true"]).last(), Reply::Exited(ExitStatus::Code(0)));
}
