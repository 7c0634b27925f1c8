//! The caller's terminal: whether it is one, how large, and raw while a program elsewhere uses it.
//!
//! Owns the terminal's settings while it is raw. Invariant: they are as they were whenever a [`Raw`] is gone.

use dunlin_proto::control::WindowSize;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr};
use std::io;
use std::os::fd::AsFd;

/// A terminal in raw mode.
#[derive(Debug)]
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// Puts the terminal on standard input in raw mode.
    pub fn enter() -> io::Result<Raw> {
        let before = tcgetattr(io::stdin())?;
        let raw = Raw { before };
        raw.resume()?;
        Ok(raw)
    }

    /// As it was, for a while.
    pub fn suspend(&self) {
        // A terminal that is gone needs nothing restored.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }

    /// Raw again.
    pub fn resume(&self) -> io::Result<()> {
        let mut raw = self.before.clone();
        raw.make_raw();
        Ok(tcsetattr(io::stdin(), OptionalActions::Drain, &raw)?)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.suspend();
    }
}

/// The terminal that a program may be given: standard input and output are one, and it is ours to use.
///
/// In the background it is not: touching its settings would stop us.
pub fn to_share() -> Option<WindowSize> {
    let both = isatty(io::stdin()) && isatty(io::stdout());
    (both && in_foreground()).then(|| size(io::stdout()).unwrap_or(WindowSize { rows: 24, cols: 80 }))
}

/// Is standard input a terminal that another job is using?
pub fn taken_by_others() -> bool {
    isatty(io::stdin()) && !in_foreground()
}

/// A terminal's size.
pub fn size(terminal: impl AsFd) -> Option<WindowSize> {
    let size = tcgetwinsize(terminal).ok()?;
    let size = WindowSize {
        rows: size.ws_row,
        cols: size.ws_col,
    };
    (size.rows > 0 && size.cols > 0).then_some(size)
}

fn in_foreground() -> bool {
    tcgetpgrp(io::stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
}
