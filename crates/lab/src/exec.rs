//! Running commands in a node's network namespace, or in that of the outside host.
//!
//! Only the network differs: files, PIDs and terminals are the caller's own.

use crate::error::LabError;
use crate::layout::{CLIENT, Layout};
use crate::record::Record;
use dunlin_sys::spawn::with_stdio_alone;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};

/// Becomes `command` in a node's network namespace (or that of the host that is outside the cluster, `client`); returns only if it could not.
///
/// To be called while the process has one thread: it is this thread that changes its namespace.
pub fn exec(layout: &Layout, node: &str, command: &[OsString]) -> Result<io::Error, LabError> {
    let record = Record::read(layout)?;
    if node != CLIENT {
        record.node(layout, node)?;
    }
    enter(&layout.netns_path(node))?;
    let (program, arguments) = command
        .split_first()
        .expect("the command line asks for at least one word");
    Ok(Command::new(program).args(arguments).exec())
}

/// Starts a child in a network namespace, with its standard descriptors alone. The caller's own namespace is not changed.
pub fn spawn(netns: &Path, command: &mut Command) -> Result<Child, LabError> {
    // A thread of its own goes there and forks: what it leaves behind is a thread that ends.
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            enter(netns)?;
            let spawned = with_stdio_alone(command).spawn();
            spawned.map_err(LabError::io("start", command.get_program()))
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn enter(netns: &Path) -> Result<(), LabError> {
    let file = File::open(netns).map_err(LabError::io("open namespace", netns))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|e| LabError::io("enter namespace", netns)(e.into()))
}
