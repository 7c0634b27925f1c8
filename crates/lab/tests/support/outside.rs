//! Programs on the outside host of a lab, and what TCP has counted there.

use super::program;
use dunlin_lab::Lab;
use dunlin_lab::harness::binary_under_test;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

/// Debian's own: a version manager's shim would be measured instead.
pub const PYTHON: &str = "/usr/bin/python3";

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
        self.line()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until each talk of a client has heard an answer to what it said after this was called.
#[track_caller]
pub fn hears_more(client: &mut Outside) {
    client.say("more");
    let line = client.line();
    assert!(line.starts_with("heard"), "{line}");
}

/// The outside addresses of a lab.
pub fn addresses(lab: &Lab) -> [String; 2] {
    let outside = lab.layout().outside();
    [outside.0.to_string(), outside.1.to_string()]
}

/// What TCP counts at the outside host that must not be.
#[track_caller]
pub fn nothing_was_broken(lab: &Lab) {
    let output = lab
        .node("client")
        .exec(&[PYTHON, program("stream.py").to_str().unwrap(), "counters"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    eprintln!("{text}");
    for count in ["EstabResets", "PAWSEstab", "TCPAbortOnTimeout", "InErrs"] {
        let line = text
            .lines()
            .find(|line| line.starts_with(count))
            .expect("it is counted");
        assert_eq!(line, format!("{count} 0"));
    }
}
