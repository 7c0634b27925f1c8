//! `status`: credentials, PIDs in every namespace, signals.

use super::{ParseError, bad};

/// What dunlin needs of `status`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// Its file mode creation mask.
    pub umask: u32,
    /// R, S, D, T, t, Z, X, I.
    pub state: char,
    /// Thread group, in the reader's namespace.
    pub tgid: i32,
    /// Parent.
    pub ppid: i32,
    /// Tracer, or 0.
    pub tracer: i32,
    /// Real, effective, saved, file-system.
    pub uids: [u32; 4],
    /// Real, effective, saved, file-system.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Its number in every PID namespace, from the reader's to its own.
    pub ns_pids: Vec<i32>,
    /// Its process group's number, likewise.
    pub ns_pgids: Vec<i32>,
    /// Its session's number, likewise.
    pub ns_sids: Vec<i32>,
    /// How many threads.
    pub threads: u32,
    /// Inheritable, permitted, effective, bounding, ambient.
    pub capabilities: [u64; 5],
    /// no_new_privs is set.
    pub no_new_privs: bool,
    /// Pending signals, the thread's and the process's (bit n-1 for signal n).
    pub pending: u64,
    /// Ignored signals (bit n-1 for signal n).
    pub ignored: u64,
    /// Caught signals.
    pub caught: u64,
    /// How many seccomp filters it has (`None` before Linux 5.9).
    pub seccomp_filters: Option<u32>,
    /// Transparent huge pages may be used.
    pub thp_enabled: bool,
    /// Locked memory, KiB.
    pub locked_kib: u64,
    /// CPU features it has enabled for its threads (user shadow stack).
    pub thread_features: String,
}

impl Status {
    /// Parses a whole `status`.
    pub fn parse(text: &str) -> Result<Status, ParseError> {
        let mut status = Status {
            thp_enabled: true,
            ..Status::default()
        };
        for line in text.lines() {
            if let Some((key, value)) = line.split_once(':') {
                status.field(key, value.trim()).ok_or_else(|| bad("status", line))?;
            }
        }
        Ok(status)
    }

    fn field(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "Umask" => self.umask = u32::from_str_radix(value, 8).ok()?,
            "State" => self.state = value.chars().next()?,
            "Tgid" => self.tgid = value.parse().ok()?,
            "PPid" => self.ppid = value.parse().ok()?,
            "TracerPid" => self.tracer = value.parse().ok()?,
            "Uid" => self.uids = list(value)?.try_into().ok()?,
            "Gid" => self.gids = list(value)?.try_into().ok()?,
            "Groups" => self.groups = list(value)?,
            "NSpid" => self.ns_pids = list(value)?,
            "NSpgid" => self.ns_pgids = list(value)?,
            "NSsid" => self.ns_sids = list(value)?,
            "Threads" => self.threads = value.parse().ok()?,
            "CapInh" => self.capabilities[0] = hex(value)?,
            "CapPrm" => self.capabilities[1] = hex(value)?,
            "CapEff" => self.capabilities[2] = hex(value)?,
            "CapBnd" => self.capabilities[3] = hex(value)?,
            "CapAmb" => self.capabilities[4] = hex(value)?,
            "NoNewPrivs" => self.no_new_privs = value == "1",
            "SigPnd" | "ShdPnd" => self.pending |= hex(value)?,
            "SigIgn" => self.ignored = hex(value)?,
            "SigCgt" => self.caught = hex(value)?,
            "Seccomp_filters" => self.seccomp_filters = Some(value.parse().ok()?),
            "THP_enabled" => self.thp_enabled = value == "1",
            "VmLck" => self.locked_kib = value.strip_suffix(" kB")?.trim().parse().ok()?,
            "x86_Thread_features" => self.thread_features = value.to_owned(),
            _ => {}
        }
        Some(())
    }
}

fn list<T: std::str::FromStr>(value: &str) -> Option<Vec<T>> {
    value.split_ascii_whitespace().map(|n| n.parse().ok()).collect()
}

fn hex(value: &str) -> Option<u64> {
    u64::from_str_radix(value, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read() {
        let text = "Name:\ta\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t7\nPPid:\t1\nUid:\t1\t2\t3\t4\nGroups:\t5 6 \n\
                    NSpid:\t900\t129\nCapPrm:\t000001ffffffffff\nNoNewPrivs:\t1\nSigIgn:\t0000000000001000\n";
        let status = Status::parse(text).unwrap();
        assert_eq!((status.umask, status.state, status.uids), (0o22, 'S', [1, 2, 3, 4]));
        assert_eq!((status.groups, status.ns_pids), (vec![5, 6], vec![900, 129]));
        assert!(status.no_new_privs && status.ignored == 0x1000);
        assert!(Status::parse("Uid:\tx\n").unwrap_err().to_string().contains("Uid"));
    }

    #[test]
    fn own_status_parses() {
        let status = Status::parse(&std::fs::read_to_string("/proc/self/status").unwrap()).unwrap();
        assert_eq!(status.tgid, std::process::id() as i32);
    }
}
