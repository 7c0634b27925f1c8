//! The entry at home: what parent, children and others see of a process that is elsewhere, and what it sees of them.

mod support;

use dunlin_lab::harness::{NotMoved, request};
use dunlin_lab::{Lab, Options};
use dunlin_proto::control::{ExitStatus, MoveRequest, Reply, Request, WaitFor};
use dunlin_proto::ids::Pid;
use support::obedient::Obedient;
use support::{JOURNEY, Workshop};

/// A parent on n1 and its child, both told what to do.
struct Family {
    lab: Lab,
    workshop: Workshop,
    parent: Obedient,
    child: Obedient,
    run: dunlin_lab::harness::Run,
}

impl Family {
    #[track_caller]
    fn start(name: &str) -> Family {
        let workshop = Workshop::new(name);
        let lab = Lab::up(name, &Options::default());
        let (mut parent, run) = Obedient::start(&lab, &workshop, "parent");
        let child = parent.fork("child");
        Family {
            lab,
            workshop,
            parent,
            child,
            run,
        }
    }

    /// What the parent's waitpid says of the child, in words.
    #[track_caller]
    fn waited(&mut self, options: &str) -> String {
        let child = self.child.pid;
        self.parent.ask(&format!(
            "(lambda p, s: [p == {child} or p, os.WIFEXITED(s) and ('exited', os.WEXITSTATUS(s)) or \
             os.WIFSIGNALED(s) and ('killed', os.WTERMSIG(s)) or os.WIFSTOPPED(s) and ('stopped', os.WSTOPSIG(s)) \
             or os.WIFCONTINUED(s) and ('continued',)])(*os.waitpid({child}, {options}))"
        ))
    }

    #[track_caller]
    fn state_of_child(&self, state: char) {
        let pid = self.child.pid;
        self.lab.until(&format!("{pid} is in state {state}"), |rows| {
            rows.iter().any(|r| r.pid == pid && r.state == state)
        });
    }
}

/// What the nest of a node has: PIDs of its own /proc, init left out.
fn nest_of(lab: &Lab, node: &str) -> Vec<Pid> {
    let Reply::Status(status) = lab.node(node).ask(&Request::Status) else {
        panic!("{node} has no status")
    };
    let proc = format!("/proc/{}/root/proc", status.init_pid);
    let entries = std::fs::read_dir(proc).unwrap().flatten();
    let numbers = entries.filter_map(|e| e.file_name().to_str()?.parse().ok());
    numbers.filter(|n| *n > 1).map(Pid).collect()
}

/// Waits until a node's nest has nothing but init.
#[track_caller]
fn empties(lab: &Lab, node: &str) {
    lab.until(&format!("{node} keeps nothing: {:?}", nest_of(lab, node)), |_| {
        nest_of(lab, node).is_empty()
    });
}

fn without_waiting(pid: Pid, to: &str) -> MoveRequest {
    MoveRequest {
        wait: WaitFor::Resumed,
        ..request(pid, to)
    }
}

#[test]
fn a_parent_sees_the_exit_code_of_a_child_elsewhere() {
    let mut family = Family::start("exit-code");
    family.lab.move_process(family.child.pid, "n2");
    family.parent.tell("os.wait()[1] >> 8");
    family.child.tell("os._exit(7)");
    assert_eq!(family.parent.answer(), "7");
    let gone = format!("os.path.exists('/proc/{}')", family.child.pid);
    assert_eq!(family.parent.ask(&gone), "False");
    empties(&family.lab, "n2");
}

#[test]
fn a_parent_sees_what_killed_its_child_elsewhere() {
    for (order, signal) in [
        ("os.kill(os.getpid(), 15)", 15),
        ("ctypes.string_at(8)", 11),
        ("os.abort()", 6),
    ] {
        let mut family = Family::start(&format!("killed-by-{signal}"));
        family.lab.move_verified(family.child.pid, "n2");
        family.lab.move_process(family.child.pid, "n3");
        family.child.tell(order);
        assert_eq!(family.waited("0"), format!("[True, ('killed', {signal})]"));
    }
}

#[test]
fn a_parent_stops_continues_and_ends_its_child_elsewhere() {
    let mut family = Family::start("job-control");
    let pid = family.child.pid;
    family.lab.move_process(pid, "n2");
    for _ in 0..3 {
        family.parent.ask(&format!("os.kill({pid}, signal.SIGSTOP)"));
        assert_eq!(family.waited("os.WUNTRACED"), "[True, ('stopped', 19)]");
        family.state_of_child('T');
        family.parent.ask(&format!("os.kill({pid}, signal.SIGCONT)"));
        assert_eq!(family.waited("os.WCONTINUED"), "[True, ('continued',)]");
        assert_eq!(family.child.ask("1 + 1"), "2");
    }
    family.parent.ask(&format!("os.kill({pid}, signal.SIGTERM)"));
    assert_eq!(family.waited("0"), "[True, ('killed', 15)]");
}

#[test]
fn what_a_parent_did_to_its_child_elsewhere_last_is_what_holds() {
    let mut family = Family::start("last-holds");
    let pid = family.child.pid;
    family.lab.move_process(pid, "n2");
    let answers = family.workshop.path("child.answers");
    // Stopped again at once, or as soon as it has run there: faster than surrogates are looked at, and than what the child
    // does there is told here.
    let again = |answered: usize| {
        format!(
            "(os.kill({pid}, 18), os.waitpid({pid}, os.WCONTINUED)[1], \
             all(iter(lambda: len(open({answers:?}).readlines()) < {answered}, False)), \
             os.kill({pid}, 19), os.waitpid({pid}, os.WUNTRACED)[1])[1::3] == (0xffff, 0x137f)"
        )
    };
    let more = format!("os.waitpid({pid}, os.WUNTRACED | os.WCONTINUED | os.WNOHANG)");
    for runs in [false, true, false, true] {
        family.parent.ask(&format!("os.kill({pid}, signal.SIGSTOP)"));
        assert_eq!(family.waited("os.WUNTRACED"), "[True, ('stopped', 19)]");
        for _ in 0..3 {
            family.state_of_child('T');
            let answered = std::fs::read_to_string(&answers).unwrap().lines().count();
            if runs {
                family.child.tell("2 + 2");
            }
            let order = again(answered + usize::from(runs));
            assert_eq!(family.parent.ask(&order), "True", "it is to run meanwhile: {runs}");
        }
        family.state_of_child('T');
        assert_eq!(family.parent.ask(&more), "(0, 0)", "while it is stopped");
        family.parent.ask(&format!("os.kill({pid}, signal.SIGCONT)"));
        assert_eq!(family.waited("os.WCONTINUED"), "[True, ('continued',)]");
        assert_eq!(family.child.ask("1 + 1"), "2");
        assert_eq!(family.parent.ask(&more), "(0, 0)", "while it runs");
    }
}

#[test]
fn signals_of_the_command_line_reach_a_child_elsewhere_and_its_parent_sees_it() {
    let mut family = Family::start("dunlin-kill");
    let pid = family.child.pid;
    family.lab.move_process(pid, "n3");
    family.lab.kill(pid, 19);
    assert_eq!(family.waited("os.WUNTRACED"), "[True, ('stopped', 19)]");
    family.lab.kill(pid, 18);
    assert_eq!(family.waited("os.WCONTINUED"), "[True, ('continued',)]");
    family.lab.kill(pid, 9);
    assert_eq!(family.lab.wait(pid), ExitStatus::Signal { signal: 9, core: false });
    assert_eq!(family.waited("0"), "[True, ('killed', 9)]");
}

#[test]
fn a_sigkill_of_the_parent_reaches_a_child_elsewhere() {
    let mut family = Family::start("sigkill");
    let pid = family.child.pid;
    family.lab.move_process(pid, "n2");
    family.parent.ask(&format!("os.kill({pid}, signal.SIGKILL)"));
    assert_eq!(family.waited("0"), "[True, ('killed', 9)]");
    family
        .lab
        .until("the child has ended", |rows| rows.iter().all(|r| r.pid != pid));
    empties(&family.lab, "n2");
}

#[test]
fn a_signal_to_the_group_reaches_its_member_elsewhere_with_its_sender() {
    let mut family = Family::start("group-signal");
    let pid = family.child.pid;
    family.parent.ask("signal.pthread_sigmask(0, [10])");
    family.child.ask("signal.pthread_sigmask(0, [10])");
    family.lab.move_process(pid, "n2");
    family.parent.ask("os.kill(0, 10)");
    // The kernel lets nobody but kill(2) itself say SI_USER: the code is SI_QUEUE where it is.
    let info = family
        .child
        .ask("(lambda i: (i.si_signo, i.si_pid))(signal.sigwaitinfo([10]))");
    assert_eq!(info, format!("(10, {})", family.parent.pid));
}

#[test]
fn a_process_sees_its_relatives_where_it_is() {
    let mut family = Family::start("relatives");
    let pid = family.child.pid;
    let asked = "(os.getppid(), os.getpgrp(), os.getsid(0), os.getpgid(os.getppid()), os.getsid(os.getppid()))";
    let listed = "os.popen(f'ps -o pid=,ppid=,pgid=,sid= -p {os.getpid()}').read().split()";
    let before = (family.child.ask(asked), family.child.ask(listed));
    for node in ["n2", "n3", "n1", "n2"] {
        family.lab.move_process(pid, node);
        assert_eq!((family.child.ask(asked), family.child.ask(listed)), before, "on {node}");
    }
}

#[test]
fn a_process_forks_where_it_is_and_waits_for_its_children() {
    let mut family = Family::start("forks-there");
    for (node, slot) in [("n2", 2), ("n3", 3)] {
        family.lab.move_process(family.child.pid, node);
        let name = format!("grandchild-on-{node}");
        let mut grandchild = family.child.fork(&name);
        assert_eq!(grandchild.pid.0 % 64, slot, "home of {}", grandchild.pid);
        assert_eq!(grandchild.ask("os.getppid()"), family.child.pid.to_string());
        family.child.tell("os.wait()");
        grandchild.tell("os._exit(3)");
        assert_eq!(family.child.answer(), format!("({}, 768)", grandchild.pid));
    }
}

#[test]
fn a_process_waits_for_the_children_it_left_behind() {
    let mut family = Family::start("left-behind");
    let mut kids: Vec<Obedient> = ["a", "b", "c"].map(|n| family.child.fork(n)).into();
    // One has ended, unwaited for, before the move.
    let dead = family.child.ask("fork_leaving(9)");
    family.child.ask(&format!(
        "os.waitid(os.P_PID, {dead}, os.WEXITED | os.WNOWAIT).si_status"
    ));
    family.lab.move_process(family.child.pid, "n2");
    assert_eq!(
        family.child.ask(&format!("os.waitpid({dead}, 0)")),
        format!("({dead}, 2304)")
    );
    kids[0].tell("os._exit(5)");
    assert_eq!(family.child.ask("os.wait()"), format!("({}, 1280)", kids[0].pid));
    family.lab.move_process(family.child.pid, "n3");
    kids[1].tell("os.kill(os.getpid(), 15)");
    assert_eq!(family.child.ask("os.wait()"), format!("({}, 15)", kids[1].pid));
    // It ends at home while its parent is there again.
    family.lab.move_process(family.child.pid, "n1");
    kids[2].tell("os._exit(6)");
    assert_eq!(family.child.ask("os.wait()"), format!("({}, 1536)", kids[2].pid));
    let none = family.child.ask("os.wait()");
    assert!(none.starts_with("ChildProcessError"), "{none}");
}

#[test]
fn a_moved_parent_stops_and_continues_the_child_it_left_behind() {
    let mut family = Family::start("stops-behind");
    let child = family.child.pid;
    family.lab.move_process(family.parent.pid, "n2");
    family.parent.ask(&format!("os.kill({child}, signal.SIGSTOP)"));
    assert_eq!(family.waited("os.WUNTRACED"), "[True, ('stopped', 19)]");
    family.parent.ask(&format!("os.kill({child}, signal.SIGCONT)"));
    assert_eq!(family.waited("os.WCONTINUED"), "[True, ('continued',)]");
    assert_eq!(family.child.ask("2 + 2"), "4");
    family.lab.move_process(family.parent.pid, "n3");
    family.parent.ask(&format!("os.kill({child}, signal.SIGKILL)"));
    assert_eq!(family.waited("0"), "[True, ('killed', 9)]");
}

#[test]
fn the_node_that_gave_it_up_keeps_nothing_and_home_has_the_process_again() {
    let mut family = Family::start("keeps-nothing");
    let pid = family.child.pid;
    for _ in 0..2 {
        family.lab.move_process(pid, "n2");
        family.lab.move_process(pid, "n3");
        empties(&family.lab, "n2");
        family.lab.move_process(pid, "n1");
        empties(&family.lab, "n3");
    }
    let mut left = vec![family.parent.pid, pid];
    left.sort();
    family.lab.until("home has the two processes and nothing else", |_| {
        let mut there = nest_of(&family.lab, "n1");
        there.sort();
        there == left
    });
    assert_eq!(family.child.ask("os.getpid()"), pid.to_string());
    family.child.tell("os._exit(4)");
    assert_eq!(family.waited("0"), "[True, ('exited', 4)]");
}

#[test]
fn it_moves_on_while_its_pages_are_still_elsewhere() {
    let mut family = Family::start("moves-on");
    let pid = family.child.pid;
    family
        .child
        .ask("memory = bytearray(random.Random(5).randbytes(1 << 20) * 256)");
    let digest = "(memory.__setitem__(slice(0, 1 << 20, 4096), bytes(256)), hashlib.sha256(memory).hexdigest())[1]";
    let expected = family.child.ask(digest);
    let mut seen_elsewhere = 0;
    for node in ["n2", "n3", "n1", "n3", "n2", "n1"] {
        family
            .lab
            .move_as(without_waiting(pid, node))
            .unwrap_or_else(|e| panic!("to {node}: {e:#?}"));
        let row = family.lab.process(pid).expect("it runs");
        assert_eq!(row.node, node);
        seen_elsewhere += usize::from(row.pages_elsewhere.values().sum::<u64>() > 0);
        // Some pages become its own on the way.
        assert_eq!(
            family.child.ask("memory[77 << 20]"),
            family.child.ask("memory[77 << 20]")
        );
    }
    assert!(seen_elsewhere > 0, "no move was seen draining");
    assert_eq!(family.child.ask(digest), expected);
    family.lab.until("it is drained", |rows| {
        rows.iter().any(|r| r.pid == pid && r.pages_elsewhere.is_empty())
    });
    assert_eq!(family.child.ask(digest), expected);
    for node in ["n2", "n3"] {
        empties(&family.lab, node);
    }
}

#[test]
fn the_streams_of_a_run_pass_through_while_it_moves() {
    let lab = Lab::up("cat", &Options::default());
    let mut run = lab.node("n1").run(&["cat"]);
    let mut expected = String::new();
    for (i, node) in ["n2", "n3", "n1", "n2"].into_iter().enumerate() {
        let line = format!("line {i}, {}\n", "x".repeat(200_000));
        run.type_in(&line);
        expected += &line;
        lab.move_process(run.pid, node);
        run.until_stdout("all lines", |stdout| stdout == expected);
    }
    run.end_input();
    let ended = run.wait();
    assert_eq!((ended.status, ended.stdout), (ExitStatus::Code(0), expected));
}

#[test]
fn a_run_takes_signals_and_says_how_it_ends_from_where_it_is() {
    let lab = Lab::up("foreground", &Options::default());
    let script = "import signal, sys\n\
        signal.signal(signal.SIGINT, lambda *_: print('interrupted', flush=True))\n\
        print('ready', flush=True)\n\
        for line in sys.stdin: print(line.strip()[::-1], flush=True); print('noted', file=sys.stderr, flush=True)\n\
        sys.exit(3)";
    let mut run = lab.node("n1").run(&["python3", "-c", script]);
    run.until_says("ready\n");
    for (node, word, answer) in [
        ("n2", "two\n", "owt\n"),
        ("n3", "three\n", "eerht\n"),
        ("n1", "one\n", "eno\n"),
    ] {
        lab.move_process(run.pid, node);
        run.type_in(word);
        run.until_says(answer);
    }
    lab.move_process(run.pid, "n2");
    run.signal(2);
    run.until_says("interrupted\n");
    run.end_input();
    let ended = run.wait();
    assert_eq!(
        (ended.status, ended.stderr.as_str()),
        (ExitStatus::Code(3), "noted\nnoted\nnoted\n")
    );
}

#[test]
fn a_run_that_is_killed_elsewhere_says_so() {
    let family = Family::start("run-killed");
    family.lab.move_process(family.parent.pid, "n2");
    family.lab.kill(family.parent.pid, 15);
    let status = family.run.wait().status;
    assert_eq!(
        status,
        ExitStatus::Signal {
            signal: 15,
            core: false
        }
    );
    drop(family.workshop);
}

#[test]
fn a_process_that_is_nowhere_is_not_moved() {
    let lab = Lab::up("nowhere", &Options::default());
    assert!(matches!(
        lab.move_as(request(Pid(64 * 9 + 1), "n2")),
        Err(NotMoved::Failed(_))
    ));
}

/// The kernel reads arguments and environment from the program's memory, and does not wait for a page that is elsewhere.
#[test]
fn its_arguments_and_environment_are_readable_from_its_first_moment_on() {
    let (lab, workshop) = (Lab::up("arguments", &Options::default()), Workshop::new("arguments"));
    let (mut program, _run) = Obedient::start(&lab, &workshop, "one");
    program.ask("big = b'x' * (64 << 20)");
    program.ask("read = lambda: [open('/proc/self/' + f, 'rb').read() for f in ('cmdline', 'environ')]");
    program.ask("words, wrong = read(), []");
    program.ask(
        "watch = lambda: [wrong.append(now) for now in (read() for _ in __import__('itertools').count()) if now != words]",
    );
    program.ask("__import__('threading').Thread(target=watch, daemon=True).start()");
    assert!(program.ask("words[0]").contains("obedient.py"));
    for node in JOURNEY {
        lab.move_process(program.pid, node);
        assert_eq!(program.ask("wrong"), "[]", "on {node}");
    }
}
