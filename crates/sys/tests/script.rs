//! A foothold and scripts in a real program.

use dunlin_sys::foothold::Foothold;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Options, Running, Stop};
use dunlin_sys::script::{Script, ScriptError};
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
