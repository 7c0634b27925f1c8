//! Making a process from a process with several threads, under the nest's filter.
//!
//! Owns the raw `clone3`, `pidfd_open` and `kill` that carry the filter's cookie, and everything a child does before its
//! `execve`. Refuses to know which PID the child gets. Invariants: between clone and exec the child makes raw system
//! calls only (no allocation, no lock, no libc call that knows of threads); a child that cannot be what was asked for
//! tells its parent which step failed and ends; no descriptor but the three standard ones, if given,
//! survives the exec.

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A program to be executed.
#[derive(Debug)]
pub struct Child<'a> {
    /// What to execute.
    pub program: Program<'a>,
    /// Its arguments, the first being its name.
    pub argv: &'a [CString],
    /// Its whole environment.
    pub env: &'a [CString],
    /// Its working directory; its parent's without.
    pub cwd: Option<&'a CStr>,
    /// Its umask; its parent's without.
    pub umask: Option<u32>,
    /// Whom it runs as; its parent's credentials without.
    pub owner: Option<Owner<'a>>,
    /// Descriptors 0, 1 and 2; none may be 0, 1 or 2 itself. Without, it has no descriptor at all.
    pub stdio: Option<[BorrowedFd<'a>; 3]>,
    /// It leads a new session.
    pub session: bool,
    /// Descriptor 0 becomes its controlling terminal.
    pub controlling_tty: bool,
    /// It goes into this process group of its session (0: a new one of its own).
    pub group: Option<i32>,
    /// It starts with all signals blocked instead of none.
    pub signals_blocked: bool,
    /// Written to its oom_score_adj, which its parent may have lowered for itself.
    pub oom_score_adj: Option<i32>,
    /// Its limit of open files (soft, hard), which its parent may have raised for itself.
    pub open_files: Option<(u64, u64)>,
}

/// What to execute.
#[derive(Debug, Clone, Copy)]
pub enum Program<'a> {
    /// The first of these paths that can be.
    Paths(&'a [CString]),
    /// An open file.
    File(BorrowedFd<'a>),
}

/// Whom a process runs as.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// Real, effective and saved user.
    pub uid: u32,
    /// Real, effective and saved group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: &'a [u32],
}

/// What a child does before its program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// setsid or setpgid.
    Session = 1,
    /// dup2.
    Stdio,
    /// TIOCSCTTY.
    Terminal,
    /// chdir.
    Directory,
    /// setgroups, setresgid, setresuid.
    Owner,
    /// execve.
    Exec,
}

impl Step {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Step::Session => "making the session or process group",
            Step::Stdio => "setting the standard descriptors",
            Step::Terminal => "taking the controlling terminal",
            Step::Directory => "entering the working directory",
            Step::Owner => "becoming the user",
            Step::Exec => "executing the program",
        }
    }

    fn from_byte(byte: u8) -> Step {
        match byte {
            1 => Step::Session,
            2 => Step::Stdio,
            3 => Step::Terminal,
            4 => Step::Directory,
            5 => Step::Owner,
            _ => Step::Exec,
        }
    }
}

/// A child that exists, and does not yet execute its program.
#[derive(Debug)]
pub struct Started {
    /// Its PID in the parent's namespace.
    pub pid: i32,
    report: OwnedFd,
}

impl Started {
    /// Blocks until the program is executed. On failure says which step failed and why; the child has ended then, and
    /// must be waited for.
    pub fn executed(self) -> Result<(), (Step, io::Error)> {
        let mut report = [0u8; 5];
        let failed = loop {
            match rustix::io::read(&self.report, &mut report) {
                Ok(n) => break n == report.len(),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => break false,
            }
        };
        if !failed {
            return Ok(());
        }
        let errno = i32::from_ne_bytes([report[1], report[2], report[3], report[4]]);
        Err((Step::from_byte(report[0]), io::Error::from_raw_os_error(errno)))
    }
}

/// Clones the caller with `cookie` in the sixth argument and lets the child execute its program. Returns as soon as the
/// child has its PID: see [`Started::executed`].
pub fn start(child: &Child<'_>, cookie: u64) -> io::Result<Started> {
    let (report, report_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        let ends = std::iter::once(std::ptr::null());
        strings.iter().map(|s| s.as_ptr()).chain(ends).collect()
    };
    let (argv, env) = (pointers(child.argv), pointers(child.env));
    let mut oom = [0u8; 12];
    let oom = child.oom_score_adj.map(|score| {
        use io::Write;
        let mut rest = &mut oom[..];
        let _ = write!(rest, "{score}");
        let left = rest.len();
        (oom, oom.len() - left)
    });
    // SAFETY: without CLONE_VM the child has a copy of everything; it calls nothing but `become_program`, which makes
    // raw system calls only, and never returns into code that believes in the threads that were not cloned.
    let pid = unsafe { clone3(libc::SIGCHLD as u64, cookie) };
    match pid {
        0 => {
            // SAFETY: this is the child; the pointers are to its own copy of the parent's live strings.
            let (step, errno) = unsafe { become_program(child, &argv, &env, oom.as_ref()) };
            let mut message = [step as u8; 5];
            message[1..].copy_from_slice(&errno.to_ne_bytes());
            // SAFETY: raw calls on a descriptor and a buffer of our own; the second does not return.
            unsafe {
                libc::write(report_end.as_raw_fd(), message.as_ptr().cast(), message.len());
                libc::_exit(127)
            }
        }
        e if e < 0 => Err(io::Error::from_raw_os_error(-e as i32)),
        pid => Ok(Started {
            pid: pid as i32,
            report,
        }),
    }
}

/// clone3 with nothing but an exit signal, and the cookie where the kernel ignores it: glibc has no way to pass it.
///
/// # Safety
/// Returns twice, the second time in a process with one thread: see fork(2) about what may be called there.
#[inline(never)]
unsafe fn clone3(exit_signal: u64, cookie: u64) -> i64 {
    // struct clone_args, first version: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls.
    let args: [u64; 8] = [0, 0, 0, 0, exit_signal, 0, 0, 0];
    let mut result: i64 = libc::SYS_clone3;
    // SAFETY: clone3 reads the structure; without CLONE_VM it writes nothing in this process.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") &args,
            in("rsi") size_of_val(&args),
            in("rdx") 0u64,
            in("r10") 0u64,
            in("r8") 0u64,
            in("r9") cookie,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// Runs in the child. Returns only if a step failed: which, and why.
///
/// # Safety
/// Only in a freshly cloned child. `argv` and `env` end in null and point to live strings.
unsafe fn become_program(
    child: &Child<'_>,
    argv: &[*const c_char],
    env: &[*const c_char],
    oom: Option<&([u8; 12], usize)>,
) -> (Step, i32) {
    // SAFETY: raw system calls on memory of our own. The setters of credentials are called by number because libc's
    // would signal threads that this process does not have.
    unsafe {
        let errno = || *libc::__errno_location();
        if child.session && libc::setsid() < 0 {
            return (Step::Session, errno());
        }
        if let Some(group) = child.group
            && libc::setpgid(0, group) < 0
        {
            return (Step::Session, errno());
        }
        if let Some(stdio) = &child.stdio {
            for (to, from) in stdio.iter().enumerate() {
                if libc::dup2(from.as_raw_fd(), to as i32) < 0 {
                    return (Step::Stdio, errno());
                }
            }
        }
        if child.controlling_tty && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return (Step::Terminal, errno());
        }
        if let Some((text, length)) = oom {
            let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if fd >= 0 {
                libc::write(fd, text.as_ptr().cast(), *length);
                libc::close(fd);
            }
        }
        if let Some((soft, hard)) = child.open_files {
            let limit = [soft, hard];
            libc::syscall(libc::SYS_prlimit64, 0, libc::RLIMIT_NOFILE, limit.as_ptr(), 0usize);
        }
        if let Some(umask) = child.umask {
            libc::umask(umask);
        }
        if let Some(owner) = &child.owner {
            let (g, u) = (owner.gid, owner.uid);
            if libc::syscall(libc::SYS_setgroups, owner.groups.len(), owner.groups.as_ptr()) < 0
                || libc::syscall(libc::SYS_setresgid, g, g, g) < 0
                || libc::syscall(libc::SYS_setresuid, u, u, u) < 0
            {
                return (Step::Owner, errno());
            }
        }
        // As the owner: root may not enter a user's directory on NFS.
        if let Some(cwd) = child.cwd
            && libc::chdir(cwd.as_ptr()) < 0
        {
            return (Step::Directory, errno());
        }
        // Not closed but marked: the report and the file to execute are needed until the exec.
        let first = if child.stdio.is_some() { 3u32 } else { 0 };
        libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        // struct sigaction of the kernel: handler, flags, restorer, mask; all zero is the default.
        let default = [0u64; 4];
        for signal in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0usize, 8usize);
        }
        let mask: u64 = if child.signals_blocked { u64::MAX } else { 0 };
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &mask, 0usize, 8usize);
        match child.program {
            Program::File(file) => {
                libc::syscall(
                    libc::SYS_execveat,
                    file.as_raw_fd(),
                    c"".as_ptr(),
                    argv.as_ptr(),
                    env.as_ptr(),
                    libc::AT_EMPTY_PATH,
                );
                (Step::Exec, errno())
            }
            Program::Paths(paths) => {
                // As execvp does: a program that may not be executed is told of only if no later path has one that may.
                let mut worst = libc::ENOENT;
                for path in paths {
                    libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr());
                    match errno() {
                        libc::ENOENT | libc::ENOTDIR => {}
                        libc::EACCES => worst = libc::EACCES,
                        other => return (Step::Exec, other),
                    }
                }
                (Step::Exec, worst)
            }
        }
    }
}

/// Where a program of this name is looked for: as it is if it has a slash, else in each directory of `path`.
pub fn candidates(name: &CStr, path: &[u8]) -> Vec<CString> {
    if name.to_bytes().contains(&b'/') {
        return vec![name.to_owned()];
    }
    if name.is_empty() {
        return Vec::new();
    }
    path.split(|b| *b == b':')
        .filter_map(|directory| {
            let directory: &[u8] = if directory.is_empty() { b"." } else { directory };
            CString::new([directory, b"/", name.to_bytes()].concat()).ok()
        })
        .collect()
}

/// pidfd_open with the cookie. `thread`: a thread that leads no process may be meant (Linux 6.9).
///
/// ESRCH says that the kernel knows no task of that number.
pub fn pidfd_open(pid: i32, thread: bool, cookie: u64) -> io::Result<OwnedFd> {
    let flags = if thread { libc::PIDFD_THREAD } else { 0 };
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags, 0, 0, 0, cookie) };
    match fd {
        e if e < 0 => Err(io::Error::last_os_error()),
        // SAFETY: the call returned a new descriptor that nobody else knows.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
    }
}

/// Does the kernel know this number in the caller's namespace, be it as process, thread or process group? Linux 6.18 does
/// not tell of a session of which no group has the number: then a task that is to have it gets another.
pub fn pid_is_known(pid: i32, cookie: u64) -> bool {
    let is_absent = |done: io::Result<()>| done.is_err_and(|e| e.raw_os_error() == Some(libc::ESRCH));
    // -1 is everybody.
    let is_group = || pid > 1 && !is_absent(kill(-pid, 0, cookie));
    !is_absent(pidfd_open(pid, false, cookie).map(drop)) || is_group()
}

/// kill with the cookie.
pub fn kill(pid: i32, signal: i32, cookie: u64) -> io::Result<()> {
    // SAFETY: a system call without pointers.
    match unsafe { libc::syscall(libc::SYS_kill, pid, signal, 0, 0, 0, cookie) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has a command start with its three standard descriptors alone, whatever else this process was given, or opened without
/// O_CLOEXEC.
pub fn with_stdio_alone(command: &mut Command) -> &mut Command {
    let close = || {
        // Not closed but marked: the command's own report of a failed exec is among them.
        // SAFETY: a system call without pointers.
        match unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(close) }
}

/// Descriptors at 3 or above, so that they can become the standard ones in any order.
pub fn above_stdio(fd: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::process::CommandExt;

    fn strings(list: &[&str]) -> Vec<CString> {
        list.iter().map(|s| CString::new(*s).unwrap()).collect()
    }

    fn run(change: impl Fn(&mut Child<'_>), script: &str) -> (String, i32) {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let null = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap();
        let (argv, env) = (strings(&["sh", "-c", script]), strings(&["A=b", "PATH=/bin"]));
        let paths = candidates(c"sh", b"/nonexistent:/bin");
        let mut child = Child {
            program: Program::Paths(&paths),
            argv: &argv,
            env: &env,
            cwd: Some(c"/"),
            umask: Some(0o27),
            owner: None,
            stdio: Some([null.as_fd(), write.as_fd(), write.as_fd()]),
            session: true,
            controlling_tty: false,
            group: None,
            signals_blocked: false,
            oom_score_adj: Some(7),
            open_files: Some((99, 100)),
        };
        change(&mut child);
        let started = start(&child, 0).unwrap();
        let pid = started.pid;
        started.executed().unwrap();
        drop(write);
        let mut output = String::new();
        std::fs::File::from(read).read_to_string(&mut output).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        let (_, status) = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty())
            .unwrap()
            .unwrap();
        (output, status.as_raw())
    }

    #[test]
    fn a_child_is_what_was_asked_for() {
        let (output, status) = run(
            |_| {},
            "echo $A; umask; pwd; cat /proc/self/oom_score_adj; grep -E '^Sig(Blk|Ign)' /proc/self/status; \
             ls /proc/$$/fd; ulimit -n; cut -d' ' -f6 /proc/$$/stat | grep -cx $$; exit 3",
        );
        assert_eq!(status, 3 << 8);
        assert_eq!(
            output.split_whitespace().collect::<Vec<_>>(),
            [
                "b",
                "0027",
                "/",
                "7",
                "SigBlk:",
                "0000000000000000",
                "SigIgn:",
                "0000000000000000",
                "0",
                "1",
                "2",
                "99",
                "1"
            ]
        );
    }

    #[test]
    fn it_runs_as_its_owner() {
        if !rustix::process::geteuid().is_root() {
            panic!("this test needs root");
        }
        let owner = Owner {
            uid: 4321,
            gid: 1234,
            groups: &[5, 6],
        };
        let (output, _) = run(|c| c.owner = Some(owner), "id -u; id -g; id -G");
        assert_eq!(output, "4321\n1234\n1234 5 6\n");
    }

    #[test]
    fn failures_name_their_step() {
        let argv = strings(&["x"]);
        let mut child = Child {
            program: Program::Paths(&[]),
            argv: &argv,
            env: &[],
            cwd: None,
            umask: None,
            owner: None,
            stdio: None,
            session: false,
            controlling_tty: false,
            group: None,
            signals_blocked: false,
            oom_score_adj: None,
            open_files: None,
        };
        let expect = |child: &Child<'_>, step: Step, errno: i32| {
            let started = start(child, 0).unwrap();
            let pid = rustix::process::Pid::from_raw(started.pid);
            let (failed, error) = started.executed().unwrap_err();
            assert_eq!((failed, error.raw_os_error()), (step, Some(errno)));
            rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).unwrap();
        };
        let paths = strings(&["/nonexistent/x", "/etc/passwd", "/bin/sh/x"]);
        child.program = Program::Paths(&paths[..1]);
        expect(&child, Step::Exec, libc::ENOENT);
        child.program = Program::Paths(&paths);
        expect(&child, Step::Exec, libc::EACCES);
        child.cwd = Some(c"/nonexistent");
        expect(&child, Step::Directory, libc::ENOENT);
        child.group = Some(1);
        expect(&child, Step::Session, libc::EPERM);
    }

    #[test]
    fn names_are_looked_up_as_execvp_does() {
        assert_eq!(candidates(c"a/b", b"/x"), strings(&["a/b"]));
        assert_eq!(candidates(c"b", b"/x::/y"), strings(&["/x/b", "./b", "/y/b"]));
        assert!(candidates(c"", b"/x").is_empty());
    }

    #[test]
    fn known_numbers_are_told_from_free_ones() {
        let me = rustix::process::getpid().as_raw_nonzero().get();
        assert!(pid_is_known(me, 0));
        assert!(!pid_is_known(i32::MAX, 0));
        let tid = std::thread::spawn(|| {
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            assert!(pid_is_known(tid, 0), "a thread is known too");
            tid
        });
        tid.join().unwrap();
        // A leader that has ended and is waited for leaves its number to its group.
        let mut leader = std::process::Command::new("sh");
        let leader = leader.args(["-c", "sleep 1000 >&- & echo $!"]).process_group(0);
        let leader = leader.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let number = leader.id() as i32;
        let member = String::from_utf8(leader.wait_with_output().unwrap().stdout).unwrap();
        assert!(pid_is_known(number, 0));
        kill(member.trim().parse().unwrap(), 9, 0).unwrap();
    }
}
