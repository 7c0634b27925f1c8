//! What a program finds in the nest.

use super::Test;
use super::fixture::{Fixture, assert_ours, read_all};
use dunlin_node::nest::SpawnError;
use dunlin_proto::ids::Pid;

pub const TESTS: &[Test] = &[
    (
        "a_program_is_what_its_caller_asked_for",
        a_program_is_what_its_caller_asked_for,
    ),
    ("a_program_gets_its_terminal", a_program_gets_its_terminal),
    ("failed_starts_say_why", failed_starts_say_why),
    ("the_nest_is_a_place_of_its_own", the_nest_is_a_place_of_its_own),
    (
        "a_nest_that_cannot_be_built_says_which_step",
        a_nest_that_cannot_be_built_says_which_step,
    ),
    ("numbers_are_translated", numbers_are_translated),
    ("large_environments_arrive", large_environments_arrive),
];

fn a_program_is_what_its_caller_asked_for() {
    let mut f = Fixture::new();
    let script = "id -u; id -g; id -G; umask; pwd; echo $A; ps -o sid= -p $$ | tr -d ' '; echo $$; \
                  cat /proc/self/oom_score_adj; grep -E 'Sig(Blk|Ign)|NoNewPrivs' /proc/self/status; exit 7";
    let running = f
        .try_start(&["bash", "-c", script], |spec| {
            (spec.uid, spec.gid, spec.groups) = (4321, 1234, vec![5, 6]);
            spec.umask = 0o77;
            spec.cwd = b"/usr".to_vec();
            spec.env.push(b"A=b c".to_vec());
        })
        .unwrap();
    let output = read_all(running.output);
    assert_eq!(f.ended(running.pid), 7 << 8);
    let pid = running.pid.to_string();
    let oom = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    assert_eq!(
        output.lines().collect::<Vec<_>>(),
        [
            "4321",
            "1234",
            "1234 5 6",
            "0077",
            "/usr",
            "b c",
            &pid,
            &pid,
            oom.trim(),
            "SigBlk:\t0000000000000000",
            "SigIgn:\t0000000000000000",
            "NoNewPrivs:\t0",
        ]
    );
    assert_ours(&pid);
}

fn a_program_gets_its_terminal() {
    let mut f = Fixture::new();
    // The daemon makes a pty in the nest, through its /dev/pts.
    let open = |path: &str| {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::openat(f.nest().root(), path, flags, rustix::fs::Mode::empty()).unwrap()
    };
    let master = open("dev/ptmx");
    rustix::pty::unlockpt(&master).unwrap();
    let terminal = open("dev/pts/0");
    let running = f
        .try_start(
            &["sh", "-c", "tty; ps -o tty= -p $$ >/dev/tty; exec >&2; tty <&2"],
            |spec| {
                spec.stdio = [(); 3].map(|()| terminal.try_clone().unwrap());
                spec.controlling_tty = true;
            },
        )
        .unwrap();
    drop(terminal);
    assert_eq!(f.ended(running.pid), 0);
    let (mut output, mut part) = (Vec::new(), [0u8; 4096]);
    // The end of a terminal's last user is EIO.
    while let Ok(n @ 1..) = rustix::io::read(&master, &mut part) {
        output.extend_from_slice(&part[..n]);
    }
    let output = String::from_utf8_lossy(&output).replace("\r\n", "\n");
    assert_eq!(output, "/dev/pts/0\npts/0\n/dev/pts/0\n");
}

fn failed_starts_say_why() {
    let mut f = Fixture::new();
    let exec = |argv: &[&str]| match f.try_start(argv, |_| {}) {
        Err(SpawnError::Exec { program, source }) => (program, source.raw_os_error().unwrap()),
        other => panic!("{:?}", other.map(|r| r.pid)),
    };
    assert_eq!(exec(&["no-such-program"]), ("no-such-program".into(), 2));
    assert_eq!(exec(&["/etc/passwd"]), ("/etc/passwd".into(), 13));
    assert_eq!(exec(&["/"]), ("/".into(), 13));
    for bad in [&b"/nowhere"[..], b"a\0b"] {
        let other = f.try_start(&["true"], |spec| spec.cwd = bad.to_vec());
        assert!(matches!(other, Err(SpawnError::Other(_))));
    }
    assert!(matches!(f.try_start(&[], |_| {}), Err(SpawnError::Other(_))));
    // Nothing of them is left, and the nest goes on.
    f.sh("true");
    assert_eq!(f.sh("ps -e -o stat= | grep -c Z || true"), "0\n");
    f.assert_quiet();
}

fn the_nest_is_a_place_of_its_own() {
    let mut f = Fixture::with(|c| c.clock_offset_seconds = 100_000);
    assert_eq!(f.sh("hostname"), "nest-test\n");
    assert_eq!(f.sh("ls -A /dev/shm; stat -c %a /dev/shm"), "1777\n");
    assert_eq!(
        f.sh("cat /proc/1/comm; ls -A /proc/1/task | tr '\\n' ' '"),
        "dunlin-init\n1 2 3 "
    );
    assert_eq!(
        f.sh("cat /sys/class/net/lo/flags; ip -br link 2>/dev/null | wc -l")
            .lines()
            .count(),
        2
    );
    assert_eq!(f.sh("python3 -c 'import socket as s; a=s.create_server((\"127.0.0.1\",0)); s.create_connection(a.getsockname()); print(1)'"), "1\n");
    assert_eq!(f.sh("ipcmk -M 1 >/dev/null; ipcs -m | grep -c 0x"), "1\n");
    let now = |text: &str| text.split('.').next().unwrap().trim().parse::<i64>().unwrap();
    let inside = now(&f.sh("python3 -c 'import time; print(time.clock_gettime(time.CLOCK_MONOTONIC))'"));
    let outside = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec;
    assert!((inside - outside - 100_000).abs() < 10, "{inside} {outside}");
    assert_eq!(f.sh("cat /proc/self/cgroup | grep -c '^0::/dunlin/nest-test/'"), "1\n");
    assert_eq!(
        f.sh("grep -cE ' (shared|master):[0-9]' /proc/self/mountinfo || true"),
        "0\n"
    );
    // Mounts made in the nest are not seen outside.
    f.sh("mkdir -p /dev/shm/m && mount -t tmpfs none /dev/shm/m && findmnt /dev/shm/m >/dev/null");
    assert!(
        !std::fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .contains("/dev/shm/m")
    );
}

fn a_nest_that_cannot_be_built_says_which_step() {
    let f = Fixture::new();
    let mut config = f.config.clone();
    config.state_dir = f.config.state_dir.join("other");
    config.pid_limit = Some(101);
    let error = dunlin_node::nest::Nest::open(&config, &super::fixture::exe()).unwrap_err();
    assert!(error.to_string().contains("allotting PIDs"), "{error}");
    config.name = "../up".into();
    let error = dunlin_node::nest::Nest::open(&config, &super::fixture::exe()).unwrap_err();
    assert!(error.to_string().contains("cgroup"), "{error}");
    // A nest of another slot is not taken for one's own.
    config = f.config.clone();
    config.slot = 4;
    let error = dunlin_node::nest::Nest::open(&config, &super::fixture::exe()).unwrap_err();
    assert!(error.to_string().contains("slot 3"), "{error}");
}

fn numbers_are_translated() {
    let mut f = Fixture::new();
    let script = "import threading, time\n\
                  t = threading.Thread(target=lambda: time.sleep(1000), daemon=True); t.start()\n\
                  print(t.native_id, flush=True); t.join()";
    let running = f.start(&["python3", "-c", script]);
    let mut line = [0u8; 64];
    let n = rustix::io::read(&running.output, &mut line).unwrap();
    let tid = Pid(std::str::from_utf8(&line[..n]).unwrap().trim().parse().unwrap());
    let host = f.nest().host_pid(running.pid).unwrap().unwrap();
    let host_tid = f.nest().host_pid(tid).unwrap().unwrap();
    let status = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status(host).contains(&format!("NSpid:\t{host}\t{}\n", running.pid)));
    assert!(status(host_tid).contains(&format!("NSpid:\t{host_tid}\t{tid}\n")));
    assert_eq!(f.nest().host_pid(Pid(1)).unwrap(), Some(f.nest().init_pid()));
    assert_eq!(f.nest().host_pid(Pid(MISSING)).unwrap(), None);
    assert!(f.nest().pidfd(Pid(MISSING)).unwrap().is_none());
    assert!(f.nest().thread_pidfd(tid).unwrap().is_some());
    let pidfd = f.nest().pidfd(running.pid).unwrap().unwrap();
    rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL).unwrap();
    assert_eq!(f.ended(running.pid), 9);
    assert_eq!(f.nest().host_pid(running.pid).unwrap(), None);
}

/// Of our residue, never reached.
const MISSING: i32 = 64 * 60_000 + 3;

fn large_environments_arrive() {
    let mut f = Fixture::new();
    let running = f
        .try_start(&["sh", "-c", "echo ${#BIG} ${#MORE}"], |spec| {
            spec.env.push([b"BIG=".as_slice(), &[b'x'; 100_000]].concat());
            spec.env.push([b"MORE=".as_slice(), &[b'x'; 120_000]].concat());
        })
        .unwrap();
    assert_eq!(read_all(running.output), "100000 120000\n");
    assert_eq!(f.ended(running.pid), 0);
}
