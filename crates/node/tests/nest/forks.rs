//! Every number given out is one of ours, whatever programs do.

use super::Test;
use super::fixture::{Fixture, MODULUS, SLOT, assert_ours, exe, read_all};
use dunlin_proto::ids::Pid;
use std::process::ExitCode;
use std::time::Instant;

pub const TESTS: &[Test] = &[
    (
        "fork_bombs_wrap_around_and_respect_reservations",
        fork_bombs_wrap_around_and_respect_reservations,
    ),
    ("threads_and_vforks_are_steered", threads_and_vforks_are_steered),
    (
        "signals_hardly_ever_interrupt_a_fork",
        signals_hardly_ever_interrupt_a_fork,
    ),
    ("a_full_ring_is_eagain_and_recovers", a_full_ring_is_eagain_and_recovers),
    (
        "ids_of_dead_leaders_are_not_given_out",
        ids_of_dead_leaders_are_not_given_out,
    ),
    ("refused_forks_hold_nobody_up", refused_forks_hold_nobody_up),
    (
        "a_caller_that_spins_after_a_refusal_is_nudged",
        a_caller_that_spins_after_a_refusal_is_nudged,
    ),
    (
        "killed_and_stopped_callers_hold_nobody_up",
        killed_and_stopped_callers_hold_nobody_up,
    ),
    (
        "a_fork_of_a_large_memory_comes_through",
        a_fork_of_a_large_memory_comes_through,
    ),
    ("nested_namespaces_are_steered", nested_namespaces_are_steered),
    ("traced_callers_hold_nobody_up", traced_callers_hold_nobody_up),
    (
        "what_would_make_unsteered_threads_is_refused",
        what_would_make_unsteered_threads_is_refused,
    ),
];

/// Forks until it has made so many children; each prints its PID, and so does it. `keep`: so many live at a time.
const BOMB: &str = "\
import os, sys
count, keep = int(sys.argv[1]), int(sys.argv[2])
os.write(1, b'%d\\n' % os.getpid())
alive = 0
for i in range(count):
    if alive == keep: os.wait(); alive -= 1
    if os.fork() == 0:
        os.write(1, b'%d\\n' % os.getpid()); os._exit(0)
    alive += 1
while alive: os.wait(); alive -= 1
";

fn limit(candidates: i32) -> i32 {
    // The first candidate is 131 = 2 * 64 + 3.
    131 + (candidates - 1) * MODULUS + 1
}

fn fork_bombs_wrap_around_and_respect_reservations() {
    let f = Fixture::with(|c| c.pid_limit = Some(limit(60)));
    let mut f = f;
    let reserved: Vec<Pid> = (0..60).step_by(7).map(|i| Pid(131 + i * MODULUS)).collect();
    f.nest().reserve(&reserved).unwrap();
    let bombs: Vec<_> = (0..6).map(|_| f.start(&["python3", "-c", BOMB, "400", "3"])).collect();
    let mut given = 0;
    for bomb in bombs {
        let pids = assert_ours(&read_all(bomb.output));
        assert!(
            reserved.iter().all(|r| !pids.contains_key(&r.0)),
            "a reserved PID was given out"
        );
        given += pids.values().sum::<u32>();
        assert_eq!(f.ended(bomb.pid), 0);
    }
    assert_eq!(given, 6 * 401);
    // Released, they are given out again.
    f.nest().release(&reserved).unwrap();
    let (output, _) = f.run(&["python3", "-c", BOMB, "130", "1"]);
    let pids = assert_ours(&output);
    assert!(reserved.iter().all(|r| pids.contains_key(&r.0)), "{pids:?}");
}

/// In the nest: threads that start processes (by vfork), all printing their numbers.
pub fn threads_role() -> ExitCode {
    let worker = || {
        for _ in 0..20 {
            let tid = rustix::thread::gettid().as_raw_nonzero();
            println!("{tid}");
            std::thread::spawn(|| println!("{}", rustix::thread::gettid().as_raw_nonzero()))
                .join()
                .unwrap();
            let child = std::process::Command::new("/bin/sh")
                .args(["-c", "echo $$"])
                .status()
                .unwrap();
            assert!(child.success());
        }
    };
    let workers: Vec<_> = (0..8).map(|_| std::thread::spawn(worker)).collect();
    workers.into_iter().for_each(|w| w.join().unwrap());
    ExitCode::SUCCESS
}

fn threads_and_vforks_are_steered() {
    let mut f = Fixture::new();
    let exe = exe();
    let (output, status) = f.run(&[exe.to_str().unwrap(), "threads"]);
    assert_eq!(status, 0, "{output}");
    assert_eq!(assert_ours(&output).values().sum::<u32>(), 8 * 20 * 3);
}

/// A handler without SA_RESTART, called all the time: natively fork(2) never says EINTR. Here a signal that comes in the
/// microseconds before the call is received still has it say so; that it is not received at once must not make it more.
fn signals_hardly_ever_interrupt_a_fork() {
    // Many processes that compute keep one of ordinary priority waiting.
    let script = "\
import os, signal
busy = []
for _ in range(8):
    pid = os.fork()
    while pid == 0: pass
    busy.append(pid)
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, .002, .002)
interrupted = 0
for i in range(600):
    try: pid = os.fork()
    except InterruptedError: interrupted += 1; continue
    if pid == 0: os._exit(0)
    os.waitpid(pid, 0)
signal.setitimer(signal.ITIMER_REAL, 0)
print(interrupted)
for pid in busy: os.kill(pid, 9)
";
    let (output, status) = Fixture::new().run(&["python3", "-c", script]);
    let interrupted: u32 = output.trim().parse().unwrap();
    assert!(
        interrupted <= 20 && status == 0,
        "{interrupted} of 600, status {status}"
    );
}

fn a_full_ring_is_eagain_and_recovers() {
    let mut f = Fixture::with(|c| c.pid_limit = Some(limit(10)));
    let script = "\
import os, signal
children = []
try:
    while True:
        pid = os.fork()
        if pid == 0: signal.pause()
        children.append(pid)
except BlockingIOError: pass
print(*children, flush=True)
for pid in children: os.kill(pid, 9); os.waitpid(pid, 0)
for i in range(25):
    pid = os.fork()
    if pid == 0: os._exit(0)
    os.waitpid(pid, 0); print(pid)
";
    let (output, status) = f.run(&["python3", "-c", script]);
    assert_eq!(status, 0, "{output}");
    let (first, rest) = output.split_once('\n').unwrap();
    // The program itself has the tenth.
    assert_eq!(assert_ours(first).len(), 9, "{first}");
    assert_eq!(assert_ours(rest).len(), 9);
    assert!(f.try_start(&["true"], |_| {}).is_ok());
}

fn ids_of_dead_leaders_are_not_given_out() {
    let mut f = Fixture::with(|c| c.pid_limit = Some(limit(12)));
    // A session and a group whose leaders are dead; then forks round the ring.
    let script = "\
import os, signal
def orphaned(lead):
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        lead()
        if os.fork() == 0:
            os.close(1); os.close(2); os.write(w, b'x'); signal.pause()
        os._exit(0)
    os.waitpid(pid, 0); os.read(r, 1)
    return pid
kept = [orphaned(os.setsid), orphaned(lambda: os.setpgid(0, 0))]
for i in range(40):
    pid = os.fork()
    if pid == 0: os._exit(0)
    os.waitpid(pid, 0); print(pid)
    assert pid not in kept, (pid, kept)
";
    let (output, status) = f.run(&["python3", "-c", script]);
    assert_eq!(status, 0, "{output}");
    // The program, two leaders, two orphans.
    assert_eq!(assert_ours(&output).len(), 12 - 5);
}

/// As another user under RLIMIT_NPROC: so many forks that all fail.
const REFUSED: &str = "\
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
os.setresgid(4321, 4321, 4321); os.setresuid(4321, 4321, 4321)
failed = 0
for i in range(int(sys.argv[1])):
    try:
        pid = os.fork()
        if pid == 0: os._exit(0)
        os.waitpid(pid, 0)
    except BlockingIOError: failed += 1
if len(sys.argv) > 2:
    os.write(1, b'spinning')
    os.close(1); os.close(2)
    while True: pass
print(failed, file=sys.stderr)
";

fn refused_forks_hold_nobody_up() {
    let mut f = Fixture::new();
    // One process of the user exists, so that the limit of one is reached.
    let start = Instant::now();
    let refused: Vec<_> = (0..3).map(|_| f.start(&["python3", "-c", REFUSED, "300"])).collect();
    let (output, status) = f.run(&["python3", "-c", BOMB, "300", "2"]);
    assert_eq!(status, 0);
    assert_eq!(assert_ours(&output).values().sum::<u32>(), 301);
    let failed: u32 = refused
        .into_iter()
        .map(|r| {
            let output = read_all(r.output);
            assert_eq!(f.ended(r.pid), 0);
            output.trim().parse::<u32>().unwrap_or_else(|_| panic!("{output}"))
        })
        .sum();
    assert!(
        failed >= 300,
        "only {failed} forks were refused: the test tests nothing"
    );
    println!(
        "  {failed} refused forks beside 300 good ones took {:?}",
        start.elapsed()
    );
}

fn a_caller_that_spins_after_a_refusal_is_nudged() {
    let mut f = Fixture::new();
    // Two of them: the second's forks are refused for sure.
    let spinners: Vec<_> = (0..2)
        .map(|_| f.start(&["python3", "-c", REFUSED, "5", "spin"]))
        .collect();
    for spinner in &spinners {
        let mut word = [0u8; 8];
        assert_eq!(rustix::io::read(&spinner.output, &mut word).unwrap(), 8);
    }
    let (output, status) = f.run(&["python3", "-c", BOMB, "50", "2"]);
    assert_eq!(status, 0);
    assert_eq!(assert_ours(&output).values().sum::<u32>(), 51);
    for spinner in &spinners {
        let state = f.sh(&format!(
            "cut -d' ' -f3 /proc/{}/stat; grep TracerPid /proc/{0}/status",
            spinner.pid
        ));
        assert!(state.starts_with("R\nTracerPid:\t0"), "{state}");
        f.sh(&format!("kill -9 {}", spinner.pid));
        assert_eq!(f.ended(spinner.pid), 9);
    }
}

fn killed_and_stopped_callers_hold_nobody_up() {
    let mut f = Fixture::new();
    // Shells that fork all the time are stopped, continued and killed at any moment, children and all.
    let script = "\
for round in 1 2 3 4 5 6; do
  pids=
  for i in 1 2 3 4; do setsid sh -c 'while :; do /bin/true & wait; done' & pids=\"$pids $!\"; done
  for i in 1 2 3 4 5 6 7 8; do
    sleep 0.01; for p in $pids; do kill -STOP -$p; done; /bin/true; for p in $pids; do kill -CONT -$p; done
  done 2>/dev/null
  for p in $pids; do kill -9 -$p; done
  wait 2>/dev/null
done
echo fine";
    assert_eq!(f.sh(script).lines().last(), Some("fine"));
    let (output, _) = f.run(&["python3", "-c", BOMB, "50", "2"]);
    assert_ours(&output);
}

fn a_fork_of_a_large_memory_comes_through() {
    let mut f = Fixture::new();
    // Copying the page tables takes longer than the patience with a caller.
    let script = "\
import os, mmap
m = mmap.mmap(-1, 1 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m.madvise(15)
for i in range(0, 1 << 30, 4096): m[i] = 1
for i in range(5):
    pid = os.fork()
    if pid == 0: os._exit(0)
    os.waitpid(pid, 0); print(pid)
";
    let large = f.start(&["python3", "-c", script]);
    let small = f.start(&["sh", "-c", "while :; do /bin/true; done"]);
    let output = read_all(large.output);
    assert_eq!(f.ended(large.pid), 0);
    assert_eq!(assert_ours(&output).values().sum::<u32>(), 5);
    let pidfd = f.nest().pidfd(small.pid).unwrap().unwrap();
    rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL).unwrap();
    f.ended(small.pid);
}

fn nested_namespaces_are_steered() {
    let mut f = Fixture::new();
    let inner = f.sh("unshare -p -f --mount-proc sh -c 'echo $$; sh -c \"echo \\$\\$; true\"'");
    assert_eq!(inner, "1\n2\n");
    let script = "unshare -p -f --kill-child sh -c 'sleep 100 & sleep 100' & sleep 0.3; ps -eo pid= ; kill -9 $!";
    let pids = f.sh(script);
    let high: Vec<&str> = pids.split_whitespace().filter(|p| *p != "1").collect();
    assert!(high.len() >= 5, "{pids}");
    assert_ours(&high.join(" "));
    assert_eq!(SLOT, 3);
}

/// Forks that fail, by a program that is traced all the while: nobody can nudge it.
fn traced_callers_hold_nobody_up() {
    let mut f = Fixture::new();
    let traced = f.start(&["python3", "-c", TRACED, REFUSED]);
    let (output, status) = f.run(&["python3", "-c", BOMB, "100", "2"]);
    assert_eq!(status, 0);
    assert_eq!(assert_ours(&output).values().sum::<u32>(), 101);
    let output = read_all(traced.output);
    assert_eq!(f.ended(traced.pid), 0, "{output}");
    assert_eq!(output.trim(), "30");
}

/// Seizes a child and lets every stop go on at once, until it ends.
const TRACED: &str = "\
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
ptrace = lambda request, pid, data=0: libc.ptrace(ctypes.c_ulong(request), pid, None, ctypes.c_void_p(data))
pid = os.fork()
if pid == 0:
    signal.raise_signal(signal.SIGSTOP)
    os.execvp('python3', ['python3', '-c', sys.argv[1], '30'])
os.waitpid(pid, os.WUNTRACED)
assert ptrace(0x4206, pid) == 0
os.kill(pid, signal.SIGCONT)
while True:
    _, status = os.waitpid(pid, 0x40000000)
    if not os.WIFSTOPPED(status): break
    event, sig = status >> 16, os.WSTOPSIG(status)
    ptrace(7, pid, 0 if event else sig)
sys.exit(os.waitstatus_to_exitcode(status))
";

fn what_would_make_unsteered_threads_is_refused() {
    let mut f = Fixture::new();
    let script = "import ctypes; l = ctypes.CDLL(None, use_errno=True); p = ctypes.create_string_buffer(120)\n\
                  print(l.syscall(425, 4, p), ctypes.get_errno())";
    assert_eq!(f.run(&["python3", "-c", script]).0, "-1 1\n");
}
