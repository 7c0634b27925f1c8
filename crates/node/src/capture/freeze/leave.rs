//! What a process leaves behind once it runs elsewhere.
//!
//! Owns the clearing of the old copy after the commit: its descriptors, its threads, the keeper of its address space, and the
//! emptied first thread. Refuses to decide what becomes of that one. Invariant: nothing here runs a signal handler or any
//! other instruction of the program.

use super::Frozen;
use crate::capture::{CaptureError, PAGE, SCRIPT_MASK};
use dunlin_proto::ids::Pid;
use dunlin_sys::batch::Batch;
use dunlin_sys::foothold::Foothold;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::Stopped;
use dunlin_sys::script::Script;

impl Frozen {
    /// After the commit, before any descriptor of the move is closed: that must signal nobody (O_ASYNC), as the signal would
    /// follow the process.
    pub fn hush(&self) -> Result<(), CaptureError> {
        const SYS_FCNTL: i64 = 72;
        const F_SETFL: u64 = 4;
        const O_ASYNC: u32 = 0o20_000;
        let files = &self.source.plan.image.files;
        let mut script = Script::new(&self.source.foothold.arena);
        for descriptor in &files.table {
            let description = &files.descriptions[descriptor.description as usize];
            if description.owner.is_some() {
                let flags = u64::from(description.flags & !O_ASYNC);
                script.attempt("fcntl", SYS_FCNTL, &[descriptor.number as u64, F_SETFL, flags]);
            }
        }
        if script.is_empty() {
            return Ok(());
        }
        let leader = Stopped::assume(self.source.host);
        leader.set_signal_mask(SCRIPT_MASK)?;
        let (leader, _) = script.run(leader)?;
        Ok(leader.set_signal_mask(u64::MAX)?)
    }

    /// After the commit: leaves the address space to a keeper and hands back the emptied first thread, still parked.
    ///
    /// The kernel must not write to the image when the threads go, hence the cleared tid addresses and robust lists.
    pub fn into_image(self) -> Result<LeftBehind, CaptureError> {
        let Frozen {
            source,
            threads,
            pending,
            ..
        } = self;
        let threads = threads.into_iter().map(|thread| thread.thread).collect();
        // A filter of its own might end the keeper for a call that the program never made.
        let status = ProcDir::process(source.host).status()?;
        let lends = status
            .seccomp_filters
            .is_none_or(|count| count as usize <= source.nest_filters);
        leave_image(source.foothold, source.host, threads, pending, lends)
    }
}

/// Leaves the address space of a parked process to a keeper; its first thread comes first. A keeper that `lends` has
/// descriptors of its own for it, in the order that `sys::lending` wants.
pub(in crate::capture) fn leave_image(
    foothold: Foothold,
    host: i32,
    threads: Vec<Stopped>,
    pending: Vec<i32>,
    lends: bool,
) -> Result<LeftBehind, CaptureError> {
    const SYS_SOCKETPAIR: i64 = 53;
    const AF_UNIX: u64 = 1;
    const SOCK_SEQPACKET: u64 = 5;
    const SYS_PIPE2: i64 = 293;
    const SYS_SET_TID_ADDRESS: i64 = 218;
    const SYS_SET_ROBUST_LIST: i64 = 273;
    const SYS_CLOSE_RANGE: i64 = 436;
    const SYS_CLONE: i64 = 56;
    const CLONE_VM: u64 = 0x100;
    const SYS_SETITIMER: i64 = 38;
    /// SIGALRM, SIGVTALRM, SIGPROF.
    const ITIMER_SIGNALS: [i32; 3] = [14, 26, 27];
    const SI_KERNEL: i32 = 0x80;
    const AT_ONCE: usize = 1024;
    for some in threads.chunks(AT_ONCE) {
        let mut batch = Batch::new(&foothold.arena);
        for thread in some {
            let script = batch.lane(thread.tid());
            script.attempt("set_tid_address", SYS_SET_TID_ADDRESS, &[0]);
            script.attempt("set_robust_list", SYS_SET_ROBUST_LIST, &[0, 24]);
            thread.set_signal_mask(SCRIPT_MASK)?;
        }
        batch.run()?;
        for thread in some {
            thread.set_signal_mask(u64::MAX)?;
        }
    }
    for thread in threads.into_iter().skip(1) {
        thread.detach(0)?;
    }
    let leader = Stopped::assume(host);
    leader.set_signal_mask(SCRIPT_MASK)?;
    let mut script = Script::new(&foothold.arena);
    // Its timers tick on: exec keeps those of setitimer(2), and a surrogate passes on every signal it gets.
    let off = script.bytes(&[0; 32]);
    for which in 0..3 {
        script.attempt("setitimer", SYS_SETITIMER, &[which, off.address, 0]);
    }
    for signal in pending {
        add_take(&mut script, signal);
    }
    let (leader, _) = script.run(leader)?;
    let mut script = Script::new(&foothold.arena);
    for info in leader.pending_signals(true)? {
        let [signal, code] = [0, 8].map(|at| i32::from_le_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]));
        if ITIMER_SIGNALS.contains(&signal) && code == SI_KERNEL {
            add_take(&mut script, signal);
        }
    }
    script.attempt("close_range", SYS_CLOSE_RANGE, &[0, u64::from(u32::MAX), 0]);
    // With no signal at its end: should the process come home first, its wait(2) does not see the keeper.
    let clone = [CLONE_VM, 0, 0, 0, 0];
    let keeper = if lends {
        // Nothing is open: these become 0 and 1, 2 and 3. Where they are refused, the keeper only keeps.
        let ends = [script.space(8), script.space(8)].map(|space| space.address);
        script.attempt("socketpair", SYS_SOCKETPAIR, &[AF_UNIX, SOCK_SEQPACKET, 0, ends[0]]);
        script.attempt("pipe2", SYS_PIPE2, &[ends[1], 0]);
        let keeper = script.child_lends("clone", SYS_CLONE, &clone);
        script.attempt("close_range", SYS_CLOSE_RANGE, &[0, u64::from(u32::MAX), 0]);
        keeper
    } else {
        script.child_parks("clone", SYS_CLONE, &clone)
    };
    let (leader, answers) = script.run(leader)?;
    let keeper = Pid(answers.of(keeper) as i32);
    leader.set_signal_mask(u64::MAX)?;
    Ok(LeftBehind {
        keeper,
        leader,
        foothold,
    })
}

/// What a process leaves behind once it runs elsewhere.
pub struct LeftBehind {
    /// The process that keeps the address space.
    pub keeper: Pid,
    /// The emptied first thread, stopped.
    pub leader: Stopped,
    pub(in crate::capture) foothold: Foothold,
}

impl LeftBehind {
    /// Ends the emptied process: nothing of it stays but the image.
    pub fn exit(self) -> Result<(), CaptureError> {
        const SYS_EXIT_GROUP: i64 = 231;
        match self.leader.inject(self.foothold.syscall_at, SYS_EXIT_GROUP, [0; 6]) {
            Err(dunlin_sys::ptrace::TraceError::Gone { .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The emptied process, which may execute the surrogate program: its thread, where calls can be injected, and memory
    /// to write to.
    pub fn into_parts(self) -> (Stopped, u64, u64) {
        (self.leader, self.foothold.syscall_at, self.foothold.arena.base() + PAGE)
    }
}

/// Takes the oldest pending signal of a number, without waiting: it runs elsewhere with the process.
pub(crate) fn add_take(script: &mut Script<'_>, signal: i32) {
    const SYS_RT_SIGTIMEDWAIT: i64 = 128;
    if !(1..=64).contains(&signal) {
        return;
    }
    let set = script.bytes(&(1u64 << (signal - 1)).to_le_bytes());
    let no_time = script.bytes(&[0; 16]);
    script.attempt(
        "rt_sigtimedwait",
        SYS_RT_SIGTIMEDWAIT,
        &[set.address, 0, no_time.address, 8],
    );
}
