//! The processes that run on this node, as `dunlin ps` and the rules about users see them.
//!
//! Owns what is read from the nest's own `/proc`, and the registries of what is not a program there ([`Hidden`]) and of
//! what came from elsewhere ([`Residents`]). Refuses to know where a process is that is not here. Invariants: a surrogate, a
//! keeper or a blank is never shown, signalled or waited for as if it were the process whose number it bears; nothing
//! here reads the memory of a process with pages elsewhere (`/proc/PID/cmdline` would wait for a page).

pub mod exits;
mod parse;
mod registry;

pub use registry::{Hidden, HiddenKind, JobControl, Resident, Residents};

use crate::config::NodeConfig;
use dunlin_proto::control::ProcessRow;
use dunlin_proto::ids::{LAST_OWN_PID, Modulus, Pid};
use dunlin_proto::peer::Caller;
use parse::{Stat, Status};
use rustix::fs::{Dir, Mode, OFlags};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// No file of `/proc` is read further.
const MAX_FILE_BYTES: u64 = 64 << 10;
/// No command line is shown further.
const MAX_COMMAND_BYTES: usize = 4096;

/// The `/proc` of the nest, through which processes bear the numbers that they themselves see.
#[derive(Debug)]
pub struct NestProc(OwnedFd);

impl NestProc {
    /// Finds it below the root directory of the nest.
    pub fn open(root: impl AsFd) -> io::Result<NestProc> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(NestProc(rustix::fs::openat(root, "proc", flags, Mode::empty())?))
    }

    /// Every process there, in no order. One that ends meanwhile may be missing.
    pub fn pids(&self) -> io::Result<Vec<Pid>> {
        let mut pids = Vec::new();
        for entry in Dir::read_from(&self.0)? {
            let entry = entry?;
            let name = entry.file_name().to_str().ok();
            pids.extend(name.and_then(|n| n.parse().ok()).map(Pid));
        }
        Ok(pids)
    }

    /// The real and the saved user of a process; `None` if there is none.
    pub fn users(&self, pid: Pid) -> io::Result<Option<(u32, u32)>> {
        Ok(self.status(pid)?.map(|s| (s.uid, s.saved_uid)))
    }

    /// Who a thread is, as a sender of signals.
    pub fn caller(&self, tid: Pid) -> io::Result<Option<Caller>> {
        const CAP_KILL: u64 = 1 << 5;
        Ok(self.status(tid)?.map(|s| Caller {
            uid: s.uid,
            euid: s.euid,
            privileged: s.effective_capabilities & CAP_KILL != 0,
        }))
    }

    /// May a thread bind ports below 1024?
    pub fn may_bind_low_ports(&self, tid: Pid) -> io::Result<bool> {
        const CAP_NET_BIND_SERVICE: u64 = 1 << 10;
        Ok(self
            .status(tid)?
            .is_some_and(|s| s.effective_capabilities & CAP_NET_BIND_SERVICE != 0))
    }

    /// The process that a thread is of.
    pub fn process_of(&self, tid: Pid) -> io::Result<Option<Pid>> {
        Ok(self.status(tid)?.map(|s| s.tgid))
    }

    /// Bytes of a thread's memory. Waits for pages that are elsewhere.
    pub fn memory(&self, tid: Pid, address: u64, into: &mut [u8]) -> io::Result<()> {
        let path = format!("{tid}/mem");
        let fd = rustix::fs::openat(&self.0, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        File::from(fd).read_exact_at(into, address)
    }

    /// The wait status of a process that has ended and has not been reaped.
    pub fn zombie_status(&self, pid: Pid) -> io::Result<Option<i32>> {
        let stat = self.read(pid, "stat")?.and_then(|text| Stat::parse(&text));
        Ok(stat.filter(|s| s.state == 'Z').and_then(|s| s.exit_code))
    }

    /// The foreground process group of the terminal with this device number, if a session has it.
    pub fn foreground_group(&self, terminal: u64) -> io::Result<Option<i32>> {
        for pid in self.pids()? {
            let stat = self.read(pid, "stat")?.and_then(|text| Stat::parse(&text));
            if let Some(stat) = stat.filter(|s| s.terminal == terminal && s.foreground_group > 0) {
                return Ok(Some(stat.foreground_group));
            }
        }
        Ok(None)
    }

    fn status(&self, pid: Pid) -> io::Result<Option<Status>> {
        Ok(self.read(pid, "status")?.and_then(|text| Status::parse(&text)))
    }

    fn command(&self, pid: Pid) -> io::Result<Option<String>> {
        let Some(bytes) = self.read(pid, "cmdline")? else {
            return Ok(None);
        };
        let end = bytes.len().min(MAX_COMMAND_BYTES);
        let words: Vec<_> = bytes[..end].split(|b| *b == 0).map(String::from_utf8_lossy).collect();
        Ok(Some(words.join(" ").trim_end().to_owned()).filter(|c| !c.is_empty()))
    }

    /// `None`: there is no such process (any more).
    fn read(&self, pid: Pid, file: &str) -> io::Result<Option<Vec<u8>>> {
        let gone = |e: &io::Error| {
            let e = e.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
            matches!(e, Some(rustix::io::Errno::NOENT | rustix::io::Errno::SRCH))
        };
        let path = format!("{pid}/{file}");
        let opened = rustix::fs::openat(&self.0, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let mut bytes = Vec::new();
        let read = opened
            .map_err(io::Error::from)
            .and_then(|fd| File::from(fd).take(MAX_FILE_BYTES).read_to_end(&mut bytes));
        match read {
            Ok(_) => Ok(Some(bytes)),
            Err(e) if gone(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// One row for every program that runs here, by PID.
pub fn rows(
    config: &NodeConfig,
    proc: &NestProc,
    hidden: &Hidden,
    residents: &Residents,
) -> io::Result<Vec<ProcessRow>> {
    let users = user_names();
    let modulus = Modulus(config.modulus);
    // A program that is not started yet still is a copy of init.
    let init = proc.command(Pid(1))?;
    let mut rows = Vec::new();
    for pid in proc.pids()? {
        if pid.0 <= LAST_OWN_PID || hidden.kind(pid).is_some() {
            continue;
        }
        let Some(status) = proc.status(pid)? else { continue };
        let resident = residents.get(pid);
        let elsewhere = resident.as_ref().map(|r| (r.elsewhere)()).unwrap_or_default();
        let from_parent = resident.is_none() && residents.has_pages_elsewhere(status.ppid);
        let command = match &resident {
            Some(r) if !elsewhere.is_empty() => r.command.clone(),
            // Forked a moment ago by one with pages elsewhere, its memory may be incomplete too.
            _ if from_parent => format!("[{}]", status.name),
            Some(_) | None => proc.command(pid)?.unwrap_or_else(|| format!("[{}]", status.name)),
        };
        if resident.is_none() && status.ppid == Pid(1) && init.as_ref() == Some(&command) {
            continue;
        }
        rows.push(ProcessRow {
            pid,
            ppid: status.ppid,
            home: modulus
                .home(pid)
                .map_or_else(|| config.name.clone(), |slot| config.name_of(slot)),
            node: config.name.clone(),
            state: if resident.as_ref().is_some_and(|r| r.frozen) {
                'F'
            } else {
                status.state
            },
            threads: status.threads,
            rss_bytes: status.rss_bytes,
            pages_elsewhere: elsewhere
                .into_iter()
                .map(|(slot, pages)| (config.name_of(slot), pages))
                .collect(),
            moves: resident.map_or(0, |r| r.moves),
            user: users
                .get(&status.uid)
                .cloned()
                .unwrap_or_else(|| status.uid.to_string()),
            command,
        });
    }
    rows.sort_by_key(|row| row.pid);
    Ok(rows)
}

/// The names in this node's `/etc/passwd`; without it, users have numbers.
fn user_names() -> BTreeMap<u32, String> {
    parse::passwd(&std::fs::read_to_string("/etc/passwd").unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_proto::ids::Slot;
    use std::process::{Child, Command};
    use std::sync::Arc;

    struct Killed(Child);
    impl Drop for Killed {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    fn config() -> NodeConfig {
        NodeConfig::parse("cluster='c'\nname='n1'\nslot=1\nlisten='127.0.0.1:1'\nstate_dir='/x'").unwrap()
    }

    #[test]
    fn a_program_is_shown_a_surrogate_is_not_and_the_memory_of_a_resident_is_not_read() {
        let proc = NestProc::open(File::open("/").unwrap()).unwrap();
        let (hidden, residents) = (Hidden::default(), Residents::default());
        let child = Killed(Command::new("sleep").arg("1234").spawn().unwrap());
        let pid = Pid(child.0.id() as i32);
        let row = || {
            rows(&config(), &proc, &hidden, &residents)
                .unwrap()
                .into_iter()
                .find(|r| r.pid == pid)
        };
        // Until its exec is done the child shows the command of this test.
        while row().unwrap().command != "sleep 1234" {
            std::thread::yield_now();
        }
        let seen = row().unwrap();
        assert_eq!(
            (seen.ppid, seen.threads, seen.moves),
            (Pid(std::process::id() as i32), 1, 0)
        );
        assert_eq!((seen.user.as_str(), seen.node.as_str()), ("root", "n1"));
        assert!(seen.rss_bytes > 0);

        residents.insert(
            pid,
            Resident {
                moves: 3,
                command: "moved".into(),
                incarnation: Default::default(),
                frozen: true,
                elsewhere: Arc::new(|| [(Slot(1), 5)].into()),
            },
        );
        let seen = row().unwrap();
        assert_eq!((seen.command.as_str(), seen.state, seen.moves), ("moved", 'F', 3));
        assert_eq!(seen.pages_elsewhere, [("n1".to_owned(), 5)].into());

        hidden.insert(pid, HiddenKind::Relative);
        assert_eq!(row(), None);
    }
}
