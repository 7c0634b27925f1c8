//! Finding the daemon that a command is for.
//!
//! Owns the order of looking: `--socket`; `--lab` and `--node`; this machine's own daemon; the lab named `lab`.

use crate::Whom;
use crate::exit::{Failed, NOT_THERE, UNREACHABLE};
use dunlin_lab::control::{self, Connection};
use dunlin_lab::layout::is_node_name;
use dunlin_lab::{LabError, LabName, Layout};
use dunlin_proto::control::{Reply, Request};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the daemon of a real machine listens.
const MACHINE_SOCKET: &str = "/run/dunlin/control.sock";

impl Whom {
    /// The lab that is meant, `lab` by default.
    pub fn layout(&self) -> Result<Layout, LabError> {
        let name = self.lab.as_deref().map_or(Ok(LabName::default()), str::parse)?;
        Ok(Layout::new(name))
    }

    /// A connection to the daemon that is meant.
    pub fn connect(&self) -> Result<Connection, Failed> {
        if let Some(socket) = &self.socket {
            return open(socket);
        }
        if self.lab.is_none() && Path::new(MACHINE_SOCKET).exists() {
            return self.machine();
        }
        let layout = self.layout()?;
        match &self.node {
            Some(node) => lab_node(&layout, node),
            None => any_of(&layout),
        }
    }

    /// Sends a request to the daemon that is meant, and waits for the one answer to it.
    pub fn ask(&self, request: &Request) -> Result<Reply, Failed> {
        let mut connection = self.connect()?;
        connection.ask(request).map_err(|e| lost(&connection, &e))
    }

    /// This machine's daemon; `--node` may still name a node of the lab named `lab`.
    fn machine(&self) -> Result<Connection, Failed> {
        let socket = Path::new(MACHINE_SOCKET);
        let Some(node) = &self.node else { return open(socket) };
        let lab = self.layout()?.control_socket(node);
        if is_node_name(node) && lab.exists() {
            return open(&lab);
        }
        match control::status(socket, Duration::from_secs(5)) {
            Ok(status) if status.name == *node => open(socket),
            Ok(status) => Err(Failed::new(
                NOT_THERE,
                format!(
                    "the daemon of this machine is {}, not {node}\nhint: give the command on {node}, or name a --lab",
                    status.name
                ),
            )),
            Err(why) => Err(Failed::new(
                UNREACHABLE,
                format!("the daemon at {MACHINE_SOCKET} {why}"),
            )),
        }
    }
}

/// The connection broke in the middle of a request.
pub fn lost(connection: &Connection, error: &io::Error) -> Failed {
    let socket = connection.socket().display();
    let why = match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            "closed the connection before it had answered".to_owned()
        }
        _ => format!("gave no readable answer: {error}"),
    };
    Failed::new(
        UNREACHABLE,
        format!("the daemon at {socket} {why}\nhint: its log is beside its socket"),
    )
}

fn lab_node(layout: &Layout, node: &str) -> Result<Connection, Failed> {
    let nodes = layout.nodes_on_disk();
    if nodes.is_empty() {
        return Err(LabError::NoLab {
            name: layout.name.to_string(),
        }
        .into());
    }
    if !nodes.iter().any(|n| n == node) {
        let error = LabError::NoNode {
            lab: layout.name.to_string(),
            node: node.into(),
            nodes: nodes.join(", "),
        };
        return Err(error.into());
    }
    open(&layout.control_socket(node))
}

fn any_of(layout: &Layout) -> Result<Connection, Failed> {
    let nodes = layout.nodes_on_disk();
    if nodes.is_empty() {
        return Err(LabError::NoLab {
            name: layout.name.to_string(),
        }
        .into());
    }
    let sockets: Vec<PathBuf> = nodes.iter().map(|n| layout.control_socket(n)).collect();
    sockets.iter().find_map(|s| Connection::open(s).ok()).ok_or_else(|| {
        Failed::new(
            UNREACHABLE,
            format!(
                "no daemon of lab {} answers\nhint: `dunlin lab status --name {0}` says more",
                layout.name
            ),
        )
    })
}

fn open(socket: &Path) -> Result<Connection, Failed> {
    Connection::open(socket).map_err(|e| {
        let hint = match e.kind() {
            io::ErrorKind::PermissionDenied => "only those it lets in may talk to a daemon: try as root",
            _ => "is the daemon running? its log is beside its socket",
        };
        Failed::new(
            UNREACHABLE,
            format!("no daemon answers at {}: {e}\nhint: {hint}", socket.display()),
        )
    })
}
