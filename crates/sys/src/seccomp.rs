//! The nest's seccomp filter and its user-notification listener.
//!
//! Owns the filter program ([`Filter`]) and the listener's ioctls ([`Listener`]). Refuses to know what a notified call
//! is about. Invariants: whatever the filter does not name is answered from the system call number alone, so that the
//! kernel answers it from its per-filter bitmap; a call with the cookie in its sixth argument is never notified; a call
//! through a foreign entry (32 bit, x32) cannot escape what its 64-bit form is subject to; nothing makes a task without
//! being notified (docs/decisions/0010).
//!
//! References: seccomp(2), seccomp_unotify(2).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `AUDIT_ARCH_X86_64`.
pub const ARCH_X86_64: u32 = 0xc000_003e;
/// `AUDIT_ARCH_I386`.
pub const ARCH_I386: u32 = 0x4000_0003;

const RET_ALLOW: u32 = 0x7fff_0000;
const RET_NOTIFY: u32 = 0x7fc0_0000;
const RET_ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS as u32;
const RET_EPERM: u32 = 0x0005_0000 | libc::EPERM as u32;

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQ: u16 = 0x15;
const JUMP_GT: u16 = 0x25;
const JUMP_GE: u16 = 0x35;
const SUB_X: u16 = 0x1c;
const MUL: u16 = 0x24;
const DIV: u16 = 0x34;
const RETURN: u16 = 0x06;
const TAX: u16 = 0x07;

const NR: u32 = 0;
const ARCH: u32 = 4;
const ARG0_LOW: u32 = 16;
const ARG5_LOW: u32 = 56;
const ARG5_HIGH: u32 = 60;

/// The calls that make a task, by entry (64 bit, 32 bit).
const CLONES: [(i64, u32); 4] = [
    (libc::SYS_clone, 120),
    (libc::SYS_clone3, 435),
    (libc::SYS_fork, 2),
    (libc::SYS_vfork, 190),
];

/// The calls whose first argument is the PID of a process they act on, by entry.
const PID_CALLS: [(i64, u32); 6] = [
    (libc::SYS_kill, 37),
    (libc::SYS_tkill, 238),
    (libc::SYS_tgkill, 270),
    (libc::SYS_rt_sigqueueinfo, 178),
    (libc::SYS_rt_tgsigqueueinfo, 335),
    (libc::SYS_pidfd_open, 434),
];

/// The calls that take a port, or open one. A 32-bit program's are not notified: where it may matter, the sockets themselves
/// are looked at, too.
const PORT_CALLS: [i64; 2] = [libc::SYS_bind, libc::SYS_listen];

/// The kernel makes a ring's worker threads itself, without a call that could be notified, so their numbers would be
/// anybody's. Refused as `kernel.io_uring_disabled` refuses it. The number is the same through both entries.
const IO_URING_SETUP: u32 = libc::SYS_io_uring_setup as u32;

/// What the filter depends on.
#[derive(Debug, Clone, Copy)]
pub struct Filter {
    /// A call with this in its sixth argument is let through.
    pub cookie: u64,
    /// PIDs above this are judged by their residue; the others are let through.
    pub last_own_pid: u32,
    /// The modulus; not zero.
    pub modulus: u32,
    /// PIDs of this residue are let through.
    pub residue: u32,
    /// bind(2) and listen(2) are notified: ports are the cluster's, not the node's.
    pub ports: bool,
}

/// Is this the number (as the entry `arch` counts) of a call that makes a task?
pub fn is_clone(arch: u32, nr: i32) -> bool {
    CLONES.iter().any(|(wide, narrow)| match arch {
        ARCH_I386 => *narrow == nr as u32,
        _ => *wide == i64::from(nr),
    })
}

/// The 64-bit number of a call this filter notifies, whatever entry it came through.
pub fn wide_number(arch: u32, nr: i32) -> i64 {
    if arch != ARCH_I386 {
        return i64::from(nr);
    }
    CLONES
        .iter()
        .chain(&PID_CALLS)
        .find(|(_, narrow)| *narrow == nr as u32)
        .map_or(-1, |(wide, _)| *wide)
}

impl Filter {
    fn program(&self) -> Vec<libc::sock_filter> {
        let mut p = Assembler::default();
        p.load(ARCH);
        p.jump_if(JUMP_EQ, ARCH_X86_64, Label::Wide);
        p.jump_if(JUMP_EQ, ARCH_I386, Label::Narrow);
        p.ret(RET_ENOSYS);

        p.place(Label::Wide);
        p.load(NR);
        for (nr, _) in CLONES {
            p.jump_if(JUMP_EQ, nr as u32, Label::Unmarked);
        }
        for (nr, _) in PID_CALLS {
            p.jump_if(JUMP_EQ, nr as u32, Label::PidCall);
        }
        for nr in PORT_CALLS.iter().filter(|_| self.ports) {
            p.jump_if(JUMP_EQ, *nr as u32, Label::Unmarked);
        }
        p.jump_if(JUMP_EQ, IO_URING_SETUP, Label::Refused);
        // A tracer makes the kernel skip a call by number -1; its return value must stay the tracer's.
        p.jump_if(JUMP_EQ, u32::MAX, Label::Allow);
        // The x32 entry shares this architecture; its clone would escape.
        p.jump_if(JUMP_GE, 0x4000_0000, Label::NoSuchCall);
        p.place(Label::Allow);
        p.ret(RET_ALLOW);
        p.place(Label::NoSuchCall);
        p.ret(RET_ENOSYS);

        p.place(Label::Unmarked);
        self.test_cookie(&mut p, Label::Notify);
        p.place(Label::PidCall);
        self.test_cookie(&mut p, Label::Pid);

        // A 32-bit call has no room for the cookie.
        p.place(Label::Narrow);
        p.load(NR);
        p.jump_if(JUMP_EQ, IO_URING_SETUP, Label::Refused);
        for (_, nr) in CLONES {
            p.jump_if(JUMP_EQ, nr, Label::Notify);
        }
        for (_, nr) in PID_CALLS {
            p.jump_if(JUMP_EQ, nr, Label::Pid);
        }
        p.ret(RET_ALLOW);

        p.place(Label::Pid);
        p.load(ARG0_LOW);
        p.jump_if(JUMP_GE, 0x8000_0000, Label::AllowPid); // a group, or nonsense
        p.jump_if(JUMP_GT, self.last_own_pid, Label::Judge);
        p.place(Label::AllowPid);
        p.ret(RET_ALLOW);
        p.place(Label::Judge);
        // Classic BPF in seccomp has no remainder: p - p / M * M.
        p.op(DIV, self.modulus);
        p.op(MUL, self.modulus);
        p.op(TAX, 0);
        p.load(ARG0_LOW);
        p.op(SUB_X, 0);
        p.jump_if(JUMP_EQ, self.residue, Label::AllowPid2);
        p.place(Label::Notify);
        p.ret(RET_NOTIFY);
        p.place(Label::AllowPid2);
        p.ret(RET_ALLOW);
        p.place(Label::Refused);
        p.ret(RET_EPERM);
        p.finish()
    }

    fn test_cookie(&self, p: &mut Assembler, otherwise: Label) {
        p.load(ARG5_LOW);
        p.jump_unless(JUMP_EQ, self.cookie as u32, otherwise);
        p.load(ARG5_HIGH);
        p.jump_unless(JUMP_EQ, (self.cookie >> 32) as u32, otherwise);
        p.ret(RET_ALLOW);
    }

    /// Installs the filter on the calling thread (and whatever it forks from now on) and returns the one listener.
    /// Needs CAP_SYS_ADMIN: `no_new_privs` would cripple set-uid programs.
    pub fn install(&self) -> io::Result<Listener> {
        const NEW_LISTENER: libc::c_ulong = 1 << 3;
        const SPEC_ALLOW: libc::c_ulong = 1 << 2;
        // A caller whose notification was received can be interrupted by fatal signals only, so an answered clone
        // either happens or dies (Linux 5.19; DESIGN.md needs 6.1 anyway).
        const WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;
        let mut program = self.program();
        let fprog = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: `fprog` and the program it points to live across the call, which copies them.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                NEW_LISTENER | SPEC_ALLOW | WAIT_KILLABLE_RECV,
                &fprog,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call returned a new descriptor that nobody else knows.
        let listener = Listener::from(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        listener.wake_on_this_cpu();
        Ok(listener)
    }
}

/// One notified call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Notification {
    /// Names the call until it is answered.
    pub id: u64,
    /// The calling thread, as the receiver's PID namespace numbers it.
    pub tid: u32,
    flags: u32,
    /// The call's number, as its entry counts.
    pub nr: i32,
    /// Which entry: [`ARCH_X86_64`] or [`ARCH_I386`].
    pub arch: u32,
    /// The caller's instruction pointer.
    pub ip: u64,
    /// The arguments.
    pub args: [u64; 6],
}

/// What becomes of a notified call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The kernel executes it.
    Continue,
    /// It fails.
    Errno(i32),
    /// It returns this.
    Value(i64),
}

/// The receiving end of the filter's notifications.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl From<OwnedFd> for Listener {
    fn from(fd: OwnedFd) -> Self {
        Listener(fd)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

const IOCTL_RECV: libc::c_ulong = 0xc050_2100;
const IOCTL_SEND: libc::c_ulong = 0xc018_2101;
const IOCTL_ID_VALID: libc::c_ulong = 0x4008_2102;
const IOCTL_SET_FLAGS: libc::c_ulong = 0x4008_2104;

impl Listener {
    /// Blocks until a call is notified. `None`: the caller was gone before it could be looked at.
    pub fn receive(&self) -> io::Result<Option<Notification>> {
        let mut notification = Notification {
            id: 0,
            tid: 0,
            flags: 0,
            nr: 0,
            arch: 0,
            ip: 0,
            args: [0; 6],
        };
        // SAFETY: the structure has the layout of `struct seccomp_notif` (80 bytes, all zero as the kernel demands).
        let r = unsafe { libc::ioctl(self.0.as_raw_fd(), IOCTL_RECV, &mut notification) };
        match r {
            0 => Ok(Some(notification)),
            _ => match io::Error::last_os_error() {
                e if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => Ok(None),
                e => Err(e),
            },
        }
    }

    /// Answers a call. `false`: the caller is gone, or was answered before.
    pub fn answer(&self, id: u64, answer: Answer) -> io::Result<bool> {
        #[repr(C)]
        struct Response {
            id: u64,
            value: i64,
            error: i32,
            flags: u32,
        }
        let (value, error, flags) = match answer {
            Answer::Continue => (0, 0, 1),
            Answer::Errno(e) => (0, -e, 0),
            Answer::Value(v) => (v, 0, 0),
        };
        let response = Response {
            id,
            value,
            error,
            flags,
        };
        // SAFETY: the structure has the layout of `struct seccomp_notif_resp` and is only read.
        let r = unsafe { libc::ioctl(self.0.as_raw_fd(), IOCTL_SEND, &response) };
        match r {
            0 => Ok(true),
            _ => match io::Error::last_os_error() {
                e if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINPROGRESS)) => Ok(false),
                e => Err(e),
            },
        }
    }

    /// Is this call still waiting for its answer?
    pub fn is_waiting(&self, id: u64) -> bool {
        // SAFETY: the ioctl reads one u64.
        unsafe { libc::ioctl(self.0.as_raw_fd(), IOCTL_ID_VALID, &id) == 0 }
    }

    /// Caller and receiver take turns, so waking the other on the same CPU is cheapest (Linux 6.6; no matter if refused).
    fn wake_on_this_cpu(&self) {
        // SAFETY: the ioctl takes its flags by value.
        let _ = unsafe { libc::ioctl(self.0.as_raw_fd(), IOCTL_SET_FLAGS, 1 as libc::c_ulong) };
    }
}

/// Places in the program that are jumped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    Wide,
    Narrow,
    Allow,
    NoSuchCall,
    Unmarked,
    PidCall,
    Pid,
    AllowPid,
    Judge,
    Notify,
    AllowPid2,
    Refused,
}

/// Puts instructions together; every jump is forward, as classic BPF demands.
#[derive(Default)]
struct Assembler {
    code: Vec<libc::sock_filter>,
    jumps: Vec<(usize, Label)>,
    places: Vec<(Label, usize)>,
}

impl Assembler {
    fn op(&mut self, code: u16, k: u32) {
        self.code.push(libc::sock_filter { code, jt: 0, jf: 0, k });
    }

    fn load(&mut self, offset: u32) {
        self.op(LOAD, offset);
    }

    fn ret(&mut self, action: u32) {
        self.op(RETURN, action);
    }

    fn place(&mut self, label: Label) {
        self.places.push((label, self.code.len()));
    }

    /// A conditional jump reaches 255 instructions; an unconditional one behind it reaches any.
    fn jump_if(&mut self, test: u16, k: u32, to: Label) {
        self.code.push(libc::sock_filter {
            code: test,
            jt: 0,
            jf: 1,
            k,
        });
        self.jump(to);
    }

    fn jump_unless(&mut self, test: u16, k: u32, to: Label) {
        self.code.push(libc::sock_filter {
            code: test,
            jt: 1,
            jf: 0,
            k,
        });
        self.jump(to);
    }

    fn jump(&mut self, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.op(JUMP, 0);
    }

    fn finish(mut self) -> Vec<libc::sock_filter> {
        for (at, label) in self.jumps {
            let (_, place) = self
                .places
                .iter()
                .find(|(l, _)| *l == label)
                .expect("every label is placed");
            assert!(*place > at, "{label:?} is jumped to backwards");
            self.code[at].k = (place - at - 1) as u32;
        }
        self.code
    }
}

#[cfg(test)]
#[path = "seccomp_tests.rs"]
mod tests;
