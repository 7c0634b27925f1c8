//! One traced thread, as a value that is either running or stopped.
//!
//! Owns the ptrace relation of one thread and the kernel's stop kinds. Refuses to know why a thread is stopped.
//! Invariants: [`Stopped`] and [`Running`] are moved into each other, so a register access on a running thread does not
//! compile; all calls for one thread are made by the OS thread that seized it (ptrace(2) is bound to it), which is why
//! neither type is `Send`; ESRCH means that the thread was killed and becomes [`TraceError::Gone`].
//!
//! References: ptrace(2); signal-delivery-stop, group-stop and PTRACE_EVENT stops as described there.

mod calls;

use crate::{Errno, check};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

/// General registers, as `PTRACE_GETREGS` has them.
pub type Registers = libc::user_regs_struct;

/// Why a traced thread could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The thread has died; nothing of it is left to restore.
    #[error("thread {tid} is gone")]
    Gone {
        /// The thread, by the tracer's numbering.
        tid: i32,
    },
    /// The kernel refused; the thread is as it was before the call.
    #[error("ptrace {what} of thread {tid}: {errno}")]
    Refused {
        /// The thread, by the tracer's numbering.
        tid: i32,
        /// The request.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The thread did not stop in time: it sleeps uninterruptibly (vfork, a hung file system).
    #[error("thread {tid} did not stop within {millis} ms")]
    Unstoppable {
        /// The thread, by the tracer's numbering.
        tid: i32,
        /// How long was waited.
        millis: u64,
    },
    /// The thread stopped for a reason that the caller did not expect.
    #[error("thread {tid} stopped unexpectedly: {stop:?}{}", at.map(|at| format!(" ({at})")).unwrap_or_default())]
    Unexpected {
        /// The thread, by the tracer's numbering.
        tid: i32,
        /// Why it stopped.
        stop: Stop,
        /// Of a signal: whence it came.
        at: Option<Origin>,
    },
}

/// Whence a signal came that stopped a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// `si_code` of sigaction(2).
    pub code: i32,
    /// `si_addr` of a fault, or the sender's number.
    pub address: u64,
    /// The instruction at which it was stopped.
    pub instruction: u64,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Origin {
            code,
            address,
            instruction,
        } = self;
        write!(f, "code {code}, address {address:#x}, instruction {instruction:#x}")
    }
}

/// Why a thread is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It is about to receive this signal; what `resume` is given is delivered in its place.
    Signal(i32),
    /// Its process was stopped by this signal (group-stop).
    Group(i32),
    /// `PTRACE_INTERRUPT`, or a newly attached thread that has not run yet.
    Interrupt,
    /// A system call was entered or left.
    Syscall,
    /// It made a thread or a process, which the tracer has as well (its number in the tracer's numbering).
    Cloned(i32),
    /// It has just executed a new program.
    Exec,
}

/// What became of a running thread.
pub enum Event {
    /// It stopped.
    Stopped(Stopped, Stop),
    /// It ended; the raw wait status.
    Ended(i32),
}

/// A thread that is traced and runs.
#[derive(Debug)]
pub struct Running {
    tid: i32,
    not_send: PhantomData<*const ()>,
}

/// A thread that is traced and stopped.
#[derive(Debug)]
pub struct Stopped {
    tid: i32,
    not_send: PhantomData<*const ()>,
}

/// Options for [`Running::seize`] and [`Stopped::set_options`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// The thread is killed when the tracer dies.
    pub exit_kill: bool,
    /// Threads and processes it makes are traced, too, with the same options.
    pub follow: bool,
    /// Its own seccomp filters do not apply while it is traced.
    pub suspend_seccomp: bool,
}

impl Options {
    fn bits(self) -> libc::c_ulong {
        let mut bits = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACEEXEC;
        if self.exit_kill {
            bits |= libc::PTRACE_O_EXITKILL;
        }
        if self.follow {
            bits |= libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK;
        }
        if self.suspend_seccomp {
            bits |= libc::PTRACE_O_SUSPEND_SECCOMP;
        }
        bits as libc::c_ulong
    }
}

impl Running {
    /// Attaches to a thread without stopping it.
    pub fn seize(tid: i32, options: Options) -> Result<Running, TraceError> {
        request(tid, "PTRACE_SEIZE", libc::PTRACE_SEIZE, 0, options.bits() as usize)?;
        Ok(Running {
            tid,
            not_send: PhantomData,
        })
    }

    /// The thread's number, in the tracer's numbering.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// A thread that the kernel attached by itself, as [`Stop::Cloned`] announced. It will stop once before it runs.
    pub fn announced(tid: i32) -> Running {
        Running {
            tid,
            not_send: PhantomData,
        }
    }

    /// Asks the thread to stop; the stop itself comes by [`Running::wait`].
    pub fn interrupt(&self) -> Result<(), TraceError> {
        request(self.tid, "PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, 0, 0)
    }

    /// Waits for the next stop or the end. Spins for a while first: a blocking wait costs a cross-CPU wake.
    pub fn wait(self) -> Result<Event, TraceError> {
        self.wait_until(None)
    }

    /// Waits like [`Running::wait`], but at most until `deadline`.
    pub fn wait_until(self, deadline: Option<Instant>) -> Result<Event, TraceError> {
        /// Then it may be this CPU that the thread needs.
        const SPINS: u32 = 40;
        const NAP: Duration = Duration::from_micros(15);
        let mut spins = 0;
        loop {
            let block = deadline.is_none() && spins >= SPINS;
            match wait_status(self.tid, !block)? {
                Some(status) => return self.decode(status),
                None if spins < SPINS => {
                    spins += 1;
                    std::hint::spin_loop();
                }
                None => {
                    if let Some(deadline) = deadline
                        && Instant::now() >= deadline
                    {
                        return Err(TraceError::Unstoppable {
                            tid: self.tid,
                            millis: 0,
                        });
                    }
                    std::thread::sleep(NAP);
                }
            }
        }
    }

    /// Whether it has stopped or ended by now; hands the thread back if not.
    pub fn poll(self) -> Result<Result<Event, Running>, TraceError> {
        match wait_status(self.tid, true)? {
            Some(status) => self.decode(status).map(Ok),
            None => Ok(Err(self)),
        }
    }

    fn decode(self, status: i32) -> Result<Event, TraceError> {
        if !libc::WIFSTOPPED(status) {
            return Ok(Event::Ended(status));
        }
        let signal = libc::WSTOPSIG(status);
        let stopped = Stopped {
            tid: self.tid,
            not_send: PhantomData,
        };
        let stop = match status >> 16 {
            0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
            0 => Stop::Signal(signal),
            libc::PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Stop::Interrupt,
            libc::PTRACE_EVENT_STOP => Stop::Group(signal),
            libc::PTRACE_EVENT_EXEC => Stop::Exec,
            libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK => {
                Stop::Cloned(stopped.event_message()? as i32)
            }
            _ => Stop::Signal(signal),
        };
        Ok(Event::Stopped(stopped, stop))
    }

    /// Stops the thread, delivering signals that come first; tells whether its process is in a group-stop.
    ///
    /// A signal that arrives before the interrupt is seen is delivered as it would have been: the thread then stops at
    /// the first instruction of the handler.
    pub fn stop(self, deadline: Instant) -> Result<(Stopped, Stop), TraceError> {
        self.interrupt()?;
        self.stopped(deadline)
    }

    /// Like [`Running::stop`], of a thread that was [asked](Running::interrupt) to.
    pub fn stopped(self, deadline: Instant) -> Result<(Stopped, Stop), TraceError> {
        let started = Instant::now();
        let mut running = self;
        loop {
            let tid = running.tid;
            match running.wait_until(Some(deadline)) {
                Ok(Event::Ended(_)) => return Err(TraceError::Gone { tid }),
                Ok(Event::Stopped(stopped, stop @ (Stop::Interrupt | Stop::Group(_)))) => return Ok((stopped, stop)),
                // Any of these stops takes the place of the one that was asked for: the kernel forgets that.
                Ok(Event::Stopped(stopped, other)) => {
                    running = match other {
                        Stop::Signal(signal) => stopped.resume(signal)?,
                        _ => stopped.resume(0)?,
                    };
                    running.interrupt()?;
                }
                Err(TraceError::Unstoppable { .. }) => {
                    let millis = started.elapsed().as_millis() as u64;
                    return Err(TraceError::Unstoppable { tid, millis });
                }
                Err(other) => return Err(other),
            }
        }
    }
}

impl Stopped {
    /// A thread of which this OS thread knows that it is its tracer and that it is stopped, after a failed call has
    /// swallowed the value. Requests for a thread that is not stopped fail with [`TraceError::Gone`].
    pub fn assume(tid: i32) -> Stopped {
        Stopped {
            tid,
            not_send: PhantomData,
        }
    }

    /// The thread's number, in the tracer's numbering.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// The general registers.
    pub fn registers(&self) -> Result<Registers, TraceError> {
        let mut registers = MaybeUninit::<Registers>::uninit();
        request(
            self.tid,
            "PTRACE_GETREGS",
            libc::PTRACE_GETREGS,
            0,
            registers.as_mut_ptr() as usize,
        )?;
        // SAFETY: the kernel filled the whole structure, or the request above would have failed.
        Ok(unsafe { registers.assume_init() })
    }

    /// Sets the general registers. `orig_rax` and `rax` decide whether the kernel restarts a system call.
    pub fn set_registers(&self, registers: &Registers) -> Result<(), TraceError> {
        request(
            self.tid,
            "PTRACE_SETREGS",
            libc::PTRACE_SETREGS,
            0,
            registers as *const _ as usize,
        )
    }

    /// The extended state (x87, SSE, AVX, …) in the layout of XSAVE, appended to `into`.
    pub fn xstate(&self, into: &mut Vec<u8>) -> Result<(), TraceError> {
        let mut state = [0u8; MAX_XSTATE_BYTES];
        let mut part = libc::iovec {
            iov_base: state.as_mut_ptr().cast(),
            iov_len: state.len(),
        };
        request(
            self.tid,
            "PTRACE_GETREGSET",
            libc::PTRACE_GETREGSET,
            NT_X86_XSTATE,
            &raw mut part as usize,
        )?;
        into.extend_from_slice(&state[..part.iov_len.min(MAX_XSTATE_BYTES)]);
        Ok(())
    }

    /// Sets the extended state.
    pub fn set_xstate(&self, state: &[u8]) -> Result<(), TraceError> {
        let part = libc::iovec {
            iov_base: state.as_ptr().cast_mut().cast(),
            iov_len: state.len(),
        };
        request(
            self.tid,
            "PTRACE_SETREGSET",
            libc::PTRACE_SETREGSET,
            NT_X86_XSTATE,
            &raw const part as usize,
        )
    }

    /// The blocked signals; inside sigsuspend(2) and its like, those that will be blocked after it.
    pub fn signal_mask(&self) -> Result<u64, TraceError> {
        let mut mask = 0u64;
        request(
            self.tid,
            "PTRACE_GETSIGMASK",
            PTRACE_GETSIGMASK,
            8,
            &raw mut mask as usize,
        )?;
        Ok(mask)
    }

    /// Sets the blocked signals.
    pub fn set_signal_mask(&self, mask: u64) -> Result<(), TraceError> {
        request(
            self.tid,
            "PTRACE_SETSIGMASK",
            PTRACE_SETSIGMASK,
            8,
            &raw const mask as usize,
        )
    }

    /// The pending signals of the thread, or of its process, with their payload, without taking them.
    pub fn pending_signals(&self, shared: bool) -> Result<Vec<[u8; 128]>, TraceError> {
        const BATCH: usize = 32;
        let mut all = Vec::new();
        let mut batch = [[0u8; 128]; BATCH];
        loop {
            let args = PeekSiginfo {
                offset: all.len() as u64,
                flags: u32::from(shared),
                count: BATCH as i32,
            };
            let got = request_count(
                self.tid,
                "PTRACE_PEEKSIGINFO",
                PTRACE_PEEKSIGINFO,
                &raw const args as usize,
                batch.as_mut_ptr() as usize,
            )?;
            all.extend_from_slice(&batch[..got.min(BATCH)]);
            if got < BATCH {
                return Ok(all);
            }
        }
    }

    /// The thread's rseq registration: address, size, signature, flags; `None` if it has none.
    pub fn rseq(&self) -> Result<Option<Rseq>, TraceError> {
        let mut rseq = Rseq::default();
        request_count(
            self.tid,
            "PTRACE_GET_RSEQ_CONFIGURATION",
            PTRACE_GET_RSEQ_CONFIGURATION,
            size_of::<Rseq>(),
            &raw mut rseq as usize,
        )?;
        Ok((rseq.pointer != 0).then_some(rseq))
    }

    /// One of the thread's seccomp filters, the oldest being 0, as an array of `sock_filter` in bytes; `None` past the
    /// newest. Needs CAP_SYS_ADMIN.
    pub fn seccomp_filter(&self, index: usize) -> Result<Option<Vec<u8>>, TraceError> {
        let ask = |buffer: usize| {
            request_count(
                self.tid,
                "PTRACE_SECCOMP_GET_FILTER",
                PTRACE_SECCOMP_GET_FILTER,
                index,
                buffer,
            )
        };
        let count = match ask(0) {
            Ok(count) => count,
            Err(TraceError::Refused { errno, .. }) if errno.0 == libc::ENOENT || errno.0 == libc::EINVAL => {
                return Ok(None);
            }
            Err(other) => return Err(other),
        };
        let mut filter = vec![0u8; count * 8];
        ask(filter.as_mut_ptr() as usize)?;
        Ok(Some(filter))
    }

    /// Changes the options.
    pub fn set_options(&self, options: Options) -> Result<(), TraceError> {
        request(
            self.tid,
            "PTRACE_SETOPTIONS",
            libc::PTRACE_SETOPTIONS,
            0,
            options.bits() as usize,
        )
    }

    /// Lets it run, delivering `signal` (0: none; matters only after [`Stop::Signal`]).
    pub fn resume(self, signal: i32) -> Result<Running, TraceError> {
        request(self.tid, "PTRACE_CONT", libc::PTRACE_CONT, 0, signal as usize)?;
        Ok(Running {
            tid: self.tid,
            not_send: PhantomData,
        })
    }

    /// Lets it run to the next entry to or exit from a system call.
    pub fn resume_to_syscall(self, signal: i32) -> Result<Running, TraceError> {
        request(self.tid, "PTRACE_SYSCALL", libc::PTRACE_SYSCALL, 0, signal as usize)?;
        Ok(Running {
            tid: self.tid,
            not_send: PhantomData,
        })
    }

    /// Leaves it in its group-stop, but lets it notice SIGCONT.
    pub fn listen(self) -> Result<Running, TraceError> {
        request(self.tid, "PTRACE_LISTEN", libc::PTRACE_LISTEN, 0, 0)?;
        Ok(Running {
            tid: self.tid,
            not_send: PhantomData,
        })
    }

    /// Ends the tracing; the thread runs on, receiving `signal` (0: none).
    pub fn detach(self, signal: i32) -> Result<(), TraceError> {
        request(self.tid, "PTRACE_DETACH", libc::PTRACE_DETACH, 0, signal as usize)
    }

    /// The error that this stop is to a caller who had expected another one.
    pub fn unexpected(&self, stop: Stop) -> TraceError {
        let at = match stop {
            Stop::Signal(_) => self.origin().ok(),
            _ => None,
        };
        TraceError::Unexpected {
            tid: self.tid,
            stop,
            at,
        }
    }

    fn origin(&self) -> Result<Origin, TraceError> {
        let mut info = [0u64; 16];
        request(
            self.tid,
            "PTRACE_GETSIGINFO",
            libc::PTRACE_GETSIGINFO,
            0,
            info.as_mut_ptr() as usize,
        )?;
        Ok(Origin {
            code: info[1] as u32 as i32,
            address: info[2],
            instruction: self.registers()?.rip,
        })
    }

    fn event_message(&self) -> Result<u64, TraceError> {
        let mut message: libc::c_ulong = 0;
        request(
            self.tid,
            "PTRACE_GETEVENTMSG",
            libc::PTRACE_GETEVENTMSG,
            0,
            &raw mut message as usize,
        )?;
        Ok(message)
    }
}

/// A thread's rseq registration, as the kernel reports it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rseq {
    /// Where the area is.
    pub pointer: u64,
    /// How long it was said to be.
    pub size: u32,
    /// What must stand before every abort handler.
    pub signature: u32,
    /// Flags.
    pub flags: u32,
    pad: u32,
}

#[repr(C)]
struct PeekSiginfo {
    offset: u64,
    flags: u32,
    count: i32,
}

const MAX_XSTATE_BYTES: usize = 16 << 10;
const NT_X86_XSTATE: usize = 0x202;
const PTRACE_PEEKSIGINFO: libc::c_uint = 0x4209;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;

fn request(tid: i32, what: &'static str, op: libc::c_uint, addr: usize, data: usize) -> Result<(), TraceError> {
    request_count(tid, what, op, addr, data).map(|_| ())
}

fn request_count(
    tid: i32,
    what: &'static str,
    op: libc::c_uint,
    addr: usize,
    data: usize,
) -> Result<usize, TraceError> {
    crate::fuse::step();
    // SAFETY: every caller in this module passes, for its request, null, a number, or the address of a live value of
    // the type and size that ptrace(2) asks for; the kernel checks the rest.
    let answer = unsafe { libc::syscall(libc::SYS_ptrace, op as usize, tid as usize, addr, data) };
    match check(answer) {
        Ok(count) => Ok(count as usize),
        Err(Errno(libc::ESRCH)) => Err(TraceError::Gone { tid }),
        Err(errno) => Err(TraceError::Refused { tid, what, errno }),
    }
}

fn wait_status(tid: i32, no_hang: bool) -> Result<Option<i32>, TraceError> {
    let mut status = 0;
    let flags = libc::__WALL | libc::__WNOTHREAD | if no_hang { libc::WNOHANG } else { 0 };
    loop {
        // SAFETY: `status` outlives the call.
        match check(i64::from(unsafe { libc::waitpid(tid, &raw mut status, flags) })) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(status)),
            Err(Errno(libc::EINTR)) => {}
            Err(Errno(libc::ECHILD)) => return Err(TraceError::Gone { tid }),
            Err(errno) => {
                return Err(TraceError::Refused {
                    tid,
                    what: "waitpid",
                    errno,
                });
            }
        }
    }
}
