//! The steps that make a nest out of a process, in order; each has a name for the report of its failure.
//!
//! Owns namespaces, mounts, limits and the cgroup of the nest. Refuses to know what will run in it. Steps before the
//! fork run in the builder, which ends; steps after it in PID 1 of the nest. Nothing outside the nest is changed but the
//! node's own cgroup and state directory.

use crate::nest::wire::{Blueprint, SOCKET_NAME};
use dunlin_sys::namespace;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Resource;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A step that failed.
#[derive(Debug)]
pub struct StepError {
    /// Which.
    pub step: String,
    /// Why.
    pub why: String,
}

/// Names a step.
pub fn step<T>(name: &str, result: Result<T, impl ToString>) -> Result<T, StepError> {
    result.map_err(|why| StepError {
        step: name.to_owned(),
        why: why.to_string(),
    })
}

/// Binds `init.sock`. Before the namespaces change, so that the path is the daemon's.
pub fn bind_socket(blueprint: &Blueprint) -> Result<OwnedFd, StepError> {
    let path = Path::new(OsStr::from_bytes(&blueprint.state_dir)).join(SOCKET_NAME);
    let bind = || -> io::Result<OwnedFd> {
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let umask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
        let bound = rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?);
        rustix::process::umask(umask);
        bound?;
        Ok(socket)
    };
    step(&format!("binding {}", path.display()), bind())
}

/// The directory of a node's cgroup below the cgroup2 mount that `mountinfo` shows.
pub fn cgroup_path(mountinfo: &str, cluster: &str, node: &str) -> Result<PathBuf, String> {
    for name in [cluster, node] {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            return Err(format!("{name:?} cannot be the name of a cgroup; hint: rename it"));
        }
    }
    let mount = mountinfo.lines().find_map(|line| {
        // proc(5): the file system's type follows the lone hyphen; the mount point is the fifth field.
        let (fields, rest) = line.split_once(" - ")?;
        let is_cgroup2 = rest.split(' ').next() == Some("cgroup2");
        is_cgroup2.then(|| fields.split(' ').nth(4)).flatten()
    });
    let mount = mount.ok_or("no cgroup2 file system is mounted; hint: mount -t cgroup2 none /sys/fs/cgroup")?;
    Ok(Path::new(mount).join("dunlin").join(cluster).join(node))
}

/// Enters the node's cgroup.
pub fn join_cgroup(blueprint: &Blueprint) -> Result<(), StepError> {
    let mountinfo = step("reading mountinfo", std::fs::read_to_string("/proc/self/mountinfo"))?;
    let path = step(
        "finding the cgroup",
        cgroup_path(&mountinfo, &blueprint.cluster, &blueprint.node),
    )?;
    let join = || {
        std::fs::create_dir_all(&path)?;
        std::fs::write(path.join("cgroup.procs"), "0")
    };
    step(&format!("entering cgroup {}", path.display()), join())
}

/// Leaves all namespaces; the children of this process will live in the nest.
pub fn leave_namespaces(blueprint: &Blueprint) -> Result<(), StepError> {
    step("unsharing namespaces", namespace::unshare_all_but_pid())?;
    let seconds = blueprint.clock_offset_seconds;
    if seconds != 0 {
        let offsets = format!("monotonic {seconds} 0\nboottime {seconds} 0\n");
        let written = std::fs::write("/proc/self/timens_offsets", offsets);
        step(&format!("setting the clocks off by {seconds} s"), written)?;
    }
    step("unsharing the PID namespace", namespace::unshare_pid())
}

/// Everything that PID 1 does before it serves.
pub fn furnish(blueprint: &Blueprint) -> Result<(), StepError> {
    step("making a session", rustix::process::setsid())?;
    step("entering /", std::env::set_current_dir("/"))?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    step("making mounts private", rustix::mount::mount_change("/", private))?;
    let nodev = MountFlags::NOSUID | MountFlags::NODEV;
    let noexec = nodev | MountFlags::NOEXEC;
    mount("proc", "/proc", noexec, "")?;
    mount("tmpfs", "/dev/shm", nodev, "mode=1777")?;
    let ptys = "newinstance,ptmxmode=0666,mode=0620,gid=5";
    mount("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, ptys)?;
    // Where /dev/ptmx is a link to pts/ptmx it is right already.
    let ptmx = step("looking at /dev/ptmx", std::fs::symlink_metadata("/dev/ptmx"))?;
    if !ptmx.file_type().is_symlink() {
        let bound = rustix::mount::mount_bind("/dev/pts/ptmx", "/dev/ptmx");
        step("binding /dev/ptmx", bound)?;
    }
    // Only a view; mq_open works without. The directory is not made: /dev is the machine's.
    if Path::new("/dev/mqueue").is_dir() {
        mount("mqueue", "/dev/mqueue", noexec, "")?;
    }
    step("bringing lo up", namespace::loopback_up())?;
    let hostname = rustix::system::sethostname(blueprint.cluster.as_bytes());
    step("setting the hostname", hostname)?;
    // Surrogates that tell a lot at once wait for a place in this queue; ten, the default, is few.
    let _ = std::fs::write("/proc/sys/net/unix/max_dgram_qlen", "1024");
    Ok(())
}

fn mount(kind: &str, target: &str, flags: MountFlags, data: &str) -> Result<(), StepError> {
    let data = std::ffi::CString::new(data).expect("no NUL in literals");
    let mounted = rustix::mount::mount(kind, target, kind, flags, data.as_c_str());
    step(&format!("mounting {kind} on {target}"), mounted)
}

/// The first PID that the kernel would never give out in this nest, after raising it as far as it goes. Before Linux
/// 6.14 the number belongs to the whole machine and is left alone.
pub fn pid_max(release: &str) -> Result<i32, StepError> {
    const FILE: &str = "/proc/sys/kernel/pid_max";
    const HIGHEST: &str = "4194304";
    if is_at_least(release, (6, 14)) {
        let _ = std::fs::write(FILE, HIGHEST);
    }
    let text = step("reading pid_max", std::fs::read_to_string(FILE))?;
    step("reading pid_max", text.trim().parse::<i32>())
}

fn is_at_least(release: &str, wanted: (u32, u32)) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|n| n.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => (major, minor) >= wanted,
        _ => false,
    }
}

/// Init must outlive what it looks after, and holds descriptors for all of it. Returns what children get back:
/// oom_score_adj, and RLIMIT_NOFILE.
pub fn privileges() -> (i32, (u64, u64)) {
    const OOM: &str = "/proc/self/oom_score_adj";
    let score = std::fs::read_to_string(OOM).ok().and_then(|t| t.trim().parse().ok());
    // Not permitted in some containers: then it stays as killable as the rest.
    let _ = std::fs::write(OOM, "-900");
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let (soft, hard) = (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX));
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let _ = rustix::process::setrlimit(Resource::Nofile, raised);
    (score.unwrap_or(0), (soft, hard))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_is_found_where_it_is_mounted() {
        let hybrid = "39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        let path = cgroup_path(hybrid, "lab", "n1").unwrap();
        assert_eq!(path, Path::new("/sys/fs/cgroup/unified/dunlin/lab/n1"));
        assert!(cgroup_path("", "lab", "n1").unwrap_err().contains("hint"));
        assert!(cgroup_path(hybrid, "..", "n1").is_err());
        assert!(cgroup_path(hybrid, "lab", "a/b").is_err());
    }

    #[test]
    fn releases_are_compared_as_numbers() {
        assert!(is_at_least("6.18.44-fc", (6, 14)) && is_at_least("7.0.0", (6, 14)));
        assert!(!is_at_least("6.9.1", (6, 14)) && !is_at_least("odd", (6, 14)));
    }
}
