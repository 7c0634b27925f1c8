//! Syscall scripts: system calls that a traced thread makes for itself, as data.
//!
//! Owns the records and buffers that a script puts into its [`Arena`], the run, and the answers.
//! Refuses to know what the calls are for. Invariants: after every run the
//! caller's registers are back, so that a tracer that dies leaves the thread where it was; if it dies during a run, the
//! thread waits at the script's end; what it was is told by the arena's [held](Arena::hold) threads; a thread with its
//! stack at the [landing](Arena::landing) comes to the same place from a call that is injected into it; a child made by a
//! record marked [`Script::child_parks`] waits in `pause` for ever; a record of an arena is run by one thread.

pub use crate::arena::{ARENA_BYTES, Arena, Held, MAX_HELD, MAX_LENT, NOTE_WORDS, PAGE};

use crate::arena::{DONE_AT, HELD_AT, LEND_AT, RECORD_BYTES};
use crate::ptrace::{Event, Registers, Running, Stop, Stopped, TraceError};
use std::sync::atomic::Ordering;

const MUST_SUCCEED: u64 = 1 << 32;
/// So long a thread stays awake at the end of its script, until the tracer has seen that it is over.
pub(crate) const SPINS_AT_END: u64 = 4000;
const CHILD_PARKS: u64 = 2 << 32;
const CHILD_LENDS: u64 = 4 << 32;

/// A record of a script, to ask for its answer later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call(usize);

/// Bytes that live in the arena while the script runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Where the target sees them.
    pub address: u64,
    pub(crate) offset: u64,
    length: usize,
}

/// System calls to be made by a target, in order.
#[derive(Debug)]
pub struct Script<'a> {
    arena: &'a Arena,
    records: Vec<[u64; 8]>,
    names: Vec<&'static str>,
    /// Buffers grow down from the arena's end, records up from its second page.
    low: u64,
}

/// Why a script did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// A call that must succeed failed; the calls after it were not made.
    #[error("{name} in the target: {errno}")]
    Call {
        /// The system call.
        name: &'static str,
        /// Which record.
        index: usize,
        /// The kernel's answer.
        errno: crate::Errno,
    },
    /// The thread could not be traced.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// It is larger than an arena: an address space or a descriptor table beyond every bound.
    #[error("a script of {records} calls does not fit its arena")]
    TooLarge {
        /// How many calls.
        records: usize,
    },
}

/// What the calls of a script answered.
#[derive(Debug)]
pub struct Answers<'a> {
    arena: &'a Arena,
    stopped_by: Option<i32>,
}

impl Answers<'_> {
    /// The raw answer of one call (negative: an error number).
    pub fn of(&self, call: Call) -> i64 {
        self.arena.answer(call.0 as u64)
    }

    /// The signal by which the process was stopped (group-stop) when the script ended.
    pub fn stopped_by(&self) -> Option<i32> {
        self.stopped_by
    }

    /// The bytes of a buffer as they are now.
    pub fn bytes(&self, buffer: Buffer) -> Vec<u8> {
        self.arena.read(buffer.offset, buffer.length)
    }
}

impl<'a> Script<'a> {
    /// An empty script over an arena whose earlier script has been read.
    pub fn new(arena: &'a Arena) -> Script<'a> {
        Script {
            arena,
            records: Vec::new(),
            names: Vec::new(),
            low: HELD_AT,
        }
    }

    /// How many calls it has.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether it has no call.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Whether a few hundred more calls and buffers still fit; if not, run it and start another.
    pub fn has_room(&self) -> bool {
        PAGE + (self.records.len() as u64 + 1024) * RECORD_BYTES + (256 << 10) < self.low
    }

    /// Adds a call that must succeed.
    pub fn call(&mut self, name: &'static str, number: i64, arguments: &[u64]) -> Call {
        self.record(name, number as u64 | MUST_SUCCEED, arguments)
    }

    /// Adds a call that may fail.
    pub fn attempt(&mut self, name: &'static str, number: i64, arguments: &[u64]) -> Call {
        self.record(name, number as u64, arguments)
    }

    /// Adds a clone whose child waits in `pause` for ever.
    pub fn child_parks(&mut self, name: &'static str, number: i64, arguments: &[u64]) -> Call {
        self.record(name, number as u64 | MUST_SUCCEED | CHILD_PARKS, arguments)
    }

    /// Adds a clone whose child lends its memory to whoever has the other end of the socket that is its descriptor 0, by
    /// the pipe of which descriptor 3 is the end for writing (see [`crate::lending`]). Without them it waits in `pause`.
    pub fn child_lends(&mut self, name: &'static str, number: i64, arguments: &[u64]) -> Call {
        self.record(name, number as u64 | MUST_SUCCEED | CHILD_LENDS, arguments)
    }

    fn record(&mut self, name: &'static str, number: u64, arguments: &[u64]) -> Call {
        let mut record = [0u64; 8];
        record[0] = number;
        record[1..1 + arguments.len()].copy_from_slice(arguments);
        self.records.push(record);
        self.names.push(name);
        Call(self.records.len() - 1)
    }

    /// Puts bytes where the target can read and write them.
    pub fn bytes(&mut self, bytes: &[u8]) -> Buffer {
        let buffer = self.space(bytes.len());
        if buffer.offset >= PAGE {
            self.arena.write(buffer.offset, bytes);
        }
        buffer
    }

    /// Puts a C string there.
    pub fn text(&mut self, text: &[u8]) -> Buffer {
        let mut bytes = text.to_vec();
        bytes.push(0);
        self.bytes(&bytes)
    }

    /// Reserves bytes that the target will write. What they hold before is undefined.
    pub fn space(&mut self, length: usize) -> Buffer {
        self.low = (self.low.saturating_sub(length as u64)) & !15;
        Buffer {
            address: self.arena.base() + self.low,
            offset: self.low,
            length,
        }
    }

    /// Runs the script in a stopped thread and hands the thread back, stopped, with its registers as before.
    ///
    /// The caller has blocked all of the thread's signals but SIGTRAP. A SIGSTOP that comes meanwhile takes effect at once,
    /// as ever, and the script runs on nevertheless: let go, the thread is stopped.
    pub fn run(self, thread: Stopped) -> Result<(Stopped, Answers<'a>), ScriptError> {
        let before = thread.registers()?;
        let (thread, outcome) = self.run_from(thread, &before)?;
        thread.set_registers(&before)?;
        outcome.map(|answers| (thread, answers))
    }

    /// Stores the script and points a stopped thread at it, without running it. Its registers are lost.
    pub fn start(self, thread: &Stopped) -> Result<(), ScriptError> {
        let before = thread.registers()?;
        self.store(thread, &before).map(|_| ())
    }

    /// What the first call of the script that ran last answered.
    pub fn first_answer(&self) -> i64 {
        self.arena.answer(0)
    }

    /// Like [`Script::run`], for a blank whose registers do not matter: they are the loop's afterwards.
    pub fn run_in_blank(self, thread: Stopped) -> Result<(Stopped, Answers<'a>), ScriptError> {
        let before = thread.registers()?;
        let (thread, outcome) = self.run_from(thread, &before)?;
        outcome.map(|answers| (thread, answers))
    }

    fn store(&self, thread: &Stopped, before: &Registers) -> Result<u64, ScriptError> {
        let count = self.records.len() as u64;
        self.write_records()?;
        self.arena.word(DONE_AT).store(0, Ordering::Release);
        let done = self.arena.base() + DONE_AT;
        thread.set_registers(&self.entry(before, 0, count, done, SPINS_AT_END))?;
        Ok(count)
    }

    /// Puts the records where the target can read them.
    pub(crate) fn write_records(&self) -> Result<(), ScriptError> {
        let count = self.records.len() as u64;
        if PAGE + count * RECORD_BYTES > self.low {
            return Err(ScriptError::TooLarge {
                records: self.records.len(),
            });
        }
        for (index, record) in self.records.iter().enumerate() {
            let mut bytes = [0u8; RECORD_BYTES as usize];
            for (to, word) in bytes.chunks_exact_mut(8).zip(record) {
                to.copy_from_slice(&word.to_le_bytes());
            }
            self.arena.write(PAGE + index as u64 * RECORD_BYTES, &bytes);
        }
        Ok(())
    }

    /// What the calls have answered, once all have been made.
    pub(crate) fn answers(&self, stopped_by: Option<i32>) -> Answers<'a> {
        Answers {
            arena: self.arena,
            stopped_by,
        }
    }

    /// The registers with which a thread makes `count` calls from the `first` on.
    pub(crate) fn entry(&self, before: &Registers, first: usize, count: u64, done: u64, spins: u64) -> Registers {
        Registers {
            rip: self.arena.base(),
            rbx: self.arena.base() + PAGE + first as u64 * RECORD_BYTES,
            r12: count,
            r13: done,
            r14: spins,
            r15: self.arena.base() + LEND_AT,
            // No restart logic of an interrupted call may move the instruction pointer.
            orig_rax: u64::MAX,
            rax: 0,
            ..*before
        }
    }

    /// The error that this call was.
    pub(crate) fn failed_at(&self, index: usize) -> ScriptError {
        let errno = crate::Errno(-self.arena.answer(index as u64) as i32);
        let name = self.names.get(index).copied().unwrap_or("?");
        ScriptError::Call { name, index, errno }
    }

    #[allow(clippy::type_complexity)] // one pair, used by the two functions above
    fn run_from(
        self,
        thread: Stopped,
        before: &Registers,
    ) -> Result<(Stopped, Result<Answers<'a>, ScriptError>), ScriptError> {
        let count = self.store(&thread, before)?;
        let (thread, stopped_by) = self.await_end(thread.resume(0)?)?;
        let left = thread.registers()?.r12;
        if left == 0 {
            return Ok((thread, Ok(self.answers(stopped_by))));
        }
        let index = (count - left.min(count)) as usize;
        Ok((thread, Err(self.failed_at(index))))
    }

    /// Waits until the script is over, and stops the thread. Also tells what its process is stopped by, apart from this.
    fn await_end(&self, mut running: Running) -> Result<(Stopped, Option<i32>), ScriptError> {
        let tid = running.tid();
        let mut turns = 0u32;
        while self.arena.word(DONE_AT).load(Ordering::Acquire) == 0 {
            turns = turns.saturating_add(1);
            rest(turns);
            if !looks(turns) {
                continue;
            }
            running = match running.poll()? {
                Err(still) => still,
                Ok(Event::Ended(_)) => return Err(TraceError::Gone { tid }.into()),
                Ok(Event::Stopped(thread, Stop::Cloned(_) | Stop::Interrupt | Stop::Syscall | Stop::Group(_))) => {
                    thread.resume(0)?
                }
                Ok(Event::Stopped(thread, Stop::Signal(libc::SIGSTOP))) => thread.resume(libc::SIGSTOP)?,
                Ok(Event::Stopped(thread, stop @ (Stop::Exec | Stop::Signal(_)))) => {
                    return Err(thread.unexpected(stop).into());
                }
            };
        }
        running.interrupt()?;
        loop {
            running = match running.wait()? {
                Event::Ended(_) => return Err(TraceError::Gone { tid }.into()),
                Event::Stopped(thread, Stop::Interrupt) => return Ok((thread, None)),
                // Of a process that is stopped already, an interruption is reported as its group-stop.
                Event::Stopped(thread, Stop::Group(signal)) => return Ok((thread, Some(signal))),
                Event::Stopped(thread, Stop::Cloned(_) | Stop::Syscall) => thread.resume(0)?,
                Event::Stopped(thread, Stop::Signal(libc::SIGSTOP)) => thread.resume(libc::SIGSTOP)?,
                Event::Stopped(thread, stop @ (Stop::Exec | Stop::Signal(_))) => {
                    return Err(thread.unexpected(stop).into());
                }
            };
        }
    }
}

/// Waits a little for a thread that is in the loop. Awake at first; then it may be this CPU that the thread wants. (To
/// yield is no help: on a busy machine that gives the CPU to whoever else runs, for a whole slice.)
pub(crate) fn rest(turns: u32) {
    const SPINS: u32 = 640;
    const NAP: std::time::Duration = std::time::Duration::from_micros(15);
    if turns < SPINS {
        std::hint::spin_loop();
    } else {
        std::thread::sleep(NAP);
    }
}

/// Whether it is time to see what has become of the thread otherwise.
pub(crate) fn looks(turns: u32) -> bool {
    turns.is_multiple_of(128) || turns > 700
}
