//! What moves stand on in the kernel: each is tried.

use super::{Row, necessary};
use dunlin_sys::Errno;
use dunlin_sys::probe::{self, Namespace};
use std::fs;

/// All of them.
pub fn all() -> Vec<Row> {
    let mut rows = faults();
    rows.extend(calls());
    rows.extend(namespaces());
    rows.extend(tracing());
    rows
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vdso_apart_from_its_variables_is_not_known() {
        let good = "7f00-7f04 r--p 0 0 0 [vvar]\n7f04-7f06 r--p 0 0 0 [vvar_vclock]\n7f06-7f08 r-xp 0 0 0 [vdso]\n";
        assert!(vdso_layout(good).is_ok());
        assert!(vdso_layout(&good.replace("7f06-7f08", "7f07-7f08")).is_err());
        assert!(vdso_layout("7f06-7f08 r-xp 0 0 0 [vdso]\n").is_err());
        assert!(vdso_layout("").is_err());
    }
}
