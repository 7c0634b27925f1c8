//! How a move goes on, in one rewritten line of a terminal.
//!
//! Owns the line: there is none if standard error is no terminal, and it is wiped when done.

use crate::processes::bytes;
use crate::terminal;
use dunlin_proto::control::{MovePhase, MoveProgress};
use std::io::{self, Write};

/// The line.
#[derive(Debug)]
pub struct ProgressLine {
    style: Option<Style>,
    shown: bool,
}

#[derive(Debug, Clone, Copy)]
struct Style {
    colour: bool,
}

impl ProgressLine {
    /// The line on standard error, if that is a terminal that can rewrite lines.
    pub fn new() -> ProgressLine {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let dumb = set("TERM").is_none_or(|term| term == "dumb");
        let style = (rustix::termios::isatty(io::stderr()) && !dumb).then(|| Style {
            colour: set("NO_COLOR").is_none(),
        });
        ProgressLine { style, shown: false }
    }

    /// Rewrites it.
    pub fn show(&mut self, progress: &MoveProgress, to: &str) {
        let Some(style) = self.style else { return };
        let width = terminal::size(io::stderr()).map_or(80, |size| usize::from(size.cols));
        // One column short: a full line would wrap on some terminals, and then not be rewritten.
        let text = words(progress, to, width.saturating_sub(1));
        let (on, off) = if style.colour {
            ("\x1b[36m", "\x1b[0m")
        } else {
            ("", "")
        };
        let _ = write!(io::stderr(), "\r\x1b[K{on}{text}{off}");
        self.shown = true;
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

fn words(p: &MoveProgress, to: &str, width: usize) -> String {
    let phase = match p.phase {
        MovePhase::Propose => "propose",
        MovePhase::Prepare => "prepare",
        MovePhase::Freeze => "freeze",
        MovePhase::Essence => "essence",
        MovePhase::Commit => "commit",
        MovePhase::Resume => "resume",
        MovePhase::Drain => "drain",
    };
    let mut text = format!("{} → {to}  {phase:<8}", p.pid);
    if p.pages_total > 0 {
        text += &format!("  {} of {} pages left", p.pages_left, p.pages_total);
    }
    if p.bytes_per_second > 0 {
        text += &format!("  {}/s", bytes(p.bytes_per_second));
    }
    text.trim_end().chars().take(width).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_proto::ids::Pid;

    #[test]
    fn the_line_says_phase_pages_and_rate_and_fits() {
        let progress = MoveProgress {
            pid: Pid(129),
            phase: MovePhase::Drain,
            pages_left: 100,
            pages_total: 4096,
            bytes_per_second: 3 << 30,
        };
        assert_eq!(
            words(&progress, "n2", 79),
            "129 → n2  drain     100 of 4096 pages left  3.0G/s"
        );
        assert_eq!(words(&progress, "n2", 10).chars().count(), 10);
        let early = MoveProgress {
            phase: MovePhase::Propose,
            pages_total: 0,
            bytes_per_second: 0,
            ..progress
        };
        assert_eq!(words(&early, "n2", 79), "129 → n2  propose");
    }
}
