//! Children of init: programs that `dunlin run` starts, and surrogates.
//!
//! Owns the translation of a request into a child. Refuses to know PIDs beyond asking [`Steering`] for them. A child
//! that could not become its program has ended and is reaped here: nobody hears of its PID.

use super::steer::Steering;
use crate::nest::wire::{Answer, MakeSurrogate, Spawn};
use dunlin_proto::ids::Pid;
use dunlin_sys::spawn::{self, Child, Owner, Program, Started, Step};
use rustix::io::Errno;
use rustix::process::WaitOptions;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Where programs are looked for when their environment has no PATH.
const DEFAULT_PATH: &[u8] = b"/usr/local/bin:/usr/bin:/bin";

/// What children get that init has changed for itself.
#[derive(Debug)]
pub struct Defaults {
    /// oom_score_adj.
    pub oom_score_adj: i32,
    /// RLIMIT_NOFILE, soft and hard.
    pub open_files: (u64, u64),
}

/// Starts a program.
pub fn program(spec: &Spawn, stdio: &[OwnedFd], steering: &Steering, cookie: u64, defaults: &Defaults) -> Answer {
    try_program(spec, stdio, steering, cookie, defaults).unwrap_or_else(|answer| answer)
}

fn try_program(
    spec: &Spawn,
    stdio: &[OwnedFd],
    steering: &Steering,
    cookie: u64,
    defaults: &Defaults,
) -> Result<Answer, Answer> {
    let invalid = |what: &str| failed(what, &Errno::INVAL.into());
    let [stdin, stdout, stderr] = stdio else {
        return Err(invalid("three descriptors"));
    };
    // Received descriptors are above 2 because init's own are open.
    let stdio = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
    let strings = |list: &[Vec<u8>]| -> Option<Vec<CString>> {
        let strings = list.iter().map(|s| CString::new(s.as_slice()).ok());
        strings.collect()
    };
    let argv = strings(&spec.argv).ok_or_else(|| invalid("arguments"))?;
    let env = strings(&spec.env).ok_or_else(|| invalid("environment"))?;
    let cwd = CString::new(spec.cwd.as_slice()).map_err(|_| invalid("working directory"))?;
    let name = argv.first().ok_or_else(|| invalid("arguments"))?;
    let path = spec.env.iter().find_map(|e| e.strip_prefix(b"PATH="));
    let paths = spawn::candidates(name, path.unwrap_or(DEFAULT_PATH));
    let child = Child {
        program: Program::Paths(&paths),
        argv: &argv,
        env: &env,
        cwd: Some(&cwd),
        umask: Some(spec.umask),
        owner: Some(Owner {
            uid: spec.uid,
            gid: spec.gid,
            groups: &spec.groups,
        }),
        stdio: Some(stdio),
        session: true,
        controlling_tty: spec.controlling_tty,
        group: None,
        signals_blocked: false,
        oom_score_adj: Some(defaults.oom_score_adj),
        open_files: Some(defaults.open_files),
    };
    let name = String::from_utf8_lossy(name.to_bytes());
    match start(&child, None, steering, cookie) {
        Ok(pid) => Ok(Answer::Started(pid)),
        Err((Some(Step::Exec), error)) => Err(Answer::NotExecuted {
            program: name.into_owned(),
            errno: errno(&error),
        }),
        Err((step, error)) => Err(failed(format!("{name}: {}", describe(step)), &error)),
    }
}

/// Makes a surrogate.
pub fn surrogate(
    spec: &MakeSurrogate,
    program: &OwnedFd,
    steering: &Steering,
    cookie: u64,
    defaults: &Defaults,
) -> Answer {
    let Ok(comm) = CString::new(spec.comm.as_slice()) else {
        return failed("name", &Errno::INVAL.into());
    };
    let argv = [comm];
    // Its own PID as group is asked for with 0: before it exists it cannot be named.
    let group = spec.group.map(|g| if g == spec.pid { 0 } else { g.0 });
    let child = Child {
        program: Program::File(program.as_fd()),
        argv: &argv,
        env: &[],
        cwd: None,
        umask: None,
        owner: spec.owner.map(|(uid, gid)| Owner { uid, gid, groups: &[] }),
        stdio: None,
        session: spec.session,
        controlling_tty: false,
        group: if spec.session { None } else { group },
        signals_blocked: true,
        oom_score_adj: Some(defaults.oom_score_adj),
        open_files: Some(defaults.open_files),
    };
    match start(&child, Some(spec.pid), steering, cookie) {
        Ok(_) => Answer::Done,
        Err((step, error)) => failed(format!("surrogate {}: {}", spec.pid, describe(step)), &error),
    }
}

fn start(
    child: &Child<'_>,
    pid: Option<Pid>,
    steering: &Steering,
    cookie: u64,
) -> Result<Pid, (Option<Step>, io::Error)> {
    let made = steering.make(pid, || {
        let started = spawn::start(child, cookie)?;
        Ok((Pid(started.pid), started))
    });
    let (got, started): (Pid, Started) = made.map_err(|e| (None, e))?;
    if pid.is_some_and(|wanted| wanted != got) {
        let _ = spawn::kill(got.0, 9, cookie);
        let _ = rustix::process::waitpid(rustix::process::Pid::from_raw(got.0), WaitOptions::empty());
        return Err((None, Errno::EXIST.into()));
    }
    match started.executed() {
        Ok(()) => Ok(got),
        Err((step, error)) => {
            let _ = rustix::process::waitpid(rustix::process::Pid::from_raw(got.0), WaitOptions::empty());
            Err((Some(step), error))
        }
    }
}

fn describe(step: Option<Step>) -> &'static str {
    step.map_or("making a process", Step::name)
}

fn failed(what: impl Into<String>, error: &io::Error) -> Answer {
    Answer::Failed {
        what: what.into(),
        errno: errno(error),
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(Errno::IO.raw_os_error())
}
