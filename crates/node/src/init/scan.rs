//! Which ids are in use in the nest, by its /proc.
//!
//! Owns the reading. Refuses to know which ids matter. A process that comes or goes meanwhile may be seen or not.

use dunlin_proto::ids::Pid;
use dunlin_sys::procfs::ProcDir;
use std::collections::BTreeSet;

/// Every PID, TID, process group and session of the caller's PID namespace.
pub fn ids_in_use() -> BTreeSet<Pid> {
    let mut ids = BTreeSet::new();
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return ids;
    };
    let processes = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    for pid in processes {
        ids.insert(Pid(pid));
        let process = ProcDir::process(pid);
        // Threads share their process's group and session.
        if let Ok(stat) = process.stat() {
            ids.extend([Pid(stat.pgrp), Pid(stat.session)]);
        }
        if let Ok(threads) = process.threads() {
            ids.extend(threads.into_iter().map(Pid));
        }
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_s_own_ids_are_among_them() {
        let ids = ids_in_use();
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let group = rustix::process::getpgrp().as_raw_nonzero().get();
        assert!([tid, pid, group].iter().all(|id| ids.contains(&Pid(*id))));
    }
}
