//! The daemon as a role of this binary.
//!
//! Owns what is before it: its log, and in a lab its session and control group. (PID 1 of a nest needs neither, see
//! `main`.)

use crate::exit::{FAILED, Failed, Outcome};
use clap::Args;
use dunlin_node::config::NodeConfig;
use std::error::Error;
use std::path::PathBuf;
use tracing_subscriber::EnvFilter;

/// `dunlin node`.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// The node's configuration (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Of a lab: leave the caller's session and join this control group first.
    #[arg(long, hide = true, value_name = "DIR")]
    lab_group: Option<PathBuf>,
}

/// Is the daemon, until it is told to end.
pub fn node(args: NodeArgs) -> Outcome {
    if let Some(group) = &args.lab_group {
        // Before anything is started that could outlive the lab.
        dunlin_lab::cgroup::join(group)?;
        rustix::process::setsid().map_err(|e| Failed::new(FAILED, format!("leaving the session: {e}")))?;
    }
    start_log();
    let config = NodeConfig::load(&args.config).map_err(|e| Failed::new(FAILED, words(&e)))?;
    dunlin_node::daemon::run(config).map_err(|e| Failed::new(FAILED, words(&e)))?;
    Ok(0)
}

fn start_log() {
    let filter = EnvFilter::try_from_env("DUNLIN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .try_init();
    if let Err(error) = started {
        eprintln!("dunlin: there will be no log: {error}");
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "started");
}

/// An error and what it came from, unless the error says so itself.
fn words(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
