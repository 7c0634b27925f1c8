//! The network of a lab: one namespace a node, one for the bridge, a veth pair from each node to it; one for the host that
//! is outside the cluster, and a pair from it to the gateway.
//!
//! Owns the namespaces and links, made with iproute2's `ip -batch` (docs/decisions/0002). The bridge has a namespace
//! of its own, so the host sees no interface of a lab. Refuses to know daemons.

use crate::error::LabError;
use crate::layout::{CLIENT, LABS_DIR, LINK, Layout, NETNS_DIR, OUTSIDE_DEVICE};
use crate::lock;
use crate::record::NodeRecord;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Jumbo frames: what a cluster's own network would have.
const MTU: u32 = 9000;

/// Says that /run/netns became a mount because of us, and may stop being one.
const MARKER: &str = "netns-mounted";

/// Of the link to the outside host: what the world has.
const OUTSIDE_MTU: u32 = 1500;

/// Makes the namespaces and joins them; the outside host has a link of its own to the gateway.
pub fn make(layout: &Layout, nodes: &[NodeRecord], gateway: &str) -> Result<(), LabError> {
    let mut namespaces = format!("netns add {}\nnetns add {}\n", layout.netns(LINK), layout.netns(CLIENT));
    let mut bridge = format!(
        "link set lo up\nlink add name br0 mtu {MTU} type bridge forward_delay 0 stp_state 0 mcast_snooping 0\n\
         link set br0 up\n"
    );
    for node in nodes {
        let (name, netns) = (&node.name, layout.netns(&node.name));
        writeln!(namespaces, "netns add {netns}").expect("strings grow");
        write!(
            bridge,
            "link add name {name} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {netns}\n\
             link set {name} master br0 up\n"
        )
        .expect("strings grow");
    }
    {
        let _names = lock::names()?;
        mark_netns_mount()?;
        ip(None, &namespaces)?;
    }
    ip(Some(&layout.netns(LINK)), &bridge)?;
    for node in nodes {
        let own = format!(
            "link set lo up\naddr add {}/24 brd + dev eth0\nlink set eth0 up\n",
            node.address
        );
        ip(Some(&layout.netns(&node.name)), &own)?;
    }
    make_outside(layout, gateway)
}

fn make_outside(layout: &Layout, gateway: &str) -> Result<(), LabError> {
    let (client, gateway) = (layout.netns(CLIENT), layout.netns(gateway));
    let ((c4, c6), (o4, o6)) = (layout.client(), layout.outside());
    let own = format!(
        "link set lo up\n\
         link add name eth0 mtu {OUTSIDE_MTU} type veth peer name {OUTSIDE_DEVICE} mtu {OUTSIDE_MTU} netns {gateway}\n\
         addr add {c4}/24 brd + dev eth0\naddr add {c6}/64 dev eth0 nodad\nlink set eth0 up\n"
    );
    ip(Some(&client), &own)?;
    let other = format!(
        "addr add {o4}/24 brd + dev {OUTSIDE_DEVICE}\naddr add {o6}/64 dev {OUTSIDE_DEVICE} nodad\n\
         link set {OUTSIDE_DEVICE} up\n"
    );
    ip(Some(&gateway), &other)
}

/// The files of the lab's namespaces that there are, made by whichever `up`.
pub fn namespaces(layout: &Layout) -> Vec<PathBuf> {
    let entries = fs::read_dir(NETNS_DIR).into_iter().flatten().flatten();
    entries
        .filter(|e| e.file_name().to_str().is_some_and(|n| layout.netns_node(n).is_some()))
        .map(|e| e.path())
        .collect()
}

/// Removes the lab's namespaces, and with them the links in them.
pub fn remove(layout: &Layout) -> Result<(), LabError> {
    for path in namespaces(layout) {
        // Not through `ip`: it gives up on a file that an interrupted `ip netns add` never mounted anything on.
        unmount(&path)?;
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(LabError::io("remove namespace", &path)(e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Unmounts everything at a path, if anything is.
pub fn unmount(path: &Path) -> Result<(), LabError> {
    use rustix::io::Errno;
    loop {
        match rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(e) => return Err(LabError::io("unmount", path)(e.into())),
        }
    }
}

/// `ip netns add` turns /run/netns into a mount of its own and never back. If that is due to us, it is noted.
fn mark_netns_mount() -> Result<(), LabError> {
    if is_mount_point(NETNS_DIR)? {
        return Ok(());
    }
    let marker = Path::new(LABS_DIR).with_file_name(MARKER);
    fs::write(&marker, "").map_err(LabError::io("write", &marker))
}

/// Undoes what `mark_netns_mount` noted, once no namespace has a name.
pub fn unmark_netns_mount() -> Result<(), LabError> {
    let _names = lock::names()?;
    let marker = Path::new(LABS_DIR).with_file_name(MARKER);
    let empty = fs::read_dir(NETNS_DIR).is_ok_and(|mut entries| entries.next().is_none());
    if empty && marker.exists() {
        // Without DETACH: another's namespace that came in between keeps it busy, and the mount stays.
        let plain = rustix::mount::UnmountFlags::empty();
        if rustix::mount::unmount(NETNS_DIR, plain).is_ok() {
            let _ = fs::remove_dir(NETNS_DIR);
            let _ = fs::remove_file(&marker);
        }
    }
    Ok(())
}

fn is_mount_point(path: &str) -> Result<bool, LabError> {
    let info = "/proc/self/mountinfo";
    let text = fs::read_to_string(info).map_err(LabError::io("read", info))?;
    Ok(text.lines().any(|line| line.split(' ').nth(4) == Some(path)))
}

/// Feeds commands to one `ip`.
fn ip(netns: Option<&str>, batch: &str) -> Result<(), LabError> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    command.args(["-batch", "-"]);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let failed = |why: String| LabError::Tool {
        command: format!("ip {}-batch -", netns.map_or(String::new(), |n| format!("-n {n} "))),
        why,
    };
    let mut child = command.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => LabError::NoIp,
        _ => failed(e.to_string()),
    })?;
    let fed = child
        .stdin
        .take()
        .map_or(Ok(()), |mut stdin| stdin.write_all(batch.as_bytes()));
    let output = child.wait_with_output().map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    fed.map_err(|e| failed(e.to_string()))
}
