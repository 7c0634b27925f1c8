//! The `dunlin` command: one binary, several roles.
//!
//! Owns the command line: what may be said, in which words, and with which exit code it ends. Refuses to know how
//! anything is done: commands ask a daemon over its control socket, roles are `dunlin_node`'s. Invariants: data goes
//! to standard output, messages to standard error; a reader that goes away is not an error.

mod connect;
mod exit;
mod lab;

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Move running, unmodified programs between Linux machines.
///
/// Every machine (a node) runs the same daemon. Programs started by `dunlin run` can be moved to another node while
/// they run, keep their PID and their work, and are seen by `dunlin ps` from everywhere.
#[derive(Debug, Parser)]
#[command(name = "dunlin", version, max_term_width = 100, after_help = exit::HELP, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    whom: Whom,
    #[command(subcommand)]
    command: Command,
}

/// Which daemon a command talks to.
#[derive(Debug, Clone, Args)]
pub struct Whom {
    /// Talk to this lab [default: this machine's own daemon if it has one, else the lab named `lab`]
    #[arg(long, global = true, value_name = "NAME", env = "DUNLIN_LAB")]
    lab: Option<String>,
    /// Talk to the daemon of this node [default: any that answers]
    #[arg(long, global = true, value_name = "NODE", env = "DUNLIN_NODE")]
    node: Option<String>,
    /// Talk to the daemon that listens here
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "DUNLIN_SOCKET",
        conflicts_with = "lab"
    )]
    socket: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make, take down and look at a whole cluster on this machine
    Lab(lab::LabArgs),
    /// Print the version
    Version,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    exit::finish(dispatch(cli))
}

fn dispatch(cli: Cli) -> exit::Outcome {
    match cli.command {
        Command::Lab(args) => lab::main(args, &cli.whom),
        Command::Version => exit::print(&format!("dunlin {}\n", env!("CARGO_PKG_VERSION"))),
    }
}
