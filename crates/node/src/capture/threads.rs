//! One stopped thread, as it is.
//!
//! Owns the reading of what ptrace and /proc tell of a thread, and the steps out of places where a thread cannot be
//! captured (an rseq critical section, the vDSO). Refuses to know about the process around it.

use dunlin_proto::ids::Pid;
use dunlin_proto::image::{Sleep, ThreadImage};
use dunlin_sys::inspect;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Registers, Stopped, TraceError};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::questions::ThreadAnswers;

/// A thread of a frozen process: stopped, with what must be put back if the move is given up.
pub struct FrozenThread {
    /// The thread.
    pub thread: Stopped,
    /// Its number in the nest.
    pub tid: Pid,
    /// Its registers at the stop.
    pub registers: Registers,
    /// Its signal mask at the stop.
    pub mask: u64,
    /// What it sleeps in.
    pub sleep: Option<Sleep>,
    /// When that was found out.
    pub settled_ns: u64,
    /// It was in a call that is made again.
    pub is_ended: bool,
}

/// Registers as 27 words, in the order of `user_regs_struct`.
pub fn to_words(r: &Registers) -> Vec<u64> {
    vec![
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi, r.rdi,
        r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs, r.gs,
    ]
}

/// Registers from 27 words; `None` for another count.
pub fn from_words(words: &[u64]) -> Option<Registers> {
    let [
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax,
        rip,
        cs,
        eflags,
        rsp,
        ss,
        fs_base,
        gs_base,
        ds,
        es,
        fs,
        gs,
    ] = *<&[u64; 27]>::try_from(words).ok()?;
    Some(Registers {
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax,
        rip,
        cs,
        eflags,
        rsp,
        ss,
        fs_base,
        gs_base,
        ds,
        es,
        fs,
        gs,
    })
}

/// The parts of a thread that are read from outside. Any thread may change those of another at any time: they are read
/// in the freeze.
pub struct ThreadManner {
    comm: Vec<u8>,
    schedule: [i64; 4],
    affinity: Option<Vec<u8>>,
    io_priority: i32,
    timer_slack_ns: u64,
}

/// Reads them. `all_cpus` is the affinity of a process that was never bound.
pub fn manner(process: i32, tid: i32, all_cpus: &[u8]) -> io::Result<ThreadManner> {
    let dir = ProcDir::thread(process, tid);
    let mut comm = dir.bytes("comm")?;
    comm.pop();
    let affinity = inspect::affinity(tid)?;
    let slack = ProcDir::process(tid).text("timerslack_ns");
    Ok(ThreadManner {
        comm,
        schedule: inspect::schedule(tid)?,
        affinity: (affinity != all_cpus).then_some(affinity),
        io_priority: inspect::io_priority(tid)?,
        timer_slack_ns: slack.ok().and_then(|s| s.trim().parse().ok()).unwrap_or(50_000),
    })
}

/// The whole image of a frozen thread.
pub fn image(frozen: &FrozenThread, manner: ThreadManner, answers: ThreadAnswers) -> Result<ThreadImage, TraceError> {
    let mut xstate = Vec::new();
    frozen.thread.xstate(&mut xstate)?;
    let pending = frozen.thread.pending_signals(false)?;
    Ok(ThreadImage {
        tid: frozen.tid,
        comm: manner.comm,
        registers: to_words(&frozen.registers),
        xstate,
        mask: frozen.mask,
        pending: pending.into_iter().map(|info| info.to_vec()).collect(),
        alt_stack: answers.alt_stack,
        robust_list: inspect::robust_list(frozen.thread.tid()).unwrap_or_default(),
        clear_tid: answers.clear_tid,
        rseq: frozen
            .thread
            .rseq()?
            .map(|r| [r.pointer, u64::from(r.size), u64::from(r.signature)]),
        sleep: frozen.sleep,
        schedule: manner.schedule,
        affinity: manner.affinity,
        io_priority: manner.io_priority,
        timer_slack_ns: manner.timer_slack_ns,
        parent_death_signal: answers.parent_death_signal,
    })
}

/// Where a thread inside an rseq critical section must go on: at its abort handler, as after any preemption.
///
/// See rseq(2): the area's third word points to a descriptor {version, flags, start_ip, post_commit_offset, abort_ip}.
pub fn rseq_abort(thread: &Stopped, memory: &File, rip: u64) -> Result<Option<u64>, TraceError> {
    let Some(rseq) = thread.rseq()? else { return Ok(None) };
    let word = |address: u64| {
        let mut bytes = [0u8; 8];
        memory.read_exact_at(&mut bytes, address).ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    let section = || {
        let descriptor = word(rseq.pointer + 8).filter(|d| *d != 0)?;
        let start = word(descriptor + 8)?;
        let length = word(descriptor + 16)?;
        (rip.wrapping_sub(start) < length).then(|| word(descriptor + 24))?
    };
    Ok(section())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_keep_their_order() {
        let words: Vec<u64> = (0..27).collect();
        assert_eq!(to_words(&from_words(&words).unwrap()), words);
        assert!(from_words(&words[1..]).is_none());
    }
}
