//! Why a process could not be captured.

use crate::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_sys::foothold::FootholdError;
use dunlin_sys::ptrace::TraceError;
use dunlin_sys::script::ScriptError;
use std::io;

/// Why a process could not be captured. It runs on as before.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// It has ended.
    #[error("the process has ended")]
    Gone,
    /// Something about it cannot be moved.
    #[error("{}", obstacle::summary(.0))]
    Obstacles(Vec<Obstacle>),
    /// The kernel did not do what it should.
    #[error("{what}: {source}")]
    Kernel {
        /// What was attempted.
        what: &'static str,
        /// What came of it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl From<crate::sockets::leaving::LeaveError> for CaptureError {
    fn from(error: crate::sockets::leaving::LeaveError) -> Self {
        match error {
            crate::sockets::leaving::LeaveError::Obstacles(obstacles) => CaptureError::Obstacles(obstacles),
            source => CaptureError::Kernel {
                what: "capturing sockets",
                source: source.into(),
            },
        }
    }
}

impl From<TraceError> for CaptureError {
    fn from(error: TraceError) -> Self {
        match error {
            TraceError::Gone { .. } => CaptureError::Gone,
            source => CaptureError::Kernel {
                what: "tracing",
                source: source.into(),
            },
        }
    }
}

impl From<FootholdError> for CaptureError {
    fn from(error: FootholdError) -> Self {
        match error {
            FootholdError::Trace(error) => error.into(),
            source => CaptureError::Kernel {
                what: "gaining a foothold",
                source: source.into(),
            },
        }
    }
}

impl From<ScriptError> for CaptureError {
    fn from(error: ScriptError) -> Self {
        match error {
            ScriptError::Trace(error) => error.into(),
            source => CaptureError::Kernel {
                what: "a script",
                source: source.into(),
            },
        }
    }
}

impl From<io::Error> for CaptureError {
    fn from(source: io::Error) -> Self {
        match source.raw_os_error() {
            // What /proc answers for a task that has gone.
            Some(3) => CaptureError::Gone,
            _ if source.kind() == io::ErrorKind::NotFound => CaptureError::Gone,
            _ => CaptureError::Kernel {
                what: "reading /proc",
                source: source.into(),
            },
        }
    }
}
