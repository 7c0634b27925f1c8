//! Parsers of `/proc/PID/status`, `/proc/PID/stat` and `/etc/passwd`.
//!
//! Owns the formats. Refuses to open files. A text that is not as expected is `None`, never a guess.

use dunlin_proto::ids::Pid;
use std::collections::BTreeMap;

/// Of `/proc/PID/status`.
#[derive(Debug, PartialEq, Eq)]
pub struct Status {
    pub name: String,
    pub state: char,
    pub tgid: Pid,
    pub ppid: Pid,
    pub uid: u32,
    pub euid: u32,
    pub saved_uid: u32,
    pub effective_capabilities: u64,
    pub threads: u32,
    pub rss_bytes: u64,
}

impl Status {
    pub fn parse(text: &[u8]) -> Option<Status> {
        let text = String::from_utf8_lossy(text);
        let field = |name: &str| {
            text.lines()
                .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
        };
        let mut uids = field("Uid")?.split_whitespace();
        Some(Status {
            name: field("Name")?.to_owned(),
            state: field("State")?.chars().next()?,
            tgid: Pid(field("Tgid")?.parse().ok()?),
            ppid: Pid(field("PPid")?.parse().ok()?),
            uid: uids.next()?.parse().ok()?,
            euid: uids.next()?.parse().ok()?,
            saved_uid: uids.next()?.parse().ok()?,
            effective_capabilities: u64::from_str_radix(field("CapEff")?, 16).ok()?,
            threads: field("Threads")?.parse().ok()?,
            // Absent for a zombie, which has no memory.
            rss_bytes: match field("VmRSS") {
                Some(kib) => kib.strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024,
                None => 0,
            },
        })
    }
}

/// Of `/proc/PID/stat`.
#[derive(Debug, PartialEq, Eq)]
pub struct Stat {
    pub state: char,
    /// The controlling terminal's device number; 0 without one.
    pub terminal: u64,
    pub foreground_group: i32,
    /// A wait status; `None` on a kernel that does not show it.
    pub exit_code: Option<i32>,
}

impl Stat {
    pub fn parse(text: &[u8]) -> Option<Stat> {
        // The name may contain anything, parentheses and spaces too: it ends at the last one.
        let end = text.iter().rposition(|b| *b == b')')?;
        let rest = std::str::from_utf8(&text[end + 1..]).ok()?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // Numbered from 1 in proc_pid_stat(5); `fields` starts with the third.
        let field = |number: usize| fields.get(number - 3).copied();
        Some(Stat {
            state: field(3)?.chars().next()?,
            // Printed as a signed number.
            terminal: field(7)?.parse::<i32>().ok()? as u32 as u64,
            foreground_group: field(8)?.parse().ok()?,
            exit_code: field(52).and_then(|f| f.parse().ok()),
        })
    }
}

/// User numbers and names; of two names for a number the first.
pub fn passwd(text: &str) -> BTreeMap<u32, String> {
    let mut names = BTreeMap::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        if let (Some(name), Some(uid)) = (fields.next(), fields.nth(1).and_then(|u| u.parse().ok())) {
            names.entry(uid).or_insert_with(|| name.to_owned());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_and_a_cut_one_is_not() {
        let text = "Name:\ta b\nState:\tT (stopped)\nTgid:\t64\nPPid:\t65\nUid:\t1\t2\t3\t4\nVmRSS:\t   12 kB\nThreads:\t4\n\
            CapEff:\t0000000000000020\n";
        let status = Status::parse(text.as_bytes()).unwrap();
        assert_eq!(
            status,
            Status {
                name: "a b".into(),
                state: 'T',
                tgid: Pid(64),
                ppid: Pid(65),
                uid: 1,
                euid: 2,
                saved_uid: 3,
                effective_capabilities: 0x20,
                threads: 4,
                rss_bytes: 12288
            }
        );
        assert_eq!(Status::parse(&text.as_bytes()[..40]), None);
        assert_eq!(
            Status::parse(text.replace("VmRSS:\t   12 kB\n", "").as_bytes())
                .unwrap()
                .rss_bytes,
            0
        );
    }

    #[test]
    fn a_stat_is_read_whatever_the_name() {
        let fields = (9..52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        let text = format!("129 (x) R 1 (y) Z 1 129 129 0 -1 {fields} 1792\n");
        assert_eq!(
            Stat::parse(text.as_bytes()),
            Some(Stat {
                state: 'Z',
                terminal: 0,
                foreground_group: -1,
                exit_code: Some(1792)
            })
        );
        assert_eq!(Stat::parse(b"129 (x"), None);
        assert_eq!(Stat::parse(b"129 (x) R 1"), None);
    }

    #[test]
    fn names_of_users() {
        let names = passwd("root:x:0:0:root:/root:/bin/sh\ntoor:x:0:0::/:\nbad\nu:x:1000:1:::\n");
        assert_eq!(names, [(0, "root".to_owned()), (1000, "u".to_owned())].into());
    }
}
