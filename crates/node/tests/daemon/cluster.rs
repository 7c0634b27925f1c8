//! Commands and signals between nodes.

use crate::Test;
use crate::fixture::{code, failure, killed, nodes, until};
use dunlin_proto::control::{FailureKind, Reply, Request};
use dunlin_proto::ids::Pid;

pub const TESTS: &[Test] = &[
    ("every_node_sees_the_whole_cluster", every_node_sees_the_whole_cluster),
    (
        "commands_reach_processes_of_other_nodes",
        commands_reach_processes_of_other_nodes,
    ),
    (
        "programs_signal_programs_of_other_nodes",
        programs_signal_programs_of_other_nodes,
    ),
    ("strange_pids_are_nobodys", strange_pids_are_nobodys),
];

fn every_node_sees_the_whole_cluster() {
    let [one, two, mut three] = nodes();
    let pids = [&one, &two, &three].map(|n| n.run_detached(&["sleep", "1000"]));
    for node in [&one, &two, &three] {
        let (rows, silent) = node.ps();
        assert_eq!(silent, Vec::<String>::new());
        let mut seen: Vec<(Pid, &str)> = rows.iter().map(|r| (r.pid, r.node.as_str())).collect();
        seen.sort();
        let mut expected = vec![(pids[0], "n1"), (pids[1], "n2"), (pids[2], "n3")];
        expected.sort();
        assert_eq!(seen, expected);
        assert!(node.status().peers.values().all(|answers| *answers));
    }
    three.crash();
    let (rows, silent) = one.ps();
    assert_eq!((rows.len(), silent), (2, vec!["n3".to_owned()]));
    assert_eq!(
        one.status().peers,
        [("n2".to_owned(), true), ("n3".to_owned(), false)].into()
    );
    assert_eq!(failure(one.kill(pids[2], 0)), FailureKind::Unreachable);
    three.start();
    assert_eq!(one.kill(pids[2], 0), Reply::Done);
}

fn commands_reach_processes_of_other_nodes() {
    let [one, two] = nodes();
    let pid = two.run_detached(&["sh", "-c", "trap 'exit 9' USR2; while :; do sleep 0.02; done"]);
    // It does not reap its child.
    let script =
        "import subprocess,signal; p=subprocess.Popen(['sleep','1000']); print(p.pid,flush=True); signal.pause()";
    let child = two.run_detached(&["python3", "-c", script]);
    let waiter = one.ask(&Request::Wait { pid });
    until("the trap", || two.row(pid).is_some_and(|r| r.state == 'S'));
    assert_eq!(one.kill(pid, 19), Reply::Done);
    until("the stop", || one.row(pid).is_some_and(|r| r.state == 'T'));
    assert_eq!(one.kill(pid, 18), Reply::Done);
    assert_eq!(one.kill(pid, 12), Reply::Done);
    assert_eq!(waiter.last(), code(9));
    // After the end too, from anywhere.
    assert_eq!(one.wait(pid), code(9));
    assert_eq!(failure(one.kill(pid, 0)), FailureKind::NoProcess);
    // Any process, not only what was run: the kernel tells how it ended.
    let follower = one.ask(&Request::Logs {
        pid: child,
        follow: true,
    });
    let grandchild = Pid(follower.output_until("\n").trim().parse().unwrap());
    let waiter = one.ask(&Request::Wait { pid: grandchild });
    assert_eq!(one.kill(grandchild, 15), Reply::Done);
    assert_eq!(waiter.last(), killed(15));
    assert_eq!(failure(one.ask_as_move(pid)), FailureKind::NoNode);
}

impl crate::fixture::Node {
    fn ask_as_move(&self, pid: Pid) -> Reply {
        self.ask(&Request::CanMove {
            pid,
            to: Some("nowhere".into()),
        })
        .last()
    }
}

/// The calls are python's own wrappers of the system calls.
fn programs_signal_programs_of_other_nodes() {
    let [one, two] = nodes();
    let script = "import signal,os\n\
        signal.pthread_sigmask(signal.SIG_BLOCK,[10,12])\n\
        print('up',flush=True)\n\
        for _ in range(2):\n\
        \x20 i=signal.sigwaitinfo([10,12]); print(i.si_signo,i.si_pid,i.si_uid,flush=True)";
    let target = two.run_detached(&["python3", "-c", script]);
    let log = one.ask(&Request::Logs {
        pid: target,
        follow: true,
    });
    log.output_until("up\n");
    let bystander = two.run_detached(&["sleep", "1000"]);
    let script = "import os,sys,signal,ctypes\n\
        t,b,gone=map(int,sys.argv[1:])\n\
        os.kill(t,0)\n\
        os.kill(t,10)\n\
        print(os.getpid())\n\
        libc=ctypes.CDLL(None,use_errno=True)\n\
        info=(ctypes.c_int*32)(12,0,-1,0,os.getpid(),os.getuid())\n\
        assert libc.syscall(129,t,12,info)==0\n\
        def err(f):\n\
        \x20 try: f()\n\
        \x20 except OSError as e: print(e.errno)\n\
        err(lambda: os.kill(gone,0))\n\
        err(lambda: os.pidfd_open(b))\n\
        info[2]=0\n\
        assert libc.syscall(129,b,12,info)==-1; print(ctypes.get_errno())\n\
        os.setresuid(77,77,77)\n\
        err(lambda: os.kill(b,9))\n\
        os.kill(os.getpid(),0)";
    let gone = Pid(target.0 + 64 * 400).to_string();
    let sender = one.run(&[
        "python3",
        "-c",
        script,
        &target.to_string(),
        &bystander.to_string(),
        &gone,
    ]);
    let (out, err, status) = sender.outputs();
    assert_eq!((err.as_str(), status), ("", code(0)));
    let lines: Vec<&str> = out.lines().collect();
    // ESRCH for what is not there and for a descriptor of what is elsewhere, EPERM for a forged and a forbidden one.
    assert_eq!(lines[1..], ["3", "3", "1", "1"], "{out}");
    let (seen, _, _) = log.outputs();
    assert_eq!(seen, format!("10 {0} 0\n12 {0} 0\n", lines[0]));
    assert_eq!(one.kill(bystander, 9), Reply::Done);
    assert_eq!(two.wait(bystander), killed(9));
}

fn strange_pids_are_nobodys() {
    let [one, _two] = nodes();
    for pid in [0, -1, 50, 101, 4_000_000, i32::MAX] {
        assert_eq!(failure(one.kill(Pid(pid), 15)), FailureKind::NoProcess, "{pid}");
        assert_eq!(failure(one.wait(Pid(pid))), FailureKind::NoProcess, "{pid}");
    }
    let pid = one.run_detached(&["sleep", "1000"]);
    for signal in [-1, 65, 1000] {
        assert_eq!(failure(one.kill(pid, signal)), FailureKind::Invalid);
    }
}
