//! The list of checks, in the order in which a person would mend what is wrong.

mod capabilities;
mod features;
mod network;

use super::{Row, Status};
use dunlin_lab::cgroup;
use dunlin_node::config::NodeConfig;
use dunlin_sys::Errno;
use dunlin_sys::probe;
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
    rows.extend(capabilities::all());
    rows.extend(features::all());
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
