//! Processes of the machine, told apart for good: a PID alone may have been given out again.
//!
//! Owns the identity (PID and start time) and killing by it. Refuses to know why.

use crate::error::LabError;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// One process, not merely a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its PID.
    pub pid: i32,
    /// When it started, in clock ticks since the machine did (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
}

impl Identity {
    /// The process that has this PID now.
    pub fn of(pid: i32) -> Option<Identity> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the name, in parentheses, and may hold anything; the third is the state.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        let start_ticks = fields.nth(18)?.parse().ok()?;
        (state != "Z" && state != "X").then_some(Identity { pid, start_ticks })
    }

    /// Is it still there (a zombie is not)?
    pub fn is_alive(self) -> bool {
        Identity::of(self.pid) == Some(self)
    }

    /// Waits until it has ended, with all its threads.
    pub fn until_ended(self) {
        let Some(pid) = Pid::from_raw(self.pid) else { return };
        // Whoever has the PID is pinned, and looked at after that, as in `kill`.
        let Ok(pinned) = pidfd_open(pid, PidfdFlags::empty()) else {
            return;
        };
        while self.is_alive() {
            match poll(&mut [PollFd::new(&pinned, PollFlags::IN)], None) {
                Err(Errno::INTR) => {}
                _ => return,
            }
        }
    }

    /// Kills this process and no other that may have its PID now.
    pub fn kill(self) {
        let Some(pid) = Pid::from_raw(self.pid) else { return };
        // The descriptor pins whoever has the PID; who it is is checked after that.
        let Ok(pinned) = pidfd_open(pid, PidfdFlags::empty()) else {
            return;
        };
        if self.is_alive() {
            // ESRCH: it has died of itself.
            let _ = pidfd_send_signal(&pinned, Signal::KILL);
        }
    }
}

/// Device and inode of a namespace file, which tell namespaces apart.
pub fn namespace_id(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// Every process, but the caller, whose network namespace is one of these.
pub fn in_network_namespaces(namespaces: &[(u64, u64)]) -> Result<Vec<Identity>, LabError> {
    if namespaces.is_empty() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir("/proc").map_err(LabError::io("read", "/proc"))?;
    let pids = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    Ok(pids
        .filter(|pid| *pid != std::process::id() as i32)
        .filter_map(|pid| {
            let process = Identity::of(pid)?;
            let namespace = namespace_id(Path::new(&format!("/proc/{pid}/ns/net")))?;
            namespaces.contains(&namespace).then_some(process)
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn another_process_of_the_same_pid_is_left_alone() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let real = Identity::of(child.id() as i32).unwrap();
        let older = Identity {
            start_ticks: real.start_ticks - 1,
            ..real
        };
        older.kill();
        assert!(!older.is_alive());
        assert!(real.is_alive());
        real.kill();
        child.wait().unwrap();
        assert!(!real.is_alive());
    }

    #[test]
    fn a_process_is_found_by_its_network_namespace() {
        let mut command = Command::new("unshare");
        command.args(["-n", "sh", "-c", "echo; exec sleep 100"]);
        let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut line = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let namespace = namespace_id(Path::new(&format!("/proc/{}/ns/net", child.id()))).unwrap();
        let found = in_network_namespaces(&[namespace]).unwrap();
        assert_eq!(found.iter().map(|p| p.pid).collect::<Vec<_>>(), [child.id() as i32]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(in_network_namespaces(&[namespace]).unwrap(), []);
    }
}
