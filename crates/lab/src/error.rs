//! What can go wrong with a lab, in words for a person.

use std::io;
use std::path::{Path, PathBuf};

/// Why a lab could not be made, asked or taken down.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The name cannot be part of paths, namespaces and host names.
    #[error("lab name {name:?} is not usable\nhint: use 1 to 40 lower-case letters, digits and inner hyphens")]
    Name {
        /// As given.
        name: String,
    },
    /// The options contradict each other.
    #[error("{0}")]
    Options(String),
    /// Something of a lab of this name is there already.
    #[error(
        "lab {name} exists already ({found})\nhint: `dunlin lab down --name {name}` takes it down, or choose another --name"
    )]
    Exists {
        /// The lab.
        name: String,
        /// What was found.
        found: String,
    },
    /// There is no such lab.
    #[error("there is no lab {name}\nhint: `dunlin lab up --name {name}` makes one")]
    NoLab {
        /// The lab.
        name: String,
    },
    /// The lab has no such node.
    #[error("lab {lab} has no node {node}\nhint: its nodes are {nodes}")]
    NoNode {
        /// The lab.
        lab: String,
        /// As given.
        node: String,
        /// Those there are.
        nodes: String,
    },
    /// Only root can make namespaces and links.
    #[error("a lab needs root: it makes network namespaces and links\nhint: run it with sudo")]
    NotRoot,
    /// No unified control group hierarchy.
    #[error("no cgroup2 file system is mounted\nhint: mount -t cgroup2 none /sys/fs/cgroup/unified")]
    NoCgroup2,
    /// A tool failed; nothing of what it was told may be relied on.
    #[error("`{command}` failed: {why}")]
    Tool {
        /// The command line.
        command: String,
        /// What it said.
        why: String,
    },
    /// `ip` is not installed.
    #[error("the `ip` command is missing\nhint: install iproute2")]
    NoIp,
    /// The kernel refused something about a path.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A node did not become ready; the lab has been taken down again.
    #[error("node {node} of lab {lab} {why}; the lab has been taken down again\nits daemon's last words:\n{log}")]
    NotReady {
        /// The lab.
        lab: String,
        /// The node.
        node: String,
        /// What it did instead.
        why: String,
        /// The end of its log.
        log: String,
    },
    /// Processes of the lab survive SIGKILL; everything else that could be removed has been.
    #[error("processes of lab {lab} do not die: {pids}\nhint: look at /proc/PID/stack, then `dunlin lab down` again")]
    Undead {
        /// The lab.
        lab: String,
        /// Which.
        pids: String,
    },
    /// A daemon answered something else than was asked, or not at all.
    #[error("daemon at {socket}: {why}")]
    Daemon {
        /// Its control socket.
        socket: PathBuf,
        /// What happened.
        why: String,
    },
}

impl LabError {
    /// For `map_err` on an I/O call about a path.
    pub fn io(what: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> LabError {
        let path = path.as_ref().to_owned();
        move |source| LabError::Io { what, path, source }
    }
}
