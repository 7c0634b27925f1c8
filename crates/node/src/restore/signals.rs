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
const CLOCK_MONOTONIC: i32 = 1;
const SIGEV_NONE: i32 = 1;
/// Without PR_TIMER_CREATE_RESTORE_IDS (Linux 6.15) a process's timers are numbered from 0 on, and no number comes twice
/// before all have come: so many are counted, at about a microsecond each.
const MAX_COUNTED_TIMERS: i32 = 1 << 20;

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
    let mut timers: Vec<&Timer> = signals.timers.iter().collect();
    // Where they are counted, the lower ones come first.
    timers.sort_by_key(|timer| timer.id);
    for timer in timers {
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

/// Counts up to the number of its first timer, while there is time: where numbers cannot be chosen that takes long.
pub fn count_ahead(blank: &Blank, signals: &Signals) -> Result<(), RestoreError> {
    let Some(first) = signals.timers.iter().map(|timer| timer.id).min() else {
        return Ok(());
    };
    // The number 0 is lost by the look.
    if first == 0 || chooses_numbers(blank)? {
        return Ok(());
    }
    let none = Timer {
        notify: SIGEV_NONE,
        clock: CLOCK_MONOTONIC,
        ..signals.timers[0].clone()
    };
    let made = create(blank, &none)?;
    delete(blank, made)?;
    count(blank, made.saturating_add(1), first)
}

/// Can a timer be given its number on this kernel?
fn chooses_numbers(blank: &Blank) -> Result<bool, RestoreError> {
    const GET: u64 = 2;
    let mut script = Script::new(&blank.foothold.arena);
    let asked = script.attempt("prctl", SYS_PRCTL, &[PR_TIMER_CREATE_RESTORE_IDS, GET, 0, 0, 0]);
    let (_, answers) = script
        .run(Stopped::assume(blank.host))
        .during(blank.pid, "asking how timers are numbered")?;
    Ok(answers.of(asked) >= 0)
}

fn make_timer(blank: &Blank, timer: &Timer) -> Result<(), RestoreError> {
    let made = create(blank, timer)?;
    if made != timer.id {
        delete(blank, made)?;
        count(blank, made.saturating_add(1), timer.id)?;
        let made = create(blank, timer)?;
        if made != timer.id {
            return Err(no_number(blank));
        }
    }
    let nanos = 1_000_000_000;
    let words = [
        timer.interval_ns / nanos,
        timer.interval_ns % nanos,
        timer.remaining_ns / nanos,
        timer.remaining_ns % nanos,
    ];
    let mut script = Script::new(&blank.foothold.arena);
    let spec = script.bytes(&words.map(u64::to_le_bytes).concat());
    script.call(
        "timer_settime",
        SYS_TIMER_SETTIME,
        &[timer.id as u64, 0, spec.address, 0],
    );
    blank.run(blank.host, script, "setting a timer")
}

/// Makes a timer, with its number if numbers can be chosen; the number that it has.
fn create(blank: &Blank, timer: &Timer) -> Result<i32, RestoreError> {
    let mut script = Script::new(&blank.foothold.arena);
    script.attempt("prctl", SYS_PRCTL, &[PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0]);
    let event = script.bytes(&event(timer));
    let id = script.bytes(&timer.id.to_le_bytes());
    script.call(
        "timer_create",
        SYS_TIMER_CREATE,
        &[timer.clock as u64, event.address, id.address],
    );
    script.attempt("prctl", SYS_PRCTL, &[PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0]);
    let (_, answers) = script
        .run(Stopped::assume(blank.host))
        .during(blank.pid, "making a timer")?;
    let made = answers.bytes(id);
    Ok(i32::from_le_bytes([made[0], made[1], made[2], made[3]]))
}

fn delete(blank: &Blank, id: i32) -> Result<(), RestoreError> {
    let mut script = Script::new(&blank.foothold.arena);
    script.call("timer_delete", SYS_TIMER_DELETE, &[id as u64]);
    blank.run(blank.host, script, "counting timers")
}

/// Has the numbers from `next` up to `wanted`, which comes next then.
fn count(blank: &Blank, next: i32, wanted: i32) -> Result<(), RestoreError> {
    if !(next..=next.saturating_add(MAX_COUNTED_TIMERS)).contains(&wanted) {
        return Err(no_number(blank));
    }
    let mut none = [0u8; 64];
    none[12..16].copy_from_slice(&SIGEV_NONE.to_le_bytes());
    let mut numbers = next..wanted;
    while !numbers.is_empty() {
        let mut script = Script::new(&blank.foothold.arena);
        let (event, id) = (script.bytes(&none), script.space(4));
        while script.has_room()
            && let Some(number) = numbers.next()
        {
            script.attempt(
                "timer_create",
                SYS_TIMER_CREATE,
                &[CLOCK_MONOTONIC as u64, event.address, id.address],
            );
            script.attempt("timer_delete", SYS_TIMER_DELETE, &[number as u64]);
        }
        blank.run(blank.host, script, "counting timers")?;
    }
    Ok(())
}

/// A `struct sigevent`.
fn event(timer: &Timer) -> [u8; 64] {
    let mut event = [0u8; 64];
    event[..8].copy_from_slice(&timer.value.to_le_bytes());
    event[8..12].copy_from_slice(&timer.signal.to_le_bytes());
    event[12..16].copy_from_slice(&timer.notify.to_le_bytes());
    event[16..20].copy_from_slice(&timer.thread.map_or(0, |t| t.0).to_le_bytes());
    event
}

fn no_number(blank: &Blank) -> RestoreError {
    RestoreError::Unsound {
        pid: blank.pid,
        why: "a timer's number cannot be had on this kernel (Linux 6.15 or newer gives any)",
    }
}
