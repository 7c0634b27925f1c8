//! Programs on the outside host of a lab.

use dunlin_lab::Lab;
use dunlin_lab::harness::binary_under_test;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

/// One, which ends with the value.
pub struct Outside {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Outside {
    /// Starts it.
    #[track_caller]
    pub fn start(lab: &Lab, arguments: &[&str]) -> Outside {
        let mut command = Command::new(binary_under_test());
        command.args(["--lab", lab.name(), "lab", "exec", "client", "--"]);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("a program on the outside host");
        let lines = BufReader::new(child.stdout.take().expect("piped"));
        Outside { child, lines }
    }

    /// Its next line.
    #[track_caller]
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        let length = self.lines.read_line(&mut line).expect("a line");
        assert!(length > 0, "the program on the outside host has ended");
        line.trim_end().into()
    }

    /// Gives it a line.
    pub fn say(&mut self, line: &str) {
        let mut to = self.child.stdin.as_ref().expect("piped");
        writeln!(to, "{line}").expect("it reads");
    }

    /// Tells it to come to an end, and waits for its last line.
    #[track_caller]
    pub fn last_words(&mut self) -> String {
        self.say("");
        loop {
            let line = self.line();
            if !line.starts_with("heard") {
                return line;
            }
        }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
