//! Relative sleeps under way: what is left of them.
//!
//! A thread that is stopped inside nanosleep(2), poll(2) or a futex wait with a relative timeout shows −516
//! (ERESTART_RESTARTBLOCK): the kernel alone knows when it will end, and tells nobody. Owns the recovery of the
//! remainder: from the remainder that the kernel wrote for the program where the program asked for it, otherwise from
//! the moment at which the thread was last on a CPU, which is when it fell asleep. Refuses to shorten a sleep: where the
//! moment is not certain the sleep is taken to have just begun. See restart_syscall(2), sched(7) (`se.exec_start`).

use super::{ended, waker};
use dunlin_proto::image::Sleep;
use dunlin_sys::inspect;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::Registers;
use rustix::time::{ClockId, clock_gettime};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

const ERESTART_RESTARTBLOCK: i64 = -516;
const ERESTARTNOHAND: i64 = -514;
const SYS_POLL: i64 = 7;
const SYS_SELECT: i64 = 23;
const SYS_NANOSLEEP: i64 = 35;
const SYS_FUTEX: i64 = 202;
const SYS_RESTART: i64 = 219;
const SYS_CLOCK_NANOSLEEP: i64 = 230;
const SYS_PSELECT6: i64 = 270;
const SYS_PPOLL: i64 = 271;
const FUTEX_WAIT_BITSET: u64 = 9;

/// Addresses, a page apart at most, of what the kernel reads from the program when the call is made again, and writes to it
/// when that is interrupted.
pub fn reads(sleep: &Sleep) -> Vec<u64> {
    const POLLFD: u64 = 8;
    let [first, count, third, fourth, ..] = sleep.arguments;
    match sleep.number {
        SYS_FUTEX => vec![first, fourth],
        SYS_NANOSLEEP => vec![count],
        SYS_CLOCK_NANOSLEEP => vec![third, fourth],
        SYS_POLL => {
            let length = count.saturating_mul(POLLFD).min(1 << 20);
            (0..length)
                .step_by(4096)
                .chain([length.saturating_sub(1)])
                .map(|at| first.saturating_add(at))
                .collect()
        }
        number => {
            let limit = select_limit(number, sleep.arguments);
            limit.into_iter().chain(ended::reads(number, sleep.arguments)).collect()
        }
    }
}

/// Where a call keeps what is left of its time for the program to see, if it is one that does.
pub fn select_limit(number: i64, arguments: [u64; 6]) -> Option<u64> {
    match number {
        SYS_SELECT | SYS_PSELECT6 => Some(arguments[4]),
        SYS_PPOLL => Some(arguments[2]),
        _ => None,
    }
}

/// How long a nanosecond is in the second word of such a limit.
pub fn select_unit_ns(number: i64) -> u64 {
    if number == SYS_SELECT { 1000 } else { 1 }
}

/// What was known of a thread before it was stopped.
#[derive(Debug, Clone, Copy)]
pub struct Before {
    exec_start_ns: u64,
    run_ns: u64,
    voluntary_switches: u64,
    cpu: u32,
}

/// A sleep that goes on by restart_syscall(2), because it was interrupted before: by an earlier stop of this move, by a
/// move that was given up, by the move that brought the process here.
#[derive(Debug, Clone, Copy)]
struct Known {
    number: i64,
    ends_ns: u64,
    /// Where it goes on, and its arguments: another call of the same thread differs in one of them, or was not
    /// interrupted yet and says itself what it is.
    place: (u64, [u64; 6]),
    /// How often the thread had gone to sleep, and how long it had run, when it was let go in a call that is made again.
    let_go: Option<(u64, u64)>,
}

/// A thread that has run no longer than this since it was let go has made its call again and nothing else.
const MADE_AGAIN_WITHIN_NS: u64 = 100_000;

impl Known {
    /// How often the thread has gone to sleep since it was let go, if it has done nothing but that; `stops` times because
    /// it was stopped.
    fn slept(&self, now: Before, stops: u64) -> Option<u64> {
        let (switches, run_ns) = self.let_go?;
        let slept = now.voluntary_switches.checked_sub(switches + stops)?;
        (slept <= 1 && now.run_ns.saturating_sub(run_ns) <= MADE_AGAIN_WITHIN_NS).then_some(slept)
    }
}

/// Where a thread is that was let go in a call which is made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whereabouts {
    /// It has not come to the call yet.
    OnItsWay,
    /// In that call.
    InIt,
    /// It has done something else since.
    Elsewhere,
}

/// Known sleeps, by the thread's number on this machine. The kernel tells nobody which call a restarted one was.
static KNOWN: Mutex<BTreeMap<i32, Known>> = Mutex::new(BTreeMap::new());
/// Above this many, those of threads that have ended are forgotten.
const MAX_KNOWN: usize = 4096;

/// The sleeps of one process, from stop to stop.
#[derive(Debug, Default)]
pub struct Sleeps {
    before: BTreeMap<i32, Before>,
    /// CLOCK_MONOTONIC minus the scheduler's clock, by CPU.
    offsets: BTreeMap<u32, i64>,
}

impl Sleeps {
    /// Looks at a thread that is about to be stopped.
    pub fn look(&mut self, process: i32, tid: i32) {
        if let Some(before) = read_sched(process, tid) {
            self.before.insert(tid, before);
        }
    }

    /// Reads the clocks of the CPUs on which the threads were last, so that this does not fall into a freeze.
    pub fn prepare(&mut self) {
        let cpus: BTreeSet<u32> = self.before.values().map(|before| before.cpu).collect();
        for cpu in cpus {
            let _ = self.offset(cpu);
        }
    }

    /// What a stopped thread sleeps in, if it does.
    pub fn find(&mut self, process: i32, tid: i32, registers: &Registers, memory: &File) -> Option<Sleep> {
        let now = monotonic_ns();
        let arguments = arguments_of(registers);
        match registers.rax as i64 {
            ERESTART_RESTARTBLOCK => {}
            ERESTARTNOHAND => return select_left(registers, memory),
            _ => return None,
        }
        let (number, ends_ns) = match (registers.orig_rax as i64, known(tid, registers)) {
            (SYS_RESTART, Some(known)) => (known.number, known.ends_ns),
            // Somebody else interrupted it before us (SIGSTOP, a debugger): as long as possible is safest.
            (SYS_RESTART, None) => {
                let number = number_in_code(registers.rip, memory).unwrap_or(SYS_RESTART);
                (number, self.ends(process, tid, number, arguments, now, memory))
            }
            (number, _) => (number, self.ends(process, tid, number, arguments, now, memory)),
        };
        remember(tid, registers, number, ends_ns);
        Some(Sleep {
            number,
            arguments,
            remaining_ns: ends_ns.saturating_sub(now),
        })
    }

    /// Registers with which a stopped thread makes the call again that the stop has ended, or that it was about to make
    /// again after the stop before.
    pub fn again(&self, process: i32, tid: i32, registers: &Registers) -> Option<Registers> {
        ended::made_again(registers).or_else(|| {
            let known = known(tid, registers)?;
            let on_its_way = known.number == registers.rax as i64 && registers.orig_rax == u64::MAX;
            (on_its_way && known.slept(read_sched(process, tid)?, 1) == Some(0)).then_some(*registers)
        })
    }

    /// As [`Sleeps::find`], for a stopped thread that makes a call again with these registers.
    pub fn find_ended(&mut self, process: i32, tid: i32, again: &Registers, memory: &File) -> Option<Sleep> {
        let (number, arguments, now) = (again.rax as i64, arguments_of(again), monotonic_ns());
        let length = ended::length_ns(process, number, arguments, memory)?;
        // The very one that was made again before?
        let sched = read_sched(process, tid);
        let is_same = |known: &Known| known.number == number && sched.and_then(|now| known.slept(now, 1)).is_some();
        let ends_ns = match known(tid, again).filter(is_same) {
            Some(known) => known.ends_ns,
            None => self.began(process, tid, now).saturating_add(length),
        };
        remember(tid, again, number, ends_ns);
        Some(Sleep {
            number,
            arguments,
            remaining_ns: ends_ns.saturating_sub(now),
        })
    }

    fn ends(&mut self, process: i32, tid: i32, number: i64, arguments: [u64; 6], now: u64, memory: &File) -> u64 {
        let timespec = |address: u64| ended::timespec(memory, address);
        let (length, remainder) = match number {
            SYS_NANOSLEEP => (timespec(arguments[0]), arguments[1]),
            SYS_CLOCK_NANOSLEEP => (timespec(arguments[2]), arguments[3]),
            SYS_POLL => (u64::try_from(arguments[2] as i32).ok().map(|ms| ms * 1_000_000), 0),
            SYS_FUTEX if arguments[1] & 0x7f == FUTEX_WAIT_BITSET => (Some(0), 0),
            SYS_FUTEX => (timespec(arguments[3]), 0),
            _ => (None, 0),
        };
        if remainder != 0
            && let Some(left) = timespec(remainder)
        {
            return now + left;
        }
        self.began(process, tid, now) + length.unwrap_or(0)
    }

    /// When the thread fell asleep; `now` where that is not certain.
    fn began(&mut self, process: i32, tid: i32, now: u64) -> u64 {
        let (Some(before), Some(after)) = (self.before.get(&tid).copied(), read_sched(process, tid)) else {
            return now;
        };
        // One voluntary switch since we looked: the stop itself. More: it slept anew after we looked.
        if after.voluntary_switches != before.voluntary_switches + 1 {
            return now;
        }
        match self.offset(before.cpu) {
            Some(offset) => ((before.exec_start_ns as i64 + offset) as u64).min(now),
            None => now,
        }
    }

    fn offset(&mut self, cpu: u32) -> Option<i64> {
        if let Some(offset) = self.offsets.get(&cpu) {
            return Some(*offset);
        }
        let home = inspect::affinity(0).ok()?;
        let mut mask = vec![0u8; cpu as usize / 8 + 1];
        mask[cpu as usize / 8] = 1 << (cpu % 8);
        inspect::set_affinity(0, &mask).ok()?;
        // Yielding brings the scheduler's own record of us up to date.
        std::thread::yield_now();
        let now = monotonic_ns();
        let own = std::fs::read_to_string("/proc/thread-self/sched").ok();
        let _ = inspect::set_affinity(0, &home);
        let offset = now as i64 - parse_sched(&own?)?.0 as i64;
        self.offsets.insert(cpu, offset);
        Some(offset)
    }
}

fn arguments_of(registers: &Registers) -> [u64; 6] {
    let r = registers;
    [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9]
}

fn known(tid: i32, registers: &Registers) -> Option<Known> {
    let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner).get(&tid).copied();
    known.filter(|k| k.place == (registers.rip, arguments_of(registers)))
}

/// Notes that a thread, when it runs on with these registers, goes on with a sleep by restart_syscall(2).
pub fn remember(tid: i32, registers: &Registers, number: i64, ends_ns: u64) {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if known.len() > MAX_KNOWN {
        known.retain(|tid, _| ProcDir::process(*tid).path("stat").exists());
    }
    let place = (registers.rip, arguments_of(registers));
    let known_sleep = Known {
        number,
        ends_ns,
        place,
        let_go: None,
    };
    known.insert(tid, known_sleep);
}

/// A stopped thread is about to be let go, in a call that is made again and was [remembered](remember): its end is seen to.
pub fn let_go(process: i32, tid: i32) {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = known.get_mut(&tid).filter(|known| ended::is_one(known.number)) {
        known.let_go = read_sched(process, tid).map(|sched| (sched.voluntary_switches, sched.run_ns));
        waker::schedule(process, tid, known.ends_ns);
    }
}

/// Is a thread, which runs, still in the call that ends then?
pub fn is_still_in(process: i32, tid: i32, ends_ns: u64) -> Whereabouts {
    let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner).get(&tid).copied();
    let known = known.filter(|known| known.ends_ns == ends_ns);
    let (Some(known), Some(sched)) = (known, read_sched(process, tid)) else {
        return Whereabouts::Elsewhere;
    };
    let in_call = || {
        let text = ProcDir::thread(process, tid).text("syscall").ok()?;
        let mut words = text.split_ascii_whitespace();
        let number: i64 = words.next()?.parse().ok()?;
        let mut rest = words.map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16));
        let arguments: Vec<u64> = rest.by_ref().take(6).collect::<Result<_, _>>().ok()?;
        let rip = rest.nth(1)?.ok()?;
        let place = (rip.checked_sub(2)?, arguments.try_into().ok()?);
        Some(number == known.number && place == known.place)
    };
    match known.slept(sched, 0) {
        Some(0) => Whereabouts::OnItsWay,
        Some(_) if in_call() == Some(true) => Whereabouts::InIt,
        Some(_) | None => Whereabouts::Elsewhere,
    }
}

/// Is this, in which a thread was stopped, the call that ends then?
pub fn is_remembered(tid: i32, again: &Registers, ends_ns: u64) -> bool {
    known(tid, again).is_some_and(|known| known.number == again.rax as i64 && known.ends_ns == ends_ns)
}

/// What the kernel itself has noted for the program of the time that is left.
fn select_left(registers: &Registers, memory: &File) -> Option<Sleep> {
    let (number, arguments) = (registers.orig_rax as i64, arguments_of(registers));
    let address = select_limit(number, arguments).filter(|address| *address != 0)?;
    let mut bytes = [0u8; 16];
    memory.read_exact_at(&mut bytes, address).ok()?;
    let [seconds, part] = [0, 8].map(|at| bytes[at..at + 8].try_into().map_or(0, u64::from_le_bytes));
    let nanos = part.saturating_mul(select_unit_ns(number));
    Some(Sleep {
        number,
        arguments,
        remaining_ns: seconds.saturating_mul(1_000_000_000).saturating_add(nanos),
    })
}

/// The call's number where the code before it is as compilers write it: `mov eax, NUMBER; syscall`.
fn number_in_code(rip: u64, memory: &File) -> Option<i64> {
    let mut code = [0u8; 7];
    memory.read_exact_at(&mut code, rip.checked_sub(7)?).ok()?;
    let [0xb8, a, b, c, d, 0x0f, 0x05] = code else {
        return None;
    };
    Some(i64::from(i32::from_le_bytes([a, b, c, d])))
}

/// CLOCK_MONOTONIC of this process, nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn read_sched(process: i32, tid: i32) -> Option<Before> {
    let dir = ProcDir::thread(process, tid);
    let (exec_start_ns, run_ns, voluntary_switches) = parse_sched(&dir.text("sched").ok()?)?;
    Some(Before {
        exec_start_ns,
        run_ns,
        voluntary_switches,
        cpu: dir.stat().ok()?.processor,
    })
}

/// The scheduler's record of a thread: when it was last on a CPU, how long it has been on one (nanoseconds), how often it
/// went to sleep.
fn parse_sched(text: &str) -> Option<(u64, u64, u64)> {
    let value = |key: &str| {
        text.lines()
            .find(|l| l.starts_with(key))?
            .rsplit(':')
            .next()
            .map(str::trim)
    };
    let time = |key: &str| {
        let (millis, nanos) = value(key)?.split_once('.')?;
        Some(millis.parse::<u64>().ok()? * 1_000_000 + nanos.parse::<u64>().ok()?)
    };
    Some((
        time("se.exec_start")?,
        time("se.sum_exec_runtime")?,
        value("nr_voluntary_switches")?.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sched_is_read() {
        let text = "cat (1733, #threads: 1)\n---\nse.exec_start             :        971156.978116\n\
                    se.sum_exec_runtime       :             1.000020\n\
                    nr_voluntary_switches     :                    7\n";
        assert_eq!(parse_sched(text), Some((971_156_978_116, 1_000_020, 7)));
    }
}
