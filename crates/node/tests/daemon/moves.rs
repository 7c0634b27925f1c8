//! Runs that move, with their streams, between daemons.

use crate::Test;
use crate::fixture::{Node, code, killed, nodes, until};
use dunlin_proto::control::{MoveMode, MoveRequest, Reply, Request, RunInput, WaitFor, WindowSize};
use dunlin_proto::ids::Pid;

pub const TESTS: &[Test] = &[
    (
        "a_conversation_goes_on_across_moves",
        a_conversation_goes_on_across_moves,
    ),
    (
        "output_and_end_of_a_moved_run_arrive",
        output_and_end_of_a_moved_run_arrive,
    ),
    ("signals_find_a_moved_process", signals_find_a_moved_process),
    ("a_terminal_follows", a_terminal_follows),
    (
        "a_caller_that_goes_hangs_a_moved_program_up",
        a_caller_that_goes_hangs_a_moved_program_up,
    ),
];

impl Node {
    fn move_to(&self, pid: Pid, to: &str) {
        let request = MoveRequest {
            pid,
            to: to.into(),
            tree: false,
            mode: MoveMode::Demand,
            wait: WaitFor::Drained,
            verify: false,
        };
        let last = self.ask(&Request::Move(request)).last();
        assert!(matches!(last, Reply::Moved(_)), "{last:?}");
        let row = self.row(pid).unwrap();
        assert_eq!((row.node.as_str(), row.pages_elsewhere.len()), (to, 0));
    }
}

/// Reads lines and answers each, unbuffered.
const ECHO: &str =
    "import sys\nprint('up',flush=True)\nfor l in sys.stdin: print('>'+l.strip(),flush=True)\nsys.exit(3)";

fn a_conversation_goes_on_across_moves() {
    let [one, two, _three] = nodes();
    let run = one.run(&["python3", "-c", ECHO]);
    let pid = run.started();
    run.output_until("up\n");
    let say = |text: &str| run.send(&RunInput::Stdin(text.as_bytes().to_vec()));
    for (n, to) in ["n2", "n3", "n1", "n3", "n2"].into_iter().enumerate() {
        say(&format!("before {n}\n"));
        run.output_until(&format!(">before {n}\n"));
        two.move_to(pid, to);
        say(&format!("after {n}\n"));
        run.output_until(&format!(">after {n}\n"));
    }
    run.send(&RunInput::StdinEnd);
    assert_eq!(run.outputs().2, code(3));
    assert_eq!(two.wait(pid), code(3));
}

fn output_and_end_of_a_moved_run_arrive() {
    let [one, _two] = nodes();
    let script = "import sys,time\nfor i in range(3000):\n print(i,flush=True); time.sleep(0.0005)\nsys.exit(5)";
    let pid = one.run_detached(&["python3", "-c", script]);
    let log = one.ask(&Request::Logs { pid, follow: true });
    let mut seen = log.output_until("10\n");
    one.move_to(pid, "n2");
    seen += &log.outputs().0;
    let expected: String = (0..3000).map(|i| format!("{i}\n")).collect();
    assert!(seen == expected, "{} bytes", seen.len());
    assert_eq!(one.wait(pid), code(5));
}

fn signals_find_a_moved_process() {
    let [one, two] = nodes();
    let script = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK,[10,12,15])\nprint('up',flush=True)\n\
        while True:\n i=signal.sigwaitinfo([10,12,15]); print(i.si_signo,flush=True)";
    let run = one.run(&["python3", "-c", script]);
    let pid = run.started();
    run.output_until("up\n");
    one.move_to(pid, "n2");
    run.send(&RunInput::Signal(10));
    run.output_until("10\n");
    assert_eq!(two.kill(pid, 12), Reply::Done);
    run.output_until("12\n");
    // From a program at home, to the table entry there; from one on the new node, to the process.
    for node in [&one, &two] {
        assert_eq!(node.run(&["sh", "-c", &format!("kill -TERM {pid}")]).last(), code(0));
        run.output_until("15\n");
    }
    let is_in = |state| two.row(pid).is_some_and(|r| r.state == state);
    assert_eq!(one.run(&["sh", "-c", &format!("kill -STOP {pid}")]).last(), code(0));
    until("the stop", || is_in('T'));
    assert_eq!(one.run(&["sh", "-c", &format!("kill -CONT {pid}")]).last(), code(0));
    until("the continue", || is_in('S'));
    assert_eq!(one.run(&["sh", "-c", &format!("kill -KILL {pid}")]).last(), code(0));
    assert_eq!(run.outputs().2, killed(9));
    until("its end there", || two.row(pid).is_none());
}

fn a_terminal_follows() {
    let [one, _two] = nodes();
    let size = |rows, cols| WindowSize { rows, cols };
    let script = "import sys,os,signal,termios\n\
        signal.signal(signal.SIGWINCH,lambda *a: os.write(1,b'size %d %d\\n'%os.get_terminal_size()))\n\
        signal.signal(signal.SIGINT,lambda *a: os.write(1,b'interrupted\\n'))\n\
        t=termios.tcgetattr(0); t[3]&=~termios.ECHO; termios.tcsetattr(0,termios.TCSANOW,t)\n\
        print('up',flush=True)\n\
        for l in sys.stdin: print('>'+l.strip(),*os.get_terminal_size(),flush=True)";
    let run = one.run_tty(&["python3", "-c", script], size(20, 40));
    let pid = run.started();
    run.output_until("up\r\n");
    let say = |text: &str| run.send(&RunInput::Stdin(text.as_bytes().to_vec()));
    for to in ["n2", "n1", "n2"] {
        say("here\n");
        assert_eq!(run.output_until("here 40 20\r\n"), ">here 40 20\r\n");
        one.move_to(pid, to);
        say("there\n");
        // No echo, as before.
        assert_eq!(run.output_until("there 40 20\r\n"), ">there 40 20\r\n");
    }
    run.send(&RunInput::Resize(size(30, 60)));
    run.output_until("size 60 30\r\n");
    say("\x03");
    run.output_until("interrupted\r\n");
    say("\x04");
    assert_eq!(run.outputs().2, code(0));
}

fn a_caller_that_goes_hangs_a_moved_program_up() {
    let [one, two] = nodes();
    for away in [false, true] {
        let run = one.run(&["python3", "-c", ECHO]);
        let tty = one.run_tty(&["python3", "-c", ECHO], WindowSize { rows: 20, cols: 40 });
        for (run, up) in [(run, "up\n"), (tty, "up\r\n")] {
            let pid = run.started();
            run.output_until(up);
            if away {
                one.move_to(pid, "n2");
            }
            drop(run);
            assert_eq!(two.wait(pid), killed(1));
        }
    }
}
