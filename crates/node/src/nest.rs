//! The daemon's side of the nest: starts init or finds it again, and asks it for what only PID 1 can do.
//!
//! Owns the connection to init and the requests' numbers. Refuses to know what a program, a move or a peer is.
//! [`Nest`] is a handle: clone it and use it from any thread; calls wait for init's answer. Events come out of the
//! receiver that [`Nest::open`] gave, in order, but beside the answers: the `Reaped` of a process may be read before its
//! `spawn` has returned its PID in another thread.
//!
//! Invariants: a request is answered, or fails when init is gone (then [`NestEvent::InitGone`] comes, once, last);
//! dropping every handle leaves the nest as it is, for the next daemon to find.

mod connection;
mod start;
mod steer;
pub mod wire;

use crate::config::NodeConfig;
use connection::Connection;
use dunlin_proto::ids::Pid;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::seccomp::Listener;
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use wire::{Answer, Request};

pub use dunlin_sys::seccomp::Answer as Response;
pub use steer::SteerGuard;

/// The nest of a node.
#[derive(Debug, Clone)]
pub struct Nest(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    connection: Connection,
    init_pid: i32,
    init: OwnedFd,
    root: OwnedFd,
    cookie: u64,
    listener: Listener,
    program: OwnedFd,
    /// One daemon thread at a time makes tasks, so that none meets another's steering.
    steering: Mutex<()>,
    cgroup: Option<PathBuf>,
    socket: PathBuf,
}

/// Why there is no nest.
#[derive(Debug, thiserror::Error)]
pub enum NestError {
    /// Init could not be started.
    #[error("starting {exe} init: {source}")]
    Exec {
        /// The program.
        exe: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A step of building failed; nothing of the nest is left.
    #[error("the nest could not be built: {step}: {why}; hint: `dunlin doctor` tells what is missing")]
    Build {
        /// Which step.
        step: String,
        /// Why.
        why: String,
    },
    /// Init ended without a word.
    #[error("init ended before the nest stood; hint: see {log}")]
    Silent {
        /// What it wrote.
        log: PathBuf,
    },
    /// A nest runs that this daemon cannot talk to.
    #[error("the running nest is of {what}; hint: end its programs and its init (pid {init_pid}) first")]
    Foreign {
        /// How it differs.
        what: String,
        /// Its init, on this machine.
        init_pid: i32,
    },
    /// The conversation with init failed.
    #[error("{socket}: {source}; hint: see init.log beside it")]
    Talk {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A program to be started in the nest.
#[derive(Debug)]
pub struct SpawnSpec {
    /// The program and its arguments; not empty. Looked up in the PATH of `env`.
    pub argv: Vec<Vec<u8>>,
    /// Its whole environment, `KEY=VALUE`.
    pub env: Vec<Vec<u8>>,
    /// Its working directory.
    pub cwd: Vec<u8>,
    /// Its umask.
    pub umask: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
    /// Descriptors 0, 1 and 2.
    pub stdio: [OwnedFd; 3],
    /// Descriptor 0 is a terminal and becomes its controlling one.
    pub controlling_tty: bool,
}

/// Why a program was not started; nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// It could not be executed.
    #[error("{program}: {source}")]
    Exec {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// Something else was in the way.
    #[error("the program was not started: {0}")]
    Other(#[from] io::Error),
}

/// A surrogate to be made as a child of init.
#[derive(Debug, Clone)]
pub struct SurrogateSpec {
    /// Its PID; must be free.
    pub pid: Pid,
    /// Its name.
    pub comm: Vec<u8>,
    /// It leads a session.
    pub session: bool,
    /// Its process group: its own PID, or a group of init's session; without, init's.
    pub group: Option<Pid>,
    /// Its user and group (who may signal it depends on that); root without.
    pub owner: Option<(u32, u32)>,
}

/// What happens in the nest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NestEvent {
    /// A child of init ended: one it spawned, a surrogate, or an orphan.
    Reaped {
        /// Which.
        pid: Pid,
        /// As wait(2) tells it.
        status: i32,
    },
    /// A call that waits for [`Nest::respond`]: of the kill family or pidfd_open, on a PID of another residue. After a
    /// daemon's death, those it left unanswered come again.
    Notification {
        /// Names the call.
        id: u64,
        /// The calling thread, in the nest's numbering.
        pid: Pid,
        /// The call's 64-bit number.
        nr: i64,
        /// Its arguments.
        args: [u64; 6],
    },
    /// A surrogate took a signal.
    SurrogateSignal {
        /// Which surrogate.
        pid: Pid,
        /// The siginfo.
        siginfo: [u8; 128],
    },
    /// A child of a surrogate ended (and is reaped), stopped or continued.
    SurrogateChild {
        /// Which surrogate.
        parent: Pid,
        /// As waitid(2) tells it.
        siginfo: [u8; 128],
    },
    /// A surrogate was stopped by SIGSTOP.
    SurrogateStopped {
        /// Which.
        pid: Pid,
    },
    /// It was continued.
    SurrogateContinued {
        /// Which.
        pid: Pid,
    },
    /// A registered surrogate is gone or a zombie; it is registered no longer.
    SurrogateGone {
        /// Which.
        pid: Pid,
    },
    /// Init is gone, and all of the nest with it. The last event.
    InitGone,
}

impl Nest {
    /// Finds the node's nest, or builds it with `exe init`.
    pub fn open(config: &NodeConfig, exe: &Path) -> Result<(Nest, Receiver<NestEvent>), NestError> {
        start::open(config, exe)
    }

    /// PID 1 of the nest, as this machine numbers it.
    pub fn init_pid(&self) -> i32 {
        self.0.init_pid
    }

    /// PID 1 of the nest, as a pidfd.
    pub fn init(&self) -> BorrowedFd<'_> {
        self.0.init.as_fd()
    }

    /// A call with this in its sixth argument is let through by the nest's filter.
    pub fn cookie(&self) -> u64 {
        self.0.cookie
    }

    /// The root directory of the nest (its /proc, /dev/shm and so on), as an O_PATH descriptor.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.0.root.as_fd()
    }

    /// The seccomp listener; [`Nest::respond`] is the usual way to answer.
    pub fn listener(&self) -> &Listener {
        &self.0.listener
    }

    /// Starts a program as a child of init, in its own session. Its PID.
    pub fn spawn(&self, spec: SpawnSpec) -> Result<Pid, SpawnError> {
        let _turn = self.steering_turn();
        let fds = [spec.stdio[0].as_fd(), spec.stdio[1].as_fd(), spec.stdio[2].as_fd()];
        let request = Request::Spawn(wire::Spawn {
            argv: spec.argv,
            env: spec.env,
            cwd: spec.cwd,
            umask: spec.umask,
            uid: spec.uid,
            gid: spec.gid,
            groups: spec.groups,
            controlling_tty: spec.controlling_tty,
        });
        match self.0.connection.ask(request, &fds)?.answer {
            Answer::Started(pid) => Ok(pid),
            Answer::NotExecuted { program, errno } => Err(SpawnError::Exec {
                program,
                source: io::Error::from_raw_os_error(errno),
            }),
            other => Err(SpawnError::Other(unexpected(other))),
        }
    }

    /// A pidfd of a process of the nest; `None`: there is none.
    pub fn pidfd(&self, pid: Pid) -> io::Result<Option<OwnedFd>> {
        self.pidfd_of(pid, false)
    }

    /// A pidfd of a thread of the nest (Linux 6.9); `None`: there is none.
    pub fn thread_pidfd(&self, tid: Pid) -> io::Result<Option<OwnedFd>> {
        self.pidfd_of(tid, true)
    }

    fn pidfd_of(&self, pid: Pid, thread: bool) -> io::Result<Option<OwnedFd>> {
        let mut reply = self.0.connection.ask(Request::Pidfd { pid, thread }, &[])?;
        match reply.answer {
            Answer::Done => Ok(reply.fds.pop()),
            Answer::Absent => Ok(None),
            other => Err(unexpected(other)),
        }
    }

    /// What this machine calls a process or thread of the nest; `None`: there is none.
    pub fn host_pid(&self, pid: Pid) -> io::Result<Option<i32>> {
        let reply = self.0.connection.ask(Request::HostPid(pid), &[])?;
        match reply.answer {
            // A number that is a group's or session's still, but no task's any more, is told, too.
            Answer::Done => Ok(reply.pid.filter(|host| ProcDir::process(*host).path("stat").exists())),
            Answer::Absent => Ok(None),
            other => Err(unexpected(other)),
        }
    }

    /// Sends a process a signal with this payload, whose sender it keeps: to a signal from outside the nest the kernel gives
    /// the sender 0. `false`: there is no such process.
    pub fn signal(&self, pid: Pid, signal: i32, info: &[u8; 128]) -> io::Result<bool> {
        let info = info.to_vec();
        match self
            .0
            .connection
            .ask(Request::Signal { pid, signal, info }, &[])?
            .answer
        {
            Answer::Done => Ok(true),
            Answer::Absent => Ok(false),
            other => Err(unexpected(other)),
        }
    }

    /// Keeps everybody else from making tasks until the guard ends; the next one made gets this number. EEXIST: the
    /// number is in use. Must not be asked for by a thread that has a guard already ([`SteerGuard::aim`] is for that).
    pub fn steer(&self, pid: Pid) -> io::Result<SteerGuard<'_>> {
        SteerGuard::begin(self, pid)
    }

    /// Makes a surrogate as a child of init, and registers it.
    pub fn make_surrogate(&self, spec: SurrogateSpec) -> io::Result<()> {
        let _turn = self.steering_turn();
        self.done(Request::MakeSurrogate(wire::MakeSurrogate {
            pid: spec.pid,
            comm: spec.comm,
            session: spec.session,
            group: spec.group,
            owner: spec.owner,
        }))
    }

    /// Takes the reports of this process as a surrogate's. Before it becomes one, or its first reports are lost.
    pub fn register_surrogate(&self, pid: Pid) -> io::Result<()> {
        self.done(Request::RegisterSurrogate(pid))
    }

    /// Takes its reports no longer: it becomes a program again, or ends.
    pub fn unregister_surrogate(&self, pid: Pid) -> io::Result<()> {
        self.done(Request::UnregisterSurrogate(pid))
    }

    /// The surrogates' program, to be executed with `execveat(…, AT_EMPTY_PATH)`; the first argument becomes its name.
    pub fn surrogate_program(&self) -> BorrowedFd<'_> {
        self.0.program.as_fd()
    }

    /// Does not give out these until released.
    pub fn reserve(&self, pids: &[Pid]) -> io::Result<()> {
        self.done(Request::Reserve(pids.to_vec()))
    }

    /// Ends the reservation of these.
    pub fn release(&self, pids: &[Pid]) -> io::Result<()> {
        self.done(Request::Release(pids.to_vec()))
    }

    /// These have come into use without having been given out here.
    pub fn occupy(&self, pids: &[Pid]) -> io::Result<()> {
        self.done(Request::Occupy(pids.to_vec()))
    }

    /// Answers a notified call. `false`: the caller is gone, or was answered.
    pub fn respond(&self, id: u64, response: Response) -> io::Result<bool> {
        self.0.listener.answer(id, response)
    }

    /// Lets init keep copies of descriptors and some bytes, in place of what had this label; at most
    /// [`dunlin_sys::fdpass::MAX_FDS`] descriptors a label.
    pub fn store(&self, label: &str, fds: &[BorrowedFd<'_>], blob: Vec<u8>) -> io::Result<()> {
        let label = label.to_owned();
        let reply = self.0.connection.ask(Request::Store { label, blob }, fds)?;
        expect_done(reply.answer)
    }

    /// Like [`Nest::reserve`], without waiting for the answer: whatever is asked of init later comes after it.
    pub fn reserve_soon(&self, pids: &[Pid]) -> io::Result<()> {
        self.0.connection.tell(Request::Reserve(pids.to_vec()), &[])
    }

    /// Like [`Nest::release`], without waiting for the answer.
    pub fn release_soon(&self, pids: &[Pid]) -> io::Result<()> {
        self.0.connection.tell(Request::Release(pids.to_vec()), &[])
    }

    /// Like [`Nest::store`], without waiting for the answer: for records that must outlive this daemon and are made while
    /// a process is frozen. What was told before is kept before.
    pub fn store_soon(&self, label: &str, blob: Vec<u8>) -> io::Result<()> {
        let label = label.to_owned();
        self.0.connection.tell(Request::Store { label, blob }, &[])
    }

    /// Like [`Nest::store_soon`], with descriptors.
    pub fn store_with(&self, label: &str, fds: &[BorrowedFd<'_>], blob: Vec<u8>) -> io::Result<()> {
        let label = label.to_owned();
        self.0.connection.tell(Request::Store { label, blob }, fds)
    }

    /// Like [`Nest::drop_label`], without waiting for the answer.
    pub fn drop_soon(&self, label: &str) -> io::Result<()> {
        let label = label.to_owned();
        self.0.connection.tell(Request::Drop { label }, &[])
    }

    /// Copies of what init keeps under a label.
    pub fn fetch(&self, label: &str) -> io::Result<Option<(Vec<OwnedFd>, Vec<u8>)>> {
        let label = label.to_owned();
        let reply = self.0.connection.ask(Request::Fetch { label }, &[])?;
        match reply.answer {
            Answer::Kept(blob) => Ok(Some((reply.fds, blob))),
            Answer::Absent => Ok(None),
            other => Err(unexpected(other)),
        }
    }

    /// Has init accept those who wait at a listening socket, as many as one label holds, and keep them under it: copies of them, and
    /// the bytes with who each of them is behind them. `None`: nobody waits.
    pub fn accept(
        &self,
        label: &str,
        listening: BorrowedFd<'_>,
        blob: Vec<u8>,
    ) -> io::Result<Option<(Vec<OwnedFd>, Vec<u8>)>> {
        let label = label.to_owned();
        let reply = self.0.connection.ask(Request::Accept { label, blob }, &[listening])?;
        match reply.answer {
            Answer::Kept(blob) => Ok(Some((reply.fds, blob))),
            Answer::Absent => Ok(None),
            other => Err(unexpected(other)),
        }
    }

    /// Lets init forget a label. `false`: it had none.
    pub fn drop_label(&self, label: &str) -> io::Result<bool> {
        let label = label.to_owned();
        match self.0.connection.ask(Request::Drop { label }, &[])?.answer {
            Answer::Done => Ok(true),
            Answer::Absent => Ok(false),
            other => Err(unexpected(other)),
        }
    }

    /// The labels that init keeps something under.
    pub fn list(&self) -> io::Result<Vec<String>> {
        match self.0.connection.ask(Request::List, &[])?.answer {
            Answer::Labels(labels) => Ok(labels),
            other => Err(unexpected(other)),
        }
    }

    /// Ends the nest and everything in it, waits until it is gone, and removes its socket and cgroup.
    pub fn destroy(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.0.init, rustix::process::Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(e) => return Err(e.into()),
        }
        // A pidfd is readable when its process has ended, and PID 1 ends after all others of its namespace.
        let mut fds = [rustix::event::PollFd::new(&self.0.init, rustix::event::PollFlags::IN)];
        while rustix::event::poll(&mut fds, None) == Err(Errno::INTR) {}
        let _ = std::fs::remove_file(&self.0.socket);
        if let Some(cgroup) = &self.0.cgroup {
            start::remove_cgroup(cgroup);
        }
        Ok(())
    }

    fn done(&self, request: Request) -> io::Result<()> {
        expect_done(self.0.connection.ask(request, &[])?.answer)
    }

    fn steering_turn(&self) -> std::sync::MutexGuard<'_, ()> {
        self.0
            .steering
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn expect_done(answer: Answer) -> io::Result<()> {
    match answer {
        Answer::Done => Ok(()),
        other => Err(unexpected(other)),
    }
}

/// An answer that is a failure, or none that fits the request.
fn unexpected(answer: Answer) -> io::Error {
    match answer {
        Answer::Failed { what, errno } => {
            let why = io::Error::from_raw_os_error(errno);
            io::Error::new(why.kind(), NestFailure { what, why })
        }
        other => io::Error::new(io::ErrorKind::InvalidData, format!("init answered {other:?}")),
    }
}

/// What init could not do; the source of an [`io::Error`], so that the errno is not lost.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct NestFailure {
    what: String,
    why: io::Error,
}

impl NestFailure {
    /// The kernel's reason.
    pub fn errno(&self) -> Option<i32> {
        self.why.raw_os_error()
    }
}

/// The errno behind an error of this module, if the kernel gave one.
pub fn errno(error: &io::Error) -> Option<i32> {
    let failure = error.get_ref().and_then(|e| e.downcast_ref::<NestFailure>());
    error.raw_os_error().or_else(|| failure.and_then(NestFailure::errno))
}
