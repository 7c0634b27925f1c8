//! Stopping a program that executes itself again and again.

use dunlin_sys::foothold::syscall_instruction;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Event, Options, Running, Stop, Stopped};
use dunlin_sys::refuge::Refuge;
use std::fs::File;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A shell that does nothing but execute itself.
struct Restless(Child);

impl Restless {
    fn start() -> Restless {
        let again = r#"exec sh -c "$0" "$0""#;
        let child = Command::new("sh")
            .args(["-c", again, again])
            .stdin(Stdio::null())
            .spawn();
        Restless(child.unwrap())
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Restless {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// Any stop of a thread takes the place of one that was asked for before it: an exec is over when it stops.
#[test]
fn a_stop_is_had_whatever_else_comes_first() {
    const STOPS: usize = 200;
    let target = Restless::start();
    let mut running = Running::seize(target.pid(), Options::default()).unwrap();
    for _ in 0..STOPS {
        let (stopped, stop) = running.stop(soon()).unwrap();
        assert_eq!(stop, Stop::Interrupt);
        running = stopped.resume(0).unwrap();
    }
}

#[test]
fn the_next_program_has_no_refuge_of_the_last_one() {
    let target = Restless::start();
    let dir = ProcDir::process(target.pid());
    let running = Running::seize(target.pid(), Options::default()).unwrap();
    let (stopped, _) = running.stop(soon()).unwrap();
    let refuge = Refuge::find(target.pid(), syscall_instruction(&dir).unwrap());
    let refuge = refuge.unwrap().unwrap();
    assert!(refuge.is_in(&File::open(dir.path("mem")).unwrap()));
    until_exec(stopped);
    assert!(!refuge.is_in(&File::open(dir.path("mem")).unwrap()));
}

fn until_exec(stopped: Stopped) {
    let mut running = stopped.resume(0).unwrap();
    loop {
        running = match running.wait().unwrap() {
            Event::Stopped(_, Stop::Exec) => return,
            Event::Stopped(stopped, Stop::Signal(signal)) => stopped.resume(signal).unwrap(),
            Event::Stopped(stopped, _) => stopped.resume(0).unwrap(),
            Event::Ended(status) => panic!("it has ended: {status:#x}"),
        };
    }
}
