//! From the caller to the program: standard input, signals, the terminal's size.
//!
//! Owns two threads that end with the process, and the terminal while it is raw. Invariant: a signal is never stuck
//! behind input that the program does not read: it takes a connection of its own then.

use crate::exit::{FAILED, Failed};
use crate::terminal::{self, Raw};
use dunlin_lab::control::Connection;
use dunlin_proto::control::{Request, RunInput};
use dunlin_proto::frame;
use dunlin_proto::ids::Pid;
use dunlin_sys::foreground::Caught;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, getpid, kill_process};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// At most this much standard input in one message, as the protocol bounds it.
const INPUT_BYTES: usize = 64 << 10;

/// So long a signal waits for input before it, which the program may yet read, until it overtakes it.
const SOON: Duration = Duration::from_millis(50);

/// What the caller passes on while the program runs.
pub struct Relay {
    line: Arc<Line>,
}

/// The way to the program.
struct Line {
    input: Mutex<UnixStream>,
    /// Another daemon connection is made here when `input` is full.
    socket: PathBuf,
    pid: Pid,
    terminal: Mutex<Option<Raw>>,
}

impl Relay {
    /// Starts passing on. From now on signals do not happen to this process.
    pub fn start(connection: &Connection, pid: Pid, on_terminal: bool) -> Result<Relay, Failed> {
        let failed = |what: &str, e: &dyn std::fmt::Display| Failed::new(FAILED, format!("{what}: {e}"));
        let signals = [
            Signal::HUP,
            Signal::INT,
            Signal::QUIT,
            Signal::USR1,
            Signal::USR2,
            Signal::TERM,
            Signal::TSTP,
            Signal::CONT,
            Signal::WINCH,
        ];
        let caught = Caught::new(&signals.map(Signal::as_raw)).map_err(|e| failed("catching signals", &e))?;
        let raw = if on_terminal {
            Some(Raw::enter().map_err(|e| failed("the terminal", &e))?)
        } else {
            None
        };
        let line = Arc::new(Line {
            input: Mutex::new(connection.input().map_err(|e| failed("the connection", &e))?),
            socket: connection.socket().into(),
            pid,
            terminal: Mutex::new(raw),
        });
        let relay = Relay { line };
        let (signals, input) = (Arc::clone(&relay.line), Arc::clone(&relay.line));
        std::thread::spawn(move || {
            while let Ok(signal) = caught.next() {
                signals.received(signal);
            }
        });
        std::thread::spawn(move || input.pump());
        Ok(relay)
    }

    /// Passes a signal on.
    pub fn signal(&self, signal: i32) {
        self.line.signal(signal);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The threads hold the line until the process ends, but the terminal is given back now.
        drop(lock(&self.line.terminal).take());
    }
}

impl Line {
    fn received(&self, signal: i32) {
        if signal == Signal::WINCH.as_raw() {
            if lock(&self.terminal).is_some()
                && let Some(size) = terminal::size(io::stdout())
            {
                self.send_or_drop(&RunInput::Resize(size));
            }
        } else if signal == Signal::TSTP.as_raw() {
            self.stop();
        } else {
            self.signal(signal);
        }
    }

    /// Stops the program, then ourselves; what wakes us, SIGCONT, comes as the next signal and is passed on.
    fn stop(&self) {
        // Not TSTP: no shell watches over the program's group where it runs, and the kernel does not let TSTP stop
        // such an orphaned group.
        self.signal(Signal::STOP.as_raw());
        let raw = lock(&self.terminal);
        if let Some(raw) = &*raw {
            raw.suspend();
        }
        let _ = kill_process(getpid(), Signal::STOP);
        // Woken in the background (`bg`), we leave the terminal to the shell.
        if let Some(raw) = &*raw
            && !terminal::taken_by_others()
        {
            let _ = raw.resume();
        }
    }

    fn signal(&self, signal: i32) {
        if !self.send_or_drop(&RunInput::Signal(signal)) {
            let another = Connection::open(&self.socket);
            let sent = another.and_then(|mut c| c.ask(&Request::Kill { pid: self.pid, signal }));
            if let Err(e) = sent {
                crate::exit::say(&format!("signal {signal} did not reach process {}: {e}", self.pid));
            }
        }
    }

    /// Sends a small message if the line is free, or soon will be; `false` if it is full of input that nobody reads.
    fn send_or_drop(&self, message: &RunInput) -> bool {
        let soon = Instant::now() + SOON;
        while Instant::now() < soon {
            let input = match self.input.try_lock() {
                Ok(input) => Some(input),
                Err(TryLockError::Poisoned(input)) => Some(input.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            };
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            if let Some(mut input) = input
                && poll(&mut [PollFd::new(&*input, PollFlags::OUT)], Some(&now)).is_ok_and(|ready| ready == 1)
            {
                return frame::write(&mut *input, message).is_ok();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    /// Passes standard input on until it ends.
    fn pump(&self) {
        let mut buffer = vec![0; INPUT_BYTES];
        // Reading a terminal that another job uses would stop us, and the program's output with us.
        while !terminal::taken_by_others() {
            let read = match rustix::io::read(io::stdin(), &mut buffer[..]) {
                Ok(0) => break,
                Ok(read) => read,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    let _ = poll(&mut [PollFd::new(&io::stdin(), PollFlags::IN)], None);
                    continue;
                }
                // No terminal any more, or never an input: that is an end too.
                Err(_) => break,
            };
            let message = RunInput::Stdin(buffer[..read].to_vec());
            if frame::write(&mut *lock(&self.input), &message).is_err() {
                // The daemon has closed its end; the reader of replies will learn why.
                return;
            }
        }
        let _ = frame::write(&mut *lock(&self.input), &RunInput::StdinEnd);
    }
}

/// A thread that panicked with the lock left nothing half done that another could trip over.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
