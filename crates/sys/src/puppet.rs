//! A process for tests: it does to its own memory what it is told, and nothing else.
//!
//! Tests of kernel-facing code outside this crate need programs whose every access is known, and may not contain
//! unsafe code; so the unsafe code is here. Owns the child and its children. Invariant: a puppet and all it forked are
//! dead when the [`Puppet`] is dropped. Compiled only with the feature `puppet`.

use crate::{Errno, check};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

/// So many processes of one puppet can be talked to: itself and those it forks.
pub const SLOTS: usize = 8;
const FIRST_FD: i32 = 500;

/// What it can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Op {
    Mmap,
    Munmap,
    Mremap,
    Madvise,
    Mprotect,
    Peek,
    Poke,
    Fill,
    Verify,
    Sweep,
    Fork,
    Exec,
    Exit,
    Threads,
    Userfaultfd,
    Close,
}

const OPS: [Op; 16] = [
    Op::Mmap,
    Op::Munmap,
    Op::Mremap,
    Op::Madvise,
    Op::Mprotect,
    Op::Peek,
    Op::Poke,
    Op::Fill,
    Op::Verify,
    Op::Sweep,
    Op::Fork,
    Op::Exec,
    Op::Exit,
    Op::Threads,
    Op::Userfaultfd,
    Op::Close,
];

/// A child of the test process, and those it forked.
pub struct Puppet {
    sockets: Vec<UnixStream>,
    /// By slot.
    pids: Mutex<BTreeMap<usize, i32>>,
}

/// One process of a puppet.
#[derive(Clone, Copy)]
pub struct Hand<'a> {
    puppet: &'a Puppet,
    slot: usize,
}

/// Word `index` of the pattern `seed`. Never zero.
pub fn pattern(seed: u64, index: u64) -> u64 {
    let mixed = (seed ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (mixed ^ (mixed >> 29)) | 1
}

impl Puppet {
    /// Forks one.
    pub fn new() -> io::Result<Puppet> {
        let mut ours = Vec::new();
        let mut theirs = Vec::new();
        for _ in 0..SLOTS {
            let (a, b) = UnixStream::pair()?;
            ours.push(a);
            theirs.push(b);
        }
        if theirs.iter().any(|socket| socket.as_raw_fd() >= FIRST_FD) {
            return Err(io::Error::other("this test has too many descriptors open for a puppet"));
        }
        // SAFETY: the child calls nothing but what `act` does: system calls, its own memory, and threads that it starts
        // itself.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: plain system calls on integers; what is closed is not used by this process any more.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                for (slot, socket) in theirs.iter().enumerate() {
                    libc::dup2(socket.as_raw_fd(), FIRST_FD + slot as i32);
                }
                libc::close_range(3, FIRST_FD as u32 - 1, 0);
                libc::close_range((FIRST_FD + SLOTS as i32) as u32, u32::MAX, 0);
            }
            act(0);
        }
        check(i64::from(pid))?;
        Ok(Puppet {
            sockets: ours,
            pids: Mutex::new(BTreeMap::from([(0, pid)])),
        })
    }

    /// The process itself (slot 0) or one it forked.
    pub fn hand(&self, slot: usize) -> Hand<'_> {
        Hand { puppet: self, slot }
    }

    /// The PID of the process itself.
    pub fn pid(&self) -> i32 {
        self.pids()[&0]
    }

    fn pids(&self) -> std::sync::MutexGuard<'_, BTreeMap<usize, i32>> {
        self.pids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        let pids = self.pids().clone();
        for pid in pids.values().rev() {
            // SAFETY: plain system calls. Descendants are not reaped by anyone but their dead parent's reaper, so their
            // numbers may be free by now only if they exited on their own; tests keep those out of here.
            unsafe { libc::kill(*pid, libc::SIGKILL) };
        }
        // SAFETY: waits for our own child.
        unsafe { libc::waitpid(pids[&0], std::ptr::null_mut(), 0) };
    }
}

impl Hand<'_> {
    fn start(&self, op: Op, args: [u64; 5]) -> io::Result<()> {
        let words = [op as u64, args[0], args[1], args[2], args[3], args[4]];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        (&self.puppet.sockets[self.slot])
            .write_all(&bytes)
            .map_err(|e| self.post_mortem(e))
    }

    /// Waits for the answer to what was started.
    pub fn finish(&self) -> io::Result<i64> {
        let mut bytes = [0; 8];
        (&self.puppet.sockets[self.slot])
            .read_exact(&mut bytes)
            .map_err(|e| self.post_mortem(e))?;
        let answer = i64::from_ne_bytes(bytes);
        Ok(answer)
    }

    /// Says how the process ended, as far as its zombie knows.
    fn post_mortem(&self, error: io::Error) -> io::Error {
        let pid = self.puppet.pids().get(&self.slot).copied().unwrap_or(0);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let status = stat.split_ascii_whitespace().last().unwrap_or("unknown");
        io::Error::new(
            error.kind(),
            format!("{error}; puppet process {pid} has wait status {status}"),
        )
    }

    fn tell(&self, op: Op, args: [u64; 5]) -> io::Result<i64> {
        self.start(op, args)?;
        self.finish()
    }

    fn call(&self, op: Op, args: [u64; 5]) -> io::Result<u64> {
        match self.tell(op, args)? {
            answer if (-4095..0).contains(&answer) => Err(Errno(-answer as i32).into()),
            answer => Ok(answer as u64),
        }
    }

    /// mmap of private anonymous memory at exactly `address`.
    pub fn map(&self, address: u64, len: u64) -> io::Result<u64> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
        self.call(
            Op::Mmap,
            [
                address,
                len,
                (libc::PROT_READ | libc::PROT_WRITE) as u64,
                flags as u64,
                0,
            ],
        )
    }

    /// munmap.
    pub fn unmap(&self, address: u64, len: u64) -> io::Result<u64> {
        self.call(Op::Munmap, [address, len, 0, 0, 0])
    }

    /// mremap that may move, to wherever; with `to`, there; with `keep`, leaving the old mapping in place.
    pub fn remap(&self, address: u64, old: u64, new: u64, to: Option<u64>, keep: bool) -> io::Result<u64> {
        let mut flags = libc::MREMAP_MAYMOVE;
        flags |= if to.is_some() { libc::MREMAP_FIXED } else { 0 };
        flags |= if keep { libc::MREMAP_DONTUNMAP } else { 0 };
        self.call(Op::Mremap, [address, old, new, flags as u64, to.unwrap_or(0)])
    }

    /// madvise.
    pub fn advise(&self, address: u64, len: u64, advice: i32) -> io::Result<u64> {
        self.call(Op::Madvise, [address, len, advice as u64, 0, 0])
    }

    /// mprotect.
    pub fn protect(&self, address: u64, len: u64, protection: i32) -> io::Result<u64> {
        self.call(Op::Mprotect, [address, len, protection as u64, 0, 0])
    }

    /// The word at an address, read by an instruction.
    pub fn peek(&self, address: u64) -> io::Result<u64> {
        self.tell(Op::Peek, [address, 0, 0, 0, 0]).map(|v| v as u64)
    }

    /// Starts a peek; the answer is [`Hand::finish`]'s.
    pub fn start_peek(&self, address: u64) -> io::Result<()> {
        self.start(Op::Peek, [address, 0, 0, 0, 0])
    }

    /// Writes a word with an instruction.
    pub fn poke(&self, address: u64, value: u64) -> io::Result<()> {
        self.tell(Op::Poke, [address, value, 0, 0, 0]).map(|_| ())
    }

    /// Writes the pattern `seed` from word `first` on to a range.
    pub fn fill(&self, address: u64, len: u64, seed: u64, first: u64) -> io::Result<()> {
        self.tell(Op::Fill, [address, len, seed, first, 0]).map(|_| ())
    }

    /// Is the pattern there? If not, the address of the first word that is otherwise.
    pub fn verify(&self, address: u64, len: u64, seed: u64, first: u64) -> io::Result<Option<u64>> {
        self.start_verify(address, len, seed, first)?;
        self.finish().map(|at| (at >= 0).then_some(at as u64))
    }

    /// Starts a verification; the answer is [`Hand::finish`]'s, −1 for no difference.
    pub fn start_verify(&self, address: u64, len: u64, seed: u64, first: u64) -> io::Result<()> {
        self.start(Op::Verify, [address, len, seed, first, 0])
    }

    /// Reads one word of every page of a range in the order of a stride (in pages, odd, for a random-like order), the
    /// whole `times` times; returns their sum.
    pub fn sweep(&self, address: u64, pages: u64, stride: u64, times: u64) -> io::Result<u64> {
        self.start_sweep(address, pages, stride, times)?;
        self.finish().map(|v| v as u64)
    }

    /// Starts a sweep; the answer is [`Hand::finish`]'s.
    pub fn start_sweep(&self, address: u64, pages: u64, stride: u64, times: u64) -> io::Result<()> {
        self.start(Op::Sweep, [address, pages, stride, times, 0])
    }

    /// Forks; the child answers to `slot`. Returns its PID.
    pub fn fork(&self, slot: usize) -> io::Result<i32> {
        assert!(slot > 0 && slot < SLOTS);
        let pid = self.call(Op::Fork, [slot as u64, 0, 0, 0, 0])? as i32;
        self.puppet.pids().insert(slot, pid);
        Ok(pid)
    }

    /// Executes `sleep`; the memory is gone when this returns. It answers no more.
    pub fn exec(&self) -> io::Result<()> {
        self.start(Op::Exec, [0; 5])?;
        self.wait_gone()
    }

    /// Exits. It answers no more.
    pub fn exit(&self) -> io::Result<()> {
        self.start(Op::Exit, [0; 5])?;
        self.wait_gone()
    }

    fn wait_gone(&self) -> io::Result<()> {
        // Its end of the socket is closed by the exec or exit, unless forked children hold it too.
        let mut rest = [0; 8];
        match (&self.puppet.sockets[self.slot]).read(&mut rest)? {
            0 => Ok(()),
            _ => Err(Errno(i64::from_ne_bytes(rest).unsigned_abs() as i32).into()),
        }
    }

    /// So many threads at once read the word at an address; how many saw `expected`?
    pub fn threads(&self, threads: u64, address: u64, expected: u64) -> io::Result<u64> {
        self.call(Op::Threads, [threads, address, expected, 0, 0])
    }

    /// Makes a userfaultfd in the process (which must be the first) and takes it.
    pub fn userfaultfd(&self) -> io::Result<OwnedFd> {
        use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
        assert_eq!(self.slot, 0);
        let number = self.call(Op::Userfaultfd, [0; 5])? as i32;
        let pid = Pid::from_raw(self.puppet.pid()).ok_or(io::ErrorKind::NotFound)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let taken = pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())?;
        // Its own copy must go, or the taken one would not be the last.
        self.call(Op::Close, [number as u64, 0, 0, 0, 0])?;
        Ok(taken)
    }
}

/// The puppet's life.
fn act(mut slot: usize) -> ! {
    loop {
        let mut words = [0u64; 6];
        let fd = FIRST_FD + slot as i32;
        // SAFETY: reads into an array of that size.
        let read = unsafe { libc::recv(fd, words.as_mut_ptr().cast(), 48, libc::MSG_WAITALL) };
        if read != 48 {
            // The test is over, or else the status says what happened.
            let status = if read < 0 {
                io::Error::last_os_error().raw_os_error().unwrap_or(0)
            } else {
                read as i32
            };
            // SAFETY: ends this process without running anything else.
            unsafe { libc::_exit(status) };
        }
        let op = OPS[words[0] as usize % OPS.len()];
        let args = [words[1], words[2], words[3], words[4], words[5]];
        let answer = perform(op, args, &mut slot);
        // After a fork the child answers nothing: its parent does.
        if let Some(answer) = answer {
            // SAFETY: writes eight bytes of a local.
            unsafe { libc::send(fd, (&raw const answer).cast(), 8, libc::MSG_NOSIGNAL) };
        }
    }
}

fn perform(op: Op, [a, b, c, d, e]: [u64; 5], slot: &mut usize) -> Option<i64> {
    let raw = |nr: i64, args: [u64; 5]| {
        let offset = 0u64;
        // SAFETY: the test says what is done to this process's memory, none of which Rust code here relies on.
        let answer = unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3], args[4], offset) };
        check(answer).unwrap_or_else(|errno| -i64::from(errno.0))
    };
    Some(match op {
        Op::Mmap => raw(libc::SYS_mmap, [a, b, c, d, u64::MAX]),
        Op::Munmap => raw(libc::SYS_munmap, [a, b, 0, 0, 0]),
        Op::Mremap => raw(libc::SYS_mremap, [a, b, c, d, e]),
        Op::Madvise => raw(libc::SYS_madvise, [a, b, c, 0, 0]),
        Op::Mprotect => raw(libc::SYS_mprotect, [a, b, c, 0, 0]),
        Op::Peek => peek(a) as i64,
        Op::Poke => {
            // SAFETY: as in `peek`.
            unsafe { (a as *mut u64).write_volatile(b) };
            0
        }
        Op::Fill => {
            for i in 0..b / 8 {
                // SAFETY: as in `peek`.
                unsafe { ((a + 8 * i) as *mut u64).write_volatile(pattern(c, d + i)) };
            }
            0
        }
        Op::Verify => (0..b / 8)
            .find(|i| peek(a + 8 * i) != pattern(c, d + i))
            .map_or(-1, |i| (a + 8 * i) as i64),
        Op::Sweep => {
            let mut sum = 0u64;
            for _ in 0..d {
                for i in 0..b {
                    sum = sum.wrapping_add(peek(a + i.wrapping_mul(c) % b * 4096));
                }
            }
            sum as i64 & i64::MAX
        }
        Op::Fork => {
            // SAFETY: the puppet has one thread, and its child goes on in the same loop.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                *slot = a as usize;
                // SAFETY: closes descriptors that this process does not use: its siblings' ends must see the end.
                unsafe {
                    libc::close_range(FIRST_FD as u32, (FIRST_FD + *slot as i32 - 1) as u32, 0);
                }
                return None;
            }
            // SAFETY: closes the child's socket, so that its end is seen.
            unsafe { libc::close(FIRST_FD + a as i32) };
            check(i64::from(pid)).unwrap_or_else(|errno| -i64::from(errno.0))
        }
        Op::Exec => {
            // SAFETY: closes and executes; on failure this process answers on nothing, and ends.
            unsafe {
                libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
                let argv = [c"sleep".as_ptr(), c"1000".as_ptr(), std::ptr::null()];
                libc::execv(c"/bin/sleep".as_ptr(), argv.as_ptr());
                libc::_exit(127)
            }
        }
        // SAFETY: ends this process without running anything else.
        Op::Exit => unsafe { libc::_exit(0) },
        Op::Threads => {
            let threads: Vec<_> = (0..a).map(|_| std::thread::spawn(move || peek(b) == c)).collect();
            threads
                .into_iter()
                .filter_map(|t| t.join().ok())
                .filter(|seen| *seen)
                .count() as i64
        }
        Op::Close => raw(libc::SYS_close, [a, 0, 0, 0, 0]),
        Op::Userfaultfd => raw(
            libc::SYS_userfaultfd,
            [(libc::O_CLOEXEC | libc::O_NONBLOCK) as u64, 0, 0, 0, 0],
        ),
    })
}

fn peek(address: u64) -> u64 {
    // SAFETY: the test names addresses that it had mapped; if it errs, this process dies of SIGSEGV, which is what such
    // a test looks for.
    unsafe { (address as *const u64).read_volatile() }
}
