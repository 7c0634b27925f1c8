//! A thread that slept at the freeze falls asleep again, for what was left.
//!
//! The kernel restarts a relative sleep from a block that only the sleeping task has. So the restored thread makes the
//! same call itself, with the remaining time, from the loop; it is interrupted once it sleeps, and its registers then
//! say −516 as they did at the source: when the thread runs on, the kernel restarts the sleep from the block of this
//! call. Owns that manoeuvre. Refuses to sleep longer than what was left. See restart_syscall(2).

use super::{Blank, During, RestoreError};
use dunlin_proto::image::Sleep;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Event, Running, Stop, Stopped, TraceError};
use dunlin_sys::script::Script;
use std::time::{Duration, Instant};

const SYS_POLL: i64 = 7;
const SYS_NANOSLEEP: i64 = 35;
const SYS_FUTEX: i64 = 202;
const SYS_CLOCK_NANOSLEEP: i64 = 230;
const FUTEX_WAIT_BITSET: u64 = 9;
const ERESTART_RESTARTBLOCK: i64 = -516;
const PATIENCE: Duration = Duration::from_millis(50);

/// Lets the thread enter the sleep and stops it there. Hands back the answer of a sleep that was over before that.
pub fn fall_asleep(blank: &Blank, host: i32, sleep: &Sleep) -> Result<Option<i64>, RestoreError> {
    let pid = blank.pid;
    let mut script = Script::new(&blank.foothold.arena);
    let Some(arguments) = arguments(&mut script, sleep) else {
        return Ok(None);
    };
    script.attempt("sleep", sleep.number, &arguments);
    script.start(&Stopped::assume(host)).during(pid, "falling asleep")?;
    let mut running = Stopped::assume(host).resume(0).during(pid, "falling asleep")?;
    let deadline = Instant::now() + PATIENCE;
    let dir = ProcDir::process(host);
    loop {
        running = match running.poll().during(pid, "falling asleep")? {
            Ok(Event::Stopped(..)) => break,
            Ok(Event::Ended(_)) => return Err(RestoreError::Died(pid)),
            Err(still) => still,
        };
        if dir.bytes("stat").is_ok_and(|stat| is_asleep(&stat)) || Instant::now() > deadline {
            stop(running, deadline + PATIENCE).during(pid, "falling asleep")?;
            take_trap(host).during(pid, "falling asleep")?;
            break;
        }
    }
    let now = Stopped::assume(host).registers().during(pid, "reading registers")?;
    // Not in the call any more: the loop has stored its answer.
    Ok((now.rax as i64 != ERESTART_RESTARTBLOCK).then(|| Script::new(&blank.foothold.arena).first_answer()))
}

/// The call's arguments with the remaining time; `None` for a call that cannot be made again.
fn arguments(script: &mut Script<'_>, sleep: &Sleep) -> Option<[u64; 6]> {
    let (seconds, nanos) = (sleep.remaining_ns / 1_000_000_000, sleep.remaining_ns % 1_000_000_000);
    let left = script.bytes(&[seconds, nanos].map(u64::to_le_bytes).concat());
    let mut arguments = sleep.arguments;
    match sleep.number {
        SYS_NANOSLEEP => arguments[0] = left.address,
        SYS_CLOCK_NANOSLEEP => arguments[2] = left.address,
        // Rounded up: never shorter than what was left.
        SYS_POLL if (arguments[2] as i32) >= 0 => arguments[2] = sleep.remaining_ns.div_ceil(1_000_000),
        SYS_POLL => {}
        SYS_FUTEX if arguments[1] & 0x7f == FUTEX_WAIT_BITSET || arguments[3] == 0 => {}
        SYS_FUTEX => arguments[3] = left.address,
        _ => return None,
    }
    Some(arguments)
}

fn stop(running: Running, deadline: Instant) -> Result<(), TraceError> {
    running.interrupt()?;
    let mut running = running;
    loop {
        match running.wait_until(Some(deadline))? {
            Event::Ended(_) => return Ok(()),
            Event::Stopped(_, Stop::Interrupt | Stop::Group(_) | Stop::Signal(_)) => return Ok(()),
            Event::Stopped(thread, Stop::Syscall | Stop::Cloned(_) | Stop::Exec) => running = thread.resume(0)?,
        }
    }
}

/// A sleep that ended by itself has come to the breakpoint at the script's end just when it was interrupted: the kernel
/// reports the interruption first and keeps the SIGTRAP, which would end the program when it runs on.
fn take_trap(host: i32) -> Result<(), TraceError> {
    const SIGTRAP: i32 = 5;
    let pending = Stopped::assume(host).pending_signals(false)?;
    if !pending.iter().any(|info| info.starts_with(&SIGTRAP.to_le_bytes())) {
        return Ok(());
    }
    let mut running = Stopped::assume(host).resume(0)?;
    loop {
        match running.wait_until(Some(Instant::now() + PATIENCE))? {
            Event::Ended(_) | Event::Stopped(_, Stop::Signal(SIGTRAP)) => return Ok(()),
            Event::Stopped(thread, _) => running = thread.resume(0)?,
        }
    }
}

fn is_asleep(stat: &[u8]) -> bool {
    let after_name = stat.iter().rposition(|b| *b == b')').map(|at| &stat[at + 1..]);
    after_name.is_some_and(|rest| rest.starts_with(b" S") || rest.starts_with(b" D"))
}
