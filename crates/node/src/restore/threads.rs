//! The threads of a blank: made, loaded, let go.
//!
//! Owns the TIDs (each steered) and the last stores of registers. Invariant: all threads are stopped and traced by this
//! OS thread until [`resume`] lets go of all of them.

use super::{Blank, During, Kit, RestoreError, mappings, signals, sleeper};
use crate::capture::{
    SCRIPT_MASK, Trap, clocks, from_words, let_go, monotonic_ns, remember, select_limit, select_unit_ns,
};
use crate::steps;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{Essence, Sleep, ThreadImage};
use dunlin_sys::batch::Batch;
use dunlin_sys::inspect;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Stopped, TraceError};
use dunlin_sys::refuge::Others;
use dunlin_sys::script::{Held, Script};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const SYS_CLONE: i64 = 56;
const SYS_EXIT: i64 = 60;
const SYS_SIGALTSTACK: i64 = 131;
const SYS_PRCTL: i64 = 157;
const SYS_SET_TID_ADDRESS: i64 = 218;
const SYS_SET_ROBUST_LIST: i64 = 273;
const SYS_RSEQ: i64 = 334;
const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_NAME: u64 = 15;
const SS_DISABLE: u64 = 2;
/// CLONE_VM | FS | FILES | SIGHAND | THREAD | SYSVSEM, as pthread_create(3) asks for.
const THREAD: u64 = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000;
const MAX_THREADS: usize = 32_768;

/// Makes the threads that are not there yet.
pub fn make(blank: &mut Blank, tids: impl Iterator<Item = Pid>, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    for tid in tids {
        if blank.threads.contains_key(&tid) {
            continue;
        }
        if blank.threads.len() >= MAX_THREADS {
            return Err(RestoreError::Unsound {
                pid: blank.pid,
                why: "more threads than a process may have",
            });
        }
        let taken = (kit.steer)(tid).during(blank.pid, "steering a thread's number")?;
        let arguments = [THREAD, 0, 0, 0, 0, kit.cookie];
        let (_, answer, child) = blank
            .leader()
            .inject_clone(blank.foothold.syscall_at, SYS_CLONE, arguments)
            .during(blank.pid, "making a thread")?;
        taken().during(blank.pid, "steering a thread's number")?;
        let child = child
            .filter(|_| answer == i64::from(tid.0))
            .ok_or_else(|| RestoreError::Kernel {
                pid: blank.pid,
                what: "making a thread",
                source: format!("thread {tid} came out as {answer}").into(),
            })?;
        child
            .set_signal_mask(SCRIPT_MASK)
            .during(blank.pid, "blocking signals")?;
        // Should this daemon die, it waits.
        blank.park(&child)?;
        blank.threads.insert(tid, child.tid());
    }
    Ok(())
}

/// Ends the threads that have ended since the plan.
pub fn end_others(blank: &mut Blank, wanted: &[ThreadImage]) -> Result<(), RestoreError> {
    let gone: Vec<(Pid, i32)> = blank
        .threads
        .iter()
        .filter(|(tid, _)| !wanted.iter().any(|t| t.tid == **tid))
        .map(|(tid, host)| (*tid, *host))
        .collect();
    for (tid, host) in gone {
        // It never returns: the answer is that the thread is gone.
        let _ = Stopped::assume(host).inject(blank.foothold.syscall_at, SYS_EXIT, [0; 6]);
        blank.threads.remove(&tid);
    }
    Ok(())
}

/// Puts everything into the threads but what only the last store may set.
pub fn load(blank: &mut Blank, essence: &Essence, kit: &Kit<'_>) -> Result<(), RestoreError> {
    let pid = blank.pid;
    let mut loaded = 0;
    while loaded < essence.threads.len() {
        let mut batch = Batch::new(&blank.foothold.arena);
        for thread in &essence.threads[loaded..] {
            if !batch.has_room() {
                break;
            }
            let script = batch.lane(host_of(blank, thread)?);
            add_settings(script, pid, thread, essence, kit.cookie);
            loaded += 1;
        }
        let answers = batch.run().during(pid, "loading threads")?;
        blank.stopped.set(answers.stopped_by());
    }
    steps::mark("scripts of threads");
    for thread in &essence.threads {
        manner(blank, host_of(blank, thread)?, thread)?;
    }
    steps::mark("manners of threads");
    // Time goes on while a process is frozen: what was left then is less by now.
    let late_ns = late_ns(blank, essence);
    signals::set_timers(blank, &essence.signals, late_ns)?;
    steps::mark("timers");
    for thread in &essence.threads {
        if let Some(sleep) = thread.sleep {
            let sleep = &Sleep {
                remaining_ns: sleep.remaining_ns.saturating_sub(late_ns),
                ..sleep
            };
            let host = host_of(blank, thread)?;
            let ends_ns = monotonic_ns() + sleep.remaining_ns;
            if let Some(address) = select_limit(sleep.number, sleep.arguments) {
                blank.limits.push((address, sleep.number, ends_ns));
                continue;
            }
            if let Some(answer) = sleeper::fall_asleep(blank, host, sleep)? {
                blank.slept.insert(host, answer);
            } else if let Some(registers) = from_words(&thread.registers) {
                remember(host, &registers, sleep.number, ends_ns);
            }
        }
    }
    steps::mark("sleepers");
    mappings::seal(blank)?;
    for (slot, thread) in essence.threads.iter().enumerate() {
        let mut registers = from_words(&thread.registers).ok_or(RestoreError::Unsound {
            pid,
            why: "registers are missing",
        })?;
        let stopped = Stopped::assume(host_of(blank, thread)?);
        if let Some(answer) = blank.slept.get(&stopped.tid()) {
            (registers.rax, registers.orig_rax) = (*answer as u64, u64::MAX);
        }
        // They are set when it may run: until then it waits in the loop, whatever becomes of this daemon.
        let held = Held {
            tid: stopped.tid(),
            mask: thread.mask,
            registers,
        };
        blank.foothold.arena.hold(slot, &held);
        blank.loaded.insert(stopped.tid(), registers);
        stopped
            .set_xstate(&thread.xstate)
            .during(pid, "setting the extended state")?;
    }
    steps::mark("extended state");
    Ok(())
}

/// What a thread can only set for itself.
fn add_settings(script: &mut Script<'_>, pid: Pid, thread: &ThreadImage, essence: &Essence, cookie: u64) {
    let name = script.text(&thread.comm);
    script.call("prctl", SYS_PRCTL, &[PR_SET_NAME, name.address, 0, 0, 0]);
    let [pointer, flags, size] = thread.alt_stack;
    if flags & SS_DISABLE == 0 && size != 0 {
        // SS_ONSTACK is a report, not a request.
        let stack = script.bytes(&[pointer, flags & !1, size].map(u64::to_le_bytes).concat());
        script.attempt("sigaltstack", SYS_SIGALTSTACK, &[stack.address, 0]);
    }
    script.call("set_tid_address", SYS_SET_TID_ADDRESS, &[thread.clear_tid]);
    let [head, length] = thread.robust_list;
    if length != 0 {
        script.call("set_robust_list", SYS_SET_ROBUST_LIST, &[head, length]);
    }
    if thread.rseq.is_some_and(|area| is_here(essence, area)) {
        add_rseq(script, thread);
    }
    if thread.parent_death_signal != 0 {
        script.attempt(
            "prctl",
            SYS_PRCTL,
            &[PR_SET_PDEATHSIG, thread.parent_death_signal as u64, 0, 0, 0],
        );
    }
    signals::add_pending(script, pid, Some(thread.tid), &thread.pending, cookie);
    if thread.tid == pid {
        signals::add_pending(script, pid, None, &essence.signals.pending, cookie);
    }
}

/// How long ago the essence was taken, by the process's own clock.
fn late_ns(blank: &Blank, essence: &Essence) -> u64 {
    let [now, _] = clocks(&ProcDir::process(blank.host));
    u64::try_from(now - essence.clocks_ns[0]).unwrap_or(0)
}

/// Waits until the process's clocks have reached what it saw last: they are set by a measurement that is as good as the
/// network, and must not go backwards.
pub fn wait_for_clocks(blank: &Blank, essence: &Essence) -> Result<(), RestoreError> {
    const PATIENCE: Duration = Duration::from_millis(500);
    let dir = ProcDir::process(blank.host);
    let deadline = Instant::now() + PATIENCE;
    while clocks(&dir)
        .iter()
        .zip(&essence.clocks_ns)
        .any(|(now, then)| now < then)
    {
        if Instant::now() > deadline {
            return Err(RestoreError::Unsound {
                pid: blank.pid,
                why: "its clocks are ahead of this node's",
            });
        }
    }
    Ok(())
}

/// Registers the rseq areas whose pages did not come with the essence (they were elsewhere themselves): the kernel reads
/// and writes there at once, so that the pager must serve by now.
pub fn register_rest(blank: &Blank, essence: &Essence) -> Result<(), RestoreError> {
    for thread in &essence.threads {
        if thread.rseq.is_some_and(|area| !is_here(essence, area)) {
            tracing::debug!(tid = %thread.tid, "an rseq area comes by demand");
            let mut script = Script::new(&blank.foothold.arena);
            add_rseq(&mut script, thread);
            blank.run(host_of(blank, thread)?, script, "registering its rseq area")?;
        }
    }
    Ok(())
}

fn is_here(essence: &Essence, [area, length, _]: [u64; 3]) -> bool {
    let holds = |address: u64| {
        // They ascend.
        [&essence.hot_pages, &essence.file_pages].iter().any(|runs| {
            let after = runs.partition_point(|run| run.address <= address);
            let run = after.checked_sub(1).map(|at| &runs[at]);
            run.is_some_and(|run| address < run.address + run.bytes.len() as u64)
        })
    };
    holds(area) && holds(area + length.saturating_sub(1))
}

fn add_rseq(script: &mut Script<'_>, thread: &ThreadImage) {
    if let Some([area, length, signature]) = thread.rseq {
        script.call("rseq", SYS_RSEQ, &[area, length, 0, signature]);
    }
}

/// Scheduling, affinity and the like, set from outside.
fn manner(blank: &Blank, host: i32, thread: &ThreadImage) -> Result<(), RestoreError> {
    let pid = blank.pid;
    if inspect::schedule(host).during(pid, "reading its scheduling")? != thread.schedule {
        inspect::set_schedule(host, thread.schedule).during(pid, "setting its scheduling")?;
    }
    if let Some(mask) = &thread.affinity {
        // Where none of its CPUs exists the affinity makes no sense: it may use all.
        let _ = inspect::set_affinity(host, mask);
    }
    if inspect::io_priority(host).during(pid, "reading its I/O priority")? != thread.io_priority {
        inspect::set_io_priority(host, thread.io_priority).during(pid, "setting its I/O priority")?;
    }
    if thread.timer_slack_ns != 50_000 {
        let _ = std::fs::write(format!("/proc/{host}/timerslack_ns"), thread.timer_slack_ns.to_string());
    }
    Ok(())
}

/// The last stores, then all threads run. A process that is stopped is so already: its parent, which may run by now, may
/// have it go on.
pub fn resume(blank: &Blank, essence: &Essence) -> Result<(), RestoreError> {
    let pid = blank.pid;
    let actions = &essence.signals.actions;
    let last_stores = |thread: &ThreadImage| {
        let stopped = Stopped::assume(host_of(blank, thread)?);
        let registers = blank.loaded.get(&stopped.tid()).ok_or(RestoreError::Unsound {
            pid,
            why: "a thread that was never loaded",
        })?;
        stopped.set_registers(registers).during(pid, "setting registers")?;
        stopped
            .set_signal_mask(thread.mask)
            .during(pid, "setting the signal mask")
    };
    lower_limits(blank, essence);
    // The loop goes when none but the first is in it.
    let others = essence.threads.iter().filter(|thread| thread.tid != pid);
    others.into_iter().try_for_each(last_stores)?;
    steps::mark("last stores");
    let leader = Trap::of(actions)
        .put_back(blank.leader(), &blank.foothold, actions)
        .during(pid, "setting the action of SIGTRAP")?;
    // Should this daemon die between here and the last store, the next one finds the thread in its refuge.
    let held = first_thread(blank, essence)?;
    let mut trodden = None;
    if let Some(refuge) = &blank.refuge {
        trodden = refuge
            .enter(&leader, blank.host, &held, Others::Stopped)
            .during(pid, "entering its refuge")?;
    }
    let leader = blank.foothold.uproot(leader).during(pid, "taking the loop out")?;
    steps::mark("taking the loop out");
    leader
        .set_signal_mask(held.mask)
        .during(pid, "setting the signal mask")?;
    leader.set_registers(&held.registers).during(pid, "setting registers")?;
    if let Some(trodden) = trodden {
        trodden.smooth(blank.host);
    }
    let hosts: Vec<i32> = blank
        .threads
        .values()
        .copied()
        .filter(|host| *host != leader.tid())
        .collect();
    for thread in essence.threads.iter().filter(|thread| thread.sleep.is_some()) {
        let_go(blank.host, host_of(blank, thread)?);
    }
    leader.detach(0).during(pid, "letting it run")?;
    for host in hosts {
        match Stopped::assume(host).detach(0) {
            // The program runs, and may have ended already.
            Err(TraceError::Gone { .. }) => {}
            done => done.during(pid, "letting it run")?,
        }
    }
    steps::mark("letting it run");
    Ok(())
}

/// select(2) and its like begin anew with what the kernel noted when they were stopped: time has passed since.
fn lower_limits(blank: &Blank, essence: &Essence) {
    let now = monotonic_ns();
    for (address, number, ends_ns) in &blank.limits {
        let left = ends_ns.saturating_sub(now);
        let (seconds, nanos) = (left / 1_000_000_000, left % 1_000_000_000);
        let words = [seconds, nanos / select_unit_ns(*number)].map(u64::to_le_bytes);
        // One whose page is elsewhere would keep all threads waiting for it.
        if is_here(essence, [*address, 16, 0])
            && let Err(error) = blank.memory.write_all_at(&words.concat(), *address)
        {
            tracing::debug!(%error, "a select(2) takes longer by the length of the freeze");
        }
    }
}

/// What the first thread is to be.
fn first_thread(blank: &Blank, essence: &Essence) -> Result<Held, RestoreError> {
    let mask = essence.threads.iter().find(|thread| thread.tid == blank.pid);
    match (mask.map(|thread| thread.mask), blank.loaded.get(&blank.host)) {
        (Some(mask), Some(registers)) => Ok(Held {
            tid: blank.host,
            mask,
            registers: *registers,
        }),
        _ => Err(RestoreError::Unsound {
            pid: blank.pid,
            why: "a thread that was never loaded",
        }),
    }
}

fn host_of(blank: &Blank, thread: &ThreadImage) -> Result<i32, RestoreError> {
    blank.threads.get(&thread.tid).copied().ok_or(RestoreError::Unsound {
        pid: blank.pid,
        why: "a thread that was never made",
    })
}
