//! `dunlin run`, `wait` and `logs`: programs on our standard streams, and their end as ours.
//!
//! Owns what passes between the caller's streams, signals and terminal and the program's. The streams belong to the
//! connection, so it does not matter to where the program moves meanwhile.

use crate::connect::lost;
use crate::exit::{self, FAILED, Failed, OWN_FAILURE, Outcome, USAGE};
use crate::relay::Relay;
use crate::{Whom, output, terminal};
use clap::Args;
use dunlin_lab::control::Connection;
use dunlin_proto::control::{ExitStatus, Reply, Request, RunSpec};
use dunlin_proto::ids::Pid;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// `dunlin run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Without -d, standard input, output and error, signals and the exit status pass through, wherever the program is by
then. On a terminal the program gets a terminal of its own. Standard input is read ahead of the program, as ssh does:
in a loop that reads a file, give `run` an input of its own (< /dev/null).
Exit code: the program's; 125 if dunlin failed, 126 if the program cannot be executed, 127 if there is none.")]
pub struct RunArgs {
    /// Print the PID and return; output goes to a log (see `dunlin logs`), input is /dev/null
    #[arg(short, long)]
    detach: bool,
    /// Start in this directory [default: the current one]
    #[arg(long, value_name = "D")]
    cwd: Option<PathBuf>,
    /// Set an environment variable, beside those of the caller
    #[arg(long, value_name = "K=V")]
    env: Vec<OsString>,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[cfg(test)]
impl RunArgs {
    /// The program and its arguments.
    pub fn words(&self) -> &[OsString] {
        &self.command
    }
}

/// Runs a program.
pub fn run(args: RunArgs, whom: &Whom) -> Outcome {
    // The guards of terminal and signals are gone when `session` returns: only then may we die as the program did.
    match session(args, whom).map_err(Failed::into_program_failure)? {
        Some(status) => end_like(status),
        None => Ok(0),
    }
}

/// Waits for a process and ends as it did.
pub fn wait(pid: Pid, whom: &Whom) -> Outcome {
    let reply = whom.ask(&Request::Wait { pid }).map_err(Failed::into_program_failure)?;
    match reply {
        Reply::Exited(status) => end_like(status),
        other => Err(exit::unexpected(other).into_program_failure()),
    }
}

/// Shows what a detached run has written.
pub fn logs(pid: Pid, follow: bool, whom: &Whom) -> Outcome {
    let mut connection = whom.connect()?;
    let request = Request::Logs { pid, follow };
    connection.send(&request).map_err(|e| lost(&connection, &e))?;
    loop {
        match connection.receive().map_err(|e| lost(&connection, &e))? {
            Reply::Output { stream, bytes } => {
                if output::write(stream, &bytes)? == output::Reader::Gone {
                    return Ok(0);
                }
            }
            Reply::Done => return Ok(0),
            other => return Err(exit::unexpected(other)),
        }
    }
}

fn session(args: RunArgs, whom: &Whom) -> Result<Option<ExitStatus>, Failed> {
    let detach = args.detach;
    let spec = spec(args)?;
    let on_terminal = spec.tty.is_some();
    let mut connection = whom.connect()?;
    connection
        .send(&Request::Run(spec))
        .map_err(|e| lost(&connection, &e))?;
    let pid = match connection.receive().map_err(|e| lost(&connection, &e))? {
        Reply::Started { pid } => pid,
        other => return Err(exit::unexpected(other)),
    };
    if detach {
        exit::print(&format!("{pid}\n"))?;
        return Ok(None);
    }
    let relay = Relay::start(&connection, on_terminal)?;
    loop {
        match connection.receive().map_err(|e| parted(&connection, pid, &e))? {
            Reply::Output { stream, bytes } => {
                if output::write(stream, &bytes)? == output::Reader::Gone {
                    // As if its own write had met a closed pipe; what it makes of that is its business.
                    relay.signal(rustix::process::Signal::PIPE.as_raw());
                }
            }
            Reply::InputTaken { bytes } => relay.input_taken(bytes),
            Reply::Exited(status) => return Ok(Some(status)),
            other => return Err(exit::unexpected(other)),
        }
    }
}

fn spec(args: RunArgs) -> Result<RunSpec, Failed> {
    if let Some(bad) = args
        .env
        .iter()
        .find(|e| e.as_bytes().iter().position(|b| *b == b'=').is_none_or(|at| at == 0))
    {
        return Err(Failed::new(
            USAGE,
            format!("--env {} is not KEY=VALUE", bad.to_string_lossy()),
        ));
    }
    let mut environment: Vec<Vec<u8>> = Vec::new();
    let own = std::env::vars_os().map(|(key, value)| [key.into_vec(), b"=".to_vec(), value.into_vec()].concat());
    for entry in own.chain(args.env.into_iter().map(OsString::into_vec)) {
        let key = |e: &[u8]| e.split(|b| *b == b'=').next().map(<[u8]>::to_vec);
        environment.retain(|e| key(e) != key(&entry));
        environment.push(entry);
    }
    let here = || std::env::current_dir().map_err(|e| Failed::new(FAILED, format!("the current directory: {e}")));
    let cwd = match args.cwd {
        Some(path) if path.is_absolute() => path,
        Some(path) => here()?.join(path),
        None => here()?,
    };
    Ok(RunSpec {
        argv: args.command.into_iter().map(OsString::into_vec).collect(),
        env: environment,
        cwd: cwd.into_os_string().into_vec(),
        umask: umask(),
        detach: args.detach,
        tty: if args.detach { None } else { terminal::to_share() },
    })
}

/// Asking for the umask means setting it; this is before we have other threads.
fn umask() -> u32 {
    use rustix::fs::Mode;
    let umask = rustix::process::umask(Mode::from_raw_mode(0o077));
    rustix::process::umask(umask);
    umask.as_raw_mode()
}

fn parted(connection: &Connection, pid: Pid, error: &std::io::Error) -> Failed {
    let failed = lost(connection, error);
    let advice = format!("process {pid} runs on without us; `dunlin wait {pid}` waits for it");
    Failed::new(failed.code, format!("{}\n{advice}", failed.message))
}

/// Ends as the program did. The name of a signal outlives us only if we die by it too.
fn end_like(status: ExitStatus) -> Outcome {
    match status {
        ExitStatus::Code(code) => Ok(code as u8),
        ExitStatus::Signal { signal, core: _ } => dunlin_sys::foreground::die_by(signal),
        ExitStatus::Unknown => Err(Failed::new(
            OWN_FAILURE,
            "it has ended, but this kernel tells only its parent how\nhint: Linux 6.15 and later tell everyone",
        )),
    }
}
