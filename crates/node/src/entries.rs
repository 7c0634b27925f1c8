//! Table entries of the nest's kernel: surrogates found, made and ended.
//!
//! Owns how a PID that stands for somebody else comes to be in this nest with the right parent, group and session, and
//! how it ends as the process it stands for did. Refuses to know why. Invariants: a surrogate is registered with init
//! and hidden before it can be seen; one that is made to do calls is a surrogate still if this daemon dies meanwhile.
//!
//! A surrogate under another entry is made by that entry itself: an injected clone(2) that shares the maker's memory
//! for the moment, and the surrogate program executed by the child.

use crate::capture::SCRIPT_MASK;
use crate::capture::freeze::LeftBehind;
use crate::install::{Installer, Wanted};
use crate::nest::{Nest, SurrogateSpec};
use crate::privileges;
use crate::processes::{Hidden, HiddenKind};
use crate::signals::orders::{self, settle_stop};
use crate::signals::surrogates::own_continuation;
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{Child, Lineage};
use dunlin_sys::foothold::{Foothold, syscall_instruction};
use dunlin_sys::procfs::fdinfo::FdInfo;
use dunlin_sys::procfs::{ProcDir, maps};
use dunlin_sys::ptrace::{Options, Running, Stopped, TraceError};
use dunlin_sys::surrogate;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

const SYS_CLONE: i64 = 56;
const SYS_SETPGID: i64 = 109;
const SYS_SETSID: i64 = 112;
const SYS_RT_SIGACTION: i64 = 13;
const SYS_EXIT_GROUP: i64 = 231;
const SYS_EXECVEAT: i64 = 322;
const SYS_CLOSE_RANGE: i64 = 436;
const AT_EMPTY_PATH: u64 = 0x1000;
const CLONE_VM: u64 = 0x100;
const SIGCHLD: u64 = 17;
const SIGCONT: i32 = 18;
const INIT: Pid = Pid(1);
/// No move that prepares goes on longer than this.
const LONGEST_MOVE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(2);
/// Tasks that are being ended have been reaped by then.
const FREE_WITHIN: Duration = Duration::from_millis(500);

/// The surrogates of one nest.
pub struct Entries {
    nest: Nest,
    hidden: Arc<Hidden>,
    installer: Arc<Installer>,
    /// This daemon's nonce.
    boot: u64,
}

/// A place that a process can be restored into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its number on this machine.
    pub host: i32,
    /// It stands for the process since before: it must stay if the restore fails.
    pub stood_before: bool,
}

impl Entries {
    /// The surrogates of this nest.
    pub fn new(nest: Nest, hidden: Arc<Hidden>, installer: Arc<Installer>, boot: u64) -> Entries {
        Entries {
            nest,
            hidden,
            installer,
            boot,
        }
    }

    /// The place for a process that arrives: its surrogate if it has one, otherwise a new blank under its parent's entry.
    pub fn place(&self, lineage: &Lineage) -> io::Result<Place> {
        if let Some(host) = self.present(lineage.pid)? {
            return match self.hidden.kind(lineage.pid) {
                Some(HiddenKind::Departed | HiddenKind::Relative) => Ok(Place {
                    host,
                    stood_before: true,
                }),
                Some(HiddenKind::Blank | HiddenKind::Keeper | HiddenKind::Leaving) | None => {
                    Err(io::Error::other(format!("PID {} is in use here", lineage.pid)))
                }
            };
        }
        self.hidden.insert(lineage.pid, HiddenKind::Blank);
        let made = once_free(|| self.make_blank(lineage));
        if made.is_err() {
            self.hidden.remove(lineage.pid);
        }
        Ok(Place {
            host: made?,
            stood_before: false,
        })
    }

    fn make_blank(&self, lineage: &Lineage) -> io::Result<i32> {
        let leads = lineage.sid == lineage.pid;
        let own_group = lineage.pgid == lineage.pid;
        if lineage.ppid == INIT && (leads || self.nest.host_pid(lineage.sid)?.is_none()) {
            let group = (own_group && !leads).then_some(lineage.pid);
            return self.make_under_init(lineage.pid, leads, group, b"dunlin-blank");
        }
        let maker = match lineage.ppid {
            INIT => self.relative(lineage.sid, lineage.sid)?,
            parent => self.relative(parent, lineage.sid)?,
        };
        if !leads && !own_group && self.nest.host_pid(lineage.pgid)?.is_none() {
            // The group's leader may have ended long ago at home: here somebody must hold the number.
            let session = self.relative(lineage.sid, lineage.sid)?;
            self.hidden.insert(lineage.pgid, HiddenKind::Relative);
            let made = self.make_under(session, lineage.pgid, Manner::Group(lineage.pgid), b"dunlin-group");
            if made.is_err() {
                self.hidden.remove(lineage.pgid);
            }
            made?;
        }
        let manner = match (leads, own_group) {
            (true, _) => Manner::Session,
            (false, true) => Manner::Group(lineage.pid),
            (false, false) => Manner::Group(lineage.pgid),
        };
        self.make_under(maker, lineage.pid, manner, b"dunlin-blank")
    }

    /// Turns the emptied process of a committed move into its own surrogate.
    pub fn stay(&self, left: LeftBehind, pid: Pid, host: i32, comm: &[u8]) -> io::Result<()> {
        let (thread, at, place) = left.into_parts();
        let thread = privileges::regain(thread, at, place)?;
        self.execute(thread, pid, at, place, &ProcDir::process(host), comm)
    }

    /// Turns a place whose restore came to nothing, at whatever step, into the surrogate that it had been. It is stopped,
    /// and traced by this thread; or it has ended, with the process at its home, or been killed: then nothing is to be done.
    pub fn stand_again(&self, pid: Pid, host: i32, comm: &[u8]) -> io::Result<()> {
        let done = self.stand(pid, host, comm);
        let stat = ProcDir::process(host).stat();
        let has_ended = stat.map_or(true, |stat| matches!(stat.state, 'Z' | 'X'));
        done.or_else(|error| if has_ended { Ok(()) } else { Err(error) })
    }

    fn stand(&self, pid: Pid, host: i32, comm: &[u8]) -> io::Result<()> {
        let dir = ProcDir::process(host);
        let at = syscall_instruction(&dir).map_err(other)?;
        let mappings = maps::parse(&dir.bytes("maps")?)?;
        // Our arena; before that is there, the program is one that has not run: its stack or data.
        let arena = mappings.iter().find(|m| m.write && Foothold::is_arena(m));
        let writable = arena.or_else(|| mappings.iter().find(|m| m.write && !m.shared));
        let writable = writable.ok_or_else(|| io::Error::other(format!("process {pid} has no memory to write to")))?;
        let all = [0, u64::from(u32::MAX), 0, 0, 0, 0];
        // The exec waits for the end of the other threads, and they wait to be let go.
        for tid in dir.threads()?.into_iter().filter(|tid| *tid != host) {
            let _ = Stopped::assume(tid).detach(0);
        }
        let thread = Stopped::assume(host);
        thread.set_signal_mask(SCRIPT_MASK).map_err(other)?;
        if arena.is_none() {
            surrogate::secure(&thread, host)?;
        }
        let thread = hush(thread, at, &dir)?;
        let (thread, _) = thread.inject(at, SYS_CLOSE_RANGE, all).map_err(other)?;
        // The exec ends its other threads, which wait in the loop, and waits until they are gone: of one that is traced,
        // until its tracer, which waits for the exec, has seen its end.
        for tid in dir.threads()?.into_iter().filter(|tid| *tid != host) {
            let _ = Stopped::assume(tid).detach(0);
        }
        let place = writable.end - 64;
        let thread = privileges::regain(thread, at, place)?;
        self.execute(thread, pid, at, place, &dir, comm)
    }

    /// The task that has this number here, once one that is about to end has ended.
    fn present(&self, pid: Pid) -> io::Result<Option<i32>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let host = self.nest.host_pid(pid)?;
            let leaving = host.is_some() && self.hidden.kind(pid) == Some(HiddenKind::Leaving);
            if !leaving || Instant::now() >= deadline {
                return Ok(host);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The entry of a relative that lives elsewhere (or here, where it does): made if there is none.
    fn relative(&self, pid: Pid, sid: Pid) -> io::Result<i32> {
        if let Some(host) = self.present(pid)? {
            return Ok(host);
        }
        self.hidden.insert(pid, HiddenKind::Relative);
        let made = if sid == pid || sid.0 <= 1 {
            self.make_under_init(pid, sid == pid, None, b"dunlin-relative")
        } else {
            let leader = self.relative(sid, sid)?;
            self.make_under(leader, pid, Manner::AsMaker, b"dunlin-relative")
        };
        if made.is_err() {
            self.hidden.remove(pid);
        }
        made
    }

    fn make_under_init(&self, pid: Pid, session: bool, group: Option<Pid>, comm: &[u8]) -> io::Result<i32> {
        self.nest.make_surrogate(SurrogateSpec {
            pid,
            comm: comm.to_vec(),
            session,
            group,
            owner: None,
        })?;
        self.nest
            .host_pid(pid)?
            .ok_or_else(|| io::Error::other(format!("the surrogate {pid} is gone already")))
    }

    /// Makes a surrogate as a child of another entry.
    fn make_under(&self, maker: i32, pid: Pid, manner: Manner, comm: &[u8]) -> io::Result<i32> {
        let running = Running::seize(
            maker,
            Options {
                follow: true,
                ..Options::default()
            },
        )
        .map_err(other)?;
        let (thread, _) = running.stop(Instant::now() + PATIENCE).map_err(other)?;
        let mask = thread.signal_mask().map_err(other)?;
        thread.set_signal_mask(SCRIPT_MASK).map_err(other)?;
        let before = surrogate::secure(&thread, maker)?;
        let made = self.child_of(thread, (maker, None), pid, manner, comm);
        let thread = Stopped::assume(maker);
        before
            .map_or(Ok(()), |before| thread.set_registers(&before))
            .and_then(|()| thread.set_signal_mask(mask))
            .and_then(|()| thread.detach(0))
            .map_err(other)?;
        made
    }

    /// Makes a surrogate as a child of a process that this OS thread traces and has stopped.
    fn child_of(
        &self,
        thread: Stopped,
        (maker, place): (i32, Option<u64>),
        pid: Pid,
        manner: Manner,
        comm: &[u8],
    ) -> io::Result<i32> {
        let dir = ProcDir::process(maker);
        let at = syscall_instruction(&dir).map_err(other)?;
        let guard = self.nest.steer(pid)?;
        let arguments = [CLONE_VM | SIGCHLD, 0, 0, 0, 0, self.nest.cookie()];
        let secured = match surrogate::is_one(maker) {
            true => Some(surrogate::secure_for_clone(&thread)?),
            false => None,
        };
        let (thread, answer, child) = thread.inject_clone(at, SYS_CLONE, arguments).map_err(other)?;
        if let Some(secured) = secured {
            thread.set_registers(&secured).map_err(other)?;
        }
        let _ = guard.finish()?;
        let Some(child) = child.filter(|_| answer == i64::from(pid.0)) else {
            return Err(io::Error::other(format!(
                "the surrogate for {pid} came out as {answer}"
            )));
        };
        let host = child.tid();
        let below_stack = (thread.registers().map_err(other)?.rsp - 2048) & !15;
        let place = place.unwrap_or(below_stack);
        let became = self.become_surrogate(child, pid, at, place, &dir, manner, comm);
        if became.is_err()
            && let Some(host) = rustix::process::Pid::from_raw(host)
        {
            let _ = rustix::process::kill_process(host, rustix::process::Signal::KILL);
        }
        became.map(|()| host)
    }

    #[allow(clippy::too_many_arguments)] // the steps of one manoeuvre
    fn become_surrogate(
        &self,
        child: Stopped,
        pid: Pid,
        at: u64,
        place: u64,
        maker: &ProcDir,
        manner: Manner,
        comm: &[u8],
    ) -> io::Result<()> {
        if surrogate::is_one(child.tid()) {
            surrogate::secure_child(&child)?;
        }
        child.set_signal_mask(u64::MAX).map_err(other)?;
        let child = match manner {
            Manner::AsMaker => child,
            Manner::Session => child.inject(at, SYS_SETSID, [0; 6]).map_err(other)?.0,
            Manner::Group(group) => {
                child
                    .inject(at, SYS_SETPGID, [0, group.0 as u64, 0, 0, 0, 0])
                    .map_err(other)?
                    .0
            }
        };
        let all = [0, u64::from(u32::MAX), 0, 0, 0, 0];
        let child = child.inject(at, SYS_CLOSE_RANGE, all).map_err(other)?.0;
        self.execute(child, pid, at, place, maker, comm)
    }

    /// Has a stopped task execute the surrogate program and lets it go. `place` is memory (of the process whose
    /// directory is given) that may be overwritten: 64 bytes.
    pub fn execute(
        &self,
        thread: Stopped,
        pid: Pid,
        at: u64,
        place: u64,
        memory: &ProcDir,
        comm: &[u8],
    ) -> io::Result<()> {
        self.nest.register_surrogate(pid)?;
        let program = self.nest.surrogate_program().try_clone_to_owned()?;
        let wanted = vec![Wanted {
            fd: program,
            number: 3,
            close_on_exec: true,
        }];
        let options = Options {
            suspend_seccomp: true,
            follow: true,
            ..Options::default()
        };
        let thread = self
            .installer
            .install(thread, at, pid, wanted, options)
            .map_err(other)?;
        // An empty string, a name, and an argument vector of that name.
        let mut words = [0u8; 64];
        words[..8].copy_from_slice(&(place + 32).to_le_bytes());
        let name = &comm[..comm.len().min(15)];
        words[32..32 + name.len()].copy_from_slice(name);
        OpenOptions::new()
            .write(true)
            .open(memory.path("mem"))?
            .write_all_at(&words, place)?;
        let arguments = [3, place + 16, place, 0, AT_EMPTY_PATH, 0];
        let (thread, executed) = thread.inject_exec(at, SYS_EXECVEAT, arguments).map_err(other)?;
        executed?;
        thread.set_signal_mask(u64::MAX).map_err(other)?;
        thread.detach(0).map_err(other)
    }

    /// Makes the surrogates of the children that a process left behind, under its blank, which this OS thread traces and
    /// has stopped; those that are there already are made what they were where it was. `place` is memory of it that may be
    /// overwritten.
    pub fn children(&self, maker: i32, place: u64, children: &[Child]) -> io::Result<()> {
        for child in children {
            if self.hidden.kind(child.pid) == Some(HiddenKind::Keeper) {
                continue;
            }
            if self.present(child.pid)?.is_some() {
                self.agree(child)?;
                continue;
            }
            self.hidden.insert(child.pid, HiddenKind::Relative);
            let manner = if child.sid == child.pid {
                Manner::Session
            } else if child.pgid == child.pid {
                Manner::Group(child.pgid)
            } else {
                Manner::AsMaker
            };
            self.child_of(
                Stopped::assume(maker),
                (maker, Some(place)),
                child.pid,
                manner,
                &child.comm,
            )?;
            self.agree(child)?;
            if let Some(stop) = &child.stop {
                self.send_all(child.pid, &stop.pending);
            }
        }
        Ok(())
    }

    /// Has what stands for a child be stopped, run on or end as its parent last knew the child where that was. What
    /// somebody here has done to it meanwhile is news, and stays; so does a child that is here itself.
    fn agree(&self, child: &Child) -> io::Result<()> {
        let (pid, kind) = (child.pid, self.hidden.kind(child.pid));
        let stands = matches!(kind, Some(HiddenKind::Departed | HiddenKind::Relative));
        let (Some(job), Some(host)) = (self.hidden.job(pid).filter(|_| stands), self.nest.host_pid(pid)?) else {
            return Ok(());
        };
        if let Some(status) = child.ended {
            return self.end(pid, crate::processes::exits::decode(status));
        }
        let mut job = job.lock().unwrap_or_else(PoisonError::into_inner);
        if orders::is_stopped(host) != Some(job.stopped) {
            return Ok(());
        }
        let process = rustix::process::Pid::from_raw(host).ok_or(io::ErrorKind::InvalidInput)?;
        let stop = || -> io::Result<()> {
            rustix::process::kill_process(process, rustix::process::Signal::STOP)?;
            settle_stop(host);
            Ok(())
        };
        let go_on = || self.nest.signal(pid, SIGCONT, &own_continuation(self.boot)).map(drop);
        match &child.stop {
            Some(told) if !job.stopped => {
                job.stopped = !told.unsaid;
                stop()
            }
            None if job.stopped => {
                job.stopped = false;
                go_on()
            }
            // A continuation that the parent can still wait for.
            None if child.continued => stop().and_then(|()| go_on()),
            Some(_) | None => Ok(()),
        }
    }

    /// Sends a task of the nest signals with their payload.
    pub fn send_all(&self, pid: Pid, signals: &[Vec<u8>]) {
        for info in signals {
            let Ok(info) = <&[u8; 128]>::try_from(&info[..]) else {
                continue;
            };
            let signal = i32::from_le_bytes([info[0], info[1], info[2], info[3]]);
            if let Err(error) = self.nest.signal(pid, signal, info) {
                tracing::warn!(%pid, signal, %error, "a signal is lost");
            }
        }
    }

    /// Ends a surrogate as the process it stands for has ended, so that its parent's wait(2) says so. Waits while a move
    /// that cannot succeed any more makes a process of it: only one can trace it.
    pub fn end(&self, pid: Pid, status: ExitStatus) -> io::Result<()> {
        let deadline = Instant::now() + LONGEST_MOVE;
        loop {
            match self.end_now(pid, status) {
                Err(error) if is_traced(&error) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                done => return done,
            }
        }
    }

    fn end_now(&self, pid: Pid, status: ExitStatus) -> io::Result<()> {
        let Some(host) = self.nest.host_pid(pid)? else {
            return Ok(());
        };
        let Some(kind) = self.hidden.kind(pid) else {
            return Err(io::Error::other(format!("process {pid} is not a surrogate")));
        };
        if kind == HiddenKind::Leaving {
            return Ok(());
        }
        // Before it ends: its end is news to nobody but its parent here.
        self.hidden.insert(pid, HiddenKind::Leaving);
        let ended = self.end_as(host, status);
        if ended.is_err() {
            self.hidden.insert(pid, kind);
        }
        ended
    }

    fn end_as(&self, host: i32, status: ExitStatus) -> io::Result<()> {
        let running = Running::seize(
            host,
            Options {
                suspend_seccomp: true,
                ..Options::default()
            },
        )
        .map_err(other)?;
        let (thread, _) = running.stop(Instant::now() + PATIENCE).map_err(other)?;
        let at = syscall_instruction(&ProcDir::process(host)).map_err(other)?;
        let code = match status {
            ExitStatus::Code(code) => code,
            ExitStatus::Unknown => 0,
            ExitStatus::Signal { signal, .. } => return die_by(thread, host, at, signal),
        };
        match thread.inject(at, SYS_EXIT_GROUP, [code as u64, 0, 0, 0, 0, 0]) {
            Err(TraceError::Gone { .. }) | Ok(_) => Ok(()),
            Err(error) => Err(other(error)),
        }
    }

    /// Ends surrogates of relatives that nobody here needs any more.
    pub fn discard(&self, pid: Pid) {
        if self.hidden.kind(pid) == Some(HiddenKind::Relative)
            && let Ok(Some(host)) = self.nest.host_pid(pid)
            && let Some(host) = rustix::process::Pid::from_raw(host)
        {
            // It stays hidden until it is gone: the surrogate of its parent may tell of its end.
            self.hidden.insert(pid, HiddenKind::Leaving);
            let _ = self.nest.unregister_surrogate(pid);
            let _ = rustix::process::kill_process(host, rustix::process::Signal::KILL);
        }
    }
}

/// A number is in use until the last task that has it as its group's or session's is reaped: those are waited for that are being
/// ended, as after an attempt that came to nothing.
fn once_free<T>(make: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let deadline = Instant::now() + FREE_WITHIN;
    loop {
        match make() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            done => return done,
        }
    }
}

/// Before the descriptors of a place whose restore came to nothing are closed: one with O_ASYNC would signal the place, and the
/// surrogate that it becomes would pass that on to the process.
fn hush(mut thread: Stopped, at: u64, dir: &ProcDir) -> io::Result<Stopped> {
    const SYS_FCNTL: i64 = 72;
    const F_SETFL: u64 = 4;
    const O_ASYNC: u32 = 0o20_000;
    for number in dir.numbers("fd")? {
        let info = FdInfo::parse(&dir.text(&format!("fdinfo/{number}"))?).map_err(io::Error::from)?;
        if info.flags & O_ASYNC != 0 {
            let arguments = [number as u64, F_SETFL, u64::from(info.flags & !O_ASYNC), 0, 0, 0];
            thread = thread.inject(at, SYS_FCNTL, arguments).map_err(other)?.0;
        }
    }
    Ok(thread)
}

/// Which group and session a surrogate is put in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Those of its maker.
    AsMaker,
    /// It leads a session.
    Session,
    /// This group, in its maker's session.
    Group(Pid),
}

/// Lets a stopped surrogate die by a signal: without a core of its own, as the core is where the process was.
fn die_by(thread: Stopped, host: i32, at: u64, signal: i32) -> io::Result<()> {
    let _ = dunlin_sys::inspect::set_limit(host, 4, (0, 0));
    let place = (thread.registers().map_err(other)?.rsp - 2048) & !15;
    OpenOptions::new()
        .write(true)
        .open(ProcDir::process(host).path("mem"))?
        .write_all_at(&[0; 64], place)?;
    let (thread, _) = thread
        .inject(at, SYS_RT_SIGACTION, [signal as u64, place, 0, 8, 0, 0])
        .map_err(other)?;
    let process = rustix::process::Pid::from_raw(host).ok_or(io::ErrorKind::InvalidInput)?;
    let signal = rustix::process::Signal::from_named_raw(signal).unwrap_or(rustix::process::Signal::KILL);
    thread
        .set_signal_mask(!(1u64 << (signal.as_raw() - 1)))
        .map_err(other)?;
    rustix::process::kill_process(process, signal)?;
    match thread.detach(0) {
        // SIGKILL does not wait for it to be let go.
        Ok(()) | Err(TraceError::Gone { .. }) => Ok(()),
        Err(error) => Err(other(error)),
    }
}

/// What the kernel answers to a second tracer.
fn is_traced(error: &io::Error) -> bool {
    let trace = error.get_ref().and_then(|inner| inner.downcast_ref::<TraceError>());
    matches!(trace, Some(TraceError::Refused { errno, .. }) if errno.0 == 1)
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}
