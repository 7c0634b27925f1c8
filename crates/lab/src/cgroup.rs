//! The control groups of a lab: everything that is killed with it.
//!
//! Owns `<cgroup2>/dunlin/<lab>`: the nests' groups `NODE` (filled by the daemon) and the daemons' groups
//! `NODE.daemon`. Every process that a lab starts is born in one of them, so `cgroup.kill` of the top reaches all,
//! forking or not. Refuses to know controllers: the groups limit nothing.

use crate::error::LabError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where the unified hierarchy is mounted.
pub fn mount() -> Result<PathBuf, LabError> {
    let path = "/proc/self/mountinfo";
    let text = fs::read_to_string(path).map_err(LabError::io("read", path))?;
    parse_mount(&text).ok_or(LabError::NoCgroup2)
}

fn parse_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (root == "/" && after.starts_with("cgroup2 ")).then(|| PathBuf::from(point))
    })
}

/// The group above all of a lab's.
pub fn of_lab(mount: &Path, lab: &str) -> PathBuf {
    mount.join("dunlin").join(lab)
}

/// The group of a node's daemon (the nest's is named like the node).
pub fn of_daemon(mount: &Path, lab: &str, node: &str) -> PathBuf {
    of_lab(mount, lab).join(format!("{node}.daemon"))
}

/// Makes a group and those above it.
pub fn make(group: &Path) -> Result<(), LabError> {
    // Another lab's `down` may remove the group above, which was empty, while ours is made below it.
    let mut chances = 100;
    loop {
        match fs::create_dir_all(group) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) && chances > 0 => {
                chances -= 1;
            }
            made => return made.map_err(LabError::io("make control group", group)),
        }
    }
}

/// The caller, and what it starts from now on, belongs to `group`.
pub fn join(group: &Path) -> Result<(), LabError> {
    let procs = group.join("cgroup.procs");
    fs::write(&procs, "0").map_err(LabError::io("join control group", &procs))
}

/// Kills everything in a group and below. A group that is not there has nothing in it.
pub fn kill(group: &Path) -> Result<(), LabError> {
    let file = group.join("cgroup.kill");
    match fs::write(&file, "1") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(LabError::io("kill control group", &file)),
    }
}

/// Waits until nothing lives in a group or below; `false` if something still does at the deadline.
pub fn wait_empty(group: &Path, deadline: Instant) -> Result<bool, LabError> {
    let path = group.join("cgroup.events");
    loop {
        // A fresh open each time: reading is what re-arms the poll.
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(e) => return Err(LabError::io("open", &path)(e)),
        };
        match io::read_to_string(&file) {
            Ok(text) if text.lines().any(|l| l == "populated 0") => return Ok(true),
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => return Ok(true),
            Err(e) => return Err(LabError::io("read", &path)(e)),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        // Half a second at most, so that a lost wake costs only that.
        let timeout = Timespec::try_from(left.min(Duration::from_millis(500))).ok();
        let _ = poll(&mut [PollFd::new(&file, PollFlags::PRI)], timeout.as_ref());
    }
}

/// The PIDs in a group and below.
pub fn members(group: &Path) -> Vec<i32> {
    let own = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<i32> = own.lines().filter_map(|l| l.parse().ok()).collect();
    for below in groups_below(group) {
        pids.extend(members(&below));
    }
    pids
}

/// Removes a group and those below it, all empty of processes, and `dunlin` above them when it has no other.
pub fn remove(group: &Path) -> Result<(), LabError> {
    remove_tree(group)?;
    if let Some(above) = group.parent() {
        // Fails while other labs are there, as it should.
        let _ = fs::remove_dir(above);
    }
    Ok(())
}

fn remove_tree(group: &Path) -> Result<(), LabError> {
    for below in groups_below(group) {
        remove_tree(&below)?;
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match fs::remove_dir(group) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            // "Not populated" comes a moment before the last task has left the group.
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other.map_err(LabError::io("remove control group", group)),
        }
    }
}

fn groups_below(group: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    entries
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn the_unified_hierarchy_is_told_from_the_old_ones() {
        let text = "30 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                    41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(parse_mount(text), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(parse_mount("30 31 0:29 / /x rw - tmpfs tmpfs rw"), None);
    }

    #[test]
    fn a_group_dies_whole_and_goes() {
        let group = of_lab(&mount().unwrap(), &format!("cgroup-test-{}", std::process::id()));
        make(&group.join("n1")).unwrap();
        // It joins before it forks, as a daemon does.
        let script = format!(
            "echo 0 > {}/n1/cgroup.procs; echo; sleep 100 & sleep 100",
            group.display()
        );
        let mut command = Command::new("sh");
        let mut child = command.args(["-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        assert!(!wait_empty(&group, Instant::now()).unwrap());
        assert!(members(&group).contains(&(child.id() as i32)));
        kill(&group).unwrap();
        child.wait().unwrap();
        assert!(wait_empty(&group, Instant::now() + Duration::from_secs(10)).unwrap());
        remove(&group).unwrap();
        assert!(!group.exists());
        kill(&group).unwrap();
        remove(&group).unwrap();
    }
}
