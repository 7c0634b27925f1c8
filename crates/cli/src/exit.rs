//! How a command ends: its exit code, and what it says when it failed.
//!
//! Owns the codes and the words of failures. They are documented in `--help`; scripts rely on them.

use dunlin_lab::LabError;
use dunlin_proto::control::{Failure, FailureKind, Reply};
use std::io::{self, Write};
use std::process::ExitCode;

/// The end of every `--help`.
pub const HELP: &str = "\
Exit codes:
  0        done
  1        it failed; the message says what remains true
  2        the command line makes no sense
  3        no such process, or no such node or lab
  4        refused: obstacles are in the way (each is printed with a hint); the process runs on
  5        a daemon that is needed does not answer
  N        run, wait and lab exec: as the program ended, by its exit code or (128+N in a shell) its
           signal; 125 if dunlin failed, 126 if the program cannot be executed, 127 if there is none

Data goes to standard output, messages to standard error. --json is for scripts.
Environment: DUNLIN_LAB, DUNLIN_NODE, DUNLIN_SOCKET (as --lab, --node, --socket); NO_COLOR.";

/// It failed; what is true afterwards is in the message.
pub const FAILED: u8 = 1;
/// The command line makes no sense.
pub const USAGE: u8 = 2;
/// No such process, node or lab.
pub const NOT_THERE: u8 = 3;
/// Obstacles are in the way.
pub const REFUSED: u8 = 4;
/// A daemon that is needed does not answer.
pub const UNREACHABLE: u8 = 5;
/// Of commands that end as a program does: dunlin itself failed.
pub const OWN_FAILURE: u8 = 125;
/// As of a shell: the program cannot be executed.
pub const NOT_EXECUTABLE: u8 = 126;
/// As of a shell: there is no such program.
pub const NO_PROGRAM: u8 = 127;

/// What a command comes to: an exit code, or a failure to be told.
pub type Outcome = Result<u8, Failed>;

/// A failure: its code, and what is said about it (with `hint:` lines).
#[derive(Debug, PartialEq, Eq)]
pub struct Failed {
    /// The exit code.
    pub code: u8,
    /// For standard error; may have several lines, may be empty.
    pub message: String,
}

impl Failed {
    /// A failure with this code.
    pub fn new(code: u8, message: impl Into<String>) -> Failed {
        Failed {
            code,
            message: message.into(),
        }
    }

    /// The same, of a command that ends as a program does: its codes are the program's, so ours step aside.
    pub fn into_program_failure(self) -> Failed {
        let code = if self.code < OWN_FAILURE {
            OWN_FAILURE
        } else {
            self.code
        };
        Failed { code, ..self }
    }
}

impl From<LabError> for Failed {
    fn from(error: LabError) -> Failed {
        let code = match &error {
            LabError::Name { .. } | LabError::Options(_) => USAGE,
            LabError::NoLab { .. } | LabError::NoNode { .. } => NOT_THERE,
            LabError::Daemon { .. } => UNREACHABLE,
            LabError::Exists { .. }
            | LabError::NotRoot
            | LabError::NoCgroup2
            | LabError::Tool { .. }
            | LabError::NoIp
            | LabError::Io { .. }
            | LabError::NotReady { .. }
            | LabError::Undead { .. } => FAILED,
        };
        Failed::new(code, error.to_string())
    }
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Failed {
        let code = match failure.kind {
            FailureKind::NoProcess | FailureKind::NoNode => NOT_THERE,
            FailureKind::Unreachable => UNREACHABLE,
            FailureKind::NotFound => NO_PROGRAM,
            FailureKind::NotExecutable => NOT_EXECUTABLE,
            FailureKind::Invalid => USAGE,
            FailureKind::Forbidden | FailureKind::MoveFailed | FailureKind::Other => FAILED,
        };
        let hint = failure.hint.map(|h| format!("\nhint: {h}")).unwrap_or_default();
        Failed::new(code, failure.message + &hint)
    }
}

/// The answer that ends every request that could not be done, or one that makes no sense here.
pub fn unexpected(reply: Reply) -> Failed {
    match reply {
        Reply::Error(failure) => failure.into(),
        other => Failed::new(
            FAILED,
            format!("the daemon gave an answer that is none: {other:?}\nhint: is it of another version?"),
        ),
    }
}

/// Tells a failure and turns the outcome into the process's exit code.
pub fn finish(outcome: Outcome) -> ExitCode {
    ExitCode::from(outcome.unwrap_or_else(|failed| {
        if !failed.message.is_empty() {
            say(&failed.message);
        }
        failed.code
    }))
}

/// A message for a person, on standard error. That nobody may be there to read it changes nothing.
pub fn say(message: &str) {
    let _ = writeln!(io::stderr(), "dunlin: {message}");
}

/// Data, on standard output. A reader that went away has had enough.
pub fn print(data: &str) -> Outcome {
    let mut out = io::stdout().lock();
    match out.write_all(data.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failed::new(FAILED, format!("writing to standard output: {e}")))
        }
        _ => Ok(0),
    }
}

/// Data as JSON, on standard output.
pub fn print_json(data: &impl serde::Serialize) -> Outcome {
    let text = serde_json::to_string_pretty(data).expect("our own types have string keys and finite depth");
    print(&(text + "\n"))
}

/// Data as one line of JSON.
pub fn json_line(data: &impl serde::Serialize) -> String {
    serde_json::to_string(data).expect("our own types have string keys and finite depth") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(kind: FailureKind) -> Failed {
        let message = "no process 7".into();
        Failure {
            kind,
            message,
            hint: Some("look at `dunlin ps`".into()),
        }
        .into()
    }

    #[test]
    fn failures_keep_their_codes_and_hints() {
        assert_eq!(failure(FailureKind::NoProcess).code, NOT_THERE);
        assert_eq!(failure(FailureKind::Unreachable).code, UNREACHABLE);
        assert_eq!(
            failure(FailureKind::NoProcess).message,
            "no process 7\nhint: look at `dunlin ps`"
        );
    }

    #[test]
    fn commands_that_end_as_programs_have_codes_of_their_own() {
        assert_eq!(failure(FailureKind::NoNode).into_program_failure().code, OWN_FAILURE);
        assert_eq!(failure(FailureKind::NotFound).into_program_failure().code, NO_PROGRAM);
        assert_eq!(
            failure(FailureKind::NotExecutable).into_program_failure().code,
            NOT_EXECUTABLE
        );
    }
}
