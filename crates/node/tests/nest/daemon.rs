//! The nest with, without and with another daemon.

use super::Test;
use super::fixture::{Fixture, assert_ours, read_all};
use dunlin_node::nest::{NestEvent, Response, errno};
use dunlin_proto::ids::Pid;
use std::os::fd::AsFd;
use std::time::Duration;

pub const TESTS: &[Test] = &[
    ("programs_fork_on_without_a_daemon", programs_fork_on_without_a_daemon),
    (
        "calls_on_foreign_pids_are_the_daemons",
        calls_on_foreign_pids_are_the_daemons,
    ),
    (
        "unanswered_calls_come_to_the_next_daemon",
        unanswered_calls_come_to_the_next_daemon,
    ),
    (
        "a_chosen_number_is_given_to_a_chosen_clone",
        a_chosen_number_is_given_to_a_chosen_clone,
    ),
    (
        "steering_keeps_others_waiting_until_it_ends",
        steering_keeps_others_waiting_until_it_ends,
    ),
    (
        "descriptors_are_kept_for_the_next_daemon",
        descriptors_are_kept_for_the_next_daemon,
    ),
    ("the_end_of_init_is_told", the_end_of_init_is_told),
];

/// Of slot 4.
const FOREIGN: i32 = 64 * 20 + 4;

fn programs_fork_on_without_a_daemon() {
    let mut f = Fixture::new();
    let init = f.nest().init_pid();
    let running = f.start(&[
        "sh",
        "-c",
        "for i in 1 2 3 4 5 6 7 8 9; do sh -c 'echo $$'; done; exit 5",
    ]);
    f.nest = None;
    assert!(f.events.iter().all(|e| e != NestEvent::InitGone), "init lives");
    let output = read_all(running.output);
    assert_eq!(assert_ours(&output).len(), 9);
    f.reopen();
    assert_eq!(f.nest().init_pid(), init);
    assert_eq!(f.ended(running.pid), 5 << 8, "the end was kept for the next daemon");
    f.sh("true");
}

fn calls_on_foreign_pids_are_the_daemons() {
    let mut f = Fixture::new();
    let script = format!(
        "import os, signal\n\
         try: os.kill({FOREIGN}, 10)\n\
         except ProcessLookupError: print('none')\n\
         print(os.kill({FOREIGN}, 12))\n\
         try: os.pidfd_open({FOREIGN})\n\
         except OSError as e: print(e.errno)\n\
         try: os.kill(64 * 20 + 3, 0)\n\
         except ProcessLookupError: print('ours')\n\
         try: os.kill(99, 0)\n\
         except ProcessLookupError: print('own')"
    );
    let running = f.start(&["python3", "-c", &script]);
    for (nr, arg1, response) in [
        (62, 10, Response::Continue),
        (62, 12, Response::Value(0)),
        (434, 0, Response::Errno(38)),
    ] {
        let call = f.wait_for(|e| matches!(e, NestEvent::Notification { .. }));
        let NestEvent::Notification { id, pid, nr: got, args } = call else {
            unreachable!()
        };
        assert_eq!((pid, got, args[0], args[1]), (running.pid, nr, FOREIGN as u64, arg1));
        assert!(f.nest().respond(id, response).unwrap());
        assert!(!f.nest().respond(id, response).unwrap(), "answered already");
    }
    assert_eq!(read_all(running.output), "none\nNone\n38\nours\nown\n");
    assert_eq!(f.ended(running.pid), 0);
    f.assert_quiet();
}

fn unanswered_calls_come_to_the_next_daemon() {
    let mut f = Fixture::new();
    let running = f.start(&[
        "bash",
        "-c",
        &format!("kill -0 {FOREIGN}; echo $?; kill -0 {FOREIGN}; echo $?"),
    ]);
    let is_call = |e: &NestEvent| matches!(e, NestEvent::Notification { .. });
    let first = f.wait_for(is_call);
    f.reopen();
    let again = f.wait_for(is_call);
    assert_eq!(first, again);
    let NestEvent::Notification { id, .. } = again else {
        unreachable!()
    };
    assert!(f.nest().respond(id, Response::Value(0)).unwrap());
    // One that comes while there is no daemon waits for one.
    let second = f.wait_for(is_call);
    f.nest = None;
    f.reopen();
    assert_eq!(f.wait_for(is_call), second);
    let NestEvent::Notification { id, .. } = second else {
        unreachable!()
    };
    assert!(f.nest().respond(id, Response::Errno(1)).unwrap());
    let output = read_all(running.output);
    assert!(output.starts_with("0\n") && output.ends_with("\n1\n"), "{output}");
    f.ended(running.pid);
    f.reopen();
    f.assert_quiet();
}

/// Makes a child by a clone that carries the cookie, whenever a line comes, and prints its PID. First it says that it is
/// there: to become so it may need processes, which it would not get while somebody steers.
const CLONER: &str = "\
import ctypes, os, sys
libc = ctypes.CDLL(None)
u = ctypes.c_ulong
os.write(1, b'ready\\n')
while sys.stdin.readline():
    pid = libc.syscall(u(56), u(17), u(0), u(0), u(0), u(0), u(int(sys.argv[1])))
    if pid == 0: os._exit(0)
    os.waitpid(pid, 0)
    os.write(1, b'%d\\n' % pid)
";

fn a_chosen_number_is_given_to_a_chosen_clone() {
    let f = Fixture::new();
    let (stdin, order) = rustix::pipe::pipe().unwrap();
    let cookie = f.nest().cookie().to_string();
    let cloner = f
        .try_start(&["python3", "-u", "-c", CLONER, &cookie], |spec| spec.stdio[0] = stdin)
        .unwrap();
    let bomb = f.start(&["sh", "-c", "while :; do /bin/true; done"]);
    let line = || {
        let mut line = [0u8; 32];
        let n = rustix::io::read(&cloner.output, &mut line).unwrap();
        std::str::from_utf8(&line[..n]).unwrap().trim().to_owned()
    };
    assert_eq!(line(), "ready");
    let answer = || {
        rustix::io::write(&order, b"\n").unwrap();
        line().parse::<i32>().unwrap()
    };
    for i in 0..30 {
        let pid = FOREIGN + 64 * i;
        let mut guard = f.nest().steer(Pid(pid)).unwrap();
        assert_eq!(answer(), pid);
        assert!(guard.aim(Pid(pid + 1)).unwrap());
        assert_eq!(answer(), pid + 1);
        assert!(guard.finish().unwrap(), "it was taken");
    }
    drop(order);
    let host = f.nest().host_pid(bomb.pid).unwrap().unwrap();
    let _ = rustix::process::kill_process(
        rustix::process::Pid::from_raw(host).unwrap(),
        rustix::process::Signal::KILL,
    );
}

fn steering_keeps_others_waiting_until_it_ends() {
    let mut f = Fixture::new();
    let (stdin, order) = rustix::pipe::pipe().unwrap();
    let forker = f
        .try_start(&["sh", "-c", "read x; /bin/true; echo $?"], |spec| {
            spec.stdio[0] = stdin
        })
        .unwrap();
    let error = f.nest().steer(forker.pid).unwrap_err();
    assert_eq!(errno(&error), Some(17), "{error}");
    let guard = f.nest().steer(Pid(FOREIGN)).unwrap();
    rustix::io::write(&order, b"go\n").unwrap();
    let mut fds = [rustix::event::PollFd::new(&forker.output, rustix::event::PollFlags::IN)];
    let short = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: 200_000_000,
    };
    let n = rustix::event::poll(&mut fds, Some(&short)).unwrap();
    assert_eq!(n, 0, "it forked while somebody else steered");
    assert!(!guard.finish().unwrap(), "nothing took the number");
    assert_eq!(read_all(forker.output), "0\n");
    f.ended(forker.pid);
    // A guard that is dropped, and a daemon that dies with one.
    drop(f.nest().steer(Pid(FOREIGN)).unwrap());
    f.sh("/bin/true");
    std::mem::forget(f.nest().steer(Pid(FOREIGN)).unwrap());
    f.reopen();
    f.sh("/bin/true; /bin/true");
}

fn descriptors_are_kept_for_the_next_daemon() {
    let mut f = Fixture::new();
    let (read, write) = rustix::pipe::pipe().unwrap();
    f.nest()
        .store("pipe", &[read.as_fd(), write.as_fd()], vec![7; 100_000])
        .unwrap();
    f.nest().store("none", &[], vec![1]).unwrap();
    drop((read, write));
    f.reopen();
    assert_eq!(f.nest().list().unwrap(), ["none", "pipe"]);
    let (fds, blob) = f.nest().fetch("pipe").unwrap().unwrap();
    assert_eq!((fds.len(), blob), (2, vec![7; 100_000]));
    rustix::io::write(&fds[1], b"x").unwrap();
    assert_eq!(rustix::io::read(&fds[0], &mut [0u8; 8]).unwrap(), 1);
    assert!(f.nest().drop_label("pipe").unwrap() && !f.nest().drop_label("pipe").unwrap());
    assert!(f.nest().fetch("pipe").unwrap().is_none());
    let fd = fds.into_iter().next_back().unwrap();
    drop(fd);
}

fn the_end_of_init_is_told() {
    let f = Fixture::new();
    let init = rustix::process::Pid::from_raw(f.nest().init_pid()).unwrap();
    rustix::process::kill_process(init, rustix::process::Signal::KILL).unwrap();
    assert_eq!(
        f.events.recv_timeout(Duration::from_secs(30)).unwrap(),
        NestEvent::InitGone
    );
    assert!(f.nest().host_pid(Pid(1)).is_err());
    assert!(f.events.recv().is_err(), "it is the last");
}
