//! The memory that scripts are in: shared by a tracer and one target.
//!
//! Owns the loop (a few dozen instructions without a stack) that walks an array of records, the memfd that both have mapped, and
//! the writing down of what threads were before they were made to do something else. Refuses to know what the records say.
//! Invariants: the loop never returns into the program; a tracer that dies leaves in the arena what puts its threads back; a
//! thread with its stack at the [landing](Arena::landing) comes to the park from a call that is injected into it.

use crate::ptrace::Registers;
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
pub(crate) const RECORD_BYTES: u64 = 64;
/// Behind scripts and buffers: a header, and what threads were before they were made to do something else.
pub(crate) const HELD_AT: u64 = ARENA_BYTES - (1 << 20);
const HEADER_BYTES: u64 = 256;
const HELD_BYTES: u64 = 256;
/// So many threads can be held.
pub const MAX_HELD: usize = ((LEND_AT - HELD_AT - HEADER_BYTES) / HELD_BYTES) as usize;
/// The last page: what a [lending](crate::script::Script::child_lends) child is told and answers.
pub(crate) const LEND_AT: u64 = ARENA_BYTES - PAGE;
/// So many ranges of memory can be borrowed at once.
pub const MAX_LENT: usize = 64;
const LEND_BYTES: usize = MAX_LENT * size_of::<libc::iovec>();
const MAGIC: u64 = 0x616e_6572_6164_7564;
pub(crate) const DONE_AT: u64 = HELD_AT + 8;
/// So many words of the holder's own.
pub const NOTE_WORDS: usize = 8;
const NOTE_AT: u64 = HELD_AT + 64;
/// A word that says where the park is, and one for it to be taken from.
const LANDING_AT: u64 = HELD_AT + 192;
const REGISTER_WORDS: usize = size_of::<Registers>() / 8;

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

    /// Is a thread with this instruction and stack pointer in the loop, or in a call from which it comes to the
    /// [landing](Arena::landing)? It does not do what it did.
    pub fn has(&self, rip: u64, rsp: u64) -> bool {
        (self.base..self.base + PAGE).contains(&rip) || (self.base..self.base + ARENA_BYTES).contains(&rsp)
    }

    pub(crate) fn word(&self, at: u64) -> &AtomicU64 {
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

    /// Tells it from every other arena of this machine, also from a later one at the same address.
    pub fn number(&self) -> std::io::Result<u64> {
        Ok(rustix::fs::fstat(&self.memfd)?.st_ino)
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

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= ARENA_BYTES, "a script outgrew its arena");
        // SAFETY: the range lies inside the mapping (asserted); the target does not run while the tracer writes.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.as_ptr().add(offset as usize), bytes.len());
        }
    }

    pub(crate) fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        assert!(offset + length as u64 <= ARENA_BYTES, "a read past the arena");
        let mut bytes = vec![0u8; length];
        // SAFETY: the range lies inside the mapping (asserted), and `bytes` is as long.
        unsafe {
            std::ptr::copy_nonoverlapping(self.memory.as_ptr().add(offset as usize), bytes.as_mut_ptr(), length);
        }
        bytes
    }

    /// Has the target set the word at this offset?
    pub(crate) fn is_set(&self, word: u64) -> bool {
        self.word(word).load(Ordering::Acquire) != 0
    }

    pub(crate) fn answer(&self, record: u64) -> i64 {
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
