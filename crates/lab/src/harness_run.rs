//! A program under test, on its standard streams.
//!
//! Owns the run's connection: one thread collects what the program writes, so that a test may wait for any of it.

use crate::control::Connection;
use dunlin_proto::control::{ExitStatus, INPUT_WINDOW_BYTES, Reply, RunInput};
use dunlin_proto::frame;
use dunlin_proto::ids::Pid;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long a test waits for a line or an end, at most.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running program.
#[derive(Debug)]
pub struct Run {
    /// Its PID.
    pub pid: Pid,
    input: UnixStream,
    input_sent: u64,
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

#[derive(Debug, Default)]
struct Seen {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    input_taken: u64,
    end: Option<Result<ExitStatus, String>>,
}

impl Seen {
    /// For a person: how it ended, and the last of what it wrote.
    fn in_words(&self) -> String {
        let tail = |bytes: &[u8]| String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(1500)..]).into_owned();
        let end = self
            .end
            .as_ref()
            .map_or("it still runs".into(), |end| format!("it ended: {end:?}"));
        format!(
            "{end}; its output ends with:\n{}\nits errors with:\n{}",
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }
}

/// How a program ended, and all that it wrote.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// To its standard output.
    pub stdout: String,
    /// To its standard error.
    pub stderr: String,
}

impl Run {
    pub(crate) fn new(mut connection: Connection, pid: Pid) -> Run {
        let input = connection.input().expect("a socket can be duplicated");
        let seen = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        let shared = Arc::clone(&seen);
        std::thread::spawn(move || {
            loop {
                let reply = connection.receive();
                let mut seen = shared.0.lock().expect("no test panics holding it");
                match reply {
                    Ok(Reply::Output { stream: 1, bytes }) => seen.stdout.extend(bytes),
                    Ok(Reply::Output { bytes, .. }) => seen.stderr.extend(bytes),
                    // How much may be sent ahead is the command line's concern; the daemon takes what a test sends.
                    Ok(Reply::InputTaken { bytes }) => seen.input_taken += u64::from(bytes),
                    Ok(Reply::Exited(status)) => seen.end = Some(Ok(status)),
                    Ok(other) => seen.end = Some(Err(format!("the daemon answered {other:?}"))),
                    Err(e) => seen.end = Some(Err(format!("the connection of the run ended: {e}"))),
                }
                shared.1.notify_all();
                if seen.end.is_some() {
                    return;
                }
            }
        });
        Run {
            pid,
            input,
            input_sent: 0,
            seen,
        }
    }

    /// Writes to its standard input.
    #[track_caller]
    pub fn type_in(&mut self, text: &str) {
        for part in text.as_bytes().chunks(64 << 10) {
            self.input_sent += part.len() as u64;
            let taken = self.input_sent.saturating_sub(INPUT_WINDOW_BYTES);
            self.until("room for its input", |seen| seen.input_taken >= taken);
            self.send(&RunInput::Stdin(part.to_vec()));
        }
    }

    /// Ends its standard input.
    #[track_caller]
    pub fn end_input(&mut self) {
        self.send(&RunInput::StdinEnd);
    }

    /// As if `dunlin run` had received a signal.
    #[track_caller]
    pub fn signal(&mut self, signal: i32) {
        self.send(&RunInput::Signal(signal));
    }

    #[track_caller]
    fn send(&mut self, input: &RunInput) {
        frame::write(&mut self.input, input).expect("the daemon takes input");
    }

    /// What it has written to its standard output so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.seen.0.lock().expect("no test panics holding it").stdout).into_owned()
    }

    /// Waits until its standard output so far is as asked for.
    #[track_caller]
    pub fn until_stdout(&self, what: &str, holds: impl Fn(&str) -> bool) {
        self.until(what, |seen| holds(&String::from_utf8_lossy(&seen.stdout)));
    }

    /// Waits until it has written this.
    #[track_caller]
    pub fn until_says(&self, text: &str) {
        self.until_stdout(text, |stdout| stdout.contains(text));
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(self) -> Ended {
        self.until("the end of the run", |seen| seen.end.is_some());
        let seen = self.seen.0.lock().expect("no test panics holding it");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match seen.end.clone().expect("waited for") {
            Ok(status) => Ended {
                status,
                stdout: text(&seen.stdout),
                stderr: text(&seen.stderr),
            },
            Err(why) => panic!("{why}; until then: {}{}", text(&seen.stdout), text(&seen.stderr)),
        }
    }

    #[track_caller]
    fn until(&self, what: &str, holds: impl Fn(&Seen) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = self.seen.0.lock().expect("no test panics holding it");
        while !holds(&seen) {
            let left = deadline.saturating_duration_since(Instant::now());
            let given_up = left.is_zero() || seen.end.is_some();
            if given_up {
                let words = seen.in_words();
                drop(seen); // the collecting thread goes on without it
                panic!("waited in vain for {what}: {words}");
            }
            seen = self
                .seen
                .1
                .wait_timeout(seen, left)
                .expect("no test panics holding it")
                .0;
        }
    }
}
