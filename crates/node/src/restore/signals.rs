//! Signals and timers of a blank.
//!
//! Owns dispositions, pending signals with their payload, and both kinds of timers. Invariant: all signals but SIGTRAP
//! are blocked while anything here runs, so that what is made pending stays pending.

use super::{Blank, During, RestoreError};
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{Signals, Timer};
use dunlin_sys::ptrace::Stopped;
use dunlin_sys::script::Script;

const SYS_RT_SIGACTION: i64 = 13;
const SYS_SETITIMER: i64 = 38;
const SYS_RT_SIGQUEUEINFO: i64 = 129;
const SYS_PRCTL: i64 = 157;
const SYS_TIMER_CREATE: i64 = 222;
const SYS_TIMER_SETTIME: i64 = 223;
const SYS_TIMER_DELETE: i64 = 226;
const SYS_RT_TGSIGQUEUEINFO: i64 = 297;
const SIGKILL: u64 = 9;
const SIGSTOP: u64 = 19;
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
/// Without PR_TIMER_CREATE_RESTORE_IDS (Linux 6.15) numbers are counted up to the wanted one.
const MAX_COUNTED_TIMERS: i32 = 1000;

/// Sets the dispositions that are not as they were set before (all of them without a before).
pub fn set_actions(blank: &Blank, before: Option<&[[u64; 4]]>, actions: &[[u64; 4]]) -> Result<(), RestoreError> {
    if actions.len() != 64 {
        return Err(RestoreError::Unsound {
            pid: blank.pid,
            why: "not 64 signal actions",
        });
    }
    let mut script = Script::new(&blank.foothold.arena);
    for (signal, action) in (1u64..).zip(actions) {
        let unchanged = before.is_some_and(|before| before.get(signal as usize - 1) == Some(action));
        if signal == SIGKILL || signal == SIGSTOP || unchanged {
            continue;
        }
        let bytes: Vec<u8> = action.iter().flat_map(|word| word.to_le_bytes()).collect();
        let action = script.bytes(&bytes);
        script.call("rt_sigaction", SYS_RT_SIGACTION, &[signal, action.address, 0, 8]);
    }
    blank.run(blank.host, script, "setting signal actions")
}

/// Makes signals pending again: for the process, or for the thread that runs the script.
pub fn add_pending(script: &mut Script<'_>, process: Pid, thread: Option<Pid>, pending: &[Vec<u8>], cookie: u64) {
    for info in pending {
        let Some(signal) = info.first_chunk::<4>().map(|word| i32::from_le_bytes(*word)) else {
            continue;
        };
        let info = script.bytes(info);
        let (process, signal) = (process.0 as u64, signal as u64);
        match thread {
            None => {
                let arguments = [process, signal, info.address, 0, 0, cookie];
                script.attempt("rt_sigqueueinfo", SYS_RT_SIGQUEUEINFO, &arguments);
            }
            Some(thread) => {
                let arguments = [process, thread.0 as u64, signal, info.address, 0, cookie];
                script.attempt("rt_tgsigqueueinfo", SYS_RT_TGSIGQUEUEINFO, &arguments);
            }
        }
    }
}

/// Makes the timers; the first thread runs this.
///
/// `late_ns`: how long ago their state was read.
pub fn set_timers(blank: &Blank, signals: &Signals, late_ns: u64) -> Result<(), RestoreError> {
    /// CLOCK_PROCESS_CPUTIME_ID and CLOCK_THREAD_CPUTIME_ID, which stand still in a freeze; others are negative.
    const CPU_CLOCKS: [i32; 2] = [2, 3];
    for timer in &signals.timers {
        let mut timer = timer.clone();
        let stands_still = timer.clock < 0 || CPU_CLOCKS.contains(&timer.clock);
        if timer.remaining_ns != 0 && !stands_still {
            timer.remaining_ns = timer.remaining_ns.saturating_sub(late_ns).max(1);
        }
        make_timer(blank, &timer)?;
    }
    let mut script = Script::new(&blank.foothold.arena);
    for (which, [interval, value]) in (0u64..).zip(&signals.interval_timers) {
        if *value == 0 && *interval == 0 {
            continue;
        }
        // While its signal is pending, the kernel shows a periodic ITIMER_REAL with nothing left, and sets it going again
        // when the signal is taken. Set to nothing here, it would be off.
        let value = match (which, *value) {
            (0, 0) => *interval,
            (0, left) => left.saturating_sub(late_ns / 1000).max(1),
            (_, left) => left,
        };
        let words = [
            interval / 1_000_000,
            interval % 1_000_000,
            value / 1_000_000,
            value % 1_000_000,
        ];
        let value = script.bytes(&words.map(u64::to_le_bytes).concat());
        script.call("setitimer", SYS_SETITIMER, &[which, value.address, 0]);
    }
    blank.run(blank.host, script, "setting interval timers")
}

fn make_timer(blank: &Blank, timer: &Timer) -> Result<(), RestoreError> {
    let pid = blank.pid;
    for _ in 0..=MAX_COUNTED_TIMERS {
        let mut script = Script::new(&blank.foothold.arena);
        script.attempt("prctl", SYS_PRCTL, &[PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0]);
        let mut event = [0u8; 64];
        event[..8].copy_from_slice(&timer.value.to_le_bytes());
        event[8..12].copy_from_slice(&timer.signal.to_le_bytes());
        event[12..16].copy_from_slice(&timer.notify.to_le_bytes());
        event[16..20].copy_from_slice(&timer.thread.map_or(0, |t| t.0).to_le_bytes());
        let event = script.bytes(&event);
        let id = script.bytes(&timer.id.to_le_bytes());
        script.call(
            "timer_create",
            SYS_TIMER_CREATE,
            &[timer.clock as u64, event.address, id.address],
        );
        script.attempt("prctl", SYS_PRCTL, &[PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0]);
        let (_, answers) = script.run(Stopped::assume(blank.host)).during(pid, "making a timer")?;
        let made = answers.bytes(id);
        let made = i32::from_le_bytes([made[0], made[1], made[2], made[3]]);
        let mut script = Script::new(&blank.foothold.arena);
        if made != timer.id {
            script.call("timer_delete", SYS_TIMER_DELETE, &[made as u64]);
            blank.run(blank.host, script, "counting timers")?;
            continue;
        }
        let nanos = 1_000_000_000;
        let words = [
            timer.interval_ns / nanos,
            timer.interval_ns % nanos,
            timer.remaining_ns / nanos,
            timer.remaining_ns % nanos,
        ];
        let spec = script.bytes(&words.map(u64::to_le_bytes).concat());
        script.call(
            "timer_settime",
            SYS_TIMER_SETTIME,
            &[timer.id as u64, 0, spec.address, 0],
        );
        return blank.run(blank.host, script, "setting a timer");
    }
    Err(RestoreError::Unsound {
        pid,
        why: "a timer's number cannot be had on this kernel",
    })
}
