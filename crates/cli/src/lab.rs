//! `dunlin lab`: a whole cluster on this machine.

use crate::Whom;
use crate::exit::{self, Failed, NO_PROGRAM, NOT_EXECUTABLE, Outcome};
use clap::{Args, Subcommand};
use dunlin_lab::status::LabStatus;
use dunlin_lab::{Layout, Options};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io;

/// The `lab` command.
#[derive(Debug, Args)]
pub struct LabArgs {
    #[command(subcommand)]
    command: LabCommand,
    /// The lab's name; labs of different names run side by side [default: lab]
    #[arg(long, global = true, value_name = "NAME")]
    name: Option<String>,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Make nodes n1..nN, joined by a link, and return when all are ready
    ///
    /// Outside of the cluster there is a host `client`, on a link of its own to the gateway.
    ///
    /// Each node is a network namespace with its own daemon, processes, IPC and clocks. Files are the machine's own,
    /// on every node at the same path.
    Up {
        /// How many nodes
        #[arg(long, default_value_t = 3, value_name = "N")]
        nodes: u16,
        /// The PID modulus M: the node with slot s gives out PIDs that leave s when divided by M
        #[arg(long, default_value_t = 64, value_name = "M")]
        modulus: u16,
        /// Give out no PID from this one on (for tests of the wrap-around)
        #[arg(long, value_name = "PID")]
        pid_limit: Option<i32>,
        /// The node that lets programs reach the outside host, and be reached by it
        #[arg(long, default_value = "n1", value_name = "NODE")]
        gateway: String,
    },
    /// Kill everything in the lab and leave nothing of it; may be repeated
    Down,
    /// What every node is like
    Status {
        /// As JSON: name, modulus, ready, gateway, outside_address, outside_address6, inside_address, inside_address6, nodes [{name, slot, address, outside_address, ready, problem, daemon_pid,
        /// init_pid, processes, peers {node: seen}}]
        #[arg(long)]
        json: bool,
    },
    /// Run a command in a node's network (and nothing else of the node), or on the host outside the cluster
    Exec {
        /// The node, or `client`
        #[arg(value_name = "NODE")]
        on: String,
        /// The command
        #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
}

/// Runs it.
pub fn main(args: LabArgs, whom: &Whom) -> Outcome {
    let layout = match &args.name {
        Some(name) => Layout::new(name.parse()?),
        None => whom.layout()?,
    };
    match args.command {
        LabCommand::Up {
            nodes,
            modulus,
            pid_limit,
            gateway,
        } => {
            let program = std::env::current_exe()
                .map_err(|e| Failed::new(exit::FAILED, format!("finding the dunlin binary: {e}")))?;
            let options = Options {
                nodes,
                modulus,
                pid_limit,
                gateway,
                program,
            };
            let record = dunlin_lab::up::up(&layout, &options)?;
            let names: Vec<&str> = record.nodes.iter().map(|n| n.name.as_str()).collect();
            exit::say(&format!("lab {} is up: {}", layout.name, names.join(", ")));
            exit::say(&format!(
                "client reaches it at {} and {}, by {}",
                layout.outside().0,
                layout.outside().1,
                record.gateway
            ));
            Ok(0)
        }
        LabCommand::Down => {
            let there = dunlin_lab::down::down(&layout)?;
            exit::say(&format!(
                "lab {} {}",
                layout.name,
                if there { "is down" } else { "was not up" }
            ));
            Ok(0)
        }
        LabCommand::Status { json } => {
            let status = dunlin_lab::status::status(&layout)?;
            if json {
                exit::print_json(&status)
            } else {
                exit::print(&table(&status))
            }?;
            Ok(if status.ready { 0 } else { exit::FAILED })
        }
        LabCommand::Exec { on, command } => exec(&layout, &on, &command).map_err(Failed::into_program_failure),
    }
}

fn exec(layout: &Layout, node: &str, command: &[OsString]) -> Outcome {
    let error = dunlin_lab::exec::exec(layout, node, command)?;
    let code = match error.kind() {
        io::ErrorKind::NotFound => NO_PROGRAM,
        _ => NOT_EXECUTABLE,
    };
    Err(Failed::new(code, format!("{}: {error}", command[0].display())))
}

fn table(status: &LabStatus) -> String {
    let dash = || "-".to_owned();
    let mut text = format!(
        "lab {}, modulus {}; client reaches it at {} by {}; inside address {}\n",
        status.name, status.modulus, status.outside_address, status.gateway, status.inside_address
    );
    writeln!(
        text,
        "{:<6} {:>4} {:<15} {:>8} {:>8} {:>5} STATE",
        "NODE", "SLOT", "ADDRESS", "DAEMON", "INIT", "PROCS"
    )
    .expect("strings grow");
    for node in &status.nodes {
        writeln!(
            text,
            "{:<6} {:>4} {:<15} {:>8} {:>8} {:>5} {}",
            node.name,
            node.slot,
            node.address.to_string(),
            node.daemon_pid.map_or_else(dash, |p| p.to_string()),
            node.init_pid.map_or_else(dash, |p| p.to_string()),
            node.processes.map_or_else(dash, |p| p.to_string()),
            node.problem.as_deref().unwrap_or("ready"),
        )
        .expect("strings grow");
    }
    text
}
