//! A foothold and scripts in a real program.

use dunlin_sys::batch::Batch;
use dunlin_sys::foothold::Foothold;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Options, Registers, Running, Stop, Stopped};
use dunlin_sys::refuge::{Others, Refuge};
use dunlin_sys::script::{Held, NOTE_WORDS, Script, ScriptError};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Target(Child);

impl Target {
    fn sleep() -> Target {
        Target(Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.0.kill();
        // The first thread has ended when the others have been waited for, each by its tracer.
        for tid in ProcDir::process(self.pid()).threads().unwrap_or_default() {
            if tid != self.pid() {
                let _ = Running::announced(tid).wait();
            }
        }
        let _ = self.0.wait();
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

#[test]
fn a_script_runs_and_leaves_no_trace() {
    let target = Target::sleep();
    let dir = ProcDir::process(target.pid());
    // exec is over when the name has changed.
    while dir.text("comm").unwrap().trim() != "sleep" || dir.status().unwrap().state != 'S' {}
    let (thread, stop) = Running::seize(target.pid(), Options::default())
        .unwrap()
        .stop(soon())
        .unwrap();
    assert_eq!(stop, Stop::Interrupt);
    thread.set_signal_mask(!(1 << (libc::SIGTRAP - 1))).unwrap();
    let (thread, foothold) = Foothold::plant(thread, target.pid(), &[]).unwrap();

    let mut script = Script::new(&foothold.arena);
    let pid = script.call("getpid", libc::SYS_getpid, &[]);
    let buffer = script.space(512);
    let cwd = script.call("getcwd", libc::SYS_getcwd, &[buffer.address, 512]);
    let failed = script.attempt("close", libc::SYS_close, &[999]);
    let (thread, answers) = script.run(thread).unwrap();
    assert_eq!(answers.of(pid), i64::from(target.pid()));
    assert_eq!(answers.of(failed), -i64::from(libc::EBADF));
    let length = answers.of(cwd) as usize;
    let here = std::env::current_dir().unwrap();
    assert_eq!(
        &answers.bytes(buffer)[..length - 1],
        here.as_os_str().as_encoded_bytes()
    );

    let mut script = Script::new(&foothold.arena);
    script.call("close", libc::SYS_close, &[998]);
    script.call("getpid", libc::SYS_getpid, &[]);
    match script.run(thread) {
        Err(ScriptError::Call {
            name: "close",
            index: 0,
            errno,
        }) => assert_eq!(errno.0, libc::EBADF),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_foothold_can_be_uprooted_and_the_program_goes_on() {
    let target = Target::sleep();
    let dir = ProcDir::process(target.pid());
    while dir.text("comm").unwrap().trim() != "sleep" || dir.status().unwrap().state != 'S' {}
    let maps = dir.text("maps").unwrap();
    let descriptors = dir.numbers("fd").unwrap();
    let (thread, _) = Running::seize(target.pid(), Options::default())
        .unwrap()
        .stop(soon())
        .unwrap();
    let before = thread.registers().unwrap();
    let mask = thread.signal_mask().unwrap();
    thread.set_signal_mask(!(1 << (libc::SIGTRAP - 1))).unwrap();
    let (thread, foothold) = Foothold::plant(thread, target.pid(), &[]).unwrap();
    let thread = foothold.uproot(thread).unwrap();
    thread.set_signal_mask(mask).unwrap();
    let after = thread.registers().unwrap();
    assert_eq!(
        (before.rip, before.rsp, before.rax, before.orig_rax),
        (after.rip, after.rsp, after.rax, after.orig_rax)
    );
    thread.detach(0).unwrap();
    while dir.status().unwrap().state != 'S' {}
    assert_eq!(dir.text("maps").unwrap(), maps);
    assert_eq!(dir.numbers("fd").unwrap(), descriptors);
}

/// ptrace is bound to threads: one that ends leaves its tracees as a killed process does.
#[test]
fn a_thread_whose_tracer_dies_in_a_script_waits_and_can_be_put_back() {
    let target = Target::sleep();
    let pid = target.pid();
    let dir = ProcDir::process(pid);
    while dir.text("comm").unwrap().trim() != "sleep" || dir.status().unwrap().state != 'S' {}
    assert!(Foothold::find(pid).unwrap().is_none());
    let maps = dir.text("maps").unwrap();
    let before = std::thread::spawn(move || {
        let (thread, _) = Running::seize(pid, Options::default()).unwrap().stop(soon()).unwrap();
        let held = Held {
            tid: pid,
            mask: thread.signal_mask().unwrap(),
            registers: thread.registers().unwrap(),
        };
        thread.set_signal_mask(!(1 << (libc::SIGTRAP - 1))).unwrap();
        let (thread, foothold) = Foothold::plant(thread, pid, &[]).unwrap();
        foothold.arena.hold(0, &held);
        foothold.arena.note([7; NOTE_WORDS]);
        let mut script = Script::new(&foothold.arena);
        script.call("getpid", libc::SYS_getpid, &[]);
        script.start(&thread).unwrap();
        thread.resume(0).unwrap();
        held
    })
    .join()
    .unwrap();
    let foothold = Foothold::find(pid).unwrap().unwrap();
    assert_eq!(foothold.arena.noted(), [7; NOTE_WORDS]);
    let [held] = foothold.arena.held()[..] else { panic!() };
    assert_eq!((held.tid, held.mask), (pid, before.mask));
    assert_eq!(held.registers.rip, before.registers.rip);
    while !dir.text("syscall").unwrap().starts_with("34 ") {}
    let (thread, _) = Running::seize(pid, Options::default()).unwrap().stop(soon()).unwrap();
    let now = thread.registers().unwrap();
    assert!(foothold.arena.has(now.rip, now.rsp));
    // In a call from which it would come there, too.
    assert!(foothold.arena.has(foothold.syscall_at, foothold.arena.landing()));
    assert!(!foothold.arena.has(foothold.syscall_at, before.registers.rsp));
    let thread = foothold.uproot(thread).unwrap();
    thread.set_registers(&held.registers).unwrap();
    thread.set_signal_mask(held.mask).unwrap();
    thread.detach(0).unwrap();
    // It sleeps again, by restart_syscall(2).
    while !dir.text("syscall").unwrap().starts_with("219 ") {}
    assert_eq!(dir.text("maps").unwrap(), maps);
}

#[test]
fn a_thread_whose_tracer_dies_in_an_injected_call_spins_and_can_be_put_back() {
    // A program that has the instruction: most libraries do.
    let target = Target(
        Command::new("python3")
            .args(["-c", "import time; time.sleep(1000)"])
            .spawn()
            .unwrap(),
    );
    let pid = target.pid();
    let dir = ProcDir::process(pid);
    let asleep = |number: &str| {
        let deadline = soon();
        while !dir.text("syscall").unwrap().starts_with(number) {
            assert!(Instant::now() < deadline, "{}", dir.text("syscall").unwrap());
        }
    };
    asleep("230 ");
    let before = std::thread::spawn(move || {
        let at = dunlin_sys::foothold::syscall_instruction(&ProcDir::process(pid)).unwrap();
        let refuge = Refuge::find(pid, at).unwrap().unwrap();
        let (thread, _) = Running::seize(pid, Options::default()).unwrap().stop(soon()).unwrap();
        let held = Held {
            tid: pid,
            mask: thread.signal_mask().unwrap(),
            registers: thread.registers().unwrap(),
        };
        thread.set_signal_mask(!(1 << (libc::SIGTRAP - 1))).unwrap();
        refuge.enter(&thread, pid, &held, Others::Run).unwrap();
        let (thread, answer) = thread.inject(at, libc::SYS_getpid, [0; 6]).unwrap();
        assert_eq!(answer, i64::from(pid));
        // As if it had died between the call and what comes after it.
        let waits = thread.registers().unwrap();
        let call = Registers {
            rip: at,
            rax: libc::SYS_getpid as u64,
            ..waits
        };
        thread.set_registers(&call).unwrap();
        held
    })
    .join()
    .unwrap();
    // It runs from the moment in which it is let go; in the refuge it is when the call is over.
    let deadline = soon();
    let (thread, held) = loop {
        let (thread, _) = Running::seize(pid, Options::default()).unwrap().stop(soon()).unwrap();
        if let Some(held) = Refuge::escaped(&thread, pid).unwrap() {
            break (thread, held);
        }
        assert!(Instant::now() < deadline, "it is not in its refuge");
        thread.detach(0).unwrap();
    };
    assert_eq!((held.mask, held.words()), (before.mask, before.words()));
    thread.set_registers(&held.registers).unwrap();
    thread.set_signal_mask(held.mask).unwrap();
    assert!(Refuge::escaped(&thread, pid).unwrap().is_none());
    thread.detach(0).unwrap();
    // It sleeps until a fixed time: the kernel makes the same call again.
    asleep("230 ");
}

const THREADS: usize = 7;

/// A program of several threads that sleep, all stopped and ready for scripts, the first one first.
fn stopped_crowd() -> (Target, Vec<i32>) {
    let program = format!(
        "import threading, time\nfor _ in range({THREADS} - 1): threading.Thread(target=time.sleep, args=(1000,)).start()\ntime.sleep(1000)"
    );
    let target = Target(Command::new("python3").args(["-c", &program]).spawn().unwrap());
    let dir = ProcDir::process(target.pid());
    let asleep = |tid: &i32| {
        let thread = ProcDir::thread(target.pid(), *tid);
        thread.text("syscall").unwrap_or_default().starts_with("230 ")
    };
    let tids = loop {
        let tids = dir.threads().unwrap();
        if tids.len() == THREADS && tids.iter().all(asleep) {
            break tids;
        }
    };
    for tid in &tids {
        let (thread, _) = Running::seize(*tid, Options::default()).unwrap().stop(soon()).unwrap();
        thread.set_signal_mask(!(1 << (libc::SIGTRAP - 1))).unwrap();
    }
    (target, tids)
}

#[test]
fn threads_run_their_scripts_at_once_and_have_their_registers_again() {
    let (target, tids) = stopped_crowd();
    let (_, foothold) = Foothold::plant(Stopped::assume(tids[0]), target.pid(), &[]).unwrap();
    let registers = |tid: i32| Stopped::assume(tid).registers().unwrap();
    let before: Vec<Registers> = tids.iter().map(|tid| registers(*tid)).collect();
    // Twice: the second time over what the first has left.
    for wanted in [1, THREADS] {
        let mut batch = Batch::new(&foothold.arena);
        let mut asked = Vec::new();
        for tid in &tids[..wanted] {
            let script = batch.lane(*tid);
            asked.push((script.call("gettid", libc::SYS_gettid, &[]), script.space(8)));
        }
        let (answers, beside) = batch.run_beside(|| 42);
        let answers = answers.unwrap();
        let told: Vec<i64> = asked.iter().map(|(call, _)| answers.of(*call)).collect();
        let own: Vec<i64> = tids[..wanted].iter().map(|tid| i64::from(*tid)).collect();
        assert_eq!((told, beside), (own, 42));
    }
    for (tid, before) in tids.iter().zip(&before) {
        let now = registers(*tid);
        assert_eq!(
            (now.rip, now.rsp, now.r12, now.r14),
            (before.rip, before.rsp, before.r12, before.r14)
        );
    }
}

#[test]
fn one_thread_that_fails_leaves_all_stopped_and_as_they_were() {
    let (target, tids) = stopped_crowd();
    let (_, foothold) = Foothold::plant(Stopped::assume(tids[0]), target.pid(), &[]).unwrap();
    let before = Stopped::assume(tids[3]).registers().unwrap();
    let mut batch = Batch::new(&foothold.arena);
    for (index, tid) in tids.iter().enumerate() {
        let script = batch.lane(*tid);
        script.call("gettid", libc::SYS_gettid, &[]);
        if index == 3 {
            script.call("close", libc::SYS_close, &[998]);
        }
        script.call("getpid", libc::SYS_getpid, &[]);
    }
    match batch.run() {
        Err(ScriptError::Call {
            name: "close", errno, ..
        }) => assert_eq!(errno.0, libc::EBADF),
        other => panic!("{other:?}"),
    }
    let now = Stopped::assume(tids[3]).registers().unwrap();
    assert_eq!((now.rip, now.r12), (before.rip, before.r12));
    for tid in &tids {
        assert!(Stopped::assume(*tid).registers().is_ok(), "thread {tid} is not stopped");
    }
}
