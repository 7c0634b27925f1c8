//! The program that a surrogate runs: it waits for signals and children and writes what came to a socket.
//!
//! Owns the assembler, the minimal ELF file around it (in a sealed memfd) and the format of its reports. Refuses to know
//! who reads them. Invariants of the program: it keeps every signal blocked, so that each is taken with its payload and
//! none takes effect (but SIGKILL and SIGSTOP); it uses its stack and one descriptor and nothing else; its name is its
//! first argument; while nobody reads, it waits; one that is [secured](secure) begins anew if its tracer dies.

use crate::fdpass;
use crate::procfs::{ProcDir, maps};
use crate::ptrace::{Registers, Stopped};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// The kernel's siginfo_t.
pub type SigInfo = [u8; 128];

/// A report: an eight-byte tag, then a siginfo.
const REPORT_BYTES: usize = 8 + 128;

/// What a surrogate tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// It took this signal.
    Signal(SigInfo),
    /// A child of it ended (and is reaped), stopped or continued; as waitid(2) tells it.
    Child(SigInfo),
}

std::arch::global_asm!(
    ".pushsection .rodata.dunlin_surrogate, \"a\", @progbits",
    ".balign 16",
    "dunlin_surrogate_start:",
    "mov r15, [rsp + 8]", // argv[0]
    // Not 1: the assembler takes "1b" for a number.
    "6:",
    "sub rsp, 256",
    "and rsp, -16",
    // rt_sigprocmask(SIG_SETMASK, all, 0, 8)
    "mov qword ptr [rsp], -1",
    "mov eax, 14",
    "mov edi, 2",
    "mov rsi, rsp",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    // rt_sigaction(SIGCHLD, default, 0, 8): were it ignored, the kernel would reap the children unseen
    "xor eax, eax",
    "mov [rsp], rax",
    "mov [rsp + 8], rax",
    "mov [rsp + 16], rax",
    "mov [rsp + 24], rax",
    "mov eax, 13",
    "mov edi, 17",
    "mov rsi, rsp",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    // prctl(PR_SET_NAME, argv[0])
    "test r15, r15",
    "jz 2f",
    "mov eax, 157",
    "mov edi, 15",
    "mov rsi, r15",
    "xor edx, edx",
    "xor r10d, r10d",
    "xor r8d, r8d",
    "syscall",
    "2:",
    // socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)
    "mov eax, 41",
    "mov edi, 1",
    "mov esi, 0x80002",
    "xor edx, edx",
    "syscall",
    "mov r12d, eax",
    // connect(fd, address, length)
    "mov eax, 42",
    "mov edi, r12d",
    "lea rsi, [rip + dunlin_surrogate_address]",
    "mov edx, [rip + dunlin_surrogate_length]",
    "syscall",
    // The report is at rsp + 16: tag, then siginfo. First the children that ended before SIGCHLD was blocked.
    "jmp 4f",
    "3:",
    // rt_sigtimedwait(all, info, forever, 8)
    "mov qword ptr [rsp], -1",
    "mov eax, 128",
    "mov rdi, rsp",
    "lea rsi, [rsp + 24]",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    "test eax, eax",
    "js 3b",
    "mov r13d, eax",
    "mov qword ptr [rsp + 16], 1",
    "call 5f",
    "cmp r13d, 17",
    "jne 3b",
    "4:",
    // waitid(P_ALL, 0, info, WEXITED | WSTOPPED | WCONTINUED | WNOHANG | __WALL, 0)
    "mov eax, 247",
    "xor edi, edi",
    "xor esi, esi",
    "lea rdx, [rsp + 24]",
    "mov r10d, 0x4000000f",
    "xor r8d, r8d",
    "syscall",
    "test eax, eax",
    "js 3b",
    "cmp dword ptr [rsp + 24 + 16], 0", // si_pid: 0 if there was none
    "je 3b",
    "mov qword ptr [rsp + 16], 2",
    "call 5f",
    "jmp 4b",
    "5:",
    // sendto(fd, report, 136, MSG_NOSIGNAL, 0, 0); the call has pushed eight bytes
    "mov eax, 44",
    "mov edi, r12d",
    "lea rsi, [rsp + 24]",
    "mov edx, 136",
    "mov r10d, 0x4000",
    "xor r8d, r8d",
    "xor r9d, r9d",
    "syscall",
    "cmp rax, -4", // EINTR
    "je 5b",
    "ret",
    // After a clone: it begins anew; its child, which shares its stack, was never anything.
    "dunlin_surrogate_born:",
    "test eax, eax",
    "jz dunlin_surrogate_unborn",
    "dunlin_surrogate_anew:",
    // close_range(0, ~0, 0)
    "mov eax, 436",
    "xor edi, edi",
    "mov esi, -1",
    "xor edx, edx",
    "syscall",
    "xor r15d, r15d",
    "jmp 6b",
    // It waits: its end would be told as that of whom its number is. Whoever comes next ends it.
    "dunlin_surrogate_unborn:",
    "mov eax, 34", // pause
    "syscall",
    "jmp dunlin_surrogate_unborn",
    ".balign 8",
    "dunlin_surrogate_length: .long 0",
    "dunlin_surrogate_address: .space 112",
    "dunlin_surrogate_end:",
    ".popsection",
);

unsafe extern "C" {
    static dunlin_surrogate_start: [u8; 0];
    static dunlin_surrogate_anew: [u8; 0];
    static dunlin_surrogate_born: [u8; 0];
    static dunlin_surrogate_unborn: [u8; 0];
    static dunlin_surrogate_length: [u8; 0];
    static dunlin_surrogate_end: [u8; 0];
}

/// The program, reporting to the abstract socket `name`, as a sealed executable file.
pub fn program(name: &[u8]) -> io::Result<OwnedFd> {
    let image = image(name)?;
    let allowed = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // MFD_EXEC says that we mean it (Linux 6.3); older kernels do not know it and need not be told.
    let fd = rustix::fs::memfd_create("surrogate", allowed | MemfdFlags::EXEC)
        .or_else(|_| rustix::fs::memfd_create("surrogate", allowed))?;
    let mut file = File::from(fd);
    file.write_all(&image)?;
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o555))?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    // A file that is open for writing cannot be executed; reopened, it is not.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    Ok(File::open(path)?.into())
}

/// The socket that the reports of `program(name)` arrive at, in the caller's network namespace.
pub fn reports(name: &[u8]) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    rustix::net::sockopt::set_socket_passcred(&socket, true)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new_abstract_name(name)?)?;
    Ok(socket)
}

/// The next report and the PID of its sender, as the caller numbers it. `None`: there is none.
pub fn receive(socket: impl AsFd) -> io::Result<Option<(i32, Report)>> {
    loop {
        let mut bytes = [0u8; REPORT_BYTES + 1];
        match fdpass::receive_raw(socket.as_fd(), &mut bytes, false) {
            Ok((REPORT_BYTES, _, Some(pid))) => {
                let info = bytes[8..REPORT_BYTES].try_into().expect("128 bytes");
                match bytes[0] {
                    1 => return Ok(Some((pid, Report::Signal(info)))),
                    2 => return Ok(Some((pid, Report::Child(info)))),
                    _ => {}
                }
            }
            // Anybody in the nest can send; what is no report is nothing.
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        }
    }
}

/// How the program is called in `/proc/PID/exe`.
const NAME: &str = "/memfd:surrogate";
/// Headers of the file; the code follows.
const HEADERS: u64 = 64 + 2 * 56;
/// How far below its stack pointer a surrogate is made to return from.
const BELOW: u64 = 512;
/// From the stack pointer of a secured surrogate to that for a clone, and from there to that for its child.
const NEXT: u64 = 16;

/// Does this process run the program?
pub fn is_one(process: i32) -> bool {
    let runs = ProcDir::process(process).link("exe").unwrap_or_default();
    runs.as_os_str().as_encoded_bytes().starts_with(NAME.as_bytes())
}

/// Has a stopped surrogate begin anew, should its tracer die in a call that it injects (by an instruction that a plain
/// return follows). Hands back its registers, to be put back after the last call; `None` if it is no surrogate.
pub fn secure(thread: &Stopped, process: i32) -> io::Result<Option<Registers>> {
    if !is_one(process) {
        return Ok(None);
    }
    let dir = ProcDir::process(process);
    let mappings = maps::parse(&dir.bytes("maps")?)?;
    let text = mappings
        .iter()
        .find(|m| m.execute && m.name.starts_with(NAME.as_bytes()));
    let Some(text) = text else { return Ok(None) };
    // SAFETY: the symbols lie in the assembler block above.
    let offsets = unsafe {
        let start = (&raw const dunlin_surrogate_start).cast::<u8>();
        [
            (&raw const dunlin_surrogate_anew).cast::<u8>().offset_from(start) as u64,
            (&raw const dunlin_surrogate_born).cast::<u8>().offset_from(start) as u64,
            (&raw const dunlin_surrogate_unborn).cast::<u8>().offset_from(start) as u64,
        ]
    };
    let places = offsets.map(|offset| [text.start + HEADERS + offset, 0]);
    let words: Vec<u8> = places
        .as_flattened()
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let before = thread.registers().map_err(io::Error::other)?;
    let rsp = before.rsp.wrapping_sub(BELOW) & !15;
    let memory = File::options().write(true).open(dir.path("mem"))?;
    memory.write_all_at(&words, rsp)?;
    let secured = Registers { rsp, ..before };
    thread.set_registers(&secured).map_err(io::Error::other)?;
    Ok(Some(before))
}

/// Readies a secured surrogate for a clone: its child, should the tracer die, waits for ever and touches nothing, as it
/// shares the memory. Hands back its registers, for calls of other kinds.
pub fn secure_for_clone(thread: &Stopped) -> io::Result<Registers> {
    let before = thread.registers().map_err(io::Error::other)?;
    let rsp = before.rsp + NEXT;
    let secured = Registers { rsp, ..before };
    thread.set_registers(&secured).map_err(io::Error::other)?;
    Ok(before)
}

/// The same for the calls of that child.
pub fn secure_child(child: &Stopped) -> io::Result<()> {
    secure_for_clone(child).map(drop)
}

/// A static position-independent ELF executable with one read-and-execute segment: headers, code, address.
fn image(name: &[u8]) -> io::Result<Vec<u8>> {
    if name.len() > 107 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the symbols delimit the assembler block above, which is one contiguous run of initialised bytes.
    let (code, length_at) = unsafe {
        let start = (&raw const dunlin_surrogate_start).cast::<u8>();
        let end = (&raw const dunlin_surrogate_end).cast::<u8>();
        let length = (&raw const dunlin_surrogate_length).cast::<u8>();
        let code = std::slice::from_raw_parts(start, end.offset_from(start) as usize);
        (code, length.offset_from(start) as usize)
    };
    let mut code = code.to_vec();
    let mut address = vec![];
    address.extend((libc::AF_UNIX as u16).to_ne_bytes());
    address.push(0);
    address.extend(name);
    code[length_at..length_at + 4].copy_from_slice(&(address.len() as u32).to_le_bytes());
    code[length_at + 4..length_at + 4 + address.len()].copy_from_slice(&address);

    let total = HEADERS + code.len() as u64;
    let mut out = Vec::with_capacity(total as usize);
    out.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let half = |out: &mut Vec<u8>, v: u16| out.extend(v.to_le_bytes());
    let word = |out: &mut Vec<u8>, v: u32| out.extend(v.to_le_bytes());
    let long = |out: &mut Vec<u8>, v: u64| out.extend(v.to_le_bytes());
    half(&mut out, 3); // ET_DYN
    half(&mut out, 62); // EM_X86_64
    word(&mut out, 1);
    long(&mut out, HEADERS); // entry
    long(&mut out, 64); // program headers
    long(&mut out, 0);
    word(&mut out, 0);
    for v in [64, 56, 2, 64, 0, 0] {
        half(&mut out, v);
    }
    let mut segment = |kind: u32, flags: u32, size: u64, align: u64| {
        word(&mut out, kind);
        word(&mut out, flags);
        for v in [0, 0, 0, size, size, align] {
            long(&mut out, v);
        }
    };
    segment(1, 5, total, 4096); // PT_LOAD, R+X
    segment(0x6474_e551, 6, 0, 16); // PT_GNU_STACK: not executable
    out.extend(&code);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::foothold::syscall_instruction;
    use crate::ptrace::{Options, Running};
    use crate::spawn;
    use std::ffi::CString;
    use std::os::fd::AsRawFd;
    use std::time::{Duration, Instant};

    fn next(socket: &OwnedFd) -> (i32, Report) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(report) = receive(socket).unwrap() {
                return report;
            }
            assert!(Instant::now() < end, "no report");
            let mut fds = [rustix::event::PollFd::new(socket, rustix::event::PollFlags::IN)];
            let _ = rustix::event::poll(&mut fds, Some(&rustix::time::Timespec { tv_sec: 1, tv_nsec: 0 }));
        }
    }

    fn number(info: &SigInfo, at: usize) -> i32 {
        i32::from_ne_bytes(info[at..at + 4].try_into().unwrap())
    }

    fn number_of(info: &SigInfo) -> i32 {
        number(info, 0)
    }

    /// Ends the surrogate however the test ends.
    struct Ended(i32);

    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = spawn::kill(self.0, libc::SIGKILL, 0);
            let pid = rustix::process::Pid::from_raw(self.0);
            let _ = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
        }
    }

    fn set_up(test: &str) -> (OwnedFd, OwnedFd) {
        let name = format!("dunlin-test-{test}-{}", std::process::id());
        (reports(name.as_bytes()).unwrap(), program(name.as_bytes()).unwrap())
    }

    fn start(program: &OwnedFd) -> (i32, Ended) {
        let argv = [CString::new("one-with-a-long-name").unwrap()];
        let child = spawn::Child {
            program: spawn::Program::File(program.as_fd()),
            argv: &argv,
            env: &[],
            cwd: None,
            umask: None,
            owner: None,
            stdio: None,
            session: true,
            controlling_tty: false,
            group: None,
            signals_blocked: true,
            oom_score_adj: None,
            open_files: None,
        };
        let started = spawn::start(&child, 0).unwrap();
        let pid = started.pid;
        let ended = Ended(pid);
        started.executed().unwrap();
        (pid, ended)
    }

    #[test]
    fn signals_arrive_with_their_payload_and_nothing_else_counts() {
        let (socket, program) = set_up("signals");
        let (pid, _ended) = start(&program);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGTSTP, libc::SIGSEGV, 32, 64] {
            spawn::kill(pid, signal, 0).unwrap();
            let (from, report) = next(&socket);
            let Report::Signal(info) = report else {
                panic!("{report:?}")
            };
            assert_eq!((from, number(&info, 0)), (pid, signal));
            assert_eq!(number(&info, 16), std::process::id() as i32, "the sender");
        }
        // SAFETY: sends a value, no memory.
        unsafe {
            let value = libc::sigval {
                sival_ptr: 0x1234_5678_9abc as *mut libc::c_void,
            };
            assert_eq!(libc::sigqueue(pid, 40, value), 0);
        }
        let (_, Report::Signal(info)) = next(&socket) else {
            panic!()
        };
        assert_eq!(&info[24..32], &0x1234_5678_9abcu64.to_ne_bytes());
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        assert_eq!(comm, "one-with-a-long\n");
        let name = rustix::net::getsockname(&socket).unwrap();
        rustix::net::sendto(
            rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None).unwrap(),
            b"not a report",
            rustix::net::SendFlags::empty(),
            &name,
        )
        .unwrap();
        assert_eq!(receive(&socket).unwrap(), None);
    }

    #[test]
    fn one_whose_tracer_dies_in_an_injected_call_begins_anew() {
        let (socket, program) = set_up("anew");
        let (pid, _ended) = start(&program);
        // It has begun when it answers.
        spawn::kill(pid, libc::SIGTERM, 0).unwrap();
        next(&socket);
        for number in [libc::SYS_getpid, libc::SYS_close_range] {
            std::thread::spawn(move || {
                let soon = Instant::now() + Duration::from_secs(10);
                let running = Running::seize(pid, Options::default()).unwrap();
                let (thread, _) = running.stop(soon).unwrap();
                let at = syscall_instruction(&ProcDir::process(pid)).unwrap();
                let before = secure(&thread, pid).unwrap().unwrap();
                let (thread, answer) = thread.inject(at, libc::SYS_getpid, [0; 6]).unwrap();
                assert_eq!(answer, i64::from(pid));
                // As if it had died between the call and what comes after it.
                let secured = thread.registers().unwrap();
                let call = Registers {
                    rip: at,
                    rax: number as u64,
                    orig_rax: u64::MAX,
                    rdi: 0,
                    rsi: u64::from(u32::MAX),
                    rdx: 0,
                    ..secured
                };
                thread.set_registers(&call).unwrap();
                assert_ne!(before.rsp, secured.rsp);
            })
            .join()
            .unwrap();
            spawn::kill(pid, libc::SIGUSR1, 0).unwrap();
            let (from, Report::Signal(info)) = next(&socket) else {
                panic!()
            };
            assert_eq!((from, number_of(&info)), (pid, libc::SIGUSR1));
        }
    }

    #[test]
    fn a_child_whose_tracer_dies_before_it_is_a_surrogate_waits_and_is_not_told_of() {
        let (socket, program) = set_up("unborn");
        let (pid, _ended) = start(&program);
        spawn::kill(pid, libc::SIGTERM, 0).unwrap();
        next(&socket);
        // As if it had died between the clone and what comes after it.
        std::thread::spawn(move || {
            let soon = Instant::now() + Duration::from_secs(10);
            let running = Running::seize(pid, Options::default()).unwrap();
            let (thread, _) = running.stop(soon).unwrap();
            let at = syscall_instruction(&ProcDir::process(pid)).unwrap();
            secure(&thread, pid).unwrap().unwrap();
            secure_for_clone(&thread).unwrap();
            let secured = thread.registers().unwrap();
            let call = Registers {
                rip: at,
                rax: libc::SYS_clone as u64,
                orig_rax: u64::MAX,
                rdi: (libc::CLONE_VM | libc::SIGCHLD) as u64,
                rsi: 0,
                rdx: 0,
                r10: 0,
                r8: 0,
                ..secured
            };
            thread.set_registers(&call).unwrap();
        })
        .join()
        .unwrap();
        spawn::kill(pid, libc::SIGUSR1, 0).unwrap();
        let Report::Signal(info) = next(&socket).1 else {
            panic!("its child is told of")
        };
        assert_eq!(number_of(&info), libc::SIGUSR1);
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let child: i32 = children.trim().parse().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let waits = || ProcDir::process(child).text("syscall").unwrap().starts_with("34 ");
        while !waits() {
            assert!(Instant::now() < deadline, "it does not wait");
        }
        spawn::kill(child, libc::SIGKILL, 0).unwrap();
        let is_end = |report: Report| match report {
            Report::Child(info) => (number(&info, 8), number(&info, 24)) == (libc::CLD_KILLED, libc::SIGKILL),
            Report::Signal(_) => false,
        };
        while !is_end(next(&socket).1) {}
    }

    #[test]
    fn children_are_reaped_and_told_of() {
        let (socket, program) = set_up("children");
        let path = format!("/proc/{}/fd/{}", std::process::id(), program.as_raw_fd());
        // The first child has ended before its parent becomes the surrogate, the second ends after.
        let script = format!(
            "import os, signal\n\
             if os.fork() == 0: os._exit(3)\n\
             os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)\n\
             if os.fork() == 0: os.read(0, 1); os._exit(1)\n\
             signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n\
             signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n\
             os.execv('{path}', ['parent'])"
        );
        #[allow(clippy::zombie_processes)] // `Ended` waits for it.
        let mut child = std::process::Command::new("python3")
            .args(["-c", &script])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let _ended = Ended(child.id() as i32);
        let (pid, Report::Child(info)) = next(&socket) else {
            panic!()
        };
        assert_eq!(pid, child.id() as i32);
        assert_eq!(
            (number(&info, 0), number(&info, 8), number(&info, 24)),
            (libc::SIGCHLD, libc::CLD_EXITED, 3)
        );
        drop(child.stdin.take());
        // In the order of its looks: it may find the child before the signal.
        let (mut signal, mut ended) = (None, None);
        for _ in 0..2 {
            match next(&socket).1 {
                Report::Signal(info) => signal = Some(number(&info, 0)),
                Report::Child(info) => ended = Some((number(&info, 8), number(&info, 24))),
            }
        }
        assert_eq!((signal, ended), (Some(libc::SIGCHLD), Some((libc::CLD_EXITED, 1))));
    }
}
