//! Surrogates in the nest.

use super::Test;
use super::fixture::{Fixture, Running};
use dunlin_node::nest::{NestEvent, SurrogateSpec, errno};
use dunlin_proto::ids::Pid;

pub const TESTS: &[Test] = &[
    ("a_surrogate_tells_what_it_is_sent", a_surrogate_tells_what_it_is_sent),
    (
        "stops_and_deaths_of_surrogates_are_noticed",
        stops_and_deaths_of_surrogates_are_noticed,
    ),
    ("surrogates_are_placed_where_asked", surrogates_are_placed_where_asked),
    (
        "a_number_is_not_given_out_while_a_group_has_it",
        a_number_is_not_given_out_while_a_group_has_it,
    ),
    ("reports_wait_for_a_daemon", reports_wait_for_a_daemon),
    (
        "a_program_becomes_a_surrogate_and_reaps",
        a_program_becomes_a_surrogate_and_reaps,
    ),
    ("only_registered_ones_are_believed", only_registered_ones_are_believed),
];

const FOREIGN: Pid = Pid(64 * 20 + 4);

fn spec(pid: Pid) -> SurrogateSpec {
    SurrogateSpec {
        pid,
        comm: b"the-name".to_vec(),
        session: true,
        group: None,
        owner: None,
    }
}

fn number(info: &[u8; 128], at: usize) -> i32 {
    i32::from_ne_bytes(info[at..at + 4].try_into().unwrap())
}

/// The next signal that the surrogate tells of: number, code, sender, value.
fn next_signal(f: &mut Fixture, wanted: Pid) -> (i32, i32, i32, i32) {
    let event = f.wait_for(|e| matches!(e, NestEvent::SurrogateSignal { pid, .. } if *pid == wanted));
    let NestEvent::SurrogateSignal { siginfo, .. } = event else {
        unreachable!()
    };
    (
        number(&siginfo, 0),
        number(&siginfo, 8),
        number(&siginfo, 16),
        number(&siginfo, 24),
    )
}

/// Signals sent to a group or by the surrogate's own residue are the kernel's own; this one is of another residue, so the
/// daemon is asked first, and lets it through.
fn let_through(f: &mut Fixture) {
    let event = f.wait_for(|e| matches!(e, NestEvent::Notification { .. }));
    let NestEvent::Notification { id, .. } = event else {
        unreachable!()
    };
    assert!(f.nest().respond(id, dunlin_node::nest::Response::Continue).unwrap());
}

fn a_surrogate_tells_what_it_is_sent() {
    let mut f = Fixture::new();
    f.nest().make_surrogate(spec(FOREIGN)).unwrap();
    let script = format!(
        "import os, signal, ctypes\n\
         os.killpg({FOREIGN}, 15)\n\
         os.kill({FOREIGN}, 20)\n\
         ctypes.CDLL(None).sigqueue({FOREIGN}, 34, ctypes.c_void_p(77))\n\
         print(os.getpid(), open('/proc/{FOREIGN}/comm').read(), end='')"
    );
    let sender = f.start(&["python3", "-c", &script]);
    let_through(&mut f);
    let_through(&mut f);
    assert_eq!(f.ended(sender.pid), 0);
    let from = sender.pid.0;
    let text = super::fixture::read_all(sender.output);
    assert_eq!(text, format!("{from} the-name\n"));
    assert_eq!(next_signal(&mut f, FOREIGN), (15, 0, from, 0));
    assert_eq!(next_signal(&mut f, FOREIGN), (20, 0, from, 0));
    assert_eq!(next_signal(&mut f, FOREIGN), (34, -1, from, 77));
    f.nest().unregister_surrogate(FOREIGN).unwrap();
    f.sh(&format!("kill -TERM -{FOREIGN}"));
    f.sh("true");
    f.assert_quiet();
}

fn stops_and_deaths_of_surrogates_are_noticed() {
    let mut f = Fixture::new();
    f.nest().make_surrogate(spec(FOREIGN)).unwrap();
    f.sh(&format!("kill -STOP -{FOREIGN}"));
    f.wait_for(|e| *e == NestEvent::SurrogateStopped { pid: FOREIGN });
    f.sh(&format!("kill -CONT -{FOREIGN}"));
    f.wait_for(|e| *e == NestEvent::SurrogateContinued { pid: FOREIGN });
    assert_eq!(next_signal(&mut f, FOREIGN).0, 18);
    f.sh(&format!("kill -KILL -{FOREIGN}"));
    f.wait_for(|e| *e == NestEvent::SurrogateGone { pid: FOREIGN });
    assert_eq!(f.ended(FOREIGN), 9);
    // Its number can be used again.
    f.nest().make_surrogate(spec(FOREIGN)).unwrap();
    let error = f.nest().make_surrogate(spec(FOREIGN)).unwrap_err();
    assert_eq!(errno(&error), Some(17), "{error}");
}

fn surrogates_are_placed_where_asked() {
    let mut f = Fixture::new();
    let (group, member) = (FOREIGN, Pid(FOREIGN.0 + 64));
    let in_group = |pid: Pid| SurrogateSpec {
        session: false,
        group: Some(group),
        owner: Some((4321, 1234)),
        ..spec(pid)
    };
    f.nest().make_surrogate(in_group(group)).unwrap();
    f.nest().make_surrogate(in_group(member)).unwrap();
    f.nest().make_surrogate(spec(Pid(FOREIGN.0 + 128))).unwrap();
    let rows = f.sh("ps -o pid=,ppid=,pgid=,sid=,uid=,comm= -C the-name | tr -s ' ' | sed 's/^ //'");
    let (g, m, s) = (group.0, member.0, FOREIGN.0 + 128);
    assert_eq!(
        rows,
        format!("{g} 1 {g} 1 4321 the-name\n{m} 1 {g} 1 4321 the-name\n{s} 1 {s} {s} 0 the-name\n")
    );
    // A blank has nothing: no descriptor but its socket.
    assert_eq!(f.sh(&format!("ls /proc/{s}/fd | wc -l")), "1\n");
    let absent = SurrogateSpec {
        group: Some(Pid(777)),
        ..in_group(Pid(FOREIGN.0 + 192))
    };
    assert!(f.nest().make_surrogate(absent).is_err());
}

fn a_number_is_not_given_out_while_a_group_has_it() {
    let mut f = Fixture::new();
    let member = Pid(FOREIGN.0 + 64);
    let in_group = |pid: Pid| SurrogateSpec {
        session: false,
        group: Some(FOREIGN),
        ..spec(pid)
    };
    f.nest().make_surrogate(in_group(FOREIGN)).unwrap();
    f.nest().make_surrogate(in_group(member)).unwrap();
    let end = |f: &mut Fixture, pid: Pid| {
        let host = f.nest().host_pid(pid).unwrap().unwrap();
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(host).unwrap(),
            rustix::process::Signal::KILL,
        )
        .unwrap();
        f.wait_for(|e| *e == NestEvent::SurrogateGone { pid });
    };
    end(&mut f, FOREIGN);
    let error = f.nest().make_surrogate(spec(FOREIGN)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists, "{error}");
    assert_eq!(f.sh("ps -o comm= -C the-name"), "the-name\n", "the member alone");
    end(&mut f, member);
    f.nest().make_surrogate(spec(FOREIGN)).unwrap();
}

fn reports_wait_for_a_daemon() {
    let mut f = Fixture::new();
    f.nest().make_surrogate(spec(FOREIGN)).unwrap();
    let script = format!("sleep 0.2; for i in 1 2 3 4 5; do kill -$((34 + i)) -{FOREIGN}; done; exit 3");
    let sender = f.start(&["bash", "-c", &script]);
    f.nest = None;
    super::fixture::read_all(sender.output);
    f.reopen();
    for i in 1..=5 {
        assert_eq!(next_signal(&mut f, FOREIGN).0, 34 + i);
    }
    assert_eq!(f.ended(sender.pid), 3 << 8);
}

/// Executes the surrogates' program, which it has as its standard input, with a child left to wait for.
const TURN: &str = "\
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
if os.fork() == 0:
    os.close(1); os.close(2); signal.sigwait([10]); os._exit(9)
os.set_inheritable(0, True)
print(os.getpid(), flush=True)
signal.sigwait([12])
os.execv('/proc/self/fd/0', ['turned'])
";

/// A program that has forked, and becomes the surrogate program at SIGUSR2.
fn about_to_turn(f: &Fixture) -> Running {
    let program = f.nest().surrogate_program().try_clone_to_owned().unwrap();
    let running = f.try_start(&["python3", "-c", TURN], |s| s.stdio[0] = program).unwrap();
    let mut line = [0u8; 16];
    rustix::io::read(&running.output, &mut line).unwrap();
    running
}

fn a_program_becomes_a_surrogate_and_reaps() {
    let mut f = Fixture::new();
    let running = about_to_turn(&f);
    let pid = running.pid;
    f.nest().register_surrogate(pid).unwrap();
    f.sh(&format!(
        "kill -USR2 {pid}; n=0; until grep -q turned /proc/{pid}/comm; do sleep 0.01; n=$((n+1)); [ $n -lt 500 ] || exit 1; done; pkill -USR1 -P {pid}"
    ));
    let event = f.wait_for(|e| matches!(e, NestEvent::SurrogateChild { .. }));
    let NestEvent::SurrogateChild { parent, siginfo } = event else {
        unreachable!()
    };
    assert_eq!((parent, number(&siginfo, 0), number(&siginfo, 24)), (pid, 17, 9));
    assert_eq!(next_signal(&mut f, pid).0, 17);
    assert_eq!(
        f.sh(&format!("pgrep -c -P {pid} || true")),
        "0\n",
        "the child is reaped"
    );
    f.sh(&format!("kill -9 {pid}"));
    assert_eq!(f.ended(pid), 9);
}

fn only_registered_ones_are_believed() {
    let mut f = Fixture::new();
    let running = about_to_turn(&f);
    let pid = running.pid;
    f.sh(&format!(
        "kill -USR2 {pid}; n=0; until grep -q turned /proc/{pid}/comm; do sleep 0.01; n=$((n+1)); [ $n -lt 500 ] || exit 1; done; kill -TERM {pid}"
    ));
    f.nest().make_surrogate(spec(FOREIGN)).unwrap();
    f.sh(&format!("kill -TERM -{FOREIGN}"));
    assert_eq!(next_signal(&mut f, FOREIGN).0, 15);
    f.assert_quiet();
    f.sh(&format!("kill -9 {pid}"));
    f.ended(pid);
}
