//! What only the process itself can be asked: a script of queries and the reading of its answers.
//!
//! Owns the query records. Refuses to change anything in the target.

use dunlin_proto::image::{Signals, Timer};
use dunlin_sys::procfs::fdinfo::PosixTimer;
use dunlin_sys::script::{Answers, Buffer, Call, Script};

const PR_GET_PDEATHSIG: u64 = 2;
const PR_GET_DUMPABLE: u64 = 3;
const PR_GET_SECUREBITS: u64 = 27;
const PR_GET_CHILD_SUBREAPER: u64 = 37;
const PR_GET_TID_ADDRESS: u64 = 40;
const PR_GET_THP_DISABLE: u64 = 42;
const SYS_RT_SIGACTION: i64 = 13;
const SYS_BRK: i64 = 12;
const SYS_GETITIMER: i64 = 36;
const SYS_PRCTL: i64 = 157;
const SYS_SIGALTSTACK: i64 = 131;
const SYS_TIMER_GETTIME: i64 = 224;
const SYS_TIMER_GETOVERRUN: i64 = 225;

/// Queries about the process, in one script.
pub struct ProcessQuestions {
    actions: Buffer,
    interval: Buffer,
    timers: Vec<(PosixTimer, Call, Buffer, Call)>,
    brk: Call,
    dumpable: Call,
    securebits: Call,
    thp: Call,
    subreaper: Buffer,
}

/// What it answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessAnswers {
    /// Signals and timers; the pending ones and the timers' threads are filled in by the caller.
    pub signals: Signals,
    /// Host numbers of the threads that timers signal, in the order of `signals.timers`.
    pub timer_threads: Vec<i32>,
    /// The program break.
    pub brk: u64,
    /// PR_GET_DUMPABLE.
    pub dumpable: u32,
    /// PR_GET_SECUREBITS.
    pub securebits: u32,
    /// PR_GET_THP_DISABLE.
    pub thp_disable: bool,
    /// PR_GET_CHILD_SUBREAPER.
    pub subreaper: bool,
}

impl ProcessQuestions {
    /// Adds the queries to a script.
    pub fn ask(script: &mut Script<'_>, timers: &[PosixTimer]) -> ProcessQuestions {
        let actions = script.space(64 * 32);
        for signal in 1..=64u64 {
            let into = actions.address + (signal - 1) * 32;
            script.call("rt_sigaction", SYS_RT_SIGACTION, &[signal, 0, into, 8]);
        }
        let interval = script.space(3 * 32);
        for which in 0..3 {
            script.call("getitimer", SYS_GETITIMER, &[which, interval.address + which * 32]);
        }
        let timers = timers
            .iter()
            .map(|timer| {
                let spec = script.space(32);
                let id = timer.id as u64;
                let time = script.attempt("timer_gettime", SYS_TIMER_GETTIME, &[id, spec.address]);
                let overrun = script.attempt("timer_getoverrun", SYS_TIMER_GETOVERRUN, &[id]);
                (*timer, time, spec, overrun)
            })
            .collect();
        let subreaper = script.bytes(&[0; 4]);
        script.attempt(
            "prctl",
            SYS_PRCTL,
            &[PR_GET_CHILD_SUBREAPER, subreaper.address, 0, 0, 0],
        );
        ProcessQuestions {
            actions,
            interval,
            timers,
            brk: script.call("brk", SYS_BRK, &[0]),
            dumpable: script.attempt("prctl", SYS_PRCTL, &[PR_GET_DUMPABLE, 0, 0, 0, 0]),
            securebits: script.attempt("prctl", SYS_PRCTL, &[PR_GET_SECUREBITS, 0, 0, 0, 0]),
            thp: script.attempt("prctl", SYS_PRCTL, &[PR_GET_THP_DISABLE, 0, 0, 0, 0]),
            subreaper,
        }
    }

    /// Reads the answers.
    pub fn read(&self, answers: &Answers<'_>) -> ProcessAnswers {
        let actions = words(&answers.bytes(self.actions));
        let interval = words(&answers.bytes(self.interval));
        let timers = self.timers.iter().filter(|(_, time, ..)| answers.of(*time) == 0);
        let read_timer = |(timer, _, spec, overrun): &(PosixTimer, Call, Buffer, Call)| {
            let spec = words(&answers.bytes(*spec));
            Timer {
                id: timer.id,
                clock: timer.clock,
                notify: timer.notify,
                signal: timer.signal,
                value: timer.value,
                thread: None,
                interval_ns: spec[0] * 1_000_000_000 + spec[1],
                remaining_ns: spec[2] * 1_000_000_000 + spec[3],
                overrun: answers.of(*overrun).max(0) as i32,
            }
        };
        ProcessAnswers {
            signals: Signals {
                actions: actions.chunks_exact(4).map(|a| [a[0], a[1], a[2], a[3]]).collect(),
                pending: Vec::new(),
                interval_timers: [0, 1, 2].map(|which| {
                    let t = &interval[which * 4..which * 4 + 4];
                    [t[0] * 1_000_000 + t[1], t[2] * 1_000_000 + t[3]]
                }),
                timers: timers.clone().map(read_timer).collect(),
            },
            timer_threads: timers
                .map(|(timer, ..)| if timer.notify & 4 != 0 { timer.target } else { 0 })
                .collect(),
            brk: answers.of(self.brk) as u64,
            dumpable: answers.of(self.dumpable).max(0) as u32,
            securebits: answers.of(self.securebits).max(0) as u32,
            thp_disable: answers.of(self.thp) == 1,
            subreaper: answers.bytes(self.subreaper)[0] != 0,
        }
    }
}

/// Queries about the thread that runs the script.
pub struct ThreadQuestions {
    alt_stack: Buffer,
    clear_tid: Buffer,
    death: Buffer,
}

/// What it answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadAnswers {
    /// `stack_t`: pointer, flags, size.
    pub alt_stack: [u64; 3],
    /// set_tid_address(2).
    pub clear_tid: u64,
    /// PR_GET_PDEATHSIG.
    pub parent_death_signal: i32,
}

impl ThreadQuestions {
    /// Adds the queries to a script.
    pub fn ask(script: &mut Script<'_>) -> ThreadQuestions {
        let alt_stack = script.space(24);
        let clear_tid = script.bytes(&[0; 8]);
        let death = script.bytes(&[0; 4]);
        script.call("sigaltstack", SYS_SIGALTSTACK, &[0, alt_stack.address]);
        script.attempt("prctl", SYS_PRCTL, &[PR_GET_TID_ADDRESS, clear_tid.address, 0, 0, 0]);
        script.attempt("prctl", SYS_PRCTL, &[PR_GET_PDEATHSIG, death.address, 0, 0, 0]);
        ThreadQuestions {
            alt_stack,
            clear_tid,
            death,
        }
    }

    /// Reads the answers.
    pub fn read(&self, answers: &Answers<'_>) -> ThreadAnswers {
        let stack = words(&answers.bytes(self.alt_stack));
        let death = answers.bytes(self.death);
        ThreadAnswers {
            // The flags are an int: what follows it is padding.
            alt_stack: [stack[0], stack[1] & 0xffff_ffff, stack[2]],
            clear_tid: words(&answers.bytes(self.clear_tid))[0],
            parent_death_signal: i32::from_le_bytes([death[0], death[1], death[2], death[3]]),
        }
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|word| u64::from_le_bytes(*word))
        .collect()
}
