//! System calls that a stopped thread is made to do, one at a time, and single steps.
//!
//! Owns the way from syscall-stop to syscall-stop. Refuses to know what a call is for. Invariant: the registers are as before
//! afterwards, but after an exec that has succeeded.

use super::{Event, Registers, Running, Stop, Stopped, TraceError, request};
use crate::Errno;

impl Stopped {
    /// Makes the thread do one system call through the `syscall` instruction at `instruction`, and hands back its raw
    /// answer. Its registers and its signal mask are as before afterwards, and so are its signal dispositions: the
    /// stops are syscall-stops, not SIGTRAPs.
    ///
    /// The caller has blocked all signals. A SIGSTOP that comes meanwhile takes effect at once, as ever, and the call is made
    /// nevertheless: let go, the thread is stopped.
    pub fn inject(self, instruction: u64, number: i64, arguments: [u64; 6]) -> Result<(Stopped, i64), TraceError> {
        let before = self.begin_call(instruction, number, arguments)?;
        let (entered, _) = self.run_to_syscall_stop()?;
        let (left, _) = entered.run_to_syscall_stop()?;
        let answer = left.registers()?.rax as i64;
        left.set_registers(&before)?;
        Ok((left, answer))
    }

    /// Like [`Stopped::inject`], for clone(2) and its like under [`Options::follow`](super::Options::follow): hands back the new task as well,
    /// stopped before its first instruction.
    pub fn inject_clone(
        self,
        instruction: u64,
        number: i64,
        arguments: [u64; 6],
    ) -> Result<(Stopped, i64, Option<Stopped>), TraceError> {
        let before = self.begin_call(instruction, number, arguments)?;
        let (entered, _) = self.run_to_syscall_stop()?;
        let (left, child) = entered.run_to_syscall_stop()?;
        let answer = left.registers()?.rax as i64;
        left.set_registers(&before)?;
        let child = match child.map(|tid| Running::announced(tid).wait()).transpose()? {
            Some(Event::Stopped(child, _)) => Some(child),
            Some(Event::Ended(_)) | None => None,
        };
        Ok((left, answer, child))
    }

    /// Like [`Stopped::inject`], for execveat(2): on success the thread is stopped before the first instruction of the
    /// new program, whose registers it has; on failure it is as before.
    pub fn inject_exec(
        self,
        instruction: u64,
        number: i64,
        arguments: [u64; 6],
    ) -> Result<(Stopped, Result<(), Errno>), TraceError> {
        let before = self.begin_call(instruction, number, arguments)?;
        let (entered, _) = self.run_to_syscall_stop()?;
        let mut running = entered.resume_to_syscall(0)?;
        let mut executed = false;
        loop {
            let tid = running.tid;
            match running.wait()? {
                Event::Ended(_) => return Err(TraceError::Gone { tid }),
                Event::Stopped(thread, Stop::Exec) => {
                    executed = true;
                    running = thread.resume_to_syscall(0)?;
                }
                // The exit of the call, which a tracer that asks for syscall-stops sees after the exec.
                Event::Stopped(thread, Stop::Syscall) if executed => return Ok((thread, Ok(()))),
                Event::Stopped(thread, Stop::Syscall) => {
                    let answer = thread.registers()?.rax as i64;
                    thread.set_registers(&before)?;
                    return Ok((thread, Err(Errno(-answer as i32))));
                }
                Event::Stopped(thread, Stop::Interrupt | Stop::Group(_) | Stop::Cloned(_)) => {
                    running = thread.resume_to_syscall(0)?;
                }
                Event::Stopped(thread, Stop::Signal(libc::SIGSTOP)) => {
                    running = thread.resume_to_syscall(libc::SIGSTOP)?;
                }
                Event::Stopped(thread, stop @ Stop::Signal(_)) => {
                    return Err(thread.unexpected(stop));
                }
            }
        }
    }

    /// Executes one instruction. The caller has unblocked SIGTRAP.
    pub fn step(self) -> Result<Stopped, TraceError> {
        let tid = self.tid;
        let mut deliver = 0;
        loop {
            request(tid, "PTRACE_SINGLESTEP", libc::PTRACE_SINGLESTEP, 0, deliver as usize)?;
            deliver = match Running::announced(tid).wait()? {
                Event::Ended(_) => return Err(TraceError::Gone { tid }),
                // Before the instruction.
                Event::Stopped(_, Stop::Signal(libc::SIGSTOP)) => libc::SIGSTOP,
                Event::Stopped(_, Stop::Group(_)) => 0,
                Event::Stopped(thread, _) => return Ok(thread),
            };
        }
    }

    /// Sets the registers for a call and hands back those of before.
    fn begin_call(&self, instruction: u64, number: i64, arguments: [u64; 6]) -> Result<Registers, TraceError> {
        let before = self.registers()?;
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let call = Registers {
            rip: instruction,
            rax: number as u64,
            // No restart logic of an interrupted call may move the instruction pointer.
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..before
        };
        self.set_registers(&call)?;
        Ok(before)
    }

    /// Runs to the next syscall-stop; tells which task was made on the way.
    fn run_to_syscall_stop(self) -> Result<(Stopped, Option<i32>), TraceError> {
        let mut child = None;
        let mut running = self.resume_to_syscall(0)?;
        loop {
            let tid = running.tid;
            match running.wait()? {
                Event::Ended(_) => return Err(TraceError::Gone { tid }),
                Event::Stopped(stopped, Stop::Syscall) => return Ok((stopped, child)),
                // An interrupt that was asked for before, or the group-stop: it is seen again when the thread is let go.
                Event::Stopped(stopped, Stop::Interrupt | Stop::Group(_)) => running = stopped.resume_to_syscall(0)?,
                // No mask holds it: the process is stopped from now on, and its parent told, while the call is made.
                Event::Stopped(stopped, Stop::Signal(libc::SIGSTOP)) => {
                    running = stopped.resume_to_syscall(libc::SIGSTOP)?;
                }
                Event::Stopped(stopped, Stop::Cloned(tid)) => {
                    child = Some(tid);
                    running = stopped.resume_to_syscall(0)?;
                }
                Event::Stopped(stopped, Stop::Exec) => running = stopped.resume_to_syscall(0)?,
                Event::Stopped(stopped, stop @ Stop::Signal(_)) => {
                    return Err(stopped.unexpected(stop));
                }
            }
        }
    }
}
