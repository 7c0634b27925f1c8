//! The `dunlin` command: one binary, several roles.
//!
//! Owns the command line: what may be said, in which words, and with which exit code it ends. Refuses to know how
//! anything is done: commands ask a daemon over its control socket, roles are `dunlin_node`'s. Invariants: data goes
//! to standard output, messages to standard error; a reader that goes away is not an error.

mod connect;
mod doctor;
mod exit;
mod gateway;
mod lab;
mod moving;
mod output;
mod processes;
mod progress;
mod relay;
mod roles;
mod run;
mod signals;
mod table;
mod terminal;

use clap::{Args, Parser, Subcommand, ValueEnum};
use dunlin_proto::control::{MoveMode, WaitFor};
use dunlin_proto::ids::Pid;
use std::path::PathBuf;
use std::process::ExitCode;

/// Move running, unmodified programs between Linux machines.
///
/// Every machine (a node) runs the same daemon. A program started by `dunlin run` can be moved to another node while
/// it runs; it keeps its PID, its parent and its work, and `dunlin ps` shows it from everywhere.
///
/// Try it on one machine: `dunlin lab up`, `dunlin --node n1 run -d -- sleep 100`, `dunlin move PID n2`, `dunlin ps`,
/// `dunlin lab down`.
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
    #[arg(long, global = true, value_name = "NAME", env = "DUNLIN_LAB", hide_env = true)]
    lab: Option<String>,
    /// Talk to the daemon of this node [default: any that answers]
    #[arg(long, global = true, value_name = "NODE", env = "DUNLIN_NODE", hide_env = true)]
    node: Option<String>,
    /// Talk to the daemon that listens here
    #[arg(long, global = true, value_name = "PATH", env = "DUNLIN_SOCKET", hide_env = true)]
    socket: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a program on a node
    Run(run::RunArgs),
    /// List the processes of the whole cluster
    Ps {
        /// As JSON: an array of {pid, ppid, home, node, state, threads, rss_bytes, pages_elsewhere {node: count}, moves,
        /// user, command}
        #[arg(long)]
        json: bool,
    },
    /// Move a running process to another node
    Move(MoveArgs),
    /// Would a process move, and if not, what is in the way?
    CanMove {
        /// The process
        #[arg(value_parser = pid)]
        pid: Pid,
        /// The node it would go to [default: only what its own node knows is checked]
        #[arg(long, value_name = "NODE")]
        to: Option<String>,
        /// As JSON: {pid, to, movable, obstacles [{pid, kind, object, why, hint}]}
        #[arg(long)]
        json: bool,
    },
    /// Send a signal to a process, wherever it is
    Kill {
        /// The signal: TERM, SIGTERM or 15; 0 only asks whether the process is there
        #[arg(short, long, value_name = "SIG", default_value = "TERM", value_parser = signals::parse)]
        signal: i32,
        /// The process
        #[arg(value_parser = pid)]
        pid: Pid,
    },
    /// Wait for a process to end, wherever it is, and end as it did
    Wait {
        /// The process
        #[arg(value_parser = pid)]
        pid: Pid,
    },
    /// Show the output of a program that was run with -d
    Logs {
        /// The process
        #[arg(value_parser = pid)]
        pid: Pid,
        /// Go on until it ends
        #[arg(short, long)]
        follow: bool,
    },
    /// Show which node has which socket: the table by which the gateway steers what comes from outside
    Gateway {
        /// As JSON: {gateway, outside: addresses, entries [{proto, ip, port, peer, node, action, learned, epoch, packets,
        /// bytes, idle_ms}]}; with --watch a line {change, entry} each
        #[arg(long)]
        json: bool,
        /// Go on and show each change: + added, ~ changed, - removed
        #[arg(long)]
        watch: bool,
    },
    /// Can this machine be a node? Tries every kernel interface that dunlin stands on
    Doctor(doctor::DoctorArgs),
    /// Be a node: run its daemon until SIGTERM; the programs of its nest go on without it
    Node(roles::NodeArgs),
    /// Make, take down and look at a whole cluster on this machine
    Lab(lab::LabArgs),
    /// Print the version
    Version,
}

/// `dunlin move`.
#[derive(Debug, Args)]
pub struct MoveArgs {
    /// The process
    #[arg(value_name = "PID", value_parser = pid)]
    pid: Pid,
    /// The node it goes to
    #[arg(value_name = "NODE")]
    to: String,
    /// With all its descendants
    #[arg(long)]
    tree: bool,
    /// How its pages travel
    #[arg(long, value_enum, default_value_t = Mode::Demand)]
    mode: Mode,
    /// Until when to wait
    #[arg(long, value_enum, default_value_t = Until::Drained)]
    wait: Until,
    /// As JSON: {pid, from, to, mode, freeze_ms, essence_bytes, prepare_ms, resumed_ms, drained_ms, pages_faulted,
    /// pages_pushed, faults_avoided_ratio, fault_us {p50, p99}}, with --tree an array of them; if refused, as of can-move
    #[arg(long)]
    json: bool,
    /// Hold both copies and compare them in full (for tests: stops the program for as long as its memory is large).
    #[arg(long, hide = true)]
    verify: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    /// After it runs on the new node, those it waits for first
    Demand,
    /// Before it stops, in rounds
    Precopy,
    /// Before it stops, once; what it has changed since comes after
    Hybrid,
}

impl From<Mode> for MoveMode {
    fn from(mode: Mode) -> MoveMode {
        match mode {
            Mode::Demand => MoveMode::Demand,
            Mode::Precopy => MoveMode::Precopy,
            Mode::Hybrid => MoveMode::Hybrid,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Until {
    /// It runs on the new node
    Resumed,
    /// Nothing of it is elsewhere any more
    Drained,
}

impl From<Until> for WaitFor {
    fn from(until: Until) -> WaitFor {
        match until {
            Until::Resumed => WaitFor::Resumed,
            Until::Drained => WaitFor::Drained,
        }
    }
}

fn pid(text: &str) -> Result<Pid, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(Pid(number)),
        _ => Err("a PID is a positive number".into()),
    }
}

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    // PID 1 of a nest is started by a daemon, not by people: its words are not for the parser.
    if words.nth(1).is_some_and(|role| role == "init") {
        return dunlin_node::init::main(words.collect());
    }
    exit::finish(dispatch(Cli::parse()))
}

fn dispatch(cli: Cli) -> exit::Outcome {
    let whom = &cli.whom;
    match cli.command {
        Command::Run(args) => run::run(args, whom),
        Command::Ps { json } => processes::ps(json, whom),
        Command::Gateway { json, watch } => gateway::gateway(json, watch, whom),
        Command::Move(args) => moving::main(args, whom),
        Command::CanMove { pid, to, json } => moving::can_move(pid, to, json, whom),
        Command::Kill { signal, pid } => processes::kill(pid, signal, whom),
        Command::Wait { pid } => run::wait(pid, whom),
        Command::Logs { pid, follow } => run::logs(pid, follow, whom),
        Command::Doctor(args) => doctor::main(args),
        Command::Node(args) => roles::node(args),
        Command::Lab(args) => lab::main(args, whom),
        Command::Version => exit::print(&format!("dunlin {}\n", env!("CARGO_PKG_VERSION"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_exact_forms_are_understood() {
        for line in [
            "dunlin --lab x --node n1 run -d --cwd /tmp --env A=1 --env B=2 -- sh -c true",
            "dunlin --node n1 run -- sleep 1",
            "dunlin run sleep -1",
            "dunlin ps --json",
            "dunlin move 129 n2 --tree --mode hybrid --wait resumed --json",
            "dunlin move 129 n2 --verify",
            "dunlin can-move 129 --to n2 --json",
            "dunlin kill -s TERM 129",
            "dunlin kill 129 -s 9",
            "dunlin wait 129",
            "dunlin logs 129 -f",
            "dunlin doctor --json",
            "dunlin version",
            "dunlin lab up --nodes 3 --name x --modulus 8 --pid-limit 400",
            "dunlin lab down --name x",
            "dunlin lab status --json",
            "dunlin lab exec n2 --name x -- ip addr show -4",
            "dunlin --lab x lab exec n2 -- true --name",
        ] {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
        for line in [
            "dunlin run",
            "dunlin move 0 n1",
            "dunlin move x n1",
            "dunlin kill -s NO 7",
            "dunlin move 7",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }

    #[test]
    fn the_programs_words_are_left_alone() {
        let cli = Cli::try_parse_from("dunlin run -- sh -c x -- -d --json".split(' ')).unwrap();
        let Command::Run(args) = cli.command else { panic!() };
        assert_eq!(args.words(), ["sh", "-c", "x", "--", "-d", "--json"]);
    }
}
