//! Ends timed calls that were begun anew, when the time is over that was left of them.
//!
//! A call that our stop has ended (see [`super::ended`]) is made again with all of its time, which no one but the
//! program may change: it is in the program's memory, or in a register that the program may look at again. So somebody
//! else watches the clock: when the time is over and the thread is still in that very call, it is stopped once more and
//! told that the time is over. Owns the clock and the one thread that does this. Invariants: a thread that has run since,
//! or is in another call, is left alone; nothing is done to a process that is [claimed](claim) by whoever captures it.

use super::{ended, finish_write, sleep};
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Running, Stop, TraceError};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

/// When it is tried again to end a call in whose way something is for a moment.
const PAUSE: Duration = Duration::from_millis(2);
/// So often.
const TRIES: u32 = 500;
const PATIENCE: Duration = Duration::from_secs(10);

/// A call that is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    at_ns: u64,
    process: i32,
    tid: i32,
    /// As the call is remembered.
    ends_ns: u64,
    tries: u32,
}

#[derive(Default)]
struct Diary {
    due: BTreeSet<Due>,
    claimed: BTreeMap<i32, u32>,
}

static DIARY: Mutex<Diary> = Mutex::new(Diary {
    due: BTreeSet::new(),
    claimed: BTreeMap::new(),
});
static BELL: Condvar = Condvar::new();
/// Held while a thread is traced here.
static ACTING: Mutex<()> = Mutex::new(());
static START: Once = Once::new();

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A process that someone else traces, as long as this lives.
#[derive(Debug)]
pub struct Claim(i32);

/// Claims a process; when this returns none of its threads is traced here.
pub fn claim(process: i32) -> Claim {
    *lock(&DIARY).claimed.entry(process).or_default() += 1;
    drop(lock(&ACTING));
    Claim(process)
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut diary = lock(&DIARY);
        if let Some(count) = diary.claimed.get_mut(&self.0) {
            *count -= 1;
            if *count == 0 {
                diary.claimed.remove(&self.0);
            }
        }
    }
}

/// The call in which a thread is about to be let go ends at `ends_ns` (CLOCK_MONOTONIC).
pub(super) fn schedule(process: i32, tid: i32, ends_ns: u64) {
    START.call_once(|| {
        let started = std::thread::Builder::new().name("dunlin-waker".into()).spawn(work);
        if let Err(error) = started {
            tracing::warn!(%error, "timed calls that a move interrupts will take their time anew");
        }
    });
    let due = Due {
        at_ns: ends_ns,
        process,
        tid,
        ends_ns,
        tries: 0,
    };
    lock(&DIARY).due.insert(due);
    BELL.notify_one();
}

fn work() {
    loop {
        let due = next();
        let acting = lock(&ACTING);
        let again = if lock(&DIARY).claimed.contains_key(&due.process) {
            // However long that takes.
            Some(0)
        } else {
            match end(&due) {
                Ok(true) => None,
                Ok(false) => Some(due.tries + 1),
                Err(TraceError::Gone { .. }) => None,
                Err(error) => {
                    tracing::debug!(tid = due.tid, %error, "a timed call is not ended");
                    None
                }
            }
        };
        drop(acting);
        if let Some(tries) = again.filter(|tries| *tries < TRIES) {
            let at_ns = sleep::monotonic_ns() + PAUSE.as_nanos() as u64;
            lock(&DIARY).due.insert(Due { at_ns, tries, ..due });
        }
    }
}

/// Waits for the next call to end.
fn next() -> Due {
    let mut diary = lock(&DIARY);
    loop {
        let now = sleep::monotonic_ns();
        let Some(first) = diary.due.first().copied() else {
            diary = BELL.wait(diary).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        if first.at_ns <= now {
            diary.due.pop_first();
            return first;
        }
        let left = Duration::from_nanos(first.at_ns - now);
        (diary, _) = BELL.wait_timeout(diary, left).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Ends the call if the thread is still in it; `false`: not yet.
fn end(due: &Due) -> Result<bool, TraceError> {
    let Due { process, tid, .. } = *due;
    match sleep::is_still_in(process, tid, due.ends_ns) {
        sleep::Whereabouts::Elsewhere => return Ok(true),
        sleep::Whereabouts::OnItsWay => return Ok(false),
        sleep::Whereabouts::InIt => {}
    }
    let running = match Running::seize(tid, Default::default()) {
        Ok(running) => running,
        // Somebody else has it for a moment: whoever let it go a moment ago, or a debugger.
        Err(TraceError::Refused { .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    let (thread, stop) = running.stop(Instant::now() + PATIENCE)?;
    let (registers, mask) = (thread.registers()?, thread.signal_mask()?);
    let leader_mask = ProcDir::process(process).status().map_or(0, |status| status.blocked);
    let again = ended::made_again(&registers)
        .filter(|_| stop == Stop::Interrupt && !ended::is_signalled(process, tid, mask, leader_mask));
    let mut registers = registers;
    if let Some(again) = again {
        registers = again;
        if sleep::is_remembered(tid, &again, due.ends_ns) {
            registers = ended::interrupted(&again);
            registers.rax = ended::answer(again.rax as i64) as u64;
            registers.orig_rax = u64::MAX;
        }
        thread.set_registers(&registers)?;
    } else if let Ok(memory) = File::open(ProcDir::process(process).path("mem"))
        && finish_write(
            dunlin_sys::ptrace::Stopped::assume(tid),
            process,
            &mut registers,
            mask,
            &memory,
        )
        .is_err()
    {
        tracing::warn!(tid, "a write that was interrupted is not completed");
    }
    thread.detach(0)?;
    Ok(true)
}
