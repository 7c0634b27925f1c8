//! Syscall scripts: system calls that a traced thread makes for itself, as data.
//!
//! Owns the loop (a few dozen instructions without a stack) that walks an array of records, and the [`Arena`]: a memfd
//! mapped by the tracer and by the target, whose first page is the loop and whose rest holds records and buffers.
//! Refuses to know what the calls are for. Invariants: the loop never returns into the program; after every run the
//! caller's registers are back, so that a tracer that dies leaves the thread where it was; if it dies during a run, the
//! thread waits at the script's end; what it was is told by the arena's [held](Arena::hold) threads; a thread with its
//! stack at the [landing](Arena::landing) comes to the same place from a call that is injected into it; a child made by a
//! record marked [`Script::child_parks`] waits in `pause` for ever; a record of an arena is run by one thread.

use crate::ptrace::{Event, Registers, Running, Stop, Stopped, TraceError};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

std::arch::global_asm!(
    ".pushsection .text.dunlin_script, \"ax\"",
    ".globl dunlin_script_begin",
    ".globl dunlin_script_park",
    ".globl dunlin_script_end",
    "dunlin_script_begin:",
    // rbx: the next record, r12: how many are left. Neither is changed by a system call.
    "2: test r12, r12",
    "   jz 5f",
    "   mov eax, dword ptr [rbx]",
    "   mov rdi, [rbx + 8]",
    "   mov rsi, [rbx + 16]",
    "   mov rdx, [rbx + 24]",
    "   mov r10, [rbx + 32]",
    "   mov r8, [rbx + 40]",
    "   mov r9, [rbx + 48]",
    // rbp: the record's marks. A child that shares this memory may run when the next script is already there.
    "   mov ebp, dword ptr [rbx + 4]",
    "   syscall",
    "   test rax, rax",
    "   jnz 3f",
    "   test ebp, 4",
    "   jnz 7f",
    "   test ebp, 2",
    "   jnz dunlin_script_park",
    "3: mov [rbx + 56], rax",
    "   cmp rax, -4095",
    "   jb 4f",
    "   test dword ptr [rbx + 4], 1",
    "   jnz 5f",
    "4: add rbx, 64",
    "   dec r12",
    "   jmp 2b",
    // r13: the word that says that the script is over; r14: for how many turns it stays awake then. The tracer stops the
    // thread meanwhile; if there is none any more, it waits, where a breakpoint would kill it.
    "5: mov qword ptr [r13], 1",
    "6: test r14, r14",
    "   jz dunlin_script_park",
    "   pause",
    "   dec r14",
    "   jmp 6b",
    "dunlin_script_park:",
    "   mov eax, 34",
    "   syscall",
    "   jmp dunlin_script_park",
    // A child that lends: whoever has the other end of its descriptor 0 sends an array of struct iovec; what they name goes
    // into the pipe behind its descriptor 3, not copied but lent, and vmsplice's answer back. r15: room for both.
    "7: xor eax, eax",
    "   xor edi, edi",
    "   mov rsi, r15",
    "   mov edx, {lend}",
    "   syscall",
    "   cmp rax, 16",
    "   jl dunlin_script_park",
    "   mov rdx, rax",
    "   shr rdx, 4",
    "   mov eax, {vmsplice}",
    "   mov edi, 3",
    "   mov rsi, r15",
    "   xor r10d, r10d",
    "   xor r9d, r9d",
    "   syscall",
    "   mov [r15 + {lend}], rax",
    "   mov eax, 1",
    "   xor edi, edi",
    "   lea rsi, [r15 + {lend}]",
    "   mov edx, 8",
    "   syscall",
    "   cmp rax, 8",
    "   je 7b",
    "   jmp dunlin_script_park",
    "dunlin_script_end:",
    ".popsection",
    lend = const LEND_BYTES,
    vmsplice = const libc::SYS_vmsplice,
);

unsafe extern "C" {
    static dunlin_script_begin: u8;
    static dunlin_script_park: u8;
    static dunlin_script_end: u8;
}

/// The loop's instructions, to be written to the first page of an arena.
fn code() -> &'static [u8] {
    // SAFETY: the three symbols bound one run of instructions in this program's own text.
    unsafe {
        let begin = &raw const dunlin_script_begin;
        std::slice::from_raw_parts(begin, (&raw const dunlin_script_end).offset_from(begin) as usize)
    }
}

fn park_offset() -> u64 {
    // SAFETY: both symbols lie in the same run of instructions.
    unsafe { (&raw const dunlin_script_park).offset_from(&raw const dunlin_script_begin) as u64 }
}

/// The size of a page.
pub const PAGE: u64 = 4096;
/// How much address space an arena takes in the target.
pub const ARENA_BYTES: u64 = 4 << 20;
const RECORD_BYTES: u64 = 64;
/// Behind scripts and buffers: a header, and what threads were before they were made to do something else.
const HELD_AT: u64 = ARENA_BYTES - (1 << 20);
const HEADER_BYTES: u64 = 256;
const HELD_BYTES: u64 = 256;
/// So many threads can be held.
pub const MAX_HELD: usize = ((LEND_AT - HELD_AT - HEADER_BYTES) / HELD_BYTES) as usize;
/// The last page: what a [lending](Script::child_lends) child is told and answers.
const LEND_AT: u64 = ARENA_BYTES - PAGE;
/// So many ranges of memory can be borrowed at once.
pub const MAX_LENT: usize = 64;
const LEND_BYTES: usize = MAX_LENT * size_of::<libc::iovec>();
const MAGIC: u64 = 0x616e_6572_6164_7564;
const DONE_AT: u64 = HELD_AT + 8;
/// So many words of the holder's own.
pub const NOTE_WORDS: usize = 8;
const NOTE_AT: u64 = HELD_AT + 64;
/// A word that says where the park is, and one for it to be taken from.
const LANDING_AT: u64 = HELD_AT + 192;
const REGISTER_WORDS: usize = size_of::<Registers>() / 8;
const MUST_SUCCEED: u64 = 1 << 32;
/// So long a thread stays awake at the end of its script, until the tracer has seen that it is over.
pub(crate) const SPINS_AT_END: u64 = 4000;
const CHILD_PARKS: u64 = 2 << 32;
const CHILD_LENDS: u64 = 4 << 32;

/// What a thread was before it was made to do something else.
#[derive(Debug, Clone, Copy)]
pub struct Held {
    /// The thread, by the tracer's numbering.
    pub tid: i32,
    /// Its blocked signals.
    pub mask: u64,
    /// Its registers.
    pub registers: Registers,
}

impl Held {
    /// The registers as words.
    pub fn words(&self) -> Vec<u64> {
        // SAFETY: the structure is as many words and has no padding.
        unsafe { std::slice::from_raw_parts((&raw const self.registers).cast::<u64>(), REGISTER_WORDS) }.to_vec()
    }

    /// A thread whose registers are these words; `None` for another count.
    pub fn from_words(tid: i32, mask: u64, words: &[u64]) -> Option<Held> {
        let words: [u64; REGISTER_WORDS] = words.try_into().ok()?;
        // SAFETY: the structure is as many words, and any words are registers.
        let registers = unsafe { std::mem::transmute::<[u64; REGISTER_WORDS], Registers>(words) };
        Some(Held { tid, mask, registers })
    }
}

/// Memory shared by the tracer and one target, with the loop in it.
#[derive(Debug)]
pub struct Arena {
    memory: NonNull<u8>,
    memfd: OwnedFd,
    base: u64,
}

// SAFETY: the mapping belongs to the arena alone; moving it to another thread moves the only handle.
unsafe impl Send for Arena {}

impl Arena {
    /// Maps an arena over a memfd that the target made (and that the tracer took from it), to be mapped by the target
    /// at `base`: the first page readable and executable, the rest readable and writable.
    pub fn over(memfd: OwnedFd, base: u64) -> std::io::Result<Arena> {
        ftruncate(&memfd, ARENA_BYTES)?;
        let arena = Arena::map(memfd, base)?;
        arena.write(0, code());
        arena.word(LANDING_AT).store(arena.park_address(), Ordering::Release);
        arena.word(HELD_AT).store(MAGIC, Ordering::Release);
        Ok(arena)
    }

    /// The arena that a former tracer has planted, by a descriptor of its memfd; `None` if it is no arena of this
    /// version.
    pub fn found(memfd: OwnedFd, base: u64) -> std::io::Result<Option<Arena>> {
        if rustix::fs::fstat(&memfd)?.st_size != ARENA_BYTES as i64 {
            return Ok(None);
        }
        let arena = Arena::map(memfd, base)?;
        let known = arena.word(HELD_AT).load(Ordering::Acquire) == MAGIC && arena.read(0, code().len()) == code();
        Ok(known.then_some(arena))
    }

    fn map(memfd: OwnedFd, base: u64) -> std::io::Result<Arena> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe {
            mmap(
                std::ptr::null_mut(),
                ARENA_BYTES as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &memfd,
                0,
            )?
        };
        let memory = NonNull::new(memory.cast()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Arena { memory, memfd, base })
    }

    /// Writes down what a thread is, before it is made to do something else: whoever finds the arena after the death of
    /// its tracer can put it back. Beyond [`MAX_HELD`] there is no room, and nothing is written.
    pub fn hold(&self, slot: usize, held: &Held) {
        if slot >= MAX_HELD {
            return;
        }
        let at = HELD_AT + HEADER_BYTES + slot as u64 * HELD_BYTES;
        let word = |i: u64| self.word(at + 8 * i);
        word(0).store(0, Ordering::Release);
        word(1).store(held.mask, Ordering::Relaxed);
        for (i, value) in held.words().iter().enumerate() {
            word(2 + i as u64).store(*value, Ordering::Relaxed);
        }
        word(0).store(held.tid as u64, Ordering::Release);
    }

    /// All threads are what they were.
    pub fn release(&self) {
        for slot in 0..MAX_HELD as u64 {
            let word = self.word(HELD_AT + HEADER_BYTES + slot * HELD_BYTES);
            if word.load(Ordering::Relaxed) == 0 {
                return;
            }
            word.store(0, Ordering::Release);
        }
    }

    /// The threads that are held.
    pub fn held(&self) -> Vec<Held> {
        let mut all = Vec::new();
        for slot in 0..MAX_HELD as u64 {
            let at = HELD_AT + HEADER_BYTES + slot * HELD_BYTES;
            let word = |i: u64| self.word(at + 8 * i).load(Ordering::Acquire);
            if word(0) == 0 {
                break;
            }
            let mut words = [0u64; REGISTER_WORDS];
            words.iter_mut().zip(2..).for_each(|(to, i)| *to = word(i));
            all.extend(Held::from_words(word(0) as i32, word(1), &words));
        }
        all
    }

    /// Words that whoever finds the arena must know.
    pub fn note(&self, words: [u64; NOTE_WORDS]) {
        for (i, word) in words.into_iter().enumerate() {
            self.word(NOTE_AT + 8 * i as u64).store(word, Ordering::Release);
        }
    }

    /// What was noted.
    pub fn noted(&self) -> [u64; NOTE_WORDS] {
        std::array::from_fn(|i| self.word(NOTE_AT + 8 * i as u64).load(Ordering::Acquire))
    }

    /// The first call of the script that was stored last, with its arguments, and its answer.
    pub fn first_call(&self) -> (i64, [u64; 6], i64) {
        let word = |i: u64| self.word(PAGE + 8 * i).load(Ordering::Acquire);
        let arguments = std::array::from_fn(|i| word(1 + i as u64));
        (i64::from(word(0) as u32), arguments, word(7) as i64)
    }

    /// Is this address in the loop? A thread that is there does not do what it did.
    pub fn is_inside(&self, rip: u64) -> bool {
        (self.base..self.base + PAGE).contains(&rip)
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= ARENA_BYTES, "a word past the arena");
        // SAFETY: an aligned word inside the mapping (asserted), which lives as long as `self`; the target may write it.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().add(at as usize).cast()) }
    }

    /// An arena over a memfd of the tracer's own.
    pub fn new(base: u64) -> std::io::Result<Arena> {
        Arena::over(memfd_create("dunlin-script", MemfdFlags::CLOEXEC)?, base)
    }

    /// The memfd behind it.
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// Where the target has it.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Where a thread waits for ever, in the target.
    pub fn park_address(&self) -> u64 {
        self.base + park_offset()
    }

    /// A stack from which a plain return leads to the park: that of a parked thread, so that a call that is injected
    /// into it ends there if its tracer dies meanwhile.
    pub fn landing(&self) -> u64 {
        self.base + LANDING_AT
    }

    /// Touches the first `bytes`, so that no first touch falls into a freeze.
    pub fn warm(&self, bytes: u64) {
        for page in (PAGE..bytes.min(ARENA_BYTES)).step_by(PAGE as usize) {
            let value = self.read(page, 1)[0];
            self.write(page, &[value]);
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= ARENA_BYTES, "a script outgrew its arena");
        // SAFETY: the range lies inside the mapping (asserted); the target does not run while the tracer writes.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.as_ptr().add(offset as usize), bytes.len());
        }
    }

    fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        assert!(offset + length as u64 <= ARENA_BYTES, "a read past the arena");
        let mut bytes = vec![0u8; length];
        // SAFETY: the range lies inside the mapping (asserted), and `bytes` is as long.
        unsafe {
            std::ptr::copy_nonoverlapping(self.memory.as_ptr().add(offset as usize), bytes.as_mut_ptr(), length);
        }
        bytes
    }

    /// Has the target set this word?
    pub(crate) fn is_set(&self, word: Buffer) -> bool {
        self.word(word.offset).load(Ordering::Acquire) != 0
    }

    fn answer(&self, record: u64) -> i64 {
        let at = PAGE + record * RECORD_BYTES + 56;
        // SAFETY: a record's answer is an aligned u64 inside the mapping; the target may have written it, hence atomic.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().add(at as usize).cast()) }.load(Ordering::Acquire) as i64
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: this mapping was made in `over` and nobody else has its address.
        let _ = unsafe { munmap(self.memory.as_ptr().cast(), ARENA_BYTES as usize) };
    }
}

/// A record of a script, to ask for its answer later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call(usize);

/// Bytes that live in the arena while the script runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Where the target sees them.
    pub address: u64,
    offset: u64,
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
            address: self.arena.base + self.low,
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
        let done = self.arena.base + DONE_AT;
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
            rip: self.arena.base,
            rbx: self.arena.base + PAGE + first as u64 * RECORD_BYTES,
            r12: count,
            r13: done,
            r14: spins,
            r15: self.arena.base + LEND_AT,
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
        let unexpected = |stop| Err(TraceError::Unexpected { tid, stop }.into());
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
                Ok(Event::Stopped(_, stop @ (Stop::Exec | Stop::Signal(_)))) => return unexpected(stop),
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
                Event::Stopped(_, stop @ (Stop::Exec | Stop::Signal(_))) => return unexpected(stop),
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
