//! The list of checks, in the order in which a person would mend what is wrong.

mod network;

use super::{Row, Status};
use dunlin_lab::cgroup;
use dunlin_node::config::NodeConfig;
use dunlin_sys::Errno;
use dunlin_sys::probe::{self, Namespace};
use std::fs;
use std::path::Path;
use std::process::Command;

/// What is needed, for what, and what follows without it.
struct Need {
    name: &'static str,
    status_if_missing: Status,
    purpose: &'static str,
    consequence: &'static str,
    hint: &'static str,
}

impl Need {
    /// The row for what was found: `Ok` if it is as it should be.
    fn row(&self, found: Result<String, String>) -> Row {
        let missing = found.is_err();
        Row {
            name: self.name.into(),
            status: if missing { self.status_if_missing } else { Status::Ok },
            found: found.unwrap_or_else(|found| found),
            purpose: self.purpose,
            consequence: if missing { self.consequence } else { "" },
            hint: if missing { self.hint.into() } else { String::new() },
        }
    }

    /// The row for an attempt.
    fn tried(&self, attempt: Result<(), Errno>) -> Row {
        self.row(attempt.map(|()| "works".into()).map_err(|e| e.to_string()))
    }
}

/// Something dunlin does not work without.
const fn necessary(name: &'static str, purpose: &'static str, consequence: &'static str, hint: &'static str) -> Need {
    Need {
        name,
        status_if_missing: Status::Missing,
        purpose,
        consequence,
        hint,
    }
}

/// Something dunlin works better with.
const fn useful(name: &'static str, purpose: &'static str, consequence: &'static str, hint: &'static str) -> Need {
    Need {
        name,
        status_if_missing: Status::Note,
        purpose,
        consequence,
        hint,
    }
}

/// Every check.
pub fn all(config: Option<&Path>) -> Vec<Row> {
    let mut rows = vec![kernel(), machine(), root()];
    rows.extend(capabilities());
    rows.extend(faults());
    rows.extend(calls());
    rows.extend(namespaces());
    rows.extend(tracing());
    rows.extend(surroundings());
    rows.extend(network::all());
    rows.extend(config.map(configuration));
    rows
}

fn kernel() -> Row {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let need = necessary(
        "kernel",
        "PAGEMAP_SCAN, asynchronous write protection and poisoned pages came with Linux 6.7",
        "moves cannot track which pages have changed",
        "boot Linux 6.7 or later",
    );
    let new_enough = version(&release).is_some_and(|v| v >= (6, 7));
    need.row(if new_enough { Ok(release) } else { Err(release) })
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn machine() -> Row {
    let machine = rustix::system::uname().machine().to_string_lossy().into_owned();
    let need = necessary(
        "machine",
        "registers and system calls are those of x86-64",
        "no program can be captured",
        "use an x86-64 machine",
    );
    need.row(if machine == "x86_64" { Ok(machine) } else { Err(machine) })
}

fn root() -> Row {
    let uid = rustix::process::geteuid();
    let need = necessary(
        "root",
        "a daemon makes namespaces and traces programs of all users",
        "the daemon does not start, and the checks below are not about it",
        "run as root: sudo dunlin doctor",
    );
    let found = format!("uid {}", uid.as_raw());
    need.row(if uid.is_root() { Ok(found) } else { Err(found) })
}

/// Capabilities by number in the mask of /proc/self/status.
const CAPABILITIES: [(u32, Need); 13] = [
    (
        21,
        necessary(
            "CAP_SYS_ADMIN",
            "namespaces, ns_last_pid, mounts",
            "no nest can be made",
            CAP_HINT,
        ),
    ),
    (
        19,
        necessary(
            "CAP_SYS_PTRACE",
            "capturing programs",
            "no program can be captured",
            CAP_HINT,
        ),
    ),
    (
        12,
        necessary(
            "CAP_NET_ADMIN",
            "the network of a nest, frozen sockets",
            "nests have no network",
            CAP_HINT,
        ),
    ),
    (
        5,
        necessary(
            "CAP_KILL",
            "signals to programs of all users",
            "`dunlin kill` fails for users' programs",
            CAP_HINT,
        ),
    ),
    (
        6,
        necessary(
            "CAP_SETGID",
            "restoring a program's groups",
            "only root's programs can move",
            CAP_HINT,
        ),
    ),
    (
        7,
        necessary(
            "CAP_SETUID",
            "restoring a program's users",
            "only root's programs can move",
            CAP_HINT,
        ),
    ),
    (
        8,
        necessary(
            "CAP_SETPCAP",
            "restoring a program's capability sets",
            "programs with less cannot move",
            CAP_HINT,
        ),
    ),
    (
        0,
        necessary(
            "CAP_CHOWN",
            "giving a program its terminal",
            "`dunlin run` of users gets no terminal",
            CAP_HINT,
        ),
    ),
    (
        1,
        necessary(
            "CAP_DAC_OVERRIDE",
            "opening users' files for them",
            "users' programs cannot move",
            CAP_HINT,
        ),
    ),
    (
        18,
        necessary(
            "CAP_SYS_CHROOT",
            "restoring a program's root directory",
            "no nest can be entered",
            CAP_HINT,
        ),
    ),
    (
        23,
        useful(
            "CAP_SYS_NICE",
            "restoring raised priorities",
            "programs lose a raised priority",
            CAP_HINT,
        ),
    ),
    (
        14,
        useful(
            "CAP_IPC_LOCK",
            "restoring locked memory over the limit",
            "such programs cannot move here",
            CAP_HINT,
        ),
    ),
    (
        24,
        useful(
            "CAP_SYS_RESOURCE",
            "raising hard limits, and an oom_score_adj below the daemon's",
            "a program whose hard limits are above the daemon's is refused here",
            "raise the daemon's own limits, or start it with all of root's capabilities",
        ),
    ),
];
const CAP_HINT: &str = "start the daemon with all of root's capabilities (is this a container?)";

fn capabilities() -> Vec<Row> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let mask = effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let row = |(bit, need): &(u32, Need)| {
        need.row(if mask >> bit & 1 == 1 {
            Ok("effective".into())
        } else {
            Err("not effective".into())
        })
    };
    CAPABILITIES.iter().map(row).collect()
}

/// Bits of `UFFD_FEATURE_*` that moves stand on.
const FAULT_FEATURES: [(u64, &str); 7] = [
    (1 << 0, "write protection"),
    (1 << 1, "EVENT_FORK"),
    (1 << 2, "EVENT_REMAP"),
    (1 << 3, "EVENT_REMOVE"),
    (1 << 6, "EVENT_UNMAP"),
    (1 << 14, "POISON"),
    (1 << 15, "WP_ASYNC"),
];

fn faults() -> Vec<Row> {
    let open = necessary(
        "userfaultfd",
        "a moved program's pages come when it touches them",
        "nothing can be moved",
        "a kernel with CONFIG_USERFAULTFD, and CAP_SYS_PTRACE or access to /dev/userfaultfd",
    );
    let features = necessary(
        "userfaultfd features",
        "fork, munmap, mremap and madvise while pages are still away; dirty tracking",
        "a moved program that forks or unmaps would lose pages",
        "a kernel of 6.7 or later with CONFIG_HAVE_ARCH_USERFAULTFD_WP (x86-64 has it)",
    );
    let scan = necessary(
        "PAGEMAP_SCAN",
        "finding a program's present and changed pages without touching them",
        "moves cannot track which pages have changed",
        "boot Linux 6.7 or later",
    );
    let found = probe::user_faults();
    let lacking = |offered: probe::UserFaults| {
        let absent: Vec<&str> = FAULT_FEATURES
            .iter()
            .filter(|(bit, _)| offered.features & bit == 0)
            .map(|(_, name)| *name)
            .collect();
        match (absent.is_empty(), offered.write_protect) {
            (true, true) => Ok(format!("{:#x}; a page registered", offered.features)),
            (false, _) => Err(format!("lacks {}", absent.join(", "))),
            (true, false) => Err("a page cannot be registered for missing and write-protect faults".into()),
        }
    };
    vec![
        open.tried(found.map(drop)),
        features.row(found.map_err(|e| e.to_string()).and_then(lacking)),
        scan.row(match probe::pagemap_scan() {
            Ok(true) => Ok("works".into()),
            Ok(false) => Err("does not report a present page".into()),
            Err(e) => Err(e.to_string()),
        }),
    ]
}

fn calls() -> Vec<Row> {
    let seccomp = necessary(
        "seccomp notification",
        "PIDs are given out by the node's slot: fork is noticed there",
        "no nest can be made",
        "a kernel with CONFIG_SECCOMP_FILTER; if this runs under another supervisor's filter, leave that",
    );
    let memfd = necessary(
        "executable memfd",
        "what stands in for a program that has moved away",
        "a moved program's parent could not wait for it",
        "sysctl vm.memfd_noexec=1 (2 forbids them)",
    );
    let mm_map = necessary(
        "PR_SET_MM_MAP",
        "restoring where heap, stack and arguments are",
        "a moved program's heap could not grow",
        "a kernel with CONFIG_CHECKPOINT_RESTORE",
    );
    let vdso = necessary(
        "vdso",
        "gettimeofday without a system call works on after a move",
        "programs that read the time would crash after a move",
        "boot with the vdso enabled (no vdso=0)",
    );
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    vec![
        seccomp.tried(probe::seccomp_listener()),
        memfd.tried(probe::executable_memfd()),
        mm_map.tried(probe::set_mm_map()),
        vdso.row(vdso_layout(&maps)),
    ]
}

/// The pages of variables lie directly below the code that reads them, on every layout that can be moved as one.
fn vdso_layout(maps: &str) -> Result<String, String> {
    let mut parts = maps.lines().filter_map(|line| {
        let name = ["[vvar]", "[vvar_vclock]", "[vdso]"]
            .into_iter()
            .find(|name| line.ends_with(name))?;
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some((
            name,
            u64::from_str_radix(start, 16).ok()?,
            u64::from_str_radix(end, 16).ok()?,
        ))
    });
    let parts: Vec<_> = parts.by_ref().collect();
    let Some((last, _, _)) = parts.last() else {
        return Err("there is none".into());
    };
    let words = parts
        .iter()
        .map(|(name, start, end)| format!("{name} {} KiB", (end - start) >> 10))
        .collect::<Vec<_>>();
    let contiguous = parts.windows(2).all(|pair| pair[0].2 == pair[1].1);
    if contiguous && *last == "[vdso]" && parts.len() > 1 {
        Ok(words.join(", "))
    } else {
        Err(format!("a layout that is not known: {}", words.join(", ")))
    }
}

fn namespaces() -> Vec<Row> {
    const HINT: &str = "a kernel with this kind of namespace, and /proc/sys/user/max_*_namespaces above 0";
    let all = [
        (
            Namespace::Pid,
            necessary(
                "pid namespace",
                "the nest's own process numbers",
                "no nest can be made",
                HINT,
            ),
        ),
        (
            Namespace::Mount,
            necessary(
                "mount namespace",
                "the nest's /proc and /dev/shm",
                "no nest can be made",
                HINT,
            ),
        ),
        (
            Namespace::Ipc,
            necessary(
                "ipc namespace",
                "the nest's shared memory and queues",
                "no nest can be made",
                HINT,
            ),
        ),
        (
            Namespace::Uts,
            necessary(
                "uts namespace",
                "one host name in the whole cluster",
                "no nest can be made",
                HINT,
            ),
        ),
        (
            Namespace::Time,
            necessary(
                "time namespace",
                "clocks that never go backwards across a move",
                "time would jump in a move",
                HINT,
            ),
        ),
        (
            Namespace::Net,
            necessary("net namespace", "the nest's network; labs", "no nest can be made", HINT),
        ),
    ];
    let steering = necessary(
        "ns_last_pid",
        "the next process of a nest gets the PID that is wanted",
        "PIDs of two nodes would clash: nothing can be moved",
        "a kernel with CONFIG_CHECKPOINT_RESTORE, /proc/sys mounted writable",
    );
    let mut rows: Vec<Row> = all.iter().map(|(of, need)| need.tried(probe::namespace(*of))).collect();
    rows.push(steering.row(match probe::pid_steering() {
        Ok(true) => Ok("steers".into()),
        Ok(false) => Err("is written, but the next PID is another".into()),
        Err(e) => Err(e.to_string()),
    }));
    rows
}

fn tracing() -> Vec<Row> {
    let ptrace = necessary(
        "ptrace",
        "capturing a program's registers, and calls made in its name",
        "nothing can be moved",
        "sysctl kernel.yama.ptrace_scope=1 (3 forbids it for good, until a reboot)",
    );
    let xstate = necessary(
        "xstate by ptrace",
        "floating-point and vector registers",
        "programs would calculate wrongly after a move",
        "a kernel of 3.x or later on x86-64",
    );
    let rseq = necessary(
        "rseq by ptrace",
        "restartable sequences of the C library",
        "programs with a current C library could not move",
        "a kernel of 5.13 or later with CONFIG_RSEQ",
    );
    let vm_read = necessary(
        "process_vm_readv",
        "reading a program's pages",
        "nothing can be moved",
        "CONFIG_CROSS_MEMORY_ATTACH",
    );
    let get_fd = necessary(
        "pidfd_getfd",
        "taking hold of a program's files",
        "nothing can be moved",
        "Linux 5.6 or later",
    );
    let kcmp = necessary(
        "kcmp",
        "which descriptors share one open file",
        "shared file offsets would come apart in a move",
        "a kernel with CONFIG_KCMP",
    );
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    let scope = scope.map_or_else(|_| "no yama".to_owned(), |scope| format!("yama scope {}", scope.trim()));
    let with_scope = |found: Result<(), Errno>| match found {
        Ok(()) => Ok(format!("works ({scope})")),
        Err(e) => Err(format!("{e} ({scope})")),
    };
    match probe::trace() {
        Ok(traced) => vec![
            ptrace.row(with_scope(traced.seize)),
            xstate.tried(traced.xstate),
            rseq.tried(traced.rseq),
            vm_read.tried(traced.vm_read),
            get_fd.tried(traced.get_fd),
            kcmp.tried(traced.compare_fds),
        ],
        Err(e) => vec![ptrace.row(with_scope(Err(e)))],
    }
}

fn surroundings() -> Vec<Row> {
    let group = necessary(
        "cgroup2",
        "a nest is killed and frozen as a whole",
        "no lab, and a nest could not be cleared away",
        "mount -t cgroup2 none /sys/fs/cgroup/unified",
    );
    let shm = necessary(
        "/dev/shm",
        "a place for the nest's own POSIX shared memory",
        "programs in a nest have no shm_open",
        "mkdir -p /dev/shm",
    );
    let terminal = necessary(
        "/dev/ptmx",
        "terminals of `dunlin run`",
        "programs get no terminal",
        "mount devpts",
    );
    let ip = useful(
        "ip command",
        "`dunlin lab` joins its nodes with it, and a daemon its nest to the machine",
        "no lab on this machine, and nests without a network",
        "install iproute2",
    );
    vec![
        group.row(kill_group()),
        shm.row(match fs::metadata("/dev/shm") {
            Ok(m) if m.is_dir() => Ok("there".into()),
            Ok(_) => Err("is no directory".into()),
            Err(e) => Err(e.to_string()),
        }),
        terminal.tried(probe::pseudo_terminal()),
        ip.row(match Command::new("ip").arg("-V").output() {
            Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            Ok(output) => Err(output.status.to_string()),
            Err(e) => Err(e.to_string()),
        }),
    ]
}

/// Makes a group and looks for what kills it.
fn kill_group() -> Result<String, String> {
    let mount = cgroup::mount().map_err(|_| "not mounted".to_owned())?;
    let group = mount.join(format!("dunlin-doctor-{}", std::process::id()));
    fs::create_dir(&group).map_err(|e| format!("{}: {e}", group.display()))?;
    let kill = fs::write(group.join("cgroup.kill"), "1");
    let _ = fs::remove_dir(&group);
    kill.map(|()| mount.display().to_string())
        .map_err(|e| format!("cgroup.kill: {e}"))
}

fn configuration(path: &Path) -> Row {
    let need = necessary(
        "configuration",
        "what the daemon is told",
        "the daemon does not start",
        "correct the file",
    );
    need.row(match NodeConfig::load(path) {
        Ok(config) => Ok(format!(
            "node {} of cluster {}, {} peers",
            config.name,
            config.cluster,
            config.peers.len()
        )),
        Err(e) => Err(e.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_as_numbers() {
        assert_eq!(version("6.18.44-fc-v445"), Some((6, 18)));
        assert!(version("6.10.0").unwrap() > (6, 7));
        assert!(version("5.15.0-91-generic").unwrap() < (6, 7));
        assert_eq!(version("unknown"), None);
    }

    #[test]
    fn a_vdso_apart_from_its_variables_is_not_known() {
        let good = "7f00-7f04 r--p 0 0 0 [vvar]\n7f04-7f06 r--p 0 0 0 [vvar_vclock]\n7f06-7f08 r-xp 0 0 0 [vdso]\n";
        assert!(vdso_layout(good).is_ok());
        assert!(vdso_layout(&good.replace("7f06-7f08", "7f07-7f08")).is_err());
        assert!(vdso_layout("7f06-7f08 r-xp 0 0 0 [vdso]\n").is_err());
        assert!(vdso_layout("").is_err());
    }

    /// The machine that tests run on can be a node: nothing necessary is missing, and each row says what it is for.
    #[test]
    fn this_machine_is_fit() {
        let rows = all(None);
        let missing: Vec<_> = rows.iter().filter(|r| r.status == Status::Missing).collect();
        assert!(missing.is_empty(), "{missing:#?}");
        assert!(
            rows.iter()
                .all(|r| !r.purpose.is_empty() && (r.status == Status::Ok) == r.hint.is_empty())
        );
    }
}
