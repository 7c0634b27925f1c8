//! Taking a lab down, whatever is left of it.
//!
//! Owns the order: first everything that lives, then what it lived in. Works from the lab's name alone and may be
//! repeated; invariant: a `down` that returns `Ok` leaves nothing that [`traces`] could find.

use crate::error::LabError;
use crate::layout::{LABS_DIR, Layout};
use crate::processes::{in_network_namespaces, namespace_id};
use crate::{cgroup, links, lock};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long killed processes may take to be gone.
const DEATH: Duration = Duration::from_secs(20);

/// Takes a lab down. `Ok(false)`: there was none.
pub fn down(layout: &Layout) -> Result<bool, LabError> {
    if !rustix::process::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    let held = lock::take(layout)?;
    let there = !traces(layout).is_empty();
    let result = down_locked(layout);
    match &result {
        Ok(()) => held.remove(),
        Err(_) => drop(held),
    }
    result.map(|()| there)
}

/// [`down`], for one who holds the lock.
pub fn down_locked(layout: &Layout) -> Result<(), LabError> {
    kill(layout)?;
    if let Ok(mount) = cgroup::mount() {
        cgroup::remove(&cgroup::of_lab(&mount, layout.name.as_str()))?;
    }
    links::remove(layout)?;
    let dir = layout.dir();
    for mount in mounts_below(&dir)? {
        links::unmount(&mount)?;
    }
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(LabError::io("remove", &dir)(e)),
        _ => {}
    }
    links::unmark_netns_mount()
}

/// What of a lab there is, in words.
pub fn traces(layout: &Layout) -> Vec<String> {
    let mut traces = Vec::new();
    if layout.dir().exists() {
        traces.push(format!("directory {}", layout.dir().display()));
    }
    traces.extend(
        links::namespaces(layout)
            .iter()
            .map(|n| format!("namespace {}", n.display())),
    );
    if let Ok(mount) = cgroup::mount() {
        let group = cgroup::of_lab(&mount, layout.name.as_str());
        if group.exists() {
            traces.push(format!("control group {}", group.display()));
        }
    }
    traces
}

fn kill(layout: &Layout) -> Result<(), LabError> {
    let deadline = Instant::now() + DEATH;
    let group = cgroup::mount().ok().map(|m| cgroup::of_lab(&m, layout.name.as_str()));
    let namespaces: Vec<_> = links::namespaces(layout)
        .iter()
        .filter_map(|p| namespace_id(p))
        .collect();
    loop {
        if let Some(group) = &group {
            cgroup::kill(group)?;
        }
        // Daemons that a killed `up` had not yet put into their group, and what `lab exec` runs.
        let strays = in_network_namespaces(&namespaces)?;
        strays.iter().for_each(|stray| stray.kill());
        let empty = match &group {
            Some(group) => cgroup::wait_empty(group, deadline)?,
            None => true,
        };
        if empty && strays.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let mut pids: Vec<i32> = strays.iter().map(|s| s.pid).collect();
            pids.extend(group.iter().flat_map(|g| cgroup::members(g)));
            return Err(LabError::Undead {
                lab: layout.name.to_string(),
                pids: pids.iter().map(i32::to_string).collect::<Vec<_>>().join(", "),
            });
        }
        if !strays.is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Mount points in a directory, the deepest first.
fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>, LabError> {
    debug_assert!(dir.starts_with(LABS_DIR));
    let info = "/proc/self/mountinfo";
    let text = fs::read_to_string(info).map_err(LabError::io("read", info))?;
    let points = text
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from);
    let mut below: Vec<PathBuf> = points.filter(|p| p.starts_with(dir)).collect();
    below.sort_by_key(|p| std::cmp::Reverse(p.components().count()));
    below.dedup();
    Ok(below)
}
