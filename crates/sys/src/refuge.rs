//! A refuge: where a thread ends up that was made to do a call by a tracer that died meanwhile.
//!
//! A call that is injected through the vDSO's `syscall` instruction goes on, if nobody stops the thread after it, with
//! what follows that instruction: a return to whatever lies on the stack. So what lies there is the address of an
//! instruction that jumps to itself (two bytes, found somewhere in the program's own code), and behind it what the thread
//! was. Owns that frame, below the red zone of the thread's stack. Refuses to be used with a `syscall` instruction that is
//! followed by anything but a plain return. Invariants: a thread in a refuge spins, and runs nothing of the program; where
//! what is below the red zone may be somebody else's (Go's small stacks lie in its heap), it is written to only while all
//! threads are stopped, and put back.

use crate::procfs::{ProcDir, maps};
use crate::ptrace::{Registers, Stopped, TraceError};
use crate::script::Held;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

const JUMP_TO_ITSELF: [u8; 2] = [0xeb, 0xfe];
const SYSCALL: [u8; 2] = [0x0f, 0x05];
const MAGIC: u64 = 0x6567_7566_6572_6e64;
const SYS_MADVISE: i64 = 28;
const MADV_POPULATE_WRITE: u64 = 23;
const PAGE: u64 = 4096;
/// Below the stack pointer: the red zone, and the frame.
const BELOW: u64 = 128 + 512;
const REGISTER_WORDS: usize = size_of::<Registers>() / 8;
const FRAME_WORDS: usize = 3 + REGISTER_WORDS;
/// No more of the program's code is searched.
const MAX_SEARCH_BYTES: u64 = 16 << 20;
const CHUNK_BYTES: usize = 128 << 10;

/// One program's refuge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refuge {
    door: u64,
    syscall_at: u64,
    /// The stack that the kernel made: nobody else's memory is there.
    stack: Range<u64>,
}

/// What the other threads of the process do meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// They run.
    Run,
    /// They are stopped.
    Stopped,
}

/// Memory of the program in which a frame was laid.
#[derive(Debug)]
pub struct Trodden {
    at: u64,
    before: Vec<u8>,
}

impl Trodden {
    /// Puts it back; when the thread has its own registers again.
    pub fn smooth(self, process: i32) {
        let memory = File::options().write(true).open(ProcDir::process(process).path("mem"));
        // A process that is gone needs nothing.
        let _ = memory.and_then(|memory| memory.write_all_at(&self.before, self.at));
    }
}

impl Refuge {
    /// Looks for one in a running process; `None` if its code has no such instruction, or the call at `syscall_at` does
    /// not return plainly.
    pub fn find(process: i32, syscall_at: u64) -> io::Result<Option<Refuge>> {
        let dir = ProcDir::process(process);
        let memory = File::open(dir.path("mem"))?;
        let mut after = [0u8; 40];
        memory.read_exact_at(&mut after, syscall_at + 2)?;
        if !returns_plainly(&after) {
            return Ok(None);
        }
        let mappings = maps::parse(&dir.bytes("maps")?)?;
        let stack = mappings.iter().find(|m| m.name == b"[stack]");
        let stack = stack.map_or(0..0, |m| m.start..m.end);
        let mut left = MAX_SEARCH_BYTES;
        let mut chunk = vec![0u8; CHUNK_BYTES];
        for mapping in mappings.iter().filter(|m| m.execute && !m.shared && m.inode != 0) {
            let mut at = mapping.start;
            while at < mapping.end && left > 0 {
                let length = (mapping.end - at).min(CHUNK_BYTES as u64) as usize;
                if memory.read_exact_at(&mut chunk[..length], at).is_err() {
                    break;
                }
                if let Some(found) = chunk[..length].windows(2).position(|w| w == JUMP_TO_ITSELF) {
                    return Ok(Some(Refuge {
                        door: at + found as u64,
                        syscall_at,
                        stack,
                    }));
                }
                at += length as u64;
                left = left.saturating_sub(length as u64);
            }
        }
        Ok(None)
    }

    /// Whether it is in this memory: a process that has executed another program since has lost it.
    pub fn is_in(&self, memory: &File) -> bool {
        let mut code = [0u8; 40];
        memory.read_exact_at(&mut code[..2], self.door).is_ok()
            && code.starts_with(&JUMP_TO_ITSELF)
            && memory.read_exact_at(&mut code, self.syscall_at).is_ok()
            && code.starts_with(&SYSCALL)
            && returns_plainly(&code[SYSCALL.len()..])
    }

    /// Puts a stopped thread there, for the time of some injected calls; the caller puts its registers back, and then
    /// [smooths](Trodden::smooth) what comes back. Without a place to be had, it goes without. If the others are stopped, a
    /// page that is elsewhere (which nobody can write to from outside) is waited for: it must be able to come.
    pub fn enter(
        &self,
        thread: &Stopped,
        process: i32,
        held: &Held,
        others: Others,
    ) -> Result<Option<Trodden>, TraceError> {
        let frame_at = (held.registers.rsp.wrapping_sub(BELOW)) & !15;
        let mut words = vec![self.door, MAGIC, held.mask];
        words.extend(held.words());
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let is_free = self.stack.contains(&frame_at) && self.stack.contains(&held.registers.rsp);
        if !is_free && others == Others::Run {
            return Ok(None);
        }
        let write = || -> io::Result<Option<Trodden>> {
            let mut how = File::options();
            let memory = how.read(true).write(true).open(ProcDir::process(process).path("mem"))?;
            let mut door = [0u8; 2];
            memory.read_exact_at(&mut door, self.door)?;
            if door != JUMP_TO_ITSELF {
                return Err(io::ErrorKind::NotFound.into());
            }
            let mut before = vec![0u8; bytes.len()];
            memory.read_exact_at(&mut before, frame_at)?;
            memory.write_all_at(&bytes, frame_at)?;
            Ok((!is_free).then_some(Trodden { at: frame_at, before }))
        };
        let mut written = write();
        if written.is_err() && others == Others::Stopped {
            let first = frame_at & !(PAGE - 1);
            let bytes = (frame_at + bytes.len() as u64 - first).next_multiple_of(PAGE);
            let arguments = [first, bytes, MADV_POPULATE_WRITE, 0, 0, 0];
            Stopped::assume(thread.tid()).inject(self.syscall_at, SYS_MADVISE, arguments)?;
            written = write();
        }
        let Ok(trodden) = written else { return Ok(None) };
        thread.set_registers(&Registers {
            rip: self.door,
            rsp: frame_at,
            rax: 0,
            orig_rax: u64::MAX,
            ..held.registers
        })?;
        Ok(trodden)
    }

    /// What a stopped thread was before it came to a refuge; `None` if it is in none.
    pub fn escaped(thread: &Stopped, process: i32) -> Result<Option<Held>, TraceError> {
        let now = thread.registers()?;
        let look = || -> io::Result<Option<Held>> {
            let memory = File::open(ProcDir::process(process).path("mem"))?;
            let mut code = [0u8; 40];
            memory.read_exact_at(&mut code[..2], now.rip)?;
            let is_there = code.starts_with(&JUMP_TO_ITSELF);
            // Or on its way: it was stopped between the call and the return.
            if !is_there && (memory.read_exact_at(&mut code, now.rip).is_err() || !returns_plainly(&code)) {
                return Ok(None);
            }
            for frame_at in [now.rsp, now.rsp.wrapping_sub(8)] {
                let mut bytes = [0u8; 8 * FRAME_WORDS];
                memory.read_exact_at(&mut bytes, frame_at)?;
                let words: Vec<u64> = bytes
                    .as_chunks::<8>()
                    .0
                    .iter()
                    .map(|w| u64::from_le_bytes(*w))
                    .collect();
                let mut door = [0u8; 2];
                let leads_there = match is_there {
                    true => words[0] == now.rip,
                    false => memory.read_exact_at(&mut door, words[0]).is_ok() && door == JUMP_TO_ITSELF,
                };
                if words[1] == MAGIC && leads_there {
                    return Ok(Held::from_words(thread.tid(), words[2], &words[3..]));
                }
            }
            Ok(None)
        };
        // Nothing can be read where there is no frame.
        Ok(look().unwrap_or(None))
    }
}

/// Only registers that a call may change anyway are cleared before the return.
pub fn returns_plainly(code: &[u8]) -> bool {
    let mut at = 0;
    loop {
        match code[at..] {
            [0xc3, ..] => return true,
            // xor of a register with itself
            [0x31, modrm, ..] if is_self(modrm) => at += 2,
            [0x45, 0x31, modrm, ..] if is_self(modrm) => at += 3,
            _ => return false,
        }
    }
}

fn is_self(modrm: u8) -> bool {
    modrm >> 6 == 3 && (modrm >> 3) & 7 == modrm & 7
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_returns_are_told_from_epilogues() {
        let plain = [0x31, 0xd2, 0x31, 0xc9, 0x45, 0x31, 0xdb, 0xc3, 0x90];
        assert!(returns_plainly(&plain));
        assert!(!returns_plainly(&[0xc9, 0x31, 0xd2, 0xc3]), "leave");
        assert!(!returns_plainly(&[0x31, 0xd1, 0xc3]), "a register that is not cleared");
        assert!(!returns_plainly(&[0x31, 0xd2]));
    }
}
