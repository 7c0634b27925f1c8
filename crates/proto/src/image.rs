//! A process, as it travels: everything but its pages.
//!
//! Owns the portable form of a captured process. The same form is sent twice: in the *plan*, taken while the program
//! runs, from which the destination prepares; and in the *essence*, taken inside the freeze, against which what was
//! prepared is corrected. Refuses to know how any of it is read or set. Numbers are those of x86-64 Linux.

mod descriptors;
mod socket;
mod space;

pub use descriptors::*;
pub use socket::*;
pub use space::*;

use crate::ids::Pid;
use serde::{Deserialize, Serialize};

/// One process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessImage {
    /// Who it is and to whom it belongs.
    pub lineage: Lineage,
    /// What it may do and how it is run.
    pub traits: Traits,
    /// Its address space without the pages.
    pub space: Space,
    /// Its descriptors.
    pub files: Files,
    /// Signals and timers of the process.
    pub signals: Signals,
    /// Its threads, the leader first.
    pub threads: Vec<ThreadImage>,
    /// Seccomp filters of its own, oldest first, as arrays of `sock_filter`.
    pub seccomp: Vec<Vec<u8>>,
    /// It is stopped by this signal (group-stop).
    pub stopped_by: Option<i32>,
}

/// Who a process is and to whom it belongs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// Its PID.
    pub pid: Pid,
    /// Its parent's; 1 for PID 1 of the nest.
    pub ppid: Pid,
    /// Its process group.
    pub pgid: Pid,
    /// Its session.
    pub sid: Pid,
    /// Its children that stay behind.
    pub children: Vec<Child>,
    /// How many times it has moved before.
    pub moves: u32,
    /// Its command line for people.
    pub command: String,
}

/// A child of a process that moves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Child {
    /// Its PID.
    pub pid: Pid,
    /// Its process group.
    pub pgid: Pid,
    /// Its session.
    pub sid: Pid,
    /// It moves along.
    pub along: bool,
    /// It has ended already and its parent has not waited for it: its wait status.
    pub ended: Option<i32>,
    /// It, or what stands for it where its parent was, is stopped.
    pub stop: Option<ChildStop>,
    /// It was continued, and its parent has not waited for that.
    pub continued: bool,
    /// Its command name.
    pub comm: Vec<u8>,
}

/// A child that is stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildStop {
    /// The parent has not waited for the stop.
    pub waitable: bool,
    /// What stood for it was stopped by somebody there, and the child itself does not know yet.
    pub unsaid: bool,
    /// Signals, as siginfo, that came to what stood for it since.
    pub pending: Vec<Vec<u8>>,
}

/// What a process may do and how it is run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traits {
    /// Working directory, as a path from the nest's root.
    pub cwd: Vec<u8>,
    /// Root directory.
    pub root: Vec<u8>,
    /// File mode creation mask.
    pub umask: u32,
    /// personality(2).
    pub personality: u32,
    /// Real, effective, saved, file-system user.
    pub uids: [u32; 4],
    /// Real, effective, saved, file-system group.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding, ambient.
    pub capabilities: [u64; 5],
    /// PR_GET_SECUREBITS.
    pub securebits: u32,
    /// PR_GET_NO_NEW_PRIVS.
    pub no_new_privs: bool,
    /// PR_GET_DUMPABLE.
    pub dumpable: u32,
    /// PR_GET_CHILD_SUBREAPER.
    pub subreaper: bool,
    /// PR_GET_THP_DISABLE.
    pub thp_disable: bool,
    /// Soft and hard limit for each resource, by number.
    pub limits: Vec<(u64, u64)>,
    /// oom_score_adj.
    pub oom_score_adj: i32,
}

/// A file, by what can be checked on the other node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileRef {
    /// Its path from the nest's root.
    pub path: Vec<u8>,
    /// Its size in bytes.
    pub size: u64,
    /// Its last modification, nanoseconds since 1970.
    pub modified_ns: i128,
    /// Its mode, type included.
    pub mode: u32,
    /// Its inode number: the same on every node of a shared file system.
    pub inode: u64,
}

/// Signals and timers of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signals {
    /// `kernel_sigaction` for signals 1 to 64: handler, flags, restorer, mask.
    pub actions: Vec<[u64; 4]>,
    /// Pending for the process, as siginfo.
    pub pending: Vec<Vec<u8>>,
    /// setitimer(2): interval and value in microseconds for REAL, VIRTUAL, PROF.
    pub interval_timers: [[u64; 2]; 3],
    /// timer_create(2)'s timers.
    pub timers: Vec<Timer>,
}

/// A POSIX timer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timer {
    /// Its number.
    pub id: i32,
    /// Its clock.
    pub clock: i32,
    /// `sigev_notify`.
    pub notify: i32,
    /// The signal.
    pub signal: i32,
    /// The value that comes with it.
    pub value: u64,
    /// The thread it signals, for SIGEV_THREAD_ID.
    pub thread: Option<Pid>,
    /// Interval and remaining time, nanoseconds.
    pub interval_ns: u64,
    /// 0: not armed.
    pub remaining_ns: u64,
    /// timer_getoverrun(2) at the capture.
    pub overrun: i32,
}

/// One thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadImage {
    /// Its number.
    pub tid: Pid,
    /// Its name.
    pub comm: Vec<u8>,
    /// `user_regs_struct`, 27 words.
    pub registers: Vec<u64>,
    /// XSAVE area.
    #[serde(with = "crate::bytes")]
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub mask: u64,
    /// Pending for it alone, as siginfo.
    pub pending: Vec<Vec<u8>>,
    /// `stack_t`: pointer, flags, size.
    pub alt_stack: [u64; 3],
    /// Robust list head and length.
    pub robust_list: [u64; 2],
    /// set_tid_address(2).
    pub clear_tid: u64,
    /// rseq(2): address, length, signature.
    pub rseq: Option<[u64; 3]>,
    /// The call that it sleeps in, where the kernel would restart it by a block that only it has.
    pub sleep: Option<Sleep>,
    /// sched_getattr(2): policy, flags, nice, priority.
    pub schedule: [i64; 4],
    /// Its affinity, if it is not all CPUs of the source.
    pub affinity: Option<Vec<u8>>,
    /// ioprio_get(2).
    pub io_priority: i32,
    /// timerslack_ns.
    pub timer_slack_ns: u64,
    /// PR_GET_PDEATHSIG (of the leader).
    pub parent_death_signal: i32,
}

/// A relative sleep that was under way at the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sleep {
    /// The system call: nanosleep, clock_nanosleep, poll, futex.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
    /// What is left of its time, nanoseconds.
    pub remaining_ns: u64,
}

/// A run of pages with their bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// The first page's address.
    pub address: u64,
    /// Whole pages.
    #[serde(with = "crate::bytes")]
    pub bytes: Vec<u8>,
}

/// Bytes of shared memory: what is not in any was never written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedBytes {
    /// Which.
    pub memory: u64,
    /// Where in it.
    pub offset: u64,
    /// What is there.
    pub bytes: Vec<u8>,
}

/// What the destination prepares from, while the program runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The process as it was when the plan was made.
    pub image: ProcessImage,
    /// Written pages of private file mappings, as they were.
    pub file_pages: Vec<Pages>,
    /// CLOCK_MONOTONIC and CLOCK_BOOTTIME of its time namespace when the plan was made, nanoseconds.
    pub clocks_ns: [i64; 2],
    /// Where the source's loop is mapped: not part of the program.
    pub hole: (u64, u64),
    /// Bytes of its anonymous memory, for the destination's admission.
    pub resident_bytes: u64,
    /// CPU features it may have seen.
    pub cpu_features: Vec<String>,
    /// Size of the extended state.
    pub xstate_bytes: u32,
}

/// What travels inside the freeze, for one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Essence {
    /// As it is now. `space` or `files` are those of the plan where the flags below say so, and empty here.
    pub lineage: Lineage,
    /// What it may do.
    pub traits: Traits,
    /// Its address space, if it changed since the plan.
    pub space: Option<Space>,
    /// Its descriptors, if they changed since the plan.
    pub files: Option<Files>,
    /// Signals and timers.
    pub signals: Signals,
    /// Threads.
    pub threads: Vec<ThreadImage>,
    /// Seccomp filters.
    pub seccomp: Vec<Vec<u8>>,
    /// Stopped by a signal.
    pub stopped_by: Option<i32>,
    /// Pages of private file mappings that are not as in the plan.
    pub file_pages: Vec<Pages>,
    /// Pages of private file mappings that the plan had and that are the file's own again.
    pub file_pages_dropped: Vec<u64>,
    /// The hot pages of anonymous memory.
    pub hot_pages: Vec<Pages>,
    /// What is in shared memory; each is with one of the processes that have it.
    pub shared: Vec<SharedBytes>,
    /// CLOCK_MONOTONIC and CLOCK_BOOTTIME of its time namespace inside the freeze, nanoseconds.
    pub clocks_ns: [i64; 2],
}
